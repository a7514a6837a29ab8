"""Distance of two sets through their projections on lines, where optimal transport is a matter of sorting."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .features import Extractor
from .result import Result, features_of, halves, protocol, same_width, spread

__all__ = ["sliced_wasserstein"]


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
    fx, fy = features_of(x, extractor, "x"), features_of(y, extractor, "y")
    ff = features_of(floor[: len(x)], extractor, "floor") if floor is not None else fx[:0]
    for f, what in ((fy, "y"), (ff, "floor")):
        same_width(fx, f, "x", what)
    parts = [half for pair in halves(len(fx), splits, seed) for half in pair]
    rows: list[list[Tensor]] = []
    for theta in _directions(fx.shape[1], projections, seed):
        px, py = fx @ theta, (fy @ theta).sort(0).values
        sides = [px, *(px[part] for part in parts)] + ([ff @ theta] if len(ff) else [])
        rows.append([_transport(side.sort(0).values, py) for side in sides])
    squared = [torch.cat(column) for column in zip(*rows, strict=True)]
    values = [math.sqrt(float(s.mean())) for s in squared]
    pairs = list(zip(values[1 : 1 + len(parts) : 2], values[2 : 1 + len(parts) : 2], strict=True))
    details, extra = {}, {"projections": projections, "seed": seed, "splits": splits}
    if projections > 1 and values[0] > 0:  # delta method: the error of the root of a mean
        details["projection_error"] = float(squared[0].std()) / math.sqrt(projections) / (2 * values[0])
    if len(ff):
        details["floor"], extra["n_floor"] = values[-1], len(ff)
    facts = protocol(len(fx), len(fy), reference_name, extractor, seeds, weights, extra)
    return Result("sliced Wasserstein", values[0], spread(pairs), facts, details)


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
