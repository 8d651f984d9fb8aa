"""Create data/induction.json: three circuits in the same weights taken apart, with gates per sequence and per position.

python -m experiments.induction [--only sequence position ...] [--processes N]     (about twenty minutes of one core)

Chapter 36. The target is written by hand (`targets.Induction`), so that nothing of it is trained. A run has gates for
whole sequences, where the cheapest mechanisms are the three circuits, or for each position, where they are the six
roles. It starts at random ("scratch"), or at the truth plus the same random numbers ("truth"): that asks whether the
losses hold the truth where it is. Two controls say how much of that is the start: "wrong" starts as near to another
exact cut of the same weights (heads where gates are for sequences, circuits where they are for positions), and
"faithful" starts near the truth and has the faithfulness loss alone. "random" is the control of the starts at random:
every matrix is replaced by a random one of the same singular values, with the same settings, from scratch. Seeds of the
targets from 8600 up, and 1,000 more for the runs. Ten targets near the truth, and five of every other kind. (Five near
the truth, one from scratch and one with random weights were run first; the others were added with nothing changed. The
runs near a wrong cut got the causal tests last, and were made again for that: all else came out as it was.) "Many"
starts at random with the call of chapter 33 as it stands (experiments/architectures.py: four components for each
mechanism, k falling, late merging, 1,200 steps), on the seeds 90 and 91, on which other settings had been tried.

"Why" asks what random starts fail at, on five targets of new seeds (three at first, and two more later with nothing
changed): the losses of what was found beside those of the truth, with the settings of "scratch" ("as it stands"), and
with others that were tried on a target of seed 90: no fading, weaker faithfulness, larger steps, more components
("spare"); that on inputs that ask one circuit each, with one component on each ("one at a time"); and that with softer
attention ("softer").
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.algorithm import begin, finish
from apd_minimal.config import Config
from apd_minimal.losses import faithfulness, simplicity
from apd_minimal.selection import TopK, batch_top_k, sample_top_k
from apd_minimal.study import controls
from apd_minimal.study.rate import Judge
from apd_minimal.targets.induction import CIRCUIT_OF, CIRCUITS, OWNERS, Induction
from experiments import architectures
from experiments.experiment import Row, Rows, Study, Tensors, numbers
from experiments.induced_network import TwoLayers
from experiments.modular import like

Job = tuple[str, str, int]  # gates, start, seed
TRUTHS = {"sequence": "circuit", "position": "role"}  # gates, and what is cheapest under them
GROUPS = {"sequence": tuple(range(len(CIRCUITS))), "position": CIRCUIT_OF}  # the circuit of each true mechanism
OF_HEADS = tuple(CIRCUIT_OF[own["o"]] for own in OWNERS.values())  # the circuit of each head
ACTIVE = {"sequence": 1.0, "position": 0.25}  # of the truth, on a sequence or at a position
ACTIVE_HEADS = 4 / 3  # on a sequence: induction has two heads, and each circuit is asked in a third of them
TESTS = ("own error without", "others' error without", "own error alone", "others' error alone")
RANK, FIRST = 4, 8600  # no matrix of a circuit has a higher rank

BATCH = 64  # sequences
WEIGHTS: dict[str, Any] = {"faithfulness": 100.0, "minimality": 50.0, "scrub": 50.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "near": {**WEIGHTS, "steps": 150, "restarts": 2, "simplicity": 1.0},
    "far": {**WEIGHTS, "steps": 400, "restarts": 2, "simplicity": ((0.0, 5.0), (1.0, 0.0))},
}


@dataclass
class Fading(TopK):
    """The top k, and the others not off at once: what is left of them falls from 1 to 0 until a point of the run.

    A head of which a part is missing looks at nothing, and then no gradient says what is missing.
    """

    until: float = 0.7

    def choose(self, scores: Tensor, t: float, share: float = 1.0) -> Tensor:
        """Choose the k most attributed, and let the others fade."""
        mask = super().choose(scores, t, share)
        left = max(0.0, 1 - t / self.until)
        return torch.where(mask, 1.0, left) if left else mask


def along_the_answer(outputs: Tensor) -> Tensor:
    """Measure the outputs along the target's own, [B, 1]: one number to take a gradient of."""
    return (outputs * outputs.detach()).flatten(1).sum(1, keepdim=True)


def attribution(network: apd.Network, components: apd.Components, x: Tensor, per_position: bool = False) -> Tensor:
    """Compute gradient attributions to the size of the answers: [B, C], or [B, T, C] per position."""
    one = apd.Network(network.target, list(network.weights), along_the_answer)
    return apd.attributions.gradient(one, components, x, per_position=per_position, mode="backward")


