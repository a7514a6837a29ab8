"""Splitting inside diffusers pipelines: the scheduler against our own loop, and who keeps a kick and who does not."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import golden
from guided_toy import STARTS, class_guidance, toy
from helpers import refuses, within
from quieten.guidance import Gradient, Likelihood
from quieten.guiding.kick import MultistepKick
from quieten.process import VP
from quieten.sampling import sample
from quieten.schedule import Table
from quieten.solver import AdamsBashforth
from quieten.split import Split
from quieten.wrap import Clipped

diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
from quieten.interop import SplittingScheduler, check_keeps_kicks, from_diffusers, kick_callback  # noqa: E402
from quieten.interop.splitting import adm_timesteps  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
TABLE = Table.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))


def grid(scheduler: SplittingScheduler, steps: int) -> Tensor:
    scheduler.set_timesteps(steps)
    end = math.inf if scheduler.config.final_sigma == "zero" else float(TABLE.lam[0])
    lam = TABLE.at(scheduler.timesteps.double())
    return torch.cat([lam, torch.tensor([end], dtype=torch.float64)])


def cond_fn(w: float):
    """The toy's class guidance as guided-diffusion would write it."""
    g = class_guidance(VP, w)
    return lambda x, t: g.gradient(toy(VP), x, float(TABLE.at(t[:1].double())))


@torch.no_grad()
def piped(scheduler: SplittingScheduler, steps: int, x: Tensor, form: str = "eps", kick: bool = True) -> Tensor:
    """The loop of a pipeline."""
    scheduler.set_timesteps(steps)
    x = scheduler.initial_kick(x) if kick else x
    for t in scheduler.timesteps:
        output = toy(VP).predict(scheduler.scale_model_input(x, t), float(TABLE.at(t.double())), form)
        x = scheduler.step(output, t, x).prev_sample
    return x


CASES = {
    "released STSP4": {"coef": "constant", "second_coef": "midpoint"},
    "released LTSP4": {"splitting": "lie", "coef": "constant"},
    "robust Strang": {},
    "lie, network first": {"splitting": "lie", "lie_order": "AB"},
    "merged": {"splitting": "strang_merged"},
    "heun": {"splitting": "heun"},
    "heun_pec": {"splitting": "heun_pec", "solver_order": 2},
    "additive": {"splitting": "additive", "gradient_order": 2},
    "sigma_min": {"final_sigma": "sigma_min", "timestep_spacing": "trailing"},
    "clipped": {"clip_sample": True, "timestep_spacing": "leading"},
    "thresholded": {"thresholding": True},
}


def ours(options: dict, w: float) -> Split:
    o = {"splitting": "strang", "coef": "variable", "second_coef": "end", "lie_order": "BA", "solver_order": 4} | options
    kick = MultistepKick(o["gradient_order"], o["coef"]) if o["splitting"] == "additive" else None
    flow = AdamsBashforth(o["solver_order"], o["coef"])
    return Split(class_guidance(VP, w), flow, kick, o["splitting"], o["lie_order"], o["second_coef"])


@pytest.mark.parametrize("steps", [1, 10, 25])
@pytest.mark.parametrize("name", CASES)
def test_the_scheduler_is_our_split(name, steps):
    scheduler = SplittingScheduler(**CASES[name])
    scheduler.set_guidance(cond_fn(3.0))
    x = piped(scheduler, steps, STARTS / 3)
    levels = grid(scheduler, steps)
    denoiser = Clipped(toy(VP), 1.0) if name == "clipped" else toy(VP)
    if name == "thresholded":
        from quieten.wrap import dynamic

        denoiser = Clipped(toy(VP), dynamic())
    if levels[-2] == levels[-1]:
        levels = levels[:-1]
    truth = sample(denoiser, STARTS / 3, levels, ours(CASES[name], 3.0))
    within(1e-10, (x - truth).abs().max() / truth.abs().max().clamp_min(1.0), name)


