r"""Products with the Jacobian of E[x0 | x_t], which is a covariance: Cov[x0 | x_t] = (sigma^2 / alpha) J.

References:
    | Improving Probabilistic Diffusion Models With Optimal Diagonal Covariance Matching (Ou et al., 2025), theorem 1
    | https://arxiv.org/abs/2406.10808
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..covariance import VarianceSource, over_snr
from ..denoiser import Denoiser
from ..gaussian import Gaussian, spread_over
from ..noise import Noise
from ..process import Level

__all__ = ["DERIVATIVES", "Probed", "check_derivative", "difference_step", "posterior_covariance", "product", "relative"]

DERIVATIVES = ("auto", "vjp", "fd", "jvp")
"""How to get a product: J^T v by one backward pass (vjp); J v by a one-sided difference of two passes (fd), which needs no
graph and no derivatives of the network; J v in forward mode (jvp), which attention rarely has; "auto" chooses."""


def check_derivative(how: str) -> None:
    """Raises ValueError unless `how` is one of `DERIVATIVES`."""
    if how not in DERIVATIVES:
        raise ValueError(f"`derivative` must be one of {', '.join(DERIVATIVES)} (got {how!r})")


def product(
    look: Callable[[Tensor], tuple[Gaussian, Any]],
    x: Tensor,
    v: Tensor,
    how: str = "vjp",
    step: Tensor | float = 5e-3,
) -> tuple[Gaussian, Any, Tensor]:
    r"""J^T v (vjp) or J v (fd, jvp), for the Jacobian J of the mean, with what `look` says at x.

    The graph is freed before this returns. The one-sided difference (D(x + h v) - D(x)) / h costs one pass more than D(x)
    alone; over probes v with a symmetric law its error of order h averages out: it is as little biased as the central one.

    Arguments:
        look: States (B, *) to the Gaussian of x0 and anything else that is to be kept.
        x: States (B, *).
        v: Directions (B, *).
        how: One of `DERIVATIVES`, where "auto" is vjp.
        step: h of the difference; see `difference_step`.

    Returns:
        The Gaussian, what else `look` answered, and the product (B, *); all detached.
    """
    if how == "jvp":
        tangent = torch.func.jvp(lambda z: look(z)[0].mean, (x.contiguous(),), (v.contiguous(),))[1].detach()
        with torch.no_grad():
            return *look(x), tangent
    if how == "fd":
        with torch.no_grad():
            p, rest = look(x)
            return p, rest, (look(x + step * v)[0].mean - p.mean) / step
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        p, rest = look(z)
        (u,) = torch.autograd.grad(p.mean, z, v)
    return Gaussian(p.mean.detach(), p.var, p.basis), rest, u


def difference_step(denoiser: Denoiser, x: Tensor, lam: Level) -> Tensor | float:
    """A step for differences at states x (B, *): the cube root of the network's precision, in units of the noise.

    Held above a twentieth of the state's scale, below which the network itself sees nothing.
    """
    alpha, sigma = denoiser.process.scales_over(lam, x)
    precision = x.dtype
    for p in denoiser.parameters():
        precision = p.dtype if torch.finfo(p.dtype).eps > torch.finfo(precision).eps else precision
        break
    size = torch.finfo(precision).eps ** (1.0 / 3.0)
    if isinstance(sigma, float):
        return size * max(sigma, 0.05 * math.hypot(alpha, sigma))
    return size * torch.maximum(sigma, 0.05 * (alpha * alpha + sigma * sigma).sqrt())


def relative(u: Tensor, lam: Level, denoiser: Denoiser, x: Tensor) -> Tensor:
    """alpha u: a product with the Jacobian, in the unit of rho."""
    alpha, _ = denoiser.process.scales(lam)
    return u * spread_over(alpha, x)


class Probed(VarianceSource):
    r"""OCM without a head: rho = alpha E_v[v * (J^T v)] over random signs v, from one graph for all of them.

    Unbiased for any Jacobian, with variance alpha^2 sum_{j != i} J_ji^2 / probes. Costs a forward pass and `probes` backward
    ones at every step.

    Arguments:
        probes: Number of sign vectors; all examples of a batch share them, so that samples do not depend on the batch.
        seed: Key of the probes, which differ from level to level.
        **bounds: As in `VarianceSource`.
    """

    def __init__(self, probes: int = 100, seed: int = 0, **bounds: Any):
        super().__init__(**bounds)
        if probes < 1:
            raise ValueError(f"`probes` must be at least 1 (got {probes})")
        self.probes, self.seed = probes, seed

    def gaussian(self, denoiser: Denoiser, x: Tensor, lam: Level) -> Gaussian:
        """Mean and variance from one graph."""
        p, rho = self._estimate(denoiser, x, lam)
        return Gaussian(p.mean, self.bounded(over_snr(rho, lam, x), x), self.basis)

    def rho(self, denoiser: Denoiser, x: Tensor, lam: Level, p: Gaussian) -> Tensor:
        return self._estimate(denoiser, x, lam)[1]

    def _estimate(self, denoiser: Denoiser, x: Tensor, lam: Level) -> tuple[Gaussian, Tensor]:
        noise, key = Noise(self.seed, [0]), _key(lam)
        total = torch.zeros_like(x)
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            p = denoiser(z, lam)
            for i in range(self.probes):
                v = noise.normal(x[:1], key, f"probe {i}").sign().expand_as(x) if len(x) else x
                (u,) = torch.autograd.grad(p.mean, z, self.pixels(v), retain_graph=i + 1 < self.probes)
                total += v * self.coordinates(u)
        return Gaussian(p.mean.detach(), p.var, p.basis), relative(total / self.probes, lam, denoiser, x)


def _key(lam: Level) -> int:
    """A number that tells levels apart."""
    return zlib.crc32(struct.pack("d", lam)) if isinstance(lam, float) else 0


def posterior_covariance(denoiser: Denoiser, x: Tensor, lam: Level) -> Tensor:
    """Cov[x0 | x_t] (B, D, D) in full, (sigma^2 / alpha) J made symmetric, its negative eigenvalues set to 0: for small D.

    Takes D backward passes of one graph. With `Lanczos` nothing of this size is built.

    Raises:
        ValueError: At lam = -inf, where the denoiser does not depend on x and says nothing of the covariance.
    """
    if isinstance(lam, float) and lam == -math.inf:
        raise ValueError(
            "`lam` = -inf is pure noise, where the covariance does not follow from the denoiser: take a finite level"
        )
    rows, flat = [], x.flatten(1)
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        mean = denoiser(z, lam).mean.flatten(1)
        for i in range(flat.shape[1]):
            rows.append(torch.autograd.grad(mean[:, i].sum(), z, retain_graph=True)[0].flatten(1))
    J = torch.stack(rows, dim=1).detach()
    alpha, sigma = denoiser.process.scales(lam)
    scale = sigma * sigma / alpha
    values, vectors = torch.linalg.eigh(0.5 * (J + J.mT) * (scale if isinstance(scale, float) else spread_over(scale, J)))
    return vectors * values.clamp_min(0.0)[:, None] @ vectors.mT
