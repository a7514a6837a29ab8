r"""Exact likelihood of a denoiser by its probability-flow ODE, which carries densities along."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..encoding.encoded import Encoded, angular_slope, check_flow
from ..gaussian import Gaussian, spread_over
from ..noise import Draws
from ..process import Level
from ..schedule import check_grid
from ..solvers.adaptive import RK45, angle

__all__ = ["log_likelihood"]

Slope = Callable[[Tensor, float], tuple[Tensor, Tensor]]
"""(state y, angle) -> (dy/dphi, its divergence (B,))."""


def log_likelihood(
    denoiser: Denoiser,
    x0: Tensor,
    grid: Tensor,
    *,
    draws: Draws,
    probes: int | None = None,
    solver: RK45 | None = None,
) -> Tensor:
    r"""log p(x0) in nats, (B,): the density at the end of the probability-flow ODE, changed by its divergence on the way.

    With y = x / sqrt(alpha^2 + sigma^2) and the angle phi = atan(sigma / alpha), dy/dphi = cos(phi) eps - sin(phi) x0 =: f, and

    .. math:: \log p(y_{\phi_0}) = \log p(y_{\phi_1}) + \int_{\phi_0}^{\phi_1} \mathrm{tr}\, \partial f / \partial y \; d\phi.

    The path starts at the cleanest finite level of the grid from alpha x0: the density is that of data with the little noise of
    that level, which is what a network knows. It is a density: for integers add uniform noise first (`decoders.Dequantised`),
    and log(cell) per dimension after. The states are float64 where the device has it.

    Of a model with an encoder it is the density of the encoded data of that level, which `EncodedFlow` draws; the slope then
    has their own motion besides, see `encoded.angular_slope`.

    Arguments:
        denoiser: Conditions bound; differentiable with respect to x. Its own errors make this the likelihood of its ODE.
        x0: Data (B, *).
        grid: Log-SNRs from noise to data; +inf at the end is left out. A step of the classical Runge-Kutta method each.
        draws: Randomness of the probes, keyed by the example.
        probes: None takes the trace exactly, with as many backward passes as an example has numbers; else the number of
            random sign vectors v in Hutchinson's estimate mean(v^T J v), the same along the path: unbiased.
        solver: Chooses the steps between the ends of the grid by each example's own error, instead of the grid.

    Raises:
        ValueError: For a grid without two finite levels, numbers of probes below 1, or a denoiser that was trained with an
            encoder and knows no score: its process is `Encoded`, with no `EncodedFlow`.

    References:
        | Score-Based Generative Modeling through SDEs (Song et al., 2021), section 4.3 and appendix D.2
        | https://arxiv.org/abs/2011.13456

    Example:
        >>> from quieten import VP, GaussianData, Linear
        >>> data = GaussianData(torch.zeros(2), torch.tensor([0.1, 0.5]), VP)
        >>> x0 = torch.zeros(1, 2, dtype=torch.float64)
        >>> found = log_likelihood(data, x0, Linear(12.0, -10.0).grid(40), draws=Draws(0, 0, [0]))
        >>> bool((found - data.log_prob(x0)).abs() < 1e-3)
        True
    """
    if isinstance(denoiser.process, Encoded):
        check_flow(denoiser.process, "the ODE's likelihood")
    if probes is not None and probes < 1:
        raise ValueError(f"`probes` must be at least 1, or None for the exact trace (got {probes})")
    if len(draws) != len(x0):
        raise ValueError(f"`draws` is for {len(draws)} examples, `x0` has {len(x0)}: give one position per example")
    lams = [lam for lam in check_grid(grid) if lam < math.inf][::-1]
    if len(lams) < 2:
        raise ValueError(f"`grid` must have at least two finite levels (got {len(lams)}): the path goes from one to the other")
    x = x0 if x0.device.type == "mps" else x0.double()
    dims = math.prod(x.shape[1:])
    trace = _Trace(denoiser, _directions(x, draws, probes), probes is None)
    (alpha, sigma), end = denoiser.process.scales(lams[0]), denoiser.process.scales(lams[-1])
    y, gained = x * (alpha / math.hypot(alpha, sigma)), x.new_zeros(len(x))
    if solver is None:
        angles = [angle(lam) for lam in lams]
        for phi, after in pairwise(angles):
            y, gained = _runge_kutta(trace, y, gained, phi, after - phi)
    else:
        y, gained = _adaptive(trace, y, lams[0], lams[-1], solver)
    noise = math.hypot(*end)
    prior = Gaussian(torch.zeros_like(y), denoiser.process.prior(lams[-1]).var)
    # densities of y to those of x0, which the path left as alpha x0, and those of the last state
    scales = dims * (math.log(alpha / math.hypot(alpha, sigma)) + math.log(noise))
    return prior.log_prob(y * noise) + gained + scales


class _Trace:
    """The slope of the ODE in y against the angle, and its divergence.

    Arguments:
        denoiser: Conditions bound.
        v: Directions (P, B, *).
        exact: Whether they are a whole basis, to be summed over; else probes, to be averaged.
    """

    def __init__(self, denoiser: Denoiser, v: Tensor, exact: bool):
        self.denoiser, self.v, self.exact = denoiser, v, exact

    def __call__(self, y: Tensor, phi: Level) -> tuple[Tensor, Tensor]:
        lam = _level(phi)
        alpha, sigma = self.denoiser.process.scales(lam)
        with torch.enable_grad():
            z = y.detach().requires_grad_()
            x = z * spread_over((alpha * alpha + sigma * sigma) ** 0.5, z)
            encoded = isinstance(self.denoiser.process, Encoded)
            f = angular_slope(self.denoiser, x, lam) if encoded else self.denoiser.predict(x, lam, _angular)
            total = y.new_zeros(len(y))
            for i, v in enumerate(self.v):
                (u,) = torch.autograd.grad(f, z, v, retain_graph=i + 1 < len(self.v))
                total = total + (u * v).flatten(1).sum(1)
        return f.detach(), total if self.exact else total / len(self.v)


def _angular(alpha: Any, sigma: Any) -> tuple[Any, Any]:
    """dy/dphi as a form, cos(phi) eps - sin(phi) x0: it has all its digits at both ends, and so has its derivative."""
    norm = (alpha * alpha + sigma * sigma) ** 0.5
    return alpha / norm, -sigma / norm


def _level(phi: Level) -> Any:
    if isinstance(phi, float):
        return -math.inf if phi >= 0.5 * math.pi else -2.0 * math.log(math.tan(phi))
    return torch.where(phi >= 0.5 * math.pi, -math.inf, -2.0 * torch.log(torch.tan(phi)))


def _directions(x: Tensor, draws: Draws, probes: int | None) -> Tensor:
    """Sign vectors (probes, B, *), or the unit vectors (D, 1, *) for the exact trace."""
    if probes is None:
        dims = math.prod(x.shape[1:])
        return torch.eye(dims, dtype=x.dtype, device=x.device).reshape(dims, 1, *x.shape[1:]).expand(dims, *x.shape)
    return torch.stack([torch.where(draws.normal(x, f"probe {i}") < 0, -1.0, 1.0).to(x) for i in range(probes)])


def _runge_kutta(slope: Slope, y: Tensor, gained: Tensor, phi: float, h: float) -> tuple[Tensor, Tensor]:
    """A step of the classical method for y and the integral of the divergence."""
    f1, d1 = slope(y, phi)
    f2, d2 = slope(y + 0.5 * h * f1, phi + 0.5 * h)
    f3, d3 = slope(y + 0.5 * h * f2, phi + 0.5 * h)
    f4, d4 = slope(y + h * f3, phi + h)
    return y + h / 6.0 * (f1 + 2.0 * (f2 + f3) + f4), gained + h / 6.0 * (d1 + 2.0 * (d2 + d3) + d4)


def _adaptive(trace: _Trace, y: Tensor, lam: float, lam_end: float, solver: RK45) -> tuple[Tensor, Tensor]:
    """The same by an adaptive solver, to which the integral is one more number of each example."""
    process = trace.denoiser.process
    joint = _Joint(trace, y.shape)
    state = torch.cat([y.flatten(1), y.new_zeros(len(y), 1)], 1) * math.hypot(*process.scales(lam))
    end = solver(joint, state, lam, lam_end).p.mean / math.hypot(*process.scales(lam_end))
    return end[:, :-1].reshape(y.shape), end[:, -1]


class _Joint(Denoiser):
    """State and integral as one vector (B, D + 1), whose slope against the angle is all that an adaptive solver asks for."""

    def __init__(self, trace: _Trace, shape: torch.Size):
        super().__init__()
        process = trace.denoiser.process
        self.trace, self.inner_shape = trace, shape[1:]
        self.process = process.base if isinstance(process, Encoded) else process  # whose scales are all that is asked for

    def forward(self, x: Tensor, lam: Level, **cond: Any) -> Gaussian:
        raise NotImplementedError("the joint state has a slope, no estimate of data")

    def predict(self, x: Tensor, lam: Any, form: Any = "x0", **cond: Any) -> Tensor:
        alpha, sigma = self.process.scales(lam)
        y = x[:, :-1] / spread_over((alpha * alpha + sigma * sigma) ** 0.5, x)
        phi = torch.where(lam == -math.inf, 0.5 * math.pi, torch.atan(torch.exp(-0.5 * lam)))
        f, divergence = self.trace(y.reshape(len(x), *self.inner_shape), phi)
        return torch.cat([f.flatten(1), divergence[:, None]], 1)
