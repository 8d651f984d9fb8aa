"""Create data/groups.json: products in groups taken apart, written by hand and trained.

python -m experiments.groups [--only apart shared irrep ...] [--processes N]        (about 90 minutes of one core)

Chapter 37. "runs" are targets written by hand (`targets.GroupOperations`). Every seed draws other tokens, other bases
of the representations and another basis of the embedding, so that each is another network:

- "apart": the symmetric group S4 by its standard representation, the dihedral group D12 by two and the cyclic group Z24
  by two, on disjoint vocabularies of 24 tokens.
- "shared": the same three on the same 24 tokens; a switch says which of them multiplies.
- "irrep": S4 alone with all four of its representations; each is open on a fifth of the samples. "irrep, S3",
  "irrep, D5", "irrep, A4", "irrep, S5" (three of six) and "irrep, S5 whole" are other groups alone, five targets each
  (of the last one, for want of time), from seed 8710.
- "apart, all" and "shared, all": small groups with all their representations; these fill the space of the tokens.
- "shared, no irreps" and "irrep, no irreps": the controls. The same switches, and every representation's weights
  replaced by random ones with the same singular values. "apart, own tokens": the same of "apart", but that random
  weights, too, read only of the tokens of their own group. Without that every group would be on for every pair.

Seeds from 8700 up, and 1,000 more for the decomposition; settled on seeds 90 and 91. One set of settings for all kinds,
that of chapter 35 which was called gentle there. "trained" are networks of three groups with squaring neurons, trained
on all pairs: the same settings, causal scores of every component, and untrained networks as a control. "trained, one
each" are the same networks and five more, with one component a sample. "answers" are networks of ReLUs that learned the
answers of four groups, with settings of their own: one component a sample, the divergence, simplicity that falls from
strong; settled on seeds 90 and 91. "answers, shared tokens" are the same settings on networks that learned the answers
of three groups on the same tokens. "log" has the runs by which this was done; no command makes them again.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import apd_minimal as apd
from apd_minimal.study import controls
from apd_minimal.study.rate import Judge
from apd_minimal.targets import GroupOperations, Pairs
from experiments.experiment import Row, Rows, Study, Tensors, numbers
from experiments.modular import like

Job = tuple[str, int, int]  # kind, number of components, seed
HIDDEN, OUT = PATHS = ("hidden.weight", "out.weight")
MECHANISMS = {"apart": 3, "shared": 3, "irrep": 4, "apart, all": 3, "shared, all": 3, "shared, no irreps": 3}
MECHANISMS |= {"irrep, no irreps": 4, "apart, own tokens": 3}
ONE_GROUP = {"irrep, S3": 2, "irrep, D5": 3, "irrep, A4": 2, "irrep, S5": 3}  # S5 with the sign and both of dimension 4
ONE_GROUP |= {"irrep, S5 whole": 6}
FEW = 1  # target of that kind, which takes a quarter of an hour
MECHANISMS |= ONE_GROUP
THREE = (["S4", "D12", "Z24"], [(2,), (3, 7), (0, 4)])
NUMBERS = {  # of groups on shared tokens (experiments/one_call.py)
    "shared, two": (THREE[0][:2], THREE[1][:2]),
    "shared, four": ([*THREE[0], "D12"], [*THREE[1], (5, 6)]),
}
FIRST = 8700
OTHERS = {"apart": (2, 4, 6), "shared": (2, 4, 6)}  # other numbers of components, on five targets
GENTLE: dict[str, Any] = {
    "steps": 800, "faithfulness": 10.0, "minimality": 20.0, "scrub": 10.0, "simplicity": ((0.0, 60.0), (0.7, 0.0)),
}  # fmt: skip
# For networks that were trained on answers: the divergence, one component a sample, simplicity falls from strong.
ANSWERS: dict[str, Any] = {
    "steps": 800, "faithfulness": 30.0, "minimality": 1.0, "scrub": 1.0, "simplicity": ((0.0, 300.0), (1.0, 10.0)),
    "tidy_every": 0.0, "per_sample": True, "restarts": 6,
}  # fmt: skip
# The same with the squared error, for networks whose neurons square; on seed 90 nothing did well.
ONE_EACH: dict[str, Any] = ANSWERS | {
    "minimality": 60.0,
    "scrub": 60.0,
    "simplicity": ((0.0, 60.0), (1.0, 2.0)),
    "restarts": 3,
}
FOUR = ["Z6", "S3", "D5", "D4"]


def jobs() -> list[Job]:
    """List the runs on targets written by hand."""
    every = [(kind, MECHANISMS[kind], FIRST + i) for i in range(10) for kind in ("shared", "apart", "irrep")]
    rest = [kind for kind in MECHANISMS if "," in kind and kind not in ONE_GROUP]
    every += [(kind, MECHANISMS[kind], FIRST + i) for i in range(5) for kind in rest]
    every += [(kind, n, FIRST + 10 + i) for kind, n in ONE_GROUP.items() for i in range(FEW if n == 6 else 5)]
    return every + [(kind, n, FIRST + i) for i in range(5) for kind, counts in OTHERS.items() for n in counts]


def target_of(kind: str, seed: int) -> GroupOperations:
    """Write down a target."""
    if by_of(kind) == "irrep":
        name = kind.removeprefix("irrep, ") if kind in ONE_GROUP else "S4"
        some = [(0, 1, 2)] if name == "S5" else None
        target = GroupOperations([name.removesuffix(" whole")], some, switches="irrep", seed=seed)
        return without_irreps(target, seed) if "no irreps" in kind else target
    if kind == "apart, all":
        return GroupOperations(["Z6", "S3", "D5"], seed=seed)
    if kind == "shared, all":
        return GroupOperations(["Z6", "S3", "S3"], switches="group", seed=seed)
    if kind in NUMBERS:
        return GroupOperations(*NUMBERS[kind], switches="group", seed=seed)
    target = GroupOperations(*THREE, switches=None if kind.startswith("apart") else "group", seed=seed)
    own_tokens = "own tokens" in kind
    return without_irreps(target, seed, own_tokens) if own_tokens or "no irreps" in kind else target


@torch.no_grad()
def without_irreps(target: GroupOperations, seed: int, own_tokens: bool = False) -> GroupOperations:
    """Replace what every representation reads and writes by random matrices of the same singular values.

    With `own_tokens` what is read stays in the space that the embedded tokens of its group span.
    """
    generator = torch.Generator().manual_seed(seed)

    for irrep in target.owner.unique():
        own, Q = target.owner == irrep, torch.eye(target.embed.shape[1])
        if own_tokens:
            tokens = target.tokens[target.group_of[irrep]]
            embedded = target.embed[torch.cat([tokens, target.n_tokens + tokens])]
            S, Vh = torch.linalg.svd(embedded, full_matrices=False)[1:]
            Q = Vh[S > 1e-4].T  # [D, dimensions of these tokens]
        target.hidden.weight[own] = like(target.hidden.weight[own] @ Q, generator) @ Q.T
        target.out.weight[:, own] = like(target.out.weight[:, own], generator)
    return target


def by_of(kind: str) -> str:
    """Name the mechanisms."""
    return "irrep" if kind.startswith("irrep") else "group"


def settings_of(job: Job) -> Row:
    """Give the settings: the same ones for all, but for how many components there are, and are on."""
    kind, n_components, seed = job
    if "answers" in kind or kind == "trained, one each":
        own = ANSWERS if "answers" in kind else ONE_EACH
        return {"n_components": n_components, "top_k": 1.0, "seed": seed + 1000, **own}
    top_k = 0.2 * MECHANISMS[kind] if by_of(kind) == "irrep" else 1.0  # each irrep is on a fifth of the samples
    return {"n_components": n_components, "top_k": top_k, "restarts": 6, "seed": seed + 1000, **GENTLE}


def certified(target: GroupOperations, parts: dict[str, Tensor], t: int) -> tuple[Row, Tensor]:
    """Certify one component for one group, and run it on all pairs of this group beside it."""
    group, tokens = target.groups[t], target.tokens[t]
    reads = target.embed @ parts[HIDDEN]  # [2 N, neurons]
    u, v, w = reads[tokens], reads[target.n_tokens :][tokens], parts[OUT][:, tokens]
    if target.switches == "group":
        w = target.opens[t][:, None] * w
    found = group.certify(u, v, w)
    scores = ((u[:, None] + v).double() ** 2) @ w.double()
    right = scores.argmax(2) == group.table
    return {"share": found.share, "margin": found.margin, "residual": found.residual, "wrong": found.wrong}, right


def bounds(target: GroupOperations, components: apd.Components, owner: Tensor) -> list[Row]:
    """For every group: what its component certifies, and what is true."""
    rows = []
    for t, c in enumerate(owner.tolist()):
        parts = {path: components.matrices(path).detach()[c] for path in PATHS}
        row, right = certified(target, parts, t)
        rows.append(row | {"right": round(right.double().mean().item(), 4)})
    return rows


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Take one target apart, and measure what is owned, bits and certificates."""
    kind, _, seed = job
    target, judge = target_of(kind, seed), Judge()
    truth = target.mechanisms(by_of(kind))
    start = time.process_time()
    found = apd.decompose(target, target.data(256), target.weights, judge=judge, progress=False, **settings_of(job))
    seconds = time.process_time() - start
    x = target.data(2048)(0, torch.Generator().manual_seed(20_000 + seed))
    network, every = apd.Network(target, target.weights), found.restarts
    assert every is not None and every.restarts is not None
    widest = min(truth[HIDDEN].shape[1:])
    own = apd.metrics.ownership(found.components, truth)
    dealt = controls.dealt(found.components, seed)
    exact = apd.Components.from_matrices(truth, widest)
    lump = apd.Components.from_matrices({path: w[None] for path, w in network.weights.items()}, widest)
    another = target_of(kind, seed + 50).mechanisms(by_of(kind))
    row: Row = {
        "owned": int(own.owned.sum()),
        "cosine": [round(v, 5) for v in own.cosine.tolist()],
        "owned_by_restart": [
            int(apd.metrics.ownership(every.restart(r), truth).owned.sum()) for r in range(every.restarts)
        ],
        "bits": judge(network, found.components, x),
        "bits_of_the_truth": judge(network, exact, x),
        "bits_of_one_lump": judge(network, lump, x),
        "bits_dealt": judge(network, dealt, x),
        "dealt_cosine": apd.metrics.ownership(dealt, truth).cosine.mean().item(),
        "cosine_with_another": apd.metrics.ownership(found.components, another).cosine.mean().item(),
        "seconds": round(seconds, 1),
    }
    if kind in ("apart", "shared") and (own.owner >= 0).all():
        row["bounds"] = bounds(target, found.components, own.owner)
        row["bounds_dealt"] = bounds(target, dealt, apd.metrics.ownership(dealt, truth).owner)
    return [row], {}


