"""Denoisers as folders that diffusers loads."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path
from typing import Any

import torch

from ..covariance import Learned
from ..covariances.stored import described, save_variance
from ..denoiser import Denoiser, Preconditioned
from ..files import sync_tree
from ..process import VP
from ..schedule import Table
from ..wrap import WithCovariance
from .levels import FORMS, Index, betas
from .network import Network

__all__ = ["to_diffusers"]


def to_diffusers(denoiser: Denoiser, path: str | Path, *, clip: float | None = None) -> Path:
    """Writes a folder that `diffusers.DDPMPipeline.from_pretrained(path)` loads and samples from.

    The folder appears whole or not at all. Its scheduler is a DDPMScheduler, with the betas of the denoiser's table; or, for a
    denoiser with a fitted variance, an OptimalCovarianceScheduler, which diffusers finds where this library is installed.

    Arguments:
        denoiser: A `Preconditioned` around an unconditional UNet2DModel, in VP, that predicts eps, x0 or v at the indices of a
            `Table`: what `from_diffusers(model, scheduler=...)` gives, before or after training. Or a `WithCovariance` of it,
            with a head that reads its features.
        path: A new or empty folder.
        clip: The pipeline clips its estimates of x0 to [-clip, clip]; None does not clip.

    Raises:
        ValueError: If diffusers has no such pipeline, or if something lies at `path`.
        ImportError: Without diffusers.
    """
    import diffusers

    source = denoiser.source if isinstance(denoiser, WithCovariance) else None
    if isinstance(denoiser, WithCovariance) and not isinstance(source, Learned):
        raise ValueError(f"`denoiser` has a variance of class {type(source).__name__}: what works is one with a head")
    made, table = _exportable(denoiser.inner if isinstance(denoiser, WithCovariance) else denoiser)
    net: Any = made.net
    if clip is not None and not clip > 0:
        raise ValueError(f"`clip` must be positive (got {clip})")
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"`path` {target} is not an empty folder: give a new one, nothing is overwritten")
    options = {
        "num_train_timesteps": len(table),
        **_chain(table),
        "prediction_type": next(theirs for theirs, ours in FORMS.items() if ours == made.form),
        "clip_sample": clip is not None,
        "clip_sample_range": 1.0 if clip is None else float(clip),
    }
    unet: Any
    scheduler: Any
    if isinstance(source, Learned):
        from .optimal import pipeline_parts

        unet, scheduler = pipeline_parts(net.model, source, options)
    else:
        variance = "learned_range" if made.learned_range else "fixed_small"
        unet, scheduler = net.model, diffusers.DDPMScheduler(**options, variance_type=variance)
    pipeline: Any = diffusers.DDPMPipeline(unet=unet, scheduler=scheduler)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        pipeline.save_pretrained(part, safe_serialization=True)
        if isinstance(source, Learned):
            save_variance(part / "variance", "ocm", source, described(source, made))
        sync_tree(part)
        part.replace(target)  # an empty folder gives way, any other does not
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return target


def _exportable(denoiser: Denoiser) -> tuple[Preconditioned, Table]:
    """A denoiser and its table, if a DDPMPipeline can express it."""
    works = "what works is an unconditional UNet2DModel in VP with 'eps', 'x0' or 'v' at the indices of a Table"
    if not isinstance(denoiser, Preconditioned):
        raise ValueError(f"`denoiser` is a {type(denoiser).__name__}: {works}, as a bare Preconditioned")
    net = denoiser.net
    if not isinstance(net, Network) or net.kind != "UNet2DModel":
        kind = type(net.model if isinstance(net, Network) else net).__name__
        raise ValueError(f"`denoiser` holds a {kind}, which DDPMPipeline cannot load without its code: {works}")
    if net.conditions:
        raise ValueError("`denoiser` is class-conditional, and DDPMPipeline passes no labels: save the network alone with "
                         "denoiser.net.model.save_pretrained(path)")  # fmt: skip
    embed: Any = denoiser.embed
    table = embed.table if isinstance(embed, Index) else getattr(embed, "__self__", None)
    if denoiser.process is not VP or denoiser.form not in ("eps", "x0", "v") or not isinstance(table, Table):
        raise ValueError(f"`denoiser` ({denoiser.extra_repr()}) is no chain of betas: {works}")
    if denoiser.sigma_data not in (None, 1.0):
        raise ValueError(
            f"`denoiser` scales its input by sigma_data={denoiser.sigma_data}, which a DDPMPipeline does not: {works}"
        )
    if net.shape is None:
        raise ValueError("`denoiser`: its UNet2DModel has no sample_size, which DDPMPipeline needs: make it with one")
    return denoiser, table


def _chain(table: Table) -> dict[str, Any]:
    """The betas of a table as arguments of a scheduler: by name where a named schedule fits, else one by one."""
    log_alpha2 = torch.nn.functional.logsigmoid(table.lam)
    steps = torch.diff(log_alpha2, prepend=log_alpha2.new_zeros(1))
    chain = -torch.expm1(steps)
    for name in ("linear", "scaled_linear"):
        ends = {"beta_start": float(chain[0]), "beta_end": float(chain[-1]), "beta_schedule": name}
        if torch.allclose(betas({**ends, "num_train_timesteps": len(table)}), chain, rtol=1e-6, atol=0.0):
            return ends
    return {"trained_betas": chain.tolist()}
