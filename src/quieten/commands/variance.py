"""`quieten variance`."""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..covariances.fit import PLAN, fit_variance, schedule_ends, training_levels
from ..covariances.stored import KINDS, load_variance, variance_names
from ..data import Dataset, load
from ..files import given_name, named_file, writing
from ..metrics import Result, calibration
from ..training.source import Source, open_source
from ..wrap import WithCovariance

__all__ = ["fit", "show"]


def fit(
    source: str,
    data: str,
    *,
    images: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    weights: str = "ema",
    device: str | None = None,
    **options: Any,
) -> bool:
    """Fits a variance and says where it is; the arguments are the command's options. False if it was interrupted.

    Options that are None are those of the section `variance` in the run's recipe, or the defaults of `fit_variance`.

    Raises:
        ValueError: For options that the model cannot serve.
    """
    _check_kind(options.get("kind"))
    opened = open_source(source, weights, device)
    given = {"images": images, "batch": batch, "lr": lr, **options}
    wanted: dict[str, Any] = {
        name: value for name, value in opened.fitting.items() if name not in ("cap", "trunk") and value is not None
    }
    if given.get("kind") not in (None, wanted.get("kind")):
        wanted = {}  # what the recipe says is for another kind
    wanted |= {name: value for name, value in given.items() if value is not None}
    if wanted.get("kind") == "analytic":
        wanted.setdefault("images", 500)
    changes: dict[str, Any] = {name: wanted.pop(name) for name in ("images", "batch", "lr") if name in wanted}
    plan = type(PLAN)(**{**PLAN.model_dump(), **changes, "seed": seed})
    fitted = fit_variance(opened, examples(opened, data), train=plan, **wanted)
    print(fitted.message)
    if fitted.file is not None:
        print(shlex.join(["quieten", "sample", source, "--variance", given_name(opened.variances, fitted.file)]))
    return fitted.file is not None


def _check_kind(kind: str | None) -> None:
    known = (*KINDS, "analytic")
    if kind is not None and kind not in known:
        from ..training.parts import nearest

        raise ValueError(f"`--kind {kind}` is unknown{nearest(kind, known)} (known: {', '.join(known)})")


def examples(opened: Source, data: str, split: str = "train") -> Dataset:
    """The data of a name or path as the model takes them: of its size and channels, as latents for a latent model."""
    shape = opened.denoiser.shape
    pictures = opened.encode is None and shape is not None and len(shape) == 3 and shape[0] in (1, 3)
    size, channels = (shape[-1], shape[0]) if pictures and shape else (None, None)
    try:
        whole = load(data, split=split, size=size, channels=channels)
    except ValueError as error:
        if "floats" not in str(error):
            raise
        whole = load(data, split=split)
    if opened.encode is None or shape == whole.shape:
        return whole
    with torch.no_grad():
        latents = [opened.encode(whole.batch(index)[0]).cpu() for index in torch.arange(len(whole)).split(16)]
    return replace(whole, images=torch.cat(latents))


def show(
    source: str,
    data: str,
    *,
    names: str | None = None,
    n: int = 256,
    levels: int = 12,
    split: str = "test",
    out: Path | None = None,
    seed: int = 0,
    weights: str = "ema",
    device: str | None = None,
) -> None:
    """Prints a table and draws a picture of `calibration`; the arguments are the command's options.

    Raises:
        ValueError: If nothing was fitted, or a name is unknown.
    """
    opened = open_source(source, weights, device)
    wanted = names.split(",") if names else variance_names(opened.variances)
    if not wanted:
        raise ValueError(f"no variance was fitted to {source} yet: `quieten variance fit {source} {data}`, or --variance big")
    high, low = schedule_ends(training_levels(opened))
    lams = torch.linspace(low, high, levels, dtype=torch.float64)
    shown = examples(opened, data, split)
    shown = shown.subset(slice(min(n, len(shown))))
    rows = {name: _calibrated(opened, name, shown, lams, seed) for name in wanted}
    width = max(map(len, wanted))
    print(f"{'':{width}s}  log-SNR  error/variance    score  clamped")
    for name, lines in rows.items():
        for line in lines:
            d = line.details
            print(f"{name:{width}s} {d['lam']:8.2f} {line.figure():>15s} {d['score']:8.3f} {d['clamped']:8.2%}")
    out = (opened.variances[0] / "calibration.png") if out is None else out.expanduser()
    _draw(rows, out)
    print(out)


def _calibrated(opened: Source, name: str, data: Dataset, lams: Tensor, seed: int) -> list[Result]:
    source = load_variance(opened.variances, name, opened.denoiser, cap=1.0)
    x0, label = data.batch(torch.arange(len(data)))
    cond = {"label": label} if label is not None and opened.classes else {}
    file = named_file(opened.variances, name)
    return calibration(
        WithCovariance(opened.denoiser, source), x0, lams, cond=cond, seed=seed, name=name, reference_name=data.name,
        digest="" if file is None else hashlib.sha256(file.read_bytes()).hexdigest(), weights=opened.weights,
    )  # fmt: skip


def _draw(rows: dict[str, list[Result]], out: Path) -> None:
    """Two curves over the levels: error / variance, and the score relative to the best at each level."""
    import io

    from matplotlib.figure import Figure

    from ..files import write_atomic

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    best = [min(line.details["score"] for line in level) for level in zip(*rows.values(), strict=True)]
    for name, lines in rows.items():
        lam = [line.details["lam"] for line in lines]
        left.errorbar(lam, [line.value for line in lines], [line.uncertainty or 0.0 for line in lines], fmt=".-", label=name)
        right.plot(lam, [line.details["score"] - b for line, b in zip(lines, best, strict=True)], ".-", label=name)
    left.set(xlabel="log-SNR", ylabel="squared error / variance", yscale="log")
    left.axhline(1.0, color="grey", lw=0.8)
    right.set(xlabel="log-SNR", ylabel="score above the best")
    left.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    with writing(out):
        write_atomic(out, buffer.getvalue())
