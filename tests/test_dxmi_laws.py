"""DxMI where everything is known: linear policies, mixtures, tables. The checks of the closed forms, by number."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from dxmi_toys import Corners, Quadratics, affine_policy, corners, evaluated, marginals, pairs_of, soft_optimum
from helpers import within
from quieten import VE, VP, Ancestral, Draws, MixtureData, Noise, karras
from quieten.imitation import MaxEntIRL, Settings
from quieten.tuning.pairs import keyed
from quieten.tuning.policy import Policy, Rollout
from quieten.tuning.policy_gradient import FullGradient
from quieten.tuning.running_cost import Auxiliary, expected_cost, running_cost, time_costs

S2 = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
A, B, RHO = (torch.tensor(t, dtype=torch.float64) for t in ([0.7, 0.9, 1.1], [0.2, -0.1, 0.3], [0.6, 0.4, 0.3]))
SUMS = {"reduction": "sum", "time_cost": None, "entropy_in_value": 0, "velocity_in_value": 0, "entropy": "exact", "avr": None}


def exact(policy: Policy, value: nn.Module, s2: Tensor, kind=MaxEntIRL, **options) -> MaxEntIRL:
    return kind(policy, value, settings=Settings(**{**SUMS, "policy_clip": None, **options}), s2=s2)


def policy_gradient(irl: MaxEntIRL, mean: float, var: float) -> list[Tensor]:
    """The gradient of the policy's steps, exactly: T times the mean over pairs is the sum over steps."""
    pairs, draws = pairs_of(irl.policy, mean, var)
    loss = irl.policy.T * irl._policy_loss(pairs, draws, 0)
    parameters = [irl.policy.denoiser.A, irl.policy.denoiser.b, irl.policy.log_std]
    return list(torch.autograd.grad(loss, parameters))


def path(irl: MaxEntIRL, mean: float, var: float) -> Tensor:
    """J, exactly, with a graph."""
    node = corners(irl.policy.T + 1)
    x = mean + math.sqrt(var) * node[:, :1]
    return irl.path_cost(x, Corners(node.T[1:, :, None])).mean()


# -- 1 and 2: linear policies under quadratic energies


@pytest.mark.parametrize("dims", [1, 3])
def test_1_the_soft_optimum_pays_the_same_on_every_path(dims):
    """V(x') + tau log pi*(x' | x) + tau |x' - x|^2 / 2 s^2 is V(x), whatever x' is drawn."""
    tau = 0.3
    policy, value = soft_optimum(2.0, 0.5, S2, tau, dims)
    irl = exact(policy, value, S2, tau1=tau, tau2=tau, entropy="sampled")
    roll = policy.rollout(torch.randn(20, dims, dtype=torch.float64), Noise(0, range(20)))
    for k in range(3):
        target = irl._target_of(roll, k, None)
        within(1e-10, (target - value(roll.states[k], k)).detach().abs().max(), f"step {k}")
    kappa = value.K.detach()
    within(1e-12, (tau / kappa[:3] - tau / kappa[3] - S2.flip(0).cumsum(0).flip(0)).abs().max(), "precision")


@pytest.mark.parametrize("taus", [(0.3, 0.3), (0.1, 0.2)])
def test_1_the_optimum_is_where_the_policy_wants_to_stay(taus):
    """With tau1 != tau2: h = K' + tau2 / s^2, mean (tau2 / s^2 x - G') / h, variance tau1 / h."""
    tau1, tau2 = taus
    K, G = torch.tensor([0.0, 1.5, 1.0, 2.0]).double(), torch.tensor([0.0, 0.3, -0.4, 0.5]).double()
    h = K[1:] + tau2 / S2
    policy = affine_policy(tau2 / S2 / h, -G[1:] / h, (tau1 / h).sqrt())
    irl = exact(policy, Quadratics(K, G, torch.zeros(4).double()), S2, tau1=tau1, tau2=tau2)
    for g in policy_gradient(irl, 0.4, 1.3):
        within(1e-10, g.abs().max(), "gradient at the optimum")
    with torch.no_grad():
        policy.denoiser.b.add_(0.1)
    assert policy_gradient(irl, 0.4, 1.3)[1].abs().max() > 1e-2


