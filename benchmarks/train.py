"""Training: our loop against diffusers' on one network, and our network against theirs in our loop.

    python benchmarks/train.py [--check] [--quick] [--threads 2] [--only loop speed quality]

loop     Images/s of `quieten.fit` over images/s of what diffusers' unconditional example does (accelerate, DDPMScheduler,
         AdamW, EMAModel, clipping, learning-rate schedule, loss and progress at every step), on the same UNet2DModel, batch,
         precision and threads. Both are complete: keyed noise, averaged weights and metrics on our side, shuffled DataLoader
         and tqdm on theirs. They take turns of some steps within one run; the ratio is of the least times.
speed    Images/s of whole training steps in our loop, of our compact U-Net over UNet2DModels of equal parameter count.
quality  Both networks trained with one recipe on as many images of Fashion-MNIST, then their v-weighted loss on test images, at
         the same levels with the same noise. Started again, it goes on from the last checkpoint in --out.

With --check the exit status says whether the ratios of `loop` and `speed` reach their bars.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common import Timing, header
from quieten.data import Dataset, load
from quieten.denoiser import Denoiser
from quieten.fit import fit
from quieten.nets import UNet
from quieten.noise import Draws
from quieten.objective import Batch, Denoising
from quieten.schedule import Cosine
from quieten.training import parts
from quieten.training.config import Recipe, load_recipe, parse_recipe, resolve
from quieten.training.runs import Run

__all__ = ["main"]

PARTS = ("loop", "speed", "quality")
LOOP_BAR, SPEED_BAR, EQUAL = 1.0, 3.0, 0.05
COMPACT: dict[str, Any] = {"kind": "unet"}
COMMON: dict[str, Any] = {"kind": "unet2d", "widths": [32, 64, 128]}
"""The network of `loop`."""
EQUALS: dict[str, dict[str, Any]] = {
    "UNet2DModel 32,32,64": {"kind": "unet2d", "widths": [32, 32, 64]},
    "UNet2DModel 16,48,64": {"kind": "unet2d", "widths": [16, 48, 64], "groups": 16},
}
"""Networks as large as our default, with attention at the coarsest level as it has. The first keeps the other defaults of
diffusers, two layers to a block and groups of 32: the bar is for it. The second is thin at full resolution, as ours is, hence
cheaper; it is shown without a bar."""


# ---- the networks


class Indexed(nn.Module):
    """A UNet2DModel as our library calls networks: its time is the index in the table that it would be pretrained on."""

    def __init__(self, net: UNet2DModel):
        super().__init__()
        self.net, self.table = net, parts.beta_table()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x, self.table.index(-8.0 * t), return_dict=False)[0]  # recipes give networks t = -lam / 8


def unet2d(channels: int, size: int, widths: tuple[int, ...], layers: int = 2, groups: int = 32) -> Indexed:
    """A UNet2DModel with attention at the coarsest level."""
    plain = len(widths) - 1
    net = UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=layers,
        down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
        norm_num_groups=groups,
    )
    return Indexed(net)


parts.register("net", "unet2d", unet2d)


def build_net(net: dict[str, Any]) -> Any:
    """The network of a recipe's section for 1x28x28."""
    options = {name: value for name, value in net.items() if name != "kind"}
    return parts.build("net", net["kind"], options, channels=1, size=28, classes=0)


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def mflop(net: nn.Module) -> float:
    """Of one forward pass of one image; a multiply-add counts 2."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 1, 28, 28), torch.zeros(1))
    return counter.get_total_flops() / 1e6


# ---- the loops


def clock() -> float:
    """Seconds: of the processor with one thread of torch, which neighbours hardly disturb, else of the wall."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def laps(recipe: Recipe, data: Dataset, between: Callable[[], object] = lambda: None) -> Timing:
    """Trains a new run; the seconds from each line of metrics to the next, the first one being the warm-up.

    Arguments:
        recipe: What to train.
        data: What on.
        between: Called after every line of metrics, outside the timing.
    """
    times, start = Timing(), clock()

    def lap(_: object) -> None:
        nonlocal start
        times.append(clock() - start)
        between()
        start = clock()

    with tempfile.TemporaryDirectory() as folder, silence():
        run = Run.create(Path(folder) / "run", resolve(recipe, data))
        if not fit(run, data=data, callbacks=[lap]).done:  # it took the signal for itself
            raise KeyboardInterrupt
    return Timing(times[1:])


