"""Pretrained models of Hugging Face diffusers as denoisers.

Only safetensors weights are read, and no code from a repository is run: components are loaded one by one, by classes of
diffusers and transformers named here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Preconditioned
from ..schedule import Schedule
from ..wrap import Clip
from .codec import AUTOENCODERS, Codec
from .hub import FETCH, Source, first_line
from .levels import SCHEDULERS, Levels, read_levels
from .network import MODELS, Network
from .prompt import Prompt

__all__ = ["PIPELINES", "Pretrained", "from_diffusers"]

PIPELINES = (
    "DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "LDMPipeline", "DiTPipeline", "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
)  # fmt: skip
"""Class names of the diffusers pipelines that are understood. Any model with a scheduler can be given on its own."""

OURS = "quieten.interop.optimal"
"""Where the U-Net of a denoiser with a variance comes from; its network is read here, the variance is a file beside it."""

SHARED = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type", "clip_sample",
    "clip_sample_range", "timestep_spacing", "steps_offset", "rescale_betas_zero_snr",
)  # fmt: skip
"""What our OptimalCovarianceScheduler has of diffusers' DDPMScheduler."""

_HUB = (*FETCH, "variant", "torch_dtype")
_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model, with what is needed to sample from it.

    Attributes:
        denoiser: In evaluation mode; its conditions are `denoiser.net.conditions`, among `label`, `text`, `pooled`, `sizes`.
            Its `shape` is that of the configuration: set another, or None, for images of another size.
        levels: How it was trained; `levels.schedule` is a `Table`, `Rectified` or `LogNormal`.
        codec: Between images and latents; None for a model of pixels.
        prompt: list of n texts -> conditions with a first axis of n; None without text.
        null: The conditions that stand for none, for `Extrapolated(denoiser, scale, null=null)`; empty when the model has
            none of its own.

    Example:
        ::

            pretrained = from_diffusers("stabilityai/sd-turbo")
            guided = Extrapolated(pretrained.denoiser, 4.0, null=pretrained.null)
            cond = pretrained.prompt(["a lighthouse at dawn"] * 4)
            z = generate(guided, 4, grid=pretrained.grid(20), transition=Exponential(2), cond=cond)
            images = pretrained.codec.decode(z)
    """

    denoiser: Preconditioned
    levels: Levels
    codec: Codec | None = None
    prompt: Callable[[list[str]], dict[str, Tensor]] | None = None
    null: Mapping[str, Any] = field(default_factory=dict)

    @property
    def schedule(self) -> Schedule:
        """The levels the model was trained on."""
        return self.levels.schedule

    @property
    def clip(self) -> Clip | None:
        """The clipping of x0 that the model's own scheduler asks for, as `Ancestral(clip=..., keep_eps=True)` takes it."""
        return self.levels.clip

    @property
    def classes(self) -> int | None:
        """Number of labels, the null label among them; None without."""
        net: Any = self.denoiser.net
        classes: int | None = net.classes
        return classes

    def grid(self, steps: int, spacing: str | None = None) -> Tensor:
        """Log-SNRs to sample on: float64 (steps + 1,), from noise to +inf.

        Arguments:
            steps: Number of steps.
            spacing: One of the spacings of the schedule's `grid`, or "karras" or "exponential"; None is what the model's own
                scheduler visits (flow matching: even steps of sigma before the shift, ending at the data).

        Raises:
            ValueError: For a spacing that the schedule does not have.
        """
        return self.levels.grid(steps, spacing)


@dataclass
class _Parts:
    """The components of a pipeline that matter here, and `config`, the complete configuration of its scheduler.

    `zero_null`: whether no prompt is zeros in the conditions, not the encoding of an empty text.
    """

    model: nn.Module
    config: Mapping[str, Any]
    vae: nn.Module | None = None
    encoders: list[tuple[Any, nn.Module]] = field(default_factory=list)
    zero_null: bool = False


