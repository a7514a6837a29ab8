"""Augmentation: what the labels say was done, nothing else is; the same for a key, whatever the batch."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import refuses, within
from quieten.noise import Noise
from quieten.training.augment import LABELS, Dihedral, EDMAugment, _back, _warped, isometric, mirrored
from quieten.training.config import build_denoiser
from quieten.training.feed import examples
from toy import toy_data, toy_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
EVERY = Noise(0, range(4000))


def smooth(height: int = 32, width: int = 32, dx: float = 0.0, dy: float = 0.0, sx: float = 1.0, sy: float = 1.0) -> Tensor:
    """A lopsided hill (1, 1, H, W), moved by (dx, dy) pixels and wider by (sx, sy)."""
    y, x = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in (height, width))
    x, y = ((x - dx) / sx)[None] / 8, ((y - dy) / sy)[:, None] / 8
    return torch.exp(-((x - 0.3) ** 2) - 1.5 * (y + 0.2) ** 2 + 0.4 * x * y)[None, None]


def moved(
    x: Tensor, scale: float = 0.0, turn: float = 0.0, stretch: float = 0.0, axis: float = 0.0, shift=(0.0, 0.0)
) -> Tensor:
    numbers = [torch.tensor([v], dtype=torch.float64) for v in (scale, turn, stretch, axis, *shift)]
    return _warped(x, _back(*numbers[:4], numbers[4:], x.shape[-2:]).expand(len(x), 2, 3))


def test_nothing_to_do_gives_the_image_back() -> None:
    x = torch.randn(2, 3, 9, 12, dtype=torch.float64)
    within(1e-10, (moved(x) - x).abs().max(), "identity through the wavelet")


def test_geometry() -> None:
    """Scaling, stretching and shifting a known function; quarter turns of the pixels themselves."""
    x = smooth()
    inside = (..., slice(6, -6), slice(6, -6))

    def off(got: Tensor, wanted: Tensor, what: str, bound: float = 4e-3) -> None:
        within(bound, (got - wanted)[inside].abs().max(), what)

    off(moved(x, shift=(0.5, -0.25)), smooth(dx=2.0, dy=-1.0), "shift by (2, -1) pixels")
    off(moved(x, shift=(0.3, 0.1)), smooth(dx=1.2, dy=0.4), "shift by a part of a pixel")
    off(moved(x, scale=1.0), smooth(sx=2**0.2, sy=2**0.2), "larger")
    off(moved(x, stretch=1.0), smooth(sx=2**0.2, sy=2**-0.2), "wider and flatter")
    off(moved(x, stretch=1.0, axis=math.pi / 2), smooth(sx=2**-0.2, sy=2**0.2), "narrower and taller")
    for quarter in (1, 2, 3):
        off(moved(x, turn=quarter * math.pi / 2), torch.rot90(x, quarter, (2, 3)), f"{quarter} quarter turns")
    both = moved(x, turn=0.7, stretch=-1.3, axis=0.4)
    off(moved(moved(both, stretch=1.3, axis=0.4), turn=-0.7), x, "undone in reverse order, twice looked up", 8e-3)


def test_beyond_the_border_is_a_reflection() -> None:
    x = smooth(16, 16)
    bent = F.pad(x, (2, 0, 0, 0), mode="reflect")[..., :16]
    within(4e-3, (moved(x, shift=(1.0, 0.0)) - bent).abs()[..., 1:-1].max(), "shift by 2 pixels")


def test_labels_follow_the_paper() -> None:
    p = 0.3
    _, labels = EDMAugment(p)(torch.zeros(4000, 1, 2, 2), EVERY, 0)
    assert labels.shape == (4000, len(LABELS))
    assert labels.dtype == torch.float32
    rate = (labels != 0).double().mean(0)
    expected = torch.tensor([0.5, p / 2, p, p, p, p, p / 2, p, p], dtype=torch.float64)  # half of the stretches are upright
    within(4.0, ((rate - expected).abs() / (expected * (1 - expected) / 4000).sqrt()).max(), "rates, in standard errors")
    assert set(labels[:, :2].unique().tolist()) == {0.0, 1.0}
    for column in (2, 7, 8):
        drawn = labels[labels[:, column] != 0, column]
        assert abs(drawn.mean()) < 4 / math.sqrt(len(drawn))
        assert abs(drawn.var() - 1) < 4 * math.sqrt(2 / len(drawn))
    torch.testing.assert_close((labels[:, 3] + 1).square() + labels[:, 4].square(), torch.ones(4000))
    assert torch.equal(labels[:, 7] != 0, labels[:, 8] != 0), "both shifts or none"


def test_about_six_in_ten_are_at_most_mirrored() -> None:
    x = torch.randn(4000, 1, 2, 2)
    out, labels = EDMAugment()(x, EVERY, 0)
    kept = isometric(labels)
    assert abs(float(kept.double().mean()) - 0.88**4) < 0.03
    assert torch.equal(out[kept], mirrored(x, labels)[kept]), "bit for bit"
    assert torch.equal(mirrored(out, labels)[kept], x[kept]), "and undone by the labels alone"
    assert (out[~kept] != mirrored(x, labels)[~kept]).flatten(1).any(1).double().mean() > 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_function_of_seed_index_and_step(dtype: torch.dtype) -> None:
    x, augment = torch.randn(40, 3, 8, 8, dtype=dtype), EDMAugment(0.5)
    kept = x.clone()
    whole, labels = augment(x, Noise(3, range(40)), 5)
    assert torch.equal(x, kept)
    assert whole.dtype == dtype
    for rows in (slice(7, 8), slice(0, 0), slice(10, 40)):
        part, some = augment(x[rows], Noise(3, range(40)[rows]), 5)
        torch.testing.assert_close(part, whole[rows], rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)
        assert torch.equal(some, labels[rows])
    assert not torch.equal(augment(x, Noise(3, range(40)), 6)[1], labels)
    assert not torch.equal(augment(x, Noise(4, range(40)), 5)[1], labels)


def test_probability_zero_still_mirrors_left_and_right() -> None:
    x = torch.randn(64, 1, 4, 4)
    out, labels = EDMAugment(0.0)(x, Noise(0, range(64)), 0)
    assert isometric(labels).all()
    assert not labels[:, 1].any()
    assert torch.equal(out, torch.where(labels[:, :1].bool()[:, :, None, None], x.flip(-1), x))


def test_bad_input() -> None:
    with refuses("`p`", "1.5", "[0, 1]"):
        EDMAugment(1.5)
    with refuses("`augment`", "(4, 2)", "leave it out"):
        EDMAugment()(torch.zeros(4, 2), Noise(0, range(4)), 0)
    with refuses("`augment`", "'unet'", "leave out the section"):
        build_denoiser(toy_recipe("augment=edm"))


def test_the_feed_applies_what_the_recipe_says() -> None:
    recipe, data = toy_recipe("augment={kind: edm, p: 0.5}", "data.flip=false"), toy_data()
    index, positions = torch.arange(8), torch.arange(8)
    batch = examples(data, recipe, index, positions, step=2)
    plain, _ = data.batch(index)
    expected, labels = EDMAugment(0.5)(plain, Noise(recipe.train.seed, positions), 2)
    assert torch.equal(batch.x0, expected)
    assert torch.equal(batch.cond["augment"], labels)
    assert batch.cond["label"].shape == (8,)


def test_mirrors_and_turns_keep_pixels_and_say_what_they_did():
    x = torch.arange(2 * 16, dtype=torch.float64).reshape(2, 4, 4).expand(4000, 2, 4, 4)
    noise = Noise(0, range(4000))
    moved, labels = Dihedral(0.5)(x, noise, 3)
    assert torch.equal(moved.flatten(1).sort(1).values, x.flatten(1))
    untouched = (moved == x).flatten(1).all(1)
    assert torch.equal(untouched, ~labels.any(1))
    within(0.03, abs(float(untouched.double().mean()) - (0.5 + 0.5 / 8)), "share left alone")
    assert len({tuple(row.tolist()) for row in labels}) == 8
    assert len({tuple(row.tolist()) for row in moved.flatten(1)}) == 8
    again, _ = Dihedral(0.5)(x[:7], Noise(0, range(7)), 3)
    assert torch.equal(again, moved[:7])
    with refuses("square", "(1, 1, 2, 3)"):
        Dihedral()(torch.zeros(1, 1, 2, 3), Noise(0, [0]), 0)
    with refuses("`p`", "2"):
        Dihedral(2)
