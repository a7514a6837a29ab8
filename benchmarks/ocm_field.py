"""Why the right variance of each pixel can draw worse pictures: a Gaussian field with correlated pixels, exactly.

    python benchmarks/ocm_field.py

Data N(0, C), C = 0.4 R x R with R_ij = 0.9^|i - j| on 8x8 pixels; exact score; the linear chain of 1,000 levels, "linear"
steps; no clipping, no noise in the last step. Means are linear, so the distribution after all steps is known: printed are its
squared Frechet distance to the data, and the variance of the finer half of its components over that of the data. Nothing is
sampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from quieten import VP, Table
from quieten.basis import DCT
from quieten.solvers.grids import linear, take

SIDE, STEPS = 8, (5, 10, 25, 50, 100)
TABLE = Table.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))


def field() -> Tensor:
    """Covariance of the data (64, 64)."""
    i = torch.arange(SIDE)
    row = 0.9 ** (i[:, None] - i).abs().double()
    return 0.4 * torch.kron(row, row)


def cosines() -> Tensor:
    """The cosine transform of the whole picture as a matrix (64, 64)."""
    eye = torch.eye(SIDE * SIDE, dtype=torch.float64).reshape(-1, 1, SIDE, SIDE)
    return DCT(SIDE).forward(eye).reshape(SIDE * SIDE, -1).T


def classes() -> dict[str, Callable[[Tensor], Tensor]]:
    """What each class of kernels makes of the posterior covariance."""
    B = cosines()
    return {
        "none": torch.zeros_like,
        "one number": lambda V: V.diag().mean() * torch.eye(len(V), dtype=V.dtype),
        "pixels": lambda V: V.diag().diag(),
        "cosines": lambda V: B.T @ (B @ V @ B.T).diag().diag() @ B,
        "whole": lambda V: V,
    }


def after(grid: list[float], eta: float, kind: Callable[[Tensor], Tensor], C: Tensor) -> Tensor:
    """Covariance of the samples."""
    eye = torch.eye(len(C), dtype=C.dtype)
    S = eye
    for lam_t, lam_s in pairwise(grid):
        k, b, w, _ = VP.coefficients(lam_t, lam_s, eta)
        alpha, sigma = VP.scales(lam_t)
        total = alpha**2 * C + sigma**2 * eye
        A = k * eye + b * alpha * torch.linalg.solve(total, C)
        V = C - alpha**2 * C @ torch.linalg.solve(total, C)
        noise = w * eye + b * b * kind(V) if lam_s < math.inf else 0.0
        S = A @ S @ A.T + noise
    return S


def distance(S: Tensor, C: Tensor) -> float:
    """Squared Frechet distance of N(0, S) and N(0, C)."""
    values, vectors = torch.linalg.eigh(C)
    root = vectors @ values.sqrt().diag() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ S @ root).clamp_min(0).sqrt().sum()
    return float(S.trace() + C.trace() - 2 * cross)


def main() -> None:
    C = field()
    vectors = torch.linalg.eigh(C).eigenvectors[:, : len(C) // 2]  # ascending: the finer half
    fine = float((vectors.T @ C @ vectors).trace())
    print(f"| kernel | covariance | {' | '.join(map(str, STEPS))} |\n|---|---|{'---|' * len(STEPS)}")
    for kernel, eta in (("DDPM", 1.0), ("DDIM", 0.0)):
        for name, kind in classes().items():
            cells = []
            for K in STEPS:
                S = after(take(TABLE, linear(K, 1000)).tolist(), eta, kind, C)
                cells.append(f"{distance(S, C):.3f} ({float((vectors.T @ S @ vectors).trace()) / fine:.2f})")
            print(f"| {kernel} | {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
