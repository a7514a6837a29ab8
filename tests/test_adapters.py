"""Adapters: nothing changes until they are trained, and then nothing but they."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from helpers import refuses, within
from quieten.nets import UNet
from quieten.networks.mlp import MLP
from quieten.tuning.adapters import adapted, adapters, inject, load_adapters, merge, remove


def unet() -> nn.Module:
    net = UNet(1, 8, width=8, detail=4)
    for p in net.parameters():  # networks start with an output of zero
        nn.init.normal_(p, std=0.1)
    return net


NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 6)), (torch.randn(3, 6),)),
    "unet": (unet, (torch.randn(3, 1, 8, 8), torch.randn(3))),
}


def trained(net: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for _, layer in adapted(net):
        layer.adapter_up.data.normal_(std=0.2, generator=generator)
    return net


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_untrained_adapters_change_nothing_and_trained_ones_merge(kind, dtype):
    make, given = NETS[kind]
    net, given = make().to(dtype), [x.to(dtype) for x in given]
    plain, keys = net(*given), set(net.state_dict())
    names = inject(net, rank=2, alpha=4.0)
    assert keys < set(net.state_dict())
    within(0, (net(*given) - plain).abs().max(), "before training")
    trained(net)
    with_adapters = net(*given)
    assert (with_adapters - plain).abs().max() > 1e-3
    copy = deepcopy(net)
    merge(copy)
    assert set(copy.state_dict()) == keys
    within(1e-5 if dtype == torch.float32 else 1e-12, (copy(*given) - with_adapters).abs().max(), "merged")
    remove(net)
    within(0, (net(*given) - plain).abs().max(), "removed")
    assert names


@pytest.mark.parametrize("kind", NETS)
def test_only_adapters_are_trained_and_saved(kind):
    make, given = NETS[kind]
    net = make()
    fresh = deepcopy(net)
    inject(net, rank=3)
    net(*given).square().sum().backward()
    wanting = {name for name, p in net.named_parameters() if p.requires_grad}
    assert wanting == {name for name, p in net.named_parameters() if "adapter" in name}
    assert {name for name, p in net.named_parameters() if p.grad is not None} <= wanting
    trained(net)
    saved = {name: t.detach().clone() for name, t in adapters(net).items()}
    load_adapters(fresh, saved)
    within(0, (fresh(*given) - net(*given)).abs().max(), "loaded")
    assert sum(t.numel() for t in saved.values()) < sum(p.numel() for p in net.parameters())


def test_copies_have_adapters_of_their_own():
    net = nn.Sequential(nn.Linear(4, 4))
    inject(net, rank=2)
    copy = deepcopy(net)
    x = torch.randn(2, 4)
    before = net(x)
    trained(copy)
    within(0, (net(x) - before).abs().max(), "the original")
    assert (copy(x) - before).abs().max() > 1e-3


def test_half_precision_layers_keep_wide_adapters():
    net = nn.Sequential(nn.Linear(4, 4)).to(torch.bfloat16)
    inject(net)
    assert net[0].adapter_up.dtype == torch.float32
    assert trained(net)(torch.randn(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_layers_can_be_chosen():
    net = MLP(2, 8, 2)
    chosen = inject(net, match=lambda name: name.startswith("embed"))
    assert chosen
    assert all(name.startswith("embed") for name in chosen)


def test_bad_input():
    net = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 3, groups=2))
    with refuses("`rank`", "0"):
        inject(net, rank=0)
    with refuses("`match`"):
        inject(net, match=lambda name: name == "1")
    assert inject(net) == ["0"]
    with refuses("adapters already"):
        inject(net)
    saved = adapters(net)
    with refuses("no layer `0`", "4 channels"):
        load_adapters(nn.Sequential(nn.Linear(5, 4)), saved)
