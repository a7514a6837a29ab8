"""`quieten variance`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..covariance import VarianceSource
from ..data import Dataset, load
from ..files import writing
from ..noise import Draws
from ..objective import noised_by
from ..source import Source, open_source
from ..variance import KINDS, load_variance, variance_names
from ..variance_fit import PLAN, fit_variance, schedule_ends, training_levels
from ..wrap import WithCovariance

__all__ = ["calibration", "fit", "show"]


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
    return fitted.file is not None


def _check_kind(kind: str | None) -> None:
    known = (*KINDS, "analytic")
    if kind is not None and kind not in known:
        from ..parts import nearest

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


# ---- calibration


def calibration(
    opened: Source, data: Dataset, names: Sequence[str], lams: Tensor, n: int, seed: int = 0, batch: int = 64
) -> dict[str, list[dict[str, float]]]:
    """How variances compare with the squared errors of x0, by name and level.

    Arguments:
        opened: The model.
        data: Examples it did not see.
        names: Variances.
        lams: Levels (L,).
        n: Examples at each level.
        seed: Of the noise.
        batch: Examples at once.

    Returns:
        For each level "lam", "ratio" (mean squared error / mean variance), "score" (what the variational bound of a step to
        the next level pays for this variance: the mean of log u + error / u, u the variance plus that of the step's own noise
        seen from x0, in the coordinates in which it is diagonal), "error" (mean squared error), "clamped" (share below 0).
    """
    device = opened.denoiser.device
    out: dict[str, list[dict[str, float]]] = {}
    for name in names:
        source = load_variance(opened.variances, name, opened.denoiser, cap=1.0)
        model = WithCovariance(opened.denoiser, source)
        rows = []
        for step, lam in enumerate(lams.tolist()):
            finer = lams[lams > lam]
            gap = float(finer.min() if len(finer) else lam + 1.0) - lam
            own = math.exp(-lam - gap) / -math.expm1(-gap)  # w / b^2 of the kernel
            sums = torch.zeros(4, dtype=torch.float64)
            if isinstance(source, VarianceSource):
                source.clear()
            for index in torch.arange(min(n, len(data))).split(batch):
                x0, label = data.batch(index)
                x0 = x0.to(device)
                noised = noised_by(
                    opened.denoiser.process, x0, torch.full((len(x0),), lam, dtype=torch.float64), Draws(seed, step, index)
                )
                cond = {"label": label.to(device)} if label is not None and opened.classes else {}
                with torch.no_grad():
                    p = model(noised.x_t, lam, **cond)
                residual = x0 - p.mean
                square = (residual if p.basis is None else p.basis.forward(residual)).square().double()
                var = p.var.double().to(square).expand_as(square)
                sums += torch.stack(
                    [square.sum(), var.sum(), ((var + own).log() + square / (var + own)).sum(), var.new_tensor(var.numel())]
                ).cpu()
            error, mean, score = (sums[:3] / sums[3]).tolist()
            clamped = source.clamped.below if isinstance(source, VarianceSource) else 0.0
            rows.append(
                {"lam": lam, "ratio": error / mean if mean else math.inf, "score": score, "error": error, "clamped": clamped}
            )
        out[name] = rows
    return out


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
    rows = calibration(opened, examples(opened, data, split), wanted, lams, n, seed)
    width = max(map(len, wanted))
    print(f"{'':{width}s}  log-SNR  error/variance    score  clamped")
    for name, lines in rows.items():
        for line in lines:
            print(f"{name:{width}s} {line['lam']:8.2f} {line['ratio']:15.3f} {line['score']:8.3f} {line['clamped']:8.2%}")
    out = (opened.variances[0] / "calibration.png") if out is None else out.expanduser()
    _draw(rows, out)
    print(out)


def _draw(rows: dict[str, list[dict[str, float]]], out: Path) -> None:
    """Two curves over the levels: error / variance, and the score relative to the best at each level."""
    import io

    from matplotlib.figure import Figure

    from ..files import write_atomic

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    best = [min(line["score"] for line in level) for level in zip(*rows.values(), strict=True)]
    for name, lines in rows.items():
        lam = [line["lam"] for line in lines]
        left.plot(lam, [line["ratio"] for line in lines], ".-", label=name)
        right.plot(lam, [line["score"] - b for line, b in zip(lines, best, strict=True)], ".-", label=name)
    left.set(xlabel="log-SNR", ylabel="squared error / variance", yscale="log")
    left.axhline(1.0, color="grey", lw=0.8)
    right.set(xlabel="log-SNR", ylabel="score above the best")
    left.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    with writing(out):
        write_atomic(out, buffer.getvalue())
