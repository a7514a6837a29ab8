r"""What a diffusers scheduler's configuration says about the network: process, form, embedding, noise levels.

A scheduler of diffusers mixes two things: how the network was trained (betas, what it predicts, what its time means) and how
to sample it. The first part is read here. The second matters only for the default grid, since any sampler takes any denoiser.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Form, c_noise, edm_form
from ..process import FLOW, VE, VP, Process
from ..schedule import Linear, LogNormal, Rectified, Schedule, Table, karras
from ..wrap import Clip, dynamic

__all__ = ["SCHEDULERS", "Index", "Levels", "betas", "read_levels", "table"]

FORMS: dict[str, Form] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}
"""diffusers' `prediction_type` -> our form."""

_PLAIN = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler")
_SIGMAS = (
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler",
)  # fmt: skip
_MULTISTEP = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler")
_EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
_FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
SCHEDULERS = (*_PLAIN, *_SIGMAS, *_MULTISTEP, *_EDM, *_FLOW)
"""Class names of the diffusers schedulers whose configurations are understood."""


@dataclass(frozen=True)
class Levels:
    """How a network was trained.

    Attributes:
        process: VP for every chain of betas, VE for EDM, FLOW for flow matching. diffusers' Euler, Heun and LMS schedulers
            keep their states divided by alpha, and hand the network VP states all the same.
        form: What the network predicts.
        embed: lam (B,) -> the network's time (B,); a table stands for its (fractional) index.
        sigma_data: For EDM's input scaling, else None.
        schedule: Levels to train or to sample on.
        spacing: How `grid` spaces them when not told otherwise.
        offset: diffusers' `steps_offset`.
        spare: Whether the scheduler counts one level more than it visits, leaving out the cleanest.
        ends: Smallest and largest sigma / alpha of sigma grids.
        rho: Their exponent.
        clip: The clipping of x0 that the scheduler asks for.
        learned: Whether a second half of output channels is a log-variance, as `variance_type="learned"` says.
    """

    process: Process
    form: Form
    embed: Callable[[Tensor], Tensor] | Table
    schedule: Schedule
    sigma_data: float | None = None
    spacing: str = "uniform"
    offset: int = 0
    spare: bool = False
    ends: tuple[float, float] = (0.002, 80.0)
    rho: float = 7.0
    clip: Clip | None = None
    learned: bool = False

    def grid(self, steps: int, spacing: str | None = None) -> Tensor:
        """Log-SNRs to sample on: float64 (steps + 1,), from noise to +inf; see `Pretrained.grid`."""
        default = spacing is None
        spacing = self.spacing if spacing is None else spacing
        if spacing in ("karras", "exponential"):
            if self.process is FLOW:
                raise ValueError(f"`spacing`={spacing!r} needs finite ends, which flow matching has not: use 'uniform'")
            low, high = self.ends
            if spacing == "karras":
                return karras(steps, low, high, self.rho)
            return Linear(-2.0 * math.log(low), -2.0 * math.log(high)).grid(steps)
        if not isinstance(self.schedule, Table):
            return self.schedule.grid(steps, spacing)
        offset = self.offset if spacing == "leading" else 0
        if default and self.spare and spacing != "trailing":
            grid = self.schedule.grid(steps + 1, spacing, offset)
            return torch.cat([grid[:-2], grid[-1:]])
        return self.schedule.grid(steps, spacing, offset)


class Index:
    """lam -> the nearest index of a table, for networks that look their time up in a list.

    Warns the first time that an index is rounded. Other networks take fractional indices: `Table.index`.

    Arguments:
        table: The levels the network was trained on.
    """

    def __init__(self, table: Table):
        self.table, self.warned = table, False

    def __call__(self, lam: Tensor) -> Tensor:
        nearest = self.table.nearest(lam)
        if not self.warned and bool((nearest != self.table.index(lam)).any()):
            self.warned = True
            warnings.warn(
                "this network knows only the levels of its table: others are rounded to the nearest index, which costs "
                "accuracy (pass a grid of the table's own levels)",
                stacklevel=2,
            )
        return nearest.long()


def read_levels(config: Mapping[str, Any], whole: bool = False) -> Levels:
    """What a scheduler's complete configuration, `_class_name` included, says about the network.

    Arguments:
        config: The scheduler's `config`, defaults filled in.
        whole: The network takes whole indices only.

    Raises:
        ValueError: For a scheduler, beta schedule or prediction type that is not understood.
    """
    name = config.get("_class_name")
    if name in _EDM:
        return _edm(config)
    if name in _FLOW or config.get("use_flow_sigmas"):
        return _flow(config)
    if name not in SCHEDULERS:
        raise ValueError(f"`scheduler` of class {name} is not supported: one of {', '.join(SCHEDULERS)}")
    form = _form(config)
    if form == "flow":
        raise ValueError("`prediction_type`='flow_prediction' needs use_flow_sigmas=True in the scheduler's configuration")
    if config.get("timestep_type", "discrete") != "discrete":
        raise ValueError(f"`timestep_type`={config['timestep_type']!r} is not supported: only 'discrete'")
    entries = table(config)
    sigmas = torch.exp(-0.5 * entries.lam[entries.lam.isfinite()])
    spacing = config["timestep_spacing"]
    if name in _SIGMAS and spacing == "linspace":
        spacing = "uniform"  # these do not round their indices
    return Levels(
        VP,
        form,
        Index(entries) if whole else entries,
        entries,
        spacing=_sigma_spacing(config) or spacing,
        offset=config.get("steps_offset", 0),
        spare=name in _MULTISTEP,
        ends=(config.get("sigma_min") or float(sigmas[0]), config.get("sigma_max") or float(sigmas[-1])),
        clip=_clip(config),
        learned=config.get("variance_type") == "learned",
    )


