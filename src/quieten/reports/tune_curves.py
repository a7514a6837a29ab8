"""The course of a tuning as a picture: distance, energies, noise, running cost."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from ..files import write_atomic, writing
from ..training.runs import Run
from .plots import COLOURS

__all__ = ["draw_curves"]


def draw_curves(run: Run, first: float, std_start: Sequence[float], title: str = "distance") -> None:
    """Writes curves.png into the run's folder; nothing if there is nothing to draw.

    Arguments:
        run: Of a tuning.
        first: The distance before it.
        std_start: Standard deviations of the steps before it.
        title: Of what was measured, see `yardstick.Yardstick`.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    rows = run.metrics()
    lines, measured = [row for row in rows if "loss" in row], [row for row in rows if "distance" in row]
    if not lines:
        return
    figure = Figure(figsize=(11, 6), layout="constrained")
    (distance, energy), (noise, cost) = figure.subplots(2, 2)
    if measured:
        at = [0, *(row["step"] for row in measured)]
        distance.plot(at, [first, *(row["distance"] for row in measured)], "o-", color=COLOURS[0], ms=3)
        distance.axhline(measured[-1]["floor"], color=COLOURS[7], ls="--", label="data themselves")
        distance.legend(frameon=False)
    distance.set(xlabel="step", ylabel=f"{title}, n={measured[-1]['n'] if measured else '?'}")
    if all(row["distance"] > 0 and row["floor"] > 0 for row in measured):
        distance.set_yscale("log")
    for axis in (distance.yaxis.set_major_formatter, distance.yaxis.set_minor_formatter):
        axis(FuncFormatter(lambda value, _: f"{value:.3g}"))
    for name, label, colour in (("e_data", "data", COLOURS[0]), ("e_policy", "samples", COLOURS[1])):
        _line(energy, lines, name, label, colour)
    _line(energy, lines, "le_cam", "Le Cam distance", COLOURS[2])
    energy.set(xlabel="step", ylabel="energy")
    for k in range(len(std_start)):
        colour = COLOURS[k % len(COLOURS)]
        noise.plot(
            [row["step"] for row in lines], [row["rho"][k] / std_start[k] for row in lines], color=colour, label=f"step {k}"
        )
        _line(cost, lines, f"running_cost_{k}", f"step {k}", colour)
    noise.set(xlabel="step", ylabel="noise / noise before")
    cost.axhline(0.5, color=COLOURS[7], ls="--")
    cost.set(xlabel="step", ylabel="running cost")
    for axes in (energy, noise):
        axes.legend(frameon=False, fontsize=8, ncol=2)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    with writing(run.path / "curves.png"):
        write_atomic(run.path / "curves.png", buffer.getvalue())


def _line(axes: Any, rows: Sequence[dict[str, Any]], name: str, label: str, colour: str) -> None:
    known = [row for row in rows if name in row]
    if known:
        axes.plot([row["step"] for row in known], [row[name] for row in known], color=colour, label=label, lw=1.2)
