"""Extractors by name, the commands that make them and use them, and statistics over batches and processes."""

import hashlib
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import Type
from quieten.data import load
from quieten.metrics import Result, energy_distance, frechet, kid, memorisation, prdc, sliced_wasserstein
from quieten.metrics.features import Extractor, Statistics, gather_rows, statistics_of
from quieten.training.weights import read_tensors

SHORT = ("--images", 640, "--batch", 32, "--width", 8, "--device", "cpu")


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small extractor of digits, made by the command."""
    from quieten.commands.features import train

    file = tmp_path_factory.mktemp("features") / "judge.safetensors"
    assert train("digits", out=file, images=6400, batch=32, lr=4e-3, width=12, shift=1, device="cpu")
    return file


# ---- training and loading


def test_a_trained_extractor_is_a_classifier_of_its_data(judge: Path) -> None:
    tensors, facts = read_tensors(judge)
    assert all(tensor.dtype == torch.float16 for tensor in tensors.values())
    assert float(facts["accuracy"]) > 0.6
    assert json.loads(facts["plan"])["data"] == "digits"
    extractor = Extractor.load(judge)
    assert extractor.hash == hashlib.sha256(judge.read_bytes()).hexdigest()
    assert extractor.extract(load("digits", split="test").all()).shape == (299, 18)


def test_training_by_command_resumes_and_refuses_other_training(typed: Type, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    ran = typed("features", "train", "digits", *SHORT, "--out", file)
    assert ran.code == 0, ran.err
    assert "12 features" in ran.out
    assert "trained to the end" in typed("features", "train", "digits", *SHORT, "--out", file).out
    ran = typed("features", "train", "digits", *SHORT, "--out", file, "--size", 12)
    assert ran.code == 2
    assert "size None instead of 12" in ran.err
    ran = typed("features", "train", "digits", *SHORT, "--out", file.with_name("large.safetensors"), "--size", 12)
    assert ran.code == 0, ran.err
    ran = typed("features", "train", "digits", *SHORT, "--out", file, "--shift", 3)
    assert ran.code == 2
    assert "shift 2 instead of 3" in ran.err
    ran = typed("features", "train", "digits", *SHORT, "--out", tmp_path / "a.pt")
    assert "`--out" in ran.err
    typed("train-classifier", "digits", *SHORT, "--out", tmp_path / "noisy.safetensors")
    ran = typed("features", "train", "digits", *SHORT, "--out", tmp_path / "noisy.safetensors")
    assert "trained otherwise" in ran.err


def test_extractors_by_name(judge: Path, tmp_path: Path) -> None:
    x = draws(3, 1, 8, 8).float()
    assert torch.equal(Extractor.load("pixels").extract(x), x.flatten(1))
    assert Extractor.load("zoo:fashion-mnist").hash == Extractor.zoo("fashion-mnist").hash
    assert Extractor.load(judge, Extractor.load(judge).hash[:8]).hash == Extractor.load(judge).hash
    for wrong in ("0" * 64, "", "abc"):
        with pytest.raises(ValueError, match="`sha256`"):
            Extractor.load(judge, wrong)
    with pytest.raises(ValueError, match="`sha256`"):
        Extractor.load("zoo:fashion-mnist", "0" * 64)
    with pytest.raises(ValueError, match="no classifier of clean images"):
        Extractor.load("zoo:fashion-mnist-noisy")
    with pytest.raises(ValueError, match="pixels, zoo:NAME"):
        Extractor.load(tmp_path / "none")
    torch.save({"a": x}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="damaged"):
        Extractor.load(tmp_path / "x.safetensors")


# ---- statistics


@pytest.mark.parametrize("batch", [1, 17, 256])
def test_statistics_do_not_depend_on_the_batch(judge: Path, batch: int) -> None:
    """1e-5 relative through a network, and rounding without one."""
    data = load("digits", split="test")
    for extractor, bound in ((Extractor.load(judge), 1e-5), (Extractor.pixels(), 1e-12)):
        whole = statistics_of(data, extractor, len(data))
        parts = statistics_of(data, extractor, batch)
        assert parts.n == len(data)
        scale = float(whole.covariance.diagonal().amax())
        assert float((parts.mean - whole.mean).abs().amax()) <= bound * math.sqrt(scale)
        assert float((parts.covariance - whole.covariance).abs().amax()) <= bound * scale


@pytest.mark.parametrize("batch", [1, 17])
def test_no_metric_depends_on_the_batch(judge: Path, batch: int) -> None:
    extractor, data, real = Extractor.load(judge), load("digits", split="test").all(), load("digits").all()[:400]
    results = []
    for size in (batch, 256):
        x, y = extractor.extract(data, size), extractor.extract(real, size)
        given = extractor.for_features()
        results.append([*every_metric(x, y, Statistics.of(y), given), memorisation(x[:100], y, x[100:], given).result])
    for one, other in zip(*results, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-5), one.name
        assert one.uncertainty == pytest.approx(other.uncertainty, rel=1e-4), one.name


def test_merging_is_one_pass() -> None:
    x = 1e5 + draws(100, 4)
    want = Statistics.of(x, "abc")
    for cut in (0, 1, 30, 100):
        merged = Statistics.of(x[:cut], "abc").merge(Statistics.of(x[cut:], "abc"))
        assert merged.n == 100
        torch.testing.assert_close(merged.mean, want.mean, rtol=1e-14, atol=0)
        torch.testing.assert_close(merged.covariance, want.covariance, rtol=1e-8, atol=1e-9)
    assert want.gather() is want  # alone
    with pytest.raises(ValueError, match="extractors abc and xyz"):
        Statistics.of(x, "abc").merge(Statistics.of(x, "xyz"))
    with pytest.raises(ValueError, match="4 and 3 features"):
        Statistics.of(x).merge(Statistics.of(x[:, :3]))
    with pytest.raises(ValueError, match="unknown number"):
        want.merge(Statistics(want.mean, want.covariance, None))


def test_rows_are_gathered_by_their_places() -> None:
    x = draws(5, 2)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(gather_rows(x[order], order), x)
    twice = torch.tensor([3, 0, 4, 1, 2, 0])  # a sampler that fills up its last batch
    assert torch.equal(gather_rows(x[twice], twice), x)
    with pytest.raises(ValueError, match="lacks 1 places, the first 1"):
        gather_rows(x[[0, 2]], torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="one place for each"):
        gather_rows(x, order[:2])


def test_the_command_writes_what_the_functions_find(typed: Type, judge: Path, tmp_path: Path) -> None:
    file = tmp_path / "stats.npz"
    ran = typed("features", "stats", "digits", "--extractor", judge, "--out", file, "--batch", 100)
    assert ran.code == 0, ran.err
    assert "1498 images" in ran.out
    extractor = Extractor.load(judge)
    want = statistics_of(load("digits"), extractor)
    found = Statistics.load(file)
    assert (found.n, found.extractor) == (1498, extractor.hash)
    torch.testing.assert_close(found.covariance, want.covariance, rtol=1e-5, atol=1e-7)
    assert typed("features", "stats", "digits", "--extractor", judge, "--out", tmp_path / "half.npz", "--single").code == 0
    with np.load(tmp_path / "half.npz", allow_pickle=False) as arrays:
        assert arrays["sigma"].dtype == np.float32
    assert "`--out" in typed("features", "stats", "digits", "--extractor", judge, "--out", tmp_path / "x.csv").err
    assert "no extractor 'nought'" in typed("features", "stats", "digits", "--extractor", "nought").err


def test_a_reference_batch_of_adm(typed: Type, judge: Path, tmp_path: Path) -> None:
    """Images as arr_0 (N, H, W, C), with or without their statistics: those are read, or made from these."""
    x = draws(20, 6)
    images = load("digits", split="test").images[:20].permute(0, 2, 3, 1).numpy()
    mean, covariance = x.mean(0).numpy(), torch.cov(x.T).numpy()
    spatial = {"mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    np.savez(tmp_path / "both.npz", arr_0=images, mu=mean, sigma=covariance, **spatial)
    found = Statistics.load(tmp_path / "both.npz")
    assert (found.n, found.extractor) == (20, "")
    torch.testing.assert_close(found.covariance, torch.cov(x.T))
    np.savez(tmp_path / "images.npz", images)  # numpy calls it arr_0
    with pytest.raises(ValueError, match="quieten features stats"):
        Statistics.load(tmp_path / "images.npz")
    ran = typed("features", "stats", tmp_path / "images.npz", "--extractor", judge, "--out", tmp_path / "stats.npz")
    assert ran.code == 0, ran.err
    want = Statistics.of(Extractor.load(judge).extract(load("digits", split="test").subset(slice(20)).all()))
    torch.testing.assert_close(Statistics.load(tmp_path / "stats.npz").mean, want.mean, rtol=1e-5, atol=1e-6)


# ---- two processes

HERE = Path(__file__)


def every_metric(x: Tensor, y: Tensor, reference: Statistics, given: Extractor) -> list[Result]:
    """Of features against features."""
    return [
        frechet(x, reference, given),
        kid(x, y, given, blocks=5, size=100),
        energy_distance(x, y, extractor=given),
        sliced_wasserstein(x, y, 50, extractor=given),
        *prdc(x, y, given).values(),
    ]


def measured(folder: Path) -> None:
    """What each process does: its share of the features, then every metric on all of them."""
    from torch import distributed

    extractor = Extractor.load(folder / "judge.safetensors")
    data, real = load("digits", split="test"), load("digits")
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    places = torch.arange(rank, len(data), world)
    features = gather_rows(extractor.extract(data.batch(places)[0], 50), places)
    results = every_metric(features, extractor.extract(real.all()), statistics_of(real, extractor), extractor.for_features())
    if rank == 0:
        (folder / f"{world}.json").write_text(json.dumps([result.to_dict() for result in results]))


def test_two_processes_measure_what_one_does(judge: Path, tmp_path: Path) -> None:
    (tmp_path / "judge.safetensors").write_bytes(judge.read_bytes())
    measured(tmp_path)
    folders = [str(HERE.parent), str(HERE.parents[1] / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(folders)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    where = ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    ran = subprocess.run([*torchrun, *where, str(HERE), str(tmp_path)], env=environment, capture_output=True, timeout=200)
    assert ran.returncode == 0, ran.stderr.decode()
    alone, both = (json.loads((tmp_path / f"{world}.json").read_text()) for world in (1, 2))
    for one, two in zip(alone, both, strict=True):
        assert two["value"] == pytest.approx(one["value"], rel=1e-5), one["name"]
        assert two["uncertainty"] == pytest.approx(one["uncertainty"], rel=1e-4), one["name"]
        assert two["protocol"] == one["protocol"]


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    measured(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
