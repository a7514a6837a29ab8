"""Fitting a variance to a trained denoiser: heads by the training loop of runs, the table of Analytic-DPM by one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..covariance import Analytic, Learned, noise_of
from ..data import Dataset, Order
from ..denoiser import Denoiser
from ..fit import fit
from ..noise import Draws
from ..objective import Batch, noised_by
from ..progress import Progress
from ..schedule import Linear, Schedule
from ..training.loop import Row
from ..training.parts import borrows
from ..training.runs import Run
from ..training.schema import Data, Recipe, Train
from ..training.source import Source
from ..training.watch import signals
from .matching import CovarianceMatching
from .stored import UNTRAINED, fingerprint, make_variance, save_variance

__all__ = ["Fitted", "HeadUpdate", "fit_variance", "measure_analytic", "section"]


@dataclass(frozen=True)
class Fitted:
    """How fitting ended.

    Attributes:
        file: The variance, for `load_variance`; None if fitting was interrupted before it was done.
        message: One line for people.
    """

    file: Path | None
    message: str


class HeadUpdate(nn.Module):
    """What a step of fitting differentiates: the head alone. The frozen denoiser is neither saved, averaged nor copied.

    Arguments:
        denoiser: Frozen.
        objective: With the head in its source.
    """

    previews = False
    denoiser: Denoiser

    def __init__(self, denoiser: Denoiser, objective: CovarianceMatching):
        super().__init__()
        self.__dict__["denoiser"] = denoiser.eval().requires_grad_(False)  # not a submodule
        self.objective = objective

    def forward(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """The losses of the batch (B,), under "loss"."""
        return {"loss": self.objective(self.denoiser, batch, draws)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HeadUpdate:
        self.denoiser._apply(fn)
        super()._apply(fn, recurse)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadUpdate:
        from copy import deepcopy

        return HeadUpdate(self.denoiser, deepcopy(self.objective, memo))


def fit_variance(
    source: Source,
    data: Dataset,
    *,
    kind: str = "ocm",
    name: str | None = None,
    out: str | Path | None = None,
    head: Literal["simple", "complex", "separate"] = "complex",
    basis: Literal["pixel", "dct"] = "pixel",
    block: int = 4,
    link: Literal["unit", "linear"] = "unit",
    derivative: Literal["auto", "vjp", "fd", "jvp"] = "auto",
    probes: int = 1,
    estimator: str = "residual",
    train: Train | None = None,
    callbacks: Sequence[Callable[[Row], None]] = (),
) -> Fitted:
    """Learns a variance for a model, and keeps it beside the model; the same call goes on where it was interrupted.

    Arguments:
        source: From `open_source`.
        data: What the model was trained on, in its own unit and shape.
        kind: "ocm", "sn", "npr" or "mixed" (ocm and npr), which train a head, or "analytic", which measures a table.
        name: What it will be loaded by; None is the kind, with "-dct" in that basis.
        out: The folder; None is the first of `source.variances`.
        head: See `heads.make_head`.
        basis: "pixel", or "dct" for cosine coefficients of blocks.
        block: Side of those blocks.
        link: See `covariance.Learned`.
        derivative: See `jacobian.DERIVATIVES`.
        probes: Sign vectors in a target.
        estimator: Of "analytic", see `measure_analytic`.
        train: Images, batch, learning rate and so on; None is `PLAN`. For "analytic", `images` is the number of examples, each
            of them taken at every level.
        callbacks: Called with each line of metrics.

    Raises:
        ValueError: For names that are unknown, data that do not fit, or a place that cannot be written.
    """
    name = name or (kind if basis == "pixel" else f"{kind}-dct")
    if name in UNTRAINED or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise ValueError(
            f"`name` {name!r} must be of letters, digits, - and _, and none of {', '.join(UNTRAINED)}: take another"
        )
    folder = Path(out).expanduser() if out is not None else source.variances[0]
    data = _suited(source, data)
    plan = PLAN if train is None else train
    cap = _cap(source, data)
    trunk = fingerprint(source.denoiser)
    if kind == "analytic":
        return _fit_analytic(source, data, folder, name, plan, cap, trunk, estimator)
    options: dict[str, Any] = {"head": head, "basis": basis, "block": block, "link": link, "cap": cap}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        made = make_variance(kind, source.denoiser, **options)
    section = {"kind": kind, **options, "derivative": derivative, "probes": probes, "trunk": trunk}
    return _fit_head(source, data, folder / name, plan, made, section, callbacks)


PLAN = Train(images=50_000, batch=32, lr=5e-3, warmup=1_000, clip=None, ema=5_000, precision="fp32", log_every=50)
"""How heads are trained unless told otherwise: minutes for a small network. Steps are small and many: an example costs
the same in any batch, and a head of ten thousand parameters profits from every step."""


# ---- Analytic-DPM


def _fit_head(
    source: Source,
    data: Dataset,
    path: Path,
    plan: Train,
    made: Learned,
    section: dict[str, Any],
    callbacks: Sequence[Callable[[Row], None]],
) -> Fitted:
    """Trains a head in the folder `path`, and keeps it beside that."""
    schedule = training_levels(source)
    drop: dict[str, tuple[float, int | float]] = {key: (0.1, value) for key, value in source.null.items() if key == "label"}
    objective = CovarianceMatching(
        made, schedule, section["kind"], derivative=section["derivative"], probes=section["probes"],
        balance=section["link"] == "unit", drop=drop if data.labels is not None else {},
    )  # fmt: skip
    with Accelerator().main_process_first():  # the others find the folder that the first one made
        run = _run(path, data, plan, section)
    summary = fit(run, data=data, callbacks=callbacks, update=HeadUpdate(source.denoiser, objective))
    if not summary.done:
        return Fitted(None, summary.message)
    checkpoint = run.read()
    assert checkpoint is not None
    prefix = "objective.source."
    made.load_state_dict({k.removeprefix(prefix): t for k, t in checkpoint.ema.items() if k.startswith(prefix)})
    facts = {
        **section, "data": data.name, "images": summary.images, "steps": summary.step, "seed": plan.seed,
        "batch": plan.batch, "lr": plan.lr, "levels": schedule_ends(schedule), "seconds": round(summary.seconds),
    }  # fmt: skip
    with Accelerator().main_process_first():
        file = save_variance(path.parent, path.name, made, facts)
    size = sum(p.numel() for p in made.parameters())
    what = f"{section['kind']} head of {size:,} parameters"
    return Fitted(file, f"{file}: {what}, {summary.images:,} images in {summary.seconds:.0f} s")


def measure_analytic(
    denoiser: Denoiser,
    batches: Callable[[], Any],
    lams: Tensor,
    *,
    estimator: str = "residual",
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""m of `Analytic` at each level, and its standard error: float64 (N,) each.

    "fisher" is the mean square of the predicted noise, as published. In high noise 1 - m is a tiny number, which any error of
    the network drowns: the variance then is 0, or huge. "residual" is 1 minus the mean squared error of the predicted noise:
    the same for an exact network, the best variance for the mean that an inexact one predicts, and accurate at every level.
    In "fisher" the known mean of the square of the true noise is a control variate, with the coefficient that the examples
    suggest, which removes most of the sampling error in high noise.

    Arguments:
        denoiser: Frozen; conditions free.
        batches: Called for each level, gives an iterable of `Batch`.
        lams: Finite levels (N,).
        estimator: "residual" or "fisher".
        seed: Key of the noise.
        progress: Called with the number of examples done.

    Raises:
        ValueError: For an unknown estimator.

    References:
        | Analytic-DPM (Bao et al., 2022), eq. 8 and algorithm 1, for "fisher"
        | https://arxiv.org/abs/2201.06503
        | Estimating the Optimal Covariance with Imperfect Mean in DPMs (Bao et al., 2022), for "residual"
        | https://arxiv.org/abs/2206.07309
    """
    if estimator not in ("residual", "fisher"):
        raise ValueError(f"`estimator` must be 'residual' or 'fisher' (got {estimator!r})")
    means, errors, done = [], [], 0
    for step, lam in enumerate(lams.tolist()):
        squares, controls = [], []
        for batch in batches():
            draws = Draws(seed, step, batch.index)
            noised = noised_by(denoiser.process, batch.x0, torch.full((len(batch.x0),), lam, dtype=torch.float64), draws)
            with torch.no_grad():
                bound = denoiser.bind(**batch.cond)
                eps = noise_of(bound(noised.x_t, lam), noised.x_t, lam, denoiser)
            if estimator == "residual":
                squares.append(1.0 - _mean_square(noised.eps - eps))
            else:
                squares.append(_mean_square(eps))
                controls.append(_mean_square(noised.eps) - 1.0)
            done += len(batch.x0)
            if progress is not None:
                progress(done)
        a = torch.cat(squares)
        if controls:
            b = torch.cat(controls)
            a = a - (a - a.mean()) @ (b - b.mean()) / (b - b.mean()).square().sum().clamp_min(1e-300) * b
        means.append(a.mean())
        errors.append(a.std() / math.sqrt(len(a)))
    return torch.stack(means), torch.stack(errors)


