"""The kernel: exact marginals on Gaussian data, Bayes' rule, limits, and float32 coefficients."""

import itertools
import math

import numpy as np
import pytest
import torch

from conftest import golden
from helpers import DATA, affine, f64, gaussian_data, refuses, within
from quieten.covariance import Unit
from quieten.denoiser import Denoiser
from quieten.gaussian import Gaussian
from quieten.process import FLOW, PROCESSES, VE, VP
from quieten.schedule import Table
from quieten.transition import Ancestral
from quieten.wrap import WithCovariance

pytestmark = pytest.mark.usefixtures("one_thread")
ETAS = [0.0, 0.5, 1.0]
INF = math.inf
processes = pytest.mark.parametrize("process", list(PROCESSES.values()), ids=list(PROCESSES))


class Fixed(Denoiser):
    """Says the same whatever it sees."""

    def __init__(self, process, mean, var=None):
        super().__init__()
        self.process, self.mean, self.var = process, mean, var

    def forward(self, x, lam, **cond):
        return Gaussian(self.mean) if self.var is None else Gaussian(self.mean, self.var)


def levels(steps: int, start: float, end: float) -> list[float]:
    """steps + 1 uneven levels from start to end; the inner ones lie in [-6, 5]."""
    inner = torch.linspace(-6 if start == -INF else start, 5 if end == INF else end, steps + 1, dtype=torch.float64)
    inner = inner + 0.4 * torch.sin(7.0 * inner)
    return [start, *inner[1:-1].tolist(), end]


def marginal_error(data, lams: list[float], eta: float) -> float:
    """Largest relative error of mean and covariance after the steps, from the exact marginal at the start."""
    process, transition = data.process, Ancestral(eta)
    mu, cov = data.mean.flatten(), data_covariance(data)
    eye = torch.eye(len(mu), dtype=torch.float64)
    alpha, sigma = process.scales(lams[0])
    m, c = alpha * mu, alpha**2 * cov + sigma**2 * eye
    for lam_t, lam_s in itertools.pairwise(lams):

        def kernel(x, lam_t=lam_t, lam_s=lam_s):
            return transition(data, x, lam_t, lam_s).p

        a, shift, v = affine(kernel, data.shape)
        m, c = a @ m + shift, a @ c @ a.T + v
    alpha, sigma = process.scales(lams[-1])
    target_m, target_c = alpha * mu, alpha**2 * cov + sigma**2 * eye
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1)).item() for a, b in ((m, target_m), (c, target_c)))


def data_covariance(data) -> torch.Tensor:
    var = torch.diag(data.var.flatten())
    return var if data.basis is None else data.basis.vectors @ var @ data.basis.vectors.T


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("kind", DATA)
@processes
def test_marginals_are_exact_in_any_number_of_steps(process, kind, eta):
    data, worst = gaussian_data(kind, process), 0.0
    for steps in (1, 3, 10):
        for start in (-5.0, -INF) if process is not VE else (-5.0,):
            for end in (4.0, INF):
                worst = max(worst, marginal_error(data, levels(steps, start, end), eta))
    within(1e-12, worst, "error of mean and covariance after 1, 3, 10 steps")


