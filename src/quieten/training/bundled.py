"""What comes with the library, by name: trained models, and beside each its variances, policies, classifier and statistics."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["ZOO", "Bundle", "bundled", "bundles", "full_name"]

ZOO = Path(__file__).parents[1] / "zoo"


def bundled(name: str, folder: str = "", ending: str = "", what: str = "model", suffix: str = ".safetensors") -> Path:
    """The file of a name, which may be cut short where that is clear: "fashion" for "fashion-mnist".

    Arguments:
        name: With or without "zoo:" before it.
        folder: Within the zoo.
        ending: What its names end in, such as "-noisy"; it need not be typed.
        what: What it is, for the error.
        suffix: Of the file.

    Raises:
        ValueError: If there is none of that name, or several begin with it.
    """
    short = name.removeprefix("zoo:")
    files = {file.stem: file for file in sorted((ZOO / folder).glob(f"*{ending}{suffix}"), key=lambda file: file.stem)}
    if short in files:
        return files[short]
    meant = [stem for stem in files if short and stem.startswith(short)]
    if meant and all(stem.startswith(meant[0]) for stem in meant):  # the shortest comes first
        return files[meant[0]]
    known = ", ".join(name.removesuffix(short) + stem for stem in meant or files) or "none"
    if meant:
        raise ValueError(f"{name!r} is short for several: {known}")
    raise ValueError(f"no {what} {name!r} comes with the library (known: {known})")


def full_name(source: str) -> str:
    """A source with a model of the zoo named in full: "zoo:fashion-mnist" for "zoo:fashion"; all else as it is.

    Raises:
        ValueError: As `bundled`.
    """
    return f"zoo:{bundled(source).stem}" if source.startswith("zoo:") else source


# ---- the list


@dataclass(frozen=True)
class Bundle:
    """A model of the zoo and what belongs to it.

    Attributes:
        name: Its name, without "zoo:".
        file: The denoiser.
        variances: Names of its variances.
        policies: Names of its policies.
        classifiers: Files of the classifiers of its data.
        statistics: Features of its data, None without.
        log: Its training, None without.
        quality: What was measured, as `quality.json` has it.
    """

    name: str
    file: Path
    variances: tuple[str, ...] = ()
    policies: tuple[str, ...] = ()
    classifiers: tuple[Path, ...] = ()
    statistics: Path | None = None
    log: Path | None = None
    quality: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        beside = [file for what in ("variance", "policy") for file in (ZOO / what / self.name).glob("*")]
        files = [self.file, *self.classifiers, self.statistics, self.log, *beside]
        return sum(file.stat().st_size for file in files if file is not None)


def bundles() -> list[Bundle]:
    """All models of the zoo, by name."""
    quality = ZOO / "quality.json"
    measured = json.loads(quality.read_text("utf-8")) if quality.is_file() else {}

    def found(path: Path) -> Path | None:
        return path if path.is_file() else None

    def beside(what: str, name: str) -> tuple[str, ...]:
        return tuple(sorted(file.stem for file in (ZOO / what / name).glob("*.safetensors")))

    return [
        Bundle(
            name := file.stem,
            file,
            beside("variance", name),
            beside("policy", name),
            tuple(sorted((ZOO / "classifiers").glob(f"{name}*.safetensors"))),
            found(ZOO / "statistics" / f"{name}.npz"),
            found(ZOO / "logs" / f"{name}.jsonl"),
            measured.get(name, {}),
        )
        for file in sorted(ZOO.glob("*.safetensors"))
    ]
