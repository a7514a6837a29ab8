"""What tuning starts from: levels, noise and network of a policy, its value, and the settings that suit few examples."""

from __future__ import annotations

import dataclasses
import importlib
import math
import warnings
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..data import Dataset, Order
from ..imitation import MaxEntIRL
from ..noise import Draws, Noise
from ..schedule import karras
from ..training.parts import borrows, nearest
from ..training.schema import Train
from ..training.source import Source
from ..transition import Ancestral
from .adapters import inject
from .borrowed import EncoderEnergy, EncoderValue, lends_encoder
from .energies import PerceptronValue, ResidualValue, default_value
from .policy import TRAINED, Policy
from .policy_schedule import fastdpm, moment_std
from .settings import Settings

__all__ = ["METHODS", "STARTS", "Start", "few_grid", "make_policy", "make_update", "make_value", "section", "start_of"]

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dxmi": ("imitation:MaxEntIRL", {}),
    "sft-pg": ("tuning.policy_gradient:PolicyGradient", {}),
    "sft-ppo": ("tuning.policy_gradient:PolicyGradient", {"clip_ratio": 0.2}),
    "bptt": ("tuning.policy_gradient:FullGradient", {}),
    "dxdp": ("tuning.reward:RewardTuning", {"differentiable": False}),
}
"""Methods by name -> "module:class" of this package, made of (policy, value, settings=...), and further arguments. "dxdp" is
made of (policy, reward, value, settings=...), the value being fitted to the reward, which then needs no gradient."""

STARTS = {"ddim": 0.5, "ddpm": 1.0, "fastdpm": 1.0, "ocm": 1.0}
"""What the first policy is -> its share of the ancestral noise, unless told otherwise: DDIM with some noise, the ancestral
kernel, FastDPM's chain, the ancestral kernel with a learned variance. Half the noise makes better samples to start from."""

SMALL: dict[str, Any] = {
    "tau1": 0.003,
    "tau2": 0.003,
    "gamma": 1.0,
    "time_cost": None,
    "policy_clip": None,
    "lr_std": 3e-4,
    "lr_value": 3e-4,
}
"""Where `settings` says nothing: a value that knows the time, learning rates for thousands of steps instead of millions."""

REWARD: dict[str, Any] = {
    **SMALL,
    "tau1": 0.1,
    "tau2": 0.0,
    "gamma": 0.0,
    "avr": None,
    "reduction": "sum",
    "lr_std": 1e-4,
}
"""The same for "dxdp", where tau1 is what a nat of leaving the first policy costs, in units of the reward."""