def _mean_square(x: Tensor) -> Tensor:
    """Of each example: float64 (B,) on the CPU."""
    return x.flatten(1).double().square().mean(1).cpu()


def _fit_analytic(
    source: Source, data: Dataset, folder: Path, name: str, plan: Train, cap: Any, trunk: str, estimator: str, count: int = 40
) -> Fitted:
    high, low = schedule_ends(training_levels(source))
    lams = torch.linspace(low, high, count, dtype=torch.float64)
    n = min(plan.images, len(data))
    order = Order(len(data), n, plan.seed).indices(0)

    def batches() -> Any:
        for index in order.split(plan.batch):
            x0, label = data.batch(index)
            yield Batch(x0.to(device), index, {} if label is None else {"label": label.to(device)})

    device = source.denoiser.device
    with signals() as stop, Progress(n * count, 0, name) as progress:

        def update(done: int) -> None:
            progress.update(done)
            if stop.is_set():
                raise _StoppedError

        try:
            m, error = measure_analytic(source.denoiser, batches, lams, estimator=estimator, seed=plan.seed, progress=update)
        except _StoppedError:
            return Fitted(None, f"{folder / name}: stopped{stop.reason}, nothing is kept of a table that is not complete")
    facts = {
        "kind": "analytic", "estimator": estimator, "cap": cap, "trunk": trunk, "data": data.name, "images": n,
        "levels": [high, low], "seed": plan.seed,
        "largest_error": float((error / (1.0 - m).abs().clamp_min(1e-12)).max()),
    }  # fmt: skip
    file = save_variance(folder, name, Analytic(lams, m, error), facts)
    return Fitted(file, f"{file}: variances of {count} levels from {n:,} images")


