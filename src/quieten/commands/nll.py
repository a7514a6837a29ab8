"""`quieten nll`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data import Dataset, Order, load
from ..decoders import Decoder, Dequantised, Discretised, Flat, Plain
from ..denoiser import Denoiser
from ..files import write_atomic, writing
from ..grids import SPACINGS, dp_vb, edge_costs, linear, take
from ..likelihood import Bound, evaluate, fit_decoder, log_likelihood
from ..noise import Draws
from ..process import VP
from ..progress import Progress
from ..schedule import Linear, Schedule, Table
from ..source import Source, open_source
from ..transition import Ancestral
from ..variance import load_variance, variance_names
from ..wrap import WithCovariance

__all__ = ["nll"]

ESTIMATORS = ("bound", "continuous", "ode")
GRIDS = (*SPACINGS, "optimal", "own")
DECODERS = ("discretised", "flat", "dequantised")
CHAIN = 1000
"""Levels of the chain that steps are chosen from, for models without a table of their own."""


@dataclass(frozen=True)
class Examples:
    """Data as the denoiser sees them, float32 (N, *), and their conditions."""

    x0: Tensor
    cond: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.x0)

    def on(self, device: torch.device) -> Examples:
        return Examples(self.x0.to(device), {name: value.to(device) for name, value in self.cond.items()})


@dataclass(frozen=True)
class Asked:
    """The options of the command, by their names."""

    estimator: str = "bound"
    steps: int = 50
    n: int | None = None
    split: str = "test"
    variance: str | None = None
    bound_grid: str = "linear"
    decoder: str = "discretised"
    compat: str | None = None
    clip: bool | None = None
    fit: int = 128
    levels: int = 200
    seed: int = 0
    out: Path | None = None
    batch: int = 64
    weights: str = "ema"
    device: str | None = None


def nll(source: str, data: str, **options: Any) -> dict[str, Any]:
    """Measures how likely data are, prints and saves a table, and returns what it saved; the arguments are the command's.

    Raises:
        ValueError: For an option that the model or the data cannot serve, or a place that cannot be written.
    """
    asked = Asked(**options)
    _check_names(asked)
    opened = open_source(source, asked.weights, asked.device)
    _check_compat(opened, asked.compat)
    kernels = _kernels(opened, asked.variance, asked.clip)
    examples, fitting, whole = _data(opened, data, asked)
    what = f"{kernels.name}-{asked.bound_grid}{asked.steps}" if asked.estimator == "bound" else asked.estimator
    out = _target(opened, asked.out, f"{whole.name}-{asked.split}-{what}.json")
    decoder = _decoder(opened, whole, asked)
    if asked.estimator == "ode":
        bound = _by_ode(opened, decoder, examples, asked)
    else:
        bound, decoder = _bounded(opened, kernels, decoder, examples, fitting, asked)
    in_steps = asked.estimator == "bound"
    protocol = {
        "source": source, "weights": opened.weights, "data": whole.name, "split": asked.split, "n": len(examples),
        "seed": asked.seed, "estimator": asked.estimator, "steps": None if asked.estimator == "continuous" else asked.steps,
        "grid": asked.bound_grid if in_steps else None, "variance": kernels.name if in_steps else None,
        "decoder": _named(decoder, asked), "compat": asked.compat, "clip": in_steps and kernels.transition.clip is not None,
        "fitted_on": f"{len(fitting)} of train", "unit": _unit(opened, bound),
    }  # fmt: skip
    result = {"protocol": protocol, "dims": bound.dims, "terms": _terms(bound, asked.estimator), "steps": _steps(bound)}
    with writing(out):
        write_atomic(out, json.dumps(result, indent=1).encode())
    print(_table(result, bound))
    print(f"{out}")
    return result


# ---- before the work


def _check_names(asked: Asked) -> None:
    from ..parts import nearest

    known = {"estimator": ESTIMATORS, "bound_grid": GRIDS, "decoder": DECODERS}
    for option, names in known.items():
        name = getattr(asked, option)
        if name not in names:
            option = option.replace("_", "-")
            raise ValueError(f"`--{option} {name}` is unknown{nearest(name, names)} (known: {', '.join(names)})")
    estimator, decoder, compat = asked.estimator, asked.decoder, asked.compat
    if compat not in (None, "official"):
        raise ValueError(f"`--compat {compat}` is unknown: leave it out, or give official")
    if compat and (decoder != "discretised" or estimator != "bound"):
        raise ValueError("`--compat official` is the discretised decoder in steps: leave out --decoder and --estimator")
    if estimator == "ode" and decoder != "discretised":
        raise ValueError(f"`--decoder {decoder}` has no place in the ODE's likelihood, which dequantises: leave it out")


def _check_compat(source: Source, compat: str | None) -> None:
    if compat and source.table is None:
        raise ValueError("`--compat official` takes its decoder's variance from the first levels of a table, which this model "
                         "was not trained on: leave it out")  # fmt: skip


class Kernels(NamedTuple):
    """The denoiser with its variance, the transition that uses it, and the name of the variance."""

    model: Denoiser
    transition: Ancestral
    name: str


def _kernels(source: Source, name: str | None, clip: bool | None) -> Kernels:
    how = source.clip if clip is None else (source.clip or 1.0) if clip else None
    learned = bool(getattr(source.denoiser, "learned_range", False))
    fitted = variance_names(source.variances)
    if name is None:
        plain = "big" if source.denoiser.process is VP else "small"  # encoded data, too, have the posterior's own
        name = "ocm" if "ocm" in fitted else fitted[0] if fitted else "range" if learned else plain
    if name == "small":
        return Kernels(source.denoiser, Ancestral(spread=False, clip=how), name)
    if name == "range":
        if not learned:
            raise ValueError("`--variance range` needs a network that predicts it: give small or big")
        return Kernels(source.denoiser, Ancestral(clip=how, range=True), name)
    if name == "big" and source.denoiser.process is not VP:
        raise ValueError("`--variance big` assumes data of unit variance in a VP process: give small, or fit one with "
                         "`quieten variance fit`")  # fmt: skip
    variance = load_variance(source.variances, name, source.denoiser, cap=how**2 if isinstance(how, int | float) else None)
    return Kernels(WithCovariance(source.denoiser, variance), Ancestral(clip=how), Path(name).stem)


def _data(source: Source, name: str, asked: Asked) -> tuple[Examples, Examples, Dataset]:
    """What is evaluated, and other examples, of the training data, for what is fitted."""
    shape = source.denoiser.shape if source.encode is None else source.image
    size = {"channels": shape[0], "size": shape[1]} if shape is not None and len(shape) == 3 else {}
    split, seed = asked.split, asked.seed
    whole, train = (_load(name, part, size) for part in (split, "train"))
    n = min(500, len(whole) if split == "test" else len(whole) // 2) if asked.n is None else asked.n
    if n > len(whole):
        raise ValueError(f"`-n {n}` exceeds the {len(whole)} examples of {whole.name}'s {split} data: give fewer")
    index = Order(len(whole), n, seed).indices(0)
    if split == "train":
        rest = torch.ones(len(train), dtype=torch.bool)
        rest[index] = False
        train = train.subset(rest)
    if not len(train):
        raise ValueError(f"`-n {n}` leaves no training example to fit the decoder on: give fewer")
    other = Order(len(train), min(asked.fit, len(train)), seed + 1).indices(0)
    return _examples(source, whole, index), _examples(source, train, other), whole


def _load(name: str, split: str, size: Mapping[str, Any]) -> Dataset:
    try:
        return load(name, split=split, **size)
    except ValueError as error:
        if size and "holds floats" in str(error):  # which no resizing can change
            return _load(name, split, {})
        if split == "test" and "`split`" in str(error):
            raise ValueError(
                f"{name} has no test data of its own: give --split train, and mind what the model has seen"
            ) from error
        raise


def _examples(source: Source, data: Dataset, index: Tensor) -> Examples:
    x0, labels = data.batch(index)
    if source.encode is not None:
        x0 = source.encode(x0.to(source.denoiser.device)).float().cpu()
    shape = source.denoiser.shape
    if shape is not None and tuple(x0.shape[1:]) != tuple(shape):
        raise ValueError(f"{data.name} has examples of shape {tuple(x0.shape[1:])}, this model {tuple(shape)}: give other data")
    if source.prompt is not None:
        raise ValueError("this model draws what a text says, and data have none: the likelihood needs a model without text")
    if not source.classes:
        return Examples(x0, {})
    if labels is not None and len(data.classes) == len(source.classes):
        return Examples(x0, {"label": labels})
    if not source.null:
        raise ValueError(f"this model needs labels of {len(source.classes)} classes, {data.name} has "
                         f"{len(data.classes) or 'none'}: give the data it was trained on")  # fmt: skip
    return Examples(x0, {name: torch.full((len(x0),), value) for name, value in source.null.items()})


def _target(source: Source, out: Path | None, name: str) -> Path:
    if out is None:
        home = source.home
        out = home.parent / "nll" / name if home.name == "samples" else home / f"nll-{name}"
    out = out.expanduser()
    if out.suffix != ".json" or out.is_dir():
        raise ValueError(f"`--out {out}` must be the name of a .json file: end it in .json")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    return out


# ---- decoder and levels


def _decoder(source: Source, data: Dataset, asked: Asked) -> Decoder:
    """The kind of decoder, its variance still to be fitted."""
    name = "dequantised" if asked.estimator == "ode" else asked.decoder
    if source.encode is not None or not _of_bytes(data):
        if asked.decoder != "discretised":
            raise ValueError(f"`--decoder {name}` is for 8-bit data: leave it out")
        return Plain()
    if name == "flat":
        return Flat(source.denoiser.process)
    return Dequantised() if name == "dequantised" else Discretised(compat=asked.compat)


def _of_bytes(data: Dataset) -> bool:
    return not isinstance(data.images, Tensor) or data.images.dtype == torch.uint8


def _chain(source: Source) -> Tensor:
    """All levels to choose from, cleanest first."""
    return source.grid(CHAIN, None)[:-1].flip(0) if source.table is None else source.table.lam.cpu()


def _bounded(
    source: Source, kernels: Kernels, decoder: Decoder, examples: Examples, fitting: Examples, asked: Asked
) -> tuple[Bound, Decoder]:
    """The bound, and the decoder as it was fitted."""
    grid = _places(source, kernels, decoder, fitting, asked)
    decoder = _fitted(source, decoder, kernels, fitting, grid, asked)
    transition = kernels.transition if asked.estimator == "bound" else None
    with Progress(len(examples), 0, "bound") as progress:
        bound = evaluate(
            kernels.model, examples.x0, decoder, grid, cond=examples.cond, seed=asked.seed, batch=asked.batch,
            encoder=source.encoder, transition=transition, progress=progress.update,
        )  # fmt: skip
    return bound, decoder


def _places(source: Source, kernels: Kernels, decoder: Decoder, fitting: Examples, asked: Asked) -> Tensor | Schedule:
    """The levels that the bound visits; in continuous time a line between the ends of the chain."""
    chain, name, steps = _chain(source), asked.bound_grid, asked.steps
    if asked.estimator == "continuous":
        if source.schedule is not None and not isinstance(source.schedule, Table) and _has_ends(source.schedule):
            return source.schedule  # which may have learned to make the estimate vary little
        finite = chain[chain.isfinite()]
        return Linear(float(finite[0]), float(finite[-1]))
    if name == "own":
        return source.grid(steps, None)
    if steps > len(chain):
        raise ValueError(f"`--steps {steps}` exceeds the {len(chain)} levels of the model: give fewer")
    if name != "optimal":
        return take(chain, SPACINGS[name](steps, len(chain)))
    if kernels.transition.range or source.encoder is not None:
        raise ValueError("`--bound-grid optimal` is not for learned ranges, nor for models with an encoder: give another grid")
    chain = chain[linear(max(min(asked.levels, len(chain)), steps), len(chain)) - 1]
    there = fitting.on(kernels.model.device)
    with Progress(len(chain) * len(there), 0, "measuring the grid") as progress:
        costs = edge_costs(
            kernels.model.bind(**there.cond), there.x0, chain, decoder, draws=Draws(asked.seed, 1, range(len(there))),
            transition=kernels.transition, fit=True, progress=lambda done: progress.update(done * len(there)),
        )  # fmt: skip
    return take(chain, dp_vb(steps, costs)[0])


def _has_ends(schedule: Schedule) -> bool:
    with torch.no_grad():
        return bool(schedule(torch.tensor([0.0, 1.0], dtype=torch.float64)).isfinite().all())


def _fitted(
    source: Source, decoder: Decoder, kernels: Kernels, fitting: Examples, grid: Tensor | Schedule, asked: Asked
) -> Decoder:
    """The decoder with its variance: fitted on training data, or, as released, the posterior's from level 2 to level 1."""
    clean = float(grid(torch.zeros((), dtype=torch.float64))) if isinstance(grid, Schedule) else float(grid[-2])
    if isinstance(decoder, Flat) and clean < 12.0:
        print(f"the cleanest level has log-SNR {clean:.2f}: the flat decoder is expensive below 13, the discretised one is not")
    if asked.compat == "official" and source.table is not None:
        first, second = source.table.lam[:2].tolist()
        x = torch.zeros(1, 1, dtype=torch.float64)
        return Discretised(float(source.denoiser.process.bridge(x, x, second, first).var), compat=asked.compat)
    model, transition = kernels.model, kernels.transition
    return fit_decoder(
        decoder, model, fitting.x0, clean, cond=fitting.cond, seed=asked.seed, batch=asked.batch, encoder=source.encoder,
        transition=transition,
    )  # fmt: skip


