r"""The variational bound as a loss: VDM, and DiffEnc when an encoder takes part."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser, convert, form_coefficients
from ..encoder import Encoder
from ..encoding.encoded import Encoded
from ..gaussian import Gaussian, spread_over
from ..noise import Draws
from ..objective import Batch, Objective, dropped, level_dtype
from ..process import Process
from ..schedule import Schedule
from .decoders import Decoder, summed
from .learned import Shaped

__all__ = [
    "REVERSE_VARIANCES",
    "Terms",
    "VariationalBound",
    "check_encoder",
    "check_falling",
    "continuous",
    "drift_error",
    "in_steps",
    "mean_error",
    "prior_term",
    "spread_kl",
]

Decode = Callable[[Any, Tensor, Tensor, Any], Tensor]
"""A decoder as `likelihood` has it: (step, x0, x_t, lam_t) -> (B,) nats; here step is None and lam_t the last finite level."""


REVERSE_VARIANCES = ("equal", "optimal", "learned")
"""Of a step's kernel: the posterior's, that times one number for the step, or what the denoiser reports."""


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
        reverse_variance: "equal" (to that of the posterior), or for T steps "optimal": widened by a running estimate of what
            makes the bound smallest, see `widened.Widened`; or "learned": that of the kernel of `Ancestral()` with the
            variance that the denoiser reports, of `Ancestral(range=True)` for a `learned_range` network. Then it is trained,
            too.
        momentum: Of that running estimate, per visit of a step.
        times: "even": one offset per batch, times spread evenly; or "independent" uniforms.
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
        times: str = "even",
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
        if reverse_variance not in REVERSE_VARIANCES:
            raise ValueError(f"`reverse_variance` must be one of {', '.join(REVERSE_VARIANCES)} (got {reverse_variance!r})")
        if reverse_variance != "equal" and steps is None:
            raise ValueError("`reverse_variance` other than 'equal' makes the bound infinite in continuous time: give `steps`")
        if reverse_variance == "learned" and encoder is not None:
            raise ValueError("`reverse_variance` 'learned' is of x0, which no denoiser of encoded data knows: take 'optimal'")
        if times not in ("even", "independent"):
            raise ValueError(f"`times` must be 'even' or 'independent' (got {times!r})")
        check_falling(schedule)
        self.schedule, self.decoder, self.steps, self.encoder = schedule, decoder, steps, encoder
        self.shape_by, self.momentum, self.drop, self.lean = shape_by, momentum, dict(drop or {}), lean
        self.reverse_variance, self.times, self._looked = reverse_variance, times, False
        self.register_buffer("excess", torch.zeros(steps or 0, dtype=torch.float64) if reverse_variance == "optimal" else None)
        self.excess: Tensor | None

    def forward(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Tensor:
        return self.losses(denoiser, batch, draws)["loss"]

    def losses(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """The loss and its terms, each (B,) in bits per dimension; of a learned schedule also its ends, as log-SNRs.

        The loss is NaN where a learned schedule no longer falls, so that training stops.
        """
        terms = self.terms(denoiser, batch, draws)
        loss = terms.total + terms["mean"] if "mean" in terms else terms.total
        unit = 1.0 / (math.log(2.0) * max(1, math.prod(batch.x0.shape[1:])))
        named = {name: (term * unit).detach() for name, term in terms.items()}
        if any(p.requires_grad for p in self.schedule.parameters()):
            top, bottom = self._ends(batch.x0).detach().to(loss)
            loss = torch.where(top > bottom, loss, math.nan)
            named |= {"lam_max": top.expand_as(loss), "lam_min": bottom.expand_as(loss)}
        return {"loss": loss * unit, **named}

    def terms(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Terms:
        """The parts of the bound, one draw of time and noise per example.

        Raises:
            ValueError: If encoder and process do not belong together, or the first batch has values that the decoder cannot
                stand for.
        """
        process = self._process(denoiser)
        if not self._looked and len(batch.x0):
            self._looked = True  # once: a look waits for the device
            if isinstance(self.decoder, Decoder) and self.decoder.pixels is not None:
                self.decoder.pixels.check(batch.x0)
        ends = self._ends(batch.x0)
        x_first, x_last = self._encoded_ends(batch.x0, ends)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._ends_learn()):
            noise = draws.normal(batch.x0, "decoder")
            alpha, sigma = process.scales_over(ends[0], batch.x0)
            z_first = alpha * x_first + sigma * noise
            prior = prior_term(process, x_last, ends[1])
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
        u = self._times(batch.x0, draws)
        shape: tuple[Tensor, ...] = ()
        if self.shape_by == "variance" and isinstance(self.schedule, Shaped):
            shape = self.schedule.shape(u)
            lam, rate = self.schedule.along(*shape)
        else:
            lam, rate = self.schedule.rate(u)
        x_t, x_rate = (batch.x0, None) if self.encoder is None else self.encoder.with_rate(batch.x0, lam)
        eps, cond = self._noised(x_t, batch.cond, draws)
        error, extra = drift_error(denoiser, x_t, x_rate, eps, lam, **cond)
        loss = 0.5 * rate.to(error) * summed(error.square())
        emphasis = 2.0 * loss.detach()
        for tensor in shape:  # d(l^2) = 2 l dl, and each example has a level of its own: one backward pass serves both
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: emphasis.to(gradient) * gradient)
        return Terms(diffusion=loss, **({} if extra is None else {"mean": 0.5 * rate.to(error) * extra}))

    def _discrete(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Terms:
        steps = int(self.steps or 1)
        u = self._times(batch.x0, draws)
        index = (u * steps).ceil().clamp_(1, steps)
        lam, lam_s = self.schedule(index / steps), self.schedule((index - 1) / steps)
        h = lam_s - lam
        if self.reverse_variance == "learned":
            return Terms(diffusion=steps * self._spread(denoiser, batch, lam, lam_s, draws))
        x_t, x_s = (batch.x0, None) if self.encoder is None else self._encoded_pair(batch.x0, lam, lam_s)
        eps, cond = self._noised(x_t, batch.cond, draws)
        error, d_hat, extra = mean_error(denoiser, x_t, eps, lam, **cond)
        if x_s is not None:
            alpha, sigma = denoiser.process.scales_over(lam, x_t)
            error = error + (alpha / sigma) / spread_over(-torch.expm1(-h), x_t) * (x_s - x_t - spread_over(h, x_t) * d_hat)
        ratio = torch.expm1(h).to(error) * summed(error.square())  # ||mu_Q - mu_P||^2 / sigma_Q^2
        loss = 0.5 * steps * (ratio if self.excess is None else self._widened(ratio, index.long() - 1, x_t[0].numel()))
        return Terms(diffusion=loss, **({} if extra is None else {"mean": 0.5 * steps * torch.expm1(h).to(error) * extra}))

    def _noised(self, x_t: Tensor, cond: dict[str, Tensor], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """The noise of the states, and the conditions that are left of `cond`."""
        cond = dropped(cond, self.drop, draws)
        return draws.normal(x_t, "eps"), cond

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

    def _spread(self, denoiser: Denoiser, batch: Batch, lam: Tensor, lam_s: Tensor, draws: Draws) -> Tensor:
        """KL (B,) of a step whose kernel has the variance that the denoiser reports, in its basis."""
        x0, cond = batch.x0, dropped(batch.cond, self.drop, draws)
        alpha, sigma = self._process(denoiser).scales_over(lam, x0)
        p = denoiser(alpha * x0 + sigma * draws.normal(x0, "eps"), lam, **cond)
        if p.is_point:
            raise ValueError("`reverse_variance` 'learned' needs a denoiser that reports a variance: WithCovariance(...), or a "
                             "network with `learned_range`")  # fmt: skip
        return spread_kl(denoiser, p, x0, lam, lam_s)

    # -- its surroundings

    def _times(self, x0: Tensor, draws: Draws) -> Tensor:
        """u (B,) in (0, 1) of the examples."""
        u = self.schedule.draw(draws) if self.times == "even" else draws.uniform("u")
        return u.to(x0.device, level_dtype(x0))

    def _process(self, denoiser: Denoiser) -> Process:
        check_encoder(self.encoder, denoiser.process)
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

    def _ends(self, x0: Tensor) -> Tensor:
        """Log-SNRs (2,) at u = 0 and 1."""
        return self.schedule(torch.tensor([0.0, 1.0], dtype=torch.float64).to(x0.device, level_dtype(x0)))

    def _ends_learn(self) -> bool:
        """Whether prior and reconstruction depend on anything that is learned."""
        modules = [m for m in (self.schedule, self.encoder, self.decoder) if isinstance(m, nn.Module)]
        return any(p.requires_grad for m in modules for p in m.parameters())


def spread_kl(denoiser: Denoiser, p: Gaussian, x0: Tensor, lam: Tensor, lam_s: Tensor) -> Tensor:
    """KL (B,) in nats from the posterior of a step to the kernel of the variance that a denoiser reports, in its basis.

    Arguments:
        denoiser: Its process is that of the step; with `learned_range` the kernel is that of `Ancestral(range=True)`.
        p: What it says of x_t, at log-SNRs lam (B,).
        x0: The data (B, *).
        lam_s: Log-SNRs after the step (B,), higher.
    """
    alpha, sigma = denoiser.process.scales_over(lam, x0)
    steps, error = torch.expm1(spread_over(lam_s - lam, x0)), (alpha / sigma) * (x0 - p.mean)
    error = error if p.basis is None else p.basis.forward(error)
    if getattr(denoiser, "learned_range", False):  # var = f sigma_t^2, and 1 + e = (sigma_t^2 / sigma_s^2)^f
        sigma_s = denoiser.process.scales_over(lam_s, x0)[1]
        log = p.var * (2.0 / (sigma * sigma) * (sigma / sigma_s).log())
    else:
        log = torch.log1p(steps * (alpha / sigma) ** 2 * p.var)
    return 0.5 * (log + torch.expm1(-log) + steps * error.square() * torch.exp(-log)).flatten(1).sum(1)


def mean_error(denoiser: Denoiser, x_t: Tensor, eps: Tensor, lam: Tensor, **cond: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a step's mean is off by, in the unit of its noise, and what is needed to add the data's own motion.

    Arguments:
        denoiser: Conditions free or bound; its own form is that of the error, which near the data is the one with digits.
        x_t: Data, or encoded data (B, *).
        eps: Their noise (B, *).
        lam: Log-SNRs (B,).
        **cond: Free conditions.

    Returns:
        exp(lam / 2) (x_t - x_hat) of shape (B, *); the counterterm d_hat, (B, *) or () for none; and, for "split", the squared
        norm of the former without a graph through x_t (B,).
    """
    process = denoiser.process
    alpha, sigma = process.scales_over(lam, x_t)
    z = alpha * x_t + sigma * eps
    if isinstance(process, Encoded) and process.counterterm == "split":
        p = denoiser(z, lam, **cond)
        own = summed(((alpha / sigma) * (x_t.detach() - p.mean)).square())
        return (alpha / sigma) * (x_t - p.mean), process.rate(p, lam), own
    form = getattr(denoiser, "form", "x0")
    p, q = form_coefficients(form, alpha, sigma)
    f = denoiser.predict(z, lam, form, **cond)
    error = -alpha / (p * alpha - q * sigma) * (p * eps + q * x_t - f)
    if not isinstance(process, Encoded):
        return error, x_t.new_zeros(()), None
    return error, process.rate(convert(f, z, form, "x0", alpha, sigma), lam), None


