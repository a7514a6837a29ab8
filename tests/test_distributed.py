"""Two processes train as one does: the same losses and the same weights, heads and schedules included."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor, nn

from quieten import Batch, Denoising, Draws
from quieten.denoiser import Denoiser
from quieten.fit import fit
from quieten.training.config import Recipe, build_denoising
from quieten.training.parts import register
from quieten.training.runs import Run
from toy import toy_data, toy_run


class WithHead(Denoising):
    """Denoising, and a head that learns to tell the brightness of what is denoised."""

    def __init__(self, inner: Denoising):
        super().__init__(inner.schedule, inner.weighting, inner.target, inner.drop)
        self.head = nn.Linear(64, 1)

    def forward(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Tensor:
        guess = self.head(denoiser(batch.x0, 0.0, **batch.cond).mean.flatten(1))[:, 0]
        return super().forward(denoiser, batch, draws) + (guess - batch.x0.flatten(1).mean(1)).square()


def with_head(recipe: Recipe, data: object) -> WithHead:
    return WithHead(build_denoising(recipe))


def run_here(path: Path) -> None:
    """What each process does."""
    register("objective", "with-head", with_head)
    fit(Run.open(path), data=toy_data())


def launch(*paths: Path, file: str = __file__) -> None:
    """Runs a file in two processes."""
    here = Path(file)
    folders = [str(here.parent), str(here.parents[1] / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(folders)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    where = ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    process = subprocess.Popen(
        [*torchrun, *where, str(here), *map(str, paths)], env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        _, said = process.communicate(timeout=200)
    finally:
        process.terminate()  # should one hang: torchrun then ends its workers
        process.wait(60)
    assert process.returncode == 0, said


OVERRIDES = (
    "objective.kind=with-head",
    "objective.schedule={kind: linear, learned: true}",
    "objective.weighting=likelihood",
    "model.net.dropout=0",  # drawn on each process by itself
    "train.images=96",
)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_train_as_one(tmp_path: Path, accumulate: int) -> None:
    register("objective", "with-head", with_head)
    alone, both = (toy_run(tmp_path / name, *OVERRIDES, f"train.accumulate={accumulate}") for name in ("alone", "both"))
    run_here(alone.path)
    launch(both.path)
    assert [row["step"] for row in both.metrics()] == list(range(1, 13))
    for one, two in zip(alone.metrics(), both.metrics(), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    first, second = (load_file(run.path / "model.safetensors") for run in (alone, both))
    start = first["objective.schedule.ends"]
    assert abs(start[0] - 13.3) > 1e-3  # the schedule has moved
    for name, tensor in first.items():
        assert (second[name] - tensor).abs().max() < 2e-4, name
    assert both.path.joinpath("samples", "step-000000012.png").is_file()


if __name__ == "__main__":
    import torch.distributed

    run_here(Path(sys.argv[1]))
    assert torch.distributed.get_world_size() == 2
    torch.distributed.destroy_process_group()
