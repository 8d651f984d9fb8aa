"""Create data/basis_others.json: dictionaries, singular directions, neurons and columns in many bases (chapter 31).

python -m experiments.basis_others [--only runs | chance | "SAE, L1" ...] [--processes N]   (about eight minutes)

The networks are those of experiments/basis.py. Each method looks at the encoder: a sparse autoencoder (SAE) at the
numbers that it writes, a transcoder at its inputs and these numbers, the others at its weights. The dictionaries have
12 features, as APD has 12 components. Their sparsity was tried by bits at a fixed error (`baselines.choose`, 2,000
steps) on target seed 15, which is not reported, in the basis as trained, and is the same in all bases (`SPARSITY`): the
L1 weights that reached the most errors, and of the k the one with the fewest bits at the two larger errors. The weight
of "SAE, L1, 1" is another matter: it is the one that finds most directions on these very targets (`wider` in
data/baselines.json), which only the truth tells. It and the transcoder with BatchTopK came later than the others (the
k of this one after 1,000 steps).

An answer in another basis is carried back and compared with the answer in the basis as trained; "another start" is the
control. "chance" has what the rule of ownership gives, as trained, to dictionaries without training, and to those that
were trained, their features mixed at random: means over `DRAWS` of them.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.study import baselines, controls
from experiments.basis import SEEDS, basis_of
from experiments.basis_networks import Change, Coder, mechanisms, orthogonal, whole_matrices
from experiments.experiment import Row, Rows, Study, Tensors

BASES = ("plain", "another start", "inputs rotated", "hidden rotated", "scaled 4", "stretched 4")
KINDS = {
    "SAE, L1": "relu", "SAE, L1, 1": "relu", "SAE, top 1": "topk", "transcoder": "relu",
    "transcoder, BatchTopK": "batch_topk",
}  # fmt: skip
METHODS = (*KINDS, "singular directions", "neurons", "columns")
SPARSITY = {"SAE, L1": 0.01, "SAE, L1, 1": 1.0, "SAE, top 1": 1, "transcoder": 0.1, "transcoder, BatchTopK": 1.0}
STEPS, N_FEATURES, DRAWS = 1000, 12, 20
READS, WRITES = "input of encode.0", "output of encode.0"


def places(method: str) -> dict[str, Any]:
    """Say what a dictionary reads and writes."""
    return {"reads": READS, "writes": WRITES} if method.startswith("transcoder") else {"reads": WRITES}


def dictionary(method: str, seed: int, name: str, network: Coder, data: Any) -> baselines.Dictionary:
    """Train a dictionary; another start has other first weights and other batches."""
    start = seed + (2000 if name == "another start" else 1000)
    settings = {"steps": STEPS, "seed": start, **places(method)}
    kind, sparsity = KINDS[method], SPARSITY[method]
    return baselines.fit(network, data, n_features=N_FEATURES, kind=kind, sparsity=sparsity, **settings)


def mixed(own: baselines.Dictionary, seed: int) -> baselines.Dictionary:
    """Mix a dictionary's features by a random orthogonal matrix, without biases: what all do together stays."""
    made = baselines.Dictionary(own.reads, own.writes, own.n_features, own.kind, own.sparsity, centred=own.centred)
    Q = orthogonal(own.n_features, seed).float()
    made.encoder.data = own.encoder.detach() * own.scale_in[:, None] @ Q
    made.decoder.data = Q.T @ (own.decoder.detach() / own.scale_out)
    return made


