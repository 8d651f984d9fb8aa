"""Tests of circuits that were found: scrubbing, where parts are on, and roles that come of pieces of matrices."""

from __future__ import annotations

import math

import pytest
import torch

import apd_minimal as apd
from apd_minimal.study import controls
from apd_minimal.targets import Induction
from experiments import finds, induction


@pytest.fixture(scope="module")
def target() -> Induction:
    return Induction(seed=3, lean=True)


@pytest.fixture(scope="module")
def truth(target: Induction) -> apd.Components:
    return apd.Components.from_matrices(target.mechanisms(), 4)


def swapped(target: Induction, part: str) -> apd.Components:
    """Give the answers of each circuit to the next one: a bug that sums do not show."""
    matrices = {path: m.roll(1, 0) if path.endswith(part) else m for path, m in target.mechanisms().items()}
    return apd.Components.from_matrices(matrices, 4)


def test_true_circuits_are_scrubbed_without_harm_and_swapped_ones_are_not(
    target: Induction, truth: apd.Components
) -> None:
    network = apd.Network(target, target.weights)
    x = induction.OneAtATime(target, 512)(0, torch.Generator().manual_seed(0))
    errors = finds.scrubbed(network, truth, x, 1)
    assert max(errors["active"], errors["scrubbed"]) < 1e-3
    assert errors["anti"] == pytest.approx(1, abs=1e-3)
    bug = finds.scrubbed(network, swapped(target, "o.weight"), x, 1)
    assert min(bug["active"], bug["scrubbed"]) > 0.2


def test_true_circuits_are_on_where_they_are_needed(target: Induction, truth: apd.Components) -> None:
    seen = finds.where(target, truth, [0, 1, 2], 1)
    assert min(seen["on"]) > 0.98
    assert seen["needed"] > 0.99
    assert max(seen["active"], seen["scrubbed"]) < 0.01
    x = induction.OneAtATime(target, 1024)(0, torch.Generator().manual_seed(30_001))
    # One circuit is asked in a sequence, with three, two or one position; a third of all, but for rounding.
    shares = target.uses(x).float().mean((0, 1))
    assert seen["chance"][0] == pytest.approx(float(shares[:3].sum()), abs=0.01)
    assert seen["chance"][5] == pytest.approx(float(shares[5]), abs=0.01)
    wrong = finds.where(target, truth, [1, 2, 0], 1)  # a circuit's needs beside another's component
    assert max(wrong["on"]) < 0.3
    assert wrong["needed"] < 0.1


def test_a_cut_by_matrices_adds_up(target: Induction, truth: apd.Components) -> None:
    cut = finds.by_matrices(truth)
    assert cut.n_components == 8 + 4 + 4  # induction has a part of all matrices, the others of one layer's
    for path in truth.paths:
        assert torch.allclose(cut.sum(path), truth.sum(path), atol=1e-4)
    assert (sum((cut.matrices(path).flatten(1).norm(dim=1) > 0).int() for path in cut.paths) == 1).all()


def test_roles_come_of_circuits_and_of_nothing_else(target: Induction, truth: apd.Components) -> None:
    roles, row = finds.roles_of(target, truth, 1)
    assert all(row["owned"]) and row["in_use"] == 6
    assert max(row["owned_by_k"]) == 6 and min(row["owned_by_k"]) == 0  # the judge has something to choose
    best = min(b for b in row["bits"] if b is not None)
    assert row["owned_by_k"][row["bits"].index(best)] == 6
    moved = induction.moved(target, roles, finds.ON, 1)
    assert max(moved["own"], moved["moves"]) < 0.01 and moved["stays"] > 0.99
    matrices = target.mechanisms()
    lump = apd.Components.from_matrices({path: m.sum(0, keepdim=True) for path, m in matrices.items()})
    mixed = apd.Components.from_matrices({path: (m + m.roll(1, 0)) / 2 for path, m in matrices.items()})
    for components in (controls.dealt(truth, 1), mixed, lump):
        assert sum(finds.roles_of(target, components, 1)[1]["owned"]) < 3
    # Whole matrices in the wrong circuits do no harm: all of them are cut apart, and put together by use.
    assert all(finds.roles_of(target, swapped(target, "q.weight"), 1)[1]["owned"])


def test_what_was_kept_is_what_was_stored() -> None:
    """The runs were made again: the same scores of all starts, and components that own what they owned."""
    table = finds.STUDY.stored()
    for row in table["again"]:
        assert row["scores"] == row["scores_before"]
        assert row["cosine"] == row["cosine_before"]
        kept, _ = finds.of("finds", f"again/{row['seed']}/")
        own = apd.metrics.ownership(kept, Induction(seed=row["seed"], lean=True).mechanisms())
        assert own.owned.tolist() == row["owned"]
        assert own.cosine.tolist() == pytest.approx(row["cosine"], abs=1e-3)


def test_every_sequence_was_run_with_every_mask() -> None:
    table = finds.STUDY.stored()["every"]
    assert [r["seed"] for r in table if r["parts"] == "found"] == finds.SEEDS
    assert {r["parts"] for r in table} == {"found", "truth", "dealt", "heads"}
    for row in table:
        inputs = [places * math.factorial(8) for places in (21, 7, 7, 1)]
        free = [2, 3, 3, 4] if row["parts"] == "heads" else [2, 2, 2, 3]  # parts that no answer needs
        assert row["inputs"] == inputs
        assert row["runs"] == [n * 2**f for n, f in zip(inputs, free, strict=True)]
        for alone, mean, worst, most in zip(
            *(row[n] for n in ("alone", "scrubbed", "worst", "worst_input")), strict=True
        ):
            assert max(alone, mean) <= worst * (1 + 1e-6) and worst <= most * (1 + 1e-6)
        assert row["between"]["worst"] >= row["between"]["corner"]
