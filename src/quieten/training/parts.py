"""The choices of a recipe: a table from names to builders, and the builders that are not simply a class."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, create_model
from pydantic.errors import PydanticSchemaGenerationError
from torch import Tensor

from ..denoiser import cosine_table
from ..objective import Weighting, edm_weighting, min_snr
from ..schedule import Linear, Schedule, Table, karras
from ..solvers.samplers import SAMPLERS

__all__ = ["PARTS", "Builder", "borrows", "build", "check_options", "explain", "nearest", "register"]

Builder = Callable[..., Any]


def _itself(name: str) -> str:
    return name


PARTS: dict[str, dict[str, str | Builder]] = {
    "net": {
        "unet": "nets:UNet",
        "mlp": "networks.mlp:MLP",
        "vdm": "networks.vdm_nets:ScoreUNet",
        "ddpm": "networks.unet:ddpm",
        "iddpm": "networks.unet:iddpm",
        "ddpm++": "networks.unet:ddpmpp",
        "ncsn++": "networks.unet:ncsnpp",
        "adm": "networks.unet:adm",
        "dit": "networks.dit:DiT",
        "dit-b": "networks.dit:dit_b",
        "dit-xl": "networks.dit:dit_xl",
    },
    "schedule": {
        "cosine": "schedule:Cosine",
        "cosine-table": "training.parts:cosine_chain",
        "geometric": "training.parts:geometric",
        "linear": "schedule:Linear",
        "linear-beta": "schedule:LinearBeta",
        "lognormal": "schedule:LogNormal",
        "monotone": "likelihoods.learned:Monotone",
        "polynomial": "likelihoods.learned:Polynomial",
        "rectified": "schedule:Rectified",
        "table": "training.parts:beta_table",
    },
    "time": {"log-sigma": "training.parts:time_of_sigma", "schedule": "training.parts:time_of_schedule"},
    "weighting": {
        **{name: functools.partial(_itself, name) for name in ("simple", "x0", "v", "flow", "likelihood")},
        "edm": "training.parts:weigh_edm",
        "min-snr": "training.parts:weigh_min_snr",
    },
    "objective": {
        "denoising": "training.config:build_denoising",
        "hybrid": "training.config:build_hybrid",
        "bound": "training.config:build_bound",
    },
    "bound": {"continuous": "likelihoods.bound:continuous", "steps": "likelihoods.bound:in_steps"},
    "hybrid": {"steps": "likelihoods.hybrid:in_hybrid"},
    "encoder": {
        "contraction": "encoding.encoders:contraction",
        "compact": "encoding.encoders:compact",
        "published": "encoding.encoders:published",
    },
    "augment": {"edm": "training.augment:EDMAugment", "dihedral": "training.augment:Dihedral"},
    "target": {"stable": "target:from_recipe"},
    "grid": {"karras": "training.parts:karras_between", "schedule": "training.parts:along_schedule"},
    "transition": {**{name: entry.make for name, entry in SAMPLERS.items()}, "encoded-flow": "encoding.encoded:EncodedFlow"},
    "variance": dict.fromkeys(("ocm", "sn", "npr", "mixed"), "covariances.fit:section"),
    "tune": dict.fromkeys(("dxmi", "sft-pg", "sft-ppo", "bptt", "dxdp"), "tuning.tune_start:section"),
}
"""Part of a recipe -> kind -> builder: a callable, or "module:name" in this package, imported when it is first used.

A builder's arguments are the options of its kind. Those named in `CONTEXT` come from the recipe around them.
"""

CONTEXT = ("channels", "classes", "data", "recipe", "schedule", "shape", "size", "steps")
"""Arguments that builders get from the recipe, where they ask for them: the data's shape and so on."""


def register(part: str, kind: str, builder: str | Builder) -> None:
    """Adds a kind to a part. A part that is new becomes an optional section of recipes, built with `build`."""
    PARTS.setdefault(part, {})[kind] = builder
    _options.cache_clear()


