"""Guidance by a value: downhill, after a step or as a likelihood."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from helpers import gaussian_data, refuses, within
from quieten import VE, VP, Ancestral, Guided, Split, generate, karras, sample
from quieten.guiding.value_guide import ValueGuidance, ValueKick
from quieten.tuning.policy import Policy
from quieten.tuning.policy_schedule import Consistency


class Bowl(nn.Module):
    """V(x, k) = (k + 1) |x - 1|^2 / 2."""

    def forward(self, x, k, **cond):
        k = k + 1 if isinstance(k, int) else (k + 1).to(x)
        return 0.5 * k * (x - 1).flatten(1).square().sum(1)


@pytest.mark.parametrize("kind", ["vector", "image"])
def test_a_kick_goes_downhill_by_what_the_paper_says(kind):
    policy = Policy(gaussian_data(kind, VE), karras(4, 0.1, 5.0))
    lams, x = policy.grid.tolist(), torch.randn(3, *policy.shape)
    kick = ValueKick(policy.transition, Bowl(), 0.1, steps=[0, 2])
    drawn = torch.randn_like(x)
    for k in range(4):
        step = kick(policy.denoiser, x, lams[k], lams[k + 1])
        torch.testing.assert_close(step.p.mean, policy.step(x, k).mean)
        if k in (1, 3):
            assert step.then is None
            continue
        moved = step.then(drawn)
        within(1e-6, (moved - (drawn - 0.1 * policy.rhos[k] * (k + 2) * (drawn - 1))).abs().max(), f"step {k}")
        assert (Bowl()(moved, k + 1) < Bowl()(drawn, k + 1)).all()


def test_a_kick_follows_the_noise_that_a_kernel_has_itself():
    policy = Policy(gaussian_data("vector", VP), karras(4, 0.1, 5.0), Ancestral(), std="kernel")
    lams, x, drawn = policy.grid.tolist(), torch.randn(3, 5), torch.randn(3, 5)
    for k in range(4):
        step = ValueKick(policy.transition, Bowl(), 0.1)(policy.denoiser, x, lams[k], lams[k + 1])
        rho = policy.step(x, k).var.detach().log().mean().mul(0.5).exp()
        within(1e-6, (step.then(drawn) - (drawn - 0.1 * rho * (k + 2) * (drawn - 1))).abs().max(), f"step {k}")


@pytest.mark.parametrize("process", [VE, VP], ids=repr)
def test_as_a_likelihood_it_moves_the_mean_of_an_ancestral_step_as_much(process):
    policy = Policy(gaussian_data("vector", process), karras(4, 0.1, 5.0))
    guided = Guided(policy.denoiser, ValueGuidance(Bowl(), policy, 0.2))
    lams, x = policy.grid.tolist(), torch.randn(3, 5, dtype=torch.float64)
    for k in range(4):
        plain, pushed = (Ancestral(spread=False)(d, x, lams[k], lams[k + 1]).p.mean for d in (policy.denoiser, guided))
        within(1e-9, (pushed - plain + 0.2 * float(policy.rhos[k]) * (k + 1) * (x - 1)).abs().max(), f"step {k}")
    k = torch.tensor([2, 0, 3])
    levels = policy.transition.levels(k)[0]
    rows = guided(x, levels).mean
    alone = torch.cat([guided(x[i : i + 1], lams[step]).mean for i, step in enumerate(k.tolist())])
    within(1e-6, (rows - alone).abs().max(), "a level for each row")


@pytest.mark.parametrize(
    "inner, options",
    [(Ancestral(0.5, spread=False), {}), (Ancestral(0.2, clip=3.0), {}), (Consistency(), {}), (Consistency(8.0), {}),
     (Ancestral(0.5, spread=False), {"adhoc_scale1": 0.8}), (Ancestral(0.5), {"std": "kernel"})],
)  # fmt: skip
@pytest.mark.parametrize("process", [VE, VP], ids=repr)
def test_every_transition_of_a_policy_is_guided_by_as_much(process, inner, options):
    data = gaussian_data("vector", process)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        policy = Policy(data, karras(5, 0.1, 5.0)[:-1], inner, **options)
    guided = Guided(data, ValueGuidance(Bowl(), policy, 0.02))
    x, lams = torch.randn(3, 5, dtype=torch.float64), policy.grid.tolist()
    for k in range(4):
        plain, pushed = (policy.transition(d, x, lams[k], lams[k + 1]).p.mean for d in (data, guided))
        wanted = -0.02 * float(policy.rhos[k]) * (k + 1) * (x - 1)
        off = (pushed - plain - wanted).abs()
        if getattr(inner, "clip", None) is not None:  # where the estimate of x0 met its bound, nothing is said
            off = off[(data(x, lams[k]).mean.abs() < 2.5) & (guided(x, lams[k]).mean.abs() < 2.5)]
        within(1e-9, off.max(), f"step {k}")


def test_samplers_and_splits_take_it():
    policy = Policy(gaussian_data("vector", VE), karras(6, 0.1, 5.0))
    x = policy.prior(torch.randn(200, 5, generator=torch.Generator().manual_seed(0)))
    value = Bowl()

    def cost(denoiser, transition) -> float:
        return float(value(sample(denoiser, x, policy.grid, transition, last="draw"), 0).mean())

    plain = cost(policy.denoiser, policy.transition)
    guidance = ValueGuidance(value, policy, 0.3)
    assert cost(policy.denoiser, ValueKick(policy.transition, value, 0.1)) < 0.8 * plain
    assert cost(policy.denoiser, ValueKick(policy.transition, value, -0.1)) > 1.2 * plain
    assert cost(Guided(policy.denoiser, guidance), policy.transition) < 0.9 * plain
    assert cost(policy.denoiser, Split(guidance)) < 0.9 * plain
    drawn = generate(policy.denoiser, 3, grid=policy.grid, transition=ValueKick(policy.transition, value, 0.1), last="draw")
    assert drawn.isfinite().all()


def test_bad_input():
    policy = Policy(gaussian_data("vector", VE), karras(4, 0.1, 5.0))
    x, lams = torch.zeros(2, 5), policy.grid.tolist()

    class Flat(nn.Module):
        def forward(self, x, k, **cond):
            return x.detach().sum(1)

    step = ValueKick(policy.transition, Flat())(policy.denoiser, x, lams[0], lams[1])
    with refuses("`value`", "autograd"):
        step.then(x)
    with refuses("ValueGuidance", "autograd"):
        ValueGuidance(Flat(), policy).gradient(policy.denoiser, x, lams[0])
    with refuses("`scale`", "inf"):
        ValueKick(policy.transition, Bowl(), math.inf)
    with refuses("`scale`", "nan"):
        ValueGuidance(Bowl(), policy, math.nan)
    with refuses("`steps`", "0..3", "4"):
        ValueKick(policy.transition, Bowl(), steps=[4])
