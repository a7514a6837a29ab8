"""The command line, end to end with tiny models: what is typed, what is printed, what is written."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import quieten
import quieten.commands.sample
from conftest import Ran, Type
from helpers import within
from quieten.cli import main
from quieten.data import Dataset
from quieten.training.runs import Checkpoint, Run, build_update, export
from toy import toy_data, toy_run

SRC = str(Path(quieten.__file__).parents[1])
ENV = {**os.environ, "PYTHONPATH": SRC, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}
TINY = [
    f"--set={change}"
    for change in (
        "model.net={kind: unet, width: 8, detail: 4}", "train.images=64", "train.batch=16", "train.warmup=16",
        "train.log_every=1", "train.previews=10", "sample.steps=3", "train.ema=100",
    )
]  # fmt: skip


def untrained(path: Path, *overrides: str, data: Dataset | None = None) -> Run:
    """A run whose weights are random: what sampling needs, without training."""
    run = toy_run(path, *overrides, data=data)
    tensors = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in build_update(run.recipe).state_dict().items()}
    run.save(Checkpoint(1, tensors, tensors, {}))
    return run


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two classes, "top" and "bottom"."""
    torch.manual_seed(0)
    return untrained(tmp_path_factory.mktemp("cli") / "toy").path


def refused(ran: Ran, *pieces: str) -> None:
    """Exit status 2, nothing on stdout, and one line on stderr that holds every piece."""
    assert (ran.code, ran.out) == (2, "")
    lines = [line for line in ran.err.strip().splitlines() if not line.startswith("Loading weights: ")]  # transformers' bar
    assert len(lines) == 1, ran.err
    assert lines[0].startswith("quieten: error: ")
    for piece in pieces:
        assert piece in lines[0], f"{piece!r} is not in {lines[0]!r}"


def figures(ran: Ran) -> dict[str, float]:
    """What `sample` prints: seed, evaluations of the network a sample, images/s."""
    assert ran.code == 0, ran.err
    patterns = {"seed": r"seed (-?\d+)", "nfe": r"([\d.]+) network evaluations a sample", "rate": r"([\d.]+) images/s"}
    found = {name: re.search(pattern, ran.out) for name, pattern in patterns.items()}
    assert all(found.values()), ran.out
    return {name: float(match[1]) for name, match in found.items() if match}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


# ---- help


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    program = (
        "import sys, quieten.cli\n"
        "try: quieten.cli.main(sys.argv[1:])\n"
        "finally: print(*sorted({m.partition('.')[0] for m in sys.modules}), file=sys.stderr)"
    )
    for arguments in (["--help"], ["sample", "--help"], ["--version"]):
        ran = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=ENV, check=True)
        assert "quieten" in ran.stdout or ran.stdout.strip() == quieten.__version__
        assert not {"torch", "numpy", "diffusers", "accelerate", "matplotlib"} & set(ran.stderr.split())
    clocks = []
    for _ in range(3):
        before, start = os.times(), time.perf_counter()
        ran = subprocess.run([sys.executable, "-m", "quieten", "--help"], capture_output=True, text=True, env=ENV, check=True)
        wall, after = time.perf_counter() - start, os.times()
        cpu = after.children_user - before.children_user + after.children_system - before.children_system
        clocks.append((cpu, wall))
    assert all(command in ran.stdout for command in ("train", "sample", "demo", "samplers", "recipes"))
    # on an idle machine the processor's time is the wall's; on a busy one the wall's proves nothing
    within(0.5, min(clocks)[0], f"processor seconds for `quieten --help` ({min(wall for _, wall in clocks):.2f} on the wall)")


def test_every_command_explains_itself(typed: Type, monkeypatch: Any) -> None:
    """Groups in order; and examples on lines of their own, so that they can be copied, each of a command that there is."""
    monkeypatch.setenv("COLUMNS", "140")
    whole = typed("--help").out
    assert re.findall(r"─ ([A-Z][a-z ]+) ─", whole) == ["Options", "Train and draw", "Measure", "Look up"]
    groups = {"features": ["train", "stats"], "variance": ["fit", "show"]}
    commands = re.findall(r"^│ ([a-z][a-z-]+) ", whole, re.M)
    assert len(commands) >= 15
    for command in commands:
        for words in [[command, inner] for inner in groups.get(command, [])] or [[command]]:
            told = typed(*words, "--help").out.partition("Examples:")[2]
            examples = [line.split()[1:] for line in re.findall(r"^ +(quieten .*?) *$", told, re.M)]
            assert all(example[0] in commands for example in examples)
            assert command in ("demo", "recipes", "samplers") or any(ex[: len(words)] == words for ex in examples), words


