r"""Which solver survives which guidance: steps, scales and solvers tried against a path of a thousand steps."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..guidance import Guidance, Guided
from ..noise import INITIAL, Noise
from ..sampling import trajectory
from ..solvers.samplers import SAMPLERS, sampler
from ..wrap import Counted
from .splits import SPLITS, split

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SOLVERS", "Chart", "Trial", "stability", "stability_png"]

SOLVERS = ("ddim", "plms", "dpm++", "strang", "merged", "lie", "heun-kick", "stsp")
"""What is tried unless told otherwise: three solvers of joint guidance, four split schemes, and the released one."""

BLOWN = 3.0
"""A path is unstable when its largest state passes so many times the reference's."""


@dataclass(frozen=True)
class Trial:
    """One solver, number of steps and scale.

    Attributes:
        solver: Name in `SAMPLERS` (joint guidance) or `SPLITS`.
        steps: Number of steps.
        scale: Weight of the guidance.
        largest: Largest |x_t| / sqrt(alpha^2 + sigma^2) of any state of any sample on the way; inf if one is not finite.
        distance: Root mean square difference of the samples from the reference's, in units of the data; inf likewise.
        stable: Whether `largest` stays below `BLOWN` times the reference's.
        network: Evaluations of the network.
        seconds: What the run took, of processor time on a CPU.
    """

    solver: str
    steps: int
    scale: float
    largest: float
    distance: float
    stable: bool
    network: int
    seconds: float


@dataclass(frozen=True)
class Chart:
    """All trials, and the references that they were held against.

    Attributes:
        trials: In the order of scales, solvers, steps.
        size: Root mean square of the reference's samples, for each scale.
        largest: Largest state of the reference, for each scale.
        steps: Steps of the reference.
    """

    trials: tuple[Trial, ...]
    size: dict[float, float]
    largest: dict[float, float]
    steps: int

    def advice(self, tolerance: float = 0.1) -> list[str]:
        """What to take at each scale, in words.

        Arguments:
            tolerance: Largest distance that counts as right, as a share of the size of the samples.
        """
        lines = []
        for scale, size in self.size.items():
            here = [t for t in self.trials if t.scale == scale]
            blown = list(dict.fromkeys(t.solver for t in here if not t.stable))
            words = [f"scale {scale:g}:"]
            near = [t for t in here if t.stable and t.distance <= tolerance * size]
            calm = [t for t in here if t.stable]
            if near:
                best = min(near, key=lambda t: (t.seconds, t.distance))
                words.append(
                    f"take {best.solver} with {best.steps} steps, off by {best.distance / size:.0%} of the samples' size"
                )
            elif calm:
                best = min(calm, key=lambda t: t.distance)
                words.append(f"nothing is within {tolerance:.0%}; nearest is {best.solver} with {best.steps} steps, "
                             f"off by {best.distance / size:.0%}: take more steps")  # fmt: skip
            else:
                words.append("everything blows up: take more steps, or a smaller scale")
            if blown:
                worst = (max(t.steps for t in here if t.solver == name and not t.stable) for name in blown)
                words.append("(unstable: " + ", ".join(f"{k} up to {n} steps" for k, n in zip(blown, worst, strict=True)) + ")")
            lines.append(" ".join(words))
        return lines

    def rows(self) -> list[dict[str, Any]]:
        """The trials as plain dictionaries, for tables."""
        return [asdict(trial) for trial in self.trials]


