r"""Linear measurements y = H x0 + noise: inpainting, colourisation, super-resolution, and the ways to obey them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..gaussian import POINT, Gaussian, spread_over
from ..guidance import Guidance, Scale, detached, differentiable, per_noise
from ..process import Level, Process

__all__ = ["Consistent", "Downsample", "Grey", "LinearMap", "Mask", "Measured", "Operator", "replacement"]

Source = Callable[[Denoiser, Tensor, Level, Gaussian], Tensor]
"""Where a variance of x0 comes from, as in `quieten.covariance`."""

# ---- operators


class Operator(nn.Module, ABC):
    """A linear map H from clean data (B, *) to measurements (B, *m)."""

    @abstractmethod
    def forward(self, x0: Tensor) -> Tensor:
        """H x0."""

    @abstractmethod
    def adjoint(self, y: Tensor, like: Tensor) -> Tensor:
        """H^T y, of the shape of the data `like` (B, *)."""

    def squares(self, v: Tensor) -> Tensor | None:
        """The diagonal of H diag(v) H^T for variances v (B, *), if that matrix is diagonal; None if it is not.

        It is wherever each part of the data enters one measurement at most.
        """
        return None

    def pinv(self, y: Tensor, like: Tensor) -> Tensor:
        """H^+ y: the smallest data that measure y."""
        gram = self.squares(torch.ones_like(like))
        z = _conjugate(lambda u: self(self.adjoint(u, like)), y) if gram is None else _quotient(y, gram)
        return self.adjoint(z, like)

    def project(self, x0: Tensor, y: Tensor) -> Tensor:
        """The nearest data to x0 that measure y exactly."""
        return x0 + self.pinv(y - self(x0), x0)

    def expand(self, y: Tensor, x0: Tensor) -> Tensor:
        """The measurements y, in the dtype and on the device of x0, one for each of its rows.

        Raises:
            ValueError: If y has another shape than H x0.
        """
        want = self(x0[:1]).shape[1:] if len(x0) else self(x0.new_zeros(1, *x0.shape[1:])).shape[1:]
        if y.shape[1:] != want or len(y) not in (1, len(x0)):
            raise ValueError(f"`y` must have shape {(len(x0), *want)} or {(1, *want)} (got {tuple(y.shape)}): measure it with "
                             f"{type(self).__name__}")  # fmt: skip
        return y.to(x0).expand(len(x0), *want)


class Mask(Operator):
    """Inpainting: what the mask marks is measured, the rest is 0 in y.

    Arguments:
        mask: True or 1 where the data are known, shape (B, *) or (1, *); it broadcasts to the data, so (1, 1, H, W) will do.
    """

    def __init__(self, mask: Tensor):
        super().__init__()
        kept = mask != 0
        if mask.is_floating_point() and not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("`mask` must hold 0 and 1 (or False and True) only: compare it with a threshold first")
        self.register_buffer("mask", kept, persistent=False)

    mask: Tensor

    def forward(self, x0: Tensor) -> Tensor:
        return x0 * self.mask.to(x0)

    def adjoint(self, y: Tensor, like: Tensor) -> Tensor:
        return y * self.mask.to(y)

    def squares(self, v: Tensor) -> Tensor | None:
        return v * self.mask.to(v)


class Grey(Operator):
    """Colourisation: a weighted mean of the channels is measured.

    Arguments:
        weights: One for each channel; None is their mean.
    """

    def __init__(self, weights: Sequence[float] | None = None):
        super().__init__()
        if weights is not None and not (len(weights) and all(math.isfinite(w) for w in weights) and any(weights)):
            raise ValueError(f"`weights` must be finite and not all 0 (got {weights})")
        self.weights = None if weights is None else tuple(weights)

    def forward(self, x0: Tensor) -> Tensor:
        return (x0 * self._over(x0)).sum(1, keepdim=True)

    def adjoint(self, y: Tensor, like: Tensor) -> Tensor:
        return y * self._over(like)

    def squares(self, v: Tensor) -> Tensor | None:
        return (v * self._over(v).square()).sum(1, keepdim=True)

    def _over(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        weights = self.weights or (1.0 / channels,) * channels
        if len(weights) != channels:
            raise ValueError(f"`weights` has {len(weights)} entries for {channels} channels: give one each")
        return x.new_tensor(weights).reshape(1, -1, *[1] * (x.ndim - 2))


class Downsample(Operator):
    """Super-resolution: means of boxes are measured.

    Arguments:
        factor: Side of a box, at least 1; it divides the sides of the data.
        dims: Trailing dimensions that are averaged: 2 for images, 1 for series and vectors.
    """

    def __init__(self, factor: int, dims: int = 2):
        super().__init__()
        if not isinstance(factor, int) or factor < 1 or dims < 1:
            raise ValueError(f"`factor` and `dims` must be whole numbers from 1 (got {factor}, {dims})")
        self.factor, self.dims = factor, dims

    def forward(self, x0: Tensor) -> Tensor:
        sides = x0.shape[1:][-self.dims :]
        if len(sides) < self.dims or any(side % self.factor for side in sides):
            raise ValueError(f"`factor` {self.factor} does not divide {tuple(x0.shape[1:])}: pad the data, or take a divisor")
        for dim in range(-self.dims, 0):
            x0 = x0.unflatten(dim, (-1, self.factor)).mean(dim)
        return x0

    def adjoint(self, y: Tensor, like: Tensor) -> Tensor:
        return self._spread(y) / self.factor**self.dims

    def squares(self, v: Tensor) -> Tensor | None:
        return self(v) / self.factor**self.dims

    def _spread(self, y: Tensor) -> Tensor:
        for dim in range(-self.dims, 0):
            y = y.repeat_interleave(self.factor, dim)
        return y


class LinearMap(Operator):
    """Any linear map; systems with it are solved by conjugate gradients.

    Arguments:
        fn: (B, *) -> (B, *m), linear, examples apart, differentiable.
        adjoint: (y, like) -> (B, *); None takes it from autograd.

    Example:
        >>> h = LinearMap(lambda x: x @ torch.tensor([[1.0], [2.0]]))
        >>> h.adjoint(torch.ones(1, 1), torch.zeros(1, 2))
        tensor([[1., 2.]])
    """

    def __init__(self, fn: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor, Tensor], Tensor] | None = None):
        super().__init__()
        self.fn, self.transposed = fn, adjoint

    def forward(self, x0: Tensor) -> Tensor:
        return self.fn(x0)

    def adjoint(self, y: Tensor, like: Tensor) -> Tensor:
        if self.transposed is not None:
            return self.transposed(y, like)
        with differentiable(torch.zeros_like(like)) as zero:
            return torch.autograd.grad(self.fn(zero), zero, y)[0]


# ---- guidance


class Measured(Guidance):
    r"""Guidance by a linear measurement y = H x0 + r z, from p(y | x_t) ~ N(H D, H C H^T + r^2).

    D and C are mean and covariance of x0 given x_t. With the true C the gradient :math:`(\alpha / \sigma^2) C H^T
    (H C H^T + r^2)^{-1} (y - H D)` is exact for Gaussian data, and needs no pass back through the network: the Jacobian of D is
    alpha / sigma^2 C. The system is diagonal for `Mask`, `Grey` and `Downsample` with a variance that is diagonal in pixels;
    otherwise conjugate gradients solve it.

    Arguments:
        operator: H.
        y: What was measured, (B, *m) or (1, *m) for all samples.
        std: r, the standard deviation of the measurement's noise, in units of the data; 0 for none.
        scale: As in `Guidance`; 1 is the posterior itself.
        variance: C. "own" takes the denoiser's variance, and that of data of variance 1 where it has none; a number s takes
            that of data of variance s, s sigma^2 / (alpha^2 s + sigma^2), whatever the denoiser says (0: D is taken for
            certain); or a source as in `quieten.covariance`.
        jacobian: "covariance" as above; "backward" goes back through the denoiser, sharing the forward pass (with
            variance=0 this is DPS, otherwise pseudoinverse guidance); "identity" takes H^T (...)^{-1} (y - H D) as it is.
        nonfinite: As in `Guidance`.

    Raises:
        ValueError: If `y` is not finite, `std` is negative, or a choice makes no sense.

    References:
        | Diffusion Posterior Sampling (Chung et al., 2023), for variance=0, jacobian="backward"
        | https://arxiv.org/abs/2209.14687
        | Pseudoinverse-Guided Diffusion Models (Song et al., 2023), for a number and jacobian="backward"
        | https://openreview.net/forum?id=9_gsMA8MRKQ
        | Tweedie Moment Projected Diffusions (Boys et al., 2023), for jacobian="covariance"
        | https://arxiv.org/abs/2310.06721
    """

    def __init__(
        self,
        operator: Operator,
        y: Tensor,
        std: float,
        scale: Scale = 1.0,
        variance: str | float | Source = "own",
        jacobian: str = "covariance",
        nonfinite: str = "raise",
    ):
        super().__init__(scale, nonfinite)
        if not bool(y.isfinite().all()):
            raise ValueError("`y` holds NaN or infinity: put 0 where a mask hides the data")
        if not 0.0 <= std < math.inf:
            raise ValueError(f"`std` must be finite and not negative (got {std})")
        if jacobian not in ("covariance", "backward", "identity"):
            raise ValueError(f"`jacobian` must be 'covariance', 'backward' or 'identity' (got {jacobian!r})")
        if isinstance(variance, str) and variance != "own":
            raise ValueError(f"`variance` must be 'own', a number or a source of variance (got {variance!r})")
        if isinstance(variance, int | float):
            if not 0.0 <= variance < math.inf:
                raise ValueError(f"`variance` must be finite and not negative (got {variance})")
            if variance == 0.0 and (std == 0.0 or jacobian == "covariance"):
                raise ValueError(
                    "`variance` 0 leaves nothing to weigh by: give `std` above 0 and jacobian='backward' or 'identity'"
                )
        self.operator, self.std, self.variance, self.jacobian = operator, float(std), variance, jacobian
        self.register_buffer("y", y.detach().clone(), persistent=False)

    y: Tensor

    def slope(self, denoiser: Denoiser, x: Tensor, lam: Level) -> tuple[Gaussian | None, Tensor]:
        if self.jacobian == "backward":
            with differentiable(x) as leaf:
                live = denoiser(leaf, lam)
                p = detached(live)
                with torch.no_grad():
                    pull = self._pull(denoiser, leaf.detach(), lam, p)[0]
                return p, torch.autograd.grad(live.mean, leaf, pull)[0]
        share = 1.0 if self.jacobian == "identity" else per_noise(denoiser.process, lam)
        p = denoiser(x, lam)
        pull, c = self._pull(denoiser, x, lam, p)
        return p, pull if self.jacobian == "identity" else _covary(c, pull) * spread_over(share, x)

    def shift(self, denoiser: Denoiser, x: Tensor, lam: Level) -> tuple[Gaussian, Tensor]:
        """As in `Guidance`; from the covariance, known in pure noise too."""
        w = self.weight(lam)
        if self.jacobian != "covariance" or (isinstance(w, float) and w == 0.0):
            return super().shift(denoiser, x, lam)
        p = denoiser(x, lam)
        pull, c = self._pull(denoiser, x, lam, p)
        return p, self._weighted(_covary(c, pull), w, x, lam)

    def _pull(self, denoiser: Denoiser, x: Tensor, lam: Level, p: Gaussian) -> tuple[Tensor, Gaussian]:
        """H^T (H C H^T + r^2)^{-1} (y - H D), and C as the variance of a Gaussian."""
        y = self.operator.expand(self.y, x)
        c = self._covariance(denoiser, x, lam, p)
        residual = y - self.operator(p.mean)
        noise = self.std * self.std
        # an isotropic variance is diagonal in every basis
        flat = c.basis is None or c.var.numel() == 1 or (c.var.ndim == x.ndim and c.var[:1].numel() == 1)
        gram = self.operator.squares(c.var.to(x).expand_as(x)) if flat else None
        if gram is not None:
            return self.operator.adjoint(_quotient(residual, gram + noise), x), c
        return self.operator.adjoint(_conjugate(lambda u: self._spread(c, u, x) + noise * u, residual), x), c

    def _spread(self, c: Gaussian, u: Tensor, x: Tensor) -> Tensor:
        """H C H^T u."""
        return self.operator(_covary(c, self.operator.adjoint(u, x)))

    def _covariance(self, denoiser: Denoiser, x: Tensor, lam: Level, p: Gaussian) -> Gaussian:
        if callable(self.variance):
            return Gaussian(p.mean, self.variance(denoiser, x, lam, p), getattr(self.variance, "basis", None))
        if self.variance == "own" and p.var is not POINT:
            return p
        s = 1.0 if self.variance == "own" else float(self.variance)
        alpha, sigma = denoiser.process.scales_over(lam, x)
        return Gaussian(p.mean, x.new_ones(()) * (s * sigma * sigma / (alpha * alpha * s + sigma * sigma)))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, std={self.std}, variance={self.variance}, jacobian={self.jacobian}"


# ---- without gradients


class Consistent(Denoiser):
    """A denoiser whose estimate of x0 measures y exactly: the part that H sees is y's, the rest is its own.

    Arguments:
        inner: The denoiser; its variance is kept.
        operator: H.
        y: What was measured, without noise, (B, *m) or (1, *m).

    References:
        | Zero-Shot Image Restoration Using Denoising Diffusion Null-Space Model (Wang et al., 2023)
        | https://arxiv.org/abs/2212.00490
    """

    def __init__(self, inner: Denoiser, operator: Operator, y: Tensor):
        super().__init__()
        inner.process.check_mean()
        self.inner, self.operator, self.process, self.shape = inner, operator, inner.process, inner.shape
        self.register_buffer("y", y.detach().clone(), persistent=False)

    y: Tensor

    def forward(self, x: Tensor, lam: Level, **cond: Any) -> Gaussian:
        p = self.inner(x, lam, **cond)
        return Gaussian(self.operator.project(p.mean, self.operator.expand(self.y, x)), p.var, p.basis)


def replacement(operator: Operator, y: Tensor, noise: Tensor, process: Process) -> Callable[[Tensor, float], Tensor]:
    """Overwrites what H sees by alpha y + sigma H noise: m (alpha y + sigma z) + (1 - m) x for a mask.

    The map (x_s, lam_s) -> x_s that `split.Projected` applies after each step.

    Arguments:
        operator: H.
        y: What was measured, (B, *m) or (1, *m).
        noise: z, standard normals (B, *) that stay the same all the way; the noise of the initial state makes the path that a
            deterministic sampler would take.
        process: Of the states.
    """

    def impute(x: Tensor, lam: float) -> Tensor:
        alpha, sigma = process.scales(lam)
        return operator.project(x, alpha * operator.expand(y, x) + sigma * operator(noise.to(x)))

    return impute


# ---- linear algebra


def _covary(c: Gaussian, u: Tensor) -> Tensor:
    """C u for the covariance of a Gaussian."""
    var = c.var.to(u)
    return var * u if c.basis is None else c.basis.inverse(var * c.basis.forward(u))


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0: nothing was measured there."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1.0), 0.0)


def _conjugate(matrix: Callable[[Tensor], Tensor], b: Tensor, steps: int = 200) -> Tensor:
    """Solves a positive semi-definite system for each example by conjugate gradients; examples stop by themselves.

    Arguments:
        matrix: The system, (B, *m) -> (B, *m), examples apart.
        b: Right-hand sides (B, *m).
        steps: At most.
    """
    tolerance = 1e-12 if b.dtype == torch.float64 else 1e-6
    x, r = torch.zeros_like(b), b
    d, rr = r, _dot(r, r)
    enough = rr * tolerance**2
    for _ in range(steps):
        going = rr > enough
        if not bool(going.any()):
            break
        ad = matrix(d)
        curve = _dot(d, ad)
        going = going & (curve > 0)
        step = torch.where(going, rr / torch.where(going, curve, 1.0), 0.0)
        x, r = x + spread_over(step, x) * d, r - spread_over(step, x) * ad
        new = _dot(r, r)
        d = r + spread_over(torch.where(going, new / torch.where(going, rr, 1.0), 0.0), x) * d
        rr = torch.where(going, new, 0.0)
    return x


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)
