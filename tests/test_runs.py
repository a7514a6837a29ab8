"""Runs: what is saved comes back, and nothing that was saved is ever damaged."""

import errno
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quieten.training.runs
from quieten.fit import fit
from quieten.training.runs import Checkpoint, Run, build_update, export, load, load_with_recipe
from toy import toy_data, toy_run


def checkpoint(run: Run, step: int) -> Checkpoint:
    """A checkpoint whose every number is its step."""
    update = build_update(run.recipe)
    same = {name: torch.full_like(tensor, float(step)) for name, tensor in update.state_dict().items()}
    return Checkpoint(step, same, {name: -tensor for name, tensor in same.items()}, {"step": step}, seconds=step / 2)


def check(run: Run, step: int) -> None:
    """The run holds the checkpoint of this step, whole."""
    found = run.read()
    assert found is not None
    assert (found.step, found.seconds, found.optimizer) == (step, step / 2, {"step": step})
    assert all((tensor == step).all() for tensor in found.model.values())
    assert all((tensor == -step).all() for tensor in found.ema.values())
    assert next(run.denoiser("model").parameters()).flatten()[0] == step
    assert next(run.denoiser("ema").parameters()).flatten()[0] == -step
    assert not list(run.path.rglob("*part*"))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return toy_run(tmp_path / "runs" / "toy")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = toy_run(tmp_path_factory.mktemp("trained") / "toy", "train.images=16")
    fit(run, data=toy_data())
    return run


# ---- saving and loading


def test_a_run_opens_as_it_was_made(run: Run) -> None:
    again = Run.open(run.path)
    assert again.recipe == run.recipe
    assert again.read() is None
    with pytest.raises(ValueError, match="holds a run already"):
        Run.create(run.path, run.recipe)


def test_a_checkpoint_comes_back_and_replaces_the_one_before(run: Run) -> None:
    for step in (1, 20, 300):
        run.save(checkpoint(run, step))
        check(run, step)
        check(Run.open(run.path), step)
    assert [folder.name for folder in (run.path / "state").glob("step-*")] == ["step-000000300"]


def test_a_run_is_a_denoiser(trained: Run) -> None:
    denoiser = load(trained.path)
    x = torch.randn(3, 1, 8, 8)
    assert not denoiser.training
    assert not any(p.requires_grad for p in denoiser.parameters())
    ema = denoiser(x, 0.5, label=torch.tensor([0, 1, 2])).mean
    latest = load(trained.path, weights="model")(x, 0.5, label=torch.tensor([0, 1, 2])).mean
    assert ema.shape == x.shape
    assert not torch.equal(ema, latest)
    with pytest.raises(ValueError, match=r"`weights` must be 'ema' or 'model' \(got 'best'\)"):
        load(trained.path, weights="best")


@pytest.mark.parametrize("half, tolerance", [(True, 2e-3), (False, 0.0)])
def test_an_export_is_the_same_model_in_one_file(trained: Run, tmp_path: Path, half: bool, tolerance: float) -> None:
    file = export(trained, tmp_path / "toy.safetensors", half)
    denoiser, recipe = load_with_recipe(file)
    assert recipe == trained.recipe
    assert all(p.dtype == torch.float32 for p in denoiser.parameters())
    assert all(t.dtype == (torch.float16 if half else torch.float32) for t in load_file(file).values())
    x, label = torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2])
    torch.testing.assert_close(
        denoiser(x, 0.5, label=label).mean, load(trained.path)(x, 0.5, label=label).mean, atol=tolerance, rtol=tolerance
    )


def test_the_zoo_is_found_by_name(trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quieten.training.bundled, "ZOO", tmp_path)
    export(trained, tmp_path / "toy.safetensors")
    assert load("zoo:toy").shape == load("zoo:t").shape == (1, 8, 8)
    with pytest.raises(ValueError, match=r"no model 'zoo:tox' comes with the library \(known: zoo:toy\)"):
        load("zoo:tox")
    with pytest.raises(ValueError, match=r"no model 'zoo:' comes"):
        load("zoo:")
    export(trained, tmp_path / "toy-large.safetensors")
    assert load("zoo:to").shape == (1, 8, 8)  # "toy": the other name only adds to it
    export(trained, tmp_path / "top.safetensors")
    with pytest.raises(ValueError, match=r"'zoo:to' is short for several: zoo:top, zoo:toy, zoo:toy-large"):
        load("zoo:to")


def test_variances_go_along_with_an_exported_file(trained: Run, tmp_path: Path) -> None:
    from quieten.covariance import Analytic
    from quieten.covariances.stored import fingerprint, load_variance, save_variance
    from quieten.training.source import open_source

    table = Analytic(torch.tensor([-3.0, 0.0, 3.0]), torch.tensor([0.9, 0.5, 0.1]))
    facts = {"kind": "analytic", "cap": None}
    folder = trained.path / "variance"
    try:
        save_variance(folder, "own", table, {**facts, "trunk": fingerprint(trained.denoiser())})
        save_variance(folder, "other", table, {**facts, "trunk": "0" * 64})
        export(trained, tmp_path / "a.safetensors")
    finally:
        shutil.rmtree(folder)
    opened = open_source(str(tmp_path / "a.safetensors"))
    own = load_variance(opened.variances, "own", opened.denoiser)
    assert torch.equal(own.m, table.m)
    with pytest.raises(ValueError, match="no variance 'other'"):
        load_variance(opened.variances, "other", opened.denoiser)


