"""Runs: folders that hold a recipe, its weights and all that training needs to go on."""

from __future__ import annotations

import difflib
import io
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import yaml
from torch import Tensor, nn

from ..denoiser import Preconditioned
from ..files import sync_folder, write_atomic, writing
from ..objective import Update
from .bundled import bundled
from .config import Recipe, build_denoiser, build_encoder, build_objective, build_schedule, parse_recipe
from .weights import brief, packed, read_tensors, restore

if TYPE_CHECKING:
    from ..encoder import Encoder
    from ..schedule import Schedule

__all__ = [
    "Checkpoint",
    "Companions",
    "Run",
    "build_update",
    "export",
    "load",
    "load_companions",
    "load_with_recipe",
]

WEIGHTS = ("model", "ema")
PREFIX, BESIDE = "denoiser.", "objective."
"""Weights of a run are those of its `Update`; what belongs to the denoiser begins with the one, the rest with the other."""

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Checkpoint:
    """All of a training run at one step.

    Attributes:
        step: Optimiser steps taken.
        model: Tensors of the `Update`, by name.
        ema: Their averages.
        optimizer: The optimiser's state: tensors and numbers only.
        seconds: Time spent training so far.
    """

    step: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Any]
    seconds: float = 0.0


@dataclass(frozen=True)
class Companions:
    """What is trained beside a denoiser, in evaluation mode.

    Attributes:
        schedule: The curve of levels; as the recipe has it where it is not learned.
        encoder: The encoder of the bound; None without.
        excess: Relative excess of the reverse variance for each of the bound's steps, see `bound.Widened`; None without.
    """

    schedule: Schedule
    encoder: Encoder | None = None
    excess: Tensor | None = None


