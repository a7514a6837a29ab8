"""Quality of the models that come with the library, by what comes with them: writes it where `quieten zoo` reads it.

python benchmarks/zoo.py [--names emoji,digits] [--n 2000] [--steps 5,10] [--write]

Each model draws n samples, of all classes in turn, with the sampler and the bound on x0 that `quieten sample` would take, and
by each of its policies; they are compared with the statistics of the training data by the classifier of the zoo.
"""

from __future__ import annotations

import argparse
import json
import warnings

import torch
from torch import Tensor

from common import header
from quieten.data import load
from quieten.files import write_atomic
from quieten.metrics import Result, frechet
from quieten.metrics.features import Extractor, Statistics
from quieten.sampling import generate
from quieten.solvers.samplers import sampler
from quieten.training.bundled import ZOO, bundles
from quieten.training.source import Source, open_source
from quieten.tuning.stored import load_policy, policy_names
from quieten.tuning.tune_loop import draw
from quieten.wrap import Clipped

BATCH = 250


def drawn(opened: Source, n: int, steps: int, name: str, seed: int) -> Tensor:
    transition, grid = sampler(name, opened.grid(steps, None))
    cond = {"label": torch.arange(n) % len(opened.classes)} if opened.classes else {}
    return generate(Clipped(opened.denoiser), n, grid=grid, transition=transition, cond=cond, batch=BATCH, seed=seed)


def measured(name: str, n: int, steps: list[int], seed: int) -> dict[str, object]:
    opened, extractor, reference = open_source(f"zoo:{name}"), Extractor.zoo(name), Statistics.zoo(name)
    kind = opened.transition[0]

    def against(x: Tensor, **facts: object) -> Result:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few held-out images; their number is told
            return frechet(x, reference, extractor, reference_name=f"{name}, train", **facts)

    held_out = load(name, split="test").all()
    floor = against(held_out)
    least = f"{floor.figure()}, corrected for bias {floor.details['corrected']:.2g}, n = {len(held_out)}"
    print(f"{name}: held-out images {least}", flush=True)
    rows = []
    for count in steps:
        result = against(drawn(opened, n, count, kind, seed), seeds=(seed,), weights="exported")
        rows.append({"sampler": kind, "steps": count, "frechet": result.figure(), "result": result.to_dict()})
        print(f"{name}: {kind} in {count} steps, n = {n}: {result.figure()}", flush=True)
    tuned = []
    for called in policy_names(opened.policies[-1:]):
        policy = load_policy(opened.policies[-1:], called, opened.denoiser)
        x = draw(policy, n, len(opened.classes), seed).clamp(-1.0, 1.0)  # as pictures are written
        result = against(x, seeds=(seed,), weights="tuned")
        tuned.append({"policy": called, "steps": policy.T, "frechet": result.figure(), "result": result.to_dict()})
        print(f"{name}: policy {called} in {policy.T} steps, n = {n}: {result.figure()}", flush=True)
    return {"samples": rows, "policies": tuned, "floor": least}


def main(names: list[str], n: int, steps: list[int], seed: int, write: bool) -> None:
    """Measures some or all models; with `write`, replaces their entries of the zoo's quality.json."""
    print(header())
    file = ZOO / "quality.json"
    for name in names or [bundle.name for bundle in bundles()]:
        found = measured(name, n, steps, seed)
        if write:
            known = json.loads(file.read_text("utf-8")) if file.is_file() else {}
            write_atomic(file, (json.dumps(known | {name: found}, indent=1, sort_keys=True) + "\n").encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", type=lambda text: text.split(","), default=[])
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--steps", type=lambda text: [int(word) for word in text.split(",")], default=[5, 10])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    main(**vars(parser.parse_args()))
