"""The same network, initial state and noise give the same states as diffusers' schedulers, step by step.

diffusers keeps its tables in float32, where 1 - alpha_bar has lost digits near the data; ours are float64. Where a scheduler
lets its table be replaced, the float64 cases replace it, and the agreement is that of float64.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install 'quieten[diffusers]'")

from quieten import FLOW, VE, VP, Ancestral, Euler, Exponential, Heun, Preconditioned, Rectified, Table, WithCovariance  # noqa: E402
from quieten.covariance import Unit  # noqa: E402
from quieten.denoiser import Denoiser  # noqa: E402
from quieten.interop import from_diffusers  # noqa: E402
from quieten.interop.levels import Levels, read_levels  # noqa: E402
from quieten.sampling import trajectory  # noqa: E402
from quieten.transition import Transition  # noqa: E402

TOLERANCE = 1e-4  # relative, in the norm of each state; the figures printed are far below it
KINDS = ("epsilon", "sample", "v_prediction")
CASES = [("stub", torch.float64), ("unet", torch.float32)]


class Stub(nn.Module):
    """An elementwise network: nonlinear in the state, smooth in time, with as many times the channels as asked."""

    def __init__(self, scale: float = 1000.0, double: bool = False):
        super().__init__()
        self.scale, self.double_channels = scale, double
        self.weight = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = (t.to(x.dtype) / self.scale).reshape(-1, *[1] * (x.ndim - 1))
        out = torch.tanh(self.weight * (1 + t) * x) + 0.3 * torch.sin(2 * x + 3 * t)
        return torch.cat([out, torch.cos(3 * x)], 1) if self.double_channels else out


@functools.cache
def unet(channels: int = 2, dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    """A small UNet2DModel with random weights, as wide awake as a trained one."""
    torch.manual_seed(1)
    config = {
        "sample_size": 8,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
    } | config
    model = diffusers.UNet2DModel(**config)
    with torch.no_grad():
        model.conv_out.weight[:channels].mul_(8.0)
        model.conv_out.weight[channels:].mul_(0.1)
    return (model.double() if dtype == torch.float64 else model).eval()


class Call(nn.Module):
    """A diffusers model that returns its tensor."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.model(x, t).sample


def levels_of(scheduler: Any) -> Levels:
    return read_levels({**scheduler.config, "_class_name": type(scheduler).__name__})


def table_of(scheduler: Any) -> Table:
    table = levels_of(scheduler).schedule
    assert isinstance(table, Table)
    return table


def pair(scheduler: Any, network: str, dtype: torch.dtype, double: bool = False) -> tuple[nn.Module, Denoiser]:
    """One network as diffusers calls it, and as our denoiser."""
    levels = levels_of(scheduler)
    if network == "unet":
        model = unet(dtype=dtype, **({"out_channels": 4} if double else {}))
        return Call(model), from_diffusers(model, scheduler=scheduler).denoiser
    net = Stub(double=double).to(dtype)
    made = Preconditioned(net, levels.process, levels.form, levels.embed, sigma_data=levels.sigma_data, learned_range=double)
    return net, made


