"""Kicks between the steps of diffusers' own schedulers, where those keep them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..guidance import Gradient
from ..guiding.kick import EulerKick, Force, Span
from ..process import VP
from .levels import table
from .outside import KickFn, NoNetwork, Outside, at_time, wide

__all__ = ["check_keeps_kicks", "kick_callback"]

DISCARD = {
    "UniPCMultistepScheduler": "its corrector rebuilds the state from the step before: pass disable_corrector for every step",
    "SASolverScheduler": "its corrector rebuilds the state from the step before",
    "HeunDiscreteScheduler": "its second stage starts from the state before the first",
    "FlowMatchHeunDiscreteScheduler": "its second stage starts from the state before the first",
    "KDPM2DiscreteScheduler": "its second stage starts from the state before the first",
    "KDPM2AncestralDiscreteScheduler": "its second stage starts from the state before the first",
    "DPMSolverSDEScheduler": "its second stage starts from the state before the first",
    "DPMSolverSinglestepScheduler": "it returns to the start of each block: pass solver_order=1",
    "PNDMScheduler": "its Runge-Kutta stages start from the state before them: pass skip_prk_steps=True",
}
"""Schedulers that lose what happens to the state between their steps, and why."""

_BETAS = (
    "DDPMScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDIMParallelScheduler", "PNDMScheduler",
    "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
_SIGMAS = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler")


def check_keeps_kicks(scheduler: Any) -> None:
    """Refuses schedulers that discard kicks between their steps.

    Raises:
        ValueError: Naming the scheduler and the remedy.
    """
    name, config = type(scheduler).__name__, scheduler.config
    steps = scheduler.num_inference_steps
    harmless = (
        (name == "UniPCMultistepScheduler" and steps and set(range(steps)) <= set(config.disable_corrector))
        or (name == "DPMSolverSinglestepScheduler" and config.solver_order == 1)
        or (name == "PNDMScheduler" and config.skip_prk_steps)
    )
    if name in DISCARD and not harmless:
        raise ValueError(f"{name} discards kicks, {DISCARD[name]}, or use SplittingScheduler")


def kick_callback(scheduler: Any, guidance: KickFn) -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]:
    """A `callback_on_step_end` that kicks the latents after each step of a scheduler that keeps kicks: Lie splitting, "AB".

    Arguments:
        scheduler: The pipeline's own, for a network trained on a chain of betas.
        guidance: A `cond_fn`, as in `SplittingScheduler.set_guidance`; it sees variance-preserving states.

    Raises:
        ValueError: For schedulers that discard kicks, or whose levels are not known here.
    """
    name = type(scheduler).__name__
    if name in DISCARD and name not in _BETAS:
        check_keeps_kicks(scheduler)
    if name not in _BETAS + _SIGMAS:
        raise ValueError(f"{name} is not known to keep kicks: one of {', '.join(_BETAS + _SIGMAS)}, or use SplittingScheduler")
    levels, scaled = table(scheduler.config), name in _SIGMAS
    force = Force(Outside(Gradient(at_time(guidance, levels))), NoNetwork())

    def callback(pipeline: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        check_keeps_kicks(scheduler)  # now that it knows its steps
        times = scheduler.timesteps
        if index + 1 >= len(times):
            return {}  # the data: a kick of length times sigma 0
        lam_t, lam_s = levels.at(times[index : index + 2].cpu().double()).tolist()
        latents, (alpha, _) = kwargs["latents"], VP.scales(lam_s)
        x = wide(latents) * (alpha if scaled else 1.0)
        x, _ = EulerKick()(force, x, lam_s, Span.between(lam_t, lam_s))
        return {"latents": (x / alpha if scaled else x).to(latents.dtype)}

    return callback
