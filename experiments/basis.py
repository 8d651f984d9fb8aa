"""Create data/basis.*: one function in many bases, taken apart in each (chapter 31).

python -m experiments.basis [--only apd | paths | balanced | untied] [--processes N]     (about 30 minutes of one core)

The targets are TMS 5-2 of data/tms.*, seeds 10 to 14, each as a network with an encoder and a decoder of its own
(`basis_networks.Coder`), and the settings of APD are the recipe of TMS 5-2 as it stands, in every basis. Nothing was
tuned. "Another start" is the control: the same basis, and another seed of the decomposition. The first row of each
target has the settings and the start of data/whole.json. Components are stored as found, in their own basis.

"balanced" came later, with the start of the runs as trained: two changes that no rotation is, and the same after the
two matrices were balanced by what is in them (`basis_networks.balanced`); the last two targets came later still.
"untied" has networks whose decoder was trained as a matrix of its own, so that nothing makes the two balanced: as
trained and scaled, and both balanced first. Seeds, recipe and starts are those of the others; nothing was tuned. With a
start of its own for the decoder (`draws` 2) such networks do not carry all of their features: 14 of 25 here, and four
of five on each of seeds 90 to 93. So most runs are on networks that start as the tied ones do (`draws` 1), which on
seeds 90 to 93 carry all five. That, and nothing about their decompositions, was looked at before. "In units" came
later, when the runs as trained and balanced had owned nothing: it asks whether features whose row and column are not
equally long are the reason. It was run again to be measured in these units, too, which changed nothing else. Last came
runs that begin at the true mechanisms, with the recipe and without its price (do they stay?), and runs with other
settings, found on seeds 90 to 93 in 23 trials: "log" lists them, with the features owned by the best start on each
seed (prices are shares of `share_nonempty`). With the last ones, which were taken, the judge of chapter 25 chose starts
that own 4, 5, 2 and 5. The tied networks were then taken apart with them, too. And to tell the changes apart, "longer"
has the steps, starts and judge of the other settings and the recipe's price, one that falls evenly ("falling"), or
none.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal import algorithm
from experiments import spd
from experiments.basis_networks import (
    OPTIMISERS,
    Change,
    Coder,
    InUnits,
    Untied,
    apart,
    balanced,
    by_feature,
    change,
    geometric,
    imbalance,
    mechanisms,
)  # fmt: skip
from experiments.experiment import Row, Rows, Study, Tensors, factors, numbers, ownership_lists, prefix, taken_apart

SEEDS = range(10, 15)
CUTS = {"inputs cut": ((3, 2), (2,)), "hidden cut": ((5,), (1, 1)), "hidden cut, rotated": ((5,), (1, 1))}
BASES = (
    "plain", "another start", "inputs rotated", "hidden rotated", "scaled 2", "scaled 4", "scaled 8", "stretched 4",
    *CUTS, "one-scale Adam", "one-scale Adam, hidden rotated",
)  # fmt: skip
LOOSE = (  # draws and bases of the networks whose weights are not tied, in the order in which they are run
    (1, "plain"), (1, "plain, balanced"), (1, "scaled 4"), (1, "scaled 4, balanced"), (1, "another start"),
    (1, "plain, in units"), (2, "plain"), (2, "plain, balanced"), (1, "plain, from the truth"),
    (1, "plain, from the truth, no price"), (1, "plain, other settings"), (1, "another start, other settings"),
    (1, "scaled 4, balanced, other settings"), (2, "plain, other settings"), (1, "plain, longer"),
    (1, "plain, longer, falling"), (1, "plain, longer, no price"),
)  # fmt: skip
CURED = ("scaled 4, balanced", "mixed 4", "mixed 4, balanced", "plain, other settings")  # of the tied ones
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
    settings = tms.recipe | {"seed": (2000 if name.startswith("another start") else 1000) + seed}
    share = settings["batches"].share_nonempty
    if name.endswith("other settings") or ", longer" in name:
        settings |= {"steps": 6000, "restarts": 12, "judge": apd.rate.Judge()}
    if name.endswith("other settings"):
        settings |= {"p": 0.7, "simplicity": ((0.0, share), (0.7, 0.0))}
    elif name.endswith("falling"):
        settings |= {"simplicity": ((0.0, 1.2 * share), (0.7, 0.0))}
    return settings | ({"simplicity": 0.0} if name.endswith("no price") else {})


def in_plain(components: apd.Components, network: Coder, moved: Change) -> apd.Components:
    """Carry what was found back to the target's own basis, as components of "encode" and "decode"."""
    return moved.back.of(network.whole(components))


def owned(components: apd.Components, tms: apd.targets.TMS) -> apd.metrics.Ownership:
    """Say which features are owned, in the target's own basis."""
    return apd.metrics.ownership(components, mechanisms(tms))


def decomposed(
    network: Coder, settings: Row, name: str, truth: Mapping[str, Tensor] | None = None
) -> tuple[apd.Decomposition, float]:
    """Run `decompose`, with the optimiser or from the start that the name asks for."""
    from_truth = "from the truth" in name
    if not from_truth and not name.startswith("one-scale Adam"):
        return taken_apart(network, settings)
    begin = algorithm.begin

    def begun(*arguments: Any) -> Any:
        run = begin(*arguments)
        if from_truth:
            assert truth is not None
            start_at(run.components, truth)
        else:
            run.optimiser = OPTIMISERS["one-scale Adam"](run.parameters(), run.config.lr)  # type: ignore[assignment]
        return run

    algorithm.begin = begun  # type: ignore[assignment]
    try:
        return taken_apart(network, settings)
    finally:
        algorithm.begin = begin


