"""Schedules and grids: inverses, slopes, closed forms, official tables, and diffusers' choice of indices."""

import math

import numpy as np
import pytest
import torch

from conftest import golden
from helpers import f64, refuses, within
from quieten.denoiser import cosine_table
from quieten.noise import Draws
from quieten.schedule import (
    Cosine,
    Linear,
    LinearBeta,
    LogNormal,
    Power,
    Rectified,
    Table,
    check_grid,
    churned,
    corrected,
    karras,
)

pytestmark = pytest.mark.usefixtures("one_thread")
INF = math.inf
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
SCHEDULES = {
    "linear": Linear(),
    "linear learned": Linear(10.0, -4.0, learned=True).double(),
    "linear beta": LinearBeta(),
    "linear beta from 0": LinearBeta(start=0.0),
    "linear beta, falling intercept": LinearBeta.between(0.002, 80.0),
    "cosine": Cosine(),
    "cosine shifted": Cosine(shift=-2.8),
    "log-normal": LogNormal(),
    "rectified": Rectified(),
    "rectified shifted": Rectified(3.0),
    "power": Power(0.5),
    "table": Table.from_betas(BETAS),
}
schedules = pytest.mark.parametrize("schedule", list(SCHEDULES.values()), ids=list(SCHEDULES))
ENDED = [name for name in SCHEDULES if name not in ("log-normal", "power")]


@schedules
def test_the_inverse_undoes_the_curve(schedule):
    u = torch.linspace(0.001, 0.999, 400, dtype=torch.float64)
    lam = schedule(u).detach()
    assert lam.dtype == torch.float64
    assert (lam.diff() < 0).all()
    bound = 1e-3 / 999 if isinstance(schedule, Table) else 1e-12  # a table snaps to whole indices within 1e-3
    within(bound, (schedule.inverse(lam) - u).detach().abs().max(), "inverse(forward(u)) - u")
    within(
        5e-12 if bound < 1e-9 else 1e-3,
        (schedule(schedule.inverse(lam)) - lam).detach().abs().max(),
        "forward(inverse(lam)) - lam",
    )
    assert schedule(u.float()).dtype == torch.float32


@schedules
def test_the_rate_is_the_slope(schedule):
    u = torch.linspace(0.0503, 0.95, 60, dtype=torch.float64)  # no entry of the table within h
    h = 1e-6
    lam, rate = schedule.rate(u)
    torch.testing.assert_close(lam, schedule(u))
    torch.testing.assert_close(rate, (schedule(u - h) - schedule(u + h)) / (2 * h), rtol=1e-6, atol=1e-6)
    assert (rate > 0).all()
    learned = any(p.requires_grad for p in schedule.parameters())
    assert lam.requires_grad == rate.requires_grad == learned
    with torch.no_grad():
        torch.testing.assert_close(schedule.rate(u)[1], rate)


def test_the_slope_of_a_table_survives_at_its_entries():
    table = Table(torch.linspace(10, -10, 11, dtype=torch.float64))
    _, rate = table.rate(torch.linspace(0, 1, 21, dtype=torch.float64))
    torch.testing.assert_close(rate, torch.full((21,), 20.0, dtype=torch.float64))


def test_gradients_reach_learned_ends():
    schedule = Linear(10.0, -4.0, learned=True).double()
    u = f64(0.2, 0.7)
    lam, rate = schedule.rate(u)
    (of_lam,) = torch.autograd.grad(lam.sum(), schedule.ends, retain_graph=True)
    (of_rate,) = torch.autograd.grad(rate.sum(), schedule.ends)
    torch.testing.assert_close(of_lam, torch.stack([(1 - u).sum(), u.sum()]))
    torch.testing.assert_close(of_rate, f64(2.0, -2.0))


