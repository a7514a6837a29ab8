"""diffusers' schedulers on our denoisers draw what our own samplers draw on the levels that they choose."""

from __future__ import annotations

import math

import pytest
import torch

from helpers import refuses
from quieten.noise import Noise
from quieten.oracle import MixtureData
from quieten.process import FLOW, VE, VP, Process
from quieten.sampling import sample
from quieten.schedule import Cosine, Table, karras
from quieten.solver import Exponential, Heun
from quieten.solvers.dpm import UniPC
from quieten.transition import Ancestral, Transition
from quieten.wrap import Counted

pytest.importorskip("diffusers")
from quieten.interop.schedulers import THEIRS, Theirs

OURS: dict[str, Transition] = {
    "ddim": Ancestral(0.0, spread=False),
    "dpm++": Exponential(2),
    "unipc": UniPC(),
    "heun": Heun(),
}
TABLE = Table(karras(1000, 0.01, 80.0)[:-1].flip(0))


def mixture(process: Process) -> MixtureData:
    means = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return MixtureData(means, vars=0.05, process=process)


def noise() -> torch.Tensor:
    return torch.randn(100, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("process", [VP, VE, FLOW])
@pytest.mark.parametrize("name", OURS)
def test_they_draw_what_ours_draw_on_their_levels(name: str, process: Process) -> None:
    data, theirs = mixture(process), Theirs(name, TABLE, 10)
    grid = torch.tensor([*sorted(set(theirs.levels)), math.inf], dtype=torch.float64)
    ours = sample(data, process.prior(float(grid[0])).sample(noise()), grid, OURS[name])
    # the first states differ a little: their noise has the scale of the process they work in
    assert (theirs(data, noise()) - ours).abs().max() < 1e-3


@pytest.mark.parametrize("name", THEIRS)
def test_evaluations_are_known_before(name: str) -> None:
    for steps in (5, 10):
        theirs, counted = Theirs(name, TABLE, steps), Counted(mixture(VP))
        x = theirs(counted, noise())
        assert counted.calls == len(theirs.levels) >= steps
        assert x.isfinite().all()
        assert torch.equal(theirs(counted, noise()), x), "a second call starts afresh"
        assert theirs(counted, noise().double()).dtype == torch.float64


def test_more_steps_come_nearer_to_the_data() -> None:
    data = mixture(VP)
    exact = float(data.log_prob(data.sample(Noise(0, range(500)))).mean())
    for name in ("dpm++", "unipc", "heun"):
        gaps = [abs(exact - float(data.log_prob(Theirs(name, TABLE, n)(data, noise()).double()).mean())) for n in (4, 30)]
        assert gaps[1] < gaps[0], name


def test_ends_at_pure_noise_are_left_out_and_unknown_names_refused() -> None:
    curve = Cosine()(torch.linspace(0, 1, 200, dtype=torch.float64))
    ended = Table(torch.cat([curve, torch.tensor([-math.inf], dtype=torch.float64)]))
    assert all(math.isfinite(lam) for lam in Theirs("ddim", ended, 5).levels)
    with refuses("'euler'", "ddim"):
        Theirs("euler", TABLE, 5)
    with refuses("DDIMScheduler", "2000 steps"):
        Theirs("ddim", TABLE, 2000)
