"""The variational bound with and without an encoder: closed forms, identities, and the official code's numbers."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import golden
from helpers import refuses, within
from quieten.basis import DCT
from quieten.denoiser import Denoiser, Preconditioned
from quieten.encoder import Contraction, Encoder, LearnedEncoder
from quieten.encoding.encoded import Encoded, EncodedFlow, Moving
from quieten.gaussian import Gaussian, spread_over
from quieten.likelihood import Bound, elbo
from quieten.likelihoods.bound import VariationalBound
from quieten.likelihoods.decoders import Flat, Pixels, Plain
from quieten.likelihoods.learned import Monotone, Polynomial
from quieten.likelihoods.widened import Widened
from quieten.noise import Draws, Noise
from quieten.objective import Batch
from quieten.oracle import GaussianData
from quieten.process import FLOW, VE, VP
from quieten.sampling import trajectory
from quieten.schedule import Linear, LogNormal
from quieten.solver import AdamsBashforth
from quieten.solvers.samplers import SAMPLERS, sampler
from quieten.transition import Ancestral, Langevin

S2, TOP, BOTTOM = 0.25, 13.3, -5.0


# ---- known data under a linear encoder x_t = (1 + sigma^2 (k - 1)) x: k = 1 is VDM, k = 0 the contraction


class Times(nn.Module):
    """y = k x."""

    def __init__(self, k: float):
        super().__init__()
        self.k = k

    def forward(self, x: Tensor, lam: Tensor) -> Tensor:
        return self.k * x


def encoder_of(k: float) -> Encoder | None:
    return None if k == 1 else Contraction() if k == 0 else LearnedEncoder(Times(k), bounded=False)


class Optimal(Denoiser):
    """What minimises the bound for data N(mean, s2) under the encoder k: E[u | z], less what the counterterm adds."""

    def __init__(self, k: float, counterterm: str = "sigma2", s2: float = S2, mean: float = 0.0):
        super().__init__()
        self.k, self.s2, self.mean = k, s2, mean
        self.process = VP if k == 1 else Encoded(VP, counterterm)
        self.counterterm = "none" if k == 1 else counterterm

    def forward(self, x: Tensor, lam, **cond) -> Gaussian:
        lam = torch.as_tensor(lam, dtype=torch.float64)
        noise = torch.sigmoid(-lam)
        c, u = 1 + noise * (self.k - 1), 1 + noise**2 * (self.k - 1)
        alpha = torch.sigmoid(lam).sqrt()
        factor = self.s2 * alpha * c / (alpha**2 * c**2 * self.s2 + noise)
        clean = self.mean + spread_over(factor, x) * (x - spread_over(alpha * c, x) * self.mean)  # E[x | z]
        return Gaussian(clean * spread_over(u / (1 + noise) if self.counterterm == "sigma2" else u, x))


class Fixed(Draws):
    """Times and noise given: second moments are exact with two-point variables."""

    def __init__(self, u: Tensor, eps: Tensor, first: Tensor | None = None):
        super().__init__(0, 0, range(len(u)))
        self.u, self.eps, self.first = u, eps, eps if first is None else first

    def stratified(self, tag: str = "u") -> Tensor:
        return self.u

    def normal(self, like: Tensor, tag: str = "eps") -> Tensor:
        return (self.first if tag == "decoder" else self.eps).to(like)


def nodes(n: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights on (0, 1), in n / 40 panels."""
    x, w = (torch.tensor(part) for part in np.polynomial.legendre.leggauss(40))
    panels = n // 40
    return ((0.5 * x + 0.5 + torch.arange(panels)[:, None]) / panels).flatten(), (0.5 * w / panels).repeat(panels)


def flat_normal(k: float):
    """-log N(x; z / (alpha c), e^{-lam} / c^2): the decoder of continuous data."""

    def decode(step, x0: Tensor, z: Tensor, lam) -> Tensor:
        c = 1 + torch.sigmoid(-lam) * (k - 1)
        var = torch.exp(-lam) / c**2
        mean = z / spread_over(torch.sigmoid(lam).sqrt() * c, z)
        return 0.5 * ((x0 - mean).square() / var + var.log() + math.log(2 * math.pi)).flatten(1).sum(1)

    return decode


def expected(bound: VariationalBound, denoiser: Optimal, n: int = 400) -> dict[str, float]:
    """The exact expectation of every term over the denoiser's data, noise and time."""
    u, w = nodes(n)
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    x, eps = (signs[:, i].repeat(n)[:, None] for i in (0, 1))
    batch = Batch(denoiser.mean + math.sqrt(denoiser.s2) * x, torch.arange(4 * n), {})
    terms = bound.terms(denoiser, batch, Fixed(u.repeat_interleave(4), eps))
    return {name: float((w.repeat_interleave(4) / 4 * value).sum()) for name, value in terms.items()}


@pytest.mark.parametrize("s2", [0.25, 1.0])
def test_the_bound_of_gaussian_data_is_its_closed_form(s2):
    found = expected(VariationalBound(Linear(TOP, BOTTOM), flat_normal(1)), Optimal(1, s2=s2))["diffusion"]
    wanted = 0.5 * math.log((1 / s2 + math.exp(TOP)) / (1 / s2 + math.exp(BOTTOM)))
    within(1e-8, abs(found - wanted), "diffusion loss")
    if s2 == S2:
        within(1e-8, abs(wanted - 5.95601463), "the specified figure")


GAPS = {1: 0.0, 0.5: 0.005598, 0: 0.024237, 1.5: 0.004657, 2: 0.016870, -1: 0.109269}


