"""What commands work on: a run, an exported file, a model of the zoo, or a diffusers pipeline, opened by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..encoder import Encoder
from ..schedule import Schedule, Table
from ..wrap import Clip
from . import bundled

__all__ = ["Source", "device_of", "open_source"]


@dataclass(frozen=True)
class Source:
    """Something to sample from.

    Attributes:
        denoiser: Conditions still free.
        grid: (steps, spacing or None) to levels.
        home: Where its samples go.
        classes: Names of its classes; () without.
        null: Values of the conditions that mean "none", for guidance; {} if it never learned one.
        steps: Number of steps, unless told otherwise.
        transition: Name of the sampler, unless told otherwise, and its options.
        scale: Guidance, unless told otherwise.
        clip: Bound on x0; None where there is none.
        decode: From samples to images, for latent models.
        prompt: From texts to conditions, for models that take text.
        weights: Which weights these are, for the record.
        encode: From images to what the denoiser works on, for latent models.
        image: Shape (C, H, W) of those images.
        schedule: The curve of levels that the network was trained on, None where it is unknown.
        encoder: What the bound of the network was trained with, None without.
        excess: By how much to widen each step of the training, see `bound.Widened`; None where that was not learned.
        fitting: What the recipe says of fitting one, as options of `quieten variance fit`; {} where it is silent.
        variances: Folders of variances that were fitted to it, in the order of searching; new ones go to the first.
        policies: Folders of policies that were tuned from it, likewise.
        tuning: What the recipe says of tuning one, as options of `quieten tune`; {} where it is silent.
    """

    denoiser: Denoiser
    grid: Callable[[int, str | None], Tensor]
    home: Path
    classes: tuple[str, ...] = ()
    null: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 20
    transition: tuple[str, Mapping[str, Any]] = ("dpm++", {})
    scale: float = 1.0
    clip: Clip | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    prompt: Callable[[list[str]], dict[str, Tensor]] | None = None
    weights: str = "pretrained"
    encode: Callable[[Tensor], Tensor] | None = None
    image: tuple[int, ...] | None = None
    schedule: Schedule | None = None
    encoder: Encoder | None = None
    excess: Tensor | None = None
    fitting: Mapping[str, Any] = field(default_factory=dict)
    variances: tuple[Path, ...] = ()
    policies: tuple[Path, ...] = ()
    tuning: Mapping[str, Any] = field(default_factory=dict)

    @property
    def table(self) -> Table | None:
        """The levels that the network was trained on, where they are a table."""
        return self.schedule if isinstance(self.schedule, Table) else None

    @property
    def draws_pictures(self) -> bool:
        """Whether a sample is something to look at."""
        shape = self.denoiser.shape
        return self.decode is not None or shape is None or (len(shape) == 3 and shape[0] in (1, 3))


def open_source(source: str, weights: str = "ema", device: str | None = None) -> Source:
    """A run, an exported file, a model of the zoo, a diffusers folder, or the hub id of a run or pipeline, ready to sample.

    Raises:
        ValueError: If it is nothing of the kind, or damaged, or the device cannot be used.
    """
    source = bundled.full_name(source)
    where, path = device_of(device), Path(source).expanduser()
    ours = source.startswith("zoo:") or path.suffix == ".safetensors" or (path / "config.yaml").is_file()
    theirs = any((path / name).is_file() for name in ("model_index.json", "config.json"))
    hub_id = source.count("/") == 1 and not path.parent.is_dir() and path.parts[0] not in ("runs", "~")
    if ours or not (theirs or hub_id):
        return _from_run(source, weights, where)
    return (None if theirs else _from_hub(source, weights, where)) or _from_diffusers(source, where)


def device_of(name: str | None) -> str:
    """The device of that name, tried; the best there is for None.

    Raises:
        ValueError: If it cannot be used.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"`--device {name}` cannot be used here ({str(error).splitlines()[0]}): try cpu") from error
    return name


