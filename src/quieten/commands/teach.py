"""How a classifier is trained by a command: resumed where it stopped, saved on the way, rounded when it is done."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Dataset, load
from ..files import write_atomic, writing
from ..guiding.classify import lessons
from ..nets import Classifier
from ..progress import Progress
from ..training.watch import signals
from ..training.weights import packed, read_tensors, restore

__all__ = ["finish", "lesson_plan", "pupil", "splits", "taught", "weights_file"]

SAVE_EVERY = 60.0
"""Seconds between saves on the way."""


def splits(data: str, folder: Path | None, download: bool, size: int | None = None) -> tuple[Dataset, Dataset]:
    """What to train on and what to measure on: every tenth example, where there is no test set.

    Raises:
        ValueError: If the data are no labelled pictures.
    """
    train = load(data, size=size, data=folder, download=download)
    if train.labels is None or len(train.shape) != 3:
        raise ValueError(f"`{data}` has {'no labels' if train.labels is None else f'examples of shape {train.shape}'}: "
                         "a classifier is trained on labelled pictures")  # fmt: skip
    try:
        test = load(data, split="test", size=size, data=folder, download=download)
    except ValueError:
        held = torch.arange(len(train)) % 10 == 9
        return train.subset(~held), train.subset(held)
    return train, test


def pupil(data: Dataset, seed: int, **options: Any) -> tuple[Classifier, dict[str, Any]]:
    """A classifier of the data with its first weights, and all the options that it was made of."""
    options = {"channels": data.shape[0], "classes": len(data.classes), **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier(**options), options


def lesson_plan(
    data: Dataset, images: int, batch: int, lr: float, shift: int, mirror: bool | None, seed: int, **more: Any
) -> dict[str, Any]:
    """What a file says of its training, things that are None left out; pictures are mirrored by default where they may be."""
    mirror = data.name not in ("digits", "mnist") if mirror is None else mirror
    return {
        "data": data.name,
        "images": images,
        "batch": batch,
        "lr": lr,
        **{key: value for key, value in more.items() if value is not None},
        "shift": shift,
        "mirror": mirror,
        "seed": seed,
    }


def weights_file(out: Path) -> Path:
    """The file that `--out` names; ValueError unless it ends in .safetensors."""
    out = out.expanduser()
    if out.suffix != ".safetensors":
        raise ValueError(f"`--out {out}` must be the name of a .safetensors file: end it in .safetensors")
    return out


def taught(
    module: nn.Module, net: nn.Module, data: Dataset, out: Path, facts: dict[str, str], plan: dict[str, Any], **options: Any
) -> bool | None:
    """Trains to the end, going on from what the file holds and saving there on the way.

    Arguments:
        module: What learns.
        net: The network in it whose weights are kept.
        data: Labelled pictures.
        out: The file.
        facts: Its metadata; a file with others is of other training.
        plan: images and batch, and what `lessons` takes besides.
        **options: More of that, which is not part of the plan.

    Returns:
        True if it was trained to the end now, False if it was asked to stop, with all of it saved; None if it was done before.

    Raises:
        ValueError: If the file is of other training.
    """
    begin = _resumed(out, net, facts)
    if begin is not None and not begin[1]:
        print(f"{out} is trained to the end: name another file to train anew")
        return None
    steps, batch = max(1, plan["images"] // plan["batch"]), plan["batch"]
    teach = {key: value for key, value in plan.items() if key not in ("data", "images", "size")} | options
    done, saved_at, shown_at, seen = begin[0] if begin else 0, time.monotonic(), time.monotonic(), 0
    with signals() as stop, Progress(steps * batch, done * batch, out.stem) as progress:
        for step, loss, optimiser in lessons(module, data, steps=steps, begin=begin, **teach):
            seen += batch
            if step % 50 == 0 or step == steps:
                rate, shown_at = seen / (time.monotonic() - shown_at), time.monotonic()
                progress.update(step * batch, f"loss {float(loss):.4f} {rate:.0f} images/s")
                seen = 0
            if stop.is_set() or (step < steps and time.monotonic() - saved_at > SAVE_EVERY):
                with writing(out):
                    write_atomic(out, packed(*_unfinished(net, optimiser, step, facts)))
                saved_at = time.monotonic()
            if stop.is_set() and step < steps:
                print(f"{out}: stopped{stop.reason} at step {step} of {steps} and saved; the same command goes on from there")
                return False
    return True


def finish(net: nn.Module) -> dict[str, Tensor]:
    """Rounds the weights to half precision in place, so that what is measured next is what is written; returns them."""
    half = {name: value.half() for name, value in net.state_dict().items()}
    net.load_state_dict({name: value.float() for name, value in half.items()})
    return half


# ---- its parts


def _unfinished(
    net: nn.Module, optimiser: torch.optim.Optimizer, step: int, facts: dict[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All that going on needs: weights as they are, and the optimiser's tensors and numbers."""
    state = optimiser.state_dict()
    moments = {f"adam.{i}.{name}": value for i, entry in state["state"].items() for name, value in entry.items()}
    weights = {f"net.{name}": value for name, value in net.state_dict().items()}
    return {**weights, **moments}, {**facts, "step": str(step), "groups": json.dumps(state["param_groups"])}


def _resumed(out: Path, net: nn.Module, facts: dict[str, str]) -> tuple[int, dict[str, Any]] | None:
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
    restore(net, weights, out)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("adam."):
            _, i, moment = name.split(".")
            state.setdefault(int(i), {})[moment] = tensor
    return int(metadata["step"]), {"state": state, "param_groups": json.loads(metadata["groups"])}


def _difference(there: str | None, wanted: str) -> str:
    if there is None:
        return "another kind"
    old, new = json.loads(there), json.loads(wanted)
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return f"{old} instead of {new}"
    key = next((key for key in new if old.get(key) != new[key]), "")
    return f"{key} {old.get(key)} instead of {new.get(key)}"
