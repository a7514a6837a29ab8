"""DxMI: one iteration, against the official code's arrays and brute force."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from dxmi_toys import Asked, Linear, Quadratic, Still
from helpers import within
from quieten import Draws, Noise, karras
from quieten.gaussian import Gaussian
from quieten.imitation import MaxEntIRL
from quieten.tuning.pairs import gathered
from quieten.tuning.policy import Policy, Rollout
from quieten.tuning.running_cost import Auxiliary, expected_cost, running_cost, time_costs
from quieten.tuning.settings import PRESETS, Settings

CASES = {
    "td_time_T5": {"tau1": 0.1, "tau2": 0.1, "gamma": 1.0, "avr": 0.99, "entropy_in_value": 0, "velocity_in_value": 0},
    "td_time_skip_T5": {
        "tau1": 0.3, "tau2": 0.2, "gamma": 0.0, "avr": 0.9, "entropy_in_value": 1, "velocity_in_value": 2,
    },
    "sig_T4": {"time_cost": "sigmoid"},
    "sig_T10": {"time_cost": "sigmoid"},
    "lin_T10": {"time_cost": "linear"},
    "sigclip_T10": {"time_cost": "sigmoid", "value_clip": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("name", [f"plain_{c}" for c in CASES] + ["cond_td_time_T5", "cond_sig_T4", "cond_sigclip_T10"])
def test_the_value_update_is_the_official_one(golden, name):
    arrays = {key.removeprefix(f"{name}_"): torch.as_tensor(v) for key, v in golden("dxmi_update_value").items() if name in key}
    kind, case = name.split("_", 1)
    settings = Settings(**{"time_cost": None, **CASES[case]}, value_optimizer="sgd", lr_value=0.05)
    T = len(arrays["sigma"])
    states = arrays["states"]
    policy = Policy(Still(tuple(states.shape[2:])), karras(T), std=arrays["sigma"], trained="all")
    order = (lambda s2: s2.flip(0)) if kind == "plain" else (lambda s2: s2)  # the official class stores them data first
    value = Quadratic(arrays["V_before"])
    irl = MaxEntIRL(policy, value, settings=settings, s2=order(arrays["s2_before"]))
    roll = Rollout(states, (states[1:] - states[:-1]).square().flatten(2).mean(2))
    told = irl.learn(arrays["img"], roll, Draws(0, 0, range(6)))
    within(1e-6, (irl.auxiliary.s2 - order(arrays["s2_after"])).abs().max(), "s2")
    within(1e-6, (value.table.detach() - arrays["V_after"]).abs().max(), "value")
    for ours, theirs in {"energy_loss": "d_loss", "e_data": "pos_e", "e_policy": "neg_e"}.items():
        within(1e-6, abs(told[ours] - arrays[theirs]), ours)
    within(1e-6, abs(told["value_loss"][0] - arrays["v_loss_t0"]), "loss of the last step")
    within(1e-6, (told["running_cost"] - arrays["running_cost_t"]).abs().max(), "running cost")
    within(1e-6, (told["value"] - arrays["value_t"]).abs().max(), "value of each step")


def test_running_costs_are_the_official_ones(golden):
    a = {key: torch.as_tensor(v) for key, v in golden("dxmi_update_value").items() if key.startswith("rc_")}
    s2 = a["rc_s2"].flip(0)[a["rc_t"]]
    p = Gaussian(a["rc_mean"], a["rc_sigma"].square())
    for kind in ("brownian", "rescale"):
        within(1e-6, (running_cost(a["rc_state"], a["rc_next"], s2, kind) - a[f"rc_{kind}"]).abs().max(), kind)
        within(1e-6, (expected_cost(a["rc_state"], p, s2, kind) - a[f"rc_{kind}_no_var"]).abs().max(), f"{kind}, no var")


@pytest.mark.parametrize("n", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (2, 4, 4)])
def test_an_iteration_of_any_shape_and_size(shape, dtype, n):
    torch.set_default_dtype(dtype)
    try:
        policy = Policy(Linear(shape), karras(3, 0.1, 2.0))
        irl = MaxEntIRL(
            policy,
            Quadratic(torch.ones(3, 4)),
            settings=Settings(n_critic=2, n_generator="all", ema=0.9, lr_policy=0.1, lr_std=0.1),
        )
        before = [p.detach().clone() for p in irl.policy.parameters()]
        told = irl.iterate(torch.randn(n, *shape), {"label": torch.zeros(n, dtype=torch.long)}, Draws(0, 0, range(n)))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(bool(t.isfinite().all()) and not t.requires_grad for t in told.values())
    assert {t.ndim for t in told.values()} == {0, 1}
    assert told["rho"].dtype == dtype
    moved = [not torch.equal(a, b) for a, b in zip(before, irl.policy.parameters(), strict=True)]
    assert any(moved) == (n > 0)
    assert all(p.requires_grad for p in irl.value.parameters())


def test_labels_stay_with_their_rows():
    """Every state carries its label in its first number, and every network looks."""

    class Label(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.seen = nn.Parameter(torch.zeros(())), 0

        def forward(self, x, k, label):
            assert torch.equal(x[:, 0].round().long(), label)
            self.seen += len(x)
            return self.w * x.square().sum(1)

    class Keeps(Still):
        def forward(self, x, lam, label):
            assert torch.equal(x[:, 0].round().long(), label)
            return Gaussian(x)

    label = torch.arange(40) % 10
    x0 = torch.randn(40, 2)
    x0[:, 0] = label
    std = torch.full((4, 2), 0.01)
    policy = Policy(Keeps((2,)), karras(4, 0.1, 2.0), std=std, trained="all")
    for options in ({}, {"n_generator": "all", "n_critic": 3, "value_resample": True, "value_update_order": "random"}):
        for energy in (None, Label()):
            value = Label()
            irl = MaxEntIRL(policy, value, energy, Settings(velocity_in_value=0, entropy_in_value=0, **options))
            irl._first = lambda x0, draws, turn: x0
            irl.iterate(x0, {"label": label}, Draws(0, 0, range(40)))
            assert value.seen > 200


def test_a_separate_energy_is_asked_at_the_end_alone():
    """The official class asks it at k = 0 in the value's targets, and V(., T), which nobody trains, at the end."""
    T = 4
    value, energy = Asked(torch.ones(3, T), terminal=False), Asked(torch.ones(3, 1))
    policy = Policy(Still((3,)), karras(T), trained="all")
    irl = MaxEntIRL(policy, value, energy, PRESETS["separate"])
    irl.iterate(torch.randn(8, 3), None, Draws(0, 0, range(8)))
    targets_and_values = [3, 3, 2, 2, 1, 1, 0]  # V(x_3), then target V(x_3) and V(x_2), ...
    assert value.calls[: len(targets_and_values)] == targets_and_values
    assert set(value.calls[len(targets_and_values)]) <= {1, 2, 3}
    assert energy.calls[:2] == [None, None]
    assert all(k is None for k in energy.calls)
    before = energy.table.detach().clone()
    irl.iterate(torch.randn(8, 3) + 3.0, None, Draws(0, 1, range(8)))
    assert not torch.equal(before, energy.table)


