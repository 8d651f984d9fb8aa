"""Create data/tuned.json: TMS of several sizes decomposed without a k, by one call with the same settings for all.

python -m experiments.tuned [--only runs tries others 5-2 7-3 ...] [--processes N]

Chapter 25. `tune` chooses k by bits; everything else is the same at every size: three components for each feature, rank
4, a simplicity loss from 20 to 0, the defaults otherwise. The settings and the search over k were made on target seeds
90 to 94; the seeds here were fixed before, and run once with the seed of the target for the decomposition and once,
which is stored, with another. Three targets of 20-6 and five with rotated inputs were added later, and fixed before
they ran. The truth is judged on the same inputs, and so are the whole network as one lump and its
singular directions. Every k that was tried is kept with what it owns and its sparse error, so that other ways to pick
can be compared. In "tries" the search starts from a simplicity loss that is far too weak or too strong, and may try
others: does the judge find its way? In "others" the same is asked of four other settings, one at a time, on two
targets that had not been used; where the search begins and what it may try were fixed before, and run once.
"""

from __future__ import annotations

from typing import Any

import torch

import apd_minimal as apd
from apd_minimal.config import at_progress
from apd_minimal.study import rate, tune
from experiments.experiment import Row, Rows, Study, Tensors

TARGETS = {"3-2": 5, "5-2": 5, "7-3": 5, "10-4": 5, "20-6": 5, "5-2 rotated": 5}
SEEDS = {size: range(7300, 7300 + n) for size, n in TARGETS.items()}
PATH = "encode.weight"
BATCH = 512
STARTS, OTHERS = (1.0, 200.0), (3.0, 20.0, 60.0)  # of the simplicity loss: where the search begins, what it may try
WRONG: dict[str, tuple[float, tuple[float, ...]]] = {  # the same of other settings; C in units of the features
    "n_components": (1, (2, 3, 6)),
    "p": (2.0, (0.5, 0.9, 1.0)),
    "faithfulness": (0.01, (0.1, 1.0, 10.0)),
    "minimality": (0.5, (2.0, 10.0, 50.0)),
}
Job = tuple[str, int]  # size, seed
Search = tuple[str, int, float]  # size, seed, simplicity
Other = tuple[str, int, str]  # size, seed, setting


def settings_of(job: Job) -> Row:
    """Give the settings: only C follows the size."""
    n_features = int(job[0].split("-")[0])
    return {
        "n_components": 3 * n_features,
        "rank": 4,
        "steps": 1500,
        "lr": 1e-2,
        "simplicity": falling(20.0),
        "seed": job[1] + 1000,  # another than the target's, so that nothing can start where its weights did
    }


def known(target: apd.targets.TMS) -> dict[str, apd.Components]:
    """Make the decompositions that need no training: the truth, one lump, singular directions."""
    W = target.encode.weight.detach().T
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    matrices = {
        "truth": target.mechanisms()[PATH],
        "one lump": W[None],
        "singular directions": torch.einsum("ir,r,rj->rij", U, S, V),
    }
    return {name: apd.Components.from_matrices({PATH: m}, min(m.shape[1:])) for name, m in matrices.items()}


