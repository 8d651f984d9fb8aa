"""Create data/together.json: the same TMS 10-4 decomposed on data in which pairs of features come on together.

python -m experiments.together [--only ways ...] [--processes N]      (half an hour of one core)

Chapter 38. The targets are trained on independent features and stay as they are. Only the data of the decomposition
changes: features come in five pairs, and `both` is the probability that the second is on when one of a pair is. How
often a feature is on does not change. Three ways: the recipe of the size, told the mean number of active features; the
same, told the mean number of active pairs; and the rule without k (chapter 28), which is told neither. Settings
are those of other chapters; nothing was chosen here. Seeds 7900 up, fixed before, each run once. In
"alone" the recipe sees only inputs on which no pair has both features on; "tries" change one setting at a time on seeds
90 and 91. The matrices that were
found are in data/together.safetensors.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal import bottleneck
from apd_minimal.bottleneck import GAINS, Bottleneck
from apd_minimal.study import rate
from experiments.experiment import Row, Rows, Study, Tensors, prefix

Job = tuple[str, float, int]  # way, `both`, seed
N, D, PROBABILITY = 10, 4, 0.05
PAIRS = [(i, i + 1) for i in range(0, N, 2)]
INDEPENDENT = round(PROBABILITY / (2 - PROBABILITY), 4)
BOTH = (INDEPENDENT, 0.25, 0.5, 0.75, 1.0)
WAYS = ("features' k", "pairs' k", "no k")
SEEDS = range(7900, 7905)
TRIES: dict[str, Row] = {  # changes of the first way, tried with the dial at one half, on other targets
    "as it stands": {},
    "simplicity from 5": {"simplicity": [[0.0, 5.0], [0.7, 0.0]]},
    "simplicity from 60": {"simplicity": [[0.0, 60.0], [0.7, 0.0]]},
    "three times the steps": {"steps": 4500},
    "0.7 times the k": {"k": 0.7},
    "eight restarts": {"restarts": 8},
}
BATCH, LR = 512, 1e-2
EPSILONS = (0.003, 0.01, 0.03, 0.1)


@dataclass(frozen=True)
class Together:
    """Batches [batch_size, 10] of features in [0, 1] that come in pairs; samples with nothing on are left out.

    Attributes:
        both: probability that both of a pair are on, where at least one is.
        batch_size: B.
    """

    both: float
    batch_size: int = BATCH

    @property
    def pair(self) -> float:
        """Probability that at least one of a pair is on, such that each feature is on with `PROBABILITY`."""
        return 2 * PROBABILITY / (1 + self.both)

    def __call__(self, step: int, generator: torch.Generator) -> Tensor:
        """Draw a batch."""
        rows: list[Tensor] = []
        while sum(map(len, rows)) < self.batch_size:
            n = 4 * self.batch_size
            pairs = torch.rand(n, len(PAIRS), generator=generator) < self.pair
            both = torch.rand(n, len(PAIRS), generator=generator) < self.both
            first = torch.rand(n, len(PAIRS), generator=generator) < 0.5
            on = torch.stack([pairs & (both | first), pairs & (both | ~first)], -1).flatten(1)
            rows.append((on * torch.rand(n, N, generator=generator))[on.any(1)])
        return torch.cat(rows)[: self.batch_size]

    def alone(self, step: int, generator: torch.Generator) -> Tensor:
        """Draw a batch of which no pair has both features on."""
        x = replace(self, batch_size=8 * self.batch_size)(step, generator)
        return x[~(x.unflatten(1, (-1, 2)) > 0).all(-1).any(1)][: self.batch_size]

    @property
    def mean_active(self) -> tuple[float, float]:
        """Mean number of features, and of pairs, that are on in a sample of a batch."""
        share = 1 - (1 - self.pair) ** len(PAIRS)
        return N * PROBABILITY / share, len(PAIRS) * self.pair / share


def cuts(target: apd.targets.TMS) -> dict[str, apd.Components]:
    """Cut the weights into features, into pairs, and into the two singular directions of each pair."""
    singles = target.mechanisms()["encode.weight"]
    pairs = torch.stack([singles[i] + singles[j] for i, j in PAIRS])
    U, S, Vh = torch.linalg.svd(pairs, full_matrices=False)
    turned = torch.einsum("pdk,pk,pke->pkde", U, S, Vh)[:, :2].flatten(0, 1)
    return {"features": whole(singles), "pairs": whole(pairs), "turned": whole(turned)}


def whole(matrices: Tensor) -> apd.Components:
    """Factor matrices [J, d_in, d_out] as they are."""
    eye = torch.eye(matrices.shape[1]).expand(len(matrices), -1, -1).clone()
    return apd.Components({"encode.weight": eye}, {"encode.weight": matrices.clone()})


def settings_of(job: Job) -> Row:
    """Give what is told: the recipe's k in units of what is on, or none."""
    way, both, seed = job
    target = apd.targets.TMS(N, D, probability=PROBABILITY)
    recipe = {name: value for name, value in target.recipe.items() if name not in ("batches", "weights")}
    if way == "no k":
        return {"n_components": recipe["n_components"], "restarts": len(GAINS), "lr": LR, "seed": seed + 1000}
    features, pairs = Together(both).mean_active
    # The recipe's batches have empty samples and these have not, so k is larger by the same factor as what is on.
    factor = (features if way == "features' k" else pairs) / (N * PROBABILITY)
    return recipe | {"top_k": [[t, k * factor] for t, k in recipe["top_k"]], "lr": LR, "seed": seed + 1000}


