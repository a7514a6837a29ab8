r"""Forward processes: what a log-SNR means, and the one kernel formula."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from .gaussian import POINT, Gaussian, scalar, spread_over

__all__ = ["FLOW", "PROCESSES", "VE", "VP", "Level", "Process", "check_eta"]

Level = float | Tensor
"""A log-SNR: a float inside the sampling loop, a tensor () or (B,) in training. +inf is data, -inf pure noise."""


class Process(ABC):
    r"""A family of marginals q(x_t | x0) = N(alpha x0, sigma^2 I), indexed by lam = log(alpha^2 / sigma^2).

    Stateless. Subclasses say what alpha and sigma are; kernels follow from lam alone.
    """

    @abstractmethod
    def scales(self, lam: Any) -> tuple[Any, Any]:
        """(alpha, sigma) at log-SNR `lam`: floats for a float, tensors of the same shape for a tensor."""

    def scales_over(self, lam: Any, x: Tensor) -> tuple[Any, Any]:
        """`scales`, shaped so that they multiply the state x (B, *), in its dtype and on its device."""
        alpha, sigma = self.scales(lam)
        return spread_over(alpha, x), spread_over(sigma, x)

    @abstractmethod
    def drift(self, lam: Any) -> Any:
        """d log(alpha) / d lam, the linear part of the process's differential equation."""

    def check_mean(self) -> None:  # noqa: B027, no process but the encoded one has anything to refuse
        """Raises ValueError, with the remedy, where a denoiser of this process returns anything but E[x0 | x_t]."""

    def prior(self, lam: Level) -> Gaussian:
        """The distribution from which sampling starts at `lam`: N(0, sigma^2), of a shape that broadcasts to any state.

        Raises:
            ValueError: If the process has no proper distribution at `lam` (VE at -inf), or if `lam` has an axis.
        """
        _, sigma = self.scales(lam)
        return self._zero_mean(sigma * sigma)

    def marginal(self, x0: Tensor | Gaussian, lam: Level) -> Gaussian:
        """q(x_t | x0), with x0 (B, *) known or itself Gaussian."""
        alpha, sigma = self.scales(lam)
        m, v, basis = _parts(x0)
        return Gaussian(_scaled(alpha, m), _plus(sigma * sigma, alpha * alpha, v, m), basis)

    def noising(self, x_s: Tensor, lam_s: Level, lam_t: Level) -> Gaussian:
        """q(x_t | x_s) for lam_t <= lam_s: the forward process, one step.

        Raises:
            ValueError: If lam_t > lam_s somewhere.
        """
        _check_order(lam_t, lam_s)
        (alpha_t, sigma_t), (alpha_s, _) = self.scales(lam_t), self.scales(lam_s)
        var = sigma_t * sigma_t * -_expm1(-_gap(lam_s, lam_t))
        return Gaussian(_scaled(alpha_t / alpha_s, x_s), _plus(var, 0.0, POINT, x_s))

    def bridge(
        self,
        x0: Tensor | Gaussian,
        x_t: Tensor,
        lam_t: Level,
        lam_s: Level,
        eta: float = 1.0,
        keep: Tensor | None = None,
    ) -> Gaussian:
        r"""Reverse kernel p(x_s | x_t) of the forward process, with x0 known or uncertain.

        .. math:: x_s \sim N(k x_t + b\,m,\; w + b^2 v), \quad x_0 \mid x_t \sim N(m, v)

        with :math:`h = \lambda_s - \lambda_t`, :math:`e = \exp(-h)`, :math:`c = -\mathrm{expm1}(-h)`,
        :math:`q = 1 - \eta^2 c`, :math:`w = \eta^2 \sigma_s^2 c`, :math:`k = (\sigma_s / \sigma_t) \sqrt q` and
        :math:`b = \alpha_s c (1 + \eta^2 e) / (1 + \sqrt{e q})`: no difference of nearly equal numbers anywhere, and
        finite limits at lam_s = +inf (the data itself) and lam_t = -inf (pure noise).

        Arguments:
            x0: Clean data (B, *), or its distribution given x_t; a tensor is a point mass.
            x_t: Noisy data (B, *).
            lam_t: Log-SNR of x_t, a float or a tensor of shape () or (B,).
            lam_s: Log-SNR of x_s; +inf asks for the data itself.
            eta: Share of the ancestral noise, from 0 (DDIM) to 1 (DDPM).
            keep: When given, the estimate of x0 (B, *) that the noise in x_t is read from, while `x0` is the data part
                only: mean = alpha_s x0 + k (x_t - alpha_t keep). Clipping in DDIM as released does this.

        Raises:
            ValueError: If eta is outside [0, 1], or if eta > 0 and lam_s < lam_t somewhere.

        References:
            | Denoising Diffusion Implicit Models (Song et al., 2021), eq. 12 and 16
            | https://arxiv.org/abs/2010.02502
            | Analytic-DPM (Bao et al., 2022), eq. 4, for an uncertain x0
            | https://arxiv.org/abs/2201.06503
        """
        k, b, w, alpha_s = self.coefficients(lam_t, lam_s, eta)
        m, v, basis = _parts(x0)
        if keep is None:
            mean = _combine(k, x_t, b, m)
        else:  # not the kernel of `keep` plus a correction: an unclipped estimate is huge near pure noise
            mean = _combine(k, x_t, alpha_s, m) - spread_over(k * self.scales(lam_t)[0], keep) * keep
        return Gaussian(mean, _plus(w, b * b, v, x_t), basis)

    def coefficients(self, lam_t: Level, lam_s: Level, eta: float = 1.0) -> tuple[Any, Any, Any, Any]:
        """(k, b, w, alpha_s) of `bridge`: floats for float levels, tensors for tensors."""
        check_eta(eta)
        if eta > 0.0:
            _check_order(lam_t, lam_s)
        (_, sigma_t), (alpha_s, sigma_s) = self.scales(lam_t), self.scales(lam_s)
        h = _gap(lam_s, lam_t)
        e, c = _exp(-h), -_expm1(-h)
        q = e + (1.0 - eta * eta) * c  # = 1 - eta^2 c, and e itself, to the last digit, when eta is 1
        if isinstance(sigma_t, float) and sigma_t == 0.0:
            if lam_s != lam_t:
                raise ValueError(
                    "`lam_t` is +inf, where the noise is unknown: start from a finite level (end the grid before +inf)"
                )
            return 1.0, 0.0, 0.0, alpha_s
        k = sigma_s / sigma_t * _sqrt(q)
        b = alpha_s * c * (1.0 + eta * eta * e) / (1.0 + _sqrt(e * q))
        return k, b, eta * eta * sigma_s * sigma_s * c, alpha_s

    def _zero_mean(self, var: Any) -> Gaussian:
        if isinstance(var, float):
            if math.isinf(var):
                raise ValueError(f"`lam` = -inf has no proper distribution in {self}: start from a finite log-SNR")
            var = scalar(var)
        if var.ndim:
            raise ValueError(f"`lam` must be a single level (got shape {tuple(var.shape)}): all examples share a prior")
        return Gaussian(torch.zeros(()), var)

    def __repr__(self) -> str:
        return type(self).__name__.strip("_")


