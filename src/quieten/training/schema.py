"""What a recipe says: its sections, their defaults and their checks."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

__all__ = ["Data", "Model", "ObjectiveSection", "Part", "Recipe", "Sample", "Train"]


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
        cut: Side of the central square that is kept of a picture file before it is resized.
        flip: Whether examples are mirrored at random.
        shape: Shape of one example; known once a run exists, as are `classes` and `count`.
    """

    name: str
    folder: str | None = None
    size: PositiveInt | None = None
    channels: Literal[1, 3] | None = None
    labels: bool = True
    crop: Literal["center", "pad", "stretch"] = "center"
    cut: PositiveInt | None = None
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
        time_scale: The network's time is -time_scale times the log-SNR, unless `time` says otherwise.
        time: Another time for the network: "log-sigma", or "schedule" for the index of a chain.
    """

    net: Annotated[Part, _of("net")] = Part(kind="unet")
    process: Literal["vp", "ve", "flow"] = "vp"
    form: Literal["v", "eps", "x0", "flow", "edm"] = "v"
    sigma_data: PositiveFloat | None = None
    time_scale: float = 0.125
    time: Annotated[Part | None, BeforeValidator(lambda value: None if value is None else _part("time", value))] = None


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
        clip: Whether estimates of x0 are held in [-1, 1]; None does so for pictures.
    """

    steps: PositiveInt = 20
    grid: Annotated[Part, _of("grid")] = Part(kind="karras")
    transition: Annotated[Part, _of("transition")] = Part(kind="dpm++")
    scale: float = 1.0
    clip: bool | None = None


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


_BUILT_IN = {"net", "time", "schedule", "weighting", "objective", "grid"}
"""Parts that sections above name; the others are sections themselves."""
