r"""The probability-flow ODE to a tolerance: every example with steps of its own."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..gaussian import Gaussian, spread_over
from ..transition import Step, Transition

__all__ = ["DORMAND_PRINCE", "RK45", "Effort", "Tableau"]


class Tableau(NamedTuple):
    """An embedded pair of explicit Runge-Kutta methods, as its table of numbers.

    Attributes:
        nodes: c_i, the first 0.
        matrix: Rows a_ij, without the first, empty one; the last is the weights of the method itself.
        error: Its weights less those of the method of one order below.
        order: Of the method below, from which the steps are chosen.
    """

    nodes: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]
    error: tuple[float, ...]
    order: int


DORMAND_PRINCE = Tableau(
    nodes=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    matrix=(
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    error=(71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    order=4,
)
"""The pair of orders 5 and 4 that is called RK45; its last slope is the first of the next step.

References:
    | A family of embedded Runge-Kutta formulae (Dormand, Prince, 1980), table 2
    | https://doi.org/10.1016/0771-050X(80)90013-3
"""

_TINY = 1e-13
"""A step of the angle that no rounding excuses."""


class Effort(NamedTuple):
    """What each example took, int64 (B,): network evaluations, steps that were accepted, steps that were not.

    It is the `memory` of the steps, and counts from the first.
    """

    evaluations: Tensor
    accepted: Tensor
    rejected: Tensor


class RK45(Transition):
    r"""Solves the probability-flow ODE from one level to the next, however far, to a tolerance.

    The state is y = x / sqrt(alpha^2 + sigma^2) and the time the angle phi = atan(sigma / alpha): then
    :math:`dy/d\phi = \cos\phi\, \epsilon - \sin\phi\, x_0` is of the size of the data at every level, pure noise included,
    and comes straight from the network's own form. Each example chooses its steps by its own error, so that its result does
    not depend on the batch. Those that have arrived wait while the others go on: the network is asked for whole batches.
    The step to the data itself (lam = +inf) is the denoiser's estimate of x0, or with `denoise=False` leaves the noise in.

    A grid of two finite levels and +inf is all it wants (`sampler("rk45", grid)` makes it); more are visited one by one.
    Gradients flow through the states, not through the choice of steps.

    Arguments:
        rtol: Bound on the error of a step, relative to the state.
        atol: The same, absolute, in units of the data. A step is good if the root mean square over an example's elements of
            error / (atol + rtol |y|) is at most 1.
        denoise: Whether the step to the data removes the noise that is left.
        max_steps: Steps, accepted or not, after which to give up.

    Raises:
        ValueError: If a tolerance is negative or both are 0, or `max_steps` is below 1; when stepping, if `max_steps` are not
            enough, or for a start at lam = +inf.

    References:
        | Score-Based Generative Modeling through SDEs (Song et al., 2021), section 4.3, with one step size for a whole batch
        | https://arxiv.org/abs/2011.13456
        | Solving Ordinary Differential Equations I (Hairer, Norsett, Wanner, 1993), section II.4, for the choice of steps
    """

    def __init__(self, rtol: float = 1e-5, atol: float = 1e-5, denoise: bool = True, max_steps: int = 2000):
        super().__init__()
        if not (rtol >= 0 and atol >= 0 and rtol + atol > 0):
            raise ValueError(f"`rtol` and `atol` must not be negative, nor both 0 (got {rtol}, {atol}): 1e-5 is usual")
        if max_steps < 1:
            raise ValueError(f"`max_steps` must be at least 1 (got {max_steps})")
        self.rtol, self.atol, self.denoise, self.max_steps = rtol, atol, denoise, max_steps

    def forward(self, denoiser: Denoiser, x_t: Tensor, lam_t: Any, lam_s: Any, memory: Any = None) -> Step:
        denoiser.process.check_mean()
        if lam_s == lam_t:
            return Step(Gaussian(x_t), memory=memory)
        if lam_t == math.inf:
            raise ValueError(
                "`lam_t` is +inf, where the ODE has no slope: start from a finite level (end the grid before +inf)"
            )
        effort = memory if memory is not None else Effort(*(_zeros(x_t) for _ in range(3)))
        if lam_s < math.inf:
            return self._solve(denoiser, x_t, lam_t, lam_s, effort)
        if not self.denoise:
            alpha, _ = denoiser.process.scales(lam_t)
            return Step(Gaussian(x_t / alpha), memory=effort)
        x0 = denoiser(x_t, lam_t)
        return Step(Gaussian(x0.mean), x0, effort._replace(evaluations=effort.evaluations + 1))

    def _solve(self, denoiser: Denoiser, x_t: Tensor, lam_t: float, lam_s: float, effort: Effort) -> Step:
        start, end = angle(lam_t), angle(lam_s)
        wide = torch.float32 if x_t.device.type == "mps" else torch.float64
        phi = torch.full((len(x_t),), start, dtype=wide, device=x_t.device)
        y = x_t / math.hypot(*denoiser.process.scales(lam_t))
        slope = _slope(denoiser, y, phi)
        x0 = Gaussian(math.cos(start) * y - math.sin(start) * slope)
        h = self._first(denoiser, y, slope, phi, end)
        evaluations, accepted, rejected = effort.evaluations + 2, effort.accepted, effort.rejected
        for tried in range(self.max_steps + 1):
            left = end - phi
            going = left != 0
            # the one thing that the host waits for: whether any goes on, and none is stuck where steps shrink to nothing
            some_go, some_stick = torch.stack([going.any(), (going & ~(h.abs() >= _TINY)).any()]).tolist()
            if not some_go:
                x_s = y * math.hypot(*denoiser.process.scales(lam_s))
                return Step(Gaussian(x_s), x0, Effort(evaluations, accepted, rejected))
            if some_stick or tried == self.max_steps:
                break
            last = h.abs() >= left.abs()
            h = torch.where(last, left, h)
            new, slope_new, size = self._try(denoiser, y, slope, phi, h)
            good = going & (size <= 1)
            rows = spread_over(good, y).bool()
            y, slope = torch.where(rows, new, y), torch.where(rows, slope_new, slope)
            phi = torch.where(good, torch.where(last, torch.full_like(phi, end), phi + h), phi)
            h = h * _factor(size).clamp_max(torch.where(good, 10.0, 1.0))
            evaluations = evaluations + 6 * going
            accepted, rejected = accepted + good, rejected + (going & ~good)
        raise ValueError(f"`rtol`={self.rtol:g} and `atol`={self.atol:g} are not met in {int((accepted + rejected).max())} "
                         "steps: allow larger errors, sample in float64, or raise `max_steps`")  # fmt: skip

    def _try(self, denoiser: Denoiser, y: Tensor, slope: Tensor, phi: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A step of h (B,): the new state, the slope there, and the size (B,) of the error in units of the tolerance."""
        slopes, h_y, new = [slope], spread_over(h, y), y
        for c, row in zip(DORMAND_PRINCE.nodes[1:], DORMAND_PRINCE.matrix, strict=True):
            new = y + h_y * _combined(row, slopes)
            slopes.append(_slope(denoiser, new, phi + c * h))
        with torch.no_grad():
            error = h_y * _combined(DORMAND_PRINCE.error, slopes)
            size = self._rms(error, torch.maximum(y.abs(), new.abs())).to(h)
        return new, slopes[-1], size.nan_to_num(nan=math.inf)

    @torch.no_grad()
    def _first(self, denoiser: Denoiser, y: Tensor, slope: Tensor, phi: Tensor, end: float) -> Tensor:
        """A first step h (B,), such that an Euler step is small and its error too; one evaluation."""
        left = end - phi
        d0, d1 = (self._rms(v, y.abs()).to(phi) for v in (y, slope))
        h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1.clamp_min(1e-30)).minimum(left.abs())
        ahead = phi + h0 * left.sign()
        change = _slope(denoiser, y + spread_over(ahead - phi, y) * slope, ahead) - slope
        d2 = self._rms(change, y.abs()).to(phi) / h0
        steep = torch.maximum(d1, d2)
        h1 = torch.where(steep <= 1e-15, (1e-3 * h0).clamp_min(1e-6), (0.01 / steep.clamp_min(1e-30)) ** 0.2)
        return torch.minimum(100.0 * h0, h1) * left.sign()

    def _rms(self, value: Tensor, like: Tensor) -> Tensor:
        """Root mean square over each example's elements, in units of the tolerance at states of the size `like`: (B,)."""
        return (value / (self.atol + self.rtol * like)).flatten(1).square().mean(1).sqrt()

    def extra_repr(self) -> str:
        return f"rtol={self.rtol:g}, atol={self.atol:g}, denoise={self.denoise}"


