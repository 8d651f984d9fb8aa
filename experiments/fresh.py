"""Create data/fresh.json: the book's recipe on targets that nobody had looked at, a hundred of one size (chapter 7).

python -m experiments.fresh [--only 5-2 | 40-10 | 7-3 ...] [--processes N]     (about an hour of one core)

`TMS.recipe` as it stands, which is what a user gets: on 100 targets of TMS 5-2, 30 of TMS 40-10, 15 of TMS 7-3, and
five of each other size. "Rotated" are the first of the same targets with inputs in a random orthogonal basis, where the
split of the weight by input columns, which learns nothing, owns nothing. Target seeds from 8000 up; the seed of the
decomposition is 1,000 more, so that nothing can start where the weights of the target did. All seeds and one rule were
fixed before: targets on which two features lie on one line (`TMS.same_line`, |cosine| at least 0.99) are counted apart.
Each was run once.

TMS 7-3 is an exception. Its recipe was another one at first, with which seeds 8000 and 8002 came out with 5 of 7
features. The settings of today were then chosen on tuning seeds (experiments/sizes.py), the first five targets were
run again, and ten new ones (from 8005), which nobody had looked at, once.

"Failed" looks at the targets without such a line that did not come out complete, afterwards: how near each missing
feature is to its nearest, how many features as near came out, and bits of what was found beside those of the truth.

"More starts" decomposes these same targets once more, because they had failed, with more starts than the recipe has and
another seed (2,000 more than the target's). It counts no success: no target that came out was given more starts.
Every start is scored both ways, by its held-out error and by its bits. The numbers of starts are what the
time allowed; three at 60-15 were planned as well, and not run.

All starts of a run see the same batches, which another seed changes as well. So "same batches" has new starts with the
seed of the run that failed. It was added, and fixed, when all six new starts at 30-8 had come out complete.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import normalize

import apd_minimal as apd
from apd_minimal.study.rate import Judge
from experiments.experiment import Row, Rows, Study, Tensors, numbers, taken_apart

N_TARGETS = {
    "5-2": 100, "3-2": 5, "7-3": 15, "10-4": 5, "15-5": 5, "20-6": 5, "30-8": 5, "40-10": 30, "60-15": 5,
    "5-2 rotated": 20, "40-10 rotated": 5,
}  # fmt: skip
Job = tuple[str, int]  # size, seed
FAILED = [("30-8", 8001), ("40-10", 8027), ("60-15", 8000)]
MORE_STARTS = {"30-8": 6, "40-10": 6}  # fixed before they ran
SAME_BATCHES = {"30-8": 4}  # likewise


def target_of(size: str) -> apd.targets.TMS:
    """Make an untrained target, in its own basis."""
    n, d = map(int, size.split()[0].split("-"))
    return apd.targets.TMS(n, d)


def recipe_of(target: apd.targets.TMS) -> dict[str, Any]:
    """Return the recipe without its warning: how far it holds is what is measured."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return target.recipe


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Train one target, decompose it, and list what is owned and what lies on one line."""
    size, seed = job
    target = target_of(size).fit(seed=seed)
    if "rotated" in size:
        target.rotate(seed=seed)
    result, seconds = taken_apart(target, recipe_of(target), seed=seed + 1000)
    own, every = target.ownership(result.components), result.restarts
    assert every is not None
    length = own.length_ratio[own.owned]
    row = {
        "owned": int(own.owned.sum()),
        "missing": (~own.owned).nonzero().flatten().tolist(),
        "same_line": target.same_line,
        "least_cosine": own.cosine.min().item(),
        "length_ratios": [length.min().item(), length.max().item()] if len(length) else None,
        "owned_by_restart": [
            int(target.ownership(every.restart(r)).owned.sum()) for r in range(result.config.restarts)
        ],
        "scores": result.scores,
        "seconds": seconds,
    }
    return [row], {}


def look(job: Job) -> tuple[list[Row], Tensors]:
    """Do a failed run again; give the nearest feature of each missing one, with their cosine, and bits."""
    size, seed = job
    target = target_of(size).fit(seed=seed)
    found = taken_apart(target, recipe_of(target), seed=seed + 1000)[0].components
    true, lines = target.mechanisms(), normalize(target.encode.weight.detach().T)
    cosines = (lines @ lines.T).fill_diagonal_(0)
    missing = (~target.ownership(found).owned).nonzero().flatten().tolist()
    near, nearest = cosines.abs().max(1)
    owned = [j for j in range(len(lines)) if j not in missing]
    network = apd.Network(target, target.weights)
    x = target.data(8192, nonempty=True)(0, torch.Generator().manual_seed(30_000 + seed))
    row = {
        "missing": missing,
        "nearest": [(int(nearest[j]), round(float(cosines[j, nearest[j]]), 3)) for j in missing],
        "owned_as_near": int((near[owned] >= near[missing].max() - 1e-3).sum()),
        "bits": Judge()(network, found, x),
        "bits_of_the_truth": Judge()(network, apd.Components.from_matrices(true, 1), x),
    }
    return [row], {}


def start_again(starts: dict[str, int], later: int, job: Job) -> tuple[list[Row], Tensors]:
    """Decompose a failed target with new starts, and score each by its held-out error and by its bits.

    Args:
        starts: how many, by size.
        later: how much larger the seed is than the target's.
        job: size, and seed of the target.
    """
    size, seed = job
    target = target_of(size).fit(seed=seed)
    result, seconds = taken_apart(target, recipe_of(target) | {"restarts": starts[size]}, seed=seed + later)
    every = result.restarts
    assert every is not None
    found = [every.restart(r) for r in range(len(result.scores))]
    network = apd.Network(target, target.weights)
    x = target.data(8192, nonempty=True)(0, torch.Generator().manual_seed(30_000 + seed))  # as in `look`
    row = {
        "missing_by_start": [(~target.ownership(s).owned).nonzero().flatten().tolist() for s in found],
        "scores": result.scores,
        "bits": [Judge()(network, s, x) for s in found],
        "seconds": seconds,
    }
    return [row], {}


def settings_of(job: Job) -> Row:
    """Return a run's settings; they do not depend on what the target has learnt."""
    return numbers(recipe_of(target_of(job[0])), seed=job[1] + 1000)


