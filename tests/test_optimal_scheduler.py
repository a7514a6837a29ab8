"""A stock DDPMPipeline with a learned variance: equal to our sampler, step by step, before and after it was saved."""

import math

import pytest
import torch
from torch import nn

from helpers import refuses

pytest.importorskip("diffusers")
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from quieten import OptimalCovarianceScheduler, VarianceUNet, from_diffusers, to_diffusers
from quieten.basis import DCT
from quieten.covariance import Unit
from quieten.covariances.heads import make_head
from quieten.covariances.stored import KINDS, load_variance
from quieten.sampling import sample
from quieten.training.source import open_source
from quieten.transition import Ancestral, Hushed
from quieten.wrap import WithCovariance

pytestmark = pytest.mark.usefixtures("one_thread")
N = 3


def tiny() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def fitted(kind="ocm", head="simple", block=None, link="unit", prediction="epsilon"):
    """A denoiser around the tiny network, and a source whose head says something."""
    loaded = from_diffusers(tiny(), scheduler=DDPMScheduler(prediction_type=prediction))
    made = make_head(loaded.denoiser, head, block or 1)
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    source = KINDS[kind](made, link=link, basis=DCT(block) if block else None, cap=1.0)
    return loaded, WithCovariance(loaded.denoiser, source)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(
    "kind, head, block, eta, prediction",
    [
        ("ocm", "simple", None, 1.0, "epsilon"),
        ("npr", "complex", None, 0.0, "v_prediction"),
        ("sn", "simple", None, 0.5, "sample"),
        ("ocm", "complex", 4, 1.0, "epsilon"),
    ],
)
def test_the_pipeline_is_our_sampler(kind, head, block, eta, prediction, spacing, tmp_path):
    loaded, model = fitted(kind, head, block, prediction=prediction)
    unet = VarianceUNet.of(loaded.denoiser.net.model, model.source)
    scheduler = OptimalCovarianceScheduler(
        prediction_type=prediction, timestep_spacing=spacing, eta=eta, kind=kind, block=block, grey=2.0
    )
    pipeline = DDPMPipeline(unet=unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    steps = 5
    images = pipeline(
        batch_size=N, num_inference_steps=steps, generator=torch.Generator().manual_seed(1), output_type="np"
    ).images
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 3, 8, 8, generator=generator)
    grid = loaded.levels.schedule.grid(steps, spacing)
    transition = Hushed(Ancestral(eta, clip=1.0, keep_eps=eta < 1), grid)
    ours = sample(model, x, grid, transition, noise=lambda i, like: torch.randn(like.shape, generator=generator))
    ours = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(torch.from_numpy(images), ours, rtol=1e-4, atol=2e-5)
    assert ours.std() > 0.05


def test_it_is_saved_with_the_pipeline_and_loaded_by_diffusers(tmp_path):
    loaded, model = fitted("ocm", "complex")
    path = to_diffusers(model, tmp_path / "made", clip=1.0)
    again = DDPMPipeline.from_pretrained(path)
    assert type(again.unet) is VarianceUNet
    assert type(again.scheduler) is OptimalCovarianceScheduler
    assert (again.scheduler.config.kind, again.scheduler.config.cap, again.scheduler.config.clip_sample) == ("ocm", 1.0, True)
    again.set_progress_bar_config(disable=True)
    got = again(batch_size=2, num_inference_steps=4, generator=torch.Generator().manual_seed(3), output_type="np").images
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, 8, 8, generator=generator)
    grid = loaded.levels.schedule.grid(4, "leading")
    ours = sample(
        model, x, grid, Hushed(Ancestral(clip=1.0), grid), noise=lambda i, like: torch.randn(like.shape, generator=generator)
    )
    torch.testing.assert_close(torch.from_numpy(got), (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), rtol=1e-4, atol=2e-5)


def test_the_folder_is_one_of_ours_too(tmp_path):
    loaded, model = fitted("npr", "complex", 4)
    path = to_diffusers(model, tmp_path / "made", clip=1.0)
    again = open_source(str(path), device="cpu")
    x = torch.randn(2, 3, 8, 8)
    source = load_variance(again.variances, "ocm", again.denoiser)
    p, want = WithCovariance(again.denoiser, source)(x, 0.5), model(x, 0.5)
    torch.testing.assert_close(p.mean, want.mean)
    torch.testing.assert_close(p.var, want.var, rtol=5e-3, atol=1e-4)  # the file is in half precision
    torch.testing.assert_close(again.grid(5, None), loaded.grid(5))  # betas to rounding
    assert again.clip == 1.0


def test_what_a_pipeline_cannot_carry_is_refused(tmp_path):
    loaded, _ = fitted()
    with refuses("Unit", "head"):
        to_diffusers(WithCovariance(loaded.denoiser, Unit()), tmp_path / "a")
    separate = KINDS["ocm"](make_head(loaded.denoiser, "separate"))
    with refuses("Separate", "'simple'"):
        to_diffusers(WithCovariance(loaded.denoiser, separate), tmp_path / "b")
    assert not list(tmp_path.iterdir())
    scheduler = OptimalCovarianceScheduler()
    scheduler.set_timesteps(5)
    with refuses("`model_output`", "3 channels", "VarianceUNet"):
        scheduler.step(torch.zeros(1, 3, 8, 8), 0, torch.zeros(1, 3, 8, 8))
    with refuses("`timestep` 7", "set_timesteps"):
        scheduler.step(torch.zeros(1, 6, 8, 8), 7, torch.zeros(1, 3, 8, 8))
    for wrong in ({"kind": "fisher"}, {"prediction_type": "score"}):
        with refuses(f"`{next(iter(wrong))}`"):
            OptimalCovarianceScheduler(**wrong)


def test_it_noises_and_counts_as_other_schedulers_do():
    ours, theirs = OptimalCovarianceScheduler(), DDPMScheduler()
    x, noise = torch.randn(2, 3, 3, 8, 8)
    t = torch.tensor([0, 500, 999])
    torch.testing.assert_close(ours.add_noise(x, noise, t), theirs.add_noise(x, noise, t), rtol=1e-4, atol=1e-5)
    for n in (1, 7, 50):
        ours.set_timesteps(n)
        theirs.set_timesteps(n)
        assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    assert len(ours) == 1000
    assert math.isinf(ours.grid[-1])