def scores_of(gates: str) -> Any:
    """Give the attributions for these gates."""
    return partial(attribution, per_position=gates == "position")


def most_attributed(scores: Tensor, k: float) -> Tensor:
    """Say which scores [..., C] are among the largest, k of the C on average; those that equal the last are, too."""
    return scores >= scores.flatten().topk(int(k * scores[..., 0].numel())).values[-1]


@torch.no_grad()
def without_circuits(target: Induction, seed: int) -> Induction:
    """Replace every matrix by a random one of the same singular values."""
    generator = torch.Generator().manual_seed(seed)
    for layer in target.layers:
        for part in (layer.q, layer.k, layer.v, layer.o):
            part.weight.copy_(like(part.weight, generator))
        layer.nothing.zero_()  # else most of them would look at nothing
    return target


def heads(target: Induction) -> dict[str, Tensor]:
    """Cut every weight by heads: [4, d_in, d_out] each, the two of the first layer first."""
    cut = {}
    for path, whole in target.mechanisms("circuit").items():
        own = torch.zeros(4, *whole.shape[1:])
        first = 2 * int(path.split(".")[1])
        axis = 0 if ".o." in path else 1
        for h, part in enumerate(whole.sum(0).chunk(2, axis)):
            own[first + h].narrow(axis, h * part.shape[axis], part.shape[axis]).copy_(part)
        cut[path] = own
    return cut


def asked(target: Induction, circuit: int, n: int = 256, seed: int = 0) -> Tensor:
    """Draw sequences in which this circuit is asked, and no other: [n, T]."""
    x = target.data(16 * n)(0, torch.Generator().manual_seed(seed))
    on = target.says(x).any(-1).any(1)  # [B, circuit]
    return x[on[:, circuit] & (on.sum(1) == 1)][:n]


@torch.no_grad()
def causal(target: Induction, components: apd.Components, groups: list[list[int]], seed: int = 0) -> Tensor:
    """Take each circuit's components away, and keep them alone: errors [circuit, 4], as `TESTS` names them.

    Errors are shares of the answers' size, at most 1.

    Args:
        target: with all circuits.
        components: C of them.
        groups: the components of each circuit.
        seed: of the sequences.
    """
    network = apd.Network(target, target.weights)
    inputs = [asked(target, c, seed=seed) for c in range(len(CIRCUITS))]

    def errors(gates: Tensor) -> Tensor:
        found = []
        for x in inputs:
            wanted = target.answers(x)
            gap = network(x, components, gates.expand(len(x), -1)) - wanted
            found.append((gap.square().sum() / wanted.square().sum()).clamp(max=1))
        return torch.stack(found)

    rows = []
    for c, group in enumerate(groups):
        own = torch.zeros(components.n_components)
        own[group] = 1
        gone, alone = errors(1 - own), errors(own)
        others = torch.arange(len(groups)) != c
        rows.append(torch.stack([gone[c], gone[others].mean(), alone[c], alone[others].mean()]))
    return torch.stack(rows)


@torch.no_grad()
def moved(target: Induction, components: apd.Components, k: float, seed: int = 0) -> dict[str, float]:
    """Move the pattern by one position: does the mask have to move with it? Errors as shares, with gates per position.

    Args:
        target: with induction.
        components: C of them.
        k: active at a position.
        seed: of the sequences.

    Returns:
        dict[str, float]: of the moved sequences with the mask that they have themselves, with the mask of before, with
        that one moved as well, and with the mask of another sequence.
    """
    network = apd.Network(target, target.weights)
    score = scores_of("position")
    usual = score(network, components, target.data(2048)(0, torch.Generator().manual_seed(seed + 1)))
    least = usual.flatten().topk(int(k * usual[..., 0].numel())).values[-1]  # of the training mixture, with its share
    # Whatever is at the first position is left there, the last letter comes after it, and all others move on by one.
    x = asked(target, 0, n=1024, seed=seed)
    x = x[(target.uses(x)[:, 0, 0] == 0) & ~target.uses(x)[:, -1].any(-1)]
    order = [0, target.positions - 1, *range(1, target.positions - 1)]
    there, wanted = x[:, order], target.answers(x[:, order])
    mask, own = (score(network, components, y) >= least for y in (x, there))
    size = wanted.square().sum()

    def error(gates: Tensor) -> float:
        gap = network(there, components, gates.float()) - wanted
        return min(1.0, float(gap.square().sum() / size))

    return {"own": error(own), "stays": error(mask), "moves": error(mask[:, order]), "another's": error(own.roll(1, 0))}


