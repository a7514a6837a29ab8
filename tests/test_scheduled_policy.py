"""Policies from schedulers of diffusers: the same steps, the same noise."""

from __future__ import annotations

import warnings

import pytest
import torch

from helpers import gaussian_data, refuses, within
from quieten import VP

diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install 'quieten[diffusers]'")
from quieten.interop.policies import scheduled_policy  # noqa: E402


@pytest.mark.parametrize(
    "name, options, eta",
    [
        ("DDPMScheduler", {"clip_sample": False}, 1.0),
        ("DDPMScheduler", {"clip_sample": False, "timestep_spacing": "trailing", "beta_schedule": "scaled_linear"}, 1.0),
        ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}, 0.4),
        ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "linspace"}, 1.0),
        ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}, 1.0),
    ],
)
def test_a_step_is_the_schedulers(name, options, eta):
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(5)
    data = gaussian_data("image", VP)
    policy = scheduled_policy(data, scheduler, 5, eta)
    ancestral, lams = name.startswith("Euler"), policy.grid.tolist()
    for k, t in enumerate(scheduler.timesteps):
        (alpha, sigma), (alpha_s, _) = VP.scales(lams[k]), VP.scales(lams[k + 1])
        x = torch.randn(2, *data.shape, dtype=torch.float64)
        eps, seeded = (x - alpha * data(x, lams[k]).mean) / sigma, torch.Generator().manual_seed(k)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(k), dtype=x.dtype)
        extra = {"eta": eta} if name == "DDIMScheduler" else {}
        state = x / alpha if ancestral else x
        theirs = scheduler.step(eps, t, state, generator=seeded, **extra).prev_sample * (alpha_s if ancestral else 1.0)
        p = policy.step(x, k)
        ours = p.sample(noise) if k < 4 else p.mean  # the last step has no noise of its own
        within(2e-4, (theirs - ours).detach().abs().max(), f"step {k}")
    assert float(policy.rhos[-1]) == pytest.approx(1e-3)


def test_schedulers_that_make_no_policy():
    data = gaussian_data("image", VP)
    for name in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"):
        with refuses("`scheduler`", name, "no noise", "std="):
            scheduled_policy(data, getattr(diffusers, name)(), 4)
    with refuses("`eta`", "0.0"):
        scheduled_policy(data, diffusers.DDIMScheduler(clip_sample=False), 4, eta=0.0)
    with refuses("`variance_type`", "'learned_range'", "std="):
        scheduled_policy(data, diffusers.DDPMScheduler(clip_sample=False, variance_type="learned_range"), 4)
    with pytest.warns(UserWarning, match="`scheduler` clips"):
        scheduled_policy(data, diffusers.DDPMScheduler(), 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduled_policy(data, {"_class_name": "DDPMScheduler", "clip_sample": False}, 4)
