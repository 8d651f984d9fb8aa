"""Create data/baselines.json: one network, many ways to take it apart (chapter 30).

python -m experiments.baselines [--only tms-5-2 | tms-40-10 | tms-5-2-identity | 50 | 25-25]     (two hours of a core)

Targets and APD's components are those of data/tms.* and data/residual.*. No setting of a dictionary was chosen on
them: sizes are those of APD's recipe, and the sparsity is chosen for each by bits, without the truth.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import apd_minimal as apd
from apd_minimal.study import baselines, controls
from apd_minimal.targets import TMS, ResidualMLP
from experiments import residual
from experiments.experiment import DATA, Row, Rows, Study, Tensors, of, taken_apart

SIZES = {"tms-5-2": (5, 2), "tms-40-10": (40, 10), "tms-5-2-identity": (5, 2)}
SEEDS = {
    "tms-5-2": range(10, 15), "50": range(5), "25-25": range(5), "tms-40-10": range(20, 25),
    "tms-5-2-identity": range(10, 15),
}  # fmt: skip
TARGETS = tuple(SEEDS)
KINDS = {  # of a TMS's autoencoders; everything else is "batch_topk"
    "SAE, L1": "relu", "SAE, TopK": "topk", "SAE, BatchTopK": "batch_topk",
    "SAE, BatchTopK, untrained network": "batch_topk",
}  # fmt: skip
GRID: dict[str, Any] = {"relu": (0.03, 0.1, 0.3), "topk": (1, 2, 3), "batch_topk": (0.7, 1.0, 1.5, 2.5)}
FIT: dict[str, Any] = {"steps": 1000, "lr": 1e-2}
LARGE: dict[str, Any] = {"steps": 400, "lr": 1e-2}  # of the residual MLPs, whose stream has 1,000 numbers
LARGE_GRID = (1.0, 1.5, 2.5)
EPSILONS = apd.rate.EPSILONS
AUTOENCODERS, TRANSCODERS = ("SAE, L1", "SAE, TopK", "SAE, BatchTopK"), ("transcoder", "transcoder with skip")
EQUAL_SECONDS: dict[str, tuple[range, tuple[str, ...]]] = {  # what is chosen again, with as many seconds as APD took
    "tms-5-2": (SEEDS["tms-5-2"], AUTOENCODERS + TRANSCODERS),
    "tms-40-10": (SEEDS["tms-40-10"], AUTOENCODERS + TRANSCODERS),
    "tms-5-2-identity": (SEEDS["tms-5-2-identity"], (*AUTOENCODERS, "crosscoder", *TRANSCODERS)),
    "50": (SEEDS["50"], ("SAE, BatchTopK, layer 0", *TRANSCODERS)),
    "25-25": (SEEDS["25-25"], ("SAE, BatchTopK, layer 0", "crosscoder")),
}
WIDER: dict[str, dict[str, tuple[float, ...]]] = {  # where the choice above fell on an end of the grid
    "tms-40-10": {
        "SAE, L1": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
        "SAE, TopK": (1, 2, 3, 4, 6),
        "SAE, BatchTopK": (0.7, 1.0, 1.5, 2.5, 4.0, 6.0),
        "transcoder": (0.7, 1.0, 1.5, 2.5, 4.0, 6.0),
        "transcoder with skip": (0.2, 0.4, 0.7),
    },
    "tms-5-2": {"SAE, L1": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0), "transcoder with skip": (0.2, 0.4, 0.7)},
    "50": {  # where two kinds of autoencoders were run for this only
        "SAE, L1, layer 0": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
        "SAE, TopK, layer 0": (1, 2, 3, 4, 6),
        "SAE, BatchTopK, layer 0": (0.5, 0.7, 1.0, 1.5, 2.5, 4.0),
    },
    "25-25": {
        **dict.fromkeys(("SAE, L1, layer 0", "SAE, L1, layer 1"), (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)),
        **dict.fromkeys(("SAE, TopK, layer 0", "SAE, TopK, layer 1"), (1, 2, 3, 4, 6)),
        **dict.fromkeys(
            ("SAE, BatchTopK, layer 0", "SAE, BatchTopK, layer 1", "crosscoder"), (0.5, 0.7, 1.0, 1.5, 2.5, 4.0, 6.0)
        ),
    },
}
SPLIT = {"tms-5-2": (range(10, 13), (1, 2, 4, 8)), "tms-40-10": (range(20, 23), (1, 2, 4, 8))}
Target = TMS | ResidualMLP


def loaded(name: str, seed: int) -> tuple[Target, apd.Components]:
    """Load a stored target and APD's components of it."""
    if name in residual.SIZES:
        return residual.stored_target(name, seed)
    target = TMS(*SIZES[name], identity=name.endswith("identity"))
    components, state = of("tms", f"{name}/ours/{seed}/")
    target.load_state_dict(state, strict=False)  # the decoder is tied
    return target, components


