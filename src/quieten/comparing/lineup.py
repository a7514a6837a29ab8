"""Who takes part in a comparison: samplers by name, on a model, at numbers of steps.

NAME                    a sampler of `SAMPLERS`, with the variance it needs
NAME:VARIANCE           one with another variance, such as ancestral:sn or ancestral:FOLDER/NAME
NAME:OPTION=VALUE       one with another option, such as ancestral:eta=0.5
policy:NAME             a tuned policy, or policy:FOLDER/NAME, at its own number of steps
diffusers:NAME          a scheduler of diffusers on the same network
policies, fitted, diffusers, all    every policy; ancestral with every variance; every scheduler; everything but `SLOW`
"""

from __future__ import annotations

import inspect
import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from importlib.metadata import version
from typing import Any

import torch
import yaml
from torch import Tensor

from ..covariances.stored import UNTRAINED, fingerprint, load_variance, variance_names
from ..data import to_pixels
from ..denoiser import Denoiser
from ..files import bare_name, named_file
from ..guiding.splits import SPLITS
from ..interop.schedulers import THEIRS, Theirs, installed
from ..noise import INITIAL, Noise
from ..oracle import GaussianData
from ..sampling import generate, sample
from ..schedule import Table
from ..solvers.adaptive import RK45
from ..solvers.samplers import SAMPLERS, clipped, sampler
from ..training.source import Source
from ..transition import Hushed, Transition
from ..tuning.adapters import merge
from ..tuning.stored import load_policy, policy_names
from ..wrap import Clipped, Counted, Extrapolated, WithCovariance, clip
from .compare import Bits, Contender

__all__ = ["GROUPS", "SLOW", "Entrant", "standard"]

GROUPS = ("policies", "fitted", "diffusers", "all")
SLOW = ("lanczos",)
"""Left out of "all"."""

CHAIN = 1000
"""Levels that schedulers of diffusers choose from, for models without a table of their own."""

FORMAT = 1
"""To be raised when samples of the same facts become others."""


