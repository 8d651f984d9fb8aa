"""The worst masks, and decompositions that were not learned: brute force on networks of a few components."""

from __future__ import annotations

import itertools

import pytest
import runs
import torch
from torch import Tensor, nn

import apd_minimal as apd
from apd_minimal.study import controls
from apd_minimal.study import worst as attack
from apd_minimal.study.worst import Corners, worst

PATH = "encode.weight"


def decomposed(n: int = 4, seed: int = 0) -> apd.Components:
    """Components that do not fit, so that inactive ones do harm."""
    generator = torch.Generator().manual_seed(seed)
    return apd.Components.random({PATH: (5, 2)}, n, 1, None, 0.7, generator)


def inputs(n: int = 6, seed: int = 1) -> Tensor:
    return torch.rand(n, 5, generator=torch.Generator().manual_seed(seed))


def least(n: int, hard: bool, seed: int = 2) -> Tensor:
    drawn = torch.rand(6, n, generator=torch.Generator().manual_seed(seed))
    return (drawn < 0.4) if hard else drawn


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_exact_worst_mask_is_that_of_brute_force(hard: bool, seed: int) -> None:
    target, components, x, gates = runs.tms(), decomposed(seed=seed), inputs(), least(4, hard)
    found = worst(target, components, x, gates, steps=5, n_draws=8)
    P, bias = components.matrices(PATH), target.bias
    wanted = target(x)
    for b in range(len(x)):
        errors = []
        for corner in itertools.product((0.0, 1.0), repeat=4):
            g = gates[b].float() + (1 - gates[b].float()) * torch.tensor(corner)
            W = torch.einsum("c,cij->ij", g, P)
            errors.append((torch.relu(x[b] @ W @ W.T + bias) - wanted[b]).square().mean())
        assert found.exact is not None
        torch.testing.assert_close(found.exact[b], torch.stack(errors).max())
        torch.testing.assert_close(found.active[b], errors[0])


@pytest.mark.parametrize("hard", [False, True])
def test_each_is_at_most_the_next(hard: bool) -> None:
    for seed in range(5):
        found = worst(runs.tms(), decomposed(6, seed), inputs(), least(6, hard), seed=seed)
        assert found.exact is not None
        slack = 1e-6 * (1 + found.exact)
        assert (found.half <= found.searched + slack).all()
        assert (found.searched <= found.exact + slack).all()
        assert (found.ascended <= found.exact + slack).all()
        assert list(found.means()) == ["active", "half", "searched", "ascended", "exact"]


def test_an_attack_of_more_steps_finds_at_least_as_much_and_more_than_chance() -> None:
    """On a linear network with orthogonal harm the error is convex in the gates: the attack finds the worst corner."""
    target = nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        target.weight.copy_(torch.eye(8))
    A = torch.eye(8)[:, :, None]
    components = apd.Components({"weight": A}, {"weight": 2 * A.mT})  # every one writes twice what it should
    x, gates = torch.ones(3, 8), torch.full((3, 8), 0.5)  # at 1/2 they are right
    few, many = (worst(target, components, x, gates, steps=n, n_draws=3) for n in (0, 20))
    assert many.exact is not None and few.exact is not None
    torch.testing.assert_close(many.ascended, many.exact)
    torch.testing.assert_close(many.exact, torch.ones(3))
    torch.testing.assert_close(many.active, torch.zeros(3))
    assert (few.ascended < many.ascended).all()
    assert (many.searched < many.exact).all()


@pytest.mark.parametrize("on", [on for on in itertools.product((False, True), repeat=4) if any(on)])
def test_any_corner_can_be_the_worst(on: tuple[bool, ...]) -> None:
    """The error is the square of a sum, largest with the positive parts on and the negative ones off."""
    target = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(target.weight)
    A = torch.tensor([2.0 if there else -0.1 for there in on])[:, None, None]
    components = apd.Components({"weight": A}, {"weight": torch.ones(4, 1, 1)})
    found = worst(target, components, torch.ones(9, 1), torch.zeros(9, 4), n_draws=1)
    torch.testing.assert_close(found.exact, torch.full((9,), 4.0 * sum(on) ** 2))
    torch.testing.assert_close(found.ascended.amax(), torch.tensor(4.0 * sum(on) ** 2))


