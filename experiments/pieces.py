"""Create data/pieces.json: an induction circuit found from random starts, in pieces that are merged (chapter 36).

python -m experiments.pieces [--only "as it is" "usual inputs" ...] [--processes N]          (75 minutes of one core)

The target is chapter 36's, "lean": no query or key has more rank than its head needs. Inputs ask one circuit each.
Eight components, one on at a time, at a high price of rank, become pieces of circuits. When that price has fallen to
zero, k is 2 for a moment, and pieces that are on together are merged by bits. From there on one is on at a time again.
Eight starts; the judge asks for few bits, and for a small error with one component on at a time (`judged`).

One thing is changed on five targets each, with four starts: "full", the target that the chapter began with, whose
circuits have more rank than they need; "usual inputs", on which any number of circuits is asked; "alone", a network in
which induction is the only circuit.

The settings were made on seeds 90, 91 and 8640, which are in "log", with what was tried besides. All others are from
8660 up, and each is run once. They were listed before any of these targets was made.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.batch import Batches
from apd_minimal.selection import batch_top_k
from apd_minimal.study import controls, matching
from apd_minimal.study.rate import Judge
from apd_minimal.targets.induction import CIRCUITS, Induction
from apd_minimal.tidy.merge import merge_by_bits
from experiments import induction
from experiments.experiment import Row, Rows, Study, Tensors, numbers

Job = tuple[str, int]  # what is changed, seed
FIRST, BATCH = 8660, 256
SETTINGS: Row = {
    "n_components": 8, "rank": 4, "steps": 1500, "restarts": 8, "lr": 3e-2,
    "faithfulness": 20.0, "minimality": 20.0, "scrub": 20.0, "simplicity": ((0.0, 100.0), (0.6, 0.0)),
    "top_k": ((0.0, 1.0), (0.59, 1.0), (0.6, 2.0), (0.61, 1.0)),
    "tidy_every": 0.6, "tidy_from": 0.5, "tidy_until": 0.7, "alpha": 0.5, "reseed_until": 0.0,
}  # fmt: skip
FEWER: Row = {"restarts": 4}
CHANGES: dict[str, Row] = {"as it is": {}, "full": FEWER, "usual inputs": FEWER, "alone": FEWER}
TARGETS = {"as it is": 10, "full": 5, "usual inputs": 5, "alone": 5}
EXACT = (0.001,)  # the judge's error: so small that no answer can be left out, as in the chapter
PRICE = 100.0  # bits for an error of everything, with one component on at a time


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
    circuits = CIRCUITS[:1] if change == "alone" else CIRCUITS
    return Induction(circuits, seed=seed, lean=change != "full")


@torch.no_grad()
def judged(network: apd.Network, components: apd.Components, x: Tensor) -> float:
    """Count bits, and add a price for the error with the most attributed component of each sequence alone.

    Bits are lowered by whoever leaves a circuit in two pieces of low rank; the error by whoever makes one lump of all.

    Args:
        network: the target.
        components: C of them.
        x: inputs that ask one circuit each.
    """
    score = induction.scores_of("sequence")
    mask = batch_top_k(score(network, components, x), 1.0)
    wanted = network(x)
    error = (network(x, components, mask.float()) - wanted).square().sum() / wanted.square().sum()
    return Judge(EXACT, attribution=score)(network, components, x) + PRICE * float(error)


def by_use(
    network: apd.Network, components: apd.Components, x: Tensor, k: float, gates: str = "sequence"
) -> apd.Components:
    """Merge components that are on together, as a run does at its one merging: nothing is trained.

    Args:
        network: the target.
        components: C of them.
        x: inputs.
        k: how many are on, on average.
        gates: "sequence" or "position": where they are on together.
    """
    on = induction.most_attributed(induction.scores_of(gates)(network, components, x), k)
    stacked = components.map(lambda t: t.detach()[None].clone())
    merge_by_bits(stacked, on[None].float(), SETTINGS["alpha"])
    return stacked.restart(0)


def taken_apart(job: Job) -> tuple[Induction, Batches, apd.Decomposition]:
    """Take one target apart: the target, its inputs, and what was found."""
    target = target_of(job)
    source = target.data(BATCH) if job[0] == "usual inputs" else induction.OneAtATime(target, BATCH)
    found = apd.decompose(
        target, source, target.weights, attribution=induction.scores_of("sequence"), judge=judged, progress=False,
        **settings_of(job),
    )  # fmt: skip
    return target, source, found


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Take one target apart from random starts, and measure."""
    change, seed = job
    score, began = induction.scores_of("sequence"), time.process_time()
    target, source, found = taken_apart(job)
    network, exact = apd.Network(target, target.weights), Judge(EXACT, attribution=score)
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
    x = source(0, torch.Generator().manual_seed(20_000 + seed))
    truth = target.mechanisms()
    true, dealt = apd.Components.from_matrices(truth, SETTINGS["rank"]), controls.dealt(parts, seed)
    heads = apd.Components.from_matrices(induction.heads(target), SETTINGS["rank"])
    own = apd.metrics.ownership(parts, truth)
    every_own = [apd.metrics.ownership(every.restart(r), truth) for r in range(every.restarts)]
    owners = [[int(j)] for j in own.owner]
    other = target_of((change, seed + 50)).mechanisms()

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
    }
    if change != "alone":  # the tests ask what becomes of other circuits
        row["causal"] = induction.causal(target, parts, owners, seed).tolist()
        row["causal_dealt"] = induction.causal(target, dealt, owners, seed).tolist()
    return [row], {}


RUNS = Rows(
    fields=("change", "seed"),
    jobs=lambda rows: jobs(),
    run=run,
    settings=lambda job: numbers(settings_of(job), batch=BATCH),
    order=lambda job: (list(CHANGES).index(job[0]), job[1]),
)
STUDY = Study("pieces", {"runs": RUNS}, about=lambda processes: {"processes": processes}, compact=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
