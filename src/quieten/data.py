"""Data sets as plain tensors: digits, the MNIST family, arrays, folders and zips of images, emoji."""

from __future__ import annotations

import difflib
import gzip
import hashlib
import http.client
import math
import os
import sys
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from quieten.files import write_atomic
from quieten.noise import Noise

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["NAMES", "Dataset", "LazyImages", "Order", "emoji", "load", "to_pixels"]

NAMES = ("digits", "emoji", "fashion-mnist", "mnist")
"""The names `load` knows; everything else is a path."""

IN_MEMORY = 2 * 2**30
"""Bytes of decoded pixels up to which a folder of images is held in memory."""

DEBIAN = Path("/usr/share/datasets")
EMOJI_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
SPLITS, CROPS = ("train", "test"), ("center", "pad", "stretch")
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

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
T = TypeVar("T")


# ---- what users hold


@dataclass(frozen=True, eq=False)
class Dataset:
    """A whole data set.

    Attributes:
        name: Short name, for reports.
        images: uint8 (N, C, H, W), in memory or decoded when asked; or float32 (N, *), as given.
        labels: int64 (N,), numbers of `classes`; None when unlabelled.
        classes: Names of the classes; () when unlabelled.

    Example:
        >>> digits = load("digits")
        >>> x, label = digits.batch(torch.tensor([0, 1]))
        >>> len(digits), digits.shape, x.shape, digits.classes[label[1]]
        (1498, (1, 8, 8), torch.Size([2, 1, 8, 8]), '1')
    """

    name: str
    images: Tensor | LazyImages
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
    data: str | Path | None = None,
    download: bool = False,
) -> Dataset:
    """A data set by name or path.

    Names (a folder of the same name is reached as ./NAME):
        - `digits`: 1,797 handwritten digits, 8x8, inside scikit-learn; every sixth is test (299).
        - `fashion-mnist`, `mnist`: idx files, sought in `data`/NAME, `data`, $QUIETEN_DATA/NAME,
          /usr/share/datasets/NAME (Debian's dataset-fashion-mnist), the user's cache ~/.cache/quieten/NAME.
        - `emoji`: see `emoji`; every sixth is test.
    Paths:
        - a folder of idx files, named as MNIST's, plain or gzipped;
        - a folder or a zip of images; subfolders `train` and `test` are the splits, else all is train. When
          every image lies in one of two or more subfolders, these are the classes, in alphabetical order;
        - .npz: `images`, `x` or `arr_0`, and `labels`, `y` or `arr_1`; .npy: images. Either uint8 in the
          layout NHWC, NCHW or NHW, or finite floats (N, *), kept as they are.

    Arguments:
        split: "train" or "test".
        size: Height and width to resize to, with antialiasing; None keeps pictures, if they are of one size.
        channels: 1 (grey) or 3 (RGB), transparency on white; None keeps them: grey if all pictures are.
        labels: False leaves labels out.
        skip_corrupt: Leave out files that cannot be read, and warn with their names, instead of raising.
        crop: How `size` makes a square: "center" cuts the longer side, "pad" adds white, "stretch" distorts.
        data: Where to look for a named set first: a folder, or the font of `emoji`.
        download: Fetch `mnist` or `fashion-mnist` into the cache when it is nowhere else, checking SHA-256.

    Raises:
        ValueError: Unknown name; missing, corrupt or unequal files; impossible arguments. One line each.
    """
    _check(split=split, size=size, channels=channels, crop=crop)
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if name in NAMES:
        whole = _named(name, split, labels, data, download, size)
    elif path.is_dir() and any(_idx_file(path, part, "images") for part in SPLITS):
        whole = _idx(path, split, labels, path.resolve().name)
    elif path.is_dir() or (path.suffix.lower() == ".zip" and path.is_file()):
        return _pictures(path, split, size, channels, crop, labels, skip_corrupt)
    elif path.suffix.lower() in (".npz", ".npy") and path.is_file():
        whole = _arrays(path, split, labels)
    else:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        known = f"none of {', '.join(NAMES)}{hint}"
        raise ValueError(f"`name_or_path` {name!r} is no folder, .zip, .npz or .npy file, and {known}")
    return _refit(whole, size, channels, crop)


