"""Quality and bits per dimension of one frozen denoiser with every reverse variance: the tables of docs/results/ocm.md.

    python benchmarks/ocm_table.py zoo:fashion-mnist fashion-mnist --variances DIR --cache DIR [--picture FILE.png]
    python benchmarks/ocm_table.py runs/emoji emoji --cache DIR

Rows whose variance was not fitted yet are left out. Everything measured is kept in the cache, by model, variance (its weights
included), kernel, steps and seed: the same command goes on where it was stopped. --show prints what is there, and measures
nothing. Samples: each kernel on the model's own grid, x0 clipped to [-1, 1] (DDIM keeps the noise, as released), the last noise
bounded to 2 grey levels, all classes in turn. Bounds: test data, the discretised decoder with its variance fitted on training
data, the same for all rows; "optimal" grids measured on training data for each variance.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import header
from quieten.covariance import VarianceSource
from quieten.covariances.stored import fingerprint, load_variance, variance_names
from quieten.data import Dataset, Order, load, to_pixels
from quieten.denoiser import Denoiser
from quieten.files import write_atomic
from quieten.likelihood import evaluate, fit_decoder
from quieten.likelihoods.decoders import Decoder, Discretised
from quieten.metrics import Result, frechet, sliced_wasserstein
from quieten.metrics.features import Extractor
from quieten.noise import Draws
from quieten.reports.plots import save_grid
from quieten.sampling import generate
from quieten.solvers.grids import dp_vb, edge_costs, linear, take
from quieten.training.source import open_source
from quieten.transition import Ancestral, Hushed, Transition
from quieten.wrap import Counted, WithCovariance

VARIANCES = ("small", "big", "analytic", "sn", "npr", "ocm", "ocm-dct")
STEPS = (5, 10, 25, 50, 100)
SAMPLES = {5: 300, 10: 300, 25: 300, 50: 150, 100: 75}
"""Samples of each seed."""
EXAMPLES = {5: 192, 10: 192, 25: 192, 50: 64, 100: 64}
"""Test examples of a bound."""
SEEDS = (0, 1, 2)
CHAIN = 60
"""Levels that an optimal grid is chosen from."""
OPTIMAL = 25
"""The most steps for which there is one."""


@dataclass(frozen=True)
class Bench:
    """One model on one data set."""

    name: str
    data: str
    folders: tuple[Path, ...]
    cache: Path
    batch: int
    fraction: float = 1.0

    def n(self, table: dict[int, int], steps: int) -> int:
        return max(2, round(self.fraction * table[steps]))

    @cached_property
    def source(self) -> Any:
        return open_source(self.name)

    @cached_property
    def train(self) -> Dataset:
        return self._load("train")

    @cached_property
    def test(self) -> Dataset:
        return self._load("test")

    def _load(self, split: str) -> Dataset:
        channels, size, _ = self.source.denoiser.shape
        return load(self.data, split=split, size=size, channels=channels)

    @cached_property
    def variances(self) -> list[str]:
        there = {*variance_names(self.folders), "small", "big"}
        return [name for name in VARIANCES if name in there]

    @cached_property
    def key(self) -> str:
        return f"{self.data}-{fingerprint(self.source.denoiser)[:8]}"

    def model(self, variance: str) -> tuple[Denoiser, Any]:
        if variance == "small":
            return self.source.denoiser, None
        source = load_variance(self.folders, variance, self.source.denoiser, cap=1.0)
        return WithCovariance(self.source.denoiser, source), source

    def kernel(self, variance: str, kernel: str, grid: Tensor) -> Transition:
        spread = variance != "small"
        inner = Ancestral(1.0, spread, 1.0) if kernel == "ddpm" else Ancestral(0.0, spread, 1.0, keep_eps=True)
        return Hushed(inner, grid, grey=2.0, last=1)

    def file(self, variance: str, *rest: object) -> Path:
        """Where a result is kept; another fit of a variance has another name."""
        paths = [folder / f"{variance}.safetensors" for folder in self.folders]
        path = next((path for path in paths if path.is_file()), None)
        digest = "" if path is None else hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        return self.cache / "-".join([self.key, variance, digest, *map(str, rest)])

    def some(self, data: Dataset, n: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """n examples and their labels."""
        x0, labels = data.batch(Order(len(data), n, seed).indices(0))
        return x0, {"label": labels} if labels is not None and self.source.classes else {}

    # -- bounds

    @cached_property
    def decoder(self) -> Decoder:
        """The discretised Gaussian, fitted on training data at the cleanest level, the same of every grid."""
        x0, cond = self.some(self.train, 256, 1)
        lam = float(self.source.grid(5, None)[-2])
        return fit_decoder(
            Discretised(), self.source.denoiser, x0, lam, cond=cond, transition=Ancestral(spread=False, clip=1.0)
        )

    def bound(self, variance: str, steps: int, kind: str) -> dict[str, Any]:
        path = self.file(variance, kind, steps, self.n(EXAMPLES, steps)).with_suffix(".json")
        if path.is_file():
            return json.loads(path.read_text())
        model, source = self.model(variance)
        transition = Ancestral(spread=variance != "small", clip=1.0)
        grid = self.source.grid(steps, None) if kind == "own" else self.optimal(variance, model, transition, steps)
        x0, cond = self.some(self.test, self.n(EXAMPLES, steps), 0)
        if isinstance(source, VarianceSource):
            source.clear()
        decoder = self.decoder
        if kind == "optimal":
            fitting, labels = self.some(self.train, 256, 1)
            decoder = fit_decoder(Discretised(), model, fitting, float(grid[-2]), cond=labels, transition=transition)
        bound = evaluate(model, x0, decoder, grid, cond=cond, batch=self.batch, transition=transition)
        scale = bound.dims * math.log(2.0)
        row = {
            name: [float(term.mean()) / scale, float(term.std()) / scale / len(x0) ** 0.5] for name, term in bound.terms.items()
        }
        row["values"] = (bound.total / scale).tolist()
        row["steps"] = (bound.diffusion.mean(0) / scale).tolist()
        row["levels"] = list(bound.levels)
        row["clamped"] = source.clamped.below if isinstance(source, VarianceSource) else 0.0
        write_atomic(path, json.dumps(row).encode())
        return row

    def optimal(self, variance: str, model: Denoiser, transition: Ancestral, steps: int) -> Tensor:
        """The least-cost grid, its costs measured on 64 training images at 60 of the model's levels."""
        chain = self.source.grid(1000, None)[:-1].flip(0)
        chain = chain[linear(CHAIN, len(chain)) - 1]
        path = self.file(variance, "costs").with_suffix(".pt")
        if not path.is_file():
            x0, cond = self.some(self.train, 64, 2)
            draws = Draws(2, 0, range(len(x0)))
            costs = edge_costs(model.bind(**cond), x0, chain, Discretised(), draws=draws, transition=transition, fit=True)
            torch.save(costs, path)
        return take(chain, dp_vb(steps, torch.load(path, weights_only=True))[0])

    # -- samples

    def samples(self, variance: str, kernel: str, steps: int, seed: int, make: bool = True) -> Tensor | None:
        """Samples as bytes (n, C, H, W)."""
        n = self.n(SAMPLES, steps)
        path = self.file(variance, kernel, steps, seed, n).with_suffix(".pt")
        if path.is_file():
            return torch.load(path, weights_only=True)
        if not make:
            return None
        grid = self.source.grid(steps, None)
        model, _ = self.model(variance)
        counted = Counted(model)
        classes = len(self.source.classes)
        cond = {"label": torch.arange(n) % classes} if classes else {}
        x = generate(
            counted, n, grid=grid, transition=self.kernel(variance, kernel, grid), cond=cond, batch=self.batch, seed=seed
        )
        assert counted.calls == steps * math.ceil(n / self.batch)
        pixels = to_pixels(x)
        torch.save(pixels, path)
        return pixels

    @cached_property
    def extractor(self) -> Extractor:
        try:
            return Extractor.zoo(self.data)
        except ValueError:
            return Extractor.pixels()

    @cached_property
    def reference(self) -> Tensor:
        return self.train.all()

    def quality(self, variance: str, kernel: str, steps: int) -> Result | None:
        """Frechet distance on the classifier of the data, else sliced Wasserstein distance of pixels, of all seeds together."""
        parts = [self.samples(variance, kernel, steps, seed, make=False) for seed in SEEDS]
        x = [part.float() / 127.5 - 1 for part in parts if part is not None]
        if not x:
            return None
        return self.distance(torch.cat(x), SEEDS[: len(x)])

    def distance(self, x: Tensor, seeds: tuple[int, ...] = ()) -> Result:
        if self.extractor.name == "pixels":
            return sliced_wasserstein(x, self.reference, 500, reference_name=f"{self.data}, train", seeds=seeds)
        return frechet(x, self._statistics, self.extractor, reference_name=f"{self.data}, train", seeds=seeds)

    @cached_property
    def _statistics(self) -> Any:
        from quieten.metrics.features import Statistics

        return Statistics.of(self.extractor.extract(self.reference), self.extractor.hash)


