"""DxMI refuses what makes no sense, by name."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dxmi_toys import Asked, Linear, Quadratic, Still
from helpers import refuses
from quieten import Ancestral, karras
from quieten.gaussian import Gaussian
from quieten.imitation import MaxEntIRL
from quieten.tuning.policy import Policy
from quieten.tuning.policy_schedule import fastdpm
from quieten.tuning.running_cost import expected_cost, running_cost, time_costs
from quieten.tuning.settings import Settings


def ready(settings=None, table=None, **options) -> MaxEntIRL:
    policy = Policy(Linear((2,)), karras(3, 0.1, 2.0))
    value = options.pop("value", None) or Quadratic(torch.ones(3, 4) if table is None else table)
    return MaxEntIRL(policy, value, settings=settings or Settings(), **options)


@pytest.mark.parametrize(
    "name, value",
    [
        ("tau1", -0.1), ("tau2", math.nan), ("gamma", -1.0), ("avr", 1.0), ("avr", -0.1), ("time_cost_scale", -1.0),
        ("time_cost", "cosine"), ("reduction", "max"), ("n_critic", 0), ("n_generator", 0), ("n_generator", "both"),
        ("skip_sampler_tau", -1), ("ema", 1.0), ("target_decay", 1.5), ("policy_clip", 0.0), ("cost", "euler"),
        ("repeat_value_update", 0), ("value_update_order", "forward"), ("entropy", "renyi"), ("anneal", 0.0),
        ("entropy_in_value", -1), ("velocity_in_value", 1.5), ("explore", -1.0), ("compat", "paper"),
        ("optimizer", "lion"), ("value_optimizer", "lion"), ("tau1", None), ("tau2", None), ("gamma", None), ("tau1", "a"),
        ("reduction", None), ("n_critic", None), ("lr_policy", None), ("betas", (2, 1)), ("betas", 0.9), ("betas", (0.9,)),
    ],
)  # fmt: skip
def test_settings_are_refused_by_name(name, value):
    with refuses(f"`{name}`", repr(value)):
        Settings(**{name: value})


def test_parts_that_do_not_belong_together():
    for s2 in (torch.zeros(3), torch.tensor([1.0, math.nan, 1.0]), torch.ones(4)):
        with refuses("`s2`", "3 positive numbers"):
            ready(s2=s2)
    with refuses("`s2`", "'noise'"):
        ready(s2="noise")
    with refuses("`energy`", "k = T"):
        ready(value=Asked(torch.ones(3, 4), terminal=True), energy=Quadratic(torch.ones(3, 1)))
    with refuses("`energy` is missing"):
        ready(value=Asked(torch.ones(3, 3), terminal=False))
    with refuses("`value` was made for 5 steps", "3"):
        ready(value=Asked(torch.ones(3, 6), T=5))
    with refuses("`value`", "nothing to train"):
        ready(value=Quadratic(torch.ones(3, 4)).requires_grad_(False))
    with refuses("`policy`", "nothing to train"):
        MaxEntIRL(Policy(Still((2,)), karras(3), trained="none"), Quadratic(torch.ones(3, 4)))
    with refuses("`reference`", "grid"):
        ready(reference=Policy(Linear((2,)), karras(4)))
    with refuses("`std`", "floor"):
        MaxEntIRL(Policy(Still((2,)), karras(3), std=1e-5, trained="all"), Quadratic(torch.ones(3, 4)))
    low = Policy(Still((2,)), karras(3), std=1e-5, trained="all")
    assert MaxEntIRL(low, Quadratic(torch.ones(3, 4)), settings=Settings(tau1=0.0)).policy is low
    with refuses("`n_generator`", "at most T x n_critic = 3"):
        ready(Settings(n_generator=4)).iterate(torch.zeros(2, 2))


def test_data_and_answers_that_do_not_fit():
    irl = ready()
    with refuses("`x0`", "(B, 2)", "(4, 3)"):
        irl.iterate(torch.zeros(4, 3))
    with refuses("`label`", "first axis of 4", "(3,)"):
        irl.iterate(torch.zeros(4, 2), {"label": torch.zeros(3)})

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, x, k, **cond):
            return self.w * x

    with refuses("`value`", "(8,) or (8, 1)", "(8, 2)"):
        ready(value=Wide()).iterate(torch.zeros(4, 2))

    class Column(Quadratic):
        def forward(self, x, k, **cond):
            return super().forward(x, k)[:, None]

    assert ready(value=Column(torch.ones(3, 4))).iterate(torch.zeros(1, 2))["e_data"].shape == ()


def test_what_is_not_finite_is_named():
    with refuses("the energy is not finite"):
        ready().iterate(torch.full((4, 2), math.nan))

    class Target(Quadratic):
        def forward(self, x, k, **cond):
            return super().forward(x, k) + (math.inf if k == 2 and not torch.is_grad_enabled() else 0.0)

    with refuses("target of the value at step 1"):
        ready(value=Target(torch.ones(3, 4))).iterate(torch.zeros(4, 2))

    class Steep(Quadratic):
        def forward(self, x, k, **cond):
            v = super().forward(x, k)
            return v + (self.table[0, 0] - 1.0).abs().sqrt() if k == 0 else v  # at its start the slope is infinite

    with refuses("the gradient of the value at step 0"):
        ready(value=Steep(torch.ones(3, 4)), settings=Settings(lr_value=0.0)).iterate(torch.zeros(4, 2))

    class Kept(Quadratic):
        def forward(self, x, k, **cond):
            return super().forward(x, k).detach()

    with refuses("`value`", "depend on its parameters", "detach()"):
        ready(value=Kept(torch.ones(3, 4))).iterate(torch.zeros(4, 2))


def test_what_torch_would_say_less_clearly():
    class Matrix(Linear):
        def forward(self, x, lam, **cond):
            return Gaussian(x @ self.m)

    denoiser = Matrix((2,))
    denoiser.m = nn.Parameter(torch.eye(2))
    irl = MaxEntIRL(Policy(denoiser, karras(3, 0.1, 2.0)), Quadratic(torch.ones(3, 4)))
    with refuses("`x0`", "float64", "float32"):
        irl.iterate(torch.zeros(4, 2, dtype=torch.float64))
    assert irl.iterate(torch.zeros(4, 2))["policy_loss"].isfinite()
    policy = Policy(Linear((2,)), karras(4, 0.1, 2.0))
    for takes_rows in (True, False):
        policy.transition.takes_rows = takes_rows
        for k in (torch.tensor([0, 4]), torch.tensor([0, -1])):
            with refuses("`k`", "0..3", str(k.tolist())):
                policy.step(torch.zeros(2, 2), k)


def test_costs_and_chains_that_make_no_sense():
    x, p = torch.zeros(3, 2), Gaussian(torch.zeros(3, 2), torch.ones(()))
    for s2 in (-1.0, 0.0, math.nan, torch.tensor(0.0), torch.tensor([1.0, math.nan, 1.0])):
        with refuses("`s2`", "positive"):
            running_cost(x, x, s2)
        with refuses("`s2`", "positive"):
            expected_cost(x, p, s2)
    with refuses("`reduction`", "'max'"):
        running_cost(x, x, 1.0, reduction="max")
    with refuses("`reduction`", "'max'"):
        expected_cost(x, p, 1.0, reduction="max")
    assert running_cost(x + 1, x, 0.5, "rescale").tolist() == [1.0] * 3
    for n in (0, 1, 3):  # one number is an example too
        assert running_cost(torch.zeros(n), torch.ones(n), torch.ones(n), reduction="sum").tolist() == [0.5] * n
    with refuses("`compat`", "'paper'"):
        time_costs(3, compat="paper")
    for kappa in (-1.0, 1.5, math.nan):
        with refuses("`kappa`", "[0, 1]"):
            fastdpm(4, kappa=kappa)
    with refuses("`betas`", "rise"):
        fastdpm(4, betas=(0.02, 1e-4))


def test_a_clipped_mean_is_worth_a_warning():
    with pytest.warns(UserWarning, match="`transition` clips the estimate of x0"):
        Policy(Linear((2,)), karras(3), Ancestral(clip=1.0, spread=False))