def theirs(scheduler: Any, net: nn.Module, x: Tensor, **options: Any) -> list[Tensor]:
    """The states of diffusers' loop, after `set_timesteps`."""
    states = [x]
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = net(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(out, t, x, **options).prev_sample
            states.append(x)
    return states


def ours(denoiser: Denoiser, x: Tensor, grid: Tensor, transition: Transition, seed: int | None = None) -> list[Tensor]:
    """The states of our loop; with a seed, the noise is that of diffusers, drawn one step after the other."""
    source = None
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        source = lambda _, like: torch.randn(like.shape, generator=generator, dtype=like.dtype)  # noqa: E731
    with torch.no_grad():
        return [state.x for state in trajectory(denoiser, x, grid, transition, noise=source)]


def same(a: list[Tensor], b: list[Tensor], what: str, tolerance: float = TOLERANCE) -> None:
    """Compares all states, and prints the largest relative difference."""
    assert len(a) == len(b)
    worst = max(float((p - q).norm() / q.norm()) for p, q in zip(a, b, strict=True))
    print(f"{what}: {worst:.1e}")
    assert worst < tolerance
    assert all(state.isfinite().all() for state in a)


def start(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


def exact(scheduler: Any) -> Table:
    """Replaces a scheduler's float32 table by the float64 one it stands for, and returns it."""
    table = table_of(scheduler)
    scheduler.alphas_cumprod = torch.sigmoid(table.lam)
    for name in ("one", "final_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, torch.tensor(1.0, dtype=torch.float64))
    return table


@pytest.mark.parametrize("network", ["stub", "unet"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("clip", [None, "eps kept", "eps from x0"])
def test_ddim(network: str, kind: str, spacing: str, clip: str | None) -> None:
    """Not with "linspace", for which DDIMScheduler takes t - N // steps as the next index, which it is not."""
    scheduler = diffusers.DDIMScheduler(prediction_type=kind, timestep_spacing=spacing, clip_sample=clip is not None)
    net, denoiser = pair(scheduler, network, torch.float32)
    scheduler.set_timesteps(10)
    a = theirs(scheduler, net, start(), use_clipped_model_output=clip == "eps from x0")
    transition = Ancestral(0, spread=False, clip=1.0 if clip else None, keep_eps=clip == "eps kept")
    table = table_of(scheduler)
    b = ours(denoiser, start(), table.grid(10, spacing), transition)
    same(b, a, f"ddim {network} {kind} {spacing} clip={clip}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_ddim_in_float64(kind: str, schedule: str) -> None:
    scheduler = diffusers.DDIMScheduler(prediction_type=kind, beta_schedule=schedule, clip_sample=False)
    net, denoiser = pair(scheduler, "unet", torch.float64)
    table = exact(scheduler)
    scheduler.set_timesteps(20)
    a = theirs(scheduler, net, start(torch.float64))
    b = ours(denoiser, start(torch.float64), table.grid(20, "leading"), Ancestral(0, spread=False))
    same(b, a, f"ddim float64 {kind} {schedule}", 1e-9)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_noise(eta: float) -> None:
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    net, denoiser = pair(scheduler, "stub", torch.float64)
    table = exact(scheduler)
    scheduler.set_timesteps(10)
    a = theirs(scheduler, net, start(torch.float64), eta=eta, generator=torch.Generator().manual_seed(3))
    b = ours(denoiser, start(torch.float64), table.grid(10, "leading"), Ancestral(eta, spread=False), seed=3)
    same(b, a, f"ddim eta={eta}", 1e-9)


@pytest.mark.parametrize("network, dtype", CASES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("clip", [False, True])
def test_ddpm(network: str, dtype: torch.dtype, kind: str, variance: str, clip: bool) -> None:
    """With "leading" spacing, whose last step starts at index 0: DDPMScheduler draws noise in every step from a higher
    index, the last one included, where ours (and its own at index 0) returns the mean."""
    scheduler = diffusers.DDPMScheduler(prediction_type=kind, variance_type=variance, clip_sample=clip)
    net, denoiser = pair(scheduler, network, dtype)
    table = exact(scheduler) if dtype == torch.float64 else table_of(scheduler)
    scheduler.set_timesteps(10)
    a = theirs(scheduler, net, start(dtype), generator=torch.Generator().manual_seed(3))
    model = WithCovariance(denoiser, Unit()) if variance == "fixed_large" else denoiser
    # A bound on the variance of x0 is ours alone, so the clipped estimate comes as a map, which sets none.
    transition = Ancestral(1, clip=(lambda x0: x0.clamp(-1, 1)) if clip else None)
    b = ours(model, start(dtype), table.grid(10, "leading"), transition, seed=3)
    same(b, a, f"ddpm {variance} {network} {kind} clip={clip} {dtype}", 1e-9 if dtype == torch.float64 else TOLERANCE)


@pytest.mark.parametrize("network", ["stub", "unet"])
def test_ddpm_learned_range(network: str) -> None:
    """For outputs in [-1, 1], as they are meant: below, ours stays at the small variance, theirs goes on."""
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    net, denoiser = pair(scheduler, network, torch.float64, double=True)
    assert denoiser.learned_range
    table = exact(scheduler)
    scheduler.set_timesteps(10)
    a = theirs(scheduler, net, start(torch.float64), generator=torch.Generator().manual_seed(3))
    b = ours(denoiser, start(torch.float64), table.grid(10, "leading"), Ancestral(1, range=True), seed=3)
    same(b, a, f"ddpm learned_range {network}", 1e-9)


def to_vp(states: list[Tensor], grid: Tensor) -> list[Tensor]:
    """diffusers' Euler, Heun and LMS schedulers keep x / alpha: times alpha, their states are ours."""
    return [state.to(torch.float64) * VP.scales(lam)[0] for state, lam in zip(states, grid.tolist(), strict=True)]


@pytest.mark.parametrize("network", ["stub", "unet"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_euler_is_ddim(network: str, kind: str, spacing: str) -> None:
    """EulerDiscreteScheduler refuses "sample" networks."""
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type=kind, timestep_spacing=spacing)
    net, denoiser = pair(scheduler, network, torch.float32)
    grid = table_of(scheduler).grid(10, spacing)
    alpha = VP.scales(float(grid[0]))[0]
    scheduler.set_timesteps(10)
    a = to_vp(theirs(scheduler, net, start() / alpha), grid)
    for transition in (Euler(), Ancestral(0, spread=False)):
        b = ours(denoiser, start(), grid, transition)
        same([x.double() for x in b], a, f"euler {network} {kind} {spacing} {type(transition).__name__}")


def test_euler_ancestral() -> None:
    """EulerAncestralDiscreteScheduler is our eta = 1 kernel without spread."""
    scheduler = diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="leading")
    net, denoiser = pair(scheduler, "unet", torch.float32)
    grid = table_of(scheduler).grid(10, "leading")
    alpha = VP.scales(float(grid[0]))[0]
    scheduler.set_timesteps(10)
    a = to_vp(theirs(scheduler, net, start() / alpha, generator=torch.Generator().manual_seed(3)), grid)
    b = ours(denoiser, start(), grid, Ancestral(1, spread=False), seed=3)
    same([x.double() for x in b], a, "euler ancestral")


@pytest.mark.parametrize("network", ["stub", "unet"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_heun(network: str, kind: str, spacing: str) -> None:
    """HeunDiscreteScheduler takes two calls for a step, and one for the last, as ours does."""
    scheduler = diffusers.HeunDiscreteScheduler(prediction_type=kind, timestep_spacing=spacing)
    net, denoiser = pair(scheduler, network, torch.float32)
    grid = table_of(scheduler).grid(10, spacing)
    alpha = VP.scales(float(grid[0]))[0]
    scheduler.set_timesteps(10)
    states = theirs(scheduler, net, start() / alpha)
    a = to_vp([*states[:-1:2], states[-1]], grid)
    b = ours(denoiser, start(), grid, Heun())
    same([x.double() for x in b], a, f"heun {network} {kind} {spacing}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "network, order, eta", [("stub", 1, 0), ("stub", 2, 0), ("stub", 3, 0), ("stub", 1, 1), ("stub", 2, 1), ("unet", 2, 0)]
)
def test_dpm_solver(network: str, order: int, eta: int, kind: str) -> None:
    """DPM-Solver++ with the midpoint rule and final_sigmas_type="zero" ends with a step of first order, as ours does; below 15
    steps `lower_order_final` would lower more than that, so there are 20.

    Not the stochastic solver of order 3, where diffusers' weight of the second difference, (1 - exp(-2h) - 2h) / (2h)^2 - 1/2,
    tends to -1 for small steps: the 1/2 has the wrong sign (compare its solver without noise, and dpmpp_3m_sde of k-diffusion).
    """
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type=kind,
        solver_order=order,
        algorithm_type="sde-dpmsolver++" if eta else "dpmsolver++",
        timestep_spacing="trailing",
    )
    net, denoiser = pair(scheduler, network, torch.float32)
    grid = table_of(scheduler).grid(20, "trailing")
    scheduler.set_timesteps(20)
    options = {"generator": torch.Generator().manual_seed(3)} if eta else {}
    a = theirs(scheduler, net, start(), **options)
    b = ours(denoiser, start(), grid, Exponential(order, eta=eta), seed=3 if eta else None)
    same(b, a, f"dpm++ {order}M {network} {kind} eta={eta}")


def flow_grid(scheduler: Any) -> Tensor:
    """Our levels for the sigmas that a flow-matching scheduler visits, 1 (pure noise) and 0 (data) included."""
    sigmas = torch.unique_consecutive(scheduler.sigmas).double()
    return 2.0 * (torch.log1p(-sigmas) - torch.log(sigmas))


@pytest.mark.parametrize("network, dtype", CASES)
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("method", ["Euler", "Heun"])
def test_flow_matching(network: str, dtype: torch.dtype, shift: float, method: str) -> None:
    """From pure noise, lam = -inf, on the sigmas of the scheduler. Both schedulers step in float32 whatever the network's
    dtype; they spend a last step on sigma = shift(shift(1 / 1000)) -> 0, which `Pretrained.grid` does not."""
    scheduler = getattr(diffusers, f"FlowMatch{method}DiscreteScheduler")(shift=shift)
    scheduler.scale_model_input = lambda x, t: x
    net, denoiser = pair(scheduler, network, dtype)
    scheduler.set_timesteps(10)
    grid = flow_grid(scheduler)
    assert grid[0] == -math.inf
    assert grid[-1] == math.inf
    states = theirs(scheduler, net, start(dtype))
    if method == "Heun":
        states = [*states[:-1:2], states[-1]]
        transition: Transition = Heun(Rectified(), FLOW)
    else:
        transition = Euler(Rectified(), FLOW)
    same(ours(denoiser, start(dtype), grid, transition), states, f"flow {method} {network} shift={shift} {dtype}")
    # Without coordinates: one Euler step is the same in all of them; Heun begins in those of rectified flow by itself.
    if method == "Euler":
        same(ours(denoiser, start(dtype), grid, Ancestral(0, spread=False)), states, "flow DDIM")


@pytest.mark.parametrize("network", ["stub", "unet"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("solver", ["Euler", "DPMSolverMultistep"])
def test_edm(network: str, kind: str, solver: str) -> None:
    """EDM's preconditioning, and its Karras grid, which is the default one."""
    scheduler = getattr(diffusers, f"EDM{solver}Scheduler")(prediction_type=kind)
    net, denoiser = pair(scheduler, network, torch.float32)
    assert denoiser.process is VE
    grid = levels_of(scheduler).grid(20)
    scheduler.set_timesteps(20)
    x = start() * 80.0
    a = theirs(scheduler, net, x)
    same(ours(denoiser, x, grid, Euler() if solver == "Euler" else Exponential(2)), a, f"edm {solver} {network} {kind}")


@pytest.mark.parametrize("network, dtype", CASES)
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_zero_terminal_snr(network: str, dtype: torch.dtype, sampler: str) -> None:
    """A v network from pure noise, lam = -inf, trailing: DDIM and DDPM schedulers have alpha = 0 there, as we do."""
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = getattr(diffusers, f"{sampler.upper()}Scheduler")(clip_sample=False, **options)
    net, denoiser = pair(scheduler, network, dtype)
    table = exact(scheduler) if dtype == torch.float64 else table_of(scheduler)
    assert table.lam[-1] == -math.inf
    scheduler.set_timesteps(10)
    generator = {} if sampler == "ddim" else {"generator": torch.Generator().manual_seed(3)}
    a = theirs(scheduler, net, start(dtype), **generator)
    transition = Ancestral(0 if sampler == "ddim" else 1, spread=False)
    b = ours(denoiser, start(dtype), table.grid(10, "trailing"), transition, seed=None if sampler == "ddim" else 3)
    same(b, a, f"zero terminal SNR {sampler} {network} {dtype}", 1e-9 if dtype == torch.float64 else TOLERANCE)


def test_zero_terminal_snr_by_euler() -> None:
    """EulerDiscreteScheduler replaces alpha^2 = 0 by 2^-24, so that its first level is not pure noise: sigma / alpha is 4096,
    where ours is infinite. The first step then differs by 1e-3, the others, from its end, by rounding."""
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = diffusers.EulerDiscreteScheduler(**options)
    net, denoiser = pair(scheduler, "unet", torch.float32)
    grid = table_of(scheduler).grid(10, "trailing")
    assert grid[0] == -math.inf
    scheduler.set_timesteps(10)
    sigma = float(scheduler.sigmas[0])
    assert sigma == pytest.approx(4096, rel=1e-3)
    states = theirs(scheduler, net, start() * math.hypot(1.0, sigma))
    a = to_vp(states[1:], grid[1:])
    b = [x.double() for x in ours(denoiser, a[0].float(), grid[1:], Euler())]
    same(b, a, "zero terminal SNR euler, from the second level")
    b = [x.double() for x in ours(denoiser, start(), grid, Euler())]
    same(b[1:], a, "zero terminal SNR euler, from pure noise", 1e-2)


def test_a_noise_network_cannot_start_from_pure_noise() -> None:
    scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    _, denoiser = pair(scheduler, "stub", torch.float32)
    with pytest.raises(ValueError, match="finite log-SNR"):
        ours(denoiser, start(), table_of(scheduler).grid(10, "trailing"), Ancestral(0, spread=False))
