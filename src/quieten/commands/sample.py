"""`quieten sample`."""

from __future__ import annotations

import inspect
import io
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..files import write_atomic, writing
from ..progress import Progress
from ..samplers import sampler
from ..sampling import generate
from ..source import Source, open_source
from ..transition import Transition
from ..wrap import Clipped, Counted, Extrapolated

__all__ = ["sample"]


def sample(
    source: str,
    *,
    n: int = 64,
    seed: int = 0,
    batch: int = 64,
    steps: int | None = None,
    transition: str | None = None,
    eta: float | None = None,
    spacing: str | None = None,
    label: str | None = None,
    prompt: str | None = None,
    scale: float | None = None,
    clip: bool | None = None,
    out: Path | None = None,
    npz: Path | None = None,
    weights: str = "ema",
    device: str | None = None,
) -> None:
    """Samples, writes pictures and arrays, and says what it took; the arguments are the command's options.

    Raises:
        ValueError: For an option that the model cannot serve, or a place that cannot be written.
    """
    opened = open_source(source, weights, device)
    steps = opened.steps if steps is None else steps
    name, stepper, grid = _choose(opened, transition, steps, eta, spacing)
    cond, columns = _conditions(opened, n, label, prompt)
    scale = opened.scale if scale is None else scale
    out, npz = _targets(opened, out, npz, f"{name}-{steps}-seed{seed}{_suffix(label, scale)}")
    counted = Counted(opened.denoiser)  # innermost: guidance asks it for two rows a sample
    model = _clipped(opened, clip, _guided(opened, counted, scale, cond))
    started = time.perf_counter()
    with Progress(n, 0, "sampling") as progress:
        x = generate(model, n, grid=grid, transition=stepper, cond=cond, batch=batch, seed=seed, progress=progress.update)
    images = _decoded(opened, x, batch)
    seconds = time.perf_counter() - started
    _write(images, out, npz, cond.get("label"), columns)
    print(f"{' and '.join(str(path) for path in (out, npz) if path)}: {n} samples, {name} in {steps} steps, seed {seed}, "
          f"{opened.weights} weights")  # fmt: skip
    print(f"{counted.rows / n:g} network evaluations a sample (NFE){', two a step for guidance' if scale != 1 else ''}; "
          f"{n / seconds:.1f} images/s, {seconds:.1f} s")  # fmt: skip


# ---- its parts


def _choose(
    source: Source, name: str | None, steps: int, eta: float | None, spacing: str | None
) -> tuple[str, Transition, Tensor]:
    """Name and transition of the sampler, and its grid: the source's own options hold while its sampler does."""
    from ..parts import find

    own, options = source.transition
    chosen = {**(options if name in (None, own) else {}), **({} if eta is None else {"eta": eta})}
    name = name or own
    if eta is not None and "eta" not in inspect.signature(find("transition", name)).parameters:
        raise ValueError(f"`--eta {eta:g}` means nothing to the sampler {name!r}: leave it out")
    try:
        grid = source.grid(steps, spacing)
    except ValueError as error:
        if spacing is None:
            raise
        raise ValueError(f"`--grid {spacing}` does not suit this model, leave it out: {error}") from error
    return name, *sampler(name, grid, **chosen)


def _conditions(source: Source, n: int, label: str | None, prompt: str | None) -> tuple[dict[str, Any], int | None]:
    """The conditions of n samples, and how many columns the picture has when classes take turns."""
    if prompt is not None:
        if source.prompt is None:
            raise ValueError(f"`--prompt {prompt!r}` needs a model that takes text: leave it out, this one does not")
        if label is not None:
            raise ValueError(f"`--label {label}` and `--prompt` exclude each other: give one")
        return {name: value.expand(n, *value.shape[1:]) for name, value in source.prompt([prompt]).items()}, None
    if source.prompt is not None:
        raise ValueError("`--prompt` is missing: this model draws what a text says")
    if not source.classes:
        if label is not None:
            raise ValueError(f"`--label {label}` needs a class-conditional model: leave it out, this one has no classes")
        return {}, None
    words = [] if label in (None, "all") else str(label).split(",")
    chosen = [_class(source.classes, word.strip()) for word in words] or list(range(len(source.classes)))
    columns = len(chosen) if 2 <= len(chosen) <= min(16, n) else None
    return {"label": torch.tensor(chosen, dtype=torch.int64).repeat(-(-n // len(chosen)))[:n]}, columns


def _class(classes: tuple[str, ...], word: str) -> int:
    from ..parts import nearest

    names = [name.lower() for name in classes]
    if word.lower() in names:
        return names.index(word.lower())
    if word.isdecimal() and int(word) < len(classes):
        return int(word)
    shown = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
    raise ValueError(f"`--label {word}` is no class of this model{nearest(word.lower(), names)}: give a number below "
                     f"{len(classes)}, or a name ({shown})")  # fmt: skip


def _guided(source: Source, model: Denoiser, scale: float, cond: Mapping[str, Any]) -> Denoiser:
    if scale == 1.0:
        return model
    if not cond:
        raise ValueError(f"`--scale {scale:g}` guides towards a class or a text: leave it out, this model has neither")
    if not source.null:
        raise ValueError(f"`--scale {scale:g}` needs a model that also learned to draw without a class: leave it out, "
                         "or train one with objective.drop above 0")  # fmt: skip
    return Extrapolated(model, scale, null=source.null)


def _clipped(source: Source, wanted: bool | None, model: Denoiser) -> Denoiser:
    how = source.clip if wanted is None else (source.clip or 1.0) if wanted else None
    return model if how is None else Clipped(model, how)


@torch.no_grad()
def _decoded(source: Source, x: Tensor, batch: int) -> Tensor:
    """Pictures as bytes on the CPU, through the decoder of a latent model; what is no picture stays as it is."""
    from ..data import to_pixels

    if source.decode is not None:
        return torch.cat([to_pixels(source.decode(part)).cpu() for part in x.split(batch)])
    return to_pixels(x).cpu() if source.draws_pictures else x.cpu()


def _suffix(label: str | None, scale: float) -> str:
    words = [] if label in (None, "all") else ["".join(c if c.isalnum() else "-" for c in str(label))]
    return "".join(f"-{word}" for word in [*words, *([] if scale == 1.0 else [f"scale{scale:g}"])])


def _targets(source: Source, out: Path | None, npz: Path | None, stem: str) -> tuple[Path | None, Path | None]:
    """Where to write, tried before the work begins."""
    if not source.draws_pictures:
        if out is not None:
            raise ValueError(f"`--out {out}` is for pictures: this model draws {source.denoiser.shape}, use --npz")
        return None, _target("--npz", npz or source.home / f"{stem}.npz", ".npz")
    return (
        _target("--out", out or source.home / f"{stem}.png", ".png"),
        None if npz is None else _target("--npz", npz, ".npz"),
    )


def _target(option: str, path: Path, suffix: str) -> Path:
    path = path.expanduser()
    if path.suffix.lower() != suffix or path.is_dir():
        raise ValueError(f"`{option} {path}` must be the name of a {suffix} file: end it in {suffix}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(13, "Permission denied")
    return path


def _write(images: Tensor, out: Path | None, npz: Path | None, label: Tensor | None, columns: int | None) -> None:
    from ..plots import save_grid

    if out is not None:
        with writing(out):
            save_grid(images, out, columns=columns)
    if npz is not None:
        arrays: dict[str, Any] = {"images": images.numpy()} | ({} if label is None else {"labels": label.numpy()})
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        with writing(npz):
            write_atomic(npz, buffer.getvalue())
