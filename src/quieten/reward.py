r"""Tuning a policy to a reward, near a reference: DxDP, the policy half of DxMI with a fixed energy E = -reward.

.. math:: \min_\pi E_\pi[-r(x_T)] + \tau \sum_k E\,KL(\pi_k(\cdot \mid x_k) \,\|\, \pi^{ref}_k(\cdot \mid x_k))

The cost of leaving the reference takes the place of velocity and entropy: it is in closed form, and zero at the start. There
is no back-propagation through time, and nothing but the last state ever meets the reward.

**The initial value bias.** The optimum is :math:`\pi_{ref}(x_{0:T} \mid x_0) \exp(r(x_T) / \tau)`, normalised for each x_0 on
its own, since where the chain starts cannot be chosen. Its samples follow :math:`\pi_{ref}(x_T) \exp(r(x_T) / \tau)` only if
x_0 and x_T are independent under the reference, as they are for exact reverse steps from pure noise, and are not for few
steps. What is missing is the tilt of x_0 by exp(-V^0(x_0) / tau); "bias" of `iterate` is the standard deviation of that
exponent over x_0, 0 where there is none.

References:
    | Maximum Entropy Inverse Reinforcement Learning of Diffusion Models with Energy-Based Models (Yoon et al., 2024), section 4
    | https://arxiv.org/abs/2407.00626
"""

from __future__ import annotations

import copy
import importlib
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .energies import default_value, read
from .gaussian import Gaussian
from .noise import Draws
from .policy import Policy, Rollout

__all__ = ["Reward", "RewardSettings", "RewardTuning", "load_reward", "reference_cost", "tune_to_reward"]

Reward = Callable[..., Tensor]
"""reward(x, **cond) -> (B,) for samples x (B, *), high where they are wanted."""


def reference_cost(p: Gaussian, reference: Gaussian, reduction: Literal["sum", "mean"] = "sum") -> Tensor:
    r"""What a step pays for leaving the reference, (B,) nats, or nats per dimension.

    .. math:: \log(\rho_{ref}/\rho) + (\rho^2 + (m - m_{ref})^2) / (2 \rho_{ref}^2) - 1/2

    summed or averaged over dimensions: the Kullback-Leibler divergence of the two steps.
    """
    cost = p.kl(reference)
    return cost / max(1, p.mean[:1].numel()) if reduction == "mean" else cost


