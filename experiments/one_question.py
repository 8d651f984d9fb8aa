"""Create data/one_question.json: networks that learned induction, taken apart on single questions (chapter 36).

python -m experiments.one_question [--processes N]      (about 80 minutes of one core)

The networks are the trained ones of experiments/induced.py. There gates are for each position, and no circuit comes
apart. Here they are for a sequence, every sequence asks one task, and one component is on at a time in the mean: what
found the planted circuits (experiments/pieces.py), with the losses that were made for trained networks. Four
components, so that one is to spare. Six starts, of which the judge takes the one with the fewest bits.

A component belongs to the task that its absence harms most, relative to what the others' absence does (the rule
"relative" of experiments/induced.py, fixed before these runs). That is settled on one half of the sequences and tested
on the other; these are the usual ones, with any number of questions. Controls: the same parts dealt anew, turned and
dealt, and the cut by heads. Settled on seed 90 ("log" has what was tried); reported are 8900 to 8904, of the trained
ones up to 8906, since two of these did not learn induction; each is run once.

On seed 90 components went by letters: which one is on told more of the answer than of the task. In these networks every
letter has a direction of its own. "Packed" ones have eight letters in three dimensions, as planted circuits have, so
that a part which reads one letter reads something of others. They learn for twice as many steps, since one of two did
not learn the table in as few, and their stream and their heads are smaller. (Seed 90 of these was run once, with the
settings as they were.) Two controls came after all others had been seen: "wide" ones are packed, and as wide as the
trained ones; "longer" ones have letters of their own, learn for as many steps as the packed ones, and their components
have the rank of a whole head, 17, as 12 is in packed ones. Then came "packed, untrained",
packed ones as they were before they learned, and "packed, labels", which learned answers drawn at random.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor
from torch.nn.functional import one_hot

import apd_minimal as apd
from apd_minimal.selection import batch_top_k
from apd_minimal.study.rate import Judge
from experiments import induced
from experiments.experiment import Row, Rows, Study, Tensors, numbers
from experiments.induced_network import FREE, LETTERS, TwoLayers
from experiments.induction import OneAtATime

Job = tuple[str, int]  # kind of target, seed
BATCH = 128
SEEDS = {"packed": 5, "trained": 7, "wide": 5, "longer": 5, "packed, untrained": 5, "packed, labels": 5}
SETTINGS: Row = induced.SETTINGS | {
    "n_components": 4, "rank": 12, "restarts": 6, "top_k": ((0.0, 4.0), (0.3, 1.5), (0.6, 1.0)),
    "simplicity": ((0.0, 100.0), (0.7, 0.03)),
}  # fmt: skip


def target_of(kind: str, seed: int) -> TwoLayers:
    """Train a network, or stop before."""
    if kind == "trained":
        return induced.target_of(kind, seed)
    packed, free = kind != "longer", FREE + 10 if kind == "wide" else FREE
    net = TwoLayers(seed, induced.HEADS, packed, free)
    if kind == "packed, untrained":
        return net.start(torch.Generator().manual_seed(seed)).requires_grad_(False)
    return net.fit(seed, steps=5000, wrong=kind == "packed, labels").requires_grad_(False)


def attribution(network: apd.Network, components: apd.Components, x: Tensor) -> Tensor:
    """Compute gradient attributions per sequence [..., B, C], as shares of a sequence's."""
    one = apd.Network(network.target, list(network.weights), induced.along_the_answer)
    found = apd.attributions.gradient(one, components, x, mode="backward").abs()
    return found / found.sum(-1, keepdim=True).clamp_min(1e-12)


def judge_of() -> Judge:
    """Give the judge: bits at three errors, with these attributions."""
    return Judge(induced.EPSILONS, divergence="kl", attribution=attribution)