@pytest.mark.parametrize("eta", ETAS)
@processes
def test_float_and_tensor_levels_give_the_same_kernel(process, eta):
    data = gaussian_data("image", process)
    x = torch.randn(4, *data.shape, dtype=torch.float64)
    for lam_t, lam_s in ((-3.0, -1.0), (0.5, 4.0), (1.0, INF)):
        x0 = data(x, lam_t)
        p = process.bridge(x0, x, lam_t, lam_s, eta)
        for t, s in ((f64(lam_t)[0], f64(lam_s)[0]), (torch.full((4,), lam_t).double(), torch.full((4,), lam_s).double())):
            for q in (
                process.bridge(x0, x, t, s, eta),
                process.bridge(x0, x, lam_t, s, eta),
                process.bridge(x0, x, t, lam_s, eta),
            ):
                torch.testing.assert_close(q.mean, p.mean, rtol=1e-13, atol=1e-13)
                torch.testing.assert_close(q.var.expand_as(x), p.var.expand_as(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("eta", ETAS)
@processes
def test_float32_coefficients(process, eta):
    lam_t = torch.linspace(-20, 20, 801)[:, None]
    lam_s = lam_t + torch.logspace(-3, math.log10(30), 101)
    narrow, wide = process.coefficients(lam_t, lam_s, eta), process.coefficients(lam_t.double(), lam_s.double(), eta)
    for name, a, b in zip(["k", "b", "w", "alpha_s"], narrow, wide, strict=True):
        assert a.dtype == torch.float32
        error = torch.where(b == 0, a.double().abs(), (a.double() - b).abs() / b.abs()).max().item()
        within(1e-6, error, f"{name} in float32 from float64, relative")


@pytest.mark.parametrize("eta", ETAS)
@processes
def test_float64_coefficients_are_those_of_the_textbook_in_50_digits(process, eta):
    mp = pytest.importorskip("mpmath")

    def scales(lam):
        a = 1 if process is VE else mp.sqrt(1 / (1 + mp.exp(-lam))) if process is VP else 1 / (1 + mp.exp(-lam / 2))
        return a, a * mp.exp(-lam / 2)

    worst = 0.0
    with mp.workdps(50):
        for lam_t in np.linspace(-20, 20, 9).tolist():
            for h in (1e-3, 0.037, 0.5, 3.1, 30.0):
                lam_s = lam_t + h
                (alpha_t, sigma_t), (alpha_s, sigma_s) = scales(mp.mpf(lam_t)), scales(mp.mpf(lam_s))
                w = eta**2 * sigma_s**2 * (1 - (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2)
                k = mp.sqrt(sigma_s**2 - w) / sigma_t
                for a, b in zip(process.coefficients(lam_t, lam_s, eta), (k, alpha_s - k * alpha_t, w), strict=False):
                    worst = max(worst, float(abs(a - b) / (abs(b) + mp.mpf(10) ** -300)))
    within(1e-14, worst, "k, b and w in float64, relative")


def as_levels(lam: float) -> list[float | torch.Tensor]:
    return [lam, torch.tensor(lam), torch.full((3,), lam, dtype=torch.float64)]


@pytest.mark.parametrize("eta", ETAS)
@processes
def test_the_kernel_at_the_data_is_the_posterior_itself(process, eta):
    for lam_t in (-20.0, 0.3, 20.0):
        for t, s in zip(as_levels(lam_t), as_levels(INF), strict=True):
            k, b, w, alpha_s = (torch.as_tensor(c).unique().tolist() for c in process.coefficients(t, s, eta))
            assert (k, b, w, alpha_s) == ([0.0], [1.0], [0.0], [1.0])


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("process", [VP, FLOW])
def test_the_kernel_from_pure_noise(process, eta):
    for lam_s in (-4.0, 2.0, INF):
        alpha, sigma = process.scales(lam_s)
        expected = (math.sqrt(1 - eta**2) * sigma, alpha, eta**2 * sigma**2, alpha)
        for t, s in zip(as_levels(-INF), as_levels(lam_s), strict=True):
            for got, want in zip(process.coefficients(t, s, eta), expected, strict=True):
                tolerance = 1e-6 if isinstance(t, torch.Tensor) and t.dtype == torch.float32 else 1e-14
                assert float(torch.as_tensor(got, dtype=torch.float64).max()) == pytest.approx(
                    want, rel=tolerance, abs=tolerance
                )


@processes
def test_a_step_of_no_size_changes_nothing(process):
    for eta in ETAS:
        for t, s in zip(as_levels(0.7), as_levels(0.7), strict=True):
            k, b, w, _ = (float(torch.as_tensor(c).max()) for c in process.coefficients(t, s, eta))
            assert (k, b, w) == (1.0, 0.0, 0.0)


@processes
def test_a_known_x0_gives_the_posterior_of_the_forward_process(process):
    x0, x_t = torch.randn(2, 5, 3, dtype=torch.float64)
    lam_t, lam_s = torch.linspace(-4, 3, 5, dtype=torch.float64), torch.linspace(-3, 8, 5, dtype=torch.float64)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ([c[:, None] for c in process.scales(lam)] for lam in (lam_t, lam_s))
    a = alpha_t / alpha_s
    forward = sigma_t**2 - a**2 * sigma_s**2
    precision = 1 / sigma_s**2 + a**2 / forward
    mean = (alpha_s * x0 / sigma_s**2 + a * x_t / forward) / precision
    p = process.bridge(x0, x_t, lam_t, lam_s)
    torch.testing.assert_close(p.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(p.var, 1 / precision, rtol=1e-12, atol=0)


@processes
def test_every_eta_keeps_the_marginals_given_x0(process):
    lam_t = torch.linspace(-20, 20, 41, dtype=torch.float64)[:, None]
    lam_s = lam_t + torch.logspace(-3, 1.5, 30, dtype=torch.float64)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = process.scales(lam_t), process.scales(lam_s)
    for eta in (0.0, 0.3, 0.5, 0.9, 1.0):
        k, b, w, _ = process.coefficients(lam_t, lam_s, eta)
        torch.testing.assert_close(k * alpha_t + b, alpha_s, rtol=1e-13, atol=0)
        torch.testing.assert_close(k**2 * sigma_t**2 + w, sigma_s**2, rtol=1e-13, atol=0)


@pytest.mark.parametrize("kind", DATA)
@processes
def test_two_bridges_compose_into_one(process, kind):
    data = gaussian_data(kind, process)

    def step(lam_t, lam_s):
        return affine(lambda x: process.bridge(data(x, lam_t), x, lam_t, lam_s), data.shape)

    for t, r, s in ((-5.0, -1.3, 3.0), (-2.0, 0.1, INF)):
        (a1, c1, v1), (a2, c2, v2), (a, c, v) = step(t, r), step(r, s), step(t, s)
        for got, want in ((a2 @ a1, a), (a2 @ c1 + c2, c), (a2 @ v1 @ a2.T + v2, v)):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@processes
def test_noising_composes_and_starts_from_the_marginal(process):
    x = torch.randn(3, 4, dtype=torch.float64)
    for s, r, t in ((3.0, 0.2, -4.0), (INF, 2.0, 1.9)):
        p1, p = process.noising(x, s, r), process.noising(x, s, t)
        p2 = process.noising(p1.mean, r, t)
        ratio = process.scales(t)[0] / process.scales(r)[0]
        torch.testing.assert_close(p2.mean, p.mean, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(ratio**2 * p1.var + p2.var, p.var, rtol=1e-13, atol=0)
    data, noised = process.noising(x, INF, -1.0), process.marginal(x, f64(-1.0, -1.0, -1.0))
    torch.testing.assert_close(data.mean, noised.mean)
    torch.testing.assert_close(data.var.expand(3, 1), noised.var)
    uncertain = process.marginal(Gaussian(x, torch.tensor(0.3, dtype=torch.float64)), -1.0)
    alpha, sigma = process.scales(-1.0)
    assert float(uncertain.var) == pytest.approx(0.3 * alpha**2 + sigma**2, rel=1e-14)


def test_noising_and_marginal_on_gaussian_data_agree_with_the_oracle():
    for process in PROCESSES.values():
        data = gaussian_data("image, full covariance", process)
        x = torch.zeros(1, *data.shape, dtype=torch.float64)
        for lam in (-2.0, 1.0, INF):
            p, q = data.marginal(lam, x), process.marginal(Gaussian(data.mean[None], data.var[None], data.basis), lam)
            torch.testing.assert_close(q.mean, p.mean)
            torch.testing.assert_close(q.var, p.var)


def test_unit_variance_makes_ddpms_large_variance():
    x, worst = torch.randn(3, 4, dtype=torch.float64), 0.0
    denoiser = WithCovariance(Fixed(VP, torch.randn(3, 4, dtype=torch.float64)), Unit())
    for t, s in ((-9.0, -8.9), (-1.0, 2.0), (3.0, 9.0)):
        var, large = Ancestral()(denoiser, x, t, s).p.var, VP.noising(x, s, t).var
        worst = max(worst, abs(float(var / large) - 1))
    within(1e-14, worst, "kernel's variance from sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2, relative")


def test_a_learned_range_is_the_geometric_mean_of_the_variances():
    x = torch.randn(3, 4, dtype=torch.float64)
    lam_t, lam_s = -1.0, 2.0
    small, large = VP.bridge(x, x, lam_t, lam_s).var, VP.noising(x, lam_s, lam_t).var
    sigma = VP.scales(lam_t)[1]
    for f in (0.0, 0.3, 1.0):
        fixed = Fixed(VP, torch.zeros_like(x), torch.full_like(x, f * sigma**2))
        for t, s in ((lam_t, lam_s), (f64(lam_t)[0], f64(lam_s)[0])):
            p = Ancestral(range=True)(fixed, x, t, s).p
            torch.testing.assert_close(p.var, (large**f * small ** (1 - f)).expand_as(x), rtol=1e-12, atol=0)
            torch.testing.assert_close(p.mean, VP.bridge(fixed.mean, x, lam_t, lam_s).mean)


@pytest.mark.parametrize("eta", ETAS)
@processes
def test_clipping_keeps_or_reads_again_the_noise(process, eta):
    x, lam_t, lam_s = torch.randn(3, 4, dtype=torch.float64), -0.5, 1.5
    denoiser = Fixed(process, 2 * torch.randn(3, 4, dtype=torch.float64))
    (alpha_t, sigma_t), (alpha_s, sigma_s) = process.scales(lam_t), process.scales(lam_s)
    w = process.coefficients(lam_t, lam_s, eta)[2]
    x0 = denoiser.mean.clamp(-1, 1)
    for keep_eps, source in ((False, x0), (True, denoiser.mean)):
        eps = (x - alpha_t * source) / sigma_t
        step = Ancestral(eta, clip=1.0, keep_eps=keep_eps)(denoiser, x, lam_t, lam_s)
        torch.testing.assert_close(step.p.mean, alpha_s * x0 + (sigma_s**2 - w) ** 0.5 * eps, rtol=1e-12, atol=1e-12)
        assert float(step.p.var) == pytest.approx(w, rel=1e-12)
        torch.testing.assert_close(step.x0.mean, x0)


def test_clipping_bounds_the_variance_of_x0():
    x = torch.zeros(2, 3, dtype=torch.float64)
    wide, bounded = Fixed(VP, x, torch.full_like(x, 9.0)), Fixed(VP, x, torch.full_like(x, 0.25))
    p, q = Ancestral(clip=0.5)(wide, x, -1.0, 2.0).p, Ancestral()(bounded, x, -1.0, 2.0).p
    torch.testing.assert_close(p.var, q.var)


def test_without_spread_the_variance_of_x0_does_not_count():
    data = gaussian_data("vector", VP)
    x = torch.randn(2, 5, dtype=torch.float64)
    assert Ancestral(0.0, spread=False)(data, x, -1.0, 2.0).p.is_point
    assert float(Ancestral(1.0, spread=False)(data, x, -1.0, 2.0).p.var) == VP.coefficients(-1.0, 2.0)[2]


def test_a_step_down_noises_and_an_equal_one_stays_without_the_network():
    x = torch.randn(2, 3, dtype=torch.float64)
    step = Ancestral()(Fixed(VP, x), x, 2.0, -1.0)
    assert step.x0 is None
    torch.testing.assert_close(step.p.var, VP.noising(x, 2.0, -1.0).var)
    step = Ancestral()(Fixed(VP, x), x, 2.0, 2.0)
    assert step.p.is_point
    assert step.p.mean is x


@pytest.mark.parametrize("clip", ["clip", "noclip"])
@pytest.mark.parametrize("schedule", ["lin", "cos"])
def test_kernels_of_the_official_ocm_code(schedule, clip):
    arrays, tables = golden("ocm_kernels"), golden("ocm_schedule")
    name = {"lin": "linear_1000", "cos": "cosine_1000"}[schedule]
    lam = torch.cat([f64(INF), Table.from_betas(tables[f"{name}_betas"][1:]).lam]).tolist()
    x, eps = (torch.tensor(arrays[key]) for key in ("xt", "pred_eps"))
    worst = 0.0

    def check(got: torch.Tensor, key: str) -> None:
        nonlocal worst
        want = torch.as_tensor(arrays[key])
        worst = max(worst, float((got - want).abs().max() / want.abs().max().clamp_min(1e-300)))

    for s, t in arrays["pairs"].tolist():
        alpha, sigma = VP.scales(lam[t])
        x0 = (x - sigma * eps) / alpha
        head = torch.tensor(arrays["pred2_eps_hes"])
        rho = (sigma / alpha) ** 2 * (1 + head)
        rho = rho.clamp(0, 1) if clip == "clip" else rho
        key, bound = f"{schedule}_{s}_{t}_{clip}", 1.0 if clip == "clip" else None
        for method, eta in (("ddpm", 1.0), ("ddim0", 0.0), ("ddim05", 0.5)):  # DDPM reads eps again from the clipped x0
            p = Ancestral(eta, clip=bound, keep_eps=eta < 1)(Fixed(VP, x0, rho), x, lam[t], lam[s]).p
            check(p.mean, f"{key}_{method}_mean")
            check(p.var, f"{key}_{method}_eps_hes_var")
        if s > 0:
            check(VP.bridge(x0, x, lam[t], lam[s]).var, f"{key}_ddpm_small_var")
            check(VP.noising(x, lam[s], lam[t]).var, f"{key}_ddpm_big_var")
    within(1e-12, worst, "from the official kernels, relative to the array's maximum")


@processes
def test_drift_is_the_derivative_of_log_alpha(process):
    lam = torch.linspace(-12, 12, 25, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad((process.scales(lam)[0].log() + 0.0 * lam).sum(), lam)
    torch.testing.assert_close(process.drift(lam.detach()), slope, rtol=1e-12, atol=1e-15)
    for value in (-3.0, 0.0, 5.0):
        assert process.drift(value) == pytest.approx(float(process.drift(f64(value))[0]), rel=1e-14, abs=1e-300)


@processes
def test_scales_have_the_log_snr_they_are_asked_for(process):
    for lam in (-30.0, -1.0, 0.0, 2.0, 30.0):
        alpha, sigma = process.scales(lam)
        assert 2 * math.log(alpha / sigma) == pytest.approx(lam, abs=1e-12)
        assert tuple(float(c) for c in process.scales(f64(lam))) == pytest.approx((alpha, sigma), rel=1e-14)
    alpha, sigma = VP.scales(1.0)
    assert alpha**2 + sigma**2 == pytest.approx(1, abs=1e-15)
    assert sum(FLOW.scales(1.0)) == pytest.approx(1, abs=1e-15)


def test_priors():
    assert VP.prior(-INF).var.item() == VP.prior(torch.tensor(-INF)).var.item() == 1.0
    assert VE.prior(-2 * math.log(80.0)).var.item() == pytest.approx(6400, rel=1e-14)
    assert FLOW.prior(-INF).var.item() == 1.0
    x = VE.prior(-4.0).sample(torch.ones(2, 3, 4, 4))
    assert (x.shape, x.dtype) == ((2, 3, 4, 4), torch.float32)
    with refuses("`lam` = -inf", "VE", "finite"):
        VE.prior(-INF)
    with refuses("`lam`", "(3,)", "single level"):
        VP.prior(torch.zeros(3))


def test_bad_kernels_are_refused():
    x = torch.randn(2, 3)
    for eta in (-0.1, 1.5, math.nan):
        with refuses("`eta`", str(eta), "DDIM"):
            VP.bridge(x, x, 0.0, 1.0, eta)
        with refuses("`eta`", str(eta), "DDIM"):
            Ancestral(eta)
    for t, s in ((0.3, -1.2), (torch.tensor([0.3, 0.3]), torch.tensor([1.0, -1.2]))):
        with refuses("lam_s", "lam_t", "-1.2", "0.3", "noise to data"):
            VP.bridge(x, x, t, s)
        with refuses("lam_s", "lam_t", "-1.2", "0.3"):
            VP.noising(x, s, t)
    assert VP.bridge(x, x, 0.3, -1.2, eta=0.0).is_point  # backwards along the ODE
    with refuses("`lam_t`", "+inf", "finite"):
        VP.bridge(x, x, INF, 1.0, eta=0.0)
    with refuses("`clip`", "-1", "positive"):
        Ancestral(clip=-1.0)