@pytest.mark.parametrize("spacing", ["uniform", "quadratic"])
@pytest.mark.parametrize("steps", [1, 2, 7, 40])
@pytest.mark.parametrize("name", ENDED)
def test_grids_rise_from_noise_to_the_data(name, steps, spacing):
    if name == "table" and spacing == "quadratic" and steps == 40:
        steps = 20  # DDIM's list repeats entries for many steps
    grid = SCHEDULES[name].grid(steps, spacing)
    assert (grid.shape, grid.dtype) == ((steps + 1,), torch.float64)
    assert grid[-1] == INF
    assert grid[:-1].max() < INF
    assert len(check_grid(grid)) == steps + 1  # rises strictly
    assert grid[0] <= SCHEDULES[name](f64(0.7))[0]
    if spacing == "uniform" and name == "linear":
        torch.testing.assert_close(grid[:-1], torch.linspace(-5, 13.3, steps, dtype=torch.float64))


def test_rectified_grids_start_in_pure_noise_and_are_straight_in_sigma():
    grid = Rectified().grid(4)
    torch.testing.assert_close(torch.sigmoid(-grid / 2), f64(1, 0.75, 0.5, 0.25, 0))
    shifted = Rectified(3.0).grid(4)
    r = f64(1, 0.75, 0.5, 0.25, 0)
    torch.testing.assert_close(torch.sigmoid(-shifted / 2), 3 * r / (1 + 2 * r))


