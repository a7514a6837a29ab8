"""Guidance: every gradient against finite differences, and what every kind of guidance owes a sampler."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers import gaussian_data, refuses, within
from quieten.denoiser import Denoiser
from quieten.encoding.encoded import Encoded
from quieten.gaussian import Gaussian, spread_over
from quieten.guidance import ClassifierFree, Gradient, Guidance, Guided, Likelihood
from quieten.guiding.guides import Classified, Energy, Similarity
from quieten.guiding.measurements import Downsample, Measured
from quieten.noise import Noise
from quieten.oracle import GaussianData, MixtureData
from quieten.process import FLOW, VE, VP, Process
from quieten.sampling import generate, sample
from quieten.schedule import karras
from quieten.solvers.samplers import SAMPLERS, sampler
from quieten.wrap import Counted, Extrapolated

SHAPE = (2, 4, 4)
N = math.prod(SHAPE)
LAM = 0.7


class Labelled(Denoiser):
    """Gaussian data whose mean a label moves; unit variance."""

    def __init__(self, process: Process = VP):
        super().__init__()
        self.process, self.shape = process, SHAPE

    def forward(self, x: Tensor, lam: Any, **cond: Any) -> Gaussian:
        inner = GaussianData(torch.zeros(SHAPE), 1.0, self.process)
        alpha, _ = self.process.scales_over(lam, x)
        shift = spread_over(cond["label"].to(x.dtype), x) if "label" in cond else 0.0
        p = inner(x - alpha * shift, lam)
        return Gaussian(p.mean + shift, p.var)


def mixture(process: Process = VP) -> MixtureData:
    means = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return MixtureData(means, 0.3, process=process)


def weights(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def column(lam: Any, x: Tensor) -> Any:
    """A level as it multiplies features (B, F)."""
    return spread_over(lam, x.flatten(1))


def logits(x: Tensor, lam: Any, process: Any = None) -> Tensor:
    return torch.tanh(x.flatten(1) @ weights(N, 5).to(x)) * (1.0 + 0.1 * column(lam, x))


def encode(x: Tensor, lam: Any = 0.0) -> Tensor:
    return torch.sin(x.flatten(1) @ weights(N, 6).to(x) + 0.1 * column(lam, x))


def energy(x: Tensor, lam: Any = 0.0) -> Tensor:
    return (x.flatten(1).pow(4) * 0.1).sum(1) + 0.0 * lam


class Case(NamedTuple):
    make: Callable[..., Guidance]
    value: Callable[[Denoiser, Tensor, float], Tensor] | None
    """log p(y | x_t) in the open; None where another test holds the witness."""
    denoiser: Callable[[], Denoiser] = mixture


def log_class(x: Tensor, lam: float) -> Tensor:
    return logits(x, lam).log_softmax(1)[:, 3]


def log_angle(x: Tensor) -> Tensor:
    u, v = nn.functional.normalize(encode(x)), nn.functional.normalize(weights(6), dim=0).to(x)
    return -0.5 * torch.arccos((u * v).sum(1)).square()


def log_measured(denoiser: Denoiser, x: Tensor, lam: float, v: float = 0.0) -> Tensor:
    h = Downsample(2)
    residual = measured_y().to(x) - h(denoiser(x, lam).mean)
    alpha, sigma = denoiser.process.scales(lam)
    c = v * sigma**2 / (alpha**2 * v + sigma**2)
    return -0.5 * residual.square().flatten(1).sum(1) / (c / 4 + 0.3**2)


def measured_y() -> Tensor:
    return weights(1, 2, 2, 2)


CASES: dict[str, Case] = {
    "likelihood": Case(
        lambda **k: Likelihood(lambda x, lam: -energy(x), **k), lambda d, x, lam: -energy(x)
    ),
    "likelihood of x0": Case(
        lambda **k: Likelihood(lambda x, lam: -energy(x), on="x0", **k), lambda d, x, lam: -energy(d(x, lam).mean)
    ),
    "gradient": Case(
        lambda **k: Gradient(lambda x, lam: -0.4 * x.pow(3), **k), lambda d, x, lam: -energy(x)
    ),
    "class": Case(lambda **k: Classified(logits, 3, **k), lambda d, x, lam: log_class(x, lam)),
    "class of x0": Case(
        lambda **k: Classified(logits, 3, on="x0", **k), lambda d, x, lam: log_class(d(x, lam).mean, lam)
    ),
    "dot product": Case(
        lambda **k: Similarity(encode, weights(6), **k), lambda d, x, lam: encode(x, lam) @ weights(6).to(x)
    ),
    "spherical distance": Case(
        lambda **k: Similarity(encode, weights(6), distance="spherical", on="x0", **k),
        lambda d, x, lam: log_angle(d(x, lam).mean),
    ),
    "energy": Case(lambda **k: Energy(energy, **k), lambda d, x, lam: -energy(x)),
    "energy of x0": Case(lambda **k: Energy(energy, on="x0", **k), lambda d, x, lam: -energy(d(x, lam).mean)),
    "dps": Case(
        lambda **k: Measured(Downsample(2), measured_y(), 0.3, variance=0.0, jacobian="backward", **k), log_measured
    ),
    "pseudoinverse": Case(
        lambda **k: Measured(Downsample(2), measured_y(), 0.3, variance=2.0, jacobian="backward", **k),
        lambda d, x, lam: log_measured(d, x, lam, 2.0),
    ),
    "posterior": Case(lambda **k: Measured(Downsample(2), measured_y(), 0.3, **k), None),
    "identity": Case(lambda **k: Measured(Downsample(2), measured_y(), 0.3, jacobian="identity", **k), None),
    "weaker model": Case(lambda scale=2.0, **k: ClassifierFree(scale + 1.0, weak=gaussian(), **k), None),
}  # fmt: skip


def gaussian() -> GaussianData:
    return GaussianData(torch.zeros(SHAPE), 0.5, VP)


def states(n: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return Noise(4, range(n)).normal(torch.empty(n, *SHAPE, dtype=torch.float64), 0).to(dtype)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


# ---- every kind


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.value is not None])
def test_finite_differences(name: str) -> None:
    case, denoiser, x, h = CASES[name], mixture(), states(), 1e-5
    g = case.make(scale=1.7).gradient(denoiser, x, LAM)
    rows = torch.eye(N, dtype=torch.float64).reshape(N, *SHAPE) * h
    for i in range(len(x)):
        up, down = (case.value(denoiser, x[i] + sign * rows, LAM) for sign in (1, -1))  # type: ignore[misc]
        within(1e-8, (g[i].flatten() - 1.7 * (up - down) / (2 * h)).abs().max() / (1 + g[i].abs().max()), name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_shape_and_dtype(case: Case, n: int, dtype: torch.dtype) -> None:
    x = states(n, dtype)
    before = x.clone()
    g = case.make().gradient(case.denoiser(), x, LAM)
    assert (g.shape, g.dtype, g.requires_grad) == (x.shape, dtype, False)
    p, again = case.make().both(case.denoiser(), x, LAM)
    assert torch.equal(again, g)
    assert torch.equal(p.mean, case.denoiser()(x, LAM).mean)
    assert not p.mean.requires_grad
    assert torch.equal(x, before)
    assert not x.requires_grad


def test_a_sample_does_not_depend_on_its_batch(case: Case) -> None:
    x = states(5)
    whole = case.make().gradient(case.denoiser(), x, LAM)
    alone = torch.cat([case.make().gradient(case.denoiser(), x[i : i + 1], LAM) for i in range(5)])
    within(1e-12, (whole - alone).abs().max(), "alone against in a batch")


def test_the_caller_may_have_switched_gradients_off(case: Case) -> None:
    x = states(2)
    truth = case.make().gradient(case.denoiser(), x, LAM)
    with torch.no_grad():
        assert torch.equal(case.make().gradient(case.denoiser(), x, LAM), truth)
    guidance, denoiser = case.make(), case.denoiser()
    with torch.inference_mode():
        inside = x * 1.0
        assert inside.is_inference()
        assert torch.equal(guidance.gradient(denoiser, inside, LAM), truth)


def test_scale_weighs_and_zero_asks_nothing(case: Case) -> None:
    x, denoiser = states(2), Counted(case.denoiser())
    one, five = (case.make(scale=s).gradient(denoiser, x, LAM) for s in (1.0, 5.0))
    within(1e-12, (five - 5 * one).abs().max() / (1 + five.abs().max()), "linear in the scale")
    denoiser.calls = 0
    assert not case.make(scale=0.0).gradient(denoiser, x, LAM).any()
    assert denoiser.calls == 0


def test_a_scale_may_depend_on_the_level() -> None:
    scale = lambda lam: 2.0 * lam if lam > 0 else 0.0  # noqa: E731
    guidance, x = Energy(energy, scale), states(2)
    assert torch.equal(guidance.gradient(mixture(), x, 1.5), Energy(energy, 3.0).gradient(mixture(), x, 1.5))
    assert not guidance.gradient(mixture(), x, -1.0).any()


@pytest.mark.parametrize("lam", [torch.tensor(LAM), torch.full((3,), LAM, dtype=torch.float64)])
def test_levels_as_tensors(case: Case, lam: Tensor) -> None:
    x = states(3)
    truth = case.make().gradient(case.denoiser(), x, LAM)
    within(1e-6, (case.make().gradient(case.denoiser(), x, lam) - truth).abs().max(), "tensor against float level")


# ---- Guided


@pytest.mark.parametrize("process", [VP, VE, FLOW], ids=str)
def test_bayes_by_a_classifier_is_the_class(process: Process) -> None:
    """Guided by the exact posterior of a class, the mixture's denoiser is the denoiser of that class."""
    data = mixture(process)
    component = GaussianData(data.means[1], data.vars[1], process)

    def log_posterior(x: Tensor, lam: Any) -> Tensor:
        return data._posterior(x, lam)[0].log_softmax(1)[:, 1]

    guided = Guided(data, Likelihood(log_posterior))
    for lam in (-4.0, 0.0, 3.0):
        alpha, sigma = process.scales(lam)
        x = alpha * data.means[1].expand(4, *SHAPE) + sigma * states(4)
        within(1e-10, (guided(x, lam).mean - component(x, lam).mean).abs().max(), f"{process} at {lam}")
    grid = karras(8, 0.05, 20.0)
    x = process.prior(grid[0].item()).sample(states(4)) + data.means[1] * process.scales(grid[0].item())[0]
    for name in ("ddim", "heun", "dpm++"):
        ours, truth = (sample(d, x, grid, sampler(name, grid)[0]) for d in (guided, component))
        within(1e-9, (ours - truth).abs().max(), f"{process}, {name}")


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_takes_guided(name: str) -> None:
    transition, grid = sampler(name, karras(8, 0.05, 20.0))
    guided = Guided(gaussian(), Measured(Downsample(2), torch.full((1, 2, 2, 2), 1.5), 0.1))
    x = generate(guided, 8, grid=grid, transition=transition, dtype=torch.float64)
    within(0.4, (Downsample(2)(x) - 1.5).abs().mean(), f"{name}: distance to what was measured")


