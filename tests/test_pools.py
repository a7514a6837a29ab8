"""Reference pools: what they draw keeps the target unbiased."""

import math

import pytest
import torch
from torch import Tensor

from helpers import refuses, within
from quieten.data import Dataset, Order
from quieten.noise import Draws, Noise
from quieten.objective import Batch, Denoising, noised_by
from quieten.oracle import FiniteData
from quieten.process import VE, VP
from quieten.schedule import Linear
from quieten.target import StableTarget, stable_target
from quieten.targets.pools import POOLS, BankPool, ClassPool, ClusterPool, LoaderPool, distinct, make_pool, micro_clusters
from quieten.training.augment import EDMAugment, isometric, mirrored

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = 3


def small(n: int = 12, shape: tuple[int, ...] = (2,)) -> Dataset:
    """Points of three classes of unequal size, further apart than within themselves."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2]).repeat(-(-n // 12))[:n]
    images = torch.randn(n, *shape, generator=generator, dtype=torch.float64) + labels.double().view(-1, *[1] * len(shape))
    return Dataset("small", images, labels, ("a", "b", "c"))


# ---- numbers


@pytest.mark.parametrize("n, total, taken", [(5, 1000, 30), (40, 100, 30), (70, 100, 30), (90, 100, 30), (0, 10, 3), (3, 3, 3)])
def test_distinct_numbers(n: int, total: int, taken: int) -> None:
    gone = torch.arange(taken) * (total // max(taken, 1))
    drawn = distinct(n, total, gone, 1, 2)
    assert len(drawn) == len(drawn.unique()) == min(n, total - taken)
    assert not torch.isin(drawn, gone).any()
    assert torch.equal(drawn, distinct(n, total, gone, 1, 2))
    assert n < 2 or total == taken or not torch.equal(drawn, distinct(n, total, gone, 1, 3))


def test_distinct_numbers_are_even() -> None:
    for n in (2, 6):  # by rejection, and by shuffling
        counts = torch.zeros(20)
        for step in range(1500):
            counts[distinct(n, 20, torch.tensor([4, 4, 9]), 0, step)] += 1
        assert counts[4] == counts[9] == 0
        rest = counts[counts > 0]
        p = n / 18
        within(4.5, (rest - 1500 * p).abs().max() / math.sqrt(1500 * p * (1 - p)), f"counts of {n} of 18, in standard errors")


def test_micro_clusters_are_near_and_of_one_size() -> None:
    x = torch.randn(103, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 3, 1, 1, 1, 1])
    groups = micro_clusters(x, 8)
    assert groups.shape == (12, 8)
    assert len(groups.flatten().unique()) == 96
    inside = torch.stack([torch.cdist(x[g], x[g]).square().mean() for g in groups]).mean()
    assert inside < 0.4 * torch.cdist(x, x).square().mean()
    with refuses("`cluster` must be a size from 2 to the 5 examples (got 8)"):
        micro_clusters(x[:5], 8)


# ---- sets


@pytest.mark.parametrize("name", POOLS)
def test_every_pool_holds_its_sources_and_repeats_itself(name: str) -> None:
    data = small(48)
    pool = make_pool(name, data, cluster=4)  # type: ignore[arg-type]
    index = torch.tensor([3, 17, 20, 41])
    x0, label = data.batch(index)
    taken = torch.cat([index, torch.tensor([5, 6])])
    refs = pool.draw(index, 24, {"label": label}, x0=x0, taken=taken, seed=1, step=7)
    assert torch.isin(index, refs.index).all()
    assert len(refs.index.unique()) == len(refs.index) == len(refs.x0) == len(refs.cond["label"])
    assert torch.equal(refs.x0, data.images[refs.index])
    assert torch.equal(refs.cond["label"], data.labels[refs.index])
    assert len(refs.x0) == (4 if name in ("batch", "gather") else 24)
    if name not in ("cluster",):  # whose groups come whole
        assert not torch.isin(torch.tensor([5, 6]), refs.index).any()
    again = pool.draw(index, 24, {"label": label}, x0=x0, taken=taken, seed=1, step=7)
    assert torch.equal(again.index, refs.index)
    if name in ("bank", "class", "cluster", "loader"):
        assert not torch.equal(pool.draw(index, 24, {"label": label}, x0=x0, taken=taken, seed=1, step=8).index, refs.index)
        from_data = pool.draw(index, 24, seed=1, step=7, taken=taken)  # sources read from the pool's own data
        assert torch.equal(from_data.index, refs.index)
        assert torch.equal(from_data.x0.double(), refs.x0)


def test_a_bank_keeps_bytes_and_serves_them_as_the_data_do() -> None:
    images = torch.randint(0, 256, (30, 1, 4, 4), dtype=torch.uint8)
    data = Dataset("bytes", images, None, ())
    pool = BankPool(data)
    assert pool.x0.dtype == torch.uint8
    index = torch.tensor([2, 9])
    x0 = data.batch(index)[0]
    refs = pool.draw(index, 10, x0=x0)
    assert torch.equal(refs.x0, data.batch(refs.index)[0])
    whole = pool.draw(index, None, x0=x0)
    assert whole.x0.dtype == torch.uint8
    assert whole.x0.data_ptr() == pool.x0.data_ptr(), "all of the data, and no copy"
    sigma = torch.full((2,), 0.5)
    noised = noised_by(VE, x0, -2 * sigma.double().log(), Draws(0, 0, range(2)))
    batch = Batch(x0, index, {})
    want = stable_target(noised.x_t, data.all(), 1.0, 0.5)
    for pool in (BankPool(data), BankPool(data.all())):
        got = StableTarget(pool, None)(noised, batch)
        within(1e-6, (got.x0 - want).abs().max(), "target from all of the data")
    within(1e-6, (got.eps * 0.5 + got.x0 - noised.x_t).abs().max(), "x_t from the targets of x0 and eps")


def test_pools_refuse_what_they_cannot_do() -> None:
    data = small()
    with refuses("`pool` 'bank' draws from the data"):
        make_pool("bank", None)
    with refuses("`pool` 'class' needs labels"):
        ClassPool(data.images)
    with refuses("`references` asks for all examples"):
        LoaderPool(data).draw(torch.arange(2), None, x0=data.images[:2])
    with refuses("`x0` is missing"):
        make_pool("batch", None).draw(torch.arange(2), 4)
    with refuses("`data` must be floats or uint8"):
        BankPool(torch.arange(9).view(3, 3))
    with refuses("`references` must be at least 1"):
        StableTarget(None, 0)


# ---- unbiased


def residuals(
    target: StableTarget, data: Dataset, steps: int, null: float = 0.3, sigma: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Targets less E[x0 | x_t, what the network is told], states, and what it is told, over batches of 4 as in training."""
    assert data.labels is not None
    order, lam = Order(len(data), 4, 0), torch.full((4,), -2 * math.log(sigma), dtype=torch.float64)
    gaps, states, tellings = [], [], []
    oracles = [FiniteData(data.images[data.labels == c], VE) for c in range(CLASSES)] + [FiniteData(data.images, VE)]
    for step in range(steps):
        index = order.indices(step)
        x0, label = data.batch(index)
        assert label is not None
        draws = Draws(0, step, range(4))
        told = torch.where(draws.uniform("drop label") < null, torch.tensor(CLASSES), label)
        noised = noised_by(VE, x0, lam, draws)._replace(cond={"label": told}, draws=draws)
        got = target(noised, Batch(x0, index, {"label": label}))
        truth = torch.stack([oracles[t](noised.x_t[i : i + 1], lam[:1]).mean[0] for i, t in enumerate(told.tolist())])
        gaps.append(got.x0 - truth)
        states.append(noised.x_t)
        tellings.append(told)
    return torch.cat(gaps), torch.cat(states), torch.cat(tellings)


