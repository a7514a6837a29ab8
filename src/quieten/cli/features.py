"""Train what samples are measured with, and measure data with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import MEASURE, Batch, Device, Download, Folder, Images, Labelled, Mirror, Peak, Seed, Shift, Size, app

__all__ = ["features", "stats", "train"]

features = typer.Typer(
    help="Features of images: train a small extractor, or write the statistics of a data set.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.add_typer(features, name="features", rich_help_panel=MEASURE)


@features.command()
def train(
    data: Labelled,
    out: Annotated[Path | None, typer.Option(help="File to write. Default: runs/NAME-features.safetensors.")] = None,
    images: Images = 600_000,
    batch: Batch = 128,
    lr: Peak = 2e-3,
    decay: Annotated[float, typer.Option(min=0, help="Weight decay; more for few images.")] = 0.02,
    width: Annotated[int, typer.Option(min=1, help="Channels of the network; there are 3/2 as many features.")] = 64,
    dropout: Annotated[float, typer.Option(min=0, max=0.99, help="Share of features dropped; more for few images.")] = 0.1,
    shift: Shift = 2,
    mirror: Mirror = None,
    size: Size = None,
    seed: Seed = 0,
    folder: Folder = None,
    download: Download = False,
    device: Device = None,
) -> None:
    """Train a small classifier whose features samples are measured with; the same command again resumes it.

    Frechet distances want many more images than features: keep --width below a twentieth of them.

    Examples:

        quieten features train digits --images 200000 --width 32
        quieten features train ~/pictures --size 32 --out judge.safetensors
    """
    from ..commands.features import train as run

    if not run(
        data, out=out, images=images, batch=batch, lr=lr, decay=decay, width=width, dropout=dropout, shift=shift, mirror=mirror,
        size=size, seed=seed, folder=folder, download=download, device=device,
    ):  # fmt: skip
        raise typer.Exit(130)


@features.command()
def stats(
    data: Annotated[str, typer.Argument(help="A data set's name, a folder of images, or an .npz with `arr_0`.")],
    extractor: Annotated[
        str, typer.Option(help="pixels, zoo:NAME, a file of `quieten features train`, inception:FILE or pytorch-fid:FILE.")
    ],
    out: Annotated[Path | None, typer.Option(help="File to write. Default: NAME-SPLIT-HASH.npz.")] = None,
    split: Annotated[str, typer.Option(help="train or test.")] = "train",
    size: Size = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at once; the result does not depend on it.")] = 256,
    sha256: Annotated[str | None, typer.Option(help="What the extractor's file must hash to.")] = None,
    single: Annotated[bool, typer.Option("--single", help="Write float32 instead of float64: half the size.")] = False,
    folder: Folder = None,
    download: Download = False,
    device: Device = None,
) -> None:
    """Write mean and covariance of the features of a data set, in the layout of pytorch-fid, EDM and ADM (mu, sigma).

    Frechet distances can then be taken to them without the data.

    Examples:

        quieten features stats fashion-mnist --extractor zoo:fashion-mnist --out stats.npz
        quieten features stats ~/pictures --extractor inception:pt_inception-2015-12-05.pth --size 64
    """
    from ..commands.features import stats as run

    run(
        data, extractor=extractor, out=out, split=split, size=size, batch=batch, sha256=sha256, single=single, folder=folder,
        download=download, device=device,
    )  # fmt: skip
