"""Objectives: one loss whatever the network predicts, the published weights, and the exact denoiser at the minimum."""

import math

import pytest
import torch
from torch import nn

from conftest import golden
from helpers import f64, gaussian_data, refuses, within
from quieten.denoiser import FORMS, Denoiser, Preconditioned, convert
from quieten.gaussian import Gaussian, spread_over
from quieten.noise import Draws
from quieten.objective import WEIGHTINGS, Batch, Denoising, Update, edm_weighting, min_snr
from quieten.oracle import GaussianData
from quieten.process import FLOW, PROCESSES, VE, VP
from quieten.schedule import Cosine, Linear, LinearBeta, LogNormal, Rectified, Schedule, Table
from quieten.wrap import Clipped

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = [*WEIGHTINGS, "likelihood"]
processes = pytest.mark.parametrize("process", list(PROCESSES.values()), ids=list(PROCESSES))


def batch_of(x0: torch.Tensor, **cond: torch.Tensor) -> Batch:
    return Batch(x0, torch.arange(len(x0)), cond)


class As(nn.Module):
    """A network that says in any form what a denoiser says."""

    def __init__(self, denoiser: Denoiser, form: str):
        super().__init__()
        self.denoiser, self.form = denoiser, form

    def forward(self, x, lam):
        alpha, sigma = (spread_over(s, x) for s in self.denoiser.process.scales(lam))
        return convert(self.denoiser(x, lam).mean, x, "x0", self.form, alpha, sigma)


class Wrong(Denoiser):
    """E[x0 | x_t], spoilt."""

    def __init__(self, inner: Denoiser, spoil):
        super().__init__()
        self.inner, self.spoil, self.process = inner, spoil, inner.process

    def forward(self, x, lam, **cond):
        return Gaussian(self.spoil(self.inner(x, lam, **cond).mean, x))


@pytest.mark.parametrize("weighting", ALL)
@processes
def test_every_parameterisation_has_the_same_loss(process, weighting):
    x0 = torch.randn(16, 2, 3, 2, dtype=torch.float64)
    denoiser = Wrong(gaussian_data("image", process), lambda m, x: torch.tanh(m) + 0.1)
    objective = Denoising(Linear(5.0, -5.0), weighting)
    losses = {"denoiser": objective(denoiser, batch_of(x0), Draws(0, 0, range(16)))}
    for form in FORMS:
        network = Preconditioned(As(denoiser, form), process, form, lambda lam: lam)
        losses[form] = objective(network, batch_of(x0), Draws(0, 0, range(16)))
        assert losses[form].shape == (16,)
    worst = max(((loss - losses["eps"]).abs() / losses["eps"]).max().item() for loss in losses.values())
    within(1e-10, worst, f"{weighting} loss of one parameterisation from another, relative")


def published(weighting: str, process, x0, eps, d, lam, rate) -> torch.Tensor:
    """The loss as the papers write it, for the denoiser output d."""
    alpha, sigma = (spread_over(s, x0) for s in process.scales(lam))
    x_t = alpha * x0 + sigma * eps
    eps_hat = (x_t - alpha * d) / sigma
    snr = spread_over(torch.exp(lam), x0)
    a, s = (spread_over(c, x0) for c in VP.scales(lam))
    error = {
        "simple": (eps - eps_hat) ** 2,  # Ho et al. (2020), eq. 14
        "x0": (x0 - d) ** 2,
        "v": (a * eps - s * x0 - (a * eps_hat - s * d)) ** 2,  # Salimans and Ho (2022), v of the VP process
        "flow": (eps - x0 - (eps_hat - d)) ** 2,  # Liu et al. (2023), velocity of the straight path
        "edm": (1 / snr + 0.25) / (0.25 / snr) * (x0 - d) ** 2,  # Karras et al. (2022), table 1: lambda(sigma / alpha)
        "min-snr": snr.clamp_max(5.0) * (x0 - d) ** 2,  # Hang et al. (2023), eq. 8
        "likelihood": 0.5 * spread_over(rate * torch.exp(lam), x0) * (x0 - d) ** 2,  # Kingma et al. (2021): -SNR'(t) / 2
    }[weighting]
    return error.flatten(1).mean(1)