def jobs(bench: Bench, chosen: list[int]) -> Iterator[tuple[str, Any]]:
    """What to measure, cheap and telling first."""
    for group in ([s for s in chosen if s <= OPTIMAL], [s for s in chosen if s > OPTIMAL]):
        for steps in group:
            for variance in bench.variances:
                for kind in ("own", "optimal") if steps <= OPTIMAL else ("own",):
                    yield f"bound {kind} {variance} {steps}", lambda v=variance, s=steps, k=kind: bench.bound(v, s, k)
        for kernel in ("ddpm", "ddim"):
            for seed in SEEDS:
                for steps in group:
                    for variance in bench.variances:
                        if kernel == "ddim" and variance == "big":
                            continue  # there is no such sampler
                        yield (
                            f"{kernel} {variance} {steps} seed {seed}",
                            (lambda v=variance, k=kernel, s=steps, d=seed: bench.samples(v, k, s, d)),
                        )


def show(bench: Bench) -> None:
    """Prints the tables of what is in the cache."""
    metric = "sliced Wasserstein distance of pixels" if bench.extractor.name == "pixels" else "Frechet distance"
    for kernel in ("ddpm", "ddim"):
        results = {(v, s): bench.quality(v, kernel, s) for v in bench.variances for s in STEPS}
        sizes = {s: max((r.protocol.n for (_, k), r in results.items() if r and k == s), default=0) for s in STEPS}
        heads = " | ".join(f"{s} (n={sizes[s]})" for s in STEPS)
        print(f"\n{metric}, {kernel.upper()} kernel\n\n| variance | {heads} |\n|---|{'---|' * len(STEPS)}")
        for variance in bench.variances:
            row = [results[variance, s] for s in STEPS]
            if any(row):
                print(f"| {variance} | " + " | ".join("" if r is None else r.figure() for r in row) + " |")
    grain(bench)
    first = min(3 * bench.n(SAMPLES, 5), len(bench.test))
    print(f"\n{first} test images: {bench.distance(bench.test.all()[:first])}")
    for kind in ("own", "optimal"):
        cells = {(v, s): _cached(bench.file(v, kind, s, bench.n(EXAMPLES, s))) for v in bench.variances for s in STEPS}
        heads = " | ".join(f"{s} (n={bench.n(EXAMPLES, s)})" for s in STEPS)
        print(f"\nbits/dim, {kind} grid; in brackets the share of variances that had to be raised to 0\n")
        print(f"| variance | {heads} |\n|---|{'---|' * len(STEPS)}")
        for variance in bench.variances:
            print(f"| {variance} | " + " | ".join(_bits(cells[variance, s]) for s in STEPS) + " |")
    print("\ndifference from ocm on the same examples and noise, bits/dim, own grid\n")
    print(f"| variance | {heads} |\n|---|{'---|' * len(STEPS)}")
    cells = {(v, s): _cached(bench.file(v, "own", s, bench.n(EXAMPLES, s))) for v in bench.variances for s in STEPS}
    for variance in bench.variances:
        if variance != "ocm" and ("ocm", STEPS[0]) in cells:
            print(f"| {variance} | " + " | ".join(_difference(cells[variance, s], cells["ocm", s]) for s in STEPS) + " |")


