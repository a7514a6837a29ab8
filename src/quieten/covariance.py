r"""Where the variance of x0 given x_t comes from.

What every source here knows, or learns, is the relative posterior variance

.. math:: \rho = (\alpha^2 / \sigma^2)\, \mathrm{Var}[x_0 | x_t] = \mathrm{Var}[\epsilon | x_t]
    = 1 + \sigma^2 \,\mathrm{diag}\, \nabla^2 \log q_t = \alpha\, \mathrm{diag}\, \partial E[x_0 | x_t] / \partial x_t

which is 1 near the data whatever they are, in every process; the variance is exp(-lam) rho.

References:
    | Improving Probabilistic Diffusion Models With Optimal Diagonal Covariance Matching (Ou et al., 2025)
    | https://arxiv.org/abs/2406.10808
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .basis import DCT
from .covariances.heads import Seen, tap_of
from .denoiser import Denoiser
from .gaussian import Basis, Gaussian, scalar, spread_over
from .process import Level

__all__ = [
    "Analytic",
    "Fisher",
    "HessianDiagonal",
    "Learned",
    "Residual",
    "SecondMoment",
    "Source",
    "Unit",
    "VarianceSource",
    "noise_of",
    "over_snr",
]

Source = Callable[[Denoiser, Tensor, Level, Gaussian], Tensor]
"""(denoiser, x_t, lam, its Gaussian) -> variance of x0 given x_t, of a shape that broadcasts to x_t. A source may also have a
`basis` in which that variance is diagonal, and a method `gaussian(denoiser, x_t, lam)` that gives mean and variance at once."""


class Unit:
    """The posterior variance of data N(0, 1): sigmoid(-lam). In VP it makes the kernel of DDPM with large variance."""

    def __call__(self, denoiser: Denoiser, x: Tensor, lam: Level, p: Gaussian) -> Tensor:
        if isinstance(lam, float):
            return scalar(float(torch.sigmoid(torch.tensor(-lam, dtype=torch.float64))))
        return spread_over(torch.sigmoid(-lam), x)

    def __repr__(self) -> str:
        return "Unit()"


class Clamped(NamedTuple):
    """How many of the variances that a source gave had to be bounded: shares of all, since they were last counted."""

    below: float
    above: float
    total: int


class VarianceSource(nn.Module, ABC):
    r"""A source that estimates rho, and the bounds that hold for its answer whatever the estimate is.

    Arguments:
        cap: Largest variance of x0 in a pixel: 1 for data in [-1, 1], a tensor (C, 1, 1) for the channels of latents; None for
            no bound. In another basis than pixels it becomes the bound that follows for each coefficient.
        average: Take the mean over all but the batch first: an isotropic variance for each example.
        raw: Leave negative and too large variances as they are (official code does when it does not clip).
        basis: Orthonormal map in which the variance is diagonal; None for pixels.

    Attributes:
        clamped: See `Clamped`; `clear()` starts counting afresh.
    """

    basis: Basis | None
    cap: Tensor | None
    counts: Tensor

    def __init__(
        self,
        *,
        cap: Tensor | float | None = None,
        average: bool = False,
        raw: bool = False,
        basis: Basis | None = None,
    ):
        super().__init__()
        if cap is not None and not (torch.as_tensor(cap) > 0).all():
            raise ValueError(f"`cap` must be positive (got {cap}): the largest variance of a pixel, 1 for data in [-1, 1]")
        self.register_buffer("cap", None if cap is None else torch.as_tensor(cap, dtype=torch.float32), persistent=False)
        self.average, self.raw, self.basis = average, raw, basis
        self.register_buffer("counts", torch.zeros(3, dtype=torch.int64), persistent=False)

    @abstractmethod
    def rho(self, denoiser: Denoiser, x: Tensor, lam: Level, p: Gaussian) -> Tensor:
        """The estimate of rho, in coordinates of `basis`; broadcasts to x (B, *). Not bounded."""

    def forward(self, denoiser: Denoiser, x: Tensor, lam: Level, p: Gaussian) -> Tensor:
        """Variance of x0 given x_t, within its bounds.

        Arguments:
            denoiser: Conditions bound.
            x: States (B, *).
            lam: Their log-SNR.
            p: What the denoiser said about them.

        Raises:
            ValueError: If the estimate is NaN, or the level is pure noise, where rho is 0 and says nothing.
        """
        return self.bounded(over_snr(self.rho(denoiser, x, lam, p), lam, x), x)

    def bounded(self, var: Tensor, x: Tensor) -> Tensor:
        """The variance within its bounds, counting what had to be moved."""
        if self.average:
            var = var.expand_as(x).mean(dim=tuple(range(1, x.ndim)), keepdim=True)
        if self.raw:
            return var
        cap = None if self.cap is None else self._cap(var, x)
        below = (var < 0).sum()
        above = (var > cap).sum() if cap is not None else below.new_zeros(())
        moved = torch.stack([below, above, torch.full_like(below, var.numel())])
        self.counts = self.counts.to(moved.device) + moved  # a source that was not moved follows the states
        # only the CPU is looked at, since a device would have to be waited for; `generate` looks at the samples anyway
        if var.device.type == "cpu" and bool(var.isnan().any()):
            raise ValueError(f"the variance of {type(self).__name__} is NaN: look at its head's training, or fit it again")
        return var.clamp(min=torch.zeros((), dtype=var.dtype, device=var.device), max=cap)

    def _cap(self, var: Tensor, x: Tensor) -> Tensor:
        assert self.cap is not None
        cap = self.cap.to(var)
        if self.average or self.basis is None:  # the mean of a spectrum is that of the pixels
            return cap.amax() if self.average else cap
        return self.basis.largest(cap, x).to(var) if isinstance(self.basis, DCT) else cap * math.prod(x.shape[1:])

    @property
    def clamped(self) -> Clamped:
        below, above, total = self.counts.tolist()
        return Clamped(below / max(total, 1), above / max(total, 1), total)

    def clear(self) -> None:
        """Starts counting afresh."""
        self.counts.zero_()

    def coordinates(self, x: Tensor) -> Tensor:
        """x (B, *) in the basis."""
        return x if self.basis is None else self.basis.forward(x)

    def pixels(self, c: Tensor) -> Tensor:
        """Coordinates (B, *) of the basis as pixels."""
        return c if self.basis is None else self.basis.inverse(c)

    def extra_repr(self) -> str:
        basis = "" if self.basis is None else f", basis={self.basis}"
        return f"cap={None if self.cap is None else self.cap.flatten().tolist()}, average={self.average}{basis}"


def over_snr(rho: Tensor, lam: Level, x: Tensor) -> Tensor:
    """(sigma^2 / alpha^2) rho = exp(-lam) rho, for states x (B, *).

    Raises:
        ValueError: At lam = -inf, where rho is 0 whatever the variance is.
    """
    if isinstance(lam, float):
        if lam == -math.inf:
            raise ValueError("`lam` = -inf is pure noise, where rho is 0 and the variance does not follow from it: start from "
                             "a finite level, or use a head with link='unit'")  # fmt: skip
        return rho * math.exp(-lam)
    return rho * spread_over(torch.exp(-lam), x)


def noise_of(p: Gaussian, x: Tensor, lam: Level, denoiser: Denoiser) -> Tensor:
    """The noise (x - alpha E[x0]) / sigma that an estimate of x0 means; 0 at lam = +inf, where there is none."""
    alpha, sigma = denoiser.process.scales_over(lam, x)
    if isinstance(sigma, Tensor):
        return torch.where(sigma > 0, (x - alpha * p.mean) / sigma, 0.0)
    return (x - alpha * p.mean) / sigma if sigma else torch.zeros_like(x)


class Fisher(VarianceSource):
    """rho = 1 - eps^2 of the predicted noise, pixel by pixel: right on average over x_t, crude at each.

    Official code takes this path for "optimal" covariance when neither a head nor a table of Analytic-DPM is there.
    """

    def rho(self, denoiser: Denoiser, x: Tensor, lam: Level, p: Gaussian) -> Tensor:
        return 1.0 - self.coordinates(noise_of(p, x, lam, denoiser)).square()


class Analytic(VarianceSource):
    r"""One variance for each level, rho = 1 - m with m the mean square of the predicted noise: Analytic-DPM.

    Between its levels the ratio of rho to that of N(0, 1) data, sigmoid(lam), is interpolated in lam; beyond them it is held.
    `analytic` measures the table on data.

    Arguments:
        lam: Levels (N,), in any order.
        m: Mean square of the predicted noise per pixel (N,), in theory at most 1.
        error: Standard error of `m` (N,), for the record; None for none.
        **bounds: As in `VarianceSource`.

    Raises:
        ValueError: For tables of unequal lengths, or values that are not finite.

    References:
        | Analytic-DPM (Bao et al., 2022), eq. 8: m = sigma_t^2 Gamma_t
        | https://arxiv.org/abs/2201.06503
    """

    lam: Tensor
    m: Tensor
    error: Tensor

    def __init__(self, lam: Tensor, m: Tensor, error: Tensor | None = None, **bounds: Any):
        super().__init__(**bounds)
        lam, m = torch.as_tensor(lam).double(), torch.as_tensor(m).double()
        error = torch.zeros_like(m) if error is None else torch.as_tensor(error).double()
        if lam.ndim != 1 or m.shape != lam.shape or error.shape != lam.shape or not len(lam):
            raise ValueError(f"`lam`, `m` and `error` must be vectors of one length (got {tuple(lam.shape)}, {tuple(m.shape)}, "
                             f"{tuple(error.shape)}): one value for each level")  # fmt: skip
        if not (lam.isfinite() & m.isfinite()).all():
            raise ValueError("`lam` and `m` must be finite: leave out levels of pure noise or data")
        order = lam.argsort()
        for name, value in (("lam", lam), ("m", m), ("error", error)):
            self.register_buffer(name, value[order])

    def rho(self, denoiser: Denoiser, x: Tensor, lam: Level, p: Gaussian) -> Tensor:
        at = torch.as_tensor(lam, dtype=torch.float64, device=self.lam.device)
        return spread_over(self._ratio(at) * torch.sigmoid(at), x)

    def _ratio(self, at: Tensor) -> Tensor:
        """rho / sigmoid(lam) at levels of any shape, linear between the table's."""
        ratio = (1.0 - self.m) / torch.sigmoid(self.lam)
        if len(ratio) == 1:
            return ratio[0].expand(at.shape)
        high = torch.searchsorted(self.lam, at.contiguous()).clamp(1, len(ratio) - 1)
        low = high - 1
        weight = ((at - self.lam[low]) / (self.lam[high] - self.lam[low])).clamp(0.0, 1.0)
        return torch.lerp(ratio[low], ratio[high], weight)