def jobs() -> list[Job]:
    """List the runs."""
    targets = {"truth": 10, "wrong": 5, "faithful": 5, "scratch": 5, "random": 5}
    return [(gates, start, FIRST + i) for start, n in targets.items() for i in range(n) for gates in TRUTHS]


def settings_of(job: Job) -> Row:
    """Give the settings: one set for all, but for the gates, and the fading of runs that do not start near a cut."""
    gates, start, seed = job
    settings = {
        "n_components": len(GROUPS[gates]), "top_k": ACTIVE[gates], "rank": RANK, "seed": seed + 1000,
        "tidy_every": 0.0, "reseed_until": 0.0, **SETTINGS["far" if start in ("scratch", "random") else "near"],
    }  # fmt: skip
    if start == "wrong":
        settings |= {"n_components": 4, "top_k": ACTIVE_HEADS} if gates == "sequence" else {"n_components": 3}
    if start == "faithful":
        settings |= {"minimality": 0.0, "scrub": 0.0, "simplicity": 0.0}
    return settings


def cut_of(job: Job, target: Induction) -> dict[str, Tensor]:
    """Give the cut of the weights with which a run is compared, and near which it starts if it does."""
    gates, start, _ = job
    if start == "wrong":
        return heads(target) if gates == "sequence" else target.mechanisms("circuit")
    return target.mechanisms(TRUTHS[gates])


