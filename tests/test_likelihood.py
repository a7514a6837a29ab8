"""The variational bound: tight where theory says so, never above log p, and refused where it has no meaning."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import DATA, f64, gaussian_data, refuses, within
from quieten.covariance import Unit
from quieten.denoiser import Denoiser, Preconditioned
from quieten.encoder import Contraction
from quieten.encoding.encoded import Encoded
from quieten.gaussian import POINT, Gaussian, scalar
from quieten.likelihood import Bound, elbo
from quieten.likelihoods.decoders import Dequantised, Discretised, Flat, Pixels, Plain
from quieten.noise import Draws, Noise
from quieten.oracle import FiniteData, GaussianData, MixtureData
from quieten.process import FLOW, VE, VP, Process
from quieten.schedule import Cosine, Linear, LinearBeta, LogNormal, Rectified, Table, karras
from quieten.solver import Exponential, Heun
from quieten.solvers.grids import linear, take
from quieten.transition import Ancestral, Churn, Hushed, Step, Transition
from quieten.tuning.policy import Policy
from quieten.wrap import WithCovariance

TABLE = Table.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
PROCESSES = pytest.mark.parametrize("process", [VP, VE, FLOW], ids=str)


def few(K: int) -> Tensor:
    return take(TABLE, linear(K, 1000))


def keyed(n: int, seed: int = 0) -> Draws:
    return Draws(seed, 0, range(n))


def entropy(data: GaussianData) -> float:
    return float(0.5 * torch.log(2 * math.pi * math.e * data.var).sum())


def prior_gap(data: GaussianData, lam: float) -> float:
    """KL(q(x_T) || p(x_T)) of the marginal."""
    q = data.marginal(lam, torch.zeros(1, *data.shape, dtype=torch.float64))
    prior = data.process.prior(lam)
    return float(Gaussian(q.mean, q.var, q.basis).kl(Gaussian(torch.zeros_like(q.mean), prior.var)))


def close(values: Tensor, expected: float, what: str, errors: float = 4.0) -> None:
    within(errors * float(values.std()) / math.sqrt(len(values)) + 1e-12, abs(float(values.mean()) - expected), what)


# ---- Gaussian data: everything is known


SPEC = GaussianData(f64(-0.4, 0.1, 0.3, 0.6), f64(0.01, 0.05, 0.2, 0.5), VP)
ISOTROPIC = WithCovariance(SPEC, lambda denoiser, x, lam, p: p.var.mean().expand(1, 1))


@pytest.mark.parametrize("denoiser, spread, expected",
                         [(SPEC, True, 0.72402), (ISOTROPIC, True, 2.058), (WithCovariance(SPEC, Unit()), True, 3.340),
                          (SPEC, False, 2712.0)], ids=["exact", "isotropic", "big", "small"])  # fmt: skip
def test_table_of_the_specification(denoiser: Denoiser, spread: bool, expected: float):
    """Five steps on four Gaussian dimensions; the decoder is the exact posterior, or the optimal isotropic one."""
    n = 100_000
    x0 = SPEC.sample(Noise(7, range(n)))
    levels = few(5)
    last = SPEC(x0[:1], levels[-2].item()).var.mean()
    decoder = Plain() if denoiser in (SPEC, ISOTROPIC) and spread else Plain(float(last))
    total = elbo(denoiser, x0, decoder, levels, draws=keyed(n), transition=Ancestral(spread=spread)).total
    tolerance = {0.72402: 0.0, 2.058: 2e-3, 3.340: 3e-3, 2712.0: 2.0}[expected]
    within(4 * float(total.std()) / math.sqrt(n) + tolerance, abs(float(total.mean()) - expected), "bound")
    if expected == 0.72402:
        within(5e-6, abs(entropy(SPEC) + prior_gap(SPEC, levels[0].item()) - expected), "entropy and prior gap")


@PROCESSES
@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("K", [1, 2, 7])
def test_tight_on_gaussian_data(process: Process, kind: str, K: int):
    """With the exact variance, in any basis, the bound is entropy plus prior gap, whatever the number of steps."""
    data, n = gaussian_data(kind, process), 4000
    grid = karras(K, 0.05, 20.0) if K > 1 else f64(2.0)
    x0 = data.sample(Noise(1, range(n)))
    bound = elbo(data, x0, Plain(), grid, draws=keyed(n))
    assert bound.diffusion.shape == (n, K - 1)
    close(bound.total, entropy(data) + prior_gap(data, float(grid[0])), "bound")


def test_the_better_the_variance_the_tighter():
    """full <= diagonal <= isotropic <= big, and small, on correlated data."""
    n, side = 2000, 6
    distance = (torch.arange(side)[:, None] - torch.arange(side)).abs().double()
    data = GaussianData(torch.zeros(side), 0.4 * 0.9**distance, VP)
    x0 = data.sample(Noise(3, range(n)))

    def diagonal(denoiser: Denoiser, x: Tensor, lam: Any, p: Gaussian) -> Tensor:
        assert p.basis is not None
        eye = torch.eye(side, dtype=x.dtype)
        return (p.basis.forward(eye).square() * p.var).sum(1)[None]

    sources: dict[str, tuple[Denoiser, bool]] = {
        "full": (data, True),
        "diagonal": (WithCovariance(_Plainly(data), diagonal), True),
        "isotropic": (WithCovariance(_Plainly(data), lambda d, x, lam, p: p.var.mean().reshape(1, 1)), True),
        "big": (WithCovariance(_Plainly(data), Unit()), True),
        "small": (_Plainly(data), False),
    }
    diffusion = {
        name: elbo(d, x0, Plain(1e-4), few(10), draws=keyed(n), transition=Ancestral(spread=spread)).diffusion.sum(1).mean()
        for name, (d, spread) in sources.items()
    }
    assert diffusion["full"] < diffusion["diagonal"] <= diffusion["isotropic"] + 1e-9
    assert diffusion["isotropic"] < min(diffusion["big"], diffusion["small"])


class _Plainly(Denoiser):
    """An oracle whose variance is kept in a basis only for those who ask: sources see its Gaussian."""

    def __init__(self, inner: Denoiser):
        super().__init__()
        self.inner, self.process, self.shape = inner, inner.process, inner.shape

    def forward(self, x: Tensor, lam: Any, **cond: Any) -> Gaussian:
        return self.inner(x, lam)


@PROCESSES
def test_never_beats_the_truth(process: Process):
    """E[bound] >= E[-log p] on a mixture, for all variances; nearer with more steps."""
    data = MixtureData(
        f64(-0.8, 0.1, 0.9)[:, None] * torch.ones(3, 2, dtype=torch.float64), f64(0.01, 0.04, 0.02), process=process
    )
    n = 4000
    x0 = data.sample(Noise(2, range(n)))
    gaps = []
    for K in (3, 10, 100):
        bound = elbo(data, x0, Plain(), karras(K, 0.02, 30.0), draws=keyed(n))
        gap = bound.total + data.log_prob(x0)
        assert gap.mean() > -4 * gap.std() / math.sqrt(n)
        gaps.append(float(gap.mean()))
    assert gaps[2] < gaps[1] < gaps[0]


def test_many_steps_make_variances_equal():
    """K = N: small, big and exact variances have one limit, the bound in continuous time."""
    data = MixtureData(f64(-0.7, 0.5)[:, None], f64(0.05, 0.05), process=VP)
    n, decoder = 3000, Plain(1e-3)
    x0 = data.sample(Noise(2, range(n)))
    schedule = Linear(6.0, -6.0)
    limit = elbo(data, x0, decoder, schedule, draws=keyed(n)).diffusion.sum(1)
    few_steps, many = {}, {}
    for name, denoiser, spread in (("small", data, False), ("exact", data, True), ("big", WithCovariance(data, Unit()), True)):
        for K, out in ((6, few_steps), (600, many)):
            grid = torch.linspace(-6.0, 6.0, K, dtype=torch.float64)
            bound = elbo(denoiser, x0, decoder, grid, draws=keyed(n), transition=Ancestral(spread=spread))
            out[name] = bound.diffusion.sum(1).mean()
    noise = 4 * float(limit.std()) / math.sqrt(n)
    for name, value in many.items():
        within(noise + 0.03, abs(float(value - limit.mean())), f"{name}, 600 steps")
    assert max(few_steps.values()) - min(few_steps.values()) > 10 * (max(many.values()) - min(many.values()))


@PROCESSES
@pytest.mark.parametrize("schedule", [Linear(9.0, -7.0), Cosine(9.0, -7.0), LinearBeta()], ids=lambda s: type(s).__name__)
def test_continuous_time_is_tight_on_gaussian_data(process: Process, schedule: Any):
    data, n = gaussian_data("vector", process), 6000
    x0 = data.sample(Noise(4, range(n)))
    bound = elbo(data, x0, Plain(), schedule, draws=keyed(n))
    assert bound.levels == ()
    noisy = float(schedule(f64(1.0)))
    close(bound.total, entropy(data) + prior_gap(data, noisy), f"continuous, {process}")


@pytest.mark.parametrize("form", ["eps", "x0", "v", "flow"])
def test_continuous_time_whatever_the_network_predicts(form: str):
    data = GaussianData(torch.zeros(4), f64(0.1, 0.2, 0.3, 0.4), VP)
    wrapped = Preconditioned(_Answer(data, form), VP, form, lambda lam: lam)
    x0 = data.sample(Noise(4, range(50)))
    a, b = (elbo(d, x0, Plain(1e-5), Linear(), draws=keyed(50)).diffusion for d in (data, wrapped))
    within(1e-8, (a / b - 1).abs().max(), f"{form} against the oracle")


class _Answer(torch.nn.Module):
    def __init__(self, data: Denoiser, form: str):
        super().__init__()
        self.data, self.form = data, form

    def forward(self, x: Tensor, lam: Tensor) -> Tensor:
        return self.data.predict(x, lam, self.form)


# ---- integers


@pytest.mark.parametrize("decoder", [Flat(pixels=Pixels(4, True)), Discretised(3e-3, Pixels(4, True))], ids=repr)
def test_discrete_data(decoder: Any):
    """Four equally likely values: log 4 at least, and log 4 plus the prior gap where the bound is tight (diffenc.md, 7.4)."""
    pixels = Pixels(4, True)
    data, n = FiniteData(pixels.values[:, None], VP), 8000
    x0 = pixels.values[torch.arange(n) % 4][:, None]
    bound = elbo(data, x0, decoder, Linear(8.0, -5.0), draws=keyed(n))
    assert bound.discrete
    close(bound.total, 1.38629967, "bound of discrete data")
    close(bound.bits_per_dim(), 1.38629967 / math.log(2), "in bits")


def test_dequantised_bound_is_above_the_discrete_one():
    pixels = Pixels(4, True)
    data, n = FiniteData(pixels.values[:, None], VP), 4000
    x0 = pixels.values[torch.arange(n) % 4][:, None]
    uniform = GaussianData(torch.zeros(1), torch.full((1,), 1 / 3), VP)  # knows that values lie in [-1, 1], no more
    grid = torch.linspace(-5.0, 6.0, 40, dtype=torch.float64)
    bound = elbo(uniform, x0, Dequantised(pixels=pixels), grid, draws=keyed(n))
    assert float(bound.total.mean()) > math.log(4)
    exact = elbo(data, x0, Discretised(1e-2, pixels), grid, draws=keyed(n))
    assert float(exact.total.mean()) < float(bound.total.mean())


# ---- an encoder


def test_an_encoder_has_one_bound_in_continuous_time_and_in_many_steps():
    """diffenc.md, 3.3: N(0, s2) data contracted by alpha^2, with the denoiser that is optimal for its bound."""
    s2, n = 0.25, 20_000

    class Optimal(Denoiser):
        process, shape = Encoded(VP), (1,)

        def forward(self, z: Tensor, lam: Any, **cond: Any) -> Gaussian:
            lam = torch.as_tensor(lam, dtype=z.dtype).reshape(-1, 1)
            a2, sigma2 = torch.sigmoid(lam), torch.sigmoid(-lam)
            gain = a2**1.5 * s2 / (a2**3 * s2 + sigma2)  # E[x | z] / z
            return Gaussian((1 + sigma2) * a2 * gain * z / (1 + sigma2), POINT)

    x0 = math.sqrt(s2) * Noise(0, range(n)).normal(torch.empty(n, 1, dtype=torch.float64), 0)
    bound = elbo(Optimal(), x0, _Nothing(), Linear(13.3, -5.0), draws=keyed(n), encoder=Contraction())
    steps = elbo(Optimal(), x0, _Nothing(), torch.linspace(-5.0, 13.3, 400, dtype=torch.float64), draws=keyed(n),
                 encoder=Contraction(), transition=Ancestral(spread=False))  # fmt: skip
    error = math.hypot(float(bound.total.std()), float(steps.total.std())) / math.sqrt(n)
    within(4 * error + 0.05, abs(float(bound.total.mean() - steps.total.mean())), "continuous against 400 steps")
    close(bound.prior, 0.5 * (VP.scales(-5.0)[0] ** 6 * s2 + 1 / (1 + math.exp(-5)) + math.log1p(math.exp(-5)) - 1), "prior")


class _Nothing(Flat):
    """No decoder at all."""

    def prepare(self, x0: Tensor, draws: Draws) -> Tensor:
        return x0

    def __call__(self, step: Any, x0: Tensor, x_t: Tensor, lam_t: Any) -> Tensor:
        return x0.new_zeros(len(x0))


# ---- shape of the answer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("kind", ["vector", "image, full covariance"])
@pytest.mark.parametrize("how", [karras(4), Linear()], ids=["steps", "continuous"])
def test_any_batch(kind: str, batch: int, dtype: torch.dtype, how: Any):
    data = gaussian_data(kind)
    x0 = data.sample(Noise(0, range(batch))).to(dtype)
    bound = elbo(data, x0, Plain(), how, draws=keyed(batch))
    assert bound.total.shape == bound.prior.shape == (batch,)
    assert bound.total.isfinite().all()
    assert bound.dims == math.prod(data.shape)
    within(
        1e-12, (sum(bound.terms[name] for name in ("prior", "diffusion", "reconstruction")) - bound.total).abs().sum(), "sum"
    )


def test_an_example_has_one_bound_whatever_its_batch():
    data, n = gaussian_data("image"), 9
    x0 = data.sample(Noise(0, range(n)))
    whole = elbo(data, x0, Plain(), karras(5), draws=Draws(3, 0, range(n)))
    parts = [elbo(data, x0[i:j], Plain(), karras(5), draws=Draws(3, 0, range(i, j), n)) for i, j in ((0, 4), (4, 5), (5, 9))]
    joined = Bound.cat(parts)
    for name in ("prior", "diffusion", "reconstruction", "total"):
        within(1e-11, (getattr(whole, name) - getattr(joined, name)).abs().max(), name)
    assert joined.levels == whole.levels
    single = elbo(data, x0.float().double(), Plain(), karras(5), draws=Draws(3, 0, range(n)))
    rounded = elbo(data, x0.float(), Plain(), karras(5), draws=Draws(3, 0, range(n)))
    within(0.0, (single.total - rounded.total).abs().max(), "float32 data are computed in float64")


def test_pure_noise_has_no_prior_gap():
    data = gaussian_data("vector", VP)
    x0 = data.sample(Noise(0, range(3)))
    grid = torch.cat([f64(-math.inf), karras(4)])
    bound = elbo(data, x0, Plain(), grid, draws=keyed(3))
    within(1e-15, bound.prior.abs().max(), "prior gap at zero terminal SNR")
    assert bound.total.isfinite().all()


def test_gradients_flow():
    data = gaussian_data("vector", VP)
    shift = torch.zeros(5, dtype=torch.float64, requires_grad=True)

    class Shifted(Denoiser):
        process = VP

        def forward(self, x: Tensor, lam: Any, **cond: Any) -> Gaussian:
            p = data(x, lam)
            return Gaussian(p.mean + shift, p.var)

    elbo(Shifted(), data.sample(Noise(0, range(8))), Plain(), karras(3), draws=keyed(8)).total.sum().backward()
    assert shift.grad is not None
    assert shift.grad.abs().max() > 0


# ---- refusals


class _With(Transition):
    """`Ancestral`, with a step that the bound cannot take."""

    def __init__(self, change: Callable[[Step], Step]):
        super().__init__()
        self.change = change

    def forward(self, denoiser: Denoiser, x_t: Tensor, lam_t: Any, lam_s: Any, memory: Any = None) -> Step:
        return self.change(Ancestral()(denoiser, x_t, lam_t, lam_s))


@pytest.mark.parametrize("transition, pieces", [
    (Ancestral(0.0), ("eta=0", "Ancestral(1)")),
    (Ancestral(0.5), ("eta=0.5", "Ancestral(1)")),
    (Ancestral(0.0, spread=False), ("eta=0", "Ancestral(1)")),
    (Heun(), ("deterministic", "log_likelihood")),
    (Exponential(2, eta=1.0), ("remembers", "Ancestral()")),
    (_With(lambda s: Step(s.p, s.x0, None, lambda x: x)), ("after the draw",)),
    (_With(lambda s: Step(object(), s.x0)), ("class object", "density")),
    (_With(lambda s: Step(Gaussian(s.p.mean, s.p.var * 0.0), s.x0)), ("variance 0", "log-SNR")),
    (_With(lambda s: Step(Gaussian(s.p.mean, s.p.var * math.nan), s.x0)), ("variance 0 or NaN",)),
    (_With(lambda s: Step(Gaussian(s.p.mean, scalar(0.0)), s.x0)), ("deterministic",)),
], ids=range(10))  # fmt: skip
def test_kernels_without_a_bound(transition: Transition, pieces: tuple[str, ...]):
    data = gaussian_data("vector", VP)
    with refuses(*pieces):
        elbo(data, data.sample(Noise(0, range(2))), Plain(1e-3), karras(3), draws=keyed(2), transition=transition)


def test_refusals():
    data = gaussian_data("vector", VP)
    x0 = data.sample(Noise(0, range(2)))
    for grid in (f64(1.0, 1.0, 2.0), f64(2.0, 1.0), f64(1.0, math.nan), torch.zeros(2, 2), f64(math.inf), f64()):
        with refuses("`grid`"):
            elbo(data, x0, Plain(), grid, draws=keyed(2))
    with refuses("`draws`", "3 examples", "2"):
        elbo(data, x0, Plain(), karras(3), draws=keyed(3))
    with refuses("`x0`", "uint8", "127.5"):
        elbo(data, x0.to(torch.uint8), Plain(), karras(3), draws=keyed(2))
    with refuses("`x0`", "256 values"):
        elbo(data, x0, Discretised(1e-3), karras(3), draws=keyed(2))
    for schedule in (Rectified(), LogNormal()):
        with refuses("`grid_or_schedule`", "finite"):
            elbo(data, x0, Plain(), schedule, draws=keyed(2))
    with refuses("`transition`", "schedule"):
        elbo(data, x0, Plain(), Linear(), draws=keyed(2), transition=Ancestral())
    with refuses("bits per dimension", "total / dims"):
        elbo(data, x0, Plain(), karras(3), draws=keyed(2)).bits_per_dim()
    with refuses("`bounds`", "at least one"):
        Bound.cat([])
    bounds = [elbo(data, x0, Plain(), karras(K), draws=keyed(2)) for K in (3, 4)]
    with refuses("`bounds`", "one protocol"):
        Bound.cat(bounds)


@pytest.mark.parametrize("levels", [Linear(4.0, -4.0), karras(5)[:-1]], ids=["continuous", "steps"])
@pytest.mark.parametrize("encoder", [None, Contraction()])
def test_an_encoder_and_its_process_go_together(levels, encoder):
    class Own(Denoiser):
        process, shape = Encoded(VP) if encoder is None else VP, (2,)

        def forward(self, x, lam, **cond):
            return Gaussian(x, scalar(0.1))

    with refuses("`encoder`", "Encoded"):
        elbo(Own(), torch.zeros(3, 2), Plain(0.1), levels, draws=Draws(0, 0, range(3)), encoder=encoder)


@pytest.mark.parametrize("decoder", [Plain(), Discretised(), Dequantised()], ids=str)
def test_a_last_kernel_without_variance_is_refused_and_a_variance_of_the_decoder_helps(decoder):
    class Sure(Denoiser):
        """Of one number it is certain."""

        process, shape = VP, (2,)

        def forward(self, x, lam, **cond):
            return Gaussian(x, torch.tensor([0.0, 0.1], dtype=x.dtype).expand_as(x))

    grid, x0, draws = karras(5, 0.1)[:-1], torch.full((3, 2), 1 / 255.0), Draws(0, 0, range(3))
    with refuses("variance 0", "Discretised(var=1e-4)"):
        elbo(Sure(), x0, decoder, grid, draws=draws)
    assert elbo(Sure(), x0, type(decoder)(0.1), grid, draws=draws).total.isfinite().all()


@pytest.mark.parametrize("lam", [math.inf, -math.inf])
def test_flat_values_need_noise_to_be_told_apart_by(lam):
    with refuses("`lam_t`", "finite"):
        Flat()(None, torch.zeros(2, 3), torch.zeros(2, 3), lam)


@pytest.mark.parametrize("around", [lambda t, grid: Hushed(t, grid), lambda t, grid: Churn(t)], ids=["Hushed", "Churn"])
def test_less_noise_than_the_posterior_has_is_refused_through_wrappers(around):
    data, grid = gaussian_data("vector", VP), karras(5)[:-1]
    with refuses("eta=0.5", "Ancestral(1)"):
        elbo(data, torch.zeros(2, 5), Plain(0.1), grid, draws=keyed(2), transition=around(Ancestral(0.5), grid))


def test_a_policy_of_any_eta_has_a_bound():
    data, grid = gaussian_data("vector", VP), karras(8)
    x0 = data.sample(Noise(0, range(500)))
    policy = Policy(data, grid, Ancestral(0.5, spread=False))
    bound = elbo(data, x0, Plain(0.1), grid, draws=keyed(500), transition=policy.transition).total
    exact = -data.log_prob(x0)
    assert float((bound - exact).mean()) > -4 * float((bound - exact).std()) / math.sqrt(500)
