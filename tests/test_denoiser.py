"""Denoisers: parameterisations are one thing seen from several sides, and each published preconditioning is one of them."""

import math

import pytest
import torch
from torch import nn

from conftest import golden
from helpers import f64, gaussian_data, refuses, within
from quieten.denoiser import FORMS, Preconditioned, convert, cosine_table, edm, edm_form, form_coefficients, iddpm, ve, vp
from quieten.gaussian import POINT, spread_over
from quieten.process import FLOW, PROCESSES, VE, VP
from quieten.schedule import Table

pytestmark = pytest.mark.usefixtures("one_thread")
INF = math.inf
NAMES = [*FORMS, "callable"]
CALLABLE = edm_form(1.3)


def form_of(name: str):
    return CALLABLE if name == "callable" else name


class Recorder(nn.Module):
    """Remembers what it was given; returns F(x) = scale tanh(x)."""

    def __init__(self, scale: float = 0.7, channels: int = 1, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.scale, self.channels = nn.Parameter(torch.tensor(scale, dtype=dtype)), channels

    def forward(self, x, t, **cond):
        self.x, self.t, self.cond, self.autocast = x, t, cond, torch.is_autocast_enabled("cpu")
        return torch.cat([self.scale * torch.tanh(x)] * self.channels, 1)


@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("process", list(PROCESSES.values()), ids=list(PROCESSES))
def test_forms_round_trip(process, source):
    x0, eps = torch.randn(2, 9, 2, 3, dtype=torch.float64)
    lam = 4 * torch.rand(9, dtype=torch.float64) - 2
    alpha, sigma = (spread_over(s, x0) for s in process.scales(lam))
    x = alpha * x0 + sigma * eps
    by_float = [float(s[0].squeeze()) for s in (alpha, sigma)]
    true = {name: p * eps + q * x0 for name in NAMES for p, q in [form_coefficients(form_of(name), alpha, sigma)]}
    for target in NAMES:
        forms = form_of(source), form_of(target)
        there = convert(true[source], x, *forms, alpha, sigma)
        back = convert(there, x, *reversed(forms), alpha, sigma)
        within(1e-12, (there - true[target]).abs().max(), f"{target} from {source}")
        within(1e-12, (back - true[source]).abs().max(), "and back")
        torch.testing.assert_close(convert(true[source][:1], x[:1], *forms, *by_float), there[:1], rtol=1e-12, atol=1e-12)


def test_forms_mean_what_they_are_called():
    x0, eps = torch.randn(2, 3, 4, dtype=torch.float64)
    alpha, sigma = VP.scales(0.8)
    x = alpha * x0 + sigma * eps
    known = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "flow": eps - x0, "score": -(x - alpha * x0) / sigma**2}
    for name, value in known.items():
        torch.testing.assert_close(convert(x0, x, "x0", name, alpha, sigma), value, rtol=1e-12, atol=1e-12)
    sigma = 2.3  # EDM, table 1, in VE
    c_skip, c_out = 0.25 / (sigma**2 + 0.25), 0.5 * sigma / math.sqrt(sigma**2 + 0.25)
    x = x0 + sigma * eps
    torch.testing.assert_close(convert(x0, x, "x0", "edm", 1.0, sigma), (x0 - c_skip * x) / c_out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("process", [VP, FLOW])
def test_forms_at_the_ends(process, tensor):
    x0, eps = torch.randn(2, 3, 4, dtype=torch.float64)

    def at(lam: float, source: str, target: str) -> torch.Tensor:
        scales = process.scales(f64(lam)[0] if tensor else lam)
        x = scales[0] * x0 + scales[1] * eps
        values = {"eps": eps, "x0": x0, "v": scales[0] * eps - scales[1] * x0, "flow": eps - x0}
        values["edm"] = convert(x0, x, "x0", "edm", *scales) if lam < 0 else -eps
        return (convert(values[source], x, source, target, *scales) - values[target]).abs().max()

    for source in ("x0", "v", "flow", "edm"):
        for target in ("x0", "v", "flow", "eps"):
            assert at(-INF, source, target) < 1e-15
    for source in ("eps", "v", "flow", "edm"):
        for target in ("x0", "v", "flow", "eps"):
            assert at(INF, source, target) < 1e-15
    for target in ("x0", "v", "flow"):
        with refuses(repr(target), "'eps' prediction", "alpha=", "finite log-SNR"):
            at(-INF, "eps", target)
    for target in ("eps", "v", "flow"):
        with refuses(repr(target), "'x0' prediction", "sigma=", "finite log-SNR"):
            at(INF, "x0", target)
    scales = process.scales(f64(INF)[0] if tensor else INF)
    for source, target in (("x0", "score"), ("eps", "score"), ("score", "x0")):
        with refuses("'score'", "sigma=0", "finite log-SNR"):
            convert(x0, x0, source, target, *scales)


def test_predict_goes_straight_from_the_networks_form():
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    net = Recorder(dtype=torch.float64)
    out = 0.7 * torch.tanh(x)
    torch.testing.assert_close(Preconditioned(net, VP, "eps").predict(x, -INF, "eps"), out, rtol=0, atol=0)
    with refuses("'x0'", "alpha=0"):
        Preconditioned(net, VP, "eps")(x, -INF)
    with refuses("'x0'", "alpha=[0.0, ", "'v'"):
        Preconditioned(net, VP, "eps")(x, f64(-INF, 0, 1))
    torch.testing.assert_close(Preconditioned(net, VP, "v")(x, -INF).mean, -out)
    torch.testing.assert_close(Preconditioned(net, FLOW, "flow")(x, -INF).mean, x - out)
    d = Preconditioned(net, VP, "v")
    alpha, sigma = VP.scales(0.3)
    p = d(x, 0.3)
    assert p.var is POINT
    torch.testing.assert_close(p.mean, alpha * x - sigma * out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(d.predict(x, 0.3, "eps"), (x - alpha * p.mean) / sigma, rtol=1e-12, atol=1e-12)
    with refuses("`form`", "'noise'", "eps, x0, v"):
        Preconditioned(net, VP, "noise")
    with refuses("`form`", "'noise'"):
        d.predict(x, 0.3, "noise")


class Stub(nn.Module):
    """The raw network of the golden arrays."""

    def forward(self, x, c):
        self.x, self.c = x, c
        c = c[:, None, None, None]
        f = torch.tanh(x) * torch.cos(c) + 0.1 * torch.sin(c)
        return torch.cat([f, torch.full_like(f, 7.0)], 1) if self.doubled else f


@pytest.mark.parametrize("name, build, bound", [("edm", edm, 1e-6), ("iddpm", iddpm, 1e-6), ("ve", ve, 2e-5), ("vp", vp, 5e-4)])
def test_preconditionings_of_the_official_edm_code(name, build, bound):
    arrays, net = golden("stf_precond"), Stub()
    net.doubled = name == "iddpm"
    x, sigma = (torch.tensor(arrays[key]).double() for key in ("x", "sigma"))
    d = build(net, learned_range=net.doubled)(x, -2 * torch.log(sigma)).mean

    def relative(got: torch.Tensor, key: str) -> torch.Tensor:
        want = torch.tensor(arrays[key]).double()
        return ((got - want).abs() / want.abs().clamp_min(1e-3)).max()

    within(bound, relative(d, f"{name}_D"), "denoiser output")
    within(1e-6, relative(net.x, f"{name}_cin_x"), "network input")
    if name != "vp":  # official float32: 1.3 % off at sigma = 0.002, which the exact inverse below is not
        within(1e-6, relative(net.c, f"{name}_cnoise"), "network time")
    for i, s in enumerate(sigma.tolist()):  # a float level is the same level
        torch.testing.assert_close(build(net, learned_range=net.doubled)(x[i : i + 1], -2 * math.log(s)).mean, d[i : i + 1])


def test_the_vp_preconditioning_inverts_its_schedule_exactly():
    arrays, net = golden("stf_precond"), Stub()
    net.doubled = False
    t = torch.tensor(arrays["vp_t"]).double()
    sigma = torch.sqrt(torch.expm1(0.5 * 19.9 * t**2 + 0.1 * t))
    vp(net)(torch.zeros(len(t), 1, 1, 1, dtype=torch.float64), -2 * torch.log(sigma))
    torch.testing.assert_close(net.c, 999 * t, rtol=1e-9, atol=0)


@pytest.mark.parametrize("build", [edm, vp, iddpm])
def test_preconditionings_do_not_depend_on_the_process(build):
    x = torch.randn(2, 1, 3, 3, dtype=torch.float64)
    net = Recorder(dtype=torch.float64)
    lam = cosine_table().lam[[300, 800]]
    alpha, _sigma = VP.scales(lam)
    in_ve = build(net, process=VE)(x, lam).mean
    in_vp = build(net, process=VP)(x * spread_over(alpha, x), lam).mean
    torch.testing.assert_close(in_vp, in_ve, rtol=1e-12, atol=1e-12)


def test_a_learned_range_becomes_a_share_of_the_noise_variance():
    class Two(nn.Module):
        def forward(self, x, t):
            return torch.cat([x, torch.full_like(x, 0.5), torch.full_like(x, -2.0)][: self.halves], 1)

    net, x = Two(), torch.randn(2, 3, 2, 2)
    net.halves = 2
    p = Preconditioned(net, VP, "eps", learned_range=True)(x, f64(-1, 2))
    sigma = VP.scales(f64(-1, 2))[1].float().reshape(2, 1, 1, 1)
    torch.testing.assert_close(p.var, (0.75 * sigma**2).expand_as(x))
    for halves, learned in ((1, True), (2, False), (3, True)):
        net.halves = halves
        with refuses("`net`", f"(2, {3 * halves}, 2, 2)", "learned_range=True"):
            Preconditioned(net, VP, "eps", learned_range=learned)(x, 0.0)


def test_the_state_keeps_its_precision_and_the_network_its_own():
    net = Recorder()
    d = Preconditioned(net, VP, "v", sigma_data=0.5)
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(2, 3, dtype=dtype)
        for lam in (0.25, torch.tensor(0.25, dtype=torch.float64), f64(0.25, 0.5), torch.tensor([0.25, 0.5])):
            p = d(x, lam)
            assert p.mean.dtype == dtype
            assert (net.x.dtype, net.t.dtype, net.t.shape) == (torch.float32, torch.float32, (2,))
    half = Recorder(dtype=torch.bfloat16)
    assert Preconditioned(half, VP, "v")(torch.randn(2, 3), 0.1).mean.dtype == torch.float32
    assert half.x.dtype == torch.bfloat16


def test_autocast_surrounds_the_network_alone():
    class Linear(Recorder):
        def forward(self, x, t):
            super().forward(x, t)
            self.out = nn.functional.linear(x, torch.eye(3))
            return self.out

    net, x = Linear(), torch.randn(2, 3)
    alpha, sigma = VP.scales(0.1)
    p = Preconditioned(net, VP, "v", autocast=torch.bfloat16)(x, 0.1)
    assert net.autocast
    assert net.out.dtype == torch.bfloat16
    assert p.mean.dtype == torch.float32
    torch.testing.assert_close(p.mean, alpha * x - sigma * net.out.float(), rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):  # somebody else's does not reach the network
        Preconditioned(net, VP, "v")(x, 0.1)
    assert not net.autocast
    assert net.out.dtype == torch.float32


def test_the_network_sees_its_scaled_input_and_its_time():
    net, x = Recorder(dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    _alpha, sigma = VE.scales(-1.0)
    edm(net, sigma_data=0.5)(x, -1.0)
    torch.testing.assert_close(net.x, x / math.sqrt(sigma**2 + 0.25))
    torch.testing.assert_close(net.t, torch.full((3,), math.log(sigma) / 4, dtype=torch.float64))
    table = Table.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    for embed in (table, table.index):
        d = Preconditioned(net, VP, "eps", embed)
        for lam in (table.lam[37].item(), table.lam[[37, 37, 37]], table.lam[[37, 37, 37]].float()):
            d(x, lam)
            assert net.t.tolist() == [37.0, 37.0, 37.0]


@pytest.mark.parametrize("batch", [0, 1, 4])
@pytest.mark.parametrize("shape", [(5,), (3, 4, 4)])
def test_levels_may_be_shared_or_per_example(shape, batch):
    d = edm(Recorder(dtype=torch.float64), VP)
    x = torch.randn(batch, *shape, dtype=torch.float64)
    by_float = d(x, 0.5).mean
    assert by_float.shape == x.shape
    for lam in (f64(0.5)[0], torch.full((batch,), 0.5, dtype=torch.float64)):
        torch.testing.assert_close(d(x, lam).mean, by_float, rtol=1e-12, atol=1e-12)


def test_binding_fixes_the_conditions():
    net, x = Recorder(), torch.randn(2, 3)
    d = Preconditioned(net, VP, "v", shape=(3,))
    assert d.bind() is d
    label = torch.tensor([1, 2])
    bound = d.bind(label=label)
    assert (bound.process, bound.shape) == (VP, (3,))
    bound(x, 0.1)
    assert net.cond["label"] is label
    torch.testing.assert_close(bound.predict(x, 0.1, "v"), d.predict(x, 0.1, "v", label=label))
    assert sum(p.numel() for p in bound.parameters()) == 1
    with pytest.raises(TypeError, match="label"):  # a condition given twice is a mistake
        bound(x, 0.1, label=label)


def test_bad_states_are_refused():
    d = Preconditioned(Recorder(), VP, "v", shape=(3, 4, 4))
    for dtype in (torch.float16, torch.bfloat16, torch.int64, torch.uint8):
        with refuses("`x`", str(dtype), "autocast="):
            d(torch.zeros(2, 3, 4, 4, dtype=dtype), 0.0)
    with refuses("`x`", "(B, 3, 4, 4)", "(2, 3, 4, 5)"):
        d(torch.zeros(2, 3, 4, 5), 0.0)
    for shape in ((3,), (2, 1), (1,)):
        with refuses("`lam`", "(2,)", f"got {shape}"):
            d(torch.zeros(2, 3, 4, 4), torch.zeros(shape))
    with refuses("`x`", "(B, 5)", "(2, 4)"):
        gaussian_data("vector")(torch.zeros(2, 4), 0.0)
