r"""Split: transitions that move the denoiser and the guidance apart, each with its own solver."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .denoiser import Denoiser
from .gaussian import Gaussian
from .guidance import Guidance
from .guiding.kick import EulerKick, Force, Kick, MultistepKick, Seen, Span
from .process import Level
from .solver import AdamsBashforth
from .transition import Step, Transition

__all__ = ["SCHEMES", "Memory", "Projected", "Split", "settled"]


class Memory(NamedTuple):
    """What a split step remembers: one history per operator.

    Attributes:
        steps: Taken so far.
        flow: Of the denoiser's solver.
        kick: Of the guidance's.
        seen: The last gradient, where it may have to tell how stiff the guidance is; None once that was told.
    """

    steps: int = 0
    flow: Any = None
    kick: Any = None
    seen: tuple[Seen, ...] | None = ()


class Move(NamedTuple):
    """One step, in numbers: levels, scales and the span of sigma / alpha."""

    lam_t: float
    lam_s: float
    alpha_t: float
    sigma_t: float
    alpha_s: float
    sigma_s: float
    span: Span


class Scheme(ABC):
    """What happens around the denoiser's move: something before it, at x_t, and something after it, at x_s.

    Attributes:
        early: Whether the denoiser sees a state that was kicked in this step.
        lone: Whether a step asks for one gradient, so that there are two to compare only with that of the step before.
        limit: The |h| L up to which it is stable; see the table of `Split`.
    """

    early = lone = False
    limit: float = math.inf

    @abstractmethod
    def before(self, force: Force, x: Tensor, move: Move, held: Any) -> tuple[Tensor, Denoiser, Any]:
        """The state that the denoiser's solver starts from, the denoiser it is given, and what `after` needs.

        Arguments:
            force: The guidance.
            x: State (B, *) at lam_t; never modified.
            move: The step.
            held: What `after` kept in the step before, None at the start.
        """

    @abstractmethod
    def after(self, force: Force, x: Tensor, move: Move, carried: Any) -> tuple[Tensor, Any]:
        """The state at the end of the step, and what the next step is given as `held`."""

    def unseen(self, carried: Any) -> Any:
        """`held` where the denoiser's move is random, so that the next step is given it before `after` has run."""
        return carried


class Lie(Scheme):
    """One kick over the whole step: "BA" before the denoiser's move, "AB" after it."""

    lone = True

    def __init__(self, kick: Kick, order: str):
        self.kick, self.early, self.limit = kick, order == "BA", kick.limit

    def before(self, force: Force, x: Tensor, move: Move, held: Any) -> tuple[Tensor, Denoiser, Any]:
        if self.early:
            x, held = self.kick(force, x, move.lam_t, move.span, held)
        return x, force.denoiser, held

    def after(self, force: Force, x: Tensor, move: Move, carried: Any) -> tuple[Tensor, Any]:
        return (x, carried) if self.early else self.kick(force, x, move.lam_s, move.span, carried)


class Strang(Scheme):
    """Half a kick before the denoiser's move and half a kick after it."""

    early = True

    def __init__(self, kick: Kick, second_coef: str):
        self.kick, self.midpoint, self.limit = kick, second_coef == "midpoint", 2.0 * kick.limit

    def before(self, force: Force, x: Tensor, move: Move, held: Any) -> tuple[Tensor, Denoiser, Any]:
        x, held = self.kick(force, x, move.lam_t, move.span.halves()[0], held)
        return x, force.denoiser, held

    def after(self, force: Force, x: Tensor, move: Move, carried: Any) -> tuple[Tensor, Any]:
        half = move.span.halves()[1]
        if not self.midpoint:
            return self.kick(force, x, move.lam_s, half, carried)
        _, sigma = force.process.scales(-2.0 * math.log(half.start))
        lam = move.lam_t if move.lam_s == math.inf else move.lam_s  # the released last step asks at t_{N-1} again
        return torch.add(x, force.gradient(x, lam), alpha=-move.alpha_s * half.length * sigma), carried


class Merged(Scheme):
    """Strang's halves at the same level as one kick: the gradient after a move serves the kick before the next one too."""

    early = lone = True
    limit = 2.0

    def before(self, force: Force, x: Tensor, move: Move, held: Any) -> tuple[Tensor, Denoiser, Any]:
        g = force.gradient(x, move.lam_t) if held is None else held
        return torch.add(x, g, alpha=-0.5 * move.alpha_t * move.span.length * move.sigma_t), force.denoiser, None

    def after(self, force: Force, x: Tensor, move: Move, carried: Any) -> tuple[Tensor, Any]:
        if move.sigma_s == 0.0:
            return x, None
        g = force.gradient(x, move.lam_s)
        return torch.add(x, g, alpha=-0.5 * move.alpha_s * move.span.length * move.sigma_s), g


