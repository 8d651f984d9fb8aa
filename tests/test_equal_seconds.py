"""Dictionaries with as many seconds as APD took: what the budget is, and what is done with it."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apd_minimal import Network
from apd_minimal.study import baselines as studied
from apd_minimal.study import controls
from apd_minimal.study.dictionaries import Dictionary, activations
from apd_minimal.targets import TMS, ResidualMLP
from experiments import baselines


@pytest.mark.parametrize(
    ("name", "study", "more"),
    [
        ("tms-40-10", "tms", {"identity": False}),
        ("tms-5-2-identity", "tms", {"identity": True}),
        ("50", "residual", {}),
    ],
)
def test_the_budget_is_what_apd_took_on_this_target(name: str, study: str, more: dict[str, Any]) -> None:
    """One row of the study of the target fits, of the book's own recipe."""
    seed = baselines.SEEDS[name][0]
    rows = json.loads((baselines.DATA / f"{study}.json").read_text())["runs"]
    wanted = more | {"target": name.removesuffix("-identity"), "seed": seed}
    fits = [
        r for r in rows if wanted.items() <= r.items() and r.get("recipe", "ours") == "ours" and not r.get("rotated")
    ]
    assert [r["seconds"] for r in fits] == [baselines.apd_seconds(name, seed)]


