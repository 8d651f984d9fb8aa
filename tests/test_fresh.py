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


def test_every_new_start_is_scored_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two starts, of which the first lacks two features and the second one; the second has the larger error."""
    asked: list[Any] = []
    target = apd.targets.TMS(6, 2)
    target.encode.weight.data = torch.tensor([[1.0, 0, 1, 1, 2, 3], [0, 1.0, 1, 2, 1, 1]])
    parts = target.mechanisms()["encode.weight"].repeat(2, 1, 1, 1)  # [starts, C, d_in, d_out]
    parts[0, MISSING] = 0
    parts[1, 5] = 0
    starts = [apd.Components.from_matrices({"encode.weight": P}, 1) for P in parts]

    def taken_apart(_: Any, recipe: dict[str, Any], seed: int) -> tuple[Any, float]:
        asked.append((seed, recipe["restarts"]))
        return SimpleNamespace(restarts=SimpleNamespace(restart=starts.__getitem__), scores=[0.1, 0.2]), 7.0

    monkeypatch.setattr(fresh, "target_of", lambda size: target)
    monkeypatch.setattr(apd.targets.TMS, "fit", lambda target, seed: target)
    monkeypatch.setattr(fresh, "taken_apart", taken_apart)
    monkeypatch.setattr(fresh, "Judge", lambda: lambda network, parts, x: int((parts.norms() > 0).sum()))
    (row,), tensors = fresh.start_again({"6-2": 2}, 2000, ("6-2", 8007))
    assert not tensors and asked == [(10007, 2)]
    assert row == {"missing_by_start": [MISSING, [5]], "scores": [0.1, 0.2], "bits": [4, 5], "seconds": 7.0}


def test_new_starts_are_stored_for_targets_that_failed() -> None:
    """Of the stored table: as many as were fixed, with the settings of the run that failed otherwise."""
    table = json.loads((DATA / "fresh.json").read_text())
    first = {(row["size"], row["seed"]): row for row in table["runs"]}
    for name, starts, changed in (
        ("more_starts", fresh.MORE_STARTS, {"restarts", "seed"}),
        ("same_batches", fresh.SAME_BATCHES, {"restarts"}),
    ):
        assert {row["size"] for row in table[name]} == set(starts)
        for row in table[name]:
            job = row["size"], row["seed"]
            assert job in fresh.FAILED
            assert {len(row[key]) for key in ("missing_by_start", "scores", "bits")} == {starts[job[0]]}
            new, old = row["settings"], first[job]["settings"]
            assert {key for key in new if new[key] != old[key]} == changed


def test_the_runs_looked_at_are_those_that_failed() -> None:
    """Of the stored table: not all features are owned, though no two lie on one line."""
    rows = json.loads((DATA / "fresh.json").read_text())["runs"]
    sizes = [(row, int(row["size"].split("-")[0])) for row in rows if not row["same_line"]]
    assert fresh.FAILED == [(row["size"], row["seed"]) for row, n in sizes if row["owned"] < n]
