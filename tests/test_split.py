"""Split steps: what is asked where, what is remembered, what must agree, and what is refused."""

from __future__ import annotations

import copy
import math
import re
import warnings
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from guided_toy import STARTS, class_guidance, geometric, toy
from helpers import refuses, within
from quieten.denoiser import Denoiser
from quieten.gaussian import Gaussian
from quieten.guidance import Gradient, Guided, Likelihood
from quieten.guiding.kick import EulerKick, Force, MultistepKick, Span, StagedKick, SubCycled
from quieten.guiding.quadratic import ExactKick, ImplicitKick, Quadratic
from quieten.guiding.splits import SPLITS, split
from quieten.noise import Noise
from quieten.oracle import GaussianData
from quieten.process import FLOW, VE, VP
from quieten.sampling import generate, sample, trajectory
from quieten.schedule import Rectified, Table, karras
from quieten.solver import RK2, RK4, AdamsBashforth, Exponential
from quieten.solvers.plms import PLMS, PNDM
from quieten.split import Projected, Split
from quieten.transition import Ancestral, Langevin
from quieten.wrap import Counted

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:the guidance is stiff")]
INF = math.inf


def to_data(steps: int) -> Tensor:
    return torch.cat([geometric(steps - 1), torch.tensor([INF], dtype=torch.float64)])


# ---- what is asked where


class Log:
    """Writes down each question: "net" or "grad", level and state."""

    def __init__(self, w: float = 1.0):
        self.calls: list[tuple[str, float, Tensor]] = []
        self.data = toy()
        inner = class_guidance(VE, 1.0)

        def slope(x: Tensor, lam: float) -> Tensor:
            self.calls.append(("grad", lam, x.clone()))
            return inner.fn(x, lam)

        self.guidance = Gradient(slope, w)
        self.denoiser = self.Net(self)

    class Net(Denoiser):
        process = VE

        def __init__(self, log: Log):
            super().__init__()
            self.log = (log,)

        def forward(self, x, lam, **cond):
            self.log[0].calls.append(("net", lam, x.clone()))
            return self.log[0].data(x, lam)

    def sequence(self, grid: Tensor) -> list[tuple[str, int]]:
        """(kind, position in the grid) of each call; halves between positions stand for middles in sigma / alpha."""
        s = torch.exp(-0.5 * grid).tolist()
        nodes = {value: n for n, value in enumerate(s)} | {0.5 * (a + b): n + 0.5 for n, (a, b) in enumerate(pairwise(s))}
        nodes |= {a + 0.25 * (b - a): n + 0.25 for n, (a, b) in enumerate(pairwise(s))}
        nodes |= {a + 0.75 * (b - a): n + 0.75 for n, (a, b) in enumerate(pairwise(s))}
        return [(kind, min((abs(v - math.exp(-0.5 * lam)), n) for v, n in nodes.items())[1]) for kind, lam, _ in self.calls]


def net(n: float) -> tuple[str, float]:
    return "net", n


def grad(n: float) -> tuple[str, float]:
    return "grad", n