@borrows(fit_variance, "kind", "name", "out", "estimator", "train", "callbacks")
def section(
    *,
    cap: list[float] | float | None = None,
    trunk: str | None = None,
    images: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What a recipe's section `variance` may say beside the kind: what `fit_variance` is given for its run."""
    return {**options, "cap": cap, "trunk": trunk, "images": images, "batch": batch, "lr": lr}


class _StoppedError(Exception):
    pass


# ---- inside


def training_levels(source: Source) -> Schedule:
    """Levels to fit a head on: the entries of a pretrained model's table, else uniform in lam over those of a fine grid."""
    if source.table is not None:
        return source.table
    grid = source.grid(100, None)
    return Linear(float(grid[-2].clamp_max(20.0)), float(grid[0].clamp_min(-20.0)))


def schedule_ends(schedule: Schedule) -> list[float]:
    """Largest and smallest finite log-SNR."""
    with torch.no_grad():
        lam = schedule(torch.tensor([0.0, 1.0], dtype=torch.float64)).clamp(-20.0, 20.0)
    return [float(x) for x in lam]


def _run(path: Path, data: Dataset, plan: Train, section: dict[str, Any]) -> Run:
    """The folder with the checkpoints: a run like any other, whose recipe has a section `variance`."""
    facts = Data(name=data.name, shape=data.shape, classes=tuple(data.classes), count=len(data))
    recipe = Recipe(version=1, name=path.name, data=facts, train=plan, variance=section)  # type: ignore[call-arg]
    if not (path / "config.yaml").exists():
        return Run.create(path, recipe)
    run = Run.open(path)
    old, new = run.recipe.section("variance"), recipe.section("variance")
    if old != new or run.recipe.data != recipe.data or run.recipe.train.batch != plan.batch:
        raise ValueError(f"`name` {path.name!r} is being fitted with other options, data or weights in {path}: give another "
                         "name, or remove that folder")  # fmt: skip
    run = Run(path, recipe)
    run.write_config()
    return run


def _suited(source: Source, data: Dataset) -> Dataset:
    """The data as the model takes them: as latents for a latent model, without labels for a model without classes."""
    shape = source.denoiser.shape
    if shape is not None and data.shape != shape:
        raise ValueError(
            f"`data` {data.name} has examples of shape {data.shape}, the model draws {shape}: load them at that size"
        )
    if source.prompt is not None:
        raise ValueError("variances of models that take a text are not fitted: use --variance probed, which needs no fitting")
    if source.classes and data.labels is None:
        raise ValueError(f"`data` {data.name} has no labels, and the model has classes: give labelled data")
    return replace(data, labels=None, classes=()) if not source.classes and data.labels is not None else data


def _cap(source: Source, data: Dataset) -> list[float] | float | None:
    """The largest variance of x0: 1 for pictures in [-1, 1], a square of the range of each channel for latents."""
    if not isinstance(data.images, Tensor) or data.images.dtype == torch.uint8:
        return 1.0
    rows, _ = data.batch(torch.arange(min(len(data), 1000)))
    if rows.ndim != 4:
        return None
    spread = rows.amax(dim=(0, 2, 3)) - rows.amin(dim=(0, 2, 3))
    return [float(s) for s in (0.5 * spread).square()]
