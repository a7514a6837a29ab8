"""Guiding from the command line, end to end with tiny models: a classifier learns, classes and measurements are followed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import quieten
import quieten.commands.sample
from conftest import Ran, Type
from quieten.cli import main
from quieten.guiding.classify import NoisyClassifier
from quieten.guiding.splits import SPLITS
from quieten.nets import Classifier
from quieten.process import PROCESSES, VP
from quieten.training.bundled import ZOO
from quieten.training.runs import Checkpoint, build_update
from quieten.training.weights import packed, read_tensors
from toy import toy_run

ENV = {**os.environ, "PYTHONPATH": str(Path(quieten.__file__).parents[1]), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def refused(ran: Ran, *pieces: str) -> None:
    assert (ran.code, ran.out) == (2, ""), ran
    assert ran.err.count("\n") == 1, ran.err
    for piece in pieces:
        assert piece in ran.err, f"{piece!r} is not in {ran.err!r}"


def model(path: Path, *overrides: str) -> Path:
    """A run with random weights."""
    run = toy_run(path, *overrides)
    tensors = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in build_update(run.recipe).state_dict().items()}
    run.save(Checkpoint(1, tensors, tensors, {}))
    return run.path


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, "top" and "bottom", of 8x8 grey pictures; it knows the null label."""
    torch.manual_seed(0)
    return model(tmp_path_factory.mktemp("guide") / "toy", "objective.drop=0.1")


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of the toy's classes, untrained."""
    options = {"channels": 1, "classes": 2, "width": 8}
    classifier = NoisyClassifier(Classifier(**options), classes=("top", "bottom"), shape=(1, 8, 8))
    path = tmp_path_factory.mktemp("guide") / "judge.safetensors"
    path.write_bytes(packed(classifier.net.state_dict(), classifier.facts(options)))
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """whole.png (8x8), small.png (2x2), hole.png (white middle), see-through.png, colour.png, odd.png (5x5)."""
    folder = tmp_path_factory.mktemp("pictures")
    grey = (np.arange(64).reshape(8, 8) * 4).astype(np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 2:6] = 255
    Image.fromarray(grey).save(folder / "whole.png")
    Image.fromarray(grey[::4, ::4]).save(folder / "small.png")
    Image.fromarray(mask).save(folder / "hole.png")
    Image.fromarray(np.stack([grey, grey, grey, 255 - mask], -1)).save(folder / "see-through.png")
    Image.fromarray(np.stack([grey, grey.T, grey], -1)).save(folder / "colour.png")
    Image.fromarray(grey[:5, :5]).save(folder / "odd.png")
    (folder / "text.png").write_text("no picture")
    return folder


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


# ---- train-classifier


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "digits.safetensors"
    with pytest.raises(SystemExit) as ended:
        main(["train-classifier", "digits", "--images", "6400", "--batch", "64", "--width", "12", "--shift", "1",
              "--lr", "0.01", "--out", str(path)])  # fmt: skip
    assert not ended.value.code
    return path


def test_a_trained_classifier_sees_through_noise(trained: Path) -> None:
    rows = dict(json.loads(read_tensors(trained)[1]["accuracy"]))
    lams = sorted(rows)
    assert (lams[0], lams[-1]) == (-9.0, 9.0)
    assert rows[lams[-1]] > 0.5, f"accuracy {rows} on held-out digits"
    assert rows[lams[0]] < 0.3, "in pure noise there is nothing to see"
    with Image.open(trained.with_suffix(".png")) as picture:
        assert picture.width > 300
    classifier = NoisyClassifier.load(trained)
    assert (classifier.process, classifier.shape, len(classifier.classes)) == (VP, (1, 8, 8), 10)
    assert trained.stat().st_size < 60_000


