"""The study that finds an induction circuit in pieces: what fades, what is merged, and its controls."""

from __future__ import annotations

import pytest
import torch

import apd_minimal as apd
from apd_minimal.targets import Induction
from experiments import induction, pieces

SCORES = torch.tensor([[[3.0, 1.0, 2.0], [0.1, 0.3, 0.2]]])  # [1, 2, 3]


def held() -> pieces.Held:
    selection = pieces.Held(1.0, since=0.5, allowed=0.2, rate=0.25)
    selection.start(1, 3, SCORES)
    return selection


def test_before_it_holds_the_others_are_off() -> None:
    selection = held()
    assert torch.equal(selection.choose(SCORES, 0.49).float(), torch.tensor([[[1.0, 0, 1], [0, 0, 0]]]))
    selection.observe(torch.tensor([0.0]), torch.tensor([1.0]), 0.49)
    assert selection.left.item() == 1


def test_the_others_fade_while_the_error_is_allowed_and_come_back_where_it_is_not() -> None:
    selection, nothing = held(), torch.tensor([2.0])
    for error, left in ((0.39, 0.75), (0.39, 0.5), (0.41, 0.75), (0.41, 1.0), (0.41, 1.0), (0.0, 0.75)):
        selection.observe(torch.tensor([error]), nothing, 0.7)
        assert selection.left.item() == pytest.approx(left)
    gates = selection.choose(SCORES, 0.7)
    assert torch.equal(gates, torch.tensor([[[1.0, 0.75, 1.0], [0.75, 0.75, 0.75]]]))
    assert selection.state()[0] is selection.left


def test_every_start_fades_by_its_own_error() -> None:
    selection = pieces.Held(1.0, since=0.0, rate=0.25)
    selection.start(2, 3, SCORES)
    selection.observe(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]), 0.0)
    gates = selection.choose(SCORES.expand(2, -1, -1), 0.0)
    assert gates[0].min() == 0.75 and gates[1].min() == 1


def test_pieces_that_are_on_together_come_together_untrained() -> None:
    """Cut each circuit by heads, and each head's matrices in two: use alone puts them together again."""
    target = Induction(seed=3, lean=True)
    network, truth = apd.Network(target, target.weights), target.mechanisms()
    x = induction.OneAtATime(target, 512)(0, torch.Generator().manual_seed(0))
    cut = apd.Components.from_matrices(induction.heads(target), 4)
    assert not apd.metrics.ownership(cut, truth).owned.all()
    merged = pieces.by_use(network, cut, x, 4 / 3)
    assert apd.metrics.ownership(merged, truth).owned.all()
    assert int((merged.norms() > 0).sum()) == 3
    assert int((cut.norms() > 0).sum()) == 4  # what was given is left as it was


def test_targets_are_those_that_are_named() -> None:
    seed = 3
    lean, full = pieces.target_of(("as it is", seed)), pieces.target_of(("full", seed))
    assert (lean.layers[0].q.weight.shape[1], full.layers[0].q.weight.shape[1]) == (13, 15)
    random = pieces.target_of(("random", seed))
    for a, b in zip(random.layers, lean.layers, strict=True):
        assert not torch.allclose(a.q.weight, b.q.weight, atol=0.1)
        torch.testing.assert_close(
            torch.linalg.svdvals(a.q.weight), torch.linalg.svdvals(b.q.weight), atol=1e-4, rtol=0
        )
    named = {change for change, _ in pieces.jobs()}
    assert named == set(pieces.CHANGES) and min(seed for _, seed in pieces.jobs()) == pieces.FIRST