def hidden(target: Target) -> list[str]:
    """List the places between a network's layers where autoencoders read: a TMS's hidden numbers, or its neurons."""
    if isinstance(target, TMS):
        return ["output of encode", "output of middle"][: 1 if target.middle is None else 2]
    return [f"output of neurons.{i}" for i in range(len(target.neurons))]


def dictionaries(target: Target) -> dict[str, Row]:
    """List the dictionaries of a network: for each method, its kind and places, as arguments of `baselines.fit`."""
    places, batch = hidden(target), {"kind": "batch_topk"}
    found: dict[str, Row]
    if isinstance(target, TMS):
        found = {method: {"kind": kind, "reads": places[0]} for method, kind in KINDS.items()}
        layer = {"reads": "input of encode", "writes": "output of encode"}
    else:
        found = {
            f"{method}, layer {i}": {"kind": KINDS[method], "reads": place}
            for method in AUTOENCODERS
            for i, place in enumerate(places)
        }
        layer = {"reads": "input of read.0", "writes": "output of write.0"}
    if len(places) > 1:
        found["crosscoder"] = batch | {"reads": places}
    if isinstance(target, TMS) or len(places) == 1:  # else the layer is not the whole network
        found |= {"transcoder": batch | layer, "transcoder with skip": batch | layer | {"skip": True}}
    return found


def in_table(target: Target) -> list[str]:
    """List the dictionaries of the table; on residual networks L1 and TopK are in `wider` alone."""
    later = ("SAE, L1", "SAE, TopK") if isinstance(target, ResidualMLP) else ()
    return [method for method in dictionaries(target) if not method.startswith(later)]


def held_out(target: Target, seed: int, n: int = 2048) -> Tensor:
    """Draw inputs that no training saw, from the source that all methods are trained on."""
    batches, generator = target.recipe["batches"], torch.Generator().manual_seed(70_000 + seed)
    parts = [batches(i, generator) for i in range(math.ceil(n / batches.batch_size))]
    return torch.cat(parts)[:n]


def rounded(values: Iterable[float]) -> list[float | None]:
    """Round what was counted at each error; None where it is not reached."""
    return [round(v, 3) if math.isfinite(v) else None for v in values]


def by_weights(target: Target, components: apd.Components, x: Tensor, active: float) -> Row:
    """Measure a decomposition of the weights: ownership, bits, scrubbing, faithfulness."""
    weights = apd.Network(target, target.weights).weights
    own = target.ownership(components)
    errors = apd.metrics.scrubbing(target, components, x, active, attribution=target.attributions)
    costs = apd.rate.costs(target, components, x, EPSILONS, attribution=target.attributions)
    with torch.no_grad():
        wanted = target(x)
        variance = (wanted - wanted.mean(0)).square().mean().item()
    return {
        "owned": int(own.owned.sum()),
        "cosine": round(own.cosine.mean().item(), 4),
        "bits": rounded(c.bits() for c in costs),
        "ranks": rounded(c.ranks for c in costs),
        "in_use": int((components.norms() > 0.01 * components.norms().max()).sum()),
        "unfaithful": round(apd.metrics.relative_faithfulness(components, weights).item(), 6),
        **{name: round(error / variance, 6) for name, error in errors.means().items()},
    }


def directions(true: Tensor, found: Tensor) -> Row:
    """Score directions: those recovered (cosine 0.9 or more, one to one), their mean cosine, the same by chance."""
    matching = baselines.match_directions(true, found)
    n = len(true)
    return {
        **{f"recovered_{least:g}": int((matching.similarity >= least).sum()) for least in (0.9, 0.99)},
        "direction": round(matching.similarity.sum().item() / n, 4),
        "chance": round(matching.chance.sum(1).mean().item() / n, 4),
        **{f"chance_{v:g}": round((matching.chance >= v).sum(1).double().mean().item(), 3) for v in (0.9, 0.99)},
    }


