"""Euler-Maruyama, and the predictor-corrector of score_sde: formulas as published, laws on Gaussian data."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from helpers import affine, gaussian_data, refuses, within
from quieten.noise import Noise
from quieten.oracle import GaussianData, MixtureData
from quieten.process import FLOW, VE, VP
from quieten.sampling import sample, trajectory
from quieten.schedule import Cosine, Linear, LinearBeta, karras
from quieten.solvers.samplers import sampler
from quieten.solvers.sde import EulerMaruyama
from quieten.transition import Ancestral, Langevin
from quieten.wrap import Counted

pytestmark = pytest.mark.usefixtures("one_thread")
INF = math.inf


def mixture(process) -> MixtureData:
    means = torch.tensor([[1.0, 0.5], [-0.8, 1.0], [-0.5, -1.2]], dtype=torch.float64)
    return MixtureData(means, torch.tensor([0.1, 0.2, 0.3]).double(), torch.tensor([0.3, 0.3, 0.4]), process)


def geometric(n: int, low: float, high: float) -> Tensor:
    """score_sde's noise levels, largest first, then the data."""
    lam = torch.linspace(-2 * math.log(high), -2 * math.log(low), n, dtype=torch.float64)
    return torch.cat([lam, lam.new_tensor([INF])])


def test_reverse_diffusion_is_the_step_in_sigma_squared() -> None:
    data, x = mixture(VE), torch.randn(6, 2, dtype=torch.float64)
    for lam_t, lam_s in pairwise(geometric(6, 0.05, 9.0).tolist()):
        gained = VE.scales(lam_t)[1] ** 2 - VE.scales(lam_s)[1] ** 2
        p = EulerMaruyama()(data, x, lam_t, lam_s).p
        torch.testing.assert_close(p.mean, x + gained * data.score(x, lam_t), rtol=1e-11, atol=1e-11)
        assert math.isclose(float(p.var), gained, rel_tol=1e-12)


def test_the_vp_sde_as_released() -> None:
    """x + (beta x / 2 + beta s) / N and variance beta / N; the last step, from t = 1 / N, returns its mean."""
    steps, data = 50, mixture(VP)
    transition, _ = sampler("em", karras(2), beta_max=20.0)
    grid = torch.cat([LinearBeta(start=0.0)(torch.arange(steps, 0, -1) / torch.tensor(steps).double()), torch.tensor([INF])])
    noise, x = Noise(0, range(5)), torch.randn(5, 2, dtype=torch.float64)
    ours, theirs = sample(data, x, grid, transition, noise=noise), x
    for i in range(steps):
        t = (steps - i) / steps
        beta, lam = 0.1 + 19.9 * t, float(grid[i])
        mean = theirs + (0.5 * beta * theirs + beta * data.score(theirs, lam)) / steps
        theirs = mean + math.sqrt(beta / steps) * noise(i, mean)
    within(1e-9, (ours - mean).abs().max(), "the whole trajectory")


def test_predictor_corrector_as_released() -> None:
    """Corrector, then predictor, at each of N levels; norms of the batch; the mean of the last predictor; 2 N evaluations."""
    steps, snr, data = 12, 0.16, gaussian_data("image", VE)
    levels = geometric(steps, 0.05, 9.0)
    transition, grid = sampler("pc", levels, predictor="reverse-diffusion", compat="official", snr=snr)
    noise, x = Noise(1, range(7)), 9.0 * torch.randn(7, *data.shape, dtype=torch.float64)
    counted = Counted(data)
    ours, theirs, sigmas = sample(counted, x, grid, transition, noise=noise), x, [*(-0.5 * levels[:-1]).exp().tolist(), 0.0]
    for i in range(steps):
        lam, z = float(levels[i]), noise(2 * i, theirs)
        g = data.score(theirs, lam)
        size = 2 * (snr * z.flatten(1).norm(dim=1).mean() / g.flatten(1).norm(dim=1).mean()) ** 2
        theirs = theirs + size * g + (2 * size).sqrt() * z
        gained = sigmas[i] ** 2 - sigmas[i + 1] ** 2
        mean = theirs + gained * data.score(theirs, lam)
        theirs = mean + math.sqrt(gained) * noise(2 * i + 1, mean)
    within(1e-10, (ours - mean).abs().max(), "the whole trajectory")
    assert counted.calls == 2 * steps


