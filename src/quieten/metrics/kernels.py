"""Distances of two sets through a kernel between their members: KID and the energy distance, unbiased, with standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .features import Extractor
from .result import Result, features_of, protocol, same_width

__all__ = ["energy_distance", "kid"]

Kernel = Callable[[Tensor, Tensor], Tensor]
"""Maps (a, F) and (b, F) to (a, b)."""

CHUNK = 1024
"""Rows and columns of the largest part of a kernel matrix that is ever there at once."""


def kid(
    images: Tensor,
    reference: Tensor,
    extractor: Extractor,
    *,
    blocks: int | None = 100,
    size: int = 1000,
    degree: int = 3,
    gamma: float | None = None,
    coef: float = 1.0,
    seed: int = 0,
    groups: int = 20,
    floor: Tensor | None = None,
    reference_name: str = "reference",
    seeds: Sequence[int] = (),
    weights: str = "unstated",
) -> Result:
    r"""Kernel inception distance: the unbiased squared maximum mean discrepancy with a polynomial kernel.

    .. math:: k(x, y) = (\gamma\, x^T y + c)^3, \quad \gamma = 1/F

    As published, the value is the mean over `blocks` pairs of random subsets of `size` images each, and the standard deviation
    over them is recorded as "block_spread". That tells how much subsets of one sample differ; the uncertainty here is the
    standard error over draws of the images, by leaving out one of `groups` random groups at a time (a jackknife), and that of
    the choice of subsets. A value below zero is possible: the estimate is unbiased and the distance may be nil.

    Arguments:
        images: Images (n, C, H, W) in [-1, 1].
        reference: Real images (m, C, H, W) in [-1, 1].
        extractor: What the distance is measured on.
        blocks: Number of pairs of subsets; None takes all pairs of images instead, once.
        size: Images of a subset; no more than there are.
        degree: Exponent of the kernel.
        gamma: Factor on the inner product; None is 1 / F, F the number of features.
        coef: What is added to it.
        seed: Of the subsets and the groups.
        groups: Of the jackknife; 0 skips the uncertainty.
        floor: Real images outside the reference; the distance of the first n of them is recorded as "floor".
        reference_name: Name of the reference, for the protocol.
        seeds: Seeds the images were drawn with, for the protocol.
        weights: Weights they were drawn with, for the protocol.

    Raises:
        ValueError: For fewer than two samples, features that are not finite, or options out of range.

    References:
        | Demystifying MMD GANs (Binkowski et al., 2018), https://arxiv.org/abs/1801.01401
        | A Kernel Two-Sample Test (Gretton et al., 2012), eq. 3
    """
    if (blocks is not None and blocks < 1) or size < 2 or degree < 1:
        raise ValueError(f"`blocks` {blocks}, `size` {size} and `degree` {degree} must be at least 1, 2 and 1: 100, 1000 and 3 "
                         "are usual")  # fmt: skip
    x, y = features_of(images, extractor, "images"), features_of(reference, extractor, "reference")
    same_width(x, y, "images", "reference")
    scale = 1.0 / x.shape[1] if gamma is None else gamma

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.mm(a, b.T).mul_(scale).add_(coef).pow_(degree)

    def pairs(n: int) -> list[tuple[Tensor, Tensor]]:
        return _subsets(n, len(y), blocks, size, seed)

    value, error, details = _discrepancy(x, y, kernel, pairs(len(x)), groups, seed)
    extra = {"blocks": blocks, "size": size, "degree": degree, "gamma": scale, "coef": coef, "seed": seed, "groups": groups}
    if floor is not None:
        held_out = features_of(floor[: len(x)], extractor, "floor")
        details["floor"] = _discrepancy(held_out, y, kernel, pairs(len(held_out)), 0, seed)[0]
        extra["n_floor"] = len(held_out)
    facts = protocol(len(x), len(y), reference_name, extractor, seeds, weights, extra)
    return Result("KID", value, error, facts, details)


def energy_distance(
    x: Tensor,
    y: Tensor,
    *,
    extractor: Extractor | None = None,
    seed: int = 0,
    groups: int = 20,
    floor: Tensor | None = None,
    reference_name: str = "reference",
    seeds: Sequence[int] = (),
    weights: str = "unstated",
) -> Result:
    r"""Energy distance, zero for equal laws and for no others; an unbiased estimate from all pairs, so it may fall below zero.

    .. math:: 2\,E|X - Y| - E|X - X'| - E|Y - Y'|

    Arguments:
        x: Images or vectors (n, *) measured, in [-1, 1].
        y: Reference (m, *) of the same shape.
        extractor: Compare its features; None compares pixels.
        seed: Of the groups of the jackknife.
        groups: Their number; 0 skips the uncertainty.
        floor: Real data outside y; the distance of the first n of them to y is recorded as "floor".
        reference_name: Name of y, for the protocol.
        seeds: Seeds x was drawn with, for the protocol.
        weights: Weights x was drawn with, for the protocol.

    Raises:
        ValueError: For fewer than two samples, unequal shapes, or what is not finite.

    References:
        | Energy statistics (Szekely, Rizzo, 2013)
    """
    extractor = extractor or Extractor.pixels()
    fx, fy = features_of(x, extractor, "x"), features_of(y, extractor, "y")
    same_width(fx, fy, "x", "y")
    centre = fy.mean(0)  # digits of the distances, which are formed from inner products
    fx, fy = fx - centre, fy - centre

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.cdist(a, b).neg_()

    def pairs(n: int) -> list[tuple[Tensor, Tensor]]:
        return _subsets(n, len(fy), None, 0, seed)

    value, error, details = _discrepancy(fx, fy, kernel, pairs(len(fx)), groups, seed)
    extra = {"seed": seed, "groups": groups}
    if floor is not None:
        held_out = features_of(floor[: len(x)], extractor, "floor")
        same_width(held_out, fy, "floor", "y")
        details["floor"] = _discrepancy(held_out - centre, fy, kernel, pairs(len(held_out)), 0, seed)[0]
        extra["n_floor"] = len(held_out)
    facts = protocol(len(fx), len(fy), reference_name, extractor, seeds, weights, extra)
    return Result("energy distance", value, error, facts, details)


# ---- the estimate


def _subsets(n: int, m: int, blocks: int | None, size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs of random subsets of range(n) and range(m), no element twice in one; all of both, once, where that is all."""
    size = min(size, n, m)
    if blocks is None or size == n == m:
        return [(torch.arange(n), torch.arange(m))]
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randperm(n, generator=generator)[:size], torch.randperm(m, generator=generator)[:size]) for _ in range(blocks)
    ]


