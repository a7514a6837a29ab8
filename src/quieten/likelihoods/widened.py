"""Steps whose variance is that which makes the variational bound smallest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..gaussian import Gaussian
from ..schedule import Schedule
from ..transition import Step, Transition

if TYPE_CHECKING:
    from ..likelihood import Bound

__all__ = ["Widened"]


class Widened(Transition):
    r"""A transition whose kernels are widened step by step: the reverse variance that makes the bound smallest.

    For kernels with the posterior's variance :math:`\sigma_Q^2` a step costs :math:`\|\mu_P - \mu_Q\|^2 / 2 \sigma_Q^2`; with
    :math:`\sigma_P^2 = (1 + e)\, \sigma_Q^2`, e the mean of :math:`\|\mu_P - \mu_Q\|^2 / D \sigma_Q^2`, only D / 2 log(1 + e).

    Arguments:
        inner: The transition, with the posterior's variance: `Ancestral(spread=False)`, or `Ancestral()` of a denoiser that
            reports none.
        levels: T + 1 log-SNRs between which the steps are, in either order; or a schedule, for u = 0, 1/T, ..., 1.
        excess: e of each of the T steps, from data to noise: (T,), such as `VariationalBound.excess`. See `of`.

    Raises:
        ValueError: If there is not one number, at least 0, for each step; or at a step that is none of the T.

    References:
        | DiffEnc (Nielsen et al., 2024), section 3 and appendix, on unequal variances
        | https://arxiv.org/abs/2310.19789
    """

    def __init__(self, inner: Transition, levels: Schedule | Tensor | Sequence[float], excess: Tensor):
        super().__init__()
        self.inner, self.eta, self.excess = inner, inner.eta, excess.tolist()
        if isinstance(levels, Schedule):
            with torch.no_grad():
                levels = levels(torch.linspace(0, 1, len(excess) + 1, dtype=torch.float64))
        self.levels = sorted(torch.as_tensor(levels, dtype=torch.float64).tolist(), reverse=True)
        if len(self.levels) != len(self.excess) + 1:
            raise ValueError(f"`excess` must hold a number for each of the {len(self.levels) - 1} steps between `levels` (got "
                             f"{len(self.excess)})")  # fmt: skip
        if not all(0.0 <= value < math.inf for value in self.excess):
            raise ValueError(f"`excess` must be finite and not negative (got {min(self.excess):.4g} to {max(self.excess):.4g})")

    @classmethod
    def of(cls, inner: Transition, bound: Bound) -> Widened:
        """The best widening of a transition, from a bound in steps that was measured with it on training data."""
        if not bound.levels or not len(bound.prior):
            raise ValueError("`bound` must be of at least one example, in steps: measure it on a grid")
        return cls(inner, bound.levels, 2.0 * bound.diffusion.mean(0).flip(0) / bound.dims)

    def forward(self, denoiser: Denoiser, x_t: Tensor, lam_t: Any, lam_s: Any, memory: Any = None) -> Step:
        step = self.inner(denoiser, x_t, lam_t, lam_s, memory)
        if lam_s == math.inf:
            return step
        gaps = [_apart(lam_t, a) + _apart(lam_s, b) for b, a in pairwise(self.levels)]
        index = min(range(len(gaps)), key=gaps.__getitem__, default=-1)
        if index < 0 or not gaps[index] <= 1e-3:
            raise ValueError(f"the variance of the step from {lam_t:.4g} to {lam_s:.4g} was not learned: take the grid of "
                             f"{len(gaps)} steps that it was measured on")  # fmt: skip
        return Step(Gaussian(step.p.mean, step.p.var * (1.0 + self.excess[index])), step.x0, step.memory, step.then)


def _apart(a: float, b: float) -> float:
    return 0.0 if a == b else abs(a - b)  # pure noise is at -inf
