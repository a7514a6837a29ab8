"""Stable targets: the laws of posterior averages, and their digits."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from conftest import golden
from helpers import f64, refuses, within
from quieten.denoiser import form_coefficients
from quieten.oracle import FiniteData
from quieten.process import PROCESSES, VE
from quieten.target import TargetStats, stable_target

pytestmark = pytest.mark.usefixtures("one_thread")


def exact(x: Tensor, refs: Tensor, alpha, sigma, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Target and weights by the definition, row by row in float64."""
    targets, weights = [], []
    for i in range(len(x)):
        a, s = (float(v) if isinstance(v, float) else float(v[i]) for v in (alpha, sigma))
        logits = -(x[i].double() - a * refs.double()).reshape(len(refs), -1).square().sum(1) / (2 * s * s)
        if mask is not None:
            logits = logits.masked_fill(~mask[i], -math.inf)
        weights.append(logits.softmax(0))
        targets.append(torch.tensordot(weights[-1], refs.double(), 1))
    return torch.stack(targets), torch.stack(weights)


def some(n: int, shape: tuple[int, ...], b: int = 5, sigma: float = 0.7, alpha: float = 1.0, seed: int = 0):
    """(x, refs, source): rows noised from the first references."""
    generator = torch.Generator().manual_seed(seed)
    refs = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    source = torch.arange(b) % n
    return alpha * refs[source] + sigma * torch.randn(b, *shape, generator=generator, dtype=torch.float64), refs, source


# ---- official code


@pytest.mark.parametrize("case", ["gauss", "rgb", "dup", "far", "n1"])
def test_the_official_targets(case: str) -> None:
    arrays = {name: torch.from_numpy(value) for name, value in golden("stf_targets").items()}
    x, refs, sigma = (arrays[f"{case}_{name}"] for name in ("x", "ref", "sigma"))
    for source in [None, torch.arange(len(x))] if case in ("gauss", "rgb") else [None]:
        ours = stable_target(x, refs, 1.0, sigma, source=source)
        within(1e-12, (ours.flatten(1) - arrays[f"{case}_target_f64"]).abs().max(), f"{case} in float64")
        ours = stable_target(x.float(), refs.float(), 1.0, sigma, source=source)
        assert ours.dtype == torch.float32
        within(5e-6, (ours.flatten(1).double() - arrays[f"{case}_target_f32"]).abs().max(), f"{case} in float32")
    _, stats = stable_target(x, refs, 1.0, sigma, stats=True)
    w = arrays[f"{case}_logw"].exp()
    within(1e-9, (stats.ess * w.square().sum(1) - 1).abs().max(), "effective number of references, relative")
    within(1e-12, (stats.largest - w.amax(1)).abs().max(), "largest weight")


# ---- unbiased, by enumeration


ATOMS = f64(-1.3, 0.2, 0.4, -0.1, 1.0, 0.9, -0.6, 1.4).reshape(4, 2)


def moments(n: int, replace: bool, x: Tensor, sigma: float, exclude: bool = False) -> tuple[Tensor, Tensor]:
    """(E[T | x], E Tr Cov(T | x)) over all sets of n atoms and the sources in them."""
    sets = itertools.product(range(4), repeat=n) if replace else itertools.permutations(range(4), n)
    truth, _ = exact(x, ATOMS, 1.0, sigma)
    total, mean, spread = torch.zeros(len(x)).double(), torch.zeros_like(x), torch.zeros(len(x)).double()
    for members in sets:  # the first member is the source; each tuple is as likely
        likely = (-(x - ATOMS[members[0]]).square().sum(1) / (2 * sigma**2)).exp()
        refs = ATOMS[list(members[1:] if exclude else members)]
        target = stable_target(x, refs, 1.0, sigma)
        total, mean = total + likely, mean + likely[:, None] * target
        spread = spread + likely * (target - truth).square().sum(1)
    return mean / total[:, None], spread / total


