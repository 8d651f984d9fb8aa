"""Create data/judged.json: bits of stored decompositions beside controls of every kind (chapter 25).

python -m experiments.judged [--only tms-5-2 | residual-25-25 | ...] [--processes N]     (about two hours of a core)

Most of what is judged is stored. Residual MLPs whose seeds are not are trained and taken apart here, by the recipe, and
not kept (from seed 5 on, of three layers from 3 on; they were added later, and fixed before they ran). Beside what was
found stand the true mechanisms where they are known; decompositions that need no training (singular directions,
neurons, the columns of each matrix, one lump); and what was found, spoiled: each component cut into two halves, and
pairs of components put together, at random. All are judged on the same inputs, of a stream that no run has seen, with
the attributions of the run. Errors of residual MLPs are shares of what the layers add to the outputs. The perceptron's
answers are distributions: its errors are in bits, and its curves are stored, so that code and error can be added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.attributions import Attribution
from apd_minimal.study import rate
from experiments import larger, leaks, residual
from experiments.experiment import Row, Rows, Study, Tensors, of
from experiments.judge import held_out, listed, target_of
from experiments.tms import prefix as tms_prefix

SAMPLES, FEW = 2048, 1024
ERRORS = (0.001, 0.003, 0.01, 0.03, 0.05, 0.1, 0.2, 0.3)
BITS = (0.01, 0.03, 0.1, 0.3, 1.0)  # errors of distributions
SEEDS = {
    "tms-5-2": range(10, 20),
    "tms-5-2 rotated": range(10, 20),
    "tms-40-10": range(20, 30),
    "tms-40-10 rotated": range(20, 30),
    "gated": range(10),
    "residual-50": range(10),
    "residual-25-25": range(10),
    "residual-17-17-16": range(10),
    "perceptron": range(4),
}
Job = tuple[str, int]  # target, seed
Block = Mapping[str, tuple[Tensor, Tensor]]  # by weight, for n components: left [n, d_in], right [n, d_out]


@dataclass(frozen=True)
class Judged:
    """What is judged: a network, inputs, components by name, and how; facts about what was found."""

    network: apd.Network
    x: Tensor
    sets: dict[str, apd.Components]
    attribution: Attribution | None = None
    divergence: str = "mse"
    facts: Row = field(default_factory=dict)


def together(weights: Mapping[str, Tensor], blocks: list[Block]) -> apd.Components:
    """Build components of rank one in each weight, block after block; where a block has no weight, they are zero."""
    A, B = {}, {}
    for path, W in weights.items():
        left, right = [], []
        for block in blocks:
            n = len(next(iter(block.values()))[0])
            one, other = block.get(path, (W.new_zeros(n, W.shape[0]), W.new_zeros(n, W.shape[1])))
            left.append(one)
            right.append(other)
        A[path], B[path] = torch.cat(left)[:, :, None].contiguous(), torch.cat(right)[:, None, :].contiguous()
    return apd.Components(A, B)


def singular(weights: Mapping[str, Tensor]) -> apd.Components:
    """Give each singular direction of each weight a component."""
    blocks: list[Block] = []
    for path, W in weights.items():
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        blocks.append({path: (U.T * S[:, None], Vh)})
    return together(weights, blocks)


def lump(weights: Mapping[str, Tensor]) -> apd.Components:
    """Put all weights in one component."""
    return apd.Components.from_matrices(
        {path: W[None] for path, W in weights.items()}, max(map(_least, weights.values()))
    )


def _least(W: Tensor) -> int:
    return min(W.shape)


def neurons(weights: Mapping[str, Tensor]) -> apd.Components:
    """Give each neuron a component: what it reads, and where there is a matrix that writes, what it writes."""
    blocks: list[Block] = []
    for path, W in weights.items():
        own = torch.eye(W.shape[1])
        if path.startswith("read"):
            write = weights[path.replace("read", "write")]
            blocks.append({path: (W.T, own), path.replace("read", "write"): (own, write)})
        elif not path.startswith("write"):
            blocks.append({path: (W.T, own)})
    return together(weights, blocks)


def columns(weights: Mapping[str, Tensor], embedding: Tensor | None = None) -> apd.Components:
    """Give each input of each matrix a component: of one that reads a stream, each feature in it, and the rest.

    Args:
        weights: matrices [d_in, d_out].
        embedding: of the features in the stream [n_features, d_in].
    """
    blocks: list[Block] = []
    for path, W in weights.items():
        basis, rows = torch.eye(len(W)), W
        if embedding is not None and path.startswith("read"):
            basis, rows = torch.linalg.pinv(embedding).T, embedding @ W  # sum: the projection on the features
            U, S, Vh = torch.linalg.svd(W - basis.T @ rows, full_matrices=False)
            blocks.append({path: (U.T * S[:, None], Vh)})
        blocks.append({path: (basis, rows)})
    return together(weights, blocks)


def halved(components: apd.Components) -> apd.Components:
    """Cut each component into two halves of the same matrices."""
    A, B = components.A, components.B
    return apd.Components({p: torch.cat([A[p], A[p]]) for p in A}, {p: torch.cat([B[p], B[p]]) / 2 for p in B})


def paired(components: apd.Components, seed: int) -> apd.Components:
    """Put the components that are not zero together, two and two at random; an odd one stays alone."""
    alive = (components.norms() > 0).nonzero().flatten()
    order = alive[torch.randperm(len(alive), generator=torch.Generator().manual_seed(seed))].tolist()
    if len(order) % 2:
        order.append(order[-1])
    one, other = components.subset(order[::2]), components.subset(order[1::2])
    if len(alive) % 2:
        other = other.map(lambda t: torch.cat([t[:-1], 0 * t[-1:]]))
    A = {p: torch.cat([one.A[p], other.A[p]], dim=2) for p in one.A}
    return apd.Components(A, {p: torch.cat([one.B[p], other.B[p]], dim=1) for p in one.B})


def judged(job: Job) -> Judged:
    """Load what is judged."""
    kind, seed = job
    attribution: Attribution | None
    facts: Row = {}
    if kind.startswith("tms"):
        name, *rotated = kind.split()
        target = target_of(kind, seed)
        found, _ = of("tms", tms_prefix((name, False, bool(rotated), "ours", seed)))
        network, x, attribution, divergence = (
            apd.Network(target, target.weights),
            held_out(target, seed),
            target.attributions,
            "mse",
        )
        truth, embedding = apd.Components.from_matrices(target.mechanisms()), None
    elif kind == "gated":
        case = leaks.functions("ours", seed)
        network, found, truth = apd.Network(case.target, case.target.weights), case.sets["found"], case.sets["truth"]
        x, attribution, divergence, embedding = case.x[:SAMPLES], case.settings["attribution"], "mse", None
    elif kind.startswith("residual"):
        name = kind.removeprefix("residual-")
        if seed in residual.SEEDS[name]:
            mlp, found = residual.stored_target(name, seed)
        else:
            mlp, full, facts = residual.made(name, seed)
            found = residual.rounded(full)
            facts |= {"owned": int(mlp.ownership(found).owned.sum())}
        case = leaks.layers_of(name, seed, mlp, found)
        network, found, truth = apd.Network(case.target, case.target.weights), case.sets["found"], None
        x, attribution, divergence = case.x[:FEW], case.settings["attribution"], "mse"
        embedding = case.target.embedding
    else:
        case = leaks.KINDS[kind][1](seed)
        found, truth, embedding = case.sets["found"], None, None
        network = case.target if isinstance(case.target, apd.Network) else apd.Network(case.target, found.paths)
        x, attribution, divergence = case.x[:FEW], case.settings.get("attribution"), "kl"
    weights = network.weights
    sets = {"found": found} | ({} if truth is None else {"truth": truth})
    sets |= {"singular directions": singular(weights), "neurons": neurons(weights)}
    sets |= {
        "columns": columns(weights, embedding),
        "one lump": lump(weights),
        "halves": halved(found),
        "pairs": paired(found, seed),
    }
    return Judged(network, x, sets, attribution, divergence, facts)


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Judge everything on one target."""
    case, rows = judged(job), []
    how: dict[str, Any] = {"divergence": case.divergence, "attribution": case.attribution}
    errors = ERRORS if case.divergence == "mse" else BITS
    for name, components in case.sets.items():
        facts = case.facts if name == "found" else {}
        costs = listed(rate.costs(case.network, components, case.x, errors, **how), errors)
        row: Row = {"name": name, **facts, "costs": costs}
        if case.divergence == "kl":
            row["curve"] = [asdict(c) for c in rate.curve(case.network, components, case.x, points=24, **how)]
            gates = torch.zeros(len(case.x), components.n_components)
            with torch.no_grad():
                nothing = apd.losses.kl(case.network(case.x, components, gates), case.network(case.x))
            row["nothing"] = float(nothing.mean()) / float(torch.log(torch.tensor(2.0)))
        rows.append(row)
    return [larger.short(row) for row in rows], {}


RUNS = Rows(
    ("target", "seed"),
    lambda rows: [(kind, seed) for kind, seeds in SEEDS.items() for seed in seeds],
    run,
    order=lambda job: (list(SEEDS).index(job[0]), job[1]),
)
STUDY = Study("judged", {"runs": RUNS}, compact=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