def build(part: str, kind: str, options: Mapping[str, Any], **context: Any) -> Any:
    """What a choice names, built from its options and from as much of the context as it asks for.

    Raises:
        ValueError: For an unknown kind or option, or a value of the wrong type.
    """
    builder = find(part, kind)
    wanted = inspect.signature(builder).parameters
    given = {name: value for name, value in context.items() if name in wanted}
    checked = check_options(part, kind, options)
    return builder(**{**given, **{name: value for name, value in checked.items() if name not in given or value is not None}})


def find(part: str, kind: str) -> Builder:
    """The builder of a kind.

    Raises:
        ValueError: If there is none.
    """
    known = PARTS[part]
    if kind not in known:
        raise ValueError(f"unknown {part} {kind!r}{nearest(kind, known)} (known: {', '.join(known)})")
    builder = known[kind]
    if isinstance(builder, str):
        module, name = builder.split(":")
        builder = getattr(importlib.import_module(f"quieten.{module}"), name)
    return builder


def check_options(part: str, kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, converted to the types that the builder declares and completed with its defaults.

    Raises:
        ValueError: For an unknown kind or option, or a value of the wrong type.
    """
    find(part, kind)
    model = _options(part, kind)
    try:
        return dict(model(**options))
    except ValidationError as error:
        raise ValueError(explain(error, f"the {part} {kind!r}", lambda _: model.model_fields)) from None


@functools.cache
def _options(part: str, kind: str) -> type[BaseModel]:
    """The options of a kind as a model: the arguments of its builder that YAML can express."""
    fields: dict[str, Any] = {}
    builder = find(part, kind)
    plain = builder.func if isinstance(builder, functools.partial) else builder
    names = vars(sys.modules[plain.__module__])
    for name, parameter in inspect.signature(builder).parameters.items():
        if name in CONTEXT or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        annotation = parameter.annotation
        try:
            annotation = eval(annotation, names) if isinstance(annotation, str) else annotation
            TypeAdapter(annotation)
        except (NameError, PydanticSchemaGenerationError):
            continue  # such as a Process: only code can give it
        fields[name] = (annotation, ... if parameter.default is parameter.empty else parameter.default)
    return create_model(f"{part} {kind}", __config__=ConfigDict(extra="forbid", protected_namespaces=()), **fields)


def borrows(source: Callable[..., Any], *but: str) -> Callable[[Builder], Builder]:
    """Decorates a builder of `**options`: it takes those of another callable, or of a dataclass, with the same defaults.

    Arguments:
        source: Whose keyword arguments are taken, before the builder's own.
        *but: Names that are not.
    """

    def decorate(builder: Builder) -> Builder:
        makers = {f.name: f.default_factory for f in dataclasses.fields(source)} if dataclasses.is_dataclass(source) else {}
        taken = []
        for p in inspect.signature(source).parameters.values():
            if p.name not in but and p.default is not p.empty:
                make = makers.get(p.name, dataclasses.MISSING)
                default = p.default if make is dataclasses.MISSING else make()
                taken.append(p.replace(kind=p.KEYWORD_ONLY, default=default))
        own = [p for p in inspect.signature(builder).parameters.values() if p.kind is not p.VAR_KEYWORD]
        builder.__signature__ = inspect.Signature([*taken, *own])  # type: ignore[attr-defined]
        return builder

    return decorate


def nearest(word: str, known: Iterable[str]) -> str:
    """ ": did you mean 'width'?" when something known is near the word, else nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f": did you mean {near[0]!r}?" if near else ""


def explain(error: ValidationError, where: str, fields: Callable[[tuple[Any, ...]], Iterable[str]], prefix: str = "") -> str:
    """The first problem in one line: the key, the value and what was expected.

    Arguments:
        error: What pydantic found.
        where: Names the whole for which the values are.
        fields: Location of a group of keys -> the keys it knows.
        prefix: Dotted path of the whole.
    """
    first = error.errors(include_url=False)[0]
    loc = tuple(part for part in first["loc"] if isinstance(part, str | int))
    key = ".".join([*([prefix] if prefix else []), *map(str, loc)])
    if first["type"] == "extra_forbidden":
        known = sorted(fields(loc[:-1]))
        near = nearest(str(loc[-1]), known) or f" (known: {', '.join(known)})"
        place = ".".join(map(str, loc[:-1]))
        return f"unknown key `{key}` in {f'section `{place}` of ' if place else ''}{where}{near}"
    if first["type"] == "missing":
        return f"`{key}` is missing in {where}: give it a value"
    if first["type"] == "value_error":
        return f"`{key}`: {first['ctx']['error']}" if key else f"{first['ctx']['error']} in {where}"
    message = first["msg"].replace("Input should be", "must be").split(", unable")[0]
    return f"`{key}` {message} (got {first['input']!r}) in {where}"


# ---- builders


def beta_table(
    steps_of_chain: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    curve: Literal["linear", "scaled"] = "linear",
) -> Table:
    """The discrete VP chain of DDPM; "scaled" is linear in the root of beta, as latent diffusion models have it."""
    power = 1.0 if curve == "linear" else 0.5
    betas = torch.linspace(beta_start**power, beta_end**power, steps_of_chain, dtype=torch.float64) ** (1.0 / power)
    return Table.from_betas(betas)


def cosine_chain(steps_of_chain: int = 1000, max_beta: float = 0.999, offset: float = 0.008) -> Table:
    """The discrete cosine chain of Improved DDPM; see `denoiser.cosine_table`."""
    return cosine_table(steps_of_chain, max_beta, offset)


def geometric(sigma_min: float = 0.002, sigma_max: float = 80.0) -> Linear:
    """sigma / alpha geometric in u, so that the log-SNR is linear: the levels of the VE diffusion."""
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"`sigma_min` must lie in (0, sigma_max) (got {sigma_min}, {sigma_max})")
    return Linear(-2.0 * math.log(sigma_min), -2.0 * math.log(sigma_max))


