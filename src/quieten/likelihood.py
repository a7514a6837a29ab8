r"""Likelihood: the variational bound with every term, in steps or in continuous time; `density` has that of the ODE.

    -log p(x0) <= prior + diffusion + reconstruction

in nats per example. `Bound.bits_per_dim` divides by D ln 2. With a decoder of discrete values (`decoders.Discretised`,
`Flat`, `Dequantised`) that is bits per dimension of the integers behind data scaled to [-1, 1], whatever the scale; with
`Plain` it is a density, which changes with the unit of the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .denoiser import Denoiser
from .gaussian import Gaussian
from .likelihoods.bound import check_encoder, drift_error, prior_term
from .likelihoods.decoders import Decoder, summed
from .likelihoods.density import log_likelihood
from .noise import Draws
from .process import Process
from .schedule import Schedule, check_grid
from .transition import Ancestral, Step, Transition

if TYPE_CHECKING:
    from .encoder import Encoder

__all__ = ["Bound", "elbo", "evaluate", "fit_decoder", "log_likelihood"]


@dataclass(frozen=True)
class Bound:
    """A bound on -log p(x0), by terms, in nats per example; float64 where the device has it.

    Attributes:
        prior: KL(q(x_T | x0) || p(x_T)): (B,).
        diffusion: KL(q(x_s | x_t, x0) || p(x_s | x_t)) of each step, from noise to data: (B, K - 1) for K levels; (B, 1) with
            the integral over all levels in continuous time.
        reconstruction: -log P(x0 | x_t) at the cleanest level: (B,).
        dims: Numbers in an example, D.
        levels: The log-SNRs of the steps, from noise to data; () in continuous time.
        discrete: Whether it bounds the likelihood of integers: else that of a density, of which bits would mean nothing.
    """

    prior: Tensor
    diffusion: Tensor
    reconstruction: Tensor
    dims: int
    levels: tuple[float, ...] = ()
    discrete: bool = True

    @property
    def total(self) -> Tensor:
        """The bound on -log p(x0), (B,) nats."""
        return self.prior + self.diffusion.sum(1) + self.reconstruction

    @property
    def terms(self) -> dict[str, Tensor]:
        """The three terms and their sum, each (B,) nats."""
        diffusion = self.diffusion.sum(1)
        return {"prior": self.prior, "diffusion": diffusion, "reconstruction": self.reconstruction, "total": self.total}

    def bits_per_dim(self) -> Tensor:
        """total / (D ln 2): (B,).

        Raises:
            ValueError: For a density, such as that of latents: its nats per dimension are `total / dims`.
        """
        if not self.discrete:
            raise ValueError("bits per dimension are of integers, this bound is of a density: report total / dims, in nats, "
                             "or take a decoder of discrete values")  # fmt: skip
        return self.total / (self.dims * math.log(2.0))

    @classmethod
    def cat(cls, bounds: Sequence[Bound]) -> Bound:
        """The bound of all examples of several batches."""
        if not bounds:
            raise ValueError("`bounds` must hold at least one bound")
        first, *others = bounds
        if any((b.dims, b.levels, b.discrete) != (first.dims, first.levels, first.discrete) for b in others):
            raise ValueError("`bounds` must be of one protocol: the same levels, kind of decoder and shape of the data")
        return cls(
            torch.cat([b.prior for b in bounds]),
            torch.cat([b.diffusion for b in bounds]),
            torch.cat([b.reconstruction for b in bounds]),
            first.dims,
            first.levels,
            first.discrete,
        )


def elbo(
    denoiser: Denoiser,
    x0: Tensor,
    decoder: Decoder,
    grid_or_schedule: Tensor | Schedule,
    *,
    draws: Draws,
    encoder: Encoder | None = None,
    transition: Transition | None = None,
) -> Bound:
    r"""The variational bound on -log p(x0), with every term.

    On a grid of K levels, x_t is drawn from q(x_t | x0) for each level by itself, and

    .. math:: L = KL(q(x_T | x_0) \| p(x_T)) + \sum_{s > 0} KL(q(x_s | x_t, x_0) \| p(x_s | x_t)) - \log P(x_0 | x_{t_1}),

    with p the transition's kernel, whatever its variance and basis, and q the posterior of the forward process. With a
    schedule, the sum is the integral :math:`E_u[\tfrac12 (-d\lambda / du) \|\epsilon - \hat\epsilon\|^2]` over the levels
    from u = 1 to u = 0, at one u per example, spread evenly over the batch; variances have no part in it.

    The states are float64 where the device has it: differences of states near the data keep their digits. Gradients flow if
    they are enabled.

    Arguments:
        denoiser: Conditions bound; in evaluation mode for a bound that means something.
        x0: Data (B, *).
        decoder: For the last term, such as `Discretised(var)`; it says what the data must be.
        grid_or_schedule: Log-SNRs from noise to data, with or without +inf at the end (the decoder stands there); or a curve
            with finite values at its ends.
        draws: Randomness, keyed by the example: the same example gets the same noise whatever the batch.
        encoder: Of a model that was trained with one.
        transition: The steps; None is `Ancestral()`. Use the variance and the clipping that sampling will use.

    Raises:
        ValueError: For a kernel that is no Gaussian with a positive variance (deterministic steps: DDIM, ODE solvers), that
            needs history, or that maps the state after the draw; eta below 1; a grid that does not rise strictly; an encoder
            without a process that has one, or the other way round.

    References:
        | Denoising Diffusion Probabilistic Models (Ho et al., 2020), eq. 5
        | https://arxiv.org/abs/2006.11239
        | Variational Diffusion Models (Kingma et al., 2021), eq. 11 to 18, for continuous time
        | https://arxiv.org/abs/2107.00630

    Example:
        >>> from quieten import VP, Draws, GaussianData, Table
        >>> from quieten.likelihoods.decoders import Plain
        >>> data = GaussianData(torch.zeros(2), torch.tensor([0.1, 0.5]), VP)
        >>> grid = Table.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).grid(5)
        >>> bound = elbo(data, torch.zeros(3, 2), Plain(), grid, draws=Draws(0, 0, range(3)))
        >>> bound.diffusion.shape, bound.total.shape
        (torch.Size([3, 4]), torch.Size([3]))
    """
    if len(draws) != len(x0):
        raise ValueError(f"`draws` is for {len(draws)} examples, `x0` has {len(x0)}: give one position per example")
    if not x0.is_floating_point():
        raise ValueError(f"`x0` must be floats (got {x0.dtype}): scale bytes by k / 127.5 - 1, as Dataset.batch does")
    check_encoder(encoder, denoiser.process)
    x0 = decoder.prepare(x0 if x0.device.type == "mps" else x0.double(), draws)
    if isinstance(grid_or_schedule, Schedule):
        if transition is not None:
            raise ValueError("`transition` belongs to a bound in steps: leave it out with a schedule, or give a grid")
        return _continuous(denoiser, x0, decoder, grid_or_schedule, draws, encoder)
    return _in_steps(denoiser, x0, decoder, grid_or_schedule, draws, encoder, transition or Ancestral())


@torch.no_grad()
def evaluate(
    denoiser: Denoiser,
    x0: Tensor,
    decoder: Decoder,
    grid_or_schedule: Tensor | Schedule,
    *,
    cond: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    batch: int = 64,
    encoder: Encoder | None = None,
    transition: Transition | None = None,
    progress: Callable[[int], None] | None = None,
) -> Bound:
    """`elbo` of many examples in batches, without gradients: the same for a seed, whatever the batch.

    Arguments:
        denoiser: Conditions free or bound.
        x0: Data (N, *), on any device.
        decoder: As in `elbo`.
        grid_or_schedule: As in `elbo`.
        cond: Conditions by name, each (N, ...).
        seed: Key of the noise; example i of a seed has its own.
        batch: Examples at once.
        encoder: As in `elbo`.
        transition: As in `elbo`.
        progress: Called with the number of examples done, after each batch.

    Raises:
        ValueError: As `elbo`, and if the bound of an example is not finite.
    """
    device = denoiser.device
    bounds = []
    for i in range(0, max(len(x0), 1), batch):
        rows = slice(i, min(i + batch, len(x0)))
        bound = denoiser.bind(**{name: value[rows].to(device) for name, value in (cond or {}).items()})
        draws = Draws(seed, 0, range(rows.start, rows.stop), len(x0))
        part = x0[rows].to(device)
        bounds.append(elbo(bound, part, decoder, grid_or_schedule, draws=draws, encoder=encoder, transition=transition))
        if progress is not None:
            progress(rows.stop)
    whole = Bound.cat(bounds)
    bad = int((~whole.total.isfinite()).sum())
    if bad:
        raise ValueError(f"the bound of {bad} of {len(x0)} examples is not finite: look at the variances, or at those examples")
    return whole


@torch.no_grad()
def fit_decoder(
    decoder: Decoder,
    denoiser: Denoiser,
    x0: Tensor,
    lam: float,
    *,
    cond: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    batch: int = 64,
    encoder: Encoder | None = None,
    transition: Transition | None = None,
) -> Decoder:
    """The decoder with the variance that suits the denoiser at the cleanest level; see `Decoder.fitted`.

    Arguments:
        decoder: Of the kind wanted.
        denoiser: Conditions free or bound.
        x0: Training data (N, *): a variance fitted on the data of a bound flatters it.
        lam: The cleanest level of the grid.
        cond: As in `evaluate`.
        seed: Of the noise.
        batch: Examples at once.
        encoder: As in `elbo`.
        transition: The one of the bound, whose clipping counts; None is `Ancestral()`.
    """
    if not decoder.uses_step:
        return decoder
    check_encoder(encoder, denoiser.process)
    transition, device, total = transition or Ancestral(), denoiser.device, 0.0
    for i in range(0, len(x0), batch):
        rows = slice(i, min(i + batch, len(x0)))
        bound = denoiser.bind(**{name: value[rows].to(device) for name, value in (cond or {}).items()})
        draws = Draws(seed, 0, range(rows.start, rows.stop))
        x = decoder.prepare(x0[rows].to(device, x0.dtype if device.type == "mps" else torch.float64), draws)
        _, x_t = _noised(denoiser.process, x, lam, encoder, draws, -1)
        step = transition(bound, x_t, lam, math.inf)
        total += float((x - step.p.mean).square().sum())
    if not x0.numel():
        raise ValueError("`x0` holds no training data to fit the decoder on: give some, or a decoder with a variance")
    return decoder.fitted(total / x0.numel())


# ---- in steps


def _in_steps(
    denoiser: Denoiser,
    x0: Tensor,
    decoder: Decoder,
    grid: Tensor,
    draws: Draws,
    encoder: Encoder | None,
    transition: Transition,
) -> Bound:
    _check_transition(transition)
    lams = _finite_levels(grid)
    process, kls, least = denoiser.process, [], []
    for i, (lam_t, lam_s) in enumerate(pairwise(lams)):
        m, x_t = _noised(process, x0, lam_t, encoder, draws, i)
        p = _kernel(transition(denoiser, x_t, lam_t, lam_s))
        # the base formula: a process of encoded data adds its counterterm to p alone
        q = Process.bridge(process, m, x_t, lam_t, lam_s)
        if encoder is not None:
            shift = _encoded(encoder, x0, lam_s) - m
            q = Gaussian(q.mean + process.scales(lam_s)[0] * shift, q.var)
        kls.append(q.kl(p))
        least.append(p.var.detach().min().to(x0) if p.var.numel() else x0.new_ones(()))
    if kls and not bool(torch.stack(least).min() > 0):  # looked at once, after the loop: a device does not wait in it
        i = int(torch.stack(least).argmin())
        raise ValueError(f"the kernel from log-SNR {lams[i]:.4g} to {lams[i + 1]:.4g} has variance 0 or NaN somewhere, and the "
                         "bound is infinite: use Ancestral(1), or a source whose variance is positive")  # fmt: skip
    _, x_t = _noised(process, x0, lams[-1], encoder, draws, len(lams) - 1)
    step = transition(denoiser, x_t, lams[-1], math.inf) if decoder.uses_step else None
    diffusion = torch.stack(kls, 1) if kls else x0.new_zeros(len(x0), 0)
    prior, reconstruction = _prior(process, x0, lams[0], encoder), decoder(step, x0, x_t, lams[-1])
    return Bound(prior, diffusion, reconstruction, math.prod(x0.shape[1:]), tuple(lams), decoder.pixels is not None)


def _check_transition(transition: Transition) -> None:
    eta = transition.eta
    if eta is not None and eta < 1.0 and not transition.own_noise:  # a bound holds for any kernel that has some variance
        raise ValueError(f"`transition` has eta={eta:g}: the bound compares kernels with the posterior of the forward process, "
                         "whose noise is that of eta=1; use Ancestral(1)")  # fmt: skip


def _finite_levels(grid: Any) -> list[float]:
    """The levels of a grid without +inf, which the decoder stands for."""
    grid = torch.as_tensor(grid, dtype=torch.float64)
    lams = check_grid(grid if len(grid.shape) == 1 and len(grid) and grid[-1] == math.inf else _with_data(grid))
    return lams[:-1]


def _with_data(grid: Tensor) -> Tensor:
    return torch.cat([grid.flatten(), grid.new_tensor([math.inf])]) if grid.ndim == 1 else grid


def _noised(
    process: Process, x0: Tensor, lam: float, encoder: Encoder | None, draws: Draws, index: int
) -> tuple[Tensor, Tensor]:
    """(data, or encoded data, at a level; a state drawn from q(x_t | x0))."""
    m = x0 if encoder is None else _encoded(encoder, x0, lam)
    alpha, sigma = process.scales(lam)
    return m, alpha * m + sigma * draws.normal(x0, f"bound {index}")


def _encoded(encoder: Encoder, x0: Tensor, lam: float) -> Tensor:
    """Encoded data (B, *) at a level, computed in the encoder's own precision."""
    dtype = _dtype_of(encoder, x0)
    encoded: Tensor = encoder(x0.to(dtype), torch.full((len(x0),), lam, dtype=dtype, device=x0.device))
    return encoded.to(x0)