def from_diffusers(
    source: str | Path | Any,
    *,
    subfolder: str | None = None,
    scheduler: Any = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    **hub: Any,
) -> Pretrained:
    """Loads a diffusers pipeline or model as a denoiser.

    Arguments:
        source: A local folder, a hub id, a pipeline object, or a model object (with `scheduler`).
        subfolder: Folder within the source.
        scheduler: What the network was trained with, when the source does not say, or instead of what it says: a scheduler
            object, or its configuration as a mapping with "_class_name". What is not given has diffusers' defaults.
        device: Where to put everything; None leaves objects where they are and loads to the CPU.
        autocast: Lower precision for the network, such as torch.bfloat16.
        **hub: revision, token, cache_dir, local_files_only, force_download, variant, and torch_dtype (of the network).

    Raises:
        ValueError: If the source is not there, is of a class that is not supported, has no safetensors weights, or predicts
            something unknown.
        ImportError: Without diffusers (and transformers, for text).
    """
    unknown = sorted(set(hub) - set(_HUB))
    if unknown:
        raise ValueError(f"unknown argument `{unknown[0]}`: from_diffusers takes {', '.join(_HUB)} for the hub")
    _need("diffusers")
    if isinstance(source, str | Path):
        parts = _load(Source(source, subfolder, hub), scheduler)
    else:
        if subfolder or hub:
            raise ValueError(f"`{'subfolder' if subfolder else next(iter(hub))}` is for folders and hub ids, not for objects")
        parts = _take(source, scheduler)
    return _assemble(parts, device, autocast)


def _assemble(parts: _Parts, device: torch.device | str | None, autocast: torch.dtype | None) -> Pretrained:
    net = Network(parts.model)
    levels = read_levels(parts.config, whole=net.whole)
    doubled = net.doubled
    if doubled and levels.learned:
        warnings.warn("the network's own log-variance (`variance_type`='learned') is left out: it belongs to the steps of its "
                      "table alone", stacklevel=3)  # fmt: skip
        net.mean_only = True
    denoiser = Preconditioned(
        net,
        levels.process,
        levels.form,
        levels.embed,
        sigma_data=levels.sigma_data,
        learned_range=doubled and not levels.learned,
        autocast=autocast,
        shape=net.shape,
    )
    codec = None if parts.vae is None else Codec(parts.vae)
    prompt = _prompt(parts, net) if parts.encoders else None
    for module in (denoiser, codec, prompt):
        if module is not None and device is not None:
            module.to(device)
    null: dict[str, Any] = {}
    if net.null_label is not None:
        null = {"label": net.null_label}
    elif prompt is not None:
        null = {"text": 0.0, "pooled": 0.0} if parts.zero_null else prompt([""])
    denoiser.eval()
    return Pretrained(denoiser, levels, codec, prompt, null)


def _prompt(parts: _Parts, net: Network) -> Prompt:
    if "sizes" not in net.conditions:
        return Prompt(parts.encoders[:1])
    vae: Any = parts.vae
    factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
    _, height, width = (0, 128, 128) if net.shape is None else net.shape
    size = (height * factor, width * factor)
    return Prompt(parts.encoders, (*size, 0, 0, *size))


# Objects


def _take(source: Any, scheduler: Any) -> _Parts:
    """The parts of a pipeline or model object."""
    names = [c.__name__ for c in type(source).__mro__]
    if any(name in MODELS for name in names):
        if scheduler is None:
            raise ValueError("`scheduler` is needed with a model object: it says what the network was trained to predict")
        return _Parts(source, _config(scheduler))
    kind = next((name for name in names if name in PIPELINES), None)
    if kind is None:
        raise ValueError(f"`source` of class {type(source).__name__} is not supported: {_SUPPORTED}")
    parts: Mapping[str, Any] = source.components
    model = parts.get("unet", parts.get("transformer"))
    encoders = [
        (parts[f"tokenizer{n}"], parts[f"text_encoder{n}"]) for n in ("", "_2") if parts.get(f"text_encoder{n}") is not None
    ]
    zero = kind == "StableDiffusionXLPipeline" and bool(source.config.get("force_zeros_for_empty_prompt", True))
    vae = parts.get("vae", parts.get("vqvae"))
    return _Parts(model, _config(parts["scheduler"] if scheduler is None else scheduler), vae, encoders, zero)


def _config(scheduler: Any) -> Mapping[str, Any]:
    """The complete configuration of a scheduler, from an object or from a mapping with "_class_name"."""
    import diffusers

    if not isinstance(scheduler, Mapping):
        if not hasattr(scheduler, "config"):
            raise ValueError(f"`scheduler` must be a diffusers scheduler or a mapping (got {type(scheduler).__name__})")
        return {**scheduler.config, "_class_name": type(scheduler).__name__}
    name = scheduler.get("_class_name")
    if name not in SCHEDULERS:
        raise ValueError(f"`scheduler` of class {name} is not supported: one of {', '.join(SCHEDULERS)}")
    try:
        made = getattr(diffusers, name).from_config(dict(scheduler))
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(f"`scheduler`: {name} refuses its configuration: {first_line(error)}") from error
    return {**made.config, "_class_name": name}


# Folders and the hub