@pytest.mark.parametrize("form", ["eps", "x0", "v"])
def test_predictions_of_every_kind(form):
    kind = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[form]
    scheduler = SplittingScheduler(prediction_type=kind)
    scheduler.set_guidance(cond_fn(2.0))
    truth = sample(toy(VP), STARTS / 3, grid(scheduler, 8), ours({}, 2.0))
    within(1e-10, (piped(scheduler, 8, STARTS / 3, form) - truth).abs().max(), kind)


def test_missing_first_kicks_are_told():
    for name in CASES:
        scheduler = SplittingScheduler(**CASES[name])
        scheduler.set_guidance(cond_fn(2.0))
        full = piped(scheduler, 10, STARTS / 3)
        if name in ("heun", "heun_pec", "additive", "lie, network first"):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                within(0.0, (piped(scheduler, 10, STARTS / 3, kick=False) - full).abs().max(), name)
        else:
            with pytest.warns(UserWarning, match="initial_kick"):
                missed = (piped(scheduler, 10, STARTS / 3, kick=False) - full).abs().max()
            assert missed > 1e-4, name


@pytest.mark.parametrize("name", ["strang", "strang_merged", "heun", "lie", "additive"])
def test_stiff_guidance_is_told_once_a_run(name):
    scheduler = SplittingScheduler(splitting=name)
    for w, times in ((0.1, 0), (40.0, 1), (40.0, 1)):
        scheduler.set_guidance(lambda x, t, w=w: -w * x)
        scheduler.set_timesteps(10)
        with warnings.catch_warnings(record=True) as got:
            warnings.simplefilter("always")
            x = scheduler.initial_kick(STARTS) if name.startswith("strang") or name == "lie" else STARTS
            for t in scheduler.timesteps:
                x = scheduler.step(0.3 * x, t, x).prev_sample
        assert [str(w.message)[:30] for w in got] == ["the guidance is stiff: |h| L p"] * times


def test_without_guidance_it_is_the_plain_solver():
    for name in CASES:
        scheduler = SplittingScheduler(**CASES[name])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            x = piped(scheduler, 9, STARTS / 3, kick=False)
        assert x.isfinite().all()
    scheduler = SplittingScheduler()
    plain = sample(toy(VP), STARTS / 3, grid(scheduler, 9), AdamsBashforth(4))
    within(1e-12, (piped(scheduler, 9, STARTS / 3, kick=False) - plain).abs().max(), "AdamsBashforth")
    scheduler.set_guidance(cond_fn(2.0))
    scheduler.set_guidance(None)
    within(1e-12, (piped(scheduler, 9, STARTS / 3, kick=False) - plain).abs().max(), "guidance taken back")


def unet(seed: int = 0):
    torch.manual_seed(seed)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    ).eval()  # fmt: skip


def brighten(x: Tensor, t: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(-0.2 * (leaf - 0.5).square().flatten(1).sum(1).sum(), leaf)[0]


@pytest.mark.parametrize("name", ["heun", "lie", "additive"])
@pytest.mark.parametrize("pipeline", ["DDPMPipeline", "DDIMPipeline"])
def test_in_a_pipeline(name, pipeline):
    """Stock pipelines leave no room for an initial kick; these splittings have none."""
    options = {"splitting": name} | ({"lie_order": "AB"} if name == "lie" else {})
    net = unet()
    released = diffusers.DDIMScheduler(prediction_type="sample", clip_sample=False)  # a new network's noise would be no picture
    pipe = getattr(diffusers, pipeline)(unet=net, scheduler=released)
    pipe.scheduler = SplittingScheduler.from_config(pipe.scheduler.config, **options, timestep_spacing="adm")
    pipe.scheduler.set_guidance(brighten)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(batch_size=2, num_inference_steps=6, generator=torch.Generator().manual_seed(3), output_type="np").images
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    denoiser = from_diffusers(net, scheduler=released).denoiser
    guidance = Gradient(lambda x, lam: brighten(x, lam))
    stepper = Split(guidance, None, MultistepKick(1) if name == "additive" else None, name, options.get("lie_order", "BA"))
    x = sample(denoiser, noise, grid(pipe.scheduler, 6), stepper)
    images = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    within(1e-6, np.abs(images - theirs).max(), "pixels")
    assert images.std() > 0.01
    assert ((images > 0) & (images < 1)).mean() > 0.5


def test_half_precision_stays_wide_inside():
    scheduler = SplittingScheduler()
    seen = []

    def g(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x.dtype, t.dtype, t.shape, float(t[0])))
        return -x

    scheduler.set_guidance(g)
    scheduler.set_timesteps(5)
    x = scheduler.initial_kick(torch.randn(3, 1, 4, 4, dtype=torch.float16))
    for t in scheduler.timesteps:
        out = scheduler.step(torch.randn(3, 2, 4, 4, dtype=torch.float16), t, x)  # twice the channels: a learned variance
        x = out.prev_sample
        assert x.dtype == out.pred_original_sample.dtype == torch.float16
    assert {dtype for dtype, *_ in seen} == {torch.float32}
    assert [t for *_, t in seen] == [999.0, 749.0, 749.0, 500.0, 500.0, 250.0, 250.0, 0.0, 0.0]
    assert seen[0][2] == (3,)