def test_the_same_command_again_has_nothing_to_do(typed: Type, trained: Path) -> None:
    again = ["train-classifier", "digits", "--batch", 64, "--width", 12, "--shift", 1, "--lr", 0.01, "--out", trained]
    ran = typed(*again, "--images", 6400)
    assert ran.code == 0
    assert "trained to the end" in ran.out
    refused(typed(*again, "--images", 100), "images 6400 instead of 100", "--out")
    refused(typed(*again, "--images", 6400, "--process", "ve"), "process vp instead of ve")


def test_ctrl_c_saves(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    command = [sys.executable, "-m", "quieten", "train-classifier", "digits", "--images", "100000", "--batch", "8",
               "--width", "8", "--out", str(file)]  # fmt: skip
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "images" in process.stderr.readline()  # it has begun
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "stopped by SIGINT" in out
    tensors, facts = read_tensors(file)
    assert int(facts["step"]) > 0
    assert any(name.startswith("adam.") for name in tensors)
    with pytest.raises(ValueError, match="not trained to the end"):
        NoisyClassifier.load(file)


def test_resuming_is_exact(tmp_path: Path, monkeypatch: Any) -> None:
    from quieten.commands import classifier as command
    from quieten.commands import teach

    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    options: dict[str, Any] = {"images": 640, "batch": 32, "width": 8}
    assert command.train_classifier("digits", out=whole, **options)
    real = teach.lessons

    def interrupted(*arguments: Any, **keywords: Any) -> Any:
        for lesson in real(*arguments, **keywords):
            yield lesson
            if lesson[0] == 7:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(teach, "lessons", interrupted)
    assert not command.train_classifier("digits", out=parts, **options)
    assert int(read_tensors(parts)[1]["step"]) == 8
    monkeypatch.setattr(teach, "lessons", real)
    assert command.train_classifier("digits", out=parts, **options)
    a, b = read_tensors(whole)[0], read_tensors(parts)[0]
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert a.keys() == b.keys()


@pytest.mark.parametrize(
    "options, pieces",
    [
        (["digitz"], ["'digitz'", "did you mean 'digits'?"]),
        (["digits", "--process", "vq"], ["`--process`", "vp, ve, flow", "'vq'"]),
        (["digits", "--out", "x.pt"], ["`--out x.pt`", ".safetensors"]),
    ],
)
def test_mistakes_in_training(typed: Type, tmp_path: Path, monkeypatch: Any, options: list[str], pieces: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    refused(typed("train-classifier", *options), *pieces)


def test_vectors_and_unlabelled_data_have_no_classifier(typed: Type, tmp_path: Path) -> None:
    np.savez(tmp_path / "points.npz", x=np.zeros((5, 2), np.float32), y=np.zeros(5, np.int64))
    refused(typed("train-classifier", tmp_path / "points.npz"), "shape (2,)", "labelled pictures")
    np.savez(tmp_path / "plain.npz", images=np.zeros((5, 8, 8, 1), np.uint8))
    refused(typed("train-classifier", tmp_path / "plain.npz"), "no labels")


# ---- classes


@pytest.mark.parametrize("transition", [None, "dpm++", "ddpm", *SPLITS])
def test_every_sampler_follows_a_class(typed: Type, tmp_path: Path, toy: Path, judge: Path, transition: str | None) -> None:
    files = ["--out", tmp_path / "x.png", "--npz", tmp_path / "x.npz"]
    options = [] if transition is None else ["--transition", transition]
    ran = typed("sample", toy, "--guide", "bottom", "--classifier", judge, "--scale", 2, "-n", 3, "--batch", 2, "--steps", 4,
                *files, *options)  # fmt: skip
    assert ran.code == 0, ran.err
    assert arrays(tmp_path / "x.npz")["labels"].tolist() == [1, 1, 1]
    found = re.search(r"([\d.]+) network evaluations a sample \(NFE\) and ([\d.]+) gradients", ran.out)
    assert found, ran.out
    network, gradient = map(float, found.groups())
    scheme = SPLITS.get(transition or "strang")
    if scheme is not None:
        assert 4 * scheme.network - 1 <= network <= 4 * scheme.network
        assert gradient <= 4 * scheme.gradient + (8 if transition == "subcycled" else 1)
    else:
        assert (network, gradient) == (4, 4)
    assert f"{transition or 'strang'} in 4 steps" in ran.out


def test_samples_do_not_depend_on_batches(typed: Type, tmp_path: Path, toy: Path, judge: Path) -> None:
    images = []
    for batch in (1, 3, 64):
        ran = typed("sample", toy, "--guide", "all", "--classifier", judge, "-n", 5, "--steps", 3, "--batch", batch,
                    "--out", tmp_path / "x.png", "--npz", tmp_path / "x.npz")  # fmt: skip
        assert ran.code == 0, ran.err
        images.append(arrays(tmp_path / "x.npz"))
    for other in images[1:]:
        assert np.abs(other["images"].astype(int) - images[0]["images"]).max() <= 1
        assert other["labels"].tolist() == [0, 1, 0, 1, 0]


def test_the_weight_counts_and_the_file_says_so(typed: Type, toy: Path, judge: Path) -> None:
    guide = ["--guide", "top,bottom", "--classifier", judge, "-n", 2, "--steps", 3]
    none = typed("sample", toy, *guide, "--scale", 0, "--npz", toy / "none.npz")
    plain = typed("sample", toy, *guide, "--scale", 0, "--transition", "dpm++", "--npz", toy / "plain.npz")
    strong = typed("sample", toy, *guide, "--scale", 300, "--npz", toy / "strong.npz")
    assert "strang-3-seed0-guide-top-bottom-300.png" in strong.out
    assert all(ran.code == 0 for ran in (none, plain, strong))
    assert (arrays(toy / "strong.npz")["images"] != arrays(toy / "none.npz")["images"]).any()


def test_classifier_free_guidance_may_be_split(typed: Type, tmp_path: Path, toy: Path) -> None:
    for name in ("additive", "strang"):
        ran = typed("sample", toy, "--scale", 2, "--transition", name, "-n", 2, "--steps", 3, "--out", tmp_path / "x.png")
        assert ran.code == 0, ran.err
    refused(typed("sample", toy, "--transition", "strang"), "`--transition strang`", "--guide", "--scale")


def test_the_zoo_brings_its_classifier(typed: Type, tmp_path: Path) -> None:
    ran = typed("sample", "zoo:fashion-mnist", "--guide", "Bag", "--scale", 6, "--steps", 4, "-n", 2,
                "--out", tmp_path / "x.png", "--npz", tmp_path / "x.npz")  # fmt: skip
    assert ran.code == 0, ran.err
    assert arrays(tmp_path / "x.npz")["labels"].tolist() == [8, 8]


# ---- measurements


@pytest.mark.parametrize(
    "options, same",
    [
        (["inpaint", "--measurement", "whole.png", "--mask", "hole.png"], lambda x: x[:2]),
        (["inpaint", "--measurement", "see-through.png"], lambda x: x[:2]),
        (["superres:4", "--measurement", "whole.png"], lambda x: x.reshape(2, 4, 2, 4).mean((1, 3))),
        (["superres:4", "--measurement", "small.png"], lambda x: x.reshape(2, 4, 2, 4).mean((1, 3))),
    ],
)
def test_measurements_are_met(typed: Type, tmp_path: Path, toy: Path, pictures: Path, options: list[str], same: Any) -> None:
    words = [str(pictures / word) if word.endswith(".png") else word for word in options]
    ran = typed("sample", toy, "--guide", *words, "-n", 3, "--steps", 6, "--no-clip", "--out", tmp_path / "x.png",
                "--npz", tmp_path / "x.npz")  # fmt: skip
    assert ran.code == 0, ran.err
    assert "the first picture is what was measured" in ran.out
    assert "6 network evaluations a sample (NFE);" in ran.out
    with Image.open(pictures / words[2]) as image:
        known = np.asarray(image.convert("L"), dtype=float)
    images = arrays(tmp_path / "x.npz")["images"].astype(float)
    assert images.shape == (3, 1, 8, 8)
    if known.shape == (8, 8):
        known = same(known)
    free = arrays(unguided(typed, tmp_path, toy))["images"].astype(float)
    off, without = (np.abs(same(x) - known).mean() for x in (images[:, 0].mean(0), free[:, 0].mean(0)))
    assert off < 0.6 * without, f"{off:.1f} grey levels off, {without:.1f} without the measurement"


def unguided(typed: Type, tmp_path: Path, toy: Path) -> Path:
    """Samples as many and as long, without a measurement."""
    ran = typed("sample", toy, "-n", 3, "--steps", 6, "--no-clip", "--out", tmp_path / "y.png", "--npz", tmp_path / "y.npz")
    assert ran.code == 0, ran.err
    return tmp_path / "y.npz"


def test_colour(typed: Type, tmp_path: Path, pictures: Path) -> None:
    from quieten.data import Dataset

    images = torch.rand(6, 3, 8, 8) * 2 - 1
    run = toy_run(tmp_path / "rgb", data=Dataset("toy", images, torch.arange(6) % 2, ("top", "bottom")))
    tensors = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in build_update(run.recipe).state_dict().items()}
    run.save(Checkpoint(1, tensors, tensors, {}))
    for name in ("whole.png", "colour.png"):
        ran = typed("sample", run.path, "--guide", "colour", "--measurement", pictures / name, "-n", 2, "--steps", 3,
                    "--out", tmp_path / "x.png")  # fmt: skip
        assert ran.code == 0, ran.err


# ---- mistakes


@pytest.mark.parametrize(
    "options, pieces",
    [
        (["--guide", "tap"], ["`--guide tap`", "did you mean 'top'?", "superres:K"]),
        (["--guide", "inpant"], ["`--guide inpant`", "did you mean 'inpaint'?"]),
        (["--guide", "2"], ["`--guide 2`", "number below 2"]),
        (["--guide", "top", "--scale", "nan"], ["`--scale nan`", "finite"]),
        (["--guide", "top", "--mask", "hole.png"], ["`--mask", "--guide inpaint"]),
        (["--guide", "top", "--eta", "0.5"], ["`--eta 0.5`", "'strang'"]),
        (["--guide", "inpaint"], ["`--measurement` is missing"]),
        (["--guide", "inpaint", "--measurement", "whole.png"], ["`--mask` is missing", "transparent"]),
        (["--guide", "inpaint", "--measurement", "odd.png", "--mask", "hole.png"], ["odd.png", "5x5", "give 8x8"]),
        (["--guide", "inpaint", "--measurement", "whole.png", "--mask", "odd.png"], ["odd.png", "5x5", "give 8x8"]),
        (["--guide", "inpaint", "--measurement", "nowhere.png", "--mask", "hole.png"], ["nowhere.png", "cannot be read"]),
        (["--guide", "inpaint", "--measurement", "text.png", "--mask", "hole.png"], ["text.png", "no picture"]),
        (["--guide", "superres:3", "--measurement", "small.png"], ["superres:3", "2, 4, 8"]),
        (["--guide", "inpaint:2", "--measurement", "hole.png"], ["`--guide inpaint:2`", "no number", "leave out :2"]),
        (["--guide", "color:", "--measurement", "whole.png"], ["`--guide color:`", "no number"]),
        (["--guide", "superres", "--measurement", "small.png"], ["`--guide superres:`", "superres:4"]),
        (["--guide", "superres:4", "--measurement", "odd.png"], ["5x5", "2x2 or 8x8"]),
        (["--guide", "superres:4", "--measurement", "small.png", "--mask", "hole.png"], ["`--mask", "inpaint"]),
        (["--guide", "colour", "--measurement", "colour.png"], ["colour pictures", "grey"]),
        (["--measurement", "whole.png"], ["`--measurement", "goes with --guide"]),
        (["--classifier", "zoo:fashion-mnist-noisy"], ["`--classifier", "goes with --guide"]),
    ],
)  # fmt: skip
def test_mistakes_before_the_work(
    typed: Type, toy: Path, judge: Path, pictures: Path, monkeypatch: Any, options: list[str], pieces: list[str]
) -> None:
    monkeypatch.setattr(quieten.commands.sample, "generate", lambda *_, **__: pytest.fail("the work began"))
    words = [str(pictures / word) if word.endswith(".png") else word for word in options]
    classes = "--guide" in words and not {"inpaint", "colour"} & set(words) and "superres" not in words[1]
    refused(typed("sample", toy, *words, *(["--classifier", judge] if classes else [])), *pieces)


def test_classifiers_that_do_not_fit(typed: Type, tmp_path: Path, toy: Path, judge: Path) -> None:
    refused(typed("sample", toy, "--guide", "top"), "needs a classifier", "--classifier FILE", "train-classifier")
    refused(typed("sample", toy, "--guide", "0", "--classifier", "zoo:fashion-mnist-noisy"), "(1, 28, 28)", "(1, 8, 8)")
    refused(typed("sample", toy, "--guide", "0", "--classifier", "zoo:fashon"), "zoo:fashion-mnist-noisy")
    refused(typed("sample", toy, "--guide", "0", "--classifier", tmp_path / "none.safetensors"), "none.safetensors", "missing")
    clean = ZOO / "classifiers" / "fashion-mnist.safetensors"
    refused(typed("sample", toy, "--guide", "0", "--classifier", clean), "no noise-aware classifier")
    refused(typed("sample", toy, "--guide", "inpaint", "--classifier", judge), "`--classifier", "measures")


def test_stiff_guidance_is_told_once(typed: Type, tmp_path: Path) -> None:
    for scale, times in ((3, 0), (1e5, 1)):
        with warnings.catch_warnings(record=True) as got:
            warnings.simplefilter("always")
            ran = typed("sample", "zoo:digits", "--guide", 3, "--transition", "strang", "--steps", 4, "--scale", scale,
                        "-n", 4, "--out", tmp_path / "grid.png")  # fmt: skip
        assert ran.code == 0, ran.err
        assert [str(w.message)[:22] for w in got] == ["the guidance is stiff:"] * times


def test_guidance_that_blows_up_names_level_and_scale(typed: Type, tmp_path: Path, toy: Path) -> None:
    options = {"channels": 1, "classes": 2, "width": 8}
    classifier = NoisyClassifier(Classifier(**options), PROCESSES["vp"], classes=("top", "bottom"), shape=(1, 8, 8))
    with torch.no_grad():
        classifier.net.out.bias.fill_(float("nan"))
    file = tmp_path / "nan.safetensors"
    file.write_bytes(packed(classifier.net.state_dict(), classifier.facts(options)))
    ran = typed("sample", toy, "--guide", "top", "--classifier", file, "--scale", 7, "-n", 2, "--out", tmp_path / "x.png")
    refused(ran, "in step 0", "Classified", "not finite for 2 of 2", "lam = ", "scale 7")
    assert not (tmp_path / "x.png").exists()


def test_help_shows_how(typed: Type) -> None:
    ran = typed("sample", "--help")
    assert "--guide" in ran.out
    assert "superres:4" in ran.out
    assert "--images" in typed("train-classifier", "--help").out


def test_a_warning_is_one_line_without_code(tmp_path: Path) -> None:
    words = ["--guide", "3", "--transition", "strang", "--steps", "4", "--scale", "1e5", "-n", "4", "--out", "grid.png"]
    ran = subprocess.run([sys.executable, "-m", "quieten", "sample", "zoo:digits", *words], cwd=tmp_path,
                         capture_output=True, text=True, check=True)  # fmt: skip
    lines = [line for line in ran.stderr.splitlines() if "stiff" in line]
    assert [line[:43] for line in lines] == ["quieten: warning: the guidance is stiff: |h"]
    assert "forward_call" not in ran.stderr
