"""Finding files by name, and writing them so that an interruption or a full disk never damages what was there."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["bare_name", "given_name", "named_file", "sync_folder", "sync_tree", "write_atomic", "writing"]


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


def sync_folder(path: str | Path) -> None:
    """Makes renames within a folder durable, where the system knows how."""
    if hasattr(os, "O_DIRECTORY"):
        _sync(path, os.O_DIRECTORY)


def sync_tree(path: str | Path) -> None:
    """Brings a folder and all in it to the disk."""
    for entry in Path(path).rglob("*"):
        if entry.is_dir():
            sync_folder(entry)
        else:
            _sync(entry)
    sync_folder(path)


def _sync(path: str | Path, flags: int = 0) -> None:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(path: str | Path, intact: str = "what was there before is intact") -> Iterator[None]:
    """Turns a failure to write into one line that says what to do.

    Raises:
        ValueError: In place of any OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"{path} cannot be written ({reason}): make room or name another folder; {intact}") from error


def named_file(folders: Sequence[Path], name: str) -> Path | None:
    """The file of a name: NAME.safetensors in the first folder that has it; None where there is none.

    A name that is a path, with a separator or ending in .safetensors, is looked up there alone; the ending may be left out.
    """
    files = [folder / f"{name}.safetensors" for folder in folders]
    if "/" in name or os.sep in name or name.endswith(".safetensors"):
        files = [Path(name.removesuffix(".safetensors") + ".safetensors").expanduser()]
    return next((file for file in files if file.is_file()), None)


def bare_name(name: str) -> str:
    """The name without its folder and ending, for people and file names."""
    return Path(name).name.removesuffix(".safetensors")


def given_name(folders: Sequence[Path], file: Path) -> str:
    """What `named_file` finds a .safetensors file by: its bare name where the folders have it, else FOLDER/NAME."""
    name = bare_name(file.name)
    found = named_file(folders, name)
    return name if found is not None and found.samefile(file) else os.path.join(file.parent, name)
