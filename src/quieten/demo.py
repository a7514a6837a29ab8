"""The main job, small: train on real digits, sample by several solvers, measure, report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .commands import console, counter
from .config import build_grid
from .data import Dataset, load
from .features import Extractor
from .fit import train
from .metrics import Result, frechet, sliced_wasserstein
from .report import Report, curve, grid_image, pareto
from .runs import Run
from .sample import generate
from .samplers import sampler
from .wrap import Clipped, Counted

__all__ = ["Row", "demo"]

NAMES = ("ddpm", "ddim", "heun", "dpm++")
STEPS = (5, 10, 20, 50)


class Row(NamedTuple):
    """One sampler at one number of steps, measured on the same labels and the same initial noise as the others."""

    name: str
    steps: int
    evaluations: int
    frechet: Result
    wasserstein: Result
    recognised: float
    rate: float
    images: Tensor


def demo(
    out: str | Path = "runs/demo",
    changes: Sequence[str] = (),
    *,
    n: int = 1000,
    names: Sequence[str] = NAMES,
    steps: Sequence[int] = STEPS,
    seed: int = 0,
) -> Path:
    """Trains the recipe `digits` (or resumes it), samples and measures; returns the path of the report.

    Arguments:
        out: Folder of the run.
        changes: Changes to the recipe, such as "train.images=1000".
        n: Samples of each row.
        names: Samplers.
        steps: Numbers of steps.
        seed: Of the samples.
    """
    summary = train("digits", changes, out)
    console.print(summary.message, highlight=False)
    run = Run.open(out)
    data, test = load("digits"), load("digits", split="test")
    judge = _judge(data)
    rows: list[Row] = []
    with counter("sampling", n * len(names) * len(steps), "images") as progress:
        for name in names:
            for count in steps:
                done = n * len(rows)
                rows.append(_measure(run, name, count, n, seed, data, test, judge, lambda k, done=done: progress(done + k)))
    path = _report(run, rows, summary.seconds, _share(judge, test.all(), test.labels), test).save(Path(out) / "report.html")
    console.print(f"report: {path}", highlight=False)
    return path


def _measure(
    run: Run, name: str, steps: int, n: int, seed: int, data: Dataset, test: Dataset, judge: Any, progress: Any
) -> Row:
    transition, grid = sampler(name, build_grid(run.recipe, steps))
    model = Counted(Clipped(run.denoiser("ema")))
    label = torch.arange(n) % len(data.classes)
    started = time.perf_counter()
    x = generate(model, n, grid=grid, transition=transition, cond={"label": label}, batch=n, seed=seed, progress=progress)
    seconds = time.perf_counter() - started
    protocol: dict[str, Any] = {"reference_name": "digits, train", "seeds": (seed,), "weights": "ema", "floor": test.all()}
    return Row(
        name,
        steps,
        model.calls,
        frechet(x, data.all(), Extractor.pixels(), **protocol),
        sliced_wasserstein(x, data.all(), projections=500, **protocol),
        _share(judge, x, label),
        n / seconds,
        x[: 4 * len(data.classes)],
    )


def _judge(data: Dataset) -> Any:
    """A support-vector classifier of real digits, to tell whether a sample is the digit that was asked for."""
    from sklearn.svm import SVC

    assert data.labels is not None  # digits have them
    return SVC(gamma=0.02, C=10.0).fit(data.all().flatten(1).numpy(), data.labels.numpy())


def _share(judge: Any, x: Tensor, label: Tensor | None) -> float:
    return float((judge.predict(x.flatten(1).numpy()) == label.numpy()).mean()) if label is not None else float("nan")


def _report(run: Run, rows: Sequence[Row], seconds: float, real: float, test: Dataset) -> Report:
    best = min(rows, key=lambda row: row.frechet.value)
    protocol = best.frechet.protocol
    page = Report(
        "Digits, drawn",
        f"A diffusion model trained for {seconds:.0f} s on {protocol.n_reference} real handwritten digits, and what "
        f"{len({r.name for r in rows})} solvers make of it in {min(r.steps for r in rows)} to {max(r.steps for r in rows)} steps. "
        f"Nearest to the data: {best.name} in {best.steps} steps.",
    )
    page.command("make demo")
    page.section("Samples")
    page.grid(
        [(grid_image(r.images, columns=10, pad=1, scale=1), f"{r.name}, {r.steps} steps") for r in rows],
        "Ten classes across, the same initial noise in every picture.",
    )
    page.section("Quality against cost")
    curves = {
        name: [(r.evaluations, r.frechet) for r in rows if r.name == name] for name in dict.fromkeys(r.name for r in rows)
    }
    floor = best.frechet.details.get("floor")
    page.figure(
        pareto(curves, ylabel="Frechet distance on pixels", floor=floor),
        "Lower is better; evaluations of the network a sample.",
    )
    page.table(
        ["solver", "steps", "evaluations", "Frechet distance", "sliced Wasserstein", "recognised, %", "images/s"],
        [[r.name, r.steps, r.evaluations, r.frechet, r.wasserstein, 100 * r.recognised, r.rate] for r in rows],
        f"{protocol.n} samples a row, seed {protocol.seeds[0]}, {protocol.weights} weights, x0 clipped to [-1, 1]",
        best={"Frechet distance": "min", "sliced Wasserstein": "min", "recognised, %": "max"},
    )
    page.text(
        f"Frechet distance in float64 on {protocol.extractor} ({protocol.extractor_hash[:12]}), against {protocol.reference}, "
        f"{protocol.n_reference} images; sliced Wasserstein over 500 projections. The {len(test)} held-out real digits score "
        f"{floor:.3f} and {best.wasserstein.details['floor']:.3f}; being fewer, they pay more of the bias that falls with 1/n. "
        f"*Recognised* is the share of samples that a support-vector classifier takes for the digit that was asked for; of the "
        f"held-out real digits it recognises {100 * real:.1f} %. ± is one standard error over the draw of the samples."
    )
    page.section("Training")
    lines = run.metrics()
    page.figure(
        curve([m["images"] for m in lines], [m["loss"] for m in lines], xlabel="images", ylabel="loss", log=True),
        "Training loss.",
    )
    preview = sorted((run.path / "samples").glob("*.png"))
    if preview:
        page.grid([(p, p.stem) for p in preview[:: max(1, len(preview) // 4)]], "The same noise, during training.")
    page.section("Environment")
    page.environment(recipe=run.recipe.name, training_images=lines[-1]["images"])
    return page
