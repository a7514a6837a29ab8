"""The training loop: Accelerate for devices, keyed randomness for exact resume, checkpoints that survive anything."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor

from .config import Recipe, Train, build_sampler, load_data, load_recipe, resolve, with_overrides
from .data import Dataset, Order
from .denoiser import Preconditioned
from .feed import Batches, examples, moved, positions_of
from .files import write_atomic, writing
from .noise import Draws, Noise
from .objective import Batch
from .progress import Progress
from .runs import Checkpoint, Run, build_update, packed, restore
from .sampling import generate
from .watch import Tally, signals

__all__ = ["Summary", "fit", "train"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """How training ended.

    Attributes:
        step: Optimiser steps taken in all.
        images: Examples shown in all.
        loss: As the last line of metrics has it; NaN if this session wrote none.
        seconds: Time spent training, earlier sessions included.
        done: Whether all images of the recipe were shown; False after Ctrl-C.
        message: One line for people.
    """

    step: int
    images: int
    loss: float
    seconds: float
    done: bool
    message: str


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
    accelerator = _accelerator()
    wanted = load_recipe(recipe, overrides)
    path = Path(out).expanduser() if out is not None else Path("runs") / wanted.name
    with accelerator.main_process_first():  # the others find the run that the first one made
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
        return _Session(run, data, callbacks, update).train()
    finally:
        torch.set_rng_state(rng)


class _Session:
    """One call of `fit`."""

    def __init__(self, run: Run, data: Dataset, callbacks: Sequence[Callable[[Row], None]], update: Any = None):
        self.run, self.data, self.callbacks = run, data, callbacks
        self.plan, self.accelerator = run.recipe.train, _accelerator()
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.positions = positions_of(self.plan, self.accelerator.num_processes, self.accelerator.process_index)
        self.order = Order(len(data), self.plan.batch, self.plan.seed)
        self.update = (build_update(run.recipe, data) if update is None else update).to(self.device)
        self.ema = deepcopy(self.update).eval().requires_grad_(False)
        self._set_precision()
        self.parameters = [p for p in self.update.parameters() if p.requires_grad]
        self.averaged = [t for t in self.ema.state_dict().values() if t.is_floating_point()]
        self.latest = [t for t in self.update.state_dict().values() if t.is_floating_point()]
        self.optimizer = _optimizer(self.plan, self.parameters)
        self.step, self.seconds, self.loss = 0, 0.0, math.nan
        self._resume()
        if self.plan.compile and isinstance(self.update.denoiser, Preconditioned):
            self.update.denoiser.net.compile()
        self.wrapped = self.accelerator.prepare(self.update)
        self.tally = Tally(self.device)

    @property
    def images(self) -> int:
        """Examples shown so far."""
        return self.step * self.plan.batch

    @property
    def steps(self) -> int:
        """Steps in all."""
        return math.ceil(self.plan.images / self.plan.batch)

    def _set_precision(self) -> None:
        wanted = self.plan.precision
        if wanted == "auto":
            wanted = (
                "bf16" if self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
            )
        for update in (self.update, self.ema):
            if isinstance(update.denoiser, Preconditioned):
                update.denoiser.autocast = torch.bfloat16 if wanted == "bf16" else None

    def _resume(self) -> None:
        checkpoint = self.run.read()
        if checkpoint is None:
            return
        folder = self.run.latest() or self.run.path
        restore(self.update, checkpoint.model, folder / "model.safetensors")
        restore(self.ema, checkpoint.ema, folder / "ema.safetensors")
        self.optimizer.load_state_dict(checkpoint.optimizer)
        for group in self.optimizer.param_groups:  # the recipe may have been changed since
            group.update(betas=self.plan.betas, weight_decay=self.plan.weight_decay)
        self.step, self.seconds = checkpoint.step, checkpoint.seconds
        if self.is_main:
            self.run.rewind(self.step)

    # -- the loop

    def train(self) -> Summary:
        title, begun = self.run.path.name, self.seconds
        with (
            signals() as self.stop,
            Progress(self.plan.images, self.images, title, show=self.is_main) as self.progress,
            Batches(self.data, self.order, self.run.recipe, self.positions, self.device, self.update.objective) as batches,
        ):
            started = self.read_at = saved_at = time.monotonic()
            self.read_step = saved = self.step
            while self.step < self.steps:
                self._advance(batches, self.stop.is_set())
                now = time.monotonic()
                self.seconds = begun + now - started
                stopping = self._look()
                if self._crossed(self.plan.preview_every) or self.step == self.steps:
                    self._preview()
                if self._crossed(self.plan.save_every) or _overdue(self.plan, now - saved_at):
                    self._save()
                    saved, saved_at = self.step, time.monotonic()
                if stopping:
                    break
            if saved < self.step or self.run.latest() is None:
                self._save()
        self.accelerator.wait_for_everyone()
        return self._summary()

    def _advance(self, batches: Batches, stop: bool) -> None:
        """One optimiser step. Nothing here waits for the device."""
        plan, share = self.plan, sum(map(len, self.positions))
        sums: dict[str, Tensor] = {}
        torch.manual_seed(_key(plan.seed, self.step, self.accelerator.process_index))  # dropout
        for group in self.optimizer.param_groups:
            group["lr"] = _learning_rate(plan, self.step, self.steps)
        for positions, batch in zip(self.positions, batches.at(self.step), strict=True):
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
        halflife = min(plan.ema, plan.ema_warmup * self.images)
        torch._foreach_lerp_(self.averaged, self.latest, 1.0 - 0.5 ** (plan.batch / halflife))
        self.tally.add(self.step, shared[0], norm, bad, shared[1], dict(zip(sums, shared[2:], strict=True)))

    def _look(self) -> bool:
        """Reads what the device has counted, when that is due or free; returns whether to stop."""
        due = self.step % self.plan.log_every == 0 or self.step == self.steps
        alone = self.accelerator.num_processes == 1
        if not due and self.device.type != "cpu":
            return alone and self.stop.is_set()
        if first_bad := self.tally.first_bad():
            self._report_bad(first_bad)
        stopping = self.tally.stopping()
        means = self.tally.means(self.step - self.read_step) if due else {}
        self.progress.update(self.images, self._log(means) if means else None)
        return stopping or (alone and self.stop.is_set())

    def _log(self, means: Mapping[str, float]) -> Row:
        """Writes a line of metrics and starts counting afresh."""
        now = time.monotonic()
        row: Row = {
            "step": self.step,
            "images": self.images,
            **means,
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_s": (self.step - self.read_step) * self.plan.batch / (now - self.read_at),
            "seconds": self.seconds,
        }
        self.loss, self.read_at, self.read_step = row["loss"], now, self.step
        self.tally.clear()
        if self.is_main:
            self.run.log(row)
            for callback in self.callbacks:
                callback(row)
        return row

    def _crossed(self, every: int | None) -> bool:
        """Whether this step passed a multiple of so many images."""
        return every is not None and self.images // every > (self.images - self.plan.batch) // every

    # -- what happens now and then

    def _save(self) -> None:
        if not self.is_main:
            return
        model, ema = self.update.state_dict(), self.ema.state_dict()
        self.run.save(Checkpoint(self.step, model, ema, self.optimizer.state_dict(), self.seconds))

    def _preview(self) -> None:
        """A grid of samples of the averaged weights, from noise that is the same each time."""
        picture = len(self.data.shape) == 3 and self.data.shape[0] in (1, 3)  # latents are none
        if not (self.is_main and picture and self.update.previews):
            return
        from .plots import save_grid

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

    def _report_bad(self, step: int) -> None:
        """Names and saves the batch of a step whose loss was not finite; raises if training is to stop."""
        index = Order(len(self.data), self.plan.batch, self.plan.seed).indices(step - 1)  # the other one reads ahead
        positions = torch.arange(self.plan.batch)
        batch = examples(self.data, self.run.recipe, index, positions, step - 1)
        guilty = index[self._not_finite(batch, positions, step - 1)]
        names = f"{', '.join(map(str, guilty[:8].tolist()))}{', ...' if len(guilty) > 8 else ''}"
        file = self.run.path / "state" / f"bad-batch-{step:09d}.safetensors"
        if self.is_main:
            with writing(file):
                write_atomic(file, packed({"x0": batch.x0, "index": index, **batch.cond}))
        line = f"the loss is not finite at step {step}, for data indices {names}: the batch is saved in {file}"
        if self.plan.on_nan == "stop":
            raise ValueError(f"{line}; the last checkpoint is intact: go on with a smaller train.lr, or train.on_nan=skip")
        self.progress.say(f"{line}; the step was skipped")

    @torch.no_grad()
    def _not_finite(self, batch: Batch, positions: Tensor, step: int) -> Tensor:
        """Which examples of a batch have a loss that is not finite (all, if none can be blamed alone)."""
        batch = moved(batch, self.device)
        losses = self.update(batch, Draws(self.plan.seed, step, positions, self.plan.batch))["loss"].cpu()
        bad = ~losses.isfinite()
        return bad if bad.any() else torch.ones_like(bad)

    def _summary(self) -> Summary:
        done, path = self.step >= self.steps, self.run.path
        count = f"{self.images:,} images in {self.seconds:.0f} s"
        message = f"{path}: trained on {count}" if done else (
            f"{path}: stopped{self.stop.reason} at step {self.step} of {self.steps} ({count}) and saved; "
            "the same command goes on from there"
        )  # fmt: skip
        return Summary(self.step, self.images, self.loss, self.seconds, done, message)


def _optimizer(plan: Train, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """Adam, fused: faster, and it can skip a step on the device without telling the host."""
    kind = torch.optim.AdamW if plan.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=plan.lr, betas=plan.betas, weight_decay=plan.weight_decay, fused=True)


def _learning_rate(plan: Train, step: int, steps: int) -> float:
    """Rises over the warm-up images, then stays or falls to zero along half a cosine."""
    rise = min(1.0, (step + 1) * plan.batch / plan.warmup) if plan.warmup else 1.0
    fall = 0.5 + 0.5 * math.cos(math.pi * step / steps) if plan.decay == "cosine" else 1.0
    return plan.lr * rise * fall


def _overdue(plan: Train, seconds: float) -> bool:
    return plan.save_minutes is not None and seconds > 60.0 * plan.save_minutes


def _key(*numbers: int) -> int:
    """A seed for torch's generator from several numbers."""
    seed, step, rank = numbers
    return int(Noise(seed, [rank]).uniform(step, "dropout") * 2**53)


def _accelerator() -> Accelerator:
    # Accelerate only brings devices and processes: its mixed precision would round targets and kernels too
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    return Accelerator(mixed_precision="no", kwargs_handlers=[ddp])


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
