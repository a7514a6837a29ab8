"""The monitor: each check fires on a failure made for it, says what to do, and lets a healthy tuning pass."""

import math
from dataclasses import replace

import pytest
import torch

from helpers import refuses
from quieten.tuning.monitor import CHECKS, Reading, Spread, diagnose, drift, le_cam, spread

HEALTHY = Reading(
    cost=(0.5, 0.48, 0.55),
    std=(0.9, 0.6, 1e-3),
    std_start=(0.8, 0.7, 1e-3),
    explained=(0.2, 0.3, 0.9),
    data_energy=-0.2,
    sample_energy=0.25,
    energy_loss=-0.2,
    gamma=1.0,
    largest=0.9,
    clipped=0.2,
    spread=Spread(0.7, 0.9),
    data_spread=Spread(0.72, 0.95),
    drift=0.4,
    distance=1.1,
    best=1.0,
    floor=0.2,
)


def test_a_healthy_reading_passes_every_check() -> None:
    checks = diagnose(HEALTHY)
    assert [check.name for check in checks] == list(CHECKS)
    assert {check.status for check in checks} == {"pass"}


@pytest.mark.parametrize(
    "name, change, status, words",
    [
        ("finite", {"energy_loss": math.nan}, "fail", "go back"),
        ("finite", {"cost": (0.5, math.inf, 0.5)}, "fail", "smaller learning rates"),
        ("running cost", {"cost": (0.5, 1.2, 0.5)}, "warn", "step 1"),
        ("running cost", {"cost": (6.0, 0.5, 0.5)}, "fail", "lower lr"),
        ("noise", {"std": (2.0, 0.7, 1e-3)}, "warn", "step 0 is 2.50 times"),
        ("noise", {"std": (2.6, 0.7, 1e-3)}, "fail", "lower tau1"),
        ("noise", {"std": (0.8, 0.06, 1e-3)}, "fail", "raise tau1"),
        ("explained variance", {"explained": (0.2, 0.3, 0.05)}, "warn", "raise the value's lr"),
        ("explained variance", {"explained": (-1.5, 0.3, 0.8)}, "warn", "step 0"),
        ("explained variance", {"explained": (0.2, 0.3, -1.5)}, "fail", "explains -150%"),
        ("energy gap", {"sample_energy": -0.3}, "warn", "outruns"),
        ("energy gap", {"sample_energy": -0.6}, "fail", "raise the energy's lr"),
        ("Le Cam", {"energy_loss": -0.4}, "warn", "falls behind"),
        ("Le Cam", {"energy_loss": -0.48}, "fail", "saturated"),
        ("Le Cam", {"energy_loss": 0.2}, "warn", "far from its optimum"),
        ("value range", {"largest": 4.0}, "warn", "runs away"),
        ("value range", {"largest": 40.0}, "fail", "80.0 times"),
        ("clipping", {"clipped": 0.97}, "warn", "policy_clip"),
        ("collapse", {"spread": Spread(0.72, 0.7)}, "warn", "grow alike"),
        ("collapse", {"spread": Spread(0.3, 0.4)}, "fail", "raise tau1"),
        ("collapse", {"spread": Spread(1.5, 1.9)}, "fail", "burst"),
        ("drift", {"drift": 1.0}, "warn", "being lost"),
        ("held-out distance", {"distance": 1.8}, "warn", "it grows"),
        ("held-out distance", {"distance": 3.5}, "fail", "lower lr"),
    ],
)
def test_each_failure_is_seen_and_said(name: str, change: dict, status: str, words: str) -> None:
    found = {check.name: check for check in diagnose(replace(HEALTHY, **change))}
    assert found[name].status == status
    assert words in found[name].text
    assert str(found[name]).startswith(f"{status}: {name}: ")
    others = {other.status for other in found.values() if other.name not in (name, "finite")}
    assert others <= {"pass"} or name == "finite"


NAN = math.nan


@pytest.mark.parametrize(
    "name, change",
    [
        ("running cost", {"cost": (0.5, NAN, 0.5)}),
        ("noise", {"std": (0.8, NAN, 1e-3)}),
        ("explained variance", {"explained": (0.2, 0.3, NAN)}),
        ("explained variance", {"explained": (0.2, NAN, 0.9)}),
        ("energy gap", {"data_energy": NAN}),
        ("Le Cam", {"energy_loss": NAN}),
        ("value range", {"largest": NAN}),
        ("clipping", {"clipped": NAN}),
        ("collapse", {"spread": Spread(0.7, NAN)}),
        ("collapse", {"data_spread": Spread(NAN, 0.9)}),
        ("drift", {"drift": NAN}),
        ("held-out distance", {"distance": NAN}),
    ],
)
def test_no_check_passes_what_is_no_number(name: str, change: dict) -> None:
    found = {check.name: check for check in diagnose(replace(HEALTHY, **change))}
    assert {check for check, verdict in found.items() if verdict.status != "pass"} == {"finite", name}
    assert (found["finite"].status, found[name].status) == ("fail", "fail")
    assert "is nan: go back" in found[name].text


def test_what_is_unknown_is_not_checked() -> None:
    assert diagnose(Reading()) == []
    assert [check.name for check in diagnose(Reading(drift=0.1))] == ["finite", "drift"]
    assert not [c for c in diagnose(replace(HEALTHY, adaptive=False)) if c.name == "running cost"]
    assert not [c for c in diagnose(replace(HEALTHY, gamma=0.0)) if c.name in ("Le Cam", "value range")]


def test_the_bound_on_values_follows_gamma() -> None:
    for gamma in (0.1, 1.0, 10.0):
        inside, outside = (Reading(largest=factor / (2 * gamma), gamma=gamma) for factor in (2.0, 30.0))
        assert [check.status for check in diagnose(inside)] == ["pass", "pass"]
        assert [check.status for check in diagnose(outside)][-1] == "fail"


def test_le_cam_of_the_best_energy_is_the_distance_of_the_tables() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    for gamma in (0.3, 1.0):
        energy = (q - p) / (2 * gamma * (q + p))
        loss = ((p - q) * energy + gamma * (p + q) * energy.square()).sum()
        assert le_cam(float(loss), gamma) == pytest.approx(float(0.5 * ((q - p).square() / (q + p)).sum()), abs=1e-14)
    assert le_cam(-0.5, 1.0) == 1.0


@pytest.mark.parametrize("shape", [(5,), (1, 4, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spread_measures_scale_and_collapse(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(4000, *shape, dtype=dtype)
    wide, narrow = spread(x), spread(0.5 * x + 3.0)
    assert wide.std == pytest.approx(1.0, abs=0.03)
    assert narrow.std == pytest.approx(0.5 * wide.std, rel=1e-3)
    assert narrow.distance == pytest.approx(0.5 * wide.distance, rel=1e-3)
    alike = spread(x[:1].expand(100, *shape) + 1e-3 * x[:100])
    assert alike.distance < 0.01
    classes = torch.eye(4, dtype=dtype)[torch.arange(4000) % 4]  # in turn, as samples are drawn
    assert spread(classes).distance == pytest.approx(0.75 * math.sqrt(0.5), rel=0.05)
    with refuses("`x`", "2 examples", "1"):
        spread(x[:1])


def test_drift_is_zero_for_the_same_and_one_for_unrelated_samples() -> None:
    x = torch.randn(3000, 6)
    assert drift(x, x) == 0.0
    assert drift(torch.randn(3000, 6), x) == pytest.approx(1.0, abs=0.03)
    assert drift(x + 0.1 * torch.randn(3000, 6), x) == pytest.approx(0.1 / math.sqrt(2), rel=0.05)
