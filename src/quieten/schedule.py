r"""Schedules: curves u -> lam from data (u = 0) to noise (u = 1), and grids of levels to sample on."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .noise import Draws

__all__ = [
    "Cosine",
    "Linear",
    "LinearBeta",
    "LogNormal",
    "Power",
    "Rectified",
    "Schedule",
    "Table",
    "check_grid",
    "churned",
    "corrected",
    "karras",
]


class Schedule(nn.Module, ABC):
    """A decreasing curve from u in [0, 1] to log-SNR lam. May hold parameters that are learned.

    Called with one number, a float or a tensor () on the CPU, it refuses one outside [0, 1]. Of vectors nothing is looked at,
    since on a device that would wait for it.
    """

    def __call__(self, u: Tensor | float) -> Tensor:
        if isinstance(u, int | float):
            u = torch.tensor(float(u), dtype=torch.float64)
        if u.ndim == 0 and u.device.type == "cpu":
            self._check_time(u)
        return super().__call__(u)

    def _check_time(self, u: Tensor) -> None:
        try:
            value = u.detach().item()
        except RuntimeError:  # inside torch.func.vmap a tensor has no one value
            return
        if not -1e-6 <= value <= 1 + 1e-6:  # `inverse` rounds
            raise ValueError(f"`u` must lie in [0, 1], from data to noise (got {value:g})")

    @abstractmethod
    def forward(self, u: Tensor) -> Tensor:
        """lam at u, elementwise; float64 in gives float64 out."""

    @abstractmethod
    def inverse(self, lam: Tensor) -> Tensor:
        """u at lam, elementwise."""

    def draw(self, draws: Draws) -> Tensor:
        """Low-discrepancy u, float64 (B,) in (0, 1)."""
        return draws.stratified("u")

    def rate(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(lam, -d lam / d u) at u, elementwise; both carry gradients to learned parameters."""
        learned = any(p.requires_grad for p in self.parameters())
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            lam = self.forward(u)  # solvers ask for the slope of a curve that goes on beyond its ends
            (slope,) = torch.autograd.grad(lam.sum(), u, create_graph=learned)
        return (lam, -slope) if learned else (lam.detach(), -slope)

    def grid(self, steps: int, spacing: str = "uniform") -> Tensor:
        """Levels to sample on: float64 (steps + 1,), from noise to +inf (data).

        They are `steps` finite levels from u = 1 to 0, and the data. A sampler of T steps in a paper often has T + 1 finite
        levels (u = T/T to 0/T) and reads the data off the last: that is `grid(T + 1)`.

        Arguments:
            steps: Number of steps, at least 1.
            spacing: "uniform" or "quadratic" in u.

        Raises:
            ValueError: If the curve has no usable ends, or for an unknown spacing.
        """
        _check_steps(steps)
        if spacing not in ("uniform", "quadratic"):
            raise ValueError(f"`spacing` must be 'uniform' or 'quadratic' (got {spacing!r})")
        with torch.no_grad():
            spent = math.isinf(self(torch.zeros((), dtype=torch.float64)))  # the curve itself ends at the data
            u = torch.linspace(1.0, 0.0, steps + spent, dtype=torch.float64)[:steps]
            lam = self(u.square() if spacing == "quadratic" else u)
        return _end_at_data(lam.double())


class Linear(Schedule):
    r"""lam falls linearly from `lam_max` to `lam_min`: the fixed schedule of VDM, or its learned end points.

    Arguments:
        lam_max: Log-SNR at u = 0.
        lam_min: Log-SNR at u = 1.
        learned: Whether both ends are parameters.

    References:
        | Variational Diffusion Models (Kingma et al., 2021), appendix H
        | https://arxiv.org/abs/2107.00630
    """

    def __init__(self, lam_max: float = 13.3, lam_min: float = -5.0, learned: bool = False):
        super().__init__()
        _check_ends(lam_max, lam_min)
        ends = torch.tensor([lam_max, lam_min], dtype=torch.float32 if learned else torch.float64)
        if learned:
            self.ends = nn.Parameter(ends)
        else:
            self.register_buffer("ends", ends, persistent=False)

    def forward(self, u: Tensor) -> Tensor:
        top, bottom = self.ends.to(u)
        return top + (bottom - top) * u

    def inverse(self, lam: Tensor) -> Tensor:
        top, bottom = self.ends.to(lam)
        return (top - lam) / (top - bottom)


