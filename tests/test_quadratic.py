"""Guidance by linear measurements, and the kicks that solve it exactly or implicitly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from guided_toy import geometric
from helpers import refuses, within
from quieten.guidance import Gradient, Guided
from quieten.guiding.kick import EulerKick, Force, Span, StagedKick
from quieten.guiding.quadratic import ExactKick, ImplicitKick, Quadratic
from quieten.oracle import GaussianData
from quieten.process import FLOW, VE, VP
from quieten.sampling import sample
from quieten.solver import RK4
from quieten.split import Split

pytestmark = pytest.mark.usefixtures("one_thread")
GENERATOR = torch.Generator().manual_seed(0)
H = torch.randn(3, 6, dtype=torch.float64, generator=GENERATOR)
Y = torch.randn(4, 3, dtype=torch.float64, generator=GENERATOR)
X = torch.randn(4, 2, 3, dtype=torch.float64, generator=GENERATOR)
MASK = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
PICTURE = torch.randn(4, 2, 3, dtype=torch.float64, generator=GENERATOR)


def data(process=VP) -> GaussianData:
    return GaussianData(torch.zeros(2, 3, dtype=torch.float64), 1.0, process)


def guidances(**options) -> dict[str, Quadratic]:
    return {
        "matrix": Quadratic(H, Y, **options),
        "wide": Quadratic(torch.cat([H, H[:1]]), torch.cat([Y, Y[:, :1]], 1), **options),  # H H^T is singular
        "mask": Quadratic((lambda x: x * MASK, lambda v: v * MASK), PICTURE * MASK, gain=1.0, **options),
        "means": Quadratic(
            (lambda x: x.mean(2, keepdim=True), lambda v: v.expand(-1, -1, 3) / 3), PICTURE[:, :, :1], gain=1 / 3, **options
        ),
    }


@pytest.mark.parametrize("process", [VP, VE, FLOW], ids=str)
@pytest.mark.parametrize("name", guidances())
def test_the_gradient_is_that_of_the_log_likelihood(name, process):
    g, lam = guidances(std=0.7, spread=0.5, scale=3.0)[name], 0.4
    alpha, _ = process.scales(lam)
    x = X.clone().requires_grad_()
    log_prob = -(g.residual(x / alpha).flatten(1).square().sum(1)) / (2 * (0.7**2 + 0.5 * math.exp(-lam)))
    (expected,) = torch.autograd.grad(3.0 * log_prob.sum(), x)
    torch.testing.assert_close(g.gradient(data(process), X, lam), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        g.slope(data(process), X, torch.full((4,), lam, dtype=torch.float64))[1] * 3.0, expected, rtol=0, atol=1e-12
    )


def flowed(g: Quadratic, span: Span, process) -> Tensor:
    """The guidance's flow in 240 RK4 stages of its own ODE."""
    lam, force = -2 * math.log(span.start), Force(g, data(process))
    x = X * process.scales(lam)[0]
    for i in range(240):
        part = Span(span.start + i * span.length / 240, span.length / 240)
        level = -2 * math.log(part.start)
        x, _ = StagedKick(RK4())(force, x * process.scales(level)[0] / process.scales(lam)[0], level, part)
        lam = level
    return x / process.scales(lam)[0]


@pytest.mark.parametrize("spread", [0.0, 0.5])
@pytest.mark.parametrize("name", guidances())
def test_an_exact_kick_is_the_flow(name, spread):
    g, span = guidances(std=0.6, spread=spread, scale=2.0)[name], Span(2.0, -1.2)
    for process in (VP, VE):
        for lam in (-2 * math.log(2.0), -2 * math.log(0.8)):  # kicks before and after the move
            alpha, _ = process.scales(lam)
            kicked, _ = ExactKick()(Force(g, data(process)), X * alpha, lam, span)
            within(1e-7, (kicked / alpha - flowed(g, span, process)).abs().max(), f"{name} at {lam:.2f}")


