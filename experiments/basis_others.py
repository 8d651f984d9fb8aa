"""Create data/basis_others.json: dictionaries, singular directions, neurons and columns in many bases (chapter 31).

python -m experiments.basis_others [--only "SAE, L1" ...] [--processes N]       (about six minutes of one core)

The networks are those of experiments/basis.py. Each method looks at the encoder: a sparse autoencoder (SAE) at the
numbers that it writes, a transcoder at its inputs and these numbers, the others at its weights. The dictionaries have
12 features, as APD has 12 components. Their sparsity was tried by bits at a fixed error (`baselines.choose`, 2,000
steps) on target seed 15, which is not reported, in the basis as trained, and is the same in all bases (`SPARSITY`): the
L1 weights that reached the most errors, and of the k the one with the fewest bits at the two larger errors.

An answer in another basis is carried back and compared with the answer in the basis as trained; "another start" is the
control.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.study import baselines, controls
from experiments.basis import SEEDS, basis_of
from experiments.basis_networks import Coder, mechanisms, whole_matrices
from experiments.experiment import Row, Rows, Study, Tensors

BASES = ("plain", "another start", "inputs rotated", "hidden rotated", "scaled 4", "stretched 4")
KINDS = {"SAE, L1": "relu", "SAE, top 1": "topk", "transcoder": "relu"}
METHODS = (*KINDS, "singular directions", "neurons", "columns")
SPARSITY = {"SAE, L1": 0.01, "SAE, top 1": 1, "transcoder": 0.1}
STEPS, N_FEATURES = 1000, 12
READS, WRITES = "input of encode.0", "output of encode.0"


def places(method: str) -> dict[str, Any]:
    """Say what a dictionary reads and writes."""
    return {"reads": READS, "writes": WRITES} if method == "transcoder" else {"reads": WRITES}


def dictionary(method: str, seed: int, name: str, network: Coder, data: Any) -> baselines.Dictionary:
    """Train a dictionary; another start has other first weights and other batches."""
    start = seed + (2000 if name == "another start" else 1000)
    settings = {"steps": STEPS, "seed": start, **places(method)}
    kind, sparsity = KINDS[method], SPARSITY[method]
    return baselines.fit(network, data, n_features=N_FEATURES, kind=kind, sparsity=sparsity, **settings)


def answer(method: str, seed: int, name: str) -> tuple[Tensor | apd.Components, list[bool]]:
    """Give a method's answer, carried back, and which features own a part of it.

    A dictionary's answer are its directions [F, 2]; a feature owns one if its own direction, matched one to one, is
    within a cosine of 0.99, and if no other feature, alone at 1, gives this code more than 2% of the squares of all.
    Everything else gives components of the encoder, judged as components are.
    """
    tms, network, moved = basis_of(name, seed)
    W, back = whole_matrices(tms)["encode"], moved.back
    if method.startswith("SAE"):
        own = dictionary(method, seed, name, network, tms.data(128, nonempty=True))
        found = own.directions() @ back.M.float()
        match = baselines.match_directions(W, found)
        with torch.no_grad():
            squares = own.encode(network.hidden(torch.eye(len(W)) @ network.Q)).square()
        pure = squares[match.first, match.second] >= 0.98 * squares[:, match.second].sum(0)
        return found, ((match.similarity >= 0.99) & pure & (squares[match.first, match.second] > 0)).tolist()
    weights = {"encode": network.get_parameter("encode.0.weight").detach().T}
    if method == "transcoder":
        own = dictionary(method, seed, name, network, tms.data(128, nonempty=True))
        parts = baselines.transcoded(own, "encode")
    elif method == "singular directions":
        parts = baselines.singular(weights)
    elif method == "neurons":
        parts = baselines.neurons(weights, [{"encode": "output"}])
    else:
        parts = controls.input_columns(weights)
    parts = back.of(parts)
    return parts, apd.metrics.ownership(parts, {"encode": mechanisms(tms)["encode"]}).owned.tolist()


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
STUDY = Study("basis_others", {"runs": RUNS}, compact=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