def test_2_exact_values_are_where_the_value_wants_to_stay():
    tau1, tau2 = 0.1, 0.2
    policy = affine_policy(A, B, RHO)
    value = Quadratics(*evaluated(2.0, -1.0, 0.3, policy, S2, tau1, tau2))
    irl = exact(policy, value, S2, tau1=tau1, tau2=tau2)
    node = corners(2)
    for k in range(3):
        x = 0.3 + 1.2 * node[:, :1]
        x_next = A[k] * x + B[k] + RHO[k] * node[:, 1:]
        states = torch.zeros(4, 4, 1, dtype=torch.float64)
        states[k], states[k + 1] = x, x_next
        roll = Rollout(states, (states[1:] - states[:-1]).square().mean(2))
        target = irl._target_of(roll, k, None)
        loss = (value(x, k) - target).square().mean()
        for g in torch.autograd.grad(loss, [value.K, value.G, value.C]):
            within(1e-10, g.abs().max(), f"gradient of the value at step {k}")


def wide_rollout(policy: Policy, i: int, n: int = 4096) -> tuple[Rollout, Draws]:
    draws = Draws(0, i, range(n))
    return policy.rollout(1.5 * draws.normal(torch.empty(n, 1).double()), keyed(draws, "roll")), draws


def test_2_the_value_loop_converges_to_them(one_thread):
    tau1, tau2 = 0.1, 0.2
    policy = affine_policy(A, B, RHO)
    K, G, C = evaluated(2.0, -1.0, 0.3, policy, S2, tau1, tau2)
    start = [torch.where(torch.arange(4) == 3, t, torch.zeros(4).double()) for t in (K, G, C)]
    irl = exact(policy, Quadratics(*start), S2, tau1=tau1, tau2=tau2, betas=(0.5, 0.99))
    for p in irl.value.parameters():  # the last column is given
        p.register_hook(lambda g: g * (torch.arange(4) < 3))
    for i in range(250):
        irl.optimizers["value"].param_groups[0]["lr"] = 0.15 * 10 ** (-2.7 * i / 250)
        roll, draws = wide_rollout(policy, i)
        irl._value_steps(roll, draws, None, 0)
    for name, learned, wanted in zip("KGC", irl.value.parameters(), (K, G, C), strict=True):
        within(1e-2, (learned - wanted).detach().abs().max(), name)


@pytest.mark.parametrize("taus", [(0.3, 0.3), (0.1, 0.2)])
def test_2_the_policy_loop_converges_to_the_optimum(taus, one_thread):
    tau1, tau2 = taus
    K, G = torch.tensor([0.0, 1.5, 1.0, 2.0]).double(), torch.tensor([0.0, 0.3, -0.4, 0.5]).double()
    h = K[1:] + tau2 / S2
    policy = affine_policy(A, B, RHO)
    value = Quadratics(K, G, torch.zeros(4).double())
    irl = exact(policy, value, S2, tau1=tau1, tau2=tau2, n_generator="all", betas=(0.5, 0.99))
    for i in range(160):
        for group in irl.optimizers["policy"].param_groups:
            group["lr"] = 0.1 * 10 ** (-2.7 * i / 160)
        roll, draws = wide_rollout(policy, i)
        irl.improve([roll], draws)
    within(1e-2, (policy.denoiser.A.detach() - tau2 / S2 / h).abs().max(), "A")
    within(1e-2, (policy.denoiser.b.detach() + G[1:] / h).abs().max(), "b")
    within(1e-2, (policy.rhos.square() / (tau1 / h) - 1).abs().max(), "variance, relative")


# -- 3 and 4: the bound, and back-propagation through time


