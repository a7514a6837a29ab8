"""Linear policies under quadratic energies, where everything is known, and noise of plus and minus one.

A policy x' = A x + b + rho eps with V = K |x|^2 / 2 + G . 1 x + C has quadratic values for ever. Expectations of quadratics
need second moments only, and those of the 2^n corners of a cube are those of a normal: means over such rows are exact.
"""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor, nn

from quieten import VE, Denoiser, karras
from quieten.gaussian import Gaussian
from quieten.tuning.pairs import Pairs
from quieten.tuning.policy import Policy
from quieten.tuning.policy_schedule import Consistency

__all__ = [
    "Affine", "Asked", "Corners", "Linear", "Quadratic", "Quadratics", "Still",
    "affine_policy", "corners", "evaluated", "marginals", "pairs_of", "soft_optimum",
]  # fmt: skip


class Affine(Denoiser):
    """A_k x + b_k at the level of step k: with `Consistency` steps, the mean of a policy."""

    def __init__(self, A: Tensor, b: Tensor, lams: Tensor, shape: tuple[int, ...]):
        super().__init__()
        self.A, self.b, self.lams = nn.Parameter(A.clone()), nn.Parameter(b.clone()), lams[:-1]
        self.process, self.shape = VE, shape

    def forward(self, x, lam, **cond):
        lam = torch.as_tensor(lam, dtype=torch.float64).reshape(-1, 1)
        k, ones = (lam - self.lams).abs().argmin(1), (-1, *[1] * (x.ndim - 1))
        return Gaussian(self.A[k].reshape(ones) * x + self.b[k].reshape(ones))


class Quadratics(nn.Module):
    """V(x, k) = K_k |x|^2 / 2 + G_k sum(x) + C_k, of tables (T + 1,)."""

    def __init__(self, K: Tensor, G: Tensor, C: Tensor):
        super().__init__()
        self.K, self.G, self.C = (nn.Parameter(t.clone()) for t in (K, G, C))

    def forward(self, x: Tensor, k, **cond) -> Tensor:
        rows = x.flatten(1)
        return 0.5 * self.K[k] * rows.square().sum(1) + self.G[k] * rows.sum(1) + self.C[k]


class Corners:
    """In place of `Draws`: the same normals for every tag that ends in a step's number, as given."""

    def __init__(self, noise: Tensor):
        self.eps = noise

    def normal(self, like: Tensor, tag: str = "") -> Tensor:
        last = tag.rsplit(" ", 1)[-1]
        return self.eps[int(last)] if last.isdigit() and self.eps.ndim > like.ndim else self.eps


def corners(n: int) -> Tensor:
    """The corners of a cube, (2^n, n) of plus and minus one."""
    return torch.tensor(list(product((-1.0, 1.0), repeat=n)), dtype=torch.float64)


def affine_policy(A: Tensor, b: Tensor, rho: Tensor, dims: int = 1) -> Policy:
    """x' = A_k x + b_k + rho_k eps, all trained."""
    grid = karras(len(A), 0.1, 10.0)
    return Policy(Affine(A, b, grid, (dims,)), grid, Consistency(), std=rho.double(), trained="all")