def test_conditions_go_through() -> None:
    guided, x = Guided(Labelled(), Likelihood(lambda x, lam: -energy(x))), states(2)
    label = torch.tensor([0, 2])
    bound = guided.bind(label=label)(x, LAM).mean
    truth = Guided(Labelled().bind(label=label), Likelihood(lambda x, lam: -energy(x)))(x, LAM).mean
    assert torch.equal(bound, truth)


def test_in_pure_noise_a_gradient_tells_nothing() -> None:
    x = states(2)
    guided = Guided(GaussianData(torch.zeros(SHAPE), 1.0, FLOW), Likelihood(lambda x, lam: -energy(x), scale=3.0))
    assert torch.equal(guided(x, -math.inf).mean, torch.zeros_like(x))


def test_a_denoiser_that_was_trained_with_an_encoder_is_refused() -> None:
    with refuses("encoder", "E[x0 | x_t]", "Ancestral()"):
        Guided(GaussianData(torch.zeros(SHAPE), 1.0, Encoded(VP)), Energy(energy))


# ---- classifier-free


@pytest.mark.parametrize("process", [VP, VE, FLOW], ids=str)
def test_classifier_free_is_extrapolation(process: Process) -> None:
    model, x, label = Labelled(process), states(3), torch.tensor([1, 2, 3])
    for scale in (0.0, 1.0, 2.5):
        ours = Guided(model, ClassifierFree(scale, null={"label": 0}))
        theirs = Extrapolated(model, scale, null={"label": 0})
        for lam in (-3.0, LAM, 5.0, *([-math.inf] if process is not VE else [])):
            a, b = (d.bind(label=label)(x, lam) for d in (ours, theirs))
            within(1e-12, (a.mean - b.mean).abs().max(), f"{process}, scale {scale}, lam {lam}")
            assert torch.equal(a.var, b.var)


