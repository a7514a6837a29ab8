"""Where the references of stable targets come from.

A pool keeps the target unbiased: given the set that it draws, each member is as likely as any other to be the example that
was noised. Whatever is decided before noise is drawn keeps that, such as groups of neighbours, or sets of one class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..data import Dataset
from ..noise import Noise
from .posterior import unpacked

PoolName = Literal["bank", "batch", "class", "cluster", "gather", "loader"]
POOLS: tuple[str, ...] = get_args(PoolName)
"""Names of the pools, for recipes."""

__all__ = [
    "POOLS",
    "BankPool",
    "ClassPool",
    "ClusterPool",
    "GatherPool",
    "LoaderPool",
    "PoolName",
    "ReferencePool",
    "References",
    "distinct",
    "make_pool",
    "micro_clusters",
]


class References(NamedTuple):
    """Clean examples to average over.

    Attributes:
        x0: (n, *): floats, or uint8 pixels that stand for k / 127.5 - 1.
        index: Their places in the data set, int64 (n,), on the CPU. Examples that are not there keep the plain target.
        cond: Their conditions by name, each (n, ...).
        mixed: Which of them examples without a condition may use, bool (n,); None is all. Where references were chosen for
            their class, together they do not follow the distribution of the data.
    """

    x0: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    cond: dict[str, Tensor]
    mixed: Tensor | None = None


class ReferencePool:
    """The mini-batch itself: references that cost nothing. Other pools add to it.

    Attributes:
        ahead: Whether `draw` may run in the thread that reads ahead.
    """

    ahead = True

    def draw(
        self,
        source_ids: Tensor,
        n: int | None,
        cond: Mapping[str, Tensor] | None = None,
        *,
        x0: Tensor | None = None,
        taken: Tensor | None = None,
        seed: int = 0,
        step: int = 0,
        device: torch.device | None = None,
    ) -> References:
        """References for a step: a function of the arguments alone.

        Arguments:
            source_ids: Places in the data set of the examples that are noised, int64 (S,): always among the references.
            n: How many references in all, S at least; None is everything the pool has.
            cond: Conditions of the sources, by name, each (S, ...).
            x0: The sources themselves (S, *), exactly as they are noised; None reads them from the pool's own data.
            taken: Places that no further reference may have, int64: the examples of all processes; None is the sources.
            seed: Of the training.
            step: Of the training.
            device: Where the references are needed; None is where x0 is.

        Raises:
            ValueError: If x0 is missing and the pool has no data of its own.
        """
        if x0 is None:
            raise ValueError("`x0` is missing: the mini-batch is its own pool, give its examples")
        device = device or x0.device
        return References(x0.to(device), source_ids.cpu(), {name: value.to(device) for name, value in (cond or {}).items()})

    def __deepcopy__(self, memo: object) -> ReferencePool:
        return self  # never changes but for where it lies, and may hold a whole data set


class GatherPool(ReferencePool):
    """The mini-batches of all processes: each is a reference for every other."""

    ahead = False

    def draw(
        self,
        source_ids: Tensor,
        n: int | None,
        cond: Mapping[str, Tensor] | None = None,
        *,
        x0: Tensor | None = None,
        taken: Tensor | None = None,
        seed: int = 0,
        step: int = 0,
        device: torch.device | None = None,
    ) -> References:
        own = super().draw(source_ids, n, cond, x0=x0, device=device)
        where = own.x0.device
        return References(
            _gathered(own.x0),
            _gathered(own.index.to(where)).cpu(),
            {name: _gathered(value) for name, value in sorted(own.cond.items())},
        )


class BankPool(ReferencePool):
    """A data set kept where the network is, as it is stored: pixels as bytes, 150 MB for CIFAR-10.

    Arguments:
        data: The data set, or examples (N, *), floats or uint8 pixels.
        labels: Of the examples, int64 (N,), when they are not in a `Dataset`.

    Example:
        >>> pool = BankPool(torch.arange(10.0)[:, None])
        >>> pool.draw(torch.tensor([3]), 4, x0=torch.tensor([[3.0]])).x0.shape
        torch.Size([4, 1])
    """

    def __init__(self, data: Dataset | Tensor, labels: Tensor | None = None):
        if isinstance(data, Dataset):
            labels = data.labels
            data = data.images if isinstance(data.images, Tensor) else data.images[torch.arange(len(data))]
        if data.dtype != torch.uint8 and not data.is_floating_point():
            raise ValueError(f"`data` must be floats or uint8 pixels (got {data.dtype}): convert it")
        self.x0, self.labels, self.count = data, labels, len(data)

    def extra(self, source_ids: Tensor, n: int, taken: Tensor, seed: int, step: int) -> Tensor:
        """Places of n further references, int64: drawn evenly, none twice."""
        return distinct(n, self.count, taken, seed, step)

    def mixed(self, sources: int, more: int) -> Tensor | None:
        """As in `References`."""
        return None

    def read(self, index: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Examples as they are stored, and their labels."""
        self._place(device)
        index = index.to(device)
        return self.x0[index], None if self.labels is None else self.labels[index]

    def draw(
        self,
        source_ids: Tensor,
        n: int | None,
        cond: Mapping[str, Tensor] | None = None,
        *,
        x0: Tensor | None = None,
        taken: Tensor | None = None,
        seed: int = 0,
        step: int = 0,
        device: torch.device | None = None,
    ) -> References:
        device = device or (self.x0 if x0 is None else x0).device
        source_ids = source_ids.cpu()
        if n is None or n >= self.count:
            self._place(device)
            return References(self.x0, torch.arange(self.count), {} if self.labels is None else {"label": self.labels})
        more = self.extra(source_ids, max(0, n - len(source_ids)), source_ids if taken is None else taken.cpu(), seed, step)
        mixed = self.mixed(len(source_ids), len(more))
        cond = dict(cond or {})
        if x0 is None:
            x0, label = self.read(source_ids, device)
            cond = {} if label is None else {"label": label}
        values, label = self.read(more, device)
        x0 = x0.to(device)
        values = values if values.dtype == x0.dtype else unpacked(values, x0.dtype)
        known = {} if label is None or "label" not in cond else {"label": torch.cat([cond["label"].to(device), label])}
        return References(torch.cat([x0, values]), torch.cat([source_ids, more]), known, mixed)

    def _place(self, device: torch.device) -> None:
        self.x0 = self.x0.to(device)
        self.labels = None if self.labels is None else self.labels.to(device)


