r"""What a step of a policy costs: how far it moved, how little noise it left, and when it came.

An auxiliary kernel q~(x_k | x_{k+1}) = N(a_k x_{k+1}, s_k^2) looks back along the chain. Up to constants, the bound on the
divergence from the energy's distribution is then a sum over steps of log pi_k - log q~, in units of tau: minus the entropy of
the step, and the running cost |a_k x_{k+1} - x_k|^2 / (2 s_k^2).

References:
    | Maximum Entropy Inverse Reinforcement Learning of Diffusion Models with Energy-Based Models (Yoon et al., 2024), eq. 6-11
    | https://arxiv.org/abs/2407.00626
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from ..gaussian import Gaussian, spread_over
from .policy import Policy, Rollout

__all__ = ["KINDS", "Auxiliary", "Reduction", "expected_cost", "running_cost", "time_costs"]

Reduction = Literal["mean", "sum"]
"""Over the dimensions of an example: "sum" is the paper's unit of tau, "mean" that of the official code, D times as large."""

KINDS = ("brownian", "rescale", "forward")
"""Auxiliary kernels: the paper's a = 1; a = sqrt(1 - s^2) as in older official code; the backbone's own forward process."""


def running_cost(
    x: Tensor, x_next: Tensor, s2: Tensor | float, kind: str = "brownian", reduction: Reduction = "mean"
) -> Tensor:
    r"""|a x_{k+1} - x_k|^2 / (2 s^2) of drawn states: (B,).

    Arguments:
        x: States x_k (B, *).
        x_next: States x_{k+1} (B, *).
        s2: Variance of the auxiliary kernel: a number, () or (B,). Numbers on another device than the CPU are not looked at.
        kind: "brownian" (a = 1) or "rescale" (a = sqrt(1 - s^2)).
        reduction: Mean or sum over dimensions.

    Raises:
        ValueError: For a variance that is not positive, or an unknown kind or reduction.
    """
    s2 = _variance(s2, x)
    _check_reduction(reduction)
    a = _factor(kind, s2)
    moved = x_next - x if a is None else spread_over(a, x) * x_next - x
    return _reduced(moved.square(), reduction) / (2.0 * s2)


def expected_cost(x: Tensor, p: Gaussian, s2: Tensor | float, kind: str = "brownian", reduction: Reduction = "mean") -> Tensor:
    """The mean of `running_cost` over x_{k+1} ~ p, exactly: (B,). The official `_no_var` forms.

    Arguments:
        x: States x_k (B, *).
        p: p(x_{k+1} | x_k).
        s2: As in `running_cost`.
        kind: As in `running_cost`.
        reduction: As in `running_cost`.

    Raises:
        ValueError: As `running_cost`.
    """
    s2 = _variance(s2, x)
    _check_reduction(reduction)
    return _expected(x, p, s2, _factor(kind, s2), reduction)


def time_costs(
    T: int,
    kind: Literal["sigmoid", "linear"] | None = "sigmoid",
    scale: float | None = None,
    compat: Literal["official"] | None = None,
) -> list[float]:
    r"""R(k) of each step, for values that do not know the time.

    Arguments:
        T: Number of steps.
        kind: "sigmoid", R(k) = sig(T/2 - k) - sig(T/2 - k - 1), whose sum is sig(T/2) - sig(-T/2); "linear", the same for all
            steps; None, no time cost.
        scale: Factor: 1 for "sigmoid", 0.05 for "linear" when absent. 0 is no time cost too.
        compat: "official" rounds T/2 down.

    Raises:
        ValueError: For T below 1, an unknown kind or `compat`, or a negative scale.

    Example:
        >>> round(sum(time_costs(10)), 7)
        0.9866143
    """
    if T < 1:
        raise ValueError(f"`T` must be at least 1 (got {T})")
    if kind not in ("sigmoid", "linear", None):
        raise ValueError(f"`time_cost` must be 'sigmoid', 'linear' or None (got {kind!r})")
    if compat not in ("official", None):
        raise ValueError(f"`compat` must be 'official' or None (got {compat!r})")
    scale = (0.05 if kind == "linear" else 1.0) if scale is None else scale
    if not (scale >= 0 and math.isfinite(scale)):
        raise ValueError(f"`time_cost_scale` must not be negative (got {scale}): 0 is no time cost")
    if kind is None:
        return [0.0] * T
    if kind == "linear":
        return [float(scale)] * T
    half = T // 2 if compat == "official" else 0.5 * T
    return [scale * (_sigmoid(half - k) - _sigmoid(half - k - 1)) for k in range(T)]


