"""Laws of optimal covariance: few-step exactness, nesting of the classes, and what samples gain from it."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from helpers import affine, covariance, f64, within
from quieten.basis import DCT
from quieten.covariance import HessianDiagonal, Unit
from quieten.covariances.jacobian import Probed, posterior_covariance
from quieten.covariances.lanczos import FullGaussian, Lanczos, lanczos_root
from quieten.noise import Noise
from quieten.oracle import GaussianData, MixtureData
from quieten.process import FLOW, VE, VP
from quieten.sampling import sample
from quieten.schedule import Table
from quieten.transition import Ancestral
from quieten.wrap import Counted, WithCovariance

pytestmark = pytest.mark.usefixtures("one_thread")
TABLE = Table.from_betas(torch.linspace(0.1, 20, 1000, dtype=torch.float64) / 1000)


def grid(steps: int) -> Tensor:
    """The official linear subsequence of the chain, from noise to data: indices 1 + k (N - 1) / (K - 1), half to even."""
    index = torch.tensor([round(1 + k * 999 / (steps - 1)) for k in range(steps)])
    return torch.cat([TABLE.lam[index - 1].flip(0), f64(math.inf)])


def exact(data: GaussianData, basis=None, **bounds) -> WithCovariance:
    """Gaussian data with their own posterior variance as the output of a head, diagonal in a basis."""

    def head(x, eps, lam):
        cov = posterior_covariance(data, x[:1], lam)[0]
        if basis is None:
            diagonal = cov.diagonal().reshape(data.shape)
        else:
            rows = torch.eye(len(cov), dtype=cov.dtype).reshape(-1, *data.shape)
            rows = basis.inverse(rows).flatten(1)
            diagonal = (rows @ cov @ rows.T).diagonal().reshape(data.shape)
        return (diagonal * math.exp(lam) - 1).expand_as(x)

    return WithCovariance(data, HessianDiagonal(head, basis=basis, **bounds))


@pytest.mark.parametrize("eta", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("steps", [2, 5, 20])
def test_few_steps_are_exact_on_independent_pixels(steps, eta):
    mu, c = f64(-0.4, 0.1, 0.3, 0.6), f64(0.01, 0.05, 0.2, 0.5)
    data = GaussianData(mu, c, VP)
    lams = grid(steps).tolist()
    worst = 0.0
    for name, denoiser in {"exact": exact(data), "small": data, "big": WithCovariance(data, Unit())}.items():
        alpha, sigma = VP.scales(lams[0])
        mean, var = alpha * mu, torch.diag(alpha**2 * c + sigma**2)
        step, error = Ancestral(eta, spread=name != "small"), 0.0
        for lam_t, lam_s in pairwise(lams[:-1]):
            A, shift, V = affine(lambda x, t=lam_t, s=lam_s, m=denoiser, k=step: k(m, x, t, s).p, (4,))
            mean, var = A @ mean + shift, A @ var @ A.T + V
            alpha, sigma = VP.scales(lam_s)
            error = max(error, float((mean - alpha * mu).abs().max()))
            error = max(error, float((var - torch.diag(alpha**2 * c + sigma**2)).abs().max()))
        if name != "exact":
            assert error > 0.02 or (name == "big" and eta == 0.0 and steps == 20)
            continue
        worst = error
        A, shift, _ = affine(lambda x: step(denoiser, x, lams[-2], math.inf).p, (4,))  # noqa: B023
        alpha, sigma = VP.scales(lams[-2])
        last = A @ var @ A.T  # the mean of the last kernel: no noise is added
        worst = max(worst, float((last.diagonal() - alpha**2 * c**2 / (alpha**2 * c + sigma**2)).abs().max()))
    within(1e-10, worst, f"{steps} steps, eta {eta}")


AR1 = {
    5: (1.216874, 1.211459, 0.007500, 1.875584),
    10: (0.771823, 0.766356, 0.003953, 1.409274),
    25: (0.385041, 0.379051, 0.001403, 0.834838),
}


@pytest.mark.parametrize("steps", AR1)
def test_classes_are_nested_on_a_correlated_field(steps):
    """Gaps of the path KL in bits/dim on C = 0.4 R x R with R_ij = 0.9^|i-j|, 8x8: the table of Ou et al.'s classes."""
    i = torch.arange(8, dtype=torch.float64)
    R = 0.9 ** (i[:, None] - i).abs()
    data = GaussianData(torch.zeros(1, 8, 8), 0.4 * torch.kron(R, R), VP)
    classes = [exact(data, average=True), exact(data), exact(data, DCT(8)), WithCovariance(data, Unit())]
    gaps = torch.zeros(4, dtype=torch.float64)
    x = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    for lam_t, lam_s in pairwise(grid(steps).tolist()[:-1]):
        whole = covariance(Ancestral()(data, x, lam_t, lam_s).p, data.shape)  # data's own covariance, in its eigenvectors
        for k, denoiser in enumerate(classes):
            guess = covariance(Ancestral()(denoiser, x, lam_t, lam_s).p, data.shape)
            gaps[k] += 0.5 * (torch.linalg.slogdet(guess)[1] - torch.linalg.slogdet(whole)[1])
            gaps[k] += 0.5 * (torch.linalg.solve(guess, whole).trace() - 64)
    gaps /= 64 * math.log(2)
    within(1e-6, (gaps - torch.tensor(AR1[steps])).abs().max(), f"{steps} steps: {[round(g, 6) for g in gaps.tolist()]}")


