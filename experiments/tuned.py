"""Create data/tuned.json: TMS of several sizes decomposed without a k, by one call with the same settings for all.

python -m experiments.tuned [--only runs tries 5-2 7-3 ...] [--processes N]

Chapter 25. `tune` chooses k by bits; everything else is the same at every size: three components for each feature, rank
4, a simplicity loss from 20 to 0, the defaults otherwise. The settings and the search over k were made on target seeds
90 to 94; the seeds here were fixed before, and run once with the seed of the target for the decomposition and once,
which is stored, with another. The truth is judged on the same inputs, and so are the whole network as one lump and its
singular directions. Every k that was tried is kept with what it owns and its sparse error, so that other ways to pick
can be compared. In "tries" the search starts from a simplicity loss that is far too weak or too strong, and may try
others: does the judge find its way?
"""

from __future__ import annotations

import torch

import apd_minimal as apd
from apd_minimal.config import at_progress
from apd_minimal.study import rate, tune
from experiments.experiment import Row, Rows, Study, Tensors

SEEDS = {size: range(7300, 7300 + n) for size, n in (("3-2", 5), ("5-2", 5), ("7-3", 5), ("10-4", 5), ("20-6", 2))}
PATH = "encode.weight"
BATCH = 512
STARTS, OTHERS = (1.0, 200.0), (3.0, 20.0, 60.0)  # of the simplicity loss: where the search begins, what it may try
Job = tuple[str, int]  # size, seed
Search = tuple[str, int, float]  # size, seed, simplicity


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


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Train a target, decompose it without a k, and measure."""
    size, seed = job
    n, d = map(int, size.split("-"))
    target = apd.targets.TMS(n, d).fit(seed=seed)
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


def search(job: Search) -> tuple[list[Row], Tensors]:
    """Search k and the simplicity loss, and list what the best of every run owns."""
    size, seed, simplicity = job
    n, d = map(int, size.split("-"))
    target = apd.targets.TMS(n, d).fit(seed=seed)
    given = settings_of((size, seed)) | {"simplicity": falling(simplicity)}
    tries = {"simplicity": [falling(other) for other in OTHERS]}
    found = tune.tune(
        target,
        target.data(BATCH),
        target.weights,
        attribution=target.attributions,
        tries=tries,
        progress=False,
        **given,
    )
    runs = [
        {
            "simplicity": at_progress(run.config.simplicity, 0.0),
            "bits": run.scores[run.chosen],
            "owned": int(target.ownership(run.components).owned.sum()),
        }
        for run in found.runs
    ]
    row = {
        "owned": int(target.ownership(found.best.components).owned.sum()),
        "chosen": at_progress(found.best.config.simplicity, 0.0),
        "runs": runs,
        "seconds": round(found.seconds, 1),
    }
    return [row], {}


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
STUDY = Study("tuned", {"runs": RUNS, "tries": TRIES}, about=lambda processes: {"processes": processes}, compact=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
