"""Values and energies: one calling convention, exact sizes, maps that sum to the energy, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import refuses, within
from quieten.tuning.energies import PerceptronValue, ResidualValue, default_value, perceptron, read
from quieten.tuning.reconstruction import AutoencoderEnergy, autoencoder

NETS = {
    "perceptron": lambda: PerceptronValue(3, T=4, width=16),
    "perceptron of images, classes": lambda: PerceptronValue((1, 4, 4), T=4, width=16, classes=3),
    "perceptron without time": lambda: PerceptronValue((2, 3), width=16),
    "residual": lambda: ResidualValue((3, 8, 8), width=4),
    "residual with time": lambda: ResidualValue((1, 9, 8), T=4, width=4),
    "residual with classes": lambda: ResidualValue((1, 8, 8), width=4, classes=3),
    "residual with both": lambda: ResidualValue((1, 8, 8), T=4, width=4, classes=3),
    "autoencoder": lambda: autoencoder((1, 4, 4), latent=2, width=8),
    "autoencoder on the sphere": lambda: autoencoder(6, latent=3, width=8, sphere=True),
}


def built(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    net = NETS[name]()
    shapes = {"autoencoder": (1, 4, 4), "autoencoder on the sphere": (6,)}
    return net, getattr(net, "shape", None) or shapes[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NETS)
def test_one_number_per_example(name: str, dtype: torch.dtype) -> None:
    net, shape = built(name)
    net.to(dtype)
    for n in (0, 1, 5):
        x = torch.randn(n, *shape, dtype=dtype, requires_grad=True)
        label = torch.arange(n) % 3
        shared = net(x, 2, label=label, prompt=torch.zeros(n))
        assert shared.shape == (n,)
        assert shared.dtype == dtype
        rows = net(x, torch.full((n,), 2), label=label)
        assert torch.allclose(shared, rows, rtol=1e-5, atol=1e-6)
        (grad,) = torch.autograd.grad(shared.sum(), x)
        assert grad.shape == x.shape
        assert n == 0 or grad.abs().sum() > 0


@pytest.mark.parametrize("name", NETS)
def test_rows_do_not_meet(name: str) -> None:
    net, shape = built(name)
    net.double()
    x, k, label = torch.randn(6, *shape).double(), torch.arange(6) % 5, torch.arange(6) % 3
    together = net(x, k, label=label)
    for i in range(6):
        alone = net(x[i : i + 1], int(k[i]), label=label[i : i + 1])
        assert torch.allclose(together[i : i + 1], alone, atol=1e-12)


@pytest.mark.parametrize("name", ["perceptron", "residual with time"])
def test_times_are_told_apart(name: str) -> None:
    net, shape = built(name)
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.randn(1, *shape)
    values = torch.cat([net(x, k) for k in range(5)])
    assert values.unique().numel() == 5


@pytest.mark.parametrize("name", ["perceptron without time", "residual", "autoencoder"])
def test_without_time_any_k_is_ignored(name: str) -> None:
    net, shape = built(name)
    x = torch.randn(3, *shape)
    assert torch.equal(net(x), net(x, 17))
    assert torch.equal(net(x), net(x, torch.arange(3)))


def test_labels_matter_where_there_are_classes() -> None:
    for name in ("perceptron of images, classes", "residual with classes"):
        net, shape = built(name)
        for p in net.parameters():
            nn.init.normal_(p, std=0.3)
        x = torch.randn(1, *shape).expand(3, *shape)
        assert net(x, 1, label=torch.arange(3)).unique().numel() == 3


def test_residual_has_the_size_of_the_papers() -> None:
    count = sum(p.numel() for p in ResidualValue((3, 32, 32)).parameters())
    assert count == 5_134_595
    # with classes: no biases in blocks, 4 C numbers of each class in each
    biases, embeddings = 2 * (128 + 128 + 4 * 256), 10 * 4 * (128 + 128 + 4 * 256)
    assert sum(p.numel() for p in ResidualValue((3, 32, 32), classes=10).parameters()) == count - biases + embeddings


def test_residual_is_the_stated_function() -> None:
    """Against the network written out with functional calls."""
    torch.manual_seed(1)
    net = ResidualValue((2, 12, 8), width=3).double()
    with torch.no_grad():
        net.scale.fill_(1.7)
        net.shift.fill_(-0.4)
    x = torch.randn(4, 2, 12, 8, dtype=torch.float64)
    h = F.leaky_relu(F.conv2d(x, net.stem.weight, net.stem.bias, padding=1), 0.2)
    for i, block in enumerate(net.blocks):
        inner = F.leaky_relu(F.conv2d(h, block.conv1.weight, block.conv1.bias, padding=1), 0.2)
        inner = F.conv2d(inner, block.conv2.weight, block.conv2.bias, padding=1)
        side = h if i in (1, 3, 5) else F.conv2d(h, block.skip.weight)
        total = inner + side
        h = F.leaky_relu(F.avg_pool2d(total, 2) if i in (0, 2, 4) else total, 0.2)
    want = 1.7 * (F.relu(h).sum((2, 3)) @ net.out.weight[0] + net.out.bias) - 0.4
    within(1e-12, (net(x) - want).detach().abs().max(), "residual value against its definition")


def test_new_classes_and_times_change_nothing_at_first() -> None:
    """Scales start at 1 and shifts at 0: the same convolutions without bias give the same value."""
    torch.manual_seed(2)
    plain = ResidualValue((1, 8, 8), width=4).double()
    for block in plain.blocks:
        nn.init.zeros_(block.conv1.bias)
        nn.init.zeros_(block.conv2.bias)
    x, label = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 1])
    for other in (
        ResidualValue((1, 8, 8), width=4, classes=2),
        ResidualValue((1, 8, 8), T=3, width=4),
        ResidualValue((1, 8, 8), T=3, width=4, classes=2),
    ):
        other.double().load_state_dict(plain.state_dict(), strict=False)
        assert torch.allclose(other(x, 1, label=label), plain(x), atol=1e-12)


@pytest.mark.parametrize("name", ["residual", "residual with time", "residual with both", "autoencoder"])
def test_map_sums_to_the_energy(name: str) -> None:
    net, shape = built(name)
    net.double()
    x, label = torch.randn(4, *shape).double(), torch.arange(4) % 3
    where = net.per_position(x, 2, label=label)
    assert where.ndim == 3
    within(1e-12, (where.sum((1, 2)) - net(x, 2, label=label)).detach().abs().max(), "sum of the map less the energy")


def test_map_is_local() -> None:
    """A pixel far from a corner cannot move the energy of that corner."""
    torch.manual_seed(0)
    net = ResidualValue((1, 128, 128), width=2)
    x = torch.randn(1, 1, 128, 128)
    y = x.clone()
    y[..., -1, -1] += 5.0
    change = (net.per_position(x) - net.per_position(y)).abs()[0]
    assert change[:8, :8].max() == 0
    assert change[-1, -1] > 0


def test_autoencoder_on_the_sphere() -> None:
    net = autoencoder(6, latent=3, width=8, sphere=True, scale=3.0, tau=0.5).double()
    x = F.normalize(torch.randn(20, 6, dtype=torch.float64), dim=1)
    z = net.encode(x)
    assert torch.allclose(z.norm(dim=1), torch.ones(20).double())
    assert torch.allclose(net.decode(z).norm(dim=1), torch.ones(20).double())
    energy = net(x)
    assert (energy >= 0).all()
    assert (energy <= 4 * 9.0 / 0.5 + 1e-9).all()  # two points of the unit sphere are 2 apart at most
    want = (x - net.decode(z)).square().sum(1) * 9.0 / 0.5
    assert torch.allclose(energy, want)
    assert net.scale.requires_grad


def test_default_value() -> None:
    assert isinstance(default_value((3, 8, 8), 4, width=4), ResidualValue)
    assert default_value((3, 8, 8), 4, time=False, width=4).T is None
    assert isinstance(default_value((3, 4, 4), 4), PerceptronValue)
    assert isinstance(default_value(2, 5), PerceptronValue)
    assert default_value(2, 5).T == 5
    with refuses("`T`", "time=False"):
        default_value(2)


def test_read() -> None:
    x = torch.zeros(3, 2)
    assert read(lambda x, k: x[:, :1], x).shape == (3,)
    assert read(lambda x, k, label: x[:, 0] + label, x, 1, label=torch.ones(3)).tolist() == [1, 1, 1]
    for wrong in (lambda x, k: x, lambda x, k: x.sum(), lambda x, k: 3.0):
        with refuses("one number per example"):
            read(wrong, x)


def test_refusals() -> None:
    V, x = PerceptronValue(2, T=5), torch.zeros(3, 2)
    with refuses("`k`", "0..5"):
        V(x)
    with refuses("`k`", "0..5"):
        V(x, 6)
    with refuses("`k`", "0..5"):
        V(x, torch.tensor([0, 1, -1]))
    with refuses("`k`", "whole numbers"):
        V(x, torch.zeros(3))
    with refuses("`k`", "0..4"):
        PerceptronValue(2, T=5, terminal=False)(x, 5)
    with refuses("`x`", "(3, 4)"):
        V(torch.zeros(3, 4), 1)
    with refuses("`T`"):
        PerceptronValue(2, T=0)
    with refuses("`label`", "None"):
        PerceptronValue(2, classes=3)(x)
    with refuses("`label`", "0..2"):
        PerceptronValue(2, classes=3)(x, label=torch.tensor([0, 1, 3]))
    with refuses("`shape`", "PerceptronValue"):
        ResidualValue((1, 4, 4))
    with refuses("`tau`"):
        AutoencoderEnergy(nn.Identity(), nn.Identity(), tau=0.0)
    with refuses("`decoder`"):
        AutoencoderEnergy(nn.Identity(), perceptron(2, 3, 4, 1))(x)


def test_saved_and_loaded(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    for name in NETS:
        net, shape = built(name)
        save_file(net.state_dict(), tmp_path / "net.safetensors")
        torch.manual_seed(5)
        other = NETS[name]()
        other.load_state_dict(load_file(tmp_path / "net.safetensors"))
        x, label = torch.randn(2, *shape), torch.tensor([0, 1])
        assert torch.equal(net(x, 1, label=label), other(x, 1, label=label))
