"""The papers' settings: full-size networks have the published number of parameters, thin ones train on stand-in data."""

import json
import math
from pathlib import Path

import pytest
import torch

from quieten.commands.variance import fit as fit_variance
from quieten.data import Dataset
from quieten.fit import fit
from quieten.oracle import GaussianData
from quieten.process import PROCESSES
from quieten.sampling import generate, sample
from quieten.schedule import Table
from quieten.solvers.samplers import sampler
from quieten.training.config import Recipe, build_sampler, build_schedule, load_recipe, resolve, with_overrides
from quieten.training.loop import learning_rate
from quieten.training.parts import build
from quieten.training.runs import Run, build_update
from quieten.training.source import open_source
from quieten.wrap import Counted

pytestmark = pytest.mark.usefixtures("one_thread")

# name -> shape of an example, classes, millions of parameters, evaluations to sample
PAPERS = {
    "cifar10-edm-stf": ((3, 32, 32), 0, 55.7, 35),
    "cifar10-edm-ncsnpp-stf": ((3, 32, 32), 0, 56.4, 35),
    "cifar10-ve-stf": ((3, 32, 32), 0, 62.8, 2000),
    "cifar10-vp-stf": ((3, 32, 32), 0, 61.8, 1000),
    "celeba64-ve-stf": ((3, 64, 64), 0, 62.8, 2000),
    "cifar10-linear": ((3, 32, 32), 0, 52.5, 50),
    "cifar10-cosine": ((3, 32, 32), 0, 52.5, 50),
    "celeba64": ((3, 64, 64), 0, 78.7, 50),
    "imagenet64": ((3, 64, 64), 0, 121.1, 50),
    "lsun-bedroom256": ((3, 256, 256), 0, 113.7, 50),
    "imagenet256-dit": ((4, 32, 32), 1000, 675.1, 50),
}
STABLE = [name for name in PAPERS if name.endswith("-stf")]


def stand_in(name: str, n: int = 12) -> Dataset:
    """Random examples of the right shape: levels, or floats for latents."""
    shape, classes, _, _ = PAPERS[name]
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes if classes else None
    names = tuple(map(str, range(classes)))
    if shape[0] == 4:
        return Dataset(name, torch.randn(n, *shape, generator=generator), labels, names)
    return Dataset(name, torch.randint(0, 256, (n, *shape), generator=generator, dtype=torch.uint8), labels, names)


def full(name: str) -> Recipe:
    return resolve(load_recipe(name), stand_in(name))


def thin(name: str) -> Recipe:
    """Eight channels, one block, a batch of four, two steps; half of that for the largest pictures."""
    net = ["width=16", "depth=1", "heads=2"] if name.endswith("dit") else ["width=8", "blocks=1"]
    batch = 4
    if PAPERS[name][0][-1] == 256:
        net, batch = ["width=4", "blocks=1", "heads=1"], 2
    changes = [f"model.net.{change}" for change in net] + [f"train.images={2 * batch}", f"train.batch={batch}"]
    changes += ["train.log_every=1", "train.previews=1", "sample.steps=2"]
    return with_overrides(full(name), changes + (["target.references=8"] if name in STABLE else []))


@pytest.mark.parametrize("name", PAPERS)
def test_full_size(name: str) -> None:
    """Parameters, without allocating them, and the evaluations of the sampler."""
    recipe = full(name)
    net, (channels, _, size), classes = recipe.model.net, PAPERS[name][0], PAPERS[name][1]
    with torch.device("meta"):
        count = sum(
            p.numel() for p in build("net", net.kind, net.options, channels=channels, size=size, classes=classes).parameters()
        )
    print(f"{name}: {count:,} parameters")
    assert round(count / 1e6, 1) == PAPERS[name][2]
    transition, grid = build_sampler(recipe)
    data = Counted(GaussianData(torch.zeros(2), 1.0, PROCESSES[recipe.model.process]))
    x = sample(data, data.inner.marginal(float(grid[0]), torch.zeros(1, 2)).sample(torch.ones(1, 2)), grid, transition)
    assert data.calls == PAPERS[name][3]
    assert x.isfinite().all()


