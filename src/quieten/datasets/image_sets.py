"""The image sets of the papers, as they are handed out: CIFAR-10, small ImageNet, CelebA, LSUN bedrooms."""

from __future__ import annotations

import os
import tarfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, ClassVar

import numpy as np
import torch
from torch import Tensor

from .idx import class_names, places
from .pictures import SUFFIXES

__all__ = [
    "SETS",
    "SIDES",
    "MappedImages",
    "find_set",
    "held_out",
    "is_cifar",
    "is_imagenet",
    "npz_member",
    "read_cifar",
    "read_imagenet",
]

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_ARCHIVE = "cifar-10-binary.tar.gz"

SETS = {
    "cifar10": ("cifar-10-batches-bin", _ARCHIVE),
    "imagenet32": ("Imagenet32_train", "Imagenet32"),
    "imagenet64": ("Imagenet64_train", "Imagenet64"),
    "celeba": ("img_align_celeba", "img_align_celeba.zip", "celeba.zip", "celeba-64x64.zip"),
    "lsun-bedroom": ("bedroom_train", "lsun-bedroom.zip"),
}
"""Sets that are found by name -> what they may be called within the folders where data lie."""

SIDES = {"imagenet32": 32, "imagenet64": 64}
"""Sets of npz files -> the side of their images."""

_WHERE_FROM = {
    "cifar10": f"get https://www.cs.toronto.edu/~kriz/{_ARCHIVE}",
    **dict.fromkeys(
        ("imagenet32", "imagenet64"), "get the npz files of Downsampled ImageNet from https://image-net.org/download-images.php"
    ),
    "celeba": "get img_align_celeba.zip from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
    "lsun-bedroom": "export the bedroom_train images of https://github.com/fyu/lsun into a folder",
}


def find_set(name: str, data: str | Path | None) -> Path:
    """Where a set of `SETS` lies: a folder or an archive.

    Arguments:
        name: Its name.
        data: Where to look first; the order of the other places is told by `quieten.data.load`.

    Raises:
        ValueError: If it is nowhere, saying where it comes from.
    """
    folders = places(name, data)
    for folder in folders:
        for path in (*(folder / inside for inside in SETS[name]), folder):
            if _holds(name, path):
                return path
    pickled = [
        f for f in folders if any((f / p).exists() for p in ("cifar-10-batches-py", "cifar-10-python.tar.gz", "data_batch_1"))
    ]
    if name == "cifar10" and pickled:
        raise ValueError(f"{pickled[0]} holds CIFAR-10 as Python pickles, which may run code and are not opened: "
                         f"{_WHERE_FROM[name]}, the binary version")  # fmt: skip
    remedy = f"{_WHERE_FROM[name]} and name its folder with `data`"
    raise ValueError(f"{name} is not in {', '.join(map(str, folders))}: {remedy}")


def _holds(name: str, path: Path) -> bool:
    if name == "cifar10":
        return is_cifar(path)
    if name in SIDES:
        return is_imagenet(path)
    if path.is_file():
        return zipfile.is_zipfile(path)
    deep = path.name in (name, *SETS[name])  # a folder that the user named has the pictures themselves in it, or is another
    walk = os.walk(path) if deep else [(path, [], [file.name for file in path.iterdir()])] if path.is_dir() else []
    return any(Path(file).suffix.lower() in SUFFIXES for _, _, files in walk for file in files)


# ---- CIFAR-10


def is_cifar(path: Path) -> bool:
    """Whether a path is CIFAR-10's binary version: its folder, or its archive."""
    return (path / "data_batch_1.bin").is_file() or (path.is_file() and path.name == _ARCHIVE)


def read_cifar(path: Path, split: str, labels: bool) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
    """Images uint8 (N, 3, 32, 32), labels int64 (N,) where asked for, and the classes.

    Raises:
        ValueError: If a file is missing or damaged.
    """
    names = ["test_batch.bin"] if split == "test" else [f"data_batch_{k}.bin" for k in range(1, 6)]
    rows = []
    try:
        if path.is_dir():
            rows = [_records(path / name, (path / name).read_bytes()) for name in names]
        else:
            with tarfile.open(path) as archive:
                inside = {PurePosixPath(member).name: member for member in archive.getnames()}
                for name in names:
                    file = archive.extractfile(inside[name]) if name in inside else None
                    if file is None:
                        raise ValueError(f"{path} lacks {name}: {_WHERE_FROM['cifar10']} again")
                    rows.append(_records(path / name, file.read()))
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ValueError(f"{path} cannot be read ({error}): {_WHERE_FROM['cifar10']} again") from error
    table = np.concatenate(rows)
    images = torch.from_numpy(np.ascontiguousarray(table[:, 1:]).reshape(-1, 3, 32, 32))
    return images, torch.from_numpy(table[:, 0].astype(np.int64)) if labels else None, CIFAR_CLASSES if labels else ()


def _records(name: Path, content: bytes) -> np.ndarray:
    """The rows of a batch: a byte for the label, 3072 for the image, its planes red, green, blue."""
    if not content or len(content) % 3073:
        raise ValueError(f"{name} has {len(content)} bytes, no multiple of 3073: {_WHERE_FROM['cifar10']} again")
    table = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    if table[:, 0].max() > 9:
        raise ValueError(f"{name} has a label {table[:, 0].max()} above 9: it is of another data set, {_WHERE_FROM['cifar10']}")
    return table


# ---- ImageNet


