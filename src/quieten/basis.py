r"""Orthonormal bases in which a variance can be diagonal."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DCT"]


@dataclass(frozen=True)
class DCT:
    r"""The discrete cosine transform (type II) of each channel of images, in square blocks.

    Coefficient (k, l) of a block stands where its pixel (k, l) stood: shapes stay (B, C, H, W). Neighbouring pixels of pictures
    are strongly correlated, their cosine coefficients hardly: a variance that is diagonal here says what pixels cannot.

    Arguments:
        block: Side of a block in pixels, at least 2; height and width must be multiples of it.

    Raises:
        ValueError: For a block below 2, or when given a state that is no image of whole blocks.

    Example:
        >>> basis, x = DCT(4), torch.randn(2, 3, 8, 8)
        >>> bool(torch.allclose(basis.inverse(basis.forward(x)), x, atol=1e-5))
        True
    """

    block: int = 4

    def __post_init__(self) -> None:
        if self.block < 2:
            raise ValueError(f"`block` must be at least 2 pixels (got {self.block}): leave the basis out for single pixels")

    def forward(self, x: Tensor) -> Tensor:
        """Pixels (B, C, H, W) to coefficients."""
        return self._both(x, _cosines(self.block).to(x).T)

    def inverse(self, c: Tensor) -> Tensor:
        """Coefficients (B, C, H, W) to pixels."""
        return self._both(c, _cosines(self.block).to(c))

    def largest(self, bound: Tensor | float, like: Tensor) -> Tensor:
        """The largest variance of each coefficient, (1, C, H, W), when pixels have at most the variance `bound`.

        A coefficient sum_i b_i x_i deviates by at most sum_i |b_i| times what a pixel does.

        Arguments:
            bound: A number, or a tensor that broadcasts to (1, C, 1, 1).
            like: A state (B, C, H, W).
        """
        self.check(like)
        reach = _cosines(self.block).to(like).abs().sum(1).square()
        tile = torch.outer(reach, reach).repeat(like.shape[-2] // self.block, like.shape[-1] // self.block)
        return tile.expand(1, *like.shape[1:]) * bound

    def check(self, x: Tensor) -> None:
        """Raises ValueError unless x is a batch of images of whole blocks."""
        if x.ndim != 4 or x.shape[-1] % self.block or x.shape[-2] % self.block:
            raise ValueError(f"a DCT of blocks of {self.block} needs images (B, C, H, W) whose sides are multiples of it "
                             f"(got {tuple(x.shape)}): choose another `block`")  # fmt: skip

    def _both(self, x: Tensor, matrix: Tensor) -> Tensor:
        """x times the matrix along the rows, then the columns, of each block."""
        self.check(x)
        for _ in range(2):
            x = (x.unflatten(-1, (-1, self.block)) @ matrix).flatten(-2).transpose(-1, -2)
        return x


@functools.cache
def _cosines(n: int) -> Tensor:
    """The orthonormal transform, float64 (n, n): row k is cos(pi k (i + 1/2) / n), normalised."""
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    rows = torch.cos(math.pi * k * (i + 0.5) / n) * math.sqrt(2.0 / n)
    rows[0] /= math.sqrt(2.0)
    return rows
