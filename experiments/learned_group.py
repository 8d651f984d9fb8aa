"""Create data/learned_group.json: networks that learned S4 from a part of its pairs, taken apart (chapter 37).

python -m experiments.learned_group [--only cuts learned ...] [--processes N]      (about eight minutes of one core)

The networks are those of experiments/irreps.py ("learned"), and their untrained beginnings. APD sees the pairs that the
network was trained on, so that the others are held out from both. The settings are `groups.ANSWERS` with two starts:
one component is on for each pair, of four (as many as irreps) or of eight. Three of eight leave room for a token in
each place, and for what is written; that was tried on seed 90 ("log", written by hand). The same is measured of dealt
and of turned parts, and in "cuts" of one lump, of neurons by the irrep they have most of, of neurons, and of tokens.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torch.nn.functional import one_hot

import apd_minimal as apd
from apd_minimal.selection import sample_top_k
from apd_minimal.study import controls
from apd_minimal.study.rate import Judge
from apd_minimal.targets import Group, GroupOperations, Pairs
from experiments import groups, irreps
from experiments.experiment import Row, Rows, Study, Tensors, numbers
from experiments.groups import HIDDEN, OUT, PATHS

Job = tuple[str, int, int, int]  # trained or not, components that are on for a pair, number of components, seed
SEEDS = [seed for _, seed in irreps.LEARNED.jobs([])]
KINDS = [("learned", 1, 4), ("learned", 1, 8), ("learned", 3, 8), ("untrained", 1, 4), ("untrained", 3, 8)]
JUDGE = Judge((0.03, 0.1, 0.3), divergence="kl")


def network_of(kind: str, seed: int) -> tuple[GroupOperations, groups.OneLayer]:
    """Give the task, and the network as it was looked at: at the end, or untrained."""
    task, last = GroupOperations(["S4"], embedding=False, seed=seed), 0 if kind == "untrained" else 3000
    return task, next(net for step, net in irreps.learned(task, task.answers(), seed, last) if step == last)


def settings_of(job: Job) -> Row:
    """Give the settings: those for networks that learned answers, with two starts."""
    return groups.settings_of(("answers", *job[2:])) | {"top_k": float(job[1]), "restarts": 2}


def cuts(task: GroupOperations, weights: dict[str, Tensor]) -> dict[str, tuple[apd.Components, int]]:
    """Cut a network that nobody took apart: the parts, and how many of them are needed for a pair."""
    (W, V), (group,) = (weights[path].detach() for path in PATHS), task.groups
    functions = torch.stack([f for _, _, f in irreps.functions_of(task, weights)]).double()  # [3, n, neurons]
    inside = [(group.span([i]).T @ functions).square().sum((0, 1)) for i in range(len(group.irreps))]
    own = {
        "lump": torch.ones(1, len(V)),
        "neurons by irrep": one_hot(torch.stack(inside).argmax(0), len(inside)).T.float(),
        "neurons": torch.eye(len(V)),
    }
    parts = {name: ({HIDDEN: W * mine[:, None], OUT: V * mine[:, :, None]}, 1) for name, mine in own.items()}
    row = torch.eye(len(W) + 1)  # one part for each token in each place, and the last one writes
    parts["tokens"] = {HIDDEN: row[:, :-1, None] * W, OUT: row[:, -1, None, None] * V}, 3
    ranks = {"neurons": 1, "tokens": group.order}
    return {k: (apd.Components.from_matrices(m, ranks.get(k)), on) for k, (m, on) in parts.items()}


def told(group: Group, on: Tensor) -> Row:
    """Say by what it is told which parts are on, given as zeros and ones for all pairs in their order [n^2, C].

    Returns:
        Row: shares of the variance that the first element, the second and their product explain, and how much of what
            they explain is constant on the cosets of one subgroup.
    """
    first, second = torch.cartesian_prod(*[torch.arange(group.order)] * 2).T
    row, whole = {}, on.var(0, unbiased=False).sum().clamp_min(1e-12)
    for name, element in (("first", first), ("second", second), ("answer", group.table.flatten())):
        means = torch.stack([on[element == g].mean(0) for g in range(group.order)])  # [n, C]
        row[name] = round(float(means.var(0, unbiased=False).sum() / whole), 4)
        row[f"{name}, coset"] = round(irreps.mean_share(means, irreps.spaces(group)["coset"]), 4)
    return row


def in_one(task: GroupOperations, components: apd.Components) -> Row:
    """Say how much of each element lies in one part: of what is read of it in either place, and of what writes it."""
    each = [{path: components.matrices(path)[c] for path in PATHS} for c in range(components.n_components)]
    rows = [{name: f.square().sum(1) for _, name, f in irreps.functions_of(task, parts)} for parts in each]
    size = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}  # [C, n]
    return {name: round(float(own.amax(0).sum() / own.sum()), 4) for name, own in size.items()}


@torch.no_grad()
def causal(network: apd.Network, components: apd.Components, on: Tensor, x: Tensor, said: Tensor) -> Row:
    """Score parts on pairs: how often the answer is what was `said`, and the divergence from the network in nats.

    Returns:
        Row: "on", of all parts that are on for a pair; "alone", of each of these, and of the others; "without", of the
            network without each of these, and without the others; "best", of the part that is best alone on all pairs.
    """
    y, one = network.target(x), torch.eye(components.n_components)

    def score(gates: Tensor, rest: bool = False) -> Tensor:
        out = network(x, components, gates.expand(len(x), -1), remainder=rest)
        return torch.stack([(out.argmax(1) == said).float(), apd.losses.kl(out, y)])  # [2, B]

    alone = torch.stack([score(gates) for gates in one], 2)  # [2, B, C]
    without = torch.stack([score(1 - gates, True) for gates in one], 2)
    row = {"on": score(on).mean(1), "best": alone.mean(1)[:, alone[0].mean(0).argmax()]}
    for which, own in (("", on), (", others", 1 - on)):
        for name, scores in (("alone", alone), ("without", without)):
            row[name + which] = (scores * own).sum((1, 2)) / own.sum().clamp_min(1)
    return {name: [round(float(v), 4) for v in values] for name, values in row.items()}


def measured(job: Job, task: GroupOperations, net: groups.OneLayer, components: apd.Components) -> Row:
    """Measure components of a network: what they are made of, when they are on, and what they do."""
    kind, on, _, seed = job
    network, x = apd.Network(net, list(PATHS)), task.inputs()
    gates = sample_top_k(apd.attributions.gradient(network, components, x)[None], on)[0]  # [B, C]
    said = net(x).argmax(1) if kind == "untrained" else task.answers()
    beside = {path: torch.cat(list(components.matrices(path)), 1 - i) for i, path in enumerate(PATHS)}  # side by side
    row: Row = {
        "shares": irreps.looked_at(task, beside),
        "apart": irreps.apart(irreps.energies(task, components), [0] * 4)["irreps"],
        "told": told(task.groups[0], gates),
        "in_one": in_one(task, components),
    }
    for name, own in zip(("shown", "held"), irreps.split(len(x), seed), strict=True):
        row[name] = causal(network, components, gates[own], x[own], said[own])
        row[name]["bits"] = round(JUDGE(network, components, x[own]), 2)
    return row


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Take one network apart; measure what was found, and the same dealt anew and turned."""
    kind, _, _, seed = job
    (task, net), start = network_of(kind, seed), time.process_time()
    batches = Pairs(task.inputs()[irreps.split(576, seed)[0]], 256)
    found = apd.decompose(net, batches, PATHS, judge=JUDGE, divergence="kl", progress=False, **settings_of(job))
    seconds, parts = round(time.process_time() - start, 1), found.components
    tried = {"found": parts, "dealt": controls.dealt(parts, seed), "turned": controls.dealt(parts, seed, turned=True)}
    return [{k: measured(job, task, net, v) for k, v in tried.items()} | {"seconds": seconds}], {}


def run_cuts(job: tuple[str, int]) -> tuple[list[Row], Tensors]:
    """Measure a network cut in ways that train nothing."""
    kind, seed = job
    task, net = network_of(kind, seed)
    tried = cuts(task, apd.Network(net, list(PATHS)).weights).items()
    return [{name: measured((kind, on, 0, seed), task, net, parts) for name, (parts, on) in tried}], {}


RUNS = Rows(
    fields=("kind", "on", "n_components", "seed"),
    jobs=lambda rows: [(*kind, seed) for seed in SEEDS for kind in KINDS],
    run=run,
    settings=lambda job: numbers(settings_of(job)),
)
CUTS = Rows(("kind", "seed"), lambda rows: [(k, seed) for seed in SEEDS for k in ("learned", "untrained")], run_cuts)
STUDY = Study("learned_group", {"runs": RUNS, "cuts": CUTS}, about=lambda n: {"processes": n}, compact=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
