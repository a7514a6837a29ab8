"""A recipe for data that come without one."""

from __future__ import annotations

import statistics
import zipfile
from pathlib import Path
from typing import Any

from ..data import load

__all__ = ["guess"]

LARGEST = 64
"""Pixels on a side up to which training on a CPU is reasonable; --set data.size= asks for more."""

LOOK_AT = 256
"""Pictures whose size is looked at."""


def guess(path: Path) -> dict[str, Any]:
    """The content of a recipe that suits a data set: a network and a size that go together, a duration that suits its number.

    Arguments:
        path: A folder or zip of images, a folder of idx files, an .npz or .npy file.

    Raises:
        ValueError: If nothing there can be trained on.
    """
    data: dict[str, Any] = {"name": str(path.resolve())}
    model: dict[str, Any] = {}
    sizes = _picture_sizes(path)
    if sizes:
        side, count = int(statistics.median(map(min, sizes))), len(sizes)
        if len(set(sizes)) > 1 or sizes[0] != (side, side) or side != _suitable(side):
            data["size"] = _suitable(side)
    else:
        found = load(path)
        shape, count = found.shape, len(found)
        picture = len(shape) == 3 and shape[0] in (1, 3)
        square = picture and shape[1] == shape[2] == _suitable(shape[1])
        if picture and not square and not found.images.dtype.is_floating_point:
            data["size"] = _suitable(min(shape[1:]))
        elif not square:
            model["net"] = "mlp"
    images = min(max(100 * count, 100_000), 1_000_000)
    train = {"images": images, "ema": images // 20, "preview_every": images // 8}
    return {"version": 1, "name": path.resolve().stem, "data": data, "model": model, "train": train}


def _suitable(side: int) -> int:
    """The largest side up to this one that the U-Net can halve."""
    return max(8, min(side, LARGEST) // 4 * 4)


def _picture_sizes(path: Path) -> list[tuple[int, int]]:
    """(width, height) of the pictures in a folder or zip: of some, repeated so that their number is right."""
    from PIL import Image, UnidentifiedImageError

    from ..datasets.pictures import SUFFIXES

    sizes = []
    if path.is_dir():
        files: list[Any] = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        archive = None
    elif path.suffix.lower() == ".zip" and zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        files = [name for name in archive.namelist() if Path(name).suffix.lower() in SUFFIXES]
    else:
        return []
    for file in files[:: max(1, len(files) // LOOK_AT)]:
        try:
            with archive.open(file) if archive else file.open("rb") as stream, Image.open(stream) as image:
                sizes.append(image.size)
        except (OSError, UnidentifiedImageError):
            continue  # whether to leave it out is for `load` to say
    return [size for size in sizes for _ in range(len(files) // len(sizes))]