def test_lists(typed: Type) -> None:
    listed = typed("samplers")
    names = [line.split()[0] for line in listed.out.splitlines()]
    assert listed.code == 0
    assert {"ddpm", "ddim", "heun", "dpm++"} <= set(names)
    recipes = typed("recipes").out.splitlines()
    assert {"digits", "fashion-mnist"} <= {line.split()[0] for line in recipes}
    assert all(len(line.split()) > 3 for line in recipes), "each says what it is"


def test_what_is_no_command_is_refused_in_the_usual_way(typed: Type) -> None:
    assert typed().code == 2
    assert typed("trian").code == 2
    assert "--steps" in typed("sample", "x", "--stpes", 3).err


@pytest.mark.parametrize("given, expected", [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "")])
def test_threads_share_processors_unless_told_how_to_wait(typed: Type, monkeypatch: Any, given: dict, expected: str) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that what is set during the test is undone
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    typed("--version")
    assert os.environ.get("GOMP_SPINCOUNT", "") == expected


# ---- train


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of digits, trained for four steps with a sampler of its own."""
    out = tmp_path_factory.mktemp("cli") / "digits"
    own = ["--set=sample.transition={kind: ddim, eta: 0.5}", "--set=sample.grid={kind: karras, rho: 3}"]
    with pytest.raises(SystemExit) as ended:
        main(["train", "digits", "--out", str(out), *TINY, *own])
    assert not ended.value.code
    return out


def test_train_and_resume(typed: Type, tmp_path: Path, digits: Path) -> None:
    assert (digits / "ema.safetensors").is_file()
    assert [row["step"] for row in Run.open(digits).metrics()] == [1, 2, 3, 4]
    assert len(list((digits / "samples").glob("*.png"))) == 1
    first = typed("train", "digits", "--out", tmp_path / "a", *TINY)
    assert first.code == 0
    assert f"{tmp_path / 'a'}: trained on 64 images" in first.out
    assert first.out.splitlines()[-1] == f"quieten sample {tmp_path / 'a'}"
    weights = (tmp_path / "a" / "model.safetensors").read_bytes()
    again = typed("train", "digits", "--out", tmp_path / "a")  # nothing is left to do
    assert again.code == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == weights
    longer = typed("train", "digits", "--out", tmp_path / "a", "--set=train.images=96")
    assert "trained on 96 images" in longer.out
    assert [row["step"] for row in Run.open(tmp_path / "a").metrics()] == [1, 2, 3, 4, 5, 6]
    refused(
        typed("train", "digits", "--out", tmp_path / "a", "--set=model.form=eps"), "`model` cannot change", "another folder"
    )
    refused(typed("train", "emoji", "--out", tmp_path / "a"), "holds a run of 'digits'", "another folder")


def test_train_a_folder_of_images(typed: Type, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for k in range(12):
        Image.new("RGB", (11, 9), (20 * k, 100, 250 - 20 * k)).save(tmp_path / "pictures" / f"{k}.png")
    ran = typed("train", tmp_path / "pictures", "--out", tmp_path / "run", *TINY)
    assert ran.code == 0, ran.err
    assert "trained on 64 images" in ran.out
    assert figures(typed("sample", tmp_path / "run", "-n", 2, "--out", tmp_path / "x.png"))["nfe"] == 3
    assert pixels(tmp_path / "x.png").shape[2] == 3


def test_data_with_an_awkward_name_is_found_and_remembered(typed: Type, tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "a: [b], 'c'"
    folder.mkdir()
    for part in ("train", "t10k"):
        header = np.array([0x00000803, 6, 8, 8], ">i4").tobytes()
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + bytes(range(64)) * 6)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(np.array([0x00000801, 6], ">i4").tobytes() + bytes(range(6)))
    monkeypatch.chdir(tmp_path)
    tiny = [change for change in TINY if "train.ema" not in change]
    for images in (32, 48):
        ran = typed("train", "fashion-mnist", "--data", folder.name, "--out", "run", *tiny, f"--set=train.images={images}")
        assert f"trained on {images} images" in ran.out, ran.err
    assert yaml.safe_load(Path("run/config.yaml").read_text())["data"]["folder"] == str(folder)


@pytest.mark.parametrize(
    "arguments, pieces",
    [
        (["digitz"], ["'digitz'", "did you mean 'digits'?", "a folder of images"]),
        (["digits", "--set=train.bach=3"], ["`train.bach`", "did you mean 'batch'?"]),
        (["digits", "--set=train.batch"], ["`--set`", "'train.batch'", "train.batch=64"]),
        (["digits", "--set=train.batch=0"], ["`train.batch`", "0", "greater than 0"]),
        (["digits", "--set=sample.transition=heum"], ["'heum'", "did you mean 'heun'?"]),
        (["digits", "--set=sample.transition.eat=1"], ["`eat`", "dpm++"]),
        (["fashion-mnist", "--data=nowhere"], ["`--data nowhere`", "leave it out"]),
    ],
)
def test_train_names_mistakes(typed: Type, tmp_path: Path, monkeypatch: Any, arguments: list[str], pieces: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QUIETEN_DATA", raising=False)
    refused(typed("train", *arguments), *pieces)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "quieten", "train", "digits", "--out", str(out), *TINY]
    process = subprocess.Popen(
        [*command, "--set=train.images=10_000_000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV
    )
    try:
        deadline = time.monotonic() + 120
        while not (out / "metrics.jsonl").is_file() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "and saved; the same command goes on from there" in said
    assert "Traceback" not in err
    run = Run.open(out)
    checkpoint = run.read()
    assert checkpoint is not None
    step = checkpoint.step
    assert f" at step {step} of " in said
    images = 16 * (step + 2)
    ended = subprocess.run([*command, f"--set=train.images={images}"], capture_output=True, text=True, env=ENV)
    assert ended.returncode == 0, ended.stderr
    assert f"trained on {images:,} images" in ended.stdout
    assert [row["step"] for row in run.metrics()] == list(range(1, step + 3))


# ---- sample


def test_sample_writes_pictures_and_arrays_and_says_what_it_took(typed: Type, tmp_path: Path, digits: Path) -> None:
    png, npz = tmp_path / "new" / "grid.png", tmp_path / "new" / "x.npz"
    ran = typed("sample", digits, "-n", 20, "--seed", 3, "--out", png, "--npz", npz, "--transition", "heun", "--steps", 4)
    said = figures(ran)
    assert (said["seed"], said["nfe"]) == (3, 2 * 4 - 1)
    assert said["rate"] > 0
    assert "heun in 4 steps" in ran.out
    assert "ema weights" in ran.out
    assert f"{png} and {npz}: 20 samples" in ran.out
    assert pixels(png).shape == (2 * 64 + 2, 10 * 64 + 9 * 2)  # ten classes across
    with np.load(npz, allow_pickle=False) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    assert (images.shape, images.dtype) == ((20, 1, 8, 8), np.uint8)
    assert labels.tolist() == list(range(10)) * 2
    assert pixels(png)[::66, ::66].shape == (2, 10)
    assert np.array_equal(pixels(png)[4:64:8, 4:64:8], images[0, 0]), "the picture shows the samples"


def test_without_options_the_recipe_decides(typed: Type, digits: Path) -> None:
    before = set((digits / "samples").iterdir())
    ran = typed("sample", digits, "-n", 4)
    assert figures(ran)["nfe"] == 3
    assert "ddim in 3 steps, seed 0" in ran.out
    new = set((digits / "samples").iterdir()) - before
    assert [path.name for path in new] == ["ddim-3-seed0.png"]


def test_the_recipe_and_the_command_line_mean_the_same_sampler(typed: Type, tmp_path: Path, digits: Path) -> None:
    """The recipe's eta and rho hold while its sampler and its grid do."""

    def image(*options: object) -> bytes:
        assert typed("sample", digits, "-n", 2, "--out", tmp_path / "x.png", *options).code == 0
        return (tmp_path / "x.png").read_bytes()

    own = image()
    assert image("--transition", "ddim", "--eta", 0.5, "--steps", 3) == own
    assert image("--transition", "ddim", "--option", "eta=0.5", "--steps", 3) == own
    assert image("--grid", "karras") == own
    assert image("--transition", "ddim", "--eta", 0) != own
    plain = untrained(tmp_path / "plain", "sample.transition=heun", "sample.steps=3").path
    assert figures(typed("sample", plain, "--out", tmp_path / "y.png"))["nfe"] == 5


