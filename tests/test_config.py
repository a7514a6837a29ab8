"""Recipes: complete, checked, and what they build."""

import inspect
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from quieten import Batch, Draws, Table, Update, generate
from quieten.covariances.fit import fit_variance
from quieten.training.config import (
    build_denoiser,
    build_grid,
    build_objective,
    build_sampler,
    build_schedule,
    load_data,
    load_recipe,
    parse_recipe,
    recipe_names,
    resolve,
    with_overrides,
)
from quieten.training.parts import PARTS, register
from quieten.tuning.tune_start import Start, start_of
from toy import toy_data, toy_recipe


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes_are_complete_and_stay_the_same_when_written(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    again = parse_recipe(yaml.safe_load(recipe.to_yaml()), "copy")
    assert again == recipe
    if name in ("digits", "emoji", "fashion-mnist"):
        assert yaml.safe_load(recipe.to_yaml())["objective"]["schedule"] == {"kind": "lognormal", "mean": -0.2, "std": 1.3}


def test_every_default_is_written_so_that_later_defaults_do_not_change_old_runs() -> None:
    written = yaml.safe_load(toy_recipe().to_yaml())
    assert written["model"]["net"] | {"detail": 4, "width": 8} == written["model"]["net"]
    assert {"mult", "blocks", "attention", "patch", "t_scale"} <= set(written["model"]["net"])
    assert written["data"]["shape"] == [1, 8, 8]
    assert written["data"]["classes"] == ["top", "bottom"]
    assert written["sample"]["grid"] == {"kind": "karras", "sigma_min": None, "sigma_max": None, "rho": 7.0}


@pytest.mark.parametrize(
    "override, read, value",
    [
        ("train.batch=64", lambda r: r.train.batch, 64),
        ("train.lr=1e-4", lambda r: r.train.lr, 1e-4),
        ("train.betas=[0.8, 0.95]", lambda r: r.train.betas, (0.8, 0.95)),
        ("train.clip=null", lambda r: r.train.clip, None),
        ("objective.schedule=rectified", lambda r: r.objective.schedule.options, {"shift": 1.0}),
        ("objective.weighting.kind=simple", lambda r: r.objective.weighting.kind, "simple"),
        ("model.net={kind: mlp, width: 32}", lambda r: r.model.net.options["width"], 32),
        ("sample.transition=heun", lambda r: r.sample.transition.kind, "heun"),
    ],
)
def test_overrides_are_yaml(override: str, read: object, value: object) -> None:
    assert read(load_recipe("digits", [override])) == value  # type: ignore[operator]


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.bach=3", r"unknown key `train.bach` in section `train` of recipe digits: did you mean 'batch'\?"),
        ("modle.form=v", r"unknown section `modle`: did you mean 'model'\?"),
        ("model.net.widht=3", r"`model.net`: unknown key `widht` in the net 'unet': did you mean 'width'\?"),
        ("model.net=unett", r"unknown net 'unett': did you mean 'unet'\?"),
        ("train.batch=big", r"`train.batch` must be a valid integer \(got 'big'\)"),
        ("train.batch=0", r"`train.batch` must be greater than 0 \(got 0\)"),
        ("model.form=w", r"`model.form` must be 'v', 'eps', .* \(got 'w'\)"),
        ("objective.schedule.mean=[1]", r"`objective.schedule`: `mean` must be a valid number \(got \[1\]\)"),
        ("objective.kind=denoisin", r"unknown objective 'denoisin': did you mean 'denoising'\?"),
        ("sample.transition=heum", r"unknown transition 'heum': did you mean 'heun'\?"),
        ("train.batch", r"needs KEY.KEY=VALUE"),
        ("train.batch.size=3", r"'batch' holds the value 64, not a section"),
        ("train.batch=[", "not YAML"),
        ("version=2", "version 2, this library reads version 1"),
    ],
)
def test_mistakes_are_named_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe("digits", [override])
    assert "\n" not in str(caught.value)


def test_unknown_recipe_names_the_nearest_and_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"did you mean 'digits'\? \(known: .*digits, "):
        load_recipe("digitz")
    with pytest.raises(ValueError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="is not YAML"):
        load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "evil.yaml").write_text("!!python/object/apply:os.system ['exit']")
    with pytest.raises(ValueError, match="is not YAML"):
        load_recipe(tmp_path / "evil.yaml")


def test_a_recipe_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("version: 1\nname: mine\ndata: {name: digits}\n")
    recipe = load_recipe(tmp_path / "mine.yaml", ["train.seed=3"])
    assert (recipe.name, recipe.train.seed) == ("mine", 3)


# ---- recipes from data


