r"""Tuning a policy to a reward, near a reference: DxDP, the policy half of DxMI with a fixed energy E = -reward.

.. math:: \min_\pi E_\pi[-r(x_T)] + \tau \sum_k E\,KL(\pi_k(\cdot \mid x_k) \,\|\, \pi^{ref}_k(\cdot \mid x_k))

The cost of leaving the reference takes the place of velocity and entropy: it is in closed form, and zero at the start. There
is no back-propagation through time, and nothing but the last state ever meets the reward.

**The initial value bias.** The optimum is :math:`\pi_{ref}(x_{0:T} \mid x_0) \exp(r(x_T) / \tau)`, normalised for each x_0 on
its own, since where the chain starts cannot be chosen. Its samples follow :math:`\pi_{ref}(x_T) \exp(r(x_T) / \tau)` only if
x_0 and x_T are independent under the reference, as they are for exact reverse steps from pure noise, and are not for few
steps. What is missing is the tilt of x_0 by exp(-V^0(x_0) / tau); "bias" of `iterate` is the standard deviation of that
exponent over x_0, 0 where nothing is missing.

References:
    | Maximum Entropy Inverse Reinforcement Learning of Diffusion Models with Energy-Based Models (Yoon et al., 2024), section 4
    | https://arxiv.org/abs/2407.00626
"""

from __future__ import annotations

import copy
import importlib
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..gaussian import Gaussian
from ..imitation import MaxEntIRL
from ..noise import Draws
from .descent import Average
from .energies import default_value, read
from .policy import Policy, Rollout
from .settings import Settings

__all__ = ["Reward", "RewardEnergy", "RewardTuning", "load_reward", "reward_settings", "tune_to_reward"]

Reward = Callable[..., Tensor]
"""reward(x, **cond) -> (B,) for samples x (B, *), high where they are wanted."""


class RewardEnergy(nn.Module):
    """A reward as an energy that nobody trains: E = -reward.

    Arguments:
        reward: reward(x, **cond) -> (B,). A module is frozen and put in evaluation mode.
        differentiable: Whether gradients go through it.
    """

    def __init__(self, reward: Reward, differentiable: bool = True):
        super().__init__()
        self.reward, self.differentiable = reward, differentiable
        if isinstance(reward, nn.Module):
            reward.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> RewardEnergy:
        return self  # a reward is as it is: no dropout, whatever happens around it

    def forward(self, x: Tensor, k: int | Tensor | None = None, **cond: Any) -> Tensor:
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            value = read(lambda x, k, **cond: self.reward(x, **cond), x, **cond)
        if self.differentiable and x.requires_grad and not value.requires_grad:
            raise ValueError("`reward` has no gradient: pass differentiable=False, and the value is fitted to it")
        return -value.to(x.dtype)


def reward_settings(
    tau: float = 0.1,
    *,
    reduction: Literal["mean", "sum"] = "sum",
    lr: float = 1e-5,
    lr_std: float | None = None,
    lr_value: float = 1e-3,
    **changes: Any,
) -> Settings:
    """The settings of a tuning to a reward: no time cost, no gamma, nothing but the divergence from the reference.

    Arguments:
        tau: What a nat of leaving the reference costs, in units of the reward.
        reduction: "sum" counts the nats of all dimensions, as the objective is written; "mean" counts nats per dimension.
        lr: Learning rate of the means.
        lr_std: Of the log standard deviations; None is ten times `lr`.
        lr_value: Of the value.
        **changes: Any other of `Settings`.

    Raises:
        ValueError: If tau is not positive, or another is out of range.
    """
    if not (tau > 0 and math.isfinite(tau)):
        raise ValueError(f"`tau` must be positive (got {tau}): without it nothing keeps the policy near the reference")
    plain: dict[str, Any] = {"time_cost": None, "gamma": 0.0, "avr": None, "betas": (0.5, 0.99), **changes}
    lr_std = 10.0 * lr if lr_std is None else lr_std
    return Settings(tau1=tau, tau2=0.0, reduction=reduction, lr_policy=lr, lr_std=lr_std, lr_value=lr_value, **plain)


