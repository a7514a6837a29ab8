"""FID's network against its description written down once more, and against torch-fidelity's, with random weights in both.

The real weights cannot be had offline. With any weights the layout is the same, and so is the arithmetic.
"""

import importlib
import math
import sys
import types
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import within
from quieten.metrics.inception import RESIZING, FIDInception, inception, resized_as_tf1

pytestmark = pytest.mark.usefixtures("one_thread")

# Every branch of a block as a chain of layers, name and channels and kernel; "mean" and "max" pool 3x3 pixels with stride 1,
# "halve" takes maxima with stride 2. Branches are concatenated in this order.
A = (
    "branch1x1 64 1 1; branch5x5_1 48 1 1, branch5x5_2 64 5 5; "
    "branch3x3dbl_1 64 1 1, branch3x3dbl_2 96 3 3, branch3x3dbl_3 96 3 3; mean, branch_pool {} 1 1"
)
B = "branch3x3 384 3 3; branch3x3dbl_1 64 1 1, branch3x3dbl_2 96 3 3, branch3x3dbl_3 96 3 3; halve"
C = (
    "branch1x1 192 1 1; branch7x7_1 {0} 1 1, branch7x7_2 {0} 1 7, branch7x7_3 192 7 1; branch7x7dbl_1 {0} 1 1, "
    "branch7x7dbl_2 {0} 7 1, branch7x7dbl_3 {0} 1 7, branch7x7dbl_4 {0} 7 1, branch7x7dbl_5 192 1 7; mean, branch_pool 192 1 1"
)
D = (
    "branch3x3_1 192 1 1, branch3x3_2 320 3 3; branch7x7x3_1 192 1 1, branch7x7x3_2 192 1 7, branch7x7x3_3 192 7 1, "
    "branch7x7x3_4 192 3 3; halve"
)
E = (
    "branch1x1 320 1 1; branch3x3_1 384 1 1, branch3x3_2a 384 1 3; branch3x3_1 384 1 1, branch3x3_2b 384 3 1; "
    "branch3x3dbl_1 448 1 1, branch3x3dbl_2 384 3 3, branch3x3dbl_3a 384 1 3; "
    "branch3x3dbl_1 448 1 1, branch3x3dbl_2 384 3 3, branch3x3dbl_3b 384 3 1; {}, branch_pool 192 1 1"
)
STEM = (
    "Conv2d_1a_3x3 32 3 3, Conv2d_2a_3x3 32 3 3, Conv2d_2b_3x3 64 3 3, halve, "
    "Conv2d_3b_1x1 80 1 1, Conv2d_4a_3x3 192 3 3, halve"
)
BLOCKS = {
    "": STEM,
    "Mixed_5b": A.format(32), "Mixed_5c": A.format(64), "Mixed_5d": A.format(64), "Mixed_6a": B,
    "Mixed_6b": C.format(128), "Mixed_6c": C.format(160), "Mixed_6d": C.format(160), "Mixed_6e": C.format(192), "Mixed_7a": D,
    "Mixed_7b": E.format("mean"), "Mixed_7c": E.format("max"),
}  # fmt: skip
HALVING = {"Conv2d_1a_3x3", "Mixed_6a.branch3x3", "Mixed_6a.branch3x3dbl_3", "Mixed_7a.branch3x3_2", "Mixed_7a.branch7x7x3_4"}
INSIDE = HALVING | {"Conv2d_2a_3x3", "Conv2d_4a_3x3"}
"""Layers that keep within the picture; the others fill its border with zeros and keep the size."""


def layout() -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors, by the description above."""
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    channels = 3
    for block, text in BLOCKS.items():
        total = 0
        for branch in text.split("; "):
            width = channels
            for words in (layer.split() for layer in branch.split(", ")):
                if len(words) == 4:
                    name, (out, high, wide) = ".".join(filter(None, (block, words[0]))), map(int, words[1:])
                    shapes[f"{name}.conv.weight"] = (out, width, high, wide)
                    shapes |= {f"{name}.bn.{part}": (out,) for part in ("weight", "bias", "running_mean", "running_var")}
                    width = out
            total += width
        channels = total
    return shapes


def by_description(state: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """The output of every block, from the layers' equations."""
    outputs = {}
    for block, text in BLOCKS.items():
        branches = []
        for branch in text.split("; "):
            y = x
            for word, *_ in (layer.split() for layer in branch.split(", ")):
                y = (
                    layer(state, ".".join(filter(None, (block, word))), y)
                    if "Conv" in word or "branch" in word
                    else pooled(word, y)
                )
            branches.append(y)
        x = outputs[block] = torch.cat(branches, 1)
    return outputs


