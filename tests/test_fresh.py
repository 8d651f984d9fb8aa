"""The study of fresh targets: what it lists of a run that failed, on features laid out by hand."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import apd_minimal as apd
from experiments import fresh
from experiments.experiment import DATA

# Features in the plane. On the same line up to sign are those 180 degrees apart, so that the nearest are
# 0 and 20 (20 degrees), 100 and 283 (3, and opposite), 150 to 0 (30, and opposite), 230 to 20 (30, and opposite).
DEGREES = (0, 20, 100, 283, 150, 230)
MISSING = [0, 4]


def cosine(i: int, j: int) -> float:
    return math.cos(math.radians(DEGREES[i] - DEGREES[j]))


def test_what_is_listed_of_a_run_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fit(target: apd.targets.TMS, seed: int) -> apd.targets.TMS:
        angles = torch.tensor(DEGREES).deg2rad()
        lengths = torch.linspace(0.5, 1.5, len(angles))  # they do not count
        target.encode.weight.data = lengths * torch.stack([angles.cos(), angles.sin()])
        asked.append(seed)
        return target

    def taken_apart(target: apd.targets.TMS, recipe: dict[str, Any], seed: int) -> tuple[Any, float]:
        parts = target.mechanisms()["encode.weight"].clone()
        parts[MISSING] = 0
        asked.append(seed)
        return SimpleNamespace(components=apd.Components.from_matrices({"encode.weight": parts}, 1)), 0.0

    class Judge:
        """In place of bits, the number of components that are there."""

        def __call__(self, network: apd.Network, components: apd.Components, x: Tensor) -> int:
            assert x.shape == (8192, len(DEGREES)) and x.any(1).all()
            asked.append(x)
            return int((components.norms() > 0).sum())

    monkeypatch.setattr(apd.targets.TMS, "fit", fit)
    monkeypatch.setattr(fresh, "taken_apart", taken_apart)
    monkeypatch.setattr(fresh, "Judge", Judge)
    (row,), tensors = fresh.look(("6-2", 8007))
    assert not tensors and row["missing"] == MISSING
    assert row["nearest"] == [(1, round(cosine(0, 1), 3)), (0, round(cosine(4, 0), 3))]
    assert row["nearest"][1][1] < 0, "the sign stays"
    # As near as feature 0 to 1 are, of those that are owned, 1 itself and the opposite pair, and not the last.
    assert row["owned_as_near"] == 3
    assert (row["bits"], row["bits_of_the_truth"]) == (4, 6)
    assert asked[:2] == [8007, 9007] and torch.equal(asked[2], asked[3]), "both are judged on the same samples"


def test_the_runs_looked_at_are_those_that_failed() -> None:
    """Of the stored table: not all features are owned, though no two lie on one line."""
    rows = json.loads((DATA / "fresh.json").read_text())["runs"]
    sizes = [(row, int(row["size"].split("-")[0])) for row in rows if not row["same_line"]]
    assert fresh.FAILED == [(row["size"], row["seed"]) for row, n in sizes if row["owned"] < n]
