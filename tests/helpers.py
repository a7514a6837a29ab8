"""What the core's tests share: one-line refusals, known data in every process, and the affine map of a Gaussian kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from quieten.gaussian import Gaussian
from quieten.oracle import GaussianData
from quieten.process import VE, Process

__all__ = ["DATA", "affine", "covariance", "f64", "gaussian_data", "refuses", "within"]


def within(bound: float, error: float | Tensor, what: str) -> None:
    """Prints a figure (pytest -rP shows it) and asserts that it is at most `bound`."""
    error = float(error)
    print(f"{what}: {error:.2e} (at most {bound:.1e})")
    assert error <= bound, f"{what}: {error:.2e} exceeds {bound:.1e}"


@contextmanager
def refuses(*pieces: str) -> Iterator[None]:
    """Expects a ValueError of one line that holds every piece: the argument, its value, the remedy."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the message is looked at below
        yield
    message = str(caught.value)
    assert "\n" not in message
    for piece in pieces:
        assert piece in message, f"{piece!r} is not in {message!r}"


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


DATA = ["vector", "image", "vector, full covariance", "image, full covariance"]


def gaussian_data(kind: str, process: Process = VE, seed: int = 0) -> GaussianData:
    """Gaussian data of a kind in `DATA`, with variances from 0.05 to 2 and means of either sign."""
    shape = (5,) if kind.startswith("vector") else (2, 3, 2)
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, generator=generator, dtype=torch.float64)
    var = torch.linspace(0.05, 2.0, mean.numel(), dtype=torch.float64)
    if "full" not in kind:
        return GaussianData(mean, var.reshape(shape), process)
    q, _ = torch.linalg.qr(torch.randn(len(var), len(var), generator=generator, dtype=torch.float64))
    return GaussianData(mean, q @ torch.diag(var) @ q.T, process)


def covariance(p: Gaussian, shape: tuple[int, ...]) -> Tensor:
    """The covariance (D, D) of a Gaussian with one row, or the same variance in every row."""
    var = torch.broadcast_to(p.var, (1, *shape) if p.var.ndim <= len(shape) else (len(p.var), *shape))[0].double().flatten()
    if p.basis is None:
        return torch.diag(var)
    rows = p.basis.forward(torch.eye(len(var), dtype=torch.float64).reshape(-1, *shape)).flatten(1)  # row i is U^T e_i
    return rows @ torch.diag(var) @ rows.T


def affine(kernel, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """(A, c, V) of x_s ~ N(A x_t + c, V), read off a kernel x -> Gaussian whose mean is affine in x: D + 1 rows at once."""
    n = torch.Size(shape).numel()
    rows = torch.cat([torch.zeros(1, n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)])
    p = kernel(rows.reshape(-1, *shape))
    mean = p.mean.flatten(1)
    return (mean[1:] - mean[0]).T, mean[0], covariance(p, shape)
