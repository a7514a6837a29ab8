"""KID and the energy distance: published formulas, unbiasedness, and errors that tell the truth."""

import math

import pytest
import torch
from torch import Tensor

from quieten.metrics import Extractor, Result, energy_distance, kernels, kid

GIVEN = Extractor("given", lambda x: x, "0" * 64).for_features()


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kid_of(x: Tensor, y: Tensor) -> float:
    """The formula, element by element."""

    def k(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


@pytest.mark.parametrize("n, m", [(2, 2), (7, 7), (6, 11)])
def test_kid_is_the_published_formula(n, m):
    x, y = draws(n, 5, seed=1), draws(m, 5, seed=2) + 0.3
    assert kid(x, y, GIVEN, blocks=None).value == pytest.approx(kid_of(x, y), rel=1e-12)
    if n == m:  # a subset is then all there is
        assert kid(x, y, GIVEN).value == pytest.approx(kid_of(x, y), rel=1e-12)


def test_kid_of_subsets_is_their_mean():
    x, y = draws(30, 4, seed=1), draws(40, 4, seed=2) + 0.5
    result = kid(x, y, GIVEN, blocks=6, size=10, seed=3)
    generator = torch.Generator().manual_seed(3)
    pick = [(torch.randperm(30, generator=generator)[:10], torch.randperm(40, generator=generator)[:10]) for _ in range(6)]
    values = torch.tensor([kid_of(x[i], y[j]) for i, j in pick], dtype=torch.float64)
    assert result.value == pytest.approx(float(values.mean()), rel=1e-10)
    assert result.details["block_spread"] == pytest.approx(float(values.std()), rel=1e-10)


def test_kid_agrees_with_torchmetrics():
    image = pytest.importorskip("torchmetrics.image.kid", reason="needs torchmetrics (pip install torchmetrics)")

    class Flatten(torch.nn.Module):
        num_features = 12

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)

    x, y = draws(60, 3, 2, 2, seed=1), draws(60, 3, 2, 2, seed=2) * 0.5 + 0.2
    metric = image.KernelInceptionDistance(feature=Flatten(), subsets=1, subset_size=60, normalize=True).set_dtype(
        torch.float64
    )
    metric.update(x, real=True)
    metric.update(y, real=False)
    assert kid(y, x, Extractor.pixels()).value == pytest.approx(float(metric.compute()[0]), rel=1e-5)


def test_energy_distance_in_one_dimension_is_twice_the_integral_of_squared_distribution_functions():
    from scipy.stats import energy_distance as root

    x, y = draws(50, 1, seed=1), draws(70, 1, seed=2) * 2 + 1
    # scipy keeps the pairs of an element with itself: a V-statistic
    inner = sum(float((z - z.T).abs().mean()) / (len(z) - 1) for z in (x, y))
    want = root(x[:, 0].numpy(), y[:, 0].numpy()) ** 2 - inner
    assert energy_distance(x, y).value == pytest.approx(want, rel=1e-10)


MEASURES = [
    lambda x, y, **k: kid(x, y, GIVEN, **k),
    lambda x, y, **k: kid(x, y, GIVEN, blocks=20, size=60, **k),
    lambda x, y, **k: energy_distance(x, y, extractor=GIVEN, **k),
]
NAMES = ["kid", "kid of subsets", "energy"]


@pytest.mark.parametrize("measure", MEASURES, ids=NAMES)
def test_unbiased_and_sure_of_itself(measure):
    """Of equal laws the mean is zero within four standard errors; of others the stated error is the spread."""
    y = draws(400, 6, seed=1000)
    same: list[Result] = [measure(draws(150, 6, seed=s), draws(150, 6, seed=500 + s)) for s in range(60)]
    values = torch.tensor([r.value for r in same])
    assert abs(float(values.mean())) < 4 * float(values.std()) / math.sqrt(len(same))
    assert (values < 0).any()
    far = [measure(1.2 * draws(150, 6, seed=s) + 0.4, y) for s in range(60)]
    spread = float(torch.tensor([r.value for r in far]).std())
    stated = math.sqrt(sum(r.uncertainty**2 for r in far) / len(far))
    assert stated == pytest.approx(spread, rel=0.35)


@pytest.mark.parametrize("measure", MEASURES, ids=NAMES)
@pytest.mark.parametrize("chunk", [7, 17])
def test_no_matter_in_which_parts_the_kernel_is_worked_out(measure, chunk, monkeypatch):
    x, y = draws(64, 6, seed=1), draws(90, 6, seed=2) + 0.3
    whole = measure(x, y)
    monkeypatch.setattr(kernels, "CHUNK", chunk)
    parts = measure(x, y)
    assert (parts.value, parts.uncertainty) == pytest.approx((whole.value, whole.uncertainty), rel=1e-9)


def test_nothing_larger_than_a_block_is_built():
    seen = []

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        seen.append(len(a) * len(b))
        return a @ b.T

    pairs = kernels._subsets(3000, 2500, None, 0, 0)
    kernels._discrepancy(draws(3000, 2), draws(2500, 2), kernel, pairs, 20, 0)
    assert max(seen) <= kernels.CHUNK**2


@pytest.mark.parametrize("measure", MEASURES, ids=NAMES)
def test_floor_protocol_and_randomness(measure):
    x, y, z = draws(50, 4, seed=1) + 1, draws(60, 4, seed=2), draws(80, 4, seed=3)
    before = torch.get_rng_state()
    result = measure(x, y, floor=z, seeds=(5,), weights="ema", reference_name="toys")
    assert torch.equal(torch.get_rng_state(), before)
    assert result.details["floor"] == pytest.approx(measure(z[:50], y).value, rel=1e-12)
    p = result.protocol
    assert (p.n, p.n_reference, p.reference, p.seeds, p.weights) == (50, 60, "toys", (5,), "ema")
    assert (p.extractor, p.extractor_hash, p.extra["n_floor"]) == ("given", "0" * 64, 50)
    assert Result.from_dict(result.to_dict()) == result
    assert measure(x, y, groups=0).uncertainty is None


def test_bad_input_is_named():
    x = draws(10, 4)
    broken = x.clone()
    broken[2, 1] = math.nan
    for measure in MEASURES:
        with pytest.raises(ValueError, match="features of 1 of 10"):
            measure(x, broken)
        with pytest.raises(ValueError, match="holds 1 samples"):
            measure(x[:1], x)
        with pytest.raises(ValueError, match="4 features and"):
            measure(x, draws(10, 5))
    with pytest.raises(ValueError, match="`size` 1"):
        kid(x, x, GIVEN, size=1)
    with pytest.raises(ValueError, match="is no result"):
        Result.from_dict({"value": 1})
