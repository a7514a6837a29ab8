"""Variances that were fitted to a denoiser: made by name, kept as files beside it, and read back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..basis import DCT
from ..covariance import Analytic, Fisher, HessianDiagonal, Learned, Residual, SecondMoment, Source, Unit, VarianceSource
from ..denoiser import Denoiser
from ..files import named_file, write_atomic, writing
from .heads import Complex, Separate, Simple, make_head, network_of
from .jacobian import Probed

__all__ = [
    "KINDS",
    "UNTRAINED",
    "carry_variances",
    "fingerprint",
    "load_variance",
    "make_variance",
    "save_variance",
    "untrained",
    "variance_names",
]

KINDS: dict[str, type[Learned]] = {
    "ocm": HessianDiagonal,
    "sn": SecondMoment,
    "npr": Residual,
    "mixed": HessianDiagonal,
}
"""What a head can be trained to predict -> the source that reads it; also the modes of `matching.CovarianceMatching`."""

UNTRAINED = ("big", "fisher", "probed")
"""Names that need no file: variance of N(0, 1) data, 1 - eps^2, and Jacobian probes at every step."""

FORMAT = 1


def make_variance(
    kind: str,
    denoiser: Denoiser,
    head: Literal["simple", "complex", "separate"] = "complex",
    basis: Literal["pixel", "dct"] = "pixel",
    block: int = 4,
    link: Literal["unit", "linear"] = "unit",
    cap: list[float] | float | None = None,
) -> Learned:
    """A source with an untrained head for a denoiser.

    Arguments:
        kind: One of `KINDS`.
        denoiser: What it is for.
        head: See `heads.make_head`.
        basis: Where the variance is diagonal: single pixels, or cosine coefficients of blocks.
        block: Side of those blocks.
        link: See `covariance.Learned`.
        cap: Largest variance of x0 in a pixel, or one for each channel; None for no bound.

    Raises:
        ValueError: For unknown names, or a denoiser that the head does not fit.
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(KINDS)} (got {kind!r})")
    if basis not in ("pixel", "dct"):
        raise ValueError(f"`basis` must be 'pixel' or 'dct' (got {basis!r})")
    cosines = DCT(block) if basis == "dct" else None
    if cosines is not None and denoiser.shape is not None:
        cosines.check(torch.empty(0, *denoiser.shape, device="meta"))
    made = make_head(denoiser, head, 1 if cosines is None else block)
    return KINDS[kind](made, link=link, basis=cosines, cap=_bounds(cap))


def untrained(name: str, cap: Tensor | float | None = None) -> Source:
    """A source that needs no fitting, by a name in `UNTRAINED`."""
    return Unit() if name == "big" else Fisher(cap=cap) if name == "fisher" else Probed(cap=cap)


def fingerprint(denoiser: Denoiser) -> str:
    """SHA-256 of the network's weights, by which a variance knows the denoiser it was fitted to."""
    state = (network_of(denoiser) or denoiser).state_dict()
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def described(source: Learned, denoiser: Denoiser) -> dict[str, Any]:
    """How to build a source again, for `save_variance`."""
    heads = {Simple: "simple", Complex: "complex", Separate: "separate"}
    cap = None if source.cap is None else source.cap.flatten().tolist()
    return {
        "kind": next(name for name, kind in KINDS.items() if type(source) is kind),
        "head": heads.get(type(source.head), "simple"),
        "basis": "pixel" if source.basis is None else "dct",
        "block": source.basis.block if isinstance(source.basis, DCT) else 4,
        "link": source.link,
        "cap": cap[0] if cap is not None and len(cap) == 1 else cap,
        "trunk": fingerprint(denoiser),
    }


# ---- files


def save_variance(folder: str | Path, name: str, source: VarianceSource, facts: Mapping[str, Any]) -> Path:
    """Writes FOLDER/NAME.safetensors (float16 for heads, float64 for tables) and FOLDER/NAME.json.

    Arguments:
        folder: Usually `variance` in a run.
        name: What it is loaded by.
        source: Fitted.
        facts: How to build it again (the arguments of `make_variance`), and what it was fitted to and how.
    """
    tensors = {key: _halved(tensor) for key, tensor in source.state_dict().items()}
    return _written(Path(folder), tensors, {"format": FORMAT, "name": name, **facts})


