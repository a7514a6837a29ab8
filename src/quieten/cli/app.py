"""The application that commands join, and the options that several share."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "LOOK", "MAKE", "MEASURE", "Batch", "Device", "Download", "Folder", "Images", "Labelled", "Mirror", "Model", "Overrides",
    "Peak", "Seed", "Shift", "Size", "Weights", "app", "as_typed",
]  # fmt: skip

MAKE, MEASURE, LOOK = "Train and draw", "Measure", "Look up"
"""Groups of commands in the help."""

app = typer.Typer(
    name="quieten",
    help="Diffusion models with less noise: train, sample and measure them.\n\n"
    "Begin with `quieten demo`, which trains and measures a small model in minutes, or draw from one that comes along: "
    "`quieten sample zoo:fashion-mnist`. The help of every command has examples.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str,
    typer.Argument(help="A run's folder, an exported file, zoo:NAME, a diffusers folder, or the hub id of a run or pipeline."),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe, e.g. train.batch=64.")
]
Weights = Annotated[str, typer.Option(help="ema or model.")]
Device = Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps. Default: the best there is.")]

# ---- of what learns from labelled pictures

Labelled = Annotated[str, typer.Argument(help="A labelled data set: a name, or a folder with one subfolder for each class.")]
Images = Annotated[int, typer.Option(min=1, help="Images to train on, counted with repetition.")]
Batch = Annotated[int, typer.Option(min=1, help="Images a step.")]
Peak = Annotated[float, typer.Option(min=0, help="Peak learning rate.")]
Shift = Annotated[int, typer.Option(min=0, help="Largest shift in pixels.")]
Mirror = Annotated[
    bool | None, typer.Option("--mirror/--no-mirror", help="Mirror every other picture. Default: except digits.")
]
Size = Annotated[int | None, typer.Option(min=1, help="Resize the images first.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Folder = Annotated[Path | None, typer.Option("--data", help="Where the data set lies, for names.")]
Download = Annotated[bool, typer.Option("--download", help="Allow a missing data set to be downloaded.")]


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


def as_typed(context: typer.Context, without: str = "") -> str:
    """The command of a context with what was given to it, but for one option: for reports, to get the same again."""
    words = context.command_path.split()
    for parameter in context.command.params:
        name, value = str(parameter.name), context.params.get(str(parameter.name))
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE" or name == without:
            continue
        if parameter.param_type_name == "argument":
            words.append(str(value))
        elif isinstance(value, bool):
            words.append((parameter.opts if value else parameter.secondary_opts)[0])
        else:
            values = value if isinstance(value, list | tuple) else [value]
            words += [word for one in values for word in (max(parameter.opts, key=len), str(one))]
    return shlex.join(words)