# the calls of step n of N; spec of the paper's table "what is evaluated where"
SEQUENCES = {
    "ltsp": lambda n, last: [grad(n), net(n)],
    "lie": lambda n, last: [net(n), *([] if last else [grad(n + 1)])],
    "stsp": lambda n, last: [grad(n), net(n), grad(n if last else n + 1)],
    "strang": lambda n, last: [grad(n), net(n), *([] if last else [grad(n + 1)])],
    "merged": lambda n, last: [*([grad(0)] if n == 0 else []), net(n), *([] if last else [grad(n + 1)])],
    "heun-kick": lambda n, last: [net(n), grad(n), *([] if last else [grad(n + 1)])],
    "heun-pec": lambda n, last: [net(n), *([grad(0)] if n == 0 else []), *([] if last else [grad(n + 1)])],
    "additive": lambda n, last: [net(n), grad(n)],
    "strang2": lambda n, last: [grad(n), grad(n + 0.25), net(n), net(n + 0.5), grad(n + 0.5), grad(n + 0.75)],
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_call_sequences(name):
    for steps in (1, 2, 6):
        log, grid = Log(), to_data(steps)
        sample(log.denoiser, STARTS, grid, split(name, log.guidance))
        expected = [call for n in range(steps) for call in SEQUENCES[name](n, n == steps - 1)]
        assert log.sequence(grid) == expected
        entry, gradients = SPLITS[name], sum(kind == "grad" for kind, _ in expected)
        assert sum(kind == "net" for kind, _ in expected) == entry.network * steps
        assert entry.gradient * steps - 1 <= gradients <= entry.gradient * steps
    log = Log()  # a grid that ends before the data has no kick that vanishes
    sample(log.denoiser, STARTS, geometric(6), split(name, log.guidance))
    kinds = [kind for kind, _, _ in log.calls]
    assert kinds.count("grad") == SPLITS[name].gradient * 6 + (name in ("merged", "heun-pec"))


def test_joint_call_sequences():
    """Network, then gradient, at the same state; PLMS as released asks at the second level twice."""
    for stepper, extra in ((Ancestral(0.0, spread=False), []), (PLMS(4), [net(1), grad(1)])):
        log, grid = Log(), to_data(5)
        sample(Guided(log.denoiser, log.guidance), STARTS, grid, stepper)
        expected = [call for n in range(5) for call in (net(n), grad(n), *(extra if n == 0 else []))]
        assert log.sequence(grid) == expected


def test_where_the_states_are():
    """Kicks before the move change what the network sees; Heun's and additive ones do not."""
    for name, kicked in (("ltsp", True), ("strang", True), ("lie", False), ("heun-kick", False), ("additive", False)):
        log, grid = Log(), geometric(1)
        sample(log.denoiser, STARTS, grid, split(name, log.guidance))
        seen = next(x for kind, _, x in log.calls if kind == "net")
        assert torch.equal(seen, STARTS) != kicked, name


def test_no_weight_asks_nothing():
    for name in SEQUENCES:
        log = Log(0.0)
        sample(log.denoiser, STARTS, to_data(3), split(name, log.guidance))
        assert all(kind == "net" for kind, _, _ in log.calls), name


def test_gradients_through_the_denoiser_share_its_pass():
    """Additive and Heun-kick steps ask a denoiser that the guidance differentiates once where others ask twice."""
    for name, passes in (("additive", 4), ("heun-kick", 4 + 3), ("strang", 4 + 7)):
        counted = Counted(toy())
        nearer = Likelihood(lambda x0, lam: -x0.square().sum(1), on="x0")
        sample(counted, STARTS, to_data(4), split(name, nearer))
        assert counted.calls == passes, name


# ---- reductions


REDUCED = {
    **{f"ltsp {k}": ("ltsp", {"k": k}, AdamsBashforth(k, "constant")) for k in (1, 2, 3, 4)},
    **{f"stsp {k}": ("stsp", {"k": k}, AdamsBashforth(k, "constant")) for k in (1, 2, 3, 4)},
    "ltsp 1 is DDIM": ("ltsp", {"k": 1}, Ancestral(0.0, spread=False)),
    **{name: (name, {}, AdamsBashforth(4)) for name in ("strang", "merged", "lie", "heun-kick", "heun-pec", "additive")},
    "strang2": ("strang2", {}, RK2(0.5)),
    "ancestral-split": ("ancestral-split", {}, Ancestral()),
}


@pytest.mark.parametrize("process", [VP, VE, FLOW], ids=str)
@pytest.mark.parametrize("name", REDUCED)
def test_without_guidance_only_the_move_is_left(name, process):
    scheme, options, plain = REDUCED[name]
    stepper, noise = split(scheme, class_guidance(process, 0.0), **options), Noise(0, range(len(STARTS)))
    for grid in (geometric(6), *([] if scheme == "strang2" else [to_data(6)])):  # RK2 ends with Euler
        a, b = (sample(toy(process), STARTS, grid, t, noise=noise) for t in (stepper, plain))
        within(1e-12, (a - b).abs().max(), name)


def test_one_kick_is_the_denoisers_shift():
    """LTSP of order 1, gradient first: to the first order joint DDIM; and one step from any state exactly the formula."""
    g, data = class_guidance(VP, 3.0), toy(VP)
    lam_t, lam_s = -1.0, 0.5
    (a, s), (b, r) = VP.scales(lam_t), VP.scales(lam_s)
    step = split("ltsp", g, k=1)(data, STARTS, lam_t, lam_s)
    kicked = STARTS - s * (a * r / b - s) * g.gradient(data, STARTS, lam_t)
    x0 = data(kicked, lam_t).mean
    torch.testing.assert_close(step.p.mean, b * x0 + r * (kicked - a * x0) / s, rtol=0, atol=1e-13)


class Polynomial(Denoiser):
    """eps is a polynomial in sigma / alpha, whatever the state."""

    process = VE

    def __init__(self, degree: int):
        super().__init__()
        self.degree = degree

    def forward(self, x, lam, **cond):
        s = math.exp(-0.5 * lam)
        return Gaussian(x - s * sum((d + 1) * (s - 1.0) ** d for d in range(self.degree + 1)))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_polynomial_noise_is_integrated_exactly_once_there_is_history(k):
    grid = geometric(9)
    stepper = Split(class_guidance(VE, 0.0), AdamsBashforth(k))
    with torch.no_grad():
        states = list(trajectory(Polynomial(k - 1), STARTS, grid, stepper))
    for (_, a), (_, b) in pairwise(enumerate(states[k - 1 :])):
        s, r = math.exp(-0.5 * a.lam), math.exp(-0.5 * b.lam)
        increment = sum((r - 1.0) ** (d + 1) - (s - 1.0) ** (d + 1) for d in range(k))
        within(1e-12, (b.x - a.x - increment).abs().max(), f"increment of order {k}")


@pytest.mark.parametrize("name", [*SEQUENCES, "subcycled"])
def test_the_process_is_only_a_scaling(name):
    paths = []
    for process in (VE, VP, FLOW):
        x = STARTS * process.scales(float(to_data(8)[0]))[0]
        stepper = split(name, class_guidance(process, 4.0), **({"second_coef": "end"} if name == "stsp" else {}))
        with torch.no_grad():
            states = list(trajectory(toy(process), x, to_data(8), stepper))
        paths.append(torch.stack([s.x / process.scales(s.lam)[0] for s in states]))
    within(1e-11, max((path - paths[0]).abs().max() / paths[0].abs().max() for path in paths), name)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_additive_with_equal_orders_is_joint(k):
    """Adams-Bashforth is linear: it makes no difference whether the operators are added before or after."""
    for process in (VP, FLOW):
        g, data, grid = class_guidance(process, 3.0), toy(process), to_data(8)
        a = sample(data, STARTS, grid, split("additive", g, k=k, kick_k=k))
        within(1e-11, (a - sample(Guided(data, g), STARTS, grid, AdamsBashforth(k))).abs().max(), f"order {k}")


def test_merged_halves_are_strang_with_the_same_gradient():
    """With a gradient that is constant in x both are the same path, at N + 1 gradients instead of 2 N."""
    constant = Gradient(lambda x, lam: torch.ones_like(x) * math.cos(lam), 2.0)
    for grid in (geometric(6), to_data(6)):
        with torch.no_grad():
            a, b = (
                torch.stack([s.x for s in trajectory(toy(VP), STARTS, grid, split(name, constant))])
                for name in ("strang", "merged")
            )
        within(1e-12, (a - b).abs().max(), "merged against strang")


def test_kicks_of_the_first_order_are_euler():
    g, grid = class_guidance(VP, 4.0), to_data(6)
    euler = sample(toy(VP), STARTS, grid, Split(g))
    for kick in (MultistepKick(1), MultistepKick(1, "constant"), SubCycled(limit=1e9, most=1), SubCycled(limit=1e9)):
        within(1e-12, (sample(toy(VP), STARTS, grid, Split(g, kick=kick)) - euler).abs().max(), str(kick))


# ---- random moves


def test_a_random_move_is_kicked_where_it_was_drawn():
    g, data, noise = class_guidance(VP, 5.0), toy(VP), Noise(3, range(32))
    step = Split(g, Ancestral(), scheme="lie", order="AB")(data, STARTS, -1.0, 0.5)
    plain = Ancestral()(data, STARTS, -1.0, 0.5)
    torch.testing.assert_close(step.p.mean, plain.p.mean)
    torch.testing.assert_close(step.p.var, plain.p.var)
    drawn = step.p.sample(noise(0, STARTS))
    span = Span.between(-1.0, 0.5)
    stronger = VP.coefficients(-1.0, 0.5, 1.0)[1] / VP.coefficients(-1.0, 0.5, 0.0)[1]
    expected, _ = EulerKick()(Force(g, data, strength=stronger), drawn, 0.5, span)
    assert 1.0 < stronger < 2.0
    assert torch.equal(step.then(drawn), expected)
    assert not torch.equal(expected, drawn)


@pytest.mark.parametrize("eta", [1.0, 0.5])
@pytest.mark.parametrize("scheme", ["lie", "strang", "strang_merged", "heun", "heun_pec", "additive"])
def test_random_moves_reach_the_guided_distribution(scheme, eta):
    """The exact gradient at w = 1: mean and variance of the posterior, within four standard errors and 3 % of the steps'."""
    m, v, r, y, n = torch.zeros(400, dtype=torch.float64), 0.8, 0.6, 1.4, 40
    data, var = GaussianData(m, v, VP), 1.0 / (1.0 / v + 1.0 / r)
    given = GaussianData(m + var * y / r, var, VP)
    g = Gradient(lambda x, lam: given.score(x, lam) - data.score(x, lam))
    stepper = Split(g, Ancestral(eta), scheme=scheme)
    x = generate(data, n, grid=karras(120), transition=stepper, batch=n, last="draw", dtype=torch.float64)
    assert abs(float(x.mean() - given.mean[0])) < 4 * math.sqrt(var / x.numel()) + 0.03
    assert abs(float(x.var()) / var - 1.0) < 4 * math.sqrt(2 / x.numel()) + 0.03


@pytest.mark.parametrize("frugal, plain", [("strang_merged", "strang"), ("heun_pec", "heun")])
def test_around_random_moves_no_gradient_serves_twice(frugal, plain):
    ends, counts = [], []
    for scheme in (frugal, plain):
        log = Log()
        ends.append(
            sample(
                log.denoiser, STARTS, to_data(10), Split(log.guidance, Ancestral(), scheme=scheme), noise=Noise(0, range(32))
            )
        )
        counts.append(sum(kind == "grad" for kind, _, _ in log.calls))
    assert counts == [19, 19]
    within(1e-12, (ends[0] - ends[1]).abs().max(), frugal)


def test_a_random_move_with_a_history_is_refused():
    with refuses("`flow`", "remembers", "order 1", "Ancestral()"):
        sample(toy(VP), STARTS, to_data(4), Split(class_guidance(VP), Exponential(2, eta=1.0)))


# ---- memory, batches, dtypes


@pytest.mark.parametrize("name", [*SEQUENCES, "subcycled", "ancestral-split"])
def test_every_split(name):
    """No state between runs, no trace on what others hold, batches of 0, 1 and n, float32, images."""
    shape = (2, 3, 2)
    data = GaussianData(torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(shape), 0.3, VP)
    nearer = Likelihood(lambda x, lam: -(x - 1.0).square().flatten(1).sum(1), scale=0.5)
    stepper, start = split(name, nearer), torch.randn(3, *shape, dtype=torch.float64)
    whole = sample(data, start, to_data(5), stepper, noise=Noise(0, range(3)))
    assert torch.equal(sample(data, start, to_data(5), stepper, noise=Noise(0, range(3))), whole)
    for rows, dtype in ((0, torch.float64), (1, torch.float64), (3, torch.float32)):
        x = start[:rows].to(dtype)
        with torch.no_grad():
            states = list(trajectory(data, x, to_data(5), copy.deepcopy(stepper), noise=Noise(0, range(rows))))
        kept = [(s.x, s.x.clone()) for s in states]
        assert all(s.x.shape == x.shape and s.x.dtype == dtype for s in states)
        torch.testing.assert_close(states[-1].x.double(), whole[:rows], rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-4)
        assert torch.equal(x, start[:rows].to(dtype))
        assert all(torch.equal(a, b) for a, b in kept)
    assert "Split" in repr(stepper)


@pytest.mark.parametrize("on", ["x_t", "x0"])
@pytest.mark.parametrize("name", SPLITS)
def test_any_mode_of_autograd(name, on):
    """Inference mode changes nothing; where gradients are recorded they flow through the denoiser."""
    stepper = split(name, Likelihood(lambda x, lam: -(x - 0.3).square().sum(1), on=on))
    plain = sample(toy(VP), STARTS, to_data(4), stepper, noise=Noise(0, range(32)))
    with torch.inference_mode():
        inferred = sample(toy(VP), STARTS.clone(), to_data(4), stepper, noise=Noise(0, range(32)))
    assert torch.equal(plain, inferred)
    x = STARTS.clone().requires_grad_()
    for state in trajectory(toy(VP), x, to_data(4), stepper, noise=Noise(0, range(32))):
        end = state.x
    torch.testing.assert_close(end.detach(), plain, rtol=0, atol=1e-12)
    end.sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 1e-3


def test_steps_are_pure():
    """The same step from the same memory gives the same, in any order; old memories are not touched."""
    for name in ("strang", "merged", "heun-pec", "additive", "subcycled"):
        stepper, data, levels = split(name, class_guidance(VP, 2.0)), toy(VP), geometric(4).tolist()
        with torch.no_grad():
            first = stepper(data, STARTS, levels[0], levels[1])
            second = stepper(data, first.p.mean, levels[1], levels[2], first.memory)
            stepper(data, second.p.mean, levels[2], levels[3], second.memory)
            again = stepper(data, first.p.mean, levels[1], levels[2], first.memory)
        assert torch.equal(second.p.mean, again.p.mean), name
        assert (first.memory.steps, second.memory.steps) == (1, 2)


def test_histories_are_kept_apart():
    stepper = Split(class_guidance(VP, 2.0), AdamsBashforth(4), MultistepKick(3), "additive")
    with torch.no_grad():
        states = list(trajectory(toy(VP), STARTS, to_data(6), stepper))[1:]
    assert [len(s.step.memory.flow) for s in states] == [1, 2, 3, 3, 3, 3]
    assert [len(s.step.memory.kick) for s in states] == [1, 2, 2, 2, 2, 2]


# ---- the ends of the levels


@pytest.mark.parametrize("process", [VP, FLOW], ids=str)
@pytest.mark.parametrize("name", [*SEQUENCES, "subcycled", "ancestral-split"])
def test_from_pure_noise(name, process):
    """alpha = 0, where sigma / alpha is infinite: one kick of sigma_s^2 g after the move, then as always."""
    grid = torch.tensor([-INF, -4.0, -2.0, 0.0, 1.0, 3.0, INF], dtype=torch.float64)
    g, data = class_guidance(process, 2.0), toy(process)
    stepper = split(name, g)
    assert sample(data, STARTS / 3, grid, stepper, noise=Noise(0, range(32))).isfinite().all()
    step = stepper(data, STARTS / 3, -INF, -4.0)
    _, sigma = process.scales(-4.0)
    moved = stepper.flow(data, STARTS / 3, -INF, -4.0).p.mean
    end = step.p.mean if step.then is None else step.then(step.p.mean)
    torch.testing.assert_close(end, moved + sigma**2 * g.gradient(data, moved, -4.0), rtol=0, atol=1e-12)
    assert sample(data, STARTS / 3, grid[[0, -1]], stepper, noise=Noise(0, range(32))).isfinite().all()
    assert sample(data, STARTS / 3, Rectified().grid(5), stepper, noise=Noise(0, range(32))).isfinite().all()


def test_levels_that_make_no_sense():
    stepper, data = split("strang", class_guidance(VP)), toy(VP)
    with refuses("`lam_t`", "+inf", "finite level"):
        stepper(data, STARTS, INF, 1.0)
    with refuses("`lam_t`", "floats", "all examples"):
        stepper(data, STARTS, torch.zeros(32), torch.ones(32))
    step = stepper(data, STARTS, 1.0, 1.0)
    assert step.p.mean is STARTS
    for grid in (torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0])):
        with refuses("`grid`"):
            sample(data, STARTS, grid, stepper)


