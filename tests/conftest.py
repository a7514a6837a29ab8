"""What every test shares: the golden arrays, repeatable random numbers, no network and no window."""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

# Read when the libraries are imported, so set before anything else is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# Threads that wait spin only briefly: on busy cores spinning takes all the time there is.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import hypothesis
import numpy as np
import pytest
import torch

__all__ = ["Ran", "Type", "golden"]

# Examples are the same in every run, and slow machines do not fail: a test's verdict is about the code.
hypothesis.settings.register_profile("quieten", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("quieten")


def golden(name: str) -> dict[str, np.ndarray]:
    """Arrays of one golden file, outputs of the methods' official code; skips where the folder is absent.

    Works as a function (``from conftest import golden``) and as a fixture of the same name.

    Arguments:
        name: File name, with or without ``.npz``, in the folder ``$QUIETEN_GOLDEN``, else in
            ``../shared/golden`` beside the checkout.

    Raises:
        FileNotFoundError: If the folder is there but the file is not: a misspelt name must not skip.
    """
    checkout = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("QUIETEN_GOLDEN") or checkout.parent / "shared" / "golden")
    if not folder.is_dir():
        pytest.skip(
            f"no golden arrays in {folder}: set QUIETEN_GOLDEN to the folder that holds {name}",
            allow_module_level=True,
        )
    with np.load(folder / f"{name.removesuffix('.npz')}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture(name="golden", scope="session")
def _golden() -> Callable[[str], dict[str, np.ndarray]]:
    return golden


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same global random state before each test, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread for a test of many small operations: on a busy machine threads wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Ran(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


Type = Callable[..., Ran]


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Type:
    """Runs the command line in this process."""

    from quieten.cli import main

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        captured = capsys.readouterr()
        return Ran(int(ended.value.code or 0), captured.out, captured.err)

    return run
