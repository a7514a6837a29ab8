"""Pictures: decoding one, folders and zips of them."""

from __future__ import annotations

import json
import math
import os
import warnings
import zipfile
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from .idx import class_names

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["LazyImages", "UndividedError", "pixels", "read_pictures"]

IN_MEMORY = 2 * 2**30
"""Bytes of decoded pixels up to which a folder of images is held in memory."""

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
T = TypeVar("T")


class UndividedError(ValueError):
    """Data without a test split were asked for it."""

    def __init__(self, path: Path, remedy: str):
        super().__init__(
            f"`split` 'test': {path} is one whole: take split train (--split train), which is all of it, or {remedy}"
        )


# ---- folders and zips


@dataclass(frozen=True, eq=False)
class LazyImages:
    """Image files, decoded when indexed: as much of a uint8 tensor (N, C, H, W) as `quieten.data.Dataset` needs.

    Attributes:
        source: The folder, or the open zip.
        names: Files inside it, with /.
        item: (C, H, W) of every picture.
        size: Height and width to resize to; None for pictures that are of one size.
        crop: How, see `quieten.data.load`.
        cut: Side of the central square to keep first; None for all.
    """

    source: Path | zipfile.ZipFile
    names: tuple[str, ...]
    item: tuple[int, int, int]
    size: int | None
    crop: str
    cut: int | None = None
    dtype: ClassVar[torch.dtype] = torch.uint8

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shape(self) -> torch.Size:
        """(N, C, H, W)."""
        return torch.Size((len(self), *self.item))

    def subset(self, index: Tensor) -> LazyImages:
        """The pictures at `index`, int64 (B,), still undecoded."""
        return replace(self, names=tuple(self.names[k] for k in index.tolist()))

    def __getitem__(self, index: Tensor) -> Tensor:
        return _decoded(self.subset(index))[1]

    def decode(self, k: int) -> np.ndarray:
        """Picture k, uint8 (C, H, W); ValueError names a file that cannot be read."""
        from PIL import Image, ImageOps

        try:
            with _open(self.source, self.names[k]) as file, Image.open(file) as image:
                if (
                    self.size is not None and self.cut is None
                ):  # JPEG decodes at a fraction: twice the size leaves it to the resizing
                    image.draft(None, (2 * self.size, 2 * self.size))
                upright = ImageOps.exif_transpose(image)
                array = pixels(upright, self.item[0], self.size, self.crop, self.cut)
        except Exception as error:  # Pillow's plugins raise whatever their format makes them raise
            raise _corrupt(self.names[k], error) from error
        if array.shape != self.item:
            raise _corrupt(self.names[k], f"its shape is {array.shape}, not {self.item}")
        return array


def read_pictures(
    path: Path,
    split: str,
    size: int | None,
    channels: int | None,
    crop: str,
    labels: bool,
    skip: bool,
    cut: int | None = None,
    keep: Collection[str] | None = None,
) -> tuple[Tensor | LazyImages, Tensor | None, tuple[str, ...]]:
    """A folder or a zip of image files: images, labels int64 (N,) and classes; arguments as in `quieten.data.load`.

    A file `dataset.json` at its top, as EDM's tools write it, says the labels; `keep` are the file names of the split,
    where neither folders nor the archive say it.

    Raises:
        ValueError: If there are no images, or not of the split, or of unequal sizes; if a file cannot be read, unless `skip`.
    """
    try:
        source = path if path.is_dir() else zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read ({error}): the archive is damaged, get it again") from error
    found = _list(source, path, "train" if keep is not None else split)
    if keep is not None:
        found = [(name, parent) for name, parent in found if PurePosixPath(name).name in keep]
        if not found:
            raise ValueError(f"`split` {split!r}: {path} holds none of its {len(keep)} images: get the set again")
    told = _told_labels(source, path)
    headers = _each(lambda k: _header(source, found[k][0]), len(found), "looking at images", skip)
    files = [found[k] for k in headers]
    names = tuple(name for name, _ in files)
    if channels is None:
        channels = 1 if all(grey for grey, _ in headers.values()) else 3
    pairs = [pair for _, pair in headers.values()]
    side = size or cut
    width, height = (side, side) if side else _common_size(names, pairs)
    lazy = LazyImages(source, names, (channels, height, width), size, crop, cut)
    images: Tensor | LazyImages = lazy
    if math.prod(lazy.shape) <= IN_MEMORY:
        kept, images = _decoded(lazy, "decoding images", skip)
        files = [files[k] for k in kept]
    elif skip:  # the corrupt ones have to be found now
        kept = list(_each(lambda k: lazy.decode(k).size, len(files), "checking images", skip))
        files, images = [files[k] for k in kept], lazy.subset(torch.tensor(kept))
    if len(files) < len(found):
        lost = sorted({name for name, _ in found} - {name for name, _ in files})
        warnings.warn(f"{path}: left out {len(lost)} corrupt image files: {', '.join(lost)}", stacklevel=3)  # `load`'s caller
    if told is not None:
        return (images, *_numbers(path, told, [name for name, _ in files])) if labels else (images, None, ())
    classes = tuple(sorted({parent for _, parent in files}))
    if not labels or len(classes) < 2 or "" in classes:
        return images, None, ()
    return images, torch.tensor([classes.index(parent) for _, parent in files]), classes


