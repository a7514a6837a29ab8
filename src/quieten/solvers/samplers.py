"""Samplers by name: what the command line, recipes and reports call a transition and its grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..covariances.lanczos import Lanczos
from ..denoiser import Denoiser
from ..schedule import LinearBeta, churned, corrected
from ..solver import RK2, RK4, AdamsBashforth, Exponential, Heun
from ..transition import Ancestral, Churn, Hushed, Langevin, Transition
from ..wrap import Clip, Clipped
from .adaptive import RK45
from .dpm import Singlestep, UniPC
from .plms import PLMS, PNDM
from .sde import EulerMaruyama

__all__ = ["SAMPLERS", "Sampler", "churn", "clipped", "ends", "euler_maruyama", "predictor_corrector", "sampler"]


@dataclass(frozen=True)
class Sampler:
    """A named composition.

    Attributes:
        make: Options to the transition. Its signature says which there are, their types and their defaults.
        about: One line for people.
        regrid: What it does to a rising grid first (levels to churn or to correct at).
        variance: Name of the fitted variance that it needs, see `quieten.covariances.stored`.
        around: What is put around the transition, given its grid.
    """

    make: Callable[..., Transition]
    about: str
    regrid: Callable[[Tensor], Tensor] = lambda grid: grid
    variance: str | None = None
    around: Callable[[Transition, Tensor], Transition] = lambda transition, grid: transition


def churn(s_noise: float = 1.003) -> Churn:
    """Heun's method from levels that were noised upward first; `s_noise` scales that noise."""
    return Churn(Heun(), s_noise)


def predictor_corrector(
    eta: float = 1.0,
    snr: float = 0.16,
    predictor: Literal["ancestral", "reverse-diffusion"] = "ancestral",
    compat: Literal["official"] | None = None,
) -> Langevin:
    """A Langevin step at every level, then a step to the next: ancestral, or Euler-Maruyama's as in the paper's VE results."""
    return Langevin(Ancestral(eta, spread=False) if predictor == "ancestral" else EulerMaruyama(), snr, compat)


def euler_maruyama(beta_max: float | None = None, beta_min: float = 0.1) -> EulerMaruyama:
    """The reverse SDE in Euler steps: with `beta_max` in the time of the VP SDE whose beta grows linearly up to it."""
    return EulerMaruyama(None if beta_max is None else LinearBeta(beta_min, beta_max, start=0.0))


def ends(grid: Tensor) -> Tensor:
    """The first level of a grid, its last finite one, and the data if it ends there: all that an adaptive method asks for."""
    last = grid[grid.isfinite()][-1:]
    if not len(last) or last == grid[0]:
        raise ValueError(f"`steps` must be at least 2 for rk45 (got {len(grid) - 1}): it goes from the first level to the last")
    return torch.cat([grid[:1], last, grid[-1:][grid[-1:] == math.inf]])


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(
        partial(Ancestral, eta=0.0, spread=False),
        "deterministic, 1 evaluation a step; keep_eps=true clips x0 as diffusers does",
    ),
    "ddpm": Sampler(partial(Ancestral, eta=1.0, spread=False), "ancestral noise, small variance"),
    "ancestral": Sampler(Ancestral, "ancestral noise, with the variance that the denoiser reports"),
    "ocm": Sampler(
        Ancestral,
        "ancestral noise, with the variance learned by `quieten variance fit`",
        variance="ocm",
        around=partial(Hushed, grey=2.0),  # as in the published evaluations
    ),
    "ocm-ddim": Sampler(
        partial(Ancestral, eta=0.0),
        "DDIM, with the noise that the learned variance adds",
        variance="ocm",
        around=partial(Hushed, grey=1.0),
    ),
    "lanczos": Sampler(Lanczos, "ancestral noise with the full covariance, from Jacobian products: slow, nothing to fit"),
    "heun": Sampler(Heun, "EDM's second-order ODE solver, 2 evaluations a step"),
    "midpoint": Sampler(partial(RK2, alpha=0.5), "second-order Runge-Kutta, 2 evaluations a step"),
    "rk4": Sampler(RK4, "fourth-order Runge-Kutta, 4 evaluations a step"),
    "ab": Sampler(partial(AdamsBashforth, order=3), "Adams-Bashforth on the actual grid, 1 evaluation a step"),
    "plms": Sampler(partial(AdamsBashforth, order=4, coefficients="constant"), "Adams-Bashforth with constant coefficients"),
    "plms-heun": Sampler(PLMS, "PLMS as released with splitting: Heun first, Euler last"),
    "pndm": Sampler(PNDM, "PNDM: three pseudo Runge-Kutta steps of 4 evaluations, then PLMS"),
    "dpm++": Sampler(partial(Exponential, order=2), "DPM-Solver++ 2M, 1 evaluation a step"),
    "dpm++3m": Sampler(partial(Exponential, order=3), "DPM-Solver++ 3M, 1 evaluation a step"),
    "dpm++2s": Sampler(Singlestep, "DPM-Solver++ 2S, without history, 2 evaluations a step"),
    "unipc": Sampler(UniPC, "UniPC: a multistep predictor and a corrector, 1 evaluation a step"),
    "dpm++sde": Sampler(partial(Exponential, order=2, eta=1.0), "DPM-Solver++ 2M with ancestral noise"),
    "churn": Sampler(
        churn,
        "EDM's stochastic sampler: noise added before each step",
        lambda grid: churned(grid, s_churn=0.4 * (len(grid) - 1), s_min=0.05, s_max=50.0),
    ),
    "pc": Sampler(predictor_corrector, "predictor-corrector: a Langevin step at every level", corrected),
    "em": Sampler(euler_maruyama, "Euler-Maruyama steps of the reverse SDE, as score_sde's for VP"),
    "rk45": Sampler(RK45, "the ODE to a tolerance, steps chosen for each sample; --steps only sets the ends", ends),
}
"""Every sampler by name; `parts.PARTS["transition"]`, which recipes choose from, is made of it."""


def sampler(name: str, grid: Tensor, **options: Any) -> tuple[Transition, Tensor]:
    """The transition of a named sampler, and the grid it runs on.

    Arguments:
        name: A key of `SAMPLERS`, or of what was added by `parts.register("transition", ...)`.
        grid: Log-SNRs, rising, from noise to data.
        **options: Arguments of the transition that differ from the sampler's own, such as eta.

    Raises:
        ValueError: For an unknown name or option, or a value out of range.

    Example:
        >>> from quieten.schedule import karras
        >>> transition, grid = sampler("pc", karras(4))
        >>> len(grid)
        9
    """
    from ..training.parts import build

    transition = build("transition", name, options)
    if name not in SAMPLERS:
        return transition, grid
    grid = SAMPLERS[name].regrid(grid)
    return SAMPLERS[name].around(transition, grid), grid


def clipped(model: Denoiser, transition: Transition, how: Clip | None) -> Denoiser:
    """A denoiser whose estimate of x0 is bounded as `how` says, or as it is for None, for the steps of a transition.

    Samplers then read the noise from the bounded estimate. `Ancestral(keep_eps=True)` wants it from the one before, so there it
    is the step that is told to clip, unless it has a bound of its own.
    """
    step = transition.inner if isinstance(transition, Hushed) else transition
    if how is None or not (isinstance(step, Ancestral) and step.keep_eps):
        return model if how is None else Clipped(model, how)
    step.clip = how if step.clip is None else step.clip
    return model
