"""What comes with the library: its cards say what the files are, and the models do what the cards say."""

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

import quieten
from conftest import Type
from quieten.covariances.stored import fingerprint, load_variance
from quieten.data import load
from quieten.guiding.classify import accuracy
from quieten.metrics import Result, frechet
from quieten.metrics.features import Extractor, Statistics
from quieten.nets import Classifier
from quieten.sampling import generate
from quieten.solver import Exponential
from quieten.solvers.samplers import sampler
from quieten.training.bundled import ZOO, bundles
from quieten.training.config import build_grid
from quieten.training.runs import load_with_recipe
from quieten.training.source import open_source
from quieten.tuning.stored import load_policy
from quieten.tuning.tune_loop import draw
from quieten.wrap import Clipped

FILES = sorted(ZOO.rglob("*.safetensors"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ZOO)))
def test_the_card_names_every_file_by_its_hash(file):
    assert hashlib.sha256(file.read_bytes()).hexdigest() in (ZOO / "README.md").read_text()


def test_the_files_are_small():
    size = sum(file.stat().st_size for file in ZOO.rglob("*") if file.is_file())
    assert size <= 12_000_000, f"{size:,} bytes"


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"'zoo:fashon'.*fashion-mnist"):
        quieten.load("zoo:fashon")
    with pytest.raises(ValueError, match=r"'fashon'.*fashion-mnist"):
        Extractor.zoo("fashon")
    with pytest.raises(ValueError, match=r"no statistics 'fashon'.*fashion-mnist"):
        Statistics.zoo("fashon")


@pytest.mark.parametrize("bundle", bundles(), ids=lambda bundle: bundle.name)
def test_every_model_has_all_that_belongs_to_it(bundle):
    """And what there is fits together: heads their trunk, statistics their extractor."""
    opened = open_source(f"zoo:{bundle.name}", device="cpu")
    assert next(opened.denoiser.parameters()).dtype == torch.float32
    assert {"analytic", "ocm"} <= set(bundle.variances)
    for name in bundle.variances:
        load_variance(opened.variances, name, opened.denoiser)
    assert bundle.policies
    for name in bundle.policies:
        policy = load_policy([ZOO / "policy" / bundle.name], name, opened.denoiser)
        assert int(name.split("-")[-1]) == policy.T
        assert json.loads((ZOO / "policy" / bundle.name / f"{name}.json").read_text())["trunk"] == fingerprint(opened.denoiser)
    statistics, extractor = Statistics.zoo(bundle.name), Extractor.zoo(bundle.name)
    assert statistics.extractor == extractor.hash
    shape = opened.denoiser.shape
    assert extractor.extract(torch.zeros(2, *shape)).shape == (2, len(statistics.mean))
    assert statistics.n > 10 * len(statistics.mean)
    log = [json.loads(line) for line in bundle.log.read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]
    assert bundle.quality["samples"]
    assert [row["policy"] for row in bundle.quality["policies"]] == list(bundle.policies)
    for row in (*bundle.quality["samples"], *bundle.quality["policies"]):
        result = Result.from_dict(row["result"])
        assert result.protocol.extractor_hash == extractor.hash
        assert result.figure() == row["frechet"]


def test_policies_draw_as_well_as_the_list_says():
    """The digits' figure again, by their policy."""
    row = next(bundle for bundle in bundles() if bundle.name == "digits").quality["policies"][0]
    result, opened = Result.from_dict(row["result"]), open_source("zoo:digits", device="cpu")
    policy = load_policy([ZOO / "policy" / "digits"], row["policy"], opened.denoiser)
    found = frechet(draw(policy, 500, 10, seed=1).clamp(-1.0, 1.0), Statistics.zoo("digits"), Extractor.zoo("digits"))
    assert abs(found.details["corrected"] - result.details["corrected"]) < 5 * math.hypot(found.uncertainty, result.uncertainty)


