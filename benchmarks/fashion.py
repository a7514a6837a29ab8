"""Quality of the Fashion-MNIST model of the zoo against cost: the table and the grid in docs/results/fashion-mnist.md.

python benchmarks/fashion.py [--n 5000] [--steps 5,10,20] [--samplers ddim,ddpm,heun,dpm++] [--scale 1] [--grid FILE.png]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from common import header
from quieten.data import load
from quieten.metrics import frechet
from quieten.metrics.features import Extractor, Statistics
from quieten.reports.plots import save_grid
from quieten.sampling import generate
from quieten.solvers.samplers import sampler
from quieten.training.config import build_grid
from quieten.training.runs import load_with_recipe
from quieten.wrap import Clipped, Counted, Extrapolated


def main(
    source: str, n: int, steps: list[int], samplers: list[str], scale: float, seed: int, batch: int, grid: Path | None
) -> None:
    """Samples n images of all classes in turn with each sampler, and measures each set against the training images."""
    denoiser, recipe = load_with_recipe(source)
    extractor, train, test = Extractor.zoo(recipe.data.name), load(recipe.data.name), load(recipe.data.name, split="test")
    reference = Statistics.of(extractor.extract(train.all()), extractor.hash)
    label = torch.arange(n) % len(recipe.data.classes)
    floor = frechet(test.all()[:n], reference, extractor)
    print(header())
    print(f"{source}, {n} samples a row, seed {seed}, scale {scale}, float32, x0 clipped to [-1, 1]")
    print(f"Frechet distance on the {extractor.name} ({extractor.hash[:12]}) against {len(train)} training images;")
    print(f"{min(n, len(test))} test images score {floor.figure()}")
    print("\n| sampler | steps | evaluations | Frechet distance | images/s |\n|---|---|---|---|---|")
    for name in samplers:
        for count in steps:
            transition, levels = sampler(name, build_grid(recipe, count))
            model = Counted(
                Clipped(denoiser if scale == 1 else Extrapolated(denoiser, scale, null={"label": len(recipe.data.classes)}))
            )
            started = time.perf_counter()
            x = generate(model, n, grid=levels, transition=transition, cond={"label": label}, batch=batch, seed=seed)
            seconds = time.perf_counter() - started
            score = frechet(x, reference, extractor, reference_name=f"{train.name}, train", seeds=(seed,), weights="ema")
            print(f"| {name} | {count} | {model.calls // -(-n // batch)} | {score.figure()} | {n / seconds:.0f} |", flush=True)
            if grid is not None and (name, count) == (samplers[-1], steps[-1]):
                save_grid(x[: 8 * len(recipe.data.classes)], grid, columns=len(recipe.data.classes))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="zoo:fashion-mnist")
    parser.add_argument("--n", type=int, default=5000)
    parser.add_argument("--steps", type=lambda text: [int(word) for word in text.split(",")], default=[5, 10, 20])
    parser.add_argument("--samplers", type=lambda text: text.split(","), default=["ddpm", "ddim", "heun", "dpm++"])
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--grid", type=Path)
    main(**vars(parser.parse_args()))
