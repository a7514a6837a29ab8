r"""Kernels with the full covariance of a denoiser, drawn by a few products with its Jacobian."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..gaussian import POINT, Gaussian
from ..process import Level, check_eta
from ..transition import Step, Transition
from ..wrap import Clip, clip
from .jacobian import difference_step

__all__ = ["FullGaussian", "Lanczos", "lanczos_root"]

Product = Callable[[Tensor], Tensor]


def lanczos_root(multiply: Product, z: Tensor, steps: int, floor: float = 0.0) -> Tensor:
    r"""About A^{1/2} z, row by row, from products with a symmetric matrix A: |z| Q T^{1/2} e_1 after `steps` products.

    Exact once the steps span all that z excites, at the latest after as many as there are dimensions. The vectors are kept
    orthogonal to all before them.

    Arguments:
        multiply: w (B, *) to A w (B, *), each row with its own A.
        z: (B, *).
        steps: Number of products, at least 1.
        floor: What the eigenvalues of A are known to be at least; estimates below are raised to it.

    References:
        | Lanczos (1950); Golub, Van Loan, Matrix Computations, 10.1
        | https://arxiv.org/abs/2605.22723 draws the noise of diffusion kernels so
    """
    size = z.flatten(1).norm(dim=1)
    q = z.flatten(1) / size.clamp_min(torch.finfo(z.dtype).tiny)[:, None]
    steps = min(steps, q.shape[1])
    rows, T = [q], z.new_zeros(len(z), steps, steps)
    for k in range(steps):
        w = multiply(rows[k].reshape(z.shape)).flatten(1)
        T[:, k, k] = (w * rows[k]).sum(1)
        scale = w.norm(dim=1)
        for _ in range(2):  # once leaves what rounding left
            basis = torch.stack(rows, dim=1)
            w = w - torch.einsum("bkd,bk->bd", basis, torch.einsum("bkd,bd->bk", basis, w))
        if k + 1 == steps:
            break
        beta = w.norm(dim=1)
        # nothing new: the row is done, and zeros from here on leave what it has alone
        done = beta <= 1e3 * torch.finfo(z.dtype).eps * scale
        T[:, k, k + 1] = T[:, k + 1, k] = torch.where(done, torch.zeros_like(beta), beta)
        rows.append(torch.where(done[:, None], torch.zeros_like(w), w / beta.clamp_min(torch.finfo(z.dtype).tiny)[:, None]))
    values, vectors = torch.linalg.eigh(T)
    weights = (vectors * values.clamp_min(floor).sqrt()[:, None]) @ vectors[:, 0, :, None]  # T^{1/2} e_1, (B, steps, 1)
    return (size[:, None] * (torch.stack(rows, dim=2) @ weights)[..., 0]).reshape(z.shape)


@dataclass(frozen=True)
class FullGaussian:
    """N(mean, A), with A known by its products.

    Attributes:
        mean: (B, *).
        multiply: w (B, *) to A w.
        steps: Products for a draw.
        floor: Smallest eigenvalue of A.
    """

    mean: Tensor
    multiply: Product
    steps: int
    floor: float

    def sample(self, noise: Tensor) -> Tensor:
        """mean + A^{1/2} noise, for standard normal `noise` (B, *)."""
        return self.mean + lanczos_root(self.multiply, noise, self.steps, self.floor)


class Lanczos(Transition):
    r"""The reverse kernel with the full covariance, w I + b^2 (sigma^2 / alpha) J, and nothing trained.

    A step costs a forward pass and, for its draw, `steps` products with the Jacobian J of E[x0 | x_t]; all of them go backward
    through one graph. A learned J is not quite symmetric: with `symmetric`, each product is the mean of one with J^T, backward,
    and one with J, by a finite difference; without it, J^T stands for both.

    Arguments:
        steps: Products for a draw; from the number of dimensions on it is exact, in pictures a few do.
        eta: Share of the ancestral noise, 0 to 1.
        clip: Bound on the estimate of x0, as in `Ancestral`; the covariance is that of the unclipped one.
        keep_eps: As in `Ancestral`.
        symmetric: See above.

    References:
        | Improving Probabilistic Diffusion Models With Optimal Diagonal Covariance Matching (Ou et al., 2025), theorem 1
        | https://arxiv.org/abs/2406.10808
    """

    eta: float

    def __init__(
        self, steps: int = 3, eta: float = 1.0, clip: Clip | None = None, keep_eps: bool = False, symmetric: bool = False
    ):
        super().__init__()
        check_eta(eta)
        if steps < 1:
            raise ValueError(f"`steps` must be at least 1 (got {steps}): the products of a draw")
        self.steps, self.eta, self.clip, self.keep_eps, self.symmetric = steps, eta, clip, keep_eps, symmetric

    def forward(self, denoiser: Denoiser, x_t: Tensor, lam_t: Level, lam_s: Level, memory: Any = None) -> Step:
        if not isinstance(lam_t, float) or not isinstance(lam_s, float):
            raise ValueError("`lam_t` and `lam_s` must be floats: this kernel is for the sampling loop")
        denoiser.process.check_mean()
        if lam_s <= lam_t:
            return Step(Gaussian(x_t) if lam_s == lam_t else denoiser.process.noising(x_t, lam_t, lam_s))
        if lam_t == -math.inf:
            raise ValueError("`lam_t` = -inf is pure noise, where no covariance follows from the Jacobian: start from a finite "
                             "level")  # fmt: skip
        with torch.enable_grad():
            z = x_t.detach().requires_grad_()
            graph = denoiser(z, lam_t).mean
        whole = graph.detach()
        mean, keep = whole, None
        if self.clip is not None:
            mean, keep = clip(whole, self.clip), whole if self.keep_eps else None
        process = denoiser.process
        _, b, w, _ = process.coefficients(lam_t, lam_s, self.eta)
        alpha, sigma = process.scales(lam_t)
        share = b * b * sigma * sigma / alpha

        def multiply(v: Tensor) -> Tensor:
            (u,) = torch.autograd.grad(graph, z, v, retain_graph=True)
            if self.symmetric:
                h = difference_step(denoiser, x_t, lam_t) * math.sqrt(v[0].numel())  # rows of v have norm 1
                with torch.no_grad():
                    u = 0.5 * (u + (denoiser(x_t + h * v, lam_t).mean - whole) / h)
            return torch.mul(v, w).add_(u, alpha=share)

        p = process.bridge(mean, x_t, lam_t, lam_s, self.eta, keep)
        return Step(FullGaussian(p.mean, multiply, self.steps, w), Gaussian(mean, POINT))

    def extra_repr(self) -> str:
        return f"steps={self.steps}, eta={self.eta}, clip={self.clip}, keep_eps={self.keep_eps}, symmetric={self.symmetric}"
