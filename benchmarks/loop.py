"""Time per sampling step beyond the network, against diffusers, on the same noise predictions.

    python benchmarks/loop.py [--check] [--rounds 15] [--threads 1]

The network is a callable that returns one preallocated tensor, the same for both; its own cost is subtracted. Ours is the
whole path of a user: `Preconditioned` with the embedding of a pretrained table, the transition, the loop. Theirs is the loop
of `DDIMPipeline` and `DDPMPipeline`: the network, `scheduler.step(...).prev_sample`. Both networks get one time per example.
With one thread, the default, the clock is the processor's, which neighbours on the machine hardly disturb; with more threads
it is the wall's. With --check the exit status says whether every ratio of the least times is at most 0.5: neighbours only add.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common import Timing, header, interleaved
from quieten import Ancestral, Exponential, Preconditioned, Table, Transition, sample

__all__ = ["main"]

BAR = 0.5
STEPS = 50
HEAP = 7_000_000
"""Floats of a tensor that is allocated and freed first, as the activations of any real network are. Without it malloc gives the
memory of a step back to the system and faults it in again in the next, or does not, by chance of the layout, on either side."""
SHAPES = ((4, 3, 256, 256), (64, 1, 28, 28))
BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


class Frozen(nn.Module):
    """A network of no cost: the same prediction whatever the state."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.out = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out


def ours(transition: Transition, net: nn.Module, x: Tensor, spacing: str) -> Callable[[], Tensor]:
    table = Table.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    denoiser = Preconditioned(net, form="eps", embed=table).eval()
    grid = table.grid(STEPS, spacing)
    return lambda: sample(denoiser, x, grid, transition)


def theirs(name: str, net: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    options: dict[str, Any]
    if name == "DDIM":
        scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading")
        options = {"eta": 0.0, "use_clipped_model_output": None, "generator": None}
    else:
        scheduler = DPMSolverMultistepScheduler(**BETAS, final_sigmas_type="zero", timestep_spacing="linspace")
        options = {"generator": None}

    @torch.no_grad()
    def run() -> Tensor:
        scheduler.set_timesteps(STEPS)
        state = x
        for t in scheduler.timesteps:
            prediction = net(state, t.expand(len(state)))
            state = scheduler.step(prediction, t, state, **options).prev_sample
        return state

    return run


def measure(name: str, shape: tuple[int, ...], rounds: int) -> tuple[dict[str, Timing], float]:
    """Timings of both loops and of the network alone, and the largest difference of their results, relative."""
    transition, spacing = (Ancestral(0.0, spread=False), "leading") if name == "DDIM" else (Exponential(2), "linspace")
    net, x = Frozen(shape), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.empty(HEAP)
    t = torch.zeros(len(x))

    def network() -> None:
        for _ in range(STEPS):
            net(x, t)

    a, b = ours(transition, net, x, spacing), theirs(name, net, x)
    with torch.no_grad():
        difference = float((a() - b()).abs().max() / b().abs().max())
    rounds *= 1 + 2_000_000 // (10 * x.numel())  # more for small states, whose runs are short
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    return interleaved({"ours": a, "theirs": b, "network": network}, rounds, clock=clock), difference


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help=f"fail unless every ratio is at most {BAR}")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    print(header("diffusers"))
    print(f"ms per step beyond the network, {STEPS} steps, float32, least (median) of interleaved rounds")
    print(f"{'method':<10}{'state':<14}{'quieten':>16}{'diffusers':>16}{'ratio':>8}{'of medians':>12}{'difference':>12}")
    worst = 0.0
    for shape in SHAPES:
        for name in ("DDIM", "DPM++ 2M"):
            timings, difference = measure(name, shape, args.rounds)
            free = timings.pop("network")
            median = {who: 1e3 * (timing.median - free.median) / STEPS for who, timing in timings.items()}
            least = {who: 1e3 * (timing.least - free.least) / STEPS for who, timing in timings.items()}
            ratio = least["ours"] / least["theirs"]
            worst = max(worst, ratio)
            cells = [f"{least[who]:.3f} ({median[who]:.3f})" for who in ("ours", "theirs")]
            print(f"{name:<10}{'x'.join(map(str, shape)):<14}{cells[0]:>16}{cells[1]:>16}{ratio:>8.2f}"
                  f"{median['ours'] / median['theirs']:>12.2f}{difference:>12.1e}")  # fmt: skip
    print(f"worst ratio {worst:.2f}, bar {BAR}: {'met' if worst <= BAR else 'missed'}")
    return int(args.check and worst > BAR)


if __name__ == "__main__":
    raise SystemExit(main())