def test_a_folder_of_unequal_pictures_gets_a_size_that_the_network_can_halve(tmp_path: Path) -> None:
    for k, size in enumerate([(50, 39), (47, 60), (38, 38)]):
        Image.new("RGB", size, (k, 0, 0)).save(tmp_path / f"{k}.png")
    recipe = load_recipe(tmp_path)
    assert recipe.data.size == 36  # the median of the shorter sides, 39, down to a multiple of 4
    recipe = resolve(recipe, data := load_data(recipe))
    assert recipe.data.shape == (3, 36, 36)
    x, _ = data.batch(torch.arange(2))
    assert build_denoiser(recipe)(x, 0.0).mean.shape == x.shape


@pytest.mark.parametrize(
    "array, shape, net",
    [
        (np.zeros((5, 16, 16, 3), np.uint8), (3, 16, 16), "unet"),
        (np.zeros((5, 30, 34), np.uint8), (1, 28, 28), "unet"),
        (np.zeros((5, 7), np.float32), (7,), "mlp"),
    ],
)
def test_arrays_get_a_network_that_fits(tmp_path: Path, array: np.ndarray, shape: tuple[int, ...], net: str) -> None:
    np.savez(tmp_path / "mine.npz", images=array)
    recipe = load_recipe(tmp_path / "mine.npz")
    recipe = resolve(recipe, data := load_data(recipe))
    assert (recipe.data.shape, recipe.model.net.kind, recipe.name) == (shape, net, "mine")
    x, _ = data.batch(torch.arange(2))
    assert build_denoiser(recipe)(x, 0.0).mean.shape == x.shape


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no images"):
        load_recipe(tmp_path)


# ---- what recipes build


@pytest.mark.parametrize("process", ["vp", "ve", "flow"])
@pytest.mark.parametrize("form", ["v", "eps", "x0", "flow", "edm"])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "linear-beta", "lognormal", "table"])
def test_every_combination_has_a_finite_loss_and_samples(process: str, form: str, schedule: str) -> None:
    recipe = toy_recipe(
        f"model.process={process}", f"model.form={form}", f"objective.schedule={schedule}", "model.net={kind: mlp, width: 8}"
    )
    update = Update(build_denoiser(recipe), build_objective(recipe))
    x, label = toy_data().batch(torch.arange(6))
    assert label is not None
    loss = update(Batch(x, torch.arange(6), {"label": label}), Draws(0, 0, range(6)))["loss"]
    assert loss.shape == (6,)
    assert loss.isfinite().all()
    transition, grid = build_sampler(recipe)
    samples = generate(update.denoiser, 2, grid=grid, transition=transition, cond={"label": 1})
    assert samples.shape == (2, 1, 8, 8)


@pytest.mark.parametrize("weighting", sorted(PARTS["weighting"]))
def test_every_weighting_builds(weighting: str) -> None:
    recipe = toy_recipe(f"objective.weighting={weighting}", "model.net={kind: mlp, width: 8}")
    x, label = toy_data().batch(torch.arange(4))
    assert label is not None
    batch = Batch(x, torch.arange(4), {"label": label})
    assert build_objective(recipe)(build_denoiser(recipe), batch, Draws(0, 0, range(4))).isfinite().all()


def test_labels_are_dropped_to_the_class_after_the_last() -> None:
    objective = build_objective(toy_recipe("objective.drop=0.25"))
    assert objective.drop == {"label": (0.25, 2)}  # type: ignore[comparison-overlap]
    assert build_objective(toy_recipe("objective.drop=0")).drop == {}  # type: ignore[comparison-overlap]


def test_karras_grid_runs_between_the_ends_of_the_schedule() -> None:
    recipe = toy_recipe("objective.schedule={kind: cosine, lam_max: 8, lam_min: -6}")
    grid = build_grid(recipe, 5)
    assert len(grid) == 6
    torch.testing.assert_close(grid[[0, 4]], torch.tensor([-6.0, 8.0], dtype=torch.float64))
    assert grid[5] == math.inf
    free = build_grid(toy_recipe("objective.schedule=rectified"), 3)
    torch.testing.assert_close(free[[0, 2]], -2 * torch.log(torch.tensor([80.0, 0.002], dtype=torch.float64)))
    along = build_grid(with_overrides(recipe, ["sample.grid={kind: schedule, spacing: quadratic}"]), 4)
    torch.testing.assert_close(along, build_schedule(recipe).grid(4, "quadratic"))


def test_the_table_is_that_of_ddpm() -> None:
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    table = build_schedule(toy_recipe("objective.schedule=table"))
    assert isinstance(table, Table)
    torch.testing.assert_close(table.lam, torch.logit((1 - betas).cumprod(0)), rtol=1e-9, atol=1e-9)