@pytest.mark.parametrize("name", PAPERS)
def test_a_thin_one_trains_samples_and_is_loaded_again(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, recipe = stand_in(name), thin(name)
    run, before = Run.create(tmp_path / name, recipe), [t.clone() for t in build_update(recipe, data).parameters()]
    summary = fit(run, data=data)
    assert (summary.step, summary.done) == (2, True)
    rows = run.metrics()
    assert [row["step"] for row in rows] == [1, 2]
    assert (run.path / "samples").exists() == (PAPERS[name][0][0] == 3), "latents are no pictures"
    assert all(math.isfinite(row["loss"]) and row["loss"] > 0 for row in rows)
    after = run.read().model
    assert any(not torch.equal(a, b) for a, b in zip(before, after.values(), strict=False))
    opened = open_source(str(run.path))
    transition, grid = sampler(opened.transition[0], opened.grid(2, None), **opened.transition[1])
    label = {"label": torch.tensor([5])} if PAPERS[name][1] else None
    x = generate(opened.denoiser, 1, grid=grid, transition=transition, cond=label)
    assert x.shape == (1, *PAPERS[name][0])
    if opened.fitting:  # the head, by the recipe's own section
        assert opened.fitting["kind"] == "ocm"
        monkeypatch.setattr("quieten.commands.variance.load", lambda *_, **__: data)
        assert fit_variance(str(run.path), name, images=4, batch=2)
        fitted = json.loads((run.path / "variance" / "ocm.json").read_text())
        assert (fitted["head"], fitted["link"]) == (opened.fitting["head"], opened.fitting["link"])
        assert fitted["lr"] == opened.fitting["lr"] or opened.fitting["lr"] is None
    published = {"edm": None, "ve-": None, "vp-": None, "dit": None}  # their samplers clip nothing
    assert opened.clip == next((c for part, c in published.items() if part in name), 1.0)


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Augmentation, references and dropout included."""
    name = "cifar10-edm-stf"
    data = stand_in(name)
    whole = Run.create(tmp_path / "whole", thin(name))
    fit(whole, data=data)
    first = Run.create(tmp_path / "parts", with_overrides(thin(name), ["train.images=4"]))
    fit(first, data=data)
    again = Run(first.path, thin(name))
    again.write_config()
    fit(again, data=data)
    a, b = whole.read(), again.read()
    assert all(torch.equal(a.model[key], b.model[key]) for key in a.model)
    assert all(torch.equal(a.ema[key], b.ema[key]) for key in a.ema)


def test_levels_of_the_papers() -> None:
    """Ends of the chains, in sigma / alpha, and the times that the networks see there."""
    expected = {  # sigma of the cleanest and the noisiest level, times
        "cifar10-ve-stf": (0.02, 100.0, math.log(0.01), math.log(50.0)),
        "celeba64-ve-stf": (0.02, 180.0, math.log(0.01), math.log(90.0)),
        "cifar10-vp-stf": (math.sqrt(math.expm1(1e-6)), math.sqrt(math.expm1(10.05)), 0.0, 999.0),
        "cifar10-linear": (math.sqrt(1e-4 / (1 - 1e-4)), None, 0.0, 999.0),
        "imagenet64": (None, None, 0.0, 3999.0),
    }
    for name, (low, high, first, last) in expected.items():
        recipe = full(name)
        lam = build_schedule(recipe)(torch.tensor([0.0, 1.0], dtype=torch.float64))
        sigma = (-0.5 * lam).exp().tolist()
        for wanted, found in ((low, sigma[0]), (high, sigma[1])):
            assert wanted is None or math.isclose(wanted, found, rel_tol=2e-3), name
        embed = build("time", recipe.model.time.kind, recipe.model.time.options, schedule=build_schedule(recipe))
        time = embed.index(lam) if isinstance(embed, Table) else embed(lam)
        torch.testing.assert_close(time, torch.tensor([first, last], dtype=torch.float64), rtol=1e-3, atol=1e-3)


def test_averages_and_warm_up_are_the_papers() -> None:
    per_step = {"cifar10-ve-stf": 0.999, "cifar10-vp-stf": 0.9999, "celeba64": 0.9999, "lsun-bedroom256": 0.9999}
    for name, rate in per_step.items():
        plan = load_recipe(name).train
        assert math.isclose(0.5 ** (plan.batch / plan.ema), rate, rel_tol=1e-6)
    plan = load_recipe("cifar10-edm-stf").train
    assert (plan.ema, plan.ema_warmup, plan.warmup) == (500_000, 0.05, 10_000_000)


def test_the_learning_rate_is_edms(golden) -> None:
    """Of the official loop after so many images, but for its first step, whose rate is 0: here each comes a step earlier."""
    plan, arrays = load_recipe("cifar10-edm-stf").train, golden("stf_schedules")
    for images, theirs in zip(arrays["ramp_cur_nimg"][1:], arrays["ramp_lr"][1:], strict=True):
        step, rest = divmod(int(images), plan.batch)
        if not rest:
            assert math.isclose(learning_rate(plan, step - 1, 390_625), theirs, rel_tol=1e-12)
