"""Laws that every network obeys, then what is particular to each."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from quieten.nets import Classifier, Embedding, Net, UNet
from quieten.networks.dit import DiT
from quieten.networks.mlp import MLP
from quieten.networks.unet import adm, ddpm, ddpmpp, iddpm, ncsnpp

TINY = {"width": 8, "mult": (1, 2), "size": 8, "attention": (4,), "blocks": 1, "dropout": 0.0}
CASES = {
    "mlp-vector": (lambda classes: MLP(5, width=32, classes=classes), (5,)),
    "mlp-image": (lambda classes: MLP((1, 4, 6), width=32, classes=classes), (1, 4, 6)),
    "unet-28": (lambda classes: UNet(width=16, classes=classes), (1, 28, 28)),
    "unet-8": (lambda classes: UNet(size=8, width=16, classes=classes), (1, 8, 8)),
    "unet-oblong": (lambda classes: UNet(channels=3, size=32, width=16, classes=classes), (3, 8, 32)),
    "ddpm": (lambda classes: ddpm(classes=classes, **TINY), (3, 8, 8)),
    "iddpm": (lambda classes: iddpm(classes=classes, **TINY), (3, 8, 12)),
    "ddpm++": (lambda classes: ddpmpp(classes=classes, **TINY), (3, 8, 8)),
    "ncsn++": (lambda classes: ncsnpp(classes=classes, **TINY), (3, 8, 8)),
    "adm": (lambda classes: adm(classes=classes, **TINY | {"head_channels": 8}), (3, 8, 8)),
    "dit": (lambda classes: DiT(size=8, width=16, depth=2, heads=2, classes=classes, detail=8), (4, 8, 12)),
    "unet-plain": (lambda classes: UNet(2, 8, 16, mult=(1,), attention=(), classes=classes), (2, 6, 5)),
}


def awake(net, scale=0.05):
    """The network with every zero-initialised weight made random, as after training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return net.eval()


def inputs(shape, n=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=generator, dtype=dtype)
    return x, 2 * torch.randn(n, generator=generator, dtype=dtype)


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(0)
    build, shape = CASES[request.param]
    return build, shape


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("classes", [0, 4])
def test_output_has_the_shape_of_the_input_and_starts_at_zero(case, n, classes):
    build, shape = case
    net = build(classes)
    x, t = inputs(shape, n)
    out = net(x, t)
    assert isinstance(net, Net)
    assert out.shape == x.shape
    assert (out == 0).all()
    out.sum().backward()


def test_every_parameter_gets_a_gradient_once_awake(case):
    build, shape = case
    net = awake(build(4))
    x, t = inputs(shape)
    net(x.requires_grad_(), t.requires_grad_(), torch.tensor([0, 3, 4])).square().sum().backward()
    for name, p in [*net.named_parameters(), ("x", x), ("t", t)]:
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert (p.grad != 0).any(), name


def test_forward_is_the_head_of_the_features(case):
    build, shape = case
    net = awake(build(4))
    x, t = inputs(shape)
    label = torch.tensor([1, 2, 4])
    h = net.features(x, t, label)
    assert h.shape == (3, net.feature_channels, *(() if isinstance(net, MLP) else shape[1:]))
    assert torch.equal(net.head(h), net(x, t, label))


def test_out_channels(case):
    build, shape = case
    kwargs = {"width": 16, "out_channels": 6}
    net = build(0)
    wide = MLP(shape, **kwargs) if isinstance(net, MLP) else UNet(shape[0], 8, mult=(1,), patch=1, **kwargs)
    assert wide(*inputs(shape)).shape == (3, 6, *shape[1:])


def test_examples_do_not_see_each_other(case):
    build, shape = case
    net = awake(build(4)).double()
    x, t = inputs(shape, dtype=torch.float64)
    label = torch.tensor([0, 1, 2])
    y, s, other = x.clone(), t.clone(), label.clone()
    y[1], s[1], other[1] = 7.0, -3.0, 4
    before, after = net(x, t, label), net(y, s, other)
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]], rtol=0, atol=1e-12)
    assert (after[1] - before[1]).abs().max() > 1e-3
    torch.testing.assert_close(net(x[2:], t[2:], label[2:]), before[2:], rtol=0, atol=1e-12)


