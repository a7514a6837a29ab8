"""Pipelines made and trained by diffusers' own classes, written to folders, load as denoisers and give the same samples."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install 'quieten[diffusers]'")

from quieten import FLOW, VE, VP, Ancestral, Euler, Exponential, Extrapolated, Preconditioned, Table  # noqa: E402
from quieten.interop import Pretrained, from_diffusers, to_diffusers  # noqa: E402
from quieten.interop.codec import Codec  # noqa: E402
from quieten.interop.levels import SCHEDULERS, betas, read_levels, table  # noqa: E402
from quieten.sampling import generate, sample  # noqa: E402

Noise = Callable[[int, Tensor], Tensor]


def unet(**config: Any) -> Any:
    torch.manual_seed(1)
    return diffusers.UNet2DModel(**{
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        **config,
    })  # fmt: skip


def text_unet(**config: Any) -> Any:
    torch.manual_seed(1)
    return diffusers.UNet2DConditionModel(**{
        "sample_size": 4,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        **config,
    })  # fmt: skip


def dit(**config: Any) -> Any:
    torch.manual_seed(1)
    model = diffusers.DiTTransformer2DModel(**{
        "sample_size": 4,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
        "num_embeds_ada_norm": 1000,
        **config,
    })  # fmt: skip
    for parameter in model.parameters():  # DiT starts from zeros, which would hide its conditions
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def autoencoder(**config: Any) -> Any:
    torch.manual_seed(2)
    return diffusers.AutoencoderKL(**{
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 8,
        **config,
    }).eval()  # fmt: skip


def clip_encoder(projected: bool = False) -> tuple[Any, Any]:
    """A CLIP tokenizer that spells, and a random text model of width 16."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'quieten[diffusers]'")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=12)
    torch.manual_seed(3 + projected)
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
    )
    model = (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)
    return tokenizer, model.eval()


