"""A value network that starts from what the denoiser knows: its own encoder, read by a small head.

A value from scratch first has to learn what pictures are, thousands of steps in which the policy has nobody to listen to. The
encoder of the denoiser has seen every noise level and every class already: with it, samples of few steps are told from data
after some fifty steps.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser, Preconditioned
from ..nets import UNet
from ..networks.mlp import MLP
from .policy import Policy

__all__ = ["EncoderEnergy", "EncoderValue", "lends_encoder"]

CLEAN = 4.6
"""The largest log-SNR that the encoder is told, sigma / alpha of 0.1: samples are at infinity, where no network was trained."""


class EncoderValue(nn.Module):
    """V(x, k): the encoder of a policy's network at the level of state k, its maps pooled, and a perceptron.

    The encoder is copied and trained with the rest. Conditions are the network's own; a class also weighs the features.

    Arguments:
        policy: Whose network and levels are taken.
        width: Units of the perceptron.
        classes: Number of classes, 0 for none.
        terminal: Whether V(., T) is the energy; False where that is a network of its own.

    Attributes:
        T: Steps of the policy.

    Raises:
        ValueError: For networks that lend no encoder, see `lends_encoder`.
    """

    lam: Tensor

    def __init__(self, policy: Policy, width: int = 128, classes: int = 0, terminal: bool = True):
        super().__init__()
        self.terminal = terminal
        denoiser = policy.denoiser
        if not lends_encoder(denoiser):
            raise ValueError("`policy` has a network without an encoder to borrow: take another value, such as 'residual'")
        assert isinstance(denoiser, Preconditioned)
        self.T, self.classes, self.embed, self.sigma_data = policy.T, classes, denoiser.embed, denoiser.sigma_data
        self.process = denoiser.process
        self.register_buffer("lam", policy.grid.clamp_max(CLEAN), persistent=False)
        self.trunk = _UNetTrunk(denoiser.net) if isinstance(denoiser.net, UNet) else _MLPTrunk(denoiser.net)
        self.trunk.requires_grad_(True)
        self.head = nn.Sequential(nn.LayerNorm(self.trunk.channels), nn.Linear(self.trunk.channels, width), nn.SiLU())
        self.out = nn.Linear(width, 1)
        self.label = nn.Embedding(classes, width) if classes else None
        if self.label is not None:
            nn.init.zeros_(self.label.weight)

    def forward(self, x: Tensor, k: int | Tensor | None = None, *, label: Tensor | None = None, **cond: Any) -> Tensor:
        """The value (B,) of states x (B, *) of step k, 0..T: a number for all rows, or int64 (B,)."""
        last = self.T if self.terminal else self.T - 1
        if k is None or (isinstance(k, int) and not 0 <= k <= last):
            raise ValueError(f"`k` must be in 0..{last} (got {k}): this value tells the states of a chain apart")
        lam = self.lam[k].expand(len(x))
        x_in = x
        if self.sigma_data is not None:
            alpha, sigma = self.process.scales_over(lam, x)
            x_in = x * (sigma * sigma + self.sigma_data**2 * alpha * alpha) ** -0.5
        h = self.head(self.trunk(x_in, self.embed(lam).to(x), label))
        v = self.out(h)[:, 0]
        if self.label is None:
            return v
        if label is None:
            raise ValueError(f"`label` is missing: this value has {self.classes} classes")
        return v + (self.label(label) * h).sum(1)

    def extra_repr(self) -> str:
        return f"T={self.T}, classes={self.classes}"


class EncoderEnergy(EncoderValue):
    """E(x): the same network, asked about samples alone."""

    def forward(self, x: Tensor, k: int | Tensor | None = None, *, label: Tensor | None = None, **cond: Any) -> Tensor:
        """The energy (B,) of samples x (B, *), whatever k."""
        return super().forward(x, self.T, label=label, **cond)


class _UNetTrunk(nn.Module):
    """The way down of a `UNet`: mean and largest of every channel at every level, (B, channels)."""

    def __init__(self, net: nn.Module):
        super().__init__()
        assert isinstance(net, UNet)
        self.inner_embed, self.detail, self.stem = deepcopy(net.embed), deepcopy(net.detail), deepcopy(net.stem)
        self.encoder, self.down, self.powers = deepcopy(net.encoder), deepcopy(net.down), net.powers
        levels: list[Any] = list(net.encoder)
        self.channels = 2 * sum(level.blocks[0].conv1.out_channels for level in levels)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        from ..networks.fourier import fourier

        embedded = self.inner_embed(t, label if self.inner_embed.classes else None)
        h = self.detail(fourier(x, self.powers)).contiguous(memory_format=torch.channels_last)
        h = self.encoder[0](self.stem(h), embedded)
        pooled = [h.mean((2, 3)), h.amax((2, 3))]
        for down, level in zip(self.down, list(self.encoder)[1:], strict=True):
            h = level(down(h), embedded)
            pooled += [h.mean((2, 3)), h.amax((2, 3))]
        return torch.cat(pooled, dim=1)


class _MLPTrunk(nn.Module):
    """All of an `MLP` but its last layer: (B, channels)."""

    def __init__(self, net: nn.Module):
        super().__init__()
        assert isinstance(net, MLP)
        self.net, self.channels = deepcopy(net), net.feature_channels
        self.net.out = nn.Identity()  # type: ignore[assignment]

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        return self.net.features(x, t, label if self.net.embed.classes else None)


def lends_encoder(denoiser: Denoiser) -> bool:
    """Whether `EncoderValue` knows how to take the network of a denoiser apart."""
    return isinstance(denoiser, Preconditioned) and isinstance(denoiser.net, UNet | MLP)
