"""All inputs with all masks: the truth survives, a part in the wrong place does not, and a count of what is run."""

from __future__ import annotations

import pytest
import torch

import apd_minimal as apd
from apd_minimal.targets import ModularArithmetic, ModularTask
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
