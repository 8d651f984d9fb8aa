"""Create data/leakage.json: do the masks of the stored decompositions give answers away (chapter 27)?

python -m experiments.leaks [--only tms-5-2 ...] [--processes N]     (about twenty minutes of a core)

Components and targets are those of the other studies, and their seeds too; four networks whose parts are not stored,
and twelve runs on an OR, are taken apart again, which takes four minutes (experiments/leaks_later.py). The inputs are
drawn from streams that no run has seen, and samples without any input on are left out. "runs" has one deal of the dealt
control for each decomposition, "deals" six for some kinds (the first is that of "runs"), "random" the same measures of
networks whose weights were shuffled, "room" what a mask could spell and an answer needs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.attributions import Attribution
from apd_minimal.config import at_progress
from apd_minimal.study import controls
from apd_minimal.study.leakage import _only_ordered
from apd_minimal.targets.transformer import Transformer, answer_shares, last_position
from experiments import gated, larger, residual, tms, unknown
from experiments.experiment import Row, Rows, Study, Tensors, of, stored
from experiments.leaks_cases import FEW, FEWER, SAMPLES, Case, Kind, PartOf, bits_of, further, set_bits, shuffled
from experiments.leaks_later import later

SEED = 0  # of the pairs and of the deal
DEALS = ((0, 1), (2, 3), (4, 5))  # seeds of the deals that are compared
Job = tuple[str, int]  # decompositions, seed


def table(case: Case, components: apd.Components, **settings: Any) -> Row:
    """Measure one set of components."""
    given = {"seed": SEED, **case.settings, **settings}
    found = apd.leakage.leakage(case.target, components, case.x, case.k, **given)
    short: Row = larger.short(
        {
            "scores": {test: [s.components, s.dealt, s.target, s.chance] for test, s in found.scores.items()},
            "bits": {what: [b.bits, b.shuffled, b.ceiling] for what, b in found.bits.items()},
            "pairs": found.pairs,
            "active": found.active,
        }
    )
    return short


def tables(case: Case) -> Row:
    """Measure all sets of components, and what was found with other rules."""
    done = {name: table(case, components) for name, components in case.sets.items()}
    few = {"tasks": case.settings["tasks"][:FEWER]} if "tasks" in case.settings else {}
    for name, attribution in case.rules.items():  # the same components, chosen by other attributions
        fewer = Case(case.target, case.x[:FEWER], case.k, case.sets, case.settings | few)
        done[name] = table(fewer, case.sets["found"], attribution=attribution)
    return done


def toy(name: str, identity: bool, rotated: bool, recipe: str, seed: int) -> Case:
    """Build the case of a toy model of superposition, beside the truth and the split of its weight by input columns."""
    components, state = of("tms", tms.prefix((name, identity, rotated, recipe, seed)))
    target = apd.targets.TMS(*tms.SIZES[name], identity=identity)
    if rotated:
        target.rotate(seed=seed)
    target.load_state_dict(state, strict=False)  # the decoder is tied
    settings = tms.recipe_of(target, recipe)
    data, k = settings["batches"], at_progress(settings["top_k"], 1.0)
    x = target.data(SAMPLES, nonempty=True)(0, torch.Generator().manual_seed(55_000 + seed))
    k = k if data.nonempty else k / target.data(1, nonempty=True).share_nonempty
    sets = {"found": components}
    if not identity:
        sets["input columns"] = controls.input_columns(apd.Network(target, target.weights).weights)
        sets |= {"truth": apd.Components.from_matrices(target.mechanisms())} if rotated else {}
    how = {"at": settings.get("attribute_at", "target"), "attribution": settings.get("attribution")}
    return Case(target, x, k, sets, how, answer=set_bits(target.n_features, target.data(1).probability))


def residual_mlp(name: str, seed: int) -> Case:
    """Build the case of a stored residual MLP."""
    return layers_of(name, seed, *residual.stored_target(name, seed))


def layers_of(name: str, seed: int, target: apd.targets.ResidualMLP, components: apd.Components) -> Case:
    """Build the case of a residual MLP; answers are what its layers compute."""
    computed = PartOf(neurons=residual.SIZES[name], seed=seed)
    computed.load_state_dict(target.state_dict())
    recipe, whole = target.recipe, apd.Network(target, target.weights)
    data = apd.data.SparseFeatures(target.n_features, target.probability, -1.0, 1.0, FEW, nonempty=True)
    x = data(0, torch.Generator().manual_seed(55_000 + seed))

    def attribution(network: apd.Network, components: apd.Components, x: Tensor) -> Tensor:
        return target.attributions(whole, components, x)

    how, bits = {"attribution": attribution}, set_bits(target.n_features, target.probability)
    k = at_progress(recipe["top_k"], 1.0)
    return Case(computed.without(target.weights), x, k, {"found": components}, how, answer=bits)


def functions(recipe: str, seed: int) -> Case:
    """Build the case of hand-coded gated functions, beside the truth; the answer is y."""
    shown, settings = gated.settings_of(recipe, seed)
    target = apd.targets.GatedFunctions(seed=seed)
    components, _ = of("gated", gated.prefix((recipe, seed)))
    whole = apd.Network(shown, shown.weights)
    x = target.data(SAMPLES, nonempty=True)(0, torch.Generator().manual_seed(55_000 + seed))
    own = settings.get("attribution")

    def attribution(network: apd.Network, components: apd.Components, x: Tensor) -> Tensor:
        return own(whole, components, x) if own else apd.attributions.gradient(whole, components, x)

    def bits_off(x: Tensor) -> Tensor:
        return torch.cat([x[:, :1], torch.zeros_like(x[:, 1:])], dim=1)

    def other_x(x: Tensor) -> Tensor:
        return torch.cat([x[:, :1].roll(1, 0), x[:, 1:]], dim=1)

    sets = {"found": components, "truth": apd.Components.from_matrices(target.mechanisms())}
    blank = {"control bits off": bits_off, "x of another": other_x}
    how, bits = {"blank": blank, "attribution": attribution}, set_bits(target.n_functions, target.probability)
    return Case(target, x, settings["top_k"], sets, how, answer=bits)


def perceptron(length: str, C: int, k: float, seed: int) -> Case:
    """Build the case of the perceptron of chapter 12, which answers eight questions about eight bits."""
    net = torch.nn.Sequential(
        torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2)
    )
    net.load_state_dict({n.removeprefix("net."): t for n, t in stored("unknown").items() if n.startswith("net.")})
    components, _ = of("unknown", f"{length}/{C}/{k}/{seed}/")
    x, asked, _ = unknown.samples(torch.Generator().manual_seed(55_000), SAMPLES)
    blank = {
        "bits zero": lambda x: torch.cat([0 * x[:, :8], x[:, 8:]], dim=1),
        "bits of another": lambda x: torch.cat([x[:, :8].roll(1, 0), x[:, 8:]], dim=1),
    }
    return Case(net, x, k, {"found": components}, {"outputs": "classes", "blank": blank, "tasks": asked})


def blind(target: Transformer, letters: bool, task: bool) -> Transformer:
    """Copy a transformer, with embeddings of zero for what it must not see."""
    copy = Transformer(seed=0)
    copy.load_state_dict(target.state_dict())
    copy.requires_grad_(False)
    if letters:
        copy.embed.weight[: target.n_letters] = 0
    if task:
        copy.embed.weight[target.n_letters :] = 0
    return copy


def transformer(kind: str, seed: int) -> Case:
    """Build the case of the transformer of chapter 23."""
    target = larger.stored_target()
    name = f"{kind}-{seed}"
    recipe = larger.recipe_of(target, name)
    tensors = {n: t.float() for n, t in stored("larger").items() if n.startswith(name)}
    A, B = ({p: tensors[f"{name}.{f}.{p}"] for p in recipe["weights"]} for f in "AB")
    x = target.data(FEW)(0, torch.Generator().manual_seed(55_000))
    blank = {
        "letters hidden": blind(target, letters=True, task=False),
        "all hidden": blind(target, letters=True, task=True),
        "letters of another": lambda x: torch.cat([x[:, :1], x[:, 1:].roll(1, 0)], dim=1),
    }
    network = apd.Network(target, recipe["weights"], output=last_position)
    how = {"outputs": "classes", "blank": blank, "tasks": x[:, 0] - target.n_letters, "attribution": answer_shares}
    others: dict[str, Attribution] = {"all logits": all_logits, "activation": apd.attributions.activation}
    rules = others if kind == "answer" else {}
    return Case(network, x, recipe["top_k"], {"found": apd.Components(A, B)}, how, rules=rules)


def all_logits(network: apd.Network, components: apd.Components, x: Tensor) -> Tensor:
    """Compute gradient attributions to all logits, as shares of their sum on each sample: [B, C]."""
    scores = apd.attributions.gradient(network, components, x, internal_batch_size=32)
    return scores / scores.sum(-1, keepdim=True)


KINDS: dict[str, Kind] = {}
for _size, _seeds in tms.SEEDS.items():
    KINDS[_size] = _seeds, partial(toy, _size, False, False, "ours")
    KINDS[f"{_size}-rotated"] = _seeds, partial(toy, _size, False, True, "ours")
KINDS["tms-5-2-identity"] = range(10, 20), partial(toy, "tms-5-2", True, False, "ours")
KINDS["tms-40-10-identity"] = range(20, 23), partial(toy, "tms-40-10", True, False, "ours")
KINDS["tms-5-2-plain"] = range(10, 15), partial(toy, "tms-5-2", False, False, "plain")
KINDS["tms-40-10-plain"] = range(20, 23), partial(toy, "tms-40-10", False, False, "plain")
for _size, _seeds in residual.SEEDS.items():
    KINDS[f"residual-{_size}"] = _seeds, partial(residual_mlp, _size)
KINDS["gated"] = range(10), partial(functions, "ours")
KINDS["perceptron"] = range(4), partial(perceptron, "full", 12, 2.0)
KINDS["transformer-answer"] = range(2), partial(transformer, "answer")
KINDS["transformer-reading"] = range(2), partial(transformer, "reading")
FIRST = list(KINDS)
KINDS["gated, plain"] = range(5), partial(functions, "plain")
for _job in unknown.JOBS:
    if _job[0] == "short":
        KINDS[f"perceptron, C = {_job[1]}, k = {_job[2]:g}"] = range(2), partial(perceptron, *_job)
KINDS |= further() | later()
DEALT = [kind for kind in FIRST if not any(word in kind for word in ("plain", "identity", "reading"))]
SHUFFLED = ["tms-5-2", "tms-40-10", "residual-50", "gated", "perceptron", "transformer-answer"]


def case_of(job: Job) -> Case:
    """Build the case of a decomposition."""
    return KINDS[job[0]][1](job[1])


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Measure one decomposition."""
    return [{"tables": tables(case_of(job))}], {}


