"""Time a step of the decomposition in one run on one thread: python -m benchmarks.run

    (a) a plain training step of the target        (b) the paper's formulation
    (c) ours, for any network                      (d) ours, with the target's own attributions

For a TMS, (a) and (b) have several targets stacked on one axis, each with its own samples, as in the reference; ours
has as many restarts on one target, which share their samples. Batches are drawn beforehand. The tables are printed, the
numbers stored in data/benchmarks.json. Run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch

from apd_minimal.targets import TMS
from benchmarks import cost, machine, ours, table
from benchmarks.cases import CASES, GROWTH, Case
from benchmarks.paper import Paper
from benchmarks.stacked import Plain
from experiments.experiment import DATA, write_manifest

STORED = DATA / "benchmarks.json"
KINDS = ("plain", "loaded", "paper", "ours", "special")
Times = list[tuple[float, float]]  # wall-clock and CPU seconds


def kinds(case: Case) -> list[str]:
    """List what can be timed of a case."""
    missing = {"special"} if not ours.has_special(case) else set()
    if not case.neurons:
        missing |= {"loaded"}
    return [kind for kind in KINDS if kind not in missing]


def clocked(step: Callable[[], Any], n_steps: int) -> Times:
    """Time each of n_steps steps, in seconds."""
    times = []
    for _ in range(n_steps):
        start, start_cpu = time.perf_counter(), time.process_time()
        step()
        times.append((time.perf_counter() - start, time.process_time() - start_cpu))
    return times


def timer(case: Case, kind: str) -> Callable[[int], Times]:
    """Create a function that times a number of steps."""
    batches = case.inputs(4)
    if kind in ("ours", "special"):
        return lambda n_steps: ours.times(case, batches, n_steps, special=kind == "special")
    step = Paper(case, batches).step if kind == "paper" else Plain(case, batches, loaded=kind == "loaded").step
    step()  # to warm up
    return lambda n_steps: clocked(step, n_steps)


def summary(times: Times) -> dict[str, float]:
    """Summarise CPU seconds, so that other processes do not count: median, smallest and largest.

    On an idle machine wall-clock time is the same, since there is one thread.
    """
    clock, cpu = ([time[i] for time in times] for i in (0, 1))
    return {
        "median": median(cpu),
        "min": min(cpu),
        "max": max(cpu),
        "n": len(cpu),
        "clock": median(clock),
        "processor_share": sum(cpu) / sum(clock),
    }


def timed(case: Case, rounds: int = 5, seconds: float = 1.0) -> dict[str, dict[str, float]]:
    """Time every kind of step, in rounds, so that a disturbance hits all of them alike.

    Args:
        case: which experiment.
        rounds: number of rounds; two if a step of the paper's formulation takes over ten seconds.
        seconds: spent on each kind in a round, unless one step takes longer.

    Returns:
        dict[str, dict[str, float]]: per kind, its summary.
    """
    timers = {kind: timer(case, kind) for kind in kinds(case)}
    times: dict[str, Times] = {kind: run(1) for kind, run in timers.items()}
    steps = {kind: min(50, max(1, int(seconds / found[0][0]))) for kind, found in times.items()}
    for _ in range(1 if times["paper"][0][0] > 10 else rounds - 1):
        for kind, run in timers.items():
            times[kind] += run(steps[kind])
    return {kind: summary(found) for kind, found in times.items()}


def high_water() -> float:
    """Read the peak memory of this process so far, in megabytes."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return float(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # starts at the parent process's


def peak_memory(case: Case, kind: str) -> dict[str, float]:
    """Measure a fresh process after imports and a little training, and what two steps add to it."""
    TMS().fit(steps=5)
    case.target()
    before = high_water()
    timer(case, kind)(1)
    return {"before": before, "added": high_water() - before}


def measured_memory(case: Case) -> dict[str, dict[str, float]]:
    """Measure the peak memory of each kind of step, each in a process of its own."""
    results = {}
    for kind in KINDS:
        if kind == "loaded" or (kind == "special" and not ours.has_special(case)):
            continue
        command = [sys.executable, "-m", "benchmarks.run", "--memory", case.name, kind]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=DATA.parent)
        results[kind] = json.loads(done.stdout.splitlines()[-1])
    return results


def drawing(case: Case) -> float:
    """Time the drawing of a batch, in seconds: it is not part of the steps."""
    source, generator = case.target().data(case.batch * case.instances), torch.Generator()
    return median(machine.repeated(lambda: source(0, generator), seconds=0.1))


def result(case: Case, flop_rate: float, bandwidth: float) -> dict[str, Any]:
    """Measure everything about one case."""
    results: dict[str, Any] = {"name": case.name, "steps": timed(case), "memory": measured_memory(case)}
    work = {"paper": cost.paper(case), "ours": cost.ours(case)}
    if "special" in results["steps"]:
        work["special"] = cost.ours(case, special=True)
    results["work"] = {
        kind: {name: {"flops": part.flops, "bytes": part.bytes} for name, part in parts.items()}
        for kind, parts in work.items()
    }
    results["floor"] = {kind: cost.floor(parts, flop_rate, bandwidth) for kind, parts in work.items()}
    return results | {
        "drawing": drawing(case),
        "reference": case.reference and dict(zip(("plain", "paper"), case.reference, strict=True)),
        "goal_b": case.goal_b,
        "goal_a": case.goal_a,
    }


def growth() -> dict[str, list[dict[str, float]]]:
    """Measure how a step's time grows with C, n_out and B."""
    curves: dict[str, list[dict[str, float]]] = {}
    for name, cases in GROWTH.items():
        curves[name] = []
        for case in cases:
            steps = timed(case, rounds=3, seconds=0.2)
            value = {"C": case.n_components, "n_out": case.n_features, "B": case.batch}[name]
            curves[name].append({"value": value, **{kind: found["median"] for kind, found in steps.items()}})
    return curves


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=STORED, help="where the numbers go")
    parser.add_argument("--only", nargs="*", default=None, help="names of cases, for a quick look")
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "KIND"), help="print one peak memory, in megabytes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory:
        name, kind = arguments.memory
        print(json.dumps(peak_memory(next(case for case in CASES if case.name == name), kind)))
        return
    start, load = time.perf_counter(), os.getloadavg()[0]
    chosen = [case for case in CASES if arguments.only is None or case.name in arguments.only]
    stored: dict[str, Any] = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "load_before": load}
    stored["machine"] = machine.describe(chosen)
    flop_rate = max(found["flops_per_second"] for found in stored["machine"]["matrix_products"])
    bandwidth = max(stored["machine"]["bytes_per_second"].values())
    stored |= {"flop_rate": flop_rate, "bandwidth": bandwidth, "cases": []}
    for case in chosen:
        stored["cases"].append(result(case, flop_rate, bandwidth))
        print(f"{time.perf_counter() - start:4.0f} s  {case.name}", file=sys.stderr, flush=True)
    stored["growth"] = growth() if arguments.only is None else {}
    stored["seconds"] = time.perf_counter() - start
    arguments.out.write_text(json.dumps(stored, indent=1) + "\n")
    write_manifest()
    print(table.text(stored))


if __name__ == "__main__":
    main()
