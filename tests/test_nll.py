"""`quieten nll`: what is typed, what is printed, what is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Ran, Type
from helpers import within
from quieten.likelihood import evaluate
from quieten.likelihoods.decoders import Discretised
from quieten.solvers.grids import linear, take
from quieten.training.runs import Checkpoint, Run, build_update
from quieten.training.source import open_source
from quieten.transition import Ancestral
from toy import toy_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of 8x8 pictures whose weights are random."""
    torch.manual_seed(0)
    run = toy_run(tmp_path_factory.mktemp("nll") / "toy")
    tensors = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in build_update(run.recipe).state_dict().items()}
    run.save(Checkpoint(1, tensors, tensors, {}))
    return run


def read(ran: Ran) -> dict[str, Any]:
    """What the command wrote, from the file that it names last."""
    assert ran.code == 0, ran.err
    return json.loads(Path(ran.out.strip().splitlines()[-1]).read_text())


SMALL = ("--steps", 4, "-n", 20, "--fit", 8, "--batch", 8)


OPTIONS = ["", "--variance small", "--bound-grid optimal --levels 9", "--bound-grid own", "--bound-grid powerp",
           "--decoder flat", "--decoder dequantised", "--estimator continuous", "--split train", "--no-clip",
           "--variance equal", "--variance optimal", "--variance optimal --bound-grid optimal --levels 9"]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
def test_terms_add_up(typed: Type, run: Run, options: str):
    ran = typed("nll", run.path, "digits", *SMALL, *options.split())
    result = read(ran)
    terms = result["terms"]
    parts = sum(terms[name]["nats"] for name in ("prior", "diffusion", "reconstruction"))
    within(1e-9, abs(parts / terms["total"]["nats"] - 1), "sum of the terms")
    within(1e-12, abs(terms["total"]["bits/dim"] * 64 * math.log(2) / terms["total"]["nats"] - 1), "bits per dimension")
    assert result["dims"] == 64
    if "continuous" not in options:
        assert len(result["steps"]) == 3
        within(1e-9, abs(sum(step["nats"] for step in result["steps"]) / terms["diffusion"]["nats"] - 1), "sum of the steps")
    assert "bits/dim of the 8-bit data, scaled to [-1, 1]" in ran.out
    assert result["protocol"]["n"] == 20
    assert ("expensive" in ran.out) == ("flat" in options)
    assert f"at most {terms['total']['bits/dim']:.4f} bits/dim" in ran.out


def test_equals_the_library(typed: Type, run: Run, tmp_path: Path):
    """The command is `evaluate` on the examples, grid and decoder that it says; the batch changes nothing."""
    a = read(typed("nll", run.path, "digits", *SMALL, "--variance", "small", "--out", tmp_path / "a.json"))
    b = read(typed("nll", run.path, "digits", *SMALL[:-1], 3, "--variance", "small", "--out", tmp_path / "b.json"))
    within(1e-5, abs(a["terms"]["total"]["nats"] / b["terms"]["total"]["nats"] - 1), "another batch")
    from quieten.data import Order, load

    data = load("digits", split="test")
    x0, _ = data.batch(Order(len(data), 20, 0).indices(0))
    source = open_source(str(run.path))
    chain = source.grid(1000, None)[:-1].flip(0)
    var = float(a["protocol"]["decoder"].split("variance ")[1].split(",")[0])
    bound = evaluate(source.denoiser, x0, Discretised(var), take(chain, linear(4, 1000)), cond={"label": torch.full((20,), 2)},
                     transition=Ancestral(spread=False, clip=1.0))  # fmt: skip
    within(2e-3, abs(float(bound.total.mean()) / a["terms"]["total"]["nats"] - 1), "library against command")


