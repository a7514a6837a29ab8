"""The loop: what it yields, what it draws, and the same samples whatever the batch."""

import itertools
import math

import pytest
import torch
from torch import nn

from helpers import DATA, affine, covariance, f64, gaussian_data, refuses, within
from quieten.denoiser import Denoiser, Preconditioned
from quieten.gaussian import Gaussian
from quieten.noise import INITIAL, Noise
from quieten.oracle import FiniteData, GaussianData, MixtureData
from quieten.process import FLOW, VE, VP
from quieten.sampling import State, generate, sample, trajectory
from quieten.schedule import Linear, Rectified, churned, corrected, karras
from quieten.transition import Ancestral, Churn, Langevin, Step, Transition
from quieten.wrap import Counted

pytestmark = pytest.mark.usefixtures("one_thread")
INF = math.inf
GRID = karras(6, 0.02, 20.0)


class Conv(nn.Module):
    """A small random network."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = nn.Conv2d(2, 32, 3, padding=1), nn.Conv2d(32, 2, 3, padding=1)

    def forward(self, x, t, label=None):
        h = torch.tanh(self.a(x) + t[:, None, None, None] + (0 if label is None else label[:, None, None, None]))
        return self.b(h)


def silent(step: int, x: torch.Tensor) -> torch.Tensor:
    raise AssertionError(f"noise was drawn at step {step}")


IMAGE = (2, 3, 2)
MODELS = {
    "elementwise Gaussian": (lambda: gaussian_data("image"), 0.0),
    "elementwise Gaussian, full covariance": (lambda: gaussian_data("image, full covariance"), 1e-12),
    "mixture": (lambda: MixtureData(2 * torch.randn(5, *IMAGE), 0.1), 1e-12),
    "finite data": (lambda: FiniteData(torch.randn(50, *IMAGE).double()), 1e-12),
    "network": (lambda: Preconditioned(Conv(), VE, "edm", sigma_data=0.5, shape=IMAGE), 1e-4),
}


SPLITS = [(name, eta) for name in MODELS for eta in (1.0, 0.5)] + [(name, "langevin") for name in list(MODELS)[::4]]


@pytest.mark.parametrize("name, eta", SPLITS)
def test_the_same_seed_gives_the_same_samples_in_batches_of_any_size(name, eta):
    build, bound = MODELS[name]
    model, dtype = build(), torch.float32 if name == "network" else torch.float64
    transition, grid = (Langevin(snr=0.1), corrected(GRID)) if eta == "langevin" else (Ancestral(eta), GRID)
    if eta == "langevin":
        bound = max(bound, 1e-12)  # it takes a norm

    def samples(batch: int) -> torch.Tensor:
        return generate(model, 64, grid=grid, transition=transition, batch=batch, seed=5, dtype=dtype, last="draw")

    whole = samples(64)
    assert len(whole.flatten(1).unique(dim=0)) == 64 or name == "finite data"
    for batch in (1, 7):
        within(bound, (samples(batch) - whole).abs().max(), f"{name}: samples in batches of {batch} from one batch of 64")


def test_samples_depend_on_seed_and_index_alone():
    data = gaussian_data("image")
    whole = generate(data, 10, grid=GRID, seed=1)
    assert torch.equal(generate(data, 4, grid=GRID, seed=1, first=3), whole[3:7])
    assert not torch.isclose(generate(data, 10, grid=GRID, seed=2), whole).any()
    torch.manual_seed(99)
    torch.randn(5)
    assert torch.equal(generate(data, 10, grid=GRID, seed=1), whole)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("process", [VP, VE, FLOW], ids=["vp", "ve", "flow"])
def test_generated_samples_have_the_law_of_the_data(process, eta):
    mean, n = torch.tensor([[1.0, -2.0], [0.0, 0.5]], dtype=torch.float64), 20_000
    data = GaussianData(mean, f64(0.05, 0.3, 0.6, 1.0).reshape(2, 2), process)
    grid = {VP: Rectified().grid(3), FLOW: Rectified().grid(3), VE: karras(3, 0.02, 1e4)}[process]
    x = generate(data, n, grid=grid, transition=Ancestral(eta), batch=n, dtype=torch.float64, last="draw")
    within(4.5, ((x.mean(0) - mean) / (data.var / n).sqrt()).abs().max(), "mean, in standard errors")
    within(4.5, ((x.var(0) / data.var - 1) * math.sqrt(n / 2)).abs().max(), "variance, in standard errors")


def test_a_trajectory_yields_every_state():
    data = gaussian_data("vector")
    x, noise = torch.randn(3, 5, dtype=torch.float64), Noise(0, range(3))
    states = list(trajectory(data, x, GRID, noise=noise))
    assert len(states) == len(GRID) == 7
    assert [state.lam for state in states] == GRID.tolist()
    assert all(isinstance(state, State) and state.x.shape == x.shape for state in states)
    assert states[0].x is x
    assert states[0].step is None
    for i, (before, after) in enumerate(itertools.pairwise(states)):
        p = Ancestral()(data, before.x, before.lam, after.lam).p
        want = p.mean if after.lam == INF else p.sample(noise(i, x))
        assert torch.equal(after.x, want)
        assert torch.equal(after.step.x0.mean, data(before.x, before.lam).mean)
    assert torch.equal(sample(data, x, GRID, noise=noise), states[-1].x)


def test_the_last_state_is_the_mean_or_a_draw():
    data = gaussian_data("vector")
    x, noise = torch.randn(3, 5, dtype=torch.float64), Noise(0, range(3))
    before = list(trajectory(data, x, GRID, noise=noise))[-2]
    posterior = data(before.x, before.lam)
    assert torch.equal(sample(data, x, GRID, noise=noise), posterior.mean)
    torch.testing.assert_close(sample(data, x, GRID, noise=noise, last="draw"), posterior.sample(noise(5, x)))
    ends_in_noise = GRID[:-1]  # there is a kernel to draw from, whatever `last` says
    assert torch.equal(sample(data, x, ends_in_noise, noise=noise), before.x)


def test_point_kernels_draw_nothing():
    data = gaussian_data("vector")
    x = torch.randn(3, 5, dtype=torch.float64)
    ddim = Ancestral(0.0, spread=False)
    torch.testing.assert_close(sample(data, x, GRID, ddim, noise=silent), sample(data, x, GRID, ddim))
    with pytest.raises(AssertionError, match="step 0"):
        sample(data, x, GRID, noise=silent)
    with pytest.raises(AssertionError, match="step 5"):  # the first kernel that is no point is the last, and is drawn
        sample(data, x, GRID, LastDraws(), noise=silent, last="draw")


class LastDraws(Transition):
    def forward(self, denoiser, x_t, lam_t, lam_s, memory=None):
        return Ancestral(0.0, spread=lam_s == INF)(denoiser, x_t, lam_t, lam_s)


def test_noise_comes_from_the_global_generator_unless_given():
    data, x = gaussian_data("vector"), torch.randn(3, 5)
    torch.manual_seed(1)
    first = sample(data, x, GRID)
    torch.manual_seed(1)
    assert torch.equal(sample(data, x, GRID), first)
    assert not torch.equal(sample(data, x, GRID), first)


class Counting(Transition):
    """Remembers how many steps came before, and doubles the state after the draw."""

    def forward(self, denoiser, x_t, lam_t, lam_s, memory=None):
        self.seen = [*getattr(self, "seen", []), memory]
        return Step(Gaussian(x_t + 1), memory=(memory or 0) + 1, then=lambda x: 2 * x)


def test_memory_travels_and_then_is_applied():
    counting = Counting()
    x = torch.zeros(2, 3)
    for _ in range(2):  # a second run starts afresh
        assert sample(gaussian_data("vector"), x, f64(0, 1, 2, INF), counting, noise=silent).unique().tolist() == [14.0]
    assert counting.seen == [None, 1, 2, None, 1, 2]


def test_gradients_flow_through_a_trajectory_but_not_through_sample():
    data, x = gaussian_data("vector"), torch.randn(3, 5, requires_grad=True)
    *_, last = trajectory(data, x, GRID, Ancestral(0.0, spread=False))
    last.x.sum().backward()
    assert x.grad.abs().min() > 0
    assert not sample(data, x, GRID).requires_grad


def test_noising_back_and_forth():
    """A falling grid noises by the forward process: from data to the marginal, with no network."""
    data, n = GaussianData(torch.zeros(2, dtype=torch.float64), 0.5, VP), 20_000
    x0 = data.sample(Noise(0, range(n)))
    x = sample(Counted(data), x0, f64(INF, 3, 0, -1), noise=Noise(1, range(n)))
    alpha, sigma = VP.scales(-1.0)
    within(4.5, abs(x.var() / (0.5 * alpha**2 + sigma**2) - 1) * math.sqrt(n), "variance, in standard errors")
    torch.testing.assert_close((x * x0).mean() / (x0 * x0).mean(), torch.tensor(alpha).double(), rtol=0, atol=0.03)


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("process", [VP, VE, FLOW], ids=["vp", "ve", "flow"])
def test_churning_keeps_the_marginals(process, kind):
    data = gaussian_data(kind, process)
    grid = churned(torch.cat([torch.linspace(-4, 3, 5, dtype=torch.float64), f64(INF)]), 2.0, 0.3, 5.0)
    assert (grid.diff() < 0).any()
    eye = torch.eye(data.mean.numel(), dtype=torch.float64)
    prior = covariance(Gaussian(data.mean[None], data.var[None], data.basis), data.shape)
    alpha, sigma = process.scales(grid[0].item())
    m, c = alpha * data.mean.flatten(), alpha**2 * prior + sigma**2 * eye
    levels, churn = grid.tolist(), Churn(Ancestral())
    for lam_t, lam_s in itertools.pairwise(levels):
        a, shift, v = affine(lambda x, t=lam_t, s=lam_s: churn(data, x, t, s).p, data.shape)
        m, c = a @ m + shift, a @ c @ a.T + v
    torch.testing.assert_close(m, data.mean.flatten(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(c, prior, rtol=1e-12, atol=1e-12)


def test_churn_inflates_its_noise_and_forgets():
    data, x = gaussian_data("vector"), torch.randn(2, 5, dtype=torch.float64)
    plain, loud = Churn(Counting())(data, x, 1.0, 0.5, memory=7), Churn(Counting(), 1.1)(data, x, 1.0, 0.5, memory=7)
    torch.testing.assert_close(plain.p.var, VE.noising(x, 1.0, 0.5).var)
    torch.testing.assert_close(loud.p.var, 1.21 * plain.p.var)
    assert plain.memory is None
    assert Churn(Counting(), 0.0)(data, x, 1.0, 0.5).p.is_point
    assert Churn(Counting())(data, x, 0.5, 1.0, memory=7).memory == 8


def test_langevin_is_algorithm_4_of_song_et_al():
    data, x = gaussian_data("image", VP), torch.randn(3, *IMAGE, dtype=torch.float64)
    p = Langevin(snr=0.2)(data, x, 0.7, 0.7).p
    z, score = torch.randn_like(x), data.score(x, 0.7)
    for i in range(3):
        eps = 2 * (0.2 * math.sqrt(12) / score[i].norm()) ** 2  # with the norm of z at its root mean square
        torch.testing.assert_close(p.sample(z)[i], x[i] + eps * score[i] + (2 * eps) ** 0.5 * z[i])
    torch.testing.assert_close(Langevin()(data, x, 0.7, 1.0).p.mean, Ancestral()(data, x, 0.7, 1.0).p.mean)
    assert Langevin()(GaussianData(torch.zeros(2), 1.0), torch.zeros(1, 2), 0.0, 0.0).p.mean.isfinite().all()


@pytest.mark.parametrize("start", [1.0, 2.0])
def test_langevin_finds_and_keeps_the_marginal(start):
    """A step has size d = 2 snr^2 v on isotropic data: the stationary variance is v / (1 - snr^2), 1 % too large."""
    d, n, lam = 256, 200, -1.0
    data = GaussianData(torch.full((d,), 0.3, dtype=torch.float64), 0.5)
    exact = data.marginal(lam, torch.zeros(1, d, dtype=torch.float64))
    noise = Noise(0, range(n))
    x = exact.mean + math.sqrt(start) * exact.var.sqrt() * noise.normal(torch.empty(n, d), INITIAL)
    x = sample(data, x, torch.full((151,), lam), Langevin(snr=0.1), noise=noise)
    ratio = ((x - exact.mean) ** 2 / exact.var).mean().item()
    within(0.03, abs(ratio - 1), "variance after 150 corrections, relative to the marginal's, less 1")
    within(4.5, abs((x - exact.mean).mean() / (exact.var[0, 0] / (n * d)).sqrt()), "mean, in standard errors")


def test_generate_binds_conditions_row_by_row():
    model, label = Preconditioned(Conv(), VE, "edm", sigma_data=0.5, shape=IMAGE), torch.linspace(-1, 1, 5)
    ddim = Ancestral(0.0, spread=False)
    out = generate(model, 5, grid=GRID, transition=ddim, cond={"label": label}, batch=2)
    torch.testing.assert_close(out[3:4], generate(model.bind(label=label[3:4]), 1, grid=GRID, transition=ddim, first=3))
    shared = generate(model, 3, grid=GRID, transition=ddim, cond={"label": 0.5})
    torch.testing.assert_close(shared, generate(model, 3, grid=GRID, transition=ddim, cond={"label": torch.full((3,), 0.5)}))


def test_generate_evaluates_reports_and_restores():
    model = Preconditioned(Conv(), VE, "edm", sigma_data=0.5)
    modes, done = [], []
    model.net.register_forward_hook(lambda *_: modes.append(model.net.training))
    model.train()
    generate(model, 5, grid=GRID, batch=2, shape=IMAGE, progress=done.append)
    assert done == [2, 4, 5]
    assert not any(modes)
    assert model.training
    with pytest.raises(RuntimeError):
        generate(model, 5, grid=GRID, shape=(3, 3))
    assert model.training


def test_a_wrapper_that_says_it_trains_leaves_what_it_wraps_as_it_is():
    model = Preconditioned(Conv(), VE, "edm", sigma_data=0.5).eval()
    fresh = Counted(model)
    generate(fresh, 2, grid=GRID, shape=IMAGE)
    assert fresh.training
    assert not any(part.training for part in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("kind", ["vector", "image"])
def test_generate_shapes_and_precisions(kind, n, dtype):
    data = gaussian_data(kind)
    out = generate(data, n, grid=GRID, dtype=dtype)
    assert (out.shape, out.dtype) == ((n, *data.shape), dtype)
    assert (sample(data, torch.zeros(n, *data.shape, dtype=dtype), GRID).dtype, out.requires_grad) == (dtype, False)


class Broken(Denoiser):
    process, shape = VE, (3,)

    def forward(self, x, lam):
        return Gaussian(torch.where(torch.arange(len(x))[:, None] == 1, math.nan, x))


def test_bad_samples_are_refused():
    with refuses("2 of 6 samples", "not finite", "more steps"):
        generate(Broken(), 6, grid=GRID, batch=3)


def test_bad_arguments_are_refused():
    data, x = gaussian_data("vector"), torch.randn(2, 5)
    for grid in (f64(1, 0, 2), f64(0, 0, 1), torch.tensor([1.0]), f64(0, math.nan)):
        for call in (lambda grid=grid: sample(data, x, grid), lambda grid=grid: generate(data, 2, grid=grid)):
            with refuses("`grid`", "got"):
                call()
    with refuses("`grid`", "rise strictly", "noise to data"):
        generate(data, 2, grid=GRID.flip(0))  # `trajectory` would noise
    with refuses("`last`", "'median'", "'mean' or 'draw'"):
        sample(data, x, GRID, last="median")
    for dtype in (torch.float16, torch.bfloat16, torch.int64):
        with refuses("`x`", str(dtype), "float32 or float64"):
            sample(data, x.to(dtype), GRID)
        with refuses("`dtype`", str(dtype), "float32 or float64"):
            generate(data, 2, grid=GRID, dtype=dtype)
    for n, batch in ((-1, 64), (3, 0)):
        with refuses("`n`", "`batch`", f"{n}, {batch}"):
            generate(data, n, grid=GRID, batch=batch)
    with refuses("`shape`", "denoiser"):
        generate(Preconditioned(Conv(), VE), 2, grid=GRID)
    with refuses("`label`", "3 rows", "2 samples"):
        generate(data, 2, grid=GRID, cond={"label": torch.zeros(3)})
    with refuses("`x`", "(B, 5)", "(2, 4)"):
        generate(data, 2, grid=GRID, shape=(4,))
    with refuses("`lam` = -inf", "VE", "finite"):
        generate(data, 2, grid=Rectified().grid(3))
    for build, piece in ((lambda: Churn(Ancestral(), -1.0), "`s_noise`"), (lambda: Langevin(snr=0.0), "`snr`")):
        with refuses(piece):
            build()
    with refuses("`eta`", "2.0"):
        Ancestral(2.0)
    assert Linear().grid(3)[0] == -5