def time_of_sigma(scale: float = 0.25, offset: float = 0.0) -> Callable[[Tensor], Tensor]:
    """scale ln(sigma / alpha) + offset: EDM's by default; scale 1 and offset -ln 2 are VE's."""
    return lambda lam: offset - 0.5 * scale * lam


def time_of_schedule(schedule: Schedule, scale: float = 999.0) -> Callable[[Tensor], Tensor]:
    """scale u, u in [0, 1] the place on the training curve: the index of a chain of 1,000, or 999 t of the VP diffusion."""
    if isinstance(schedule, Table) and scale == len(schedule) - 1:
        return schedule  # its index, which needs no tensors in the sampling loop
    return lambda lam: scale * schedule.inverse(lam)


def weigh_edm(sigma_data: float = 0.5) -> Weighting:
    """EDM's weighting; see `objective.edm_weighting`."""
    return edm_weighting(sigma_data)


def weigh_min_snr(gamma: float = 5.0) -> Weighting:
    """Min-SNR weighting; see `objective.min_snr`."""
    return min_snr(gamma)


def karras_between(
    steps: int, schedule: Schedule, sigma_min: float | None = None, sigma_max: float | None = None, rho: float = 7.0
) -> Tensor:
    """EDM's grid; ends that are not given are those of the schedule, or EDM's own where it has none."""
    with torch.no_grad():
        clean, noisy = schedule(torch.tensor([0.0, 1.0], dtype=torch.float64)).mul(-0.5).exp().tolist()
    low = sigma_min or (clean if 0 < clean < math.inf else 0.002)
    high = sigma_max or (noisy if 0 < noisy < math.inf else 80.0)
    return karras(steps, low, high, rho)


def along_schedule(steps: int, schedule: Schedule, spacing: str | None = None) -> Tensor:
    """The grid of the schedule itself; `spacing` None is its default."""
    return schedule.grid(steps) if spacing is None else schedule.grid(steps, spacing)
