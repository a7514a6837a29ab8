"""Values and energies: how they are asked, kept still, averaged, and what is told of their answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["column", "contrast", "explained", "follow", "follower", "frozen", "largest", "mean", "spread"]

M = TypeVar("M", bound=nn.Module)


def column(out: Any, x: Tensor, name: str) -> Tensor:
    """What a value or an energy returned for states x (B, *), as (B,).

    Raises:
        ValueError: For anything but (B,) or (B, 1).
    """
    if isinstance(out, Tensor) and out.shape == (len(x), 1):
        out = out.squeeze(1)
    if not isinstance(out, Tensor) or out.shape != (len(x),):
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"`{name}` must answer ({len(x)},) or ({len(x)}, 1) (got {got}): one number per example")  # fmt: skip
    return out


def contrast(data: Tensor, drawn: Tensor, gamma: float) -> Tensor:
    r"""The energy's loss, E_data[E] - E_policy[E] + gamma (E_data[E^2] + E_policy[E^2]): ().

    For fixed samples its optimum is E = (pi - p) / (2 gamma (pi + p)), within 1 / (2 gamma), and the loss there is
    -L / (2 gamma) with L the Le Cam distance of the two, in [0, 1].

    Arguments:
        data: Energies of data (B,).
        drawn: Energies of the policy's samples (B,).
        gamma: Weight of the squares; 0 leaves them out.
    """
    loss = mean(data) - mean(drawn)
    return loss + gamma * (mean(data.square()) + mean(drawn.square())) if gamma else loss


def mean(x: Tensor) -> Tensor:
    """The mean, and 0 of nothing."""
    return x.sum() / max(1, x.numel())


def largest(x: Tensor) -> Tensor:
    """The largest size, and 0 of nothing."""
    return x.detach().abs().max() if x.numel() else x.new_zeros(())


def spread(x: Tensor) -> Tensor:
    """Standard deviation over the batch, mean over dimensions: ()."""
    return x.detach().std(0, unbiased=False).mean() if x.numel() else x.new_zeros(())


def explained(target: Tensor, value: Tensor) -> Tensor:
    """Share of a target's variance (B,) that a value explains: 1 is all, 0 as much as a constant does."""
    if not target.numel():
        return target.new_zeros(())
    whole = target.var(unbiased=False)
    return 1.0 - (target - value.detach()).var(unbiased=False) / whole.clamp_min(torch.finfo(whole.dtype).tiny)


@contextlib.contextmanager
def frozen(*modules: nn.Module | None) -> Iterator[None]:
    """Gradients go through these modules, and are not formed for their own parameters: that costs a third less."""
    wanted = [p for module in modules if module is not None for p in module.parameters() if p.requires_grad]
    for p in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)


def follower(module: M) -> M:
    """A copy that `follow` moves after a module; nothing else trains it."""
    return deepcopy(module).eval().requires_grad_(False)


@torch.no_grad()
def follow(average: nn.Module, latest: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) latest, all floating-point tensors."""
    ours = [t for t in average.state_dict().values() if t.is_floating_point()]
    theirs = [t for t in latest.state_dict().values() if t.is_floating_point()]
    torch._foreach_lerp_(ours, theirs, 1.0 - decay)