@pytest.mark.parametrize("process", [VP, VE, FLOW], ids=str)
def test_limits_of_rho(process):
    data = MixtureData(f64(-1, 0.5)[:, None] * f64(1, 1), 0.05, process=process)
    prior = f64(0.75**2 + 0.05, 0.75**2 + 0.05)  # two points 1.5 apart
    probes = WithCovariance(data, Probed(500))
    alpha, _ = process.scales(14.0)
    near = probes(alpha * (data.means + 0.1), 14.0).var * math.exp(14.0)
    torch.testing.assert_close(near, torch.ones_like(near), rtol=1e-3, atol=0)
    alpha, sigma = process.scales(-14.0)
    far = probes(sigma * torch.randn(3, 2, dtype=torch.float64), -14.0).var
    torch.testing.assert_close(far, prior.expand(3, 2), rtol=0.1, atol=0)


def test_with_many_steps_any_variance_will_do():
    data = GaussianData(f64(0.2, -0.3), f64(0.05, 0.5), VP)
    ends = []
    for denoiser, spread in ((exact(data), True), (data, False), (WithCovariance(data, Unit()), True)):
        alpha, sigma = VP.scales(float(TABLE.lam[-1]))
        var = torch.diag(alpha**2 * data.var + sigma**2)
        for lam_t, lam_s in pairwise(TABLE.lam.flip(0).tolist()):
            A, _, V = affine(lambda x, t=lam_t, s=lam_s, m=denoiser, p=spread: Ancestral(spread=p)(m, x, t, s).p, (2,))
            var = A @ var @ A.T + V
        ends.append(var.diagonal())
    torch.testing.assert_close(ends[1], ends[0], rtol=0.05, atol=2e-4)
    torch.testing.assert_close(ends[2], ends[0], rtol=0.05, atol=2e-4)


