"""Create data/attributions.json: APD trained with each estimator of attributions (chapter 16).

python -m experiments.attributions [--only tms-5-2 | tms-40-10 | residual-20-10] [--processes N]     (about 2 hours)

Three targets, five seeds each. Every run has the target's recipe, with smaller batches where the recipe's are large;
only the attributions and k change. Runs have equal compute: as many steps as cost the floating-point operations of the
run with gradients; some estimators are also run with equal steps. k is scaled by the factor that did best on the search
seeds, which are not reported; on TMS 5-2 all estimators are also run with the recipe's own k. The smaller batches come
from chapter 11's grid (TMS 40-10) and from seeds 100 to 102 (residual MLP).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import apd_minimal as apd
from apd_minimal import attributions
from apd_minimal.attributions import Attribution
from apd_minimal.config import Schedule, at_progress
from apd_minimal.targets import TMS, ResidualMLP
from experiments.experiment import Row, Rows, Study, Tensors, numbers, ownership_means, taken_apart

TARGETS = ("tms-5-2", "tms-40-10", "residual-20-10")
SEEDS = range(60, 65)
SEARCH_SEEDS = {"tms-5-2": (100, 102), "tms-40-10": (100,), "residual-20-10": (100,)}  # 101 lacks a feature in 5-2
FACTORS = (0.5, 0.65, 0.8, 1.0)  # of k
ALSO_AT_EQUAL_STEPS = ("integrated gradients", "ablation")
OPTIONS: dict[str, dict[str, Any]] = {  # few samples, since they are computed at every step
    "gradient": {},
    "integrated gradients": {"n_steps": 4},
    "ablation": {},
    "shapley": {"n_samples": 2},
    "path shapley": {"n_samples": 4},
    "activation": {},
}
MOMENTS = 8  # number of evenly spaced steps at which masks are compared
Job = tuple[str, str, str, float, int]  # target, estimator, budget, factor of k, seed


def estimator_of(name: str) -> Attribution:
    """Create an estimator with its options for `decompose`; estimators that sample get their own generator."""
    function: Attribution = getattr(attributions, name.replace(" ", "_"))
    options = dict(OPTIONS[name])
    if "n_samples" in options:
        options["generator"] = torch.Generator().manual_seed(0)
    return partial(function, **options) if options else function


def untrained(name: str, seed: int = 0) -> TMS | ResidualMLP:
    """Create the target before training."""
    if name == "residual-20-10":
        return ResidualMLP(20, 200, (10,), seed=seed)
    n_features, d_hidden = map(int, name.removeprefix("tms-").split("-"))
    return TMS(n_features, d_hidden)


@cache
def target_of(name: str, seed: int) -> TMS | ResidualMLP:
    """Train the target of a seed."""
    target = untrained(name, seed)
    if isinstance(target, ResidualMLP):
        return target.fit(seed=seed, steps=3000, batch_size=1024)
    return target.fit(seed=seed)


def recipe_of(name: str) -> dict[str, Any]:
    """Return a target's recipe, for generic attributions and short runs."""
    recipe = {k: v for k, v in untrained(name).recipe.items() if k != "attribution"}
    if name == "tms-40-10":
        recipe["batches"] = replace(recipe["batches"], batch_size=128)
    if name == "residual-20-10":
        recipe |= {"batches": replace(recipe["batches"], batch_size=32), "steps": 1500}
    return recipe


def but_last(schedule: tuple[tuple[float, float], ...], factor: float) -> Schedule:
    """Scale k by a factor except at the last point: without the simplicity loss, k is large enough for everything."""
    *points, last = schedule
    return (*((t, factor * k) for t, k in points), last)


@cache
def operations(name: str, estimator: str, steps: int = 100) -> int:
    """Count floating-point operations of one step, averaged over a short run; measured once, then read from the table.

    Budgets are part of a run's settings: measured anew, they would change with every change in computing gradients.
    """
    for row in STUDY.stored().get("runs", []):
        if (row["target"], row["estimator"]) == (name, estimator):
            return int(row["operations"])
    settings = {**recipe_of(name), "steps": steps + 1, "tidy_every": 0.0, "seed": 0}
    counts: list[int] = []
    with FlopCounterMode(display=False) as counter:
        apd.decompose(
            target_of(name, SEEDS[0]),
            attribution=estimator_of(estimator),
            callback=lambda step, losses, components: counts.append(counter.get_total_flops()),
            progress=False,
            **settings,
        )
    return (counts[-1] - counts[0]) // steps


