r"""Which K of N levels to visit: fixed spacings, and the least-cost paths of two dynamic programmes.

Levels are numbered as in the papers: 1 is the cleanest, N the noisiest, 0 the data themselves. A choice is an int64 vector,
rising; `take` turns it into a grid of log-SNRs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..likelihoods.decoders import Decoder
from ..noise import Draws
from ..schedule import Table
from ..transition import Ancestral

__all__ = [
    "SPACINGS",
    "dp_seg",
    "dp_vb",
    "edge_costs",
    "linear",
    "linear_ddim",
    "powerp",
    "quad_ddim",
    "shortest_path",
    "split",
    "take",
]

Levels = Table | Tensor | Sequence[float]
"""Log-SNRs of a chain, cleanest first, strictly falling."""


def take(levels: Levels, indices: Tensor) -> Tensor:
    """The grid of chosen levels: log-SNRs from noise to data, float64 (K + 1,), the last +inf.

    Arguments:
        levels: A table, or the N log-SNRs of any chain, cleanest first.
        indices: Numbers from 1 to N, rising: (K,).

    Raises:
        ValueError: For numbers outside 1 to N, or that do not rise.
    """
    chain = _chain(levels)
    indices = torch.as_tensor(indices)
    if indices.ndim != 1 or not len(indices) or indices.is_floating_point() or not (indices[1:] > indices[:-1]).all():
        raise ValueError("`indices` must be whole numbers that rise strictly (see compat in quad_ddim for repeated ones): "
                         f"got {_brief(indices)}")  # fmt: skip
    if indices[0] < 1 or indices[-1] > len(chain):
        raise ValueError(f"`indices` must lie between 1, the cleanest, and {len(chain)} (got {_brief(indices)})")
    return torch.cat([chain[indices.to(chain.device) - 1].flip(0), chain.new_tensor([math.inf])])


# ---- fixed spacings


def linear(K: int, N: int) -> Tensor:
    """1 + k (N - 1) / (K - 1) for k = 0 to K - 1, halves rounded to even; but for those, diffusers' "linspace"."""
    _check_count(K, N)
    return torch.tensor([_round_half_even(K - 1 + k * (N - 1), K - 1) for k in range(K)])


