r"""Objectives: what a denoiser is trained to minimise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .denoiser import Denoiser, form_coefficients
from .noise import Draws
from .process import Process
from .schedule import Schedule

__all__ = [
    "WEIGHTINGS",
    "Batch",
    "Denoising",
    "Noised",
    "Objective",
    "Regression",
    "Target",
    "Update",
    "dropped",
    "edm_weighting",
    "level_dtype",
    "min_snr",
    "noised_by",
]


class Batch(NamedTuple):
    """Training examples.

    Attributes:
        x0: Clean data (B, *).
        index: Their places in the data set, int64 (B,).
        cond: Conditions by name, each (B, ...).
        refs: What the objective prepared for the whole step, see `Objective.prepare`; None before.
    """

    x0: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    cond: dict[str, Tensor]
    refs: Any = None


class Noised(NamedTuple):
    """One training example of each row: x_t = alpha x0 + sigma eps at log-SNR lam (B,); alpha and sigma broadcast to x0.

    `cond` is what the network is told, after conditions were dropped at random; `draws` is the randomness of the step.
    """

    x0: Tensor
    eps: Tensor
    x_t: Tensor
    lam: Tensor
    alpha: Tensor
    sigma: Tensor
    cond: Mapping[str, Tensor] = {}  # nobody writes into it
    draws: Draws | None = None


class Regression(NamedTuple):
    """What the network regresses on, with x_t = alpha x0 + sigma eps.

    Attributes:
        x0: In place of the clean example (B, *).
        eps: In place of its noise (B, *).
        removed: Expected squared distance from x0 to the example itself (B,): what a loss is lower by; None if they are one.
    """

    x0: Tensor
    eps: Tensor
    removed: Tensor | None = None


Target = Callable[[Noised, Batch], Sequence[Tensor] | Regression]
"""Says what to regress on: a `Regression`, or the pair (x0, eps). May have a method `prepare`, see `Objective.prepare`."""

Weighting = str | Callable[[Tensor], Tensor]


def edm_weighting(sigma_data: float = 0.5) -> Callable[[Tensor], Tensor]:
    """EDM's weight, (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on the squared error of x0 in VE."""
    return lambda lam: 1.0 + torch.exp(-lam) / sigma_data**2


def min_snr(gamma: float = 5.0) -> Callable[[Tensor], Tensor]:
    """min(SNR, gamma) on the squared error of x0.

    References:
        | Efficient Diffusion Training via Min-SNR Weighting Strategy (Hang et al., 2023), eq. 8
        | https://arxiv.org/abs/2303.09556
    """
    return lambda lam: (gamma * torch.exp(-lam)).clamp_max(1.0)


WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "simple": torch.ones_like,
    "x0": lambda lam: torch.exp(-lam),
    "v": lambda lam: 1.0 + torch.exp(-lam),
    "flow": lambda lam: (1.0 + torch.exp(-0.5 * lam)).square(),
    "edm": edm_weighting(),
    "min-snr": min_snr(),
}
"""Weights on the squared error of eps as functions of lam; "likelihood", -d lam/du / 2, needs the schedule and is not here."""


