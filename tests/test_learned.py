"""Learned schedules: the official code's curves, ends that stay put, inverses and rates."""

import pytest
import torch

from conftest import golden
from helpers import refuses, within
from quieten.likelihoods.learned import Monotone, Polynomial, Shaped
from quieten.schedule import Linear

U = torch.linspace(0, 1, 41, dtype=torch.float64)


def wild(**options) -> Monotone:
    torch.manual_seed(0)
    schedule = Monotone(hidden=16, **options).double()
    with torch.no_grad():
        for p in (schedule.w2, schedule.b2, schedule.w3):
            p.normal_(std=3.0)
    return schedule


SCHEDULES = {"polynomial": Polynomial, "pinned": wild, "free": lambda: wild(pinned=False), "start": lambda: Monotone().double()}


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_laws(make):
    schedule = make()
    lam, rate = schedule.rate(U)
    assert bool((lam.diff() < 0).all())
    assert bool((rate > 0).all())
    within(1e-14, (schedule(U) - lam).abs().max(), "the curve and its rate are of one piece")
    u = U.clone().requires_grad_()
    (slope,) = torch.autograd.grad(schedule(u).sum(), u)
    within(1e-12, ((slope + rate) / rate).abs().max(), "relative error of the rate")
    within(1e-13, (schedule.inverse(lam) - U).abs().max(), "inverse")


@pytest.mark.parametrize("make", [Polynomial, lambda: wild(learned=False)], ids=["polynomial", "network"])
def test_ends_stay_whatever_the_inner_weights(make):
    lam = make()(U)
    within(1e-14, (lam[[0, -1]] - torch.tensor([13.3, -5.0], dtype=torch.float64)).abs().max(), "ends")


def test_free_ends_move_with_the_weights():
    assert float((wild(pinned=False)(U)[[0, -1]] - torch.tensor([13.3, -5.0])).abs().max()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_reach_what_is_learned_and_nothing_else(dtype):
    schedule = wild()
    lam, rate = schedule.rate(U.to(dtype))
    assert lam.dtype == rate.dtype == dtype
    (lam + rate).sum().backward()
    for name, p in schedule.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
    fixed = Monotone(learned=False)
    assert {name for name, p in fixed.named_parameters() if p.requires_grad} == {"w1", "w2", "b2", "w3"}
    assert isinstance(schedule, Shaped)


def test_official_curves():
    arrays = {name: torch.tensor(value) for name, value in golden("diffenc_schedules").items()}
    t = arrays["t"]

    def check(schedule, name):
        lam, rate = schedule.rate(t)
        within(1e-13, (lam + arrays[f"{name}_gamma"]).abs().max(), f"{name}: gamma")
        within(1e-12, (rate - arrays[f"{name}_dgamma_dt"]).abs().max(), f"{name}: its slope")

    check(Polynomial(), "poly10")
    check(Linear(13.3, -5.0), "fixed")
    bias, slope = float(arrays["scalar_b"]), abs(float(arrays["scalar_w"]))
    check(Linear(-bias, -bias - slope), "scalar")
    network = Monotone(hidden=64, pinned=False).double()
    with torch.no_grad():
        for own, name in [("w1", "l1_kernel"), ("b1", "l1_bias"), ("w2", "l2_kernel"), ("b2", "l2_bias"), ("w3", "l3_kernel")]:
            getattr(network, own).copy_(arrays[f"nnet_{name}"].flatten())
    check(network, "nnet")


def test_bad_schedules():
    with refuses("`lam_max`", "-5"):
        Monotone(-5.0, 13.3)
    with refuses("`lam_min`", "3"):
        Polynomial(13.3, 3.0)
    with refuses("`hidden`", "0"):
        Monotone(hidden=0)
