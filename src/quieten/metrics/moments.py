"""Distance of two sets through the mean and covariance of their features: the formula of FID."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from .features import Extractor, Statistics
from .result import Result, features_of, halves, protocol, reference_statistics, spread

__all__ = ["frechet", "frechet_distance"]


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
    features, target = features_of(images, extractor, "images"), reference_statistics(reference, extractor)
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
    pairs = [(distance(features[i]), distance(features[j])) for i, j in halves(n, splits, split_seed)]
    details = {}
    if pairs and n // 2 > width:
        details["corrected"] = 2 * value - sum(map(sum, pairs)) / (2 * len(pairs))
    if floor is not None:
        held_out = Statistics.of(features_of(floor[:n], extractor, "floor"))
        _check_pair(held_out, target)
        details["floor"] = _distance(held_out, target, factor)
        extra["n_floor"] = min(n, len(floor))
    facts = protocol(n, target.n, reference_name, extractor, seeds, weights, extra)
    return Result("Frechet distance", value, spread(pairs), facts, details)
