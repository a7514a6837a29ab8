"""What learning and using a reverse covariance costs, in passes of the network.

Run `python benchmarks/ocm.py --threads 1`. All cases take turns, so that other load disturbs them equally; least CPU time of
the rounds, in units of one pass of the network without gradients. The named alternative is the form of the released code: a
graph that is kept for a second backward pass through the whole network, and an average of all weights.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from copy import deepcopy

import torch
from torch import nn

from common import header, interleaved
from quieten.covariance import HessianDiagonal, Residual
from quieten.covariances.heads import Simple, make_head
from quieten.covariances.matching import CovarianceMatching
from quieten.denoiser import Preconditioned
from quieten.interop.network import Network
from quieten.noise import Draws
from quieten.objective import Batch
from quieten.process import VP
from quieten.schedule import Table
from quieten.transition import Ancestral
from quieten.wrap import WithCovariance

BARS = {"ocm step, vjp": 2.7, "ocm step, fd": 2.2}
SAMPLING_BAR = 1.05


def network() -> Preconditioned:
    """A U-Net of diffusers like those of Improved DDPM, small: 32 channels, 32x32 RGB, attention of 4 heads at 16 and 8."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=32,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=2,
        attention_head_dim=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    table = Table.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    return Preconditioned(Network(model), VP, "eps", table, shape=(3, 32, 32)).eval().requires_grad_(False)


def retained(denoiser: Preconditioned, x0: torch.Tensor) -> Callable[[], None]:
    """The released form of a training step, on the same network and head."""
    model: nn.Module = deepcopy(denoiser.net.model)  # type: ignore[assignment, union-attr]
    head = Simple(32, 3)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-4)
    everything = [*model.parameters(), *head.parameters()]
    average = [p.detach().clone() for p in everything]
    features: list[torch.Tensor] = []
    model.conv_norm_out.register_forward_pre_hook(lambda module, given: features.append(given[0]))  # type: ignore[operator, union-attr]

    def step() -> None:
        features.clear()
        x = (0.5 * x0 + 0.8 * torch.randn_like(x0)).requires_grad_()
        v = torch.randint(0, 2, x.shape) * 2.0 - 1.0
        eps = model(x, torch.full((len(x),), 500), return_dict=False)[0]
        (u,) = torch.autograd.grad(eps, x, v, retain_graph=True)
        loss = (head(features[0]) + 0.8 * v * u.detach()).square().sum() + (eps - x0).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, [p.detach() for p in everything], 1e-4)

    return step


def training(denoiser: Preconditioned, x0: torch.Tensor, kind: type, **options: object) -> Callable[[], None]:
    source = kind(make_head(denoiser, "simple"))
    objective = CovarianceMatching(source, Table(denoiser.embed.__self__.lam), **options)  # type: ignore[attr-defined, arg-type]
    optimizer = torch.optim.Adam(source.parameters(), lr=1e-4)
    average = [p.detach().clone() for p in source.parameters()]
    steps = iter(range(10**9))

    def step() -> None:
        batch = Batch(x0, torch.arange(len(x0)), {})
        objective(denoiser, batch, Draws(0, next(steps), range(len(x0)))).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, [p.detach() for p in source.parameters()], 1e-4)

    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--check", action="store_true", help="exit 1 if a bar is not met")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    denoiser = network()
    x0 = torch.randn(options.batch, 3, 32, 32)
    source = HessianDiagonal(make_head(denoiser, "simple"), link="unit", cap=1.0)
    spread = WithCovariance(denoiser, source)

    def sampling(model: object, transition: Ancestral) -> Callable[[], None]:
        @torch.no_grad()
        def step() -> None:
            p = transition(model, x0, -1.0, 0.5).p  # type: ignore[arg-type]
            p.sample(torch.randn_like(x0))

        return step

    @torch.no_grad()
    def forward() -> None:
        denoiser(x0, -1.0)

    cases: dict[str, Callable[[], None]] = {
        "network": forward,
        "sampling step without head": sampling(denoiser, Ancestral(spread=False)),
        "sampling step with head": sampling(spread, Ancestral()),
        "sn or npr step": training(denoiser, x0, Residual),
        "ocm step, vjp": training(denoiser, x0, HessianDiagonal, derivative="vjp"),
        "ocm step, fd": training(denoiser, x0, HessianDiagonal, derivative="fd"),
        "ocm step, graph retained": retained(denoiser, x0),
    }
    times = interleaved(cases, options.rounds, clock=time.process_time)
    print(header("diffusers"))
    size = sum(p.numel() for p in denoiser.parameters()), sum(p.numel() for p in source.parameters())
    print(f"network of {size[0]:,} parameters, head of {size[1]:,}; batch {options.batch} of 3x32x32, {options.rounds} rounds")
    unit, failed = times["network"].least, []
    for name, timing in times.items():
        ratio = timing.least / unit
        bar = BARS.get(name)
        failed += [name] if bar is not None and ratio > bar else []
        told = "" if bar is None else f"  at most {bar}: {'ok' if ratio <= bar else 'MISSED'}"
        print(f"{name:28s} {1e3 * timing.least:8.1f} ms  {ratio:5.2f} passes{told}")
    ratio = times["sampling step with head"].least / times["sampling step without head"].least
    failed += ["sampling"] if ratio > SAMPLING_BAR else []
    print(f"sampling with head / without: {ratio:.3f}, at most {SAMPLING_BAR}: {'ok' if ratio <= SAMPLING_BAR else 'MISSED'}")
    return 1 if options.check and failed else 0


if __name__ == "__main__":
    sys.exit(main())
