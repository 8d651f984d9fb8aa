"""Peak memory of a step, of tidying, scoring and diagnosing: python -m benchmarks.memory     (3 minutes)

Of the paper's residual MLP, 100 functions in 50 neurons and 130 components, at rank 1 and at full rank. Each is
measured in a process of its own, after three steps: megabytes resident at most, beyond those before it. Needs Linux.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import apd_minimal as apd
from apd_minimal.algorithm import begin
from apd_minimal.outcome import outcome
from apd_minimal.study.diagnose import diagnose
from apd_minimal.targets import TMS
from apd_minimal.tidy.tidy import TIDY_SAMPLES, tidy
from apd_minimal.train import Run
from benchmarks.cases import ONE_LAYER
from benchmarks.run import high_water

ROOT = Path(__file__).parent.parent


def diagnosing(run: Run) -> None:
    """Diagnose the first restart by as many samples as tidying has."""
    x = run.many_inputs(TIDY_SAMPLES, torch.Generator().manual_seed(0))
    diagnose(run.network, run.components.restart(0), x, ONE_LAYER.top_k)


JOBS: dict[str, Callable[[Run], Any]] = {
    "a step": Run.advance,
    "tidying": tidy,
    "scoring": outcome,
    "diagnosing": diagnosing,
}


def resident() -> float:
    """Read the memory of this process, in megabytes, and let its peak begin anew."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free goes back to the system, so that it is not counted
    Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return float(line.split()[1]) / 1024


def added(job: str, rank: int | None) -> float:
    """Measure the megabytes that a job takes at most, beyond those of a run between two steps."""
    TMS().fit(steps=5)
    settings = {k: v for k, v in ONE_LAYER.settings().items() if k != "hidden_modules"}
    settings |= {"rank": rank, "scrub": 0.5, "tidy_every": 0.5, "steps": 100}
    target = ONE_LAYER.target()
    network = apd.Network(target, target.weights, None, ONE_LAYER.settings()["hidden_modules"])
    run = begin(network, target.data(ONE_LAYER.batch), apd.Config.from_dict(settings), "mse", None)
    for _ in range(3):
        run.advance()
    with torch.no_grad():
        for factors in run.components.parameters():
            factors[:, :20] = 0  # for new starts
    before = resident()
    JOBS[job](run)
    return high_water() - before


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs=2, metavar=("JOB", "RANK"), help="print one number; rank 0 for full rank")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    if only is not None:
        print(added(only[0], int(only[1]) or None))
        return
    for rank in (1, 0):
        for job in JOBS:
            command = [sys.executable, "-m", "benchmarks.memory", "--only", job, str(rank)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT)
            print(f"rank {rank or 'full':4} {job:10s} {float(done.stdout.splitlines()[-1]):6.0f} MB", flush=True)


if __name__ == "__main__":
    main()