@pytest.mark.parametrize("replace", [True, False], ids=["iid", "without replacement"])
@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0])
def test_the_target_is_unbiased_and_its_variance_falls_with_n(sigma: float, replace: bool) -> None:
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    truth = FiniteData(ATOMS, VE)(x, -2 * math.log(sigma)).mean
    variances = []
    for n in range(1, 5):
        mean, variance = moments(n, replace, x, sigma)
        within(1e-12, (mean - truth).abs().max(), f"bias with n={n}")
        variances.append(variance)
    for more, fewer in itertools.pairwise(variances):
        assert (fewer <= more + 1e-14).all()
    if not replace:
        within(1e-24, variances[-1].max(), "variance with all atoms")
    biased, _ = moments(3, replace, x, sigma, exclude=True)
    assert (biased - truth).abs().max() > 0.02, "without the source the target is biased"


def test_two_points() -> None:
    c, x = f64(0.7), torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
    pair = torch.stack([c, -c])
    for alpha, sigma in ((1.0, 0.5), (0.8, 0.6), (0.1, 0.99)):
        d = c * torch.tanh(alpha * c * x / sigma**2)
        within(1e-14, (stable_target(x, pair, alpha, sigma) - d).abs().max(), "c tanh(alpha c x / sigma^2)")
        # two iid references, the source among them: half of the variance of one, at every sigma
        post = 0.5 * (1 + d / c)  # that the source is +c
        both = stable_target(x, pair, alpha, sigma)  # when the other one differs; else the source itself
        v_1 = post * (c - d) ** 2 + (1 - post) * (c + d) ** 2
        v_2 = 0.5 * v_1 + 0.5 * (both - d) ** 2
        within(1e-15, (v_2 - v_1 / 2).abs().max(), "V_2 - V_1 / 2")
        # with the source excluded, two iid references give half of it: biased
        sets = [torch.stack(members) for members in itertools.product([c, -c], repeat=2)]
        excluded = torch.stack([stable_target(x, refs, alpha, sigma) for refs in sets]).mean(0)
        within(1e-15, (excluded - d / 2).abs().max(), "mean without the source, less D / 2")


def test_high_noise_gives_the_variance_of_a_mean() -> None:
    """n of N references, drawn without replacement: S^2 (1/n - 1/N) as sigma grows."""
    total = (ATOMS - ATOMS.mean(0)).square().sum() / 3
    for n in (1, 2, 3):
        _, spread = moments(n, False, torch.zeros(1, 2).double(), 1e5)
        within(1e-8, abs(spread - total * (1 / n - 1 / 4)), f"V_{n} without replacement")
        _, spread = moments(n, True, torch.zeros(1, 2).double(), 1e5)
        within(1e-8, abs(spread - total * 0.75 / n), f"V_{n} iid")


