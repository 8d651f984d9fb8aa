"""Create data/layerwise.*: residual MLPs decomposed jointly and layer by layer (chapter 21).

python -m experiments.layerwise [--only 20 10-10 50 25-25 runs] [--processes N]     (about 45 minutes of one core)
python -m experiments.layerwise --only search own                                   (30 minutes of one core)
python -m experiments.layerwise --only costs --again                                (2 minutes of one core)

Every target is decomposed in up to three ways: jointly, each block (a layer's two weights) alone, and each matrix
alone. In "runs" all use the target's recipe, which was found for joint runs. In "own" every part of the small targets
has a recipe of its own, and so does the joint run: on another target ("search"), first k, then the weight of
simplicity, then that of faithfulness is multiplied by each factor of `FACTORS`; the one with which most functions are
served is kept, of equals the one with the smallest error. The large targets and their joint decompositions are those of
chapters 8 and 9.
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
from experiments.experiment import DATA, Row, Rows, Study, Tensors, numbers, prefix, scaled
from experiments.layerwise_measures import groups_of, measure, part_facts

SIZES = {"20": (40, 400, (20,)), "10-10": (40, 400, (10, 10)), "50": (100, 1000, (50,)), "25-25": (100, 1000, (25, 25))}
LARGE = ("50", "25-25")
SEEDS = {"20": range(60, 65), "10-10": range(60, 65), "50": range(1), "25-25": range(1)}
STEPS = {"20": 1500, "10-10": 1500, "50": 4000, "25-25": 4000}
STORED = "10-10"  # the target whose components are stored
COST_STEPS = 40  # of the runs that are timed
SMALL = ("20", "10-10")
SEARCH_SEEDS = (100,)  # none of these is reported
FACTORS = {"top_k": (0.5, 1.0, 2.0), "simplicity": (0.25, 1.0, 4.0), "faithfulness": (0.2, 1.0, 5.0)}
Own = tuple[float, ...]  # a factor for each of these settings
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


def settings_of(name: str, own: Own = (1.0, 1.0, 1.0)) -> dict[str, Any]:
    """Return the arguments of `decompose`, without the inputs, the weights and the attributions; `own` scales some."""
    recipe = ResidualMLP(*SIZES[name]).recipe
    recipe |= {knob: scaled(recipe[knob], factor) for knob, factor in zip(FACTORS, own, strict=True)}
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


def alone(target: ResidualMLP, weights: list[str], seed: int, settings: dict[str, Any]) -> tuple[Any, float]:
    """Decompose some weights alone; return components in half precision and CPU seconds."""
    start = time.process_time()
    settings = {**settings, "attribution": target.attributions, "progress": False, "seed": seed}
    result = apd.decompose(target, target.recipe["batches"], weights, **settings)
    return result.components.map(lambda t: t.half().float()), round(time.process_time() - start, 1)


def search_run(job: tuple[Any, ...]) -> tuple[list[Row], Tensors]:
    """Decompose one part of a search target with some factors; count the functions that it serves."""
    name, seed, way, group, *own = job
    target, groups = target_of(name, seed), groups_of(len(SIZES[name][2]), way)
    number = list(groups).index(group)
    components, seconds = alone(target, groups[group], seed + number, settings_of(name, tuple(own)))
    x = target.data(4096)(0, torch.Generator().manual_seed(12_345))
    return [{"seconds": seconds, **part_facts(target, components, x)}], {}


def ranked(rows: list[Row], job: tuple[Any, ...]) -> tuple[int, float]:
    """Rank the factors of a job on the search targets: most served, then the smallest error."""
    found = [r for r in rows if tuple(r[f] for f in SEARCH.fields if f != "seed") == (job[0], *job[2:])]
    return sum(r["served"] for r in found), -sum(r["alone_error"] for r in found)


def search_of(rows: list[Row], name: str, way: str, group: str) -> tuple[list[tuple[Any, ...]], Own | None]:
    """List the search's runs on one part as far as they are known, and the chosen factors once all are done."""
    done = {SEARCH.job_of(row) for row in rows}
    jobs: list[tuple[Any, ...]] = []
    own = [1.0] * len(FACTORS)
    for i, factors in enumerate(FACTORS.values()):
        tries = [(*own[:i], factor, *own[i + 1 :]) for factor in factors]
        jobs += [(name, seed, way, group, *t) for t in tries for seed in SEARCH_SEEDS]
        if not set(jobs) <= done:
            return list(dict.fromkeys(jobs)), None
        own = list(max(tries, key=lambda t: ranked(rows, (name, 0, way, group, *t))))
    return list(dict.fromkeys(jobs)), tuple(own)


def search_jobs(rows: list[Row]) -> list[tuple[Any, ...]]:
    """List the search's runs on all parts, as far as they are known."""
    parts = [
        (name, way, group) for name in SMALL for way in ways_of(name) for group in groups_of(name.count("-") + 1, way)
    ]
    return [job for part in parts for job in search_of(rows, *part)[0]]


def own_of(job: Job) -> dict[str, Own]:
    """Return the factors that the search chose, by group; empty while it is not done."""
    name, _, way = job
    rows = SEARCH.kept(STUDY.stored().get("search", []))
    own = {group: search_of(rows, name, way, group)[1] for group in groups_of(name.count("-") + 1, way)}
    return {} if None in own.values() else own  # type: ignore[return-value]


def own_run(job: Job) -> tuple[list[Row], Tensors]:
    """Decompose a small target in one way, each part with its own factors, and measure."""
    name, seed, way = job
    target, groups, own = target_of(name, seed), groups_of(len(SIZES[name][2]), way), own_of(job)
    parts, seconds = {}, {}
    for i, (group, weights) in enumerate(groups.items()):
        parts[group], seconds[group] = alone(target, weights, seed + i, settings_of(name, own[group]))
    x = target.data(4096)(0, torch.Generator().manual_seed(12_345))
    active = {group: factors[0] for group, factors in own.items()}
    return [{"seconds": seconds, **measure(target, parts, x, active)}], {}


def own_jobs(rows: list[Row]) -> list[Job]:
    """List the runs with own factors, once these are known."""
    return [j for j in all_jobs() if j[0] in SMALL and own_of(j)]


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
SEARCH = Rows(("target", "seed", "way", "group", *FACTORS), search_jobs, search_run)
OWN = Rows(("target", "seed", "way"), own_jobs, own_run, lambda job: {"factors": own_of(job)})
STUDY = Study(
    "layerwise",
    {"runs": RUNS, "search": SEARCH, "own": OWN},
    {"costs": costs},
    prefixes=lambda job: (prefix(job), f"{job[0]}/{job[1]}/target."),
)

if __name__ == "__main__":
    STUDY.main(__doc__)
