"""Recipes: what to train, on what and how, as YAML that is checked before anything runs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

if TYPE_CHECKING:
    from torch import Tensor

    from .data import Dataset
    from .denoiser import Preconditioned
    from .objective import Denoising, Objective
    from .schedule import Schedule
    from .transition import Transition

__all__ = [
    "Part",
    "Recipe",
    "build_denoiser",
    "build_denoising",
    "build_grid",
    "build_objective",
    "build_sampler",
    "build_schedule",
    "load_data",
    "load_recipe",
    "parse_recipe",
    "recipe_names",
    "resolve",
    "with_overrides",
]

FOLDER = Path(__file__).parent / "recipes"


# ---- what a recipe says


class Part(BaseModel):
    """A choice with its options, `{kind: cosine, lam_max: 10}`; in YAML also `cosine` alone. The options are complete."""

    model_config = ConfigDict(extra="allow", frozen=True)
    kind: str

    @property
    def options(self) -> dict[str, Any]:
        """Everything but the kind."""
        return dict(self.__pydantic_extra__ or {})


def _part(name: str, value: Any) -> Any:
    from .parts import check_options

    if isinstance(value, Part):
        value = value.model_dump()
    if isinstance(value, str):
        value = {"kind": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("kind"), str):
        raise ValueError(f"must be the name of a {name}, or a mapping with a `kind` (got {value!r})")
    options = {str(key): option for key, option in value.items() if key != "kind"}
    return {"kind": value["kind"], **check_options(name, value["kind"], options)}


def _of(name: str) -> BeforeValidator:
    return BeforeValidator(functools.partial(_part, name))


def _objective(kind: str) -> str:
    from .parts import find

    find("objective", kind)
    return kind


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Data(_Section):
    """What to train on; see `data.load` for the arguments of the same names.

    Attributes:
        name: A data set's name, or a path.
        folder: Where to look for a named set first.
        flip: Whether examples are mirrored at random.
        shape: Shape of one example; known once a run exists, as are `classes` and `count`.
    """

    name: str
    folder: str | None = None
    size: PositiveInt | None = None
    channels: Literal[1, 3] | None = None
    labels: bool = True
    crop: Literal["center", "pad", "stretch"] = "center"
    flip: bool = False
    skip_corrupt: bool = False
    download: bool = False
    shape: tuple[int, ...] | None = None
    classes: tuple[str, ...] = ()
    count: int | None = None


class Model(_Section):
    """The denoiser.

    Attributes:
        net: The network; its channels, size and classes are the data's.
        sigma_data: Standard deviation of the data in the input scaling, and of the form "edm"; None leaves the input alone.
        time_scale: The network's time is -time_scale times the log-SNR.
    """

    net: Annotated[Part, _of("net")] = Part(kind="unet")
    process: Literal["vp", "ve", "flow"] = "vp"
    form: Literal["v", "eps", "x0", "flow", "edm"] = "v"
    sigma_data: PositiveFloat | None = None
    time_scale: float = 0.125


class ObjectiveSection(_Section):
    """The loss.

    Attributes:
        drop: Probability that a label is replaced by "no class", which trains guidance.
    """

    kind: Annotated[str, AfterValidator(_objective)] = "denoising"
    schedule: Annotated[Part, _of("schedule")] = Part(kind="cosine", lam_max=10.0, lam_min=-10.0)  # type: ignore[call-arg]
    weighting: Annotated[Part, _of("weighting")] = Part(kind="v")
    drop: Annotated[float, Field(ge=0, le=1)] = 0.1


class Train(_Section):
    """How to train. Durations are in images, so that they mean the same at every batch size.

    Attributes:
        images: Examples to show in all.
        batch: Examples of a step, of all processes and accumulated parts together.
        accumulate: Parts into which a process cuts its share of a batch.
        warmup: Images over which the learning rate rises.
        clip: Bound on the norm of the gradient; None for none.
        ema: Half-life of the averaged weights, and at most `ema_warmup` times the images shown so far.
        precision: Of the network; "auto" is bf16 where the device has it in hardware, else fp32.
        log_every: Steps between lines of metrics.
        preview_every: Images between preview grids; None for none.
        save_every: Images between checkpoints; None leaves it to `save_minutes`.
        on_nan: Whether a loss that is not finite stops training, or skips the step.
    """

    images: PositiveInt = 1_000_000
    batch: PositiveInt = 128
    accumulate: PositiveInt = 1
    optimizer: Literal["adam", "adamw"] = "adam"
    lr: PositiveFloat = 1e-3
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup: Annotated[int, Field(ge=0)] = 10_000
    decay: Literal["constant", "cosine"] = "cosine"
    clip: PositiveFloat | None = 1.0
    ema: PositiveInt = 50_000
    ema_warmup: PositiveFloat = 0.05
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0
    log_every: PositiveInt = 20
    preview_every: PositiveInt | None = None
    previews: PositiveInt = 40
    save_every: PositiveInt | None = None
    save_minutes: PositiveFloat | None = 5.0
    on_nan: Literal["stop", "skip"] = "stop"
    compile: bool = False


class Sample(_Section):
    """How to sample unless told otherwise.

    Attributes:
        grid: Levels; see `build_grid`.
        transition: A name in `samplers.SAMPLERS`, with its options.
        scale: Strength of guidance without a classifier; 1 for none.
    """

    steps: PositiveInt = 20
    grid: Annotated[Part, _of("grid")] = Part(kind="karras")
    transition: Annotated[Part, _of("transition")] = Part(kind="dpm++")
    scale: float = 1.0


class Recipe(BaseModel):
    """A complete description of a training run. Other parts, such as those that `parts.register` adds, are extra sections."""

    model_config = ConfigDict(extra="allow", frozen=True, validate_default=True)
    version: Literal[1]
    name: str
    data: Data
    model: Model = Field(default_factory=Model)
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection)
    train: Train = Field(default_factory=Train)
    sample: Sample = Field(default_factory=Sample)

    @model_validator(mode="after")
    def _sections(self) -> Recipe:
        from .parts import PARTS, nearest

        extra = self.__pydantic_extra__ or {}
        known = [*type(self).model_fields, *(part for part in PARTS if part not in _BUILT_IN)]
        for name, value in extra.items():
            if name not in known:
                raise ValueError(f"unknown section `{name}`{nearest(name, known)} (known: {', '.join(known)})")
            extra[name] = Part(**_part(name, value))
        return self

    def section(self, name: str) -> Part | None:
        """An extra section; None when the recipe has none of that name."""
        return (self.__pydantic_extra__ or {}).get(name)

    def to_yaml(self) -> str:
        """The whole recipe, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=120)