def test_the_second_moment_of_density_ratios() -> None:
    """Spec 7.5: the law behind how many references are enough, (1 + alpha^2 s0^2 / sigma^2)^D."""
    n, alpha, sigma, s0, d = 1 << 20, 0.8, 1.1, 0.6, 2
    generator = torch.Generator().manual_seed(0)
    x0, other = (s0 * torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    x = alpha * other + sigma * torch.randn(n, d, generator=generator, dtype=torch.float64)
    total = alpha**2 * s0**2 + sigma**2
    log_ratio = 0.5 * (x.square() / total - (x - alpha * x0).square() / sigma**2).sum(1) + 0.5 * d * math.log(total / sigma**2)
    expected = (1 + alpha**2 * s0**2 / sigma**2) ** d
    within(0.01, abs((2 * log_ratio).exp().mean() / expected - 1), "E[(q / p_t)^2], relative")


# ---- invariances


@pytest.mark.parametrize("shape", [(), (1,), (3, 2, 2)], ids=["scalar", "vector", "image"])
@pytest.mark.parametrize("process", list(PROCESSES.values()), ids=list(PROCESSES))
def test_the_definition_in_every_process_and_form(process, shape: tuple[int, ...]) -> None:
    lam = f64(-3.0, -1.0, 0.0, 2.0, 5.0)
    alpha, sigma = process.scales(lam)
    _, refs, source = some(40, shape)
    over = [-1, *[1] * len(shape)]
    x = alpha.reshape(over) * refs[source] + sigma.reshape(over) * torch.randn(5, *shape, dtype=torch.float64)
    want, w = exact(x, refs, alpha, sigma)
    for given in (None, source):
        within(1e-12, (stable_target(x, refs, alpha, sigma, source=given) - want).abs().max(), "T")
        for form in ("eps", "v", "score", "flow", "edm"):
            a, s = alpha.reshape(over), sigma.reshape(over)
            p, q = form_coefficients(form, a, s)
            got = stable_target(x, refs, alpha, sigma, source=given, out=form)
            error = (got - (p * (x - a * want) / s + q * want)).abs() / (1 + 1 / s)
            within(1e-11, error.max(), f"{form} from T")
    one = stable_target(x[:1], refs, float(alpha[0]), float(sigma[0]))
    within(1e-12, (one - want[:1]).abs().max(), "one row, float levels")
    assert stable_target(x[:0], refs, 1.0, 1.0).shape == (0, *shape)
    assert torch.equal(stable_target(x, refs[:1], 1.0, 1.0), refs[:1].expand_as(x))
    _, stats = stable_target(x, refs, alpha, sigma, stats=True, moments=True)
    flat = refs.flatten(1) if shape else refs[:, None]
    spread = torch.stack([(wi[:, None] * (flat - wi @ flat).square()).sum() for wi in w])
    within(1e-12, (stats.variance - spread).abs().max(), "variance within the set")
    assert stats.square is not None
    within(1e-12, (stats.square - torch.tensordot(w, refs.square(), 1)).abs().max(), "second moment")


def test_laws_of_the_average() -> None:
    x, refs, _ = some(60, (2, 3))
    g = torch.Generator().manual_seed(3)
    t = stable_target(x, refs, 0.9, 0.7)
    within(1e-12, (stable_target(x, refs[torch.randperm(60, generator=g)], 0.9, 0.7) - t).abs().max(), "order")
    q, _ = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64))
    turned = [(v.flatten(1) @ q).view(v.shape) for v in (x, refs, t)]
    within(1e-12, (stable_target(turned[0], turned[1], 0.9, 0.7) - turned[2]).abs().max(), "a rotation")
    b = torch.randn(2, 3, generator=g, dtype=torch.float64) * 10
    within(1e-12, (stable_target(x + 0.9 * b, refs + b, 0.9, 0.7) - t - b).abs().max(), "a translation")
    within(1e-12, (stable_target(x * 3, refs * 3, 0.9, 2.1) - 3 * t).abs().max(), "another unit")
    within(1e-12, (stable_target(x / 0.9, refs, 1.0, 0.7 / 0.9) - t).abs().max(), "alpha = 1 after all")
    within(1e-12, (stable_target(x, torch.cat([refs] * 3), 0.9, 0.7) - t).abs().max(), "each reference three times")
    assert ((t <= refs.amax(0)) & (t >= refs.amin(0))).all()
    mask = torch.rand(5, 60, generator=g) < 0.5
    mask[:, 0] = True
    subset = torch.stack([stable_target(x[i : i + 1], refs[mask[i]], 0.9, 0.7)[0] for i in range(5)])
    within(1e-12, (stable_target(x, refs, 0.9, 0.7, mask=mask) - subset).abs().max(), "a mask is a subset")
    within(1e-7, (stable_target(x, refs, 0.9, 1e8) - refs.mean(0)).abs().max(), "no signal: the mean")
    within(1e-12, (stable_target(x, refs, 0.0, 1.0) - refs.mean(0)).abs().max(), "alpha = 0: the mean")


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_chunks_change_nothing(dtype: torch.dtype, bound: float) -> None:
    x, refs, source = some(300, (4, 5), sigma=2.0)
    x, refs = x.to(dtype), refs.to(dtype)
    whole = stable_target(x, refs, 1.0, 2.0, source=source)
    for chunk in (1, 7, 299):
        within(bound, (stable_target(x, refs, 1.0, 2.0, source=source, chunk=chunk) - whole).abs().max(), f"chunks of {chunk}")


def test_rows_are_taken_in_blocks_when_references_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    x, refs, source = some(5000, (2,), b=9)
    want, stats = stable_target(x, refs, 1.0, 0.7, source=source, stats=True)
    monkeypatch.setattr("quieten.targets.posterior._WEIGHTS", 4 * len(refs))
    got, again = stable_target(x, refs, 1.0, 0.7, source=source, stats=True)
    within(1e-13, (got - want).abs().max(), "blocks of 4 rows")
    within(1e-11, (stats.ess - again.ess).abs().max(), "their effective numbers")


