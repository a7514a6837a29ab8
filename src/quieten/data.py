"""Data sets as plain tensors: digits, the MNIST family, arrays, folders and zips of images, emoji."""

from __future__ import annotations

import difflib
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .datasets.emoji import FONT, draw_emoji, emoji_groups
from .datasets.idx import CLASSES, MIRRORS, class_names, find_idx, idx_file, read_idx
from .datasets.image_sets import (
    SETS,
    SIDES,
    MappedImages,
    find_set,
    held_out,
    is_cifar,
    is_imagenet,
    npz_member,
    read_cifar,
    read_imagenet,
)
from .datasets.pictures import IN_MEMORY, LazyImages, UndividedError, pixels, read_pictures
from .noise import Noise

__all__ = ["NAMES", "Dataset", "LazyImages", "MappedImages", "Order", "emoji", "load", "to_pixels"]

NAMES = ("digits", "emoji", "fashion-mnist", "mnist", "emoji-groups", *SETS)
"""The names `load` knows; everything else is a path."""

SPLITS, CROPS = ("train", "test"), ("center", "pad", "stretch")

# ---- what users hold


@dataclass(frozen=True, eq=False)
class Dataset:
    """A whole data set.

    Attributes:
        name: Short name, for reports.
        images: uint8 (N, C, H, W), in memory, or read or decoded when asked; or float32 (N, *), as given.
        labels: int64 (N,), numbers of `classes`; None when unlabelled.
        classes: Names of the classes; () when unlabelled.

    Example:
        >>> digits = load("digits")
        >>> x, label = digits.batch(torch.tensor([0, 1]))
        >>> len(digits), digits.shape, x.shape, digits.classes[label[1]]
        (1498, (1, 8, 8), torch.Size([2, 1, 8, 8]), '1')
    """

    name: str
    images: Tensor | LazyImages | MappedImages
    labels: Tensor | None
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example, (C, H, W) for images."""
        return tuple(self.images.shape[1:])

    def batch(self, index: Tensor, flip: bool | Tensor = False) -> tuple[Tensor, Tensor | None]:
        """Examples to train on.

        Arguments:
            index: Which ones: int64 (B,), repetitions allowed.
            flip: Mirror left and right: True for all, or bool (B,) for those it marks. Nothing is drawn here.

        Returns:
            x0: float32 (B, *): grey level k becomes k / 127.5 - 1, in [-1, 1]; floats are as they were given.
            labels: int64 (B,), or None.
        """
        index = index.cpu()
        x0 = self.images[index]
        if x0.dtype == torch.uint8:
            x0 = x0.to(torch.float32).div_(127.5).sub_(1)
        if isinstance(flip, Tensor) or flip:
            if x0.dim() < 3:
                raise ValueError(f"`flip` mirrors images, {self.name} has shape {self.shape}: leave flip=False")
            marked = torch.as_tensor(flip).cpu().expand(len(x0)).view(-1, *[1] * (x0.dim() - 1))
            x0 = torch.where(marked, x0.flip(-1), x0)
        return x0, None if self.labels is None else self.labels[index]

    def subset(self, index: Tensor | Sequence[int] | slice) -> Dataset:
        """The examples at `index` (numbers, a mask or a slice), with the same classes."""
        chosen = torch.arange(len(self))[index if isinstance(index, slice) else torch.as_tensor(index).cpu()]
        images = self.images[chosen] if isinstance(self.images, Tensor) else self.images.subset(chosen)
        return replace(self, images=images, labels=None if self.labels is None else self.labels[chosen])

    def all(self) -> Tensor:
        """Every example as `batch` gives it, float32 (N, *): decodes a lazy folder whole."""
        return self.batch(torch.arange(len(self)))[0]


class Order:
    """In which order examples are shown: for ever, each epoch a fresh permutation of all n.

    Batches run on across the end of an epoch, so no example is dropped and every batch is full.

    Arguments:
        n: Number of examples.
        batch: Examples of a step, of all processes together.
        seed: Any integer.

    Example:
        >>> order = Order(n=6, batch=3, seed=0)
        >>> sorted(order.indices(0).tolist() + order.indices(1).tolist())
        [0, 1, 2, 3, 4, 5]
    """

    def __init__(self, n: int, batch: int, seed: int):
        if n < 1 or batch < 1:
            raise ValueError(f"`n` and `batch` must be at least 1 (got {n} and {batch})")
        self.n, self.batch, self.seed = n, batch, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def permutation(self, epoch: int) -> Tensor:
        """Order of one epoch: a permutation of 0..n-1, int64 (n,). The latest is kept."""
        if epoch != self._epoch:
            key = Noise(self.seed, torch.arange(self.n)).uniform(epoch, tag="order")
            self._epoch, self._permutation = epoch, key.argsort(stable=True)
        return self._permutation

    def indices(self, step: int) -> Tensor:
        """Examples of a step, int64 (batch,): a function of (seed, step), so training resumes anywhere."""
        if step < 0:
            raise ValueError(f"`step` must be at least 0 (got {step})")
        start, parts = step * self.batch, []
        end = start + self.batch
        while start < end:
            epoch, offset = divmod(start, self.n)
            parts.append(self.permutation(epoch)[offset : offset + end - start])
            start += len(parts[-1])
        return torch.cat(parts)


def to_pixels(x: Tensor) -> Tensor:
    """Grey levels of x in [-1, 1], any shape: uint8, rounded, clamped; undoes `Dataset.batch`."""
    return x.detach().to(torch.float32).add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def load(
    name_or_path: str | Path,
    *,
    split: str = "train",
    size: int | None = None,
    channels: int | None = None,
    labels: bool = True,
    skip_corrupt: bool = False,
    crop: str = "center",
    cut: int | None = None,
    data: str | Path | None = None,
    download: bool = False,
) -> Dataset:
    """A data set by name or path.

    Names (a folder of the same name is reached as ./NAME):
        - `digits`: 1,797 handwritten digits, 8x8, inside scikit-learn; every sixth is test (299).
        - `fashion-mnist`, `mnist`: idx files, sought in `data`/NAME, `data`, $QUIETEN_DATA/NAME, /usr/share/datasets/NAME
          (Debian's dataset-fashion-mnist), the user's cache ~/.cache/quieten/NAME.
        - `emoji`: see `emoji`; every sixth is test. `emoji-groups`: those in Unicode's groups, as labels; the splits agree.
        - `cifar10` (binary version), `imagenet32`, `imagenet64` (npz files), `celeba`, `lsun-bedroom` (pictures), sought in the
          same places; CelebA's splits are those of list_eval_partition.txt where it lies beside the pictures.
    Paths:
        - a folder of idx files, named as MNIST's, plain or gzipped;
        - a folder or a zip of images; subfolders `train` and `test` are the splits, else all is train. When every image
          lies in one of two or more subfolders, these are the classes, in alphabetical order; a `dataset.json` as written by
          EDM's tools says the labels instead;
        - a folder of CIFAR-10's data_batch_*.bin or its tar.gz, or of Downsampled ImageNet's npz files;
        - .npz: `images`, `x` or `arr_0`, and `labels`, `y` or `arr_1`; .npy: images. Either uint8 in the layout NHWC,
          NCHW or NHW, or finite floats (N, *), kept as they are. More than 2 GiB of levels stay on the disk.

    Arguments:
        split: "train" or "test".
        size: Height and width to resize to, with antialiasing; None keeps pictures, if they are of one size.
        channels: 1 (grey) or 3 (RGB), transparency on white; None keeps them: grey if all pictures are.
        labels: False leaves labels out.
        skip_corrupt: Leave out files that cannot be read, and warn with their names, instead of raising.
        crop: How `size` makes a square: "center" cuts the longer side, "pad" adds white, "stretch" distorts.
        cut: Side of the central square that is kept of a picture file before it is resized: 140 is customary for CelebA.
        data: Where to look for a named set first: a folder, or the font of `emoji`.
        download: Fetch `mnist` or `fashion-mnist` into the cache when it is nowhere else, checking SHA-256.

    Raises:
        ValueError: Unknown name; missing, corrupt or unequal files; impossible arguments. One line each.
    """
    _check(split=split, size=size, channels=channels, crop=crop, cut=cut)
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    title, keep = None, None
    if name in SETS:
        title, path = name, find_set(name, data)
        keep = held_out(path, split) if name == "celeba" else None
    if name in NAMES and title is None:
        whole = _named(name, split, labels, data, download, size)
    elif is_cifar(path):
        whole = Dataset("cifar10", *read_cifar(path, split, labels))
    elif is_imagenet(path):
        whole = Dataset(title or path.resolve().name, *read_imagenet(path, split, labels, SIDES.get(title or "")))
    elif path.is_dir() and any(idx_file(path, part, "images") for part in SPLITS):
        folder = path.resolve().name
        whole = Dataset(folder, *read_idx(path, split, labels, folder))
    elif path.is_dir() or (path.suffix.lower() == ".zip" and path.is_file()):
        title = title or (path.resolve().name if path.is_dir() else path.stem)
        return Dataset(title, *read_pictures(path, split, size, channels, crop, labels, skip_corrupt, cut, keep))
    elif path.suffix.lower() in (".npz", ".npy") and path.is_file():
        whole = _arrays(path, split, labels)
    else:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        known = f"none of {', '.join(NAMES)}{hint}"
        raise ValueError(f"`name_or_path` {name!r} is no folder, .zip, .npz or .npy file, and {known}")
    if cut is not None:
        raise ValueError(f"`cut` {cut} is for picture files, {name} is no folder or zip of them: leave it out")
    return _refit(whole, size, channels, crop)


def emoji(size: int = 32, font: str | Path = FONT) -> Dataset:
    """Emoji as pictures: one for each code point that the font draws (1,446 of them), trimmed, on white.

    Arguments:
        size: Height and width; the font's own bitmaps are 136 x 128.
        font: NotoColorEmoji.ttf, from Debian's package fonts-noto-color-emoji.

    Returns:
        RGB, unlabelled, uint8 (N, 3, size, size), in the order of Unicode.

    Raises:
        ValueError: If the font is missing or draws nothing.
    """
    _check(size=size)
    return Dataset("emoji", draw_emoji(size, font)[0], None, ())


def _check(
    split: str = "train", size: int | None = None, channels: int | None = None, crop: str = "center", cut: int | None = None
) -> None:
    if split not in SPLITS:
        raise ValueError(f"`split` must be 'train' or 'test' (got {split!r})")
    if size is not None and size < 1:
        raise ValueError(f"`size` must be at least 1 pixel (got {size})")
    if cut is not None and cut < 1:
        raise ValueError(f"`cut` must be at least 1 pixel (got {cut})")
    if channels not in (None, 1, 3):
        raise ValueError(f"`channels` must be 1 (grey) or 3 (RGB) (got {channels})")
    if crop not in CROPS:
        raise ValueError(f"`crop` must be one of {', '.join(CROPS)} (got {crop!r})")


# ---- named sets


def _named(name: str, split: str, labels: bool, data: str | Path | None, download: bool, size: int | None) -> Dataset:
    if name in MIRRORS:
        return Dataset(name, *read_idx(find_idx(name, split, data, download), split, labels, name))
    if name == "emoji-groups":
        return _grouped(split, labels, data, size)
    whole = _digits(labels) if name == "digits" else emoji(size or 32, data or FONT)
    return whole.subset(_part(len(whole), split))


def _part(n: int, split: str) -> Tensor:
    """Which of n examples belong to a split, bool (n,): every sixth is test."""
    sixth = torch.arange(n) % 6 == 5
    return sixth if split == "test" else ~sixth


def _grouped(split: str, labels: bool, font: str | Path | None, size: int | None) -> Dataset:
    images, characters = draw_emoji(size or 32, font or FONT)
    groups = emoji_groups()
    known = [groups.get(character) for character in characters]
    classes = tuple(dict.fromkeys(groups.values()))  # in Unicode's order
    number = torch.tensor([-1 if group is None else classes.index(group) for group in known])
    kept = _part(len(images), split) & (number >= 0)
    return Dataset("emoji-groups", images[kept], number[kept] if labels else None, classes if labels else ())


def _digits(labels: bool) -> Dataset:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    level = torch.from_numpy(bunch.images).long()[:, None]  # 0..16
    grey = ((255 * level + 8) // 16).to(torch.uint8)  # 255/16 k rounded: 0 -> 0, 16 -> 255, one to one
    number = torch.from_numpy(bunch.target).long() if labels else None
    return Dataset("digits", grey, number, CLASSES["mnist"] if labels else ())


# ---- arrays


def _arrays(path: Path, split: str, labels: bool) -> Dataset:
    if split == "test":
        raise UndividedError(path, "keep test examples in a file of their own")
    images, number, keys = None, None, ["(one array)"]
    try:
        content = np.load(path, mmap_mode="c", allow_pickle=False)  # which is for .npy only
        if isinstance(content, np.ndarray):
            images = content
        else:
            with content:
                keys = content.files
                images = _pick(path, keys, ("images", "x", "arr_0"))
                number = _pick(path, keys, ("labels", "y", "arr_1")) if labels else None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}): save plain arrays with numpy.savez") from error
    if images is None:
        raise ValueError(f"{path} holds {', '.join(keys)}: name the array `images`, `x` or `arr_0`")
    tensor = _array_images(path, images)
    label = None if number is None else _array_labels(path, number, len(tensor))
    return Dataset(path.stem, tensor, label, class_names(label))


def _pick(path: Path, known: Sequence[str], keys: Sequence[str]) -> np.ndarray | None:
    return next((npz_member(path, key) for key in keys if key in known), None)


def _array_images(path: Path, array: np.ndarray) -> Tensor | MappedImages:
    given = f"{path} holds {array.dtype} {array.shape}"
    if np.issubdtype(array.dtype, np.floating) and array.ndim > 1 and array.size:
        with np.errstate(over="ignore"):  # what float32 cannot hold turns infinite and is refused below
            array = np.array(array, dtype=np.float32, order="C")
        if not np.isfinite(array).all():
            raise ValueError(f"{given} with NaN or infinite values: clean the array")
        return torch.from_numpy(array)
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1] not in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1] not in (1, 3) or not array.size:
        raise ValueError(f"{given}: save images as uint8 (N, H, W, 1 or 3), or anything as floats (N, ...)")
    if array.nbytes > IN_MEMORY:
        return MappedImages((array,))
    return torch.from_numpy(np.array(array, order="C"))


def _array_labels(path: Path, array: np.ndarray, count: int) -> Tensor:
    if not np.issubdtype(array.dtype, np.integer) or array.shape != (count,) or array.min() < 0:
        given = f"{path} holds labels {array.dtype} {array.shape}"
        raise ValueError(f"{given}: save integers from 0 on, shape ({count},), or pass labels=False")
    return torch.from_numpy(array.astype(np.int64))


# ---- resizing


def _refit(whole: Dataset, size: int | None, channels: int | None, crop: str) -> Dataset:
    """Resize and recolour a data set that is in memory."""
    from PIL import Image

    count, height, width = (*whole.shape, 0, 0)[:3]
    if channels in (None, count) and (size is None or size == height == width):
        return whole
    images = whole.images
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        kind = "stays on the disk" if images.dtype == torch.uint8 else "holds floats"
        raise ValueError(f"`size` and `channels` cannot change {whole.name}, which {kind}: leave them out")

    def refit(image: Tensor) -> np.ndarray:
        picture = Image.fromarray((image[0] if count == 1 else image.permute(1, 2, 0)).numpy())
        return pixels(picture, channels or count, size, crop)

    return replace(whole, images=torch.from_numpy(np.stack([refit(image) for image in images])))
