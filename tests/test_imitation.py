"""DxMI: one iteration, against the official code's arrays, closed forms and brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from helpers import within
from quieten import VE, Denoiser, Draws, karras
from quieten.gaussian import Gaussian
from quieten.imitation import MaxEntIRL, Settings
from quieten.policy import Policy, Rollout
from quieten.running_cost import expected_cost, running_cost


class Still(Denoiser):
    """A denoiser that keeps the state: for tests in which only the noise matters."""

    def __init__(self, shape, process=VE):
        super().__init__()
        self.shape, self.process = shape, process

    def forward(self, x, lam, **cond):
        return Gaussian(x)


class Quadratic(nn.Module):
    """V(x, k) = a_k mean(x^2) / 2 + g_k mean(x) + c_k, the value of the golden arrays; one column is for all times."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.table = nn.Parameter(torch.as_tensor(table).clone())

    def forward(self, x: Tensor, k, **cond) -> Tensor:
        a, g, c = self.table[:, 0] if self.table.shape[1] == 1 else self.table[:, k]
        rows = x.flatten(1)
        return 0.5 * a * rows.square().mean(1) + g * rows.mean(1) + c


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


class Linear(Denoiser):
    """E[x0 | x_t] = w x + b, learned: a policy of one affine step where the grid goes straight to the data."""

    def __init__(self, shape, steps: int = 1, process=VE):
        super().__init__()
        self.shape, self.process = shape, process
        self.w, self.b = nn.Parameter(torch.full((steps,), 0.7)), nn.Parameter(torch.zeros(steps))

    def forward(self, x, lam, label=None, **cond):
        lam = torch.as_tensor(lam, dtype=torch.float64)
        k = (lam.reshape(-1, 1) - self.lams).abs().argmin(1) if len(self.w) > 1 else torch.zeros(1, dtype=torch.long)
        shape = (-1, *[1] * (x.ndim - 1))
        return Gaussian(self.w[k].reshape(shape) * x + self.b[k].reshape(shape))


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
