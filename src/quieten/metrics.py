"""How far drawn images are from real ones. A number never travels without the protocol that made it.

    Extractor -> features -> Statistics -> frechet_distance
                          -> sliced_wasserstein

Statistics and distances are float64 on the CPU, whatever the images were. Randomness comes from explicit
seeds: two calls with the same arguments give the same digits, and the global generators are left alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .features import Extractor, Statistics

__all__ = [
    "Extractor",
    "Protocol",
    "Result",
    "Statistics",
    "frechet",
    "frechet_distance",
    "sliced_wasserstein",
]


@dataclass(frozen=True)
class Protocol:
    """What must be equal before two results may be compared.

    Arguments:
        n: Number of images measured.
        reference: Name of the data they are compared with.
        n_reference: Number of reference images; None if a file of statistics does not say.
        extractor: Name of the feature extractor.
        extractor_hash: SHA-256 of its weights, so that two extractors of one name are told apart.
        preprocessing: What is done to images before the extractor sees them.
        seeds: Seeds the images were drawn with.
        weights: Which weights of the model drew them, such as "ema" or "raw".
        extra: Anything else that fixes the number (seeds of the metric, number of projections).
    """

    n: int
    reference: str
    n_reference: int | None
    extractor: str
    extractor_hash: str
    preprocessing: str
    seeds: tuple[int, ...] = ()
    weights: str = "unstated"
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """A measured value and its protocol.

    Arguments:
        name: Name of the metric.
        value: The value, in the metric's own unit.
        uncertainty: One standard error of the value over draws of the n images; None if not estimated.
        protocol: How it was measured.
        details: Further figures of the same measurement, such as "corrected" or "floor".
    """

    name: str
    value: float
    uncertainty: float | None
    protocol: Protocol
    details: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The result as a dictionary of plain values, ready for JSON."""
        return asdict(self) | {"protocol": asdict(self.protocol) | {"seeds": list(self.protocol.seeds)}}

    def __str__(self) -> str:
        p = self.protocol
        versus = f"n={p.n} against {'?' if p.n_reference is None else p.n_reference} of {p.reference}"
        return f"{self.name} {self.figure()} ({versus}, extractor {p.extractor} {p.extractor_hash[:4]}…)"

    def figure(self) -> str:
        """The value alone, rounded to two digits of its uncertainty: "3.214 ± 0.052"."""
        u = self.uncertainty
        if u is None or not math.isfinite(u) or u <= 0:
            return f"{self.value:.4g}"
        decimals = max(0, 1 - math.floor(math.log10(u)))
        return f"{self.value:.{decimals}f} ± {u:.{decimals}f}"


def frechet_distance(a: Statistics, b: Statistics) -> float:
    r"""Squared Frechet distance between the Gaussians with these moments, the formula of FID.

    .. math:: |m_a - m_b|^2 + \mathrm{Tr}(S_a + S_b) - 2\,\mathrm{Tr}\,(S_b^{1/2} S_a S_b^{1/2})^{1/2}

    With factors S_a = A A^T and S_b = B B^T, the eigenvalues under the last root are the squared singular
    values of A^T B, and its trace is their sum. Taking singular values never squares, so null directions cost
    no digits.

    Raises:
        ValueError: If the widths differ, the extractors differ, or either has fewer than two samples.

    References:
        | GANs Trained by a Two Time-Scale Update Rule (Heusel et al., 2017), https://arxiv.org/abs/1706.08500
        | The Frechet distance between multivariate normal distributions (Dowson, Landau, 1982)
    """
    _check_pair(a, b)
    return _distance(a, b, _factor(b))


def _check_pair(a: Statistics, b: Statistics) -> None:
    for s in (a, b):
        if s.n is not None and s.n < 2:
            raise ValueError(f"n is {s.n}, a covariance needs at least 2 samples: give more images")
    if a.mean.shape != b.mean.shape:
        widths = f"{a.mean.shape[0]} and {b.mean.shape[0]}"
        raise ValueError(f"statistics have {widths} features: compute both with the same extractor")
    if a.extractor and b.extractor and a.extractor != b.extractor:
        names = f"{a.extractor[:8]} and {b.extractor[:8]}"
        raise ValueError(f"statistics come from extractors {names}: compute both with the same one")


def _distance(a: Statistics, b: Statistics, factor_b: Tensor) -> float:
    cross = torch.linalg.svdvals(_factor(a).T @ factor_b).sum()
    shift = (a.mean - b.mean).square().sum()
    return max(float(shift + a.covariance.trace() + b.covariance.trace() - 2 * cross), 0.0)