def test_official_norms_of_a_single_example_are_its_own() -> None:
    """But for the norm of its noise, which is sqrt(D) in the mean; in a batch, each example's own step leaves others alone."""
    data, x = gaussian_data("image", VE), torch.randn(5, 2, 3, 2, dtype=torch.float64)
    own, shared = (Langevin(compat=c)(data, x[:1], 0.0, 0.0).p for c in (None, "official"))
    torch.testing.assert_close(shared.mean, own.mean, rtol=1e-12, atol=0)
    noise = torch.ones_like(x[:1])  # of norm sqrt(D)
    torch.testing.assert_close(shared.sample(noise), own.sample(noise), rtol=1e-12, atol=0)
    whole, batch = (Langevin(compat=c)(data, x, 0.0, 0.0).p for c in (None, "official"))
    torch.testing.assert_close(whole.mean[:1], own.mean, rtol=1e-12, atol=0)
    assert (batch.mean[:1] - own.mean).abs().max() > 1e-3


TIMES = {"sigma^2": None, "beta": LinearBeta(start=0.0), "geometric": Linear(8.0, -8.0), "cosine": Cosine(8.0, -8.0)}


@pytest.mark.parametrize("process", [VE, VP, FLOW], ids=str)
@pytest.mark.parametrize("time", TIMES)
def test_weak_order_one(time: str, process) -> None:
    """The exact mean and covariance of the chain on Gaussian data: twice the steps, half the error."""
    data, transition = gaussian_data("vector", process), EulerMaruyama(TIMES[time])

    def error(steps: int) -> float:
        grid = torch.linspace(-2.0, 3.0, steps + 1, dtype=torch.float64).tolist()
        start = data.marginal(grid[0], torch.zeros(1, *data.shape).double())
        mean, cov = start.mean[0], torch.diag(start.var[0])
        for lam_t, lam_s in pairwise(grid):
            A, c, V = affine(lambda x, a=lam_t, b=lam_s: transition(data, x, a, b).p, data.shape)
            mean, cov = A @ mean + c, A @ cov @ A.T + V
        end = data.marginal(grid[-1], mean[None])
        return float((mean - end.mean[0]).norm() + (torch.diag(cov) - end.var[0]).norm())

    coarse, fine = error(100), error(200)
    within(0.1, abs(math.log2(coarse / fine) - 1), f"order in {time}, {process}, off 1 by")
    within(0.1, fine, "error of 200 steps")


@pytest.mark.parametrize("process", [VE, VP, FLOW], ids=str)
def test_last_step_and_other_directions(process) -> None:
    data, x = mixture(process), torch.randn(4, 2, dtype=torch.float64)
    alpha, _ = process.scales(6.0)
    last = process.drift(6.0) * x + alpha * data(x, 6.0).mean
    torch.testing.assert_close(EulerMaruyama()(data, x, 6.0, INF).p.mean, last, rtol=1e-12, atol=1e-12)
    in_geometric = EulerMaruyama(TIMES["geometric"])(data, x, 2.0, INF)  # its time of the data is infinite
    assert torch.equal(in_geometric.p.mean, data(x, 2.0).mean)
    assert in_geometric.p.is_point
    assert EulerMaruyama()(data, x, 1.0, 1.0).p.mean is x
    up, forward = EulerMaruyama()(data, x, 1.0, 0.0), process.noising(x, 1.0, 0.0)
    assert up.x0 is None
    assert torch.equal(up.p.mean, forward.mean)
    assert torch.equal(up.p.var, forward.var)


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transition", [EulerMaruyama(), EulerMaruyama(LinearBeta(start=0.0)), Langevin(compat="official")])
def test_shapes_and_dtypes(transition, dtype, n) -> None:
    data = gaussian_data("image", VP)
    x = torch.randn(n, *data.shape, dtype=dtype)
    grid = torch.tensor([-2.0, -2.0, 0.0, INF]) if transition.revisits else torch.tensor([-2.0, 0.0, INF])
    states = list(trajectory(data, x, grid, transition, noise=Noise(0, range(n))))
    assert all(s.x.shape == x.shape and s.x.dtype == dtype and s.x.isfinite().all() for s in states)
    assert type(transition).__name__ in repr(transition)


def test_bad_input() -> None:
    data, x = GaussianData(torch.zeros(2), 1.0, VP), torch.randn(2, 2)
    with refuses("`lam_t`", "-inf", "finite level", "Ancestral"):
        EulerMaruyama()(data, x, -INF, 0.0)
    with refuses("`compat`", "'batch'", "official"):
        Langevin(Ancestral(), compat="batch")
    with refuses("`predictor`", "'euler'"):
        sampler("pc", karras(4), predictor="euler")