@pytest.mark.parametrize("transition, nfe", [("ddpm", 5), ("heun", 9), ("rk4", 17), ("dpm++", 5), ("churn", 9), ("pc", 10)])
@pytest.mark.parametrize("guided", [False, True])
def test_evaluations_count_what_one_sample_costs(
    typed: Type, tmp_path: Path, toy: Path, transition: str, nfe: int, guided: bool
) -> None:
    options = ["--scale", "2"] if guided else []
    ran = typed(
        "sample", toy, "-n", 5, "--batch", 2, "--steps", 5, "--transition", transition, "--out", tmp_path / "x.png", *options
    )
    assert figures(ran)["nfe"] == (2 * nfe if guided else nfe)
    assert ("two a step for guidance" in ran.out) == guided


def test_a_seed_means_the_same_samples_however_many_and_in_what_batches(typed: Type, tmp_path: Path, toy: Path) -> None:
    def images(name: str, *options: object) -> np.ndarray:
        files = ["--out", tmp_path / f"{name}.png", "--npz", tmp_path / f"{name}.npz"]
        assert typed("sample", toy, "--transition", "ddpm", "--label", "top", *files, *options).code == 0
        with np.load(tmp_path / f"{name}.npz", allow_pickle=False) as arrays:
            return arrays["images"].astype(int)

    whole = images("whole", "-n", 12)
    images("again", "-n", 12)
    assert (tmp_path / "whole.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    assert (tmp_path / "whole.npz").read_bytes() == (tmp_path / "again.npz").read_bytes()
    for batch in (1, 5):  # the noise is bit for bit the same; a network rounds otherwise in another batch: a grey level
        other = images(f"batch{batch}", "-n", 12, "--batch", batch)
        assert abs(whole - other).max() <= 1
        assert (whole != other).mean() < 0.01
    assert abs(whole[:3] - images("fewer", "-n", 3)).max() <= 1
    assert abs(whole - images("seed", "-n", 12, "--seed", 1)).max() > 20


@pytest.mark.parametrize("seed", [-1, 2**70])
def test_any_integer_is_a_seed(typed: Type, tmp_path: Path, toy: Path, seed: int) -> None:
    assert figures(typed("sample", toy, "-n", 1, "--seed", seed, "--out", tmp_path / "x.png"))["seed"] == seed


@pytest.mark.parametrize(
    "label, expected", [(None, [0, 1, 0]), ("all", [0, 1, 0]), ("1", [1, 1, 1]), ("BOTTOM, top", [1, 0, 1]), ("0", [0, 0, 0])]
)
def test_labels(typed: Type, tmp_path: Path, toy: Path, label: str | None, expected: list[int]) -> None:
    options = [] if label is None else ["--label", label]
    assert typed("sample", toy, "-n", 3, "--out", tmp_path / "x.png", "--npz", tmp_path / "x.npz", *options).code == 0
    with np.load(tmp_path / "x.npz", allow_pickle=False) as arrays:
        assert arrays["labels"].tolist() == expected


def test_names_of_files_tell_samples_apart(typed: Type, tmp_path: Path, toy: Path, monkeypatch: Any) -> None:
    file = export(Run.open(toy), tmp_path / "toy.safetensors")
    monkeypatch.chdir(tmp_path)
    for options in ([], ["--scale", "1.5"], ["--label", "top,bottom", "--seed", "7"]):
        assert typed("sample", file, "-n", 2, *options).code == 0
    names = {"dpm++-2-seed0.png", "dpm++-2-seed0-scale1.5.png", "dpm++-2-seed7-top-bottom.png"}
    assert {path.name for path in tmp_path.glob("*.png")} == names


@pytest.mark.parametrize("grid", ["karras", "uniform", "quadratic"])
def test_grids(typed: Type, tmp_path: Path, toy: Path, grid: str) -> None:
    assert figures(typed("sample", toy, "-n", 1, "--grid", grid, "--steps", 4, "--out", tmp_path / "x.png"))["nfe"] == 4


def test_exported_files_and_the_zoo(typed: Type, tmp_path: Path, toy: Path, monkeypatch: Any) -> None:
    file = export(Run.open(toy), tmp_path / "toy.safetensors", half=False)
    monkeypatch.setattr("quieten.training.bundled.ZOO", tmp_path)
    for source, name in ((toy, "run"), (file, "file"), ("zoo:toy", "zoo")):
        assert figures(typed("sample", source, "-n", 4, "--out", tmp_path / f"{name}.png"))["nfe"] == 2
    assert len({(tmp_path / f"{name}.png").read_bytes() for name in ("run", "file", "zoo")}) == 1
    refused(typed("sample", "zoo:toi"), "'zoo:toi'", "known: zoo:toy")


def test_vectors_are_written_as_arrays(typed: Type, tmp_path: Path) -> None:
    data = Dataset("points", 5 * torch.randn(20, 2), None, ())
    run = untrained(tmp_path / "run", "model.net={kind: mlp, width: 8}", "data.flip=false", data=data)
    ran = typed("sample", run.path, "-n", 7)
    assert figures(ran)["nfe"] == 2
    with np.load(run.path / "samples" / "dpm++-2-seed0.npz", allow_pickle=False) as arrays:
        assert (arrays["images"].shape, arrays["images"].dtype) == ((7, 2), np.float32)
    refused(typed("sample", run.path, "--out", tmp_path / "x.png"), "`--out", "x.png", "use --npz")


def test_ctrl_c_while_sampling_leaves_nothing(typed: Type, tmp_path: Path, toy: Path, monkeypatch: Any) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quieten.commands.sample, "generate", interrupted)
    assert typed("sample", toy, "--out", tmp_path / "x.png").code == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, pieces",
    [
        (["--transition", "heunn"], ["transition 'heunn'", "did you mean 'heun'?", "known: "]),
        (["--transition", "rk45", "--option", "rtol"], ["`--option rtol`", "NAME=VALUE"]),
        (["--transition", "rk45", "--option", "rtoll=1"], ["`--option rtoll=1`", "'rk45'", "did you mean 'rtol'?"]),
        (["--transition", "rk45", "--option", "rtol=-1"], ["`rtol`", "-1"]),
        (["--transition", "heun", "--eta", "0.5"], ["`--eta 0.5`", "'heun'", "leave it out"]),
        (["--grid", "leading"], ["`--grid leading`", "'uniform' or 'quadratic'", "leave it out"]),
        (["--label", "botom"], ["`--label botom`", "did you mean 'bottom'?", "number below 2", "top, bottom"]),
        (["--label", "2"], ["`--label 2`", "number below 2"]),
        (["--label", "-1"], ["`--label -1`", "number below 2"]),
        (["--label", "top,"], ["`--label `", "number below 2"]),
        (["--prompt", "a bag"], ["`--prompt 'a bag'`", "takes text", "leave it out"]),
        (["--weights", "best"], ["`weights`", "'best'", "'ema' or 'model'"]),
        (["--device", "warp:3"], ["`--device warp:3`", "try cpu"]),
        (["--out", "x.jpg"], ["`--out x.jpg`", "end it in .png"]),
        (["--npz", "x"], ["`--npz x`", "end it in .npz"]),
    ],
)
def test_sample_names_mistakes_before_it_works(
    typed: Type, tmp_path: Path, toy: Path, monkeypatch: Any, options: list[str], pieces: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quieten.commands.sample, "generate", lambda *_, **__: pytest.fail("the work began"))
    refused(typed("sample", toy, *options), *pieces)
    assert not list(tmp_path.iterdir())