class Auxiliary(nn.Module):
    r"""The auxiliary kernels of a policy's steps, and their variances s_k^2.

    Arguments:
        policy: Whose steps they look back along.
        kind: One of `KINDS`. "forward" is the forward process between the levels of the grid, q(x_k | x_{k+1}): in VE
            a = 1 and s_k^2 = sigma_k^2 - sigma_{k+1}^2, in VP a = sqrt(1 - beta) and s_k^2 = beta. With the paper's kernel a
            VP chain from N(0, 1) cannot close the bound, with this one it can.
        s2: Initial variances: (T,), or "forward" (those of the forward process), "policy" (rho_k^2, the paper's), "level"
            (sigma_k^2).
        reduction: Mean or sum over dimensions.

    Attributes:
        s2: (T,), updated by `adapt`.

    Raises:
        ValueError: For an unknown name, or variances that are not positive.
    """

    s2: Tensor
    a: Tensor

    def __init__(
        self, policy: Policy, kind: str = "brownian", s2: Tensor | str = "forward", reduction: Reduction = "mean"
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"`cost` must be one of {', '.join(KINDS)} (got {kind!r})")
        _check_reduction(reduction)
        self.kind, self.reduction = kind, reduction
        lams, process = policy.grid.tolist(), policy.denoiser.process
        scales = [process.scales(lam) for lam in lams]
        forward = [
            sigma * sigma * -math.expm1(max(a - b, -700.0)) for (_, sigma), (a, b) in zip(scales, pairwise(lams), strict=False)
        ]
        if kind == "forward" or (isinstance(s2, str) and s2 == "forward"):
            values = torch.tensor(forward, dtype=torch.float64)
        elif isinstance(s2, Tensor):
            values = s2.detach().clone()
        elif s2 == "policy":
            values = policy.rhos.square()
        elif s2 == "level":
            values = torch.tensor([sigma * sigma for _, sigma in scales[:-1]], dtype=torch.float64)
        else:
            raise ValueError(f"`s2` must be a tensor, 'forward', 'policy' or 'level' (got {s2!r})")
        if values.shape != (policy.T,) or not bool((values > 0).all() and values.isfinite().all()):
            raise ValueError(f"`s2` must be {policy.T} positive numbers, one for each step (got {values.tolist()})")
        values = values if isinstance(s2, Tensor) and kind != "forward" else values.to(policy.log_std.dtype)
        self.register_buffer("s2", values.to(policy.log_std.device))
        ratios = torch.tensor([t[0] / s[0] for t, s in pairwise(scales)], dtype=torch.float64)
        self.register_buffer("a", ratios.to(self.s2.dtype).to(self.s2.device), persistent=False)

    def adapt(self, moved: Tensor, decay: float) -> None:
        """Adaptive velocity regularisation: s_k^2 moves towards the mean squared move (T,) of each step.

        The tightest bound has s_k^2 = E |x_{k+1} - x_k|^2 / D (appendix A). The variances of "forward" are given, and stay.
        """
        if self.kind != "forward":
            self.s2.lerp_(moved.to(self.s2), 1.0 - decay)

    def cost(self, k: int | Tensor, x: Tensor, x_next: Tensor) -> Tensor:
        """The running cost of drawn states (B,), for step k or one step for each row."""
        s2, a = self._of(k)
        moved = x_next - x if a is None else spread_over(a, x) * x_next - x
        return _reduced(moved.square(), self.reduction) / (2.0 * s2.to(x))

    def expected(self, k: int | Tensor, x: Tensor, p: Gaussian) -> Tensor:
        """Its mean over x_{k+1} ~ p, exactly: (B,)."""
        s2, a = self._of(k)
        return _expected(x, p, s2.to(x), a, self.reduction)

    def of(self, rollout: Rollout, k: int) -> Tensor:
        """The running cost of step k of a rollout (B,), from its moves where they are enough."""
        if self.kind != "brownian":
            return self.cost(k, rollout.states[k], rollout.states[k + 1])
        dims = rollout.states[0, :1].numel() if self.reduction == "sum" else 1
        return rollout.moves[k] * (dims / (2.0 * self.s2[k].to(rollout.moves)))

    def _of(self, k: int | Tensor) -> tuple[Tensor, Tensor | None]:
        s2 = self.s2[k]
        return s2, self.a[k] if self.kind == "forward" else _factor(self.kind, s2)

    def extra_repr(self) -> str:
        return f"kind={self.kind}, reduction={self.reduction}"


def _variance(s2: Tensor | float, x: Tensor) -> Tensor:
    """A variance as a tensor, checked where a look does not wait for a device."""
    seen = not isinstance(s2, Tensor) or s2.device.type == "cpu"
    if seen and not bool(torch.as_tensor(s2, dtype=torch.float64).gt(0.0).all()):
        raise ValueError(f"`s2` must be positive everywhere (got {s2.tolist() if isinstance(s2, Tensor) else s2})")
    return s2 if isinstance(s2, Tensor) else x.new_tensor(s2)


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"`reduction` must be 'mean' (official code) or 'sum' (paper) (got {reduction!r})")


def _factor(kind: str, s2: Tensor) -> Tensor | None:
    """a of the auxiliary kernel; None for 1."""
    if kind == "brownian":
        return None
    if kind == "rescale":
        return (1.0 - s2).clamp_min(0.0).sqrt()
    raise ValueError(f"`kind` must be 'brownian' or 'rescale' (got {kind!r}): 'forward' needs the levels of a policy")


def _expected(x: Tensor, p: Gaussian, s2: Tensor, a: Tensor | None, reduction: Reduction) -> Tensor:
    """E |a x' - x|^2 / (2 s^2) for x' ~ p; the trace of a variance is the same in every orthonormal basis."""
    factor = 1.0 if a is None else spread_over(a, x)
    spread = factor * factor * p.var.to(x)
    moved = p.mean - x if a is None else factor * p.mean - x
    return _reduced(moved.square() + spread, reduction) / (2.0 * s2)


def _reduced(terms: Tensor, reduction: Reduction) -> Tensor:
    rows = terms.flatten(1) if terms.ndim > 1 else terms[:, None]
    return rows.mean(1) if reduction == "mean" else rows.sum(1)


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))
