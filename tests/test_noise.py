"""Keyed noise: a pure function of (seed, index, step, tag), and as good as independent."""

import math

import pytest
import torch

from helpers import refuses, within
from quieten.noise import INITIAL, Draws, Noise

pytestmark = pytest.mark.usefixtures("one_thread")
SEEDS = [0, 1, -1, -(2**63), 2**31, 2**32, 2**63, 2**64 - 1, 12345678901234567890]
N = 1 << 20


def normals(seed: int = 0, rows: int = 4, width: int = 2048, step: int = 0, tag: str = "", first: int = 0) -> torch.Tensor:
    return Noise(seed, range(first, first + rows)).normal(torch.empty(rows, width), step, tag)


def standard_errors(x: torch.Tensor) -> dict[str, float]:
    """Moments of standard normals, each in its own standard errors."""
    x, n = x.flatten().double(), x.numel()
    return {
        "mean": x.mean().item() * math.sqrt(n),
        "variance": (x.square().mean().item() - 1) * math.sqrt(n / 2),
        "skewness": x.pow(3).mean().item() * math.sqrt(n / 15),
        "kurtosis": (x.pow(4).mean().item() - 3) * math.sqrt(n / 96),
    }


def kolmogorov_smirnov(u: torch.Tensor) -> float:
    """sqrt(n) times the largest distance between the distribution function of u and that of a uniform variable."""
    u, n = u.flatten().double().sort().values, u.numel()
    i = torch.arange(n, dtype=torch.float64)
    return math.sqrt(n) * torch.maximum((i + 1) / n - u, u - i / n).max().item()


@pytest.mark.parametrize("rows", [1, 64, 1 << 15])
def test_normals_are_normal(rows):
    x = normals(rows=rows, width=N // rows, step=3, tag="law")
    for name, error in standard_errors(x).items():
        within(4.5, abs(error), f"{name}, in standard errors")
    within(2.2, kolmogorov_smirnov(torch.special.ndtr(x.double())), "Kolmogorov-Smirnov, exceeded once in 8,000 fair draws")
    assert 4.5 < x.abs().max() < 5.6


def test_uniforms_are_uniform():
    u = Noise(0, range(1 << 18)).uniform(5, "law")
    assert u.dtype == torch.float64
    assert u.min() > 0
    assert u.max() < 1
    within(2.2, kolmogorov_smirnov(u), "Kolmogorov-Smirnov, exceeded once in 8,000 fair draws")
    assert len(u.unique()) == len(u)


def test_uniforms_stay_below_one_for_every_bit_pattern(monkeypatch):
    for bits, bound in ((-1, "below 1"), (0, "above 0")):
        monkeypatch.setattr("quieten.noise._mix_tensor", lambda z, bits=bits: torch.full_like(z, bits))
        u = Noise(0, [0]).uniform(0).item()
        assert 0 < u < 1, f"{u!r} is not {bound}"


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """Sample correlation in standard errors."""
    x, y = x.flatten().double(), y.flatten().double()
    return abs(torch.corrcoef(torch.stack([x, y]))[0, 1].item()) * math.sqrt(len(x))


def test_no_correlation_between_keys():
    base = normals(seed=7, rows=64, step=4, tag="a", first=10)
    others = {
        "neighbouring rows": normals(seed=7, rows=64, step=4, tag="a", first=11),
        "neighbouring steps": normals(seed=7, rows=64, step=5, tag="a", first=10),
        "initial state": normals(seed=7, rows=64, step=INITIAL, tag="a", first=10),
        "tags": normals(seed=7, rows=64, step=4, tag="b", first=10),
        "neighbouring seeds": normals(seed=8, rows=64, step=4, tag="a", first=10),
        "opposite seeds": normals(seed=-7, rows=64, step=4, tag="a", first=10),
        "seeds that agree in 32 bits": normals(seed=7 + 2**32, rows=64, step=4, tag="a", first=10),
        "swapped index and step": normals(seed=7, rows=64, step=10, tag="a", first=4),
    }
    for name, other in others.items():
        within(4.5, correlation(base, other), f"correlation of {name}, in standard errors")
        within(4.5, correlation(base**2, other**2), f"correlation of squares of {name}, in standard errors")
    for lag in (1, 2, 64, 1024):
        within(4.5, correlation(base[:, :-lag], base[:, lag:]), f"correlation at lag {lag}, in standard errors")


def test_rows_are_uncorrelated_and_never_repeat_or_shift():
    x = normals(rows=256, width=4096)
    matrix = torch.corrcoef(x.double()) * math.sqrt(x.shape[1])
    within(5.5, (matrix - matrix.diag().diag()).abs().max(), "largest of 32,640 correlations between rows, in standard errors")
    assert len(Noise(0, range(200_000)).normal(torch.empty(200_000, 2), 0).view(torch.int64).unique()) == 200_000
    first = set(x[0].tolist())
    shared = max(len(first & set(row.tolist())) for row in x[1:])
    assert shared < 16, f"{shared} of 4,096 values of a row occur in another: shifted copies"


def test_seeds_steps_and_tags_give_different_numbers():
    rows = [normals(seed=seed, rows=1, step=step, tag=tag) for seed in SEEDS[:-3] for step in (-1, 0, 1) for tag in ("", "u")]
    stacked = torch.cat(rows)
    assert len(stacked[:, :4].unique(dim=0)) == len(rows)


@pytest.mark.parametrize("seed", SEEDS)
def test_any_integer_is_a_seed(seed):
    x = normals(seed=seed, rows=8)
    for name, error in standard_errors(x).items():
        within(4.5, abs(error), f"{name}, in standard errors")
    assert torch.equal(x, normals(seed=seed, rows=8))
    assert 0 < Noise(seed, [3]).uniform(0).item() < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (3, 5, 7), ()])