def test_guidance_that_was_never_trained_is_refused(typed: Type, tmp_path: Path) -> None:
    run = untrained(tmp_path / "no-drop", "objective.drop=0")
    refused(typed("sample", run.path, "--scale", 2), "`--scale 2`", "objective.drop above 0")
    data = toy_data()
    bare = untrained(tmp_path / "no-classes", data=Dataset("bare", data.images, None, ()))
    refused(typed("sample", bare.path, "--scale", 2), "`--scale 2`", "leave it out")
    refused(typed("sample", bare.path, "--label", "top"), "`--label top`", "no classes")
    assert typed("sample", bare.path, "-n", 2).code == 0
    own = untrained(tmp_path / "scaled", "sample.scale=2")
    assert figures(typed("sample", own.path, "-n", 2))["nfe"] == 4
    assert figures(typed("sample", own.path, "-n", 2, "--scale", 1))["nfe"] == 2


def test_sources_that_are_not_there(typed: Type, tmp_path: Path, toy: Path, monkeypatch: Any) -> None:
    refused(typed("sample", toy.parent / "toi"), f"did you mean {toy}?", "quieten train")
    refused(typed("sample", "nobody/nothing"), "'nobody/nothing'", "cannot be reached", "local folder")
    monkeypatch.chdir(tmp_path)
    refused(typed("sample", "runs/digits"), "no run in runs/digits", "quieten train RECIPE --out runs/digits")
    toy_run(tmp_path / "runs" / "mine")
    refused(typed("sample", "mine"), "no run in mine", "did you mean runs/mine?")
    refused(typed("sample", "fashion-mnist"), "no run in fashion-mnist", "did you mean zoo:fashion-mnist")
    refused(typed("sample", "runs/mine"), "no ema.safetensors yet", "quieten train")


