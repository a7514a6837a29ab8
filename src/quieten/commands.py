"""What the commands do; `cli` holds how they are typed."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from .denoiser import Denoiser
from .files import write_atomic
from .sample import generate
from .samplers import sampler
from .wrap import Clipped, Counted, Extrapolated

__all__ = ["Source", "counter", "open_source", "sample", "train"]

console = Console()


@dataclass(frozen=True)
class Source:
    """Something to sample from.

    Attributes:
        denoiser: Conditions still free.
        grid: (steps, spacing or None) to levels.
        home: Where its samples go.
        classes: Names of its classes; () without.
        null: Values of the conditions that mean "none", for guidance.
        defaults: Number of steps and name of the sampler, unless told otherwise.
        clip: Whether x0 lies in [-1, 1].
        decode: From samples to images, for latent models.
        prompt: From texts to conditions, for models that take text.
    """

    denoiser: Denoiser
    grid: Callable[[int, str | None], Tensor]
    home: Path
    classes: tuple[str, ...] = ()
    null: dict[str, Any] = field(default_factory=dict)
    defaults: tuple[int, str] = (20, "dpm++")
    clip: bool = True
    decode: Callable[[Tensor], Tensor] | None = None
    prompt: Callable[[list[str]], dict[str, Tensor]] | None = None


def open_source(source: str, weights: str = "ema", device: str | None = None) -> Source:
    """A run, a model of the zoo, or a diffusers folder or hub id, ready to sample."""
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    path = Path(source).expanduser()
    ours = source.startswith("zoo:") or path.suffix == ".safetensors" or (path / "config.yaml").is_file()
    theirs = any((path / name).is_file() for name in ("model_index.json", "config.json"))
    hub_id = source.count("/") == 1 and not path.parent.is_dir()
    return _from_diffusers(source, where) if not ours and (theirs or hub_id) else _from_run(source, weights, where)


def _from_run(source: str, weights: str, device: str) -> Source:
    from .config import Part, build_grid
    from .runs import load_with_recipe

    denoiser, recipe = load_with_recipe(source, weights, device)
    section = recipe.sample

    def grid(steps: int, spacing: str | None) -> Tensor:
        if spacing is None:
            return build_grid(recipe, steps)
        part = Part(kind="karras") if spacing == "karras" else Part(kind="schedule", spacing=spacing)  # type: ignore[call-arg]
        return build_grid(recipe.model_copy(update={"sample": section.model_copy(update={"grid": part})}), steps)

    path = Path(source).expanduser()
    return Source(
        denoiser,
        grid,
        home=path / "samples" if path.is_dir() else Path(),
        classes=recipe.data.classes,
        null={"label": len(recipe.data.classes)} if recipe.data.classes else {},
        defaults=(section.steps, section.transition),
    )


def _from_diffusers(source: str, device: str) -> Source:
    from .interop import from_diffusers

    loaded = from_diffusers(source, device=device)
    named = loaded.classes is not None
    count = (loaded.classes or 0) - int("label" in loaded.null)
    return Source(
        loaded.denoiser,
        loaded.grid,
        home=Path(),
        classes=tuple(map(str, range(count))) if named else (),
        null=dict(loaded.null),
        clip=loaded.clip is not None,
        decode=loaded.codec.decode if loaded.codec else None,
        prompt=loaded.prompt,
    )


def train(recipe: str, *, out: Path | None, changes: Sequence[str], data: Path | None, download: bool) -> None:
    """Trains a recipe, or resumes its run."""
    from .fit import train as run

    extra = ([f"data.folder={data}"] if data else []) + (["data.download=true"] if download else [])
    summary = run(recipe, [*changes, *extra], out)
    console.print(summary.message, highlight=False)


def sample(
    source: str,
    *,
    steps: int | None,
    name: str | None,
    n: int,
    seed: int,
    label: str | None,
    prompt: str | None,
    scale: float,
    eta: float | None,
    clip: bool | None,
    spacing: str | None,
    out: Path | None,
    npz: Path | None,
    batch: int,
    weights: str,
    device: str | None,
) -> None:
    """Samples, writes the grid and the arrays, and says what it took."""
    from .data import to_pixels
    from .plots import save_grid

    opened = open_source(source, weights, device)
    steps, name = steps or opened.defaults[0], name or opened.defaults[1]
    transition, grid = sampler(name, opened.grid(steps, spacing), **({} if eta is None else {"eta": eta}))
    cond = _conditions(opened, n, label, prompt)
    model: Denoiser = opened.denoiser
    if scale != 1.0:
        if not cond:
            raise ValueError("`--scale` guides towards a condition: this model has none, or give --label or --prompt")
        model = Extrapolated(model, scale, null=opened.null)
    model = counted = Counted(Clipped(model) if (opened.clip if clip is None else clip) else model)
    started = time.perf_counter()
    with counter("sampling", n, "images") as progress:
        x = generate(model, n, grid=grid, transition=transition, cond=cond, batch=batch, seed=seed, progress=progress)
    seconds = time.perf_counter() - started
    images = to_pixels((opened.decode(x) if opened.decode else x).cpu())
    out = out or opened.home / f"{name}-{steps}-seed{seed}.png"
    save_grid(images, out)
    if npz is not None:
        _save_npz(npz, images, cond.get("label"))
    evaluations = counted.calls // -(-n // batch)
    console.print(f"{out}: {n} images, {name} in {steps} steps, seed {seed}, weights {weights}", highlight=False)
    console.print(
        f"{evaluations} evaluations a sample{' (guided: each of twice the batch)' if scale != 1 else ''}, "
        f"{n / seconds:.1f} images/s, {seconds:.1f} s",
        highlight=False,
    )


def _conditions(source: Source, n: int, label: str | None, prompt: str | None) -> dict[str, Any]:
    if prompt is not None:
        if source.prompt is None:
            raise ValueError("`--prompt` needs a model that takes text: this one does not")
        return {name: value.expand(n, *value.shape[1:]) for name, value in source.prompt([prompt]).items()}
    if label is None and not source.classes:
        return {}
    if not source.classes:
        raise ValueError("`--label` needs a class-conditional model: this one has no classes")
    everything = label is None or label == "all"
    chosen = range(len(source.classes)) if everything else [_class(source.classes, word) for word in str(label).split(",")]
    return {"label": torch.tensor(list(chosen), dtype=torch.int64).repeat(-(-n // len(chosen)))[:n]}


def _class(classes: tuple[str, ...], word: str) -> int:
    names = [name.lower() for name in classes]
    if word.strip().lower() in names:
        return names.index(word.strip().lower())
    if word.strip().isdigit() and int(word) < len(classes):
        return int(word)
    raise ValueError(
        f"`--label` {word!r} is no class of this model: give a number below {len(classes)}, or one of {', '.join(classes)}"
    )


def _save_npz(path: Path, images: Tensor, label: Tensor | None) -> None:
    arrays = {"images": images.numpy()} | ({} if label is None else {"labels": label.numpy()})
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_atomic(path, buffer.getvalue())


@contextmanager
def counter(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A progress bar with rate and time left; yields a function that takes how many are done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rate]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task, started = bar.add_task(title, total=total, rate=""), time.perf_counter()

        def update(done: int) -> None:
            bar.update(task, completed=done, rate=f"{done / max(time.perf_counter() - started, 1e-9):.1f} {unit}/s")

        yield update
