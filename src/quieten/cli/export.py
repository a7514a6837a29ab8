"""Take a model along."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import MAKE, Weights, app

__all__ = ["export"]


@app.command(rich_help_panel=MAKE)
def export(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    file: Annotated[Path | None, typer.Argument(help="A file to write, ending in .safetensors.")] = None,
    hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Repository on the Hugging Face hub to write; made if need be.")
    ] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Of a new repository.")] = None,
    half: Annotated[bool, typer.Option("--half/--full", help="Weights of the file in half precision.")] = True,
    weights: Weights = "ema",
) -> None:
    """Write a run as one file, or to the Hugging Face hub: either may stand where a command takes a model.

    The file holds the weights and the recipe; fitted variances go into a folder beside it. The hub gets the recipe, the
    averaged weights, fitted variances and tuned policies, in one commit; log in first with `hf auth login`.

    Examples:

        quieten export runs/digits digits.safetensors
        quieten export runs/digits --hub my-name/digits --private
        quieten sample my-name/digits --steps 10
    """
    from ..training.runs import Run
    from ..training.runs import export as write

    if file is None and hub is None:
        raise ValueError("nothing to write: name a FILE ending in .safetensors, or --hub OWNER/NAME")
    opened = Run.open(run)
    if file is not None:
        typer.echo(write(opened, file, half, weights))
    if hub is not None:
        from ..training.hub import push_to_hub

        if weights != "ema":
            raise ValueError(f"`--weights {weights}` is for a file: the hub gets the averaged ones, leave it out")
        typer.echo(push_to_hub(opened, hub, private=private))