def grain(bench: Bench) -> None:
    """Prints how much fine detail samples have, and whether they fall apart into blocks, beside test images."""
    real = to_pixels(bench.test.all())
    for name, measure in (("fine detail over that of test images", detail), ("jumps between blocks over those inside", blocks)):
        unit = measure(real) if measure is detail else 1.0
        for kernel in ("ddpm", "ddim"):
            own = "" if measure is detail else f" (test images {measure(real):.2f})"
            print(f"\n{name}, {kernel.upper()} kernel{own}\n")
            print(f"| variance | {' | '.join(map(str, STEPS))} |\n|---|{'---|' * len(STEPS)}")
            for variance in bench.variances:
                found = [bench.samples(variance, kernel, steps, 0, make=False) for steps in STEPS]
                if any(x is not None for x in found):
                    cells = ("" if x is None else f"{measure(x) / unit:.2f}" for x in found)
                    print(f"| {variance} | {' | '.join(cells)} |")


def detail(pixels: Tensor) -> float:
    """Energy of Haar's diagonal coefficients."""
    x = pixels.float() / 127.5 - 1
    return float((x[..., ::2, ::2] - x[..., 1::2, ::2] - x[..., ::2, 1::2] + x[..., 1::2, 1::2]).square().mean())


def blocks(pixels: Tensor, side: int = 4) -> float:
    """Mean square of the differences of neighbours in two blocks of the cosine basis, over that within a block."""
    x, across, within = pixels.float() / 127.5 - 1, [], []
    for turned in (x, x.transpose(-1, -2)):
        jumps = turned.diff(dim=-1).square().mean(dim=tuple(range(turned.ndim - 1)))
        border = torch.arange(1, len(jumps) + 1) % side == 0
        across.append(jumps[border].mean())
        within.append(jumps[~border].mean())
    return float(sum(across) / sum(within))