class Run:
    """A folder with `config.yaml`, `model.safetensors`, `ema.safetensors`, `metrics.jsonl`, `samples/` and `state/`.

    `state/step-N/` are complete checkpoints; `state/latest` names the one to go on from. The weights beside `config.yaml` are
    those of the latest checkpoint.

    Arguments:
        path: The folder.
        recipe: What `config.yaml` says.
    """

    def __init__(self, path: Path, recipe: Recipe):
        self.path, self.recipe = path, recipe

    @classmethod
    def create(cls, path: str | Path, recipe: Recipe) -> Run:
        """Makes a new run.

        Arguments:
            path: Its folder, new or without a `config.yaml`.
            recipe: With the data's shape, see `config.resolve`.

        Raises:
            ValueError: If a run is there already, or the recipe lacks the shape.
        """
        path = Path(path).expanduser()
        if recipe.data.shape is None:
            raise ValueError("`recipe` does not know the data's shape: pass it through config.resolve(recipe, data)")
        if (path / "config.yaml").exists():
            raise ValueError(f"`path` {path} holds a run already: open it with Run.open to go on, or name another folder")
        run = cls(path, recipe)
        run.write_config()
        return run

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Opens a run.

        Raises:
            ValueError: If there is none, naming those beside it, or if its config cannot be read.
        """
        path = Path(path).expanduser()
        file = path / "config.yaml"
        if not file.is_file():
            raise ValueError(f"no run in {path}{_beside(path)}: train one with `quieten train RECIPE --out {path}`")
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{file} cannot be read ({' '.join(str(error).split())}): restore it, or train anew") from None
        return cls(path, parse_recipe(content, str(file)))

    def write_config(self) -> None:
        """Writes the recipe, complete."""
        with writing(self.path / "config.yaml"):
            write_atomic(self.path / "config.yaml", self.recipe.to_yaml().encode())

    def denoiser(self, weights: str = "ema", device: torch.device | str = "cpu") -> Preconditioned:
        """The trained denoiser, in evaluation mode.

        Arguments:
            weights: "ema" (the averaged weights) or "model" (the latest).
            device: Where to.

        Raises:
            ValueError: If there are no weights yet, or they are damaged or of another architecture.
        """
        file, tensors = self._tensors(weights)
        denoiser = _fresh(lambda: build_denoiser(self.recipe))
        restore(denoiser, _under(PREFIX, tensors), file)
        return denoiser.to(device).eval().requires_grad_(False)

    def companions(self, weights: str = "ema", device: torch.device | str = "cpu") -> Companions:
        """What was trained beside the denoiser; arguments and errors as in `denoiser`."""
        file, tensors = self._tensors(weights)
        return _companions(self.recipe, tensors, file, device)

    def _tensors(self, weights: str) -> tuple[Path, dict[str, Tensor]]:
        if weights not in WEIGHTS:
            raise ValueError(f"`weights` must be 'ema' or 'model' (got {weights!r})")
        file = self.path / f"{weights}.safetensors"
        if not file.is_file():
            raise ValueError(f"{self.path} has no {file.name} yet: train it first with `quieten train`")
        return file, read_tensors(file)[0]

    # -- checkpoints

    def latest(self) -> Path | None:
        """The folder of the latest complete checkpoint."""
        state = self.path / "state"
        pointer = state / "latest"
        if pointer.is_file():
            folder = state / pointer.read_text(encoding="utf-8").strip()
            if folder.is_dir():
                return folder
        return max(state.glob("step-*"), default=None)  # names sort by step; each was renamed when complete

    def read(self) -> Checkpoint | None:
        """The latest checkpoint; None before the first.

        Raises:
            ValueError: If it is damaged, naming the file.
        """
        folder = self.latest()
        if folder is None:
            return None
        remedy = f"restore it from a copy, or remove {folder} to train from the start"
        model, ema = (read_tensors(folder / f"{name}.safetensors", remedy)[0] for name in WEIGHTS)
        file = folder / "optimizer.pt"
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises whatever the damaged bytes lead to
            raise ValueError(f"{file} is damaged ({brief(error)}): {remedy}") from None
        return Checkpoint(state["step"], model, ema, state["optimizer"], state["seconds"])

    def save(self, checkpoint: Checkpoint) -> Path:
        """Writes a checkpoint: complete, or not at all, and the one before it stays until this one is on the disk.

        Raises:
            ValueError: If the disk is full or refuses; nothing that was there is damaged.
        """
        state = self.path / "state"
        folder, part = state / f"step-{checkpoint.step:09d}", state / f".part-{checkpoint.step:09d}"
        with writing(folder, f"the checkpoint before it in {state} is intact"):
            for left in state.glob(".part-*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            try:
                part.mkdir(parents=True)
                for name in WEIGHTS:
                    write_atomic(part / f"{name}.safetensors", packed(getattr(checkpoint, name)))
                write_atomic(part / "optimizer.pt", _pickled(checkpoint))
                sync_folder(part)
                if folder.exists():  # saved twice at the same step: the new one is as good
                    shutil.rmtree(folder)
                part.rename(folder)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
            sync_folder(state)
            write_atomic(state / "latest", folder.name.encode())
            for name in WEIGHTS:
                _publish(folder / f"{name}.safetensors", self.path / f"{name}.safetensors")
        for old in state.glob("step-*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
        return folder

    # -- metrics

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, oldest first; a last line that was cut off is left out."""
        file = self.path / "metrics.jsonl"
        rows = []
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return rows

    def log(self, row: Mapping[str, Any]) -> None:
        """Appends a line to `metrics.jsonl`."""
        with writing(self.path / "metrics.jsonl"), (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rewind(self, step: int) -> None:
        """Drops the metrics of steps after `step`, which will be written again."""
        rows = self.metrics()
        kept = [row for row in rows if row.get("step", 0) <= step]
        with writing(self.path / "metrics.jsonl"):
            write_atomic(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept).encode())


# ---- what users call


def load(path_or_name: str | Path, weights: str = "ema", device: torch.device | str = "cpu") -> Preconditioned:
    """The denoiser of a run, of an exported file, or "zoo:NAME" of those that come with the library.

    Arguments:
        path_or_name: A run's folder, a .safetensors file written by `export`, or "zoo:NAME".
        weights: Of a run: "ema" or "model".
        device: Where to.

    Raises:
        ValueError: If there is no such thing, or it is damaged or of another architecture.
    """
    return load_with_recipe(path_or_name, weights, device)[0]


def load_companions(path_or_name: str | Path, weights: str = "ema", device: torch.device | str = "cpu") -> Companions:
    """What was trained beside the denoiser that `load` returns; arguments and errors as there."""
    file = _file_of(path_or_name)
    if file is None:
        return Run.open(path_or_name).companions(weights, device)
    return _companions(_recipe_in(file), read_tensors(file)[0], file, device)


def load_with_recipe(
    path_or_name: str | Path, weights: str = "ema", device: torch.device | str = "cpu"
) -> tuple[Preconditioned, Recipe]:
    """As `load`, with the recipe, which knows the classes and how to sample."""
    file = _file_of(path_or_name)
    if file is not None:
        return _exported(file, device)
    run = Run.open(path_or_name)
    return run.denoiser(weights, device), run.recipe


