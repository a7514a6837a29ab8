"""The stability chart: it tells what blows up from what does not, and how far off the rest is."""

from __future__ import annotations

import csv
import io
import math
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from helpers import refuses, within
from quieten.cli import main
from quieten.guidance import Guidance, Likelihood
from quieten.guiding.stability import Chart, stability, stability_png
from quieten.noise import INITIAL, Noise
from quieten.oracle import GaussianData
from quieten.process import VE, VP, Process
from quieten.schedule import karras
from toy import toy_run


def stiff(scale: float) -> Guidance:
    """Towards 1 in the coordinates x / alpha: B is linear, with the slope scale sbar."""
    return Likelihood(
        lambda x, lam: -0.5 * (x / VP.scales(lam)[0] - 1.0).square().sum(1) if isinstance(lam, float) else x, scale
    )


def chart(process: Process = VP, **changed: object) -> Chart:
    options: dict[str, object] = {
        "scales": (0.01, 3.0), "steps": (5, 20), "solvers": ("ddim", "plms", "strang", "subcycled"), "n": 6, "reference": 400,
        "dtype": torch.float64,
    }  # fmt: skip
    data = GaussianData(torch.zeros(3), 0.25, process)
    return stability(data, stiff, lambda k: karras(k, 0.02, 5.0), (3,), **{**options, **changed})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tried() -> Chart:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # sub-cycling says that the guidance is stiff
        return chart()


def test_weak_guidance_leaves_everything_stable_and_near(tried: Chart) -> None:
    for trial in tried.trials:
        if trial.scale == 0.01:
            assert trial.stable
            assert trial.distance < 0.7 * tried.size[0.01], trial
            assert trial.largest < 1.5 * tried.largest[0.01]


def test_strong_guidance_blows_up_what_theory_says(tried: Chart) -> None:
    """Adams-Bashforth of order 4 tolerates |h| L of 0.3, half kicks 4, kicks in parts anything."""
    found = {(t.solver, t.steps): t for t in tried.trials if t.scale == 3.0}
    assert not found["plms", 20].stable
    assert found["plms", 20].largest > 100
    assert found["subcycled", 5].stable
    assert found["subcycled", 20].stable
    assert found["subcycled", 20].largest < found["plms", 20].largest / 50
    assert len(tried.trials) == 2 * 4 * 2


def test_more_steps_come_nearer() -> None:
    off = [t.distance for t in chart(scales=(0.01,), steps=(10, 20, 40, 80), solvers=("ddim",), reference=4000).trials]
    within(0.3, abs(off[2] / off[3] - 2.0), "first order: half the distance for twice the steps")
    assert off == sorted(off, reverse=True)


def test_the_reference_follows_the_exact_path() -> None:
    """At scale 0 the path of a Gaussian is known."""
    data = GaussianData(torch.zeros(3), 0.25, VP)
    result = chart(scales=(0.0,), steps=(399,), solvers=("ddim",))
    x = Noise(0, range(6)).normal(torch.empty(6, 3, dtype=torch.float64), INITIAL)
    exact = data.flow(x, -2.0 * math.log(5.0), 40.0)
    within(0.01, abs(result.size[0.0] / float(exact.square().mean().sqrt()) - 1), "size of the samples")


@pytest.mark.parametrize("process", [VP, VE], ids=str)
def test_it_is_repeatable(process: Process) -> None:
    a, b = (chart(process, scales=(0.01,), steps=(4,), solvers=("strang", "ddpm"), reference=20) for _ in range(2))
    assert [(t.largest, t.distance) for t in a.trials] == [(t.largest, t.distance) for t in b.trials]


def test_guidance_that_fails_is_a_blow_up() -> None:
    def fragile(scale: float) -> Guidance:
        return Likelihood(lambda x, lam: torch.where(x.abs().amax(1) > 50.0, math.nan, stiff(scale).value(x, lam, VP)), scale)

    data = GaussianData(torch.zeros(3), 0.25, VP)
    result = stability(data, fragile, lambda k: karras(k, 0.02, 5.0), (3,), n=2, scales=(3.0,), steps=(20,), solvers=("plms",),
                       reference=400)  # fmt: skip
    (trial,) = result.trials
    assert (trial.largest, trial.distance, trial.stable) == (math.inf, math.inf, False)
    assert "everything blows up" in result.advice()[0]
    stability_png(result)


def test_advice_names_what_to_take(tried: Chart) -> None:
    weak, strong = tried.advice()
    assert weak.startswith("scale 0.01: take ")
    assert "unstable" not in weak
    assert strong.startswith("scale 3: ")
    assert "plms up to 20 steps" in strong
    near = tried.advice(tolerance=1e-9)[0]
    assert "nothing is within" in near
    assert "take more steps" in near


def test_the_picture_has_a_panel_for_each_solver(tried: Chart) -> None:
    with Image.open(io.BytesIO(stability_png(tried))) as picture:
        assert picture.width > 600
        assert picture.height > 200


@pytest.mark.parametrize(
    "changed, pieces",
    [
        ({"solvers": ("strng",)}, ["'strng'", "did you mean 'strang'?"]),
        ({"steps": (400,)}, ["`steps`", "400"]),
        ({"steps": (0,)}, ["`steps`", "got 0"]),
        ({"scales": ()}, ["`scales`"]),
        ({"n": 0}, ["`n`"]),
    ],
)
def test_mistakes(changed: dict[str, object], pieces: list[str]) -> None:
    with refuses(*pieces):
        chart(**changed)


# ---- the command


def typed(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from quieten.training.runs import Checkpoint, build_update

    run = toy_run(tmp_path / "toy", "objective.drop=0.1")
    tensors = dict(build_update(run.recipe).state_dict())
    run.save(Checkpoint(1, tensors, tensors, {}))
    Image.new("L", (2, 2), 200).save(tmp_path / "small.png")
    guide = ["--guidance", "superres:4", "--measurement", tmp_path / "small.png", "--reference", 12]
    code, out, err = typed(
        capsys, "diagnose", run.path, *guide, "--steps", "2,4", "--scales", "1,5", "--solvers", "ddim,strang", "-n", 2
    )
    assert code == 0, err
    assert "2 steps" in out
    assert "scale 5: " in out
    rows = list(csv.DictReader((run.path / "diagnosis" / "guidance.csv").open()))
    assert [(r["solver"], r["steps"], r["scale"]) for r in rows][:3] == [
        ("ddim", "2", "1.0"),
        ("ddim", "4", "1.0"),
        ("strang", "2", "1.0"),
    ]
    assert (run.path / "diagnosis" / "guidance.png").stat().st_size > 1000
    for arguments, piece in (
        ([*guide, "--steps", "2,x"], "`--steps 2,x`"),
        ([*guide, "--steps", "2", "--solvers", "hein"], "did you mean 'heun"),
        (["--guidance", "superres:4"], "`--measurement` is missing"),
        (["--guidance", "top"], "needs a classifier"),
        ([*guide, "--steps", "12"], "`steps`"),
        ([], "`data` is missing"),
        (["digits", *guide], "needs no data"),
    ):
        code, out, err = typed(capsys, "diagnose", run.path, *arguments)
        assert (code, out) == (2, ""), arguments
        assert piece in err
        assert err.count("\n") == 1
