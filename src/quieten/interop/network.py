"""A diffusers model behind the call that `Preconditioned` makes, its conditions under our names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MODELS", "Network"]

MODELS = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel")
"""Class names of the diffusers models that are understood."""


class Network(nn.Module):
    """net(x, t, **cond) -> Tensor around a diffusers model.

    Conditions, each with a first axis of B, in the dtype the model needs; those that a model knows are required, others are
    refused:

    - `label`: class indices (B,) (or what `class_embed_type` takes), for class-conditional models and DiT;
    - `text`: token embeddings (B, length, width), for models with cross-attention;
    - `pooled` (B, width) and `sizes` (B, 6): pooled embedding and (original, crop, target) sizes, for SDXL's U-Net.

    Arguments:
        model: A UNet2DModel, UNet2DConditionModel or DiTTransformer2DModel.
        mean_only: Drop the second half of the output channels.

    Attributes:
        conditions: Names of the required conditions.
        classes: Number of classes of `label`; None without labels, or when they are not indices.
        null_label: The label that stands for no class; None when the model has none of its own.
        whole: The model looks its time up in a list.

    Raises:
        ValueError: For a model whose class or conditioning is not supported.
    """

    def __init__(self, model: nn.Module, mean_only: bool = False):
        super().__init__()
        self.model, self.mean_only = model, mean_only
        self.kind = next((c.__name__ for c in type(model).__mro__ if c.__name__ in MODELS), "")
        if not self.kind:
            raise ValueError(
                f"`source` of class {type(model).__name__} is not supported: a model must be one of {', '.join(MODELS)}"
            )
        config: Any = model.config
        self.classes: int | None = None
        self.null_label: int | None = None
        self.whole = self.kind == "UNet2DModel" and config.time_embedding_type == "learned"
        self.conditions: tuple[str, ...] = ()
        if self.kind == "DiTTransformer2DModel":
            self.classes = config.num_embeds_ada_norm + 1
            self.null_label = config.num_embeds_ada_norm  # the extra row of the label embedding
            self.conditions = ("label",)
        elif getattr(model, "class_embedding", None) is not None:
            self.classes = config.num_class_embeds if config.class_embed_type is None else None
            self.conditions = ("label",)
        if self.kind == "UNet2DConditionModel":
            self.conditions = (*self.conditions, *_text_conditions(config))

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of one state, where the configuration says it."""
        config: Any = self.model.config
        size = config.sample_size
        if size is None:
            return None
        return (config.in_channels, *((size, size) if isinstance(size, int) else size))

    @property
    def doubled(self) -> bool:
        """Whether the model emits twice the channels of a state."""
        config: Any = self.model.config
        out = config.in_channels if config.out_channels is None else config.out_channels
        if out not in (config.in_channels, 2 * config.in_channels):
            raise ValueError(f"`source` has {config.in_channels} channels in and {out} out: only models that take the state "
                             "alone are supported (no inpainting, editing or upscaling)")  # fmt: skip
        return out != config.in_channels

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        for name in cond:
            if name not in self.conditions:
                known = ", ".join(f"`{known}`" for known in self.conditions) or "no conditions"
                raise ValueError(f"unknown condition `{name}`: this {self.kind} takes {known}")
        for name in self.conditions:
            if name not in cond:
                raise ValueError(f"this {self.kind} needs the condition `{name}`: bind it, as in denoiser.bind({name}=...)")
        given = {name: self._prepare(name, value, x) for name, value in cond.items()}
        out: Tensor = self.model(x, t, **_theirs(self.kind, given), return_dict=False)[0]
        return out.chunk(2, dim=1)[0] if self.mean_only else out

    def _prepare(self, name: str, value: Any, x: Tensor) -> Tensor:
        value = torch.as_tensor(value, device=x.device)
        if value.ndim == 0 and name == "label":
            value = value.expand(len(x))
        if value.ndim == 0 or len(value) != len(x):
            raise ValueError(f"condition `{name}` must have a first axis of {len(x)} (got shape {tuple(value.shape)})")
        if name == "label" and self.classes is not None:
            if value.is_floating_point() or value.ndim != 1:
                raise ValueError(
                    f"`label` must be whole numbers of shape ({len(x)},) (got {value.dtype}, {tuple(value.shape)})"
                )
            # Labels on a device are not looked at: the host would have to wait for it.
            if value.device.type == "cpu" and bool(((value < 0) | (value >= self.classes)).any()):
                raise ValueError(f"`label` must lie in [0, {self.classes}) (got {value.tolist()[:8]})")
            return value.long()
        return value if name == "sizes" else value.to(x.dtype)


def _text_conditions(config: Any) -> tuple[str, ...]:
    """Names of the conditions beyond the label that a UNet2DConditionModel needs."""
    if config.addition_embed_type not in (None, "text", "text_time"):
        raise ValueError(f"`addition_embed_type`={config.addition_embed_type!r} is not supported: None, 'text' or 'text_time'")
    if config.encoder_hid_dim_type not in (None, "text_proj"):
        raise ValueError(f"`encoder_hid_dim_type`={config.encoder_hid_dim_type!r} is not supported: None or 'text_proj'")
    if config.addition_embed_type == "text_time":
        return ("text", "pooled", "sizes")
    blocks = (*config.down_block_types, config.mid_block_type, *config.up_block_types)
    attends = any(block is not None and "CrossAttn" in block for block in blocks)
    return ("text",) if attends or config.addition_embed_type else ()


def _theirs(kind: str, given: dict[str, Tensor]) -> dict[str, Any]:
    """Our conditions as the keyword arguments of the model's forward."""
    out: dict[str, Any] = {"class_labels": given["label"]} if "label" in given else {}
    if kind == "UNet2DConditionModel":
        out["encoder_hidden_states"] = given.get("text")
        if "pooled" in given:
            out["added_cond_kwargs"] = {"text_embeds": given["pooled"], "time_ids": given["sizes"]}
    return out
