r"""The U-Nets of the papers, out of one: DDPM, improved DDPM, DDPM++, NCSN++, ADM.

They differ by a few choices, each an argument of `LargeUNet`: how the time is embedded and enters a block, how resolutions
change, where attention is, how skips are added. The named ones at the end are those choices. `nets.UNet` is the one for
small images and CPUs; these need a GPU to train.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nets import Embedding, Net, modulated, per_example, zeroed

__all__ = ["LargeUNet", "WaveEmbedding", "adm", "ddpm", "ddpmpp", "iddpm", "ncsnpp"]

Resample = Literal["up", "down"] | None


class WaveEmbedding(Embedding):
    r"""Embedding of a time, a class and an augmentation, the time as in the papers.

    Arguments:
        channels: Size of the embedding.
        classes: Number of classes; 0 for an unconditional network. Index `classes` is the null label.
        t_scale: Factor applied to t.
        frequencies: Number of sine-cosine pairs.
        kind: "sines" takes angular frequencies from 1 to 1/10000, for times such as indices up to 1000; "fourier" takes
            random ones, 2 pi 16 times a normal, for times of size 1, and keeps them.
        augment: Numbers that tell of an augmentation; 0 for none.
    """

    frequency: Tensor

    def __init__(
        self,
        channels: int,
        classes: int = 0,
        t_scale: float = 1.0,
        frequencies: int = 64,
        kind: Literal["sines", "fourier"] = "sines",
        augment: int = 0,
    ) -> None:
        super().__init__(channels, classes, t_scale, frequencies)
        self.kind, self.augments = kind, augment
        if kind == "fourier":
            self.register_buffer("frequency", torch.empty(frequencies).normal_(0.0, 32 * math.pi))
        # without a bias, and zero at first: the network without augmentation is the same with all labels zero
        self.augment = zeroed(nn.Linear(augment, 2 * frequencies, bias=False)) if augment else None

    def forward(self, t: Tensor, label: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        r"""Embedding (B, channels) of times t (B,), labels (B,) and augmentations (B, augment); None is untouched."""
        waves = self.waves(t).to(next(self.time.parameters()).dtype)
        if augment is not None:
            if self.augment is None:
                raise ValueError("`augment` was given to a network that knows none: build it with augment=9, or drop it")
            if augment.shape != (len(t), self.augments):
                raise ValueError(f"`augment` must have shape ({len(t)}, {self.augments}) (got {tuple(augment.shape)})")
            waves = waves + self.augment(augment.to(waves))
        return self.with_label(self.time(waves), t, label)

    def waves(self, t: Tensor) -> Tensor:
        t = self.t_scale * t.to(torch.promote_types(t.dtype, torch.float32))  # wide, as in `Embedding`
        if self.kind == "fourier":
            frequency = self.frequency.to(t)
        else:
            powers = torch.linspace(0, 1, self.frequencies, dtype=t.dtype, device=t.device)
            frequency = torch.exp(-math.log(10_000) * powers)
        angle = t[:, None] * frequency
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class LargeUNet(Net):
    r"""U-Net of residual blocks with skips that are concatenated.

    Height and width must be divisible by 2**(levels - 1). Its layers, and so the number of its parameters, are those of the
    networks that it can be (see the names below); code and initialisation are our own.

    Arguments:
        channels: Channels of the images.
        size: Their usual side in pixels: says at which levels the resolutions of `attention` are.
        width: Channels of the first level, before `mult`.
        mult: Width of each level as a multiple of `width`; a level has half the resolution of the one before.
        blocks: Residual blocks of each level on the way down; one more on the way up.
        attention: Resolutions with self-attention, in pixels.
        classes: Number of classes; 0 for an unconditional network. Index `classes` is the null label.
        dropout: Share of the activations dropped in the blocks while training.
        augment: Numbers that tell of an augmentation, 9 for EDM's; 0 for none.
        out_channels: Channels of the output; `channels` by default.
        embedding: How the time enters, "sines" or "fourier", see :class:`WaveEmbedding`.
        condition: The embedding "shift"s the second norm, or "scale-shift"s it.
        resample: Resolution changes within a residual "block", or by a "conv" between two.
        fir: Blur with (1, 3, 3, 1) when the resolution changes, instead of averages and copies of 2 x 2 pixels.
        project: Blocks that change the resolution have a 1x1 convolution on their skip even where the width stays.
        residual_input: Add the shrunken image to every level on the way down, through a convolution.
        rescale: Divide sums by sqrt(2), which keeps their variance.
        attend_up: Attention of the way up in the "last" block of a level only, or in "all".
        heads: Attention heads, unless `head_channels` says how many channels each has.
        head_channels: Channels of a head.
        t_scale: Factor on t.

    Raises:
        ValueError: If an argument is out of range.

    References:
        | Score-Based Generative Modeling through SDEs (Song et al., 2021), appendix H, https://arxiv.org/abs/2011.13456
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), table 7,
        | https://arxiv.org/abs/2206.00364
        | Diffusion Models Beat GANs on Image Synthesis (Dhariwal, Nichol, 2021), https://arxiv.org/abs/2105.05233

    Example:
        >>> net = LargeUNet(size=8, width=8, mult=(1, 2), blocks=1, attention=(4,), augment=9)
        >>> net(torch.zeros(2, 3, 8, 8), torch.zeros(2), augment=torch.zeros(2, 9)).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self,
        channels: int = 3,
        size: int = 32,
        width: int = 128,
        mult: Sequence[int] = (2, 2, 2),
        blocks: int = 4,
        attention: Sequence[int] = (16,),
        classes: int = 0,
        dropout: float = 0.1,
        augment: int = 0,
        out_channels: int | None = None,
        embedding: Literal["sines", "fourier"] = "sines",
        condition: Literal["shift", "scale-shift"] = "shift",
        resample: Literal["block", "conv"] = "block",
        fir: bool = False,
        project: bool = True,
        residual_input: bool = False,
        rescale: bool = True,
        attend_up: Literal["last", "all"] = "last",
        heads: int = 1,
        head_channels: int | None = None,
        t_scale: float = 1.0,
    ) -> None:
        super().__init__()
        sides = [size >> level for level in range(len(mult))]
        _check(size, width, tuple(mult), tuple(attention), sides)
        self.channels, self.out_channels, self.multiple = channels, out_channels or channels, 2 ** (len(mult) - 1)
        self.scale = math.sqrt(0.5) if rescale else 1.0
        frequencies = width if embedding == "fourier" else width // 2
        self.embed: WaveEmbedding = WaveEmbedding(4 * width, classes, t_scale, frequencies, embedding, augment)

        def block(c_in: int, c_out: int, attend: bool = False, change: Resample = None) -> nn.Module:
            if change and resample == "conv":
                return ConvResample(c_in, change)
            n = (c_out // head_channels if head_channels else heads) if attend else 0
            return ResBlock(c_in, c_out, self.embed.channels, dropout, condition, change, fir, project, n, self.scale)

        attend = [side in attention for side in sides]
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.inputs, kept = _way_down(block, channels, width, mult, blocks, attend, residual_input)
        self.middle = nn.ModuleList([block(kept[-1], kept[-1], True), block(kept[-1], kept[-1])])
        self.up = _way_up(block, kept, width, mult, blocks, attend, attend_up == "all")
        c = mult[0] * width
        self.feature_channels, self.fir = c, fir
        self.norm = _norm(c)
        self.out = nn.Conv2d(c, self.out_channels, 3, padding=1)
        _initialise(self)
        zeroed(self.out)

    def features(self, x: Tensor, t: Tensor, label: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        self.check(x)
        embedded = self.embed(per_example(t, x), label, augment)
        h, image, level = self.stem(x), x, 0
        kept = [h]
        for module in self.down:
            h = module(h, embedded)
            if module.change and len(self.inputs):
                # the image goes along, shrunken; from the second level on, what it was made of with the features
                image = h = (_shrink(self.inputs[level](image), self.fir) + h) * self.scale
                level += 1
            kept.append(h)
        for module in self.middle:
            h = module(h, embedded)
        for module in self.up:
            h = module(h if module.change else torch.cat([h, kept.pop()], dim=1), embedded)
        return h

    def head(self, h: Tensor) -> Tensor:
        return self.out(F.silu(self.norm(h)))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        r"""Output (B, out_channels, H, W), zero before training.

        Arguments:
            x: Images (B, channels, H, W).
            t: Time, shape (B,), or () for one shared by all.
            label: Classes (B,) or (), int64; None is the null label.
            augment: What was done to each image, (B, augment); None is nothing.
        """
        return self.head(self.features(x, t, label, augment))

    def check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.channels or x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            raise ValueError(
                f"`x` must have shape (B, {self.channels}, H, W), height and width divisible by {self.multiple} "
                f"(got {tuple(x.shape)}): build the network for these images, or resize them"
            )


def _way_down(
    block: Callable[..., nn.Module],
    channels: int,
    width: int,
    mult: Sequence[int],
    blocks: int,
    attend: Sequence[bool],
    residual_input: bool,
) -> tuple[nn.ModuleList, nn.ModuleList, list[int]]:
    """The blocks down to the lowest resolution, convolutions of the image, and the channels of every map that is kept."""
    down, inputs, kept = nn.ModuleList(), nn.ModuleList(), [width]
    for level, m in enumerate(mult):
        if level:
            down.append(block(kept[-1], kept[-1], change="down"))
            if residual_input:
                c_image = mult[level - 2] * width if level > 1 else channels
                inputs.append(nn.Conv2d(c_image, kept[-1], 3, padding=1))
            kept.append(kept[-1])
        for _ in range(blocks):
            down.append(block(kept[-1], m * width, attend[level]))
            kept.append(m * width)
    return down, inputs, kept


def _way_up(
    block: Callable[..., nn.Module],
    kept: Sequence[int],
    width: int,
    mult: Sequence[int],
    blocks: int,
    attend: Sequence[bool],
    attend_all: bool,
) -> nn.ModuleList:
    """The blocks back to the full resolution; each but those that change it takes a map that was kept."""
    up, c, left = nn.ModuleList(), kept[-1], list(kept)
    for level in reversed(range(len(mult))):
        if level < len(mult) - 1:
            up.append(block(c, c, change="up"))
        for k in range(blocks + 1):
            up.append(block(c + left.pop(), mult[level] * width, attend[level] and (attend_all or k == blocks)))
            c = mult[level] * width
    return up


class ResBlock(nn.Module):
    """Residual block of two 3x3 convolutions, at another resolution if asked, with self-attention after it if asked."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        embedding: int,
        dropout: float,
        condition: str,
        change: Resample,
        fir: bool,
        project: bool,
        heads: int,
        scale: float,
    ) -> None:
        super().__init__()
        self.change, self.fir, self.scale, self.both = change, fir, scale, condition == "scale-shift"
        self.norm1 = _norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.condition = nn.Linear(embedding, 2 * c_out if self.both else c_out)
        self.norm2 = _norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out or (change and project) else nn.Identity()
        self.attention = Attention(c_out, heads, scale) if heads else nn.Identity()

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        h = F.silu(self.norm1(x))
        if self.change:
            resized = _shrink if self.change == "down" else _grow
            h, x = resized(h, self.fir), resized(x, self.fir)
        h, told = self.conv1(h), self.condition(embedded)
        h = modulated(self.norm2(h), told) if self.both else self.norm2(h + told.to(h.dtype)[:, :, None, None])
        h = self.conv2(self.dropout(F.silu(h)))
        return self.attention((self.skip(x) + h) * self.scale)


class Attention(nn.Module):
    """Residual self-attention over the pixels of (B, C, H, W)."""

    def __init__(self, channels: int, heads: int, scale: float) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"`heads` must divide the {channels} channels of attention (got {heads}): change `head_channels`")
        self.heads, self.scale = heads, scale
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, c // self.heads))
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return (x + self.out(mixed.transpose(-1, -2).reshape(b, c, h, w))) * self.scale


class ConvResample(nn.Module):
    """Half the resolution by a strided convolution, or twice by copies and a convolution."""

    def __init__(self, channels: int, change: Resample) -> None:
        super().__init__()
        self.change = change
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if change == "down" else 1, padding=1)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        return self.conv(x if self.change == "down" else _grow(x, False))


def _norm(channels: int) -> nn.GroupNorm:
    """Of 32 groups, or fewer of at least 4 channels."""
    groups = max(n for n in range(1, min(32, max(channels // 4, 1)) + 1) if channels % n == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


def _blur(x: Tensor) -> Tensor:
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype, device=x.device) / 8
    return (taps[:, None] * taps).expand(x.shape[1], 1, 4, 4)


def _shrink(x: Tensor, fir: bool) -> Tensor:
    return F.conv2d(x, _blur(x), stride=2, padding=1, groups=x.shape[1]) if fir else F.avg_pool2d(x, 2)


def _grow(x: Tensor, fir: bool) -> Tensor:
    if fir:
        return F.conv_transpose2d(x, 4 * _blur(x), stride=2, padding=1, groups=x.shape[1])
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _initialise(net: nn.Module) -> None:
    """Weights that keep the variance forward and backward, no biases; branches start as nothing."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in net.modules():
        if isinstance(module, ResBlock):
            zeroed(module.conv2)
        elif isinstance(module, Attention):
            zeroed(module.out)
        elif isinstance(module, WaveEmbedding) and module.augment is not None:
            zeroed(module.augment)


def _check(size: int, width: int, mult: tuple[int, ...], attention: tuple[int, ...], sides: list[int]) -> None:
    if not mult or size % 2 ** (len(mult) - 1):
        raise ValueError(f"`size` must be divisible by 2**(levels - 1) (got {size} and `mult` {mult}): resize, or drop levels")
    if width % 4:
        raise ValueError(f"`width` must be a multiple of 4, for the norms (got {width})")
    if not set(attention) <= set(sides):
        raise ValueError(f"`attention` must name resolutions in {sides} (got {attention}): they are pixels, not levels")


# ---- by name

ddpm = functools.partial(LargeUNet, mult=(1, 2, 2, 2), blocks=2, resample="conv", rescale=False, attend_up="all")
"""DDPM (Ho et al., 2020): CIFAR-10's has 35.7 million parameters."""

iddpm = functools.partial(
    LargeUNet, mult=(1, 2, 2, 2), blocks=3, attention=(16, 8), condition="scale-shift", resample="conv", rescale=False,
    attend_up="all", heads=4,
)  # fmt: skip
"""Improved DDPM (Nichol, Dhariwal, 2021): CIFAR-10's has 52.5 million parameters."""

ddpmpp = functools.partial(LargeUNet)
"""DDPM++ (Song et al., 2021) as in EDM: CIFAR-10's has 55.7 million parameters."""

ncsnpp = functools.partial(LargeUNet, embedding="fourier", fir=True, residual_input=True)
"""NCSN++ (Song et al., 2021) as in EDM, for time ln(sigma / 2) or so: CIFAR-10's has 56.4 million parameters."""

adm = functools.partial(
    LargeUNet, width=192, mult=(1, 2, 3, 4), blocks=3, attention=(32, 16, 8), condition="scale-shift", project=False,
    rescale=False, attend_up="all", head_channels=64,
)  # fmt: skip
"""ADM (Dhariwal, Nichol, 2021): ImageNet-64's has 295.9 million parameters."""
