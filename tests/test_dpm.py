"""DPM-Solver++ 2S and UniPC: order, agreement with diffusers, what they cost and refuse."""

from __future__ import annotations

import math

import pytest
import torch

from guided_toy import STARTS, class_guidance, geometric, toy
from helpers import refuses, within
from quieten.oracle import GaussianData
from quieten.process import FLOW, VE, VP
from quieten.sampling import sample
from quieten.schedule import Table, karras
from quieten.solver import RK4
from quieten.solvers.dpm import Singlestep, UniPC
from quieten.split import Split
from quieten.transition import Ancestral
from quieten.wrap import Counted

pytestmark = pytest.mark.usefixtures("one_thread")
SOLVERS = {
    "2S": (Singlestep(), 2, 2),
    "2S, r = 0.8": (Singlestep(0.8), 2, 2),
    "UniP-1": (UniPC(1, corrector=False), 1, 1),
    "UniPC-1": (UniPC(1), 2, 1),
    "UniP-2": (UniPC(2, corrector=False), 2, 1),
    "UniPC-2": (UniPC(2), 2, 1),
    "UniP-3": (UniPC(3, corrector=False), 2, 1),  # its first steps are of lower order
    "UniPC-3": (UniPC(3), 3, 1),
}


@pytest.mark.parametrize("process", [VE, VP, FLOW], ids=str)
@pytest.mark.parametrize("name", SOLVERS)
def test_order_and_exactness(name, process):
    stepper, order, cost = SOLVERS[name]
    start = STARTS * process.scales(float(geometric(1)[0]))[0]
    fine = sample(toy(process), start, geometric(400), RK4())
    counted = Counted(toy(process))
    coarse, half = (float((sample(counted, start, geometric(n), stepper) - fine).abs().max()) for n in (60, 120))
    assert counted.calls == cost * 180
    assert math.log2(coarse / half) > order - 0.2, f"order {math.log2(coarse / half):.2f}"
    point = GaussianData(torch.tensor([0.7, -1.2], dtype=torch.float64), 0.0, process)
    for grid in (karras(5, 0.02, 3.0), torch.tensor([-math.inf, -2.0, 0.0, 1.0, math.inf]).double()):
        if process is not VE or grid[0] > -math.inf:
            within(1e-12, (sample(point, start, grid, stepper) - point.mean).abs().max(), "straight lines")


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_is_that_of_diffusers(order):
    diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
    table = Table.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    theirs = diffusers.UniPCMultistepScheduler(
        beta_schedule="linear", solver_order=order, solver_type="bh2", final_sigmas_type="zero", lower_order_final=order == 1
    )
    theirs.set_timesteps(9)
    index = theirs.timesteps
    grid = torch.cat([table.lam[index], torch.tensor([math.inf], dtype=torch.float64)])
    data, x = toy(VP), STARTS / 3
    expected = x.clone()
    with torch.no_grad():
        for n, t in enumerate(index):
            if n == len(index) - 1:
                theirs.lower_order_nums = 0  # the step to the data is of order 1
            expected = theirs.step(data.predict(expected, float(grid[n]), "eps"), t, expected).prev_sample
    within(5e-6, (sample(data, x, grid, UniPC(order)) - expected).abs().max(), "float32 tables there")


def test_a_corrector_discards_kicks_and_is_refused():
    with refuses("`flow`", "UniPC", "discards kicks", "corrector"):
        Split(class_guidance(), UniPC())
    grid = torch.cat([geometric(20), torch.tensor([math.inf], dtype=torch.float64)])
    kicked = sample(toy(), STARTS, grid, Split(class_guidance(w=4.0), UniPC(2, corrector=False)))
    near = sample(toy(), STARTS, grid, Split(class_guidance(w=4.0)))
    assert (kicked - near).abs().median() < 0.05
    assert (kicked - sample(toy(), STARTS, grid, Ancestral(0.0, spread=False))).abs().max() > 0.3


@pytest.mark.parametrize(
    "build, pieces",
    [(lambda: Singlestep(0.0), ("`r`", "0.0", "(0, 1]")), (lambda: UniPC(4), ("`order`", "4", "1, 2 or 3"))],
)
def test_bad_arguments_are_refused(build, pieces):
    with refuses(*pieces):
        build()
