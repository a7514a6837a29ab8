"""Tuning: exact resume, the best policy kept, failures that stop it, two processes as one, and the command line."""

import json
import math
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import quieten.tuning.tune_loop
from conftest import Type
from helpers import refuses
from quieten import generate, open_source
from quieten.commands.score import tuned_energy
from quieten.comparing.lineup import Entrant
from quieten.data import Dataset
from quieten.fit import fit
from quieten.oracle import GaussianData
from quieten.process import VP
from quieten.training.runs import Run
from quieten.training.schema import Train
from quieten.training.source import Source
from quieten.tuning.borrowed import EncoderValue, lends_encoder
from quieten.tuning.monitor import Check
from quieten.tuning.stored import load_policy
from quieten.tuning.tune import PLAN, Outcome, plan_for, tune_policy
from quieten.tuning.tune_loop import draw
from quieten.tuning.tune_start import SMALL, Start, few_grid, make_policy, start_of
from quieten.tuning.yardstick import Yardstick, held_out
from test_distributed import launch
from test_fit import at
from toy import toy_data, toy_run

TRAIN = PLAN.model_copy(
    update={"images": 48, "batch": 8, "log_every": 1, "preview_every": 16, "warmup": 0, "lr": 1e-3, "save_minutes": None}
)
START = Start(T=2, head_start=16, flip=True)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained toy model."""
    run = toy_run(tmp_path_factory.mktemp("toy") / "toy")
    fit(run, data=toy_data())
    return run.path


def tuned(
    model: Path,
    out: Path,
    start: Start = START,
    train: Train = TRAIN,
    callbacks: tuple[Callable[..., Any], ...] = (),
    **given: Any,
) -> Outcome:
    """A tuning of the toy, without a monitor that would stop what is so short."""
    return tune_policy(open_source(str(model)), toy_data(60), toy_data(40), out=out, start=start, train=train, n=20,
                callbacks=callbacks, **given)  # fmt: skip


@pytest.fixture(autouse=True)
def _lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quieten.tuning.tune_loop, "diagnose", lambda reading: [])


def metrics(out: Path, name: str = "dxmi-2") -> list[dict[str, Any]]:
    drop = {"seconds", "images_per_s"}
    return [{k: v for k, v in row.items() if k not in drop} for row in Run.open(out / name).metrics()]


def same(a: Path, b: Path, name: str = "dxmi-2") -> None:
    """Both folders hold the same state, the same figures and the same best policy, bit for bit."""
    first, second = Run.open(a / name).read(), Run.open(b / name).read()
    assert first is not None
    assert second is not None
    assert first.step == second.step
    for ours, theirs in ((first.model, second.model), (first.ema, second.ema)):
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    for optimizer, state in first.optimizer.items():
        for k, moments in state["state"].items():
            assert all(torch.equal(moment, second.optimizer[optimizer]["state"][k][m]) for m, moment in moments.items())
    assert metrics(a, name) == metrics(b, name)
    ours, theirs = (load_file(folder / f"{name}.safetensors") for folder in (a, b))
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


# ---- resume


@pytest.mark.parametrize("step", [1, 3, 4])
def test_interrupted_and_resumed_equals_uninterrupted(toy: Path, tmp_path: Path, step: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert tuned(toy, whole).summary.done
    stop = at(step, lambda: os.kill(os.getpid(), signal.SIGINT))
    stopped = tuned(toy, parts, callbacks=(lambda row: stop(row) if "loss" in row else None,))
    assert (stopped.summary.done, stopped.summary.step) == (False, step)
    assert "the same command goes on from there" in stopped.message
    assert tuned(toy, parts).summary.done
    same(whole, parts)


def test_what_is_saved_holds_everything(toy: Path, tmp_path: Path) -> None:
    tuned(toy, tmp_path)
    checkpoint = Run.open(tmp_path / "dxmi-2").read()
    assert checkpoint is not None
    assert {"policy.transition.log_std", "auxiliary.s2"} <= set(checkpoint.model)
    assert {name.split(".")[0] for name in checkpoint.ema} == {"policy", "value"}
    assert set(checkpoint.optimizer) == {"policy", "value"}
    assert not torch.equal(checkpoint.model["policy.transition.log_std"], checkpoint.ema["policy.transition.log_std"])
    for name in ("samples/step-000000006.png", "curves.png", "metrics.jsonl"):
        assert (tmp_path / "dxmi-2" / name).stat().st_size > 100


def test_the_model_itself_and_the_random_state_stay_as_they_are(toy: Path, tmp_path: Path) -> None:
    source = open_source(str(toy))
    before = {name: tensor.clone() for name, tensor in source.denoiser.state_dict().items()}
    state = torch.get_rng_state()
    tune_policy(source, toy_data(60), toy_data(40), out=tmp_path, start=START, train=TRAIN, n=20)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.denoiser.state_dict().items())


def test_other_options_do_not_go_on_in_the_same_folder(toy: Path, tmp_path: Path) -> None:
    tuned(toy, tmp_path)
    with refuses("`name`", "'dxmi-2'", "--name"):
        tuned(toy, tmp_path, Start(T=2, head_start=8))
    more = TRAIN.model_copy(update={"images": 56})
    assert tuned(toy, tmp_path, train=more).summary.step == 7  # more of the same is welcome


# ---- the choice of the best


def test_the_best_measured_policy_is_kept_and_can_be_sampled(toy: Path, tmp_path: Path) -> None:
    done = tuned(toy, tmp_path)
    rows = [row for row in metrics(tmp_path) if "distance" in row]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert {row["n"] for row in rows} == {20}
    best = min(rows, key=lambda row: row["distance"])
    assert done.distance == best["distance"]
    assert f"at step {best['step']}" in done.message
    assert "n=20" in done.message
    source = open_source(str(toy))
    policy = load_policy(tmp_path, "dxmi-2", source.denoiser)
    x = draw(policy, 20, classes=2)
    again = Yardstick(toy_data(60), toy_data(40), n=20)
    assert again(x).value == pytest.approx(best["distance"], rel=1e-6)
    label = {"label": torch.arange(20) % 2}
    y = generate(policy.denoiser, 20, grid=policy.grid, transition=policy.transition, cond=label, last="draw")
    torch.testing.assert_close(x, y)
    assert policy.facts["distance"] == best["distance"]


def test_a_failing_policy_is_stopped_and_the_best_kept(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = [Check("noise", "fail", 4.0, "the noise of step 0 is 4.00 times what it was: lower tau1, or raise tau2")]
    monkeypatch.setattr(quieten.tuning.tune_loop, "diagnose", lambda reading: failing)
    long = TRAIN.model_copy(update={"images": 160})
    done = tuned(toy, tmp_path, train=long)
    assert done.summary.step == 7  # measured at 2 (just begun), 4 and 6: twice in a row, heard by all at the next step
    assert "stopped by the monitor at step 6 (fail: noise: the noise of step 0" in done.message
    assert done.file is not None
    assert done.checks == failing
    again = tuned(toy, tmp_path, train=long)
    assert again.summary.step == 7
    assert "stopped by the monitor" in again.message


def test_the_monitor_gets_its_figures(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(quieten.tuning.tune_loop, "diagnose", lambda reading: seen.append(reading) or [])
    tuned(toy, tmp_path, Start(T=2, head_start=16, settings={"policy_clip": 1e-9}))
    last = seen[-1]
    assert len(last.cost) == len(last.std) == len(last.explained) == 2
    assert last.gamma == 1.0
    assert last.clipped == 1.0
    assert last.std_start == pytest.approx(make_policy(open_source(str(toy)), START).rhos.tolist())
    known = (
        last.data_energy,
        last.sample_energy,
        last.energy_loss,
        last.largest,
        last.drift,
        last.distance,
        last.best,
        last.floor,
    )
    assert all(value is not None and math.isfinite(value) for value in known)
    assert last.spread.std > 0
    assert seen[0].clipped is None  # the value had its head start


# ---- failures


@pytest.mark.parametrize("when", ["energy", "target"])
def test_what_is_not_finite_stops_and_loses_nothing(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    plain, calls = EncoderValue.forward, [0]

    def broken(self: EncoderValue, x: torch.Tensor, k: Any = None, **cond: Any) -> torch.Tensor:
        out = plain(self, x, k, **cond)
        calls[0] += 1
        bad = calls[0] > 40 and (k == self.T if when == "energy" else k != self.T)
        return out * math.nan if bad else out

    monkeypatch.setattr(EncoderValue, "forward", broken)
    train = TRAIN.model_copy(update={"save_every": 16, "images": 400})
    with pytest.raises(ValueError, match="is not finite") as caught:
        tuned(toy, tmp_path, train=train)
    assert "the last checkpoint is intact" in str(caught.value)
    assert "--name" in str(caught.value)
    run = Run.open(tmp_path / "dxmi-2")
    checkpoint = run.read()
    assert checkpoint is not None
    assert checkpoint.step >= 2
    assert all(tensor.isfinite().all() for tensor in checkpoint.model.values())
    assert list((run.path / "state").glob("bad-batch-*.safetensors"))
    assert load_policy(tmp_path, "dxmi-2", open_source(str(toy)).denoiser).T == 2
    monkeypatch.setattr(EncoderValue, "forward", plain)
    assert tuned(toy, tmp_path, train=train).summary.done


@pytest.mark.parametrize(
    "options, pieces",
    [
        ({"T": 0}, ("`T`", "0")),
        ({"method": "dxmy"}, ("`method`", "'dxmy'", "did you mean 'dxmi'")),
        ({"start": "edm"}, ("`start`", "'edm'", "fastdpm")),
        ({"value": "conv"}, ("`value`", "encoder")),
        ({"train_std": "first"}, ("`train_std`", "fix_last")),
        ({"eta": 0.0}, ("`eta`", "a policy needs noise")),
        ({"adapters": -1}, ("`adapters`", "-1")),
        ({"settings": {"tau": 0.1}}, ("`settings`", "'tau'", "did you mean 'tau")),
        ({"settings": {"gamma": -1.0}}, ("`gamma`", "-1.0")),
        ({"settings": {"betas": 0.9}}, ("'betas'", "plan's")),
    ],
)
def test_choices_that_make_no_sense_are_refused_at_once(options: dict[str, Any], pieces: tuple[str, ...]) -> None:
    with refuses(*pieces):
        Start(**options)


def test_data_that_do_not_fit_are_refused(toy: Path, tmp_path: Path) -> None:
    source = open_source(str(toy))
    with refuses("`data` small", "(1, 4, 4)", "(1, 8, 8)"):
        small = Dataset("small", torch.rand(40, 1, 4, 4), None, ())
        tune_policy(source, small, small, out=tmp_path)
    plain = Dataset("plain", torch.rand(40, 1, 8, 8), None, ())
    with refuses("`data` plain", "no labels"):
        tune_policy(source, plain, plain, out=tmp_path)
    with refuses("`name`", "'a/b'"):
        tuned(toy, tmp_path, name="a/b")
    with refuses("`n`", "16", "8"):
        Yardstick(toy_data(60), toy_data(40), n=8)
    with refuses("`distance`", "'fid'", "sliced"):
        Yardstick(toy_data(60), toy_data(40), "fid", 20)
    with refuses("`data` toy", "100 examples", "too few"):
        held_out(toy_data(100), "nowhere")


# ---- what it starts from


@pytest.mark.parametrize(
    "start",
    [
        Start(T=3, head_start=0, eta=0.5, start="ddim"),
        Start(T=2, head_start=0, start="fastdpm"),
        Start(T=2, head_start=0, adapters=2, value="residual", width=4),
        Start(T=2, head_start=0, value="perceptron", width=16, train_std="all"),
        Start(T=1, head_start=0, settings={"time_cost": "sigmoid", "n_generator": "all", "value_clip": 0.1}),
        Start(T=2, head_start=0, settings={"n_critic": 2, "entropy_in_value": 0, "velocity_in_value": 0}),
        Start(T=2, head_start=0, method="sft-pg", settings={"n_generator": 2}),
        Start(T=2, head_start=0, method="sft-ppo"),
        Start(T=3, head_start=0, energy="own"),
        Start(T=2, head_start=0, energy="own", value="perceptron", width=8),
        Start(T=2, head_start=0, energy="own", value="residual", width=4),
        Start(T=2, head_start=0, method="bptt"),
    ],
    ids=lambda start: f"{start.method}-{start.start}-{start.T}-{start.value}",
)
@pytest.mark.filterwarnings("ignore:a chain of")
def test_every_start_tunes_saves_and_loads(toy: Path, tmp_path: Path, start: Start) -> None:
    train = TRAIN.model_copy(update={"images": 16})
    done = tuned(toy, tmp_path, start, train, name="it")
    assert done.summary.done
    source = open_source(str(toy))
    policy = load_policy(tmp_path, "it", source.denoiser)
    assert policy.T == start.T
    before, after = make_policy(source, start), draw(policy, 8, classes=2)
    assert torch.equal(before.grid, policy.grid)
    assert (draw(before, 8, classes=2) - after).abs().max() > 1e-6
    checkpoint = Run.open(tmp_path / "it").read()
    assert checkpoint is not None
    trained = [name for name in checkpoint.model if name.startswith("policy.denoiser") and "adapter" in name]
    assert bool(trained) == bool(start.adapters)


def test_vectors_are_tuned_by_a_perceptron(tmp_path: Path) -> None:
    class Scaled(GaussianData):
        """Has a weight, so that there is something to tune."""

        def __init__(self) -> None:
            super().__init__(torch.tensor([1.0, -1.0]), torch.tensor([0.2, 0.1]), VP)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Any, lam: Any, **cond: Any) -> Any:
            p = super().forward(x, lam, **cond)
            return type(p)(p.mean * self.scale, p.var)

    data = Dataset("pairs", torch.randn(200, 2) * torch.tensor([0.2, 0.1]).sqrt() + torch.tensor([1.0, -1.0]), None, ())
    source = Source(Scaled(), lambda steps, spacing: few_grid(steps), tmp_path, policies=(tmp_path / "policy",))
    assert not lends_encoder(source.denoiser)
    done = tune_policy(source, data, data, start=Start(T=2, head_start=0), train=TRAIN, n=100)
    assert done.file == tmp_path / "policy" / "dxmi-2.safetensors"
    assert "Frechet (pixels)" in done.message


def test_held_out_data_are_those_of_a_test_split_or_every_tenth() -> None:
    from quieten.data import load

    digits = load("digits")
    kept, held = held_out(digits, "digits")
    assert (len(kept), len(held)) == (1498, 299)
    own = toy_data(200)
    kept, held = held_out(own, "no such set")
    assert (len(kept), len(held)) == (180, 20)
    yardstick = Yardstick(toy_data(60), toy_data(40), "sliced", 30)
    assert "sliced Wasserstein, n=30 against 40 held out" in yardstick.about
    assert yardstick(yardstick.real).value == yardstick.floor.value < yardstick(yardstick.real + 1.0).value


def test_the_defaults_are_those_that_are_documented() -> None:
    assert start_of("dxmi", {"T": 3, "eta": None}) == Start(T=3)
    assert [round(math.exp(-0.5 * lam), 3) for lam in few_grid(4).tolist()] == [10.0, 3.687, 1.059, 0.2, 0.0]
    assert SMALL["time_cost"] is None
    with refuses("`sigma_min`", "sigma_max"):
        few_grid(4, 3.0, 2.0)


# ---- the value that borrows


def test_a_borrowed_encoder_tells_states_and_classes_apart_and_lends_nothing_back(toy: Path) -> None:
    policy = make_policy(open_source(str(toy)), Start(T=3))
    value = EncoderValue(policy, 16, 2)
    x, label = torch.randn(6, 1, 8, 8), torch.arange(6) % 2
    k = torch.tensor([0, 1, 2, 3, 3, 0])
    rows = value(x, k, label=label)
    each = torch.cat([value(x[i : i + 1], int(k[i]), label=label[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(rows, each)
    assert (value(x, 0, label=label) - value(x, 3, label=label)).abs().min() > 1e-6
    value(x, 3, label=label).sum().backward()
    assert all(p.grad is None for p in policy.parameters())
    with refuses("`label`", "2 classes"):
        value(x, 1)
    with refuses("`k`", "0..3", "4"):
        value(x, 4, label=label)
    assert value(x[:0], 1, label=label[:0]).shape == (0,)


# ---- processes and the command line


def distributed(model: Path, out: Path) -> Outcome:
    train = TRAIN.model_copy(update={"batch": 8, "images": 40, "lr": 1e-4})
    start = Start(T=2, head_start=8, settings={"n_critic": 2, "n_generator": 2})
    quieten.tuning.tune_loop.diagnose = lambda reading: []  # type: ignore[assignment]
    return tune_policy(open_source(str(model)), toy_data(60), toy_data(40), out=out, start=start, train=train, n=20)


def test_two_processes_tune_as_one(toy: Path, tmp_path: Path) -> None:
    run = toy_run(tmp_path / "plain", "model.net.dropout=0")  # dropout is drawn on each process by itself
    fit(run, data=toy_data())
    distributed(run.path, tmp_path / "alone")
    launch(run.path, tmp_path / "both", file=__file__)
    one, two = metrics(tmp_path / "alone"), metrics(tmp_path / "both")
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for a, b in zip(one, two, strict=True):
        names = ("distance",) if "distance" in a else ("energy_loss", "e_policy", "value_loss_0", "running_cost_1")
        for name in names:
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name
    first, second = (load_file(tmp_path / name / "dxmi-2" / "model.safetensors") for name in ("alone", "both"))
    for name, tensor in first.items():
        assert (second[name] - tensor).abs().max() < 2e-4, name
    torch.testing.assert_close(first["auxiliary.s2"], second["auxiliary.s2"], rtol=1e-5, atol=0)


def data_file(folder: Path) -> Path:
    """The toy's data as a file."""
    data, pictures = folder / "toy.npz", toy_data(200)
    grey = ((pictures.images + 1.0).clamp(0, 2) * 127.5).to(torch.uint8)
    np.savez(data, images=grey.numpy(), labels=pictures.labels.numpy())
    return data