class LinearBeta(Schedule):
    r"""The VP process whose beta(t) grows linearly: lam = -log(expm1(beta_d t^2 / 2 + beta_min t)), t = start + (1 - start) u.

    Arguments:
        beta_min: Beta at t = 0, 1/time.
        beta_max: Beta at t = 1.
        start: The t of u = 0; at 0 the curve would begin at +inf.

    References:
        | Score-Based Generative Modeling through SDEs (Song et al., 2021), eq. 32
        | https://arxiv.org/abs/2011.13456
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, start: float = 1e-3):
        super().__init__()
        if not (
            0 <= start < 1 and beta_max > 0 and 0.5 * (beta_max - beta_min) * start + beta_min >= 0 and beta_max >= beta_min
        ):
            raise ValueError(
                f"`beta_min` <= `beta_max` must make noise grow from `start` in [0, 1) (got {beta_min}, {beta_max}, {start})"
            )
        self.beta_min, self.beta_d, self.start = beta_min, beta_max - beta_min, start

    @classmethod
    def between(cls, sigma_min: float, sigma_max: float, start: float = 1e-3) -> LinearBeta:
        """The curve with sigma / alpha = sigma_min at t = start and sigma_max at t = 1."""
        low, high = math.log1p(sigma_min**2) / start, math.log1p(sigma_max**2)
        beta_d = 2.0 * (high - low) / (1.0 - start)
        return cls(high - 0.5 * beta_d, high + 0.5 * beta_d, start)

    def forward(self, u: Tensor) -> Tensor:
        t = self.start + (1.0 - self.start) * u
        return -torch.log(torch.expm1((0.5 * self.beta_d * t + self.beta_min) * t))

    def inverse(self, lam: Tensor) -> Tensor:
        integral = -nn.functional.logsigmoid(lam)  # = log(1 + sigma^2 / alpha^2); softplus drops digits beyond 20
        # 2 I / (b + sqrt(b^2 + 2 d I)) instead of a difference that cancels near the data
        root = torch.sqrt(self.beta_min**2 + 2.0 * self.beta_d * integral)
        t = 2.0 * integral / (self.beta_min + root) if self.beta_min >= 0 else (root - self.beta_min) / self.beta_d
        t = torch.where(lam == math.inf, torch.zeros_like(t), t)
        return (t - self.start) / (1.0 - self.start)


class Cosine(Schedule):
    r"""lam = -2 log tan(a + b u), with finite ends, and a shift for large images.

    Arguments:
        lam_max: Log-SNR at u = 0.
        lam_min: Log-SNR at u = 1.
        shift: Added to every level: 2 log(64 / size) for images larger than 64.

    References:
        | Improved Denoising Diffusion Probabilistic Models (Nichol, Dhariwal, 2021), eq. 17
        | https://arxiv.org/abs/2102.09672
        | simple diffusion (Hoogeboom et al., 2023), section 3.1
        | https://arxiv.org/abs/2301.11093
    """

    def __init__(self, lam_max: float = 15.0, lam_min: float = -15.0, shift: float = 0.0):
        super().__init__()
        _check_ends(lam_max, lam_min)
        self.shift = shift
        self.start = math.atan(math.exp(-0.5 * (lam_max - shift)))
        self.width = math.atan(math.exp(-0.5 * (lam_min - shift))) - self.start

    def forward(self, u: Tensor) -> Tensor:
        return self.shift - 2.0 * torch.log(torch.tan(self.start + self.width * u))

    def inverse(self, lam: Tensor) -> Tensor:
        return (torch.atan(torch.exp(-0.5 * (lam - self.shift))) - self.start) / self.width


class LogNormal(Schedule):
    r"""log(sigma / alpha) ~ N(mean, std^2): the training levels of EDM, and of logit-normal rectified flow.

    A density to train with, without ends: `grid` refuses, use `karras`.

    Arguments:
        mean: Mean of log(sigma / alpha).
        std: Its standard deviation.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), table 1
        | https://arxiv.org/abs/2206.00364
        | Scaling Rectified Flow Transformers (Esser et al., 2024), eq. 19: m = mean, s = std
        | https://arxiv.org/abs/2403.03206
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2):
        super().__init__()
        if not std > 0:
            raise ValueError(f"`std` must be positive (got {std})")
        self.mean, self.std = mean, std

    def forward(self, u: Tensor) -> Tensor:
        return -2.0 * (self.mean + self.std * torch.special.ndtri(u))

    def inverse(self, lam: Tensor) -> Tensor:
        return torch.special.ndtr((-0.5 * lam - self.mean) / self.std)

    def grid(self, steps: int, spacing: str = "uniform") -> Tensor:
        raise ValueError(
            "`LogNormal` is a density of training levels, without ends: sample on karras(steps, sigma_min, sigma_max)"
        )


