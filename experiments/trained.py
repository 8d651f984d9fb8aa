"""Trained networks, whose parts nobody knows, taken apart by the call of chapter 33, and what can be measured then.

There are two ways: "told" is the recipe of experiments/architectures.py with a number of components and a k that were
guessed, "free" has no k (`apd_minimal.bottleneck`). Outputs are distributions, so that errors are divergences, and
attributions are those of the answer's logit alone, as shares (`answer_shares`), one backward pass for each sample.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import apd_minimal as apd
from apd_minimal import bottleneck
from apd_minimal.losses import kl
from apd_minimal.study import controls, leakage, matching
from apd_minimal.study.rate import Judge, costs
from apd_minimal.targets.transformer import answer_shares
from experiments import architectures
from experiments.experiment import Row, scaled
from experiments.modular import like

STEPS, RESTARTS, BATCH = 1000, 2, 256
TOLD: Row = {"components": 20, "active": 2.0}  # how many there are, and are on: a guess
ALLOWED = ((0.0, 0.3), (0.3, 0.3), (0.6, 0.1))
# What is other than in the recipes, by way: nothing is merged where k is told, and where it is not, more error is left.
CHANGES: dict[str, Row] = {
    "told": {"tidy_every": 0.0, "steps": STEPS, "restarts": RESTARTS},
    "free": {"steps": STEPS, "restarts": RESTARTS},
}
WAYS = tuple(CHANGES)
EPSILONS = (0.03, 0.1, 0.3)  # bits
SHOWN = 8


def arguments(way: str, network: apd.Network, x: Tensor, told: Row, seed: int) -> Row:
    """Give the arguments of `decompose`.

    Args:
        way: one of `WAYS`.
        network: the target.
        x: a thousand or more inputs.
        told: "components", and "active", how many of them on a sample, by which k is measured if it is told.
        seed: of the decomposition.
    """
    C = told["components"]
    rule: dict[str, Any] = bottleneck.settings(network, x, C, "kl")
    if way == "told":
        own = architectures.SETTINGS | {"top_k": scaled(architectures.K, told["active"])}
        rule = own | {"faithfulness": rule["faithfulness"]}
    else:
        rule["selection"] = bottleneck.Bottleneck(ALLOWED)
    common = {"n_components": C, "seed": seed, "divergence": "kl", "attribution": answer_shares}
    return rule | common | CHANGES[way] | {"judge": Judge(EPSILONS, divergence="kl", attribution=answer_shares)}


def settings(way: str, told: Row, batch: int, seed: int) -> Row:
    """List what a run's settings are made of, for its stored row."""
    rule = f"{bottleneck.FAITHFULNESS:g} times the divergence with nothing active"
    own = {**architectures.SETTINGS, "k": scaled(architectures.K, told["active"])}
    free = {"rank": 4, "lr": 1e-2, "allowed": ALLOWED}
    both = {"faithfulness": rule, "batch": batch, "components": told["components"], "seed": seed}
    return (own if way == "told" else free) | CHANGES[way] | both


def taken_apart(
    network: apd.Network, batches: Callable[[int, torch.Generator], Tensor], way: str, x: Tensor, told: Row, seed: int
) -> tuple[apd.Decomposition, float]:
    """Take a network apart; gives the result and the CPU seconds."""
    start = time.process_time()
    found = apd.decompose(
        network.target,
        batches,
        list(network.weights),
        output=network.output,
        progress=False,
        **arguments(way, network, x, told, seed),
    )
    return found, round(time.process_time() - start, 1)


def parts_of(components: apd.Components) -> apd.Components:
    """Keep the components that are longer than a hundredth of the longest."""
    norms = components.norms()
    return components.map(Tensor.detach).subset((norms > 0.01 * norms.max()).nonzero().flatten().tolist())


def dealt(parts: apd.Components, on: list[int], seed: int) -> apd.Components:
    """Deal the directions of those that are ever on among themselves (`controls.dealt`); the others stay as they are.

    Args:
        parts: C components.
        on: indices of those that are on for some sample.
        seed: of the deal.
    """
    new = controls.dealt(parts.subset(on), seed, turned=True)
    A, B = ({path: t.clone() for path, t in own.items()} for own in (parts.A, parts.B))
    for path in parts.paths:
        A[path][on], B[path][on] = new.A[path], new.B[path]
    return apd.Components(A, B)


