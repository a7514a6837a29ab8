"""Splitting against what the released code of split-diffusion puts out, and exact references for its toy."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from torch import Tensor

from conftest import golden
from helpers import within
from quieten.denoiser import Denoiser
from quieten.gaussian import Gaussian
from quieten.guidance import Gradient, Guided
from quieten.guiding.kick import Force, Span, StagedKick
from quieten.guiding.splits import split
from quieten.oracle import GaussianData, MixtureData
from quieten.process import VE, VP, Process
from quieten.sampling import sample, trajectory
from quieten.schedule import Table
from quieten.solver import RK4
from quieten.solvers.plms import PLMS
from quieten.split import Memory
from quieten.transition import Ancestral, Transition
from quieten.wrap import Clipped

pytestmark = pytest.mark.usefixtures("one_thread")
SPLIT = ("ltsp", "stsp")


def arrays(name: str) -> dict[str, Tensor]:
    return {key: torch.from_numpy(value) for key, value in golden(name).items()}


def linear() -> Table:
    return Table.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))


def respaced(tmap: Tensor) -> Tensor:
    """The released grid: kept indices from noise to data, then the data."""
    return torch.cat([linear().lam[tmap.long()].flip(0), torch.tensor([math.inf], dtype=torch.float64)])


def toy(a: dict[str, Tensor], process: Process = VP, y: Tensor | None = None, w: float = 1.0) -> tuple[MixtureData, Gradient]:
    """The mixture, and the exact gradient of w log p(class y | x_t)."""
    mu, sd, weights, classes = (a[f"gmm_{key}"] for key in ("mu", "sd", "w", "cls"))
    data = MixtureData(mu, sd.square(), weights, process)
    parts = [MixtureData(mu[classes == c], sd[classes == c].square(), weights[classes == c], process) for c in (0, 1)]
    labels = a["y"] if y is None else y

    def score(x: Tensor, lam: float) -> Tensor:
        given = torch.where((labels == 0)[:, None], parts[0].score(x, lam), parts[1].score(x, lam))
        return given - data.score(x, lam)

    return data, Gradient(score, w)


def transition(method: str, order: int, guidance: Gradient) -> Transition:
    if method in SPLIT:
        return split(method, guidance, k=order)
    return PLMS(order) if method == "plms" else Ancestral(0.0, spread=False)


# ---- single steps with frozen outputs


class Queue(Denoiser):
    """Answers its calls with the given noise predictions, one after the other."""

    def __init__(self, *eps: Tensor):
        super().__init__()
        self.process, self.eps, self.calls = VP, eps, 0

    def forward(self, x, lam, **cond):
        alpha, sigma = self.process.scales(lam)
        self.calls += 1
        return Gaussian((x - sigma * self.eps[self.calls - 1]) / alpha)


def queued(*gradients: Tensor) -> Gradient:
    left = iter(gradients)
    return Gradient(lambda x, lam: next(left))


STEPS = re.compile(r"(ltsp|stsp|ddim|plms)_t(\d+)(?:_h(\d))?_c(\d)")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_released_step(dtype):
    a = {key: value.to(dtype) if value.is_floating_point() else value for key, value in arrays("split_step").items()}
    grid = respaced(arrays("split_step")["tmap"]).tolist()
    checked = 0
    for key in a:
        if not (match := STEPS.fullmatch(key)):
            continue
        method, clipped, stored = match[1], match[4] == "1", int(match[3] or 0)
        n = 19 - int(match[2])
        model = Queue(a["net1"], a["net2"])
        denoiser = Clipped(model) if clipped else model
        guidance = queued(a["grad1"], a["grad2"])
        stepper = transition(method, 4, guidance)
        past = tuple((math.exp(-0.5 * grid[n - 1 - j]), a["hist"][stored - 1 - j]) for j in range(stored))
        memory = (Memory(stored, past) if method in SPLIT else past) if past else None
        out = stepper(denoiser if method in SPLIT else Guided(denoiser, guidance), a["x"], grid[n], grid[n + 1], memory)
        expected = a[key]
        error = (out.p.mean - expected).abs().max() / (1.0 if dtype == torch.float64 else expected.abs().max())
        within(1e-10 if dtype == torch.float64 else 1e-4, error, key)
        checked += 1
    assert checked == len(a) - 9, "all but the inputs"


# ---- whole trajectories

RUN = re.compile(r"([a-z]+)(\d)_N(\d+)_w(\d+)_c(\d)")
NAMES = [
    f"{method}{k}_N{n}_w{w}_c{c}"
    for n, w in ((10, 0), (10, 1), (10, 5), (25, 5))
    for c in (0, 1)
    for method, orders in (("ddim", (1,)), ("plms", (2, 4)), ("ltsp", (1, 2, 3, 4)), ("stsp", (1, 2, 3, 4)))
    for k in orders
]


@pytest.mark.parametrize("name", NAMES)
def test_released_trajectories(name):
    a = arrays("split_traj_f64")
    method, k, n, w, clipped = RUN.fullmatch(name).groups()
    data, guidance = toy(a, w=float(w))
    denoiser = Clipped(data) if clipped == "1" else data
    model = denoiser if method in SPLIT else Guided(denoiser, guidance)
    grid = respaced(arrays("split_schedule")[f"tmap_{n}"])
    with torch.no_grad():
        states = list(trajectory(model, a["x_T"], grid, transition(method, int(k), guidance)))[1:]
    within(1e-10, (torch.stack([state.x for state in states]) - a[name]).abs().max(), name)


def test_every_released_trajectory_is_compared():
    assert {key for key in arrays("split_traj_f64") if RUN.fullmatch(key)} == set(NAMES)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_released_mixer(order):
    """What Split does to a history of noise estimates, and how much of it it keeps."""
    a = arrays("split_mixer")
    stepper = split("ltsp", Gradient(lambda x, lam: x, 0.0), k=order)
    lams, memory = [-2.0 * math.log(10.0 - i) for i in range(9)], None
    for i, (lam_t, lam_s) in enumerate(itertools.pairwise(lams)):

        class Fixed(Denoiser):
            process = VE

            def forward(self, x, lam, eps=a["eps_seq"][i], **cond):
                return Gaussian(x - math.exp(-0.5 * lam) * eps)

        step = stepper(Fixed(), torch.zeros(3, 5, dtype=torch.float64), lam_t, lam_s, memory)
        memory = step.memory
        within(1e-13, (-step.p.mean - a[f"out_order{order}"][i]).abs().max(), f"mix {i}")
        assert len(memory.flow or ()) == a[f"histlen_order{order}"][i]


# ---- schedules


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_released_schedules(name):
    a = arrays("split_schedule")
    table = Table.from_betas(a[f"betas_{name}"])
    for n in (10, 25) if name == "linear" else (10,):
        lam = table.lam[a[f"tmap_{n}"].long()]
        sbar, alpha2 = torch.exp(-0.5 * lam), torch.sigmoid(lam)
        torch.testing.assert_close(sbar, a[f"{name}_{n}_sigma"], rtol=1e-9, atol=0)
        torch.testing.assert_close(alpha2, a[f"{name}_{n}_alphas_cumprod"], rtol=1e-9, atol=0)
        previous = torch.cat([alpha2.new_ones(1), alpha2[:-1]])
        torch.testing.assert_close(1.0 - alpha2 / previous, a[f"{name}_{n}_betas"], rtol=1e-9, atol=0)
        torch.testing.assert_close(torch.cat([sbar.new_zeros(1), sbar[:-1]]), a[f"{name}_{n}_sigma_prev"], rtol=1e-9, atol=0)


# ---- exact references


def test_point_values():
    a = arrays("split_reference")
    data, guidance = toy(a)
    for i, s in enumerate(a["pt_sigma"].tolist()):
        lam, row = -2.0 * math.log(s), slice(i, i + 1)
        data, guidance = toy(a, y=a["y"][row])
        x = a["pt_x_vp"][row]
        within(1e-12, (data.predict(x, lam, "eps") - a["pt_eps"][row]).abs().max(), "eps")
        within(1e-12, (guidance.gradient(data, x, lam) - a["pt_grad"][row]).abs().max(), "gradient")
        own = a["gmm_cls"] == a["y"][i]
        given = MixtureData(a["gmm_mu"][own], a["gmm_sd"][own].square(), a["gmm_w"][own], VP)
        logpy = given.log_prob(x, lam) + a["gmm_w"][own].sum().log() - data.log_prob(x, lam)
        within(1e-12, abs(float(logpy) - float(a["pt_logpy"][i])), "log p(y | x)")


@pytest.mark.parametrize("w", [0, 1, 4, 10])
def test_the_exact_guided_flow_is_the_limit(w):
    """Of joint RK4 and of the second-order splittings, from sigma 3 to 0.2."""
    a = arrays("split_reference")
    data, guidance = toy(a, VE, w=float(w))
    grid = torch.linspace(-2 * math.log(float(a["sigma0"])), -2 * math.log(float(a["sigma1"])), 161, dtype=torch.float64)

    def error(transition: Transition, denoiser: Denoiser = data) -> Tensor:
        return (sample(denoiser, a["xbar0"], grid, transition) - a[f"guided_w{w}"]).abs().max()

    within(1e-6, error(RK4(), Guided(data, guidance)), "RK4 joint")
    within(1e-3, error(split("strang2", guidance)), "true Strang")
    within(1e-3, error(split("heun-kick", guidance)), "Heun-kick")


def test_exact_sub_flows():
    """Of the denoiser alone and of the guidance alone, from sigma 3 to 2, with fourth-order parts."""
    a = arrays("split_reference")
    data, guidance = toy(a, VE, w=4.0)
    levels = -2.0 * torch.log(torch.linspace(3.0, 2.0, 101, dtype=torch.float64))
    within(1e-8, (sample(data, a["xbar0"], levels, RK4()) - a["flowA"]).abs().max(), "denoiser alone")
    x, kick, force = a["xbar0"], StagedKick(RK4()), Force(guidance, data)
    for lam_t, lam_s in itertools.pairwise(levels.tolist()):
        x, _ = kick(force, x, lam_t, Span.between(lam_t, lam_s))
    within(1e-8, (x - a["flowB_w4"]).abs().max(), "guidance alone")


@pytest.mark.parametrize("w", [0, 1, 10])
def test_the_linear_table_from_noise_to_its_cleanest_level(w):
    """Two hundred steps come near the exact end: released STSP to the first order, Heun-kick to the second."""
    a = arrays("split_reference")
    data, guidance = toy(a, w=float(w))
    alpha, _ = VP.scales(float(linear().lam[0]))
    grid = linear().grid(200, "linspace")[:-1]
    for name, bound in (("stsp", 0.01), ("heun-kick", 2e-4)):
        end = sample(data, a["x_T_vp"], grid, split(name, guidance)) / alpha
        within(bound, (end - a[f"vp_linear1000_w{w}"]).norm(dim=1).median(), name)


@pytest.mark.parametrize("key", ["w0", "w1", "w3", "w8", "ym_w3", "ym_w8"])
def test_gaussian_reference(key):
    a = arrays("split_reference")
    m, s, r2 = a["ga_m"], a["ga_S"], a["ga_r2"]
    y, w = (m, float(key[4:])) if key.startswith("ym") else (a["ga_y"], float(key[1:]))
    var = 1.0 / (1.0 / s + 1.0 / r2)
    data, given = GaussianData(m, s, VE), GaussianData(var * (m / s + y / r2), var, VE)
    guided = Guided(data, Gradient(lambda x, lam: given.score(x, lam) - data.score(x, lam), w))
    ends = [-2.0 * math.log(float(a[k])) for k in ("ga_s0", "ga_s1")]
    coarse, fine = (sample(guided, a["ga_x0"], torch.linspace(*ends, n + 1, dtype=torch.float64), RK4()) for n in (300, 600))
    expected = a[f"ga_ym_out_{key[3:]}" if key.startswith("ym") else f"ga_out_{key}"]
    within(1e-10, (fine + (fine - coarse) / 15 - expected).abs().max(), "RK4, extrapolated")