def test_a_fixed_energy_is_not_trained_and_can_be_fitted_at_the_end():
    """A cost without gradient reaches the policy through V(., T)."""

    class Steps(nn.Module):
        def forward(self, x, k, **cond):
            return x.round().sum(1)

    policy = Policy(Still((2,)), karras(3, 0.1, 2.0), trained="all")
    value = Asked(torch.zeros(3, 4), terminal=True)
    settings = Settings(tau1=0.0, tau2=0.0, time_cost=None, lr_value=0.1, lr_std=1e-3)
    irl = MaxEntIRL(policy, value, Steps(), settings)
    assert set(irl.optimizers) == {"policy", "value"}
    for i in range(100):
        told = irl.iterate(torch.zeros(64, 2), None, Draws(0, i, range(64)))
    assert "energy_loss" not in told
    assert value.calls[0] == 3
    within(0.3, abs(float(value.table[1, 3].detach()) - 2.0), "slope of V(., T): the sum of two dimensions, over their mean")
    differentiable = MaxEntIRL(policy, Asked(torch.zeros(3, 3), terminal=False), Steps(), settings)
    assert not differentiable.fits_terminal


def test_a_fresh_sample_for_the_target_is_of_the_policy_as_it_is():
    T = 3
    policy = Policy(Still((2,)), karras(T, 0.1, 2.0), trained="all")
    irl = MaxEntIRL(policy, Quadratic(torch.ones(3, T + 1)), settings=Settings(value_resample=True, time_cost=None))
    states = torch.zeros(T + 1, 5, 2)
    noise = torch.randn(5, 2)
    target = irl._target_of(Rollout(states, torch.zeros(T, 5)), 1, lambda k, like: noise)
    torch.testing.assert_close(target, irl.value(policy.rhos[1] * noise, 2).detach())


