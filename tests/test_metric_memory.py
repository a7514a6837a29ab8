"""Memorisation and calibration: laws on data whose answers are known."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from helpers import gaussian_data
from quieten.covariance import Unit
from quieten.metrics import calibration, memorisation
from quieten.noise import Noise
from quieten.oracle import GaussianData
from quieten.process import VE, VP
from quieten.wrap import WithCovariance


def images(n: int, seed: int) -> Tensor:
    return (torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) / 3).clamp(-1, 1)


# ---- memorisation


def test_new_images_are_as_far_as_held_out_ones():
    train = images(400, 1)
    results = [memorisation(images(150, 100 + s), train, images(150, 200 + s)).result for s in range(30)]
    values = torch.tensor([r.value for r in results])
    assert abs(float(values.mean()) - 0.5) < 4 * float(values.std()) / math.sqrt(len(results))
    stated = math.sqrt(sum(r.uncertainty**2 for r in results) / len(results))
    assert stated == pytest.approx(float(values.std()), rel=0.4)


def test_copies_are_found_and_shown(tmp_path):
    train, held_out = images(300, 1), images(100, 2)
    drawn = torch.cat([images(60, 3), train[40:60] + 0.01 * images(20, 4)])
    found = memorisation(drawn, train, held_out, reference_name="toys", seeds=(7,), weights="ema")
    assert set(found.closest(20).tolist()) == set(range(60, 80))
    assert found.index[60:].tolist() == list(range(40, 60))
    assert found.result.details["copies"] == pytest.approx(20 / 80, abs=0.05)
    assert 0.5 < found.result.value < 1
    whole = memorisation(train[:50], train, held_out).result
    assert (whole.value, whole.details["closest"], whole.details["copies"]) == (1, pytest.approx(0, abs=1e-6), 1)
    p = found.result.protocol
    assert (p.n, p.n_reference, p.extra, p.seeds, p.weights) == (80, 300, {"n_held_out": 100}, (7,), "ema")
    picture = Image.open(found.save(tmp_path / "pairs.png", drawn, train, 16))
    assert picture.size == (8 * 64 + 7 * 2, 4 * 64 + 3 * 2)
    top, below = picture.crop((0, 0, 64, 64)), picture.crop((0, 66, 64, 130))
    difference = np.asarray(top).astype(int) - np.asarray(below)
    assert np.abs(difference).max() < 8  # a copy stands over what it copies


def test_distances_are_those_of_the_definition():
    x, train, other = images(9, 1), images(20, 2), images(5, 3)
    found = memorisation(x, train, other)
    want = (x[:, None] - train).flatten(2).norm(dim=2).min(1)
    torch.testing.assert_close(found.distance, want.values.double(), rtol=1e-6, atol=1e-6)
    assert torch.equal(found.index, want.indices)
    assert len(found.held_out) == 5


def test_bad_input_of_memorisation():
    x = images(9, 1)
    with pytest.raises(ValueError, match="held_out holds 1 samples"):
        memorisation(x, x, x[:1])
    with pytest.raises(ValueError, match="held_out has 4 features and train 16"):
        memorisation(x, x, x[:, :, :2, :2])
    broken = x.clone()
    broken[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="train: features of 1 of 9"):
        memorisation(x, broken, x)


# ---- calibration


class Sure(torch.nn.Module):
    """A variance `factor` times the right one of an oracle."""

    def __init__(self, data: GaussianData, factor: float):
        super().__init__()
        self.data, self.factor = data, factor

    def __call__(self, denoiser, x, lam, p):
        return self.factor * self.data(x, lam).var


@pytest.mark.parametrize("process", [VP, VE], ids=["vp", "ve"])
@pytest.mark.parametrize("kind", ["vector", "image"])
def test_the_right_variance_is_right_and_others_are_off_by_their_factor(kind, process):
    data = gaussian_data(kind, process)
    x0 = data.sample(Noise(0, range(4000)))
    for factor in (1.0, 4.0):
        for result in calibration(WithCovariance(data, Sure(data, factor)), x0, [-4.0, 0.0, 3.0]):
            assert abs(result.value - 1 / factor) < 4 * result.uncertainty
            assert result.uncertainty < 0.05 / factor
    right, wrong = (
        calibration(WithCovariance(data, Sure(data, factor)), x0, [-1.0, 1.0])[0].details["score"] for factor in (1.0, 3.0)
    )
    assert right < wrong


def test_calibration_does_not_depend_on_the_batch_and_says_what_was_measured():
    data = gaussian_data("image")
    model, x0 = WithCovariance(data, Sure(data, 2.0)), data.sample(Noise(1, range(60)))
    whole = calibration(model, x0, [0.0, 2.0], batch=60, name="twice", digest="abc", weights="ema", reference_name="toys")
    for batch in (1, 17, 256):
        parts = calibration(
            model, x0, [0.0, 2.0], batch=batch, name="twice", digest="abc", weights="ema", reference_name="toys"
        )
        for one, other in zip(whole, parts, strict=True):
            assert (other.value, other.uncertainty) == pytest.approx((one.value, one.uncertainty), rel=1e-10)
            assert other.details == pytest.approx(one.details, rel=1e-10)
            assert other.protocol == one.protocol
    assert whole[0].protocol.n == 60
    assert (whole[0].protocol.extractor, whole[0].protocol.extractor_hash, whole[0].protocol.weights) == ("twice", "abc", "ema")
    assert [result.details["lam"] for result in whole] == [0.0, 2.0]


def test_calibration_in_float32_and_bad_input():
    data = gaussian_data("vector")
    x0 = data.sample(Noise(1, range(60)))
    wide = calibration(WithCovariance(data, Unit()), x0, [0.0])[0]
    single = calibration(WithCovariance(data.float(), Unit()), x0.float(), [0.0])[0]
    assert single.value == pytest.approx(wide.value, rel=1e-4)
    with pytest.raises(ValueError, match="at least 2 examples"):
        calibration(data, x0[:1], [0.0])
    with pytest.raises(ValueError, match="finite levels"):
        calibration(data, x0, [0.0, math.inf])
    point = WithCovariance(data, lambda denoiser, x, lam, p: torch.zeros_like(x))
    with pytest.raises(ValueError, match="no variance at log-SNR 0"):
        calibration(point, x0, [0.0])
