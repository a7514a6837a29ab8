"""Scores without an energy."""

from __future__ import annotations

import math

import pytest
import torch

from helpers import refuses, within
from quieten.metrics import auroc
from quieten.metrics.scores import denoising_errors, neighbour_distance, reconstruction_error
from quieten.oracle import GaussianData
from quieten.process import VE, VP


def test_refusals() -> None:
    with refuses("`levels`"):
        denoising_errors(GaussianData(torch.zeros(2), 1.0), torch.zeros(3, 2), [math.inf])
    with refuses("`k`", "1..4"):
        neighbour_distance(torch.zeros(4, 2), torch.zeros(1, 2), k=5)
    with refuses("one width"):
        reconstruction_error(torch.zeros(4, 2), torch.zeros(1, 3))


@pytest.mark.parametrize("process", [VP, VE])
def test_denoising_error_has_its_expectation(process) -> None:
    """For Gaussian data known to the denoiser, E (eps - eps_hat)^2 at x0 is in closed form, per dimension."""
    data = GaussianData(torch.tensor([0.5, -1.0]), torch.tensor([0.3, 2.0]), process)
    x0, lam = torch.tensor([[0.5, 1.0]], dtype=torch.float64).expand(20_000, 2), 0.3
    got = denoising_errors(data, x0, [lam])
    alpha, sigma = data.process.scales(lam)
    total = alpha**2 * data.var + sigma**2
    # eps - eps_hat = eps - sigma (alpha (x0 - m) + sigma eps) / total
    want = (1 - sigma**2 / total).square() + (sigma * alpha * (x0[0] - data.mean) / total).square()
    error = (got.mean(0) - want).abs() / (got.std(0) / math.sqrt(len(x0)))
    within(4.0, error.max(), "mean error less its expectation, in standard errors")


def test_denoising_error_is_of_the_example_alone() -> None:
    data = GaussianData(torch.zeros(1, 2, 2), 1.0, VP)
    x0 = torch.randn(5, 1, 2, 2)
    whole = denoising_errors(data, x0, [-1.0, 1.0], batch=5)
    assert whole.shape == x0.shape
    assert torch.equal(whole, denoising_errors(data, x0, [-1.0, 1.0], batch=2))
    assert denoising_errors(data, x0[:0], [0.0]).shape == (0, 1, 2, 2)


def test_baselines_find_what_leaves_the_plane() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(3, 10, generator=generator)
    normal, test = (torch.randn(n, 3, generator=generator) @ basis for n in (200, 50))
    away = test + torch.linalg.svd(basis, full_matrices=True).Vh[5]
    within(1e-9, reconstruction_error(normal, test, keep=3).max(), "distance to the plane of what lies in it")
    assert torch.allclose(reconstruction_error(normal, away, keep=3), torch.ones(50).double(), atol=1e-6)
    both = torch.cat([test, 3 * away])
    strange = torch.arange(100) >= 50
    assert auroc(neighbour_distance(normal, both), strange).value > 0.9
    assert neighbour_distance(normal, normal, k=1).max() < 1e-4