def _written(folder: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
    from ..training.weights import packed

    name, text = facts["name"], json.dumps(facts, indent=1) + "\n"
    with writing(folder):
        write_atomic(folder / f"{name}.safetensors", packed(tensors, {"variance": text}))
        write_atomic(folder / f"{name}.json", text.encode())
    return folder / f"{name}.safetensors"


def carry_variances(folder: Path, target: Path, before: Denoiser, after: Denoiser) -> list[Path]:
    """Copies variances to a rounded copy of the denoiser they were fitted to, and returns their files.

    Arguments:
        folder: Where they lie; those that belong to other weights stay there.
        target: Where to put them.
        before: What they were fitted to.
        after: The same network with rounded weights: what they are for from now on; how it was before is kept in their facts.
    """
    from ..training.weights import read_tensors

    written = []
    for name in variance_names([folder]):
        file = folder / f"{name}.safetensors"
        tensors, metadata = read_tensors(file)
        facts = _facts(file, metadata)
        if facts["trunk"] == fingerprint(before):
            written.append(_written(target, tensors, {**facts, "trunk": fingerprint(after), "fitted_to": facts["trunk"]}))
    return written


def variance_names(folders: Sequence[Path]) -> list[str]:
    """The variances that lie in some folders."""
    return sorted({file.stem for folder in folders for file in folder.glob("*.safetensors")})


def load_variance(
    where: str | Path | Sequence[Path], name: str, denoiser: Denoiser, *, cap: Tensor | float | None = None
) -> Source:
    """A variance by name: of `UNTRAINED`, or read from a folder.

    Arguments:
        where: The folder, or several in the order in which they are searched.
        name: Its name, or FOLDER/NAME, or the path of its .safetensors file.
        denoiser: What it was fitted to.
        cap: Bound of untrained ones; fitted ones bring theirs.

    Raises:
        ValueError: If there is none of that name, it is damaged, or it was fitted to other weights.
    """
    from ..training.weights import read_tensors, restore

    if name in UNTRAINED:
        return untrained(name, cap)
    folders = [Path(where)] if isinstance(where, str | Path) else list(where)
    file = named_file(folders, name)
    if file is None:
        from ..training.parts import nearest

        known = variance_names(folders)
        have = f"fitted: {', '.join(known)}" if known else "none is fitted yet"
        raise ValueError(f"no variance {name!r} for this model{nearest(name, known)} ({have}; without fitting: "
                         f"{', '.join(UNTRAINED)}): fit it with `quieten variance fit`")  # fmt: skip
    tensors, metadata = read_tensors(file, "fit the variance again")
    facts = _facts(file, metadata)
    if facts["trunk"] != fingerprint(denoiser):
        raise ValueError(f"{file} was fitted to other weights of the denoiser: fit it again, or load the weights it belongs to")
    if facts["kind"] == "analytic":
        return Analytic(tensors["lam"], tensors["m"], tensors["error"], cap=_bounds(facts["cap"]))
    keys = ("head", "basis", "block", "link", "cap")
    source = make_variance(facts["kind"], denoiser, **{key: facts[key] for key in keys})
    restore(source, {key: t.float() if t.dtype == torch.float16 else t for key, t in tensors.items()}, file)
    return source.to(_device(denoiser)).eval().requires_grad_(False)


def _facts(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(metadata["variance"])
        missing = [key for key in ("kind", "trunk", "cap") if key not in facts]
    except (KeyError, ValueError):
        missing, facts = ["variance"], {}
    if missing or facts.get("format") != FORMAT:
        raise ValueError(f"{file} is no variance of format {FORMAT} ({', '.join(missing) or 'format'} is missing or other): "
                         "fit it again with `quieten variance fit`")  # fmt: skip
    return facts


def _halved(tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.dtype == torch.float32 else tensor


def _device(denoiser: nn.Module) -> torch.device:
    return next((t.device for t in (*denoiser.parameters(), *denoiser.buffers())), torch.device("cpu"))


def _bounds(cap: list[float] | float | None) -> Tensor | float | None:
    return torch.tensor(cap).reshape(-1, 1, 1) if isinstance(cap, list) else cap
