"""Micro-batches and recomputed layers: the same result as the whole batch at once, and less that is kept for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import case
from torch import Tensor, nn

import apd_minimal as apd
from apd_minimal.algorithm import begin
from apd_minimal.attributions import gradient

WAYS: list[dict[str, Any]] = [
    {"micro_batch": 1},
    {"micro_batch": 7},  # the last piece is smaller
    {"micro_batch": 1000},  # larger than the batch
    {"recompute": True},
    {"micro_batch": 5, "recompute": True},
]
every_way = pytest.mark.parametrize("way", WAYS, ids=str)
ALL_LOSSES: dict[str, Any] = {
    "n_components": 6,
    "top_k": 1.5,
    "steps": 8,
    "restarts": 2,
    "hidden": 0.7,
    "hidden_modules": ["1"],
    "simplicity": 3.0,
    "scrub": 0.5,
    "tidy_every": 0.25,
    "reseed_until": 0.0,  # the directions of new starts magnify rounding
    "unit_norm": True,
    "progress": False,
}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apd_minimal.tidy.tidy.TIDY_SAMPLES", 60)
    monkeypatch.setattr("apd_minimal.outcome.HELD_OUT_SAMPLES", 90)


def mlp() -> nn.Sequential:
    """Two layers in double precision, so that rounding cannot turn a choice."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)).double()


def batches(step: int, generator: torch.Generator) -> Tensor:
    """Sparse features, 33 samples; a third of them are empty and left out."""
    return apd.data.SparseFeatures(5, 0.2, batch_size=33)(step, generator).double()


def distinct(step: int, generator: torch.Generator) -> Tensor:
    """The same with no two samples alike: which of two that are is among the top k, rounding would decide."""
    x = batches(step, generator)
    return x + 0.01 * torch.rand(x.shape, generator=generator, dtype=x.dtype)


