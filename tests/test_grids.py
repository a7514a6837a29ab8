"""Choices of K among N levels: the official code's numbers, brute force, and costs measured two ways."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import refuses, within
from quieten.likelihood import elbo
from quieten.likelihoods.decoders import Discretised, Plain
from quieten.noise import Draws, Noise
from quieten.oracle import GaussianData, MixtureData
from quieten.process import FLOW, VE, VP, Process
from quieten.schedule import Table
from quieten.solvers.grids import (
    SPACINGS,
    dp_seg,
    dp_vb,
    edge_costs,
    linear,
    linear_ddim,
    powerp,
    quad_ddim,
    shortest_path,
    split,
    step_costs,
    take,
)
from quieten.transition import Ancestral

Golden = Callable[[str], dict[str, np.ndarray]]
TABLE = Table.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))


# ---- against the official code


def test_official_spacings(golden: Golden):
    makers = {
        "linear": linear,
        "power2": powerp,
        "linear_ddim": linear_ddim,
        "quad_ddim": lambda K, N: quad_ddim(K, N, compat="official"),
    }
    seen = 0
    for key, indices in golden("ocm_trajectory").items():
        name, _, sizes = key.partition("_N")
        if sizes:
            N, K = map(int, sizes.split("_K"))
            assert makers[name](K, N).tolist() == indices.tolist(), key
            seen += 1
    assert seen == 46


def test_official_trajectories(golden: Golden):
    arrays = golden("ocm_trajectory")
    for K in (5, 10, 25, 50):
        for tail in ("", "badtail_"):
            m = torch.from_numpy(arrays[f"dpseg_ms_eps{'_badtail' if tail else ''}"])
            assert dp_seg(K, TABLE, m).tolist() == arrays[f"dpseg_{tail}K{K}"].tolist()
            assert dp_seg(K, TABLE.lam, m[1:]).tolist() == arrays[f"dpseg_{tail}K{K}"].tolist()
        m = torch.from_numpy(arrays["dpseg_ms_eps_badtail"])[1:]
        assert split(K, m) == tuple(arrays[f"dpseg_badtail_split_K{K}"].tolist())
        assert split(K, torch.ones(1000)) == (K, 1000, 0, 0)
    F = torch.from_numpy(arrays["dpvb_F"])
    for K in (2, 3, 5, 10, 20, 60):
        path, cost = dp_vb(K, F)
        assert path.tolist() == arrays[f"dpvb_K{K}"].tolist()
        within(1e-12, abs(cost / float(arrays[f"dpvb_cost_K{K}"]) - 1), f"cost of {K} steps")


@pytest.mark.parametrize("name", ["linear_1000", "cosine_1000", "vpsde_1000"])
def test_official_schedules(golden: Golden, name: str):
    """Kernel scales from log-SNRs: a, b and the posterior's variance between any two levels."""
    arrays = {key: torch.from_numpy(value) for key, value in golden("ocm_schedule").items()}
    table = Table.from_betas(arrays[f"{name}_betas"][1:])
    alpha, sigma = VP.scales(table.lam)
    within(1e-12, (alpha.square() - arrays[f"{name}_cum_alphas"][1:]).abs().max(), "alpha^2")
    within(1e-12, (sigma.square() - arrays[f"{name}_cum_betas"][1:]).abs().max(), "sigma^2")
    x = torch.ones(1, 1, dtype=torch.float64)
    for i, (s, t) in enumerate(arrays["pairs"].tolist()):
        lam_s = math.inf if s == 0 else table.lam[s - 1].item()
        p = VP.noising(x, lam_s, table.lam[t - 1].item())
        within(1e-12, (p.mean.square() - arrays[f"{name}_skip_alphas"][i]).abs().max(), "a")
        within(1e-12, (p.var - arrays[f"{name}_skip_betas"][i]).abs().max(), "b")
        q = VP.bridge(x, x, table.lam[t - 1].item(), lam_s)
        within(1e-12, (q.var - arrays[f"{name}_tilde_beta"][i]).abs().max(), "tilde beta")


