"""Tuned policies of few steps on Fashion-MNIST, beside what their own model does in more: docs/results/dxmi.md.

    quieten tune zoo:fashion-mnist fashion-mnist --steps 4
    python benchmarks/dxmi_fashion.py dxmi-4 --n 5000 --threads 1 --check                # the one that comes along, or yours

Every row is a Frechet distance of n samples, all classes in turn, no guidance, to the 60,000 training images, on the features
of `Extractor.zoo("fashion-mnist")`. All samples are held in [-1, 1], as pictures are. Policies were chosen by other noise
against the test images. Rows that were measured are kept in --results, and not measured again.

--check wants each policy of up to 5 steps at or below ddpm in 100, each of 10 below dpm++ in 10, of as many samples.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import header
from quieten.data import load
from quieten.files import write_atomic
from quieten.metrics import Statistics, frechet
from quieten.metrics.features import Extractor
from quieten.reports.plots import save_grid
from quieten.sampling import generate
from quieten.solvers.samplers import sampler
from quieten.training.source import Source, open_source
from quieten.tuning.adapters import merge
from quieten.tuning.stored import load_policy
from quieten.tuning.tune_start import Start, make_policy
from quieten.wrap import Clipped

ROWS = "ddpm:4,ddpm:10,ddpm:100,ddim:4,ddim:10,dpm++:4,dpm++:10,start:4,start:10"


def drawn(source: Source, row: str, n: int, seed: int) -> tuple[Tensor, int, float]:
    """Samples of a sampler "name:steps", of a policy before tuning "start:steps", or of a policy; evaluations, seconds."""
    name, _, steps = row.partition(":")
    label = {"label": torch.arange(n) % len(source.classes)} if source.classes else None
    common: dict[str, Any] = {"cond": label, "batch": 250, "seed": seed}
    begun = time.process_time()
    if steps and name != "start":
        transition, grid = sampler(name, source.grid(int(steps), None))
        x = generate(Clipped(source.denoiser), n, grid=grid, transition=transition, **common)
        count = int(steps)
    else:
        start = make_policy(source, Start(T=int(steps))) if steps else None
        policy = load_policy(source.policies, name, source.denoiser) if start is None else start
        merge(policy.denoiser)
        x = generate(policy.denoiser, n, grid=policy.grid, transition=policy.transition, last="draw", **common)
        count = policy.T
    return x.clamp(-1.0, 1.0), count, time.process_time() - begun


def measured(
    source: Source, rows: list[str], n: int, seed: int, results: Path | None, pictures: Path | None
) -> list[dict[str, Any]]:
    """A line for each row, from `results` where it is known."""
    known = json.loads(results.read_text()) if results is not None and results.is_file() else {}
    extractor, train = Extractor.zoo("fashion-mnist"), load("fashion-mnist")
    reference = Statistics.of(extractor.extract(train.all()), extractor.hash)
    floor = frechet(load("fashion-mnist", split="test").all()[:n], reference, extractor)
    print(f"{n} samples a row, seed {seed}, against {len(train)} training images, {extractor.name} ({extractor.hash[:12]})")
    print(f"{n} test images score {floor.figure()}")
    print("\n| sampler | evaluations | Frechet distance | images/s of processor time |\n|---|---|---|---|")
    lines = []
    for row in rows:
        key = f"{row} n={n} seed={seed}"
        if key not in known:
            x, count, seconds = drawn(source, row, n, seed)
            score = frechet(x, reference, extractor, seeds=(seed,))
            known[key] = {"row": row, "evaluations": count, "value": score.value, "figure": score.figure(), "rate": n / seconds}
            if pictures is not None:
                save_grid(x[:80], pictures / f"{row.replace(':', '-')}.png", columns=10)
            if results is not None:
                write_atomic(results, json.dumps(known, indent=1).encode())
        line = known[key]
        print(f"| {row.replace(':', ' in ')} | {line['evaluations']} | {line['figure']} | {line['rate']:.0f} |", flush=True)
        lines.append(line)
    return lines


def failed(lines: list[dict[str, Any]]) -> list[str]:
    """The bars that are not met."""
    value = {line["row"]: line["value"] for line in lines}
    bars = [(line, "ddpm:100" if line["evaluations"] <= 5 else "dpm++:10") for line in lines if ":" not in line["row"]]
    print()
    for line, bar in bars:
        print(f"{line['row']}: {line['value'] / value[bar]:.3f} times the distance of {bar.replace(':', ' in ')}")
    return [
        f"{line['row']}: {line['value']:.3f} > {value[bar]:.3f} of {bar}" for line, bar in bars if line["value"] > value[bar]
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policies", nargs="*", default=["dxmi-4"], help="names (default: dxmi-4), or .safetensors files")
    parser.add_argument("--source", default="zoo:fashion-mnist")
    parser.add_argument("--rows", default=ROWS, help="samplers and steps to compare with")
    parser.add_argument("--n", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=100, help="other noise than the policies were chosen by")
    parser.add_argument("--results", type=Path, help="JSON that keeps the rows")
    parser.add_argument("--pictures", type=Path, help="folder for grids")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print(header())
    rows = [row for row in asked.rows.split(",") if row] + asked.policies
    found = measured(open_source(asked.source, device="cpu"), rows, asked.n, asked.seed, asked.results, asked.pictures)
    missed = failed(found)
    print("\n".join(missed) or "all bars hold")
    sys.exit(1 if asked.check and missed else 0)
