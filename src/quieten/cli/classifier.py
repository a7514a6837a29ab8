"""Train a classifier that guides."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import MAKE, Batch, Device, Download, Folder, Images, Labelled, Mirror, Peak, Seed, Shift, Size, app

__all__ = ["train_classifier"]


@app.command("train-classifier", rich_help_panel=MAKE)
def train_classifier(
    data: Labelled,
    out: Annotated[Path | None, typer.Option(help="File to write. Default: runs/NAME-classifier.safetensors.")] = None,
    images: Images = 600_000,
    batch: Batch = 128,
    lr: Peak = 2e-3,
    width: Annotated[int, typer.Option(min=1, help="Channels of the network; its cost grows with the square.")] = 32,
    shift: Shift = 2,
    mirror: Mirror = None,
    size: Size = None,
    process: Annotated[str, typer.Option(help="How the pictures are noised: vp, ve or flow; any denoiser can use it.")] = "vp",
    seed: Seed = 0,
    folder: Folder = None,
    download: Download = False,
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
        data, out=out, images=images, batch=batch, lr=lr, width=width, shift=shift, mirror=mirror, size=size, process=process,
        seed=seed, folder=folder, download=download, device=device,
    ):  # fmt: skip
        raise typer.Exit(130)
