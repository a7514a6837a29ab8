r"""The network of the Frechet inception distance, for users who have its weights.

Inception-v3 as it was converted from the TensorFlow graph that FID was defined on: its pooling branches differ from those of
Inception-v3 elsewhere. Names and shapes of the parameters are those of the common conversion to PyTorch, the file
pt_inception-2015-12-05-6726825d.pth. Nothing is downloaded.

References:
    | Rethinking the Inception Architecture for Computer Vision (Szegedy et al., 2016), https://arxiv.org/abs/1512.00567
    | GANs Trained by a Two Time-Scale Update Rule (Heusel et al., 2017), https://arxiv.org/abs/1706.08500
    | On Aliased Resizing and Surprising Subtleties in GAN Evaluation (Parmar et al., 2022), https://arxiv.org/abs/2104.11222
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import to_pixels
from .features import Extractor, checked

__all__ = ["KNOWN", "RESIZING", "FIDInception", "inception", "resized_as_tf1"]

SIDE = 299
KNOWN = "6726825d"
"""Beginning of the SHA-256 of the weights that published FIDs are computed with."""

Pair = int | tuple[int, int]

# ---- the network


class Conv(nn.Module):
    """Convolution, batch norm with the statistics in the file, ReLU."""

    def __init__(self, channels: int, out: int, kernel: Pair, stride: int = 1, padding: Pair = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def across(channels: int, out: int, length: int = 7) -> Conv:
    """A convolution along rows of pixels."""
    return Conv(channels, out, (1, length), padding=(0, length // 2))


def down(channels: int, out: int, length: int = 7) -> Conv:
    """A convolution along columns of pixels."""
    return Conv(channels, out, (length, 1), padding=(length // 2, 0))


def mean3(x: Tensor) -> Tensor:
    """Mean of 3x3 pixels; at the border, of those that exist, which is where FID's network differs from others."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def max3(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1, 1)


class A(nn.Module):
    """Block at 35 x 35 pixels."""

    def __init__(self, channels: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(channels, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(channels, 48, 1), Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(channels, 64, 1), Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(channels, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), wide, self.branch_pool(mean3(x))], 1)


class B(nn.Module):
    """From 35 x 35 pixels to 17 x 17."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(channels, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(channels, 64, 1), Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), wide, F.max_pool2d(x, 3, 2)], 1)


class C(nn.Module):
    """Block at 17 x 17 pixels."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(channels, 192, 1)
        self.branch7x7_1, self.branch7x7_2, self.branch7x7_3 = Conv(channels, inner, 1), across(inner, inner), down(inner, 192)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(channels, inner, 1), down(inner, inner)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = across(inner, inner), down(inner, inner)
        self.branch7x7dbl_5 = across(inner, 192)
        self.branch_pool = Conv(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(mean3(x))], 1)


class D(nn.Module):
    """From 17 x 17 pixels to 8 x 8."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(channels, 192, 1), Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(channels, 192, 1), across(192, 192)
        self.branch7x7x3_3, self.branch7x7x3_4 = down(192, 192), Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), wide, F.max_pool2d(x, 3, 2)], 1)


class E(nn.Module):
    """Block at 8 x 8 pixels; the last one of FID's network takes maxima where the others take means."""

    def __init__(self, channels: int, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pool = pool
        self.branch1x1 = Conv(channels, 320, 1)
        self.branch3x3_1, self.branch3x3_2a, self.branch3x3_2b = Conv(channels, 384, 1), across(384, 384, 3), down(384, 384, 3)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(channels, 448, 1), Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = across(384, 384, 3), down(384, 384, 3)
        self.branch_pool = Conv(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        h, wide = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        once = [self.branch3x3_2a(h), self.branch3x3_2b(h)]
        twice = [self.branch3x3dbl_3a(wide), self.branch3x3dbl_3b(wide)]
        return torch.cat([self.branch1x1(x), *once, *twice, self.branch_pool(self.pool(x))], 1)


class FIDInception(nn.Module):
    """Inception-v3 of FID: 23,850,960 parameters, named as in the common conversion to PyTorch; 2048 features.

    In evaluation mode examples are never coupled. `fc`, the 1008 logits, is there for the layout and for inception scores.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, 32, 3, stride=2), Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Conv(64, 80, 1), Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = A(192, 32), A(256, 64), A(288, 64)
        self.Mixed_6a = B(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = C(768, 128), C(768, 160), C(768, 160), C(768, 192)
        self.Mixed_7a = D(768)
        self.Mixed_7b, self.Mixed_7c = E(1280, mean3), E(2048, max3)
        self.fc = nn.Linear(2048, 1008)

    def features(self, x: Tensor) -> Tensor:
        """Features (B, 2048) of what `RESIZING` makes of images: (B, 3, 299, 299), about -1 to 1."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 1008)."""
        return self.fc(self.features(x))


# ---- what it sees


def resized_as_tf1(x: Tensor, side: int = SIDE) -> Tensor:
    """Bilinear interpolation as the first TensorFlow did it: output pixel i looks at i * size / side, not at pixel centres.

    No antialiasing. Rows are interpolated first, then columns, in float32, as there.

    Arguments:
        x: Images (B, C, H, W), floats.
        side: Height and width of the result.
    """
    for axis in (-1, -2):
        size = x.shape[axis]
        at = torch.arange(side, device=x.device, dtype=torch.float32) * (size / side)
        low = at.floor().long().clamp(max=size - 1)
        share = (at - low).to(x)
        a, b = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=size - 1))
        x = a + (b - a) * (share if axis == -1 else share[:, None])
    return x


