"""How true the metrics are: agreement with scipy, stated errors against the spread, and what a model of digits remembers.

    python benchmarks/metrics.py [--check] [--draws 100] [--picture FILE.png] [--threads 1]

With --check the exit status says whether Frechet distances agree with scipy to 1e-6, and whether every stated error lies within
a factor of the spread over draws: 1.25, and what chance adds to so few draws. What a model remembers has no bar, and is left
out then.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from common import header
from quieten.data import load
from quieten.metrics import Manifold, Result, energy_distance, frechet, frechet_distance, kid, memorisation, prdc
from quieten.metrics import sliced_wasserstein as sliced
from quieten.metrics.features import Extractor, Statistics
from quieten.sampling import generate
from quieten.solvers.samplers import sampler
from quieten.training.source import open_source
from quieten.wrap import Clipped

AGREEMENT, STATED = 1e-6, 1.25
GIVEN = Extractor("given", lambda x: x, "0" * 64).for_features()


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def agreement() -> bool:
    """Prints the first table; returns whether its bar is met."""
    worst = 0.0
    print("\n| samples | features | ranks | Frechet distance, relative difference to scipy's matrix root |\n|---|---|---|---|")
    for n, m, width in ((300, 200, 12), (20, 15, 40), (64, 40, 64), (10, 2000, 100)):
        x, y = normal(n, width, seed=1), 0.5 * normal(m, width, seed=2) + 0.2
        a, b = torch.cov(x.T).numpy(), torch.cov(y.T).numpy()
        root = sqrtm(a).real
        inner = root @ b @ root
        want = float((x.mean(0) - y.mean(0)).square().sum()) + np.trace(a) + np.trace(b)
        want -= 2 * np.trace(sqrtm((inner + inner.T) / 2).real)
        gap = abs(frechet_distance(Statistics.of(x), Statistics.of(y)) / want - 1)
        worst = max(worst, gap)
        print(f"| {n}, {m} | {width} | {min(n - 1, width)}, {min(m - 1, width)} | {gap:.1e} |")
    print(f"\nlargest relative difference {worst:.1e}, bar {AGREEMENT:g}: {'met' if worst <= AGREEMENT else 'missed'}")
    return worst <= AGREEMENT


def errors(draws: int) -> bool:
    """Prints the second table; returns whether its bar is met."""
    y = normal(1000, 8, seed=10**6)
    reference, manifold = Statistics.of(y), Manifold.of(y)

    def every(x: Tensor) -> list[Result]:
        return [frechet(x, reference, GIVEN), kid(x, y, GIVEN), energy_distance(x, y, extractor=GIVEN),
                sliced(x, y, 100, extractor=GIVEN), *prdc(x, manifold, GIVEN).values()]  # fmt: skip

    rows = zip(*(every(1.2 * normal(400, 8, seed=s) + 0.3) for s in range(draws)), strict=True)
    print(
        f"\n| metric, 400 samples of 8 features | mean of {draws} draws | their spread | error stated, RMS |\n|---|---|---|---|"
    )
    worst, bar = 1.0, STATED * (1.0 + 3.0 / math.sqrt(2.0 * draws))  # a spread is known to 1 / sqrt(2 draws)
    for results in rows:
        values = torch.tensor([r.value for r in results], dtype=torch.float64)
        stated = math.sqrt(sum((r.uncertainty or 0.0) ** 2 for r in results) / draws)
        print(f"| {results[0].name} | {float(values.mean()):.4f} | {float(values.std()):.4f} | {stated:.4f} |")
        ratio = stated / float(values.std())
        worst = max(worst, ratio, 1.0 / ratio)
    print(
        f"\nlargest factor between stated errors and spreads {worst:.2f}, bar {bar:.2f}: {'met' if worst <= bar else 'missed'}"
    )
    return worst <= bar


def memory(picture: Path | None) -> None:
    opened, train, test = open_source("zoo:digits", device="cpu"), load("digits").all(), load("digits", split="test").all()
    transition, grid = sampler(opened.transition[0], opened.grid(20, None))
    label = torch.arange(500) % 10
    x = generate(Clipped(opened.denoiser), 500, grid=grid, transition=transition, cond={"label": label}, batch=250, seed=0)
    print("\n| 500 digits of zoo:digits in 20 steps, distances by | nearer than held out | copies | median | of held out |")
    print("|---|---|---|---|---|")
    for extractor in (Extractor.pixels(), Extractor.zoo("digits")):
        found = memorisation(x, train, test, extractor, reference_name="digits", seeds=(0,), weights="exported")
        d = found.result.details
        print(f"| {extractor.name} | {found.result.figure()} | {d['copies']:.1%} | {d['median']:.3f} | {d['held_out']:.3f} |")
        if picture is not None and extractor.name == "pixels":
            found.save(picture, x, train, 16)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail unless the bars are met")
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--picture", type=Path, help="file for the closest pairs")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(header("scipy"))
    met = [agreement(), errors(args.draws)]
    if not args.check:
        memory(args.picture)
    return int(args.check and not all(met))


if __name__ == "__main__":
    raise SystemExit(main())
