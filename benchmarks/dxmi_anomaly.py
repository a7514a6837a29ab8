"""One-class anomaly detection on Fashion-MNIST and digits: AUROC of DxMI's energy beside simple baselines.

    python benchmarks/dxmi_anomaly.py fashion-mnist --threads 1 --results anomaly.json --plot anomaly.png
    python benchmarks/dxmi_anomaly.py digits --threads 1

Each class is normal in turn: methods see its training examples alone, and score all test examples, those of others being
strange. Pictures are averaged down to 14x14 (digits stay 8x8). Nobody sees examples of the other classes. Rows: PCA and
nearest neighbours (scikit-learn) on pixels and on the unit sphere of pixels; the loss of a DDPM trained on the class; the
autoencoder that DxMI starts from; DxMI, and DxMI with tau = 0. `--results` keeps what was measured, and goes on from there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import header
from quieten.data import Order, load
from quieten.denoiser import Preconditioned
from quieten.files import write_atomic
from quieten.metrics import auroc
from quieten.metrics.scores import denoising_errors, neighbour_distance, reconstruction_error
from quieten.networks.mlp import MLP
from quieten.noise import Draws
from quieten.objective import Batch, Denoising
from quieten.process import VP
from quieten.reports.plots import grid_image
from quieten.schedule import Cosine
from quieten.tuning.anomaly import Detector, Plan, unit

PLANS = {
    "fashion-mnist": Plan(width=128, sampler_width=128, value_width=128, batch=128, pretrain=1000, iterations=400),
    "digits": Plan(width=128, sampler_width=128, value_width=128, batch=64, pretrain=600, iterations=300, latent=8),
}


def pictures(name: str, split: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Images in [0, 1] of at most 14x14, (N, C, H, W), their labels and the names of the classes."""
    data = load(name, split=split)
    x = (data.all() + 1.0) / 2.0
    assert data.labels is not None
    return (F.avg_pool2d(x, 2) if x.shape[-1] == 28 else x), data.labels, data.classes


def ddpm_loss(train: Tensor, test: Tensor, seed: int, steps: int = 1000, levels: int = 8) -> Tensor:
    """The denoising loss of a perceptron trained on normal pixels."""
    torch.manual_seed(seed)
    x = 2.0 * train.flatten(1) - 1.0
    denoiser = Preconditioned(MLP(x.shape[1], 256, 2), VP, "v", shape=(x.shape[1],))
    schedule, order = Cosine(), Order(len(x), 128, seed)
    objective = Denoising(schedule, weighting="v")
    optimizer = torch.optim.Adam(denoiser.parameters(), 1e-3, fused=True)
    cycle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        index = order.indices(step)
        loss = objective(denoiser, Batch(x[index], index, {}), Draws(seed, step, range(len(index)))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
    with torch.no_grad():
        lams = schedule((torch.arange(levels, dtype=torch.float64) + 0.5) / levels).tolist()
    return denoising_errors(denoiser, 2.0 * test.flatten(1) - 1.0, lams, seed=seed, batch=2000).mean(1)


def methods(plan: Plan, seed: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Name -> (normal training images, test images) -> scores."""
    flat = lambda x: x.flatten(1)  # noqa: E731
    sphere = lambda x: unit(x.flatten(1))  # noqa: E731

    def detector(plan: Plan) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda train, test: Detector.fit(flat(train), plan, seed=seed).score(flat(test))

    return {
        "PCA, pixels": lambda train, test: reconstruction_error(flat(train), flat(test), 0.9),
        "5-NN, pixels": lambda train, test: neighbour_distance(flat(train), flat(test), 5),
        "DDPM loss, pixels": lambda train, test: ddpm_loss(train, test, seed),
        "PCA, sphere": lambda train, test: reconstruction_error(sphere(train), sphere(test), 0.9),
        "5-NN, sphere": lambda train, test: neighbour_distance(sphere(train), sphere(test), 5),
        "autoencoder, sphere": detector(replace(plan, iterations=0)),
        "DxMI": detector(plan),
        "DxMI, tau 0": detector(replace(plan, tau=0.0)),
    }


def one_class(
    name: str, c: int, wanted: list[str], results: dict[str, Any], seed: int, keep: Callable[[], None]
) -> Tensor | None:
    """Measures the methods on one normal class; returns DxMI's scores if it was measured just now."""
    (train, train_labels, classes), (test, labels, _) = pictures(name, "train"), pictures(name, "test")
    last = None
    for method, run in methods(PLANS[name], seed).items():
        key = f"{name}/{seed}/{c}/{method}"
        if method not in wanted or key in results:
            continue
        start = time.process_time()
        scores = run(train[train_labels == c], test)
        area = auroc(scores, labels != c)
        results[key] = {"auroc": area.value, "error": area.error, "cpu_s": time.process_time() - start}
        print(f"{classes[c]:12s} {method:20s} {area.value:.4f} ± {area.error:.4f}  {results[key]['cpu_s']:.0f} s", flush=True)
        keep()
        last = scores if method == "DxMI" else last
    return last


def table(name: str, seeds: list[int], results: dict[str, Any]) -> None:
    classes, wanted = load(name).classes, list(methods(PLANS[name], 0))
    print(f"\n| {name} | " + " | ".join(wanted) + " |\n|" + "---|" * (len(wanted) + 1))
    columns: dict[str, list[float]] = {method: [] for method in wanted}
    for c, title in enumerate(classes):
        cells = []
        for method in wanted:
            found = [results[key]["auroc"] for seed in seeds if (key := f"{name}/{seed}/{c}/{method}") in results]
            columns[method] += [sum(found) / len(found)] if found else []
            cells.append(f"{sum(found) / len(found):.3f}" if found else "")
        print(f"| {title} | " + " | ".join(cells) + " |")
    means = [f"**{sum(v) / len(v):.4f}** ({len(v)})" if v else "" for v in columns.values()]
    print("| mean (classes) | " + " | ".join(means) + " |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", choices=list(PLANS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--classes", default=None, help="numbers by comma. Default: all.")
    parser.add_argument("--methods", default=None, help="by semicolon. Default: all.")
    parser.add_argument("--results", type=Path, default=None, help="JSON of what was measured")
    parser.add_argument(
        "--plot", type=Path, default=None, help="PNG: least and most strange test images of each class, by DxMI"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    kept = options.results
    results: dict[str, Any] = json.loads(kept.read_text()) if kept is not None and kept.is_file() else {}
    keep = lambda: None if kept is None else write_atomic(kept, json.dumps(results, indent=1).encode())  # noqa: E731
    wanted = list(methods(PLANS[options.data], 0)) if options.methods is None else options.methods.split(";")
    count = len(load(options.data).classes)
    print(header("scikit-learn"))
    rows = []
    for seed in seeds:
        for c in range(count) if options.classes is None else map(int, options.classes.split(",")):
            scores = one_class(options.data, c, wanted, results, seed, keep)  # type: ignore[arg-type]
            if scores is not None and seed == seeds[0]:
                order = scores.argsort()
                rows.append(pictures(options.data, "test")[0][torch.cat([order[:6], order[-6:].flip(0)])])
    table(options.data, seeds, results)
    if options.plot is not None and rows:
        image = grid_image(2.0 * torch.cat(rows) - 1.0, columns=12, scale=2)
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        image.save(options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
