"""The loop of the released recipe is short because TMS is; it agrees with the general functions of the package."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.selection import batch_top_k
from experiments import published
from experiments.experiment import Row
from experiments.published import PATH, RECIPES


def stacked(name: str = "tms-5-2", steps: int = 100) -> tuple[list[apd.targets.TMS], published.Targets, Row]:
    """Two targets that have learnt little, on one axis, and the recipe."""
    size = (40, 10) if "40" in name else (5, 2)
    targets = [apd.targets.TMS(*size).fit(seed=seed, steps=steps) for seed in (3, 4)]
    return targets, published.Targets(targets), RECIPES[name]


def drawn(targets: published.Targets, recipe: Row) -> apd.Components:
    """A start that is larger than the recipe's, so that the component model is not off everywhere."""
    return published.start(targets, recipe, torch.Generator().manual_seed(0)).map(lambda t: 3 * t)


@pytest.mark.parametrize("at", ["target", "components"])
def test_scores_are_squared_gradient_attributions(at: str) -> None:
    targets, both, recipe = stacked()
    components = drawn(both, recipe)
    x = both.data(64)(0, torch.Generator().manual_seed(1))
    fast = published.scores(both, components.matrices(PATH), x, at)
    for i, target in enumerate(targets):
        slow = apd.attributions.gradient(apd.Network(target, [PATH]), components.restart(i), x, at=at)
        torch.testing.assert_close(fast[i], 5 * slow.square(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", RECIPES)
def test_losses_are_those_of_the_whole_batch(name: str) -> None:
    targets, both, recipe = stacked(name, steps=50)
    components = drawn(both, recipe)
    x = both.data(512)(0, torch.Generator().manual_seed(1))
    assert (x.amax(1) == 0).any()  # with empty samples
    found = published.losses(both, components, x, recipe)
    for i, target in enumerate(targets):
        network, own = apd.Network(target, [PATH]), components.restart(i)
        attributions = apd.attributions.gradient(network, own, x, at=recipe["attribute_at"])
        mask = batch_top_k(attributions, recipe["top_k"])
        expected = {
            "faithfulness": apd.losses.faithfulness(own, network.weights),
            "minimality": apd.losses.minimality(network(x, own, mask), network(x)),
            "simplicity": apd.losses.simplicity(own, mask, recipe["p"]),
        }
        torch.testing.assert_close({k: v[i] for k, v in found.items()}, expected, rtol=1e-4, atol=1e-8)


def test_start_is_xavier_of_a_stack_of_instances() -> None:
    drawn_there: Tensor = torch.nn.init.xavier_normal_(torch.empty(12, 5, 5, 3000))
    assert published.start_std(5, 3000, 5, 12) == pytest.approx(float(drawn_there.std()), rel=0.01)
    _, both, recipe = stacked(steps=1)
    both.W = both.W[:1].expand(3000, -1, -1)
    found = published.start(both, recipe, torch.Generator().manual_seed(0))
    for factor, entries in ((found.A[PATH], 15), (found.B[PATH], 6)):
        assert float(factor.std()) == pytest.approx(math.sqrt(2 / (entries * 17)), rel=0.01)


@pytest.mark.parametrize(("name", "half"), [("tms-5-2", 3e-2), ("tms-40-10", 1e-3 * math.cos(math.pi / 4))])
def test_learning_rate(name: str, half: float) -> None:
    recipe = RECIPES[name]
    peak, last = recipe["lr"], 0.0 if name == "tms-40-10" else recipe["lr"]
    assert [published.lr_at(step, recipe) for step in (0, 500, 1000)] == pytest.approx([0, peak / 2, peak])
    assert published.lr_at(10_500, recipe) == pytest.approx(half, rel=1e-3)
    assert published.lr_at(19_999, recipe) == pytest.approx(last, abs=1e-9)


def test_training_lowers_the_objective() -> None:
    _, both, recipe = stacked()
    recipe = recipe | {"steps": 200, "batch_size": 256}
    x = both.data(4096)(0, torch.Generator().manual_seed(5))
    objective = []
    for steps in (0, None):
        loss = published.losses(both, published.train(both, recipe, steps), x, recipe)
        objective.append(loss["faithfulness"] + loss["minimality"] + 0.7 * loss["simplicity"])
    assert (objective[1] < 0.3 * objective[0]).all()