_BUILT_IN = {"net", "schedule", "weighting", "objective", "grid", "transition"}


# ---- reading one


def recipe_names() -> list[str]:
    """The recipes that come with the library."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by name, from a YAML file, or made to fit a folder of images or another data set that `data.load` reads.

    Arguments:
        name_or_path: One of `recipe_names()`, a .yaml file, or data.
        overrides: Changes such as "train.batch=64"; values are YAML.

    Raises:
        ValueError: If there is no such recipe, or for an unknown key or a value of the wrong type.
    """
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if name in recipe_names():
        content = _read(FOLDER / f"{name}.yaml")
    elif path.suffix in (".yaml", ".yml"):
        content = _read(path)
    elif path.exists():
        from .guess import guess

        content = guess(path)
    else:
        from .parts import nearest

        raise ValueError(f"unknown recipe {name!r}{nearest(name, recipe_names())} (known: {', '.join(recipe_names())}; "
                         "or a .yaml file, or a folder of images)")  # fmt: skip
    return parse_recipe(_set(content, overrides), f"recipe {name}")


def with_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe with changes such as "train.batch=64"."""
    return parse_recipe(_set(recipe.model_dump(mode="json"), overrides), f"recipe {recipe.name}")


def parse_recipe(content: Any, source: str) -> Recipe:
    """A recipe from the content of its YAML.

    Raises:
        ValueError: For an unknown key or version, or a value of the wrong type, naming the source.
    """
    from .parts import explain

    if not isinstance(content, Mapping):
        raise ValueError(f"{source} must be a mapping with version, name, data, ... (got {type(content).__name__})")
    version = content.get("version")
    if version != 1:
        raise ValueError(f"{source} has version {version!r}, this library reads version 1: write `version: 1`, or update it")
    try:
        return Recipe(**{str(key): value for key, value in content.items()})
    except ValidationError as error:
        raise ValueError(explain(error, source, _fields)) from None


def _fields(loc: tuple[Any, ...]) -> list[str]:
    """The keys that a section knows."""
    model: Any = Recipe
    for key in loc:
        model = model.model_fields[key].annotation
    return list(model.model_fields)


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): name an existing recipe file") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML ({' '.join(str(error).split())}): correct the file") from None


def _set(content: Any, overrides: Sequence[str]) -> Any:
    content = copy.deepcopy(content)
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise ValueError(f"`--set` needs KEY.KEY=VALUE (got {override!r}), such as train.batch=64")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"`--set {override}`: the value is not YAML; quote it") from None
        place = content
        for key in keys[:-1]:
            if isinstance(place.get(key), str):
                place[key] = {"kind": place[key]}  # `schedule: cosine` takes options too
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise ValueError(f"`--set {override}`: {key!r} holds the value {place!r}, not a section")
        place[keys[-1]] = value
    return content


# ---- building what it says


def load_data(recipe: Recipe, split: str = "train") -> Dataset:
    """The data of a recipe."""
    from .data import load

    data = recipe.data
    return load(
        data.name,
        split=split,
        size=data.size,
        channels=data.channels,
        labels=data.labels,
        skip_corrupt=data.skip_corrupt,
        crop=data.crop,
        data=data.folder,
        download=data.download,
    )


def resolve(recipe: Recipe, data: Dataset) -> Recipe:
    """The recipe with what only the data can say: the shape of an example, the classes, the count.

    Raises:
        ValueError: If the recipe says otherwise already.
    """
    facts = {"shape": data.shape, "classes": tuple(data.classes), "count": len(data)}
    if recipe.data.shape is not None and recipe.data.shape != data.shape:
        raise ValueError(f"`data` {data.name} has examples of shape {data.shape}, the recipe was made for {recipe.data.shape}: "
                         "train a new run on it")  # fmt: skip
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=facts)})


def _context(recipe: Recipe) -> dict[str, Any]:
    shape = recipe.data.shape
    if shape is None:
        raise ValueError("`recipe.data.shape` is unknown: pass the recipe through `resolve(recipe, load_data(recipe))`")
    context: dict[str, Any] = {"shape": shape, "classes": len(recipe.data.classes), "recipe": recipe}
    return context | {"channels": shape[0], "size": shape[-1]} if len(shape) == 3 else context


def build_denoiser(recipe: Recipe) -> Preconditioned:
    """The denoiser, its network freshly initialised from torch's global generator."""
    from .denoiser import Preconditioned, edm_form
    from .parts import build
    from .process import PROCESSES

    model, scale = recipe.model, recipe.model.time_scale
    net = build("net", model.net.kind, model.net.options, **_context(recipe))
    sigma_data = 0.5 if model.form == "edm" and model.sigma_data is None else model.sigma_data
    form = edm_form(sigma_data) if model.form == "edm" and sigma_data else model.form
    return Preconditioned(
        net, PROCESSES[model.process], form, lambda lam: -scale * lam, sigma_data=sigma_data, shape=recipe.data.shape
    )