class Objective(nn.Module, ABC):
    """A loss per example. Holds what is learned beside the denoiser."""

    @abstractmethod
    def forward(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Tensor:
        """Losses (B,)."""

    def losses(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """The losses (B,) as "loss", and whatever else is worth averaging and reporting, each (B,)."""
        return {"loss": self(denoiser, batch, draws)}

    def prepare(self, batch: Batch, seed: int, step: int, taken: Tensor, device: torch.device) -> Any:
        """What all parts of a step share: put into the `refs` of each part. None for nothing.

        Arguments:
            batch: All examples of the step that this process has.
            seed: Of the training.
            step: Of the training.
            taken: Numbers of the examples of all processes.
            device: Where the training is.
        """
        return None

    @property
    def ahead(self) -> bool:
        """Whether `prepare` may run in the thread that reads batches."""
        return True


class Denoising(Objective):
    r"""Weighted regression of x0, whatever the network predicts.

    The squared error is taken in the network's own form, where it is well scaled, and multiplied so that it equals
    :math:`w(\lambda) \|\epsilon - \hat\epsilon\|^2`: every parameterisation minimises the same loss.

    Arguments:
        schedule: Levels are schedule(u) for u uniform in (0, 1), of low discrepancy.
        weighting: A name in `WEIGHTINGS`, "likelihood" (the variational bound's, in nats per dimension), or lam -> weight.
        target: What stands for (x0, eps); None is the example itself.
        drop: Conditions to drop at random, name -> (probability, value that means "none"): trains classifier-free guidance.

    Raises:
        ValueError: For an unknown weighting, or a probability outside [0, 1].

    References:
        | Understanding Diffusion Objectives as the ELBO with Simple Data Augmentation (Kingma, Gao, 2023), table 1
        | https://arxiv.org/abs/2303.00848
    """

    def __init__(
        self,
        schedule: Schedule,
        weighting: Weighting = "simple",
        target: Target | None = None,
        drop: Mapping[str, tuple[float, int | float]] | None = None,
    ):
        super().__init__()
        if isinstance(weighting, str) and weighting not in WEIGHTINGS and weighting != "likelihood":
            raise ValueError(
                f"`weighting` must be one of {', '.join([*WEIGHTINGS, 'likelihood'])} or a callable (got {weighting!r})"
            )
        for name, (probability, _) in (drop or {}).items():
            if not 0 <= probability <= 1:
                raise ValueError(f"`drop` probability of {name!r} must lie in [0, 1] (got {probability})")
        self.schedule, self.weighting, self.target, self.drop = schedule, weighting, target, dict(drop or {})

    def forward(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Tensor:
        return self._losses(denoiser, batch, draws)["loss"]

    def losses(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """The loss and, where the target says what it took away, the loss that plain targets would have, "plain_loss"."""
        if type(self).forward is not Denoising.forward:  # a subclass has added to the loss
            return super().losses(denoiser, batch, draws)
        return self._losses(denoiser, batch, draws)

    def prepare(self, batch: Batch, seed: int, step: int, taken: Tensor, device: torch.device) -> Any:
        prepare = getattr(self.target, "prepare", None)
        return None if prepare is None else prepare(batch, seed, step, taken, device)

    @property
    def ahead(self) -> bool:
        return getattr(self.target, "ahead", True)

    def _losses(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        weight, noised = self._noised(denoiser, batch, draws)
        f = denoiser.predict(noised.x_t, noised.lam, getattr(denoiser, "form", "x0"), **noised.cond)
        return self._compared(denoiser, f, weight, noised, batch)

    def _noised(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> tuple[Tensor, Noised]:
        """What the network is shown, and the weights (B,) of its errors of eps."""
        u = self._times(batch.x0, draws)
        if self.weighting == "likelihood":
            lam, rate = self.schedule.rate(u)
            weight = 0.5 * rate
        else:
            lam = self.schedule(u)
            weight = (WEIGHTINGS[self.weighting] if isinstance(self.weighting, str) else self.weighting)(_finite(lam))
        told = dropped(batch.cond, self.drop, draws)
        return weight, noised_by(denoiser.process, batch.x0, lam, draws)._replace(cond=told, draws=draws)

    def _times(self, x0: Tensor, draws: Draws) -> Tensor:
        """u (B,) in (0, 1) of the examples."""
        return self.schedule.draw(draws).to(level_dtype(x0)).to(x0.device)

    def _compared(self, denoiser: Denoiser, f: Tensor, weight: Tensor, noised: Noised, batch: Batch) -> dict[str, Tensor]:
        """The losses of a prediction f (B, *) in the denoiser's own form."""
        p, q = form_coefficients(getattr(denoiser, "form", "x0"), noised.alpha, noised.sigma)
        with torch.no_grad():
            aim = Regression(noised.x0, noised.eps) if self.target is None else Regression(*self.target(noised, batch))
        error = f - (p * aim.eps + q * aim.x0)
        lam = _finite(noised.lam)
        loss = (weight * self._in_eps(denoiser, lam)).to(error) * error.square().flatten(1).mean(1)
        if aim.removed is None:
            return {"loss": loss}
        # E[plain] = E[loss] + E[weight ||eps - its average||^2], the cross term having mean 0; (alpha / sigma)^2 is exp(lam)
        apart = aim.removed * (weight * torch.exp(lam)).detach().to(aim.removed) / max(1, error[:1].numel())
        return {"loss": loss, "plain_loss": loss.detach() + apart.to(loss)}

    def _in_eps(self, denoiser: Denoiser, lam: Tensor) -> Tensor:
        """The factor (B,) from the network's own squared error to that of eps: (alpha / (p alpha - q sigma))^2."""
        alpha, sigma = denoiser.process.scales(lam)
        p, q = form_coefficients(getattr(denoiser, "form", "x0"), alpha, sigma)
        return (alpha / (p * alpha - q * sigma)) ** 2


def dropped(cond: Mapping[str, Tensor], drop: Mapping[str, tuple[float, int | float]], draws: Draws) -> dict[str, Any]:
    """The conditions of a batch, some of them replaced at random: name -> (probability, value that means "none")."""
    out = dict(cond)
    for name, (probability, nothing) in drop.items():
        if name not in out:
            raise ValueError(
                f"`drop` names the condition {name!r}, which the batch does not have (it has {sorted(out) or 'none'})"
            )
        gone = (draws.uniform(f"drop {name}") < probability).to(out[name].device)
        gone = gone.reshape(-1, *[1] * (out[name].ndim - 1))
        out[name] = torch.where(gone, torch.full_like(out[name], nothing), out[name])
    return out


def noised_by(process: Process, x0: Tensor, lam: Tensor, draws: Draws) -> Noised:
    """Training examples at log-SNRs lam (B,)."""
    eps = draws.normal(x0, "eps")
    alpha, sigma = process.scales_over(lam, x0)
    return Noised(x0, eps, alpha * x0 + sigma * eps, lam, alpha, sigma)


def _finite(lam: Tensor) -> Tensor:
    """lam, held where the weight and the factor of the form are at their limits: at -inf their product would be inf * 0."""
    return lam.clamp_min(-60.0)


def level_dtype(x: Tensor) -> torch.dtype:
    """float64, where the device of x has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


class Update(nn.Module):
    """Everything that a training step differentiates: the only module that data parallelism wraps.

    Arguments:
        denoiser: Trained, unless its parameters are frozen.
        objective: Its loss, with what it learns itself (a schedule, an encoder).

    Attributes:
        previews: Whether samples of the denoiser show how far training has come.
    """

    previews = True

    def __init__(self, denoiser: Denoiser, objective: Objective):
        super().__init__()
        self.denoiser, self.objective = denoiser, objective

    def forward(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """The losses of the batch (B,), under "loss", and what else the objective reports."""
        return self.objective.losses(self.denoiser, batch, draws)
