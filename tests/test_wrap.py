"""Wrappers: a denoiser in, a denoiser out, at the cost that is promised."""

import math

import pytest
import torch

from helpers import f64, gaussian_data, refuses
from quieten.covariance import Unit
from quieten.denoiser import Denoiser
from quieten.gaussian import POINT, Gaussian, scalar
from quieten.oracle import GaussianData
from quieten.process import VE, VP
from quieten.sampling import generate
from quieten.schedule import karras
from quieten.solver import Heun
from quieten.transition import Ancestral
from quieten.wrap import Clipped, Counted, Extrapolated, WithCovariance, clip, dynamic

pytestmark = pytest.mark.usefixtures("one_thread")
NULL = 10


class Labelled(Denoiser):
    """E[x0 | x, label] of made-up data: depends on each condition, row by row."""

    process = VP
    shape = (3,)

    def __init__(self, var=POINT):
        super().__init__()
        self.var = var

    def forward(self, x, lam, label=None, text=None):
        level = lam if isinstance(lam, float) else lam.to(x)[:, None]
        mean = torch.tanh(x) * (1.0 + label.to(x)[:, None]) + 0.01 * level
        if text is not None:
            mean = mean + text.sum(1, keepdim=True)
        return Gaussian(mean, self.var(mean) if callable(self.var) else self.var)


def example(n: int = 4):
    return torch.randn(n, 3, dtype=torch.float64), torch.arange(n), torch.full((n,), NULL)


@pytest.mark.parametrize("lam", [0.5, f64(0.5)[0], f64(0.5, 1, 2, 3)], ids=["float", "0-d", "per example"])
def test_classifier_free_guidance_takes_one_pass(lam):
    x, label, nothing = example()
    inner = Counted(Labelled())
    if isinstance(lam, torch.Tensor) and lam.ndim == 0:
        lam = lam.expand(4)
    for scale in (-1.0, 0.0, 0.3, 2.5):
        inner.calls = inner.rows = 0
        got = Extrapolated(inner, scale, null={"label": NULL})(x, lam, label=label).mean
        assert (inner.calls, inner.rows) == (1, 8)
        weak, strong = Labelled()(x, lam, label=nothing).mean, Labelled()(x, lam, label=label).mean
        torch.testing.assert_close(got, weak + scale * (strong - weak), rtol=1e-13, atol=1e-13)


def test_scale_1_is_the_condition_and_scale_0_the_absence_of_it():
    x, label, nothing = example()
    inner = Counted(Labelled())
    assert torch.equal(
        Extrapolated(inner, 1.0, null={"label": NULL})(x, 0.5, label=label).mean, inner(x, 0.5, label=label).mean
    )
    assert inner.rows == 8  # 4 for each: no pass for the null condition
    guided = Extrapolated(inner, 0.0, null={"label": NULL})
    assert torch.equal(guided(x, 0.5, label=label).mean, inner(x, 0.5, label=nothing).mean)


def test_other_conditions_stay_and_tensors_can_be_null():
    x, label, _ = example()
    text, empty = torch.randn(2, 4, 2, dtype=torch.float64)
    guided = Extrapolated(Labelled(), 3.0, null={"text": empty})
    weak, strong = (Labelled()(x, 0.5, label=label, text=t).mean for t in (empty, text))
    torch.testing.assert_close(guided(x, 0.5, label=label, text=text).mean, weak + 3 * (strong - weak))
    torch.testing.assert_close(guided.bind(label=label, text=text)(x, 0.5).mean, weak + 3 * (strong - weak))


@pytest.mark.parametrize("var", [POINT, scalar(0.3), lambda m: m.square(), lambda m: m[:1] ** 2], ids=["0", "()", "B", "1"])
def test_the_variance_is_that_of_the_condition(var):
    x, label, _ = example()
    p = Extrapolated(Labelled(var), 2.0, null={"label": NULL})(x, 0.5, label=label)
    want = Labelled(var)(x, 0.5, label=label).var
    assert torch.equal(p.var.expand_as(x), want.expand_as(x))
    assert (p.var is POINT) == (var is POINT)


def test_autoguidance_by_a_weaker_model():
    strong, weak = Counted(gaussian_data("vector")), Counted(GaussianData(torch.zeros(5), 2.0))
    x = torch.randn(3, 5, dtype=torch.float64)
    got = Extrapolated(strong, 1.7, weak=weak)(x, 0.5)
    torch.testing.assert_close(got.mean, weak(x, 0.5).mean + 1.7 * (strong(x, 0.5).mean - weak(x, 0.5).mean))
    torch.testing.assert_close(got.var, strong(x, 0.5).var)
    calls = weak.calls
    Extrapolated(strong, 1.0, weak=weak)(x, 0.5)
    assert weak.calls == calls


def test_guidance_in_an_interval_of_levels():
    x, label, nothing = example()
    inner = Counted(Labelled())
    guided = Extrapolated(inner, lambda lam: 2.0 if -1 < lam < 3 else 1.0, null={"label": NULL})
    weak, strong = Labelled()(x, 0.0, label=nothing).mean, Labelled()(x, 0.0, label=label).mean
    torch.testing.assert_close(guided(x, 0.0, label=label).mean, 2 * strong - weak)
    assert inner.rows == 8
    assert torch.equal(guided(x, 5.0, label=label).mean, Labelled()(x, 5.0, label=label).mean)
    assert inner.rows == 12  # outside the interval guidance is free