def test_there_and_back():
    g, data, grid = class_guidance(VP, 1.0), toy(VP), geometric(200)
    for name, bound in (("strang2", 5e-4), ("heun-kick", 5e-3)):
        back = sample(data, sample(data, STARTS, grid, split(name, g)), grid.flip(0), split(name, g))
        within(bound, (back - STARTS).abs().max(), f"to the data and back by {name}")


# ---- projections


def test_projections_follow_the_kicks():
    y, known = torch.tensor([0.3, 0.0], dtype=torch.float64), torch.tensor([True, False])
    seen = []

    def project(x: Tensor, lam: float) -> Tensor:
        seen.append(lam)
        return torch.where(known, VP.scales(lam)[0] * y, x)

    for inner in (split("merged", class_guidance(VP, 3.0)), split("ancestral-split", class_guidance(VP)), Ancestral()):
        seen.clear()
        with torch.no_grad():
            states = list(trajectory(toy(VP), STARTS, to_data(4), Projected(inner, project), noise=Noise(0, range(32))))[1:]
        assert seen == to_data(4)[1:].tolist()
        for state in states:
            assert torch.equal(state.x[:, 0], (VP.scales(state.lam)[0] * y[0]).expand(32))
        assert not torch.equal(states[-1].x[:, 1], sample(toy(VP), STARTS, to_data(4), inner)[:, 1])
    assert Projected(Langevin(), project).revisits


