"""The papers' image sets, from stand-in files of the right format: what is read is what was written; damage is named."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import refuses
from quieten import data as data_module
from quieten.data import Dataset, MappedImages, load
from quieten.datasets import idx, pictures
from quieten.datasets.image_sets import CIFAR_CLASSES, npz_member
from quieten.training.config import load_data, load_recipe

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the user's own data."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(idx, "DEBIAN", tmp_path_factory.mktemp("debian"))
    monkeypatch.delenv("QUIETEN_DATA", raising=False)


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


# ---- CIFAR-10


def cifar(folder: Path, per_batch: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Six batches of the binary version; the training images (N, 3, 32, 32) and labels."""
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = noise(6, per_batch, 3, 32, 32), RNG.integers(0, 10, (6, per_batch)).astype(np.uint8)
    for k, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        rows = np.concatenate([labels[k][:, None], images[k].reshape(per_batch, -1)], axis=1)
        (folder / f"{name}.bin").write_bytes(rows.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(CIFAR_CLASSES))
    return images, labels


def test_cifar_by_path_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar10" / "cifar-10-batches-bin"
    images, labels = cifar(folder)
    monkeypatch.setenv("QUIETEN_DATA", str(tmp_path))
    for source, where in (
        (folder, None),
        ("cifar10", tmp_path),
        ("cifar10", folder.parent),
        ("cifar10", folder),
        ("cifar10", None),
    ):
        train, test = (load(source, split=split, data=where) for split in ("train", "test"))
        assert np.array_equal(train.images, images[:5].reshape(-1, 3, 32, 32))
        assert np.array_equal(test.images, images[5])
        assert np.array_equal(train.labels, labels[:5].reshape(-1))
        assert (train.name, train.classes) == ("cifar10", CIFAR_CLASSES)
    assert load(folder, labels=False).labels is None
    assert load(folder, size=16, channels=1).shape == (1, 16, 16)


def test_cifar_in_its_archive(tmp_path: Path) -> None:
    images, _ = cifar(tmp_path / "cifar-10-batches-bin")
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "cifar-10-batches-bin", "cifar-10-batches-bin")
    assert np.array_equal(load(tmp_path / "cifar-10-binary.tar.gz", split="test").images, images[5])
    for file in (tmp_path / "cifar-10-batches-bin").iterdir():
        file.unlink()
    assert len(load("cifar10", data=tmp_path)) == 20


@pytest.mark.parametrize("what", ["cifar-10-batches-py/data_batch_1", "data_batch_1", "cifar-10-python.tar.gz"])
def test_pickles_are_not_opened(tmp_path: Path, what: str) -> None:
    file = tmp_path / what
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with refuses("pickles", "not opened", "cifar-10-binary.tar.gz"):
        load("cifar10", data=tmp_path)


def test_damaged_cifar_is_named(tmp_path: Path) -> None:
    cifar(tmp_path)
    whole = (tmp_path / "data_batch_3.bin").read_bytes()
    for content, piece in ((whole[:-5], "no multiple of 3073"), (b"", "0 bytes"), (b"\x0b" + whole[1:], "label 11")):
        (tmp_path / "data_batch_3.bin").write_bytes(content)
        with refuses("data_batch_3.bin", piece, "cifar-10-binary.tar.gz"):
            load(tmp_path)
    (tmp_path / "data_batch_3.bin").unlink()
    with refuses("cannot be read", "data_batch_3.bin"):
        load(tmp_path)
    with refuses("cifar10 is not in", "cs.toronto.edu", "`data`"):
        load("cifar10", data=tmp_path / "elsewhere")
    with refuses("`cut`", "7", "leave it out"):
        load("digits", cut=7)


# ---- ImageNet


def imagenet(folder: Path, side: int = 32, compressed: bool = False) -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = noise(11, 5, 3, side, side), RNG.integers(1, 8, (11, 5))
    save = np.savez_compressed if compressed else np.savez
    for k, name in enumerate([*(f"train_data_batch_{i}" for i in range(1, 11)), "val_data"]):
        save(folder / f"{name}.npz", data=images[k].reshape(5, -1), labels=labels[k], mean=np.zeros(3 * side**2))
    return images, labels


