r"""Augmentation that the network is told of, so that what it learns to draw are plain examples."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..noise import Noise

__all__ = ["LABELS", "Dihedral", "EDMAugment", "isometric", "mirrored"]

LABELS = ("x flip", "y flip", "scale", "cos turn - 1", "sin turn", "stretch x", "stretch y", "shift x", "shift y")
"""What the numbers of a label are. All zero is an untouched example: what to ask for when sampling."""

# Daubechies' least asymmetric wavelet with 6 vanishing moments: shifted by even steps it is orthonormal, so that enlarging
# and shrinking with it gives back the image to the last digit.
_SYM6 = (
    *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466),
    *(0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578),
    *(0.0017677118642428036, -0.007800708325034148),
)
_CENTRE = sum(k * tap for k, tap in enumerate(_SYM6)) / sum(_SYM6) - 5
"""It is not quite symmetric: pixel k of an image lies at 2 k + 0.1 of its enlargement. Unheeded, turns would shift."""


class EDMAugment:
    r"""EDM's pipeline: mirrors, and now and then a scaling, a turn, a stretch or a shift; each reported in the labels.

    Every example is mirrored left-right with probability 1/2 and top-bottom with p/2. With probability p each, it is scaled by
    2^{0.2 w}, turned by any angle, stretched by 2^{0.2 w} along an axis (the picture's, or one turned at random), shifted by
    an eighth of its side times normals. Pixels beyond the border are reflections. An example that is only mirrored, or
    untouched, keeps its pixels exactly.

    Arguments:
        p: Probability of each change, 0 to 1: 0.12 for CIFAR-10 in the paper, 0.15 for faces at 64x64.

    Raises:
        ValueError: If p is outside [0, 1].

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), appendix F.2
        | https://arxiv.org/abs/2206.00364

    Example:
        >>> x0, labels = EDMAugment(0.12)(torch.zeros(4, 3, 8, 8), Noise(0, range(4)), step=0)
        >>> x0.shape, labels.shape
        (torch.Size([4, 3, 8, 8]), torch.Size([4, 9]))
    """

    def __init__(self, p: float = 0.12):
        if not 0 <= p <= 1:
            raise ValueError(f"`p` must lie in [0, 1] (got {p}): it is the probability of each change")
        self.p = p

    def __call__(self, x0: Tensor, noise: Noise, step: int) -> tuple[Tensor, Tensor]:
        """Changed examples and what was done to them: a function of (seed, index, step) alone.

        Arguments:
            x0: Images (B, C, H, W), floats.
            noise: Keyed by the examples' places in the global batch (B,).
            step: Training step.

        Returns:
            x0: As before, (B, C, H, W).
            labels: float32 (B, 9), see `LABELS`; on the device of x0.
        """
        if x0.ndim != 4:
            raise ValueError(f"`augment` changes images (B, C, H, W) (got shape {tuple(x0.shape)}): leave it out of the recipe")

        def uniform(tag: str) -> Tensor:
            return noise.uniform(step, f"augment {tag}")

        def now_and_then(tag: str, value: Tensor) -> Tensor:
            return torch.where(uniform(f"whether {tag}") < self.p, value, torch.zeros_like(value))

        def normal(tag: str) -> Tensor:
            return torch.special.ndtri(uniform(tag))

        flip_x = (uniform("x flip") < 0.5).double()
        flip_y = now_and_then("y flip", (uniform("y flip") < 0.5).double())
        scale = now_and_then("scale", normal("scale"))
        turn = now_and_then("turn", math.pi * (2 * uniform("turn") - 1))
        stretch = now_and_then("stretch", normal("stretch"))
        axis = torch.where(uniform("tilt") < 0.5, math.pi * (2 * uniform("axis") - 1), torch.zeros_like(turn))
        shift = [now_and_then("shift", normal(f"shift {name}")) for name in "xy"]
        parts = [flip_x, flip_y, scale, turn.cos() - 1, turn.sin(), stretch * axis.cos(), stretch * axis.sin(), *shift]
        labels = torch.stack(parts, dim=1).to(x0.device, torch.float32)
        x0, moved = mirrored(x0, labels), (~isometric(labels)).nonzero()[:, 0]
        if len(moved):
            back = _back(scale, turn, stretch, axis, shift, x0.shape[-2:])[moved.cpu()].to(x0)
            x0 = x0.index_copy(0, moved, _warped(x0[moved], back))
        return x0, labels

    def __repr__(self) -> str:
        return f"EDMAugment(p={self.p})"


class Dihedral:
    """Mirrors and quarter turns, which change no pixel: with probability p, one of the eight, all equally likely.

    Labels as those of `EDMAugment`; what VDM's network is told, whether there was a change, is whether any is not zero.

    Arguments:
        p: Probability of drawing one, 0 to 1.

    Raises:
        ValueError: If p is outside [0, 1].

    References:
        | Variational Diffusion Models (Kingma et al., 2021), section 6.1
        | https://arxiv.org/abs/2107.00630
    """

    def __init__(self, p: float = 0.5):
        if not 0 <= p <= 1:
            raise ValueError(f"`p` must lie in [0, 1] (got {p}): it is the probability of a change")
        self.p = p

    def __call__(self, x0: Tensor, noise: Noise, step: int) -> tuple[Tensor, Tensor]:
        """Changed examples (B, C, S, S) and labels (B, 9); arguments as in `EDMAugment`.

        Raises:
            ValueError: For images that are not square.
        """
        if x0.ndim != 4 or x0.shape[-1] != x0.shape[-2]:
            raise ValueError(f"`augment` turns square images (B, C, S, S) (got shape {tuple(x0.shape)}): take another kind")
        chosen = (noise.uniform(step, "augment which") * 8).floor().long()
        chosen = torch.where(noise.uniform(step, "augment whether") < self.p, chosen, torch.zeros_like(chosen)).to(x0.device)
        flip, quarters = chosen % 2, chosen // 2
        labels = torch.zeros(len(x0), len(LABELS), device=x0.device)
        labels[:, 0] = flip
        labels[:, 3] = torch.tensor([0.0, -1.0, -2.0, -1.0], device=x0.device)[quarters]
        labels[:, 4] = torch.tensor([0.0, 1.0, 0.0, -1.0], device=x0.device)[quarters]
        x0 = mirrored(x0, labels)
        for k in (1, 2, 3):
            x0 = torch.where((quarters == k).view(-1, 1, 1, 1), x0.rot90(k, (-2, -1)), x0)
        return x0, labels

    def __repr__(self) -> str:
        return f"Dihedral(p={self.p})"


def isometric(labels: Tensor) -> Tensor:
    """Which examples were mirrored at most, bool (B,): distances between examples survive mirrors, and nothing else here."""
    return (labels[:, 2:] == 0).all(1)


def mirrored(x: Tensor, labels: Tensor) -> Tensor:
    """Images (B, C, H, W) mirrored as the labels (B, 9) say; twice is not at all."""
    for column, axis in ((0, -1), (1, -2)):
        marked = labels[:, column].to(x.device).bool().view(-1, 1, 1, 1)
        x = torch.where(marked, x.flip(axis), x)
    return x


# ---- the geometry


def _back(
    scale: Tensor, turn: Tensor, stretch: Tensor, axis: Tensor, shift: list[Tensor], side: tuple[int, int] | torch.Size
) -> Tensor:
    """Where a pixel of the new image lies in the old one: affine maps (B, 2, 3) of (x, y) in pixels from the centre."""
    height, width = side

    def rotation(angle: Tensor) -> Tensor:
        c, s = angle.cos(), angle.sin()
        return torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], -2)

    thinner = torch.diag_embed(torch.stack([torch.exp2(-0.2 * stretch), torch.exp2(0.2 * stretch)], -1))
    linear = rotation(turn) @ rotation(-axis) @ thinner @ rotation(axis) * torch.exp2(-0.2 * scale)[:, None, None]
    offset = torch.stack([-0.125 * width * shift[0], -0.125 * height * shift[1]], -1)[..., None]
    return torch.cat([linear, linear @ offset], -1)


def _warped(x: Tensor, back: Tensor) -> Tensor:
    """Images (B, C, H, W) moved by `back` (B, 2, 3): enlarged twofold, looked up linearly, shrunk again."""
    height, width = x.shape[-2:]
    centre = torch.tensor([(width - 1) / 2, (height - 1) / 2]).to(x)
    corners = torch.tensor([[a, b, 1.0] for a in (-1.0, 1.0) for b in (-1.0, 1.0)]).to(x)
    corners = corners * torch.cat([centre + 3, centre.new_ones(1)])  # what the filter reaches beyond the outermost pixels
    reach = (corners @ back.mT).abs().amax((0, 1)) + 4 - centre
    across, down = (min(max(math.ceil(r), 0), n - 1) for r, n in zip(reach.tolist(), (width, height), strict=True))
    padded = F.pad(x, (across, across, down, down), mode="reflect")
    large = _enlarged(_enlarged(padded, -1), -2)
    # shrinking makes pixel k of samples 2 k - 5 to 2 k + 6
    at_y, at_x = ((torch.arange(-5, 2 * n + 5, dtype=x.dtype, device=x.device) - _CENTRE) / 2 for n in (height, width))
    grid = torch.stack([(at_x - centre[0]).expand(len(at_y), -1), (at_y - centre[1])[:, None].expand(-1, len(at_x))], -1)
    source = grid.flatten(0, 1) @ back[:, :, :2].mT + back[:, None, :, 2]
    index = 2 * (source + centre + torch.tensor([across, down]).to(x)) + _CENTRE
    size = torch.tensor([large.shape[-1] - 1, large.shape[-2] - 1]).to(x)
    looked_up = F.grid_sample(large, (2 * index / size - 1).unflatten(1, (len(at_y), len(at_x))), align_corners=True)
    return _shrunk(_shrunk(looked_up, -1), -2)


def _taps(x: Tensor, axis: int) -> Tensor:
    return torch.tensor(_SYM6, dtype=x.dtype, device=x.device).reshape((1, 1, 1, -1) if axis == -1 else (1, 1, -1, 1))


def _enlarged(x: Tensor, axis: int) -> Tensor:
    """Twice as many samples along an axis: zeros put between, then smoothed; the mean grows smaller by sqrt(2)."""
    flat, across = x.flatten(0, 1)[:, None], axis == -1
    stride, padding = ((1, 2), (0, 5)) if across else ((2, 1), (5, 0))
    return F.conv_transpose2d(flat, _taps(x, axis), stride=stride, padding=padding).reshape(
        *x.shape[:2], *((x.shape[-2], 2 * x.shape[-1]) if across else (2 * x.shape[-2], x.shape[-1]))
    )


def _shrunk(x: Tensor, axis: int) -> Tensor:
    """Every other sample along an axis, smoothed: sample k from 2 k to 2 k + 11; the mean grows by sqrt(2)."""
    out = F.conv2d(x.flatten(0, 1)[:, None], _taps(x, axis), stride=(1, 2) if axis == -1 else (2, 1))
    return out.reshape(*x.shape[:2], *out.shape[-2:])