def _list(source: Path | zipfile.ZipFile, path: Path, split: str) -> list[tuple[str, str]]:
    """Names of the image files of a split, sorted, each with its class folder ("" for none)."""
    if isinstance(source, zipfile.ZipFile):
        found = source.namelist()
    else:
        walk = os.walk(source)
        found = [Path(folder, file).relative_to(source).as_posix() for folder, _, files in walk for file in files]
    paths = sorted(p for p in map(PurePosixPath, found) if p.suffix.lower() in SUFFIXES and not _hidden(p))
    if not paths:
        raise ValueError(f"{path} holds no images ({' '.join(SUFFIXES)}): name a folder that does")
    depth, whole = 0, True
    while all(len(p.parts) > depth + 1 for p in paths):
        top = {p.parts[depth] for p in paths}
        if whole and top <= {"train", "test", "val", "valid", "validation"}:
            if split not in top:
                raise ValueError(
                    f"`split` {split!r}: {path} has only {', '.join(sorted(top))}: take another split, or add {split}"
                )
            paths, whole = [p for p in paths if p.parts[depth] == split], False
        elif len(top) > 1:
            break
        depth += 1  # a single folder around everything is no class
    if whole and split == "test":
        raise UndividedError(path, "divide it into subfolders train and test")
    return [(str(p), p.parts[depth] if len(p.parts) > depth + 1 else "") for p in paths]


def _told_labels(source: Path | zipfile.ZipFile, path: Path) -> dict[str, int] | None:
    """What a `dataset.json` says, file name -> label; {} if it says that there are none; None without one."""
    try:
        with _open(source, "dataset.json") as file:
            content = json.load(file)
        rows = content.get("labels") if isinstance(content, dict) else None
        return {str(name): int(label) for name, label in rows or []}
    except (FileNotFoundError, KeyError):  # in a folder, in a zip
        return None
    except (ValueError, TypeError) as error:
        wanted = '{"labels": [[file, number], ...]}'
        raise ValueError(f"{path}: dataset.json cannot be read ({error}): it must hold {wanted}") from None


def _numbers(path: Path, told: dict[str, int], names: Sequence[str]) -> tuple[Tensor | None, tuple[str, ...]]:
    """Labels int64 (N,) and classes of the files, from what a `dataset.json` says."""
    if not told:
        return None, ()
    missing = [name for name in names if name not in told]
    if missing:
        raise ValueError(f"{path}: dataset.json has no label for {missing[0]}: write it anew, or pass labels=False")
    number = torch.tensor([told[name] for name in names])
    if number.min() < 0:
        raise ValueError(f"{path}: dataset.json has a label {int(number.min())} below 0: number classes from 0 on")
    return number, class_names(number)


def _hidden(path: PurePosixPath) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _header(source: Path | zipfile.ZipFile, name: str) -> tuple[bool, tuple[int, int]]:
    """Whether a picture is grey, and its width and height when upright; reads the file's first bytes only."""
    from PIL import ExifTags, Image

    try:
        with _open(source, name) as file, Image.open(file) as image:
            # Pillow turns TIFF by itself, and would decode a PNG whole to look for a tag behind the pixels
            tagged = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
            exif = image.getexif() if tagged else {}
            turned = exif.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            grey = image.mode.split(";")[0] in ("1", "L", "LA", "La", "I", "F")
            return grey, image.size[::-1] if turned else image.size
    except Exception as error:
        raise _corrupt(name, error) from error