class HeunKick(Scheme):
    """The denoiser's move from the state that was not kicked, plus the mean of B at both ends: second order.

    With `pec` the gradient at the predicted end is also the next step's first: one gradient a step.
    """

    def __init__(self, pec: bool):
        self.pec, self.lone, self.limit = pec, pec, 1.0 if pec else 2.0

    def before(self, force: Force, x: Tensor, move: Move, held: Any) -> tuple[Tensor, Denoiser, Any]:
        if held is not None:
            return x, force.denoiser, held
        p, g = force.both(x, move.lam_t)
        return x, _Known(force.denoiser, x, p), g

    def after(self, force: Force, x: Tensor, move: Move, carried: Any) -> tuple[Tensor, Any]:
        unit = -move.alpha_s * move.span.length
        if move.sigma_s == 0.0:
            return torch.add(x, carried, alpha=0.5 * unit * move.sigma_t), None
        g = force.gradient(torch.add(x, carried, alpha=unit * move.sigma_t), move.lam_s)
        x = torch.add(x, carried, alpha=0.5 * unit * move.sigma_t).add_(g, alpha=0.5 * unit * move.sigma_s)
        return x, g if self.pec else None

    def unseen(self, carried: Any) -> Any:
        return None


class Additive(Scheme):
    """Both operators at the same state, each with its own Adams-Bashforth: for gradients that share the denoiser's pass."""

    lone = True

    def __init__(self, kick: MultistepKick):
        self.kick, self.limit = kick, kick.limit

    def before(self, force: Force, x: Tensor, move: Move, held: Any) -> tuple[Tensor, Denoiser, Any]:
        p, g = force.both(x, move.lam_t)
        return x, _Known(force.denoiser, x, p), self.kick.remember(held, move.span.start, g * -move.sigma_t)

    def after(self, force: Force, x: Tensor, move: Move, carried: Any) -> tuple[Tensor, Any]:
        return self.kick.push(x, move.alpha_s, move.span, carried), carried[: self.kick.order - 1]


class _FromNoise(Scheme):
    """The step from alpha = 0, where sbar is infinite: the ODE in 1 / sbar has a finite kick at its end, sigma_s^2 g."""

    def before(self, force: Force, x: Tensor, move: Move, held: Any) -> tuple[Tensor, Denoiser, Any]:
        return x, force.denoiser, None

    def after(self, force: Force, x: Tensor, move: Move, carried: Any) -> tuple[Tensor, Any]:
        if move.sigma_s == 0.0:
            return x, None
        return torch.add(x, force.gradient(x, move.lam_s), alpha=move.sigma_s**2), None


GROWN = 2.0
"""States are large when their root mean square over the batch passes so many times that of data of variance 1."""


def settled(around: Scheme, force: Force, x_s: Tensor, move: Move) -> tuple[Seen, ...] | None:
    """Looks whether a step's end is finite, and, only if it is large, whether the guidance is too stiff: that takes passes over
    memory, which runs that go well need not pay for. Returns the next step's `Memory.seen`."""
    large = force.settle(x_s) > GROWN * math.hypot(move.alpha_s, move.sigma_s)
    if force.seen is None or (large and math.isfinite(move.span.length) and force.watch(move.span.length, around.limit)):
        return None
    return tuple(force.seen[-1:]) if large or around.lone else ()


class _Known(Denoiser):
    """A denoiser that was already asked about one state."""

    def __init__(self, inner: Denoiser, x: Tensor, p: Gaussian):
        super().__init__()
        self.inner, self.process, self.shape, self.x, self.p = inner, inner.process, inner.shape, x, p

    def forward(self, x: Tensor, lam: Level, **cond: Any) -> Gaussian:
        return self.p if x is self.x else self.inner(x, lam, **cond)


SCHEMES = ("lie", "strang", "strang_merged", "heun", "heun_pec", "additive")
"""How the two operators are composed; see `Split`."""