class RewardTuning(MaxEntIRL):
    """Tunes a policy to a reward, one iteration at a time: `MaxEntIRL` with a fixed energy and a reference.

    Arguments:
        policy: Tuned in place.
        reward: reward(x, **cond) -> (B,), in the units of the samples.
        value: V(x, k, **cond) with time, of the policy's T; None takes `default_value`. If V(., T) means something
            (`terminal`), it is fitted to -reward and gives the gradient.
        reference: What the policy stays near; None is a copy of the policy as it is now. It is frozen.
        differentiable: Whether the reward may be differentiated; a value that is given must be `terminal` if not.
        settings: See `reward_settings`.

    Raises:
        ValueError: As `MaxEntIRL`; or if a reward without gradient meets a value that says nothing of samples.
    """

    COST = "reward"

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        value: nn.Module | None = None,
        *,
        reference: Policy | None = None,
        differentiable: bool = True,
        settings: Settings | None = None,
    ):
        if value is None:
            if policy.shape is None:
                raise ValueError("`value` is needed: the policy does not know the shape of an example")
            value = default_value(policy.shape, policy.T, terminal=not differentiable).to(policy.denoiser.device)
        if not differentiable and not getattr(value, "terminal", False):
            raise ValueError("`value` must be fitted to a reward without gradient: build it with terminal=True")
        reference = copy.deepcopy(policy) if reference is None else reference
        super().__init__(
            policy,
            value,
            RewardEnergy(reward, differentiable),
            reward_settings() if settings is None else settings,
            reference=reference.eval().requires_grad_(False),
        )
        self._nats: dict[int, Tensor] = {}

    def critic(
        self,
        x0: Tensor,
        cond: Mapping[str, Tensor],
        draws: Draws,
        average: Average | None = None,
        turn: int = 0,
    ) -> tuple[Rollout, dict[str, Tensor]]:
        """As `MaxEntIRL.critic`; x0 says how many trajectories there are, and nothing else.

        Returns:
            The trajectories; and in addition, each (): reward (mean over samples), nats (mean divergence from the reference
            along a trajectory, summed over steps and dimensions), bias (see above).
        """
        roll, told = super().critic(x0, cond, draws, average, turn)
        told["reward"], told["nats"] = -told["e_policy"], torch.stack(list(self._nats.values())).sum()
        with torch.no_grad():
            v = read(self.value, roll.states[0], 0, **roll.cond)
        told["bias"] = v.std(unbiased=False) / self.settings.tau1 if len(v) else v.sum()
        return roll, told

    def _divergence(self, x: Tensor, k: int | Tensor, p: Gaussian, cond: Mapping[str, Any]) -> Tensor:
        cost = super()._divergence(x, k, p, cond)
        if isinstance(k, int):  # of the rows that were drawn, for the value's target
            dims = max(1, x[:1].numel()) if self.settings.reduction == "mean" else 1
            self._nats[k] = cost.detach().sum() * (dims / max(1, len(x)))
        return cost


def tune_to_reward(
    tuning: RewardTuning,
    iterations: int,
    batch: int,
    *,
    cond: Callable[[int], Mapping[str, Tensor]] | None = None,
    seed: int = 0,
    decay: float = 0.5,
    head_start: int = 0,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Repeats `RewardTuning.iterate`, learning rates constant at first and then falling to 2 %; returns what it told.

    The few lines that a script wants: no data, no folder, no measurements. `tune_policy(..., reward=...)`, the command line's,
    has them, keeps the best policy and goes on where it was interrupted.

    Arguments:
        tuning: Tuned in place.
        iterations: How many.
        batch: Trajectories of each.
        cond: From the number of an iteration to its conditions, each (batch, ...).
        seed: Of all draws.
        decay: Share of the iterations, at the end, over which learning rates fall.
        head_start: Iterations, the first ones, in which the value alone learns: a policy that listens to a value that knows
            nothing yet leaves the reference for nothing.
        progress: Called after each iteration with its number from 1 and its numbers (those that are not per step).

    Raises:
        ValueError: If the reward, a value or a gradient is not finite; the message says in which iteration.
    """
    if iterations < 1 or batch < 1 or not 0 <= decay <= 1 or not 0 <= head_start <= iterations:
        raise ValueError("`iterations` and `batch` must be at least 1, `decay` in [0, 1], `head_start` in 0..iterations "
                         f"(got {iterations}, {batch}, {decay}, {head_start})")  # fmt: skip
    policy, rows = tuning.policy, []
    if policy.shape is None:
        raise ValueError("`shape` of one sample is unknown: give it to the policy")
    dtype = torch.promote_types(policy.log_std.dtype, torch.float32)
    like = torch.zeros(batch, *policy.shape, dtype=dtype, device=policy.denoiser.device)
    for i in range(iterations):
        left = max(0.02, min(1.0, (iterations - i) / max(1.0, decay * iterations)))
        for optimizer in tuning.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * left
        given, draws = dict(cond(i)) if cond is not None else {}, Draws(seed, i, range(batch))
        told = tuning.critic(like, given, draws)[1] if i < head_start else tuning.iterate(like, given, draws)
        rows.append({name: float(number) for name, number in told.items() if number.ndim == 0})
        if progress is not None:
            progress(i + 1, rows[-1])
    tuning.check()
    return rows


def load_reward(name: str) -> Reward:
    """The reward called "module:function", from the working folder or what is installed.

    Raises:
        ValueError: If there is none.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"`--reward {name}` must be module:function, such as my_rewards:brightness")
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        reward = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"`--reward {name}` cannot be loaded ({error}): name a module and a function in it") from error
    finally:
        sys.path.remove(folder)
    if not callable(reward):
        raise ValueError(f"`--reward {name}` is not a function (it is {type(reward).__name__})")
    return reward
