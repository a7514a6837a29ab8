"""The hybrid loss: the mean learns what denoising teaches, the range what the bound teaches, in one call of the network."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from helpers import f64, refuses, within
from quieten.data import Dataset
from quieten.denoiser import Preconditioned
from quieten.encoding.encoded import Encoded, Separated
from quieten.fit import fit
from quieten.likelihoods.bound import VariationalBound
from quieten.likelihoods.hybrid import Hybrid
from quieten.noise import Draws
from quieten.objective import Batch, Denoising, Noised
from quieten.oracle import GaussianData
from quieten.process import FLOW, VE, VP
from quieten.sampling import generate
from quieten.schedule import Cosine, Linear, LogNormal, Rectified, Table
from quieten.solvers.samplers import sampler
from quieten.training.config import build_denoiser, build_objective
from quieten.training.parts import cosine_chain
from quieten.training.source import open_source
from quieten.transition import Ancestral
from toy import toy_data, toy_recipe, toy_run

pytestmark = pytest.mark.usefixtures("one_thread")
SCHEDULE = Cosine(8.0, -8.0)


class Halves(nn.Module):
    """A network with twice the channels whose halves share nothing, and which counts its calls."""

    def __init__(self, channels: int = 2, images: bool = True, dtype: torch.dtype = torch.float64):
        super().__init__()
        make = (lambda: nn.Conv2d(channels, channels, 3, padding=1)) if images else (lambda: nn.Linear(channels, channels))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.mean, self.range = make().to(dtype), make().to(dtype)
        self.calls, self.label = 0, None

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        self.calls, self.label = self.calls + 1, label
        wave = torch.cos(t).reshape(-1, *[1] * (x.ndim - 1))
        return torch.cat([self.mean(x) * wave, torch.tanh(self.range(x) + wave)], 1)


def denoiser_of(process=VP, form: str = "eps", **options) -> Preconditioned:
    return Preconditioned(Halves(**options), process, form, lambda lam: 0.25 * lam, learned_range=True)


def batch_of(n: int = 6, shape: tuple[int, ...] = (2, 3, 3), dtype: torch.dtype = torch.float64, **cond: Tensor) -> Batch:
    x0 = torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return Batch(x0.to(dtype), torch.arange(n), cond)


class At(Draws):
    """Given times, and given noise or fresh."""

    def __init__(self, u: Tensor, eps: Tensor | None = None):
        super().__init__(3, 0, range(len(u)))
        self.u, self.eps = u, eps

    def stratified(self, tag: str = "u") -> Tensor:
        return self.u

    def normal(self, like: Tensor, tag: str = "eps") -> Tensor:
        return super().normal(like, tag) if self.eps is None else self.eps


def gradients(loss: Tensor, net: Halves) -> tuple[list[Tensor], list[Tensor]]:
    """Of the mean's half, and of the range's."""
    own = [*net.mean.parameters()], [*net.range.parameters()]
    found = torch.autograd.grad(loss.sum(), own[0] + own[1], allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for g, p in zip(found, own[0] + own[1], strict=True)]
    return filled[:2], filled[2:]


def nothing(*_) -> Tensor:
    """A decoder that says nothing."""
    return torch.zeros((), dtype=torch.float64)


@pytest.mark.parametrize("form", ["eps", "v", "x0"])
@pytest.mark.parametrize("process", [VP, VE, FLOW], ids=["vp", "ve", "flow"])
@pytest.mark.parametrize("weighting", ["simple", "min-snr"])
def test_each_half_has_its_own_gradient(process, form, weighting):
    """The mean's is that of the plain loss to the last bit, the range's that of the bound, at any weight."""
    steps, weight = 6, 0.7
    denoiser, batch = denoiser_of(process, form), batch_of()
    draws = At(torch.arange(1, 7) / f64(steps))  # the steps of the bound itself
    plain = gradients(Denoising(SCHEDULE, weighting)(denoiser, batch, draws), denoiser.net)
    bound = VariationalBound(SCHEDULE, nothing, steps=steps, reverse_variance="learned")
    bits = bound.terms(denoiser, batch, draws)["diffusion"] / (math.log(2) * 18)
    through = gradients(weight * bits, denoiser.net)
    calls = denoiser.net.calls
    losses = Hybrid(SCHEDULE, weighting, steps=steps, weight=weight).losses(denoiser, batch, draws)
    assert denoiser.net.calls == calls + 1, "one call of the network serves both"
    mean, ranged = gradients(losses["loss"], denoiser.net)
    assert all(torch.equal(a, b) for a, b in zip(mean, plain[0], strict=True))
    assert all(bool((g == 0).all()) for g in plain[1])
    assert all(bool((g != 0).any()) for g in through[0]), "the bound's own gradient goes through the mean, too"
    worst = max(float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in zip(ranged, through[1], strict=True))
    within(1e-12, worst, "gradient of the range from the bound's, relative")
    within(1e-12, ((losses["vlb"] - bits) / bits).abs().max().detach(), "the bound's part, relative")
    torch.testing.assert_close(losses["loss"], losses["simple"] + weight * losses["vlb"])


@pytest.mark.parametrize("u", [0.03, 0.4, 0.87, 0.999])
def test_the_second_part_is_the_divergence_of_the_kernel_that_samples(u):
    """Whatever the time, of the first 1/T too, where the step is shorter: it ends at the schedule's end."""
    steps, denoiser, batch = 12, denoiser_of(), batch_of(3)
    draws = At(torch.full((3,), u, dtype=torch.float64))
    lam_t, lam_s = SCHEDULE(f64(u, max(u - 1 / steps, 0.0))).tolist()
    alpha, sigma = VP.scales(lam_t)
    x_t = alpha * batch.x0 + sigma * draws.normal(batch.x0, "eps")
    p = Ancestral(range=True)(denoiser, x_t, lam_t, lam_s).p
    wanted = steps * VP.bridge(batch.x0, x_t, lam_t, lam_s).kl(p) / (18 * math.log(2))
    found = Hybrid(SCHEDULE, steps=steps).losses(denoiser, batch, draws)["vlb"]
    within(1e-10, ((found - wanted) / wanted).abs().max().detach(), "relative difference")


