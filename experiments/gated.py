"""Create data/gated.*: hand-coded gated functions decomposed, ten seeds (chapter 10).

python -m experiments.gated [--only ours | plain] [--processes N]     (about ten minutes on two cores)

Seeds 0 to 9 were not used to find the recipe: that was done on seeds from 100 up.
"""

from __future__ import annotations

from typing import Any

import apd_minimal as apd
from experiments.experiment import Row, Rows, Study, Tensors, factors, numbers, ownership_lists, prefix, taken_apart

SEEDS = {"ours": range(10), "plain": range(5)}
Job = tuple[str, int]  # recipe, seed


def settings_of(recipe: str, seed: int) -> tuple[apd.targets.GatedFunctions, dict[str, Any]]:
    """Return a target and the arguments of `decompose`.

    "plain" has the paper's settings (braun2025, appendix), but 3,000 steps of 2,000 samples in place of 200,000 of
    10,000, and without their empty samples.
    """
    target = apd.targets.GatedFunctions(seed=seed, show_neurons=recipe == "ours")
    if recipe == "ours":
        return target, target.recipe
    data = target.data(371, nonempty=True)  # the non-empty samples of a batch of 2,000
    share = data.share_nonempty
    return target, {
        "batches": data,
        "weights": target.weights,
        "n_components": 4,
        "top_k": 0.2217 / share,
        "faithfulness": 0.1,
        "minimality": 5 * share,
        "simplicity": 5 * share,
        "p": 1.0,
        "lr": 3e-3,
        "warmup": 0.004,
        "steps": 3_000,
        "scrub": 0.0,
        "tidy_every": 0.0,
    }


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Decompose one target and measure."""
    recipe, seed = job
    target, settings = settings_of(recipe, seed)
    result, seconds = taken_apart(target, settings, seed=seed)
    truth, components, every = target.mechanisms(), result.components, result.restarts
    assert every is not None
    owned = [apd.metrics.ownership(every.restart(r), truth) for r in range(result.config.restarts)]
    own = owned[result.chosen]
    facts = {
        "seconds": seconds,
        **ownership_lists(own),
        "relative_faithfulness": apd.metrics.relative_faithfulness(
            components, apd.Network(target, target.weights).weights
        ).item(),
        "scores": result.scores,
        "chosen": result.chosen,
        "restarts_owned": [int(o.owned.sum()) for o in owned],
        "restarts_least_cosine": [o.cosine.min().item() for o in owned],
    }
    return [facts], factors(components, prefix(job))


RUNS = Rows(
    fields=("recipe", "seed"),
    jobs=lambda rows: [(recipe, seed) for recipe, seeds in SEEDS.items() for seed in seeds],
    run=run,
    settings=lambda job: numbers(settings_of(*job)[1], seed=job[1]),
)
STUDY = Study("gated", {"runs": RUNS}, about=lambda processes: {"processes": processes})

if __name__ == "__main__":
    STUDY.main(__doc__)