def layer(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight = state[f"{name}.conv.weight"]
    pad = (0, 0) if name in INSIDE else (weight.shape[2] // 2, weight.shape[3] // 2)
    y = F.conv2d(x, weight, stride=2 if name in HALVING else 1, padding=pad)
    scale, shift, mean, var = (
        state[f"{name}.bn.{part}"][:, None, None] for part in ("weight", "bias", "running_mean", "running_var")
    )
    return ((y - mean) / (var + 0.001).sqrt() * scale + shift).clamp_min(0)


def pooled(how: str, x: Tensor) -> Tensor:
    if how == "halve":
        return x.unfold(2, 3, 2).unfold(3, 3, 2).amax((-1, -2))
    if how == "max":
        return F.pad(x, (1, 1, 1, 1), value=-math.inf).unfold(2, 3, 1).unfold(3, 3, 1).amax((-1, -2))
    count = F.pad(torch.ones_like(x), (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1).sum((-1, -2))
    return F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1).sum((-1, -2)) / count


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Weights under which no activation dies away, by the description's names."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in layout().items():
        normal = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            found[name] = normal * math.sqrt(2.0 / math.prod(shape[1:]))
        else:
            found[name] = 0.1 * normal + 1.0 if name.endswith(("bn.weight", "running_var")) else 0.1 * normal
    return found


@pytest.fixture(scope="module")
def weights(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "w.pth"
    torch.save(state, path)
    return path


def pictures(side: int) -> Tensor:
    return torch.randint(256, (2, 3, side, side), generator=torch.Generator().manual_seed(side), dtype=torch.uint8)


def test_every_name_and_shape() -> None:
    with torch.device("meta"):
        ours = {name: tuple(t.shape) for name, t in FIDInception().state_dict().items() if "num_batches" not in name}
    assert ours == layout()
    assert sum(math.prod(shape) for name, shape in ours.items() if "running" not in name) == 23_850_960


@torch.no_grad()
def test_every_block(state: dict[str, Tensor]) -> None:
    """In float64, so that what differs is the graph."""
    with torch.device("meta"):
        net = FIDInception()
    net = net.to_empty(device="cpu").double().eval()
    net.load_state_dict(state, strict=False)
    x = (resized_as_tf1(pictures(40).double()) - 128) / 128
    want, got = by_description({name: t.double() for name, t in state.items()}, x), {}
    for name in filter(None, BLOCKS):
        net.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: got.__setitem__(name, out))
    features = net.features(x)
    for name, output in got.items():
        assert output.shape == want[name].shape, name
        within(1e-10, (output - want[name]).abs().max() / want[name].abs().max(), f"{name}, relative difference")
    assert float(want["Mixed_7c"].std()) > 0.1  # alive to the end
    within(1e-10, (features - want["Mixed_7c"].flatten(2).mean(2)).abs().max(), "features")


def torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its modules without its __init__, which wants torchvision."""
    spec = PathFinder.find_spec("torch_fidelity", [*sys.path, str(Path(__file__).parents[1] / "build/peers")])
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs torch-fidelity: pip install --no-deps --target build/peers -r benchmarks/peers.txt")
    package = types.ModuleType("torch_fidelity")
    package.__path__ = list(spec.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    return {
        name: importlib.import_module(f"torch_fidelity.{name}")
        for name in ("feature_extractor_inceptionv3", "interpolate_compat_tensorflow")
    }


@pytest.mark.parametrize("side", [8, 32, 299, 400])
def test_features_are_torch_fidelitys(side: int, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, shapes, resizing, network: it takes our file, all of its names and no other, and finds the same features."""
    modules = torch_fidelity(monkeypatch)
    theirs = modules["feature_extractor_inceptionv3"].FeatureExtractorInceptionV3("x", ["2048"], str(weights))
    levels = pictures(side)
    resize = modules["interpolate_compat_tensorflow"].interpolate_bilinear_2d_like_tensorflow1x
    resized = resize(levels.float(), size=(299, 299), align_corners=False)
    assert torch.equal(resized_as_tf1(levels.float()), resized)  # to the bit
    assert torch.equal(RESIZING["inception"][0](levels.float()), (resized_as_tf1(levels.float()) - 128) / 128)
    with torch.no_grad():
        (want,) = theirs(levels)
    got = inception(weights).extract(levels.float() / 127.5 - 1)
    assert float(want.std()) > 0.05
    within(1e-5, (got - want).abs().max() / want.abs().max(), "features, relative difference")
