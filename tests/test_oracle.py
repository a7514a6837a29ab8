"""Oracles are the witnesses of everything else, so autograd, quadrature and Monte Carlo are theirs."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from helpers import DATA, covariance, f64, gaussian_data, refuses, within
from quieten.gaussian import spread_over
from quieten.noise import Noise
from quieten.oracle import FiniteData, GaussianData, MixtureData, Oracle
from quieten.process import FLOW, PROCESSES, VE, VP

pytestmark = pytest.mark.usefixtures("one_thread")
INF = math.inf
SHAPES = [(3,), (2, 2, 2)]


def mixture(shape=(3,), process=VE, spread: str = "per component") -> MixtureData:
    means = 2 * torch.randn(4, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    full = torch.linspace(0.1, 1.2, means.numel(), dtype=torch.float64).reshape(means.shape)
    vars = {"per component": f64(0.1, 0.4, 0.05, 1.0), "full": full, "one": 0.3}[spread]
    return MixtureData(means, vars, f64(1, 2, 3, 4), process)


def finite(shape=(3,), process=VE, **kwargs) -> FiniteData:
    points = torch.randn(17, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return FiniteData(points, process, **kwargs)


ORACLES = {
    **{kind: lambda p, kind=kind: gaussian_data(kind, p) for kind in DATA},
    "mixture": lambda p: mixture((3,), p),
    "mixture of images": lambda p: mixture((2, 2, 2), p, "full"),
    "mixture, one variance": lambda p: mixture((3,), p, "one"),
    "finite": lambda p: finite((3,), p),
    "finite images": lambda p: finite((2, 2, 2), p, chunk=3),
}
oracles = pytest.mark.parametrize("build", list(ORACLES.values()), ids=list(ORACLES))
processes = pytest.mark.parametrize("process", list(PROCESSES.values()), ids=list(PROCESSES))


def states(data: Oracle, lam: float, n: int = 4, seed: int = 0) -> torch.Tensor:
    """Samples of the marginal at lam."""
    noise = Noise(seed, range(n))
    x0 = data.sample(noise)
    return data.process.marginal(x0, lam).sample(noise.normal(x0, 0, "state"))


@processes
@oracles
def test_score_and_covariance_are_the_derivatives_of_the_density(build, process):
    data = build(process)
    for lam in (-4.0, -0.5, 1.5):
        (alpha, sigma), x = process.scales(lam), states(data, lam)
        leaf = x.clone().requires_grad_()
        (score,) = torch.autograd.grad(data.log_prob(leaf, lam).sum(), leaf)
        torch.testing.assert_close(data.score(x, lam), score, rtol=1e-9, atol=1e-9)
        hessian = torch.autograd.functional.hessian(lambda row, lam=lam: data.log_prob(row[None], lam)[0], x[0])
        n = x[0].numel()
        want = sigma**4 / alpha**2 * hessian.reshape(n, n) + sigma**2 / alpha**2 * torch.eye(
            n, dtype=torch.float64
        )  # Tweedie, second order
        p = data(x[:1], lam)
        got = covariance(p, data.shape) if isinstance(data, GaussianData) else p.var.flatten()
        torch.testing.assert_close(got, want if isinstance(data, GaussianData) else want.diag(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["vector", "vector, full covariance", "mixture", "finite"])
def test_the_posterior_by_monte_carlo(name):
    data, lam, n = ORACLES[name](VP), -1.0, 200_000
    (alpha, sigma), x_t = VP.scales(lam), states(data, lam, 1, seed=5)
    x0 = data.sample(Noise(6, range(n)))
    w = (-(x_t - alpha * x0).square().sum(1) / (2 * sigma**2)).softmax(0)[:, None]
    p = data(x_t, lam)
    for power, value in ((1, p.mean[0]), (2, covariance(p, data.shape).diag() + p.mean[0] ** 2)):
        estimate = (w * x0**power).sum(0)
        error = (w * (x0**power - estimate)).square().sum(0).sqrt()
        within(4.5, ((estimate - value) / error).abs().max(), f"moment {power} of x0 given x_t, in standard errors")


@pytest.mark.parametrize("process", [VP, VE, FLOW], ids=["vp", "ve", "flow"])
@oracles
def test_every_process_tells_the_same_of_the_same_noise(build, process):
    for lam in (-5.0, 0.0, 6.0):
        x = states(build(VE), lam)
        alpha = process.scales(lam)[0]
        p, q = build(VE)(x, lam), build(process)(alpha * x, lam)
        torch.testing.assert_close(q.mean, p.mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(q.var, p.var, rtol=1e-9, atol=1e-10)
        n = x[0].numel()
        densities = build(process).log_prob(alpha * x, lam) + n * math.log(alpha), build(VE).log_prob(x, lam)
        torch.testing.assert_close(*densities, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batch", [0, 1, 5])
@oracles
def test_batches_levels_and_precisions(build, batch):
    data = build(VP)
    x, lam = states(data, 0.5, batch), torch.linspace(-3, 4, batch, dtype=torch.float64)
    p, density = data(x, lam), data.log_prob(x, lam)
    assert p.mean.shape == x.shape
    assert density.shape == (batch,)
    for i, level in enumerate(lam.tolist()):
        one = data(x[i : i + 1], level)
        torch.testing.assert_close(p.mean[i : i + 1], one.mean, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(p.var.expand_as(x)[i : i + 1], one.var.expand_as(x[:1]), rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(density[i : i + 1], data.log_prob(x[i : i + 1], level), rtol=1e-11, atol=1e-11)
    if batch:
        shared = data(x, f64(0.5)[0])
        torch.testing.assert_close(shared.mean, data(x, 0.5).mean)
    narrow = data(x.float(), lam)
    assert narrow.mean.dtype == narrow.var.dtype == torch.float32
    torch.testing.assert_close(narrow.mean.double(), p.mean, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(narrow.var.double(), p.var, rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(data.log_prob(x.float(), lam).double(), density, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mixture_of_one_is_gaussian(shape):
    mean, var = torch.randn(shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64) + 0.1
    one, gauss = MixtureData(mean[None], var[None]), GaussianData(mean, var)
    for lam in (-3.0, 2.0):
        x = states(gauss, lam)
        p, q = one(x, lam), gauss(x, lam)
        torch.testing.assert_close(p.mean, q.mean)
        torch.testing.assert_close(p.var, q.var.expand_as(x))
        torch.testing.assert_close(one.log_prob(x, lam), gauss.log_prob(x, lam))


@pytest.mark.parametrize("shape", SHAPES)
def test_points_are_the_limit_of_tight_mixtures(shape):
    points = finite(shape)
    tight = MixtureData(points.points, 1e-11)
    for lam in (-3.0, 1.0):
        x = states(points, lam)
        p, q = tight(x, lam), points(x, lam)
        torch.testing.assert_close(p.mean, q.mean, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(p.var, q.var, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(tight.log_prob(x, lam), points.log_prob(x, lam), rtol=1e-8, atol=1e-8)


def test_points_far_from_the_origin_keep_their_digits():
    points = finite((3,))
    far = FiniteData((points.points + 1000.0).float())
    x = states(points, 2.0).float()
    torch.testing.assert_close(far(x + 1000.0, 2.0).mean - 1000.0, points(x, 2.0).mean, rtol=0, atol=5e-3)


def test_one_point_is_certain():
    data = FiniteData(f64(0.3, -2.0)[None])
    p = data(torch.randn(5, 2, dtype=torch.float64), 0.1)
    torch.testing.assert_close(p.mean, f64(0.3, -2.0).expand(5, 2))
    assert p.var.abs().max() < 1e-15


@pytest.mark.parametrize("chunk", [1, 3, 4, 256])
def test_chunks_do_not_show(chunk):
    x, lam = torch.randn(7, 3, dtype=torch.float64), torch.linspace(-1, 3, 7, dtype=torch.float64)
    p, q = finite(chunk=chunk)(x, lam), finite()(x, lam)
    torch.testing.assert_close(p.mean, q.mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(p.var, q.var, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["gaussian", "mixture", "finite"])
def test_densities_integrate_to_one(name):
    build = {
        "gaussian": lambda: GaussianData(f64(0.7), f64(0.3), VP),
        "mixture": lambda: MixtureData(f64(-1, 0.5, 2)[:, None], f64(0.05, 0.1, 0.2), f64(1, 2, 1), VP),
        "finite": lambda: FiniteData(f64(-1, 0.5, 2)[:, None], VP),
    }
    x = torch.linspace(-12, 12, 24_001, dtype=torch.float64)[:, None]
    for lam in (-4.0, 0.0, 4.0, *([] if name == "finite" else [INF])):
        mass = torch.trapezoid(build[name]().log_prob(x, lam).exp(), x[:, 0]).item()
        within(1e-12, abs(mass - 1), f"probability at lam = {lam} less 1")


@pytest.mark.parametrize("full", [False, True])
def test_the_gaussian_density_agrees_with_torch(full):
    data = gaussian_data("image, full covariance" if full else "image", VP)
    var = torch.diag(data.var.flatten())
    cov = data.basis.vectors @ var @ data.basis.vectors.T if full else var
    x = torch.randn(5, *data.shape, dtype=torch.float64)
    for lam in (-1.0, 3.0, INF):
        alpha, sigma = VP.scales(lam)
        target = MultivariateNormal(
            alpha * data.mean.flatten(), alpha**2 * cov + sigma**2 * torch.eye(len(cov), dtype=torch.float64)
        )
        torch.testing.assert_close(data.log_prob(x, lam), target.log_prob(x.flatten(1)), rtol=1e-11, atol=1e-11)


@oracles
def test_samples_have_the_moments(build):
    data, n = build(VE), 40_000
    x = data.sample(Noise(3, range(n)))
    assert (x.dtype, x.shape) == (torch.float64, (n, *data.shape))
    torch.testing.assert_close(data.sample(Noise(3, [17, 4])), x[[17, 4]], rtol=1e-13, atol=1e-13)
    prior = data(torch.zeros(1, *data.shape, dtype=torch.float64), -60.0)  # all noise: the posterior is the prior
    flat, mean, cov = x.flatten(1), prior.mean.flatten(), covariance(prior, data.shape)
    within(4.5, ((flat.mean(0) - mean) / flat.std(0) * math.sqrt(n)).abs().max(), "mean, in standard errors")
    square = (flat - mean) ** 2
    within(4.5, ((square.mean(0) - cov.diag()) / square.std(0) * math.sqrt(n)).abs().max(), "variance, in standard errors")
    if isinstance(data, GaussianData):
        product = (flat[:, 0] - mean[0]) * (flat[:, 1] - mean[1])
        within(4.5, abs(product.mean() - cov[0, 1]) / product.std() * math.sqrt(n), "covariance, in standard errors")


@pytest.mark.parametrize("kind", DATA)
@processes
def test_the_flow_solves_the_ode_and_keeps_the_marginals(process, kind):
    data = gaussian_data(kind, process)
    x = states(data, -2.0)
    there = data.flow(x, -2.0, 3.0)
    torch.testing.assert_close(data.flow(data.flow(x, -2.0, 0.4), 0.4, 3.0), there, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(data.flow(there, 3.0, -2.0), x, rtol=1e-11, atol=1e-11)
    h = 1e-4  # dx/dlam = (d log alpha / d lam) x + (sigma^2 / 2) score, the probability-flow ODE
    slope = (data.flow(x, -2.0, -2.0 + h) - data.flow(x, -2.0, -2.0 - h)) / (2 * h)
    _, sigma = process.scales(-2.0)
    torch.testing.assert_close(slope, process.drift(-2.0) * x + 0.5 * sigma**2 * data.score(x, -2.0), rtol=1e-6, atol=1e-6)
    start, end = data.marginal(-2.0, x), data.marginal(INF, x)
    change = (start.log_prob(x) - end.log_prob(data.flow(x, -2.0, INF))).mean() - 0.5 * (end.var / start.var)[0].log().sum()
    within(1e-11, change.abs(), "change of variables")


def test_marginals_of_gaussian_data_broadcast_levels():
    data = gaussian_data("image", VP)
    x = torch.randn(3, *data.shape, dtype=torch.float64)
    lam = f64(-1, 0, 2)
    p = data.marginal(lam, x)
    alpha, sigma = (spread_over(s, x) for s in VP.scales(lam))
    torch.testing.assert_close(p.mean, alpha * data.mean)
    torch.testing.assert_close(p.var, alpha**2 * data.var + sigma**2)


def test_oracles_move_and_save_like_modules():
    data = mixture()
    copy = MixtureData(torch.zeros(4, 3), 1.0)
    copy.load_state_dict(data.state_dict())
    x = torch.randn(2, 3, dtype=torch.float64)
    assert torch.equal(copy(x, 0.3).mean, data(x, 0.3).mean)


def test_bad_data_are_refused():
    mean = torch.zeros(2, 3)
    with refuses("`cov`", "(2, 3)", "(6, 6)", "(3, 3)"):
        GaussianData(mean, torch.eye(3))
    with refuses("`cov`", "positive semi-definite", "-0.5"):
        GaussianData(mean, torch.full((2, 3), -0.5))
    for vars, weights in ((0.0, None), (1.0, f64(1, 0)), (1.0, f64(1, 1, 1))):
        with refuses("`weights`", "`vars`", "positive"):
            MixtureData(torch.zeros(2, 3), vars, weights)
    with refuses("`points`", "at least one"):
        FiniteData(torch.zeros(0, 3))
    with refuses("`lam`", "finite"):
        finite().log_prob(torch.zeros(2, 3))
    for data in (gaussian_data("vector"), mixture((5,)), finite((5,))):
        with refuses("`x`", "(B, 5)", "(2, 4)"):
            data(torch.zeros(2, 4), 0.0)
        with refuses("'score'", "sigma=0"):
            data.score(torch.zeros(2, 5, dtype=torch.float64), INF)


@pytest.mark.parametrize("process", [VP, VE, FLOW], ids=str)
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("lam", [math.inf, 800.0])
def test_without_noise_finite_data_are_the_nearest_point(process, as_tensor, lam):
    points = torch.tensor([[0.0, 1.0], [2.0, -1.0], [0.5, 0.5]], dtype=torch.float64)
    level = torch.full((3,), lam, dtype=torch.float64) if as_tensor else lam
    p = FiniteData(points, process)(points.roll(1, 0), level)
    assert torch.equal(p.mean, points.roll(1, 0))
    assert torch.equal(p.var, torch.zeros_like(points))
