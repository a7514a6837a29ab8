"""Metrics against closed forms, independent formulas and their own sampling laws."""

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quieten.metrics import Extractor, Statistics, frechet, frechet_distance, sliced_wasserstein

DOUBLE = torch.float64


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def covariance(width: int, rank: int | None = None, seed: int = 0) -> Tensor:
    root = draws(width, rank or width, seed=seed)
    return root @ root.T / width


def moments(mean: Tensor, cov: Tensor) -> Statistics:
    return Statistics(mean, cov, n=1000)


def rotation(width: int) -> Tensor:
    return torch.linalg.qr(draws(width, width, seed=9)).Q


# Frechet distance ---------------------------------------------------------------------------------------------


def test_frechet_of_commuting_covariances_is_the_distance_of_their_roots():
    a, b = draws(6, seed=1).abs(), draws(6, seed=2).abs()
    ma, mb, q = draws(6, seed=3), draws(6, seed=4), rotation(6)
    want = float((ma - mb).square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    got = frechet_distance(moments(ma, q @ a.diag() @ q.T), moments(mb, q @ b.diag() @ q.T))
    assert got == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("width", [1, 2, 17])
def test_frechet_agrees_with_the_matrix_root_of_scipy(width):
    from scipy.linalg import sqrtm

    ma, mb, a, b = (draws(width, seed=1), draws(width, seed=2), covariance(width, seed=3), covariance(width, seed=4))
    root = np.trace(sqrtm((a @ b).numpy()).real)
    want = float((ma - mb).square().sum() + a.trace() + b.trace()) - 2 * root
    assert frechet_distance(moments(ma, a), moments(mb, b)) == pytest.approx(want, rel=1e-9)


def test_frechet_of_two_by_two_covariances_in_closed_form():
    # for 2x2 matrices Tr sqrt(M) = sqrt(Tr M + 2 sqrt(det M))
    a, b = covariance(2, seed=5), covariance(2, seed=6)
    root = math.sqrt(float((a @ b).trace()) + 2 * math.sqrt(float(torch.det(a @ b))))
    want = float(a.trace() + b.trace()) - 2 * root
    zero = torch.zeros(2, dtype=DOUBLE)
    assert frechet_distance(moments(zero, a), moments(zero, b)) == pytest.approx(want, rel=1e-11)


@pytest.mark.parametrize("rank", [1, 7, 20])
def test_frechet_is_zero_on_equal_symmetric_and_blind_to_rotation(rank):
    mean, a, b, q = draws(20, seed=1), covariance(20, rank, seed=2), covariance(20, 5, seed=3), rotation(20)
    x, y = moments(mean, a), moments(-mean, b)
    assert frechet_distance(x, x) <= 1e-13 * float(a.trace())
    assert frechet_distance(y, x) == pytest.approx(frechet_distance(x, y), rel=1e-12)
    turned = [moments(q @ s.mean, q @ s.covariance @ q.T) for s in (x, y)]
    assert frechet_distance(*turned) == pytest.approx(frechet_distance(x, y), rel=1e-12)


def test_frechet_of_rank_deficient_covariances_keeps_its_digits():
    # S and 4 S commute: the distance is (2 - 1)^2 Tr S, with 190 null directions that rounding must not fill
    a, zero = covariance(200, 10, seed=2), torch.zeros(200, dtype=DOUBLE)
    assert frechet_distance(moments(zero, a), moments(zero, 4 * a)) == pytest.approx(float(a.trace()), rel=1e-12)
    # orthogonal supports: no overlap at all
    e, f = torch.eye(200, dtype=DOUBLE)[:, :3], torch.eye(200, dtype=DOUBLE)[:, 3:9]
    assert frechet_distance(moments(zero, e @ e.T), moments(zero, f @ f.T)) == pytest.approx(9.0, rel=1e-12)


SIZES = [(300, 200, 12), (20, 15, 40), (64, 40, 64), (10, 500, 100)]
"""Samples of either and features: of full rank, and of less."""


def pair(n: int, m: int, width: int) -> tuple[Tensor, Tensor]:
    return draws(n, width, seed=1), 0.5 * draws(m, width, seed=2) + 0.2


@pytest.mark.parametrize("n, m, width", SIZES)
def test_frechet_agrees_with_scipy_at_any_rank(n, m, width):
    from scipy.linalg import sqrtm

    x, y = pair(n, m, width)
    a, b = torch.cov(x.T).numpy(), torch.cov(y.T).numpy()
    root = sqrtm(a).real
    inner = root @ b @ root
    want = float((x.mean(0) - y.mean(0)).square().sum()) + np.trace(a) + np.trace(b)
    want -= 2 * np.trace(sqrtm((inner + inner.T) / 2).real)
    assert frechet_distance(Statistics.of(x), Statistics.of(y)) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("n, m, width", SIZES)
def test_frechet_agrees_with_torchmetrics_at_any_rank(n, m, width):
    image = pytest.importorskip("torchmetrics.image.fid", reason="needs torchmetrics (pip install torchmetrics)")

    class Flatten(nn.Module):
        num_features = width

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)

    x, y = (z[:, None, None] for z in pair(n, m, width))
    metric = image.FrechetInceptionDistance(feature=Flatten(), normalize=True, input_img_size=(1, 1, width))
    metric.set_dtype(DOUBLE)
    metric.update(x, real=True)
    metric.update(y, real=False)
    ours = frechet_distance(*(Statistics.of(z.flatten(1)) for z in (x, y)))
    assert ours == pytest.approx(float(metric.compute()), rel=1e-6)


