"""Samplers by name: one list for recipes, the command line and reports."""

from __future__ import annotations

import functools
import inspect
import math

import pytest
import torch
from torch import Tensor

from helpers import refuses
from quieten import VP, Ancestral, Counted, GaussianData, Noise, Transition, karras
from quieten.sampling import generate, sample
from quieten.solvers.samplers import SAMPLERS, clipped, sampler
from quieten.training.config import build_sampler, parse_recipe, with_overrides
from quieten.training.parts import PARTS, register
from toy import BASE

MEAN, VAR = torch.tensor([1.0, -0.5]).repeat(32), torch.tensor([0.4, 0.1]).repeat(32)
DATA = GaussianData(MEAN, VAR, VP)  # of 64 dimensions, for Langevin steps take the norm of the noise for its mean
RANDOM = {"ddpm", "ancestral", "ocm", "ocm-ddim", "lanczos", "dpm++sde", "churn", "pc", "em"}
NFE = {"heun": 2, "midpoint": 2, "rk4": 4, "churn": 2, "dpm++2s": 2}  # per step but the last; the others ask once
START = {"plms-heun": 1, "pndm": 9}  # more in the first steps


def drawn(name: str, n: int = 300, steps: int = 200, **options: object) -> Tensor:
    transition, grid = sampler(name, karras(steps), **options)
    return generate(DATA, n, grid=grid, transition=transition, batch=n, last="draw", dtype=torch.float64)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_the_data(name: str) -> None:
    """Means and variances over samples and the 32 alike dimensions, within four standard errors and 8 % of the steps'."""
    x = drawn(name)
    for k, (mean, var) in enumerate([(1.0, 0.4), (-0.5, 0.1)]):
        same = x[:, k::2]
        assert abs(float(same.mean()) - mean) < 4 * math.sqrt(var / same.numel()) + 0.01
        assert abs(float((same - mean).square().mean()) / var - 1) < 4 * math.sqrt(2 / same.numel()) + 0.08


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_random_and_what_it_costs(name: str) -> None:
    steps = 6
    transition, grid = sampler(name, karras(steps))
    start = torch.randn(3, 64, dtype=torch.float64)

    def end(seed: int) -> tuple[Tensor, int]:
        model = Counted(DATA)
        return sample(model, start, grid, transition, noise=Noise(seed, range(3))), model.calls

    (first, calls), (second, _) = end(0), end(1)
    assert torch.equal(first, second) == (name not in RANDOM)
    expected = 2 * steps if name == "pc" else NFE.get(name, 1) * (steps - 1) + 1 + START.get(name, 0)
    if name == "rk45":
        assert 30 < calls < 100, "whatever the number of steps"
    else:
        assert calls == expected
    assert "\n" not in SAMPLERS[name].about


@pytest.mark.parametrize(
    "first, second",
    [
        (("ddim", {"eta": 1.0}), ("ddpm", {})),
        (("ddpm", {"spread": True}), ("ancestral", {})),
        (("dpm++sde", {"eta": 0.0}), ("dpm++", {})),
        (("dpm++", {"order": 3}), ("dpm++3m", {})),
        (("midpoint", {"alpha": 1.0}), ("heun", {})),
        (("ab", {"order": 1}), ("ddim", {})),
    ],
)
def test_options_reach_the_transition(first: tuple[str, dict], second: tuple[str, dict]) -> None:
    (a, options), (b, others) = first, second
    torch.testing.assert_close(drawn(a, 8, **options), drawn(b, 8, **others), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(drawn(a, 8, **options), drawn(a, 8)), "the option changes nothing"


def test_one_list_serves_recipes_and_the_command_line() -> None:
    assert set(PARTS["transition"]) >= set(SAMPLERS)
    recipe = parse_recipe(BASE, "toy")
    for name, entry in SAMPLERS.items():
        chosen = with_overrides(recipe, [f"sample.transition={name}"]).sample.transition
        assert chosen.kind == name
        options = {k: p.default for k, p in inspect.signature(entry.make).parameters.items()}
        assert chosen.options == {k: v for k, v in options.items() if k in chosen.options}
        transition, grid = sampler(name, karras(4), **chosen.options)  # what a recipe writes out can be read back
        assert isinstance(transition, Transition)
        assert len(grid) >= (3 if name == "rk45" else 5)


@pytest.mark.parametrize("override", ["sample.transition={kind: ddim, eta: 0.3}", "sample.transition.eta=0.3"])
def test_a_recipe_passes_options_on(override: str) -> None:
    recipe = with_overrides(parse_recipe(BASE, "toy"), ["sample.transition=ddim", override])
    transition, _ = build_sampler(recipe, 4)
    assert isinstance(transition, Ancestral)
    assert (transition.eta, transition.spread) == (0.3, False)
    again = parse_recipe(recipe.model_dump(mode="json"), "copy")
    assert again.sample.transition.options["eta"] == 0.3


@pytest.mark.parametrize(
    "name, options, pieces",
    [
        ("ddmi", {}, ["transition 'ddmi'", "did you mean 'ddpm'?", "known: ddim, "]),
        ("ddim", {"eat": 1.0}, ["`eat`", "'ddim'", "did you mean 'eta'?"]),
        ("heun", {"eta": 1.0}, ["`eta`", "'heun'"]),
        ("ddim", {"eta": 2.0}, ["`eta`", "2.0", "[0, 1]"]),
        ("ab", {"order": 9}, ["`order`", "9", "1, 2, 3 or 4"]),
        ("dpm++", {"order": "two"}, ["`order`", "'two'", "integer"]),
    ],
)
def test_mistakes_are_named(name: str, options: dict[str, object], pieces: list[str]) -> None:
    with refuses(*pieces):
        sampler(name, karras(4), **options)


def test_a_transition_registered_elsewhere_is_a_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quieten.training.parts.PARTS", {part: dict(kinds) for part, kinds in PARTS.items()})
    register("transition", "half", functools.partial(Ancestral, 0.5, spread=False))
    transition, grid = sampler("half", karras(3))
    assert isinstance(transition, Ancestral)
    assert (transition.eta, transition.spread) == (0.5, False)
    assert torch.equal(grid, karras(3))
    assert with_overrides(parse_recipe(BASE, "toy"), ["sample.transition=half"]).sample.transition.kind == "half"


@pytest.mark.parametrize("name", ["ddim", "ocm-ddim"])
def test_the_noise_may_be_kept_where_the_estimate_is_clipped(name):
    """OCM's and diffusers' DDIM: mean = alpha_s clip(m) + (sigma_s / sigma_t) (x - alpha_t m)."""
    data = GaussianData(torch.tensor([3.0, -2.0], dtype=torch.float64), torch.tensor([0.5, 0.1], dtype=torch.float64), VP)
    x = torch.tensor([[1.0, -1.0], [0.2, 0.4]], dtype=torch.float64)
    grid = torch.tensor([-2.0, 0.0, math.inf], dtype=torch.float64)
    kept, _ = sampler(name, grid, keep_eps=True)
    again, _ = sampler(name, grid)
    m = data(x, -2.0).mean
    (alpha_t, sigma_t), (alpha_s, sigma_s) = VP.scales(-2.0), VP.scales(0.0)
    wanted = alpha_s * m.clamp(-1, 1) + sigma_s / sigma_t * (x - alpha_t * m)
    found = kept(clipped(data, kept, 1.0), x, -2.0, 0.0).p.mean
    other = again(clipped(data, again, 1.0), x, -2.0, 0.0).p.mean
    assert (found - wanted).abs().max() < 1e-12
    assert (other - wanted).abs().max() > 0.1
    assert clipped(data, kept, None) is data
