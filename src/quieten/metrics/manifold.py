"""Whether images lie where real ones lie, and real ones where images lie: precision, recall, density, coverage.

A set is taken for the union of balls around its members, each as wide as to reach the k-th nearest other member.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .features import Extractor
from .result import Result, features_of, halves, protocol, same_width, spread

__all__ = ["Manifold", "nearest", "prdc"]

GROUPS = 20
CHUNK = 1024
"""Rows and columns of the largest part of a matrix of distances that is ever there at once."""


@dataclass(frozen=True, eq=False)
class Manifold:
    """Features with the radii of their balls: worked out once for a reference that many sets are measured against.

    Arguments:
        features: float64 (m, F).
        radii: Distance to the k-th nearest other member (m,), by k.
        extractor: Hash of the extractor that made the features, empty if unknown.
    """

    features: Tensor
    radii: dict[int, Tensor]
    extractor: str = ""

    @classmethod
    def of(cls, features: Tensor, ks: Sequence[int] = (3, 5), extractor: str = "") -> Manifold:
        """The balls of features (m, F) that reach the k-th neighbours.

        Raises:
            ValueError: If there are not more than k samples, or k is not positive.
        """
        most = max(ks)
        if min(ks) < 1 or len(features) <= most:
            raise ValueError(f"`k` {tuple(ks)} must be at least 1 and less than the number of samples, {len(features)}: take "
                             "a smaller one, or more samples")  # fmt: skip
        features = features.double()
        near = nearest(features, features, most, skip_self=True)[0] * (1 + 1e-9)  # so that rounding leaves the rim inside
        return cls(features, {k: near[:, k - 1].contiguous() for k in ks}, extractor)


def prdc(
    images: Tensor,
    reference: Tensor | Manifold,
    extractor: Extractor,
    *,
    k: int | tuple[int, int] = (3, 5),
    splits: int = 5,
    seed: int = 0,
    reference_name: str = "reference",
    seeds: Sequence[int] = (),
    weights: str = "unstated",
) -> dict[str, Result]:
    """Precision and recall, density and coverage.

    - precision: share of images within a ball of a real one;
    - recall: share of real images within a ball of an image;
    - density: real balls that an image lies in, over k, on average: it may exceed 1, and forgives a single outlier among the
      real images;
    - coverage: share of real balls with an image in them.

    A point on the rim of a ball is inside. Recall and coverage grow with the number of images: compare at equal n. No matrix of
    distances larger than a block is built. The uncertainty is one standard error over draws of the images, the reference being
    fixed: of the mean, for precision and density; by random halves as in `frechet`, for recall and coverage.

    Arguments:
        images: Images (n, C, H, W) in [-1, 1].
        reference: Real images in [-1, 1], or the `Manifold` of their features.
        extractor: What distances are measured on.
        k: Which neighbour a ball reaches: for precision and recall, and for density and coverage. The papers have 3 and 5.
        splits: Random halvings; 0 skips the uncertainty of recall.
        seed: Of the halvings and the groups.
        reference_name: Name of the reference, for the protocol.
        seeds: Seeds the images were drawn with, for the protocol.
        weights: Weights they were drawn with, for the protocol.

    Returns:
        "precision", "recall", "density" and "coverage".

    Raises:
        ValueError: For too few samples, features that are not finite, or a reference from another extractor.

    References:
        | Improved Precision and Recall Metric for Assessing Generative Models (Kynkaanniemi et al., 2019), eq. 1 to 2
        | https://arxiv.org/abs/1904.06991
        | Reliable Fidelity and Diversity Metrics for Generative Models (Naeem et al., 2020), eq. 3 to 4
        | https://arxiv.org/abs/2002.09797
    """
    first, second = (k, k) if isinstance(k, int) else k
    features = features_of(images, extractor, "images")
    real = _manifold(reference, extractor, (first, second))
    same_width(features, real.features, "images", "reference")
    parts = [part for pair in halves(len(features), splits, seed) for part in pair if len(pair[0]) > first]
    inside, density, recalled, covered = _counted(features, real, first, second, [torch.arange(len(features)), *parts], seed)
    recall = recalled.double().mean(1).tolist()
    n, m = len(features), len(real.features)

    def result(name: str, which: int, value: float, error: float | None) -> Result:
        extra = {"k": which, "splits": splits, "seed": seed}
        return Result(name, value, error, protocol(n, m, reference_name, extractor, seeds, weights, extra))

    return {
        "precision": result("precision", first, float(inside.double().mean()), _error_of_mean(inside.double())),
        "recall": result("recall", first, recall[0], spread(list(zip(recall[1::2], recall[2::2], strict=True)))),
        "density": result("density", second, float(density.mean()), _error_of_mean(density)),
        "coverage": result("coverage", second, float((covered > 0).any(0).double().mean()), _left_out(covered)),
    }


def _manifold(reference: Tensor | Manifold, extractor: Extractor, ks: Sequence[int]) -> Manifold:
    if not isinstance(reference, Manifold):
        return Manifold.of(features_of(reference, extractor, "reference"), ks, extractor.hash)
    if reference.extractor and reference.extractor != extractor.hash:
        names = f"{reference.extractor[:8]} and not {extractor.hash[:8]}"
        raise ValueError(f"`reference` comes from extractor {names}: compute both with the same one")
    missing = [k for k in ks if k not in reference.radii]
    if missing:
        raise ValueError(f"`reference` has no balls for `k` {missing[0]} (it has {sorted(reference.radii)}): make it with "
                         f"Manifold.of(features, {tuple(ks)})")  # fmt: skip
    return reference


def _counted(
    features: Tensor, real: Manifold, first: int, second: int, parts: Sequence[Tensor], seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One pass over the distances of images to real ones, by which all four are known.

    Returns:
        For each image: whether it is in a real ball (n,), and its density (n,). Which real ones lie in a ball of each part of
        the images (P, m). How many images of each of G random groups are in each real ball (G, m).
    """
    n, m = len(features), len(real.features)
    reach = features.new_full((len(parts), n), -1.0)  # of the balls of each part; nothing is in those of others
    for row, part in zip(reach, parts, strict=True):
        row[part] = Manifold.of(features[part], (first,)).radii[first]
    count = min(GROUPS, n)
    group = torch.randperm(n, generator=torch.Generator().manual_seed(seed)) % count
    members = torch.nn.functional.one_hot(group, count).float()
    inside, within = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.float64)
    recalled, covered = torch.zeros(len(parts), m, dtype=torch.bool), torch.zeros(count, m)
    for rows in blocks(m):
        for columns in blocks(n):
            d = distances(real.features[rows], features[columns])
            inside[columns] |= (d <= real.radii[first][rows, None]).any(0)
            close = d <= real.radii[second][rows, None]
            within[columns] += close.sum(0)
            covered[:, rows] += members[columns].T @ close.T.float()
            for p, radii in enumerate(reach[:, columns]):
                recalled[p, rows] |= (d <= radii).any(1)
    return inside, within / second, recalled, covered


