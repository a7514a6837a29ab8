"""Comparisons: what takes part, what is kept, what a hash knows, and that an interrupted one ends as if it had not been."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import quieten
from conftest import Type
from helpers import refuses
from quieten.commands.compare import results_folder
from quieten.comparing.compare import Cell, Contender, compare
from quieten.comparing.judge import Judge, as_images, digest
from quieten.comparing.lineup import Entrant, forecast, plain, standard
from quieten.covariances.fit import PLAN, fit_variance
from quieten.covariances.stored import fingerprint
from quieten.data import Dataset, load
from quieten.metrics import frechet
from quieten.metrics.features import Extractor
from quieten.oracle import GaussianData
from quieten.process import VP
from quieten.schedule import karras
from quieten.solvers.samplers import SAMPLERS, sampler
from quieten.training.runs import Checkpoint, Run, build_update
from quieten.training.source import open_source
from quieten.transition import Ancestral
from quieten.tuning.policy import Policy
from quieten.tuning.stored import save_policy
from quieten.wrap import Counted
from toy import toy_run

ENV = {**os.environ, "PYTHONPATH": str(Path(quieten.__file__).parents[1]), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def untrained(path: Path, seed: int = 0) -> Path:
    """A run on digits with random weights."""
    torch.manual_seed(seed)
    run: Run = toy_run(path, data=load("digits"))
    tensors = {name: t + 0.05 * torch.randn_like(t) for name, t in build_update(run.recipe).state_dict().items()}
    run.save(Checkpoint(1, tensors, tensors, {}))
    return run.path


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("compare") / "run")


@pytest.fixture(scope="module")
def entrant(digits: Path) -> Entrant:
    return Entrant("run", open_source(str(digits)), batch=4)


@pytest.fixture
def judge(tmp_path: Path) -> Judge:
    return judge_in(tmp_path)


def judge_in(folder: Path) -> Judge:
    data, test = load("digits"), load("digits", split="test")
    return Judge(Extractor.pixels(), data.subset(slice(0, 200)), folder / "reference", test, show=False)


def fake(name: str, steps: int = 3, draw: Any = None, **facts: Any) -> Contender:
    """A contender whose samples are noise of its index, drawn with as many evaluations as steps."""
    counted = Counted(GaussianData(torch.zeros(1, 8, 8), 1.0, VP))

    def noise(rows: range) -> Tensor:
        for _ in range(steps):
            counted(torch.zeros(len(rows), 1, 8, 8), 0.0)
        return torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in rows]).clamp(-1, 1)

    return Contender("toy", name, steps, counted, draw or noise, {"name": name, "steps": steps, **facts}, steps)


# ---- the engine


def test_rows_come_in_order_with_counts_and_protocols(judge: Judge, tmp_path: Path) -> None:
    contenders = [fake("slow", 5), fake("quick", 2)]
    seen: list[str] = []
    rows = compare(
        contenders, judge, tmp_path, n=40, batch=16, show=False, finished=lambda row: seen.append(row.contender.sampler)
    )
    assert [row.contender.sampler for row in rows] == ["slow", "quick"]
    assert seen == ["quick", "slow"], "the cheapest is drawn first"
    assert [row.evaluations for row in rows] == [5, 2]
    assert all(row.seconds > 0 and row.n == 40 for row in rows)
    p = rows[0].results["frechet"].protocol
    assert (p.n, p.n_reference, p.reference, p.extractor) == (40, 200, "digits, train", "pixels")
    assert set(rows[0].results) == {"frechet", "kid", "precision", "recall", "density", "coverage"}
    reference = load("digits").subset(slice(0, 200)).all()
    direct = frechet(contenders[0].draw(range(40)), reference, Extractor.pixels())
    assert rows[0].results["frechet"].value == pytest.approx(direct.value, rel=1e-9)
    assert json.loads(json.dumps(rows[0].to_dict()))["results"]["frechet"]["protocol"]["n"] == 40


def test_what_was_drawn_is_not_drawn_again(judge: Judge, tmp_path: Path) -> None:
    drawn: list[range] = []
    made = fake("a")

    def draw(rows: range) -> Tensor:
        drawn.append(rows)
        return made.draw(rows)

    contender = replace(made, draw=draw)
    first = compare([contender], judge, tmp_path, n=20, batch=8, show=False)[0]
    again = compare([contender], judge, tmp_path, n=20, batch=5, show=False)[0]
    assert drawn == [range(0, 8), range(8, 16), range(16, 20)]
    assert (first.results, first.seconds, first.evaluations) == (again.results, again.seconds, again.evaluations)
    more = compare([contender], judge, tmp_path, n=30, batch=6, show=False)[0]
    assert drawn[3:] == [range(20, 26), range(26, 30)]
    assert more.n == 30
    fewer = compare([contender], judge, tmp_path, n=10, batch=6, show=False)[0]
    assert len(drawn) == 5
    assert fewer.results["frechet"].value == pytest.approx(judge.measure(made.draw(range(10)).flatten(1))["frechet"].value)
    assert 0 < fewer.seconds < more.seconds
    compare([fake("a", 3, draw=draw, seed=1)], judge, tmp_path, n=8, batch=8, show=False)
    assert drawn[5:] == [range(0, 8)], "other facts are another cell"


def test_an_interrupt_keeps_finished_chunks(judge: Judge, tmp_path: Path) -> None:
    made, calls = fake("a"), []

    def draw(rows: range) -> Tensor:
        calls.append(rows)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return made.draw(rows)

    stopped = replace(made, draw=draw)
    with pytest.raises(KeyboardInterrupt):
        compare([stopped], judge, tmp_path / "a", n=40, batch=10, show=False)
    assert [chunk.stop for chunk in Cell(tmp_path / "a", made).chunks()] == [10, 20]
    row = compare([stopped], judge, tmp_path / "a", n=40, batch=10, show=False)[0]
    assert calls[3:] == [range(20, 30), range(30, 40)]
    whole = compare([made], judge, tmp_path / "b", n=40, batch=40, show=False)[0]
    assert row.results == whole.results
    assert torch.equal(row.images, whole.images)


def test_without_drawing_only_finished_cells_have_rows(judge: Judge, tmp_path: Path) -> None:
    a, b = fake("a"), fake("b")
    compare([a], judge, tmp_path, n=8, batch=8, show=False)
    rows = compare([a, b], judge, tmp_path, n=8, batch=8, draw=False, show=False)
    assert [row.contender.sampler for row in rows] == ["a"]
    assert compare([a, b], judge, tmp_path, n=9, batch=8, draw=False, show=False) == []


def test_a_sampler_that_fails_does_not_stop_the_others(judge: Judge, tmp_path: Path) -> None:
    def draw(rows: range) -> Tensor:
        raise ValueError("3 of 8 samples are not finite:\n take more steps")

    rows = compare([fake("bad", 1, draw=draw), fake("good", 2)], judge, tmp_path, n=8, batch=8, show=False)
    assert rows[0].failure == "3 of 8 samples are not finite: take more steps"
    assert not rows[0].results
    assert rows[1].failure is None
    assert json.loads(json.dumps(rows[0].to_dict()))["seconds"] is None


def test_damage_and_numbers_out_of_range_are_refused(judge: Judge, tmp_path: Path) -> None:
    contender = fake("a")
    compare([contender], judge, tmp_path, n=8, batch=8, show=False)
    chunk = Cell(tmp_path, contender).chunks()[0].path
    chunk.write_bytes(chunk.read_bytes()[:50])
    with refuses(str(chunk), "damaged", "delete"):
        compare([contender], judge, tmp_path, n=8, batch=8, show=False)
    for n, batch in ((1, 8), (8, 0)):
        with refuses("`n`", "`batch`", str(n)):
            compare([contender], judge, tmp_path, n=n, batch=batch)


def test_the_same_facts_are_shown_once(judge: Judge, tmp_path: Path) -> None:
    assert len(compare([fake("a"), fake("a"), fake("b")], judge, tmp_path, n=8, show=False)) == 2


# ---- the judge


def test_features_of_the_reference_are_kept_and_remade_when_damaged(tmp_path: Path) -> None:
    first = judge_in(tmp_path).features
    file = next((tmp_path / "reference").glob("*.safetensors"))
    stamp = file.stat().st_mtime_ns
    assert torch.equal(judge_in(tmp_path).features, first)
    assert file.stat().st_mtime_ns == stamp
    file.write_bytes(b"not whole")
    assert torch.equal(judge_in(tmp_path).features, first)


def test_few_samples_leave_metrics_out_and_say_so(judge: Judge) -> None:
    features = judge.features[:3].clone()
    results = judge.measure(features)
    assert "precision" not in results
    assert "frechet" in results
    assert any("`k`" in note for note in judge.notes)
    assert any("biased" in note for note in judge.notes)


def test_real_examples_are_measured_like_samples(judge: Judge) -> None:
    real = judge.real(100)
    test = load("digits", split="test").all()[:100]
    assert real["frechet"].value == pytest.approx(judge.measure(test.flatten(1))["frechet"].value, rel=1e-9)
    assert real["frechet"].protocol.weights == "real"
    assert judge.real(100) == real
    assert Judge(Extractor.pixels(), judge.reference, judge.folder, None).real(100) == {}


def test_bytes_become_what_data_sets_give() -> None:
    data = load("digits")
    assert isinstance(data.images, Tensor)
    assert torch.equal(as_images(data.images[:5]), data.batch(torch.arange(5))[0])
    other = Dataset(data.name, data.images.clone(), data.labels, data.classes)
    assert digest(other) == digest(data)
    other.images[3, 0, 0, 0] += 1  # type: ignore[index]
    assert digest(other) != digest(data)


# ---- who takes part


def test_every_sampler_takes_part_and_its_evaluations_are_forecast(entrant: Entrant) -> None:
    names = [name for name in entrant.expand(["all"]) if not name.startswith(("diffusers", "ancestral:"))]
    assert set(names) == {name for name, entry in SAMPLERS.items() if entry.variance is None and name != "lanczos"}
    for name in names:
        contender = entrant.contender(name, 5)
        contender.counted.rows = 0
        x = contender.draw(range(0, 2))
        assert (x.shape, x.dtype) == ((2, 1, 8, 8), torch.uint8)
        if name != "rk45":  # which looks at the data
            assert contender.counted.rows == 2 * contender.evaluations, name


def test_any_chunks_give_the_same_samples(entrant: Entrant) -> None:
    for name in ("ddpm", "heun", "diffusers:dpm++"):
        contender = entrant.contender(name, 4)
        whole = contender.draw(range(0, 9)).int()
        parts = torch.cat([contender.draw(rows) for rows in (range(0, 3), range(3, 4), range(4, 9))]).int()
        assert (whole - parts).abs().max() <= 1, "to the rounding of the network"


def test_keys_know_what_samples_depend_on(digits: Path, tmp_path: Path) -> None:
    source = open_source(str(digits))
    base = Entrant("run", source)
    key = base.contender("ddim", 5).key
    assert Entrant("other name", source, batch=7).contender("ddim", 5).key == key
    names = ("ddpm", "heun", "ddim:eta=0.5", "ancestral:big", "diffusers:ddim")
    others = [base.contender("ddim", 6), *(base.contender(name, 5) for name in names)]
    for options in ({"seed": 1}, {"clip": False}, {"spacing": "uniform"}, {"scale": 2.0}):
        others.append(replace(base, **options).contender("ddim", 5))
    others.append(Entrant("run", open_source(str(untrained(tmp_path / "b", 1)))).contender("ddim", 5))
    assert len({key, *(other.key for other in others)}) == len(others) + 1
    assert base.contender("rk45", 5).key == base.contender("rk45", 9).key, "its steps are its own"
    assert base.contender("rk45", 5).steps is None


def test_variances_are_known_by_their_files(tmp_path: Path) -> None:
    path = untrained(tmp_path / "run")
    source = open_source(str(path))
    fit_variance(source, load("digits"), kind="analytic", train=PLAN.model_copy(update={"images": 16, "batch": 16}))
    entrant = Entrant("run", source)
    assert entrant.expand(["fitted"]) == ["ancestral:analytic"]
    key = entrant.contender("ancestral:analytic", 3).key
    facts = entrant.contender("ancestral:analytic", 3).facts
    assert facts["variance"] not in (None, "analytic")
    assert entrant.contender("ancestral", 3).facts["variance"] is None
    assert key != entrant.contender("ancestral", 3).key


def test_names_that_nothing_has_are_refused(entrant: Entrant) -> None:
    with refuses("dimm", "did you mean"):
        entrant.contender("dimm", 5)
    with refuses("diffusers", "'euler'", "ddim"):
        entrant.contender("diffusers:euler", 5)
    with refuses("'sn'"):
        entrant.contender("ancestral:sn", 5)
    with refuses("heun", "no use", "big"):
        entrant.contender("heun:big", 5)
    with refuses("--scale 2", "leave it out"):
        replace(entrant, scale=2.0, source=replace(entrant.source, null={})).contender("ddim", 5)
    with refuses("--prompt", "takes text"):
        replace(entrant, prompt="a cat").contender("ddim", 5)
    with refuses("no policy 'fast'"):
        entrant.contender("policy:fast", 5)
    assert standard(entrant.source) == ["ddpm", "ddim", "heun", "dpm++", "unipc", "policies"]


def test_commands_draw_the_same_samples(entrant: Entrant, digits: Path, typed: Type, tmp_path: Path) -> None:
    for name in ("ddim", "dpm++", "ancestral:big", "ddpm:eta=0.5"):
        contender = Entrant(str(digits), entrant.source, seed=3).contender(name, 4)
        words = contender.command.split()[1:]
        ran = typed(*words, "-n", 6, "--npz", tmp_path / "x.npz", "--out", tmp_path / "x.png")
        assert ran.code == 0, ran.err
        with np.load(tmp_path / "x.npz") as arrays:
            assert np.array_equal(arrays["images"], contender.draw(range(6)).numpy()), name


def test_policies_take_part_at_their_own_steps(tmp_path: Path, typed: Type) -> None:
    path = untrained(tmp_path / "run")
    source = open_source(str(path))
    policy = Policy(source.denoiser, source.grid(3, None), Ancestral(1.0, spread=False))
    save_policy(source.policies[0], "fast", policy, trunk=fingerprint(source.denoiser))
    entrant = Entrant(str(path), source)
    assert entrant.expand(["policies"]) == ["policy:fast"]
    contender = entrant.contender("policy:fast", 50)
    assert (contender.steps, contender.evaluations) == (3, 3)
    assert contender.key == entrant.contender("policy:fast", 5).key, "its steps are its own"
    ran = typed(*contender.command.split()[1:], "-n", 5, "--npz", tmp_path / "x.npz", "--out", tmp_path / "x.png")
    assert ran.code == 0, ran.err
    with np.load(tmp_path / "x.npz") as arrays:
        assert np.array_equal(arrays["images"], contender.draw(range(5)).numpy())


def test_policies_of_any_eta_have_bits_since_their_noise_is_their_own(tmp_path: Path, typed: Type) -> None:
    path = untrained(tmp_path / "run")
    source = open_source(str(path))
    for name, eta in (("half", 0.5), ("whole", 1.0)):
        policy = Policy(source.denoiser, source.grid(2, None), Ancestral(eta, spread=False))
        save_policy(source.policies[0], name, policy, trunk=fingerprint(source.denoiser))
    ran = typed("compare", path, "digits", "--transitions", "policies,ddpm:eta=0.5", "--steps", 2, "--nll", 4, "-n", 8)
    assert ran.code == 0, ran.err
    rows = {row["sampler"]: row for row in json.loads((path / "compare" / "results.json").read_text())["rows"]}
    assert {name: row["failure"] for name, row in rows.items()} == dict.fromkeys(rows)
    measured = {name: row["bits_per_dim"] is not None for name, row in rows.items()}
    assert measured == {"policy:half": True, "policy:whole": True, "ddpm:eta=0.5": False}


def test_forecasts_and_facts() -> None:
    denoiser = GaussianData(torch.zeros(2), 1.0, VP)
    for name, each in (("ddim", 1), ("rk4", 4), ("heun", 2)):
        transition, grid = sampler(name, karras(6))
        assert forecast(transition, grid, denoiser) in (6 * each, 6 * each - each + 1)
    assert plain({"a": [1.0, math.inf], "b": (math.nan, None)}) == {"a": [1.0, "inf"], "b": ["nan", None]}


# ---- the command


def arguments(run: Path, out: Path, *more: object) -> list[object]:
    return [
        "compare",
        run,
        "digits",
        "--out",
        out,
        "--transitions",
        "ddim,ddpm,diffusers:heun",
        "--steps",
        "2,3",
        "-n",
        24,
        *more,
    ]


@pytest.fixture(scope="module")
def written(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison of two models, with everything on."""
    from quieten.cli import main

    folder = tmp_path_factory.mktemp("compared")
    other = untrained(folder / "other", 1)
    given = arguments(digits, folder / "out", "--against", other, "--nll", 6, "--figure", folder / "figure.png", "--batch", 10)
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in given])
    assert not ended.value.code
    return folder


