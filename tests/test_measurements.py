"""Linear measurements: adjoints, exact posteriors of Gaussian data, projections, imputation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from helpers import refuses, within
from quieten.denoiser import Denoiser
from quieten.gaussian import Gaussian
from quieten.guidance import Guided
from quieten.guiding.measurements import Consistent, Downsample, Grey, LinearMap, Mask, Measured, Operator, replacement
from quieten.oracle import GaussianData, MixtureData
from quieten.process import FLOW, VE, VP, Process
from quieten.sampling import generate, sample
from quieten.schedule import karras
from quieten.solvers.samplers import sampler
from quieten.split import Projected
from quieten.transition import Ancestral
from quieten.wrap import Counted

SHAPE = (3, 4, 4)
N = math.prod(SHAPE)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def half() -> Tensor:
    return random(1, 4, 4, seed=5) > 0


def bicubic(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=0.5, mode="bicubic", antialias=True)


OPERATORS: dict[str, Callable[[], Operator]] = {
    "mask": lambda: Mask(half()),
    "mask of floats": lambda: Mask((random(*SHAPE, seed=6) > 0.3).float()),
    "grey": Grey,
    "luma": lambda: Grey((0.299, 0.587, 0.114)),
    "boxes of 2": lambda: Downsample(2),
    "boxes of 4": lambda: Downsample(4),
    "series": lambda: Downsample(2, dims=1),
    "bicubic": lambda: LinearMap(bicubic),
    "matrix": lambda: LinearMap(
        lambda x: x.flatten(1) @ random(N, 7, seed=7).to(x), lambda y, like: (y @ random(N, 7, seed=7).to(y).T).view_as(like)
    ),
}


@pytest.fixture(params=OPERATORS)
def operator(request: pytest.FixtureRequest) -> Operator:
    return OPERATORS[request.param]()


def dense(operator: Operator) -> Tensor:
    """H as a matrix (M, D)."""
    return operator(torch.eye(N, dtype=torch.float64).reshape(N, *SHAPE)).flatten(1).T


# ---- operators


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_adjoint(operator: Operator, n: int, dtype: torch.dtype) -> None:
    x = random(n, *SHAPE).to(dtype)
    y = torch.randn_like(operator(x))
    back = operator.adjoint(y, x)
    assert (back.shape, back.dtype) == (x.shape, dtype)
    truth = y.flatten(1) @ dense(operator).to(dtype) if n else back.flatten(1)
    within(1e-5 if dtype == torch.float32 else 1e-12, (back.flatten(1) - truth).abs().sum(), "H^T y")


def test_pseudoinverse_and_projection(operator: Operator) -> None:
    x, other = random(3, *SHAPE), random(3, *SHAPE, seed=1)
    y = operator(other)
    truth = y.flatten(1) @ torch.linalg.pinv(dense(operator)).T
    within(1e-9, (operator.pinv(y, x).flatten(1) - truth).abs().max(), "H^+ y")
    nearest = operator.project(x, y)
    within(1e-9, (operator(nearest) - y).abs().max(), "H of the projection")
    within(1e-9, (operator.project(nearest, y) - nearest).abs().max(), "twice is once")


def test_squares_is_the_diagonal(operator: Operator) -> None:
    v = random(2, *SHAPE).square()
    h, got = dense(operator), operator.squares(v)
    truth = h @ torch.diag(v[0].flatten()) @ h.T
    if got is None:
        assert (truth - truth.diag().diag()).abs().max() > 1e-3
    else:
        within(1e-12, (got[0].flatten().diag() - truth).abs().max(), "H diag(v) H^T")


def test_measurements_must_fit() -> None:
    x = random(3, *SHAPE)
    with refuses("y", "(3, 3, 2, 2)", "(1, 3, 2, 2)", "(1, 3, 4, 4)", "Downsample"):
        Measured(Downsample(2), random(1, *SHAPE), 0.1).gradient(data(), x, 0.0)
    with refuses("y", "got (2, 3, 2, 2)"):
        Measured(Downsample(2), random(2, 3, 2, 2), 0.1).gradient(data(), x, 0.0)
    for factor in (0, 2.0, -1):
        with refuses("factor"):
            Downsample(factor)  # type: ignore[arg-type]
    with refuses("factor", "3", "(3, 4, 4)"):
        Downsample(3)(x)
    with refuses("mask", "0 and 1"):
        Mask(torch.tensor([0.0, 0.5]))
    with refuses("weights", "3 channels"):
        Grey((0.5, 0.5))(x)
    with refuses("weights"):
        Grey((0.0, 0.0, 0.0))


@pytest.mark.parametrize(
    "piece, options",
    [
        ("std", {"std": -0.1}),
        ("std", {"std": math.nan}),
        ("jacobian", {"jacobian": "full"}),
        ("variance", {"variance": "mine"}),
        ("variance", {"variance": -1.0}),
        ("variance", {"variance": 0.0}),
        ("variance", {"variance": 0.0, "std": 0.0, "jacobian": "backward"}),
        ("y", {"y": torch.tensor([[math.nan]])}),
        ("scale", {"scale": math.inf}),
    ],
)
def test_choices_that_make_no_sense(piece: str, options: dict[str, Any]) -> None:
    with refuses(f"`{piece}`"):
        Measured(**{"operator": Downsample(2), "y": random(1, 3, 2, 2), "std": 0.1, **options})


# ---- the posterior of Gaussian data


def data(process: Process = VP, full: bool = False) -> GaussianData:
    mean, var = random(*SHAPE, seed=2), torch.linspace(0.1, 2.0, N, dtype=torch.float64)
    if not full:
        return GaussianData(mean, var.reshape(SHAPE), process)
    q, _ = torch.linalg.qr(random(N, N, seed=3))
    return GaussianData(mean, q @ torch.diag(var) @ q.T, process)


def posterior(prior: GaussianData, operator: Operator, y: Tensor, std: float) -> GaussianData:
    """x0 | y in closed form, with dense matrices."""
    h = dense(operator)
    s = torch.diag(prior.var.flatten())
    if prior.basis is not None:
        s = prior.basis.vectors @ s @ prior.basis.vectors.T
    gram = h @ s @ h.T + std**2 * torch.eye(len(h), dtype=torch.float64)
    gain = torch.linalg.solve(gram, h @ s).T
    residual = y.flatten() - h @ prior.mean.flatten()
    cov = s - gain @ h @ s
    return GaussianData(prior.mean + (gain @ residual).reshape(SHAPE), 0.5 * (cov + cov.T), prior.process)


def scene(operator: Operator) -> Tensor:
    return operator(random(1, *SHAPE, seed=4))


@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full"])
@pytest.mark.parametrize("process", [VP, VE, FLOW], ids=str)
def test_the_posterior_is_exact(operator: Operator, process: Process, full: bool) -> None:
    """At every level the guided denoiser is that of x0 | y, so every sampler that uses its mean draws the posterior."""
    prior, y = data(process, full), scene(operator)
    truth = posterior(prior, operator, y, 0.2)
    guided = Guided(prior, Measured(operator, y, 0.2))
    for lam in (*((-math.inf,) if process is not VE else ()), -5.0, 0.0, 4.0, 9.0):
        alpha, sigma = process.scales(lam)
        x = alpha * truth.mean + sigma * random(3, *SHAPE, seed=8)
        within(1e-9, (guided(x, lam).mean - truth(x, lam).mean).abs().max(), f"{process} at {lam}")
    if not full and process is VP:
        grid = karras(8, 0.02, 30.0)
        x = process.prior(grid[0].item()).sample(random(4, *SHAPE, seed=9))
        for name in ("ddim", "heun", "dpm++"):
            ours, exact = (sample(d, x, grid, sampler(name, grid)[0]) for d in (guided, truth))
            within(1e-8, (ours - exact).abs().max(), name)


@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full"])
def test_back_through_the_denoiser_is_the_same(operator: Operator, full: bool) -> None:
    prior, y, x = data(VP, full), scene(operator), random(2, *SHAPE)
    for lam in (-3.0, 2.0):
        by_covariance, backward = (
            Measured(operator, y, 0.2, jacobian=how).gradient(prior, x, lam) for how in ("covariance", "backward")
        )
        within(1e-9, (by_covariance - backward).abs().max() / backward.abs().max(), f"at {lam}")


def test_the_formula_with_the_estimate_detached(operator: Operator) -> None:
    """g = w H^T (y - H D) / r^2."""
    prior, y, x = data(), scene(operator), random(2, *SHAPE)
    g = Measured(operator, y, 0.3, scale=1.7, variance=0.0, jacobian="identity").gradient(prior, x, 1.0)
    truth = 1.7 * operator.adjoint(y - operator(prior(x, 1.0).mean), x) / 0.3**2
    within(1e-9, (g - truth).abs().max() / truth.abs().max(), "against the formula")


def test_samples_have_the_moments_of_the_posterior() -> None:
    """Drawn with the ODE in many steps: mean and variance in closed form, within four standard errors and the step's bias."""
    operator, n = Downsample(2), 4000
    prior, y = data(), scene(Downsample(2))
    truth = posterior(prior, operator, y, 0.2)
    guided, grid = Guided(prior, Measured(operator, y, 0.2)), karras(40, 1e-3, 80.0)
    x = generate(guided, n, grid=grid, transition=sampler("heun", grid)[0], batch=n, dtype=torch.float64)
    assert truth.basis is not None
    var = (truth.basis.vectors.square() @ truth.var.flatten()).reshape(SHAPE)
    within(4.5, ((x.mean(0) - truth.mean).abs() / (var / n).sqrt()).max(), "means, in standard errors")
    within(4.5, ((x.var(0) / var - 1).abs() / math.sqrt(2 / n)).max(), "variances, in standard errors")


