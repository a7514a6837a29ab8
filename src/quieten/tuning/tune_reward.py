"""Stretches of tuning to a reward: what the reward gains, less what leaving the first policy costs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..data import Dataset
from ..metrics import Protocol, Result
from ..noise import Noise
from .policy import Policy
from .reward import Reward, RewardTuning
from .tune_loop import Tuning

__all__ = ["RewardMeasure", "Rewarded", "told_only"]


class RewardMeasure:
    """What a policy is chosen by when it is tuned to a reward: the mean of minus the reward, of samples x.

    Arguments:
        reward: reward(x, **cond) -> (B,).
        data: What the model was trained on: the spread of samples is seen beside theirs, and classes are taken in turn.
        n: Samples of each measurement.
        name: Of the reward, for people.
        device: Where the reward is asked.

    Attributes:
        real: n examples (n, *).
        floor: The same of those examples: not a bound, only a comparison.
    """

    title = "tau x nats - reward"

    def __init__(self, reward: Reward, data: Dataset, n: int, name: str, device: torch.device | str = "cpu"):
        if n < 16:
            raise ValueError(f"`n` must be at least 16 samples (got {n})")
        self.reward, self.n, self.name, self.device = reward, n, name, device
        self.classes = len(data.classes) if data.labels is not None else 0
        index = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:n]
        self.real, label = data.batch(index)
        self.floor = self._of(self.real, {} if label is None or not self.classes else {"label": label})
        self.about = f"{self.title} ({name}), n={n}"

    def __call__(self, x: Tensor) -> Result:
        """Of samples x (n, *), classes in turn."""
        return self._of(x, {"label": torch.arange(len(x)) % self.classes} if self.classes else {})

    @torch.no_grad()
    def _of(self, x: Tensor, cond: dict[str, Tensor], batch: int = 250) -> Result:
        asked = []
        for rows in torch.arange(len(x)).split(batch):
            told = {name: c[rows].to(self.device) for name, c in cond.items()}
            asked.append(self.reward(x[rows].float().to(self.device), **told).detach().cpu().double().reshape(-1))
        values = torch.cat(asked)
        if len(values) != len(x):
            raise ValueError(f"`reward` must return one number for each of the {len(x)} samples (got {len(values)})")
        mean, error = float(values.mean()), float(values.std()) / math.sqrt(len(values))
        protocol = Protocol(len(x), self.name, None, "reward", self.name, "samples as they are", (0,), "ema")
        return Result("reward", -mean, error, protocol, {"reward": mean})


class Rewarded(Tuning):
    """`Tuning` by a reward: the best policy is that of the least tau x nats - reward, both measured on its own samples."""

    update: RewardTuning
    yardstick: RewardMeasure  # type: ignore[assignment]
    remedy = "the best policy is too: go on with a larger --tau1, or smaller learning rates, under another --name"

    def measure(self, x: Tensor) -> Result:
        found, (nats, error) = self.yardstick(x), self.nats()
        tau = self.update.settings.tau1 / (x[:1].numel() if self.update.settings.reduction == "mean" else 1)
        uncertainty = math.hypot(found.uncertainty or 0.0, tau * error)
        details = {**found.details, "nats": nats}
        return Result(self.yardstick.title, found.value + tau * nats, uncertainty, found.protocol, details)

    @torch.no_grad()
    def nats(self, n: int = 256) -> tuple[float, float]:
        """Divergence of a trajectory of the averaged policy from the first policy's, mean of n and its standard error."""
        policy: Policy = self.ema["policy"]  # type: ignore[index]
        n, device = min(n, self.yardstick.n), policy.denoiser.device
        cond = {"label": torch.arange(n, device=device) % self.yardstick.classes} if self.yardstick.classes else {}
        reference = self.update.reference
        assert reference is not None
        roll = policy.rollout(n, Noise(0, range(n)), cond)
        total = sum(policy.step(roll.states[k], k, **cond).kl(reference.step(roll.states[k], k, **cond)).double()
                    for k in range(policy.T))  # fmt: skip
        assert isinstance(total, Tensor)
        return float(total.mean()), float(total.std()) / math.sqrt(n)


def told_only(reward: Reward) -> Reward:
    """The reward, told of the conditions that it has arguments for, and of no others."""
    call: Callable[..., Any] = reward.forward if isinstance(reward, torch.nn.Module) else reward
    try:
        known = inspect.signature(call).parameters
    except (TypeError, ValueError):  # built in: nothing to see
        return reward
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        return reward
    return lambda x, **cond: reward(x, **{name: c for name, c in cond.items() if name in known})