@pytest.mark.parametrize("k", GAPS)
def test_an_encoder_loosens_the_bound_by_what_of_its_rate_cannot_be_predicted(k):
    bound = VariationalBound(Linear(TOP, BOTTOM), flat_normal(k), encoder=encoder_of(k))
    terms = expected(bound, Optimal(k), 800)
    u, w = nodes(800)
    lam, rate = Linear(TOP, BOTTOM).rate(u)
    noise = torch.sigmoid(-lam)
    c = 1 + noise * (k - 1)
    unpredictable = (noise * (1 - noise) * (k - 1)) ** 2 / (1 / S2 + lam.exp() * c**2)  # E (xdot - E[xdot | z])^2
    gap = float((w * 0.5 * rate * lam.exp() * unpredictable).sum())
    within(1e-6, abs(gap - GAPS[k]), "gap")
    # total = -log-likelihood + end effects + gap: the ends are those of the marginals, in closed form
    (c0, c1), (top, bottom) = (1 + torch.sigmoid(torch.tensor([-TOP, -BOTTOM], dtype=torch.float64)) * (k - 1)), (TOP, BOTTOM)
    first = 0.5 * (1 + math.log(2 * math.pi) - math.log(c0**2) - top)  # decoder: noise e^{-top} / c0^2
    mutual = 0.5 * math.log1p(S2 * float(c0) ** 2 * math.exp(top)) - 0.5 * math.log1p(S2 * float(c1) ** 2 * math.exp(bottom))
    within(1e-8, abs(terms["diffusion"] - mutual - gap), "diffusion loss less mutual information and gap")
    within(1e-8, abs(terms["reconstruction"] - first), "reconstruction")


@pytest.mark.parametrize("k, total", [(1, 0.726102), (0, 0.750043)])
def test_totals_of_gaussian_data(k, total):
    bound = VariationalBound(Linear(TOP, BOTTOM), flat_normal(k), encoder=encoder_of(k))
    terms = expected(bound, Optimal(k, mean=0.3), 800)
    found = sum(terms.values())
    within(1e-6, abs(found - total), "total")
    assert found >= 0.5 * math.log(2 * math.pi * math.e * S2), "a bound must not fall below the entropy"


@pytest.mark.parametrize(
    "steps, excess", [(10, 9.7716), (20, 3.4133), (40, 1.4515), (80, 0.6721), (160, 0.3237), (1000, 0.0502)]
)
def test_equal_variances_cost_at_finite_steps(steps, excess):
    found = _discrete(steps, "equal") - 5.95601463
    within(6e-5, abs(found - excess), "excess of the T-step bound")


@pytest.mark.parametrize("steps", [1, 2, 10, 100, 1000])
def test_the_optimal_reverse_variance_makes_every_number_of_steps_as_tight_as_continuous_time(steps):
    wanted = 0.5 * math.log((1 / S2 + math.exp(TOP)) / (1 / S2 + math.exp(BOTTOM)))
    within(1e-12, abs(_discrete(steps, "optimal") / wanted - 1), "T steps against continuous time")


def _discrete(steps: int, variance: str) -> float:
    """The exact expectation of the T-step loss, each step once, with the excess variance in closed form."""
    bound = VariationalBound(Linear(TOP, BOTTOM), flat_normal(1), steps=steps, reverse_variance=variance).eval()
    if bound.excess is not None:
        levels = Linear(TOP, BOTTOM)(torch.linspace(0, 1, steps + 1, dtype=torch.float64))
        bound.excess.copy_(torch.expm1(levels[:-1] - levels[1:]) / (torch.exp(-levels[1:]) / S2 + 1))
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    u = ((torch.arange(steps, dtype=torch.float64) + 0.5) / steps).repeat_interleave(4)
    x, eps = (signs[:, i].repeat(steps)[:, None] for i in (0, 1))
    return float(bound.terms(Optimal(1), Batch(math.sqrt(S2) * x, torch.arange(len(u)), {}), Fixed(u, eps))["diffusion"].mean())


def test_a_fixed_excess_costs_in_proportion_to_the_steps():
    w = 0.9
    rates = []
    for steps in (4000, 8000):
        bound = VariationalBound(Linear(TOP, BOTTOM), flat_normal(1), steps=steps, reverse_variance="optimal").eval()
        assert bound.excess is not None
        bound.excess.fill_(1 / w - 1)
        u = ((torch.arange(steps, dtype=torch.float64) + 0.5) / steps).repeat_interleave(4)
        signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
        x, eps = (signs[:, i].repeat(steps)[:, None] for i in (0, 1))
        loss = bound.terms(Optimal(1), Batch(math.sqrt(S2) * x, torch.arange(len(u)), {}), Fixed(u, eps))["diffusion"].mean()
        rates.append(float(loss))
    within(1e-5, abs((rates[1] - rates[0]) / 4000 - 2.68e-3), "growth for each step")


def test_t_steps_of_the_official_case():
    """How far the T-step loss is from continuous time, at worst, with the official stand-ins: the specification's figures."""
    arrays = golden("diffenc_losses")
    encoder, process, form = MODELS["diffenc"]
    batch, eps = Batch(torch.tensor(arrays["x_scaled"]), torch.arange(6), {}), torch.tensor(arrays["eps"])
    times = torch.tensor(arrays["t"])
    for steps, error in ((1_000, 1.9e-2), (10_000, 1.8e-3), (100_000, 1.8e-4)):
        losses = []
        for count, u in ((steps, (times * steps).ceil() / steps), (None, times)):
            bound = VariationalBound(Linear(TOP, BOTTOM), flat_official, steps=count, encoder=encoder)
            losses.append(bound.terms(score(process, form), batch, Fixed(u, eps))["diffusion"])
        within(0.03 * error, abs(float((losses[0] / losses[1] - 1).max()) - error), f"relative error of {steps} steps")


def test_t_steps_approach_continuous_time_at_first_order():
    torch.manual_seed(0)
    x, eps = torch.randn(64, 3, dtype=torch.float64), torch.randn(64, 3, dtype=torch.float64)
    encoder = LearnedEncoder(Stand(), bounded=False)
    batch, denoiser = Batch(x, torch.arange(64), {}), Preconditioned(Score(), Encoded(VP), "v", lambda lam: -lam)
    u = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    continuous = VariationalBound(Linear(TOP, BOTTOM), flat_normal(1), encoder=encoder)
    wanted = continuous.terms(denoiser, batch, Fixed(u, eps))["diffusion"].mean()
    errors = []
    for steps in (6400, 12800):
        bound = VariationalBound(Linear(TOP, BOTTOM), flat_normal(1), steps=steps, encoder=encoder)
        errors.append(float(bound.terms(denoiser, batch, Fixed(u, eps))["diffusion"].mean() / wanted - 1))
    within(0.05, abs(errors[0] / errors[1] - 2), "ratio of errors when the steps double, less 2")


