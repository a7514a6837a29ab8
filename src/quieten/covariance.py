r"""Where the variance of x0 given x_t comes from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .denoiser import Denoiser
from .gaussian import Gaussian, scalar, spread_over
from .process import Level

__all__ = ["Source", "Unit"]

Source = Callable[[Denoiser, Tensor, Level, Gaussian], Tensor]
"""(denoiser, x_t, lam, its Gaussian) -> variance of x0 given x_t, of a shape that broadcasts to x_t."""


class Unit:
    """The posterior variance of data N(0, 1): sigmoid(-lam). In VP it makes the kernel of DDPM with large variance."""

    def __call__(self, denoiser: Denoiser, x: Tensor, lam: Level, p: Gaussian) -> Tensor:
        if isinstance(lam, float):
            return scalar(float(torch.sigmoid(torch.tensor(-lam, dtype=torch.float64))))
        return spread_over(torch.sigmoid(-lam), x)

    def __repr__(self) -> str:
        return "Unit()"
