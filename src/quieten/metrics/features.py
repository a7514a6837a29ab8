"""Images to features: what every distance between sets of images starts from."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..training.bundled import bundled
from .statistics import Statistics, gather_rows

if TYPE_CHECKING:
    from ..data import Dataset

__all__ = ["Extractor", "Statistics", "gather_rows", "statistics_of"]


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
    def zoo(cls, name: str, device: torch.device | str = "cpu") -> Extractor:
        """A classifier that comes with the library, trained on the data set of that name.

        Arguments:
            name: Such as "fashion-mnist"; its beginning will do.
            device: Where to compute.

        Raises:
            ValueError: If there is none of that name.
        """
        return cls.load(f"zoo:{name}", device=device)

    @classmethod
    def load(cls, name_or_path: str | Path, sha256: str | None = None, device: torch.device | str = "cpu") -> Extractor:
        """An extractor by name.

        Arguments:
            name_or_path: "pixels"; "zoo:NAME" of those that come with the library; a file that `quieten features train` wrote;
                "inception:PATH" or "pytorch-fid:PATH", the network of FID with your weights and either's preprocessing.
            sha256: What the file must hash to, or the beginning of it, at least 8 digits; None takes any.
            device: Where to compute.

        Raises:
            ValueError: If there is none, it is damaged, or another file than expected.
        """
        from ..nets import Classifier
        from ..training.weights import read_tensors

        kind, _, rest = str(name_or_path).partition(":")
        if kind == "zoo":
            name_or_path = bundled(rest, "classifiers", what="classifier")
        if str(name_or_path) == "pixels":
            return cls.pixels()
        if kind in ("inception", "pytorch-fid"):
            from .inception import inception

            return inception(rest, sha256, device, kind)
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            known = "pixels, zoo:NAME, inception:PATH, pytorch-fid:PATH, or a file of `quieten features train`"
            raise ValueError(f"no extractor {str(name_or_path)!r}: {known}")
        checked(path, sha256)
        metadata = read_tensors(path, "write it with `quieten features train`")[1]
        if "options" not in metadata or {"step", "noise"} & metadata.keys():
            what = "is not trained to the end" if "step" in metadata else "is no classifier of clean images"
            raise ValueError(f"{path} {what}: write one with `quieten features train`")
        options = json.loads(metadata["options"])
        name = f"zoo classifier of {path.stem}" if kind == "zoo" else None
        return cls.from_classifier(path, lambda: Classifier(**options).to(device), name=name)


def checked(path: Path, sha256: str | None) -> bytes:
    """The bytes of a file.

    Raises:
        ValueError: If it cannot be read, or does not hash to what was expected.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): name a file with weights") from error
    digest = hashlib.sha256(content).hexdigest()
    if sha256 is not None and (len(sha256) < 8 or not digest.startswith(sha256.lower())):
        raise ValueError(f"`sha256` {sha256} is not that of {path}, which is {digest}: get the file again, or correct it")
    return content


def statistics_of(
    data: Dataset, extractor: Extractor, batch: int = 256, progress: Callable[[int], None] | None = None
) -> Statistics:
    """Statistics of a whole data set, a batch at a time; the same whatever the batch, and however many processes share it.

    Arguments:
        data: Images.
        extractor: What makes the features.
        batch: Images at once.
        progress: Called with the number of images done by this process.
    """
    from torch import distributed

    shared = distributed.is_available() and distributed.is_initialized()
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if shared else (0, 1)
    total, done = Statistics(extractor=extractor.hash), 0
    for index in torch.arange(rank, len(data), world).split(batch):
        total.update(extractor.extract(data.batch(index)[0], batch))
        done += len(index)
        if progress is not None:
            progress(done)
    return total.gather()


def _hash_module(module: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of the state dict, in the order of the names."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