def test_bad_guidance_is_refused():
    x, _label, _ = example()
    for given in ({}, {"null": {"label": NULL}, "weak": Labelled()}):
        with refuses("`null`", "`weak`", "one of them"):
            Extrapolated(Labelled(), 2.0, **given)
    with refuses("`label`", "denoiser.bind(label=...)"):
        Extrapolated(Labelled(), 2.0, null={"label": NULL})(x, 0.5)


def test_static_clipping():
    x = torch.randn(3, 5, dtype=torch.float64)
    inner = gaussian_data("vector")
    p, q = Clipped(inner, 0.5)(x, -1.0), inner(x, -1.0)
    assert (q.mean.abs() > 0.5).any()
    assert torch.equal(p.mean, q.mean.clamp(-0.5, 0.5))
    assert torch.equal(p.var, q.var)
    eps = Clipped(inner, 0.5).predict(x, -1.0, "eps")  # read from the clipped estimate
    torch.testing.assert_close(eps, (x - p.mean) / VE.scales(-1.0)[1])
    assert torch.equal(clip(x, 0.3), x.clamp(-0.3, 0.3))
    assert torch.equal(clip(x, torch.tanh), x.tanh())
    assert (Clipped(inner).process, Clipped(inner).shape) == (VE, (5,))


@pytest.mark.parametrize("quantile", [0.995, 0.9, 1.0])
@pytest.mark.parametrize("cap", [1.0, 1.5, 1e9])
def test_dynamic_clipping_is_the_formula_and_diffusers(quantile, cap):
    scheduler = pytest.importorskip("diffusers.schedulers.scheduling_ddim").DDIMScheduler
    x0 = torch.randn(4, 3, 8, 8) * torch.tensor([0.1, 0.5, 1.0, 3.0]).reshape(4, 1, 1, 1)
    got = dynamic(quantile, cap)(x0)
    for row, out in zip(x0, got, strict=True):
        s = min(max(torch.quantile(row.abs(), quantile).item(), 1.0), cap)
        torch.testing.assert_close(out, row.clamp(-s, s) / s)
    witness = scheduler(dynamic_thresholding_ratio=quantile, sample_max_value=cap, thresholding=True)
    torch.testing.assert_close(got, witness._threshold_sample(x0), rtol=1e-6, atol=1e-6)
    assert got.abs().max() <= 1
    torch.testing.assert_close(Ancestral(clip=dynamic(quantile, cap))(Labelless(x0), x0, -1.0, 2.0).x0.mean, got)


class Labelless(Denoiser):
    process = VP

    def __init__(self, mean):
        super().__init__()
        self.mean = mean

    def forward(self, x, lam):
        return Gaussian(self.mean)


def test_dynamic_clipping_is_per_example():
    x0 = torch.randn(5, 2, 3)
    whole = dynamic(0.8, 2.0)(3 * x0)
    torch.testing.assert_close(torch.cat([dynamic(0.8, 2.0)(3 * row[None]) for row in x0]), whole, rtol=0, atol=0)
    for quantile, cap in ((0.0, 1.0), (1.1, 1.0), (0.9, 0.5)):
        with refuses("`quantile`", "`cap`", f"{quantile}, {cap}"):
            dynamic(quantile, cap)


def test_a_variance_from_elsewhere():
    inner = gaussian_data("image, full covariance")
    x = torch.randn(3, *inner.shape, dtype=torch.float64)

    def source(denoiser, x_t, lam, p):
        assert torch.equal(denoiser(x_t, lam).mean, p.mean)
        return torch.full_like(x_t, 0.25)

    p = WithCovariance(inner, source)(x, 0.5)
    assert torch.equal(p.mean, inner(x, 0.5).mean)
    assert p.basis is None
    assert (p.var == 0.25).all()
    label = torch.arange(4)
    seen = WithCovariance(Labelled(), lambda d, x_t, lam, p: d(x_t, lam).mean)(x[:1, 0, 0, :1].expand(4, 3), 0.5, label=label)
    assert torch.equal(seen.var, seen.mean)  # the source asks under the same conditions


@pytest.mark.parametrize("lam", [-3.0, 0.0, 7.0])
def test_unit_is_the_posterior_variance_of_standard_data(lam):
    for process in (VP, VE):
        data = GaussianData(torch.zeros(2, 3), 1.0, process)
        x = torch.randn(4, 2, 3, dtype=torch.float64)
        for level in (lam, f64(lam)[0], f64(lam, lam, lam, lam)):
            got = WithCovariance(data, Unit())(x, level).var
            torch.testing.assert_close(got.expand_as(x), data(x, level).var.expand_as(x), rtol=1e-13, atol=0)
    assert float(Unit()(data, x, math.inf, data(x, 0.0))) == 0.0


def test_counting():
    counted = Counted(gaussian_data("vector"))
    generate(counted, 10, grid=karras(6), transition=Heun(), batch=4)
    assert counted.calls == 3 * 11  # 2 a step less 1, for each of 3 batches
    assert counted.rows == 11 * 10
    bound = Counted(Labelled()).bind(label=torch.arange(2))
    bound(torch.zeros(2, 3), 0.0)
    assert bound.inner.calls == 1
