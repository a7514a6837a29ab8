"""Writing files so that an interruption or a full disk never damages what was there."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

__all__ = ["write_atomic"]


def write_atomic(path: str | Path, data: bytes) -> Path:
    """Writes data to path and returns it; readers see the old file or the new one, never a part.

    Missing folders are made. If anything fails (full disk, interrupt) the old file stays and nothing else
    remains.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # in the same folder, since a rename is atomic only within one file system; the umask applies as usual
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return path
