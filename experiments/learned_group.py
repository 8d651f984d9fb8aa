"""Create data/learned_group.json: networks that learned S4 from a part of its pairs, taken apart (chapter 37).

python -m experiments.learned_group [--only cuts learned ...] [--processes N]      (about half an hour of one core)

The networks are those of experiments/irreps.py ("learned"), of S4, and their untrained beginnings. APD sees the pairs
that the network was trained on, so that the others are held out from both. The settings are `groups.ANSWERS` with two
starts: one component is on for each pair, of four (as many as irreps) or of eight. Three of eight leave room for a
token in each place, and for what is written; that was tried on seed 90 ("log", written by hand). The same is measured
of dealt and of turned parts, and in "cuts" of one lump, of neurons by the irrep they have most of, of neurons, and of
tokens. Those that learned A4 and S5 were taken apart last, into as many components as irreps, with nothing settled; the
neurons of those of S5 were looked at as well, and of their cuts the lump and that by irreps. "lots" are the control of
the latter: groups of neurons as large, drawn.

"whole" looks at neurons, and certifies. "orbits" asks whether what a neuron reads or writes is a' rho(g) b, an irrep
between two vectors, and whether the vectors rho(g) b (or a' rho(g)) are fewer than elements; random functions in the
same irreps, of that form or not, stand beside it. "proofs" bounds the wrong pairs of the network and of every part.
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
SEEDS = [seed for name, seed in irreps.LEARNED.jobs([]) if name == "S4"]
KINDS = [("learned", 1, 4), ("learned", 1, 8), ("learned", 3, 8), ("untrained", 1, 4), ("untrained", 3, 8)]
KINDS += [("learned, A4", 1, 2), ("untrained, A4", 1, 2), ("learned, S5", 1, 6), ("untrained, S5", 1, 6)]
COARSE = ("lump", "neurons by irrep")  # of few parts
JUDGE = Judge((0.03, 0.1, 0.3), divergence="kl")


def network_of(kind: str, seed: int) -> tuple[GroupOperations, groups.OneLayer]:
    """Give the task, and the network as it was looked at: at the end, or untrained."""
    name = kind.partition(", ")[2] or "S4"
    task, last = GroupOperations([name], embedding=False, seed=seed), 0 if "untrained" in kind else irreps.STEPS[name]
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
    said = net(x).argmax(1) if "untrained" in kind else task.answers()
    beside = {path: torch.cat(list(components.matrices(path)), 1 - i) for i, path in enumerate(PATHS)}  # side by side
    row: Row = {
        "shares": irreps.looked_at(task, beside),
        "apart": irreps.apart(irreps.energies(task, components), [0] * len(task.groups[0].irreps))["irreps"],
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
    batches = Pairs(task.inputs()[irreps.split(len(task.inputs()), seed)[0]], 256)
    found = apd.decompose(net, batches, PATHS, judge=JUDGE, divergence="kl", progress=False, **settings_of(job))
    seconds, parts = round(time.process_time() - start, 1), found.components
    tried = {"found": parts, "dealt": controls.dealt(parts, seed), "turned": controls.dealt(parts, seed, turned=True)}
    return [{k: measured(job, task, net, v) for k, v in tried.items()} | {"seconds": seconds}], {}


def run_cuts(job: tuple[str, int]) -> tuple[list[Row], Tensors]:
    """Measure a network cut in ways that train nothing."""
    kind, seed = job
    task, net = network_of(kind, seed)
    tried = cuts(task, apd.Network(net, list(PATHS)).weights)
    names = COARSE if "S5" in kind else tuple(tried)  # its 128 neurons and 241 tokens take too long
    return [{name: measured((kind, tried[name][1], 0, seed), task, net, tried[name][0]) for name in names}], {}


def by_lot(job: tuple[str, int]) -> tuple[list[Row], Tensors]:
    """Measure groups of neurons as large as those by irrep, with neurons that are drawn: what any such cut has."""
    kind, seed = job
    task, net = network_of(kind, seed)
    weights = apd.Network(net, list(PATHS)).weights
    whose = cuts(task, weights)["neurons by irrep"][0].matrices(OUT).norm(dim=2).argmax(0)
    own = one_hot(whose, len(task.groups[0].irreps)).T.float()  # [irreps, neurons]
    lot = own[:, torch.randperm(own.shape[1], generator=torch.Generator().manual_seed(seed))]
    W, V = (weights[path].detach() for path in PATHS)
    parts = apd.Components.from_matrices({HIDDEN: W * lot[:, None], OUT: V * lot[:, :, None]})
    return [{"neurons by lot": measured((kind, 1, 0, seed), task, net, parts)}], {}


def values(functions: Tensor, width: float = 0.2) -> Tensor:
    """Count the values of each function [n, m]: the fewest intervals of `width` standard deviations with all: [m]."""
    found = []
    for column in (functions / functions.std(0, unbiased=False).clamp_min(1e-12)).sort(0).values.T.tolist():
        count, end = 0, -float("inf")
        for value in column:
            if value > end:
                count, end = count + 1, value + width
        found.append(count)
    return torch.tensor(found)


def orbits(group: Group, functions: Tensor, least: float = 0.95) -> Tensor:
    """Give the fewest cosets on which each function [n, m] is nearly constant, of a subgroup on either side: [m].

    Nearly: a share `least` of its squared length without the mean is. Where no subgroup does it, it is n.
    """
    smallest = torch.full((functions.shape[1],), group.order)
    for own in irreps.subgroups(group):
        within = [irreps.constant_on(group, own, left) for left in (True, False)]
        near = irreps.shares(functions, within) >= least
        smallest[near] = smallest[near].clamp_max(group.order // len(own))
    return smallest


def one_rank(group: Group, functions: Tensor) -> Tensor:
    """Give the share of each function [n, m] in its main irrep that one pair of vectors makes, a' rho(g) b: [m]."""
    main, share = irreps.lengths_inside(group, functions).argmax(0), torch.ones(functions.shape[1]).double()
    for i, rho in enumerate(group.irreps):
        M = torch.einsum("gm,gij->mij", functions[:, main == i].double(), rho)
        share[main == i] = torch.linalg.svdvals(M).square().T[0] / M.square().sum((1, 2))
    return share