def _cached(path: Path) -> dict[str, Any] | None:
    path = path.with_suffix(".json")
    return json.loads(path.read_text()) if path.is_file() else None


def _bits(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    clamped = f" ({100 * row['clamped']:.0f} %)" if row["clamped"] >= 0.005 else ""
    return f"{row['total'][0]:.3f} ± {row['total'][1]:.3f}{clamped}"


def _difference(row: dict[str, Any] | None, other: dict[str, Any] | None) -> str:
    if row is None or other is None:
        return ""
    d = torch.tensor(row["values"]) - torch.tensor(other["values"])
    return f"{float(d.mean()):+.3f} ± {float(d.std()) / len(d) ** 0.5:.3f}"


def picture(bench: Bench, path: Path, steps: int = 10, columns: int = 10) -> None:
    """The first samples of seed 0 with each variance, a row each, DDPM kernel."""
    rows = [bench.samples(variance, "ddpm", steps, 0, make=False) for variance in bench.variances]
    save_grid(torch.cat([row[:columns] for row in rows if row is not None]), path, columns=columns)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("data")
    parser.add_argument("--variances", type=Path, action="append", help="folder of fitted variances; default: the run's own")
    parser.add_argument("--cache", type=Path, default=Path("runs/ocm-table"))
    parser.add_argument("--steps", type=lambda text: [int(word) for word in text.split(",")], default=list(STEPS))
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--fraction", type=float, default=1.0, help="of the numbers of samples and examples")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop measuring after this much processor time")
    parser.add_argument("--show", action="store_true", help="print what was measured before, and measure nothing")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folders = tuple(args.variances or open_source(args.source).variances)
    args.cache.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.source, args.data, folders, args.cache, args.batch, args.fraction)
    print(header(), f"\n{args.source}, variances: {', '.join(bench.variances)}", flush=True)
    print(f"{bench.extractor.name} {bench.extractor.hash[:12]}, against {len(bench.train)} training images", flush=True)
    for what, job in () if args.show else jobs(bench, args.steps):
        if time.process_time() > 60 * args.minutes:
            print("time is up: the same command goes on", flush=True)
            break
        start = time.process_time()
        job()
        if time.process_time() - start > 0.5:
            print(f"{what}: {time.process_time() - start:.0f} s", flush=True)
    print(f"decoder: {bench.decoder}")
    show(bench)
    if args.picture:
        picture(bench, args.picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
