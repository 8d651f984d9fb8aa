"""Create data/architectures.json: planted networks of all kinds taken apart by one call and one recipe (chapter 33).

python -m experiments.architectures [--only RNN "SSM, all two" ...] [--processes N]      (about two hours of one core)

In "runs", planted networks (experiments/planted_kinds.py), whose six mechanisms are known, and, for the kinds of the
goal, one network without mechanisms: every weight is replaced by a random one of the same singular values. No setting
depends on the kind. Told are the number of mechanisms, four components for each, and how many are on a sample on
average, by which k is measured. Computed from the network is the weight of the faithfulness loss: 60 times the error
with nothing active, as in chapter 28. A judge with small errors picks among three restarts.

The settings were made on seeds 90 to 93 of the MLP, with batches of 80, then of 64, to save time. "before" are the
runs with 64: most kinds failed. Looking on seeds 90 to 93 showed why: at the truth the losses stay there ("kept"), but
the search does not get there with so few samples ("tries"). So the batch became 256, and no other setting changed. That
was fixed before any network of "runs" was made. "log" has 63 runs on tuning seeds, among them of other learning rates.
"blocks" says for every block of every weight whether the data determine it. Four kinds where they do not were replaced
in "runs"; bilinear, graph and selective networks keep open pieces.

"undetermined" says what the data of the first targets leave open. "planes" and "inside" are cuts without training.
"six starts" are new networks of the kind on which three starts failed, with six (four of the five had been run once
before by hand, with the same result), and then five new networks of every kind but the selective one, all with six: so
that the goal is asked of one set of settings. They were listed before any of them was made. Last, the two networks on
which three starts failed were run again with six, to see whether it is the starts. "harder" has inputs on which the cut
by planes owns less, or needs a tolerance. "selective" are changes tried on one selective network of seed 90, and "kept
selective" what `kept` says of it; no command makes these two again.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal import bottleneck
from apd_minimal.algorithm import begin
from apd_minimal.study import controls, matching
from apd_minimal.study.rate import Judge
from apd_minimal.train import Run
from experiments import determined, planes
from experiments.experiment import Row, Rows, Study, Tensors, scaled
from experiments.modular import like
from experiments.planted import Planted
from experiments.planted_kinds import DETERMINED, KINDS

Job = tuple[str, int, str]  # kind, seed, "planted" or "random"
FIRST, BATCH = 8470, 256
# Networks of each kind: first the four of the goal, of which there is also one without mechanisms.
GOAL = ("MLP, all three", "CNN, own colours", "SSM, all two", "RNN")
SEEDS = dict.fromkeys(GOAL, 5) | {
    "attention": 3,
    "graph": 3,
    "experts, one gate": 3,
    "bilinear": 5,
    "selective SSM": 1,
}
ORDER = tuple(SEEDS)
FAILED = (8471, 8474)  # seeds of the state-space models on which three starts failed
# What was run before, with smaller batches: first seed of each kind.
EARLIER, SMALL = dict.fromkeys(KINDS, 8400) | {"MLP, three inputs": 8450, "experts, one gate": 8450}, 64
MADE = KINDS | DETERMINED
K = ((0.0, 4.0), (0.35, 2.0), (0.5, 1.0), (0.7, 0.8))  # in units of the mean number of mechanisms on a sample
SETTINGS: Row = {
    "rank": 4, "steps": 1200, "restarts": 3, "lr": 3e-2, "minimality": 20.0, "scrub": 20.0,
    "simplicity": ((0.0, 300.0), (0.6, 0.0)),
    # Pieces that are on together are merged late, when few may be on, and nothing starts anew.
    "alpha": 0.5, "tidy_every": 0.075, "tidy_from": 0.45, "tidy_until": 0.95, "reseed_until": 0.0,
}  # fmt: skip
EPSILONS = (0.001, 0.003, 0.01)


def jobs() -> list[Job]:
    """List the runs: the kinds of the goal, planted and without mechanisms, then the other kinds."""
    planted: list[Job] = [(kind, FIRST + i, "planted") for kind, n in SEEDS.items() for i in range(n)]
    random: list[Job] = [(kind, FIRST, "random") for kind in GOAL]
    return sorted(planted + random, key=lambda job: job[0] not in GOAL)


def earlier() -> list[Job]:
    """List the runs with smaller batches."""
    return [(kind, first + i, "planted") for kind, first in EARLIER.items() for i in range(5)]


def settings_of(job: Job, batch: int = BATCH) -> Row:
    """List what is the same for all kinds."""
    rule = f"{bottleneck.FAITHFULNESS:g} times the error with nothing active"
    return {**SETTINGS, "components_each": 4, "k": K, "batch": batch, "faithfulness": rule, "seed": job[1] + 1000}


def settings(target: torch.nn.Module, weights: list[str], x: Tensor, n: int, active: float, seed: int) -> Row:
    """Give the arguments of `decompose`, for any network.

    Args:
        target: the network.
        weights: the parameter paths to decompose.
        x: a thousand or more inputs.
        n: expected number of mechanisms.
        active: mean number of them on a sample.
        seed: of the decomposition.
    """
    strength = bottleneck.settings(apd.Network(target, weights), x, 4 * n)["faithfulness"]
    arguments: dict[str, Any] = {**SETTINGS, "n_components": 4 * n, "top_k": scaled(K, active), "seed": seed}
    return arguments | {"faithfulness": strength, "judge": Judge(EPSILONS)}


@torch.no_grad()
def without_mechanisms(target: Planted, seed: int) -> Planted:
    """Replace every weight by a random one of the same singular values, in place."""
    generator = torch.Generator().manual_seed(seed)
    for path, mechanisms in target.mechanisms().items():
        target.put(path, like(mechanisms.sum(0), generator)[None])
    return target


def singular(components: apd.Components, n: int) -> apd.Components:
    """Split the sum into n parts by singular values: each gets its share of neighbouring singular directions."""
    parts = {}
    for path in components.paths:
        U, S, Vh = torch.linalg.svd(components.sum(path).detach(), full_matrices=False)
        groups = torch.arange(len(S)).tensor_split(n)
        parts[path] = torch.stack([U[:, g] @ S[g].diag() @ Vh[g] for g in groups])
    return apd.Components.from_matrices(parts)


def owner_cosines(components: apd.Components, truth: dict[str, Tensor], owner: Tensor) -> dict[str, list[float]]:
    """Compute the cosine of every owner with its mechanism, in each weight alone."""
    pairs = {path: (components.matrices(path).detach()[owner], true) for path, true in truth.items()}
    return {
        path: torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)).tolist()
        for path, (a, b) in pairs.items()
    }


def run(job: Job, batch: int = BATCH) -> tuple[list[Row], Tensors]:
    """Take one network apart, and measure."""
    kind, seed, weights = job
    target = MADE[kind](seed=seed)
    truth, data = target.mechanisms(), target.data(batch)
    if weights == "random":
        target = without_mechanisms(target, seed)
    x = target.data(2048)(0, torch.Generator().manual_seed(20_000 + seed))
    network, paths = apd.Network(target, target.weights), target.weights
    start = time.process_time()
    arguments = settings(target, paths, x, target.n, data.mean_active, seed + 1000)
    found = apd.decompose(target, data, paths, progress=False, **arguments)
    seconds = time.process_time() - start
    judge, every = arguments["judge"], found.restarts
    assert every is not None and every.restarts is not None and found.scores is not None
    best = sorted(range(every.restarts), key=found.scores.__getitem__)
    row: Row = {
        "seconds": round(seconds, 1),
        "faithfulness": arguments["faithfulness"],
        "in_use": int((found.components.norms() > 0).sum()),
        "sum": float(apd.metrics.relative_faithfulness(found.components, network.weights)),
        "scores": found.scores,
        "bits": judge(network, found.components, x),
    }
    again = matching.match_weights(found.components, every.restart(best[1]))
    row["second start"] = {"mean": again.mean, "chance": float(again.chance.mean()), "unmatched": again.unmatched}
    if weights == "random":
        return [row], {}
    own = apd.metrics.ownership(found.components, truth)
    dealt = controls.dealt(found.components, seed, turned=True)
    svd = singular(apd.Components.from_matrices(truth), target.n)
    others = {"dealt": dealt, "singular": svd, "another": MADE[kind](seed=seed + 50).truth}
    P = found.components.flat().detach()[own.owner]
    Z = target.truth.flat()
    table = torch.nn.functional.normalize(Z, dim=1) @ torch.nn.functional.normalize(P, dim=1).T
    row |= {
        "owned": own.owned.tolist(),
        "cosine": own.cosine.tolist(),
        "length_ratio": own.length_ratio.tolist(),
        "purity": own.purity.tolist(),
        "cosines": [[round(v, 4) for v in line] for line in table.tolist()],
        "by_weight": owner_cosines(found.components, truth, own.owner),
        "owned_by_restart": [
            int(apd.metrics.ownership(every.restart(r), truth).owned.sum()) for r in range(every.restarts)
        ],
        "controls": {
            name: {"owned": int(o.owned.sum()), "cosine": float(o.cosine.mean())}
            for name, o in ((name, apd.metrics.ownership(other, truth)) for name, other in others.items())
        },
        "bits_of_the_truth": judge(network, target.truth, x),
        "bits_dealt": judge(network, dealt, x),
    }
    return [row], {}


def run_before(job: Job) -> tuple[list[Row], Tensors]:
    """Take one network apart with the batch of the first recipe."""
    return run(job, SMALL)


# What was wrong: with as many samples in more steps, or in larger batches.
CHANGES: dict[str, tuple[int, Row]] = {
    "batch 64": (64, {}),
    "batch 64, four times the steps": (64, {"steps": 4 * SETTINGS["steps"]}),
    "batch 256": (BATCH, {}),
}


def tries() -> list[Job]:
    """List the runs with other batches, on tuning seeds."""
    return [(kind, seed, change) for kind in ("MLP, all three", "bilinear") for seed in (90, 91) for change in CHANGES]


def run_changed(job: Job) -> tuple[list[Row], Tensors]:
    """Take one network apart with one change of the settings, and count what is owned."""
    kind, seed, change = job
    batch, changes = CHANGES[change]
    return [in_short(MADE[kind](seed=seed), seed, changes, batch=batch)], {}


# What the first thing to try was where three starts failed: six of them, on new networks of that kind.
MORE: Row = {"restarts": 6}


def more_starts() -> list[Job]:
    """List the runs with six starts: the kind on which three failed, then new networks of all kinds but the slowest."""
    every = [(kind, 8500 + i, "six starts") for kind in ORDER if kind != "selective SSM" for i in range(5)]
    again = [("SSM, all two", seed, "six starts") for seed in FAILED]
    return [*(("SSM, all two", 8490 + i, "six starts") for i in range(5)), *every, *again]


def run_more(job: Job) -> tuple[list[Row], Tensors]:
    """Take one network apart from more starts, and count what is owned."""
    return [in_short(MADE[job[0]](seed=job[1]), job[1], MORE)], {}


@torch.no_grad()
def at_the_truth(run: Run, truth: apd.Components) -> None:
    """Make the first components of every restart the true mechanisms, and all others zero."""
    for path in truth.paths:
        both = apd.Components.from_matrices({path: truth.matrices(path)}, rank=run.components.A[path].shape[-1])
        for own, true in ((run.components.A, both.A), (run.components.B, both.B)):
            own[path].zero_()[:, : truth.n_components] = true[path]


def kept() -> list[Row]:
    """Start at the truth, when the schedules have ended, and say what the last steps leave of it: on tuning seeds."""
    rows = []
    for kind in GOAL:
        for seed, batch in ((90, SMALL), (90, BATCH)):
            target = MADE[kind](seed=seed)
            data, x = target.data(batch), target.data(2048)(0, torch.Generator().manual_seed(20_000 + seed))
            arguments = settings(target, target.weights, x, target.n, data.mean_active, seed) | {"restarts": 1}
            del arguments["judge"]
            run = begin(apd.Network(target, target.weights), data, apd.Config.from_dict(arguments))
            at_the_truth(run, target.truth)
            run.step = round(K[-1][0] * run.config.steps)
            first = run.advance()
            while run.step < run.config.steps:
                last = run.advance()
            own = target.ownership(run.components.restart(0).map(Tensor.detach))
            losses = [{name: values[0] for name, values in each.items()} for each in (first, last)]
            rows.append({"kind": kind, "seed": seed, "batch": batch, "cosine": own.cosine.tolist(), "losses": losses})
    return rows


# Inputs on which the cut by planes owns less or nothing: chance that a mechanism is on, noise.
HARDER: dict[str, tuple[float, float]] = {"half on": (0.5, 0.0), "noise": (0.1, 0.01), "mostly on": (0.8, 0.0)}


def harder() -> list[Job]:
    """List the runs on harder inputs."""
    networks = [(kind, 8475 + i) for kind in ("MLP, all three", "RNN") for i in range(3)]
    return [(kind, seed, inputs) for kind, seed in networks for inputs in HARDER]


def run_harder(job: Job) -> tuple[list[Row], Tensors]:
    """Take one network apart on inputs of one of `HARDER`, and count what is owned."""
    kind, seed, inputs = job
    probability, noise = HARDER[inputs]
    return [in_short(MADE[kind](probability=probability, seed=seed), seed, {}, noise)], {}


def in_short(target: Planted, seed: int, changes: Row, noise: float = 0.0, batch: int = BATCH) -> Row:
    """Take a network apart with some settings changed, and measure the sum and what is owned."""
    data, x = target.data(batch, noise), target.data(2048, noise)(0, torch.Generator().manual_seed(20_000 + seed))
    arguments = settings(target, target.weights, x, target.n, data.mean_active, seed + 1000) | changes
    start = time.process_time()
    found = apd.decompose(target, data, target.weights, progress=False, **arguments)
    seconds = time.process_time() - start
    network, own = apd.Network(target, target.weights), target.ownership(found.components)
    return {
        "seconds": round(seconds, 1),
        "sum": float(apd.metrics.relative_faithfulness(found.components, network.weights)),
        "owned": own.owned.tolist(),
        "cosine": own.cosine.tolist(),
        "scores": found.scores,
    }


# For some kinds, whose outputs the numbers are that a weight reads and writes; "" for those of the network itself.
INSIDE: dict[str, dict[str, tuple[str, str]]] = {
    "MLP, all three": {"encode": ("", "encode"), "middle": ("encode", "middle"), "decode": ("middle", "")},
    "RNN": {"encode": ("", "encode"), "again": ("encode", "encode"), "decode": ("encode", "")},
    "attention": {"query": ("", "query"), "key": ("", "key"), "value": ("", "value"), "out": ("value", "")},
    "bilinear": {"left": ("", "left"), "right": ("", "left"), "decode": ("left", "")},
    "graph": {"own": ("", "own"), "others": ("", "own"), "decode": ("own", "")},
}


@torch.no_grad()
def open_together(target: Planted, layers: dict[str, tuple[str, str]]) -> apd.Components:
    """Cut the weights by looking at the inside: numbers that are zero on the same samples belong together.

    Args:
        target: the network.
        layers: one of `INSIDE`.
    """
    exact = copy.deepcopy(target).double()  # so that rounding does not hide a zero
    seen: dict[str, Tensor] = {}
    for name in {name for both in layers.values() for name in both if name}:
        exact.get_submodule(name).register_forward_hook(lambda _, x, y, name=name: seen.setdefault(name, y))
    x = target.data(2048)(0, torch.Generator().manual_seed(1)).double()
    exact(x)
    on = {name: (y.reshape(len(x), -1, y.shape[-1]).abs().amax(1) > 1e-5).T for name, y in seen.items()}
    patterns = torch.cat(list(on.values())).unique(dim=0)  # [parts, samples]
    parts = {}
    for path, names in layers.items():
        W = target.get_parameter(f"{path}.weight").T
        own = [(on[n][:, None] == patterns).all(2).T.float() if n else W.new_ones(len(patterns), 1) for n in names]
        parts[f"{path}.weight"] = own[0][:, :, None] * W * own[1][:, None]
    return apd.Components.from_matrices(parts)


def inside() -> dict[str, list[int]]:
    """Count what a cut by the inside owns, without training, on every planted network of some kinds."""
    return {
        kind: [
            int((target := MADE[kind](seed=FIRST + i)).ownership(open_together(target, layers)).owned.sum())
            for i in range(SEEDS[kind])
        ]
        for kind, layers in INSIDE.items()
    }


def blocks() -> dict[str, list[Row]]:
    """Measure for every block of every weight whether the data determine it (experiments/determined.py)."""
    return {kind: [determined.measured(made(seed=FIRST + i)) for i in range(5)] for kind, made in MADE.items()}


def by_planes() -> dict[str, list[int]]:
    """Count what the cut by planes of the inputs owns, without training, on every planted network."""
    every = [(kind, seed) for kind, seed, weights in jobs() if weights == "planted"]
    found: dict[str, list[int]] = {}
    for kind, seed in every:
        found.setdefault(kind, []).append(planes.owned(MADE[kind](seed=seed)))
    return found


def by_planes_harder() -> list[Row]:
    """Count what the cut by planes owns on the inputs of `HARDER`: with more tries, and with two tolerances."""
    looks = ((planes.TOLERANCE, 200_000), (0.02, 8000), (0.1, 8000))
    return [
        {"kind": kind, "seed": seed, "inputs": inputs, "owned": [planes.owned(target, noise, *look) for look in looks]}
        for kind, seed, inputs in harder()
        for probability, noise in [HARDER[inputs]]
        for target in [MADE[kind](probability=probability, seed=seed)]
    ]


@torch.no_grad()
def given_away(target: Planted, j: int, x: Tensor, on: Tensor) -> tuple[apd.Components, float]:
    """Give the direction in which the inputs of a mechanism's middle block move least to the next mechanism.

    Args:
        target: an MLP.
        j: the mechanism.
        x: inputs [B, d].
        on: which mechanisms are on, [B, n].

    Returns:
        Components: as many as mechanisms, with the same sum.
        float: the share of the energy of the block's inputs that lies in this direction.
    """
    parts = target.mechanisms()
    middle = parts["middle.weight"].clone()
    hidden = torch.nn.functional.leaky_relu(target.get_submodule("encode")(x[(on[:, j] > 0) & (on.sum(1) == 1)]), 0.2)
    energies, Q = torch.linalg.eigh(hidden.T @ hidden)
    v = Q[:, -3]  # the last of three: in the other directions the mechanism has no neurons
    moved = torch.outer(v, v) @ middle[j]
    middle[j] -= moved
    middle[(j + 1) % target.n] += moved
    return apd.Components.from_matrices(parts | {"middle.weight": middle}), float(energies[-3] / energies.sum())


@torch.no_grad()
def common_mode(target: Planted) -> apd.Components:
    """Give what is common to both columns of the router, which a softmax does not see, to the first mechanism."""
    parts = target.mechanisms()
    router = parts["router.weight"]
    common = router.mean(2, keepdim=True).expand_as(router)
    parts["router.weight"] = router - common
    parts["router.weight"][0] += common.sum(0)
    return apd.Components.from_matrices(parts)


@torch.no_grad()
def undetermined() -> dict[str, list[Row]]:
    """Measure other decompositions than the truth that the data hardly tell from it, or not at all."""
    found: dict[str, list[Row]] = {}
    for kind, first in [(kind, EARLIER[kind]) for kind in ("MLP", "MLP, three inputs", "experts")]:
        for seed in range(first, first + 5):
            target = MADE[kind](seed=seed)
            data, generator = target.data(2048), torch.Generator().manual_seed(20_000 + seed)
            on = data.on(0, generator)
            x = data.make(on, generator)
            network, y, judge = apd.Network(target, target.weights), target(x), Judge(EPSILONS)
            truth = judge(network, target.truth, x)
            for j in range(1 if kind == "experts" else target.n):
                other, share = (common_mode(target), None) if kind == "experts" else given_away(target, j, x, on)
                error = (network(x, other, on) - y).square().mean() / y.square().mean()
                row = {
                    "seed": seed, "mechanism": j, "share": share, "error": float(error),
                    "cosine": target.ownership(other).cosine.tolist(), "owned": target.ownership(other).owned.tolist(),
                    "bits": judge(network, other, x), "bits_of_the_truth": truth,
                }  # fmt: skip
                found.setdefault(kind, []).append(row)
    return found


RUNS = Rows(
    fields=("kind", "seed", "weights"),
    jobs=lambda rows: jobs(),
    run=run,
    settings=settings_of,
    order=lambda job: (ORDER.index(job[0]), job[2], job[1]),
)
BEFORE = replace(
    RUNS,
    jobs=lambda rows: earlier(),
    run=run_before,
    settings=lambda job: settings_of(job, SMALL),
    order=lambda job: (tuple(EARLIER).index(job[0]), job[1]),
)
TRIES = Rows(
    fields=("kind", "seed", "change"),
    jobs=lambda rows: tries(),
    run=run_changed,
    settings=lambda job: settings_of(job, CHANGES[job[2]][0]) | CHANGES[job[2]][1],
    order=lambda job: (ORDER.index(job[0]), job[1], tuple(CHANGES).index(job[2])),
)
SIX = Rows(
    fields=("kind", "seed", "change"),
    jobs=lambda rows: more_starts(),
    run=run_more,
    settings=lambda job: settings_of(job) | MORE,
)
INPUTS = Rows(
    fields=("kind", "seed", "inputs"),
    jobs=lambda rows: harder(),
    run=run_harder,
    settings=lambda job: settings_of(job) | {"inputs": HARDER[job[2]]},
)
STUDY = Study(
    "architectures",
    {"runs": RUNS, "before": BEFORE, "tries": TRIES, "six starts": SIX, "harder": INPUTS},
    {
        "blocks": blocks,
        "kept": kept,
        "inside": inside,
        "planes": by_planes,
        "planes_harder": by_planes_harder,
        "undetermined": undetermined,
    },
    about=lambda processes: {"processes": processes},
    compact=True,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