def judged(
    own: baselines.Dictionary, tms: apd.targets.TMS, network: Coder, back: Change
) -> tuple[Tensor | apd.Components, list[bool]]:
    """Carry what a dictionary found back, and say which features own a part of it.

    An autoencoder's answer are its directions [F, 2]; a feature owns one if its own direction, matched one to one, is
    within a cosine of 0.99, and if no other feature, alone at 1, gives this code more than 2% of the squares of all.
    A transcoder's are components of the encoder, judged as components are.
    """
    if not own.centred:
        parts = back.of(baselines.transcoded(own, "encode"))
        return parts, owned_of(parts, tms)
    W = whole_matrices(tms)["encode"]
    found = own.directions() @ back.M.float()
    match = baselines.match_directions(W, found)
    with torch.no_grad():
        squares = own.encode(network.hidden(torch.eye(len(W)) @ network.Q)).square()
    pure = squares[match.first, match.second] >= 0.98 * squares[:, match.second].sum(0)
    return found, ((match.similarity >= 0.99) & pure & (squares[match.first, match.second] > 0)).tolist()


def owned_of(parts: apd.Components, tms: apd.targets.TMS) -> list[bool]:
    """Say which features own one of the parts of the encoder, in the basis as trained."""
    owned: list[bool] = apd.metrics.ownership(parts, {"encode": mechanisms(tms)["encode"]}).owned.tolist()
    return owned


def answer(method: str, seed: int, name: str) -> tuple[Tensor | apd.Components, list[bool]]:
    """Give a method's answer, carried back, and which features own a part of it."""
    tms, network, moved = basis_of(name, seed)
    if method in KINDS:
        own = dictionary(method, seed, name, network, tms.data(128, nonempty=True))
        return judged(own, tms, network, moved.back)
    weights = {"encode": network.get_parameter("encode.0.weight").detach().T}
    if method == "singular directions":
        parts = baselines.singular(weights)
    elif method == "neurons":
        parts = baselines.neurons(weights, [{"encode": "output"}])
    else:
        parts = controls.input_columns(weights)
    parts = moved.back.of(parts)
    return parts, owned_of(parts, tms)


def by_chance(job: tuple[str, int]) -> tuple[list[Row], Tensors]:
    """Judge dictionaries that found nothing: a trained one's features mixed at random, and ones without training."""
    method, seed = job
    tms, network, moved = basis_of("plain", seed)
    own = dictionary(method, seed, "plain", network, tms.data(128, nonempty=True))
    row = {"mixed": 0.0, "untrained": 0.0}
    for draw in range(DRAWS):
        start = baselines.Dictionary(
            own.reads, own.writes, N_FEATURES, own.kind, own.sparsity, centred=own.centred, seed=DRAWS * seed + draw
        )
        for kind, made in (("mixed", mixed(own, DRAWS * seed + draw)), ("untrained", start)):
            row[kind] += sum(judged(made, tms, network, moved.back)[1]) / DRAWS
    return [row], {}


def run(job: tuple[str, int]) -> tuple[list[Row], Tensors]:
    """Ask one method in all bases, and compare its answers with the one in the basis as trained."""
    method, seed = job
    first, rows = answer(method, seed, "plain")[0], []
    for name in BASES:
        start = time.process_time()
        found, owned = answer(method, seed, name)
        if isinstance(found, apd.Components) and isinstance(first, apd.Components):
            match = apd.metrics.match_weights(first, found)
        else:
            assert isinstance(found, Tensor) and isinstance(first, Tensor)
            match = baselines.match_directions(first, found)
        facts = {"owned": owned, "agreement": match.mean, "chance": match.chance.mean().item()}
        rows.append({"basis": name, **facts, "seconds": round(time.process_time() - start, 1)})
    return rows, {}


RUNS = Rows(
    fields=("method", "seed"),
    jobs=lambda rows: [(method, seed) for method in METHODS for seed in SEEDS],
    run=run,
    order=lambda job: (METHODS.index(job[0]), job[1]),
)
CHANCE = Rows(
    fields=("method", "seed"),
    jobs=lambda rows: [(method, seed) for method in KINDS for seed in SEEDS],
    run=by_chance,
    order=lambda job: (METHODS.index(job[0]), job[1]),
)
STUDY = Study("basis_others", {"runs": RUNS, "chance": CHANCE}, compact=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
