"""The suite of benchmarks: none with a bar is forgotten, one that fails costs no other, and a stop loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import quieten
from helpers import refuses

FOLDER = Path(__file__).parents[1] / "benchmarks"
if not FOLDER.is_dir():
    pytest.skip("benchmarks/ is in the repository alone, not in what is installed", allow_module_level=True)
sys.path.append(str(FOLDER))
import run as suite  # noqa: E402, of benchmarks/

KINDS = {
    "good": "print('ratio 0.4, bar 0.5: met')",
    "short": "print('ratio 0.6, bar 0.5: missed'); raise SystemExit(1)",
    "broken": "print('ratio 0.6, bar 0.5'); print(1 / 0)",
    "gone": "raise SystemExit(3)",
    "silent": "",
    "slow": "import subprocess, sys\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    "print(f'bar {child.pid}')\nchild.wait()",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small benchmarks of every kind in place of the real ones."""
    for name, code in KINDS.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setattr(suite, "HERE", tmp_path)
    plans = {name: suite.Plan(name, quick=()) for name in KINDS}
    monkeypatch.setattr(suite, "SUITE", {name: plan for name, plan in plans.items() if name != "slow"})
    monkeypatch.setattr(suite, "SLOW", {"slow": suite.Plan("waits", slow="waits for a minute")})
    monkeypatch.setattr(suite, "PLANS", plans)
    monkeypatch.setattr(suite, "header", lambda *packages: "a machine")
    return tmp_path


def started(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(out), *words])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        return suite.main()
    finally:
        signal.signal(signal.SIGTERM, handler)


def verdicts(out: Path) -> dict[str, str]:
    return {one["name"]: one["verdict"] for one in json.loads((out / "table.json").read_text())["found"]}


def alive(pid: int) -> bool:
    """Whether a process runs: those that ended and wait to be asked do not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_every_benchmark_with_a_bar_is_in_the_suite() -> None:
    checked = {path.stem for path in FOLDER.glob("*.py") if '"--check"' in path.read_text()} - {"run"}
    run = {plan.file or name for name, plan in suite.PLANS.items()}
    assert checked <= run, f"not in the suite of benchmarks/run.py: {checked - run}"
    assert all((FOLDER / f"{name}.py").is_file() for name in run)
    assert all(plan.slow for plan in suite.SLOW.values())
    assert not any(plan.slow for plan in suite.SUITE.values())


def test_one_that_fails_costs_no_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = folder / "out"
    assert started(monkeypatch, out) == 1
    assert verdicts(out) == {"good": "met", "short": "missed", "broken": "failed", "gone": "failed", "silent": "met"}
    text = (out / "table.md").read_text()
    assert "ZeroDivisionError: division by zero" in text
    assert "slow: not run, it waits for a minute" in text
    assert "Traceback" in (out / "broken.txt").read_text()
    assert started(monkeypatch, folder / "other", "good") == 0


def test_what_does_not_end_is_stopped_with_those_it_started(folder: Path) -> None:
    found = suite.run("slow", suite.Plan("waits"), False, 1, 2 / 60, folder, folder)
    assert found.verdict == "not finished"
    assert 2 < found.seconds < 20
    assert 0 < found.cpu < 2
    time.sleep(0.1)
    assert not alive(int(found.lines[0].split()[1]))


def test_a_stop_loses_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = folder / "out"
    real = suite.run

    def interrupted(name: str, *args: object) -> suite.Found:
        if name == "broken":
            raise KeyboardInterrupt
        return real(name, *args)

    monkeypatch.setattr(suite, "run", interrupted)
    assert started(monkeypatch, out) == 130
    assert verdicts(out) == {"good": "met", "short": "missed"}
    monkeypatch.setattr(suite, "run", real)
    (folder / "good.py").write_text("raise SystemExit(3)")  # not run again
    assert started(monkeypatch, out, "--resume") == 1
    assert verdicts(out) == {"good": "met", "short": "missed", "broken": "failed", "gone": "failed", "silent": "met"}
    (folder / "broken.py").write_text("print('bar')")
    assert started(monkeypatch, out, "--resume", "short") == 1  # named: anew, and the others are kept
    assert verdicts(out)["good"] == "met"
    assert started(monkeypatch, out, "--resume") == 1
    assert verdicts(out)["broken"] == "met"
    assert started(monkeypatch, out, "--resume", "--quick") == 2
    with refuses("`quick`", "--resume"):
        suite.earlier(out, {"machine": f"a machine, quieten {quieten.__version__}", "quick": True, "threads": 1})


def test_ctrl_c_ends_what_runs(tmp_path: Path) -> None:
    """The real program, stopped as `kill` and `make` stop it."""
    words = [sys.executable, str(FOLDER / "run.py"), "loop", "--out", str(tmp_path)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "loop ...\n"
    output = tmp_path / "loop.txt"
    while not (output.is_file() and output.stat().st_size):
        time.sleep(0.1)
    before = {int(path.name) for path in Path("/proc").glob("[0-9]*") if _parent(path) == process.pid}
    assert before
    os.kill(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "--resume goes on with it" in rest
    assert not any(map(alive, before))


def _parent(path: Path) -> int:
    try:
        return int((path / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