class OneLayer(nn.Module):
    """One hidden layer, without biases: x [B, n_in] -> [B, n_out].

    Args:
        n_in: of the inputs.
        n_out: of the outputs.
        squares: neurons square what they read; else they are ReLUs.
        seed: of the initial weights.
        neurons: of the hidden layer.
    """

    def __init__(self, n_in: int, n_out: int, squares: bool, seed: int, neurons: int = 64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.squares = squares
        self.hidden, self.out = nn.Linear(n_in, neurons, bias=False), nn.Linear(neurons, n_out, bias=False)
        with torch.no_grad():
            self.hidden.weight.copy_((2 / n_in) ** 0.5 * torch.randn(neurons, n_in, generator=generator))
            self.out.weight.copy_(neurons**-0.5 * torch.randn(n_out, neurons, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., n_in] to outputs [..., n_out]."""
        h = self.hidden(x)
        return self.out(h.square() if self.squares else h.relu())


def task_of(kind: str, seed: int) -> GroupOperations:
    """Give what a network is trained on: a target's inputs, outputs and answers."""
    if kind.startswith("answers") and "shared" not in kind:
        return GroupOperations(FOUR, embedding=False, seed=seed)
    if "shared" in kind:
        return GroupOperations(["Z6", "S3", "S3"], switches="group", embedding=False, seed=seed)
    return GroupOperations(["Z6", "S3", "D5"], embedding=False, seed=seed)


def network_of(kind: str, seed: int, steps: int = 4000, lr: float = 1e-2, decay: float = 0.1) -> OneLayer:
    """Train a network on all pairs, by the squared error or by its answers; or give it its initial weights."""
    task = task_of(kind, seed)
    x, y, answers = task.inputs(), task(task.inputs()).detach(), task.answers()
    shared = "shared" in kind  # what a square cannot do: a times b times the switch
    net = OneLayer(x.shape[1], y.shape[1], not shared and "answers" not in kind, seed, 128 if shared else 64)
    optimiser = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=decay)
    for step in range(0 if "untrained" in kind else steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * (1 - step / steps)
        loss = (
            nn.functional.cross_entropy(net(x), answers) if "answers" in kind else (net(x) - y).square().sum(1).mean()
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net


def blocks_of(task: GroupOperations) -> Tensor:
    """Give the group of every row of `inputs` [N]."""
    return torch.cat([torch.full((g.order**2,), t) for t, g in enumerate(task.groups)])


@torch.no_grad()
def causal(task: GroupOperations, net: OneLayer, components: apd.Components, answers_only: bool = False) -> list[Row]:
    """For each group, find the component that does best alone, one for each, and score it.

    Errors are shares of the variance of the network's outputs on the pairs of that group; with `answers_only` they are
    divergences from the network's distribution over all tokens, in nats.
    """
    network, x, block = apd.Network(net, list(PATHS)), task.inputs(), blocks_of(task)
    C, G, y, answers = components.n_components, len(task.groups), net(x), task.answers()
    of_group = [block == t for t in range(G)]
    variance = [float((y[own] - y[own].mean(0)).square().mean()) for own in of_group]

    def errors(outputs: Tensor) -> list[float]:
        if answers_only:
            return [float(apd.losses.kl(outputs[own], y[own]).mean()) for own in of_group]
        return [float((outputs - y)[own].square().mean()) / v for own, v in zip(of_group, variance, strict=True)]

    def right_on(outputs: Tensor, t: int) -> float:
        own, tokens = of_group[t], task.tokens[t]
        return float((tokens[outputs[own][:, tokens].argmax(1)] == answers[own]).double().mean())

    ones = torch.eye(C)
    alone = [network(x, components, one.expand(len(x), -1)) for one in ones]
    gone = [network(x, components, (1 - one).expand(len(x), -1), remainder=True) for one in ones]
    without = [errors(outputs) for outputs in gone]
    by_error = torch.tensor([errors(outputs) for outputs in alone])  # [C, G]
    places = linear_sum_assignment(by_error.clamp(max=10).numpy())
    rows = []
    for c, t in sorted(zip(*map(list, places), strict=True), key=lambda pair: pair[1]):
        own, tokens = of_group[t], task.tokens[t]
        # Answers are compared among the tokens of the group.
        chosen, by_net = (tokens[out[own][:, tokens].argmax(1)] for out in (alone[c], y))
        others = [t2 for t2 in range(G) if t2 != t]
        row: Row = {
            "right": float((chosen == answers[own]).double().mean()),
            "as_the_network": float((chosen == by_net).double().mean()),
            "alone": by_error[c, t].item(),
            "alone_on_others": min(by_error[c, o].item() for o in others),
            "without": without[c][t],
            "without_on_others": max(without[c][o] for o in others),
        }
        if answers_only:  # among the tokens of each group, as above
            row["right_on_others"] = max(right_on(alone[c], o) for o in others)
            row["right_without"] = right_on(gone[c], t)
            row["right_without_on_others"] = min(right_on(gone[c], o) for o in others)
        if net.squares:
            parts = {path: components.matrices(path)[c] for path in PATHS}
            row |= {f"certified_{name}": v for name, v in certified(task, parts, t)[0].items()}
        rows.append({name: round(float(v), 5) for name, v in row.items()})
    return rows


def cuts(task: GroupOperations, net: OneLayer) -> dict[str, apd.Components]:
    """Cut a network that nobody took apart: by the tokens of each group, and each neuron to who uses it most."""
    network, x, block = apd.Network(net, list(PATHS)), task.inputs(), blocks_of(task)
    W, V = (network.weights[path].detach() for path in PATHS)
    h = (x @ W).square() if net.squares else (x @ W).relu()
    size = torch.stack([h[block == t].square().mean(0) for t in range(len(task.groups))]) * V.square().sum(1)
    mine = nn.functional.one_hot(size.argmax(0), len(task.groups)).T.float()  # [G, neurons]
    made = {"neurons": {HIDDEN: W * mine[:, None], OUT: V * mine[:, :, None]}}
    if task.switches is None:
        tokens = torch.zeros(len(task.groups), task.n_tokens)
        for t, own in enumerate(task.tokens):
            tokens[t, own] = 1
        made["tokens"] = {HIDDEN: W * tokens.repeat(1, 2)[:, :, None], OUT: V * tokens[:, None]}
    return {name: apd.Components.from_matrices(parts, min(W.shape)) for name, parts in made.items()}


def trained_jobs() -> list[Job]:
    """List the runs on trained networks."""
    every = [("trained", 3, FIRST + i) for i in range(5)]
    every += [("untrained", 3, FIRST + i) for i in range(5)]
    every += [("answers", 4, FIRST + i) for i in range(10)]
    every += [("answers", 6, FIRST + i) for i in range(5, 10)]
    every += [("answers, untrained", 4, FIRST + i) for i in range(5)]
    every += [("trained, one each", 3, FIRST + i) for i in range(10)]
    every += [("answers, shared tokens", 3, FIRST + i) for i in range(5)]
    return every + [(*kind, FIRST + i) for i in range(5) for kind in (("trained, shared tokens", 3), ("trained", 6))]


def run_trained(job: Job) -> tuple[list[Row], Tensors]:
    """Take one network apart; score its components, dealt ones and the cuts."""
    kind, _, seed = job
    task, net, kl = task_of(kind, seed), network_of(kind, seed), "answers" in kind
    judge = Judge((0.03, 0.1, 0.3), divergence="kl") if kl else Judge()
    x, network, divergence = task.inputs(), apd.Network(net, list(PATHS)), "kl" if kl else "mse"
    start = time.process_time()
    found = apd.decompose(
        net, Pairs(x, 256), PATHS, judge=judge, divergence=divergence, progress=False, **settings_of(job)
    )
    seconds = time.process_time() - start
    block, y = blocks_of(task), net(x).detach()
    own = torch.stack([tokens_of[y[block == t][:, tokens_of].argmax(1)].eq(task.answers()[block == t]).double().mean()
                       for t, tokens_of in enumerate(task.tokens)])  # fmt: skip
    h = (x @ network.weights[HIDDEN]).detach()
    use = torch.stack([h[block == t].square().mean(0) for t in range(len(task.groups))])
    tried = {"found": found.components, "dealt": controls.dealt(found.components, seed), **cuts(task, net)}
    row = {
        "right": own.tolist(),
        "neurons_of_one": float((use.amax(0) > 0.9 * use.sum(0)).double().mean()),
        "faithfulness": float(apd.metrics.relative_faithfulness(found.components, network.weights)),
        "bits": {name: judge(network, parts, x) for name, parts in tried.items()},
        "scores": {name: causal(task, net, parts, kl) for name, parts in tried.items()},
        "seconds": round(seconds, 1),
    }
    if kl:
        starts = found.restarts
        assert starts is not None and starts.restarts is not None
        every = [causal(task, net, starts.restart(r), kl) for r in range(starts.restarts)]
        row["starts_right"] = [[part["right"] for part in parts] for parts in every]
    return [row], {}


RUNS = Rows(
    fields=("kind", "n_components", "seed"),
    jobs=lambda rows: jobs(),
    run=run,
    settings=lambda job: numbers(settings_of(job)),
    order=lambda job: (list(MECHANISMS).index(job[0]), job[1], job[2]),
)
TRAINED = Rows(
    fields=("kind", "n_components", "seed"),
    jobs=lambda rows: trained_jobs(),
    run=run_trained,
    settings=lambda job: numbers(settings_of(job)),
)
STUDY = Study(
    "groups", {"trained": TRAINED, "runs": RUNS}, about=lambda processes: {"processes": processes}, compact=True
)

if __name__ == "__main__":
    STUDY.main(__doc__)
