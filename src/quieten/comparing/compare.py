"""Samplers side by side: each cell of a comparison is drawn in chunks that are kept, then judged.

A cell is a model, a sampler and a number of steps. What was drawn lies in a folder whose name is a hash of everything that the
samples depend on, so an interrupted comparison goes on where it was, and a changed model, variance or option starts afresh.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..files import write_atomic, writing
from ..metrics import Result
from ..progress import Progress
from ..wrap import Counted
from .judge import Judge

__all__ = ["Cell", "Contender", "Row", "compare"]

SHOWN = 64
"""Samples of a row that are kept at hand, for pictures."""


@dataclass(frozen=True)
class Bits:
    """How the likelihood of a sampler is measured.

    Attributes:
        facts: What the number depends on beside the sampler, ready for JSON.
        measure: Gives bits/dim and its standard error.
    """

    facts: Mapping[str, Any]
    measure: Callable[[], tuple[float, float]]


@dataclass(frozen=True, eq=False)
class Contender:
    """What takes part: a model, a sampler, a number of steps.

    Attributes:
        model: Name of the model.
        sampler: Name of the sampler.
        steps: As given; None where the sampler has its own.
        counted: Counts the network's evaluations while `draw` runs.
        draw: Indices of samples -> those samples, finished, on the CPU: uint8 pictures, or floats (n, *).
        facts: Everything that the samples depend on, ready for JSON.
        evaluations: Forecast of the network's evaluations a sample.
        command: What draws the same samples from the command line; empty where nothing else does.
        weights: Which weights these are, for the protocol.
        seed: Of the samples, for the protocol.
        bits: Its likelihood; None where it has none, or none is asked for.
    """

    model: str
    sampler: str
    steps: int | None
    counted: Counted
    draw: Callable[[range], Tensor]
    facts: Mapping[str, Any]
    evaluations: float
    command: str = ""
    weights: str = "unstated"
    seed: int = 0
    bits: Bits | None = None

    @property
    def key(self) -> str:
        """SHA-256 of the facts."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()

    @property
    def title(self) -> str:
        """For people."""
        return self.sampler if self.steps is None else f"{self.sampler}, {self.steps} steps"