class Exact(nn.Module):
    """The noise that the exact posterior of N(0, s2) expects, and a range of its own for each step."""

    def __init__(self, s2: float, shares: Tensor):
        super().__init__()
        self.data, self.r = GaussianData(torch.zeros(1, 1, 1), s2, VP), nn.Parameter(2 * shares - 1)

    def forward(self, x: Tensor, lam: Tensor) -> Tensor:
        alpha, sigma = VP.scales_over(lam, x)
        index = (SCHEDULE.inverse(lam) * len(self.r)).round().long() - 1
        return torch.cat([(x - alpha * self.data(x, lam).mean) / sigma, self.r[index].reshape(-1, 1, 1, 1)], 1)


def quadrature(s2: float, steps: int) -> tuple[Batch, At]:
    """Two-point x0 and eps at every step: second moments are exact."""
    k = torch.arange(1, steps + 1).repeat_interleave(4)
    x0 = math.sqrt(s2) * f64(1, 1, -1, -1).repeat(steps).reshape(-1, 1, 1, 1)
    eps = f64(1, -1, 1, -1).repeat(steps).reshape(-1, 1, 1, 1)
    return Batch(x0, torch.arange(len(x0)), {}), At(k.double() / steps, eps)


@pytest.mark.parametrize("s2", [0.05, 0.6, 0.95])
def test_the_learned_variance_of_gaussian_data_is_the_exact_one(s2):
    """The loss is stationary where the kernel has the variance of p(x_s | x_t) in closed form, and training goes there."""
    steps = 8
    levels = SCHEDULE(torch.arange(steps + 1) / f64(steps))
    exact, small, large = [], [], []
    for lam_s, lam_t in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = VP.scales(lam_t), VP.scales(lam_s)
        q = alpha_s**2 * s2 + sigma_s**2  # Var x_s; x_t = a x_s + noise of variance b
        a = alpha_t / alpha_s
        b = sigma_t**2 - a * a * sigma_s**2
        exact.append(1 / (1 / q + a * a / b))
        small.append(1 / (1 / sigma_s**2 + a * a / b))
        large.append(b)
    shares = (f64(*exact) / f64(*small)).log() / (f64(*large) / f64(*small)).log()
    batch, draws = quadrature(s2, steps)
    objective = Hybrid(SCHEDULE, steps=steps, weight=1.0)

    def loss(net: Exact) -> Tensor:
        return objective(Preconditioned(net, VP, "eps", lambda lam: lam, learned_range=True), batch, draws).mean()

    best = Exact(s2, shares)
    (slope,) = torch.autograd.grad(loss(best), [best.r])
    within(1e-12, slope.abs().max(), "slope at the exact variance")
    trained = Exact(s2, torch.full((steps,), 0.5, dtype=torch.float64))
    assert float(loss(trained).detach()) > float(loss(best).detach())
    optimiser = torch.optim.LBFGS(
        [trained.r], max_iter=400, tolerance_grad=1e-12, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(trained)
        value.backward()
        return value

    optimiser.step(closure)
    denoiser = Preconditioned(trained, VP, "eps", lambda lam: lam, learned_range=True)
    with torch.no_grad():
        found = [float(Ancestral(range=True)(denoiser, torch.ones(1, 1, 1, 1, dtype=torch.float64), lam_t, lam_s).p.var)
                 for lam_s, lam_t in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True)]  # fmt: skip
    within(1e-5, ((f64(*found) - f64(*exact)) / f64(*exact)).abs().max(), "variance of the trained kernel, relative")


