"""Samplers against what the official code of their papers puts out: EDM's as released with STF, and split-diffusion's PLMS."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import golden
from quieten.denoiser import cosine_table
from quieten.oracle import MixtureData
from quieten.process import VE, VP, Process
from quieten.sampling import sample, trajectory
from quieten.schedule import LinearBeta, Power, Table, churned, karras
from quieten.solver import RK2, AdamsBashforth, Euler, Heun, adams_bashforth_weights
from quieten.transition import Ancestral, Churn, Transition
from quieten.wrap import Clipped, Counted

pytestmark = pytest.mark.usefixtures("one_thread")


def to_data(lam: Tensor) -> Tensor:
    return torch.cat([lam, lam.new_tensor([math.inf])])


def vp_grid() -> Tensor:
    return LinearBeta(0.1, 19.2).grid(20)  # STF's repository has beta_d = 19.1, EDM's 19.9


def ve_grid() -> Tensor:
    return to_data(torch.linspace(-2 * math.log(100.0), -2 * math.log(0.02), 20, dtype=torch.float64))


def iddpm_grid() -> Tensor:
    """Twenty entries of the table, evenly spaced in index, between the default ends of the sampler."""
    lam = cosine_table().lam
    sigma = torch.exp(-0.5 * lam)
    lam = lam[(sigma >= 0.002) & (sigma <= 81.0)].flip(0)
    return to_data(lam[((len(lam) - 1) / 19 * torch.arange(20)).round().long()])


def vp_schedule() -> LinearBeta:
    return LinearBeta.between(0.002, 80.0)


# name of the run: process, grid, transition, tolerance
RUNS: dict[str, tuple[Process, Tensor, Transition, float]] = {
    "edm18": (VE, karras(18), Heun(), 1e-10),
    "edm_churn": (VE, churned(karras(12), 20, 0.05, 50), Churn(Heun(), 1.003), 1e-10),
    "edm_churn_stfdefault": (VE, churned(karras(12), 20, 0.05, 50), Churn(Heun(), 0.0), 1e-10),
    "abl_vp_euler": (VP, vp_grid(), Euler(LinearBeta(0.1, 19.2), VP), 1e-10),
    "abl_ve_heun": (VE, ve_grid(), Heun(Power(0.5), VE), 1e-10),
    "abl_iddpm_heun": (VE, iddpm_grid(), Heun(), 1e-5),  # the official table is float32
    "abl_edm_alpha05": (VE, karras(16), RK2(0.5), 1e-10),
    "abl_edm_vpsched_churn": (VP, churned(karras(12), 10, 0.1, 20), Churn(Heun(vp_schedule(), VP), 1.007), 1e-10),
}


def recorded(noise: np.ndarray, grid: Tensor):
    """The recorded normals of each upward move; they are numbered by the steps of the grid before churn was put in."""
    levels = grid.tolist()
    downward = np.cumsum([0] + [s > t for t, s in itertools.pairwise(levels)])
    return lambda index, x: torch.from_numpy(noise[downward[index]]).to(x)


@pytest.mark.parametrize("name", RUNS)
def test_edm_samplers(name):
    arrays = golden("stf_samplers")
    process, grid, transition, tolerance = RUNS[name]
    mu, s2, pi = (torch.from_numpy(arrays[key]) for key in ("mu", "s2", "pi"))
    denoiser = Counted(MixtureData(mu.reshape(-1, 2, 3, 3), s2, pi, process))
    _, sigma = process.scales(float(grid[0]))
    noise = recorded(arrays[f"{name}_noise"], grid) if f"{name}_noise" in arrays else None
    x = sample(denoiser, torch.from_numpy(arrays["latents"]) * sigma, grid, transition, noise=noise)
    torch.testing.assert_close(x, torch.from_numpy(arrays[f"{name}_out"]), rtol=0, atol=tolerance)
    assert denoiser.calls == arrays[f"{name}_nfe"]


# without guidance, Lie-Trotter splitting of order k is PLMS of order k with a ramp of orders at its start
PLMS = {"ddim1": Ancestral(0.0, spread=False)} | {f"ltsp{k}": AdamsBashforth(k, "constant") for k in (1, 2, 3, 4)}


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("name", PLMS)
def test_plms_trajectories(name, clipped):
    arrays = golden("split_traj_f64")
    table = Table.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    kept = torch.from_numpy(golden("split_schedule")["tmap_10"]).long()
    mu, sd, w = (torch.from_numpy(arrays[f"gmm_{key}"]) for key in ("mu", "sd", "w"))
    data = MixtureData(mu, sd.square(), w, VP)
    states = trajectory(
        Clipped(data) if clipped else data, torch.from_numpy(arrays["x_T"]), to_data(table.lam[kept].flip(0)), PLMS[name]
    )
    with torch.no_grad():
        ours = torch.stack([state.x for state in states])[1:]
    theirs = torch.from_numpy(arrays[f"{name}_N10_w0_c{int(clipped)}"])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_plms_mixing(order):
    arrays = golden("split_mixer")
    eps, mixed = (torch.from_numpy(arrays[key]) for key in ("eps_seq", f"out_order{order}"))
    for i in range(len(eps)):
        past = eps[max(0, i - order + 1) : i + 1].flip(0)  # newest first
        weights = adams_bashforth_weights(list(range(i, i - len(past), -1)), i + 1.0, constant=True)
        ours = torch.tensordot(torch.tensor(weights, dtype=eps.dtype), past, 1)
        torch.testing.assert_close(ours, mixed[i], rtol=0, atol=1e-13)
