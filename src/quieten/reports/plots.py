"""Pictures people look at: grids of images, training curves, quality against cost.

Figures are drawn without pyplot, so no backend is chosen and no global state is left behind. Lines use
colours that keep at least 3:1 contrast on white and on near black; axes and text use `INK`, a colour that
`quieten.report` turns into the text colour of the page, so one picture serves light and dark readers.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

__all__ = ["COLOURS", "INK", "curve", "curve_png", "figure_axes", "grid_image", "pareto", "save_grid", "spaced"]

INK = "#0a0b0c"
COLOURS = ("#2a7fdb", "#d2620d", "#2a9152", "#a05ad6", "#d9406f", "#0f8f9c", "#9a7b0a", "#7a8290")
_MARKERS = "osD^vPX*"
_DASHES = ("-", "--", "-.", (0, (5, 1.5, 1, 1.5, 1, 1.5)))


def grid_image(images: Tensor, columns: int | None = None, pad: int = 2, scale: int | None = None) -> Image:
    """Lays images out in rows, left to right.

    Arguments:
        images: Floats in [-1, 1], clipped, or bytes (N, C, H, W), C of 1 (gray) or 3 (RGB).
        columns: Images per row; by default a divisor of N that makes the grid square to 2:1 wide, if any.
        pad: Pixels of neutral gray between images.
        scale: Each pixel becomes scale x scale; by default small images grow to about 64 pixels.

    Raises:
        ValueError: If the shape is another, a value is not finite, or columns, pad or scale is out of range.
    """
    from PIL import Image

    if images.dim() != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images must be (N, 1 or 3, H, W) and not empty, got {tuple(images.shape)}: add an axis")
    if images.dtype != torch.uint8:
        if not images.is_floating_point():
            raise ValueError(f"images must be floats in [-1, 1] or uint8, got {images.dtype}: convert them")
        if not torch.isfinite(images).all():
            raise ValueError("images hold NaN or infinity: look at the sampler's settings, or pass nan_to_num")
        images = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    n, c, h, w = images.shape
    columns = _columns(n) if columns is None else columns
    scale = max(1, 64 // max(h, w)) if scale is None else scale
    if columns < 1 or scale < 1 or pad < 0:
        raise ValueError(f"columns {columns}, scale {scale} and pad {pad} must be at least 1, 1 and 0: raise them")
    columns, rows = min(columns, n), math.ceil(n / min(columns, n))
    h, w = h * scale, w * scale
    tiles = images.cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    canvas = torch.full((c, rows * (h + pad) - pad, columns * (w + pad) - pad), 128, dtype=torch.uint8)
    for k, tile in enumerate(tiles):
        top, left = (k // columns) * (h + pad), (k % columns) * (w + pad)
        canvas[:, top : top + h, left : left + w] = tile
    pixels = canvas[0] if c == 1 else canvas.permute(1, 2, 0)
    return Image.fromarray(pixels.contiguous().numpy())


def _columns(n: int) -> int:
    root = math.ceil(math.sqrt(n))
    return next((k for k in range(root, 2 * root + 1) if n % k == 0), root)


def save_grid(images: Tensor, path: str | Path, columns: int | None = None, pad: int = 2, scale: int | None = None) -> Path:
    """Writes `grid_image` as a PNG, whole or not at all, and returns the path."""
    return write_atomic(path, _png(grid_image(images, columns, pad, scale)))


def _png(image: Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def curve(
    x: Sequence[float] | Tensor,
    y: Sequence[float] | Tensor,
    *,
    xlabel: str = "images seen",
    ylabel: str = "loss",
    smooth: float = 0.03,
    log: bool | None = None,
    ink: str = INK,
) -> Figure:
    """Training curve: the smoothed value as a line over the spread of the raw ones.

    Arguments:
        x: Position of each value, increasing, such as images seen.
        y: Raw values of the same length; those that are not finite are left out.
        xlabel: Label of the horizontal axis.
        ylabel: Label of the vertical axis.
        smooth: Width of the moving mean, as a fraction of the curve.
        log: Logarithmic vertical axis; by default where positive values fall to less than a fifth.
        ink: Colour of axes and text.
    """
    xs, ys = torch.as_tensor(x, dtype=torch.float64), torch.as_tensor(y, dtype=torch.float64)
    if xs.dim() != 1 or xs.shape != ys.shape:
        raise ValueError(f"x and y must be of one length, got {tuple(xs.shape)} and {tuple(ys.shape)}: pair them")
    finite = torch.isfinite(ys) & torch.isfinite(xs)
    if not finite.any():
        raise ValueError(f"y holds no finite value among {len(ys)}: nothing to draw")
    xs, ys = xs[finite], ys[finite]
    mean = _moving_mean(ys, max(1, round(smooth * len(ys))))
    if log is None:
        log = bool((ys > 0).all() and mean.max() > 5 * mean.min())
    figure, axes = figure_axes(xlabel, ylabel, ink)
    bins = min(len(xs), 300)  # a picture has no room for more, and a long run would weigh megabytes
    blocks = [b.tolist() for b in torch.tensor_split(torch.arange(len(xs)), bins)]
    low, high = [float(ys[b].min()) for b in blocks], [float(ys[b].max()) for b in blocks]
    middle, centre = [float(mean[b].mean()) for b in blocks], [float(xs[b].mean()) for b in blocks]
    if bins < len(xs):
        axes.fill_between(centre, low, high, color=COLOURS[0], alpha=0.3, linewidth=0, label="raw, least to greatest")
    else:
        axes.plot(centre, low, color=COLOURS[0], alpha=0.45, linewidth=0.8, label="raw")
    axes.plot(centre, middle, color=COLOURS[0], linewidth=1.8, label="moving mean")
    if log:
        axes.set_yscale("log")
        _plain_log(axes.yaxis, min(low), max(high))
    axes.xaxis.set_major_formatter(_thousands)
    axes.margins(x=0.01)
    axes.legend(frameon=False, labelcolor=ink, fontsize=10.5, loc="best")
    return figure


def curve_png(x: Sequence[float] | Tensor, y: Sequence[float] | Tensor, **options: Any) -> bytes:
    """`curve` as the bytes of a PNG, dark on white."""
    buffer = io.BytesIO()
    curve(x, y, **options).savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()


def pareto(
    points: Mapping[str, Sequence[tuple[float, Any]]],
    *,
    xlabel: str = "network calls per image (NFE)",
    ylabel: str = "distance to data (lower is better)",
    floor: float | None = None,
    ink: str = INK,
) -> Figure:
    """Quality against cost of several samplers, both axes logarithmic, the best trade-off shaded behind.

    Arguments:
        points: For each sampler its pairs (cost, quality). Quality is positive, lower is better: a number, or
            a metric's Result, whose uncertainty becomes an error bar.
        xlabel: Label of the cost.
        ylabel: Label of the quality.
        floor: Quality of real data, drawn as a line.
        ink: Colour of axes and text.
    """
    rows = {name: sorted(map(_point, pairs)) for name, pairs in points.items() if pairs}
    every = sorted(row for series in rows.values() for row in series)
    if not every or not all(0 < v < math.inf for cost, quality, _ in every for v in (cost, quality)):
        raise ValueError("points must hold positive finite costs and qualities: leave failed runs out")
    figure, axes = figure_axes(xlabel, ylabel, ink)
    axes.set_xscale("log")
    axes.set_yscale("log")
    lines: list[Any] = []
    for k, (name, series) in enumerate(rows.items()):
        cost, quality, error = zip(*series, strict=True)
        style: dict[str, Any] = {"color": COLOURS[k % 8], "linestyle": _DASHES[k % 4], "marker": _MARKERS[k % 8]}
        lines += axes.plot(cost, quality, label=name, markersize=5.5, linewidth=1.6, **style)
        down = [min(e, 0.9 * q) for q, e in zip(quality, error, strict=True)]  # a log axis ends above zero
        if any(error):
            axes.errorbar(cost, quality, (down, error), fmt="none", ecolor=COLOURS[k % 8], elinewidth=1, capsize=2.5)
    front: list[tuple[float, float]] = []
    for point in every:
        if not front or point[1] < front[-1][1]:
            front.append(point[:2])
    axes.plot(*zip(*front, strict=True), color=ink, alpha=0.13, linewidth=9, solid_capstyle="round", zorder=0)
    if floor is not None:
        lines.append(axes.axhline(floor, color=ink, alpha=0.7, linewidth=1.2, linestyle=":", label="real data"))
    _ticks_at(axes.xaxis, spaced([position for position, _, _ in every]))
    _plain_log(axes.yaxis, *axes.get_ylim())
    look: dict[str, Any] = {"frameon": False, "labelcolor": ink, "fontsize": 10.5, "ncols": min(3, len(lines))}
    figure.legend(handles=lines, loc="outside upper center", **look)
    return figure


def _point(pair: tuple[float, Any]) -> tuple[float, float, float]:
    """Cost, quality and standard error of a pair whose second part is a number or a Result."""
    cost, quality = pair
    return (
        float(cost),
        float(getattr(quality, "value", quality)),
        float(getattr(quality, "uncertainty", None) or 0),
    )


def spaced(positions: Sequence[float], ratio: float = 1.24) -> list[float]:
    """The positions that occur most often, none so close to another that their labels would touch."""
    chosen: list[float] = []
    for p in sorted(set(positions), key=lambda p: (-positions.count(p), p)):
        if all(max(p / c, c / p) > ratio for c in chosen):
            chosen.append(p)
    return sorted(chosen)


def figure_axes(xlabel: str, ylabel: str, ink: str = INK) -> tuple[Figure, Axes]:
    """An empty figure in the style of all of them: labels, light grid, no frame."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 3.3), layout="constrained")  # small, so that text stays readable on a phone
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.set_xlabel(xlabel, color=ink, fontsize=11.5)
    axes.set_ylabel(ylabel, color=ink, fontsize=11.5)
    axes.tick_params(which="both", colors=ink, labelsize=10.5)
    axes.grid(True, which="major", color=ink, alpha=0.14, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(ink)
    axes.set_axisbelow(True)
    return figure, axes


def _moving_mean(y: Tensor, width: int) -> Tensor:
    """Centred mean over `width` values, over fewer at the ends."""
    total = torch.cat([y.new_zeros(1), y.cumsum(0)])
    index = torch.arange(len(y))
    start, stop = (index - width // 2).clamp(min=0), (index + (width + 1) // 2).clamp(max=len(y))
    return (total[stop] - total[start]) / (stop - start)


def _plain_log(axis: Any, low: float, high: float) -> None:
    """Labels 1, 2, 5 steps in plain numbers: 10^0 alone says nothing on an axis shorter than a decade."""
    steps = (1, 2, 5) if high < 300 * low else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    _ticks_at(axis, [s * 10.0**p for p in powers for s in steps if low <= s * 10.0**p <= high] or [low, high])


def _ticks_at(axis: Any, values: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    axis.set_major_locator(FixedLocator(list(values)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:.6g}")


def _thousands(value: float, _: object = None) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.6g}{unit}"
    return f"{value:.6g}"
