"""`quieten features train` and `quieten features stats`."""

from __future__ import annotations

import json
from pathlib import Path

from ..data import load
from ..files import write_atomic, writing
from ..guiding.classify import accuracy
from ..metrics.features import Extractor, statistics_of
from ..progress import Progress
from ..training.source import device_of
from ..training.weights import packed
from .teach import finish, lesson_plan, pupil, splits, taught, weights_file

__all__ = ["stats", "train"]


def train(
    data: str,
    *,
    out: Path | None = None,
    images: int = 600_000,
    batch: int = 128,
    lr: float = 2e-3,
    decay: float = 0.02,
    width: int = 64,
    dropout: float = 0.1,
    shift: int = 2,
    mirror: bool | None = None,
    size: int | None = None,
    seed: int = 0,
    folder: Path | None = None,
    download: bool = False,
    device: str | None = None,
) -> bool:
    """Trains a classifier for its features, or goes on with it; returns whether it is done (not stopped by Ctrl-C).

    The arguments are the command's options.

    Raises:
        ValueError: For data without labels or pictures, or a file of other training.
    """
    learnt, test = splits(data, folder, download, size)
    out = weights_file(Path("runs") / f"{learnt.name}-features.safetensors" if out is None else out)
    net, options = pupil(learnt, seed, width=width, dropout=dropout)
    plan = lesson_plan(learnt, images, batch, lr, shift, mirror, seed, weight_decay=decay, size=size)
    net.to(device_of(device))
    facts = {"options": json.dumps(options), "classes": json.dumps(learnt.classes), "plan": json.dumps(plan)}
    done = taught(net, net, learnt, out, facts, plan)
    if done:
        half = finish(net)
        share = accuracy(net, test)
        with writing(out):
            write_atomic(out, packed(half, {**facts, "accuracy": f"{share:.4f}"}))
        print(f"{out}: {net.feature_channels} features, {out.stat().st_size / 1e3:.0f} kB; {share:.2%} of {len(test)} held-out "
              f"images of {test.name} are put in the right class")  # fmt: skip
    return done is not False


def stats(
    data: str,
    *,
    extractor: str,
    out: Path | None = None,
    split: str = "train",
    size: int | None = None,
    batch: int = 256,
    sha256: str | None = None,
    single: bool = False,
    folder: Path | None = None,
    download: bool = False,
    device: str | None = None,
) -> Path:
    """Writes the statistics of a data set's features; the arguments are the command's options.

    Raises:
        ValueError: For an unknown data set or extractor, or a file that cannot be written.
    """
    used = Extractor.load(extractor, sha256, device_of(device))
    images = load(data, split=split, size=size, labels=False, data=folder, download=download)
    out = Path(f"{images.name}-{split}-{used.hash[:8]}.npz") if out is None else out.expanduser()
    if out.suffix != ".npz":
        raise ValueError(f"`--out {out}` must be the name of an .npz file: end it in .npz")
    with Progress(len(images), 0, f"features of {images.name}") as progress:
        found = statistics_of(images, used, batch, progress.update)
    with writing(out):
        found.save(out, single=single)
    print(f"{out}: mean and covariance of {len(found.mean)} features of {found.n} images, by {used.name} {used.hash[:12]}")
    return out
