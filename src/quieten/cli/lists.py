"""Look around: what there is to train, to draw with, and to draw from."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import LOOK, app

__all__ = ["recipes", "samplers", "zoo"]


@app.command(rich_help_panel=LOOK)
def samplers() -> None:
    """List the samplers that --transition knows."""
    from ..guiding.splits import SPLITS
    from ..solvers.samplers import SAMPLERS

    for name, entry in SAMPLERS.items():
        typer.echo(f"{name:15s} {entry.about}")
    typer.echo(f"{'encoded-flow':15s} the ODE of DiffEnc's contraction or counterterm split, by Heun's method")
    for name, scheme in SPLITS.items():
        typer.echo(f"{name:15s} with --guide, {scheme.network} + {scheme.gradient} gradients a step: {scheme.about}")


@app.command(rich_help_panel=LOOK)
def zoo(
    name: Annotated[str | None, typer.Argument(help="One model; its beginning will do. Default: all.")] = None,
) -> None:
    """List the trained models that come with the library: variances, policies, classifiers, sizes, quality.

    Any command that takes a model takes their names.

    Examples:

        quieten zoo
        quieten sample zoo:fashion --steps 5 --out grid.png
    """
    from ..commands.zoo import show

    show(name)


@app.command(rich_help_panel=LOOK)
def recipes() -> None:
    """List the recipes that `train` knows: first those for a CPU, then the settings of the papers."""
    import yaml

    from ..training.config import FOLDER, recipe_names

    texts = {name: (FOLDER / f"{name}.yaml").read_text(encoding="utf-8") for name in recipe_names()}
    large = [name for name, text in texts.items() if yaml.safe_load(text)["train"]["images"] > 20_000_000]
    width = max(map(len, texts))
    for title, names in (
        ("Minutes to hours on a CPU:", [name for name in texts if name not in large]),
        ("As in the papers, for GPUs and days:", large),
    ):
        typer.echo(title)
        for name in names:
            typer.echo(f"  {name:{width}s}  {texts[name].splitlines()[0].removeprefix('#').strip()}")
