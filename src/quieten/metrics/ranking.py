"""How well a score tells the strange from the normal: the ROC curve and the area under it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .result import Protocol, Result

__all__ = ["auroc", "roc"]


def auroc(
    scores: Tensor,
    strange: Tensor,
    *,
    by: str = "scores",
    reference_name: str = "the normal",
    seeds: Sequence[int] = (),
    weights: str = "unstated",
) -> Result:
    """The area under the ROC curve: the chance that a strange example scores above a normal one, ties counting half.

    0.5 is chance, 1 perfect. Computed in float64. The uncertainty is one standard error over draws of the examples, None where
    either kind has fewer than two. The protocol has the number of strange examples as `n`, of normal ones as `n_reference`.

    Arguments:
        scores: One number per example (N,), high where it is strange.
        strange: bool (N,), the truth.
        by: Name of the score, for the protocol.
        reference_name: Name of the normal examples, for the protocol.
        seeds: Seeds of the score, for the protocol.
        weights: Weights it was made with, for the protocol.

    Raises:
        ValueError: If the shapes differ, a score is NaN, or one of the two kinds is missing.

    References:
        | Comparing the Areas under Two or More Correlated ROC Curves (DeLong, DeLong, Clarke-Pearson, 1988), eq. 2 and 3

    Example:
        >>> area = auroc(torch.tensor([0.1, 0.4, 0.3, 0.9]), torch.tensor([False, False, True, True]))
        >>> area.value, area.protocol.n, area.protocol.n_reference
        (0.75, 2, 2)
    """
    scores, strange = _checked(scores, strange)
    m, n = int(strange.sum()), int((~strange).sum())
    ranks = _midranks(scores)
    above = (ranks[strange] - _midranks(scores[strange])) / n  # share of normal ones below each strange one
    below = 1.0 - (ranks[~strange] - _midranks(scores[~strange])) / m
    error = math.sqrt(float(above.var()) / m + float(below.var()) / n) if min(m, n) > 1 else None
    facts = {"direction": "high is strange", "ties": "count half"}
    what = Protocol(m, reference_name, n, by, "", "none", tuple(seeds), weights, facts)
    return Result("AUROC", float(above.mean()), error, what)


def roc(scores: Tensor, strange: Tensor) -> tuple[Tensor, Tensor]:
    """The curve itself: rates of false alarms and of finds, from (0, 0) to (1, 1), one point per distinct score.

    Arguments and errors are those of `auroc`.
    """
    scores, strange = _checked(scores, strange)
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    finds = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, place, strange.double()).flip(0).cumsum(0)
    alarms = counts.double().flip(0).cumsum(0) - finds
    start = torch.zeros(1, dtype=torch.float64)
    return torch.cat([start, alarms / alarms[-1]]), torch.cat([start, finds / finds[-1]])


def _checked(scores: Tensor, strange: Tensor) -> tuple[Tensor, Tensor]:
    scores, strange = scores.detach().to("cpu", torch.float64), strange.cpu()
    if scores.ndim != 1 or scores.shape != strange.shape or strange.dtype != torch.bool:
        got = f"{tuple(scores.shape)}, {strange.dtype} {tuple(strange.shape)}"
        raise ValueError(f"`scores` must be (N,) and `strange` bool (N,) (got {got})")
    if scores.isnan().any():
        raise ValueError(f"`scores` holds NaN for {int(scores.isnan().sum())} of {len(scores)} examples: look at those")
    if not strange.any() or strange.all():
        raise ValueError(f"`strange` marks {int(strange.sum())} of {len(strange)}: both kinds are needed")
    return scores, strange


def _midranks(values: Tensor) -> Tensor:
    """Ranks from 1, equal values sharing their mean rank."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0).double() - (counts.double() - 1) / 2)[place]