def test_empty_components_cost_nothing_and_many_are_too_many() -> None:
    target, components, x = runs.tms(), decomposed(3), inputs()
    gates = torch.zeros(6, 3)
    exact = worst(target, components, x, gates, steps=1).exact
    A, B = ({PATH: torch.cat([f[PATH], torch.zeros(20, *f[PATH].shape[1:])])} for f in (components.A, components.B))
    padded = apd.Components(A, B)
    again = Corners(target, padded, x, torch.zeros(6, 23), apd.losses.mse).enumerate()
    assert again is not None and exact is not None
    torch.testing.assert_close(again, exact)
    assert worst(target, decomposed(15), x, torch.zeros(6, 15), steps=1, n_draws=1).exact is None


def test_as_many_as_the_limit_are_tried_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, tried in ((2, False), (3, True), (4, True)):
        monkeypatch.setattr(attack, "MOST", limit)
        corners = Corners(runs.tms(), decomposed(3), inputs(), torch.zeros(6, 3), apd.losses.mse)
        assert (corners.enumerate() is not None) is tried


def test_gates_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"gates must be boolean or in \[0, 1\], got .*numbers from 0 to 2"):
        worst(runs.tms(), decomposed(), inputs(), torch.tensor([[0.0, 2.0, 0.0, 0.0]]).expand(6, 4))
    with pytest.raises(ValueError, match=r"gates must be of shape \[6, 4\]"):
        worst(runs.tms(), decomposed(), inputs(), torch.zeros(6, 3))


def test_another_divergence_is_what_is_attacked() -> None:
    def first(outputs: Tensor, wanted: Tensor) -> Tensor:
        return (outputs - wanted)[..., 0].abs()

    found = worst(runs.tms(), decomposed(), inputs(), torch.zeros(6, 4), divergence=first)
    assert found.exact is not None
    assert (found.ascended <= found.exact + 1e-6).all()
    assert not torch.allclose(found.exact, worst(runs.tms(), decomposed(), inputs(), torch.zeros(6, 4)).exact)


# Decompositions that were not learned.


def test_the_split_by_input_columns_is_the_truth_of_tms() -> None:
    target = runs.tms()
    weights = apd.Network(target, [PATH]).weights
    split = controls.input_columns(weights)
    torch.testing.assert_close(split.matrices(PATH), target.mechanisms()[PATH])
    assert apd.metrics.ownership(split, target.mechanisms()).complete
    # On one feature alone, its component is all that an untied layer needs.
    layer, x = nn.Linear(5, 2, bias=False), torch.eye(5)
    one = apd.Network(layer, ["weight"])
    torch.testing.assert_close(one(x, controls.input_columns(one.weights), torch.eye(5)), layer(x))


def test_after_a_rotation_it_is_not() -> None:
    target = runs.tms().rotate(seed=3)
    weights = apd.Network(target, [PATH]).weights
    split = controls.input_columns(weights)
    torch.testing.assert_close(split.sum(PATH), weights[PATH])
    assert int(apd.metrics.ownership(split, target.mechanisms()).owned.sum()) == 0
    assert target.rotation is not None
    back = controls.rotated_columns(weights, target.rotation.T)
    torch.testing.assert_close(back.matrices(PATH), target.mechanisms()[PATH])


@pytest.mark.parametrize("seed", [0, 1])
def test_a_random_split_sums_to_the_weights_with_parts_of_rank_one(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = {"a": torch.randn(6, 4, generator=generator), "b": torch.randn(6, 3, generator=generator)}
    split = controls.random_split(weights, seed)
    for path, w in weights.items():
        torch.testing.assert_close(split.sum(path), w)
        matrices = split.matrices(path)
        assert (torch.linalg.matrix_rank(matrices) == 1).all()
        left = torch.linalg.svd(matrices).U[:, :, 0]
        torch.testing.assert_close((left @ left.T).abs(), torch.eye(6), atol=1e-4, rtol=0)
    assert not torch.allclose(split.A["a"], controls.random_split(weights, seed + 1).A["a"])


def test_bases_and_weights_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"weights must be of one d_in, got \{'a': 3, 'b': 4\}"):
        controls.input_columns({"a": torch.ones(3, 2), "b": torch.ones(4, 2)})
    with pytest.raises(ValueError, match="basis must be orthonormal"):
        controls.rotated_columns({"a": torch.ones(3, 2)}, torch.ones(3, 3))
