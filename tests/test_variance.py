"""Variances on disk: fitted, resumed, loaded, refused; and the commands around them."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import refuses
from quieten.cli import main
from quieten.comparing.lineup import Entrant
from quieten.covariance import Analytic, Fisher, HessianDiagonal, Unit
from quieten.covariances.fit import fit_variance, measure_analytic
from quieten.covariances.jacobian import Probed
from quieten.covariances.stored import fingerprint, load_variance, make_variance, save_variance, variance_names
from quieten.data import Dataset, to_pixels
from quieten.fit import fit
from quieten.noise import Noise
from quieten.objective import Batch
from quieten.oracle import GaussianData
from quieten.process import VP
from quieten.training.runs import Run
from quieten.training.schema import Train
from quieten.training.source import open_source
from quieten.training.weights import packed
from quieten.wrap import WithCovariance
from toy import toy_data, toy_run

pytestmark = pytest.mark.usefixtures("one_thread")
PLAN = Train(images=48, batch=8, lr=1e-2, warmup=0, clip=None, ema=16, precision="fp32", log_every=1, save_minutes=None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run with weights, hardly trained."""
    path = tmp_path_factory.mktemp("variance") / "toy"
    fit(toy_run(path, "train.images=16", "data.flip=false"), data=toy_data())
    return path


@pytest.fixture
def opened(trained, tmp_path):
    """The run as commands open it, its variances in a folder of the test's own."""
    from dataclasses import replace

    return replace(open_source(str(trained), device="cpu"), variances=(tmp_path / "variance",))


@pytest.mark.parametrize(
    "kind, options, name",
    [
        ("ocm", {}, "ocm"),
        ("sn", {"head": "simple", "link": "linear"}, "sn"),
        ("npr", {"head": "separate"}, "npr"),
        ("mixed", {"basis": "dct", "derivative": "fd"}, "mixed-dct"),
        ("analytic", {}, "analytic"),
    ],
)
def test_what_is_fitted_is_loaded_again(opened, kind, options, name):
    fitted = fit_variance(opened, toy_data(), kind=kind, train=PLAN, **options)
    assert fitted.file == opened.variances[0] / f"{name}.safetensors"
    facts = json.loads(fitted.file.with_suffix(".json").read_text())
    assert facts["trunk"] == fingerprint(opened.denoiser)
    assert facts["images"] == (30 if kind == "analytic" else 48)
    source = load_variance(opened.variances, name, opened.denoiser)
    x, label = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    p = WithCovariance(opened.denoiser, source)(x, 0.5, label=label)
    assert p.var.isfinite().all()
    assert (p.var >= 0).all()
    assert (p.basis is not None) == ("dct" in name)
    torch.testing.assert_close(p.mean, opened.denoiser(x, 0.5, label=label).mean)
    assert variance_names(opened.variances) == [name]
    if kind != "analytic":
        run = Run.open(opened.variances[0] / name)
        assert [row["step"] for row in run.metrics()] == list(range(1, 7))
        names = set(run.read().model)
        assert not any("net." in n for n in names), "the network is not saved with the head"


def test_fitting_goes_on_where_it_was_interrupted(opened, trained, tmp_path):
    import os
    import signal
    from dataclasses import replace

    whole = fit_variance(replace(opened, variances=(tmp_path / "whole",)), toy_data(), train=PLAN)

    def interrupt(row):
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    part = fit_variance(opened, toy_data(), train=PLAN, callbacks=[interrupt])
    assert part.file is None
    assert "goes on from there" in part.message
    assert not (opened.variances[0] / "ocm.safetensors").exists()
    done = fit_variance(opened, toy_data(), train=PLAN)
    assert done.file.read_bytes() == whole.file.read_bytes() or _same(done.file, whole.file)