def test_a_learned_schedule_is_part_of_the_update() -> None:
    update = Update(
        build_denoiser(toy_recipe()), build_objective(toy_recipe("objective.schedule={kind: linear, learned: true}"))
    )
    assert "objective.schedule.ends" in dict(update.named_parameters())


# ---- parts that others add


class Net(nn.Module):
    def __init__(self, shape: tuple[int, ...], gain: float = 1.0):
        super().__init__()
        self.gain = nn.Parameter(torch.full(shape, gain))

    def forward(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        return self.gain * x


def test_registered_parts_and_sections_take_options_and_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "quieten.training.parts.PARTS", {part: dict(kinds) for part, kinds in PARTS.items() if part != "target"}
    )
    register("net", "gain", Net)
    recipe = toy_recipe("model.net={kind: gain, gain: 2}")
    assert recipe.model.net.options == {"gain": 2.0}
    assert build_denoiser(recipe).net.gain.shape == (1, 8, 8)
    with pytest.raises(ValueError, match="unknown section `target`"):
        toy_recipe("target.kind=mean")

    def mean(data: object, weight: float = 0.5) -> object:
        return lambda noised, batch: (weight * noised.x0, noised.eps)

    register("target", "mean", mean)
    recipe = toy_recipe("target=mean")
    assert recipe.section("target").options == {"weight": 0.5}  # type: ignore[union-attr]
    assert "target: {kind: mean, weight: 0.5}" in recipe.to_yaml()
    assert build_objective(recipe).target is not None  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"`wieght` in the target 'mean': did you mean 'weight'\?"):
        toy_recipe("target={kind: mean, wieght: 1}")


@pytest.mark.parametrize(
    "time, schedule, lam, value",
    [
        ("null", "cosine", 4.0, -0.5),
        ("log-sigma", "cosine", 4.0, -0.5),
        ("{kind: log-sigma, scale: 1.0, offset: -0.6931471805599453}", "cosine", -2 * math.log(6.0), math.log(3.0)),  # VE's
        ("schedule", "table", float(Table.from_betas(torch.linspace(1e-4, 0.02, 1000)).lam[37]), 37.0),
        ("{kind: schedule, scale: 1.0}", "{kind: geometric, sigma_min: 0.01, sigma_max: 100}", 0.0, 0.5),
        ("{kind: schedule, scale: 3999.0}", "{kind: cosine-table, steps_of_chain: 4000}", -60.0, 3999.0),
    ],
)
def test_what_the_network_is_told_as_its_time(time: str, schedule: str, lam: float, value: float) -> None:
    recipe = toy_recipe(f"model.time={time}", f"objective.schedule={schedule}")
    denoiser, seen = build_denoiser(recipe), []
    denoiser.net.register_forward_hook(lambda net, args, out: seen.append(args[1]))
    x = torch.zeros(2, 1, 8, 8)
    denoiser(x, lam)
    denoiser(x, torch.full((2,), lam, dtype=torch.float64))
    for t in seen:
        torch.testing.assert_close(t, torch.full((2,), value), rtol=1e-5, atol=1e-5)
    assert parse_recipe(yaml.safe_load(recipe.to_yaml()), "copy").model.time == recipe.model.time


def test_the_cosine_chain_is_that_of_the_official_code(golden) -> None:
    arrays = golden("ocm_schedule")
    recipe = toy_recipe("objective.schedule=cosine-table")
    expected = torch.logit(torch.from_numpy(arrays["cosine_1000_cum_alphas"][1:]))
    torch.testing.assert_close(build_schedule(recipe).lam, expected, rtol=1e-9, atol=1e-9)


def test_sections_have_the_defaults_of_what_they_describe() -> None:
    """Each number stands once: in `Start`, or in the signature of `fit_variance`."""
    start = toy_recipe("tune=dxmi").section("tune").options  # type: ignore[union-attr]
    assert start_of("dxmi", start) == Start()
    assert Start().to_dict().items() <= start.items()
    assert set(start) - set(Start().to_dict()) == {"reward", "trunk", "images", "batch", "lr"}
    fitting = toy_recipe("variance=ocm").section("variance").options  # type: ignore[union-attr]
    defaults = {name: p.default for name, p in inspect.signature(fit_variance).parameters.items()}
    shared = ("head", "basis", "block", "link", "derivative", "probes")
    assert {name: fitting[name] for name in shared} == {name: defaults[name] for name in shared}
    assert set(fitting) - set(shared) == {"cap", "trunk", "images", "batch", "lr"}
    with pytest.raises(ValueError, match=r"`heed_start` in the tune 'dxmi': did you mean 'head_start'\?"):
        toy_recipe("tune={kind: dxmi, heed_start: 1}")
    with pytest.raises(ValueError, match="`derivative` must be 'auto'"):
        toy_recipe("variance={kind: ocm, derivative: none}")
