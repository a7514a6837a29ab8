r"""Plain torch networks that take a time: a compact U-Net and a classifier; `mlp` has one for vectors.

They know nothing of diffusion. A network maps a noisy `x`, a number `t` per example and an optional class
`label` to an output of the shape of `x`; what `t` means (a function of the log-SNR) and what the output means
(eps, v, x0) is decided by whoever wraps it.

The U-Net is built for CPUs and small images. A thin full-resolution convolution is folded (2 x 2 pixels into
channels) before the first level, so that nearly all arithmetic happens at half and quarter resolution; the thin
map is added back before the output, so that edges stay sharp. Normalisation is over the channels of each pixel,
which in channels-last memory is a contiguous reduction and couples neither pixels nor examples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .networks.fourier import fourier

__all__ = ["Classifier", "Embedding", "Net", "UNet"]

L = TypeVar("L", nn.Linear, nn.Conv2d)


class Net(nn.Module, ABC):
    r"""Network of (x, t, label) whose last layer can be taken off.

    Attributes:
        embed: Module (t, label) -> (B, embed.channels), the condition of every block; heads may reuse it.
        feature_channels: Channels of the map that `features` returns.
    """

    embed: Embedding
    feature_channels: int

    @abstractmethod
    def features(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        r"""Map just before the output layer: (B, feature_channels, H, W); (B, feature_channels) for an MLP.

        Arguments:
            x: Input (B, *).
            t: Time, shape (B,), or () for one shared by all; any real numbers, see :class:`Embedding`.
            label: Classes (B,) or (), int64 in 0..classes, where `classes` is the null label; so is None.

        Raises:
            ValueError: If a shape does not fit the network, or a label is given to a network without classes.
        """

    @abstractmethod
    def head(self, h: Tensor) -> Tensor:
        r"""Output layer: turns the map of `features` into the output (B, out_channels, *)."""

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        r"""Output (B, out_channels, *), zero before training; arguments and errors as in `features`."""
        return self.head(self.features(x, t, label))


class Embedding(nn.Module):
    r"""Embedding of a time and a class.

    The time enters as sines and cosines of `t_scale * t` at geometric angular frequencies from 1/8 to 16. The
    slowest sine is monotone over [-10, 10], the fastest tells apart times that differ by 0.01: scale times so that
    they fall within [-10, 10]. A quarter or an eighth of a log-SNR does as it is; indices 0..1000 want `t_scale=0.01`.

    Arguments:
        channels: Size of the embedding.
        classes: Number of classes; 0 for an unconditional network. Index `classes` is the null label.
        t_scale: Factor applied to t.
        frequencies: Number of sine-cosine pairs.
    """

    def __init__(self, channels: int, classes: int = 0, t_scale: float = 1.0, frequencies: int = 32) -> None:
        super().__init__()
        if classes < 0:
            raise ValueError(f"`classes` must be at least 0 (got {classes}): 0 makes an unconditional network")
        self.channels, self.classes, self.t_scale, self.frequencies = channels, classes, t_scale, frequencies
        self.time = nn.Sequential(nn.Linear(2 * frequencies, channels), nn.SiLU(), nn.Linear(channels, channels))
        self.label = nn.Embedding(classes + 1, channels) if classes else None

    def forward(self, t: Tensor, label: Tensor | None = None) -> Tensor:
        r"""Embedding (B, channels) of the times t (B,) and the labels (B,)."""
        return self.with_label(self.time(self.waves(t).to(next(self.time.parameters()).dtype)), t, label)

    def with_label(self, h: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        r"""The embedding (B, channels) of times h (B, channels) and labels, ready for the blocks."""
        if self.label is not None:
            h = h + self.label(self.checked(label, t))
        elif label is not None:
            raise ValueError("`label` was given to a network without classes: build it with classes=N or drop the label")
        return F.silu(h)

    def waves(self, t: Tensor) -> Tensor:
        r"""Sines and cosines (B, 2 frequencies) of the times t (B,)."""
        # In the precision of t, float32 at least: rounding t to bfloat16 would merge neighbouring levels. The
        # frequencies are recomputed so that no half-precision copy of the network can round them either.
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        octaves = torch.linspace(-3, 4, self.frequencies, dtype=t.dtype, device=t.device)
        angle = (self.t_scale * t)[:, None] * octaves.exp2()
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    def checked(self, label: Tensor | None, t: Tensor) -> Tensor:
        r"""Labels (B,) on the device of t (B,); the null label for None."""
        if label is None:
            return torch.full(t.shape, self.classes, dtype=torch.long, device=t.device)
        if label.dtype != torch.long or label.shape not in (t.shape, ()):
            raise ValueError(
                f"`label` must be int64 of shape ({len(t)},) (got {label.dtype}, {tuple(label.shape)}): "
                "pass one class index per example"
            )
        # Looking at the values would stall a GPU, which reports a bad index by itself.
        if label.device.type == "cpu" and label.numel() and not torch.compiler.is_compiling():
            low, high = int(label.min()), int(label.max())
            if low < 0 or high > self.classes:
                raise ValueError(f"`label` must be in 0..{self.classes} (got {low}..{high}): {self.classes} is null")
        return label.to(t.device).expand(t.shape)


def per_example(t: Tensor, x: Tensor) -> Tensor:
    """Time as (B,), on the device of x."""
    if t.shape not in ((), (1,), x.shape[:1]):
        raise ValueError(f"`t` must have shape ({len(x)},) (got {tuple(t.shape)}): pass one time per example")
    return t.to(x.device).expand(len(x))


def zeroed(layer: L) -> L:
    """The layer with zero weights: a branch that starts as nothing."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def modulated(h: Tensor, scale_shift: Tensor) -> Tensor:
    """h (B, C, *) times (1 + scale) plus shift, both from (B, 2C)."""
    # One fused pass; the cast is for autocast, where linear layers and norms answer in different dtypes.
    scale, shift = scale_shift.to(h.dtype).reshape(*scale_shift.shape, *(1,) * (h.ndim - 2)).chunk(2, dim=1)
    return torch.addcmul(shift, h, 1 + scale)


class PixelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Block(nn.Module):
    """Residual block of two 3x3 convolutions; the condition scales and shifts the second norm."""

    def __init__(self, channels: int, embedding: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = PixelNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = PixelNorm(channels)
        self.condition = zeroed(nn.Linear(embedding, 2 * channels))
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor, embedded: Tensor | None) -> Tensor:
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if embedded is not None:
            h = modulated(h, self.condition(embedded))
        return x + self.conv2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Residual self-attention over the pixels of (B, C, H, W)."""

    def __init__(self, channels: int, head: int = 32) -> None:
        super().__init__()
        self.heads = channels // head or 1
        if channels % self.heads:
            raise ValueError(f"`width` must give attention a multiple of {head} channels (got {channels}): change it or `mult`")
        self.norm = PixelNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, c // self.heads))
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(-1, -2).reshape(b, c, h, w))


class Level(nn.Module):
    """Blocks at one resolution, and self-attention after them if wanted."""

    def __init__(self, channels: int, blocks: int, attend: bool, embedding: int, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(channels, embedding, dropout) for _ in range(blocks))
        self.attention = Attention(channels) if attend else nn.Identity()

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, embedded)
        return self.attention(x)


class UNet(Net):
    r"""Compact U-Net for images.

    Any height and width divisible by `patch * 2**(levels - 1)` will do: `size` only chooses the defaults. Skips are
    added, not concatenated, which keeps every convolution at the width of its level.

    Arguments:
        channels: Channels of the images.
        size: Usual side of the images in pixels, from which `mult` and `patch` are chosen when absent.
        width: Channels of the first level.
        mult: Width of each level as a multiple of `width`; a level has half the resolution of the one before.
            By default levels are added until the side is at most 8 pixels, or odd.
        blocks: Residual blocks of each level, on the way down and again on the way up; a number or one per level.
        attention: Levels (0 is the finest) with self-attention on the way down; the last one by default. Fused
            attention has no forward-mode derivative: `attention=()` makes a network for `torch.func.jvp`.
        patch: Pixels on a side that are folded into the channels of the first level; by default 1 below 16
            pixels, 2 up to 64, then 4.
        classes: Number of classes; 0 for an unconditional network. Index `classes` is the null label.
        dropout: Share of the activations dropped in the blocks while training.
        out_channels: Channels of the output; `channels` by default.
        detail: Channels of the full-resolution path, which is also the map that `features` returns.
        t_scale: Factor on t that brings it within [-10, 10], see :class:`Embedding`.
        powers: Fourier features of the input, see `networks.fourier`: (6, 7) for likelihoods of 8-bit images.

    Raises:
        ValueError: If an argument is out of range, or `size` is not divisible as said above.

    Example:
        >>> net = UNet(channels=1, size=28, classes=10)
        >>> net(torch.zeros(2, 1, 28, 28), torch.zeros(2), torch.tensor([3, 10])).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self,
        channels: int = 1,
        size: int = 28,
        width: int = 48,
        mult: Sequence[int] | None = None,
        blocks: int | Sequence[int] = 1,
        attention: Sequence[int] | None = None,
        patch: int | None = None,
        classes: int = 0,
        dropout: float = 0.0,
        out_channels: int | None = None,
        detail: int = 16,
        t_scale: float = 1.0,
        powers: tuple[float, ...] = (),
    ) -> None:
        super().__init__()
        patch = patch or (1 if size < 16 else 2 if size <= 64 else 4)
        mult = tuple(mult) if mult is not None else default_mult(size // patch)
        levels = len(mult)
        counts = (blocks,) * levels if isinstance(blocks, int) else tuple(blocks)
        attention = (levels - 1,) if attention is None else tuple(attention)
        check_unet(size, mult, counts, attention, patch)

        self.channels, self.out_channels, self.patch, self.powers = channels, out_channels or channels, patch, tuple(powers)
        self.feature_channels = detail
        self.multiple = patch * 2 ** (levels - 1)
        widths = [width * m for m in mult]
        self.embed = Embedding(4 * width, classes, t_scale)

        def level(i: int, attend: bool = False) -> Level:
            return Level(widths[i], counts[i], attend, self.embed.channels, dropout)

        self.detail = nn.Conv2d(channels * (1 + 2 * len(self.powers)), detail, 3, padding=1)
        self.stem = nn.Conv2d(detail, widths[0], patch, stride=patch)
        self.encoder = nn.ModuleList(level(i, i in attention) for i in range(levels))
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairwise(widths))
        self.decoder = nn.ModuleList(level(i) for i in range(levels))
        self.unfold = nn.ConvTranspose2d(widths[0], detail, patch, stride=patch)
        self.sharpen = Block(detail, self.embed.channels)
        self.norm = PixelNorm(detail)
        self.out = zeroed(nn.Conv2d(detail, self.out_channels, 3, padding=1))

    def features(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        self.check(x)
        embedded = self.embed(per_example(t, x), label)
        # Channels-last from here on, whatever the layout of x: the norms want it, and on CPUs convolutions with few
        # channels are several times faster in it.
        detail = self.detail(fourier(x, self.powers)).contiguous(memory_format=torch.channels_last)
        h = self.encoder[0](self.stem(detail), embedded)
        skips = []
        for down, level in zip(self.down, self.encoder[1:], strict=True):
            skips.append(h)
            h = level(down(h), embedded)
        h = self.decoder[-1](h, embedded)
        for i in reversed(range(len(skips))):
            h = self.decoder[i](self.up[i](h) + skips[i], embedded)
        return self.sharpen(self.unfold(h) + detail, embedded)

    def head(self, h: Tensor) -> Tensor:
        return self.out(F.silu(self.norm(h)))

    def check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"`x` must have shape (B, {self.channels}, H, W) (got {tuple(x.shape)}): build the network "
                "with the channels of the images"
            )
        if x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            raise ValueError(
                f"`x` must have height and width divisible by {self.multiple} (got {tuple(x.shape[2:])}): "
                "pad or crop the images, or build the network with a smaller patch or fewer levels"
            )