# ---- laws


@pytest.mark.parametrize("name", SPACINGS)
@pytest.mark.parametrize("K, N", [(2, 2), (2, 1000), (10, 1000), (5, 40), (20, 20)])
def test_spacings_choose_distinct_levels(name: str, K: int, N: int):
    if name == "quad_ddim" and K == N > 2:
        with refuses("`K`=", "repeats"):
            quad_ddim(K, N)
        return
    indices = SPACINGS[name](K, N)
    assert len(indices) == K
    assert indices[0] == 1
    assert indices[-1] <= N
    assert (indices.diff() > 0).all()
    grid = take(torch.linspace(9.0, -9.0, N, dtype=torch.float64), indices)
    assert len(grid) == K + 1
    assert grid[-1] == math.inf
    assert (grid.diff() > 0).all()


def test_linear_is_the_tables_linspace():
    for K in (2, 10, 50, 1000):  # where no half is rounded
        assert torch.equal(take(TABLE, linear(K, 1000)), TABLE.grid(K, "linspace"))


@pytest.mark.parametrize("seed", range(3))
def test_paths_equal_brute_force(seed: int):
    generator = torch.Generator().manual_seed(seed)
    for N in (1, 2, 5, 10):
        F = torch.rand(N + 1, N + 1, generator=generator, dtype=torch.float64)
        F[torch.rand(F.shape, generator=generator) < 0.1 * seed] = math.inf
        for K in range(1, N + 1):
            costs = {}
            for inner in itertools.combinations(range(1, N), K - 1):
                nodes = (0, *inner, N)
                costs[nodes] = math.fsum(F[s, t].item() for s, t in itertools.pairwise(nodes))
            best = min(costs, key=lambda nodes: costs[nodes])
            if math.isinf(costs[best]):
                with refuses("`F`", "no path"):
                    dp_vb(K, F)
                continue
            path, cost = dp_vb(K, F)
            assert (0, *path.tolist()) == best
            within(1e-14, abs(cost - costs[best]), f"cost, N={N}, K={K}")


def test_paths_across_blocks_equal_the_plain_recursion():
    """More nodes than a block of rows holds, and junk below the diagonal, which must not be looked at."""
    N = 150
    F = torch.rand(N, N, dtype=torch.float64) * torch.arange(N).add(1).sqrt()
    clean = F.masked_fill(torch.ones(N, N, dtype=torch.bool).tril(), math.inf)
    row = clean[0]
    for edges in range(2, 12):
        row = (row[:, None] + clean).amin(0)
        path, cost = shortest_path(F, edges)
        within(1e-13, abs(cost - float(row[-1])), f"{edges} edges")
        assert len(path) == edges + 1
        assert (path.diff() > 0).all()


def test_trajectory_costs_telescope_on_gaussian_data():
    """With m of isotropic Gaussian data every path costs the same, whatever its levels."""
    c = 0.3
    alpha, sigma = VP.scales(TABLE.lam)
    m = sigma.square() / (alpha.square() * c + sigma.square())
    share = -torch.expm1(torch.clamp(TABLE.lam[None] - TABLE.lam[:, None], max=0.0))
    F = torch.log1p(-share * m)
    costs = [sum(float(F[s - 1, t - 1]) for s, t in itertools.pairwise(linear(K, 1000).tolist())) for K in (2, 5, 40)]
    within(1e-10, max(costs) - min(costs), "difference of path costs")


# ---- measured costs


def exact_costs(v: Tensor, e: Tensor, rho: Tensor) -> Tensor:
    terms = [torch.log1p(r * v) + r * (e - v) / (1 + r * v) for r in rho]
    return torch.stack([0.5 * term.flatten(1).sum(1).mean() for term in terms])


