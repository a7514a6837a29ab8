r"""Wrappers: denoisers made of denoisers, so that they work with every sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .denoiser import Denoiser, Form
from .gaussian import Gaussian, spread_over
from .process import Level

__all__ = ["Clipped", "Counted", "Extrapolated", "WithCovariance", "clip", "dynamic", "paired"]

Clip = float | Callable[[Tensor], Tensor]
"""How to bound an estimate of x0: clamp to [-c, c], or any map (B, *) -> (B, *) such as `dynamic()`."""


def dynamic(quantile: float = 0.995, cap: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Dynamic thresholding, per example: s is the quantile of |x0|, held in [1, cap]; x0 becomes clamp(x0, -s, s) / s.

    Arguments:
        quantile: In (0, 1].
        cap: Largest threshold; 1 clamps to [-1, 1], as diffusers' `sample_max_value` = 1.

    References:
        | Photorealistic Text-to-Image Diffusion Models (Saharia et al., 2022), section 2.3
        | https://arxiv.org/abs/2205.11487
    """
    if not 0 < quantile <= 1 or cap < 1:
        raise ValueError(f"`quantile` must lie in (0, 1] and `cap` be at least 1 (got {quantile}, {cap})")

    def threshold(x0: Tensor) -> Tensor:
        s = spread_over(torch.quantile(x0.flatten(1).abs(), quantile, dim=1).clamp(1.0, cap), x0)
        return torch.minimum(torch.maximum(x0, -s), s) / s

    return threshold


def clip(x0: Tensor, how: Clip) -> Tensor:
    """Bounds an estimate of x0 (B, *)."""
    return how(x0) if callable(how) else x0.clamp(-how, how)


class Clipped(Denoiser):
    """A denoiser whose estimate of x0 is clipped; samplers then read the noise from the clipped estimate too.

    Arguments:
        inner: The denoiser.
        how: A bound, or a map such as `dynamic()`.
    """

    def __init__(self, inner: Denoiser, how: Clip = 1.0):
        super().__init__()
        self.inner, self.how, self.process, self.shape = inner, how, inner.process, inner.shape

    def forward(self, x: Tensor, lam: Level, **cond: Any) -> Gaussian:
        p = self.inner(x, lam, **cond)
        return Gaussian(clip(p.mean, self.how), p.var, p.basis)


class WithCovariance(Denoiser):
    """A denoiser with a variance from elsewhere.

    It belongs next to the network: guidance goes around it.

    Arguments:
        inner: The denoiser; its mean is kept.
        source: (inner, x_t, lam, inner's Gaussian) -> variance of x0 given x_t, as in `quieten.covariance`. If it has a
            `basis`, the variance is diagonal there; if it has a method `gaussian`, that gives mean and variance in one pass.
    """

    def __init__(self, inner: Denoiser, source: Callable[[Denoiser, Tensor, Level, Gaussian], Tensor]):
        super().__init__()
        self.inner, self.source, self.process, self.shape = inner, source, inner.process, inner.shape

    def forward(self, x: Tensor, lam: Level, **cond: Any) -> Gaussian:
        bound, source = self.inner.bind(**cond), self.source
        if hasattr(source, "gaussian"):
            joint: Gaussian = source.gaussian(bound, x, lam)
            return joint
        p = bound(x, lam)
        return Gaussian(p.mean, source(bound, x, lam, p), getattr(source, "basis", None))

    def predict(self, x: Tensor, lam: Level, form: Form = "x0", **cond: Any) -> Tensor:
        return self.inner.predict(x, lam, form, **cond)


