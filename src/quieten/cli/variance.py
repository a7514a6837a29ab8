"""Learn the variance of a trained denoiser, and look at it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import MAKE, Device, Model, Weights, app

__all__ = ["fit", "show", "variance"]

variance = typer.Typer(
    help="Variances for a trained model: fit one to it, see how good they are.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.add_typer(variance, name="variance", rich_help_panel=MAKE)

Examples = Annotated[str, typer.Argument(help="What it was trained on: a data set's name, or a path.")]


@variance.command()
def fit(
    source: Model,
    data: Examples,
    kind: Annotated[
        str | None,
        typer.Option(help="ocm (default), sn, npr, mixed (ocm and npr) train a head; analytic measures one number a level."),
    ] = None,
    head: Annotated[
        str | None, typer.Option(help="complex (default), simple, or separate for networks without known features.")
    ] = None,
    basis: Annotated[str | None, typer.Option(help="pixel (default), or dct: cosine coefficients of blocks.")] = None,
    block: Annotated[int | None, typer.Option(min=2, help="Side of the blocks of --basis dct. Default: 4.")] = None,
    link: Annotated[
        str | None, typer.Option(help="unit (default) keeps the variance positive, linear is as published.")
    ] = None,
    derivative: Annotated[str | None, typer.Option(help="auto (default), vjp, fd (finite differences) or jvp.")] = None,
    probes: Annotated[int | None, typer.Option(min=1, help="Sign vectors in a target of ocm. Default: 1.")] = None,
    estimator: Annotated[
        str | None, typer.Option(help="Of analytic: residual (default, its squared errors), or fisher as published.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What it is loaded by. Default: the kind, with -dct in that basis.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder. Default: `variance` in the run; ./variance for zoo and hub.")
    ] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Examples to show; for analytic, at every level.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Examples of a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    seed: Annotated[int, typer.Option(help="Of the order, the noise and the probes.")] = 0,
    weights: Weights = "ema",
    device: Device = None,
) -> None:
    """Fit a variance to a frozen model; running the same command again resumes it.

    Options that are not given are those of the section `variance` in the recipe of the run, where it has one.
    The model itself stays as it is. Ctrl-C saves before it stops.

    Examples:

        quieten variance fit zoo:fashion-mnist fashion-mnist
        quieten variance fit runs/emoji emoji --kind ocm --basis dct
        quieten variance fit ./my-diffusers-model ~/pictures --kind analytic --images 2000

    Then: `quieten sample MODEL --transition ocm`, or `--variance NAME`; with --out, `--variance FOLDER/NAME`.
    """
    from ..commands.variance import fit as run

    done = run(
        source, data, kind=kind, head=head, basis=basis, block=block, link=link, derivative=derivative, probes=probes,
        estimator=estimator, name=name, out=out, images=images, batch=batch, lr=lr, seed=seed, weights=weights, device=device,
    )  # fmt: skip
    if not done:
        raise typer.Exit(130)


@variance.command()
def show(
    source: Model,
    data: Examples,
    names: Annotated[
        str | None, typer.Option("--variance", help="Which ones, by comma, NAME or FOLDER/NAME. Default: all that were fitted.")
    ] = None,
    n: Annotated[int, typer.Option("-n", "--n", min=8, help="Examples at each level.")] = 256,
    levels: Annotated[int, typer.Option(min=2, help="Number of noise levels.")] = 12,
    split: Annotated[str, typer.Option(help="train or test.")] = "test",
    out: Annotated[Path | None, typer.Option(help="PNG of the calibration. Default: beside the variances.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise and the probes.")] = 0,
    weights: Weights = "ema",
    device: Device = None,
) -> None:
    """Compare variances with the errors they should predict, level by level.

    Error / variance is the mean squared error of the estimate of x0 over the mean of the variance: 1 is right. The score is
    what the bound on the likelihood pays for it in a step to the next level, lower is better. Clamped is the share that had
    to be raised to 0.

    Examples:

        quieten variance show zoo:fashion-mnist fashion-mnist
    """
    from ..commands.variance import show as run

    run(source, data, names=names, n=n, levels=levels, split=split, out=out, seed=seed, weights=weights, device=device)
