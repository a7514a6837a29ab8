"""Time per sampling step beyond the network, and results, beside public libraries on the same network, noise and levels.

    pip install --no-deps --target build/peers -r benchmarks/peers.txt
    python benchmarks/peers.py [--check] [--quick] [--peers build/peers] [--json FILE] [--rounds 15] [--threads 1]

Times are of a network that returns a tensor made before; results are of one that answers by state and time, in float32, as
the largest difference over the largest value: of ours from theirs, and of each from our solution in float64, beside which
stands how far that moves where the noise it starts from moves by its last bit. No sampler in float32 can be nearer to it than
about that. Each library is called as its users call it, progress bars switched off.

Nothing of the libraries is replaced. Some cannot be imported whole, because they want torchvision for things that are not used
here: of denoising-diffusion-pytorch and smalldiffusion single modules are loaded, of k-diffusion a single function. What is
missing is left out and named. With --check the exit status says whether no ratio exceeds 1 and no difference 1e-3.
"""

from __future__ import annotations

import os

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported, whoever does it

import argparse
import ast
import importlib.util
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import header, interleaved
from quieten import (
    VE,
    VP,
    Ancestral,
    Clipped,
    Denoiser,
    Exponential,
    Heun,
    Linear,
    Preconditioned,
    Table,
    Transition,
    UniPC,
    edm,
    karras,
    sample,
)

__all__ = ["main"]

BAR, DIFFERENCE = 1.0, 1e-3
STEPS, SEED = 50, 0
HEAP = 7_000_000
"""As in loop.py: a tensor of so many floats is allocated and freed first, as any real network does."""
SHAPES = ((64, 1, 28, 28), (4, 3, 256, 256))
SIGMAS = (0.002, 80.0)

Run = Callable[[], Tensor]
Pair = tuple[Run, Run]
"""Ours and theirs, from the same noise to the same end."""


@dataclass(frozen=True)
class Line:
    """A measured case.

    Attributes:
        library: Name on the index.
        version: Of the library.
        method: Of sampling.
        state: Its shape.
        ours: Milliseconds a step, the least of interleaved rounds.
        theirs: Likewise.
        ratio: Of ours to theirs.
        difference: Largest difference of the results over their largest value.
        our_error: The same of ours, in float32, from the solution in float64.
        their_error: Likewise.
        last_bit: How far that solution moves with the last bit of the initial noise.
    """

    library: str
    version: str
    method: str
    state: str
    ours: float
    theirs: float
    ratio: float
    difference: float
    our_error: float
    their_error: float
    last_bit: float


class Frozen(nn.Module):
    """A network of no cost."""

    def __init__(self, like: Tensor):
        super().__init__()
        self.out = torch.tanh(like)

    def forward(self, x: Tensor, t: Tensor, *_: Any) -> Tensor:
        return self.out


class Waves(nn.Module):
    """A network that answers by its state and its time."""

    def forward(self, x: Tensor, t: Tensor, *_: Any) -> Tensor:
        t = t.to(x).reshape(-1, *[1] * (x.ndim - 1))
        return torch.tanh(0.7 * x + 0.2 * torch.cos(0.1 * t)) * 0.6 + 0.2 * torch.sin(2 * x)


def sigma_of(lam: Tensor) -> Tensor:
    """sigma / alpha, the time of networks in VE."""
    return torch.exp(-0.5 * lam)


def drawing(denoiser: Denoiser, x: Tensor, grid: Tensor, transition: Transition) -> Run:
    """Our loop; the initial state is made within it, as theirs is."""
    start = denoiser.eval().process.prior(float(grid[0]))
    return lambda: sample(denoiser, start.sample(x), grid, transition)


# ---- the libraries: (network, noise) -> ours and theirs, by method


def of_diffusers() -> dict[str, Callable[[nn.Module, Tensor], Pair]]:
    import diffusers

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    plan: dict[str, tuple[str, dict[str, Any], Transition]] = {
        "DDIM": ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}, Ancestral(0.0, spread=False)),
        "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {}, Exponential(2)),
        "UniPC": ("UniPCMultistepScheduler", {"final_sigmas_type": "zero"}, UniPC()),
        "Heun": ("HeunDiscreteScheduler", {"beta_start": 1e-4, "beta_end": 0.02}, Heun()),
    }

    def pair(kind: str, options: Mapping[str, Any], transition: Transition, net: nn.Module, x: Tensor) -> Pair:
        table = Table.from_betas(betas)
        scheduler = getattr(diffusers, kind)(**{"beta_schedule": "linear", **options})

        @torch.no_grad()
        def theirs() -> Tensor:
            scheduler.set_timesteps(STEPS)
            state = x * scheduler.init_noise_sigma
            for t in scheduler.timesteps:
                out = net(scheduler.scale_model_input(state, t), t.expand(len(state)))
                state = scheduler.step(out, t, state).prev_sample
            return state

        scheduler.set_timesteps(STEPS)
        places = torch.unique(scheduler.timesteps.double()).flip(0)
        grid = torch.cat([table.at(places), torch.tensor([math.inf], dtype=torch.float64)])
        if kind == "HeunDiscreteScheduler":  # which interpolates sigma, not its logarithm
            sigmas = torch.unique(scheduler.sigmas.double()).flip(0)[:-1]
            grid = torch.cat([-2.0 * sigmas.log(), grid[-1:]])
        denoiser = Preconditioned(net, VP, "eps", table)
        return drawing(denoiser, x, grid, transition), theirs

    return {name: lambda net, x, p=parts: pair(*p, net, x) for name, parts in plan.items()}  # type: ignore[misc]