def test_vjp_is_the_derivative(case):
    build, shape = case
    net = awake(build(0)).double()
    x, t = inputs(shape, dtype=torch.float64)
    kept = x.clone()
    a, b = inputs(shape, seed=2, dtype=torch.float64)[0], inputs(shape, seed=3, dtype=torch.float64)[0]
    out, pull = torch.func.vjp(lambda z: net(z, t), x)
    h = 1e-5
    slope = (net(x + h * b, t) - net(x - h * b, t)) / (2 * h)
    torch.testing.assert_close((pull(a)[0] * b).sum(), (a * slope).sum(), rtol=1e-6, atol=1e-8)
    assert torch.equal(out, net(x, t))
    assert torch.equal(x, kept)


def test_forward_mode_works_without_attention():
    net = awake(UNet(size=8, width=16, attention=())).double()
    x, t = inputs((1, 8, 8), dtype=torch.float64)
    h = 1e-5
    _, slope = torch.func.jvp(lambda s: net(x, s), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(slope, (net(x, t + h) - net(x, t - h)) / (2 * h), rtol=1e-5, atol=1e-8)


def test_label_moves_the_output_and_none_is_the_null_label(case):
    build, shape = case
    net = awake(build(4))
    x, t = inputs(shape)
    none = net(x, t)
    assert torch.equal(none, net(x, t, torch.full((3,), 4)))
    assert torch.equal(none, net(x, t, torch.tensor(4)))
    assert not torch.allclose(none, net(x, t, torch.tensor([0, 1, 2])))


def test_one_time_for_all(case):
    build, shape = case
    net = awake(build(0))
    x, _ = inputs(shape)
    assert torch.equal(net(x, torch.tensor(0.3)), net(x, torch.full((3,), 0.3)))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-5), (torch.bfloat16, 0.1)], ids=["float64", "bfloat16"])
def test_other_precisions_agree_with_float32(case, dtype, tolerance):
    build, shape = case
    net = awake(build(4))
    x, t = inputs(shape)
    label = torch.tensor([0, 4, 2])
    exact = net(x, t, label)
    rounded = net.to(dtype)(x.to(dtype), t, label)
    assert rounded.dtype == dtype
    assert (rounded - exact).norm() < tolerance * exact.norm()


def test_autocast_agrees_and_trains(case):
    build, shape = case
    net = awake(build(4))
    x, t = inputs(shape)
    exact = net(x, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = net(x, t)
    assert (half - exact).norm() < 0.1 * exact.norm()
    half.float().square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_state_dict_round_trip(case):
    build, shape = case
    net, twin = awake(build(4)), build(4)
    x, t = inputs(shape)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    assert all(v.is_contiguous() for v in state.values())  # safetensors wants them so
    twin.load_state_dict(state)
    assert torch.equal(twin.eval()(x, t), net(x, t))


def test_memory_layout_does_not_matter():
    net = awake(UNet(channels=3, size=16, width=16))
    x, t = inputs((3, 16, 16))
    plain = net(x, t)
    last = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t)
    torch.testing.assert_close(last, plain, rtol=1e-4, atol=1e-5)


def test_dropout_is_off_in_eval_and_on_in_training():
    net = awake(UNet(size=8, width=16, dropout=0.5))
    x, t = inputs((1, 8, 8))
    assert torch.equal(net(x, t), net(x, t))
    net.train()
    assert not torch.equal(net(x, t), net(x, t))


@pytest.mark.parametrize("size", [8, 12, 16, 28, 32, 64])
def test_default_levels_fit_the_size(size):
    net = UNet(size=size, width=8)
    assert size % net.multiple == 0
    assert size // net.multiple <= 8
    assert net(*inputs((1, size, size), 1)).shape == (1, 1, size, size)


def test_default_unet_is_cheap():
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        UNet(classes=10)(*inputs((1, 28, 28), 1))
    mflop = counter.get_total_flops() / 1e6
    print(f"{mflop:.0f} MFLOP at 1 x 28 x 28")
    assert 20 < mflop <= 300


