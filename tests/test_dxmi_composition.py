"""Policies of what other parts of the library make: adapters, learned variances, pretrained networks, guidance."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from dxmi_toys import Still
from helpers import gaussian_data, within
from quieten import DCT, VE, VP, Ancestral, Draws, Noise, Preconditioned, WithCovariance, generate, karras
from quieten.encoding.encoded import Encoded
from quieten.imitation import MaxEntIRL
from quieten.interop.network import Network
from quieten.nets import UNet
from quieten.tuning.adapters import adapted, inject
from quieten.tuning.energies import PerceptronValue, ResidualValue
from quieten.tuning.policy import Policy
from quieten.tuning.policy_schedule import edm_grid
from quieten.tuning.settings import Settings

QUICK = Settings(lr_policy=1e-3, lr_value=1e-3, n_generator="all")


def unet(**options) -> nn.Module:
    net = UNet(1, 8, width=8, detail=4, **options)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    return net


def diffusers_unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    model = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=8, **blocks,
    )  # fmt: skip
    return Network(model)


@pytest.mark.parametrize("make", [unet, diffusers_unet])
def test_adapters_are_all_that_is_trained(make):
    denoiser = Preconditioned(make(), VP, shape=(1, 8, 8))
    plain = {name: p.detach().clone() for name, p in denoiser.named_parameters()}
    names = inject(denoiser, rank=2)
    policy = Policy(denoiser, karras(3, 0.05, 20.0))
    irl = MaxEntIRL(policy, ResidualValue((1, 8, 8), width=4), settings=QUICK)
    for i in range(2):
        told = irl.iterate(torch.randn(6, 1, 8, 8), None, Draws(0, i, range(6)))
    for name, p in denoiser.named_parameters():
        if name in plain:
            assert torch.equal(p, plain[name]), name
    moved = [bool((layer.adapter_up != 0).any()) for _, layer in adapted(denoiser)]
    assert sum(moved) >= len(names) - 4  # a few layers see the time alone, or nothing behind a zero
    assert told["rho"].shape == (3,)


def test_labels_reach_policy_and_value():
    denoiser = Preconditioned(unet(classes=3), VP, shape=(1, 8, 8))
    policy = Policy(denoiser, karras(3, 0.05, 20.0))
    irl = MaxEntIRL(policy, ResidualValue((1, 8, 8), width=4, classes=3), settings=QUICK)
    label = torch.tensor([0, 1, 2, 0, 1])
    irl.iterate(torch.randn(5, 1, 8, 8), {"label": label}, Draws(0, 0, range(5)))
    roll = policy.rollout(5, Noise(0, range(5)), {"label": label})
    drawn = generate(denoiser, 5, grid=policy.grid, transition=policy.transition, cond={"label": label}, last="draw")
    within(1e-4, (roll.final - drawn).abs().max(), "samples with labels")


@pytest.mark.parametrize("basis", [None, DCT(4)], ids=["pixels", "cosines"])
def test_learned_variances_of_any_basis_can_be_kept(basis):
    class Source:
        def __init__(self):
            self.basis = basis

        def __call__(self, denoiser, x, lam, p):
            return (0.1 + 0.1 * torch.tanh(x).square()) * (1.0 if isinstance(lam, float) else torch.ones_like(x))

    denoiser = WithCovariance(Preconditioned(unet(), VE, shape=(1, 8, 8)), Source())
    policy = Policy(denoiser, edm_grid(3, 0.1, 5.0), Ancestral(), std="kernel")
    settings = Settings(lr_policy=1e-3, lr_value=1e-3, entropy_in_value=0, velocity_in_value=0, analytic_cost=True)
    irl = MaxEntIRL(policy, ResidualValue((1, 8, 8), width=4), settings=settings)
    told = irl.iterate(torch.randn(6, 1, 8, 8), None, Draws(0, 0, range(6)))
    assert all(bool(t.isfinite().all()) for t in told.values())
    assert (policy.log_std[:2] != 0).all()
    assert policy.log_std[2] == 0


@pytest.mark.parametrize("cost", ["brownian", "forward"])
def test_a_model_with_an_encoder_is_a_policy_too(cost):
    """Its process shifts the mean of the kernel; steps and tuning take that as it is."""
    denoiser = Preconditioned(unet(), Encoded(VP), shape=(1, 8, 8))
    assert Policy(Still((2,), Encoded(VP, "split")), karras(3)).T == 3
    policy = Policy(denoiser, karras(3, 0.05, 20.0), std=0.3)
    lams, x = policy.grid.tolist(), torch.randn(2, 1, 8, 8)
    k = torch.tensor([1, 0])
    alone = torch.cat([Ancestral(spread=False)(denoiser, x[i : i + 1], lams[j], lams[j + 1]).p.mean for i, j in enumerate(k)])
    within(1e-5, (policy.step(x, k).mean - alone).detach().abs().max(), "means")
    irl = MaxEntIRL(policy, ResidualValue((1, 8, 8), width=4), settings=replace(QUICK, cost=cost))
    told = irl.iterate(torch.randn(4, 1, 8, 8), None, Draws(0, 0, range(4)))
    assert all(bool(t.isfinite().all()) for t in told.values())


def test_ancestral_steps_in_ve_are_those_of_edm():
    """D + (sigma' / sigma)^2 (x - D), with noise sigma' sqrt(sigma^2 - sigma'^2) / sigma: Euler to sigma'^2 / sigma."""
    data = gaussian_data("image", VE)
    policy = Policy(data, edm_grid(4, rho=4.0, stochastic_last=True))
    sigmas = torch.exp(-0.5 * policy.grid).tolist()
    x = torch.randn(3, *data.shape, dtype=torch.float64)
    for k in range(4):
        here, there = sigmas[k], sigmas[k + 1]
        D, p = data(x, policy.grid.tolist()[k]).mean, policy.step(x, k)
        within(1e-10, (p.mean - (D + (there / here) ** 2 * (x - D))).abs().max(), "mean")
        down = there**2 / here
        within(1e-10, (p.mean - (x + (down - here) * (x - D) / here)).abs().max(), "Euler's step")
        within(1e-6, abs(float(p.var.detach().sqrt()) / (there * math.sqrt(here**2 - there**2) / here) - 1), "noise")


def test_a_policy_is_tuned_on_vectors_towards_its_data():
    """From noise that is too wide, in a few hundred iterations: samples are where the data are."""
    torch.manual_seed(0)
    data = gaussian_data("vector", VE)
    policy = Policy(data, karras(2, 0.5, 3.0), std=torch.tensor([2.0, 1.5]), trained="all")
    settings = Settings(
        tau1=0.01, tau2=0.01, time_cost=None, entropy_in_value=0, velocity_in_value=0, policy_clip=None,
        lr_policy=0.0, lr_std=0.02, lr_value=3e-3, betas=(0.5, 0.99),
    )  # fmt: skip
    value = PerceptronValue(5, 2, width=32, depth=2)
    irl = MaxEntIRL(policy, value, settings=settings)
    before = float(policy.rollout(500, Noise(9, range(500))).final.std(0).mean())
    for i in range(150):
        x0 = data.sample(Noise(i, range(256))).float()
        told = irl.iterate(x0, None, Draws(0, i, range(256)))
    after = float(policy.rollout(500, Noise(9, range(500))).final.std(0).mean())
    wanted = float(data.var.sqrt().mean())
    assert abs(after - wanted) < 0.5 * abs(before - wanted)
    assert float(told["le_cam"]) < 0.9