class Split(Transition):
    r"""A step that splits the guided ODE into the denoiser's part A and the guidance's part B (Wizadwongsa, Suwajanakorn).

    .. math:: \frac{d\bar x}{d\bar\sigma} = \underbrace{\epsilon(x_t, \lambda)}_A
        \underbrace{- w \sigma \nabla_{x_t} \log p(y | x_t)}_B, \quad \bar x = x_t / \alpha,\ \bar\sigma = \sigma / \alpha

    The denoiser keeps a fast solver, the guidance gets a small and stable one. The default, half an Euler kick on either side
    of a move with Adams-Bashforth weights of the actual grid ("robust Strang"), is stable while \|h\| L < 4, for a step h in
    sigma / alpha and a guidance B of Lipschitz constant L. Beyond the limits of the table kicks amplify each other, unless the
    gradient's size has a bound: where a state has grown beyond that of data, L is estimated from the gradients that were taken,
    and a run that passes the limit warns, once.

    ============== ================= ======================== =====================================================
    scheme         network, gradient order, limit of h L      what it is
    ============== ================= ======================== =====================================================
    lie            N, N              1, 2                     LTSP: one kick a step, before ("BA") or after ("AB")
    strang         N, 2N             1, 4                     STSP: half a kick before and half after
    strang_merged  N, N + 1          1, 2                     the same, with one gradient for both halves at a level
    heun           N, 2N             2, 2                     kicks by Heun's method, the network at unkicked states
    heun_pec       N, N              2, 1                     the same, with each predicted gradient used twice
    additive       N, N              order of the kick        both from one pass, for guidance through the denoiser
    ============== ================= ======================== =====================================================

    With a random move (`Ancestral`), the kicks after it meet the drawn state, through `Step.then`, and all are stronger, up to
    1 + eta^2 times, as the drift of the guided reverse process is; at w = 1 it draws from p(x0 | y). No gradient at a drawn
    state outlives its step: strang_merged is strang there and heun_pec is heun, with 2N gradients. From pure noise (alpha = 0,
    where sigma / alpha is infinite) the whole kick comes after the move, as sigma_s^2 g. As released are
    `Split(g, AdamsBashforth(4, "constant"), scheme="lie")` and
    `Split(g, AdamsBashforth(4, "constant"), second_coef="midpoint")`.

    Arguments:
        guidance: The gradient to follow; the sampler is given the unguided denoiser.
        flow: The denoiser's solver: any transition; None is `AdamsBashforth(4)`. If random, it must have no history, and an
            `eta` (see `Transition`).
        kick: The guidance's solver, for "lie" and "strang"; None is `EulerKick()`. "additive" takes a `MultistepKick`.
        scheme: One of `SCHEMES`.
        order: Of "lie": "BA" kicks first, as released; "AB" moves first, as in the paper.
        second_coef: Of "strang" with Euler kicks: "end" takes sigma at the end of the step for its second half, so that the
            kick vanishes at the data; "midpoint" takes it at mid sigma / alpha, as released, which amplifies the last kicks.

    Raises:
        ValueError: For an unknown word, or a kick that the scheme has no use for.

    References:
        | Accelerating Guided Diffusion Sampling with Splitting Numerical Methods (Wizadwongsa, Suwajanakorn, 2023)
        | https://arxiv.org/abs/2301.11558
    """

    def __init__(
        self,
        guidance: Guidance,
        flow: Transition | None = None,
        kick: Kick | None = None,
        scheme: str = "strang",
        order: str = "BA",
        second_coef: str = "end",
    ):
        super().__init__()
        if not isinstance(guidance, Guidance):
            raise ValueError(f"`guidance` must be a Guidance, such as Gradient(fn) (got {type(guidance).__name__})")
        if order not in ("BA", "AB") or second_coef not in ("end", "midpoint"):
            raise ValueError(
                f"`order` must be 'BA' or 'AB' and `second_coef` 'end' or 'midpoint' (got {order!r}, {second_coef!r})"
            )
        if getattr(flow, "rebuilds", False):
            raise ValueError(f"`flow`={type(flow).__name__} rebuilds each state from the step before, which discards kicks: "
                             "switch its corrector off")  # fmt: skip
        self.guidance = guidance
        self.flow = AdamsBashforth(4) if flow is None else flow
        self.kick, self.eta = kick, self.flow.eta
        self.scheme, self.order, self.second_coef = scheme, order, second_coef
        self._around = _scheme(scheme, kick, order, second_coef)

    def forward(self, denoiser: Denoiser, x_t: Tensor, lam_t: Any, lam_s: Any, memory: Any = None) -> Step:
        if not (isinstance(lam_t, float) and isinstance(lam_s, float)):
            raise ValueError("`lam_t` and `lam_s` must be floats: a split step moves all examples between the same levels")
        memory = Memory() if memory is None else memory
        if lam_s == lam_t:
            return Step(Gaussian(x_t), memory=memory)
        around, force, move = self.parts(denoiser, lam_t, lam_s, memory.steps)
        force = replace(force, unseen=[], seen=None if memory.seen is None else list(memory.seen))
        x, model, carried = around.before(force, x_t, move, memory.kick)
        step = self.flow(model, x, lam_t, lam_s, memory.flow)
        del x, model  # the kicked state's memory is free for the kicks to come

        def after(drawn: Tensor) -> tuple[Tensor, Any, Any]:
            drawn = drawn if step.then is None else step.then(drawn)
            x_s, held = around.after(force, drawn, move, carried)
            return x_s, held, settled(around, force, x_s, move)

        if isinstance(step.p, Gaussian) and step.p.is_point:
            x_s, held, seen = after(step.p.mean)
            return Step(Gaussian(x_s), step.x0, Memory(memory.steps + 1, step.memory, held, seen))
        if self.flow.eta is None and lam_s > lam_t:
            raise ValueError(f"`flow`={type(self.flow).__name__} is random, but which share of the ancestral noise it has is "
                             "unknown, and with it how strong kicks are: give it an `eta`, or use Ancestral()")  # fmt: skip
        if step.memory is not None:
            raise ValueError("`flow` is random and remembers steps, but kicks move the states it remembers: "
                             "give a random flow of order 1, such as Ancestral()")  # fmt: skip
        return Step(step.p, step.x0, Memory(memory.steps + 1, None, around.unseen(carried)), lambda drawn: after(drawn)[0])

    def parts(self, denoiser: Denoiser, lam_t: float, lam_s: float, steps: int = 0) -> tuple[Scheme, Force, Move]:
        """What a step is made of besides `flow`, for loops in which someone else calls the network.

        Arguments:
            denoiser: Unguided.
            lam_t: Level of the state.
            lam_s: Level of the next one.
            steps: Taken so far.
        """
        if lam_t == math.inf:
            raise ValueError(
                "`lam_t` is +inf, where the ODE has no slope: start from a finite level (end the grid before +inf)"
            )
        (alpha_t, sigma_t), (alpha_s, sigma_s) = denoiser.process.scales(lam_t), denoiser.process.scales(lam_s)
        noise = alpha_t == 0.0 or lam_t == -math.inf
        span = Span(math.inf, -math.inf) if noise else Span.between(lam_t, lam_s)
        move = Move(lam_t, lam_s, alpha_t, sigma_t, alpha_s, sigma_s, span)
        force = Force(self.guidance, denoiser, steps, self._strength(denoiser, lam_t, lam_s))
        return _FromNoise() if noise else self._around, force, move

    def _strength(self, denoiser: Denoiser, lam_t: float, lam_s: float) -> float:
        """What a kick counts for beside a random move: the share of a change of x0 in its kernel, over that in DDIM's."""
        eta = self.flow.eta
        if not eta or lam_s < lam_t:
            return 1.0
        (_, random, *_), (_, plain, *_) = (denoiser.process.coefficients(lam_t, lam_s, e) for e in (eta, 0.0))
        return random / plain

    def extra_repr(self) -> str:
        return f"scheme={self.scheme}, order={self.order}, second_coef={self.second_coef}"