@dataclass(frozen=True)
class Start:
    """What a policy starts from and how it learns.

    Attributes:
        T: Steps, each one evaluation of the network.
        method: A key of `METHODS`.
        start: One of `STARTS`.
        eta: Share of the ancestral noise in the mean's kernel, above 0 to 1; None is that of `STARTS`.
        sigma_min: Of the last finite level, sigma / alpha; None is that of `few_grid`.
        sigma_max: Of the first level, likewise.
        rho: Bends the levels between them, likewise.
        train_std: Which standard deviations are trained, see `policy.TRAINED`.
        last_std: Standard deviation of the step to the data.
        value: "encoder" (borrowed from the denoiser), "residual", "perceptron"; "auto" takes the first that suits.
        width: Units or channels of the value's own layers; None takes what suits.
        energy: "value" takes V(., T), as for images in the paper; "own" gives the energy a network of its own, which the T
            steps of the value between two of the energy then do not move.
        adapters: Rank of low-rank adapters, the only weights of the network that are then trained; 0 trains all.
        head_start: Examples that the value sees before the policy begins to learn.
        value_decay: Share of its learning rate that the value keeps to the end.
        flip: Whether examples are mirrored at random.
        settings: Changes to `SMALL` (`REWARD` for "dxdp") and, beneath it, to the defaults of `tuning.Settings`.

    Raises:
        ValueError: For a choice that is unknown or out of range.
    """

    T: int = 4
    method: str = "dxmi"
    start: Literal["ddim", "ddpm", "fastdpm", "ocm"] = "ddim"
    eta: float | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float | None = None
    train_std: Literal["none", "all", "fix_last", "fix_last3"] = "fix_last"
    last_std: float = 1e-3
    value: Literal["auto", "encoder", "residual", "perceptron"] = "auto"
    width: int | None = None
    energy: Literal["value", "own"] = "value"
    adapters: int = 0
    head_start: int = 3_200
    value_decay: float = 0.1
    flip: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.T < 1:
            raise ValueError(f"`T` must be at least 1 step (got {self.T})")
        for name, known in (
            ("method", METHODS),
            ("start", STARTS),
            ("train_std", TRAINED),
            ("value", VALUES),
            ("energy", ENERGIES),
        ):
            if getattr(self, name) not in known:
                given = getattr(self, name)
                raise ValueError(f"`{name}` {given!r} is unknown{nearest(str(given), known)} (known: {', '.join(known)})")
        if not 0 < self.share <= 1:
            raise ValueError(f"`eta` must lie above 0, up to 1 (got {self.eta}): a policy needs noise")
        if self.adapters < 0 or self.head_start < 0 or not 0 <= self.value_decay <= 1:
            raise ValueError("`adapters` and `head_start` must not be negative, `value_decay` must lie in [0, 1] "
                             f"(got {self.adapters}, {self.head_start}, {self.value_decay})")  # fmt: skip
        fields = [f.name for f in dataclasses.fields(Settings) if f.name not in ("lr_policy", "betas", "ema")]
        for name in self.settings:
            if name not in fields:
                remedy = nearest(name, fields) or f" (known: {', '.join(fields)}; lr, betas and ema are the plan's)"
                raise ValueError(f"`settings` knows no {name!r}{remedy}")
        Settings(**{**self.defaults, **self.settings})

    @property
    def defaults(self) -> dict[str, Any]:
        """The settings where `settings` says nothing."""
        return REWARD if self.method == "dxdp" else SMALL

    @property
    def share(self) -> float:
        """The share of the ancestral noise."""
        return STARTS[self.start] if self.eta is None else self.eta

    def to_dict(self) -> dict[str, Any]:
        """Everything but the method, as plain values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "method"}


VALUES = ("auto", "encoder", "residual", "perceptron")
ENERGIES = ("value", "own")


@borrows(Start, "method")
def section(
    *,
    reward: str | None = None,
    trunk: str | None = None,
    images: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What a recipe's section `tune` may say beside the method: what a policy starts from, and `quieten tune` for its run."""
    return {**options, "reward": reward, "trunk": trunk, "images": images, "batch": batch, "lr": lr}


def start_of(method: str, options: dict[str, Any]) -> Start:
    """What a section `tune` says."""
    names = [f.name for f in dataclasses.fields(Start) if f.name != "method"]
    given = {name: options[name] for name in names if options.get(name) is not None}
    return Start(method=method, **given)


# ---- the policy


def few_grid(T: int, sigma_min: float | None = None, sigma_max: float | None = None, rho: float | None = None) -> Tensor:
    """Levels for so few steps that tuning has to repair them anyway: log-SNRs, float64 (T + 1,), to +inf.

    Between sigma / alpha of 10 (20 in 10 steps), where next to nothing is left of data, and 0.2 (0.08): the step to the data
    has to be as large as the others, or it is wasted.
    """
    low = 0.8 / T if sigma_min is None else sigma_min
    high = max(10.0, 2.0 * T) if sigma_max is None else sigma_max
    if not 0 < low < high:
        raise ValueError(f"`sigma_min` must lie in (0, sigma_max) (got {low}, {high})")
    return karras(T, low, high, 5.0 if rho is None else rho)


def make_policy(source: Source, start: Start, data: Dataset | None = None, seed: int = 0) -> Policy:
    """The policy before tuning, of a copy of the model.

    Arguments:
        source: The model.
        start: What it starts from.
        data: Examples, for the variances of "ocm".
        seed: Of adapters, and of the examples and noise that "ocm" averages over.
    """
    denoiser = deepcopy(source.denoiser)
    grid = few_grid(start.T, start.sigma_min, start.sigma_max, start.rho)
    std: Tensor | None = None
    if start.start == "fastdpm":
        chain = fastdpm(start.T, kappa=start.share)
        grid = chain.grid
    elif start.start == "ocm":
        std = _learned_std(source, grid, start, data, seed)
    if start.adapters:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject(denoiser, start.adapters)
    else:
        denoiser.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        return Policy(
            denoiser, grid, Ancestral(start.share, spread=False), std=std, trained=start.train_std, last_std=start.last_std,
            shape=None if data is None else data.shape,
        )  # fmt: skip


