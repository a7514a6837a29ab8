r"""Fourier features of a network's input, which let it see the last digits of the data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["fourier"]


def fourier(x: Tensor, powers: Sequence[float]) -> Tensor:
    r"""x (B, C, *) with sin and cos of :math:`2 \pi 2^k x` behind it: (B, C (1 + 2 len(powers)), *).

    Near the data the network's input must tell apart values that differ by a 256th. Order: x, all sines (channel by
    channel, k rising), all cosines. At k = 7, values 2 / 256 apart are a period apart: for data k / 127.5 - 1, which are
    2 / 255 apart, that is k = 7 + log2(255 / 256).

    References:
        | Variational Diffusion Models (Kingma et al., 2021), appendix C
        | https://arxiv.org/abs/2107.00630
    """
    if not powers:
        return x
    angle = torch.stack([2.0 * math.pi * 2.0**k * x for k in powers], dim=2).flatten(1, 2)
    return torch.cat([x, angle.sin(), angle.cos()], dim=1)
