"""Class guidance of the Fashion-MNIST model: quality against seconds for joint and split schemes, in docs/results/splitting.md.

python benchmarks/splitting_fashion.py --cache FOLDER [--n 1000] [--scale 6] [--steps 5,7,10,15,20,25] [--png FILE.png]

The unconditional model (its null label) is guided by `zoo:fashion-mnist-noisy`. The classifier of clean images that judges the
samples, and whose features carry the Frechet distance within class, was trained apart from it. Seconds are evaluations
times their cost: the least processor time of interleaved rounds. Runs that are in the cache are not repeated.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from common import header, interleaved
from quieten.data import load
from quieten.files import write_atomic
from quieten.guidance import Guided
from quieten.guiding.classify import NoisyClassifier
from quieten.guiding.guides import Classified
from quieten.guiding.splits import SPLITS, split
from quieten.metrics import frechet_distance
from quieten.metrics.features import Extractor, Statistics
from quieten.nets import Classifier
from quieten.reports.plots import pareto, save_grid
from quieten.sampling import generate
from quieten.solvers.samplers import sampler
from quieten.training.config import build_grid
from quieten.training.runs import load_with_recipe
from quieten.training.weights import packed
from quieten.wrap import Clipped, Counted

NAME = "fashion-mnist"
ZOO = Path(__file__).parents[1] / "src" / "quieten" / "zoo" / "classifiers"
JOINT = ("ddim", "dpm++", "plms")
SPLIT = tuple(name for name in SPLITS if name != "ancestral-split")  # that one draws noise: not the same task
LONG = {"ddim": (50, 250)}  # besides --steps
REFERENCE = 20_000  # training images that the distance is to
PATH = 50  # samples whose exact path is followed, by DDIM in 1,000 steps


class Judge:
    """Accuracy by the independent classifier, and the Frechet distance within class.

    The latter is taken on features from which the mean of the training images of the class asked for is subtracted, all classes
    together: what is left is the spread within classes, and a sample of another class is an outlier.
    """

    def __init__(self) -> None:
        self.net = Classifier()
        self.net.load_state_dict({k: v.float() for k, v in load_file(ZOO / f"{NAME}.safetensors").items()})
        self.net.eval()
        self.extractor = Extractor.zoo(NAME)
        train = load(NAME).subset(slice(REFERENCE))
        assert train.labels is not None
        features = self.extractor.extract(train.all())
        self.means = torch.stack([features[train.labels == c].mean(0) for c in range(len(train.classes))])
        self.reference = Statistics.of(features - self.means[train.labels], self.extractor.hash)

    @torch.no_grad()
    def __call__(self, x: Tensor, label: Tensor) -> dict[str, float]:
        x = x.clamp(-1, 1)
        right = torch.cat([self.net(part).argmax(1) for part in x.split(250)]) == label
        centred = self.extractor.extract(x) - self.means[label]
        whole = frechet_distance(Statistics.of(centred), self.reference)
        # spread of the distances of four quarters, each with every class, halved for the whole
        quarters = [
            frechet_distance(Statistics.of(centred[(torch.arange(len(x)) // 10) % 4 == k]), self.reference) for k in range(4)
        ]
        return {
            "accuracy": float(right.float().mean()),
            "frechet": whole,
            "frechet_error": float(torch.tensor(quarters).std()) / 2,
        }


class Bench:
    """The task: a denoiser, a guide, and a cache of what was sampled."""

    def __init__(self, n: int, scale: float, batch: int, cache: Path):
        denoiser, self.recipe = load_with_recipe(f"zoo:{NAME}")
        self.classifier = NoisyClassifier.load(f"zoo:{NAME}-noisy")
        self.n, self.scale, self.batch, self.cache = n, scale, batch, cache
        self.denoiser = denoiser.eval()
        self.label = torch.arange(n) % len(self.recipe.data.classes)

    def parts(self, rows: slice) -> tuple[Counted, Classified]:
        null = torch.full((rows.stop - rows.start,), len(self.recipe.data.classes))
        return Counted(Clipped(self.denoiser.bind(label=null))), Classified(self.classifier, self.label[rows], self.scale)

    def sample(self, name: str, steps: int, n: int | None = None) -> tuple[Tensor, dict[str, float]]:
        """Samples and the evaluations they took; chunks that are in the cache are not drawn again."""
        n = self.n if n is None else n
        chunks = [self._chunk(name, steps, first, min(self.batch, n - first)) for first in range(0, n, self.batch)]
        facts = {key: sum(facts[key] for _, facts in chunks) / len(chunks) for key in ("network", "gradient")}
        return torch.cat([x for x, _ in chunks]), facts

    def _chunk(self, name: str, steps: int, first: int, count: int) -> tuple[Tensor, dict[str, float]]:
        file = self.cache / f"{name}-{steps}-{self.scale:g}-{first}-{count}.safetensors"
        if not file.exists():
            calls = [0, 0]
            hook = self.classifier.register_forward_hook(lambda *_: calls.__setitem__(1, calls[1] + 1))
            net, guidance = self.parts(slice(first, first + count))
            grid, model = build_grid(self.recipe, steps), net
            if name in SPLITS:
                transition: Any = split(name, guidance)
            else:
                (transition, grid), model = sampler(name, grid), Guided(net, guidance)  # type: ignore[assignment]
            x = generate(model, count, grid=grid, transition=transition, batch=count, first=first, shape=(1, 28, 28))
            hook.remove()
            facts = {"network": net.calls, "gradient": calls[1]}
            write_atomic(file, packed({"x": x.half()}, {"facts": json.dumps(facts)}))
        with safe_open(file, "pt") as opened:
            return opened.get_tensor("x").float(), json.loads(opened.metadata()["facts"])

    def costs(self, rounds: int) -> tuple[float, float]:
        """Seconds of processor time of one evaluation and of one gradient, for n samples."""
        net, guidance = self.parts(slice(0, self.batch))
        x = torch.randn(self.batch, 1, 28, 28)
        with torch.no_grad():
            timings = interleaved(
                {"network": lambda: net(x, 0.0), "gradient": lambda: guidance.gradient(net, x, 0.0)},
                rounds, warmup=1, clock=time.process_time,
            )  # fmt: skip
        return timings["network"].least * self.n / self.batch, timings["gradient"].least * self.n / self.batch


def main(n: int, scale: float, steps: list[int], batch: int, cache: Path, png: Path | None, only: list[str] | None) -> None:
    print(header())
    bench, judge = Bench(n, scale, batch, cache), Judge()
    network, gradient = bench.costs(rounds=6)
    print(f"{n} samples, classes in turn, scale {scale:g}, x0 clipped; {network:.2f} s an evaluation of the network, "
          f"{gradient:.2f} s a gradient ({gradient / network:.2f} of it)")  # fmt: skip
    test = load(NAME, split="test")
    assert test.labels is not None
    real = torch.cat([(test.labels == c).nonzero()[: n // 10, 0] for c in range(10)])
    floor = judge(test.batch(real)[0], test.labels[real])
    print(f"as many test images: accuracy {floor['accuracy']:.3f}, Frechet distance within class {floor['frechet']:.2f}")
    exact, _ = bench.sample("ddim", 1000, PATH)
    rows: dict[tuple[str, int], dict[str, float]] = {}
    print(
        "\n| scheme | steps | network, gradient | seconds | accuracy | Frechet, within class | off the exact path | largest |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in only or (*JOINT, *SPLIT):
        for count in sorted({*steps, *LONG.get(name, ())}, reverse=True):
            try:
                x, facts = bench.sample(name, count)
            except ValueError as error:
                print(f"| {name} | {count} | | | | {error} | | |", flush=True)
                continue
            row = judge(x, bench.label) | facts
            row["seconds"] = facts["network"] * network + facts["gradient"] * gradient
            row["off"] = float((x[:PATH] - exact).square().mean().sqrt())
            rows[name, count] = row
            print(f"| {name} | {count} | {facts['network']:g}, {facts['gradient']:g} | {row['seconds']:.1f} | "
                  f"{row['accuracy']:.3f} | {row['frechet']:.2f} ± {row['frechet_error']:.2f} | {row['off']:.3f} | "
                  f"{float(x.abs().max()):.3g} |", flush=True)  # fmt: skip
    conclude(rows, n)
    if png is not None:
        draw(rows, floor["frechet"], png)
        shown = [(name, 10) for name in ("ddim", "plms", "dpm++", "stsp", "strang", "merged")]
        pictures = [bench.sample(name, count)[0][:10] for name, count in [("ddim", 250), *shown]]
        save_grid(torch.cat(pictures), png.with_name("splitting-class.png"), columns=10, scale=2)


def conclude(rows: dict[tuple[str, int], dict[str, float]], n: int) -> None:
    """The least seconds of each scheme for the quality of DDIM in 250 steps, and for its distance from the exact path."""
    goal = rows.get(("ddim", 250))
    if goal is None:
        return
    error = math.sqrt(goal["accuracy"] * (1 - goal["accuracy"]) / n)
    low, high = goal["accuracy"] - error, goal["frechet"] + goal["frechet_error"]
    print(f"\nquality of DDIM in 250 steps: accuracy at least {low:.3f}, Frechet distance at most {high:.2f}\n")
    equal = {key: row for key, row in rows.items() if row["accuracy"] >= low and row["frechet"] <= high}
    compare(rows, equal, goal["seconds"], "DDIM in 250 steps")
    for count in (25, 50):
        if ("ddim", count) in rows:
            off = rows["ddim", count]["off"]
            print(f"\nas near to the exact path as DDIM in {count} steps: off by at most {off:.3f}\n")
            near = {key: row for key, row in rows.items() if row["off"] <= off}
            compare(rows, near, rows["ddim", count]["seconds"], f"DDIM in {count} steps")


def compare(
    rows: dict[tuple[str, int], dict[str, float]], good: dict[tuple[str, int], dict[str, float]], goal: float, what: str
) -> None:
    """A table of the cheapest good row of each scheme."""
    print(f"| scheme | steps | seconds | less than {what} |\n|---|---|---|---|")
    for name in dict.fromkeys(name for name, _ in rows):
        own = [(row["seconds"], count) for (other, count), row in good.items() if other == name]
        if own:
            seconds, count = min(own)
            print(f"| {name} | {count} | {seconds:.1f} | {1 - seconds / goal:.0%} |")
        else:
            print(f"| {name} | not reached | | |")


def draw(rows: dict[tuple[str, int], dict[str, float]], floor: float, png: Path) -> None:
    shown = ("ddim", "dpm++", "plms", "stsp", "strang", "merged", "heun-kick")
    points = {name: [(float(f"{r['seconds']:.2g}"), r["frechet"]) for (k, _), r in rows.items() if k == name] for name in shown}
    figure = pareto(points, xlabel="seconds for all samples", ylabel="Frechet distance within class", floor=floor)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, facecolor="white")
    write_atomic(png, buffer.getvalue())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--scale", type=float, default=6.0)
    parser.add_argument("--steps", type=lambda text: [int(word) for word in text.split(",")], default=[5, 7, 10, 15, 20, 25])
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--only", type=lambda text: text.split(","), help="schemes, by comma")
    parser.add_argument("--threads", type=int, default=1)
    options = vars(parser.parse_args())
    torch.set_num_threads(options.pop("threads"))
    main(**options)
