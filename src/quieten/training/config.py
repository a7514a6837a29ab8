"""Recipes: YAML that is checked before anything runs, and what is built from it."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from .schema import Part, Recipe, Train

if TYPE_CHECKING:
    from torch import Tensor

    from ..data import Dataset
    from ..denoiser import Preconditioned
    from ..encoder import Encoder
    from ..likelihoods.bound import VariationalBound
    from ..likelihoods.hybrid import Hybrid
    from ..objective import Denoising, Objective, Weighting
    from ..process import Process
    from ..schedule import Schedule
    from ..transition import Transition

__all__ = [
    "Part",
    "Recipe",
    "Train",
    "build_denoiser",
    "build_denoising",
    "build_grid",
    "build_hybrid",
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

FOLDER = Path(__file__).parents[1] / "recipes"


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
    from ..data import load

    data = recipe.data
    return load(
        data.name,
        split=split,
        size=data.size,
        channels=data.channels,
        labels=data.labels,
        skip_corrupt=data.skip_corrupt,
        crop=data.crop,
        cut=data.cut,
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
    from ..denoiser import Preconditioned, edm_form
    from ..encoding.encoded import Separated
    from .parts import build

    model, scale = recipe.model, recipe.model.time_scale
    process, split = _process(recipe)
    context = _context(recipe)
    bound = recipe.section("bound") if recipe.objective.kind == "bound" else None
    hybrid = recipe.objective.kind == "hybrid"
    ranged = hybrid or (bound is not None and bound.options.get("reverse_variance") == "learned")
    if (split or ranged) and "channels" not in context:
        raise ValueError("the counterterm 'split' is for images: take sigma2 or none for vectors" if split else
                         "the objective 'hybrid' is for images: take denoising for vectors" if hybrid else
                         "the reverse variance 'learned' is for images: take equal or optimal for vectors")  # fmt: skip
    wide = {"out_channels": 2 * context["channels"]} if split or ranged else {}
    net = build("net", model.net.kind, model.net.options | wide, **context)
    if recipe.section("augment") is not None and "augment" not in inspect.signature(net.forward).parameters:
        raise ValueError(f"`augment` needs a network that is told what was done: the net {model.net.kind!r} is not, "
                         "take another or leave out the section")  # fmt: skip
    sigma_data = 0.5 if model.form == "edm" and model.sigma_data is None else model.sigma_data
    form = edm_form(sigma_data) if model.form == "edm" and sigma_data else model.form
    kind = Separated if split else functools.partial(Preconditioned, learned_range=ranged)
    embed = lambda lam: -scale * lam  # noqa: E731
    if model.time is not None:
        embed = build("time", model.time.kind, model.time.options, schedule=build_schedule(recipe))
    return kind(net, process, form, embed, sigma_data=sigma_data, shape=recipe.data.shape)


def _process(recipe: Recipe) -> tuple[Process, bool]:
    """The process of the denoiser, and whether it predicts the rate of encoded data too."""
    from ..encoding.encoded import Encoded
    from ..process import PROCESSES

    base, encoder = PROCESSES[recipe.model.process], recipe.section("encoder")
    if encoder is None:
        return base, False
    if recipe.objective.kind != "bound":
        raise ValueError(f"section `encoder` needs `objective.kind` to be bound (got {recipe.objective.kind!r}): only the "
                         "variational bound trains an encoder")  # fmt: skip
    counterterm = encoder.options["counterterm"]
    return Encoded(base, counterterm, trained=encoder.kind != "contraction"), counterterm == "split"


def build_schedule(recipe: Recipe) -> Schedule:
    """The curve of levels to train on."""
    from .parts import build

    schedule = recipe.objective.schedule
    return build("schedule", schedule.kind, schedule.options)


def build_objective(recipe: Recipe, data: Dataset | None = None) -> Objective:
    """The loss, with what it learns itself; `data` for objectives that look at all of it."""
    from .parts import build

    if recipe.objective.kind == "bound" and recipe.section("target") is not None:
        raise ValueError("section `target` says what denoising regresses on, the variational bound does not: leave it out, or "
                         "take objective.kind=denoising")  # fmt: skip
    if recipe.objective.kind != "hybrid" and recipe.section("hybrid") is not None:
        raise ValueError(f"section `hybrid` needs `objective.kind` to be hybrid (got {recipe.objective.kind!r}): change it, or "
                         "leave the section out")  # fmt: skip
    return build("objective", recipe.objective.kind, {}, recipe=recipe, data=data)


def build_denoising(recipe: Recipe, data: Dataset | None = None) -> Denoising:
    """Weighted regression of x0; a section `target` says on what, when there is one."""
    from ..objective import Denoising

    return Denoising(*_denoising(recipe, data))


def build_hybrid(recipe: Recipe, data: Dataset | None = None) -> Hybrid:
    """Weighted regression of x0, and the variational bound for a learned range; the section `hybrid` has its options."""
    from ..likelihoods.hybrid import Hybrid
    from .parts import build

    kind = recipe.section("hybrid")
    return Hybrid(*_denoising(recipe, data), **({} if kind is None else build("hybrid", kind.kind, kind.options)))


def _denoising(recipe: Recipe, data: Dataset | None) -> tuple[Schedule, Weighting, Any, dict[str, tuple[float, int | float]]]:
    """The arguments of a weighted regression: schedule, weighting, target, and what to drop."""
    from .parts import build

    weighting, target = recipe.objective.weighting, recipe.section("target")
    regress_on = None if target is None else build("target", target.kind, target.options, **_context(recipe), data=data)
    return build_schedule(recipe), build("weighting", weighting.kind, weighting.options), regress_on, _drop(recipe)


def build_bound(recipe: Recipe, data: Dataset | None = None) -> VariationalBound:
    """The variational bound; the sections `bound` and `encoder`, where there are any, say of what kind.

    Of bytes it bounds the likelihood of the values, of floats the density.
    """
    from ..likelihoods.bound import VariationalBound
    from ..likelihoods.decoders import Flat, Nearby
    from ..process import PROCESSES
    from .parts import build

    kind = recipe.section("bound")
    options = {} if kind is None else build("bound", kind.kind, kind.options)
    process, pictures = PROCESSES[recipe.model.process], len(recipe.data.shape or ()) == 3
    floats = data is not None and getattr(getattr(data.images, "dtype", None), "is_floating_point", False)
    decoder = Flat(process) if pictures and not floats else Nearby(process)
    return VariationalBound(build_schedule(recipe), decoder, encoder=build_encoder(recipe), drop=_drop(recipe), **options)


def build_encoder(recipe: Recipe) -> Encoder | None:
    """The encoder of the section of that name, freshly initialised; None without."""
    from .parts import build

    encoder = recipe.section("encoder")
    return None if encoder is None else build("encoder", encoder.kind, encoder.options, **_context(recipe))


def _drop(recipe: Recipe) -> dict[str, tuple[float, int | float]]:
    classes, drop = len(recipe.data.classes), recipe.objective.drop
    return {"label": (drop, classes)} if classes and drop else {}


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
    from ..solvers.samplers import sampler

    chosen = recipe.sample.transition
    return sampler(chosen.kind, build_grid(recipe, steps, schedule), **chosen.options)
