"""Heads on tapped features: the official ones, every network they fit, and networks left as they were."""

import pytest
import torch
from torch import nn

from conftest import golden
from helpers import refuses
from quieten.covariance import HessianDiagonal
from quieten.covariances.heads import Complex, Separate, Simple, make_head, network_of, tap_of
from quieten.denoiser import Preconditioned
from quieten.nets import UNet
from quieten.networks.mlp import MLP
from quieten.oracle import GaussianData
from quieten.process import VP
from quieten.schedule import Table
from quieten.wrap import Clipped, Counted, Extrapolated, WithCovariance

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("style, emb", [("iddpm", "emb"), ("ddpm", "temb")])
def test_the_simple_head_is_the_official_one(style, emb):
    g = {key: torch.as_tensor(value) for key, value in golden(f"ocm_head_{style}_simple").items()}
    head = Simple(32, 3, style=style)
    norm, conv = ("p_0", "p_2") if style == "iddpm" else ("p_norm_out2", "p_conv_out2")
    state = {f"{ours}.{k}": g[f"{theirs}.{k}"] for ours, theirs in (("norm", norm), ("conv", conv)) for k in ("weight", "bias")}
    head.load_state_dict(state)
    torch.testing.assert_close(head(g["h"], g[emb]), g["out"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("style", ["iddpm", "ddpm"])
def test_the_complex_head_is_a_residual_block_and_the_simple_one(style):
    """Written out once more, from the description of the official blocks."""
    torch.manual_seed(0)
    head = Complex(32, 3, 128, style=style)
    for p in head.parameters():
        nn.init.normal_(p, std=0.2)
    h, emb = torch.randn(2, 32, 4, 4), torch.randn(2, 128)
    eps = 1e-5 if style == "iddpm" else 1e-6

    def norm(x, layer):
        return nn.functional.group_norm(x, 32, layer.weight, layer.bias, eps)

    def silu(x):
        return x * torch.sigmoid(x)

    inner, c = head.conv1(silu(norm(h, head.norm1))), head.condition(silu(emb))[..., None, None]
    scale, shift = (c[:, :32], c[:, 32:]) if style == "iddpm" else (torch.zeros(()), torch.zeros(()))
    inner = norm(inner if style == "iddpm" else inner + c, head.norm2) * (1 + scale) + shift
    out = h + head.conv2(silu(inner))
    want = head.simple.conv(silu(norm(out, head.simple.norm)))
    torch.testing.assert_close(head(h, emb), want, rtol=1e-5, atol=1e-5)
    with refuses("'simple'", "embedding"):
        head(h)


def test_heads_have_the_published_sizes_and_start_at_zero():
    def count(head):
        return sum(p.numel() for p in head.parameters())

    assert count(Simple(128, 3)) == 3_715  # CIFAR-10 and CelebA
    assert count(Complex(128, 3, 512)) == 430_723  # ImageNet-64
    assert count(Complex(128, 3, 512, style="ddpm")) == 365_059  # LSUN
    for head in (Simple(16, 3), Complex(16, 3, 8), Simple(16, 3, block=4)):
        assert head(torch.randn(2, 16, 8, 8), torch.randn(2, 8)).abs().max() == 0
    assert Simple(16, 3, style="ddpm", zero=False)(torch.randn(2, 16, 8, 8)).abs().max() > 0
    with refuses("`style`", "'adm'"):
        Simple(16, 3, style="adm")


# ---- every network


def ours(**options):
    return Preconditioned(UNet(3, 8, width=8, detail=4, **options), VP, "v", lambda lam: -lam / 8, shape=(3, 8, 8))


def vector():
    return Preconditioned(MLP(5, width=16), VP, "eps", lambda lam: -lam / 8, shape=(5,))


def theirs(kind: str):
    diffusers = pytest.importorskip("diffusers")
    from quieten.interop.network import Network

    small = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}
    if kind == "unet":
        model = diffusers.UNet2DModel(
            in_channels=3, out_channels=3, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, **small
        )
    elif kind == "text":
        model = diffusers.UNet2DConditionModel(
            in_channels=3, out_channels=3, cross_attention_dim=4, attention_head_dim=4, mid_block_type=None,
            down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2, **small,
        )  # fmt: skip
    else:
        model = diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=6, num_layers=2, sample_size=8,
            patch_size=2, num_embeds_ada_norm=10,
        )  # fmt: skip
    table = Table.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    return Preconditioned(Network(model, mean_only=kind == "dit"), VP, "eps", table, shape=(3, 8, 8))