def test_levels_of_every_kind():
    scheduler = SplittingScheduler()
    scheduler.set_timesteps(timesteps=[900, 500, 20])
    assert scheduler.timesteps.tolist() == [900, 500, 20]
    scheduler.set_timesteps(sigmas=[*torch.exp(-0.5 * TABLE.lam[[900, 500]]).tolist(), 0.05, 0.0])
    assert scheduler.timesteps[:2].tolist() == [900.0, 500.0]
    assert scheduler.timesteps.dtype == torch.float32
    assert scheduler.num_inference_steps == 3
    scheduler.set_guidance(lambda x, t: -x)
    x = scheduler.initial_kick(STARTS)
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x).prev_sample
    assert x.isfinite().all()
    noise = torch.randn(2, 3)
    alpha2 = torch.sigmoid(TABLE.lam[[0, 999]]).float()[:, None]
    torch.testing.assert_close(
        scheduler.add_noise(torch.ones(2, 3), noise, torch.tensor([0, 999])), alpha2.sqrt() + (1 - alpha2).sqrt() * noise
    )
    assert len(scheduler) == 1000
    zero = SplittingScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    zero.set_guidance(lambda x, t: -x)
    zero.set_timesteps(6)
    x = zero.initial_kick(STARTS)
    for t in zero.timesteps:
        x = zero.step(-x, t, x).prev_sample
    assert x.isfinite().all()


def test_starting_later():
    """As image-to-image pipelines do: from the third level on."""
    scheduler = SplittingScheduler()
    scheduler.set_guidance(cond_fn(2.0))
    levels = grid(scheduler, 10)
    scheduler.set_begin_index(2)
    x = scheduler.initial_kick(STARTS / 3)
    with torch.no_grad():
        for t in scheduler.timesteps[2:]:
            x = scheduler.step(toy(VP).predict(x, float(TABLE.lam[t]), "eps"), t, x).prev_sample
    within(1e-10, (x - sample(toy(VP), STARTS / 3, levels[2:], ours({}, 2.0))).abs().max(), "from the third level")


def test_configuration(tmp_path):
    first = SplittingScheduler(splitting="heun", solver_order=3, beta_schedule="scaled_linear")
    first.save_pretrained(tmp_path)
    second = SplittingScheduler.from_pretrained(tmp_path)
    assert (second.config.splitting, second.config.solver_order) == ("heun", 3)
    assert torch.equal(second.table.lam, first.table.lam)
    third = SplittingScheduler.from_config(diffusers.PNDMScheduler(beta_end=0.012, beta_schedule="scaled_linear").config)
    assert third.config.beta_end == 0.012


