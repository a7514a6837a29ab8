r"""A transformer for latents: DiT."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nets import Net, modulated, per_example, zeroed
from .unet import WaveEmbedding

__all__ = ["DiT", "dit_b", "dit_xl"]


class DiT(Net):
    r"""Diffusion transformer: patches are tokens, the condition scales and shifts every norm.

    The tokens become a map at full resolution before the last layer, so that a head sees pixels as those of U-Nets do.

    Arguments:
        channels: Channels of the latents (or images).
        size: Their side; a multiple of `patch`.
        width: Channels of a token, a multiple of 4.
        depth: Number of blocks.
        heads: Attention heads.
        patch: Side of a patch.
        detail: Channels of the map that `features` returns.
        classes: Number of classes; 0 for an unconditional network. Index `classes` is the null label.
        dropout: Share of the activations dropped in the blocks while training.
        out_channels: Channels of the output; `channels` by default.
        t_scale: Factor on t, which is as in :class:`WaveEmbedding`: indices up to 1000.

    Raises:
        ValueError: If an argument is out of range.

    References:
        | Scalable Diffusion Models with Transformers (Peebles, Xie, 2023), section 3.2, adaLN-Zero
        | https://arxiv.org/abs/2212.09748

    Example:
        >>> DiT(size=8, width=32, depth=1, heads=2)(torch.zeros(2, 4, 8, 8), torch.zeros(2)).shape
        torch.Size([2, 4, 8, 8])
    """

    def __init__(
        self,
        channels: int = 4,
        size: int = 32,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        patch: int = 2,
        detail: int = 64,
        classes: int = 0,
        dropout: float = 0.0,
        out_channels: int | None = None,
        t_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if size % patch:
            raise ValueError(f"`size` must be a multiple of `patch` (got {size} and {patch})")
        if width % heads or width % 4:
            raise ValueError(f"`width` must be a multiple of 4 and of `heads` (got {width} and {heads})")
        self.channels, self.out_channels, self.patch, self.feature_channels = channels, out_channels or channels, patch, detail
        self.embed: WaveEmbedding = WaveEmbedding(width, classes, t_scale, frequencies=128)
        self.stem = nn.Conv2d(channels, width, patch, stride=patch)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.condition = nn.Linear(width, 2 * width)
        self.unfold = nn.ConvTranspose2d(width, detail, patch, stride=patch)
        self.out = nn.Conv2d(detail, self.out_channels, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        zeroed(self.condition)
        zeroed(self.out)
        for module in self.modules():
            if isinstance(module, DiTBlock):
                zeroed(module.condition)

    def features(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.channels or x.shape[2] % self.patch or x.shape[3] % self.patch:
            raise ValueError(
                f"`x` must have shape (B, {self.channels}, H, W), height and width divisible by {self.patch} "
                f"(got {tuple(x.shape)}): build the network for these latents"
            )
        embedded = self.embed(per_example(t, x), label)
        h = self.stem(x)
        rows, columns = h.shape[2:]
        h = h.flatten(2).mT + _places(rows, columns, h.shape[1], h)
        for block in self.blocks:
            h = block(h, embedded)
        h = _told(self.norm(h), self.condition(embedded))
        return self.unfold(h.mT.unflatten(2, (rows, columns)))

    def head(self, h: Tensor) -> Tensor:
        return self.out(h)


class DiTBlock(nn.Module):
    """Attention, then a perceptron, on tokens (B, N, C): each scaled and shifted before, and gated after, by the condition."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.qkv, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.condition = nn.Linear(width, 6 * width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, embedded: Tensor) -> Tensor:
        first, gate1, second, gate2 = self.condition(embedded)[:, None].split([n * h.shape[2] for n in (2, 1, 2, 1)], dim=2)
        q, k, v = self.qkv(_told(self.norm1(h), first[:, 0])).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = h + gate1 * self.mixed(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        inner = F.gelu(self.inner(_told(self.norm2(h), second[:, 0])), approximate="tanh")
        return h + gate2 * self.outer(self.dropout(inner))


def _told(h: Tensor, scale_shift: Tensor) -> Tensor:
    """Tokens (B, N, C) scaled and shifted by (B, 2C)."""
    return modulated(h.mT, scale_shift).mT


def _places(rows: int, columns: int, width: int, like: Tensor) -> Tensor:
    """Sines and cosines of the row and the column of each token (rows * columns, width)."""
    frequency = torch.exp(torch.arange(width // 4, device=like.device) * (-math.log(10_000) / (width // 4)))
    y, x = torch.meshgrid(torch.arange(rows, device=like.device), torch.arange(columns, device=like.device), indexing="ij")
    waves: list[Any] = [(place.flatten()[:, None] * frequency) for place in (x, y)]
    return torch.cat([f(wave) for wave in waves for f in (torch.sin, torch.cos)], dim=1).to(like)


dit_b = functools.partial(DiT, width=768, depth=12, heads=12)
"""DiT-B/2: 130 million parameters at 1,000 classes."""

dit_xl = functools.partial(DiT, width=1152, depth=28, heads=16)
"""DiT-XL/2: 675 million parameters at 1,000 classes."""
