"""Sources of reverse covariance: the official kernels, exact forms of rho, bounds and refusals."""

import math

import pytest
import torch
from torch import Tensor

from conftest import golden
from helpers import f64, gaussian_data, refuses, within
from quieten.basis import DCT
from quieten.covariance import Analytic, Fisher, HessianDiagonal, Residual, SecondMoment, Unit, VarianceSource
from quieten.covariances.jacobian import Probed, posterior_covariance
from quieten.denoiser import Denoiser
from quieten.gaussian import POINT, Gaussian
from quieten.oracle import GaussianData, MixtureData
from quieten.process import FLOW, VE, VP
from quieten.sampling import generate
from quieten.schedule import Table
from quieten.transition import Ancestral, Hushed
from quieten.wrap import Clipped, Counted, Extrapolated, WithCovariance

pytestmark = pytest.mark.usefixtures("one_thread")


def official(name: str) -> Table:
    """The official discrete chains of 1,000 steps, entry t at index t - 1."""
    u = torch.arange(1001, dtype=torch.float64) / 1000
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2).square()
    cosine = (1 - f[1:] / f[:-1]).clamp_max(0.999)
    return Table.from_betas(torch.linspace(0.1, 20, 1000, dtype=torch.float64) / 1000 if name == "lin" else cosine)


class FixedNoise(Denoiser):
    """A network whose predicted noise is given, whatever it is asked."""

    process = VP

    def __init__(self, eps: Tensor, var: Tensor = POINT):
        super().__init__()
        self.eps, self.var = eps, var

    def forward(self, x, lam):
        alpha, sigma = VP.scales(lam)
        var = self.var if self.var is POINT else self.var * sigma**2
        return Gaussian((x - sigma * self.eps) / alpha, var)


def level(table: Table, t: int) -> float:
    return math.inf if t == 0 else float(table.lam[t - 1])


@pytest.mark.parametrize("clipped", [True, False], ids=["clip", "noclip"])
@pytest.mark.parametrize("schedule", ["lin", "cos"])
def test_kernels_are_the_official_ones(schedule, clipped):
    g = {key: torch.as_tensor(value) for key, value in golden("ocm_kernels").items()}
    table, x, net = official(schedule), g["xt"], FixedNoise(g["pred_eps"])
    heads = {"eps_hes": HessianDiagonal, "eps_eps2": SecondMoment, "eps_epsc": Residual}
    kernels = {"ddpm": Ancestral(1.0), "ddim0": Ancestral(0.0, keep_eps=True), "ddim05": Ancestral(0.5, keep_eps=True)}
    for step in kernels.values():
        step.clip = 1.0 if clipped else None
    worst, count = 0.0, 0
    for s, t in g["pairs"].tolist():
        lam_s, lam_t = level(table, s), level(table, t)
        sources: dict[str, VarianceSource] = {
            "ddpm_heuristic": Fisher(raw=not clipped), "analytic": Analytic(table.lam, g["ms_eps"][1:], raw=not clipped),
        }  # fmt: skip
        for name, kind in heads.items():
            head = lambda x, eps, lam, out=g[f"pred2_{name}"]: out  # noqa: E731
            sources[name] = kind(head, raw=not clipped)
            sources[f"{name}_avg"] = kind(head, raw=not clipped, average=True)
        prefix = f"{schedule}_{s}_{t}_{'clip' if clipped else 'noclip'}"
        for family, step in kernels.items():
            for name, source in sources.items():
                key = f"{prefix}_{name}_var" if name == "ddpm_heuristic" else f"{prefix}_{family}_{name}_var"
                if key not in g or (name == "ddpm_heuristic" and family != "ddpm"):
                    continue
                p = step(WithCovariance(net, source), x, lam_t, lam_s).p
                mean = g[f"{prefix}_{family}_mean"]
                worst = max(worst, float((p.mean - mean).abs().max() / mean.abs().max()))
                worst = max(worst, float((p.var - g[key]).abs().max() / g[key].abs().max().clamp_min(1e-300)))
                count += 1
        small = Ancestral(1.0, spread=False)(net, x, lam_t, lam_s).p.var
        big = VP.noising(x, lam_s, lam_t).var
        assert abs(float(small) - float(g[f"{prefix}_ddpm_small_var"])) <= 1e-12 * float(big)
        torch.testing.assert_close(big, g[f"{prefix}_ddpm_big_var"], rtol=1e-12, atol=0)
        torch.testing.assert_close(  # a clean step has no Cov0 above it: big is small with Unit
            Ancestral(1.0)(WithCovariance(net, Unit()), x, lam_t, lam_s).p.var, big, rtol=1e-9, atol=1e-300
        )
    within(1e-12, worst, f"{count} kernels, relative to the largest entry")
    assert count >= 4 * 15


