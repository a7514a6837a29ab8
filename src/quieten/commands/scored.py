"""What `quieten score` writes: numbers and pictures of scored examples."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import write_atomic, writing
from ..metrics.ranking import roc
from ..metrics.result import Result

__all__ = ["Scored", "write_scores"]


@dataclass(frozen=True)
class Scored:
    """What was scored.

    Attributes:
        scores: (N,), high is strange.
        where: (N, H, W), the share of each position, where the score has one.
        x0: The examples (N, *).
        labels: Numbers of `classes`, where there are any.
        strange: bool (N,), the truth; None where nobody said.
        classes: Names.
    """

    scores: Tensor
    where: Tensor | None
    x0: Tensor
    labels: Tensor | None
    strange: Tensor | None
    classes: tuple[str, ...]


def write_scores(folder: Path, scored: Scored, area: Result | None, protocol: Mapping[str, Any]) -> None:
    """Scores as npz, csv and json, a histogram, the curve where the truth is known, and pictures where the examples are some.

    Arguments:
        folder: Exists.
        scored: What was scored.
        area: Under the curve, where the truth is known.
        protocol: How it was scored, for the json; its "what" names the score.
    """
    arrays = {"scores": scored.scores.numpy()}
    for name in ("where", "labels", "strange"):
        value = getattr(scored, name)
        arrays |= {} if value is None else {name: value.numpy()}
    buffer, text = io.BytesIO(), io.StringIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    table = csv.writer(text, lineterminator="\n")
    columns = ["index", "score", *(name for name in ("labels", "strange") if name in arrays)]
    table.writerow(columns)
    rows = [[f"{v:.8g}" for v in scored.scores.tolist()], *(arrays[name].astype(int).tolist() for name in columns[2:])]
    table.writerows([i, *row] for i, row in enumerate(zip(*rows, strict=True)))
    told = dict(protocol)
    if area is not None:
        told |= {"auroc": area.value, "error": area.uncertainty}
        told |= {"normal": area.protocol.n_reference, "strange": area.protocol.n}
    with writing(folder):
        write_atomic(folder / "scores.npz", buffer.getvalue())
        write_atomic(folder / "scores.csv", text.getvalue().encode())
        write_atomic(folder / "scores.json", json.dumps(told, indent=1).encode())
        write_atomic(folder / "histogram.png", _histogram(scored, str(protocol["what"])))
        if scored.strange is not None and area is not None:
            write_atomic(folder / "roc.png", _curve(scored.scores, scored.strange, area))
        _pictures(folder, scored)


def _histogram(scored: Scored, what: str) -> bytes:
    from ..reports.plots import COLOURS, INK, figure_axes

    figure, axes = figure_axes(what, "examples")
    scores = scored.scores.double()
    low, high = float(scores.quantile(0.002)), float(scores.quantile(0.998))
    bins = max(10, min(60, round(2 * len(scores) ** 0.5)))
    edges = [low + (high - low + 1e-12) * i / bins for i in range(bins + 1)]
    groups = {"": scores} if scored.strange is None else {"normal": scores[~scored.strange], "strange": scores[scored.strange]}
    for (label, values), colour in zip(groups.items(), COLOURS, strict=False):
        axes.hist(values.numpy().clip(edges[0], edges[-1]), edges, color=colour, alpha=0.6, label=label)
    if scored.strange is not None:
        axes.legend(frameon=False, labelcolor=INK, fontsize=10.5)
    return _png(figure)


def _curve(scores: Tensor, strange: Tensor, area: Result) -> bytes:
    from ..reports.plots import COLOURS, INK, figure_axes

    figure, axes = figure_axes("false alarms", "found")
    alarms, finds = roc(scores, strange)
    axes.plot(alarms.numpy(), finds.numpy(), color=COLOURS[0], linewidth=1.8, label=f"area {area.value:.3f} ± {area.error:.3f}")
    axes.plot([0, 1], [0, 1], color=INK, alpha=0.5, linewidth=1, linestyle=":")
    axes.set_aspect("equal")
    axes.legend(frameon=False, labelcolor=INK, fontsize=10.5, loc="lower right")
    return _png(figure)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, facecolor="white")
    return buffer.getvalue()


def _pictures(folder: Path, scored: Scored) -> None:
    """Two rows of the least strange and two of the strangest; and where the strangest are so."""
    from ..reports.plots import save_grid

    if scored.x0.ndim != 4 or scored.x0.shape[1] not in (1, 3):
        return
    order = scored.scores.argsort()
    few = min(16, max(1, len(order) // 2))
    save_grid(torch.cat([scored.x0[order[:few]], scored.x0[order[-few:].flip(0)]]), folder / "examples.png", columns=8)
    if scored.where is None:
        return
    from ..tuning.anomaly import upsampled

    top = order[-min(8, len(order)) :].flip(0)
    heat = upsampled(scored.where[top].float(), (scored.x0.shape[2], scored.x0.shape[3]))
    low, high = heat.flatten(1).amin(1)[:, None, None], heat.flatten(1).amax(1)[:, None, None]
    shades = (2.0 * (heat - low) / (high - low).clamp_min(1e-12) - 1.0)[:, None].expand_as(scored.x0[top])
    save_grid(torch.cat([scored.x0[top], shades]), folder / "where.png", columns=len(top))
