"""States of trajectories with all that belongs to them, and the randomness of an iteration."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..noise import Draws, Noise
from .policy import Rollout

__all__ = ["Pairs", "checked", "gathered", "keyed", "same_dtype", "shared_uniforms", "shuffled", "unseeded"]


@dataclass(frozen=True)
class Pairs:
    """Some pairs (x_k, k) of trajectories, ordered by step.

    Attributes:
        x: States x_k (B, *).
        k: Their steps, int64 (B,) on the CPU, rising.
        cond: The conditions of their trajectories, each (B, ...).
        rollouts: Where they are from.
        places: In which rollout and in which of its rows, int64 (B,) each, on the CPU.
    """

    x: Tensor
    k: Tensor
    cond: Mapping[str, Any]
    rollouts: Sequence[Rollout]
    places: tuple[Tensor, Tensor]

    def next(self) -> Tensor:
        """The states x_{k+1} that the trajectories went on to: (B, *)."""
        return self.pick([roll.states for roll in self.rollouts], self.k + 1)

    def pick(self, tables: Sequence[Tensor], k: Tensor | None = None) -> Tensor:
        """Entries of tables (steps, B, *) of each rollout, at this step and row of each pair; of steps k where given."""
        return _picked(tables, *self.places, self.k if k is None else k)


def gathered(rollouts: Sequence[Rollout], pairs: Tensor, T: int) -> Pairs:
    """The pairs of some numbers (B,) on the CPU, counted by rollout, then step, then row."""
    size = max(1, rollouts[0].moves.shape[1])
    k = pairs % (T * size) // size
    order = k.argsort(stable=True)
    pairs, k = pairs[order], k[order]
    places = (pairs // (T * size), pairs % size)
    names = rollouts[0].cond
    cond = {name: _picked([roll.cond[name][None] for roll in rollouts], *places, torch.zeros_like(k)) for name in names}
    return Pairs(_picked([roll.states for roll in rollouts], *places, k), k, cond, rollouts, places)


def _picked(tables: Sequence[Tensor], which: Tensor, row: Tensor, k: Tensor) -> Tensor:
    """tables[which][k, row], without a copy of anything else."""
    device = tables[0].device
    if len(tables) == 1:
        return tables[0][k.to(device), row.to(device)]
    out = tables[0].new_empty(len(k), *tables[0].shape[2:])
    for i, table in enumerate(tables):
        mine = (which == i).nonzero().flatten()
        out[mine.to(device)] = table[k[mine].to(device), row[mine].to(device)]
    return out


def shuffled(draws: Draws, groups: int, tag: str) -> Tensor:
    """All of groups x B numbers, on the CPU: each stretch of B has every row once, of a random group.

    What a row does depends on that row alone, so that processes together draw what one would.
    """
    chosen = torch.stack([draws.uniform(f"{tag} {i}") for i in range(groups)]).argsort(0)
    return (chosen * len(draws) + torch.arange(len(draws))).flatten()


def keyed(draws: Draws, tag: str) -> Callable[[int, Tensor], Tensor]:
    """The normals of a rollout: (step, like) -> noise."""
    return lambda step, like: draws.normal(like, f"{tag} {step}")


def shared_uniforms(draws: Draws, tag: str, n: int) -> Tensor:
    """n uniforms in (0, 1) that all processes share: float64 on the CPU."""
    return Noise(draws.noise.seed, range(n)).uniform(draws.step, tag)


def unseeded(n: int) -> Draws:
    """Randomness for n examples from torch's generator."""
    return Draws(int(torch.randint(2**62, ())), 0, range(n))


def checked(cond: Mapping[str, Tensor] | None, n: int) -> dict[str, Tensor]:
    """Conditions of n rows.

    Raises:
        ValueError: If one has another number of rows.
    """
    for name, value in (cond or {}).items():
        if not isinstance(value, Tensor) or value.ndim < 1 or len(value) != n:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"condition `{name}` must have a first axis of {n}, one row for each example (got {got})")
    return dict(cond or {})


@contextlib.contextmanager
def same_dtype(x0: Tensor, module: nn.Module) -> Iterator[None]:
    """Names the dtype of data, where that is why torch refuses to work with a module's parameters.

    Raises:
        ValueError: In place of torch's RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        own = next((p.dtype for p in module.parameters() if p.is_floating_point()), x0.dtype)
        if own == x0.dtype:
            raise
        raise ValueError(f"`x0` is {x0.dtype} and the policy {own}: cast one of them, as by x0.to({own}) ({error})") from error