@torch.no_grad()
def start_at(components: apd.Components, truth: Mapping[str, Tensor]) -> None:
    """Set the first J of C components of every restart to true mechanisms [J, d_in, d_out], the others to zero."""
    for path, true in zip(components.paths, truth.values(), strict=True):
        A, B = components.A[path].zero_(), components.B[path].zero_()
        U, S, Vh = torch.linalg.svd(true.to(A), full_matrices=False)
        (J, m), root = S[..., : A.shape[-1]].shape, S.sqrt()
        A[..., :J, :, :m], B[..., :J, :m, :] = (U * root[:, None])[..., :m], (root[..., None] * Vh)[:, :m]


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


def rescaled(job: tuple[str, int], tms: apd.targets.TMS) -> tuple[Row, apd.Components, Coder, Change]:
    """Take a target apart whose hidden numbers were changed, as it is or balanced first."""
    name, seed = job
    moved = change(name.partition(",")[0], tms.n_features, tms.d_hidden, seed)
    if ", balanced" in name:
        moved = balanced(tms, moved)
    network = InUnits(tms, moved) if name.endswith(", in units") else Coder(tms, moved)
    result, seconds = decomposed(network, recipe(tms, job) | {"weights": network.weights}, name, mechanisms(tms))
    row = {"seconds": seconds, "scores": result.scores}
    if len(result.scores) > 4:  # of the recipe
        every = result.restarts
        assert every is not None
        starts = [owned(in_plain(every.restart(r), network, moved), tms) for r in range(len(result.scores))]
        row["restarts_owned"] = [int(own.owned.sum()) for own in starts]
    row |= ownership_lists(owned(in_plain(result.components, network, moved), tms))
    return row, result.components, network, moved


def balanced_run(job: tuple[str, int]) -> tuple[list[Row], Tensors]:
    """Do so with a stored target, whose weights are tied."""
    tms = spd.stored_target("tms-5-2", job[1])
    row, _, _, moved = rescaled(job, tms)
    return [row | {"from_a_rotation": float((moved.M @ moved.M.T - torch.eye(tms.d_hidden)).norm())}], {}


@cache
def untied(draws: int, seed: int) -> Untied:
    """Train a network whose decoder is a matrix of its own."""
    return Untied(draws).fit(seed)


def untied_run(job: tuple[int, str, int]) -> tuple[list[Row], Tensors]:
    """Do so with a network whose weights are not tied, and say how balanced it is, whole and feature by feature."""
    draws, name, seed = job
    tms = untied(draws, seed)
    row, components, network, moved = rescaled((name, seed), tms)
    W, V = (network.get_parameter(path).detach().T for path in network.weights)
    x, carried = tms.data(4096)(0, torch.Generator().manual_seed(70_000 + seed)), tms.carried
    with torch.no_grad():
        row["error"] = float((tms(x) - x).square().mean() / x.square().mean())
    row |= {"carried": carried.tolist(), "imbalance": imbalance(W, V)}
    row |= {"rows": W.norm(dim=1).tolist(), "columns": V.norm(dim=0).tolist()}
    row |= halves(in_plain(components, network, moved), tms)
    dealt = [apd.controls.dealt(components, deal) for deal in range(20)]
    deals = [owned(in_plain(parts, network, moved), tms) for parts in dealt]
    row["dealt"] = float(torch.stack([own.cosine[carried].mean() for own in deals]).mean())
    row["dealt_owned"] = float(torch.stack([own.owned[carried].double().sum() for own in deals]).mean())
    if isinstance(network, InUnits):  # where a row is much shorter than its column, the cosine is about the column
        true = by_feature({"encode": W, "decode": V})
        own, *others = (apd.metrics.ownership(Coder.whole(network, parts), true) for parts in (components, *dealt))
        row |= {f"{name}_in_units": values for name, values in ownership_lists(own).items()}
        row["dealt_owned_in_units"] = sum(int(other.owned.sum()) for other in others) / len(others)
    return [row], {}


def halves(components: apd.Components, tms: apd.targets.TMS) -> Row:
    """Compare the two halves of each feature's owner with those of the feature: cosines and ratios of lengths [J]."""
    owner, found = owned(components, tms).owner, {}
    for path, true in mechanisms(tms).items():
        own = components.matrices(path).detach()[owner] * (owner >= 0)[:, None, None]
        product, length = (own * true).sum((1, 2)), true.norm(dim=(1, 2))
        found[f"{path}_cosine"] = (product / (own.norm(dim=(1, 2)) * length).clamp_min(1e-12)).tolist()
        found[f"{path}_length_ratio"] = (own.norm(dim=(1, 2)) / length.clamp_min(1e-12)).tolist()
    return found


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
    jobs=lambda rows: [(n, s) for s in SEEDS for n in CURED],
    run=balanced_run,
    settings=lambda job: numbers(recipe(apd.targets.TMS(5, 2), job)),
    order=lambda job: (job[1], CURED.index(job[0])),
)
UNTIED = Rows(
    fields=("draws", "basis", "seed"),
    jobs=lambda rows: [(*loose, seed) for loose in LOOSE for seed in SEEDS],
    run=untied_run,
    settings=lambda job: numbers(recipe(apd.targets.TMS(5, 2), job[1:])),
    order=lambda job: (LOOSE.index(job[:2]), job[2]),
)
PATHS = Rows(("optimiser", "change", "seed"), path_jobs, path, order=partial(tuple))
STUDY = Study("basis", {"apd": APD, "paths": PATHS, "balanced": BALANCED, "untied": UNTIED})

if __name__ == "__main__":
    torch.set_num_threads(1)
    STUDY.main(__doc__)