@pytest.mark.parametrize("schedule", ["lin", "cos"])
def test_learned_range_is_the_official_one_to_the_data_too(schedule):
    g = {key: torch.as_tensor(value) for key, value in golden("ocm_kernels").items()}
    table, x = official(schedule), g["xt"]
    net = FixedNoise(g["pred_eps"], (g["pred2_eps_iddpm"] + 1) / 2)
    first = float(Ancestral(1.0, spread=False)(net, x, level(table, 2), level(table, 1)).p.var)
    for s, t in g["pairs"].tolist():
        p = Ancestral(1.0, range=first)(net, x, level(table, t), level(table, s)).p
        torch.testing.assert_close(p.var, g[f"{schedule}_{s}_{t}_iddpm_var"], rtol=1e-11, atol=0)


# ---- rho


@pytest.mark.parametrize("process", [VP, VE, FLOW], ids=str)
@pytest.mark.parametrize("lam", [-6.0, 0.0, 5.0])
def test_every_form_of_rho_agrees_on_a_mixture(process, lam):
    data = MixtureData(f64(-1, 0.2, 0.9)[:, None] * f64(1, -0.5, 0.3), 0.05, process=process)
    alpha, sigma = process.scales(lam)
    x = alpha * data.means[torch.arange(6) % 3] + sigma * torch.randn(6, 3, dtype=torch.float64)
    want = data(x, lam).var * math.exp(lam)

    def diagonal(form: str) -> Tensor:
        J = torch.func.vmap(torch.func.jacrev(lambda z: data.predict(z[None], lam, form)[0]))(x)
        return J.diagonal(dim1=1, dim2=2)

    forms = {
        "score": 1 + sigma**2 * diagonal("score"),
        "eps": 1 - sigma * diagonal("eps"),
        "x0": alpha * diagonal("x0"),
        "flow": alpha * (1 - sigma * diagonal("flow")) if process is FLOW else want,
        "v": alpha**2 - alpha * sigma * diagonal("v") if process is VP else want,
    }
    for name, rho in forms.items():
        within(1e-12, (rho - want).abs().max() / want.abs().max(), f"rho from {name}")
    whole = posterior_covariance(data, x, lam)
    torch.testing.assert_close(whole.diagonal(dim1=1, dim2=2), data(x, lam).var, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["vector, full covariance", "image, full covariance"])
def test_probes_find_the_variance_in_any_basis(kind):
    data = gaussian_data(kind, VP)
    x, lam = 2 * torch.randn(3, *data.shape, dtype=torch.float64), 0.5
    rotated = Probed(2, basis=data.basis)  # the basis of the eigenvectors: no off-diagonal, so no noise
    p = WithCovariance(data, rotated)(x, lam)
    torch.testing.assert_close(p.var, data(x, lam).var.expand_as(x), rtol=1e-11, atol=1e-12)
    assert p.basis is data.basis
    torch.testing.assert_close(p.mean, data(x, lam).mean)
    many = WithCovariance(data, Probed(4000))(x, lam).var
    exact = posterior_covariance(data, x, lam)
    off = exact.square().sum(2) - exact.diagonal(dim1=1, dim2=2).square()  # the variance of one probe
    error = (many.flatten(1) - exact.diagonal(dim1=1, dim2=2)).abs() / (off / 4000).sqrt()
    assert error.max() < 4.5


def test_probes_do_not_depend_on_the_batch():
    data = gaussian_data("vector, full covariance", VP)
    model = WithCovariance(data, Probed(3))
    x = torch.randn(4, 5, dtype=torch.float64)
    whole = model(x, 0.5).var
    torch.testing.assert_close(torch.cat([model(row[None], 0.5).var for row in x]), whole)
    assert not torch.allclose(model(x, 0.6).var, whole, rtol=1e-2)
    assert model(x[:0], 0.5).var.shape == (0, 5)
    counted = Counted(data)
    WithCovariance(counted, Probed(50))(x, 0.5)
    assert counted.calls == 1


def test_the_fisher_heuristic_is_right_on_average():
    data = GaussianData(f64(0.3, -0.2), f64(0.1, 2.0), VP)
    for lam in (-3.0, 0.0, 3.0):
        x = data.marginal(lam, torch.empty(20_000, 2, dtype=torch.float64)).sample(torch.randn(20_000, 2, dtype=torch.float64))
        got = WithCovariance(data, Fisher(raw=True))(x, lam).var
        error = (got.mean(0) - data(x[:1], lam).var.expand(2)).abs() / (got.std(0) / len(x) ** 0.5)
        assert error.max() < 5


@pytest.mark.parametrize("lam", [-4.0, 0.3, f64(-4, -4, 0.3)], ids=["noisy", "float", "per example"])
def test_analytic_interpolates_its_table(lam):
    data = GaussianData(torch.zeros(3), 0.25, VP)
    nodes = torch.linspace(-6, 6, 25, dtype=torch.float64)
    alpha, sigma = VP.scales(nodes)
    m = sigma**2 / (alpha**2 * 0.25 + sigma**2)  # E eps^2 of isotropic Gaussian data
    x = torch.randn(3, 3, dtype=torch.float64)
    source = Analytic(nodes.flip(0), m.flip(0))
    got = source(data, x, lam, data(x, lam)).expand(3, 3)
    torch.testing.assert_close(got, data(x, lam).var.expand(3, 3), rtol=1e-2, atol=0)
    node = float(nodes[7])
    torch.testing.assert_close(
        source(data, x, node, data(x, node)).expand(3, 3), data(x, node).var.expand(3, 3), rtol=1e-9, atol=0
    )
    alone = Analytic(f64(0.0), f64(0.5))
    assert alone(data, x, 0.0, data(x, 0.0)).item() == pytest.approx(0.5)


# ---- bounds, composition


def constant(value: float):
    return lambda x, eps, lam: torch.full_like(x, value)


def test_variances_are_bounded_and_what_was_moved_is_counted():
    data = GaussianData(torch.zeros(1, 4, 4), 1.0, VP)
    x = torch.randn(2, 1, 4, 4)
    low, high = HessianDiagonal(constant(-1.5), cap=1.0), HessianDiagonal(constant(0.0), cap=1.0)
    assert (WithCovariance(data, low)(x, 0.0).var == 0).all()
    assert low.clamped == (1.0, 0.0, 32)
    assert (WithCovariance(data, high)(x, -3.0).var == 1).all()  # e^3 without the bound
    assert high.clamped == (0.0, 1.0, 32)
    WithCovariance(data, high)(x, 3.0)
    assert high.clamped == (0.0, 0.5, 64)
    high.clear()
    assert high.clamped.total == 0
    per_channel = HessianDiagonal(constant(0.0), cap=torch.tensor([0.5, 2.0]).reshape(-1, 1, 1))
    x2 = torch.randn(2, 2, 4, 4)
    var = WithCovariance(GaussianData(torch.zeros(2, 4, 4), 1.0, VP), per_channel)(x2, -3.0).var
    assert (var[:, 0] == 0.5).all()
    assert (var[:, 1] == 2.0).all()


def test_bounds_of_cosine_coefficients_are_those_that_pixels_can_reach():
    basis, x = DCT(4), torch.randn(200, 1, 8, 8, dtype=torch.float64)
    bound = basis.largest(1.0, x)
    assert bound.shape == (1, 1, 8, 8)
    signs = torch.randn(5000, 1, 8, 8, dtype=torch.float64).sign()
    assert (basis.forward(signs).square() <= bound + 1e-12).all()
    torch.testing.assert_close(basis.forward(torch.ones_like(x[:1]))[0, 0, 0, 0] ** 2, bound[0, 0, 0, 0])
    source = HessianDiagonal(constant(0.0), cap=1.0, basis=basis)
    p = WithCovariance(GaussianData(torch.zeros(1, 8, 8), 1.0, VP), source)(x[:2], -20.0)
    torch.testing.assert_close(p.var, bound.expand(2, 1, 8, 8))
    assert p.basis is basis
    kept = Ancestral(1.0, clip=1.0)(WithCovariance(GaussianData(torch.zeros(1, 8, 8), 1.0, VP), source), x[:2], -20.0, 1.0)
    assert kept.p.basis is basis  # clip^2 bounds pixels: a coefficient may have more
    assert kept.p.var.max() > VP.coefficients(-20.0, 1.0)[1] ** 2 * 10


def test_the_dct_is_orthonormal_and_concentrates_smooth_pictures():
    basis, x = DCT(4), torch.randn(3, 2, 8, 12, dtype=torch.float64)
    torch.testing.assert_close(basis.inverse(basis.forward(x)), x)
    torch.testing.assert_close(basis.forward(x).square().sum((1, 2, 3)), x.square().sum((1, 2, 3)))
    y = torch.randn_like(x)
    torch.testing.assert_close((basis.forward(x) * y).sum(), (x * basis.inverse(y)).sum())
    ramp = torch.linspace(0, 1, 8, dtype=torch.float64).expand(1, 1, 8, 8)
    c = basis.forward(ramp)
    assert c[0, 0, 1::4].abs().max() < 1e-12  # nothing varies along the columns
    with refuses("4", "multiples"):
        basis.forward(torch.zeros(1, 1, 6, 8))
    with refuses("`block`", "1"):
        DCT(1)


def test_mean_and_variance_come_from_one_pass_and_predictions_from_none_more():
    counted = Counted(gaussian_data("image", VP))
    model = WithCovariance(counted, HessianDiagonal(constant(-0.5)))
    x = torch.randn(2, 2, 3, 2, dtype=torch.float64)
    model(x, 0.0)
    assert counted.calls == 1
    torch.testing.assert_close(model.predict(x, 0.0, "eps"), counted.inner.predict(x, 0.0, "eps"))
    WithCovariance(counted, Fisher())(x, 0.0)
    assert counted.calls == 3


def test_the_variance_of_guidance():
    class Labelled(Denoiser):
        process, shape = VP, (3,)

        def forward(self, x, lam, label):
            return Gaussian(x * 0.1, 0.1 + 0.1 * label[:, None].to(x).expand_as(x))

    x, label = torch.randn(2, 3), torch.tensor([0, 2])
    conditional = Extrapolated(Labelled(), 3.0, null={"label": 1})(x, 0.0, label=label).var
    torch.testing.assert_close(conditional, torch.tensor([[0.1], [0.3]]).expand(2, 3))
    guided = Extrapolated(Labelled(), 3.0, null={"label": 1}, spread="guided")(x, 0.0, label=label).var
    torch.testing.assert_close(guided, torch.tensor([[0.0], [0.5]]).expand(2, 3))  # 0.2 - 0.3 is held at 0
    with refuses("`spread`", "'both'"):
        Extrapolated(Labelled(), 3.0, null={"label": 1}, spread="both")


def test_the_noise_of_the_last_steps_in_grey_levels():
    data = GaussianData(torch.zeros(1, 4, 4), 1.0, VP)
    grid = torch.tensor([-3.0, 0.0, 1.0, 2.0, math.inf])
    x = torch.randn(2, 1, 4, 4)
    bound = (2 * (2 / 255) * math.sqrt(math.pi / 2)) ** 2
    for last, touched in ((0, []), (1, [2]), (2, [1, 2])):
        step = Hushed(Ancestral(), grid, grey=2.0, last=last)
        for i in range(3):
            lam_t, lam_s = grid[i].item(), grid[i + 1].item()
            plain, got = Ancestral()(data, x, lam_t, lam_s).p, step(data, x, lam_t, lam_s).p
            want = plain.var.clamp_max(bound) if i in touched else plain.var
            torch.testing.assert_close(got.var, want)
            assert torch.equal(got.mean, plain.mean)
    expected = (math.sqrt(bound) * torch.randn(100_000, dtype=torch.float64)).abs().mean() * 127.5
    assert abs(float(expected) - 2.0) < 0.02
    for grey, last in ((0.0, 1), (1.0, 9), (1.0, -1)):
        with refuses("`grey`", "`last`"):
            Hushed(Ancestral(), grid, grey, last)