class Learned(VarianceSource):
    r"""A source with a small head on the last features of a frozen network, so that mean and variance cost one pass.

    Arguments:
        head: Takes (h, emb), features and embedding tapped from the network, when its attribute `taps` is true, such as those
            in `quieten.covariances.heads`; any other module or function takes (x_t, eps, lam), with the predicted noise.
            Returns (B, *), in coordinates of `basis`.
        link: From the head's output o to the quantity it stands for: "linear" as official code has it; "unit" is
            softplus(o + c) times what the quantity is for data N(0, 1), which is 1 for o = 0, positive, and accurate at every
            level (the variance never is a small number times a huge exp(-lam)).
        **bounds: As in `VarianceSource`.

    Raises:
        ValueError: For an unknown link.
    """

    offset = 0.0
    """What "linear" adds to the head's output."""

    def __init__(self, head: nn.Module | Callable[..., Tensor], *, link: str = "linear", **bounds: Any):
        super().__init__(**bounds)
        if link not in ("linear", "unit"):
            raise ValueError(f"`link` must be 'linear' or 'unit' (got {link!r})")
        self.head, self.link = head, link

    # -- from the network to the head's output

    def look(self, denoiser: Denoiser, x: Tensor, lam: Level) -> tuple[Gaussian, Seen | None]:
        """What the denoiser says, and what the head needs to know of its network: from one pass.

        Raises:
            ValueError: If the network has no tap, or works on other rows than x: guidance goes outside of the covariance.
        """
        tap = tap_of(denoiser) if getattr(self.head, "taps", False) else None
        with nullcontext() if tap is None else tap.reading() as seen:
            p = denoiser(x, lam)
        if seen is not None and len(seen.h) != len(x):
            raise ValueError(f"the network saw {len(seen.h)} rows for {len(x)} states: put WithCovariance inside the guidance")
        return p, seen

    def output(self, seen: Seen | None, denoiser: Denoiser, x: Tensor, lam: Level, p: Gaussian) -> Tensor:
        """The head's output (B, *), in the dtype of x."""
        if seen is None:
            out = self.head(x, noise_of(p, x, lam, denoiser), lam)
        else:
            weight = next(self.head.parameters()) if isinstance(self.head, nn.Module) else x
            # contiguous: torch 2.13's group norm, going backward on a CPU from channels-last features that need no gradient,
            # ends the process with a segmentation fault
            h = seen.h.to(weight.dtype).contiguous()
            out = self.head(h, None if seen.emb is None else seen.emb.to(weight.dtype))
        if out.shape != x.shape:
            raise ValueError(f"the head returned shape {tuple(out.shape)} for states {tuple(x.shape)}: build it for them")
        return out.to(x.dtype)

    # -- from the head's output to rho

    def quantity(self, out: Tensor, lam: Level, x: Tensor) -> Tensor:
        """What the head is trained to predict (B, *)."""
        return self.offset + out if self.link == "linear" else self.scale(lam, x) * F.softplus(out + _SOFTPLUS_1)

    def scale(self, lam: Level, x: Tensor) -> Tensor | float:
        """The quantity for data N(0, 1), by which errors are weighed with link "unit"; 1 with "linear"."""
        return 1.0 if self.link == "linear" else _unit(lam, x)

    def from_quantity(self, q: Tensor, denoiser: Denoiser, x: Tensor, lam: Level, p: Gaussian) -> Tensor:
        """rho from the quantity."""
        return q

    def rho(self, denoiser: Denoiser, x: Tensor, lam: Level, p: Gaussian) -> Tensor:
        seen = self.look(denoiser, x, lam)[1] if getattr(self.head, "taps", False) else None
        return self._rho(seen, denoiser, x, lam, p)

    def _rho(self, seen: Seen | None, denoiser: Denoiser, x: Tensor, lam: Level, p: Gaussian) -> Tensor:
        q = self.quantity(self.output(seen, denoiser, x, lam, p), lam, x)
        return self.from_quantity(q, denoiser, x, lam, p)

    def gaussian(self, denoiser: Denoiser, x: Tensor, lam: Level) -> Gaussian:
        """Mean and variance of x0 given x_t from one pass of the network."""
        p, seen = self.look(denoiser, x, lam)
        if self.link == "unit" and type(self).from_quantity is Learned.from_quantity:
            out = self.output(seen, denoiser, x, lam, p)
            var = _unit(-lam, x) * F.softplus(out + _SOFTPLUS_1)  # exp(-lam) sigmoid(lam) = sigmoid(-lam), finite at -inf
        else:
            var = over_snr(self._rho(seen, denoiser, x, lam, p), lam, x)
        return Gaussian(p.mean, self.bounded(var, x), self.basis)

    def extra_repr(self) -> str:
        return f"link={self.link}, {super().extra_repr()}"