@pytest.mark.parametrize("schedule", [Linear(6.0, -6.0), Cosine(8.0, -8.0)], ids=["linear", "cosine"])
@pytest.mark.parametrize("weighting", ALL)
@processes
def test_weightings_are_the_published_ones(process, weighting, schedule):
    x0, draws = torch.randn(12, 5, dtype=torch.float64), Draws(1, 2, range(12))
    u = schedule.draw(draws)
    lam, h = schedule(u), 1e-6
    rate = (schedule(u - h) - schedule(u + h)) / (2 * h)
    denoiser = gaussian_data("vector", process)
    eps = draws.normal(x0, "eps")
    alpha, sigma = (spread_over(s, x0) for s in process.scales(lam))
    d = denoiser(alpha * x0 + sigma * eps, lam).mean
    loss = Denoising(schedule, weighting)(denoiser, batch_of(x0), draws)
    torch.testing.assert_close(loss, published(weighting, process, x0, eps, d, lam, rate), rtol=1e-8, atol=1e-10)


class Given(Schedule):
    """Levels from elsewhere."""

    def __init__(self, lam):
        super().__init__()
        self.lam = lam

    def draw(self, draws):
        return torch.full_like(self.lam, 0.5)

    def forward(self, u):
        return self.lam

    def inverse(self, lam):
        raise NotImplementedError


class GivenDraws(Draws):
    """Noise from elsewhere."""

    def __init__(self, eps):
        super().__init__(0, 0, range(len(eps)))
        self.eps = eps

    def normal(self, like, tag="eps"):
        return self.eps


class Says(Denoiser):
    process = VE

    def __init__(self, mean):
        super().__init__()
        self.mean = mean

    def forward(self, x, lam):
        self.x = x
        return Gaussian(self.mean)


@pytest.mark.parametrize("tag", ["edm_dsm", "ve_dsm", "vp_dsm"])
def test_losses_of_the_official_stf_code(tag):
    arrays = {key: torch.tensor(value).double() for key, value in golden("stf_losses").items()}
    y, sigma, x_t, d, want = (arrays[f"{tag}_{key}"] for key in ("y", "sigma", "xt", "D", "loss"))
    denoiser, weighting = Says(d), "edm" if tag == "edm_dsm" else "simple"  # 1 / sigma^2 on x0 is 1 on eps
    eps = (x_t - y) / sigma.reshape(-1, 1, 1, 1)
    loss = Denoising(Given(-2 * torch.log(sigma)), weighting)(denoiser, batch_of(y), GivenDraws(eps))
    torch.testing.assert_close(denoiser.x, x_t)
    want = want.flatten(1).mean(1)
    within(1e-6, ((loss - want).abs() / want).max(), "loss per example, relative")


def test_training_levels_of_the_official_stf_code():
    arrays = {key: torch.tensor(value).double() for key, value in golden("stf_losses").items()}
    levels = {
        "edm": LogNormal(-1.2, 1.2)(torch.special.ndtr(arrays["edm_rnd_normal"])),
        "ve": Linear(-2 * math.log(0.02), -2 * math.log(100.0))(arrays["ve_rnd_uniform"]),
        "vp": LinearBeta(0.1, 20.0, start=1e-5)(1 - arrays["vp_rnd_uniform"]),
    }
    for tag, lam in levels.items():
        sigma = arrays[f"{tag}_dsm_sigma"]
        within(2e-6, ((torch.exp(-0.5 * lam) - sigma).abs() / sigma).max(), f"sigma of {tag}, relative to float32's")


@pytest.mark.parametrize("weighting", ALL)
@processes
def test_the_exact_denoiser_has_the_lowest_loss(process, weighting):
    n = 4096
    data = gaussian_data("vector", process)
    noise = Draws(9, 0, range(n)).noise
    batch = batch_of(data.sample(noise))
    objective, draws = Denoising(Linear(4.0, -4.0), weighting), Draws(0, 0, range(n))
    best = objective(data, batch, draws)
    for spoil in (lambda m, x: 1.2 * m, lambda m, x: m - 0.2, lambda m, x: m + 0.2 * torch.tanh(x)):
        excess = objective(Wrong(data, spoil), batch, draws) - best
        assert excess.mean() > 4 * excess.std() / math.sqrt(n), f"{excess.mean():.2e} +- {excess.std() / math.sqrt(n):.1e}"