def test_a_fitted_variance_is_taken(typed: Type, run: Run):
    """The one that a run has is the default; its bound is not that of another."""
    from quieten.covariance import Analytic
    from quieten.covariances.stored import fingerprint, save_variance

    lam = torch.linspace(-9.0, 9.0, 20)
    facts = {"kind": "analytic", "trunk": fingerprint(run.denoiser()), "cap": 1.0}
    files = save_variance(run.path / "variance", "analytic", Analytic(lam, 1 - 0.5 * torch.sigmoid(lam)), facts)
    try:
        fitted = read(typed("nll", run.path, "digits", *SMALL))
        assert fitted["protocol"]["variance"] == "analytic"
        for name in (files, "learned"):
            named = read(typed("nll", run.path, "digits", *SMALL, "--variance", name))
            assert named["terms"] == fitted["terms"]
        big = read(typed("nll", run.path, "digits", *SMALL, "--variance", "big"))
        assert big["terms"]["diffusion"] != fitted["terms"]["diffusion"]
        assert big["terms"]["reconstruction"] == fitted["terms"]["reconstruction"]
    finally:
        for file in files.parent.iterdir():
            file.unlink()


def test_the_ode_is_measured_too(typed: Type, run: Run, tmp_path: Path):
    """One number, of the denoiser without any variance; more steps change it little."""
    few, many = (
        read(typed("nll", run.path, "digits", "--estimator", "ode", "--steps", steps, "-n", 6, "--out", tmp_path / "a.json"))
        for steps in (12, 24)
    )
    assert set(many["terms"]) == {"total"}
    assert many["protocol"]["variance"] is None
    assert "dequantisation" in many["protocol"]["decoder"]
    within(0.1, abs(few["terms"]["total"]["bits/dim"] / many["terms"]["total"]["bits/dim"] - 1), "12 steps against 24")


def test_the_ode_by_exact_trace_and_by_tolerance(typed: Type, run: Run, tmp_path: Path):
    """Probes scatter about the exact trace, and a tolerance finds what many steps do."""

    def found(*options: object) -> tuple[float, str, Any]:
        ran = typed("nll", run.path, "digits", "--estimator", "ode", "-n", 2, *options, "--out", tmp_path / "a.json")
        result = read(ran)
        return result["terms"]["total"]["bits/dim"], ran.out, result["protocol"]

    steps, _, _ = found("--steps", 40)
    adaptive, said, _ = found("--tolerance", 1e-3)
    assert "tolerance 0.001, one probe" in said
    within(0.02, abs(steps / adaptive - 1), "40 steps against a tolerance")
    exact, said, _ = found("--steps", 2, "--probes", 0)
    assert "2 steps, exact trace" in said
    probed, _, protocol = found("--steps", 2, "--probes", 20)
    within(0.1, abs(probed / exact - 1), "twenty probes against the exact trace")
    assert protocol["probes"] == 20


def test_several_times_quieten_the_bound_in_continuous_time(typed: Type, run: Run, tmp_path: Path):
    results = [read(typed("nll", run.path, "digits", "--estimator", "continuous", "-n", 60, "--draws", draws,
                          "--out", tmp_path / "a.json")) for draws in (1, 20)]  # fmt: skip
    one, many = (result["terms"]["diffusion"] for result in results)
    assert many["nats_se"] < 0.7 * one["nats_se"]
    within(5 * one["nats_se"], abs(one["nats"] - many["nats"]), "means")
    assert results[1]["protocol"]["n"] == 60
    assert results[1]["terms"]["prior"]["nats"] == pytest.approx(results[0]["terms"]["prior"]["nats"], rel=1e-12)