def joint_kl(policy: Policy, s2: Tensor, mean: float, var: float, kappa: float, m: float, tau: float) -> float:
    """KL of the chain from q(x_T) prod q~, both dense Gaussians of dimension T + 1."""
    T = policy.T
    M, c = torch.eye(T + 1, dtype=torch.float64), torch.zeros(T + 1, dtype=torch.float64)
    noise = torch.cat([torch.tensor([math.sqrt(var)], dtype=torch.float64), policy.rhos])
    c[0] = mean
    for k in range(T):
        c[k + 1] = policy.denoiser.b[k]
        M[k + 1, k] = -policy.denoiser.A[k]
    inverse = torch.linalg.inv(M).detach()
    mu, cov = inverse @ c.detach(), inverse @ torch.diag(noise.square()) @ inverse.T
    N, back = torch.eye(T + 1, dtype=torch.float64), torch.cat([s2, torch.tensor([tau / kappa], dtype=torch.float64)])
    for k in range(T):
        N[k, k + 1] = -1.0
    inverse = torch.linalg.inv(N)
    nu = inverse @ torch.cat([torch.zeros(T, dtype=torch.float64), torch.tensor([m], dtype=torch.float64)])
    other = inverse @ torch.diag(back) @ inverse.T
    solved = torch.linalg.solve(other, cov)
    gap = nu - mu
    return float(0.5 * (solved.trace() - T - 1 + gap @ torch.linalg.solve(other, gap) + other.logdet() - cov.logdet()))


def normal_kl(mean: float, var: float, m: float, v: float) -> float:
    return 0.5 * (var / v - 1 + (mean - m) ** 2 / v - math.log(var / v))


def bound(irl: MaxEntIRL, s2: Tensor, mean: float, var: float, kappa: float, tau: float) -> float:
    """J / tau - H(x_0) + log Z + sum log(2 pi s^2) / 2."""
    entropy = 0.5 * math.log(2 * math.pi * math.e * var)
    log_z = 0.5 * math.log(2 * math.pi * tau / kappa)
    return float(path(irl, mean, var).detach()) / tau - entropy + log_z + float(0.5 * torch.log(2 * math.pi * s2).sum())


KAPPA, M, TAU = 2.0, 0.4, 0.3


def energy() -> Quadratics:
    """E = kappa (x - m)^2 / 2 at every step; only the last is asked."""
    ones = torch.ones(4, dtype=torch.float64)
    return Quadratics(KAPPA * ones, -KAPPA * M * ones, 0.5 * KAPPA * M * M * ones)


def test_3_the_objective_is_the_joint_divergence():
    policy = affine_policy(A, B, RHO)
    irl = exact(policy, energy(), S2, FullGradient, tau1=TAU, tau2=TAU)
    joint = joint_kl(policy, S2, 0.2, 1.5, KAPPA, M, TAU)
    within(1e-12, abs(bound(irl, S2, 0.2, 1.5, KAPPA, TAU) - joint), "identity")
    means, variances = marginals(policy, 0.2, 1.5)
    assert normal_kl(float(means[3]), float(variances[3]), M, TAU / KAPPA) <= joint
    best, _ = soft_optimum(KAPPA, M, S2, TAU, 1)
    irl = exact(best, energy(), S2, FullGradient, tau1=TAU, tau2=TAU)
    left = normal_kl(0.2, 1.5, M, TAU / KAPPA + float(S2.sum()))
    within(1e-12, abs(bound(irl, S2, 0.2, 1.5, KAPPA, TAU) - left), "what is left at the optimum")


@pytest.mark.parametrize("taus", [(0.3, 0.3), (0.1, 0.2), (0.0, 0.0)])
def test_4_one_step_gradients_are_those_through_time(taus):
    tau1, tau2 = taus
    policy = affine_policy(A, B, RHO)
    value = Quadratics(*evaluated(KAPPA, -KAPPA * M, 0.0, policy, S2, tau1, tau2))
    ours = policy_gradient(exact(policy, value, S2, tau1=tau1, tau2=tau2), 0.2, 1.5)
    full = exact(policy, value, S2, FullGradient, tau1=tau1, tau2=tau2)
    theirs = torch.autograd.grad(path(full, 0.2, 1.5), [policy.denoiser.A, policy.denoiser.b, policy.log_std])
    for name, a, b in zip(("A", "b", "rho"), ours, theirs, strict=True):
        within(1e-9, (a - b).abs().max(), name)


