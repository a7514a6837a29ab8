"""The papers' U-Nets: sizes as published, what each choice means, and labels of augmentation. The laws: test_nets.py."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import refuses, within
from quieten.networks.dit import DiT, dit_b, dit_xl
from quieten.networks.unet import LargeUNet, WaveEmbedding, _grow, _shrink, adm, ddpm, ddpmpp, iddpm, ncsnpp
from quieten.training.augment import LABELS
from quieten.training.config import build_denoiser
from quieten.training.parts import build
from test_nets import awake
from toy import toy_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {"width": 8, "mult": (1, 2), "size": 8, "attention": (4,), "blocks": 1, "dropout": 0.0}


def parameters(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


PUBLISHED = {  # in millions, as far as the papers' digits go
    "EDM, DDPM++ for CIFAR-10": (functools.partial(ddpmpp, augment=9), 55.7),
    "EDM, NCSN++ for CIFAR-10": (functools.partial(ncsnpp, augment=9), 56.4),
    "EDM, DDPM++ for FFHQ 64": (functools.partial(ddpmpp, size=64, mult=(1, 2, 2, 2), augment=9), 61.8),
    "DDPM for CIFAR-10": (ddpm, 35.7),
    "DDPM for CelebA 64": (functools.partial(ddpm, size=64, mult=(1, 2, 2, 2, 4)), 78.7),
    "DDPM for LSUN 256": (functools.partial(ddpm, size=256, mult=(1, 1, 2, 2, 4, 4)), 113.7),
    "iDDPM for CIFAR-10": (iddpm, 52.5),
    "iDDPM for ImageNet 64": (functools.partial(iddpm, size=64, mult=(1, 2, 3, 4), out_channels=6), 121.1),
    "DiT-XL/2 for ImageNet 256": (functools.partial(dit_xl, classes=1000), 675.1),
    "DiT-B/2 for ImageNet 256": (functools.partial(dit_b, classes=1000), 130.5),
    "ADM for ImageNet 64": (functools.partial(adm, size=64, classes=1000), 295.9),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_of_the_papers(name: str) -> None:
    make, millions = PUBLISHED[name]
    with torch.device("meta"):  # nothing is allocated
        count = parameters(make())
    print(f"{name}: {count:,} parameters")
    assert round(count / 1e6, 1) == millions


def test_edms_cifar_network_to_the_last_parameter() -> None:
    with torch.device("meta"):
        assert parameters(ddpmpp(augment=9)) == 55_733_891
        assert parameters(ddpm()) == 35_746_307


def test_full_size_shapes() -> None:
    with torch.device("meta"):
        for name in ("EDM, NCSN++ for CIFAR-10", "iDDPM for CIFAR-10", "ADM for ImageNet 64", "DiT-B/2 for ImageNet 256"):
            net = PUBLISHED[name][0]()
            h = net.features(torch.empty(2, net.channels, 32, 32), torch.empty(2))
            assert h.shape == (2, net.feature_channels, 32, 32)
            assert net.head(h).shape == (2, net.out_channels, 32, 32)


@pytest.mark.parametrize("make", [ddpmpp, ncsnpp, adm, ddpm, iddpm], ids=["ddpm++", "ncsn++", "adm", "ddpm", "iddpm"])
def test_labels_of_augmentation(make) -> None:
    """All zero is as none at all; others change the output; before training they do nothing."""
    options = TINY | {"augment": len(LABELS)} | ({"head_channels": 8} if make is adm else {})
    net, x, t = make(**options), torch.randn(3, 3, 8, 8), torch.randn(3)
    labels = torch.randn(3, len(LABELS))
    before = net.features(x, t, augment=labels)
    torch.testing.assert_close(before, net.features(x, t), rtol=0, atol=1e-6)
    net = awake(net)
    torch.testing.assert_close(net(x, t, augment=torch.zeros_like(labels)), net(x, t), rtol=0, atol=1e-6)
    assert (net(x, t, augment=labels) - net(x, t)).abs().max() > 1e-4
    net(x, t, augment=labels).square().mean().backward()
    assert (net.embed.augment.weight.grad != 0).any()


def test_resampling_keeps_constants_and_adds_up() -> None:
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for fir in (False, True):
        inside = _grow(torch.ones_like(x), fir)[..., 2:-2, 2:-2]
        torch.testing.assert_close(inside, torch.ones_like(inside))
        torch.testing.assert_close(_shrink(torch.ones_like(x), fir)[..., 1:-1, 1:-1], torch.ones(2, 3, 2, 2).double())
        a, b = torch.randn_like(x), torch.randn(2, 3, 4, 4, dtype=torch.float64)
        within(1e-12, abs(4 * (_shrink(a, fir) * b).sum() - (a * _grow(b, fir)).sum()), "growing is shrinking transposed")
    taps = torch.outer(torch.tensor([1.0, 3, 3, 1]), torch.tensor([1.0, 3, 3, 1])).double() / 64
    torch.testing.assert_close(_shrink(x, True)[:, :, 1, 2], (F.pad(x, (1, 1, 1, 1))[:, :, 2:6, 4:8] * taps).sum((2, 3)))


def test_waves() -> None:
    t = torch.tensor([0.0, 1.0, 999.0], dtype=torch.float64)
    waves = WaveEmbedding(16, frequencies=5).waves(t)
    frequency = torch.tensor([1.0, 1e-1, 1e-2, 1e-3, 1e-4], dtype=torch.float64)
    torch.testing.assert_close(waves, torch.cat([(t[:, None] * frequency).cos(), (t[:, None] * frequency).sin()], 1))
    random = WaveEmbedding(16, frequencies=5000, kind="fourier")
    assert abs(random.frequency.std() / (32 * torch.pi) - 1) < 0.05
    assert "frequency" in random.state_dict(), "kept with the weights"
    torch.testing.assert_close(
        random.waves(t)[:, :5000].square() + random.waves(t)[:, 5000:].square(), torch.ones(3, 5000).double()
    )
    assert random.waves(t).dtype == torch.float64


def test_variance_is_kept_at_first() -> None:
    """With sums divided by sqrt(2) (DDPM++), features of unit-variance images stay of the order of 1 through all levels."""
    torch.manual_seed(0)
    net = ddpmpp(width=32, mult=(1, 2, 2), blocks=2, attention=(8,), dropout=0.0)
    h = net.features(torch.randn(4, 3, 32, 32), torch.zeros(4))
    assert 0.1 < float(h.detach().std()) < 3.0


def test_half_precision_and_other_sizes() -> None:
    net = awake(ncsnpp(**TINY, augment=9))
    x, t = torch.randn(2, 3, 16, 8), torch.randn(2)
    with torch.autocast("cpu", torch.bfloat16):
        low = net(x, t, augment=torch.zeros(2, 9))
    torch.testing.assert_close(low.float(), net(x, t), rtol=0, atol=0.1)


def test_dropout_is_for_training() -> None:
    net = awake(ddpm(**TINY | {"dropout": 0.5}))
    x, t = torch.randn(2, 3, 8, 8), torch.randn(2)
    assert torch.equal(net(x, t), net(x, t))
    net.train()
    assert not torch.equal(net(x, t), net(x, t))


@pytest.mark.parametrize("kind", ["ddpm", "iddpm", "ddpm++", "ncsn++", "adm"])
def test_recipes_name_them(kind: str) -> None:
    change = f"model.net={{kind: {kind}, width: 8, mult: [1, 2], blocks: 1, attention: [4], augment: 9, head_channels: 8}}"
    denoiser = build_denoiser(toy_recipe(change, "augment=edm"))
    label = torch.tensor([0, 1, 2])
    p = denoiser(torch.randn(3, 1, 8, 8), torch.zeros(3), label=label, augment=torch.zeros(3, 9))
    assert p.mean.shape == (3, 1, 8, 8)
    assert isinstance(build("net", kind, {"width": 8, "head_channels": 8}, channels=3, size=32, classes=0), LargeUNet)


def make_and_call(x: Tensor, **kwargs: Tensor) -> Tensor:
    return ddpmpp(**TINY)(x, torch.zeros(len(x)), **kwargs)


@pytest.mark.parametrize(
    "call, pieces",
    [
        (lambda: DiT(size=9), ("`size`", "9", "`patch`")),
        (lambda: DiT(width=100, heads=7), ("`width`", "100", "`heads`")),
        (lambda: DiT()(torch.zeros(2, 4, 7, 8), torch.zeros(2)), ("`x`", "(2, 4, 7, 8)", "divisible by 2")),
        (lambda: ddpmpp(size=30), ("`size`", "30", "divisible")),
        (lambda: ddpmpp(width=10), ("`width`", "10", "multiple of 4")),
        (lambda: ddpmpp(attention=(1,)), ("`attention`", "(1,)", "[32, 16, 8]")),
        (lambda: ddpmpp(**TINY, head_channels=5), ("`heads`", "16")),
        (lambda: make_and_call(torch.zeros(2, 1, 8, 8)), ("`x`", "(2, 1, 8, 8)", "(B, 3, H, W)")),
        (lambda: make_and_call(torch.zeros(2, 3, 7, 8)), ("`x`", "(2, 3, 7, 8)", "divisible by 2")),
        (lambda: make_and_call(torch.zeros(2, 3, 8, 8), augment=torch.zeros(2, 9)), ("`augment`", "augment=9")),
        (lambda: make_and_call(torch.zeros(2, 3, 8, 8), label=torch.zeros(2).long()), ("`label`", "classes=N")),
        (
            lambda: ddpmpp(**TINY, augment=9)(torch.zeros(2, 3, 8, 8), torch.zeros(2), augment=torch.zeros(2, 8)),
            ("`augment`", "(2, 9)", "(2, 8)"),
        ),
    ],
)
def test_bad_input(call, pieces) -> None:
    with refuses(*pieces):
        call()
