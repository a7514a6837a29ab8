"""quieten score: every score of a toy model, what is written, and refusals."""

from __future__ import annotations

import csv
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import Type
from helpers import refuses, within
from quieten.commands.score import BY, score, tuned_energy
from quieten.fit import fit
from quieten.metrics import auroc
from quieten.training.runs import Run
from quieten.training.source import open_source
from quieten.tuning.tune import PLAN, tune_policy
from quieten.tuning.tune_start import Start
from toy import toy_data, toy_run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model, hardly trained, and its policy, hardly tuned."""
    run = toy_run(tmp_path_factory.mktemp("toy") / "toy", "train.images=16")
    fit(run, data=toy_data())
    plan = PLAN.model_copy(update={"images": 16, "batch": 8, "log_every": 1, "preview_every": 16, "warmup": 0})
    for name, energy in (("own", "own"), ("dxmi-2", "value")):
        start = Start(T=2, head_start=0, energy=energy)  # type: ignore[arg-type]
        tune_policy(open_source(str(run.path)), toy_data(60), toy_data(40), name=name, start=start, train=plan, n=20)
    return run.path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Labelled floats, as training and test data."""
    whole = toy_data(30)
    assert whole.labels is not None
    arrays = {"images": whole.all().numpy(), "labels": whole.labels.numpy()}
    np.savez(tmp_path / "set.npz", **arrays)
    return tmp_path / "set.npz"


def run(toy: Path, data: Path, tmp_path: Path, **options):
    area = score(str(toy), str(data), split="train", out=tmp_path / "out", device="cpu", **options)
    with np.load(tmp_path / "out" / "scores.npz", allow_pickle=False) as arrays:
        return area, dict(arrays)


