"""`quieten diagnose --guidance`."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..denoiser import Denoiser
from ..files import write_atomic, writing
from ..guidance import Guidance
from ..guiding.stability import SOLVERS, Chart, stability, stability_png
from ..progress import Progress
from ..training.source import Source, open_source
from ..wrap import Clipped
from .diagnose import results_folder
from .guide import Guide, open_guide

__all__ = ["diagnose_guidance"]


def diagnose_guidance(
    source: str,
    guide: str,
    *,
    classifier: str | None = None,
    measurement: Path | None = None,
    mask: Path | None = None,
    scales: Sequence[float] = (1.0, 3.0, 10.0),
    steps: Sequence[int] = (5, 10, 15, 20, 25),
    solvers: Sequence[str] = SOLVERS,
    n: int = 16,
    reference: int = 1000,
    seed: int = 0,
    out: Path | None = None,
    weights: str = "ema",
    device: str | None = None,
) -> None:
    """Tries solvers, steps and scales, writes a chart and a table, and says what to take; arguments are the command's options.

    Raises:
        ValueError: For a guide, a solver or numbers that do not fit, or a folder that cannot be written.
    """
    opened = open_source(source, weights, device)
    if opened.denoiser.shape is None or opened.decode is not None:
        raise ValueError(f"`source` {source} draws latents: diagnose a model that draws pictures, or vectors, directly")
    asked: dict[str, Any] = {"classifier": classifier, "measurement": measurement, "mask": mask, "std": None}
    guides = {scale: open_guide(opened, guide, n, scale=scale, **asked) for scale in scales}
    folder = results_folder(opened, out, "guidance.csv", b"")
    denoiser = _unguided(opened, next(iter(guides.values()), None), n)

    def guidance(scale: float) -> Guidance:
        return guides[scale].make(slice(0, n))

    total = len(scales) * (reference + len(solvers) * sum(steps))
    with Progress(total, 0, "steps") as progress:
        chart = stability(
            denoiser, guidance, lambda count: opened.grid(count, None), opened.denoiser.shape, n=n, scales=scales, steps=steps,
            solvers=solvers, reference=reference, seed=seed, device=opened.denoiser.device, progress=progress.update,
        )  # fmt: skip
    with writing(folder):
        write_atomic(folder / "guidance.png", stability_png(chart))
        write_atomic(folder / "guidance.csv", _csv(chart))
    print(_table(chart))
    for line in chart.advice():
        print(line)
    print(f"{folder}: guidance.png, guidance.csv; {n} samples, seed {seed}, against DDIM in {reference} steps")


# ---- its parts


def _unguided(source: Source, guide: Guide | None, n: int) -> Denoiser:
    """The denoiser that guidance is added to: without a class where the model can, and its estimate clipped."""
    if source.prompt is not None:
        raise ValueError("`source` draws what a text says: diagnose a model of classes, or without conditions")
    denoiser = source.denoiser if source.clip is None else Clipped(source.denoiser, source.clip)
    if not source.classes:
        return denoiser
    if "label" in source.null:
        label = torch.full((n,), int(source.null["label"]))
    elif guide is not None and guide.classes is not None and guide.names == source.classes:
        label = guide.classes
    else:
        label = torch.arange(n) % len(source.classes)
    return denoiser.bind(label=label.to(source.denoiser.device))


def _csv(chart: Chart) -> bytes:
    buffer = io.StringIO()
    rows = chart.rows()
    writer = csv.DictWriter(buffer, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


def _table(chart: Chart) -> str:
    """How far off in per cent of the samples' size, or the largest state where a path blew up."""
    steps = sorted({t.steps for t in chart.trials})
    lines = ["scale  solver      " + "".join(f"{f'{count} steps':>12s}" for count in steps)]
    for scale, size in chart.size.items():
        for name in dict.fromkeys(t.solver for t in chart.trials):
            cells = {t.steps: t for t in chart.trials if (t.solver, t.scale) == (name, scale)}
            words = (f"{cells[k].distance / size:.0%}" if cells[k].stable else f"!{cells[k].largest:.3g}" for k in steps)
            lines.append(f"{scale:<6g} {name:12s}" + "".join(f"{word:>12s}" for word in words))
    lines.append("off the path of many steps, in % of the samples' size; !: unstable, with its largest state")
    return "\n".join(lines)
