"""Short chains, against the official code's arrays and the kernels of the library."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from helpers import f64, gaussian_data, refuses, within
from quieten import VE, VP, Ancestral, Draws, Noise, Preconditioned, Table, WithCovariance, karras
from quieten.gaussian import Gaussian
from quieten.tuning.policy import Policy
from quieten.tuning.policy_schedule import Consistency, beta_schedule, edm_grid, fastdpm, moment_std, network_time

TABLE = Table.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
KINDS = {"quad": "quadratic", "line": "linear"}


@pytest.mark.parametrize("T", [4, 5, 10, 20, 50])
@pytest.mark.parametrize("kind", KINDS)
def test_the_chain_is_the_official_one(golden, kind, T):
    arrays = {k: torch.as_tensor(v).double() for k, v in golden("dxmi_var_schedule").items()}
    chain = fastdpm(T, KINDS[kind])
    key = f"{kind}_T{T}_"
    within(1e-4 if kind == "line" else 2e-5, (chain.eta - arrays[f"{key}eta"]).abs().max(), "eta")
    within(1e-2, (chain.times - arrays[f"{key}continuous_steps"]).abs().max(), "times")
    within(1e-2, (TABLE.index(chain.grid[:-1]) - chain.times).abs().max(), "times of a table")
    for name in ("x_mult", "eps_mult", "std"):
        within(1e-4, (getattr(chain, name) / arrays[key + name] - 1).abs().max(), name)


def test_the_long_chain(golden):
    arrays = {k: torch.as_tensor(v).double() for k, v in golden("dxmi_var_schedule").items()}
    betas = beta_schedule("linear", 1000, 1e-4, 0.02)
    within(1e-6, (betas - arrays["beta_1000"]).abs().max(), "beta")
    log_alpha2 = torch.log1p(-betas).cumsum(0)
    within(1e-6, (log_alpha2.exp() - arrays["alpha_bar_1000"]).abs().max(), "alpha bar")
    for t in (0, 7, 500, 999):
        within(1e-6, abs(network_time(float(log_alpha2[t])) - t), f"time {t}")


def test_schedules_of_variances(golden):
    arrays = golden("dxmi_update_value")
    for kind in ("linear", "quad", "sigmoid", "constant"):
        theirs = torch.as_tensor(arrays[f"bsched_{kind}"])
        within(1e-6, (beta_schedule(kind, 7, 0.01, 0.5) - theirs).abs().max(), kind)
    with refuses("`kind`", "'cosine'"):
        beta_schedule("cosine", 7, 0.01, 0.5)


class Wave(torch.nn.Module):
    """The network of the golden arrays, w x + b sin(t / 100)."""

    def forward(self, x, t):
        return 0.3 * x + 0.2 * torch.sin(t / 100).reshape(-1, *[1] * (x.ndim - 1))


def wave_policy(T: int, **options) -> Policy:
    denoiser = Preconditioned(Wave(), VP, "eps", TABLE, shape=(3, 4, 4))
    chain = fastdpm(T)
    with pytest.warns(UserWarning, match="signal amplitude is expected"):
        return chain.policy(denoiser, **options)


@pytest.mark.parametrize("T", [4, 10])
@pytest.mark.parametrize("mode, scaled", [("learn", "plain"), ("learn", "scaled"), ("fixed", "plain"), ("fixlast", "plain")])
def test_steps_are_the_official_ones(golden, T, mode, scaled):
    a = {k: torch.as_tensor(v) for k, v in golden("dxmi_var_sampler").items() if k.startswith(f"T{T}_{mode}_{scaled}_")}
    a = {k.removeprefix(f"T{T}_{mode}_{scaled}_"): v for k, v in a.items()}
    scales = {"adhoc_scale1": 0.8, "adhoc_scale2": 1.5} if scaled == "scaled" else {}
    policy = wave_policy(T, trained={"learn": "all", "fixed": "none", "fixlast": "fix_last"}[mode], **scales)
    if "log_sigma_param" in a:
        ramp = torch.linspace(-0.2, 0.3, T)
        within(1e-4, (policy.log_std.detach() + ramp - a["log_sigma_param"]).abs().max(), "initial std")
        policy.log_std.data.copy_(a["log_sigma_param"])
    with torch.no_grad():
        p = policy.step(a["x"], a["idx"])
        within(1e-5, (p.mean - a["mean"]).abs().max(), "mean")
        within(1e-5, (p.var.sqrt().flatten() - a["sigma"]).abs().max(), "std")
        within(1e-5, (p.sample(a["noise"]) - a["sample"]).abs().max(), "sample")
        # where the noise is the schedule's own, the official code has lost digits in 1 - G
        within(1e-4 if mode == "fixed" else 1e-5, (policy.log_rho(a["idx"], p) - a["sigma"].log()).abs().max(), "entropy")
        # digits: the logarithm of the density amplifies those of the sample by noise / std, up to 3,000 in the last step
        exact = Gaussian(p.mean, p.var).log_prob(p.sample(a["noise"])) / 48
        within(1e-5 * float((1 / a["sigma"]).max()), (exact - a["logp"]).abs().max(), "log-density")


@pytest.mark.parametrize("T", [4, 10])
def test_rollouts_and_likelihoods_are_the_official_ones(golden, T):
    a = {k.removeprefix(f"T{T}_"): torch.as_tensor(v) for k, v in golden("dxmi_var_sampler").items() if f"T{T}_" in k}
    policy = wave_policy(T)
    noise = a["rollout_noise"]
    roll = policy.rollout(6, lambda step, like: noise[step + 1])
    within(1e-5, (roll.states - a["rollout_states"]).abs().max(), "states")
    with torch.no_grad():
        for k in range(T):
            p = policy.step(a["rollout_states"][k], k)
            within(1e-5, (p.mean - a["rollout_mean"][k]).abs().max(), f"mean of step {k}")
        idx = a["logprobstep_idx"]
        ours = policy.log_prob(a["rollout_states"][0], a["rollout_states"][1], idx, "mean")
    # far from the means it is -(distance / std)^2 / 2, of an official std that is off by 9e-5
    within(2e-4, (ours / a["logprobstep"] - 1).abs().max(), "likelihood of a step, relative")
    # and with that very std nothing is left but rounding, of figures up to 96,491
    official = torch.as_tensor(golden("dxmi_var_schedule")[f"quad_T{T}_std"]).float()
    policy = wave_policy(T, std=official)
    with torch.no_grad():
        ours = policy.log_prob(a["rollout_states"][0], a["rollout_states"][1], idx, "mean")
        logs = policy.log_rho(torch.arange(T), policy.step(a["rollout_states"][:T, 0], torch.arange(T)))
    within(1e-6, (ours / a["logprobstep"] - 1).abs().max(), "likelihood of a step with the official std, relative")
    within(1e-6, (logs - official.log()).abs().max(), "entropy with the official std")


def test_the_chain_ends_where_the_long_one_does_or_says_so():
    assert not fastdpm(50).clipped
    assert not fastdpm(10, "linear").clipped
    within(1e-12, abs(float(fastdpm(50).log_alpha2[-1] - torch.log1p(-beta_schedule("linear", 1000, 1e-4, 0.02)).sum())), "end")
    for T, share, time in ((4, 0.586, 321.9), (5, 0.469, 384.0), (10, 0.144, 616.7)):
        chain = fastdpm(T)
        assert chain.clipped
        within(1e-3, abs(math.exp(0.5 * float(chain.log_alpha2[-1])) - share), "signal")
        within(0.1, abs(float(chain.times[0]) - time), "time")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastdpm(50).policy(Preconditioned(Wave(), VP, "eps", TABLE))
    rounded = Preconditioned(Wave(), VP, "eps", lambda lam: TABLE.nearest(lam))
    with pytest.warns(UserWarning, match="whole times"):
        fastdpm(50).policy(rounded)
    with refuses("`T`", "0"):
        fastdpm(0)
    with refuses("`kind`", "'cubic'"):
        fastdpm(4, "cubic")


@pytest.mark.parametrize("kappa", [0.3, 1.0])
def test_kappa_is_the_share_of_ancestral_noise(kappa):
    chain = fastdpm(6, kappa=kappa)
    data = gaussian_data("vector", VP)
    x = torch.randn(2, 5, dtype=torch.float64)
    for k, (lam_t, lam_s) in enumerate(zip(chain.grid[:-2].tolist(), chain.grid[1:-1].tolist(), strict=True)):
        p = Ancestral(kappa, spread=False)(data, x, lam_t, lam_s).p
        eps = data.predict(x, lam_t, "eps")
        within(1e-12, (p.mean - chain.x_mult[k] * x - chain.eps_mult[k] * eps).abs().max(), "mean")
        within(1e-12, abs(float(p.var.sqrt() - chain.std[k])), "std")


def test_grids_of_edm():
    sigmas = torch.exp(-0.5 * edm_grid(4, rho=4.0, stochastic_last=True))
    within(1e-4, (sigmas / f64(80, 27.785, 6.5714, 0.6746, 0.002) - 1).abs().max(), "levels of four stochastic steps")
    assert edm_grid(10)[-1] == math.inf
    assert len(edm_grid(10)) == 11
    data = gaussian_data("vector", VE)
    policy = Policy(data, edm_grid(4, rho=4.0, stochastic_last=True))
    wanted = sigmas[1:] * (sigmas[:-1].square() - sigmas[1:].square()).sqrt() / sigmas[:-1]
    within(1e-6, (policy.rhos / wanted - 1).abs().max(), "noise of EDM's ancestral steps")


def test_consistency_steps():
    data = gaussian_data("image", VE)
    lam_max = -2.0 * math.log(0.002)
    grid = edm_grid(3, rho=4.0, stochastic_last=True)
    sigmas = torch.exp(-0.5 * grid)
    policy = Policy(data, grid, Consistency(lam_max), std=torch.tensor([0.3, 0.2, 0.1]))
    x = torch.randn(3, *data.shape)
    p, k = policy.step(x, torch.arange(3)), Consistency(lam_max)(data, x, float(grid[0]), float(grid[1])).p
    torch.testing.assert_close(p.mean, torch.cat([data(x[i : i + 1], float(grid[i])).mean for i in range(3)]))
    within(1e-12, abs(float(k.var) - float(sigmas[1] ** 2 - 0.002**2)), "variance")
    assert float(Policy(data, grid, Consistency(lam_max)).rhos[2]) == pytest.approx(1e-3)  # the kernel itself has none there
    noisy = karras(3, 0.1, 10.0)
    torch.testing.assert_close(Policy(data, noisy, Consistency()).rhos[:2], torch.exp(-0.5 * noisy[1:3]))


@pytest.mark.parametrize("kind", ["vector", "image"])
def test_noise_from_a_learned_variance(kind):
    """The exact denoiser reports the exact variance, the same in every state: the average is it."""
    data = gaussian_data(kind, VE)
    grid = karras(3, 0.1, 10.0)
    x0 = data.sample(Noise(0, range(6)))
    lams = grid.tolist()
    for per in ("step", "pixel"):
        std = moment_std(data, grid, x0, draws=Draws(0, 0, range(6)), per=per)
        for k in range(2):
            var = Ancestral()(data, x0, lams[k], lams[k + 1]).p.var.expand_as(x0)
            wanted = var[0].sqrt() if per == "pixel" else var.mean().sqrt()
            torch.testing.assert_close(std[k], wanted)
        assert float(std[2].mean()) == pytest.approx(1e-3)
        policy = Policy(data, grid, std=std)
        assert policy.log_std.shape == ((3, *data.shape) if per == "pixel" else (3,))


def test_heads_can_be_kept():
    """With std="kernel" the table is a factor on whatever the denoiser reports."""
    data = gaussian_data("vector", VE)

    def state(denoiser, x, lam, p):
        return 0.1 + x.square()

    grid = karras(3, 0.1, 10.0)
    denoiser = WithCovariance(data, state)
    policy = Policy(denoiser, grid, Ancestral(), std="kernel", trained="all")
    policy.log_std.data += math.log(2.0)
    x, k = torch.randn(3, 5, dtype=torch.float64), torch.tensor([0, 1, 2])
    p = policy.step(x, k)
    lams = grid.tolist()
    for i in range(2):
        kernel = Ancestral()(denoiser, x[i : i + 1], lams[i], lams[i + 1]).p
        torch.testing.assert_close(p.var[i], 4 * kernel.var[0])
        torch.testing.assert_close(policy.step(x[i : i + 1], i).var[0], 4 * kernel.var[0])
    torch.testing.assert_close(p.var[2], torch.full((5,), 4e-6, dtype=torch.float64))
    torch.testing.assert_close(policy.log_rho(k, p), 0.5 * p.var.log().mean(1))
    p.sample(torch.randn(3, 5)).sum().backward()
    assert (policy.log_std.grad != 0).all()
