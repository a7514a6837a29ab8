"""DxMI on eight Gaussians in two dimensions: sliced Wasserstein distance of 5-step samples, and what their energy tells apart.

    python benchmarks/dxmi_gaussians.py --threads 1 --check                      # the recipe, three seeds
    python benchmarks/dxmi_gaussians.py --cases recipe,tau0,constant --seeds 0,1,2 --results gaussians.json --plots docs/results

Every case starts from one denoiser pretrained for five steps, of which the table has a row: DDPM with five steps. Distances are
means over ten pairs of 50,000 samples and 50,000 points of data, 100 random projections each; the floor is data against data.
The AUC is the chance that a point of the square [-4, 4]^2 has more energy than a point of the data; the density's own is in the
header. `--results` keeps what was measured, and goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import header
from quieten.denoiser import Preconditioned
from quieten.files import write_atomic
from quieten.imitation import MaxEntIRL
from quieten.metrics import auroc, sliced_wasserstein
from quieten.nets import Embedding
from quieten.noise import Draws, Noise
from quieten.oracle import MixtureData
from quieten.process import VP
from quieten.schedule import Table
from quieten.tuning.energies import PerceptronValue, perceptron
from quieten.tuning.policy import Policy
from quieten.tuning.settings import Settings

T = 5
BETAS = (0.02, 0.1, 0.3, 0.6, 0.9)  # data first
AUC_BAR, SW2_BAR = 0.88, 0.08


@dataclass(frozen=True)
class Case:
    """A way to tune: what differs from the recipe."""

    tau: float = 0.1
    batch: int = 512
    decay: bool = True
    pretrained: bool = True
    iterations: int = 4000


CASES = {
    "recipe": Case(),
    "constant": Case(decay=False),
    "batch 128": Case(batch=128),
    "constant, batch 128": Case(decay=False, batch=128),
    "tau 0": Case(tau=0.0),
    "tau 0.01": Case(tau=0.01),
    "tau 1": Case(tau=1.0),
    "from scratch": Case(pretrained=False),
}


class NoiseNet(nn.Module):
    """eps(x, t) of two dimensions: three layers of 128 with SiLU, the step in 32 sines and cosines."""

    def __init__(self) -> None:
        super().__init__()
        self.waves = Embedding(1, t_scale=2.0, frequencies=16).waves
        self.net = perceptron(2 + 32, 2, width=128, depth=3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.net(torch.cat([x, self.waves(t).to(x)], dim=1))
        return out


def gaussians() -> MixtureData:
    """Eight Gaussians of standard deviation 0.354 on a circle of radius 2.83."""
    angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
    return MixtureData(torch.stack([angle.cos(), angle.sin()], 1) * 8**0.5, 0.125, process=VP)


def levels() -> Table:
    return Table.from_betas(torch.tensor(BETAS, dtype=torch.float64))


def grid() -> Tensor:
    """Log-SNRs of the five states from noise, and the data."""
    return torch.cat([levels().lam.flip(0), torch.tensor([math.inf], dtype=torch.float64)])


def draw(data: MixtureData, n: int, seed: int) -> Tensor:
    return data.sample(Noise(seed, range(n))).float()


def pretrain(data: MixtureData, seed: int, steps: int = 4000, batch: int = 512) -> Preconditioned:
    """The noise network, trained at the five levels."""
    torch.manual_seed(seed)
    table = levels()
    denoiser = Preconditioned(NoiseNet(), VP, "eps", table, shape=(2,))
    optimizer = torch.optim.Adam(denoiser.parameters(), 1e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, 2.0 * (steps - step) / steps)
        draws = Draws(1000 + seed, step, range(batch))
        x0 = draw(data, batch, 2000 + seed * 10**6 + step)
        lam = table.lam[(draws.uniform("level") * T).long().clamp_max_(T - 1)]
        eps = draws.normal(x0)
        x_t = VP.marginal(x0, lam).sample(eps)
        loss = (denoiser.predict(x_t, lam, "eps") - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return denoiser


def settings(case: Case) -> Settings:
    return Settings(
        tau1=case.tau, tau2=case.tau, gamma=1.0, time_cost=None, entropy_in_value=0, velocity_in_value=0, policy_clip=None,
        lr_policy=1e-4, lr_std=1e-3, lr_value=1e-3, betas=(0.5, 0.99), ema=0.998,
    )  # fmt: skip


def tune(case: Case, data: MixtureData, seed: int, told: Callable[[int, dict[str, Tensor]], None] | None = None) -> MaxEntIRL:
    """The recipe of the specification: learning rates constant for half of the run, then linear to 2 %."""
    denoiser = pretrain(data, seed, 4000 if case.pretrained else 0)
    std = torch.tensor(BETAS).flip(0).sqrt()
    policy = Policy(denoiser, grid(), std=std, trained="fix_last")
    torch.manual_seed(100 + seed)
    irl = MaxEntIRL(policy, PerceptronValue(2, T, width=128, depth=3), settings=settings(case))
    for i in range(case.iterations):
        left = min(1.0, 2.0 * (case.iterations - i) / case.iterations) if case.decay else 1.0
        for optimizer in irl.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * max(0.02, left)
        report = irl.iterate(draw(data, case.batch, 10**8 * (seed + 1) + i), None, Draws(seed, i, range(case.batch)))
        if told is not None and (i + 1) % 500 == 0:
            told(i + 1, report)
    return irl


# ---- measuring


def samples(policy: Policy, n: int, seed: int) -> Tensor:
    return policy.rollout(n, Noise(seed, range(n))).final


def distance(data: MixtureData, make: Callable[[int], Tensor], n: int, pairs: int) -> tuple[float, float]:
    """SW2 of samples to data, mean and spread over pairs of fresh sets."""
    values = torch.tensor(
        [sliced_wasserstein(make(i), draw(data, n, 7000 + i), projections=100, seed=i, splits=0).value for i in range(pairs)]
    )
    return float(values.mean()), float(values.std())


@torch.no_grad()
def told_apart(data: MixtureData, energy: Callable[[Tensor], Tensor], n: int = 50_000) -> float:
    """AUC of points of the square against points of the data."""
    square = 8.0 * torch.stack([Noise(9000 + i, range(n)).uniform(0) for i in range(2)], 1).float() - 4.0
    points = torch.cat([draw(data, n, 9002), square])
    return auroc(energy(points), torch.arange(2 * n) >= n).value


def measured(irl: MaxEntIRL, data: MixtureData, n: int, pairs: int) -> dict[str, Any]:
    """Quality of the averages and of the latest weights."""
    out: dict[str, Any] = {}
    for name, policy, value in (("ema", irl.policy_average, irl.value_average), ("raw", irl.policy, irl.value)):
        assert policy is not None
        assert value is not None
        sw2 = distance(data, lambda i, policy=policy: samples(policy, n, 5000 + i), n, pairs)  # type: ignore[misc]
        out[name] = {"sw2": sw2[0], "sw2_std": sw2[1], "auc": told_apart(data, lambda x, value=value: value(x, T))}  # type: ignore[misc]
    return out


def run(name: str, seed: int, data: MixtureData, n: int, pairs: int, plots: Path | None) -> dict[str, Any]:
    start, wall = time.process_time(), time.perf_counter()
    last: dict[str, Tensor] = {}

    def told(i: int, report: dict[str, Tensor]) -> None:
        last.update(report)
        print(f"  {name}, seed {seed}, iteration {i}: Le Cam {float(report['le_cam']):.3f}, "
              f"costs {[round(float(c), 2) for c in report['running_cost']]}", flush=True)  # fmt: skip

    irl = tune(CASES[name], data, seed, told)
    seconds = time.process_time() - start
    out = measured(irl, data, n, pairs)
    out |= {
        "cpu_s": seconds, "wall_s": time.perf_counter() - wall, "le_cam": float(last["le_cam"]),
        "running_cost": last["running_cost"].tolist(), "rho": irl.sampler.rhos.tolist(),
    }  # fmt: skip
    if plots is not None and name in ("recipe", "tau 0") and seed == 0:
        plot(irl, data, plots / f"dxmi-gaussians{'' if name == 'recipe' else '-tau0'}.png")
    return out


def begun(seed: int, data: MixtureData, n: int, pairs: int) -> dict[str, Any]:
    """DDPM with five steps, as every case of this seed starts: with small variances, and with those the policy starts at."""
    denoiser = pretrain(data, seed)
    out: dict[str, Any] = {}
    for name, std in (("small", None), ("beta", torch.tensor(BETAS).flip(0).sqrt())):
        policy = Policy(denoiser, grid(), std=std, trained="none")
        sw2 = distance(data, lambda i, policy=policy: samples(policy, n, 5000 + i), n, pairs)  # type: ignore[misc]
        out[name] = {"sw2": sw2[0], "sw2_std": sw2[1]}
    return out


def plot(irl: MaxEntIRL, data: MixtureData, path: Path) -> None:
    """Samples before and after, the energy, and the values of the states on the way."""
    import io

    from matplotlib.figure import Figure

    value = irl.value_average
    assert value is not None
    start = Policy(pretrain(data, 0), grid(), trained="none")
    side = torch.linspace(-4.5, 4.5, 91)
    points = torch.cartesian_prod(side, side)
    figure = Figure(figsize=(9.6, 5.0), layout="constrained")
    axes = figure.subplots(2, 4).flatten()
    clouds = {"data": draw(data, 4000, 1), "DDPM, 5 steps": samples(start, 4000, 1), "tuned": samples(irl.sampler, 4000, 1)}
    for ax, (title, x) in zip(axes, clouds.items(), strict=False):
        ax.plot(*x.T.numpy(), ".", markersize=1, color="#2a7fdb", alpha=0.5)
        ax.set_title(title, fontsize=9.5)
    for ax, k in zip(axes[3:], (T, 4, 3, 2, 1), strict=False):
        with torch.no_grad():
            v = value(points, k).reshape(91, 91).T
        mesh = ax.pcolormesh(side.numpy(), side.numpy(), v.numpy(), cmap="viridis", rasterized=True)
        figure.colorbar(mesh, ax=ax, shrink=0.8).ax.tick_params(labelsize=7)
        ax.set_title("energy V(x, 5)" if k == T else f"value V(x, {k})", fontsize=9.5)
    for ax in axes:
        ax.set(xlim=(-4.5, 4.5), ylim=(-4.5, 4.5), aspect="equal", xticks=(-4, 0, 4), yticks=(-4, 0, 4))
        ax.tick_params(labelsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, facecolor="white")
    write_atomic(path, buffer.getvalue())


# ---- the table


def table(results: dict[str, Any]) -> None:
    print("\n| case | seeds | SW2, averaged weights | AUC | SW2, latest weights | AUC | Le Cam | CPU s |")
    print("|---|---|---|---|---|---|---|---|")
    for name in CASES:
        rows = [row for key, row in results.items() if key.rsplit("/", 1)[0] == name]
        if rows:
            cells = [_cell([row[w][q] for row in rows]) for w in ("ema", "raw") for q in ("sw2", "auc")]
            rest = [sum(row[q] for row in rows) / len(rows) for q in ("le_cam", "cpu_s")]
            print(f"| {name} | {len(rows)} | {' | '.join(cells)} | {rest[0]:.3f} | {rest[1]:.0f} |")
    starts = [row for key, row in results.items() if key.startswith("start/")]
    for name in ("small", "beta"):
        print(f"DDPM, 5 steps, variances {name}: SW2 {_cell([row[name]['sw2'] for row in starts])}")


def _cell(values: list[float]) -> str:
    """The mean, and each seed's."""
    return f"{sum(values) / max(1, len(values)):.3f} ({' '.join(f'{v:.3f}' for v in values)})"