def test_adm_timesteps():
    arrays = golden("split_schedule")
    for key, value in arrays.items():
        if key.startswith("tmap_"):
            spec = key.removeprefix("tmap_").replace("_", ",")
            assert adm_timesteps(spec) == value.tolist(), key
    assert adm_timesteps(21) != np.linspace(0, 999, 21).round().astype(int).tolist()
    assert adm_timesteps(1) == [999]


@pytest.mark.parametrize(
    "act, pieces",
    [
        (lambda s: SplittingScheduler(splitting="yoshida"), ("`scheme`", "'yoshida'")),
        (lambda s: SplittingScheduler(solver_order=5), ("`order`", "5")),
        (lambda s: SplittingScheduler(final_sigma="none"), ("`final_sigma`", "'none'", "sigma_min")),
        (lambda s: SplittingScheduler(prediction_type="flow"), ("`prediction_type`", "'flow'")),
        (
            lambda s: SplittingScheduler(timestep_spacing="fibonacci"),
            ("`timestep_spacing`", "'fibonacci'", "'adm'", "'linspace'"),
        ),
        (lambda s: s.set_guidance(3.0), ("`guidance`", "function (x, t)", "float")),
        (lambda s: s.set_timesteps(), ("`num_inference_steps`",)),
        (lambda s: s.set_timesteps(0), ("1 to 1000", "0")),
        (lambda s: s.set_timesteps(1001), ("1 to 1000", "1001")),
        (lambda s: s.set_timesteps(timesteps=[500, 500]), ("`timesteps`", "fall strictly")),
        (lambda s: s.set_timesteps(timesteps=[1500, 500]), ("`timesteps`", "training range")),
        (lambda s: adm_timesteps("ddim700"), ("'ddim700'", "stride")),
        (lambda s: s.step(STARTS, 3, STARTS), ("`timestep`", "3")),
        (lambda s: s.step(STARTS, torch.tensor([999, 749]), STARTS), ("`timestep`", "differs", "share")),
        (lambda s: s.step(STARTS, 999, STARTS, eta=1.0), ("`eta`", "1.0", "deterministic")),
        (lambda s: SplittingScheduler().initial_kick(STARTS), ("step 0", "set_timesteps")),
    ],
)
def test_bad_arguments_are_refused(act, pieces):
    scheduler = SplittingScheduler()
    scheduler.set_timesteps(5)
    with refuses(*pieces):
        act(scheduler)


def test_guidance_through_the_denoiser_has_no_place_in_a_pipeline():
    scheduler = SplittingScheduler()
    scheduler.set_timesteps(5)
    scheduler.set_guidance(Likelihood(lambda x0, lam: -x0.square().sum(1), on="x0"))
    with refuses("asks the denoiser", "`Split`"):
        scheduler.initial_kick(STARTS)
    scheduler.set_guidance(Likelihood(lambda x, lam: -x.square().sum(1)))
    assert not torch.equal(scheduler.initial_kick(STARTS), STARTS)


def test_an_initial_kick_belongs_to_its_run():
    scheduler = SplittingScheduler()
    scheduler.set_guidance(lambda x, t: -x)
    scheduler.set_timesteps(5)
    x = scheduler.initial_kick(STARTS)
    scheduler.set_timesteps(5)  # as the pipeline does again
    scheduler.step(x, 999, x)
    scheduler.initial_kick(STARTS)
    scheduler.set_timesteps(9)
    with refuses("`initial_kick`", "another number of steps"):
        scheduler.step(x, 999, x)


# ---- schedulers of diffusers: who keeps a kick


