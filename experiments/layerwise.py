"""Create data/layerwise.*: residual MLPs decomposed jointly and layer by layer (chapter 21).

python -m experiments.layerwise [--only 20 10-10 50 25-25 runs] [--processes N]     (about 45 minutes of one core)
python -m experiments.layerwise --only costs --again                                (2 minutes of one core)

Every target is decomposed in up to three ways: jointly, each block (a layer's two weights) alone, and each matrix
alone. All use the target's recipe, which was found for joint runs. The large targets and their joint decompositions
are those of chapters 8 and 9.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import apd_minimal as apd
from apd_minimal.scale.layerwise import decompose_groups
from apd_minimal.targets import ResidualMLP
from experiments.experiment import DATA, Row, Rows, Study, Tensors, numbers, prefix
from experiments.layerwise_measures import groups_of, measure

SIZES = {"20": (40, 400, (20,)), "10-10": (40, 400, (10, 10)), "50": (100, 1000, (50,)), "25-25": (100, 1000, (25, 25))}
LARGE = ("50", "25-25")
SEEDS = {"20": range(60, 65), "10-10": range(60, 65), "50": range(1), "25-25": range(1)}
STEPS = {"20": 1500, "10-10": 1500, "50": 4000, "25-25": 4000}
STORED = "10-10"  # the target whose components are stored
COST_STEPS = 40  # of the runs that are timed
Job = tuple[str, int, str]  # target, seed, way


@cache
def target_of(name: str, seed: int) -> ResidualMLP:
    """Train the target of a seed; the large ones are loaded."""
    n_features, d_resid, neurons = SIZES[name]
    target = ResidualMLP(n_features, d_resid, neurons, seed=seed)
    if name not in LARGE:
        return target.fit(seed=seed, steps=3000, batch_size=1024)
    tensors = load_file(DATA / "residual.safetensors")
    with torch.no_grad():
        for path in target.weights:
            target.get_parameter(path).copy_(tensors[f"{name}/{seed}/target.{path}"])
    return target


def ways_of(name: str) -> list[str]:
    """List the ways in which a target is decomposed; with one layer, its block is the whole network."""
    return ["joint"] + (["blocks"] if "-" in name else []) + ["matrices"]


def settings_of(name: str) -> dict[str, Any]:
    """Return the arguments of `decompose`, without the inputs, the weights and the attributions."""
    recipe = ResidualMLP(*SIZES[name]).recipe
    return {k: v for k, v in recipe.items() if k not in ("batches", "weights", "attribution")} | {"steps": STEPS[name]}


def stored_settings(job: Job) -> Row:
    """Return the settings as stored; they identify a run."""
    name, seed, way = job
    return numbers(settings_of(name), seed=seed, groups=groups_of(len(SIZES[name][2]), way))


def joint_of_chapters(name: str, seed: int) -> tuple[apd.Components, float]:
    """Load the stored joint decomposition of a large target, and its seconds."""
    tensors, start = load_file(DATA / "residual.safetensors"), f"{name}/{seed}/"
    factors = [
        {p: tensors[f"{start}{p}.{f}"].float() for p in groups_of(len(SIZES[name][2]), "joint")["all"]} for f in "AB"
    ]
    runs = json.loads((DATA / "residual.json").read_text())["runs"]
    (seconds,) = [r["seconds"] for r in runs if (r["target"], r["seed"]) == (name, seed)]
    return apd.Components(*factors), seconds


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Decompose one target in one way, and measure."""
    name, seed, way = job
    target = target_of(name, seed)
    seconds: dict[str, float] = {}
    parts: dict[str, apd.Components] = {}
    if way == "joint" and name in LARGE:
        parts["all"], seconds["all"] = joint_of_chapters(name, seed)
    else:
        for i, (group, weights) in enumerate(groups_of(len(SIZES[name][2]), way).items()):
            start = time.process_time()
            settings = {**settings_of(name), "attribution": target.attributions, "progress": False, "seed": seed + i}
            result = decompose_groups(target, target.recipe["batches"], {group: weights}, **settings)
            parts[group] = result[group].components.map(lambda t: t.half().float())
            seconds[group] = round(time.process_time() - start, 1)
    x = target.data(4096)(0, torch.Generator().manual_seed(12_345))
    facts = {"seconds": seconds, **measure(target, parts, x)}
    if name != STORED:
        return [facts], {}
    tensors = {f"{name}/{seed}/target.{p}": target.get_parameter(p).detach().clone() for p in target.weights}
    for components in parts.values():
        for factor, own in (("A", components.A), ("B", components.B)):
            tensors |= {f"{prefix(job)}{path}.{factor}": t.half().contiguous() for path, t in own.items()}
    return [facts], tensors


def all_jobs() -> list[Job]:
    """List every run, one seed of all targets before the next."""
    jobs = [(name, seed, way) for name in SIZES for seed in SEEDS[name] for way in ways_of(name)]
    return sorted(jobs, key=lambda job: job[1])


def status(field: str) -> float:
    """Read the memory of this process in megabytes: VmRSS now, VmHWM at its peak so far."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":")]
    return int(line.split()[1]) / 1024


def cost_of(job: tuple[str, str, str]) -> dict[str, float]:
    """Measure one group's run in a fresh process: CPU time and operations of a step, and peak memory.

    Args:
        job: target, way, group.
    """
    name, way, group = job
    torch.set_num_threads(1)
    target, weights = target_of(name, 0), groups_of(len(SIZES[name][2]), way)[group]
    settings = {**settings_of(name), "attribution": target.attributions, "progress": False}
    seconds: list[float] = []
    flops: list[int] = []
    peak: list[float] = []  # of the steps, without the scoring at the end

    def record(step: int, losses: dict[str, list[float]], components: apd.Components) -> None:  # at every step
        seconds.append(time.process_time())
        flops.append(counter.get_total_flops())
        peak.append(status("VmHWM"))

    tiny = ResidualMLP(4, 8, (2,))  # warm-up: what torch loads at the first step is not counted
    apd.decompose(tiny, progress=False, **{**tiny.recipe, "steps": 2})
    before = status("VmRSS")
    settings |= {"steps": COST_STEPS, "callback": record}
    counter = FlopCounterMode(display=False)
    apd.decompose(target, target.recipe["batches"], weights, **settings)
    cost = {"seconds": float(np.median(np.diff(seconds))), "peak_mb": peak[-1] - before}
    with counter:
        apd.decompose(target, target.recipe["batches"], weights, **{**settings, "steps": 3})
    return {**cost, "flops": flops[-1] - flops[-2]}


def costs() -> dict[str, Any]:
    """Measure CPU time, operations and memory of every way, on the large targets."""
    results: dict[str, Any] = {}
    for name in LARGE:
        results[name] = {}
        for way in ways_of(name):
            results[name][way] = {}
            for group in groups_of(len(SIZES[name][2]), way):
                with multiprocessing.get_context("spawn").Pool(1) as fresh:
                    results[name][way][group] = fresh.apply(cost_of, ((name, way, group),))
            print(name, way, results[name][way], flush=True)
    return results


RUNS = Rows(("target", "seed", "way"), lambda rows: all_jobs(), run, stored_settings)
STUDY = Study(
    "layerwise",
    {"runs": RUNS},
    {"costs": costs},
    prefixes=lambda job: (prefix(job), f"{job[0]}/{job[1]}/target."),
)

if __name__ == "__main__":
    STUDY.main(__doc__)