def test_the_heavy_tailed_kernel_of_pfgm() -> None:
    x, refs, source = some(50, (4,), sigma=0.8)
    sigma, extra = f64(0.1, 0.5, 0.8, 2.0, 20.0), 12.0
    logits = -0.5 * (4 + extra) * torch.log((x[:, None] - refs[None]).square().sum(2) + (sigma**2 * extra)[:, None])
    want = logits.softmax(1) @ refs
    for given in (None, source):
        got = stable_target(x, refs, 1.0, sigma.clamp(min=0.5) if given is not None else sigma, source=given, tail=extra)
        if given is None:
            within(1e-12, (got - want).abs().max(), "weights of the definition")
    gaussian = stable_target(x, refs, 1.0, 0.8)
    within(1e-6, (stable_target(x, refs, 1.0, 0.8, tail=1e9) - gaussian).abs().max(), "many extra dimensions: the Gaussian")


# ---- digits


LEVELS = (0.002, 0.02, 0.2, 1.0, 5.0, 20.0, 80.0)


def near_duplicates(count: int, d: int = 784, n: int = 512) -> Tensor:
    """References in [-1, 1], `count` of which differ from the first by as much as the smallest noise tells apart."""
    generator = torch.Generator().manual_seed(count)
    refs = torch.rand(n, d, generator=generator) * 2 - 1
    refs[64 : 64 + count] = refs[0] + 0.004 / d**0.5 * torch.randn(count, d, generator=generator)
    return refs


@pytest.mark.parametrize("count", [0, 1, 15])
def test_float32_keeps_its_digits_with_few_near_duplicates(count: int) -> None:
    refs, worst, eps_worst = near_duplicates(count), 0.0, 0.0
    for sigma in LEVELS:
        x = refs[:8] + sigma * torch.randn(8, 784)
        want, _ = exact(x, refs, 1.0, sigma)
        for source in (None, torch.arange(8)):
            got = stable_target(x, refs, 1.0, sigma, source=source, precise=False)
            worst = max(worst, float((got.double() - want).abs().max()))
        eps = stable_target(x, refs, 1.0, sigma, source=torch.arange(8), out="eps")
        eps_worst = max(eps_worst, float((eps.double() - (x.double() - want) / sigma).abs().max()))
    within(5e-6, worst, f"error in float32 with {count} near-duplicates")
    within(1e-5, eps_worst, "error of the target of eps")


@pytest.mark.parametrize("count", [16, 40, 300])
def test_float64_takes_over_with_many_near_duplicates(count: int) -> None:
    refs, worst, ess_worst, double, hasty = near_duplicates(count), 0.0, 0.0, 0.0, 0.0
    for sigma in LEVELS:
        x = refs[:8] + sigma * torch.randn(8, 784)
        want, w = exact(x, refs, 1.0, sigma)
        got, stats = stable_target(x, refs, 1.0, sigma, stats=True)
        worst = max(worst, float((got.double() - want).abs().max()))
        if sigma <= 0.02:  # where float32 products know nothing of the weights
            ess_worst = max(ess_worst, float((stats.ess * w.square().sum(1) - 1).abs().max()))
            _, careless = stable_target(x, refs, 1.0, sigma, stats=True, precise=False)
            hasty = max(hasty, float((careless.ess * w.square().sum(1) - 1).abs().max()))
        got = stable_target(x.double(), refs.double(), 1.0, sigma)
        double = max(double, float((got - want).abs().max()))
    within(5e-6, worst, f"error with {count} near-duplicates")
    within(1e-6, ess_worst, "weights, chosen precision")
    within(1e-11, double, "error with float64 logits")
    assert hasty > 1e-3, "float32 alone would have been good enough"


def test_matrix_products_keep_full_precision() -> None:
    x, refs, _ = some(64, (32,), sigma=5.0)
    x, refs = x.float(), refs.float()
    want = stable_target(x, refs, 1.0, 5.0)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            got = stable_target(x, refs, 1.0, 5.0)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(got, want)


