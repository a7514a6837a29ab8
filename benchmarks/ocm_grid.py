"""Time grids of least cost: the rows that are needed against all of them, and costs from a histogram against costs from images.

    python benchmarks/ocm_grid.py [--check] [--rounds 5] [--threads 1]

Alternatives, written here: the dynamic programme that fills the table for every number of steps up to N with whole-matrix
operations, keeping the best predecessors, and then walks back; and the costs F[s, t] of one level t, for every s below it, each
computed on all pixels of all images. Processor time, least of interleaved rounds (the slow alternatives take part in few).
With --check the exit status says whether every bar is met: ratios of 60 and 50, and a relative error of at most 1e-4.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from common import header, interleaved
from quieten.solvers.grids import shortest_path, step_costs

__all__ = ["main"]

N = 1000
STEPS = (10, 25, 50)
BARS = {"grid": 60.0, "costs": 50.0, "error": 1e-4}
IMAGES, SHAPE = 50, (3, 32, 32)


def all_rows(F: Tensor) -> tuple[Tensor, Tensor]:
    """Bellman's table for every number of edges, and the best predecessors: whole-matrix additions and minima."""
    size = len(F)
    cost = torch.full((size, size), torch.inf, dtype=torch.float64)
    best = torch.zeros(size, size, dtype=torch.int64)
    cost[0, 0] = 0.0
    for k in range(1, size):
        cost[k], best[k] = (cost[k - 1][:, None] + F).min(0)
    return cost, best


def walk_back(best: Tensor, edges: int) -> Tensor:
    path = [len(best) - 1]
    for k in range(edges, 0, -1):
        path.append(int(best[k, path[-1]]))
    return torch.tensor(path[::-1])


def on_images(v: Tensor, e: Tensor, rho: Tensor) -> Tensor:
    """The same costs as `step_costs`, on all images for each s."""
    costs = []
    for r in rho.tolist():
        ratio = 1.0 / (1.0 + r * v)  # of the posterior's variance to the kernel's
        costs.append((0.5 * (ratio - ratio.log() - 1.0 + r * e * ratio)).flatten(1).sum(1).mean())
    return torch.stack(costs)


def a_level() -> tuple[Tensor, Tensor, Tensor]:
    """Variances, squared errors and SNR differences as a model has them in the noisiest level of 1,000."""
    generator = torch.Generator().manual_seed(0)
    v = torch.exp(-3 + 1.5 * torch.randn(IMAGES, *SHAPE, generator=generator, dtype=torch.float64)).clamp_max(1.0)
    e = v * torch.randn(v.shape, generator=generator, dtype=torch.float64).square()
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, N, dtype=torch.float64), 0)
    snr = abar / (1 - abar)
    return v, e, snr[:-1] - snr[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail unless every bar is met")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(header())
    passed = []

    generator = torch.Generator().manual_seed(0)
    F = torch.rand(N, N, generator=generator, dtype=torch.float64) + torch.arange(N).sqrt()
    F = F.masked_fill(torch.ones(N, N, dtype=torch.bool).tril(), torch.inf)
    _, best = all_rows(F)
    print(f"\nleast-cost path among {N} levels, ms\n{'steps':>6}{'needed rows':>14}{'all rows':>12}{'ratio':>8}")
    for steps in STEPS:
        if not torch.equal(shortest_path(F, steps)[0], walk_back(best, steps)):
            raise SystemExit(f"the paths of {steps} steps differ")
    cases = {f"{steps}": lambda steps=steps: shortest_path(F, steps) for steps in STEPS}
    timings = interleaved({**cases, "all": lambda: all_rows(F)}, args.rounds, warmup=1, clock=time.process_time)
    for steps in STEPS:
        ratio = timings["all"].least / timings[str(steps)].least
        passed.append(ratio >= BARS["grid"])
        print(f"{steps:>6}{1e3 * timings[str(steps)].least:>14.2f}{1e3 * timings['all'].least:>12.0f}{ratio:>8.0f}")

    v, e, rho = a_level()
    exact = on_images(v, e, rho)
    error = float(((step_costs(v, e, rho) - exact) / exact).abs().max())
    cases = {"histogram": lambda: step_costs(v, e, rho), "images": lambda: on_images(v, e, rho)}
    timings = interleaved(cases, max(2, args.rounds // 2), warmup=1, clock=time.process_time)
    ratio = timings["images"].least / timings["histogram"].least
    passed += [ratio >= BARS["costs"], error <= BARS["error"]]
    print(f"\ncosts F[s, {N}] for {len(rho)} levels s, {IMAGES} images of {'x'.join(map(str, SHAPE))}, 256 bins")
    print(f"histogram {1e3 * timings['histogram'].least:.1f} ms, images {1e3 * timings['images'].least:.0f} ms, "
          f"ratio {ratio:.0f}, largest relative error {error:.1e}")  # fmt: skip
    print(f"bars: ratios {BARS['grid']:.0f} and {BARS['costs']:.0f}, error {BARS['error']:.0e}: "
          f"{'met' if all(passed) else 'missed'}")  # fmt: skip
    return int(args.check and not all(passed))


if __name__ == "__main__":
    raise SystemExit(main())