def test_steps_without_entropy_and_velocity():
    """The last `skip_sampler_tau` steps are the value's alone."""
    T = 4
    policy = Policy(Still((2,)), karras(T, 0.1, 2.0), trained="all")
    losses = []
    for skip in (0, T):
        irl = MaxEntIRL(policy, Quadratic(torch.ones(3, T + 1)), settings=Settings(skip_sampler_tau=skip, n_generator="all"))
        roll = policy.rollout(16, Noise(0, range(16)))
        pairs = gathered([roll], torch.arange(T * 16), T)
        losses.append(irl._policy_loss(pairs, Draws(0, 0, range(T * 16)), 0))
    x_next = policy.step(pairs.x, pairs.k).sample(Draws(0, 0, range(T * 16)).normal(pairs.x, "policy 0")[pairs.places[1]])
    torch.testing.assert_close(losses[1], irl.value(x_next, pairs.k + 1).mean())
    cost = (x_next - pairs.x).square().mean(1) / (2 * irl.auxiliary.s2[pairs.k])
    wanted = (0.01 * cost - 0.1 * policy.log_std[pairs.k]).mean()
    torch.testing.assert_close(losses[0] - losses[1], wanted)


@pytest.mark.parametrize("dims", [1, 12])
def test_sums_are_means_times_the_dimensions(dims):
    """tau of the paper is tau of the code over D."""
    policy = Policy(Still((dims,)), karras(3, 0.1, 2.0), trained="all")
    roll, losses, targets = policy.rollout(16, Noise(0, range(16))), [], []
    for reduction, scale in (("mean", 1.0), ("sum", 1.0 / dims)):
        settings = Settings(
            tau1=0.3 * scale, tau2=0.2 * scale, reduction=reduction, time_cost=None, entropy_in_value=0, velocity_in_value=0
        )
        irl = MaxEntIRL(policy, Quadratic(torch.ones(3, 4)), settings=settings)
        losses.append(irl._policy_loss(gathered([roll], torch.arange(48), 3), Draws(0, 0, range(48)), 0))
        targets.append(irl._target_of(roll, 1, None))
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(targets[0], targets[1])


def test_averages_follow_and_taus_are_annealed():
    settings = Settings(ema=0.9, target_decay=0.5, anneal=0.01, anneal_steps=10, lr_policy=0.01, lr_value=0.1)
    policy = Policy(Linear((2,)), karras(3, 0.1, 2.0))
    irl = MaxEntIRL(policy, Quadratic(torch.ones(3, 4)), settings=settings)
    value, w, target = (t.detach().clone() for t in (irl.value.table, policy.denoiser.w, irl.target.table))
    irl.iterate(torch.randn(16, 2), None, Draws(0, 0, range(16)))
    torch.testing.assert_close(irl.sampler.denoiser.w, 0.9 * w + 0.1 * policy.denoiser.w)
    torch.testing.assert_close(irl.value_average.table, 0.9 * value + 0.1 * irl.value.table)
    torch.testing.assert_close(irl.target.table, 0.5 * target + 0.5 * irl.value.table)
    assert irl.iterations == 1
    assert settings.tau1_at(0) == 0.1
    assert settings.tau1_at(5) == pytest.approx(0.01)
    assert settings.tau2_at(10) == settings.tau2_at(99) == pytest.approx(0.0001)
    assert {"policy_average.denoiser.w", "value_average.table", "target.table", "auxiliary.s2"} <= set(irl.state_dict())


def test_learning_rates_are_in_groups():
    irl = MaxEntIRL(Policy(Linear((2,)), karras(3)), Quadratic(torch.ones(3, 4)), settings=Settings(lr_policy=1e-4))
    groups = irl.optimizers["policy"].param_groups
    assert [(g["lr"], g["initial_lr"]) for g in groups] == [(1e-4, 1e-4), (1e-2, 1e-2)]
    assert groups[1]["params"][0] is irl.policy.log_std