def test_frechet_correction_and_uncertainty_tell_the_truth():
    # N(0, I) against N(m, I), whose distance is |m|^2 = 0.5: over many draws the corrected value must lie on it,
    # closer than the raw one, and the stated error must match the true spread
    width, n = 8, 120
    mean = torch.full((width,), math.sqrt(0.5 / width), dtype=DOUBLE)
    truth = Statistics(mean, torch.eye(width, dtype=DOUBLE), n=10**6)
    results = [frechet(draws(n, width, 1, 1, seed=s), truth, Extractor.pixels()) for s in range(60)]
    raw = torch.tensor([r.value for r in results])
    corrected = torch.tensor([r.details["corrected"] for r in results])
    standard_error = float(corrected.std()) / math.sqrt(len(results))
    assert abs(float(corrected.mean()) - 0.5) < 4 * standard_error
    assert float(raw.mean()) - 0.5 > 4 * float(raw.std()) / math.sqrt(len(results))
    stated = math.sqrt(sum(r.uncertainty**2 for r in results) / len(results))
    assert stated == pytest.approx(float(raw.std()), rel=0.35)


def test_floor_is_what_real_data_score():
    x, y, z = (draws(200, 1, 2, 2, seed=s) for s in (1, 2, 3))
    for measure in (lambda a, **k: frechet(a, y, Extractor.pixels(), **k), lambda a, **k: sliced_wasserstein(a, y, **k)):
        result = measure(x + 3, floor=z)
        assert result.details["floor"] == measure(z).value < result.value / 10


# Statistics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [[1000], [1] * 5 + [995], [0, 300, 0, 700], [4, 996]])
def test_streaming_equals_batch(blocks):
    x = 1e6 + draws(1000, 5)  # a mean far from zero, where sums of squares lose their digits
    stats = Statistics()
    for block in x.split(blocks):
        stats.update(block)
    assert stats.n == 1000
    torch.testing.assert_close(stats.mean, x.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(stats.covariance, torch.cov(x.T), rtol=1e-8, atol=1e-8)


def test_statistics_survive_a_file_in_the_common_layout(tmp_path):
    stats = Statistics.of(draws(50, 4), extractor="abc")
    stats.save(tmp_path / "deep" / "reference.npz")
    back = Statistics.load(tmp_path / "deep" / "reference.npz")
    assert torch.equal(back.mean, stats.mean)
    assert torch.equal(back.covariance, stats.covariance)
    assert (back.n, back.extractor) == (50, "abc")
    with np.load(tmp_path / "deep" / "reference.npz", allow_pickle=False) as file:
        assert file["mu"].shape == (4,)
        assert file["sigma"].shape == (4, 4)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["reference.npz"]


def test_foreign_and_damaged_files(tmp_path):
    path = tmp_path / "foreign.npz"
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    foreign = Statistics.load(path)
    assert foreign.n is None
    assert frechet_distance(foreign, moments(torch.ones(3, dtype=DOUBLE), torch.eye(3, dtype=DOUBLE))) == pytest.approx(3)
    with pytest.raises(ValueError, match="give n to load"):
        foreign.update(draws(2, 3))
    assert Statistics.load(path, n=7).update(draws(2, 3)).n == 9
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="foreign.npz"):
        Statistics.load(path)
    np.savez(path, mean=np.zeros(3))
    with pytest.raises(ValueError, match="mu and sigma"):
        Statistics.load(path)
    np.savez(path, mu=np.array([object()]), sigma=np.eye(1))
    with pytest.raises(ValueError, match="npz"):
        Statistics.load(path)
    with pytest.raises(FileNotFoundError):
        Statistics.load(tmp_path / "absent.npz")


