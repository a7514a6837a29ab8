"""Policies that were tuned from a denoiser: kept as files beside it, and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .denoiser import Denoiser
from .files import write_atomic, writing
from .policy import Policy
from .transition import Ancestral
from .variance import fingerprint

__all__ = ["check_name", "load_policy", "policy_facts", "policy_names", "save_policy"]

FORMAT = 1
PREFIX = "denoiser."


def save_policy(
    folder: str | Path, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], half: bool = False
) -> Path:
    """Writes FOLDER/NAME.safetensors and, for people, FOLDER/NAME.json.

    Arguments:
        folder: Usually `policy` in a run.
        name: What it is loaded by.
        tensors: `Policy.state_dict()`, or averages of it.
        facts: How to build it again (see `load_policy`), and how it was tuned.
        half: Write the network's weights as float16.
    """
    from .runs import packed

    folder = Path(folder)
    text = json.dumps({"format": FORMAT, "name": name, **facts}, indent=1) + "\n"
    stored = {
        key: t.half() if half and key.startswith(PREFIX) and t.dtype == torch.float32 else t for key, t in tensors.items()
    }
    with writing(folder):
        write_atomic(folder / f"{name}.safetensors", packed(stored, {"policy": text}))
        write_atomic(folder / f"{name}.json", text.encode())
    return folder / f"{name}.safetensors"


def policy_names(folders: Sequence[Path]) -> list[str]:
    """The policies that lie in some folders."""
    return sorted({file.stem for folder in folders for file in folder.glob("*.safetensors")})


def load_policy(where: str | Path | Sequence[Path], name: str, denoiser: Denoiser) -> Policy:
    """A tuned policy by name, in evaluation mode; the denoiser it was tuned from stays as it is.

    Arguments:
        where: The folder, or several in the order in which they are searched.
        name: Its name, or the path of its .safetensors file.
        denoiser: What it was tuned from.

    Raises:
        ValueError: If there is none of that name, it is damaged, or it was tuned from other weights.
    """
    from .runs import read_tensors, restore

    file = _find(where, name)
    tensors, metadata = read_tensors(file, "tune the policy again")
    facts = _facts(file, metadata)
    if facts["trunk"] != fingerprint(denoiser):
        raise ValueError(f"{file} was tuned from other weights: tune it again, or load the weights it belongs to")
    std = tensors["transition.log_std"].exp()
    if len(std) != len(facts["grid"]) - 1:
        raise ValueError(f"{file} holds {len(std)} steps for {len(facts['grid'])} levels: tune the policy again")
    grid = torch.tensor([float(lam) for lam in facts["grid"]], dtype=torch.float64)
    inner = Ancestral(facts["eta"], spread=False)
    policy = Policy(deepcopy(denoiser), grid, inner, std=std, trained=facts["trained"], last_std=facts["last_std"])
    restore(policy, {key: t.float() if t.dtype == torch.float16 else t for key, t in tensors.items()}, file)
    return policy.to(denoiser.device).eval().requires_grad_(False)


def policy_facts(where: str | Path | Sequence[Path], name: str) -> dict[str, Any]:
    """What the file of a policy says of it; arguments and errors as in `load_policy`."""
    from .runs import read_tensors

    file = _find(where, name)
    return _facts(file, read_tensors(file, "tune the policy again")[1])


def check_name(name: str) -> str:
    """The name, if a policy can have it.

    Raises:
        ValueError: If not.
    """
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
        raise ValueError(f"`name` {name!r} must be of letters, digits, '-', '_' and '.': take another")
    return name


def _find(where: str | Path | Sequence[Path], name: str) -> Path:
    folders = [Path(where)] if isinstance(where, str | Path) else list(where)
    files = [folder / f"{name}.safetensors" for folder in folders]
    if name.endswith(".safetensors"):
        files = [Path(name).expanduser()]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        from .parts import nearest

        known = policy_names(folders)
        have = f"tuned: {', '.join(known)}" if known else "none is tuned yet"
        raise ValueError(f"no policy {name!r} for this model{nearest(name, known)} ({have}): tune one with `quieten tune`")
    return file


def _facts(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(metadata["policy"])
        missing = [key for key in ("trunk", "grid", "eta", "trained", "last_std") if key not in facts]
    except (KeyError, ValueError):
        missing, facts = ["policy"], {}
    if missing or facts.get("format") != FORMAT:
        raise ValueError(f"{file} is no policy of format {FORMAT} ({', '.join(missing) or 'format'} is missing or other): "
                         "tune it again with `quieten tune`")  # fmt: skip
    return facts
