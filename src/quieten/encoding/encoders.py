"""The encoders that recipes name: what they are built of, and the counterterm of the reverse process that goes with them."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from ..encoder import Contraction, Encoder, LearnedEncoder
from ..nets import UNet
from ..networks.vdm_nets import EncoderUNet

__all__ = ["Counterterm", "compact", "contraction", "published"]

Counterterm = Literal["sigma2", "none", "split"]
"""A name in `encoded.COUNTERTERMS`; the denoiser is built with it, the encoder does not need it."""


class Timed(nn.Module):
    """A network of (x, t) as one of (x, lam), with t = -lam / 8."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, lam: Tensor) -> Tensor:
        return self.net(x, -0.125 * lam)


def contraction(counterterm: Literal["sigma2"] = "sigma2") -> Encoder:
    """Nothing learned; see `Contraction`."""
    return Contraction()


def compact(
    channels: int,
    size: int,
    width: int = 24,
    mult: tuple[int, ...] | None = None,
    counterterm: Counterterm = "sigma2",
    bounded: bool = True,
    scale: float = 1.0,
    by_time: Literal["rising", "falling", "early"] | None = None,
    max_var: float | Literal["data"] | None = None,
    min_var: float | None = None,
    id_at_zero: bool = False,
) -> Encoder:
    """A small `UNet` as the encoder's network, for small images and few processors; other options as in `LearnedEncoder`."""
    net = UNet(channels, size, width, mult=mult, attention=())
    return LearnedEncoder(
        Timed(net), bounded=bounded, scale=scale, by_time=by_time, max_var=max_var, min_var=min_var, id_at_zero=id_at_zero
    )


def published(
    channels: int,
    size: int,
    blocks: int = 4,
    width: int = 64,
    levels: int | None = None,
    middle_groups: int = 32,
    dropout: float = 0.1,
    lam_max: float = 13.3,
    lam_min: float = -5.0,
    counterterm: Counterterm = "sigma2",
    bounded: bool = True,
    scale: float = 1.0,
    by_time: Literal["rising", "falling", "early"] | None = None,
    max_var: float | Literal["data"] | None = None,
    min_var: float | None = None,
    id_at_zero: bool = False,
) -> Encoder:
    """The paper's network, see `EncoderUNet`; other options as in `LearnedEncoder`."""
    ends: dict[str, Any] = {"lam_max": lam_max, "lam_min": lam_min}
    bounds: dict[str, Any] = {"max_var": max_var, "min_var": min_var}
    net = EncoderUNet(channels, size, blocks, width, levels, middle_groups, dropout, **ends)
    return LearnedEncoder(net, bounded=bounded, scale=scale, by_time=by_time, id_at_zero=id_at_zero, **bounds, **ends)