def stable_diffusion(**scheduler: Any) -> Any:
    tokenizer, encoder = clip_encoder()
    return diffusers.StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=text_unet(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True, steps_offset=1, **scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> Any:
    (one, first), (two, second) = clip_encoder(), clip_encoder(projected=True)
    net = text_unet(
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=one,
        tokenizer_2=two,
        unet=net,
        scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )


def torch_noise(seed: int) -> Noise:
    """The noise that diffusers draws from a generator, one step after the other."""
    generator = torch.Generator().manual_seed(seed)
    return lambda _, like: torch.randn(like.shape, generator=generator, dtype=like.dtype)


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape
    assert float((a - b).norm() / b.norm()) < tolerance


def ddpm_like_theirs(pretrained: Pretrained, n: int, steps: int, seed: int) -> Tensor:
    """Our samples with the noise of DDPMPipeline, as images in [0, 1]."""
    denoiser, noise = pretrained.denoiser, torch_noise(seed)
    assert denoiser.shape is not None
    x = noise(-1, torch.empty(n, *denoiser.shape))
    out = sample(denoiser, x, pretrained.grid(steps), Ancestral(1, spread=False, clip=pretrained.clip), noise=noise)
    return (out / 2 + 0.5).clamp(0, 1)


def trained(net: Any, scheduler: Any, steps: int = 20) -> Any:
    """A network after a few steps of training as diffusers' own examples do it."""
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    x0 = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8).expand(8, -1, -1, -1)
    for _ in range(steps):
        noise, t = torch.randn_like(x0), torch.randint(0, 1000, (8,))
        loss = (net(scheduler.add_noise(x0, noise, t), t).sample - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


# Loading, and sampling as the pipeline does


def test_a_trained_ddpm_pipeline(tmp_path: Path) -> None:
    scheduler = diffusers.DDPMScheduler()
    pipeline = quiet(diffusers.DDPMPipeline(trained(unet(), scheduler), scheduler))
    pipeline.save_pretrained(tmp_path / "ddpm")
    loaded = from_diffusers(tmp_path / "ddpm")
    assert loaded.denoiser.process is VP
    assert loaded.denoiser.form == "eps"
    assert loaded.denoiser.shape == (1, 8, 8)
    assert loaded.clip == 1.0
    assert loaded.codec is None
    assert loaded.prompt is None
    assert not loaded.denoiser.training
    generator = torch.Generator().manual_seed(7)
    images = pipeline(batch_size=3, num_inference_steps=10, generator=generator, output_type="np").images
    close(ddpm_like_theirs(loaded, 3, 10, 7), torch.from_numpy(images).permute(0, 3, 1, 2))


def test_folder_string_object_and_bare_model_are_the_same(tmp_path: Path) -> None:
    pipeline = diffusers.DDPMPipeline(unet().eval(), diffusers.DDPMScheduler(beta_schedule="scaled_linear"))
    pipeline.save_pretrained(tmp_path)
    x = torch.randn(2, 1, 8, 8)
    sources = [
        from_diffusers(tmp_path),
        from_diffusers(str(tmp_path)),
        from_diffusers(tmp_path.parent, subfolder=tmp_path.name),
        from_diffusers(pipeline),
        from_diffusers(pipeline.unet, scheduler=pipeline.scheduler),
        from_diffusers(pipeline.unet, scheduler={"_class_name": "DDPMScheduler", "beta_schedule": "scaled_linear"}),
        from_diffusers(tmp_path, subfolder="unet", scheduler=diffusers.DDPMScheduler(beta_schedule="scaled_linear")),
    ]
    outs = [source.denoiser(x, -0.3).mean for source in sources]
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_the_network_sees_whole_indices_of_the_table_and_fractions_between() -> None:
    seen: list[Tensor] = []
    net = unet()
    net.time_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    loaded = from_diffusers(net, scheduler=diffusers.DDIMScheduler())
    entries = loaded.schedule
    assert isinstance(entries, Table)
    x = torch.randn(2, 1, 8, 8)
    for lam in (entries.lam[[999, 0]], entries.lam[[500, 501]].float(), float(entries.lam[250:252].mean())):
        loaded.denoiser(x, lam)
    assert seen[0].tolist() == [999.0, 0.0]
    assert seen[1].tolist() == [500.0, 501.0]
    torch.testing.assert_close(seen[2], torch.tensor([250.5, 250.5]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_keep_their_indices(dtype: torch.dtype) -> None:
    """bfloat16 has 8 bits: the index 999 would become 1000 if it were cast with the state."""
    seen: list[Tensor] = []
    net = unet()
    net = net.half() if dtype == torch.float16 else net.bfloat16()
    net.time_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    loaded = from_diffusers(net, scheduler=diffusers.DDIMScheduler())
    out = loaded.denoiser(torch.randn(1, 1, 8, 8), float(loaded.schedule(torch.tensor(1.0, dtype=torch.float64))))
    assert seen[0].tolist() == [999.0]
    assert out.mean.dtype == torch.float32


def test_autocast_and_device() -> None:
    """Autocast lowers the network alone; a device holds everything (meta stands for one)."""
    scheduler = diffusers.DDIMScheduler()
    x = torch.randn(2, 1, 8, 8)
    wide = from_diffusers(unet(), scheduler=scheduler).denoiser(x, 0.0).mean
    low = from_diffusers(unet(), scheduler=scheduler, autocast=torch.bfloat16).denoiser(x, 0.0).mean
    assert low.dtype == torch.float32
    assert not torch.equal(low, wide)
    close(low, wide, 0.05)
    pipeline = diffusers.DiTPipeline(dit(), autoencoder(), scheduler)
    loaded = from_diffusers(pipeline, device="meta")
    assert loaded.codec is not None
    for module in (loaded.denoiser, loaded.codec):
        assert {tensor.device.type for tensor in (*module.parameters(), *module.buffers())} == {"meta"}


def test_networks_with_a_list_of_times_round_and_warn_once() -> None:
    loaded = from_diffusers(unet(time_embedding_type="learned", num_train_timesteps=1000), scheduler=diffusers.DDIMScheduler())
    entries = loaded.schedule
    assert isinstance(entries, Table)
    x = torch.randn(1, 1, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = loaded.denoiser(x, float(entries.lam[300])).mean
    with pytest.warns(UserWarning, match="rounded to the nearest index"):
        near = loaded.denoiser.predict(x, float(entries.at(torch.tensor(300.1, dtype=torch.float64))), "eps")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.denoiser(x, 0.0)
    torch.testing.assert_close(near, loaded.denoiser.predict(x, float(entries.lam[300]), "eps"))
    assert exact.isfinite().all()


def test_labels(tmp_path: Path) -> None:
    net = unet(num_class_embeds=5).eval()
    diffusers.DDPMPipeline(net, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    loaded = from_diffusers(tmp_path)
    assert loaded.classes == 5
    assert loaded.null == {}
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([400] * 3)
    label = torch.tensor([0, 4, 2])
    lam = float(loaded.schedule.lam[400])  # type: ignore[union-attr]
    with torch.no_grad():
        close(loaded.denoiser.bind(label=label).predict(x, lam, "eps"), net(x, t, label).sample)
        close(loaded.denoiser.predict(x, lam, "eps", label=4), net(x, t, torch.tensor([4] * 3)).sample)
    with pytest.raises(ValueError, match="needs the condition `label`"):
        loaded.denoiser(x, lam)
    with pytest.raises(ValueError, match="unknown condition `text`.*takes `label`"):
        loaded.denoiser(x, lam, label=label, text=torch.zeros(3, 2, 16))
    with pytest.raises(ValueError, match=r"`label` must lie in \[0, 5\)"):
        loaded.denoiser(x, lam, label=torch.tensor([0, 5, 1]))
    with pytest.raises(ValueError, match="`label` must be whole numbers"):
        loaded.denoiser(x, lam, label=label.float())
    with pytest.raises(ValueError, match="first axis of 3"):
        loaded.denoiser(x, lam, label=label[:2])
    with pytest.raises(ValueError, match="unknown condition `label`.*no conditions"):
        from_diffusers(unet(), scheduler=diffusers.DDPMScheduler()).denoiser(x, lam, label=label)


def test_dit_pipeline_with_guidance(tmp_path: Path) -> None:
    """Two times the channels out (learned range), a null label of its own, latents decoded by the autoencoder."""
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    pipeline = quiet(diffusers.DiTPipeline(dit().eval(), autoencoder(), scheduler, id2label={0: "cat", 1: "dog"}))
    pipeline.save_pretrained(tmp_path)
    loaded = from_diffusers(tmp_path)
    assert loaded.denoiser.learned_range
    assert loaded.denoiser.shape == (4, 4, 4)
    assert loaded.classes == 1001
    assert loaded.null == {"label": 1000}
    assert loaded.codec is not None
    generator = torch.Generator().manual_seed(7)
    images = pipeline([207, 360], guidance_scale=4.0, num_inference_steps=5, generator=generator, output_type="pt").images
    guided = Extrapolated(loaded.denoiser, 4.0, null=loaded.null).bind(label=torch.tensor([207, 360]))
    z = sample(guided, torch_noise(7)(-1, torch.empty(2, 4, 4, 4)), loaded.grid(5), Ancestral(0, spread=False))
    close((loaded.codec.decode(z) / 2 + 0.5).clamp(0, 1), images)


def test_stable_diffusion_pipeline_with_prompts(tmp_path: Path) -> None:
    pipeline = quiet(stable_diffusion())
    pipeline.save_pretrained(tmp_path)
    loaded = from_diffusers(tmp_path)
    assert loaded.codec is not None
    assert loaded.prompt is not None
    prompts = ["a red dog", "blue"]
    latents = torch.randn(2, 4, 4, 4)
    images = pipeline(prompts, guidance_scale=4.0, num_inference_steps=5, latents=latents, output_type="pt").images
    cond = loaded.prompt(prompts)
    assert cond["text"].shape == (2, 12, 16)
    guided = Extrapolated(loaded.denoiser, 4.0, null=loaded.null)
    z = sample(guided.bind(**cond), latents, loaded.grid(5), Ancestral(0, spread=False))
    close((loaded.codec.decode(z) / 2 + 0.5).clamp(0, 1), images)
    again = generate(guided, 2, grid=loaded.grid(5), transition=Exponential(2), cond=cond, batch=1, seed=3)
    assert again.shape == (2, 4, 4, 4)
    with pytest.raises(ValueError, match="needs the condition `text`"):
        loaded.denoiser(latents, 0.0)
    with pytest.raises(ValueError, match="unknown condition `encoder_hidden_states`"):
        loaded.denoiser(latents, 0.0, encoder_hidden_states=cond["text"])
    with pytest.warns(UserWarning, match="cut to 12"):
        loaded.prompt(["abcdefghijklmnopqrstuvwxyz"])


def test_stable_diffusion_xl_pipeline(tmp_path: Path) -> None:
    """Two text encoders, a pooled embedding and sizes; no text is zeros; Euler's states are ours over alpha."""
    pipeline = quiet(stable_diffusion_xl())
    pipeline.save_pretrained(tmp_path)
    loaded = from_diffusers(tmp_path)
    assert loaded.codec is not None
    assert loaded.prompt is not None
    assert loaded.null == {"text": 0.0, "pooled": 0.0}
    cond = loaded.prompt(["a red dog"])
    assert {name: tuple(value.shape) for name, value in cond.items()} == {
        "text": (1, 12, 32),
        "pooled": (1, 16),
        "sizes": (1, 6),
    }
    latents = torch.randn(1, 4, 4, 4)
    images = pipeline("a red dog", guidance_scale=3.0, num_inference_steps=5, latents=latents, output_type="pt").images
    grid = loaded.grid(5)
    guided = Extrapolated(loaded.denoiser, 3.0, null=loaded.null).bind(**cond)
    # the pipeline multiplies given latents by sqrt(1 + sigma^2) with this spacing, which is 1 / alpha
    z = sample(guided, latents, grid, Euler())
    close((loaded.codec.decode(z) / 2 + 0.5).clamp(0, 1), images)
    assert torch.equal(from_diffusers(pipeline).prompt(["a red dog"])["pooled"], cond["pooled"])  # type: ignore[misc]


# Codecs


@pytest.mark.parametrize("config", [
    {"scaling_factor": 0.3},
    {"scaling_factor": 0.3, "shift_factor": 0.1},
    {"scaling_factor": 0.3, "latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.5, 1.0, 2.0, 0.7]},
])  # fmt: skip
def test_codec_scales_latents(config: dict[str, Any]) -> None:
    vae = autoencoder(**config)
    codec = Codec(vae)
    images, noise = torch.rand(3, 3, 8, 8) * 2 - 1, torch.randn(3, 4, 4, 4)
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        z = posterior.mean + posterior.std * noise
        mean = torch.tensor(config.get("latents_mean", [config.get("shift_factor", 0.0)] * 4)).reshape(1, 4, 1, 1)
        std = torch.tensor(config.get("latents_std", [1.0] * 4)).reshape(1, 4, 1, 1)
        latents = codec.encode(images, noise, batch=2)
        close(latents, (z - mean) / std * 0.3)
        close(codec.decode(latents, batch=2), vae.decode(z).sample)
        close(codec.encode(images), (posterior.mean - mean) / std * 0.3)
    assert not any(parameter.requires_grad for parameter in codec.parameters())


def test_codec_of_quantised_and_tiny_autoencoders() -> None:
    vq = diffusers.VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=3, num_vq_embeddings=8).eval()
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        close(Codec(vq).encode(images), vq.encode(images).latents * vq.config.scaling_factor)
        close(Codec(tiny).decode(Codec(tiny).encode(images)), tiny.decode(tiny.encode(images).latents).sample)


# Scheduler configurations


def config_of(scheduler: Any) -> dict[str, Any]:
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "trained"])
@pytest.mark.parametrize("rescaled", [False, True])
def test_tables_are_diffusers_tables_with_more_digits(kind: str, rescaled: bool) -> None:
    choice = {"trained_betas": [0.001 * (i + 1) for i in range(50)]} if kind == "trained" else {"beta_schedule": kind}
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=50, rescale_betas_zero_snr=rescaled, **choice)
    made = table(config_of(scheduler))
    torch.testing.assert_close(torch.sigmoid(made.lam).float(), scheduler.alphas_cumprod, rtol=2e-5, atol=1e-7)
    assert (made.lam[-1] == -math.inf) == rescaled
    assert made.lam.dtype == torch.float64
    if not rescaled:
        torch.testing.assert_close(betas(config_of(scheduler)).float(), scheduler.betas, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if "Flow" not in name and "EDM" not in name])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_the_default_grid_is_what_the_scheduler_visits(name: str, spacing: str) -> None:
    cls = getattr(diffusers, name)
    options = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    scheduler = cls(timestep_spacing=spacing, steps_offset=1, **options)
    scheduler.set_timesteps(10)
    levels = read_levels(config_of(scheduler))
    visited = torch.unique(scheduler.timesteps.double()).flip(0)
    assert isinstance(levels.schedule, Table)
    ours = levels.schedule.index(levels.grid(10)[:-1])
    torch.testing.assert_close(ours, visited, rtol=0.0, atol=2e-3)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("kind", ["karras", "exponential"])
def test_sigma_grids_of_tables(name: str, kind: str) -> None:
    scheduler = getattr(diffusers, name)(**{f"use_{kind}_sigmas": True})
    scheduler.set_timesteps(10)
    grid = read_levels(config_of(scheduler)).grid(10)
    torch.testing.assert_close(torch.exp(-0.5 * grid).float(), scheduler.sigmas, rtol=1e-3, atol=0.0)


def test_grids_that_are_not_ours_are_refused_when_asked_for() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(use_lu_lambdas=True)
    levels = read_levels(config_of(scheduler))
    with pytest.raises(ValueError, match="`spacing`"):
        levels.grid(10)
    assert len(levels.grid(10, "trailing")) == 11


@pytest.mark.parametrize("kind", ["karras", "exponential"])
def test_edm(tmp_path: Path, kind: str) -> None:
    scheduler = diffusers.EDMEulerScheduler(sigma_schedule=kind, sigma_max=20.0)
    net = unet().eval()
    net.save_pretrained(tmp_path / "net")
    loaded = from_diffusers(tmp_path / "net", scheduler=scheduler)
    assert loaded.denoiser.process is VE
    scheduler.set_timesteps(8)
    grid = loaded.grid(8)
    torch.testing.assert_close(torch.exp(-0.5 * grid).float(), scheduler.sigmas, rtol=1e-5, atol=0.0)
    x = 3.0 * torch.randn(2, 1, 8, 8)
    sigma = scheduler.sigmas[3]
    with torch.no_grad():
        out = net(scheduler.precondition_inputs(x, sigma), scheduler.precondition_noise(sigma).expand(2)).sample
        close(loaded.denoiser(x, float(grid[3])).mean, scheduler.precondition_outputs(x, out, sigma))


SOLVED_FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize("scheduler", [
    {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    {"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 3.0},
    {"_class_name": "UniPCMultistepScheduler", **SOLVED_FLOW},
    {"_class_name": "DPMSolverMultistepScheduler", **SOLVED_FLOW},
])  # fmt: skip
def test_flow_matching(scheduler: dict[str, Any]) -> None:
    net = unet().eval()
    loaded = from_diffusers(net, scheduler=scheduler)
    assert loaded.denoiser.process is FLOW
    grid = loaded.grid(4)
    sigma = torch.sigmoid(-0.5 * grid)
    u = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0], dtype=torch.float64)
    torch.testing.assert_close(sigma, 3 * u / (1 + 2 * u))
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        flow = net(x, torch.tensor([1000 * float(sigma[1])] * 2)).sample
        close(loaded.denoiser.predict(x, float(grid[1]), "flow"), flow)
        close(loaded.denoiser(x, float(grid[1])).mean, x - float(sigma[1]) * flow)
        assert loaded.denoiser(x, -math.inf).mean.isfinite().all()


@pytest.mark.parametrize("config, match", [
    ({"_class_name": "DDPMScheduler", "prediction_type": "noise"}, "`prediction_type`='noise' is not supported"),
    ({"_class_name": "DDPMScheduler", "beta_schedule": "steep"}, "steep"),
    ({"_class_name": "DDPMScheduler", "beta_schedule": "laplace"}, "`beta_schedule`='laplace' is not supported"),
    ({"_class_name": "KarrasVeScheduler"}, "KarrasVeScheduler is not supported: one of DDPMScheduler"),
    ({}, "`scheduler` of class None"),
    ({"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"}, "use_flow_sigmas=True"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting"),
    ({"_class_name": "EDMEulerScheduler", "prediction_type": "sample"}, "'epsilon' or 'v_prediction'"),
    ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "`timestep_type`='continuous'"),
    ("DDPMScheduler", "must be a diffusers scheduler or a mapping"),
    (None, "`scheduler` is needed with a model object"),
])  # fmt: skip
def test_schedulers_that_are_not_understood(config: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        from_diffusers(unet(), scheduler=config)


def test_learned_log_variance_is_left_out_with_a_warning() -> None:
    net = unet(out_channels=2)
    with pytest.warns(UserWarning, match="log-variance"):
        loaded = from_diffusers(net, scheduler=diffusers.DDPMScheduler(variance_type="learned"))
    assert not loaded.denoiser.learned_range
    assert loaded.denoiser(torch.randn(2, 1, 8, 8), 0.0).mean.shape == (2, 1, 8, 8)
    assert from_diffusers(net, scheduler=diffusers.DDPMScheduler(variance_type="learned_range")).denoiser.learned_range


# Sources that cannot be loaded


def write_index(folder: Path, **index: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index))


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder here"):
        from_diffusers(tmp_path / "missing")
    with pytest.raises(ValueError, match="no folder here, and no hub id"):
        from_diffusers("./missing/folder")
    with pytest.raises(ValueError, match="not in the cache and the hub cannot be reached"):
        from_diffusers("owner/name-of-no-repository", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="neither model_index.json nor config.json"):
        from_diffusers(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file"):
        from_diffusers(tmp_path / "model.safetensors")
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match=r"model_index.json is not JSON"):
        from_diffusers(tmp_path)


def test_unsupported_classes_are_named_with_those_that_are(tmp_path: Path) -> None:
    write_index(tmp_path / "flux", _class_name="FluxPipeline")
    with pytest.raises(ValueError, match=r"FluxPipeline, which is not supported: pipelines DDPMPipeline.*UNet2DModel"):
        from_diffusers(tmp_path / "flux")
    write_index(tmp_path / "custom", _class_name="DDPMPipeline", unet=["my_code", "UNet2DModel"])
    with pytest.raises(ValueError, match=r"its unet is my_code.UNet2DModel"):
        from_diffusers(tmp_path / "custom")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(ValueError, match="holds a AutoencoderKL"):
        from_diffusers(tmp_path / "vae")
    with pytest.raises(ValueError, match="class Linear is not supported"):
        from_diffusers(torch.nn.Linear(1, 1), scheduler=diffusers.DDPMScheduler())
    with pytest.raises(ValueError, match=r"9 channels in and 4 out"):
        from_diffusers(text_unet(in_channels=9), scheduler=diffusers.DDPMScheduler())
    net = text_unet(addition_embed_type="image", encoder_hid_dim=8, encoder_hid_dim_type="text_proj")
    with pytest.raises(ValueError, match="`addition_embed_type`='image'"):
        from_diffusers(net, scheduler=diffusers.DDPMScheduler())


def test_unknown_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown argument `trust_remote_code`"):
        from_diffusers(tmp_path, trust_remote_code=True)
    with pytest.raises(ValueError, match="`subfolder` is for folders"):
        from_diffusers(unet(), scheduler=diffusers.DDPMScheduler(), subfolder="unet")


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    pipeline = diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler())
    pipeline.save_pretrained(tmp_path, safe_serialization=False)
    assert list((tmp_path / "unet").glob("*.bin"))
    with pytest.raises(ValueError, match="pickled weights only"):
        from_diffusers(tmp_path)


