"""What is measured by likelihood: the options that say so, the examples, and the decoder of their kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import Dataset, Order, load
from ..likelihoods.decoders import Decoder, Dequantised, Discretised, Flat, Plain
from ..training.source import Source

__all__ = ["Asked", "Examples", "decoder_of", "examples_of", "load_data"]


@dataclass(frozen=True)
class Examples:
    """Data as the denoiser sees them, float32 (N, *), and their conditions."""

    x0: Tensor
    cond: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.x0)

    def on(self, device: torch.device) -> Examples:
        return Examples(self.x0.to(device), {name: value.to(device) for name, value in self.cond.items()})


@dataclass(frozen=True)
class Asked:
    """The options of the command, by their names."""

    estimator: str = "bound"
    steps: int = 50
    n: int | None = None
    split: str = "test"
    variance: str | None = None
    draws: int = 1
    probes: int | None = None
    tolerance: float | None = None
    bound_grid: str = "linear"
    decoder: str = "discretised"
    compat: str | None = None
    clip: bool | None = None
    fit: int = 128
    levels: int = 200
    seed: int = 0
    out: Path | None = None
    batch: int = 64
    weights: str = "ema"
    device: str | None = None


def examples_of(source: Source, name: str, asked: Asked) -> tuple[Examples, Examples, Dataset]:
    """What is evaluated, other examples, of the training data, for what is fitted, and all of the data.

    Raises:
        ValueError: For data that do not fit the model, or too few of them.
    """
    shape = source.denoiser.shape if source.encode is None else source.image
    size = {"channels": shape[0], "size": shape[1]} if shape is not None and len(shape) == 3 else {}
    split, seed = asked.split, asked.seed
    whole, train = (load_data(name, part, size) for part in (split, "train"))
    n = min(500, len(whole) if split == "test" else len(whole) // 2) if asked.n is None else asked.n
    if n > len(whole):
        raise ValueError(f"`-n {n}` exceeds the {len(whole)} examples of {whole.name}'s {split} data: give fewer")
    index = Order(len(whole), n, seed).indices(0)
    if split == "train":
        rest = torch.ones(len(train), dtype=torch.bool)
        rest[index] = False
        train = train.subset(rest)
    if not len(train):
        raise ValueError(f"`-n {n}` leaves no training example to fit the decoder on: give fewer")
    other = Order(len(train), min(asked.fit, len(train)), seed + 1).indices(0)
    return _examples(source, whole, index), _examples(source, train, other), whole


def load_data(name: str, split: str, size: Mapping[str, Any]) -> Dataset:
    """A part of some data, resized unless they are floats."""
    try:
        return load(name, split=split, **size)
    except ValueError as error:
        if size and "holds floats" in str(error):  # which no resizing can change
            return load_data(name, split, {})
        if split == "test" and "`split`" in str(error):
            raise ValueError(
                f"{name} has no test data of its own: give --split train, and mind what the model has seen"
            ) from error
        raise


def _examples(source: Source, data: Dataset, index: Tensor) -> Examples:
    x0, labels = data.batch(index)
    if source.encode is not None:
        x0 = source.encode(x0.to(source.denoiser.device)).float().cpu()
    shape = source.denoiser.shape
    if shape is not None and tuple(x0.shape[1:]) != tuple(shape):
        raise ValueError(f"{data.name} has examples of shape {tuple(x0.shape[1:])}, this model {tuple(shape)}: give other data")
    if source.prompt is not None:
        raise ValueError("this model draws what a text says, and data have none: the likelihood needs a model without text")
    if not source.classes:
        return Examples(x0, {})
    if labels is not None and len(data.classes) == len(source.classes):
        return Examples(x0, {"label": labels})
    if not source.null:
        raise ValueError(f"this model needs labels of {len(source.classes)} classes, {data.name} has "
                         f"{len(data.classes) or 'none'}: give the data it was trained on")  # fmt: skip
    return Examples(x0, {name: torch.full((len(x0),), value) for name, value in source.null.items()})


def decoder_of(source: Source, data: Dataset, asked: Asked) -> Decoder:
    """The kind of decoder, its variance still to be fitted."""
    name = "dequantised" if asked.estimator == "ode" else asked.decoder
    if source.encode is not None or not _of_bytes(data):
        if asked.decoder != "discretised":
            raise ValueError(f"`--decoder {name}` is for 8-bit data: leave it out")
        return Plain()
    if name == "flat":
        return Flat(source.denoiser.process)
    return Dequantised() if name == "dequantised" else Discretised(compat=asked.compat)


def _of_bytes(data: Dataset) -> bool:
    return not isinstance(data.images, Tensor) or data.images.dtype == torch.uint8