def shares(leaks: leakage.Leakage) -> dict[str, list[float]]:
    """Give every test's score: of the components, of dealt parts, of the target, and by chance."""
    return {name: [s.components, s.dealt, s.target, s.chance] for name, s in leaks.scores.items()}


@torch.no_grad()
def measured(network: apd.Network, found: apd.Decomposition, x: Tensor, seed: int) -> tuple[Row, Tensor, Tensor]:
    """Measure what can be measured without a truth.

    Args:
        network: the target.
        found: its decomposition, with two restarts or more.
        x: held-out inputs.
        seed: of the controls.

    Returns:
        Row: the measures.
        Tensor: attributions [B, C] of the components that are on for some sample, the most used first.
        Tensor: their gates [B, C].
    """
    every, final = found.restarts, found.final_selection
    assert every is not None and every.restarts is not None
    order = sorted(range(every.restarts), key=found.scores.__getitem__)
    outputs = network(x)

    def gated(parts: apd.Components) -> tuple[Tensor, Tensor, Row]:
        scores = answer_shares(network, parts, x)
        gates = final.gates(scores).float()
        result = network(x, parts, gates)
        return scores, gates, {"agreement": same(result), "error": float(kl(result, outputs).mean())}

    def same(result: Tensor) -> float:
        return float((result.argmax(1) == outputs.argmax(1)).float().mean())

    parts = parts_of(found.components)
    scores, gates, row = gated(parts)
    use = gates.mean(0)
    on = use.argsort(descending=True)[: int((use > 0).sum())].tolist()
    control = dealt(parts, on, seed)
    second = parts_of(every.restart(order[1]))
    other = gated(second)[1]
    both = parts.subset(on), second.subset((other.sum(0) > 0).nonzero().flatten().tolist())
    row |= {
        "left": parts.n_components,
        "in_use": len(on),
        "active": float(gates.sum(1).mean()),
        "use": use[on].tolist(),
        "constant": float(outputs.argmax(1).bincount().max() / len(x)),
        "dealt": gated(control)[2],
        "whole": same(network(x, parts)),
        "nothing": float(kl(network(x, parts, torch.zeros_like(gates)), outputs).mean()),
        "sum": float(apd.metrics.relative_faithfulness(parts, network.weights)),
        "sum_in_use": float(apd.metrics.relative_faithfulness(both[0], network.weights)),
        "ranks": {path: r[on].tolist() for path, r in parts.ranks().items()},
        "scores": found.scores,
        "bits": [
            [cost.bits() for cost in costs(network, c, x, EPSILONS, divergence="kl", attribution=answer_shares)]
            for c in (parts, control)
        ],
        "weights": matched(matching.match_weights(*both)),
        "masks": {},
        "leakage": {},
    }
    if all((0 < g.mean(0)).any() and ((0 < g.mean(0)) & (g.mean(0) < 1)).any() for g in (gates, other)):
        row["masks"] = matched(matching.match_use(gates, other))
    if len(on) > 1:
        leaks = leakage.leakage(
            network, parts, x, final, outputs="classes", control=control, attribution=answer_shares, seed=seed
        )
        row["leakage"] = shares(leaks)
    return row, scores[:, on], gates[:, on]


def matched(found: matching.Matching) -> Row:
    """Put a match of two starts in short."""
    return {
        "mean": found.mean,
        "chance": float(found.chance.mean()),
        "largest_chance": float(found.chance.mean(1).max()),
        "pairs": len(found.first),
        "above": int(found.above_chance.sum()),
        "unmatched": found.unmatched,
    }


def by_group(values: Tensor, groups: Tensor, n: int) -> list[list[float]]:
    """Average gates or attributions [B, C] over the samples of each of n groups: [C][n], 0 for a group without any."""
    each = [values[groups == g].mean(0) if (groups == g).any() else values.new_zeros(values.shape[1]) for g in range(n)]
    return [[round(v, 4) for v in line] for line in torch.stack(each, 1).tolist()]


@torch.no_grad()
def without_training(network: apd.Network, seed: int) -> nn.Module:
    """Replace every decomposed weight by a random one of the same singular values, in place."""
    generator = torch.Generator().manual_seed(seed)
    for path, own in {site.path: site.rule for site in network.sites}.items():
        parameter = network.target.get_parameter(path)
        parameter.copy_(own.weight(like(own.matrix(parameter), generator)))
    return network.target
