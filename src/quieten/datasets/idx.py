"""The MNIST family: finding, downloading and reading idx files."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import math
import os
import sys
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..files import write_atomic

__all__ = ["CLASSES", "MIRRORS", "SHA256", "class_names", "find_idx", "idx_file", "places", "read_idx"]

DEBIAN = Path("/usr/share/datasets")

CLASSES: dict[str, tuple[str, ...]] = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
}
MIRRORS = {
    "mnist": "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "fashion-mnist": "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
}
# SHA-256 of the unpacked files, because every mirror packs them anew.
SHA256 = {
    "mnist": {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    "fashion-mnist": {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
}


def find_idx(name: str, split: str, data: str | Path | None, download: bool) -> Path:
    """The folder that holds a named idx set.

    Arguments:
        name: "mnist" or "fashion-mnist".
        split: "train" or "test".
        data: Where to look first; the order of the other places is told by `quieten.data.load`.
        download: Fetch the files of the split into the cache when they are nowhere, checking SHA-256.

    Raises:
        ValueError: If the set is nowhere and not to be downloaded, or what was downloaded is wrong.
    """
    folders = places(name, data)
    for folder in folders:
        if idx_file(folder, split, "images") is not None:
            return folder
    if not download:
        debian = "install Debian's dataset-fashion-mnist, " if name == "fashion-mnist" else ""
        remedy = f"{debian}name its folder with `data`, or pass download=True to fetch it"
        raise ValueError(f"{name} is not in {', '.join(map(str, folders))}: {remedy}")
    cache = folders[-1]
    kept = [file for file in SHA256[name] if file.startswith("t10k") == (split == "test")]
    for file in reversed(kept):  # images last: where they are, the labels are
        _download(MIRRORS[name] + file + ".gz", cache / (file + ".gz"), SHA256[name][file])
    return cache


def places(name: str, data: str | Path | None) -> list[Path]:
    """Folders in which a named set may lie, in the order in which they are looked at; the last is the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "quieten" / name
    folders = [DEBIAN / name, cache]
    if os.environ.get("QUIETEN_DATA"):
        folders.insert(0, Path(os.environ["QUIETEN_DATA"]).expanduser() / name)
    if data is not None:
        folders[:0] = [Path(data).expanduser() / name, Path(data).expanduser()]
    return folders


def _download(url: str, target: Path, sha256: str) -> None:
    """Fetch a gzipped file whose content has this SHA-256; `target` appears when it is whole and checked."""
    print(f"quieten: downloading {url} to {target}", file=sys.stderr)
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            packed = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"{url} cannot be downloaded ({error}): pass `data`, a folder with the files") from error
    try:
        found = hashlib.sha256(gzip.decompress(packed)).hexdigest()
    except (OSError, EOFError, zlib.error) as error:
        found = f"not gzip: {error}"
    if found != sha256:
        raise ValueError(f"{url} has the wrong content (SHA-256 {found}, not {sha256}): use `data`")
    write_atomic(target, packed)


def idx_file(folder: Path, split: str, what: str) -> Path | None:
    """The file with the "images" or the "labels" of a split, named as MNIST's, plain or gzipped; None if there is none."""
    stem = f"{'t10k' if split == 'test' else 'train'}-{what}"
    kind = "idx3-ubyte" if what == "images" else "idx1-ubyte"
    names = (f"{stem}{joint}{kind}{end}" for joint in "-." for end in ("", ".gz"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_idx(folder: Path, split: str, labels: bool, name: str) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
    """Images uint8 (N, 1, H, W), labels int64 (N,) where asked for and there, and names of the classes of set `name`.

    Raises:
        ValueError: If the split is missing, a file is damaged, or labels and images are not equally many.
    """
    path = idx_file(folder, split, "images")
    if path is None:
        raise ValueError(f"`split` {split!r}: {folder} holds no idx file of its images")
    images, number = _bytes(path, 3)[:, None], None
    file = idx_file(folder, split, "labels") if labels else None
    if file is not None:
        number = _bytes(file, 1).long()
        if len(number) != len(images):
            counts = f"{len(number)} labels but {path} {len(images)} images"
            raise ValueError(f"{file} holds {counts}: get both from one place")
    return images, number, class_names(number, name)


def class_names(labels: Tensor | None, name: str = "") -> tuple[str, ...]:
    """Known names, where they suffice for the labels; else the numbers."""
    if labels is None or len(labels) == 0:
        return ()
    count = int(labels.max()) + 1
    known = CLASSES.get(name, ())
    return known if count <= len(known) else tuple(map(str, range(count)))


def _bytes(path: Path, dims: int) -> Tensor:
    """An idx file of bytes: 0, 0, 8, number of dimensions, each as a big-endian int32, then the bytes."""
    damaged = "the file is damaged or of another kind, get it again"
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}): {damaged}") from error
    magic, header = bytes((0, 0, 8, dims)), 4 + 4 * dims
    if content[:4] != magic or len(content) < header:
        raise ValueError(f"{path} begins with {content[:4].hex(' ')}, not {magic.hex(' ')}: {damaged}")
    shape = [int.from_bytes(content[4 + 4 * k : 8 + 4 * k], "big") for k in range(dims)]
    if len(content) - header != math.prod(shape):
        raise ValueError(f"{path} has {len(content) - header} bytes of data instead of {shape}: {damaged}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())