def _from_run(source: str, weights: str, device: str) -> Source:
    from .config import Part, build_grid
    from .runs import load_companions, load_with_recipe

    path = Path(source).expanduser()
    if not path.exists() and (Path("runs") / source / "config.yaml").is_file():
        raise ValueError(f"no run in {source}: did you mean {Path('runs') / source}?")
    if not path.exists() and path.name == source and (bundled.ZOO / f"{source}.safetensors").is_file():
        raise ValueError(f"no run in {source}: did you mean zoo:{source}, which comes with the library?")
    denoiser, recipe = load_with_recipe(source, weights, device)
    beside = load_companions(source, weights, device)
    section, classes, shape = recipe.sample, recipe.data.classes, recipe.data.shape or ()

    plan, tuning = recipe.section("variance"), recipe.section("tune")
    curve = beside.schedule.cpu()  # grids are made there

    def grid(steps: int, spacing: str | None) -> Tensor:
        if spacing is None or spacing == section.grid.kind:
            return build_grid(recipe, steps, curve)
        part = Part(kind="karras") if spacing == "karras" else Part(kind="schedule", spacing=spacing)  # type: ignore[call-arg]
        return build_grid(recipe.model_copy(update={"sample": section.model_copy(update={"grid": part})}), steps, curve)

    # vectors, latents and encoded data have any range
    pictures = len(shape) == 3 and shape[0] in (1, 3) and beside.encoder is None
    return Source(
        denoiser,
        grid,
        home=path / "samples" if path.is_dir() else Path(),
        classes=classes,
        null={"label": len(classes)} if classes and recipe.objective.drop else {},
        steps=section.steps,
        transition=(section.transition.kind, section.transition.options),
        scale=section.scale if classes else 1.0,
        clip=1.0 if (pictures if section.clip is None else section.clip) else None,
        weights=weights if path.is_dir() else "exported",
        schedule=curve,
        encoder=beside.encoder,
        excess=beside.excess,
        fitting={} if plan is None else {"kind": plan.kind, **plan.options},
        variances=_beside(source, path, "variance"),
        policies=_beside(source, path, "policy"),
        tuning={} if tuning is None else {"kind": tuning.kind, **tuning.options},
    )


def _from_hub(source: str, weights: str, device: str) -> Source | None:
    """A run on the hub, whose download is only read: what is made goes into this folder. None for anything else."""
    from .hub import fetched

    folder = fetched(source)
    if folder is None:
        return None
    run = _from_run(str(folder), weights, device)
    variances = (*_beside(source, Path(source), "variance"), *run.variances)
    return replace(run, home=Path(), variances=variances, policies=(*_beside(source, Path(source), "policy"), *run.policies))


def _beside(source: str, path: Path, what: str) -> tuple[Path, ...]:
    """Where variances or policies of a model lie: in its folder, beside its file, or for what is read only in ./variance."""
    if path.is_dir():
        return (path / what,)
    if source.startswith("zoo:"):
        name = source.removeprefix("zoo:")
        return (Path(what) / name, bundled.ZOO / what / name)
    return (path.with_suffix(f".{what}"),) if path.is_file() else (Path(what) / source.replace("/", "--"),)


def _from_diffusers(source: str, device: str) -> Source:
    from ..interop import from_diffusers

    loaded = from_diffusers(source, device=device)
    count = (loaded.classes or 0) - int("label" in loaded.null)
    return Source(
        loaded.denoiser,
        loaded.grid,
        home=Path(),
        classes=tuple(map(str, range(count))),
        null=loaded.null,
        clip=loaded.clip,
        decode=loaded.codec.decode if loaded.codec else None,
        prompt=loaded.prompt,
        encode=loaded.codec.encode if loaded.codec else None,
        image=loaded.codec.image_of(loaded.denoiser.shape) if loaded.codec else None,
        schedule=loaded.schedule,
        variances=_beside(source, Path(source).expanduser(), "variance"),
        policies=_beside(source, Path(source).expanduser(), "policy"),
    )
