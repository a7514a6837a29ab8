"""Moments of features, over blocks and processes, and the files that keep them."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..files import write_atomic
from ..training.bundled import bundled

__all__ = ["Statistics", "gather_rows"]

T = TypeVar("T")

_BLOCK = 4096  # rows of features turned to float64 at a time


@dataclass
class Statistics:
    """Mean and covariance of features, float64 on the CPU, gathered in one pass over any blocks.

    `Statistics()` starts empty and takes its width from the first block.

    Arguments:
        mean: Mean of the features (F,).
        covariance: Their unbiased covariance (F, F), divided by n - 1.
        n: Number of samples; None where a file does not say.
        extractor: Hash of the extractor that made the features, empty if unknown.
    """

    mean: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    covariance: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    n: int | None = 0
    extractor: str = ""

    def __post_init__(self) -> None:
        width = self.mean.shape[0] if self.mean.dim() == 1 else None
        if width is None or tuple(self.covariance.shape) != (width, width):
            shapes = f"{tuple(self.mean.shape)} and {tuple(self.covariance.shape)}"
            raise ValueError(f"mean and covariance must be (F,) and (F, F), got {shapes}: pass a matching pair")
        if not (torch.isfinite(self.mean).all() and torch.isfinite(self.covariance).all()):
            raise ValueError("mean or covariance holds NaN or infinity: compute the statistics again")
        self.mean = self.mean.to("cpu", torch.float64)
        self.covariance = self.covariance.to("cpu", torch.float64)

    @classmethod
    def of(cls, features: Tensor, extractor: str = "") -> Statistics:
        """Statistics of all rows of features (n, F)."""
        return cls(extractor=extractor).update(features)

    def update(self, features: Tensor) -> Statistics:
        """Adds features (B, F) in place and returns self.

        Blocks are merged by their means and scatters (Chan, Golub, LeVeque, 1979), which keeps its digits
        where the mean is large beside the spread; sums of squares do not.

        Raises:
            ValueError: If features are not (B, F), of another width, or not finite.
        """
        if self.n is None:
            raise ValueError("statistics of an unknown number of samples cannot be updated: give n to load()")
        if features.dim() != 2 or (self.n > 0 and features.shape[1] != self.mean.shape[0]):
            wanted = f"(B, {self.mean.shape[0]})" if self.n else "(B, F)"
            raise ValueError(f"features must be {wanted}, got {tuple(features.shape)}: use one extractor throughout")
        for block in features.detach().split(_BLOCK):
            self._merge(block.to("cpu", torch.float64))
        return self

    def _merge(self, block: Tensor) -> None:
        if not torch.isfinite(block).all():
            bad = int((~torch.isfinite(block).all(1)).sum())
            raise ValueError(f"features of {bad} of {len(block)} samples are NaN or infinite: look at those images")
        if len(block) == 0:
            return
        mean = block.mean(0)
        centred = block - mean
        self._add(len(block), mean, centred.T @ centred)

    def _add(self, b: int, mean: Tensor, scatter: Tensor) -> None:
        """Adds b > 0 samples of a mean (F,) and a scatter about it (F, F)."""
        n = self.n or 0
        if not n:
            self.mean, self.covariance = torch.zeros_like(mean), torch.zeros_like(scatter)
        shift = mean - self.mean
        scatter = self.covariance * max(n - 1, 0) + scatter
        scatter = torch.addr(scatter, shift, shift, alpha=n * b / (n + b))
        self.mean = self.mean + shift * (b / (n + b))
        self.covariance = scatter / max(n + b - 1, 1)
        self.n = n + b

    def merge(self, other: Statistics) -> Statistics:
        """Adds the samples that another has seen, in place, and returns self: as if all had come in one pass.

        Raises:
            ValueError: If either does not know its number of samples, or they are of other widths or extractors.
        """
        if self.n is None or other.n is None:
            raise ValueError("statistics of an unknown number of samples cannot be merged: give n to load()")
        if self.extractor and other.extractor and self.extractor != other.extractor:
            names = f"{self.extractor[:8]} and {other.extractor[:8]}"
            raise ValueError(f"statistics come from extractors {names}: compute both with the same one")
        if self.n and other.n and len(self.mean) != len(other.mean):
            raise ValueError(f"statistics have {len(self.mean)} and {len(other.mean)} features: use one extractor throughout")
        self.extractor = self.extractor or other.extractor
        if other.n:
            self._add(other.n, other.mean, other.covariance * max(other.n - 1, 0))
        return self

    def gather(self) -> Statistics:
        """The statistics of all processes together, the same on each; self where there is one process only."""
        parts = _everyone((self.mean, self.covariance, self.n, self.extractor))
        if len(parts) == 1:
            return self
        total = Statistics(extractor=self.extractor)
        for part in parts:
            total.merge(Statistics(*part))
        return total

    def save(self, path: str | Path, single: bool = False) -> None:
        """Writes an npz with `mu` and `sigma`, as pytorch-fid, EDM and ADM read them, plus `n` and `extractor`.

        Arguments:
            path: The file.
            single: As float32, in half the space.
        """
        kind = np.float32 if single else np.float64
        arrays: dict[str, Any] = {"mu": self.mean.numpy().astype(kind), "sigma": self.covariance.numpy().astype(kind)}
        arrays["extractor"] = np.array(self.extractor)
        if self.n is not None:
            arrays["n"] = np.int64(self.n)
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        write_atomic(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path, n: int | None = None) -> Statistics:
        """Reads an npz with `mu` and `sigma`; pickles in it are refused.

        Arguments:
            path: File written by `save`, by pytorch-fid or by EDM, or a reference batch of ADM.
            n: Number of samples, where the file does not say; ADM's does, if it has the samples themselves.

        Raises:
            ValueError: If it cannot be read, or lacks them. A file of images alone, `arr_0`, is read by `data.load`.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
        except FileNotFoundError:
            raise
        except Exception as error:  # numpy raises half a dozen kinds for a damaged file
            raise ValueError(f"path {path} cannot be read as npz ({error}): write the statistics again") from error
        if not {"mu", "sigma"} <= arrays.keys():
            keys = ", ".join(arrays) or "nothing"
            if "arr_0" in arrays:
                raise ValueError(f"path {path} holds images and no statistics: make them by `quieten features stats {path}`")
            raise ValueError(f"path {path} must hold mu and sigma, it holds {keys}: write it with Statistics.save")
        mean, covariance = (torch.from_numpy(np.asarray(arrays[k], np.float64)) for k in ("mu", "sigma"))
        count = int(arrays["n"]) if "n" in arrays else len(arrays["arr_0"]) if "arr_0" in arrays and n is None else n
        return cls(mean, covariance, count, str(arrays.get("extractor", "")))

    @classmethod
    def zoo(cls, name: str) -> Statistics:
        """Of the training data of a model that comes with the library, by the features of `Extractor.zoo` of the same name.

        Raises:
            ValueError: If there are none of that name.
        """
        return cls.load(bundled(name, "statistics", what="statistics", suffix=".npz"))


def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Rows of all processes in the order of their numbers, the same on each: those of one process as they are, sorted.

    Arguments:
        rows: What this process worked out (n, *), features or images; n may differ between processes.
        index: Their places among all, int64 (n,): 0 .. N - 1, each on one process. Places that come twice, as when a sampler
            fills its last batch up, are kept once.

    Returns:
        On the CPU, (N, *).

    Raises:
        ValueError: If places are missing.
    """
    if len(rows) != len(index):
        raise ValueError(f"`index` must number the {len(rows)} rows (got {len(index)}): one place for each")
    parts = _everyone((rows.detach().cpu(), index.cpu()))
    every, places = (torch.cat(column) for column in zip(*parts, strict=True))
    out = every.new_zeros(int(places.max()) + 1 if len(places) else 0, *every.shape[1:])
    missing = torch.ones(len(out), dtype=torch.bool)
    missing[places] = False
    if missing.any():
        raise ValueError(f"`index` lacks {int(missing.sum())} places, the first {int(missing.nonzero()[0])}: number all rows")
    out[places] = every
    return out


def _everyone(own: T) -> list[T]:
    """What each process has, in the order of their ranks."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return [own]
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, own)
    return parts