def test_damaged_checkpoints(tmp_path: Path) -> None:
    diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="unet cannot be loaded as a UNet2DModel"):
        from_diffusers(tmp_path)
    weights.write_bytes(content)
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    for change in ({"layers_per_block": 2}, {"block_out_channels": [8, 16]}):
        (tmp_path / "unet" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match="another architecture|cannot be loaded"):
            from_diffusers(tmp_path)
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ValueError, match="no scheduler/scheduler_config.json"):
        from_diffusers(tmp_path)


# Back to diffusers


@pytest.mark.parametrize("options, named", [
    ({}, True),
    ({"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}, True),
    ({"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample", "num_train_timesteps": 100}, False),
    ({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, False),
])  # fmt: skip
def test_round_trip(tmp_path: Path, options: dict[str, Any], named: bool) -> None:
    """The table comes back by the name of its schedule where it has one, else as a list of betas."""
    first = from_diffusers(unet(), scheduler=diffusers.DDPMScheduler(**options))
    folder = to_diffusers(first.denoiser, tmp_path / "out", clip=1.0)
    pipeline = quiet(diffusers.DDPMPipeline.from_pretrained(folder, use_safetensors=True))
    images = pipeline(batch_size=2, num_inference_steps=10, generator=torch.Generator().manual_seed(7), output_type="np").images
    second = from_diffusers(folder)
    assert second.clip == 1.0
    close(ddpm_like_theirs(second, 2, 10, 7), torch.from_numpy(images).permute(0, 3, 1, 2), 1e-4)
    for made in (first, second):
        assert isinstance(made.schedule, Table)
    torch.testing.assert_close(second.schedule.lam, first.schedule.lam, rtol=1e-9, atol=1e-9)  # type: ignore[union-attr]
    written = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert (written["trained_betas"] is None) == named


def test_a_wrapped_table_and_a_learned_range_export_too(tmp_path: Path) -> None:
    net = from_diffusers(unet(out_channels=2), scheduler=diffusers.DDPMScheduler()).denoiser.net
    entries = Table.from_betas(torch.linspace(1e-3, 0.05, 100, dtype=torch.float64))
    made = Preconditioned(net, VP, "eps", entries.index, learned_range=True)
    pipeline = diffusers.DDPMPipeline.from_pretrained(to_diffusers(made, tmp_path / "out"))
    assert pipeline.scheduler.config.variance_type == "learned_range"
    assert not pipeline.scheduler.config.clip_sample
    assert pipeline.scheduler.config.beta_end == pytest.approx(0.05)


def test_what_diffusers_cannot_express_is_refused(tmp_path: Path) -> None:
    chain = diffusers.DDPMScheduler()
    cases = [
        (from_diffusers(unet(), scheduler=diffusers.EDMEulerScheduler()).denoiser, "no chain of betas"),
        (from_diffusers(unet(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler()).denoiser, "no chain of betas"),
        (from_diffusers(unet(num_class_embeds=3), scheduler=chain).denoiser, "class-conditional"),
        (from_diffusers(text_unet(), scheduler=chain).denoiser, "holds a UNet2DConditionModel"),
        (from_diffusers(unet(sample_size=None), scheduler=chain).denoiser, "no sample_size"),
        (Preconditioned(torch.nn.Identity()), "holds a Identity"),
        (from_diffusers(unet(), scheduler=chain).denoiser.bind(label=0), "is a Bound"),
    ]
    for denoiser, match in cases:
        with pytest.raises(ValueError, match=match):
            to_diffusers(denoiser, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_or_left_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = from_diffusers(unet(), scheduler=diffusers.DDPMScheduler()).denoiser
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(ValueError, match="not an empty folder"):
            to_diffusers(denoiser, tmp_path / name)
    assert (tmp_path / "full" / "precious.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert (to_diffusers(denoiser, tmp_path / "empty") / "model_index.json").is_file()

    def full(self: Any, path: Any, **_: Any) -> None:
        Path(path).mkdir()
        (Path(path) / "half").write_text("")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(diffusers.DDPMPipeline, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        to_diffusers(denoiser, tmp_path / "new")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["empty", "file", "full"]