def test_rollouts_can_explore_downhill():
    policy = Policy(Still((2,)), karras(3, 0.1, 2.0))
    value, ends = Quadratic(torch.tensor([[2.0] * 4, [0.0] * 4, [0.0] * 4])), {}
    for explore in (0.0, 2.0):
        irl = MaxEntIRL(policy, value, settings=Settings(explore=explore, lr_value=0.0))
        roll, _ = irl.critic(torch.zeros(256, 2), {}, Draws(0, 0, range(256)))
        ends[explore] = float(roll.final.square().mean())
    assert ends[2.0] < 0.9 * ends[0.0]


@pytest.mark.parametrize(
    "kind, start", [("brownian", "policy"), ("brownian", "level"), ("brownian", "forward"), ("forward", "policy")]
)
def test_velocities_start_where_they_are_asked_to(kind, start):
    policy = Policy(Still((2,)), karras(3, 0.1, 2.0))
    sigma2 = torch.exp(-policy.grid).float()
    wanted = {"policy": policy.rhos.square(), "level": sigma2[:3], "forward": sigma2[:3] - sigma2[1:]}
    auxiliary = Auxiliary(policy, kind, start)
    torch.testing.assert_close(auxiliary.s2, wanted["forward" if kind == "forward" else start])
    before = auxiliary.s2.clone()
    auxiliary.adapt(torch.ones(3), 0.5)
    torch.testing.assert_close(auxiliary.s2, before if kind == "forward" else 0.5 * before + 0.5)


def test_what_is_told_of_the_values():
    """Explained variance is 1 for exact values, and the energy's range is kept within 1 / (2 gamma) by gamma."""
    policy = Policy(Linear((2,)), karras(2, 0.1, 2.0), std=1e-3, trained="none")
    policy.denoiser.w.data.fill_(1.0)
    irl = MaxEntIRL(policy, Quadratic(torch.ones(3, 3)), settings=Settings(time_cost=None, lr_value=0.0))
    told = irl.iterate(torch.randn(64, 2), None, Draws(0, 0, range(64)))
    assert (told["explained"] > 0.999).all()
    torch.testing.assert_close(told["gap"], told["e_data"] - told["e_policy"])
    torch.testing.assert_close(told["le_cam"], -2 * told["energy_loss"])
    assert float(told["spread"]) == pytest.approx(2.0, rel=0.2)


def test_two_processes_do_what_one_does():
    """Each with half of the rows, averaging in place: the same velocities, gradients and weights."""

    def made():
        torch.manual_seed(0)
        policy = Policy(Linear((2,)), karras(3, 0.1, 2.0))
        return MaxEntIRL(
            policy, Quadratic(torch.ones(3, 4)), settings=Settings(lr_policy=0.01, lr_value=0.1, n_generator="all")
        )

    x0 = torch.randn(8, 2)
    whole = made()
    whole.iterate(x0, None, Draws(0, 0, range(8), 8))
    halves, barrier, shelf = [made(), made()], threading.Barrier(2), {}

    def average_of(rank):
        def average(tensors):
            shelf[rank] = [t.clone() for t in tensors]
            barrier.wait()
            means = [(a + b) / 2 for a, b in zip(shelf[0], shelf[1], strict=True)]
            barrier.wait()
            for t, m in zip(tensors, means, strict=True):
                t.copy_(m)

        return average

    def work(rank):
        rows = slice(4 * rank, 4 * rank + 4)
        halves[rank].iterate(x0[rows], None, Draws(0, 0, range(rows.start, rows.stop), 8), average_of(rank))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for half in halves:
        for a, b in zip(whole.state_dict().values(), half.state_dict().values(), strict=True):
            within(1e-5, (a - b).abs().max(), "weights")


def test_presets_of_the_large_runs():
    """Table of the official configurations: the time cost over all steps, where costs count, and what is trained how fast."""
    for name, T, tau1, skip, summed in (
        ("imagenet64", 10, 0.1, 3, 0.9866143), ("imagenet64-4", 4, 0.1, 0, 0.7615942),
        ("lsun", 10, 0.01, 3, 0.5), ("lsun-4", 4, 0.1, 0, 0.7615942),
    ):  # fmt: skip
        s = PRESETS[name]
        assert (s.tau1, s.tau2, s.gamma, s.avr, s.skip_sampler_tau) == (tau1, 0.01, 1.0, 0.99, skip)
        assert (s.lr_policy, s.lr_value, s.value_clip, s.policy_clip, s.n_generator) == (1e-8, 1e-5, 0.1, None, "all")
        assert sum(time_costs(T, s.time_cost, s.time_cost_scale)) == pytest.approx(summed, abs=1e-7)
