"""A planar mixture of four, its two classes, and the exact gradient that guides towards one: what splitting is tried on."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from quieten.guidance import Gradient
from quieten.oracle import MixtureData
from quieten.process import VE, VP, Process

__all__ = ["STARTS", "class_guidance", "exact", "geometric", "rough", "toy"]

MEANS = torch.tensor([[0.8, 0.2], [-0.6, 0.7], [-0.3, -0.9], [0.5, -0.6]], dtype=torch.float64)
SD = torch.tensor([0.25, 0.15, 0.2, 0.1], dtype=torch.float64)
WEIGHTS = torch.tensor([0.4, 0.25, 0.2, 0.15], dtype=torch.float64)
CLASS = torch.tensor([0, 1, 0, 1])
STARTS = 3.0 * torch.randn(32, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def toy(process: Process = VE) -> MixtureData:
    return MixtureData(MEANS, SD.square(), WEIGHTS, process)


def class_guidance(process: Process = VE, w: float = 1.0, rows: int = 32) -> Gradient:
    """w grad log p(class | x_t), classes by turns."""
    data = toy(process)
    parts = [MixtureData(MEANS[c == CLASS], SD[c == CLASS].square(), WEIGHTS[c == CLASS], process) for c in (0, 1)]
    y = (torch.arange(rows) % 2)[:, None]

    def slope(x: Tensor, lam: float) -> Tensor:
        return torch.where(y == 0, parts[0].score(x, lam), parts[1].score(x, lam)) - data.score(x, lam)

    return Gradient(slope, w)


def rough(process: Process = VP, w: float = 10.0, size: float = 30.0, rows: int = 32, seed: int = 0) -> Gradient:
    """The same with twelve waves of wave number 30 on top, as the gradients of neural classifiers have them."""
    smooth = class_guidance(process, 1.0, rows)
    generator = torch.Generator().manual_seed(seed)
    angle, phase = 2 * math.pi * torch.rand(2, 12, generator=generator, dtype=torch.float64)
    direction = torch.stack([angle.cos(), angle.sin()], 1)

    def slope(x: Tensor, lam: float) -> Tensor:
        waves = torch.cos(size * x @ direction.T + phase) @ direction
        return smooth.fn(x, lam) + waves * (ROUGHNESS / math.sqrt(12))

    return Gradient(slope, w)


ROUGHNESS = 0.6


def geometric(steps: int, first: float = 3.0, last: float = 0.2) -> Tensor:
    """Levels whose sigma / alpha falls geometrically."""
    return torch.linspace(-2 * math.log(first), -2 * math.log(last), steps + 1, dtype=torch.float64)


@functools.cache
def exact(w: float, first: float = 3.0, last: float = 0.2, rows: int = 32) -> Tensor:
    """x / alpha of the guided ODE at sigma / alpha = `last`, from `STARTS` at `first`: scipy's order 8, tolerance 1e-12."""
    integrate = pytest.importorskip("scipy.integrate", exc_type=ImportError)
    data, guidance = toy(), class_guidance(VE, w, rows)

    def slope(s: float, z):
        x, lam = torch.from_numpy(z).reshape(rows, 2), -2 * math.log(s)
        return (data.predict(x, lam, "eps") - s * guidance.gradient(data, x, lam)).flatten().numpy()

    start = STARTS[:rows].flatten().numpy()
    end = integrate.solve_ivp(slope, (first, last), start, method="DOP853", rtol=1e-12, atol=1e-13)
    return torch.from_numpy(end.y[:, -1]).reshape(rows, 2)