def test_the_split_into_batches_does_not_matter(shape, dtype):
    index = torch.tensor([5, 3, 9, 3, 1 << 40, 0, -2])
    whole = Noise(1, index).normal(torch.empty(7, *shape, dtype=dtype), 2, "t")
    assert whole.dtype == dtype
    for rows in (slice(0, 1), slice(1, 4), slice(4, 7), slice(2, 2)):
        part = Noise(1, index[rows])
        assert torch.equal(part.normal(torch.empty(len(part), *shape, dtype=dtype), 2, "t"), whole[rows])
        assert torch.equal(part.uniform(2, "t"), Noise(1, index).uniform(2, "t")[rows])
    assert torch.equal(whole[1], whole[3])  # the same index twice
    assert len(whole[[0, 1, 2, 4, 5, 6]].flatten(1).unique(dim=0) if shape else whole.unique()) == 6


def test_blocks_do_not_show():
    wide = normals(rows=2, width=100_000)  # several blocks a row
    assert torch.equal(wide[:, :50], normals(rows=2, width=50))
    many = Noise(0, range(70_000)).normal(torch.empty(70_000, 2), 0)  # more rows than a block holds
    assert torch.equal(many[:2], wide[:, :2])


def test_float64_is_the_same_draw_as_float32():
    like = torch.empty(2, 9)
    assert torch.equal(Noise(0, [1, 2]).normal(like.double(), 0), Noise(0, [1, 2]).normal(like, 0).double())


def test_calling_is_normal_at_a_step():
    x = torch.empty(2, 3)
    noise = Noise(4, [7, 8])
    assert len(noise) == 2
    assert torch.equal(noise(6, x), noise.normal(x, 6))


def test_known_values_of_splitmix64():
    # Published test vector of the generator: the first outputs for seed 1234567.
    from quieten.noise import _GOLDEN, _MASK, _mix, _mix_tensor, _signed

    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    states = [(1234567 + i * _GOLDEN) & _MASK for i in range(4)]
    assert [_mix(z) for z in states] == expected
    assert [z & _MASK for z in _mix_tensor(torch.tensor([_signed(z) for z in states])).tolist()] == expected


def test_a_batch_of_another_size_is_refused():
    with refuses("`like`", "3 rows", "2 indices", "one index per row"):
        Noise(0, [0, 1]).normal(torch.empty(3, 2), 0)


@pytest.mark.parametrize("total", [1, 7, 64])
def test_stratified_draws_are_exactly_spread_and_uniform(total):
    first = []
    for step in range(400):
        u = Draws(0, step, range(total)).stratified()
        assert u.dtype == torch.float64
        assert u.min() > 0
        assert u.max() < 1
        gaps = torch.cat([u.sort().values, u.min()[None] + 1]).diff()
        torch.testing.assert_close(gaps, torch.full((total,), 1 / total, dtype=torch.float64), rtol=0, atol=1e-15)
        first.append(u[0])
    within(2.0, kolmogorov_smirnov(torch.stack(first)), "Kolmogorov-Smirnov of one example's draws over the steps")


def test_ranks_see_their_part_of_the_global_batch():
    whole = Draws(3, 11, range(10))
    x0 = torch.empty(10, 2, 3)
    for position in (torch.arange(0, 10, 2), torch.arange(1, 10, 2), torch.arange(3), torch.arange(3, 10)):
        part = Draws(3, 11, position, total=10)
        assert len(part) == len(position)
        assert torch.equal(part.normal(x0[position]), whole.normal(x0)[position])
        assert torch.equal(part.uniform("drop"), whole.uniform("drop")[position])
        assert torch.equal(part.stratified(), whole.stratified()[position])
    assert not torch.equal(whole.stratified("u"), whole.stratified("v"))
    assert not torch.equal(whole.stratified(), Draws(3, 12, range(10)).stratified())


def test_training_and_sampling_draws_are_apart():
    x = torch.empty(4, 512)
    assert correlation(Draws(0, 0, range(4)).normal(x), Noise(0, range(4)).normal(x, 0)) < 4.5
