"""All benchmarks with bars in one table: what each found, whether its bars are met, machine, load and versions.

    python benchmarks/run.py [NAME ...] [--quick] [--slow] [--resume] [--out runs/bench] [--threads 1] [--minutes 30]

Each runs as a process of its own with --check, one after the other; names are mostly those of files. Into --out go table.md,
table.json and the whole output of each, NAME.txt. --quick shows in minutes that all of them work: fewer rounds, so figures are
rough. Those that train or draw for long run with --slow, or when named. Ctrl-C ends the one that runs; --resume keeps what an
earlier run on this machine found, and runs the rest, or those named anew. The exit status is 1 if a bar is missed or
a benchmark fails, 130 after Ctrl-C. `make bench` also installs what peers.py compares with.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from common import header
from quieten import __version__
from quieten.files import write_atomic

__all__ = ["SLOW", "SUITE", "Found", "Plan", "main", "run"]

HERE = Path(__file__).parent
DONE = ("met", "missed", "no bar")
"""Verdicts that --resume does not ask for again."""


@dataclass(frozen=True)
class Plan:
    """How a benchmark is run.

    Attributes:
        about: Against what.
        given: Arguments.
        quick: Arguments in place of those for a quick look.
        found: Lines of its output that say what it found.
        bars: Whether it takes --check and --threads.
        slow: Why it runs with --slow alone; empty where it always does.
        file: Its file, without .py, where that has another name.
    """

    about: str
    given: tuple[str, ...] = ()
    quick: tuple[str, ...] = ("--rounds", "1")
    found: str = r"\bbars?\b|at most|at least"
    bars: bool = True
    slow: str = ""
    file: str = ""


TRAINING = ("--only", "loop", "speed")
SUITE: dict[str, Plan] = {
    "loop": Plan("a step beyond the network, against diffusers' loops", quick=("--rounds", "2")),
    "allocator": Plan("sampling that keeps freed memory, against glibc's own ways", quick=("--rounds", "1", "--n", "20")),
    "peers": Plan("steps and results beside five libraries", quick=("--quick",)),
    "metrics": Plan("Frechet distances against scipy's matrix root, stated errors against the spread", quick=("--draws", "20")),
    "compare": Plan("what `quieten compare` spends beside its networks", quick=("--quick",)),
    "train": Plan("training, against diffusers' loop and network", TRAINING, ("--quick", *TRAINING)),
    "nets": Plan("the compact U-Net against UNet2DModel", (), ("--seconds", "0.3"), r" UNet |params", False),
    "stf": Plan("stable targets, against the direct form", ("--rounds", "12")),
    "diffenc": Plan("the encoder's bound and decoder, against separate calls"),
    "ocm": Plan("learning and using a reverse covariance, against the released form"),
    "ocm_grid": Plan("least-cost grids, against all rows and all images", found=r"^ steps|^ +\d+ |^histogram|^bars"),
    "splitting": Plan("split steps, against the released formulation", found=r"\bbars?\b|^ms a step"),
    "adaptive": Plan("evaluations of the adaptive ODE, against scipy's RK45", quick=("--n", "4")),
    "dxmi": Plan("tuning a policy, against the form it replaces"),
}
"""What `make bench` runs, in this order."""
SLOW: dict[str, Plan] = {
    "stf_training": Plan(
        "steps that stable targets save, against plain ones", ("--only", "mixture"),
        ("--only", "mixture", "--seeds", "1", "--steps", "400"), slow="trains four networks in each of three seeds",
    ),
    "dxmi_fashion": Plan(
        "four tuned steps, against a hundred of DDPM", (), ("--n", "100", "--rows", "ddpm:100"),
        found="all bars|times the distance| > ", slow="draws 5,000 images a row",
    ),
    "dxmi_gaussians": Plan(
        "tuned steps in two dimensions, against DDPM's", (), ("--seeds", "0", "--iterations", "500", "--pairs", "2"),
        slow="pretrains and tunes in three seeds",
    ),
    **{
        f"dxmi_{name}": Plan(
            "four tuned steps, against untuned ones", (name,),
            (name, "--n", "400", "--seeds", "2", "--rows", "dpm++:4,start:4"),
            found=r"all bars|is not below|nearer to training|^\| (dxmi|dpm|start)",
            slow="draws 2,000 images a row and seed", file="dxmi_small",
        )
        for name in ("digits", "emoji")
    },
}  # fmt: skip
"""What it leaves out unless asked for with `make bench SLOW=1`, and why."""
PLANS = SUITE | SLOW


@dataclass(frozen=True)
class Found:
    """What a benchmark said.

    Attributes:
        name: Of its file.
        about: What it measures.
        lines: Of its output, those that matter.
        verdict: "met", "missed", "no bar", "failed" or "not finished".
        seconds: It took, by the clock on the wall.
        cpu: It took of processors, with those it started.
        load: Processes that ran or waited while it did, mean over the last minute of it; the benchmark is one of them.
        commit: Of this repository; "-dirty" where files differ from it.
    """

    name: str
    about: str
    lines: list[str]
    verdict: str
    seconds: float
    cpu: float
    load: float
    commit: str


def run(name: str, plan: Plan, quick: bool, threads: int, minutes: float, out: Path, peers: Path) -> Found:
    """Runs a benchmark, keeps its output, and reads the lines that matter."""
    words = [sys.executable, str(HERE / f"{plan.file or name}.py"), *(plan.quick if quick else plan.given)]
    words += ["--check", "--threads", str(threads)] if plan.bars else []
    words += ["--peers", str(peers), "--json", str(out / "peers.json")] if name == "peers" else []
    start, before, path = time.perf_counter(), _spent(), out / f"{name}.txt"
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    with path.open("w") as output, tempfile.TemporaryFile("w+") as errors:
        # a session of its own: what it started ends with it, and Ctrl-C reaches it through us
        process = subprocess.Popen(words, stdout=output, stderr=errors, env=env, start_new_session=True)
        try:
            code = process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            code = 124
        finally:
            stopped = _stop(process)
        errors.seek(0)
        wrong = errors.read() if code else ""
        output.write(f"\n{wrong}" if wrong else "")
        output.write(f"\nstopped after {minutes:g} minutes\n" if stopped else "")
    failed = code not in (0, 1, 124) or "Traceback" in wrong
    verdict = "not finished" if code == 124 else "failed" if failed else "missed" if code else "met" if plan.bars else "no bar"
    text = path.read_text()
    lines = [" ".join(line.split()) for line in text.splitlines() if re.search(plan.found, line)]
    if failed or not lines:
        lines.append(text.strip().splitlines()[-1] if text.strip() else "no output")
    return Found(
        name, plan.about, lines, verdict, time.perf_counter() - start, _spent() - before, os.getloadavg()[0], _commit()
    )


def _spent() -> float:
    """Seconds of processors that processes took which this one started, and which have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _stop(process: subprocess.Popen[bytes]) -> bool:
    """Ends a process, with those it started; False where it has ended already."""
    if process.poll() is not None:
        return False
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return True


