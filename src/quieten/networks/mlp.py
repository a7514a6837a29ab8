"""A network of vectors that takes a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..nets import Embedding, Net, modulated, per_example, zeroed

__all__ = ["MLP", "VectorBlock"]


class MLP(Net):
    r"""Residual perceptron for vectors or small images, flattened inside.

    Arguments:
        shape: Shape of one example: a number or a tuple, channels first.
        width: Channels of the hidden layers.
        depth: Number of residual blocks.
        classes: Number of classes; 0 for an unconditional network. Index `classes` is the null label.
        out_channels: First dimension of the output's shape; that of `shape` by default.
        t_scale: Factor on t that brings it within [-10, 10], see :class:`Embedding`.

    Example:
        >>> import torch
        >>> MLP(2)(torch.zeros(5, 2), torch.zeros(5)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        width: int = 256,
        depth: int = 3,
        classes: int = 0,
        out_channels: int | None = None,
        t_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.out_shape = (out_channels or self.shape[0], *self.shape[1:])
        self.feature_channels = width
        self.embed = Embedding(width, classes, t_scale)
        self.stem = nn.Linear(math.prod(self.shape), width)
        self.blocks = nn.ModuleList(VectorBlock(width, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.out = zeroed(nn.Linear(width, math.prod(self.out_shape)))

    def features(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        if x.shape[1:] != self.shape:
            raise ValueError(
                f"`x` must have shape {('B', *self.shape)} (got {tuple(x.shape)}): build the network with "
                "the shape of one example"
            )
        embedded = self.embed(per_example(t, x), label)
        h = self.stem(x.flatten(1))
        for block in self.blocks:
            h = block(h, embedded)
        return h

    def head(self, h: Tensor) -> Tensor:
        return self.out(F.silu(self.norm(h))).unflatten(1, self.out_shape)


class VectorBlock(nn.Module):
    """Residual block of two linear layers; the condition scales and shifts the norm."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.condition = zeroed(nn.Linear(embedding, 2 * channels))
        self.inner = nn.Linear(channels, channels)
        self.outer = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        h = modulated(self.norm(x), self.condition(embedded))
        return x + self.outer(F.silu(self.inner(h)))
