"""Batches for training: keyed by the step, shared among processes, read ahead."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from .data import Dataset, Order
from .noise import Noise
from .objective import Batch
from .parts import build
from .schema import Recipe, Train

__all__ = ["Batches", "examples", "moved", "positions_of"]


class Batches:
    """The batches of each step, cut into accumulated parts, read one step ahead in another thread. A context manager."""

    def __init__(self, data: Dataset, order: Order, recipe: Recipe, positions: Sequence[Tensor], device: torch.device):
        self.data, self.order, self.recipe, self.positions = data, order, recipe, positions
        self.device, self.pool = device, ThreadPoolExecutor(1)
        self.ahead: dict[int, Future[list[Batch]]] = {}

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)

    def at(self, step: int) -> list[Batch]:
        """The parts of a step, on the device."""
        ready = self.ahead.pop(step, None)
        parts = self._read(step) if ready is None else ready.result()
        self.ahead = {step + 1: self.pool.submit(self._read, step + 1)}
        return [moved(part, self.device) for part in parts]

    def _read(self, step: int) -> list[Batch]:
        index = self.order.indices(step)
        parts = [examples(self.data, self.recipe, index[rows], rows, step) for rows in self.positions]
        if self.device.type != "cuda":
            return parts
        return [Batch(p.x0.pin_memory(), p.index, {name: c.pin_memory() for name, c in p.cond.items()}) for p in parts]


def examples(data: Dataset, recipe: Recipe, index: Tensor, positions: Tensor, step: int) -> Batch:
    """Examples of a step, mirrored and augmented as their places in the global batch say.

    What a section `augment` did to each is its condition "augment", which the network sees.
    """
    noise = Noise(recipe.train.seed, positions)
    mirrored: bool | Tensor = noise.uniform(step, "flip") < 0.5 if recipe.data.flip else False
    x0, label = data.batch(index, mirrored)
    cond = {} if label is None else {"label": label}
    augment = recipe.section("augment")
    if augment is not None:
        x0, cond["augment"] = build("augment", augment.kind, augment.options)(x0, noise, step)
    return Batch(x0, index, cond)


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device; the indices stay, since they are for data and noise."""
    if device.type == "cpu":
        return batch
    return Batch(
        batch.x0.to(device, non_blocking=True), batch.index, {n: c.to(device, non_blocking=True) for n, c in batch.cond.items()}
    )


def positions_of(plan: Train, world: int, rank: int) -> tuple[Tensor, ...]:
    """Places in the global batch of this process's examples, one tensor for each accumulated part."""
    parts = world * plan.accumulate
    if plan.batch % parts:
        raise ValueError(f"`train.batch` = {plan.batch} must divide into {parts} parts ({world} processes x train.accumulate = "
                         f"{plan.accumulate}): choose a multiple")  # fmt: skip
    share = plan.batch // world
    return torch.arange(rank * share, (rank + 1) * share).chunk(plan.accumulate)