def test_classifier_free_takes_one_batched_pass() -> None:
    counted = Counted(Labelled())
    bound = counted.bind(label=torch.tensor([1, 2, 3]))
    ClassifierFree(2.0, null={"label": 0}).both(bound, states(3), LAM)
    assert (counted.calls, counted.rows) == (1, 6)
    ClassifierFree(1.0, null={"label": 0}).both(bound, states(3), LAM)
    assert (counted.calls, counted.rows) == (2, 9)
    with refuses("label", "bind"):
        ClassifierFree(2.0, null={"label": 0}).both(Labelled(), states(3), LAM)
    with refuses("null", "weak"):
        ClassifierFree(2.0)


@pytest.mark.parametrize("name", ["likelihood of x0", "dps", "posterior", "class of x0"])
def test_both_share_one_forward(name: str) -> None:
    counted = Counted(mixture())
    CASES[name].make().both(counted, states(3), LAM)
    assert counted.calls == 1


# ---- bad input


@pytest.mark.parametrize("scale", [torch.tensor(2.0), torch.tensor(2), np.float32(2.0), np.array(2.0), np.int64(2), 2])
def test_any_real_number_is_a_scale(scale: Any) -> None:
    for given in (scale, lambda lam: scale):
        guidance = Likelihood(lambda x, lam: -energy(x), given)
        assert guidance.weight(LAM) == 2.0
        once = CASES["likelihood"].make().gradient(mixture(), states(), LAM)
        assert torch.equal(guidance.gradient(mixture(), states(), LAM), 2 * once)
    assert type(Likelihood(lambda x, lam: -energy(x), scale).weight(LAM)) is float


