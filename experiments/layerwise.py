"""Create data/layerwise.*: residual MLPs decomposed jointly and layer by layer (chapter 21).

python -m experiments.layerwise [--only 20 10-10 50 25-25 runs] [--processes N]     (about 45 minutes of one core)
python -m experiments.layerwise --only search own                                   (6 minutes of one core)
python -m experiments.layerwise --only weights tuned                                (30 minutes of one core)
python -m experiments.layerwise --only costs --again                                (2 minutes of one core)

Every target is decomposed in up to three ways: jointly, each block (a layer's two weights) alone, and each matrix
alone. In "runs" all use the target's recipe, which was found for joint runs. In "own" the parts of `SEARCHED` have a k
of their own: on another target ("search") it is multiplied by several factors; the one with which most functions are
served is kept, of equals the one with the smallest error. Parts for which the recipe's k is best are not run again.
(The recipe is also kept where it serves nearly all functions: jointly, and for reading matrices.) In "tuned" parts and
joint runs have k and the weights of the losses chosen by the same rule, one setting after the other ("weights"); the
joint recipe was found by trying on target seeds from 100 up, and how many trials that took is not known, so that the
joint runs of two layers get the same search (with one layer they own all functions with the recipe). The large targets
and their joint decompositions are those of chapters 8 and 9.
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
from apd_minimal.advice import UNFAITHFUL
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
SEARCHED = {  # factors of k that were tried: a smaller one where 0.5 did best, not 2 where it had done worst
    ("10-10", "blocks", "block 1"): (0.25, 0.5, 1.0, 2.0),
    ("10-10", "blocks", "block 2"): (0.25, 0.5, 1.0),
    ("20", "matrices", "write 1"): (0.5, 1.0, 2.0),
}
SEARCH_SEED = 100  # not reported
TRIED = {"top_k": 2.0, "minimality": 4.0, "simplicity": 4.0, "faithfulness": 4.0}  # by what each is first multiplied
TUNED = (  # what gets settings of its own
    ("10-10", "blocks", "block 1"),
    ("10-10", "blocks", "block 2"),
    ("10-10", "joint", "all"),
    ("20", "matrices", "write 1"),
)
RECIPE = (1.0,) * len(TRIED)
Part = tuple[str, str, str]  # target, way, group
Factors = tuple[float, ...]  # of the settings in TRIED
Job = tuple[str, int, str]  # target, seed, way


@cache
def target_of(name: str, seed: int) -> ResidualMLP:
    """Load the target of a seed, or train it if it is not stored."""
    n_features, d_resid, neurons = SIZES[name]
    target = ResidualMLP(n_features, d_resid, neurons, seed=seed)
    source = DATA / ("residual.safetensors" if name in LARGE else "layerwise.safetensors")
    tensors, start = load_file(source) if source.exists() else {}, f"{name}/{seed}/target."
    if not any(stored.startswith(start) for stored in tensors):
        return target.fit(seed=seed, steps=3000, batch_size=1024)
    with torch.no_grad():
        for path in target.weights:
            target.get_parameter(path).copy_(tensors[start + path])
    return target


def ways_of(name: str) -> list[str]:
    """List the ways in which a target is decomposed; with one layer, its block is the whole network."""
    return ["joint"] + (["blocks"] if "-" in name else []) + ["matrices"]


def settings_of(name: str, factor: float = 1.0, *weights: float) -> dict[str, Any]:
    """Return the arguments of `decompose` but inputs, weights and attributions; settings in TRIED times factors."""
    recipe = ResidualMLP(*SIZES[name]).recipe | {"steps": STEPS[name]}
    recipe |= {setting: scaled(recipe[setting], by) for setting, by in zip(TRIED, (factor, *weights), strict=False)}
    return {k: v for k, v in recipe.items() if k not in ("batches", "weights", "attribution")}


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


def search_run(job: tuple[str, str, str, float]) -> tuple[list[Row], Tensors]:
    """Decompose one part of the search target with k times a factor; count the functions that it serves."""
    name, way, group, factor = job
    target, groups = target_of(name, SEARCH_SEED), groups_of(len(SIZES[name][2]), way)
    components, seconds = alone(target, groups[group], list(groups).index(group), settings_of(name, factor))
    x = target.data(4096)(0, torch.Generator().manual_seed(12_345))
    return [{"seconds": seconds, **part_facts(target, components, x)}], {}


def factors_of(job: Job) -> dict[str, float]:
    """Return the factor of k that the search chose for each group; 1 where nothing was searched."""
    name, _, way = job
    rows, chosen = STUDY.stored()["search"], {}
    for group in groups_of(len(SIZES[name][2]), way):
        found = [r for r in rows if (r["target"], r["way"], r["group"]) == (name, way, group)]
        best = max(found, key=lambda r: (r["served"], -r["alone_error"]), default={"factor": 1.0})
        chosen[group] = best["factor"]
    return chosen


def stored_part(job: Job, group: str, weights: list[str]) -> tuple[apd.Components, float]:
    """Load a part that was decomposed with the recipe's k, and its seconds."""
    tensors = load_file(DATA / "layerwise.safetensors")
    (row,) = (r for r in STUDY.stored()["runs"] if RUNS.job_of(r) == job)
    A, B = ({p: tensors[f"{prefix(job)}{p}.{factor}"].float() for p in weights} for factor in "AB")
    return apd.Components(A, B), row["seconds"][group]


