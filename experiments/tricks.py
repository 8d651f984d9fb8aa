"""Create data/tricks.json: every trick that makes a step cheaper, on and off (chapter 19).

python -m experiments.tricks [--only runs | steps] [--processes N] [--again]     (20 minutes, 5 of them the timings)

`runs`: ownership in whole decompositions with a trick on, on two small targets and five seeds each. The recipes are
those of chapter 16 (TMS 5-2 with its own k, the residual MLP with the k that its search chose); a trick changes one
setting and nothing is tuned for it. `steps`: time and memory of a step (benchmarks/trick_steps.py), on one thread of an
idle machine. The 8-bit optimiser needs torchao 0.18, which is no requirement: without it, its stored runs are kept.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

import apd_minimal as apd
from apd_minimal.algorithm import begin
from apd_minimal.attributions import gradient
from apd_minimal.loop import follow
from apd_minimal.outcome import outcome
from apd_minimal.targets import TMS, ResidualMLP
from apd_minimal.train import Run
from benchmarks import trick_steps
from benchmarks.small_moments import has_torchao, optimiser_of
from experiments import attributions
from experiments.attributions import but_last, target_of
from experiments.experiment import Row, Rows, Study, Tensors

SEEDS = range(5)
FACTOR = 0.8  # of the residual MLP's k, chosen in chapter 16 on seed 100
SETTINGS: dict[str, dict[str, Any]] = {  # the setting that a trick changes
    "off": {},
    "rank full": {"rank": None},
    "rank 2": {"rank": 2},
    "rank 1": {"rank": 1},
    "4 probes": {"n_probes": 4},
    "1 probe": {"n_probes": 1},
    "bfloat16": {"autocast": True},
    "both moments in bfloat16": {"optimiser": "both"},
    "8-bit moments": {"optimiser": "8-bit"},
}
TRICKS = {  # "off" is full rank for TMS 5-2 and rank 1 for the residual MLP, so that these two need not be run again
    "residual-20-10": ("off", "rank full", "rank 2", "4 probes", "1 probe", "bfloat16", "both moments in bfloat16",
                       "8-bit moments"),
    "tms-5-2": ("off", "rank 1", "1 probe", "bfloat16", "both moments in bfloat16"),
}  # fmt: skip
Job = tuple[str, str, int]  # target, trick, seed


def recipe_of(name: str, seed: int) -> dict[str, Any]:
    """Return the arguments of `decompose` with every trick off."""
    recipe = attributions.recipe_of(name) | {"seed": seed}
    if name == "residual-20-10":
        recipe |= {"top_k": but_last(recipe["top_k"], FACTOR)}
    return recipe


def decompose(target: TMS | ResidualMLP, recipe: dict[str, Any], trick: dict[str, Any], seed: int) -> apd.Decomposition:
    """Run with a trick on; without one, this is `apd.decompose`."""
    recipe = dict(recipe)
    batches, weights = recipe.pop("batches"), recipe.pop("weights")
    network = apd.Network(target, weights, None, recipe.pop("hidden_modules", ()))
    if "rank" in trick:
        recipe["rank"] = trick["rank"]
    estimate = None
    if "n_probes" in trick:
        generator = torch.Generator().manual_seed(1_000 + seed)
        estimate = partial(gradient, n_probes=trick["n_probes"], generator=generator)
    with torch.autocast("cpu", torch.bfloat16) if trick.get("autocast") else nullcontext():
        run = begin(network, batches, apd.Config.from_dict(recipe), "mse", estimate, None)
        if "optimiser" in trick:
            run.optimiser = optimiser_of(trick["optimiser"], run.components.parameters(), run.config.lr)  # type: ignore[assignment]
        if trick.get("optimiser") == "8-bit":
            set_lr(run)
        follow(run, None, 1, None, progress=False)
        return outcome(run)


def set_lr(run: Run) -> None:
    """Pass the learning rate to torchao as a tensor; it would compile anew for every other value."""
    optimiser, plain = run.optimiser, run.optimiser.step

    def step() -> None:
        for group in optimiser.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]))
        plain()

    optimiser.step = step  # type: ignore[method-assign,assignment]


def shared(components: apd.Components, target: TMS | ResidualMLP) -> int:
    """Count the mechanisms whose largest part lies in a component that holds another's largest part too."""
    if isinstance(target, ResidualMLP):
        rows, n = target.contributions(), target.n_features
        truth = torch.zeros(n, *rows.shape)
        truth[torch.arange(n), torch.arange(n)] = rows
        parts = target.contributions(components)
    else:
        truth, parts = target.mechanisms()["encode.weight"], components.matrices("encode.weight")
    along = parts.flatten(1) @ truth.flatten(1).T / truth.flatten(1).square().sum(1)  # [C, J]
    holders = along.argmax(0).tolist()
    return sum(holders.count(c) > 1 for c in holders)


def stored_settings(job: Job) -> Row:
    """Return the settings as stored; they identify a run."""
    name, trick, seed = job
    recipe = recipe_of(name, seed)
    numbers = {k: v for k, v in recipe.items() if k not in ("weights", "hidden_modules", "batches")}
    return numbers | {"batch": recipe["batches"].batch_size, "trick": SETTINGS[trick]}


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Decompose one target with one trick."""
    name, trick, seed = job
    target = target_of(name, seed)
    start = time.process_time()
    result = decompose(target, recipe_of(name, seed), SETTINGS[trick], seed)
    seconds = time.process_time() - start
    components = result.components
    own = target.ownership(components)
    weights = apd.Network(target, target.weights).weights
    facts = {
        "owned": int(own.owned.sum()),
        "n": len(own.owned),
        "shared": shared(components, target),
        "cosine": own.cosine.mean().item(),
        "relative_faithfulness": apd.metrics.relative_faithfulness(components, weights).item(),
        "score": min(result.scores),
        "seconds": round(seconds, 1),
    }
    return [facts], {}


def jobs(rows: list[Row]) -> Sequence[Job]:
    """List every run that can be made here or is stored already."""
    every = [(name, trick, seed) for seed in SEEDS for name, tricks in TRICKS.items() for trick in tricks]
    stored = set(map(RUNS.job_of, rows))
    return [job for job in every if job[1] != "8-bit moments" or has_torchao() or job in stored]


def steps() -> dict[str, Any]:
    """Measure time and memory of a step with each trick."""
    return trick_steps.steps(STUDY.stored())


RUNS = Rows(("target", "trick", "seed"), jobs, run, stored_settings)
STUDY = Study("tricks", {"runs": RUNS}, {"steps": steps})

if __name__ == "__main__":
    STUDY.main(__doc__)
