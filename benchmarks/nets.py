"""Size, cost and speed of the default networks, beside a diffusers U-Net of about the same number of parameters.

    OMP_NUM_THREADS=2 python benchmarks/nets.py [--batch 64] [--seconds 3]

MFLOP counts 2 per multiply-add of one forward pass of one image; images/s are of forward plus backward in float32.
The last column is our speed over that of UNet2DModel, both measured in alternation in the same run.
"""

import argparse
import time
from collections.abc import Callable

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from quieten.nets import UNet

Call = Callable[[Tensor, Tensor], Tensor]

# shape of an image -> block_out_channels of the diffusers network that has about as many parameters as our default
CASES = {(1, 8, 8): (48, 80), (1, 28, 28): (32, 64, 64), (3, 32, 32): (32, 64, 64)}


def diffusers_net(shape: tuple[int, int, int], widths: tuple[int, ...]) -> UNet2DModel:
    plain = len(widths) - 1
    return UNet2DModel(
        sample_size=shape[1],
        in_channels=shape[0],
        out_channels=shape[0],
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
        norm_num_groups=16,
    )


def mflop(call: Call, shape: tuple[int, int, int]) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call(torch.zeros(1, *shape), torch.zeros(1))
    return counter.get_total_flops() / 1e6


def speeds(calls: list[Call], shape: tuple[int, int, int], batch: int, seconds: float) -> list[float]:
    """Images/s of each call, the best of rounds taken in turn, so that a busy machine disturbs all alike."""
    x, t = torch.randn(batch, *shape), torch.linspace(-3, 3, batch)
    best = [float("inf")] * len(calls)
    end = time.perf_counter() + seconds * len(calls)
    rounds = 0
    while time.perf_counter() < end or rounds < 3:
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call(x, t).square().mean().backward()
            best[i] = min(best[i], time.perf_counter() - start)
        rounds += 1
    return [batch / b for b in best]


def main(batch: int = 64, seconds: float = 3.0) -> None:
    print(f"batch {batch}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'image':>12} {'network':>12} {'params':>8} {'MFLOP':>6} {'images/s':>9} {'ratio':>6}")
    for shape, widths in CASES.items():
        torch.manual_seed(0)
        ours, theirs = UNet(shape[0], shape[1]), diffusers_net(shape, widths)
        calls: list[Call] = [ours, lambda x, t, net=theirs: net(x, t).sample]
        rates = speeds(calls, shape, batch, seconds)
        networks: list[tuple[str, nn.Module]] = [("UNet", ours), ("UNet2DModel", theirs)]
        for (name, net), call, rate in zip(networks, calls, rates, strict=True):
            size = sum(p.numel() for p in net.parameters()) / 1e6
            image = "x".join(map(str, shape))
            print(f"{image:>12} {name:>12} {size:7.2f}M {mflop(call, shape):6.0f} {rate:9.0f} {rate / rates[1]:6.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3.0)
    args = parser.parse_args()
    main(args.batch, args.seconds)
