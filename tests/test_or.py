"""The runs on an OR: everyone is asked by the attributions of their own run, and the truth says what must come out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import apd_minimal as apd
from apd_minimal.selection import FinalSelection, TopK
from experiments import spd


class Same(TopK):
    """Who scores above a threshold is active."""

    def active(self, scores: torch.Tensor, threshold: torch.Tensor | None) -> torch.Tensor:
        return scores > 0.1


def neurons(readers: int) -> apd.Components:
    """One component for each neuron of the OR: the truth."""
    W = spd.Either(readers).read.weight.detach().T
    return apd.Components.from_matrices({"read.weight": W * torch.eye(3)[:, None, :]})


@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize("method", [m for m in spd.EITHER_METHODS if m not in spd.BY_IMPORTANCE])
def test_the_truth_under_each_attribution(monkeypatch: pytest.MonkeyPatch, method: str, readers: int) -> None:
    """Where one reader alone is on, all see it; where both are, only those that look at missing parts see either."""

    class Found:
        components, final_selection, scores = neurons(readers), FinalSelection(Same(1.0)), [0.0]

    attribution = (spd.BY_TOP_K | spd.WITHOUT_K)[method]
    monkeypatch.setattr(spd, "take_either_apart", lambda job: (Found, attribution, 0.0))
    (row,), _ = spd.run_either(("or", readers, method, 0))
    shares = "shapley" in method or method == "integrated gradients"
    for x, gates, errors in zip(row["inputs"], row["gates"], row["errors"], strict=True):
        on = [x[0], x[1], x[2]] if readers == 1 else [x[0], x[0], x[1]]
        doubly = bool(on[0] and on[1])
        if doubly and not shares:
            on[:2] = [0.0, 0.0]
        assert gates == on
        assert errors == [float(doubly and not shares), 0.0]


@pytest.mark.parametrize("method", spd.EITHER_METHODS)
def test_runs_go_by_their_own_attribution(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """What is trained with, what is judged with and what is measured with are one."""
    seen: dict[str, Any] = {}

    class Found:
        best = None

    monkeypatch.setattr(spd, "taken_apart", lambda target, settings: (seen.update(settings), 0.0))
    monkeypatch.setattr(spd, "tune", lambda target, **settings: seen.update(settings) or Found)
    _, attribution, _ = spd.take_either_apart(("or", 2, method, 0))
    assert (seen.get("attribution") or apd.attributions.gradient) is attribution
    assert isinstance(seen.get("selection"), spd.Attacked) == (method == "VPD")
    if method == "VPD":
        assert attribution == seen["selection"].scores, "the attack must see what the gates will run"
    assert ("judge" in seen) == method.startswith("no k")
    if "judge" in seen:
        assert seen["judge"].attribution is attribution
    assert ("top_k" in seen) == (method in spd.BY_TOP_K)
    assert ("shapley" in method) == (attribution is apd.attributions.shapley)
    assert seen["n_components"] == 6