def chosen(
    target: Target,
    seed: int,
    x: Tensor,
    method: str,
    size: int,
    grid: Sequence[float] | None = None,
    **changed: Any,
) -> tuple[Row, baselines.Chosen]:
    """Train a dictionary for each sparsity, keep that of the fewest bits, and measure its bits on other inputs."""
    how = dictionaries(target)[method]
    usual, settings = (GRID[how["kind"]], FIT) if isinstance(target, TMS) else (LARGE_GRID, LARGE)
    batches = target.recipe["batches"]
    found = baselines.choose(
        target, batches, n_features=size, grid=grid or usual, seed=seed, **how, **(settings | changed)
    )
    costs = baselines.costs(target, found.best, x, how["reads"], how.get("writes"), EPSILONS)
    row = {"sparsity": found.sparsity, "bits": rounded(c.bits() for c in costs), "seconds": round(found.seconds, 1)}
    return row, found


def true_directions(target: Target) -> list[Tensor]:
    """Give each feature's direction at the places that are read: a TMS's row, or the neurons that it drives."""
    if isinstance(target, TMS):
        return [target.encode.weight.detach().T]
    n = target.n_features
    return baselines.activations(target, torch.eye(n), hidden(target))


def as_weights(target: TMS, transcoder: baselines.Dictionary) -> apd.Components:
    """Turn a transcoder of a TMS into components; the other weight, if there is one, is a component of its own."""
    made = baselines.transcoded(transcoder, "encode.weight")
    if target.middle is None:
        return made
    middle = apd.Network(target, target.weights).weights["middle.weight"]
    return baselines.beside([made, apd.Components.from_matrices({"middle.weight": middle[None]})])


def by_truth(target: Target, method: str, dictionary: baselines.Dictionary) -> Row:
    """Score a dictionary by the features' directions, and a transcoder also by its ownership."""
    true, found, row = true_directions(target), dictionary.directions(), Row()
    if method.startswith("transcoder"):
        if isinstance(target, ResidualMLP):
            return layer_ownership(target, dictionary)
        row = {"owned": int(target.ownership(as_weights(target, dictionary)).owned.sum())}
    elif method == "crosscoder" and isinstance(target, TMS):
        found, second = found.split(target.d_hidden, 1)
        row = {"second_place": directions(true[0], second)["recovered_0.99"]}
    elif method == "crosscoder":
        true = [torch.cat(true, 1)]
    elif isinstance(target, ResidualMLP):
        true = true[int(method[-1]) :]  # "SAE, BatchTopK, layer 1"
    return row | directions(true[0], found)


def layer_ownership(target: ResidualMLP, dictionary: baselines.Dictionary) -> Row:
    """Match a transcoder of one whole MLP with the features, by what each input does to each output."""
    E, i = target.embedding, torch.arange(target.n_features)
    read = (E @ (dictionary.encoder.detach() * dictionary.scale_in[:, None])).T  # [F, n]
    write = (dictionary.decoder.detach() / dictionary.scale_out) @ E.T
    (out,) = baselines.activations(target, torch.eye(target.n_features), "output of write.0")
    truth = torch.zeros(len(i), len(i), len(i))
    truth[i, i] = out @ E.T
    P = apd.Components({"layer": read[:, :, None]}, {"layer": write[:, None, :]})
    own = apd.metrics.ownership(P, {"layer": truth}, 0.95, (0.5, 1.5), 0.95)
    return {"owned": int(own.owned.sum()), "cosine": round(own.cosine.mean().item(), 4)}


def run(job: tuple[str, int]) -> tuple[list[Row], Tensors]:
    """Take one network apart in every way."""
    name, seed = job
    target, components = loaded(name, seed)
    x, weights = held_out(target, seed), apd.Network(target, target.weights).weights
    identity, size = "middle.weight" in weights, target.recipe["n_components"]
    active = target.recipe["batches"].mean_active + identity
    layers = [{path: "output"} for path in weights]
    if isinstance(target, ResidualMLP):
        layers = [{f"read.{i}.weight": "output", f"write.{i}.weight": "input"} for i in range(len(target.read))]
    parts = {
        "APD": components,
        "APD, parts turned": controls.dealt(components, seed, turned=True),
        "singular vectors": baselines.singular(weights),
        "neurons": baselines.neurons(weights, layers),
    }
    if isinstance(target, TMS) and not identity:
        parts |= {
            "input columns": controls.input_columns(weights),
            "random split": controls.random_split(weights, seed),
        }
    rows: dict[str, Row] = {method: by_weights(target, own, x, active) for method, own in parts.items()}
    if isinstance(target, TMS):
        (true,) = true_directions(target)
        plain = apd.Components(*({"encode.weight": f["encode.weight"]} for f in (components.A, components.B)))
        rows["APD"] |= directions(true, leading(plain))
        rows["neurons"] |= directions(true, torch.eye(target.d_hidden))
        rows["singular vectors"] |= directions(true, torch.linalg.svd(weights["encode.weight"]).Vh)
    for method in in_table(target):
        network = target
        if method.endswith("untrained network"):
            network = TMS(*SIZES[name], identity=identity)
            torch.manual_seed(seed)
            torch.nn.init.xavier_normal_(network.encode.weight)
        row, found = chosen(network, seed, x, method, size)
        if isinstance(target, TMS) and method.startswith("transcoder"):
            by = by_weights(target, as_weights(target, found.best), x, active)
            row = by | row | {"bits_as_weights": by["bits"]}
        rows[method] = row | by_truth(network, method, found.best)
    return [{"methods": rows, "active": active, "size": size}], {}