class _VP(Process):
    """Variance preserving: alpha^2 = sigmoid(lam), sigma^2 = sigmoid(-lam)."""

    def scales(self, lam: Any) -> tuple[Any, Any]:
        return _sqrt(_sigmoid(lam)), _sqrt(_sigmoid(-lam))

    def drift(self, lam: Any) -> Any:
        return 0.5 * _sigmoid(-lam)

    def prior(self, lam: Level) -> Gaussian:
        """N(0, 1) at every level: data of unit variance stay so."""
        return self._zero_mean(torch.ones_like(lam) if isinstance(lam, Tensor) else 1.0)


class _VE(Process):
    """Variance exploding: alpha = 1, sigma = exp(-lam / 2). The unit of sigma is that of the data."""

    def scales(self, lam: Any) -> tuple[Any, Any]:
        return (1.0 if isinstance(lam, float) else torch.ones_like(lam)), _exp(-0.5 * lam)

    def drift(self, lam: Any) -> Any:
        return 0.0 if isinstance(lam, float) else torch.zeros_like(lam)


class _FLOW(Process):
    """Rectified flow: x_t = (1 - sigma) x0 + sigma eps, so alpha = sigmoid(lam / 2), sigma = sigmoid(-lam / 2)."""

    def scales(self, lam: Any) -> tuple[Any, Any]:
        return _sigmoid(0.5 * lam), _sigmoid(-0.5 * lam)

    def drift(self, lam: Any) -> Any:
        return 0.5 * _sigmoid(-0.5 * lam)


