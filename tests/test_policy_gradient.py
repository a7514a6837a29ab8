"""What DxMI is compared with: policy gradients are unbiased, the right bound holds back, and all of them run in one loop."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from dxmi_toys import Quadratics, affine_policy, evaluated
from helpers import refuses, within
from quieten import VE, Draws, Preconditioned, karras
from quieten.imitation import MaxEntIRL, Settings
from quieten.networks.mlp import MLP
from quieten.tuning.energies import PerceptronValue
from quieten.tuning.pairs import gathered
from quieten.tuning.policy import Policy, Rollout
from quieten.tuning.policy_gradient import METHODS, FullGradient, PolicyGradient

A, B, RHO = (torch.tensor(t, dtype=torch.float64) for t in ([0.7, 0.9], [0.2, -0.1], [0.6, 0.4]))
KAPPA, M = 2.0, 0.4


def fifth_order(n: int) -> Tensor:
    """Rows (6^n, n) whose moments are a normal's up to the fifth: -sqrt 3, sqrt 3, and four times 0."""
    root = 3.0**0.5
    return torch.tensor(list(product((-root, root, 0.0, 0.0, 0.0, 0.0), repeat=n)), dtype=torch.float64)


class Nodes:
    """In place of `Draws`: the given normals of each step."""

    def __init__(self, noise: Tensor):
        self.noise = noise

    def __len__(self) -> int:
        return len(self.noise)

    def normal(self, like: Tensor, tag: str) -> Tensor:
        return self.noise[:, int(tag.rsplit(" ", 1)[1])][:, None]


def energy() -> Quadratics:
    ones = torch.ones(3, dtype=torch.float64)
    return Quadratics(KAPPA * ones, -KAPPA * M * ones, 0.5 * KAPPA * M * M * ones)


def ready(kind, value=None, **options) -> tuple[MaxEntIRL, Rollout, Tensor]:
    """An update, exact trajectories of its policy by moments, and their noise."""
    policy = affine_policy(A, B, RHO)
    node = fifth_order(3)
    roll = policy.rollout(0.3 + 1.1 * node[:, :1], lambda k, like: node[:, k + 1 : k + 2])
    settings = Settings(gamma=0.0, tau1=0.0, tau2=0.0, reduction="sum", policy_clip=None, n_generator="all", time_cost=None)
    return kind(policy, energy() if value is None else value, settings=settings, **options), roll, node[:, 1:]


def gradient(irl: MaxEntIRL, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [irl.policy.denoiser.A, irl.policy.denoiser.b, irl.policy.log_std]))


def pg_gradient(irl: PolicyGradient, roll: Rollout, old: list[Tensor] | None = None) -> list[Tensor]:
    """T times the mean over all pairs: the sum over steps."""
    pairs = gathered([roll], torch.arange(2 * len(roll.final)), 2)
    irl._known = ([irl._advantages(roll)], [irl._log_probs(roll)] if old is None else old)
    return gradient(irl, 2 * irl._policy_loss(pairs, Draws(0, 0, range(len(roll.final))), 0))


@pytest.mark.parametrize("baseline", ["none", "exact"])
@pytest.mark.parametrize("ratio", [None, 0.2])
def test_policy_gradients_are_those_through_time(baseline, ratio):
    policy = affine_policy(A, B, RHO)
    K, G, C = evaluated(KAPPA, -KAPPA * M, 0.5 * KAPPA * M * M, policy, torch.ones(2), 0.0, 0.0)
    hide = torch.tensor([0.0, 0.0, 1.0]) if baseline == "none" else torch.ones(3)
    value = Quadratics(K * hide, G * hide, C * hide)
    irl, roll, _ = ready(PolicyGradient, value, clip_ratio=ratio)
    full, _, noise = ready(FullGradient)
    theirs = gradient(full, full.path_cost(roll.states[0], Nodes(noise)).mean())
    for name, ours, other in zip(("A", "b", "rho"), pg_gradient(irl, roll), theirs, strict=True):
        within(1e-10, (ours - other).abs().max(), name)


