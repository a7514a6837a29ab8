"""The loop that all training shares: order, batches, signals, metrics, checkpoints, resume. What a step does is added to it."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn

from ..data import Dataset, Order
from ..files import write_atomic, writing
from ..noise import Draws, Noise
from ..objective import Batch, Objective
from ..progress import Progress
from .feed import Batches, examples, moved, positions_of
from .runs import Checkpoint, Run
from .schema import Train
from .watch import Tally, signals
from .weights import packed, restore

__all__ = ["Row", "Session", "Summary", "accelerator", "autocast_of", "learning_rate"]

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
        path: Folder of the run.
    """

    step: int
    images: int
    loss: float
    seconds: float
    done: bool
    message: str
    path: Path = Path()


class Session(ABC):
    """One stretch of training of a run: from its latest checkpoint, or the start, to the end, a signal or a failure.

    A kind of training says what is saved and what a step does. Order of the data, noise, dropout and flips are functions of
    (seed, step, place in the global batch), so that a stretch goes on bit for bit where another ended.

    Arguments:
        run: The folder.
        data: What to train on.
        callbacks: Called with each line of metrics, on the main process.
        update: What is trained; all its tensors are saved.
        ema: Where averages of its floating tensors are kept: a module with the same names and shapes, or some of them.

    Attributes:
        step: Steps taken.
        seconds: Time spent so far, earlier sessions included.
    """

    objective: Objective | None = None
    """What prepares batches; None for nothing."""

    def __init__(self, run: Run, data: Dataset, callbacks: Sequence[Callable[[Row], None]], update: nn.Module, ema: nn.Module):
        self.run, self.data, self.callbacks = run, data, callbacks
        self.plan, self.accelerator = run.recipe.train, accelerator()
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.positions = positions_of(self.plan, self.accelerator.num_processes, self.accelerator.process_index)
        self.order = Order(len(data), self.plan.batch, self.plan.seed)
        self.update, self.ema = update.to(self.device), ema.to(self.device).eval().requires_grad_(False)
        own = self.update.state_dict()
        averages = {name: t for name, t in self.ema.state_dict().items() if t.is_floating_point()}
        self.averaged, self.latest = list(averages.values()), [own[name] for name in averages]
        self.step, self.seconds, self.loss = 0, 0.0, math.nan
        self.tally = Tally(self.device)

    @property
    def images(self) -> int:
        """Examples shown so far."""
        return self.step * self.plan.batch

    @property
    def steps(self) -> int:
        """Steps in all."""
        return math.ceil(self.plan.images / self.plan.batch)

    # -- what a kind of training adds

    @abstractmethod
    def advance(self, parts: list[Batch], stop: bool) -> None:
        """One step, counted in `self.tally`. Nothing in it waits for the device.

        Arguments:
            parts: The batch of this process, in its accumulated parts, on the device.
            stop: Whether this process was asked to stop, for the others to hear.
        """

    @abstractmethod
    def optimizer_state(self) -> dict[str, Any]:
        """Tensors and numbers that the optimisers need to go on."""

    @abstractmethod
    def load_optimizer(self, state: Mapping[str, Any]) -> None:
        """Takes up what `optimizer_state` gave; options that the recipe has changed since are the recipe's."""

    @abstractmethod
    def losses(self, batch: Batch, draws: Draws) -> Tensor:
        """Losses (B,) of examples, to say which are not finite."""

    def figures(self) -> Row:
        """Further entries of a line of metrics, such as learning rates."""
        return {}

    def words(self, row: Row) -> str:
        """A line of metrics for the progress bar."""
        return f"loss {row['loss']:.4f} {row['images_per_s']:.0f} images/s"

    def preview(self) -> None:  # noqa: B027  # there may be nothing to see
        """Something to look at; called every `preview_every` images and at the end."""

    def finished(self) -> str | None:
        """Why training is over before all images were shown; None while it goes on.

        Asked when training begins, where all processes must agree; later its reason reaches them through `advance`.
        """
        return None

    # -- the loop

    def resume(self) -> None:
        """Takes up the latest checkpoint, if there is one."""
        checkpoint = self.run.read()
        if checkpoint is None:
            return
        folder = self.run.latest() or self.run.path
        restore(self.update, checkpoint.model, folder / "model.safetensors")
        restore(self.ema, checkpoint.ema, folder / "ema.safetensors")
        self.load_optimizer(checkpoint.optimizer)
        self.step, self.seconds = checkpoint.step, checkpoint.seconds
        if self.is_main:
            self.run.rewind(self.step)

    def train(self) -> Summary:
        """Trains until all images are shown, a signal comes, or `finished` gives a reason."""
        title, begun = self.run.path.name, self.seconds
        with (
            signals() as self.stop,
            Progress(self.plan.images, self.images, title, show=self.is_main) as self.progress,
            Batches(self.data, self.order, self.run.recipe, self.positions, self.device, self.objective) as batches,
        ):
            started = self.read_at = saved_at = time.monotonic()
            self.read_step = saved = self.step
            over = self.finished() is not None
            while self.step < self.steps and not over:
                torch.manual_seed(_key(self.plan.seed, self.step, self.accelerator.process_index))  # dropout
                self.advance(batches.at(self.step), self.stop.is_set())
                now = time.monotonic()
                self.seconds = begun + now - started
                stopping = self._look()
                if self.crossed(self.plan.preview_every) or self.step == self.steps:
                    self.preview()
                if self.crossed(self.plan.save_every) or _overdue(self.plan, now - saved_at):
                    self.save()
                    saved, saved_at = self.step, time.monotonic()
                if stopping:
                    break
            if saved < self.step or self.run.latest() is None:
                self.save()
        self.accelerator.wait_for_everyone()
        return self._summary()

    def crossed(self, every: int | None) -> bool:
        """Whether this step passed a multiple of so many images."""
        return every is not None and self.images // every > (self.images - self.plan.batch) // every

    def average(self) -> None:
        """Moves the averages towards the latest weights; call it when `step` has been counted."""
        halflife = min(self.plan.ema, self.plan.ema_warmup * self.images)
        torch._foreach_lerp_(self.averaged, self.latest, 1.0 - 0.5 ** (self.plan.batch / halflife))

    def save(self) -> None:
        """Writes a checkpoint."""
        if not self.is_main:
            return
        model, ema = self.update.state_dict(), self.ema.state_dict()
        self.run.save(Checkpoint(self.step, model, ema, self.optimizer_state(), self.seconds))

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
        self.progress.update(self.images, self.words(self._log(means)) if means else None)
        return stopping or (alone and self.stop.is_set())

    def _log(self, means: Mapping[str, float]) -> Row:
        """Writes a line of metrics and starts counting afresh."""
        now = time.monotonic()
        row: Row = {
            "step": self.step,
            "images": self.images,
            **means,
            **self.figures(),
            "images_per_s": (self.step - self.read_step) * self.plan.batch / (now - self.read_at),
            "seconds": self.seconds,
        }
        self.loss, self.read_at, self.read_step = row["loss"], now, self.step
        self.tally.clear()
        self.log(row)
        return row

    def log(self, row: Row) -> None:
        """Writes a line of metrics and shows it to the callbacks."""
        if self.is_main:
            self.run.log(row)
            for callback in self.callbacks:
                callback(row)

    # -- what can go wrong

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
            raise ValueError(f"{line}; the last checkpoint is intact: {self.remedy}")
        self.progress.say(f"{line}; the step was skipped")

    remedy = "go on with a smaller train.lr, or train.on_nan=skip"
    """What to do about a loss that is not finite."""

    @torch.no_grad()
    def _not_finite(self, batch: Batch, positions: Tensor, step: int) -> Tensor:
        """Which examples of a batch have a loss that is not finite (all, if none can be blamed alone)."""
        batch = moved(batch, self.device)
        losses = self.losses(batch, Draws(self.plan.seed, step, positions, self.plan.batch)).cpu()
        bad = ~losses.isfinite()
        return bad if bad.any() else torch.ones_like(bad)

    def _summary(self) -> Summary:
        why, path = self.finished(), self.run.path
        done = self.step >= self.steps or why is not None
        count = f"{self.images:,} images in {self.seconds:.0f} s"
        if why is not None:
            message = f"{path}: {why}, after {count}"
        elif done:
            message = f"{path}: trained on {count}"
        else:
            message = (
                f"{path}: stopped{self.stop.reason} at step {self.step} of {self.steps} ({count}) and saved; "
                "the same command goes on from there"
            )
        return Summary(self.step, self.images, self.loss, self.seconds, done, message, path)


def learning_rate(plan: Train, step: int, steps: int) -> float:
    """Rises over the warm-up images, then stays or falls to zero along half a cosine."""
    rise = min(1.0, (step + 1) * plan.batch / plan.warmup) if plan.warmup else 1.0
    fall = 0.5 + 0.5 * math.cos(math.pi * step / steps) if plan.decay == "cosine" else 1.0
    return plan.lr * rise * fall


def autocast_of(plan: Train, device: torch.device) -> torch.dtype | None:
    """What networks run in beside float32: bfloat16 where the plan says so, or leaves it open and the device is fast at it."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if plan.precision == "bf16" or (plan.precision == "auto" and fast) else None


def accelerator() -> Accelerator:
    """Devices and processes, and nothing else: Accelerate's mixed precision would round targets and kernels too."""
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    return Accelerator(mixed_precision="no", kwargs_handlers=[ddp])


def _overdue(plan: Train, seconds: float) -> bool:
    return plan.save_minutes is not None and seconds > 60.0 * plan.save_minutes


def _key(*numbers: int) -> int:
    """A seed for torch's generator from several numbers."""
    seed, step, rank = numbers
    return int(Noise(seed, [rank]).uniform(step, "dropout") * 2**53)
