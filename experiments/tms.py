"""Create data/tms.*: TMS of both sizes decomposed, on ten target seeds (chapter 7).

python -m experiments.tms [--only tms-5-2 | tms-40-10] [--processes N]     (about an hour on two cores)

The seeds were not used when the recipe was found.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from safetensors.torch import load_file

import apd_minimal as apd
from apd_minimal.config import at_progress
from experiments.experiment import (
    Row,
    Rows,
    Study,
    Tensors,
    factors,
    numbers,
    ownership_lists,
    scaled,
    scrubbing_means,
    taken_apart,
)

SIZES = {"tms-5-2": (5, 2), "tms-40-10": (40, 10)}
# Not used to find the recipe. For 40-10, 10 to 19 were used in the end: one restart each left one target
# incomplete, which is why there are two restarts now.
SEEDS = {"tms-5-2": range(10, 20), "tms-40-10": range(20, 30)}
Job = tuple[str, bool, bool, str, int]  # target, with an identity layer, rotated, recipe, seed


def plain_recipe(target: apd.targets.TMS) -> dict[str, Any]:
    """Return the paper's settings (braun2025, appendix); 40-10 is cut to 3,000 steps of 512 samples."""
    own: dict[str, Any]
    if target.n_features == 5:
        data = target.data(463, nonempty=True)  # the non-empty samples of a batch of 2,048
        share = data.share_nonempty
        own = {
            "batches": data,
            "n_components": 5,
            "top_k": 0.211 / share,
            "minimality": share,
            "simplicity": 0.7 * share,
            "p": 1.0,
            "lr": 3e-2,
            "steps": 20_000,
            "attribute_at": "components",
        }
    else:
        own = {
            "batches": target.data(512),
            "n_components": 50,
            "top_k": 1.0,
            "minimality": 10.0,
            "simplicity": 20.0,
            "p": 0.9,
            "lr": 1e-3,
            "steps": 3000,
        }
    return {"weights": target.weights, "scrub": 0.0, "tidy_every": 0.0, "warmup": 0.05, **own}


def variants(target: apd.targets.TMS) -> dict[str, dict[str, Any]]:
    """Name the variants that chapters 6 and 7 try besides the recipe, and the settings that differ from it."""
    small, recipe = target.n_features == 5, target.recipe
    constant = 0.7 * recipe["minimality"] if small else 20.0  # the paper's loss weights
    departures: dict[str, dict[str, Any]] = {
        "without spare components": {"n_components": target.n_features},
        "without merging": {"min_cosine": 1.1},
        "without new starts": {"reseed_until": 0.0},
        "without merging, pruning, new starts": {"tidy_every": 0.0},
        "without scrub loss": {"scrub": 0.0},
        "without a last stage free of simplicity": {"simplicity": constant},
        "without a larger k in the last stage": {"top_k": recipe["top_k"][0][1]},
    }
    if not small:
        return departures
    none = {"faithfulness": 0.0, "minimality": 0.0, "scrub": 0.0, "simplicity": 0.0}
    match = {"minimality": recipe["minimality"], "scrub": recipe["scrub"]}  # scrubbing is a form of minimality
    losses: dict[str, dict[str, Any]] = {
        "no faithfulness": {"faithfulness": 0.0},
        "no minimality": {"minimality": 0.0, "scrub": 0.0},
        "no simplicity": {"simplicity": 0.0},
        "faithfulness alone": none | {"faithfulness": 1.0},
        "minimality alone": none | match,
        "simplicity alone": none | {"simplicity": recipe["simplicity"]},
    }
    choices: dict[str, dict[str, Any]] = {
        f"k times {f:g}": {"top_k": scaled(recipe["top_k"], f)} for f in (0.35, 0.5, 0.7, 1.4, 2.0, 3.0)
    }
    choices |= {f"C = {c}": {"n_components": c} for c in (6, 8, 20, 40)}
    return departures | losses | choices


def recipe_of(target: apd.targets.TMS, recipe: str) -> dict[str, Any]:
    """Return the arguments of `decompose` for "ours", "plain" or a variant."""
    if recipe == "plain":
        return plain_recipe(target)
    return target.recipe if recipe == "ours" else {**target.recipe, **variants(target)[recipe]}


def kind_of(job: Job) -> str:
    """Name the target, with or without identity layer and rotation, as in the tensors' names."""
    return job[0] + ("-identity" if job[1] else "") + ("-rotated" if job[2] else "")


