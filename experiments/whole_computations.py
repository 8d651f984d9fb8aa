"""Create data/whole_computations.*: causal tests of mechanisms that span two layers (chapter 32).

python -m experiments.whole_computations [--only apd | circuit | residual | judged] [--processes N]   (half an hour)

Planted circuits (`circuits.Circuit`), seeds 7700 to 7704: APD (`SETTINGS`, found on seed 100 in nine runs; the one with
the largest cosines was taken, in which one of four mechanisms was owned), and dictionaries of what each layer writes.
Residual MLPs of 25 and 25 neurons: the stored APD runs of data/residual.*, and dictionaries of the neurons'
activations; the mechanisms are the functions. Dictionaries have 12 features for
a layer of a circuit and 200 for one of a residual MLP, a crosscoder twice as many. Of k = 1, 2, 3 the one with the
fewest bits at a fixed error (`baselines.choose`) on circuit seed 100 was taken for all; no reported network was used.
Scores are those of `causal.scores`; features of two layers are stitched by every rule of `stitch`, and the means of all
rules are stored. "Random" dictionaries had one step of training. Dealt components have the ranks and the sum of the
found ones. The "cut" needs no training: samples on which as few inputs as possible are on, and of each weight what
moves in the stream on them (`causal.cut`); one more part is the rest.

"judged" has dictionaries of residual MLPs again, with nothing changed but the sparsity: BatchTopK, whose k is chosen
for each dictionary of each network by bits (`baselines.choose`) from the wider grid of chapter 30, without a truth.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.study import baselines, controls
from apd_minimal.targets import ResidualMLP
from experiments.causal import (
    Crossed,
    Features,
    Model,
    Weights,
    best,
    correlations,
    cut,
    effects,
    plainest,
    scores,
    stitched,
)
from experiments.circuits import Circuit
from experiments.experiment import Row, Rows, Study, Tensors, factors, numbers, of, ownership_lists, prefix, taken_apart
from experiments.residual import stored_target as stored_mlp

SEEDS, RESIDUAL = range(7700, 7705), range(5)
SETTINGS: dict[str, Any] = {
    "n_components": 6, "rank": 3, "top_k": 1.3, "steps": 2500, "scrub": 1.0, "simplicity": ((0.0, 5.0), (0.7, 0.0)),
    "restarts": 2,
}  # fmt: skip
METHODS = (
    "APD", "APD dealt", "truth", "cut", "SAE", "SAE random", "transcoder", "transcoder random", "crosscoder", "neurons",
)  # fmt: skip
SPARSITY = {"SAE": ("topk", 2), "transcoder": ("topk", 3), "crosscoder": ("topk", 2)}
FIT = {"steps": 2000, "lr": 3e-3}  # of every dictionary
JUDGED, GRID = " judged", (0.5, 0.7, 1.0, 1.5, 2.5, 4.0, 6.0)  # methods whose k is chosen for each network


def batches(target: Circuit) -> Any:
    """Draw 128 inputs a step."""
    return lambda step, generator: target.batch(step, generator, 128)


def taken(job: tuple[int]) -> tuple[list[Row], Tensors]:
    """Take one circuit apart by APD."""
    (seed,) = job
    target = Circuit(seed)
    result, seconds = taken_apart(
        target, {**SETTINGS, "batches": batches(target), "weights": target.weights, "seed": seed}
    )
    own = apd.metrics.ownership(result.components, target.truth)
    row = {"seconds": seconds, "scores": result.scores, **ownership_lists(own)}
    return [row], factors(result.components.map(Tensor.detach), prefix(job))


def one_at_a_time(target: Any) -> Tensor:
    """Draw inputs of one mechanism each, [J, N, n]; of a circuit, without the distractor but in its own place."""
    generator = torch.Generator().manual_seed(7)
    if isinstance(target, Circuit):
        J = target.J
        x = torch.zeros(J + 1, 200, 2 * J + 1)
        values = 2 * torch.rand(J + 1, 200, 2, generator=generator) - 1
        for j in range(J):
            x[j, :, [j, J + j]] = values[j]
        x[J, :, 2 * J] = values[J, :, 0]
        return x
    values = 2 * torch.rand(10, generator=generator) - 1
    x = torch.zeros(target.n_features, 10, target.n_features)
    x[torch.arange(target.n_features), :, torch.arange(target.n_features)] = values
    return x


def dictionaries(method: str, target: Any, seed: int) -> list[baselines.Dictionary]:
    """Train the dictionaries of both layers, or one crosscoder; the random ones are as they begin."""
    kind, k = SPARSITY[method.split()[0]]
    circuit = isinstance(target, Circuit)
    data = batches(target) if circuit else target.data(256)
    holds, size = ("write", 12) if circuit else ("neurons", 200)
    places = [f"output of {holds}.{i}" for i in range(2)]
    settings: dict[str, Any] = {"kind": kind, "sparsity": k, "seed": seed, **FIT}
    if "random" in method:
        settings |= {"steps": 1, "revive": 0}
    if method.endswith(JUDGED):
        settings = {"kind": "batch_topk", "grid": GRID, "seed": seed, **FIT}

    def fit(*arguments: Any, **more: Any) -> baselines.Dictionary:
        if method.endswith(JUDGED):
            return baselines.choose(target, data, *arguments, **more).best
        return baselines.fit(target, data, *arguments, **more)

    if method.startswith("crosscoder"):
        return [fit(places, 2 * size, **settings)]
    reads = [f"output of read.{i}" for i in range(2)] if method.startswith("transcoder") else places
    more: list[dict[str, Any]] = [{"writes": place} if method.startswith("transcoder") else {} for place in places]
    return [fit(read, size, **settings, **m) for read, m in zip(reads, more, strict=True)]


def many(target: Any) -> Tensor:
    """Draw inputs for the cut, as in training, that nothing else has seen: [8192, n]."""
    generator = torch.Generator().manual_seed(9)
    return target.batch(0, generator, 8192) if isinstance(target, Circuit) else target.data(8192)(0, generator)


def stitch(parts: Features, x: Tensor) -> dict[str, list[Any]]:
    """Give the groups of every rule: by correlated codes, by the effect of one on the other, and by weights."""
    r = x @ parts.model.embed
    codes = [parts.codes(0, r), parts.codes(1, r + parts.model.layer(0, r))]
    active = [(c > 0).any(0) for c in codes]
    reads = parts.model.reads[1]
    if parts.before and parts.dictionaries is not None:  # a transcoder's encoder, in the stream
        reads = reads @ (parts.dictionaries[1].encoder.detach().T * parts.dictionaries[1].scale_in).T
    elif parts.dictionaries is not None:  # an autoencoder has none: along its direction, back through the layer
        reads = reads @ torch.linalg.pinv(parts.model.writes[1]).T @ parts.directions[1].T
    tables = {
        "correlation": correlations(*codes),
        "effect": effects(parts, x),
        "weights": torch.nn.functional.cosine_similarity(parts.directions[0][:, None], reads.T[None], dim=2).abs(),
    }
    groups: dict[str, list[Any]] = {
        f"{name}, onto {('first', 'second')[onto]}": stitched(table, active, onto=onto)
        for name, table in tables.items()
        for onto in (0, 1)
    }
    return groups | {"none": [((f,), ()) for f in active[0].nonzero().flatten().tolist()]
                     + [((), (f,)) for f in active[1].nonzero().flatten().tolist()]}  # fmt: skip


def causes(method: str, target: Any, components: apd.Components, seed: int) -> Row:
    """Measure one method on one network: the scores of every rule, and those of the best."""
    model, inputs = Model.of(target), one_at_a_time(target)
    if isinstance(target, ResidualMLP) and not method.startswith(("APD", "cut")):
        model = model.short
    held = (batches(target) if isinstance(target, Circuit) else target.data(1024))(0, torch.Generator().manual_seed(8))
    made: list[baselines.Dictionary] | None = None
    if method in ("APD", "APD dealt", "truth", "cut"):
        if method == "truth":
            components = apd.Components.from_matrices(target.truth)
        elif method == "cut":
            components = cut(model, plainest(many(target)))
        elif method == "APD dealt":
            components = controls.dealt(components, seed=seed, turned=True)
        kept = (components.norms() > 0.01 * components.norms().max()).nonzero().flatten().tolist()
        rules: dict[str, Tensor] = {"": scores(Weights(model, components), kept, inputs)}
    elif method.startswith("crosscoder"):
        made = dictionaries(method, target, seed)
        crossed = Crossed(model, made)
        on = (crossed.all_codes(held) > 0).any(0).nonzero().flatten().tolist()
        rules = {"": scores(crossed, [((f,), (f,)) for f in on], inputs)}
    else:
        made = None if method == "neurons" else dictionaries(method, target, seed)
        parts = Features(model, made, before=method.startswith("transcoder"))
        rules = {name: scores(parts, groups, inputs) for name, groups in stitch(parts, held).items() if groups}
    found = {name: best(table)[1] for name, table in rules.items()}
    name = max(found, key=lambda rule: float(found[rule].mean()))
    own = found[name]
    each = {rule: round(float(value.mean()), 4) for rule, value in found.items()}
    chance = float(rules[name].mean(1).mean())  # a group drawn at random
    last = own[: target.J] if isinstance(target, Circuit) else own
    facts = {"rule": name, "rules": each, "groups": rules[name].shape[1], "at_random": chance}
    if method.endswith(JUDGED):
        assert made is not None
        facts["k"] = [own.sparsity for own in made]
    tests = {test: own[:, i].tolist() for i, test in enumerate(("ablate", "keep", "swap"))}
    row = facts | tests | {"mean": float(last.mean())}
    if method == "cut" and isinstance(target, Circuit):
        row["owned"] = apd.metrics.ownership(components, target.truth).owned.tolist()
    return row


def circuit_run(job: tuple[str, int]) -> tuple[list[Row], Tensors]:
    """Measure one method on one circuit."""
    method, seed = job
    components = (
        of("whole_computations", f"{seed}/")[0] if method.startswith("APD") else apd.Components.random({"-": (1, 1)}, 1)
    )
    return [causes(method, Circuit(seed), components, seed)], {}


def judged_run(job: tuple[str, int]) -> tuple[list[Row], Tensors]:
    """Measure one kind of dictionary on one residual MLP, its k chosen by bits; seconds are those of all of it."""
    start, (method, seed) = time.process_time(), job
    (row,), none = residual_run((method + JUDGED, seed))
    return [row | {"seconds": round(time.process_time() - start, 1)}], none


def residual_run(job: tuple[str, int]) -> tuple[list[Row], Tensors]:
    """Measure one method on one residual MLP."""
    method, seed = job
    target, components = stored_mlp("25-25", seed)
    return [causes(method, target, components, seed)], {}


def order(job: tuple[str, int]) -> tuple[int, int]:
    """Sort by method."""
    return METHODS.index(job[0]), job[1]


APD = Rows(("seed",), lambda rows: [(s,) for s in SEEDS], taken, lambda job: numbers(SETTINGS, seed=job[0]))
CIRCUIT = Rows(("method", "seed"), lambda rows: [(m, s) for m in METHODS for s in SEEDS], circuit_run, order=order)
RESIDUALS = Rows(
    ("method", "seed"),
    lambda rows: [(m, s) for m in METHODS if m != "truth" for s in RESIDUAL],
    residual_run,
    order=order,
)
AGAIN = Rows(
    ("method", "seed"),
    lambda rows: [(m, s) for m in SPARSITY for s in RESIDUAL],
    judged_run,
    lambda job: FIT | {"grid": GRID},
    order,
)
PARTS = {"apd": APD, "circuit": CIRCUIT, "residual": RESIDUALS, "judged": AGAIN}
STUDY = Study("whole_computations", PARTS, compact=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
