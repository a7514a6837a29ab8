r"""Decoders: the last term of a variational bound, -log P(data | x_t at the cleanest level).

A decoder is called as decoder(step, x0, x_t, lam_t) -> nats per example (B,), where `step` is the transition's last kernel,
from lam_t to the data. Data are 8-bit values that were scaled to [-1, 1], and the likelihood is that of the values.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..gaussian import Gaussian, scalar
from ..noise import Draws
from ..process import VP, Level, Process
from ..transition import Step

__all__ = [
    "PIXELS",
    "Decoder",
    "Dequantised",
    "Discretised",
    "Flat",
    "Nearby",
    "Pixels",
    "Plain",
    "log_discretised_normal",
    "summed",
]


@dataclass(frozen=True)
class Pixels:
    """How integers became numbers.

    Attributes:
        levels: Values that a number can take, V.
        centred: False is this library's scale, 2 k / (V - 1) - 1, with both ends at +-1; True is VDM's, 2 (k + 1/2) / V - 1,
            the centres of V equal cells of [-1, 1].

    Example:
        >>> Pixels(levels=3).values.tolist()
        [-1.0, 0.0, 1.0]
    """

    levels: int = 256
    centred: bool = False

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise ValueError(f"`levels` must be at least 2 (got {self.levels}): 256 for 8-bit data")

    @property
    def half(self) -> float:
        """Half the distance of neighbours."""
        return 1.0 / (self.levels if self.centred else self.levels - 1)

    @property
    def top(self) -> float:
        """The largest value."""
        return 1.0 - self.half if self.centred else 1.0

    @property
    def values(self) -> Tensor:
        """Every value, rising: float64 (V,)."""
        return (2.0 * torch.arange(self.levels, dtype=torch.float64) * self.half) - self.top

    def index(self, x: Tensor) -> Tensor:
        """The place of the nearest value, int64 of the same shape; not checked, see `check`."""
        return torch.round((x + self.top) / (2.0 * self.half)).clamp(0, self.levels - 1).long()

    def check(self, x0: Tensor) -> None:
        """Raises ValueError unless every number is one of the values, to a hundredth of their distance."""
        k = (x0.double() if x0.device.type != "mps" else x0).add(self.top).div(2.0 * self.half)
        if x0.numel() and not bool(((k - k.round()).abs() <= 0.01).all() & (k >= -0.5).all() & (k < self.levels - 0.5).all()):
            where = "2 (k + 1/2) / V - 1" if self.centred else "2 k / (V - 1) - 1"
            raise ValueError(f"`x0` does not lie on the {self.levels} values {where} (it reaches from {float(x0.min()):.4g} to "
                             f"{float(x0.max()):.4g}): scale integers so, or take Plain() for continuous data")  # fmt: skip

    def __str__(self) -> str:
        return f"{self.levels} values scaled to {'(-1, 1)' if self.centred else '[-1, 1]'}"


PIXELS = Pixels()
"""8-bit images as `data.Dataset.batch` gives them: k / 127.5 - 1."""


class Decoder(ABC):
    """The reconstruction term.

    Attributes:
        uses_step: Whether it looks at the kernel; the network is not asked for one otherwise.
        pixels: The values that data can take; None for continuous data, whose likelihood is a density.
    """

    uses_step: bool = True
    pixels: Pixels | None = None

    def prepare(self, x0: Tensor, draws: Draws) -> Tensor:
        """The data that the whole bound is taken of, after a check: (B, *)."""
        if self.pixels is not None:
            self.pixels.check(x0)
        return x0

    def fitted(self, mse: float) -> Decoder:
        """This decoder with the variance that suits a mean squared error of x0, measured at the cleanest level on training
        data; itself where it has no variance."""
        return self

    @abstractmethod
    def __call__(self, step: Step | None, x0: Tensor, x_t: Tensor, lam_t: Level) -> Tensor:
        """-log P(x0 | x_t) in nats per example: (B,).

        Arguments:
            step: The transition from x_t to the data (lam_s = +inf); None where `uses_step` is False.
            x0: What `prepare` returned (B, *).
            x_t: State at the cleanest level (B, *).
            lam_t: Its log-SNR, a float or ().
        """


class Discretised(Decoder):
    r"""A Gaussian around the kernel's mean, integrated over the cell of each value; the end cells are open.

    Arguments:
        var: Its variance, in the square of the data's unit; None is that of the kernel.
        pixels: The values.
        compat: None computes in logarithms, exact in the far tails. "official" is Gaussian-of-DDPM code as released: the
            tanh approximation of the normal distribution, and probabilities held above 1e-12, which is no bound for outliers.

    Raises:
        ValueError: For a variance that is not positive, or an unknown `compat`.

    References:
        | Denoising Diffusion Probabilistic Models (Ho et al., 2020), eq. 13
        | https://arxiv.org/abs/2006.11239
    """

    pixels: Pixels

    def __init__(self, var: float | None = None, pixels: Pixels = PIXELS, compat: str | None = None):
        _check_var(var)
        if compat not in (None, "official"):
            raise ValueError(f"`compat` must be None or 'official' (got {compat!r})")
        self.var, self.pixels, self.compat = var, pixels, compat

    def __call__(self, step: Step | None, x0: Tensor, x_t: Tensor, lam_t: Level) -> Tensor:
        p = _last_kernel(step, self.var)
        if p.basis is not None:
            raise ValueError("the kernel's variance is diagonal in another basis, where pixels depend on each other: give the "
                             "decoder a number, as in Discretised(var=...)")  # fmt: skip
        return -summed(log_discretised_normal(x0, p.mean, p.var.to(x0), self.pixels, self.compat))

    def fitted(self, mse: float) -> Discretised:
        # the Gaussian inside; rounding to a cell adds (2 half)^2 / 12 to its error
        half = self.pixels.half
        return Discretised(max(mse - half**2 / 3.0, half**2 / 16.0), self.pixels, self.compat)

    def __repr__(self) -> str:
        var = "of the kernel" if self.var is None else f"{self.var:.4g}"
        return f"discretised Gaussian, variance {var}, {self.pixels}{', compat=official' if self.compat else ''}"


class Flat(Decoder):
    r"""P(k | x_t) proportional to N(x_t / alpha_t; v_k, sigma_t^2 / alpha_t^2): every value equally likely beforehand.

    Needs no network, and a cleanest level at which neighbouring values are told apart: log-SNR of 13 or more for 256.
    Only values near x_t are summed over, so that memory does not grow with their number; those left out weigh less than
    1e-16 of those kept.

    Arguments:
        process: Of the states.
        pixels: The values.

    References:
        | Variational Diffusion Models (Kingma et al., 2021), appendix B
        | https://arxiv.org/abs/2107.00630
    """

    uses_step = False
    pixels: Pixels

    def __init__(self, process: Process = VP, pixels: Pixels = PIXELS):
        self.process, self.pixels = process, pixels

    def __call__(self, step: Step | None, x0: Tensor, x_t: Tensor, lam_t: Level) -> Tensor:
        pixels = self.pixels
        if isinstance(lam_t, float) and math.isinf(lam_t):
            raise ValueError(f"`lam_t` = {lam_t:+} has no noise to tell values by: end the grid at a finite level")
        alpha, sigma = self.process.scales(lam_t)
        z, width = x_t / alpha, 2.0 * pixels.half * alpha / sigma  # distance of neighbours in standard deviations
        reach = min(pixels.levels - 1, 1 + math.ceil(9.0 / float(width.detach() if isinstance(width, Tensor) else width)))
        if 2 * reach + 1 >= pixels.levels:
            near = torch.arange(pixels.levels, device=z.device)
        else:
            near = pixels.index(z)[..., None] + torch.arange(-reach, reach + 1, device=z.device)
        logits = self._logits(z[..., None], near, alpha / sigma)
        logits = logits.masked_fill((near < 0) | (near >= pixels.levels), -math.inf)
        return summed(logits.logsumexp(-1) - self._logits(z, pixels.index(x0), alpha / sigma))

    def _logits(self, z: Tensor, index: Tensor, scale: Any) -> Tensor:
        value = index.to(z.dtype) * (2.0 * self.pixels.half) - self.pixels.top
        return -0.5 * ((z - value) * scale).square()

    def __repr__(self) -> str:
        return f"flat over {self.pixels}"


class Nearby(Decoder):
    r"""The density N(x_t / alpha_t, sigma_t^2 / alpha_t^2) of continuous data: what `Flat` is where values have no distance.

    Arguments:
        process: Of the states.
    """

    uses_step = False

    def __init__(self, process: Process = VP):
        self.process = process

    def __call__(self, step: Step | None, x0: Tensor, x_t: Tensor, lam_t: Level) -> Tensor:
        alpha, sigma = self.process.scales(torch.as_tensor(lam_t, dtype=x0.dtype, device=x0.device))
        return -Gaussian(x_t / alpha, (sigma / alpha) ** 2).log_prob(x0)

    def __repr__(self) -> str:
        return "density of the cleanest state"


class Plain(Decoder):
    """The density of the last kernel itself, for continuous data: nats, and no bits per pixel.

    Arguments:
        var: Its variance; None is that of the kernel.
    """

    def __init__(self, var: float | None = None):
        _check_var(var)
        self.var = var

    def __call__(self, step: Step | None, x0: Tensor, x_t: Tensor, lam_t: Level) -> Tensor:
        return -_last_kernel(step, self.var).log_prob(x0)

    def fitted(self, mse: float) -> Plain:
        return Plain(mse)

    def __repr__(self) -> str:
        return f"density of the last kernel, variance {'its own' if self.var is None else f'{self.var:.4g}'}"


class Dequantised(Plain):
    """The density of values to which uniform noise over their cell is added: a bound on the likelihood of the values.

    Arguments:
        var: As in `Plain`.
        pixels: The values.

    References:
        | A Note on the Evaluation of Generative Models (Theis et al., 2016), section 3.1
        | https://arxiv.org/abs/1511.01844
    """

    pixels: Pixels

    def __init__(self, var: float | None = None, pixels: Pixels = PIXELS):
        super().__init__(var)
        self.pixels = pixels

    def prepare(self, x0: Tensor, draws: Draws) -> Tensor:
        self.pixels.check(x0)
        uniform = torch.special.ndtr(draws.normal(x0, "dequantise"))
        return x0 + (2.0 * uniform - 1.0) * self.pixels.half

    def __call__(self, step: Step | None, x0: Tensor, x_t: Tensor, lam_t: Level) -> Tensor:
        return super().__call__(step, x0, x_t, lam_t) - math.log(2.0 * self.pixels.half) * math.prod(x0.shape[1:])

    def fitted(self, mse: float) -> Dequantised:
        return Dequantised(mse, self.pixels)

    def __repr__(self) -> str:
        return f"{super().__repr__()}, uniform dequantisation of {self.pixels}"


def log_discretised_normal(
    x: Tensor, mean: Tensor, var: Tensor | float, pixels: Pixels = PIXELS, compat: str | None = None
) -> Tensor:
    """log of the integral of N(mean, var) over the cell of x, elementwise; over all values of x they sum to one.

    Arguments:
        x: One of the values of `pixels`, any shape.
        mean: Broadcasts to x.
        var: Positive; broadcasts to x.
        pixels: The values.
        compat: As in `Discretised`.
    """
    std = var.sqrt() if isinstance(var, Tensor) else math.sqrt(var)
    right, left = (x - mean + pixels.half) / std, (x - mean - pixels.half) / std
    bottom, top = x < pixels.half - pixels.top, x > pixels.top - pixels.half
    if compat == "official":
        below, above = _tanh_cdf(left), _tanh_cdf(right)
        p = torch.where(bottom, above, torch.where(top, 1.0 - below, above - below))
        return p.clamp_min(1e-12).log()
    # in the lower tail, where the logarithm of the distribution has all its digits
    flip = left + right > 0
    low, high = torch.where(flip, -right, left), torch.where(flip, -left, right)
    low = low.masked_fill(torch.where(flip, top, bottom), -math.inf)
    high = high.masked_fill(torch.where(flip, bottom, top), math.inf)
    log_high = torch.special.log_ndtr(high)
    gap = torch.special.log_ndtr(low) - log_high  # -inf at an open end
    return log_high + torch.log(-torch.expm1(gap))


def _tanh_cdf(z: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))


def _last_kernel(step: Step | None, var: float | None) -> Gaussian:
    """The kernel of the last step, with the decoder's own variance if it has one."""
    p: Any = None if step is None else step.p
    if var is not None and p is not None:
        return Gaussian(p.mean, scalar(var))
    if not isinstance(p, Gaussian) or p.is_point:
        raise ValueError("the last kernel has no variance for the decoder: give it one, as in Discretised(var=1e-4), or take "
                         "Ancestral() on a denoiser that reports a variance")  # fmt: skip
    if p.var.numel() and not bool(p.var.detach().min() > 0):
        raise ValueError("the last kernel has variance 0 or NaN somewhere, and the bound is infinite or no number: give the "
                         "decoder a variance, as in Discretised(var=1e-4), or look at the source of the variance")  # fmt: skip
    return p


def _check_var(var: float | None) -> None:
    if var is not None and not (math.isfinite(var) and var > 0):
        raise ValueError(f"`var` must be positive (got {var}): the square of a fraction of the distance of neighbouring values")


def summed(terms: Tensor) -> Tensor:
    """Sums all but the first axis: (B, *) to (B,)."""
    return terms.flatten(1).sum(1) if terms.ndim > 1 else terms
