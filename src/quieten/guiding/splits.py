"""Split schemes by name: what the command line and reports call a transition that keeps denoiser and guidance apart."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ..guidance import Guidance
from ..solver import AdamsBashforth, RungeKutta
from ..split import Split
from ..transition import Ancestral, Transition
from .kick import MultistepKick, StagedKick, SubCycled

__all__ = ["SPLITS", "Splitting", "split"]

Coefficients = Literal["variable", "constant"]


@dataclass(frozen=True)
class Splitting:
    """A named composition of solver, kick and scheme.

    Attributes:
        make: (guidance, **options) -> transition. Its signature says which options there are and their defaults.
        about: One line for people.
        network: Network evaluations a step.
        gradient: Gradients a step.
    """

    make: Callable[..., Transition]
    about: str
    network: int = 1
    gradient: int = 1


def ltsp(guidance: Guidance, k: int = 4, coefficients: Coefficients = "constant", order: Literal["BA", "AB"] = "BA") -> Split:
    """LTSP of order `k`: a whole kick, then the move ("BA"), or the other way round ("AB")."""
    return Split(guidance, AdamsBashforth(k, coefficients), scheme="lie", order=order)


def lie(guidance: Guidance, k: int = 4, coefficients: Coefficients = "variable") -> Split:
    """The paper's order, network first, on the actual grid."""
    return Split(guidance, AdamsBashforth(k, coefficients), scheme="lie", order="AB")


def stsp(guidance: Guidance, k: int = 4, coefficients: Coefficients = "constant", second_coef: str = "midpoint") -> Split:
    """STSP of order `k`, as released."""
    return Split(guidance, AdamsBashforth(k, coefficients), second_coef=second_coef)


def strang(guidance: Guidance, k: int = 4) -> Split:
    """Robust Strang: coefficients of the actual grid, kicks that vanish at the data."""
    return Split(guidance, AdamsBashforth(k))


def merged(guidance: Guidance, k: int = 4) -> Split:
    """Robust Strang with one gradient a step."""
    return Split(guidance, AdamsBashforth(k), scheme="strang_merged")


def heun(guidance: Guidance, k: int = 4) -> Split:
    """Heun-kick: second order in the guidance."""
    return Split(guidance, AdamsBashforth(k), scheme="heun")


def heun_pec(guidance: Guidance, k: int = 4) -> Split:
    """Heun-kick that uses each predicted gradient twice."""
    return Split(guidance, AdamsBashforth(k), scheme="heun_pec")


def midpoint_strang(guidance: Guidance) -> Split:
    """True Strang: midpoint rules for both operators, second order."""
    return Split(guidance, RungeKutta([0.0, 0.5], [[0.5]], [0.0, 1.0], last="stages"), StagedKick())


def additive(guidance: Guidance, k: int = 4, kick_k: int = 1) -> Split:
    """Adams-Bashforth for both at once, of order `k` for the network and `kick_k` for the guidance."""
    return Split(guidance, AdamsBashforth(k), MultistepKick(kick_k), scheme="additive")


def subcycled(guidance: Guidance, k: int = 4, limit: float = 1.0, most: int = 16) -> Split:
    """Robust Strang whose kicks are divided where the guidance is stiff; see `SubCycled`."""
    return Split(guidance, AdamsBashforth(k), SubCycled(limit, most))


def ancestral(guidance: Guidance, eta: float = 1.0, spread: bool = True) -> Split:
    """Half kicks around ancestral steps, with the variance that the denoiser reports; see `Ancestral`."""
    return Split(guidance, Ancestral(eta, spread))


SPLITS: dict[str, Splitting] = {
    "strang": Splitting(strang, "half kicks around Adams-Bashforth on the actual grid: the most stable", gradient=2),
    "merged": Splitting(merged, "the same with one gradient a step"),
    "lie": Splitting(lie, "network first, then one kick, on the actual grid"),
    "heun-kick": Splitting(heun, "second order in the guidance too, for smooth guidance", gradient=2),
    "heun-pec": Splitting(heun_pec, "the same with one gradient a step"),
    "strang2": Splitting(midpoint_strang, "midpoint rules for both: second order, most accurate", network=2, gradient=4),
    "additive": Splitting(additive, "both at the same state, from one pass where guidance goes through the denoiser"),
    "subcycled": Splitting(subcycled, "strang with kicks divided where the guidance is stiff", gradient=2),
    "ancestral-split": Splitting(ancestral, "half kicks around ancestral steps with the learned variance", gradient=2),
    "ltsp": Splitting(ltsp, "LTSP4 as released"),
    "stsp": Splitting(stsp, "STSP4 as released", gradient=2),
}
"""Every split scheme by name; the first is the one to start with."""


def split(name: str, guidance: Guidance, **options: Any) -> Transition:
    """The transition of a named split scheme; it is given the unguided denoiser.

    Arguments:
        name: A key of `SPLITS`.
        guidance: The gradient to follow.
        **options: Arguments of the scheme that differ from its own, such as k.

    Raises:
        ValueError: For an unknown name or option.

    Example:
        >>> from quieten.guidance import Gradient
        >>> split("stsp", Gradient(lambda x, lam: -x), k=2).second_coef
        'midpoint'
    """
    from ..training.parts import nearest

    if name not in SPLITS:
        raise ValueError(f"unknown split scheme {name!r}{nearest(name, SPLITS)} (known: {', '.join(SPLITS)})")
    known = list(inspect.signature(SPLITS[name].make).parameters)[1:]
    for option in options:
        if option not in known:
            raise ValueError(
                f"unknown option `{option}` of split scheme {name!r}{nearest(option, known)} (known: {', '.join(known)})"
            )
    return SPLITS[name].make(guidance, **options)