@pytest.mark.parametrize("name", ["posterior", "classifier-free"])
def test_at_the_data_a_change_of_x0_is_no_gradient(name: str) -> None:
    x, data = states(), mixture()
    if name == "posterior":
        guidance: Guidance = CASES["posterior"].make()
    else:
        guidance = ClassifierFree(3.0, weak=gaussian())
    with refuses("`lam`=inf", "no gradient in x_t", "finite level"):
        guidance.gradient(data, x, math.inf)
    assert guidance.gradient(data, x, 20.0).isfinite().all()


@pytest.mark.parametrize("name", ["likelihood", "gradient", "class", "likelihood of x0"])
def test_before_infinite_noise_nothing_is_known(name: str) -> None:
    with refuses("`lam`=-inf", "VE", "finite level"):
        CASES[name].make().shift(mixture(VE), states(), -math.inf)


@pytest.mark.parametrize("scale", [torch.tensor(math.nan), torch.tensor(True), torch.tensor(1j), torch.ones(1)])
def test_a_tensor_as_a_scale_must_be_one_finite_number(scale: Tensor) -> None:
    with refuses("scale", "finite"):
        Likelihood(lambda x, lam: -energy(x), scale)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [math.nan, math.inf, "4", True, None, np.float32(np.inf), np.bool_(True), np.ones(2)])
def test_a_scale_must_be_a_finite_number(scale: Any) -> None:
    with refuses("scale", "finite"):
        Likelihood(lambda x, lam: -energy(x), scale)
    with refuses("scale", "finite"):
        Likelihood(lambda x, lam: -energy(x), lambda lam: scale).gradient(mixture(), states(), LAM)


BAD_GRADIENTS: dict[str, Callable[[Tensor], Any]] = {
    "None": lambda x: None,
    "torch.float16": lambda x: x.half(),
    "complex": lambda x: x + 1j,
    "(3,)": lambda x: x.flatten(1).sum(1),
    "float32": lambda x: x.float(),
}


@pytest.mark.parametrize("got", BAD_GRADIENTS)
def test_what_a_gradient_function_may_not_return(got: str) -> None:
    with refuses("fn", "like the state", "got", {"None": "NoneType"}.get(got, got)):
        Gradient(lambda x, lam: BAD_GRADIENTS[got](x)).gradient(mixture(), states(), LAM)


BAD_VALUES: dict[str, Callable[[Tensor], Any]] = {
    "NoneType": lambda x: None,
    "()": lambda x: energy(x).sum(),
    "(3, 1)": lambda x: energy(x)[:, None],
    "complex": lambda x: energy(x) + 1j,
    "float16": lambda x: energy(x).half(),
    "depend": lambda x: energy(x.detach()),
    "depend on x through autograd": lambda x: torch.zeros(len(x), dtype=x.dtype, requires_grad=True),
}


@pytest.mark.parametrize("what", BAD_VALUES)
def test_what_a_log_likelihood_may_not_return(what: str) -> None:
    with refuses("log-likelihood of Likelihood", what):
        Likelihood(lambda x, lam: BAD_VALUES[what](x)).gradient(mixture(), states(), LAM)


def sometimes_nan(x: Tensor, lam: Any) -> Tensor:
    g = -x
    return torch.where((x[:, :1, :1, :1] > 0), g, g * math.nan)