def _same(a: Path, b: Path) -> bool:
    from quieten.training.weights import read_tensors

    first, second = read_tensors(a)[0], read_tensors(b)[0]
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_only_the_average_of_the_head_is_kept_and_the_network_is_untouched(opened):
    before = fingerprint(opened.denoiser)
    fit_variance(opened, toy_data(), train=PLAN)
    assert fingerprint(opened.denoiser) == before
    run = Run.open(opened.variances[0] / "ocm")
    checkpoint = run.read()
    kept = load_variance(opened.variances, "ocm", opened.denoiser).state_dict()
    for key, value in kept.items():
        torch.testing.assert_close(value, checkpoint.ema[f"objective.source.{key}"], rtol=2e-3, atol=1e-4)
    assert any(not torch.equal(checkpoint.ema[k], checkpoint.model[k]) for k in checkpoint.ema if "source" in k)


def test_other_options_data_or_weights_are_refused(opened, tmp_path):
    fit_variance(opened, toy_data(), train=PLAN)
    with refuses("`name` 'ocm'", "other options"):
        fit_variance(opened, toy_data(), train=PLAN, head="simple")
    with refuses("no labels"):
        fit_variance(opened, Dataset("bare", toy_data().images, None, ()), train=PLAN)
    with refuses("(1, 9, 9)", "(1, 8, 8)"):
        fit_variance(
            opened, Dataset("wide", torch.zeros(4, 1, 9, 9, dtype=torch.uint8), torch.zeros(4).long(), ("a",)), train=PLAN
        )
    for name in ("probed", "../ocm", ""):
        with refuses("`name`", "letters"):
            fit_variance(opened, toy_data(), name=name or " ", train=PLAN)
    with refuses("`kind`", "'ddpm'"):
        fit_variance(opened, toy_data(), kind="ddpm", train=PLAN)
    with refuses("DCT", "3"):
        make_variance("ocm", opened.denoiser, basis="dct", block=3)
    with torch.no_grad():
        next(opened.denoiser.parameters()).add_(1.0)
    with refuses("other weights", "fit it again"):
        load_variance(opened.variances, "ocm", opened.denoiser)
    with torch.no_grad():
        next(opened.denoiser.parameters()).sub_(1.0)


def test_files_that_are_no_variance_are_refused(opened, tmp_path):
    with refuses("no variance 'ocm'", "none is fitted yet", "quieten variance fit"):
        load_variance(opened.variances, "ocm", opened.denoiser)
    folder = tmp_path / "variance"
    folder.mkdir()
    (folder / "cut.safetensors").write_bytes(b"123")
    with refuses("cut.safetensors", "fit the variance again"):
        load_variance(folder, "cut", opened.denoiser)
    (folder / "other.safetensors").write_bytes(packed({"a": torch.zeros(1)}))
    with refuses("other.safetensors", "format 1"):
        load_variance(folder, "other", opened.denoiser)
    with refuses("'othr'", "did you mean 'other'"):
        load_variance(folder, "othr", opened.denoiser)
    source = make_variance("ocm", opened.denoiser)
    facts = {
        "kind": "ocm",
        "head": "simple",
        "basis": "pixel",
        "block": 4,
        "link": "unit",
        "cap": 1.0,
        "trunk": fingerprint(opened.denoiser),
    }
    save_variance(folder, "wrong", source, facts)  # a complex head that says it is a simple one
    with refuses("wrong.safetensors", "tensor"):
        load_variance(folder, "wrong", opened.denoiser)


def test_some_sources_need_no_file(opened):
    for name, kind in (("big", Unit), ("fisher", Fisher), ("probed", Probed)):
        assert isinstance(load_variance((), name, opened.denoiser, cap=1.0), kind)


