r"""Kicks: how a splitting integrator follows the guidance alone, over an interval of sigma / alpha."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..gaussian import Gaussian
from ..guidance import Guidance
from ..process import Process
from ..solver import RK2, RungeKutta, adams_bashforth_weights

__all__ = ["EulerKick", "Force", "Kick", "MultistepKick", "Seen", "Span", "StagedKick", "SubCycled"]


Seen = tuple[Tensor, float, Tensor]
"""A state (B, *), its level, and the gradient there."""


@dataclass(frozen=True)
class Force:
    r"""The guidance at work in one step: the operator B of d xbar / d sbar = A + B, xbar = x / alpha, sbar = sigma / alpha.

    .. math:: B(\bar x, \bar\sigma) = -\sigma g(\alpha \bar x, \lambda), \quad g = w \nabla_{x_t} \log p(y | x_t)

    Attributes:
        guidance: What gives g.
        denoiser: The unguided denoiser.
        index: Number of the step, for messages.
        strength: Factor on g: above 1 around random moves, whose noise makes room for more drift.
        unseen: Where gradients wait for `settle` to look whether they are finite, with their states and levels; None looks at
            each at once.
        seen: Where the last gradients are kept, newest last, with their states and levels, for `watch`; None keeps none.
    """

    guidance: Guidance
    denoiser: Denoiser
    index: int = 0
    strength: float = 1.0
    unseen: list[tuple[Tensor, Tensor, float]] | None = None
    seen: list[Seen] | None = None

    @property
    def process(self) -> Process:
        return self.denoiser.process

    def gradient(self, x: Tensor, lam: float) -> Tensor:
        """g at a state (B, *)."""
        guidance = self.guidance
        # one that mends gradients, or has its own way to them, is left to look by itself
        wait = self.unseen is not None and guidance.nonfinite == "raise" and type(guidance).gradient is Guidance.gradient
        try:
            g = (guidance.unchecked if wait else guidance.gradient)(self.denoiser, x, lam)
        except ValueError as error:
            raise ValueError(f"in step {self.index}: {error}") from error
        if wait and self.unseen is not None:
            self.unseen.append((g, x, lam))
        return self._scaled(g, x, lam)

    def settle(self, x: Tensor) -> float:
        """The root mean square of the states (B, *) that the gradients led to.

        One look at them, instead of one at each gradient, whose NaN or infinity they hold.

        Raises:
            ValueError: If it is not finite, and the first gradient that is not is to blame.
        """
        size = float(torch.linalg.vector_norm(x.detach())) / math.sqrt(max(x.numel(), 1))  # one pass over memory, as a sum is
        if not math.isfinite(size):
            for g, at, lam in self.unseen or ():
                try:
                    self.guidance.checked(g, at, lam)
                except ValueError as error:
                    raise ValueError(f"in step {self.index}: {error}") from error
        return size

    def watch(self, length: float, limit: float) -> bool:
        """Whether |h| L of the gradients kept passes a limit for an example; warns if so. Several passes over memory.

        L is estimated as |B' - B| / |xbar' - xbar| between each gradient and the next.

        Arguments:
            length: h, of the step in sbar.
            limit: Where the scheme becomes unstable.
        """
        points = []
        for x, lam, g in self.seen or ():
            alpha, sigma = self.process.scales(lam)
            points.append(((x / alpha).reshape(len(x), -1), (g * -sigma).reshape(len(x), -1)))
        for (y, slope), (next_y, next_slope) in pairwise(points):
            if bool((abs(length) * (next_slope - slope).norm(dim=1) > limit * (next_y - y).norm(dim=1)).any()):
                warnings.warn(  # without the figures, so that a run warns once
                    f"the guidance is stiff: |h| L passes {limit:g}, where its kicks become unstable: take more steps, lower "
                    "its scale, divide its kicks (SubCycled, 'subcycled' by name), or solve them where it is quadratic "
                    "(ExactKick, ImplicitKick)",
                    stacklevel=5,  # of who called the step
                )
                return True
        return False

    def both(self, x: Tensor, lam: float) -> tuple[Gaussian, Tensor]:
        """The denoiser's Gaussian and g, from one pass where one is enough; its graph is not cut, which takes two."""
        if x.requires_grad and torch.is_grad_enabled():
            return self.denoiser(x, lam), self.gradient(x, lam)
        try:
            p, g = self.guidance.both(self.denoiser, x, lam)
        except ValueError as error:
            raise ValueError(f"in step {self.index}: {error}") from error
        return p, self._scaled(g, x, lam)

    def _scaled(self, g: Tensor, x: Tensor, lam: float) -> Tensor:
        g = g if self.strength == 1.0 else g * self.strength
        if self.seen is not None:
            self.seen.append((x.detach(), lam, g.detach()))
            del self.seen[:-3]  # of the step before, and this one's ends
        return g


