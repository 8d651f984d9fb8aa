"""Create data/irreps.json: what trained networks of groups and their parts are made of, irreps or cosets (chapter 37).

python -m experiments.irreps [--processes N]      (about a quarter of an hour of one core)

The networks are the five of experiments/groups.py that learned three groups, and their untrained beginnings. What a
neuron reads of one of two elements, or writes to the answers, is a function of the group. "irrep" is the share of its
squared length that lies in one irreducible representation, the largest; "coset" the share that is constant on the
cosets of one subgroup, of the best one, on the left or on the right. Both without the mean, and averaged over neurons
by their squared length. The same of the parts that a decomposition finds, with three components (the settings and seeds
of experiments/groups.py) and with as many as there are irreps; "chance" is of random functions. "energies" say how much
of every part lies in which irrep of which group. "redrawn" is the coset share of random functions, each in the irrep
of a trained neuron. "learned": five networks that see seven tenths of the pairs of S4, and five each of A4 and of S5,
looked at while they learn; the other pairs are held out (settings tried on seed 90, once for each group; of A4
0.37 of the held-out pairs were right, and after 20,000 steps, tried once, 0.47).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import apd_minimal as apd
from apd_minimal.study import controls
from apd_minimal.study.rate import Judge
from apd_minimal.targets import Group, GroupOperations, Pairs
from experiments import groups
from experiments.experiment import Row, Rows, Study, Tensors, numbers
from experiments.groups import HIDDEN, OUT, PATHS

Job = tuple[str, int, int]  # trained or untrained, number of components (0 for the neurons alone), seed
STEPS = {"S4": 3000, "A4": 3000, "S5": 1500}  # in which a network learns a group
IRREPS = 8  # of the three groups together, without the trivial ones


def jobs() -> list[Job]:
    """List the runs."""
    seeds = range(groups.FIRST, groups.FIRST + 5)
    return [(kind, n, seed) for kind, n in (("trained", 3), ("trained", IRREPS), ("untrained", 0)) for seed in seeds]


def subgroups(group: Group) -> list[list[int]]:
    """List the proper subgroups of a small group, without the trivial one: what one or two elements generate."""
    found, table = set(), group.table.tolist()
    for pair in itertools.combinations_with_replacement(range(1, group.order), 2):
        own, new = {0}, [0]
        while new:
            new = list({table[g][h] for g in new for h in pair} - own)
            own.update(new)
        if len(own) < group.order:
            found.add(tuple(sorted(own)))
    return [list(own) for own in sorted(found)]


def constant_on(group: Group, own: list[int], left: bool) -> Tensor:
    """Give orthonormal functions [n, m] that span what is constant on the cosets of a subgroup, without the mean."""
    cosets = {frozenset((group.table[g, own] if left else group.table[own, g]).tolist()) for g in range(group.order)}
    rows = torch.zeros(len(cosets), group.order, dtype=torch.double)
    for row, coset in zip(rows, cosets, strict=True):
        row[list(coset)] = 1
    U, S, _ = torch.linalg.svd((rows - rows.mean(1, keepdim=True)).T, full_matrices=False)
    return U[:, S > 1e-6]


@cache
def spaces(group: Group) -> dict[str, list[Tensor]]:
    """Give the spaces of functions in which a function is looked for, by kind."""
    cosets = [constant_on(group, own, left) for own in subgroups(group) for left in (True, False)]
    return {"irrep": [group.span([i]) for i in range(len(group.irreps))], "coset": cosets}


def shares(functions: Tensor, within: list[Tensor]) -> Tensor:
    """Give the share of each function [n, m], without its mean, in the best of some spaces: [m]."""
    functions = functions.double() - functions.double().mean(0)
    inside = torch.stack([(Q.T @ functions).square().sum(0) for Q in within])
    return inside.amax(0) / functions.square().sum(0).clamp_min(1e-30)


def mean_share(functions: Tensor, within: list[Tensor]) -> float:
    """Average over functions [n, m] by their squared length."""
    size = (functions.double() - functions.double().mean(0)).square().sum(0)
    return float((shares(functions, within) * size).sum() / size.sum().clamp_min(1e-30))


def functions_of(task: GroupOperations, parts: dict[str, Tensor]) -> Iterator[tuple[int, str, Tensor]]:
    """Yield, for each group, what neurons read of either element and write to the answers, [n, neurons] each."""
    for t, tokens in enumerate(task.tokens):
        W, V = parts[HIDDEN].detach(), parts[OUT].detach()
        yield t, "first", W[: task.n_tokens][tokens]
        yield t, "second", W[task.n_tokens :][tokens]
        yield t, "written", V[:, tokens].T


def looked_at(task: GroupOperations, parts: dict[str, Tensor]) -> Row:
    """Average both shares over groups and over what is read and written."""
    within = [spaces(group) for group in task.groups]
    found: dict[str, list[float]] = {"irrep": [], "coset": []}
    for t, _, functions in functions_of(task, parts):
        for kind, values in found.items():
            values.append(mean_share(functions, within[t][kind]))
    return {kind: round(sum(values) / len(values), 4) for kind, values in found.items()}


def energies(task: GroupOperations, components: apd.Components) -> Tensor:
    """Measure the squared length of every component in each irrep of each group, read and written: [C, irreps]."""
    rows = []
    for c in range(components.n_components):
        parts = {path: components.matrices(path).detach()[c] for path in PATHS}
        total = torch.zeros(len(task.groups), max(len(g.irreps) for g in task.groups), dtype=torch.double)
        for t, _, functions in functions_of(task, parts):
            for i in range(len(task.groups[t].irreps)):
                total[t, i] += (task.groups[t].span([i]).T @ functions.double()).square().sum()
        rows.append(torch.cat([row[: len(g.irreps)] for row, g in zip(total, task.groups, strict=True)]))
    return torch.stack(rows)


def apart(energy: Tensor, groups_of: list[int]) -> Row:
    """Say how far components are irreps, or groups: the share of their squared length where each is put best."""
    whole = energy.sum()
    own = torch.nn.functional.one_hot(torch.tensor(groups_of)).double()  # [irreps, groups]
    found = {}
    for name, table in (("irreps", energy), ("groups", energy @ own)):
        rows, columns = linear_sum_assignment(table.numpy(), maximize=True)
        found[name] = round(float(table[rows, columns].sum() / whole), 4)
    return found


def chance(task: GroupOperations, draws: int = 4000) -> Row:
    """Average both shares over random functions of each group, and over groups."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[float]] = {"irrep": [], "coset": []}
    for group in task.groups:
        random = torch.randn(group.order, draws, generator=generator, dtype=torch.double)
        for kind, within in spaces(group).items():
            found[kind].append(float(shares(random, within).mean()))
    return {kind: round(sum(values) / len(values), 4) for kind, values in found.items()}


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Look at one network, and at its parts."""
    kind, n_components, seed = job
    task, net = groups.task_of(kind, seed), groups.network_of(kind, seed)
    network, x = apd.Network(net, list(PATHS)), task.inputs()
    row: Row = {"neurons": looked_at(task, network.weights), "chance": chance(task)}
    if not n_components:
        return [row], {}
    settings = groups.settings_of((kind, n_components, seed))
    found = apd.decompose(net, Pairs(x, 256), PATHS, judge=Judge(), progress=False, **settings).components
    groups_of = [t for t, group in enumerate(task.groups) for _ in group.irreps]
    for name, components in (("found", found), ("dealt", controls.dealt(found, seed))):
        energy = energies(task, components)
        every = [
            looked_at(task, {path: components.matrices(path)[c] for path in PATHS})
            for c in range(n_components)
            if energy[c].sum() > 0
        ]
        size = energy.sum(1)[energy.sum(1) > 0]
        row[name] = {
            "shares": {k: round(float((torch.tensor([e[k] for e in every]) * size).sum() / size.sum()), 4)
                       for k in ("irrep", "coset")},
            "apart": apart(energy, groups_of),
            "energies": [[round(v, 4) for v in line] for line in (energy / energy.sum()).tolist()],
        }  # fmt: skip
    return [row], {}


def lengths_inside(group: Group, functions: Tensor) -> Tensor:
    """Give the squared length of each function [n, m] in each irrep: [irreps, m]."""
    return torch.stack([(Q.T @ functions.double()).square().sum(0) for Q in spaces(group)["irrep"]])


def redraw(group: Group, functions: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a random function for each of functions [n, m], in the irrep that has most of it, and as long there."""
    inside, like = lengths_inside(group, functions), torch.zeros_like(functions, dtype=torch.double)
    for i, Q in enumerate(spaces(group)["irrep"]):
        own = inside.argmax(0) == i
        random = Q @ torch.randn(Q.shape[1], int(own.sum()), generator=generator, dtype=torch.double)
        like[:, own] = random / random.norm(dim=0) * inside[i, own].sqrt()
    return like


