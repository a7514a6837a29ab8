r"""Guidance by a tuned value: downhill, towards lower cost to go.

The paper moves x_{k+1} by :math:`-\lambda \rho_k \nabla V(x_{k+1}, k + 1)`; the official code adds that term, so that its scale
has to be negative to do what the paper says. Here a positive scale always goes downhill.

References:
    | Maximum Entropy Inverse Reinforcement Learning of Diffusion Models with Energy-Based Models (Yoon et al., 2024), 5.2
    | https://arxiv.org/abs/2407.00626
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..gaussian import spread_over
from ..guidance import Likelihood, differentiable
from ..process import Level
from ..transition import Step, Transition
from ..tuning.critics import column
from ..tuning.policy import Policy, Tuned

__all__ = ["ValueGuidance", "ValueKick", "kicked"]


def kicked(
    value: nn.Module, x: Tensor, k: int, rho: Tensor | float, scale: float | Tensor, cond: Mapping[str, Any] | None = None
) -> Tensor:
    """x - scale rho grad V(x, k): (B, *), without a graph; rho is a number, () or (B,).

    Raises:
        ValueError: If the value has no gradient in x.
    """
    with differentiable(x) as leaf:
        v = column(value(leaf, k, **(cond or {})), leaf, "value")
        g = torch.autograd.grad(v.sum(), leaf, allow_unused=True)[0] if v.requires_grad else None
    if g is None:
        raise ValueError("`value` does not depend on its state through autograd: leave out detach() and no_grad()")
    weight = scale * (rho.to(x) if isinstance(rho, Tensor) else rho)
    return x - spread_over(weight, x) * g


class ValueKick(Transition):
    """The steps of a policy, each followed by a move down the value: x_{k+1} - scale rho_k grad V(x_{k+1}, k + 1).

    Arguments:
        inner: The steps of a policy, `policy.transition`.
        value: V(x, k, **cond), low where it is good.
        scale: How far; useful up to 0.5.
        steps: Numbers of the steps that are followed by a move; None is all.
        cond: Conditions of the value, each (B, ...).

    Raises:
        ValueError: For a scale that is not finite, or a step that the policy does not have.
    """

    def __init__(
        self,
        inner: Tuned,
        value: nn.Module,
        scale: float = 0.5,
        steps: Collection[int] | None = None,
        cond: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        if not math.isfinite(scale):
            raise ValueError(f"`scale` must be finite (got {scale})")
        wrong = [k for k in (steps or ()) if not 0 <= k < inner.T]
        if wrong:
            raise ValueError(f"`steps` must lie in 0..{inner.T - 1} (got {wrong[0]})")
        self.inner, self.value, self.scale, self.cond = inner, value, float(scale), dict(cond or {})
        self.eta = inner.eta
        self.steps = None if steps is None else frozenset(steps)

    def forward(self, denoiser: Denoiser, x_t: Tensor, lam_t: Level, lam_s: Level, memory: Any = None) -> Step:
        k = self.inner.index(lam_t, lam_s)
        if not isinstance(k, int):
            raise ValueError("`lam_t` must be one level for all rows: the move after a step is of one step")
        step = self.inner.at(denoiser, x_t, k)
        if self.steps is not None and k not in self.steps:
            return step
        rho = self.inner.rho(k, step.p)
        return replace(step, then=lambda x: kicked(self.value, x, k + 1, rho, self.scale, self.cond))

    def extra_repr(self) -> str:
        return f"scale={self.scale}, steps={None if self.steps is None else sorted(self.steps)}"


class ValueGuidance(Likelihood):
    r"""Guidance by the log-likelihood -V(x, k), so that `Guided` and splits apply as they do to a classifier.

    Its weight at the level of step k is such that the policy's own transition, with a denoiser guided by it, moves the mean by
    :math:`-\lambda \rho_k \nabla V`, V being asked before the step, at (x_k, k). Other transitions, and splits, which ask for a
    gradient where they please, make more or less of it: around those, `ValueKick` moves by just that much, after each step.

    Arguments:
        value: V(x, k, **cond), low where it is good.
        policy: Whose levels and noise count; between levels the nearest step does.
        scale: lambda.
        cond: Conditions of the value, each (B, ...).
        nonfinite: As in `Guidance`.

    Raises:
        ValueError: For a scale that is not finite; and when it is asked, for a value without gradient in its state.
    """

    def __init__(
        self,
        value: nn.Module,
        policy: Policy,
        scale: float = 0.5,
        cond: Mapping[str, Any] | None = None,
        nonfinite: str = "raise",
    ):
        if not math.isfinite(scale):
            raise ValueError(f"`scale` must be finite (got {scale})")
        given = dict(cond or {})

        def log_prob(x: Tensor, lam: Level) -> Tensor:
            return -column(value(x, self._nearest(lam), **given), x, "value")

        super().__init__(log_prob, self._weight, nonfinite=nonfinite)
        self.steps, self.critic, self.reach = policy.transition, value, float(scale)
        self._factors = [_factor(policy, k) for k in range(policy.T)]

    def _weight(self, lam: Any) -> Any:
        """lambda rho_k over what a step makes of a gradient: b sigma^2 / alpha."""
        k, rhos = self._nearest(lam), self.steps.rhos
        if isinstance(k, int):
            return self.reach * float(rhos[k]) * self._factors[k]
        return self.reach * rhos[k] * torch.tensor(self._factors, device=rhos.device, dtype=rhos.dtype)[k]

    def _nearest(self, lam: Level) -> int | Tensor:
        """The step whose level is nearest."""
        if isinstance(lam, Tensor):
            k = self.steps.index(lam.reshape(-1))
            return k if lam.ndim or isinstance(k, int) else k[0]
        gaps = [0.0 if level == lam else abs(max(level, -1e30) - lam) for level in self.steps.lams[:-1]]
        return gaps.index(min(gaps))

    def extra_repr(self) -> str:
        return f"scale={self.reach}"


def _factor(policy: Policy, k: int) -> float:
    """alpha / (b sigma^2) of a step, with which its mean moves by what the gradient is multiplied by; b is its `response`."""
    alpha, sigma = policy.denoiser.process.scales(policy.transition.lams[k])
    b = policy.transition.response(k)
    return float(alpha / (b * sigma * sigma)) if b else 0.0
