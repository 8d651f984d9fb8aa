"""Create data/price.json, the cost of a step as one size grows: python -m benchmarks.price     (about 5 minutes)

Time and peak memory of a step of plain training, of the paper's formulation, and of `decompose` with the paper's losses
and with the scrub loss as well, on multi-layer perceptrons from hundreds to millions of parameters. One thread; the
ratios are of one run, in CPU seconds. Run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from apd_minimal import Components
from apd_minimal.attributions.choose import cheapest
from benchmarks import machine
from benchmarks.steps import Paper, Plain, Size, Step, ours, peak, timed
from experiments.experiment import DATA, write_manifest

STORED = DATA / "price.json"
BASE = Size()
GROWTH: dict[str, list[Size]] = {
    "n_out": [replace(BASE, n_out=n) for n in (1, 4, 16, 64, 256, 1024)],
    "n_components": [replace(BASE, n_components=C) for C in (4, 16, 32, 64, 256)],
    "rank": [replace(BASE, rank=m) for m in (1, 4, 16, 64, None)],
    "depth": [replace(BASE, depth=n) for n in (2, 3, 4, 8)],
    "batch": [replace(BASE, batch=B) for B in (16, 64, 256, 1024)],
    "width": [replace(BASE, width=n) for n in (16, 64, 256, 1024)],
}
NAMED: dict[str, Size] = {
    "cheapest": Size(512, 3, 1, 2048, 4, 1, 1.0),
    "one output": Size(512, 3, 1, 512, 32, 1, 2.0),
    "four million, rank 1": Size(1024, 5, 16, 256, 64, 1, 2.0),
    "many outputs": Size(256, 3, 1024, 256, 128, 4, 2.0),
}
LONGEST = 1.0  # approximate limit on a step of the paper's formulation, in seconds


def kinds(size: Size) -> dict[str, Callable[[], Step]]:
    """List what is measured of a size."""
    made: dict[str, Callable[[], Step]] = {
        "plain": lambda: Plain(size).step,
        "ours": lambda: ours(size).advance,
        "scrub": lambda: ours(size, scrub=0.5).advance,
    }
    read = 4.0 * size.n_out * size.batch * size.n_components * sum(e for _, e in size.shapes)  # bytes
    if read / 5e9 < LONGEST:
        made["paper"] = lambda: Paper(size).step
    return made


def way(size: Size) -> str:
    """Return the exact way to attributions that the library chooses."""
    run = ours(size)
    components: Components = run.components.map(torch.Tensor.detach)
    return cheapest(run.network, components, None, run.next_batch(0, run.generator))


def main() -> None:
    """Measure memory, then time; store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=STORED, help="where the numbers go")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start, load = time.perf_counter(), os.getloadavg()[0]
    sizes = list(dict.fromkeys([*chain(*GROWTH.values()), *NAMED.values()]))
    memory = {size: {kind: peak(make) for kind, make in kinds(size).items()} for size in sizes}
    print(f"{time.perf_counter() - start:4.0f} s  memory measured", file=sys.stderr, flush=True)
    results: dict[Size, dict[str, Any]] = {}
    for size in sizes:
        seconds = timed(kinds(size), seconds=0.1)
        results[size] = {"size": size.asdict(), "way": way(size), "seconds": seconds, "megabytes": memory[size]}
        print(f"{time.perf_counter() - start:4.0f} s  {size}", file=sys.stderr, flush=True)
    wide = partial(machine.gemm_rate, 1, 2048, 2048)
    stored = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "load_before": load,
        "flop_rate": wide(2048),
        "bandwidth": max(machine.bandwidth().values()),
        "growth": {axis: [results[size] for size in row] for axis, row in GROWTH.items()},
        "named": {name: results[size] for name, size in NAMED.items()},
        "seconds": time.perf_counter() - start,
    }
    arguments.out.write_text(json.dumps(stored, indent=1) + "\n")
    write_manifest()


if __name__ == "__main__":
    main()