def test_curves_have_their_closed_forms():
    u = f64(0.1, 0.5, 0.9)
    t = 1e-3 + (1 - 1e-3) * u
    alpha2 = torch.exp(-(0.1 * t + 0.5 * 19.9 * t**2))
    torch.testing.assert_close(LinearBeta()(u), torch.logit(alpha2), rtol=1e-12, atol=1e-12)
    wide = Cosine(lam_max=60.0, lam_min=-60.0)  # the ends of the cosine itself, nearly: alpha = cos(pi u / 2)
    torch.testing.assert_close(wide(u), -2 * torch.log(torch.tan(0.5 * math.pi * u)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(Cosine(shift=-1.5)(f64(0, 1)), f64(15, -15), rtol=1e-11, atol=0)
    shift = 2 * math.log(64 / 256)  # simple diffusion: every level moves by the shift, before the ends are cut
    torch.testing.assert_close(Cosine(60 + shift, -60 + shift, shift)(u), wide(u) + shift, rtol=1e-12, atol=1e-12)
    z = torch.special.ndtri(u)
    torch.testing.assert_close(torch.exp(-0.5 * LogNormal()(u)), torch.exp(-1.2 + 1.2 * z))
    torch.testing.assert_close(torch.exp(-0.5 * Power(2.0)(u)), u**2)
    torch.testing.assert_close(Linear(4.0, -6.0)(u), 4 - 10 * u)


def test_linear_beta_between_two_noise_levels():
    curve = LinearBeta.between(0.002, 80.0)
    torch.testing.assert_close(torch.exp(-0.5 * curve(f64(0, 1))), f64(0.002, 80), rtol=1e-12, atol=0)
    lam = torch.linspace(-80, 40, 121, dtype=torch.float64)
    whole = LinearBeta(start=0.0)
    torch.testing.assert_close(whole(whole.inverse(lam)), lam, rtol=1e-12, atol=1e-12)
    assert whole.inverse(f64(INF)).item() == 0.0


def test_the_linear_table_of_ddpm():
    alpha2 = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    table = Table.from_betas(BETAS)
    for index, known in ((0, 0.9999), (499, alpha2[499]), (999, 4.035829765375546e-05)):
        assert math.isclose(torch.sigmoid(table.lam[index]).item(), known, rel_tol=1e-12)
    torch.testing.assert_close(table.lam, torch.logit(torch.tensor(alpha2)), rtol=0, atol=1e-11)
    sigmas = ((1 - alpha2) / alpha2) ** 0.5
    torch.testing.assert_close(Table.from_sigmas(np.append(sigmas[::-1], 0.0).copy()).lam, table.lam, rtol=0, atol=1e-11)
    torch.testing.assert_close(Table.from_alphas_cumprod(alpha2).lam, table.lam, rtol=0, atol=1e-11)
    assert len(table) == 1000


def test_the_cosine_table_of_edm():
    u = golden("stf_precond")["iddpm_u"]
    sigma = torch.exp(-0.5 * cosine_table().lam).flip(0).numpy()
    assert u[-1] == 0
    within(5e-4, (np.abs(sigma - u[:-1]) / u[:-1]).max(), "sigma from the official float32 table, relative")


@pytest.mark.parametrize("name", ["linear", "cosine", "vpsde"])
def test_tables_of_the_official_ocm_code(name):
    arrays = golden("ocm_schedule")
    table = Table.from_betas(arrays[f"{name}_1000_betas"][1:])
    for key, mine in (("cum_alphas", torch.sigmoid(table.lam)), ("cum_betas", torch.sigmoid(-table.lam))):
        within(1e-12, np.abs(mine.numpy() - arrays[f"{name}_1000_{key}"][1:]).max(), key)


@pytest.mark.parametrize("n", [1000, 4000])
def test_trajectories_of_the_official_ocm_code(n):
    arrays, table = golden("ocm_trajectory"), Table(torch.linspace(9, -9, n, dtype=torch.float64))
    checked = 0
    for key, want in arrays.items():
        name, _, size = key.partition(f"_N{n}_K")
        if not size or name not in ("linear", "linear_ddim", "quad_ddim") or len(np.unique(want)) < len(want):
            continue  # others belong to other tests; DDIM's quadratic list repeats entries for many steps
        spacing = {"linear": "linspace", "linear_ddim": "leading", "quad_ddim": "quadratic"}[name]
        got = table.indices(int(size), spacing).flip(0).numpy() + 1
        if name == "linear":  # ties are rounded to even, here among 0-based indices as in diffusers, there among 1-based
            exact = 1 + np.arange(int(size)) * ((n - 1) / (int(size) - 1))
            tie = np.abs(exact % 1 - 0.5) < 1e-9
            assert np.abs(got - exact)[tie].max(initial=0.5) < 0.5 + 1e-9, key
            got, want = got[~tie], want[~tie]
        assert (got == want).all(), key
        assert (
            table.grid(int(size), spacing)[:-1].flip(0) == table.lam[table.indices(int(size), spacing).flip(0).long()]
        ).all()
        checked += len(want)
    assert checked > 1000


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_indices_are_those_of_diffusers(spacing):
    ddim = pytest.importorskip("diffusers.schedulers.scheduling_ddim").DDIMScheduler
    table = Table.from_betas(BETAS)
    for steps in (1, 2, 3, 7, 10, 20, 21, 50, 83, 100, 163, 250, 333, 999, 1000):
        if spacing == "linspace" and steps == 1:
            continue  # numpy's linspace of one number is the cleanest level; ours is the noisiest
        for offset in (0, 1) if spacing == "leading" and steps not in (1, 1000) else (0,):
            scheduler = ddim(timestep_spacing=spacing, steps_offset=offset)
            scheduler.set_timesteps(steps)
            assert table.indices(steps, spacing, offset).tolist() == scheduler.timesteps.tolist(), (steps, offset)


@pytest.mark.parametrize("n", [2, 100, 1000])
def test_every_number_of_steps_has_a_grid(n):
    table = Table(torch.linspace(9, -9, n, dtype=torch.float64))
    for steps in range(1, n + 1, 1 if n < 1000 else 7):
        for spacing in ("leading", "trailing", "linspace", "uniform"):
            index = table.indices(steps, spacing)
            assert index.shape == (steps,)
            assert 0 <= index[-1] <= index[0] <= n - 1
        assert torch.equal(table.indices(steps, "trailing")[:1], f64(n - 1))


@pytest.mark.parametrize("name", ["ddpm", "cosine", "4000"])
def test_a_tables_own_levels_have_whole_indices(name):
    betas = torch.linspace(2.5e-5, 0.005, 4000, dtype=torch.float64)
    table = {"ddpm": Table.from_betas(BETAS), "cosine": cosine_table(), "4000": Table.from_betas(betas)}[name]
    whole = torch.arange(len(table), dtype=torch.float64)
    sigma = torch.exp(-0.5 * table.lam)
    assert torch.equal(table.index(table.lam), whole)
    assert torch.equal(table.index(-2 * torch.log(sigma)), whole)
    assert torch.equal(table.index(torch.logit(1 / (1 + sigma**2))), whole)
    assert torch.equal(table.index(table.lam.float()).double(), whole)
    assert torch.equal(table.at(whole), table.lam)
    assert torch.equal(table.nearest(table.lam), whole)
    assert [table.index(lam) for lam in table.lam.tolist()] == whole.tolist()


def test_indices_between_and_outside_the_entries():
    table = Table(f64(9, 7, 3, -1))
    lam = f64(100, 9, 8.5, 3, 2, -1, -100, INF, -INF, 3.003)
    want = [0, 0, 0.25, 2, 2.25, 3, 3, 0, 3, 2]
    assert table.index(lam).tolist() == want  # the last snaps: within 1e-3 of an index
    assert [table.index(value) for value in lam.tolist()] == want
    assert table.at(f64(0.25, 2.25, -5, 7)).tolist() == [8.5, 2, 9, -1]
    assert table.index(f64(3.1)).item() == pytest.approx(1.975)
    sigma = torch.exp(-0.5 * table.lam)
    middle = 0.5 * (sigma[1] + sigma[2])
    assert table.nearest(-2 * torch.log(torch.stack([middle - 1e-9, middle + 1e-9]))).tolist() == [1, 2]


def test_tables_with_zero_terminal_snr():
    alpha = torch.sqrt(torch.cumprod(1 - BETAS, 0))
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])  # Lin et al. (2024), algorithm 1
    table = Table.from_alphas_cumprod(alpha**2)
    assert table.lam[-1] == -INF
    whole = torch.arange(1000, dtype=torch.float64)
    assert torch.equal(table.index(table.lam), whole)
    assert [table.index(lam) for lam in table.lam[-2:].tolist()] == [998.0, 999.0]
    assert torch.equal(table.at(whole), table.lam)
    assert table.at(f64(998.5)).item() == -INF
    assert table.index(f64(-60)).item() == 998
    for spacing in ("trailing", "linspace"):
        grid = table.grid(10, spacing)
        assert grid[0] == -INF
        assert not grid.isnan().any()
    assert torch.isfinite(table.grid(10, "leading")[0])


