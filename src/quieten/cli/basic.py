"""Train and sample."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import MAKE, Device, Model, Overrides, Weights, app

__all__ = ["demo", "sample", "train"]


@app.command(rich_help_panel=MAKE)
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, a YAML file, or a folder of images.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the run. Default: runs/NAME.")] = None,
    changes: Overrides = None,
    data: Annotated[Path | None, typer.Option(help="Where the data set lies, for recipes that name one.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Allow a missing data set to be downloaded.")] = False,
) -> None:
    """Train a denoiser; running the same command again resumes it.

    Ctrl-C saves before it stops. Several GPUs: `torchrun --nproc_per_node 4 -m quieten train RECIPE`.

    Examples:

        quieten train digits
        quieten train fashion-mnist --set train.batch=256 --out runs/fashion
        quieten train ~/pictures --set data.size=32
    """
    from ..commands.train import train as run

    if not run(recipe, out=out, changes=changes or [], data=data, download=download):
        raise typer.Exit(130)  # as for any program that Ctrl-C stops: `train ... && sample ...` does not go on


@app.command(rich_help_panel=MAKE)
def sample(
    source: Model,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of steps. Default: the recipe's.")] = None,
    transition: Annotated[str | None, typer.Option(help="Sampler, see `quieten samplers`. Default: the recipe's.")] = None,
    n: Annotated[int, typer.Option("-n", "--n", min=1, help="Number of samples.")] = 64,
    seed: Annotated[int, typer.Option(help="Sample i of a seed is the same whatever -n and --batch.")] = 0,
    label: Annotated[str | None, typer.Option(help="A class by name or number, several by comma, or 'all' in turn.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text, for models that take it.")] = None,
    scale: Annotated[
        float | None,
        typer.Option(
            help="Weight of --guide, default 1; without it, of classifier-free guidance, 1 for none, default the recipe's."
        ),
    ] = None,
    guide: Annotated[
        str | None, typer.Option(help="A class, several by comma, or 'all'; or inpaint, colour, superres:K (K times larger).")
    ] = None,
    classifier: Annotated[
        str | None, typer.Option(help="Of noisy pictures, for --guide CLASS: a file of `quieten train-classifier`, zoo:NAME.")
    ] = None,
    measurement: Annotated[
        Path | None, typer.Option(help="The picture to start from: with a hole, grey, or small. One of full size is measured.")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Picture that is white where --guide inpaint draws. Default: transparent pixels.")
    ] = None,
    std: Annotated[
        float | None, typer.Option(min=0, help="Noise of the measurement, whose values span [-1, 1]. Default: 0.02.")
    ] = None,
    eta: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of ancestral noise, for samplers that have it.")
    ] = None,
    options: Annotated[
        list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="Of the sampler, e.g. rtol=1e-4, snr=0.17.")
    ] = None,
    variance: Annotated[
        str | None,
        typer.Option(
            help="Of x0, for ancestral, ocm and ocm-ddim: one that was fitted (NAME or FOLDER/NAME), or big, fisher, probed."
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(help="One that `quieten tune` made, by NAME or FOLDER/NAME: it has its own steps, levels and noise."),
    ] = None,
    clip: Annotated[
        bool | None, typer.Option("--clip/--no-clip", help="Clip x0 to [-1, 1]. Default: for pixel models.")
    ] = None,
    grid: Annotated[str | None, typer.Option(help="Spacing of the levels: karras, uniform, quadratic, leading, ...")] = None,
    out: Annotated[Path | None, typer.Option(help="PNG grid to write. Default: in the run's samples, or here.")] = None,
    npz: Annotated[Path | None, typer.Option(help="Also write the samples as uint8 arrays.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples at once.")] = 64,
    weights: Weights = "ema",
    device: Device = None,
) -> None:
    """Draw samples: writes a PNG grid, prints seed, evaluations and images/s.

    What is not given is the model's own choice: its sampler, its number of steps, its guidance. A seed draws the same samples
    in batches of any size.

    Examples:

        quieten sample runs/digits --steps 10 --transition dpm++
        quieten sample zoo:fashion-mnist --label Bag,Coat --scale 2 --steps 20 --transition heun
        quieten sample ./my-diffusers-model --steps 50 --transition ddim --npz samples.npz -n 1000
        quieten sample zoo:fashion-mnist --transition rk45 --option rtol=1e-3 --option atol=1e-3
        quieten sample zoo:fashion-mnist --steps 10 --transition ocm
        quieten sample zoo:fashion-mnist --guide Bag --scale 6 --steps 10
        quieten sample zoo:fashion-mnist --guide superres:4 --measurement shoe.png -n 8
    """
    from ..commands.sample import sample as run

    run(
        source, steps=steps, transition=transition, n=n, seed=seed, label=label, prompt=prompt, scale=scale, guide=guide,
        classifier=classifier, measurement=measurement, mask=mask, std=std, eta=eta, options=options or [], variance=variance,
        policy=policy, clip=clip, spacing=grid, out=out, npz=npz, batch=batch, weights=weights, device=device,
    )  # fmt: skip


@app.command(rich_help_panel=MAKE)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the run and its report.")] = Path("runs/demo"),
    changes: Overrides = None,
    n: Annotated[int, typer.Option("-n", "--n", min=100, help="Samples for each row of the table.")] = 1000,
) -> None:
    """Train on real handwritten digits, sample with four solvers, measure; all of it in minutes.

    Writes report.html, one self-contained page, into the folder.
    """
    from ..demo import demo as run

    if run(out, changes or [], n=n) is None:
        raise typer.Exit(130)
