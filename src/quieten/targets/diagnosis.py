r"""How noisy training is at each level: the variance of plain and of stable targets, and what is left of a network's loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..noise import Noise
from ..schedule import Schedule
from .pools import distinct
from .posterior import posterior, unpacked, wide

__all__ = ["NetworkLoss", "TargetVariance", "level_density", "network_loss", "target_variance"]


@dataclass(frozen=True)
class TargetVariance:
    r"""Variance of the targets of x0 at each of L levels, averaged over noisy examples, per element.

    Multiplied by alpha^2 / sigma^2 (`in_eps`) it is that of the targets of eps, which every form of network sees alike.
    Multiplied by the number of elements D it is a trace, as `TargetStats.variance` and the paper's V are; V, of targets of the
    score, has the factor alpha^2 / sigma^4 too.

    Attributes:
        lam: The levels, float64 (L,).
        plain: E Tr Cov(x0 | x_t) / D (L,): what no network can learn away. NaN with the estimator "online".
        stable: For each number of references n, the same of the stable target (L,). NaN with the estimator "online".
        within: For each n, the variance that averaging over the references took away (L,): `plain` less `stable`, on average.
        ess: For each n, the mean effective number of references (L,).
        largest: For each n, the mean of the largest weight (L,).
        mean: E[x0 | x_t] of each example at each level (L, K, *): what `plain` and `stable` are measured against; None without.
        x0: The examples (K, *).
        eps: Their noise (K, *); x_t = alpha x0 + sigma eps.
        index: Their places in the data (K,).
    """

    lam: Tensor
    plain: Tensor
    stable: dict[int, Tensor]
    within: dict[int, Tensor]
    ess: dict[int, Tensor]
    largest: dict[int, Tensor]
    mean: Tensor | None
    x0: Tensor
    eps: Tensor
    index: Tensor

    @property
    def in_eps(self) -> Tensor:
        """alpha^2 / sigma^2 (L,)."""
        return self.lam.exp()

    @property
    def phases(self) -> list[int]:
        """The paper's phases: 1 near the data, where one example has all the weight; 2 where several compete, and the variance
        of eps is at least half of its peak; 3 at high noise, where everything has weight and averages out."""
        v = self.plain * self.in_eps
        peak = int(v.nan_to_num(-1.0).argmax())
        middle = v >= 0.5 * v[peak]
        return [2 if m else 1 if lam > self.lam[peak] else 3 for m, lam in zip(middle.tolist(), self.lam, strict=True)]


def target_variance(
    data: Tensor,
    levels: Tensor | Sequence[float],
    n: int | Sequence[int] = (64, 1024),
    estimator: Literal["exact", "online"] = "exact",
    *,
    labels: Tensor | None = None,
    pairs: int = 256,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> TargetVariance:
    r"""Measures how noisy regression targets are, per level, on K pairs (x0, x_t).

    "exact" knows E[x0 | x_t], with all of the data as equally likely: the plain target's variance is that of the posterior, the
    stable target's its mean squared distance from E[x0 | x_t]. "online" looks at the n references alone, as training does, and
    tells what they take away.

    Arguments:
        data: Examples (N, *), floats, or uint8 pixels that stand for k / 127.5 - 1: the whole set, or a large part of it.
        levels: Log-SNRs, finite.
        n: Numbers of references, the example itself among them.
        estimator: "exact" or "online".
        labels: int64 (N,): references then are of the example's class only, as for a network that is told the class.
        pairs: K, at most N.
        seed: Chooses examples, their noise (the same at every level) and their references.
        progress: Called with the number of levels done.

    Raises:
        ValueError: For levels that are not finite, or numbers below 1.

    References:
        | Stable Target Field for Reduced Variance Score Estimation in Diffusion Models (Xu et al., 2023), section 3 and fig. 2
        | https://arxiv.org/abs/2302.00670
    """
    lam = torch.as_tensor(levels, dtype=torch.float64).cpu().reshape(-1)
    counts = [n] if isinstance(n, int) else list(n)
    if not lam.isfinite().all() or not len(lam):
        raise ValueError(f"`levels` must be finite log-SNRs (got {lam.tolist()[:5]}): leave out pure data and pure noise")
    if estimator not in ("exact", "online") or not all(count >= 1 for count in counts) or pairs < 1 or len(data) < 1:
        raise ValueError(f"`n` and `pairs` must be at least 1, `data` not empty, `estimator` exact or online "
                         f"(got n={n}, pairs={pairs}, {len(data)} examples, {estimator!r})")  # fmt: skip
    work = _Work(data, labels, min(pairs, len(data)), seed)
    plain, means = torch.full_like(lam, torch.nan), []
    tables: dict[str, dict[int, Tensor]] = {
        name: {count: torch.full_like(lam, torch.nan) for count in counts} for name in ("stable", "within", "ess", "largest")
    }
    for i, level in enumerate(lam.tolist()):
        truth = None
        if estimator == "exact":
            plain[i], truth = work.exact(level)
            means.append(work.x0 + truth.reshape(work.x0.shape).to(work.x0.dtype))
        for count in counts:
            for name, value in work.with_references(level, count, truth).items():
                tables[name][count][i] = value
        if progress is not None:
            progress(i + 1)
    mean = torch.stack(means) if means else None
    return TargetVariance(lam, plain, **tables, mean=mean, x0=work.x0, eps=work.eps, index=work.index)


class _Work:
    """The pairs of `target_variance`, in the unit of the data: x = x0 + exp(-lam / 2) eps."""

    def __init__(self, data: Tensor, labels: Tensor | None, pairs: int, seed: int):
        self.data, self.labels, self.seed = data.flatten(1), labels, seed
        none = torch.empty(0, dtype=torch.int64)
        self.index = distinct(pairs, len(data), none, seed, 0, "pairs")
        dtype = data.dtype if data.dtype == torch.float64 else torch.float32
        self.x0 = unpacked(data[self.index.to(data.device)], dtype)
        self.eps = Noise(seed, self.index).normal(self.x0, 0, "diagnosis")
        self.elements = max(1, self.x0[0].numel())

    def _posterior(self, level: float, rows: slice, refs: Tensor, labels: Tensor | None) -> tuple[Tensor, ...]:
        x0, eps = self.x0[rows].flatten(1), self.eps[rows].flatten(1)
        sigma = torch.full((len(x0),), math.exp(-0.5 * level), dtype=wide(x0.device), device=x0.device)
        mask = None
        if labels is not None and self.labels is not None:
            mask = self.labels[self.index[rows].to(self.labels.device)][:, None] == labels[None]
        p = posterior(x0 + sigma[:, None].to(x0) * eps, refs, torch.ones_like(sigma), sigma, base=x0, mask=mask)
        return p.shift, p.within, p.ess, p.largest

    def exact(self, level: float) -> tuple[float, Tensor]:
        """Variance of the plain target per element, and E[x0 | x_t] - x0 (K, D)."""
        shift, within, _, _ = self._posterior(level, slice(None), self.data, self.labels)
        return float(within.mean()) / self.elements, shift

    def with_references(self, level: float, n: int, truth: Tensor | None) -> dict[str, float]:
        """What n references do; the pairs are taken n at a time, so that each is among the references of its group."""
        if n == 1:  # the example itself
            stable = math.nan if truth is None else float(truth.square().sum(1).mean()) / self.elements
            return {"stable": stable, "within": 0.0, "ess": 1.0, "largest": 1.0}
        sums = dict.fromkeys(("stable", "within", "ess", "largest"), 0.0)
        for group, start in enumerate(range(0, len(self.x0), n)):
            rows = slice(start, min(start + n, len(self.x0)))
            own = self.index[rows]
            more = distinct(n - len(own), len(self.data), own, self.seed, group, f"references {n}")
            at = torch.cat([own, more]).to(self.data.device)
            labels = None if self.labels is None else self.labels[at.to(self.labels.device)]
            shift, within, ess, largest = self._posterior(level, rows, self.data[at], labels)
            sums["within"] += float(within.sum()) / self.elements
            sums["ess"] += float(ess.sum())
            sums["largest"] += float(largest.sum())
            sums["stable"] += math.nan if truth is None else float((shift - truth[rows]).square().sum()) / self.elements
        return {name: value / len(self.x0) for name, value in sums.items()}


@dataclass(frozen=True)
class NetworkLoss:
    """A network's squared error of x0 at each of L levels, per element.

    Attributes:
        loss: E ||x0 - D(x_t)||^2 / D (L,).
        gap: E ||E[x0 | x_t] - D(x_t)||^2 / D (L,): the part that training could still take away on these data.
    """

    loss: Tensor
    gap: Tensor


@torch.no_grad()
def network_loss(
    denoiser: Denoiser,
    variance: TargetVariance,
    labels: Tensor | None = None,
    batch: int = 64,
    progress: Callable[[int], None] | None = None,
) -> NetworkLoss:
    """Measures a denoiser on the pairs of a `target_variance` of the same data.

    Arguments:
        denoiser: Its conditions bound, or none, or "label".
        variance: With the estimator "exact".
        labels: Condition "label" of each pair, int64 (K,); None for none.
        batch: States at once.
        progress: Called with the number of levels done.
    """
    if variance.mean is None:
        raise ValueError("`variance` was estimated online: the gap needs the estimator 'exact'")
    loss, gap = torch.zeros_like(variance.lam), torch.zeros_like(variance.lam)
    for i, lam in enumerate(variance.lam.tolist()):
        alpha, sigma = denoiser.process.scales(lam)
        for start in range(0, len(variance.x0), batch):
            rows = slice(start, start + batch)
            x0, best = variance.x0[rows], variance.mean[i, rows]
            cond = {} if labels is None else {"label": labels[rows].to(x0.device)}
            guess = denoiser(alpha * x0 + sigma * variance.eps[rows], lam, **cond).mean
            loss[i] += float((guess - x0).double().square().sum()) / variance.x0.numel()
            gap[i] += float((guess - best).double().square().sum()) / variance.x0.numel()
        if progress is not None:
            progress(i + 1)
    return NetworkLoss(loss, gap)


@torch.no_grad()
def level_density(schedule: Schedule, lam: Tensor, draws: int = 8192) -> Tensor:
    """Density of training levels per unit of ln(sigma / alpha) at each of the levels lam (L,)."""
    u = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    seen = -0.5 * schedule(u).double().cpu()
    at = -0.5 * lam
    width = 0.05 + 0.5 * float(at.diff().abs().median()) if len(at) > 1 else 0.25
    low, high = (torch.searchsorted(seen.sort().values, at + side).double() for side in (-width, width))
    return (high - low) / (draws * 2 * width)
