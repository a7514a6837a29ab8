"""diffusers' own samplers on our denoisers: the schedulers that its pipelines use, run on the same network and noise."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..process import VP
from ..schedule import Table

__all__ = ["THEIRS", "Theirs", "installed"]

THEIRS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {"final_sigmas_type": "zero"}),
    "deis": ("DEISMultistepScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"set_alpha_to_one": True}),
}
"""Names -> diffusers' class, and the settings that are not its defaults: end at the data, clip nothing (the denoiser does)."""


def installed() -> bool:
    """Whether diffusers is there."""
    return find_spec("diffusers") is not None


class Theirs:
    """A scheduler of diffusers and a number of steps: what draws x0 from noise with any of our denoisers.

    The network is asked for x0 at the log-SNR of each of the scheduler's levels, in its own process, and answers as the noise
    of the VP state that diffusers works with. The scheduler's table is kept in float64.

    Arguments:
        name: A key of `THEIRS`.
        table: The levels to choose from; an end at -inf is left out, since noise says nothing about x0 there.
        steps: Number of steps, as `set_timesteps` takes it.

    Attributes:
        levels: Log-SNRs at which the network is asked, in turn.
        config: The scheduler's class and settings, without the table.

    Raises:
        ValueError: For an unknown name, or a number of steps that the scheduler refuses.
        ImportError: Without diffusers.
    """

    def __init__(self, name: str, table: Table, steps: int):
        if name not in THEIRS:
            raise ValueError(f"unknown scheduler of diffusers {name!r} (known: {', '.join(THEIRS)})")
        kind, options = THEIRS[name]
        self.kind, self.options, self.steps = kind, dict(options), steps
        self.lam = table.lam[table.lam.isfinite()].double().cpu()
        self.config = {"class": kind, **self.options}
        scheduler = self._scheduler()
        self.levels = [self._level(scheduler, i, t) for i, t in enumerate(scheduler.timesteps)]

    def _scheduler(self) -> Any:
        import diffusers

        alpha2 = torch.sigmoid(self.lam)
        betas = 1.0 - alpha2 / torch.cat([alpha2.new_ones(1), alpha2[:-1]])
        logger = logging.getLogger("diffusers")
        level = logger.level
        logger.setLevel(logging.ERROR)  # it warns of settings that are its own defaults
        try:
            make = getattr(diffusers, self.kind)
            scheduler = make(num_train_timesteps=len(betas), trained_betas=betas.tolist(), **self.options)
            scheduler.alphas_cumprod = alpha2  # in float32, 1 - alpha^2 of the cleanest levels has three digits
            scheduler.set_timesteps(self.steps)
        except (ValueError, IndexError, ZeroDivisionError, AssertionError) as error:
            raise ValueError(f"diffusers' {self.kind} refuses {self.steps} steps: {' '.join(str(error).split())}") from error
        finally:
            logger.setLevel(level)
        return scheduler

    def _level(self, scheduler: Any, i: int, t: Any) -> float:
        """Log-SNR at the i-th call of the network: of its sigma where the scheduler has them, else of the table's entry."""
        if hasattr(scheduler, "sigmas"):
            return -2.0 * math.log(float(scheduler.sigmas[i]))
        return float(self.lam[int(t)])

    @torch.no_grad()
    def __call__(self, denoiser: Denoiser, noise: Tensor) -> Tensor:
        """x0 (B, *) from standard normals (B, *).

        Arguments:
            denoiser: Conditions bound; of any process with states alpha x0 + sigma eps.
            noise: The initial noise, float32 or float64.
        """
        scheduler = self._scheduler()
        x = noise * float(scheduler.init_noise_sigma)
        for lam, t in zip(self.levels, scheduler.timesteps, strict=True):
            eps = _noise_of(denoiser, scheduler.scale_model_input(x, t), lam)
            x = scheduler.step(eps, t, x).prev_sample.to(noise.dtype)
        return x


def _noise_of(denoiser: Denoiser, x: Tensor, lam: float) -> Tensor:
    """The noise that a denoiser sees in a VP state at log-SNR lam, asked in its own process."""
    if denoiser.process is not VP:
        x = x * (denoiser.process.scales(lam)[0] / VP.scales(lam)[0])
    return denoiser.predict(x, lam, "eps")
