"""The one distribution: torch.distributions is its witness, in pixels and in a rotated basis."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.utils import _pytree

from helpers import refuses, within
from quieten.gaussian import POINT, Gaussian, scalar, spread_over
from quieten.oracle import Rotation

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = [(4,), (2, 3, 2)]


def rotation(n: int, seed: int = 0) -> Rotation:
    generator = torch.Generator().manual_seed(seed)
    return Rotation(torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0])


def draw(shape: tuple[int, ...], batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A mean, a variance and a state."""
    mean, x = torch.randn(2, batch, *shape, dtype=torch.float64)
    return mean, torch.rand(batch, *shape, dtype=torch.float64) + 0.1, x


def dense(p: Gaussian) -> MultivariateNormal:
    """The same distribution as torch's own, with its covariance written out."""
    mean = p.mean.flatten(1)
    var = p.var.double().expand_as(p.mean).flatten(1)
    vectors = torch.eye(mean.shape[1], dtype=torch.float64) if p.basis is None else p.basis.vectors
    return MultivariateNormal(mean, vectors @ torch.diag_embed(var) @ vectors.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_sample_is_the_mean_plus_the_root_of_the_variance(shape, batch, dtype):
    mean, var, noise = (t.to(dtype) for t in draw(shape, batch))
    per_row = torch.rand(batch, *[1] * len(shape), dtype=dtype)
    for v in (var, per_row, torch.tensor(0.49, dtype=torch.float64), scalar(2.25), torch.tensor(0.3, requires_grad=True)):
        x = Gaussian(mean, v).sample(noise)
        assert x.dtype == dtype
        assert x.shape == mean.shape
        torch.testing.assert_close(x, mean + v.to(dtype).sqrt() * noise)


@pytest.mark.parametrize("shape", SHAPES)
def test_sample_in_a_basis_has_the_covariance(shape):
    mean, var, _ = draw(shape, 1)
    p = Gaussian(mean, var, rotation(mean.numel()))
    n = mean.numel()
    root = p.sample(torch.eye(n, dtype=torch.float64).reshape(n, *shape)).flatten(1) - mean.flatten(1)
    within(1e-13, (root.T @ root - dense(p).covariance_matrix[0]).abs().max(), "error of the samples' covariance")


@pytest.mark.parametrize("in_basis", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_log_prob_and_kl_agree_with_torch(shape, in_basis):
    mean, var, x = draw(shape)
    other_mean, other_var, _ = draw(shape)
    basis = rotation(mean[0].numel()) if in_basis else None
    p, q = Gaussian(mean, var, basis), Gaussian(other_mean, other_var, basis)
    torch.testing.assert_close(p.log_prob(x), dense(p).log_prob(x.flatten(1)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(p.kl(q), kl_divergence(dense(p), dense(q)), rtol=1e-12, atol=1e-12)
    assert p.kl(p).abs().max() < 1e-14


@pytest.mark.parametrize("shape", SHAPES)
def test_broadcast_variances_count_every_dimension(shape):
    mean, _, x = draw(shape)
    n = mean[0].numel()
    for v in (scalar(0.25), torch.full((3, *[1] * len(shape)), 0.25, dtype=torch.float64)):
        torch.testing.assert_close(Gaussian(mean, v).log_prob(x), Normal(mean, 0.5).log_prob(x).flatten(1).sum(1))
        expected = torch.full((3,), n * 0.5 * (0.25 / 0.5 - 1 - math.log(0.5)), dtype=torch.float64)
        torch.testing.assert_close(Gaussian(mean, v).kl(Gaussian(mean, scalar(0.5))), expected)


def test_an_isotropic_variance_is_diagonal_in_every_basis():
    mean, var, x = draw((4,))
    p = Gaussian(mean, var, rotation(4))
    for isotropic in (scalar(0.5), torch.full((3, 1), 0.5, dtype=torch.float64)):
        q = Gaussian(x, isotropic)
        torch.testing.assert_close(p.kl(q), kl_divergence(dense(p), dense(q)), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(q.kl(p), kl_divergence(dense(q), dense(p)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("var", [torch.rand(3, 4), torch.rand(4)], ids=["per example", "shared by the examples"])
def test_kl_refuses_two_bases(var):
    mean, own, x = draw((4,))
    p = Gaussian(mean, own, rotation(4))
    for other in (Gaussian(x, var + 0.1), Gaussian(x, var + 0.1, rotation(4, seed=1))):
        with refuses("`other`", "basis"):
            p.kl(other)


def test_a_point_mass_draws_nothing_and_has_no_density():
    mean, _, noise = draw((4,))
    p, q = Gaussian(mean), Gaussian(mean, scalar(1.0))
    assert p.is_point
    assert Gaussian(mean, scalar(0.0)).var is POINT
    assert Gaussian(mean, torch.zeros(())).is_point
    assert not Gaussian(mean, torch.zeros(3, 1)).is_point  # only 0-d CPU variances are looked at
    assert torch.equal(p.sample(noise), mean)
    with refuses("`log_prob`", "`var` above 0"):
        p.log_prob(noise)
    for a, b in ((p, q), (q, p)):
        with refuses("`kl`", "`var` above 0"):
            a.kl(b)


def test_the_pytree_keeps_points_and_bases():
    mean, var, _ = draw((4,))
    basis = rotation(4)
    for p in (Gaussian(mean), Gaussian(mean, var, basis)):
        leaves, spec = _pytree.tree_flatten(p)
        back = _pytree.tree_unflatten([t * 2 for t in leaves], spec)
        assert len(leaves) == (1 if p.is_point else 2)
        assert back.basis is p.basis
        assert back.is_point == p.is_point
        torch.testing.assert_close(back.mean, 2 * p.mean)


@pytest.mark.parametrize("var", [POINT, torch.tensor([0.3, 0.4])], ids=["point", "diagonal"])
def test_vmap_and_jvp_pass_through(var):
    def kernel(x):
        return Gaussian(0.5 * x, var if var is POINT else var * x.square())

    x = torch.randn(3, 2)
    p = torch.func.vmap(kernel)(x)
    torch.testing.assert_close(p.mean, 0.5 * x)
    assert p.is_point == (var is POINT)
    _, tangent = torch.func.jvp(kernel, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent.mean, torch.full_like(x, 0.5))
    if var is not POINT:
        torch.testing.assert_close(p.var, var * x.square())
        torch.testing.assert_close(tangent.var, 2 * var * x)


def test_spread_over_shapes_a_level_for_its_state():
    x = torch.zeros(3, 2, 4, 4)
    assert spread_over(0.5, x) == 0.5
    assert spread_over(torch.arange(3.0, dtype=torch.float64), x).shape == (3, 1, 1, 1)
    assert spread_over(torch.arange(3.0, dtype=torch.float64), x).dtype == x.dtype
    assert spread_over(torch.tensor(2.0), x).shape == ()