def _by_ode(source: Source, decoder: Decoder, examples: Examples, asked: Asked) -> Bound:
    """The likelihood of the probability-flow ODE of the denoiser as it is, by one probe, as a bound of a single term."""
    grid, device, parts = source.grid(asked.steps + 1, None), source.denoiser.device, []
    cell = 2.0 * decoder.pixels.half if decoder.pixels is not None else 1.0
    dims = math.prod(examples.x0.shape[1:])
    with Progress(len(examples), 0, "ODE") as progress:
        for i in range(0, len(examples), asked.batch):
            rows = slice(i, min(i + asked.batch, len(examples)))
            draws = Draws(asked.seed, 0, range(rows.start, rows.stop))
            there = Examples(examples.x0[rows], {name: value[rows] for name, value in examples.cond.items()}).on(device)
            x0 = decoder.prepare(there.x0, draws)
            parts.append(log_likelihood(source.denoiser.bind(**there.cond), x0, grid, draws=draws, probes=1).cpu())
            progress.update(rows.stop)
    nats = -torch.cat(parts) - dims * math.log(cell)
    return Bound(torch.zeros_like(nats), nats[:, None], torch.zeros_like(nats), dims, (), decoder.pixels is not None)


# ---- afterwards


def _unit(source: Source, bound: Bound) -> str:
    if bound.discrete:
        return "bits/dim of the 8-bit data, scaled to [-1, 1]"
    return "latent nats/dim" if source.encode is not None else "nats/dim of the data as given"


