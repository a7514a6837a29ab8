"""`quieten compare`."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..comparing.compare import Bits, Contender, Row, compare
from ..comparing.judge import Judge
from ..comparing.lineup import GROUPS, Entrant, standard
from ..data import Dataset, to_pixels
from ..denoiser import Denoiser
from ..files import write_atomic, writing
from ..likelihood import evaluate, fit_decoder
from ..likelihoods.decoders import Plain
from ..metrics.features import Extractor
from ..reports.compare_report import METRICS, Facts, page, series_name
from ..reports.plots import pareto
from ..training.source import Source, open_source
from ..transition import Ancestral, Transition
from ..tuning.tuned import Tuned
from .nll import Asked, decoder_of, examples_of, load_data

__all__ = ["results_folder", "run"]


def run(
    source: str,
    data: str,
    *,
    transitions: Sequence[str] = (),
    steps: Sequence[int] = (5, 10, 20, 50),
    against: Sequence[str] = (),
    n: int = 2000,
    seed: int = 0,
    batch: int = 100,
    features: str | None = None,
    nll: int = 0,
    scale: float | None = None,
    prompt: str | None = None,
    clip: bool | None = None,
    spacing: str | None = None,
    out: Path | None = None,
    figure: Path | None = None,
    weights: str = "ema",
    device: str | None = None,
    draw: bool = True,
    command: str = "",
) -> bool:
    """Draws and measures what is missing, writes `report.html` and `results.json`; the arguments are the command's options.

    Returns:
        False if Ctrl-C stopped it; what was finished is kept, and the report shows it.

    Raises:
        ValueError: For a sampler, data or an extractor that are not there or do not fit, or a folder that cannot be written.
    """
    if figure is not None and figure.suffix.lower() != ".png":
        raise ValueError(f"`--figure {figure}` must be the name of a .png file: end it in .png")
    options: dict[str, Any] = {"seed": seed, "scale": scale, "clip": clip, "prompt": prompt, "spacing": spacing, "batch": batch}
    opened = {name: open_source(name, weights, device) for name in dict.fromkeys([source, *against])}
    reference, floor = _data(opened[source], data)
    _check_shapes(opened, reference)
    if nll and floor is None:
        raise ValueError(f"`--nll {nll}` measures test data, {data} has none of its own: leave it out")
    folder = results_folder(opened[source], source, out)
    judge = Judge(_extractor(features, reference, opened[source]), reference, folder / "reference", floor)
    entrants = []
    for name, one in opened.items():
        bits = None if nll == 0 else _likelihood(one, data, nll, seed, batch)
        entrants.append(Entrant(name, one, **options, bits=bits))
    contenders, left_out = _contenders(entrants, transitions, steps)
    done: dict[str, Row] = {}

    def finished(row: Row) -> None:
        done[row.contender.key] = row

    stopped = False
    try:
        compare(contenders, judge, folder / "cells", n=n, batch=batch, draw=draw, finished=finished)
    except KeyboardInterrupt:
        stopped = True
    rows = [done[key] for key in dict.fromkeys(c.key for c in contenders) if key in done]
    real = {} if stopped and not rows else judge.real(n)
    missing = len({c.key for c in contenders}) - len(rows)
    shown = None if floor is None or len(reference.shape) != 3 else to_pixels(floor.batch(_by_class(floor, 10))[0])
    settings = {"bits/dim": f"{nll} test examples, x0 quantised to 8 bits, Gaussian decoder fitted on training data"}
    facts = Facts(command, reference.name, real, left_out, list(judge.notes), settings, missing, shown)
    _write(folder, rows, facts, figure)
    if stopped:
        print(f"stopped with {len(rows)} of {len(rows) + missing} rows finished: the same command goes on")
    return not stopped


# ---- before the work


def _data(source: Source, name: str) -> tuple[Dataset, Dataset | None]:
    """Training data, the reference, and test data, which say how well one can do."""
    shape = source.denoiser.shape if source.encode is None else source.image
    size = {"channels": shape[0], "size": shape[1]} if shape is not None and len(shape) == 3 else {}
    reference = load_data(name, "train", size)
    try:
        return reference, load_data(name, "test", size)
    except ValueError:  # it has no test data of its own
        return reference, None


def _check_shapes(opened: dict[str, Source], data: Dataset) -> None:
    for name, source in opened.items():
        shape = source.denoiser.shape if source.decode is None else source.image
        if shape is not None and tuple(shape) != data.shape:
            raise ValueError(f"{name} draws {tuple(shape)}, {data.name} has examples of shape {data.shape}: give other data")


def _extractor(name: str | None, data: Dataset, source: Source) -> Extractor:
    if name is not None:
        return Extractor.load(name)
    try:
        return Extractor.zoo(data.name)
    except ValueError:
        return Extractor.pixels()


def results_folder(source: Source, name: str, out: Path | None) -> Path:
    """Where the results of a model go: `--out`, else beside its samples, else ./compare/NAME; made, and tried."""
    if out is None:
        # "./pipe" would hide the folder
        slug = name.removeprefix("zoo:").lstrip("./~").rstrip("/").replace("/", "--") or Path(name).expanduser().resolve().name
        out = source.home.parent / "compare" if source.home.name == "samples" else Path("compare") / slug
    out = out.expanduser()
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / ".try", b"")
        (out / ".try").unlink()
    return out


def _contenders(entrants: Sequence[Entrant], names: Sequence[str], steps: Sequence[int]) -> tuple[list[Contender], list[str]]:
    """Who takes part, and who cannot, with the reason. A name that no model has is an error."""
    contenders: list[Contender] = []
    left_out: dict[str, None] = {}
    for name in names:
        reasons: list[str] = []
        before = len(contenders)
        for entrant in entrants:
            for one, count in product(entrant.expand([name]), steps):
                try:
                    contenders.append(entrant.contender(one, count))
                except ValueError as error:
                    reasons.append(f"{entrant.name}, {one} in {count} steps: {' '.join(str(error).split())}")
        if reasons and len(contenders) == before and name not in GROUPS:
            raise ValueError(f"`--transitions {name}`: {reasons[0].partition(' steps: ')[2]}")
        left_out |= dict.fromkeys(reasons)
    if not names:
        for entrant in entrants:
            more, reasons = _contenders([entrant], standard(entrant.source), steps)
            contenders += more
            left_out |= dict.fromkeys(reasons)
    if not contenders:
        raise ValueError(f"`--transitions {','.join(names)}` names nothing that this model has: see `quieten samplers`")
    return contenders, list(left_out)


def _likelihood(source: Source, data: str, n: int, seed: int, batch: int) -> Any:
    """(model, transition, grid) -> how its bound is measured, in the steps of the sampler; None without densities."""
    asked = Asked(n=n, seed=seed, batch=batch)
    examples, fitting, whole = examples_of(source, data, asked)
    decoder = decoder_of(source, whole, asked)

    def bits(model: Denoiser, transition: Transition, grid: Tensor) -> Bits | None:
        # the bound compares with the posterior of the forward process, whose noise is that of eta 1; a policy has its own
        has_densities = isinstance(transition, Tuned) or (isinstance(transition, Ancestral) and transition.eta == 1.0)
        if not has_densities or isinstance(decoder, Plain):
            return None

        def measure() -> tuple[float, float]:
            given: dict[str, Any] = {"batch": batch, "encoder": source.encoder, "transition": transition}
            fitted = fit_decoder(decoder, model, fitting.x0, float(grid[-2]), cond=fitting.cond, seed=seed, **given)
            values = evaluate(model, examples.x0, fitted, grid, cond=examples.cond, seed=seed, **given).bits_per_dim()
            return float(values.mean()), float(values.std()) / math.sqrt(len(values))

        return Bits({"data": whole.name, "split": asked.split, "n": n, "seed": seed, "fit": asked.fit}, measure)

    return bits


# ---- afterwards


def _by_class(data: Dataset, n: int) -> Tensor:
    """The first example of each class in turn, n in all; the first n without classes."""
    if data.labels is None:
        return torch.arange(min(n, len(data)))
    seen: list[int] = []
    for k in range(n):
        of_class = (data.labels == k % len(data.classes)).nonzero()[:, 0]
        seen += of_class[k // len(data.classes)][None].tolist() if len(of_class) > k // len(data.classes) else []
    return torch.tensor(seen, dtype=torch.int64)


def _write(folder: Path, rows: Sequence[Row], facts: Facts, figure: Path | None) -> None:
    content = {
        "command": facts.command, "data": facts.data, "unfinished": facts.unfinished, "left_out": list(facts.left_out),
        "notes": list(facts.notes), "real": {name: result.to_dict() for name, result in facts.real.items()},
        "rows": [row.to_dict() for row in rows],
    }  # fmt: skip
    with writing(folder, "samples and features are intact"):
        write_atomic(folder / "results.json", json.dumps(content, indent=1).encode())
        page(rows, facts).save(folder / "report.html")
    done = [row for row in rows if row.failure is None]
    if done:
        print(_table(done))
    for row in rows:
        if row.failure is not None:
            print(f"{row.contender.title}: {row.failure}")
    print(f"report: {folder / 'report.html'}")
    if figure is not None and done:
        with writing(figure):
            write_atomic(figure, _figure(done, facts))
        print(f"figure: {figure}")


def _figure(rows: Sequence[Row], facts: Facts) -> bytes:
    """Quality against evaluations as a PNG on white, for pages that take no HTML."""
    several = len({row.contender.model for row in rows}) > 1
    names = dict.fromkeys(series_name(row, several) for row in rows)
    points = {
        name: [(row.evaluations, row.results["frechet"]) for row in rows if series_name(row, several) == name] for name in names
    }
    floor = facts.real["frechet"].value if "frechet" in facts.real else None
    p = rows[0].results["frechet"].protocol
    drawn = pareto(points, ylabel=f"Frechet distance, n = {p.n:,}", floor=floor)
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=170, facecolor="white")
    return buffer.getvalue()


class _Column(NamedTuple):
    head: str
    cells: list[str]


def _table(rows: Sequence[Row]) -> str:
    """The table for a terminal."""
    several = len({row.contender.model for row in rows}) > 1
    columns = [_Column("sampler", [series_name(row, several) for row in rows])]
    columns.append(_Column("steps", ["" if row.contender.steps is None else str(row.contender.steps) for row in rows]))
    columns.append(_Column("NFE", [f"{row.evaluations:g}" for row in rows]))
    for name, head in METRICS.items():
        if name == "kid":
            continue
        columns.append(_Column(head, [row.results[name].figure() if name in row.results else "" for row in rows]))
    if any(row.bits for row in rows):
        columns.append(
            _Column("bits/dim", ["" if row.bits is None else f"{row.bits[0]:.3f} ± {row.bits[1]:.3f}" for row in rows])
        )
    columns.append(_Column("seconds", [f"{row.seconds:.1f}" for row in rows]))
    widths = [max(map(len, (column.head, *column.cells))) for column in columns]
    lines = [[column.head for column in columns], *([column.cells[k] for column in columns] for k in range(len(rows)))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )
