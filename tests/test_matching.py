"""Training heads: the official loss, unbiased targets by enumeration, variances of the targets, the cost of a step."""

import itertools
import math

import pytest
import torch
from torch import nn

from conftest import golden
from helpers import f64, gaussian_data, refuses, within
from quieten.basis import DCT
from quieten.covariance import HessianDiagonal, Residual, SecondMoment
from quieten.covariances.heads import make_head
from quieten.covariances.jacobian import product
from quieten.covariances.matching import CovarianceMatching
from quieten.denoiser import Denoiser, Preconditioned
from quieten.gaussian import Gaussian
from quieten.nets import UNet
from quieten.networks.mlp import MLP
from quieten.noise import Draws, Noise
from quieten.objective import Batch, Noised
from quieten.oracle import GaussianData
from quieten.process import VP
from quieten.schedule import Linear, Table
from quieten.wrap import Counted, WithCovariance

pytestmark = pytest.mark.usefixtures("one_thread")
LEVELS = Linear(6.0, -6.0)


class Fixed:
    """Draws whose probes are given."""

    def __init__(self, v):
        self.v = v

    def normal(self, like, tag):
        return self.v


def chain() -> Table:
    """The official linear schedule of 1,000 steps."""
    betas = torch.linspace(0.1, 20, 1000, dtype=torch.float64) / 1000
    return Table.from_betas(betas)


class Official(nn.Module):
    """eps = a tanh(W x + b n / 1000), whose Jacobian is not symmetric."""

    def __init__(self, g, dtype):
        super().__init__()
        self.W, self.b, self.a = (torch.as_tensor(g[f"net_{k}"]).to(dtype) for k in "Wba")

    def hidden(self, x, n):
        return torch.tanh(x.flatten(1) @ self.W.T + self.b * (n[:, None] / 1000))

    def forward(self, x, t):
        return (self.a * self.hidden(x, t + 1)).reshape(x.shape)


class OfficialHead(nn.Module):
    def __init__(self, g, net, table, dtype):
        super().__init__()
        self.net, self.table = net, table
        self.w, self.h = (nn.Parameter(torch.as_tensor(g[f"head_{k}"]).to(dtype)) for k in "wb")

    def forward(self, x, eps, lam):
        return (self.w * self.net.hidden(x, self.table.index(lam).to(x) + 1) + self.h).reshape(x.shape)


@pytest.mark.parametrize("dtype", ["f64", "f32"])
@pytest.mark.parametrize(
    "key, kind, mode",
    [
        ("eps_hes", HessianDiagonal, "ocm"),
        ("eps_eps2", SecondMoment, "sn"),
        ("eps_epsc", Residual, "moment"),
        ("npr_err", Residual, "npr"),
    ],
)
def test_the_loss_and_its_gradient_are_the_official_ones(key, kind, mode, dtype):
    g, table = golden("ocm_objective"), chain()
    float_type = torch.float64 if dtype == "f64" else torch.float32
    net = Official(g, float_type)
    denoiser = Preconditioned(net, VP, "eps", table)
    head = OfficialHead(g, net, table, float_type)
    lam = table.lam[torch.as_tensor(g[f"n_{dtype}"]).long() - 1]
    x0, eps, v = (torch.as_tensor(g[k]).to(float_type) for k in ("x0", f"eps_{dtype}", f"v_{dtype}"))
    alpha, sigma = VP.scales_over(lam, x0)
    noised = Noised(x0, eps, alpha * x0 + sigma * eps, lam, alpha, sigma)
    losses = CovarianceMatching(kind(head), table, mode).loss(denoiser, noised, Fixed(v))
    tolerance = 1e-11 if dtype == "f64" else 1e-5
    want = torch.as_tensor(g[f"{key}_{dtype}_ddm"]).double()
    within(tolerance, ((losses.detach() - want) / want).abs().max(), f"loss {key} {dtype}")
    losses.mean().backward()
    for name, parameter in (("hw", head.w), ("hb", head.h)):
        if f"{key}_{dtype}_grad_{name}" in g:
            want = torch.as_tensor(g[f"{key}_{dtype}_grad_{name}"]).double()
            within(tolerance, (parameter.grad - want).abs().max() / want.abs().max(), f"gradient {name} {key} {dtype}")


# ---- targets


class Skewed(Denoiser):
    """A mean whose Jacobian is not symmetric, as learned ones are."""

    process = VP

    def __init__(self, shape, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        d = math.prod(shape)
        self.shape = shape
        self.W, self.U = torch.randn(2, d, d, generator=generator, dtype=torch.float64) / d**0.5

    def mean(self, x):
        return (torch.tanh(x.flatten(1) @ self.W.T) @ self.U.T).reshape(x.shape)

    def forward(self, x, lam):
        return Gaussian(self.mean(x))

    def jacobian(self, x):
        return torch.func.vmap(torch.func.jacrev(lambda z: self.mean(z[None]).flatten()))(x).flatten(2)


def every_probe(shape) -> torch.Tensor:
    d = math.prod(shape)
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=d)), dtype=torch.float64).reshape(-1, *shape)


def test_targets_are_unbiased_and_their_variance_is_the_formula():
    """All 2^8 probes: the mean is the diagonal to rounding, though J is not symmetric; variances are off-diagonal energies."""
    denoiser, shape = Skewed((2, 2, 2)), (2, 2, 2)
    x, v = torch.randn(1, *shape, dtype=torch.float64), every_probe(shape)
    J = denoiser.jacobian(x)[0]
    rows = x.expand(len(v), *shape)
    for how, energy in (("vjp", J.square().sum(0)), ("jvp", J.square().sum(1))):
        *_, u = product(lambda z: (denoiser(z, 0.5), None), rows, v, how)
        target = (v * u).flatten(1)
        within(1e-12, (target.mean(0) - J.diagonal()).abs().max(), f"bias of {how}")
        within(1e-12, (target.var(0, correction=0) - (energy - J.diagonal() ** 2)).abs().max(), f"variance of {how}")


def test_one_sided_differences_are_as_little_biased_as_central_ones():
    denoiser, shape = Skewed((2, 3)), (2, 3)
    x, v = torch.randn(1, *shape, dtype=torch.float64), every_probe(shape)
    exact = denoiser.jacobian(x)[0].diagonal()
    rows, bias = x.expand(len(v), *shape), []
    for h in (0.08, 0.04, 0.02):
        *_, u = product(lambda z: (denoiser(z, 0.5), None), rows, v, "fd", h)
        one = (v * u).flatten(1).mean(0) - exact
        central = (v * (denoiser.mean(rows + h * v) - denoiser.mean(rows - h * v)) / (2 * h)).flatten(1).mean(0) - exact
        within(1e-12, (one - central).abs().max(), f"one-sided minus central, h = {h}")
        bias.append(one.norm())
    assert 3.9 < bias[0] / bias[1] < 4.1
    assert 3.9 < bias[1] / bias[2] < 4.1


@pytest.mark.parametrize("basis", [None, DCT(2)], ids=["pixel", "dct"])
def test_targets_have_the_variances_that_theory_gives_on_gaussian_data(basis):
    """Each with its mean rho, for one x_t: ocm off-diagonal energy, npr 2 rho^2, sn 2 rho^2 + 4 eps^2 rho."""
    data = gaussian_data("image, full covariance", VP) if basis is None else field()
    n, lam = 20_000, torch.tensor(0.4, dtype=torch.float64)
    x = torch.randn(1, *data.shape, dtype=torch.float64)
    coordinates = (lambda z: z) if basis is None else basis.forward
    p = data(x, 0.4)
    if basis is None:
        x0 = p.sample(torch.randn(n, *data.shape, dtype=torch.float64))
    else:
        x0 = Gaussian(p.mean, p.var, data.basis).sample(torch.randn(n, *data.shape, dtype=torch.float64))
    alpha, sigma = VP.scales_over(lam, x)
    noised = Noised(x0, (x - alpha * x0) / sigma, x.expand(n, *data.shape), lam.expand(n), alpha, sigma)
    eye = torch.eye(math.prod(data.shape), dtype=torch.float64).reshape(-1, *data.shape)
    B = coordinates(eye).flatten(1).T  # coefficients from pixels
    whole = B @ torch.diag(p.var.expand_as(x).flatten()) @ B.T if data.basis is None else None
    if whole is None:
        rows = data.basis.forward(eye).flatten(1)
        whole = B @ (rows @ torch.diag(p.var.expand_as(x).flatten()) @ rows.T) @ B.T
    whole = whole * math.exp(0.4)
    rho, eps = whole.diagonal(), coordinates(data.predict(x, 0.4, "eps")).flatten()
    want = {"ocm": whole.square().sum(1) - rho**2, "npr": 2 * rho**2, "sn": 2 * rho**2 + 4 * eps**2 * rho}
    for kind, mode in ((HessianDiagonal, "ocm"), (Residual, "npr"), (SecondMoment, "sn")):
        objective = CovarianceMatching(kind(lambda x, eps, lam: x, basis=basis), LEVELS, mode)
        *_, (target,) = objective._targets(data, noised, Draws(0, 0, range(n)))
        target = target.flatten(1)
        mean = rho + (eps**2 if mode == "sn" else 0)
        assert ((target.mean(0) - mean).abs() < 4.5 * (want[mode] / n).sqrt() + 1e-10).all(), mode
        torch.testing.assert_close(target.var(0), want[mode], rtol=0.12, atol=1e-9)


def field() -> GaussianData:
    i = torch.arange(4, dtype=torch.float64)
    R = 0.8 ** (i[:, None] - i).abs()
    return GaussianData(torch.zeros(1, 4, 4), 0.3 * torch.kron(R, R), VP)


# ---- training


class Affine(nn.Module):
    """A head without taps that any rho of Gaussian data fits: one number for each coordinate, at one level."""

    def __init__(self, shape):
        super().__init__()
        self.o = nn.Parameter(torch.zeros(shape, dtype=torch.float64))

    def forward(self, x, eps, lam):
        return self.o.expand_as(x)


class OneLevel(Linear):
    def forward(self, u):
        return torch.full_like(u, 0.4)


@pytest.mark.parametrize("link", ["linear", "unit"])
@pytest.mark.parametrize("mode", ["ocm", "npr", "mixed"])
def test_heads_learn_the_posterior_variance(mode, link):
    data, lam = GaussianData(f64(0.5, -0.3, 0.0), f64(0.2, 0.5, 2.0), VP), 0.4
    source = (Residual if mode == "npr" else HessianDiagonal)(Affine((3,)), link=link, raw=True)
    objective = CovarianceMatching(source, OneLevel(1, -1), mode, balance=link == "unit")
    optimizer = torch.optim.Adam(source.parameters(), lr=0.05)
    for step in range(120):
        batch = Batch(data.sample(Noise(step, range(512))), torch.arange(512), {})
        objective(data, batch, Draws(1, step, range(512))).mean().backward()
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 120)
        optimizer.step()
        optimizer.zero_grad()
    x = torch.randn(2, 3, dtype=torch.float64)
    # nothing off the diagonal: the target of ocm has no noise, that of npr has
    torch.testing.assert_close(
        WithCovariance(data, source)(x, lam).var, data(x, lam).var.expand_as(x), rtol=0.01 if mode == "ocm" else 0.15, atol=0
    )


def test_the_mixture_trusts_the_less_noisy_target():
    """Independent coordinates: ocm has no noise, npr has; a strongly coupled field: the other way round."""
    for data, better in ((GaussianData(torch.zeros(16), 0.5, VP), 0), (GaussianData(torch.zeros(16), coupled(16), VP), 1)):
        source = HessianDiagonal(Affine((16,)))
        objective = CovarianceMatching(source, OneLevel(1, -1), "mixed")
        with torch.no_grad():
            source.head.o.copy_(data(torch.zeros(1, 16), 0.4).var.mean() * math.exp(0.4) - 1)
        for step in range(20):
            batch = Batch(data.sample(Noise(step, range(64))), torch.arange(64), {})
            objective(data, batch, Draws(0, step, range(64)))
        bins = torch.tensor([30])  # of lam = 0.4
        precision = objective.eval()._precision(bins, [torch.zeros(1), torch.zeros(1)])
        assert precision[better] > 2 * precision[1 - better]


def coupled(n: int) -> torch.Tensor:
    return torch.full((n, n), 2.0, dtype=torch.float64) + 0.01 * torch.eye(n, dtype=torch.float64)


def tiny() -> Preconditioned:
    torch.manual_seed(0)
    net = UNet(1, 8, width=8, detail=4, dropout=0.5)
    nn.init.normal_(net.out.weight, std=0.2)
    return Preconditioned(net, VP, "v", lambda lam: -lam / 8, shape=(1, 8, 8))


def batch_of(n=4, shape=(1, 8, 8)):
    return Batch(torch.randn(n, *shape), torch.arange(n), {})


def test_only_the_head_learns_and_nothing_of_the_network_is_kept():
    denoiser = tiny().eval().requires_grad_(False)
    source = HessianDiagonal(make_head(denoiser, "complex"))
    objective = CovarianceMatching(source, LEVELS)
    loss = objective(denoiser, batch_of(), Draws(0, 0, range(4)))
    assert loss.shape == (4,)
    loss.mean().backward()
    assert all(p.grad is None for p in denoiser.parameters())
    assert source.head.simple.conv.weight.grad.abs().max() > 0
    held = loss.grad_fn
    seen = set()
    while held is not None and held not in seen:  # the graph of the loss ends in the head
        seen.add(held)
        held = next((f for f, _ in held.next_functions if f is not None), None)
    assert not any("Conv" in type(f).__name__ for f in seen) or len(seen) < 60
    assert objective(denoiser, batch_of(0), Draws(0, 0, [])).shape == (0,)


def test_the_cost_of_a_target_in_passes_of_the_network():
    denoiser = tiny().eval().requires_grad_(False)
    counted = Counted(denoiser)
    for derivative, calls in (("vjp", 1), ("fd", 2)):
        for mode, expected in (("ocm", calls), ("npr", 1)):
            source = (HessianDiagonal if mode == "ocm" else Residual)(make_head(denoiser, "simple"))
            counted.calls = 0
            CovarianceMatching(source, LEVELS, mode, derivative=derivative)(counted, batch_of(), Draws(0, 0, range(4)))
            assert counted.calls == expected


def test_derivatives_agree_and_fall_back_where_a_network_has_none():
    torch.manual_seed(0)
    net = MLP(3, width=16)
    nn.init.normal_(net.out.weight, std=0.3)
    denoiser = Preconditioned(net.double(), VP, "eps", lambda lam: -lam / 8, shape=(3,)).eval().requires_grad_(False)
    batch = Batch(torch.randn(8, 3).double(), torch.arange(8), {})
    losses = {}
    for how in ("vjp", "fd", "jvp", "auto"):
        objective = CovarianceMatching(HessianDiagonal(make_head(denoiser, "simple").double()), LEVELS, derivative=how)
        losses[how] = objective(denoiser, batch, Draws(0, 0, range(8)))
    torch.testing.assert_close(losses["fd"], losses["jvp"], rtol=1e-3, atol=1e-4)  # both J v
    assert torch.equal(losses["auto"], losses["vjp"])  # J^T v
    assert not torch.allclose(losses["jvp"], losses["vjp"], rtol=1e-3)
    attention = tiny().eval().requires_grad_(False)
    objective = CovarianceMatching(HessianDiagonal(make_head(attention, "simple")), LEVELS, derivative="jvp")
    with pytest.warns(UserWarning, match=r"'jvp'.*'vjp'"):
        objective(attention, batch_of(), Draws(0, 0, range(4)))
    assert objective.derivative == "vjp"

    class Detached(Skewed):
        def forward(self, x, lam):
            return Gaussian(self.mean(x.detach()))

    frozen = Detached((3,))
    objective = CovarianceMatching(HessianDiagonal(Affine((3,))), LEVELS)
    with pytest.warns(UserWarning, match=r"'auto'.*'fd'"):
        objective(frozen, Batch(torch.randn(2, 3).double(), torch.arange(2), {}), Draws(0, 0, range(2)))
    with pytest.raises(RuntimeError):
        CovarianceMatching(HessianDiagonal(Affine((3,))), LEVELS, derivative="vjp")(
            frozen, Batch(torch.randn(2, 3).double(), torch.arange(2), {}), Draws(0, 0, range(2))
        )


def test_dropout_is_switched_off_and_gradients_of_the_network_are_noticed():
    denoiser = tiny().requires_grad_(False)
    objective = CovarianceMatching(HessianDiagonal(make_head(denoiser, "simple")), LEVELS)
    with pytest.warns(UserWarning, match="dropout"):
        first = objective(denoiser, batch_of(), Draws(0, 0, range(4)))
    assert not denoiser.training
    torch.manual_seed(7)
    batch = batch_of()
    first = objective(denoiser, batch, Draws(0, 0, range(4)))
    assert torch.equal(first, objective(denoiser, batch, Draws(0, 0, range(4))))
    trainable = tiny().eval()
    with pytest.warns(UserWarning, match="requires_grad_"):
        CovarianceMatching(HessianDiagonal(make_head(trainable, "simple")), LEVELS)(trainable, batch, Draws(0, 0, range(4)))


def test_levels_of_a_table_are_its_entries_and_pure_noise_is_left_out():
    table = Table(f64(5.0, 1.0, -3.0, -math.inf))
    seen = []

    class Watching(Denoiser):
        process, shape = VP, (2,)

        def forward(self, x, lam):
            seen.append(lam)
            return Gaussian(x * 0.5)

    CovarianceMatching(Residual(lambda x, eps, lam: x), table)(
        Watching(), Batch(torch.randn(64, 2), torch.arange(64), {}), Draws(0, 0, range(64))
    )
    assert sorted(set(seen[0].tolist())) == [-30.0, -3.0, 1.0, 5.0]
    assert (seen[0] == 5.0).sum() == 16


def test_bad_objectives_are_refused():
    source = HessianDiagonal(lambda x, eps, lam: x)
    with refuses("`mode`", "'fisher'", "ocm"):
        CovarianceMatching(source, LEVELS, "fisher")
    with refuses("`mode` 'npr'", "Residual", "HessianDiagonal"):
        CovarianceMatching(source, LEVELS, "npr")
    with refuses("`derivative`", "'double'"):
        CovarianceMatching(source, LEVELS, derivative="double")
    with refuses("`probes`", "0"):
        CovarianceMatching(source, LEVELS, probes=0)