@pytest.mark.parametrize("schedule", [Linear(7.0, -6.0), Cosine(7.0, -6.0)], ids=["linear", "cosine"])
@pytest.mark.parametrize("process", [VP, FLOW])
def test_the_likelihood_weighting_is_the_bound(process, schedule):
    n, d, s2 = 1 << 17, 4, 0.6
    data = GaussianData(torch.zeros(d), s2, process)
    batch = batch_of(data.sample(Draws(1, 0, range(n)).noise))
    loss = Denoising(schedule, "likelihood")(data, batch, Draws(0, 0, range(n)))
    exact = 0.5 * math.log((1 / s2 + math.exp(7.0)) / (1 / s2 + math.exp(-6.0)))
    error = loss.std().item() / math.sqrt(n)
    assert error < 0.01 * exact, "too few draws to tell"
    within(4.0, abs(loss.mean().item() - exact) / error, f"bound from {exact:.4f} nats a dimension, in standard errors")


def test_gradients_reach_a_learned_schedule_and_the_network():
    x0 = torch.randn(8, 5, dtype=torch.float64)
    schedule = Linear(5.0, -4.0, learned=True).double()
    network = Preconditioned(nn.Linear(5, 5).double(), VP, "v")
    network.net.forward = lambda x, t: nn.functional.linear(torch.tanh(x), network.net.weight, network.net.bias)
    update = Update(network, Denoising(schedule, "likelihood"))
    assert {name for name, _ in update.named_parameters()} == {
        "denoiser.net.weight",
        "denoiser.net.bias",
        "objective.schedule.ends",
    }

    def loss() -> torch.Tensor:
        return update(batch_of(x0), Draws(0, 3, range(8)))["loss"].sum()

    loss().backward()
    for parameter in update.parameters():
        for i in range(2):
            h = torch.zeros(parameter.numel(), dtype=torch.float64)
            h[i] = 1e-6
            with torch.no_grad():
                parameter += h.reshape(parameter.shape)
                up = loss().item()
                parameter -= 2 * h.reshape(parameter.shape)
                down = loss().item()
                parameter += h.reshape(parameter.shape)
            assert parameter.grad.flatten()[i].item() == pytest.approx((up - down) / 2e-6, rel=1e-5, abs=1e-6)
            assert parameter.grad.flatten()[i] != 0


@pytest.mark.parametrize("weighting", ["simple", "v", "x0", "edm", "min-snr"])
@pytest.mark.parametrize("form", ["v", "x0", "flow", "edm"])
def test_zero_terminal_snr_has_finite_losses(form, weighting):
    x0 = torch.randn(3, 5, dtype=torch.float64)
    network = Preconditioned(As(GaussianData(torch.zeros(5), 0.5, VP), form), VP, form, lambda lam: lam)
    levels = f64(2.0, 0.0, -math.inf), f64(2.0, 0.0, -50.0)
    got, near = (Denoising(Given(lam), weighting)(network, batch_of(x0), Draws(0, 0, range(3))) for lam in levels)
    torch.testing.assert_close(got, near, rtol=1e-8, atol=1e-8)


def test_an_eps_network_has_no_x0_loss_in_pure_noise():
    network = Clipped(Preconditioned(Zero(), VP, "eps"))  # asked for x0
    with refuses("'x0'", "'eps'", "finite log-SNR"):
        Denoising(Given(f64(0.0, -math.inf)))(network, batch_of(torch.zeros(2, 3)), Draws(0, 0, range(2)))


def test_training_on_a_table_with_zero_terminal_snr_never_meets_nan():
    table = Table(torch.cat([torch.linspace(8, -8, 9, dtype=torch.float64), f64(-math.inf)]))
    loss = Denoising(table, "v")(Preconditioned(Zero(), VP, "v"), batch_of(torch.randn(64, 3)), Draws(0, 0, range(64)))
    assert loss.isfinite().all()
    assert (loss > 0).all()


class Zero(nn.Module):
    def forward(self, x, t, label=None):
        self.label = label
        return torch.zeros_like(x)