def of_k_diffusion(folder: Path) -> dict[str, Callable[[nn.Module, Tensor], Pair]]:
    from tqdm.auto import trange

    path = folder / "sampling.py"
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    names: dict[str, Any] = {"torch": torch, "trange": trange}
    for node in functions:
        if node.name in ("append_zero", "get_sigmas_karras", "sample_dpmpp_2m"):  # these need nothing else of the package
            exec(compile(ast.Module([node], []), str(path), "exec"), names)

    def dpmpp(net: nn.Module, x: Tensor) -> Pair:
        sigmas = names["get_sigmas_karras"](STEPS, *SIGMAS)
        denoiser = Preconditioned(net, VE, "x0", sigma_of)
        ours = drawing(denoiser, x, karras(STEPS, *SIGMAS), Exponential(2))
        return ours, lambda: names["sample_dpmpp_2m"](net, x * sigmas[0], sigmas, disable=True)

    return {"DPM-Solver++ 2M": dpmpp}


def of_azula(folder: Path) -> dict[str, Callable[[nn.Module, Tensor], Pair]]:
    import azula.denoise
    import azula.noise
    import azula.sample

    class Theirs(azula.denoise.Denoiser):  # type: ignore[misc]
        def __init__(self, net: nn.Module):
            super().__init__()
            self.net, self.schedule = net, azula.noise.VESchedule(*SIGMAS)

        def forward(self, x_t: Tensor, t: Tensor, **_: Any) -> Any:
            _, sigma = self.schedule(t)
            return azula.denoise.DiracPosterior(self.net(x_t, sigma.expand(len(x_t))))

    # to the cleanest finite level: their Heun divides by sigma there
    grid = Linear(*(-2.0 * math.log(sigma) for sigma in SIGMAS)).grid(STEPS + 1)[:-1]

    def pair(kind: str, transition: Transition, net: nn.Module, x: Tensor) -> Pair:
        sampler = getattr(azula.sample, kind)(Theirs(net).eval(), steps=STEPS, silent=True)
        return drawing(Preconditioned(net, VE, "x0", sigma_of), x, grid, transition), lambda: sampler(x * SIGMAS[1])

    plan = {"DDIM": ("DDIMSampler", Ancestral(0.0, spread=False)), "Heun": ("HeunSampler", Heun())}
    return {name: lambda net, x, p=parts: pair(*p, net, x) for name, parts in plan.items()}  # type: ignore[misc]