def linear_ddim(K: int, N: int) -> Tensor:
    """1, 1 + N // K, ...: does not end at N.

    Raises:
        ValueError: If this does not make K numbers, as for K = 15 of N = 1000.
    """
    _check_count(K, N)
    indices = torch.arange(1, N + 1, N // K)
    if len(indices) != K:
        raise ValueError(f"`K`={K} does not divide N={N} evenly enough (every {N // K}th level makes {len(indices)}): use "
                         "linear, or another K")  # fmt: skip
    return indices


def quad_ddim(K: int, N: int, compat: str | None = None) -> Tensor:
    """floor(u^2) + 1 for K even points u from 0 to sqrt(0.8 N).

    Arguments:
        K: Number of steps.
        N: Number of levels.
        compat: "official" keeps the small numbers that repeat when K is large (from about 50 of 1000): such a choice makes no
            grid. None refuses them.

    Raises:
        ValueError: For numbers that repeat, without `compat`.
    """
    _check_count(K, N)
    if compat not in (None, "official"):
        raise ValueError(f"`compat` must be None or 'official' (got {compat!r})")
    indices = torch.linspace(0, math.sqrt(0.8 * N), K, dtype=torch.float64).square().long() + 1
    if compat is None and len(indices.unique()) < K:
        raise ValueError(
            f"`K`={K} repeats {K - len(indices.unique())} of N={N} levels in quad_ddim: use fewer steps, or powerp"
        )
    return indices


def powerp(K: int, N: int, p: float = 2.0) -> Tensor:
    """(N - 1) (1 - y^(1/p)) + 1 for y = 1 to 0, rounded, each repetition pushed up by one: dense near the data for p > 1."""
    _check_count(K, N)
    if not p > 0:
        raise ValueError(f"`p` must be positive (got {p})")
    indices = [round((N - 1) * (1.0 - ((K - 1 - k) / (K - 1)) ** (1.0 / p)) + 1.0) for k in range(K)]
    for k in range(1, K):
        indices[k] = max(indices[k], indices[k - 1] + 1)
    for k in reversed(range(K)):  # those that were pushed beyond the end
        indices[k] = min(indices[k], N - (K - 1 - k))
    return torch.tensor(indices)


SPACINGS: dict[str, Callable[[int, int], Tensor]] = {
    "linear": linear,
    "linear_ddim": linear_ddim,
    "quad_ddim": quad_ddim,
    "powerp": powerp,
}
"""The choices that need nothing but K and N, by name."""


# ---- least-cost paths


def shortest_path(F: Tensor, edges: int) -> tuple[Tensor, float]:
    r"""The cheapest path from the first node to the last over exactly that many edges, all of them upward.

    Bellman's recursion :math:`C_k[n] = \min_{s<n} C_{k-1}[s] + F[s, n]`, only for the k that are needed, without storing which
    s was best: going back, each is found again in one column.

    Arguments:
        F: Costs (M, M); entries on and below the diagonal are not looked at, +inf is no edge.
        edges: From 1 to M - 1.

    Returns:
        The nodes, int64 (edges + 1,), and the cost.

    Raises:
        ValueError: If F is not square or holds NaN, or there is no such path.
    """
    M = len(F)
    if F.ndim != 2 or F.shape[1] != M or not 1 <= edges < M:
        raise ValueError(f"`F` must be (M, M) and `edges` between 1 and M - 1 (got {tuple(F.shape)} and {edges})")
    F = _upward(F)
    rows = _bellman(F, edges)
    path, cost = [M - 1], 0.0
    for k in reversed(range(edges)):
        n = path[-1]
        sums = rows[k, k:n] + F[k:n, n]  # a node of k edges is at least the k-th
        if not len(sums) or not bool(sums.min() < math.inf):
            raise ValueError(f"`F` has no path of {edges} edges with a finite cost (NaN, or too many +inf): measure it again")
        path.append(k + int(sums.argmin()))
        cost += float(F[path[-1], n])
    path.reverse()
    return torch.tensor(path), cost


_BLOCK = 128  # rows of F that are added and reduced at once: the sums stay in cache


def _upward(F: Tensor) -> Tensor:
    """F as float64 on the CPU, +inf on and below the diagonal as far as `_bellman` looks there."""
    F = F.detach().to("cpu", torch.float64, copy=True)
    for s in range(0, len(F), _BLOCK):
        block = F[s : s + _BLOCK, s : s + _BLOCK]
        block.masked_fill_(torch.ones_like(block, dtype=torch.bool).tril_(), math.inf)
    return F


def _bellman(F: Tensor, edges: int) -> Tensor:
    """Cost of the cheapest path to each node with 0 to edges - 1 edges: (edges, M).

    Block by block of s, and for each block all numbers of edges: a block is read from memory once, and its own nodes are
    complete for k edges when those for k + 1 are computed.
    """
    M = len(F)
    rows = F.new_full((edges, M), math.inf)
    rows[0, 0] = 0.0
    scratch = F.new_empty(_BLOCK * M)
    for s in range(0, M - 1, _BLOCK):
        for k in range(1, edges):
            end, stop = min(s + _BLOCK, M - 1), M - (edges - k)  # later nodes leave no room for the edges to come
            if end < k or stop <= s + 1:  # not reached with k - 1 edges, or nothing to reach
                continue
            sums = scratch[: (end - s) * (stop - s - 1)].view(end - s, stop - s - 1)
            torch.add(F[s:end, s + 1 : stop], rows[k - 1, s:end, None], out=sums)
            out = rows[k, s + 1 : stop]
            torch.minimum(out, sums.amin(0), out=out)
    return rows


def dp_vb(K: int, F: Tensor) -> tuple[Tensor, float]:
    """The K levels with the least bound, and that bound without its prior: K edges from the data, 0, to N.

    Arguments:
        K: Number of levels, 1 to N.
        F: Measured costs (N + 1, N + 1), see `edge_costs`.

    References:
        | Learning to Efficiently Sample from Diffusion Probabilistic Models (Watson et al., 2021), section 3
        | https://arxiv.org/abs/2106.03802
    """
    if F.ndim != 2 or F.shape[0] != F.shape[1]:
        raise ValueError(f"`F` must be (N + 1, N + 1) (got {tuple(F.shape)}): measure it with edge_costs")
    if not 1 <= K < len(F):
        raise ValueError(f"`K` must be between 1 and the {len(F) - 1} levels of `F` (got {K})")
    path, cost = shortest_path(F, K)
    return path[1:], cost


def dp_seg(K: int, levels: Levels, m: Tensor) -> Tensor:
    r"""The optimal trajectory of Analytic-DPM: the least sum of log(1 - b(s, t) m_t / sigma_t^2) from level 1 to N.

    Where the mean of the squared noise estimate exceeds 1, which no exact one does, the tail of the chain is spaced evenly
    instead: see `split`.

    Arguments:
        K: Number of levels, 2 to N.
        levels: The chain.
        m: m_t = E[mean_i eps_hat_i^2] of each level, (N,), or (N + 1,) with an unused entry for the data first.

    References:
        | Analytic-DPM (Bao et al., 2022), section 5
        | https://arxiv.org/abs/2201.06503
    """
    chain = _chain(levels)
    m = _moments(m, len(chain))
    K1, N1, K2, bad = split(K, m)
    lam, kept = chain[:N1], m[:N1]
    # b / sigma_t^2 = -expm1(lam_t - lam_s), in every process
    share = -torch.expm1(torch.clamp(lam[None] - lam[:, None], max=0.0))
    path, _ = shortest_path(torch.log1p(-share * kept), K1 - 1) if K1 > 1 else (torch.tensor([0]), 0.0)
    tail = [_round_half_even(len(chain) * K2 - k * bad, K2) for k in reversed(range(K2))]
    return torch.cat([path + 1, torch.tensor(tail, dtype=torch.int64)])


def split(K: int, m: Tensor) -> tuple[int, int, int, int]:
    """(K1, N1, K2, bad): K1 levels among the first N1 by cost, K2 evenly over the last `bad`; (K, N, 0, 0) while all m <= 1.

    Raises:
        ValueError: If m is above 1 in half of the chain or more, or K has no room for both parts.
    """
    N = len(m)
    _check_count(K, N)
    above = (m > 1.0).nonzero()
    if not len(above):
        return K, N, 0, 0
    g = int(above[0]) + 1
    bad = 2 * (N - g + 1)
    N1 = N - bad
    if N1 < 1:
        raise ValueError(f"`m` exceeds 1 from level {g} of {N} on: measure it on more examples, or take another spacing")
    K1 = min(math.ceil((1.0 - 0.8 * bad / N) * K), N1, K - 1)
    K1 = max(K1, K - bad)
    if K1 > N1 or (K1 == 1 and N1 > 1):
        raise ValueError(f"`K`={K} is too few for {N1} levels by cost and {bad} evenly: use more steps, or another spacing")
    return K1, N1, K - K1, bad


# ---- the costs of the bound


@torch.no_grad()
def edge_costs(
    denoiser: Denoiser,
    x0: Tensor,
    levels: Levels,
    decoder: Decoder | Callable[[float], Decoder],
    *,
    draws: Draws,
    transition: Ancestral | None = None,
    fit: bool = False,
    bins: int = 256,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    r"""The cost F[s, t] of each step of the bound, for `dp_vb`: mean nats per example, float64 (N + 1, N + 1) on the CPU.

    F[0, t] is the reconstruction at level t; +inf on and below the diagonal. One evaluation per level: with
    :math:`\rho = e^{\lambda_s} - e^{\lambda_t}`, squared errors e of x0 and its variances v,

    .. math:: F[s, t] = \tfrac12 \sum_i \log(1 + \rho v_i) + \rho (e_i - v_i) / (1 + \rho v_i),

    which depends on the images through a histogram of v alone, with the sum of e in each bin.

    Measure on training data: a grid that was chosen on the data of a bound flatters it. F of several batches is the mean of
    theirs.

    Arguments:
        denoiser: Conditions bound.
        x0: Data (B, *).
        levels: The chain of N levels.
        decoder: For F[0, t]; or a function from the level t, a log-SNR, to its decoder.
        draws: As in `elbo`.
        transition: The kernels, with eta = 1; None is `Ancestral()`.
        fit: Give the decoder the variance that suits the error at each level.
        bins: Of the histogram, even in log v.
        progress: Called with the number of levels done.

    Raises:
        ValueError: For kernels that are not those of `Ancestral(1)`, or costs that are not finite.
    """
    transition = Ancestral() if transition is None else transition
    if type(transition) is not Ancestral or transition.eta < 1.0 or transition.keep_eps or transition.range:
        raise ValueError(f"`transition` must be Ancestral(1) without keep_eps and range (got {transition}): the costs are its "
                         "kernel's")  # fmt: skip
    chain = _chain(levels)
    at = (lambda _: decoder) if isinstance(decoder, Decoder) else decoder
    x0 = at(float(chain[0])).prepare(x0 if x0.device.type == "mps" else x0.double(), draws)
    F = torch.full((len(chain) + 1, len(chain) + 1), math.inf, dtype=torch.float64)
    for t, lam_t in enumerate(chain.tolist(), 1):
        alpha, sigma = denoiser.process.scales(lam_t)
        x_t = alpha * x0 + sigma * draws.normal(x0, f"edge {t}")
        step = transition(denoiser, x_t, lam_t, math.inf)
        p: Any = step.p
        error = x0 - p.mean if p.basis is None else p.basis.forward(x0 - p.mean)
        e = error.square()
        own = at(lam_t).fitted(float(e.mean())) if fit else at(lam_t)
        F[0, t] = own(step, x0, x_t, lam_t).mean()
        lam_s = chain[: t - 1]
        rho = torch.exp(lam_s) * -torch.expm1(lam_t - lam_s)
        F[1:t, t] = step_costs(p.var.expand_as(e), e, rho, bins)
        if progress is not None:
            progress(t)
    if not F[torch.ones_like(F, dtype=torch.bool).triu(1)].isfinite().all():
        raise ValueError("`x0` has costs that are not finite: look at the denoiser at the ends of the chain")
    return F


def step_costs(v: Tensor, e: Tensor, rho: Tensor, bins: int = 256) -> Tensor:
    """The diffusion terms of `edge_costs` from one level, mean nats per example: as rho, float64 on the CPU.

    Arguments:
        v: Variances of x0 (B, *), not negative.
        e: Squared errors (B, *).
        rho: Differences of SNR, any number (S,).
        bins: Of the histogram.
    """
    n = max(len(v), 1)
    v, e = v.flatten().double(), e.flatten().double()
    top = v.max() if v.numel() else v.new_ones(())
    floor = torch.maximum(v.clamp_min(1e-12 * top).min(), top * 1e-12) if v.numel() else top
    # one bin more, the first, for what is as good as 0
    width = (torch.log(top / floor) / bins).clamp_min(1e-12)
    place = torch.where(v > 0, (torch.log(v / floor) / width).clamp(0, bins - 1).long() + 1, 0)
    count, sum_v, sum_e, sum_ev = (
        torch.bincount(place, weights, bins + 1).cpu() for weights in (torch.ones_like(v), v, e, e * v)
    )
    used = count > 0
    count, sum_v, sum_e, sum_ev = count[used], sum_v[used], sum_e[used], sum_ev[used]
    mean_v = sum_v / count
    # where the error weighs, v is that of the error's mass: both sums are then exact to second order in the width of a bin
    v_e = torch.where(sum_e > 0, sum_ev / sum_e.clamp_min(1e-300), mean_v)
    rho = rho.cpu().double()[:, None]
    spread = torch.log1p(rho * mean_v) - rho * mean_v / (1.0 + rho * mean_v)
    return 0.5 * (spread @ count + (rho / (1.0 + rho * v_e)) @ sum_e) / n


# ---- inside


def _chain(levels: Levels) -> Tensor:
    chain = levels.lam if isinstance(levels, Table) else torch.as_tensor(levels, dtype=torch.float64)
    if chain.ndim != 1 or not len(chain) or chain.isnan().any() or not (chain[1:] < chain[:-1]).all():
        raise ValueError(f"`levels` must be log-SNRs that fall strictly, cleanest first (got shape {tuple(chain.shape)})")
    return chain.detach().cpu()


def _moments(m: Tensor, N: int) -> Tensor:
    m = torch.as_tensor(m, dtype=torch.float64)
    if m.ndim != 1 or len(m) not in (N, N + 1):
        raise ValueError(f"`m` must hold one number for each of the {N} levels (got shape {tuple(m.shape)})")
    m = m[len(m) - N :]
    if not (m >= 0).all():
        raise ValueError("`m` must not be negative or NaN: it is the mean of squares")
    return m


def _check_count(K: int, N: int) -> None:
    if isinstance(K, bool) or not isinstance(K, int) or not 2 <= K <= N:
        raise ValueError(f"`K` must be a whole number from 2 to N={N} (got {K!r})")


def _round_half_even(numerator: int, denominator: int) -> int:
    """The nearest whole number to a fraction, without rounding it to a float first."""
    whole, rest = divmod(numerator, denominator)
    return whole + (2 * rest > denominator or (2 * rest == denominator and whole % 2))


def _brief(indices: Tensor) -> str:
    values = ", ".join(f"{float(value):g}" for value in indices.flatten()[:6])
    return f"[{values}{', ...' if indices.numel() > 6 else ''}]"