def leading(components: apd.Components) -> Tensor:
    """Give the direction that each component writes along: its first right singular vector, signed by what it reads."""
    (path,) = components.paths
    U, S, Vh = torch.linalg.svd(components.matrices(path), full_matrices=False)
    sign = U[:, :, 0].gather(1, U[:, :, 0].abs().argmax(1, keepdim=True)).sign()
    return Vh[:, 0] * sign * (S[:, :1] > 1e-3 * S.max())


def split_run(job: tuple[str, int, int]) -> tuple[list[Row], Tensors]:
    """Train dictionaries and components of a multiple of the number of features, and count what points to each."""
    name, seed, factor = job
    target, _ = loaded(name, seed)
    assert isinstance(target, TMS)
    n, x, truth, W = factor * target.n_features, held_out(target, seed), target.mechanisms(), true_directions(target)[0]
    found: Row = {}
    small = target.n_features <= 5  # in a plane nothing can be told from chance
    for label in ("SAE, L1", "SAE, BatchTopK") if small else AUTOENCODERS:
        row, chose = chosen(target, seed, x, label, n)
        own = chose.best
        codes = own.encode(baselines.activations(target, x, "output of encode")[0])
        alive = (codes > 0).double().mean(0) > 1e-3
        found[label] = row | {
            "copies": baselines.copies(W, own.directions()[alive]).tolist(),
            "in_use": int(alive.sum()),
            "chance": baselines.copies(W, turned(own.directions()[alive], seed)).tolist(),
        }
    row, chose = chosen(target, seed, x, "transcoder", n)
    made = as_weights(target, chose.best)
    found["transcoder"] = row | {"owners": baselines.owners(made, truth).tolist()}
    if small or factor != 4:  # which `merging` has
        found["APD"] = split_components(target, seed, x, {"n_components": n})
    if small or factor <= 2:  # a run takes a minute and more
        found["APD, no merging"] = split_components(target, seed, x, {"n_components": n, "tidy_every": 0.0})
    return [{"found": found}], {}


def split_components(target: TMS, seed: int, x: Tensor, changed: Row) -> Row:
    """Take a target apart with changed settings, and count what holds each mechanism."""
    result, seconds = taken_apart(target, target.recipe | changed, seed=seed)
    components = result.components
    costs = apd.rate.costs(target, components, x, EPSILONS, attribution=target.attributions)
    return {
        "owners": baselines.owners(components, target.mechanisms()).tolist(),
        "owned": int(target.ownership(components).owned.sum()),
        "in_use": int((components.norms() > 0.01 * components.norms().max()).sum()),
        "bits": rounded(c.bits() for c in costs),
        "seconds": seconds,
    }


def wider_run(job: tuple[str, int, str, float]) -> tuple[list[Row], Tensors]:
    """Train one dictionary with one sparsity; `bits_to_choose` are of other inputs than `bits`."""
    name, seed, method, sparsity = job
    target, _ = loaded(name, seed)
    row, found = chosen(target, seed, held_out(target, seed), method, target.recipe["n_components"], (sparsity,))
    return [{"bits_to_choose": rounded(found.tried[0]["bits"])} | row | by_truth(target, method, found.best)], {}


def apd_seconds(name: str, seed: int) -> float:
    """Look up the CPU seconds that APD took on a target."""
    table = json.loads((DATA / ("residual.json" if name in residual.SIZES else "tms.json")).read_text())
    fields = {"target": name.removesuffix("-identity"), "seed": seed}
    if name not in residual.SIZES:
        fields |= {"identity": name.endswith("identity"), "rotated": False, "recipe": "ours"}
    (row,) = (r for r in table["runs"] if fields.items() <= r.items())
    return float(row["seconds"])


