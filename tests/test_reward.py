"""Tuning to a reward: the cost of leaving the reference, and the exact tilt of a linear-Gaussian chain."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from helpers import refuses, within
from quieten.denoiser import Denoiser
from quieten.gaussian import Gaussian
from quieten.noise import Draws
from quieten.oracle import GaussianData
from quieten.process import VP, Level
from quieten.tuning.policy import Policy
from quieten.tuning.reward import RewardEnergy, RewardTuning, load_reward, reward_settings, tune_to_reward

LAMS = torch.tensor([-3.0, -1.0, 0.5, math.inf], dtype=torch.float64)
T = len(LAMS) - 1


class Affine(Denoiser):
    """x0 = a_k x + b_k: its policies have affine means, of free slope and shift in each step."""

    process = VP
    shape = (2,)

    def __init__(self) -> None:
        super().__init__()
        data = GaussianData(torch.tensor([0.3, -0.2]), torch.tensor(0.8), VP)
        zero = torch.zeros(1, 2, dtype=torch.float64)
        means = [(data(zero, lam).mean[0], data(zero + 1, lam).mean[0]) for lam in LAMS[:-1].tolist()]
        self.a = nn.Parameter(torch.stack([one - at for at, one in means]).double())
        self.b = nn.Parameter(torch.stack([at for at, _ in means]).double())

    def forward(self, x: Tensor, lam: Level, **cond: object) -> Gaussian:
        if isinstance(lam, Tensor):
            k = (lam.reshape(-1, 1).to(LAMS) - LAMS[:-1]).abs().argmin(1)
        else:
            k = (lam - LAMS[:-1]).abs().argmin()
        return Gaussian(self.a[k] * x + self.b[k])


class Quadratic(nn.Module):
    """V(x, k) = sum of h_k x^2 / 2 + g_k x, plus c_k; with `terminal`, of samples too."""

    T = T

    def __init__(self, terminal: bool = False) -> None:
        super().__init__()
        self.terminal = terminal
        self.h, self.g = (nn.Parameter(torch.zeros(T + 1, 2).double()) for _ in range(2))
        self.c = nn.Parameter(torch.zeros(T + 1).double())

    def forward(self, x: Tensor, k: int | Tensor, **cond: object) -> Tensor:
        return (0.5 * self.h[k] * x.square() + self.g[k] * x).sum(-1) + self.c[k]


def chain(policy: Policy) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(A, b, rho^2) of each step, per dimension."""
    zero, out = torch.zeros(1, 2, dtype=torch.float64), []
    with torch.no_grad():
        for k in range(policy.T):
            at, one = policy.step(zero, k), policy.step(zero + 1, k)
            out.append(((one.mean - at.mean)[0], at.mean[0], at.var.expand(1, 2)[0].double()))
    return out


def tilted(reference: list[tuple[Tensor, Tensor, Tensor]], kappa: float, m: Tensor, tau: float):
    """Spec: the exact optimum for the reward -kappa (x_T - m)^2 / 2, step by step from the last: (A, b, variance)."""
    K, G, out = kappa * torch.ones(2).double(), -kappa * m, []
    for A, b, var in reversed(reference):
        d = 1 + K * var / tau
        new = 1 / (1 / var + K / tau)
        out.append((new * A / var, new * (b / var - G / tau), new))
        K, G = A**2 * K / d, A * (K * b + G) / d
    return out[::-1]


def built() -> Policy:
    return Policy(Affine(), LAMS, trained="all", std=torch.tensor([0.8, 0.6, 0.4]).double()).double()