def redrawn_share(task: GroupOperations, weights: dict[str, Tensor], seed: int) -> float:
    """Give the coset share of random functions, each in the irrep of a neuron and as long."""
    generator, found = torch.Generator().manual_seed(seed), []
    for t, _, functions in functions_of(task, weights):
        found.append(mean_share(redraw(task.groups[t], functions, generator), spaces(task.groups[t])["coset"]))
    return round(sum(found) / len(found), 4)


def redrawn() -> list[float]:
    """Give `redrawn_share` for each network of "runs"."""
    means = []
    for seed in range(groups.FIRST, groups.FIRST + 5):
        weights = apd.Network(groups.network_of("trained", seed), list(PATHS)).weights
        means.append(redrawn_share(groups.task_of("trained", seed), weights, seed))
    return means


def split(n_pairs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw the pairs to train on, and those that are held out: seven tenths and three."""
    order = torch.randperm(n_pairs, generator=torch.Generator().manual_seed(seed))
    held = round(0.3 * n_pairs)
    return order[held:], order[:held]


def learned(task: GroupOperations, answers: Tensor, seed: int, steps: int) -> Iterator[tuple[int, groups.OneLayer]]:
    """Train a network of squaring neurons on a part of the pairs of one group: yields it before every step."""
    x, shown = task.inputs(), split(len(answers), seed)[0]
    net = groups.OneLayer(x.shape[1], task.n_tokens, True, seed, 128)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=1.0, betas=(0.9, 0.98))
    for step in range(steps + 1):
        yield step, net
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(net(x[shown]), answers[shown]).backward()
        optimiser.step()


def run_learned(job: tuple[str, int]) -> tuple[list[Row], Tensors]:
    """Look at such a network on the way."""
    name, seed = job
    task = GroupOperations([name], embedding=False, seed=seed)
    x, answers, (shown, held) = task.inputs(), task.answers(), split(len(task.inputs()), seed)
    looks: list[Row] = []
    for step, net in learned(task, answers, seed, STEPS[name]):
        if step % 500 == 0:
            right = (net(x).argmax(1) == answers).double()
            weights = apd.Network(net, list(PATHS)).weights
            row = {"step": step, "shown": float(right[shown].mean()), "held": float(right[held].mean())}
            looks.append(row | looked_at(task, weights) | {"redrawn": redrawn_share(task, weights, seed)})
    energy = energies(task, apd.Components.from_matrices({p: w[None] for p, w in weights.items()}, 2 * task.n_tokens))
    of_irreps = [round(v, 4) for v in (energy[0] / energy.sum()).tolist()]
    return [{"looks": looks, "chance": chance(task), "energies": of_irreps}], {}


RUNS = Rows(
    fields=("kind", "n_components", "seed"),
    jobs=lambda rows: jobs(),
    run=run,
    settings=lambda job: numbers(groups.settings_of(job)) if job[1] else {},
)
LEARNED = Rows(
    fields=("group", "seed"),
    jobs=lambda rows: [(name, groups.FIRST + 10 + i) for name in STEPS for i in range(5)],
    run=run_learned,
)
STUDY = Study(
    "irreps",
    {"runs": RUNS, "learned": LEARNED},
    {"redrawn": redrawn},
    about=lambda processes: {"processes": processes},
    compact=True,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
