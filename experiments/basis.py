"""Create data/basis.*: one function in many bases, taken apart in each (chapter 31).

python -m experiments.basis [--only apd | paths | balanced] [--processes N]       (about 20 minutes of one core)

The targets are TMS 5-2 of data/tms.*, seeds 10 to 14, each as a network with an encoder and a decoder of its own
(`basis_networks.Coder`), and the settings of APD are the recipe of TMS 5-2 as it stands, in every basis. Nothing was
tuned. "Another start" is the control: the same basis, and another seed of the decomposition. The first row of each
target has the settings and the start of data/whole.json. Components are stored as found, in their own basis.

"balanced" came later, on the first three targets, with the start of the runs as trained: two changes that no rotation
is, and the same after the two matrices were balanced by what is in them (`basis_networks.balanced`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal import algorithm
from experiments import spd
from experiments.basis_networks import OPTIMISERS, Change, Coder, apart, balanced, change, geometric, mechanisms
from experiments.experiment import Row, Rows, Study, Tensors, factors, numbers, ownership_lists, prefix, taken_apart

SEEDS = range(10, 15)
CUTS = {"inputs cut": ((3, 2), (2,)), "hidden cut": ((5,), (1, 1)), "hidden cut, rotated": ((5,), (1, 1))}
BASES = (
    "plain", "another start", "inputs rotated", "hidden rotated", "scaled 2", "scaled 4", "scaled 8", "stretched 4",
    *CUTS, "one-scale Adam", "one-scale Adam, hidden rotated",
)  # fmt: skip
STEPS = geometric(1, 150, 14)
RATES = {"SGD": 1.0, "Adam": 3e-2, "one-scale Adam": 3e-2}


def basis_of(name: str, seed: int) -> tuple[apd.targets.TMS, Coder, Change]:
    """Return a stored target in its own basis, the same function in another one, and the change between them."""
    tms = spd.stored_target("tms-5-2", seed)
    way = "hidden rotated" if name.endswith("rotated") and name != "inputs rotated" else name
    moved = change(way, tms.n_features, tms.d_hidden, seed)
    return tms, Coder(tms, moved, CUTS.get(name)), moved


def recipe(tms: apd.targets.TMS, job: tuple[str, int]) -> Row:
    """Give the settings of `decompose`: the recipe, and a start of another seed than the target's."""
    name, seed = job
    return tms.recipe | {"seed": (2000 if name == "another start" else 1000) + seed}


def in_plain(components: apd.Components, network: Coder, moved: Change) -> apd.Components:
    """Carry what was found back to the target's own basis, as components of "encode" and "decode"."""
    return moved.back.of(network.whole(components))


def owned(components: apd.Components, tms: apd.targets.TMS) -> apd.metrics.Ownership:
    """Say which features are owned, in the target's own basis."""
    return apd.metrics.ownership(components, mechanisms(tms))


def decomposed(network: Coder, settings: Row, name: str) -> tuple[apd.Decomposition, float]:
    """Run `decompose`, with the optimiser that the name asks for."""
    if not name.startswith("one-scale Adam"):
        return taken_apart(network, settings)
    own, begin = OPTIMISERS["one-scale Adam"], algorithm.begin

    def begun(*arguments: Any) -> Any:
        run = begin(*arguments)
        run.optimiser = own(run.parameters(), run.config.lr)  # type: ignore[assignment]
        return run

    algorithm.begin = begun  # type: ignore[assignment]
    try:
        return taken_apart(network, settings)
    finally:
        algorithm.begin = begin


def run(job: tuple[str, int]) -> tuple[list[Row], Tensors]:
    """Take one target apart in one basis, and measure."""
    tms, network, moved = basis_of(*job)
    result, seconds = decomposed(network, recipe(tms, job) | {"weights": network.weights}, job[0])
    every = result.restarts
    assert every is not None and every.restarts is not None
    starts = [owned(in_plain(every.restart(r), network, moved), tms) for r in range(every.restarts)]
    row = {"seconds": seconds, "scores": result.scores, "restarts_owned": [int(own.owned.sum()) for own in starts]}
    row |= ownership_lists(owned(in_plain(result.components, network, moved), tms))
    return [row], factors(result.components.map(Tensor.detach), prefix(job))


def balanced_run(job: tuple[str, int]) -> tuple[list[Row], Tensors]:
    """Take one target apart whose hidden numbers were changed, as it is or balanced first."""
    name, seed = job
    tms = spd.stored_target("tms-5-2", seed)
    moved = change(name.removesuffix(", balanced"), tms.n_features, tms.d_hidden, seed)
    if name.endswith(", balanced"):
        moved = balanced(tms, moved)
    network = Coder(tms, moved)
    result, seconds = taken_apart(network, recipe(tms, job) | {"weights": network.weights})
    rotated = float((moved.M @ moved.M.T - torch.eye(tms.d_hidden)).norm())
    row = {"seconds": seconds, "scores": result.scores, "from_a_rotation": rotated}
    return [row | ownership_lists(owned(in_plain(result.components, network, moved), tms))], {}


def path(job: tuple[str, str, int]) -> tuple[list[Row], Tensors]:
    """Train from one start in two bases, by one optimiser."""
    optimiser, name, seed = job
    tms, _, moved = basis_of(name, seed)
    return [{"steps": STEPS, "apart": apart(tms, moved, optimiser, STEPS, 1000 + seed, RATES[optimiser])}], {}


def path_jobs(rows: list[Row]) -> list[tuple[str, str, int]]:
    """List optimisers and changes, each with all targets."""
    changes = ("inputs rotated", "hidden rotated", "scaled 2")
    return [(optimiser, name, seed) for optimiser in OPTIMISERS for name in changes for seed in SEEDS]


APD = Rows(
    fields=("basis", "seed"),
    jobs=lambda rows: [(name, seed) for name in BASES for seed in SEEDS],
    run=run,
    settings=lambda job: numbers(recipe(apd.targets.TMS(5, 2), job)),
    order=lambda job: (BASES.index(job[0]), job[1]),
)
BALANCED = Rows(
    fields=("basis", "seed"),
    jobs=lambda rows: [(n, s) for s in SEEDS[:3] for n in ("scaled 4, balanced", "mixed 4", "mixed 4, balanced")],
    run=balanced_run,
    settings=lambda job: numbers(recipe(apd.targets.TMS(5, 2), job)),
)
PATHS = Rows(("optimiser", "change", "seed"), path_jobs, path, order=partial(tuple))
STUDY = Study("basis", {"apd": APD, "paths": PATHS, "balanced": BALANCED})

if __name__ == "__main__":
    torch.set_num_threads(1)
    STUDY.main(__doc__)
