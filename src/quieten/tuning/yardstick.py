"""How far samples are from data that nobody trained on: what a checkpoint is chosen by."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ..data import Dataset
from ..metrics import Result, frechet, sliced_wasserstein
from ..metrics.features import Extractor
from ..metrics.statistics import Statistics

__all__ = ["KINDS", "Yardstick", "held_out"]

KINDS = ("auto", "zoo", "pixels", "sliced")
"""Frechet distance on the classifier of the zoo or on the examples themselves, sliced Wasserstein; "auto" takes what suits."""

WIDEST = 256
"""Dimensions up to which "auto" takes the Frechet distance of the examples themselves."""


class Yardstick:
    """A distance to held-out data, of a fixed number of samples.

    Arguments:
        train: What is trained on, for the floor and the spread.
        held: What is not.
        kind: One of `KINDS`.
        n: Samples of each measurement.
        seed: Of the choice of examples and of random projections.

    Attributes:
        title: What it is, in a word.
        about: Name of the distance, its n and its reference, in words.
        floor: The distance of n training examples, which no sampler can be expected to go below.
        real: Those n training examples (n, *).

    Raises:
        ValueError: For an unknown kind, or one that does not suit the data.
    """

    title = "distance"

    def __init__(self, train: Dataset, held: Dataset, kind: str = "auto", n: int = 1000, seed: int = 0):
        if kind not in KINDS:
            raise ValueError(f"`distance` must be one of {', '.join(KINDS)} (got {kind!r})")
        if n < 16:
            raise ValueError(f"`n` must be at least 16 samples for a distance (got {n})")
        generator = torch.Generator().manual_seed(seed)
        self.n, self.seed, self.name = n, seed, f"{held.name}, held out"
        self.pictures = train.images.dtype == torch.uint8
        self.extractor = _extractor(kind, train)
        self.real, _ = train.batch(torch.randperm(len(train), generator=generator)[:n])
        held_x, _ = held.batch(torch.randperm(len(held), generator=generator)[: max(n, 10_000)])
        self.reference: Tensor | Statistics = held_x
        if self.extractor is not None:
            self.reference = Statistics.of(self.extractor.extract(held_x), self.extractor.hash)
        self.floor = self(self.real)
        what = "sliced Wasserstein" if self.extractor is None else f"Frechet ({self.extractor.name})"
        self.about = f"{what}, n={n} against {len(held_x)} held out"

    def __call__(self, x: Tensor) -> Result:
        """The distance of samples x (n, *); pictures are held in [-1, 1], as when they are written."""
        x = x.detach().cpu().float()
        x = x.clamp(-1.0, 1.0) if self.pictures else x
        if self.extractor is None:
            assert isinstance(self.reference, Tensor)
            return sliced_wasserstein(
                x.flatten(1), self.reference.flatten(1), 500, self.seed, reference_name=self.name, weights="ema"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few samples for the features: the floor, of as many, says how much that matters
            return frechet(x, self.reference, self.extractor, reference_name=self.name, weights="ema")


def held_out(data: Dataset, name_or_path: str | Path) -> tuple[Dataset, Dataset]:
    """What to train on and what to keep: the set's own test split, else every tenth example.

    Arguments:
        data: The training split, as it is trained on.
        name_or_path: Where it came from.
    """
    from ..data import load

    shape = data.shape
    pictures = len(shape) == 3 and shape[0] in (1, 3) and data.images.dtype == torch.uint8
    size, channels = (shape[-1], shape[0]) if pictures else (None, None)
    try:
        test = load(name_or_path, split="test", size=size, channels=channels)
    except (ValueError, OSError):
        test = None
    if test is not None and test.shape == shape and len(test) >= 16:
        return data, test
    tenth = torch.arange(len(data)) % 10 == 9
    if int(tenth.sum()) < 16:
        raise ValueError(f"`data` {data.name} has {len(data)} examples: a tenth of them is too few to hold out, give more")
    return data.subset(~tenth), data.subset(tenth)


def _extractor(kind: str, data: Dataset) -> Extractor | None:
    dims = math.prod(data.shape)
    if kind in ("auto", "zoo"):
        try:
            return Extractor.zoo(data.name)
        except ValueError:
            if kind == "zoo":
                raise
    if kind == "pixels" or (kind == "auto" and dims <= WIDEST):
        return Extractor.pixels()
    return None