# ---- discrete data, one pixel with four values


LEVELS = torch.tensor([-0.75, -0.25, 0.25, 0.75], dtype=torch.float64)


class Curved(nn.Module):
    def forward(self, x: Tensor, lam: Tensor) -> Tensor:
        gamma = spread_over(-lam, x)
        return torch.tanh(2 * x - 0.3 * gamma) + 0.2 * torch.sin(gamma) * x.square()


class Posterior(Denoiser):
    """E[u | z] / (1 + sigma^2) for the four equally likely values under an encoder; exact by enumeration."""

    def __init__(self, encoder: Encoder | None):
        super().__init__()
        self.encoder, self.process = encoder, VP if encoder is None else Encoded(VP)

    def forward(self, x: Tensor, lam, **cond) -> Gaussian:
        n = len(x)
        values, levels = LEVELS.repeat(n)[:, None], lam.repeat_interleave(4)
        if self.encoder is None:
            x_t, rate = values, torch.zeros_like(values)
        else:
            x_t, rate = self.encoder.with_rate(values, levels)
        alpha, sigma = VP.scales(lam)
        x_t, u = x_t.reshape(n, 4), (x_t + rate).reshape(n, 4)
        weights = torch.softmax(-0.5 * ((x - alpha[:, None] * x_t) / sigma[:, None]).square(), 1)
        mean = (weights * u).sum(1, keepdim=True)
        return Gaussian(mean if self.encoder is None else mean / (1 + sigma[:, None] ** 2))


def four_values(step, x0: Tensor, z: Tensor, lam) -> Tensor:
    scaled = z / torch.sigmoid(lam).sqrt()
    logits = -0.5 * lam.exp() * (scaled - LEVELS).square()
    return -torch.log_softmax(logits, 1).gather(1, torch.argmin((x0 - LEVELS).abs(), 1, keepdim=True))[:, 0]