def _factor(s: Statistics) -> Tensor:
    """A (F, r) with A A^T = S; directions below rounding, negative ones included, are dropped."""
    values, vectors = torch.linalg.eigh((s.covariance + s.covariance.T) / 2)
    floor = values.abs().amax() * len(values) * torch.finfo(torch.float64).eps
    keep = values > floor
    return vectors[:, keep] * values[keep].sqrt()


def frechet(
    images: Tensor,
    reference: Tensor | Statistics,
    extractor: Extractor,
    *,
    reference_name: str = "reference",
    seeds: Sequence[int] = (),
    weights: str = "unstated",
    splits: int = 5,
    split_seed: int = 0,
    floor: Tensor | None = None,
) -> Result:
    """Frechet distance of images to a reference, with its standard error and a value corrected for bias.

    The images are cut `splits` times into random halves. Half the difference of two disjoint halves estimates
    the standard error over draws of the images: the bias, which both halves share, cancels (a delete-half
    jackknife). The bias itself falls as 1/n, so twice the full value less the mean of the halves removes its
    leading term; it appears as "corrected" where a half still has more samples than features, for the law
    fails below. Neither covers the sampling of the reference, which is a fixed part of the protocol, nor the
    training of the model.

    Arguments:
        images: Images (n, C, H, W) in [-1, 1].
        reference: Real images in [-1, 1], or their statistics from the same extractor.
        extractor: What the distance is measured on.
        reference_name: Name of the reference, for the protocol.
        seeds: Seeds the images were drawn with, for the protocol.
        weights: Weights they were drawn with, for the protocol.
        splits: Number of random halvings; 0 skips uncertainty and correction. Each costs two distances.
        split_seed: Seed of the halvings.
        floor: Real images outside the reference; the distance of the first n of them is recorded as "floor".

    References:
        | Effectively Unbiased FID and Inception Score (Chong, Forsyth, 2020),
        https://arxiv.org/abs/1911.07023 | A General Theory for Jackknife Variance Estimation (Shao, Wu, 1989)
    """
    features = _features(images, extractor, "images")
    if isinstance(reference, Statistics):
        target = reference
    else:
        target = Statistics.of(_features(reference, extractor, "reference"), extractor.hash)
    n, width = features.shape
    for size, what in ((n, "images"), (target.n, "reference")):
        if size is not None and size < width:
            warnings.warn(
                f"{what}: {size} samples for {width} features, the distance is biased up: use more",
                stacklevel=2,
            )
    full = Statistics.of(features, extractor.hash)
    _check_pair(full, target)
    factor = _factor(target)

    def distance(rows: Tensor) -> float:
        return _distance(Statistics.of(rows), target, factor)

    value, extra = _distance(full, target, factor), {"splits": splits, "split_seed": split_seed}
    pairs = [(distance(features[i]), distance(features[j])) for i, j in _halves(n, splits, split_seed)]
    details = {}
    if pairs and n // 2 > width:
        details["corrected"] = 2 * value - sum(map(sum, pairs)) / (2 * len(pairs))
    if floor is not None:
        held_out = Statistics.of(_features(floor[:n], extractor, "floor"))
        _check_pair(held_out, target)
        details["floor"] = _distance(held_out, target, factor)
        extra["n_floor"] = min(n, len(floor))
    protocol = _protocol(n, target.n, reference_name, extractor, seeds, weights, extra)
    return Result("Frechet distance", value, _spread(pairs), protocol, details)


def sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    projections: int = 1000,
    seed: int = 0,
    *,
    extractor: Extractor | None = None,
    reference_name: str = "reference",
    seeds: Sequence[int] = (),
    weights: str = "unstated",
    splits: int = 5,
    floor: Tensor | None = None,
) -> Result:
    """Sliced Wasserstein-2 distance: the root of the mean of W2^2 over random unit projections.

    Along each projection W2 is exact: sorted samples are compared, and where the sizes differ the two
    quantile functions are integrated over their merged steps. A finite sample of the very same law still
    gives a positive value; `floor` says how large. The uncertainty is over draws of x, by random halves as in
    `frechet`; that of the projections, which the seed fixes, is recorded as "projection_error".

    Arguments:
        x: Images or vectors (n, *) measured, in [-1, 1].
        y: Reference (m, *) of the same shape.
        projections: Number of directions.
        seed: Seed of the directions and of the halvings.
        extractor: Compare its features; None compares pixels.
        reference_name: Name of y, for the protocol.
        seeds: Seeds x was drawn with, for the protocol.
        weights: Weights x was drawn with, for the protocol.
        splits: Number of random halvings; 0 skips the uncertainty. Each costs one more distance.
        floor: Real data outside y; the distance of the first n of them to y is recorded as "floor".

    References:
        | Sliced and Radon Wasserstein Barycenters of Measures (Bonneel et al., 2015)
    """
    extractor = extractor or Extractor.pixels()
    if projections < 1:
        raise ValueError(f"projections must be at least 1, got {projections}: 1000 is usual")
    fx, fy = _features(x, extractor, "x").double(), _features(y, extractor, "y").double()
    ff = _features(floor[: len(x)], extractor, "floor").double() if floor is not None else fx[:0]
    for f, what in ((fy, "y"), (ff, "floor")):
        if f.shape[1] != fx.shape[1]:
            raise ValueError(f"x has {fx.shape[1]} features and {what} {f.shape[1]}: give the same shape")
    halves = [half for pair in _halves(len(fx), splits, seed) for half in pair]
    rows: list[list[Tensor]] = []
    for theta in _directions(fx.shape[1], projections, seed):
        px, py = fx @ theta, (fy @ theta).sort(0).values
        sides = [px, *(px[half] for half in halves)] + ([ff @ theta] if len(ff) else [])
        rows.append([_transport(side.sort(0).values, py) for side in sides])
    squared = [torch.cat(column) for column in zip(*rows, strict=True)]
    values = [math.sqrt(float(s.mean())) for s in squared]
    pairs = list(zip(values[1 : 1 + len(halves) : 2], values[2 : 1 + len(halves) : 2], strict=True))
    details, extra = {}, {"projections": projections, "seed": seed, "splits": splits}
    if projections > 1 and values[0] > 0:  # delta method: the error of the root of a mean
        details["projection_error"] = float(squared[0].std()) / math.sqrt(projections) / (2 * values[0])
    if len(ff):
        details["floor"], extra["n_floor"] = values[-1], len(ff)
    protocol = _protocol(len(fx), len(fy), reference_name, extractor, seeds, weights, extra)
    return Result("sliced Wasserstein", values[0], _spread(pairs), protocol, details)


def _directions(width: int, count: int, seed: int, chunk: int = 64) -> Iterator[Tensor]:
    """Unit directions in columns (width, <= chunk), `count` in all, the same whatever the chunk."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(count, width, generator=generator, dtype=torch.float64)
    yield from (part.T for part in (theta / theta.norm(dim=1, keepdim=True)).split(chunk))


def _transport(x: Tensor, y: Tensor) -> Tensor:
    """Squared W2 (P,) between the columns of x (n, P) and y (m, P), both sorted along the first axis."""
    n, m = len(x), len(y)
    if n == m:
        return (x - y).square().mean(0)
    # both quantile functions are constant between levels i/n and j/m, integers in units of 1/(n m)
    levels = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    widths = levels.diff(prepend=levels.new_zeros(1)).double() / (n * m)
    return widths @ (x[(levels - 1) // m] - y[(levels - 1) // n]).square()


def _features(images: Tensor, extractor: Extractor, what: str) -> Tensor:
    if len(images) < 2:
        raise ValueError(f"{what} holds {len(images)} samples, at least 2 are needed: give more")
    features = extractor.extract(images)
    if not torch.isfinite(features).all():
        bad = int((~torch.isfinite(features).all(1)).sum())
        raise ValueError(f"{what}: features of {bad} of {len(features)} samples are NaN or infinite: look at those images")
    return features


def _halves(n: int, splits: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs of disjoint random halves of range(n); none where a half would have fewer than two samples."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(n, generator=generator) for _ in range(splits if n >= 4 else 0)]
    return [(order[: n // 2], order[n // 2 : n // 2 * 2]) for order in orders]


def _spread(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Standard error of the full value from those of its halves: RMS of half their difference."""
    return math.sqrt(sum((a - b) ** 2 for a, b in pairs) / (4 * len(pairs))) if pairs else None


def _protocol(
    n: int,
    n_reference: int | None,
    reference: str,
    extractor: Extractor,
    seeds: Sequence[int],
    weights: str,
    extra: Mapping[str, Any],
) -> Protocol:
    names = extractor.name, extractor.hash, extractor.preprocessing
    return Protocol(n, reference, n_reference, *names, tuple(seeds), weights, dict(extra))
