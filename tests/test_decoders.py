"""Decoders: probabilities that sum to one, the official code's digits, windows that leave nothing out."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import refuses, within
from quieten.gaussian import POINT, Gaussian
from quieten.likelihoods.decoders import PIXELS, Dequantised, Discretised, Flat, Pixels, Plain, log_discretised_normal
from quieten.noise import Draws
from quieten.process import FLOW, VE, VP
from quieten.transition import Step

Golden = Callable[[str], dict[str, np.ndarray]]


def step(mean: Tensor, var: Tensor = POINT, basis: object = None) -> Step:
    return Step(Gaussian(mean, var, basis))  # type: ignore[arg-type]


@pytest.mark.parametrize("pixels", [Pixels(), Pixels(centred=True), Pixels(8), Pixels(2, True)], ids=str)
@pytest.mark.parametrize("compat", [None, "official"])
@pytest.mark.parametrize("var", [1e-6, 5.4e-5, 1e-2, 4.0])
def test_sums_to_one_over_all_values(pixels: Pixels, compat: str | None, var: float):
    mean = torch.tensor([-1.3, -1.0, -0.501, 0.0, 0.2, 0.999, 2.0], dtype=torch.float64)
    log_p = log_discretised_normal(pixels.values[:, None], mean, var, pixels, compat)
    floor = 256e-12 if compat else 0.0  # probabilities held above 1e-12 add that much
    within(1e-12 + floor, (log_p.exp().sum(0) - 1).abs().max(), "sum over the values")


def test_far_tails_keep_their_digits():
    x = torch.tensor([-1.0, 1.0, 129 / 127.5 - 1], dtype=torch.float64)
    mean = torch.tensor([1.0, -1.0, -0.9], dtype=torch.float64)
    log_p = log_discretised_normal(x, mean, 1e-4)
    # 200, 200 and about 90 standard deviations away: log of the tail is -z^2 / 2 - log(z sqrt(2 pi)) (1 + O(1 / z^2))
    z = ((x - mean).abs() - 1 / 255) / 1e-2
    leading = -0.5 * z.square() - torch.log(z * math.sqrt(2 * math.pi))
    within(1e-3, (log_p - leading).abs().max(), "Mills' ratio")
    assert (log_discretised_normal(x, mean, 1e-4, compat="official") == math.log(1e-12)).all()


def test_small_cells_tend_to_the_density():
    x = PIXELS.values[100:110]
    p = Gaussian(torch.zeros(10, dtype=torch.float64), torch.tensor(25.0, dtype=torch.float64))
    log_p = log_discretised_normal(x, p.mean, p.var)
    density = -0.5 * x.square() / 25 - 0.5 * math.log(2 * math.pi * 25) + math.log(2 / 255)
    within(1e-6, (log_p - density).abs().max(), "cell times density")


@pytest.mark.parametrize("case", range(5))
def test_official_discretised_normal(golden: Golden, case: int):
    arrays = {key: torch.from_numpy(value) for key, value in golden("ocm_functions").items()}
    x, (off, var) = arrays["ldn_x"], arrays["ldn_off_var"][case]
    ours = log_discretised_normal(x, x + off, var, compat="official")
    within(1e-12, (ours - arrays[f"ldn_f64_{case}"]).abs().max(), "official, float64")
    single = log_discretised_normal(x.float(), (x + off).float(), var.float(), compat="official")
    within(1e-4, (single - arrays[f"ldn_f32_{case}"]).abs().max(), "official, float32")


def test_official_kl(golden: Golden):
    arrays = {key: torch.from_numpy(value) for key, value in golden("ocm_functions").items()}
    m0, v0, m1, v1 = arrays["kl_args"]
    ours = Gaussian(m0[:, None], v0[:, None]).kl(Gaussian(m1[:, None], v1[:, None]))
    within(1e-12, (ours - arrays["kl"]).abs().max(), "official KL")


@pytest.mark.parametrize("levels", [256, 8])
def test_official_flat_decoder(golden: Golden, levels: int):
    arrays = {key: torch.from_numpy(value) for key, value in golden("diffenc_decoder").items() if key.startswith(f"v{levels}_")}
    pixels = Pixels(levels, centred=True)
    within(1e-15, (pixels.values - arrays[f"v{levels}_values"]).abs().max(), "values")
    for i, gamma in enumerate(arrays[f"v{levels}_gamma0"].tolist()):
        z, x0 = arrays[f"v{levels}_g{i}_z0_rescaled"], pixels.values[arrays[f"v{levels}_x"]]
        for process in (VP, VE, FLOW):
            nats = Flat(process, pixels)(None, x0, process.scales(-gamma)[0] * z, -gamma)
            within(1e-12, ((nats + arrays[f"v{levels}_g{i}_logprob"]) / (1 + nats)).abs().max(), f"official, {process}")
        assert torch.equal(pixels.index(z), arrays[f"v{levels}_g{i}_argmax"].long())


@pytest.mark.parametrize("lam", [13.3, 9.2, 4.0, -3.0])
def test_flat_window_is_the_whole_softmax(lam: float):
    x0 = PIXELS.values[torch.randint(256, (4, 3, 5))]
    for shift in (0.0, 0.3, -3.0):  # encoded data may lie elsewhere, and states beyond the ends
        alpha, sigma = VP.scales(lam)
        x_t = alpha * (x0 + shift) + sigma * torch.randn_like(x0)
        logits = -0.5 * ((x_t[..., None] / alpha - PIXELS.values) * alpha / sigma).square()
        own = PIXELS.index(x0)[..., None]
        full = -logits.log_softmax(-1).gather(-1, own)[..., 0].flatten(1).sum(1)
        within(1e-11, ((Flat()(None, x0, x_t, lam) - full) / (1 + full)).abs().max(), f"window at {lam}, shift {shift}")


def test_flat_costs_of_the_cleanest_level():
    """Bits per dimension at gamma_0, from the specification of VDM's decoder."""
    x0 = Pixels(centred=True).values[torch.randint(10, 246, (2, 100_000))]
    for gamma, bits in ((-13.3, 0.01045), (-12.4, 0.206), (-11.0, 1.11), (-10.0, 1.83)):
        alpha, sigma = VP.scales(-gamma)
        x_t = alpha * x0 + sigma * torch.randn_like(x0)
        found = Flat(pixels=Pixels(centred=True))(None, x0, x_t, -gamma).mean() / 100_000 / math.log(2)
        within(0.1 * bits, (found - bits).abs(), f"bits at gamma {gamma}")


