"""What stable targets buy: steps of training on a mixture, and the noise of gradients on Fashion-MNIST.

    python benchmarks/stf_training.py [--check] [--seeds 3] [--steps 3000] [--threads 1] [--only mixture fashion] [--out FOLDER]

mixture  A mixture of four Gaussians in 8 dimensions, whose E[x0 | x_t] is known: an MLP with EDM's preconditioning, levels and
         weighting, batches of 64, Adam at 1e-3. The excess risk is the weighted squared distance of the averaged weights'
         denoiser from the exact one. For each number of references, and for the exact target: steps until the risk is that of
         the plain target after all steps, over all steps; mean and spread over the seeds. The bar is 0.6 with 256.
fashion  Variance of the gradient of a batch of the network of zoo:fashion-mnist, level by level, with the plain target, 1024
         references and all 60,000, on the same examples and noise. Needs the data set.

Pictures go to --out: stf-training.png and stf-gradient.png. With --check the exit status says whether the bar is met.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor

from common import header
from quieten import load
from quieten.denoiser import edm
from quieten.networks.mlp import MLP
from quieten.noise import Draws, Noise
from quieten.objective import Batch, Denoising, Noised, Regression, Target
from quieten.oracle import MixtureData
from quieten.process import VE
from quieten.reports.plots import COLOURS, INK, figure_axes
from quieten.schedule import LogNormal, Schedule
from quieten.target import StableTarget
from quieten.targets.diagnosis import level_density
from quieten.targets.pools import BankPool, ReferencePool
from quieten.training.config import build_schedule, load_data, load_recipe

__all__ = ["main"]

BAR, BATCH, EVERY, HALFLIFE = 0.6, 64, 50, 150
EXACT = "exact"


# ---- the mixture


def mixture() -> MixtureData:
    """Four modes of standard deviation 0.15 at random places, about 0.5 apart from the origin in each direction."""
    means = 0.5 * torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return MixtureData(means - means.mean(0), 0.15**2, process=VE)


def risk_of(data: MixtureData, schedule: Schedule) -> Callable[[torch.nn.Module], float]:
    """Mean of the weighted squared distance from the exact denoiser, at 4,096 fixed states of the training levels."""
    n = 4096
    x0 = data.sample(Noise(99, range(n))).float()
    lam = schedule((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    sigma = torch.exp(-0.5 * lam).float()[:, None]
    x = x0 + sigma * Noise(98, range(n)).normal(x0, 0)
    exact = data(x.double(), lam).mean
    weight = (sigma.square() + 0.25) / (0.5 * sigma).square()

    @torch.no_grad()
    def risk(denoiser: torch.nn.Module) -> float:
        return float((weight * (denoiser(x, lam).mean - exact).square()).mean())

    return risk


def exact_target(data: MixtureData) -> Target:
    """The limit of ever more references."""

    def target(noised: Noised, batch: Batch) -> Regression:
        x0 = data(noised.x_t.double(), noised.lam).mean.to(noised.x_t)
        return Regression(x0, noised.eps + noised.alpha / noised.sigma * (noised.x0 - x0))

    return target


def train(data: MixtureData, points: Tensor, target: Target | None, steps: int, seed: int, enough: float = 0.0) -> list[float]:
    """Excess risk of the averaged weights, every `EVERY` steps, until it is low enough."""
    torch.manual_seed(seed)
    schedule = LogNormal(-1.2, 1.2)
    denoiser = edm(MLP((8,), width=128, depth=3))
    average, objective, risk = deepcopy(denoiser), Denoising(schedule, "edm", target), risk_of(data, schedule)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-3, fused=True)
    kept, latest = (list(module.parameters()) for module in (average, denoiser))
    risks = []
    for step in range(steps):
        index = (torch.arange(BATCH) + (seed * steps + step) * BATCH) % len(points)
        objective(denoiser, Batch(points[index], index, {}), Draws(seed, step, range(BATCH))).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(kept, latest, 1 - 0.5 ** (1 / min(HALFLIFE, 0.1 * (step + 1))))
        if (step + 1) % EVERY == 0:
            risks.append(risk(average))
            if risks[-1] < enough:
                break
    return risks


def reached(risks: Sequence[float], goal: float, steps: int) -> float:
    """Steps until the risk is at the goal, between two evaluations by a straight line in its logarithm; inf if never."""
    for i, value in enumerate(risks):
        if value <= goal:
            if i == 0:
                return EVERY
            before = math.log(risks[i - 1] / goal)
            return EVERY * (i + before / (before - math.log(value / goal)))
    return math.inf if risks[-1] > goal else steps


def measure_mixture(seeds: int, steps: int, out: Path | None) -> bool:
    data = mixture()
    points = data.sample(Noise(1, range(BATCH * steps * seeds))).float()  # no example is shown twice
    pool = BankPool(points)
    targets: dict[str, Target | None] = {
        "plain": None,
        "n=64": StableTarget(ReferencePool(), None),
        "n=256": StableTarget(pool, 256),
        "n=1024": StableTarget(pool, 1024),
        EXACT: exact_target(data),
    }
    curves: dict[str, list[list[float]]] = {name: [] for name in targets}
    for seed in range(seeds):
        enough = 0.0
        for name, target in targets.items():
            curves[name].append(train(data, points, target, steps, seed, enough))
            enough = 0.7 * curves["plain"][seed][-1]  # well past the goal
    goals = [curve[-1] for curve in curves["plain"]]
    print(f"mixture: excess risk of the plain target after {steps} steps {statistics.mean(goals):.5f} "
          f"({', '.join(f'{g:.5f}' for g in goals)})")  # fmt: skip
    print(f"{'target':<10}{'steps to the goal':>20}{'share, mean':>14}{'spread':>18}")
    shares = {}
    for name, runs in curves.items():
        taken = [reached(run, goal, steps) / steps for run, goal in zip(runs, goals, strict=True)]
        shares[name] = statistics.mean(taken)
        print(f"{name:<10}{shares[name] * steps:>20.0f}{shares[name]:>14.2f}{f'{min(taken):.2f} to {max(taken):.2f}':>18}")
    if out is not None:
        _draw_training(curves, statistics.mean(goals), out / "stf-training.png")
    met = shares["n=256"] <= BAR
    print(f"steps with 256 references / with plain targets: {shares['n=256']:.2f} (bar {BAR}): {'met' if met else 'missed'}")
    return met


def _draw_training(curves: dict[str, list[list[float]]], goal: float, path: Path) -> None:
    figure, axes = figure_axes("training steps", "excess risk (averaged weights)")
    for k, (name, runs) in enumerate(curves.items()):
        columns = list(zip(*runs, strict=False))  # as far as all of them went
        steps = [EVERY * (i + 1) for i in range(len(columns))]
        colour = INK if name == "plain" else COLOURS[k]
        axes.plot(steps, [statistics.mean(c) for c in columns], color=colour, linewidth=1.8, label=name)
        axes.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.13, linewidth=0)
    axes.axhline(goal, color=INK, alpha=0.5, linewidth=1, linestyle=":")
    axes.set_yscale("log")
    axes.legend(frameon=False, labelcolor=INK, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, facecolor="white")


# ---- Fashion-MNIST


class Fixed(Schedule):
    """One level."""

    def __init__(self, lam: float):
        super().__init__()
        self.lam = lam

    def forward(self, u: Tensor) -> Tensor:
        return torch.full_like(u, self.lam)

    def inverse(self, lam: Tensor) -> Tensor:
        raise NotImplementedError


def measure_fashion(batches: int, size: int, levels: int, out: Path | None) -> None:
    denoiser, recipe = load("zoo:fashion-mnist"), load_recipe("fashion-mnist")
    denoiser.requires_grad_(True).train(False)
    data = load_data(recipe)
    pool = BankPool(data)
    targets = {"plain": None, "n=1024": StableTarget(pool, 1024), "all 60,000": StableTarget(pool, None)}
    noise = torch.logspace(-0.7, 1.3, levels, dtype=torch.float64)
    lams = (-2 * noise.log()).tolist()
    found: dict[str, list[float]] = {name: [] for name in targets}
    square: list[float] = []
    started = time.monotonic()
    for lam in lams:
        for name, target in targets.items():
            objective = Denoising(Fixed(lam), "v", target)
            gradients = []
            for k in range(batches):
                index = torch.arange(k * size, (k + 1) * size)
                x0, label = data.batch(index)
                batch = Batch(x0, index, {} if label is None else {"label": label})
                loss = objective(denoiser, batch, Draws(0, k, range(size))).mean()
                parts = torch.autograd.grad(loss, [p for p in denoiser.parameters() if p.requires_grad], allow_unused=True)
                gradients.append(torch.cat([g.flatten() for g in parts if g is not None]))
            stack = torch.stack(gradients).double()
            found[name].append(float(stack.var(0).sum()))
            if name == "plain":
                square.append(float(stack.mean(0).square().sum()))
    print(f"fashion: variance of the gradient of a batch of {size}, {batches} batches, {time.monotonic() - started:.0f} s")
    print(f"{'sigma/alpha':>12}" + "".join(f"{name:>16}" for name in found) + f"{'n=1024 / plain':>16}{'all / plain':>14}")
    for i, s in enumerate(noise.tolist()):
        row = [values[i] for values in found.values()]
        print(f"{s:>12.3f}" + "".join(f"{value:>16.3e}" for value in row) + f"{row[1] / row[0]:>16.2f}{row[2] / row[0]:>14.2f}")
    density = level_density(build_schedule(recipe), torch.tensor(lams, dtype=torch.float64))
    total = {name: float((torch.tensor(values) * density).sum()) for name, values in found.items()}
    print(
        "over the training levels: " + ", ".join(f"{name} {v / total['plain']:.3f}" for name, v in total.items()) + " of plain"
    )
    if out is not None:
        _draw_gradient(noise.tolist(), found, density, out / "stf-gradient.png")


def _draw_gradient(noise: list[float], found: dict[str, list[float]], density: Tensor, path: Path) -> None:
    figure, axes = figure_axes(r"noise $\sigma / \alpha$", "variance of the gradient")
    for k, (name, values) in enumerate(found.items()):
        axes.plot(noise, values, color=INK if k == 0 else COLOURS[k], marker="o", markersize=3.5, linewidth=1.7, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    shade = [low * (high / low) ** (0.25 * d) for d in (density / density.max()).tolist()]
    axes.fill_between(noise, low, shade, color=COLOURS[7], alpha=0.25, linewidth=0, label="levels trained on", zorder=0)
    axes.set_ylim(low, high)
    axes.legend(frameon=False, labelcolor=INK, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, facecolor="white")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail unless the bar is met")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batches", type=int, default=8, help="of fashion, for each level and target")
    parser.add_argument("--levels", type=int, default=9, help="of fashion")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--only", nargs="+", choices=["mixture", "fashion"], default=["mixture", "fashion"])
    parser.add_argument("--out", type=Path, help="folder for the pictures; none are drawn without")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(header())
    met = measure_mixture(args.seeds, args.steps, args.out) if "mixture" in args.only else True
    if "fashion" in args.only:
        measure_fashion(args.batches, 64, args.levels, args.out)
    return int(args.check and not met)


if __name__ == "__main__":
    raise SystemExit(main())