def settings_of_try(job: tuple[str, int]) -> Row:
    """Give the first way's settings with one change."""
    name, seed = job
    settings, changes = settings_of((WAYS[0], 0.5, seed)), dict(TRIES[name])
    factor = changes.pop("k", 1.0)
    return settings | {"top_k": [[t, k * factor] for t, k in settings["top_k"]]} | changes


def run_try(job: tuple[str, int]) -> tuple[list[Row], Tensors]:
    """Decompose with one setting changed."""
    rows, _ = run((WAYS[0], 0.5, job[1]), settings_of_try(job))
    return rows, {}


def run(job: Job, settings: Row | None = None) -> tuple[list[Row], Tensors]:
    """Decompose a target, and match what was found with features and with pairs."""
    way, both, seed = job
    settings = settings_of(job) if settings is None else settings
    target, batches = apd.targets.TMS(N, D, probability=PROBABILITY).fit(seed=seed), Together(both)
    network = apd.Network(target, target.weights)
    judge = rate.Judge(attribution=target.attributions)
    x = Together(both, 8192)(0, torch.Generator().manual_seed(30_000 + seed))
    if way == "no k":
        rule = bottleneck.settings(network, x, settings["n_components"])
        settings = rule | settings | {"selection": Bottleneck(gain=GAINS)}
    start = time.process_time()
    found = apd.decompose(
        target, batches, target.weights, judge=judge, attribution=target.attributions, progress=False, **settings
    )
    seconds = time.process_time() - start
    assert found.restarts is not None
    held_out = Together(both, 8192)(0, torch.Generator().manual_seed(20_000 + seed))
    known = cuts(target)
    rows = [measured(known, found.restarts.restart(i)) for i in range(len(found.scores))]
    row: dict[str, Any] = rows[found.chosen] | {
        "restarts": rows,
        "chosen": found.chosen,
        "same_line": target.same_line,
        "seconds": round(seconds, 1),
        "bits": {
            name: [cost.bits() for cost in rate.costs(network, c, held_out, EPSILONS, attribution=target.attributions)]
            for name, c in {"found": found.components, **known}.items()
        },
    }
    P = found.components.matrices("encode.weight").detach()
    return [row], {
        f"{prefix(job)}matrices": P[P.square().sum((1, 2)) > 0].contiguous(),
        f"{prefix(job)}weight": target.encode.weight.detach().clone(),
        f"{prefix(job)}bias": target.bias.detach().clone(),
    }


def settings_alone(job: tuple[int]) -> Row:
    """Give the first way's settings, with k in units of what is on in these batches."""
    settings = settings_of((WAYS[0], 0.5, job[0]))
    on = float((Together(0.5).alone(0, torch.Generator().manual_seed(0)) > 0).double().sum(1).mean())
    factor = on / Together(0.5).mean_active[0]
    return settings | {"top_k": [[t, k * factor] for t, k in settings["top_k"]]}


def run_alone(job: tuple[int]) -> tuple[list[Row], Tensors]:
    """Decompose by the recipe on those inputs on which no pair has both features on."""
    target = apd.targets.TMS(N, D, probability=PROBABILITY).fit(seed=job[0])
    found = apd.decompose(
        target, Together(0.5).alone, target.weights, judge=rate.Judge(attribution=target.attributions), progress=False,
        attribution=target.attributions, **settings_alone(job),
    )  # fmt: skip
    assert found.restarts is not None
    rows = [measured(cuts(target), found.restarts.restart(i)) for i in range(len(found.scores))]
    return [rows[found.chosen] | {"restarts": rows}], {}


def measured(known: dict[str, apd.Components], components: apd.Components) -> Row:
    """Count the features and the pairs that have a component of their own, and the pairs that are apart from others.

    A pair is apart if the components that have most of their squared length in it sum to it, up to a cosine of 0.99,
    however they divide it among them.
    """
    row: Row = {"alive": int((components.norms() > 0).sum())}
    for name in ("features", "pairs"):
        row[name] = int(apd.metrics.ownership(components, truth_of(known[name])).owned.sum())
    P, pairs = (c.matrices("encode.weight").detach() for c in (components, known["pairs"]))
    home = P.square().sum(-1).unflatten(1, (len(PAIRS), 2)).sum(-1).argmax(1)  # [C]
    sums = torch.stack([P[home == i].sum(0) for i in range(len(PAIRS))])
    row["apart"] = int((torch.cosine_similarity(sums.flatten(1), pairs.flatten(1)) >= 0.99).sum())
    return row


def truth_of(components: apd.Components) -> dict[str, Tensor]:
    """Give matrices as ownership asks for them."""
    return {path: components.matrices(path) for path in components.paths}


STUDY = Study(
    "together",
    {
        "runs": Rows(
            ("way", "both", "seed"),
            lambda rows: [(way, both, seed) for seed in SEEDS for way in WAYS for both in BOTH],
            run,
            settings_of,
            lambda job: (WAYS.index(job[0]), job[1], job[2]),
        ),
        "alone": Rows(("seed",), lambda rows: [(seed,) for seed in SEEDS], run_alone, settings_alone),
        "tries": Rows(
            ("change", "seed"),
            lambda rows: [(name, seed) for name in TRIES for seed in (90, 91)],
            run_try,
            settings_of_try,
            lambda job: (list(TRIES).index(job[0]), job[1]),
        ),
    },
    about=lambda processes: {"processes": processes},
)

if __name__ == "__main__":
    STUDY.main(__doc__)