def deal(job: Job) -> tuple[list[Row], Tensors]:
    """Measure one decomposition's parts, dealt six times."""
    case, rows = case_of(job), []
    found = case.sets["found"]
    turned = _only_ordered(found)
    for pair in DEALS:
        one, other = (controls.dealt(found, seed, turned=turned) for seed in pair)
        both = table(case, one, control=other)["scores"]
        for column, seed in enumerate(pair):
            rows.append({"deal": seed, "scores": {test: score[column] for test, score in both.items()}})
    return rows, {}


def shuffle(job: Job) -> tuple[list[Row], Tensors]:
    """Measure a network that learned nothing."""
    case = shuffled(case_of((job[0], KINDS[job[0]][0][0])), job[1])
    if "transformer" in job[0]:
        case.settings["attribution"] = answer_shares
    return [{"table": table(case, case.sets["found"])}], {}


def room(job: Job) -> tuple[list[Row], Tensors]:
    """Count the components that are not zero, and the bits of the answer."""
    row: Row = larger.short(bits_of(case_of(job)))
    return [row], {}


def order(job: Job) -> tuple[int, int]:
    """Sort by kind, as they are listed."""
    return list(KINDS).index(job[0]), job[1]


def jobs(kinds: list[str]) -> list[Job]:
    """List the decompositions of some kinds."""
    return [(kind, seed) for kind in kinds for seed in KINDS[kind][0]]


FIELDS = ("kind", "seed")
LISTS = {
    "runs": Rows(FIELDS, lambda rows: jobs(list(KINDS)), run, order=order),
    "room": Rows(FIELDS, lambda rows: jobs(list(KINDS)), room, order=order),
    "deals": Rows(FIELDS, lambda rows: jobs(DEALT), deal, order=order),
    "random": Rows(FIELDS, lambda rows: [(kind, seed) for kind in SHUFFLED for seed in range(2)], shuffle, order=order),
}
STUDY = Study("leakage", LISTS, compact=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