def _dtype_of(encoder: Encoder, x0: Tensor) -> torch.dtype:
    return next((p.dtype for p in encoder.parameters()), x0.dtype)


def _kernel(step: Step) -> Gaussian:
    """The kernel of a step that the bound has a meaning for.

    Raises:
        ValueError: For a map after the draw, history, or anything but a Gaussian with a variance.
    """
    if step.then is not None:
        raise ValueError("`transition` maps the state after the draw, so its kernel has no known density: leave that out here")
    if step.memory is not None:
        raise ValueError("`transition` remembers earlier steps, the bound takes each by itself: use Ancestral()")
    if not isinstance(step.p, Gaussian):
        raise ValueError(f"`transition` has kernels of class {type(step.p).__name__}, without a density: use a Gaussian one")
    if step.p.is_point:
        raise ValueError(
            "`transition` is deterministic, and its bound infinite: use Ancestral(1), or log_likelihood for an ODE"
        )
    return step.p


def _prior(process: Process, x0: Tensor, lam: float, encoder: Encoder | None) -> Tensor:
    """KL(q(x_T | x0) || p(x_T)), (B,)."""
    return prior_term(process, x0 if encoder is None else _encoded(encoder, x0, lam), torch.tensor(lam, dtype=torch.float64))


# ---- in continuous time