@torch.no_grad()
def masked(net: TwoLayers, components: apd.Components, x: Tensor) -> Row:
    """Run sequences that ask one task each with their masks; errors are shares of silence's.

    Args:
        net: the target.
        components: C of them.
        x: sequences [B, T] that ask one task each.

    Returns:
        Row: errors with the most attributed component alone in the mean, with half of the rest on as well, and with
        another sequence's mask; how often each component is on, by task and answer, [3, n, C]; and how many bits the
        most attributed component tells, of itself, of the task, of the answer, and of answers dealt anew.
    """
    network = apd.Network(net, net.weights)
    scores, wanted = attribution(network, components, x), network(x)
    on, top = batch_top_k(scores, 1.0).bool(), scores.argmax(1)
    coin = torch.rand(on.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    gates = {"active": on, "scrubbed": on | coin, "another's mask": on.roll(1, 0), "silence": on & False}
    error = {name: induced.errors(network(x, components, g.float()), wanted).mean() for name, g in gates.items()}
    asked = net.asked(x).min(1)  # the one position at which there is a task
    answer = net.answers(x).gather(1, asked.indices[:, None])[:, 0]
    anew = answer[torch.randperm(len(answer), generator=torch.Generator().manual_seed(0))]
    which = one_hot(asked.values * LETTERS + answer, 3 * LETTERS).float()
    use = (which.T @ on.float() / which.sum(0)[:, None].clamp_min(1)).unflatten(0, (3, LETTERS))
    tells = [bits_about(top, what) for what in (top, asked.values, answer, anew)]
    shares = {name: float(e / error["silence"]) for name, e in error.items() if name != "silence"}
    return shares | {"use": use.tolist(), "tells": tells}


def bits_about(a: Tensor, b: Tensor) -> float:
    """Compute the mutual information of two lists of whole numbers [N], in bits."""
    joint = torch.zeros(int(a.max()) + 1, int(b.max()) + 1, dtype=torch.double)
    joint.index_put_((a, b), torch.ones(len(a), dtype=torch.double), accumulate=True)
    joint /= joint.sum()
    alone = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return float(torch.special.xlogy(joint, joint / alone.clamp_min(1e-30)).sum() / math.log(2))


def measure(net: TwoLayers, components: apd.Components, seed: int) -> Row:
    """Measure what components do to each task, and their bits.

    Args:
        net: the target.
        components: C of them.
        seed: of the sequences.
    """
    components = components.map(Tensor.detach)
    network = apd.Network(net, net.weights)
    x = net.data(2048)(0, torch.Generator().manual_seed(20_000 + seed))
    fit, test = (induced.Doing(net, components, half) for half in x.chunk(2))
    owner = induced.owners(fit.each()[0], relative=True)
    gone, alone = test.each()
    one = OneAtATime(net, 1024)(0, torch.Generator().manual_seed(30_000 + seed))
    return {
        "owner": owner,
        "gone": gone.tolist(),
        "alone": alone.tolist(),
        "groups": induced.group_tests(test, owner),
        "bits": induced.finite(judge_of()(network, components, one)),
        **masked(net, components, one),
    }


def settings_of(job: Job) -> Row:
    """Give the settings of a run."""
    kind, seed = job
    return SETTINGS | {"seed": seed + 1000} | ({"rank": 17} if kind == "longer" else {})


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Take one trained network apart, and measure every start, the pick and its controls."""
    _, seed = job
    net, began = target_of(*job), time.process_time()
    result = apd.decompose(
        net, OneAtATime(net, BATCH), net.weights, divergence="kl", attribution=attribution, judge=judge_of(),
        progress=False, **settings_of(job),
    )  # fmt: skip
    seconds, every = time.process_time() - began, result.restarts
    assert every is not None and every.restarts is not None and result.scores is not None
    network = apd.Network(net, net.weights)
    parts = induced.parts_of(network, result.components.map(Tensor.detach), seed)
    x = net.data(4096)(0, torch.Generator().manual_seed(40_000 + seed))
    right, asked = (net(x).argmax(-1) == net.answers(x)).float(), net.asked(x)
    row: Row = {
        "accuracy": [right[asked == task].mean().item() for task in range(4)],
        "relative_faithfulness": apd.metrics.relative_faithfulness(parts["found"], network.weights).item(),
        "scores": [induced.finite(s) for s in result.scores],
        "starts": [measure(net, every.restart(r), seed)["groups"] for r in range(every.restarts)],
        **{name: measure(net, c, seed) for name, c in parts.items()},
        "seconds": round(seconds, 1),
    }
    return [induced.short(row)], {}


RUNS = Rows(
    fields=("kind", "seed"),
    jobs=lambda rows: [(kind, induced.FIRST + i) for kind, n in SEEDS.items() for i in range(n)],
    run=run,
    settings=lambda job: numbers(settings_of(job), batch=BATCH),
    order=lambda job: (list(SEEDS).index(job[0]), job[1]),
)
STUDY = Study("one_question", {"runs": RUNS}, about=lambda processes: {"processes": processes}, compact=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
