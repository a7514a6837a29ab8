"""Inpainting and 4x super-resolution of Fashion-MNIST with the unconditional model: the table in docs/results/splitting.md.

python benchmarks/splitting_restore.py [--n 100] [--grid FOLDER]

Test images lose their middle (16x16 of 28x28 pixels) or are averaged over boxes of 4x4, noise of standard deviation 0.02 is
added, and the model fills in. `off y` is the root mean square of y - H x; PSNR is against the lost image, which no sample needs
to equal; the class is judged by the classifier of clean images, which gets 92.5 % of whole test images right.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from common import header
from quieten.covariances.stored import load_variance
from quieten.data import load
from quieten.denoiser import Denoiser
from quieten.guidance import Guided
from quieten.guiding.measurements import Consistent, Downsample, Mask, Measured, Operator
from quieten.guiding.splits import SPLITS, split
from quieten.nets import Classifier
from quieten.noise import Noise
from quieten.reports.plots import save_grid
from quieten.sampling import generate
from quieten.solvers.samplers import sampler
from quieten.training.source import open_source
from quieten.transition import Transition
from quieten.wrap import Clipped, Counted, WithCovariance

STD = 0.02
Method = Callable[[Denoiser, Operator, Tensor], tuple[Denoiser, Transition]]
ANY = torch.tensor([0.0, 1.0])  # a grid, where only the transition of a name is wanted


def follow(name: str, **options: object) -> Method:
    """A measurement as guidance, joint or split by the name of the sampler."""

    def made(net: Denoiser, operator: Operator, y: Tensor) -> tuple[Denoiser, Transition]:
        guidance = Measured(operator, y, **{"std": STD, **options})  # type: ignore[arg-type]
        if name in SPLITS:
            return net, split(name, guidance)
        return Guided(net, guidance), sampler(name, ANY)[0]

    return made


def consistent(net: Denoiser, operator: Operator, y: Tensor) -> tuple[Denoiser, Transition]:
    """The estimate projected on what was measured, noise and all."""
    return Consistent(net, operator, y), sampler("dpm++", ANY)[0]


METHODS: dict[str, tuple[Method, int]] = {
    "covariance of unit data, dpm++": (follow("dpm++"), 20),
    "the same in 10 steps": (follow("dpm++"), 10),
    "the same, ancestral noise": (follow("ddpm"), 20),
    "the same, split: additive": (follow("additive"), 20),
    "the same, split: merged": (follow("merged"), 20),
    "the same, split: strang": (follow("strang"), 20),
    "learned covariance (ocm), dpm++": (follow("dpm++"), 20),
    "back through the network, dpm++": (follow("dpm++", variance=1.0, jacobian="backward"), 20),
    "learned covariance, back through the network, dpm++": (follow("dpm++", jacobian="backward"), 20),
    "DPS: back, D for certain, std 0.3, ddim": (follow("ddim", std=0.3, variance=0.0, jacobian="backward"), 100),
    "projected estimate (DDNM), dpm++": (consistent, 20),
}


def main(n: int, grid: Path | None) -> None:
    opened = open_source("zoo:fashion-mnist", device="cpu")
    learned = WithCovariance(opened.denoiser, load_variance(opened.variances, "ocm", opened.denoiser))
    judge = Classifier()
    weights = Path(__file__).parents[1] / "src" / "quieten" / "zoo" / "classifiers" / "fashion-mnist.safetensors"
    judge.load_state_dict({k: v.float() for k, v in load_file(weights).items()})
    judge.eval()
    test = load("fashion-mnist", split="test")
    x0, label = test.batch(torch.arange(n))
    assert label is not None
    mask = torch.ones(1, 1, 28, 28)
    mask[..., 6:22, 6:22] = 0
    print(header())
    print(f"{n} test images, x0 clipped to [-1, 1], seed 0")
    for task, operator in (("inpainting", Mask(mask)), ("4x super-resolution", Downsample(4))):
        clean = operator(x0)
        noise = Noise(0, range(n)).normal(clean, 0, "measurement")
        y = operator(operator.pinv(clean + STD * noise, x0))  # no noise where nothing is measured
        print(f"\n| {task} | steps | evaluations | seconds | off y | PSNR, dB | class right |\n|---|---|---|---|---|---|---|")
        shown = [x0[:12], operator.pinv(y, x0)[:12]]
        report("what was measured", 0, 0, 0.0, operator.pinv(y, x0), operator, y, x0, judge, label)
        for name, (method, steps) in METHODS.items():
            counted = Counted(learned if name.startswith("learned") else opened.denoiser)
            bound = Clipped(counted).bind(label=torch.full((n,), len(test.classes)))
            model, transition = method(bound, operator, y)
            started = time.process_time()
            x = generate(model, n, grid=opened.grid(steps, None), transition=transition, batch=n, shape=(1, 28, 28))
            report(name, steps, counted.calls, time.process_time() - started, x, operator, y, x0, judge, label)
            if name in ("covariance of unit data, dpm++", "back through the network, dpm++"):
                shown.append(x[:12])
        if grid is not None:
            save_grid(torch.cat(shown), grid / f"splitting-{task.split()[-1]}.png", columns=12, scale=2)


def report(
    name: str, steps: int, calls: int, seconds: float, x: Tensor, operator: Operator, y: Tensor, x0: Tensor,
    judge: Classifier, label: Tensor,
) -> None:  # fmt: skip
    off = (operator(x) - y).square().sum() / operator(torch.ones_like(x0)).gt(0).sum()
    psnr = 10 * math.log10(4.0 / float((x.clamp(-1, 1) - x0).square().mean()))
    with torch.no_grad():
        right = float((judge(x.clamp(-1, 1)).argmax(1) == label).float().mean())
    cost = f"{steps or ''} | {calls or ''} | {seconds:.1f}"
    print(f"| {name} | {cost} | {float(off) ** 0.5:.3f} | {psnr:.1f} | {right:.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--grid", type=Path, help="folder for pictures")
    parser.add_argument("--threads", type=int, default=1)
    options = vars(parser.parse_args())
    torch.set_num_threads(options.pop("threads"))
    main(**options)