class Extrapolated(Denoiser):
    r"""Guidance by extrapolation, D_weak + scale (D - D_weak): without a classifier, or by a weaker model.

    With `null`, the weak prediction is the same network under other conditions (classifier-free guidance), and both come from
    one batched pass. With `weak`, it is another denoiser under the same conditions (autoguidance). The variance is that of
    the conditional prediction, or of the extrapolated field.

    Arguments:
        inner: The denoiser to strengthen.
        scale: Weight, 1 for none; a float, or a function of lam (float) for guidance in an interval of levels.
        null: The conditions that replace the given ones, by name; a scalar fills the given condition's shape.
        weak: The weaker denoiser.
        spread: "conditional", or "guided" for var_weak + scale (var - var_weak), held above 0: what the Jacobian of the
            extrapolated field says.

    Raises:
        ValueError: Unless exactly one of `null` and `weak` is given, or for an unknown `spread`.

    References:
        | Classifier-Free Diffusion Guidance (Ho, Salimans, 2022), eq. 6, with scale = 1 + w
        | https://arxiv.org/abs/2207.12598
        | Guiding a Diffusion Model with a Bad Version of Itself (Karras et al., 2024), eq. 2
        | https://arxiv.org/abs/2406.02507
    """

    def __init__(
        self,
        inner: Denoiser,
        scale: float | Callable[[float], float],
        *,
        null: Mapping[str, Any] | None = None,
        weak: Denoiser | None = None,
        spread: str = "conditional",
    ):
        super().__init__()
        if (null is None) == (weak is None):
            raise ValueError("give `null` (classifier-free guidance) or `weak` (autoguidance), one of them")
        if spread not in ("conditional", "guided"):
            raise ValueError(f"`spread` must be 'conditional' or 'guided' (got {spread!r})")
        self.inner, self.scale, self.weak, self.process, self.shape = (
            inner,
            scale,
            weak,
            inner.process,
            inner.shape,
        )
        self.null, self.spread = dict(null or {}), spread

    def forward(self, x: Tensor, lam: Level, **cond: Any) -> Gaussian:
        scale = self.scale(lam) if callable(self.scale) else self.scale  # type: ignore[arg-type]
        if scale == 1.0:
            return self.inner(x, lam, **cond)
        if self.weak is not None:
            p, weak = self.inner(x, lam, **cond), self.weak(x, lam, **cond)
        else:
            p, weak = _halves(self.inner, x, lam, cond, self.null)
        var = p.var
        if self.spread == "guided" and var is not weak.var:
            if p.basis is not weak.basis:
                raise ValueError("`spread`='guided' needs the variances of both denoisers in one basis: use 'conditional'")
            var = (weak.var + scale * (var - weak.var)).clamp_min(0.0)
        return Gaussian(torch.lerp(weak.mean, p.mean, scale), var, p.basis)


def paired(
    denoiser: Denoiser, x: Tensor, lam: Level, cond: Mapping[str, Any], null: Mapping[str, Any]
) -> tuple[Gaussian, Tensor]:
    """The Gaussian under `cond` and the mean with `null` in the place of some conditions, from one pass over twice the batch.

    Raises:
        ValueError: If `null` replaces a condition that is not there.
    """
    strong, weak = _halves(denoiser, x, lam, cond, null)
    return strong, weak.mean


def _halves(
    denoiser: Denoiser, x: Tensor, lam: Level, cond: Mapping[str, Any], null: Mapping[str, Any]
) -> tuple[Gaussian, Gaussian]:
    """The Gaussians under `cond` and with `null`, from one pass."""
    n = len(x)
    missing = [name for name in null if name not in cond]
    if missing:
        raise ValueError(f"guidance needs the condition `{missing[0]}`: bind it, as in denoiser.bind({missing[0]}=...)")

    def nothing(name: str, value: Tensor) -> Tensor:
        return torch.as_tensor(null[name], dtype=value.dtype, device=value.device).expand_as(value) if name in null else value

    both = {name: torch.cat([value, nothing(name, value)]) for name, value in cond.items()}
    doubled = torch.cat([lam.expand(n)] * 2) if isinstance(lam, Tensor) else lam
    p = denoiser(torch.cat([x, x]), doubled, **both)
    shared = not p.var.ndim or len(p.var) == 1  # one variance for all rows
    return (
        Gaussian(p.mean[:n], p.var if shared else p.var[:n], p.basis),
        Gaussian(p.mean[n:], p.var if shared else p.var[n:], p.basis),
    )


class Counted(Denoiser):
    """Counts what a sampler asks for.

    Attributes:
        calls: Network evaluations per sample (NFE).
        rows: Rows evaluated in all.
    """

    def __init__(self, inner: Denoiser):
        super().__init__()
        self.inner, self.process, self.shape = inner, inner.process, inner.shape
        self.calls = self.rows = 0

    def forward(self, x: Tensor, lam: Level, **cond: Any) -> Gaussian:
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        return self.inner(x, lam, **cond)
