"""Create data/schedules.json: the recipe of TMS 5-2 with other steps, schedules, p or batches (chapter 11).

python -m experiments.schedules [--only steps warmup decay p batch simplicity]     (ten minutes of one core)

The paper says that warm-up, decay, steps, p and the batch have no large influence, and that the losses' weights have.
Nothing was chosen by these runs, and no recipe was found on these seeds' targets.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import apd_minimal as apd
from apd_minimal.config import Config
from apd_minimal.targets import TMS
from experiments.experiment import Row, Rows, Study, Tensors, numbers, ownership_means, scaled, taken_apart

SEEDS = range(70, 75)
RECIPE = TMS(5, 2).recipe
STEPS = (0.125, 0.25, 0.5, 2.0)  # times the recipe's
WARMUPS = (0.0, 0.2)  # share of the steps; 0.02 in the recipe
BATCHES = (0.5, 2.0)  # times the recipe's
Job = tuple[str, str, int]  # what is changed, to what, seed


CHANGES: dict[tuple[str, str], dict[str, Any]] = {
    ("recipe", "recipe"): {},
    **{("steps", f"x {f:g}"): {"steps": round(f * RECIPE["steps"])} for f in STEPS},
    **{("warmup", f"{share:g}"): {"warmup": share} for share in WARMUPS},
    ("decay", "none"): {},
    ("decay", "linear"): {},
    ("p", "0.9"): {"p": 0.9},
    **{("batch", f"x {f:g}"): {"batch": round(f * RECIPE["batches"].batch_size)} for f in BATCHES},
    ("simplicity", "x 2"): {"simplicity": scaled(RECIPE["simplicity"], 2.0)},  # for contrast, and made last
}


def rate_at(decay: str, config: Config, t: float) -> float:
    """Compute the learning rate at progress t, after the recipe's warm-up: constant, or falling along a line to 0."""
    warm = min(1.0, (t + 1 / config.steps) / config.warmup)
    return config.lr * warm * (1.0 if decay == "none" else 1 - t)


@cache
def target_of(seed: int) -> TMS:
    """Train the target of a seed."""
    return TMS(5, 2).fit(seed=seed)


def settings_of(job: Job) -> dict[str, Any]:
    """Return the arguments of `decompose` for a run."""
    what, value, seed = job
    settings = {**RECIPE, **CHANGES[what, value], "seed": seed}
    batch = settings.pop("batch", RECIPE["batches"].batch_size)
    return settings | {"batches": replace(RECIPE["batches"], batch_size=batch)}


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Decompose one target with one setting changed."""
    what, value, seed = job
    target, settings = target_of(seed), settings_of(job)

    def rate(config: Config, t: float) -> float:
        return rate_at(value, config, t)

    # The package knows one decay of the learning rate only.
    with patch.object(Config, "lr_at", rate if what == "decay" else Config.lr_at):
        result, seconds = taken_apart(target, settings, attribution=target.attributions)
    truth, every = target.mechanisms(), result.restarts
    assert every is not None
    starts = [int(apd.metrics.ownership(every.restart(r), truth).owned.sum()) for r in range(result.config.restarts)]
    represented = int((target.encode.weight.norm(dim=0) > 0.5).sum())
    facts = {"seconds": seconds, "represented": represented, "chosen": result.chosen}
    means = ownership_means(apd.metrics.ownership(result.components, truth))
    return [{**facts, **means, "restarts_owned": starts, "scores": list(result.scores)}], {}


def stored_settings(job: Job) -> Row:
    """Return the settings as stored; they identify a run."""
    settings = settings_of(job)
    return numbers(settings, batch=settings["batches"].batch_size)


JOBS: list[Job] = sorted(
    ((what, value, seed) for seed in SEEDS for what, value in CHANGES), key=lambda job: job[0] == "simplicity"
)
RUNS = Rows(("what", "value", "seed"), lambda rows: JOBS, run, stored_settings, JOBS.index)
STUDY = Study("schedules", {"runs": RUNS}, about=lambda processes: {"processes": processes})

if __name__ == "__main__":
    STUDY.main(__doc__)