def emoji(size: int = 32, font: str | Path = EMOJI_FONT) -> Dataset:
    """Emoji as pictures: one for each code point that the font draws (1,446 of them), trimmed, on white.

    Arguments:
        size: Height and width; the font's own bitmaps are 136 x 128.
        font: NotoColorEmoji.ttf, from Debian's package fonts-noto-color-emoji.

    Returns:
        RGB, unlabelled, uint8 (N, 3, size, size), in the order of Unicode.

    Raises:
        ValueError: If the font is missing or draws nothing.
    """
    from PIL import Image, ImageDraw, ImageFont

    _check(size=size)
    remedy = "install Debian's fonts-noto-color-emoji, or name NotoColorEmoji.ttf with `data`"
    try:  # 109 is the size of these bitmaps; basic layout: single code points need no shaping
        face = ImageFont.truetype(str(font), 109, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise ValueError(f"`font` {str(font)!r} cannot be read ({error}): {remedy}") from error
    blocks = (range(0x20, 0x3400), range(0x1F000, 0x20000), range(0xFE000, 0xFF000))  # where fonts keep emoji
    pictures = []
    for character in (chr(code) for block in blocks for code in block):
        if face.getmask(character, mode="RGBA").getbbox() is None:
            continue  # no such glyph, or an invisible one
        canvas = Image.new("RGBA", (192, 192), (255, 255, 255, 0))
        ImageDraw.Draw(canvas).text((24, 24), character, font=face, embedded_color=True)
        picture = _plain(canvas.crop(canvas.getbbox()), 3)
        pictures.append(_to_array(_fit(picture, size, "pad")))
    if not pictures:
        raise ValueError(f"`font` {str(font)!r} draws no emoji: {remedy}")
    return Dataset("emoji", torch.from_numpy(np.stack(pictures)), None, ())


def _check(split: str = "train", size: int | None = None, channels: int | None = None, crop: str = "center") -> None:
    if split not in SPLITS:
        raise ValueError(f"`split` must be 'train' or 'test' (got {split!r})")
    if size is not None and size < 1:
        raise ValueError(f"`size` must be at least 1 pixel (got {size})")
    if channels not in (None, 1, 3):
        raise ValueError(f"`channels` must be 1 (grey) or 3 (RGB) (got {channels})")
    if crop not in CROPS:
        raise ValueError(f"`crop` must be one of {', '.join(CROPS)} (got {crop!r})")


# ---- named sets, idx


def _named(name: str, split: str, labels: bool, data: str | Path | None, download: bool, size: int | None) -> Dataset:
    if name in MIRRORS:
        return _idx(_find(name, split, data, download), split, labels, name)
    whole = _digits(labels) if name == "digits" else emoji(size or 32, data or EMOJI_FONT)
    sixth = torch.arange(len(whole)) % 6 == 5
    return whole.subset(sixth if split == "test" else ~sixth)


def _digits(labels: bool) -> Dataset:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    level = torch.from_numpy(bunch.images).long()[:, None]  # 0..16
    grey = ((255 * level + 8) // 16).to(torch.uint8)  # 255/16 k rounded: 0 -> 0, 16 -> 255, one to one
    number = torch.from_numpy(bunch.target).long() if labels else None
    return Dataset("digits", grey, number, CLASSES["mnist"] if labels else ())


def _idx_file(folder: Path, split: str, what: str) -> Path | None:
    stem = f"{'t10k' if split == 'test' else 'train'}-{what}"
    kind = "idx3-ubyte" if what == "images" else "idx1-ubyte"
    names = (f"{stem}{joint}{kind}{end}" for joint in "-." for end in ("", ".gz"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _find(name: str, split: str, data: str | Path | None, download: bool) -> Path:
    """The folder that holds a named idx set; see `load` for the order."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "quieten" / name
    folders = [DEBIAN / name, cache]
    if os.environ.get("QUIETEN_DATA"):
        folders.insert(0, Path(os.environ["QUIETEN_DATA"]).expanduser() / name)
    if data is not None:
        folders[:0] = [Path(data).expanduser() / name, Path(data).expanduser()]
    for folder in folders:
        if _idx_file(folder, split, "images") is not None:
            return folder
    if not download:
        debian = "install Debian's dataset-fashion-mnist, " if name == "fashion-mnist" else ""
        remedy = f"{debian}name its folder with `data`, or pass download=True to fetch it"
        raise ValueError(f"{name} is not in {', '.join(map(str, folders))}: {remedy}")
    kept = [file for file in SHA256[name] if file.startswith("t10k") == (split == "test")]
    for file in reversed(kept):  # images last: where they are, the labels are
        _download(MIRRORS[name] + file + ".gz", cache / (file + ".gz"), SHA256[name][file])
    return cache


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


def _idx(folder: Path, split: str, labels: bool, name: str) -> Dataset:
    path = _idx_file(folder, split, "images")
    if path is None:
        raise ValueError(f"`split` {split!r}: {folder} holds no idx file of its images")
    images, number = _read_idx(path, 3)[:, None], None
    file = _idx_file(folder, split, "labels") if labels else None
    if file is not None:
        number = _read_idx(file, 1).long()
        if len(number) != len(images):
            counts = f"{len(number)} labels but {path} {len(images)} images"
            raise ValueError(f"{file} holds {counts}: get both from one place")
    return Dataset(name, images, number, _class_names(number, name))


def _class_names(labels: Tensor | None, name: str = "") -> tuple[str, ...]:
    """Known names, where they suffice for the labels; else the numbers."""
    if labels is None or len(labels) == 0:
        return ()
    count = int(labels.max()) + 1
    known = CLASSES.get(name, ())
    return known if count <= len(known) else tuple(map(str, range(count)))


def _read_idx(path: Path, dims: int) -> Tensor:
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


# ---- arrays


def _arrays(path: Path, split: str, labels: bool) -> Dataset:
    if split == "test":
        raise ValueError(f"`split` 'test': {path} is one whole; keep test examples in a file of their own")
    images, number, keys = None, None, ["(one array)"]
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            images = content
        else:
            with content:
                keys = content.files
                images = _pick(content, ("images", "x", "arr_0"))
                number = _pick(content, ("labels", "y", "arr_1")) if labels else None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}): save plain arrays with numpy.savez") from error
    if images is None:
        raise ValueError(f"{path} holds {', '.join(keys)}: name the array `images`, `x` or `arr_0`")
    tensor = _array_images(path, images)
    label = None if number is None else _array_labels(path, number, len(tensor))
    return Dataset(path.stem, tensor, label, _class_names(label))


def _pick(content: Any, keys: Sequence[str]) -> np.ndarray | None:
    return next((content[key] for key in keys if key in content.files), None)


def _array_images(path: Path, array: np.ndarray) -> Tensor:
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
    return torch.from_numpy(np.array(array, order="C"))


def _array_labels(path: Path, array: np.ndarray, count: int) -> Tensor:
    if not np.issubdtype(array.dtype, np.integer) or array.shape != (count,) or array.min() < 0:
        given = f"{path} holds labels {array.dtype} {array.shape}"
        raise ValueError(f"{given}: save integers from 0 on, shape ({count},), or pass labels=False")
    return torch.from_numpy(array.astype(np.int64))


def _refit(whole: Dataset, size: int | None, channels: int | None, crop: str) -> Dataset:
    """Resize and recolour a data set that is in memory."""
    from PIL import Image

    count, height, width = (*whole.shape, 0, 0)[:3]
    if size in (None, height) and height == width and channels in (None, count):
        return whole
    if size is None and channels in (None, count):
        return whole
    images = whole.images
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        raise ValueError(f"`size` and `channels` cannot change {whole.name}, which holds floats: leave them out")

    def refit(image: Tensor) -> np.ndarray:
        picture = Image.fromarray((image[0] if count == 1 else image.permute(1, 2, 0)).numpy())
        return _to_array(_fit(_plain(picture, channels or count), size, crop))

    return replace(whole, images=torch.from_numpy(np.stack([refit(image) for image in images])))


# ---- pictures: one at a time


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


def _fit(image: Image.Image, size: int | None, crop: str) -> Image.Image:
    """A square of `size`, bicubic: Pillow widens the kernel when it shrinks, which is the antialiasing."""
    from PIL import Image, ImageOps

    if size is None or image.size == (size, size):
        return image
    bicubic, square = Image.Resampling.BICUBIC, (size, size)
    if crop == "pad":
        return ImageOps.pad(image, square, bicubic, color="white")
    return ImageOps.fit(image, square, bicubic) if crop == "center" else image.resize(square, bicubic)


def _to_array(image: Image.Image) -> np.ndarray:
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


# ---- pictures: folders and zips


@dataclass(frozen=True, eq=False)
class LazyImages:
    """Image files, decoded when indexed: as much of a uint8 tensor (N, C, H, W) as `Dataset` needs.

    Attributes:
        source: The folder, or the open zip.
        names: Files inside it, with /.
        item: (C, H, W) of every picture.
        size: Height and width to resize to; None for pictures that are of one size.
        crop: How, see `load`.
    """

    source: Path | zipfile.ZipFile
    names: tuple[str, ...]
    item: tuple[int, int, int]
    size: int | None
    crop: str
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
                if self.size is not None:  # JPEG decodes at a fraction: twice the size leaves it to the resizing
                    image.draft(None, (2 * self.size, 2 * self.size))
                upright = ImageOps.exif_transpose(image)
                array = _to_array(_fit(_plain(upright, self.item[0]), self.size, self.crop))
        except Exception as error:  # Pillow's plugins raise whatever their format makes them raise
            raise _corrupt(self.names[k], error) from error
        if array.shape != self.item:
            raise _corrupt(self.names[k], f"its shape is {array.shape}, not {self.item}")
        return array


def _corrupt(name: str, error: object) -> ValueError:
    return ValueError(f"{name} cannot be read ({error}): repair or remove it, or pass skip_corrupt=True")


def _open(source: Path | zipfile.ZipFile, name: str) -> IO[bytes]:
    return source.open(name) if isinstance(source, zipfile.ZipFile) else (source / name).open("rb")


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


def _decoded(images: LazyImages, title: str = "", skip: bool = False) -> tuple[list[int], Tensor]:
    """Those pictures that can be read, and their pixels, uint8 (N, C, H, W)."""
    pixels = torch.empty(images.shape, dtype=images.dtype)
    rows = pixels.numpy()
    kept = _each(lambda k: rows.__setitem__(k, images.decode(k)), len(images), title, skip)
    return list(kept), pixels if len(kept) == len(images) else pixels[list(kept)]


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


def _pictures(path: Path, split: str, size: int | None, channels: int | None, crop: str, labels: bool, skip: bool) -> Dataset:
    """A folder or a zip of image files."""
    try:
        source = path if path.is_dir() else zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read ({error}): the archive is damaged, get it again") from error
    found = _list(source, path, split)
    headers = _each(lambda k: _header(source, found[k][0]), len(found), "looking at images", skip)
    files = [found[k] for k in headers]
    names = tuple(name for name, _ in files)
    if channels is None:
        channels = 1 if all(grey for grey, _ in headers.values()) else 3
    pairs = [pair for _, pair in headers.values()]
    width, height = _common_size(names, pairs) if size is None else (size, size)
    lazy = LazyImages(source, names, (channels, height, width), size, crop)
    images: Tensor | LazyImages = lazy
    if math.prod(lazy.shape) <= IN_MEMORY:
        kept, images = _decoded(lazy, "decoding images", skip)
        files = [files[k] for k in kept]
    elif skip:  # the corrupt ones have to be found now
        kept = list(_each(lambda k: lazy.decode(k).size, len(files), "checking images", skip))
        files, images = [files[k] for k in kept], lazy.subset(torch.tensor(kept))
    if len(files) < len(found):
        lost = sorted({name for name, _ in found} - {name for name, _ in files})
        warnings.warn(f"{path}: left out {len(lost)} corrupt image files: {', '.join(lost)}", stacklevel=3)
    classes = tuple(sorted({parent for _, parent in files}))
    name = path.resolve().name if path.is_dir() else path.stem
    if not labels or len(classes) < 2 or "" in classes:
        return Dataset(name, images, None, ())
    return Dataset(name, images, torch.tensor([classes.index(parent) for _, parent in files]), classes)


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
                raise ValueError(f"`split` {split!r}: {path} has only {', '.join(sorted(top))}: add {split}")
            paths, whole = [p for p in paths if p.parts[depth] == split], False
        elif len(top) > 1:
            break
        depth += 1  # a single folder around everything is no class
    if whole and split == "test":
        raise ValueError(f"`split` 'test': {path} is one whole; divide it into subfolders train and test")
    return [(str(p), p.parts[depth] if len(p.parts) > depth + 1 else "") for p in paths]


def _hidden(path: PurePosixPath) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _common_size(names: Sequence[str], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    first = "{} x {}".format(*sizes[0])
    for name, (width, height) in zip(names, sizes, strict=True):
        if (width, height) != sizes[0]:
            raise ValueError(f"{name} is {width} x {height} but {names[0]} is {first}: pass `size` to resize all")
    return sizes[0]