class Span(NamedTuple):
    """An interval of sbar = sigma / alpha.

    Attributes:
        start: Where it begins.
        length: Signed; negative towards the data.
    """

    start: float
    length: float

    @property
    def end(self) -> float:
        return self.start + self.length

    def halves(self) -> tuple[Span, Span]:
        half = 0.5 * self.length
        return Span(self.start, half), Span(self.start + half, half)

    @classmethod
    def between(cls, lam_t: float, lam_s: float) -> Span:
        """From one level to another, to the last digit however near they are."""
        start = math.exp(-0.5 * lam_t)
        return cls(start, start * math.expm1(-0.5 * (lam_s - lam_t)))


class Kick(nn.Module, ABC):
    """The flow of the guidance alone over a span of sbar. Keeps no state: what it remembers travels in `memory`.

    Attributes:
        limit: The |h| L up to which it is stable, for a slope of Lipschitz constant L; inf where it looks after that itself.
    """

    limit: float = math.inf

    @abstractmethod
    def forward(self, force: Force, x: Tensor, lam: float, span: Span, memory: Any = None) -> tuple[Tensor, Any]:
        """The kicked state, and what the next kick of the run is given.

        Arguments:
            force: The guidance.
            x: State (B, *); never modified.
            lam: Its level: the start of the span for a kick before the denoiser's move, its end for one after.
            span: The part of the guidance's flow to follow.
            memory: What the kick before returned.
        """


class EulerKick(Kick):
    r"""One gradient, at the state and its own level: x - alpha h sigma g. The published method, and the most stable one.

    At the data sigma is 0: nothing happens there, and nothing is asked.
    """

    limit = 2.0

    def forward(self, force: Force, x: Tensor, lam: float, span: Span, memory: Any = None) -> tuple[Tensor, Any]:
        alpha, sigma = force.process.scales(lam)
        if sigma == 0.0:
            return x, None
        return torch.add(x, force.gradient(x, lam), alpha=-alpha * span.length * sigma), None


class StagedKick(Kick):
    """An explicit Runge-Kutta method for the guidance's own flow; a stage at sbar = 0 costs nothing, B vanishes there.

    Arguments:
        method: Whose tableau to use, such as `RK2(0.5)` (the midpoint rule, default) or `RK4()`.
    """

    def __init__(self, method: RungeKutta | None = None):
        super().__init__()
        method = RK2(0.5) if method is None else method
        self.nodes, self.matrix, self.weights = method.nodes, method.matrix, method.weights
        self.limit = 2.785 if len(self.weights) == 4 else 2.0

    def forward(self, force: Force, x: Tensor, lam: float, span: Span, memory: Any = None) -> tuple[Tensor, Any]:
        alpha, _ = force.process.scales(lam)
        y = x / alpha
        slopes: list[Tensor | None] = []
        for c, row in zip(self.nodes, self.matrix, strict=True):
            slopes.append(self._slope(force, _advance(y, span.length, row, slopes), span.start + c * span.length))
        return _advance(y, span.length, self.weights, slopes) * alpha, None

    @staticmethod
    def _slope(force: Force, y: Tensor, sbar: float) -> Tensor | None:
        if sbar <= 0.0:  # rounding may carry the last stage below the data
            return None
        lam = -2.0 * math.log(sbar)
        alpha, sigma = force.process.scales(lam)
        return force.gradient(y * alpha, lam) * -sigma

    def extra_repr(self) -> str:
        return f"stages={len(self.weights)}"


def _advance(y: Tensor, h: float, row: Sequence[float], slopes: Sequence[Tensor | None]) -> Tensor:
    """y + h sum_j row_j slopes_j; None is a slope of zero."""
    for weight, slope in zip(row, slopes, strict=False):
        if weight and slope is not None:
            y = torch.add(y, slope, alpha=h * weight)
    return y