def worst_bias(gap: Tensor, x: Tensor, told: Tensor) -> float:
    """Mean of the gap, and of the gap times each coordinate of x, for each of what the network is told, in standard errors."""
    worst = 0.0
    for c in told.unique():
        g, at = gap[told == c], x[told == c]
        terms = torch.cat([g, *(g * at[:, i : i + 1] for i in range(x.shape[1]))], dim=1)
        worst = max(worst, float((terms.mean(0) / (terms.std(0) / math.sqrt(len(terms)))).abs().max()))
    return worst


@pytest.mark.parametrize("name", ["batch", "bank", "class", "cluster"])
def test_targets_are_unbiased_given_what_the_network_is_told(name: str) -> None:
    data = small()
    target = StableTarget(make_pool(name, data, cluster=3), 8, null={"label": CLASSES})  # type: ignore[arg-type]
    gap, x, told = residuals(target, data, 300)
    within(4.0, worst_bias(gap, x, told), f"bias of {len(gap)} targets with the pool {name}, in standard errors")


def test_references_of_other_classes_would_bias_it() -> None:
    data = small()
    assert worst_bias(*residuals(StableTarget(BankPool(data), 8, match=()), data, 100, null=0.0)) > 6, (
        "the official code's label-blind references"
    )


def test_leaving_the_source_out_biases_it() -> None:
    data = small()
    index = torch.arange(4)
    x0, _ = data.batch(index)
    noised = noised_by(VE, x0, torch.zeros(4, dtype=torch.float64), Draws(0, 0, range(4)))
    got = StableTarget(BankPool(data), None, source_in_set=False)(noised, Batch(x0, index, {}))
    mask = torch.arange(12)[None] != index[:, None]
    want = stable_target(noised.x_t, data.images, 1.0, 1.0, mask=mask)
    within(1e-12, (got.x0 - want).abs().max(), "target from the others")
    alone = StableTarget(None, source_in_set=False)(
        noised_by(VE, x0[:1], torch.zeros(1), Draws(0, 0, [0])), Batch(x0[:1], index[:1], {})
    )
    assert torch.equal(alone.x0, x0[:1]), "nothing else there: the plain target"
    assert (
        worst_bias(*residuals(StableTarget(BankPool(data), 8, source_in_set=False, match=()), data, 150, null=1.0, sigma=0.4))
        > 6
    )


