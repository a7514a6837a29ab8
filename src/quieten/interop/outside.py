"""Guidance where someone else calls the network: inside diffusers pipelines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..gaussian import Gaussian
from ..guidance import Guidance
from ..process import VP, Level
from ..schedule import Table

__all__ = ["Answered", "KickFn", "NoNetwork", "Outside", "at_time", "wide"]

KickFn = Callable[[Tensor, Tensor], Tensor]
"""(x_t (B, *), training time steps (B,)) -> w grad log p(y | x_t), of the shape of x_t: a `cond_fn`."""


class NoNetwork(Denoiser):
    """Stands where a denoiser is asked for that is not at hand."""

    process = VP

    def forward(self, x: Tensor, lam: Level, **cond: Any) -> Gaussian:
        raise ValueError("guidance that asks the denoiser cannot run inside a pipeline: give one of x_t alone, or use `Split`")


class Answered(Denoiser):
    """The denoiser whose answer has already come."""

    process = VP

    def __init__(self, x0: Tensor):
        super().__init__()
        self.x0 = x0

    def forward(self, x: Tensor, lam: Level, **cond: Any) -> Gaussian:
        return Gaussian(self.x0)


class Outside(Guidance):
    """A guidance without its denoiser: schemes that want both at once get the gradient alone."""

    def __init__(self, inner: Guidance):
        super().__init__()
        self.inner = inner

    def slope(self, denoiser: Denoiser, x: Tensor, lam: Level) -> tuple[Gaussian | None, Tensor]:
        return None, self.inner.gradient(denoiser, x, lam)

    def gradient(self, denoiser: Denoiser, x: Tensor, lam: Level) -> Tensor:
        return self.inner.gradient(denoiser, x, lam)

    def both(self, denoiser: Denoiser, x: Tensor, lam: Level) -> tuple[Gaussian, Tensor]:
        return Gaussian(x), self.inner.gradient(denoiser, x, lam)


def wide(x: Tensor) -> Tensor:
    """A state in float32 or better."""
    return x if x.dtype == torch.float64 else x.float()


def at_time(fn: KickFn, levels: Table) -> Callable[[Tensor, Any], Tensor]:
    """A function of training time steps as one of log-SNRs."""

    def gradient(x: Tensor, lam: Any) -> Tensor:
        return fn(x, torch.full((len(x),), levels.index(float(lam)), dtype=x.dtype, device=x.device))

    return gradient
