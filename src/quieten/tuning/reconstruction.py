"""The energy of an autoencoder: high where it does not give an example back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .energies import perceptron

__all__ = ["AutoencoderEnergy", "autoencoder"]


class AutoencoderEnergy(nn.Module):
    r"""Energy of how badly an autoencoder gives an example back, without time.

    .. math:: E(x) = s^2 \|x - g(f(x))\|^2 / \tau

    On the unit sphere, the latent and the reconstruction are normalised, and x should be; both networks receive them blown up
    to unit size per dimension.

    Arguments:
        encoder: Maps x (B, *) to latents (B, L).
        decoder: Maps latents to (B, *).
        sphere: Whether latents and reconstructions are on unit spheres.
        scale: s at the start; it is learned.
        tau: Temperature that the energy is divided by.

    References:
        | Value Gradient Sampler (Jeong et al., 2025), https://arxiv.org/abs/2502.13280, and the DxMI paper, appendix C.3
    """

    T = None
    classes = 0
    terminal = True

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, sphere: bool = False, scale: float = 1.0, tau: float = 1.0
    ) -> None:
        super().__init__()
        if not (tau > 0 and math.isfinite(tau)) or not (scale != 0 and math.isfinite(scale)):
            raise ValueError(f"`tau` must be positive and `scale` not 0 (got {tau}, {scale})")
        self.encoder, self.decoder, self.sphere, self.tau = encoder, decoder, sphere, tau
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def encode(self, x: Tensor) -> Tensor:
        """Latents (B, L)."""
        if not self.sphere:
            z: Tensor = self.encoder(x)
            return z
        return _unit(self.encoder(x * math.sqrt(x[:1].numel())))  # layers start for inputs of unit size

    def decode(self, z: Tensor) -> Tensor:
        """Examples (B, *) of latents."""
        x = self.decoder(z * math.sqrt(z.shape[1]) if self.sphere else z)
        return _unit(x) if self.sphere else x

    def forward(self, x: Tensor, k: int | Tensor | None = None, **cond: Any) -> Tensor:
        """The energy (B,); `k` and conditions do not matter."""
        return self._squares(x).flatten(1).sum(1)

    def per_position(self, x: Tensor, k: int | Tensor | None = None, **cond: Any) -> Tensor:
        """The energy of each position: summed over channels, (B, H, W) for images (B, C, H, W); (B, D) for vectors."""
        squares = self._squares(x)
        return squares.sum(1) if x.ndim > 2 else squares

    def _squares(self, x: Tensor) -> Tensor:
        back = self.decode(self.encode(x))
        if back.shape != x.shape:
            raise ValueError(f"`decoder` must return {tuple(x.shape)} (got {tuple(back.shape)})")
        return (x - back).square() * (self.scale.square() / self.tau)

    def extra_repr(self) -> str:
        return f"sphere={self.sphere}, tau={self.tau}"


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.flatten(1), dim=1).reshape(x.shape)


def autoencoder(
    shape: int | Sequence[int],
    latent: int = 128,
    width: int = 1024,
    depth: int = 3,
    sphere: bool = False,
    scale: float = 1.0,
    tau: float = 1.0,
) -> AutoencoderEnergy:
    """The autoencoder energy of two perceptrons; the default sizes are those of the paper's anomaly detection.

    Arguments:
        shape: Shape of one example: a number or a tuple.
        latent: Size of the latent.
        width: Units of a hidden layer.
        depth: Hidden layers of the encoder, and of the decoder.
        sphere: As in `AutoencoderEnergy`; so are `scale` and `tau`.
    """
    dims = (shape,) if isinstance(shape, int) else tuple(shape)
    if min(latent, width, depth) < 1:
        raise ValueError(f"`latent`, `width` and `depth` must be at least 1 (got {latent}, {width}, {depth})")
    size = math.prod(dims)
    encoder = nn.Sequential(nn.Flatten(), perceptron(size, latent, width, depth))
    decoder = nn.Sequential(perceptron(latent, size, width, depth), nn.Unflatten(1, dims))
    return AutoencoderEnergy(encoder, decoder, sphere, scale, tau)
