"""Between pixels and the latents of a pretrained autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["AUTOENCODERS", "Codec"]

AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "VQModel")
"""Class names of the diffusers autoencoders that are understood."""


class Codec(nn.Module):
    """A frozen autoencoder, with its latents scaled as the denoiser expects them.

    Latents are z = (E(image) - shift) scale, with scale and shift (or the mean and deviation of each channel) from the
    autoencoder's configuration. Images lie in [-1, 1].

    Arguments:
        vae: A diffusers AutoencoderKL, AutoencoderTiny or VQModel; its parameters are frozen.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, vae: nn.Module):
        super().__init__()
        if not any(c.__name__ in AUTOENCODERS for c in type(vae).__mro__):
            raise ValueError(f"an autoencoder of class {type(vae).__name__} is not supported: one of {', '.join(AUTOENCODERS)}")
        config: Any = vae.config
        scale = torch.tensor(config.scaling_factor)
        shift = torch.tensor(getattr(config, "shift_factor", None) or 0.0)
        if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
            shift = torch.tensor(config.latents_mean).reshape(1, -1, 1, 1)
            scale = scale / torch.tensor(config.latents_std).reshape(1, -1, 1, 1)
        self.vae = vae.requires_grad_(False).eval()
        if getattr(config, "force_upcast", False) and next(vae.parameters()).dtype == torch.float16:
            self.vae = self.vae.float()  # overflows in half precision, says its configuration
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def encode(self, images: Tensor, noise: Tensor | None = None, batch: int = 8) -> Tensor:
        """Latents (B, c, h, w) of images (B, C, H, W) in [-1, 1].

        Arguments:
            images: Any floating dtype, which is also that of the result.
            noise: Standard normals in the shape of the latents, to draw from the encoder's distribution; None takes its mean.
            batch: Images at once.
        """
        dtype, parts = next(self.vae.parameters()).dtype, []
        model: Any = self.vae
        for i in range(0, len(images), batch):
            encoded = model.encode(images[i : i + batch].to(dtype))
            if hasattr(encoded, "latent_dist"):
                z = encoded.latent_dist.mean
                if noise is not None:
                    z = z + encoded.latent_dist.std * noise[i : i + batch].to(z)
            else:
                z = encoded.latents
            parts.append((z.to(images.dtype) - self.shift.to(images.dtype)) * self.scale.to(images.dtype))
        return torch.cat(parts)

    def image_of(self, shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
        """Shape (C, H, W) of the images behind latents of that shape; None for None."""
        config: Any = self.vae.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        return None if shape is None else (config.in_channels, *(side * factor for side in shape[1:]))

    def decode(self, latents: Tensor, batch: int = 8) -> Tensor:
        """Images (B, C, H, W), nominally in [-1, 1], of latents (B, c, h, w).

        Arguments:
            latents: Any floating dtype, which is also that of the result.
            batch: Images at once; memory grows with it.
        """
        dtype, parts = next(self.vae.parameters()).dtype, []
        model: Any = self.vae
        for z in latents.split(batch):
            z = z / self.scale.to(z.dtype) + self.shift.to(z.dtype)
            parts.append(model.decode(z.to(dtype), return_dict=False)[0].to(latents.dtype))
        return torch.cat(parts)
