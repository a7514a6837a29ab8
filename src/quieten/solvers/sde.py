r"""The reverse diffusion as it is written down, in Euler steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..gaussian import Gaussian, scalar
from ..schedule import Schedule
from ..transition import Step, Transition

__all__ = ["EulerMaruyama"]


class EulerMaruyama(Transition):
    r"""An Euler-Maruyama step of the reverse-time SDE, :math:`dx = (f x - g^2 s)\,dt + g\,dw`, in any time.

    With :math:`c = g^2 \Delta t / \sigma_t^2` it is
    :math:`x_s \sim N(x_t + c\,((d - 1)\, x_t + \alpha_t E[x_0 | x_t]),\; c\,\sigma_t^2)`, d = d log(alpha) / d lam. Unlike the
    kernel of `Ancestral` it is exact in the limit of many steps only, with an error like the step. In the time
    (sigma / alpha)^2 and VE it is the reverse-diffusion predictor, x + (sigma_t^2 - sigma_s^2) s with that variance: an
    ancestral step that keeps the whole noise. A step to lower log-SNR adds noise by the forward process.

    Arguments:
        time: The time t in which the steps are Euler's, as the curve t -> lam: `LinearBeta(start=0)` is the VP SDE's. None
            is (sigma / alpha)^2.

    References:
        | Score-Based Generative Modeling through SDEs (Song et al., 2021), eq. 6, and appendix E for reverse diffusion
        | https://arxiv.org/abs/2011.13456
    """

    eta = 1.0

    def __init__(self, time: Schedule | None = None):
        super().__init__()
        self.time = time

    def forward(self, denoiser: Denoiser, x_t: Tensor, lam_t: Any, lam_s: Any, memory: Any = None) -> Step:
        process = denoiser.process
        process.check_mean()
        if lam_s <= lam_t:
            return Step(Gaussian(x_t) if lam_s == lam_t else process.noising(x_t, lam_t, lam_s))
        if lam_t == -math.inf:
            raise ValueError("`lam_t` is -inf, where the SDE has no slope: start from a finite level, or use `Ancestral`")
        x0, c = denoiser(x_t, lam_t), self._share(lam_t, lam_s)
        if c == math.inf:  # a time in which the data are infinitely far: what is left to do is to denoise
            return Step(Gaussian(x0.mean), x0)
        alpha, sigma = process.scales(lam_t)
        mean = torch.mul(x_t, 1.0 + c * (process.drift(lam_t) - 1.0)).add_(x0.mean, alpha=c * alpha)
        return Step(Gaussian(mean, scalar(c * sigma * sigma)), x0)

    def _share(self, lam_t: float, lam_s: float) -> float:
        """c, the noise that the step removes in units of what is there."""
        if self.time is None:
            return -math.expm1(lam_t - lam_s)
        tau_t, tau_s = (self.time.inverse(torch.tensor(lam, dtype=torch.float64)) for lam in (lam_t, lam_s))
        _, rate = self.time.rate(tau_t)
        return float(rate * (tau_t - tau_s))

    def extra_repr(self) -> str:
        return f"time={self.time}"