def test_the_optimal_variance_is_the_best_of_one_number_a_step(typed: Type, run: Run, tmp_path: Path):
    """Measured on training data, and still below the posterior's and the large one on test data, at every step."""
    bounds = {}
    for variance in ("equal", "big", "optimal"):
        options = ("--steps", 5, "-n", 100, "--fit", 200, "--variance", variance, "--out", tmp_path / "a.json")
        bounds[variance] = read(typed("nll", run.path, "digits", *options))
    assert bounds["optimal"]["protocol"]["variance"] == "optimal"
    for i, best in enumerate(bounds["optimal"]["steps"]):
        for other in ("equal", "big"):
            assert best["nats"] < bounds[other]["steps"][i]["nats"] + 3 * best["nats_se"], (i, other)
        # 1/2 D log(1 + 2 KL / D), what theory says of the widening, on other examples
        wanted = 32 * math.log1p(bounds["equal"]["steps"][i]["nats"] / 32)
        within(0.15, abs(best["nats"] / wanted - 1), f"step {i}")


def test_a_run_keeps_its_results(typed: Type, run: Run):
    ran = typed("nll", run.path, "digits", *SMALL)
    assert Path(ran.out.strip().splitlines()[-1]) == run.path / "nll" / "digits-test-big-linear4.json"


@pytest.mark.parametrize("options, pieces", [
    (("--bound-grid", "optmal"), ("--bound-grid optmal", "did you mean 'optimal'")),
    (("--estimator", "flow"), ("--estimator flow", "bound, continuous, ode")),
    (("--estimator", "ode", "--decoder", "flat"), ("--decoder flat", "ODE")),
    (("--decoder", "gaussian"), ("--decoder gaussian", "discretised, flat, dequantised")),
    (("--compat", "paper"), ("--compat paper", "official")),
    (("--compat", "official"), ("table", "leave it out")),
    (("--compat", "official", "--decoder", "flat"), ("--compat official", "--decoder")),
    (("--variance", "optmal"), ("'optmal'", "quieten variance fit")),
    (("--variance", "learned"), ("--variance learned", "quieten variance fit", "optimal")),
    (("--variance", "big", "--estimator", "continuous"), ("--variance big", "infinite")),
    (("--variance", "big", "--estimator", "ode"), ("--variance big", "ODE has none")),
    (("--draws", 2), ("--draws 2", "continuous")),
    (("--probes", 2), ("--probes 2", "--estimator ode")),
    (("--tolerance", 0.1, "--estimator", "continuous"), ("--tolerance 0.1", "--estimator ode")),
    (("--tolerance", -1, "--estimator", "ode"), ("`rtol`", "-1")),
    (("--variance", "range"), ("--variance range", "network")),
    (("-n", 1000), ("-n 1000", "299")),
    (("-n", 1498, "--split", "train"), ("-n 1498", "no training example")),
    (("--steps", 1001), ("--steps 1001", "1000 levels")),
    (("--bound-grid", "linear_ddim", "--steps", 15), ("`K`=15", "linear")),
    (("--bound-grid", "quad_ddim", "--steps", 200), ("`K`=200", "powerp")),
    (("--out", "result.txt"), ("--out result.txt", ".json")),
    (("--split", "valid"), ("`split`", "'valid'")),
], ids=str)  # fmt: skip
def test_bad_options_end_in_one_line(typed: Type, run: Run, options: tuple[object, ...], pieces: tuple[str, ...]):
    ran = typed("nll", run.path, "digits", *SMALL[:2], "--fit", 8, *options)
    assert ran.code == 2
    assert len(ran.err.strip().splitlines()) == 1
    for piece in pieces:
        assert piece in ran.err


def test_data_that_do_not_fit(typed: Type, run: Run, tmp_path: Path):
    import numpy as np

    arrays = tmp_path / "arrays.npz"
    np.savez(arrays, images=np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8))
    ran = typed("nll", run.path, arrays, *SMALL)
    assert ran.code == 2
    assert "--split train" in ran.err
    assert read(typed("nll", run.path, arrays, *SMALL, "--split", "train"))["protocol"]["split"] == "train"
    np.savez(arrays, images=np.random.default_rng(0).normal(size=(30, 5)))
    ran = typed("nll", run.path, arrays, *SMALL, "--split", "train")
    assert ran.code == 2
    assert "(5,)" in ran.err
    assert "(1, 8, 8)" in ran.err
    np.savez(arrays, images=np.random.default_rng(0).normal(size=(60, 1, 8, 8)))
    ran = typed("nll", run.path, arrays, *SMALL, "--split", "train")
    assert "nats/dim" in ran.out
    assert "bits" not in ran.out


