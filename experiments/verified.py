"""Create data/verified.json: all inputs and all masks of decompositions that are small enough (chapter 35).

python -m experiments.verified [--processes N]                                 (twenty minutes of one core)

Ten targets of data/modular.json, the first five of the ten with tasks and of the ten with frequencies, are taken apart
again, with either weights of the losses, and five of each of two kinds of data/groups.json. (There the pick is what has
fewer bits.) They have 3 and 5 components, so that every input (with every setting of the switches) can be run with
every mask. A component is needed where the mechanism that it is matched with is at work. Errors are squared errors over
the variance of the target's outputs over all inputs:

- "alone": only what is needed is on;
- "scrubbed": the mean over all masks of zeros and ones that leave on what is needed;
- "worst": for each input the worst of these masks, the mean over inputs;
- "worst_input": the same for the worst input;
- "bound", "bound_input": no mask with gates anywhere in [0, 1] is worse than this (`every_mask`), again as a mean and
  for the worst input; "seen" is the mean of the worst that was met, "corners" the share of inputs on which the worst
  mask of zeros and ones is proven to be the worst of all, "interval" the mean of a bound by interval arithmetic;
- "attack": the worst that an attack of 20 steps of 0.1 meets (`apd_minimal.study.worst`), the mean over inputs;
- "own_alone", "own_worst", "own_bound", "own_bound_input": the same with what APD's attributions choose in place of
  what is needed, those above the threshold that the k most attributed set on 2,048 samples of the data; "own_same" is
  the share of inputs on which this is what is needed;
- "faithfulness" and "cosine": of the sum with the weights, and of the parts with the mechanisms; "turned": neurons that
  the owner of their mechanism reads with the wrong sign.

Beside what was found stand the truth, the start with the most bits, and dealt parts. Nothing was tuned.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.selection import TopK
from apd_minimal.study import controls
from apd_minimal.study.rate import Judge
from apd_minimal.study.worst import Corners
from apd_minimal.targets import GroupOperations
from experiments import groups, modular
from experiments.every_mask import HIDDEN, Squares, bounds
from experiments.experiment import Row, Rows, Study, Tensors, numbers

KINDS = ("task", "frequency")
GROUPS = ("apart", "shared")
SEEDS = 5
SAMPLES = 2048  # of the data, for the threshold of attributions
STEPS, SIZE = 20, 0.1  # of the attack, as bushnaq2026 evaluates
Job = tuple[str, int, str]  # kind, seed, weights of the losses


def everything(target: Squares) -> Tensor:
    """List every pair of tokens with every setting of the switches that data can have: [N, tokens + S]."""
    x = target.inputs()
    if target.switches in (None, "task", "group"):
        return x
    S = len(target.opens)
    settings = torch.tensor(list(itertools.product((0.0, 1.0), repeat=S)))
    tokens = x[:, : x.shape[1] - S]
    return torch.cat([tokens.repeat_interleave(len(settings), 0), settings.repeat(len(tokens), 1)], 1)


def at_work(target: Squares, x: Tensor) -> Tensor:
    """Say which mechanisms are at work: those whose switch is open, or the group that has the tokens: bool [N, J]."""
    if target.switches is None:
        assert isinstance(target, GroupOperations)
        return torch.stack([x[:, tokens].sum(1) > 0 for tokens in target.tokens], 1)
    return x[:, x.shape[1] - len(target.opens) :] > 0


@torch.no_grad()
def counted(network: apd.Network, components: apd.Components, x: Tensor, y: Tensor, needed: Tensor) -> Row:
    """Run all inputs with all masks of zeros and ones that leave on what is needed: squared errors of every input.

    Args:
        network: the target.
        components: C components.
        x: inputs [N, ...].
        y: its outputs [N, n_out].
        needed: who must be on, bool [N, C].
    """
    total, count = torch.zeros(len(x)), torch.zeros(len(x))
    alone, worst = torch.zeros(len(x)), torch.zeros(len(x))
    variance = (y - y.mean(0)).square().mean()
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
    return {"masks": int(count.sum()), "alone": alone, "scrubbed": total / count, "worst": worst}


def chosen(network: apd.Network, components: apd.Components, x: Tensor, samples: Tensor, top_k: float) -> Tensor:
    """Say what attributions choose: above the threshold of the k most attributed of some samples: bool [N, C]."""
    scores = [apd.attributions.gradient(network, components, inputs)[None] for inputs in (x, samples)]
    selection = TopK(top_k)
    return selection.active(scores[0], selection.threshold(scores[1]))[0]


def turned(components: apd.Components, truth: dict[str, Tensor], owner: Tensor) -> int:
    """Count neurons that the owner of their mechanism reads with the wrong sign, which a square does not see."""
    wanted = truth[HIDDEN].sum(0)  # [d_in, neurons]
    of_neuron = owner[truth[HIDDEN].norm(dim=1).argmax(0)]
    read = components.matrices(HIDDEN).detach()[of_neuron, :, torch.arange(len(of_neuron))]
    return int(((read * wanted.T).sum(1) < 0).sum())


def verified(target: Squares, components: apd.Components, truth: dict[str, Tensor], top_k: float = 1.0) -> Row:
    """Run all inputs with all masks, and bound what gates between 0 and 1 can do.

    Args:
        target: with mechanisms that take turns.
        components: C components, at least as many as there are mechanisms.
        truth: the mechanisms, per path [J, d_in, d_out]; mechanism j belongs to switch or group j.
        top_k: mean number of components that attributions choose on the data.
    """
    network, x = apd.Network(target, list(truth)), everything(target)
    y = target(x).detach()
    variance = (y - y.mean(0)).square().mean()
    owned = apd.metrics.ownership(components, truth)
    needed = torch.zeros(len(x), components.n_components, dtype=torch.bool)
    needed[:, owned.owner] = at_work(target, x)
    own = chosen(network, components, x, target.data(SAMPLES)(0, torch.Generator().manual_seed(20_000)), top_k)
    attack = Corners(network, components, x, needed, apd.losses.mse)
    attacked = attack.ascend(STEPS, SIZE, torch.Generator().manual_seed(0)) / variance
    errors, by_own = (counted(network, components, x, y, gates) for gates in (needed, own))
    every, every_own = (bounds(target, components, x, gates) for gates in (needed, own))
    row: dict[str, Any] = {"inputs": len(x), "masks": errors["masks"]}
    means = {name: errors[name] for name in ("alone", "scrubbed", "worst")}
    means |= {"attack": attacked, "seen": every.seen / variance, "bound": every.bound / variance}
    means["interval"] = every.interval / variance
    means |= {"own_alone": by_own["alone"], "own_worst": by_own["worst"], "own_bound": every_own.bound / variance}
    means |= {"corners": (every.bound <= every.corner).double(), "own_same": (own == needed).all(1).double()}
    row |= {name: v.mean().item() for name, v in means.items()}
    row |= {f"{name}_input": means[name].max().item() for name in ("worst", "bound", "own_bound")}
    return row | {
        "faithfulness": apd.metrics.relative_faithfulness(components, network.weights).item(),
        "cosine": owned.cosine.mean().item(),
        "turned": turned(components, truth, owned.owner),
    }


def case_of(job: Job) -> tuple[Squares, dict[str, Tensor], Row]:
    """Give a target, its mechanisms, and the settings of the decomposition."""
    kind, seed, _ = job
    if kind in GROUPS:
        of_groups = groups.target_of(kind, seed)
        return of_groups, of_groups.mechanisms(groups.by_of(kind)), settings_of(job)
    target = modular.target_of(kind, seed)
    return target, modular.truth_of(kind, target), settings_of(job)


def settings_of(job: Job) -> Row:
    """Give the settings."""
    kind, seed, weights = job
    if kind in GROUPS:
        return groups.settings_of((kind, groups.MECHANISMS[kind], seed))
    return modular.settings_of((kind, modular.MECHANISMS[kind], seed, weights))


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Take one target apart, and verify what was found and its controls."""
    seed = job[1]
    target, truth, settings = case_of(job)
    found = apd.decompose(target, target.data(256), target.weights, judge=Judge(), progress=False, **settings)
    every = found.restarts
    assert every is not None and found.scores is not None
    last = max(range(len(found.scores)), key=found.scores.__getitem__)
    widest = min(truth[HIDDEN].shape[1:])
    parts = {
        "truth": apd.Components.from_matrices(truth, widest),
        "found": found.components,
        "most bits": every.restart(last),
        "dealt": controls.dealt(found.components, seed),
    }
    rows = []
    for name, own in parts.items():
        owned = int(apd.metrics.ownership(own, truth).owned.sum())
        rows.append({"parts": name, "owned": owned, **verified(target, own, truth, settings["top_k"])})
    return rows, {}


def jobs() -> list[Job]:
    """List the targets."""
    every = [(kind, modular.FIRST + i, weights) for i in range(SEEDS) for kind in KINDS for weights in modular.WEIGHTS]
    return every + [(kind, groups.FIRST + i, "gentle") for i in range(SEEDS) for kind in GROUPS]


RUNS = Rows(
    fields=("kind", "seed", "weights"),
    jobs=lambda rows: jobs(),
    run=run,
    settings=lambda job: numbers(settings_of(job)),
)
STUDY = Study("verified", {"runs": RUNS}, compact=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
