"""Samplers side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import MEASURE, Device, Model, Weights, app, as_typed

__all__ = ["compare"]


@app.command(rich_help_panel=MEASURE)
def compare(
    context: typer.Context,
    source: Model,
    data: Annotated[
        str, typer.Argument(help="What samples should look like: a data set's name, a folder or zip, an .npz file.")
    ],
    transitions: Annotated[
        str | None,
        typer.Option(
            help="By comma: samplers (see `quieten samplers`), ancestral:VARIANCE, pc:OPTION=VALUE, policy:NAME (or "
            "FOLDER/NAME), diffusers:NAME; or groups: policies, fitted, diffusers, all. Default: ddpm, ddim, heun, dpm++, "
            "unipc, ocm if fitted, policies."
        ),
    ] = None,
    steps: Annotated[str, typer.Option(help="Numbers of steps, by comma.")] = "5,10,20,50",
    against: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="Another model to draw by the same samplers; may be repeated.")
    ] = None,
    n: Annotated[int, typer.Option("-n", "--n", min=2, help="Samples of each row.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of the noise, the same for all rows.")] = 0,
    features: Annotated[
        str | None,
        typer.Option(
            help="What distances are measured on: pixels, zoo:NAME, a file of `quieten features train`, inception:FILE. "
            "Default: the zoo's of that data set, else pixels."
        ),
    ] = None,
    nll: Annotated[int, typer.Option(min=0, help="Test examples for bits/dim, where a sampler has densities; 0 for none.")] = 0,
    scale: Annotated[
        float | None, typer.Option(help="Weight of classifier-free guidance, 1 for none. Default: the recipe's.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Text, for models that take it.")] = None,
    clip: Annotated[
        bool | None, typer.Option("--clip/--no-clip", help="Clip x0 to [-1, 1]. Default: for pixel models.")
    ] = None,
    grid: Annotated[str | None, typer.Option(help="Spacing of the levels: karras, uniform, quadratic, leading, ...")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder. Default: `compare` in the run, or ./compare/NAME.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Also draw quality against evaluations as this PNG.")] = None,
    draw: Annotated[bool, typer.Option("--draw/--no-draw", help="Draw what is missing, or report what there is.")] = True,
    batch: Annotated[int, typer.Option(min=1, help="Samples at once, and of a file that is kept.")] = 100,
    weights: Weights = "ema",
    device: Device = None,
) -> None:
    """Draw by several samplers at several numbers of steps, measure, and report: quality, evaluations, seconds.

    All start from the same noise and the same classes, on one network. The folder gets report.html, one self-contained page,
    results.json with every number's protocol, and the samples: Ctrl-C loses at most a batch, the same command goes on, and
    rows that were measured before are not drawn again. Samples of a model that changed are.

    Examples:

        quieten compare zoo:fashion-mnist fashion-mnist
        quieten compare runs/digits digits --transitions ddim,dpm++,diffusers --steps 5,10 -n 1000
        quieten compare zoo:fashion-mnist fashion-mnist --transitions ocm,fitted,policies --nll 200
        quieten compare runs/new digits --against runs/old --transitions heun
    """
    from ..commands.compare import run

    numbers = [part.strip() for part in steps.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in numbers):
        raise ValueError(f"`--steps {steps}` must be positive whole numbers by comma, such as 5,10,20")
    names = [] if transitions is None else [part.strip() for part in transitions.split(",") if part.strip()]
    done = run(
        source, data, transitions=names, steps=[int(part) for part in numbers], against=against or [], n=n, seed=seed,
        features=features, nll=nll, scale=scale, prompt=prompt, clip=clip, spacing=grid, out=out, figure=figure, batch=batch,
        weights=weights, device=device, draw=draw, command=as_typed(context, without="draw"),
    )  # fmt: skip
    if not done:
        raise typer.Exit(130)