def test_examples_left_over_from_the_clusters_keep_the_plain_target() -> None:
    data = small(11)
    pool = ClusterPool(data, size=4)
    left = (pool.cluster_of < 0).nonzero()[:, 0]
    assert len(left) == 3
    x0, _ = data.batch(left)
    noised = noised_by(VE, x0, torch.zeros(3, dtype=torch.float64), Draws(0, 0, range(3)))
    got = StableTarget(pool, 8)(noised, Batch(x0, left, {}))
    assert torch.equal(got.x0, x0)
    assert torch.equal(got.eps, noised.eps)
    assert got.removed is not None
    assert not got.removed.any()


# ---- conditions, mirrors, augmentation


def test_a_dropped_label_uses_all_references_and_a_label_its_own() -> None:
    data = small(24)
    index = torch.arange(6)
    x0, label = data.batch(index)
    noised = noised_by(VE, x0, torch.zeros(6, dtype=torch.float64), Draws(0, 0, range(6)))
    told = torch.tensor([0, CLASSES, 0, CLASSES, 0, 0])
    batch = Batch(x0, index, {"label": label})
    got = StableTarget(BankPool(data), None, null={"label": CLASSES})(noised._replace(cond={"label": told}), batch)
    everything = stable_target(noised.x_t, data.images, 1.0, 1.0)
    own = stable_target(noised.x_t, data.images[data.labels == 0], 1.0, 1.0)
    want = torch.where((told == CLASSES)[:, None], everything, own)
    within(1e-12, (got.x0 - want).abs().max(), "targets by condition")


def test_an_unknown_condition_warns_once_and_keeps_the_plain_target() -> None:
    data = small()
    index = torch.arange(4)
    x0, label = data.batch(index)
    batch = Batch(x0, index, {"label": label, "text": torch.randn(4, 3)})
    noised = noised_by(VE, x0, torch.zeros(4, dtype=torch.float64), Draws(0, 0, range(4)))
    target = StableTarget(BankPool(data), 8)
    with pytest.warns(UserWarning, match="'text'"):
        got = target(noised, batch)
    assert torch.equal(got.x0, x0)
    assert torch.equal(target(noised, batch).x0, x0)  # and no second warning, which would fail the test
    assert not torch.equal(StableTarget(BankPool(data), 8, match=("label",))(noised, batch).x0, x0)


