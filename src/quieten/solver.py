r"""ODE solvers: the DDIM step plus a correction, one step or several steps deep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .denoiser import Denoiser
from .gaussian import Gaussian
from .process import FLOW, VE, Process, check_eta
from .schedule import Power, Rectified, Schedule
from .transition import Step, Transition

__all__ = [
    "RK2",
    "RK4",
    "AdamsBashforth",
    "Euler",
    "Exponential",
    "Heun",
    "RungeKutta",
    "adams_bashforth_weights",
]


class Coordinates(NamedTuple):
    r"""The variables that a Runge-Kutta step integrates: z = s x / alpha against a time tau, for a scaling s.

    With r = -d lam / d tau and s the alpha of `scale`, the probability-flow ODE is
    :math:`dz/d\tau = \tfrac12 r\, s\, (g z - E[x_0 | x])`, :math:`g = (1 - 2\, d \log s / d\lambda) / s`.
    """

    time: Schedule
    scale: Process

    @property
    def _noise(self) -> bool:
        """x / alpha against sigma / alpha: dz/dtau = (z - E[x0 | x]) / tau."""
        return isinstance(self.time, Power) and self.time.power == 1.0 and self.scale is VE

    @property
    def _flow(self) -> bool:
        """Those of rectified flow: the same slope, which here is finite in pure noise too."""
        return isinstance(self.time, Rectified) and self.time.shift == 1.0 and self.scale is FLOW

    def tau(self, lam: float) -> float:
        return float(self.time.inverse(torch.tensor(lam, dtype=torch.float64)))

    def lam(self, tau: float) -> float:
        return float(self.time.forward(torch.tensor(tau, dtype=torch.float64)))  # it may go on beyond its ends

    def factor(self, process: Process, lam: float) -> float:
        """z / x at a level: the ratio of the alphas, or of the sigmas, which is the same and exists in pure noise."""
        (alpha, sigma), (s_alpha, s_sigma) = process.scales(lam), self.scale.scales(lam)
        return s_sigma / sigma if lam < 0 else s_alpha / alpha

    def slope(self, z: Sequence[float], tau: float, lam: float) -> list[float]:
        """dz/dtau as a sum: shares of x_t and of the estimates of x0, for z given by those it has so far, and the next one."""
        if self._noise or self._flow:
            return [*(share / tau for share in z), -1.0 / tau]
        _, rate = self.time.rate(torch.tensor(tau, dtype=torch.float64))
        s, _ = self.scale.scales(lam)
        half = 0.5 * float(rate)
        return [*(half * (1.0 - 2.0 * self.scale.drift(lam)) * share for share in z), -half * s]


_NOISE = Coordinates(Power(1.0), VE)
_FLOW = Coordinates(Rectified(), FLOW)


class RungeKutta(Transition):
    r"""An explicit Runge-Kutta step of the probability-flow ODE, in any time and scaling.

    Without `time` and `scale`, the coordinates are x / alpha against sigma / alpha (EDM's, where one Euler step is DDIM),
    and those of rectified flow for a step that starts in pure noise (lam = -inf). The step to the data itself (lam = +inf)
    is an Euler step, as in EDM: the ODE has no slope there. A step to lower log-SNR runs the ODE backwards.

    Arguments:
        nodes: c_i (stages,), the first 0.
        matrix: Rows a_ij of the tableau, without the first, empty one.
        weights: b_i (stages,).
        time: The time tau to integrate in, as the curve tau -> lam.
        scale: The process whose alpha scales the state.
        last: "euler", or "stages" to keep all stages in the step to the data, which no stage must reach.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), eq. 4 and algorithm 3
        | https://arxiv.org/abs/2206.00364
    """

    def __init__(
        self,
        nodes: Sequence[float],
        matrix: Sequence[Sequence[float]],
        weights: Sequence[float],
        time: Schedule | None = None,
        scale: Process | None = None,
        last: str = "euler",
    ):
        super().__init__()
        if last not in ("euler", "stages") or (last == "stages" and max(nodes) >= 1.0):
            raise ValueError(f"`last` must be 'euler', or 'stages' where every node lies before the end (got {last!r})")
        self.last = last
        self.nodes, self.matrix, self.weights = tuple(nodes), ((), *map(tuple, matrix)), tuple(weights)
        self.coordinates: Coordinates | None = None
        if time is not None or scale is not None:
            self.coordinates = Coordinates(Power(1.0) if time is None else time, VE if scale is None else scale)

    def forward(self, denoiser: Denoiser, x_t: Tensor, lam_t: Any, lam_s: Any, memory: Any = None) -> Step:
        return self.step(denoiser, x_t, lam_t, lam_s, denoiser(x_t, lam_t))

    def step(self, denoiser: Denoiser, x_t: Tensor, lam_t: float, lam_s: float, x0: Gaussian) -> Step:
        """The step when the first evaluation, `x0` = denoiser(x_t, lam_t), is already there."""
        if lam_s == lam_t:
            return Step(Gaussian(x_t), x0)
        if lam_t == math.inf:
            raise ValueError(
                "`lam_t` is +inf, where the ODE has no slope: start from a finite level (end the grid before +inf)"
            )
        denoiser.process.check_mean()
        process, at = denoiser.process, self.coordinates or (_FLOW if lam_t == -math.inf else _NOISE)
        if lam_t == -math.inf and not at._flow:
            raise ValueError(f"`lam_t` = -inf has no place in {at}: leave out `time` and `scale`, or start from a finite level")
        if lam_s == math.inf and self.last == "euler" and (at._noise or at._flow):
            return Step(process.bridge(x0.mean, x_t, lam_t, lam_s, eta=0.0), x0)
        # Every stage is a sum of x_t and of the estimates so far: numbers first, then one pass over memory for each term.
        tau, end = at.tau(lam_t), at.tau(lam_s)
        h, z, estimates = end - tau, [at.factor(process, lam_t)], [x0.mean]
        slopes = [at.slope(z, tau, lam_t)]
        if lam_s == math.inf and self.last == "euler":
            z_s = _advance(z, h, (1.0,), slopes)
            return Step(Gaussian(_combined(z_s, at.factor(process, lam_s), x_t, estimates)), x0)
        for c, row in zip(self.nodes[1:], self.matrix[1:], strict=True):
            tau_c, lam_c = tau + c * h, lam_s if c == 1.0 else at.lam(tau + c * h)
            z_c = _advance(z, h, row, slopes)
            estimates.append(denoiser(_combined(z_c, at.factor(process, lam_c), x_t, estimates), lam_c).mean)
            slopes.append(at.slope(z_c, tau_c, lam_c))
        z_s = _advance(z, h, self.weights, slopes)
        return Step(Gaussian(_combined(z_s, at.factor(process, lam_s), x_t, estimates)), x0)

    def extra_repr(self) -> str:
        return f"stages={len(self.weights)}, coordinates={self.coordinates}"


def _advance(z: Sequence[float], h: float, row: Sequence[float], slopes: Sequence[Sequence[float]]) -> list[float]:
    """z + h sum_j row_j slopes_j, as shares of x_t and of the estimates."""
    out = [*z, *[0.0] * len(slopes)]
    for weight, slope in zip(row, slopes, strict=False):  # rows may be filled up with zeros
        for j, share in enumerate(slope):
            out[j] += h * weight * share
    return out


def _combined(z: Sequence[float], factor: float, x_t: Tensor, estimates: Sequence[Tensor]) -> Tensor:
    """The state whose multiple by `factor` has these shares."""
    out = torch.mul(x_t, z[0] / factor)
    for share, estimate in zip(z[1:], estimates, strict=True):
        out = out.add_(estimate, alpha=share / factor) if share else out
    return out


class Euler(RungeKutta):
    """One stage, order 1; DDIM in the default coordinates."""

    def __init__(self, time: Schedule | None = None, scale: Process | None = None):
        super().__init__([0.0], [], [1.0], time, scale)


class RK2(RungeKutta):
    """The two-stage family of order 2 with its second stage at the fraction `alpha` of the step: 1 is Heun, 1/2 midpoint.

    Arguments:
        alpha: In (0, 1].
        time: As in `RungeKutta`.
        scale: As in `RungeKutta`.
    """

    def __init__(self, alpha: float = 1.0, time: Schedule | None = None, scale: Process | None = None):
        if not 0.0 < alpha <= 1.0:
            raise ValueError(f"`alpha` must lie in (0, 1] (got {alpha}): 1 is Heun, 0.5 the midpoint rule")
        half = 0.5 / alpha
        super().__init__([0.0, alpha], [[alpha]], [1.0 - half, half], time, scale)


class Heun(RK2):
    """Heun's method, order 2: EDM's deterministic sampler, 2 evaluations a step and 1 for the last."""

    def __init__(self, time: Schedule | None = None, scale: Process | None = None):
        super().__init__(1.0, time, scale)


class RK4(RungeKutta):
    """The classical method of order 4: 4 evaluations a step."""

    def __init__(self, time: Schedule | None = None, scale: Process | None = None):
        rows, weights = [[0.5], [0.0, 0.5], [0.0, 0.0, 1.0]], [1 / 6, 1 / 3, 1 / 3, 1 / 6]
        super().__init__([0.0, 0.5, 0.5, 1.0], rows, weights, time, scale)


_CONSTANT = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
_GAUSS = (0.5 - 0.5 / math.sqrt(3.0), 0.5 + 0.5 / math.sqrt(3.0))  # two nodes: exact for cubics


def adams_bashforth_weights(nodes: Sequence[float], end: float, constant: bool = False) -> list[float]:
    """Weights W_j with sum_j W_j f(nodes_j) ~ integral of f from nodes_0 to `end`.

    Arguments:
        nodes: Where f is known, newest first, 1 to 4 of them.
        end: End of the step.
        constant: Use the coefficients of equal steps, whatever the nodes (PLMS as released).
    """
    h = end - nodes[0]
    if constant:
        return [h * w for w in _CONSTANT[len(nodes)]]
    offsets = [(s - nodes[0]) / h for s in nodes]  # in units of the step, so that nothing under- or overflows

    def lagrange(j: int, at: float) -> float:
        return math.prod((at - o) / (offsets[j] - o) for i, o in enumerate(offsets) if i != j)

    return [0.5 * h * sum(lagrange(j, g) for g in _GAUSS) for j in range(len(nodes))]


class AdamsBashforth(Transition):
    r"""Adams-Bashforth in (x / alpha, sigma / alpha): one evaluation a step, the last `order` noise estimates remembered.

    x_s = DDIM step + alpha_s sum_j W_j (eps_j - eps_0). Until there is enough history the order is lower, or, with
    start="rk", the step is RK4's. A step from pure noise (lam = -inf) is DDIM's and is not remembered.

    Arguments:
        order: 1 to 4; 1 is DDIM.
        coefficients: "variable" integrates the interpolating polynomial on the actual grid; "constant" is PLMS, second
            order at most on a grid that shrinks.
        start: "ramp" or "rk".

    Raises:
        ValueError: For an unknown word or order; when stepping, above order 1, for a denoiser whose mean is not E[x0 | x_t]:
            one that was trained with an encoder.

    References:
        | Pseudo Numerical Methods for Diffusion Models on Manifolds (Liu et al., 2022), eq. 12, for constant coefficients
        | https://arxiv.org/abs/2202.09778
    """

    def __init__(self, order: int = 4, coefficients: str = "variable", start: str = "ramp"):
        super().__init__()
        if order not in _CONSTANT:
            raise ValueError(f"`order` must be 1, 2, 3 or 4 (got {order!r})")
        if coefficients not in ("variable", "constant") or start not in ("ramp", "rk"):
            raise ValueError(
                f"`coefficients` must be 'variable' or 'constant' and `start` 'ramp' or 'rk' (got {coefficients!r}, {start!r})"
            )
        self.order, self.coefficients, self.start = order, coefficients, start
        self.starter = RK4() if start == "rk" else None

    def forward(self, denoiser: Denoiser, x_t: Tensor, lam_t: Any, lam_s: Any, memory: Any = None) -> Step:
        if self.order > 1:  # the history is of the ODE in E[x0 | x_t]; a single step is the kernel's own, whatever x0 is
            denoiser.process.check_mean()
        x0, process = denoiser(x_t, lam_t), denoiser.process
        if lam_t == -math.inf:
            return Step(process.bridge(x0.mean, x_t, lam_t, lam_s, eta=0.0), x0)
        (alpha_t, sigma_t), (alpha_s, _) = process.scales(lam_t), process.scales(lam_s)
        eps = torch.sub(x_t, x0.mean, alpha=alpha_t).div_(sigma_t)
        history = ((math.exp(-0.5 * lam_t), eps), *(memory or ()))[: self.order]
        keep = history[: self.order - 1] or None
        if self.starter is not None and len(history) < self.order:
            step = self.starter.step(denoiser, x_t, lam_t, lam_s, x0)
            return Step(step.p, x0, keep)
        if len(history) == 1:
            return Step(process.bridge(x0.mean, x_t, lam_t, lam_s, eta=0.0), x0, keep)
        k, b, _, _ = process.coefficients(lam_t, lam_s, eta=0.0)
        weights = adams_bashforth_weights([s for s, _ in history], math.exp(-0.5 * lam_s), self.coefficients == "constant")
        share = -alpha_s * sum(weights[1:]) / sigma_t  # of eps_0, which is made of x_t and x0: no pass of its own
        mean = torch.mul(x_t, k + share).add_(x0.mean, alpha=b - share * alpha_t)
        for weight, (_, past) in zip(weights[1:], history[1:], strict=True):
            mean = mean.add_(past, alpha=alpha_s * weight)
        return Step(Gaussian(mean), x0, keep)

    def extra_repr(self) -> str:
        return f"order={self.order}, coefficients={self.coefficients}, start={self.start}"


class Exponential(Transition):
    r"""DPM-Solver++ multistep: the kernel with x0 extrapolated along lam / 2 from the last `order` estimates.

    Order 2 is 2M with the midpoint rule, order 3 is 3M, as published; with eta = 1 they are the SDE versions. The step to
    the data itself (lam = +inf) and a step from pure noise (lam = -inf) are of first order. 3M as published takes
    half of the second difference that Taylor's series needs: its error shrinks like h^2 too, with a smaller constant.

    Arguments:
        order: 1 (DDIM), 2 or 3.
        eta: Share of noise, 0 (the ODE) to 1.

    References:
        | DPM-Solver++ (Lu et al., 2022), algorithm 2 and eq. 13 to 18
        | https://arxiv.org/abs/2211.01095
    """

    eta: float

    def __init__(self, order: int = 2, eta: float = 0.0):
        super().__init__()
        if order not in (1, 2, 3):
            raise ValueError(f"`order` must be 1, 2 or 3 (got {order!r})")
        check_eta(eta)
        self.order, self.eta = order, eta

    def forward(self, denoiser: Denoiser, x_t: Tensor, lam_t: Any, lam_s: Any, memory: Any = None) -> Step:
        x0 = denoiser(x_t, lam_t)
        denoiser.process.check_mean()
        if lam_t == -math.inf:
            return Step(denoiser.process.bridge(x0.mean, x_t, lam_t, lam_s, self.eta), x0)
        history = ((lam_t, x0.mean), *(memory or ()))[: self.order]
        weights = _extrapolation([0.5 * lam for lam, _ in history], 0.5 * lam_s, 1.0 + self.eta**2)
        mean, total = history[len(weights) - 1][1], weights[-1]
        for weight, (_, newer) in reversed(list(zip(weights[:-1], history, strict=False))):
            total += weight
            mean = torch.lerp(mean, newer, weight / total)  # they sum to 1: a pass over memory for each, and no other
        return Step(denoiser.process.bridge(mean, x_t, lam_t, lam_s, self.eta), x0, history[: self.order - 1] or None)

    def extra_repr(self) -> str:
        return f"order={self.order}, eta={self.eta}"


def _extrapolation(nodes: list[float], end: float, decay: float) -> list[float]:
    """Weights of the past estimates of x0, newest first, that sum to 1, in half log-SNR."""
    h = end - nodes[0]
    if len(nodes) == 1 or h == 0 or math.isinf(h):
        return [1.0]
    r0 = (nodes[0] - nodes[1]) / h
    if len(nodes) == 2:
        return [1.0 + 0.5 / r0, -0.5 / r0]
    r1 = (nodes[1] - nodes[2]) / h
    hh = decay * h
    total = -math.expm1(-hh)
    slope, bend = (1.0 - total / hh) / total, (0.5 - (hh - total) / hh**2) / total
    # divided differences: d1 = D0 + r0 / (r0 + r1) (D0 - D1), d2 = (D0 - D1) / (r0 + r1), D0 = (m0 - m1) / r0, ...
    first, second = slope * (1.0 + r0 / (r0 + r1)) + bend / (r0 + r1), -(slope * r0 + bend) / (r0 + r1)
    return [1.0 + first / r0, second / r1 - first / r0, -second / r1]
