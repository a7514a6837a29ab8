"""Tune a model to a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import MAKE, Device, Model, Weights, app

__all__ = ["tune"]


@app.command(rich_help_panel=MAKE)
def tune(
    source: Model,
    data: Annotated[str, typer.Argument(help="What it was trained on: a data set's name, or a path.")],
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the policy, each one evaluation. Default: 4.")] = None,
    method: Annotated[
        str | None, typer.Option(help="dxmi (default), or a baseline: sft-pg, sft-ppo, bptt (through all steps).")
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FUNCTION", help="Tune to a reward, near the first policy; --tau1 is what a nat costs."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What it is sampled by. Default: the method and the steps, dxmi-4.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder. Default: `policy` in the run; ./policy for zoo and hub.")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Examples to show. Default: 25,600.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Examples, and trajectories, of an iteration. Default: 64.")] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Learning rate of the means' network. Default: 1e-5 for all weights, 3e-4 for --adapters (up to 2e-3)."
        ),
    ] = None,
    value_lr: Annotated[float | None, typer.Option(help="Of the value, far above --lr. Default: 3e-4.")] = None,
    std_lr: Annotated[float | None, typer.Option(help="Of the log standard deviations. Default: 3e-4.")] = None,
    start: Annotated[
        str | None, typer.Option(help="First policy: ddim with --eta (default), ddpm, fastdpm, ocm (a fitted variance).")
    ] = None,
    eta: Annotated[
        float | None, typer.Option(help="Share of the ancestral noise in the first policy. Default: 0.5, ddpm 1.")
    ] = None,
    sigma_max: Annotated[float | None, typer.Option(help="First level, sigma / alpha. Default: 10, or 2 x steps.")] = None,
    sigma_min: Annotated[float | None, typer.Option(help="Last level before the data. Default: 0.8 / steps.")] = None,
    train_std: Annotated[
        str | None, typer.Option(help="Which noise is trained: fix_last (default), all, none, fix_last3.")
    ] = None,
    tau1: Annotated[float | None, typer.Option(help="Weight of the entropy: more keeps samples apart. Default: 0.003.")] = None,
    tau2: Annotated[float | None, typer.Option(help="Weight of the running cost. Default: 0.003.")] = None,
    gamma: Annotated[float | None, typer.Option(help="Weight of the squared energies. Default: 1.")] = None,
    reduction: Annotated[str | None, typer.Option(help="Unit of tau: mean (default, of code) or sum (of paper).")] = None,
    time_cost: Annotated[
        str | None, typer.Option(help="none (default), sigmoid or linear: what a value that knows no time needs.")
    ] = None,
    n_generator: Annotated[str | None, typer.Option(help="Policy steps of an iteration, or all. Default: 1.")] = None,
    n_critic: Annotated[int | None, typer.Option(min=1, help="Sweeps of energy and value for each. Default: 1.")] = None,
    value: Annotated[str | None, typer.Option(help="auto (default), encoder (the model's own), residual, perceptron.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Channels or units of the value.")] = None,
    energy: Annotated[str | None, typer.Option(help="value (default: its last state), or own (a network of its own).")] = None,
    adapters: Annotated[
        int | None, typer.Option(min=0, help="Rank of low-rank adapters, the only weights then trained. Default: 0, all.")
    ] = None,
    flip: Annotated[bool | None, typer.Option("--flip/--no-flip", help="Mirror examples at random.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any other setting, e.g. value_resample=true.")
    ] = None,
    distance: Annotated[
        str, typer.Option(help="Chooses the checkpoint: zoo, pixels (Frechet), sliced (Wasserstein); auto takes what suits.")
    ] = "auto",
    n: Annotated[int, typer.Option("-n", "--n", min=16, help="Samples of each measurement.")] = 1000,
    every: Annotated[int | None, typer.Option(min=1, help="Examples between measurements. Default: 3,200.")] = None,
    seed: Annotated[int, typer.Option(help="Of the order, the noise and the value's first weights.")] = 0,
    weights: Weights = "ema",
    device: Device = None,
) -> None:
    """Tune a few-step sampler against data (DxMI); running the same command again resumes it.

    The model is cut to a policy of a few stochastic steps; an energy learns to tell its samples from data, a value what a
    state will come to, and the policy where to step. No teacher, no back-propagation through time. Now and then samples are
    measured against data that were held out, and the best policy is kept; a monitor says what goes wrong and stops when it
    must. Options that are not given are those of the section `tune` in the recipe of the run, where it has one. The model
    itself stays as it is. Ctrl-C saves before it stops.

    Examples:

        quieten tune zoo:fashion-mnist fashion-mnist --steps 4
        quieten tune runs/digits digits --steps 4 --images 32000
        quieten tune zoo:fashion-mnist fashion-mnist --steps 10 --start ocm --tau1 0.01 --tau2 0.01
        quieten tune zoo:fashion-mnist fashion-mnist --steps 4 --reward my_rewards:brightness --tau1 0.1
        quieten tune ./my-diffusers-model ~/pictures --steps 4 --adapters 8 --value residual

    Then: `quieten sample MODEL --policy dxmi-4`; with --out, `--policy FOLDER/dxmi-4`.
    """
    from ..commands.tune import tune as run

    done = run(
        source, data, steps=steps, method=method, name=name, out=out, images=images, batch=batch, lr=lr, value_lr=value_lr,
        std_lr=std_lr, start=start, eta=eta, sigma_max=sigma_max, sigma_min=sigma_min, train_std=train_std, tau1=tau1,
        tau2=tau2, gamma=gamma, reduction=reduction, time_cost=time_cost, n_generator=n_generator, n_critic=n_critic,
        value=value, width=width, energy=energy, adapters=adapters, flip=flip, changes=changes or [], distance=distance, n=n,
        every=every, seed=seed, weights=weights, device=device, reward=reward,
    )  # fmt: skip
    if not done:
        raise typer.Exit(130)
