"""Costs of the bound's steps with an encoder: those of `elbo`, and least-cost paths through them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from helpers import refuses, within
from quieten.denoiser import Denoiser
from quieten.encoder import Contraction, Encoder, LearnedEncoder
from quieten.encoding.encoded import Encoded, Moving
from quieten.encoding.encoded_costs import encoded_costs, widened_costs
from quieten.gaussian import Gaussian, spread_over
from quieten.likelihood import elbo
from quieten.likelihoods.decoders import Plain
from quieten.noise import Draws, Noise
from quieten.oracle import GaussianData
from quieten.process import VP, Process
from quieten.solvers.grids import dp_vb, edge_costs, take
from quieten.transition import Ancestral

CHAIN = torch.linspace(8.0, -5.0, 14, dtype=torch.float64)


class Bent(nn.Module):
    def forward(self, x: Tensor, lam: Tensor) -> Tensor:
        return torch.sin(1.3 * x + 0.2 * spread_over(lam, x))


class Guess(Denoiser):
    """Some estimate of encoded data and of their rate."""

    def __init__(self, counterterm: str, trained: bool = True):
        super().__init__()
        self.process = Encoded(VP, counterterm, trained)

    def forward(self, x: Tensor, lam, **cond) -> Gaussian:
        alpha, sigma = VP.scales_over(lam, x)
        mean = alpha * x / (alpha**2 + 2 * sigma**2) + 0.05 * torch.sin(x)
        return Moving(mean, rate=0.3 * sigma**2 * mean) if self.process.counterterm == "split" else Gaussian(mean)


CASES: list[tuple[Encoder, str]] = [(Contraction(), "sigma2"), (LearnedEncoder(Bent()), "sigma2"),
                                    (LearnedEncoder(Bent()), "none"), (LearnedEncoder(Bent()), "split")]  # fmt: skip


@pytest.mark.parametrize("encoder, counterterm", CASES, ids=lambda part: getattr(part, "__class__", part).__name__)
def test_each_cost_is_the_divergence_of_its_step(encoder: Encoder, counterterm: str):
    """The same noise: to rounding."""
    n, denoiser = 5, Guess(counterterm)
    x0, draws = Noise(0, range(n)).normal(torch.zeros(n, 3, 2, dtype=torch.float64), 0), Draws(1, 0, range(n))
    F = encoded_costs(denoiser, x0, CHAIN, Plain(1e-2), encoder, draws=draws)
    assert F.shape == (15, 15)
    assert bool(F[torch.ones_like(F, dtype=torch.bool).tril()].isinf().all())
    worst = 0.0
    for t, lam_t in enumerate(CHAIN.tolist()):
        alpha, sigma = VP.scales(lam_t)
        x_t = encoder(x0, torch.full((n,), lam_t, dtype=torch.float64))
        z = alpha * x_t + sigma * draws.normal(x0, f"edge {t + 1}")
        step = Ancestral()(denoiser, z, lam_t, math.inf)
        worst = max(worst, abs(float(F[0, t + 1] - Plain(1e-2)(step, x0, z, lam_t).mean())) / (1 + abs(float(F[0, t + 1]))))
        for s in range(t):
            lam_s = float(CHAIN[s])
            q = Process.bridge(denoiser.process, x_t, z, lam_t, lam_s)
            shift = encoder(x0, torch.full((n,), lam_s, dtype=torch.float64)) - x_t
            q = Gaussian(q.mean + VP.scales(lam_s)[0] * shift, q.var)
            kl = q.kl(Ancestral()(denoiser, z, lam_t, lam_s).p).mean()
            worst = max(worst, abs(float(F[s + 1, t + 1] / kl - 1)))
    within(1e-9, worst, "relative difference")


def test_the_cheapest_path_is_cheaper_than_an_even_one():
    """Measured and judged on different examples."""
    encoder, denoiser, n = LearnedEncoder(Bent()), Guess("sigma2"), 400
    x0 = 0.5 * Noise(0, range(2 * n)).normal(torch.zeros(2 * n, 3, dtype=torch.float64), 0)
    F = encoded_costs(denoiser, x0[:n], CHAIN, Plain(1e-2), encoder, draws=Draws(0, 0, range(n)), fit=True)
    totals = []
    for grid in (take(CHAIN, dp_vb(5, F)[0]), take(CHAIN, torch.tensor([1, 4, 8, 11, 14]))):
        decoder = Plain(float(x0.var()) / (1 + math.exp(float(grid[-2]))))
        totals.append(float(elbo(denoiser, x0[n:], decoder, grid, draws=Draws(0, 1, range(n)), encoder=encoder).total.mean()))
    assert totals[0] < totals[1]


def test_the_best_variance_of_each_step():
    """Gaussian data: widened, every path costs the same diffusion (the log of the SNR's ratio); equal variances do not."""
    data = GaussianData(torch.zeros(3, dtype=torch.float64), torch.full((3,), 0.25, dtype=torch.float64), VP)
    n = 4000
    x0 = data.sample(Noise(0, range(n)))
    F = edge_costs(data, x0, CHAIN, Plain(1e-2), draws=Draws(0, 0, range(n)), transition=Ancestral(spread=False))
    wide = widened_costs(F, 3)
    assert torch.equal(wide[0], F[0])
    assert bool((wide[1:] <= F[1:]).all())
    whole = 1.5 * math.log((4 + math.exp(8.0)) / (4 + math.exp(-5.0)))
    for path in ([1, 14], [1, 3, 9, 14], list(range(1, 15))):
        found = sum(float(wide[s, t]) for s, t in pairwise(path))
        within(0.25, abs(found - whole), f"{len(path) - 1} steps")
    assert float(F[1, 14]) > 100 * whole


def test_refusals():
    x0 = torch.zeros(2, 3)
    with refuses("`denoiser`", "edge_costs"):
        encoded_costs(
            GaussianData(torch.zeros(3), torch.ones(3), VP), x0, CHAIN, Plain(1.0), Contraction(), draws=Draws(0, 0, [0, 1])
        )

    class Broken(Guess):
        def forward(self, x: Tensor, lam, **cond) -> Gaussian:
            return Gaussian(x * math.nan)

    with refuses("not finite"):
        encoded_costs(Broken("sigma2"), x0, CHAIN, Plain(1.0), Contraction(), draws=Draws(0, 0, [0, 1]))
