"""Create data/pieces.json: an induction circuit found from random starts, in pieces that are merged (chapter 36).

python -m experiments.pieces [--only "as it is" "usual inputs" ...] [--processes N]          (about an hour of one core)

The target is chapter 36's, "lean": no query or key has more rank than its head needs. Eight components, one on at a
time, at a high price of rank, become pieces of circuits. When that price has fallen to zero, k is 2 for a moment, then
1.4 for a while, and three times pieces that are on together are merged by bits. From there on one is on at a time
again. The judge picks among six starts. Inputs ask one circuit each.

One thing is changed at a time, on three targets with four starts each: "full", the target that the chapter began with,
whose circuits have more rank than they need; "usual inputs", on which any number of circuits is asked; "no merging".
"random" has no circuits: every matrix is a random one of the same singular values. "groups" are those of chapter 37,
with the same settings; only the rank of components is not bounded there.

The settings were made on seeds 90, 91 and 8640, which are in "log", with what was tried before. All others are from
8660 up, and each is run once. They were listed before any of these targets was made.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.algorithm import begin, finish
from apd_minimal.config import Config
from apd_minimal.study import controls, matching
from apd_minimal.study.rate import Judge
from apd_minimal.targets.induction import Induction
from apd_minimal.tidy.merge import merge_by_bits
from experiments import groups, induction
from experiments.experiment import Row, Rows, Study, Tensors, numbers

Job = tuple[str, int]  # what is changed, seed
GroupJob = tuple[str, int]  # kind of groups, seed
FIRST, BATCH = 8660, 256
MERGED = 0.6  # progress at which pieces are merged first
SETTINGS: Row = {
    "n_components": 8, "rank": 4, "steps": 1500, "restarts": 6, "lr": 3e-2,
    "faithfulness": 20.0, "minimality": 20.0, "scrub": 20.0, "simplicity": ((0.0, 100.0), (MERGED, 0.0)),
    "top_k": ((0.0, 1.0), (0.59, 1.0), (MERGED, 2.0), (0.61, 1.4), (0.8, 1.4), (0.81, 1.0)),
    "tidy_every": 0.1, "tidy_from": 0.59, "tidy_until": 0.85, "alpha": 0.5, "reseed_until": 0.0,
}  # fmt: skip
FEWER: Row = {"restarts": 4}
CHANGES: dict[str, Row] = {
    "as it is": {},
    "full": FEWER,
    "usual inputs": FEWER,
    "no merging": FEWER | {"tidy_every": 0.0},
    "random": FEWER,
}
TARGETS = dict.fromkeys(CHANGES, 3) | {"as it is": 10}
EXACT = (0.001,)  # the judge's error: so small that no answer can be left out, as in the chapter
GROUPS = ("apart", "shared")


def jobs() -> list[Job]:
    """List the runs."""
    return [(change, FIRST + i) for change, n in TARGETS.items() for i in range(n)]


def settings_of(job: Job) -> Row:
    """Give the settings of a run."""
    change, seed = job
    return {**SETTINGS, **CHANGES[change], "seed": seed + 1000}


def target_of(job: Job) -> Induction:
    """Make the target of a run."""
    change, seed = job
    target = Induction(seed=seed, lean=change != "full")
    return induction.without_circuits(target, seed) if change == "random" else target


def by_use(network: apd.Network, components: apd.Components, x: Tensor, k: float) -> apd.Components:
    """Merge components that are on together, as a run does at its one merging: nothing is trained.

    Args:
        network: the target.
        components: C of them.
        x: inputs.
        k: how many are on, on average.
    """
    scores = induction.attribution(network, components, x)
    least = scores.flatten().topk(int(k * len(x))).values[-1]
    stacked = components.map(lambda t: t.detach()[None].clone())
    merge_by_bits(stacked, (scores >= least)[None].float(), SETTINGS["alpha"])
    return stacked.restart(0)


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Take one target apart from random starts, and measure."""
    change, seed = job
    known, target = Induction(seed=seed, lean=change != "full"), target_of(job)
    score, began = induction.scores_of("sequence"), time.process_time()
    network, exact = apd.Network(target, target.weights), Judge(EXACT, attribution=score)
    source = target.data(BATCH) if change == "usual inputs" else induction.OneAtATime(known, BATCH)
    started = begin(network, source, Config.from_dict(settings_of(job)), attribution=score)
    started.judge = exact
    found = finish(started, None, 500, None, False, None)
    seconds = time.process_time() - began
    parts, every = found.components, found.restarts
    assert every is not None and every.restarts is not None and found.scores is not None
    best = sorted(range(every.restarts), key=found.scores.__getitem__)
    again = matching.match_weights(parts, every.restart(best[1]))
    row: Row = {
        "in_use": int((parts.norms() > 0).sum()),
        "relative_faithfulness": apd.metrics.relative_faithfulness(parts, network.weights).item(),
        "scores": [induction.finite(s) for s in found.scores],
        "second start": {"mean": again.mean, "chance": float(again.chance.mean())},
        "seconds": round(seconds, 1),
    }
    if change == "random":
        return [row], {}
    x = source(0, torch.Generator().manual_seed(20_000 + seed))
    truth = target.mechanisms()
    true, dealt = apd.Components.from_matrices(truth, SETTINGS["rank"]), controls.dealt(parts, seed)
    heads = apd.Components.from_matrices(induction.heads(target), SETTINGS["rank"])
    own = apd.metrics.ownership(parts, truth)
    every_own = [apd.metrics.ownership(every.restart(r), truth) for r in range(every.restarts)]
    owners = [[int(j)] for j in own.owner]
    other = Induction(seed=seed + 50, lean=change != "full").mechanisms()

    def owned_by(components: apd.Components) -> list[bool]:
        return apd.metrics.ownership(components, truth).owned.tolist()

    row |= {
        "owned": own.owned.tolist(),
        "cosine": [round(v, 4) for v in own.cosine.tolist()],
        "length_ratio": [round(v, 4) for v in own.length_ratio.tolist()],
        "owned_by_restart": [o.owned.tolist() for o in every_own],
        "summed": [[round(v, 4) for v in induction.summed(every.restart(r), truth)] for r in range(every.restarts)],
        "dealt_owned": owned_by(dealt),
        "dealt_cosine": apd.metrics.ownership(dealt, truth).cosine.mean().item(),
        "another_cosine": apd.metrics.ownership(parts, other).cosine.mean().item(),
        "heads_owned": owned_by(heads),
        "heads_merged_owned": owned_by(by_use(network, heads, x, 4 / 3)),
        "bits": induction.finite(exact(network, parts, x)),
        "bits_of_the_truth": exact(network, true, x),
        "bits_dealt": induction.finite(exact(network, dealt, x)),
        "causal": induction.causal(target, parts, owners, seed).tolist(),
        "causal_dealt": induction.causal(target, dealt, owners, seed).tolist(),
    }
    return [row], {}


