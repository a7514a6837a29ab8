"""Whether a model remembers its training examples: are its images nearer to them than other real images are?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .features import Extractor
from .manifold import nearest
from .ranking import auroc
from .result import Result, features_of, protocol, same_width

__all__ = ["Memorisation", "memorisation"]

QUANTILE = 0.01
"""Share of held-out examples that are nearer to the training set than what is called a copy."""


@dataclass(frozen=True, eq=False)
class Memorisation:
    """How near images come to the training set, against how near real images come that it does not hold.

    Attributes:
        result: The chance that an image is nearer to its nearest training example than a held-out example is to its own: 0.5
            for images as new as held-out ones, 1 for copies. Details: "copies", the share of images nearer than 99 % of the
            held-out examples are, whose own share is 0.01; "median" distance and that of the "held_out"; the least, "closest".
        distance: From each image to the nearest training example (n,).
        index: Which one that is, int64 (n,).
        held_out: Distances of the held-out examples (m,).
    """

    result: Result
    distance: Tensor
    index: Tensor
    held_out: Tensor

    def closest(self, count: int = 16) -> Tensor:
        """Numbers of the images that come nearest, int64 (<= count,), the nearest first."""
        return self.distance.argsort(stable=True)[:count]

    def save(self, path: str | Path, images: Tensor, train: Tensor, count: int = 16) -> Path:
        """Writes the closest pairs as a PNG: an image and the training example below it, in two rows at a time.

        Arguments:
            path: The file.
            images: Those measured, (n, C, H, W) in [-1, 1].
            train: The training examples, (N, C, H, W) in [-1, 1].
            count: Number of pairs.
        """
        from ..reports.plots import save_grid

        shown = self.closest(count)
        width = min(len(shown), 8)
        shown = shown[: len(shown) // width * width]
        rows = zip(shown.split(width), self.index[shown].split(width), strict=True)
        return save_grid(torch.cat([torch.cat([images[own].cpu(), train[theirs].cpu()]) for own, theirs in rows]), path, width)


def memorisation(
    images: Tensor,
    train: Tensor,
    held_out: Tensor,
    extractor: Extractor | None = None,
    *,
    reference_name: str = "reference",
    seeds: Sequence[int] = (),
    weights: str = "unstated",
) -> Memorisation:
    """Compares distances to the nearest training example between images and held-out examples.

    The comparison is that of ranks (Mann and Whitney), so it does not ask for a threshold. Images that are blurred or less
    varied than real ones come nearer without being copies: look at the pairs.

    Arguments:
        images: Images (n, C, H, W) in [-1, 1].
        train: What the model was trained on (N, C, H, W).
        held_out: Real ones that it was not trained on (m, C, H, W).
        extractor: What distances are measured on; None compares pixels.
        reference_name: Name of the data, for the protocol.
        seeds: Seeds the images were drawn with, for the protocol.
        weights: Weights they were drawn with, for the protocol.

    Raises:
        ValueError: For fewer than two samples, unequal shapes, or features that are not finite.

    References:
        | A Non-Parametric Test to Detect Data-Copying in Generative Models (Meehan, Chaudhuri, Dasgupta, 2020)
        | https://arxiv.org/abs/2004.05675
    """
    extractor = extractor or Extractor.pixels()
    real = features_of(train, extractor, "train")
    new, other = (features_of(x, extractor, what) for x, what in ((images, "images"), (held_out, "held_out")))
    for features, what in ((new, "images"), (other, "held_out")):
        same_width(features, real, what, "train")
    (distance, index), (own, _) = nearest(new, real), nearest(other, real)
    distance, own = distance[:, 0], own[:, 0]
    area = auroc(-torch.cat([distance, own]), torch.arange(len(new) + len(other)) < len(new))
    details = {
        "copies": float((distance < own.quantile(QUANTILE)).double().mean()),
        "median": float(distance.median()),
        "held_out": float(own.median()),
        "closest": float(distance.min()),
    }
    facts = protocol(len(new), len(real), reference_name, extractor, seeds, weights, {"n_held_out": len(other)})
    result = Result("nearer than held out", area.value, area.uncertainty, facts, details)
    return Memorisation(result, distance, index[:, 0], own)
