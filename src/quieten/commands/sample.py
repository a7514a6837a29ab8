"""`quieten sample`."""

from __future__ import annotations

import inspect
import io
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from ..covariances.stored import load_variance
from ..data import to_pixels
from ..denoiser import Denoiser
from ..files import bare_name, write_atomic, writing
from ..guidance import ClassifierFree, Guidance, Guided
from ..guiding.splits import SPLITS, split
from ..likelihoods.widened import Widened
from ..progress import Progress
from ..sampling import generate
from ..solvers.samplers import SAMPLERS, clipped, sampler
from ..training.source import Source, open_source
from ..transition import Transition
from ..tuning.adapters import merge
from ..tuning.policy import Policy
from ..tuning.stored import load_policy
from ..wrap import Clip, Clipped, Counted, Extrapolated, WithCovariance
from .guide import Guide, chosen, open_guide

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
    options: Sequence[str] = (),
    variance: str | None = None,
    policy: str | None = None,
    spacing: str | None = None,
    label: str | None = None,
    prompt: str | None = None,
    scale: float | None = None,
    guide: str | None = None,
    classifier: str | None = None,
    measurement: Path | None = None,
    mask: Path | None = None,
    std: float | None = None,
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
    tuned = None
    if policy is not None:
        named = {
            "transition": transition,
            "eta": eta,
            "option": options or None,
            "variance": variance,
            "grid": spacing,
            "clip": clip,
        }
        opened, tuned = _tuned(opened, policy, steps, named)
        steps = tuned.T
    steps = opened.steps if steps is None else steps
    asked: dict[str, Any] = {"classifier": classifier, "measurement": measurement, "mask": mask, "std": std}
    followed = _followed(opened, guide, n, scale, asked)
    transition = "ancestral" if transition is None and variance is not None else transition
    told = _told(options) | ({} if eta is None else {"eta": eta})
    if tuned is None:
        name, grid, build = _choose(opened, transition, steps, told, spacing, followed)
    else:
        name, grid, build = bare_name(str(policy)), tuned.grid, lambda guidance: tuned.transition
    cond, columns = _conditions(opened, n, label, prompt, followed)
    scale = 1.0 if followed is not None else opened.scale if scale is None else scale
    what = _suffix(label, scale) + ("" if followed is None else f"-{followed.words}")
    out, npz = _targets(opened, out, npz, f"{name}-{steps}-seed{seed}{what}")
    counted = Counted(opened.denoiser)  # innermost: guidance asks it for two rows a sample
    model = _spread(opened, counted, name, variance)
    if variance == "optimal":
        build = _widened(opened, grid, build)
    plan = _plan(opened, model, clip, scale, cond, followed, name, build)
    started = time.perf_counter()
    x = torch.cat(list(_chunks(plan, n, batch, grid, cond, seed, "mean" if tuned is None else "draw")))
    images = _decoded(opened, x, batch)
    seconds = time.perf_counter() - started
    seen = None if followed is None or followed.seen is None else to_pixels(followed.seen)
    labels = followed.classes if followed is not None and followed.classes is not None else cond.get("label")
    _write(images, out, npz, labels, columns, seen)
    first = "; the first picture is what was measured" if out and seen is not None else ""
    took = f" in {steps} steps" if len(grid) > steps else ""  # a sampler with fewer levels chooses its steps itself
    print(f"{' and '.join(str(path) for path in (out, npz) if path)}: {n} samples, {name}{took}, seed {seed}, "
          f"{opened.weights} weights{first}")  # fmt: skip
    twice = ", two a step for guidance" if scale != 1 else ""
    gradients = "" if followed is None or not followed.gradients[0] else f" and {followed.gradients[0] / n:g} gradients"
    print(f"{counted.rows / n:g} network evaluations a sample (NFE){twice}{gradients}; "
          f"{n / seconds:.1f} images/s, {seconds:.1f} s")  # fmt: skip


# ---- its parts


Build = Callable[[Guidance | None], Transition]
"""From the guidance of a chunk to what takes its steps."""

Plan = Callable[[slice], tuple[Denoiser, Transition]]
"""From the rows of a chunk to its denoiser, conditions free, and what takes its steps."""


def _followed(source: Source, guide: str | None, n: int, scale: float | None, asked: Mapping[str, Any]) -> Guide | None:
    """What --guide names, opened; without it, its options are refused."""
    if guide is not None:
        return open_guide(source, guide, n, scale=scale, **asked)
    for option, value in asked.items():
        if value is not None:
            raise ValueError(f"`--{option} {value}` goes with --guide: say what to guide to, or leave it out")
    return None


