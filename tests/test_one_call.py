"""The study with one call for three kinds of circuits: its targets, its one recipe, and what its judge prefers."""

from __future__ import annotations

import json

import pytest
import torch

import apd_minimal as apd
from apd_minimal.study import controls
from apd_minimal.targets.induction import Induction
from experiments import one_call, pieces

CIRCUITS = {"shared": 3, "apart": 3, "induction": 3, "shared, two": 2, "shared, four": 4, "induction, two": 2}


@pytest.mark.parametrize("kind", CIRCUITS)
def test_the_judge_prefers_the_truth_to_a_lump_to_fewer_and_to_dealt_parts(kind: str) -> None:
    target = one_call.target_of(kind, 3)
    network, truth = apd.Network(target, target.weights), one_call.mechanisms(target)
    assert {len(m) for m in truth.values()} == {CIRCUITS[kind]}  # circuits, or groups (not their irreps)
    assert all(sum(float(m[c].norm()) for m in truth.values()) > 1 for c in range(CIRCUITS[kind]))
    x = one_call.source(target)(0, torch.Generator().manual_seed(0))

    def judged(components: apd.Components) -> float:
        return pieces.judged(network, components, x)

    exact = apd.Components.from_matrices(truth)
    lump = apd.Components.from_matrices({path: m.sum(0, keepdim=True) for path, m in truth.items()})
    fewer = {path: torch.cat([m[:-2], m[-2:].sum(0, keepdim=True)]) for path, m in truth.items()}
    others = [judged(apd.Components.from_matrices(fewer)), judged(lump), judged(controls.dealt(exact, 0))]
    assert 0 < judged(exact) < min(others)


def test_the_recipe_is_one() -> None:
    """Only the seed, the number of components and of starts, and the rank differ between jobs."""
    free = ("seed", "n_components", "restarts", "rank")
    of = [one_call.settings_of(job) for job in one_call.jobs()]
    assert all(
        {k: v for k, v in s.items() if k not in free} == {k: v for k, v in of[0].items() if k not in free} for s in of
    )
    assert {(s["n_components"], s["restarts"]) for s in of} == set(one_call.STARTS.items())
    for kind in one_call.KINDS:
        assert {n for k, n, _ in one_call.jobs() if k == kind} == set(one_call.STARTS)


def test_no_target_is_one_that_settings_were_made_on() -> None:
    seeds = {seed for _, _, seed in one_call.jobs()}
    assert not seeds & {90, 91, 92, 8640}
    assert {seed for kind, _, seed in one_call.jobs() if kind == "induction"} == {
        seed for change, seed in pieces.jobs() if change == "as it is"
    }


def test_what_is_taken_from_the_other_study_is_the_same_run() -> None:
    """The settings of a row that is copied are those that it would be made with, and it has what others have."""
    stored = {(r["change"], r["seed"]): r for r in pieces.STUDY.stored()["runs"]}
    for job in one_call.jobs():
        if job[:2] == ("induction", 8):
            row = stored["as it is", job[2]]
            assert row["settings"] == json.loads(json.dumps(one_call.RUNS.settings(job)))  # type: ignore[misc]
            assert one_call.as_in_pieces(job[2])["scores"] == row["scores"]
            assert len(row["scores"]) == one_call.STARTS[8]


def test_inputs_of_induction_ask_one_circuit_each() -> None:
    target = one_call.target_of("induction", 3)
    assert isinstance(target, Induction)
    x = one_call.source(target)(0, torch.Generator().manual_seed(0))
    assert len(x) == one_call.BATCH
    assert (target.says(x) != 0).any(-1).any(1).sum(1).eq(1).all()
