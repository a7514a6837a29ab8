"""Text to the conditions of text-to-image networks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Prompt"]


class Prompt(nn.Module):
    """Prompts to conditions, with the CLIP text encoders of a pipeline; frozen.

    One encoder (Stable Diffusion) gives `text`, its last hidden states. With `sizes` (SDXL), `text` holds the last hidden
    states but one of all encoders side by side, `pooled` is the projected embedding of the last encoder, and `sizes` is
    repeated for each prompt.

    Arguments:
        encoders: (tokenizer, CLIP text model) pairs.
        sizes: (height, width, top, left, height, width) of SDXL, in pixels; None without.

    Example:
        ``denoiser.bind(**pretrained.prompt(["a red square", "two dogs"]))``
    """

    def __init__(self, encoders: Sequence[tuple[Any, nn.Module]], sizes: Sequence[int] | None = None):
        super().__init__()
        self.tokenizers = [tokenizer for tokenizer, _ in encoders]
        self.encoders = nn.ModuleList(model.requires_grad_(False).eval() for _, model in encoders)
        self.sizes = None if sizes is None else tuple(sizes)

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The conditions of n prompts, each with a first axis of n.

        Warns when a prompt is longer than the encoder can read.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if self.sizes is None:
            return {"text": self._run(0, prompts)[0]}
        outputs = [self._run(i, prompts) for i in range(len(self.encoders))]
        text = torch.cat([out.hidden_states[-2] for out in outputs], dim=-1)
        sizes = torch.tensor([self.sizes] * len(prompts), dtype=text.dtype, device=text.device)
        return {"text": text, "pooled": outputs[-1][0], "sizes": sizes}

    def _run(self, i: int, prompts: list[str]) -> Any:
        tokenizer, model = self.tokenizers[i], self.encoders[i]
        length = tokenizer.model_max_length
        tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        for prompt, ids in zip(prompts, tokenizer(prompts)["input_ids"], strict=True):
            if len(ids) > length:
                warnings.warn(f"a prompt of {len(ids)} tokens is cut to {length}: {prompt[:40]!r}...", stacklevel=4)
        config: Any = model.config
        device = next(model.parameters()).device
        mask = tokens.attention_mask.to(device) if getattr(config, "use_attention_mask", False) else None
        return model(tokens.input_ids.to(device), attention_mask=mask, output_hidden_states=True)
