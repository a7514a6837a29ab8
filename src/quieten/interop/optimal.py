r"""A learned variance for diffusers' own pipelines: a U-Net that also says what its head says, and a scheduler that uses it.

A stock `DDPMPipeline` hands its scheduler nothing but the network's output; so that is where the head's output travels, in a
second half of channels.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..basis import DCT
from ..covariance import Learned
from ..covariances.heads import Complex, Simple, find_tap, head_on
from ..covariances.stored import KINDS
from ..denoiser import Denoiser, convert
from ..gaussian import Gaussian
from ..process import VP, Level
from ..transition import Ancestral, Hushed, Step
from ..wrap import WithCovariance
from .levels import FORMS, table

__all__ = ["OptimalCovarianceScheduler", "VarianceUNet", "pipeline_parts"]


class VarianceUNet(ModelMixin, ConfigMixin):
    """A UNet2DModel with a head of variance: its output has the head's in a second half of channels.

    Arguments:
        unet: Configuration of the UNet2DModel.
        head: "simple" or "complex".
        block: Side of the blocks whose cosine coefficients the head predicts; None for pixels.
        in_channels: Those of the U-Net, which pipelines ask for.
        sample_size: Likewise.
    """

    @register_to_config
    def __init__(
        self,
        unet: Mapping[str, Any],
        head: str = "simple",
        block: int | None = None,
        in_channels: int = 3,
        sample_size: Any = None,
    ):
        super().__init__()
        # not called `unet` and `head`: where a model's parts share names with its configuration, diffusers gives the latter
        self.trunk: Any = UNet2DModel.from_config(dict(unet))
        tap = find_tap(self.trunk)
        assert tap is not None
        self.spread = head_on(tap, (in_channels, 0, 0), head, block or 1)

    @classmethod
    def of(cls, unet: Any, source: Learned) -> VarianceUNet:
        """A U-Net with the head of a fitted source; both are copied.

        Raises:
            ValueError: If the head is not one of those that read the U-Net's features.
        """
        kinds: dict[type, str] = {Simple: "simple", Complex: "complex"}
        head: Any = source.head
        if type(head) not in kinds:
            raise ValueError(f"`source` has a head of class {type(head).__name__}, which a pipeline cannot carry: fit "
                             "one with head 'simple' or 'complex'")  # fmt: skip
        config = unet.config
        block = source.basis.block if isinstance(source.basis, DCT) else None
        made: VarianceUNet = cls(dict(config), kinds[type(head)], block, config.in_channels, config.sample_size)
        made.trunk.load_state_dict(unet.state_dict())
        made.spread.load_state_dict(head.state_dict())
        made = made.to(unet.device).eval()
        return made if made.dtype == unet.dtype else made.to(unet.dtype)

    def forward(self, sample: Tensor, timestep: Any, class_labels: Tensor | None = None, return_dict: bool = True) -> Any:
        """As UNet2DModel's."""
        tap = find_tap(self.trunk)
        assert tap is not None
        with tap.reading() as seen:
            out = self.trunk(sample, timestep, class_labels=class_labels, return_dict=False)[0]
        both = torch.cat([out, self.spread(seen.h.contiguous(), seen.emb)], dim=1)
        return UNet2DOutput(sample=both) if return_dict else (both,)