@dataclass(frozen=True, eq=False)
class Entrant:
    """A model, opened, and how all its samplers are to draw.

    Arguments:
        name: As it was given to `open_source`.
        source: What that returned.
        seed: Of the noise.
        scale: Of classifier-free guidance; None is the model's own.
        clip: Whether to clip x0; None is as the model does.
        prompt: For models that take text.
        spacing: Of the levels; None is the model's own.
        batch: Of one call of the network.
        bits: (model, transition, grid) -> how its likelihood is measured, None where it has none.
    """

    name: str
    source: Source
    seed: int = 0
    scale: float | None = None
    clip: bool | None = None
    prompt: str | None = None
    spacing: str | None = None
    batch: int = 100
    bits: Callable[[Denoiser, Transition, Tensor], Bits | None] | None = None

    # -- names

    def expand(self, names: Iterable[str]) -> list[str]:
        """The names without groups, each once, in their order.

        Raises:
            ValueError: For a name that nothing has.
        """
        variances = variance_names(self.source.variances)
        groups = {
            "policies": [f"policy:{name}" for name in policy_names(self.source.policies)],
            "fitted": [f"ancestral:{name}" for name in variances],
            "diffusers": [f"diffusers:{name}" for name in THEIRS] if installed() else [],
        }
        ours = [n for n, entry in SAMPLERS.items() if n not in SLOW and entry.variance in (None, *variances)]
        groups["all"] = [*ours, *groups["fitted"], *groups["policies"], *groups["diffusers"]]
        return list(dict.fromkeys(name for given in names for name in groups.get(given, [given])))

    # -- what is common to all

    @cached_property
    def counted(self) -> Counted:
        return Counted(self.source.denoiser)

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.source.denoiser)

    @cached_property
    def _text(self) -> dict[str, Tensor]:
        assert self.source.prompt is not None
        return self.source.prompt([self.prompt or ""])

    def facts(self) -> dict[str, Any]:
        """What the samples of every sampler depend on."""
        source, bound = self.source, self.bound
        return {
            "format": FORMAT, "weights": self._fingerprint, "denoiser": sha256(repr(source.denoiser).encode()).hexdigest(),
            "decoder": None if source.decode is None else fingerprint(source.decode.__self__),  # type: ignore[attr-defined]
            "clip": None if bound is None else clip(torch.linspace(-3, 3, 61)[None], bound).flatten().tolist(),
            "scale": self.weight, "prompt": self.prompt, "classes": len(source.classes), "seed": self.seed,
            "shape": list(self.shape), "device": source.denoiser.device.type,
        }  # fmt: skip

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.source.denoiser.shape
        if shape is None:
            raise ValueError(f"`source` {self.name} does not say the shape of what it draws: compare needs it")
        return shape

    @property
    def weight(self) -> float:
        return self.source.scale if self.scale is None else self.scale

    @property
    def bound(self) -> Any:
        own = self.source.clip
        return own if self.clip is None else (own or 1.0) if self.clip else None

    def conditions(self, rows: range) -> dict[str, Any]:
        """Of samples by their indices: classes in turn, or the prompt.

        Raises:
            ValueError: For a prompt that is missing or means nothing.
        """
        source, n = self.source, len(rows)
        if source.prompt is not None:
            if self.prompt is None:
                raise ValueError("`--prompt` is missing: this model draws what a text says")
            return {name: value.expand(n, *value.shape[1:]) for name, value in self._text.items()}
        if self.prompt is not None:
            raise ValueError(f"`--prompt {self.prompt!r}` needs a model that takes text: leave it out, {self.name} does not")
        return {"label": torch.tensor(rows) % len(source.classes)} if source.classes else {}

    def model(self, counted: Counted, variance: str | None = None, clipped: bool = True) -> Denoiser:
        """A counted denoiser with a variance, guidance and clipping.

        Raises:
            ValueError: For a variance that is not there, or guidance that the model cannot follow.
        """
        source, model, bound = self.source, counted, self.bound if clipped else None
        if variance is not None:
            cap = source.clip**2 if isinstance(source.clip, int | float) else None
            model = WithCovariance(model, load_variance(source.variances, variance, source.denoiser, cap=cap))  # type: ignore[assignment]
        if self.weight != 1.0:
            if not source.null:
                raise ValueError(f"`--scale {self.weight:g}` needs a model that learned to draw without a class or text: leave "
                                 "it out")  # fmt: skip
            model = Extrapolated(model, self.weight, null=source.null)  # type: ignore[assignment]
        # wrappers are made in training mode, and `generate` would leave the network in theirs
        return (model if bound is None else Clipped(model, bound)).eval()

    @torch.no_grad()
    def finished(self, x: Tensor) -> Tensor:
        """Samples as they are kept: bytes for pictures, on the CPU."""
        if self.source.decode is not None:
            x = torch.cat([self.source.decode(part) for part in x.split(self.batch)])
        return (to_pixels(x) if self.source.draws_pictures else x).cpu()

    # -- contenders

    def contender(self, name: str, steps: int) -> Contender:
        """A sampler by its name at a number of steps; a policy has its own.

        Raises:
            ValueError: For an unknown name, or steps that the sampler cannot take.
        """
        self.conditions(range(1))  # refuses now what it would refuse later
        head, _, rest = name.partition(":")
        if head == "policy":
            return self._tuned(rest)
        return self._theirs(rest, steps) if head == "diffusers" else self._ours(name, steps)

    def _ours(self, name: str, steps: int) -> Contender:
        head, *words = name.split(":")
        if head in SPLITS:
            raise ValueError(f"`{head}` is a split scheme and needs guidance, which there is none of here: it belongs to "
                             "`quieten sample --guide` and `quieten diagnose --guidance`")  # fmt: skip
        own, options = self.source.transition
        told = {k: yaml.safe_load(v) for k, _, v in (word.partition("=") for word in words if "=" in word)}
        named = [word for word in words if "=" not in word]
        chosen = {**(options if head == own else {}), **told}
        transition, grid = sampler(head, self.source.grid(steps, self.spacing), **chosen)
        if len(named) > 1 or (named and not getattr(without_hush(transition), "spread", False)):
            raise ValueError(f"`{name}`: the sampler {head!r} has no use for the variance {named[-1]!r}; ancestral has")
        entry = SAMPLERS.get(head)
        variance = named[0] if named else None if entry is None else entry.variance
        facts = {"sampler": head, "options": completed(head, chosen), "variance": self._variance(variance)}
        typed = ["--steps", str(steps), "--transition", head, *(["--variance", named[0]] if named else [])]
        typed += [f"--option={k}={v}" for k, v in told.items()]
        typed += [] if self.spacing is None else ["--grid", self.spacing]
        typed += [] if self.clip is None else ["--clip" if self.clip else "--no-clip"]
        model = clipped(self.model(self.counted, variance, clipped=False), transition, self.bound).eval()
        return self._drawing(name, steps, self.counted, model, transition, grid, "mean", facts, typed)

    def _tuned(self, name: str) -> Contender:
        """A policy at its own steps; what it draws is not clipped, as `quieten sample --policy` does."""
        policy = load_policy(self.source.policies, name, self.source.denoiser)
        merge(policy.denoiser)  # adapters cost time, and nobody trains them here
        counted = Counted(policy.denoiser)
        noise = sha256(policy.transition.log_rhos.detach().cpu().numpy().tobytes()).hexdigest()
        facts = {"policy": [fingerprint(policy.denoiser), noise], "clip": None}
        model, typed = self.model(counted, clipped=False), ["--policy", name]
        title = f"policy:{bare_name(name)}"
        return self._drawing(title, policy.T, counted, model, policy.transition, policy.grid, "draw", facts, typed)

    def _drawing(
        self, name: str, steps: int, counted: Counted, model: Denoiser, transition: Transition, grid: Tensor, last: str,
        facts: Mapping[str, Any], typed: Sequence[str],
    ) -> Contender:  # fmt: skip
        """What the library's own loop draws."""

        def draw(rows: range) -> Tensor:
            given: dict[str, Any] = {"cond": self.conditions(rows), "batch": self.batch, "seed": self.seed, "first": rows.start}
            return self.finished(generate(model, len(rows), grid=grid, transition=transition, last=last, **given))

        everything = {**self.facts(), **facts, "grid": grid.tolist(), "last": last}
        evaluations = forecast(transition, grid, self.source.denoiser) * self._passes
        bits = None if self.bits is None or self.weight != 1.0 else self.bits(model, without_hush(transition), grid)
        shown = None if isinstance(transition, RK45) else steps
        return Contender(
            self.name, name, shown, counted, draw, plain(everything), evaluations, self.command(typed), self.source.weights,
            self.seed, bits,
        )  # fmt: skip

    def _variance(self, name: str | None) -> str | None:
        """Which variance that is: the hash of its file, or its name where there is none."""
        if name is None or name in UNTRAINED:
            return name
        file = named_file(self.source.variances, name)
        return name if file is None else sha256(file.read_bytes()).hexdigest()

    def _theirs(self, name: str, steps: int) -> Contender:
        if not installed():
            raise ValueError(f"`diffusers:{name}` needs diffusers: pip install diffusers, or leave it out")
        if self.source.encoder is not None:
            raise ValueError(f"`diffusers:{name}` cannot sample an encoded model: leave it out")
        table = self.source.table or Table(self.source.grid(CHAIN, None)[:-1].flip(0))
        theirs, model = Theirs(name, table, steps), self.model(self.counted)

        def draw(rows: range) -> Tensor:
            cond = {key: value.to(model.device) for key, value in self.conditions(rows).items()}
            noise = Noise(self.seed, rows)(INITIAL, torch.empty(len(rows), *self.shape, device=model.device))
            x = torch.empty_like(noise)
            for i in range(0, len(rows), self.batch):
                part = slice(i, i + self.batch)
                x[part] = theirs(model.bind(**{key: value[part] for key, value in cond.items()}), noise[part])
            if not x.isfinite().all():
                raise ValueError(f"diffusers' {name} drew samples that are not finite: take more steps")
            return self.finished(x)

        facts = {**self.facts(), "diffusers": version("diffusers"), "scheduler": theirs.config, "levels": theirs.levels}
        evaluations = float(len(theirs.levels) * self._passes)
        return Contender(
            self.name, f"diffusers:{name}", steps, self.counted, draw, plain(facts), evaluations, "", self.source.weights,
            self.seed,
        )  # fmt: skip

    @property
    def _passes(self) -> int:
        return 1 if self.weight == 1.0 else 2

    def command(self, typed: Sequence[str]) -> str:
        """What draws the same samples alone."""
        given = ["quieten", "sample", self.name, *typed, "--seed", str(self.seed)]
        given += [] if self.scale is None else ["--scale", f"{self.scale:g}"]
        given += [] if self.prompt is None else ["--prompt", self.prompt]
        return shlex.join(given)