def verdict(results: dict[str, Any]) -> bool:
    """Whether the recipe holds its bars, and tau = 0 tells nothing apart."""
    rows = [row for key, row in results.items() if key.startswith("recipe/")]
    good = bool(rows)
    if rows:
        sw2 = sum(row["ema"]["sw2"] for row in rows) / len(rows)
        auc = sum(row["ema"]["auc"] for row in rows) / len(rows)
        good = sw2 <= SW2_BAR and auc >= AUC_BAR
        print(f"recipe: SW2 {sw2:.3f}, at most {SW2_BAR}: {'ok' if sw2 <= SW2_BAR else 'MISSED'}; "
              f"AUC {auc:.3f}, at least {AUC_BAR}: {'ok' if auc >= AUC_BAR else 'MISSED'}")  # fmt: skip
    for key, row in results.items():
        if key.startswith("tau 0/"):
            print(f"{key}: AUC {row['ema']['auc']:.3f}, chance is 0.5")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", default="recipe", help=f"by comma, or all: {'; '.join(CASES)} (dashes for blanks)")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--n", type=int, default=50_000, help="samples of a distance")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=None)
    parser.add_argument("--results", type=Path, default=None, help="JSON of what was measured")
    parser.add_argument("--plots", type=Path, default=None, help="folder of the pictures")
    parser.add_argument("--check", action="store_true", help="exit 1 if a bar is not met")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.iterations is not None:
        CASES.update({name: replace(case, iterations=options.iterations) for name, case in CASES.items()})
    names = list(CASES) if options.cases == "all" else [name.replace("-", " ") for name in options.cases.split(",")]
    names = [next(known for known in CASES if known.replace(",", "") == name.replace(",", "")) for name in names]
    data, n, pairs = gaussians(), options.n, options.pairs
    kept = options.results
    results: dict[str, Any] = json.loads(kept.read_text()) if kept is not None and kept.is_file() else {}
    floor = distance(data, lambda i: draw(data, n, 3000 + i), n, pairs)
    ideal = told_apart(data, lambda x: -data.log_prob(x))
    print(header())
    print(f"data against data: SW2 {floor[0]:.4f} ± {floor[1]:.4f} ({pairs} pairs of {n:,}); AUC of the density {ideal:.4f}")
    for seed in map(int, options.seeds.split(",")):
        for name in ["start", *names]:
            key = f"{name}/{seed}"
            if key not in results:
                args = (seed, data, n, pairs)
                results[key] = begun(*args) if name == "start" else run(name, *args, options.plots)
                print(f"{key}: {json.dumps(results[key])}", flush=True)
                if kept is not None:
                    write_atomic(kept, json.dumps(results, indent=1).encode())
    table(results)
    good = verdict(results)
    return 0 if good or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())
