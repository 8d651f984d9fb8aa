"""One attention network stored in several ways: the same function, and components that come back as they were."""

from __future__ import annotations

import pytest
import torch

import apd_minimal as apd
from experiments.fused import READ, WAYS, Stored, maps, stored, whole
from experiments.planted_kinds import KINDS

TARGET = KINDS["attention"](seed=3)
X = TARGET.data(32)(0, torch.Generator().manual_seed(0))
N_WEIGHTS = dict.fromkeys(WAYS, 4) | {"fused": 2, "heads": 12}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_the_same_network(way: str) -> None:
    network = Stored(TARGET, way)
    torch.testing.assert_close(network(X), TARGET(X))
    assert len(network.weights) == N_WEIGHTS[way]
    apd.Network(network, network.weights).check(X)


@pytest.mark.parametrize("way", WAYS)
def test_mechanisms_come_back_and_gates_act_alike(way: str) -> None:
    network = Stored(TARGET, way)
    true = {f"layers.{name}.weight": m for name, m in stored(TARGET.mechanisms(), way).items()}
    components = apd.Components.from_matrices(true)
    back = whole(components, way)
    for path, m in TARGET.mechanisms().items():
        torch.testing.assert_close(back.matrices(path), m, atol=1e-5, rtol=1e-4)
    gates = torch.rand(len(X), TARGET.n, generator=torch.Generator().manual_seed(1))
    mine = apd.Network(network, network.weights)(X, components, gates)
    torch.testing.assert_close(mine, apd.Network(TARGET, TARGET.weights)(X, TARGET.truth, gates), atol=1e-5, rtol=1e-4)


def test_the_heads_are_changed_as_their_names_say() -> None:
    was = {path: w.sum(0) for path, w in TARGET.mechanisms().items()}
    moved = stored(was, "reordered")
    for path in READ:
        heads, others = (m.split(4, -1) for m in (was[path], moved[path.removesuffix(".weight")]))
        assert all(torch.equal(other, heads[i - 1]) for i, other in enumerate(others))
    mapped = stored(was, "mapped")
    G = maps(3)
    for h in range(3):
        own = slice(4 * h, 4 * h + 4)
        torch.testing.assert_close(torch.linalg.svdvals(G[own, own]), torch.tensor([2, 2, 0.5, 0.5]).double())
        products = [
            q[:, own] @ k[:, own].T for q, k in ((was[READ[0]], was[READ[1]]), (mapped["query"], mapped["key"]))
        ]
        torch.testing.assert_close(products[1], products[0], atol=1e-5, rtol=1e-4)
    assert (mapped["query"] - was[READ[0]]).norm() > 0.5 * was[READ[0]].norm()
    torch.testing.assert_close(mapped["value"], was[READ[2]])
