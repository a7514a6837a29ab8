"""Precision, recall, density and coverage: published formulas, known cases, and errors that tell the truth."""

import math

import pytest
import torch
from torch import Tensor

from quieten.metrics import Extractor, Manifold, manifold, prdc

GIVEN = Extractor("given", lambda x: x, "0" * 64).for_features()
NAMES = ("precision", "recall", "density", "coverage")


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(fake: Tensor, real: Tensor, k: int) -> dict[str, float]:
    """The four sums of the papers, element by element."""

    def radii(x: Tensor) -> list[float]:
        return [sorted(float((a - b).norm()) for b in x)[k] for a in x]  # the nearest of all is itself

    r_real, r_fake = radii(real), radii(fake)
    d = [[float((a - b).norm()) for b in fake] for a in real]
    n, m = len(fake), len(real)
    balls = [[d[i][j] <= r_real[i] for j in range(n)] for i in range(m)]
    return {
        "precision": sum(any(balls[i][j] for i in range(m)) for j in range(n)) / n,
        "recall": sum(any(d[i][j] <= r_fake[j] for j in range(n)) for i in range(m)) / m,
        "density": sum(map(sum, balls)) / (k * n),
        "coverage": sum(map(any, balls)) / m,
    }


@pytest.mark.parametrize("n, m, k", [(12, 20, 3), (25, 9, 5), (6, 6, 1)])
def test_the_published_formulas(n, m, k):
    fake, real = 1.3 * draws(n, 3, seed=1), draws(m, 3, seed=2)
    result = prdc(fake, real, GIVEN, k=k)
    for name, want in by_definition(fake, real, k).items():
        assert result[name].value == pytest.approx(want, rel=1e-12), name


def test_each_pair_has_its_own_neighbours():
    fake, real = draws(30, 3, seed=1), draws(40, 3, seed=2)
    both, three, five = prdc(fake, real, GIVEN), prdc(fake, real, GIVEN, k=3), prdc(fake, real, GIVEN, k=5)
    assert [both[name].value for name in NAMES] == [(three if name in NAMES[:2] else five)[name].value for name in NAMES]
    assert [both[name].protocol.extra["k"] for name in NAMES] == [3, 3, 5, 5]


def test_known_cases():
    real = draws(60, 4, seed=1)
    same = prdc(real, real, GIVEN)  # every ball has its centre and its rim
    assert [same[name].value for name in NAMES] == pytest.approx([1, 1, 6 / 5, 1])
    away = prdc(real + 100, real, GIVEN)
    assert [away[name].value for name in NAMES] == [0, 0, 0, 0]
    # copies of one real image: precise, and nearly nothing is covered
    collapsed = prdc(real[:1] + 1e-6 * draws(60, 4, seed=3), real, GIVEN)
    assert collapsed["precision"].value == 1
    assert collapsed["recall"].value < 0.1
    assert collapsed["coverage"].value < 0.5


def test_errors_are_the_spread_over_draws():
    real = Manifold.of(draws(500, 6, seed=1000))
    results = [prdc(1.2 * draws(300, 6, seed=s) + 0.3, real, GIVEN) for s in range(50)]
    for name in NAMES:
        spread = float(torch.tensor([r[name].value for r in results]).std())
        stated = math.sqrt(sum(r[name].uncertainty ** 2 for r in results) / len(results))
        assert stated == pytest.approx(spread, rel=0.4), name


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_no_matter_in_which_blocks(chunk, monkeypatch):
    fake, real = draws(30, 5, seed=1) + 0.3, draws(45, 5, seed=2)
    whole = prdc(fake, real, GIVEN)
    monkeypatch.setattr(manifold, "CHUNK", chunk)
    parts = prdc(fake, real, GIVEN)
    for name in NAMES:
        assert (parts[name].value, parts[name].uncertainty) == pytest.approx((whole[name].value, whole[name].uncertainty))


def test_nothing_larger_than_a_block_is_built(monkeypatch):
    seen, plain = [], manifold.distances
    monkeypatch.setattr(manifold, "distances", lambda x, y: seen.append(len(x) * len(y)) or plain(x, y))
    prdc(draws(2100, 2, seed=1), draws(1500, 2, seed=2), GIVEN, splits=0)
    assert max(seen) <= manifold.CHUNK**2


def test_nearest_is_what_sorting_says(monkeypatch):
    monkeypatch.setattr(manifold, "CHUNK", 4)
    x, y = draws(9, 3, seed=1) + 1e4, draws(11, 3, seed=2) + 1e4  # far from the origin
    distance, index = manifold.nearest(x, y, 3)
    want = (x[:, None] - y).norm(dim=2).sort(1)
    torch.testing.assert_close(distance, want.values[:, :3], rtol=1e-9, atol=0)
    assert torch.equal(index, want.indices[:, :3])
    _, other = manifold.nearest(x, x, 1, skip_self=True)
    assert (other[:, 0] != torch.arange(9)).all()


def test_bad_input_is_named():
    x = draws(10, 4)
    broken = x.clone()
    broken[2, 1] = math.inf
    with pytest.raises(ValueError, match="images: features of 1 of 10"):
        prdc(broken, x, GIVEN)
    with pytest.raises(ValueError, match="number of samples, 5"):
        prdc(x[:5], x, GIVEN, k=5)
    with pytest.raises(ValueError, match="4 features and reference 5"):
        prdc(x, draws(10, 5), GIVEN)
    with pytest.raises(ValueError, match="aaaa and not 0000"):
        prdc(x, Manifold.of(x, extractor="aaaaaaaa"), GIVEN)
    with pytest.raises(ValueError, match="no balls for `k` 2"):
        prdc(x, Manifold.of(x), GIVEN, k=2)