def test_histogram_against_images():
    """Variances over six decades, with exact zeros: 256 bins are within 1e-4 of the sum over images."""
    generator = torch.Generator().manual_seed(0)
    v = torch.exp(-7 + 3 * torch.randn(20, 3, 16, 16, generator=generator, dtype=torch.float64)).clamp_max(1.0)
    e = v * torch.randn(v.shape, generator=generator, dtype=torch.float64).square()
    v[torch.rand(v.shape, generator=generator) < 0.1] = 0.0
    rho = torch.logspace(-4, 5, 30, dtype=torch.float64)
    exact = exact_costs(v, e, rho)
    within(1e-4, ((step_costs(v, e, rho) - exact) / exact).abs().max(), "256 bins")
    scalar = torch.full_like(v, 0.01)
    within(1e-12, ((step_costs(scalar, e, rho) - exact_costs(scalar, e, rho)) / exact).abs().max(), "one variance")
    none = torch.zeros_like(v)
    within(1e-12, (step_costs(none, e, rho) / exact_costs(none, e, rho) - 1).abs().max(), "no variance")


@pytest.mark.parametrize("process", [VP, VE, FLOW], ids=str)
@pytest.mark.parametrize("spread", [True, False])
def test_costs_add_up_to_the_bound(process: Process, spread: bool):
    """The mean of the bound's terms on a grid is the cost of its path, to Monte Carlo error."""
    data = GaussianData(torch.tensor([0.3, -0.2, 0.1]).double(), torch.tensor([0.05, 0.3, 0.9]).double(), process)
    chain = torch.linspace(8.0, -4.0, 8, dtype=torch.float64)
    n, transition, decoder = 20_000, Ancestral(spread=spread), Plain(1e-3)
    x0 = data.sample(Noise(1, range(n)))
    F = edge_costs(data, x0, chain, decoder, draws=Draws(2, 0, range(n)), transition=transition)
    nodes = [2, 5, 8]
    bound = elbo(data, x0, decoder, take(chain, torch.tensor(nodes)), draws=Draws(3, 0, range(n)), transition=transition)
    edges = [F[s, t] for s, t in itertools.pairwise([0, *nodes])]
    terms = [bound.reconstruction, *bound.diffusion.flip(1).T]
    for found, term in zip(edges, terms, strict=True):
        within(6 * float(term.std()) / math.sqrt(n), abs(found - term.mean()), "edge against term")


def test_decoders_by_level():
    """As released: the variance of the decoder is sigma_t^2 where the first step starts at level t."""
    data = GaussianData(torch.zeros(2), torch.tensor([0.3, 0.6]), VP)
    chain, x0 = torch.tensor([6.0, 1.0, -5.0], dtype=torch.float64), data.sample(Noise(1, range(50)))
    by_level = edge_costs(data, x0, chain, lambda lam: Plain(VP.scales(lam)[1] ** 2), draws=Draws(2, 0, range(50)))
    for t, lam in enumerate(chain.tolist(), 1):
        one = edge_costs(data, x0, chain, Plain(VP.scales(lam)[1] ** 2), draws=Draws(2, 0, range(50)))
        assert by_level[0, t] == one[0, t]
        assert torch.equal(by_level[1:], one[1:])


def test_costs_in_another_basis():
    q, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    data = GaussianData(torch.zeros(3), q @ torch.diag(torch.tensor([0.01, 0.2, 1.0]).double()) @ q.T, VP)
    chain, n = torch.tensor([6.0, 1.0, -5.0], dtype=torch.float64), 20_000
    x0 = data.sample(Noise(1, range(n)))
    F = edge_costs(data, x0, chain, Plain(1e-3), draws=Draws(2, 0, range(n)))
    term = elbo(data, x0, Plain(1e-3), chain.flip(0), draws=Draws(3, 0, range(n))).diffusion[:, 0]
    within(6 * float(term.std()) / math.sqrt(n), abs(F[2, 3] - term.mean()), "edge against term")


