"""Policies: their steps are those of the transition they came from, with noise that can be trained."""

from __future__ import annotations

import math

import pytest
import torch

from helpers import affine, gaussian_data, refuses, within
from quieten import (
    FLOW,
    VE,
    VP,
    Ancestral,
    Denoiser,
    Draws,
    EulerMaruyama,
    Exponential,
    GaussianData,
    Heun,
    Noise,
    elbo,
    generate,
    karras,
)
from quieten.gaussian import Gaussian
from quieten.likelihoods.decoders import Plain
from quieten.tuning.policy import Policy
from quieten.tuning.running_cost import Auxiliary
from quieten.tuning.tuned import FLOOR

PROCESSES = [VP, VE, FLOW]


def grid_of(steps: int, process=VE) -> torch.Tensor:
    return karras(steps, 0.02, 20.0)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("kind", ["vector", "image"])
def test_a_policy_starts_as_its_transition(process, kind):
    data = gaussian_data(kind, process)
    policy = Policy(data, grid_of(4), trained="all")
    policy.double()
    lams = policy.grid.tolist()
    x = torch.randn(3, *data.shape, dtype=torch.float64)
    for k in range(4):
        kernel = Ancestral(spread=False)(data, x, lams[k], lams[k + 1]).p
        p = policy.step(x, k)
        within(1e-12, (p.mean - kernel.mean).detach().abs().max(), f"mean of step {k}")
        wanted = float(kernel.var.sqrt()) if k < 3 else 1e-3
        within(1e-14, abs(float(p.var.detach().sqrt()) / wanted - 1), f"std of step {k}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per", ["step", "pixel"])
@pytest.mark.parametrize("transition", [None, EulerMaruyama()], ids=["together", "one by one"])
@pytest.mark.parametrize("kind", ["vector", "image"])
def test_rows_of_different_steps_are_those_steps(kind, transition, per, dtype):
    data = gaussian_data(kind, VP)
    std = torch.rand(4, *(data.shape if per == "pixel" else ())) + 0.1
    policy = Policy(data, grid_of(4), transition, std=std.to(dtype))
    assert policy.transition.takes_rows == (transition is None)
    k = torch.tensor([3, 0, 2, 2, 1])
    x, x_next = torch.randn(2, 5, *data.shape, dtype=dtype)
    p, logs = policy.step(x, k), policy.log_prob(x, x_next, k)
    assert p.mean.dtype == dtype
    for row, step in enumerate(k.tolist()):
        alone = policy.step(x[row : row + 1], step)
        torch.testing.assert_close(p.mean[row], alone.mean[0])
        torch.testing.assert_close(p.var.expand_as(x)[row], alone.var.expand_as(x[:1])[0])
        torch.testing.assert_close(logs[row], alone.log_prob(x_next[row : row + 1])[0])
        torch.testing.assert_close(policy.log_rho(k, p)[row], policy.log_rho(step, alone))


@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("kind", ["vector", "image"])
def test_a_rollout_is_what_generate_draws(kind, n):
    policy = Policy(gaussian_data(kind, VE), grid_of(5))
    roll = policy.rollout(n, Noise(3, range(n)))
    assert roll.states.shape == (6, n, *policy.shape)
    assert not roll.states.requires_grad
    drawn = generate(policy.denoiser, n, grid=policy.grid, transition=policy.transition, last="draw", seed=3, batch=2)
    torch.testing.assert_close(roll.final, drawn, rtol=1e-5, atol=1e-5)
    moved = (roll.states[1:] - roll.states[:-1]).square().flatten(2).mean(2)
    torch.testing.assert_close(roll.moves, moved)


def test_only_the_steps_that_are_trained_have_a_gradient():
    for trained, free in {"none": 0, "all": 5, "fix_last": 4, "fix_last3": 2}.items():
        policy = Policy(gaussian_data("vector", VE), grid_of(5), trained=trained)
        p = policy.step(torch.randn(5, 5), torch.arange(5))
        if free:
            p.sample(torch.randn(5, 5)).square().sum().backward()
            assert (policy.log_std.grad != 0).tolist() == [True] * free + [False] * (5 - free)
        else:
            assert not policy.log_std.requires_grad
            assert not p.var.requires_grad
        with torch.no_grad():
            policy.log_std.add_(1.0)
        raised = torch.tensor([1.0] * free + [0.0] * (5 - free), dtype=torch.float64)
        torch.testing.assert_close(policy.rhos.log() - policy.transition.start, raised)


