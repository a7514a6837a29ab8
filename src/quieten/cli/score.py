"""How strange examples are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import MEASURE, Device, Model, Weights, app

__all__ = ["score"]


@app.command(rich_help_panel=MEASURE)
def score(
    source: Model,
    data: Annotated[str, typer.Argument(help="A data set's name, a folder or zip of images, or an .npz file.")],
    by: Annotated[
        str | None,
        typer.Option(
            help="energy (of a tuned policy), loss (denoising), elbo, pca, knn, detector. Default: energy if tuned, else loss."
        ),
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="Whose energy: NAME of `quieten tune`, or FOLDER/NAME. Default: the latest.")
    ] = None,
    normal: Annotated[
        str | None, typer.Option(help="Classes that are normal, by comma, by name or number; the others are strange.")
    ] = None,
    against: Annotated[str | None, typer.Option(help="Other data, all of them strange; DATA are then all normal.")] = None,
    split: Annotated[
        str | None, typer.Option(help="test or train. Default: test, or the whole of data that are not divided.")
    ] = None,
    n: Annotated[int | None, typer.Option("-n", "--n", min=2, help="Number of examples. Default: all.")] = None,
    levels: Annotated[int, typer.Option(min=1, help="Noise levels of --by loss.")] = 8,
    seed: Annotated[int, typer.Option(help="Chooses the examples and their noise.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder to write. Default: in the run's folder scores, or here.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Examples at once.")] = 256,
    weights: Weights = "ema",
    device: Device = None,
) -> None:
    """Score examples by how strange they are: anomalies and data from elsewhere, without labels.

    Writes a folder with the scores (npz, csv), a histogram, the least and the most strange examples, and, where the score has
    places, which positions it comes from. With --normal or --against it also says how well the score tells the two apart: the
    area under the ROC curve with its standard error, and the curve.

    pca, knn and detector learn from the training examples of the normal classes alone; the model's own scores know what the
    model was trained on. Scores do not see labels: a model with a null label is asked with that, an energy of classes is the
    least over classes.

    Examples:

        quieten score runs/fashion fashion-mnist --policy dxmi-4
        quieten score zoo:fashion-mnist fashion-mnist --against ~/pictures --by loss -n 1000
        quieten score zoo:fashion-mnist fashion-mnist --by knn --normal Sandal
    """
    from ..commands.score import score as run

    run(
        source, data, by=by, policy=policy, normal=normal, against=against, split=split, n=n, levels=levels, seed=seed, out=out,
        batch=batch, weights=weights, device=device,
    )  # fmt: skip
