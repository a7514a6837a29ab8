"""What can be chosen in few-step fine-tuning, and the optimisers that follow from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import nn

from .policy import Policy
from .running_cost import KINDS
from .tuned import FLOOR

__all__ = ["PRESETS", "Settings", "check_parts", "optimizers"]


def _counts(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True)
class Settings:
    r"""Choices of DxMI; the defaults are those of the official CIFAR-10 runs with ten steps.

    `tau1` and `tau2` are in units of the energy per dimension ("mean", the official code) or per example ("sum", the paper):
    the same numbers with "sum" weigh D times as much, tau_sum = tau_mean / D.

    Arguments:
        tau1: Weight of the entropy of a step.
        tau2: Weight of its running cost.
        gamma: Weight of the squared energies, which then lie within 1 / (2 gamma); 0 leaves them out.
        reduction: Over dimensions, of entropies and running costs.
        time_cost: "sigmoid", "linear" or None, what the value pays for each step.
        time_cost_scale: Factor on it: 1 for "sigmoid", 0.05 for "linear" when absent.
        entropy_in_value: The value pays the entropy too, but for this many steps at the end; None leaves it out.
        velocity_in_value: The same for the running cost.
        entropy: What tau1 multiplies: "log_std", log rho as the official code; "exact", with the constant of a Gaussian's
            entropy; "sampled", -log pi of the drawn state.
        cost: Auxiliary kernel, see `running_cost.KINDS`.
        analytic_cost: The running cost as its exact mean over the step, not of the drawn state.
        avr: Decay of the adaptive velocities s_k^2; None keeps them.
        value_resample: Draw x_{k+1} anew from the current policy for the value's target.
        value_update_order: Steps of a sweep: last to first, or in random order.
        repeat_value_update: Sweeps in an iteration.
        n_critic: Rollouts, energy steps and value sweeps for each step of the policy; it draws states from all of them.
        n_generator: Policy steps in an iteration, each on one state of every trajectory, of a random step; "all" is every state
            once.
        explore: Rollouts move down the value by as much as this times rho_k, an amount drawn for each iteration; 0 not.
        skip_sampler_tau: Steps at the end whose entropy and running cost the policy does not count.
        policy_clip: Largest norm of the policy's gradient; None for any. Likewise `value_clip`, `energy_clip`.
        value_clip: Of the value's steps, not of the energy's.
        energy_clip: Of the energy's steps.
        lr_policy: Learning rate of the means' network.
        lr_std: Of the log standard deviations; None is 100 times `lr_policy`.
        lr_value: Of the value.
        lr_energy: Of a separate energy; None is that of the value.
        optimizer: Of the policy: "adam", "radam" or "sgd".
        value_optimizer: Of value and energy.
        betas: Of Adam and RAdam.
        ema: Decay of the averages of policy and value; None keeps none.
        target_decay: Decay of a target network for the value; None takes the value itself.
        anneal: tau1 and tau2 are multiplied by this in the end, along a geometric path: the squared energies bias the game by
            an amount that depends on gamma tau alone.
        anneal_steps: Iterations that takes.
        compat: "official" rounds T / 2 down in the sigmoid time cost.

    Raises:
        ValueError: For a value out of range, named.
    """

    tau1: float = 0.1
    tau2: float = 0.01
    gamma: float = 1.0
    reduction: Literal["mean", "sum"] = "mean"
    time_cost: Literal["sigmoid", "linear"] | None = "sigmoid"
    time_cost_scale: float | None = None
    entropy_in_value: int | None = None
    velocity_in_value: int | None = None
    entropy: Literal["log_std", "exact", "sampled"] = "log_std"
    cost: Literal["brownian", "rescale", "forward"] = "brownian"
    analytic_cost: bool = False
    avr: float | None = 0.99
    value_resample: bool = False
    value_update_order: Literal["backward", "random"] = "backward"
    repeat_value_update: int = 1
    n_critic: int = 1
    n_generator: int | Literal["all"] = 1
    explore: float = 0.0
    skip_sampler_tau: int = 0
    policy_clip: float | None = 0.1
    value_clip: float | None = None
    energy_clip: float | None = None
    lr_policy: float = 1e-7
    lr_std: float | None = None
    lr_value: float = 1e-5
    lr_energy: float | None = None
    optimizer: Literal["adam", "radam", "sgd"] = "adam"
    value_optimizer: Literal["adam", "radam", "sgd"] = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    ema: float | None = None
    target_decay: float | None = None
    anneal: float = 1.0
    anneal_steps: int = 0
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        for name in ("tau1", "tau2", "gamma", "time_cost_scale", "lr_policy", "lr_std", "lr_value", "lr_energy", "explore"):
            self._need(name, lambda v: v >= 0 and math.isfinite(v), "be a number, not negative")
        for name in ("avr", "ema", "target_decay"):
            self._need(name, lambda v: 0 <= v < 1, "lie in [0, 1)")
        for name in ("policy_clip", "value_clip", "energy_clip", "anneal"):
            self._need(name, lambda v: v > 0, "be positive")
        for name in ("n_critic", "repeat_value_update"):
            self._need(name, _counts, "be a whole number of at least 1")
        self._need("n_generator", lambda v: v == "all" or _counts(v), "be a whole number of at least 1, or 'all'")
        for name in ("skip_sampler_tau", "entropy_in_value", "velocity_in_value", "anneal_steps"):
            self._need(name, lambda v: _counts(v, 0), "be a whole number of at least 0")
        for name, known in _WORDS.items():
            self._need(name, lambda v, known=known: v in known, f"be one of {', '.join(known)}")
        self._need("betas", lambda v: len(v) == 2 and all(0 <= beta < 1 for beta in v), "be two numbers in [0, 1)")

    def _need(self, name: str, good: Any, must: str) -> None:
        value = getattr(self, name)
        try:
            fine = name in _OPTIONAL if value is None else bool(good(value))
        except (TypeError, ValueError):  # no number at all
            fine = False
        if not fine:
            raise ValueError(f"`{name}` must {must} (got {value!r})")

    def factor(self, iteration: int) -> float:
        """What `anneal` has made of 1 by an iteration."""
        if not self.anneal_steps:
            return 1.0
        share: float = self.anneal ** min(1.0, iteration / self.anneal_steps)
        return share

    def tau1_at(self, iteration: int) -> float:
        return self.tau1 * self.factor(iteration)

    def tau2_at(self, iteration: int) -> float:
        return self.tau2 * self.factor(iteration)


_WORDS = {
    "reduction": ("mean", "sum"),
    "time_cost": ("sigmoid", "linear"),
    "entropy": ("log_std", "exact", "sampled"),
    "cost": KINDS,
    "value_update_order": ("backward", "random"),
    "optimizer": ("adam", "radam", "sgd"),
    "value_optimizer": ("adam", "radam", "sgd"),
    "compat": ("official",),
}

_OPTIONAL = {f.name for f in fields(Settings) if "None" in str(f.type)}
"""Settings that may be None."""

_TIMED: dict[str, Any] = {"time_cost": None, "entropy_in_value": 0, "velocity_in_value": 0}

PRESETS: dict[str, Settings] = {
    "cifar10": Settings(),
    "cifar10-4": Settings(value_resample=True),
    "imagenet64": Settings(
        skip_sampler_tau=3, n_generator="all", policy_clip=None, value_clip=0.1, lr_policy=1e-8, optimizer="radam"
    ),
    "imagenet64-4": Settings(n_generator="all", policy_clip=None, value_clip=0.1, lr_policy=1e-8, optimizer="radam"),
    "lsun": Settings(
        tau1=0.01,
        time_cost="linear",
        skip_sampler_tau=3,
        n_generator="all",
        policy_clip=None,
        value_clip=0.1,
        lr_policy=1e-8,
        optimizer="radam",
    ),
    "lsun-4": Settings(n_generator="all", policy_clip=None, value_clip=0.1, lr_policy=1e-8, optimizer="radam"),
    "toy": Settings(
        tau1=0.1, tau2=0.1, lr_policy=1e-4, lr_std=1e-3, lr_value=1e-3, betas=(0.5, 0.99), ema=0.998, policy_clip=None, **_TIMED
    ),
    "separate": Settings(
        tau1=0.1,
        tau2=0.1,
        gamma=0.0,
        value_resample=True,
        energy_clip=0.1,
        lr_policy=1e-5,
        lr_value=1e-5,
        lr_energy=1e-4,
        **_TIMED,
    ),
}
"""Settings by name: the official configurations of images, for ten steps or ("-4") four; two dimensions with a value of the
time; a separate energy."""


def check_parts(
    policy: Policy, value: nn.Module, energy: nn.Module | None, s: Settings, reference: Policy | None, fixed: bool
) -> None:
    """Raises ValueError unless policy, value and energy belong together; `fixed` says that nobody trains the energy."""
    made_for = getattr(value, "T", None)
    if made_for is not None and made_for != policy.T:
        raise ValueError(f"`value` was made for {made_for} steps, the policy has {policy.T}: both are of one T")
    if energy is not None and not fixed and getattr(value, "terminal", False):
        raise ValueError(
            "`energy` is given and `value` claims k = T too: leave the energy out, or make the value with terminal=False"
        )
    if energy is None and not getattr(value, "terminal", True):
        raise ValueError("`energy` is missing: this value says nothing at k = T")
    if energy is None and not any(p.requires_grad for p in value.parameters()):
        raise ValueError("`value` has nothing to train: its parameters want no gradients")
    if reference is not None and not torch.equal(reference.grid, policy.grid):
        raise ValueError("`reference` must have the grid of the policy: build it from the same levels")
    entropy = s.tau1 > 0 and reference is None and not policy.transition.from_kernel
    rhos = policy.rhos[: policy.transition._free]
    if entropy and len(rhos) and float(rhos.min()) < FLOOR:
        raise ValueError(f"`std` of a trained step is {float(rhos.min()):.2g}, below the floor {FLOOR:g} where entropy has no "
                         "gradient: start with more noise, keep that step (trained='fix_last'), or set tau1 = 0")  # fmt: skip


def optimizers(
    settings: Settings, policy: Policy, value: nn.Module, energy: nn.Module | None
) -> dict[str, torch.optim.Optimizer]:
    """The optimisers by name, each with the learning rate at which it starts as "initial_lr" of its groups."""
    noise = policy.log_std
    means = [p for p in policy.parameters() if p.requires_grad and p is not noise]
    lr_std = 100.0 * settings.lr_policy if settings.lr_std is None else settings.lr_std
    groups = [{"params": means, "lr": settings.lr_policy}] if means else []
    if noise.requires_grad:
        groups.append({"params": [noise], "lr": lr_std})
    if not groups:
        raise ValueError(
            "`policy` has nothing to train: its parameters want no gradients (denoiser.requires_grad_(True), or trained='all')"
        )
    made = {"policy": _made(settings.optimizer, groups, settings)}
    for name, net, lr in (("value", value, settings.lr_value), ("energy", energy, settings.lr_energy)):
        parameters = [] if net is None else [p for p in net.parameters() if p.requires_grad]
        if parameters:
            lr = settings.lr_value if lr is None else lr
            made[name] = _made(settings.value_optimizer, [{"params": parameters, "lr": lr}], settings)
    for optimizer in made.values():
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return made


def _made(kind: str, groups: list[dict[str, Any]], settings: Settings) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(groups, fused=True)
    if kind == "radam":
        return torch.optim.RAdam(groups, betas=settings.betas)
    return torch.optim.Adam(groups, betas=settings.betas, fused=True)
