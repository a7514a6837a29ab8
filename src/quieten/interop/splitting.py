"""Splitting inside diffusers pipelines: a scheduler with guidance."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from torch import Tensor

from ..denoiser import Denoiser, convert
from ..guidance import Gradient, Guidance
from ..guiding.kick import MultistepKick, Seen
from ..process import VP
from ..schedule import Table
from ..solver import AdamsBashforth
from ..split import Split, settled
from ..wrap import Clip, clip, dynamic
from .levels import FORMS, table
from .outside import Answered, KickFn, NoNetwork, Outside, at_time, wide

__all__ = ["SplittingScheduler", "adm_timesteps"]

_SPACINGS = ("adm", "leading", "trailing", "linspace", "uniform", "quadratic")


class SplittingScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    r"""`Split` as a diffusers scheduler, for any pipeline of a network trained on a chain of betas.

    The pipeline calls the network before `step`, so each step ends with the kick that belongs before the next one. What is
    left is the kick before the first: apply it yourself, `latents = scheduler.initial_kick(latents)`, after `set_timesteps`
    with the same number of steps. The splittings "heun", "heun_pec", "additive" and "lie" with lie_order="AB" have none.

    Arguments:
        num_train_timesteps: As in diffusers' own schedulers, like all that is not explained here.
        beta_start: See there.
        beta_end: See there.
        beta_schedule: See there.
        trained_betas: See there.
        prediction_type: "epsilon", "sample" or "v_prediction". A second half of output channels is ignored.
        timestep_spacing: "adm" (both ends, rounded as guided-diffusion does), "leading", "trailing" or "linspace", as in
            diffusers; "uniform" or "quadratic", as in `Table.grid`.
        steps_offset: See there.
        solver_order: 1 to 4 of the network's Adams-Bashforth solver.
        splitting: "lie", "strang", "strang_merged", "heun", "heun_pec" or "additive"; see `Split`.
        coef: "variable" or "constant" coefficients; see `AdamsBashforth`.
        second_coef: "end" or "midpoint"; see `Split`.
        lie_order: "BA" or "AB"; see `Split`.
        gradient_order: 1 to 4, the order of the guidance's solver in "additive".
        clip_sample: See there; as released, only the network's estimate is clipped, never the kicked state.
        clip_sample_range: See there.
        thresholding: See there.
        dynamic_thresholding_ratio: See there.
        sample_max_value: See there.
        final_sigma: "zero" ends at the data, "sigma_min" at the cleanest level of the table.
        rescale_betas_zero_snr: See there.

    Example:
        ``pipe.scheduler = SplittingScheduler.from_config(pipe.scheduler.config)``,
        ``pipe.scheduler.set_guidance(cond_fn)``
    """

    order = 1
    init_noise_sigma = 1.0
    _compatibles = [e.name for e in KarrasDiffusionSchedulers]  # noqa: RUF012, as diffusers declares it

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "adm",
        steps_offset: int = 0,
        solver_order: int = 4,
        splitting: str = "strang",
        coef: str = "variable",
        second_coef: str = "end",
        lie_order: str = "BA",
        gradient_order: int = 1,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        final_sigma: str = "zero",
        rescale_betas_zero_snr: bool = False,
    ):
        config: Any = self.config
        if prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(f"`prediction_type` must be 'epsilon', 'sample' or 'v_prediction' (got {prediction_type!r})")
        if timestep_spacing not in _SPACINGS:
            known = ", ".join(map(repr, _SPACINGS))
            raise ValueError(f"`timestep_spacing` must be one of {known} (got {timestep_spacing!r})")
        if final_sigma not in ("zero", "sigma_min"):
            raise ValueError(f"`final_sigma` must be 'zero' or 'sigma_min' (got {final_sigma!r})")
        self.table: Table = table(config)
        self.alphas_cumprod = torch.sigmoid(self.table.lam).float()  # some pipelines read it
        self._clip: Clip | None = float(clip_sample_range) if clip_sample else None
        if thresholding:
            self._clip = dynamic(dynamic_thresholding_ratio, sample_max_value)
        self._no_network = NoNetwork()
        self._guided = False
        self._split = self._make(Outside(Gradient(lambda x, lam: x, 0.0)))
        self._lams: list[float] = []
        self._initial: tuple[float, float, Any] | None = None
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self._restart()

    def _make(self, guidance: Guidance) -> Split:
        config: Any = self.config
        flow = AdamsBashforth(config.solver_order, config.coef)
        kick = MultistepKick(config.gradient_order, config.coef) if config.splitting == "additive" else None
        return Split(guidance, flow, kick, config.splitting, config.lie_order, config.second_coef)

    def _restart(self) -> None:
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._flow: Any = None
        self._carried: tuple[Any] | None = None
        self._seen: tuple[Seen, ...] | None = ()

    # ---- guidance

    def set_guidance(self, guidance: KickFn | Guidance | None) -> None:
        """What to steer by; not part of the configuration, and not saved with it.

        Arguments:
            guidance: A `cond_fn`: (x_t, t) -> w grad log p(y | x_t), already weighted, t (B,) the training time steps; or a
                `Guidance` that does not ask the denoiser; None for none. It runs on float32 states or wider.
        """
        if guidance is not None and not callable(guidance):
            raise ValueError(f"`guidance` must be a function (x, t) -> gradient, or a Guidance (got {type(guidance).__name__})")
        inner = guidance
        if not isinstance(guidance, Guidance):
            inner = Gradient(lambda x, lam: x, 0.0) if guidance is None else Gradient(at_time(guidance, self.table))
        self._guided = guidance is not None
        self._split = self._make(Outside(inner))  # type: ignore[arg-type]

    def initial_kick(self, latents: Tensor) -> Tensor:
        """The kick that belongs before the network's first call; once, on the initial latents, after `set_timesteps`."""
        n = self._begin_index or 0
        lam_t, lam_s = self._levels(n)
        x, _, carried = self._before(wide(latents), n, None)
        self._initial = lam_t, lam_s, carried
        return x.to(latents.dtype)

    # ---- the interface of schedulers

    @property
    def step_index(self) -> int | None:
        """Number of the next step, None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Number of the first step, when a pipeline sets one."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Starts at a later step, as image-to-image pipelines do."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Chooses the levels: a number of steps, or time steps, or sigma / alpha, from noise to data. Forgets the last run.

        Raises:
            ValueError: Unless exactly one is given, or if they do not fall strictly.
        """
        if sum(choice is not None for choice in (num_inference_steps, timesteps, sigmas)) != 1:
            raise ValueError("give one of `num_inference_steps`, `timesteps` and `sigmas`")
        config: Any = self.config
        if sigmas is not None:
            values = [float(s) for s in sigmas]
            lam = -2.0 * torch.log(torch.tensor(values[:-1] if values and values[-1] == 0.0 else values, dtype=torch.float64))
            index = self.table.index(lam)
        else:
            if timesteps is not None:
                index = torch.as_tensor(timesteps, dtype=torch.float64)
            elif config.timestep_spacing == "adm":
                steps = adm_timesteps(int(num_inference_steps or 0), len(self.table))
                index = torch.tensor(steps[::-1], dtype=torch.float64)
            else:
                index = self.table.indices(int(num_inference_steps or 0), config.timestep_spacing, config.steps_offset)
            lam = self.table.at(index)
        if (
            not len(lam)
            or not bool((lam[1:] > lam[:-1]).all())
            or bool(index.lt(0).any() or index.gt(len(self.table) - 1).any())
        ):
            raise ValueError(f"`timesteps` or `sigmas` must fall strictly within the training range (got {index.tolist()[:6]})")
        end = math.inf if config.final_sigma == "zero" else float(self.table.lam[0])
        self._lams = [*lam.tolist(), *([end] if lam[-1] < end else [])]
        whole = bool((index == index.round()).all())
        self.timesteps = (index.long() if whole else index.float())[: len(self._lams) - 1].to(device)
        self.num_inference_steps = len(self.timesteps)
        self._restart()

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample itself."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
    ) -> DDIMSchedulerOutput | tuple[Tensor, ...]:
        """One move with the network's output, the kick after it, and the kick before the next one.

        Arguments:
            model_output: The network's output at `sample`; twice its channels if the network predicts a variance.
            timestep: Its time step, one for the whole batch.
            sample: The state that the network saw.
            generator: Unused: the step is deterministic.
            return_dict: As in diffusers.
            eta: Must be 0; for the signature of DDIM's pipeline.
            use_clipped_model_output: Unused, likewise.
        """
        if eta:
            raise ValueError(f"`eta`={eta} adds noise, and this scheduler is deterministic: pass 0")
        n = self._locate(timestep)
        lam_t, lam_s = self._levels(n)
        x = wide(sample)
        x0 = self._estimate(model_output, x, lam_t)
        carried = self._pending(x, n, lam_t, lam_s)
        moved = self._split.flow(Answered(x0), x, lam_t, lam_s, self._flow)
        around, force, move = self._split.parts(self._no_network, lam_t, lam_s, n)
        force = replace(force, seen=None if self._seen is None else list(self._seen))
        x, held = around.after(force, moved.p.mean, move, carried)
        self._seen = settled(around, force, x, move)
        self._flow, self._step_index = moved.memory, n + 1
        if n + 2 < len(self._lams):
            x, _, carried = self._before(x, n + 1, held)
            self._carried = (carried,)
        x, x0 = x.to(sample.dtype), x0.to(sample.dtype)
        return DDIMSchedulerOutput(prev_sample=x, pred_original_sample=x0) if return_dict else (x, x0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x0 + sigma noise at training time steps (B,)."""
        lam = self.table.at(timesteps.cpu().double())
        alpha, sigma = (s.to(original_samples).reshape(-1, *[1] * (original_samples.ndim - 1)) for s in VP.scales(lam))
        return alpha * original_samples + sigma * noise

    def __len__(self) -> int:
        return len(self.table)

    # ---- its parts

    def _levels(self, n: int) -> tuple[float, float]:
        if n + 1 >= len(self._lams):
            raise ValueError(f"there is no step {n}: call set_timesteps first, and step once for each of its time steps")
        return self._lams[n], self._lams[n + 1]

    def _locate(self, timestep: Any) -> int:
        values = torch.as_tensor(timestep).flatten().tolist()
        if any(value != values[0] for value in values):
            raise ValueError(f"`timestep` differs within the batch (got {values[:4]}): all examples share a level")
        if self._step_index is not None:
            return self._step_index
        if self._begin_index is not None:
            return self._begin_index
        here = [i for i, t in enumerate(self.timesteps.tolist()) if t == values[0]]
        if not here:
            raise ValueError(f"`timestep` {values[0]} is none of this run's: call set_timesteps, and pass its time steps")
        return here[0]

    def _before(self, x: Tensor, n: int, held: Any) -> tuple[Tensor, Denoiser, Any]:
        around, force, move = self._split.parts(self._no_network, *self._levels(n), n)
        seen = None if self._seen is None else list(self._seen)
        kicked = around.before(replace(force, seen=seen), x, move, held)
        self._seen = None if seen is None else tuple(seen)
        return kicked

    def _pending(self, x: Tensor, n: int, lam_t: float, lam_s: float) -> Any:
        """What the kick before this step left for the one after it."""
        if self._carried is not None:
            (carried,), self._carried = self._carried, None
            return carried
        if self._initial is not None:
            (first, second, carried), self._initial = self._initial, None
            if (first, second) != (lam_t, lam_s):
                raise ValueError(
                    "`initial_kick` was applied for another number of steps: call set_timesteps with this run's first"
                )
            return carried
        around, _, _ = self._split.parts(self._no_network, lam_t, lam_s, n)
        if not around.early:
            return self._before(x, n, None)[2]
        if self._guided:
            warnings.warn(
                "the kick before the first step is missing: call latents = scheduler.initial_kick(latents) first, or use "
                "splitting='heun', which has none",
                stacklevel=3,
            )
        return None

    def _estimate(self, output: Tensor, x: Tensor, lam: float) -> Tensor:
        """E[x0 | x_t] from the network's output, clipped as configured."""
        config: Any = self.config
        output = output.to(x)
        if output.shape[1] == 2 * x.shape[1]:
            output = output[:, : x.shape[1]]
        x0 = convert(output, x, FORMS[config.prediction_type], "x0", *VP.scales(lam))
        return x0 if self._clip is None else clip(x0, self._clip)


def adm_timesteps(spec: int | str, total: int = 1000) -> list[int]:
    """The time steps that guided-diffusion keeps, rising: its `timestep_respacing`.

    Arguments:
        spec: Their number N (0 and total - 1 included, rounded half to even after repeated addition); or counts of equal
            sections, "10,10,10"; or "ddimN", the first whole stride that gives N.
        total: Of the training chain.

    Raises:
        ValueError: If that many do not exist.
    """
    if isinstance(spec, str) and spec.startswith("ddim"):
        wanted = int(spec.removeprefix("ddim"))
        for stride in range(1, total):
            if len(range(0, total, stride)) == wanted:
                return list(range(0, total, stride))
        raise ValueError(f"`spec`={spec!r}: no whole stride through {total} time steps gives {wanted}")
    counts = [int(part) for part in str(spec).split(",")]
    steps, start = list[int](), 0
    for i, count in enumerate(counts):
        size = total // len(counts) + (i < total % len(counts))
        if not 1 <= count <= size:
            raise ValueError(f"`spec` must ask for 1 to {size} of the {size} time steps of a section (got {count})")
        gap, at = (size - 1) / max(count - 1, 1), 0.0
        if count == 1 and len(counts) == 1:
            return [total - 1]  # the released rule would keep 0, the cleanest
        for _ in range(count):
            steps.append(start + round(at))
            at += gap
        start += size
    return steps
