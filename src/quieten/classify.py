r"""Training the small classifier whose features measure samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import Dataset, Order
from .noise import Noise

__all__ = ["accuracy", "train_classifier"]


@torch.no_grad()
def accuracy(net: nn.Module, data: Dataset, batch: int = 500) -> float:
    """Share of a labelled data set that the classifier gets right, in [0, 1]; the network is put in evaluation mode."""
    if data.labels is None or len(data) == 0:
        raise ValueError(f"`data` {data.name!r} has no labels: accuracy needs some")
    net.eval()
    right = 0
    for index in torch.arange(len(data)).split(batch):
        x, label = data.batch(index)
        right += int((net(x).argmax(1) == label).sum())
    return right / len(data)


def train_classifier(
    net: nn.Module,
    data: Dataset,
    *,
    images: int = 600_000,
    batch: int = 128,
    lr: float = 2e-3,
    weight_decay: float = 0.02,
    shift: int = 2,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> nn.Module:
    """Trains a classifier by cross-entropy on shifted and mirrored images, with AdamW and one cosine cycle.

    Arguments:
        net: Maps images (B, C, H, W) in [-1, 1] to logits (B, classes). Trained in place.
        data: Labelled images.
        images: Images to train on, counted with repetition.
        batch: Images a step.
        lr: Peak learning rate.
        weight_decay: Of AdamW, on matrices and kernels only.
        shift: Largest shift in pixels, either way.
        seed: Of the data order, the augmentation and the dropout. The initial weights are the caller's.
        progress: Called every 50 steps with the images so far and the loss.

    Raises:
        ValueError: If the data have no labels, or the loss is not finite.
    """
    if data.labels is None:
        raise ValueError(f"`data` {data.name!r} has no labels: a classifier needs some")
    steps = max(1, images // batch)
    wide = [p for p in net.parameters() if p.ndim > 1]
    flat = [p for p in net.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": wide, "weight_decay": weight_decay}, {"params": flat}]
    optimiser = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.1)
    order = Order(len(data), batch, seed)
    net.train()
    for step in range(steps):
        torch.manual_seed(seed * 1_000_003 + step)
        index = order.indices(step)
        x = _jittered(data.batch(index)[0], Noise(seed, range(batch)), step, shift)
        loss = F.cross_entropy(net(x), data.labels[index], label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        cycle.step()
        if progress is not None and (step % 50 == 49 or step == steps - 1):
            progress((step + 1) * batch, float(loss.detach()))
    if not torch.isfinite(loss):
        raise ValueError("the classifier's loss is not finite: lower `lr`")
    return net.eval()


def _jittered(x: Tensor, noise: Noise, step: int, shift: int) -> Tensor:
    """Each image mirrored with probability 1/2 and shifted by up to `shift` pixels, the border repeated."""
    flip = noise.uniform(step, "flip") < 0.5
    x = torch.where(flip[:, None, None, None].to(x.device), x.flip(-1), x)
    rows, columns = x.shape[-2:]
    padded = F.pad(x, (shift,) * 4, mode="replicate")
    down, right = ((noise.uniform(step, tag) * (2 * shift + 1)).long() for tag in ("down", "right"))
    return torch.stack([p[:, i : i + rows, j : j + columns] for p, i, j in zip(padded, down, right, strict=True)])