def test_without_noise_the_measurement_is_met(operator: Operator) -> None:
    prior, y = data(), scene(operator)
    guided, ddim = Guided(prior, Measured(operator, y, 0.0)), Ancestral(0.0, spread=False)
    x = generate(guided, 3, grid=karras(8, 0.01, 20.0), transition=ddim, dtype=torch.float64)
    within(1e-8, (operator(x) - y).abs().max(), "H x0 - y")


def test_a_denoiser_without_variance_gets_one() -> None:
    class Bare(Denoiser):
        def __init__(self, inner: Denoiser):
            super().__init__()
            self.inner, self.process, self.shape = inner, inner.process, inner.shape

        def forward(self, x: Tensor, lam: Any, **cond: Any) -> Gaussian:
            return Gaussian(self.inner(x, lam).mean)

    prior, y, x = GaussianData(torch.zeros(SHAPE), 1.0, VP), scene(Downsample(2)), random(2, *SHAPE)
    own = Measured(Downsample(2), y, 0.2)
    within(1e-12, (own.gradient(Bare(prior), x, 1.0) - own.gradient(prior, x, 1.0)).abs().max(), "unit data")
    wide = GaussianData(torch.zeros(SHAPE), 4.0, VP)
    given = Measured(Downsample(2), y, 0.2, variance=4.0)
    within(1e-12, (given.gradient(Bare(wide), x, 1.0) - own.gradient(wide, x, 1.0)).abs().max(), "a number")
    source = Measured(Downsample(2), y, 0.2, variance=lambda d, x, lam, p: wide(x, lam).var)
    within(1e-12, (source.gradient(Bare(wide), x, 1.0) - own.gradient(wide, x, 1.0)).abs().max(), "a source")


