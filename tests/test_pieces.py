"""The study that finds an induction circuit in pieces: what fades, what is merged, and its controls."""

from __future__ import annotations

import pytest
import torch

import apd_minimal as apd
from apd_minimal.targets import Induction
from experiments import induction, pieces


def test_the_judge_prefers_the_truth_to_a_lump_and_to_a_circuit_in_two() -> None:
    target = Induction(seed=3, lean=True)
    network, truth = apd.Network(target, target.weights), target.mechanisms()
    x = induction.OneAtATime(target, 512)(0, torch.Generator().manual_seed(0))

    def judged(matrices: dict[str, torch.Tensor]) -> float:
        return pieces.judged(network, apd.Components.from_matrices(matrices, 6), x)

    whole = judged(truth)
    lump = judged({path: m.sum(0, keepdim=True) for path, m in truth.items()})
    cut = {path: m.clone() for path, m in truth.items()}
    in_two = {path: torch.cat([m, torch.zeros_like(m[:1])]) for path, m in cut.items()}
    path = "blocks.1.o.weight"  # induction writes nothing: another component does
    in_two[path][3], in_two[path][0] = cut[path][0], 0
    swapped = {path: m.roll(1, 0) if path.endswith("q.weight") else m for path, m in truth.items()}
    assert whole < min(lump, judged(in_two), judged(swapped))
    # With one component on, the cut circuit is silent: its share of the answers is the error.
    bits = pieces.Judge(pieces.EXACT, attribution=induction.scores_of("sequence"))
    priced = judged(in_two) - bits(network, apd.Components.from_matrices(in_two, 6), x)
    assert priced == pytest.approx(100 / 3, rel=0.2)  # an error of everything costs 100 bits


def test_pieces_that_are_on_together_come_together_untrained() -> None:
    """Cut each circuit by heads, and each head's matrices in two: use alone puts them together again."""
    target = Induction(seed=3, lean=True)
    network, truth = apd.Network(target, target.weights), target.mechanisms()
    x = induction.OneAtATime(target, 512)(0, torch.Generator().manual_seed(0))
    draws = torch.Generator().manual_seed(1)  # of a component that is on for no sequence
    noise = {path: 1e-4 * torch.randn(1, *m.shape[1:], generator=draws) for path, m in truth.items()}
    heads = {path: torch.cat([m, noise[path]]) for path, m in induction.heads(target).items()}
    cut = apd.Components.from_matrices(heads, 4)
    assert not apd.metrics.ownership(cut, truth).owned.all()
    merged = pieces.by_use(network, cut, x, 4 / 3)
    assert apd.metrics.ownership(merged, truth).owned.all()
    assert int((merged.norms() > 0).sum()) == 3
    assert int((cut.norms() > 0).sum()) == 5  # what was given is left as it was


def test_targets_are_those_that_are_named() -> None:
    seed = 3
    lean, full = pieces.target_of(("as it is", seed)), pieces.target_of(("full", seed))
    assert (lean.layers[0].q.weight.shape, full.layers[0].q.weight.shape) == ((6, 13), (8, 15))
    named = {change for change, _ in pieces.jobs()}
    assert named == set(pieces.CHANGES) and min(seed for _, seed in pieces.jobs()) == pieces.FIRST
