r"""Low-rank adapters: a few weights beside each layer of a frozen network, the only ones that are trained.

A linear or convolutional layer W answers W x + (alpha / rank) U D x, with D down to `rank` channels and U, zero at first, up
again. The layer's own weights, and their names, stay as they are.

References:
    | LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2022)
    | https://arxiv.org/abs/2106.09685
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["adapted", "adapters", "inject", "load_adapters", "merge", "remove"]

DOWN, UP, SCALE, HOOK = "adapter_down", "adapter_up", "_adapter_scale", "_adapter_hook"


def inject(
    module: nn.Module, rank: int = 4, alpha: float | None = None, match: Callable[[str], bool] | None = None
) -> list[str]:
    """Gives layers adapters and freezes everything else; returns the names of the layers.

    The module answers as before until they are trained. Adapters are float32 (float64 in float64 layers) whatever the layer is.

    Arguments:
        module: A network, or a denoiser around one; changed in place.
        rank: Channels in between; held at what a layer has.
        alpha: Scale of the answer is alpha / rank; None is `rank`, a scale of 1.
        match: Which layers, by name; None takes every linear and every (ungrouped, zero-padded) convolutional one.

    Raises:
        ValueError: If no layer fits, if it has adapters already, or for a rank below 1.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 2))
        >>> inject(net, rank=2)
        ['0', '2']
        >>> sum(p.numel() for p in net.parameters() if p.requires_grad)
        52
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"`rank` must be a whole number of at least 1 (got {rank!r})")
    if any(True for _ in adapted(module)):
        raise ValueError("`module` has adapters already: merge or remove them first")
    layers = {name: layer for name, layer in module.named_modules() if _fits(layer) and (match is None or match(name))}
    if not layers:
        raise ValueError("`module` has no linear or convolutional layer that `match` takes: leave `match` out, or widen it")
    module.requires_grad_(False)
    for layer in layers.values():
        _attach(layer, min(rank, *_channels(layer)), (rank if alpha is None else alpha) / rank)
    return list(layers)


def adapted(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that have adapters, by name."""
    return ((name, layer) for name, layer in module.named_modules() if hasattr(layer, DOWN))


def adapters(module: nn.Module) -> dict[str, Tensor]:
    """The adapters alone, by name, ready to be saved."""
    out: dict[str, Tensor] = {}
    for name, layer in adapted(module):
        out[f"{name}.{DOWN}"], out[f"{name}.{UP}"] = getattr(layer, DOWN), getattr(layer, UP)
        out[f"{name}.scale"] = torch.tensor(getattr(layer, SCALE), dtype=torch.float64)
    return out


def load_adapters(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives a network the adapters that `adapters` returned, in place of those it has; everything else is frozen.

    Raises:
        ValueError: If the network has no layer of a name, or it has another size.
    """
    remove(module)
    layers = dict(module.named_modules())
    names = [key.removesuffix(f".{DOWN}") for key in tensors if key.endswith(f".{DOWN}")]
    for name in names:
        layer, down, up = layers.get(name), tensors[f"{name}.{DOWN}"], tensors[f"{name}.{UP}"]
        if layer is None or not _fits(layer) or (up.shape[0], down.shape[1]) != _channels(layer)[::-1]:
            raise ValueError(f"the network has no layer `{name}` of {down.shape[1]} channels in and {up.shape[0]} out: "
                             "these adapters are of another network")  # fmt: skip
    module.requires_grad_(False)
    for name in names:
        layer = layers[name]
        _attach(layer, len(tensors[f"{name}.{DOWN}"]), float(tensors[f"{name}.scale"]))
        getattr(layer, DOWN).data.copy_(tensors[f"{name}.{DOWN}"])
        getattr(layer, UP).data.copy_(tensors[f"{name}.{UP}"])


@torch.no_grad()
def merge(module: nn.Module) -> None:
    """Adds the adapters to the layers' own weights and takes them away: the same function, without their cost."""
    for _, layer in adapted(module):
        weight: Any = layer.weight
        down, up = getattr(layer, DOWN).detach(), getattr(layer, UP).detach()
        change = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        weight.add_((getattr(layer, SCALE) * change).to(weight))
    remove(module)


def remove(module: nn.Module) -> None:
    """Takes the adapters away: the network is what it was."""
    for _, layer in list(adapted(module)):
        for name in (DOWN, UP):
            delattr(layer, name)
        layer._forward_hooks.pop(getattr(layer, HOOK), None)


def _attach(layer: nn.Module, rank: int, scale: float) -> None:
    weight: Any = layer.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    down = torch.empty(rank, *weight.shape[1:], dtype=dtype, device=weight.device)
    nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    up = torch.zeros(weight.shape[0], rank, *[1] * (weight.ndim - 2), dtype=dtype, device=weight.device)
    layer.register_parameter(DOWN, nn.Parameter(down))
    layer.register_parameter(UP, nn.Parameter(up))
    setattr(layer, SCALE, scale)
    # a function of its arguments alone, so that copies of the layer use their own adapters
    setattr(layer, HOOK, layer.register_forward_hook(_add).id)


def _add(layer: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
    x = given[0]
    down, up = getattr(layer, DOWN).to(x.dtype), getattr(layer, UP).to(x.dtype)
    if isinstance(layer, nn.Conv2d):
        change = F.conv2d(F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation), up)
    else:
        change = F.linear(F.linear(x, down), up)
    return out + getattr(layer, SCALE) * change


def _fits(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros"
    return isinstance(layer, nn.Linear)


def _channels(layer: Any) -> tuple[int, int]:
    """Channels in and out."""
    return layer.weight.shape[1], layer.weight.shape[0]