def of_one_rank(group: Group, functions: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a' rho(g) b with random vectors for each of functions [n, m], in the irrep that has most of it, as long."""
    inside, like = irreps.lengths_inside(group, functions), torch.zeros_like(functions, dtype=torch.double)
    for i, rho in enumerate(group.irreps):
        own = inside.argmax(0) == i
        a, b = torch.randn(2, int(own.sum()), rho.shape[1], generator=generator, dtype=torch.double)
        random = torch.einsum("mi,gij,mj->gm", a, rho, b)
        like[:, own] = random / random.norm(dim=0) * inside[i, own].sqrt()
    return like


def looked_at(group: Group, functions: Tensor) -> Row:
    """Average over functions [n, m] by their squared length without the mean, and say how much has which orbit."""
    size = (functions.double() - functions.double().mean(0)).square().sum(0)
    size, orbit = size / size.sum(), orbits(group, functions)
    row: Row = {
        "rank": float((one_rank(group, functions) * size).sum()),
        "coset": irreps.mean_share(functions, irreps.spaces(group)["coset"]),
        "values": float((values(functions) * size).sum()),
    }
    indices = sorted({group.order // len(own) for own in irreps.subgroups(group)})
    return row | {str(k): float(size[orbit == k].sum()) for k in indices}


def read_and_written(task: GroupOperations, weights: dict[str, Tensor], seed: int) -> Row:
    """Look at what neurons read in either place and write, and at random functions beside; means over the three."""
    group, generator = task.groups[0], torch.Generator().manual_seed(seed)
    rows: dict[str, list[Row]] = {"neurons": [], "same irrep": [], "two vectors": []}
    for _, _, functions in irreps.functions_of(task, weights):
        rows["neurons"].append(looked_at(group, functions))
        rows["same irrep"].append(looked_at(group, irreps.redraw(group, functions, generator)))
        rows["two vectors"].append(looked_at(group, of_one_rank(group, functions, generator)))
    return {name: {k: round(sum(r[k] for r in own) / len(own), 4) for k in own[0]} for name, own in rows.items()}


def certified(task: GroupOperations, components: apd.Components) -> list[Row]:
    """Certify every part alone: beside the share that is proved the bound on wrong pairs as it comes, and the truth."""
    rows = []
    for c in range(components.n_components):
        row, right = groups.certified(task, {path: components.matrices(path).detach()[c] for path in PATHS}, 0)
        bound = 2 * row["residual"] / row["margin"] ** 2 if row["margin"] > 0 else None
        rows.append({**row, "bound": bound, "right": round(float(right.double().mean()), 4)})
    return rows


def run_whole(job: tuple[str, int]) -> tuple[list[Row], Tensors]:
    """Look at the neurons of one network, and certify it, whole and in parts."""
    kind, seed = job
    task, net = network_of(kind, seed)
    weights = apd.Network(net, list(PATHS)).weights
    made = cuts(task, weights)
    tried = {name: made[name][0] for name in COARSE}
    if kind == "learned":
        batches = Pairs(task.inputs()[irreps.split(576, seed)[0]], 256)
        settings = settings_of((kind, 1, 4, seed))
        found = apd.decompose(net, batches, PATHS, judge=JUDGE, divergence="kl", progress=False, **settings).components
        tried |= {"found": found, "dealt": controls.dealt(found, seed)}
    proofs = {name: certified(task, parts) for name, parts in tried.items()}
    return [{"orbits": read_and_written(task, weights, seed), "proofs": proofs}], {}


RUNS = Rows(
    fields=("kind", "on", "n_components", "seed"),
    jobs=lambda rows: [(*kind, seed) for seed in SEEDS for kind in KINDS],
    run=run,
    settings=lambda job: numbers(settings_of(job)),
)
BOTH = [(kind, seed) for seed in SEEDS for kind in ("learned", "untrained")]
OF_S5 = [(f"{kind}, S5", seed) for kind, seed in BOTH]
CUTS = Rows(("kind", "seed"), lambda rows: BOTH + [job for job in OF_S5 if "untrained" not in job[0]], run_cuts)
WHOLE = Rows(("kind", "seed"), lambda rows: BOTH + OF_S5, run_whole)
LOTS = Rows(
    fields=("kind", "seed"),
    jobs=lambda rows: [job for job in CUTS.jobs([]) if job[0].startswith("learned")],
    run=by_lot,
)
STUDY = Study(
    "learned_group",
    {"runs": RUNS, "cuts": CUTS, "whole": WHOLE, "lots": LOTS},
    about=lambda processes: {"processes": processes},
    compact=True,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