def equal_run(job: tuple[str, int, str]) -> tuple[list[Row], Tensors]:
    """Choose a dictionary again, with so many steps that all its trainings take as long as APD took."""
    name, seed, method = job
    target, _ = loaded(name, seed)
    before = next(r for r in STUDY.stored()["runs"] if (r["target"], r["seed"]) == (name, seed))["methods"][method]
    usual, budget = (LARGE if name in residual.SIZES else FIT)["steps"], apd_seconds(name, seed)
    steps = math.ceil(usual * max(1.0, budget / before["seconds"]))
    x, size = held_out(target, seed), target.recipe["n_components"]
    row, found = chosen(target, seed, x, method, size, steps=steps)
    return [{"steps": steps, "apd_seconds": budget} | row | by_truth(target, method, found.best)], {}


def clock() -> dict[str, float]:
    """Time APD again on the first target of each kind, on the day of the dictionaries with equal seconds."""
    found = {}
    for name in EQUAL_SECONDS:
        target, _ = loaded(name, SEEDS[name][0])
        found[name] = taken_apart(target, target.recipe, seed=SEEDS[name][0])[1]
    return found


def operations(train: Callable[[int], None], n: int) -> float:
    """Count the floating-point operations of a training step: those of 2 n steps less those of n, over n."""
    counts = []
    for steps in (n, 2 * n):
        with FlopCounterMode(display=False) as counter:
            train(steps)
        counts.append(counter.get_total_flops())
    return (counts[1] - counts[0]) / n


def work() -> dict[str, Row]:
    """Count the operations of a training step, in forward passes of the whole network over as many samples."""
    found: dict[str, Row] = {}
    for name in ("tms-5-2", "tms-40-10", "50", "25-25"):
        target, _ = loaded(name, SEEDS[name][0])
        recipe, places = target.recipe, hidden(target)
        x = recipe["batches"](0, torch.Generator().manual_seed(0))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            target(x)
        forward, steps = counter.get_total_flops(), (LARGE if name in residual.SIZES else FIT)["steps"]

        def dictionary(n: int, places: list[str] = places, own: Target = target) -> None:
            batches, size = own.recipe["batches"], own.recipe["n_components"]
            baselines.fit(own, batches, places, size, "batch_topk", 1.0, steps=n, seed=0)

        def apd_run(n: int, own: Target = target) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it is not finished
                apd.decompose(own, progress=False, **(own.recipe | {"steps": n, "tidy_every": 0.0}))

        own = operations(dictionary, 16) / forward  # the activations of 16 steps are recorded at once
        one = operations(apd_run, 2) / forward
        found[name] = {
            "samples": len(x),
            "dictionary_step": round(own, 2),
            "dictionary_steps": steps,
            "apd_step": round(one, 2),
            "apd_steps": recipe["steps"],
        }
    return found


def turned(found: Tensor, seed: int) -> Tensor:
    """Draw as many random mixtures of the directions: how many point along a feature by chance."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(found), len(found), generator=generator) @ found


RUNS = Rows(
    fields=("target", "seed"),
    jobs=lambda rows: [(name, seed) for name in TARGETS for seed in SEEDS[name]],
    run=run,
    settings=lambda job: LARGE | {"grid": LARGE_GRID} if job[0] in residual.SIZES else FIT | {"grid": GRID},
    order=lambda job: (TARGETS.index(job[0]), job[1]),
)
SPLITTING = Rows(
    fields=("target", "seed", "factor"),
    jobs=lambda rows: [(name, s, f) for name, (seeds, factors) in SPLIT.items() for s in seeds for f in factors],
    run=split_run,
    settings=lambda job: FIT | {"grid": GRID},
)
EQUAL = Rows(
    fields=("target", "seed", "method"),
    jobs=lambda rows: [(n, s, m) for n, (seeds, own) in EQUAL_SECONDS.items() for s in seeds for m in own],
    run=equal_run,
    settings=lambda job: LARGE | {"grid": LARGE_GRID} if job[0] in residual.SIZES else FIT | {"grid": GRID},
    order=lambda job: (list(EQUAL_SECONDS).index(job[0]), *job[1:]),
)
WIDE = Rows(
    fields=("target", "seed", "method", "sparsity"),
    jobs=lambda rows: [(n, s, m, v) for n, own in WIDER.items() for s in SEEDS[n] for m, vs in own.items() for v in vs],
    run=wider_run,
    settings=lambda job: LARGE if job[0] in residual.SIZES else FIT,
)
PARTS = {"runs": RUNS, "splitting": SPLITTING, "equal": EQUAL, "wider": WIDE}
STUDY = Study(
    "baselines", PARTS, {"work": work, "clock": clock}, about=lambda processes: {"processes": processes}, compact=True
)

if __name__ == "__main__":
    STUDY.main(__doc__)