@pytest.mark.parametrize("name, total", [("none", 1.38629967), ("contraction", 1.41417353), ("learned", 1.39787141)])
def test_totals_of_discrete_data(name, total):
    encoder = {"none": None, "contraction": Contraction(), "learned": LearnedEncoder(Curved(), bounded=False)}[name]
    bound = VariationalBound(Linear(8.0, -5.0), four_values, encoder=encoder)
    u, w = nodes(160)
    z, v = np.polynomial.hermite_e.hermegauss(120)
    eps, weight = torch.tensor(z), torch.tensor(v / v.sum())
    n = len(u) * len(eps) * 4
    times = u.repeat_interleave(len(eps) * 4)
    noise = eps.repeat_interleave(4).repeat(len(u))[:, None]
    share = w.repeat_interleave(len(eps) * 4) * weight.repeat_interleave(4).repeat(len(u)) / 4
    batch = Batch(LEVELS.repeat(n // 4)[:, None], torch.arange(n), {})
    terms = bound.terms(Posterior(encoder), batch, Fixed(times, noise))
    within(1e-6, abs(float((share * terms.total).sum()) - total), f"total, encoder: {name}")


@pytest.mark.parametrize("name, gap", [("none", 0.0), ("contraction", 0.02786792), ("learned", 0.00976034)])
def test_what_an_encoder_of_discrete_data_loses(name, gap):
    """Total = entropy + prior gap + what of the encoding's rate cannot be predicted: two integrals that share nothing."""
    encoder = {"none": None, "contraction": Contraction(), "learned": LearnedEncoder(Curved(), bounded=False)}[name]
    x1 = LEVELS[:, None] if encoder is None else encoder(LEVELS[:, None], torch.full((4,), -5.0, dtype=torch.float64))
    within(1e-8, abs(_unpredictable(encoder) - gap), "rate that cannot be predicted")
    wanted = {"none": 1.38629967, "contraction": 1.41417353, "learned": 1.39787141}[name]
    within(1e-8, abs(math.log(4) + _marginal_gap(x1[:, 0]) + gap - wanted), "entropy, prior gap and loss")


def _on_a_line(means: Tensor, std: float | Tensor) -> tuple[Tensor, Tensor]:
    """Points (n,) over all of a mixture's mass, and the joint density (4, n) of component and place."""
    z = torch.linspace(-14.0, 14.0, 8001, dtype=torch.float64)
    density = torch.exp(-0.5 * ((z - means[:, None]) / std) ** 2) / (4 * math.sqrt(2 * math.pi) * std)
    return z, density * (z[1] - z[0])


def _marginal_gap(x1: Tensor) -> float:
    """KL(q(z_1) || N(0, 1)) for four equally likely encoded values."""
    alpha, sigma = VP.scales(-5.0)
    z, joint = _on_a_line(alpha * x1, sigma)
    q = joint.sum(0)
    log_p = -0.5 * z.square() - 0.5 * math.log(2 * math.pi) + torch.log(z[1] - z[0])
    return float((q * (q.clamp_min(1e-300).log() - log_p)).sum())


def _unpredictable(encoder: Encoder | None) -> float:
    r"""1/2 int e^lam E||xdot - E[xdot | z]||^2 dlam, the posterior on a grid of z fine enough for every level."""
    if encoder is None:
        return 0.0
    u, w = nodes(400)
    lam, rate = Linear(8.0, -5.0).rate(u)
    total = 0.0
    for level, slope, weight in zip(lam.tolist(), rate.tolist(), w.tolist(), strict=True):
        alpha, sigma = VP.scales(level)
        x_t, moves = encoder.with_rate(LEVELS[:, None], torch.full((4,), level, dtype=torch.float64))
        _, joint = _on_a_line(alpha * x_t.detach()[:, 0], sigma)
        mean = (joint * moves.detach()).sum(0) / joint.sum(0).clamp_min(1e-300)
        total += weight * 0.5 * slope * math.exp(level) * float((joint * (moves.detach() - mean) ** 2).sum())
    return total


# ---- what sampling makes of it


def _levels(steps: int) -> list[float]:
    return Linear(TOP, BOTTOM)(torch.linspace(1, 0, steps + 1, dtype=torch.float64)).tolist()


def _moments(k: float, steps: int, counterterm: str, mean: float = 0.0) -> tuple[float, float]:
    """Mean and variance of the last state, by recursion through the kernels."""

    denoiser, levels = Optimal(k, counterterm, mean=mean), _levels(steps)
    m, v = 0.0, 1.0  # where samplers start
    for lam_t, lam_s in pairwise(levels):
        p = Ancestral()(denoiser, torch.tensor([[0.0], [1.0]], dtype=torch.float64), lam_t, lam_s).p
        slope, offset = float(p.mean[1] - p.mean[0]), float(p.mean[0])
        m, v = slope * m + offset, slope**2 * v + float(p.var)
    alpha = VP.scales(levels[-1])[0]
    return m / alpha, v / alpha**2


@pytest.mark.parametrize(
    "steps, error", [(10, -0.135), (20, -0.0862), (40, -0.0494), (80, -0.0265), (160, -0.0138), (1000, -0.0023)]
)
def test_the_variance_of_ancestral_samples_errs_at_first_order(steps, error):
    within(6e-4, abs(_moments(1, steps, "sigma2")[1] - S2 - error), "variance error, no encoder")


@pytest.mark.parametrize("steps, error", [(10, -0.124), (1000, -0.0021)])
def test_the_contraction_samples_with_its_counterterm(steps, error):
    within(6e-4, abs(_moments(0, steps, "sigma2")[1] - S2 - error), "variance error")


@pytest.mark.parametrize("steps, with_it, without", [(10, 0.304, 0.049), (1000, 2e-4, -9e-4)])
def test_counterterms_discretise_the_same_limit(steps, with_it, without):
    found = [_moments(2, steps, name, mean=0.3)[0] - 0.3 for name in ("sigma2", "none")]
    within(6e-4, abs(found[0] - with_it), "mean error with sigma2")
    within(6e-4, abs(found[1] - without), "mean error with none")


class Separate(Optimal):
    """Knows E[x_t | z] and E[d x_t / d lam | z] apart."""

    def forward(self, x: Tensor, lam, **cond) -> Gaussian:
        noise = torch.sigmoid(-torch.as_tensor(lam, dtype=torch.float64))
        both = super().forward(x, lam).mean / (1 + noise**2 * (self.k - 1))  # E[x | z]
        return Moving((1 + noise * (self.k - 1)) * both, rate=-noise * (1 - noise) * (self.k - 1) * both)


def _flow_variance(denoiser: Denoiser, steps: int = 1000) -> float:
    m, levels = 1.0, _levels(steps)
    for lam_t, lam_s in pairwise(levels):
        m = float(EncodedFlow()(denoiser, torch.tensor([[m]], dtype=torch.float64), lam_t, lam_s).p.mean)
    return (m / VP.scales(levels[-1])[0]) ** 2


def test_the_ode_of_an_encoder_needs_mean_and_rate_apart():
    # started at N(0, 1), not at the marginal: the variance is S2 to the prior's error
    within(1e-3, abs(_flow_variance(Separate(2, "split")) - 0.25), "split, k = 2")
    contracted = Optimal(0)
    contracted.process = Encoded(VP, "sigma2", trained=False)
    within(1e-3, abs(_flow_variance(contracted) - 0.2517), "sigma2, contraction")
    contracted.process = Encoded(VP, "sigma2", trained=False)
    trained = Optimal(2)
    trained.process = Encoded(VP, "sigma2", trained=False)  # as if its x_hat were E[x_t | z]: what the refusal prevents
    within(1e-3, abs(_flow_variance(trained) - 0.5485), "sigma2, k = 2: wrong, as theory says")
    with refuses("split", "Ancestral()"):
        _flow_variance(Optimal(2))


@pytest.mark.parametrize("eta, steps, bar", [(0.0, 4000, 2e-3), (0.5, 4000, 2e-3)])
def test_where_the_mean_is_known_every_eta_has_the_same_marginals(eta, steps, bar):
    """DDIM of an encoded process is the ODE at first order: contraction, and mean and rate apart."""
    contracted = Optimal(0)
    contracted.process = Encoded(VP, "sigma2", trained=False)
    for denoiser, name in ((Separate(2, "split"), "split, k = 2"), (contracted, "contraction")):
        v = 1.0
        for lam_t, lam_s in pairwise(_levels(steps)):
            p = Ancestral(eta, spread=False)(denoiser, torch.ones(1, 1, dtype=torch.float64), lam_t, lam_s).p
            v = float(p.mean) ** 2 * v + float(p.var)
        within(bar, abs(v / VP.scales(TOP)[0] ** 2 - 0.25), f"variance, eta {eta}, {name}")


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("ddpm", "ancestral", "ocm")])
def test_what_needs_the_mean_refuses_an_encoded_model(name):
    """Every sampler but the kernel itself: none may run, and draw what the model never learned."""
    transition, grid = sampler(name, torch.tensor([-5.0, 0.0, 5.0, math.inf], dtype=torch.float64))
    with refuses("encoder", "Ancestral()"):
        list(trajectory(Optimal(2), torch.zeros(2, 1, dtype=torch.float64), grid, transition))
    if name not in ("ddim", "ocm-ddim", "pc"):  # with the score of z_t they only want a step like the kernel's
        contracted = Optimal(0)
        contracted.process = Encoded(VP, "sigma2", trained=False)
        with refuses("EncodedFlow()"):
            list(trajectory(contracted, torch.zeros(2, 1, dtype=torch.float64), grid, transition))


def test_adams_bashforth_of_order_1_is_ddim_of_an_encoded_model_too():
    """And above that it is refused, like every method that takes more from the ODE than one step of the kernel."""
    contracted, x = Optimal(0), torch.linspace(-2, 2, 6, dtype=torch.float64).reshape(3, 2)
    contracted.process, grid = Encoded(VP, "sigma2", trained=False), torch.tensor([-5.0, 0.0, 5.0], dtype=torch.float64)
    ab, ddim = (list(trajectory(contracted, x, grid, t))[-1].x for t in (AdamsBashforth(1), Ancestral(0.0, spread=False)))
    within(1e-12, (ab - ddim).abs().max(), "order 1 against DDIM")
    for k, coefficients, start in ((2, "variable", "ramp"), (4, "constant", "ramp"), (3, "variable", "rk")):
        with refuses("EncodedFlow()"):
            list(trajectory(contracted, x, grid[:2], AdamsBashforth(k, coefficients, start)))