class MultistepKick(Kick):
    """Adams-Bashforth for the guidance: the last `order` gradients, wherever on the path they were taken.

    Raising the order of the guidance's solver makes it less stable; the paper's point is that it hurts.

    Arguments:
        order: 1 (Euler) to 4.
        coefficients: "variable" or "constant", as in `AdamsBashforth`.
    """

    def __init__(self, order: int = 2, coefficients: str = "variable"):
        super().__init__()
        if order not in (1, 2, 3, 4):
            raise ValueError(f"`order` must be 1, 2, 3 or 4 (got {order!r})")
        if coefficients not in ("variable", "constant"):
            raise ValueError(f"`coefficients` must be 'variable' or 'constant' (got {coefficients!r})")
        self.order, self.coefficients = order, coefficients
        self.limit = (2.0, 1.0, 6.0 / 11.0, 0.3)[order - 1]

    def forward(self, force: Force, x: Tensor, lam: float, span: Span, memory: Any = None) -> tuple[Tensor, Any]:
        alpha, sigma = force.process.scales(lam)
        if sigma == 0.0:
            return x, memory
        history = self.remember(memory, math.exp(-0.5 * lam), force.gradient(x, lam) * -sigma)
        return self.push(x, alpha, span, history), history

    def remember(self, memory: Any, sbar: float, slope: Tensor) -> tuple[tuple[float, Tensor], ...]:
        """The history (sbar, B), newest first, with a new value; one at the same level gives way."""
        past = memory or ()
        return ((sbar, slope), *(past[1:] if past and past[0][0] == sbar else past))[: self.order]

    def push(self, x: Tensor, alpha: float, span: Span, history: Sequence[tuple[float, Tensor]]) -> Tensor:
        """x + alpha times the integral over the span of the polynomial through the history."""
        nodes, constant = [node for node, _ in history], self.coefficients == "constant"
        here = abs(span.start - nodes[0]) <= abs(span.end - nodes[0])
        far = nodes[0] + span.length if here else nodes[0] - span.length
        weights = adams_bashforth_weights(nodes, far, constant)
        for weight, (_, slope) in zip(weights, history, strict=True):
            x = torch.add(x, slope, alpha=alpha * (weight if here else -weight))
        return x

    def extra_repr(self) -> str:
        return f"order={self.order}, coefficients={self.coefficients}"


class SubCycled(Kick):
    r"""Euler kicks in as many parts as stability asks for, each example on its own.

    The slope's Lipschitz constant L is estimated as |B' - B| / |xbar' - xbar| from the last two evaluations, which costs
    nothing but a look at numbers on the device; only the first kick of a run probes once more. An example then takes
    m = ceil(|h| L / limit) parts. Where that is more than `most`, it takes `most` parts of the size limit / L and leaves the
    rest of its kick out, so that no kick amplifies what it should damp, however stiff the guidance.

    With most=1 nothing is divided and nothing probed: an Euler kick that is cut short where it leaves the stable range.

    Arguments:
        limit: Largest |h| L of one part: 2 is where Euler's method becomes unstable, 1 where it begins to overshoot.
        most: Largest number of parts; warns where more would be needed, and cuts the kick short.

    Raises:
        ValueError: If `limit` is not positive, or `most` is below 1.
    """

    def __init__(self, limit: float = 1.0, most: int = 16):
        super().__init__()
        if not limit > 0:
            raise ValueError(f"`limit` must be positive (got {limit}): 1 avoids overshooting, 2 is the edge of stability")
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise ValueError(f"`most` must be a whole number of parts, at least 1 (got {most!r})")
        self.limit, self.most = limit, most

    def forward(self, force: Force, x: Tensor, lam: float, span: Span, memory: Any = None) -> tuple[Tensor, Any]:
        alpha, sigma = force.process.scales(lam)
        if sigma == 0.0 or not len(x):
            return x, memory
        slope = force.gradient(x, lam) * -sigma
        if memory is None and self.most > 1:
            probe = torch.add(x, slope, alpha=alpha * span.length)
            memory = probe / alpha, force.gradient(probe, lam) * -sigma
        parts, size = self._parts(memory, x / alpha, slope, span)
        rounds, size = int(parts.max()), size.reshape(-1, *[1] * (x.ndim - 1))
        for i in range(rounds):
            if i > 0:
                slope = force.gradient(x, lam) * -sigma
            seen = x / alpha, slope
            # a kick of zero, not a factor of zero: an example that has arrived must not meet another's infinities
            x = x + torch.where((parts > i).reshape(size.shape), alpha * size * slope, 0.0)
        return x, seen

    @torch.no_grad()
    def _parts(self, memory: Any, y: Tensor, slope: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """How many parts each example takes, (B,) in the dtype of the state, and the length of one."""
        if memory is None:
            parts = torch.ones(len(y), dtype=y.dtype, device=y.device)
            return parts, span.length * parts
        past_y, past_slope = memory
        lipschitz = ((slope - past_slope).flatten(1).norm(dim=1) / (y - past_y).flatten(1).norm(dim=1)).nan_to_num(0.0, 0.0)
        wanted = lipschitz * (abs(span.length) / self.limit)
        parts = wanted.ceil().clamp_min(1.0)
        if bool((parts > self.most).any()):
            warnings.warn(  # without the figures, so that a run warns once and not at every step
                f"the guidance is stiff: |h| L passes {self.limit * self.most:g}, what {self.most} parts of a kick can follow: "
                "the rest is left out; take more steps, lower its scale, or allow more parts",
                stacklevel=4,
            )
        return parts.clamp_max(self.most), span.length / torch.where(parts > self.most, wanted, parts)

    def extra_repr(self) -> str:
        return f"limit={self.limit}, most={self.most}"
