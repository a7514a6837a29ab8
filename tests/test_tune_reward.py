"""Tuning to a reward by the loop and the command line: what is kept, what is told, what is refused."""

from pathlib import Path

import pytest
import torch

from conftest import Type
from helpers import refuses
from quieten import open_source
from quieten.fit import fit
from quieten.training.runs import Run
from quieten.tuning.stored import load_policy
from quieten.tuning.tune import PLAN, tune_policy
from quieten.tuning.tune_loop import draw
from quieten.tuning.tune_reward import RewardMeasure, told_only
from quieten.tuning.tune_start import Start
from test_tune import data_file
from toy import toy_data, toy_run

TRAIN = PLAN.model_copy(
    update={"images": 480, "batch": 16, "log_every": 1, "preview_every": 160, "warmup": 0, "lr": 2e-3, "save_minutes": None}
)
START = Start(T=2, method="dxdp", head_start=32, last_std=0.1, settings={"tau1": 1e-3, "lr_value": 3e-3})


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained toy model."""
    run = toy_run(tmp_path_factory.mktemp("toy") / "toy")
    fit(run, data=toy_data())
    return run.path


def brightness(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).mean(1)


def test_the_reward_grows_and_the_policy_of_the_best_balance_is_kept(toy: Path, tmp_path: Path) -> None:
    source = open_source(str(toy))
    told = tune_policy(
        source, toy_data(60), toy_data(40), out=tmp_path, start=START, train=TRAIN, n=64, reward=brightness
    )  # fmt: skip
    rows = [row for row in Run.open(tmp_path / "dxdp-2").metrics() if "distance" in row]
    assert len(rows) == 3
    for row in rows:  # the figure is what it says: tau x nats - reward
        assert row["distance"] == pytest.approx(1e-3 * row["details"]["nats"] - row["details"]["reward"], abs=1e-9)
    assert rows[-1]["details"]["nats"] > 0.0
    assert told.distance == min(row["distance"] for row in rows)
    policy = load_policy(tmp_path, "dxdp-2", source.denoiser)
    before = RewardMeasure(told_only(brightness), toy_data(60), 64, "brightness")
    drawn = -before(draw(policy, 64, len(toy_data(60).classes))).value
    best = min(rows, key=lambda row: row["distance"])
    assert drawn == pytest.approx(best["details"]["reward"], abs=1e-5)
    first = next(row for row in Run.open(tmp_path / "dxdp-2").metrics() if "reward" in row)
    assert drawn > first["reward"]


def test_a_policy_that_has_not_moved_costs_no_nats(toy: Path, tmp_path: Path) -> None:
    still = TRAIN.model_copy(update={"images": 32, "preview_every": 32})  # the head start alone
    tune_policy(
        open_source(str(toy)), toy_data(60), toy_data(40), out=tmp_path, start=START, train=still, n=64, reward=brightness
    )  # fmt: skip
    (row,) = [row for row in Run.open(tmp_path / "dxdp-2").metrics() if "distance" in row]
    assert row["details"]["nats"] == 0.0


def test_a_reward_is_told_what_it_asks_for() -> None:
    x, label = torch.zeros(3, 2), torch.arange(3)
    assert told_only(brightness)(x, label=label).shape == (3,)
    assert told_only(lambda x, label: label.float())(x, label=label).tolist() == [0.0, 1.0, 2.0]
    assert told_only(lambda x, **cond: cond["label"].float())(x, label=label).tolist() == [0.0, 1.0, 2.0]


def test_rewards_that_make_no_sense_are_refused(toy: Path, tmp_path: Path) -> None:
    source = open_source(str(toy))
    given = {"out": tmp_path, "train": TRAIN, "n": 64}
    with refuses("`reward`", "dxmi", "give both"):
        tune_policy(source, toy_data(60), toy_data(40), start=Start(T=2), reward=brightness, **given)
    with refuses("`reward`", "dxdp", "without"):
        tune_policy(source, toy_data(60), toy_data(40), start=START, **given)
    with refuses("`reward`", "60 samples", "got 1"):
        tune_policy(source, toy_data(60), toy_data(40), start=START, reward=lambda x: x.mean(), **given)


def test_the_command_line_tunes_to_a_function(toy: Path, tmp_path: Path, typed: Type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wishes_of_a_test.py").write_text("def dark(x):\n    return -x.flatten(1).mean(1)\n")
    given = ("tune", toy, data_file(tmp_path), "--reward", "wishes_of_a_test:dark")
    ran = typed(*given, "--steps", 2, "--images", 32, "--batch", 16, "-n", 20)
    assert ran.code == 0, ran.err
    assert "tau x nats - reward (wishes_of_a_test:dark), n=20" in ran.out
    assert (toy / "policy" / "dxdp-2.safetensors").is_file()
    for options, words in (
        ((*given[:3], "--reward", "nothing"), "module:function"),
        ((*given[:3], "--reward", "wishes_of_a_test:light"), "cannot be loaded"),
        ((*given, "--method", "sft-pg"), "--method sft-pg"),
        ((*given[:3], "--method", "dxdp"), "give --reward"),
    ):
        ran = typed(*options)
        assert ran.code != 0
        assert words in ran.err
