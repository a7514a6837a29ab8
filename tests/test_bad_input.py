"""What people get wrong, at the border: one line that names the argument, the value and the remedy; nothing is damaged.

Every module tests its own refusals; this is one walk over the list, through the public functions and the command line.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import quieten as q
from quieten.cli import main
from quieten.data import load
from quieten.fit import fit
from quieten.report import Report
from quieten.training.config import load_recipe
from quieten.training.runs import Run, export
from quieten.training.runs import load as load_run
from toy import toy_data, toy_run

INF = math.inf
X = torch.zeros(2, 1, 8, 8)
Act = Callable[[Path], Any]


class Zero(nn.Module):
    def forward(self, x: Tensor, t: Tensor, **_: Any) -> Tensor:
        return torch.zeros_like(x)


def denoiser(form: str = "v", process: Any = q.VP) -> q.Preconditioned:
    return q.Preconditioned(Zero(), process, form, shape=(1, 8, 8))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    run = toy_run(tmp_path_factory.mktemp("bad") / "toy", "train.images=16", "model.net.width=8")
    fit(run, data=toy_data())
    return run.path


@pytest.fixture
def place(tmp_path: Path, trained: Path) -> Path:
    """A folder with a copy of that run, `toy`, and pictures in `pictures`, one of which is cut short."""
    shutil.copytree(trained, tmp_path / "toy")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pictures").mkdir()
    for k in range(3):
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (9, 9, 3), np.uint8)).save(tmp_path / "pictures" / f"{k}.png")
    cut = tmp_path / "pictures" / "1.png"
    cut.write_bytes(cut.read_bytes()[:150])
    (tmp_path / "notes.png").write_text("no picture")
    return tmp_path


def said(act: Act, place: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a refusal: of the ValueError, or what the command line prints before it exits with status 2."""
    capsys.readouterr()
    with pytest.raises((ValueError, SystemExit)) as refusal:
        act(place)
    if isinstance(refusal.value, ValueError):
        return str(refusal.value)
    captured = capsys.readouterr()
    assert (refusal.value.code, captured.out) == (2, "")
    return captured.err.strip()