@torch.no_grad()
def stability(
    denoiser: Denoiser,
    guidance: Callable[[float], Guidance],
    grid: Callable[[int], Tensor],
    shape: tuple[int, ...],
    *,
    n: int = 16,
    scales: Sequence[float] = (1.0, 3.0, 10.0),
    steps: Sequence[int] = (5, 10, 15, 20, 25),
    solvers: Sequence[str] = SOLVERS,
    reference: int = 1000,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Chart:
    """Tries every solver at every scale and number of steps from the same noise, against DDIM in `reference` steps.

    Arguments:
        denoiser: Unguided, conditions bound, for n samples.
        guidance: Scale to guidance.
        grid: Number of steps to levels, from noise to data.
        shape: Of one sample.
        n: Number of samples.
        scales: Weights to try.
        steps: Numbers of steps to try.
        solvers: Names in `SAMPLERS`, where guidance is joint, or in `SPLITS`; noise that a random one draws is keyed.
        reference: Steps of the reference.
        seed: Of the noise.
        dtype: Of the states.
        device: Of the states.
        progress: Called with the number of network evaluations' worth of steps done so far.

    Raises:
        ValueError: For an empty list, a number of steps not below the reference's, or an unknown solver.
    """
    _check(scales, steps, solvers, reference, n)
    trials: list[Trial] = []
    size: dict[float, float] = {}
    largest: dict[float, float] = {}
    done = 0
    for scale in scales:
        field = _Field(denoiser, guidance(scale), shape, n, seed, dtype, device)
        truth, largest[scale], _, _ = field.run("ddim", grid(reference))
        if truth is None:
            raise ValueError(
                f"`reference` of {reference} steps is not finite at scale {scale:g}: lower the scale, or take more"
            )
        size[scale] = float(truth.double().square().mean().sqrt())
        done += reference
        if progress is not None:
            progress(done)
        for name in solvers:
            for count in steps:
                x, most, network, seconds = field.run(name, grid(count))
                off = math.inf if x is None else float((x - truth).double().square().mean().sqrt())
                trials.append(Trial(name, count, scale, most, off, most <= BLOWN * largest[scale], network, seconds))
                done += count
                if progress is not None:
                    progress(done)
    return Chart(tuple(trials), size, largest, reference)


class _Field:
    """A guided denoiser with the noise that every run starts from."""

    def __init__(
        self,
        denoiser: Denoiser,
        guidance: Guidance,
        shape: tuple[int, ...],
        n: int,
        seed: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        self.denoiser, self.guidance = denoiser, guidance
        self.noise, self.like = Noise(seed, range(n)), torch.empty(n, *shape, dtype=dtype, device=device)

    def run(self, name: str, grid: Tensor) -> tuple[Tensor | None, float, int, float]:
        """Samples (None if not finite), the largest state on the way, evaluations, seconds."""
        net = Counted(self.denoiser)
        model: Denoiser = net
        if name in SPLITS:
            transition: Any = split(name, self.guidance)
        else:
            transition, grid = sampler(name, grid)
            model = Guided(net, self.guidance)
        clock = time.process_time if self.like.device.type == "cpu" else time.perf_counter
        x = net.process.prior(grid[0].item()).sample(self.noise(INITIAL, self.like))
        most, started = torch.zeros((), device=x.device), clock()
        try:
            for state in trajectory(model, x, grid, transition, noise=self.noise):
                alpha, sigma = net.process.scales(state.lam)
                x = state.x
                most = torch.maximum(most, x.abs().max().float() / math.hypot(alpha, sigma))
        except ValueError:  # guidance that is not finite any more: the path blew up
            return None, math.inf, net.calls, clock() - started
        finite = bool(x.isfinite().all())
        return x if finite else None, float(most) if finite else math.inf, net.calls, clock() - started


def _check(scales: Sequence[float], steps: Sequence[int], solvers: Sequence[str], reference: int, n: int) -> None:
    from ..training.parts import nearest

    if not scales or not steps or not solvers or n < 1:
        raise ValueError("`scales`, `steps` and `solvers` need one entry at least, and `n` must be 1 or more")
    if min(steps) < 1 or max(steps) >= reference:
        raise ValueError(f"`steps` must lie between 1 and the reference's {reference} (got {', '.join(map(str, steps))})")
    known = [*SPLITS, *SAMPLERS]
    for name in solvers:
        if name not in known:
            raise ValueError(f"unknown solver {name!r}{nearest(name, known)} (known: {', '.join(known)})")


# ---- the picture


def stability_png(chart: Chart) -> bytes:
    """A panel for each solver, steps across and scales up: colour and figure say how far off, red that it blew up."""
    from matplotlib.figure import Figure

    solvers = list(dict.fromkeys(t.solver for t in chart.trials))
    scales, steps = list(chart.size), sorted({t.steps for t in chart.trials})
    columns = min(4, len(solvers))
    rows = -(-len(solvers) // columns)
    figure = Figure(figsize=(0.5 + columns * (0.55 + 0.46 * len(steps)), 0.75 + rows * (0.75 + 0.34 * len(scales))),
                    layout="constrained")  # fmt: skip
    for i, name in enumerate(solvers):
        axes = figure.add_subplot(rows, columns, i + 1)
        _panel(axes, chart, name, scales, steps)
        if i % columns == 0:
            axes.set_ylabel("scale")
        if i >= len(solvers) - columns:
            axes.set_xlabel("steps")
    figure.suptitle(
        f"off the path of {chart.steps} steps, % of the samples' size; red: unstable, its largest state", fontsize=9.5
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()


def _panel(axes: Axes, chart: Chart, name: str, scales: list[float], steps: list[int]) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    blues = colormaps["Blues"]
    for trial in (t for t in chart.trials if t.solver == name):
        i, j = steps.index(trial.steps), scales.index(trial.scale)
        off = trial.distance / chart.size[trial.scale]
        shade = min(1.0, max(0.0, (math.log10(max(off, 1e-9)) + 2.0) / 2.0)) if trial.stable else 1.0  # 1 % to 100 %
        axes.add_patch(Rectangle((i, j), 1, 1, facecolor=blues(0.08 + 0.72 * shade) if trial.stable else "#b3261e"))
        words = f"{100 * off:.0f}" if trial.stable else _brief(trial.largest)
        colour = "white" if not trial.stable or shade > 0.6 else "black"
        axes.text(i + 0.5, j + 0.5, words, ha="center", va="center", fontsize=8.5, color=colour)
    axes.set(xlim=(0, len(steps)), ylim=(0, len(scales)))
    axes.set_xticks([i + 0.5 for i in range(len(steps))], [str(k) for k in steps], fontsize=8.5)
    axes.set_yticks([j + 0.5 for j in range(len(scales))], [f"{s:g}" for s in scales], fontsize=8.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{name} ({'split' if name in SPLITS else 'joint'})", fontsize=10)


def _brief(value: float) -> str:
    if not math.isfinite(value):
        return "inf"
    return f"{value:.0f}" if value < 1000 else f"1e{math.floor(math.log10(value))}"