def test_analytic_measures_gaussian_data_within_its_errors():
    """1 - m is small in high noise, where plain averages would be all error."""
    data = GaussianData(torch.zeros(32), 0.25, VP)
    x0 = data.sample(Noise(0, range(2000)))
    lams = torch.tensor([-8.0, -4.0, 0.0, 4.0], dtype=torch.float64)

    def batches():
        for i in torch.arange(2000).split(500):
            yield Batch(x0[i], i, {})

    m, error = measure_analytic(data, batches, lams)
    alpha, sigma = VP.scales(lams)
    rho = alpha**2 * 0.25 / (alpha**2 * 0.25 + sigma**2)
    assert ((1 - m - rho).abs() < 5 * error + 1e-12).all()
    plain = (2 / (32 * 2000)) ** 0.5  # the error of a mean of squares of standard noise
    assert error[0] < 0.02 * plain
    assert error[1] < 0.1 * plain
    source = Analytic(lams, m, error)
    got = source(data, x0[:1].float(), -4.0, data(x0[:1], -4.0))
    assert abs(float(got) / 0.25 - 1) < 5 * float(error[1] / rho[1])


# ---- commands


def test_from_the_command_line_to_pictures(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez(
        tmp_path / "toy.npz",
        images=toy_data().images.add(1).mul(127.5).clamp(0, 255).byte().numpy(),
        labels=toy_data().labels.numpy(),
    )
    main_ = lambda *words: main(list(map(str, words)))  # noqa: E731
    for kind, more in (("ocm", ("--head", "simple")), ("analytic", ())):
        with pytest.raises(SystemExit) as ended:
            main_("variance", "fit", trained, "toy.npz", "--kind", kind, "--images", 16, "--batch", 8, "--device", "cpu", *more)
        assert ended.value.code == 0
        assert f"{kind}.safetensors" in capsys.readouterr().out
    for words in (("--transition", "ocm"), ("--transition", "ocm-ddim"), ("--variance", "analytic"), ("--variance", "probed")):
        with pytest.raises(SystemExit) as ended:
            main_("sample", trained, "--steps", 3, "-n", 4, *words, "--out", tmp_path / "a.png", "--device", "cpu")
        assert ended.value.code == 0, capsys.readouterr().err
        assert "3 network evaluations" in capsys.readouterr().out
        assert (tmp_path / "a.png").stat().st_size > 100
    with pytest.raises(SystemExit) as ended:
        main_("variance", "show", trained, "toy.npz", "--split", "train", "-n", 16, "--levels", 3, "--out", tmp_path / "c.png")
    assert ended.value.code == 0
    table = capsys.readouterr().out
    assert table.count("ocm ") == table.count("analytic ") == 3
    assert (tmp_path / "c.png").stat().st_size > 1000
    for words, pieces in (
        (("sample", trained, "--transition", "ddim", "--variance", "ocm"), ("--variance ocm", "'ddim'")),
        (("sample", trained, "--variance", "npr"), ("no variance 'npr'", "ocm")),
        (("variance", "fit", trained, "toy.npz", "--kind", "ocn"), ("--kind ocn", "did you mean 'ocm'")),
        (("variance", "show", trained, "toy.npz", "--split", "train", "--variance", "sn"), ("no variance 'sn'",)),
    ):
        with pytest.raises(SystemExit) as ended:
            main_(*words)
        assert ended.value.code == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        for piece in pieces:
            assert piece in line


def test_a_variance_in_another_folder_is_named_with_it(trained, tmp_path, typed, monkeypatch):
    """What is printed after fitting can be typed, and every command that names a variance takes it."""
    monkeypatch.chdir(tmp_path)
    pictures = toy_data()
    np.savez("toy.npz", images=to_pixels(pictures.all()).numpy(), labels=pictures.labels.numpy())
    fitting = ("variance", "fit", trained, "toy.npz", "--kind", "analytic", "--images", 8, "--name", "zz", "--out", "vv")
    ran = typed(*fitting)
    assert ran.code == 0, ran.err
    printed = ran.out.splitlines()[-1].split()
    assert printed == ["quieten", "sample", str(trained), "--variance", "vv/zz"]
    ran = typed(*printed[1:], "--steps", 2, "-n", 2, "--out", "a.png")
    assert ran.code == 0, ran.err
    ran = typed("variance", "show", trained, "toy.npz", "--split", "train", "--variance", "vv/zz", "-n", 8, "--levels", 2,
                "--out", "c.png")  # fmt: skip
    assert ran.code == 0, ran.err
    ran = typed("nll", trained, "toy.npz", "--split", "train", "-n", 4, "--steps", 3, "--variance", "vv/zz", "--out", "n.json")
    assert ran.code == 0, ran.err
    assert json.loads(Path("n.json").read_text())["protocol"]["variance"] == "zz"
    entrant = Entrant(str(trained), open_source(str(trained)))
    digest = hashlib.sha256(Path("vv/zz.safetensors").read_bytes()).hexdigest()
    for name in ("vv/zz", "./vv/zz.safetensors"):
        assert entrant.contender(f"ancestral:{name}", 2).facts["variance"] == digest
    other = toy_run(tmp_path / "other", "train.images=16", "train.seed=1")
    fit(other, data=toy_data())
    for model, name, piece in ((trained, "vv/yy", "no variance 'vv/yy'"), (other.path, "vv/zz", "other weights")):
        ran = typed("sample", model, "--variance", name, "--steps", 2, "-n", 2)
        assert (ran.code, ran.err.count("\n")) == (2, 1)
        assert piece in ran.err


def test_the_zoo_brings_variances_along():
    opened = open_source("zoo:fashion-mnist", device="cpu")
    names = variance_names(opened.variances[1:])
    for name in names:
        source = load_variance(opened.variances[1:], name, opened.denoiser)
        p = WithCovariance(opened.denoiser, source)(torch.randn(1, 1, 28, 28), 0.0, label=torch.tensor([3]))
        assert p.var.isfinite().all()
        assert 0 < float(p.var.mean()) < math.inf
    assert isinstance(load_variance(opened.variances[1:], "ocm", opened.denoiser), HessianDiagonal)


def test_a_diffusers_folder_keeps_its_variance_beside_the_model(tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    diffusers.DDPMPipeline(model, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "theirs")
    for words in (
        ("variance", "fit", tmp_path / "theirs", "digits", "--images", 16, "--batch", 8, "--device", "cpu"),
        (
            "sample",
            tmp_path / "theirs",
            "--transition",
            "ocm",
            "--steps",
            3,
            "-n",
            2,
            "--out",
            tmp_path / "a.png",
            "--device",
            "cpu",
        ),
    ):
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, words)))
        assert ended.value.code == 0, capsys.readouterr().err
    facts = json.loads((tmp_path / "theirs" / "variance" / "ocm.json").read_text())
    assert facts["levels"][0] > 9.0  # the table's own ends
    assert facts["data"] == "digits"


def test_latents_are_bounded_channel_by_channel(opened):
    from dataclasses import replace

    from quieten.denoiser import Preconditioned
    from quieten.nets import UNet

    latents = Dataset("latents", torch.randn(40, 2, 8, 8) * torch.tensor([1.0, 5.0]).reshape(2, 1, 1), None, ())
    denoiser = Preconditioned(UNet(2, 8, width=8, detail=4), VP, "v", lambda lam: -lam / 8, shape=(2, 8, 8)).eval()
    latent = replace(opened, denoiser=denoiser, classes=(), null={})
    fit_variance(latent, latents, train=PLAN)
    source = load_variance(opened.variances, "ocm", denoiser)
    reach = 0.25 * (latents.images.amax((0, 2, 3)) - latents.images.amin((0, 2, 3))).square()
    torch.testing.assert_close(source.cap.flatten().float(), reach, rtol=1e-5, atol=0)
    assert (WithCovariance(denoiser, source)(torch.randn(2, 2, 8, 8), -8.0).var <= source.cap).all()
