"""Splitting solvers: accuracy at equal cost, counts of gradients, and the time of a step outside the networks.

    python benchmarks/splitting.py [--check] [--rounds 7] [--threads 1] [--png FOLDER]

Accuracy is the median distance to an exact solution (scipy's order 8) over 200 starts, for a planar mixture of four with the
exact gradient of a class: from sigma / alpha = 3 to 0.2 in geometric steps, where the bar is, and on the linear table of 1,000
betas, from noise to its cleanest level.

Time is that of a step of STSP of order 4 with clipping, float32, in 25 steps, with network and gradient that return tensors
made before: ours, `Split` in the sampling loop, against the released formulation tensor by tensor: every coefficient is a
tensor of the state's shape, the posterior's mean and variance are worked out in every step and held till its end, the noise
goes to the clean image and back, and a kick multiplies the gradient by one factor after the other. "as released" is the same
with the few coefficients as single numbers that the released code has so. All do the same step, to rounding. Both sides are
timed twice: in one process, where malloc treats them alike, and in a process each, where ours has the setting of malloc that
`quieten` starts with (`keep_freed_memory`) and the released formulation, as a script would, none; the bar is on the latter.
With --check the exit status says whether all bars hold. --png draws error against steps for the smooth gradient at scale 10,
and the largest state for one with twelve waves of wave number 30 on top, as neural classifiers have them.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common import header, interleaved
from quieten import VE, VP, Clipped, Counted, MixtureData, Preconditioned, Process, Table, keep_freed_memory, sample
from quieten.guidance import Gradient, Guided
from quieten.guiding.splits import split
from quieten.reports.plots import pareto
from quieten.solvers.plms import PLMS

__all__ = ["main"]

MEANS = torch.tensor([[0.8, 0.2], [-0.6, 0.7], [-0.3, -0.9], [0.5, -0.6]], dtype=torch.float64)
VARS = torch.tensor([0.25, 0.15, 0.2, 0.1], dtype=torch.float64).square()
WEIGHTS = torch.tensor([0.4, 0.25, 0.2, 0.15], dtype=torch.float64)
CLASSES = ([0, 2], [1, 3])
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
STARTS = 200
BAR_ACCURACY, BAR_TIME = 5.0, 1 / 8
STEPS, LARGE = 25, (4, 3, 256, 256)  # of the timing


# ---- the mixture


def toy(process: Process, w: float) -> tuple[MixtureData, Gradient]:
    """The data, and w grad log p(class | x_t), classes by turns."""
    data = MixtureData(MEANS, VARS, WEIGHTS, process)
    parts = [MixtureData(MEANS[c], VARS[c], WEIGHTS[c], process) for c in CLASSES]
    y = (torch.arange(STARTS) % 2)[:, None]

    def slope(x: Tensor, lam: float) -> Tensor:
        return torch.where(y == 0, parts[0].score(x, lam), parts[1].score(x, lam)) - data.score(x, lam)

    return data, Gradient(slope, w)


def exact(x: Tensor, w: float, first: float, last: float) -> Tensor:
    """x / alpha of the guided ODE at sigma / alpha = `last`, from states at `first`."""
    from scipy.integrate import solve_ivp

    data, guidance = toy(VE, w)

    def slope(s: float, z: np.ndarray) -> np.ndarray:
        state, lam = torch.from_numpy(z).reshape(x.shape), -2.0 * math.log(s)
        return (data.predict(state, lam, "eps") - s * guidance.gradient(data, state, lam)).flatten().numpy()

    end = solve_ivp(slope, (first, last), x.flatten().numpy(), method="DOP853", rtol=1e-11, atol=1e-12)
    return torch.from_numpy(end.y[:, -1]).reshape(x.shape)


def geometric(steps: int) -> Tensor:
    return torch.linspace(-2 * math.log(3.0), -2 * math.log(0.2), steps + 1, dtype=torch.float64)


def linear(steps: int) -> Tensor:
    return Table.from_betas(BETAS).grid(steps, "linspace")[:-1]


def accuracy(grid_of: Callable[[int], Tensor], spread: float, steps: int = 50) -> dict[float, dict[str, float]]:
    """Median distance to the exact end, for each scale and method."""
    grid = grid_of(steps)
    x = spread * torch.randn(STARTS, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (alpha, sigma), (alpha_end, sigma_end) = (VP.scales(float(lam)) for lam in grid[[0, -1]])
    out: dict[float, dict[str, float]] = {}
    for w in (1.0, 5.0, 10.0, 30.0):
        (data, guidance), truth = toy(VP, w), exact(x, w, sigma / alpha, sigma_end / alpha_end)
        out[w] = {}
        for name in ("joint PLMS4", "ltsp", "stsp", "lie", "strang", "merged", "heun-kick", "heun-pec", "strang2, 25 steps"):
            joint = name.startswith("joint")
            stepper = PLMS(4) if joint else split(name.split(",")[0], guidance)
            levels = grid_of(25) if name.endswith("25 steps") else grid
            end = sample(Guided(data, guidance) if joint else data, alpha * x, levels, stepper)
            out[w][name] = float((end / alpha_end - truth).norm(dim=1).median())
    return out


def report(errors: dict[float, dict[str, float]], where: str) -> float:
    """Prints a table; the least ratio of released STSP's error to Heun-kick's."""
    print(f"\nmedian distance to the exact end, 50 steps, {where}")
    print(f"{'':<20}" + "".join(f"{f'w = {w:g}':>11}" for w in errors))
    for name in next(iter(errors.values())):
        print(f"{name:<20}" + "".join(f"{row[name]:>11.2e}" for row in errors.values()))
    ratios = [row["stsp"] / row["heun-kick"] for row in errors.values()]
    print(f"{'stsp / heun-kick':<20}" + "".join(f"{ratio:>11.1f}" for ratio in ratios))
    return min(ratios)


def gradients(name: str, grid: Tensor) -> tuple[int, int]:
    """Network and gradient evaluations of a run."""
    data, guidance = toy(VP, 1.0)
    asked = 0

    def slope(x: Tensor, lam: float) -> Tensor:
        nonlocal asked
        asked += 1
        return guidance.fn(x, lam)

    counted = Counted(data)
    sample(counted, torch.zeros(STARTS, 2, dtype=torch.float64), grid, split(name, Gradient(slope)))
    return counted.calls, asked


# ---- pictures


def rough(w: float) -> Gradient:
    """The class's gradient with waves on top."""
    _, smooth = toy(VP, w)
    angle, phase = 2 * math.pi * torch.rand(2, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction = torch.stack([angle.cos(), angle.sin()], 1)

    def slope(x: Tensor, lam: float) -> Tensor:
        return smooth.fn(x, lam) + torch.cos(30.0 * x @ direction.T + phase) @ direction * (0.6 / math.sqrt(12))

    return Gradient(slope, w)


def pictures(folder: Path, w: float = 10.0) -> None:
    """Two PNGs: error for smooth guidance, largest state for rough guidance, both against steps."""
    folder.mkdir(parents=True, exist_ok=True)
    data, smooth = toy(VP, w)
    x = torch.randn(STARTS, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (alpha, sigma), (alpha_end, sigma_end) = (VP.scales(float(lam)) for lam in linear(5)[[0, -1]])
    truth = exact(x / alpha, w, sigma / alpha, sigma_end / alpha_end)
    steps = (5, 7, 10, 15, 20, 30, 50, 100)
    methods = {"joint PLMS4": "", **{name: name for name in ("stsp", "ltsp", "strang", "heun-kick", "strang2")}}
    for name, guidance in (("smooth", smooth), ("rough", rough(w))):
        points: dict[str, list[tuple[float, float]]] = {}
        for label, scheme in methods.items():
            stepper = split(scheme, guidance) if scheme else PLMS(4)
            model = data if scheme else Guided(data, guidance)
            ends = [sample(model, x, linear(n), stepper) / alpha_end for n in steps]
            quality = [(end - truth).norm(dim=1).median() if name == "smooth" else end.abs().max() for end in ends]
            points[label] = [(n, float(q)) for n, q in zip(steps, quality, strict=True)]
        ylabel = "median error" if name == "smooth" else "largest |x|"
        figure = pareto(points, xlabel="steps", ylabel=ylabel)
        figure.savefig(folder / f"splitting-{name}.png", dpi=160, facecolor="white")


# ---- time


class Frozen(nn.Module):
    """A network of no cost: noise and, as learned variances come, a second half of channels."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.out = 0.5 * torch.randn(shape[0], 2 * shape[1], *shape[2:], generator=torch.Generator().manual_seed(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out


class Half(nn.Module):
    """The first half of a network's channels: the noise."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x, t)[:, : x.shape[1]]


def ours(net: nn.Module, gradient: Tensor, x: Tensor, steps: int) -> Callable[[], Tensor]:
    table = Table.from_betas(BETAS)
    denoiser = Clipped(Preconditioned(Half(net), form="eps", embed=table), 1.0)
    stepper, grid = split("stsp", Gradient(lambda x, lam: gradient)), table.grid(steps, "linspace")
    return lambda: sample(denoiser, x, grid, stepper)


def released(net: nn.Module, gradient: Tensor, x: Tensor, steps: int, spread: bool = True) -> Callable[[], Tensor]:
    """STSP of order 4 from tables in numpy, tensor by tensor; `spread`: with the kicks' coefficients as tensors too."""
    kept = Table.from_betas(BETAS).indices(steps, "linspace").flip(0).long().numpy()
    abar = np.cumprod(1.0 - BETAS.numpy())[kept]
    before = np.append(1.0, abar[:-1])
    betas = 1.0 - abar / before
    variance = betas * (1.0 - before) / (1.0 - abar)
    tables = {
        "recip": np.sqrt(1.0 / abar),
        "recipm1": np.sqrt(1.0 / abar - 1.0),
        "variance": variance,
        "log_variance": np.log(np.append(variance[1], variance[1:])),
        "log_betas": np.log(betas),
        "mean_x0": betas * np.sqrt(before) / (1.0 - abar),
        "mean_x": (1.0 - before) * np.sqrt(1.0 - betas) / (1.0 - abar),
        "sbar": np.sqrt(1.0 / abar - 1.0),
        "sbar_next": np.sqrt(1.0 / before - 1.0),
    }

    def at(name: str, t: Tensor, shape: torch.Size) -> Tensor:
        """One coefficient, as a tensor of the state's shape."""
        value = torch.from_numpy(tables[name])[t].float()
        return value.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)

    def mean_variance(x: Tensor, t: Tensor) -> dict[str, Tensor]:
        """The clipped estimate of x0, and the posterior's mean and variance, which nothing asks for."""
        indices = torch.tensor(kept)[t]
        noise, share = torch.split(net(x, indices), x.shape[1], dim=1)
        low, high = at("log_variance", t, x.shape), at("log_betas", t, x.shape)
        share = (share + 1) / 2
        log_variance = share * high + (1 - share) * low
        variance = torch.exp(log_variance)
        x0 = (at("recip", t, x.shape) * x - at("recipm1", t, x.shape) * noise).clamp(-1, 1)
        mean = at("mean_x0", t, x.shape) * x0 + at("mean_x", t, x.shape) * x
        at("variance", t, x.shape)
        at("log_variance", t, x.shape)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "x0": x0}

    def mixed(history: list[Tensor]) -> Tensor:
        if len(history) == 1:
            return history[-1]
        if len(history) == 2:
            return (3 * history[-1] - history[-2]) / 2
        if len(history) == 3:
            return (23 * history[-1] - 16 * history[-2] + 5 * history[-3]) / 12
        return (55 * history[-1] - 59 * history[-2] + 37 * history[-3] - 9 * history[-4]) / 24

    def kick(h: Tensor, alpha: Tensor) -> Tensor:
        """The gradient times -h sigma, from the left as it is released: each factor is a pass over it."""
        return -gradient * h * torch.sqrt(1 - alpha**2)

    def step(state: Tensor, i: int, history: list[Tensor]) -> dict[str, Tensor]:
        t = torch.tensor([i] * len(state))
        like, first = (state.shape, t) if spread else (torch.Size([1]), t[:1])
        s, s_next = at("sbar", first, like), at("sbar_next", first, like)
        alpha, alpha_next, h = 1 / torch.sqrt(s**2 + 1), 1 / torch.sqrt(s_next**2 + 1), s_next - s
        alpha_half = torch.sqrt(1 / ((s + s_next) ** 2 / 4 + 1))
        state = state + kick(h / 2, alpha) * alpha
        p = mean_variance(state, t)
        noise = (at("recip", t, state.shape) * state - p["x0"]) / at("recipm1", t, state.shape)
        history.append(noise)
        state = (state / alpha + h * mixed(history)) * alpha_next
        if len(history) == 4:
            history.pop(0)
        return {"state": state + kick(h / 2, alpha_half) * alpha_next, "x0": p["x0"]}

    @torch.no_grad()
    def run() -> Tensor:
        out, history = {"state": x}, []
        for i in range(steps - 1, -1, -1):
            out = step(out["state"], i, history)
        return out["state"]

    return run


def cases(shape: tuple[int, ...]) -> dict[str, Callable[[], Tensor]]:
    draws = torch.Generator().manual_seed(0)
    net, gradient, x = Frozen(shape), 0.01 * torch.randn(shape, generator=draws), torch.randn(shape, generator=draws)
    return {
        "ours": ours(net, gradient, x, STEPS),
        "tensor by tensor": released(net, gradient, x, STEPS),
        "as released": released(net, gradient, x, STEPS, spread=False),
    }


def timed(runs: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Milliseconds of a step, in one process."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    return {name: 1e3 * timing.least / STEPS for name, timing in interleaved(runs, rounds, clock=clock).items()}


def apart(shape: tuple[int, ...], rounds: int, names: list[str]) -> dict[str, float]:
    """The same of each case in processes of its own, one after the other, in turn; ours with the command line's malloc."""
    own = [sys.executable, __file__, "--threads", str(torch.get_num_threads()), "--shape", ",".join(map(str, shape)), "--case"]
    told: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            told[name].append(float(subprocess.run([*own, name], capture_output=True, text=True, check=True).stdout))
    return {name: min(values) for name, values in told.items()}


def show(where: str, ms: dict[str, float]) -> None:
    cells = ", ".join(f"{name} {value:.2f}" for name, value in ms.items())
    print(f"ms a step, {where}: {cells}; ours is 1/{ms['tensor by tensor'] / ms['ours']:.1f} of tensor by tensor, "
          f"1/{ms['as released'] / ms['ours']:.1f} of as released")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail unless every bar holds")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--png", type=Path, help="folder for two pictures; nothing is measured then")
    parser.add_argument("--case", help="print the milliseconds a step of one case, in this process, and nothing else")
    parser.add_argument("--shape", type=lambda text: tuple(map(int, text.split(","))), default=LARGE, help="for --case")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.case is not None:
        if args.case == "ours":
            keep_freed_memory()
        print(timed({args.case: cases(args.shape)[args.case]}, 3)[args.case])
        return 0
    if args.png is not None:
        pictures(args.png)
        return 0
    print(header("scipy"))
    least = report(accuracy(geometric, 3.0), "sigma / alpha from 3 to 0.2 in geometric steps")
    accurate = least >= BAR_ACCURACY
    print(f"smallest ratio {least:.1f}, bar {BAR_ACCURACY:g}: {'met' if accurate else 'missed'}")
    report(accuracy(linear, 157.4), "the linear table, from noise to its cleanest level")
    n, grid = 25, Table.from_betas(BETAS).grid(25, "linspace")
    counts = {name: gradients(name, grid) for name in ("stsp", "heun-kick", "strang", "merged", "heun-pec", "lie")}
    print(f"\nnetwork and gradient evaluations in {n} steps: " + ", ".join(f"{k} {a}, {b}" for k, (a, b) in counts.items()))
    finite = gradients("merged", grid[:-1])[1]
    few = counts["merged"][1] <= n + 1 and finite <= n
    print(f"merged: {counts['merged'][1]} to the data, {finite} in {n - 1} steps short of it, "
          f"bar steps + 1: {'met' if few else 'missed'}")  # fmt: skip
    for shape in ((16, 1, 28, 28), LARGE):
        runs = cases(shape)
        ends = {name: run() for name, run in runs.items()}
        size = ends["tensor by tensor"].abs().max()
        difference = max(float((end - ends["tensor by tensor"]).abs().max() / size) for end in ends.values())
        rounds = args.rounds if shape == LARGE else 10 * args.rounds
        show(f"{'x'.join(map(str, shape))}, one process; results differ by {difference:.0e}", timed(runs, rounds))
    del runs, ends
    ms = apart(LARGE, 3, list(cases((1, 1, 1, 1))))
    show(f"{'x'.join(map(str, LARGE))}, a process each, ours as the command line runs it", ms)
    quick = ms["ours"] / ms["tensor by tensor"] <= BAR_TIME
    print(f"bar 1/{1 / BAR_TIME:g} of tensor by tensor: {'met' if quick else 'missed'}")
    return int(args.check and not (accurate and few and quick))


if __name__ == "__main__":
    raise SystemExit(main())
