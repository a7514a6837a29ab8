"""How noisy training is, and what a network could still learn."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import Device, Weights, app

__all__ = ["diagnose"]


@app.command()
def diagnose(
    source: Annotated[str, typer.Argument(help="A run's folder, an exported file, zoo:NAME, or a diffusers folder or hub id.")],
    data: Annotated[str, typer.Argument(help="Its data: a data set's name, a folder or zip of images, or an .npz file.")],
    references: Annotated[str, typer.Option(help="Sizes of the reference sets of stable targets, by comma.")] = "64,1024",
    levels: Annotated[int, typer.Option(min=3, help="Number of noise levels.")] = 16,
    pairs: Annotated[int, typer.Option(min=2, help="Noisy examples at each level.")] = 256,
    bank: Annotated[int, typer.Option(min=2, help="Examples that stand for the whole of the data, at most.")] = 20_000,
    split: Annotated[str, typer.Option(help="train or test.")] = "train",
    seed: Annotated[int, typer.Option(help="Chooses the examples and their noise.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder to write. Default: the run's folder diagnosis, or here.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Examples at once in the network.")] = 64,
    weights: Weights = "ema",
    device: Device = None,
) -> None:
    """Show per noise level how noisy the training targets are, with and without stable targets, and the network's loss.

    Prints a table, and writes it with a picture. The irreducible part of the loss is that of a network that knew the
    examples by heart: near the data a network that generalises stays above it.

    Examples:

        quieten diagnose runs/digits digits

        quieten diagnose zoo:fashion-mnist fashion-mnist --references 128,1024,8192

        quieten diagnose ./my-diffusers-model ~/pictures --levels 24 --out diagnosis
    """
    from ..commands.diagnose import diagnose as run

    try:
        counts = [int(word) for word in references.split(",")]
    except ValueError:
        raise ValueError(f"`--references {references}` must be numbers by comma, such as 64,1024") from None
    run(
        source, data, references=counts, levels=levels, pairs=pairs, bank=bank, split=split, seed=seed, out=out, batch=batch,
        weights=weights, device=device,
    )  # fmt: skip
