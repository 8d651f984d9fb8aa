"""Create data/leakage.json: do the masks of the stored decompositions give answers away (chapter 27)?

python -m experiments.leaks [--only tms-5-2 ...] [--processes N]     (about ten minutes of a core)

Nothing is trained: components and targets are those of the other studies, and their seeds too. The inputs are drawn
from streams that no run has seen, and samples without any input on are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.config import at_progress
from apd_minimal.study import controls
from apd_minimal.targets.transformer import Transformer, answer_shares, last_position
from experiments import gated, larger, residual, tms, unknown
from experiments.experiment import Row, Rows, Study, Tensors, of, stored

SAMPLES = 4096
FEW, FEWER = 2048, 1024  # where a run takes long
SEED = 0  # of the pairs and of the deal
Job = tuple[str, int]  # decompositions, seed


def tables(sets: dict[str, apd.Components], target: Any, x: Tensor, k: Any, **settings: Any) -> Row:
    """Measure several sets of components in the same way."""
    done = {}
    for name, components in sets.items():
        found = apd.leakage.leakage(target, components, x, k, seed=SEED, **settings)
        done[name] = {
            "scores": {test: [s.components, s.dealt, s.target, s.chance] for test, s in found.scores.items()},
            "bits": {what: [b.bits, b.shuffled, b.ceiling] for what, b in found.bits.items()},
            "pairs": found.pairs,
            "active": found.active,
        }
    short: Row = larger.short(done)
    return short


def toy(name: str, identity: bool, rotated: bool, recipe: str, seed: int) -> Row:
    """Measure a toy model of superposition, beside the truth and the split of its weight by input columns."""
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
    at = settings.get("attribute_at", "target")
    return tables(sets, target, x, k, at=at, attribution=settings.get("attribution"))


class Computed(apd.targets.ResidualMLP):
    """A residual MLP without what passes by its layers, of which no mask can take anything away."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., n_features] to what the layers add to the outputs, [..., n_features]."""
        return super().forward(x) - x @ self.embedding @ self.embedding.T


def residual_mlp(name: str, seed: int) -> Row:
    """Measure a residual MLP; answers are what its layers compute."""
    components, state = of("residual", residual.prefix((name, seed)))
    target, computed = (kind(neurons=residual.SIZES[name], seed=seed) for kind in (residual.ResidualMLP, Computed))
    target.load_state_dict(state, strict=False)
    computed.load_state_dict(state, strict=False)
    recipe, whole = target.recipe, apd.Network(target, target.weights)
    data = apd.data.SparseFeatures(target.n_features, target.probability, -1.0, 1.0, FEW, nonempty=True)
    x = data(0, torch.Generator().manual_seed(55_000 + seed))

    def attribution(network: apd.Network, components: apd.Components, x: Tensor) -> Tensor:
        return target.attributions(whole, components, x)

    return tables({"found": components}, computed, x, at_progress(recipe["top_k"], 1.0), attribution=attribution)


def functions(recipe: str, seed: int) -> Row:
    """Measure hand-coded gated functions, beside the truth; the answer is y."""
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
    return tables(sets, target, x, settings["top_k"], blank=blank, attribution=attribution)


def perceptron(seed: int) -> Row:
    """Measure the perceptron of chapter 12, which answers eight questions about eight bits."""
    net = torch.nn.Sequential(
        torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2)
    )
    net.load_state_dict({n.removeprefix("net."): t for n, t in stored("unknown").items() if n.startswith("net.")})
    components, _ = of("unknown", f"full/12/2.0/{seed}/")
    x, asked, _ = unknown.samples(torch.Generator().manual_seed(55_000), SAMPLES)
    blank = {
        "bits zero": lambda x: torch.cat([0 * x[:, :8], x[:, 8:]], dim=1),
        "bits of another": lambda x: torch.cat([x[:, :8].roll(1, 0), x[:, 8:]], dim=1),
    }
    return tables({"found": components}, net, x, 2.0, outputs="classes", blank=blank, tasks=asked)


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


def transformer(kind: str, seed: int) -> Row:
    """Measure the transformer of chapter 23."""
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
    components, k, tasks = apd.Components(A, B), recipe["top_k"], x[:, 0] - target.n_letters
    how = {"outputs": "classes", "blank": blank}
    done = tables({"found": components}, network, x, k, tasks=tasks, attribution=answer_shares, **how)
    if kind == "answer":  # the same components, chosen by other attributions
        x, tasks = x[:FEWER], tasks[:FEWER]
        for name, attribution in (("all logits", all_logits), ("activation", apd.attributions.activation)):
            done |= tables({name: components}, network, x, k, tasks=tasks, attribution=attribution, **how)
    return done


def all_logits(network: apd.Network, components: apd.Components, x: Tensor) -> Tensor:
    """Compute gradient attributions to all logits, as shares of their sum on each sample: [B, C]."""
    scores = apd.attributions.gradient(network, components, x, internal_batch_size=32)
    return scores / scores.sum(-1, keepdim=True)


KINDS: dict[str, tuple[range, Callable[[int], Row]]] = {}
for _size, _seeds in tms.SEEDS.items():
    KINDS[_size] = _seeds, lambda seed, n=_size: toy(n, False, False, "ours", seed)  # type: ignore[misc]
    KINDS[f"{_size}-rotated"] = _seeds, lambda seed, n=_size: toy(n, False, True, "ours", seed)  # type: ignore[misc]
KINDS["tms-5-2-identity"] = range(10, 20), lambda seed: toy("tms-5-2", True, False, "ours", seed)
KINDS["tms-40-10-identity"] = range(20, 23), lambda seed: toy("tms-40-10", True, False, "ours", seed)
KINDS["tms-5-2-plain"] = range(10, 15), lambda seed: toy("tms-5-2", False, False, "plain", seed)
KINDS["tms-40-10-plain"] = range(20, 23), lambda seed: toy("tms-40-10", False, False, "plain", seed)
for _size, _seeds in residual.SEEDS.items():
    KINDS[f"residual-{_size}"] = _seeds, lambda seed, n=_size: residual_mlp(n, seed)  # type: ignore[misc]
KINDS["gated"] = range(10), lambda seed: functions("ours", seed)
KINDS["perceptron"] = range(4), perceptron
KINDS["transformer-answer"] = range(2), lambda seed: transformer("answer", seed)
KINDS["transformer-reading"] = range(2), lambda seed: transformer("reading", seed)


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Measure one decomposition."""
    kind, seed = job
    return [{"tables": KINDS[kind][1](seed)}], {}


RUNS = Rows(
    ("kind", "seed"),
    lambda rows: [(kind, seed) for kind, (seeds, _) in KINDS.items() for seed in seeds],
    run,
    order=lambda job: (list(KINDS).index(job[0]), job[1]),
)
STUDY = Study("leakage", {"runs": RUNS}, compact=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