def test_a_range_that_left_its_ends_is_pulled_back():
    """Below -1 the variance is held at the small one, which is too little for any data: the slope must say so."""
    batch, draws = quadrature(0.6, 8)
    for r in (-1.5, -1.0):
        net = Exact(0.6, torch.full((8,), 0.5 * (r + 1), dtype=torch.float64))
        denoiser = Preconditioned(net, VP, "eps", lambda lam: lam, learned_range=True)
        (slope,) = torch.autograd.grad(Hybrid(SCHEDULE, steps=8)(denoiser, batch, draws).mean(), [net.r])
        assert bool((slope < 0).all()), "descent raises the range"
        assert float(denoiser(batch.x0[:1], 0.0).var) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("images", [True, False], ids=["images", "vectors"])
@pytest.mark.parametrize("n", [0, 1, 4])
def test_losses_do_not_depend_on_the_rest_of_the_batch(n, images, dtype):
    denoiser = denoiser_of(images=images, dtype=dtype)
    batch = batch_of(n, (2, 3, 3) if images else (2,), dtype)
    objective = Hybrid(SCHEDULE, steps=20)
    whole = objective.losses(denoiser, batch, Draws(0, 0, range(n)))
    assert set(whole) == {"loss", "simple", "vlb"}
    for i in range(n):
        one = objective.losses(denoiser, Batch(batch.x0[i : i + 1], torch.tensor([i]), {}), Draws(0, 0, [i], total=n))
        for name, value in one.items():
            torch.testing.assert_close(value, whole[name][i : i + 1])
    for value in whole.values():
        assert (value.shape, value.dtype) == ((n,), dtype)
        assert bool(value.isfinite().all())


def test_conditions_are_dropped_once_for_both():
    n = 200
    denoiser, batch = denoiser_of(), batch_of(n, label=torch.arange(n) % 10)
    draws, drop = Draws(0, 5, range(n)), {"label": (0.3, 10)}
    Hybrid(SCHEDULE, drop=drop)(denoiser, batch, draws)
    told = denoiser.net.label
    Denoising(SCHEDULE, drop=drop)(denoiser, batch, draws)
    assert torch.equal(told, denoiser.net.label)
    assert 30 < int((told == 10).sum()) < 90


def test_a_target_is_the_mean_s_alone():
    """What stands for the example changes the first part, and the second not at all."""

    class Halved:
        def prepare(self, batch, seed, step, taken, device):
            return "shared"

        def __call__(self, noised: Noised, batch: Batch):
            return 0.5 * noised.x0, noised.eps, torch.ones(len(noised.x0), dtype=torch.float64)

    denoiser, batch, draws = denoiser_of(), batch_of(), Draws(0, 0, range(6))
    objective = Hybrid(SCHEDULE, target=Halved(), steps=9, weight=0.5)
    with_target, without = (h.losses(denoiser, batch, draws) for h in (objective, Hybrid(SCHEDULE, steps=9, weight=0.5)))
    assert torch.equal(with_target["vlb"], without["vlb"])
    plain = Denoising(SCHEDULE, target=Halved()).losses(denoiser, batch, draws)
    assert torch.equal(with_target["simple"], plain["loss"])
    torch.testing.assert_close(with_target["plain_loss"], plain["plain_loss"] + 0.5 * with_target["vlb"])
    assert objective.prepare(batch, 0, 0, batch.index, torch.device("cpu")) == "shared"


def test_defaults_are_the_published_ones():
    """1e-3, and steps between the entries of a table."""
    table = cosine_chain(steps_of_chain=50)
    objective = Hybrid(table)
    assert (objective.weight, objective.weighting, objective.steps) == (1e-3, "simple", 49)
    assert Hybrid(Linear()).steps == 1000
    denoiser, batch = denoiser_of(), batch_of(3)
    losses = objective.losses(denoiser, batch, At(f64(7, 20, 49) / 49))
    found, fraction = losses["vlb"], 0
    for i, k in enumerate((7, 20, 49)):
        lam_t, lam_s = float(table.lam[k]), float(table.lam[k - 1])
        alpha, sigma = VP.scales(lam_t)
        x_t = alpha * batch.x0 + sigma * At(f64(0, 0, 0)).normal(batch.x0, "eps")
        p = Ancestral(range=True)(denoiser, x_t[i : i + 1], lam_t, lam_s).p
        kl = VP.bridge(batch.x0[i : i + 1], x_t[i : i + 1], lam_t, lam_s).kl(p)
        fraction = max(fraction, float((found[i] / (49 * kl / (18 * math.log(2))) - 1).abs().detach()))
    within(1e-8, fraction, "the steps of the table, relative")


