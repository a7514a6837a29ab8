"""Memory of the CPU: kept for the next step instead of handed back and fetched again."""

from __future__ import annotations

import ctypes
import os

__all__ = ["keep_freed_memory"]

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_MOST = 2**30


def keep_freed_memory() -> bool:
    """Tells glibc's malloc to keep freed memory for the rest of this process; the peak of memory stays what it was.

    Torch has no cache for the CPU's memory: the result of every operation comes from malloc, which gives large pieces back to
    the system when they are freed, so that the next step faults each page in again. The command line calls this at its start;
    a program that samples on a CPU may do so too. Does nothing where there is no such malloc, and where the environment
    already has settings for it (``MALLOC_...``, ``GLIBC_TUNABLES``).

    Returns:
        Whether anything was set.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    # the order matters: with the first alone, pieces above 128 KiB are still mapped one by one
    return all([mallopt(_TRIM, _MOST), mallopt(_MMAP, _MOST)])