def test_chosen_grids_are_no_worse_than_even_ones():
    data = MixtureData(torch.tensor([[-0.7], [0.1], [0.8]]), torch.tensor([0.05, 0.1, 0.02]) ** 2, process=VP)
    chain, n = TABLE.lam[::25], 4000
    x0 = data.sample(Noise(1, range(n)))
    decoder = Plain()
    F = edge_costs(data, x0, chain, decoder, draws=Draws(2, 0, range(n)), fit=True)
    for K in (3, 6, 12):
        path, cost = dp_vb(K, F)
        even = [0, *linear(K, len(chain)).tolist()]
        assert cost <= math.fsum(F[s, t].item() for s, t in itertools.pairwise(even))
        fresh = data.sample(Noise(5, range(n)))
        var = decoder.fitted(float((fresh - data(fresh, chain[path[0] - 1].item()).mean).square().mean()))
        better = elbo(data, fresh, Plain(max(var.var or 0.0, 1e-4)), take(chain, path), draws=Draws(4, 0, range(n))).total
        worse = elbo(data, fresh, Plain(1e-4), take(chain, linear(K, len(chain))), draws=Draws(4, 0, range(n))).total
        assert better.mean() < worse.mean() + 4 * (better.std() + worse.std()) / math.sqrt(n)


# ---- refusals


@pytest.mark.parametrize("maker", [linear, linear_ddim, quad_ddim, powerp])
@pytest.mark.parametrize("K, N", [(1, 10), (11, 10), (0, 10), (2.0, 10), (True, 10)])
def test_counts_out_of_range(maker: Callable[[int, int], Tensor], K: int, N: int):
    with refuses("`K`", "from 2 to N=10"):
        maker(K, N)


def test_refusals():
    with refuses("`K`=15", "16", "linear"):
        linear_ddim(15, 1000)
    with refuses("`K`=100", "repeats", "powerp"):
        quad_ddim(100, 1000)
    with refuses("`compat`", "'oficial'"):
        quad_ddim(5, 10, "oficial")
    with refuses("`p`", "0"):
        powerp(5, 10, 0)
    for indices in ([3, 2], [1, 1, 2], [], [[1, 2]], [1.5, 2.5]):
        with refuses("`indices`", "rise strictly"):
            take(TABLE, torch.tensor(indices))
    for indices in ([0, 3], [5, 1001]):
        with refuses("`indices`", "between 1"):
            take(TABLE, torch.tensor(indices))
    with refuses("`levels`", "fall strictly"):
        take([1.0, 2.0], torch.tensor([1, 2]))
    with refuses("`m`", "1000 levels"):
        dp_seg(5, TABLE, torch.ones(999))
    with refuses("`m`", "negative or NaN"):
        dp_seg(5, TABLE, torch.full((1000,), math.nan))
    with refuses("`m`", "from level 400 of 1000"):
        split(10, torch.cat([torch.ones(399), torch.full((601,), 1.1)]))
    with refuses("`K`", "from 2 to N=1000"):
        dp_seg(1001, TABLE, torch.ones(1000))
    with refuses("`K`", "60 levels"):
        dp_vb(61, torch.rand(61, 61))
    with refuses("`F`", "(61, 60)"):
        dp_vb(2, torch.rand(61, 60))
    with refuses("`F`", "no path", "measure it again"):
        dp_vb(2, torch.full((4, 4), math.nan))
    with refuses("`edges`", "5"):
        shortest_path(torch.rand(4, 4), 5)
    data = GaussianData(torch.zeros(2), torch.ones(2), VP)
    with refuses("`transition`", "Ancestral(1)"):
        edge_costs(data, torch.zeros(1, 2), [3.0, 1.0], Discretised(1e-3), draws=Draws(0, 0, [0]), transition=Ancestral(0.0))