def improved(policy: Policy, s2: Tensor, steps: list[int]) -> None:
    """The best steps for the values of the policy as it is, all given ones at once."""
    K, G, _ = evaluated(KAPPA, -KAPPA * M, 0.0, policy, s2, TAU, TAU)
    with torch.no_grad():
        for k in steps:
            h = K[k + 1] + TAU / s2[k]
            policy.denoiser.A[k], policy.denoiser.b[k] = TAU / s2[k] / h, -G[k + 1] / h
            policy.log_std[k] = 0.5 * (TAU / h).log()


def test_4_improvement_never_hurts_and_ends_in_as_many_sweeps_as_steps():
    best, _ = soft_optimum(KAPPA, M, S2, TAU, 1)
    goal = float(path(exact(best, energy(), S2, FullGradient, tau1=TAU, tau2=TAU), 0.2, 1.5).detach())
    policy = affine_policy(A, B, RHO)
    irl = exact(policy, energy(), S2, FullGradient, tau1=TAU, tau2=TAU)
    costs = [float(path(irl, 0.2, 1.5).detach())]
    for _ in range(3):
        improved(policy, S2, [0, 1, 2])
        costs.append(float(path(irl, 0.2, 1.5).detach()))
    assert all(b <= a + 1e-12 for a, b in pairwise(costs)), costs
    within(1e-12, abs(costs[-1] - goal), "after three sweeps of all steps at once")
    assert costs[2] > goal + 1e-3
    policy = affine_policy(A, B, RHO)
    for k in (2, 1, 0):
        improved(policy, S2, [k])
    irl = exact(policy, energy(), S2, FullGradient, tau1=TAU, tau2=TAU)
    within(1e-12, abs(float(path(irl, 0.2, 1.5).detach()) - goal), "backwards")


def test_4_adapting_the_velocities_tightens_the_bound():
    policy = affine_policy(A, B, RHO)
    irl = exact(policy, energy(), 5.0 * S2, FullGradient, tau1=TAU, tau2=TAU)
    means, variances = marginals(policy, 0.2, 1.5)
    moved = (A - 1).square() * variances[:3] + RHO.square() + ((A - 1) * means[:3] + B).square()
    before = bound(irl, irl.auxiliary.s2, 0.2, 1.5, KAPPA, TAU)
    for decay in (0.5, 0.0):
        irl.auxiliary.adapt(moved, decay)
        after = bound(irl, irl.auxiliary.s2, 0.2, 1.5, KAPPA, TAU)
        assert after < before
        before = after
    within(1e-12, (irl.auxiliary.s2 - moved).abs().max(), "s^2")


# -- 5: mixtures


def mixture(process) -> MixtureData:
    return MixtureData(
        torch.tensor([[-1.5], [0.5], [2.0]]), torch.tensor([0.1, 0.3, 0.2]), torch.tensor([1.0, 2.0, 1.5]), process
    )


@pytest.mark.parametrize("process", [VE, VP], ids=repr)
def test_5_soft_values_of_a_mixture_are_its_noised_densities(process):
    """V = -tau log q_k solves the soft Bellman equation of the forward kernel, and the best step is the reverse one."""
    data, tau = mixture(process), 0.3
    grid = karras(3, 0.3, 4.0)
    grid[-1] = -2.0 * math.log(0.1)  # ends a little above the data, so that every kernel has a density
    auxiliary = Auxiliary(Policy(data, grid), "forward", reduction="sum").double()
    lams, s2 = grid.tolist(), Auxiliary(Policy(data, grid), "forward").s2
    torch.testing.assert_close(s2.double(), _forward(process, lams), rtol=1e-6, atol=0)
    auxiliary.s2, auxiliary.a = _forward(process, lams), _factors(process, lams)
    x_next = torch.linspace(-25, 25, 40001, dtype=torch.float64)[:, None]
    for k in range(3):
        x = torch.tensor([[-2.0], [0.3], [1.7]], dtype=torch.float64)
        after = -tau * data.log_prob(x_next, lams[k + 1])
        for row in x:
            cost = tau * auxiliary.cost(k, row.expand_as(x_next), x_next)
            log_integral = torch.logsumexp(-(after + cost) / tau, 0) + math.log(50 / 40000)
            soft = -tau * (log_integral - 0.5 * math.log(2 * math.pi * float(auxiliary.s2[k])))
            within(1e-10, abs(float(soft + tau * data.log_prob(row[None], lams[k]))), f"soft value of step {k}")
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(-tau * data.log_prob(leaf, lams[k]).sum(), leaf, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), leaf)
        s, a = float(auxiliary.s2[k]), float(auxiliary.a[k])
        p = Ancestral()(data, x, lams[k], lams[k + 1]).p
        within(1e-10, (p.mean - (x - s / tau * slope) / a).detach().abs().max(), "mean of the best step")
        within(1e-10, (p.var - (s - s * s / tau * bend) / a**2).detach().abs().max(), "its variance")


