r"""DxMI: a policy and an energy learn from each other and from data, without back-propagation through time.

The energy learns to be low on data and high on the policy's samples, the value to predict the energy at the end of a
trajectory and what the way there costs, and the policy to step where the value is low while keeping its noise:

.. math:: \min_q \max_\pi KL(p \| q) - KL(\pi \| q), \qquad q \propto \exp(-E / \tau)

References:
    | Maximum Entropy Inverse Reinforcement Learning of Diffusion Models with Energy-Based Models (Yoon et al., 2024)
    | https://arxiv.org/abs/2407.00626
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .denoiser import evaluating
from .gaussian import Gaussian
from .guiding.value_guide import kicked
from .noise import INITIAL, Draws
from .tuning.critics import column, contrast, explained, follow, follower, frozen, largest, mean, spread
from .tuning.descent import Average, Descent
from .tuning.pairs import Pairs, checked, gathered, keyed, same_dtype, shared_uniforms, shuffled, unseeded
from .tuning.policy import Policy, Rollout
from .tuning.running_cost import Auxiliary, time_costs
from .tuning.settings import Settings, check_parts, optimizers

__all__ = ["MaxEntIRL", "Settings"]


class MaxEntIRL(Descent):
    r"""Policy, value and energy, and one iteration of their training at a time.

    Values and energies are modules called as value(x, k, **cond) -> (B,) or (B, 1), with x (B, *), k an int or int64 (B,)
    (None for an energy) and the conditions of the rows. Low is good. Two attributes are looked at where they exist: `T`, the
    number of steps a value was made for, and `terminal`, whether V(., T) means something.

    Arguments:
        policy: What is tuned, in place: those of its parameters that want gradients.
        value: V(x, k), the cost to go.
        energy: E(x). None takes E = V(., T), as for images. One without trainable parameters is a fixed cost (a negative
            reward): the energy step is left out, and a value with `terminal` True is fitted to it at k = T and used in its
            place, so that the cost itself need not be differentiable.
        settings: Everything else.
        s2: Initial variances of the auxiliary kernels, see `running_cost.Auxiliary`.
        reference: A policy of the same grid; then the divergence from its steps, tau1 KL(pi_k || ref_k), stands in place of
            entropy and running cost, in the value too.

    Attributes:
        optimizers: "policy" (its last group is the log standard deviations), "value", and "energy" if there is one to train.
        auxiliary: Holds s_k^2.
        sampler: The policy to use: the average over iterations, where `settings.ema` asks for it.
        iterations: How many have been made; set it when going on from a checkpoint.

    Raises:
        ValueError: For parts that do not belong together, or settings that make no sense for this policy.
    """

    COST: ClassVar[str] = "energy"
    """What an energy that nobody trains is called."""

    def __init__(
        self,
        policy: Policy,
        value: nn.Module,
        energy: nn.Module | None = None,
        settings: Settings = Settings(),  # noqa: B008, frozen
        *,
        s2: Tensor | str = "forward",
        reference: Policy | None = None,
    ):
        super().__init__()
        self.policy, self.value, self.energy, self.settings = policy, value, energy, settings
        self.reference = reference
        self.fixed = energy is not None and not any(p.requires_grad for p in energy.parameters())
        self.fits_terminal = self.fixed and bool(getattr(value, "terminal", False))
        check_parts(policy, value, energy, settings, reference, self.fixed)
        self.auxiliary = Auxiliary(policy, settings.cost, s2, settings.reduction)
        self.time_costs = time_costs(policy.T, settings.time_cost, settings.time_cost_scale, settings.compat)
        self.optimizers = optimizers(settings, policy, value, None if self.fixed else energy)
        self.target = follower(value) if settings.target_decay is not None else None
        self.policy_average = follower(policy) if settings.ema is not None else None
        self.value_average = follower(value) if settings.ema is not None else None

    @property
    def sampler(self) -> Policy:
        return self.policy if self.policy_average is None else self.policy_average

    def energy_of(self, x: Tensor, **cond: Any) -> Tensor:
        """E(x) of samples or data, (B,)."""
        if self.energy is None:
            return column(self.value(x, self.policy.T, **cond), x, "value")
        return column(self.energy(x, None, **cond), x, "energy")

    # -- an iteration

    def iterate(
        self, x0: Tensor, cond: Mapping[str, Tensor] | None = None, draws: Draws | None = None, average: Average | None = None
    ) -> dict[str, Tensor]:
        """One whole iteration: `n_critic` times rollout, velocities, energy and value, then the policy.

        Arguments:
            x0: Data (B, *); as many trajectories are drawn, under the same conditions.
            cond: Conditions by name, each (B, ...).
            draws: The iteration's randomness; None draws from torch's generator.
            average: Averages tensors in place over processes: gradients, and the velocities. None for a single process.

        Returns:
            What happened, without a graph: see `critic` and `improve`.

        Raises:
            ValueError: For data or conditions that do not fit, data of another dtype than the networks take, a value or an
                energy that does not depend on its parameters; and, on a CPU, as soon as an energy, a target, a value or a
                gradient is not finite. On other devices such a step is skipped, and `check` raises when it is asked.
        """
        cond = checked(cond, len(x0))
        if self.policy.shape is not None and tuple(x0.shape[1:]) != self.policy.shape:
            raise ValueError(f"`x0` must have shape (B, {', '.join(map(str, self.policy.shape))}) (got {tuple(x0.shape)})")
        draws = unseeded(len(x0)) if draws is None else draws
        with same_dtype(x0, self.policy.denoiser):
            return self._iterate(x0, cond, draws, average)

    def _iterate(self, x0: Tensor, cond: Mapping[str, Tensor], draws: Draws, average: Average | None) -> dict[str, Tensor]:
        rollouts, told = [], {}
        for turn in range(self.settings.n_critic):
            rollout, facts = self.critic(x0, cond, draws, average, turn)
            rollouts.append(rollout)
            told.update(facts)
        told.update(self.improve(rollouts, draws, average))
        self.iterations += 1
        self._follow()
        return told

    def critic(
        self, x0: Tensor, cond: Mapping[str, Tensor], draws: Draws, average: Average | None = None, turn: int = 0
    ) -> tuple[Rollout, dict[str, Tensor]]:
        """A rollout, and what `learn` makes of it (steps 1 to 4)."""
        scale = self.settings.explore * float(shared_uniforms(draws, f"explore {turn}", 1)) if self.settings.explore else 0.0
        rhos = self.policy.rhos

        def downhill(x: Tensor, k: int) -> Tensor:
            return kicked(self.value, x, k + 1, rhos[k], scale, cond)

        first, noise = self._first(x0, draws, turn), keyed(draws, f"rollout {turn}")
        roll = self.policy.rollout(first, noise, cond, then=downhill if scale else None)
        return roll, self.learn(x0, roll, draws, average, turn)

    def learn(
        self, x0: Tensor, roll: Rollout, draws: Draws, average: Average | None = None, turn: int = 0
    ) -> dict[str, Tensor]:
        """A step of the velocities, of the energy, and of the value for every k (steps 2 to 4).

        Returns:
            () unless said otherwise: energy_loss, e_data and e_policy (mean energies), gap (their difference), le_cam
            (-2 gamma L: 0 where samples match data, 1 where they are lost; absent without gamma), energy_range (largest |E|),
            spread and spread_data (standard deviation over the batch, mean over dimensions); for each step, (T,): s2, rho,
            running_cost (per dimension), value (before its step), value_loss, explained (share of the target's variance).
        """
        moved = roll.moves.sum(1) / max(1, roll.moves.shape[1])
        if average is not None:
            average([moved])
        if self.settings.avr is not None:
            self.auxiliary.adapt(moved, self.settings.avr)
        known = self._known_energy(roll, average)
        told = (
            self._energy_step(x0, roll, average) if known is None else {"e_policy": mean(known), "energy_range": largest(known)}
        )
        told.update(self._value_steps(roll, draws, average, turn, known))
        told["s2"], told["rho"] = self.auxiliary.s2.clone(), self.policy.rhos.clone()
        told["spread"], told["spread_data"] = spread(roll.final), spread(x0)
        return told

    def improve(self, rollouts: Sequence[Rollout], draws: Draws, average: Average | None = None) -> dict[str, Tensor]:
        """`n_generator` steps of the policy on random states of the trajectories (step 5).

        Returns:
            policy_loss, policy_norm (of the gradient) and clipped (share of the steps whose gradient was clipped), each ().
        """
        size, T = rollouts[0].moves.shape[1], self.policy.T
        turns = T * len(rollouts)
        count = turns if self.settings.n_generator == "all" else int(self.settings.n_generator)
        if count > turns:
            raise ValueError(f"`n_generator` must be at most T x n_critic = {turns} (got {count}): 'all' is that many")
        order, clip = shuffled(draws, turns, "pairs"), self.settings.policy_clip
        losses, norms = [], []
        with frozen(self.value, self.energy):
            for j in range(count):
                pairs = gathered(rollouts, order[j * size : (j + 1) * size], T)
                loss = self._policy_loss(pairs, draws, j)
                norms.append(self._descend("policy", loss, clip, average))
                losses.append(loss.detach())
        norm = torch.stack(norms)
        return {
            "policy_loss": torch.stack(losses).mean(),
            "policy_norm": norm.mean(),
            "clipped": (norm > (math.inf if clip is None else clip)).to(norm).mean(),
        }

    # -- its steps

    def _first(self, x0: Tensor, draws: Draws, turn: int) -> Tensor:
        """The initial states of the trajectories, as many as there are data."""
        return self.policy.prior(keyed(draws, f"rollout {turn}")(INITIAL, x0))

    @torch.no_grad()
    def _known_energy(self, roll: Rollout, average: Average | None) -> Tensor | None:
        """E(x_T) (B,) of an energy that nobody trains, asked once: it may be dear; None of one that is about to learn."""
        if not self.fixed or self.energy is None:
            return None
        with evaluating(self.energy):
            e = self.energy_of(roll.final, **roll.cond)
        self._look(roll.final, "a sample of the policy", average)
        self._look(e, f"`{self.COST}` of the samples", average, "it has to be a number for all that the policy may draw")
        return e

    def _energy_step(self, x0: Tensor, roll: Rollout, average: Average | None) -> dict[str, Tensor]:
        """The energy sees data and samples in one pass, and takes a step on `contrast`."""
        s, (name, net) = self.settings, ("value", self.value) if self.energy is None else ("energy", self.energy)
        net.train()
        e = self.energy_of(torch.cat([x0, roll.final.to(x0)]), **{key: torch.cat([c, c]) for key, c in roll.cond.items()})
        self._look(e, "the energy", average)
        data, drawn = e[: len(x0)], e[len(x0) :]
        loss = contrast(data, drawn, s.gamma)
        self._descend(name, loss, s.energy_clip, average)
        data, drawn, loss = mean(data.detach()), mean(drawn.detach()), loss.detach()
        told = {"energy_loss": loss, "e_data": data, "e_policy": drawn, "gap": data - drawn, "energy_range": largest(e)}
        return {**told, "le_cam": -2.0 * s.gamma * loss} if s.gamma else told

    def _value_steps(
        self, roll: Rollout, draws: Draws, average: Average | None, turn: int, known: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Sweeps over the steps, last first: V(x_k, k) towards what the next value and this step's costs add up to."""
        T, s = self.policy.T, self.settings
        last = T if self.fits_terminal else T - 1
        zero = roll.moves.new_zeros(T)
        told = {name: zero.clone() for name in ("value", "value_loss", "explained")}
        for sweep in range(s.repeat_value_update):
            ks = list(range(last, -1, -1))
            if s.value_update_order == "random":
                ks = [ks[i] for i in shared_uniforms(draws, f"order {turn} {sweep}", len(ks)).argsort().tolist()]
            for k in ks:
                facts = self._value_step(roll, k, keyed(draws, f"value {turn} {sweep}"), average, known)
                if k < T:
                    for name, fact in facts.items():
                        told[name][k] = fact
        dims = max(1, roll.final[:1].numel()) if s.reduction == "sum" else 1
        told["running_cost"] = torch.stack([mean(self.auxiliary.of(roll, k)) / dims for k in range(T)])
        return told

    def _value_step(
        self, roll: Rollout, k: int, noise: Any, average: Average | None, known: Tensor | None = None
    ) -> dict[str, Tensor]:
        x = roll.states[k]
        target = self._target_of(roll, k, noise, known)
        self._look(target, f"the target of the value at step {k}", average)
        self.value.train()
        v = column(self.value(x, k, **roll.cond), x, "value")
        loss = mean((v - target).square())
        self._descend("value", loss, self.settings.value_clip, average, f" at step {k}")
        return {"value": mean(v.detach()), "value_loss": loss.detach(), "explained": explained(target, v)}

    @torch.no_grad()
    def _target_of(self, roll: Rollout, k: int, noise: Any, known: Tensor | None = None) -> Tensor:
        """sg[V(x_{k+1}, k + 1)] + R(k) + costs of step k: (B,), of parameters that this very sweep has updated.

        `known` is E(x_T), where it is.
        """
        s, T = self.settings, self.policy.T
        if k == T:
            return self.energy_of(roll.final, **roll.cond) if known is None else known
        x, x_next = roll.states[k], roll.states[k + 1]
        resampled, counted = s.value_resample, self._costs_at(k)
        p = self._kernel(x, k, roll.cond) if resampled or (counted and self._needs_kernel) else Gaussian(x)
        if resampled:
            x_next = p.sample(noise(k, x))
        if k == T - 1 and known is not None and not resampled and not self.fits_terminal:
            g = known + self.time_costs[k]
        else:
            g = self._next_value(x_next, k + 1, roll.cond, as_target=True) + self.time_costs[k]
        if not counted:
            return g
        tau1, tau2 = s.tau1_at(self.iterations), s.tau2_at(self.iterations)
        if self.reference is not None:
            return g + tau1 * self._divergence(x, k, p, roll.cond)
        if s.velocity_in_value is not None and k < T - s.velocity_in_value:
            if s.analytic_cost:
                cost = self.auxiliary.expected(k, x, p)
            else:
                cost = self.auxiliary.cost(k, x, x_next) if resampled else self.auxiliary.of(roll, k)
            g = g + tau2 * cost
        if s.entropy_in_value is not None and k < T - s.entropy_in_value:
            g = g - tau1 * self._entropy(k, x, x_next, p)
        return g

    def _policy_loss(self, pairs: Pairs, draws: Draws, turn: int) -> Tensor:
        """The mean of V(x', k + 1) and what the step costs, for x' = m_k(x_k) + rho_k eps drawn with a graph."""
        x, k, cond = pairs.x, pairs.k.to(pairs.x.device), pairs.cond
        self.policy.train()
        p = self.policy.step(x, k, **cond)
        x_next = p.sample(draws.normal(x, f"policy {turn}")[pairs.places[1].to(x.device)])  # the noise of its row
        final = int((pairs.k == self.policy.T - 1).sum())
        v = self._next_value(x_next, k + 1, cond, final=final)
        costs = self._step_costs(x, k, p, x_next, cond)
        if costs is None:
            return mean(v)
        if self.settings.skip_sampler_tau:
            costs = costs * (k < self.policy.T - self.settings.skip_sampler_tau)
        return mean(v + costs)

    def _step_costs(self, x: Tensor, k: int | Tensor, p: Gaussian, x_next: Tensor, cond: Mapping[str, Any]) -> Tensor | None:
        """What a step of the policy costs, with a graph: (B,), or () where it is the same for all; None for nothing."""
        s = self.settings
        tau1, tau2 = s.tau1_at(self.iterations), s.tau2_at(self.iterations)
        if tau1 == tau2 == 0.0:
            return None
        if self.reference is not None:
            return tau1 * self._divergence(x, k, p, cond)
        moved = self.auxiliary.expected(k, x, p) if s.analytic_cost else self.auxiliary.cost(k, x, x_next)
        return tau2 * moved - tau1 * self._entropy(k, x, x_next, p)

    # -- what they are made of

    @property
    def _needs_kernel(self) -> bool:
        """Whether the costs of a drawn step need its kernel, and so the network once more."""
        s = self.settings
        entropy = s.entropy_in_value is not None and (s.entropy == "sampled" or self.policy.transition.from_kernel)
        return self.reference is not None or entropy or (s.analytic_cost and s.velocity_in_value is not None)

    def _costs_at(self, k: int) -> bool:
        """Whether the value of step k counts any cost but the time's."""
        s, T = self.settings, self.policy.T
        if self.reference is not None:
            return True
        return any(n is not None and k < T - n for n in (s.velocity_in_value, s.entropy_in_value))

    def _kernel(self, x: Tensor, k: int | Tensor, cond: Mapping[str, Any], policy: Policy | None = None) -> Gaussian:
        """A step in evaluation mode."""
        policy = self.policy if policy is None else policy
        with evaluating(policy):
            return policy.step(x, k, **cond)

    def _next_value(
        self, x: Tensor, k: int | Tensor, cond: Mapping[str, Any], as_target: bool = False, final: int = 0
    ) -> Tensor:
        """V(x, k), and E(x) at k = T where that is another network; with tensors, `final` rows at the end are at T."""
        net = self.target if as_target and self.target is not None else self.value
        net.eval()
        if self.energy is None or self.fits_terminal:
            return column(net(x, k, **cond), x, "value")
        self.energy.eval()
        if isinstance(k, int):
            if k == self.policy.T:
                return self.energy_of(x, **cond)
            return column(net(x, k, **cond), x, "value")
        n = len(x) - final
        head, tail = ({name: c[rows] for name, c in cond.items()} for rows in (slice(0, n), slice(n, None)))
        before = column(net(x[:n], k[:n], **head), x[:n], "value") if n else x.new_zeros(0)
        after = self.energy_of(x[n:], **tail) if final else x.new_zeros(0)
        return torch.cat([before, after.to(before)])

    def _entropy(self, k: int | Tensor, x: Tensor, x_next: Tensor, p: Gaussian) -> Tensor:
        """What tau1 multiplies: log rho_k, that and its constant, or -log pi_k of the drawn state; () or (B,)."""
        s, dims = self.settings, max(1, x[:1].numel())
        unit = float(dims) if s.reduction == "sum" else 1.0
        if s.entropy == "sampled":
            return -p.log_prob(x_next) * (unit / dims)
        logs = self.policy.log_rho(k, p).to(x)
        return unit * (logs + 0.5 * math.log(2.0 * math.pi * math.e) if s.entropy == "exact" else logs)

    def _divergence(self, x: Tensor, k: int | Tensor, p: Gaussian, cond: Mapping[str, Any]) -> Tensor:
        """KL(pi_k || ref_k): (B,)."""
        with torch.no_grad():
            ref = self._kernel(x, k, cond, self.reference)
        dims = max(1, x[:1].numel()) if self.settings.reduction == "mean" else 1
        return p.kl(ref) / dims

    def _follow(self) -> None:
        """Averages and the target network, after an iteration."""
        s = self.settings
        if self.target is not None and s.target_decay is not None:
            follow(self.target, self.value, s.target_decay)
        if self.policy_average is not None and self.value_average is not None and s.ema is not None:
            follow(self.policy_average, self.policy, s.ema)
            follow(self.value_average, self.value, s.ema)