def _scheme(name: str, kick: Kick | None, order: str, second_coef: str) -> Scheme:
    if name not in SCHEMES:
        raise ValueError(f"`scheme` must be one of {', '.join(SCHEMES)} (got {name!r})")
    plain = kick is None or type(kick) is EulerKick
    if name == "additive":
        if not (plain or isinstance(kick, MultistepKick)):
            raise ValueError(f"`kick` of an additive scheme must be a MultistepKick (got {type(kick).__name__})")
        return Additive(kick if isinstance(kick, MultistepKick) else MultistepKick(1))
    if name in ("strang_merged", "heun", "heun_pec") and not plain:
        raise ValueError(f"`kick`={type(kick).__name__} has no place in {name!r}, which kicks in its own way: leave it out")
    if second_coef == "midpoint" and not (name == "strang" and plain):
        raise ValueError("`second_coef`='midpoint' is for scheme 'strang' with Euler kicks: leave it out")
    if name == "lie":
        return Lie(kick or EulerKick(), order)
    if name == "strang":
        return Strang(kick or EulerKick(), second_coef)
    return Merged() if name == "strang_merged" else HeunKick(name == "heun_pec")


class Projected(Transition):
    """Any transition, followed by a map of the drawn state: an imputation of measured components.

    Arguments:
        inner: What takes the step.
        project: (x_s, lam_s) -> x_s; it must leave its argument alone.

    Example:
        ``Projected(Split(guidance), lambda x, lam: torch.where(known, process.marginal(y, lam).mean, x))``
    """

    def __init__(self, inner: Transition, project: Callable[[Tensor, float], Tensor]):
        super().__init__()
        if not callable(project):
            raise ValueError(f"`project` must be a function (x, lam) -> x (got {type(project).__name__})")
        self.inner, self.project, self.revisits, self.eta = inner, project, inner.revisits, inner.eta

    def forward(self, denoiser: Denoiser, x_t: Tensor, lam_t: Any, lam_s: Any, memory: Any = None) -> Step:
        step = self.inner(denoiser, x_t, lam_t, lam_s, memory)

        def then(x: Tensor) -> Tensor:
            return self.project(x if step.then is None else step.then(x), lam_s)

        return Step(step.p, step.x0, step.memory, then)