class Rectified(Schedule):
    r"""Rectified flow: sigma = r in x_t = (1 - r) x0 + r eps, so lam = 2 log((1 - r) / r), from +inf to -inf.

    Arguments:
        shift: Resolution shift, r = shift u / (1 + (shift - 1) u); 3 in SD3.
    """

    def __init__(self, shift: float = 1.0):
        super().__init__()
        if not shift > 0:
            raise ValueError(f"`shift` must be positive (got {shift})")
        self.shift = shift

    def forward(self, u: Tensor) -> Tensor:
        return 2.0 * (torch.log1p(-u) - torch.log(u) - math.log(self.shift))

    def inverse(self, lam: Tensor) -> Tensor:
        return torch.sigmoid(-(0.5 * lam + math.log(self.shift)))


class Power(Schedule):
    """sigma / alpha = u^power, for any u > 0: a time to integrate in (1 is EDM's, 0.5 that of the VE diffusion)."""

    def _check_time(self, u: Tensor) -> None:
        """Any will do."""

    def __init__(self, power: float = 1.0):
        super().__init__()
        if not power > 0:
            raise ValueError(f"`power` must be positive (got {power})")
        self.power = power

    def forward(self, u: Tensor) -> Tensor:
        return -2.0 * self.power * torch.log(u)

    def inverse(self, lam: Tensor) -> Tensor:
        return torch.exp(-lam / (2.0 * self.power))

    def grid(self, steps: int, spacing: str = "uniform") -> Tensor:
        raise ValueError("`Power` has no ends: give them to `karras(steps, sigma_min, sigma_max)`")


