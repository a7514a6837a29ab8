r"""Guidance by a linear measurement, and kicks that solve it without a limit on the step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..gaussian import Gaussian
from ..guidance import Guidance, Scale
from ..process import Level
from .kick import Force, Kick, Span

__all__ = ["ExactKick", "ImplicitKick", "Quadratic"]

Map = Callable[[Tensor], Tensor]


class Quadratic(Guidance):
    r"""Guidance towards y = H x0 + noise, taking x_t / alpha for x0: a gradient that is linear in the state.

    .. math:: \log p(y | x_t) = -\frac{|H x_t / \alpha - y|^2}{2 r^2}, \quad r^2 = \text{std}^2 + \text{spread}\, \bar\sigma^2

    A kick of it can be solved exactly at any weight (`ExactKick`, `ImplicitKick`).

    Arguments:
        H: A matrix (M, D) for flattened states, or a pair of maps (H, its transpose) on batches.
        y: The measurement: (M,) or (B, M) for a matrix, else anything that H(x) - y makes sense of.
        std: Standard deviation of the measurement's noise, in units of the data.
        spread: Share of sbar^2 in the variance: 1 is right for data that are spread widely.
        gain: For a pair of maps with H H^T = gain I: 1 for a mask of pixels, 1/n for means of n pixels.
        scale: As in `Guidance`.
        nonfinite: As in `Guidance`.

    Raises:
        ValueError: If `std` is not positive, `spread` or `gain` negative, or `H` neither a matrix nor a pair of maps.

    Example:
        >>> mask = torch.tensor([1.0, 0.0])
        >>> seen = Quadratic((lambda x: x * mask, lambda v: v * mask), torch.tensor([2.0, 0.0]), gain=1.0)
        >>> from quieten.oracle import GaussianData
        >>> seen.gradient(GaussianData(torch.zeros(2), 1.0), torch.zeros(1, 2), 0.0)
        tensor([[2., 0.]])
    """

    def __init__(
        self,
        H: Tensor | tuple[Map, Map],
        y: Tensor,
        std: float = 1.0,
        spread: float = 0.0,
        gain: float | None = None,
        scale: Scale = 1.0,
        nonfinite: str = "raise",
    ):
        super().__init__(scale, nonfinite)
        if not std > 0 or spread < 0 or (gain is not None and not gain > 0):
            raise ValueError(f"`std` and `gain` must be positive, `spread` not negative (got {std}, {gain}, {spread})")
        if isinstance(H, Tensor) and H.ndim != 2:
            raise ValueError(f"`H` must be a matrix (M, D), or a pair of maps (got shape {tuple(H.shape)})")
        if not isinstance(H, Tensor) and not (len(H) == 2 and all(map(callable, H))):
            raise ValueError("`H` must be a matrix (M, D), or a pair of maps: H and its transpose")
        self.std, self.spread, self.gain = float(std), float(spread), gain
        self.maps = None if isinstance(H, Tensor) else H
        self.matrix: Tensor | None
        self.register_buffer("matrix", H if isinstance(H, Tensor) else None)
        self.y: Tensor
        self.register_buffer("y", torch.as_tensor(y))

    def measured(self, x: Tensor) -> Tensor:
        """H x of states (B, *)."""
        if self.maps is not None:
            return self.maps[0](x)
        assert self.matrix is not None  # for mypy: one of the two is there
        if x.shape[1:].numel() != self.matrix.shape[1]:
            raise ValueError(f"`H` has {self.matrix.shape[1]} columns: states of {x.shape[1:].numel()} numbers need as many")
        return x.flatten(1) @ self.matrix.to(x).T

    def spread_back(self, v: Tensor, like: Tensor) -> Tensor:
        """H^T v, of the shape of a state."""
        if self.maps is not None:
            return self.maps[1](v)
        assert self.matrix is not None
        return (v @ self.matrix.to(v)).reshape(like.shape)

    def residual(self, xbar: Tensor) -> Tensor:
        """y - H xbar."""
        return self.y.to(xbar) - self.measured(xbar)

    def slope(self, denoiser: Denoiser, x: Tensor, lam: Level) -> tuple[Gaussian | None, Tensor]:
        alpha, _ = denoiser.process.scales_over(lam, x)
        sbar2 = math.exp(-lam) if isinstance(lam, float) else torch.exp(-lam).to(x).reshape(-1, *[1] * (x.ndim - 1))
        return None, self.spread_back(self.residual(x / alpha), x) / (alpha * (self.std**2 + self.spread * sbar2))

    def exponent(self, span: Span, lam: float) -> float:
        r"""q = w \int sbar / r^2 d sbar over the span, towards the data: the kick is exp(-q H^T H) about its solution.

        The weight w is that of the level `lam`.
        """
        w, rise = self.weight(lam), -span.length * (span.start + span.end)  # start^2 - end^2, without cancelling
        if not isinstance(w, float):
            raise ValueError("`scale` must give a float for a float level: an exact kick has one weight for all examples")
        if self.spread == 0.0:
            return w * rise / (2.0 * self.std**2)
        return w / (2.0 * self.spread) * math.log1p(self.spread * rise / (self.std**2 + self.spread * span.end**2))


class ExactKick(Kick):
    r"""The guidance's own flow in closed form, for `Quadratic` guidance: no step is too long, no weight too large.

    xbar -> xbar + H^T (1 - exp(-q H H^T)) (H H^T)^{-1} (y - H xbar), by the eigenvalues of H H^T for a matrix (worked out
    once), or by its gain for maps.
    """

    def __init__(self) -> None:
        super().__init__()
        self._cache: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, force: Force, x: Tensor, lam: float, span: Span, memory: object = None) -> tuple[Tensor, None]:
        guidance = _quadratic(force)
        alpha, _ = force.process.scales(lam)
        q = force.strength * guidance.exponent(span, lam)
        residual = guidance.residual(x / alpha)
        if guidance.matrix is None:
            if guidance.gain is None:
                raise ValueError(
                    "`gain` is needed for an exact kick with maps: give H H^T = gain I, a matrix, or use ImplicitKick"
                )
            back = guidance.spread_back(residual * (-math.expm1(-q * guidance.gain) / guidance.gain), x)
        else:
            values, vectors = self._spectrum(guidance.matrix)
            values, vectors = values.to(x), vectors.to(x)
            share = torch.where(values > 0, -torch.expm1(-q * values) / values, q)
            back = guidance.spread_back((residual @ vectors * share) @ vectors.T, x)
        return torch.add(x, back, alpha=alpha), None

    def _spectrum(self, H: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues and vectors of H H^T."""
        if self._cache is None or self._cache[0] is not H:
            values, vectors = torch.linalg.eigh(H.detach().cpu().double() @ H.detach().cpu().double().T)
            self._cache = H, values.clamp_min(0.0), vectors
        return self._cache[1:]


