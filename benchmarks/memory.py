"""Peak memory of attributions by batch, of a step, of tidying and of scoring: python -m benchmarks.memory  (1 minute)

Each is measured in a process of its own: megabytes added by the attributions of that many samples.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

import apd_minimal as apd
from apd_minimal.outcome import HELD_OUT_SAMPLES
from apd_minimal.targets import TMS
from apd_minimal.tidy.tidy import TIDY_SAMPLES
from benchmarks.cases import ONE_LAYER
from benchmarks.run import high_water

ROOT = Path(__file__).parent.parent


def added(n_samples: int) -> float:
    """Measure the megabytes that the generic attributions of so many samples take."""
    case = ONE_LAYER
    target = case.target()
    TMS().fit(steps=5)
    network = apd.Network(target, target.weights)
    components = apd.Components.random(network.shapes, case.n_components, restarts=case.instances)
    x = target.data(n_samples)(0, torch.Generator().manual_seed(0))
    apd.attributions.gradient(network, components, x[:8])
    before = high_water()
    apd.attributions.gradient(network, components, x)
    return high_water() - before


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, help="print the memory of so many samples only, in megabytes")
    samples = parser.parse_args().samples
    torch.set_num_threads(1)
    if samples is not None:
        print(added(samples))
        return
    for name, n in (("a step", ONE_LAYER.batch), ("tidying", TIDY_SAMPLES), ("scoring", HELD_OUT_SAMPLES)):
        command = [sys.executable, "-m", "benchmarks.memory", "--samples", str(n)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT)
        print(f"{name:8s} {n:5d} samples {float(done.stdout.splitlines()[-1]):6.0f} MB")


if __name__ == "__main__":
    main()
