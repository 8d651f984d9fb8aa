"""TMS against its closed form, with its mechanisms, rotated or not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.targets import TMS


def tms(identity: bool = False, n: int = 5, d: int = 2) -> TMS:
    target = TMS(n, d, identity=identity)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        target.encode.weight.copy_(torch.randn(d, n, generator=generator))
        target.bias.copy_(0.3 * torch.randn(n, generator=generator))
        if target.middle is not None:
            target.middle.weight.copy_(torch.randn(d, d, generator=generator))
    return target


def inputs(n: int = 5) -> Tensor:
    return torch.randn(50, n, generator=torch.Generator().manual_seed(1))


def test_closed_form() -> None:
    target, x = tms(), inputs()
    W = target.encode.weight.T
    torch.testing.assert_close(target(x), (x @ W @ W.T + target.bias).clamp_min(0))
    assert target.decode.weight is target.encode.weight
    deep = tms(identity=True)
    assert deep.middle is not None
    W, M = deep.encode.weight.T, deep.middle.weight.T
    torch.testing.assert_close(deep(x), (x @ W @ M @ W.T + deep.bias).clamp_min(0))


@pytest.mark.parametrize("identity", [False, True])
def test_rotating_leaves_the_function_as_it_was(identity: bool) -> None:
    target, x = tms(identity), inputs()
    before, weight = target(x), target.encode.weight.clone()
    for turns in (1, 2):
        target.rotate(seed=turns)
        torch.testing.assert_close(target(x), before)
        assert target.rotation is not None
        torch.testing.assert_close(target.rotation @ target.rotation.T, torch.eye(5))
        torch.testing.assert_close(target.encode.weight @ target.rotation.T, weight)
    assert (target.encode.weight - weight).abs().max() > 0.1


@pytest.mark.parametrize("rotated", [False, True])
def test_mechanisms_sum_to_the_weight_and_answer_one_feature_each(rotated: bool) -> None:
    target = tms()
    if rotated:
        target.rotate(seed=3)
    Z = target.mechanisms()["encode.weight"]
    assert list(Z.shape) == [5, 5, 2]
    torch.testing.assert_close(Z.sum(0), target.encode.weight.T.detach())
    assert torch.linalg.matrix_rank(Z).tolist() == [1] * 5
    for j in range(5):
        feature = torch.eye(5)[j]
        met = feature if target.rotation is None else feature @ target.rotation
        for i in range(5):
            expected = target.encode(met).detach() if i == j else torch.zeros(2)
            torch.testing.assert_close(met @ Z[i], expected)


def test_mechanisms_with_the_identity_layer() -> None:
    target = TMS(5, 2, identity=True)
    truth = target.mechanisms()
    assert list(truth) == target.weights
    network = apd.Network(target, target.weights)
    for path, Z in truth.items():
        torch.testing.assert_close(Z.sum(0), network.weights[path])
        used = Z.flatten(1).norm(dim=1) > 0
        assert used.tolist() == ([True] * 5 + [False] if path == "encode.weight" else [False] * 5 + [True])
    assert target.middle is not None
    assert not target.middle.weight.requires_grad


def test_fitting() -> None:
    """A few steps: it learns, repeatably, and leaves no gradients behind."""

    def loss(target: TMS) -> float:
        x = target.data(4096)(0, torch.Generator().manual_seed(9))
        return float((target(x) - x).square().mean())

    first = TMS().fit(seed=0, steps=400)
    second = TMS().fit(seed=0, steps=400)
    assert torch.equal(first.encode.weight, second.encode.weight)
    assert not torch.equal(first.encode.weight, TMS().fit(seed=1, steps=2).encode.weight)
    zero = float(first.data(4096)(0, torch.Generator().manual_seed(9)).square().mean())
    assert loss(first) < 0.4 * zero
    assert all(p.grad is None for p in first.parameters())
    for size, papers in (((5, 2), 1024), ((6, 2), 2048)):
        given, usual = (TMS(*size).fit(steps=2, **batch) for batch in ({"batch_size": papers}, {}))
        assert torch.equal(given.encode.weight, usual.encode.weight), "the paper's batches"
    deep = TMS(identity=True).fit(seed=0, steps=20)
    assert deep.middle is not None
    assert torch.equal(deep.middle.weight, torch.eye(2)), "the identity layer is fixed"
    before = torch.get_rng_state()
    TMS.fit(first, steps=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_ownership_of_a_tms_is_that_by_weights() -> None:
    """Of its own mechanisms, each by itself; the second and third change places."""
    target = apd.targets.TMS(4, 3).fit(steps=5)
    order = torch.tensor([0, 2, 1, 3])
    parts = apd.Components.from_matrices({path: P[order] for path, P in target.mechanisms().items()})
    assert target.ownership(parts).owner.tolist() == order.tolist()
    assert target.ownership(parts).complete


def test_recipes_are_as_they_were_found() -> None:
    """The settings that chapters 1, 7 and 10 and the stored runs were made with, as numbers that stand here again."""
    small = apd.targets.TMS(5, 2).recipe
    share = 1 - 0.95**5  # of the samples, those that are not empty
    expected = {"n_components": 12, "steps": 1600, "lr": 3e-2, "p": 1.0, "tidy_every": 0.1, "tidy_from": 0.4}
    expected |= {"tidy_until": 0.75, "reseed_until": 0.65, "min_cosine": 0.9, "restarts": 4}
    assert {name: small[name] for name in expected} == expected
    assert small["minimality"] == pytest.approx(share)
    assert small["scrub"] == pytest.approx(0.5 * share)
    assert small["top_k"] == ((0.0, 0.211 / share), (0.7, 0.211 / share), (0.701, 0.34 / share))
    assert small["simplicity"] == ((0.0, 1.2 * share), (0.699, 1.2 * share), (0.7, 0.0))
    identity = apd.targets.TMS(5, 2, identity=True).recipe
    expected = {"n_components": 13, "per_weight": (12, 1), "tidy_until": 0.85, "reseed_until": 0.0, "min_cosine": 0.8}
    assert {name: identity[name] for name in expected} == expected
    large = apd.targets.TMS(40, 10).recipe
    assert (large["n_components"], large["rank"], large["steps"], large["restarts"]) == (60, 4, 1500, 2)
    assert [value for _, value in large["top_k"]] == pytest.approx([1.8, 1.8, 4.0])
    gated = apd.targets.GatedFunctions(4, show_neurons=True).recipe
    share = 1 - 0.95**4
    expected = {"n_components": 10, "rank": 1, "steps": 2500, "lr": 3e-2, "init_std": 0.02, "faithfulness": 3.0}
    expected |= {"p": 1.0, "tidy_every": 0.1, "tidy_from": 0.2, "reseed_until": 0.0, "restarts": 24}
    assert {name: gated[name] for name in expected} == expected
    assert gated["minimality"] == gated["scrub"] == pytest.approx(50 * share)
    assert gated["top_k"] == pytest.approx(0.2217 / share)
    assert [value for _, value in gated["simplicity"]] == pytest.approx([10 * share, 10 * share, 0.0])


@pytest.mark.parametrize(("length", "there"), [(0.011, True), (0.009, False)])
def test_features_on_one_line_are_told_unless_they_are_far_shorter_than_the_longest(length: float, there: bool) -> None:
    target = tms()
    with torch.no_grad():
        target.encode.weight.copy_(torch.tensor([[1.0, -length, 0, 0.6, 0.5], [0, 0, 0.9, 0.6, -0.5]]))
    assert target.same_line == ([(0, 1)] if there else [])


def test_without_a_gradient_weights_decay_by_a_hundredth_of_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate falls from 5e-3 to 0 along a line; on inputs and biases that are zero there is no slope."""
    monkeypatch.setattr(TMS, "data", lambda self, batch_size: lambda step, generator: torch.zeros(batch_size, 5))
    seen: list[Tensor] = []
    kept = [1 - 0.01 * 5e-3 * (1 - step / 400) for step in range(400)]
    for steps in (1, 400):
        seen.append(TMS().fit(steps=steps).encode.weight.detach().double())
    torch.testing.assert_close(seen[1], seen[0] / kept[0] * math.prod(kept), rtol=1e-4, atol=1e-6)
    assert math.prod(kept) < 0.991
