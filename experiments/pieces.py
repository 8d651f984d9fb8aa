"""Create data/pieces.json: an induction circuit found from random starts, in pieces that are merged once (chapter 36).

python -m experiments.pieces [--only "as it is" "usual inputs" ...] [--processes N]          (about an hour of one core)

The target is chapter 36's, "lean": no query or key has more rank than its head needs. Eight components, one on at a
time, at a high price of rank, become pieces of circuits. Once, when that price has fallen to zero, k is 2 for a moment,
and pieces that are on together are merged by bits. From there on one is on at a time again. The judge picks among six
starts. Inputs ask one circuit each.

One thing is changed at a time, on three targets with four starts each: "full", the target that the chapter began with,
whose circuits have more rank than they need; "usual inputs", on which any number of circuits is asked; "no merging";
"one k", merged where k is 1. "random" has no circuits: every matrix is a random one of the same singular values. The
settings were made on seeds 90 and 91, which are in "log", with what was tried before; all others are from 8640 up, and
each is run once. They were listed before any of these targets was made.
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
from experiments import induction
from experiments.experiment import Row, Rows, Study, Tensors, numbers

Job = tuple[str, int]  # what is changed, seed
FIRST, BATCH = 8640, 256
MERGED = 0.6  # progress at which pieces are merged
SETTINGS: Row = {
    "n_components": 8, "rank": 4, "steps": 1500, "restarts": 6, "lr": 3e-2,
    "faithfulness": 20.0, "minimality": 20.0, "scrub": 20.0, "simplicity": ((0.0, 100.0), (MERGED, 0.0)),
    "top_k": ((0.0, 1.0), (MERGED - 0.01, 1.0), (MERGED, 2.0), (MERGED + 0.01, 1.0)),
    "tidy_every": MERGED, "tidy_from": MERGED - 0.1, "tidy_until": MERGED + 0.1, "alpha": 0.5, "reseed_until": 0.0,
}  # fmt: skip
FEWER: Row = {"restarts": 4}
CHANGES: dict[str, Row] = {
    "as it is": {},
    "full": FEWER,
    "usual inputs": FEWER,
    "no merging": FEWER | {"tidy_every": 0.0},
    "one k": FEWER | {"top_k": 1.0},
    "random": FEWER,
}
TARGETS = dict.fromkeys(CHANGES, 3) | {"as it is": 10}
EXACT = (0.001,)  # the error at which bits are compared with those of the truth


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
    network = apd.Network(target, target.weights)
    source = target.data(BATCH) if change == "usual inputs" else induction.OneAtATime(known, BATCH)
    started = begin(network, source, Config.from_dict(settings_of(job)), attribution=score)
    judge = started.judge = Judge(attribution=score)
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
    truth, exact = target.mechanisms(), Judge(EXACT, attribution=score)
    true, dealt = apd.Components.from_matrices(truth, SETTINGS["rank"]), controls.dealt(parts, seed)
    heads = apd.Components.from_matrices(induction.heads(target), SETTINGS["rank"])
    own = apd.metrics.ownership(parts, truth)
    every_own = [apd.metrics.ownership(every.restart(r), truth) for r in range(every.restarts)]
    groups = [[int(j)] for j in own.owner]
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
        "bits": induction.finite(judge(network, parts, x)),
        "bits_of_the_truth": judge(network, true, x),
        "bits_exact": induction.finite(exact(network, parts, x)),
        "bits_exact_of_the_truth": exact(network, true, x),
        "causal": induction.causal(target, parts, groups, seed).tolist(),
        "causal_dealt": induction.causal(target, dealt, groups, seed).tolist(),
    }
    return [row], {}


def stored_settings(job: Job) -> Row:
    """Give the settings as they are stored."""
    return numbers(settings_of(job), batch=BATCH)


RUNS = Rows(
    fields=("change", "seed"),
    jobs=lambda rows: jobs(),
    run=run,
    settings=stored_settings,
    order=lambda job: (list(CHANGES).index(job[0]), job[1]),
)
STUDY = Study("pieces", {"runs": RUNS}, about=lambda processes: {"processes": processes}, compact=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