def test_loading_leaves_the_global_generator_alone(trained: Run) -> None:
    state = torch.get_rng_state()
    load(trained.path)
    assert torch.equal(torch.get_rng_state(), state)


# ---- what can be wrong with a run


def test_a_missing_run_names_those_beside_it(run: Run) -> None:
    with pytest.raises(ValueError, match=r"no run in .*toz \(did you mean .*toy\? runs in .*: toy\): train one with"):
        load(run.path.parent / "toz")
    with pytest.raises(ValueError, match=r"no run in .* \(none in .* either\)"):
        load(run.path / "deeper" / "none")
    with pytest.raises(ValueError, match=r"has no ema.safetensors yet: train it first"):
        load(run.path)


def test_a_damaged_config_is_named(run: Run) -> None:
    (run.path / "config.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"config.yaml cannot be read"):
        Run.open(run.path)


def other_architecture(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    name = next(iter(tensors))
    return {k: v for k, v in tensors.items() if k != name}, f"tensor `{name.removeprefix('denoiser.')}` is missing"


def wrong_shape(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    name = next(name for name in tensors if tensors[name].ndim == 1)
    shape = tuple(tensors[name].shape)
    found = rf"tensor `{name.removeprefix('denoiser.')}` has shape \(1,\) instead of \({shape[0]},\)"
    return {**tensors, name: torch.zeros(1)}, found


def left_over(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    return {**tensors, "denoiser.net.more": torch.zeros(1)}, r"tensor `net.more` is not part of it"


@pytest.mark.parametrize("damage", [other_architecture, wrong_shape, left_over])
def test_another_architecture_names_the_tensor(
    run: Run, damage: Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], str]]
) -> None:
    run.save(checkpoint(run, 1))
    file = run.path / "ema.safetensors"
    tensors, message = damage(load_file(file))
    file.unlink()
    save_file(tensors, file)
    with pytest.raises(ValueError, match=rf"ema.safetensors does not fit the architecture in config.yaml: {message}; use"):
        load(run.path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.pt"])
def test_a_truncated_checkpoint_is_named(run: Run, name: str, keep: int) -> None:
    folder = run.save(checkpoint(run, 1))
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    (folder / name).write_bytes(content[:keep])
    with pytest.raises(ValueError, match=rf"{name} is (missing, truncated or )?damaged \(.*\): restore it from a copy, or"):
        fit(run, data=toy_data())


def test_nothing_is_ever_unpickled(run: Run) -> None:
    folder = run.save(checkpoint(run, 1))
    torch.save({"step": Path("x")}, folder / "optimizer.pt")
    with pytest.raises(ValueError, match=r"optimizer.pt is damaged"):
        run.read()


# ---- interrupted and failing writes


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    "function, call", [*(("write_atomic", k) for k in range(1, 5)), ("sync_folder", 1), ("sync_folder", 2)]
)
def test_a_save_that_fails_anywhere_leaves_a_whole_checkpoint(
    run: Run, monkeypatch: pytest.MonkeyPatch, function: str, call: int, error: BaseException
) -> None:
    run.save(checkpoint(run, 1))
    original, calls = getattr(quieten.training.runs, function), 0

    def failing(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(quieten.training.runs, function, failing)
        expected = ValueError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected, match="No space left .* is intact" if isinstance(error, OSError) else None):
            run.save(checkpoint(run, 2))
    found = run.read()
    assert found is not None
    assert found.step in (1, 2)
    assert next(run.denoiser("model").parameters()).flatten()[0] in (1, 2)
    run.save(checkpoint(run, 3))
    check(run, 3)


def test_a_process_killed_while_saving_leaves_the_checkpoint_before(run: Run) -> None:
    folder = run.save(checkpoint(run, 1))
    shutil.copytree(folder, run.path / "state" / ".part-000000002")
    (run.path / "state" / ".part-000000002" / "optimizer.pt").write_bytes(b"half")
    assert run.latest() == folder
    run.save(checkpoint(run, 3))
    check(run, 3)


def test_the_pointer_may_be_lost(run: Run) -> None:
    run.save(checkpoint(run, 1))
    (run.path / "state" / "latest").unlink()
    check(run, 1)


def test_a_full_disk_damages_nothing(run: Run, tmp_path: Path) -> None:
    """The real thing, as far as it goes without one: the system refuses to let files grow."""
    run.save(checkpoint(run, 1))
    run.log({"step": 1, "loss": 1.0})
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        with pytest.raises(ValueError, match=r"step-000000002 cannot be written \(File too large\): make room .* is intact"):
            run.save(checkpoint(run, 2))
        with pytest.raises(ValueError, match="cannot be written"):
            export(run, tmp_path / "toy.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    check(run, 1)
    assert not list(tmp_path.glob("*toy*safetensors*"))


def test_metrics_survive_a_cut_line_and_rewind(run: Run) -> None:
    for step in range(1, 5):
        run.log({"step": step, "loss": 1 / step})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4]
    run.rewind(2)
    run.log({"step": 3, "loss": 0.0})
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]
