"""What `quieten compare` spends beside its networks.

    python benchmarks/compare.py [--check] [--quick] [--n 400] [--threads 1]

Six samplers in 5 and 10 steps on zoo:fashion-mnist, into an empty folder. The time within the network is measured by hooks, on
the processor's clock with one thread. The rest of drawing is transitions, noise, rounding and files; features and distances
stand apart, those of the reference too, which are made once for a folder, here of 5,000 images. With --check the exit status
says whether the rest is at most 5 % of the network. The last line projects 6 samplers in 5, 10, 20 and 50 steps of 2,000
samples.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common import header
from quieten.comparing.compare import compare
from quieten.comparing.judge import Judge
from quieten.comparing.lineup import Entrant
from quieten.data import load
from quieten.metrics.features import Extractor
from quieten.training.source import open_source

__all__ = ["main"]

BAR = 0.05
NAMES = ("ddpm", "ddim", "dpm++", "dpm++3m", "ocm", "diffusers:unipc")
STEPS = (5, 10)
REFERENCE = 5000
WHOLE = 6 * (5 + 10 + 20 + 50) * 2000
"""Evaluations of the comparison that is to take 20 minutes on 2 cores."""


class Stopwatch:
    """Adds up the time of calls."""

    def __init__(self, clock: Callable[[], float]):
        self.clock, self.seconds, self.start = clock, 0.0, 0.0

    def __enter__(self) -> None:
        self.start = self.clock()

    def __exit__(self, *_: object) -> None:
        self.seconds += self.clock() - self.start

    def around(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self:
                return fn(*args, **kwargs)

        return timed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help=f"fail unless the rest is at most {100 * BAR:g} %%")
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    parser.add_argument("--n", type=int, default=400, help="samples of each of the 12 cells")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    n = 100 if args.quick else args.n
    source = open_source("zoo:fashion-mnist")
    network, judging, drawing = Stopwatch(clock), Stopwatch(clock), Stopwatch(clock)
    net: Any = source.denoiser.net
    net.register_forward_pre_hook(lambda *_: network.__enter__())
    net.register_forward_hook(lambda *_: network.__exit__())
    entrant = Entrant("zoo:fashion-mnist", source, batch=args.batch)
    contenders = [entrant.contender(name, steps) for name in NAMES for steps in STEPS]
    contenders[0].draw(range(args.batch))  # what is allocated and loaded once
    network.seconds = 0.0
    with tempfile.TemporaryDirectory() as folder:
        data = load("fashion-mnist")
        some = data.subset(slice(0, REFERENCE))
        judge = Judge(Extractor.zoo("fashion-mnist"), some, Path(folder) / "reference", show=False)
        reference = Stopwatch(clock)
        with reference:
            _ = judge.statistics, judge.manifold
        judge.kept = judging.around(judge.kept)  # type: ignore[method-assign]
        with drawing:
            rows = compare(contenders, judge, Path(folder) / "cells", n=n, batch=args.batch, show=False)
    drawn, evaluations = drawing.seconds - judging.seconds, sum(row.evaluations * n for row in rows)
    rest = drawn / network.seconds - 1.0
    print(header("diffusers"))
    print(f"{len(rows)} cells of {n} samples, {evaluations:,.0f} evaluations, batch {args.batch}")
    print(f"network {network.seconds:.2f} s, the rest of drawing {drawn - network.seconds:.2f} s; "
          f"features and distances {judging.seconds:.2f} s, of the reference {reference.seconds:.2f} s")  # fmt: skip
    met = rest <= BAR
    print(f"the rest over the network: {rest:.3f}, bar {BAR:g}: {'met' if met else 'missed'}")
    cells = 24 * judging.seconds / len(rows) * 2000 / n
    minutes = (WHOLE * drawn / evaluations + cells + reference.seconds * len(data) / REFERENCE) / 60
    print(f"6 samplers in 5, 10, 20, 50 steps of 2,000 samples: {minutes:.1f} minutes at this rate, {evaluations / drawn:.0f} "
          f"evaluations/s on {args.threads} thread(s)")  # fmt: skip
    return int(args.check and not met)


if __name__ == "__main__":
    raise SystemExit(main())