def test_corrections_use_the_score_of_encoded_data():
    """Langevin steps of a contraction, x_t = x / 2 at lam = 0, are those of data that are half as large."""
    contracted, x = Optimal(0), torch.linspace(-2, 2, 6, dtype=torch.float64).reshape(3, 2)
    contracted.process = Encoded(VP, "sigma2", trained=False)
    halved = GaussianData(torch.zeros(2, dtype=torch.float64), torch.full((2,), S2 / 4, dtype=torch.float64), VP)
    p, q = (Langevin()(denoiser, x, 0.0, 0.0).p for denoiser in (contracted, halved))
    within(1e-12, (p.mean - q.mean).abs().max() + (p.var - q.var).abs().max(), "kernel of a correction")


# ---- properties


def images(n: int = 6, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(0)
    k = torch.randint(0, 256, (n, 4, 4, 3), generator=generator)
    return Batch((2 * (k + 0.5) / 256 - 1).to(dtype), torch.arange(n), {})


def score(process=VP, form: str = "v") -> Preconditioned:
    return Preconditioned(Score(), process, form, lambda lam: -lam)


def test_forms_agree():
    draws = Draws(0, 0, range(6))
    denoiser = score()

    class As(Denoiser):
        def __init__(self, form):
            super().__init__()
            self.form, self.process = form, VP

        def forward(self, x, lam, **cond):
            return denoiser(x, lam)

        def predict(self, x, lam, form="x0", **cond):
            return denoiser.predict(x, lam, form)

    bound = VariationalBound(Linear(TOP, BOTTOM), four_hundred)
    losses = [bound.terms(As(form), images(), draws)["diffusion"] for form in ("eps", "x0", "v", "flow", "edm")]
    for loss in losses[1:]:
        within(1e-12, ((loss - losses[0]) / losses[0]).abs().max(), "relative difference of forms")


def test_other_processes_have_the_same_bound():
    draws = Draws(0, 0, range(6))

    class Rescaled(Denoiser):
        def __init__(self, process):
            super().__init__()
            self.process, self.inner = process, score()

        def forward(self, x, lam, **cond):
            alpha, _ = self.process.scales_over(lam, x)
            own, _ = VP.scales_over(lam, x)
            return self.inner(x * own / alpha, lam)

    bound = VariationalBound(Linear(TOP, BOTTOM), four_hundred)
    wanted = bound.terms(Rescaled(VP), images(), draws)["diffusion"]
    for process in (VE, FLOW):
        found = bound.terms(Rescaled(process), images(), draws)["diffusion"]
        within(1e-11, ((found - wanted) / wanted).abs().max(), f"{process} against VP")


def four_hundred(step, x0, z, lam):
    return torch.zeros(len(x0), dtype=x0.dtype)


def test_an_encoder_that_starts_as_the_identity_starts_as_none_at_all():
    draws = Draws(0, 0, range(6))
    same = LearnedEncoder(Times(0.0), id_at_zero=True)
    with_encoder = VariationalBound(Linear(TOP, BOTTOM), four_hundred, encoder=same)
    a = with_encoder.terms(score(Encoded(VP, "none")), images(), draws)
    b = VariationalBound(Linear(TOP, BOTTOM), four_hundred).terms(score(), images(), draws)
    for name in b:
        within(1e-11, ((a[name] - b[name]) / (1 + b[name])).abs().max(), name)


@pytest.mark.parametrize("steps", [None, 50])
def test_the_contraction_is_the_learned_encoder_at_its_start(steps):
    draws = Draws(0, 0, range(6))
    bounds = [VariationalBound(Linear(TOP, BOTTOM), four_hundred, encoder=e, steps=steps)
              for e in (Contraction(), LearnedEncoder(Times(0.0)))]  # fmt: skip
    a, b = (bound(score(Encoded(VP)), images(), draws) for bound in bounds)
    within(1e-12, (a - b).abs().max(), "difference")


def test_a_warp_of_time_leaves_the_bound():
    class Warped(Linear):
        def forward(self, u):
            return super().forward(u**2 * (1.5 - 0.5 * u))

    totals = [expected(VariationalBound(s, flat_normal(1)), Optimal(1), 800)["diffusion"]
              for s in (Linear(TOP, BOTTOM), Warped(TOP, BOTTOM), Polynomial(TOP, BOTTOM))]  # fmt: skip
    within(1e-8, max(totals) - min(totals), "spread over schedules")


@pytest.mark.parametrize("n, ratio", [(8, 16.0), (32, 67.0), (128, 267.0)])
def test_low_discrepancy_times_quieten_the_estimate(n, ratio):
    lam, rate = Linear(TOP, BOTTOM).rate(torch.linspace(0, 1, 20001, dtype=torch.float64)[:-1])
    profile = 0.5 * rate * lam.exp() / (1 / S2 + lam.exp())  # the expected loss at each time

    def at(u: Tensor) -> Tensor:
        lam, rate = Linear(TOP, BOTTOM).rate(u)
        return 0.5 * rate * lam.exp() / (1 / S2 + lam.exp())

    spread = torch.stack([at(Draws(0, i, range(n)).stratified()).mean() for i in range(400)])
    iid = profile.var() / n
    found = float(iid / spread.var())
    assert ratio / 1.5 < found < ratio * 1.5, f"variance ratio {found:.1f}, not about {ratio}"
    within(4 * float(spread.std()) / 20, abs(float(spread.mean() - profile.mean())), "bias")


@pytest.mark.parametrize("n", [1, 7, 49, 98, 103, 107, 196])
def test_even_times_for_every_batch(n):
    """One in each n-th of (0, 1); these batch sizes broke the released grid, whose points floats miscounted."""
    for step in range(20):
        u = Draws(0, step, range(n)).stratified()
        assert u.shape == (n,)
        assert torch.equal((u * n).floor().long().sort().values, torch.arange(n))


def test_independent_times():
    """Uniform, and the same mean loss with more variance."""
    batch, denoiser = images(8), score()
    found = {}
    for times in ("even", "independent"):
        bound = VariationalBound(Linear(TOP, BOTTOM), four_hundred, times=times)
        with torch.no_grad():
            losses = [bound.terms(denoiser, batch, Draws(0, i, range(8)))["diffusion"].mean() for i in range(150)]
        found[times] = torch.stack(losses)
    spread = float(found["independent"].std())
    within(4 * spread / math.sqrt(150), abs(float(found["independent"].mean() - found["even"].mean())), "means")
    assert float(found["even"].std()) < 0.5 * spread


def test_a_learned_schedule_reports_its_ends_and_stops_when_it_turns_over():
    schedule = Linear(TOP, BOTTOM, learned=True)
    bound = VariationalBound(schedule, four_hundred)
    losses = bound.losses(score(), images(), Draws(0, 0, range(6)))
    within(1e-6, abs(float(losses["lam_max"][0]) - TOP) + abs(float(losses["lam_min"][0]) - BOTTOM), "ends")
    assert bool(losses["loss"].isfinite().all())
    with torch.no_grad():
        schedule.ends[1] = TOP + 1
    assert bool(bound.losses(score(), images(), Draws(0, 0, range(6)))["loss"].isnan().all())
    assert "lam_max" not in VariationalBound(Linear(TOP, BOTTOM), four_hundred).losses(score(), images(), Draws(0, 0, range(6)))


def test_lean_ends_have_the_same_mean():
    """Over all rotations of the batch the quarter that counts is every example in turn."""
    batch, encoder = images(8), LearnedEncoder(Stand(), bounded=False)
    full = VariationalBound(Linear(TOP, BOTTOM), four_hundred, encoder=encoder)
    lean = VariationalBound(Linear(TOP, BOTTOM), four_hundred, encoder=encoder, lean=True)
    draws = Draws(0, 0, range(8))
    wanted = full.terms(score(Encoded(VP)), batch, draws)["prior"].mean()
    found = [lean.terms(score(Encoded(VP)), batch._replace(x0=batch.x0.roll(i, 0)), draws)["prior"].mean() for i in range(8)]
    within(1e-12, abs(float(torch.stack(found).mean() - wanted)), "mean prior")
    assert bool((lean.eval().terms(score(Encoded(VP)), batch, draws)["prior"] > 0).all())
    assert len(lean.train()(score(Encoded(VP)), images(0), Draws(0, 0, range(0), 1))) == 0


def test_samples_never_see_the_encoder():
    p = Ancestral()(score(Encoded(VP)), torch.randn(2, 4, 4, 3, dtype=torch.float64), -1.0, 0.5).p
    assert p.mean.shape == (2, 4, 4, 3)
    last = Ancestral()(score(Encoded(VP)), torch.ones(1, 4, 4, 3, dtype=torch.float64), 13.3, math.inf).p
    within(1e-15, (last.mean - 1 / VP.scales(13.3)[0]).abs().max(), "the last kernel rescales the state")


@pytest.mark.parametrize("learned", [False, True])
def test_the_shape_learns_to_vary_less_while_the_ends_learn_the_bound(learned):
    """The gradient of the shape is that of the mean square of the loss, that of ends and network of the mean loss."""
    torch.manual_seed(0)
    schedule = Monotone(TOP, BOTTOM, hidden=8, learned=learned).double()
    with torch.no_grad():
        for p in (schedule.w2, schedule.b2, schedule.w3):
            p.normal_()
    draws, denoiser = Draws(0, 0, range(6)), score()
    VariationalBound(schedule, four_hundred, shape_by="variance").terms(denoiser, images(), draws)[
        "diffusion"
    ].mean().backward()
    found = {name: p.grad.clone() for name, p in schedule.named_parameters() if p.grad is not None}
    schedule.zero_grad()
    loss = VariationalBound(schedule, four_hundred).terms(denoiser, images(), draws)["diffusion"]
    inner = [p for name, p in schedule.named_parameters() if not name.startswith("line") and p.requires_grad]
    squares = torch.autograd.grad(loss.square().mean(), inner, retain_graph=True)
    names = [name for name, p in schedule.named_parameters() if not name.startswith("line") and p.requires_grad]
    for name, wanted in zip(names, squares, strict=True):
        within(1e-9, ((found[name] - wanted).abs().max() / (1 + wanted.abs().max())), name)
    if learned:
        (wanted,) = torch.autograd.grad(loss.mean(), [schedule.line.ends])
        within(1e-9, (found["line.ends"] - wanted).abs().max() / wanted.abs().max(), "ends")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 1, 7])
