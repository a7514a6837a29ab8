"""Encoders: one call for value and rate, bounds, fallbacks, and the process they leave behind."""

import math
import warnings

import pytest
import torch
from torch import nn

from helpers import refuses, within
from quieten.denoiser import Preconditioned
from quieten.encoder import Contraction, LearnedEncoder, finite_rate
from quieten.encoding.encoded import Encoded, EncodedFlow, Moving
from quieten.gaussian import Gaussian, scalar, spread_over
from quieten.likelihoods.bound import VariationalBound
from quieten.nets import UNet
from quieten.networks.vdm_nets import EncoderUNet, ScoreUNet
from quieten.noise import Draws
from quieten.objective import Batch
from quieten.process import FLOW, VP
from quieten.schedule import Linear
from quieten.transition import Ancestral
from quieten.tuning.policy import Policy


class Smooth(nn.Module):
    """Smooth in the level, and different for every element."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.weight, self.dropout = nn.Parameter(torch.tensor(0.7, dtype=torch.float64)), nn.Dropout(dropout)

    def forward(self, x, lam):
        level = spread_over(lam, x)
        return self.dropout(torch.sin(self.weight.to(x) * x + 0.3 * level) + 0.1 * level)


def data(n=5, shape=(3, 4, 4), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, *shape, generator=generator, dtype=dtype) * 2 - 1
    return x, torch.linspace(-4, 12, n, dtype=dtype)


OPTIONS = [{}, {"bounded": False}, {"scale": 0.5}, {"by_time": "rising"}, {"by_time": "falling"},
           {"by_time": "early"}, {"max_var": 0.05}, {"max_var": "data"}, {"max_var": 0.05, "min_var": 0.04},
           {"id_at_zero": True}, {"id_at_zero": True, "bounded": False},
           {"id_at_zero": True, "by_time": "rising", "scale": 0.7, "max_var": 0.05}]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 4), (6,)])
def test_the_rate_is_the_derivative_of_the_encoding(options, shape):
    x, lam = data(shape=shape)
    encoder = LearnedEncoder(Smooth(), **options)
    x_t, rate = encoder.with_rate(x, lam)
    within(1e-15, (x_t - encoder(x, lam)).abs().max(), "one encoding")
    _, wanted = finite_rate(lambda level: encoder(x, level), lam, 1e-4)
    within(1e-6, (rate - wanted).abs().max(), "rate against central differences")


def test_the_rate_of_the_contraction():
    x, lam = data()
    x_t, rate = Contraction().with_rate(x, lam)
    _, wanted = finite_rate(lambda level: Contraction()(x, level), lam, 1e-4)
    within(1e-9, (rate - wanted).abs().max(), "rate")
    within(1e-15, (x_t - spread_over(torch.sigmoid(lam), x) * x).abs().max(), "encoding")


def test_the_encoder_starts_and_ends_where_it_should():
    x, lam = data()
    far = torch.full_like(lam, 40.0)
    within(1e-12, (LearnedEncoder(Smooth())(x, far) - x).abs().max(), "clean data at high SNR")
    zero = LearnedEncoder(EncoderUNet(3, 4, 2, width=8, levels=1).double())
    within(1e-15, (zero(x, lam) - Contraction()(x, lam)).abs().max(), "starts as the contraction")
    same = LearnedEncoder(EncoderUNet(3, 4, 2, width=8, levels=1).double(), id_at_zero=True)
    within(1e-15, (same(x, lam) - x).abs().max(), "starts as the identity")
    y = LearnedEncoder(Smooth(), id_at_zero=True).y(x, lam)
    assert float(y.abs().max()) <= 1.0
    assert float(LearnedEncoder(Smooth(), scale=2.0).y(x, lam).abs().max()) <= 2.0


def test_options_act_in_the_released_order():
    """Time, tanh, scale, bounds on the variance, then the data."""
    x, lam = data()
    net, tau = Smooth(), spread_over((13.3 - lam) / 18.3, x)
    for kind, factor in (("rising", tau), ("falling", 1 - tau), ("early", (tau / 2 - tau**2).clamp_min(0))):
        found = LearnedEncoder(net, by_time=kind, scale=0.5).y(x, lam)
        within(1e-15, (found - 0.5 * torch.tanh(factor * net(x, lam))).abs().max(), kind)
    free = LearnedEncoder(net).y(x, lam)
    var, own = (part.flatten(1).var(1, correction=0) for part in (free, x))
    for bound, top in ((0.05, torch.full_like(var, 0.05)), ("data", own)):
        bounded = LearnedEncoder(net, max_var=bound).y(x, lam)
        within(1e-15, (bounded - free * spread_over((top / torch.maximum(var, top)).sqrt(), x)).abs().max(), f"max_var {bound}")
    raised = LearnedEncoder(net, max_var=9.0, min_var=8.0).y(x, lam)
    within(1e-12, (raised.flatten(1).var(1, correction=0) - 8.0).abs().max(), "min_var")
    inside = LearnedEncoder(net, id_at_zero=True, scale=0.5).y(x, lam)
    summed = x + 0.5 * free
    within(1e-15, (inside - summed / spread_over(summed.abs().flatten(1).amax(1).clamp_min(1), x)).abs().max(), "id_at_zero")
    flat = torch.zeros(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    LearnedEncoder(net, max_var="data").y(flat, lam[:2]).sum().backward()
    assert bool(flat.grad.isfinite().all()), "a constant image has no variance to divide by"


def test_one_call_has_one_dropout_mask():
    x, lam = data(200)
    encoder = LearnedEncoder(Smooth(0.5), bounded=False).train()
    torch.manual_seed(0)
    y, rate = encoder.y_with_rate(x, lam)
    dropped = y == 0
    assert 0.4 < dropped.double().mean() < 0.6
    assert bool((rate[dropped] == 0).all())
    assert float((rate[~dropped] == 0).double().mean()) < 0.01
    # and so does the fallback
    torch.manual_seed(0)
    y, rate = finite_rate(lambda level: encoder.y(x, level), lam)
    assert bool((rate[y == 0] == 0).all())
    first, second = encoder(x, lam), encoder(x, lam)
    assert not torch.equal(first, second)


class NoForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Backward(nn.Module):
    def forward(self, x, lam):
        return NoForward.apply(x + spread_over(lam, x))


def test_without_forward_mode_differences_stand_in_and_say_so():
    x, lam = data()
    encoder = LearnedEncoder(Backward(), bounded=False)
    with pytest.warns(UserWarning, match="central differences"):
        _, rate = encoder.y_with_rate(x, lam)
    within(1e-4, (rate - torch.cos(x + spread_over(lam, x))).abs().max(), "rate")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        encoder.y_with_rate(x, lam)  # once is enough


@pytest.mark.parametrize(
    "net",
    [lambda: EncoderUNet(3, 8, 2, width=16, levels=2), lambda: Times(UNet(3, 8, 16, out_channels=3))],
    ids=["published", "compact"],
)
def test_networks_have_a_forward_mode_that_trains(net):
    torch.manual_seed(0)
    module = net()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.02 * torch.randn_like(p))
    encoder = LearnedEncoder(module.eval())
    x, lam = data(2, (3, 8, 8), torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        y, rate = encoder.y_with_rate(x, lam)
    _, near = finite_rate(lambda level: encoder.y(x, level), lam, 2e-3)
    within(0.05 * float(rate.abs().max()) + 1e-3, (near - rate).abs().max(), "rate against differences")
    (y.sum() + rate.square().sum()).backward()
    assert all(p.grad is not None for p in module.parameters())


class Times(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, lam):
        return self.net(x, -0.125 * lam)


def test_a_group_per_channel_would_hide_the_level():
    with pytest.warns(UserWarning, match="fewer groups"):
        LearnedEncoder(nn.Sequential(nn.GroupNorm(4, 4)))


@pytest.mark.parametrize("counterterm", ["sigma2", "none"])
@pytest.mark.parametrize("process", [VP, FLOW])
def test_the_kernel_adds_the_counterterm(counterterm, process):
    x, _ = data()
    z, mean = x + 1, 0.5 * x
    encoded = Encoded(process, counterterm)
    p, plain = encoded.bridge(mean, z, -1.0, 0.5), process.bridge(mean, z, -1.0, 0.5)
    extra = process.scales(0.5)[0] * 1.5 / (1 + math.exp(-1.0)) * mean if counterterm == "sigma2" else 0.0
    within(1e-14, (p.mean - plain.mean - extra).abs().max(), "mean")
    within(1e-15, (p.var - plain.var).abs().max(), "variance")
    tensors = encoded.bridge(mean, z, torch.full((5,), -1.0, dtype=torch.float64), torch.full((5,), 0.5, dtype=torch.float64))
    within(1e-14, (tensors.mean - p.mean).abs().max(), "levels as tensors")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(3, 4, 4), (6,)])
@pytest.mark.parametrize("counterterm", ["sigma2", "none", "split"])
def test_rows_of_any_levels_are_the_kernels_of_each(counterterm, shape, dtype):
    """A level for each row, infinite ones among them: every row is what its own floats give, and has its gradient."""
    inf, x = math.inf, data(6, shape, dtype)[0].requires_grad_()
    lam_t = torch.tensor([-1.0, 2.0, inf, -inf, 3.0, -inf if counterterm == "none" else -4.0], dtype=torch.float64)
    lam_s = torch.tensor([0.5, inf, inf, -inf, 3.0, 1.0], dtype=torch.float64)
    process, z = Encoded(VP, counterterm), x.detach() + 1
    for t, s, n in [(lam_t, lam_s, 6), (lam_t[:3], inf, 3), (-1.0, lam_s[:2], 2)]:
        p = process.bridge(Moving(x[:n], rate=0.3 * x[:n]), z[:n], t, s)
        (slope,) = torch.autograd.grad(p.mean.sum(), x)
        assert bool(slope.isfinite().all())
        for k in range(n):
            a, b = (float(lam[k]) if isinstance(lam, torch.Tensor) else lam for lam in (t, s))
            alone, row = process.bridge(Moving(x[k : k + 1], rate=0.3 * x[k : k + 1]), z[k : k + 1], a, b), p.mean[k]
            within(1e-13 if dtype == torch.float64 else 1e-6, (row - alone.mean[0]).detach().abs().max(), f"mean, {a} to {b}")
            assert torch.allclose(p.var.expand_as(p.mean)[k], alone.var.to(x).expand_as(row), atol=1e-7)


def test_a_policy_of_an_encoded_model_takes_rows_of_different_steps():
    net = Preconditioned(nn.Conv2d(1, 1, 1), Encoded(VP), "v", lambda lam: lam)
    net.net.forward = lambda x, t: torch.tanh(x)
    policy = Policy(net, torch.tensor([-5.0, 0.0, 4.0, math.inf], dtype=torch.float64), shape=(1, 4, 4))
    assert policy.transition.takes_rows
    x, k = data(6, (1, 4, 4))[0], torch.tensor([2, 0, 1, 2, 0, 1])
    p = policy.step(x, k)
    alone = [policy.step(x[i : i + 1], step) for i, step in enumerate(k.tolist())]
    within(1e-13, (p.mean - torch.cat([q.mean for q in alone])).abs().max(), "means")
    assert torch.equal(p.var.flatten(), torch.stack([q.var for q in alone]).flatten())


def test_what_an_encoded_process_refuses():
    x, _ = data()
    for levels in ((-math.inf, 0.0), (-math.inf, math.inf), (torch.tensor([0.0, -math.inf]), torch.tensor([1.0, 1.0]))):
        rows = x if isinstance(levels[0], float) else x[:2]
        with refuses("`lam_t` is -inf", "finite"):
            Encoded(VP).bridge(rows, rows, *levels)
    with refuses("`lam_t` is -inf"):
        Encoded(VP, "none").bridge(x, x, -math.inf, math.inf)
    with refuses("`lam_t` is -inf"):
        EncodedFlow()(Preconditioned(ScoreUNet(3, 8, 1), Encoded(VP, trained=False)), x.float(), -math.inf, 1.0)
    process = Encoded(VP)
    with refuses("`counterterm`", "'half'", "sigma2"):
        Encoded(VP, "half")
    with refuses("`base`"):
        Encoded(process)
    with refuses("`eta`", "Ancestral()"):
        process.bridge(x, x, -1.0, 1.0, eta=0.0)
    with refuses("variances of x0"):
        process.bridge(Gaussian(x, scalar(0.1)), x, -1.0, 1.0)
    with refuses("Moving"):
        Encoded(VP, "split").bridge(x, x, -1.0, 1.0)
    with refuses("encoder", "split"):
        process.check_mean()
    VP.check_mean()
    with refuses("split", "Ancestral()"):
        EncodedFlow()(Preconditioned(ScoreUNet(3, 8, 1), process), x.float(), -1.0, 1.0)
    with refuses("`by_time`"):
        LearnedEncoder(Smooth(), by_time="sideways")
    for bad in (0.0, "x", math.nan):
        with refuses("`max_var`"):
            LearnedEncoder(Smooth(), max_var=bad)
    for bounds in ({"max_var": 0.1, "min_var": 0.2}, {"min_var": 0.2}, {"max_var": "data", "min_var": 0.2}):
        with refuses("`min_var`"):
            LearnedEncoder(Smooth(), **bounds)
    with refuses("shape", "(5, 1, 4, 4)"):
        LearnedEncoder(Narrow())(x, torch.zeros(5, dtype=torch.float64))


class Narrow(nn.Module):
    def forward(self, x, lam):
        return x[:, :1]


def test_published_sizes():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        scores = [count(ScoreUNet(3, width, blocks)) for width, blocks in [(128, 8), (128, 32), (256, 32)]]
        encoders = [count(EncoderUNet(3, 32, blocks)) for blocks in (2, 4, 8)]
    assert scores == [8_905_219, 30_578_179, 122_137_603]
    assert encoders == [1_906_243, 2_744_131, 4_419_907]


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("attend", [False, True])
def test_the_score_network_starts_as_its_input(n, attend):
    net = ScoreUNet(1, width=16, blocks=1, attend=attend, classes=3)
    x, t = torch.randn(n, 1, 6, 6), torch.linspace(-13.3, 5.0, n)
    assert torch.equal(net(x, t, torch.zeros(n, dtype=torch.long)), x)
    wide = ScoreUNet(1, width=16, blocks=1, out_channels=2)(x, t)
    assert torch.equal(wide[:, :1], x)
    assert not wide[:, 1:].any()


def test_the_bound_trains_encoder_and_denoiser_together():
    torch.manual_seed(0)
    encoder = LearnedEncoder(EncoderUNet(1, 8, 2, width=16, levels=2, dropout=0.1))
    denoiser = Preconditioned(ScoreUNet(1, width=16, blocks=1, dropout=0.1), Encoded(VP), "v", lambda lam: -lam)
    bound = VariationalBound(Linear(13.3, -5.0), lambda *_: torch.zeros(16), encoder=encoder)
    optimizer = torch.optim.Adam([*encoder.parameters(), *denoiser.parameters()], lr=4e-3)
    batch = Batch((torch.rand(4, 1, 8, 8) * 2 - 1).repeat(4, 1, 1, 1), torch.arange(16), {})

    def seen() -> float:
        with torch.no_grad():
            return float(bound.eval()(denoiser.eval(), batch, Draws(1, 0, range(16))).mean())

    before = seen()
    bound.train(), denoiser.train()
    for step in range(25):
        loss = bound(denoiser, batch, Draws(0, step, range(16))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert seen() < 0.9 * before  # of noise there is little to learn in 25 steps
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in encoder.parameters())
    p = Ancestral()(denoiser.eval(), torch.randn(2, 1, 8, 8), -1.0, 1.0).p
    assert bool(p.mean.isfinite().all())


@pytest.mark.parametrize("lam", [torch.tensor(1.0, dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64).expand(5)])
def test_one_level_for_all_examples_keeps_forward_mode(lam):
    x, _ = data()
    encoder = LearnedEncoder(Smooth())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, rate = encoder.with_rate(x, lam)
    _, wanted = finite_rate(lambda level: encoder(x, level), lam.expand(len(x)), 1e-4)
    within(1e-6, (rate - wanted).abs().max(), "rate at one level")