def test_labels_are_dropped_as_often_as_asked():
    n = 20_000
    net = Zero()
    objective = Denoising(Linear(), drop={"label": (0.3, 10)})
    label = torch.arange(n) % 10

    def kept(draws: Draws, rows: torch.Tensor) -> torch.Tensor:
        objective(Preconditioned(net, VP, "v"), batch_of(torch.zeros(len(rows), 1), label=label[rows]), draws)
        assert ((net.label == 10) | (net.label == label[rows])).all()
        return net.label

    rows = torch.arange(n)
    first = kept(Draws(0, 5, rows), rows)
    share = (first == 10).double().mean().item()
    within(4.5, abs(share - 0.3) / math.sqrt(0.3 * 0.7 / n), f"share dropped, {share:.4f}, in standard errors")
    assert torch.equal(first, kept(Draws(0, 5, rows), rows))
    assert torch.equal(first[7::2], kept(Draws(0, 5, rows[7::2], total=n), rows[7::2]))  # whatever the rank
    again = kept(Draws(0, 6, rows), rows)
    both = ((first == 10) & (again == 10)).double().mean().item()
    within(4.5, abs(both - 0.09) / math.sqrt(0.09 * 0.91 / n), "dropped in both of two steps, in standard errors")
    assert (label < 10).all()


@pytest.mark.parametrize("probability, dropped", [(0.0, 0), (1.0, 8)])
def test_dropping_never_or_always(probability, dropped):
    net, text = Zero(), torch.randn(8, 3, 2)
    objective = Denoising(Linear(), drop={"label": (probability, 0.0)})
    objective(Preconditioned(net, VP, "v"), batch_of(torch.zeros(8, 1), label=text), Draws(0, 0, range(8)))
    assert (net.label == 0).flatten(1).all(1).sum() == dropped


def test_a_target_stands_for_the_example():
    data = gaussian_data("vector", VP)
    x0, draws = torch.randn(6, 5, dtype=torch.float64), Draws(0, 0, range(6))

    def expected(noised, batch):
        """The regression's own answer: no error is left for the exact denoiser."""
        assert torch.equal(noised.x0, batch.x0)
        torch.testing.assert_close(noised.x_t, noised.alpha * noised.x0 + noised.sigma * noised.eps)
        mean = data(noised.x_t, noised.lam).mean
        return mean, (noised.x_t - noised.alpha * mean) / noised.sigma

    for form in ("eps", "x0", "v"):
        network = Preconditioned(As(data, form), VP, form, lambda lam: lam)
        assert Denoising(Linear(), target=expected)(network, batch_of(x0), draws).max() < 1e-20


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("shape", [(4,), (2, 4, 4)])
def test_losses_do_not_depend_on_the_rest_of_the_batch(shape, batch):
    network = Preconditioned(Zero(), VP, "v")
    x0 = torch.randn(batch, *shape)
    whole = Denoising(Rectified())(network, batch_of(x0), Draws(0, 0, range(batch)))
    assert (whole.shape, whole.dtype) == ((batch,), torch.float32)
    for i in range(batch):
        one = Denoising(Rectified())(network, batch_of(x0[i : i + 1]), Draws(0, 0, [i], total=batch))
        torch.testing.assert_close(one, whole[i : i + 1])


def test_weights_by_their_parameters():
    lam = f64(-3, 0, 4)
    torch.testing.assert_close(edm_weighting(1.0)(lam), 1 + torch.exp(-lam))
    torch.testing.assert_close(min_snr(2.0)(lam), torch.exp(lam).clamp_max(2.0) * torch.exp(-lam))
    x0, draws = torch.randn(3, 2, dtype=torch.float64), Draws(0, 0, range(3))
    data = GaussianData(torch.zeros(2), 1.0)
    custom, simple = (Denoising(Linear(), w)(data, batch_of(x0), draws) for w in (lambda lam: 3 + 0 * lam, "simple"))
    torch.testing.assert_close(custom, 3 * simple)


def test_bad_objectives_are_refused():
    with refuses("`weighting`", "'snr'", "simple", "likelihood"):
        Denoising(Linear(), "snr")
    for probability in (-0.1, 1.5):
        with refuses("`drop`", "'label'", str(probability), "[0, 1]"):
            Denoising(Linear(), drop={"label": (probability, 0)})
    x = torch.zeros(3, 1)
    with refuses("`drop`", "'label'", "none"):
        Denoising(Linear(), drop={"label": (0.1, 0)})(Says(x), batch_of(x), Draws(0, 0, range(3)))
    with refuses("`like`", "3 rows", "2 indices"):
        Denoising(Linear())(Says(x), batch_of(x), Draws(0, 0, range(2)))