def _continuous(
    denoiser: Denoiser, x0: Tensor, decoder: Decoder, schedule: Schedule, draws: Draws, encoder: Encoder | None
) -> Bound:
    process = denoiser.process
    clean, noisy = (float(lam) for lam in schedule(torch.tensor([0.0, 1.0], dtype=torch.float64)))
    if not math.isfinite(clean) or math.isnan(noisy) or noisy >= clean:
        raise ValueError(f"`grid_or_schedule` must fall from a finite log-SNR at u = 0 (got {clean:.4g} and {noisy:.4g}): use "
                         "Linear(lam_max, lam_min), or a grid of levels")  # fmt: skip
    u = schedule.draw(draws).to(x0)
    lam, rate = schedule.rate(u)
    m, moving = x0, None
    if encoder is not None:
        dtype = _dtype_of(encoder, x0)
        m, moving = (part.to(x0) for part in encoder.with_rate(x0.to(dtype), lam.to(dtype)))
    error, _ = drift_error(denoiser, m, moving, draws.normal(x0, "bound diffusion"), lam)
    diffusion = 0.5 * rate * summed(error.square())
    _, x_t = _noised(process, x0, clean, encoder, draws, 0)
    step = Ancestral()(denoiser, x_t, clean, math.inf) if decoder.uses_step else None
    prior, reconstruction = _prior(process, x0, noisy, encoder), decoder(step, x0, x_t, clean)
    dims = math.prod(x0.shape[1:])
    return Bound(prior, diffusion[:, None], reconstruction, dims, (), decoder.pixels is not None)