class Table(Schedule):
    r"""The levels of a pretrained model, index 0 the cleanest, linear in lam between its entries.

    u maps linearly to the index, u = index / (N - 1). Everything is float64, rebuilt from the betas where there are any.

    Arguments:
        lam: Log-SNRs (N,), strictly decreasing, N at least 2; the last may be -inf (zero terminal SNR).

    Example:
        >>> table = Table.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
        >>> table.index(table.lam[[0, 999]]).tolist()
        [0.0, 999.0]
    """

    lam: Tensor

    def __init__(self, lam: Tensor | Sequence[float]):
        super().__init__()
        lam = torch.as_tensor(lam, dtype=torch.float64)
        if lam.ndim != 1 or len(lam) < 2 or lam.isnan().any() or not (lam[1:] < lam[:-1]).all():
            raise ValueError(
                f"`lam` must be a strictly decreasing vector of at least 2 log-SNRs (got shape {tuple(lam.shape)})"
            )
        self.register_buffer("lam", lam, persistent=False)
        self._rising: list[float] = (-lam).tolist()

    @classmethod
    def from_betas(cls, betas: Tensor | Sequence[float]) -> Table:
        """From the betas of a discrete VP chain, summed in logarithms: float32 tables keep their meaning."""
        betas = torch.as_tensor(betas, dtype=torch.float64)
        return cls.from_log_alpha2(torch.log1p(-betas).cumsum(0))

    @classmethod
    def from_log_alpha2(cls, log_alpha2: Tensor) -> Table:
        """From log alpha_t^2 of a VP process, float64 (N,), cleanest first: exact where alpha_t^2 is nearly 1."""
        return cls(log_alpha2 - torch.log(-torch.expm1(log_alpha2)))

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor | Sequence[float]) -> Table:
        """From alpha_t^2 of a VP process, cleanest first; 0 at the end is zero terminal SNR."""
        return cls(torch.logit(torch.as_tensor(alphas_cumprod, dtype=torch.float64)))

    @classmethod
    def from_sigmas(cls, sigmas: Tensor | Sequence[float]) -> Table:
        """From sigma / alpha in any order; zeros (the data) are dropped."""
        sigmas = torch.as_tensor(sigmas, dtype=torch.float64)
        return cls(-2.0 * torch.log(sigmas[sigmas > 0].sort().values))

    def __len__(self) -> int:
        return len(self.lam)

    def forward(self, u: Tensor) -> Tensor:
        return self.at(u * (len(self) - 1))

    def inverse(self, lam: Tensor) -> Tensor:
        return self.index(lam) / (len(self) - 1)

    def at(self, index: Tensor) -> Tensor:
        """lam at a (fractional) index, held at the ends outside the table."""
        table = self.lam.to(index)
        index = index.clamp(0, len(self) - 1)
        low = index.detach().floor().clamp(max=len(self) - 2).long()
        weight = index - low
        top, bottom = table[low], table[low + 1]
        # next to -inf, `lerp` would turn an exact hit into NaN; elsewhere its slope must survive at the entries
        return torch.where(bottom.isinf(), torch.where(weight == 0, top, bottom), torch.lerp(top, bottom, weight))

    def index(self, lam: Any) -> Any:
        """The fractional index of lam: exact integers within 1e-3 of one, the ends outside the table; float for float."""
        if isinstance(lam, float):
            return self._index(lam)
        table = self.lam.to(device=lam.device)
        wide = lam.double()
        low = (torch.searchsorted(-table, -wide.contiguous(), right=True) - 1).clamp(0, len(self) - 2)
        top, bottom = table[low], table[low + 1]
        # next to a last entry at -inf there is nothing to interpolate: nearer to the finite neighbour counts as it
        share = torch.where(bottom.isinf(), (wide == bottom).double(), (top - wide) / (top - bottom)).clamp(0, 1)
        index = low + share
        nearest = index.round()
        return torch.where((index - nearest).abs() < 1e-3, nearest, index).to(lam)

    def _index(self, lam: float) -> float:
        """`index` of a float, for the sampling loop, where twenty operations on one number would cost more than the state."""
        low = min(max(bisect_right(self._rising, -lam) - 1, 0), len(self._rising) - 2)
        top, bottom = -self._rising[low], -self._rising[low + 1]
        share = float(lam == bottom) if math.isinf(bottom) else min(max((top - lam) / (top - bottom), 0.0), 1.0)
        nearest = round(low + share)
        return float(nearest) if abs(low + share - nearest) < 1e-3 else low + share

    def nearest(self, lam: Tensor) -> Tensor:
        """The index of the entry whose sigma / alpha is nearest, as a network without fractional times needs it."""
        low = self.index(lam.double()).floor().clamp(max=len(self) - 2).long()
        sigma, table = torch.exp(-0.5 * lam.double()), torch.exp(-0.5 * self.lam.to(lam.device))
        return (low + (table[low + 1] - sigma < sigma - table[low])).to(lam)

    def grid(self, steps: int, spacing: str = "leading", offset: int = 0) -> Tensor:
        """Levels of the table to sample on: float64 (steps + 1,), from noise to +inf.

        Arguments:
            steps: From 1 to N.
            spacing: "leading" (multiples of N // steps, plus `offset`), "trailing" (from the last entry down),
                "linspace" (both ends included), "uniform" (the same, not rounded), "quadratic" (DDIM's).
            offset: diffusers' `steps_offset`; 1 for Stable Diffusion's "leading".

        Raises:
            ValueError: If there are not that many distinct entries, or for an unknown spacing.
        """
        return _end_at_data(self.at(self.indices(steps, spacing, offset).double()))

    def indices(self, steps: int, spacing: str = "leading", offset: int = 0) -> Tensor:
        """The indices that `grid` visits, from noise to data: float64 (steps,)."""
        n = len(self)
        _check_steps(steps)
        if steps > n:
            raise ValueError(f"`steps` must be at most the {n} entries of the table (got {steps})")
        k = torch.arange(steps, dtype=torch.float64)
        if spacing == "leading":
            index = (k * (n // steps)).flip(0) + offset
        elif spacing == "trailing":
            index = torch.round(n - k * (n / steps)) - 1
        elif spacing in ("linspace", "uniform"):
            index = k * ((n - 1) / (steps - 1)) if steps > 1 else torch.tensor([n - 1.0], dtype=torch.float64)
            index.clamp_(max=n - 1)  # the product may round upward
            index = (index if spacing == "uniform" else index.round()).flip(0)
        elif spacing == "quadratic":
            index = torch.linspace(math.sqrt(0.8 * n), 0, steps, dtype=torch.float64).square().floor()
        else:
            names = "'leading', 'trailing', 'linspace', 'uniform', 'quadratic'"
            raise ValueError(f"`spacing` must be one of {names} (got {spacing!r})")
        if index[0] > n - 1 or not (index[1:] < index[:-1]).all():
            raise ValueError(f"`spacing`={spacing!r} with offset {offset} does not give {steps} distinct entries of {n}: "
                             "use fewer steps or 'linspace'")  # fmt: skip
        return index


def karras(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """EDM's grid in sigma / alpha, uniform in its rho-th root: log-SNRs, float64 (steps + 1,), from noise to +inf.

    Arguments:
        steps: Number of steps, at least 1.
        sigma_min: Smallest noise, in units of the data.
        sigma_max: Largest.
        rho: 7 spends more steps near the data; 1 is uniform in sigma.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), eq. 5
        | https://arxiv.org/abs/2206.00364
    """
    _check_steps(steps)
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"`sigma_min` must lie in (0, sigma_max) (got {sigma_min}, {sigma_max})")
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    return _end_at_data(-2.0 * rho * torch.log(high + ramp * (low - high)))


def churned(grid: Tensor, s_churn: float, s_min: float = 0.0, s_max: float = math.inf) -> Tensor:
    """Inserts EDM's upward moves into a grid, for `Churn`: before each step with sigma / alpha in [s_min, s_max], the noise
    grows by the factor 1 + min(s_churn / steps, sqrt(2) - 1).

    Arguments:
        grid: Log-SNRs from noise to data.
        s_churn: Total stochasticity; 0 leaves the grid alone.
        s_min: Smallest sigma / alpha that is churned.
        s_max: Largest.
    """
    if s_churn < 0:
        raise ValueError(f"`s_churn` must not be negative (got {s_churn})")
    raised = 2.0 * math.log1p(min(s_churn / (len(grid) - 1), math.sqrt(2.0) - 1.0))
    out: list[float] = []
    for lam in grid[:-1].tolist():
        sigma = math.exp(-0.5 * lam)
        out += [lam, lam - raised] if raised > 0 and s_min <= sigma <= s_max else [lam]
    return torch.tensor([*out, float(grid[-1])], dtype=torch.float64)


def corrected(grid: Tensor, times: int = 1) -> Tensor:
    """Repeats each finite level `times` times more, for `Langevin`: a step between equal levels is a corrector step."""
    finite = grid.isfinite()
    return torch.repeat_interleave(grid.double(), torch.where(finite, times + 1, 1))


def check_grid(grid: Any, revisits: bool = False, falling: bool = False) -> list[float]:
    """The levels of a grid as Python floats.

    Arguments:
        grid: Log-SNRs, from noise to data.
        revisits: Allow levels to repeat or to fall, for transitions that make use of it.
        falling: Allow a grid that falls throughout, from data to noise.

    Raises:
        ValueError: If it is no vector of at least two levels, holds NaN, or does not rise strictly.
    """
    vector = torch.as_tensor(grid, dtype=torch.float64).detach()
    lams = vector.tolist() if vector.ndim == 1 else []
    if len(lams) < 2 or any(math.isnan(lam) for lam in lams):
        raise ValueError(
            f"`grid` must be a vector of at least 2 log-SNRs without NaN (got {_brief(vector)}): see Schedule.grid"
        )
    rises = all(a < b for a, b in pairwise(lams))
    falls = falling and all(a > b for a, b in pairwise(lams))
    if not (rises or falls or revisits):
        raise ValueError(f"`grid` must rise strictly, from noise to data (got {_brief(vector)}): sort it, drop duplicates")
    return lams


def _brief(grid: Tensor) -> str:
    if grid.ndim != 1:
        return f"shape {tuple(grid.shape)}"
    values = ", ".join(f"{lam:.4g}" for lam in grid[:6].tolist())
    return f"[{values}{', ...' if len(grid) > 6 else ''}]"


def _end_at_data(lam: Tensor) -> Tensor:
    if lam.isnan().any() or (lam[0] == math.inf):
        raise ValueError("`grid` needs a curve with a noisy end: this schedule has none (use karras, or Table)")
    return torch.cat([lam, lam.new_tensor([math.inf])])


def _check_steps(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"`steps` must be a positive integer (got {steps!r})")


def _check_ends(lam_max: float, lam_min: float) -> None:
    if not (math.isfinite(lam_max) and math.isfinite(lam_min) and lam_max > lam_min):
        raise ValueError(f"`lam_max` must exceed `lam_min`, both finite (got {lam_max}, {lam_min})")
