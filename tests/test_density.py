"""Likelihood by the probability-flow ODE: exact on Gaussians and mixtures, unbiased with probes, above every bound."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from helpers import f64, gaussian_data, refuses, within
from quieten.encoding.encoded import Encoded, EncodedFlow, Moving
from quieten.gaussian import Gaussian, spread_over
from quieten.likelihood import elbo
from quieten.likelihoods.decoders import Plain
from quieten.likelihoods.density import log_likelihood
from quieten.noise import Draws, Noise
from quieten.oracle import GaussianData, MixtureData
from quieten.process import FLOW, VE, VP, Level, Process
from quieten.sampling import trajectory
from quieten.schedule import Linear, karras
from quieten.solvers.adaptive import RK45

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
    for process in (Encoded(VP), Encoded(VP, "none")):
        data.process = process
        with refuses("counterterm 'split'", str(process), "bound"):
            log_likelihood(data, x0, karras(3), draws=keyed(2))


class Encoding(GaussianData):
    """What a model of data N(mean, var) under the encoder y = k x knows: E[x_t | z], and E[d x_t / d lam | z] apart."""

    def __init__(self, mean: Tensor, var: Tensor, base: Process, k: float):
        super().__init__(mean, var, base)
        self.k, self.data_var = k, var
        self.process = Encoded(base, "sigma2", trained=False) if k == 0 else Encoded(base, "split")

    def forward(self, x: Tensor, lam: Level, **cond: object) -> Gaussian:
        noise = torch.sigmoid(-torch.as_tensor(lam, dtype=torch.float64))
        c = spread_over(1 + noise * (self.k - 1), x)  # x_t = c x
        alpha, sigma = self.process.scales_over(lam, x)
        gain = self.data_var * alpha * c / (alpha**2 * c**2 * self.data_var + sigma**2)
        clean = self.mean + gain * (x - alpha * c * self.mean)
        return Moving(c * clean, rate=spread_over(noise * (1 - noise) * (1 - self.k), x) * clean)


@PROCESSES
@pytest.mark.parametrize("k", [0.0, 2.0], ids=["contraction", "split, k = 2"])
@pytest.mark.parametrize("solver, shape", [(None, (1, 2, 2)), (RK45(1e-8, 1e-8), (3,))], ids=["grid", "adaptive"])
def test_encoded_gaussian_data(process: Process, k: float, solver: RK45 | None, shape: tuple[int, ...]):
    """A linear encoder of Gaussian data, in closed form: that of c x with the noise of the cleanest level."""
    n = math.prod(shape)
    mean, var = f64(*torch.linspace(-0.5, 0.8, n).tolist()).reshape(shape), f64(*torch.linspace(0.1, 0.6, n).tolist())
    data, x0 = Encoding(mean, var.reshape(shape), process, k), torch.linspace(-1, 1, 4 * n, dtype=torch.float64)
    top, noise = 4.0, 1 / (1 + math.exp(4.0))
    c = 1 + noise * (k - 1)
    wanted = Gaussian(c * mean, c * c * var.reshape(shape) + math.exp(-top)).log_prob(x0.reshape(4, *shape))
    grid = torch.linspace(-34.0, top, 2 if solver else 100, dtype=torch.float64)
    # the Jacobian is diagonal: one probe is exact
    found = log_likelihood(data, x0.reshape(4, *shape), grid, draws=keyed(4), solver=solver, probes=1 if solver else None)
    within(1e-6 if solver else 5e-5, (found - wanted).abs().max(), "log-likelihood")


def test_the_likelihood_is_that_of_the_samples_of_the_flow():
    """Samples of EncodedFlow carry their density along: what it adds up to is what the likelihood says of them."""
    data = Encoding(f64(0.3), f64(0.2), VP, 2.0)
    x = torch.randn(50, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    grid = torch.linspace(-12.0, 6.0, 400, dtype=torch.float64)
    end = [state.x for state in trajectory(data, x, torch.cat([grid, f64(math.inf)]), EncodedFlow())][-1]
    (slope,) = torch.autograd.grad(end.sum(), x)
    carried = (Gaussian(torch.zeros(1), torch.ones(1)).log_prob(x) - slope.log().sum(1)).detach()
    found = log_likelihood(data, end.detach(), grid, draws=keyed(50))
    within(1e-3, (found - carried).abs().max(), "density along the path")
