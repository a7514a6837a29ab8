"""Diagnosis: the variance of targets against what is known, and the command from end to end."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import Type
from helpers import f64, refuses, within
from quieten.oracle import FiniteData, GaussianData
from quieten.process import VE, VP
from quieten.schedule import LogNormal
from quieten.targets.diagnosis import level_density, network_loss, target_variance
from test_cli import TINY
from test_objective import Wrong

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_variance_of_gaussian_data() -> None:
    """V = s0^2 sigma^2 / (s0^2 + sigma^2) per element; n references have about 1/n of it where all have weight."""
    s0, sigma = 0.7, f64(0.3, 1.0, 4.0, 30.0)
    x0 = s0 * torch.randn(6000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = target_variance(x0, -2 * sigma.log(), [1, 100], pairs=3000)
    want = s0**2 * sigma**2 / (s0**2 + sigma**2)
    within(0.05, (found.plain / want - 1).abs().max(), "variance of the plain target, relative")
    within(0.08, (found.stable[1] / found.plain - 1).abs().max(), "one reference is the plain target")
    assert not found.within[1].abs().max() > 1e-12
    within(0.3, abs(found.stable[100][3] * 100 / (s0**2 * (1 - 100 / 6000)) - 1), "high noise: variance of a mean of 100")
    within(0.05, ((found.stable[100] + found.within[100]) / found.plain - 1).abs().max(), "parts of the variance add up")
    within(1.0, abs(found.ess[100][3] - 100), "high noise: every reference counts")


def test_the_measured_digits() -> None:
    """Section 3.5 of the notes on the paper: V_eps, and what 128 references leave of it, on the digits scaled to [-1, 1]."""
    from sklearn.datasets import load_digits

    digits = torch.from_numpy(load_digits().images).float() / 8 - 1
    sigma = f64(0.7, 1.0, 1.5, 2.0, 3.0, 10.0)
    found = target_variance(digits, -2 * sigma.log(), 128, pairs=1280)
    kept = found.stable[128] / (found.stable[128] + found.within[128])
    within(
        0.12, (kept / f64(0.75, 0.50, 0.19, 0.09, 0.031, 0.009) - 1).abs().max(), "share that 128 references leave, relative"
    )
    v_eps = 64 * found.plain[[0, 1, 2, 3, 4]] * found.in_eps[:5]
    within(0.08, (v_eps / f64(3.1, 4.8, 4.5, 3.3, 1.8) - 1).abs().max(), "V_eps of the plain target, relative")
    wide = target_variance(digits, -2 * f64(0.1, 0.3, 1.0, 1.5, 5.0, 40.0).log(), 128, pairs=128)
    assert wide.phases == [1, 1, 2, 2, 3, 3]


def test_online_knows_what_is_taken_away_and_nothing_else() -> None:
    x0 = torch.randn(500, 3)
    exact, online = (target_variance(x0, [-2.0, 0.0], 64, kind, pairs=100) for kind in ("exact", "online"))
    assert torch.equal(online.within[64], exact.within[64])
    assert torch.equal(online.ess[64], exact.ess[64])
    assert online.plain.isnan().all()
    assert online.stable[64].isnan().all()
    with refuses("estimated online"):
        network_loss(GaussianData(torch.zeros(3), 1.0), online)


def test_labels_leave_less_to_average() -> None:
    x0 = torch.randn(300, 2)
    labels = torch.arange(300) % 3
    blind, told = (target_variance(x0, [-1.0], 300, labels=given, pairs=300) for given in (None, labels))
    within(1e-12, told.stable[300].max(), "with all of the data nothing stays")
    assert told.ess[300] < 0.5 * blind.ess[300]
    oracle = FiniteData(x0[labels == 1], VE)
    own = labels[told.index] == 1
    want = oracle(told.x0[own] + math.exp(0.5) * told.eps[own], -1.0).mean
    assert told.mean is not None
    within(1e-5, (told.mean[0][own] - want).abs().max(), "E[x0 | x_t, label]")


@pytest.mark.parametrize("process", [VE, VP])
def test_the_loss_of_a_network_and_its_gap(process) -> None:
    x0 = torch.randn(400, 2, 2, dtype=torch.float64)
    levels = [3.0, 0.0, -3.0]
    found = target_variance(x0, levels, 32, pairs=400)
    exact = network_loss(FiniteData(x0, process), found, batch=37)
    within(1e-20, exact.gap.max(), "gap of the exact denoiser")
    within(0.15, (exact.loss / found.plain - 1)[1:].abs().max(), "its loss, from the irreducible part, relative")
    spoilt = network_loss(Wrong(FiniteData(x0, process), lambda m, x: m + 0.1), found)
    within(1e-12, (spoilt.gap - 0.01).abs().max(), "gap of one that is off by 0.1")


def test_the_density_of_levels() -> None:
    at = torch.linspace(-3, 2, 11, dtype=torch.float64)  # ln sigma
    got = level_density(LogNormal(-1.2, 1.2), -2 * at)
    want = torch.exp(-0.5 * ((at + 1.2) / 1.2) ** 2) / (1.2 * math.sqrt(2 * math.pi))
    within(0.01, (got - want).abs().max(), "density per unit of ln sigma")


def test_what_makes_no_sense_is_refused() -> None:
    x0 = torch.randn(20, 2)
    with refuses("`levels` must be finite"):
        target_variance(x0, [math.inf])
    with refuses("`n` and `pairs` must be at least 1"):
        target_variance(x0, [0.0], 0)
    with refuses("`estimator` exact or online"):
        target_variance(x0, [0.0], 4, "quick")  # type: ignore[arg-type]


# ---- the command


def test_diagnose_digits_from_end_to_end(typed: Type, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert typed("train", "digits", "--out", run, *TINY, "--set=target={kind: stable, references: 64}").code == 0
    small = ("--levels", 5, "--pairs", 32, "--references", "16,256", "--bank", 500)
    code, out, err = typed("diagnose", run, "digits", *small)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].split()[:4] == ["sigma/alpha", "phase", "density", "plain"]
    assert len(lines) == 7
    assert "32 pairs against 500 examples of digits, each of its own class" in lines[-1]
    folder = run / "diagnosis"
    with (folder / "diagnosis.csv").open() as file:
        rows = list(csv.DictReader(file))
    content = json.loads((folder / "diagnosis.json").read_text())
    assert [row["log-SNR"] for row in content["levels"]] == [float(row["log-SNR"]) for row in rows]
    for row in content["levels"]:
        assert all(math.isfinite(value) for value in row.values())
        assert row["loss"] > 0
        assert 1 <= row["ESS 16"] <= 16
    assert {row["phase"] for row in content["levels"]} >= {1, 2}
    with Image.open(folder / "diagnosis.png") as picture:
        assert min(picture.size) > 500
    again = typed("diagnose", run, "digits", *small, "--out", tmp_path / "again")
    assert again.out.splitlines()[:6] == lines[:6], "the same pairs, the same table"


def test_diagnose_says_what_does_not_fit(typed: Type, tmp_path: Path) -> None:
    for arguments, words in (
        (("zoo:nothing", "digits"), "no model 'zoo:nothing'"),
        (("zoo:fashion-mnist", "nonsense"), "'nonsense'"),
        (("zoo:fashion-mnist", "digits", "--references", "many"), "--references"),
        (("zoo:fashion-mnist", "digits", "--references", "5000"), "must be below"),
        (("zoo:fashion-mnist", "digits", "--out", "/dev/null/x"), "cannot be written"),
    ):
        code, _, err = typed("diagnose", *arguments, *([] if "--out" in arguments else ["--out", tmp_path]))
        assert code == 2
        assert words in err
        assert err.count("\n") == 1


def test_diagnose_a_diffusers_folder(typed: Type, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    net = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    diffusers.DDPMPipeline(net, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "model")
    code, out, err = typed(
        "diagnose",
        tmp_path / "model",
        "digits",
        "--levels",
        3,
        "--pairs",
        8,
        "--references",
        16,
        "--bank",
        100,
        "--out",
        tmp_path,
    )
    assert code == 0, err
    assert "8 pairs against 100 examples of digits\n" in out
    assert (tmp_path / "diagnosis.png").is_file()
