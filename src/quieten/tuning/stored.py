"""Policies as files: the tuned network or its adapters, the noise of each step, and what it takes to build the steps again."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..covariances.heads import network_of
from ..covariances.stored import fingerprint
from ..denoiser import Denoiser
from ..files import named_file, write_atomic, writing
from ..transition import Ancestral, Transition
from . import adapters
from .policy import CLIPPED, Policy
from .policy_schedule import Consistency

__all__ = ["load_policy", "policy_names", "save_policy"]

FORMAT = 1

_SAVED: dict[str, tuple[type[Transition], tuple[str, ...]]] = {
    "ancestral": (Ancestral, ("eta", "spread", "clip", "keep_eps")),
    "consistency": (Consistency, ("lam_max",)),
}
"""Transitions that a file can name -> class and arguments."""


def save_policy(
    folder: str | Path,
    name: str,
    policy: Policy,
    *,
    trunk: str,
    s2: Tensor | None = None,
    half: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Writes FOLDER/NAME.safetensors and FOLDER/NAME.json.

    With adapters in the network they alone are written, else all of its weights.

    Arguments:
        folder: Usually `policy` in a run.
        name: What it is loaded by.
        policy: Tuned.
        trunk: `fingerprint` of the denoiser before it was tuned.
        s2: Variances of the auxiliary kernels (T,), for those who go on training.
        half: Weights as float16. That rounds them by up to 5e-4 of their size, more than a short run may have changed them:
            compare samples first. Of adapters it rounds the change alone.
        facts: What else to keep, such as how it was tuned and how good it is.

    Raises:
        ValueError: If it cannot be written.
    """
    from ..training.weights import packed

    steps, net = policy.transition, _network(policy.denoiser)
    few = adapters.adapters(net)
    weights = few or net.state_dict()
    if half:
        weights = {key: t.half() if t.dtype == torch.float32 else t for key, t in weights.items()}
    tensors = {f"network.{key}": t for key, t in weights.items()}
    tensors |= {"grid": policy.grid, "log_std": steps.log_std, "start": steps.start}
    tensors |= {} if s2 is None else {"s2": s2}
    known = {
        "trunk": trunk,
        "T": policy.T,
        "shape": policy.shape,
        "trained": steps.trained,
        "last_std": steps.last_std,
        "from_kernel": steps.from_kernel,
        "adhoc_scale1": steps.adhoc_scale1,
        "mean_map": steps.mean_map is not None,
        "transition": _described(steps.inner),
        "adapters": bool(few),
    }
    text = json.dumps({"format": FORMAT, "name": name, **known, "facts": dict(facts or {})}, indent=1) + "\n"
    folder = Path(folder)
    with writing(folder):
        write_atomic(folder / f"{name}.safetensors", packed(tensors, {"policy": text}))
        write_atomic(folder / f"{name}.json", text.encode())
    return folder / f"{name}.safetensors"


def policy_names(folders: Sequence[Path]) -> list[str]:
    """The policies that lie in some folders."""
    return sorted({file.stem for folder in folders for file in folder.glob("*.safetensors")})


def load_policy(
    where: str | Path | Sequence[Path],
    name: str,
    denoiser: Denoiser,
    *,
    transition: Transition | None = None,
    mean_map: Callable[[Tensor], Tensor] | None = None,
) -> Policy:
    """A policy by name, in evaluation mode and without gradients; `policy.s2` and `policy.facts` hold what was saved beside it.

    Arguments:
        where: The folder, or several in the order in which they are searched.
        name: Its name, or FOLDER/NAME, or the path of its .safetensors file.
        denoiser: What it was tuned from: copied, never changed.
        transition: For policies of a transition that a file cannot name.
        mean_map: For those whose means are mapped.

    Raises:
        ValueError: If there is none of that name, it is damaged, or it belongs to another denoiser.
    """
    from ..training.weights import read_tensors, restore

    file = _find(where, name)
    tensors, metadata = read_tensors(file, "tune again")
    known = _known(file, metadata)
    net = _network(denoiser)
    if known["adapters"] and known["trunk"] != fingerprint(denoiser):
        raise ValueError(f"{file} holds adapters for other weights of the denoiser: load those that it was tuned from")
    if known["mean_map"] != (mean_map is not None):
        remedy = "pass its `mean_map`" if known["mean_map"] else "leave `mean_map` out"
        raise ValueError(f"{file} was tuned with{'' if known['mean_map'] else 'out'} a map of the means: {remedy}")
    denoiser = deepcopy(denoiser)
    net = _network(denoiser)
    weights = {key.removeprefix("network."): t for key, t in tensors.items() if key.startswith("network.")}
    if known["adapters"]:
        adapters.load_adapters(net, weights)
    else:
        own = net.state_dict()
        restore(net, {key: t.to(own[key].dtype) if key in own else t for key, t in weights.items()}, file)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", re.escape(CLIPPED))  # that is for who goes on to tune it
        policy = Policy(
            denoiser,
            tensors["grid"],
            _built(known["transition"], file) if transition is None else transition,
            std="kernel" if known["from_kernel"] else tensors["start"].exp(),
            trained=known["trained"],
            last_std=known["last_std"],
            shape=None if known["shape"] is None else tuple(known["shape"]),
            mean_map=mean_map,
            adhoc_scale1=known["adhoc_scale1"],
        )
    with torch.no_grad():
        policy.transition.log_std.copy_(tensors["log_std"])
        policy.transition.start.copy_(tensors["start"])
    policy.s2, policy.facts = tensors.get("s2"), known["facts"]
    return policy.eval().requires_grad_(False)


def _find(where: str | Path | Sequence[Path], name: str) -> Path:
    folders = [Path(where)] if isinstance(where, str | Path) else list(where)
    file = named_file(folders, name)
    if file is None:
        from ..training.parts import nearest

        known = policy_names(folders)
        have = f"tuned: {', '.join(known)}" if known else "none is tuned yet"
        raise ValueError(f"no policy {name!r} for this model{nearest(name, known)} ({have}): tune one with `quieten tune`")
    return file


def _known(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        known: dict[str, Any] = json.loads(metadata["policy"])
    except (KeyError, ValueError):
        known = {}
    if known.get("format") != FORMAT:
        raise ValueError(f"{file} is no policy of format {FORMAT}: tune again with `quieten tune`")
    return known


def _network(denoiser: Denoiser) -> nn.Module:
    return network_of(denoiser) or denoiser


def _described(inner: Transition) -> dict[str, Any] | None:
    """What `_built` makes the transition of again; None where a file cannot say it."""
    for kind, (cls, names) in _SAVED.items():
        if type(inner) is cls:
            options = {name: getattr(inner, name) for name in names}
            if all(value is None or isinstance(value, bool | int | float) for value in options.values()):
                return {"kind": kind, **{k: "inf" if v == math.inf else v for k, v in options.items()}}
    return None


def _built(described: Mapping[str, Any] | None, file: Path) -> Transition:
    if described is None:
        raise ValueError(f"{file} was tuned with a transition that the file cannot name: pass it as `transition`")
    options = {key: math.inf if value == "inf" else value for key, value in described.items() if key != "kind"}
    return _SAVED[described["kind"]][0](**options)