# ---- refusals


def test_pure_noise_needs_a_head_with_unit_link():
    data = GaussianData(torch.zeros(3), 0.3, FLOW)
    x = torch.randn(2, 3)
    for source in (HessianDiagonal(constant(0.0)), Fisher()):
        with refuses("`lam` = -inf", "link='unit'"):
            WithCovariance(data, source)(x, -math.inf)
    p = WithCovariance(data, HessianDiagonal(lambda x, eps, lam: torch.zeros_like(x), link="unit"))(x, -math.inf)
    torch.testing.assert_close(p.var, torch.ones(2, 3))


def test_a_unit_link_is_the_variance_of_standard_data_at_every_level():
    x = torch.randn(2, 3)
    for process in (VP, VE, FLOW):
        data = GaussianData(torch.zeros(3), 1.0, process)
        for kind in (HessianDiagonal, Residual):
            for lam in (-30.0, -3.0, 0.0, 12.0, torch.tensor([-3.0, 2.0])):
                var = WithCovariance(data, kind(constant(0.0), link="unit"))(x, lam).var
                torch.testing.assert_close(var, data(x, lam).var.expand_as(x), rtol=1e-5, atol=0)
    rho = SecondMoment(constant(0.0), link="unit", raw=True).rho(data, x, 0.0, data(x, 0.0))
    torch.testing.assert_close(rho, 1 - data.predict(x, 0.0, "eps").square())


def test_nan_raises_and_bad_arguments_are_refused():
    data, x = GaussianData(torch.zeros(3), 1.0, VP), torch.randn(2, 3)
    with refuses("NaN", "HessianDiagonal"):
        WithCovariance(data, HessianDiagonal(constant(math.nan)))(x, 0.0)
    with refuses("NaN"):
        generate(
            WithCovariance(data, Residual(constant(math.nan))),
            2,
            grid=torch.tensor([-2.0, 0.0, math.inf]),
            transition=Ancestral(),
        )
    with refuses("`link`", "'cubic'"):
        HessianDiagonal(constant(0.0), link="cubic")
    with refuses("`cap`", "-1"):
        Fisher(cap=-1.0)
    with refuses("`probes`", "0"):
        Probed(0)
    with refuses("shape (2, 2)", "(2, 3)"):
        WithCovariance(data, HessianDiagonal(lambda x, eps, lam: x[:, :2]))(x, 0.0)
    with refuses("`lam`", "`m`", "one length"):
        Analytic(f64(1, 2), f64(0.5))
    with refuses("finite"):
        Analytic(f64(1, math.inf), f64(0.5, 0.5))


def test_heads_in_any_dtype_of_state():
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(2, 3, dtype=dtype)
        data = GaussianData(torch.zeros(3), 1.0, VP)
        for source in (
            HessianDiagonal(constant(-0.5), cap=1.0),
            Fisher(cap=1.0),
            Probed(2, cap=1.0),
            Analytic(f64(0.0), f64(0.5), cap=1.0),
        ):
            p = WithCovariance(data, source)(x, torch.tensor([0.0, 1.0]))
            assert p.var.dtype in (dtype, torch.float64)
            assert p.sample(torch.randn_like(x)).dtype == dtype


def test_clipped_denoisers_keep_their_bounded_variance():
    data = GaussianData(torch.zeros(3), 1.0, VP)
    model = Clipped(WithCovariance(data, HessianDiagonal(constant(0.0), cap=1.0)), 1.0)
    assert (model(torch.randn(2, 3), -5.0).var == 1.0).all()


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("process", [VP, VE, FLOW], ids=str)
def test_a_crude_variance_is_none_at_the_data(process, as_tensor):
    data = gaussian_data("vector", process)
    lam = torch.full((4,), math.inf, dtype=torch.float64) if as_tensor else math.inf
    x = torch.randn(4, *data.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(Fisher()(data, x, lam, data(x, lam)), torch.zeros_like(x))


@pytest.mark.parametrize("process", [VP, VE, FLOW], ids=str)
def test_pure_noise_says_nothing_of_the_full_covariance(process):
    data = gaussian_data("vector", process)
    with refuses("`lam` = -inf", "finite"):
        posterior_covariance(data, torch.zeros(2, *data.shape, dtype=torch.float64), -math.inf)