@pytest.mark.parametrize("option", ["--out", "--npz"])
def test_places_that_cannot_be_written_are_refused_before_the_work(
    typed: Type, tmp_path: Path, toy: Path, monkeypatch: Any, option: str
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(quieten.commands.sample, "generate", lambda *_, **__: pytest.fail("the work began"))
    target = tmp_path / "file" / f"x.{'png' if option == '--out' else 'npz'}"
    refused(typed("sample", toy, option, target), str(target), "cannot be written", "name another folder")
    if os.geteuid():  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        target = tmp_path / "locked" / target.name
        refused(typed("sample", toy, option, target), str(target), "Permission denied", "name another folder")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_debug_switch_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIETEN_DEBUG", "1")
    with pytest.raises(ValueError, match="digitz"):
        main(["train", "digitz"])


def test_running_out_of_memory_is_one_line(typed: Type, toy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB.\nmore")

    monkeypatch.setattr(quieten.commands.sample, "generate", fail)
    refused(typed("sample", toy, "--out", tmp_path / "x.png"), "out of memory", "smaller --batch")


# ---- diffusers


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as diffusers writes it: a class-conditional DDPM of 8x8 pictures."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install 'quieten[diffusers]'")
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "block_out_channels": (8, 8)}
    net = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4, num_class_embeds=3, **blocks
    )
    folder = tmp_path_factory.mktemp("cli") / "pipeline"
    diffusers.DDPMPipeline(net, diffusers.DDPMScheduler(num_train_timesteps=100)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("grid", [None, "leading", "trailing", "linspace", "karras"])
def test_a_diffusers_folder(typed: Type, tmp_path: Path, pipeline: Path, grid: str | None) -> None:
    options = [] if grid is None else ["--grid", grid]
    ran = typed("sample", pipeline, "-n", 3, "--steps", 4, "--transition", "ddim", "--out", tmp_path / "x.png", *options)
    assert figures(ran)["nfe"] == 4
    assert "pretrained weights" in ran.out
    assert pixels(tmp_path / "x.png").shape == (64, 3 * 64 + 2 * 2)  # three classes across


def test_mistakes_with_a_diffusers_folder(typed: Type, pipeline: Path) -> None:
    refused(typed("sample", pipeline, "--label", "3"), "`--label 3`", "number below 3")
    refused(typed("sample", pipeline, "--scale", 2), "`--scale 2`", "leave it out")
    refused(typed("sample", pipeline, "--steps", 101), "`steps`", "100", "101")
    refused(typed("sample", pipeline, "--grid", "zigzag"), "`--grid zigzag`", "'leading', 'trailing'")


def test_prompts(typed: Type, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="needs diffusers: pip install 'quieten[diffusers]'")
    pytest.importorskip("transformers", reason="needs transformers: pip install 'quieten[diffusers]'")
    from test_diffusers_interop import stable_diffusion

    stable_diffusion().save_pretrained(tmp_path / "sd")
    options = ["-n", 2, "--steps", 2, "--out", tmp_path / "x.png"]
    ran = typed("sample", tmp_path / "sd", *options, "--prompt", "a cat", "--scale", 3, "--batch", 1)
    assert figures(ran)["nfe"] == 4
    assert pixels(tmp_path / "x.png").shape[2] == 3, "latents are decoded"
    refused(typed("sample", tmp_path / "sd", *options), "`--prompt` is missing")
    refused(typed("sample", tmp_path / "sd", *options, "--prompt", "a", "--label", "1"), "`--label 1`", "give one")