RUNS = Rows(
    fields=("size", "seed"),
    jobs=lambda rows: [(size, seed) for size, n in N_TARGETS.items() for seed in range(8000, 8000 + n)],
    run=run,
    settings=settings_of,
    order=lambda job: (list(N_TARGETS).index(job[0]), job[1]),
)
LOOKED = Rows(fields=("size", "seed"), jobs=lambda rows: FAILED, run=look, order=FAILED.index)


def more_starts(job: Job) -> tuple[list[Row], Tensors]:
    """Do new starts with another seed, and so on other batches."""
    return start_again(MORE_STARTS, 2000, job)


def same_batches(job: Job) -> tuple[list[Row], Tensors]:
    """Do new starts on the batches of the run that failed."""
    return start_again(SAME_BATCHES, 1000, job)


def started_again(run: Callable[[Job], tuple[list[Row], Tensors]], starts: dict[str, int], later: int) -> Rows:
    """List the new starts on targets that failed; `starts` and `later` as for `start_again`."""
    return Rows(
        fields=("size", "seed"),
        jobs=lambda rows: [job for job in FAILED if job[0] in starts],
        run=run,
        settings=lambda job: numbers(recipe_of(target_of(job[0])) | {"restarts": starts[job[0]]}, seed=job[1] + later),
        order=FAILED.index,
    )


MORE = {
    "more_starts": started_again(more_starts, MORE_STARTS, 2000),
    "same_batches": started_again(same_batches, SAME_BATCHES, 1000),
}
LISTS = {"runs": RUNS, "failed": LOOKED, **MORE}
STUDY = Study("fresh", LISTS, about=lambda processes: {"processes": processes}, compact=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
