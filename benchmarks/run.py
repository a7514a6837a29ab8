"""All benchmarks with bars in one table: what each found, whether its bars are met, machine and versions.

    python benchmarks/run.py [NAME ...] [--quick] [--out runs/bench] [--threads 1] [--minutes 30]

Each runs as a process of its own with --check, one after the other; names are those of the files. Into --out go table.md,
table.json and the whole output of each, NAME.txt. --quick shows in minutes that all of them work: fewer rounds, so figures are
rough. The exit status is 1 if a bar is missed or a benchmark fails. `make bench` also installs what peers.py compares with.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from common import header

__all__ = ["main"]

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Plan:
    """How a benchmark is run.

    Attributes:
        about: Against what.
        given: Arguments.
        quick: Arguments in place of those for a quick look.
        found: Lines of its output that say what it found.
        bars: Whether it takes --check and --threads.
    """

    about: str
    given: tuple[str, ...] = ()
    quick: tuple[str, ...] = ("--rounds", "1")
    found: str = r"\bbars?\b|at most|at least"
    bars: bool = True


SUITE: dict[str, Plan] = {
    "loop": Plan("a step beyond the network, against diffusers' loops", quick=("--rounds", "2")),
    "peers": Plan("steps and results beside five libraries", quick=("--quick",)),
    "compare": Plan("what `quieten compare` spends beside its networks", quick=("--quick",)),
    "train": Plan(
        "training, against diffusers' loop and network", ("--only", "loop", "speed"), ("--quick", "--only", "loop", "speed")
    ),
    "nets": Plan("the compact U-Net against UNet2DModel", (), ("--seconds", "0.3"), r" UNet ", False),
    "stf": Plan("stable targets, against the direct form"),
    "diffenc": Plan("the encoder's bound and decoder, against separate calls"),
    "ocm": Plan("learning and using a reverse covariance, against the released form"),
    "ocm_grid": Plan("least-cost grids, against all rows and all images"),
    "splitting": Plan("split steps, against the released formulation"),
    "adaptive": Plan("evaluations of the adaptive ODE, against scipy's RK45", quick=("--n", "4")),
    "dxmi": Plan("tuning a policy, against the form it replaces"),
}
"""What `make bench` runs, in this order."""


@dataclass(frozen=True)
class Found:
    """What a benchmark said."""

    name: str
    about: str
    lines: list[str]
    verdict: str
    seconds: float


def run(name: str, plan: Plan, quick: bool, threads: int, minutes: float, out: Path, peers: Path) -> Found:
    """Runs a benchmark, keeps its output, and reads the lines that matter."""
    words = [sys.executable, str(HERE / f"{name}.py"), *(plan.quick if quick else plan.given)]
    words += ["--check", "--threads", str(threads)] if plan.bars else []
    words += ["--peers", str(peers), "--json", str(out / "peers.json")] if name == "peers" else []
    start, env = time.perf_counter(), {**os.environ, "OMP_NUM_THREADS": str(threads)}
    try:
        ran = subprocess.run(words, capture_output=True, text=True, env=env, timeout=60 * minutes, check=False)
        text, code = ran.stdout + (f"\n{ran.stderr}" if ran.returncode not in (0, 1) else ""), ran.returncode
    except subprocess.TimeoutExpired as late:
        text, code = f"{_text(late.stdout)}\nnot finished after {minutes:g} minutes\n", 124
    seconds = time.perf_counter() - start
    (out / f"{name}.txt").write_text(text)
    failed = code not in (0, 1) or "Traceback" in text
    verdict = "not finished" if code == 124 else "failed" if failed else "missed" if code else "met" if plan.bars else "no bar"
    lines = [" ".join(line.split()) for line in text.splitlines() if re.search(plan.found, line)]
    return Found(name, plan.about, lines or [text.strip().splitlines()[-1] if text.strip() else "no output"], verdict, seconds)


def _text(output: str | bytes | None) -> str:
    return output.decode() if isinstance(output, bytes) else output or ""


def table(found: Sequence[Found], title: str, quick: bool) -> str:
    """Everything as markdown."""
    lines = [title + (", a quick look: figures are rough" if quick else ""), ""]
    lines += ["| benchmark | what it measures | what it found | bars |", "|---|---|---|---|"]
    for one in found:
        said = "<br>".join(line.replace("|", "\\|") for line in one.lines)
        lines.append(f"| {one.name} | {one.about} | {said} | {one.verdict} |")
    return "\n".join(lines) + "\n"


def peers_table(path: Path) -> str:
    """The lines of peers.py as markdown; empty where it did not get so far."""
    if not path.is_file():
        return ""
    content = json.loads(path.read_text())
    lines = [
        "",
        "Milliseconds a step beyond the network, ours and theirs, and the largest relative difference of the results:",
        "",
    ]
    lines += ["| library | method | state | quieten | theirs | ratio | difference |", "|---|---|---|---|---|---|---|"]
    for line in content["lines"]:
        cells = [f"{line['library']} {line['version']}", line["method"], line["state"]]
        cells += [f"{line[key]:.{digits}f}" for key, digits in (("ours", 3), ("theirs", 3), ("ratio", 2))]
        lines.append(f"| {' | '.join(cells)} | {line['difference']:.1e} |")
    return "\n".join([*lines, *(f"\nLeft out: {reason}." for reason in content["missing"])]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SUITE)}; a path does too. Default: all")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for table.md, table.json and the outputs")
    parser.add_argument("--peers", type=Path, default=Path("build/peers"), help="folder where other libraries are installed")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--minutes", type=float, default=30.0, help="after which a benchmark is stopped")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = [Path(name).stem for name in args.names] or list(SUITE)
    if unknown := [name for name in names if name not in SUITE]:
        parser.error(f"no benchmark {unknown[0]!r}: one of {', '.join(SUITE)}")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "peers.json").unlink(missing_ok=True)
    title, found = header("diffusers", "scipy"), []
    for name in names:
        found.append(run(name, SUITE[name], args.quick, args.threads, args.minutes, args.out, args.peers))
        one = found[-1]
        print(f"{name}: {one.verdict}, {one.seconds:.0f} s", *one.lines, sep="\n    ", flush=True)
        text = table(found, title, args.quick) + peers_table(args.out / "peers.json")
        (args.out / "table.md").write_text(text)  # after each, so that a stop loses nothing
        content = {"machine": title, "quick": args.quick, "threads": args.threads, "found": [asdict(one) for one in found]}
        (args.out / "table.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"table: {args.out / 'table.md'}")
    return int(any(one.verdict not in ("met", "no bar") for one in found))


if __name__ == "__main__":
    raise SystemExit(main())
