r"""Fast solvers in log-SNR beside `Exponential`: DPM-Solver++ in single steps, and UniPC."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..gaussian import Gaussian
from ..process import Process
from ..transition import Step, Transition

__all__ = ["Singlestep", "UniPC"]


class Singlestep(Transition):
    r"""DPM-Solver++ 2S: the kernel with x0 extrapolated from a second evaluation at the fraction r of the step in log-SNR.

    Two evaluations a step, second order, no history: unlike 2M it can be guided, restarted and kicked anywhere. The step to
    the data (lam = +inf) and a step from pure noise (lam = -inf) are DDIM's.

    Arguments:
        r: In (0, 1]; 1/2 as published.

    References:
        | DPM-Solver++ (Lu et al., 2022), algorithm 1
        | https://arxiv.org/abs/2211.01095
    """

    def __init__(self, r: float = 0.5):
        super().__init__()
        if not 0.0 < r <= 1.0:
            raise ValueError(f"`r` must lie in (0, 1] (got {r}): 0.5 is the published middle")
        self.r = r

    def forward(self, denoiser: Denoiser, x_t: Tensor, lam_t: Any, lam_s: Any, memory: Any = None) -> Step:
        denoiser.process.check_mean()
        x0, process = denoiser(x_t, lam_t), denoiser.process
        if math.isinf(lam_t) or math.isinf(lam_s) or lam_s == lam_t:
            return Step(process.bridge(x0.mean, x_t, lam_t, lam_s, eta=0.0), x0)
        lam_m = lam_t + self.r * (lam_s - lam_t)
        second = denoiser(process.bridge(x0.mean, x_t, lam_t, lam_m, eta=0.0).mean, lam_m).mean
        mean = torch.lerp(x0.mean, second, 0.5 / self.r)
        return Step(process.bridge(mean, x_t, lam_t, lam_s, eta=0.0), x0)

    def extra_repr(self) -> str:
        return f"r={self.r}"


class Corrected(NamedTuple):
    """What UniPC remembers: where the last step began, with which estimates of x0, newest first, and of which order it was."""

    x: Tensor
    lam: float
    history: tuple[tuple[float, Tensor], ...]
    order: int


class UniPC(Transition):
    r"""UniPC with B(h) = expm1(h): a multistep predictor, and a corrector that reuses the next step's evaluation.

    The corrector rebuilds the state from the step before, so that whatever changed it in between (a kick, an imputation) is
    lost: `Split` takes it without only.

    Arguments:
        order: 1 to 3 of the predictor.
        corrector: Whether to correct.

    Attributes:
        rebuilds: Whether changes of the state between steps are lost.

    References:
        | UniPC: A Unified Predictor-Corrector Framework for Fast Sampling (Zhao et al., 2023), algorithms 5 to 8
        | https://arxiv.org/abs/2302.04867
    """

    def __init__(self, order: int = 2, corrector: bool = True):
        super().__init__()
        if order not in (1, 2, 3):
            raise ValueError(f"`order` must be 1, 2 or 3 (got {order!r})")
        self.order, self.corrector = order, corrector

    @property
    def rebuilds(self) -> bool:
        return self.corrector

    def forward(self, denoiser: Denoiser, x_t: Tensor, lam_t: Any, lam_s: Any, memory: Any = None) -> Step:
        denoiser.process.check_mean()
        x0, process, past = denoiser(x_t, lam_t), denoiser.process, memory
        if lam_t == -math.inf:
            return Step(process.bridge(x0.mean, x_t, lam_t, lam_s, eta=0.0), x0)
        if past is not None and self.corrector:
            x_t = _unified(process, past.x, [*past.history[: past.order], (lam_t, x0.mean)], lam_t, past.order)
        history = ((lam_t, x0.mean), *(past.history if past is not None else ()))[: self.order]
        order = 1 if math.isinf(lam_s) else len(history)
        return Step(Gaussian(_unified(process, x_t, history[:order], lam_s, order)), x0, Corrected(x_t, lam_t, history, order))

    def extra_repr(self) -> str:
        return f"order={self.order}, corrector={self.corrector}"


def _unified(process: Process, x: Tensor, points: Sequence[tuple[float, Tensor]], lam_s: float, order: int) -> Tensor:
    """DDIM's step from the first point to lam_s, plus the differences of the others from it: UniPC's (3) and (9).

    Arguments:
        process: Of the state.
        x: State at the first point.
        points: (lam, x0): the `order` newest, and, for the corrector, one at lam_s itself, last.
        lam_s: End of the step.
        order: Of the predictor.
    """
    (lam, m), others = points[0], points[1:]
    mean = process.bridge(m, x, lam, lam_s, eta=0.0).mean
    if not others:
        return mean
    h = 0.5 * (lam_s - lam)
    r = [0.5 * (point - lam) / h for point, _ in others]
    alpha, _ = process.scales(lam_s)
    scale = -alpha * math.expm1(-h)
    for weight, r_k, (_, m_k) in zip(_weights(r, h), r, others, strict=True):
        mean = mean.add_(m_k, alpha=scale * weight / r_k).add_(m, alpha=-scale * weight / r_k)
    return mean


def _weights(r: Sequence[float], h: float) -> list[float]:
    """Weights of the differences: sum_k w_k r_k^(i-1) = i! phi_(i+1)(-h) / ..., in the data prediction form; 1/2 for one."""
    if len(r) == 1:
        return [0.5]
    hh, factorial, b = -h, 1.0, []
    phi = math.expm1(hh) / hh - 1.0
    for i in range(1, len(r) + 1):
        b.append(phi * factorial / math.expm1(hh))
        factorial *= i + 1
        phi = phi / hh - 1.0 / factorial
    powers = torch.tensor([[r_k**i for r_k in r] for i in range(len(r))], dtype=torch.float64)
    weights: list[float] = torch.linalg.solve(powers, torch.tensor(b, dtype=torch.float64)).tolist()
    return weights
