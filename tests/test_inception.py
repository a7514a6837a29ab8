"""FID's network: its layout, its pooling, what it sees, and whose weights it takes. The weights here are random."""

import hashlib
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from quieten.data import to_pixels
from quieten.metrics.features import Extractor
from quieten.metrics.inception import RESIZING, FIDInception, inception, max3, mean3, resized_as_tf1


def images(n: int, channels: int = 3, side: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same random weights as .pth, without counters, and as .safetensors, with them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = {name: t.half() if t.is_floating_point() else t for name, t in FIDInception().state_dict().items()}
    folder = tmp_path_factory.mktemp("inception")
    torch.save({n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}, folder / "w.pth")
    save_file(state, folder / "w.safetensors")
    return folder / "w.pth", folder / "w.safetensors"


@pytest.fixture(scope="module")
def extractor(files: tuple[Path, Path]) -> Extractor:
    return inception(files[0])


def test_layout_and_size() -> None:
    with torch.device("meta"):
        net = FIDInception()
    state = net.state_dict()
    assert sum(p.numel() for p in net.parameters()) == 23_850_960
    convolutions = [name for name in state if name.endswith(".conv.weight")]
    assert len(convolutions) == 94
    for name, shape in {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_4a_3x3.bn.running_var": (192,),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_5d.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_6a.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_6c.branch7x7dbl_4.conv.weight": (160, 160, 7, 1),
        "Mixed_6e.branch7x7_2.conv.weight": (192, 192, 1, 7),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch3x3dbl_3a.conv.weight": (384, 384, 1, 3),
        "Mixed_7c.branch3x3_2b.conv.weight": (384, 384, 3, 1),
        "fc.weight": (1008, 2048),
        "fc.bias": (1008,),
    }.items():
        assert tuple(state[name].shape) == shape, name
    sides = {"Mixed_5d": (288, 35), "Mixed_6e": (768, 17), "Mixed_7c": (2048, 8)}
    seen = {}
    for name in sides:
        net.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: seen.__setitem__(name, out.shape))
    assert net.eval()(torch.empty(2, 3, 299, 299, device="meta")).shape == (2, 1008)
    assert {name: (shape[1], shape[2]) for name, shape in seen.items()} == sides


def test_the_pooling_is_that_of_fid() -> None:
    x = torch.ones(1, 1, 4, 4)
    assert torch.equal(mean3(x), x)  # a mean that counted the border as zeros would be 4/9 in the corners
    assert torch.equal(max3(-x), -x)
    with torch.device("meta"):
        net = FIDInception()
    assert (net.Mixed_7b.pool, net.Mixed_7c.pool) == (mean3, max3)


def test_features_do_not_depend_on_the_batch_the_channels_or_the_file(extractor: Extractor, files: tuple[Path, Path]) -> None:
    x = images(3, channels=1)
    whole = extractor.extract(x)
    assert whole.shape == (3, 2048)
    assert torch.equal(whole, extractor.extract(x))
    torch.testing.assert_close(extractor.extract(x, batch=1), whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))
    colour = extractor.extract(x.expand(-1, 3, -1, -1))
    torch.testing.assert_close(colour, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))
    other = inception(files[1], hashlib.sha256(files[1].read_bytes()).hexdigest())
    assert torch.equal(other.extract(x[:1]), extractor.extract(x[:1]))
    assert other.hash != extractor.hash  # another file


def test_images_are_bytes_first(extractor: Extractor) -> None:
    """In memory or from a PNG: the same numbers, to the bit."""
    x = images(2)
    assert torch.equal(extractor.extract(x), extractor.extract(to_pixels(x).float() / 127.5 - 1))


def test_the_first_tensorflow_did_not_look_at_pixel_centres() -> None:
    x = torch.arange(4.0).reshape(1, 1, 1, 4).expand(1, 1, 4, 4)
    assert resized_as_tf1(x, 8)[0, 0, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]
    assert resized_as_tf1(x.mT, 8)[0, 0, :, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]
    assert resized_as_tf1(x, 2)[0, 0, 0].tolist() == [0, 2]  # and did not smooth
    y = images(2, side=17)
    torch.testing.assert_close(resized_as_tf1(y, 17), y)
    wide = F.interpolate(y, (33, 33), mode="bilinear", align_corners=True)  # a pixel every 1/2
    torch.testing.assert_close(resized_as_tf1(y, 34)[..., :33, :33], wide, atol=1e-6, rtol=0)


def test_both_preprocessings() -> None:
    levels = torch.tensor([0.0, 128.0, 255.0]).reshape(3, 1, 1, 1).expand(3, 3, 16, 16)
    ours, theirs = (RESIZING[name][0](levels)[:, 0, 0, 0].tolist() for name in ("inception", "pytorch-fid"))
    assert ours == [-1, 0, 127 / 128]
    assert theirs == pytest.approx([-1, 2 * 128 / 255 - 1, 1], abs=1e-6)


def test_the_hash_covers_the_preprocessing(files: tuple[Path, Path], extractor: Extractor) -> None:
    other = Extractor.load(f"pytorch-fid:{files[0]}")
    assert other.hash != extractor.hash
    assert "half pixels" in other.preprocessing
    assert Extractor.load(f"inception:{files[0]}").hash == extractor.hash
    assert "w.pth" in extractor.name  # not those of published FIDs


def test_weights_of_others_are_refused(tmp_path: Path, files: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="`sha256` 6726825d is not that"):
        inception(files[0], "6726825d")
    with pytest.raises(ValueError, match="cannot be read"):
        inception(tmp_path / "none.pth")
    state = torch.load(files[0], weights_only=True)
    torch.save({n: t for n, t in state.items() if n != "fc.bias"}, tmp_path / "short.pth")
    with pytest.raises(ValueError, match=r"layout of pt_inception-2015-12-05: tensor `fc.bias` is missing"):
        inception(tmp_path / "short.pth")
    torch.save({**state, "AuxLogits.fc.bias": state["fc.bias"]}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match="`AuxLogits.fc.bias` is not part of it"):
        inception(tmp_path / "more.pth")
    torch.save({**state, "fc.weight": state["fc.weight"][:1000]}, tmp_path / "other.pth")  # Inception-v3 of ImageNet
    with pytest.raises(ValueError, match=r"layout of pt_inception-2015-12-05: tensor `fc.weight` has shape \(1000, 2048\)"):
        inception(tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="no dictionary of tensors"):
        inception(tmp_path / "list.pth")
    torch.save(math.sqrt, tmp_path / "code.pth")  # a pickle that names a function
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        inception(tmp_path / "code.pth")
    with pytest.raises(ValueError, match="`resizing` must be one of inception, pytorch-fid"):
        inception(files[0], resizing="bicubic")