class OptimalCovarianceScheduler(SchedulerMixin, ConfigMixin):
    r"""The reverse kernel with the variance that the head of a `VarianceUNet` predicts; DDPM at eta = 1, DDIM's mean at 0.

    A step is `Hushed(Ancestral(eta, clip))` of this library, on the levels of the scheduler's table.

    Arguments:
        num_train_timesteps: Number of levels; the arguments up to `rescale_betas_zero_snr` are diffusers' own.
        beta_start: First beta.
        beta_end: Last beta.
        beta_schedule: "linear", "scaled_linear", "squaredcos_cap_v2" or "sigmoid".
        trained_betas: The betas themselves.
        prediction_type: "epsilon", "sample" or "v_prediction".
        clip_sample: Whether estimates of x0 are clipped.
        clip_sample_range: To which range.
        timestep_spacing: "leading", "linspace" or "trailing".
        steps_offset: Added to the timesteps of "leading".
        rescale_betas_zero_snr: Whether the last level is pure noise.
        eta: Share of the ancestral noise, 0 to 1.
        grey: Bound on the noise of the last noisy step, in grey levels; 0 for none.
        kind: What the head predicts, see `quieten.covariances.stored.KINDS`.
        link: From its output to the variance, see `quieten.covariance.Learned`.
        block: Side of its blocks, if it predicts cosine coefficients.
        cap: Largest variance of a pixel; None for no bound.

    References:
        | Improving Probabilistic Diffusion Models With Optimal Diagonal Covariance Matching (Ou et al., 2025)
        | https://arxiv.org/abs/2406.10808
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        prediction_type: str = "epsilon",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        eta: float = 1.0,
        grey: float = 2.0,
        kind: str = "ocm",
        link: str = "unit",
        block: int | None = None,
        cap: float | None = 1.0,
    ):
        if prediction_type not in FORMS:
            raise ValueError(f"`prediction_type`={prediction_type!r} is not supported: one of {', '.join(FORMS)}")
        if kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(KINDS)} (got {kind!r})")
        self.init_noise_sigma = 1.0
        self.table = table(self.config)
        self.basis = DCT(block) if block else None
        self.set_timesteps(num_train_timesteps)

    def __len__(self) -> int:
        config: Any = self.config
        return int(config.num_train_timesteps)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample itself: the network takes VP states."""
        return sample

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Chooses the levels of a run of so many steps."""
        config: Any = self.config
        offset = config.steps_offset if config.timestep_spacing == "leading" else 0
        grid = self.table.grid(num_inference_steps, config.timestep_spacing, offset)
        self.num_inference_steps, self.grid = num_inference_steps, grid.tolist()
        self.timesteps = self.table.index(grid[:-1]).round().long().to(device or "cpu")
        self._places = {int(t): i for i, t in enumerate(self.timesteps.tolist())}
        clip = config.clip_sample_range if config.clip_sample else None
        inner = Ancestral(config.eta, clip=clip, keep_eps=config.eta < 1.0)
        self.transition = Hushed(inner, grid, config.grey) if config.grey and num_inference_steps > 1 else inner

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True) -> Any:
        """The next state; arguments and results as of diffusers' DDPMScheduler.

        Raises:
            ValueError: If the network gave no second half of channels, or the timestep is not one of this run's.
        """
        if model_output.shape[1] != 2 * sample.shape[1]:
            raise ValueError(f"`model_output` has {model_output.shape[1]} channels for {sample.shape[1]} of the sample: this "
                             "scheduler needs a VarianceUNet, whose second half is the head's")  # fmt: skip
        place = self._places.get(int(timestep))
        if place is None:
            raise ValueError(f"`timestep` {int(timestep)} is not one of this run's: call set_timesteps, and pass its timesteps")
        taken = self._take(model_output, sample, self.grid[place], self.grid[place + 1])
        state = taken.p.mean
        if self.grid[place + 1] < math.inf and not taken.p.is_point:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=torch.float32)
            state = taken.p.sample(noise)
        state, x0 = state.to(sample.dtype), taken.x0.mean.to(sample.dtype)  # type: ignore[union-attr]
        return DDPMSchedulerOutput(prev_sample=state, pred_original_sample=x0) if return_dict else (state, x0)

    def _take(self, output: Tensor, sample: Tensor, lam_t: float, lam_s: float) -> Step:
        config: Any = self.config
        mean, head = output.float().chunk(2, dim=1)
        source = KINDS[config.kind](lambda x, eps, lam: head, link=config.link, basis=self.basis, cap=config.cap)
        answered = _Answered(mean, FORMS[config.prediction_type])
        return self.transition(WithCovariance(answered, source.to(sample.device)), sample.float(), lam_t, lam_s)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t of clean samples at some timesteps."""
        lam = self.table.at(timesteps.double().cpu()).to(original_samples.device)
        alpha, sigma = VP.scales_over(lam, original_samples)
        return alpha * original_samples + sigma * noise


class _Answered(Denoiser):
    """A denoiser whose network has answered already."""

    process = VP

    def __init__(self, output: Tensor, form: Any):
        super().__init__()
        self.output, self.form = output, form

    def forward(self, x: Tensor, lam: Level, **cond: Any) -> Gaussian:
        alpha, sigma = VP.scales(lam)
        return Gaussian(convert(self.output, x, self.form, "x0", alpha, sigma))


def pipeline_parts(unet: Any, source: Learned, options: Mapping[str, Any]) -> tuple[VarianceUNet, OptimalCovarianceScheduler]:
    """The U-Net and the scheduler of a DDPMPipeline that samples with a fitted variance.

    Arguments:
        unet: The network that it was fitted to.
        source: What `quieten.load_variance` gives.
        options: Of the scheduler: the betas, the prediction type, the clipping, eta and so on.

    Example:
        ::

            unet, scheduler = pipeline_parts(pipeline.unet, source, {**pipeline.scheduler.config})
            DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained("./with-variance")
    """
    known = inspect.signature(OptimalCovarianceScheduler.__init__).parameters
    given = {name: value for name, value in options.items() if name in known}
    if source.cap is not None and source.cap.numel() > 1:
        raise ValueError("`source` bounds each channel by itself, which a scheduler of pixels cannot: fit it with one `cap`")
    scheduler = OptimalCovarianceScheduler(
        **given,
        kind=next(name for name, kind in KINDS.items() if type(source) is kind),
        link=source.link,
        block=source.basis.block if isinstance(source.basis, DCT) else None,
        cap=None if source.cap is None else float(source.cap),
    )
    return VarianceUNet.of(unet, source), scheduler