def test_karras_grid():
    grid = karras(18)
    i = torch.arange(18, dtype=torch.float64)
    sigma = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(torch.exp(-0.5 * grid[:-1]), sigma, rtol=1e-12, atol=0)
    assert grid[-1] == INF
    torch.testing.assert_close(torch.exp(-0.5 * karras(1, 0.1, 10)), f64(10, 0))
    torch.testing.assert_close(torch.exp(-0.5 * karras(5, 1, 9, rho=1)), f64(9, 7, 5, 3, 1, 0))


def test_churned_grid():
    grid = karras(12)
    assert torch.equal(churned(grid, 0.0), grid)
    sigma = torch.exp(-0.5 * grid)
    out = torch.exp(-0.5 * churned(grid, 6.0, 0.05, 50.0)).tolist()
    want = []
    for s in sigma.tolist():
        want += [s, s * (1 + min(6 / 12, math.sqrt(2) - 1))] if 0.05 <= s <= 50 else [s]
    assert out == pytest.approx(want, rel=1e-12)
    gentle = churned(grid, 1.2)
    assert len(gentle) == 2 * 12 + 1
    assert gentle[0] - gentle[1] == pytest.approx(2 * math.log(1.1), rel=1e-12)


def test_corrected_grid():
    assert corrected(f64(-INF, 1, 2, INF), 2).tolist() == [-INF, 1, 1, 1, 2, 2, 2, INF]


def test_draws_are_stratified():
    u = Linear().draw(Draws(0, 0, range(8)))
    assert u.shape == (8,)
    torch.testing.assert_close(u.sort().values.diff(), torch.full((7,), 1 / 8, dtype=torch.float64))