def test_nan_names_the_level_and_the_scale() -> None:
    x = states(6)
    bad = int((x[:, 0, 0, 0] <= 0).sum())
    assert 0 < bad < 6
    with refuses("Gradient", f"{bad} of 6", "lam = 0.7", "scale 12.5", "lower the scale"):
        Gradient(sometimes_nan, 12.5).gradient(mixture(), x, LAM)
    with pytest.warns(UserWarning, match=r"lam = 0\.7 with scale 12\.5"):
        warned = Gradient(sometimes_nan, 12.5, nonfinite="warn").gradient(mixture(), x, LAM)
    quiet = Gradient(sometimes_nan, 12.5, nonfinite="zero").gradient(mixture(), x, LAM)
    assert torch.equal(quiet, warned)
    assert torch.equal(quiet, torch.where(x[:, :1, :1, :1] > 0, -12.5 * x, 0.0))
    with refuses("nonfinite"):
        Gradient(sometimes_nan, nonfinite="ignore")


def test_a_value_that_is_nan_counts_though_its_gradient_is_finite() -> None:
    hidden = Likelihood(lambda x, lam: torch.where(x[:, 0, 0, 0] > 0, -energy(x), math.nan))
    bad = int((states(6)[:, 0, 0, 0] <= 0).sum())
    with refuses("Likelihood is not finite", f"{bad} of 6"):
        hidden.gradient(mixture(), states(6), LAM)


def test_a_guided_run_that_blows_up_names_its_step() -> None:
    guided = Guided(mixture(), Likelihood(lambda x, lam: x.flatten(1).pow(4).sum(1).exp(), scale=30.0))
    with refuses("Likelihood is not finite", "lam = ", "scale 30"):
        generate(guided, 4, grid=karras(5, 0.05, 20.0), transition=sampler("plms", karras(5))[0])


def test_half_precision_is_refused() -> None:
    with refuses("float16", ".float()"):
        Classified(nn.Linear(3, 2).half(), 0)


@pytest.mark.parametrize("label", [1.5, True, torch.zeros(2, 2, dtype=torch.long)])
def test_labels_are_class_numbers(label: Any) -> None:
    with refuses("label"):
        Classified(logits, label)


def test_labels_must_fit() -> None:
    for label, piece in ((9, "0..4"), (-1, "0..4"), (torch.tensor([0, 1]), "2 rows for 3 samples")):
        with refuses("label", piece):
            Classified(logits, label).gradient(mixture(), states(), LAM)
    each = Classified(logits, torch.tensor([0, 3, 4])).gradient(mixture(), states(), LAM)
    alone = torch.cat([Classified(logits, c).gradient(mixture(), states()[i : i + 1], LAM) for i, c in enumerate((0, 3, 4))])
    within(1e-12, (each - alone).abs().max(), "a class for each")
    with refuses("logits"):
        Classified(lambda x, lam: x, 0).gradient(mixture(), states(), LAM)


def test_targets_must_fit() -> None:
    for target in (weights(7), weights(2, 6)):
        with refuses("target"):
            Similarity(encode, target).gradient(mixture(), states(), LAM)
    for target in (torch.zeros(2, 2, 2), torch.tensor([math.nan]), torch.ones(6, dtype=torch.long)):
        with refuses("target"):
            Similarity(encode, target)
    with refuses("distance"):
        Similarity(encode, weights(6), distance="cosine")
    with refuses("on"):
        Energy(energy, on="x")


def test_opposite_and_equal_directions_have_finite_gradients() -> None:
    for sign in (1.0, -1.0):
        target = sign * encode(states(1))[0]
        g = Similarity(encode, target, distance="spherical").gradient(mixture(), states(1), 0.0)
        assert g.isfinite().all()


def test_another_process_is_the_same_image() -> None:
    """A classifier of VP states gives the same answer on the VE state that is the same image."""

    class Net(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return logits(x, 0.0) + t[:, None]

    from quieten.guiding.classify import NoisyClassifier

    classifier, x = NoisyClassifier(Net()), states(3)
    a, b = (Classified(classifier, 1).gradient(GaussianData(torch.zeros(SHAPE), 1.0, p), y, LAM)
            for p, y in ((VP, x), (VE, x / VP.scales(LAM)[0])))  # fmt: skip
    within(1e-12, (b - a * VP.scales(LAM)[0]).abs().max(), "gradients in their own units")
    within(1e-12, (classifier(x, 30.0) - classifier(x, 9.0)).abs().max(), "beyond the range it learned")


def test_vectors() -> None:
    data = gaussian_data("vector")
    x = torch.randn(3, 5, dtype=torch.float64)
    g = Likelihood(lambda x, lam: -x.square().sum(1)).gradient(data, x, 0.0)
    within(1e-14, (g + 2 * x).abs().max(), "vectors")
