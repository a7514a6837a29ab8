"""How strange an example is, without an energy: one number per example, high where it is strange.

Features (N, F) are what somebody else made of images, or the pixels themselves. How well a score tells the strange from the
normal is in `metrics.ranking`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..noise import Noise

__all__ = ["denoising_errors", "neighbour_distance", "reconstruction_error"]


@torch.no_grad()
def denoising_errors(
    denoiser: Denoiser,
    x0: Tensor,
    levels: Sequence[float],
    *,
    cond: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    batch: int = 256,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """The loss that DDPM trains on, of every dimension of every example: the mean over `levels` of (eps - eps_hat)^2.

    The mean over dimensions is the score of an example, the mean over channels a map of it. The denoiser is put in evaluation
    mode. Noise belongs to the example, so a score does not depend on the batch.

    Arguments:
        denoiser: Trained on what counts as normal.
        x0: Examples (N, *).
        levels: Log-SNRs, finite.
        cond: Conditions, each (N, ...).
        seed: Of the noise.
        batch: Examples at once.
        progress: Called with the number of examples done.

    Raises:
        ValueError: If there is no level, or one is not finite.
    """
    lams = [float(lam) for lam in levels]
    if not lams or not all(map(math.isfinite, lams)):
        raise ValueError(f"`levels` must be finite log-SNRs (got {lams[:4]})")
    denoiser.eval()
    parts = []
    for i in range(0, len(x0), batch):
        rows = slice(i, min(i + batch, len(x0)))
        x = x0[rows].to(denoiser.device)
        bound = denoiser.bind(**{name: value[rows].to(denoiser.device) for name, value in (cond or {}).items()})
        noise, total = Noise(seed, range(rows.start, rows.stop)), torch.zeros_like(x)
        for k, lam in enumerate(lams):
            eps = noise.normal(x, k, "score")
            x_t = denoiser.process.marginal(x, lam).sample(eps)
            total += (bound.predict(x_t, lam, "eps") - eps).square_()
        parts.append(total.div_(len(lams)).cpu())
        if progress is not None:
            progress(rows.stop)
    return torch.cat(parts) if parts else torch.zeros_like(x0)


def reconstruction_error(train: Tensor, features: Tensor, keep: float = 0.95) -> Tensor:
    """Squared distance to the principal components that hold a share `keep` of the variance of normal data: (N,), float64.

    Arguments:
        train: Features of normal examples (M, *), flattened.
        features: Those to score (N, *).
        keep: Share of variance in (0, 1), or a number of components.
    """
    from sklearn.decomposition import PCA

    normal, x = _rows(train, features)
    model = PCA(keep, svd_solver="full").fit(normal)
    return torch.from_numpy(((x - model.inverse_transform(model.transform(x))) ** 2).sum(1))


def neighbour_distance(train: Tensor, features: Tensor, k: int = 5) -> Tensor:
    """Mean distance to the k nearest normal examples: (N,), float64. Arguments as in `reconstruction_error`."""
    from sklearn.neighbors import NearestNeighbors

    normal, x = _rows(train, features)
    if not 1 <= k <= len(normal):
        raise ValueError(f"`k` must be in 1..{len(normal)}, the normal examples (got {k})")
    return torch.from_numpy(NearestNeighbors(n_neighbors=k, algorithm="brute").fit(normal).kneighbors(x)[0].mean(1))


def _rows(train: Tensor, features: Tensor) -> tuple[Any, Any]:
    normal, x = (t.detach().cpu().double().flatten(1) for t in (train, features))
    if normal.shape[1] != x.shape[1] or not len(normal):
        raise ValueError(f"`train` and `features` must be of one width (got {tuple(train.shape)}, {tuple(features.shape)})")
    return normal.numpy(), x.numpy()