def export(run: Run, path: str | Path, half: bool = True, weights: str = "ema") -> Path:
    """Writes the denoiser of a run as one file that `load` reads: weights, and the recipe in the metadata.

    Variances that were fitted to those weights go along, into a folder beside it that ends in .variance instead.

    Arguments:
        run: A trained run.
        path: The file, ending in .safetensors.
        half: Store float32 weights of the denoiser as float16.
        weights: "ema" or "model".
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise ValueError(f"`path` must end in .safetensors (got {path})")
    _, everything = run._tensors(weights)
    beside = {name: tensor for name, tensor in everything.items() if name.startswith(BESIDE)}
    tensors = {**run.denoiser(weights).state_dict(), **beside}
    if half:
        tensors = {
            name: tensor.half() if tensor.dtype == torch.float32 and not name.startswith(BESIDE) else tensor
            for name, tensor in tensors.items()
        }
    with writing(path):
        write_atomic(path, packed(tensors, {"config": run.recipe.to_yaml()}))
    if (run.path / "variance").is_dir():
        from ..covariances.stored import carry_variances

        carry_variances(run.path / "variance", path.with_suffix(".variance"), run.denoiser(weights), load(path))
    return path


def build_update(recipe: Recipe, data: Any = None) -> Update:
    """Denoiser and objective, freshly initialised from `train.seed`: the same on every process."""
    return _fresh(lambda: Update(build_denoiser(recipe), build_objective(recipe, data)), recipe.train.seed)


# ---- inside


def _file_of(path_or_name: str | Path) -> Path | None:
    """The exported file that a name means; None for the folder of a run."""
    name, path = str(path_or_name), Path(path_or_name).expanduser()
    if name.startswith("zoo:"):
        return bundled(name)
    return path if path.is_file() and path.suffix == ".safetensors" else None


def _recipe_in(file: Path) -> Recipe:
    _, metadata = read_tensors(file)
    if "config" not in metadata:
        raise ValueError(f"{file} holds no recipe in its metadata: name a run, or a file written by `export`")
    return parse_recipe(yaml.safe_load(metadata["config"]), str(file))


def _exported(file: Path, device: torch.device | str) -> tuple[Preconditioned, Recipe]:
    recipe, tensors = _recipe_in(file), read_tensors(file)[0]
    denoiser = _fresh(lambda: build_denoiser(recipe))
    own = {n: t.float() if t.dtype == torch.float16 else t for n, t in tensors.items() if not n.startswith(BESIDE)}
    restore(denoiser, own, file)
    return denoiser.to(device).eval().requires_grad_(False), recipe


def _companions(recipe: Recipe, tensors: Mapping[str, Tensor], file: Path, device: torch.device | str) -> Companions:
    def trained(module: M, prefix: str) -> M:
        restore(module, _under(prefix, tensors), file)
        return module.to(device).eval().requires_grad_(False)

    schedule = trained(_fresh(lambda: build_schedule(recipe)), f"{BESIDE}schedule.")
    encoder = _fresh(lambda: build_encoder(recipe))
    return Companions(
        schedule, None if encoder is None else trained(encoder, f"{BESIDE}encoder."), tensors.get(f"{BESIDE}excess")
    )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _fresh(make: Any, seed: int = 0) -> Any:
    """What `make` makes, initialised from a seed, leaving torch's global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _pickled(checkpoint: Checkpoint) -> bytes:
    buffer = io.BytesIO()
    content = {"step": checkpoint.step, "seconds": checkpoint.seconds, "optimizer": checkpoint.optimizer}
    torch.save(content, buffer)
    return buffer.getvalue()


def _publish(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`, at once; a copy where the file system has no hard links."""
    part = target.with_name(f".{target.name}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(source, part)
    except OSError:
        write_atomic(target, source.read_bytes())
        return
    part.replace(target)


def _beside(path: Path) -> str:
    """The runs near a path that holds none, for the error."""
    runs = sorted(file.parent for file in path.parent.glob("*/config.yaml")) if path.parent.is_dir() else []
    if not runs:
        return f" (none in {path.parent} either)"
    near = difflib.get_close_matches(path.name, [run.name for run in runs], n=1)
    hint = f"did you mean {path.parent / near[0]}? " if near else ""
    return f" ({hint}runs in {path.parent}: {', '.join(run.name for run in runs)})"