def build_schedule(recipe: Recipe) -> Schedule:
    """The curve of levels to train on."""
    from .parts import build

    schedule = recipe.objective.schedule
    return build("schedule", schedule.kind, schedule.options)


def build_objective(recipe: Recipe, data: Dataset | None = None) -> Objective:
    """The loss, with what it learns itself; `data` for objectives that look at all of it."""
    from .parts import build

    return build("objective", recipe.objective.kind, {}, recipe=recipe, data=data)


def build_denoising(recipe: Recipe, data: Dataset | None = None) -> Denoising:
    """Weighted regression of x0; a section `target` says on what, when there is one."""
    from .objective import Denoising
    from .parts import build

    weighting, target = recipe.objective.weighting, recipe.section("target")
    regress_on = None if target is None else build("target", target.kind, target.options, **_context(recipe), data=data)
    classes, drop = len(recipe.data.classes), recipe.objective.drop
    dropped: dict[str, tuple[float, int | float]] = {"label": (drop, classes)} if classes and drop else {}
    return Denoising(build_schedule(recipe), build("weighting", weighting.kind, weighting.options), regress_on, dropped)


def build_grid(recipe: Recipe, steps: int | None = None, schedule: Schedule | None = None) -> Tensor:
    """Levels to sample on, float64 (steps + 1,), from noise to +inf.

    Arguments:
        recipe: Its section `sample` names the kind of grid.
        steps: None is the recipe's.
        schedule: The training curve, where it was learned; None is as the recipe starts it.
    """
    from .parts import build

    grid, steps = recipe.sample.grid, recipe.sample.steps if steps is None else steps
    curve = build_schedule(recipe) if schedule is None else schedule
    return build("grid", grid.kind, grid.options, steps=steps, schedule=curve)


def build_sampler(recipe: Recipe, steps: int | None = None, schedule: Schedule | None = None) -> tuple[Transition, Tensor]:
    """What takes the sampling steps, and the grid it runs on; arguments as in `build_grid`."""
    from .samplers import sampler

    chosen = recipe.sample.transition
    return sampler(chosen.kind, build_grid(recipe, steps, schedule), **chosen.options)