@pytest.mark.parametrize(("budget", "steps"), [(2.0, 1000), (4.0, 1000), (10.0, 2500), (4.001, 1001)])
def test_steps_grow_with_the_budget_and_never_shrink(
    budget: float, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, 1,000 steps for each sparsity took 4 seconds in all."""
    asked: list[dict[str, Any]] = []
    methods = {"SAE, TopK": {"seconds": 4.0}}
    monkeypatch.setattr(
        type(baselines.STUDY), "stored", lambda self: {"runs": [{"target": "tms-5-2", "seed": 10, "methods": methods}]}
    )
    monkeypatch.setattr(baselines, "apd_seconds", lambda name, seed: budget)
    monkeypatch.setattr(baselines, "by_truth", lambda *args: {})
    monkeypatch.setattr(baselines, "loaded", lambda name, seed: (TMS(5, 2), None))

    def chosen(*args: Any, **settings: Any) -> Any:
        asked.append(settings)
        return {"seconds": 1.0}, SimpleNamespace(best=None)

    monkeypatch.setattr(baselines, "chosen", chosen)
    ((row,), _) = baselines.equal_run(("tms-5-2", 10, "SAE, TopK"))
    assert asked == [{"steps": steps}] and row["steps"] == steps and row["apd_seconds"] == budget
    assert steps == math.ceil(1000 * max(1, budget / 4))


def test_more_steps_are_more_steps_of_every_sparsity(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same grid and the same rate as before; only the steps change."""
    asked: dict[str, Any] = {}

    def choose(*args: Any, **settings: Any) -> Any:
        asked.update(settings)
        return SimpleNamespace(best=None, sparsity=1, seconds=1.0)

    monkeypatch.setattr(baselines.baselines, "choose", choose)
    monkeypatch.setattr(baselines.baselines, "costs", lambda *args: [])
    baselines.chosen(TMS(5, 2), 0, torch.zeros(1, 5), "SAE, TopK", 5, steps=77)
    assert (asked["steps"], asked["grid"], asked["lr"]) == (77, baselines.GRID["topk"], baselines.FIT["lr"])


def test_every_dictionary_of_the_table_is_among_them() -> None:
    """But for that of an untrained network, which is a control, and that of the second layer, which is as the first."""
    assert set(baselines.EQUAL_SECONDS) == set(baselines.SEEDS)
    for name, (seeds, methods) in baselines.EQUAL_SECONDS.items():
        target = baselines.loaded(name, baselines.SEEDS[name][0])[0]
        assert seeds == baselines.SEEDS[name]
        assert set(methods) == {m for m in baselines.in_table(target) if "untrained" not in m and "layer 1" not in m}


@pytest.mark.parametrize(("name", "kind"), [("L1", "relu"), ("TopK", "topk"), ("BatchTopK", "batch_topk")])
@pytest.mark.parametrize("layer", [0, 1])
def test_an_autoencoder_of_one_layer_is_of_its_kind_reads_that_layer_and_is_judged_by_it(
    name: str, kind: str, layer: int
) -> None:
    target, method = ResidualMLP(6, 30, (12, 12), seed=1), f"SAE, {name}, layer {layer}"
    places = ["output of neurons.0", "output of neurons.1"]
    assert baselines.dictionaries(target)[method] == {"kind": kind, "reads": places[layer]}
    found = []
    for rows in activations(target, torch.eye(6), places):
        own = Dictionary([12], [12], 6)
        own.decoder.data = rows
        found.append(baselines.by_truth(target, method, own)["recovered_0.99"])
    assert found[layer] == 6 and found[1 - layer] < 3


def test_a_wider_grid_is_one_training_for_each_sparsity_with_the_steps_of_its_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[dict[str, Any]] = []

    def fit(*args: Any, **settings: Any) -> Any:
        asked.append(settings)
        return SimpleNamespace(best=None, sparsity=0.0, seconds=0.0, tried=[{"bits": [1.0]}])

    monkeypatch.setattr(baselines.baselines, "choose", fit)
    monkeypatch.setattr(baselines.baselines, "costs", lambda *args: [])
    monkeypatch.setattr(baselines, "by_truth", lambda *args: {})
    for job, steps in ((("50", 0, "SAE, L1, layer 0", 0.3), 400), (("tms-5-2", 10, "SAE, L1", 0.3), 1000)):
        ((row,), _) = baselines.wider_run(job)
        assert asked[-1]["grid"] == (0.3,) and asked[-1]["kind"] == "relu" and asked[-1]["steps"] == steps
        assert row["bits_to_choose"] == [1.0]
        assert baselines.WIDE.settings is not None and baselines.WIDE.settings(job)["steps"] == steps


@pytest.mark.parametrize("name", ["50", "25-25"])
def test_the_wider_grid_holds_the_grid_of_the_table_and_goes_on_at_both_ends(name: str) -> None:
    target = ResidualMLP(neurons=tuple(map(int, name.split("-"))))
    of_table = {m for m in baselines.in_table(target) if not m.startswith("transcoder")}
    assert of_table < set(baselines.WIDER[name])
    for method in of_table:
        grid, usual = baselines.WIDER[name][method], baselines.LARGE_GRID
        assert set(usual) < set(grid) and min(grid) < min(usual) and max(grid) > max(usual)
    if name == "25-25":  # none but what was asked for is left out
        assert set(baselines.WIDER[name]) == set(baselines.dictionaries(target))


def test_halves_of_the_features_are_two_components_for_each_and_own_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole columns own all; one component of zeros is not in use."""
    target, x = TMS(5, 2), torch.rand(64, 5)
    columns, asked = controls.input_columns(Network(target, target.weights).weights), list[dict[str, Any]]()
    halves = columns.map(lambda t: t / 2**0.5)
    for parts, owners, owned in ((columns, 1, 5), (studied.beside([halves, halves]), 2, 0)):
        spare = studied.beside([parts, parts.map(torch.zeros_like)])

        def taken(own: Any, recipe: dict[str, Any], seed: int, found: Any = spare) -> Any:
            asked.append(recipe | {"seed": seed})
            return SimpleNamespace(components=found), 1.0

        monkeypatch.setattr(baselines, "taken_apart", taken)
        row = baselines.split_components(target, 3, x, {"n_components": 40})
        assert (row["owners"], row["owned"], row["in_use"]) == ([owners] * 5, owned, 5 * owners)
        assert asked[-1] == target.recipe | {"n_components": 40, "seed": 3} and len(row["bits"]) == 3
