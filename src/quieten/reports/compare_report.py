"""The page of a comparison: curves, numbers, pictures of the same seeds, and all that is needed to do it again."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from torch import Tensor

from ..comparing.compare import Row
from ..comparing.judge import PAIRS
from ..metrics import Protocol, Result
from ..report import Report
from .chart import Point, legend, scatter
from .plots import grid_image, spaced

__all__ = ["Facts", "page", "series_name", "summary"]

STRIP = 10
"""Pictures in a row of samples."""

METRICS = {"frechet": "Frechet distance", "kid": "1000 KID", "precision": "precision", "recall": "recall"}
"""What the table shows, and how it calls them."""


@dataclass(frozen=True)
class Facts:
    """What the page says beside the rows.

    Attributes:
        command: What made it.
        data: Name of the data.
        real: What real examples outside the reference score.
        left_out: Samplers that did not take part, with the reason.
        notes: Remarks of the metrics.
        settings: Name and value of what all rows share.
        unfinished: Number of cells that are still to come.
        real_images: Some of the real examples, as samples are.
    """

    command: str
    data: str
    real: Mapping[str, Result]
    left_out: Sequence[str]
    notes: Sequence[str]
    settings: Mapping[str, Any]
    unfinished: int = 0
    real_images: Tensor | None = None


def page(rows: Sequence[Row], facts: Facts) -> Report:
    """The report of a comparison; rows that failed are listed with the reason."""
    models = list(dict.fromkeys(row.contender.model for row in rows))
    done = [row for row in rows if row.failure is None]
    title = f"{' and '.join(models) or 'Nothing'} on {facts.data}: samplers side by side"
    report = Report(title, summary(done) if done else "Nothing is finished yet.")
    if facts.unfinished:
        report.text(f"**Unfinished**: {facts.unfinished} more to come; the same command goes on.")
    report.command(facts.command)
    if done:
        _quality(report, done, facts, len(models) > 1)
        _table(report, rows, facts, len(models) > 1)
        _samples(report, done, facts, len(models) > 1)
        _protocol(report, done, facts)
    if facts.left_out or len(done) < len(rows):
        report.section("Left out")
        failed = [f"{row.contender.model}, {row.contender.title}: {row.failure}" for row in rows if row.failure]
        report.text("\n".join(f"- {line}" for line in [*facts.left_out, *failed]))
    _again(report, done)
    return report


def summary(rows: Sequence[Row]) -> str:
    """What was found, in two sentences."""
    best = min(rows, key=lambda row: row.results["frechet"].value)
    result = best.results["frechet"]
    near = result.value + (result.uncertainty or 0.0)
    cheap = min((row for row in rows if row.results["frechet"].value <= near), key=lambda row: row.evaluations)
    text = (
        f"Nearest to the data is {_full(best)}: Frechet distance {result.figure()} at {best.evaluations:g} evaluations of "
        "the network a sample (NFE)."
    )
    if cheap is best:
        return text + " Nothing cheaper comes within one standard error of it."
    return text + f" The cheapest within one standard error of it is {_full(cheap)}, at {cheap.evaluations:g}."


def _full(row: Row) -> str:
    c = row.contender
    return c.sampler if c.steps is None else f"{c.sampler} in {c.steps} steps"


def series_name(row: Row, several: bool) -> str:
    """What a row's curve is called."""
    return f"{row.contender.model} · {row.contender.sampler}" if several else row.contender.sampler


# ---- curves


def _quality(report: Report, rows: Sequence[Row], facts: Facts, several: bool) -> None:
    report.section("Quality against cost")
    names = list(dict.fromkeys(series_name(row, several) for row in rows))
    report.add(legend(names), script=True)
    report.add(f'<div class="charts">{"".join(_charts(rows, names, "frechet", facts, several))}</div>')
    report.text(
        "Lower and further left is better; shaded: the best for its cost. Bars are one standard error over the draw of the "
        "samples. A name switches its curve off, a point leads to its row."
    )
    if all(row.results.get("kid") and row.results["kid"].value > 0 for row in rows):
        charts = "".join(_charts(rows, names, "kid", facts, several))
        report.add(f'<details><summary>The same by KID</summary><div class="charts">{charts}</div></details>')


