"""What stable targets cost: against the direct form, and in a whole training step.

    python benchmarks/stf.py [--check] [--rounds 5] [--threads 1] [--only target step]

target   Time and peak memory of `stable_target` over those of the direct form, which makes two (B, n, D) tensors as published
         code does; float32, B=64, n=4096, D=3072, in turn within one run, and both errors against float64. Time is the
         processor's, memory the growth of the process's resident set, each form in a process of its own. The bars are 1/50
         and 1/100.
step     Time of a training step of the recipe fashion-mnist (its network, B=128, labels) with 1024 references from a bank, over
         that of the step without: loss, gradient, optimiser. The references are drawn within the timing, though training draws
         them in another thread. The bar is 1.05.

With --check the exit status says whether the bars are met, by the least times.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import resource
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from common import Timing, header, interleaved
from quieten.data import Dataset
from quieten.noise import Draws
from quieten.target import stable_target
from quieten.training.config import load_data, load_recipe, resolve
from quieten.training.feed import examples
from quieten.training.runs import build_update

__all__ = ["main"]

B, N, D = 64, 4096, 3072
TIME_BAR, MEMORY_BAR, STEP_BAR = 1 / 50, 1 / 100, 1.05
LEVELS = (0.002, 80.0)


def direct(x: Tensor, refs: Tensor, sigma: Tensor) -> Tensor:
    """The definition as it is written, with every difference."""
    apart = x[:, None] - refs[None]
    weights = (apart.square().sum(2) / (-2 * sigma[:, None].square())).softmax(1)
    return (weights[:, :, None] * refs[None]).sum(1)


def ours(x: Tensor, refs: Tensor, sigma: Tensor) -> Tensor:
    return stable_target(x, refs, 1.0, sigma, source=torch.arange(len(x)))


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"ours": ours, "direct": direct}


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Pictures of pixels in [-1, 1], smooth over the examples as pictures are, and their noisy versions at all levels."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(N, 24, generator=generator) @ torch.randn(24, D, generator=generator) / 5
    refs = torch.tanh(parts + 0.1 * torch.randn(N, D, generator=generator))
    sigma = torch.linspace(*torch.tensor(LEVELS, dtype=torch.float64).log().tolist(), B, dtype=torch.float64).exp().float()
    return refs[:B] + sigma[:, None] * torch.randn(B, D, generator=generator), refs, sigma


# ---- memory


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _watched(name: str, threads: int, out: Connection) -> None:
    """Sends the growth of the resident set while a form runs; its first call, on a small problem, loads what it needs."""
    torch.set_num_threads(threads)
    x, refs, sigma = problem()
    FORMS[name](x[:2], refs[:64], sigma[:2])
    gc.collect()
    peak = before = _resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _resident())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    FORMS[name](x, refs, sigma)
    done.set()
    watcher.join()
    out.send(peak - before)


def memory(name: str, threads: int, tries: int = 3) -> float:
    """MiB that a form takes at its peak: the largest of some tries, each in a fresh process."""
    grown = []
    for _ in range(1 if name == "direct" else tries):
        mine, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=_watched, args=(name, threads, theirs))
        process.start()
        grown.append(mine.recv())
        process.join()
    return max(grown) / 2**20


# ---- the parts


def clock_of(threads: int) -> Callable[[], float]:
    return time.process_time if threads == 1 else time.perf_counter


def measure_target(rounds: int, threads: int) -> bool:
    x, refs, sigma = problem()
    wide = [ours(x.double(), refs.double(), sigma.double()), ours(x, refs, sigma), direct(x[::16], refs, sigma[::16])]
    checked = torch.stack([direct(x[i : i + 1].double(), refs.double(), sigma[i : i + 1].double())[0] for i in range(0, B, 8)])
    errors = [float((wide[0][::8] - checked).abs().max()), float((wide[1].double() - wide[0]).abs().max())]
    theirs = float((wide[2].double() - wide[0][::16]).abs().max())
    cases: dict[str, Callable[[], object]] = {name: lambda form=form: form(x, refs, sigma) for name, form in FORMS.items()}
    times = interleaved(cases, rounds, warmup=1, clock=clock_of(threads))
    peaks = {name: memory(name, threads) for name in FORMS}
    time_ratio, memory_ratio = times["direct"].least / times["ours"].least, peaks["direct"] / peaks["ours"]
    print(f"target: B={B}, n={N}, D={D}, float32, sigma from {LEVELS[0]} to {LEVELS[1]}")
    print(f"{'':<10}{'ms, least':>12}{'ms, median':>12}{'peak MiB':>12}")
    for name in FORMS:
        print(f"{name:<10}{1e3 * times[name].least:>12.1f}{1e3 * times[name].median:>12.1f}{peaks[name]:>12.1f}")
    print(f"error against float64: ours {errors[1]:.1e}, direct {theirs:.1e} (4 rows); ours in float64 {errors[0]:.1e}")
    ok = time_ratio >= 1 / TIME_BAR and memory_ratio >= 1 / MEMORY_BAR and errors[1] <= 1e-5
    print(f"direct / ours: time {time_ratio:.0f} (bar 50), memory {memory_ratio:.0f} (bar 100): {'met' if ok else 'missed'}")
    return ok


def stepper(data: Dataset, target: str | None) -> Callable[[], object]:
    """A training step of the recipe, taken again and again."""
    recipe = resolve(load_recipe("fashion-mnist", [] if target is None else [f"target={target}"]), data)
    update = build_update(recipe, data)
    optimizer = torch.optim.Adam(update.parameters(), lr=1e-4, fused=True)
    size, count = recipe.train.batch, 0

    def step() -> None:
        nonlocal count
        count += 1
        rows = torch.arange(size)
        batch = examples(data, recipe, torch.arange(count * size, (count + 1) * size) % len(data), rows, count)
        loss = update(batch, Draws(0, count, rows, size))["loss"].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_step(rounds: int, threads: int) -> bool:
    recipe = load_recipe("fashion-mnist")
    data = load_data(recipe)
    cases = {
        "without": stepper(data, None),
        "n=1024": stepper(data, "{kind: stable, references: 1024, pool: bank}"),
        "n=60000": stepper(data, "{kind: stable, references: all, pool: bank}"),
    }
    times: dict[str, Timing] = interleaved(cases, rounds, warmup=1, clock=clock_of(threads))
    print("step: recipe fashion-mnist, B=128")
    print(f"{'':<10}{'ms, least':>12}{'ms, median':>12}{'ratio':>8}")
    for name, timing in times.items():
        ratio = timing.least / times["without"].least
        print(f"{name:<10}{1e3 * timing.least:>12.0f}{1e3 * timing.median:>12.0f}{ratio:>8.3f}")
    ratio = times["n=1024"].least / times["without"].least
    print(f"with 1024 references / without: {ratio:.3f} (bar {STEP_BAR}): {'met' if ratio <= STEP_BAR else 'missed'}")
    return ratio <= STEP_BAR


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail unless the bars are met")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--only", nargs="+", choices=["target", "step"], default=["target", "step"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(header())
    met = [measure_target(args.rounds, args.threads)] if "target" in args.only else []
    met += [measure_step(args.rounds, args.threads)] if "step" in args.only else []
    return int(args.check and not all(met))


if __name__ == "__main__":
    raise SystemExit(main())
