"""Splitting as numerical analysis: closed forms, orders of convergence, limits of stability, rough guidance."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from guided_toy import STARTS, class_guidance, exact, geometric, rough, toy
from helpers import within
from quieten.denoiser import Denoiser
from quieten.gaussian import Gaussian
from quieten.guidance import Gradient, Guided
from quieten.guiding.kick import Kick, MultistepKick, StagedKick
from quieten.guiding.splits import split
from quieten.oracle import GaussianData
from quieten.process import VE, VP, Process
from quieten.sampling import sample
from quieten.schedule import Table
from quieten.solver import RK4, AdamsBashforth
from quieten.solvers.plms import PLMS
from quieten.split import Memory, Split
from quieten.transition import Step, Transition

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- Gaussian data, an additive measurement: everything in closed form

M = torch.tensor([0.9, -0.2, 1.3], dtype=torch.float64)
S = torch.tensor([0.9, 0.13, 1.4], dtype=torch.float64)
R2 = torch.tensor([0.11, 0.22, 0.35], dtype=torch.float64)
Y = torch.tensor([1.8, -1.4, 0.4], dtype=torch.float64)
S_POST = 1.0 / (1.0 / S + 1.0 / R2)
X = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4.0
FIRST, LAST = 4.0, 0.01


def posterior(y: Tensor) -> Tensor:
    return S_POST * (M / S + y / R2)


def measured(y: Tensor, w: float, process: Process = VE) -> tuple[GaussianData, Gradient]:
    """The data, and the exact gradient of w log p(y | x_t)."""
    data, given = GaussianData(M, S, process), GaussianData(posterior(y), S_POST, process)
    return data, Gradient(lambda x, lam: given.score(x, lam) - data.score(x, lam), w)


def phi(s: Tensor | float, w: float) -> Tensor:
    return (S + s * s) ** ((1 - w) / 2) * (S_POST + s * s) ** (w / 2)


def closed(y: Tensor, w: float) -> Tensor:
    """The guided ODE from FIRST to LAST by variation of constants: Gauss-Legendre in log s."""
    nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(80))
    middle, half = 0.5 * (math.log(FIRST) + math.log(LAST)), 0.5 * (math.log(LAST) - math.log(FIRST))
    s = torch.exp(middle + half * nodes)[:, None]
    integrand = -s * ((1 - w) * M / (S + s * s) + w * posterior(y) / (S_POST + s * s)) / phi(s, w)
    return phi(LAST, w) * (X / phi(FIRST, w) + (integrand * s * half * weights[:, None]).sum(0))


class ExactMove(Transition):
    """The denoiser's own flow."""

    def forward(self, denoiser, x_t, lam_t, lam_s, memory=None):
        return Step(Gaussian(GaussianData(M, S, denoiser.process).flow(x_t, lam_t, lam_s)))


class ExactPull(Kick):
    """The flow of the measurement's gradient, for y = m: both means agree, and only the width of xbar - m changes."""

    def __init__(self, w: float):
        super().__init__()
        self.w = w

    def forward(self, force, x, lam, span, memory=None):
        alpha, _ = force.process.scales(lam)
        (a, b), half = (span.start**2, span.end**2), 0.5 * self.w
        ratio = ((S_POST + b) / (S + b) * (S + a) / (S_POST + a)) ** half
        return alpha * (M + (x / alpha - M) * ratio), None


@pytest.mark.parametrize("process", [VE, VP], ids=str)
@pytest.mark.parametrize("w", [1.0, 3.0, 8.0])
def test_operators_that_commute_are_split_without_error(w, process):
    for scheme, order in (("lie", "BA"), ("lie", "AB"), ("strang", "BA")):
        data, guidance = measured(M, w, process)
        stepper = Split(guidance, ExactMove(), ExactPull(w), scheme, order)
        (alpha, _), (alpha_end, _) = process.scales(-2 * math.log(FIRST)), process.scales(-2 * math.log(LAST))
        x = sample(data, alpha * X, geometric(7, FIRST, LAST), stepper) / alpha_end
        within(1e-10, (x - (M + (X - M) * phi(LAST, w) / phi(FIRST, w))).abs().max(), f"{scheme} {order}")