def _told(options: Sequence[str]) -> dict[str, Any]:
    """What `--option NAME=VALUE` says of the sampler; the values are YAML."""
    told = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"`--option {option}` needs NAME=VALUE, such as rtol=1e-4 for rk45")
        try:
            told[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"`--option {option}`: the value is not YAML; quote it") from None
    return told


def _tuned(source: Source, name: str, steps: int | None, asked: Mapping[str, Any]) -> tuple[Source, Policy]:
    """The source with a tuned denoiser in place of its own, and the policy; refuses what the policy has settled."""
    for option, value in asked.items():
        if value is not None:
            given = " ".join(value) if isinstance(value, list | tuple) else value
            raise ValueError(f"`--{option} {given}` was settled when --policy {name} was tuned: leave it out")
    policy = load_policy(source.policies, name, source.denoiser)
    merge(policy.denoiser)  # adapters cost time, and nobody trains them here
    if steps not in (None, policy.T):
        raise ValueError(
            f"`--steps {steps}`: the policy {name} has {policy.T} steps, for which alone it was tuned: leave it out"
        )
    return replace(source, denoiser=policy.denoiser, clip=None, weights=f"tuned {source.weights}"), policy


def _choose(
    source: Source, name: str | None, steps: int, told: Mapping[str, Any], spacing: str | None, guide: Guide | None
) -> tuple[str, Tensor, Build]:
    """Name of the sampler, its grid, and how to make it: the source's own options hold while its sampler does.

    Classes guide by "strang" unless another is named, measurements by the source's own sampler.
    """
    from ..training.parts import find, nearest

    own, options = source.transition
    name = name or (own if guide is None or guide.measured else next(iter(SPLITS)))
    chosen_options = {**(options if name == own else {}), **told}
    maker = SPLITS[name].make if name in SPLITS else find("transition", name)
    known = inspect.signature(maker).parameters
    for option, value in told.items():
        if option not in known:
            given = f"--eta {value:g}" if option == "eta" else f"--option {option}={value}"
            near = nearest(option, known) or ": leave it out"
            raise ValueError(f"`{given}` means nothing to the sampler {name!r}{near}")
    try:
        grid = source.grid(steps, spacing)
    except ValueError as error:
        if spacing is None:
            raise
        raise ValueError(f"`--grid {spacing}` does not suit this model, leave it out: {error}") from error
    if name in SPLITS:
        return name, grid, lambda guidance: _split(name, guidance, chosen_options)
    stepper, grid = sampler(name, grid, **chosen_options)
    return name, grid, lambda guidance: stepper


def _spread(source: Source, model: Denoiser, name: str, variance: str | None) -> Denoiser:
    """The denoiser with the variance that is asked for, or that the sampler needs."""
    entry = SAMPLERS.get(name)
    if variance is not None and (entry is None or not getattr(entry.make(), "spread", False)):
        raise ValueError(f"`--variance {variance}` means nothing to the sampler {name!r}: take ancestral, ocm or ocm-ddim")
    wanted = variance or (None if entry is None else entry.variance)
    if wanted is None or wanted == "optimal":
        return model
    bound = source.clip**2 if isinstance(source.clip, int | float) else None
    return WithCovariance(model, load_variance(source.variances, wanted, source.denoiser, cap=bound))


def _widened(source: Source, grid: Tensor, build: Build) -> Build:
    """What takes the steps, widened by what training found best for each."""
    if source.excess is None or source.schedule is None:
        raise ValueError("`--variance optimal` needs a run that was trained with bound.reverse_variance=optimal: give another, "
                         "or measure what it is worth with `quieten nll --variance optimal`")  # fmt: skip
    count, schedule, excess = len(source.excess), source.schedule, source.excess
    if len(grid) != count + 2:
        raise ValueError(f"`--variance optimal` was learned for the {count} steps between the run's levels: give --steps "
                         f"{count + 1}, the last of which reads off the data")  # fmt: skip
    return lambda guidance: Widened(build(guidance), schedule, excess)


def _split(name: str, guidance: Guidance | None, options: Mapping[str, Any]) -> Transition:
    if guidance is None:
        raise ValueError(f"`--transition {name}` keeps guidance apart: give --guide, or --scale other than 1, or take another")
    return split(name, guidance, **options)


