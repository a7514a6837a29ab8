"""`quieten train-classifier`."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..classify import NoisyClassifier, accuracy_by_level, lessons
from ..data import Dataset, load
from ..files import write_atomic, writing
from ..nets import Classifier
from ..process import PROCESSES
from ..progress import Progress
from ..runs import packed, read_tensors, restore
from ..source import device_of
from ..watch import signals

__all__ = ["train_classifier"]

SAVE_EVERY = 60.0
"""Seconds between saves on the way."""


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
    train, test = _splits(data, folder, download)
    if train.labels is None or len(train.shape) != 3:
        raise ValueError(f"`{data}` has {'no labels' if train.labels is None else f'examples of shape {train.shape}'}: "
                         "a classifier is trained on labelled pictures")  # fmt: skip
    out = (Path("runs") / f"{train.name}-classifier.safetensors" if out is None else out).expanduser()
    if out.suffix != ".safetensors":
        raise ValueError(f"`--out {out}` must be the name of a .safetensors file: end it in .safetensors")
    mirror = train.name not in ("digits", "mnist") if mirror is None else mirror
    options = {"channels": train.shape[0], "classes": len(train.classes), "width": width}
    plan = {"data": train.name, "images": images, "batch": batch, "lr": lr, "shift": shift, "mirror": mirror, "seed": seed}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Classifier(**options)
    classifier = NoisyClassifier(net, PROCESSES[process], classes=train.classes, shape=train.shape).to(device_of(device))
    facts = {**classifier.facts(options), "plan": json.dumps(plan)}
    begin = _resumed(out, classifier, facts)
    if begin is not None and not begin[1]:
        print(f"{out} is trained to the end: name another file to train anew")
        return True
    if not _trained(classifier, train, out, facts, plan, begin):
        return False
    _report(classifier, test, out, facts)
    return True


# ---- its parts


def _splits(data: str, folder: Path | None, download: bool) -> tuple[Dataset, Dataset]:
    """What to train on and what to measure on: every tenth example, where there is no test set."""
    train = load(data, data=folder, download=download)
    try:
        test = load(data, split="test", data=folder, download=download)
    except ValueError:
        held = torch.arange(len(train)) % 10 == 9
        return train.subset(~held), train.subset(held)
    return train, test


def _trained(
    classifier: NoisyClassifier,
    data: Dataset,
    out: Path,
    facts: dict[str, str],
    plan: dict[str, Any],
    begin: tuple[int, dict[str, Any]] | None,
) -> bool:
    """Trains to the end, saving on the way; False if it was asked to stop, with all of it saved."""
    steps, batch = max(1, plan["images"] // plan["batch"]), plan["batch"]
    teach = {key: plan[key] for key in ("batch", "lr", "shift", "mirror", "seed")}
    done, saved_at, shown_at, seen = begin[0] if begin else 0, time.monotonic(), time.monotonic(), 0
    with signals() as stop, Progress(steps * batch, done * batch, out.stem) as progress:
        course = lessons(classifier, data, steps=steps, smoothing=0.0, schedule=classifier.schedule(), begin=begin, **teach)
        for step, loss, optimiser in course:
            seen += batch
            if step % 50 == 0 or step == steps:
                rate, shown_at = seen / (time.monotonic() - shown_at), time.monotonic()
                progress.update(step * batch, f"loss {float(loss):.4f} {rate:.0f} images/s")
                seen = 0
            if stop.is_set() or (step < steps and time.monotonic() - saved_at > SAVE_EVERY):
                with writing(out):
                    write_atomic(out, packed(*_unfinished(classifier, optimiser, step, facts)))
                saved_at = time.monotonic()
            if stop.is_set() and step < steps:
                print(f"{out}: stopped{stop.reason} at step {step} of {steps} and saved; the same command goes on from there")
                return False
    return True


def _unfinished(
    classifier: NoisyClassifier, optimiser: torch.optim.Optimizer, step: int, facts: dict[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All that going on needs: weights as they are, and the optimiser's tensors and numbers."""
    state = optimiser.state_dict()
    moments = {f"adam.{i}.{name}": value for i, entry in state["state"].items() for name, value in entry.items()}
    weights = {f"net.{name}": value for name, value in classifier.net.state_dict().items()}
    return {**weights, **moments}, {**facts, "step": str(step), "groups": json.dumps(state["param_groups"])}


def _resumed(out: Path, classifier: NoisyClassifier, facts: dict[str, str]) -> tuple[int, dict[str, Any]] | None:
    """The step and the optimiser's state that an unfinished file holds, its weights restored; an empty state if finished."""
    if not out.exists():
        return None
    tensors, metadata = read_tensors(out, "delete it to train anew")
    for key, value in facts.items():
        if metadata.get(key) != value:
            raise ValueError(f"{out} holds a classifier trained otherwise ({_difference(metadata.get(key), value)}): name "
                             "another file with --out, or delete it")  # fmt: skip
    if "step" not in metadata:
        return 0, {}
    weights = {name.removeprefix("net."): value for name, value in tensors.items() if name.startswith("net.")}
    restore(classifier.net, weights, out)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("adam."):
            _, i, moment = name.split(".")
            state.setdefault(int(i), {})[moment] = tensor
    return int(metadata["step"]), {"state": state, "param_groups": json.loads(metadata["groups"])}


def _difference(there: str | None, wanted: str) -> str:
    if there is None:
        return "no noise"
    old, new = json.loads(there), json.loads(wanted)
    key = next((key for key in new if old.get(key) != new[key]), "")
    return f"{key} {old.get(key)} instead of {new.get(key)}"


def _report(classifier: NoisyClassifier, test: Dataset, out: Path, facts: dict[str, str]) -> None:
    """Rounds the weights to half precision, measures those at every level, writes the file and the picture beside it."""
    half = {name: value.half() for name, value in classifier.net.state_dict().items()}
    classifier.net.load_state_dict({name: value.float() for name, value in half.items()})
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
    from ..plots import COLOURS, INK, figure_axes

    figure, axes = figure_axes("log-SNR (noise to data)", "accuracy")
    lams, shares = zip(*rows, strict=True)
    axes.plot(lams, shares, color=COLOURS[0], marker="o", markersize=5, linewidth=1.8)
    axes.axhline(chance, color=INK, alpha=0.7, linewidth=1.2, linestyle=":")
    axes.text(lams[-1], chance, "chance ", color=INK, ha="right", va="bottom", fontsize=10.5)
    axes.set_ylim(0, 1)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()