def recipe_of(net: dict[str, Any], batch: int, steps: int, turns: int) -> Recipe:
    """What diffusers' example trains, as a recipe: eps at the levels of DDPM, unweighted, AdamW. Metrics end each turn."""
    return parse_recipe(
        {
            "version": 1,
            "name": "benchmark",
            "data": {"name": "noise"},
            "model": {"net": net, "form": "eps"},
            "objective": {"schedule": "table", "weighting": "simple"},
            "train": {
                "images": (1 + turns) * steps * batch, "batch": batch, "log_every": steps, "optimizer": "adamw", "lr": 1e-4,
                "betas": [0.95, 0.999], "weight_decay": 1e-6, "precision": "fp32", "save_minutes": None, "previews": 1,
            },
            "sample": {"steps": 1},
        },
        "benchmark",
    )  # fmt: skip


def diffusers_steps(net: Any, images: Tensor, batch: int) -> Iterator[None]:
    """The training loop of diffusers' example of unconditional generation, for ever; pauses after each step.

    Kinder to it than it is: the images are decoded and normalised beforehand, and no tracker receives the logs.
    """
    from accelerate import Accelerator
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from torch.utils.data import DataLoader, TensorDataset
    from tqdm.auto import tqdm

    accelerator = Accelerator(mixed_precision="no", gradient_accumulation_steps=1)
    noising = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    rate = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=500, num_training_steps=100_000)
    loader = DataLoader(TensorDataset(images), batch_size=batch, shuffle=True, drop_last=True)
    net, optimizer, loader, rate = accelerator.prepare(net, optimizer, loader, rate)
    ema = EMAModel(net.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    net.train()
    step, bar = 0, tqdm()
    while True:
        for (clean,) in loader:
            noise = torch.randn(clean.shape, device=clean.device)
            index = torch.randint(0, noising.config.num_train_timesteps, (len(clean),), device=clean.device).long()
            noisy = noising.add_noise(clean, noise, index)
            with accelerator.accumulate(net):
                loss = nn.functional.mse_loss(net(noisy, index).sample.float(), noise.float())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                rate.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                ema.step(net.parameters())
                bar.update(1)
                step += 1
            logs = {"loss": loss.detach().item(), "lr": rate.get_last_lr()[0], "step": step, "ema_decay": ema.cur_decay_value}
            bar.set_postfix(**logs)
            accelerator.log(logs, step=step)
            yield


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Progress bars still format their lines; nobody sees them."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def noise_images(n: int = 4096) -> Dataset:
    """Grey pictures to train on where only time matters: uint8, as image sets are."""
    generator = torch.Generator().manual_seed(0)
    return Dataset("noise", torch.randint(0, 256, (n, 1, 28, 28), dtype=torch.uint8, generator=generator), None, ())


# ---- what is measured


def compare_loops(batch: int, steps: int, turns: int) -> float:
    """Prints both loops' images/s, returns ours over theirs."""
    data = noise_images()
    theirs, other = Timing(), diffusers_steps(build_net(COMMON).net, data.all(), batch)

    def turn() -> None:
        start = clock()
        for _ in range(steps):
            next(other)
        theirs.append(clock() - start)

    ours = laps(recipe_of(COMMON, batch, steps, turns), data, turn)
    theirs = Timing(theirs[1:])
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    ratio, low, high = theirs.least / ours.least, ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    net = build_net(COMMON)
    print(f"loop: UNet2DModel {COMMON['widths']}, {parameters(net) / 1e6:.2f} M parameters, {mflop(net):.0f} MFLOP a forward, "
          f"batch {batch}, float32, {turns} turns of {steps} steps each")  # fmt: skip
    for name, timing in (("quieten.fit", ours), ("diffusers", theirs)):
        print(f"    {name:<24}{steps * batch / timing.least:>8.1f} images/s, median {steps * batch / timing.median:.1f}")
    print(f"    ratio {ratio:.3f} (quartiles of turns {low:.3f} to {high:.3f}), bar {LOOP_BAR}: {_verdict(ratio, LOOP_BAR)}",
          flush=True)  # fmt: skip
    return ratio


def compare_networks(batch: int, steps: int, rounds: int) -> float:
    """Prints each network's images/s, returns that of ours over that of the first of `EQUALS`."""
    data, nets = noise_images(), {"quieten UNet": COMPACT, **EQUALS}
    times = {name: Timing() for name in nets}
    for _ in range(rounds):
        for name, net in nets.items():
            times[name].extend(laps(recipe_of(net, batch, steps, 1), data))
    print(f"speed: whole training steps, batch {batch}, float32, least of {rounds} rounds of {steps} steps")
    print(f"    {'network':<24}{'parameters':>12}{'MFLOP':>8}{'images/s':>10}{'ours over it':>14}")
    ours, ratios = times["quieten UNet"].least, []
    for name, net in nets.items():
        built, least = build_net(net), times[name].least
        _check_size(built)
        ratios.append(least / ours)
        print(f"    {name:<24}{parameters(built):>12,}{mflop(built):>8.0f}{steps * batch / least:>10.1f}{ratios[-1]:>14.2f}")
    ratio = ratios[1]
    print(f"    ratio to the first {ratio:.2f}, bar {SPEED_BAR}: {_verdict(ratio, SPEED_BAR)}", flush=True)
    return ratio


def compare_quality(images: int, tests: int, batch: int, out: Path) -> None:
    """Trains both networks on as many images and prints their losses on test images."""
    name, net = next(iter(EQUALS.items()))
    try:
        test = load("fashion-mnist", split="test", labels=False)
    except ValueError as error:
        print(f"quality: left out, {error}")
        return
    losses = {}
    print(f"quality: recipe fashion-mnist without classes, batch {batch}, {images:,} images each; v-weighted loss of the "
          f"averaged weights on {tests:,} test images, same levels and noise")  # fmt: skip
    for title, section in (("quieten UNet", COMPACT), (name, net)):
        run = _quality_run(out / f"{section['kind']}-{images}", section, images, batch)
        summary = fit(run)
        if not summary.done:
            raise KeyboardInterrupt
        losses[title] = validation_losses(run.denoiser(), test, tests)
        mean, spread = _mean(losses[title])
        print(
            f"    {title:<24}{mean:.4f} +- {spread:.4f} after {summary.images:,} images in {summary.seconds:.0f} s", flush=True
        )
    ours, theirs = losses.values()
    mean, spread = _mean(theirs - ours)
    print(f"    {name} minus ours, example by example: {mean:+.4f} +- {spread:.4f}", flush=True)


@torch.no_grad()
def validation_losses(denoiser: Denoiser, test: Dataset, count: int) -> Tensor:
    """v-weighted losses (count,) of the first test images, one level each: the same levels and noise for every denoiser."""
    objective = Denoising(Cosine(lam_max=10.0, lam_min=-10.0), "v")
    losses = []
    for index in torch.arange(count).split(200):
        x0, _ = test.batch(index)
        losses.append(objective(denoiser, Batch(x0, index, {}), Draws(0, 0, index, total=count)))
    return torch.cat(losses).double()


def _quality_run(path: Path, net: dict[str, Any], images: int, batch: int) -> Run:
    if (path / "config.yaml").exists():
        return Run.open(path)
    content = load_recipe("fashion-mnist").model_dump(mode="json")
    content["data"]["labels"], content["model"]["net"] = False, net
    content["train"] |= {"images": images, "batch": batch, "warmup": images // 10, "preview_every": None, "save_minutes": 1}
    recipe = parse_recipe(content, "benchmark")
    return Run.create(path, resolve(recipe, load("fashion-mnist", labels=False)))


def _check_size(net: nn.Module) -> None:
    ours = parameters(UNet(1, 28))
    if abs(parameters(net) - ours) > EQUAL * ours:
        raise ValueError(f"a network of {parameters(net):,} parameters is no match for our {ours:,}: change EQUALS")


def _mean(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error."""
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def _verdict(ratio: float, bar: float) -> str:
    return "met" if ratio >= bar else "missed"


def main(
    only: Sequence[str] = PARTS,
    quick: bool = False,
    threads: int | None = None,
    quality_images: int | None = None,
    out: Path = Path("runs/benchmark"),
) -> bool:
    """Prints what `only` names; returns whether every bar was reached.

    Arguments:
        only: Some of `PARTS`.
        quick: Fewer turns and images, to see that it works.
        threads: Of torch; None leaves torch's choice.
        quality_images: Images to train on in `quality`; 0 leaves it out, None is 50,000 (2,000 when quick).
        out: Folder for the runs of `quality`.
    """
    if threads:
        torch.set_num_threads(threads)
    if quality_images is None:
        quality_images = 2_000 if quick else 50_000
    print(header("accelerate", "diffusers"), flush=True)
    met = True
    if "loop" in only:
        met &= compare_loops(batch=16, steps=5 if quick else 20, turns=4 if quick else 10) >= LOOP_BAR
    if "speed" in only:
        met &= compare_networks(batch=64, steps=2 if quick else 5, rounds=2 if quick else 5) >= SPEED_BAR
    if "quality" in only and quality_images:
        compare_quality(quality_images, 1_000 if quick else 10_000, 64, out)
    return met


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if a bar is missed")
    parser.add_argument("--quick", action="store_true", help="fewer turns and images, to see that it works")
    parser.add_argument("--threads", type=int, help="of torch; default: torch's own choice")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--quality-images", type=int, help="default 50,000, or 2,000 with --quick; 0 leaves quality out")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="folder for the runs of quality")
    args = vars(parser.parse_args())
    check = args.pop("check")
    raise SystemExit(int(not main(**args) and check))
