"""Whether a denoiser's variance of x0 is what its squared errors are, level by level."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..covariance import VarianceSource
from ..denoiser import Denoiser
from ..gaussian import Gaussian
from ..noise import Draws
from ..objective import noised_by
from ..wrap import WithCovariance
from .result import Protocol, Result

__all__ = ["calibration"]


@torch.no_grad()
def calibration(
    denoiser: Denoiser,
    x0: Tensor,
    lams: Sequence[float] | Tensor,
    *,
    cond: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    batch: int = 64,
    name: str = "variance",
    digest: str = "",
    reference_name: str = "reference",
    weights: str = "unstated",
) -> list[Result]:
    """Mean squared error of x0 over mean predicted variance, one result for each level: 1 is right, more is too sure.

    Errors are those of the ratio over draws of the examples, by the delta method. Details of each result, all per dimension:

    - "lam": the level;
    - "error": mean squared error of x0;
    - "score": what the variational bound of a step to the next level pays for this variance: the mean of log u + error / u, u
      the variance plus that of the step's own noise seen from x0, in the coordinates in which it is diagonal; "score_error",
      one standard error of it;
    - "clamped": the share of variances that came out below zero, where the denoiser is `WithCovariance`.

    Arguments:
        denoiser: Says a variance; wrap it in `WithCovariance` if it has none of its own.
        x0: Examples that it did not see (n, *).
        lams: Levels (L,), finite.
        cond: Conditions, each (n, ...).
        seed: Of the noise, which belongs to the example: nothing depends on the batch.
        batch: Examples at once.
        name: Name of the variance, for the protocol.
        digest: SHA-256 of its weights, for the protocol.
        reference_name: Name of the examples, for the protocol.
        weights: Weights of the denoiser, for the protocol.

    Raises:
        ValueError: For fewer than two examples, a level that is not finite, or a denoiser without a variance.
    """
    levels = [float(lam) for lam in lams]
    if len(x0) < 2 or not all(map(math.isfinite, levels)):
        raise ValueError(f"`x0` must hold at least 2 examples (got {len(x0)}) and `lams` finite levels (got {levels[:4]})")
    facts = {"seed": seed, "lams": levels}
    what = Protocol(len(x0), reference_name, None, name, digest, "states noised to each level", (), weights, facts)
    results = []
    for step, lam in enumerate(levels):
        own = _own(lam, min((other for other in levels if other > lam), default=lam + 1.0))
        rows, source = [], denoiser.source if isinstance(denoiser, WithCovariance) else None
        if isinstance(source, VarianceSource):
            source.clear()
        for index in torch.arange(len(x0)).split(batch):
            x = x0[index].to(denoiser.device)
            noised = noised_by(denoiser.process, x, torch.full((len(x),), lam, dtype=torch.float64), Draws(seed, step, index))
            chosen = {key: value[index].to(denoiser.device) for key, value in (cond or {}).items()}
            rows.append(_rows(denoiser(noised.x_t, lam, **chosen), x, own, lam))
        clamped = source.clamped.below if isinstance(source, VarianceSource) else 0.0
        results.append(_result(torch.cat(rows), {"lam": lam, "clamped": clamped}, what))
    return results


def _own(lam: float, finer: float) -> float:
    """Variance of a step's own noise, seen from x0: w / b^2 of the kernel, whatever the process."""
    return math.exp(-finer) / -math.expm1(lam - finer)


def _rows(p: Gaussian, x0: Tensor, own: float, lam: float) -> Tensor:
    """Squared error, variance and score of each example, means over its dimensions: float64 (B, 3) on the CPU."""
    residual = x0 - p.mean
    square = (residual if p.basis is None else p.basis.forward(residual)).square()
    square = square.flatten(1).to(torch.promote_types(square.dtype, torch.float32))
    var = p.var.to(square.device).expand_as(residual).flatten(1).to(square)
    if not (var > 0).any():
        raise ValueError(f"`denoiser` has no variance at log-SNR {lam:g}: fit one with `quieten variance fit`, or wrap it in "
                         "WithCovariance")  # fmt: skip
    score = (var + own).log() + square / (var + own)
    return torch.stack([square.mean(1), var.mean(1), score.mean(1)], 1).to("cpu", torch.float64)


def _result(rows: Tensor, level: dict[str, float], facts: Protocol) -> Result:
    error, var, score = rows.mean(0).tolist()
    ratio, root = error / var, math.sqrt(len(rows))
    spread = float((rows[:, 0] - ratio * rows[:, 1]).std()) / var / root  # of a ratio of means
    details = level | {"error": error, "score": score, "score_error": float(rows[:, 2].std()) / root}
    return Result("calibration", ratio, spread, facts, details)