def test_one_forward_a_step_and_batches_apart(operator: Operator) -> None:
    prior, y, x = Counted(data(VP, full=True)), scene(operator), random(5, *SHAPE)
    guidance = Measured(operator, y, 0.1)
    whole = guidance.both(prior, x, 1.0)[1]
    assert prior.calls == 1
    alone = torch.cat([guidance.gradient(prior, row, 1.0) for row in x.split(1)])
    within(1e-9, (whole - alone).abs().max() / whole.abs().max(), "alone against in a batch")


@pytest.mark.parametrize("n", [0, 1, 2])
def test_float32_and_small_batches(operator: Operator, n: int) -> None:
    x = random(n, *SHAPE)
    y = scene(operator)
    for jacobian in ("covariance", "backward", "identity"):
        wide = Measured(operator, y, 0.2, jacobian=jacobian).gradient(data(), x, 1.0)
        single = Measured(operator, y, 0.2, jacobian=jacobian).gradient(data(), x.float(), 1.0)
        assert (single.shape, single.dtype) == (x.shape, torch.float32)
        within(1e-4, (single - wide).abs().sum() / (1 + wide.abs().sum()), jacobian)


# ---- without gradients


def mixture() -> MixtureData:
    return MixtureData(random(4, *SHAPE, seed=10), 0.1, process=VP)


def test_consistent(operator: Operator) -> None:
    y, x = scene(operator), random(3, *SHAPE)
    p = Consistent(mixture(), operator, y)(x, 1.0)
    within(1e-8, (operator(p.mean) - y).abs().max(), "H D")
    unseen = lambda z: z - operator.pinv(operator(z), z)  # noqa: E731
    within(1e-8, (unseen(p.mean) - unseen(mixture()(x, 1.0).mean)).abs().max(), "what H does not see is the denoiser's")
    out = generate(Consistent(mixture(), operator, y), 2, grid=karras(6, 0.05, 20.0), dtype=torch.float64)
    within(1e-8, (operator(out) - y).abs().max(), "samples")


def test_imputation_after_the_draw(operator: Operator) -> None:
    y, z, grid = scene(operator), random(3, *SHAPE, seed=11), karras(6, 0.05, 20.0)
    transition = Projected(Ancestral(), replacement(operator, y, z, VP))
    x = VP.prior(grid[0].item()).sample(z)
    lam_t, lam_s = grid[2].item(), grid[3].item()
    step = transition(mixture(), x, lam_t, lam_s)
    assert step.then is not None
    alpha, sigma = VP.scales(lam_s)
    drawn = step.p.sample(random(3, *SHAPE, seed=12))
    within(1e-8, (operator(step.then(drawn)) - (alpha * y + sigma * operator(z))).abs().max(), "what is known, noised")
    within(1e-8, (operator(sample(mixture(), x, grid, transition)) - y).abs().max(), "at the end")


def test_a_mask_overwrites_only_what_it_marks() -> None:
    mask, y, z, x = half(), random(1, *SHAPE), random(2, *SHAPE, seed=1), random(2, *SHAPE, seed=2)
    alpha, sigma = VP.scales(0.5)
    out = replacement(Mask(mask), y * mask, z, VP)(x, 0.5)
    within(1e-14, (out - torch.where(mask, alpha * y + sigma * z, x)).abs().max(), "m (alpha y + sigma z) + (1 - m) x")
