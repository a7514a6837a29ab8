"""Anomalies: geometry of the sphere, positions and maps, and a detector that finds what leaves a circle."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from helpers import refuses, within
from quieten.metrics import auroc
from quieten.tuning.anomaly import Detector, Plan, _sampler, exponential, image_scores, perturbed, points, unit, upsampled, walk
from quieten.tuning.reconstruction import autoencoder

SMALL = Plan(latent=3, width=32, sampler_width=32, value_width=32, pretrain=200, iterations=40, batch=64, T=3, lr_energy=1e-3)


def sphere(n: int, d: int) -> torch.Tensor:
    return F.normalize(torch.randn(n, d, dtype=torch.float64), dim=1)


def test_exponential_map() -> None:
    """Stays on the sphere, goes as far as v is long, starts in the direction of v, and does not mind a move of nothing."""
    x = sphere(50, 7)
    v = torch.randn(50, 7, dtype=torch.float64)
    v = v - (v * x).sum(1, keepdim=True) * x
    y = exponential(x, v)
    within(1e-12, (y.norm(dim=1) - 1).abs().max(), "length less 1")
    angle = torch.atan2((y - (y * x).sum(1, keepdim=True) * x).norm(dim=1), (y * x).sum(1))
    length = v.norm(dim=1).remainder(2 * math.pi)
    within(1e-9, (angle - torch.minimum(length, 2 * math.pi - length)).abs().max(), "angle less the length of the move")
    slope = (exponential(x, 1e-6 * v) - x) / 1e-6
    within(1e-5, (slope - v).abs().max(), "slope at the start")
    assert torch.equal(exponential(x, torch.zeros_like(v)), x)


def test_walk_spreads_as_it_should() -> None:
    """After m small moves of standard deviation s in D - 1 directions, the mean squared distance is about m s^2 (D - 1)."""
    z = torch.zeros(20_000, 5, dtype=torch.float64)
    z[:, 0] = 1.0
    noise = [torch.randn_like(z) for _ in range(4)]
    moved = walk(z, noise, 0.02)
    within(1e-12, (moved.norm(dim=1) - 1).abs().max(), "length less 1")
    assert float((moved - z).square().sum(1).mean()) == pytest.approx(4 * 0.02**2 * 4, rel=0.03)
    assert torch.equal(walk(z, [], 0.02), z)


def test_points_and_positions() -> None:
    maps = torch.randn(3, 4, 2, 5)
    x = points(maps)
    assert x.shape == (30, 4)
    assert torch.allclose(x[10 + 1 * 5 + 2], unit(maps[1:2, :, 1, 2])[0])
    assert torch.allclose(points(torch.randn(6, 4)).norm(dim=1), torch.ones(6))
    with refuses("`features`", "(3, 4, 2)"):
        points(maps[..., 0])
    with refuses("not finite", "1 examples"):
        points(torch.tensor([[1.0, math.nan], [0.0, 1.0]]))


def test_scores_are_the_most_and_maps_are_bilinear() -> None:
    where = torch.zeros(2, 14, 14)
    where[0, 3, 5], where[1] = 7.0, 2.0
    assert image_scores(where).tolist() == [7.0, 2.0]
    big = upsampled(where, 224)
    assert big.shape == (2, 224, 224)
    # half-pixel centres: position (3, 5) is the square of 16 pixels around (55.5, 87.5)
    peak = big[0].flatten().argmax()
    assert {int(peak) // 224, int(peak) % 224} <= {55, 56, 87, 88}
    within(1e-6, (big[1] - 2.0).abs().max(), "a map of one value")
    want = 7.0 * (1 - 0.5 / 16) ** 2
    assert float(big[0].max()) == pytest.approx(want, rel=1e-5)
    assert big[0, :32].abs().max() == 0


def test_chains_start_near_their_data() -> None:
    torch.manual_seed(0)
    energy = autoencoder(6, latent=3, width=16, sphere=True).double()
    x = sphere(40, 6)
    noise = [torch.randn(40, 3).double() for _ in range(4)]
    start = perturbed(energy, x, noise, 0.05)
    assert torch.allclose(start.norm(dim=1), torch.ones(40).double())
    assert torch.allclose(perturbed(energy, x, noise, 0.0), energy.decode(energy.encode(x)))
    assert not start.requires_grad


def test_means_of_the_sampler_are_on_the_sphere() -> None:
    policy = _sampler(6, SMALL).double()
    x = 1.3 * sphere(9, 6)
    for k in range(policy.T):
        p = policy.step(x, k)
        assert torch.allclose(p.mean.norm(dim=1), torch.ones(9).double())
        assert torch.allclose(p.mean, unit(x), atol=1e-6)  # before training it stays where it is
    rows = policy.step(x, torch.arange(9) % policy.T)
    assert torch.allclose(rows.mean.norm(dim=1), torch.ones(9).double())
    lengths = policy.rhos * math.sqrt(6)
    assert float(lengths[-1]) == pytest.approx(0.5 * SMALL.near)
    assert float(lengths[0]) < SMALL.far


def circle(n: int, generator: torch.Generator) -> torch.Tensor:
    """Points of a circle within the sphere of 6 dimensions, with a little noise."""
    angle = 2 * math.pi * torch.rand(n, generator=generator)
    x = torch.zeros(n, 6)
    x[:, 0], x[:, 1], x[:, 2] = angle.cos(), angle.sin(), 0.5
    return x + 0.02 * torch.randn(n, 6, generator=generator)


def test_detector_finds_what_leaves_a_circle(one_thread: None) -> None:
    generator = torch.Generator().manual_seed(0)
    told: list[tuple[int, dict[str, float]]] = []
    detector = Detector.fit(circle(500, generator), SMALL, progress=lambda i, row: told.append((i, row)))
    assert [i for i, _ in told] == list(range(1, 241))
    assert {"energy_loss", "le_cam", "gap"} <= told[-1][1].keys()
    normal = circle(300, generator)
    strange = normal.clone()
    strange[:, 4] += 0.3
    scores = detector.score(torch.cat([normal, strange]))
    area = auroc(scores, torch.arange(600) >= 300)
    print(area)
    assert area.value > 0.9
    assert torch.allclose(detector.score(normal * 5.0), detector.score(normal), rtol=1e-4)  # only directions count
    assert detector.policy.rollout(points(strange)).final.shape == (300, 6)


def test_detector_of_maps_says_where(one_thread: None) -> None:
    """One position of one map is off the circle: the score is its energy, and the heat is hottest there."""
    generator = torch.Generator().manual_seed(1)
    maps = circle(40 * 12, generator).reshape(40, 3, 4, 6).movedim(-1, 1).contiguous()
    detector = Detector.fit(maps, SMALL, seed=1)
    test = maps[:5].clone()
    test[2, 4, 1, 3] += 0.6
    where = detector.where(test)
    assert where.shape == (5, 3, 4)
    assert torch.equal(detector.score(test), where.flatten(1).amax(1))
    assert int(detector.score(test).argmax()) == 2
    assert int(where[2].flatten().argmax()) == 1 * 4 + 3
    assert detector.heat(test, (12, 16)).shape == (5, 12, 16)


def test_the_same_seed_gives_the_same_detector() -> None:
    x = circle(50, torch.Generator().manual_seed(0))
    plan = Plan(latent=2, width=8, sampler_width=8, value_width=8, pretrain=3, iterations=3, batch=16)
    before = torch.get_rng_state()
    a, b, c = (Detector.fit(x, plan, seed=seed).score(x) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(before, torch.get_rng_state())


def test_refusals() -> None:
    with refuses("`features`"):
        Detector.fit(torch.zeros(0, 4), SMALL)
    with refuses("`near`"):
        Plan(near=0.5, far=0.3)
    with refuses("`tau`"):
        Plan(tau=-1.0)
    with refuses("`latent`"):
        Plan(latent=0)
