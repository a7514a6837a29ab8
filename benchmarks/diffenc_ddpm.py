"""The likelihood of a DDPM that was trained with diffusers alone, by all three estimators side by side.

    python benchmarks/diffenc_ddpm.py FOLDER [--images 64000] [--n 64] [--threads 1]

Trains a small UNet2DModel with a DDPMScheduler on Fashion-MNIST, in plain diffusers code, and saves the pipeline in FOLDER
(what is there already is not trained again). Then runs what the command line runs, `quieten nll FOLDER fashion-mnist`, with the
bound in steps for several reverse variances, the bound in continuous time, and the likelihood of the ODE, on the same test
images, chosen by the seed. Each result stays in FOLDER/nll, and is read from there.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from common import header
from quieten.commands.nll import nll
from quieten.data import load

__all__ = ["main"]

BATCH = 128


def learn(folder: Path, images: int) -> None:
    """The training loop of diffusers' own examples: noise prediction, Adam, averaged weights."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_cosine_schedule_with_warmup
    from diffusers.training_utils import EMAModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=28, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(24, 48, 48), norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    scheduler, steps = DDPMScheduler(num_train_timesteps=1000), images // BATCH
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, weight_decay=0.0)
    rate = get_cosine_schedule_with_warmup(optimizer, 100, steps)
    average = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, power=0.75)
    pictures = load("fashion-mnist").all()
    began, total = time.monotonic(), 0.0
    for step in range(steps):
        x0 = pictures[torch.randint(len(pictures), (BATCH,))]
        noise, t = torch.randn_like(x0), torch.randint(1000, (BATCH,))
        loss = torch.nn.functional.mse_loss(unet(scheduler.add_noise(x0, noise, t), t).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        average.step(unet.parameters())
        total += loss.item()
        if (step + 1) % 100 == 0:
            print(f"{(step + 1) * BATCH:,} images, loss {total / 100:.4f}, {time.monotonic() - began:.0f} s", flush=True)
            total = 0.0
    average.copy_to(unet.parameters())
    DDPMPipeline(unet, scheduler).save_pretrained(folder)


def measure(folder: Path, n: int, steps: int, path: int) -> list[tuple[str, dict[str, Any]]]:
    """Every estimator on the same images."""
    cases: dict[str, dict[str, Any]] = {
        **{f"50 steps, variance {v}": {"steps": 50, "variance": v} for v in ("small", "big", "optimal")},
        "50 chosen steps, variance optimal": {"steps": 50, "variance": "optimal", "bound_grid": "optimal"},
        "continuous time": {"estimator": "continuous", "draws": 64},
        f"ODE, {path} steps": {"estimator": "ode", "steps": path},
        f"{steps} steps, variance optimal": {"steps": steps, "variance": "optimal"},
    }
    found = []
    for name, options in cases.items():
        out = folder / "nll" / f"{name.replace(', ', '-').replace(' ', '-')}-{n}.json"
        out.parent.mkdir(exist_ok=True)
        if not out.is_file():
            nll(str(folder), "fashion-mnist", n=n, out=out, fit=64, batch=n, **options)
        found.append((name, json.loads(out.read_text())))
    return found


def table(found: list[tuple[str, dict[str, Any]]]) -> None:
    print("\n| bits/dim | n | prior | diffusion | reconstruction | total |\n|---|---|---|---|---|---|")
    for name, result in found:
        cells = []
        for term in ("prior", "diffusion", "reconstruction", "total"):
            row = result["terms"].get(term)
            cells.append("" if row is None else f"{row['bits/dim']:.4f} ± {row['bits/dim_se']:.4f}")
        print(f"| {name} | {result['protocol']['n']} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=64_000, help="to train on")
    parser.add_argument("--n", type=int, default=64, help="test images")
    parser.add_argument("--steps", type=int, default=1000, help="of the finest bound")
    parser.add_argument("--path", type=int, default=30, help="steps of the ODE")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(header("diffusers"), flush=True)
    if not (args.folder / "model_index.json").is_file():
        learn(args.folder, args.images)
    table(measure(args.folder, args.n, args.steps, args.path))


if __name__ == "__main__":
    main()
