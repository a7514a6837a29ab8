"""The training loop: exact resume, keyed randomness, averages, and what happens when something goes wrong."""

import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import quieten.training.watch
from quieten.data import Dataset
from quieten.fit import fit, train
from quieten.training.config import with_overrides
from quieten.training.loop import learning_rate
from quieten.training.runs import Run
from quieten.training.schema import Train
from toy import toy_data, toy_run


def same(a: Run, b: Run) -> None:
    """Both runs hold the same checkpoint and the same losses, bit for bit."""
    first, second = a.read(), b.read()
    assert first is not None
    assert second is not None
    assert first.step == second.step
    for ours, theirs in ((first.model, second.model), (first.ema, second.ema)):
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    moments = first.optimizer["state"], second.optimizer["state"]
    assert all(torch.equal(moments[0][k][m], moments[1][k][m]) for k in moments[0] for m in moments[0][k])
    drop = {"seconds", "images_per_s"}
    losses = [[{k: v for k, v in row.items() if k not in drop} for row in run.metrics()] for run in (a, b)]
    assert losses[0] == losses[1]


def at(step: int, act: Callable[[], Any]) -> Callable[[dict[str, Any]], None]:
    """A callback that acts once, at a step."""
    return lambda row: act() if row["step"] == step else None


def interrupt(number: int = signal.SIGINT) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


# ---- resume


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("overrides", [(), ("train.accumulate=2", "model.net={kind: mlp, width: 8}", "data.flip=false")])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, overrides: tuple[str, ...], number: int) -> None:
    whole, parts = toy_run(tmp_path / "whole", *overrides), toy_run(tmp_path / "parts", *overrides)
    assert fit(whole, data=toy_data()).done
    stopped = fit(parts, data=toy_data(), callbacks=[at(3, interrupt(number))])
    assert (stopped.done, stopped.step, stopped.images) == (False, 3, 24)
    assert f"stopped by {signal.Signals(number).name} at step 3 of 8" in stopped.message
    assert "the same command goes on" in stopped.message
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)
    ended = fit(Run.open(parts.path), data=toy_data())
    assert (ended.done, ended.step, ended.images) == (True, 8, 64)
    same(whole, parts)


def test_a_crash_between_checkpoints_resumes_from_the_last_one(tmp_path: Path) -> None:
    whole, parts = (toy_run(tmp_path / name, "train.save_every=16") for name in ("whole", "parts"))
    fit(whole, data=toy_data())

    def crash() -> None:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fit(parts, data=toy_data(), callbacks=[at(5, crash)])
    checkpoint = parts.read()
    assert checkpoint is not None
    assert checkpoint.step == 4
    assert parts.metrics()[-1]["step"] == 5
    fit(parts, data=toy_data())
    same(whole, parts)


