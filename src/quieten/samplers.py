r"""Samplers by name: what the command line, recipes and reports call a transition and its grid."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .schedule import churned, corrected
from .solver import RK2, RK4, AdamsBashforth, Exponential, Heun
from .transition import Ancestral, Churn, Langevin, Transition

__all__ = ["SAMPLERS", "Sampler", "sampler"]


@dataclass(frozen=True)
class Sampler:
    """A named composition.

    Attributes:
        make: Options to the transition.
        about: One line for people.
        regrid: What it does to a rising grid first (levels to churn or to correct at).
    """

    make: Callable[..., Transition]
    about: str
    regrid: Callable[[Tensor], Tensor] = lambda grid: grid


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(lambda **o: Ancestral(**{"eta": 0.0, "spread": False, **o}), "deterministic, 1 evaluation a step"),
    "ddpm": Sampler(lambda **o: Ancestral(**{"eta": 1.0, "spread": False, **o}), "ancestral noise, small variance"),
    "ancestral": Sampler(Ancestral, "ancestral noise, with the variance that the denoiser reports"),
    "heun": Sampler(Heun, "EDM's second-order ODE solver, 2 evaluations a step"),
    "midpoint": Sampler(lambda **o: RK2(**{"alpha": 0.5, **o}), "second-order Runge-Kutta, 2 evaluations a step"),
    "rk4": Sampler(RK4, "fourth-order Runge-Kutta, 4 evaluations a step"),
    "ab": Sampler(lambda **o: AdamsBashforth(**{"order": 3, **o}), "Adams-Bashforth on the actual grid, 1 evaluation a step"),
    "plms": Sampler(
        lambda **o: AdamsBashforth(**{"order": 4, "coefficients": "constant", **o}),
        "Adams-Bashforth with constant coefficients",
    ),
    "dpm++": Sampler(lambda **o: Exponential(**{"order": 2, **o}), "DPM-Solver++ 2M, 1 evaluation a step"),
    "dpm++3m": Sampler(lambda **o: Exponential(**{"order": 3, **o}), "DPM-Solver++ 3M, 1 evaluation a step"),
    "dpm++sde": Sampler(lambda **o: Exponential(**{"order": 2, "eta": 1.0, **o}), "DPM-Solver++ 2M with ancestral noise"),
    "churn": Sampler(
        lambda s_noise=1.003, **o: Churn(Heun(**o), s_noise),
        "EDM's stochastic sampler: noise added before each step",
        lambda grid: churned(grid, s_churn=0.4 * (len(grid) - 1), s_min=0.05, s_max=50.0),
    ),
    "pc": Sampler(
        lambda snr=0.16, **o: Langevin(Ancestral(**{"spread": False, **o}), snr),
        "predictor-corrector: a Langevin step at every level",
        corrected,
    ),
}
"""Every sampler by name."""


def sampler(name: str, grid: Tensor, **options: Any) -> tuple[Transition, Tensor]:
    """The transition of a named sampler, and the grid it runs on.

    Arguments:
        name: A key of `SAMPLERS`.
        grid: Log-SNRs, rising, from noise to data.
        **options: Arguments of the transition that differ from the sampler's own, such as eta.

    Raises:
        ValueError: For an unknown name or option.

    Example:
        >>> from quieten.schedule import karras
        >>> transition, grid = sampler("pc", karras(4))
        >>> len(grid)
        9
    """
    if name not in SAMPLERS:
        near = difflib.get_close_matches(name, SAMPLERS, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown transition {name!r}{hint} (known: {', '.join(SAMPLERS)})")
    try:
        transition = SAMPLERS[name].make(**options)
    except TypeError:
        raise ValueError(f"the transition {name!r} does not take {', '.join(sorted(options))}: leave it out") from None
    return transition, SAMPLERS[name].regrid(grid)
