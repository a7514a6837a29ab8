r"""Small heads on frozen networks, and the taps that bring them the features before the network's own last layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..denoiser import Denoiser, levels
from ..nets import Block, Embedding, Net, PixelNorm, modulated, zeroed
from ..networks.mlp import VectorBlock
from ..process import Level

__all__ = [
    "HEADS",
    "Complex",
    "Seen",
    "Separate",
    "Simple",
    "Tap",
    "Tokens",
    "find_tap",
    "head_on",
    "make_head",
    "network_of",
    "tap_of",
]

HEADS = ("simple", "complex", "separate")
"""What `make_head` makes."""


class Seen:
    """What a tap has read: the features `h` and the embedding of time `emb` of the latest pass."""

    h: Tensor
    emb: Tensor | None = None


@dataclass(frozen=True)
class Tap:
    """Where the features of a network can be read.

    Attributes:
        channels: Of the features.
        embedding: Size of the embedding of time; 0 where there is none.
        kind: "map" (B, channels, H, W), "vector" (B, channels) or "tokens" (B, N, channels).
        patch: Side of the image patch that a token stands for.
        attach: (what is read) -> the hooks that read it, each with `remove`.
    """

    channels: int
    embedding: int
    kind: str
    attach: Callable[[Seen], list[Any]] = field(repr=False)
    patch: int = 1

    @contextmanager
    def reading(self) -> Iterator[Seen]:
        """Reads during the passes within the context, and leaves the network as it was."""
        seen = Seen()
        hooks = self.attach(seen)
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()


def network_of(denoiser: nn.Module) -> nn.Module | None:
    """The network within a denoiser and its wrappers; None if it has none."""
    here: Any = denoiser
    while not hasattr(here, "net"):
        here = getattr(here, "inner", None)
        if here is None:
            return None
    net: nn.Module = here.net
    return net


def tap_of(denoiser: nn.Module) -> Tap:
    """The tap of a denoiser's network: ours, diffusers' UNet2DModel, UNet2DConditionModel or DiTTransformer2DModel.

    Raises:
        ValueError: If the network has none that is known.
    """
    tap = find_tap(network_of(denoiser))
    if tap is None:
        name = type(network_of(denoiser) or denoiser).__name__
        raise ValueError(f"the network of this denoiser ({name}) has no known feature map: use the head 'separate', which "
                         "needs none")  # fmt: skip
    return tap


def find_tap(net: nn.Module | None) -> Tap | None:
    """The tap of a network; None if it has none that is known."""
    if isinstance(net, Net):
        return _ours(net)
    model: Any = getattr(net, "model", net)
    last = getattr(model, "conv_norm_out", None) or getattr(model, "conv_out", None)
    time = getattr(model, "time_embedding", None)
    if isinstance(getattr(model, "conv_out", None), nn.Conv2d) and last is not None:
        size = model.time_embedding.linear_2.out_features if hasattr(time, "linear_2") else 0
        return Tap(model.conv_out.in_channels, size, "map", _hooks(last, time if size else None))
    if isinstance(getattr(model, "norm_out", None), nn.LayerNorm) and hasattr(model, "transformer_blocks"):
        width, config = model.norm_out.normalized_shape[0], model.config
        embed = getattr(getattr(model.transformer_blocks[0], "norm1", None), "emb", None)
        return Tap(width, width if embed is not None else 0, "tokens", _hooks(model.norm_out, embed), config.patch_size)
    return None


def _hooks(last: nn.Module, embed: nn.Module | None) -> Callable[[Seen], list[Any]]:
    """Reads what enters the module `last`, and what leaves `embed`."""

    def attach(seen: Seen) -> list[Any]:
        def features(module: nn.Module, given: tuple[Any, ...]) -> None:
            seen.h = given[0].detach()

        def embedding(module: nn.Module, given: tuple[Any, ...], out: Tensor) -> None:
            seen.emb = out.detach()

        hooks = [last.register_forward_pre_hook(features)]
        return hooks if embed is None else [*hooks, embed.register_forward_hook(embedding)]

    return attach


def _ours(net: Net) -> Tap:
    """Of our networks, `features` ends where `head` begins, in any subclass."""

    class Shadow:
        """Stands before the method `head` of one network, as long as it is read."""

        def remove(self) -> None:
            del net.__dict__["head"]

    def attach(seen: Seen) -> list[Any]:
        method = net.head

        def head(h: Tensor) -> Tensor:
            seen.h = h.detach()
            return method(h)

        def embedding(module: nn.Module, given: tuple[Any, ...], out: Tensor) -> None:
            seen.emb = out.detach()

        net.__dict__["head"] = head
        return [Shadow(), net.embed.register_forward_hook(embedding)]

    kind = "vector" if isinstance(getattr(net, "out", None), nn.Linear) else "map"
    return Tap(net.feature_channels, net.embed.channels, kind, attach)


# ---- heads


class Simple(nn.Module):
    r"""Group norm, SiLU, convolution: h (B, channels, H, W) to (B, out, H, W).

    Arguments:
        channels: Of the features.
        out: Channels of the output.
        block: For coefficients in blocks of this side (`basis.DCT`): the convolution sees a block and gives all of its
            coefficients, since a coefficient's place within its block is not visible to a moving kernel.
        style: "iddpm" (norm with eps 1e-5) or "ddpm" (1e-6), after the networks the official heads belong to.
        zero: Start from an output of zero; official "ddpm" heads do not.

    References:
        | `J-zin/OCM_DPM`: libs/iddpm/customized.py and libs/ddpm/customized.py, mode "simple"
        | https://arxiv.org/abs/2406.10808
    """

    taps = True

    def __init__(self, channels: int, out: int, block: int = 1, style: str = "iddpm", zero: bool = True):
        super().__init__()
        _check_style(style)
        self.norm = _norm(channels, style)
        self.block = block
        if block == 1:
            self.conv = nn.Conv2d(channels, out, 3, padding=1)
        else:
            self.conv = nn.Conv2d(channels, out * block * block, block, stride=block)
        if zero:
            zeroed(self.conv)

    def forward(self, h: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.conv(F.silu(self.norm(h)))
        return h if self.block == 1 else F.pixel_shuffle(h, self.block)


class Complex(nn.Module):
    r"""A residual block that knows the time, then `Simple`: h (B, channels, H, W) and emb (B, embedding) to (B, out, H, W).

    In style "iddpm" the embedding scales and shifts the second norm, in "ddpm" it is added between the convolutions.

    Arguments:
        channels: Of the features.
        out: Channels of the output.
        embedding: Size of the embedding of time.
        block: As in `Simple`.
        style: As in `Simple`.
        zero: As in `Simple`.
        dropout: Within the block, while it is trained.

    References:
        | As for `Simple`, mode "complex"
    """

    taps = True

    def __init__(
        self,
        channels: int,
        out: int,
        embedding: int,
        block: int = 1,
        style: str = "iddpm",
        zero: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        _check_style(style)
        self.style = style
        self.norm1, self.norm2 = _norm(channels, style), _norm(channels, style)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.condition = nn.Linear(embedding, channels * (2 if style == "iddpm" else 1))
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        if zero or style == "iddpm":
            zeroed(self.conv2)
        self.simple = Simple(channels, out, block, style, zero)

    def forward(self, h: Tensor, emb: Tensor | None = None) -> Tensor:
        if emb is None:
            raise ValueError("this head needs an embedding of time, and the network has none to tap: use the head 'simple'")
        inner, condition = self.conv1(F.silu(self.norm1(h))), self.condition(F.silu(emb))
        if self.style == "iddpm":
            inner = modulated(self.norm2(inner), condition)
        else:
            inner = self.norm2(inner + condition[..., None, None])
        return self.simple(h + self.conv2(self.dropout(F.silu(inner))))


class Vector(nn.Module):
    """Norm, SiLU, linear layer: features (B, channels) to (B, *shape)."""

    taps = True

    def __init__(self, channels: int, shape: tuple[int, ...], embedding: int = 0):
        super().__init__()
        self.shape = shape
        self.block = VectorBlock(channels, embedding) if embedding else None
        self.norm = nn.LayerNorm(channels)
        self.out = zeroed(nn.Linear(channels, math.prod(shape)))

    def forward(self, h: Tensor, emb: Tensor | None = None) -> Tensor:
        if self.block is not None:
            h = self.block(h, emb)
        return self.out(F.silu(self.norm(h))).unflatten(1, self.shape)


class Tokens(nn.Module):
    """Norm that time scales and shifts, linear layer, patches put together: tokens (B, N, width) to (B, out, H, W)."""

    taps = True

    def __init__(self, width: int, out: int, patch: int, embedding: int, shape: tuple[int, ...], block: int = 1):
        super().__init__()
        self.rows, self.columns = shape[-2] // patch, shape[-1] // patch
        self.patch, self.channels = patch, out
        if block > 1 and patch % block:
            raise ValueError(f"`block` of {block} must divide the patch of {patch} that a token stands for: choose another")
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.condition = zeroed(nn.Linear(embedding, 2 * width)) if embedding else None
        self.out = zeroed(nn.Linear(width, patch * patch * out))

    def forward(self, h: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.norm(h)
        if self.condition is not None and emb is not None:
            scale, shift = self.condition(F.silu(emb)).unsqueeze(1).chunk(2, dim=-1)
            h = h * (1.0 + scale) + shift
        h = self.out(h).transpose(1, 2).unflatten(2, (self.rows, self.columns))
        return F.pixel_shuffle(h, self.patch)


class Separate(nn.Module):
    """A small network of its own on (x_t, eps, lam), for trunks without a tap: (B, *shape), as accurate as it is large.

    Arguments:
        shape: Of one example: an image (C, H, W), or anything that is flattened.
        width: Channels.
        depth: Residual blocks.
        block: As in `Simple`.
    """

    taps = False

    def __init__(self, shape: tuple[int, ...], width: int = 32, depth: int = 2, block: int = 1):
        super().__init__()
        self.embed, self.image = Embedding(2 * width), len(shape) == 3
        if self.image:
            self.stem: nn.Module = nn.Conv2d(2 * shape[0], width, 3, padding=1)
            self.blocks = nn.ModuleList(Block(width, 2 * width) for _ in range(depth))
            self.norm: nn.Module = PixelNorm(width)
            self.last: nn.Module = Simple(width, shape[0], block)
        else:
            size = math.prod(shape)
            self.stem = nn.Linear(2 * size, 4 * width)
            self.blocks = nn.ModuleList(VectorBlock(4 * width, 2 * width) for _ in range(depth))
            self.norm = nn.LayerNorm(4 * width)
            self.last = Vector(4 * width, shape)

    def forward(self, x: Tensor, eps: Tensor, lam: Level) -> Tensor:
        weight = next(self.stem.parameters())
        level = levels(lam, x).clamp(-40.0, 40.0)  # sines of an infinite level would be NaN
        emb = self.embed(-level / 8)
        # unit variance, whatever the process
        size = x.square().flatten(1).mean(1).clamp_min(1e-12).rsqrt().reshape(-1, *[1] * (x.ndim - 1))
        given = torch.cat([x * size, eps], dim=1) if self.image else torch.cat([(x * size).flatten(1), eps.flatten(1)], dim=1)
        h = self.stem(given.to(weight.dtype))
        for block in self.blocks:
            h = block(h, emb)
        return self.last(self.norm(h))


def make_head(denoiser: Denoiser, kind: str = "simple", block: int = 1, shape: tuple[int, ...] | None = None) -> nn.Module:
    """A head for a denoiser, with an output of zero: "simple" or "complex" on its features, or "separate" from it.

    Arguments:
        denoiser: What it is for.
        kind: One of `HEADS`.
        block: Side of the blocks when it predicts cosine coefficients.
        shape: Of one example; None asks the denoiser.

    Raises:
        ValueError: For an unknown kind or shape, or a network without a tap.
    """
    if kind not in HEADS:
        raise ValueError(f"`head` must be one of {', '.join(HEADS)} (got {kind!r})")
    shape = denoiser.shape if shape is None else shape
    if shape is None:
        raise ValueError("`shape` of one example is needed: this denoiser does not say it")
    if kind == "separate":
        _check_block(block, shape)
        return Separate(shape, block=block)
    return head_on(tap_of(denoiser), shape, kind, block)


def head_on(tap: Tap, shape: tuple[int, ...], kind: str, block: int = 1) -> nn.Module:
    """A "simple" or "complex" head for a tap, with an output of zero; arguments and errors as in `make_head`."""
    _check_block(block, shape)
    embedding = tap.embedding if kind == "complex" else 0
    if kind == "complex" and not embedding and tap.kind == "map":
        raise ValueError("the head 'complex' needs an embedding of time, and this network has none to tap: use 'simple'")
    if tap.kind == "vector":
        return Vector(tap.channels, shape, embedding)
    if tap.kind == "tokens":
        return Tokens(tap.channels, shape[0], tap.patch, tap.embedding, shape, block)
    return Complex(tap.channels, shape[0], embedding, block) if embedding else Simple(tap.channels, shape[0], block)


def _check_block(block: int, shape: tuple[int, ...]) -> None:
    if block > 1 and len(shape) != 3:
        raise ValueError(f"`block` {block} is for images (got examples of shape {shape}): use the pixel basis")


def _norm(channels: int, style: str) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-5 if style == "iddpm" else 1e-6)


def _check_style(style: str) -> None:
    if style not in ("iddpm", "ddpm"):
        raise ValueError(f"`style` must be 'iddpm' or 'ddpm' (got {style!r})")
