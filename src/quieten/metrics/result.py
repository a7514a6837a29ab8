"""What a measurement is: a value, how sure it is, and the protocol that must be equal before two are compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .features import Extractor, Statistics

__all__ = ["Protocol", "Result", "features_of", "halves", "protocol", "spread"]


@dataclass(frozen=True)
class Protocol:
    """What must be equal before two results may be compared.

    Arguments:
        n: Number of images measured.
        reference: Name of the data they are compared with.
        n_reference: Number of reference images; None if a file of statistics does not say.
        extractor: Name of the feature extractor, or of the score or the variance that is judged.
        extractor_hash: SHA-256 of its weights, so that two of one name are told apart; empty where there are none.
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

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Result:
        """Undoes `to_dict`, after a passage through JSON too.

        Raises:
            ValueError: If keys are missing or unknown.
        """
        try:
            facts = dict(content["protocol"])
            return cls(**{**content, "protocol": Protocol(**{**facts, "seeds": tuple(facts["seeds"])})})
        except (KeyError, TypeError) as error:
            raise ValueError(f"`content` is no result ({error}): pass what Result.to_dict returned") from None

    @property
    def error(self) -> float:
        """The uncertainty as a number: NaN where it was not estimated."""
        return math.nan if self.uncertainty is None else self.uncertainty

    def __str__(self) -> str:
        p = self.protocol
        versus = f"n={p.n} against {'?' if p.n_reference is None else p.n_reference} of {p.reference}"
        by = f"extractor {p.extractor} {p.extractor_hash[:4]}…" if p.extractor_hash else f"by {p.extractor}"
        return f"{self.name} {self.figure()} ({versus}, {by})"

    def figure(self) -> str:
        """The value alone, rounded to two digits of its uncertainty: "3.214 ± 0.052"."""
        u = self.uncertainty
        if u is None or not math.isfinite(u) or u <= 0:
            return f"{self.value:.4g}"
        decimals = max(0, 1 - math.floor(math.log10(u)))
        return f"{self.value:.{decimals}f} ± {u:.{decimals}f}"


# ---- what metrics share


def features_of(images: Tensor, extractor: Extractor, what: str, least: int = 2) -> Tensor:
    """Features (n, F) of images, float64 on the CPU.

    Raises:
        ValueError: If there are fewer than `least`, or some are not finite.
    """
    if len(images) < least:
        raise ValueError(f"{what} holds {len(images)} samples, at least {least} are needed: give more")
    features = extractor.extract(images)
    if not torch.isfinite(features).all():
        bad = int((~torch.isfinite(features).all(1)).sum())
        raise ValueError(f"{what}: features of {bad} of {len(features)} samples are NaN or infinite: look at those images")
    return features.double()


def same_width(x: Tensor, y: Tensor, what: str, other: str) -> None:
    """ValueError unless both have as many features."""
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{what} has {x.shape[1]} features and {other} {y.shape[1]}: give the same shape")


def halves(n: int, splits: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs of disjoint random halves of range(n); none where a half would have fewer than two samples."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(n, generator=generator) for _ in range(splits if n >= 4 else 0)]
    return [(order[: n // 2], order[n // 2 : n // 2 * 2]) for order in orders]


def spread(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Standard error of the full value from those of its halves: RMS of half their difference."""
    return math.sqrt(sum((a - b) ** 2 for a, b in pairs) / (4 * len(pairs))) if pairs else None


def protocol(
    n: int,
    n_reference: int | None,
    reference: str,
    extractor: Extractor,
    seeds: Sequence[int],
    weights: str,
    extra: Mapping[str, Any],
) -> Protocol:
    """The protocol of a measurement with this extractor."""
    names = extractor.name, extractor.hash, extractor.preprocessing
    return Protocol(n, reference, n_reference, *names, tuple(seeds), weights, dict(extra))


def reference_statistics(reference: Tensor | Statistics, extractor: Extractor) -> Statistics:
    """Statistics of reference images; those given stay as they are."""
    if isinstance(reference, Statistics):
        return reference
    return Statistics.of(features_of(reference, extractor, "reference"), extractor.hash)