@pytest.mark.parametrize("name", guidances())
def test_an_implicit_kick_solves_its_system(name):
    g, span, lam = guidances(std=0.1, scale=50.0)[name], Span(2.0, -1.2), -2 * math.log(2.0)
    q, (alpha, _) = g.exponent(span, lam), VP.scales(lam)
    kicked, _ = ImplicitKick()(Force(g, data()), X * alpha, lam, span)
    xbar = kicked / alpha
    within(1e-8 * q, (xbar - X - q * g.spread_back(g.residual(xbar), X)).abs().max(), "(I + q H^T H) xbar = start + q H^T y")


@pytest.mark.parametrize("kick", [ExactKick(), ImplicitKick()], ids=str)
@pytest.mark.parametrize("name", guidances())
def test_no_weight_is_too_large(name, kick):
    """Where Euler explodes, the measured part ends at the measurement and the rest follows the denoiser."""
    g = guidances(std=0.05, scale=1e4)[name]
    grid = torch.cat([geometric(5), torch.tensor([math.inf], dtype=torch.float64)])
    x = sample(data(), X, grid, Split(g, kick=kick))
    assert x.abs().max() < 10.0
    consistent = g.spread_back(g.residual(x), X).abs().max() if name != "wide" else torch.tensor(0.0)
    within(1e-3, consistent, "distance to the measurement")
    euler = sample(data(), X, grid, Split(g, kick=EulerKick()))
    assert not euler.abs().max() < 1e6


def test_exact_kicks_converge_to_the_joint_flow():
    g = guidances(std=2.0)["matrix"]
    truth = sample(Guided(data(), g), X, geometric(300), RK4())
    errors = [float((sample(data(), X, geometric(n), Split(g, RK4(), ExactKick())) - truth).abs().max()) for n in (20, 40)]
    within(0.3, errors[1] / errors[0], "second order: error at 40 steps over that at 20")
    within(1e-2, errors[1], "error at 40 steps")


def test_examples_and_dtypes_do_not_mix():
    for kick in (ExactKick(), ImplicitKick()):
        for name in guidances():
            g = guidances(std=0.3)[name]
            whole, _ = kick(Force(g, data()), X, 0.0, Span(1.0, -0.5))
            one = Quadratic(g.maps or g.matrix, g.y[1:2], 0.3, gain=g.gain)
            alone, _ = kick(Force(one, data()), X[1:2], 0.0, Span(1.0, -0.5))
            torch.testing.assert_close(alone, whole[1:2], rtol=0, atol=1e-12)
            if name in ("matrix", "wide"):
                single, _ = kick(Force(g, data()), X.float(), 0.0, Span(1.0, -0.5))
                assert single.dtype == torch.float32
                torch.testing.assert_close(single.double(), whole, rtol=0, atol=1e-4)
                assert kick(Force(Quadratic(H, Y[:1]), data()), X[:0], 0.0, Span(1.0, -0.5))[0].shape == (0, 2, 3)


PLAIN = Gradient(lambda x, lam: x)
PAIR = (lambda x: x, lambda v: v)


@pytest.mark.parametrize(
    "build, pieces",
    [
        (lambda: Quadratic(H, Y, std=0.0), ("`std`", "0.0", "positive")),
        (lambda: Quadratic(H, Y, spread=-1.0), ("`spread`", "-1.0")),
        (lambda: Quadratic(PAIR, Y, gain=0.0), ("`gain`", "0.0", "positive")),
        (lambda: Quadratic(H[0], Y), ("`H`", "matrix", "(6,)")),
        (lambda: Quadratic((H, H), Y), ("`H`", "transpose")),
        (lambda: Quadratic(H, Y, scale=math.nan), ("`scale`", "nan")),
        (lambda: Quadratic(H[:, :4], Y).gradient(data(), X, 0.0), ("`H`", "4 columns", "6 numbers")),
        (lambda: ExactKick()(Force(PLAIN, data()), X, 0.0, Span(1.0, -0.5)), ("Quadratic", "Gradient", "EulerKick")),
        (lambda: ExactKick()(Force(Quadratic(PAIR, X), data()), X, 0.0, Span(1.0, -0.5)), ("`gain`", "ImplicitKick")),
        (lambda: ImplicitKick(0), ("`iterations`", "0")),
        (lambda: ImplicitKick(tolerance=0.0), ("`tolerance`", "0.0")),
    ],
)
def test_bad_arguments_are_refused(build, pieces):
    with refuses(*pieces):
        build()
