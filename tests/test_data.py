"""Data sets: what is read is what was written, whatever the format; bad files are named; the order is a law."""

import gzip
import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from quieten.data import Dataset, LazyImages, Order, emoji, load, to_pixels
from quieten.datasets import idx, pictures
from quieten.datasets.emoji import FONT, GROUPS, emoji_groups

FASHION = Path("/usr/share/datasets/fashion-mnist")
needs_fashion = pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's dataset-fashion-mnist")
needs_emoji = pytest.mark.skipif(not FONT.exists(), reason="needs Debian's fonts-noto-color-emoji")


def picture(seed: int = 0, height: int = 12, width: int = 16) -> np.ndarray:
    """RGB noise: no two pictures agree, so that nothing can be mixed up unseen."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def rows(array: np.ndarray) -> torch.Tensor:
    """(H, W, C) as the tensor (C, H, W)."""
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


def write(path: Path, array: np.ndarray, **options: object) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return array


def write_idx(path: Path, array: np.ndarray) -> None:
    content = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the user's own data."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("QUIETEN_DATA", raising=False)


class TestDataset:
    levels = torch.arange(256, dtype=torch.uint8).view(16, 1, 4, 4)
    whole = Dataset("levels", levels, torch.arange(16), tuple(map(str, range(16))))

    def test_every_grey_level_survives_scaling(self) -> None:
        x = self.whole.all()
        assert x.dtype == torch.float32
        assert (x.min(), x.max()) == (-1, 1)
        assert torch.equal(to_pixels(x), self.levels)

    def test_pixels_are_rounded_and_clamped(self) -> None:
        x = torch.tensor([-7.0, -1, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 1, 7], dtype=torch.float64)
        assert to_pixels(x).tolist() == [0, 0, 0, 1, 255, 255]
        assert x[0] == -7  # the argument is left alone

    def test_batch_follows_the_index(self) -> None:
        x, label = self.whole.batch(torch.tensor([3, 3, 0]))
        assert torch.equal(to_pixels(x), self.levels[[3, 3, 0]])
        assert label.tolist() == [3, 3, 0]

    def test_flip_mirrors_the_marked(self) -> None:
        index = torch.arange(3)
        x = self.whole.batch(index)[0]
        assert torch.equal(self.whole.batch(index, flip=True)[0], x.flip(-1))
        some = self.whole.batch(index, flip=torch.tensor([False, True, False]))[0]
        assert torch.equal(some, torch.stack([x[0], x[1].flip(-1), x[2]]))

    def test_vectors_are_kept_and_not_flipped(self) -> None:
        points = Dataset("points", torch.randn(5, 2), None, ())
        assert torch.equal(points.all(), points.images)
        assert points.shape == (2,)
        with pytest.raises(ValueError, match="`flip` mirrors images"):
            points.batch(torch.arange(2), flip=True)

    @pytest.mark.parametrize("index", [torch.tensor([4, 1]), [4, 1], slice(2, 5), torch.arange(16) % 3 == 1], ids=str)
    def test_subset(self, index) -> None:
        part = self.whole.subset(index)
        assert torch.equal(part.images, self.levels[index])
        assert part.labels.tolist() == torch.arange(16)[index].tolist()
        assert part.classes == self.whole.classes


class TestOrder:
    @given(n=st.integers(1, 40), batch=st.integers(1, 90), seed=st.integers(-(2**70), 2**70))
    def test_every_epoch_is_a_permutation(self, n: int, batch: int, seed: int) -> None:
        order = Order(n, batch, seed)
        steps = -(-3 * n // batch)
        shown = torch.cat([order.indices(step) for step in range(steps)])
        assert len(shown) == steps * batch
        for epoch in range(3):
            assert sorted(shown[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))

    def test_a_restart_continues(self) -> None:
        straight = Order(50, 7, seed=3)
        run = [straight.indices(step) for step in range(40)]
        resumed = Order(50, 7, seed=3)
        assert all(torch.equal(resumed.indices(step), run[step]) for step in (*range(25, 40), 2, 39, 0))

    def test_seeds_and_epochs_differ(self) -> None:
        orders = [Order(64, 64, seed).indices(epoch) for seed in (0, 1, 2**32) for epoch in range(3)]
        assert len({tuple(order.tolist()) for order in orders}) == 9

    def test_each_place_is_as_likely(self) -> None:
        n, epochs = 8, 4000
        order = Order(n, n, seed=0)
        where = torch.stack([order.indices(epoch) for epoch in range(epochs)])
        counts = torch.stack([(where == k).sum(0) for k in range(n)]).double()
        mean, deviation = epochs / n, (epochs / n * (1 - 1 / n)) ** 0.5
        assert ((counts - mean).abs() / deviation).max() < 4.5

    def test_bad_arguments(self) -> None:
        with pytest.raises(ValueError, match="`n` and `batch`"):
            Order(0, 4, 0)
        with pytest.raises(ValueError, match="`step`"):
            Order(4, 4, 0).indices(-1)


class TestNamed:
    def test_digits(self) -> None:
        from sklearn.datasets import load_digits

        parts = [load("digits", split=split) for split in ("train", "test")]
        assert [len(part) for part in parts] == [1498, 299]
        assert parts[0].shape == (1, 8, 8)
        assert parts[0].classes == tuple("0123456789")
        bunch = load_digits()
        sixth = np.arange(1797) % 6 == 5
        for part, mask in zip(parts, (~sixth, sixth), strict=True):
            assert np.array_equal(part.images[:, 0].numpy(), np.floor(bunch.images[mask] * 255 / 16 + 0.5))
            assert np.array_equal(part.labels, bunch.target[mask])
        assert (parts[0].images.min(), parts[0].images.max()) == (0, 255)
        assert len(parts[0].images.unique()) == 17

    def test_resized_and_coloured(self) -> None:
        grey, colour = load("digits"), load("digits", size=16, channels=3)
        assert colour.shape == (3, 16, 16)
        assert torch.equal(colour.images[:, 0], colour.images[:, 2])
        means = [part.images.double().mean((1, 2, 3)) for part in (grey, colour)]
        assert torch.corrcoef(torch.stack(means))[0, 1] > 0.95  # each is still itself

    def test_without_labels(self) -> None:
        digits = load("digits", labels=False)
        assert digits.labels is None
        assert digits.classes == ()

    @needs_fashion
    def test_fashion(self) -> None:
        train, test = load("fashion-mnist"), load("fashion-mnist", split="test")
        assert (len(train), len(test), train.shape) == (60_000, 10_000, (1, 28, 28))
        assert train.labels.bincount().tolist() == [6000] * 10
        assert [train.classes[k] for k in train.labels[:3]] == ["Ankle boot", "T-shirt/top", "T-shirt/top"]
        for part, name in ((train, "train"), (test, "t10k")):
            content = bytes((0, 0, 8, 3)) + np.array(part.images[:, 0].shape, ">i4").tobytes()
            content += part.images.numpy().tobytes()
            assert hashlib.sha256(content).hexdigest() == idx.SHA256["fashion-mnist"][f"{name}-images-idx3-ubyte"]

    @needs_emoji
    def test_emoji(self) -> None:
        whole = emoji(24)
        assert len(whole) > 1400
        assert whole.shape == (3, 24, 24)
        assert len(whole.images.flatten(1).unique(dim=0)) > 0.98 * len(whole)  # clock faces nearly agree
        assert (whole.images.flatten(1) < 250).any(1).sum() > 0.98 * len(whole)  # white squares are white
        assert len(load("emoji", size=24)) + len(load("emoji", split="test", size=24)) == len(whole)
        heart = whole.images.double()[:, :, 8:14, 8:16].mean((2, 3))
        assert (((heart[:, 0] > 200) & (heart[:, 1:] < 80).all(1)).sum()) > 5  # red comes first

    @needs_emoji
    @pytest.mark.skipif(not GROUPS.exists(), reason="needs Debian's unicode-data")
    def test_emoji_groups(self) -> None:
        """The labelled pictures are those of `emoji`, in the same splits: a picture held out of one is held out of both."""
        for split in ("train", "test"):
            grouped, plain = load("emoji-groups", split=split, size=16), load("emoji", split=split, size=16)
            rows = {image.numpy().tobytes() for image in plain.images}
            assert 0.9 * len(plain) < len(grouped) <= len(plain)
            assert all(image.numpy().tobytes() in rows for image in grouped.images)
        groups = emoji_groups()
        assert groups["\N{GRINNING FACE}"] == "Smileys & Emotion"
        assert groups["\N{BLACK HEART SUIT}"] == "Activities"  # asked for as a picture by a second code point
        assert "1" not in groups  # a keycap is more than one

    def test_no_groups(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="unicode-data"):
            emoji_groups(tmp_path / "none.txt")
        (tmp_path / "empty.txt").write_text("# group: none\n")
        with pytest.raises(ValueError, match="names no emoji"):
            emoji_groups(tmp_path / "empty.txt")

    def test_emoji_font_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="fonts-noto-color-emoji"):
            emoji(font=tmp_path / "none.ttf")

    def test_unknown_names_and_arguments(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="did you mean 'fashion-mnist'"):
            load("fashon-mnist")
        with pytest.raises(ValueError, match="digits, emoji, fashion-mnist, mnist"):
            load(tmp_path / "nowhere")
        for wrong in ({"split": "dev"}, {"size": 0}, {"channels": 2}, {"crop": "left"}):
            with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be"):
                load("digits", **wrong)


class TestIdx:
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    labels = np.array([2, 0, 1, 1, 3], np.uint8)

    def store(self, folder: Path, split: str = "train", end: str = "") -> Path:
        write_idx(folder / f"{split}-images-idx3-ubyte{end}", self.images)
        write_idx(folder / f"{split}-labels-idx1-ubyte{end}", self.labels)
        return folder

    @pytest.mark.parametrize("end", ["", ".gz"])
    def test_folder(self, tmp_path: Path, end: str) -> None:
        found = load(self.store(tmp_path, end=end))
        assert np.array_equal(found.images[:, 0], self.images)
        assert found.labels.tolist() == self.labels.tolist()
        assert found.classes == ("0", "1", "2", "3")
        assert load(tmp_path, labels=False).labels is None
        with pytest.raises(ValueError, match="`split` 'test'"):
            load(tmp_path, split="test")

    def test_search_order(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(idx, "DEBIAN", tmp_path / "debian")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("QUIETEN_DATA", str(tmp_path / "variable"))
        places = {
            "cache/quieten/mnist": None,
            "debian/mnist": None,
            "variable/mnist": None,
            "argument": tmp_path / "argument",
            "argument/mnist": tmp_path / "argument",
        }
        with pytest.raises(ValueError, match="download=True"):
            load("mnist", split="test")
        for level, (place, argument) in enumerate(places.items()):  # each goes before those already there
            self.store(tmp_path / place, "t10k")
            write_idx(tmp_path / place / "t10k-images-idx3-ubyte", np.full((5, 4, 3), level, np.uint8))
            found = load("mnist", split="test", data=argument)
            assert (found.images == level).all()
            assert (found.name, found.classes) == ("mnist", tuple("0123456789"))

    def test_missing_names_the_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(idx, "DEBIAN", tmp_path)
        with pytest.raises(ValueError, match="dataset-fashion-mnist.*download=True"):
            load("fashion-mnist")

    def test_damage_is_named(self, tmp_path: Path) -> None:
        self.store(tmp_path)
        path = tmp_path / "train-images-idx3-ubyte"
        whole = path.read_bytes()
        for content, complaint in (
            (whole[:-1], r"59 bytes of data instead of \[5, 4, 3\]"),
            (whole + b"x", "61 bytes"),
            (b"PK\3\4" + whole, "begins with 50 4b 03 04, not 00 00 08 03"),
            (whole[:9], "begins with"),
            (b"", "begins with"),
        ):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=complaint) as caught:
                load(tmp_path)
            assert str(path) in str(caught.value)
        path.unlink()
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(whole)[:-12])
        with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz cannot be read"):
            load(tmp_path)

    def test_labels_must_match(self, tmp_path: Path) -> None:
        self.store(tmp_path)
        write_idx(tmp_path / "train-labels-idx1-ubyte", self.labels[:4])
        with pytest.raises(ValueError, match="4 labels but .* 5 images"):
            load(tmp_path)

    def test_download(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
        mirror, cache = self.store(tmp_path / "mirror", end=".gz"), tmp_path / "cache"
        monkeypatch.setattr(idx, "DEBIAN", tmp_path / "none")
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        monkeypatch.setitem(idx.MIRRORS, "mnist", mirror.as_uri() + "/")
        with pytest.raises(ValueError, match="wrong content"):  # not MNIST's SHA-256
            load("mnist", download=True)
        assert not list(cache.rglob("*ubyte*"))
        sums = {p.stem: hashlib.sha256(gzip.decompress(p.read_bytes())).hexdigest() for p in mirror.iterdir()}
        monkeypatch.setitem(idx.SHA256, "mnist", sums)
        found = load("mnist", download=True)
        assert np.array_equal(found.images[:, 0], self.images)
        assert f"downloading {mirror.as_uri()}" in capsys.readouterr().err
        assert torch.equal(load("mnist").images, found.images)  # kept
        monkeypatch.setitem(idx.MIRRORS, "fashion-mnist", (tmp_path / "gone").as_uri() + "/")
        with pytest.raises(ValueError, match="cannot be downloaded"):
            load("fashion-mnist", download=True)


class TestArrays:
    colour = np.stack([picture(k) for k in range(4)])  # NHWC

    @pytest.mark.parametrize("keys", [("images", "labels"), ("x", "y"), ("arr_0", "arr_1")])
    def test_npz_layouts(self, tmp_path: Path, keys: tuple[str, str]) -> None:
        for array, shape in (
            (self.colour, (3, 12, 16)),
            (self.colour.transpose(0, 3, 1, 2), (3, 12, 16)),
            (self.colour[..., :1], (1, 12, 16)),
            (self.colour[..., 0], (1, 12, 16)),
        ):
            np.savez(tmp_path / "set.npz", **dict(zip(keys, (array, np.array([1, 0, 2, 1])), strict=True)))
            found = load(tmp_path / "set.npz")
            assert (found.name, found.shape) == ("set", shape)
            assert torch.equal(found.images[2, 0], torch.from_numpy(self.colour[2, :, :, 0].copy()))
            assert found.labels.tolist() == [1, 0, 2, 1]
            assert found.classes == ("0", "1", "2")
        assert load(tmp_path / "set.npz", labels=False).labels is None

    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f8"])
    def test_floats_are_kept(self, tmp_path: Path, dtype: str) -> None:
        points = np.random.default_rng(0).normal(size=(6, 2)).astype(dtype)
        np.save(tmp_path / "points.npy", points)
        found = load(tmp_path / "points.npy")
        assert found.images.dtype == torch.float32
        assert np.array_equal(found.all().numpy(), points.astype(np.float32))
        with pytest.raises(ValueError, match="`size` and `channels` cannot change points"):
            load(tmp_path / "points.npy", size=8)

    def test_npy_resized(self, tmp_path: Path) -> None:
        np.save(tmp_path / "set.npy", self.colour)
        found = load(tmp_path / "set.npy", size=12, channels=1)
        assert found.shape == (1, 12, 12)
        # nothing to scale at this height, so the centre is cut out as it is
        luma = self.colour[:, :, 2:14].astype(float) @ (0.299, 0.587, 0.114)
        assert np.abs(found.images[:, 0].numpy() - luma).max() < 1

    @pytest.mark.parametrize(
        "arrays, complaint",
        [
            ({"images": np.array([[np.nan, 1]])}, "NaN or infinite"),
            ({"images": np.array([[1e300, 1]])}, "NaN or infinite"),
            ({"images": np.zeros((3, 4, 4), np.int64)}, "int64"),
            ({"images": np.zeros((3, 2, 4, 4), np.uint8)}, "save images as uint8"),
            ({"images": np.zeros((0, 4, 4), np.uint8)}, "save images as uint8"),
            ({"images": np.zeros(3, np.uint8)}, "save images as uint8"),
            ({"pictures": np.zeros((3, 4, 4), np.uint8)}, "holds pictures: name the array"),
            ({"images": np.array([{}, {}])}, "cannot be read"),  # a pickle
            ({"x": np.zeros((3, 4, 4), np.uint8), "y": np.zeros(2, np.int64)}, r"integers from 0 on, shape \(3,\)"),
            ({"x": np.zeros((3, 4, 4), np.uint8), "y": np.full(3, -1)}, "from 0 on"),
            ({"x": np.zeros((3, 4, 4), np.uint8), "y": np.zeros(3)}, "labels float64"),
        ],
    )
    def test_refused(self, tmp_path: Path, arrays: dict[str, np.ndarray], complaint: str) -> None:
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(ValueError, match=complaint) as caught:
            load(tmp_path / "bad.npz")
        assert "bad.npz" in str(caught.value)

    def test_damaged(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "bad.npz", images=self.colour)
        content = (tmp_path / "bad.npz").read_bytes()
        for part in (content[:-40], content[:3], b""):
            (tmp_path / "bad.npz").write_bytes(part)
            with pytest.raises(ValueError, match=r"bad\.npz cannot be read"):
                load(tmp_path / "bad.npz")

    def test_no_test_split(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "set.npz", images=self.colour)
        with pytest.raises(ValueError, match="`split` 'test'.*take split train"):
            load(tmp_path / "set.npz", split="test")


class TestPictures:
    def test_formats(self, tmp_path: Path) -> None:
        """RGB, RGBA, grey, 16 bit, bilevel and palette pictures come in with the colours they were saved with."""
        rgb = picture(0)
        ramp = np.arange(192, dtype=np.uint8).reshape(12, 16)
        alpha = np.where(np.arange(16) < 8, 255, 0).astype(np.uint8) + np.zeros((12, 1), np.uint8)
        half = np.full((12, 16), 128, np.uint8)
        write(tmp_path / "a.png", rgb)
        write(tmp_path / "b.png", np.dstack([rgb, alpha]))
        write(tmp_path / "c.png", ramp)
        write(tmp_path / "d.png", ramp.astype(np.uint16) * 257)
        Image.fromarray(ramp).convert("1", dither=Image.Dither.NONE).save(tmp_path / "e.png")
        Image.fromarray(ramp).convert("P").save(tmp_path / "f.gif")
        write(tmp_path / "g.png", np.dstack([ramp, half]))  # grey with alpha
        Image.fromarray(rgb).convert("CMYK").save(tmp_path / "h.tif")
        write(tmp_path / "i.bmp", rgb)
        found = load(tmp_path)
        assert found.shape == (3, 12, 16)
        assert found.labels is None
        a, b, c, d, e, f, g, h, i = found.images
        assert torch.equal(a, rows(rgb))
        assert torch.equal(b[:, :, :8], a[:, :, :8])
        assert (b[:, :, 8:] == 255).all()
        for grey in (c, d, f):
            assert all(torch.equal(plane, torch.from_numpy(ramp)) for plane in grey)
        assert torch.equal(e[0], torch.from_numpy(np.where(ramp >= 128, 255, 0).astype(np.uint8)))
        over_white = ramp + (255 - ramp.astype(float)) * (127 / 255)
        assert np.abs(g[1].numpy() - over_white).max() <= 1
        assert (h.int() - a.int()).abs().max() <= 1
        assert torch.equal(i, a)

    def test_grey_folder_stays_grey(self, tmp_path: Path) -> None:
        ramp = write(tmp_path / "a.png", picture(0)[..., 0])
        write(tmp_path / "b.png", picture(1)[..., 0].astype(np.uint16) * 257)
        found = load(tmp_path)
        assert found.shape == (1, 12, 16)
        assert torch.equal(found.images[0, 0], torch.from_numpy(ramp))
        assert torch.equal(load(tmp_path, channels=3).images[:, 1:2], found.images)

    def test_luma(self, tmp_path: Path) -> None:
        rgb = write(tmp_path / "a.png", picture())
        grey = load(tmp_path, channels=1).images[0, 0].numpy()
        assert np.abs(grey - rgb @ (0.299, 0.587, 0.114)).max() < 1

    @pytest.mark.parametrize("end", ["jpg", "png", "tif"])
    def test_orientation(self, tmp_path: Path, end: str) -> None:
        upright = np.zeros((32, 16, 3), np.uint8)
        upright[:8], upright[8:, :8] = 255, 128
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned right when shown
        write(tmp_path / f"a.{end}", np.rot90(upright).copy(), exif=exif)
        write(tmp_path / "b.png", upright)
        found = load(tmp_path)
        assert found.shape == (3, 32, 16)
        assert (found.images[0].int() - found.images[1].int()).abs().max() <= 2

    def test_size_and_crop(self, tmp_path: Path) -> None:
        wide = np.zeros((20, 60, 3), np.uint8)
        wide[:, 20:40] = (200, 100, 50)
        write(tmp_path / "a.png", wide)
        colour = torch.tensor([200, 100, 50], dtype=torch.uint8).view(3, 1, 1)
        centre = load(tmp_path, size=10).images[0]
        assert torch.equal(centre[:, :, 2:8], colour.expand(3, 10, 6))  # the kernel looks over the edge
        assert (centre.int() - colour.int()).abs().max() < 20
        stretched = load(tmp_path, size=30, crop="stretch").images[0]
        assert torch.equal(stretched[:, :, 13:17], colour.expand(3, 30, 4))
        assert (stretched[:, :, :7] == 0).all()
        padded = load(tmp_path, size=30, crop="pad").images[0]
        assert (padded[:, :9] == 255).all()
        assert torch.equal(padded[:, 12:18, 13:17], colour.expand(3, 6, 4))

    @pytest.mark.parametrize("end", ["png", "jpg"])
    def test_antialiased(self, tmp_path: Path, end: str) -> None:
        stripes = np.tile(np.array([0, 255], np.uint8), (160, 80))
        write(tmp_path / f"a.{end}", stripes)
        small = load(tmp_path, size=20).images[0, 0, 2:-2, 2:-2].double()
        assert (small - 127.5).abs().max() < 4

    def test_classes(self, tmp_path: Path) -> None:
        write(tmp_path / "pets/dog/1.png", picture(1))
        write(tmp_path / "pets/cat/deep/2.png", picture(2))
        write(tmp_path / "pets/dog/0.png", picture(3))
        write(tmp_path / "pets/.thumbs/4.png", picture(4, 2, 2))
        (tmp_path / "pets/readme.txt").write_text("not a picture")
        for path in (tmp_path, tmp_path / "pets"):
            found = load(path)
            assert found.classes == ("cat", "dog")
            assert found.labels.tolist() == [0, 1, 1]
            assert torch.equal(found.images, torch.stack([rows(picture(k)) for k in (2, 3, 1)]))
        plain = load(tmp_path, labels=False)
        assert (plain.labels, plain.classes) == (None, ())
        write(tmp_path / "pets/loose.png", picture(5))
        assert load(tmp_path).labels is None
        assert load(tmp_path / "pets/cat").labels is None

    def test_splits(self, tmp_path: Path) -> None:
        for k, name in enumerate(("train/a/0", "train/b/1", "test/a/2")):
            write(tmp_path / f"{name}.png", picture(k))
        assert load(tmp_path).labels.tolist() == [0, 1]
        assert torch.equal(load(tmp_path, split="test").images, rows(picture(2))[None])
        with pytest.raises(ValueError, match="`split` 'test'.*is one whole: take split train"):
            load(tmp_path / "train", split="test")
        (tmp_path / "test/a/2.png").unlink()
        with pytest.raises(ValueError, match="`split` 'test'.*only train"):
            load(tmp_path, split="test")

    def test_unequal_sizes(self, tmp_path: Path) -> None:
        write(tmp_path / "a.png", picture(0))
        write(tmp_path / "b.png", picture(0))
        write(tmp_path / "c.png", picture(0, 12, 20))
        with pytest.raises(ValueError, match=r"c\.png is 20 x 12 but a\.png is 16 x 12: pass `size`"):
            load(tmp_path)
        assert load(tmp_path, size=8).shape == (3, 8, 8)

    def test_corrupt_files(self, tmp_path: Path) -> None:
        for k, name in enumerate(("a", "b", "c", "d")):
            write(tmp_path / ("x" if k % 2 else "y") / f"{name}.jpg", picture(k, 64, 64), quality=95)
        cut = tmp_path / "x/b.jpg"
        cut.write_bytes(cut.read_bytes()[:2000])  # its header is whole
        (tmp_path / "y/c.jpg").write_bytes(b"")
        with pytest.raises(ValueError, match=r"y/c\.jpg cannot be read .*skip_corrupt=True"):
            load(tmp_path)
        with pytest.warns(UserWarning, match=r"2 corrupt image files: x/b\.jpg, y/c\.jpg"):
            found = load(tmp_path, skip_corrupt=True)
        assert len(found) == 2
        assert found.labels.tolist() == [0, 1]
        (tmp_path / "y/c.jpg").unlink()
        with pytest.raises(ValueError, match=r"x/b\.jpg cannot be read .*truncated"):
            load(tmp_path)
        for path in (tmp_path / "x/d.jpg", tmp_path / "y/a.jpg"):
            path.unlink()
        with pytest.raises(ValueError, match=r"x/b\.jpg cannot be read"):  # nothing would be left
            load(tmp_path, skip_corrupt=True)

    def test_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="holds no images"):
            load(tmp_path)

    def test_zip_is_a_folder(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
            for k, name in enumerate(("cat/0.png", "dog/1.png", "cat/2.png")):
                archive.write(self.saved(tmp_path / "pets" / name, k), f"pets/{name}")
            archive.writestr("__MACOSX/pets/cat/._0.png", b"resource fork")
        folder, packed = load(tmp_path / "pets"), load(tmp_path / "pets.zip")
        assert torch.equal(packed.images, folder.images)
        assert torch.equal(packed.labels, folder.labels)
        assert (packed.name, packed.classes) == ("pets", ("cat", "dog"))
        (tmp_path / "pets.zip").write_bytes(b"PK, but no more")
        with pytest.raises(ValueError, match=r"pets\.zip cannot be read"):
            load(tmp_path / "pets.zip")

    @staticmethod
    def saved(path: Path, seed: int) -> Path:
        write(path, picture(seed))
        return path

    @pytest.mark.parametrize("packed", [False, True])
    def test_lazy_equals_eager(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
        for k in range(40):
            self.saved(tmp_path / f"pets/{'cat' if k % 3 else 'dog'}/{k}.png", k)
        path = tmp_path / "pets"
        if packed:
            path = tmp_path / "pets.zip"
            with zipfile.ZipFile(path, "w") as archive:
                for file in sorted((tmp_path / "pets").rglob("*.png")):
                    archive.write(file, file.relative_to(tmp_path))
        eager = load(path, size=8)
        monkeypatch.setattr(pictures, "IN_MEMORY", 100)
        lazy = load(path, size=8)
        assert isinstance(lazy.images, LazyImages)
        assert (lazy.shape, lazy.classes, len(lazy)) == (eager.shape, eager.classes, len(eager))
        index = torch.tensor([39, 0, 7, 7])
        for one, other in zip(lazy.batch(index, flip=True), eager.batch(index, flip=True), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(lazy.all(), eager.all())
        assert torch.equal(lazy.subset(slice(5, 9)).all(), eager.all()[5:9])

    def test_lazy_corrupt_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for k in range(5):
            write(tmp_path / f"{k}.jpg", picture(k, 64, 64), quality=95)
        cut = tmp_path / "3.jpg"
        cut.write_bytes(cut.read_bytes()[:2000])
        monkeypatch.setattr(pictures, "IN_MEMORY", 100)
        lazy = load(tmp_path)  # the header is whole, so it shows later
        lazy.batch(torch.arange(3))
        with pytest.raises(ValueError, match=r"3\.jpg cannot be read"):
            lazy.all()
        with pytest.warns(UserWarning, match=r"1 corrupt image files: 3\.jpg"):
            assert len(load(tmp_path, skip_corrupt=True).all()) == 4