def test_the_entropy_has_a_floor_without_gradient():
    policy = Policy(gaussian_data("vector", VE), grid_of(2), std=torch.tensor([1e-6, 0.5]), trained="all")
    logs = torch.stack([policy.log_rho(k, policy.step(torch.zeros(1, 5), k)) for k in (0, 1)])
    torch.testing.assert_close(logs, torch.tensor([FLOOR, 0.5]).log())
    logs.sum().backward()
    assert policy.log_std.grad.tolist() == [0.0, 1.0]


def test_trained_noise_counts_in_the_likelihood():
    policy = Policy(gaussian_data("vector", VE), grid_of(3), trained="all")
    with torch.no_grad():
        policy.log_std.add_(math.log(2.0))
    x, x_next = torch.randn(2, 4, 5)
    p = policy.step(x, 1)
    wanted = torch.distributions.Normal(p.mean, policy.rhos[1].float()).log_prob(x_next)
    torch.testing.assert_close(policy.log_prob(x, x_next, 1), wanted.sum(1))
    torch.testing.assert_close(policy.log_prob(x, x_next, 1, "mean"), wanted.mean(1))


def test_the_bound_of_a_policy_is_a_bound_and_loosens_with_other_noise():
    data = gaussian_data("vector", VP)
    policy = Policy(data, grid_of(8), trained="all", last_std=0.1)
    x0 = data.sample(Noise(0, range(200)))
    draws = Draws(0, 0, range(200))

    def bound() -> float:
        return float(elbo(data, x0, Plain(0.1), policy.grid, draws=draws, transition=policy.transition).diffusion.sum(1).mean())

    with torch.no_grad():
        own = bound()
    by_hand = elbo(data, x0, Plain(0.1), policy.grid, draws=draws, transition=Ancestral(spread=False)).diffusion.sum(1).mean()
    within(1e-4, abs(own / float(by_hand) - 1), "bound, policy against its transition")
    with torch.no_grad():
        policy.log_std.sub_(0.5)
        assert bound() > own


def test_gaussian_data_in_a_few_steps_with_the_optimal_noise():
    """With the posterior's variance in its steps, a policy draws Gaussian data exactly."""
    data, steps = gaussian_data("vector", VP), 3
    grid = torch.cat([torch.tensor([-math.inf], dtype=torch.float64), grid_of(steps)[1:]])
    lams = grid.tolist()
    x = torch.zeros(1, 5, dtype=torch.float64)
    exact = [Ancestral()(data, x, lams[k], lams[k + 1]).p.var.expand_as(x)[0].sqrt() for k in range(steps)]
    policy = Policy(data, grid, std=torch.stack(exact))
    mean, cov = torch.zeros(5, dtype=torch.float64), torch.eye(5, dtype=torch.float64)
    for k in range(steps):
        with torch.no_grad():
            A, c, V = affine(lambda x, k=k: policy.step(x, k), (5,))
        mean, cov = A @ mean + c, A @ cov @ A.T + V
    within(1e-12, (mean - data.mean).abs().max(), "mean")
    within(1e-12, (cov - torch.diag(data.var)).abs().max(), "covariance")


def test_means_can_be_kept_on_a_sphere():
    policy = Policy(gaussian_data("vector", VE), grid_of(3), mean_map=lambda m: m / m.norm(dim=1, keepdim=True))
    torch.testing.assert_close(policy.step(torch.randn(4, 5), 1).mean.norm(dim=1), torch.ones(4))


