r"""The networks of VDM and DiffEnc, layer for layer, so that their published settings can be trained."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nets import Embedding, Net, per_example, zeroed
from .fourier import fourier

__all__ = ["EncoderUNet", "ScoreUNet"]


class Times(Embedding):
    r"""Sines and cosines of 1000 tau, tau = (lam_max - lam) / (lam_max - lam_min), then two layers.

    Arguments:
        width: Number of sines and cosines, even; the embedding has 4 width channels.
        ends: (lam_max, lam_min) of the schedule as configured; a learned one may leave [0, 1].
        classes: As in `Embedding`.
        t_scale: lam = -t / t_scale: the network's time is -t_scale times the log-SNR.
    """

    def __init__(self, width: int, ends: tuple[float, float], classes: int = 0, t_scale: float = 1.0):
        super().__init__(4 * width, classes, t_scale, frequencies=width // 2)
        self.ends = ends
        self.time = nn.Sequential(nn.Linear(width + 1, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))

    def forward(self, t: Tensor, label: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """Embedding (B, channels); the last input is 1 where any of the numbers `augment` (B, K) is not 0."""
        flag = torch.zeros_like(t) if augment is None else (augment != 0).any(1).to(t)
        waves = torch.cat([self.waves(t), flag.to(torch.promote_types(t.dtype, torch.float32))[:, None]], dim=1)
        return self.with_label(self.time(waves.to(next(self.time.parameters()).dtype)), t, label)

    def waves(self, t: Tensor) -> Tensor:
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        top, bottom = self.ends
        half = self.frequencies
        rates = torch.arange(half, dtype=t.dtype, device=t.device).mul(-math.log(1e4) / max(1, half - 1)).exp()
        angle = 1000.0 * ((top + t / self.t_scale) / (top - bottom))[:, None] * rates
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class ResBlock(nn.Module):
    """Two convolutions about a level's shift; the second starts at zero."""

    def __init__(self, inside: int, outside: int, embedding: int, dropout: float, groups: int = 32):
        super().__init__()
        self.norm1, self.conv1 = _norm(inside, groups), nn.Conv2d(inside, outside, 3, padding=1)
        self.shift = zeroed(nn.Linear(embedding, outside, bias=False))
        self.norm2, self.conv2 = _norm(outside, groups), zeroed(nn.Conv2d(outside, outside, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Identity() if inside == outside else nn.Conv2d(inside, outside, 1)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.shift(embedded).to(h.dtype)[:, :, None, None]
        return self.shortcut(x) + self.conv2(self.dropout(F.silu(self.norm2(h))))


class Attention(nn.Module):
    """Attention of one head over all pixels; starts as the identity."""

    def __init__(self, channels: int, groups: int = 32):
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        return x + self.out(h.reshape(x.shape))


class Middle(nn.Module):
    """Block, attention, block."""

    def __init__(self, channels: int, embedding: int, dropout: float, groups: int = 32):
        super().__init__()
        self.first = ResBlock(channels, channels, embedding, dropout, groups)
        self.attention = Attention(channels, groups)
        self.second = ResBlock(channels, channels, embedding, dropout, groups)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        return self.second(self.attention(self.first(x, embedded)), embedded)


class ScoreUNet(Net):
    r"""The denoising network of VDM: a U-Net that never leaves the full resolution, and adds its input to its output.

    Arguments:
        channels: Of the data.
        width: Channels of every layer: 128, or 256 for ImageNet.
        blocks: Residual blocks on the way down, one more on the way up: 8 or 32.
        powers: Fourier features of the input, see `fourier`.
        attend: Attention after every block, not only in the middle.
        dropout: In every block.
        lam_max: Log-SNR of time 0.
        lam_min: Log-SNR of time 1.
        t_scale: See `Times`.
        classes: Number of classes; 0 for none.
        out_channels: None is `channels`.

    References:
        | Variational Diffusion Models (Kingma et al., 2021), appendix B
        | https://arxiv.org/abs/2107.00630
    """

    def __init__(
        self,
        channels: int,
        width: int = 128,
        blocks: int = 32,
        powers: tuple[float, ...] = (6, 7),
        attend: bool = False,
        dropout: float = 0.1,
        lam_max: float = 13.3,
        lam_min: float = -5.0,
        t_scale: float = 1.0,
        classes: int = 0,
        out_channels: int | None = None,
    ):
        super().__init__()
        _check_width(width)
        self.channels, self.powers, self.feature_channels = channels, tuple(powers), width
        self.out_channels = channels if out_channels is None else out_channels
        self.embed = Times(width, (lam_max, lam_min), classes, t_scale)

        def block(inside: int) -> nn.ModuleList:
            parts = [ResBlock(inside, width, 4 * width, dropout), *([Attention(width)] if attend else [])]
            return nn.ModuleList(parts)

        self.stem = nn.Conv2d(channels * (1 + 2 * len(self.powers)), width, 3, padding=1)
        self.down = nn.ModuleList(block(width) for _ in range(blocks))
        self.middle = Middle(width, 4 * width, dropout)
        self.up = nn.ModuleList(block(2 * width) for _ in range(blocks + 1))
        self.out_norm = _norm(width)
        self.out = zeroed(nn.Conv2d(width, self.out_channels, 3, padding=1))

    def features(self, x: Tensor, t: Tensor, label: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        embedded = self.embed(per_example(t, x), label, augment)
        h = self.stem(fourier(x, self.powers))
        skips = [h]
        for block in self.down:
            h = _through(block, h, embedded)
            skips.append(h)
        h = self.middle(h, embedded)
        for block in self.up:
            h = _through(block, torch.cat([h, skips.pop()], dim=1), embedded)
        return h

    def head(self, h: Tensor) -> Tensor:
        return self.out(F.silu(self.out_norm(h)))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """Output (B, out_channels, H, W): before training the input itself, in the channels that both have.

        `augment` (B, K) is what was done to the examples; the network is told whether anything was.
        """
        out = self.head(self.features(x, t, label, augment))
        if self.out_channels == self.channels:
            return out + x
        return out + F.pad(x, (0, 0, 0, 0, 0, self.out_channels - self.channels))


class EncoderUNet(nn.Module):
    r"""The encoder network of DiffEnc: (x, lam) to (B, C, H, W), zero before training.

    Levels of `width` 2^i channels, halved by max-pooling: as many as keep the next height even and above 8 (`levels` None),
    with `blocks` divided among them.

    Arguments:
        channels: Of the data.
        size: Height and width of the data.
        blocks: Residual blocks in all on the way down: 2, 4 or 8.
        width: Channels of the first level.
        levels: Number of levels; None follows from `size`.
        middle_groups: Groups of the normalisation in the middle: 16 in the encoder with 2 blocks, 32 in the others.
        dropout: In every block.
        lam_max: Log-SNR of time 0.
        lam_min: Log-SNR of time 1.

    References:
        | DiffEnc (Nielsen et al., 2024), appendix on the encoder architecture
        | https://arxiv.org/abs/2310.19789
    """

    def __init__(
        self,
        channels: int,
        size: int,
        blocks: int = 4,
        width: int = 64,
        levels: int | None = None,
        middle_groups: int = 32,
        dropout: float = 0.1,
        lam_max: float = 13.3,
        lam_min: float = -5.0,
    ):
        super().__init__()
        _check_width(width)
        count = _levels(size) if levels is None else levels
        if count < 1 or size % 2**count:
            raise ValueError(f"`levels` must be at least 1 and halve `size` {size} that often (got {count})")
        each = max(1, blocks // count)
        widths, embedding = [width * 2**i for i in range(count)], 4 * width
        self.embed = Times(width, (lam_max, lam_min))
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for inside, outside in zip([width, *widths], widths, strict=False):
            self.down.append(_stack(inside, outside, each, embedding, dropout))
        self.middle = Middle(widths[-1], embedding, dropout, middle_groups)
        self.grow = nn.ModuleList()
        for inside, outside in zip([widths[-1], *widths[::-1]], widths[::-1], strict=False):
            self.grow.append(nn.ConvTranspose2d(inside, outside, 2, stride=2))
            self.up.append(_stack(2 * outside, outside, each, embedding, dropout))
        self.out_norm = _norm(width, 16)
        self.out = zeroed(nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, x: Tensor, lam: Tensor) -> Tensor:
        embedded = self.embed(per_example(-lam, x))
        h = self.stem(x.contiguous())  # forward-mode differentiation of GroupNorm fails on channels-last tensors
        skips = []
        for stack in self.down:
            h = _through(stack, h, embedded)
            skips.append(h)
            h = F.max_pool2d(h, 2)
        h = self.middle(h, embedded)
        for grow, stack in zip(self.grow, self.up, strict=True):
            h = _through(stack, torch.cat([grow(h), skips.pop()], dim=1), embedded)
        return self.out(F.silu(self.out_norm(h)))


def _norm(channels: int, groups: int = 32) -> nn.GroupNorm:
    return nn.GroupNorm(min(groups, channels // 2), channels, eps=1e-6)  # a group per channel would undo a level's shift


def _stack(inside: int, outside: int, blocks: int, embedding: int, dropout: float) -> nn.ModuleList:
    return nn.ModuleList(ResBlock(inside if i == 0 else outside, outside, embedding, dropout) for i in range(blocks))


def _through(parts: nn.Module, h: Tensor, embedded: Tensor) -> Tensor:
    for part in parts.children():
        h = part(h, embedded) if isinstance(part, ResBlock) else part(h)
    return h


def _levels(size: int) -> int:
    count, height = 1, size // 2
    while height % 2 == 0 and height > 8:
        count, height = count + 1, height // 2
    return count


def _check_width(width: int) -> None:
    if width < 2 or width % 2 or (width > 32 and width % 32):
        raise ValueError(f"`width` must be even, and a multiple of 32 above 32 (got {width}): GroupNorm has 32 groups")