def is_imagenet(path: Path) -> bool:
    """Whether a folder holds Downsampled ImageNet's npz files."""
    return (path / "train_data_batch_1.npz").is_file() or (path / "val_data.npz").is_file()


def read_imagenet(
    path: Path, split: str, labels: bool, size: int | None = None
) -> tuple[MappedImages, Tensor | None, tuple[str, ...]]:
    """Images that stay on the disk where the files are not compressed, labels int64 (N,) from 0 on, and the classes.

    Raises:
        ValueError: If a file is missing or damaged, or if its images are not of the side `size`, when given.
    """
    pattern = "val_data.npz" if split == "test" else "train_data_batch_*.npz"
    files = sorted(path.glob(pattern), key=lambda file: (len(file.name), file.name))
    if not files:
        raise ValueError(f"`split` {split!r}: {path} lacks {pattern}: {_WHERE_FROM['imagenet64']}")
    arrays, numbers = [], []
    for file in files:
        images, label = npz_member(file, "data"), npz_member(file, "labels") if labels else None
        side = round((images.shape[-1] / 3) ** 0.5) if images.ndim == 2 else 0
        if images.dtype != np.uint8 or 3 * side * side != images.shape[-1]:
            raise ValueError(
                f"{file} holds {images.dtype} {images.shape}, not uint8 (N, 3 * side^2): {_WHERE_FROM['imagenet64']}"
            )
        if size not in (None, side):
            raise ValueError(f"{file} holds images of {side} x {side} pixels, not {size}: name the folder of the other size")
        arrays.append(images.reshape(-1, 3, side, side))
        if label is not None:
            if label.shape != (len(images),) or label.min() < 1:
                raise ValueError(f"{file} holds labels {label.shape} for {len(images)} images, not one of 1, 2, ... for each")
            numbers.append(label.astype(np.int64) - 1)
    number = torch.from_numpy(np.concatenate(numbers)) if labels else None
    return MappedImages(tuple(arrays)), number, class_names(number)


# ---- CelebA


def held_out(path: Path, split: str) -> set[str] | None:
    """File names of a split of CelebA, from the `list_eval_partition.txt` near the pictures; None if there is none.

    Training pictures are marked 0 in it, test pictures 2.
    """
    beside = [path.parent / "list_eval_partition.txt", path / "list_eval_partition.txt"]
    file = next((place for place in [*beside, path.parent / "Eval" / beside[0].name] if place.is_file()), None)
    if file is None:
        return None
    rows = [line.split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    wanted = "2" if split == "test" else "0"
    if any(len(row) != 2 for row in rows):
        raise ValueError(f"{file} must have a file name and a number on each line: {_WHERE_FROM['celeba']} again")
    return {name for name, part in rows if part == wanted}


# ---- arrays that stay on the disk


@dataclass(frozen=True, eq=False)
class MappedImages:
    """Images in arrays on the disk, read when indexed: as much of a uint8 tensor (N, C, H, W) as `data.Dataset` needs.

    Attributes:
        arrays: uint8 (n, C, H, W) each, mapped into memory.
        index: Which ones of them in a row, int64 (N,); None for all.
    """

    arrays: tuple[np.ndarray, ...]
    index: Tensor | None = None
    dtype: ClassVar[torch.dtype] = torch.uint8

    def __len__(self) -> int:
        return sum(map(len, self.arrays)) if self.index is None else len(self.index)

    @property
    def shape(self) -> torch.Size:
        """(N, C, H, W)."""
        return torch.Size((len(self), *self.arrays[0].shape[1:]))

    def subset(self, index: Tensor) -> MappedImages:
        """The images at `index`, int64 (B,), still on the disk."""
        return replace(self, index=index if self.index is None else self.index[index])

    def __getitem__(self, index: Tensor) -> Tensor:
        rows = (index if self.index is None else self.index[index]).numpy()
        starts = np.cumsum([0, *map(len, self.arrays)])
        if len(rows) and not (-len(self) <= rows.min() and rows.max() < starts[-1]):
            raise IndexError(f"index {rows.max()} is beyond the {starts[-1]} images")
        out = np.empty((len(rows), *self.shape[1:]), np.uint8)
        where = np.searchsorted(starts, rows, side="right") - 1
        for k in np.unique(where):
            mine = where == k
            out[mine] = self.arrays[k][rows[mine] - starts[k]]
        return torch.from_numpy(out)


def npz_member(path: Path, key: str) -> np.ndarray:
    """An array of an npz file: left on the disk if it is not compressed, and copied on write.

    Raises:
        ValueError: If the file is damaged, lacks the array, or holds objects.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            info = archive.getinfo(f"{key}.npy")
            if info.compress_type != zipfile.ZIP_STORED:
                with np.load(path, allow_pickle=False) as content:
                    return content[key]
            shape, fortran, dtype, offset = _header(file, info.header_offset)
            if dtype.hasobject:
                raise ValueError("it holds Python objects")
            order = "F" if fortran else "C"
            return np.memmap(path, dtype, mode="c", offset=offset, shape=shape, order=order)  # type: ignore[call-overload]
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read, or lacks a plain array `{key}` ({error}): get it again") from error


def _header(file: IO[bytes], start: int) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, order, type and place of the array in a member of a zip that starts there."""
    file.seek(start + 26)  # a local header: 26 bytes, two lengths, then as much
    skip = int.from_bytes(file.read(2), "little") + int.from_bytes(file.read(2), "little")
    file.seek(start + 30 + skip)
    major, _ = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    return (*read(file), file.tell())
