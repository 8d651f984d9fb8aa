"""Create data/induced.json: networks that learned induction, the first letter and a table, taken apart (chapter 36).

python -m experiments.induced [--only trained untrained labels] [--processes N]      (about twenty minutes of one core)

Two layers of attention (`experiments.induced_network`), trained on the tasks of the planted circuits, all of their
trained weights decomposed with gates for each position. Controls: the network before it was trained ("untrained"), and
one that was trained on answers drawn at random ("labels"). Beside APD's components stand the same parts dealt
anew, parts turned at random first, and the cut by heads, which trains nothing. Which component belongs to which task is
settled on one half of the sequences and scored on the other. Settings were made on one target, of seed 90; the seeds
here are 8900 and up for the targets, and 1,000 more for the runs. Of the first five trained networks two did not learn
induction, so that there are seven, of which five did.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.study import controls
from apd_minimal.study.leakage import leakage
from apd_minimal.study.rate import Judge
from apd_minimal.targets.induction import CIRCUITS
from apd_minimal.targets.transformer import last_position
from experiments.experiment import Row, Rows, Study, Tensors, numbers
from experiments.induced_network import LETTERS, POSITIONS, SILENT, TwoLayers, repeats

Job = tuple[str, int]  # kind of target, seed
FIRST, BATCH, HEADS = 8900, 32, 2
SEEDS = {"trained": 7, "untrained": 5, "labels": 5}
EPSILONS = (0.03, 0.1, 0.3)  # bits of a position
HARM = 0.1  # a component that does less than this to every task, as a share of silence, belongs to none
SETTINGS: dict[str, Any] = {
    "n_components": 12, "top_k": ((0.0, 12.0), (0.3, 4.0), (0.6, 1.5), (0.85, 0.8)), "rank": 4, "steps": 1200,
    "restarts": 2, "lr": 1e-2, "init_std": 0.05, "minimality": 20.0, "scrub": 10.0, "tidy_every": 0.0,
    # At first the sum counts little: else every component becomes a share of the whole, and stays one.
    "faithfulness": ((0.0, 10.0), (0.5, 100.0), (0.8, 3000.0), (1.0, 30_000.0)),
    "simplicity": ((0.0, 30.0), (0.7, 0.3)), "reseed_until": 0.0,
}  # fmt: skip
SAYS_NOTHING = torch.tensor([0.0] * LETTERS + [SILENT]).softmax(-1)


def along_the_answer(logits: Tensor) -> Tensor:
    """Measure the logits along what the answer differs in from saying nothing, [B, 1]: one number to differentiate."""
    towards = logits.detach().softmax(-1) - SAYS_NOTHING
    return (towards * logits).flatten(1).sum(1, keepdim=True)


def attribution(network: apd.Network, components: apd.Components, x: Tensor) -> Tensor:
    """Compute gradient attributions per position [..., B, T, C], as shares of a sequence's."""
    pick = network.output
    output = along_the_answer if pick is None else lambda logits: along_the_answer(pick(logits))
    one = apd.Network(network.target, list(network.weights), output)
    found = apd.attributions.gradient(one, components, x, per_position=True, mode="backward").abs()
    return found / found.sum((-2, -1), keepdim=True).clamp_min(1e-12)


def heads(weights: dict[str, Tensor], n_heads: int = HEADS) -> apd.Components:
    """Cut the weights by heads: 2 n_heads components, those of the first layer first."""
    cut = {}
    for path, w in weights.items():
        first, axis = n_heads * int(path.split(".")[1]), 0 if ".o." in path else 1
        own = torch.zeros(2 * n_heads, *w.shape)
        for h, part in enumerate(w.chunk(n_heads, axis)):
            own[first + h].narrow(axis, h * part.shape[axis], part.shape[axis]).copy_(part)
        cut[path] = own
    return apd.Components.from_matrices(cut)


def errors(outputs: Tensor, wanted: Tensor) -> Tensor:
    """Compute KL(target || outputs) at each position, [B, T]."""
    p, q = wanted.log_softmax(-1), outputs.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def by_task(values: Tensor, asked: Tensor) -> Tensor:
    """Average values [B, T] over the positions at which each task is asked: [3]."""
    return torch.stack([values[asked == task].mean() for task in range(len(CIRCUITS))])