@dataclass(frozen=True, eq=False)
class Row:
    """A cell, measured.

    Attributes:
        contender: Whose.
        n: Number of samples.
        evaluations: Network evaluations a sample, counted.
        seconds: Time to draw all n, on the wall's clock, measuring left out.
        cpu: The same on the processor's clock, of all threads together.
        images: The first samples, at most `SHOWN`.
        results: Metrics by name, with their protocols.
        bits: Bits/dim and its standard error; None where undefined or not asked for.
        failure: Why there are no results; None if there are.
    """

    contender: Contender
    n: int
    evaluations: float = math.nan
    seconds: float = math.nan
    cpu: float = math.nan
    images: Tensor = field(default_factory=lambda: torch.empty(0))
    results: Mapping[str, Result] = field(default_factory=dict)
    bits: tuple[float, float] | None = None
    failure: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the samples, ready for JSON."""
        c = self.contender
        numbers = {"evaluations": self.evaluations, "seconds": self.seconds, "cpu_seconds": self.cpu}
        return {
            "model": c.model, "sampler": c.sampler, "steps": c.steps, "n": self.n, "key": c.key, "command": c.command,
            **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
            "bits_per_dim": None if self.bits is None else {"value": self.bits[0], "uncertainty": self.bits[1]},
            "failure": self.failure, "results": {name: result.to_dict() for name, result in self.results.items()},
            "facts": dict(c.facts),
        }  # fmt: skip


@dataclass(frozen=True)
class Chunk:
    """Some neighbouring samples of a cell, as they lie in a file."""

    path: Path
    first: int
    stop: int


class Cell:
    """The samples of a contender on disk: `FIRST-STOP.safetensors`, each with what it took.

    Arguments:
        folder: Where all cells lie.
        contender: Whose.
    """

    def __init__(self, folder: Path, contender: Contender):
        words = [contender.model, contender.sampler, *([] if contender.steps is None else [str(contender.steps)])]
        slug = "-".join("".join(c if c.isalnum() or c in "+." else "-" for c in word).strip("-.") for word in words)
        self.folder, self.contender = folder / f"{slug}-{contender.key[:12]}", contender

    def chunks(self) -> list[Chunk]:
        """Those that follow one another from sample 0 on."""
        found = []
        for path in self.folder.glob("*-*.safetensors"):
            first, _, stop = path.stem.partition("-")
            if first.isdigit() and stop.isdigit():
                found.append(Chunk(path, int(first), int(stop)))
        chosen: list[Chunk] = []
        for chunk in sorted(found, key=lambda chunk: (chunk.first, -chunk.stop)):
            if chunk.first == (chosen[-1].stop if chosen else 0):
                chosen.append(chunk)
        return chosen

    def missing(self, n: int, batch: int) -> Iterator[range]:
        """The chunks that are still to be drawn."""
        chunks = self.chunks()
        first = chunks[-1].stop if chunks else 0
        for start in range(first, n, batch):
            yield range(start, min(start + batch, n))

    def draw(self, rows: range) -> None:
        """Draws a chunk and keeps it.

        Raises:
            ValueError: If a sample is not finite, or the folder cannot be written.
        """
        counted = self.contender.counted
        counted.calls = counted.rows = 0
        started, processor = time.perf_counter(), time.process_time()
        x = self.contender.draw(rows)
        took = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - processor, "rows": counted.rows}
        content = save({"samples": x.contiguous()}, {name: repr(value) for name, value in took.items()})
        with writing(self.folder, "finished chunks are intact"):
            if not (self.folder / "facts.json").is_file():
                write_atomic(self.folder / "facts.json", json.dumps(self.contender.facts, indent=1).encode())
            write_atomic(self.folder / f"{rows.start:07}-{rows.stop:07}.safetensors", content)

    def read(self, n: int) -> tuple[Tensor, dict[str, float]]:
        """The first n samples, and what they took: `seconds`, `cpu` and `rows` evaluated.

        Raises:
            ValueError: If a file is damaged.
        """
        parts, took = [], {"seconds": 0.0, "cpu": 0.0, "rows": 0.0}
        for chunk in self.chunks():
            if chunk.first >= n:
                break
            try:
                with safe_open(chunk.path, "pt") as file:
                    samples, metadata = file.get_tensor("samples"), file.metadata()
                share = (min(chunk.stop, n) - chunk.first) / (chunk.stop - chunk.first)
                took = {name: total + share * float(metadata[name]) for name, total in took.items()}
            except (SafetensorError, KeyError, OSError, ValueError) as error:
                raise ValueError(f"{chunk.path} is damaged ({error}): delete it, the same command draws it again") from error
            parts.append(samples[: n - chunk.first])
        return torch.cat(parts), took


def compare(
    contenders: Sequence[Contender],
    judge: Judge,
    folder: str | Path,
    *,
    n: int,
    batch: int = 100,
    draw: bool = True,
    show: bool = True,
    finished: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Draws what is missing of every contender, cheapest first, and judges it.

    Ctrl-C leaves as KeyboardInterrupt; finished chunks and cells are kept, and the same call goes on.

    Arguments:
        contenders: Those of equal facts are drawn and shown once.
        judge: What measures them.
        folder: Where samples, features and results are kept.
        n: Samples of each.
        batch: Samples of a chunk; what was drawn in chunks of another size counts too.
        draw: False measures what was drawn before, and draws nothing: unfinished cells have no row.
        show: Whether to show progress on standard error.
        finished: Called with each row as soon as it is there.

    Returns:
        The rows in the order of the contenders. A sampler that fails has a row that says why.

    Raises:
        ValueError: If the folder cannot be written, or holds damaged files.
    """
    if n < 2 or batch < 1:
        raise ValueError(f"`n` must be at least 2 and `batch` at least 1 (got {n}, {batch})")
    cells = {c.key: Cell(Path(folder), c) for c in contenders}
    queue = sorted(cells.values(), key=lambda cell: cell.contender.evaluations)
    if not draw:
        queue = [cell for cell in queue if not any(cell.missing(n, batch))]
    todo = {cell.contender.key: sum(map(len, cell.missing(n, batch))) for cell in queue}
    _ = judge.statistics  # before the clock of the progress starts
    plan = Plan({key: cells[key].contender.evaluations for key in cells}, n, todo)
    rows: dict[str, Row] = {}
    with Progress(plan.total, plan.done, "comparing", show, unit="evaluations") as progress:
        for cell in queue:
            key = cell.contender.key
            try:
                for part in cell.missing(n, batch):
                    cell.draw(part)
                    plan.account(key, len(part), cell.contender.counted.rows)
                    progress.total = plan.total
                    progress.update(plan.done)
                rows[key] = _judged(cell, judge, n)
            except ValueError as error:
                if "cannot be written" in str(error) or "is damaged" in str(error):
                    raise
                rows[key] = Row(cell.contender, n, failure=" ".join(str(error).split()))
                plan.give_up(key)
            finished(rows[key])
    return [rows[key] for key in cells if key in rows]


class Plan:
    """How much of the work is done, in evaluations of the network: forecasts give way to what was counted."""

    def __init__(self, evaluations: Mapping[str, float], n: int, todo: Mapping[str, int]):
        self.each, self.left = dict(evaluations), dict(todo)
        self.done = round(sum(self.each[key] * (n - todo[key]) for key in todo))

    @property
    def total(self) -> int:
        return self.done + round(sum(self.each[key] * count for key, count in self.left.items()))

    def account(self, key: str, samples: int, rows: int) -> None:
        self.done += rows
        self.left[key] -= samples
        self.each[key] = rows / samples

    def give_up(self, key: str) -> None:
        self.left[key] = 0


def _judged(cell: Cell, judge: Judge, n: int) -> Row:
    contender = cell.contender
    samples, took = cell.read(n)
    row = Row(contender, n, took["rows"] / n, took["seconds"], took["cpu"], samples[:SHOWN])
    results = judge.kept(cell.folder, lambda: samples, n, seeds=(contender.seed,), weights=contender.weights)
    return replace(row, results=results, bits=_bits(cell))


def _bits(cell: Cell) -> tuple[float, float] | None:
    """Bits/dim and its standard error, measured once."""
    bits = cell.contender.bits
    if bits is None:
        return None
    key = hashlib.sha256(json.dumps(bits.facts, sort_keys=True).encode()).hexdigest()
    path = cell.folder / f"bits-{key[:12]}.json"
    if not path.is_file():
        value, error = bits.measure()
        with writing(path):
            write_atomic(path, json.dumps({"value": value, "uncertainty": error, "facts": bits.facts}, indent=1).encode())
    content = json.loads(path.read_text("utf-8"))
    return content["value"], content["uncertainty"]