def own_run(job: Job) -> tuple[list[Row], Tensors]:
    """Decompose a target in one way, each part with its own k, and measure."""
    name, seed, way = job
    target, groups, factors = target_of(name, seed), groups_of(len(SIZES[name][2]), way), factors_of(job)
    parts, seconds = {}, {}
    for i, (group, weights) in enumerate(groups.items()):
        if factors[group] == 1 and name == STORED:  # the same run is stored
            parts[group], seconds[group] = stored_part(job, group, weights)
        else:
            parts[group], seconds[group] = alone(target, weights, seed + i, settings_of(name, factors[group]))
    x = target.data(4096)(0, torch.Generator().manual_seed(12_345))
    return [{"seconds": seconds, **measure(target, parts, x, factors)}], {}


def own_jobs(rows: list[Row]) -> list[Job]:
    """List the runs in which a part has another k than the recipe's, once the search is done."""
    if len(STUDY.stored().get("search", [])) < sum(map(len, SEARCHED.values())):
        return []
    jobs = [(name, seed, way) for name, way in dict.fromkeys(part[:2] for part in SEARCHED) for seed in SEEDS[name]]
    return [job for job in jobs if set(factors_of(job).values()) != {1.0}]


def search_of(part: Part, rows: list[Row]) -> tuple[Factors, list[Factors]]:
    """Follow the search for a part's settings: the best factors so far, and those to be tried next.

    One setting after the other is multiplied and divided by a number, at the best of the others so far; where an end
    does best, one step further is tried. The best serves most functions, of equals it has the smallest error. Parts
    that do not sum to the weights are not taken. (Rows without that measure are of runs in which nothing warned of it.)
    """

    def good(row: Row) -> tuple[bool, int, float]:
        return row.get("relative_faithfulness", 0.0) <= UNFAITHFUL, row["served"], -row["alone_error"]

    keys = {tuple(r[name] for name in TRIED): r for r in rows if (r["target"], r["way"], r["group"]) == part}
    for r in STUDY.stored().get("search", []):
        if (r["target"], r["way"], r["group"]) == part:
            keys |= {(r["factor"], *RECIPE[1:]): r}
    best = RECIPE
    for i, by in enumerate(TRIED.values()):
        powers = [0, -1, 1]  # the first of equals wins
        while True:
            line = {n: (*best[:i], by**n, *best[i + 1 :]) for n in powers}
            if missing := [factors for factors in line.values() if factors not in keys]:
                return best, missing
            n = max(powers, key=lambda n: good(keys[line[n]]))
            if abs(n) != 1 or 2 * n in powers:
                break
            powers.append(2 * n)
        best = line[n]
    return best, []