def angle(lam: float) -> float:
    """atan(sigma / alpha) at a log-SNR: 0 is data, pi/2 pure noise."""
    return math.atan(math.exp(-0.5 * lam)) if lam >= 0 else 0.5 * math.pi - math.atan(math.exp(0.5 * lam))


def _angular(alpha: Any, sigma: Any) -> tuple[Any, Any]:
    """dy/dphi as a form: cos(phi) eps - sin(phi) x0."""
    norm = (alpha * alpha + sigma * sigma) ** 0.5
    return alpha / norm, -sigma / norm


def _slope(denoiser: Denoiser, y: Tensor, phi: Tensor) -> Tensor:
    lam = torch.where(phi >= 0.5 * math.pi, -math.inf, -2.0 * torch.log(torch.tan(phi)))
    alpha, sigma = denoiser.process.scales(lam)
    return denoiser.predict(y * spread_over((alpha * alpha + sigma * sigma) ** 0.5, y), lam, _angular)


def _combined(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    out = slopes[0] * weights[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=False):
        out = out.add(slope, alpha=weight) if weight else out
    return out


def _factor(size: Tensor) -> Tensor:
    """How much longer the next step may be: what the error allows, a tenth less, between 1/5 and 10."""
    return (0.9 * size.clamp_min(1e-12) ** (-1.0 / (DORMAND_PRINCE.order + 1))).clamp(0.2, 10.0)


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.int64, device=x.device)