def assert_same(found: apd.Decomposition, expected: apd.Decomposition) -> None:
    assert found.restarts is not None and expected.restarts is not None
    for mine, theirs in zip(found.restarts.parameters(), expected.restarts.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)
    assert found.history.keys() == expected.history.keys()
    for name, rows in expected.history.items():
        if name != "step":  # None where a loss is not in force
            both = [torch.tensor([r for r in h if r[0] is not None]) for h in (found.history[name], rows)]
            torch.testing.assert_close(both[0], both[1], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(torch.tensor(found.scores), torch.tensor(expected.scores), rtol=1e-6, atol=1e-9)
    assert found.chosen == expected.chosen


@every_way
def test_all_losses_and_restarts_give_the_same(way: dict[str, Any]) -> None:
    settings = ALL_LOSSES | {"batches": distinct, "weights": ["0.weight", "2.weight"]}
    expected = apd.decompose(mlp(), **settings)
    assert set(expected.history) == {"step", "faithfulness", "minimality", "simplicity", "hidden", "scrub"}
    assert_same(apd.decompose(mlp(), **settings, **way), expected)


@every_way
@pytest.mark.parametrize("divergence", ["mse", "kl"])
def test_gates_per_position_give_the_same(way: dict[str, Any], divergence: str) -> None:
    one = case("sequence")
    settings: dict[str, Any] = {
        "n_components": 4, "top_k": 1.2, "steps": 6, "scrub": 0.5, "per_position": True, "progress": False,
        "tidy_every": 0.25, "reseed_until": 0.0, "divergence": divergence,
    }  # fmt: skip
    results = [
        apd.decompose(one.target, lambda step, g: one.inputs(9, g), list(one.stored), **settings, **changes)
        for changes in ({}, way)
    ]
    assert_same(results[1], results[0])


def test_a_mask_may_come_per_sample() -> None:
    settings = ALL_LOSSES | {"batches": batches, "weights": ["0.weight", "2.weight"], "per_sample": True, "top_k": 2}
    expected = apd.decompose(mlp(), **settings)
    assert_same(apd.decompose(mlp(), **settings, micro_batch=4), expected)


@pytest.mark.parametrize(("micro_batch", "most"), [(8, 8), (None, 33)])
def test_attributions_are_asked_for_pieces(micro_batch: int | None, most: int) -> None:
    """Also in tidying and scoring: of as many samples as a step has, without those at rest."""
    seen: list[int] = []

    def watched(network: apd.Network, components: apd.Components, x: Tensor) -> Tensor:
        seen.append(len(x))
        return gradient(network, components, x)

    settings = ALL_LOSSES | {"batches": batches, "weights": ["0.weight", "2.weight"], "tidy_every": 0.5, "steps": 2}
    apd.decompose(mlp(), **settings, attribution=watched, micro_batch=micro_batch)
    assert max(seen) == most
    assert sum(seen) > 90 + 60, "scoring the restarts and tidying is in it"


def test_pieces_have_the_same_attributions() -> None:
    config = apd.Config(6, 2.0, restarts=2, tidy_every=0.0)
    run = begin(apd.Network(mlp(), ["0.weight", "2.weight"]), batches, config, "mse", None)
    x = run.many_inputs(90, torch.Generator().manual_seed(0))
    assert run.batch_size < len(x)
    torch.testing.assert_close(run.attributions(x, run.components), gradient(run.network, run.components, x))


class Kept:
    """Counts the bytes that autograd keeps, and the most that it kept at a time."""

    now = most = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.bytes = tensor, tensor.nbytes
        Kept.now += self.bytes
        Kept.most = max(Kept.most, Kept.now)

    def __del__(self) -> None:
        Kept.now -= self.bytes


def kept(n_components: int, batch: int = 64, micro_batch: int | None = None, recompute: bool = False) -> int:
    """The most bytes that autograd keeps in a step's sparse forward passes, the scrub loss's in particular."""
    x = torch.randn(batch, 5, generator=torch.Generator().manual_seed(0)).double()
    asked = {"recompute": True} if recompute else {}  # nothing is worked out twice unless one asks
    network = apd.Network(mlp(), ["0.weight", "2.weight"], **asked)
    config = apd.Config(n_components, 2.0, tidy_every=0.0)
    run = begin(network, lambda step, g: x, config, "mse", None, micro_batch)
    Kept.now = Kept.most = 0
    # Attributions and the sums of factors are not what is asked for here.
    prepared = run.prepare(x, scrubs=True)
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda k: k.tensor):
        for piece in prepared.pieces(run.micro_batch):
            losses = run.sparse_losses(piece, {"hidden": 0.0})
            torch.stack(list(losses.values())).sum().backward()
            del losses
    return Kept.most


def test_a_micro_batch_keeps_its_share() -> None:
    whole = kept(32)
    assert kept(32, micro_batch=16) < 0.35 * whole
    assert kept(32, batch=128, micro_batch=16) < 1.1 * kept(32, micro_batch=16), "the batch may grow"
    assert kept(32, batch=128) > 1.8 * whole


def test_what_recomputed_layers_keep_does_not_grow_with_the_components() -> None:
    assert kept(256) > 3 * kept(64)
    assert kept(256, recompute=True) == kept(64, recompute=True)
    assert kept(64, recompute=True) < 0.1 * kept(64)


def test_a_step_takes_its_pieces_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole step, not its parts: every piece is followed by its way back before the next is begun."""
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)).double()
    network = apd.Network(mlp(), ["0.weight", "2.weight"])
    most = []
    for micro_batch in (None, 16):
        config = apd.Config(32, 2.0, tidy_every=0.0)
        run = begin(network, lambda step, g: x, config, "mse", lambda n, c, x: torch.rand(1, len(x), 32), micro_batch)
        Kept.now = Kept.most = 0
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda k: k.tensor):
            run.advance()
        most.append(Kept.most)
    assert most[1] < 0.5 * most[0]


@pytest.mark.parametrize("size", [0, -3])
def test_an_empty_piece_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"micro_batch must be at least 1, got {size}"):
        apd.decompose(mlp(), batches, ["0.weight"], 3, 1.0, micro_batch=size, progress=False)
