"""`quieten zoo`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open

from ..training.bundled import ZOO, Bundle, bundled, bundles

__all__ = ["show"]


def show(name: str | None = None) -> None:
    """Prints what comes with the library, or one model of it with where its files are.

    Raises:
        ValueError: If there is no model of that name.
    """
    every = bundles()
    if name is not None:
        stem = bundled(name).stem
        every = [bundle for bundle in every if bundle.name == stem]
    for bundle in every:
        print("\n".join(_lines(bundle)))
    if name is None:
        total = sum(file.stat().st_size for file in ZOO.rglob("*") if file.is_file())
        print(f"\n{total / 2**20:.1f} MiB in {ZOO}; README.md there says how each was made")


def _lines(bundle: Bundle) -> Iterator[str]:
    with safe_open(bundle.file, "pt") as file:
        numbers = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118, it is no dictionary
    yield f"zoo:{bundle.name}: {numbers / 1e6:.2f} M parameters, {bundle.size / 2**20:.1f} MiB with what belongs to it"
    for what, names in (("variances", bundle.variances), ("policies", bundle.policies)):
        yield f"  {what:11s} {', '.join(names) or 'none'}"
    for path in bundle.classifiers:
        yield f"  {'classifier':11s} {path.stem}: {_accuracy(path)}"
    yield f"  {'statistics':11s} {bundle.statistics.name if bundle.statistics else 'none'}"
    for row in (*bundle.quality.get("samples", ()), *bundle.quality.get("policies", ())):
        corrected = row["result"]["details"]["corrected"]
        told = f"{row['frechet']}, corrected for bias {corrected:.2g}"
        name = row["sampler"] if "sampler" in row else f"--policy {row['policy']}"
        yield f"  {'quality':11s} {name} in {row['steps']} steps: {told}"
    if "floor" in bundle.quality:
        yield f"  {'':11s} (Frechet distance to the training data; that of held-out data: {bundle.quality['floor']})"


def _accuracy(path: Path) -> str:
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["accuracy"])
    if isinstance(told, float):
        return f"{told:.1%} of held-out pictures right"
    (low, least), (high, most) = told[0], told[-1]
    return f"of noisy pictures, {least:.0%} right at log-SNR {low:g}, {most:.0%} at {high:g}"
