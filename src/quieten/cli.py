"""The command line. Nothing heavy is imported before a command runs, so that help is instant."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

__all__ = ["app", "main"]

app = typer.Typer(
    name="quieten",
    help="Diffusion models with less noise: train, sample and measure them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe, e.g. train.batch=64.")
]
Device = Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps. Default: the best there is.")]


def _version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, a YAML file, or a folder of images.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the run. Default: runs/NAME.")] = None,
    changes: Overrides = None,
    data: Annotated[Path | None, typer.Option(help="Where the data set lies, for recipes that name one.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Allow a missing data set to be downloaded.")] = False,
) -> None:
    """Train a denoiser; running the same command again resumes it.

    Ctrl-C saves before it stops. Several GPUs: `torchrun --nproc_per_node 4 -m quieten train RECIPE`.

    Examples:

        quieten train digits

        quieten train fashion-mnist --set train.batch=256 --out runs/fashion

        quieten train ~/pictures --set data.size=32
    """
    from .commands import train as run

    if not run(recipe, out=out, changes=changes or [], data=data, download=download):
        raise typer.Exit(130)  # as for any program that Ctrl-C stops: `train ... && sample ...` does not go on


@app.command()
def sample(
    source: Annotated[str, typer.Argument(help="A run's folder, an exported file, zoo:NAME, or a diffusers folder or hub id.")],
    steps: Annotated[int | None, typer.Option(min=1, help="Number of steps. Default: the recipe's.")] = None,
    transition: Annotated[str | None, typer.Option(help="Sampler, see `quieten samplers`. Default: the recipe's.")] = None,
    n: Annotated[int, typer.Option("-n", "--n", min=1, help="Number of samples.")] = 64,
    seed: Annotated[int, typer.Option(help="Sample i of a seed is the same whatever -n and --batch.")] = 0,
    label: Annotated[str | None, typer.Option(help="A class by name or number, several by comma, or 'all' in turn.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text, for models that take it.")] = None,
    scale: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is none. Default: the recipe's.")] = None,
    eta: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of ancestral noise, for samplers that have it.")
    ] = None,
    clip: Annotated[
        bool | None, typer.Option("--clip/--no-clip", help="Clip x0 to [-1, 1]. Default: for pixel models.")
    ] = None,
    grid: Annotated[str | None, typer.Option(help="Spacing of the levels: karras, uniform, quadratic, leading, ...")] = None,
    out: Annotated[Path | None, typer.Option(help="PNG grid to write. Default: in the run's samples, or here.")] = None,
    npz: Annotated[Path | None, typer.Option(help="Also write the samples as uint8 arrays.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples at once.")] = 64,
    weights: Annotated[str, typer.Option(help="ema or model.")] = "ema",
    device: Device = None,
) -> None:
    """Draw samples: writes a PNG grid, prints seed, evaluations and images/s.

    Examples:

        quieten sample runs/digits --steps 10 --transition dpm++

        quieten sample zoo:fashion-mnist --label Bag,Coat --scale 2 --steps 20 --transition heun

        quieten sample ./my-diffusers-model --steps 50 --transition ddim --npz samples.npz -n 1000
    """
    from .commands import sample as run

    run(
        source, steps=steps, transition=transition, n=n, seed=seed, label=label, prompt=prompt, scale=scale, eta=eta, clip=clip,
        spacing=grid, out=out, npz=npz, batch=batch, weights=weights, device=device,
    )  # fmt: skip


@app.command()
def samplers() -> None:
    """List the samplers that --transition knows."""
    from .samplers import SAMPLERS

    for name, entry in SAMPLERS.items():
        typer.echo(f"{name:12s} {entry.about}")


@app.command()
def recipes() -> None:
    """List the recipes that `train` knows."""
    from .config import FOLDER, recipe_names

    for name in recipe_names():
        with (FOLDER / f"{name}.yaml").open(encoding="utf-8") as file:
            typer.echo(f"{name:16s} {file.readline().removeprefix('#').strip()}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the run and its report.")] = Path("runs/demo"),
    changes: Overrides = None,
    n: Annotated[int, typer.Option("-n", "--n", min=100, help="Samples for each row of the table.")] = 1000,
) -> None:
    """Train on real handwritten digits, sample with four solvers, measure; all of it in minutes.

    Writes report.html, one self-contained page, into the folder.
    """
    from .demo import demo as run

    if run(out, changes or [], n=n) is None:
        raise typer.Exit(130)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; what a user can get wrong ends in one line on stderr and exit status 2.

    With the environment variable QUIETEN_DEBUG set, the whole traceback is shown instead.
    """
    _share_processors()
    try:
        app(arguments, prog_name="quieten")
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        _fail(error)
    except RuntimeError as error:
        if "memory" not in str(error):  # torch has no class of its own for this on every device
            raise
        _fail(error, ": take a smaller --batch, or train.batch")


def _share_processors() -> None:
    """Lets threads that wait for one another sleep soon, unless the user says how they wait; before torch is imported.

    GNU OpenMP spins for milliseconds by default. When another program takes a core, each of the thousand waits of a network
    then burns the time its partner needs: with two busy loops beside it on 2 cores, sampling digits took over 40 times as
    long as alone. With this many turns, some 20 microseconds, it took 3 to 4 times as long, and alone no longer than before.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def _fail(error: Exception, remedy: str = "") -> NoReturn:
    if os.environ.get("QUIETEN_DEBUG"):
        raise error
    sys.stdout.flush()
    typer.echo(f"quieten: error: {' '.join(str(error).split()) or type(error).__name__}{remedy}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