# ---- sub-cycling


def stiff(rate: Tensor) -> Gradient:
    """B = rate xbar in VE, each example with its own rate."""
    return Gradient(lambda x, lam: -rate[: len(x), None] * math.exp(0.5 * lam) * x)


class Still(Denoiser):
    process = VE

    def forward(self, x, lam, **cond):
        return Gaussian(x)


def test_stiff_examples_are_sub_cycled_and_others_are_not():
    rate = torch.tensor([0.1, 1.0, 7.9, 40.0], dtype=torch.float64)
    x = torch.ones(4, 2, dtype=torch.float64)
    force, lam = Force(stiff(rate), Still()), -2 * math.log(5.0)
    kicked, memory = SubCycled(limit=1.0, most=64)(force, x, lam, Span(5.0, -1.0))
    parts = torch.tensor([1.0, 1.0, 8.0, 40.0], dtype=torch.float64)
    torch.testing.assert_close(kicked[:, 0], (1 - rate / parts) ** parts, rtol=0, atol=1e-12)
    alone, _ = SubCycled(limit=1.0, most=64)(force, x[:3], lam, Span(5.0, -1.0))
    assert torch.equal(alone, kicked[:3])
    assert memory[0].shape == x.shape


def test_sub_cycling_keeps_what_euler_loses():
    rate = torch.full((32,), 30.0, dtype=torch.float64)
    grid = -2 * torch.log(torch.linspace(5.0, 1.0, 9, dtype=torch.float64))
    blown = sample(Still(), STARTS, grid, Split(stiff(rate)))
    kept = sample(Still(), STARTS, grid, split("subcycled", stiff(rate), most=32))
    assert blown.abs().max() > 1e6
    assert kept.abs().max() < 1e-3