def _error_of_mean(values: Tensor) -> float:
    return float(values.std()) / len(values) ** 0.5


def _left_out(covered: Tensor) -> float:
    """Jackknife standard error of the coverage from the images of each group in each ball (G, m)."""
    count, total = len(covered), covered.sum(0)
    values = torch.stack([(total - own > 0).double().mean() for own in covered])
    return float(((count - 1) / count * (values - values.mean()).square().sum()).sqrt())


# ---- distances


def blocks(n: int) -> Iterator[slice]:
    """range(n) in pieces of at most `CHUNK`."""
    return (slice(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK))


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances (a, b) of float64 (a, F) and (b, F): inner products, about a centre to keep their digits."""
    centre = y[:1]
    return torch.cdist(x - centre, y - centre, compute_mode="use_mm_for_euclid_dist")


def nearest(x: Tensor, y: Tensor, k: int = 1, skip_self: bool = False) -> tuple[Tensor, Tensor]:
    """The k nearest of y (m, F) to each of x (n, F): their distances and their numbers, (n, k) each, the nearest first.

    Arguments:
        x: float64.
        y: float64.
        k: How many, at most m, or m - 1 with `skip_self`.
        skip_self: x and y are the same, and number i is no neighbour of itself.
    """
    near, which = [], []
    for rows in blocks(len(x)):
        best = x.new_full((len(x[rows]), k), float("inf"))
        index = torch.zeros(len(best), k, dtype=torch.int64)
        for columns in blocks(len(y)):
            d = distances(x[rows], y[columns])
            if skip_self and rows == columns:
                d.fill_diagonal_(float("inf"))
            candidates = torch.cat([best, d], 1)
            best, order = candidates.topk(k, largest=False)
            numbers = torch.cat([index, torch.arange(columns.start, columns.stop).expand(len(d), -1)], 1)
            index = numbers.gather(1, order)
        near.append(best)
        which.append(index)
    return torch.cat(near), torch.cat(which)