def table(config: Mapping[str, Any]) -> Table:
    """The table of a chain of betas, summed in float64; -inf at its end with `rescale_betas_zero_snr`."""
    chain = betas(config)
    if not config.get("rescale_betas_zero_snr"):
        return Table.from_betas(chain)
    # Lin et al. (2023), algorithm 1, https://arxiv.org/abs/2305.08891: alpha shifted and stretched to end at 0
    alpha = torch.exp(0.5 * torch.log1p(-chain).cumsum(0))
    alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    return Table.from_alphas_cumprod(alpha.square())


def betas(config: Mapping[str, Any]) -> Tensor:
    """The betas of a configuration, float64 (N,), before any rescaling.

    Raises:
        ValueError: For an unknown `beta_schedule`.
    """
    if config.get("trained_betas") is not None:
        return torch.as_tensor(config["trained_betas"], dtype=torch.float64)
    n, low, high, kind = config["num_train_timesteps"], config["beta_start"], config["beta_end"], config["beta_schedule"]
    if kind == "linear":
        return torch.linspace(low, high, n, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(low**0.5, high**0.5, n, dtype=torch.float64).square()
    if kind == "squaredcos_cap_v2":
        # Nichol, Dhariwal (2021), eq. 17, https://arxiv.org/abs/2102.09672
        alpha_bar = torch.cos((torch.linspace(0, 1, n + 1, dtype=torch.float64) + 0.008) / 1.008 * (0.5 * math.pi)).square()
        return (1.0 - alpha_bar[1:] / alpha_bar[:-1]).clamp_max(0.999)
    if kind == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, n, dtype=torch.float64)) * (high - low) + low
    known = "'linear', 'scaled_linear', 'squaredcos_cap_v2', 'sigmoid'"
    raise ValueError(f"`beta_schedule`={kind!r} is not supported: one of {known}, or `trained_betas`")


def _edm(config: Mapping[str, Any]) -> Levels:
    if config["prediction_type"] not in ("epsilon", "v_prediction"):
        raise ValueError(f"`prediction_type`={config['prediction_type']!r} is not supported with EDM's preconditioning: "
                         "'epsilon' or 'v_prediction'")  # fmt: skip
    sigma_data, form = config["sigma_data"], edm_form(config["sigma_data"])
    if config["prediction_type"] == "v_prediction":  # the same target with its sign turned
        form = _negated(form)
    return Levels(
        VE,
        form,
        c_noise,
        LogNormal(),
        sigma_data=sigma_data,
        spacing=config["sigma_schedule"],
        ends=(config["sigma_min"], config["sigma_max"]),
        rho=config["rho"],
    )


def _flow(config: Mapping[str, Any]) -> Levels:
    flow_match = config["_class_name"] in _FLOW
    if config.get("use_dynamic_shifting") or config.get("shift_terminal"):
        raise ValueError("flow matching with `use_dynamic_shifting` or `shift_terminal` is not supported: "
                         "pass scheduler={..., 'use_dynamic_shifting': False, 'shift': 3.0}")  # fmt: skip
    if config.get("invert_sigmas"):
        raise ValueError("flow matching with `invert_sigmas` is not supported")
    shift = config["shift"] if flow_match else config["flow_shift"]
    n = config["num_train_timesteps"]
    return Levels(
        FLOW,
        "flow" if flow_match else _form(config),
        lambda lam: n * torch.sigmoid(-0.5 * lam),  # n sigma, whatever the shift
        Rectified(shift),
        spacing=_sigma_spacing(config) or "uniform",
    )


def _form(config: Mapping[str, Any]) -> Form:
    kind = config["prediction_type"]
    if kind not in FORMS:
        raise ValueError(f"`prediction_type`={kind!r} is not supported: one of {', '.join(FORMS)}")
    return FORMS[kind]


def _negated(form: Any) -> Form:
    def coefficients(alpha: Any, sigma: Any) -> tuple[Any, Any]:
        p, q = form(alpha, sigma)
        return -p, -q

    return coefficients


def _sigma_spacing(config: Mapping[str, Any]) -> str | None:
    """The spacing in sigma that the configuration asks for; an unknown one is refused by `grid`, not when loading."""
    kinds = {"karras_sigmas": "karras", "exponential_sigmas": "exponential", "beta_sigmas": "beta", "lu_lambdas": "lu"}
    return next((kind for key, kind in kinds.items() if config.get(f"use_{key}")), None)


def _clip(config: Mapping[str, Any]) -> Clip | None:
    if config.get("thresholding"):
        return dynamic(config["dynamic_thresholding_ratio"], config["sample_max_value"])
    return float(config["clip_sample_range"]) if config.get("clip_sample") else None
