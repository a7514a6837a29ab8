"""Recipes of the bound: each one trains, at a width that fits a test, on stand-in pictures, and comes back from its folder."""

from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import Type
from helpers import refuses, within
from quieten.data import Dataset
from quieten.fit import fit
from quieten.likelihoods.bound import VariationalBound
from quieten.likelihoods.decoders import Flat, Nearby
from quieten.noise import Draws
from quieten.objective import Batch
from quieten.sampling import generate
from quieten.schedule import Linear
from quieten.training.config import build_denoiser, load_recipe, recipe_names, resolve, with_overrides
from quieten.training.runs import Run, build_update, export, load_companions
from quieten.training.source import open_source
from quieten.transition import Ancestral
from toy import toy_data, toy_recipe, toy_run

NAMES = [name for name in recipe_names() if load_recipe(name).objective.kind == "bound"]
SMALL = ["train.images=12", "train.batch=4", "sample.steps=3", "train.preview_every=null", "train.save_minutes=null"]


def pictures(channels: int, size: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    return Dataset(
        "stand-in", torch.randint(0, 256, (16, channels, size, size), generator=generator, dtype=torch.uint8), None, ()
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_trains(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    grey = recipe.data.name == "fashion-mnist"
    kind, encoder = recipe.model.net.kind, recipe.section("encoder")
    smaller = ["model.net.width=16", *(["model.net.blocks=1"] if kind == "vdm" else [])]
    if encoder is not None and encoder.kind != "contraction":
        smaller += ["encoder.width=16", *(["encoder.blocks=2"] if encoder.kind == "published" else [])]
    data = pictures(1, 28) if grey else pictures(3, 16)
    run = Run.create(tmp_path / "run", resolve(with_overrides(recipe, [*SMALL, *smaller]), data))
    assert fit(run, data=data).done
    last = run.metrics()[-1]
    within(1e-5 * last["loss"], abs(last["prior"] + last["reconstruction"] + last["diffusion"] - last["loss"]), "terms add up")
    opened = open_source(str(run.path))
    assert (opened.encoder is None) == (encoder is None)
    grid = opened.grid(3, None)
    assert grid[-1] == torch.inf
    x = generate(opened.denoiser, 2, grid=grid, transition=Ancestral(), batch=2)
    assert bool(x.isfinite().all())


def test_there_is_a_recipe_for_every_published_setting() -> None:
    wanted = {"vdm-8", "vdm-32", "diffenc-8-2", "diffenc-8-nt", "diffenc-32-2", "diffenc-32-4", "imagenet32-vdm-32",
              "imagenet32-diffenc-32-8", "vdm-cifar10", "vdm-cifar10-augmented", "fashion-mnist-vdm",
              "fashion-mnist-diffenc"}  # fmt: skip
    assert wanted <= set(NAMES)


@pytest.mark.parametrize("schedule", ["{kind: linear, learned: true}", "{kind: monotone, hidden: 8}", "polynomial"])
@pytest.mark.parametrize("bound", ["continuous", "{kind: steps, count: 10, reverse_variance: optimal}"])
def test_what_is_learned_beside_the_denoiser_comes_back(schedule: str, bound: str, tmp_path: Path) -> None:
    data = toy_data()
    run = toy_run(tmp_path / "run", "objective.kind=bound", f"objective.schedule={schedule}", f"bound={bound}",
                  "encoder={kind: compact, width: 8}", "train.images=32")  # fmt: skip
    fit(run, data=data)
    for companions in (run.companions("model"), load_companions(export(run, tmp_path / "x.safetensors", weights="model"))):
        tensors = run.read().model  # type: ignore[union-attr]
        for part, module in (("schedule", companions.schedule), ("encoder", companions.encoder)):
            for name, value in module.state_dict().items():
                assert torch.equal(value, tensors[f"objective.{part}.{name}"]), name
        assert (companions.excess is None) == ("optimal" not in bound)
        if companions.excess is not None:
            assert torch.equal(companions.excess, tensors["objective.excess"])
            assert bool((companions.excess > 0).any())


def test_runs_sample_with_the_variance_that_training_found(typed: Type, tmp_path: Path) -> None:
    run = toy_run(tmp_path / "run", "objective.kind=bound", "objective.schedule=linear", "train.images=32",
                  "encoder=contraction", "sample.grid=schedule",
                  "bound={kind: steps, count: 3, reverse_variance: optimal}")  # fmt: skip
    fit(run, data=toy_data())
    files = ("--npz", tmp_path / "a.npz", "-n", 2, "--transition", "ancestral")
    pictures = []
    for options in ((), ("--variance", "optimal")):
        ran = typed("sample", run.path, *files, "--steps", 4, *options)
        assert ran.code == 0, ran.err
        pictures.append(np.load(tmp_path / "a.npz", allow_pickle=False)["images"])
    assert (pictures[0] != pictures[1]).any()
    ran = typed("sample", run.path, *files, "--steps", 5, "--variance", "optimal")
    assert ran.code == 2
    assert "--steps 4" in ran.err
    plain = toy_run(tmp_path / "plain", "train.images=16")
    fit(plain, data=toy_data())
    ran = typed("sample", plain.path, *files, "--variance", "optimal")
    assert ran.code == 2
    assert "reverse_variance=optimal" in ran.err


def test_flows_of_encoded_models_have_a_name(typed: Type, tmp_path: Path) -> None:
    """Mean and rate apart, or nothing learned: the ODE and DDIM exist. With a learned encoder alone, neither does."""
    for kind, refused in (("{kind: compact, width: 8, counterterm: split}", False), ("contraction", False), ("compact", True)):
        run = toy_run(tmp_path / kind[:9], "objective.kind=bound", "objective.schedule=linear", f"encoder={kind}",
                      "train.images=16")  # fmt: skip
        fit(run, data=toy_data())
        assert ("mean" in run.metrics()[-1]) == ("split" in kind)
        files = ("--npz", tmp_path / "a.npz", "-n", 2)
        for name in ("ancestral", "ddim", "encoded-flow"):
            ran = typed("sample", run.path, *files, "--steps", 4, "--grid", "uniform", "--transition", name)
            assert ran.code == (2 if refused and name != "ancestral" else 0), ran.err
            if ran.code:
                assert "split" in ran.err
                assert "Ancestral()" in ran.err
        ran = typed("sample", run.path, *files, "--steps", 4, "--transition", "heun")
        assert ran.code == 2
        assert "encoder" in ran.err
    plain = toy_run(tmp_path / "plain", "train.images=16")
    fit(plain, data=toy_data())
    ran = typed("sample", plain.path, *files, "--transition", "encoded-flow")
    assert ran.code == 2
    assert "EncodedFlow needs" in ran.err.splitlines()[-1]


def test_sections_that_do_not_belong_together() -> None:
    with refuses("`encoder`", "bound", "denoising"):
        build_denoiser(toy_recipe("encoder=compact"))
    with refuses("split", "sigma2"):
        vectors = Dataset("v", torch.randn(8, 5), None, ())
        build_denoiser(toy_recipe("objective.kind=bound", "model.net=mlp", "objective.schedule=linear",
                                  "encoder={kind: compact, counterterm: split}", data=vectors))  # fmt: skip


def test_floats_have_a_density_and_bytes_values(tmp_path: Path) -> None:
    """Latents are no pixels: the decoder of values would read them as such."""
    latents = Dataset("latents", 3 * torch.randn(16, 1, 8, 8), None, ())
    run = toy_run(tmp_path / "run", "objective.kind=bound", "objective.schedule=linear", "train.images=32", data=latents)
    assert fit(run, data=latents).done
    assert isinstance(build_update(run.recipe, latents).objective.decoder, Nearby)
    assert isinstance(build_update(run.recipe, pictures(1, 8)).objective.decoder, Flat)
    bound = VariationalBound(Linear(), Flat())
    with refuses("`x0`", "256 values", "Plain()"):
        bound(build_update(run.recipe, latents).denoiser, Batch(latents.batch(torch.arange(4))[0], torch.arange(4), {}),
              Draws(0, 0, range(4)))  # fmt: skip


def test_a_learned_reverse_variance_trains_from_a_recipe(tmp_path: Path) -> None:
    """Twice the channels, read by the sampler and by the bound as a range between the small variance and the large."""
    run = toy_run(tmp_path / "run", "objective.kind=bound", "objective.schedule=linear", "train.images=32",
                  "bound={kind: steps, count: 10, reverse_variance: learned}")  # fmt: skip
    assert fit(run, data=toy_data()).done
    opened = open_source(str(run.path))
    assert getattr(opened.denoiser, "learned_range", False)
    x = generate(opened.denoiser, 2, grid=opened.grid(4, "uniform"), transition=Ancestral(range=True), cond={"label": 0})
    assert bool(x.isfinite().all())
    vectors = Dataset("v", torch.randn(8, 5), None, ())
    with refuses("'learned'", "vectors"):
        build_denoiser(toy_recipe("objective.kind=bound", "model.net=mlp", "objective.schedule=linear",
                                  "bound={kind: steps, reverse_variance: learned}", data=vectors))  # fmt: skip


def test_vectors_have_a_bound_too(tmp_path: Path) -> None:
    data = Dataset("v", torch.randn(16, 5), None, ())
    run = toy_run(tmp_path / "run", "objective.kind=bound", "model.net=mlp", "objective.schedule=linear", "data.flip=false",
                  "encoder=contraction", "train.images=32", data=data)  # fmt: skip
    assert fit(run, data=data).done
    assert isinstance(run.metrics()[-1]["reconstruction"], float)
    assert VariationalBound.__doc__