def test_the_command_writes_a_report_numbers_and_a_figure(written: Path) -> None:
    content = json.loads((written / "out" / "results.json").read_text())
    rows = content["rows"]
    assert len(rows) == 12
    assert [row["evaluations"] for row in rows[:6]] == [2, 3, 2, 3, 2, 3] or rows[4]["evaluations"] == 2
    assert {row["n"] for row in rows} == {24}
    assert content["command"].startswith("quieten compare ")
    assert "--nll 6" in content["command"]
    for row in rows:
        assert row["failure"] is None
        assert row["results"]["frechet"]["protocol"]["n"] == 24
        assert (row["bits_per_dim"] is not None) == (row["sampler"] == "ddpm")
    assert content["real"]["frechet"]["value"] > 0
    assert (written / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (written / "out" / "report.html").read_text()


def test_a_second_call_draws_nothing_and_says_the_same(written: Path, digits: Path, typed: Type) -> None:
    before = (written / "out" / "results.json").read_text()
    stamps = {file: file.stat().st_mtime_ns for file in (written / "out" / "cells").rglob("*.safetensors")}
    ran = typed(*arguments(digits, written / "out", "--against", written / "other", "--nll", 6, "--batch", 7))
    assert ran.code == 0, ran.err
    after = (written / "out" / "results.json").read_text()
    assert json.loads(after)["rows"] == json.loads(before)["rows"]
    assert {file: file.stat().st_mtime_ns for file in (written / "out" / "cells").rglob("*.safetensors")} == stamps
    assert "report: " in ran.out
    assert "Frechet distance" in ran.out


def test_drawing_leaves_the_network_as_it_was(digits: Path) -> None:
    """A likelihood that is measured after drawing must not see dropout."""
    entrant = Entrant("run", open_source(str(digits)))
    for name in ("ddim", "diffusers:ddim"):
        entrant.contender(name, 2).draw(range(1))
        assert not any(module.training for module in entrant.source.denoiser.modules())


def test_bits_are_those_of_nll(written: Path, digits: Path, typed: Type, tmp_path: Path) -> None:
    """DDPM's own grid, clipped: the bound of `quieten nll --variance small --bound-grid own`."""
    ran = typed(
        "nll",
        digits,
        "digits",
        "--steps",
        3,
        "-n",
        6,
        "--variance",
        "small",
        "--bound-grid",
        "own",
        "--out",
        tmp_path / "x.json",
    )
    assert ran.code == 0, ran.err
    term = json.loads((tmp_path / "x.json").read_text())["terms"]["total"]
    rows = json.loads((written / "out" / "results.json").read_text())["rows"]
    row = next(row for row in rows if (row["model"], row["sampler"], row["steps"]) == (str(digits), "ddpm", 3))
    assert row["bits_per_dim"]["value"] == pytest.approx(term["bits/dim"], rel=1e-4)
    assert row["bits_per_dim"]["uncertainty"] == pytest.approx(term["bits/dim_se"], rel=1e-3)


def test_bad_input_is_refused_before_the_work(typed: Type, digits: Path, tmp_path: Path) -> None:
    cases: list[tuple[list[object], tuple[str, ...]]] = [
        (["--steps", "5,x"], ("--steps 5,x", "whole numbers")),
        (["--steps", "0"], ("--steps 0",)),
        (["--transitions", "ddim,dimm"], ("--transitions dimm", "did you mean")),
        (["--features", "nowhere.safetensors"], ("nowhere.safetensors",)),
        (["--figure", "x.jpg"], ("--figure x.jpg", ".png")),
        (["--prompt", "a cat"], ("--prompt", "takes text")),
    ]
    for more, pieces in cases:
        ran = typed("compare", digits, "digits", "--out", tmp_path / "out", "-n", 4, "--transitions", "ddim", *more)
        assert (ran.code, ran.out) == (2, ""), more
        assert all(piece in ran.err for piece in pieces), ran.err
    assert "fashion" in typed("compare", digits, "fashion", "--out", tmp_path).err
    assert not list(tmp_path.rglob("cells"))


def test_splits_and_missing_test_data_are_refused(typed: Type, digits: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", images=np.zeros((9, 8, 8), np.uint8))
    for data, more, pieces in (
        ("digits", ("--transitions", "strang"), ("`--transitions strang`", "sample --guide", "diagnose --guidance")),
        (tmp_path / "whole.npz", ("--nll", 4), ("`--nll 4`", "whole.npz has none of its own", "leave it out")),
    ):
        ran = typed("compare", digits, data, "--out", tmp_path / "out", "-n", 4, *more)
        assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
        assert all(piece in ran.err for piece in pieces), ran.err


@pytest.mark.parametrize(
    "name, slug",
    [("./pipe", "pipe"), ("../a/pipe/", "a--pipe"), ("/tmp/pipe", "tmp--pipe"), ("zoo:emoji", "emoji"), (".", None)],
)
def test_results_lie_where_they_are_seen(
    entrant: Entrant, tmp_path: Path, monkeypatch: Any, name: str, slug: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = results_folder(replace(entrant.source, home=Path()), name, None)
    assert folder == Path("compare") / (slug or tmp_path.name)
    assert folder.is_dir()


def test_without_finished_rows_there_is_no_table(typed: Type, digits: Path, tmp_path: Path) -> None:
    ran = typed("compare", digits, "digits", "--out", tmp_path, "--transitions", "ddim", "--steps", 2, "-n", 24, "--no-draw")
    assert ran.code == 0, ran.err
    assert ran.out == f"report: {tmp_path / 'report.html'}\n"


def test_data_of_another_shape_are_refused(typed: Type, digits: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "vectors.npz", images=np.zeros((9, 5), np.float32))
    ran = typed("compare", digits, tmp_path / "vectors.npz", "--out", tmp_path / "out")
    assert ran.code == 2
    assert "(5,)" in ran.err


def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(digits: Path, tmp_path: Path, typed: Type) -> None:
    def command(out: Path) -> list[str]:
        given = ["compare", str(digits), "digits", "--out", str(out), "--transitions", "ddim,ddpm", "--steps", "12,24"]
        return [*given, "-n", "40", "--batch", "4"]

    out = tmp_path / "out"
    running = subprocess.Popen(
        [sys.executable, "-m", "quieten", *command(out)], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 120
    while len(list(out.glob("cells/*/*-*.safetensors"))) < 4 and running.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.005)
    running.send_signal(signal.SIGINT)
    said, error = running.communicate(timeout=120)
    assert running.returncode == 130, error
    assert "the same command goes on" in said
    assert "Traceback" not in error
    kept = {file: file.read_bytes() for file in out.glob("cells/*/0*.safetensors")}
    assert 4 <= len(kept) < 40
    assert not list(out.rglob("*.part"))
    assert typed(*command(out)).code == 0
    assert all(file.read_bytes() == content for file, content in kept.items())
    assert typed(*command(tmp_path / "whole")).code == 0
    first, second = (json.loads((folder / "results.json").read_text()) for folder in (out, tmp_path / "whole"))
    assert (first["unfinished"], len(first["rows"])) == (0, 4)
    for one, other in zip(first["rows"], second["rows"], strict=True):  # another process, to the rounding of the network
        assert one["results"]["frechet"]["value"] == pytest.approx(other["results"]["frechet"]["value"], rel=1e-3)