VP: Process = _VP()
VE: Process = _VE()
FLOW: Process = _FLOW()
PROCESSES: dict[str, Process] = {"vp": VP, "ve": VE, "flow": FLOW}


# Float and tensor twins of the few functions that the formulas need. Floats are the sampling loop, where a tensor per
# coefficient would cost more than the arithmetic on the state.


def _exp(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.exp()
    return math.exp(x) if x < 709.0 else math.inf


def _expm1(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.expm1()
    return math.expm1(x) if x < 709.0 else math.inf


def _sqrt(x: Any) -> Any:
    return x.sqrt() if isinstance(x, Tensor) else math.sqrt(x)


def _sigmoid(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.sigmoid()
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def _gap(lam_s: Level, lam_t: Level) -> Any:
    """lam_s - lam_t, and 0 where both are the same infinity."""
    if isinstance(lam_s, float):
        if isinstance(lam_t, float):
            return 0.0 if lam_s == lam_t else lam_s - lam_t
        lam_s = torch.full_like(lam_t, lam_s)
    return torch.where(lam_s == lam_t, torch.zeros_like(lam_s), lam_s - lam_t)


def check_eta(eta: float) -> None:
    """Raises ValueError unless eta lies in [0, 1]."""
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"`eta` must lie in [0, 1] (got {eta}): 0 is DDIM, 1 is DDPM")


def _check_order(lam_t: Level, lam_s: Level) -> None:
    """Raises unless lam_s >= lam_t; levels on a device are not looked at, since that would make the host wait for it."""
    if any(isinstance(lam, Tensor) and (type(lam) is not Tensor or lam.device.type != "cpu") for lam in (lam_t, lam_s)):
        return
    wrong = lam_s < lam_t
    if wrong if isinstance(wrong, bool) else bool(wrong.any()):
        values = (
            f"{lam:.4g}" if isinstance(lam, float) else f"{lam.detach().flatten()[:3].tolist()}" for lam in (lam_s, lam_t)
        )
        raise ValueError("`lam_s` must be at least `lam_t` (got {} < {}): pass the grid from noise to data".format(*values))


def _parts(x0: Tensor | Gaussian) -> tuple[Tensor, Tensor, Any]:
    return (x0.mean, x0.var, x0.basis) if isinstance(x0, Gaussian) else (x0, POINT, None)


def _scaled(k: Level, x: Tensor) -> Tensor:
    return x * spread_over(k, x)


def _combine(k: Level, x: Tensor, b: Level, m: Tensor) -> Tensor:
    """k x + b m, in the fewest passes over memory."""
    if isinstance(k, float) and isinstance(b, float):
        return torch.mul(x, k).add_(m, alpha=b)
    return spread_over(k, x) * x + spread_over(b, x) * m


def _plus(w: Level, b2: Level, v: Tensor, like: Tensor) -> Tensor:
    """w + b2 v as a variance that broadcasts to `like`."""
    if v is POINT:
        return scalar(w) if isinstance(w, float) else spread_over(w, like)
    if isinstance(w, float) and isinstance(b2, float):
        return torch.mul(v, b2).add_(w)
    return spread_over(w, like) + spread_over(b2, like) * v.to(like)