class Doing:
    """What components do on some sequences, in units of the error with nothing on.

    Args:
        net: the target.
        components: C of them.
        x: sequences [B, T].
    """

    @torch.no_grad()
    def __init__(self, net: TwoLayers, components: apd.Components, x: Tensor) -> None:
        self.network, self.components = apd.Network(net, net.weights), components
        self.x, self.asked, self.wanted = x, net.asked(x), self.network(x)
        self.silence = errors(self.run(torch.zeros(components.n_components)), self.wanted)

    def run(self, gates: Tensor, rest: bool = False) -> Tensor:
        """Run with gates [C] for all, or [B, T, C]; with `rest`, also what components miss of the weights."""
        gates = gates.expand(len(self.x), -1) if gates.ndim == 1 else gates
        return self.network(self.x, self.components, gates, remainder=rest)

    @torch.no_grad()
    def error(self, gates: Tensor, rest: bool = False, cut: bool = True) -> Tensor:
        """Compute the error on each task as a share of silence's, at most 1 if it is cut: [3]."""
        found = by_task(errors(self.run(gates, rest), self.wanted), self.asked) / by_task(self.silence, self.asked)
        return found.clamp(max=1) if cut else found

    @torch.no_grad()
    def same(self, gates: Tensor) -> Tensor:
        """Compute the share of positions of each task with the target's own answer: [3]."""
        return by_task((self.run(gates).argmax(-1) == self.wanted.argmax(-1)).float(), self.asked)

    def each(self) -> tuple[Tensor, Tensor]:
        """Take each component out of the target, and keep each alone: errors [C, 3] both."""
        eye = torch.eye(self.components.n_components)
        return torch.stack([self.error(1 - e, rest=True) for e in eye]), torch.stack([self.error(e) for e in eye])


def owners(gone: Tensor, relative: bool = False) -> list[int]:
    """Assign each component to the task that its absence harms most, or to none, -1, where that is little.

    Args:
        gone: errors without each component, [C, 3].
        relative: divide by what a task's error is without a component on average, so that a task which suffers from
            everything does not get everything.
    """
    most, task = gone.max(1)
    task = (gone / gone.mean(0).clamp_min(1e-12)).argmax(1) if relative else task
    return torch.where(most >= HARM, task, -1).tolist()


def group_tests(doing: Doing, owner: list[int]) -> list[list[float]]:
    """Take each task's components away, and keep them alone: [task][own error, others' error; and both alone]."""
    rows = []
    for task in range(len(CIRCUITS)):
        own = torch.tensor([float(o == task) for o in owner])
        gone, alone = doing.error(1 - own, rest=True), doing.error(own)
        others = torch.arange(len(CIRCUITS)) != task
        rows.append([float(v) for v in (gone[task], gone[others].mean(), alone[task], alone[others].mean())])
    return rows


