"""How likely data are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import MEASURE, Device, Model, Weights, app

__all__ = ["nll"]


@app.command(rich_help_panel=MEASURE)
def nll(
    source: Model,
    data: Annotated[str, typer.Argument(help="A data set's name, a folder or zip of images, or an .npz file.")],
    estimator: Annotated[
        str, typer.Option(help="bound (in steps), continuous (the bound in continuous time), ode (likelihood of the ODE).")
    ] = "bound",
    steps: Annotated[int, typer.Option(min=2, help="Steps: levels of the bound, or steps along the ODE.")] = 50,
    n: Annotated[
        int | None, typer.Option("-n", "--n", min=2, help="Number of examples. Default: 500, or all if fewer.")
    ] = None,
    split: Annotated[str, typer.Option(help="test or train.")] = "test",
    variance: Annotated[
        str | None,
        typer.Option(
            help="Of the steps: equal to the posterior's (or small), optimal (a number for each, measured), learned, big, or "
            "one that `quieten variance fit` fitted, NAME or FOLDER/NAME. Default: learned, else big."
        ),
    ] = None,
    bound_grid: Annotated[
        str, typer.Option(help="Which levels: linear, quad_ddim, linear_ddim, powerp, optimal (measured), own (the sampler's).")
    ] = "linear",
    decoder: Annotated[str, typer.Option(help="discretised (its variance fitted), flat, or dequantised.")] = "discretised",
    compat: Annotated[str | None, typer.Option(help="official: the last term as the papers' code computes it.")] = None,
    clip: Annotated[
        bool | None, typer.Option("--clip/--no-clip", help="Clip x0 to [-1, 1]. Default: for pixel models.")
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Times per example of the bound in continuous time, averaged.")] = 1,
    probes: Annotated[
        int | None, typer.Option(min=0, help="Random probes of the ODE's divergence; 0 takes it exactly. Default: 1.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Let each example choose the ODE's steps by its own error, instead of --steps.")
    ] = None,
    fit: Annotated[
        int, typer.Option(min=2, help="Training examples for what is fitted: decoder, optimal variance, optimal grid.")
    ] = 128,
    levels: Annotated[int, typer.Option(min=2, help="Levels that the optimal grid is chosen from, at most.")] = 200,
    seed: Annotated[int, typer.Option(help="Chooses the examples and their noise.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON to write. Default: in the run's folder nll, or here.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Examples at once.")] = 64,
    weights: Weights = "ema",
    device: Device = None,
) -> None:
    """Measure how likely data are: the variational bound on their likelihood, term by term, in nats and bits/dim.

    Three estimators: the bound in steps, of the very sampler that takes them; the bound in continuous time; and the likelihood
    of the probability-flow ODE, which models with a trained encoder have with the counterterm split alone.

    Bits/dim are of the 8-bit pixels, which the model sees scaled to [-1, 1]. Latent models give nats/dim of their latents.

    Examples:

        quieten nll runs/digits digits
        quieten nll zoo:fashion-mnist fashion-mnist --steps 10 --variance big --bound-grid optimal
        quieten nll runs/my-diffenc fashion-mnist --steps 20 --variance optimal --bound-grid optimal
        quieten nll zoo:fashion-mnist fashion-mnist --estimator ode --steps 30 -n 100
        quieten nll runs/digits digits --estimator ode --probes 0 --tolerance 1e-4 -n 100
        quieten nll ./my-diffusers-model ~/pictures --split train --steps 1000 --compat official
    """
    from ..commands.nll import nll as run

    run(
        source, data, estimator=estimator, steps=steps, n=n, split=split, variance=variance, bound_grid=bound_grid,
        decoder=decoder, compat=compat, clip=clip, fit=fit, levels=levels, draws=draws, probes=probes,
        tolerance=tolerance, seed=seed, out=out, batch=batch, weights=weights, device=device,
    )  # fmt: skip
