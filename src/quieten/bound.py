r"""The variational bound as a loss: VDM, and DiffEnc when an encoder takes part."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .denoiser import Denoiser, convert, form_coefficients
from .encoder import Encoded, Encoder
from .gaussian import Gaussian, spread_over
from .learned import Shaped
from .noise import Draws
from .objective import Batch, Objective, dropped, level_dtype
from .process import Process
from .schedule import Schedule
from .transition import Step, Transition

__all__ = ["Terms", "VariationalBound", "Widened", "continuous", "in_steps"]

Decode = Callable[[Any, Tensor, Tensor, Any], Tensor]
"""A decoder as `likelihood` has it: (step, x0, x_t, lam_t) -> (B,) nats; here step is None and lam_t the last finite level."""


class Terms(dict[str, Tensor]):
    """The parts of the bound by name, each (B,) in nats: "prior", "reconstruction", "diffusion", and "mean" for "split"."""

    @property
    def total(self) -> Tensor:
        """Their sum, without "mean", which is no part of the bound: (B,) in nats."""
        return self["prior"] + self["reconstruction"] + self["diffusion"]


class VariationalBound(Objective):
    r"""Minus the variational bound on log p(x), per example, in bits per dimension.

    Continuous time (`steps` None), with :math:`u = x_t + \dot x_t`, :math:`\hat u = \hat x + \hat d`, t uniform:

    .. math:: L = \tfrac12 E\left[-\lambda'(t)\, e^\lambda \|u - \hat u\|^2\right]

    and for T steps from s = t - 1/T to t, :math:`h = \lambda_s - \lambda_t`, :math:`c = -\mathrm{expm1}(-h)`:

    .. math:: L_T = \tfrac T2 E\left[\mathrm{expm1}(h)\, e^{\lambda_t} \left\|x_t - \hat x +
        \frac{(x_s - x_t) - h\, \hat d}{c}\right\|^2\right]

    Without an encoder :math:`x_t = x` and :math:`\dot x_t = \hat d = 0`: VDM. The residual is formed from the error of the
    network's own form, which near the data is the one that has digits.

    Arguments:
        schedule: Levels, with finite ends; learned if it has parameters.
        decoder: Reconstruction term.
        steps: Number T of steps; None is continuous time.
        encoder: From data to encoded data; the denoiser's process must then be `Encoded`.
        shape_by: "bound" trains the inner shape of a `Shaped` schedule by the bound (which in continuous time does not depend
            on it), "variance" by the square of the diffusion loss, so that its estimate varies less.
        reverse_variance: "equal" (to that of the posterior), or, for T steps, "optimal": widened by a running estimate of
            what makes the bound smallest, see `Widened`.
        momentum: Of that running estimate, per visit of a step.
        drop: Conditions to drop at random, as in `Denoising`.
        lean: While training, encode only what matters at the ends: nothing at the clean one, where data and encoding differ by
            sigma^2 (1.7e-6 as published), and a quarter of the batch at the noisy one, counted four times.

    Raises:
        ValueError: For a combination that has no meaning.

    References:
        | Variational Diffusion Models (Kingma et al., 2021), eq. 11, 17 and appendix I
        | https://arxiv.org/abs/2107.00630
        | DiffEnc (Nielsen et al., 2024), eq. 17 to 20
        | https://arxiv.org/abs/2310.19789
    """

    def __init__(
        self,
        schedule: Schedule,
        decoder: Decode,
        *,
        steps: int | None = None,
        encoder: Encoder | None = None,
        shape_by: str = "bound",
        reverse_variance: str = "equal",
        momentum: float = 0.02,
        drop: Mapping[str, tuple[float, int | float]] | None = None,
        lean: bool = False,
    ):
        super().__init__()
        if steps is not None and steps < 1:
            raise ValueError(f"`steps` must be at least 1, or None for continuous time (got {steps})")
        if shape_by not in ("bound", "variance"):
            raise ValueError(f"`shape_by` must be 'bound' or 'variance' (got {shape_by!r})")
        if shape_by == "variance" and (steps is not None or not isinstance(schedule, Shaped)):
            raise ValueError(
                "`shape_by` 'variance' needs continuous time and a schedule with a shape of its own: Monotone(pinned=True)"
            )
        if reverse_variance not in ("equal", "optimal"):
            raise ValueError(f"`reverse_variance` must be 'equal' or 'optimal' (got {reverse_variance!r})")
        if reverse_variance == "optimal" and steps is None:
            raise ValueError("`reverse_variance` other than 'equal' makes the bound infinite in continuous time: give `steps`")
        _check_falling(schedule)
        self.schedule, self.decoder, self.steps, self.encoder = schedule, decoder, steps, encoder
        self.shape_by, self.momentum, self.drop, self.lean = shape_by, momentum, dict(drop or {}), lean
        self.register_buffer("excess", torch.zeros(steps or 0, dtype=torch.float64) if reverse_variance == "optimal" else None)
        self.excess: Tensor | None

    def forward(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Tensor:
        return self.losses(denoiser, batch, draws)["loss"]

    def losses(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """The loss and its terms, each (B,) in bits per dimension."""
        terms = self.terms(denoiser, batch, draws)
        loss = terms.total + terms["mean"] if "mean" in terms else terms.total
        unit = 1.0 / (math.log(2.0) * max(1, math.prod(batch.x0.shape[1:])))
        return {"loss": loss * unit, **{name: (term * unit).detach() for name, term in terms.items()}}

    def terms(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Terms:
        """The parts of the bound, one draw of time and noise per example.

        Raises:
            ValueError: If encoder and process do not belong together, or the schedule's ends are not finite.
        """
        process = self._process(denoiser)
        ends = self.schedule(torch.tensor([0.0, 1.0], dtype=torch.float64).to(batch.x0.device, level_dtype(batch.x0)))
        x_first, x_last = self._encoded_ends(batch.x0, ends)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._ends_learn()):
            noise = draws.normal(batch.x0, "decoder")
            alpha, sigma = process.scales_over(ends[0], batch.x0)
            z_first = alpha * x_first + sigma * noise
            prior = _prior(process, x_last, ends[1])
            if len(x_last) < len(batch.x0):
                prior = nn.functional.pad(prior * (len(batch.x0) / len(x_last)), (0, len(batch.x0) - len(x_last)))
            out = Terms(
                prior=prior,
                reconstruction=self.decoder(None, batch.x0, z_first, ends[0]),
            )
        out.update(self._continuous(denoiser, batch, draws) if self.steps is None else self._discrete(denoiser, batch, draws))
        return out

    # -- the diffusion term

    def _continuous(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Terms:
        u = self.schedule.draw(draws).to(batch.x0.device, level_dtype(batch.x0))
        shape: tuple[Tensor, ...] = ()
        if self.shape_by == "variance" and isinstance(self.schedule, Shaped):
            shape = self.schedule.shape(u)
            lam, rate = self.schedule.along(*shape)
        else:
            lam, rate = self.schedule.rate(u)
        x_t, x_rate = (batch.x0, None) if self.encoder is None else self.encoder.with_rate(batch.x0, lam)
        error, d_hat, extra = self._errors(denoiser, x_t, lam, batch.cond, draws)
        if x_rate is not None:
            alpha, sigma = self._process(denoiser).scales_over(lam, x_t)
            error = error + (alpha / sigma) * (x_rate - d_hat)
        loss = 0.5 * rate.to(error) * _squared(error)
        emphasis = 2.0 * loss.detach()
        for tensor in shape:  # d(l^2) = 2 l dl, and each example has a level of its own: one backward pass serves both
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: emphasis.to(gradient) * gradient)
        return Terms(diffusion=loss, **({} if extra is None else {"mean": 0.5 * rate.to(error) * extra}))

    def _discrete(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Terms:
        steps = int(self.steps or 1)
        u = self.schedule.draw(draws).to(batch.x0.device, level_dtype(batch.x0))
        index = (u * steps).ceil().clamp_(1, steps)
        lam, lam_s = self.schedule(index / steps), self.schedule((index - 1) / steps)
        h = lam_s - lam
        x_t, x_s = (batch.x0, None) if self.encoder is None else self._encoded_pair(batch.x0, lam, lam_s)
        error, d_hat, extra = self._errors(denoiser, x_t, lam, batch.cond, draws)
        if x_s is not None:
            alpha, sigma = self._process(denoiser).scales_over(lam, x_t)
            error = error + (alpha / sigma) / spread_over(-torch.expm1(-h), x_t) * (x_s - x_t - spread_over(h, x_t) * d_hat)
        ratio = torch.expm1(h).to(error) * _squared(error)  # ||mu_Q - mu_P||^2 / sigma_Q^2
        loss = 0.5 * steps * (ratio if self.excess is None else self._widened(ratio, index.long() - 1, x_t[0].numel()))
        return Terms(diffusion=loss, **({} if extra is None else {"mean": 0.5 * steps * torch.expm1(h).to(error) * extra}))

    def _errors(
        self, denoiser: Denoiser, x_t: Tensor, lam: Tensor, cond: dict[str, Tensor], draws: Draws
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """exp(lam / 2) (x_t - x_hat), the counterterm d_hat, and, for "split", the squared error of x_hat (B,)."""
        process, cond = self._process(denoiser), dropped(cond, self.drop, draws)
        eps = draws.normal(x_t, "eps")
        alpha, sigma = process.scales_over(lam, x_t)
        z = alpha * x_t + sigma * eps
        if isinstance(process, Encoded) and process.counterterm == "split":
            p = denoiser(z, lam, **cond)
            error = (alpha / sigma) * (x_t - p.mean)
            return error, process.rate(p, lam), _squared((alpha / sigma) * (x_t.detach() - p.mean))
        form = getattr(denoiser, "form", "x0")
        p, q = form_coefficients(form, alpha, sigma)
        f = denoiser.predict(z, lam, form, **cond)
        error = -alpha / (p * alpha - q * sigma) * (p * eps + q * x_t - f)
        d_hat = (
            process.rate(convert(f, z, form, "x0", alpha, sigma), lam) if isinstance(process, Encoded) else x_t.new_zeros(())
        )
        return error, d_hat, None

    def _widened(self, ratio: Tensor, index: Tensor, dims: int) -> Tensor:
        """2 KL of a step whose reverse variance is (1 + excess) times the posterior's, for ||mu_Q - mu_P||^2 / sigma_Q^2."""
        excess = self.excess
        assert excess is not None
        if self.training and torch.is_grad_enabled():
            found = (ratio.detach() / dims).to(excess).nan_to_num_(0.0, 0.0, 0.0)
            visits = torch.zeros_like(excess).index_add_(0, index, torch.ones_like(found))
            mean = torch.zeros_like(excess).index_add_(0, index, found) / visits.clamp_min(1.0)
            share = torch.where(excess > 0, self.momentum, 1.0).to(excess) * (visits > 0)  # the first visit counts in full
            excess.lerp_(mean, share)
        e = excess[index].to(ratio)
        return dims * (torch.log1p(e) - e / (1.0 + e)) + ratio / (1.0 + e)

    # -- its surroundings

    def _process(self, denoiser: Denoiser) -> Process:
        if (self.encoder is not None) != isinstance(denoiser.process, Encoded):
            raise ValueError("an `encoder` in the bound and a denoiser with the process Encoded(...) need each other: got "
                             f"{'an' if self.encoder else 'no'} encoder and {denoiser.process}")  # fmt: skip
        return denoiser.process

    def _encoded_ends(self, x0: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """The data at both ends of the schedule, from one call."""
        if self.encoder is None:
            return x0, x0
        if self.lean and self.training:
            some = x0[: -(-len(x0) // 4)]
            return x0, self.encoder(some, ends[1].expand(len(some)))
        both = self.encoder(torch.cat([x0, x0]), ends.repeat_interleave(len(x0)))
        return both[: len(x0)], both[len(x0) :]

    def _encoded_pair(self, x0: Tensor, lam: Tensor, lam_s: Tensor) -> tuple[Tensor, Tensor]:
        """The data at two neighbouring levels under the same dropout: their difference is divided by a small number."""
        encoder = self.encoder
        assert encoder is not None
        with torch.random.fork_rng(devices=[x0.device] if x0.device.type == "cuda" else []):
            x_s = encoder(x0, lam_s)
        return encoder(x0, lam), x_s

    def _ends_learn(self) -> bool:
        """Whether prior and reconstruction depend on anything that is learned."""
        modules = [m for m in (self.schedule, self.encoder, self.decoder) if isinstance(m, nn.Module)]
        return any(p.requires_grad for m in modules for p in m.parameters())


def _prior(process: Process, x: Tensor, lam: Tensor) -> Tensor:
    """KL(q(z | x) || prior) at lam, (B,) in nats; what does not depend on x is formed in the dtype of lam."""
    alpha, sigma = process.scales(lam)
    prior = process.prior(lam).var.to(lam)
    ratio = sigma * sigma / prior
    constant = (ratio - 1.0 - ratio.log()) * (x[0].numel() if len(x) else 0)
    return 0.5 * (_squared(x) * (alpha * alpha / prior).to(x) + constant.to(x))


def _squared(x: Tensor) -> Tensor:
    return x.square().flatten(1).sum(1)


def _check_falling(schedule: Schedule) -> None:
    with torch.no_grad():
        top, bottom = schedule(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    if not -math.inf < bottom < top < math.inf:
        raise ValueError(f"`schedule` must fall from one finite log-SNR to another, as Linear(lam_max, lam_min) does "
                         f"(got {top:g} at u = 0, {bottom:g} at u = 1)")  # fmt: skip


def continuous(shape_by: Literal["bound", "variance"] = "bound", lean: bool = False) -> dict[str, Any]:
    """The options of a bound in continuous time, for recipes."""
    return {"shape_by": shape_by, "lean": lean}


def in_steps(
    count: int = 1000,
    reverse_variance: Literal["equal", "optimal"] = "equal",
    momentum: float = 0.02,
    lean: bool = False,
) -> dict[str, Any]:
    """The options of a bound in T steps, for recipes."""
    return {"steps": count, "reverse_variance": reverse_variance, "momentum": momentum, "lean": lean}


class Widened(Transition):
    """A transition whose kernels are widened step by step: the reverse variance that the bound found best.

    Arguments:
        inner: The transition, such as `Ancestral()`.
        schedule: That of the training.
        excess: Relative excess of the variance for each of T steps, from data to noise: `VariationalBound.excess`.

    Raises:
        ValueError: At a step that is none of the T.
    """

    def __init__(self, inner: Transition, schedule: Schedule, excess: Tensor):
        super().__init__()
        self.inner, self.excess = inner, excess.tolist()
        with torch.no_grad():
            self.levels = schedule(torch.linspace(0, 1, len(excess) + 1, dtype=torch.float64)).tolist()

    def forward(self, denoiser: Denoiser, x_t: Tensor, lam_t: Any, lam_s: Any, memory: Any = None) -> Step:
        step = self.inner(denoiser, x_t, lam_t, lam_s, memory)
        if lam_s == math.inf:
            return step
        gaps = [abs(lam_t - a) + abs(lam_s - b) for b, a in zip(self.levels, self.levels[1:], strict=False)]
        index = min(range(len(gaps)), key=gaps.__getitem__)
        if gaps[index] > 1e-3:
            raise ValueError(f"the variance of the step from {lam_t:.4g} to {lam_s:.4g} was not learned: sample on the grid of "
                             f"{len(gaps)} steps of the training")  # fmt: skip
        return Step(Gaussian(step.p.mean, step.p.var * (1.0 + self.excess[index])), step.x0, step.memory, step.then)