# ---- what is written


def _commit() -> str:
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else "unknown"


def table(content: dict[str, object], found: Sequence[Found]) -> str:
    """Everything as markdown."""
    quick = ", a quick look: figures are rough" if content["quick"] else ""
    lines = [f"{content['machine']}{quick}", "", f"{content['date']}, load {content['load']:.1f} before the first.", ""]
    lines += ["| benchmark | what it measures | what it found | bars | minutes | of processors | load | commit |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for one in found:
        said = "<br>".join(line.replace("|", "\\|") for line in one.lines)
        bars = one.verdict if one.verdict in ("met", "no bar") else f"**{one.verdict}**"
        times = f"{one.seconds / 60:.1f} | {one.cpu / 60:.1f} | {one.load:.1f} | {one.commit}"
        lines.append(f"| {one.name} | {one.about} | {said} | {bars} | {times} |")
    run_by_now = {one.name for one in found}
    left = [f"\n{name}: not run, it {plan.slow} (--slow)." for name, plan in SLOW.items() if name not in run_by_now]
    return "\n".join([*lines, *left]) + "\n"


def peers_table(path: Path) -> str:
    """The lines of peers.py as markdown; empty where it did not get so far."""
    if not path.is_file():
        return ""
    content = json.loads(path.read_text())
    lines = [
        "",
        "Milliseconds a step beyond the network, ours and theirs. Results in float32, over their largest value: the difference",
        "of both, the error of each against float64, and how far that moves with the last bit of the initial noise.",
        "",
    ]
    lines += ["| library | method | state | quieten | theirs | ratio | difference | our error | their error | last bit |"]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for line in content["lines"]:
        cells = [f"{line['library']} {line['version']}", line["method"], line["state"]]
        cells += [f"{line[key]:.{digits}f}" for key, digits in (("ours", 3), ("theirs", 3), ("ratio", 2))]
        cells += [f"{line[key]:.1e}" for key in ("difference", "our_error", "their_error", "last_bit")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *(f"\nLeft out: {reason}." for reason in content["missing"])]) + "\n"


