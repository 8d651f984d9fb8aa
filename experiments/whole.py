"""Create data/whole.*: APD of the untied networks that SPD took apart in experiments/spd.py (chapter 29).

python -m experiments.whole [--processes N]        (about 11 seconds of one core for each target)

A component spans encoder and decoder. The settings are the recipe of TMS 5-2 as it is, which was made for the tied
weight; nothing was tuned for two weights. Before the runs were stored, the first two targets had been tried once with
other starts, to see whether the recipe runs at all (5 and 4 of 5 features were owned). Each target is also taken apart
with its inputs and outputs rotated, as a control: there the mechanisms are no columns of the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import apd_minimal as apd
from experiments import spd
from experiments.experiment import Row, Rows, Study, Tensors, factors, numbers, ownership_lists, prefix, taken_apart

Job = tuple[int, bool]  # seed, rotated
SEEDS = range(10, 15)  # the targets of SPD's longer runs


def recipe(tms: apd.targets.TMS, job: Job) -> Row:
    """Give the settings of `decompose`: the recipe, both weights, and starts of another seed than the target's."""
    return tms.recipe | {"weights": ["encode.weight", "decode.weight"], "seed": 1000 + job[0]}


def truth(network: nn.Module) -> dict[str, Tensor]:
    """Give feature j's row of the encoder and its column of the decoder, as one mechanism: [J, d_in, d_out] each."""
    W = {path: w.detach() for path, w in apd.Network(network, ["encode.weight", "decode.weight"]).weights.items()}
    Q = getattr(network, "rotation", None)
    Q = torch.eye(len(W["encode.weight"])) if Q is None else Q
    onto = Q[:, :, None] * Q[:, None, :]  # what feature j looks like to the weights: [J, n, n]
    return {"encode.weight": onto @ W["encode.weight"], "decode.weight": W["decode.weight"] @ onto}


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Decompose one target, and measure."""
    tms, network, _ = spd.target_of("tms-5-2", "untied", *job)
    result, seconds = taken_apart(network, recipe(tms, job))
    every = result.restarts
    assert every is not None and every.restarts is not None
    starts = [apd.metrics.ownership(every.restart(r), truth(network)) for r in range(every.restarts)]
    row = {"seconds": seconds, "scores": result.scores, "restarts_owned": [int(own.owned.sum()) for own in starts]}
    row |= ownership_lists(apd.metrics.ownership(result.components, truth(network)))
    return [row], factors(result.components.map(Tensor.detach), prefix(job))


RUNS = Rows(
    fields=("seed", "rotated"),
    jobs=lambda rows: [(seed, rotated) for rotated in (False, True) for seed in SEEDS],
    run=run,
    settings=lambda job: numbers(recipe(apd.targets.TMS(5, 2), job)),
)
STUDY = Study("whole", {"runs": RUNS})

if __name__ == "__main__":
    STUDY.main(__doc__)