def test_no_gradient_flows_through_the_target() -> None:
    x, refs, _ = some(6, (3,))
    assert not stable_target(x.requires_grad_(), refs, 1.0, 0.5).requires_grad


# ---- bad input


def test_bad_input_is_refused() -> None:
    x, refs, source = some(6, (3,), sigma=0.1)
    good = torch.ones(5, 6, dtype=torch.bool)
    for sigma in (0.0, -1.0, math.inf, math.nan, f64(1, 1, 0, 1, 1)):
        with refuses("`sigma`", "positive and finite"):
            stable_target(x, refs, 1.0, sigma)
    with refuses("`alpha`", "finite"):
        stable_target(x, refs, math.nan, 1.0)
    with refuses("`refs` is empty"):
        stable_target(x, refs[:0], 1.0, 1.0)
    with refuses("`refs`", "(n, 3)"):
        stable_target(x, refs[:, :2], 1.0, 1.0)
    with refuses("`refs`", "uint8", "127.5"):
        stable_target(x, refs.to(torch.uint8), 1.0, 1.0)
    with refuses("`refs` is on meta"):
        stable_target(x, refs.to("meta"), 1.0, 1.0)
    with refuses("`x` must be float32 or float64"):
        stable_target(x.half(), refs, 1.0, 1.0)
    with refuses("`mask` leaves a row without any reference"):
        stable_target(x, refs, 1.0, 1.0, mask=good & (torch.arange(5) != 2)[:, None])
    with refuses("`mask` must be bool of shape (5, 6)"):
        stable_target(x, refs, 1.0, 1.0, mask=good.float())
    with refuses("`source` names a reference from which x cannot come"):
        stable_target(x, refs, 1.0, 0.1, source=source.roll(1))
    with refuses("`source` must hold one integer"):
        stable_target(x, refs, 1.0, 0.1, source=source[:2])
    with refuses("`alpha` must be a float or have shape () or (5,)"):
        stable_target(x, refs, f64(1, 1), 1.0)
    with refuses("`form` must be one of"):
        stable_target(x, refs, 1.0, 1.0, out="velocity")
    with refuses("`tail` must be above 0"):
        stable_target(x, refs, 1.0, 1.0, tail=0.0)
    with pytest.warns(UserWarning, match="one reference"):
        stable_target(x, refs, 1.0, 1.0, mask=torch.eye(5, 6, dtype=torch.bool))


def test_statistics_are_a_named_tuple() -> None:
    x, refs, _ = some(6, (3,))
    _, stats = stable_target(x, refs, 1.0, 0.5, stats=True)
    assert isinstance(stats, TargetStats)
    assert stats.square is None
    assert all(value.shape == (5,) for value in stats[:3])


def test_a_source_is_where_x_comes_from_whatever_the_tail():
    """PFGM++'s noise: R = r sqrt(chi^2_D / chi^2_D'), r = sigma sqrt(D'), in any direction."""
    D, tail, n = 4, 0.5, 200
    generator = torch.Generator().manual_seed(0)
    refs = torch.randn(n, D, generator=generator, dtype=torch.float64)
    direction = torch.randn(n, D, generator=generator, dtype=torch.float64)
    gamma = torch._standard_gamma(torch.full((n,), tail / 2, dtype=torch.float64), generator=generator)
    x = refs + 0.7 * math.sqrt(tail) * direction / (2 * gamma).sqrt()[:, None]
    source = torch.arange(n)
    a, b = (stable_target(x, refs, 1.0, 0.7, tail=tail, source=s) for s in (source, None))
    within(1e-9, ((a - b) / (1 + b.abs())).abs().max(), "with and without the source")
    with pytest.raises(ValueError, match="`source` names a reference"):
        stable_target(x, refs, 1.0, 0.7, source=source)


@pytest.mark.parametrize("wrong", [3, -1])
def test_a_source_must_be_a_place_among_the_references(wrong):
    refs = torch.zeros(3, 2)
    with refuses("`source`", "0 to 2"):
        stable_target(torch.zeros(2, 2), refs, 1.0, 0.5, source=torch.tensor([0, wrong]))