def target_of(size: str, seed: int) -> apd.targets.TMS:
    """Train a target, and rotate its inputs if its name says so."""
    size, *rotated = size.split()
    n, d = map(int, size.split("-"))
    target = apd.targets.TMS(n, d).fit(seed=seed)
    return target.rotate(seed=seed) if rotated else target


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Train a target, decompose it without a k, and measure."""
    size, seed = job
    target = target_of(size, seed)
    batches = target.data(BATCH)
    found = tune.tune(
        target, batches, target.weights, attribution=target.attributions, progress=False, **settings_of(job)
    )
    x = target.data(4096)(0, torch.Generator().manual_seed(20_000 + seed))
    judge = rate.Judge(attribution=target.attributions)
    network = apd.Network(target, target.weights)
    own = target.ownership(found.best.components)
    every = [run.restarts.restart(i) for run in found.runs for i in range(run.config.restarts) if run.restarts]
    tried = []
    for row, components in zip(found.tried, every, strict=True):
        k = min(row["k"] * tune.LATE[-1][1], components.n_components)
        errors = apd.metrics.scrubbing(target, components, x, k, attribution=target.attributions)
        owned = int(target.ownership(components).owned.sum())
        tried.append({"owned": owned, "error": errors.means()["top_k"]})
    row = {
        "owned": int(own.owned.sum()),
        "least_cosine": float(own.cosine.min()),
        "k": found.k,
        "mean_active": batches.mean_active,
        "bits": judge(network, found.best.components, x),
        "known": {name: judge(network, components, x) for name, components in known(target).items()},
        "same_line": target.same_line,
        "tried": [row | facts for row, facts in zip(found.tried, tried, strict=True)],
        "seconds": round(found.seconds, 1),
    }
    return [row], {}


def falling(simplicity: float) -> tuple[tuple[float, float], ...]:
    """Make the schedule of a simplicity loss that ends at 0.7 of the run."""
    return ((0.0, simplicity), (0.7, 0.0))


def searched(size: str, seed: int, given: Row, tries: dict[str, list[Any]]) -> tuple[apd.targets.TMS, tune.Tuned, Row]:
    """Search k and one more setting; return the target, what was found, and facts about it."""
    target = target_of(size, seed)
    found = tune.tune(
        target,
        target.data(BATCH),
        target.weights,
        attribution=target.attributions,
        tries=tries,
        progress=False,
        **settings_of((size, seed)) | given,
    )
    owned = int(target.ownership(found.best.components).owned.sum())
    return target, found, {"owned": owned, "seconds": round(found.seconds, 1)}


def search(job: Search) -> tuple[list[Row], Tensors]:
    """Search k and the simplicity loss, and list what the best of every run owns."""
    size, seed, simplicity = job
    tries = {"simplicity": [falling(other) for other in OTHERS]}
    target, found, facts = searched(size, seed, {"simplicity": falling(simplicity)}, tries)
    runs = [
        {
            "simplicity": at_progress(run.config.simplicity, 0.0),
            "bits": run.scores[run.chosen],
            "owned": int(target.ownership(run.components).owned.sum()),
        }
        for run in found.runs
    ]
    return [{**facts, "chosen": at_progress(found.best.config.simplicity, 0.0), "runs": runs}], {}


def values_of(job: Other) -> tuple[float, list[float]]:
    """Give the value of a setting at which the search begins, and those that it may try."""
    size, _, name = job
    start, others = WRONG[name]
    unit = int(size.split("-")[0]) if name == "n_components" else 1
    return unit * start, [unit * other for other in others]


def other(job: Other) -> tuple[list[Row], Tensors]:
    """Search k and one other setting, and list what the best of every run owns."""
    size, seed, name = job
    start, others = values_of(job)
    target, found, facts = searched(size, seed, {name: start}, {name: others})

    def value(run: apd.Decomposition) -> float:
        own = getattr(run.config, name)
        return own if isinstance(own, (int, float)) else at_progress(own, 0.0)

    runs = [
        {
            "value": value(run),
            "bits": run.scores[run.chosen],
            "owned": int(target.ownership(run.components).owned.sum()),
        }
        for run in found.runs
    ]
    return [{**facts, "chosen": value(found.best), "runs": runs}], {}


RUNS = Rows(
    fields=("size", "seed"),
    jobs=lambda rows: [(size, seed) for size, seeds in SEEDS.items() for seed in seeds],
    run=run,
    settings=settings_of,
    order=lambda job: (list(SEEDS).index(job[0]), job[1]),
)
TRIES = Rows(
    fields=("size", "seed", "start"),
    jobs=lambda rows: [(size, seed, start) for size in ("5-2", "7-3") for seed in (7310, 7311) for start in STARTS],
    run=search,
    settings=lambda job: settings_of(job[:2]) | {"simplicity": falling(job[2]), "others": OTHERS},
)
ELSE = Rows(
    fields=("size", "seed", "setting"),
    jobs=lambda rows: [("5-2", seed, name) for seed in (7312, 7313) for name in WRONG],
    run=other,
    settings=lambda job: settings_of(job[:2]) | {job[2]: values_of(job)[0], "others": values_of(job)[1]},
)
STUDY = Study(
    "tuned",
    {"runs": RUNS, "tries": TRIES, "others": ELSE},
    about=lambda processes: {"processes": processes},
    compact=True,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
