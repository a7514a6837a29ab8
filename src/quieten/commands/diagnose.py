"""`quieten diagnose`."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import Dataset, load
from ..files import write_atomic, writing
from ..process import PROCESSES
from ..progress import Progress
from ..schedule import Schedule
from ..targets.diagnosis import NetworkLoss, TargetVariance, level_density, network_loss, target_variance
from ..targets.pools import distinct
from ..training.source import Source, open_source

__all__ = ["diagnose", "results_folder"]

Row = dict[str, float | int]


def diagnose(
    source: str,
    data: str,
    *,
    references: Sequence[int] = (64, 1024),
    levels: int = 16,
    pairs: int = 256,
    bank: int | None = 20_000,
    split: str = "train",
    seed: int = 0,
    out: Path | None = None,
    batch: int = 64,
    weights: str = "ema",
    device: str | None = None,
) -> None:
    """Diagnoses targets and network, per level; the arguments are the command's options.

    Raises:
        ValueError: For data that do not fit the model, a model that takes text, or a folder that cannot be written.
    """
    opened = open_source(source, weights, device)
    if opened.denoiser.process not in PROCESSES.values():
        raise ValueError(f"`source` noises encoded data ({opened.denoiser.process}) and regresses on another mean: measure it "
                         "with `quieten nll`")  # fmt: skip
    folder = results_folder(opened, out, "diagnosis.json", b"{}\n")
    examples, labels, name = _examples(opened, data, split, bank, seed, batch)
    lam = _levels(opened.schedule, levels)
    counts = sorted({n for n in references if n < len(examples)})
    if not counts:
        given = ",".join(map(str, references))
        raise ValueError(f"`--references {given}` must be below the {len(examples)} examples: give fewer")
    shown = min(pairs, len(examples))
    with Progress(levels * shown, 0, "targets") as progress:
        told = partial(_tell, progress, shown)
        variance = target_variance(examples, lam, counts, labels=labels, pairs=pairs, seed=seed, progress=told)
    own = None if labels is None else labels[variance.index.to(labels.device)]
    with Progress(levels * shown, 0, "network") as progress:
        loss = network_loss(opened.denoiser, variance, own, batch, progress=partial(_tell, progress, shown))
    density = None if opened.schedule is None else level_density(opened.schedule, lam)
    rows = _rows(variance, loss, density)
    facts = {"source": source, "weights": opened.weights, "data": name, "examples": len(examples), "pairs": len(variance.x0)}
    facts |= {"seed": seed, "conditional": labels is not None}
    _write(folder, facts, rows, variance, loss, density)
    print(_table(rows))
    print(f"{folder}: diagnosis.png, diagnosis.csv, diagnosis.json; per element and in units of eps, {len(variance.x0)} pairs "
          f"against {len(examples):,} examples of {name}{', each of its own class' if labels is not None else ''}")  # fmt: skip


# ---- its parts


def _tell(progress: Progress, pairs: int, levels: int) -> None:
    progress.update(levels * pairs)


def results_folder(source: Source, out: Path | None, file: str, content: bytes) -> Path:
    """Where to write, tried with a first version of a file before the work begins."""
    folder = (source.home.parent if source.home.name == "samples" else source.home) / "diagnosis" if out is None else out
    folder = folder.expanduser()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / file, content)
    return folder


def _examples(
    source: Source, name: str, split: str, bank: int | None, seed: int, batch: int
) -> tuple[Tensor, Tensor | None, str]:
    """What is taken for the whole of the data, on the model's device, and its labels where the model takes them."""
    if source.prompt is not None:
        raise ValueError("`source` draws what a text says: diagnose a model of classes, or without conditions")
    shape = source.denoiser.shape
    pixels = source.encode is None and shape is not None and len(shape) == 3
    size: dict[str, Any] = {"size": shape[1], "channels": shape[0]} if pixels and shape is not None else {}
    whole = load(name, split=split, **size)
    if source.encode is None and shape is not None and whole.shape != shape:
        raise ValueError(f"`data` {name} has examples of shape {whole.shape}, the model was made for {shape}: name its data")
    if source.classes and (whole.labels is None or int(whole.labels.max()) >= len(source.classes)):
        raise ValueError(f"`data` {name} must have labels of the model's {len(source.classes)} classes: name its training data")
    index = torch.arange(len(whole))
    if bank is not None and bank < len(whole):
        index = distinct(bank, len(whole), torch.empty(0, dtype=torch.int64), seed, 0, "bank").sort().values
    device = source.denoiser.device
    labels = whole.labels[index].to(device) if source.classes and whole.labels is not None else None
    return _values(source, whole, index, batch, device), labels, whole.name


