"""Two processes fit a head as one does, and both say where it is."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import within
from quieten.covariances.fit import Fitted, fit_variance
from quieten.covariances.stored import load_variance
from quieten.fit import fit
from quieten.training.runs import Run
from quieten.training.schema import Train
from quieten.training.source import open_source
from test_distributed import launch
from toy import toy_data, toy_run

PLAN = Train(images=64, batch=8, lr=1e-3, warmup=16, clip=None, ema=100, precision="fp32", log_every=1, save_minutes=None)


def fitted_here(model: Path, out: Path) -> Fitted:
    """What each process does: one vector-Jacobian product through the frozen trunk, the head trained."""
    return fit_variance(open_source(str(model)), toy_data(), kind="ocm", out=out, train=PLAN)


def test_two_processes_fit_as_one(tmp_path: Path) -> None:
    run = toy_run(tmp_path / "run", "train.images=16")
    fit(run, data=toy_data())
    alone = fitted_here(run.path, tmp_path / "alone")
    launch(run.path, tmp_path / "both", file=__file__)
    one, two = (Run.open(tmp_path / name / "ocm").metrics() for name in ("alone", "both"))
    assert [row["step"] for row in two] == list(range(1, 9))
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
    assert alone.file is not None
    first, second = (load_file(tmp_path / name / "ocm" / "model.safetensors") for name in ("alone", "both"))
    assert first.keys() == second.keys()
    apart, size = (torch.cat([t.flatten() for t in part]).norm() for part in
                   ([second[name] - tensor for name, tensor in first.items()], list(first.values())))  # fmt: skip
    within(0.02, apart / size, "relative distance of the weights")  # Adam turns rounding of a small gradient into a whole step
    load_variance(tmp_path / "both", "ocm", open_source(str(run.path)).denoiser)  # fitted to these weights


if __name__ == "__main__":
    import torch.distributed

    assert fitted_here(*map(Path, sys.argv[1:3])).file is not None
    assert torch.distributed.get_world_size() == 2
    torch.distributed.destroy_process_group()