CASES = {
    "ours": (ours, {}),
    "ours, classes": (lambda: ours(classes=3), {"label": torch.tensor([0, 2])}),
    "vector": (vector, {}),
    "UNet2DModel": (lambda: theirs("unet"), {}),
    "UNet2DConditionModel": (lambda: theirs("text"), {"text": torch.randn(2, 3, 4)}),
    "DiT": (lambda: theirs("dit"), {"label": torch.tensor([0, 2])}),
}


@pytest.mark.parametrize("kind", ["simple", "complex", "separate"])
@pytest.mark.parametrize("name", CASES)
def test_a_head_for_every_network(name, kind):
    make, cond = CASES[name]
    torch.manual_seed(0)
    denoiser = make().eval().requires_grad_(False)
    x, counted = torch.randn(2, *denoiser.shape), Counted(denoiser)
    before = denoiser(x, 0.3, **cond).mean
    names = [n for n, _ in network_of(denoiser).named_modules()]
    source = HessianDiagonal(make_head(denoiser, kind), link="unit", cap=1.0)
    model = WithCovariance(counted, source)
    p = model(x, 0.3, **cond)
    assert counted.calls == 1
    torch.testing.assert_close(p.mean, before)
    torch.testing.assert_close(p.var, torch.full_like(x, torch.sigmoid(torch.tensor(-0.3)).item()))  # a head of zeros
    for q in source.head.parameters():
        nn.init.normal_(q, std=0.3)
    first = model(x, 0.3, **cond).var
    assert first.std() > 1e-3
    assert first.shape == x.shape
    one = model(x[:1], 0.3, **{k: v[:1] for k, v in cond.items()}).var
    torch.testing.assert_close(one, first[:1], rtol=1e-4, atol=1e-6)  # rows do not mix
    assert not torch.allclose(model(x, -2.0, **cond).var, first, rtol=1e-2)
    # the network is as it was: no hooks, no shadowed methods, no gradients
    net = network_of(denoiser)
    assert [n for n, _ in net.named_modules()] == names
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert "head" not in net.__dict__
    assert all(q.grad is None for q in denoiser.parameters())


def test_coefficients_of_blocks_and_other_shapes():
    torch.manual_seed(0)
    for name in ("ours", "UNet2DModel", "DiT"):
        make, cond = CASES[name]
        denoiser = make().eval()
        block = 2 if name == "DiT" else 4
        head = make_head(denoiser, "simple", block)
        for q in head.parameters():
            nn.init.normal_(q)
        with tap_of(denoiser).reading() as seen:
            denoiser(torch.randn(2, 3, 8, 8), 0.0, **cond)
        assert head(seen.h.contiguous(), seen.emb).shape == (2, 3, 8, 8)
    with refuses("`block` of 4", "patch of 2"):
        make_head(CASES["DiT"][0](), "simple", 4)
    with refuses("`block` 2", "images"):
        make_head(vector(), "simple", 2)
    assert Separate((7,))(torch.randn(3, 7), torch.randn(3, 7), 0.5).shape == (3, 7)
    assert Separate((2, 8, 8), block=4)(*torch.randn(2, 3, 2, 8, 8), float("-inf")).isfinite().all()


def test_a_tap_is_removed_when_the_network_fails():
    denoiser = ours()
    with pytest.raises(ValueError, match="shape"), tap_of(denoiser).reading():
        denoiser(torch.randn(2, 3, 9, 9), 0.0)
    assert "head" not in denoiser.net.__dict__
    assert not denoiser.net.embed._forward_hooks


def test_what_has_no_tap_or_no_place_is_refused():
    class Bare(nn.Module):
        def forward(self, x, t):
            return x

    bare = Preconditioned(Bare(), VP, "eps", shape=(3, 8, 8))
    with refuses("Bare", "'separate'"):
        make_head(bare)
    assert isinstance(make_head(bare, "separate"), Separate)
    with refuses("GaussianData", "'separate'"):
        make_head(GaussianData(torch.zeros(3), 1.0, VP))
    with refuses("`head`", "'huge'"):
        make_head(bare, "huge")
    with refuses("`shape`"):
        make_head(Preconditioned(MLP(3), VP, "eps"))
    denoiser = ours(classes=3)
    source = HessianDiagonal(make_head(denoiser), link="unit")
    guided = Extrapolated(denoiser, 2.0, null={"label": 3})
    with refuses("4 rows for 2", "inside the guidance"):
        WithCovariance(guided, source)(torch.randn(2, 3, 8, 8), 0.0, label=torch.tensor([0, 1]))
    right = Extrapolated(WithCovariance(denoiser, source), 2.0, null={"label": 3})
    p = Clipped(right)(torch.randn(2, 3, 8, 8), 0.0, label=torch.tensor([0, 1]))
    assert p.var.shape == (2, 3, 8, 8)
