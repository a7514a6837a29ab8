"""How noisy training is, and what a network could still learn."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import typer

from .app import MEASURE, Device, Model, Weights, app

__all__ = ["diagnose"]

T = TypeVar("T", int, float)


@app.command(rich_help_panel=MEASURE)
def diagnose(
    source: Model,
    data: Annotated[
        str | None, typer.Argument(help="Its data: a data set's name, a folder or zip of images, or an .npz file.")
    ] = None,
    references: Annotated[str, typer.Option(help="Sizes of the reference sets of stable targets, by comma.")] = "64,1024",
    levels: Annotated[int, typer.Option(min=3, help="Number of noise levels.")] = 16,
    pairs: Annotated[int, typer.Option(min=2, help="Noisy examples at each level.")] = 256,
    bank: Annotated[int, typer.Option(min=2, help="Examples that stand for the whole of the data, at most.")] = 20_000,
    split: Annotated[str, typer.Option(help="train or test.")] = "train",
    seed: Annotated[int, typer.Option(help="Chooses the examples and their noise.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder to write. Default: the run's folder diagnosis, or here.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Examples at once in the network.")] = 64,
    guidance: Annotated[
        str | None, typer.Option(help="Instead: which solvers survive this guide, as `quieten sample --guide` takes it.")
    ] = None,
    classifier: Annotated[str | None, typer.Option(help="With --guidance CLASS: as in `quieten sample`.")] = None,
    measurement: Annotated[Path | None, typer.Option(help="With --guidance inpaint, ...: as in `quieten sample`.")] = None,
    mask: Annotated[Path | None, typer.Option(help="With --guidance inpaint: as in `quieten sample`.")] = None,
    scales: Annotated[str, typer.Option(help="With --guidance: weights to try, by comma.")] = "1,3,10",
    steps: Annotated[str, typer.Option(help="With --guidance: numbers of steps to try, by comma.")] = "5,10,15,20,25",
    solvers: Annotated[str | None, typer.Option(help="With --guidance: samplers to try, by comma.")] = None,
    n: Annotated[int, typer.Option("-n", "--n", min=1, help="With --guidance: number of samples.")] = 16,
    reference: Annotated[int, typer.Option(min=2, help="With --guidance: steps of the path that all are held against.")] = 1000,
    weights: Weights = "ema",
    device: Device = None,
) -> None:
    """Show per noise level how noisy the training targets are, with and without stable targets, and the network's loss.

    With --guidance, show instead which solvers stay stable and near the exact path, over steps and scales.

    Prints a table, and writes it with a picture. The irreducible part of the loss is that of a network that knew the
    examples by heart: near the data a network that generalises stays above it.

    Examples:

        quieten diagnose runs/digits digits
        quieten diagnose zoo:fashion-mnist fashion-mnist --references 128,1024,8192
        quieten diagnose ./my-diffusers-model ~/pictures --levels 24 --out diagnosis
        quieten diagnose zoo:fashion-mnist --guidance all --scales 1,6,20
    """
    if guidance is not None:
        from ..commands.stability import SOLVERS, diagnose_guidance

        if data is not None:
            raise ValueError(f"`--guidance {guidance}` needs no data: leave out {data}")
        diagnose_guidance(
            source, guidance, classifier=classifier, measurement=measurement, mask=mask,
            scales=_numbers("scales", scales, float), steps=_numbers("steps", steps, int),
            solvers=SOLVERS if solvers is None else solvers.split(","), n=n, reference=reference, seed=seed, out=out,
            weights=weights, device=device,
        )  # fmt: skip
        return
    if data is None:
        raise ValueError("`data` is missing: name the model's data, or --guidance")
    from ..commands.diagnose import diagnose as run

    counts = _numbers("references", references, int)
    run(
        source, data, references=counts, levels=levels, pairs=pairs, bank=bank, split=split, seed=seed, out=out, batch=batch,
        weights=weights, device=device,
    )  # fmt: skip


def _numbers(option: str, words: str, kind: type[T]) -> list[T]:
    try:
        return [kind(word) for word in words.split(",")]
    except ValueError:
        raise ValueError(f"`--{option} {words}` must be numbers by comma, such as 5,10") from None