@pytest.mark.parametrize("differentiable", [True, False])
def test_converges_to_the_exact_tilt(differentiable: bool, one_thread: None) -> None:
    m, kappa, tau = torch.tensor([1.5, -1.0]).double(), 1.0, 0.5
    policy = built()
    reference = chain(policy)

    def reward(x: Tensor) -> Tensor:
        x = x if differentiable else x.detach()
        return -0.5 * kappa * (x - m).square().sum(1)

    settings = reward_settings(tau, lr=0.03, lr_std=0.03, lr_value=0.1, policy_clip=None, betas=(0.8, 0.99))
    value = Quadratic(terminal=not differentiable)
    tuning = RewardTuning(policy, reward, value, differentiable=differentiable, settings=settings)
    rows = tune_to_reward(tuning, 700, 256, decay=0.8)
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.3
    for k, (got, want) in enumerate(zip(chain(policy), tilted(reference, kappa, m, tau), strict=True)):
        for g, w, what in zip(got, want, ("slope", "shift", "variance"), strict=True):
            within(1e-2, (g - w).abs().max(), f"step {k}, {what}")


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_leaving_costs_the_stated_form(reduction: str) -> None:
    """log(rho_ref / rho) + (rho^2 + (m - m_ref)^2) / (2 rho_ref^2) - 1/2 of each dimension, and "nats" their sum."""
    policy = built()
    tuning = RewardTuning(policy, lambda x: x.sum(1), Quadratic(), settings=reward_settings(0.1, reduction=reduction))  # type: ignore[arg-type]
    with torch.no_grad():
        policy.log_std.add_(torch.tensor([0.2, -0.1, 0.3]))
        policy.denoiser.b.add_(0.1)
    x = torch.randn(5, 2, dtype=torch.float64)
    for k in range(T):
        p, ref = policy.step(x, k), tuning.reference.step(x, k)
        rho, rho_ref = p.var.sqrt(), ref.var.sqrt()
        each = torch.log(rho_ref / rho) + (rho**2 + (p.mean - ref.mean) ** 2) / (2 * rho_ref**2) - 0.5
        want = each.sum(1) if reduction == "sum" else each.mean(1)
        within(1e-12, (tuning._divergence(x, k, p, {}) - want).detach().abs().max(), f"cost of step {k}")
        within(1e-12, (tuning._nats[k] - each.sum(1).mean()).detach().abs(), "its nats")
        assert tuning._divergence(x, k, ref, {}).abs().max() == 0


def test_starts_at_the_reference_and_leaves_it_alone() -> None:
    policy = built().float()
    before = [p.clone() for p in policy.parameters()]
    tuning = RewardTuning(policy, lambda x: x.sum(1), settings=reward_settings(lr=0.01, lr_std=0.01))
    first = tuning.iterate(torch.zeros(64, 2), draws=Draws(0, 0, range(64)))
    assert float(first["nats"]) == pytest.approx(0.0, abs=1e-6)
    second = tuning.iterate(torch.zeros(64, 2), draws=Draws(0, 1, range(64)))
    assert float(second["nats"]) > 1e-5
    assert all(torch.equal(a, b) for a, b in zip(before, tuning.reference.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    assert all(p.requires_grad for p in tuning.value.parameters())


@pytest.mark.parametrize("terminal, resample, asked", [(True, False, 1), (True, True, 1), (False, False, 1), (False, True, 2)])
def test_the_reward_is_asked_once_in_an_iteration_of_the_value(terminal: bool, resample: bool, asked: int) -> None:
    """A reward may be people, or a large network: again only for states that are drawn anew."""
    calls: list[Tensor] = []

    def reward(x: Tensor) -> Tensor:
        calls.append(x)
        return x.sum(1)

    settings = reward_settings(value_resample=resample, repeat_value_update=1)
    tuning = RewardTuning(built(), reward, Quadratic(terminal), differentiable=not terminal, settings=settings)
    x0, draws = torch.zeros(6, 2, dtype=torch.float64), Draws(0, 0, range(6))
    roll, told = tuning.critic(x0, {}, draws)
    assert len(calls) == asked
    assert torch.equal(calls[0], roll.final)
    within(1e-12, (told["reward"] - roll.final.sum(1).mean()).abs(), "mean reward")


def test_value_may_learn_before_the_policy(one_thread: None) -> None:
    policy = built().float()
    before = [p.clone() for p in policy.parameters()]
    tuning = RewardTuning(policy, lambda x: x.sum(1), settings=reward_settings(lr=0.01))
    value = [p.clone() for p in tuning.value.parameters()]
    rows = tune_to_reward(tuning, 3, 16, head_start=3)
    assert [row["nats"] for row in rows] == [0.0] * 3
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(value, tuning.value.parameters(), strict=True))
    tune_to_reward(tuning, 3, 16, head_start=2)
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_conditions_stay_with_their_rows() -> None:
    """The reward looks for the label that the network was told: any permuted row would show."""

    class Labelled(Affine):
        def forward(self, x: Tensor, lam: Level, label: Tensor | None = None, **cond: object) -> Gaussian:
            assert label is not None
            return Gaussian(super().forward(x, lam).mean * 0 + label.to(x)[:, None])

    seen = []

    def reward(x: Tensor, label: Tensor) -> Tensor:
        seen.append((x - label[:, None]).detach().abs().max())
        return x.sum(1)

    policy = Policy(Labelled(), LAMS, trained="all", std=torch.tensor([0.5, 0.5, 1e-3]).double()).float()
    tuning = RewardTuning(policy, reward)
    for step in range(3):
        tuning.iterate(torch.zeros(40, 2), {"label": torch.arange(40)}, Draws(0, step, range(40)))
    assert max(map(float, seen)) < 0.02


def test_bias_is_zero_where_the_start_tells_nothing() -> None:
    """V^0 is constant when every step forgets where it came from, and is not when it remembers."""

    def bias(slope: float) -> float:
        policy = built()
        with torch.no_grad():
            lams = LAMS[:-1].tolist()
            for k in range(T):  # cancel the state's own share, then set the slope of the mean
                at, one = (policy.step(torch.full((1, 2), v).double(), k).mean for v in (0.0, 1.0))
                b = policy.denoiser.process.coefficients(lams[k], float(LAMS[k + 1]), 1.0)[1]
                policy.denoiser.a[k] += (slope - (one - at)[0]) / b
        settings = reward_settings(1.0, lr=0.0, lr_std=0.0, lr_value=0.05)
        tuning = RewardTuning(policy.float(), lambda x: x.sum(1), Quadratic().float(), settings=settings)
        return tune_to_reward(tuning, 150, 256)[-1]["bias"]

    assert bias(0.0) < 0.1
    assert bias(0.9) == pytest.approx(math.sqrt(2) * 0.9**T, rel=0.2)


def test_a_module_of_a_reward_is_frozen_and_evaluates() -> None:
    net = nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.5))
    energy = RewardEnergy(net)
    energy.train()
    x = torch.ones(4, 2, requires_grad=True)
    assert torch.equal(energy(x), energy(x))
    assert torch.allclose(torch.autograd.grad(energy(x).sum(), x)[0], -net[0].weight.expand(4, 2))
    assert not any(p.requires_grad for p in net.parameters())
    assert not RewardEnergy(net, differentiable=False)(x).requires_grad