def test_bad_schedules_are_refused():
    for build in (lambda: Linear(-5.0, 13.3), lambda: Cosine(-5.0, 13.3), lambda: Linear(INF, 0.0)):
        with refuses("`lam_max`", "`lam_min`"):
            build()
    with refuses("`beta_min`", "`beta_max`"):
        LinearBeta(20.0, 0.1)
    with refuses("`std`", "-1", "positive"):
        LogNormal(std=-1.0)
    with refuses("`shift`", "0", "positive"):
        Rectified(0.0)
    with refuses("`power`", "0", "positive"):
        Power(0.0)
    for lam in ([1.0], [1.0, 2.0], [2.0, 2.0], [2.0, math.nan], [[2.0, 1.0]]):
        with refuses("`lam`", "strictly decreasing"):
            Table(lam)


def test_bad_grids_are_refused():
    for steps in (0, -3, 2.0, True):
        with refuses("`steps`", repr(steps), "positive integer"):
            Linear().grid(steps)
        with refuses("`steps`", repr(steps), "positive integer"):
            karras(steps)
    with refuses("`spacing`", "'karras'", "'quadratic'"):
        Linear().grid(5, "karras")
    table = Table.from_betas(BETAS)
    with refuses("`spacing`", "'cubic'", "'leading'"):
        table.grid(5, "cubic")
    with refuses("`steps`", "1001", "1000"):
        table.grid(1001)
    with refuses("`spacing`", "'quadratic'", "900", "fewer steps"):
        table.grid(900, "quadratic")
    with refuses("'leading'", "offset 1", "1000"):
        table.grid(1000, "leading", offset=1)
    for schedule in (LogNormal(), Power()):
        with refuses(type(schedule).__name__, "karras"):
            schedule.grid(5)
    for ends in ((80.0, 0.002), (0.0, 80.0), (-1.0, 1.0)):
        with refuses("`sigma_min`", str(ends[0])):
            karras(5, *ends)
    with refuses("`s_churn`", "-1"):
        churned(karras(3), -1.0)


def test_check_grid_refuses_what_does_not_rise():
    assert check_grid([-1, 2.5, INF]) == [-1.0, 2.5, INF]
    assert check_grid([INF, 2.5, -1], falling=True) == [INF, 2.5, -1.0]
    assert check_grid([1, 0.5, 1, 2], revisits=True) == [1, 0.5, 1, 2]
    for grid in ([1, 0.5, 1, 2], [1.0, 1.0], [3, 2, 1]):
        with refuses("`grid`", "1", "rise strictly", "sort it"):
            check_grid(grid)
    for grid in ([1.0], [], [1.0, math.nan], [[1.0, 2.0]], 3.0):
        with refuses("`grid`", "at least 2", "Schedule.grid"):
            check_grid(grid)


# ---- times at the border


@schedules
def test_one_number_is_a_time(schedule):
    """A float is a tensor (): in float64, where none had been."""
    u = f64(0.25)
    assert torch.equal(schedule(0.25), schedule(u)[0])
    assert torch.equal(schedule(u[0]), schedule(u)[0])
    assert (schedule(0.25).dtype, schedule(0.25).shape) == (torch.float64, ())


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "power"])
def test_a_time_outside_is_refused(name):
    for u in (-0.01, 1.5, 2, math.nan, math.inf):
        for given in (u, torch.tensor(u), torch.tensor(float(u), dtype=torch.float64, requires_grad=True)):
            with refuses("`u`", "[0, 1]", f"{u:g}"):
                SCHEDULES[name](given)


@pytest.mark.parametrize("name", ENDED)
def test_rounding_at_the_ends_is_no_time_outside(name):
    for lam in SCHEDULES[name](f64(0.0, 1.0)).detach():
        SCHEDULES[name](SCHEDULES[name].inverse(lam))  # a little beyond, perhaps


def test_what_is_not_looked_at():
    """Vectors, whatever the device; one number that vmap hides; and times that have no end."""
    curve = Linear(5.0, -5.0)
    torch.testing.assert_close(curve(f64(-0.5, 1.5)), f64(10.0, -10.0))
    assert curve(torch.tensor(2.0, device="meta")).shape == ()
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(curve))(f64(-0.5, 0.5)), f64(-10.0, -10.0))
    assert float(Power()(3.0)) == pytest.approx(-2 * math.log(3.0))
    assert float(curve.rate(torch.tensor(1.5))[1]) == 10.0, "solvers go on beyond the ends"
