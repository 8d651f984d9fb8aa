"""Create data/grid.json: one setting at a time moved away from the recipe (chapter 11).

python -m experiments.grid [--only tms-40-10 | residual] [--processes N]     (about an hour of one core each)

Two targets: TMS 40-10, and the residual MLP of one layer, for which the recipe is cut to 1,000 steps. Each of the
three weights and the learning rate is scaled by 1/4, 1/2, 2, 4, k by 1/2 to 2, one at a time and jointly at random;
then the other weights, p, C, m, the batch and the number of steps. No recipe was found on these seeds' targets.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cache
from typing import Any

import torch

import apd_minimal as apd
from apd_minimal.config import at_progress
from apd_minimal.targets import TMS, ResidualMLP
from experiments.experiment import Row, Rows, Study, Tensors, numbers, scaled, taken_apart
from experiments.residual import SINGLE_FAILS, single_errors

SEEDS = {"tms-40-10": range(40, 43), "residual": range(5, 7)}
N_RANDOM = {"tms-40-10": 16, "residual": 8}
WEIGHTS = ("faithfulness", "minimality", "simplicity")
FACTORS = (0.25, 0.5, 2.0, 4.0)
OTHERS = {"tms-40-10": ("scrub",), "residual": ("scrub", "hidden")}
# Values that are not multiples of the recipe's.
VALUES: dict[str, dict[str, tuple[Any, ...]]] = {
    "tms-40-10": {
        "p": (0.5, 0.7, 0.8, 1.0),
        "C": (40, 50, 80, 120),
        "m": (1, 2, 10),
        "batch": (128, 256, 1024, 2048),
        "steps": (375, 750, 3000),
    },
    "residual": {
        "p": (0.5, 0.7, 1.0),
        "C": (100, 130, 150, 300),
        "m": (2, 4),
        "batch": (32, 64, 256),
        "steps": (250, 500, 2000, 4000),
    },
}
SETTING = {"C": "n_components", "m": "rank"}  # the setting of a symbol
Job = tuple[str, str, int]  # target, variant, seed


def untrained(name: str, seed: int = 0) -> TMS | ResidualMLP:
    """Create the target before training."""
    return TMS(40, 10) if name == "tms-40-10" else ResidualMLP(seed=seed)


@cache
def target_of(name: str, seed: int) -> TMS | ResidualMLP:
    """Train the target of a seed."""
    return untrained(name, seed).fit(seed=seed)


def recipe_of(name: str) -> dict[str, Any]:
    """Return the settings in the middle of the grid."""
    recipe = untrained(name).recipe
    return recipe if name == "tms-40-10" else recipe | {"steps": 1000}


def variants(name: str) -> dict[str, dict[str, Any]]:
    """Name the variants and the settings that each changes; `batch` is the batch size."""
    base = {**asdict(apd.Config(1, 1)), **recipe_of(name)}

    def times(setting: str, factor: float) -> dict[str, Any]:
        return {setting: scaled(base[setting], factor)}

    table: dict[str, dict[str, Any]] = {"recipe": {}}
    for setting in (*WEIGHTS, "lr", *OTHERS[name]):
        ends_only = name == "residual" and setting in OTHERS[name]  # these runs take longer
        factors = FACTORS[::3] if ends_only else FACTORS
        table |= {f"{setting} x {factor:g}": times(setting, factor) for factor in factors}
    table |= {f"top_k x {factor:g}": times("top_k", factor) for factor in (0.5, 0.71, 1.41, 2.0)}
    generator = torch.Generator().manual_seed(0)
    for i in range(N_RANDOM[name]):
        draws = (2 * torch.rand(5, generator=generator) - 1).tolist()
        change: dict[str, Any] = {}
        for setting, draw in zip((*WEIGHTS, "lr", "top_k"), draws, strict=True):
            change |= times(setting, 2.0 ** (draw if setting == "top_k" else 2 * draw))
        table[f"random {i}"] = change
    for symbol, values in VALUES[name].items():
        table |= {f"{symbol} = {value:g}": {SETTING.get(symbol, symbol): value} for value in values}
    return table


def settings_of(job: Job) -> dict[str, Any]:
    """Return the arguments of `decompose` for a run, with its batch size."""
    name, variant, seed = job
    settings = {**recipe_of(name), **variants(name)[variant], "seed": seed}
    batch = settings.pop("batch", settings["batches"].batch_size)
    return settings | {"batches": replace(settings["batches"], batch_size=batch)}


def true_positives(target: TMS, components: apd.Components, k: int) -> tuple[float, float]:
    """Compute recall and precision of the owners among each sample's k most attributed components.

    The true positives of a sample are its active features whose owner is among them; owners are matched one to one by
    weights, without thresholds.
    """
    owner = apd.metrics.ownership(components, target.mechanisms()).owner
    x = target.data(8192)(0, torch.Generator().manual_seed(777))
    active = x != 0
    chosen = apd.selection.sample_top_k(target.attributions(apd.Network(target, target.weights), components, x), k)
    has_owner = owner >= 0
    hits = (chosen[:, owner.clamp_min(0)].bool() & has_owner & active).sum().item()
    return hits / active.sum().item(), hits / (k * len(x))


def measure(target: TMS | ResidualMLP, components: apd.Components) -> dict[str, Any]:
    """Measure a decomposition against the known mechanisms."""
    if isinstance(target, ResidualMLP):
        own = target.ownership(components)
        extra: dict[str, Any] = {"single_fails": int((single_errors(target, components) > SINGLE_FAILS).sum())}
    else:
        own = apd.metrics.ownership(components, target.mechanisms())
        tp = {str(k): true_positives(target, components, k) for k in (1, 2, 5)}
        extra = {
            "recall": {k: recall for k, (recall, _) in tp.items()},
            "precision": {k: precision for k, (_, precision) in tp.items()},
        }
    return {
        "owned": int(own.owned.sum()),
        "cosine": own.cosine.mean().item(),
        "length_ratio": own.length_ratio.mean().item(),
        **extra,
    }


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Decompose one target with one setting changed."""
    name, _, seed = job
    target, settings = target_of(name, seed), settings_of(job)
    # The attributions of the trained target, not of the recipe's untrained one.
    result, seconds = taken_apart(target, settings, attribution=target.attributions)
    x = target.data(4096)(0, torch.Generator().manual_seed(10_000 + seed))
    k = at_progress(result.config.top_k, 1.0)
    if settings["batches"].nonempty:
        k *= settings["batches"].share_nonempty  # measured on all samples, including empty ones
    errors = apd.metrics.scrubbing(target, result.components, x, k, attribution=target.attributions)
    facts = {
        "seconds": seconds,
        **measure(target, result.components),
        "score": min(result.scores),
        "top_k_error": errors.top_k.mean().item(),
        "scrubbed_error": errors.scrubbed.mean().item(),
    }
    return [facts], {}


def stored_settings(job: Job) -> Row:
    """Return the settings as stored; they identify a run."""
    settings = settings_of(job)
    return numbers(settings, batch=settings["batches"].batch_size)


JOBS: list[Job] = [
    (name, variant, seed) for name, seeds in SEEDS.items() for seed in seeds for variant in variants(name)
]
RUNS = Rows(("target", "variant", "seed"), lambda rows: JOBS, run, stored_settings, JOBS.index)
STUDY = Study("grid", {"runs": RUNS}, about=lambda processes: {"processes": processes})

if __name__ == "__main__":
    STUDY.main(__doc__)
