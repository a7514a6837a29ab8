"""`quieten nll`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..covariances.stored import load_variance, variance_names
from ..denoiser import Denoiser
from ..encoding.encoded_costs import encoded_costs, widened_costs
from ..files import bare_name, write_atomic, writing
from ..likelihood import Bound, evaluate, fit_decoder, log_likelihood
from ..likelihoods.decoders import Decoder, Discretised, Flat
from ..likelihoods.widened import Widened
from ..noise import Draws
from ..process import VP
from ..progress import Progress
from ..schedule import Linear, Schedule, Table
from ..solvers.adaptive import RK45
from ..solvers.grids import SPACINGS, dp_vb, edge_costs, linear, take
from ..training.source import Source, open_source
from ..transition import Ancestral, Transition
from ..wrap import WithCovariance
from .likely import Asked, Examples, decoder_of, examples_of, load_data

__all__ = ["Asked", "decoder_of", "examples_of", "load_data", "nll"]

ESTIMATORS = ("bound", "continuous", "ode")
GRIDS = (*SPACINGS, "optimal", "own")
DECODERS = ("discretised", "flat", "dequantised")
CHAIN = 1000
"""Levels of the chain that steps are chosen from, for models without a table of their own."""


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
    examples, fitting, whole = examples_of(opened, data, asked)
    what = f"{kernels.name}-{asked.bound_grid}{asked.steps}" if asked.estimator == "bound" else asked.estimator
    out = _target(opened, asked.out, f"{whole.name}-{asked.split}-{what}.json")
    decoder = decoder_of(opened, whole, asked)
    if asked.estimator == "ode":
        bound = _by_ode(opened, decoder, examples, asked)
    else:
        bound, decoder = _bounded(opened, kernels, decoder, examples, fitting, asked)
    in_steps = asked.estimator == "bound"
    ode = asked.estimator == "ode"
    protocol = {
        "source": source, "weights": opened.weights, "data": whole.name, "split": asked.split, "n": len(examples),
        "seed": asked.seed, "estimator": asked.estimator, "steps": None if asked.estimator == "continuous" else asked.steps,
        "grid": asked.bound_grid if in_steps else None, "variance": kernels.name if in_steps else None,
        "decoder": _named(decoder, asked), "compat": asked.compat, "clip": in_steps and kernels.transition.clip is not None,
        "draws": asked.draws, "probes": _probes(asked) if ode else None, "tolerance": asked.tolerance,
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
    from ..training.parts import nearest

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
    if estimator != "bound" and asked.variance is not None:
        why = (
            "in continuous time any but the posterior's makes the bound infinite" if estimator != "ode" else "the ODE has none"
        )
        raise ValueError(f"`--variance {asked.variance}` is of a bound in steps, {why}: leave it out")
    if asked.draws > 1 and estimator != "continuous":
        raise ValueError(f"`--draws {asked.draws}` are of times, for --estimator continuous: leave it out")
    for option, value in (("probes", asked.probes), ("tolerance", asked.tolerance)):
        if value is not None and estimator != "ode":
            raise ValueError(f"`--{option} {value:g}` is for --estimator ode: leave it out")


def _check_compat(source: Source, compat: str | None) -> None:
    if compat and source.table is None:
        raise ValueError("`--compat official` takes its decoder's variance from the first levels of a table, which this model "
                         "was not trained on: leave it out")  # fmt: skip


class Kernels(NamedTuple):
    """The denoiser with its variance, the transition that uses it, the name of the variance, and whether to widen each step."""

    model: Denoiser
    transition: Ancestral
    name: str
    widen: bool = False


def _kernels(source: Source, name: str | None, clip: bool | None) -> Kernels:
    how = source.clip if clip is None else (source.clip or 1.0) if clip else None
    # with an encoder a network's second half is the rate of the encoded data, and no variance
    learned = bool(getattr(source.denoiser, "learned_range", False)) and source.encoder is None
    fitted = variance_names(source.variances)
    best = "ocm" if "ocm" in fitted else fitted[0] if fitted else "range" if learned else None
    if name is None:
        # encoded data, too, have the posterior's own
        name = best or ("big" if source.denoiser.process is VP else "small")
    if name == "learned":
        if best is None:
            raise ValueError("`--variance learned` needs a network that predicts it, or one that `quieten variance fit` "
                             "fitted: give equal or optimal")  # fmt: skip
        name = best
    if name in ("small", "equal", "optimal"):
        return Kernels(source.denoiser, Ancestral(spread=False, clip=how), name, name == "optimal")
    if name == "range":
        if not learned:
            raise ValueError("`--variance range` needs a network that predicts it: give small or big")
        return Kernels(source.denoiser, Ancestral(clip=how, range=True), name)
    if name == "big" and source.denoiser.process is not VP:
        raise ValueError("`--variance big` assumes data of unit variance in a VP process: give small, or fit one with "
                         "`quieten variance fit`")  # fmt: skip
    variance = load_variance(source.variances, name, source.denoiser, cap=how**2 if isinstance(how, int | float) else None)
    return Kernels(WithCovariance(source.denoiser, variance), Ancestral(clip=how), bare_name(name))


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


def _chain(source: Source) -> Tensor:
    """All levels to choose from, cleanest first."""
    return source.grid(CHAIN, None)[:-1].flip(0) if source.table is None else source.table.lam.cpu()


def _bounded(
    source: Source, kernels: Kernels, decoder: Decoder, examples: Examples, fitting: Examples, asked: Asked
) -> tuple[Bound, Decoder]:
    """The bound, and the decoder as it was fitted."""
    grid = _places(source, kernels, decoder, fitting, asked)
    decoder = _fitted(source, decoder, kernels, fitting, grid, asked)

    def measured(of: Examples, transition: Transition | None, title: str) -> Bound:
        with Progress(len(of), 0, title) as progress:
            return evaluate(
                kernels.model, of.x0, decoder, grid, cond=of.cond, seed=asked.seed, batch=asked.batch,
                encoder=source.encoder, transition=transition, progress=progress.update,
            )  # fmt: skip

    transition: Transition | None = kernels.transition if asked.estimator == "bound" else None
    if kernels.widen and transition is not None:
        transition = Widened.of(transition, measured(fitting, transition, "measuring variances"))
    rows = {name: value.repeat(asked.draws, *[1] * (value.ndim - 1)) for name, value in examples.cond.items()}
    several = Examples(examples.x0.repeat(asked.draws, *[1] * (examples.x0.ndim - 1)), rows)  # an example's times spread evenly
    return _averaged(measured(several, transition, "bound"), asked.draws), decoder


def _averaged(bound: Bound, draws: int) -> Bound:
    """The bound of each example, from so many draws one after the other."""
    if draws == 1:
        return bound
    prior, diffusion, reconstruction = (
        part.unflatten(0, (draws, -1)).mean(0) for part in (bound.prior, bound.diffusion, bound.reconstruction)
    )
    return replace(bound, prior=prior, diffusion=diffusion, reconstruction=reconstruction)


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
    if kernels.transition.range:
        raise ValueError("`--bound-grid optimal` is not for learned ranges, whose variance depends on both ends of a step: "
                         "give another grid")  # fmt: skip
    chain = chain[linear(max(min(asked.levels, len(chain)), steps), len(chain)) - 1]
    there, encoder = fitting.on(kernels.model.device), source.encoder
    model, draws = kernels.model.bind(**there.cond), Draws(asked.seed, 1, range(len(there)))
    with Progress(len(chain) * len(there), 0, "measuring the grid") as progress:
        how: dict[str, Any] = {"draws": draws, "transition": kernels.transition, "fit": True,
                               "progress": lambda done: progress.update(done * len(there))}  # fmt: skip
        if encoder is None:
            costs = edge_costs(model, there.x0, chain, decoder, **how)
        else:
            costs = encoded_costs(model, there.x0, chain, decoder, encoder, **how)
    if kernels.widen:
        costs = widened_costs(costs, math.prod(there.x0.shape[1:]))
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
    """The likelihood of the probability-flow ODE of the denoiser as it is, as a bound of a single term."""
    grid, device, parts = source.grid(asked.steps + 1, None), source.denoiser.device, []
    solver = None if asked.tolerance is None else RK45(asked.tolerance, asked.tolerance)
    cell = 2.0 * decoder.pixels.half if decoder.pixels is not None else 1.0
    dims = math.prod(examples.x0.shape[1:])
    with Progress(len(examples), 0, "ODE") as progress:
        for i in range(0, len(examples), asked.batch):
            rows = slice(i, min(i + asked.batch, len(examples)))
            draws = Draws(asked.seed, 0, range(rows.start, rows.stop))
            there = Examples(examples.x0[rows], {name: value[rows] for name, value in examples.cond.items()}).on(device)
            x0 = decoder.prepare(there.x0, draws)
            denoiser = source.denoiser.bind(**there.cond)
            parts.append(log_likelihood(denoiser, x0, grid, draws=draws, probes=_probes(asked) or None, solver=solver).cpu())
            progress.update(rows.stop)
    nats = -torch.cat(parts) - dims * math.log(cell)
    return Bound(torch.zeros_like(nats), nats[:, None], torch.zeros_like(nats), dims, (), decoder.pixels is not None)


def _probes(asked: Asked) -> int:
    """Of the trace; 0 takes it exactly."""
    return 1 if asked.probes is None else asked.probes


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


def _path(protocol: Mapping[str, Any]) -> str:
    """How an ODE was followed."""
    probes, tolerance = protocol["probes"], protocol["tolerance"]
    steps = f"{protocol['steps']} steps" if tolerance is None else f"tolerance {tolerance:g}"
    return f"{steps}, {'exact trace' if not probes else 'one probe' if probes == 1 else f'{probes} probes'}"


def _table(result: Mapping[str, Any], bound: Bound) -> str:
    unit = "bits/dim" if bound.discrete else "nats/dim"
    p = result["protocol"]
    how = {
        "bound": f"bound in {p['steps']} steps ({p['grid']} grid), variance {p['variance']}",
        "continuous": "bound in continuous time" + (f", {p['draws']} times each" if p["draws"] > 1 else ""),
        "ode": f"likelihood of the ODE, {_path(p)}",
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