def test_mirrored_references_count_where_the_network_is_not_told() -> None:
    data = small(20, (1, 2, 3))
    index = torch.arange(5)
    flip = torch.tensor([True, False, True, False, False])
    x0, _ = data.batch(index, flip)
    noised = noised_by(VP, x0, torch.full((5,), -1.0, dtype=torch.float64), Draws(0, 0, range(5)))
    got = StableTarget(BankPool(data), None, flip=True, match=())(noised, Batch(x0, index, {}))
    both = torch.cat([data.images, data.images.flip(-1)])
    alpha, sigma = noised.alpha.flatten(), noised.sigma.flatten()
    want, stats = stable_target(noised.x_t, both, alpha, sigma, stats=True)
    within(1e-12, (got.x0 - want).abs().max(), "target with mirrored references")
    assert got.removed is not None
    within(1e-12, (got.removed - stats.variance).abs().max(), "variance within them")


def test_an_augmentation_that_the_network_is_told_of() -> None:
    data = small(40, (1, 6, 6))
    index = torch.arange(16)
    x0, label = data.batch(index)
    x0, augment = EDMAugment(0.12)(x0, Noise(0, range(16)), 3)
    only_mirrored = isometric(augment)
    assert 4 <= int(only_mirrored.sum()) <= 14
    assert bool(augment[only_mirrored][:, 0].any()), "some of them are mirrored"
    batch = Batch(x0, index, {"label": label, "augment": augment})
    noised = noised_by(VE, x0, torch.full((16,), -2.0, dtype=torch.float64), Draws(0, 0, range(16)))
    noised = noised._replace(cond=batch.cond)
    target = StableTarget(BankPool(data), 30, match=("augment",))
    refs = target.prepare(batch, 0, 0)
    got = target(noised, batch._replace(refs=refs))
    assert torch.equal(got.x0[~only_mirrored], x0[~only_mirrored]), "moved otherwise: the plain target"
    assert not torch.isin(index[~only_mirrored], refs.index).any()
    assert torch.equal(refs.x0, data.images[refs.index]), "references are as the data are"
    upright = stable_target(mirrored(noised.x_t, augment), refs.x0, 1.0, math.e)
    want = mirrored(upright, augment)
    within(1e-12, (got.x0 - want)[only_mirrored].abs().max(), "undone, averaged, done again")
    within(1e-12, ((got.eps * math.e + got.x0) - noised.x_t).abs().max(), "x_t from both targets")
    for pool in (BankPool(data), ClusterPool(data, size=4)):  # which hold the data's version of what was moved
        whole = StableTarget(pool, None, match=())(noised, batch)
        assert torch.equal(whole.x0[~only_mirrored], x0[~only_mirrored])
        assert not torch.equal(whole.x0[only_mirrored], x0[only_mirrored])
    again = target(noised, batch)  # draws its own references
    within(0.0, (again.x0 - got.x0).abs().max(), "with references of its own")


class Told(FiniteData):
    """Data that are told a label."""

    def predict(self, x: Tensor, lam: Tensor, form: str = "x0", **cond: Tensor) -> Tensor:
        return super().predict(x, lam, form)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [name for name in POOLS if name != "gather"])
def test_a_batch_of_nothing(name: str, dtype: torch.dtype, flip: bool) -> None:
    """No examples, no losses: where the mini-batch is the pool there are no references either."""
    data = small(shape=(1, 2, 2))
    target = StableTarget(make_pool(name, data, cluster=4), 6, null={"label": CLASSES}, flip=flip)
    batch = Batch(torch.zeros(0, 1, 2, 2, dtype=dtype), torch.arange(0), {"label": torch.arange(0)})
    refs = target.prepare(batch, 0, 0)
    losses = Denoising(Linear(), target=target).losses(Told(data.images, VP), batch._replace(refs=refs), Draws(0, 0, []))
    assert {name: (loss.shape, loss.dtype) for name, loss in losses.items()} == dict.fromkeys(
        ("loss", "plain_loss"), ((0,), dtype)
    )