def test_a_recipe_says_how_its_runs_are_tuned(tmp_path: Path, typed: Type) -> None:
    run = toy_run(tmp_path / "run", "tune={kind: dxmi, T: 3, images: 16, batch: 8, head_start: 0, settings: {tau1: 0.02}}")
    fit(run, data=toy_data())
    ran = typed("tune", run.path, data_file(tmp_path), "-n", 20, "--tau2", 0.03)
    assert ran.code == 0, ran.err
    facts = json.loads((run.path / "policy" / "dxmi-3.json").read_text())["facts"]
    assert Run.open(run.path / "policy" / "dxmi-3").recipe.train.lr == 1e-5
    assert (facts["start"]["T"], facts["images"], facts["start"]["head_start"]) == (3, 16, 0)
    assert facts["start"]["settings"] == {"tau1": 0.02, "tau2": 0.03}
    ran = typed("tune", run.path, data_file(tmp_path), "-n", 20, "--steps", 2, "--images", 8, "--batch", 8)
    assert ran.code == 0, ran.err  # another number of steps: the recipe's choices are not for it
    assert json.loads((run.path / "policy" / "dxmi-2.json").read_text())["facts"]["start"]["settings"] == {}


def test_the_command_line_tunes_and_samples(toy: Path, tmp_path: Path, typed: Type) -> None:
    data = data_file(tmp_path)
    command = ("tune", toy, data, "--steps", 2, "--images", 32, "--batch", 8, "--every", 16, "-n", 20, "--lr", 1e-4)
    ran = typed(*command, "--tau1", 0.01, "--time-cost", "linear", "--n-generator", "all", "--set", "analytic_cost=true")
    assert ran.code == 0, ran.err
    assert "distance" in ran.err
    assert "data themselves" in ran.err
    assert f"quieten sample {toy} --policy dxmi-2" in ran.out
    facts = json.loads((toy / "policy" / "dxmi-2.json").read_text())["facts"]
    assert facts["start"]["settings"] == {"tau1": 0.01, "time_cost": "linear", "n_generator": "all", "analytic_cost": True}
    picture, arrays = tmp_path / "grid.png", tmp_path / "x.npz"
    ran = typed("sample", toy, "--policy", "dxmi-2", "-n", 8, "--out", picture, "--npz", arrays)
    assert ran.code == 0, ran.err
    assert "dxmi-2 in 2 steps" in ran.out
    assert "2 network evaluations a sample" in ran.out
    policy = load_policy(toy / "policy", "dxmi-2", open_source(str(toy)).denoiser)
    drawn = draw(policy, 8, classes=2)
    with np.load(arrays) as written:
        grey = ((drawn + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
        assert np.abs(written["images"].astype(int) - grey.astype(int)).max() <= 1


def test_a_policy_in_another_folder_is_named_with_it(toy: Path, tmp_path: Path, typed: Type, monkeypatch: Any) -> None:
    """What is printed after tuning can be typed, and every command that names a policy takes it."""
    monkeypatch.chdir(tmp_path)
    command = ("tune", toy, data_file(tmp_path), "--steps", 2, "--images", 8, "--batch", 8, "--every", 8, "-n", 20)
    for out, given in (("pp", "pp/far.2"), (".", "./far.2"), ("two words", "two words/far.2")):
        ran = typed(*command, "--name", "far.2", "--out", out)
        assert ran.code == 0, ran.err
        printed = shlex.split(ran.out.splitlines()[-1])
        assert printed == ["quieten", "sample", str(toy), "--policy", given]
        ran = typed(*printed[1:], "-n", 2, "--out", "x.png")
        assert ran.code == 0, ran.err
        assert "far.2 in 2 steps" in ran.out
    contender = Entrant(str(toy), open_source(str(toy))).contender("policy:pp/far.2", 50)
    assert (contender.steps, contender.sampler, contender.command.split()[-4:-2]) == (
        2,
        "policy:far.2",
        ["--policy", "pp/far.2"],
    )
    energy = tuned_energy(open_source(str(toy)), "pp/far.2")
    assert not any(p.requires_grad for p in energy.parameters())
    for words in (
        ("sample", toy, "--policy", "pp/oc"),
        ("score", toy, data_file(tmp_path), "--split", "train", "--policy", "pp/oc"),
    ):
        ran = typed(*words)
        assert (ran.code, ran.err.count("\n")) == (2, 1)
        assert "no policy 'pp/oc'" in ran.err


def test_a_diffusers_model_is_tuned_by_adapters(tmp_path: Path, typed: Type) -> None:
    diffusers = pytest.importorskip("diffusers", reason="needs the package diffusers")
    net = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    folder = tmp_path / "model"
    diffusers.DDPMPipeline(net, diffusers.DDPMScheduler(num_train_timesteps=100)).save_pretrained(folder)
    out = tmp_path / "policy"
    ran = typed("tune", folder, "digits", "--steps", 2, "--images", 16, "--batch", 8, "--every", 16, "-n", 20, "--adapters", 2,
                "--width", 4, "--out", out)  # fmt: skip
    assert ran.code == 0, ran.err
    assert "step 2: distance" in ran.err
    assert Run.open(out / "dxmi-2").recipe.train.lr == plan_for(Start(adapters=2)).lr == 3e-4
    tensors = load_file(out / "dxmi-2.safetensors")
    assert all("adapter" in name or name.endswith(".scale") for name in tensors if name.startswith("network."))
    arrays = tmp_path / "x.npz"
    policy = out / "dxmi-2.safetensors"
    ran = typed("sample", folder, "--policy", policy, "-n", 4, "--out", tmp_path / "x.png", "--npz", arrays)
    assert ran.code == 0, ran.err


@pytest.mark.parametrize(
    "options, words",
    [
        (("--steps", "2", "--method", "ppo"), "`method` 'ppo' is unknown: did you mean 'sft-ppo'?"),
        (("--n-generator", "many"), "--n-generator many"),
        (("--set", "value_resampel=true"), "did you mean 'value_resample'"),
        (("--set", "nonsense"), "NAME=VALUE"),
        (("--time-cost", "square"), "`time_cost`"),
        (("--eta", "0"), "`eta`"),
    ],
)
def test_bad_options_end_in_one_line_before_the_work(toy: Path, typed: Type, options: tuple[str, ...], words: str) -> None:
    ran = typed("tune", toy, "digits", *options)
    assert ran.code == 2
    assert words in ran.err
    assert len(ran.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "options, words",
    [
        (("--steps", "5"), "`--steps 5`"),
        (("--transition", "ddim"), "`--transition ddim` was settled"),
        (("--eta", "0.5"), "`--eta 0.5`"),
        (("--no-clip",), "`--clip False`"),
        ((), "no policy 'dxmi-9' for this model"),
    ],
)
def test_a_policy_settles_how_it_samples(toy: Path, tmp_path: Path, typed: Type, options: tuple[str, ...], words: str) -> None:
    if not (toy / "policy" / "small.safetensors").exists():
        tuned(toy, toy / "policy", train=TRAIN.model_copy(update={"images": 8}), name="small")
    ran = typed("sample", toy, "--policy", "small" if options else "dxmi-9", "--out", tmp_path / "x.png", *options)
    assert ran.code == 2
    assert words in ran.err


if __name__ == "__main__":
    import torch.distributed

    distributed(Path(sys.argv[1]), Path(sys.argv[2]))
    assert torch.distributed.get_world_size() == 2
    torch.distributed.destroy_process_group()