def test_a_second_signal_interrupts_at_once_and_damages_nothing(tmp_path: Path) -> None:
    run = toy_run(tmp_path / "run", "train.save_every=16")

    def twice(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(run, data=toy_data(), callbacks=[twice])
    checkpoint = run.read()
    assert checkpoint is not None
    assert checkpoint.step == 2


def test_a_finished_run_stays_as_it_is_and_can_be_prolonged(tmp_path: Path) -> None:
    run, longer = (
        toy_run(tmp_path / "run", "train.images=32", "train.decay=constant"),
        toy_run(tmp_path / "b", "train.decay=constant"),
    )
    fit(run, data=toy_data())
    before = (run.path / "ema.safetensors").read_bytes()
    assert fit(run, data=toy_data()).done
    assert (run.path / "ema.safetensors").read_bytes() == before
    fit(Run(run.path, with_overrides(run.recipe, ["train.images=64"])), data=toy_data())
    fit(longer, data=toy_data())
    same(run, longer)


def test_previews_and_logging_change_nothing(tmp_path: Path) -> None:
    plain, busy = (
        toy_run(tmp_path / "plain", "train.log_every=4"),
        toy_run(tmp_path / "busy", "train.log_every=4", "train.preview_every=16"),
    )
    state = torch.get_rng_state()
    for run in (plain, busy):
        fit(run, data=toy_data())
        torch.randn(3)
    same(plain, busy)
    assert len(list((busy.path / "samples").glob("*.png"))) == 4
    assert len(list((plain.path / "samples").glob("*.png"))) == 1  # the last one always
    torch.set_rng_state(state)


def test_training_works_outside_the_main_thread(tmp_path: Path) -> None:
    run, ended = toy_run(tmp_path / "run", "train.images=16"), []
    thread = threading.Thread(target=lambda: ended.append(fit(run, data=toy_data())))
    thread.start()
    thread.join()
    assert ended[0].done


# ---- what a step is


def test_accumulated_parts_add_up_to_the_batch(tmp_path: Path) -> None:
    still = "model.net.dropout=0"
    runs = [toy_run(tmp_path / str(n), still, f"train.accumulate={n}") for n in (1, 2, 4)]
    for run in runs:
        fit(run, data=toy_data())
    losses = torch.tensor([[row["loss"] for row in run.metrics()] for run in runs])
    torch.testing.assert_close(losses[1:], losses[:1].expand(2, -1), rtol=1e-5, atol=0)


def test_the_average_has_the_half_life_that_the_recipe_says(tmp_path: Path) -> None:
    run = toy_run(tmp_path / "run", "train.ema=20", "train.ema_warmup=0.5", "train.decay=constant")
    expected = None
    for step in range(1, 9):
        fit(Run(run.path, with_overrides(run.recipe, [f"train.images={8 * step}"])), data=toy_data())
        checkpoint = run.read()
        assert checkpoint is not None
        name = "denoiser.net.detail.weight"
        if expected is None:
            start = toy_run(tmp_path / "start", "train.lr=1e-30", "train.images=8")
            fit(start, data=toy_data())
            expected = load_file(start.path / "model.safetensors")[name].double()
        keep = 0.5 ** (8 / min(20, 0.5 * 8 * step))
        expected = keep * expected + (1 - keep) * checkpoint.model[name].double()
        torch.testing.assert_close(checkpoint.ema[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_the_learning_rate_rises_and_falls() -> None:
    plan = Train(lr=2.0, warmup=40, batch=10, images=1000)
    rates = [learning_rate(plan, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.5)
    assert rates[50] == pytest.approx(1.0)
    assert rates[99] < 1e-3
    assert max(rates) == max(rates[:5])
    constant = [learning_rate(plan.model_copy(update={"decay": "constant"}), step, 100) for step in range(100)]
    assert constant[3:] == [2.0] * 97


def test_training_learns(tmp_path: Path) -> None:
    run = toy_run(
        tmp_path / "run", "train.images=3200", "train.batch=32", "train.lr=5e-3", "model.net.dropout=0", "train.log_every=10"
    )
    fit(run, data=toy_data())
    losses = [row["loss"] for row in run.metrics()]
    assert losses[-1] < 0.6 * losses[0]
    assert {"step", "images", "loss", "grad_norm", "lr", "images_per_s", "seconds"} == set(run.metrics()[0])


@pytest.mark.parametrize("net", ["{kind: mlp, width: 8}"])
def test_vectors_and_unlabelled_data_train_too(tmp_path: Path, net: str) -> None:
    data = Dataset("points", torch.randn(20, 2), None, ())
    run = toy_run(tmp_path / "run", f"model.net={net}", "data.flip=false", data=data)
    assert fit(run, data=data).done
    assert run.denoiser()(torch.randn(3, 2), 0.0).mean.shape == (3, 2)


def test_a_learned_schedule_is_trained_averaged_and_saved(tmp_path: Path) -> None:
    run = toy_run(tmp_path / "run", "objective.schedule={kind: linear, learned: true}", "objective.weighting=likelihood")
    fit(run, data=toy_data())
    checkpoint = run.read()
    assert checkpoint is not None
    ends, mean = checkpoint.model["objective.schedule.ends"], checkpoint.ema["objective.schedule.ends"]
    assert (ends != torch.tensor([13.3, -5.0])).all()
    assert (mean != ends).all()


def test_bfloat16_is_for_the_network_only(tmp_path: Path) -> None:
    runs = [toy_run(tmp_path / precision, f"train.precision={precision}", "train.images=16") for precision in ("fp32", "bf16")]
    for run in runs:
        fit(run, data=toy_data())
    full, half = (run.metrics()[-1]["loss"] for run in runs)
    assert full != half
    assert half == pytest.approx(full, rel=0.03)
    assert all(tensor.dtype == torch.float32 for tensor in load_file(runs[1].path / "model.safetensors").values())


# ---- trouble


def poisoned(*places: int) -> Dataset:
    data = toy_data()
    assert isinstance(data.images, torch.Tensor)
    data.images[list(places), 0, 3, 3] = math.nan
    return data


def test_a_loss_that_is_not_finite_names_its_batch_and_stops(tmp_path: Path) -> None:
    run = toy_run(tmp_path / "run", "train.save_every=8")
    fit(Run(run.path, with_overrides(run.recipe, ["train.images=16"])), data=toy_data())
    before = (run.path / "model.safetensors").read_bytes()
    with pytest.raises(
        ValueError, match=r"not finite at step [34], for data indices (7, 11|11, 7|7|11): the batch is saved in"
    ) as caught:
        fit(run, data=poisoned(7, 11))
    step = int(str(caught.value).split("step ")[1][0])
    batch = load_file(run.path / "state" / f"bad-batch-{step:09d}.safetensors")
    assert batch["index"][batch["x0"].isnan().flatten(1).any(1)].tolist()
    checkpoint = run.read()
    assert checkpoint is not None
    assert checkpoint.step == step - 1
    if step == 3:
        assert (run.path / "model.safetensors").read_bytes() == before


def test_a_bad_step_is_skipped_and_changes_no_weights(tmp_path: Path) -> None:
    run = toy_run(tmp_path / "run", "train.on_nan=skip", "train.decay=constant", "train.log_every=2", "data.flip=false")
    weights = []
    for step in range(1, 9):
        fit(Run(run.path, with_overrides(run.recipe, [f"train.images={8 * step}"])), data=poisoned(7))
        weights.append(load_file(run.path / "model.safetensors")["denoiser.net.detail.weight"])
    still = [step for step in range(2, 9) if torch.equal(weights[step - 1], weights[step - 2])]
    saved = sorted(int(file.stem[-9:]) for file in (run.path / "state").glob("bad-batch-*"))
    assert still == saved
    assert len(saved) in (1, 2)  # once an epoch of 30 examples
    assert all(weight.isfinite().all() for weight in weights)


def test_skipped_steps_are_counted_in_the_metrics(tmp_path: Path) -> None:
    run = toy_run(tmp_path / "run", "train.on_nan=skip", "train.log_every=4")
    assert fit(run, data=poisoned(7)).done
    rows = run.metrics()
    assert sum(row.get("skipped", 0) for row in rows) == len(list((run.path / "state").glob("bad-batch-*")))
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_training_gives_up_when_no_step_is_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quieten.training.watch, "HOPELESS", 6)
    run = toy_run(tmp_path / "run", "train.on_nan=skip", "train.log_every=3")
    with pytest.raises(ValueError, match="none of the last 6 steps had a finite loss"):
        fit(run, data=poisoned(*range(30)))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    run = toy_run(tmp_path / "run", "train.accumulate=3")
    with pytest.raises(ValueError, match=r"`train.batch` = 8 must divide into 3 parts"):
        fit(run, data=toy_data())
    other = Dataset("other", torch.zeros(9, 1, 12, 12), None, ())
    with pytest.raises(ValueError, match=r"examples of shape \(1, 12, 12\), the recipe was made for \(1, 8, 8\)"):
        fit(run, data=other)


# ---- train: from a recipe to a run


SMALL = ("train.images=256", "train.batch=32", "model.net={kind: mlp, width: 16}", "train.previews=10")


def test_train_makes_a_run_resumes_it_and_takes_changes(tmp_path: Path) -> None:
    out = tmp_path / "digits"
    assert train("digits", SMALL, out).images == 256
    assert train("digits", SMALL, out).images == 256
    assert train("digits", ["train.images=320"], out).images == 320
    assert Run.open(out).recipe.train.images == 320
    assert Run.open(out).recipe.train.batch == 32
    assert [row["images"] for row in Run.open(out).metrics()] == [256, 320]


def test_train_refuses_what_would_make_another_model(tmp_path: Path) -> None:
    out = tmp_path / "digits"
    train("digits", SMALL, out)
    with pytest.raises(ValueError, match=r"`model` cannot change in the run"):
        train("digits", ["model.net.width=8"], out)
    with pytest.raises(ValueError, match=r"`train.batch` cannot change in the run .* batches of 32"):
        train("digits", ["train.batch=16"], out)
    with pytest.raises(ValueError, match=r"holds a run of 'digits', not of 'emoji': name another folder"):
        train("emoji", [], out)