def _load(source: Source, scheduler: Any) -> _Parts:
    """The parts of a folder or repository."""
    import diffusers

    index = source.json("model_index.json")
    if index is None:
        return _load_model(source, scheduler)
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise ValueError(f"`source` {source.name} is a {kind}, which is not supported: {_SUPPORTED}")
    name = "transformer" if kind == "DiTPipeline" else "unet"
    if index.get(name) == [OURS, "VarianceUNet"]:
        from .optimal import VarianceUNet

        return _Parts(source.model(VarianceUNet, name).trunk, _scheduler(source, index, scheduler))  # type: ignore[arg-type]
    model = source.model(getattr(diffusers, _class(source, index, name, "diffusers", MODELS)), name)
    config = _scheduler(source, index, scheduler)
    if kind == "StableDiffusionPipeline":  # as that pipeline corrects outdated configurations
        config = {**config, "clip_sample": False} | ({"steps_offset": 1} if "steps_offset" in config else {})
    parts = _Parts(model, config)
    for vae in ("vae", "vqvae"):
        if index.get(vae, [None])[0] is not None:
            parts.vae = source.model(getattr(diffusers, _class(source, index, vae, "diffusers", AUTOENCODERS)), vae, plain=True)
    if kind.startswith("StableDiffusion"):
        parts.encoders = _text(source, index)
        parts.zero_null = kind == "StableDiffusionXLPipeline" and bool(index.get("force_zeros_for_empty_prompt", True))
    return parts


def _load_model(source: Source, scheduler: Any) -> _Parts:
    """The parts of a folder that holds a single model."""
    import diffusers

    config = source.json("config.json")
    if config is None:
        where = f"{source.name}/{source.inner}" if source.inner else source.name
        raise ValueError(f"`source` {where} has neither model_index.json nor config.json: it is no diffusers pipeline or model")
    if config.get("_class_name") not in MODELS:
        raise ValueError(f"`source` {source.name} holds a {config.get('_class_name')}, which is not supported: {_SUPPORTED}")
    if scheduler is None:
        raise ValueError("`scheduler` is needed with a single model: it says what the network was trained to predict")
    return _Parts(source.model(getattr(diffusers, config["_class_name"]), ""), _config(scheduler))


def _scheduler(source: Source, index: Mapping[str, Any], scheduler: Any) -> Mapping[str, Any]:
    if scheduler is not None:
        return _config(scheduler)
    config = source.json("scheduler/scheduler_config.json")
    if config is None:
        raise ValueError(f"`source` {source.name} has no scheduler/scheduler_config.json: give `scheduler`")
    if index.get("scheduler") == [OURS, "OptimalCovarianceScheduler"]:
        return _config({key: config[key] for key in SHARED if key in config} | {"_class_name": "DDPMScheduler"})
    return _config({**config, "_class_name": _class(source, index, "scheduler", "diffusers", SCHEDULERS)})


def _text(source: Source, index: Mapping[str, Any]) -> list[tuple[Any, nn.Module]]:
    """The tokenizers and text encoders of a pipeline."""
    _need("transformers")
    import transformers

    dtype = {"dtype": source.hub["torch_dtype"]} if "torch_dtype" in source.hub else {}
    pairs = []
    for n in ("", "_2"):
        if index.get(f"text_encoder{n}", [None])[0] is None:
            continue
        encoder = getattr(transformers, _class(source, index, f"text_encoder{n}", "transformers", _ENCODERS))
        tokenizer = getattr(transformers, _class(source, index, f"tokenizer{n}", "transformers", _TOKENIZERS))
        options = {"variant": source.hub["variant"]} if "variant" in source.hub else {}
        model = source.component(
            encoder, f"text_encoder{n}", use_safetensors=True, output_loading_info=True, **options, **dtype
        )
        pairs.append((source.component(tokenizer, f"tokenizer{n}"), model.eval()))
    return pairs


def _class(source: Source, index: Mapping[str, Any], name: str, library: str, known: tuple[str, ...]) -> str:
    """The class name of a component, if it is one of a library's that are known."""
    entry = index.get(name)
    if not isinstance(entry, list) or len(entry) != 2 or entry[0] != library or entry[1] not in known:
        got = ".".join(map(str, entry)) if isinstance(entry, list) else entry
        raise ValueError(f"`source` {source.name}: its {name} is {got}, which is not supported: {library} {', '.join(known)}")
    return str(entry[1])


_SUPPORTED = (
    f"pipelines {', '.join(PIPELINES)}, or a model on its own ({', '.join(MODELS)}) with `scheduler`, as in "
    "from_diffusers(pipeline.unet, scheduler=pipeline.scheduler)"
)


def _need(package: str) -> None:
    try:
        __import__(package)
    except ImportError as error:
        raise ImportError(f"{package} is needed to read diffusers models: pip install 'quieten[diffusers]'") from error
