"""`quieten train-classifier`."""

from __future__ import annotations

import io
import json
from pathlib import Path

from ..data import Dataset
from ..files import write_atomic, writing
from ..guiding.classify import NoisyClassifier, accuracy_by_level
from ..process import PROCESSES
from ..training.source import device_of
from ..training.weights import packed
from .teach import finish, lesson_plan, pupil, splits, taught, weights_file

__all__ = ["train_classifier"]


def train_classifier(
    data: str,
    *,
    out: Path | None = None,
    images: int = 600_000,
    batch: int = 128,
    lr: float = 2e-3,
    width: int = 32,
    shift: int = 2,
    mirror: bool | None = None,
    size: int | None = None,
    process: str = "vp",
    seed: int = 0,
    folder: Path | None = None,
    download: bool = False,
    device: str | None = None,
) -> bool:
    """Trains a noise-aware classifier, or goes on with it; returns whether it is done (not stopped by Ctrl-C).

    Raises:
        ValueError: For data without labels or pictures, or a file of other training.
    """
    if process not in PROCESSES:
        raise ValueError(f"`--process` must be one of {', '.join(PROCESSES)} (got {process!r})")
    train, test = splits(data, folder, download, size)
    out = weights_file(Path("runs") / f"{train.name}-classifier.safetensors" if out is None else out)
    net, options = pupil(train, seed, width=width)
    plan = lesson_plan(train, images, batch, lr, shift, mirror, seed, size=size)
    classifier = NoisyClassifier(net, PROCESSES[process], classes=train.classes, shape=train.shape).to(device_of(device))
    facts = {**classifier.facts(options), "plan": json.dumps(plan)}
    done = taught(classifier, classifier.net, train, out, facts, plan, smoothing=0.0, schedule=classifier.schedule())
    if done:
        _report(classifier, test, out, facts)
    return done is not False


# ---- its parts


def _report(classifier: NoisyClassifier, test: Dataset, out: Path, facts: dict[str, str]) -> None:
    """Rounds the weights to half precision, measures those at every level, writes the file and the picture beside it."""
    half = finish(classifier.net)
    rows = accuracy_by_level(classifier, test)
    with writing(out):
        write_atomic(out, packed(half, {**facts, "accuracy": json.dumps(rows)}))
    picture = out.with_suffix(".png")
    with writing(picture):
        write_atomic(picture, _chart(rows, 1.0 / len(classifier.classes)))
    print("sigma/alpha  " + " ".join(f"{2.718281828 ** (-lam / 2):6.3g}" for lam, _ in rows))
    print("accuracy, %  " + " ".join(f"{100 * share:6.1f}" for _, share in rows))
    size = out.stat().st_size
    print(f"{out}: {size / 1e3:.0f} kB, measured on {len(test)} images of {test.name}; {picture}")


def _chart(rows: list[tuple[float, float]], chance: float) -> bytes:
    """Accuracy against the level, as a PNG."""
    from ..reports.plots import COLOURS, INK, figure_axes

    figure, axes = figure_axes("log-SNR (noise to data)", "accuracy")
    lams, shares = zip(*rows, strict=True)
    axes.plot(lams, shares, color=COLOURS[0], marker="o", markersize=5, linewidth=1.8)
    axes.axhline(chance, color=INK, alpha=0.7, linewidth=1.2, linestyle=":")
    axes.text(lams[-1], chance, "chance ", color=INK, ha="right", va="bottom", fontsize=10.5)
    axes.set_ylim(0, 1)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()
