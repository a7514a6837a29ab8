r"""Log-likelihoods to guide with: a classifier, the likeness to a text or an image, an energy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..guidance import Likelihood, Scale
from ..process import Level, Process

__all__ = ["Classified", "Energy", "Similarity"]


class Classified(Likelihood):
    r"""Guidance towards a class: the gradient of w log softmax(classifier(x_t, lam))[label].

    Arguments:
        classifier: (x, lam) -> logits (B, classes), trained on noisy data, as `classify.NoisyClassifier`; one that has an
            attribute `process` is called as (x, lam, process) and may come from another process than the denoiser.
        label: The class: a number for all samples, or int64 (B,) with one each.
        scale: The weight w; 1 to 10 is usual.
        on: "x_t", or "x0" for a classifier of clean images, called as (x0, lam) on the denoiser's estimate, through which
            the gradient then goes.
        nonfinite: As in `Guidance`.

    References:
        | Diffusion Models Beat GANs on Image Synthesis (Dhariwal, Nichol, 2021), algorithm 2
        | https://arxiv.org/abs/2105.05233
    """

    def __init__(
        self,
        classifier: Callable[..., Tensor],
        label: int | Tensor,
        scale: Scale = 1.0,
        on: str = "x_t",
        nonfinite: str = "raise",
    ):
        super().__init__(classifier, scale, on, nonfinite)
        label = torch.as_tensor(label)
        if label.is_floating_point() or label.dtype == torch.bool or label.ndim > 1:
            raise ValueError(f"`label` must be a class number or int64 (B,) (got {label.dtype}, {tuple(label.shape)})")
        self.register_buffer("label", label.clone().long(), persistent=False)

    label: Tensor

    def value(self, x: Tensor, lam: Level, process: Process) -> Tensor:
        if self.label.ndim and len(self.label) != len(x):
            raise ValueError(f"`label` has {len(self.label)} rows for {len(x)} samples: give one each, or a number for all")
        told = self.on == "x_t" and hasattr(self.log_prob, "process")
        logits: Any = self.log_prob(x, lam, process) if told else self.log_prob(x, lam)  # type: ignore[call-arg]
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"the classifier must return logits ({len(x)}, classes) (got {got})")
        label = self.label.to(logits.device).expand(len(x))
        if label.device.type == "cpu" and len(x) and not 0 <= int(label.min()) <= int(label.max()) < logits.shape[1]:
            raise ValueError(f"`label` must be in 0..{logits.shape[1] - 1} (got {int(label.min())}..{int(label.max())})")
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return wide.log_softmax(1).gather(1, label[:, None])[:, 0]


class Similarity(Likelihood):
    r"""Guidance towards a text, an image, or anything that an encoder maps to the same space as images.

    "dot" is <f(x), target>, the form of noised CLIP; "spherical" is -2 arcsin^2(|u - v| / 2) of the unit vectors u, v of
    both, minus half of the squared angle.

    Arguments:
        encoder: (x, lam) -> (B, F) for on="x_t", an encoder of noisy images; x0 -> (B, F) for on="x0", an ordinary one.
        target: What to resemble, encoded: (F,) for all samples, or (B, F).
        scale: As in `Guidance`.
        distance: "dot" or "spherical".
        on: As in `Likelihood`; latent models decode inside their encoder.
        nonfinite: As in `Guidance`.

    References:
        | GLIDE (Nichol et al., 2021), section 2.4
        | https://arxiv.org/abs/2112.10741
    """

    def __init__(
        self,
        encoder: Callable[..., Tensor],
        target: Tensor,
        scale: Scale = 1.0,
        distance: str = "dot",
        on: str = "x_t",
        nonfinite: str = "raise",
    ):
        super().__init__(encoder, scale, on, nonfinite)
        if distance not in ("dot", "spherical"):
            raise ValueError(f"`distance` must be 'dot' or 'spherical' (got {distance!r})")
        if target.ndim not in (1, 2) or not target.is_floating_point() or not bool(target.isfinite().all()):
            raise ValueError(f"`target` must be finite, (F,) or (B, F) (got {target.dtype}, {tuple(target.shape)})")
        self.register_buffer("target", target.detach().clone(), persistent=False)
        self.distance = distance

    target: Tensor

    def value(self, x: Tensor, lam: Level, process: Process) -> Tensor:
        code = self.log_prob(x, lam) if self.on == "x_t" else self.log_prob(x)  # type: ignore[call-arg]
        if code.ndim != 2 or len(code) != len(x) or self.target.shape[-1] != code.shape[1]:
            raise ValueError(
                f"the encoder must return ({len(x)}, {self.target.shape[-1]}), like `target` (got {tuple(code.shape)})"
            )
        if self.target.ndim == 2 and len(self.target) != len(x):
            raise ValueError(f"`target` has {len(self.target)} rows for {len(x)} samples: give one each, or one for all")
        code = code.to(torch.promote_types(code.dtype, torch.float32))
        target = self.target.to(code)
        if self.distance == "dot":
            return (code * target).sum(1)
        u, v = nn.functional.normalize(code, dim=1), nn.functional.normalize(target, dim=-1)
        # arcsine has no slope at 1, where the two are opposite
        half = ((u - v).norm(dim=1) / 2).clamp_max(1.0 - 1e-6)
        return -2.0 * half.arcsin().square()


class Energy(Likelihood):
    """Guidance to low energy: log p = -energy, so the gradient is -w grad energy; a reward is an energy with its sign turned.

    Arguments:
        energy: (x, lam) -> (B,), a value or energy network of noisy states; x0 -> (B,) for on="x0".
        scale: The weight w, an inverse temperature.
        on: As in `Likelihood`.
        nonfinite: As in `Guidance`.
    """

    def __init__(self, energy: Callable[..., Tensor], scale: Scale = 1.0, on: str = "x_t", nonfinite: str = "raise"):
        super().__init__(energy, scale, on, nonfinite)

    def value(self, x: Tensor, lam: Level, process: Process) -> Tensor:
        out: Any = self.log_prob(x, lam) if self.on == "x_t" else self.log_prob(x)  # type: ignore[call-arg]
        return -out if isinstance(out, Tensor) else out