def drift_error(
    denoiser: Denoiser, x_t: Tensor, x_rate: Tensor | None, eps: Tensor, lam: Tensor, **cond: Any
) -> tuple[Tensor, Tensor | None]:
    """exp(lam / 2) (u - u_hat) of the bound in continuous time (B, *), and the last of `mean_error`.

    Arguments:
        denoiser: As in `mean_error`, and so is the rest.
        x_t: Data, or encoded data (B, *).
        x_rate: The rate of encoded data by lam (B, *); None for data as they are.
        eps: Their noise (B, *).
        lam: Log-SNRs (B,).
        **cond: Free conditions.
    """
    error, d_hat, own = mean_error(denoiser, x_t, eps, lam, **cond)
    if x_rate is not None or isinstance(denoiser.process, Encoded):  # data at rest have a rate too: zero
        alpha, sigma = denoiser.process.scales_over(lam, x_t)
        error = error + (alpha / sigma) * ((0.0 if x_rate is None else x_rate) - d_hat)
    return error, own


def check_encoder(encoder: nn.Module | None, process: Process) -> None:
    """Raises ValueError unless a bound has an encoder where the denoiser's process has one, and only there."""
    if (encoder is not None) != isinstance(process, Encoded):
        raise ValueError("an `encoder` in the bound and a denoiser with the process Encoded(...) need each other: got "
                         f"{'no' if encoder is None else 'an'} encoder and {process}")  # fmt: skip


