"""A learned encoder against none on Fashion-MNIST: equal denoisers, equal training images, and what the encoder costs.

    python benchmarks/diffenc_fashion.py FOLDER [--images 256000] [--seeds 0,1] [--n 10000] [--png FILE.png] [--threads 1]

Trains the recipes fashion-mnist-vdm and fashion-mnist-diffenc into FOLDER/vdm0, FOLDER/diffenc0, FOLDER/vdm1, ..., keeping the
averaged weights every --every images, and then measures the bound in continuous time with the flat decoder on test images for
each: all with the same times and noise, so that differences are sharper than values. Runs of one seed see the same images in
the same order, with the same times and noise. What is there already is not done again: stop and start it as you like. With
--report-only it trains nothing, and reports of as many pairs as there are.

The cost is the processor time of a training step of each, least of interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from common import header, interleaved
from quieten.data import Dataset, Order, load
from quieten.files import write_atomic
from quieten.fit import train
from quieten.likelihood import evaluate
from quieten.likelihoods.bound import VariationalBound
from quieten.likelihoods.decoders import Flat
from quieten.noise import Draws
from quieten.objective import Batch
from quieten.reports.plots import COLOURS, INK, figure_axes
from quieten.training.config import load_data, load_recipe, resolve
from quieten.training.runs import build_update
from quieten.training.source import open_source

__all__ = ["main"]

KINDS = {"vdm": "fashion-mnist-vdm", "diffenc": "fashion-mnist-diffenc"}
LABELS = {"vdm": "VDM", "diffenc": "DiffEnc"}
TERMS = ("prior", "diffusion", "reconstruction", "total")


def keep(run: Path, every: int) -> Callable[[dict[str, Any]], None]:
    """Copies the averaged weights of each checkpoint, before the next replaces them."""

    def look(row: dict[str, Any]) -> None:
        latest = run / "state" / "latest"
        if not latest.is_file():
            return
        step = int(latest.read_text().split("-")[1])
        images = step * 128
        place = run / "kept" / f"{images:07d}"
        if images % every == 0 and not place.exists():
            place.mkdir(parents=True)
            shutil.copy(run / "config.yaml", place)
            shutil.copy(run / "state" / f"step-{step:09d}" / "ema.safetensors", place)

    return look


def learn(run: Path, kind: str, seed: int, images: int, every: int) -> None:
    """Trains a run to its end, going on where it was left."""
    if (run / "config.yaml").is_file() and (_metrics(run) or [{"images": 0}])[-1]["images"] >= images:
        return
    changes = [f"train.images={images}", f"train.seed={seed}", f"train.save_every={every}", "train.preview_every=null"]
    look = keep(run, every)
    print(train(KINDS[kind], changes, run, callbacks=[look]).message, flush=True)
    look({})


def _metrics(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def measured(place: Path, data: Dataset, n: int) -> dict[str, torch.Tensor]:
    """Terms of the bound of each test image, bits/dim, kept in a file beside the weights."""
    file = place / f"terms-{n}.json"
    if not file.is_file():
        source = open_source(str(place))
        x0 = data.batch(Order(len(data), n, 0).indices(0))[0]
        curve = source.schedule
        assert curve is not None
        bound = evaluate(source.denoiser, x0, Flat(source.denoiser.process), curve, batch=250, encoder=source.encoder)
        scale = bound.dims * math.log(2.0)
        write_atomic(file, json.dumps({name: (value / scale).tolist() for name, value in bound.terms.items()}).encode())
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in json.loads(file.read_text()).items()}


def figure(values: torch.Tensor) -> str:
    return f"{float(values.mean()):.4f} ± {float(values.std()) / math.sqrt(len(values)):.4f}"


def table(folder: Path, seeds: Sequence[int], n: int) -> None:
    """Every term at the end of training, and the differences along it."""
    data = load("fashion-mnist", split="test")
    pairs = [seed for seed in seeds if all(len(_places(folder, kind, seed)) for kind in KINDS)]
    curves: dict[tuple[str, int], list[tuple[int, dict[str, torch.Tensor]]]] = {}
    for kind in KINDS:
        for seed in pairs:
            curves[kind, seed] = [(seen, measured(p, data, n)) for seen, p in _places(folder, kind, seed)]
    print(f"{n} test images, bits/dim, ± one standard error over times, noise and images\n")
    print("| | images seen | " + " | ".join(TERMS) + " |\n|---|---|" + "---|" * len(TERMS))
    for (kind, seed), curve in curves.items():
        images, terms = curve[-1]
        print(f"| {LABELS[kind]}, seed {seed} | {images:,} | " + " | ".join(figure(terms[name]) for name in TERMS) + " |")
    print("\nDiffEnc less VDM, same images, times and noise; diffusion, then total:\n")
    seen = sorted(set.intersection(*({images for images, _ in curve} for curve in curves.values()))) if curves else []
    print("| images seen | " + " | ".join(f"diffusion, seed {s} | total, seed {s}" for s in pairs) + " |")
    print("|---|" + "---|" * 2 * len(pairs))
    for images in seen:
        cells = []
        for seed in pairs:
            ours, plain = (dict(curves[kind, seed])[images] for kind in ("diffenc", "vdm"))
            cells += [figure(ours[name] - plain[name]) for name in ("diffusion", "total")]
        print(f"| {images:,} | " + " | ".join(cells) + " |")


def _places(folder: Path, kind: str, seed: int) -> list[tuple[int, Path]]:
    """Images seen and folder of the weights that were kept, or those of the end alone."""
    run = folder / f"{kind}{seed}"
    kept = sorted((run / "kept").glob("[0-9]*"))
    return [(int(p.name), p) for p in kept] or [(row["images"], run) for row in _metrics(run)[-1:]]


def draw(folder: Path, seeds: Sequence[int], png: Path) -> None:
    """The diffusion term while training, as the metrics have it: of the weights of the moment, on training images."""
    chart, axes = figure_axes("training images", "diffusion term, bits/dim")
    low = math.inf
    for kind in KINDS:
        for seed in seeds:
            rows = _metrics(folder / f"{kind}{seed}")
            values = [row["diffusion"] for row in rows]
            low = min([low, *values])
            style = {"color": INK if kind == "vdm" else COLOURS[1], "linestyle": ("-", "--", ":")[seed % 3], "linewidth": 1.7}
            axes.plot([row["images"] for row in rows], values, label=f"{LABELS[kind]}, seed {seed}", **style)
    axes.set_ylim(low - 0.05, low + 1.5)
    axes.legend(frameon=False, labelcolor=INK, fontsize=10)
    png.parent.mkdir(parents=True, exist_ok=True)
    chart.savefig(png, dpi=110, facecolor="white")


def paired(folder: Path, seeds: Sequence[int], points: int = 5) -> None:
    """DiffEnc less VDM while training, on the same images with the same times and noise: means over parts of the training."""
    print("\ndiffusion term while training, DiffEnc less VDM, bits/dim, same images, times and noise:\n")
    for seed in seeds:
        vdm, ours = (_metrics(folder / f"{kind}{seed}") for kind in KINDS)
        both = [(a["images"], b["diffusion"] - a["diffusion"]) for a, b in zip(vdm, ours, strict=False)]
        size = max(1, len(both) // points)
        parts = [both[i : i + size] for i in range(0, len(both) - size + 1, size)]
        print(f"seed {seed}: " + ", ".join(f"{sum(d for _, d in part) / len(part):+.3f} to {part[-1][0]:,}" for part in parts))


def cost(rounds: int) -> None:
    """Processor time of a training step of each kind."""
    cases: dict[str, Callable[[], object]] = {}
    for kind, name in KINDS.items():
        recipe = load_recipe(name)
        data = load_data(recipe)
        recipe = resolve(recipe, data)
        update = build_update(recipe, data)
        assert isinstance(update.objective, VariationalBound)
        index = torch.arange(128)
        batch, draws = Batch(data.batch(index)[0], index, {}), Draws(0, 0, range(128))
        cases[kind] = lambda update=update, batch=batch, draws=draws: update(batch, draws)["loss"].mean().backward()
    times = interleaved(cases, rounds, 1, time.process_time)
    ms = {kind: 1e3 * timing.least / 128 for kind, timing in times.items()}
    print(f"\ntraining, processor time an image: VDM {ms['vdm']:.2f} ms, DiffEnc {ms['diffenc']:.2f} ms, "
          f"ratio {ms['diffenc'] / ms['vdm']:.2f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=256_000)
    parser.add_argument("--every", type=int, default=32_000, help="images between the weights that are kept")
    parser.add_argument("--seeds", type=lambda text: [int(word) for word in text.split(",")], default=[0, 1])
    parser.add_argument("--n", type=int, default=10_000, help="test images")
    parser.add_argument("--rounds", type=int, default=7, help="of the timing")
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    parser.add_argument("--png", type=Path)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(header(), flush=True)
    for seed in () if args.report_only else args.seeds:
        for kind in KINDS:
            learn(args.folder / f"{kind}{seed}", kind, seed, args.images, args.every)
    paired(args.folder, args.seeds)
    if args.png is not None:
        draw(args.folder, args.seeds, args.png)
    table(args.folder, args.seeds, args.n)
    cost(args.rounds)


if __name__ == "__main__":
    main()