def _common_size(names: Sequence[str], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    first = "{} x {}".format(*sizes[0])
    for name, (width, height) in zip(names, sizes, strict=True):
        if (width, height) != sizes[0]:
            raise ValueError(f"{name} is {width} x {height} but {names[0]} is {first}: pass `size` to resize all")
    return sizes[0]


def _decoded(images: LazyImages, title: str = "", skip: bool = False) -> tuple[list[int], Tensor]:
    """Those pictures that can be read, and their pixels, uint8 (N, C, H, W)."""
    whole = torch.empty(images.shape, dtype=images.dtype)
    rows = whole.numpy()
    kept = _each(lambda k: rows.__setitem__(k, images.decode(k)), len(images), title, skip)
    return list(kept), whole if len(kept) == len(images) else whole[list(kept)]


def _each(work: Callable[[int], T], n: int, title: str = "", skip: bool = False) -> dict[int, T]:
    """{k: work(k)} for k < n, by threads, with a bar when there is much; `skip` leaves ValueErrors out."""
    from rich.console import Console
    from rich.progress import track

    chunk = max(1, min(16, n // (4 * (os.cpu_count() or 1))))
    errors: list[ValueError] = []

    def some(start: int) -> list[tuple[int, T]]:
        results = []
        for k in range(start, min(start + chunk, n)):
            try:
                results.append((k, work(k)))
            except ValueError as error:
                errors.append(error)
                if not skip:
                    raise
        return results

    console, pool = Console(stderr=True), ThreadPoolExecutor(os.cpu_count())
    try:
        parts = pool.map(some, range(0, n, chunk))
        quiet = not title or n < 2000 or not console.is_terminal
        shown = track(parts, title, math.ceil(n / chunk), console=console, transient=True, disable=quiet)
        kept = {k: result for part in shown for k, result in part}
    finally:
        pool.shutdown(cancel_futures=True)  # the first error, or Ctrl-C, stops the rest
    if errors and not kept:
        raise errors[0]
    return kept


def _open(source: Path | zipfile.ZipFile, name: str) -> IO[bytes]:
    return source.open(name) if isinstance(source, zipfile.ZipFile) else (source / name).open("rb")


def _corrupt(name: str, error: object) -> ValueError:
    return ValueError(f"{name} cannot be read ({error}): repair or remove it, or pass skip_corrupt=True")


# ---- one picture


def pixels(image: Image.Image, channels: int, size: int | None, crop: str, cut: int | None = None) -> np.ndarray:
    """Levels of a picture made plain and square: uint8 (C, H, W); arguments as in `quieten.data.load`."""
    plain = _plain(image, channels)
    array = np.asarray(_fit(plain if cut is None else _cut(plain, cut), size, crop))
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _plain(image: Image.Image, channels: int) -> Image.Image:
    """Eight bits of grey or RGB: transparency falls on white, 16 bits are rounded to 8."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("float grey levels have no fixed range")
    if image.mode.startswith("I"):  # 0..65535 -> 0..255 is a division by 257
        levels = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((levels + 128) // 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("L" if channels == 1 else "RGB")


def _cut(image: Image.Image, side: int) -> Image.Image:
    """The central square of a picture."""
    if min(image.size) < side:
        raise ValueError(f"it is {image.size[0]} x {image.size[1]}, too small to cut {side} from it")
    left, top = ((n - side) // 2 for n in image.size)
    return image.crop((left, top, left + side, top + side))


def _fit(image: Image.Image, size: int | None, crop: str) -> Image.Image:
    """A square of `size`, bicubic: Pillow widens the kernel when it shrinks, which is the antialiasing."""
    from PIL import Image, ImageOps

    if size is None or image.size == (size, size):
        return image
    bicubic, square = Image.Resampling.BICUBIC, (size, size)
    if crop == "pad":
        return ImageOps.pad(image, square, bicubic, color="white")
    return ImageOps.fit(image, square, bicubic) if crop == "center" else image.resize(square, bicubic)
