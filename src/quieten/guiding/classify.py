r"""Classifiers: the clean one whose features measure samples, and the one that knows noise and guides."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import Dataset, Order
from ..denoiser import levels
from ..gaussian import spread_over
from ..noise import Draws, Noise
from ..process import PROCESSES, VP, Level, Process
from ..schedule import Linear, Schedule
from ..training.bundled import bundled

__all__ = ["NoisyClassifier", "accuracy", "accuracy_by_level", "lessons", "train_classifier"]

LEVELS = (-9.0, 9.0)
"""Log-SNRs that a noise-aware classifier learns: sigma / alpha from 90 to 0.011."""


class NoisyClassifier(nn.Module):
    r"""A classifier of x_t: log p(y | x_t) at any level, for states of any process.

    A state of another process is rescaled to its own first (the same log-SNR is the same image, up to a factor). Levels beyond
    those it learned count as the nearest of them.

    Arguments:
        net: Maps (x, t) to logits (B, classes), where t = -lam / 8 (EDM's ln(sigma / alpha) / 4), such as `nets.Classifier`.
        process: The process that the network's inputs come from.
        range: Least and greatest log-SNR that it learns.
        classes: Names of the classes.
        shape: Shape of one example, if known.
    """

    def __init__(
        self,
        net: nn.Module,
        process: Process = VP,
        range: tuple[float, float] = LEVELS,
        classes: Sequence[str] = (),
        shape: tuple[int, ...] | None = None,
    ):
        super().__init__()
        low, high = map(float, range)
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"`range` must be two finite log-SNRs, the least first (got {range})")
        self.net, self.process, self.range = net, process, (low, high)
        self.classes, self.shape = tuple(classes), shape

    def forward(self, x: Tensor, lam: Level, process: Process | None = None) -> Tensor:
        """Logits (B, classes), in the dtype of x or float32 if that is wider.

        Arguments:
            x: Noisy states (B, *).
            lam: Their log-SNR, a float or a tensor () or (B,).
            process: The process they come from; None is the classifier's own.
        """
        if self.shape is not None and tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"`x` must have shape (B, {', '.join(map(str, self.shape))}), as the classifier learned "
                             f"(got {tuple(x.shape)})")  # fmt: skip
        if process is not None and process is not self.process:
            _, ours = self.process.scales(lam)
            _, theirs = process.scales(lam)  # their ratio exists in pure noise too
            x = x * spread_over(ours / theirs, x)
        dtype = next((p.dtype for p in self.net.parameters() if p.is_floating_point()), x.dtype)
        t = (levels(lam, x).clamp(*self.range) / -8.0).to(torch.promote_types(dtype, torch.float32))
        return self.net(x.to(dtype), t).to(torch.promote_types(x.dtype, torch.float32))

    def schedule(self) -> Linear:
        """The levels to train on: evenly spread over its range."""
        return Linear(self.range[1], self.range[0])

    def facts(self, options: dict[str, Any]) -> dict[str, str]:
        """What a file of its weights says about it; `load` reads it. `options` are the arguments of `nets.Classifier`."""
        name = next(name for name, process in PROCESSES.items() if process is self.process)
        noise = {"process": name, "range": self.range, "shape": self.shape, "classes": self.classes}
        return {"options": json.dumps(options), "noise": json.dumps(noise)}

    @classmethod
    def load(cls, path_or_name: str | Path, device: torch.device | str = "cpu") -> NoisyClassifier:
        """A file that `quieten train-classifier` wrote, or one that comes with the library: zoo:NAME.

        Raises:
            ValueError: If there is none, it is damaged, or it is a classifier of clean images.
        """
        from ..training.weights import read_tensors, restore

        named = str(path_or_name).startswith("zoo:")
        path = bundled(str(path_or_name), "classifiers", "-noisy", "noise-aware classifier") if named else Path(path_or_name)
        path = path.expanduser()
        tensors, metadata = read_tensors(path, "write it with `quieten train-classifier`")
        if not {"options", "noise"} <= metadata.keys():
            raise ValueError(f"{path} is no noise-aware classifier: write one with `quieten train-classifier`")
        if "step" in metadata:
            raise ValueError(f"{path} is not trained to the end: go on with the same `quieten train-classifier`")
        classifier = cls._built(metadata)
        restore(classifier.net, {n: t.float() if t.dtype == torch.float16 else t for n, t in tensors.items()}, path)
        return classifier.to(device).eval().requires_grad_(False)

    @classmethod
    def _built(cls, metadata: dict[str, str]) -> NoisyClassifier:
        from ..nets import Classifier

        noise = json.loads(metadata["noise"])
        shape = None if noise["shape"] is None else tuple(noise["shape"])
        net = Classifier(**json.loads(metadata["options"]))
        return cls(net, PROCESSES[noise["process"]], noise["range"], noise["classes"], shape)


# ---- measuring


@torch.no_grad()
def accuracy(net: nn.Module, data: Dataset, batch: int = 500, lam: float | None = None, seed: int = 0) -> float:
    """Share of a labelled data set that the classifier gets right, in [0, 1]; the network is put in evaluation mode.

    Arguments:
        net: Maps images to logits; with `lam`, a `NoisyClassifier`.
        data: Labelled images.
        batch: Images at once.
        lam: Log-SNR at which the images are noised first; None leaves them clean.
        seed: Of that noise.
    """
    if data.labels is None or len(data) == 0:
        raise ValueError(f"`data` {data.name!r} has no labels: accuracy needs some")
    net.eval()
    right, device = 0, _device(net)
    for index in torch.arange(len(data)).split(batch):
        x, label = data.batch(index)
        x = x.to(device)
        if lam is None:
            logits = net(x)
        else:
            x_t = net.process.marginal(x, lam).sample(Noise(seed, index).normal(x, 0, "accuracy"))  # type: ignore[union-attr, operator]
            logits = net(x_t, lam)
        right += int((logits.argmax(1).cpu() == label).sum())
    return right / len(data)


def accuracy_by_level(classifier: NoisyClassifier, data: Dataset, count: int = 10) -> list[tuple[float, float]]:
    """(lam, accuracy) at evenly spaced log-SNRs of the classifier's range, from noise to data."""
    low, high = classifier.range
    lams = [low + (high - low) * k / (count - 1) for k in range(count)]
    return [(lam, accuracy(classifier, data, lam=lam)) for lam in lams]


# ---- training


def train_classifier(
    net: nn.Module,
    data: Dataset,
    *,
    images: int = 600_000,
    batch: int = 128,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
    **options: Any,
) -> nn.Module:
    """Trains a classifier in place, start to end: `lessons` without interruption.

    Arguments:
        net: As in `lessons`.
        data: Labelled images.
        images: Images to train on, counted with repetition.
        batch: Images a step.
        seed: Of the data order, the augmentation and the dropout. The initial weights are the caller's.
        progress: Called every 50 steps with the images so far and the loss.
        **options: The others of `lessons`.

    Raises:
        ValueError: If the data have no labels, or the loss is not finite.
    """
    steps = max(1, images // batch)
    for step, loss, _ in lessons(net, data, steps=steps, batch=batch, seed=seed, **options):
        if progress is not None and (step % 50 == 0 or step == steps):
            progress(step * batch, float(loss))
    return net.eval()


def lessons(
    net: nn.Module,
    data: Dataset,
    *,
    steps: int,
    batch: int = 128,
    lr: float = 2e-3,
    weight_decay: float = 0.02,
    shift: int = 2,
    mirror: bool = True,
    smoothing: float = 0.05,
    schedule: Schedule | None = None,
    seed: int = 0,
    begin: tuple[int, dict[str, Any]] | None = None,
) -> Iterator[tuple[int, Tensor, torch.optim.Optimizer]]:
    """Trains a classifier by cross-entropy with AdamW and one cosine cycle, a step at a time.

    Order, augmentation, noise and dropout of a step are functions of (seed, step), so what stops can go on bit for bit.

    Arguments:
        net: Maps images (B, C, H, W) in [-1, 1] to logits (B, classes); with `schedule`, a `NoisyClassifier`. Trained in place.
        data: Labelled images.
        steps: Steps of the whole cycle.
        batch: Images a step.
        lr: Peak learning rate.
        weight_decay: Of AdamW, on matrices and kernels only.
        shift: Largest shift in pixels, either way.
        mirror: Mirror every other image; not for digits or text.
        smoothing: Of the labels; a classifier that guides wants 0, since its gradients are those of log p(y | x_t).
        schedule: u -> lam, the levels to noise the images at; None trains on clean ones.
        seed: Any integer.
        begin: Steps done before and the optimiser's `state_dict()` then, to go on from.

    Yields:
        After each step: steps done, the loss (a tensor without a graph), the optimiser.

    Raises:
        ValueError: If the data have no labels, or the loss is not finite.
    """
    if data.labels is None:
        raise ValueError(f"`data` {data.name!r} has no labels: a classifier needs some")
    optimiser, cycle, done = _optimiser(net, lr, weight_decay, steps, begin)
    order, device = Order(len(data), batch, seed), _device(net)
    net.train()
    for step in range(done, steps):
        index = order.indices(step)
        x = _jittered(data.batch(index)[0], Noise(seed, range(batch)), step, shift, mirror).to(device)
        with torch.random.fork_rng(devices=[]):  # dropout is keyed, and the caller's generator left alone
            torch.manual_seed(seed * 1_000_003 + step)
            logits = net(x) if schedule is None else net(*_noisy(net, x, schedule, Draws(seed, step, range(batch))))
        loss = F.cross_entropy(logits, data.labels[index].to(device), label_smoothing=smoothing)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        cycle.step()
        if (step % 50 == 49 or step == steps - 1) and not torch.isfinite(loss):
            raise ValueError(f"the classifier's loss is not finite at step {step + 1}: lower `lr` (was {lr:g})")
        yield step + 1, loss.detach(), optimiser


def _optimiser(
    net: nn.Module, lr: float, weight_decay: float, steps: int, begin: tuple[int, dict[str, Any]] | None
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, int]:
    wide = [p for p in net.parameters() if p.ndim > 1]
    flat = [p for p in net.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": wide, "weight_decay": weight_decay}, {"params": flat}]
    optimiser = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.1)
    if begin is None:
        return optimiser, cycle, 0
    done, state = begin
    optimiser.load_state_dict(state)
    cycle.last_epoch = done  # the cycle is a closed form of it
    return optimiser, cycle, done


def _noisy(net: Any, x0: Tensor, schedule: Schedule, draws: Draws) -> tuple[Tensor, Tensor]:
    """States and their levels, spread evenly over the schedule."""
    lam = schedule(schedule.draw(draws)).to(x0)
    return net.process.marginal(x0, lam).sample(draws.normal(x0)), lam


def _device(net: nn.Module) -> torch.device:
    return next((p.device for p in net.parameters()), torch.device("cpu"))


def _jittered(x: Tensor, noise: Noise, step: int, shift: int, mirror: bool) -> Tensor:
    """Each image shifted by up to `shift` pixels, the border repeated, and mirrored with probability 1/2."""
    if mirror:
        flip = noise.uniform(step, "flip") < 0.5
        x = torch.where(flip[:, None, None, None].to(x.device), x.flip(-1), x)
    rows, columns = x.shape[-2:]
    padded = F.pad(x, (shift,) * 4, mode="replicate")
    down, right = ((noise.uniform(step, tag) * (2 * shift + 1)).long() for tag in ("down", "right"))
    return torch.stack([p[:, i : i + rows, j : j + columns] for p, i, j in zip(padded, down, right, strict=True)])
