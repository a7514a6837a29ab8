r"""What DxMI is compared with: policy gradients, and back-propagation through all the steps.

They share its rollouts, energies and optimisers and differ in how the value or the policy learns, so that the same loop
trains them.

References:
    | Optimizing DDPM Sampling with Shortcut Fine-Tuning (Fan, Lee, 2023): SFT-PG
    | https://arxiv.org/abs/2301.13362
    | Proximal Policy Optimization Algorithms (Schulman et al., 2017), eq. 7
    | https://arxiv.org/abs/1707.06347
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..denoiser import evaluating
from ..imitation import MaxEntIRL
from ..noise import Draws
from .critics import column, explained, frozen, mean
from .descent import Average
from .pairs import Pairs, keyed
from .policy import Policy, Rollout
from .settings import Settings

__all__ = ["METHODS", "FullGradient", "PolicyGradient"]


class PolicyGradient(MaxEntIRL):
    r"""SFT-PG: the policy learns from how likely it finds steps that turned out better than expected.

    The value is a baseline, fitted to the energy at the end by T times the mean squared error over all states at once. With
    the cost advantage A = E(x_T) - V(x_k, k), the policy minimises the mean of A log pi_k(x_{k+1} | x_k), or with a
    `clip_ratio` (SFT-PPO) that of max(r A, clip(r, 1 - c, 1 + c) A), r = pi_k / pi_k before the iteration. Entropies, running
    and time costs play no part.

    Arguments:
        policy: As in `MaxEntIRL`.
        value: The baseline, V(x, k).
        energy: As in `MaxEntIRL`; None takes V(., T), which the policy then is not asked about at T.
        settings: gamma = 0 is the published energy loss. `reduction` says whether log-densities are sums or means over
            dimensions, the official code's. The states are those of `n_generator` minibatches; "all" takes each once.
        clip_ratio: 0.2 in SFT-PPO; None is SFT-PG.
        compat: "official" takes the minimum of the two terms of SFT-PPO: the right bound for a reward that is maximised, which
            for a cost that is minimised never holds the policy back.
        **options: As in `MaxEntIRL`.
    """

    def __init__(
        self,
        policy: Policy,
        value: nn.Module,
        energy: nn.Module | None = None,
        settings: Settings = Settings(gamma=0.0),  # noqa: B008, frozen
        *,
        clip_ratio: float | None = None,
        compat: Literal["official"] | None = None,
        **options: Any,
    ):
        super().__init__(policy, value, energy, settings, **options)
        if clip_ratio is not None and not 0 < clip_ratio < 1:
            raise ValueError(f"`clip_ratio` must lie in (0, 1) (got {clip_ratio})")
        if compat not in (None, "official"):
            raise ValueError(f"`compat` must be 'official' or None (got {compat!r})")
        self.clip_ratio, self.compat = clip_ratio, compat
        self._known: tuple[list[Tensor], list[Tensor]] = ([], [])

    def improve(self, rollouts: Sequence[Rollout], draws: Draws, average: Average | None = None) -> dict[str, Tensor]:
        self._known = ([self._advantages(roll) for roll in rollouts], [])
        if self.clip_ratio is not None:
            self._known[1].extend(self._log_probs(roll) for roll in rollouts)
        try:
            return super().improve(rollouts, draws, average)
        finally:
            self._known = ([], [])

    def _value_steps(
        self, roll: Rollout, draws: Draws, average: Average | None, turn: int, known: Tensor | None = None
    ) -> dict[str, Tensor]:
        """One step on T MSE(V(x_k, k), E(x_T)), all states at once: the graphs of one k at a time are kept."""
        T, told = self.policy.T, {name: roll.moves.new_zeros(self.policy.T) for name in ("value", "value_loss", "explained")}
        target = self._finals(roll) if known is None else known
        self._look(target, "the energy of the samples", average)

        def losses() -> Any:
            for k in range(T):
                v = column(self.value(roll.states[k], k, **roll.cond), target, "value")
                loss = mean((v - target).square())
                told["value"][k], told["value_loss"][k] = mean(v.detach()), loss.detach()
                told["explained"][k] = explained(target, v)
                yield loss

        self.value.train()
        self._descend("value", losses(), self.settings.value_clip, average)
        dims = max(1, roll.final[:1].numel()) if self.settings.reduction == "sum" else 1
        told["running_cost"] = torch.stack([mean(self.auxiliary.of(roll, k)) / dims for k in range(T)])
        return told

    @torch.no_grad()
    def _finals(self, roll: Rollout) -> Tensor:
        """E(x_T): (B,)."""
        with evaluating(self.value if self.energy is None else self.energy):
            return self.energy_of(roll.final, **roll.cond)

    @torch.no_grad()
    def _advantages(self, roll: Rollout) -> Tensor:
        """E(x_T) - V(x_k, k): (T, B)."""
        final = self._finals(roll)
        with evaluating(self.value):
            values = [column(self.value(roll.states[k], k, **roll.cond), final, "value") for k in range(self.policy.T)]
        return torch.stack([final - v for v in values])

    @torch.no_grad()
    def _log_probs(self, roll: Rollout) -> Tensor:
        """log pi_k of the steps that were taken, by the policy as it is: (T, B)."""
        how = self.settings.reduction
        with evaluating(self.policy):
            return torch.stack(
                [self.policy.log_prob(roll.states[k], roll.states[k + 1], k, how, **roll.cond) for k in range(self.policy.T)]
            )

    def _policy_loss(self, pairs: Pairs, draws: Draws, turn: int) -> Tensor:
        self.policy.train()
        k = pairs.k.to(pairs.x.device)
        logs = self.policy.log_prob(pairs.x, pairs.next(), k, self.settings.reduction, **pairs.cond)
        cost = pairs.pick(self._known[0])
        if self.clip_ratio is None:
            return mean(cost * logs)
        ratio = (logs - pairs.pick(self._known[1])).exp()
        held = ratio.clamp(1.0 - self.clip_ratio, 1.0 + self.clip_ratio)
        worse = torch.minimum if self.compat == "official" else torch.maximum
        return mean(worse(ratio * cost, held * cost))


class FullGradient(MaxEntIRL):
    """The reference for few steps: the policy's gradient goes back through the whole trajectory.

    It minimises what DxMI does, E(x_T) and the costs of all steps, on fresh trajectories; the value is not asked. Memory grows
    with T.
    """

    def improve(self, rollouts: Sequence[Rollout], draws: Draws, average: Average | None = None) -> dict[str, Tensor]:
        roll = rollouts[-1]
        self.policy.train()
        with frozen(self.value, self.energy):
            loss = mean(self.path_cost(roll.states[0], draws, roll.cond))
            norm = self._descend("policy", loss, self.settings.policy_clip, average)
        clip = self.settings.policy_clip
        clipped = torch.zeros_like(norm) if clip is None else (norm > clip).to(norm)
        return {"policy_loss": loss.detach(), "policy_norm": norm, "clipped": clipped}

    def path_cost(self, x: Tensor, draws: Draws, cond: Mapping[str, Any] | None = None) -> Tensor:
        """J of fresh trajectories, with a graph: E(x_T) and what their steps cost, (B,).

        Arguments:
            x: First states x_0 (B, *).
            draws: Their randomness.
            cond: Conditions by name, each (B, ...).
        """
        cond, T = cond or {}, self.policy.T
        total, noise = x.new_zeros(len(x)), keyed(draws, "path")
        for k in range(T):
            p = self.policy.step(x, k, **cond)
            x_next = p.sample(noise(k, x))
            costs = self._step_costs(x, k, p, x_next, cond)
            if costs is not None and k < T - self.settings.skip_sampler_tau:
                total = total + costs
            x = x_next
        return total + self._next_value(x, T, cond)


METHODS: dict[str, type[MaxEntIRL]] = {"dxmi": MaxEntIRL, "sft-pg": PolicyGradient, "bptt": FullGradient}
"""Ways of tuning by name; SFT-PPO is "sft-pg" with `clip_ratio`=0.2."""
