"""Images to features, and the moments of features: what every distance between sets of images starts from."""

from __future__ import annotations

import copy
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .files import write_atomic

__all__ = ["Extractor", "Statistics", "gather_rows"]

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

    def save(self, path: str | Path) -> None:
        """Writes an npz with `mu` and `sigma`, as pytorch-fid and EDM read them, plus `n` and `extractor`."""
        arrays: dict[str, Any] = {"mu": self.mean.numpy(), "sigma": self.covariance.numpy()}
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
            path: File written by `save`, by pytorch-fid or by EDM.
            n: Number of samples, where the file does not say.
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
            raise ValueError(f"path {path} must hold mu and sigma, it holds {keys}: write it with Statistics.save")
        mean, covariance = (torch.from_numpy(np.asarray(arrays[k], np.float64)) for k in ("mu", "sigma"))
        count = int(arrays["n"]) if "n" in arrays else n
        return cls(mean, covariance, count, str(arrays.get("extractor", "")))


@dataclass(frozen=True)
class Extractor:
    """Images to features, with a name and a hash that go into every result.

    Arguments:
        name: Name for people.
        fn: Maps images (B, C, H, W) in [-1, 1] to features (B, F); any callable.
        hash: SHA-256 of what defines it.
        preprocessing: What happens to images on the way, in words.
        given: What it is handed are features that it made before, see `for_features`.
    """

    name: str
    fn: Callable[[Tensor], Tensor]
    hash: str
    preprocessing: str = "images in [-1, 1], as they are"
    given: bool = False

    def for_features(self) -> Extractor:
        """The same by name and hash, for features (N, F) that were extracted before: metrics then take those for images.

        Example:
            >>> pixels = Extractor.pixels()
            >>> pixels.for_features().extract(torch.full((2, 3), 100.0)).shape
            torch.Size([2, 3])
        """
        return replace(self, given=True)

    def extract(self, images: Tensor, batch: int = 256) -> Tensor:
        """Features (N, F) on the CPU, of images (N, C, H, W) in [-1, 1], computed without gradients.

        Raises:
            ValueError: If images are integers or look like 0..255, or if fn does not return (B, F).
        """
        if not images.is_floating_point() or images.dim() < 2 or len(images) == 0:
            got = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(f"images must be floats (N, ...) in [-1, 1], got {got}: use pixels / 127.5 - 1 for bytes")
        if self.given:
            if images.dim() != 2:
                raise ValueError(f"features must be (N, F), got {tuple(images.shape)}: pass images to the extractor itself")
            return images.detach().cpu()
        if images.detach().abs().max() > 16:  # free of false alarms: unclipped samples stray, but not that far
            raise ValueError(f"images reach {float(images.abs().max()):.3g}: scale them to [-1, 1] first")
        rows = []
        with torch.no_grad():
            for block in images.split(batch):
                out = self.fn(block)
                if out.dim() != 2 or len(out) != len(block):
                    want = f"({len(block)}, F)"
                    raise ValueError(f"extractor {self.name} must return {want}, got {tuple(out.shape)}: flatten it")
                rows.append(out.detach().cpu())
        return torch.cat(rows)

    @classmethod
    def pixels(cls) -> Extractor:
        """The images themselves, flattened: right for 8x8 digits, blind to what moves in larger images."""
        return cls("pixels", lambda x: x.flatten(1), hashlib.sha256(b"pixels, flattened, [-1, 1]").hexdigest())

    @classmethod
    def from_classifier(
        cls,
        source: nn.Module | str | Path,
        build: Callable[[], nn.Module] | None = None,
        *,
        name: str | None = None,
        preprocessing: str = "images in [-1, 1], as they are",
    ) -> Extractor:
        """The layer before the output of a classifier: any module with a method `features(x)`.

        Arguments:
            source: The module (a frozen copy in eval mode is kept), or a safetensors file of its weights.
            build: Makes the module to load a file into.
            name: Name for people; the class or the file's stem by default.
            preprocessing: What `features` expects, in words.
        """
        if isinstance(source, nn.Module):
            module, digest, default = copy.deepcopy(source), _hash_module(source), type(source).__name__
        else:
            if build is None:
                raise ValueError(f"build is needed to load {source}: pass a function that makes the module")
            from safetensors.torch import load

            data, module = Path(source).read_bytes(), build()
            module.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load(data).items()})
            digest, default = hashlib.sha256(data).hexdigest(), Path(source).stem
        features = getattr(module, "features", None)
        if not callable(features):
            raise ValueError(f"{type(module).__name__} has no method features(x): add one that returns (B, F)")
        module.eval().requires_grad_(False)
        place = next(module.parameters(), torch.empty(0))
        return cls(name or default, lambda x: features(x.to(place)), digest, preprocessing)

    @classmethod
    def zoo(cls, name: str) -> Extractor:
        """A classifier that comes with the library, trained on the data set of that name.

        Raises:
            ValueError: If there is none of that name.
        """
        from safetensors import safe_open

        from .nets import Classifier

        folder = Path(__file__).parent / "zoo" / "classifiers"
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in folder.glob("*.safetensors"))) or "none"
            raise ValueError(f"no classifier {name!r} comes with the library (known: {known}): use Extractor.from_classifier")
        with safe_open(path, "pt") as file:
            options = json.loads(file.metadata()["options"])
        return cls.from_classifier(path, lambda: Classifier(**options), name=f"zoo classifier of {name}")


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


def _hash_module(module: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of the state dict, in the order of the names."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
