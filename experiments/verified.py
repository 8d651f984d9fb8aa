"""Create data/verified.json: all inputs and all masks of decompositions that are small enough (chapter 35).

python -m experiments.verified [--processes N]                                     (ten minutes of one core)

Ten targets of data/modular.json, the first five of the ten with tasks and of the ten with frequencies, are taken apart
again, with either weights of the losses. (There the pick is what has fewer bits.) They have 3 and 5 components, so
that every input (with every setting of the switches) can be run with every mask. A component is needed where the
switch of the mechanism that it is matched with is open. Errors are squared errors over the variance of the target's
outputs over all inputs:

- "alone": only what is needed is on;
- "scrubbed": the mean over all masks that leave on what is needed;
- "worst": for each input the worst of these masks, the mean over inputs;
- "worst_input": the same for the worst input.

Beside what was found stand the truth, the start with the most bits, and dealt parts. Nothing was tuned.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.study import controls
from apd_minimal.study.rate import Judge
from apd_minimal.targets import ModularArithmetic
from experiments.experiment import Row, Rows, Study, Tensors, numbers
from experiments.modular import FIRST, MECHANISMS, WEIGHTS, settings_of, target_of, truth_of

KINDS = ("task", "frequency")
SEEDS = 5
Job = tuple[str, int, str]  # kind, seed, weights of the losses


def everything(target: ModularArithmetic) -> Tensor:
    """List every pair of tokens with every setting of the switches that data can have: [N, 2 n + S]."""
    x = target.inputs()
    if target.switches == "task":
        return x
    S = len(target.opens)
    settings = torch.tensor(list(itertools.product((0.0, 1.0), repeat=S)))
    tokens = x[:, : 2 * target.n]
    return torch.cat([tokens.repeat_interleave(len(settings), 0), settings.repeat(len(tokens), 1)], 1)


@torch.no_grad()
def verified(target: ModularArithmetic, components: apd.Components, truth: dict[str, Tensor]) -> Row:
    """Run all inputs with all masks.

    Args:
        target: with switches.
        components: C components, at least as many as there are mechanisms.
        truth: the mechanisms, per path [J, d_in, d_out]; mechanism j belongs to switch j.
    """
    network, x = apd.Network(target, list(truth)), everything(target)
    y = target(x)
    variance = (y - y.mean(0)).square().mean()
    owner = apd.metrics.ownership(components, truth).owner
    needed = torch.zeros(len(x), components.n_components, dtype=torch.bool)
    needed[:, owner] = x[:, 2 * target.n :] > 0
    total, count = torch.zeros(len(x)), torch.zeros(len(x))
    alone, worst = torch.zeros(len(x)), torch.zeros(len(x))
    for mask in itertools.product((False, True), repeat=components.n_components):
        on = torch.tensor(mask)
        fits = (on | ~needed).all(1)
        if not fits.any():
            continue
        out = network(x[fits], components, on.float().expand(int(fits.sum()), -1))
        error = (out - y[fits]).square().mean(1) / variance
        total[fits] += error
        count[fits] += 1
        worst[fits] = worst[fits].maximum(error)
        least = (needed[fits] == on).all(1)
        alone[fits.nonzero().flatten()[least]] = error[least]
    row: dict[str, Any] = {"inputs": len(x), "masks": int(count.sum())}
    means = {"alone": alone, "scrubbed": total / count, "worst": worst}
    return row | {name: v.mean().item() for name, v in means.items()} | {"worst_input": worst.max().item()}


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Take one target apart, and verify what was found and its controls."""
    kind, seed, weights = job
    target = target_of(kind, seed)
    truth = truth_of(kind, target)
    settings = settings_of((kind, MECHANISMS[kind], seed, weights))
    found = apd.decompose(target, target.data(256), target.weights, judge=Judge(), progress=False, **settings)
    every = found.restarts
    assert every is not None and found.scores is not None
    last = max(range(len(found.scores)), key=found.scores.__getitem__)
    widest = min(truth["hidden.weight"].shape[1:])
    parts = {
        "truth": apd.Components.from_matrices(truth, widest),
        "found": found.components,
        "most bits": every.restart(last),
        "dealt": controls.dealt(found.components, seed),
    }
    rows = []
    for name, own in parts.items():
        owned = int(apd.metrics.ownership(own, truth).owned.sum())
        rows.append({"parts": name, "owned": owned, **verified(target, own, truth)})
    return rows, {}


RUNS = Rows(
    fields=("kind", "seed", "weights"),
    jobs=lambda rows: [(kind, FIRST + i, weights) for i in range(SEEDS) for kind in KINDS for weights in WEIGHTS],
    run=run,
    settings=lambda job: numbers(settings_of((job[0], MECHANISMS[job[0]], *job[1:]))),
)
STUDY = Study("verified", {"runs": RUNS}, compact=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