class HessianDiagonal(Learned):
    """OCM: the head predicts g = sigma^2 diag(Hessian of log q_t), and rho = 1 + g.

    References:
        | Optimal Covariance Matching (Ou et al., 2025), section 3, scaled by sigma^2 as in the released code
        | https://arxiv.org/abs/2406.10808
    """

    offset = 1.0


class Residual(Learned):
    """NPR: the head predicts the expected square of eps - eps_hat, which is rho, and optimal even where eps_hat is wrong.

    References:
        | Estimating the Optimal Covariance with Imperfect Mean in DPMs (Bao et al., 2022), section 4.2
        | https://arxiv.org/abs/2206.07309
    """


class SecondMoment(Learned):
    """SN: the head predicts the expected square of eps, and rho is that minus eps_hat^2.

    References:
        | Estimating the Optimal Covariance with Imperfect Mean in DPMs (Bao et al., 2022), section 4.1
        | https://arxiv.org/abs/2206.07309
    """

    def scale(self, lam: Level, x: Tensor) -> Tensor | float:
        return 1.0  # what noise is on average, at every level

    def from_quantity(self, q: Tensor, denoiser: Denoiser, x: Tensor, lam: Level, p: Gaussian) -> Tensor:
        return q - self.coordinates(noise_of(p, x, lam, denoiser)).square()


def _unit(lam: Level, x: Tensor) -> Tensor | float:
    """sigmoid(lam), rho of data N(0, 1)."""
    if isinstance(lam, float):
        return 1.0 / (1.0 + math.exp(-lam)) if lam >= -700.0 else 0.0
    return spread_over(torch.sigmoid(lam), x)


_SOFTPLUS_1 = math.log(math.expm1(1.0))  # softplus of it is 1
