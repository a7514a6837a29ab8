r"""Pseudo linear multistep methods as they were released: constant coefficients, and starts of their own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..gaussian import Gaussian
from ..process import Process
from ..schedule import Schedule
from ..solver import adams_bashforth_weights
from ..transition import Step, Transition

__all__ = ["PLMS", "PNDM"]

History = tuple[tuple[float, Tensor], ...]


class PLMS(Transition):
    r"""PLMS as released with split-diffusion, which joint guidance is compared with.

    Adams-Bashforth with the coefficients of equal steps on the noise estimates. The first step is Heun's (one evaluation
    more, of which the history keeps only the first), the step to the data is DDIM's. `AdamsBashforth` is the same idea with
    the weights of the actual grid, and without these exceptions.

    Arguments:
        order: 1 to 4.

    References:
        | Pseudo Numerical Methods for Diffusion Models on Manifolds (Liu et al., 2022), eq. 12
        | https://arxiv.org/abs/2202.09778
        | Accelerating Guided Diffusion Sampling with Splitting Numerical Methods (Wizadwongsa, Suwajanakorn, 2023)
        | https://arxiv.org/abs/2301.11558
    """

    def __init__(self, order: int = 4):
        super().__init__()
        if order not in (1, 2, 3, 4):
            raise ValueError(f"`order` must be 1, 2, 3 or 4 (got {order!r})")
        self.order = order

    def forward(self, denoiser: Denoiser, x_t: Tensor, lam_t: Any, lam_s: Any, memory: Any = None) -> Step:
        denoiser.process.check_mean()
        x0, process = denoiser(x_t, lam_t), denoiser.process
        if lam_t == -math.inf:
            return Step(process.bridge(x0.mean, x_t, lam_t, lam_s, eta=0.0), x0)
        alpha, sigma = process.scales(lam_t)
        eps = torch.sub(x_t, x0.mean, alpha=alpha).div_(sigma)
        history: History = ((math.exp(-0.5 * lam_t), eps), *(memory or ()))[: self.order]
        if lam_s == math.inf:
            mixed = eps
        elif len(history) < self._depth():
            mixed = self.start(denoiser, x_t, lam_t, lam_s, eps)
        else:
            mixed = _mixed(history)
        mean = _transfer(process, x_t, mixed, lam_t, lam_s)
        return Step(Gaussian(mean), x0, history[: self.order - 1] or None)

    def start(self, denoiser: Denoiser, x_t: Tensor, lam_t: float, lam_s: float, eps: Tensor) -> Tensor:
        """The noise estimate to step with while the history is short: Heun's mean of both ends."""
        end = _transfer(denoiser.process, x_t, eps, lam_t, lam_s)
        return (eps + denoiser.predict(end, lam_s, "eps")).mul_(0.5)

    def _depth(self) -> int:
        """Length of the history, the present included, from which on it is used."""
        return min(self.order, 2)

    def extra_repr(self) -> str:
        return f"order={self.order}"


class PNDM(PLMS):
    r"""PNDM: three pseudo Runge-Kutta steps of four evaluations, then PLMS of order 4.

    Runge-Kutta's formula with DDIM's step for the addition, its half node at the middle time step. As in `PLMS`, the step to
    the data is DDIM's.

    Arguments:
        schedule: Whose u (or index, for a `Table`) defines the middle of a step; None is the middle in log-SNR.

    References:
        | Pseudo Numerical Methods for Diffusion Models on Manifolds (Liu et al., 2022), eq. 13 and algorithm 2
        | https://arxiv.org/abs/2202.09778
    """

    def __init__(self, schedule: Schedule | None = None):
        super().__init__(4)
        self.schedule = schedule

    def start(self, denoiser: Denoiser, x_t: Tensor, lam_t: float, lam_s: float, eps: Tensor) -> Tensor:
        """The noise estimate to step with while the history is short: that of pseudo Runge-Kutta."""
        process, lam_m = denoiser.process, self._middle(lam_t, lam_s)
        second = denoiser.predict(_transfer(process, x_t, eps, lam_t, lam_m), lam_m, "eps")
        third = denoiser.predict(_transfer(process, x_t, second, lam_t, lam_m), lam_m, "eps")
        fourth = denoiser.predict(_transfer(process, x_t, third, lam_t, lam_s), lam_s, "eps")
        return (eps + 2.0 * second + 2.0 * third + fourth).div_(6.0)

    def _middle(self, lam_t: float, lam_s: float) -> float:
        if self.schedule is None:
            return 0.5 * (lam_t + lam_s)
        ends = self.schedule.inverse(torch.tensor([lam_t, lam_s], dtype=torch.float64))
        return float(self.schedule.forward(ends.mean()))  # the curve may go on beyond its ends

    def _depth(self) -> int:
        return 4


def _mixed(history: History) -> Tensor:
    """The Adams-Bashforth mean of noise estimates, newest first, for equal steps."""
    weights = adams_bashforth_weights([float(len(history) - j) for j in range(len(history))], len(history) + 1.0, constant=True)
    out = history[0][1] * weights[0]
    for weight, (_, eps) in zip(weights[1:], history[1:], strict=True):
        out.add_(eps, alpha=weight)
    return out


def _transfer(process: Process, x_t: Tensor, eps: Tensor, lam_t: float, lam_s: float) -> Tensor:
    """DDIM's step with a given noise: alpha_s (x_t / alpha_t + h eps)."""
    (alpha_t, _), (alpha_s, _) = process.scales(lam_t), process.scales(lam_s)
    h = math.exp(-0.5 * lam_t) * math.expm1(-0.5 * (lam_s - lam_t))
    return torch.mul(x_t, alpha_s / alpha_t).add_(eps, alpha=alpha_s * h)
