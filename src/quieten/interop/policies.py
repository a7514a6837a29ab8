"""Policies whose steps are those of a scheduler of diffusers."""

from __future__ import annotations

import warnings
from typing import Any

from ..denoiser import Denoiser
from ..transition import Ancestral
from ..tuning.policy import Policy
from .diffusers import _config, _need
from .levels import read_levels

__all__ = ["scheduled_policy"]

NOISY = ("DDPMScheduler", "DDIMScheduler", "EulerAncestralDiscreteScheduler")
"""Class names of the schedulers whose steps are a policy's: Gaussian, with a mean and a standard deviation that are known."""


def scheduled_policy(denoiser: Denoiser, scheduler: Any, steps: int, eta: float = 1.0, **options: Any) -> Policy:
    """A policy with the levels, the means and the noise of a scheduler of diffusers.

    Arguments:
        denoiser: Such as `from_diffusers(...).denoiser`.
        scheduler: A DDPM, DDIM or Euler ancestral scheduler, or its configuration as a mapping with "_class_name".
        steps: Number of steps, as `set_timesteps` takes it.
        eta: Of DDIM, which takes it with each step; above 0.
        **options: As in `Policy`, such as `trained` and `last_std`.

    Warns:
        For a scheduler that clips the estimate of x0, which the policy does not: no gradient would reach the network there.

    Raises:
        ValueError: For a scheduler without noise or with learned noise, an `eta` of 0, or another class.
        ImportError: Without diffusers.

    References:
        | Maximum Entropy Inverse Reinforcement Learning of Diffusion Models with Energy-Based Models (Yoon et al., 2024)
        | https://arxiv.org/abs/2407.00626
    """
    _need("diffusers")
    config = _config(scheduler)
    name, kind = config["_class_name"], config.get("variance_type", "fixed_small")
    if name not in NOISY:
        raise ValueError(f"`scheduler` {name} adds no noise of its own: take one of {', '.join(NOISY)}, or inject noise by "
                         "Policy(denoiser, grid, std=...)")  # fmt: skip
    if name == "DDIMScheduler" and not eta > 0:
        raise ValueError(f"`eta` must be positive (got {eta}): without noise there is no policy to train")
    if name == "DDPMScheduler" and kind not in ("fixed_small", "fixed_small_log"):
        raise ValueError(f"`variance_type`={kind!r} is not supported: load with 'fixed_small', or give the noise by "
                         "Policy(denoiser, grid, std=...), as from moment_std")  # fmt: skip
    levels = read_levels(config)
    if levels.clip is not None:
        warnings.warn("`scheduler` clips the estimate of x0, the policy does not: clipping stops gradients", stacklevel=2)
    inner = Ancestral(eta if name == "DDIMScheduler" else 1.0, spread=False)
    return Policy(denoiser, levels.grid(steps), inner, **options)