@torch.no_grad()
def _values(source: Source, whole: Dataset, index: Tensor, batch: int, device: torch.device) -> Tensor:
    """Examples as the denoiser works on them: bytes stay bytes until they are used, latents are encoded."""
    if source.encode is None:
        return whole.images[index].to(device)
    return torch.cat([source.encode(whole.batch(part)[0].to(device)).float() for part in index.split(batch)])


def _levels(schedule: Schedule | None, count: int) -> Tensor:
    """Log-SNRs (count,), from data to noise, evenly spread over what training visits."""
    ends = torch.tensor([0.002, 80.0], dtype=torch.float64).log().mul(-2)
    if schedule is not None:
        with torch.no_grad():
            ends = schedule(torch.tensor([0.002, 0.998], dtype=torch.float64)).double().cpu()
        ends = ends.clamp(-2 * math.log(200.0), -2 * math.log(0.002))
    return torch.linspace(float(ends[0]), float(ends[1]), count, dtype=torch.float64)


def _rows(variance: TargetVariance, loss: NetworkLoss, density: Tensor | None) -> list[Row]:
    """The table: a row for each level, numbers of variance and loss per element and in units of eps."""
    rows: list[Row] = []
    for i, lam in enumerate(variance.lam.tolist()):
        unit = math.exp(lam)
        row: Row = {"sigma/alpha": math.exp(-0.5 * lam), "log-SNR": lam, "phase": variance.phases[i]}
        if density is not None:
            row["density"] = float(density[i])
        row["plain"] = float(variance.plain[i]) * unit
        for n in variance.stable:
            row[f"stable {n}"] = float(variance.stable[n][i]) * unit
            row[f"ESS {n}"] = float(variance.ess[n][i])
            row[f"largest {n}"] = float(variance.largest[n][i])
            row[f"removed {n}"] = float(variance.within[n][i]) * unit
        rows.append(row | {"loss": float(loss.loss[i]) * unit, "gap": float(loss.gap[i]) * unit})
    return rows


def _table(rows: Sequence[Row]) -> str:
    """What is printed of it: all but the largest weights and what was removed."""
    shown = [name for name in rows[0] if not name.startswith(("largest", "removed", "log-SNR"))]
    lines = ["".join(f"{name:>12}" for name in shown)]
    for row in rows:
        lines.append("".join(f"{row[name]:>12d}" if name == "phase" else f"{row[name]:>12.4g}" for name in shown))
    return "\n".join(lines)


def _write(
    folder: Path, facts: dict[str, Any], rows: list[Row], variance: TargetVariance, loss: NetworkLoss, density: Tensor | None
) -> None:
    from ..reports.diagnosis_plot import diagnosis_png

    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    title = f"{facts['source']} on {facts['data']}"
    with writing(folder):
        write_atomic(folder / "diagnosis.csv", text.getvalue().encode())
        write_atomic(folder / "diagnosis.json", (json.dumps(facts | {"levels": rows}, indent=1) + "\n").encode())
        write_atomic(folder / "diagnosis.png", diagnosis_png(variance, loss, density, title))