# Sliced Wasserstein -------------------------------------------------------------------------------------------


def test_sliced_wasserstein_in_one_dimension_is_wasserstein():
    x, y = draws(40, 1, seed=1), draws(40, 1, seed=2) * 2 + 1
    want = math.sqrt(float((x.sort(0).values - y.sort(0).values).square().mean()))
    assert sliced_wasserstein(x, y, projections=3).value == pytest.approx(want, rel=1e-12)


def test_sliced_wasserstein_of_shifted_data():
    # W2 along theta is |theta . d|, whose mean square over the sphere is |d|^2 / F
    x, d = draws(100, 2, 3, seed=1), draws(2, 3, seed=2)
    result = sliced_wasserstein(x + d, x, projections=4000)
    want = float(d.norm()) / math.sqrt(6)
    assert abs(result.value - want) < 4 * result.details["projection_error"]
    assert result.details["projection_error"] < 0.02 * want


def test_sliced_wasserstein_of_scaled_data():
    # x and 3 x: along every theta the distance is twice the root mean square of theta . x
    x = draws(64, 5, seed=1)
    want = 2 * math.sqrt(float(x.square().sum()) / 64 / 5)
    result = sliced_wasserstein(3 * x, x, projections=4000)
    assert abs(result.value - want) < 4 * result.details["projection_error"]


@pytest.mark.parametrize("n, m", [(2, 3), (5, 10), (7, 4)])
def test_unequal_sizes_equal_repeated_samples(n, m):
    # repeating every sample leaves an empirical law alone, so both sides can be brought to n m samples
    x, y = draws(n, 3, seed=1), draws(m, 3, seed=2)
    want = sliced_wasserstein(x.repeat(m, 1), y.repeat(n, 1), 20).value
    assert sliced_wasserstein(x, y, 20).value == pytest.approx(want, rel=1e-12)


def test_sliced_wasserstein_error_covers_the_spread_of_draws():
    y = draws(2000, 4, seed=100)
    results = [sliced_wasserstein(draws(200, 4, seed=s) + 0.5, y, 50) for s in range(40)]
    spread = float(torch.tensor([r.value for r in results]).std())
    stated = math.sqrt(sum(r.uncertainty**2 for r in results) / len(results))
    assert stated == pytest.approx(spread, rel=0.4)


def test_floor_falls_as_samples_grow():
    floors = [sliced_wasserstein(draws(n, 3, seed=1), draws(n, 3, seed=2), 50).value for n in (50, 800)]
    assert floors[1] < floors[0] / 2  # by the root of 16 over many draws


# Protocol, extractors, randomness, errors ---------------------------------------------------------------------


def test_same_seed_same_digits_and_the_global_generator_is_left_alone():
    x, y = draws(30, 1, 2, 2, seed=1), draws(40, 1, 2, 2, seed=2)
    before = torch.get_rng_state()
    first = [frechet(x, y, Extractor.pixels()), sliced_wasserstein(x, y, 10, seed=5)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert [frechet(x, y, Extractor.pixels()), sliced_wasserstein(x, y, 10, seed=5)] == first
    assert sliced_wasserstein(x, y, 10, seed=6).value != first[1].value


def test_result_carries_its_protocol_into_words_and_json():
    x, y = draws(40, 1, 2, 2, seed=1), draws(50, 1, 2, 2, seed=2)
    pixels = Extractor.pixels()
    result = frechet(x, y, pixels, reference_name="toys", seeds=(3, 4), weights="ema")
    data = json.loads(json.dumps(result.to_dict()))
    assert data["value"] == result.value
    protocol = data["protocol"]
    assert (protocol["n"], protocol["n_reference"], protocol["reference"]) == (40, 50, "toys")
    assert (protocol["extractor"], protocol["extractor_hash"]) == ("pixels", pixels.hash)
    assert (protocol["seeds"], protocol["weights"]) == ([3, 4], "ema")
    text = str(result)
    for part in ("Frechet distance", "±", "n=40", "50 of toys", "pixels", pixels.hash[:4]):
        assert part in text
    shown, error = map(float, result.figure().split(" ± "))
    assert shown == pytest.approx(result.value, abs=error / 10)
    assert error == pytest.approx(result.uncertainty, rel=0.05)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop, self.norm = nn.Linear(4, 6), nn.Dropout(0.5), nn.BatchNorm1d(6)

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.drop(self.layer(x.flatten(1))))


