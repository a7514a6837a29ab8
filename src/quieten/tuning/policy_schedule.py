r"""Where a policy starts from: few-step grids, their noise, and steps other than the ancestral ones.

References:
    | On Fast Sampling of Diffusion Probabilistic Models (Kong, Ping, 2021): FastDPM, the variant by noise levels
    | https://arxiv.org/abs/2106.00132
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..noise import Draws
from ..process import Level
from ..schedule import check_grid, karras
from ..transition import Ancestral, Step, Transition
from .policy import Policy

__all__ = ["Consistency", "FastDPM", "beta_schedule", "edm_grid", "fastdpm", "moment_std", "network_time"]

BETAS = (1e-4, 0.02)
STEPS = 1000
PURE = 0.05
"""Share of signal in the amplitude of the first state, above which starting from pure noise is worth a warning."""


@dataclass(frozen=True)
class FastDPM:
    """A short VP chain through the noise levels of a long one. Everything is float64.

    Attributes:
        eta: Variances of the forward steps, data first: (T,).
        log_alpha2: Logarithms of alpha^2 after each of them: (T,).
        times: Time of a network that was trained on the long chain, fractional, noise first: (T,).
        grid: Log-SNRs from noise to data, +inf at the end: (T + 1,).
        kappa: Share of the ancestral noise, `Ancestral`'s eta.
        clipped: Whether the chain could not be made to end in as much noise as the long one does.
    """

    eta: Tensor
    log_alpha2: Tensor
    times: Tensor
    grid: Tensor
    kappa: float
    clipped: bool

    @property
    def std(self) -> Tensor:
        """Standard deviation of each step, noise first, (T,): kappa sqrt((1 - G') / (1 - G) (1 - G / G')), 1e-3 in the last."""
        return torch.cat([self._spread(), torch.full((1,), 1e-3, dtype=torch.float64)])

    @property
    def x_mult(self) -> Tensor:
        """What multiplies x in the mean of each step, noise first: sqrt(G' / G), (T,)."""
        here, there = self._levels()
        return (0.5 * (there - here)).exp()

    @property
    def eps_mult(self) -> Tensor:
        """What multiplies the network's noise: sqrt(1 - G' - rho^2) - sqrt(1 - G) sqrt(G' / G), (T,)."""
        here, there = self._levels()
        spread = torch.cat([self._spread(), torch.zeros(1, dtype=torch.float64)])
        left = (-there.expm1() - spread.square()).clamp_min(0.0).sqrt()
        return left - (-here.expm1()).sqrt() * self.x_mult

    def policy(self, denoiser: Denoiser, **options: Any) -> Policy:
        """A policy on this chain, from pure noise.

        Arguments:
            denoiser: Of the process VP.
            **options: As in `Policy`.

        Warns:
            Where the chain starts with so much signal that pure noise is no fair start, and where the network only takes whole
            times: its levels are then a little off.
        """
        signal = math.exp(0.5 * float(self.log_alpha2[-1]))
        if signal > PURE:
            warnings.warn(
                f"a chain of {len(self.eta)} steps starts from pure noise at time {float(self.times[0]):.1f}, where "
                f"{100 * signal:.1f} % signal amplitude is expected: tuning has to repair that; a linear chain has more noise",
                stacklevel=2,
            )
        off = _rounding(denoiser, self.times)
        if off > 1e-3:
            warnings.warn(f"the network takes whole times: those of the chain were rounded, by up to {off:.2f}", stacklevel=2)
        return Policy(denoiser, self.grid, Ancestral(self.kappa, spread=False), **options)

    def _levels(self) -> tuple[Tensor, Tensor]:
        """log alpha^2 before and after each step, noise first."""
        here = self.log_alpha2.flip(0)
        return here, torch.cat([here[1:], here.new_zeros(1)])

    def _spread(self) -> Tensor:
        here, there = (level[:-1] for level in self._levels())
        return self.kappa * (there.expm1() / here.expm1() * -(here - there).expm1()).sqrt()


def fastdpm(
    T: int,
    kind: Literal["quadratic", "linear"] = "quadratic",
    kappa: float = 1.0,
    betas: tuple[float, float] = BETAS,
    steps: int = STEPS,
) -> FastDPM:
    r"""FastDPM's chain of T steps by noise levels ("VAR"), as the VP runs of DxMI start from.

    The variances are beta_0 (1 + i u)^2 with u < 0.95 / (sqrt(beta_0) T), or go linearly from beta_0 to u <= 0.99; u makes the
    chain end in as much noise as the long one, or is held at the end of its range where none does.

    Arguments:
        T: Number of steps.
        kind: "quadratic" (the official CIFAR-10 runs; held for T <= 20), or "linear".
        kappa: Share of the ancestral noise, 0 to 1.
        betas: First and last variance of the long chain, linear between.
        steps: Its length.

    Raises:
        ValueError: For T below 1, an unknown kind, or a chain or share out of range.

    Example:
        >>> chain = fastdpm(10)
        >>> chain.clipped, round(float(chain.times[0]), 1)
        (True, 616.7)
    """
    if isinstance(T, bool) or not isinstance(T, int) or T < 1:
        raise ValueError(f"`T` must be a whole number of at least 1 (got {T!r})")
    if kind not in ("quadratic", "linear"):
        raise ValueError(f"`kind` must be 'quadratic' or 'linear' (got {kind!r})")
    if not 0.0 <= kappa <= 1.0:
        raise ValueError(f"`kappa` must lie in [0, 1] (got {kappa})")
    if not (0.0 < betas[0] < betas[1] < 1.0 and steps >= 2):
        raise ValueError(f"`betas` must rise within (0, 1), over at least 2 `steps` (got {betas}, {steps})")
    low, wanted = betas[0], float(torch.log1p(-torch.linspace(*betas, steps, dtype=torch.float64)).sum())
    i = torch.arange(T, dtype=torch.float64)

    def etas(u: float) -> Tensor:
        return low * (1 + i * u) ** 2 if kind == "quadratic" else low + (u - low) * i / max(1, T - 1)

    end = 0.95 / (math.sqrt(low) * T) if kind == "quadratic" else 0.99
    u, clipped = _root(lambda u: float(torch.log1p(-etas(u)).sum()) - wanted, 0.0 if kind == "quadratic" else low, end)
    eta = etas(u)
    log_alpha2 = torch.log1p(-eta).cumsum(0)
    lam = log_alpha2 - torch.log(-torch.expm1(log_alpha2))
    grid = torch.cat([lam.flip(0), torch.tensor([math.inf], dtype=torch.float64)])
    times = torch.tensor([network_time(level, betas, steps) for level in log_alpha2.flip(0).tolist()], dtype=torch.float64)
    return FastDPM(eta, log_alpha2, times, grid, kappa, clipped)


def network_time(log_alpha2: float, betas: tuple[float, float] = BETAS, steps: int = STEPS) -> float:
    r"""The fractional time at which a linear chain has a given log alpha^2, with the gamma function between whole times.

    It solves :math:`\log\bar\alpha(t) = (t + 1) \log\delta + \log\Gamma(c + 1) - \log\Gamma(c - t)` with
    :math:`\delta = (\beta_T - \beta_0) / (N - 1)` and :math:`c = (1 - \beta_0) / \delta`. A `Table` of the chain gives the same
    to 0.01, linear in the log-SNR between its entries.

    Arguments:
        log_alpha2: Logarithm of alpha^2; held within the chain.
        betas: As in `fastdpm`.
        steps: As in `fastdpm`.
    """
    delta = (betas[1] - betas[0]) / (steps - 1)
    c = (1.0 - betas[0]) / delta  # the two log-gammas are near 5e5: float64, or nothing is left of their difference

    def gap(t: float) -> float:
        return (t + 1) * math.log(delta) + math.lgamma(c + 1) - math.lgamma(c - t) - log_alpha2

    return _root(gap, 0.0, steps - 1.0)[0]


def edm_grid(
    T: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    stochastic_last: bool = False,
) -> Tensor:
    """EDM's levels for a policy of T steps: log-SNRs, float64 (T + 1,).

    Arguments:
        T: Number of steps.
        sigma_min: Smallest sigma / alpha.
        sigma_max: Largest.
        rho: 7; the official runs of four steps have 4.
        stochastic_last: End at `sigma_min`, with ancestral noise in every step, in place of the data.
    """
    return karras(T + 1, sigma_min, sigma_max, rho)[:-1] if stochastic_last else karras(T, sigma_min, sigma_max, rho)


class Consistency(Transition):
    r"""Multistep consistency sampling: from the estimate of x0, up to the next level by the forward process.

    In VE it is N(f(x, sigma), sigma'^2 - sigma_min^2) for a network f that answers at sigma_min.

    Arguments:
        lam_max: Log-SNR of the network's answers, -2 log(sigma_min) in VE; +inf for clean data.

    References:
        | Consistency Models (Song et al., 2023), algorithm 1
        | https://arxiv.org/abs/2303.01469
    """

    def __init__(self, lam_max: float = math.inf):
        super().__init__()
        if math.isnan(lam_max):
            raise ValueError("`lam_max` must be a log-SNR (got nan)")
        self.lam_max = float(lam_max)

    def forward(self, denoiser: Denoiser, x_t: Tensor, lam_t: Level, lam_s: Level, memory: Any = None) -> Step:
        x0 = denoiser(x_t, lam_t)
        if isinstance(lam_s, Tensor):  # beyond the network's own level there is nothing to add
            top = torch.full_like(lam_s, self.lam_max)
            return Step(denoiser.process.noising(x0.mean, top, torch.minimum(lam_s, top)), x0)
        return Step(denoiser.process.noising(x0.mean, self.lam_max, min(lam_s, self.lam_max)), x0)

    def extra_repr(self) -> str:
        return f"lam_max={self.lam_max}"


@torch.no_grad()
def moment_std(
    denoiser: Denoiser,
    grid: Tensor,
    x0: Tensor,
    transition: Transition | None = None,
    *,
    draws: Draws,
    cond: Mapping[str, Any] | None = None,
    per: Literal["step", "pixel"] = "step",
    last_std: float = 1e-3,
) -> Tensor:
    """The standard deviations that a denoiser with a variance (OCM, SN, analytic) asks for, averaged: a policy's `std`.

    The variance of each step's kernel is averaged over noised data, and over dimensions too with per="step".

    Arguments:
        denoiser: Such as `WithCovariance(trunk, load_variance(...))`; the policy itself is then made of the trunk.
        grid: Of the policy.
        x0: Data (B, *).
        transition: Whose kernels; None is `Ancestral()`.
        draws: Randomness, one position for each row of x0.
        cond: Conditions by name, each (B, ...).
        per: A number for each step, (T,), or for each pixel of each step, (T, *).
        last_std: Of a step to lam = +inf.

    Raises:
        ValueError: For per="pixel" with a variance that is diagonal in another basis, or an unknown `per`.
    """
    if per not in ("step", "pixel"):
        raise ValueError(f"`per` must be 'step' or 'pixel' (got {per!r})")
    lams, step, out = check_grid(grid), Ancestral() if transition is None else transition, []
    bound = denoiser.bind(**(cond or {}))
    for k in range(len(lams) - 1):
        if lams[k + 1] == math.inf:
            out.append(torch.full(x0.shape[1:] if per == "pixel" else (), last_std, dtype=torch.float64, device=x0.device))
            continue
        x = denoiser.process.marginal(x0, lams[k]).sample(draws.normal(x0, f"moment {k}"))
        p = step(bound, x, lams[k], lams[k + 1]).p
        if per == "pixel" and p.basis is not None:
            raise ValueError("`per`='pixel' needs a variance of pixels, this one is diagonal in another basis: use per='step'")
        var = p.var.double().expand_as(x)
        out.append((var.mean(0) if per == "pixel" else var.mean()).sqrt())
    return torch.stack(out).to(x0)


def beta_schedule(kind: str, n: int, start: float, end: float) -> Tensor:
    """Variances of a forward process by name, as released code starts s_k^2 from: float64 (n,).

    Arguments:
        kind: "linear", "quad" (linear in the root), "sigmoid" (over [-6, 6]), "constant" (`start` throughout).
        n: How many.
        start: First value.
        end: Last value.
    """
    ramp = torch.linspace(0.0, 1.0, n, dtype=torch.float64)
    if kind == "linear":
        return start + (end - start) * ramp
    if kind == "quad":
        return (math.sqrt(start) + (math.sqrt(end) - math.sqrt(start)) * ramp).square()
    if kind == "sigmoid":
        return torch.sigmoid(12.0 * ramp - 6.0) * (end - start) + start
    if kind == "constant":
        return torch.full((n,), start, dtype=torch.float64)
    raise ValueError(f"`kind` must be 'linear', 'quad', 'sigmoid' or 'constant' (got {kind!r})")


def _root(falling: Callable[[float], float], low: float, high: float) -> tuple[float, bool]:
    """Where a falling function is 0, by bisection, and whether that lies beyond the ends (then the nearer end is taken)."""
    if falling(low) <= 0:
        return low, falling(low) < 0
    if falling(high) >= 0:
        return high, falling(high) > 0
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return 0.5 * (low + high), False


def _rounding(denoiser: Denoiser, times: Tensor) -> float:
    """By how much a network that only takes whole times rounds these; 0 for others, and for those that do not say."""
    here: Any = denoiser
    while not hasattr(here, "embed") and hasattr(here, "inner"):
        here = here.inner
    if not hasattr(here, "embed"):
        return 0.0
    log_alpha2 = torch.tensor([_log_alpha2(t) for t in (100.25, 500.5, 900.75)], dtype=torch.float64)
    seen = here.embed(log_alpha2 - torch.log(-torch.expm1(log_alpha2)))
    whole = not seen.is_floating_point() or bool((seen == seen.round()).all())
    return float((times - times.round()).abs().max()) if whole else 0.0


def _log_alpha2(t: float, betas: tuple[float, float] = BETAS, steps: int = STEPS) -> float:
    """log alpha^2 of the long chain at a fractional time: the inverse of `network_time`."""
    delta = (betas[1] - betas[0]) / (steps - 1)
    c = (1.0 - betas[0]) / delta
    return (t + 1) * math.log(delta) + math.lgamma(c + 1) - math.lgamma(c - t)