@pytest.mark.parametrize("compressed", [False, True])
def test_imagenet_stays_on_the_disk(tmp_path: Path, compressed: bool) -> None:
    images, labels = imagenet(tmp_path / "imagenet32", compressed=compressed)
    train, test = load("imagenet32", data=tmp_path), load(tmp_path / "imagenet32", split="test")
    flat, number = images[:10].reshape(-1, 3, 32, 32), labels[:10].reshape(-1) - 1
    assert isinstance(train.images, MappedImages)
    assert all(isinstance(array, np.memmap) != compressed for array in map(base, train.images.arrays))
    assert (len(train), train.shape, len(test)) == (50, (3, 32, 32), 5)
    assert np.array_equal(train.labels, number)
    index = torch.tensor([49, 0, 17, 17, 5])  # across files, out of order, twice
    x, label = train.batch(index)
    assert torch.equal(data_module.to_pixels(x), torch.from_numpy(flat[index]))
    assert np.array_equal(label, number[index])
    part = train.subset(torch.tensor([48, 3, 20])).subset(torch.tensor([2, 0]))
    assert torch.equal(part.images[torch.tensor([0, 1])], torch.from_numpy(flat[[20, 48]]))
    assert np.array_equal(data_module.to_pixels(train.all()), flat)
    with refuses("`size` and `channels`", "stays on the disk"):
        load(tmp_path / "imagenet32", size=16)
    with refuses("train_data_batch_1.npz", "32 x 32 pixels, not 64", "other size"):
        load("imagenet64", data=tmp_path / "imagenet32")


def base(array: np.ndarray) -> np.ndarray:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def test_writing_to_a_mapped_batch_leaves_the_file_alone(tmp_path: Path) -> None:
    imagenet(tmp_path)
    before = (tmp_path / "val_data.npz").read_bytes()
    found = load(tmp_path, split="test")
    found.images[torch.arange(5)].zero_()
    found.images.arrays[0][:] = 0
    assert (tmp_path / "val_data.npz").read_bytes() == before


def test_damaged_imagenet_is_named(tmp_path: Path) -> None:
    imagenet(tmp_path)
    np.savez(tmp_path / "train_data_batch_4.npz", data=noise(5, 100), labels=np.ones(5, np.int64))
    with refuses("train_data_batch_4.npz", "(5, 100)", "side^2"):
        load(tmp_path)
    np.savez(tmp_path / "train_data_batch_4.npz", data=noise(5, 192), labels=np.zeros(5, np.int64))
    with refuses("train_data_batch_4.npz", "labels"):
        load(tmp_path)
    (tmp_path / "train_data_batch_4.npz").write_bytes(b"PK")
    with refuses("train_data_batch_4.npz", "cannot be read"):
        load(tmp_path)
    with refuses("imagenet64 is not in", "image-net.org"):
        load("imagenet64", data=tmp_path / "elsewhere")


def test_npz_members(tmp_path: Path) -> None:
    arrays = {"a": noise(3, 4), "b": RNG.normal(size=(2, 3, 5)), "f": np.asfortranarray(noise(4, 6)), "scalar": np.array(3)}
    np.savez(tmp_path / "plain.npz", **arrays)
    np.savez_compressed(tmp_path / "small.npz", **arrays)
    for name, array in arrays.items():
        for file in ("plain.npz", "small.npz"):
            found = npz_member(tmp_path / file, name)
            assert np.array_equal(found, array)
            assert found.dtype == array.dtype
    np.savez(tmp_path / "evil.npz", data=np.array([{}], dtype=object))
    for key in ("data", "missing"):
        with refuses("evil.npz", f"`{key}`"):
            npz_member(tmp_path / "evil.npz", key)