def _named(decoder: Decoder, asked: Asked) -> str:
    if asked.estimator != "ode":
        return repr(decoder)
    return "none" if decoder.pixels is None else f"uniform dequantisation of {decoder.pixels}"


def _mean(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error."""
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def _terms(bound: Bound, estimator: str) -> dict[str, dict[str, float]]:
    """Mean and standard error of each term, in nats per example and in the unit per dimension; the ODE has no terms."""
    scale, unit = (bound.dims * math.log(2.0), "bits/dim") if bound.discrete else (bound.dims, "nats/dim")
    out = {}
    for name, values in bound.terms.items() if estimator != "ode" else [("total", bound.total)]:
        mean, error = _mean(values)
        out[name] = {"nats": mean, "nats_se": error, unit: mean / scale, f"{unit}_se": error / scale}
    return out


def _steps(bound: Bound) -> list[dict[str, float | None]]:
    """Each step of the diffusion term, from noise to data."""
    if not bound.levels:
        return []
    rows = []
    for i, (lam_t, lam_s) in enumerate(zip(bound.levels, bound.levels[1:], strict=False)):
        mean, error = _mean(bound.diffusion[:, i])
        rows.append({"lam_t": lam_t if math.isfinite(lam_t) else None, "lam_s": lam_s, "nats": mean, "nats_se": error})
    return rows


def _table(result: Mapping[str, Any], bound: Bound) -> str:
    unit = "bits/dim" if bound.discrete else "nats/dim"
    p = result["protocol"]
    how = {
        "bound": f"bound in {p['steps']} steps ({p['grid']} grid), variance {p['variance']}",
        "continuous": "bound in continuous time",
        "ode": f"likelihood of the ODE in {p['steps']} steps, one probe",
    }[p["estimator"]]
    lines = [
        f"{p['source']} ({p['weights']} weights) on {p['n']} {p['split']} examples of {p['data']}, seed {p['seed']}: {how}",
        f"decoder: {p['decoder']}" + ("" if p["estimator"] == "ode" else f"; fitted on {p['fitted_on']}"),
        f"D = {bound.dims}; {p['unit']}",
        f"{'':16}{'nats/example':>24}{p['unit'].split(' of ')[0]:>24}",
    ]
    for name, row in result["terms"].items():
        cells = (f"{row[key]:.{digits}f} ± {row[key + '_se']:.{digits}f}" for key, digits in (("nats", 2), (unit, 4)))
        lines.append(f"{name:16}" + "".join(f"{cell:>24}" for cell in cells))
    if p["estimator"] != "ode":
        lines.append(f"at most {result['terms']['total'][unit]:.4f} {unit}: the terms add up to a bound")
    return "\n".join(lines)