def contents(place: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


# ---- acts


def typed(*arguments: str) -> Act:
    """A command line; HERE stands for the folder."""
    return lambda place: main([argument.replace("HERE", str(place)) for argument in arguments])


def with_recipe(text: str) -> Act:
    def act(place: Path) -> None:
        (place / "mine.yaml").write_text("version: 1\nname: mine\ndata: {name: digits}\n" + text)
        main(["train", str(place / "mine.yaml"), "--out", str(place / "run")])

    return act


def of_another_architecture(place: Path) -> None:
    file = place / "toy" / "config.yaml"
    assert "width: 8" in file.read_text()
    file.write_text(file.read_text().replace("width: 8", "width: 12"))
    main(["sample", str(place / "toy"), "--out", str(place / "x.png")])


def truncated(name: str, *arguments: str) -> Act:
    def act(place: Path) -> None:
        file = next((place / "toy").glob(name))
        content = file.read_bytes()
        file.unlink()  # the weights beside the config are hard links to those of the checkpoint
        file.write_bytes(content[: len(content) // 2])
        main([argument.replace("HERE", str(place)) for argument in arguments])

    return act


CASES: dict[str, tuple[Act, list[str]]] = {
    # wrong shape
    "shape of a state": (
        lambda _: denoiser()(torch.zeros(2, 3, 8, 8), 0.0),
        ["`x`", "(2, 3, 8, 8)", "must have shape (B, 1, 8, 8)"],
    ),
    "shape of a state in the loop": (
        lambda _: q.sample(denoiser(), torch.zeros(2, 8, 8), q.karras(2)),
        ["`x`", "(2, 8, 8)", "must have shape (B, 1, 8, 8)"],
    ),
    "shape of a level": (lambda _: denoiser()(X, torch.zeros(3)), ["`lam`", "(3,)", "float or have shape () or (2,)"]),
    "shape of a condition": (
        lambda _: q.generate(denoiser(), 3, grid=q.karras(2), cond={"label": torch.zeros(2)}),
        ["`label`", "2 rows for 3", "give one for each"],
    ),
    "shape of an array": (
        lambda place: (np.savez(place / "a.npz", images=np.zeros((4, 8, 8, 5), np.uint8)), load(place / "a.npz")),
        ["a.npz", "(4, 8, 8, 5)", "save images as uint8 (N, H, W, 1 or 3)"],
    ),
    # wrong dtype
    "half precision state": (
        lambda _: q.sample(denoiser(), X.half(), q.karras(2)),
        ["`x`", "torch.float16", "float32 or float64"],
    ),
    "integer state": (lambda _: denoiser()(X.long(), 0.0), ["`x`", "torch.int64", "float32 or float64"]),
    "half precision generate": (
        lambda _: q.generate(denoiser(), 1, grid=q.karras(2), dtype=torch.bfloat16),
        ["`dtype`", "torch.bfloat16", "float32 or float64"],
    ),
    "dtype of an array": (
        lambda place: (np.savez(place / "a.npz", images=np.zeros((4, 8, 8), np.int32)), load(place / "a.npz")),
        ["a.npz", "int32", "save images as uint8"],
    ),
    # grids
    "grid that falls and rises": (
        lambda _: q.generate(denoiser(), 1, grid=torch.tensor([-5.0, 2.0, 1.0, INF])),
        ["`grid`", "[-5, 2, 1, inf]", "sort it, drop duplicates"],
    ),
    "grid that repeats": (
        lambda _: q.sample(denoiser(), X, torch.tensor([-5.0, 1.0, 1.0, INF]), q.Heun()),
        ["`grid`", "[-5, 1, 1, inf]", "sort it, drop duplicates"],
    ),
    "grid with NaN": (
        lambda _: q.generate(denoiser(), 1, grid=torch.tensor([-5.0, math.nan])),
        ["`grid`", "nan", "without NaN"],
    ),
    "grid of no steps": (lambda _: q.karras(0), ["`steps`", "0", "positive integer"]),
    # levels
    "lam_s below lam_t": (lambda _: q.VP.bridge(X, X, 0.3, -1.2), ["`lam_s`", "-1.2 < 0.3", "from noise to data"]),
    "lam_s below lam_t for one row": (
        lambda _: q.VP.bridge(X, X, torch.tensor([0.0, 0.3]), torch.tensor([1.0, -1.2])),
        ["`lam_s`", "[1.0, -1.2", "< [0.0, 0.3", "from noise to data"],
    ),
    "eps at alpha = 0": (
        lambda _: q.generate(denoiser("eps"), 1, grid=torch.tensor([-INF, 0.0, INF])),
        ["'eps'", "alpha=0", "use a 'v', 'flow' or 'x0' model, or start from a finite log-SNR"],
    ),
    # data
    "empty folder": (typed("train", "HERE/empty", "--out", "HERE/run"), ["HERE/empty", "no images", "name a folder that does"]),
    "corrupt image": (typed("train", "HERE/pictures", "--out", "HERE/run"), ["1.png", "cannot be read", "repair or remove it"]),
    "no data there": (
        typed("train", "HERE/nowhere", "--out", "HERE/run"),
        ["HERE/nowhere", "digits, emoji, fashion-mnist", "a folder of images"],
    ),
    "a picture alone": (typed("train", "HERE/notes.png", "--out", "HERE/run"), ["HERE/notes.png", "no folder", "digits"]),
    # recipes
    "unknown key": (with_recipe("train: {bach: 3}"), ["`train.bach`", "mine.yaml", "did you mean 'batch'?"]),
    "unknown section": (with_recipe("modle: {form: v}"), ["`modle`", "did you mean 'model'?"]),
    "unknown key typed": (
        typed("train", "digits", "--set", "model.net.widht=3", "--out", "HERE/run"),
        ["`widht`", "'unet'", "did you mean 'width'?"],
    ),
    "unknown option of a sampler": (
        with_recipe("sample: {transition: {kind: ddim, eat: 1}}"),
        ["`sample.transition`", "`eat`", "did you mean 'eta'?"],
    ),
    "wrong type": (with_recipe("train: {batch: big}"), ["`train.batch`", "'big'", "must be a valid integer"]),
    "value out of range": (with_recipe("objective: {drop: 2}"), ["`objective.drop`", "2", "less than or equal to 1"]),
    "unknown recipe": (lambda _: load_recipe("digitz"), ["'digitz'", "did you mean 'digits'?"]),
    # checkpoints
    "another architecture": (
        of_another_architecture,
        ["ema.safetensors", "does not fit", "has shape", "use the config it was trained with"],
    ),
    "truncated weights": (
        truncated("ema.safetensors", "sample", "HERE/toy", "--out", "HERE/x.png"),
        ["ema.safetensors", "truncated", "restore it from a copy, or train again"],
    ),
    "truncated optimiser": (
        truncated("state/step-*/optimizer.pt", "train", "digits", "--out", "HERE/toy", "--set=name=toy"),
        ["optimizer.pt", "damaged", "restore it from a copy, or remove"],
    ),
    "no weights in the file": (
        lambda place: ((place / "x.safetensors").write_bytes(b""), load_run(place / "x.safetensors")),
        ["x.safetensors", "truncated or damaged", "restore it from a copy"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_line_that_says_what_to_do(
    case: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "truncated optimiser":  # the toy's data set has no name that `train` knows
        monkeypatch.setattr("quieten.fit.load_data", lambda _: toy_data())
    act, pieces = CASES[case]
    message = said(act, place, capsys)
    assert "\n" not in message
    assert "Traceback" not in message
    for piece in pieces:
        assert piece.replace("HERE", str(place)) in message, f"{piece!r} is not in {message!r}"
    assert not (place / "run").exists(), "a run that never began leaves nothing behind"
    assert not list(place.rglob("*.part"))


# ---- a full disk


@contextlib.contextmanager
def files_cannot_grow(limit: int = 4096) -> Iterator[None]:
    """The system refuses to let any file grow beyond so many bytes: EFBIG where a full disk says ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def full(place: Path) -> Iterator[None]:
    """The rest of a small disk is taken."""
    with (place / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        (place / "ballast").unlink()


@pytest.fixture(params=["limit", "disk"])
def disk(request: pytest.FixtureRequest, tmp_path: Path, trained: Path) -> Iterator[tuple[Path, Any]]:
    """A folder with a run, and a context in which its disk is full: a limit, or the real thing where mounting is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "limit":
        shutil.copytree(trained, folder / "toy")
        yield folder, files_cannot_grow()
        return
    size = 3 * sum(path.stat().st_size for path in trained.rglob("*") if path.is_file())
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root, and a system that allows it")
    try:
        shutil.copytree(trained, folder / "toy")
        yield folder, full(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # tensors may still be mapped from its files


def keep_training(folder: Path) -> None:
    run = Run.open(folder / "toy")
    fit(Run(run.path, run.recipe.model_copy(update={"train": run.recipe.train.model_copy(update={"images": 32})})),
        data=toy_data())  # fmt: skip


WRITES: dict[str, Act] = {
    "a checkpoint": keep_training,
    "pictures": lambda folder: main(["sample", str(folder / "toy"), "-n", "400", "--out", str(folder / "x.png")]),
    "arrays": lambda folder: main(
        ["sample", str(folder / "toy"), "-n", "400", "--out", os.devnull + ".png", "--npz", str(folder / "x.npz")]
    ),
    "an exported model": lambda folder: export(Run.open(folder / "toy"), folder / "toy.safetensors"),
}


@pytest.mark.parametrize("what", WRITES)
def test_a_full_disk_is_one_line_and_damages_nothing(
    what: str, disk: tuple[Path, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, no_room = disk
    if what == "arrays":  # only the arrays are to fail
        monkeypatch.setattr("quieten.reports.plots.save_grid", lambda *_, **__: None)
        monkeypatch.setattr("quieten.commands.sample._target", lambda _, path, __: path)
    before = contents(folder)
    weights = load_file(folder / "toy" / "ema.safetensors")
    with no_room:
        message = said(WRITES[what], folder, capsys)
    assert "\n" not in message
    assert "cannot be written" in message
    assert str(folder) in message
    assert "make room or name another folder" in message
    assert "is intact" in message
    after = contents(folder)
    lines = "toy/metrics.jsonl"  # what was logged before the disk was full stays
    assert after.pop(lines).startswith(before.pop(lines))
    new = {name for name in after if name not in before}
    assert all(name.startswith("toy/samples/") for name in new), f"left behind: {new}"
    assert {name: after[name] for name in before} == before
    again = load_file(folder / "toy" / "ema.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())
    if what == "a checkpoint":  # with room again, training goes on from where it was saved
        keep_training(folder)
        checkpoint = Run.open(folder / "toy").read()
        assert checkpoint is not None
        assert checkpoint.step == 4


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    file = Report("old").text("old").save(tmp_path / "report.html")
    old = file.read_bytes()
    with files_cannot_grow(1024), pytest.raises(OSError, match="File too large"):
        Report("new").text("new" * 10_000).save(file)
    assert file.read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
