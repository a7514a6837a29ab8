"""What the benchmarks share: the header of every table, and timings that neighbours on the machine disturb equally."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch

__all__ = ["Timing", "header", "interleaved"]


class Timing(list[float]):
    """Seconds of each round."""

    @property
    def median(self) -> float:
        return statistics.median(self)

    @property
    def least(self) -> float:
        return min(self)


def header(*packages: str) -> str:
    """One line: processor, threads, Python, torch and the given packages."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *packages))
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    return f"{_processor()}, {threads}, Python {platform.python_version()}, {versions}"


def interleaved(
    cases: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times every case once per round, in turn: a slow moment of the machine hits all of them, not one.

    Arguments:
        cases: What to time, by name; the order is reversed in every other round.
        rounds: Timed rounds.
        warmup: Rounds before them that do not count.
        clock: Seconds; `time.process_time` does not count what other processes take, and adds up threads.
    """
    timings = {name: Timing() for name in cases}
    names = list(cases)
    enabled = gc.isenabled()
    gc.disable()
    try:
        for i in range(-warmup, rounds):
            gc.collect(0)
            for name in names if i % 2 == 0 else reversed(names):
                start = clock()
                cases[name]()
                if i >= 0:
                    timings[name].append(clock() - start)
    finally:
        if enabled:
            gc.enable()
    return timings


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
