"""What `keep_freed_memory` saves when a CPU samples: the same work in processes with and without it.

    python benchmarks/allocator.py [--check] [--rounds 5] [--n 100] [--threads 1]

Every round starts a process of each kind, in turn. Each draws `n` images of zoo:fashion-mnist by 10 steps of DPM-Solver++ four
times over, and tells the quickest, the pages it faulted in and the most memory it held. Seconds are the processor's with one
thread, the wall's with more. With --check the exit status says whether the least time with it is below that without, in at most
5 % more memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from common import header
from quieten import Exponential, generate, karras, keep_freed_memory, open_source

__all__ = ["main"]

BAR_MEMORY = 1.05


def drawn(n: int) -> dict[str, float]:
    """Seconds of the quickest of four rounds, page faults of a round, and the process's peak in MiB."""
    denoiser, label = open_source("zoo:fashion-mnist").denoiser, torch.arange(n) % 10
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds, faults = [], []
    for _ in range(4):
        start, before = clock(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        generate(denoiser, n, grid=karras(10), transition=Exponential(2), cond={"label": label}, batch=n)
        seconds.append(clock() - start)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return {"seconds": min(seconds), "faults": min(faults), "MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail unless it is quicker, in as much memory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--n", type=int, default=100, help="images at once")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--case", choices=("as it comes", "kept"), help="measure one, in this process, and print JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.case is not None:
        if args.case == "kept" and not keep_freed_memory():
            raise SystemExit("there is nothing to set here: no glibc, or the environment has settings of its own")
        print(json.dumps(drawn(args.n)))
        return 0
    print(header())
    told: dict[str, list[dict[str, float]]] = {"as it comes": [], "kept": []}
    for _ in range(args.rounds):
        for case, rows in told.items():
            own = [sys.executable, __file__, "--n", str(args.n), "--threads", str(args.threads), "--case", case]
            rows.append(json.loads(subprocess.run(own, capture_output=True, text=True, check=True).stdout))
    least = {case: {key: min(row[key] for row in rows) for key in rows[0]} for case, rows in told.items()}
    for case, row in least.items():
        print(f"{case}: {row['seconds']:.3f} s, {row['faults']:,.0f} pages faulted in, at most {row['MiB']:.0f} MiB")
    ratio, memory = (least["kept"][key] / least["as it comes"][key] for key in ("seconds", "MiB"))
    met = ratio < 1.0 and memory <= BAR_MEMORY
    print(f"time {ratio:.2f}, bar 1; memory {memory:.2f}, bar {BAR_MEMORY:g}: {'met' if met else 'missed'}")
    return int(args.check and not met)


if __name__ == "__main__":
    raise SystemExit(main())