def evaluated(
    K: float, G: float, C: float, policy: Policy, s2: Tensor, tau1: float, tau2: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Values of a policy by the exact recursion, energies summed over dimensions: (K, G, C), each (T + 1,)."""
    A, b, rho, dims = policy.denoiser.A.detach(), policy.denoiser.b.detach(), policy.rhos, policy.shape[0]
    rows = [(K, G, C)]
    for k in reversed(range(policy.T)):
        K, G, C = rows[0]
        a, c, r, s = (float(t[k]) for t in (A, b, rho, s2))
        rows.insert(0, (
            a * a * K + tau2 * (a - 1) ** 2 / s,
            a * (K * c + G) + tau2 * (a - 1) * c / s,
            C + dims * (0.5 * K * (c * c + r * r) + G * c - 0.5 * tau1 * (1 + math.log(2 * math.pi * r * r))
                        + tau2 * (c * c + r * r) / (2 * s)),
        ))  # fmt: skip
    return tuple(torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))


def soft_optimum(kappa: float, m: float, s2: Tensor, tau: float, dims: int) -> tuple[Policy, Quadratics]:
    """The optimal policy and values of E = kappa |x - m|^2 / 2: a recursion of kappa, P_k and c_k."""
    T, ks, cs, Ps = len(s2), [kappa], [0.0], []
    for k in reversed(range(T)):
        s = float(s2[k])
        Ps.insert(0, 1.0 / (ks[0] / tau + 1.0 / s))
        cs.insert(0, cs[0] - 0.5 * tau * dims * math.log(2 * math.pi * Ps[0]))
        ks.insert(0, ks[0] / (1.0 + ks[0] * s / tau))
    P, kappas = torch.tensor(Ps, dtype=torch.float64), torch.tensor(ks, dtype=torch.float64)
    policy = affine_policy(P / s2, P * kappas[1:] * m / tau, P.sqrt(), dims)
    c = torch.tensor(cs, dtype=torch.float64)
    return policy, Quadratics(kappas, -kappas * m, 0.5 * kappas * m * m * dims + c)


def marginals(policy: Policy, mean: float, var: float) -> tuple[Tensor, Tensor]:
    """Mean and variance of each state of an affine policy: (T + 1,) each."""
    means, variances = [mean], [var]
    for k in range(policy.T):
        a, b, rho = (float(t[k]) for t in (policy.denoiser.A.detach(), policy.denoiser.b.detach(), policy.rhos))
        means.append(a * means[-1] + b)
        variances.append(a * a * variances[-1] + rho * rho)
    return torch.tensor(means, dtype=torch.float64), torch.tensor(variances, dtype=torch.float64)


def pairs_of(policy: Policy, mean: float, var: float) -> tuple[Pairs, Corners]:
    """All states of a one-dimensional policy and the noise of their steps, by moments."""
    means, variances = marginals(policy, mean, var)
    node = corners(2)
    x = torch.cat([means[k] + variances[k].sqrt() * node[:, :1] for k in range(policy.T)])
    k = torch.arange(policy.T).repeat_interleave(4)
    return Pairs(x, k, {}, (), (torch.zeros_like(k), torch.arange(len(k)))), Corners(node[:, 1:].repeat(policy.T, 1))


class Still(Denoiser):
    """A denoiser that keeps the state: for tests in which only the noise matters."""

    def __init__(self, shape, process=VE):
        super().__init__()
        self.shape, self.process = shape, process

    def forward(self, x, lam, **cond):
        return Gaussian(x)


class Quadratic(nn.Module):
    """V(x, k) = a_k mean(x^2) / 2 + g_k mean(x) + c_k, the value of the golden arrays; one column is for all times."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.table = nn.Parameter(torch.as_tensor(table).clone())

    def forward(self, x: Tensor, k, **cond) -> Tensor:
        a, g, c = self.table[:, 0] if self.table.shape[1] == 1 else self.table[:, k]
        rows = x.flatten(1)
        return 0.5 * a * rows.square().mean(1) + g * rows.mean(1) + c


class Linear(Denoiser):
    """E[x0 | x_t] = w x + b, learned: a policy of one affine step where the grid goes straight to the data."""

    def __init__(self, shape, steps: int = 1, process=VE):
        super().__init__()
        self.shape, self.process = shape, process
        self.w, self.b = nn.Parameter(torch.full((steps,), 0.7)), nn.Parameter(torch.zeros(steps))

    def forward(self, x, lam, label=None, **cond):
        lam = torch.as_tensor(lam, dtype=torch.float64)
        k = (lam.reshape(-1, 1) - self.lams).abs().argmin(1) if len(self.w) > 1 else torch.zeros(1, dtype=torch.long)
        shape = (-1, *[1] * (x.ndim - 1))
        return Gaussian(self.w[k].reshape(shape) * x + self.b[k].reshape(shape))


class Asked(Quadratic):
    """Records what it is asked."""

    def __init__(self, table, **attributes):
        super().__init__(table)
        self.calls = []
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x, k, **cond):
        self.calls.append(k if k is None or isinstance(k, int) else tuple(sorted(set(k.tolist()))))
        return super().forward(x, 0 if k is None else k, **cond)
