"""Tuning a model to a policy of few steps against data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..covariances.stored import fingerprint
from ..data import Dataset
from ..training.loop import Row, Summary
from ..training.runs import Run
from ..training.schema import Data, Recipe, Train
from ..training.source import Source
from .monitor import Check
from .reward import Reward
from .tune_loop import Tuning
from .tune_reward import Rewarded, RewardMeasure, told_only
from .tune_start import Start
from .yardstick import Yardstick

__all__ = ["PLAN", "Outcome", "plan_for", "tune_policy"]

PLAN = Train(
    images=25_600, batch=64, lr=1e-5, betas=(0.5, 0.99), warmup=640, clip=None, ema=6_400, ema_warmup=0.5, precision="fp32",
    log_every=10, preview_every=3_200, save_minutes=3.0,
)  # fmt: skip
"""How policies are tuned unless told otherwise: `lr` is that of the means' network, `preview_every` says how often samples are
drawn, looked at and measured."""

ADAPTER_LR = 3e-4
"""`lr` of adapters unless told otherwise: they begin at no change, and at `PLAN.lr` would stay near it."""


def plan_for(start: Start) -> Train:
    """How a policy is tuned unless told otherwise: `PLAN`, with `ADAPTER_LR` where only adapters are trained."""
    return PLAN.model_copy(update={"lr": ADAPTER_LR}) if start.adapters else PLAN


@dataclass(frozen=True)
class Outcome:
    """How tuning ended.

    Attributes:
        file: The best policy so far, for `load_policy`; None if none was measured.
        distance: Its distance to held-out data.
        summary: Of the loop.
        checks: Of the last measurement, see `monitor`.
        message: One line for people.
    """

    file: Path | None
    distance: float
    summary: Summary
    checks: list[Check]
    message: str


def tune_policy(
    source: Source,
    data: Dataset,
    held: Dataset,
    *,
    name: str | None = None,
    out: str | Path | None = None,
    start: Start | None = None,
    train: Train | None = None,
    distance: str = "auto",
    n: int = 1000,
    reward: Reward | None = None,
    reward_name: str | None = None,
    callbacks: Sequence[Callable[[Row], None]] = (),
) -> Outcome:
    """Tunes a policy of few steps from a model, and keeps the best beside the model; the same call goes on where it stopped.

    Arguments:
        source: From `open_source`.
        data: What to imitate, in the model's own unit and shape.
        held: Data that are not trained on: the policy that comes nearest is kept.
        name: What it will be loaded by; None is the method and the number of steps, such as "dxmi-4".
        out: The folder; None is the first of `source.policies`.
        start: What the policy starts from and how it learns; None is `Start()`.
        train: Images, batch, learning rate and so on; None is `plan_for(start)`.
        distance: What is measured, see `yardstick.KINDS`.
        n: Samples of a measurement.
        reward: reward(x, **cond) -> (B,) of samples, high where they are wanted, for method "dxdp" and no other; then the
            policy of the least tau x nats - reward is kept, see `reward.RewardTuning`.
        reward_name: What it is called, for people and in the recipe; None is its own name.
        callbacks: Called with each line of metrics.

    Raises:
        ValueError: For data that do not fit, choices that make no sense, figures that are not finite, or a place that cannot
            be written.
    """
    start = start or Start()
    plan = plan_for(start) if train is None else train
    if (reward is not None) != (start.method == "dxdp"):
        raise ValueError(f"`reward` and method 'dxdp' belong together (got method {start.method!r} "
                         f"{'without' if reward is None else 'with'} a reward): give both, or neither")  # fmt: skip
    name = _checked(name or f"{start.method}-{start.T}")
    folder = Path(out).expanduser() if out is not None else source.policies[0]
    _check_fit(source, data)
    if not source.classes:
        data = replace(data, labels=None, classes=())
    rng = torch.get_rng_state()
    try:
        torch.manual_seed(plan.seed)
        session = _session(folder / name, source, data, held, plan, start, distance, n, reward, reward_name, callbacks)
        summary = session.train()
        session.draw_curves()
    finally:
        torch.set_rng_state(rng)
    best = session.best
    file = folder / f"{name}.safetensors"
    message = summary.message
    if best is not None:
        message += f"; best {session.yardstick.about}: {best['distance']:.4g} at step {best['step']}, data themselves " \
                   f"{session.yardstick.floor.value:.4g}, before tuning {session.first:.4g}: {file}"  # fmt: skip
    return Outcome(file if file.is_file() else None, best["distance"] if best else math.nan, summary, session.checks, message)


def _session(
    path: Path,
    source: Source,
    data: Dataset,
    held: Dataset,
    plan: Train,
    start: Start,
    distance: str,
    n: int,
    reward: Reward | None,
    reward_name: str | None,
    callbacks: Sequence[Callable[[Row], None]],
) -> Tuning:
    """The loop, by what its policy is chosen by."""
    if reward is None:
        run = _run(path, source, data, plan, start)
        return Tuning(run, source, data, Yardstick(data, held, distance, n, plan.seed), start, callbacks)
    called = str(reward_name or getattr(reward, "__name__", type(reward).__name__))
    run, told = _run(path, source, data, plan, start, called), told_only(reward)
    measure: Any = RewardMeasure(told, data, n, called, source.denoiser.device)
    return Rewarded(run, source, data, measure, start, callbacks, told)


def _checked(name: str) -> str:
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
        raise ValueError(f"`name` {name!r} must be of letters, digits, '-', '_' and '.': take another")
    return name


def _check_fit(source: Source, data: Dataset) -> None:
    shape = source.denoiser.shape
    if source.prompt is not None:
        raise ValueError("policies of models that take a text are not tuned: give an unconditional or a class-conditional one")
    if shape is not None and data.shape != shape:
        raise ValueError(
            f"`data` {data.name} has examples of shape {data.shape}, the model draws {shape}: load them at that size"
        )
    if source.classes and data.labels is None:
        raise ValueError(f"`data` {data.name} has no labels, and the model has classes: give labelled data")


def _run(path: Path, source: Source, data: Dataset, plan: Train, start: Start, reward: str | None = None) -> Run:
    """The folder with the checkpoints: a run like any other, whose recipe has a section `tune`."""
    facts = Data(name=data.name, shape=data.shape, classes=tuple(data.classes), count=len(data), flip=start.flip)
    section = {"kind": start.method, **start.to_dict(), "trunk": fingerprint(source.denoiser)}
    section |= {} if reward is None else {"reward": reward}
    recipe = Recipe(version=1, name=path.name, data=facts, train=plan, tune=section)  # type: ignore[call-arg]
    if not (path / "config.yaml").exists():
        return Run.create(path, recipe)
    run = Run.open(path)
    same = run.recipe.section("tune") == recipe.section("tune") and run.recipe.data == recipe.data
    if not same or run.recipe.train.batch != plan.batch or run.recipe.train.seed != plan.seed:
        raise ValueError(f"`name` {path.name!r} is being tuned with other options, data or weights in {path}: give another "
                         "--name, or remove that folder")  # fmt: skip
    run = Run(path, recipe)
    run.write_config()
    return run