def earlier(out: Path, facts: dict[str, object]) -> tuple[dict[str, object], list[Found]]:
    """What an earlier run in this folder found; its date and load stay in the table.

    Raises:
        ValueError: If it was of other `facts`.
    """
    path = out / "table.json"
    if not path.is_file():
        return facts, []
    content = json.loads(path.read_text())
    for key in ("machine", "quick", "threads"):
        if content.get(key) != facts[key]:
            raise ValueError(
                f"{path} is of `{key}` {content.get(key)}, not {facts[key]}: name another --out, or leave out --resume"
            )
    return content, [Found(**one) for one in content.pop("found") if one["verdict"] in DONE]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(PLANS)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {known}; a path does too. Default: all that are not slow")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--slow", action="store_true", help=f"those that take long, too: {', '.join(SLOW)}")
    parser.add_argument("--resume", action="store_true", help="keep what an earlier run in --out found")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for table.md, table.json and the outputs")
    parser.add_argument("--peers", type=Path, default=Path("build/peers"), help="folder where other libraries are installed")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--minutes", type=float, default=30.0, help="after which a benchmark is stopped")
    args = parser.parse_args()
    args.names = [Path(name).stem for name in args.names]
    if unknown := [name for name in args.names if name not in PLANS]:
        parser.error(f"no benchmark {unknown[0]!r}: one of {known}")
    return args


def main() -> int:
    args = parsed()
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the benchmark that runs ends too
    date, load = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), os.getloadavg()[0]
    torch.set_num_threads(args.threads)
    title = f"{header('diffusers', 'scipy')}, quieten {__version__}"
    facts = {"machine": title, "quick": args.quick, "threads": args.threads, "date": date, "load": load}
    found: list[Found] = []
    try:
        facts, found = earlier(args.out, facts) if args.resume else (facts, found)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not args.resume:
        (args.out / "peers.json").unlink(missing_ok=True)
    wanted = args.names or [name for name in (PLANS if args.slow else SUITE) if name not in {one.name for one in found}]
    found = [one for one in found if one.name not in wanted]
    for name in wanted:
        print(f"{name} ...", flush=True)
        try:
            found.append(run(name, PLANS[name], args.quick, args.threads, args.minutes, args.out, args.peers))
        except KeyboardInterrupt:
            print(f"stopped in {name}: --resume goes on with it")
            return 130
        print(f"{name}: {found[-1].verdict}, {found[-1].seconds:.0f} s", *found[-1].lines, sep="\n    ", flush=True)
        found.sort(key=lambda one: list(PLANS).index(one.name))
        write_atomic(args.out / "table.md", (table(facts, found) + peers_table(args.out / "peers.json")).encode())
        content = facts | {"found": [asdict(one) for one in found]}
        write_atomic(
            args.out / "table.json", (json.dumps(content, indent=1) + "\n").encode()
        )  # after each: a stop loses nothing
    print(f"table: {args.out / 'table.md'}")
    return int(any(one.verdict not in ("met", "no bar") for one in found))


if __name__ == "__main__":
    raise SystemExit(main())