class Narrow(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x


def test_bad_input_is_refused():
    batch, draws = batch_of(), Draws(0, 0, range(6))
    narrow = Preconditioned(Halves(), VP, "eps")
    split = Separated(Halves(), Encoded(VP, "split"), "v", lambda lam: lam)
    for denoiser in (narrow, split, GaussianData(torch.zeros(2, 3, 3), 1.0, VP)):
        with refuses("`Hybrid`", "`learned_range=True`", "`Denoising`"):
            Hybrid(SCHEDULE)(denoiser, batch, draws)
    with refuses("`net`", "learned_range=True"):
        Hybrid(SCHEDULE)(Preconditioned(Narrow(), VP, "eps", learned_range=True), batch, draws)
    for weight in (-1.0, math.inf, math.nan):
        with refuses("`weight`", str(weight), "1e-3"):
            Hybrid(SCHEDULE, weight=weight)
    with refuses("`steps`", "0"):
        Hybrid(SCHEDULE, steps=0)
    for schedule in (LogNormal(), Rectified(), Table(f64(3.0, 0.0, -math.inf))):
        with refuses("`schedule`", "finite"):
            Hybrid(schedule)
    with refuses("`weighting`", "'snr'"):
        Hybrid(SCHEDULE, "snr")
    with refuses("`drop`", "2.0"):
        Hybrid(SCHEDULE, drop={"label": (2.0, 0)})
    with refuses("`drop`", "'label'", "none"):
        Hybrid(SCHEDULE, drop={"label": (0.1, 0)})(denoiser_of(), batch, draws)


# ---- in recipes

OVERRIDES = ["objective.kind=hybrid", "objective.weighting=simple", "model.form=eps"]


def test_a_recipe_trains_it(tmp_path: Path) -> None:
    """With the options that its section has; what was trained is sampled with the range."""
    run = toy_run(tmp_path / "run", *OVERRIDES, "train.images=32", "hybrid={kind: steps, count: 10, weight: 1e-2}",
                  "sample.transition={kind: ancestral, range: true}")  # fmt: skip
    assert fit(run, data=toy_data()).done
    last = run.metrics()[-1]
    within(1e-5 * last["loss"], abs(last["simple"] + 0.01 * last["vlb"] - last["loss"]), "parts of the logged loss")
    opened = open_source(str(run.path))
    assert opened.denoiser.learned_range  # type: ignore[attr-defined]
    transition, grid = sampler("ancestral", opened.grid(4, "uniform"), range=True)
    x = generate(opened.denoiser, 2, grid=grid, transition=transition, cond={"label": 0})
    assert x.shape == (2, 1, 8, 8)
    assert bool(x.isfinite().all())


def test_a_recipe_builds_the_published_objective() -> None:
    objective = build_objective(toy_recipe(*OVERRIDES, "objective.schedule={kind: cosine-table, steps_of_chain: 40}"))
    assert isinstance(objective, Hybrid)
    assert (objective.weight, objective.steps, objective.weighting) == (1e-3, 39, "simple")
    assert objective.drop == {"label": (0.1, 2)}


def test_sections_that_do_not_belong_together() -> None:
    with refuses("`hybrid`", "objective.kind", "'denoising'"):
        build_objective(toy_recipe("hybrid=steps"))
    with refuses("'hybrid'", "vectors"):
        build_denoiser(toy_recipe(*OVERRIDES, "model.net=mlp", data=Dataset("v", torch.randn(8, 5), None, ())))
    with refuses("`schedule`", "finite"):
        build_objective(toy_recipe(*OVERRIDES, "objective.schedule=lognormal"))
    with refuses("`weight`", "-1"):
        build_objective(toy_recipe(*OVERRIDES, "hybrid={kind: steps, weight: -1}"))
    with refuses("`encoder`", "'hybrid'"):
        build_denoiser(toy_recipe(*OVERRIDES, "encoder=compact"))


def test_the_other_objectives_still_have_one_half() -> None:
    assert not build_denoiser(toy_recipe()).learned_range
    assert build_denoiser(toy_recipe(*OVERRIDES)).learned_range
