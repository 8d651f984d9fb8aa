"""The recipe of a TMS: for which sizes it is doubted, and which features lie on one line."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest
import torch

import apd_minimal as apd
from apd_minimal.book import artefacts
from apd_minimal.config import at_progress
from apd_minimal.targets.tms import LEFT_OUT, SHOWN


@pytest.mark.parametrize("size", SHOWN)
def test_no_doubt_at_the_sizes_that_were_shown(size: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings = apd.targets.TMS(*size).recipe
    k, n = settings["top_k"][0][1], size[0]
    assert 0 < k <= 0.25 * n and settings["n_components"] >= 1.5 * n


def test_the_recipe_is_the_one_that_was_tried() -> None:
    """Stored runs of the recipe, at every size on whose results its doubts rest."""
    rows = json.loads(artefacts.path("sizes.json").read_text())["runs"]
    tried = [row for row in rows if row["settings"] == "recipe" and "config" in row]
    assert {row["size"] for row in tried} >= {"3-2", "5-2", "7-3", "10-4"}
    for row in tried:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            recipe = apd.targets.TMS(*map(int, row["size"].split("-"))).recipe
        assert recipe.pop("batches").batch_size == row["batch"]
        assert recipe.pop("weights") == ["encode.weight"]
        now, then = (dataclasses.asdict(apd.Config.from_dict(settings)) for settings in (recipe, row["config"]))
        for name in now:
            if isinstance(now[name], (int, float, tuple)) and not isinstance(now[name], bool):
                numbers = (torch.tensor(settings[name], dtype=torch.float64) for settings in (now, then))
                torch.testing.assert_close(*numbers, rtol=1e-9, atol=0, msg=f"{name} of {row['size']}")
            else:
                assert now[name] == then[name], f"{name} of {row['size']}"


@pytest.mark.parametrize("size", [(3, 2), (7, 3), (20, 6), (60, 15)])
@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.filterwarnings("ignore:TMS")
def test_recipes_are_settings(size: tuple[int, int], identity: bool) -> None:
    recipe = apd.targets.TMS(*size, identity=identity).recipe
    del recipe["batches"], recipe["weights"]
    apd.Config(**recipe)


@pytest.mark.filterwarnings("ignore:TMS")
@pytest.mark.parametrize("size", [(5, 2), (20, 5), (40, 10), (60, 15)])
def test_an_identity_layer_needs_one_component_more_that_is_always_active(size: tuple[int, int]) -> None:
    plain, deep = (apd.targets.TMS(*size, identity=identity).recipe for identity in (False, True))
    assert deep["n_components"] == plain["n_components"] + 1
    ends = (0.0, 0.5, 1.0) if size[0] > 5 else (0.0, 0.5)  # 5-2 keeps its k, so that the identity is not left out
    for t in ends:
        assert at_progress(deep["top_k"], t) == pytest.approx(at_progress(plain["top_k"], t) + 1)


@pytest.mark.parametrize("n_lines", [5, 6])
def test_a_doubt_names_at_most_five_pairs(n_lines: int) -> None:
    target = apd.targets.TMS(2 * n_lines, 2)
    angles = torch.arange(n_lines) / n_lines * torch.pi
    W = torch.stack([angles.cos(), angles.sin()], dim=1)
    with torch.no_grad():
        target.encode.weight.copy_(torch.cat([W, -W]).T)
    named = ", ".join(f"{i} and {i + n_lines}" for i in range(5))
    with pytest.warns(UserWarning, match=rf"features on one line \({named}(, \.\.\.)?\) are the first") as caught:
        _ = target.recipe
    assert ("..." in str(caught[0].message)) == (n_lines > 5)
    assert caught[0].filename == __file__, "it points to the line that asked"


@pytest.mark.parametrize(("size", "identity", "why"), [
    ((60, 15), False, "above 40 features"), ((41, 11), False, "above 40 features"),
    ((2, 1), False, "from 3-2 to 40-10"), ((20, 2), False, "for each hidden"),
    ((7, 3), True, "identity layer"),
    ((6, 3), False, "2 and 4 of 6 features on two targets"),
    ((7, 3), False, "4 of 7 features on one of 27 targets"),
    ((30, 8), False, "24 of 30 features on one of five targets"),
    ((10, 5), False, "left features out on some of three targets: the least was 6 of 10"),
    ((25, 8), False, "25-8: this size was not tried; the recipe is shown at 3-2, 4-2, .*, 40-10, and leaves"),
])  # fmt: skip
def test_other_sizes_are_doubted_in_words(size: tuple[int, int], identity: bool, why: str) -> None:
    with pytest.warns(UserWarning, match=why):
        _ = apd.targets.TMS(*size, identity=identity).recipe


@pytest.mark.filterwarnings("ignore:TMS")
def test_as_many_features_as_were_tried_are_not_above_them() -> None:
    assert "above 40 features" not in apd.targets.TMS(40, 20)._doubt(False)
    assert [apd.targets.TMS(n, 20).recipe["steps"] for n in (40, 41)] == [1500, 3000]


@pytest.mark.parametrize("rotated", [False, True])
def test_features_on_one_line(rotated: bool) -> None:
    target = apd.targets.TMS(5, 2)
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-2.0, 0.0], [0.0, 0.001], [0.7, 0.7]])
    target.encode.weight.data = rows.T.clone()  # 0 and 2 are opposite; 3 is too short to lie anywhere
    if rotated:
        target.rotate(1)
    assert target.same_line == [(0, 2)]


def test_neighbours_on_one_line() -> None:
    target = apd.targets.TMS(5, 2)
    target.encode.weight.data = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, -1.0]]).T.clone()
    assert target.same_line == [(0, 1), (3, 4)]


@pytest.mark.parametrize("size", [(6, 4), (9, 6), (8, 2), (12, 3)])
def test_sizes_at_either_end_of_what_was_tried_are_not_doubted_for_that(size: tuple[int, int]) -> None:
    for n, d, doubted in ((*size, False), (size[0] + (1 if size[0] == 4 * size[1] else -1), size[1], True)):
        assert ("1.5 to 4 features for each" in apd.targets.TMS(n, d)._doubt(False)) is doubted


@pytest.mark.parametrize(("probability", "doubted"), [(0.02, True), (0.05, False), (0.1, False), (0.2, True)])
def test_a_recipe_is_for_features_that_are_on_about_as_often(probability: float, doubted: bool) -> None:
    for size in ((5, 2), (10, 4)):
        target = apd.targets.TMS(*size, probability=probability)
        assert (f"this is {probability:g}" in target._doubt(size == (5, 2))) is doubted
    assert apd.targets.TMS(7, 3)._doubt(False).startswith("at 7-3")


def test_where_the_recipe_is_shown_and_where_it_left_features_out_is_what_the_stored_runs_say() -> None:
    rows = [r for r in json.loads(artefacts.path("sizes.json").read_text())["runs"] if r["settings"] == "recipe"]
    rows += json.loads(artefacts.path("fresh.json").read_text())["runs"]
    owned: dict[tuple[int, ...], list[int]] = {}
    for row in rows:
        if "rotated" not in row["size"]:
            owned.setdefault(tuple(map(int, row["size"].split("-"))), []).append(row["owned"])
    for size in {*SHOWN} - {(5, 2), (40, 10)}:  # these two have targets on which features lie on a line
        assert set(owned[size]) == {size[0]} and len(owned[size]) >= 3, size
    assert {size: min(owned[size]) for size in LEFT_OUT} == LEFT_OUT
    assert all(len(owned[size]) == 3 for size in LEFT_OUT)
    told = {(6, 4), (7, 3), (30, 8), (60, 15)}  # in sentences of their own
    assert set(owned) == {*SHOWN, *LEFT_OUT, *told}


def test_doubts_count_the_stored_runs() -> None:
    """All runs with the settings of today: those of the recipe, the tries it was taken from, and fresh targets."""
    tries = json.loads(artefacts.path("sizes.json").read_text())["runs"]
    fresh = json.loads(artefacts.path("fresh.json").read_text())["runs"]
    same = [r for r in tries if r["settings"] in ("recipe", "in proportion to 5-2, k 0.65 of the mean")]
    owned = {size: sorted(row["owned"] for row in same + fresh if row["size"] == size) for size in ("6-3", "7-3")}
    less, *rest = owned["7-3"]
    assert set(rest) == {7}
    assert f"owned {less} of 7 features on one of {len(rest) + 1} targets" in apd.targets.TMS(7, 3)._doubt(False)
    least, most = owned["6-3"]
    assert f"owned {least} and {most} of 6 features on two targets" in apd.targets.TMS(6, 3)._doubt(False)