class ImplicitKick(Kick):
    r"""One backward Euler step of the guidance's flow, for `Quadratic` guidance: (I + q H^T H)^{-1} (xbar + q H^T y).

    By conjugate gradients in the space of measurements, each example on its own: one iteration if H H^T is a multiple of I.

    Arguments:
        iterations: Largest number of them.
        tolerance: Residual, relative to the first, at which an example is done.
    """

    def __init__(self, iterations: int = 50, tolerance: float = 1e-10):
        super().__init__()
        if iterations < 1 or not tolerance > 0:
            raise ValueError(f"`iterations` must be at least 1 and `tolerance` positive (got {iterations}, {tolerance})")
        self.iterations, self.tolerance = iterations, tolerance

    def forward(self, force: Force, x: Tensor, lam: float, span: Span, memory: object = None) -> tuple[Tensor, None]:
        guidance = _quadratic(force)
        alpha, _ = force.process.scales(lam)
        q = force.strength * guidance.exponent(span, lam)
        residual = guidance.residual(x / alpha)

        def system(v: Tensor) -> Tensor:  # I + q H H^T
            return torch.add(v, guidance.measured(guidance.spread_back(v, x)), alpha=q)

        back = guidance.spread_back(self._solve(system, residual), x)
        return torch.add(x, back, alpha=alpha * q), None

    def _solve(self, system: Map, b: Tensor) -> Tensor:
        """Conjugate gradients from 0; examples that are done stop moving."""
        v, r = torch.zeros_like(b), b
        p, rr = r, _dot(r, r)
        first = rr
        for _ in range(self.iterations):
            open_ = rr > self.tolerance**2 * first
            if not bool(open_.any()):
                break
            sp = system(p)
            step = torch.where(open_, rr / _dot(p, sp), 0.0)
            v, r = v + step * p, r - step * sp
            new = _dot(r, r)
            p, rr = r + torch.where(open_, new / rr, 0.0) * p, torch.where(open_, new, rr)
        return v

    def extra_repr(self) -> str:
        return f"iterations={self.iterations}, tolerance={self.tolerance}"


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each example, shaped to multiply it."""
    return (a * b).sum(tuple(range(1, a.ndim)), keepdim=True)


def _quadratic(force: Force) -> Quadratic:
    if not isinstance(force.guidance, Quadratic):
        raise ValueError(f"this kick is for Quadratic guidance (got {type(force.guidance).__name__}): use EulerKick")
    return force.guidance
