"""Quality against cost as inline SVG: drawn here, so that every point is a link, a tooltip and something to focus.

The picture is complete without any script. With `report.js` names in the legend switch their lines off and on, and points say
what they are at once. Text and axes take the colour of the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from .plots import COLOURS

__all__ = ["Point", "legend", "scatter"]

WIDTH, HEIGHT = 460, 350
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 46
DASHES = ("", "7 4", "2 3", "9 3 2 3")
MARKS = ("circle", "square", "up", "diamond", "down", "cross")
RADIUS = 4.6


@dataclass(frozen=True)
class Point:
    """A cell of the comparison.

    Attributes:
        x: Cost, positive.
        y: Quality, positive, lower is better.
        error: Standard error of y.
        words: What it is, in a line.
        target: Id of what it links to on the page; empty for nothing.
    """

    x: float
    y: float
    error: float = 0.0
    words: str = ""
    target: str = ""


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis: data from `low` to `high` to pixels from `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, stop: float) -> Axis:
        low, high = min(values), max(values)
        margin = max((high / low) ** 0.06, 1.08)
        return cls(low / margin, high * margin, start, stop)

    def __call__(self, value: float) -> float:
        share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.stop - self.start)

    @property
    def ticks(self) -> list[float]:
        """1, 2 and 5 of every power of ten, thinned where they would be many."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            found = [d * 10.0**p for p in powers for d in digits if self.low <= d * 10.0**p <= self.high]
            if len(found) <= 8:
                break
        return found if len(found) > 1 else [self.low * 1.02, self.high / 1.02]


def scatter(
    series: Mapping[str, Sequence[Point]],
    *,
    xlabel: str,
    ylabel: str,
    floor: float | None = None,
    ticks: Sequence[float] | None = None,
) -> str:
    """An SVG element, axes logarithmic, the best quality for its cost shaded behind.

    Arguments:
        series: Points by name; names keep their colour, mark and dash by their place, points or none.
        xlabel: Label of the cost.
        ylabel: Label of the quality.
        floor: Quality of real data, drawn as a line.
        ticks: Where to label the cost; None chooses.

    Raises:
        ValueError: If there is no point, or one is not positive and finite.
    """
    every = [p for points in series.values() for p in points]
    if not every or not all(0 < v < math.inf for p in every for v in (p.x, p.y)):
        raise ValueError("`series` must hold positive finite costs and qualities: leave failed cells out")
    lines = [p.y for p in every] + ([floor] if floor is not None and floor > 0 else [])
    across = Axis.over([p.x for p in every], LEFT, WIDTH - RIGHT)
    up = Axis.over(lines, HEIGHT - BOTTOM, TOP)
    parts = [_axes(across, up, xlabel, ylabel, ticks), _front(every, across, up)]
    if floor is not None and floor > 0:
        y = up(floor)
        parts.append(f'<line class="floor" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text class="small" x="{WIDTH - RIGHT}" y="{y - 5:.1f}" text-anchor="end">real data</text>')  # fmt: skip
    parts += [_line(k, name, sorted(points, key=lambda p: p.x), across, up) for k, (name, points) in enumerate(series.items())]
    label = escape(f"{ylabel} against {xlabel}, {len(every)} points")
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-label="{label}">{"".join(parts)}</svg>'


def legend(names: Sequence[str]) -> str:
    """The names of the series, as buttons that a script may use; without one they are only a legend."""
    buttons = "".join(
        f'<button type="button" data-series="{k}" aria-pressed="true"><svg viewBox="0 0 34 14" width="34" height="14" '
        f'aria-hidden="true"><line x1="1" x2="33" y1="7" y2="7" {_stroke(k)}/>{_mark(k, 17, 7)}</svg>{escape(name)}</button>'
        for k, name in enumerate(names)
    )
    return f'<div class="legend" role="group" aria-label="samplers">{buttons}</div>'


def _axes(across: Axis, up: Axis, xlabel: str, ylabel: str, ticks: Sequence[float] | None) -> str:
    bottom, parts = HEIGHT - BOTTOM, []
    for value in across.ticks if ticks is None else ticks:
        x = across(value)
        parts.append(f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>'
                     f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{value:.3g}</text>')  # fmt: skip
    for value in up.ticks:
        y = up(value)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')  # fmt: skip
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(xlabel)}</text>')
    height = (TOP + bottom) / 2
    parts.append(f'<text transform="translate(13 {height}) rotate(-90)" text-anchor="middle">{escape(ylabel)}</text>')
    return "".join(parts)


def _front(points: Sequence[Point], across: Axis, up: Axis) -> str:
    """The cells that no other beats at no more cost."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, p.y)):
        if not front or point.y < front[-1].y:
            front.append(point)
    path = "L".join(f"{across(p.x):.1f} {up(p.y):.1f}" for p in front)
    return f'<path class="front" d="M{path}"/>' if len(front) > 1 else ""


def _line(k: int, name: str, points: Sequence[Point], across: Axis, up: Axis) -> str:
    path = "L".join(f"{across(p.x):.1f} {up(p.y):.1f}" for p in points)
    parts = [f'<path d="M{path}" fill="none" {_stroke(k)}/>'] if len(points) > 1 else []
    for point in points:
        x, y = across(point.x), up(point.y)
        bar = ""
        if point.error > 0:
            low, high = up(max(point.y - point.error, 0.0)), up(point.y + point.error)
            bar = f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{COLOURS[k % 8]}"/>'
        words = escape(point.words or f"{name}: {point.y:.4g}")
        target = f' href="#{escape(point.target)}"' if point.target else ""
        spot = f'<circle class="spot" cx="{x:.1f}" cy="{y:.1f}" r="11"/>'
        parts.append(f'<a class="point"{target} aria-label="{words}" data-tip="{words}">{bar}{_mark(k, x, y)}{spot}'
                     f"<title>{words}</title></a>")  # fmt: skip
    return f'<g class="series" data-series="{k}">{"".join(parts)}</g>'


def _stroke(k: int) -> str:
    dash = DASHES[(k // 8) % 4]
    return f'stroke="{COLOURS[k % 8]}" stroke-width="1.8"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _mark(k: int, x: float, y: float) -> str:
    kind, r, fill = MARKS[k % len(MARKS)], RADIUS, f'fill="{COLOURS[k % 8]}"'
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" {fill}/>'
    corners = {
        "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "up": ((0, -1.25), (1.15, 0.85), (-1.15, 0.85)),
        "down": ((0, 1.25), (1.15, -0.85), (-1.15, -0.85)),
        "diamond": ((0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)),
        "cross": ((-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4), (0.4, 1.2), (-0.4, 1.2),
                  (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4)),
    }[kind]  # fmt: skip
    points = " ".join(f"{x + 0.9 * r * a:.1f},{y + 0.9 * r * b:.1f}" for a, b in corners)
    return f'<polygon points="{points}" {fill}/>'