def test_closed_forms_agree_with_each_other():
    for w, mean, var in ((0.0, M, S), (1.0, posterior(Y), S_POST)):
        flow = mean + (X - mean) * torch.sqrt((var + LAST**2) / (var + FIRST**2))
        within(1e-10, (closed(Y, w) - flow).abs().max(), f"variation of constants at w={w}")
    within(1e-10, (closed(M, 5.0) - (M + (X - M) * phi(LAST, 5.0) / phi(FIRST, 5.0))).abs().max(), "y = m")


@pytest.mark.parametrize("w", [0.0, 1.0, 3.0, 8.0])
def test_the_guided_gaussian_flow(w):
    """Joint RK4 extrapolated once, and second-order splittings, whose error falls to a quarter."""
    data, guidance = measured(Y, w)
    rk4 = [sample(Guided(data, guidance), X, geometric(n, FIRST, LAST), RK4()) for n in (200, 400)]
    within(1e-10, (rk4[1] + (rk4[1] - rk4[0]) / 15 - closed(Y, w)).abs().max(), "RK4, extrapolated")
    for name in ("strang2", "heun-kick"):
        coarse, fine = (
            float((sample(data, X, geometric(n, FIRST, LAST), split(name, guidance)) - closed(Y, w)).abs().max())
            for n in (100, 200)
        )
        within(1e-3, fine, name)
        within(0.3, fine / coarse, f"{name}, error at 200 steps over that at 100")


# ---- orders of convergence: from sigma / alpha = 3 to 0.2 in geometric steps, RMS error over 32 starts


def families(w: float) -> dict[str, Transition]:
    g = class_guidance(VE, w)
    rk4 = StagedKick(RK4())
    return {
        "exact flows, lie BA": Split(g, RK4(), rk4, "lie"),
        "exact flows, lie AB": Split(g, RK4(), rk4, "lie", "AB"),
        "exact flows, strang": Split(g, RK4(), rk4),
        "RK4 with Euler kicks": Split(g, RK4()),
        "strang2": split("strang2", g),
        **{f"ltsp {k}": split("ltsp", g, k=k) for k in (1, 2, 3, 4)},
        **{f"stsp {k}": split("stsp", g, k=k) for k in (1, 2, 3, 4)},
        **{name: split(name, g) for name in ("strang", "merged", "lie", "heun-kick", "heun-pec", "subcycled")},
        "additive 4,1": split("additive", g),
        "additive 4,2": split("additive", g, kick_k=2),
        "lie with AB2 kicks": Split(g, AdamsBashforth(4), MultistepKick(2), "lie", "AB"),
        "strang with AB2 kicks": Split(g, AdamsBashforth(4), MultistepKick(2)),
    }


JOINT = {
    "AB1": AdamsBashforth(1),
    "AB2 constant": AdamsBashforth(2, "constant"),
    "AB4 constant": AdamsBashforth(4, "constant"),
    "AB4 variable, rk": AdamsBashforth(4, start="rk"),
    "AB4 variable, ramp": AdamsBashforth(4),
    "RK4": RK4(),
}
SECOND = ("exact flows, strang", "strang2", "heun-kick", "heun-pec", "additive 4,2")
ORDERS = [
    *[(name, 2 if name in SECOND else 1) for name in families(1.0)],
    *[(name, {"AB1": 1, "RK4": 4, "AB4 variable, rk": 4}.get(name, 2)) for name in JOINT],
]


def rms(transition: Transition, denoiser: Denoiser, w: float, steps: int) -> float:
    end = sample(denoiser, STARTS, geometric(steps), transition)
    return float((end - exact(w)).square().sum(1).mean().sqrt())


@pytest.mark.parametrize("name, order", ORDERS, ids=str)
def test_order(name, order):
    """STSP as released is first order, whatever its network solver; Heun's kicks and true Strang are second."""
    w = 1.0
    joint = name in JOINT
    stepper = JOINT[name] if joint else families(w)[name]
    denoiser = Guided(toy(), class_guidance(VE, w)) if joint else toy()
    slow = name in ("ltsp 2", "ltsp 3", "ltsp 4", "AB4 variable, ramp")  # to reach their order
    steps = 40 if name.startswith("exact") or name in ("strang2", "RK4") else 320 if slow else 160
    coarse, fine = (rms(stepper, denoiser, w, n) for n in (steps, 2 * steps))
    within(0.05, abs(math.log2(coarse / fine) - order), f"order {order} of {name}, off by")


# ---- linear stability: A = 0, B = rate xbar