def weights_run(job: tuple[Any, ...]) -> tuple[list[Row], Tensors]:
    """Decompose one part of the search target with settings times factors; count the functions that it serves."""
    (name, way, group), factors = job[:3], job[3:]
    target, groups = target_of(name, SEARCH_SEED), groups_of(len(SIZES[name][2]), way)
    components, seconds = alone(target, groups[group], list(groups).index(group), settings_of(name, *factors))
    x = target.data(4096)(0, torch.Generator().manual_seed(12_345))
    left = apd.metrics.relative_faithfulness(components, apd.Network(target, components.paths).weights).item()
    return [{"seconds": seconds, **part_facts(target, components, x), "relative_faithfulness": left}], {}


def weights_jobs(rows: list[Row]) -> list[tuple[Any, ...]]:
    """List the trials that are stored, and those that come next for each part."""
    stored = [job for job in map(WEIGHTS.job_of, rows) if job[:3] in TUNED]
    return stored + [(*part, *factors) for part in TUNED for factors in search_of(part, rows)[1]]


def tuned_of(job: Job) -> dict[str, Factors]:
    """Return the factors that the search chose for each group; 1 where nothing was searched."""
    name, _, way = job
    rows, groups = STUDY.stored().get("weights", []), groups_of(len(SIZES[name][2]), way)
    return {g: search_of((name, way, g), rows)[0] if (name, way, g) in TUNED else RECIPE for g in groups}


def tuned_run(job: Job) -> tuple[list[Row], Tensors]:
    """Decompose a target in one way, each part with its own settings, and measure."""
    name, seed, way = job
    target, groups, factors = target_of(name, seed), groups_of(len(SIZES[name][2]), way), tuned_of(job)
    parts, seconds = {}, {}
    for i, (group, weights) in enumerate(groups.items()):
        if factors[group] == RECIPE and name == STORED:  # the same run is stored
            parts[group], seconds[group] = stored_part(job, group, weights)
        else:
            parts[group], seconds[group] = alone(target, weights, seed + i, settings_of(name, *factors[group]))
    x = target.data(4096)(0, torch.Generator().manual_seed(12_345))
    return [{"seconds": seconds, **measure(target, parts, x, {g: own[0] for g, own in factors.items()})}], {}


def tuned_jobs(rows: list[Row]) -> list[Job]:
    """List the runs in which a part has other settings than the recipe's, once the searches are done."""
    searched = STUDY.stored().get("weights", [])
    done = [part for part in TUNED if not search_of(part, searched)[1]]
    ways = dict.fromkeys(part[:2] for part in TUNED if all(p in done for p in TUNED if p[:2] == part[:2]))
    jobs = [(name, seed, way) for name, way in ways for seed in SEEDS[name]]
    return [job for job in jobs if set(tuned_of(job).values()) != {RECIPE}]


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
SEARCH = Rows(
    ("target", "way", "group", "factor"),
    lambda rows: [(*part, factor) for part, factors in SEARCHED.items() for factor in factors],
    search_run,
    lambda job: numbers(settings_of(job[0], job[3]), seed=SEARCH_SEED),
)
OWN = Rows(
    ("target", "seed", "way"), own_jobs, own_run, lambda job: stored_settings(job) | {"factors": factors_of(job)}
)
WEIGHTS = Rows(
    ("target", "way", "group", *TRIED),
    weights_jobs,
    weights_run,
    lambda job: numbers(settings_of(job[0], *job[3:]), seed=SEARCH_SEED),
)
TUNED_RUNS = Rows(
    ("target", "seed", "way"), tuned_jobs, tuned_run, lambda job: stored_settings(job) | {"factors": tuned_of(job)}
)
STUDY = Study(
    "layerwise",
    {"runs": RUNS, "search": SEARCH, "own": OWN, "weights": WEIGHTS, "tuned": TUNED_RUNS},
    {"costs": costs},
    prefixes=lambda job: (prefix(job), f"{job[0]}/{job[1]}/target."),
)

if __name__ == "__main__":
    STUDY.main(__doc__)