@pytest.mark.parametrize("near", [1e-2, 0.1, 1.0])
def test_embedding_tells_levels_apart_over_its_range(near):
    embed = Embedding(8)
    t = torch.linspace(-10, 10, 201)
    step = (embed.waves(t + near) - embed.waves(t)).norm(dim=1)
    assert step.min() > 5 * near / (1 + 10 * near)
    apart = torch.cdist(embed.waves(t), embed.waves(t)) + 1e9 * torch.eye(len(t))
    assert apart.min() > 0.4


def test_embedding_scale_and_precision():
    index = torch.arange(1000, dtype=torch.float64)
    torch.testing.assert_close(Embedding(8, t_scale=0.01).waves(index), Embedding(8).waves(index / 100))
    assert Embedding(8).waves(torch.zeros(2, dtype=torch.float64)).dtype == torch.float64
    assert Embedding(8).waves(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.float32


def test_unet_learns_a_mapping_across_the_image():
    """A mapping that needs the resolution of the input, the far side of the image, and the time."""
    torch.manual_seed(0)
    net = UNet(size=8, width=16)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)

    def loss():
        x = torch.randn(32, 1, 8, 8)
        t = torch.rand(32) * 4 - 2
        target = torch.where((t > 0)[:, None, None, None], x.flip(-1), -x)
        return (net(x, t) - target).square().mean()

    for _ in range(150):
        optimizer.zero_grad()
        last = loss()
        last.backward()
        optimizer.step()
    assert last < 0.7


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: UNet(size=8, width=8)(*inputs((2, 8, 8))), "`x`.*channels"),
        (lambda: UNet(size=8, width=8)(*inputs((1, 9, 8))), "`x`.*divisible by 2.*pad"),
        (lambda: UNet(size=30, mult=(1, 2, 2)), "`size`.*divisible"),
        (lambda: UNet(size=8, width=8, blocks=(1, 2, 3)), "`blocks`"),
        (lambda: UNet(size=8, width=8, attention=(2,)), "`attention`"),
        (lambda: UNet(size=8, width=8)(torch.zeros(3, 1, 8, 8), torch.zeros(2)), "`t`"),
        (lambda: MLP(3)(torch.zeros(2, 4), torch.zeros(2)), "`x`"),
        (lambda: MLP(3)(torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, dtype=torch.long)), "`label`"),
        (lambda: MLP(3, classes=2)(torch.zeros(2, 3), torch.zeros(2), torch.tensor([0, 3])), "`label`.*0..2"),
        (
            lambda: MLP(3, classes=2)(torch.zeros(2, 3), torch.zeros(2), torch.tensor([-1, 0])),
            "`label`.*0..2",
        ),
        (lambda: MLP(3, classes=2)(torch.zeros(2, 3), torch.zeros(2), torch.zeros(2)), "`label`.*int64"),
        (lambda: MLP(3, classes=-1), "`classes`"),
        (lambda: Classifier()(torch.zeros(2, 3, 28, 28)), "`x`.*channels"),
    ],
)
def test_mistakes_are_named_in_one_line(call, match):
    with pytest.raises(ValueError, match=match) as error:
        call()
    assert "\n" not in str(error.value)


class TestClassifier:
    def test_shapes_and_batches(self):
        net = Classifier(channels=3, classes=7, width=16)
        for n in (0, 1, 3):
            x, t = inputs((3, 9, 12), n)
            assert net(x).shape == net(x, t).shape == (n, 7)
            assert net.features(x).shape == (n, net.feature_channels)

    def test_examples_do_not_see_each_other(self):
        net = awake(Classifier(width=16)).double()
        x, t = inputs((1, 28, 28), dtype=torch.float64)
        torch.testing.assert_close(net(x)[:1], net(x[:1]), rtol=0, atol=1e-12)
        torch.testing.assert_close(net(x, t)[:1], net(x[:1], t[:1]), rtol=0, atol=1e-12)

    def test_time_starts_without_effect_and_gets_one(self):
        net = Classifier(width=16).eval()
        x, t = inputs((1, 8, 8))
        torch.testing.assert_close(net(x, t), net(x))
        awake(net)
        assert not torch.allclose(net(x, t), net(x))
        assert not torch.allclose(net(x, t), net(x, t + 0.3))

    def test_size_is_within_the_budget(self):
        net = Classifier()
        assert sum(p.numel() for p in net.parameters()) <= 600_000
        assert 64 <= net.feature_channels <= 128
