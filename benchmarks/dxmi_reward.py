"""Tuning to a reward on Fashion-MNIST: what a reward costs in distance from the reference.

    python benchmarks/dxmi_reward.py brightness --taus 0.3,0.1,0.03 --threads 1 --plot reward-brightness.png
    python benchmarks/dxmi_reward.py class:Bag --taus 3,1 --threads 1 --plot reward-bag.png
    python benchmarks/dxmi_reward.py brightness --taus 0.1 --blind                      # the reward is not differentiated
    python benchmarks/dxmi_reward.py brightness --source zoo:fashion-mnist --value encoder --batch 32 --out policy/fashion-mnist

A four-step policy of a model is tuned for each tau from the same start. The model is a perceptron of Fashion-MNIST averaged
down to 14x14, trained first, in a minute; or another by `--source`. `brightness` is the mean of the pixels, labels in turn;
`class:NAME` is log p(NAME | x) of the classifier that comes with the library, the model asked without a label. Distance from
the reference: nats along the trajectory, and the Frechet distance between both sets of samples, of the same labels and noise.
Rows of the picture: the reference, then each tau, from the same noise. `--results` keeps what was measured, `--out` the
policies.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import header
from quieten.covariances.stored import fingerprint
from quieten.data import Order, load
from quieten.denoiser import Preconditioned
from quieten.files import write_atomic
from quieten.guiding.classify import NoisyClassifier
from quieten.metrics import frechet
from quieten.metrics.features import Extractor
from quieten.networks.mlp import MLP
from quieten.noise import Draws, Noise
from quieten.objective import Batch, Denoising
from quieten.process import VP
from quieten.reports.plots import save_grid
from quieten.schedule import Cosine
from quieten.training.source import Source, open_source
from quieten.tuning.borrowed import EncoderValue
from quieten.tuning.energies import PerceptronValue
from quieten.tuning.policy import Policy
from quieten.tuning.reward import RewardTuning, reward_settings, tune_to_reward
from quieten.tuning.stored import save_policy
from quieten.tuning.tune_start import few_grid

T = 4


def small(steps: int = 2000, batch: int = 128, seed: int = 0) -> Source:
    """A class-conditional perceptron of Fashion-MNIST at 14x14, a tenth of the labels dropped."""
    data = load("fashion-mnist")
    x, labels = F.avg_pool2d(data.all(), 2), data.labels
    assert labels is not None
    torch.manual_seed(seed)
    denoiser = Preconditioned(MLP((1, 14, 14), 256, 3, classes=10), VP, "v", shape=(1, 14, 14))
    objective, order = Denoising(Cosine(), weighting="v", drop={"label": (0.1, 10)}), Order(len(x), batch, seed)
    optimizer = torch.optim.Adam(denoiser.parameters(), 2e-3, fused=True)
    cycle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        index = order.indices(step)
        loss = objective(denoiser, Batch(x[index], index, {"label": labels[index]}), Draws(seed, step, range(batch))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
    return Source(denoiser.eval(), lambda steps, spacing: few_grid(steps), Path(), data.classes, {"label": 10})


def full(x: Tensor) -> Tensor:
    """Pictures of 28x28, which classifiers and extractors were made for."""
    return F.interpolate(x, 28, mode="bilinear") if x.shape[-1] != 28 else x


def reward_of(name: str, source: Source) -> tuple[Callable[..., Tensor], Callable[[int, int], Tensor]]:
    """The reward, and from (first index, number) the labels that samples are drawn with."""
    if name == "brightness":
        return lambda x, **cond: x.flatten(1).mean(1), lambda first, n: torch.arange(first, first + n) % len(source.classes)
    wanted = name.removeprefix("class:")
    if wanted not in source.classes:
        raise ValueError(f"`reward` {name!r} must be brightness or class:NAME (classes: {', '.join(source.classes)})")
    classifier, c = NoisyClassifier.load("zoo:fashion-mnist-noisy"), source.classes.index(wanted)
    classifier.requires_grad_(False)
    return (
        lambda x, **cond: classifier(full(x), 9.0).log_softmax(1)[:, c],
        lambda first, n: torch.full((n,), int(source.null["label"])),
    )


def drawn(policy: Policy, labels: Callable[[int, int], Tensor], n: int) -> Tensor:
    """Samples (n, 1, 28, 28), clipped, the same noise for every policy."""
    parts = [
        policy.rollout(min(100, n - i), Noise(77, range(i, min(i + 100, n))), {"label": labels(i, min(100, n - i))}).final
        for i in range(0, n, 100)
    ]
    return torch.cat(parts).clamp(-1, 1)


def tuned(source: Source, name: str, tau: float, options: argparse.Namespace) -> tuple[Policy, list[dict[str, float]]]:
    """A policy tuned from the start, and what was told of each iteration."""
    reward, labels = reward_of(name, source)
    torch.manual_seed(options.seed)
    policy = start(source)
    if options.value == "encoder":
        value: Any = EncoderValue(policy, 128)
        value.terminal = options.blind  # else the reward speaks for itself
    else:
        value = PerceptronValue(policy.shape or (), T, 256, terminal=options.blind)
    settings = reward_settings(
        tau, lr=options.lr, lr_std=0.0, lr_value=options.lr_value, policy_clip=None, n_generator=options.generator
    )
    tuning = RewardTuning(policy, reward, value, differentiable=not options.blind, settings=settings)
    batch = options.batch
    started = time.process_time()

    def told(i: int, row: dict[str, float]) -> None:
        row["cpu_s"] = time.process_time() - started
        if i % 50 == 0:
            print(f"  tau {tau:g}, {i}: reward {row['reward']:.3f}, {row['nats']:.2f} nats, bias {row['bias']:.2f}", flush=True)

    rows = tune_to_reward(tuning, options.iterations, batch, cond=lambda i: {"label": labels(i * batch, batch)},
                          seed=options.seed, head_start=options.head_start, progress=told)  # fmt: skip
    return policy.eval(), rows


def start(source: Source) -> Policy:
    """The four-step policy before tuning; its last step is drawn with 4 grey levels of noise, or no reward could move it."""
    denoiser = deepcopy(source.denoiser).requires_grad_(True)
    return Policy(denoiser, few_grid(T), trained="fix_last", last_std=0.03)


def measured(policy: Policy, source: Source, name: str, reference: Tensor, n: int) -> tuple[dict[str, float], Tensor]:
    reward, labels = reward_of(name, source)
    x = drawn(policy, labels, n)
    with torch.no_grad():
        values = torch.cat([reward(part) for part in x.split(200)])
    extractor = Extractor.zoo("fashion-mnist")
    return {
        "reward": float(values.mean()), "reward_error": float(values.std()) / n**0.5,
        "frechet": frechet(full(x), full(reference), extractor, splits=0).value if n > 96 else float("nan"),
    }, x  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reward", help="brightness or class:NAME")
    parser.add_argument("--source", default="small")
    parser.add_argument("--value", choices=("perceptron", "encoder"), default="perceptron")
    parser.add_argument("--taus", default="0.3,0.1,0.03")
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument("--head-start", type=int, default=100, help="iterations in which the value alone learns")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--generator", type=int, default=1, help="policy steps of an iteration")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--lr-value", type=float, default=1e-3)
    parser.add_argument("--n", type=int, default=500, help="samples of the table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blind", action="store_true", help="do not differentiate the reward: fit the value to it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=None, help="JSON of what was measured")
    parser.add_argument("--plot", type=Path, default=None, help="PNG of samples")
    parser.add_argument("--out", type=Path, default=None, help="folder to save the policies in, for quieten sample --policy")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source = small() if options.source == "small" else open_source(options.source, device="cpu")
    name = options.reward
    _, labels = reward_of(name, source)
    print(header())
    reference = drawn(start(source).eval(), labels, options.n)
    row, x = measured(start(source).eval(), source, name, reference, options.n)
    table: dict[str, Any] = {"reference": row | {"nats": 0.0}}
    pictures = [x[:20]]
    for tau in map(float, options.taus.split(",")):
        policy, rows = tuned(source, name, tau, options)
        row, x = measured(policy, source, name, reference, options.n)
        last = rows[-max(1, len(rows) // 5) :]
        row |= {key: sum(r[key] for r in last) / len(last) for key in ("nats", "bias")} | {"cpu_s": rows[-1]["cpu_s"]}
        table[f"tau {tau:g}"] = row
        pictures.append(x[:20])
        if options.out is not None:
            save_policy(options.out, f"{name.replace(':', '-').lower()}-{tau:g}", policy, trunk=fingerprint(source.denoiser))
    print(
        f"\n| {name}{', blind' if options.blind else ''} | reward | nats | Frechet distance to the reference | bias | CPU s |"
    )
    print("|---|---|---|---|---|---|")
    for title, row in table.items():
        cells = [f"{row['reward']:.3f} ± {row['reward_error']:.3f}"]
        cells += [f"{row[key]:.2f}" if key in row else "" for key in ("nats", "frechet", "bias")]
        print(f"| {title} | {' | '.join(cells)} | {row.get('cpu_s', 0):.0f} |")
    if options.results is not None:
        write_atomic(options.results, json.dumps(table, indent=1).encode())
    if options.plot is not None:
        save_grid(torch.cat(pictures), options.plot, columns=20, scale=28 // x.shape[-1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
