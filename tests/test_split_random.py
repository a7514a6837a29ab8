"""Guidance around random moves: every random transition of the library draws from the posterior, or is refused by name."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import quieten
from helpers import refuses
from quieten.covariances.lanczos import Lanczos
from quieten.guidance import Gradient
from quieten.guiding.value_guide import ValueKick
from quieten.likelihoods.widened import Widened
from quieten.oracle import GaussianData
from quieten.process import VP
from quieten.sampling import generate
from quieten.schedule import LinearBeta, karras
from quieten.solver import AdamsBashforth, Exponential, Heun
from quieten.solvers.sde import EulerMaruyama
from quieten.split import Projected, Split
from quieten.transition import Ancestral, Churn, Hushed, Langevin, Step, Transition
from quieten.tuning.policy import Policy
from quieten.tuning.policy_schedule import Consistency

pytestmark = pytest.mark.usefixtures("one_thread")

MEAN, VAR, NOISE, Y = 0.0, 0.8, 0.6, 1.4
GIVEN = 1.0 / (1.0 / VAR + 1.0 / NOISE)  # the posterior's variance
DIMS, ROWS, STEPS = 400, 40, 150
DATA = GaussianData(torch.zeros(DIMS, dtype=torch.float64), VAR, VP)
POSTERIOR = GaussianData(torch.full((DIMS,), GIVEN * Y / NOISE, dtype=torch.float64), GIVEN, VP)


def tuned(grid: Tensor, eta: float = 1.0) -> Transition:
    return Policy(DATA, grid, Ancestral(eta, spread=False), shape=(DIMS,)).transition


class Flat(nn.Module):
    """V(x, k) that depends on x and has no slope."""

    def forward(self, x: Tensor, k: int) -> Tensor:
        return 0.0 * x.sum(1)


RANDOM: dict[str, Callable[[Tensor], Transition]] = {
    "Ancestral": lambda grid: Ancestral(),
    "Ancestral, half the noise": lambda grid: Ancestral(0.5),
    "Ancestral, the variance alone": lambda grid: Ancestral(0.0),
    "EulerMaruyama": lambda grid: EulerMaruyama(),
    "EulerMaruyama, in another time": lambda grid: EulerMaruyama(LinearBeta(start=0.0)),
    "Exponential": lambda grid: Exponential(1, eta=1.0),
    "Lanczos": lambda grid: Lanczos(),
    "Tuned": tuned,
    "Tuned, half the noise": lambda grid: tuned(grid, 0.5),
    "ValueKick": lambda grid: ValueKick(tuned(grid), Flat()),
    "Hushed": lambda grid: Hushed(Ancestral(), grid),
    "Churn": lambda grid: Churn(Ancestral()),
    "Langevin": lambda grid: Langevin(),
    "Projected": lambda grid: Projected(Ancestral(), lambda x, lam: x),
    "Widened": lambda grid: Widened(Ancestral(), grid, torch.zeros(len(grid) - 1)),
    "Projected, around others": lambda grid: Projected(Hushed(Langevin(EulerMaruyama()), grid), lambda x, lam: x),
}
DETERMINISTIC = {"RungeKutta", "Euler", "RK2", "Heun", "RK4", "AdamsBashforth", "Singlestep", "UniPC", "PLMS", "PNDM", "RK45",
                 "EncodedFlow"}  # fmt: skip
REFUSED = {"Consistency", "Split"}  # its share of noise is unknown; it counts steps, and random moves may remember nothing


def transitions() -> set[str]:
    """The names of all transitions in the library's source."""
    trees = [ast.parse(path.read_text()) for path in Path(quieten.__file__).parent.rglob("*.py")]
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    found, before = {"Transition"}, set[str]()
    while found != before:
        before = set(found)
        found |= {c.name for c in classes if any(isinstance(base, ast.Name) and base.id in before for base in c.bases)}
    return found - {"Transition"}


def test_no_transition_is_forgotten():
    assert {name.split(",")[0] for name in RANDOM} | DETERMINISTIC | REFUSED == transitions()


@pytest.mark.parametrize("name", RANDOM)
def test_every_random_move_reaches_the_posterior(name):
    """The exact gradient at w = 1: mean and variance within four standard errors and 4 % of the steps'; both are 25 % off and
    more where kicks have the strength of those beside the ODE."""
    g = Gradient(lambda x, lam: POSTERIOR.score(x, lam) - DATA.score(x, lam))
    grid = karras(STEPS)
    x = generate(DATA, ROWS, grid=grid, transition=Split(g, RANDOM[name](grid)), batch=ROWS, last="draw", dtype=torch.float64)
    assert abs(float(x.mean() - POSTERIOR.mean[0])) < 4 * math.sqrt(GIVEN / x.numel()) + 0.04
    assert abs(float(x.var()) / GIVEN - 1.0) < 4 * math.sqrt(2 / x.numel()) + 0.04


def test_the_share_of_wrappers_is_the_inner_one():
    grid = karras(4)
    for eta in (0.3, 1.0, None):
        inner: Transition = Heun() if eta is None else Ancestral(eta)
        around = [Hushed(inner, grid), Churn(inner), Langevin(inner), Projected(inner, lambda x, lam: x),
                  Widened(inner, grid, torch.zeros(4)), Split(Gradient(lambda x, lam: x), inner)]  # fmt: skip
        assert [wrapped.eta for wrapped in around] == [eta] * len(around)
    assert AdamsBashforth(4).eta is None


class Unsaid(Ancestral):
    """Random, and says nothing."""

    def __init__(self):
        super().__init__()
        self.eta = None

    def forward(self, denoiser, x_t, lam_t, lam_s, memory=None) -> Step:
        return Ancestral()(denoiser, x_t, lam_t, lam_s)


@pytest.mark.parametrize(
    "flow", [Consistency(), Unsaid(), Projected(Unsaid(), lambda x, lam: x)], ids=lambda f: type(f).__name__
)
def test_a_random_move_of_unknown_share_is_refused(flow):
    g = Gradient(lambda x, lam: -x)
    with refuses(f"`flow`={type(flow).__name__}", "random", "`eta`", "Ancestral()"):
        generate(DATA, 2, grid=karras(4), transition=Split(g, flow), batch=2)
