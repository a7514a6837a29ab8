"""The picture of a diagnosis: what is noisy where, what stable targets take away, and what a network could still learn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..targets.diagnosis import NetworkLoss, TargetVariance
from .plots import COLOURS, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["diagnosis_png"]

_PHASES = {1: "one\nexample", 2: "several\ncompete", 3: "all\naverage"}


def diagnosis_png(variance: TargetVariance, loss: NetworkLoss | None, density: Tensor | None, title: str) -> bytes:
    """Four panels over sigma / alpha: variance of the targets, its share that stays, references in effect, the network's loss.

    Arguments:
        variance: With the estimator "exact".
        loss: Of a network on the same pairs; None without.
        density: Of training levels, at the levels (L,); None where it is unknown.
        title: Line above all.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 7.4), layout="constrained")
    figure.suptitle(title, color=INK, fontsize=12.5)
    (top_left, top_right), (low_left, low_right) = figure.subplots(2, 2, sharex=True)
    noise = (-0.5 * variance.lam).exp().tolist()
    for axes in (top_left, top_right, low_left, low_right):
        _style(axes, variance, noise)
    _variances(top_left, variance, noise, density)
    counts = list(variance.stable)
    for k, n in enumerate(counts):
        kept = _share(variance, n)
        top_right.plot(noise, kept, color=COLOURS[k + 1], marker="o", markersize=3.5, label=f"n = {n:,}")
        low_left.plot(noise, variance.ess[n], color=COLOURS[k + 1], marker="o", markersize=3.5, label=f"of {n:,}")
    _finish(top_right, "variance that stays, stable / plain")
    top_right.set_ylim(0, 1.08)
    low_left.set_yscale("log")
    _finish(low_left, "effective number of references")
    _losses(low_right, variance, loss, noise)
    for axes in (low_left, low_right):
        axes.set_xlabel(r"noise $\sigma / \alpha$", color=INK, fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, facecolor="white")
    return buffer.getvalue()


def _share(variance: TargetVariance, n: int) -> Tensor:
    """The stable target's share of the plain one's variance, both from the same averages: never above 1.

    NaN where there is next to none, and the share is that of a few rare examples.
    """
    plain = variance.stable[n] + variance.within[n]
    seen = plain * variance.in_eps
    return torch.where(seen > 1e-3 * seen.max(), variance.stable[n] / plain, torch.nan)


def _style(axes: Axes, variance: TargetVariance, noise: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.tick_params(which="both", colors=INK, labelsize=10)
    axes.grid(True, which="major", color=INK, alpha=0.12, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    middle = [s for s, phase in zip(noise, variance.phases, strict=True) if phase == 2]
    axes.axvspan(min(middle), max(middle), color=COLOURS[6], alpha=0.08, linewidth=0)


def _variances(axes: Axes, variance: TargetVariance, noise: Sequence[float], density: Tensor | None) -> None:
    """Variance of the targets of eps, the phases, and the training levels underneath."""
    axes.plot(noise, variance.plain * variance.in_eps, color=INK, linewidth=2.2, label="plain target")
    for k, (n, value) in enumerate(variance.stable.items()):
        axes.plot(noise, value * variance.in_eps, color=COLOURS[k + 1], marker="o", markersize=3.5, label=f"stable, n = {n:,}")
    top = float((variance.plain * variance.in_eps).max())
    if density is not None:
        below = axes.fill_between(noise, 0, (density / density.max().clamp(min=1e-30) * 0.3 * top).tolist(), linewidth=0)
        below.set(color=COLOURS[7], alpha=0.3, label="levels trained on (density)", zorder=0)
    axes.set_ylim(0, 1.42 * top)
    for phase, words in _PHASES.items():
        place = [s for s, p in zip(noise, variance.phases, strict=True) if p == phase]
        if place:
            centre = (min(place) * max(place)) ** 0.5
            axes.text(centre, 1.4 * top, words, ha="center", va="top", fontsize=9.5, color=INK, alpha=0.8, linespacing=1.15)
    _finish(axes, r"variance of the target of $\epsilon$, per element")


def _losses(axes: Axes, variance: TargetVariance, loss: NetworkLoss | None, noise: Sequence[float]) -> None:
    """The network's loss and its parts, in units of eps."""
    unit = variance.in_eps
    values = variance.plain * unit
    axes.set_yscale("log")
    if loss is not None:
        axes.plot(noise, loss.loss * unit, color=COLOURS[0], marker="o", markersize=3.5, label="network's loss")
        axes.plot(noise, loss.gap * unit, color=COLOURS[4], linestyle="--", label="gap: loss less the irreducible part")
        values = torch.cat([loss.loss * unit, loss.gap * unit])
    axes.plot(noise, variance.plain * unit, color=INK, linewidth=2.2, label="irreducible: variance of the plain target")
    axes.set_ylim(max(1e-7, float(values.clamp(min=1e-12).min()) / 2), 3 * float(values.max()))
    _finish(axes, r"squared error of $\epsilon$, per element", "upper right")


def _finish(axes: Axes, label: str, place: Literal["best", "upper right"] = "best") -> None:
    axes.set_ylabel(label, color=INK, fontsize=11)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9, loc=place)