# ---- forty Gaussians


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| over all pairs of different points."""

    def within_(z):
        return torch.pdist(z).mean()

    return float(2 * torch.cdist(x, y).mean() - within_(x) - within_(y))


@pytest.mark.parametrize("eta", [1.0, 0.0], ids=["ddpm", "ddim"])
@pytest.mark.parametrize("steps", [10, 20])
def test_samples_of_forty_gaussians_improve_with_the_class(steps, eta):
    generator = torch.Generator().manual_seed(5)
    means = 2 * torch.rand(40, 2, generator=generator, dtype=torch.float64) - 1
    data, n = MixtureData(means, (1.313 / 40) ** 2, process=VP), 2500
    truth = data.sample(Noise(1, range(n)))
    levels = grid(steps)

    def average(denoiser, x, lam, p):  # the optimal isotropic variance: over the pixels and over x_t
        return p.var.mean().expand(len(x), 1)

    start = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    runs = {
        "small": (data, Ancestral(eta, spread=False)),
        "iso": (WithCovariance(data, average), Ancestral(eta)),
        "diag": (data, Ancestral(eta)),  # the posterior's own diagonal
        "full": (data, Lanczos(2, eta)),
    }
    d = {}
    for name, (denoiser, transition) in runs.items():
        d[name] = energy_distance(sample(denoiser, start, levels, transition, noise=Noise(2, range(n))), truth)
    print(f"{steps} steps, eta {eta}: " + ", ".join(f"{name} {value:.2e}" for name, value in d.items()))
    noise = 2e-4
    assert d["small"] > d["iso"] + noise
    assert d["iso"] > d["diag"] + noise
    assert d["diag"] > d["full"] - noise


# ---- Lanczos


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_root_is_exact_after_as_many_products_as_dimensions(dtype):
    B = torch.randn(3, 6, 6, dtype=dtype)
    A = B @ B.mT + 0.1 * torch.eye(6, dtype=dtype)
    A[1] = torch.eye(6) * 0.5  # nothing new after one product
    A[2] = torch.diag(torch.tensor([1.0, 1, 1, 4, 4, 4]))
    z = torch.randn(3, 2, 3, dtype=dtype)
    values, vectors = torch.linalg.eigh(A)
    want = (vectors @ (values.sqrt()[..., None] * (vectors.mT @ z.flatten(1)[..., None])))[..., 0]

    def multiply(w):
        return (A @ w.flatten(1)[..., None]).reshape(w.shape)

    for steps in (6, 9):
        got = lanczos_root(multiply, z, steps).flatten(1)
        torch.testing.assert_close(
            got, want, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=1e-5 if dtype == torch.float32 else 1e-10
        )
    two = lanczos_root(multiply, z, 2).flatten(1)
    torch.testing.assert_close(two[1:], want[1:], rtol=1e-4, atol=1e-5)  # one and two eigenvalues
    assert lanczos_root(multiply, torch.zeros_like(z), 3).abs().max() == 0


def test_lanczos_kernels_are_those_of_the_full_covariance():
    i = torch.arange(4, dtype=torch.float64)
    R = 0.9 ** (i[:, None] - i).abs()
    data = GaussianData(torch.zeros(1, 4, 4), 0.4 * torch.kron(R, R), VP)
    counted = Counted(data)
    x, noise = torch.randn(2, 2, 1, 4, 4, dtype=torch.float64)
    for eta in (0.0, 1.0):
        for symmetric in (False, True):
            step = Lanczos(16, eta, symmetric=symmetric)(counted, x, -1.0, 1.5)
            want = Ancestral(eta)(data, x, -1.0, 1.5).p
            torch.testing.assert_close(step.p.mean, want.mean)
            assert isinstance(step.p, FullGaussian)
            rows = torch.eye(16, dtype=torch.float64).reshape(-1, 1, 4, 4)
            many = Lanczos(16, eta, symmetric=symmetric)(data, x[:1].expand(16, -1, -1, -1), -1.0, 1.5).p
            root = (many.sample(rows) - many.mean).flatten(1)
            tolerance = 1e-4 if symmetric else 1e-8  # finite differences
            torch.testing.assert_close(root @ root.T, covariance(want, data.shape), rtol=tolerance, atol=tolerance)
    few = Lanczos(3, 1.0)(data, x, -1.0, 1.5).p.sample(noise) - Lanczos(16, 1.0)(data, x, -1.0, 1.5).p.sample(noise)
    size = Lanczos(16, 1.0)(data, x, -1.0, 1.5).p.sample(noise) - want.mean
    assert few.norm() < 0.1 * size.norm()
    counted.calls = 0
    Lanczos(5)(counted, x, -1.0, 1.5).p.sample(noise)
    assert counted.calls == 1
    assert torch.equal(Lanczos(2)(data, x, 0.0, 0.0).p.mean, x)