@torch.no_grad()
def by_rule(net: TwoLayers, components: apd.Components, seed: int) -> Row:
    """Ask whose each component is by three rules, and whether the four tests of `group_tests` depend on the rule.

    "Cut" is the rule of `measure`: errors are cut at 1, and of tasks that are harmed equally the first one gets the
    component. "Uncut" does not cut them, so that there are no ties. "Relative" divides them by the task's mean.

    Args:
        net: the target.
        components: C of them.
        seed: of the sequences, those of `measure`.

    Returns:
        Row: owners and tests by rule; and of all components together the uncut error, the share of positions with the
        target's own answer, the median divergence, and the share of its sum in the largest twentieth, by task.
    """
    x = net.data(2048)(0, torch.Generator().manual_seed(20_000 + seed))
    fit, test = (Doing(net, components, half) for half in x.chunk(2))
    all_on = torch.ones(components.n_components)
    gone = torch.stack([fit.error(1 - e, rest=True, cut=False) for e in torch.eye(components.n_components)])
    owner = {"cut": owners(gone.clamp(max=1)), "uncut": owners(gone), "relative": owners(gone, relative=True)}
    each = errors(test.run(all_on), test.wanted)
    by_size = [each[test.asked == task].sort(descending=True).values for task in range(len(CIRCUITS))]
    return {
        "gone": gone.tolist(),
        "rules": {name: {"owner": o, "groups": group_tests(test, o)} for name, o in owner.items()},
        "all": {
            "error": test.error(all_on, cut=False).tolist(),
            "same": test.same(all_on).tolist(),
            "median": [float(v.median()) for v in by_size],
            "largest": [float(v[: max(1, len(v) // 20)].sum() / v.sum().clamp_min(1e-12)) for v in by_size],
        },
    }


class Looking(TwoLayers):
    """The same network, which gives the patterns of its second layer in place of its answers: [B, H, T, T]."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute where the heads of the second layer look."""
        first, second = self.blocks
        return second.patterns(first(self.stream(x)))  # type: ignore[operator]


def looking(net: TwoLayers) -> apd.Network:
    """Give a network of the same weights whose outputs are the second layer's patterns."""
    other = Looking(0, HEADS)
    other.load_state_dict(net.state_dict())
    return apd.Network(other.requires_grad_(False), other.weights)


def to_what_followed(patterns: Tensor, x: Tensor) -> Tensor:
    """Average, where a letter came before, how much each head looks at what followed it: [H]."""
    b, t, s = repeats(x).nonzero().T
    return patterns[b, :, t, s + 1].mean(0)


@torch.no_grad()
def attention(net: TwoLayers, x: Tensor) -> Row:
    """Measure where each head looks: to the position before, to what followed, at the first letter, at itself."""
    patterns = net.patterns(x)  # [B, 2, H, T, T]
    b, t, s = repeats(x).nonzero().T
    q, first = (x == 2 * LETTERS).nonzero().T
    m, own = ((x >= LETTERS) & (x < 2 * LETTERS)).nonzero().T
    found = {
        "before": patterns[b, :, :, s + 1, s],
        "finds": patterns[b, :, :, t, s + 1],
        "first": patterns[q, :, :, first, 0],
        "itself": patterns[m, :, :, own, own],
    }
    return {name: [[round(v, 3) for v in layer] for layer in values.mean(0).tolist()] for name, values in found.items()}


@torch.no_grad()
def attention_without(net: TwoLayers, components: apd.Components, x: Tensor) -> Row:
    """Measure how much the induction head looks at what followed, as it is and without each component."""
    network = looking(net)
    half = len(x) // 2
    head = int(to_what_followed(network(x[:half]), x[:half]).argmax())
    x = x[half:]
    eye = torch.eye(components.n_components)
    gone = [to_what_followed(network(x, components, (1 - e).expand(len(x), -1), remainder=True), x)[head] for e in eye]
    return {"head": head, "target": float(to_what_followed(network(x), x)[head]), "without": [float(v) for v in gone]}


@torch.no_grad()
def moved(net: TwoLayers, components: apd.Components, least: float, seed: int) -> Row:
    """Move the pattern by one position: does the mask have to move with it? Errors on induction as shares of silence.

    Args:
        net: the target.
        components: C of them.
        least: a component is on where its attribution is at least this.
        seed: of the sequences.
    """
    network = apd.Network(net, net.weights)
    x = net.data(4096)(0, torch.Generator().manual_seed(seed))
    asked = net.asked(x)
    x = x[(asked == 0).any(1) & (asked % 3 == 0).all(1)]  # induction and nothing else
    pairs = repeats(x).nonzero()
    x = x[(pairs[:, 1] < POSITIONS - 1) & (pairs[:, 2] > 0)][:512]
    # The first letter stays, the last one comes after it, and all others move on by one.
    order = [0, POSITIONS - 1, *range(1, POSITIONS - 1)]
    there = x[:, order]
    mask, own = (attribution(network, components, y) >= least for y in (x, there))
    doing = Doing(net, components, there)
    gates = {"own": own, "stays": mask, "moves": mask[:, order], "another's": own.roll(1, 0)}
    return {name: float(doing.error(g.float())[0]) for name, g in gates.items()}


@torch.no_grad()
def leaks(net: TwoLayers, components: apd.Components, k: float, seed: int) -> Row:
    """Ask induction at the last position alone, and run sequences with the masks of others: whose answer comes out?"""
    x = net.data(16_384)(0, torch.Generator().manual_seed(seed))
    asked = net.asked(x)
    x = x[(asked[:, -1] == 0) & (asked[:, :-1] == 3).all(1)][:768]
    network = apd.Network(net, net.weights, output=last_position)
    wanted = network(x).argmax(-1)
    if len(wanted.unique()) < 2:
        return {}
    found = leakage(network, components, x, k, outputs="classes", attribution=attribution, seed=seed)
    names = ("own mask", "another's mask: its answer", "another's mask: own answer")
    return {name: [found[name].components, found[name].chance] for name in names}


@torch.no_grad()
def measure(net: TwoLayers, components: apd.Components, k: float, seed: int) -> Row:
    """Measure what components do: bits, masks, each alone and gone, groups of tasks, attention, moved patterns.

    Args:
        net: the target.
        components: C of them.
        k: active at a position.
        seed: of the sequences.
    """
    components = components.map(Tensor.detach)
    network = apd.Network(net, net.weights)
    x = net.data(2048)(0, torch.Generator().manual_seed(20_000 + seed))
    fit, test = (Doing(net, components, half) for half in x.chunk(2))
    all_on = torch.ones(components.n_components)
    owner = owners(fit.each()[0])
    gone, alone = test.each()
    scores = attribution(network, components, x)
    least = float(scores.flatten().topk(max(1, round(k * scores[..., 0].numel()))).values[-1])
    mask = (scores[len(x) // 2 :] >= least).float()
    coin = (torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.5).float()
    gates = {"all": all_on.expand_as(mask), "active": mask, "scrubbed": torch.maximum(mask, coin)}
    gates |= {"another's mask": mask.roll(1, 0)}
    judge = Judge(EPSILONS, divergence="kl", attribution=attribution)
    return {
        "bits": finite(judge(network, components, test.x)),
        "norms": components.norms().tolist(),
        "ranks": torch.stack(list(components.ranks().values())).T.tolist(),
        "owner": owner,
        "gone": gone.tolist(),
        "alone": alone.tolist(),
        "groups": group_tests(test, owner),
        "errors": {name: test.error(g).tolist() for name, g in gates.items()},
        "same": {name: test.same(g).tolist() for name, g in gates.items()},
        "use": [[float(mask[..., c][test.asked == t].mean()) for t in range(4)] for c in range(mask.shape[-1])],
        "attention": attention_without(net, components, x),
        "moved": moved(net, components, least, seed),
        "leaks": leaks(net, components, k, seed),
    }


def finite(bits: float) -> float | None:
    """Give None for bits that are infinite, as JSON has no infinity."""
    return bits if math.isfinite(bits) else None


def target_of(kind: str, seed: int) -> TwoLayers:
    """Train a network, or stop before."""
    net = TwoLayers(seed, HEADS)
    if kind == "untrained":
        net.start(torch.Generator().manual_seed(seed))
    else:
        net.fit(seed, wrong=kind == "labels")
    return net.requires_grad_(False)


def settings_of(job: Job) -> Row:
    """Give the settings of a run: the same for all."""
    return SETTINGS | {"seed": job[1] + 1000}


def taken_apart(job: Job) -> tuple[TwoLayers, apd.Components, float]:
    """Train one network and take it apart: the network, what was found, and the seconds that this took."""
    net, began = target_of(*job), time.process_time()
    judge = Judge(EPSILONS, divergence="kl", attribution=attribution)
    result = apd.decompose(
        net, net.data(BATCH), net.weights, divergence="kl", attribution=attribution, judge=judge, progress=False,
        **settings_of(job),
    )  # fmt: skip
    return net, result.components.map(Tensor.detach), time.process_time() - began


def parts_of(network: apd.Network, found: apd.Components, seed: int) -> dict[str, apd.Components]:
    """Give what was found, and its controls."""
    return {
        "found": found,
        "dealt": controls.dealt(found, seed),
        "turned": controls.dealt(found, seed, turned=True),
        "heads": heads(network.weights),
    }


def rules_of(net: TwoLayers, found: apd.Components, seed: int) -> Row:
    """Measure ownership by several rules, for what was found and its controls."""
    parts = parts_of(apd.Network(net, net.weights), found, seed)
    return short({name: by_rule(net, c, seed) for name, c in parts.items()})


def run_rules(job: Job) -> tuple[list[Row], Tensors]:
    """Take one network apart once more, as `run` does, and ask whose the components are."""
    net, found, _ = taken_apart(job)
    return [rules_of(net, found, job[1])], {}


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Train one network, take it apart, and measure components and controls."""
    _, seed = job
    net, found, seconds = taken_apart(job)
    network, settings = apd.Network(net, net.weights), settings_of(job)
    x = net.data(4096)(0, torch.Generator().manual_seed(30_000 + seed))
    right = (net(x).argmax(-1) == net.answers(x)).float()
    asked = net.asked(x)
    k = settings["top_k"][-1][1] if isinstance(settings["top_k"], tuple) else settings["top_k"]
    row: Row = {
        "accuracy": [right[asked == t].mean().item() for t in range(4)],
        "attention": attention(net, x),
        "relative_faithfulness": apd.metrics.relative_faithfulness(found, network.weights).item(),
        **{name: measure(net, c, k, seed) for name, c in parts_of(network, found, seed).items()},
        "seconds": round(seconds, 1),
    }
    return [short(row)], {}


def short(results: Any) -> Any:
    """Round to four digits after the point: the size of the stored data is limited."""
    if isinstance(results, dict):
        return {name: short(v) for name, v in results.items()}
    if isinstance(results, list):
        return [short(v) for v in results]
    return round(results, 4) if isinstance(results, float) else results


RUNS = Rows(
    fields=("kind", "seed"),
    jobs=lambda rows: [(kind, FIRST + i) for kind, n in SEEDS.items() for i in range(n)],
    run=run,
    settings=lambda job: numbers(settings_of(job), batch=BATCH),
    order=lambda job: (list(SEEDS).index(job[0]), job[1]),
)
RULES = Rows(
    fields=("kind", "seed"),
    jobs=lambda rows: [(kind, FIRST + i) for kind in ("trained", "labels") for i in range(SEEDS[kind])],
    run=run_rules,
    settings=lambda job: numbers(settings_of(job), batch=BATCH),
    order=lambda job: (list(SEEDS).index(job[0]), job[1]),
)
STUDY = Study("induced", {"runs": RUNS, "rules": RULES}, about=lambda processes: {"processes": processes}, compact=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
