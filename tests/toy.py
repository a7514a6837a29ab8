"""A tiny run, for tests of what surrounds training."""

from __future__ import annotations

from pathlib import Path

import torch

from quieten.data import Dataset
from quieten.training.config import Recipe, parse_recipe, resolve, with_overrides
from quieten.training.runs import Run

BASE = {
    "version": 1,
    "name": "toy",
    "data": {"name": "toy", "flip": True},
    "model": {"net": {"kind": "unet", "width": 8, "detail": 4, "dropout": 0.2}},
    "train": {"images": 64, "batch": 8, "warmup": 16, "ema": 100, "log_every": 1, "save_minutes": None, "lr": 1e-3},
    "sample": {"steps": 2},
}


def toy_data(n: int = 30) -> Dataset:
    """Labelled 8x8 pictures of noise and a bright half."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(n, 1, 8, 8, generator=generator) - 1.0
    labels = torch.arange(n) % 2
    images[labels == 1, :, 4:] += 1.0
    return Dataset("toy", images, labels, ("top", "bottom"))


def toy_recipe(*overrides: str, data: Dataset | None = None) -> Recipe:
    """The recipe of a toy run, with its data's shape."""
    return resolve(with_overrides(parse_recipe(BASE, "toy"), overrides), toy_data() if data is None else data)


def toy_run(path: Path, *overrides: str, data: Dataset | None = None) -> Run:
    """A new toy run."""
    return Run.create(path, toy_recipe(*overrides, data=data))
