r"""The only distribution of the library: a Gaussian, diagonal in pixels or in another orthonormal basis."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, overload

import torch
from torch import Tensor
from torch.utils import _pytree

__all__ = ["POINT", "Basis", "Gaussian", "scalar", "spread_over"]

POINT = torch.zeros(())
"""The variance of a point mass: one shared 0-d zero on the CPU, so that the loop knows by identity that it draws nothing."""


class Basis(Protocol):
    """An orthonormal map between pixels and the coordinates in which a variance is diagonal."""

    def forward(self, x: Tensor) -> Tensor:
        """Pixels (B, *) to coordinates (B, *)."""
        ...

    def inverse(self, c: Tensor) -> Tensor:
        """Coordinates (B, *) to pixels (B, *)."""
        ...


def scalar(value: float) -> Tensor:
    """A level's variance as a tensor: 0-d, float64, on the CPU (it meets states of any device and dtype); zero is `POINT`."""
    return POINT if value == 0.0 else torch.tensor(value, dtype=torch.float64)


@overload
def spread_over(value: float, x: Tensor) -> float: ...
@overload
def spread_over(value: Tensor, x: Tensor) -> Tensor: ...
def spread_over(value: float | Tensor, x: Tensor) -> float | Tensor:
    """Shapes a per-example number so that it multiplies a state.

    Arguments:
        value: A float (returned as it is), or a tensor of shape () or (B,).
        x: The state (B, *) it is meant for; the result has its dtype and device.
    """
    if isinstance(value, float):
        return value
    value = value.to(x)
    return value.reshape(-1, *[1] * (x.ndim - 1)) if value.ndim else value


@dataclass(frozen=True)
class Gaussian:
    r"""N(mean, var), with var diagonal in `basis`.

    A pytree: `mean` and `var` are its children (`var` not when it is `POINT`), `basis` is context.

    Arguments:
        mean: Shape (B, *), or anything that broadcasts to it.
        var: Variance, in the square of the mean's unit; broadcasts to the mean. `POINT` makes a point mass.
        basis: Orthonormal map in which `var` is diagonal; None is the pixel basis.

    Example:
        >>> p = Gaussian(torch.zeros(2, 3), torch.tensor(4.0))
        >>> p.sample(torch.ones(2, 3))[0, 0].item()
        2.0
        >>> p.log_prob(torch.zeros(2, 3)).shape
        torch.Size([2])
    """

    mean: Tensor
    var: Tensor = POINT
    basis: Basis | None = None

    @property
    def is_point(self) -> bool:
        """Whether this is a point mass. Never waits for a device: only 0-d CPU variances are looked at."""
        if self.var is POINT:
            return True
        return type(self.var) is Tensor and self.var.ndim == 0 and self.var.device.type == "cpu" and not self.var.any()

    def sample(self, noise: Tensor) -> Tensor:
        """mean + sqrt(var) * noise, for standard normal `noise` (B, *)."""
        if self.is_point:
            return self.mean.expand_as(noise)
        if self.basis is not None:
            return self.mean + self.basis.inverse(self.var.to(noise).sqrt() * noise)
        if self.var.ndim == 0 and self.var.device.type == "cpu" and not self.var.requires_grad:
            return torch.add(self.mean, noise, alpha=math.sqrt(self.var.item()))  # one pass over memory
        return self.mean + self.var.sqrt().to(noise) * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density at x (B, *), in nats per example: shape (B,).

        Raises:
            ValueError: If this is a point mass.
        """
        self._refuse_point("log_prob")
        residual = self._coordinates(x - self.mean)
        var = self.var.to(residual)
        return -0.5 * _total(residual.square() / var + var.log() + math.log(2 * math.pi), residual)

    def kl(self, other: Gaussian) -> Tensor:
        """KL(self || other) in nats per example: shape (B,). Both must be diagonal in the same basis.

        Raises:
            ValueError: If either is a point mass, or if the bases differ (an isotropic variance, one with a single element
                per example, is diagonal in every basis).
        """
        self._refuse_point("kl")
        other._refuse_point("kl")
        basis = self.basis if self.basis is not None else other.basis
        for p in (self, other):
            if p.basis is not basis and not p._is_isotropic():
                raise ValueError("`other` is diagonal in another basis: give both Gaussians the same `basis`")
        shift = self.mean - other.mean
        if basis is not None:
            shift = basis.forward(shift)
        var, ratio = other.var.to(shift), (self.var / other.var).to(shift)
        return 0.5 * _total(shift.square() / var + (ratio - 1 - ratio.log()), shift)

    def _coordinates(self, x: Tensor) -> Tensor:
        return x if self.basis is None else self.basis.forward(x)

    def _is_isotropic(self) -> bool:
        per_example = self.var.ndim == self.mean.ndim and all(n == 1 for n in self.var.shape[1:])
        return per_example or self.var.numel() == 1

    def _refuse_point(self, what: str) -> None:
        if self.is_point:
            raise ValueError(f"`{what}` of a point mass is undefined: give the Gaussian a `var` above 0 (eta > 0, a last std)")


def _total(terms: Tensor, like: Tensor) -> Tensor:
    """Sums all but the first axis, after broadcasting to the shape of `like`."""
    return terms.expand_as(like).flatten(1).sum(1) if like.ndim > 1 else terms.expand_as(like)


def _flatten(p: Gaussian) -> tuple[list[Any], Any]:
    # A point mass keeps its identity through vmap and jvp because POINT travels as context, not as a child.
    return ([p.mean], (True, p.basis)) if p.var is POINT else ([p.mean, p.var], (False, p.basis))


def _unflatten(children: Any, context: Any) -> Gaussian:
    point, basis = context
    mean, *var = children
    return Gaussian(mean, POINT if point else var[0], basis)


_pytree.register_pytree_node(Gaussian, _flatten, _unflatten, serialized_type_name="quieten.Gaussian")
