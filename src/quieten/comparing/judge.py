"""What samples are judged by: one reference, one extractor of features, the metrics that take them, and what they remember."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..data import Dataset, Order
from ..files import write_atomic, writing
from ..metrics import Manifold, Result, Statistics, frechet, kid, prdc
from ..metrics.features import Extractor
from ..progress import Progress

__all__ = ["METRICS", "Judge", "as_images", "digest"]

METRICS = ("frechet", "kid", "precision", "recall", "density", "coverage")
"""What is measured, where the number of samples allows."""

PAIRS = 10_000
"""Reference images for metrics that compare every sample with every one of them; the first of a fixed order."""

BLOCK = 500
FORMAT = 1


class Judge:
    """Measures samples against the same reference, by the same extractor.

    Arguments:
        extractor: Images in [-1, 1] to features.
        reference: What samples should look like.
        folder: Where features of the reference are kept, so that the next call has them.
        floor: Real examples outside the reference, which say how well one can do; None where there are none.
        seed: Of everything that the metrics draw.
        show: Whether to show progress on standard error.
    """

    def __init__(
        self,
        extractor: Extractor,
        reference: Dataset,
        folder: str | Path,
        floor: Dataset | None = None,
        seed: int = 0,
        show: bool = True,
    ):
        self.extractor, self.reference, self.floor, self.seed, self.show = extractor, reference, floor, seed, show
        self.folder, self.notes = Path(folder), dict[str, None]()
        self.given = extractor.for_features()

    # -- the reference

    @cached_property
    def features(self) -> Tensor:
        """Features (N, F) of the reference, read from the folder if they are there."""
        path = self.folder / f"{self.reference.name}-{digest(self.reference)[:8]}-{self.extractor.hash[:8]}.safetensors"
        try:
            return load_file(path)["features"]
        except (OSError, SafetensorError, KeyError):  # not there, or not whole: made again
            pass
        count, rows = len(self.reference), []
        with Progress(count, 0, "features of the reference", self.show) as progress:
            for i in range(0, count, BLOCK):
                part = torch.arange(i, min(i + BLOCK, count))
                rows.append(self.extractor.extract(self.reference.batch(part)[0]))
                progress.update(i + len(part))
        features = torch.cat(rows)
        with writing(path):
            write_atomic(path, save({"features": features}))
        return features

    @cached_property
    def statistics(self) -> Statistics:
        return Statistics.of(self.features, self.extractor.hash)

    @cached_property
    def paired(self) -> Tensor:
        """Features of the reference images that every sample is compared with."""
        n = len(self.features)
        return self.features if n <= PAIRS else self.features[Order(n, PAIRS, self.seed).indices(0)]

    @cached_property
    def manifold(self) -> Manifold:
        return Manifold.of(self.paired, extractor=self.extractor.hash)

    # -- judging

    def measure(self, features: Tensor, seeds: Sequence[int] = (), weights: str = "unstated") -> dict[str, Result]:
        """Every metric that so many samples allow, by name.

        Arguments:
            features: Of the samples, (n, F).
            seeds: Seeds they were drawn with, for the protocols.
            weights: Weights they were drawn with, for the protocols.

        Raises:
            ValueError: If features are not finite.
        """
        name = f"{self.reference.name}, train"
        facts: dict[str, Any] = {"reference_name": name, "seeds": tuple(seeds), "weights": weights}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results = {"frechet": frechet(features, self.statistics, self.given, split_seed=self.seed, **facts)}
            for make in (self._kid, self._prdc):
                try:
                    results |= make(features, facts)
                except ValueError as error:  # fewer samples than it needs
                    self.notes[" ".join(str(error).split())] = None
        for warning in caught:
            self.notes[str(warning.message)] = None
        return results

    def _kid(self, features: Tensor, facts: Mapping[str, Any]) -> dict[str, Result]:
        return {"kid": kid(features, self.paired, self.given, blocks=None, seed=self.seed, **facts)}

    def _prdc(self, features: Tensor, facts: Mapping[str, Any]) -> dict[str, Result]:
        return prdc(features, self.manifold, self.given, seed=self.seed, **facts)

    def kept(self, folder: Path, samples: Callable[[], Tensor], n: int, **facts: Any) -> dict[str, Result]:
        """`measure` of n samples, remembered in a folder with their features: asked again, it costs nothing.

        Arguments:
            folder: Of the samples.
            samples: Gives them, as `as_images` takes them; asked only where their features are not there yet.
            n: How many.
            **facts: Seeds and weights, for the protocols.
        """
        asked = {"format": FORMAT, "n": n, "metrics": METRICS, "pairs": PAIRS, "seed": self.seed, **facts}
        asked |= {"reference": digest(self.reference), "extractor": self.extractor.hash}
        key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        path = folder / f"results-{key[:12]}.json"
        if path.is_file():
            content = json.loads(path.read_text("utf-8"))
            self.notes |= dict.fromkeys(content["notes"])
            return {name: Result.from_dict(result) for name, result in content["results"].items()}
        before = set(self.notes)
        results = self.measure(self._features(folder, samples, n), **facts)
        content = {"results": {name: result.to_dict() for name, result in results.items()}}
        content["notes"] = [note for note in self.notes if note not in before]
        with writing(path):
            write_atomic(path, json.dumps(content, indent=1).encode())
        return results

    def _features(self, folder: Path, samples: Callable[[], Tensor], n: int) -> Tensor:
        path = folder / f"features-{n}-{self.extractor.hash[:8]}.safetensors"
        try:
            return load_file(path)["features"]
        except (OSError, SafetensorError, KeyError):
            features = self.extractor.extract(as_images(samples()))
        with writing(path):
            write_atomic(path, save({"features": features}))
        return features

    def real(self, n: int) -> dict[str, Result]:
        """What the first n real examples outside the reference score; {} without any."""
        if self.floor is None:
            return {}
        count = min(n, len(self.floor))
        folder = self.folder / f"{self.floor.name}-test-{digest(self.floor)[:8]}"
        floor = self.floor
        return self.kept(folder, lambda: floor.batch(torch.arange(count))[0], count, seeds=(), weights="real")


def as_images(samples: Tensor) -> Tensor:
    """Samples as extractors take them: bytes become k / 127.5 - 1, floats stay."""
    return samples.float().div_(127.5).sub_(1) if samples.dtype == torch.uint8 else samples


def digest(data: Dataset) -> str:
    """SHA-256 of a data set: of all its examples if they are in memory, else of 64 spread evenly."""
    h = hashlib.sha256(f"{data.name} {len(data)} {data.shape}".encode())
    if isinstance(data.images, Tensor):
        images = data.images
    else:
        images = data.images[torch.linspace(0, len(data) - 1, min(64, len(data))).long()]
    h.update(images.contiguous().numpy().tobytes())
    return h.hexdigest()