def _charts(rows: Sequence[Row], names: Sequence[str], metric: str, facts: Facts, several: bool) -> Iterable[str]:
    label = {"frechet": "Frechet distance", "kid": "KID"}[metric]
    floor = facts.real[metric].value if metric in facts.real else None
    n = rows[0].n
    costs: list[tuple[str, Callable[[Row], float], list[float] | None]] = [
        ("network evaluations a sample (NFE)", lambda row: row.evaluations, spaced([row.evaluations for row in rows])),
        (f"seconds for {n:,} samples", lambda row: row.seconds, None),
    ]
    for xlabel, cost, ticks in costs:
        series = {name: [_point(k, row, cost, metric) for k, row in enumerate(rows) if series_name(row, several) == name]
                  for name in names}  # fmt: skip
        picture = scatter(series, xlabel=xlabel, ylabel=label, floor=floor, ticks=ticks)
        yield f"<figure>{picture}</figure>"


def _point(k: int, row: Row, cost: Callable[[Row], float], metric: str) -> Point:
    result = row.results[metric]
    words = f"{_full(row)}: {result.name} {result.figure()}, NFE {row.evaluations:g}, {row.seconds:.1f} s"
    return Point(cost(row), result.value, result.uncertainty or 0.0, words, f"r{k}")


# ---- numbers


def _table(report: Report, rows: Sequence[Row], facts: Facts, several: bool) -> None:
    report.section("Numbers")
    done = [row for row in rows if row.failure is None]
    shown = [name for name in METRICS if any(name in row.results for row in done)]
    bits = any(row.bits is not None for row in done)
    headers = [*(["model"] if several else []), "sampler", "steps", "NFE", *(METRICS[name] for name in shown),
               *(["bits/dim"] if bits else []), "seconds"]  # fmt: skip
    cells = []
    for row in done:
        c = row.contender
        cells.append([
            *([c.model] if several else []), c.sampler, c.steps, _whole(row.evaluations),
            *(_cell(row, name) for name in shown), *([_bits(row)] if bits else []), row.seconds,
        ])  # fmt: skip
    best: dict[str, Any] = {METRICS[name]: "max" if name in ("precision", "recall") else "min" for name in shown}
    best |= {"bits/dim": "min"} if bits else {}
    p = done[0].results["frechet"].protocol
    caption = f"{p.n:,} samples a row against {p.n_reference:,} of {p.reference}; ± is one standard error over their draw"
    report.table(headers, cells, caption, best=best, ids=[f"r{k}" for k in range(len(done))])
    if facts.real:
        parts = [f"{METRICS[name]} {_scaled(facts.real[name], name).figure()}" for name in shown if name in facts.real]
        count = facts.real["frechet"].protocol.n
        report.text(f"For comparison, {count:,} real examples that are not in the reference: {', '.join(parts)}.")
    if any(row.cpu < 0.6 * row.seconds for row in done):
        report.text(
            "**The machine was busy**: the processor worked on these samples for less than 60 % of some rows' seconds, so that "
            "seconds say less than evaluations do."
        )


def _whole(value: float) -> int | float:
    """An integer, where it is one: adaptive samplers take a number of their own for each sample."""
    return round(value) if value == round(value) else round(value, 1)


def _cell(row: Row, name: str) -> Result | None:
    return _scaled(row.results[name], name) if name in row.results else None


def _scaled(result: Result, name: str) -> Result:
    """KID in thousandths, the rest as it is."""
    if name != "kid":
        return result
    error = None if result.uncertainty is None else 1000 * result.uncertainty
    return Result(result.name, 1000 * result.value, error, result.protocol)


def _bits(row: Row) -> Result | None:
    if row.bits is None:
        return None
    return Result("bits/dim", *row.bits, row.results["frechet"].protocol)