def standard(source: Source) -> list[str]:
    """The samplers that are compared unless told otherwise."""
    names = ["ddpm", "ddim", "heun", "dpm++", "unipc"]
    return [*names, *(["ocm"] if "ocm" in variance_names(source.variances) else []), "policies"]


def without_hush(transition: Transition) -> Transition:
    """The transition without a bound on its last noise."""
    return transition.inner if isinstance(transition, Hushed) else transition


def forecast(transition: Transition, grid: Tensor, denoiser: Denoiser) -> float:
    """Evaluations a sample, counted on data that are standard normal.

    Raises:
        ValueError: If the transition refuses the grid.
    """
    process = denoiser.process
    oracle = Counted(GaussianData(torch.zeros(denoiser.shape or (2,), dtype=torch.float64), 1.0, process))
    x = process.prior(float(grid[0])).sample(torch.zeros(1, *oracle.shape or ()))
    sample(oracle, x, grid, transition, noise=lambda _, like: torch.zeros_like(like))
    return float(oracle.rows)


def completed(head: str, chosen: Mapping[str, Any]) -> dict[str, str]:
    """Options of a sampler, defaults filled in, as text."""
    make = SAMPLERS[head].make if head in SAMPLERS else None
    defaults = {} if make is None else {k: p.default for k, p in inspect.signature(make).parameters.items()}
    return {k: repr(v) for k, v in {**defaults, **chosen}.items()}


def plain(facts: Any) -> Any:
    """Facts as JSON has them: infinities as text."""
    if isinstance(facts, Mapping):
        return {str(k): plain(v) for k, v in facts.items()}
    if isinstance(facts, list | tuple):
        return [plain(v) for v in facts]
    return repr(facts) if isinstance(facts, float) and not math.isfinite(facts) else facts
