"""Create data/bottleneck.json: TMS of several sizes decomposed without a k, which follows an allowed error.

python -m experiments.bottleneck [--only runs given quiet in_recipe ... 5-2 7-3 ...] [--processes N]

Chapter 28; about four hours of a core. In "runs", "computed" and "classifiers" everything follows from
`bottleneck.settings`; three components for each feature, and nothing else is told. Samples with no feature on are left
out. The six restarts differ in how fast k follows, and the judge picks one. At two sizes the data is also sparser and
denser (probability 0.01, 0.02 and 0.1; 0.02, 10-4 and half of 5-2 with 0.1 were added later, and fixed before they
ran, as were the last twenty targets of 40-10), and at two its inputs are rotated, with nothing changed. In "given" the
number of components does not follow the number of features: 1.5 to 12 for each, on other targets, some of them rotated.
The settings were made on target seeds 90 to 96; the seeds here were fixed before, and run once, in order. The
decomposition has another seed than its target. "Computed" are small residual MLPs; "classifiers" are TMS whose outputs,
times ten, are logits: which feature is on the most?

"In_recipe" are residual MLPs taken apart by their own recipe (chapter 8), with an allowed error in the place of its k;
the errors were chosen after tries on target seeds 90 to 92. "Quiet" are the first targets again, without the noise on
what is off (`scrub`, which the rule leaves at its default).

"Twenty" are runs of an earlier rule, in which the simplicity loss falls from 20 whatever the network, and
"computed_twenty" and "logits 20" are the same on the other networks. "Before" are the runs of the first settings, in
which empty samples are in the batches, too, the faithfulness loss has weight 1 whatever the data, and every network
gets 1,500 steps.

Every restart is kept with what it owns and its held-out error, so that other picks can be compared, and for the first
target of each kind also how k went.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch

import apd_minimal as apd
from apd_minimal import bottleneck
from apd_minimal.bottleneck import FAITHFULNESS, GAINS, SIMPLICITY, Bottleneck
from apd_minimal.study import rate
from experiments.experiment import Row, Rows, Study, Tensors
from experiments.tuned import known

Job = tuple[str, float, int]  # size, perhaps "rotated"; probability of a feature; seed
Kind = tuple[str, float]

FIRST_SEED, FIRST_SEED_TWENTY, FIRST_SEED_BEFORE = 7600, 7500, 7400
KINDS: dict[Kind, int] = {
    ("5-2", 0.01): 5, ("5-2", 0.02): 5, ("5-2", 0.1): 10, ("5-2", 0.05): 100, ("7-3", 0.05): 5, ("10-4", 0.05): 5,
    ("20-6", 0.05): 5, ("5-2 rotated", 0.05): 5, ("40-10", 0.05): 30, ("60-15", 0.05): 2, ("10-4", 0.02): 3,
    ("10-4", 0.1): 3, ("10-4", 0.01): 3, ("40-10 rotated", 0.05): 2,
}  # fmt: skip
COMPUTED = [(20, FIRST_SEED + i) for i in range(3)]  # features and seeds of residual MLPs
FEWER = {"60-15": (10.0, 16.0)}  # gains where six restarts would take too long
KINDS_TWENTY: dict[Kind, int] = {
    ("5-2", 0.05): 10, ("5-2", 0.01): 3, ("5-2", 0.1): 3, ("7-3", 0.05): 5, ("5-2 rotated", 0.05): 2,
    ("40-10", 0.05): 1, ("10-4", 0.05): 3, ("20-6", 0.05): 2, ("60-15", 0.05): 1,
}  # fmt: skip
MANY_TWENTY = 55  # targets of the first kind; those after the first ten were run last
KINDS_BEFORE: dict[Kind, int] = {
    ("5-2", 0.05): 10, ("7-3", 0.05): 5, ("10-4", 0.05): 3, ("20-6", 0.05): 2, ("5-2", 0.01): 2, ("5-2", 0.1): 2,
    ("5-2 rotated", 0.05): 2, ("40-10", 0.05): 1,
}  # fmt: skip
GIVEN = {  # numbers of components
    "5-2": (8, 15, 30, 60), "10-4": (15, 30, 60, 120), "5-2 rotated": (15, 30, 60), "10-4 rotated": (30, 60),
}  # fmt: skip
SEEDS_GIVEN = {
    "5-2": range(7700, 7705), "10-4": range(7700, 7703),
    "5-2 rotated": range(7710, 7715), "10-4 rotated": range(7710, 7713),
}  # fmt: skip
BATCH = 512
TWENTY = ((0.0, 20.0), (0.7, 0.0))  # the simplicity loss of the first two settings
QUIET = [("5-2", 0.05, FIRST_SEED + i) for i in range(5)] + [("40-10", 0.05, FIRST_SEED + i) for i in range(2)]
IN_RECIPE = [(20, FIRST_SEED + i, e) for e in (0.05, 0.1) for i in range(3)]  # features, seed, allowed error
IN_RECIPE += [(100, FIRST_SEED, 0.1)]
GAINS_IN_RECIPE = (4.0, 8.0)
SHARP = 10.0  # a TMS's outputs, times this, are the logits of a classifier
CLASSIFIERS: dict[str, range] = {
    "logits 5-2": range(7500, 7503), "logits 20 5-2": range(7500, 7501), "logits 7-3": range(7500, 7501),
}  # fmt: skip


def jobs(kinds: dict[Kind, int], first: int) -> list[Job]:
    """List the runs of some settings: kind after kind, seeds in order."""
    return [(*kind, first + i) for kind, n in kinds.items() for i in range(n)]


def jobs_twenty() -> list[Job]:
    """List the runs of the second settings."""
    more = [("5-2", 0.05, FIRST_SEED_TWENTY + i) for i in range(KINDS_TWENTY["5-2", 0.05], MANY_TWENTY)]
    return jobs(KINDS_TWENTY, FIRST_SEED_TWENTY) + more


def n_components(job: Job) -> int:
    """Give three components for each feature."""
    return 3 * int(job[0].split("-")[0])


def by_rule(job: Job) -> Row:
    """List what `bottleneck.settings` fixes for all targets of a kind."""
    return settings_twenty(job) | {
        "simplicity": f"from {SIMPLICITY:g} times that error over the loss of the whole, to 0"
    }


def settings_twenty(job: Job) -> Row:
    """Give the second settings: the weight of the simplicity loss does not follow the network."""
    selection = Bottleneck(gain=FEWER.get(job[0], GAINS))
    steps = max(1500, 25 * n_components(job))
    facts = {"allowed": selection.allowed, "gain": selection.gain, "first": selection.first}
    return {
        "n_components": n_components(job),
        "rank": 4,
        "steps": steps,
        "lr": 1e-2,
        "simplicity": TWENTY,
        "restarts": len(FEWER.get(job[0], GAINS)),
        "faithfulness": f"{FAITHFULNESS:g} times the error with nothing active",
        "seed": job[2] + 1000,  # another than the target's, so that nothing can start where its weights did
        "selection": facts,
    }


def settings_before(job: Job) -> Row:
    """Give the first settings: only C follows the size."""
    selection = Bottleneck(gain=GAINS)
    return {
        "n_components": n_components(job),
        "rank": 4,
        "steps": 1500,
        "lr": 1e-2,
        "simplicity": TWENTY,
        "restarts": len(GAINS),
        "seed": job[2] + 1000,
        "selection": {"allowed": selection.allowed, "gain": selection.gain, "first": selection.first},
    }


def target_of(job: Job) -> apd.targets.TMS:
    """Train a target, and rotate its inputs if its name says so."""
    size, *rotated = job[0].split()
    n, d = map(int, size.split("-"))
    target = apd.targets.TMS(n, d, probability=job[1]).fit(seed=job[2])
    return target.rotate(seed=job[2]) if rotated else target


class Noted(Bottleneck):
    """It notes its k and the error at a hundred moments of the run."""

    def observe(self, error: torch.Tensor, nothing: torch.Tensor, t: float) -> None:
        """Note, and follow."""
        super().observe(error, nothing, t)
        self.noted: list[Row] = getattr(self, "noted", [])
        if t >= len(self.noted) / 100:
            sparse, off = self.state()[1]
            share = (sparse / off).tolist() if bool((off > 0).all()) else None
            self.noted.append({"t": round(t, 4), "k": [round(k, 4) for k in self.k.tolist()], "error": share})


def run(job: Job, given: int | None = None, **changes: Any) -> tuple[list[Row], Tensors]:
    """Train a target, decompose it by the rule or with changes to it, and measure; C can be given."""
    C = given or n_components(job)
    target = target_of(job)
    batches = target.data(BATCH, nonempty=True)
    x = target.data(8192, nonempty=True)(0, torch.Generator().manual_seed(30_000 + job[2]))
    gains = FEWER.get(job[0], GAINS)
    settings = bottleneck.settings(apd.Network(target, target.weights), x, C) | changes
    settings |= {"n_components": C, "seed": job[2] + 1000, "restarts": len(gains)}
    row = measured(job, target, batches, settings, Noted(gain=gains))
    row["weights"] = {name: settings[name] for name in ("faithfulness", "simplicity")}
    if given or job[2] not in (FIRST_SEED, FIRST_SEED_TWENTY):
        del row["noted"]
    return [row], {}


def run_given(job: tuple[str, int, int]) -> tuple[list[Row], Tensors]:
    """Do the same with a number of components that does not follow the number of features."""
    size, seed, given = job
    return run((size, 0.05, seed), given)


def settings_given(job: tuple[str, int, int]) -> Row:
    """List what the rule fixes for a number of components."""
    size, seed, given = job
    return by_rule((size, 0.05, seed)) | {"n_components": given, "steps": max(1500, 25 * given)}


def run_twenty(job: Job) -> tuple[list[Row], Tensors]:
    """Do the same by the second settings."""
    return run(job, simplicity=TWENTY)


def run_quiet(job: Job) -> tuple[list[Row], Tensors]:
    """Do the same by the rule, but without the loss that switches on a random half of what is off."""
    rows, tensors = run(job, scrub=0.0)
    rows[0].pop("noted", None)
    return rows, tensors


def settings_quiet(job: Job) -> Row:
    """List what the rule fixes, and that there is no noise."""
    return by_rule(job) | {"scrub": 0.0}


def run_before(job: Job) -> tuple[list[Row], Tensors]:
    """Do the same with the first settings."""
    target = target_of(job)
    return [measured(job, target, target.data(BATCH), settings_before(job), Noted(gain=GAINS))], {}


def measured(job: Job, target: apd.targets.TMS, batches: apd.data.SparseFeatures, settings: Row, selection: Any) -> Row:
    """Decompose without a k, by a selection that notes its `k` [R] and how that went, and measure."""
    judge = rate.Judge(attribution=target.attributions)
    start = time.process_time()
    found = apd.decompose(
        target, batches, target.weights, judge=judge, attribution=target.attributions, progress=False,
        **settings | {"selection": selection},
    )  # fmt: skip
    seconds = time.process_time() - start
    x = dataclasses.replace(batches, batch_size=8192)(0, torch.Generator().manual_seed(20_000 + job[2]))
    network = apd.Network(target, target.weights)
    assert found.restarts is not None
    rows: list[dict[str, Any]] = []
    for i, bits in enumerate(found.scores):
        components = found.restarts.restart(i)
        own, k = target.ownership(components), float(selection.k[i])
        errors = apd.metrics.scrubbing(target, components, x, k, attribution=target.attributions)
        rows.append(
            {
                "owned": int(own.owned.sum()),
                "least_cosine": round(float(own.cosine.min()), 4),
                "bits": round(bits, 5),
                "k": round(k, 5),
                "error": errors.means()["top_k"],
                "alive": int((components.norms() > 0).sum()),
            }
        )
    return {
        "owned": rows[found.chosen]["owned"],
        "chosen": found.chosen,
        "mean_active": batches.mean_active,
        "bits": judge(network, found.components, x),
        "known": {name: judge(network, components, x) for name, components in known(target).items()},
        "same_line": target.same_line,
        "restarts": rows,
        "noted": selection.noted,
        "seconds": round(seconds, 1),
    }


def run_computed(job: tuple[int, int], **changes: Any) -> tuple[list[Row], Tensors]:
    """Decompose a small residual MLP by the rule, and by its own recipe, which knows a k and much else."""
    n, seed = job
    target = apd.targets.ResidualMLP(n, 10 * n, (n // 2,), seed=seed).fit(seed=seed)
    batches = apd.data.SparseFeatures(n, target.probability, -1.0, 1.0, batch_size=BATCH, nonempty=True)
    x = dataclasses.replace(batches, batch_size=2048)(0, torch.Generator().manual_seed(30_000 + seed))
    settings = bottleneck.settings(apd.Network(target, target.weights), x, 3 * n) | changes
    selection = Noted(gain=GAINS)
    start = time.process_time()
    found = apd.decompose(
        target, batches, target.weights, 3 * n, judge=rate.Judge(attribution=target.attributions), progress=False,
        attribution=target.attributions, **settings | {"selection": selection, "seed": seed + 1000},
    )  # fmt: skip
    seconds = time.process_time() - start
    known = apd.decompose(target, progress=False, seed=seed + 1000, **target.recipe)
    judge = rate.Judge(attribution=target.attributions)
    row = {
        "owned": int(target.ownership(found.components).owned.sum()),
        "chosen": found.chosen,
        "mean_active": batches.mean_active,
        "weights": {name: settings[name] for name in ("faithfulness", "simplicity")},
        "restarts": each_restart(target, found, selection),
        "by_recipe": int(target.ownership(known.components).owned.sum()),
        "bits": judge(apd.Network(target, target.weights), found.components, x),
        "bits_by_recipe": judge(apd.Network(target, target.weights), known.components, x),
        "seconds": round(seconds, 1),
    }
    return [row], {}


def each_restart(target: apd.targets.ResidualMLP, found: apd.Decomposition, selection: Bottleneck) -> list[Row]:
    """List what each restart owns and costs, and where its k ended."""
    assert found.restarts is not None
    weights, rows = apd.Network(target, target.weights).weights, []
    for i, bits in enumerate(found.scores):
        components = found.restarts.restart(i)
        rows.append(
            {
                "owned": int(target.ownership(components).owned.sum()),
                "bits": round(bits, 5),
                "k": round(float(selection.k[i]), 5),
                "alive": int((components.norms() > 0).sum()),
                "relative_faithfulness": float(apd.metrics.relative_faithfulness(components, weights)),
            }
        )
    return rows


def in_recipe(allowed: float) -> Bottleneck:
    """Make the selection that stands in the recipe of a residual MLP in the place of its k."""
    falling = ((0.0, 0.3), (0.3, 0.3), (0.6, allowed))
    return Bottleneck(allowed=falling, gain=GAINS_IN_RECIPE)


def settings_in_recipe(job: tuple[int, int, float]) -> Row:
    """Give the recipe of a residual MLP, its k aside."""
    n, seed, allowed = job
    recipe = apd.targets.ResidualMLP(n, 10 * n, (n // 2,)).recipe
    fixed = {name: v for name, v in recipe.items() if name not in ("batches", "weights", "attribution", "top_k")}
    facts = {"allowed": in_recipe(allowed).allowed, "gain": GAINS_IN_RECIPE}
    return fixed | {"restarts": len(GAINS_IN_RECIPE), "seed": seed + 1000, "selection": facts}


def run_in_recipe(job: tuple[int, int, float]) -> tuple[list[Row], Tensors]:
    """Decompose a residual MLP by its recipe, with an allowed error in the place of its k."""
    n, seed, allowed = job
    target = apd.targets.ResidualMLP(n, 10 * n, (n // 2,), seed=seed).fit(seed=seed)
    recipe, selection = target.recipe, in_recipe(allowed)
    del recipe["top_k"]
    start = time.process_time()
    found = apd.decompose(
        target, progress=False, judge=rate.Judge(attribution=target.attributions),
        **recipe | {"selection": selection, "restarts": len(GAINS_IN_RECIPE), "seed": seed + 1000},
    )  # fmt: skip
    row = {
        "owned": int(target.ownership(found.components).owned.sum()),
        "chosen": found.chosen,
        "mean_active": recipe["batches"].mean_active,
        "restarts": each_restart(target, found, selection),
        "seconds": round(time.process_time() - start, 1),
    }
    return [row], {}


def run_computed_twenty(job: tuple[int, int]) -> tuple[list[Row], Tensors]:
    """Do the same by the second settings."""
    return run_computed(job, simplicity=TWENTY)


def classified(size: str, seed: int, **changes: Any) -> Row:
    """Decompose a TMS that is read as a classifier: errors are Kullback-Leibler divergences."""
    target = target_of((size, 0.05, seed))
    n, batches = target.n_features, target.data(BATCH, nonempty=True)
    x, held_out = (
        dataclasses.replace(batches, batch_size=8192)(0, torch.Generator().manual_seed(start + seed))
        for start in (30_000, 20_000)
    )
    network = apd.Network(target, target.weights, logits)
    settings = bottleneck.settings(network, x, 3 * n, "kl") | changes
    judge = rate.Judge(divergence="kl", attribution=target.attributions)
    start = time.process_time()
    found = apd.decompose(
        target, batches, target.weights, 3 * n, output=logits, divergence="kl", judge=judge, progress=False,
        attribution=target.attributions, seed=seed + 1000, **settings,
    )  # fmt: skip
    seconds, every = time.process_time() - start, found.restarts
    assert every is not None and isinstance(found.selection, Bottleneck)
    with torch.no_grad():
        p = network(held_out).softmax(-1)
    owned = [int(target.ownership(every.restart(i)).owned.sum()) for i in range(len(GAINS))]
    return {
        "owned": owned[found.chosen],
        "chosen": found.chosen,
        "mean_active": batches.mean_active,
        "entropy": float(torch.special.entr(p).sum(-1).mean() / math.log(2)),
        "nothing": settings["faithfulness"] / FAITHFULNESS / math.log(2),
        "bits": judge(network, found.components, held_out),
        "known": {name: judge(network, components, held_out) for name, components in known(target).items()},
        "same_line": target.same_line,
        "restarts": [
            {"owned": own, "bits": round(bits, 5), "k": round(float(k), 5)}
            for own, bits, k in zip(owned, found.scores, found.selection.k, strict=True)
        ],
        "faithfulness": settings["faithfulness"],
        "simplicity": settings["simplicity"],
        "seconds": round(seconds, 1),
    }


def logits(outputs: torch.Tensor) -> torch.Tensor:
    """Give the logits of the classifier."""
    return SHARP * outputs


def run_classifier(job: tuple[str, int]) -> tuple[list[Row], Tensors]:
    """Decompose a classifier by the rule or by the second settings."""
    what, seed = job
    return [classified(what.split()[-1], seed, **{"simplicity": TWENTY} if "20" in what.split() else {})], {}


def part(listed: list[Job], run: Callable[[Job], tuple[list[Row], Tensors]], settings: Callable[[Job], Row]) -> Rows:
    """Make a list of the table, its rows in the order of the jobs."""
    return Rows(("size", "probability", "seed"), lambda rows: listed, run, settings, listed.index)


RUNS = part(jobs(KINDS, FIRST_SEED), run, by_rule)
TWENTIES = part(jobs_twenty(), run_twenty, settings_twenty)
BEFORE = part(jobs(KINDS_BEFORE, FIRST_SEED_BEFORE), run_before, settings_before)
COUNTS = Rows(
    ("size", "seed", "given"),
    lambda rows: sorted(
        ((size, seed, C) for size, counts in GIVEN.items() for seed in SEEDS_GIVEN[size] for C in counts),
        key=lambda job: (job[1], job[2] * int(job[0].split("-")[0])),  # whole targets first, short runs first
    ),
    run_given,
    settings_given,
)
SMALL = Rows(("features", "seed"), lambda rows: COMPUTED, run_computed)
SMALL_TWENTY = Rows(("features", "seed"), lambda rows: [(20, FIRST_SEED_TWENTY)], run_computed_twenty)
QUIETS = part(QUIET, run_quiet, settings_quiet)
RECIPES = Rows(("features", "seed", "allowed"), lambda rows: IN_RECIPE, run_in_recipe, settings_in_recipe)
LOGITS = Rows(
    ("what", "seed"),
    lambda rows: [(what, seed) for what, seeds in CLASSIFIERS.items() for seed in seeds],
    run_classifier,
)
STUDY = Study(
    "bottleneck",
    {
        "runs": RUNS,
        "given": COUNTS,
        "computed": SMALL,
        "in_recipe": RECIPES,
        "quiet": QUIETS,
        "classifiers": LOGITS,
        "twenty": TWENTIES,
        "computed_twenty": SMALL_TWENTY,
        "before": BEFORE,
    },
    about=lambda processes: {"processes": processes},
    compact=True,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