@pytest.mark.parametrize("limit, most", [(1.0, 16), (2.0, 16), (0.7, 3), (1.0, 1)])
def test_no_kick_amplifies_what_it_should_damp(limit, most):
    """However stiff: Euler's own factor where there are parts enough, and never above 1 in size where there are not."""
    hl = torch.tensor([0.5, 0.99, 8.0, 45.0, 90.0, 1e6], dtype=torch.float64)  # |h| L; 45 and 90 made 1e4 and 4e10 of 1 once
    x, span, lam = torch.ones(6, 3, dtype=torch.float64), Span(5.0, -1.0), -2 * math.log(5.0)
    kick, memory = SubCycled(limit, most), None
    force = Force(stiff(hl), Still())
    if most == 1:  # a kick to remember, where nothing is probed
        _, memory = kick(force, 2 * x, lam, Span(5.0, -1e-9))
    kicked, _ = kick(force, x, lam, span, memory)
    parts = (hl / limit).ceil().clamp_min(1.0)
    factor = torch.where(parts <= most, (1 - hl / parts) ** parts, (1 - limit) ** most)
    torch.testing.assert_close(kicked, factor[:, None].expand(6, 3), rtol=0, atol=1e-9)
    assert kicked.abs().max() <= 1.0 + 1e-9
    alone, _ = kick(force, x[:2], lam, span, None if memory is None else tuple(part[:2] for part in memory))
    assert torch.equal(alone, kicked[:2])