def _factors(process, lams) -> Tensor:
    scales = [process.scales(lam) for lam in lams]
    return torch.tensor([scales[k][0] / scales[k + 1][0] for k in range(3)], dtype=torch.float64)


def _forward(process, lams) -> Tensor:
    """sigma_k^2 - a_k^2 sigma_{k+1}^2: in VE the difference of the squares, in VP beta."""
    scales, a = [process.scales(lam) for lam in lams], _factors(process, lams)
    sigma2 = torch.tensor([sigma**2 for _, sigma in scales], dtype=torch.float64)
    return sigma2[:3] - a.square() * sigma2[1:]


def test_5_a_policy_trained_on_the_forward_kernel_closes_the_gap():
    """With exact values the reverse steps are stationary under the forward kernel, and not under the paper's in VP."""
    data = mixture(VP)
    lams = karras(3, 0.3, 4.0)[:3].tolist()
    x = data.process.marginal(data.sample(Noise(0, range(4000))), lams[0]).sample(
        Noise(1, range(4000))(0, torch.empty(4000, 1))
    )
    p = Ancestral()(data, x.double(), lams[0], lams[1]).p
    mean = p.mean.clone().requires_grad_()
    x_next = mean + p.var.sqrt() * Noise(2, range(4000))(0, mean).double()
    gradients = {}
    for kind in ("forward", "brownian"):
        auxiliary = Auxiliary(Policy(data, torch.tensor([*lams[:2]])), kind, reduction="sum")
        loss = -data.log_prob(x_next, lams[1]).mean() + auxiliary.cost(0, x.double(), x_next).mean()
        (g,) = torch.autograd.grad(loss, mean)
        gradients[kind] = float((g * 4000 * x).mean())
    assert abs(gradients["forward"]) < 0.25 * abs(gradients["brownian"])


# -- 6: tables


class Lookup(nn.Module):
    """An energy for every number."""

    def __init__(self, n: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(n, dtype=torch.float64))

    def forward(self, x: Tensor, k, **cond) -> Tensor:
        return self.table[x[:, 0].long()]


def test_6_the_energy_is_a_least_squares_critic_and_its_loss_the_le_cam_distance():
    gamma = 0.7
    p, pi = torch.tensor([8, 1, 4, 3, 0.0]).double(), torch.tensor([2, 5, 4, 1, 4.0]).double()
    x0, drawn = (torch.repeat_interleave(torch.arange(5.0).double(), n.long())[:, None] for n in (p, pi))
    p, pi = p / 16, pi / 16
    policy = affine_policy(A, B, RHO)
    irl = MaxEntIRL(policy, Lookup(5), settings=Settings(gamma=gamma, value_optimizer="sgd", lr_value=2.0, time_cost=None))
    states = drawn.expand(4, 16, 1)
    roll = Rollout(states, torch.zeros(3, 16, dtype=torch.float64))
    for _ in range(300):
        told = irl._energy_step(x0, roll, None)
    wanted = (pi - p) / (2 * gamma * (pi + p))
    within(1e-10, (irl.value.table.detach() - wanted).abs().max(), "energy")
    le_cam = 0.5 * ((pi - p).square() / (pi + p)).sum()
    within(1e-10, abs(float(told["le_cam"] - le_cam)), "Le Cam distance")
    within(1e-10, abs(float(told["energy_loss"] + le_cam / (2 * gamma))), "loss")
    assert float(told["energy_range"]) <= 1 / (2 * gamma) + 1e-9


