"""The study of chapter 33: one set of settings, controls that are what they say, digits that match their pictures."""

from __future__ import annotations

import pytest
import torch

import apd_minimal as apd
from apd_minimal.algorithm import begin
from experiments.architectures import (
    INSIDE,
    MADE,
    ORDER,
    at_the_truth,
    open_together,
    settings,
    singular,
    without_mechanisms,
)
from experiments.drawn_digits import Reader, digits
from experiments.planted_kinds import KINDS
from experiments.trained import without_training


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_no_setting_depends_on_the_kind() -> None:
    assert set(ORDER) <= set(MADE)
    found = []
    for kind in MADE:
        target = MADE[kind](seed=3)
        x = target.data(256)(0, generator())
        found.append(settings(target, target.weights, x, target.n, target.data().mean_active, 5))
        # The one computed number: 60 times the mean square of the outputs, where nothing active gives zeros.
        with torch.no_grad():
            nothing = target(x).square().mean().item()
        if kind not in ("selective SSM", "experts", "experts, one gate"):
            assert found[-1].pop("faithfulness") == pytest.approx(60 * nothing, rel=1e-3)
        found[-1].pop("faithfulness", None)
        found[-1]["judge"] = repr(found[-1]["judge"])
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize("kind", ["MLP", "SSM", "CNN"])
def test_a_network_without_mechanisms_has_the_same_singular_values_and_another_function(kind: str) -> None:
    target, other = KINDS[kind](seed=3), without_mechanisms(KINDS[kind](seed=3), 4)
    x = target.data(64)(0, generator())
    one, two = (apd.Network(t, target.weights) for t in (target, other))
    for path, w in one.weights.items():
        torch.testing.assert_close(
            torch.linalg.svdvals(w), torch.linalg.svdvals(two.weights[path]), atol=1e-4, rtol=1e-4
        )
    with torch.no_grad():
        assert (target(x) - other(x)).square().mean() > 0.1 * target(x).square().mean()


def test_parts_by_singular_values_sum_to_the_weights() -> None:
    target = KINDS["MLP"](seed=3)
    parts = singular(target.truth, target.n)
    for path, w in apd.Network(target, target.weights).weights.items():
        torch.testing.assert_close(parts.sum(path), w, atol=1e-4, rtol=1e-4)
        values = torch.linalg.svdvals(w)
        share = len(values) // target.n
        largest = parts.singular_values(path)
        torch.testing.assert_close(
            largest[0].sort(descending=True).values[:share], values[:share], atol=1e-3, rtol=1e-3
        )


@pytest.mark.parametrize("kind", INSIDE)
def test_a_cut_by_the_inside_owns_neurons_that_are_mixed_in_order_and_no_heads_that_are_turned(kind: str) -> None:
    target = MADE[kind](seed=3)
    parts = open_together(target, INSIDE[kind])
    for path, w in apd.Network(target, target.weights).weights.items():
        if kind != "attention":
            torch.testing.assert_close(parts.sum(path), w, atol=1e-5, rtol=0)
    owned = int(target.ownership(parts).owned.sum())
    assert owned >= 5 if kind != "attention" else owned == 0


def test_digits_belong_to_their_pictures() -> None:
    x, y = digits(3000, generator(1))
    assert x.shape == (3000, 1, 12, 12)
    again, _ = digits(3000, generator(1))
    assert torch.equal(x, again)
    means = torch.stack([x[y == c].mean(0) for c in range(10)]).flatten(1)
    new, wanted = digits(1000, generator(2))
    nearest = torch.cdist(new.flatten(1), means).argmin(1)
    assert (nearest == wanted).float().mean() > 0.3  # chance is 0.1


def test_a_reader_learns_and_its_random_twin_does_not() -> None:
    reader = Reader(3).fit(3, steps=300)
    x, y = digits(1000, generator(5))
    scores = reader(x)
    assert (scores.argmax(1) == y).float().mean() > 0.6
    assert (scores - scores.mean(0)).square().mean() == pytest.approx(1, rel=0.2)
    values = [torch.linalg.svdvals(reader.get_parameter(p).flatten(1)) for p in reader.weights[:2]]
    without_training(apd.Network(reader, list(reader.weights)), 3)
    assert (reader(x).argmax(1) == y).float().mean() < 0.4
    for path, before in zip(reader.weights[:2], values, strict=True):
        torch.testing.assert_close(
            torch.linalg.svdvals(reader.get_parameter(path).flatten(1)), before, atol=1e-4, rtol=1e-4
        )


def test_a_run_can_start_at_the_truth() -> None:
    target = MADE["MLP, all three"](seed=3)
    x = target.data(256)(0, generator())
    arguments = settings(target, target.weights, x, target.n, target.data().mean_active, 5)
    del arguments["judge"]
    run = begin(apd.Network(target, target.weights), target.data(32), apd.Config.from_dict(arguments))
    before = target.ownership(run.components.restart(1).map(torch.Tensor.detach))
    at_the_truth(run, target.truth)
    after = target.ownership(run.components.restart(1).map(torch.Tensor.detach))
    assert not before.owned.any() and after.owned.all()
    assert run.advance()["faithfulness"][1] < 1e-10