class Still(Denoiser):
    process = VE

    def forward(self, x, lam, **cond):
        return Gaussian(x)


Make = Callable[[Gradient], Transition]


def factor(make: Make, rate: float, joint: bool, depth: int) -> float:
    """Spectral radius of one step of length 1 on (state, history), read off from unit vectors."""
    guidance = Gradient(lambda x, lam: -rate * math.exp(0.5 * lam) * x)
    stepper = make(guidance)
    unit = torch.eye(depth + 1, dtype=torch.float64)
    past = tuple((50.0 + j, unit[:, j : j + 1]) for j in range(1, depth + 1)) or None
    if not joint and past:  # one gradient, sigma times it is the slope, or pairs
        past = Memory(1, None, unit[:, 1:2] / 50.0 if stepper.scheme in ("strang_merged", "heun_pec") else past)
    lam_t, lam_s = (-2 * math.log(s) for s in (50.0, 49.0))
    step = stepper(Guided(Still(), guidance) if joint else Still(), unit[:, :1], lam_t, lam_s, past)
    kept = (step.memory or ()) if joint else step.memory.kick if depth else ()
    rows = [kept * 49.0] if isinstance(kept, Tensor) else [value for _, value in kept]
    return float(torch.linalg.eigvals(torch.cat([step.p.mean, *rows], 1)).abs().max())


LIMITS: dict[str, tuple[Make, float, bool, int]] = {
    **{
        f"joint AB{k}": (lambda g, k=k: AdamsBashforth(k, "constant"), value, True, k - 1)
        for k, value in ((1, 2.0), (2, 1.0), (3, 6 / 11), (4, 0.3))
    },
    **{f"ltsp {k}": (lambda g, k=k: split("ltsp", g, k=k), 2.0, False, 0) for k in (1, 2, 3, 4)},
    "lie": (lambda g: split("lie", g), 2.0, False, 0),
    "strang": (lambda g: split("strang", g), 4.0, False, 0),
    "merged": (lambda g: split("merged", g), 2.0, False, 1),
    "heun-kick": (lambda g: split("heun-kick", g), 2.0, False, 0),
    "heun-pec": (lambda g: split("heun-pec", g), 1.0, False, 1),
    "strang2": (lambda g: split("strang2", g), 4.0, False, 0),
    "additive 4,1": (lambda g: split("additive", g), 2.0, False, 0),
    "additive 4,2": (lambda g: Split(g, None, MultistepKick(2, "constant"), "additive"), 1.0, False, 1),
}


@pytest.mark.parametrize("name", LIMITS)
def test_linear_stability(name):
    """The largest h * rate at which nothing grows: a split leaves the guidance 7 to 13 times the room of joint PLMS4."""
    make, value, joint, depth = LIMITS[name]
    low, high = 0.02, 8.0
    while high - low > 1e-9:
        middle = 0.5 * (low + high)
        stable = factor(make, middle, joint, depth) <= 1.0 + 1e-12
        low, high = (middle, high) if stable else (low, middle)
    within(1e-6, abs(low - value), f"{name}, limit {low:.7f}, off by")


# ---- rough guidance, few steps


def largest(transition: Transition, denoiser: Denoiser, steps: int) -> float:
    table = Table.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    return float(sample(denoiser, STARTS / 3, table.grid(steps, "linspace"), transition).abs().max())


def test_rough_guidance_leaves_robust_strang_bounded():
    """Waves of wave number 30 on the gradient, at scale 10: the data lie within 1.2."""
    guidance, data = rough(VP, 10.0), toy(VP)
    assert largest(PLMS(4), Guided(data, guidance), 5) > 2e3
    assert largest(split("stsp", guidance), data, 5) > 2e3
    for steps in (*range(5, 26), 30, 40, 50):
        within(10.0, largest(split("strang", guidance), data, steps), f"robust Strang in {steps} steps")


@pytest.mark.parametrize("w", [1.0, 5.0, 10.0, 30.0])
def test_smooth_guidance_at_any_scale(w):
    """Five steps: the released half-step coefficient amplifies the last kick, the end coefficient does not."""
    guidance, data = class_guidance(VP, w), toy(VP)
    within(6.0, largest(split("strang", guidance), data, 5), "robust Strang")
    assert largest(split("stsp", guidance), data, 5) > 15.0 * math.sqrt(w)
