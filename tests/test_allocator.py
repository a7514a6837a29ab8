"""Freed memory is kept where malloc can be told so, and nothing is touched where it cannot."""

import ctypes
import os
import platform
import subprocess
import sys

import pytest

from quieten import keep_freed_memory

FAULTS = """
import resource, sys
from quieten.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
import torch
def round():
    torch.ones(10 * 2**20)  # above the 32 MiB up to which malloc learns by itself
for _ in range(20):
    round()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    round()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))}
    return int(
        subprocess.run([sys.executable, "-c", FAULTS, how], env=clean, capture_output=True, text=True, check=True).stdout
    )


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_pages_are_not_faulted_in_again():
    as_it_comes, kept = faults("as it comes"), faults("keep")
    assert as_it_comes > 20 * 1000, "this malloc keeps memory by itself: the test shows nothing"
    assert kept < 0.05 * as_it_comes


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_settings_of_the_environment_stand(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    monkeypatch.setattr(ctypes, "CDLL", None)  # whoever asks for it fails
    assert keep_freed_memory() is False


@pytest.mark.parametrize("error", [OSError, TypeError, AttributeError])
def test_another_malloc_is_left_alone(monkeypatch, error):
    def missing(_):
        raise error

    for name in [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert keep_freed_memory() is False


def test_the_command_line_asks_for_it(monkeypatch):
    from quieten import cli

    asked = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: asked.append(True))
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert asked == [True]