@pytest.mark.parametrize("by", [by for by in BY if by != "detector"])
def test_every_score(toy: Path, data: Path, tmp_path: Path, by: str) -> None:
    area, arrays = run(toy, data, tmp_path, by=by, normal="0", levels=2)
    scores, strange = torch.from_numpy(arrays["scores"]), torch.from_numpy(arrays["strange"])
    assert scores.shape == (30,)
    assert strange.tolist() == [label == 1 for label in arrays["labels"].tolist()]
    assert area.value == auroc(scores, strange).value
    told = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (told["auroc"], told["error"]) == (area.value, area.uncertainty)
    assert (told["normal"], told["strange"]) == (int((~strange).sum()), int(strange.sum()))
    assert (area.protocol.extractor, area.protocol.weights) == (BY[by], "ema")
    assert told["by"] == by
    with (tmp_path / "out" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    within(1e-6, max(abs(float(row["score"]) - float(s)) for row, s in zip(rows, scores, strict=True)), "scores in the CSV")
    pictures = {"histogram.png", "roc.png", "examples.png"} | ({"where.png"} if "where" in arrays else set())
    assert {file.name for file in (tmp_path / "out").glob("*.png")} == pictures
    if by == "loss":
        within(1e-6, np.abs(arrays["where"].mean((1, 2)) - arrays["scores"]).max(), "mean of the map less the score")
    if by in ("pca", "knn"):
        assert area.value > 0.95  # bright halves are far from all dark ones


def test_energy_is_the_default_and_the_checkpoints(toy: Path, data: Path, tmp_path: Path) -> None:
    area, arrays = run(toy, data, tmp_path)
    assert area is None
    energy = tuned_energy(open_source(str(toy), device="cpu"), "dxmi-2")
    assert not any(p.requires_grad for p in energy.parameters())
    x = toy_data(30).all()
    labels = (torch.full((30,), c) for c in range(2))
    with torch.no_grad():
        least = torch.stack([energy(x, 2, label=label) for label in labels]).amin(0)
    within(1e-5, np.abs(arrays["scores"] - least.numpy()).max(), "score less the least energy over classes")
    kept = Run.open(toy / "policy" / "dxmi-2").read()
    assert kept is not None
    for key, tensor in energy.state_dict().items():
        assert torch.equal(tensor, kept.ema[f"value.{key}"])


def test_an_energy_of_its_own(toy: Path, data: Path, tmp_path: Path) -> None:
    _, arrays = run(toy, data, tmp_path, policy="own")
    kept = Run.open(toy / "policy" / "own").read()
    assert kept is not None
    energy = tuned_energy(open_source(str(toy), device="cpu"), "own")
    assert all(torch.equal(tensor, kept.model[f"energy.{key}"]) for key, tensor in energy.state_dict().items())
    x = toy_data(30).all()
    with torch.no_grad():
        least = torch.stack([energy(x, None, label=torch.full((30,), c)) for c in range(2)]).amin(0)
    within(1e-5, np.abs(arrays["scores"] - least.numpy()).max(), "score less the energy")


def test_against_other_data(toy: Path, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.npz"
    np.savez(other, images=np.random.default_rng(0).uniform(-1, 1, (12, 1, 8, 8)).astype(np.float32))
    area, arrays = run(toy, data, tmp_path, by="loss", against=str(other), levels=1, n=10)
    assert (area.protocol.n_reference, area.protocol.n) == (10, 10)
    assert arrays["strange"].tolist() == [False] * 10 + [True] * 10
    assert "labels" not in arrays


def test_data_that_are_not_divided_are_scored_whole(toy: Path, data: Path, tmp_path: Path, typed: Type) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    (tmp_path / "big").mkdir()
    for k in range(5):
        Image.fromarray(rng.integers(0, 255, (9, 9), np.uint8)).save(tmp_path / "big" / f"{k}.png")
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        archive.write(tmp_path / "big" / "0.png", "0.png")
        archive.write(tmp_path / "big" / "1.png", "1.png")
    for given, count in ((tmp_path / "big", 5), (data, 30), (tmp_path / "packed.zip", 2)):
        ran = typed("score", toy, given, "--by", "loss", "--levels", 1, "--out", tmp_path / "o")
        assert ran.code == 0, ran.err
        assert f"{given} has no test data of its own: scored as a whole" in ran.out
        told = json.loads((tmp_path / "o" / "scores.json").read_text())
        assert (told["n"], told["split"]) == (count, "whole")
    ran = typed("score", toy, "digits", "--by", "loss", "--levels", 1, "--against", tmp_path / "big", "--out", tmp_path / "o")
    assert ran.code == 0, ran.err
    assert "as a whole" not in ran.out
    told = json.loads((tmp_path / "o" / "scores.json").read_text())
    assert (told["strange"], told["normal"], told["split"]) == (5, 299, "test")
    area, _ = run(toy, data, tmp_path, by="loss", levels=1, against=str(tmp_path / "big"))  # of a split that it has not
    assert (area.protocol.n_reference, area.protocol.n) == (30, 5)
    ran = typed("score", toy, data, "--by", "loss", "--split", "test", "--out", tmp_path / "o")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "take split train" in ran.err


def test_typed(toy: Path, data: Path, tmp_path: Path, typed: Type) -> None:
    ran = typed("score", toy, data, "--split", "train", "--by", "pca", "--out", tmp_path / "o", "--normal", "1")
    assert ran.code == 0, ran.err
    assert "AUROC" in ran.out
    ran = typed("score", toy, data, "--by", "pac", "--out", tmp_path / "o")
    assert ran.code == 2
    assert "did you mean 'pca'" in ran.err


def test_refusals(toy: Path, data: Path, tmp_path: Path) -> None:
    with refuses("--normal", "--against"):
        run(toy, data, tmp_path, normal="0", against="digits")
    with refuses("--normal 7", "no class"):
        run(toy, data, tmp_path, by="loss", normal="7")
    with refuses("dxmi-9", "dxmi-2"):
        run(toy, data, tmp_path, policy="dxmi-9")
    bare = tmp_path / "bare.npz"
    np.savez(bare, images=np.zeros((5, 1, 8, 8), np.float32))
    with refuses("--normal", "labels"):
        run(toy, bare, tmp_path, by="loss", normal="0")
    wide = tmp_path / "wide.npz"
    np.savez(wide, images=np.zeros((5, 1, 9, 9), np.float32))
    with refuses("(1, 9, 9)", "(1, 8, 8)"):
        run(toy, wide, tmp_path, by="loss")
    with refuses("--by energy", "quieten tune"):
        score("zoo:fashion-mnist", str(data), by="energy", out=tmp_path / "o")
    (tmp_path / "file").write_text("")
    with refuses("--out", "folder"):
        score(str(toy), str(data), by="loss", split="train", out=tmp_path / "file")