def test_6_the_fixed_point_of_the_game_is_flattened_by_gamma_tau():
    """log(pi / p) + log p = -tanh(log(pi / p) / 2) / (2 gamma tau) + c: the critic of `pi` is the energy that `pi` follows."""
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    p = (torch.exp(-0.5 * ((x + 1.5) / 0.5) ** 2) + 0.5 * torch.exp(-0.5 * ((x - 1.5) / 0.7) ** 2)).add(1e-12)
    log_p, distances = (p / p.sum()).log(), []
    for strength in (0.1, 0.01, 0.001):
        pi = _fixed_point(log_p, strength)
        energy = (pi - log_p.exp()) / (2 * (pi + log_p.exp()))  # E* at gamma = 1
        follows = torch.softmax(-energy / strength, 0)
        within(1e-10, (follows - pi).abs().max(), "fixed point")
        distances.append(float(0.5 * (pi - log_p.exp()).abs().sum()))
    assert distances[0] > 5 * distances[1] > 25 * distances[2]


def _fixed_point(log_p: Tensor, strength: float) -> Tensor:
    """Bisection of the constant; for each, Newton's method for d = log(pi / p): d + log p + tanh(d / 2) / (2 strength) = c."""

    def solve(c: float) -> Tensor:
        low, high = torch.full_like(log_p, -200.0), torch.full_like(log_p, 200.0)
        for _ in range(60):
            d = 0.5 * (low + high)
            over = d + log_p + torch.tanh(0.5 * d) / (2 * strength) > c
            low, high = torch.where(over, low, d), torch.where(over, d, high)
        return (0.5 * (low + high) + log_p).exp()

    low, high = -1e4, 1e4
    for _ in range(70):
        c = 0.5 * (low + high)
        low, high = (low, c) if float(solve(c).sum()) > 1 else (c, high)
    return solve(0.5 * (low + high))


# -- 7: rewards near a reference


def test_7_a_reward_tilts_a_linear_reference():
    kappa, m, tau = 2.0, 0.7, 0.4
    K, G, C = [kappa], [-kappa * m], [0.5 * kappa * m * m]
    mean, b, std = [], [], []
    for k in reversed(range(3)):
        a, c, rho2 = float(A[k]), float(B[k]), float(RHO[k]) ** 2
        d = 1 + K[0] * rho2 / tau
        var = 1 / (1 / rho2 + K[0] / tau)
        mean.insert(0, var * a / rho2)
        b.insert(0, var * (c / rho2 - G[0] / tau))
        std.insert(0, math.sqrt(var))
        cost = C[0] + (0.5 * K[0] * c * c + G[0] * c - 0.5 * G[0] ** 2 * rho2 / tau) / d + 0.5 * tau * math.log(d)
        K, G, C = [a * a * K[0] / d, *K], [a * (K[0] * c + G[0]) / d, *G], [cost, *C]
    reference, value = affine_policy(A, B, RHO), Quadratics(*(torch.tensor(t, dtype=torch.float64) for t in (K, G, C)))
    tilted = affine_policy(*(torch.tensor(t, dtype=torch.float64) for t in (mean, b, std)))
    settings = Settings(tau1=tau, tau2=tau, reduction="sum", time_cost=None, policy_clip=None)
    irl = MaxEntIRL(tilted, value, settings=settings, reference=reference)
    for g in policy_gradient(irl, 0.3, 1.2):
        within(1e-12, g.abs().max(), "gradient at the tilted policy")
    node = corners(1)
    for k in range(3):
        for x in (-1.0, 0.5, 2.0):
            states = torch.zeros(4, 2, 1, dtype=torch.float64)
            states[k] = x
            states[k + 1] = tilted.step(states[k], k).sample(node).detach()
            target = irl._target_of(Rollout(states, torch.zeros(3, 2)), k, None).mean()
            within(1e-12, abs(float(target - value(states[k], k)[0])), f"value of step {k}")
    at_start = MaxEntIRL(affine_policy(A, B, RHO), value, settings=settings, reference=reference)
    x = torch.randn(5, 1, dtype=torch.float64)
    within(1e-12, at_start._divergence(x, 1, at_start.policy.step(x, 1), {}).detach().abs().max(), "cost at the reference")


