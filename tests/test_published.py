"""The recipe as released: its loop is short because TMS is, and agrees with the package's slow and general functions."""

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


@pytest.fixture
def target() -> apd.targets.TMS:
    """A target that has learnt little, with biases."""
    return apd.targets.TMS(5, 2).fit(seed=3, steps=200)


@pytest.fixture
def components(target: apd.targets.TMS) -> apd.Components:
    """Three starts."""
    recipe = RECIPES["tms-5-2"] | {"starts": 3}
    return published.start(target, recipe, torch.Generator().manual_seed(0)).map(lambda t: 4 * t)


@pytest.mark.parametrize("at", ["target", "components"])
def test_scores_are_squared_gradient_attributions(
    target: apd.targets.TMS, components: apd.Components, at: str
) -> None:
    x = target.data(64, nonempty=True)(0, torch.Generator().manual_seed(1))
    slow = apd.attributions.gradient(apd.Network(target, [PATH]), components, x, at=at)
    fast = published.scores(target, components.matrices(PATH), x, at)
    torch.testing.assert_close(fast, 5 * slow.square(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", RECIPES)
def test_losses_are_those_of_the_whole_batch(name: str) -> None:
    recipe: Row = RECIPES[name] | {"starts": 2}
    target = apd.targets.TMS(*((40, 10) if "40" in name else (5, 2))).fit(seed=3, steps=50)
    components = published.start(target, recipe, torch.Generator().manual_seed(0)).map(lambda t: 3 * t)
    network = apd.Network(target, [PATH])
    x = target.data(512)(0, torch.Generator().manual_seed(1))
    assert 0 < float((x.amax(1) == 0).sum())  # with empty samples
    attributions = apd.attributions.gradient(network, components, x, at=recipe["attribute_at"])
    mask = batch_top_k(attributions, recipe["top_k"])
    found = published.losses(target, components, x, recipe)
    expected = {
        "faithfulness": apd.losses.faithfulness(components, network.weights),
        "minimality": apd.losses.minimality(network(x, components, mask), network(x)),
        "simplicity": apd.losses.simplicity(components, mask, recipe["p"]),
    }
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


def test_start_is_xavier_of_a_stack_of_instances(target: apd.targets.TMS) -> None:
    drawn: Tensor = torch.nn.init.xavier_normal_(torch.empty(12, 5, 5, 3000))
    assert published.start_std(5, 3000, 5, 12) == pytest.approx(float(drawn.std()), rel=0.01)
    found = published.start(target, RECIPES["tms-5-2"] | {"starts": 3000}, torch.Generator().manual_seed(0))
    for factor, entries in ((found.A[PATH], 15), (found.B[PATH], 6)):
        assert float(factor.std()) == pytest.approx(math.sqrt(2 / (entries * 17)), rel=0.01)


@pytest.mark.parametrize(("name", "half"), [("tms-5-2", 3e-2), ("tms-40-10", 1e-3 * math.cos(math.pi / 4))])
def test_learning_rate(name: str, half: float) -> None:
    recipe = RECIPES[name]
    peak, last = recipe["lr"], 0.0 if name == "tms-40-10" else recipe["lr"]
    assert [published.lr_at(step, recipe) for step in (0, 500, 1000)] == pytest.approx([0, peak / 2, peak])
    assert published.lr_at(10_500, recipe) == pytest.approx(half, rel=1e-3)
    assert published.lr_at(19_999, recipe) == pytest.approx(last, abs=1e-9)


def test_training_lowers_the_objective(target: apd.targets.TMS) -> None:
    recipe = RECIPES["tms-5-2"] | {"starts": 2, "steps": 200, "batch_size": 256}
    x = target.data(4096)(0, torch.Generator().manual_seed(5))
    objective = []
    for steps in (0, None):
        loss = published.losses(target, published.train(target, recipe, 0, steps), x, recipe)
        objective.append(loss["faithfulness"] + loss["minimality"] + 0.7 * loss["simplicity"])
    assert (objective[1] < 0.2 * objective[0]).all()
