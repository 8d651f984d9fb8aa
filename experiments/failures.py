"""Create data/failures.*: TMS 5-2 decomposed with settings that make it fail (chapter 12).

python -m experiments.failures [--only "C = 4" ...] [--processes N]     (about ten minutes of one core)

The targets are those of data/tms.safetensors, seeds 10 to 14; which settings make it fail was found on seeds 100 to
103. All four restarts of every run are kept.
"""

from __future__ import annotations

from typing import Any

import apd_minimal as apd
from experiments.experiment import Row, Rows, Study, Tensors, numbers, prefix, scaled, taken_apart
from experiments.tms import stored_target

SEEDS = range(10, 15)
PATH = "encode.weight"


def departures(recipe: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name the settings that differ from the recipe."""
    early, weight = recipe["top_k"][0][1], recipe["simplicity"][0][1]
    return {
        "recipe": {},
        "C = 4": {"n_components": 4},
        "C = 5": {"n_components": 5},
        "k times 3": {"top_k": scaled(recipe["top_k"], 3.0)},
        "k times 1.5": {"top_k": scaled(recipe["top_k"], 1.5)},
        "k times 0.35": {"top_k": scaled(recipe["top_k"], 0.35)},
        "no merging, no pruning": {"tidy_every": 0.0},
        "no last stage": {"simplicity": weight, "top_k": early},
        "no simplicity": {"simplicity": 0.0},
        "no minimality": {"minimality": 0.0, "scrub": 0.0},
        "large start": {"init_std": 1.0, "tidy_every": 0.0, "scrub": 0.0},
        "too few steps": {"steps": 150},
    }


JOBS = [(name, seed) for seed in SEEDS for name in departures(apd.targets.TMS(5, 2).recipe)]


def settings_of(job: tuple[str, int]) -> Row:
    """Return the arguments of `decompose` for a run."""
    name, seed = job
    recipe = apd.targets.TMS(5, 2).recipe
    return {**recipe, **departures(recipe)[name], "seed": seed}


def run(job: tuple[str, int]) -> tuple[list[Row], Tensors]:
    """Decompose one target."""
    target = stored_target("tms-5-2", job[1])
    result, seconds = taken_apart(target, settings_of(job), attribution=target.attributions)
    assert result.restarts is not None
    starts = {f"{prefix(job)}{f}": getattr(result.restarts, f)[PATH].contiguous() for f in "AB"}
    return [{"chosen": result.chosen, "scores": result.scores, "seconds": seconds}], starts


RUNS = Rows(("name", "seed"), lambda rows: JOBS, run, lambda job: numbers(settings_of(job)), JOBS.index)
STUDY = Study("failures", {"runs": RUNS})

if __name__ == "__main__":
    STUDY.main(__doc__)