def test_what_makes_no_policy_is_refused():
    data, grid = gaussian_data("vector", VE), grid_of(4)
    for deterministic in (Ancestral(0.0, spread=False), Heun()):
        with refuses("`transition`", "eta > 0"):
            Policy(data, grid, deterministic)
        assert Policy(data, grid, deterministic, std=0.1).step(torch.zeros(1, 5), 0).var > 0
    with refuses("`transition` Exponential", "Ancestral"):
        Policy(data, grid, Exponential(2))
    with refuses("`grid`", "at least 2"):
        Policy(data, grid[:1])
    with refuses("`std`", "positive"):
        Policy(data, grid, std=torch.tensor([1.0, 0.0, 1.0, 1.0]))
    with refuses("`std`", "positive"):
        Policy(data, grid, std=math.nan)
    with refuses("`std`", "(4,)"):
        Policy(data, grid, std=torch.ones(3))
    with refuses("`trained`", "fix_last"):
        Policy(data, grid, trained="last")
    with refuses("`trained`", "fix_last3", "none of 3"):
        Policy(data, grid_of(3), trained="fix_last3")
    with refuses("`last_std`", "0.0"):
        Policy(data, grid, last_std=0.0)
    policy = Policy(data, grid)
    with refuses("`grid`", "the policy's own"):
        generate(data, 2, grid=grid_of(5), transition=policy.transition)
    with refuses("`k`", "0..3"):
        policy.step(torch.zeros(1, 5), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("process", [VE, VP], ids=repr)
def test_a_policy_of_float64_has_noise_of_float64(process, dtype):
    """Of a denoiser in float64, or made so later; and states in float32 stay in float32."""
    data = Parametric(GaussianData(torch.zeros(2), torch.ones(2), process)).to(dtype)
    policy = Policy(data, karras(4, 0.1, 5.0))
    assert policy.log_std.dtype == dtype
    policy.double()
    x = torch.randn(3, 2, dtype=torch.float64)
    lams = policy.grid.tolist()
    for k in range(3):
        exact = Ancestral(spread=False)(data, x, lams[k], lams[k + 1]).p.var
        within(1e-14, abs(float(policy.step(x, k).var.detach() / exact) - 1), f"variance of step {k}")
        forward = process.scales(lams[k])[1] ** 2 * -math.expm1(lams[k] - lams[k + 1])
        within(1e-14, abs(float(Auxiliary(policy).s2[k]) / forward - 1), f"variance of the kernel back to step {k}")
    rows = policy.step(x.float(), torch.tensor([0, 2, 1]))
    assert rows.sample(torch.randn(3, 2)).dtype == torch.float32


def test_noise_that_was_changed_in_float32_stays_so_in_float64():
    data = Parametric(GaussianData(torch.zeros(2), torch.ones(2)))
    policy = Policy(data, karras(4, 0.1, 5.0), std=0.3, trained="all").requires_grad_(False)
    with torch.no_grad():
        policy.log_std[1] = 0.25
    before = policy.log_std.detach().clone()
    policy.double()
    assert float(policy.log_std[1]) == 0.25
    assert float(policy.log_std[0]) == math.log(0.3)
    assert torch.equal(policy.float().log_std, before)


def test_a_kernels_own_noise_is_the_policys():
    """What `rhos`, guidance and adaptive velocities take for the noise is what the steps have, a learned variance in it."""
    data = GaussianData(torch.zeros(2), torch.tensor([0.3, 0.6]), VP)
    policy = Policy(data, karras(4, 0.1, 5.0), Ancestral(), std="kernel", trained="all")
    x = torch.randn(3, 2, dtype=torch.float64)

    def stds() -> torch.Tensor:
        return torch.stack([policy.step(x, k).var.detach().double().log().mean().mul(0.5).exp() for k in range(4)])

    torch.testing.assert_close(policy.rhos, stds())
    torch.testing.assert_close(Auxiliary(policy, s2="policy").s2, stds().square())
    with torch.no_grad():
        policy.log_std[1] += 0.7
    torch.testing.assert_close(policy.rhos, stds())
    labelled = Policy(Labelled(data), karras(4, 0.1, 5.0), Ancestral(), std="kernel")  # nobody says which label
    torch.testing.assert_close(labelled.rhos, Policy(data, karras(4, 0.1, 5.0)).rhos)


class Parametric(Denoiser):
    """The data of another denoiser, with a parameter, whose dtype is the policy's."""

    def __init__(self, inner):
        super().__init__()
        self.w, self.inner, self.process, self.shape = torch.nn.Parameter(torch.ones(())), inner, inner.process, inner.shape

    def forward(self, x, lam, **cond):
        p = self.inner(x, lam)
        return Gaussian(self.w * p.mean, p.var)


class Labelled(Denoiser):
    """Data that are not drawn without a label."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.process, self.shape = inner, inner.process, inner.shape

    def forward(self, x, lam, **cond):
        if "label" not in cond:
            raise ValueError("`label` is missing")
        return self.inner(x, lam)
