"""Stretches of tuning: iterations of a method, measurements of the averaged policy, the best kept, and the watch over it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ..covariances.stored import fingerprint
from ..data import Dataset
from ..denoiser import Preconditioned
from ..files import writing
from ..imitation import MaxEntIRL
from ..metrics import Result
from ..noise import Draws
from ..objective import Batch
from ..sampling import generate
from ..training.loop import Row, Session, autocast_of, learning_rate
from ..training.runs import Run
from ..training.source import Source
from ..training.watch import Tally
from .monitor import Check, Reading, Spread, diagnose, drift, spread
from .policy import Policy
from .stored import save_policy
from .tune_start import Start, make_policy, make_update
from .yardstick import Yardstick

__all__ = ["Tuning", "draw", "reading_of"]

PATIENCE = 2
"""Measurements in a row that fail before tuning is stopped."""


class Tuning(Session):
    """One stretch of tuning: iterations of a method, and now and then a measurement of the averaged policy.

    Arguments:
        run: The folder, whose recipe has a section `tune`.
        source: The model.
        data: What to imitate.
        yardstick: What the checkpoint is chosen by.
        start: What the policy starts from.
        callbacks: Called with each line of metrics.
        reward: For methods that tune to one.
    """

    update: MaxEntIRL
    remedy = "the best policy is too: go on with smaller learning rates (--lr, --value-lr) under another --name"

    def __init__(
        self,
        run: Run,
        source: Source,
        data: Dataset,
        yardstick: Yardstick,
        start: Start,
        callbacks: Sequence[Callable[[Row], None]] = (),
        reward: Any = None,
    ):
        self.yardstick, self.start, self.trunk = yardstick, start, fingerprint(source.denoiser)
        policy = make_policy(source, start, data, run.recipe.train.seed)
        dtype = autocast_of(run.recipe.train, policy.denoiser.device)
        if dtype is not None and isinstance(policy.denoiser, Preconditioned):
            policy.denoiser.autocast = dtype
        update = make_update(policy, start, run.recipe.train, data, reward)
        ema = nn.ModuleDict({"policy": deepcopy(policy), "value": deepcopy(update.value)})
        super().__init__(run, data, callbacks, update, ema)
        line = self.plan.batch * self.plan.log_every
        self.head_start = math.ceil(start.head_start / line) * line  # a line of metrics is of one kind of iteration
        self.checks: list[Check] = []
        self.std_start, self.data_spread = policy.rhos.tolist(), spread(yardstick.real)
        self.began = self.draw() if self.is_main else torch.zeros(0)
        self.first = self.measure(self.began).value if self.is_main else math.nan
        self.resume()
        self.accelerator.wait_for_everyone()  # the main process has dropped what will be written again
        self.measured: list[Row] = [row for row in run.metrics() if "distance" in row]

    # -- what the loop asks for

    def optimizer_state(self) -> dict[str, Any]:
        return {name: optimizer.state_dict() for name, optimizer in self.update.optimizers.items()}

    def load_optimizer(self, state: Mapping[str, Any]) -> None:
        for name, optimizer in self.update.optimizers.items():
            rates = [group["initial_lr"] for group in optimizer.param_groups]  # the recipe may have been changed since
            optimizer.load_state_dict(state[name])
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["initial_lr"] = rate

    def advance(self, parts: list[Batch], stop: bool) -> None:
        (batch,), (positions,) = parts, self.positions
        self._set_rates()
        self.update.iterations = self.step
        draws = Draws(self.plan.seed, self.step, positions, self.plan.batch)
        average = self._averaged if self.accelerator.num_processes > 1 else None
        trouble = ""
        try:
            if self.images < self.head_start:
                _, told = self.update.critic(batch.x0, batch.cond, draws, average)
            else:
                told = self.update.iterate(batch.x0, batch.cond, draws, average)
        except ValueError as error:
            if "is not finite" not in str(error):  # such numbers are bad on all processes together
                raise
            told, trouble = {}, str(error)
        self.step += 1
        if trouble:
            self.remedy = f"{trouble}; {type(self).remedy}"
        else:
            self.average()
        self._count(told, stop, bool(trouble))

    def losses(self, batch: Batch, draws: Draws) -> Tensor:
        return self.update.energy_of(batch.x0, **batch.cond)

    def figures(self) -> Row:
        self.update.check()
        return {
            **{f"lr_{name}": optimizer.param_groups[0]["lr"] for name, optimizer in self.update.optimizers.items()},
            "rho": [round(rho, 6) for rho in self.update.policy.rhos.tolist()],
        }

    def words(self, row: Row) -> str:
        told = f"energy {row['e_data']:.3f} data {row['e_policy']:.3f} samples, " if "e_data" in row else ""
        best, title = self.best, self.yardstick.title
        known = (
            f"{title} {best['distance']:.3g} (n={self.yardstick.n}, data {self.yardstick.floor.value:.3g}), " if best else ""
        )
        return f"{told}{known}{row['images_per_s']:.0f} images/s"

    def finished(self) -> str | None:
        stops = [row["stopped"] for row in self.measured if "stopped" in row]
        return stops[-1] if stops else None

    # -- an iteration's surroundings

    def _set_rates(self) -> None:
        rate = learning_rate(self.plan, self.step, self.steps) / self.plan.lr
        for name, optimizer in self.update.optimizers.items():
            share = rate if name == "policy" else max(rate, self.start.value_decay) if self.plan.decay == "cosine" else rate
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * share

    def _averaged(self, tensors: Sequence[Tensor]) -> None:
        """Averages tensors in place over the processes, in one exchange."""
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        flat = self.accelerator.reduce(flat, "mean")
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.reshape(tensor.shape))

    def _count(self, told: Mapping[str, Tensor], stop: bool, bad: bool) -> None:
        """Counts an iteration: scalars by their names, those of each step by name and number."""
        scalars: dict[str, Tensor] = {}
        for name, value in told.items():
            if value.ndim == 0:
                scalars[name] = value
            elif name not in ("rho", "s2"):
                scalars |= {f"{name}_{k}": part for k, part in enumerate(value)}
        if not bad and "policy_loss" in scalars and "policy_loss" not in self.tally.names:
            self.tally = Tally(self.device)  # the head start is over
        scalars = {name: scalars.get(name, self.tally.sums.new_zeros(())) for name in self.tally.names or sorted(scalars)}
        asked = stop or self.finished() is not None
        values = torch.stack([self.tally.sums.new_tensor(float(asked)), *(v.to(self.tally.sums) for v in scalars.values())])
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values, "mean")
        shared = dict(zip(scalars, values[1:], strict=True))
        zero = values.new_zeros(())
        loss, norm = shared.get("energy_loss", shared.get("policy_loss", zero)), shared.get("policy_norm", zero)
        self.tally.add(self.step, loss, norm, ~values.isfinite().all() | bad, values[0], shared)

    # -- measurements

    def measure(self, x: Tensor) -> Result:
        """What the checkpoint is chosen by, of samples x (n, *): lower is better."""
        return self.yardstick(x)

    @torch.no_grad()
    def draw(self) -> Tensor:
        """Samples of the averaged policy from noise that is the same each time, classes in turn: (n, *) on the CPU."""
        policy: Policy = self.ema["policy"]  # type: ignore[index]
        return draw(policy, self.yardstick.n, len(self.data.classes) if self.data.labels is not None else 0)

    def preview(self) -> None:
        """Draws, measures, looks and keeps the best; a policy that fails twice in a row is stopped."""
        if not self.is_main:
            return
        try:
            x = self.draw()
        except ValueError as error:
            raise ValueError(f"{error}; the last checkpoint is intact: {self.remedy}") from None
        result = self.measure(x)
        row: Row = {
            "step": self.step, "images": self.images, "distance": result.value, "error": result.uncertainty,
            "n": self.yardstick.n, "floor": self.yardstick.floor.value, "drift": drift(x, self.began),
            "spread": spread(x).__dict__, "data_spread": self.data_spread.__dict__, "details": result.details,
            "seconds": self.seconds,
        }  # fmt: skip
        known = [r["distance"] for r in self.measured]
        self.measured.append(row)
        self.checks = diagnose(self._reading(row))
        row["checks"] = [[check.name, check.status, check.value, check.text] for check in self.checks]
        failing = [check for check in self.checks if check.status == "fail"]
        before = self.measured[1:][-PATIENCE:-1]  # the first of all sees a value that has just begun
        again = len(before) == PATIENCE - 1 and all(any(c[1] == "fail" for c in r["checks"]) for r in before)
        if failing and again and self.step < self.steps:
            row["stopped"] = f"stopped by the monitor at step {self.step} ({failing[0]}), the best policy is kept"
        if result.value < min(known, default=math.inf):
            self._keep(row)
        self._tell(result.figure(), min([*known, result.value]))
        self.log(row)
        self._picture(x)

    @property
    def best(self) -> Row | None:
        """The measurement of the best policy so far."""
        return min(self.measured, key=lambda row: row["distance"], default=None)

    def _reading(self, row: Row) -> Reading:
        """The figures of the lines of metrics since the measurement before."""
        since = self.measured[-2]["step"] if len(self.measured) > 1 else 0
        rows = [r for r in self.run.metrics() if "loss" in r and since < r["step"] <= self.step]
        rows = rows[len(rows) // 2 :]  # how it is now, not how it came there
        return reading_of(rows, row, self.start, self.std_start, min(r["distance"] for r in self.measured), self.update)

    def _keep(self, row: Row) -> None:
        policy: Policy = self.ema["policy"]  # type: ignore[index]
        facts = {
            "method": self.start.method, "data": self.data.name, "step": self.step, "images": self.images,
            "seconds": round(self.seconds), "seed": self.plan.seed, "distance": row["distance"], "error": row["error"],
            "measured": self.yardstick.about, "floor": row["floor"], "before": self.first, "start": self.start.to_dict(),
        }  # fmt: skip
        s2 = self.update.auxiliary.s2
        save_policy(self.run.path.parent, self.run.path.name, policy, trunk=self.trunk, s2=s2, facts=facts)

    def _tell(self, figure: str, best: float) -> None:
        floor, n, title = self.yardstick.floor.value, self.yardstick.n, self.yardstick.title
        self.progress.say(f"step {self.step}: {title} {figure} (n={n}), best {best:.4g}, before {self.first:.4g}, "
                          f"data themselves {floor:.4g}")  # fmt: skip
        for check in self.checks:
            if check.status != "pass":
                self.progress.say(f"  {check}")

    def _picture(self, x: Tensor) -> None:
        if len(self.data.shape) != 3 or self.data.shape[0] not in (1, 3):
            return
        from ..reports.plots import save_grid

        classes = len(self.data.classes) if self.data.labels is not None else 0
        file = self.run.path / "samples" / f"step-{self.step:09d}.png"
        with writing(file):
            save_grid(x[: min(len(x), max(self.plan.previews, 1))], file, columns=classes if 2 <= classes <= 16 else None)

    def draw_curves(self) -> None:
        """Writes curves.png beside the checkpoints: distance, energies, noise, running cost."""
        if self.is_main:
            from ..reports.tune_curves import draw_curves

            draw_curves(self.run, self.first, self.std_start, self.yardstick.title)


def draw(policy: Policy, n: int, classes: int = 0, seed: int = 0, batch: int = 250) -> Tensor:
    """n samples of a policy (n, *) on the CPU, classes in turn: the same for a seed."""
    label = {"label": torch.arange(n, device=policy.denoiser.device) % classes} if classes else None
    x = generate(
        policy.denoiser, n, grid=policy.grid, transition=policy.transition, cond=label, batch=batch, seed=seed,
        shape=policy.shape, last="draw",
    )  # fmt: skip
    return x.cpu()


def reading_of(
    rows: Sequence[Row], measured: Row, start: Start, std_start: Sequence[float], best: float, update: Any
) -> Reading:
    """The figures that the monitor looks at, from lines of metrics and a measurement."""
    T = len(std_start)

    def mean(name: str) -> float | None:
        values = [row[name] for row in rows if name in row]
        return sum(values) / len(values) if values else None

    def means(name: str) -> list[float] | None:
        values = [mean(f"{name}_{k}") for k in range(T)]
        return None if any(value is None for value in values) else values  # type: ignore[return-value]

    settings = getattr(update, "settings", None)
    tuned = [row for row in rows if "clipped" in row]
    tilted = start.method == "dxdp"  # its figure has no floor, and may be below 0
    return Reading(
        cost=means("running_cost"),
        adaptive=getattr(settings, "avr", None) is not None and getattr(settings, "cost", "brownian") == "brownian",
        std=update.policy.rhos.tolist(),
        std_start=std_start,
        explained=means("explained"),
        data_energy=mean("e_data"),
        sample_energy=mean("e_policy"),
        energy_loss=mean("energy_loss"),
        gamma=getattr(settings, "gamma", None),
        largest=mean("energy_range"),
        clipped=mean("clipped") if tuned and getattr(settings, "policy_clip", None) is not None else None,
        spread=Spread(**measured["spread"]),
        data_spread=Spread(**measured["data_spread"]),
        drift=measured["drift"],
        distance=None if tilted else measured["distance"],
        best=None if tilted else best,
        floor=measured["floor"],
    )