def prefix(job: Job) -> str:
    """Build the prefix of the names of a job's tensors."""
    return f"{kind_of(job)}/{job[3]}/{job[4]}/"


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Train one target, decompose it, measure."""
    name, identity, rotated, recipe, seed = job
    target = apd.targets.TMS(*SIZES[name], identity=identity).fit(seed=seed)
    represented = int((target.encode.weight.norm(dim=0) > 0.5).sum())
    if rotated:
        target.rotate(seed=seed)
    settings = recipe_of(target, recipe)
    result, seconds = taken_apart(target, settings, seed=seed)
    truth, components, every = target.mechanisms(), result.components, result.restarts
    assert every is not None
    own = apd.metrics.ownership(components, truth)
    weights = apd.Network(target, target.weights).weights
    # Measured on all samples, including empty ones, while k is per sample of the training batches.
    k = at_progress(result.config.top_k, 1.0)
    if settings["batches"].nonempty:
        k *= settings["batches"].share_nonempty
    x = target.data(8192)(0, torch.Generator().manual_seed(10_000 + seed))
    errors = apd.metrics.scrubbing(target, components, x, k, settings.get("attribute_at", "target"))
    facts = {
        "seconds": seconds,
        "represented": represented,
        **ownership_lists(own),
        "mmcs": apd.metrics.mmcs(components, truth).item(),
        "ml2r": apd.metrics.ml2r(components, truth).item(),
        "faithfulness": apd.losses.faithfulness(components, weights).item(),
        "relative_faithfulness": apd.metrics.relative_faithfulness(components, weights).item(),
        **scrubbing_means(errors),
        "scores": result.scores,
        "restarts_complete": [
            apd.metrics.ownership(every.restart(r), truth).complete for r in range(result.config.restarts)
        ],
    }
    if recipe not in ("ours", "plain"):
        return [facts], {}
    state = {k: t for k, t in target.state_dict().items() if k != "decode.weight"}  # tied to encode.weight
    own_target = {f"{prefix(job)}target.{k}": t.contiguous() for k, t in state.items()}
    return [facts], factors(components, prefix(job)) | own_target


def settings_of(job: Job) -> Row:
    """Return a run's settings; they do not depend on what the target has learnt."""
    name, identity, _, recipe, seed = job
    return numbers(recipe_of(apd.targets.TMS(*SIZES[name], identity=identity), recipe), seed=seed)


@cache
def stored_target(name: str, seed: int) -> apd.targets.TMS:
    """Load one of the stored targets, for other studies."""
    target, start = apd.targets.TMS(*SIZES[name]), prefix((name, False, False, "ours", seed)) + "target."
    state = {n.removeprefix(start): t for n, t in load_file(STUDY.arrays).items() if n.startswith(start)}
    if not state:
        raise ValueError(f"no target {name} with seed {seed} is stored in {STUDY.arrays.name}")
    target.load_state_dict(state, strict=False)  # the decoder is tied
    return target


def jobs() -> list[Job]:
    """List every run."""
    small, large = SIZES
    all_jobs: list[Job] = [(name, False, False, "ours", seed) for name in SIZES for seed in SEEDS[name]]
    all_jobs += [(name, False, True, "ours", seed) for name in SIZES for seed in SEEDS[name]]
    all_jobs += [(small, False, False, "plain", seed) for seed in SEEDS[small][:5]]
    all_jobs += [(large, False, False, "plain", seed) for seed in SEEDS[large][:3]]
    for name in SIZES:
        for variant in variants(apd.targets.TMS(*SIZES[name])):
            n_seeds = 2 if name == large else 5
            all_jobs += [(name, False, False, variant, seed) for seed in SEEDS[name][:n_seeds]]
    all_jobs += [(small, True, False, "ours", seed) for seed in SEEDS[small]]
    return all_jobs + [(large, True, False, "ours", seed) for seed in SEEDS[large][:3]]


RUNS = Rows(
    fields=("target", "identity", "rotated", "recipe", "seed"),
    jobs=lambda rows: jobs(),
    run=run,
    settings=settings_of,
    order=lambda job: (kind_of(job), *job[3:]),
)
STUDY = Study(
    "tms",
    {"runs": RUNS},
    about=lambda processes: {"processes": processes},
    prefixes=lambda job: (prefix(job),),
)

if __name__ == "__main__":
    STUDY.main(__doc__)
