"""Files of weights: tensors to bytes, tensors back from files, and into the modules they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

__all__ = ["brief", "packed", "read_tensors", "restore"]


def packed(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The bytes of a safetensors file."""
    return to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)


def restore(module: nn.Module, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Loads tensors into a module.

    Raises:
        ValueError: Naming the first tensor that is missing, left over or of another shape.
    """
    own, where = module.state_dict(), f"{file} does not fit the architecture in config.yaml"
    remedy = "use the config it was trained with, or train a new run"
    for name, tensor in own.items():
        if name not in tensors:
            raise ValueError(f"{where}: tensor `{name}` is missing; {remedy}")
        if tensors[name].shape != tensor.shape:
            shapes = f"{tuple(tensors[name].shape)} instead of {tuple(tensor.shape)}"
            raise ValueError(f"{where}: tensor `{name}` has shape {shapes}; {remedy}")
    for name in tensors:
        if name not in own:
            raise ValueError(f"{where}: tensor `{name}` is not part of it; {remedy}")
    module.load_state_dict(dict(tensors))


def read_tensors(
    file: Path, remedy: str = "restore it from a copy, or train again"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        ValueError: If it is missing or damaged.
    """
    try:
        content = file.read_bytes()
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        return from_bytes(content), metadata
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is missing, truncated or damaged ({brief(error)}): {remedy}") from None


def brief(error: BaseException) -> str:
    """What an error says, in one short line."""
    return " ".join(str(error).split())[:120] or type(error).__name__
