"""Training of recipes and runs, resumed exactly; `loop` is what repeats."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .data import Dataset
from .denoiser import Preconditioned
from .files import writing
from .noise import Draws
from .objective import Batch
from .sampling import generate
from .training.config import Recipe, Train, build_sampler, load_data, load_recipe, resolve, with_overrides
from .training.loop import Row, Session, Summary, accelerator, autocast_of, learning_rate
from .training.runs import Run, build_update

__all__ = ["Summary", "fit", "train"]


def train(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    callbacks: Sequence[Callable[[Row], None]] = (),
) -> Summary:
    """Trains a recipe into a run, going on where the run was left if it exists.

    Arguments:
        recipe: Name, .yaml file or data, see `config.load_recipe`.
        overrides: Changes such as "train.images=10000"; on an existing run they may not change what the weights mean.
        out: The run's folder; None is runs/NAME.
        callbacks: Called with each line of metrics.

    Raises:
        ValueError: For a recipe or data that make no sense, a run of another recipe, a loss that is not finite, a full disk.
    """
    processes = accelerator()
    wanted = load_recipe(recipe, overrides)
    path = Path(out).expanduser() if out is not None else Path("runs") / wanted.name
    with processes.main_process_first():  # the others find the run that the first one made
        if (path / "config.yaml").exists():
            run = _reopen(path, wanted, overrides)
            data = load_data(run.recipe)
        else:
            data = load_data(wanted)
            run = Run.create(path, resolve(wanted, data))
    return fit(run, data=data, callbacks=callbacks)


def fit(
    run: Run,
    *,
    data: Dataset | None = None,
    callbacks: Sequence[Callable[[Row], None]] = (),
    update: Any = None,
) -> Summary:
    """Trains a run from its latest checkpoint, or from the start, until its recipe's images are shown.

    Deterministic on a CPU: data order, noise, dropped labels, flips and dropout are functions of (seed, step, place in the
    global batch), so an interrupted run goes on bit for bit. SIGINT and SIGTERM finish the step, save and return.

    Arguments:
        run: Made by `Run.create` or `Run.open`.
        data: What to train on; None loads what the recipe names.
        callbacks: Called with each line of metrics, on the main process.
        update: What a step differentiates, freshly initialised; None builds what the recipe says.

    Raises:
        ValueError: If the data do not fit the recipe, the batch does not divide among the processes, the loss is not finite
            (with `on_nan: stop`), a checkpoint is damaged, or the disk is full.
    """
    data = load_data(run.recipe) if data is None else data
    resolve(run.recipe, data)  # refuses data of another shape
    rng = torch.get_rng_state()
    try:
        return _Training(run, data, callbacks, update).train()
    finally:
        torch.set_rng_state(rng)


class _Training(Session):
    """One call of `fit`: gradient steps on an objective.

    `update` maps (batch, draws) to losses (B,) under "loss" and to other numbers worth averaging.
    """

    update: Any
    ema: Any

    def __init__(self, run: Run, data: Dataset, callbacks: Sequence[Callable[[Row], None]], update: Any = None):
        update = build_update(run.recipe, data) if update is None else update
        super().__init__(run, data, callbacks, update, deepcopy(update))
        self._set_precision()
        self.objective = self.update.objective
        self.parameters = [p for p in self.update.parameters() if p.requires_grad]
        self.optimizer = _optimizer(self.plan, self.parameters)
        self.resume()
        if self.plan.compile and isinstance(self.update.denoiser, Preconditioned):
            self.update.denoiser.net.compile()
        self.wrapped = self.accelerator.prepare(self.update)

    def _set_precision(self) -> None:
        for update in (self.update, self.ema):
            if isinstance(update.denoiser, Preconditioned):
                update.denoiser.autocast = autocast_of(self.plan, self.device)

    def optimizer_state(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_optimizer(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(dict(state))
        for group in self.optimizer.param_groups:  # the recipe may have been changed since
            group.update(betas=self.plan.betas, weight_decay=self.plan.weight_decay)

    def advance(self, parts: list[Batch], stop: bool) -> None:
        plan, share = self.plan, sum(map(len, self.positions))
        sums: dict[str, Tensor] = {}
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(plan, self.step, self.steps)
        for positions, batch in zip(self.positions, parts, strict=True):
            last = positions is self.positions[-1]
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                values = self.wrapped(batch, Draws(plan.seed, self.step, positions, plan.batch))
                part = values["loss"].sum() / share  # processes average their gradients: the mean over the global batch
                part.backward()
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value.detach().sum() / share
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, plan.clip or math.inf)
        loss = sums.pop("loss")
        shared = torch.stack([loss, torch.full_like(loss, float(stop)), *sums.values()])
        if self.accelerator.num_processes > 1:
            shared = self.accelerator.reduce(shared, "mean")
        bad = ~(shared[0].isfinite() & norm.isfinite())
        self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # fused Adam then leaves everything alone
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.average()
        self.tally.add(self.step, shared[0], norm, bad, shared[1], dict(zip(sums, shared[2:], strict=True)))

    def losses(self, batch: Batch, draws: Draws) -> Tensor:
        return self.update(batch, draws)["loss"]

    def figures(self) -> Row:
        return {"lr": self.optimizer.param_groups[0]["lr"]}

    def words(self, row: Row) -> str:
        plain = f" (plain {row['plain_loss']:.4f})" if "plain_loss" in row else ""  # what stable targets took away is in it
        return f"loss {row['loss']:.4f}{plain} {row['images_per_s']:.0f} images/s"

    def preview(self) -> None:
        """A grid of samples of the averaged weights, from noise that is the same each time."""
        picture = len(self.data.shape) == 3 and self.data.shape[0] in (1, 3)  # latents are none
        if not (self.is_main and picture and self.update.previews):
            return
        from .reports.plots import save_grid

        recipe, classes, n = self.run.recipe, len(self.run.recipe.data.classes), self.plan.previews
        label = {"label": torch.arange(n, device=self.device) % classes} if classes else None
        schedule = getattr(self.ema.objective, "schedule", None)
        transition, grid = build_sampler(recipe, schedule=schedule)
        try:
            x = generate(self.ema.denoiser, n, grid=grid, transition=transition, cond=label, seed=self.plan.seed)
        except ValueError as error:  # such as samples that are not finite yet: no reason to end training
            self.progress.say(f"no preview at step {self.step}: {error}")
            return
        file = self.run.path / "samples" / f"step-{self.step:09d}.png"
        with writing(file):
            save_grid(x, file, columns=classes if 2 <= classes <= 16 else None)


def _optimizer(plan: Train, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """Adam, fused: faster, and it can skip a step on the device without telling the host."""
    kind = torch.optim.AdamW if plan.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=plan.lr, betas=plan.betas, weight_decay=plan.weight_decay, fused=True)


def _reopen(path: Path, wanted: Recipe, overrides: Sequence[str]) -> Run:
    """The run that is there, with the changes that were asked for."""
    run = Run.open(path)
    if run.recipe.name != wanted.name:
        raise ValueError(f"`out` {path} holds a run of {run.recipe.name!r}, not of {wanted.name!r}: name another folder")
    changed = with_overrides(run.recipe, overrides)
    old, new = run.recipe.model_dump(exclude={"train", "sample"}), changed.model_dump(exclude={"train", "sample"})
    for section in new:
        if new[section] != old.get(section):
            raise ValueError(f"`{section}` cannot change in the run {path}: leave it as it was, or train into another folder")
    if changed.train.batch != run.recipe.train.batch and run.latest() is not None:
        counted = f"whose steps count batches of {run.recipe.train.batch}"
        raise ValueError(f"`train.batch` cannot change in the run {path}, {counted}: leave it, or train into another folder")
    if changed != run.recipe:
        run = Run(path, changed)
        if Accelerator().is_main_process:
            run.write_config()
    return run
