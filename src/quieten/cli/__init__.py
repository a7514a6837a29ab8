"""The command line. Nothing heavy is imported before a command runs, so that help is instant."""

from __future__ import annotations

import os
import sys
import warnings
from typing import NoReturn

import typer

from ..allocator import keep_freed_memory

# each module adds its commands to the application
from . import basic, classifier, compare, diagnose, export, features, lists, nll, score, tune, variance  # noqa: F401
from .app import app

__all__ = ["app", "main"]


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; what a user can get wrong ends in one line on stderr and exit status 2.

    With the environment variable QUIETEN_DEBUG set, the whole traceback is shown instead.
    """
    _share_processors()
    keep_freed_memory()
    usual, warnings.formatwarning = warnings.formatwarning, _warning
    try:
        app(arguments, prog_name="quieten")
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        _fail(error)
    except RuntimeError as error:
        if "memory" not in str(error):  # torch has no class of its own for this on every device
            raise
        _fail(error, ": take a smaller --batch, or train.batch")
    finally:
        warnings.formatwarning = usual


def _share_processors() -> None:
    """Lets threads that wait for one another sleep soon, unless the user says how they wait; before torch is imported.

    GNU OpenMP spins for milliseconds by default. When another program takes a core, each of the thousand waits of a network
    then burns the time its partner needs: with two busy loops beside it on 2 cores, sampling digits took over 40 times as
    long as alone. With this many turns, some 20 microseconds, it took 3 to 4 times as long, and alone no longer than before.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def _warning(message: Warning | str, *where: object, **source: object) -> str:
    """A warning as errors are told: in one line, without the place in the code."""
    return f"quieten: warning: {' '.join(str(message).split())}\n"


def _fail(error: Exception, remedy: str = "") -> NoReturn:
    if os.environ.get("QUIETEN_DEBUG"):
        raise error
    sys.stdout.flush()
    typer.echo(f"quieten: error: {' '.join(str(error).split()) or type(error).__name__}{remedy}", err=True)
    sys.exit(2)
