"""The cut by planes of the inputs: it finds what it should, and nothing where what it asks for is not given."""

from __future__ import annotations

import pytest
import torch

import apd_minimal as apd
from experiments import planes
from experiments.architectures import MADE, common_mode, given_away
from experiments.planted import Planted
from experiments.planted_kinds import KINDS


def drawn(target: Planted, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Which mechanisms are on in 2,048 samples, and their inputs."""
    source, generator = target.data(2048), torch.Generator().manual_seed(seed)
    on = source.on(0, generator)
    return on, source.make(on, generator)


@pytest.mark.parametrize("kind", ["MLP", "SSM", "MLP, three inputs", "CNN, own colours"])
def test_a_group_holds_the_samples_of_one_mechanism_alone(kind: str) -> None:
    target = MADE[kind](seed=3)
    on, x = drawn(target)
    groups = planes.planes(target.rows(x), target.n, target.inputs)
    alone = {tuple((on * (on.sum(1, keepdim=True) == 1))[:, j].bool().tolist()) for j in range(target.n)}
    assert {tuple(group.tolist()) for group in groups} == alone


@pytest.mark.parametrize("kind", MADE)
def test_the_parts_are_the_mechanisms(kind: str) -> None:
    # The groups come from whoever made the inputs, so that this is about the cut alone.
    target = MADE[kind](seed=3)
    on, x = drawn(target)
    groups = torch.stack([(on[:, j] > 0) & (on.sum(1) == 1) for j in range(target.n)])
    for path, parts in planes.cut(target, x, groups).items():
        torch.testing.assert_close(parts, target.mechanisms()[path], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", MADE)
def test_the_cut_owns_all_where_inputs_come_in_planes_and_nothing_where_they_do_not(kind: str) -> None:
    target = MADE[kind](seed=3)
    assert planes.owned(target) == target.n
    if kind in ("MLP", "attention"):
        assert planes.owned(target, noise=0.01) == 0
        assert planes.owned(KINDS[kind](probability=0.8, seed=3)) == 0


def test_noise_has_the_size_that_is_asked_for() -> None:
    target = KINDS["RNN"](seed=3)
    x, y = (target.data(512, noise)(0, torch.Generator().manual_seed(0)) for noise in (0.0, 0.1))
    assert ((x - y).square().mean() / x.square().mean()).sqrt() == pytest.approx(0.1, rel=0.05)


def test_what_is_given_away_stays_in_the_sum() -> None:
    target = MADE["MLP"](seed=3)
    on, x = drawn(target)
    other, share = given_away(target, 2, x, on)
    moved = {path: (other.matrices(path) - true).norm(dim=(1, 2)) > 1e-4 for path, true in target.mechanisms().items()}
    assert {path: m.nonzero().flatten().tolist() for path, m in moved.items() if m.any()} == {"middle.weight": [2, 3]}
    torch.testing.assert_close(other.sum("middle.weight"), target.truth.sum("middle.weight"), atol=1e-5, rtol=0)
    # The weakest direction is the third: by the singular values of what the mechanism's own neurons say.
    neurons = target.mechanisms()["encode.weight"][2].abs().sum(0) > 0
    alone = (on[:, 2] > 0) & (on.sum(1) == 1)
    hidden = torch.nn.functional.leaky_relu(target.encode(x), 0.2).detach()[alone][:, neurons]
    energies = torch.linalg.svdvals(hidden).square()
    assert len(energies) == 3 and share == pytest.approx(float(energies[2] / energies.sum()), abs=1e-5)


def test_three_inputs_move_three_neurons_and_two_do_not() -> None:
    shares = {}
    for kind in ("MLP", "MLP, three inputs"):
        target = MADE[kind](seed=3)
        on, x = drawn(target)
        shares[kind] = [given_away(target, j, x, on)[1] for j in range(target.n)]
    assert max(shares["MLP"]) < 0.2 < min(shares["MLP, three inputs"])


def test_a_softmax_does_not_see_what_both_columns_of_a_router_share() -> None:
    target = KINDS["experts"](seed=3)
    on, x = drawn(target)
    other = common_mode(target)
    network = apd.Network(target, target.weights)
    with torch.no_grad():
        torch.testing.assert_close(network(x, other, on), target(x), atol=1e-4, rtol=0)
    torch.testing.assert_close(other.sum("router.weight"), target.truth.sum("router.weight"), atol=1e-5, rtol=0)
    assert int(target.ownership(other).owned.sum()) < target.n
