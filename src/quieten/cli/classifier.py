"""Train a classifier that guides."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import MAKE, Device, app

__all__ = ["train_classifier"]


@app.command("train-classifier", rich_help_panel=MAKE)
def train_classifier(
    data: Annotated[str, typer.Argument(help="A labelled data set: a name, or a folder with one subfolder for each class.")],
    out: Annotated[Path | None, typer.Option(help="File to write. Default: runs/NAME-classifier.safetensors.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Images to train on, counted with repetition.")] = 600_000,
    batch: Annotated[int, typer.Option(min=1, help="Images a step.")] = 128,
    lr: Annotated[float, typer.Option(min=0, help="Peak learning rate.")] = 2e-3,
    width: Annotated[int, typer.Option(min=1, help="Channels of the network; its cost grows with the square.")] = 32,
    shift: Annotated[int, typer.Option(min=0, help="Largest shift in pixels.")] = 2,
    mirror: Annotated[
        bool | None, typer.Option("--mirror/--no-mirror", help="Mirror every other picture. Default: except digits.")
    ] = None,
    process: Annotated[str, typer.Option(help="How the pictures are noised: vp, ve or flow; any denoiser can use it.")] = "vp",
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    folder: Annotated[Path | None, typer.Option("--data", help="Where the data set lies, for names.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Allow a missing data set to be downloaded.")] = False,
    device: Device = None,
) -> None:
    """Train a classifier of noisy pictures, for `quieten sample --guide CLASS`; the same command again resumes it.

    Writes the weights with all that is needed to use them, and a picture of its accuracy at every level of noise.

    Examples:

        quieten train-classifier digits --images 100000 --width 16
        quieten train-classifier fashion-mnist --images 900000 --out runs/guide.safetensors
    """
    from ..commands.classifier import train_classifier as run

    if not run(
        data, out=out, images=images, batch=batch, lr=lr, width=width, shift=shift, mirror=mirror, process=process, seed=seed,
        folder=folder, download=download, device=device,
    ):  # fmt: skip
        raise typer.Exit(130)
