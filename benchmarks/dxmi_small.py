"""Policies of four steps on digits and emoji, beside what the same networks do untuned: docs/results/dxmi-small.md.

    python benchmarks/dxmi_small.py digits --threads 1 --check          # policies by name, or files: --policies dxmi-4,other
    python benchmarks/dxmi_small.py emoji --threads 1 --check

Every row is n samples for each of the seeds, all classes in turn, no guidance, held in [-1, 1] as pictures are. On the features
of the zoo's classifier: the Frechet distance to the training images and to the held-out ones, mean of the seeds and the
standard error of that (of one seed, that of halves); and, of all samples together, the chance that one is nearer to its
nearest training image than a held-out image is to its own (0.5: as new as those, 1: copies), and the share of samples nearer
than 99 % of those are. Rows that were measured are kept in --results, and not measured again.

--check wants each policy below dpm++ in as many steps and below itself before tuning, and its samples no nearer to training
images than before tuning, or than held-out images are, within what chance does.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import header
from dxmi_fashion import drawn
from quieten.data import load
from quieten.files import write_atomic
from quieten.metrics import Statistics, frechet, memorisation
from quieten.metrics.features import Extractor
from quieten.reports.plots import save_grid
from quieten.training.source import Source, open_source

ROWS = "ddpm:4,ddim:4,dpm++:4,start:4,ddpm:100"
LONG = 50
"""Steps above which a row is measured for the first seed alone."""


class Judge:
    """What rows are measured by: features of training and of held-out images."""

    def __init__(self, name: str):
        train, held = load(name), load(name, split="test")
        self.extractor = Extractor.zoo(name)
        self.train, self.held = train.all(), held.all()
        self.sides = {
            side: Statistics.of(self.extractor.extract(x), self.extractor.hash)
            for side, x in (("train", self.train), ("held", self.held))
        }

    def distances(self, x: Tensor) -> dict[str, float]:
        """Frechet distances of images x (n, C, H, W) to both, and the first corrected for the bias of n."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few held-out images: the same for all rows
            found = {side: frechet(x, reference, self.extractor) for side, reference in self.sides.items()}
        values = {side: result.value for side, result in found.items()} | {"corrected": found["train"].details["corrected"]}
        return values | {f"{side}, error": result.uncertainty for side, result in found.items()}

    def copies(self, x: Tensor) -> dict[str, float]:
        """How near images come to the training images, on the features and on the pixels."""
        out = {}
        for what, extractor in (("features", self.extractor), ("pixels", Extractor.pixels())):
            result = memorisation(x, self.train, self.held, extractor).result
            out |= {f"nearer, {what}": result.value, f"nearer, {what}, error": result.uncertainty}
            out |= {f"copies, {what}": result.details["copies"]}
        return out


def measured(source: Source, judge: Judge, row: str, n: int, seeds: list[int], picture: Path | None) -> dict[str, Any]:
    """One row: its distances, seed by seed, and how near all of its samples come to the training images."""
    samples, each, seconds, count = [], [], 0.0, 0
    for seed in seeds:
        x, count, spent = drawn(source, row, n, seed)
        seconds += spent
        samples.append(x)
        each.append(judge.distances(x))
    if picture is not None:
        save_grid(samples[0][:80], picture, columns=10)
    told: dict[str, Any] = {"evaluations": count, "rate": n * len(seeds) / seconds}
    for name in each[0]:
        told[name] = [facts[name] for facts in each]
    return told | judge.copies(torch.cat(samples))


def shown(told: dict[str, Any], name: str) -> str:
    """Mean and standard error of what the seeds gave."""
    values = told[name]
    if len(values) == 1:
        return f"{values[0]:.3f} ± {told[f'{name}, error'][0]:.3f}" if f"{name}, error" in told else f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def printed(row: str, told: dict[str, Any]) -> str:
    near = " | ".join(
        f"{told[f'nearer, {what}']:.3f} ± {told[f'nearer, {what}, error']:.3f}, {told[f'copies, {what}']:.1%}"
        for what in ("features", "pixels")
    )
    figures = " | ".join(shown(told, name) for name in ("train", "corrected", "held"))
    return f"| {row.replace(':', ' in ')} | {told['evaluations']} | {figures} | {near} | {told['rate']:.0f} |"


def failed(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The bars that are not met."""
    missed = []
    for row, told in rows.items():
        if ":" in row:
            continue
        mean = statistics.mean(told["train"])
        for bar in ("dpm++:4", "start:4"):
            if bar in rows and mean >= statistics.mean(rows[bar]["train"]):
                missed.append(f"{row}: {mean:.3f} is not below {statistics.mean(rows[bar]['train']):.3f} of {bar}")
        if "start:4" in rows:
            for what in ("features", "pixels"):
                before = max(rows["start:4"][f"nearer, {what}"], 0.5)
                room = 2.0 * math.hypot(told[f"nearer, {what}, error"], rows["start:4"][f"nearer, {what}, error"])
                if told[f"nearer, {what}"] > before + room:
                    missed.append(f"{row}: nearer to training images than allowed by {what}: "
                                  f"{told[f'nearer, {what}']:.3f} > {before:.3f}")  # fmt: skip
    return missed


def main(asked: argparse.Namespace) -> list[str]:
    """Prints the table, and returns the bars that are not met."""
    source, judge = open_source(f"zoo:{asked.name}", device="cpu"), Judge(asked.name)
    known = json.loads(asked.results.read_text()) if asked.results is not None and asked.results.is_file() else {}
    every = list(range(asked.seed, asked.seed + asked.seeds))
    floor = judge.distances(judge.held)
    print(f"{asked.n} samples a row and seed, seeds {every[0]} to {every[-1]}, of more than {LONG} steps the first alone")
    print(f"{len(judge.train)} training images, {judge.extractor.name} ({judge.extractor.hash[:12]})")
    print(f"{len(judge.held)} held-out images score {floor['train']:.3f}, corrected {floor['corrected']:.3f}")
    print("\n| sampler | evaluations | to training images | corrected | to held-out images | nearer than held out, copies: "
          "features | pixels | images/s of processor time |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    rows = {}
    for row in [row for row in (asked.rows + "," + asked.policies).split(",") if row]:
        steps = row.rpartition(":")[2]
        seeds = every[: 1 if steps.isdigit() and int(steps) > LONG else None]
        key = f"{asked.name} {row} n={asked.n} seeds={seeds[0]}-{seeds[-1]}"
        if key not in known:
            name = Path(row.replace(":", "-")).stem
            picture = None if asked.pictures is None else asked.pictures / f"{asked.name}-{name}.png"
            known[key] = measured(source, judge, row, asked.n, seeds, picture)
            if asked.results is not None:
                write_atomic(asked.results, json.dumps(known, indent=1).encode())
        rows[row] = known[key]
        print(printed(row, rows[row]), flush=True)
    return failed(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["digits", "emoji"])
    parser.add_argument("--policies", default="dxmi-4", help="names, or .safetensors files, comma between them")
    parser.add_argument("--rows", default=ROWS, help="samplers and steps to compare with")
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=100, help="the first, other noise than the policies were chosen by")
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--results", type=Path, help="JSON that keeps the rows")
    parser.add_argument("--pictures", type=Path, help="folder for grids")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(header())
    missed = main(given)
    print("\n".join(["", *missed]) if missed else "\nall bars hold")
    sys.exit(1 if given.check and missed else 0)
