"""Policies as files: what is read back draws the same samples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from helpers import refuses, within
from quieten import VP, Ancestral, EulerMaruyama, Noise, Preconditioned, karras
from quieten.covariances.stored import fingerprint
from quieten.nets import UNet
from quieten.tuning.adapters import adapters, inject
from quieten.tuning.policy import Policy
from quieten.tuning.policy_schedule import Consistency
from quieten.tuning.stored import load_policy, policy_names, save_policy


def trunk() -> Preconditioned:
    torch.manual_seed(0)
    net = UNet(1, 8, width=8, detail=4)
    for p in net.parameters():
        nn.init.normal_(p, std=0.05)
    return Preconditioned(net, VP, shape=(1, 8, 8))


def tuned(how: str, **options) -> Policy:
    denoiser = trunk()
    if how == "adapters":
        inject(denoiser, rank=2)
        for name, p in denoiser.named_parameters():
            if name.endswith("adapter_up"):
                p.data += 0.1
    else:
        for p in denoiser.parameters():
            p.data += 0.01 * torch.randn_like(p)
    policy = Policy(denoiser, karras(3, 0.05, 20.0), **options)
    policy.log_std.data += 0.2
    return policy


@pytest.mark.parametrize("how", ["all", "adapters"])
@pytest.mark.parametrize("transition", [None, Ancestral(0.5, spread=False, clip=1.0), Consistency()], ids=["ddpm", "eta", "cm"])
@pytest.mark.parametrize("per", ["step", "pixel"])
def test_a_policy_comes_back(tmp_path, how, transition, per):
    std = torch.rand(3, 1, 8, 8) + 0.1 if per == "pixel" else None
    policy = tuned(how, transition=transition, trained="all", std=std)
    file = save_policy(
        tmp_path, "dxmi", policy, trunk=fingerprint(trunk()), s2=torch.ones(3), facts={"frechet": 1.5, "samples": 5000}
    )
    denoiser = trunk()
    again = load_policy(tmp_path, "dxmi", denoiser)
    assert not any(p.requires_grad for p in again.parameters())
    assert not again.training
    assert again.facts == {"frechet": 1.5, "samples": 5000}
    assert torch.equal(again.s2, torch.ones(3))
    ours, theirs = (p.rollout(4, Noise(0, range(4))).final for p in (policy, again))
    within(0, (ours - theirs).abs().max(), "samples")
    within(0, (again.transition.start - policy.transition.start).abs().max(), "initial std")
    assert fingerprint(denoiser) == fingerprint(trunk()), "the denoiser was changed"
    assert policy_names([tmp_path]) == ["dxmi"]
    assert load_policy([tmp_path / "none", tmp_path], "dxmi", denoiser).T == 3
    assert load_policy("anywhere", str(file), denoiser).T == 3


def test_adapters_make_small_files_and_half_makes_smaller_ones(tmp_path):
    sizes = {}
    for how, half in (("all", False), ("all", True), ("adapters", False), ("adapters", True)):
        policy = tuned(how)
        file = save_policy(tmp_path, f"{how}{half}", policy, trunk=fingerprint(trunk()), half=half)
        sizes[how, half] = file.stat().st_size
        again = load_policy(tmp_path, f"{how}{half}", trunk())
        ours, theirs = (p.rollout(4, Noise(0, range(4))).final for p in (policy, again))
        within(1e-2 if half else 0, (ours - theirs).abs().max(), f"{how}, half={half}")
    assert sizes["all", True] < 0.7 * sizes["all", False]
    assert sizes["adapters", False] < 0.7 * sizes["all", False]
    assert sizes["adapters", True] < 0.8 * sizes["adapters", False]
    assert all(t.dtype != torch.float16 for t in adapters(again.denoiser).values())


def test_adapters_in_half_precision_leave_the_model_exactly_as_it_was(tmp_path):
    """They are the change alone: a model they do not change is not rounded."""
    denoiser = trunk()
    inject(denoiser, rank=2)  # `up` is zero
    policy = Policy(denoiser, karras(3, 0.05, 20.0))
    save_policy(tmp_path, "none", policy, trunk=fingerprint(trunk()), half=True)
    ours, theirs = (
        p.rollout(4, Noise(0, range(4))).final
        for p in (load_policy(tmp_path, "none", trunk()), Policy(trunk(), karras(3, 0.05, 20.0)))
    )
    within(0, (ours - theirs).abs().max(), "samples")


def test_what_does_not_belong_together_is_refused(tmp_path):
    here = fingerprint(trunk())
    save_policy(tmp_path, "few", tuned("adapters"), trunk=here)
    save_policy(tmp_path, "mapped", tuned("all", mean_map=torch.tanh), trunk=here)
    save_policy(tmp_path, "em", tuned("all", transition=EulerMaruyama()), trunk=here)
    other = trunk()
    next(other.parameters()).data += 1.0
    with refuses("few.safetensors", "other weights"):
        load_policy(tmp_path, "few", other)
    with refuses("`mean_map`"):
        load_policy(tmp_path, "mapped", trunk())
    with refuses("`mean_map`"):
        load_policy(tmp_path, "few", trunk(), mean_map=torch.tanh)
    assert load_policy(tmp_path, "mapped", trunk(), mean_map=torch.tanh).step(torch.zeros(1, 1, 8, 8), 0).mean.abs().max() < 1
    with refuses("`transition`"):
        load_policy(tmp_path, "em", trunk())
    assert load_policy(tmp_path, "em", trunk(), transition=EulerMaruyama()).T == 3
    with refuses("no policy 'few1'", "few"):
        load_policy(tmp_path, "few1", trunk())
    (tmp_path / "few.safetensors").write_bytes(b"nothing")
    with refuses("few.safetensors", "tune again"):
        load_policy(tmp_path, "few", trunk())
    with refuses("dxmi.safetensors", "tensor `"):
        save_policy(tmp_path, "dxmi", tuned("all"), trunk=here)
        net = UNet(1, 8, width=16, detail=4)
        load_policy(tmp_path, "dxmi", Preconditioned(net, VP, shape=(1, 8, 8)))
    assert math.isfinite(float(tuned("all").rhos.sum()))
