"""What an import costs: torch, and little else."""

import os
import subprocess
import sys
from pathlib import Path

import quieten
from helpers import within

PROGRAM = """
import sys, time
import torch
start = time.perf_counter()
import quieten
bare = time.perf_counter() - start
from quieten import Ancestral, Denoising, GaussianData, Heun, Preconditioned, Table, Update, generate
print(bare, time.perf_counter() - start, *sorted({name.partition(".")[0] for name in sys.modules}))
"""
HEAVY = {"PIL", "accelerate", "diffusers", "matplotlib", "pandas", "scipy", "sklearn", "torchdiffeq", "torchvision"}


def test_importing_the_core_is_quick_and_light():
    env = {**os.environ, "PYTHONPATH": str(Path(quieten.__file__).parents[1])}
    seconds = []
    for _ in range(3):  # the fastest of at most three: a busy machine proves nothing
        run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=env)
        bare, core, *modules = run.stdout.split()
        seconds.append(float(core))
        if seconds[-1] <= 0.3:
            break
    within(0.3, min(seconds), f"seconds above torch, with the whole core ({float(bare):.3f} for `import quieten` alone)")
    assert not HEAVY & set(modules)


def test_exports_are_what_they_say():
    assert len(set(quieten.__all__)) == len(quieten.__all__)
    assert dir(quieten) == quieten.__all__
    for name in quieten.__all__:
        module = getattr(getattr(quieten, name), "__module__", "quieten")
        assert module.split(".")[0] in ("quieten", "torch"), (name, module)