def test_large_arrays_stay_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above a limit; in every layout, equal to what memory would hold."""
    layouts = {"nhwc": noise(6, 4, 5, 3), "nchw": noise(6, 3, 4, 5), "nhw": noise(6, 4, 5)}
    for name, array in layouts.items():
        np.savez(tmp_path / f"{name}.npz", images=array)
        np.save(tmp_path / f"{name}.npy", array)
    for file in sorted(tmp_path.iterdir()):
        small = load(file)
        assert isinstance(small.images, torch.Tensor)
        with monkeypatch.context() as patched:
            patched.setattr(data_module, "IN_MEMORY", 10)
            large = load(file)
        assert isinstance(large.images, MappedImages)
        assert torch.equal(large.all(), small.all())


# ---- pictures: CelebA, LSUN, EDM's archives


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


def celeba(folder: Path, n: int = 6) -> list[np.ndarray]:
    (folder / "img_align_celeba").mkdir(parents=True)
    faces = [noise(218, 178, 3) for _ in range(n)]
    for k, face in enumerate(faces):
        (folder / "img_align_celeba" / f"{k:06d}.png").write_bytes(png(face))
    return faces


def test_celeba_is_cut_then_resized(tmp_path: Path) -> None:
    faces = celeba(tmp_path)
    found = load("celeba", data=tmp_path, size=64, cut=140)
    assert (found.name, found.shape, len(found)) == ("celeba", (3, 64, 64), 6)
    square = faces[2][39:179, 19:159]  # 140 of 218 x 178, in the middle
    assert np.array_equal(load("celeba", data=tmp_path, cut=140).images[2].permute(1, 2, 0), square)
    small = Image.fromarray(square).resize((64, 64), Image.Resampling.BICUBIC)
    assert np.array_equal(found.images[2].permute(1, 2, 0), np.asarray(small))
    with refuses("000000.png", "too small to cut 200"):
        load("celeba", data=tmp_path, cut=200)


def test_celebas_own_splits(tmp_path: Path) -> None:
    faces = celeba(tmp_path)
    lines = [f"{k:06d}.png {part}" for k, part in enumerate([0, 0, 1, 0, 2, 2])]
    (tmp_path / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    train, test = (load("celeba", split=split, data=tmp_path) for split in ("train", "test"))
    assert [np.array_equal(a.permute(1, 2, 0), faces[k]) for a, k in zip(train.images, (0, 1, 3), strict=True)] == [True] * 3
    assert len(test) == 2
    (tmp_path / "list_eval_partition.txt").write_text("000000.png\n")
    with refuses("list_eval_partition.txt", "a file name and a number"):
        load("celeba", data=tmp_path)
    (tmp_path / "list_eval_partition.txt").write_text("999999.jpg 0\n")
    with refuses("`split` 'train'", "none of its 1 images"):
        load("celeba", data=tmp_path)


def test_celeba_as_a_zip_and_decoded_lazily(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faces = celeba(tmp_path)
    with zipfile.ZipFile(tmp_path / "img_align_celeba.zip", "w") as archive:
        for file in sorted((tmp_path / "img_align_celeba").iterdir()):
            archive.write(file, f"img_align_celeba/{file.name}")
            file.unlink()
    monkeypatch.setattr(pictures, "IN_MEMORY", 10)
    found = load("celeba", data=tmp_path, cut=140)
    assert isinstance(found.images, pictures.LazyImages)
    assert np.array_equal(found.images[torch.tensor([4])][0].permute(1, 2, 0), faces[4][39:179, 19:159])


def test_lsun_is_a_folder_of_pictures_however_deep(tmp_path: Path) -> None:
    for k in range(3):
        place = tmp_path / "bedroom_train" / "0" / str(k)
        place.mkdir(parents=True)
        (place / f"{k}.png").write_bytes(png(noise(20, 30, 3)))
    found = load("lsun-bedroom", data=tmp_path, size=16, labels=False)
    assert (found.name, found.shape, len(found)) == ("lsun-bedroom", (3, 16, 16), 3)
    with refuses("lsun-bedroom is not in", "bedroom_train"):
        load("lsun-bedroom", data=tmp_path / "bedroom_train" / "0")


def edm_zip(path: Path, labels: object, n: int = 4, as_folder: bool = False) -> list[np.ndarray]:
    images = [noise(8, 8, 3) for _ in range(n)]
    names = [f"{k // 2:05d}/img{k:08d}.png" for k in range(n)]
    rows = [[name, label] for name, label in zip(names, labels, strict=False)] if isinstance(labels, list) else labels
    content = {"dataset.json": json.dumps({"labels": rows}).encode(), **dict(zip(names, map(png, images), strict=True))}
    if as_folder:
        for name, data in content.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in content.items():
                archive.writestr(name, data)
    return images


@pytest.mark.parametrize("as_folder", [False, True])
def test_edms_archives(tmp_path: Path, as_folder: bool) -> None:
    """Labels from dataset.json; its numbered subfolders are no classes."""
    path = tmp_path / ("set" if as_folder else "set.zip")
    images = edm_zip(path, [3, 0, 1, 1], as_folder=as_folder)
    found = load(path)
    assert found.labels.tolist() == [3, 0, 1, 1]
    assert found.classes == ("0", "1", "2", "3")
    assert np.array_equal(found.images[3].permute(1, 2, 0), images[3])
    assert load(path, labels=False).labels is None
    other = tmp_path / ("other" if as_folder else "other.zip")
    edm_zip(other, None, as_folder=as_folder)
    assert load(other).labels is None
    assert load(other).classes == ()


def test_damaged_labels_are_named(tmp_path: Path) -> None:
    for labels, piece in (
        ([3, 0, 1], "no label for 00001/img00000003.png"),
        ([0, 1, 2, -1], "-1 below 0"),
        ("x", "cannot be read"),
    ):
        edm_zip(tmp_path / "set.zip", labels)
        with refuses("dataset.json", piece):
            load(tmp_path / "set.zip")


def test_recipes_reach_them(tmp_path: Path) -> None:
    celeba(tmp_path)
    recipe = load_recipe("emoji", ["data={name: celeba, size: 32, cut: 140}", f"data.folder={tmp_path}"])
    assert load_data(recipe).shape == (3, 32, 32)
    cifar(tmp_path / "cifar-10-batches-bin")
    found = load_data(load_recipe(tmp_path / "cifar-10-batches-bin"))
    assert isinstance(found, Dataset)
    assert found.shape == (3, 32, 32)