def test_refusals(tmp_path, monkeypatch) -> None:
    policy, x0 = built().float(), torch.zeros(8, 2)
    with refuses("`reward`", "differentiable=False"):
        RewardTuning(policy, lambda x: x.detach().sum(1)).iterate(x0)
    with refuses("not finite"):
        RewardTuning(policy, lambda x: x.sum(1) / 0).iterate(x0)
    with refuses("not finite", "iteration 0"):
        tune_to_reward(RewardTuning(policy, lambda x: x.sum(1) / 0), 2, 8)
    with refuses("one number per example"):
        RewardTuning(policy, lambda x: x).iterate(x0)
    with refuses("`tau`"):
        reward_settings(0.0)
    with refuses("`value`", "terminal=True"):
        RewardTuning(policy, lambda x: x.sum(1), Quadratic(), differentiable=False)
    with refuses("`iterations`"):
        tune_to_reward(RewardTuning(policy, lambda x: x.sum(1)), 0, 8)
    frozen = Policy(GaussianData(torch.zeros(2), 1.0, VP), LAMS, trained="none")
    with refuses("nothing to train"):
        RewardTuning(frozen, lambda x: x.sum(1))
    other = Policy(GaussianData(torch.zeros(2), 1.0, VP), LAMS[1:], trained="none")
    with refuses("`reference`"):
        RewardTuning(policy, lambda x: x.sum(1), reference=other)
    from quieten.tuning.energies import PerceptronValue

    with refuses("`value`", "7 steps"):
        RewardTuning(policy, lambda x: x.sum(1), PerceptronValue(2, T=7))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_rewards_for_a_test.py").write_text("def bright(x):\n    return x.flatten(1).mean(1)\nnumber = 3\n")
    assert load_reward("own_rewards_for_a_test:bright")(torch.ones(2, 3)).tolist() == [1.0, 1.0]
    for wrong in ("brightness", "own_rewards_for_a_test:dark", "no_such_module_here:f", "own_rewards_for_a_test:number"):
        with refuses("--reward", wrong):
            load_reward(wrong)


@pytest.mark.parametrize("differentiable", [True, False])
def test_a_reward_that_is_no_number_is_named(differentiable):
    tuning = RewardTuning(Policy(Affine().float(), LAMS), lambda x: x.sum(1) * math.nan, differentiable=differentiable)
    with refuses("`reward` of the samples is not finite", "a number"):
        tuning.iterate(torch.zeros(4, 2))