COMPACT = "kind: compact, width: 16, mult: [1, 1]"


@pytest.mark.parametrize("encoder", ["contraction", f"{{{COMPACT}}}", f"{{{COMPACT}, counterterm: split}}"])
def test_a_model_with_an_encoder(typed: Type, tmp_path: Path, encoder: str):
    """DiffEnc: the encoder of the run takes part, and what has no meaning for it is refused."""
    torch.manual_seed(0)
    run = toy_run(tmp_path / "run", "objective.kind=bound", "objective.schedule={kind: linear}", f"encoder={encoder}")
    tensors = {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in build_update(run.recipe).state_dict().items()}
    run.save(Checkpoint(1, tensors, tensors, {}))
    totals = {}
    several = ("", "--estimator continuous", "--decoder flat", "--variance optimal", "--bound-grid optimal --levels 9")
    for options in several if "split" not in encoder else (several[0], *several[3:]):
        result = read(typed("nll", run.path, "digits", *SMALL, *options.split()))
        totals[options] = result["terms"]["total"]["nats"]
        assert math.isfinite(totals[options])
    assert totals["--variance optimal"] < totals[""]
    assert totals["--bound-grid optimal --levels 9"] < totals[""]
    assert result["protocol"]["variance"] == "small"
    flow = "compact" not in encoder or "split" in encoder
    if flow:
        result = read(typed("nll", run.path, "digits", *SMALL, "--estimator", "ode", "--steps", 12))
        assert math.isfinite(result["terms"]["total"]["bits/dim"])
    for options in ((("--estimator", "ode"),) * (not flow)) + (("--variance", "big"), ("--variance", "learned")):
        ran = typed("nll", run.path, "digits", *SMALL, *options)
        assert ran.code == 2
        assert len(ran.err.strip().splitlines()) == 1


# ---- diffusers


def test_a_diffusers_folder_as_the_paper_measures_it(typed: Type, tmp_path: Path):
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install 'quieten[diffusers]'")
    model = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    diffusers.DDPMPipeline(model, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    out = tmp_path / "a.json"
    ran = typed("nll", tmp_path / "ddpm", "digits", *SMALL, "--compat", "official", "--out", out)
    result = read(ran)
    # tilde beta of the first two of 1000 betas from 1e-4 to 0.02
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[:2]
    tilde = float((1 - abar[1] / abar[0]) * (1 - abar[0]) / (1 - abar[1]))
    assert f"variance {tilde:.4g}" in result["protocol"]["decoder"]
    assert "compat=official" in result["protocol"]["decoder"]
    levels = [result["steps"][0]["lam_t"], *(step["lam_s"] for step in result["steps"])]
    table = torch.logit(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0))
    within(1e-6, (torch.tensor(levels).double() - table[linear(4, 1000) - 1].flip(0)).abs().max(), "linear grid")


def test_latents_have_no_bits(typed: Type, tmp_path: Path):
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install 'quieten[diffusers]'")
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=4, in_channels=4, out_channels=8, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        norm_num_groups=4, num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=8,
    )  # fmt: skip
    diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler()).save_pretrained(tmp_path / "dit")
    ran = typed("nll", tmp_path / "dit", "digits", *SMALL, "--out", tmp_path / "a.json")
    result = read(ran)
    assert result["protocol"]["unit"] == "latent nats/dim"
    assert result["protocol"]["variance"] == "range"
    assert result["dims"] == 64
    assert "bits/dim" not in ran.out
    assert "nats/dim" in result["terms"]["total"]