# -- 8: costs


def test_8_costs_of_time():
    for T in (1, 3, 4, 10):
        total = 1 / (1 + math.exp(-T / 2)) - 1 / (1 + math.exp(T / 2))
        within(1e-12, abs(sum(time_costs(T)) - total), f"T = {T}")
        assert min(time_costs(T)) > 0
    within(1e-7, abs(sum(time_costs(4)) - 0.7615942), "T = 4")
    within(1e-7, abs(sum(time_costs(10)) - 0.9866143), "T = 10")
    assert time_costs(5, compat="official") == pytest.approx(
        [1 / (1 + math.exp(k - 2)) - 1 / (1 + math.exp(k - 1)) for k in range(5)]
    )
    assert time_costs(3, "linear") == [0.05] * 3
    assert time_costs(3, None) == time_costs(3, "sigmoid", 0.0) == [0.0] * 3


def test_8_velocities_in_closed_form_and_their_cost_of_one_half():
    policy = affine_policy(A, B, RHO)
    irl = exact(policy, energy(), 7.0 * S2, tau1=0.1, tau2=0.1, avr=0.0)
    node = corners(4)
    roll = policy.rollout(0.3 + 1.1 * node[:, :1], lambda k, like: node[:, k + 1 : k + 2])
    told = irl.learn(torch.zeros(16, 1, dtype=torch.float64), roll, Draws(0, 0, range(16)))
    means, variances = marginals(policy, 0.3, 1.21)
    wanted = (A - 1).square() * variances[:3] + RHO.square() + ((A - 1) * means[:3] + B).square()
    within(1e-12, (told["s2"] - wanted).abs().max(), "s^2")
    within(1e-12, (told["running_cost"] - 0.5).abs().max(), "running cost")


def test_8_without_entropy_noise_only_falls():
    K, G = torch.tensor([0.0, 1.5, 1.0, 2.0]).double(), torch.zeros(4).double()
    policy = affine_policy(A, B, RHO)
    irl = exact(policy, Quadratics(K, G, G), S2, tau1=0.0, tau2=0.2)
    assert (policy_gradient(irl, 0.0, 1.0)[2] > 0).all()


def test_8_one_step_is_one_regularised_step():
    policy = affine_policy(A[:1], B[:1], RHO[:1])
    ones = torch.ones(2, dtype=torch.float64)
    irl = exact(policy, Quadratics(2 * ones, -ones, ones), S2[:1], tau1=0.1, tau2=0.2, entropy="log_std")
    pairs, draws = pairs_of(policy, 0.3, 1.0)
    x_next = A[0] * pairs.x + B[0] + RHO[0] * draws.eps
    wanted = irl.value(x_next, 1) + 0.2 * (x_next - pairs.x).square().sum(1) / (2 * S2[0]) - 0.1 * RHO[0].log()
    within(1e-12, (irl._policy_loss(pairs, draws, 0) - wanted.mean()).detach().abs(), "loss")


@pytest.mark.parametrize("kind", ["brownian", "rescale"])
def test_8_the_analytic_cost_is_the_mean_of_the_drawn_one_and_varies_less(kind):
    policy = affine_policy(A, B, RHO)
    node, s2 = corners(2), torch.tensor(0.4, dtype=torch.float64)
    x = 0.3 + 1.1 * node[:, :1]
    p = policy.step(x, 1)
    exact_cost, drawn = expected_cost(x, p, s2, kind), running_cost(x, p.sample(node[:, 1:]), s2, kind)
    within(1e-12, (exact_cost.mean() - drawn.mean()).detach().abs(), "means")
    assert exact_cost.var() < drawn.var()