def prior_term(process: Process, x: Tensor, lam: Tensor) -> Tensor:
    """KL(q(z | x) || prior) of data, or encoded data, x (B, *) at lam (): (B,) nats.

    What does not depend on x is formed in the dtype of lam.
    """
    alpha, sigma = process.scales(lam)
    prior = process.prior(lam).var.to(lam)
    ratio = sigma * sigma / prior
    constant = (ratio - 1.0 - ratio.log()) * (x[0].numel() if len(x) else 0)
    return 0.5 * (summed(x.square()) * (alpha * alpha / prior).to(x) + constant.to(x))


def check_falling(schedule: Schedule) -> None:
    """Raises ValueError unless a schedule falls from one finite log-SNR to another."""
    with torch.no_grad():
        top, bottom = schedule(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    if not -math.inf < bottom < top < math.inf:
        raise ValueError(f"`schedule` must fall from one finite log-SNR to another, as Linear(lam_max, lam_min) does "
                         f"(got {top:g} at u = 0, {bottom:g} at u = 1)")  # fmt: skip


def continuous(
    shape_by: Literal["bound", "variance"] = "bound",
    times: Literal["even", "independent"] = "even",
    lean: bool = False,
) -> dict[str, Any]:
    """The options of a bound in continuous time, for recipes."""
    return {"shape_by": shape_by, "times": times, "lean": lean}


def in_steps(
    count: int = 1000,
    reverse_variance: Literal["equal", "optimal", "learned"] = "equal",
    momentum: float = 0.02,
    times: Literal["even", "independent"] = "even",
    lean: bool = False,
) -> dict[str, Any]:
    """The options of a bound in T steps, for recipes."""
    return {"steps": count, "reverse_variance": reverse_variance, "momentum": momentum, "times": times, "lean": lean}