@pytest.mark.parametrize("steps", [None, 10])
def test_any_batch(dtype, n, steps):
    bound = VariationalBound(Linear(TOP, BOTTOM), four_hundred, steps=steps, encoder=LearnedEncoder(Stand()))
    loss = bound(score(Encoded(VP)), images(n, dtype), Draws(0, 0, range(n), max(1, n)))
    assert loss.shape == (n,)
    assert loss.dtype == dtype
    assert bool(loss.isfinite().all())


def test_widened_kernels_belong_to_their_steps():
    schedule = Linear(TOP, BOTTOM)
    levels = schedule(torch.linspace(1, 0, 5, dtype=torch.float64)).tolist()
    wide = Widened(Ancestral(), schedule, torch.tensor([0.0, 1.0, 2.0, 3.0]))  # from data to noise
    x = torch.zeros(1, 1, dtype=torch.float64)
    for lam_t, lam_s, factor in zip(levels, levels[1:], (4.0, 3.0, 2.0, 1.0), strict=False):
        plain = Ancestral()(Optimal(1), x, lam_t, lam_s).p.var
        within(1e-12, abs(float(wide(Optimal(1), x, lam_t, lam_s).p.var / plain) - factor), "factor")
    with refuses("not learned", "4 steps"):
        wide(Optimal(1), x, -2.0, 1.0)