def _discrepancy(
    x: Tensor, y: Tensor, kernel: Kernel, pairs: Sequence[tuple[Tensor, Tensor]], groups: int, seed: int
) -> tuple[float, float | None, dict[str, float]]:
    """The mean over pairs of subsets of the unbiased MMD^2; its standard error; "block_spread" where there are several.

    The sums are kept by groups of x, so that each group can be left out of all of them without another kernel.
    """
    count = min(groups, len(x) // 2)
    generator = torch.Generator().manual_seed(seed)
    group = torch.randperm(len(x), generator=generator) % max(count, 1)
    values, without = [], []
    for ix, iy in pairs:
        a, b = x[ix], y[iy]
        members = torch.nn.functional.one_hot(group[ix], max(count, 1)).double()
        size, m = members.sum(0), len(b)
        xx, xy = _sums(a, kernel, members), _cross(a, b, kernel, members)
        yy = float(_sums(b, kernel, b.new_ones(m, 1))) / (m * (m - 1))
        n = len(a)
        values.append(float(xx.sum()) / (n * (n - 1)) - 2 * float(xy.sum()) / (n * m) + yy)
        left = n - size
        inner = xx.sum() - 2 * xx.sum(1) + xx.diagonal()
        without.append(inner / (left * (left - 1)) - 2 * (xy.sum() - xy) / (left * m) + yy)
    value = sum(values) / len(values)
    details, variance = {}, 0.0
    if len(values) > 1:
        details["block_spread"] = float(torch.tensor(values, dtype=torch.float64).std())
        variance = details["block_spread"] ** 2 / len(values)
    if count < 2:
        return value, None, details
    one_less = torch.stack(without).mean(0)
    variance += (count - 1) / count * float((one_less - one_less.mean()).square().sum())
    return value, math.sqrt(variance) if math.isfinite(variance) else None, details


def _parts(n: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK))


def _sums(x: Tensor, kernel: Kernel, members: Tensor) -> Tensor:
    """Sums of the kernel over pairs of different elements of x (n, F), by their groups: (G, G), members (n, G) one-hot."""
    total = x.new_zeros(members.shape[1], members.shape[1])
    for rows in _parts(len(x)):
        for columns in _parts(rows.stop):
            k = kernel(x[rows], x[columns])
            if rows == columns:
                total += members[rows].T @ k.fill_diagonal_(0) @ members[columns]
            else:
                part = members[rows].T @ k @ members[columns]
                total += part + part.T
    return total


def _cross(x: Tensor, y: Tensor, kernel: Kernel, members: Tensor) -> Tensor:
    """Sums of the kernel over pairs of x (n, F) and y (m, F), by the groups of x: (G,)."""
    total = x.new_zeros(members.shape[1])
    for rows in _parts(len(x)):
        for columns in _parts(len(y)):
            total += members[rows].T @ kernel(x[rows], y[columns]).sum(1)
    return total
