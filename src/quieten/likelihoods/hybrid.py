r"""The hybrid loss of Improved DDPM: denoising for the mean, the variational bound for the range of the variance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..denoiser import Denoiser, Preconditioned
from ..encoding.encoded import Encoded
from ..gaussian import Gaussian
from ..noise import Draws
from ..objective import Batch, Denoising, Target, Weighting
from ..schedule import Schedule, Table
from .bound import check_falling, spread_kl

__all__ = ["Hybrid", "in_hybrid"]


class Hybrid(Denoising):
    r"""L_simple + weight L_vlb, for networks with `learned_range`: the denoising loss trains the mean, the bound the variance.

    .. math:: L = L_\mathrm{simple} + w \, T \, \mathrm{KL}\left(q(x_s \mid x_t, x_0) \,\|\, p(x_s \mid x_t)\right) / (D \ln 2)

    from s = max(t - 1/T, 0) to t, where t are the times of the denoising loss. The kernel is that of `Ancestral(range=True)`,
    which is how to sample. Its mean is a constant in the second term (a stopped gradient), so that the first half of the
    channels learns what `Denoising` alone would teach it. One call of the network serves both.

    Arguments:
        schedule: As in `Denoising`, with finite ends.
        weighting: Of the denoising loss, as there; "simple" is L_simple.
        target: As there, of the denoising loss; the variance is learned from the examples themselves.
        drop: As there, for both.
        steps: T; None is from entry to entry of a `Table`, 1,000 for another schedule.
        weight: Of L_vlb, which is in bits per dimension.

    Raises:
        ValueError: For a schedule without finite ends, `steps` below 1, a negative `weight`, and what `Denoising` refuses.

    References:
        | Improved Denoising Diffusion Probabilistic Models (Nichol, Dhariwal, 2021), eq. 15 and 16
        | https://arxiv.org/abs/2102.09672
    """

    def __init__(
        self,
        schedule: Schedule,
        weighting: Weighting = "simple",
        target: Target | None = None,
        drop: Mapping[str, tuple[float, int | float]] | None = None,
        *,
        steps: int | None = None,
        weight: float = 1e-3,
    ):
        super().__init__(schedule, weighting, target, drop)
        if steps is not None and steps < 1:
            raise ValueError(f"`steps` must be at least 1, or None for the schedule's own (got {steps})")
        if not 0 <= weight < math.inf:
            raise ValueError(f"`weight` of the variational bound must be finite and not negative (got {weight}): 1e-3 is usual")
        check_falling(schedule)
        self.steps = steps or (len(schedule) - 1 if isinstance(schedule, Table) else 1000)
        self.weight = weight

    def forward(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Tensor:
        return self.losses(denoiser, batch, draws)["loss"]

    def losses(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """The loss and its parts "simple" and "vlb", each (B,), and "plain_loss" as `Denoising` has it.

        Raises:
            ValueError: For a denoiser without `learned_range`, or of encoded data.
        """
        if not isinstance(denoiser, Preconditioned) or not denoiser.learned_range or isinstance(denoiser.process, Encoded):
            raise ValueError("`Hybrid` trains the range of a variance, which this denoiser does not predict: give it a network "
                             "with twice the channels and `learned_range=True`, or take `Denoising`")  # fmt: skip
        weight, noised = self._noised(denoiser, batch, draws)
        f, p = denoiser.both(noised.x_t, noised.lam, **noised.cond)
        out = self._compared(denoiser, f, weight, noised, batch)
        lam_s = self.schedule((self._times(batch.x0, draws) - 1.0 / self.steps).clamp_min(0.0))
        kl = spread_kl(denoiser, Gaussian(p.mean.detach(), p.var), batch.x0, noised.lam, lam_s)
        vlb = kl * (self.steps / (math.log(2.0) * max(1, math.prod(batch.x0.shape[1:]))))
        added = self.weight * vlb
        if "plain_loss" in out:
            out["plain_loss"] = out["plain_loss"] + added.detach()
        return out | {"loss": out["loss"] + added, "simple": out["loss"].detach(), "vlb": vlb.detach()}


def in_hybrid(count: int | None = None, weight: float = 1e-3) -> dict[str, Any]:
    """The options of the hybrid loss, for recipes: the number of steps, and the weight of the bound."""
    return {"steps": count, "weight": weight}
