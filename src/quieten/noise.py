r"""Counter-based noise: a pure function of (seed, index, step, tag), whatever the batch, rank or device."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["INITIAL", "Draws", "Noise"]

INITIAL = -1
"""The step whose noise is the initial state; the steps of the grid count from 0."""

_BLOCK = 32_768  # elements hashed at once: the 64-bit intermediates stay in cache
_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix(z: int) -> int:
    """The splitmix64 finaliser on Python integers."""
    z = (z + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * _MIX1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX2) & _MASK
    return z ^ (z >> 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's is arithmetic on signed integers."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix_tensor(z: Tensor) -> Tensor:
    """The same finaliser on a fresh int64 tensor, which wraps like an unsigned one; overwrites it."""
    z.add_(_signed(_GOLDEN))
    z.bitwise_xor_(_shift(z, 30)).mul_(_signed(_MIX1))
    z.bitwise_xor_(_shift(z, 27)).mul_(_signed(_MIX2))
    return z.bitwise_xor_(_shift(z, 31))


class Noise:
    r"""Standard normals and uniforms keyed by (seed, index, step, tag).

    Each row of a batch has an index, and its numbers depend on that index alone: any split of the rows into batches, ranks
    or devices draws the same bits. The key is splitmix64 of (seed, tag, step, index), and each element hashes key + counter
    once more, so rows are not shifted copies of one another.

    Arguments:
        seed: Any integer.
        index: The rows: a sequence or int64 tensor (B,).

    Example:
        >>> rows = Noise(0, range(4)).normal(torch.empty(4, 2), step=0)
        >>> bool((Noise(0, [2]).normal(torch.empty(1, 2), step=0) == rows[2]).all())
        True
    """

    def __init__(self, seed: int, index: Sequence[int] | Tensor):
        self.seed = int(seed)
        self.index = torch.as_tensor(index, dtype=torch.int64).reshape(-1)
        self._placed: dict[torch.device, Tensor] = {}  # the indices on each device, so that no draw waits for a copy

    def __len__(self) -> int:
        return len(self.index)

    def __call__(self, step: int, like: Tensor) -> Tensor:
        """What the sampling loop calls: the normals of position `step` of the grid, shaped as the state `like`."""
        return self.normal(like, step)

    def normal(self, like: Tensor, step: int, tag: str = "") -> Tensor:
        """Standard normals of the shape, dtype and device of `like` (B, *); computed in float32, then cast.

        Raises:
            ValueError: If `like` has another number of rows than there are indices.
        """
        if len(like) != len(self):
            raise ValueError(
                f"`like` has {len(like)} rows but the noise is keyed by {len(self)} indices: give one index per row"
            )
        out = torch.empty(like.shape, dtype=torch.float32, device=like.device)
        rows, keys = (
            out.view(len(self), -1) if out.numel() else out.reshape(len(self), 0),
            self._keys(step, tag, like.device),
        )
        width = rows.shape[1]
        block = max(1, _BLOCK // max(1, len(self)))
        for start in range(0, width, block):
            counter = torch.arange(start, min(start + block, width), device=like.device)
            # 2 u - 1 at the centres of 2^24 equal cells: never +-1, symmetric about 0
            symmetric = _shift(_mix_tensor(keys[:, None] + counter), 40).to(torch.float32).add_(0.5 - 2.0**23).mul_(2.0**-23)
            rows[:, start : start + block] = torch.erfinv(symmetric).mul_(2.0**0.5)
        return out.to(like.dtype)

    def uniform(self, step: int, tag: str = "") -> Tensor:
        """One uniform in (0, 1) per row: float64 (B,) on the CPU."""
        # the centres of 2^52 equal cells: with one bit more, adding 0.5 would round, the last cell to exactly 1
        bits = _shift(_mix_tensor(self._keys(step, tag, torch.device("cpu"))), 12)
        return bits.to(torch.float64).add_(0.5).mul_(2.0**-52)

    def _keys(self, step: int, tag: str, device: torch.device) -> Tensor:
        key = _mix(_mix(_mix(self.seed) ^ zlib.crc32(tag.encode())) ^ (step & _MASK))
        if device not in self._placed:
            self._placed[device] = self.index.to(device)
        return _mix_tensor(self._placed[device] ^ _signed(key))


class Draws:
    r"""The randomness of one training step: noise keyed by the example's place in the global batch.

    Arguments:
        seed: Any integer.
        step: Training step; each has its own numbers.
        position: Places (B,) of this process's examples in the global batch.
        total: Size of the global batch; `stratified` spreads over it.
    """

    def __init__(self, seed: int, step: int, position: Sequence[int] | Tensor, total: int | None = None):
        self.noise, self.step = Noise(seed, position), step
        self.total = len(self.noise) if total is None else total

    def __len__(self) -> int:
        return len(self.noise)

    def normal(self, like: Tensor, tag: str = "eps") -> Tensor:
        """Standard normals shaped as `like` (B, *)."""
        return self.noise.normal(like, self.step, tag)

    def uniform(self, tag: str) -> Tensor:
        """Independent uniforms in (0, 1), float64 (B,)."""
        return self.noise.uniform(self.step, tag)

    def stratified(self, tag: str = "u") -> Tensor:
        r"""Uniforms that share one offset, (u0 + i / total) mod 1: float64 (B,), each uniform in (0, 1), spread evenly.

        References:
            | Variational Diffusion Models (Kingma et al., 2021), appendix I.1: low-discrepancy times
            | https://arxiv.org/abs/2107.00630
        """
        u0 = Noise(self.noise.seed, [0]).uniform(self.step, tag)
        u = (u0 + self.noise.index.to(torch.float64) / self.total).remainder_(1.0)
        return u.clamp_(2.0**-53, 1.0 - 2.0**-53)