def test_samples_are_as_good_as_the_list_says():
    """The digits' figure again, from nothing but what comes along; within what sampling leaves open."""
    bundle = next(bundle for bundle in bundles() if bundle.name == "digits")
    row = Result.from_dict(bundle.quality["samples"][-1]["result"])
    opened = open_source("zoo:digits", device="cpu")
    transition, grid = sampler(opened.transition[0], opened.grid(bundle.quality["samples"][-1]["steps"], None))
    label = torch.arange(500) % 10
    x = generate(Clipped(opened.denoiser), 500, grid=grid, transition=transition, cond={"label": label}, batch=250, seed=1)
    found = frechet(x, Statistics.zoo("digits"), Extractor.zoo("digits"))
    assert abs(found.details["corrected"] - row.details["corrected"]) < 5 * math.hypot(found.uncertainty, row.uncertainty)


def test_the_wheel_takes_all_of_it():
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="needs hatchling (pip install hatchling)")
    root = Path(__file__).parents[1]
    packed = {file.distribution_path for file in wheel.WheelBuilder(str(root)).recurse_included_files()}
    assert {f"quieten/zoo/{file.relative_to(ZOO).as_posix()}" for file in ZOO.rglob("*") if file.is_file()} <= packed


def test_a_picture_by_the_beginning_of_a_name(typed: Type, tmp_path):
    ran = typed("sample", "zoo:fashion", "--steps", 5, "-n", 4, "--out", tmp_path / "grid.png", "--device", "cpu")
    assert ran.code == 0, ran.err
    assert Image.open(tmp_path / "grid.png").size[0] > 28


@pytest.mark.parametrize("bundle", bundles(), ids=lambda bundle: bundle.name)
def test_a_policy_by_name(typed: Type, tmp_path, bundle):
    asked = ("sample", f"zoo:{bundle.name}", "--policy", "dxmi-4", "-n", 3, "--out", tmp_path / "grid.png", "--device", "cpu")
    ran = typed(*asked)
    assert ran.code == 0, ran.err
    assert "dxmi-4 in 4 steps" in ran.out
    assert "4 network evaluations a sample" in ran.out
    assert Image.open(tmp_path / "grid.png").size[0] >= 3 * side(bundle)


def side(bundle) -> int:
    shape = open_source(f"zoo:{bundle.name}", device="cpu").denoiser.shape
    assert shape is not None
    return shape[-1]


def test_the_list(typed: Type):
    ran = typed("zoo")
    for bundle in bundles():
        for piece in (bundle.name, *bundle.variances, *bundle.policies, *(file.stem for file in bundle.classifiers)):
            assert piece in ran.out
        for row in bundle.quality["policies"]:
            assert f"--policy {row['policy']} in {row['steps']} steps: {row['frechet']}" in ran.out
    one = typed("zoo", "zoo:fash")
    assert "zoo:fashion-mnist" in one.out
    assert "zoo:emoji" not in one.out
    assert typed("zoo", "fashon").code == 2


@pytest.fixture(scope="module")
def test_images():
    try:
        return load("fashion-mnist", split="test")
    except ValueError:
        pytest.skip("needs Debian's package dataset-fashion-mnist")


def classifier() -> Classifier:
    from safetensors.torch import load_file

    net = Classifier(channels=1, classes=10)
    weights = load_file(ZOO / "classifiers" / "fashion-mnist.safetensors")
    net.load_state_dict({name: value.float() for name, value in weights.items()})
    return net.eval()


def test_the_classifier_is_as_accurate_as_its_card_says(test_images):
    share = accuracy(classifier(), test_images)
    assert abs(share - 0.9254) < 5e-4, f"accuracy {share:.4f}"


def test_the_extractor_is_that_classifier(test_images):
    extractor = Extractor.zoo("fashion-mnist")
    x, _ = test_images.batch(torch.arange(20))
    assert extractor.hash == hashlib.sha256((ZOO / "classifiers" / "fashion-mnist.safetensors").read_bytes()).hexdigest()
    torch.testing.assert_close(extractor.extract(x), classifier().features(x).detach())


def test_the_model_draws_the_classes_it_is_asked_for():
    denoiser, recipe = load_with_recipe("zoo:fashion-mnist")
    label = torch.arange(100) % 10
    x = generate(
        Clipped(denoiser), 100, grid=build_grid(recipe, 10), transition=Exponential(2), cond={"label": label}, batch=100
    )
    share = float((classifier()(x).argmax(1) == label).float().mean())
    assert share > 0.75, f"{share:.2f} of the samples are taken for the class asked for"