def kept(scheduler, steps: int = 60) -> float:
    """Share of one small kick between two steps that is left in the end, for data N(0, 1), which leave VP states alone."""
    ends = []
    for kick in (0.0, 0.1):
        scheduler.set_timesteps(steps)
        x = torch.ones(1, 1, 2, 2, dtype=torch.float64) * float(scheduler.init_noise_sigma)
        inside = 2 * (len(scheduler.timesteps) // 4) + 1  # an odd number lies inside a pair of stages
        for i, t in enumerate(scheduler.timesteps):
            alpha, sigma = VP.scales(float(TABLE.at(t.double())))
            if i == inside:
                x = x + kick / (alpha if float(scheduler.init_noise_sigma) > 1 else 1.0)
            x = scheduler.step(sigma * scheduler.scale_model_input(x, t), t, x).prev_sample
        ends.append(x)
    return float((ends[1] - ends[0]).mean() / 0.1)


KEEP = {
    "DDIMScheduler": {"clip_sample": False},
    "EulerDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DEISMultistepScheduler": {},
    "LMSDiscreteScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "UniPCMultistepScheduler": {"disable_corrector": list(range(60))},
    "DPMSolverSinglestepScheduler": {"solver_order": 1},
}
LOSE = {
    "UniPCMultistepScheduler": {},
    "HeunDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {},
    "DPMSolverSinglestepScheduler": {"solver_order": 2},
}


@pytest.mark.parametrize("name", KEEP)
def test_schedulers_that_keep_kicks_are_let_through(name):
    scheduler = getattr(diffusers, name)(**KEEP[name])
    assert kept(scheduler) > 0.9
    check_keeps_kicks(scheduler)


@pytest.mark.parametrize("name", LOSE)
def test_schedulers_that_lose_kicks_are_refused(name):
    scheduler = getattr(diffusers, name)(**LOSE[name])
    assert kept(scheduler) < 0.3
    with refuses(name, "discards kicks", "SplittingScheduler"):
        check_keeps_kicks(scheduler)


@pytest.mark.parametrize(
    "name, options", [("PNDMScheduler", {}), ("SASolverScheduler", {}), ("KDPM2AncestralDiscreteScheduler", {})]
)
def test_more_schedulers_that_are_refused(name, options):
    with refuses(name, "discards kicks"):
        check_keeps_kicks(getattr(diffusers, name)(**options))


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_kicks_by_callback_are_lie_splitting(name):
    """Network first, with the scheduler's own solver: DDIM's and Euler's is ours of order 1."""
    steps, data = 10, toy(VP)  # DDIM misses the next level where 1000 / steps is no whole number
    options = (
        {"timestep_spacing": "trailing"} if name != "DDIMScheduler" else {"timestep_spacing": "trailing", "clip_sample": False}
    )
    if name == "DPMSolverMultistepScheduler":
        options |= {"solver_order": 1, "final_sigmas_type": "zero"}
    scheduler = getattr(diffusers, name)(beta_schedule="linear", **options)
    scheduler.set_timesteps(steps)
    callback = kick_callback(scheduler, cond_fn(2.0))
    lam = TABLE.at(scheduler.timesteps.double())
    start = STARTS / 3
    scaled = name == "EulerDiscreteScheduler"
    x = start / VP.scales(float(lam[0]))[0] if scaled else start
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            alpha = VP.scales(float(lam[i]))[0]
            out = data.predict(x * alpha if scaled else x, float(lam[i]), "eps")
            x = scheduler.step(out, t, x).prev_sample
            x = callback(None, i, t, {"latents": x}).get("latents", x)
    truth = sample(data, start, torch.cat([lam, torch.tensor([math.inf]).double()]),
                   Split(class_guidance(VP, 2.0), AdamsBashforth(1), scheme="lie", order="AB"))  # fmt: skip
    within(2e-4, (x - truth).abs().max(), "float32 tables there")


def test_callbacks_refuse():
    for name, pieces in (("HeunDiscreteScheduler", ("discards kicks",)), ("FlowMatchEulerDiscreteScheduler", ("not known",))):
        with refuses(name, *pieces):
            kick_callback(getattr(diffusers, name)(), brighten)
    scheduler = diffusers.UniPCMultistepScheduler()
    callback = kick_callback(scheduler, brighten)
    scheduler.set_timesteps(4)
    with refuses("UniPCMultistepScheduler", "disable_corrector"):
        callback(None, 0, 999, {"latents": torch.zeros(1, 1, 4, 4)})