def settings_of(job: Job) -> dict[str, Any]:
    """Return the arguments of `decompose` for a run, without its attributions."""
    name, estimator, budget, factor, seed = job
    recipe = recipe_of(name)
    steps = recipe.get("steps", apd.Config(1, 1).steps)
    if budget == "compute":
        steps = round(steps * operations(name, "gradient") / operations(name, estimator))
    return {**recipe, "steps": steps, "top_k": but_last(recipe["top_k"], factor), "seed": seed}


def stored_settings(job: Job) -> Row:
    """Return the settings as stored; they identify a run."""
    settings = settings_of(job)
    return {"estimator": job[1], **OPTIONS[job[1]], **numbers(settings, batch=settings["batches"].batch_size)}


def watcher(
    network: apd.Network, config: apd.Config, own: Attribution, x: torch.Tensor, rows: list[dict[str, float]]
) -> Callable[[int, dict[str, list[float]], apd.Components], None]:
    """Create a callback that notes, at MOMENTS steps, the share of active pairs that other estimators choose too."""
    steps = {round(i * (config.steps - 1) / (MOMENTS - 1)) for i in range(MOMENTS)}

    def look(step: int, losses: dict[str, list[float]], components: apd.Components) -> None:
        if not steps or step < min(steps):
            return
        steps.remove(min(steps))
        k = at_progress(config.top_k, step / config.steps)
        masks = [
            apd.selection.batch_top_k(estimate(network, components, x), k)
            for estimate in (own, attributions.gradient, attributions.ablation)
        ]
        active = masks[0].sum()
        rows.append({
            "step": step,
            "gradient": ((masks[0] * masks[1]).sum() / active).item(),
            "ablation": ((masks[0] * masks[2]).sum() / active).item(),
        })  # fmt: skip

    return look


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Decompose one target with one estimator."""
    name, estimator, _, _, seed = job
    target, settings, estimate = target_of(name, seed), settings_of(job), estimator_of(estimator)
    network = apd.Network(target, target.weights)
    x = settings["batches"](0, torch.Generator().manual_seed(20_000 + seed))
    agreement: list[dict[str, float]] = []
    watch = watcher(network, apd.Config.from_dict(numbers(settings)), estimate, x, agreement)
    result, seconds = taken_apart(target, settings, attribution=estimate, callback=watch)
    components = result.components
    own = target.ownership(components)
    facts = {
        "seconds": seconds,
        "operations": operations(name, estimator),
        **ownership_means(own),
        "n": len(own.owned),
        "relative_faithfulness": apd.metrics.relative_faithfulness(components, network.weights).item(),
        "score": min(result.scores),
        "agreement": agreement,
    }
    return [facts], {}


def budget_of(estimator: str) -> str:
    """Return the budget that all estimators share; with gradients, equal compute is equal steps."""
    return "steps" if estimator == "gradient" else "compute"


def search_jobs(name: str) -> list[Job]:
    """List the runs by which k is chosen."""
    return [
        (name, estimator, budget_of(estimator), factor, seed)
        for seed in SEARCH_SEEDS[name]
        for estimator in OPTIONS
        for factor in FACTORS
    ]


def chosen(runs: list[Row], name: str, estimator: str) -> float:
    """Choose the factor of k with the most owned mechanisms on the search seeds, then the smallest error."""

    def score_of(factor: float) -> tuple[int, float]:
        searched = [r for r in runs if (r["target"], r["estimator"]) == (name, estimator) and r["factor"] == factor]
        searched = [r for r in searched if r["seed"] in SEARCH_SEEDS[name]]
        return sum(r["owned"] for r in searched), -sum(r["score"] for r in searched)

    return max(FACTORS, key=score_of)


def report_jobs(runs: list[Row], name: str) -> list[Job]:
    """List the runs that are reported."""
    jobs: list[Job] = []
    for seed in SEEDS:
        for estimator in OPTIONS:
            factor = chosen(runs, name, estimator)
            jobs.append((name, estimator, budget_of(estimator), factor, seed))
            if estimator in ALSO_AT_EQUAL_STEPS:
                jobs.append((name, estimator, "steps", factor, seed))
            if name == "tms-5-2" and factor != 1.0:
                jobs.append((name, estimator, budget_of(estimator), 1.0, seed))
    return jobs


def jobs(rows: list[Row]) -> list[Job]:
    """List every run; the reported ones are known when a target's search is done."""
    every: list[Job] = []
    for name in TARGETS:
        searched = search_jobs(name)
        stored = [RUNS.job_of(row) for row in rows if row["target"] == name]
        every += searched + (report_jobs(rows, name) if set(searched) <= set(stored) else stored)
    return list(dict.fromkeys(every))


RUNS = Rows(("target", "estimator", "budget", "factor", "seed"), jobs, run, stored_settings)
STUDY = Study("attributions", {"runs": RUNS}, about=lambda processes: {"processes": processes})

if __name__ == "__main__":
    STUDY.main(__doc__)
