"""Batches for training: keyed by the step, shared among processes, read ahead."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ..data import Dataset, Order
from ..noise import Noise
from ..objective import Batch, Objective
from .parts import build
from .schema import Recipe, Train

__all__ = ["Batches", "examples", "moved", "positions_of"]


class Batches:
    """The batches of each step, cut into accumulated parts, read one step ahead in another thread. A context manager.

    Arguments:
        data: What is read.
        order: Which examples a step shows.
        recipe: What is done to them.
        positions: Places in the global batch of this process's examples, one tensor for each part.
        device: Where the training is.
        objective: Prepares what the parts of a step share; None for nothing.
    """

    def __init__(
        self,
        data: Dataset,
        order: Order,
        recipe: Recipe,
        positions: Sequence[Tensor],
        device: torch.device,
        objective: Objective | None = None,
    ):
        self.data, self.order, self.recipe, self.positions = data, order, recipe, positions
        self.device, self.objective, self.pool = device, objective, ThreadPoolExecutor(1)
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
        if self.objective is not None and not self.objective.ahead:  # processes exchange data in their main threads only
            parts = self._prepared(self.objective, parts, step)
        return [moved(part, self.device) for part in parts]

    def _read(self, step: int) -> list[Batch]:
        index = self.order.indices(step)
        parts = [examples(self.data, self.recipe, index[rows], rows, step) for rows in self.positions]
        if self.objective is not None and self.objective.ahead:
            parts = self._prepared(self.objective, parts, step)
        if self.device.type != "cuda":
            return parts
        return [p._replace(x0=p.x0.pin_memory(), cond={name: c.pin_memory() for name, c in p.cond.items()}) for p in parts]

    def _prepared(self, objective: Objective, parts: list[Batch], step: int) -> list[Batch]:
        """The parts with what they share: all of them see one set of references, and no example is drawn twice."""
        x0, index, cond = parts[0].x0, parts[0].index, parts[0].cond
        if len(parts) > 1:
            x0, index = torch.cat([part.x0 for part in parts]), torch.cat([part.index for part in parts])
            cond = {name: torch.cat([part.cond[name] for part in parts]) for name in cond}
        taken = self.order.indices(step)
        refs = objective.prepare(Batch(x0, index, cond), self.recipe.train.seed, step, taken, self.device)
        return [part._replace(refs=refs) for part in parts]


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
    cond = {name: value.to(device, non_blocking=True) for name, value in batch.cond.items()}
    return batch._replace(x0=batch.x0.to(device, non_blocking=True), cond=cond)


def positions_of(plan: Train, world: int, rank: int) -> tuple[Tensor, ...]:
    """Places in the global batch of this process's examples, one tensor for each accumulated part."""
    parts = world * plan.accumulate
    if plan.batch % parts:
        raise ValueError(f"`train.batch` = {plan.batch} must divide into {parts} parts ({world} processes x train.accumulate = "
                         f"{plan.accumulate}): choose a multiple")  # fmt: skip
    share = plan.batch // world
    return torch.arange(rank * share, (rank + 1) * share).chunk(plan.accumulate)