class LoaderPool(BankPool):
    """A further batch of examples, read from the data set in every step: for data that fit no memory."""

    def __init__(self, data: Dataset):
        self.data, self.x0, self.labels, self.count = data, torch.empty(0), None, len(data)

    def read(self, index: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
        x0, label = self.data.batch(index)
        return x0.to(device), None if label is None else label.to(device)

    def _place(self, device: torch.device) -> None:
        raise ValueError("`references` asks for all examples in every step: take the pool 'bank', or fewer references")


class ClassPool(BankPool):
    """References of the classes of the batch, as many for each example: with many classes, a shared set has few of each.

    Examples whose label was dropped use the batch alone, since the others do not follow the distribution of the data.

    Raises:
        ValueError: For data without labels.
    """

    def __init__(self, data: Dataset | Tensor, labels: Tensor | None = None):
        super().__init__(data, labels)
        if self.labels is None:
            raise ValueError("`pool` 'class' needs labels: take the pool 'bank' for data without")
        order = self.labels.cpu().argsort(stable=True)
        counts = torch.bincount(self.labels.cpu())
        self.members = order.split(counts.tolist())
        self.label_of = self.labels.cpu()

    def extra(self, source_ids: Tensor, n: int, taken: Tensor, seed: int, step: int) -> Tensor:
        share, parts = n // max(1, len(source_ids)), [torch.empty(0, dtype=torch.int64)]
        for label, times in zip(*(t.tolist() for t in self.label_of[source_ids].unique(return_counts=True)), strict=True):
            members = self.members[label]
            gone = torch.searchsorted(members, taken[self.label_of[taken] == label])
            parts.append(members[distinct(share * times, len(members), gone, seed, step, f"references {label}")])
        return torch.cat(parts)

    def mixed(self, sources: int, more: int) -> Tensor | None:
        return torch.arange(sources + more) < sources


class ClusterPool(BankPool):
    """Whole groups of near neighbours: those of the batch, and others at random.

    Neighbours share weight at low noise, where distant references have none. The groups are fixed, all of one size; examples
    that are left over keep the plain target.

    Arguments:
        data: As in `BankPool`.
        labels: As in `BankPool`.
        size: Of a group.
    """

    def __init__(self, data: Dataset | Tensor, labels: Tensor | None = None, size: int = 16):
        super().__init__(data, labels)
        self.clusters = micro_clusters(unpacked(self.x0.cpu().flatten(1), torch.float32), size)
        self.cluster_of = torch.full((self.count,), -1)
        self.cluster_of[self.clusters] = torch.arange(len(self.clusters))[:, None]

    def draw(
        self,
        source_ids: Tensor,
        n: int | None,
        cond: Mapping[str, Tensor] | None = None,
        *,
        x0: Tensor | None = None,
        taken: Tensor | None = None,
        seed: int = 0,
        step: int = 0,
        device: torch.device | None = None,
    ) -> References:
        device = device or (self.x0 if x0 is None else x0).device
        own, others = (self.cluster_of[ids.cpu()].unique() for ids in (source_ids, source_ids if taken is None else taken))
        own, others = own[own >= 0], others[others >= 0]
        wanted = len(self.clusters) if n is None else -(-n // self.clusters.shape[1])
        more = distinct(max(0, wanted - len(own)), len(self.clusters), others, seed, step)
        index = self.clusters[torch.cat([own, more])].flatten()
        values, label = self.read(index, device)
        known = {} if label is None else {"label": label}
        return References(values, index, known)


def make_pool(name: PoolName, data: Dataset | None, cluster: int = 16) -> ReferencePool:
    """A pool by name.

    Arguments:
        name: In `POOLS`.
        data: What it draws from; "batch" and "gather" need none.
        cluster: Size of the groups of "cluster".

    Raises:
        ValueError: Without data for a pool that draws from them.
    """
    if name == "batch":
        return ReferencePool()
    if name == "gather":
        return GatherPool()
    if data is None:
        raise ValueError(f"`pool` {name!r} draws from the data: give them, or take the pool 'batch'")
    if name == "cluster":
        return ClusterPool(data, size=cluster)
    return {"bank": BankPool, "loader": LoaderPool, "class": ClassPool}[name](data)


# ---- its parts


def distinct(n: int, total: int, taken: Tensor, seed: int, step: int, tag: str = "references") -> Tensor:
    """n different numbers below `total`, drawn evenly from those that are not taken, int64 (n,); all that is left if fewer."""
    taken = taken.unique()
    n = min(n, total - len(taken))
    if n <= 0:
        return torch.empty(0, dtype=torch.int64)
    if 2 * (n + len(taken)) > total:  # most of them: shuffle
        key = Noise(seed, torch.arange(total)).uniform(step, tag)
        key[taken] = 2.0
        return key.argsort(stable=True)[:n]
    drawn = torch.empty(0, dtype=torch.int64)
    tries = 2 * n + 16
    while len(drawn) < n:  # the first n different ones of a sequence
        sequence = (Noise(seed, torch.arange(tries)).uniform(step, tag) * total).long()
        kept = sequence[~torch.isin(sequence, taken)]
        value, place = kept.unique(return_inverse=True)
        first = torch.full((len(value),), len(kept)).scatter_reduce(0, place, torch.arange(len(kept)), "amin")
        drawn, tries = kept[first.sort().values], 2 * tries
    return drawn[:n]


def micro_clusters(x: Tensor, size: int) -> Tensor:
    """Groups of near neighbours, all of one size: the data halved again and again across the direction in which they vary most.

    Arguments:
        x: Examples (N, D).
        size: Of a group, at least 2 and at most N.

    Returns:
        int64 (N // size, size): places of the members; the N % size examples that are left over are in none.
    """
    if not 2 <= size <= len(x):
        raise ValueError(f"`cluster` must be a size from 2 to the {len(x)} examples (got {size})")
    whole = torch.arange(len(x) - len(x) % size)
    groups: list[Tensor] = []
    todo = [whole]
    while todo:
        part = todo.pop()
        if len(part) == size:
            groups.append(part)
            continue
        rows = x[part] - x[part].mean(0)
        direction = rows[rows.square().sum(1).argmax()]
        for _ in range(8):  # power iteration: any direction of large variance will do
            direction = rows.T @ (rows @ direction)
            direction = direction / direction.norm().clamp(min=1e-30)
        order = part[(rows @ direction).argsort(stable=True)]
        middle = (len(part) // size + 1) // 2 * size
        todo += [order[middle:], order[:middle]]
    return torch.stack(groups)


def _gathered(x: Tensor) -> Tensor:
    """Rows of all processes, in their order."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return x
    parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)