def of_smalldiffusion(folder: Path) -> dict[str, Callable[[nn.Module, Tensor], Pair]]:
    diffusion, model = loaded(folder / "diffusion.py"), loaded(folder / "model.py")

    class Theirs(nn.Module, model.ModelMixin):  # type: ignore[misc, name-defined]
        def __init__(self, net: nn.Module, shape: tuple[int, ...]):
            super().__init__()
            self.net, self.input_dims = net, shape

        def forward(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
            return self.net(x, sigma.expand(len(x)))

    def ddim(net: nn.Module, x: Tensor) -> Pair:
        grid = karras(STEPS, *SIGMAS)
        theirs, sigmas = Theirs(net, tuple(x.shape[1:])), torch.exp(-0.5 * grid).to(x)
        accelerator = diffusion.Accelerator(cpu=True)

        @torch.no_grad()
        def run() -> Tensor:
            *_, last = diffusion.samples(theirs, sigmas, gam=1.0, xt=x * sigmas[0], accelerator=accelerator)
            return last

        return drawing(Preconditioned(net, VE, "eps", sigma_of), x, grid, Ancestral(0.0, spread=False)), run

    return {"DDIM": ddim}


def of_denoising_diffusion_pytorch(folder: Path) -> dict[str, Callable[[nn.Module, Tensor], Pair]]:
    module = loaded(folder / "elucidated_diffusion.py")

    def pair(method: str, net: nn.Module, x: Tensor) -> Pair:
        net.random_or_learned_sinusoidal_cond, net.self_condition = True, False  # type: ignore[assignment]
        kinds: dict[str, Any] = {"image_size": x.shape[-1], "channels": x.shape[1], "num_sample_steps": STEPS, "S_churn": 0}
        theirs = module.ElucidatedDiffusion(net, **kinds)
        theirs.register_buffer("place", torch.zeros(()))  # it asks its network for a device, and this one has no weights
        type(theirs).device = property(lambda self: self.place.device)
        heun = method == "Heun"

        def run() -> Tensor:
            torch.manual_seed(SEED)  # it draws its own noise, each step once more: the first is `x`
            out = theirs.sample(len(x)) if heun else theirs.sample_using_dpmpp(len(x))
            return 2.0 * out - 1.0

        model: Denoiser = edm(net)
        model = Clipped(model) if heun else model
        inner = drawing(model, x, karras(STEPS, *SIGMAS), Heun() if heun else Exponential(2))
        return lambda: inner().clamp(-1.0, 1.0), run

    return {name: lambda net, x, m=name: pair(m, net, x) for name in ("Heun", "DPM-Solver++ 2M")}  # type: ignore[misc]


def loaded(path: Path) -> Any:
    """A module from its file alone, without the package around it."""
    spec = importlib.util.spec_from_file_location(f"peer_{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LIBRARIES: dict[str, tuple[str, Callable[..., Any]]] = {
    "diffusers": ("diffusers", lambda folder: of_diffusers()),
    "k-diffusion": ("k_diffusion", of_k_diffusion),
    "azula": ("azula", of_azula),
    "smalldiffusion": ("smalldiffusion", of_smalldiffusion),
    "denoising-diffusion-pytorch": ("denoising_diffusion_pytorch", of_denoising_diffusion_pytorch),
}
"""Name on the index -> package, and its cases from the package's folder."""


# ---- measuring


def cases() -> tuple[dict[tuple[str, str], Callable[[nn.Module, Tensor], Pair]], list[str]]:
    """Every case by library and method, and what is missing."""
    found: dict[tuple[str, str], Callable[[nn.Module, Tensor], Pair]] = {}
    missing = []
    for name, (package, make) in LIBRARIES.items():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            missing.append(f"{name}: not installed")
            continue
        try:
            found |= {(name, method): case for method, case in make(Path(spec.submodule_search_locations[0])).items()}
        except ImportError as error:
            missing.append(f"{name}: {error}")
    return found, missing


def measure(library: str, method: str, case: Callable[[nn.Module, Tensor], Pair], shape: tuple[int, ...], rounds: int) -> Line:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
    ours, theirs = case(Waves(), x)
    a, b = ours(), theirs()
    exact, moved = (case(Waves(), start)[0]() for start in (x.double(), torch.nextafter(x, 2 * x).double()))
    apart = [
        float((one - other).abs().max() / exact.abs().max()) for one, other in ((a, b), (a, exact), (b, exact), (moved, exact))
    ]
    torch.empty(HEAP)
    ours, theirs = case(Frozen(x), x)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    rounds *= 1 + 200_000 // x.numel()
    timings = interleaved({"ours": ours, "theirs": theirs}, rounds, clock=clock)
    ms = {who: 1e3 * timing.least / STEPS for who, timing in timings.items()}
    state = "x".join(map(str, shape))
    return Line(library, version(library), method, state, ms["ours"], ms["theirs"], ms["ours"] / ms["theirs"], *apart)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help=f"fail unless every ratio is at most {BAR:g}")
    parser.add_argument("--quick", action="store_true", help="small states alone, fewer rounds")
    parser.add_argument("--peers", type=Path, default=Path("build/peers"), help="folder where the libraries are installed")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sys.path.append(str(args.peers))  # last: what the environment has stays what it is
    found, missing = cases()
    title = header()
    print(f"{title}\nms per step beyond the network, {STEPS} steps, float32, least of interleaved rounds")
    print(f"{'library':<36}{'method':<18}{'state':<14}{'quieten':>9}{'theirs':>9}{'ratio':>7}{'difference':>12}"
          f"{'our error':>11}{'their error':>13}{'last bit':>10}")  # fmt: skip
    lines = []
    for shape in SHAPES[:1] if args.quick else SHAPES:
        for (library, method), case in found.items():
            line = measure(library, method, case, shape, 3 if args.quick else args.rounds)
            lines.append(line)
            print(f"{f'{library} {line.version}':<36}{method:<18}{line.state:<14}{line.ours:>9.3f}{line.theirs:>9.3f}"
                  f"{line.ratio:>7.2f}{line.difference:>12.1e}{line.our_error:>11.1e}{line.their_error:>13.1e}{line.last_bit:>10.1e}",
                  flush=True)  # fmt: skip
    for reason in missing:
        print(f"left out: {reason}")
    worst, apart = max(line.ratio for line in lines), max(line.difference for line in lines)
    met = worst <= BAR and apart <= DIFFERENCE
    print(
        f"worst ratio {worst:.2f}, bar {BAR:g}; largest difference {apart:.1e}, bar {DIFFERENCE:g}: "
        f"{'met' if met else 'missed'}"
    )
    if args.json:
        content = {"machine": title, "lines": [asdict(line) for line in lines], "missing": missing}
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    return int(args.check and not met)


if __name__ == "__main__":
    raise SystemExit(main())