def _learned_std(source: Source, grid: Tensor, start: Start, data: Dataset | None, seed: int) -> Tensor:
    from ..covariances.stored import load_variance
    from ..wrap import WithCovariance

    if data is None:
        raise ValueError("`start` 'ocm' averages a learned variance over data: give data")
    bound = source.clip**2 if isinstance(source.clip, int | float) else None
    model = WithCovariance(source.denoiser, load_variance(source.variances, "ocm", source.denoiser, cap=bound))
    index = Order(len(data), min(256, len(data)), seed).indices(0)
    x0, label = data.batch(index)
    device = source.denoiser.device
    cond = {} if label is None or not source.classes else {"label": label.to(device)}
    draws = Draws(seed, 0, torch.arange(len(x0)))
    inner = Ancestral(start.share)
    return moment_std(model, grid, x0.to(device), inner, draws=draws, cond=cond, last_std=start.last_std).float().cpu()


# ---- what it learns from


def make_value(policy: Policy, start: Start, classes: int, terminal: bool = True) -> nn.Module:
    """The value network, freshly initialised."""
    shape, width = _shape(policy), start.width
    if _borrows(policy, start):
        return EncoderValue(policy, width or 128, classes, terminal)
    if start.value == "perceptron":
        return PerceptronValue(shape, policy.T, width or 128, classes=classes, terminal=terminal)
    if start.value == "residual":
        return ResidualValue(shape, policy.T, width or 24, classes, terminal)
    return default_value(shape, policy.T, width=width or _narrow(shape), classes=classes, terminal=terminal)


def make_energy(policy: Policy, start: Start, classes: int) -> nn.Module | None:
    """The energy, freshly initialised, of the kind of the value; None where the value is the energy."""
    if start.energy == "value":
        return None
    shape, width = _shape(policy), start.width
    if _borrows(policy, start):
        return EncoderEnergy(policy, width or 128, classes)
    if start.value == "perceptron":
        return PerceptronValue(shape, None, width or 128, classes=classes)
    if start.value == "residual":
        return ResidualValue(shape, None, width or 24, classes)
    return default_value(shape, None, time=False, width=width or _narrow(shape), classes=classes)


def _shape(policy: Policy) -> tuple[int, ...]:
    if policy.shape is None:
        raise ValueError("`shape` of one example is unknown: this model does not say it")
    return policy.shape


def _borrows(policy: Policy, start: Start) -> bool:
    return start.value == "encoder" or (start.value == "auto" and lends_encoder(policy.denoiser))


def _narrow(shape: tuple[int, ...]) -> int:
    """Channels for pictures, units for vectors, that a CPU can train."""
    return 24 if len(shape) == 3 and math.prod(shape[1:]) >= 64 else 128


def make_update(policy: Policy, start: Start, plan: Train, data: Dataset, reward: Any = None) -> MaxEntIRL:
    """Policy, value and optimisers of a method, from `plan.seed`."""
    where, options = METHODS[start.method]
    module, name = where.split(":")
    kind = getattr(importlib.import_module(f"quieten.{module}"), name)
    optimizer = {"betas": plan.betas, "lr_policy": plan.lr, "ema": None}
    settings = Settings(**{**start.defaults, **start.settings, **optimizer})
    classes = len(data.classes) if data.labels is not None else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        device = policy.denoiser.device
        energy = None if reward is not None else make_energy(policy, start, classes)
        value = make_value(policy, start, classes, terminal=energy is None).to(device)
        energy = None if energy is None else energy.to(device)
        update: MaxEntIRL
        if reward is not None:
            update = kind(policy, reward, value, settings=settings, **options)
        else:
            update = kind(policy, value, energy, settings, s2=_moves(policy, data, plan.seed), **options)
    return update


def _moves(policy: Policy, data: Dataset, seed: int, n: int = 256) -> Tensor:
    """Mean squared move of each step (T,): where adaptive velocities would come to rest, so that they need not travel."""
    device = policy.denoiser.device
    label = {"label": torch.arange(n, device=device) % len(data.classes)} if data.labels is not None else {}
    moves = policy.rollout(n, Noise(seed, range(n)), label).moves
    return moves.mean(1)
