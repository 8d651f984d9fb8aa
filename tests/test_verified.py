"""All inputs with all masks: the truth survives, a part in the wrong place does not, and a count of what is run."""

from __future__ import annotations

import pytest
import torch

import apd_minimal as apd
from apd_minimal.study import controls
from apd_minimal.targets import GroupOperations, ModularArithmetic, ModularTask
from experiments import verified


def targets() -> list[tuple[str, ModularArithmetic]]:
    """Small ones of both kinds."""
    tasks = [ModularTask(5), ModularTask(3, -1)]
    one = ModularTask(5)
    return [
        ("task", ModularArithmetic(tasks, switches="task", embedding=True)),
        ("frequency", ModularArithmetic([one], switches="frequency", embedding=True)),
    ]


@pytest.mark.parametrize(("by", "target"), targets())
def test_the_truth_survives_every_mask(by: str, target: ModularArithmetic) -> None:
    truth = target.mechanisms(by)
    row = verified.verified(target, apd.Components.from_matrices(truth, 8), truth)
    # Tasks: one of two is needed, the other is free. Frequencies: each of two is closed and free, or open and needed.
    assert (row["inputs"], row["masks"]) == {"task": (34, 68), "frequency": (100, 225)}[by]
    assert max(row[name] for name in ("alone", "scrubbed", "worst", "worst_input")) < 1e-9


@pytest.mark.parametrize(("by", "target"), targets())
def test_a_piece_in_the_wrong_part_is_seen_by_the_worst_mask_and_by_others_less(
    by: str, target: ModularArithmetic
) -> None:
    truth = target.mechanisms(by)
    moved = {path: parts.clone() for path, parts in truth.items()}
    for path in moved:
        moved[path][0] += 0.1 * truth[path][1]
        moved[path][1] -= 0.1 * truth[path][1]
    row = verified.verified(target, apd.Components.from_matrices(moved, 8), truth)
    assert 1e-4 < row["alone"] and 1e-4 < row["scrubbed"] < row["worst"] < row["worst_input"]


def test_components_in_another_order_are_the_same() -> None:
    _, target = targets()[1]
    truth = target.mechanisms()
    turned = apd.Components.from_matrices({path: parts.flip(0) for path, parts in truth.items()}, 4)
    assert verified.verified(target, turned, truth)["worst_input"] < 1e-9
    assert torch.equal(apd.metrics.ownership(turned, truth).owner, torch.tensor([1, 0]))


@pytest.mark.parametrize("switches", [None, "group"])
def test_groups_are_at_work_on_their_own_pairs(switches: str | None) -> None:
    target = GroupOperations(["Z6", "S3"], switches=switches)
    x, truth = verified.everything(target), target.mechanisms()
    at_work = verified.at_work(target, x)
    assert at_work.tolist() == [[True, False]] * 36 + [[False, True]] * 36
    row = verified.verified(target, apd.Components.from_matrices(truth, 12), truth)
    assert (row["inputs"], row["masks"]) == (72, 144)
    assert max(row[name] for name in ("alone", "worst_input", "attack", "bound_input", "own_worst")) < 1e-9
    assert row["own_same"] == 1


def test_an_attack_meets_no_more_than_the_worst_mask_and_more_than_none() -> None:
    _, target = targets()[1]
    parts = controls.dealt(apd.Components.from_matrices(target.mechanisms(), 8), 0)
    row = verified.verified(target, parts, target.mechanisms())
    assert 0.9 * row["worst"] < row["attack"] <= row["worst"] * (1 + 1e-5)
    assert row["worst"] <= row["seen"] * (1 + 1e-5) <= row["bound"] * (1 + 2e-5) <= row["interval"] * (1 + 3e-5)
    assert row["bound"] <= 1.05 * row["seen"] + 1e-9 and row["bound"] <= row["bound_input"]
    assert row["corners"] > 0.5


def test_a_worst_mask_between_zero_and_one_is_seen_by_the_bound_alone() -> None:
    """A third part takes away twice what every part reads: at half its gate nothing is left, at 1 all is there."""
    _, target = targets()[0]
    truth = target.mechanisms("task")
    parts = {path: torch.cat([t, 0 * t[:1]]) for path, t in truth.items()}
    parts["hidden.weight"][2] = -2 * truth["hidden.weight"].sum(0)
    row = verified.verified(target, apd.Components.from_matrices(parts, 12), truth)
    assert max(row["worst_input"], row["attack"]) < 1e-9
    assert row["corners"] == 0 and row["bound"] > 0.9


def test_a_neuron_that_is_read_with_the_wrong_sign_passes_at_corners_and_not_between() -> None:
    _, target = targets()[0]
    truth = target.mechanisms("task")
    parts = {path: t.clone() for path, t in truth.items()}
    i = int(truth["hidden.weight"][0].norm(dim=0).argmax())
    parts["hidden.weight"][0, :, i] *= -1
    parts["hidden.weight"][1, :, i] += 2 * truth["hidden.weight"][0, :, i]
    row = verified.verified(target, apd.Components.from_matrices(parts, 12), truth)
    assert row["turned"] == 1 and row["faithfulness"] < 1e-9
    assert max(row["alone"], row["worst_input"], row["attack"]) < 1e-9
    assert row["bound_input"] > 0.02 and row["bound"] < 1.05 * row["seen"]
    whole = verified.verified(target, apd.Components.from_matrices(truth, 12), truth)
    assert whole["turned"] == 0


def test_what_attributions_choose_is_not_told_what_is_needed() -> None:
    _, target = targets()[0]
    truth = target.mechanisms("task")
    exact = apd.Components.from_matrices(truth, 8)
    right, few = (verified.verified(target, exact, truth, k) for k in (1.0, 0.5))
    assert right["own_same"] == 1 and right["own_alone"] < 1e-9
    assert few["own_same"] < 0.8  # half of the inputs get nobody
    assert few["own_alone"] > 0.1 and few["own_worst"] > 0.1
    assert few["alone"] < 1e-9 and few["worst"] < 1e-9