def test_stiffness_is_warned_of():
    rate, grid = torch.full((32,), 30.0, dtype=torch.float64), -2 * torch.log(torch.linspace(5.0, 1.0, 9).double())
    with pytest.warns(UserWarning, match="stiff: .h. L passes 2, what 1 parts"):
        sample(Still(), STARTS, grid, Split(stiff(rate), kick=SubCycled(limit=2.0, most=1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(Still(), STARTS, grid, Split(stiff(rate / 10), kick=SubCycled(limit=2.0, most=1)))


STIFF = "the guidance is stiff: .h. L passes .*: take more steps, lower its scale, divide its kicks .SubCycled"


def told(run) -> list[str]:
    """The warnings of a run, each as often as it came."""
    with warnings.catch_warnings(record=True) as got:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in got]


@pytest.mark.parametrize("name", [*SEQUENCES, "ancestral-split"])
def test_every_split_says_where_it_is_unstable(name):
    """g = -w x in VP, for which |h| L is about w / 2 in the first of ten steps: once in a run, and not where it is stable."""
    data, noise, asked = GaussianData(torch.zeros(2, dtype=torch.float64), 1.0, VP), Noise(0, range(32)), [0]

    def slope(x: Tensor, lam: float) -> Tensor:
        asked[0] += 1
        return -x

    counts = []
    for w, times in ((0.5, 0), (40.0, 1)):
        asked[0], stepper = 0, split(name, Gradient(slope, w))
        messages = told(lambda stepper=stepper: sample(data, STARTS, karras(10), stepper, noise=noise))
        assert len(messages) == times if name != "ancestral-split" else bool(messages) == bool(times)
        assert all(re.match(STIFF, message) and not re.search(r"\d\d", message) for message in messages)
        counts.append(asked[0])
    assert counts[0] == counts[1]  # nothing is asked for the estimate


def test_no_guidance_and_kicks_that_cannot_be_unstable_are_not_warned_of():
    data, g = GaussianData(torch.zeros(2, dtype=torch.float64), 1.0, VP), Gradient(lambda x, lam: -x, 40.0)
    near = Quadratic(torch.eye(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64), std=1e-3)
    for stepper in (Split(g, kick=SubCycled(most=64)), Split(near, kick=ExactKick()), Split(near, kick=ImplicitKick())):
        assert not told(lambda stepper=stepper: sample(data, 50 * STARTS, karras(10), stepper))
    assert not told(lambda: sample(toy(VP), 50 * STARTS, karras(10), Split(class_guidance(VP, 0.0))))


def test_one_example_of_a_batch_is_warned_of():
    data, x = GaussianData(torch.zeros(2, dtype=torch.float64), 1.0, VP), STARTS.clone()
    for rate in (
        torch.zeros(32, 1, dtype=torch.float64),
        torch.zeros(32, 1, dtype=torch.float64).index_fill(0, torch.tensor(5), 40.0),
    ):
        g = Gradient(lambda x, lam, rate=rate: -rate * x)
        assert len(told(lambda g=g: sample(data, x, karras(10), Split(g)))) == int(rate.max() > 0)


# ---- names and refusals


def test_every_name():
    assert next(iter(SPLITS)) == "strang"
    for name, entry in SPLITS.items():
        assert "\n" not in entry.about
        assert isinstance(split(name, class_guidance(VP)), Split)
    assert split("ltsp", class_guidance(), order="AB").order == "AB"


G = class_guidance()


@pytest.mark.parametrize(
    "build, pieces",
    [
        (lambda: Split(lambda x, lam: x), ("`guidance`", "Gradient(fn)", "function")),
        (lambda: Split(G, scheme="yoshida"), ("`scheme`", "'yoshida'", "strang_merged")),
        (lambda: Split(G, scheme="lie", order="ABA"), ("`order`", "'ABA'")),
        (lambda: Split(G, second_coef="start"), ("`second_coef`", "'start'", "'end'")),
        (lambda: Split(G, scheme="lie", second_coef="midpoint"), ("`second_coef`", "strang")),
        (lambda: Split(G, kick=StagedKick(), second_coef="midpoint"), ("`second_coef`", "Euler")),
        (lambda: Split(G, kick=StagedKick(), scheme="heun"), ("`kick`", "StagedKick", "'heun'")),
        (lambda: Split(G, kick=StagedKick(), scheme="additive"), ("`kick`", "MultistepKick")),
        (lambda: Split(G, AdamsBashforth(5)), ("`order`", "5", "1, 2, 3 or 4")),
        (lambda: MultistepKick(0), ("`order`", "0")),
        (lambda: MultistepKick(2, "fixed"), ("`coefficients`", "'fixed'")),
        (lambda: SubCycled(0.0), ("`limit`", "0.0", "positive")),
        (lambda: SubCycled(1.0, 0), ("`most`", "0", "at least 1")),
        (lambda: PLMS(5), ("`order`", "5")),
        (lambda: Projected(Ancestral(), None), ("`project`", "NoneType")),
        (lambda: split("starng", G), ("'starng'", "did you mean 'strang'?", "known: ")),
        (lambda: split("strang", G, second_coef="end"), ("`second_coef`", "'strang'", "known: k")),
        (lambda: split("stsp", G, k=7), ("`order`", "7")),
    ],
)
def test_bad_arguments_are_refused(build, pieces):
    with refuses(*pieces):
        build()


@pytest.mark.parametrize(
    "answer, pieces",
    [
        (lambda x: None, ("NoneType", "in step 2")),
        (lambda x: x[:, :1], ("(32, 1)", "in step 2")),
        (lambda x: x.float(), ("torch.float32", "in step 2")),
        (lambda x: x.to(torch.complex128), ("complex", "in step 2")),
        (lambda x: x / 0.0, ("in step 2", "not finite", "scale 3", "lam = ")),
    ],
)
@pytest.mark.parametrize("name", ["ltsp", "strang", "merged", "heun-kick", "additive"])
def test_bad_gradients_name_the_step_and_the_scale(name, answer, pieces):
    late = Gradient(lambda x, lam: answer(x) if lam > geometric(6)[2] - 1e-9 else torch.zeros_like(x), 3.0)
    if name in ("strang", "merged", "heun-kick"):  # these already ask at the end of the step before
        pieces = tuple(piece.replace("in step 2", "in step 1") for piece in pieces)
    with refuses(*pieces):
        sample(toy(), STARTS, geometric(6), split(name, late))


# ---- baselines


@pytest.mark.parametrize("w", [0.0, 4.0])
def test_plms_and_pndm(w):
    """Evaluations, the exactness of constant noise, and PNDM's own middle."""
    table = Table.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    for stepper, extra in ((PLMS(4), 1), (PLMS(1), 0), (PNDM(table), 9), (PNDM(), 9)):
        counted = Counted(toy(VP))
        x = sample(Guided(counted, class_guidance(VP, w)), STARTS, table.grid(10, "linspace"), stepper)
        assert counted.calls == 10 + extra
        assert x.isfinite().all()
        point = GaussianData(torch.tensor([0.7, -1.2], dtype=torch.float64), 0.0, VP)
        within(1e-11, (sample(point, STARTS, table.grid(10, "linspace"), stepper) - point.mean).abs().max(), "constant noise")


def test_pndm_starts_at_the_middle_index():
    table = Table.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    log = Log()
    log.data = toy(VP)
    log.denoiser.process = VP
    sample(log.denoiser, STARTS, table.grid(5, "linspace"), PNDM(table))
    indices = [table.index(lam) for _, lam, _ in log.calls]
    assert [round(i, 2) for i in indices[:8]] == [999, 874, 874, 749, 749, 624.5, 624.5, 500]


def test_order_of_pndm():
    """With starts of fourth order, what is left is the second order of constant coefficients on a grid that shrinks."""
    fine = sample(toy(), STARTS, geometric(600), RK4())
    coarse, half = (float((sample(toy(), STARTS, geometric(n), PNDM()) - fine).abs().max()) for n in (80, 160))
    within(0.15, abs(math.log2(coarse / half) - 2.0), "order of PNDM, off by")