def group_jobs() -> list[GroupJob]:
    """List the runs on groups."""
    return [(kind, FIRST + i) for kind in GROUPS for i in range(5)]


def group_settings(job: GroupJob) -> Row:
    """Give the settings of a run on groups: the same, but for ranks, which are not bounded."""
    return {**SETTINGS, "rank": None, "seed": job[1] + 1000}


def run_groups(job: GroupJob) -> tuple[list[Row], Tensors]:
    """Take one network of group operations apart by the same recipe, and count what is owned."""
    kind, seed = job
    target, judge, began = groups.target_of(kind, seed), Judge(EXACT), time.process_time()
    truth, network = target.mechanisms(groups.by_of(kind)), apd.Network(target, target.weights)
    settings = group_settings(job)
    found = apd.decompose(target, target.data(BATCH), target.weights, judge=judge, progress=False, **settings)
    seconds, every = time.process_time() - began, found.restarts
    assert every is not None and every.restarts is not None and found.scores is not None
    x = target.data(2048)(0, torch.Generator().manual_seed(20_000 + seed))
    own = apd.metrics.ownership(found.components, truth)
    dealt = controls.dealt(found.components, seed)
    row: Row = {
        "in_use": int((found.components.norms() > 0).sum()),
        "owned": own.owned.tolist(),
        "cosine": [round(v, 4) for v in own.cosine.tolist()],
        "owned_by_restart": [
            apd.metrics.ownership(every.restart(r), truth).owned.tolist() for r in range(every.restarts)
        ],
        "dealt_owned": apd.metrics.ownership(dealt, truth).owned.tolist(),
        "dealt_cosine": apd.metrics.ownership(dealt, truth).cosine.mean().item(),
        "scores": [induction.finite(s) for s in found.scores],
        "bits": induction.finite(judge(network, found.components, x)),
        "bits_of_the_truth": judge(network, apd.Components.from_matrices(truth), x),
        "seconds": round(seconds, 1),
    }
    return [row], {}


RUNS = Rows(
    fields=("change", "seed"),
    jobs=lambda rows: jobs(),
    run=run,
    settings=lambda job: numbers(settings_of(job), batch=BATCH),
    order=lambda job: (list(CHANGES).index(job[0]), job[1]),
)
ON_GROUPS = Rows(
    fields=("kind", "seed"),
    jobs=lambda rows: group_jobs(),
    run=run_groups,
    settings=lambda job: numbers(group_settings(job), batch=BATCH),
)
STUDY = Study(
    "pieces", {"runs": RUNS, "groups": ON_GROUPS}, about=lambda processes: {"processes": processes}, compact=True
)

if __name__ == "__main__":
    STUDY.main(__doc__)