def test_the_loss_is_the_published_one():
    irl, roll, _ = ready(PolicyGradient)
    pairs = gathered([roll], torch.randperm(2 * len(roll.final)), 2)
    irl._known = ([irl._advantages(roll)], [])
    wanted = 0.0
    for k in range(2):
        p = irl.policy.step(roll.states[k], k)
        logs = torch.distributions.Normal(p.mean, p.var.sqrt()).log_prob(roll.states[k + 1]).sum(1)
        wanted = wanted + ((irl.value(roll.final, 2) - irl.value(roll.states[k], k)).detach() * logs).mean() / 2
    ours = irl._policy_loss(pairs, Draws(0, 0, range(len(roll.final))), 0)
    within(1e-12, (ours - wanted).detach().abs(), "loss")


def test_the_baseline_learns_the_energy_at_the_end():
    irl, roll, _ = ready(PolicyGradient)
    losses = [(irl.value(roll.states[k], k) - irl.value(roll.final, 2).detach()).square().mean() for k in range(2)]
    wanted = torch.autograd.grad(sum(losses), list(irl.value.parameters()))
    irl.optimizers["value"] = torch.optim.SGD(irl.value.parameters(), lr=1.0)
    before = [p.detach().clone() for p in irl.value.parameters()]
    told = irl._value_steps(roll, Draws(0, 0, range(216)), None, 0)
    for a, p, g in zip(before, irl.value.parameters(), wanted, strict=True):
        torch.testing.assert_close(a - p, g)
    torch.testing.assert_close(told["value_loss"], torch.stack(losses).detach())


@pytest.mark.parametrize("compat", [None, "official"])
def test_the_right_bound_holds_back_and_the_official_one_does_not(compat):
    """Where a step is dearer than expected and its likelihood has fallen enough, there is nothing left to push."""
    irl, roll, _ = ready(PolicyGradient, clip_ratio=0.2, compat=compat)
    now = irl._log_probs(roll)
    pairs = gathered([roll], torch.arange(2 * len(roll.final)), 2)
    for cost, shift, held in ((1.0, -0.5, True), (1.0, 0.5, False), (-1.0, 0.5, True), (-1.0, -0.5, False)):
        irl._known = ([cost * torch.rand_like(now)], [now - shift])  # likelihoods are exp(shift) times what they were
        g = gradient(irl, irl._policy_loss(pairs, Draws(0, 0, range(216)), 0))
        pushes = any(bool(t.abs().max() > 1e-8) for t in g)
        assert pushes != (held if compat is None else not held), (cost, shift)


@pytest.mark.parametrize("method", [*METHODS, "sft-ppo"])
@pytest.mark.parametrize("separate", [False, True])
def test_all_of_them_run_in_one_loop(method, separate):
    torch.manual_seed(1)
    policy = Policy(Preconditioned(MLP(2, 16, 1), VE, shape=(2,)), karras(3, 0.1, 3.0))
    value = PerceptronValue(2, 3, width=16, depth=1, terminal=not separate)
    energy = PerceptronValue(2, None, width=16, depth=1) if separate else None
    kind, options = (PolicyGradient, {"clip_ratio": 0.2}) if method == "sft-ppo" else (METHODS[method], {})
    irl = kind(policy, value, energy, Settings(lr_policy=1e-3, lr_value=1e-3, time_cost=None), **options)
    before = [p.detach().clone() for p in policy.parameters()]
    for i in range(2):
        told = irl.iterate(torch.randn(32, 2), None, Draws(0, i, range(32)))
    assert {"policy_loss", "policy_norm", "clipped", "e_policy", "value_loss", "explained"} <= set(told)
    assert all(bool(t.isfinite().all()) for t in told.values())
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_bad_input():
    policy, value = affine_policy(A, B, RHO), nn.Linear(1, 1)
    with refuses("`clip_ratio`", "1.5"):
        PolicyGradient(policy, value, clip_ratio=1.5)
    with refuses("`compat`", "'code'"):
        PolicyGradient(policy, value, compat="code")