# ---- pictures


def _samples(report: Report, rows: Sequence[Row], facts: Facts, several: bool) -> None:
    """For each number of steps a strip of every sampler, one below the other: a column is a seed."""
    if rows[0].images.ndim != 4 or rows[0].images.dtype != torch.uint8:
        return
    report.section("Samples")
    report.text("Every column began from the same noise and the same class.")
    for steps in sorted({row.contender.steps or 0 for row in rows}):
        chosen = [row for row in rows if (row.contender.steps or 0) == steps]
        strips = [_strip(series_name(row, several), row.results["frechet"], row.images) for row in chosen]
        heading = f"{steps} steps" if steps else "Steps of their own choice"
        report.add(f'<h3>{heading}</h3><div class="strips">{"".join(strips)}</div>')
    if facts.real_images is not None:
        report.add(f'<h3>Real</h3><div class="strips">{_strip("held out", None, facts.real_images)}</div>')


def _strip(name: str, result: Result | None, images: Tensor) -> str:
    count = STRIP if images.shape[-1] <= 64 else 5
    picture = grid_image(images[:count], columns=count, pad=1, scale=1)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    source = base64.b64encode(buffer.getvalue()).decode()
    value = "" if result is None else f'<span class="value">{escape(result.figure())}</span>'
    return (f'<div>{escape(name)}{value}</div><img class="pixels" src="data:image/png;base64,{source}" width="{picture.width}" '
            f'height="{picture.height}" alt="{escape(f"the first samples of {name}")}">')  # fmt: skip


# ---- how it was done


def _protocol(report: Report, rows: Sequence[Row], facts: Facts) -> None:
    report.section("Protocol")
    p: Protocol = rows[0].results["frechet"].protocol
    pairs = rows[0].results.get("kid")
    lines = [
        f"**Samples**: {p.n:,} of each row, seed {', '.join(map(str, p.seeds))}, {p.weights} weights; sample i starts from "
        "the same noise and has the same class in every row. Pictures are rounded to 8 bits before anything is measured.",
        f"**Reference**: {p.n_reference:,} examples, {p.reference}." + ("" if pairs is None else f" KID, precision and recall "
        f"compare with {pairs.protocol.n_reference:,} of them (at most {PAIRS:,}, a fixed choice), KID over all pairs."),
        f"**Features**: {p.extractor}, SHA-256 `{p.extractor_hash[:16]}`; {p.preprocessing}.",
        "**Frechet distance**: in float64 from eigenvalues. It has a bias that falls as 1/n: compare at equal n only. KID has "
        "none.",
        "**±**: one standard error over the draw of the samples, the reference and the model being fixed: by random halves for "
        "Frechet distance and recall, by leaving out groups for KID.",
        "**NFE**: evaluations of the network a sample, counted while they were drawn; both passes of guidance count.",
        "**Seconds**: from noise to finished samples on the wall's clock, measuring left out. The samplers of diffusers run in "
        "their own loop on the same network, clipping and noise, on levels of their own choice.",
    ]  # fmt: skip
    if any(row.bits is not None for row in rows):
        lines.append(f"**bits/dim**: the variational bound on test data in the very steps of the sampler, decoder included: "
                     f"{facts.settings.get('bits/dim', '')}. Samplers without densities have none.")  # fmt: skip
    lines += [f"**Note**: {note}." for note in facts.notes]
    report.text("\n".join(f"- {line}" for line in lines))


def _again(report: Report, rows: Sequence[Row]) -> None:
    report.section("To do it again")
    commands = [row.contender.command for row in rows if row.contender.command]
    if commands:
        n = rows[0].n
        text = escape("\n".join(f"{command} -n {n} --npz samples.npz" for command in commands))
        report.add(
            f'<details><summary>The samples of each row alone</summary><pre tabindex="0"><code>{text}</code></pre></details>'
        )
    seconds = sum(row.seconds for row in rows if math.isfinite(row.seconds))
    report.environment(sampling=f"{seconds:.0f} s in all")
