"""Training on stable targets: one optimum, comparable curves, shared references, exact resume, several processes."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import test_distributed
from conftest import golden
from helpers import refuses, within
from quieten.data import Dataset
from quieten.denoiser import FORMS, Preconditioned
from quieten.fit import fit
from quieten.noise import Draws
from quieten.objective import WEIGHTINGS, Batch, Denoising, Regression
from quieten.oracle import MixtureData
from quieten.process import PROCESSES
from quieten.schedule import Linear, Schedule
from quieten.target import StableTarget, stable_target
from quieten.targets.pools import BankPool, ReferencePool, References
from quieten.training.runs import Run, build_update
from test_fit import at, interrupt, same
from test_objective import As, Given, GivenDraws, Says, Wrong
from toy import toy_data, toy_recipe, toy_run

pytestmark = pytest.mark.usefixtures("one_thread")
STABLE = "target={kind: stable, references: 16, pool: bank}"


def mixture(n: int = 400) -> tuple[MixtureData, torch.Tensor]:
    means = 2.0 * torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    data = MixtureData(means, 0.3)
    return data, data.sample(Draws(5, 0, range(n)).noise)


# ---- the loss


@pytest.mark.parametrize("tag", ["edm", "ve", "vp"])
def test_losses_of_the_official_code(tag: str) -> None:
    """The EDM row is the official one; for VE and VP, whose losses never had the target, it is the same formula with T."""
    arrays = {key: torch.tensor(value).double() for key, value in golden("stf_losses").items()}
    kind = f"{tag}_{'stf' if tag == 'edm' else 'dsm'}"
    y, sigma, x_t, d, want = (arrays[f"{kind}_{key}"] for key in ("y", "sigma", "xt", "D", "loss"))
    others = arrays["edm_stf_ref"] if tag == "edm" else torch.cat([y, arrays["edm_stf_ref"]])
    eps = (x_t - y) / sigma.reshape(-1, 1, 1, 1)
    batch = Batch(y, torch.arange(6), {}, References(others, torch.arange(len(others)), {}))
    objective = Denoising(Given(-2 * torch.log(sigma)), "edm" if tag == "edm" else "simple", StableTarget())
    loss = objective(Says(d), batch, GivenDraws(eps))
    if tag != "edm":
        want = (d - stable_target(x_t, others, 1.0, sigma)).square() / sigma.reshape(-1, 1, 1, 1).square()
    want = want.flatten(1).mean(1)
    within(1e-6, ((loss - want).abs() / want.max()).max(), f"{tag} loss per example, of the largest")


@pytest.mark.parametrize("process", list(PROCESSES.values()), ids=list(PROCESSES))
def test_every_parameterisation_has_the_same_stable_loss(process) -> None:
    data, x0 = mixture()
    data.process = process
    denoiser = Wrong(data, lambda m, x: torch.tanh(m))
    batch, draws = Batch(x0[:16], torch.arange(16), {}), Draws(0, 0, range(16))
    for weighting in [*WEIGHTINGS, "likelihood"]:
        objective = Denoising(Linear(5.0, -5.0), weighting, StableTarget(BankPool(x0), 64))
        want = objective.losses(denoiser, batch, draws)
        for form in FORMS:
            network = Preconditioned(As(denoiser, form), process, form, lambda lam: lam)
            got = objective.losses(network, batch, draws)
            for name in ("loss", "plain_loss"):
                within(1e-9, ((got[name] - want[name]).abs() / want[name]).max(), f"{weighting} {name} as {form}, relative")


@pytest.mark.parametrize("weighting", ["simple", "x0", "edm", "likelihood"])
def test_the_plain_loss_is_the_stable_one_and_what_was_removed(weighting: str) -> None:
    """Spec 3.4.3, for any network: the reported plain loss has the mean of the loss with plain targets, and less noise."""
    data, x0 = mixture(6000)
    denoiser = Wrong(data, lambda m, x: 0.7 * m + 0.1)
    plain, stable = [], []
    losses = (Denoising(Linear(4.0, -4.0), weighting, t) for t in (None, StableTarget(ReferencePool(), 64)))
    off, on = losses
    reported = []
    for step, rows in enumerate(torch.arange(6000).split(60)):
        batch, draws = Batch(x0[rows], rows, {}), Draws(0, step, range(60))
        plain.append(off(denoiser, batch, draws))
        got = on.losses(denoiser, batch, draws)
        stable.append(got["loss"])
        reported.append(got["plain_loss"])
    a, b, c = (torch.cat(values) for values in (plain, reported, stable))
    error = (a - b).std() / math.sqrt(len(a))
    within(3.0, abs((a - b).mean()) / error, "plain loss less the reported one, in standard errors")
    assert (a - c).mean() > 5 * error, "the stable loss is lower by what was removed"
    assert b.std() < a.std()
    assert off.losses(denoiser, batch, draws).keys() == {"loss"}


def test_both_losses_have_the_same_gradient_on_average() -> None:
    data, x0 = mixture(4000)
    scale = torch.nn.Parameter(torch.tensor(0.8, dtype=torch.float64))
    denoiser = Wrong(data, lambda m, x: scale * m)
    slopes: dict[str, list[float]] = {"plain": [], "stable": []}
    for name, target in (("plain", None), ("stable", StableTarget(BankPool(x0), 200))):
        objective = Denoising(Linear(2.0, -4.0), "x0", target)
        for step, rows in enumerate(torch.arange(4000).split(40)):
            loss = objective(denoiser, Batch(x0[rows], rows, {}), Draws(0, step, range(40))).mean()
            slopes[name].append(float(torch.autograd.grad(loss, scale)[0]))
    plain, stable = (torch.tensor(values) for values in slopes.values())
    within(3.5, abs((plain - stable).mean()) / ((plain - stable).std() / 10), "gradients differ by, in standard errors")
    assert stable.var() < 0.8 * plain.var(), "and the stable one is quieter"


def test_a_pair_will_do_as_a_target() -> None:
    _, x0 = mixture(8)
    pair = Denoising(Linear(), target=lambda noised, batch: (noised.x0, noised.eps))
    batch, draws = Batch(x0, torch.arange(8), {}), Draws(0, 0, range(8))
    data, _ = mixture(1)
    assert torch.equal(pair(data, batch, draws), Denoising(Linear())(data, batch, draws))
    assert Regression(x0, x0).removed is None


# ---- training


def losses_of(run: Run, name: str = "loss") -> list[float]:
    return [row[name] for row in run.metrics()]


def test_training_reports_both_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stable, plain = toy_run(tmp_path / "stable", STABLE), toy_run(tmp_path / "plain")
    fit(stable, data=toy_data())
    assert " (plain 0." in capsys.readouterr().err
    fit(plain, data=toy_data())
    assert all(row["loss"] < row["plain_loss"] for row in stable.metrics())
    assert all("plain_loss" not in row for row in plain.metrics())
    for a, b in zip(losses_of(stable, "plain_loss"), losses_of(plain), strict=True):
        assert a == pytest.approx(b, rel=0.15), "the curves are comparable"


@pytest.mark.parametrize("pool", ["bank", "class", "cluster", "loader"])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, pool: str) -> None:
    target = f"target={{kind: stable, references: 16, pool: {pool}, cluster: 4}}"
    whole, parts = (toy_run(tmp_path / name, target, "train.accumulate=2", "train.images=40") for name in ("whole", "parts"))
    assert fit(whole, data=toy_data()).done
    assert not fit(parts, data=toy_data(), callbacks=[at(2, interrupt())]).done
    assert fit(Run.open(parts.path), data=toy_data()).done
    same(whole, parts)


@pytest.mark.parametrize("pool", ["batch", "bank", "class"])
def test_accumulated_parts_share_one_set_of_references(tmp_path: Path, pool: str) -> None:
    target = f"target={{kind: stable, references: 16, pool: {pool}}}"
    calm = ("model.net.dropout=0", "train.images=32")
    once, twice = (toy_run(tmp_path / str(k), target, *calm, f"train.accumulate={k}") for k in (1, 2))
    for run in (once, twice):
        fit(run, data=toy_data())
    for name in ("loss", "plain_loss"):
        assert losses_of(twice, name) == pytest.approx(losses_of(once, name), rel=1e-5)


@pytest.mark.slow
def test_two_processes_gather_what_one_has(tmp_path: Path) -> None:
    calm = ("model.net.dropout=0", "train.images=64")
    alone = toy_run(tmp_path / "alone", *calm, "target={kind: stable, pool: batch}")
    both = toy_run(tmp_path / "both", *calm, "target={kind: stable, pool: gather}")
    fit(alone, data=toy_data())
    test_distributed.launch(both.path)
    for name in ("loss", "plain_loss", "grad_norm"):
        assert losses_of(both, name) == pytest.approx(losses_of(alone, name), rel=1e-4)
    first, second = (load_file(run.path / "model.safetensors") for run in (alone, both))
    assert all((second[name] - tensor).abs().max() < 2e-4 for name, tensor in first.items())


def test_the_recipe_section_is_checked() -> None:
    assert toy_recipe("target=stable").section("target").options == {  # type: ignore[union-attr]
        "references": 1024, "pool": "bank", "cluster": 16, "match": None, "precise": None,
    }  # fmt: skip
    whole = build_update(toy_recipe("target={kind: stable, references: all}"), toy_data()).objective.target
    assert isinstance(whole, StableTarget)
    assert whole.references is None
    assert whole.flip
    assert whole.null == {"label": 2}
    with refuses("target", "reference"):
        toy_recipe("target={kind: stable, reference: 3}")
    with refuses("pool"):
        toy_recipe("target={kind: stable, pool: banks}")
    with refuses("target", "quiet"):
        toy_recipe("target=quiet")
    with refuses("section `target`", "objective.kind=denoising"):
        build_update(toy_recipe("target=stable", "objective.kind=bound"), toy_data())
    with refuses("`references` must be at least 1"):
        build_update(toy_recipe("target={kind: stable, references: 0}"), toy_data())
    with refuses("`pool` 'class' needs labels"):
        unlabelled = Dataset("toy", toy_data().images, None, ())
        build_update(toy_recipe("target={kind: stable, pool: class}", "data.labels=false", data=unlabelled), unlabelled)


def test_vectors_and_runs_of_other_processes_train(tmp_path: Path) -> None:
    points = Dataset("points", torch.randn(40, 3), None, ())
    for process in PROCESSES:
        changes = ("model.net={kind: mlp, width: 8}", "data.flip=false", f"model.process={process}", "train.images=16", STABLE)
        run = toy_run(tmp_path / process, *changes, data=points)
        fit(run, data=points)
        assert all(math.isfinite(loss) for loss in losses_of(run, "plain_loss"))


class _Ends(Schedule):
    """Levels at both ends of what float32 can tell apart."""

    def forward(self, u):
        return torch.where(u < 0.5, 30.0, -60.0).to(u)

    def inverse(self, lam):
        raise NotImplementedError


@pytest.mark.parametrize("process", list(PROCESSES.values()), ids=list(PROCESSES))
def test_extreme_levels_give_finite_losses(process) -> None:
    data, x0 = mixture(64)
    data.process = process
    objective = Denoising(_Ends(), "v", StableTarget(BankPool(x0), 32))
    got = objective.losses(data, Batch(x0[:8].float(), torch.arange(8), {}), Draws(0, 0, range(8)))
    assert all(value.isfinite().all() for value in got.values())
