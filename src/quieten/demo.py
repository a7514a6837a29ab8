"""The main job, small: train on real digits, sample by several solvers, measure, report."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .data import Dataset, load
from .denoiser import Denoiser
from .files import writing
from .fit import train
from .metrics import Result, frechet, sliced_wasserstein
from .metrics.features import Extractor, Statistics
from .progress import Progress
from .report import Report, curve, grid_image, pareto
from .sampling import generate
from .solvers.samplers import sampler
from .training.config import build_grid
from .training.runs import Run
from .wrap import Clipped, Counted

__all__ = ["NAMES", "STEPS", "Row", "demo"]

NAMES = ("ddpm", "ddim", "heun", "dpm++")
"""The samplers that are compared."""

STEPS = (5, 10, 20, 50)
"""Their numbers of steps."""

OUT, N = Path("runs/demo"), 1000
"""Where the run goes, and how many samples make a row, unless told otherwise."""

BATCH = 250  # more at once are no faster on a CPU, and the progress bar moves
PROJECTIONS = 500


class Row(NamedTuple):
    """One sampler at one number of steps, measured on the same labels and the same initial noise as the others.

    `images` are the first samples, as many as there are held-out digits.
    """

    name: str
    steps: int
    evaluations: int
    frechet: Result
    wasserstein: Result
    recognised: float
    seconds: float
    images: Tensor


class _Bench(NamedTuple):
    """What every row is measured with."""

    run: Run
    denoiser: Denoiser
    data: Dataset
    test: Dataset
    reference: Statistics
    judge: Any
    n: int
    seed: int


def demo(
    out: str | Path = OUT,
    changes: Sequence[str] = (),
    *,
    n: int = N,
    names: Sequence[str] = NAMES,
    steps: Sequence[int] = STEPS,
    seed: int = 0,
) -> Path | None:
    """Trains the recipe `digits` (or resumes it), samples and measures.

    Arguments:
        out: Folder of the run.
        changes: Changes to the recipe, such as "train.images=1000".
        n: Samples of each row.
        names: Samplers.
        steps: Numbers of steps.
        seed: Of the samples.

    Returns:
        The path of the report; None if training was stopped by Ctrl-C.
    """
    summary = train("digits", changes, out)
    print(summary.message, flush=True)
    if not summary.done:
        return None
    run = Run.open(out)
    data, test = load("digits"), load("digits", split="test")
    pixels = Extractor.pixels()
    reference = Statistics.of(pixels.extract(data.all()), pixels.hash)
    bench = _Bench(run, run.denoiser("ema"), data, test, reference, _judge(data), n, seed)
    pairs = [(name, count) for name in names for count in steps]
    rows: list[Row] = []
    with Progress(n * len(pairs), 0, "sampling and measuring") as progress:
        for name, count in pairs:
            rows.append(_measure(bench, name, count, progress, n * len(rows)))
    options = [*(["--out", str(out)] if Path(out) != OUT else []), *(["-n", str(n)] if n != N else [])]
    command = shlex.join(["quieten", "demo", *options, *(f"--set={change}" for change in changes)])
    path = Path(out).expanduser() / "report.html"
    with writing(path):
        _report(bench, rows, summary.seconds, command).save(path)
    print(f"report: {path}")
    return path


def _measure(bench: _Bench, name: str, steps: int, progress: Progress, before: int) -> Row:
    transition, grid = sampler(name, build_grid(bench.run.recipe, steps))
    model, n, data = Counted(Clipped(bench.denoiser)), bench.n, bench.data
    label = torch.arange(n) % len(data.classes)
    cond, shown = {"label": label}, lambda k: progress.update(before + k)
    started = time.perf_counter()
    x = generate(model, n, grid=grid, transition=transition, cond=cond, batch=BATCH, seed=bench.seed, progress=shown)
    seconds = time.perf_counter() - started
    protocol: dict[str, Any] = {
        "reference_name": "the digits trained on",
        "seeds": (bench.seed,),
        "weights": "ema",
        "floor": bench.test.all(),
    }
    return Row(
        name,
        steps,
        model.rows // n,
        frechet(x, bench.reference, Extractor.pixels(), **protocol),
        sliced_wasserstein(x, data.all(), projections=PROJECTIONS, **protocol),
        _share(bench.judge, x, label),
        seconds,
        x[: len(bench.test)],
    )


def _judge(data: Dataset) -> Any:
    """A support-vector classifier of real digits, to tell whether a sample is the digit that was asked for."""
    from sklearn.svm import SVC

    return SVC(gamma=0.02, C=10.0).fit(data.all().flatten(1).numpy(), data.labels)


def _share(judge: Any, x: Tensor, label: Tensor | None) -> float:
    return math.nan if label is None else float((judge.predict(x.flatten(1).numpy()) == label.numpy()).mean())


# ---- the report


def _report(bench: _Bench, rows: Sequence[Row], seconds: float, command: str) -> Report:
    best = min(rows, key=lambda row: row.frechet.value)
    near = best.frechet.value + (best.frechet.uncertainty or 0.0)
    cheap = min((row for row in rows if row.frechet.value <= near), key=lambda row: row.evaluations)
    solvers, counts = list(dict.fromkeys(row.name for row in rows)), sorted({row.steps for row in rows})
    page = Report(
        "Digits, drawn",
        f"A diffusion model trained for {seconds:.0f} s on {len(bench.data):,} real handwritten digits, and what "
        f"{len(solvers)} solvers make of it in {counts[0]} to {counts[-1]} steps. The samples of {best.name} in {best.steps} "
        f"steps are nearest to the data; the cheapest within a standard error of them are those of {cheap.name} in "
        f"{cheap.steps}, {cheap.evaluations} evaluations of the network each.",
    )
    page.command(command)
    page.section("Samples")
    page.text("Each picture asks for 0 to 9, twice, from the same initial noise.")
    for name in solvers:
        page.grid([(_picture(row.images), f"{name}, {row.steps} steps") for row in rows if row.name == name])
    page.grid([(_picture(bench.test.all()[_by_class(bench.test)]), "real digits, held out")])
    _quality(page, bench, rows, best)
    _training(page, bench.run)
    return page


def _picture(images: Tensor) -> Any:
    """The first twenty digits, four rows of five: large enough to read beside three others."""
    return grid_image(images[:20], columns=5, pad=1, scale=1)


def _by_class(data: Dataset) -> Tensor:
    """Indices of examples of class 0, 1, ..., 9, 0, 1, ..., 9."""
    assert data.labels is not None  # digits have them
    return torch.stack([(data.labels == k).nonzero()[:2, 0] for k in range(len(data.classes))], 1).flatten()


def _quality(page: Report, bench: _Bench, rows: Sequence[Row], best: Row) -> None:
    page.section("Quality against cost")
    protocol = best.frechet.protocol
    names = dict.fromkeys(row.name for row in rows)
    curves = {name: [(row.evaluations, row.frechet) for row in rows if row.name == name] for name in names}
    page.figure(pareto(curves, ylabel="Frechet distance on pixels"), "Lower is better; shaded: the best for its cost.")
    page.table(
        ["solver", "steps", "NFE", "Frechet distance", "sliced Wasserstein", "recognised, %", "seconds"],
        [[r.name, r.steps, r.evaluations, r.frechet, r.wasserstein, 100 * r.recognised, r.seconds] for r in rows],
        f"{protocol.n} samples a row, seed {protocol.seeds[0]}, averaged weights, x0 clipped to [-1, 1]",
        best={"Frechet distance": "min", "sliced Wasserstein": "min"},
    )
    held_out, real = len(best.images), _share(bench.judge, bench.test.all(), bench.test.labels)
    same = frechet(best.images, bench.data.all(), Extractor.pixels(), splits=0).value
    page.text(
        f"- **NFE**: evaluations of the network a sample.\n"
        f"- **Frechet distance**: in float64 on {protocol.extractor} (`{protocol.extractor_hash[:12]}`), against "
        f"{protocol.reference}, {protocol.n_reference} images. It has a bias that falls as 1/n, so only equal numbers compare: "
        f"{held_out} held-out real digits score {best.frechet.details['floor']:.3f}, the first {held_out} samples of "
        f"{best.name} in {best.steps} steps {same:.3f}. Less than the held-out digits is no triumph: the "
        f"reference is what the model was trained on.\n"
        f"- **Sliced Wasserstein**: over {PROJECTIONS} projections of the same pixels.\n"
        f"- **Recognised**: samples that a support-vector classifier takes for the digit that was asked for. It recognises "
        f"{100 * real:.1f} % of the held-out real digits: more than that means samples that are too typical.\n"
        f"- **±** is one standard error over the draw of the samples; another training would move the figures too.\n"
        f"- **Seconds** are for sampling alone."
    )


def _training(page: Report, run: Run) -> None:
    page.section("Training")
    lines = run.metrics()
    page.figure(
        curve([m["images"] for m in lines], [m["loss"] for m in lines], xlabel="images shown", ylabel="loss"),
        "Training loss.",
    )
    previews = sorted((run.path / "samples").glob("step-*.png"))
    if previews:
        batch = run.recipe.train.batch
        shown = [(file, f"{int(file.stem.removeprefix('step-')) * batch:,} images") for file in _some(previews, 3)]
        page.grid(shown, "The same noise during training, 0 to 9 across.")
    page.section("Environment")
    page.environment(recipe=run.recipe.name, training_images=f"{lines[-1]['images']:,}")


def _some(files: Sequence[Path], most: int) -> list[Path]:
    """At most so many, evenly spread, the last among them."""
    count = min(most, len(files))
    return [files[round((k + 1) * len(files) / count) - 1] for k in range(count)]