def default_mult(side: int) -> tuple[int, ...]:
    """Levels until the side is at most 8 pixels or odd, and at least two where the side allows."""
    mult = [1]
    while side % 2 == 0 and side > 4 and (side > 8 or len(mult) == 1):
        side //= 2
        mult.append(3 if side <= 8 else 2)
    return tuple(mult)


def check_unet(size: int, mult: tuple[int, ...], counts: tuple[int, ...], attention: tuple[int, ...], patch: int) -> None:
    levels, multiple = len(mult), patch * 2 ** (len(mult) - 1)
    if size % multiple:
        raise ValueError(f"`size` must be divisible by patch * 2**(levels - 1) = {multiple} (got {size}): pad or crop")
    if len(counts) != levels:
        raise ValueError(f"`blocks` must be one number or {levels}, one per entry of `mult` (got {len(counts)})")
    if not set(attention) <= set(range(levels)):
        raise ValueError(f"`attention` must name levels in 0..{levels - 1} (got {attention})")


class Classifier(nn.Module):
    r"""Small residual convolutional classifier, and its features.

    Examples are never coupled, so its features make a fixed extractor whatever the batch. A time makes it a
    classifier of noisy images, the guide of classifier guidance; without one the input is taken as clean.

    Arguments:
        channels: Channels of the images, of any height and width from 4 pixels.
        classes: Number of classes.
        width: Channels at half resolution; 3/2 of it, the features, at a quarter.
        blocks: Residual blocks at a quarter of the resolution.
        dropout: Share of the features dropped while training.
        t_scale: Factor on t that brings it within [-10, 10], see :class:`Embedding`.
    """

    def __init__(
        self,
        channels: int = 1,
        classes: int = 10,
        width: int = 64,
        blocks: int = 2,
        dropout: float = 0.1,
        t_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.channels, self.classes, self.feature_channels = channels, classes, 3 * width // 2
        self.embed = Embedding(width, t_scale=t_scale)
        self.stem = nn.Conv2d(channels, width, 4, stride=2, padding=1)
        self.fine = Block(width, width)
        self.down = nn.Conv2d(width, self.feature_channels, 2, stride=2)
        self.coarse = nn.ModuleList(Block(self.feature_channels, width) for _ in range(blocks))
        self.norm = PixelNorm(self.feature_channels)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(self.feature_channels, classes)

    def features(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        r"""Pooled features (B, feature_channels) of the images x (B, channels, H, W) at the times t (B,)."""
        if x.ndim != 4 or x.shape[1] != self.channels or min(x.shape[2:]) < 4:
            raise ValueError(
                f"`x` must have shape (B, {self.channels}, H, W), at least 4 x 4 pixels (got {tuple(x.shape)}): "
                "build the classifier with the channels of the images"
            )
        embedded = None if t is None else self.embed(per_example(t, x))
        h = self.stem(x).contiguous(memory_format=torch.channels_last)
        h = self.down(self.fine(h, embedded))
        for block in self.coarse:
            h = block(h, embedded)
        # The strongest answer of each channel: 89 % after an epoch of Fashion-MNIST, where the mean gives 85 %.
        return F.silu(self.norm(h)).amax(dim=(2, 3))

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        r"""Logits (B, classes) of the images x (B, channels, H, W), noisy at the times t (B,) or clean."""
        return self.out(self.dropout(self.features(x, t)))
