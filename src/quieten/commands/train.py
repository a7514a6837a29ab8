"""`quieten train`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

__all__ = ["train"]


def train(recipe: str, *, out: Path | None, changes: Sequence[str], data: Path | None, download: bool) -> bool:
    """Trains a recipe, or resumes its run; returns whether it is done (not stopped by Ctrl-C)."""
    from ..fit import train as run

    if data is not None and not data.expanduser().exists():  # it would be looked for elsewhere, and found perhaps
        raise ValueError(f"`--data {data}` is not there: name the folder that holds the data set, or leave it out")
    extra = [f"data.folder={json.dumps(str(data.expanduser().resolve()))}"] if data else []
    summary = run(recipe, [*changes, *extra, *(["data.download=true"] if download else [])], out)
    if os.environ.get("RANK", "0") == "0":
        print(summary.message)
        if summary.done:
            print(f"quieten sample {summary.path}")
    return summary.done