@dataclass(frozen=True)
class RewardSettings:
    """How a policy is tuned to a reward.

    Attributes:
        tau: What a nat (per dimension, with reduction="mean") of leaving the reference costs, in units of the reward.
        reduction: "sum" counts the nats of all dimensions, as the objective is written; "mean" counts nats per dimension.
        differentiable: Whether the reward is differentiated. If not, V(., T) is fitted to -reward and gives the gradient.
        lr: Learning rate of the means.
        lr_std: Of the log standard deviations.
        lr_value: Of the value.
        betas: Of Adam.
        clip: Bound on the norm of the gradient of the means; None leaves it.
        clip_value: The same for the value.
        n_value: Sweeps over the steps that fit the value, in an iteration.
        n_policy: Minibatches of the policy in an iteration, each of as many (x_k, k) as there are trajectories.
    """

    tau: float = 0.1
    reduction: Literal["sum", "mean"] = "sum"
    differentiable: bool = True
    lr: float = 1e-5
    lr_std: float = 1e-4
    lr_value: float = 1e-3
    betas: tuple[float, float] = (0.5, 0.99)
    clip: float | None = 0.1
    clip_value: float | None = None
    n_value: int = 1
    n_policy: int = 1

    def __post_init__(self) -> None:
        if not (self.tau > 0 and math.isfinite(self.tau)):
            raise ValueError(f"`tau` must be positive (got {self.tau}): without it nothing keeps the policy near the reference")
        if self.reduction not in ("sum", "mean"):
            raise ValueError(f"`reduction` must be 'sum' or 'mean' (got {self.reduction!r})")
        for name in ("lr", "lr_std", "lr_value"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must not be negative (got {getattr(self, name)})")
        for name in ("clip", "clip_value"):
            bound = getattr(self, name)
            if bound is not None and not bound > 0:
                raise ValueError(f"`{name}` must be positive, or None (got {bound})")
        if self.n_value < 1 or self.n_policy < 1:
            raise ValueError(f"`n_value` and `n_policy` must be at least 1 (got {self.n_value}, {self.n_policy})")


class RewardTuning(nn.Module):
    """Tunes a policy to a reward, one iteration at a time.

    Arguments:
        policy: Tuned in place.
        reward: reward(x, **cond) -> (B,). It may be a module; it is never trained.
        value: V(x, k, **cond) with time, of the policy's T; None takes `default_value`. With a differentiable reward it is
            asked for k < T alone.
        reference: What the policy stays near; None is a frozen copy of the policy as it is now.
        settings: See `RewardSettings`.

    Attributes:
        optimizers: "policy" (means, and the log standard deviations as a group of their own) and "value".

    Raises:
        ValueError: If the value is not one of the policy's T steps, or the reference has other steps or no noise.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        value: nn.Module | None = None,
        reference: Policy | None = None,
        settings: RewardSettings | None = None,
    ):
        super().__init__()
        self.settings = RewardSettings() if settings is None else settings
        self.policy, self.reward = policy, reward
        self.reference = (copy.deepcopy(policy) if reference is None else reference).eval().requires_grad_(False)
        if not torch.equal(self.reference.grid, policy.grid):
            raise ValueError(f"`reference` must take the policy's steps (got {self.reference.T} for {policy.T}): same grid")
        if value is None:
            if policy.shape is None:
                raise ValueError("`value` is needed: the policy does not know the shape of an example")
            value = default_value(policy.shape, policy.T, terminal=not self.settings.differentiable)
            value.to(policy.denoiser.device)
        steps = getattr(value, "T", policy.T)
        if steps != policy.T:
            raise ValueError(f"`value` must tell the states of the policy's {policy.T} steps apart (got T={steps})")
        self.value = value
        self.optimizers = self._optimizers()

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        s, std = self.settings, self.policy.log_std
        means = [p for p in self.policy.parameters() if p is not std and p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": means, "lr": s.lr}] if means else []
        if std.requires_grad:
            groups.append({"params": [std], "lr": s.lr_std})
        if not groups:
            raise ValueError("`policy` has nothing to train: its denoiser is frozen and its noise fixed")
        return {
            "policy": torch.optim.Adam(groups, betas=s.betas),
            "value": torch.optim.Adam(self.value.parameters(), s.lr_value, betas=s.betas),
        }

    # -- one iteration

    def iterate(
        self,
        x0: int | Tensor,
        cond: Mapping[str, Tensor] | None = None,
        draws: Draws | None = None,
        average: Callable[[Iterable[Tensor]], None] | None = None,
    ) -> dict[str, Tensor]:
        """One iteration: trajectories, a fit of the value from the last step to the first, a step of the policy.

        Arguments:
            x0: How many trajectories, or a batch with as many rows (a loop that serves data has one; its values do not matter).
            cond: Conditions, each (B, ...); they stay with their rows.
            draws: The randomness; None takes torch's generator.
            average: Averages gradients over processes.

        Returns:
            0-d tensors: "reward" (its mean), "nats" (mean divergence from the reference along a trajectory, summed over steps
            and dimensions), "value_loss", "policy_loss", "explained" (share of the variance of V(x_1)'s targets that the value
            knew), "bias" (see above; 0 is none).

        Raises:
            ValueError: If the reward or a target is not finite.
        """
        n = x0 if isinstance(x0, int) else len(x0)
        draws = Draws(int(torch.randint(2**62, ()).item()), 0, range(n)) if draws is None else draws
        cond = dict(cond or {})
        wide = torch.promote_types(self.policy.log_std.dtype, torch.float32)
        self.reference.eval()
        self.policy.eval()
        path = self.policy.rollout(n, lambda k, like: draws.normal(like, f"rollout{k}"), cond, dtype=wide)
        final = self._final_cost(path.final, cond)
        report = {"reward": -final.mean()}
        for sweep in range(self.settings.n_value):
            report |= self._fit_value(path, final, average, last=sweep == self.settings.n_value - 1)
        for part in range(self.settings.n_policy):
            report |= self._improve(path, draws, part, average)
        bad = [name for name, number in report.items() if not bool(number.isfinite())]
        if bad:
            raise ValueError(f"`{bad[0]}` is not finite: look at the reward, or lower the learning rates")
        return report

    def _final_cost(self, x: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """-reward of samples (B,), without a graph."""
        with torch.no_grad():
            return -self._rewards(x, cond).to(x.dtype)

    def _rewards(self, x: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return read(lambda x, k, **cond: self.reward(x, **cond), x, **cond)

    @torch.no_grad()
    def _leaving(self, path: Rollout, k: int) -> Tensor:
        """The cost (B,) of step k at the rows of a trajectory, of the policy as it drew them."""
        x = path.states[k]
        return reference_cost(self.policy.step(x, k, **path.cond), self.reference.step(x, k, **path.cond))

    def _fit_value(self, path: Rollout, final: Tensor, average: Callable[..., None] | None, last: bool) -> dict[str, Tensor]:
        s, T, dims = self.settings, self.policy.T, path.final[0].numel()
        losses, nats, explained = [], final.new_zeros(()), final.new_zeros(())
        if not s.differentiable:
            losses.append(self._regress(path.final, T, final, path.cond, average))
        for k in reversed(range(T)):
            with torch.no_grad():
                ahead = final if k == T - 1 else read(self.value, path.states[k + 1], k + 1, **path.cond)
                leaving = self._leaving(path, k)
                target = ahead + s.tau * (leaving / dims if s.reduction == "mean" else leaving)
            nats = nats + leaving.mean()
            if k == 0:
                explained = self._explained(path, target)
            losses.append(self._regress(path.states[k], k, target, path.cond, average))
        with torch.no_grad():
            bias = (
                read(self.value, path.states[0], 0, **path.cond).std() / s.tau
                if last and len(final) > 1
                else final.new_zeros(())
            )
        return {"nats": nats, "value_loss": torch.stack(losses).mean(), "explained": explained, "bias": bias}

    @torch.no_grad()
    def _explained(self, path: Rollout, target: Tensor) -> Tensor:
        """1 - var(target - V(x_0)) / var(target): what the value knew of the first step's targets."""
        if len(target) < 2:
            return target.new_zeros(())
        return 1.0 - (target - read(self.value, path.states[0], 0, **path.cond)).var() / target.var().clamp_min(1e-20)

    def _regress(
        self, x: Tensor, k: int, target: Tensor, cond: Mapping[str, Tensor], average: Callable[..., None] | None
    ) -> Tensor:
        loss = (read(self.value, x, k, **cond) - target).square().mean()
        self._step("value", loss, self.value.parameters(), self.settings.clip_value, average)
        return loss.detach()

    def _improve(self, path: Rollout, draws: Draws, part: int, average: Callable[..., None] | None) -> dict[str, Tensor]:
        """One step of the policy on random pairs (x_k, k)."""
        s, T, n = self.settings, self.policy.T, path.final.shape[0]
        # chosen on the CPU, where it is known without waiting which rows end at the reward
        pick = (draws.uniform(f"pairs{part}") * (T * n)).long().clamp_max_(T * n - 1)
        steps, rows = pick // n, pick % n
        order = torch.argsort(steps, stable=True)
        steps, rows = steps[order], rows[order]
        ending = int((steps < T - 1).sum())  # rows from here on take the last step
        device = path.final.device
        k, row = steps.to(device), rows.to(device)
        x = path.states[k, row]
        cond = {name: value[row] for name, value in path.cond.items()}
        self.policy.train()
        self.value.requires_grad_(False)
        p = self.policy.step(x, k, **cond)
        with torch.no_grad():
            reference = self.reference.step(x, k, **cond)
        leaving = reference_cost(p, reference, s.reduction)
        x_next = p.sample(draws.normal(x, f"improve{part}"))
        loss = (self._ahead(x_next, k + 1, ending, cond) + s.tau * leaving).mean()
        means = [q for group in self.optimizers["policy"].param_groups for q in group["params"]]
        self._step("policy", loss, means, s.clip, average)
        self.value.requires_grad_(True)
        self.policy.eval()
        return {"policy_loss": loss.detach()}

    def _ahead(self, x: Tensor, k: Tensor, ending: int, cond: Mapping[str, Tensor]) -> Tensor:
        """The cost-to-go (B,) of states x at k, of which those from `ending` on are samples."""
        if not self.settings.differentiable:
            return read(self.value, x, k, **cond)
        first = {name: value[:ending] for name, value in cond.items()}
        last = {name: value[ending:] for name, value in cond.items()}
        parts = [read(self.value, x[:ending], k[:ending], **first)] if ending else []
        if ending < len(x):
            rewards = self._rewards(x[ending:], last)
            if not rewards.requires_grad:
                raise ValueError("`reward` has no gradient: pass differentiable=False, and the value is fitted to it")
            parts.append(-rewards.to(x.dtype))
        return torch.cat(parts)

    def _step(
        self, name: str, loss: Tensor, parameters: Iterable[Tensor], clip: float | None, average: Callable[..., None] | None
    ) -> None:
        parameters = list(parameters)
        self.optimizers[name].zero_grad(set_to_none=True)
        loss.backward()
        if average is not None:
            average(parameters)
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        self.optimizers[name].step()


def tune_to_reward(
    tuning: RewardTuning,
    iterations: int,
    batch: int,
    *,
    cond: Callable[[int], Mapping[str, Tensor]] | None = None,
    seed: int = 0,
    decay: float = 0.5,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Repeats `RewardTuning.iterate`, learning rates constant at first and then falling to 2 %; returns its reports.

    Arguments:
        tuning: Tuned in place.
        iterations: How many.
        batch: Trajectories of each.
        cond: From the number of an iteration to its conditions, each (batch, ...).
        seed: Of all draws.
        decay: Share of the iterations, at the end, over which learning rates fall.
        progress: Called after each iteration with its number from 1 and its report.

    Raises:
        ValueError: If the reward, a value or a loss is not finite; the message says in which iteration.
    """
    if iterations < 1 or batch < 1 or not 0 <= decay <= 1:
        raise ValueError(f"`iterations` and `batch` must be at least 1, `decay` in [0, 1] (got {iterations}, {batch}, {decay})")
    start = {name: [group["lr"] for group in o.param_groups] for name, o in tuning.optimizers.items()}
    rows = []
    for i in range(iterations):
        left = min(1.0, (iterations - i) / max(1.0, decay * iterations))
        for name, optimizer in tuning.optimizers.items():
            for group, lr in zip(optimizer.param_groups, start[name], strict=True):
                group["lr"] = lr * max(0.02, left)
        try:
            report = tuning.iterate(batch, cond(i) if cond is not None else None, Draws(seed, i, range(batch)))
        except ValueError as error:
            raise ValueError(f"iteration {i + 1}: {error}") from error
        rows.append({name: float(number) for name, number in report.items()})
        if progress is not None:
            progress(i + 1, rows[-1])
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