def circuits_of(job: Job) -> tuple[int, ...]:
    """Give the circuit of each part of the cut with which a run is compared."""
    gates, start, _ = job
    if start == "wrong":
        return OF_HEADS if gates == "sequence" else GROUPS["sequence"]
    return GROUPS[gates]


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Take one target apart, and measure what is owned, what it does, and the bits."""
    gates, start, seed = job
    target = Induction(seed=seed)
    if start == "random":
        target = without_circuits(target, seed)
    truth, score, began = cut_of(job, target), scores_of(gates), time.process_time()
    judge, network = Judge(attribution=score), apd.Network(target, target.weights)
    settings, near = settings_of(job), start not in ("scratch", "random")
    k, source = settings["top_k"], target.data(BATCH)
    selection = None if near else Fading(k)
    progress = begin(network, source, Config.from_dict(settings), attribution=score, selection=selection)
    known = apd.Components.from_matrices(truth, RANK)
    if near:
        with torch.no_grad():
            for mine, true in zip(progress.components.parameters(), known.parameters(), strict=True):
                mine.add_(true)
    first = progress.components.map(lambda t: t.detach().clone()).restart(0)
    found = finish(progress, None, 500, None, False, None)
    seconds = time.process_time() - began
    x = target.data(512)(0, torch.Generator().manual_seed(20_000 + seed))
    parts, every = found.components, found.restarts
    own, dealt = apd.metrics.ownership(parts, truth), controls.dealt(parts, seed)
    assert every is not None and every.restarts is not None
    row: Row = {
        "owned": int(own.owned.sum()),
        "cosine": [round(v, 4) for v in own.cosine.tolist()],
        "length_ratio": [round(v, 4) for v in own.length_ratio.tolist()],
        "purity": [round(v, 4) for v in own.purity.tolist()],
        "owned_by_restart": [
            int(apd.metrics.ownership(every.restart(r), truth).owned.sum()) for r in range(every.restarts)
        ],
        "start_cosine": apd.metrics.ownership(first, truth).cosine.mean().item(),
        "restarts_cosine": apd.metrics.ownership(every.restart(0), as_truth(every.restart(1))).cosine.mean().item(),
        "dealt_cosine": apd.metrics.ownership(dealt, truth).cosine.mean().item(),
        "another_cosine": apd.metrics.ownership(parts, cut_of(job, Induction(seed=seed + 50))).cosine.mean().item(),
        "relative_faithfulness": apd.metrics.relative_faithfulness(parts, network.weights).item(),
        "bits": finite(judge(network, parts, x)),
        "bits_of_the_truth": finite(judge(network, known, x)),
        "bits_dealt": finite(judge(network, dealt, x)),
        "seconds": round(seconds, 1),
    }
    if start != "random":
        as_known = [[j for j, g in enumerate(circuits_of(job)) if g == c] for c in range(len(CIRCUITS))]
        groups = [[int(own.owner[j]) for j in group] for group in as_known]
        row["causal"] = causal(target, parts, groups, seed).tolist()
        row["causal_start"] = causal(target, first, as_known, seed).tolist()
        row["causal_dealt"] = causal(target, dealt, groups, seed).tolist()
        if gates == "position":
            row["moved"], row["moved_dealt"] = moved(target, parts, k, seed), moved(target, dealt, k, seed)
    return [row], {}


def run_many(job: tuple[str, int]) -> tuple[list[Row], Tensors]:
    """Take one target apart with many components, by the call that chapter 33 makes for every kind of network."""
    gates, seed = job
    target = Induction(seed=seed)
    truth, score, began = target.mechanisms(TRUTHS[gates]), scores_of(gates), time.process_time()
    x = target.data(1024)(0, torch.Generator().manual_seed(20_000 + seed))
    settings = architectures.settings(target, target.weights, x, len(GROUPS[gates]), ACTIVE[gates], seed + 1000)
    settings["judge"] = Judge(architectures.EPSILONS, attribution=score)
    found = apd.decompose(target, target.data(BATCH), target.weights, attribution=score, progress=False, **settings)
    own = apd.metrics.ownership(found.components, truth)
    row = {
        "owned": int(own.owned.sum()),
        "cosine": [round(v, 4) for v in own.cosine.tolist()],
        "dealt_cosine": apd.metrics.ownership(controls.dealt(found.components, seed), truth).cosine.mean().item(),
        "in_use": int((found.components.norms() > 0).sum()),
        "relative_faithfulness": apd.metrics.relative_faithfulness(
            found.components, apd.Network(target, target.weights).weights
        ).item(),
        "bits": finite(Judge(attribution=score)(apd.Network(target, target.weights), found.components, x)),
        "seconds": round(time.process_time() - began, 1),
    }
    return [row], {}


@dataclass(frozen=True)
class OneAtATime:
    """A source of batches [batch_size, T] of sequences that ask exactly one circuit of a target, written or learned."""

    target: Induction | TwoLayers
    batch_size: int

    def __call__(self, step: int, generator: torch.Generator) -> Tensor:
        """Draw more sequences than are needed, and keep those that ask one circuit."""
        x = self.target.data(4 * self.batch_size)(step, generator)  # four in nine do
        return x[self.target.says(x).any(-1).any(1).sum(1) == 1][: self.batch_size]


# What is changed: settings (none: those of "scratch"), whether inputs ask one circuit each, and the gap of attention.
SPARE: Row = {
    "n_components": 8, "rank": RANK, "steps": 500, "restarts": 2, "lr": 3e-2, "faithfulness": 20.0, "minimality": 20.0,
    "scrub": 20.0, "simplicity": ((0.0, 100.0), (0.7, 0.0)), "tidy_every": 0.0, "reseed_until": 0.0, "top_k": 1.0,
}  # fmt: skip
CHANGED: dict[str, tuple[Row, bool, float]] = {
    "as it stands": ({}, False, 5.0),
    "one at a time": (SPARE | {"per_sample": True}, True, 5.0),
    "softer": (SPARE | {"per_sample": True}, True, 2.0),
    "spare": (SPARE, False, 5.0),
}


def why_jobs() -> list[Job]:
    """List the runs that ask why: gates, what is changed, seed."""
    firsts = [("sequence", "as it stands"), ("position", "as it stands")]
    kinds = firsts + [("sequence", change) for change in CHANGED if change != "as it stands"]
    return [(gates, change, FIRST + 20 + i) for gates, change in kinds for i in range(5)]


def why_settings(job: Job) -> Row:
    """Give the settings of such a run."""
    gates, change, seed = job
    settings, _, _ = CHANGED[change]
    return settings | {"seed": seed + 1000} if settings else settings_of((gates, "scratch", seed))


@torch.no_grad()
def losses(network: apd.Network, components: apd.Components, x: Tensor, scores: Tensor, settings: Row) -> Row:
    """Measure what training goes by, with hard gates: the most attributed are on, and all else is off.

    Errors are in units of the error with nothing on.

    Args:
        network: the target.
        components: C of them.
        x: inputs.
        scores: attributions of these components, [B, (T,) C].
        settings: of the run; only `top_k` and `per_sample` count.
    """
    k = settings["top_k"]
    flat = scores.flatten(0, -2)
    mask = (sample_top_k(flat, 1) if settings.get("per_sample") else batch_top_k(flat, k)).reshape(scores.shape)
    coin = (torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) < 0.5).to(mask)
    wanted = network(x)

    def error(gates: Tensor) -> float:
        return float((network(x, components, gates) - wanted).square().mean())

    nothing = error(0 * mask)
    return {
        "faithfulness": float(faithfulness(components, network.weights)),
        "sparse": error(mask) / nothing,
        "scrub": error(torch.maximum(mask, coin)) / nothing,
        "simplicity": float(simplicity(components, mask, 0.9)),
    }


def summed(components: apd.Components, truth: dict[str, Tensor]) -> list[float]:
    """Give each component to the mechanism of which it has most, and compare the sums with the mechanisms: cosines."""
    Z = torch.cat([truth[path].flatten(1) for path in components.paths], 1)
    P = components.flat().detach()
    most = (P @ Z.T / Z.square().sum(1)).argmax(1)
    sums = torch.stack([P[most == j].sum(0) for j in range(len(Z))])
    return torch.nn.functional.cosine_similarity(sums, Z, dim=1).tolist()


def run_why(job: Job) -> tuple[list[Row], Tensors]:
    """Take one target apart from random starts, and measure losses there and at the truth."""
    gates, change, seed = job
    _, one, gap = CHANGED[change]
    target, score, began = Induction(seed=seed, gap=gap), scores_of(gates), time.process_time()
    truth, network, settings = target.mechanisms(TRUTHS[gates]), apd.Network(target, target.weights), why_settings(job)
    source = (lambda n: OneAtATime(target, n)) if one else target.data
    selection = Fading(settings["top_k"]) if change == "as it stands" else None
    progress = begin(network, source(BATCH), Config.from_dict(settings), attribution=score, selection=selection)
    found = finish(progress, None, 500, None, False, None)
    seconds = time.process_time() - began
    x = source(512)(0, torch.Generator().manual_seed(20_000 + seed))
    dealt, every = controls.dealt(found.components, seed), found.restarts
    assert every is not None and every.restarts is not None
    parts = {"found": found.components, "truth": apd.Components.from_matrices(truth, RANK), "dealt": dealt}
    other = Induction(seed=seed + 50, gap=gap).mechanisms(TRUTHS[gates])
    own = {name: apd.metrics.ownership(c, truth) for name, c in parts.items()}
    row: Row = {
        "owned": own["found"].owned.tolist(),
        "cosine": [round(v, 4) for v in own["found"].cosine.tolist()],
        "owned_by_restart": [
            apd.metrics.ownership(every.restart(r), truth).owned.tolist() for r in range(every.restarts)
        ],
        "dealt_owned": own["dealt"].owned.tolist(),
        "dealt_cosine": [round(v, 4) for v in own["dealt"].cosine.tolist()],
        "another_cosine": [round(v, 4) for v in apd.metrics.ownership(found.components, other).cosine.tolist()],
        "summed": [round(v, 4) for v in summed(found.components, truth)],
        "dealt_summed": [round(v, 4) for v in summed(dealt, truth)],
        "losses": {name: losses(network, c, x, score(network, c, x), settings) for name, c in parts.items()},
        "seconds": round(seconds, 1),
    }
    return [row], {}


def finite(bits: float) -> float | None:
    """Give None for bits that are infinite, as JSON has no infinity."""
    return bits if math.isfinite(bits) else None


def as_truth(components: apd.Components) -> dict[str, Tensor]:
    """Give the matrices of components, to compare others with."""
    return {path: components.matrices(path).detach() for path in components.paths}


RUNS = Rows(
    fields=("gates", "start", "seed"),
    jobs=lambda rows: jobs(),
    run=run,
    settings=lambda job: numbers(settings_of(job), batch=BATCH),
    order=lambda job: (
        ["truth", "wrong", "faithful", "scratch", "random"].index(job[1]),
        list(TRUTHS).index(job[0]),
        job[2],
    ),
)
MANY = Rows(("gates", "seed"), lambda rows: [(gates, seed) for seed in (90, 91) for gates in TRUTHS], run_many)
WHY = Rows(
    fields=("gates", "change", "seed"),
    jobs=lambda rows: why_jobs(),
    run=run_why,
    settings=lambda job: numbers(
        why_settings(job), batch=BATCH, one_at_a_time=CHANGED[job[1]][1], gap=CHANGED[job[1]][2]
    ),
    order=lambda job: why_jobs().index(job),
)
STUDY = Study(
    "induction",
    {"runs": RUNS, "many": MANY, "why": WHY},
    about=lambda processes: {"processes": processes},
    compact=True,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