def test_classifier_features_are_frozen_hashed_and_independent_of_the_batch():
    model = Classifier().train()
    extractor = Extractor.from_classifier(model)
    images = draws(10, 1, 2, 2).float()
    features = extractor.extract(images)
    assert features.shape == (10, 6)
    assert not features.requires_grad
    torch.testing.assert_close(extractor.extract(images, batch=3), features)
    assert model.training  # the caller's module is left as it was
    assert Extractor.from_classifier(model).hash == extractor.hash
    with torch.no_grad():
        model.layer.bias[0] += 1e-3
    assert Extractor.from_classifier(model).hash != extractor.hash
    assert torch.equal(extractor.extract(images), features)  # training on does not move a measurement


def test_classifier_from_a_half_precision_file(tmp_path):
    from safetensors.torch import save_file

    model = Classifier().eval()
    path = tmp_path / "judge.safetensors"
    save_file({k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}, path)
    extractor = Extractor.from_classifier(path, Classifier)
    images = draws(5, 1, 2, 2).float()
    torch.testing.assert_close(extractor.extract(images), model.features(images), atol=5e-3, rtol=0)
    assert extractor.name == "judge"
    with pytest.raises(ValueError, match="build"):
        Extractor.from_classifier(path)
    with pytest.raises(ValueError, match="features"):
        Extractor.from_classifier(nn.Linear(2, 2))


def test_statistics_of_another_extractor_are_refused():
    reference = Statistics.of(draws(50, 4), extractor="0123456789")
    with pytest.raises(ValueError, match="01234567"):
        frechet(draws(50, 1, 2, 2), reference, Extractor.pixels())


def test_few_samples_warn_and_too_few_raise():
    with pytest.warns(UserWarning, match="images: 20 samples for 64 features"):
        result = frechet(draws(20, 1, 8, 8), Statistics.of(draws(100, 64)), Extractor.pixels())
    assert "corrected" not in result.details
    for bad in (draws(1, 1, 2, 2), draws(0, 1, 2, 2)):
        with pytest.raises(ValueError, match=r"images holds [01] samples"):
            frechet(bad, draws(9, 1, 2, 2), Extractor.pixels())
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(Statistics.of(draws(1, 3)), Statistics.of(draws(9, 3)))
    assert sliced_wasserstein(draws(3, 2), draws(9, 2), 5).uncertainty is None


def test_bad_input_is_named():
    good, pixels = draws(10, 1, 2, 2), Extractor.pixels()
    broken = good.clone()
    broken[3, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="images: features of 1 of 10"):
        frechet(broken, good, pixels)
    with pytest.raises(ValueError, match="1 of 10 samples"):
        Statistics.of(broken.flatten(1))
    with pytest.raises(ValueError, match="4 and 9 features"):
        frechet(good, Statistics.of(draws(20, 9)), pixels)
    with pytest.raises(ValueError, match="x has 4 features and y 9"):
        sliced_wasserstein(good, draws(10, 1, 3, 3))
    with pytest.raises(ValueError, match="floor"):
        sliced_wasserstein(good, good, floor=draws(10, 1, 3, 3))
    with pytest.raises(ValueError, match="127.5"):
        frechet((good * 50).to(torch.uint8), good, pixels)
    with pytest.raises(ValueError, match="scale them"):
        frechet(good * 100, good, pixels)
    with pytest.raises(ValueError, match="projections"):
        sliced_wasserstein(good, good, 0)
    with pytest.raises(ValueError, match=r"\(B, 3\)"):
        Statistics.of(draws(5, 3)).update(draws(5, 4))
    with pytest.raises(ValueError, match=r"\(F, F\)"):
        Statistics(torch.zeros(3), torch.eye(2), 5)
    with pytest.raises(ValueError, match="flatten"):
        Extractor("whole", lambda x: x, "").extract(good)