def test_the_best_widening_is_read_off_a_bound():
    """Measured on Gaussian data: 10 steps then cost what continuous time does, and no other widening less."""
    data = GaussianData(torch.zeros(1, dtype=torch.float64), torch.tensor([S2], dtype=torch.float64), VP)
    grid, x0 = Linear(TOP, BOTTOM)(torch.linspace(1, 0, 11, dtype=torch.float64)), data.sample(Noise(0, range(4000)))
    inner = Ancestral(spread=False)
    equal = elbo(data, x0, Plain(0.1), grid, draws=Draws(0, 0, range(4000)), transition=inner)
    wide = Widened.of(inner, equal)
    levels = grid.flip(0)
    best = torch.expm1(levels[:-1] - levels[1:]) / (torch.exp(-levels[1:]) / S2 + 1)
    within(0.1, ((torch.tensor(wide.excess) - best) / best).abs().max(), "relative error of the excess")
    cost = {}
    for factor in (0.5, 1.0, 2.0):
        scaled = Widened(inner, grid, factor * torch.tensor(wide.excess, dtype=torch.float64))
        bound = elbo(data, x0, Plain(0.1), grid, draws=Draws(0, 0, range(4000)), transition=scaled)
        cost[factor] = float(bound.diffusion.sum(1).mean())
    assert cost[1.0] < min(cost[0.5], cost[2.0]) < float(equal.diffusion.sum(1).mean())
    mutual = 0.5 * math.log((1 / S2 + math.exp(TOP)) / (1 / S2 + math.exp(BOTTOM)))
    within(0.12, abs(cost[1.0] - mutual), "10 steps, widened, against continuous time")  # standard error 0.03
    noise = Widened(inner, [math.inf * -1, 0.0, 2.0], torch.tensor([0.5, 1.0]))
    x = torch.zeros(1, 1, dtype=torch.float64)
    within(
        1e-12, abs(float(noise(data, x, -math.inf, 0.0).p.var / inner(data, x, -math.inf, 0.0).p.var) - 2), "from pure noise"
    )


def test_widened_refuses_what_it_has_no_number_for():
    with refuses("`excess`", "2 steps", "got 3"):
        Widened(Ancestral(), [0.0, 1.0, 2.0], torch.zeros(3))
    for bad in (-0.1, math.nan, math.inf):
        with refuses("`excess`", "negative"):
            Widened(Ancestral(), [0.0, 1.0], torch.tensor([bad]))
    with refuses("`bound`", "steps"):
        Widened.of(Ancestral(), Bound(*torch.zeros(3, 2).split(1), dims=1))


class Reports(Denoiser):
    """The exact denoiser of Gaussian data, with a variance in proportion to the exact one, as a network would learn it."""

    def __init__(self, factor: float, basis=None):
        super().__init__()
        self.process, self.factor, self.basis = VP, nn.Parameter(torch.tensor(factor, dtype=torch.float64)), basis

    def forward(self, x: Tensor, lam, **cond) -> Gaussian:
        lam = torch.as_tensor(lam, dtype=torch.float64)
        var = spread_over(1 / (1 / S2 + lam.exp()), x)
        return Gaussian(
            var * spread_over(torch.sigmoid(lam).sqrt() / torch.sigmoid(-lam), x) * x, self.factor * var, self.basis
        )


@pytest.mark.parametrize("basis", [None, DCT(2)], ids=["pixels", "cosines"])
def test_a_learned_reverse_variance_costs_what_its_kernels_do(basis):
    """The training loss is the bound of `elbo` with the same kernels, and the exact variance is where its slope vanishes."""
    steps, n = 8, 800
    x0 = math.sqrt(S2) * Noise(0, range(n)).normal(torch.zeros(n, 1, 2, 2, dtype=torch.float64), 0)
    bound = VariationalBound(Linear(TOP, BOTTOM), four_hundred, steps=steps, reverse_variance="learned")
    for factor in (1.0, 2.0):
        denoiser = Reports(factor, basis)
        loss = torch.stack([
            bound.terms(denoiser, Batch(x0, torch.arange(n), {}), At(k, i, n))["diffusion"]
            for i, k in enumerate([(k + 0.5) / steps for k in range(steps)])
        ]).mean(0)  # fmt: skip
        (slope,) = torch.autograd.grad(loss.mean(), [denoiser.factor])
        grid = Linear(TOP, BOTTOM)(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
        with torch.no_grad():
            wanted = elbo(denoiser, x0, Plain(0.1), grid, draws=Draws(0, 0, range(n))).diffusion.sum(1)
        loss = loss.detach()
        within(4 * float((loss - wanted).std()) / math.sqrt(n), abs(float((loss - wanted).mean())), f"loss, factor {factor}")
        if factor == 1.0:
            within(0.1, abs(float(slope)), "slope at the exact variance")
            mutual = 2 * math.log((1 / S2 + math.exp(TOP)) / (1 / S2 + math.exp(BOTTOM)))
            within(0.2, abs(float(loss.mean()) - mutual), "tight for any number of steps")
        else:
            assert float(slope) > 1.0


class At(Draws):
    """All examples at one time, with fresh noise."""

    def __init__(self, u: float, step: int, n: int):
        super().__init__(1, step, range(n))
        self.u = u

    def stratified(self, tag: str = "u") -> Tensor:
        return torch.full((len(self),), self.u, dtype=torch.float64)


def test_a_learned_range_is_trained_as_it_samples():
    """The loss of a network with twice the channels is that of the kernels of `Ancestral(range=True)`."""
    torch.manual_seed(0)
    net = nn.Conv2d(1, 2, 3, padding=1).double()

    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t):
            return self.net(x)

    denoiser = Preconditioned(Takes(), VP, "v", lambda lam: -lam, learned_range=True)
    x0 = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    bound = VariationalBound(Linear(TOP, BOTTOM), four_hundred, steps=5, reverse_variance="learned")
    found = bound.terms(denoiser, Batch(x0, torch.arange(3), {}), At(0.5, 0, 3))["diffusion"] / 5
    lam_t, lam_s = Linear(TOP, BOTTOM)(torch.tensor([0.6, 0.4], dtype=torch.float64)).tolist()
    alpha, sigma = VP.scales(lam_t)
    x_t = alpha * x0 + sigma * At(0.5, 0, 3).normal(x0, "eps")
    p = Ancestral(range=True)(denoiser, x_t, lam_t, lam_s).p
    within(1e-10, ((found - VP.bridge(x0, x_t, lam_t, lam_s).kl(p)) / found).abs().max(), "relative difference")
    found.sum().backward()
    assert bool((net.weight.grad[1] != 0).any()), "the variance is trained"
    with refuses("`reverse_variance`", "learned_range"):
        bound.terms(Optimal(1), Batch(x0, torch.arange(3), {}), Draws(0, 0, range(3)))