def test_dequantised_is_no_better_than_discretised():
    """Jensen: with the same Gaussian, uniform noise in the cell costs bits."""
    x0 = PIXELS.values[torch.randint(256, (2000, 4))]
    last = step(x0 + 0.01 * torch.randn_like(x0))
    draws = Draws(0, 0, range(2000))
    rough, exact = Dequantised(1e-4), Discretised(1e-4)
    noisy = rough.prepare(x0, draws)
    assert float((noisy - x0).abs().max()) <= 1 / 255
    cost = rough(last, noisy, x0, 9.0) - exact(last, x0, x0, 9.0)
    assert 0.0 < float(cost.mean()) < 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("decoder", [Discretised(1e-3), Discretised(), Flat(), Plain(), Dequantised()], ids=repr)
def test_shapes(decoder: object, batch: int, dtype: torch.dtype):
    x0 = PIXELS.values[torch.randint(256, (batch, 2, 3))].to(dtype)
    last = step(x0 * 0.9, torch.full_like(x0, 1e-3))
    nats = decoder(last, decoder.prepare(x0, Draws(0, 0, range(batch))), x0, 8.0)  # type: ignore[attr-defined, operator]
    assert nats.shape == (batch,)
    assert nats.isfinite().all()


def test_a_fitted_variance_is_the_likeliest():
    x0 = PIXELS.values[torch.randint(20, 236, (400, 50))]
    error = 0.008 * torch.randn_like(x0)
    last = step(x0 + error)
    fitted = Discretised().fitted(float(error.square().mean()))
    costs = [float(Discretised(fitted.var * factor)(last, x0, x0, 9.0).mean()) for factor in (0.8, 1.0, 1.25)]  # type: ignore[operator]
    assert costs[1] < min(costs[0], costs[2])
    assert Discretised().fitted(0.0).var > 0  # type: ignore[operator]
    flat = Flat()
    assert flat.fitted(1.0) is flat


def test_refusals():
    x0 = torch.zeros(1, 2, dtype=torch.float64)
    with refuses("`var`", "0.0"):
        Discretised(0.0)
    with refuses("`var`", "nan"):
        Plain(math.nan)
    with refuses("`compat`", "'offical'"):
        Discretised(compat="offical")
    with refuses("`levels`", "1"):
        Pixels(1)
    with refuses("`x0`", "256 values", "Plain()"):
        Discretised(1e-3).prepare(x0 + 0.5, Draws(0, 0, range(1)))
    with refuses("`x0`", "reaches from"):
        Flat().prepare(x0 + 3.0, Draws(0, 0, range(1)))
    with refuses("no variance", "Discretised(var=1e-4)"):
        Discretised()(step(x0), x0, x0, 9.0)
    with refuses("another basis", "Discretised(var=...)"):
        Discretised()(step(x0, torch.ones_like(x0), object()), x0, x0, 9.0)
