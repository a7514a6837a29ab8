"""Likelihood by the probability-flow ODE: exact on Gaussians and mixtures, unbiased with probes, above every bound."""

from __future__ import annotations

import math

import pytest
import torch

from helpers import f64, gaussian_data, refuses, within
from quieten.adaptive import RK45
from quieten.decoders import Plain
from quieten.density import log_likelihood
from quieten.encoded import Encoded
from quieten.likelihood import elbo
from quieten.noise import Draws, Noise
from quieten.oracle import GaussianData, MixtureData
from quieten.process import FLOW, VE, VP, Process
from quieten.schedule import Linear, karras

PROCESSES = pytest.mark.parametrize("process", [VP, VE, FLOW], ids=str)


def keyed(n: int, seed: int = 0) -> Draws:
    return Draws(seed, 0, range(n))


@PROCESSES
@pytest.mark.parametrize("kind", ["vector", "image, full covariance"])
@pytest.mark.parametrize("solver", [None, RK45(1e-8, 1e-8)], ids=["grid", "adaptive"])
def test_gaussian_data(process: Process, kind: str, solver: RK45 | None):
    """The ODE carries Gaussians exactly: what differs is the noise at the clean end, and the prior at the noisy one."""
    data = gaussian_data(kind, process)
    x0 = data.sample(Noise(0, range(4)))
    grid = torch.linspace(-34.0, 30.0, 90, dtype=torch.float64)
    found = log_likelihood(data, x0, grid, draws=keyed(4), solver=solver)
    within(1e-6 if solver else 5e-4, (found - data.log_prob(x0)).abs().max(), "log-likelihood")


@PROCESSES
def test_mixtures(process: Process):
    data = MixtureData(
        f64(-0.8, 0.1, 0.9)[:, None] * torch.ones(3, 2, dtype=torch.float64), f64(0.01, 0.04, 0.02), process=process
    )
    x0 = data.sample(Noise(0, range(20)))
    found = log_likelihood(data, x0, Linear(18.0, -20.0).grid(2), draws=keyed(20), solver=RK45(1e-8, 1e-8))
    within(1e-4, (found - data.log_prob(x0)).abs().max(), "log-likelihood of a mixture")


def test_fixed_steps_are_of_fourth_order():
    data = MixtureData(f64(-0.8, 0.9)[:, None], f64(0.04, 0.09), process=VP)
    x0 = data.sample(Noise(0, range(3)))
    limit = log_likelihood(data, x0, Linear(8.0, -8.0).grid(800), draws=keyed(3))
    errors = [
        float((log_likelihood(data, x0, Linear(8.0, -8.0).grid(n), draws=keyed(3)) - limit).abs().mean()) for n in (100, 200)
    ]
    order = math.log2(errors[0] / errors[1])
    print(f"order {order:.2f}, errors {errors}")
    assert 3.5 < order < 4.7


def test_probes_are_unbiased():
    """Over many probes the estimate scatters about the exact trace, and less with more of them."""
    data, n = gaussian_data("vector, full covariance", VP), 2000
    x0 = data.sample(Noise(0, range(1))).expand(n, 5)
    grid = Linear(8.0, -8.0).grid(12)
    exact = log_likelihood(data, x0[:1], grid, draws=keyed(1))
    one, four = (log_likelihood(data, x0, grid, draws=keyed(n), probes=probes) for probes in (1, 4))
    for found in (one, four):
        within(4 * float(found.std()) / math.sqrt(n), (found.mean() - exact).abs().max(), "mean over probes")
    within(0.4, abs(float(one.var() / four.var()) / 4 - 1), "variance of four probes")


def test_diagonal_jacobians_need_one_probe():
    data = gaussian_data("image", VP)
    x0 = data.sample(Noise(0, range(3)))
    grid = Linear(8.0, -8.0).grid(12)
    a, b = (log_likelihood(data, x0, grid, draws=keyed(3), probes=probes) for probes in (None, 1))
    within(1e-10, (a - b).abs().max(), "one probe against the exact trace")


def test_three_estimators_agree():
    """ODE, continuous bound, and bound in many steps, on a mixture with the exact denoiser: within the bounds' noise."""
    data, n = MixtureData(f64(-0.7, 0.5)[:, None], f64(0.05, 0.08), process=VP), 1500
    x0 = data.sample(Noise(0, range(n)))
    ode = -log_likelihood(data, x0, Linear(12.0, -12.0).grid(2), draws=keyed(n), solver=RK45(1e-6, 1e-6))
    continuous = elbo(data, x0, Plain(), Linear(12.0, -12.0), draws=keyed(n)).total
    steps = elbo(data, x0, Plain(), torch.linspace(-12.0, 12.0, 300, dtype=torch.float64), draws=keyed(n)).total
    truth = -data.log_prob(x0)
    within(1e-3, (ode - truth).mean().abs(), "ODE")
    for name, bound in (("continuous", continuous), ("300 steps", steps)):
        gap = bound - truth
        within(4 * float(gap.std()) / math.sqrt(n) + 0.01, gap.mean().abs(), name)
        assert gap.mean() > -4 * gap.std() / math.sqrt(n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("probes", [None, 2])
@pytest.mark.parametrize("solver", [None, RK45(1e-4, 1e-4)], ids=["grid", "adaptive"])
def test_any_batch(batch: int, dtype: torch.dtype, probes: int | None, solver: RK45 | None):
    data = gaussian_data("image")
    x0 = data.sample(Noise(0, range(batch))).to(dtype)
    found = log_likelihood(data, x0, karras(4), draws=keyed(batch), probes=probes, solver=solver)
    assert found.shape == (batch,)
    assert found.isfinite().all()
    assert not found.requires_grad


def test_refusals():
    data = GaussianData(torch.zeros(2), torch.ones(2), VP)
    x0 = torch.zeros(2, 2)
    with refuses("`probes`", "0"):
        log_likelihood(data, x0, karras(3), draws=keyed(2), probes=0)
    with refuses("`draws`", "3 examples"):
        log_likelihood(data, x0, karras(3), draws=keyed(3))
    with refuses("`grid`", "two finite levels"):
        log_likelihood(data, x0, karras(1), draws=keyed(2))
    with refuses("`grid`", "rise strictly"):
        log_likelihood(data, x0, f64(2.0, 1.0, 3.0), draws=keyed(2))
    data.process = Encoded(VP)
    with refuses("encoder"):
        log_likelihood(data, x0, karras(3), draws=keyed(2))
