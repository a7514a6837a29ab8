"""Training heads: the official loss, unbiased targets by enumeration, variances of the targets, the cost of a step."""

import itertools
import math

import pytest
import torch
from torch import nn

from conftest import golden
from helpers import f64, gaussian_data, refuses, within
from quieten.basis import DCT
from quieten.covariance import HessianDiagonal, Residual, SecondMoment
from quieten.denoiser import Denoiser, Preconditioned
from quieten.gaussian import Gaussian
from quieten.heads import make_head
from quieten.jacobian import product
from quieten.matching import CovarianceMatching
from quieten.nets import MLP, UNet
from quieten.noise import Draws
from quieten.objective import Batch, Noised, noised_by
from quieten.oracle import GaussianData, MixtureData
from quieten.process import FLOW, VE, VP
from quieten.schedule import Linear, Table
from quieten.wrap import Counted, WithCovariance

pytestmark = pytest.mark.usefixtures("one_thread")
LEVELS = Linear(6.0, -6.0)


class Fixed:
    """Draws whose probes are given."""

    def __init__(self, v):
        self.v = v

    def normal(self, like, tag):
        return self.v


def chain() -> Table:
    """The official linear schedule of 1,000 steps."""
    betas = torch.linspace(0.1, 20, 1000, dtype=torch.float64) / 1000
    return Table.from_betas(betas)


class Official(nn.Module):
    """eps = a tanh(W x + b n / 1000), whose Jacobian is not symmetric."""

    def __init__(self, g, dtype):
        super().__init__()
        self.W, self.b, self.a = (torch.as_tensor(g[f"net_{k}"]).to(dtype) for k in "Wba")

    def hidden(self, x, n):
        return torch.tanh(x.flatten(1) @ self.W.T + self.b * (n[:, None] / 1000))

    def forward(self, x, t):
        return (self.a * self.hidden(x, t + 1)).reshape(x.shape)


class OfficialHead(nn.Module):
    def __init__(self, g, net, table, dtype):
        super().__init__()
        self.net, self.table = net, table
        self.w, self.h = (nn.Parameter(torch.as_tensor(g[f"head_{k}"]).to(dtype)) for k in "wb")

    def forward(self, x, eps, lam):
        return (self.w * self.net.hidden(x, self.table.index(lam).to(x) + 1) + self.h).reshape(x.shape)


@pytest.mark.parametrize("dtype", ["f64", "f32"])
@pytest.mark.parametrize(
    ("key", "kind", "mode"),
    [
        ("eps_hes", HessianDiagonal, "ocm"),
        ("eps_eps2", SecondMoment, "sn"),
        ("eps_epsc", Residual, "moment"),
        ("npr_err", Residual, "npr"),
    ],
)
def test_the_loss_and_its_gradient_are_the_official_ones(key, kind, mode, dtype):
    g, table = golden("ocm_objective"), chain()
    float_type = torch.float64 if dtype == "f64" else torch.float32
    net = Official(g, float_type)
    denoiser = Preconditioned(net, VP, "eps", table)
    head = OfficialHead(g, net, table, float_type)
    lam = table.lam[torch.as_tensor(g[f"n_{dtype}"]).long() - 1]
    x0, eps, v = (torch.as_tensor(g[k]).to(float_type) for k in ("x0", f"eps_{dtype}", f"v_{dtype}"))
    alpha, sigma = VP.scales_over(lam, x0)
    noised = Noised(x0, eps, alpha * x0 + sigma * eps, lam, alpha, sigma)
    losses = CovarianceMatching(kind(head), table, mode).loss(denoiser, noised, Fixed(v))
    tolerance = 1e-11 if dtype == "f64" else 1e-5
    want = torch.as_tensor(g[f"{key}_{dtype}_ddm"]).double()
    within(tolerance, ((losses.detach() - want) / want).abs().max(), f"loss {key} {dtype}")
    losses.mean().backward()
    for name, parameter in (("hw", head.w), ("hb", head.h)):
        if f"{key}_{dtype}_grad_{name}" in g:
            want = torch.as_tensor(g[f"{key}_{dtype}_grad_{name}"]).double()
            within(tolerance, (parameter.grad - want).abs().max() / want.abs().max(), f"gradient {name} {key} {dtype}")