def test_the_running_excess_approaches_the_best():
    bound = VariationalBound(Linear(TOP, BOTTOM), flat_normal(1), steps=4, reverse_variance="optimal", momentum=0.01)
    generator = torch.Generator().manual_seed(0)
    for step in range(600):
        x = math.sqrt(S2) * torch.randn(64, 1, dtype=torch.float64, generator=generator)
        bound.terms(Optimal(1), Batch(x, torch.arange(64), {}), Draws(0, step, range(64)))
    levels = Linear(TOP, BOTTOM)(torch.linspace(0, 1, 5, dtype=torch.float64))
    best = torch.expm1(levels[:-1] - levels[1:]) / (torch.exp(-levels[1:]) / S2 + 1)
    assert bound.excess is not None
    within(0.1, ((bound.excess - best) / best).abs().max(), "relative error of the running estimate")


@pytest.mark.parametrize(
    "arguments, pieces",
    [
        ({"steps": 0}, ["`steps`", "0"]),
        ({"schedule": LogNormal()}, ["`schedule`", "finite"]),
        ({"shape_by": "flat"}, ["`shape_by`", "'flat'"]),
        ({"shape_by": "variance"}, ["Monotone"]),
        ({"reverse_variance": "optimal"}, ["`reverse_variance`", "`steps`"]),
        ({"reverse_variance": "learned"}, ["`reverse_variance`", "`steps`"]),
        ({"reverse_variance": "learned", "steps": 4, "encoder": Contraction()}, ["'learned'", "'optimal'"]),
        ({"reverse_variance": "wide"}, ["'wide'"]),
        ({"times": "sobol"}, ["`times`", "'sobol'"]),
    ],
)
def test_bad_bounds(arguments, pieces):
    with refuses(*pieces):
        VariationalBound(**{"schedule": Linear(TOP, BOTTOM), "decoder": four_hundred, **arguments})


def test_encoder_and_process_need_each_other():
    for bound, process in [
        (VariationalBound(Linear(TOP, BOTTOM), four_hundred), Encoded(VP)),
        (VariationalBound(Linear(TOP, BOTTOM), four_hundred, encoder=Contraction()), VP),
    ]:
        with refuses("Encoded(...)", "encoder"):
            bound(score(process), images(), Draws(0, 0, range(6)))


# ---- the official code's arrays


class Stand(nn.Module):
    def forward(self, x: Tensor, lam: Tensor) -> Tensor:
        g = spread_over(-lam, x)
        axes = tuple(range(1, x.ndim))
        return (0.6 * torch.tanh(1.3 * x + 0.2 * g) + 0.25 * torch.sin(0.5 * g) * x.mean(axes, keepdim=True)
                + 0.1 * torch.cos(0.3 * g) * torch.roll(x, 1, dims=min(2, x.ndim - 1)))  # fmt: skip


class Score(nn.Module):
    def forward(self, z: Tensor, gamma: Tensor) -> Tensor:
        g = spread_over(gamma, z)
        axes = tuple(range(1, z.ndim))
        return (0.5 * torch.tanh(0.8 * z - 0.1 * g) + 0.2 * torch.cos(0.4 * g) * z.mean(axes, keepdim=True)
                - 0.15 * torch.roll(z, 1, dims=min(2, z.ndim - 1)))  # fmt: skip


MODELS = {
    "vdm_eps": (None, VP, "eps"),
    "vdm_v": (None, VP, "v"),
    "diffenc": (LearnedEncoder(Stand(), bounded=False), Encoded(VP), "v"),
    "diffenc_nt": (Contraction(), Encoded(VP, trained=False), "v"),
}


def flat_official(step, x0: Tensor, z: Tensor, lam) -> Tensor:
    return Flat(VP, Pixels(centred=True))(None, x0, z, lam)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("curve", ["fixed", "train_scalar"])
@pytest.mark.parametrize("name", MODELS)
def test_the_official_losses(name, curve, dtype):
    arrays = golden("diffenc_losses")
    encoder, process, form = MODELS[name]
    schedule = Linear(TOP, BOTTOM) if curve == "fixed" else Linear(12.4, 12.4 - 17.2).double()
    bound = VariationalBound(schedule, flat_official, encoder=encoder)
    batch = Batch(torch.tensor(arrays["x_scaled"]).to(dtype), torch.arange(6), {})
    eps, first = torch.tensor(arrays["eps"]), torch.tensor(arrays["eps0"])
    tolerance = {torch.float64: (1e-10, 1e-10, 1e-10), torch.float32: (1e-5, 5e-5, 1e-5)}[dtype]
    for times, suffix in [("t", ""), ("t_antithetic_t0_0.123", "_antithetic_t0_0.123")]:
        terms = bound.terms(score(process, form), batch, Fixed(torch.tensor(arrays[times]), eps, first))
        wanted = {"prior": "loss_latent", "reconstruction": "loss_recon", "diffusion": f"loss_diff{suffix}"}
        for (term, key), bar in zip(wanted.items(), tolerance, strict=True):
            official = torch.tensor(arrays[f"{name}_{curve}_{key}"])
            within(bar, ((terms[term].double() - official).abs() / (1 + official.abs())).max(), f"{term}{suffix}")


def test_the_official_encodings():
    arrays = golden("diffenc_losses")
    x, lam = torch.tensor(arrays["x_scaled"]), -torch.tensor(arrays["gamma_fixed"])
    for name in ("diffenc", "diffenc_nt"):
        encoder = MODELS[name][0]
        assert encoder is not None
        x_t, rate = encoder.with_rate(x, lam)
        within(1e-14, (x_t - torch.tensor(arrays[f"{name}_x_t"])).abs().max(), "x_t")
        within(1e-14, (rate + torch.tensor(arrays[f"{name}_dx_dgamma"])).abs().max(), "its rate")