def _as_tf1(levels: Tensor) -> Tensor:
    return (resized_as_tf1(levels) - 128) / 128


def _as_pytorch_fid(levels: Tensor) -> Tensor:
    return 2 * F.interpolate(levels / 255, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=False) - 1


RESIZING: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "inception": (_as_tf1, "rounded to uint8, bilinear to 299 as TensorFlow 1 (no half pixels, no antialias), (k - 128) / 128"),
    "pytorch-fid": (_as_pytorch_fid, "rounded to uint8, k / 255, bilinear to 299 (half pixels, no antialias), 2 x - 1"),
}
"""What makes (B, 3, 299, 299) of levels 0..255, in words too: as FID was defined (so EDM and ADM), or as pytorch-fid."""


def inception(
    path: str | Path, sha256: str | None = None, device: torch.device | str = "cpu", resizing: str = "inception"
) -> Extractor:
    """The extractor of FID: 2048 features of images of any size, grey ones in three equal channels.

    Images are rounded to 8 bits first, so that those in memory and those in files have the same features. Its hash covers the
    weights and the preprocessing, for both fix the number.

    Arguments:
        path: Weights in the layout of pt_inception-2015-12-05-6726825d.pth: .safetensors, or a .pth of plain tensors.
        sha256: What the file must hash to, or the beginning of it; `KNOWN` for published FIDs. None takes any weights, and the
            extractor's name says so.
        device: Where to compute.
        resizing: One of `RESIZING`.

    Raises:
        ValueError: If the file is missing, damaged, of another layout, or not the one expected.
    """
    if resizing not in RESIZING:
        raise ValueError(f"`resizing` must be one of {', '.join(RESIZING)} (got {resizing!r})")
    path = Path(path).expanduser()
    digest = hashlib.sha256(checked(path, sha256)).hexdigest()
    with torch.device("meta"):
        network = FIDInception()
    _fill(network, _tensors(path), path)
    network.to(device).eval().requires_grad_(False)
    prepare, words = RESIZING[resizing]

    def features(x: Tensor) -> Tensor:
        levels = to_pixels(x).to(device, torch.float32)
        return network.features(prepare(levels.expand(-1, 3, -1, -1)))

    name = "Inception-v3 of FID" if digest.startswith(KNOWN) else f"Inception-v3 with the weights {path.name}"
    return Extractor(name, features, hashlib.sha256(f"{digest} {words}".encode()).hexdigest(), words)


def _tensors(path: Path) -> dict[str, Tensor]:
    from ..training.weights import read_tensors

    if path.suffix == ".safetensors":
        return read_tensors(path, "get it again")[0]
    remedy = "name a .safetensors or a .pth that holds plain tensors, such as pt_inception-2015-12-05-6726825d.pth"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the bytes lead to; scripts and pickles are refused here
        raise ValueError(f"{path} cannot be read as tensors ({type(error).__name__}): {remedy}") from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no dictionary of tensors: {remedy}")
    return content


def _fill(network: FIDInception, tensors: dict[str, Tensor], path: Path) -> None:
    from ..training.weights import restore

    kept = {name: tensor for name, tensor in network.state_dict().items() if name.endswith("num_batches_tracked")}
    counted = {name: torch.zeros((), dtype=torch.int64) for name in kept}  # not in all files, and never used
    given = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items() if n not in counted}
    network.to_empty(device="cpu")
    try:
        restore(network, {**counted, **given}, path)
    except ValueError as error:
        reason = str(error).partition(": ")[2].partition(";")[0]
        raise ValueError(f"{path} is not in the layout of pt_inception-2015-12-05: {reason}") from None