def _conditions(
    source: Source, n: int, label: str | None, prompt: str | None, guide: Guide | None
) -> tuple[dict[str, Any], int | None]:
    """The conditions of n samples, and how many columns the picture has when classes take turns."""
    if prompt is not None:
        if source.prompt is None:
            raise ValueError(f"`--prompt {prompt!r}` needs a model that takes text: leave it out, this one does not")
        if label is not None:
            raise ValueError(f"`--label {label}` and `--prompt` exclude each other: give one")
        return {name: value.expand(n, *value.shape[1:]) for name, value in source.prompt([prompt]).items()}, None
    if source.prompt is not None:
        raise ValueError("`--prompt` is missing: this model draws what a text says")
    turns = guide.columns if guide is not None else None
    if not source.classes:
        if label is not None:
            raise ValueError(f"`--label {label}` needs a class-conditional model: leave it out, this one has no classes")
        return {}, turns
    if label is None and guide is not None and "label" in source.null:  # the guide alone says what to draw
        return {"label": torch.full((n,), int(source.null["label"]), dtype=torch.int64)}, turns
    if label is None and guide is not None and guide.classes is not None and guide.names == source.classes:
        return {"label": guide.classes}, turns
    chosen_label, columns = chosen(source.classes, label, n, "label")
    return {"label": chosen_label}, turns or columns


def _plan(
    source: Source, counted: Denoiser, clip: bool | None, scale: float, cond: Mapping[str, Any],
    guide: Guide | None, name: str, build: Build,
) -> Plan:  # fmt: skip
    """The denoiser and the transition of each chunk: joint guidance is in the one, split guidance in the other."""
    if guide is None and name in SPLITS:
        _guided(source, counted, scale, cond)  # refuses what cannot be guided
        free = None if scale == 1.0 else ClassifierFree(scale, null=source.null)
        transition = build(free)
        return lambda rows: (_clipped(source, clip, counted), transition)
    if guide is None:
        transition = build(None)
        model = clipped(_guided(source, counted, scale, cond), transition, _bound(source, clip))
        return lambda rows: (model, transition)
    plain = _clipped(source, clip, counted)  # the network's own estimate is clipped, the guided state is not

    def plan(rows: slice) -> tuple[Denoiser, Transition]:
        guidance = guide.make(rows)
        return plain if name in SPLITS else Guided(plain, guidance), build(guidance)

    return plan


def _chunks(plan: Plan, n: int, batch: int, grid: Tensor, cond: Mapping[str, Any], seed: int, last: str) -> Iterator[Tensor]:
    """The samples, a chunk at a time."""
    with Progress(n, 0, "sampling") as progress:
        for first in range(0, n, batch):
            rows = slice(first, min(first + batch, n))
            model, transition = plan(rows)
            part = {key: value[rows] for key, value in cond.items()}
            yield generate(model, rows.stop - first, grid=grid, transition=transition, cond=part, batch=batch, seed=seed,
                           first=first, last=last)  # fmt: skip
            progress.update(rows.stop)


def _guided(source: Source, model: Denoiser, scale: float, cond: Mapping[str, Any]) -> Denoiser:
    if scale == 1.0:
        return model
    if not cond:
        raise ValueError(f"`--scale {scale:g}` guides towards a class or a text: leave it out, this model has neither")
    if not source.null:
        raise ValueError(f"`--scale {scale:g}` needs a model that also learned to draw without a class: leave it out, "
                         "or train one with objective.drop above 0")  # fmt: skip
    return Extrapolated(model, scale, null=source.null)


def _bound(source: Source, wanted: bool | None) -> Clip | None:
    return source.clip if wanted is None else (source.clip or 1.0) if wanted else None


def _clipped(source: Source, wanted: bool | None, model: Denoiser) -> Denoiser:
    how = _bound(source, wanted)
    return model if how is None else Clipped(model, how)


@torch.no_grad()
def _decoded(source: Source, x: Tensor, batch: int) -> Tensor:
    """Pictures as bytes on the CPU, through the decoder of a latent model; what is no picture stays as it is."""
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


def _write(
    images: Tensor, out: Path | None, npz: Path | None, label: Tensor | None, columns: int | None, seen: Tensor | None
) -> None:
    from ..reports.plots import save_grid

    if out is not None:
        with writing(out):
            save_grid(images if seen is None else torch.cat([seen, images]), out, columns=columns)
    if npz is not None:
        arrays: dict[str, Any] = {"images": images.numpy()} | ({} if label is None else {"labels": label.numpy()})
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        with writing(npz):
            write_atomic(npz, buffer.getvalue())
