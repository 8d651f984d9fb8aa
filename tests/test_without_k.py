"""Studies without a k run what their rows say: a selection in a recipe, no noise, other settings begun wrong."""

from __future__ import annotations

from typing import Any

import pytest

import apd_minimal as apd
from apd_minimal.config import at_progress
from experiments import bottleneck, judged, leaks, residual, tuned


class Stopped(Exception):
    """What a call was given; nothing runs."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given


def stop(*args: Any, **given: Any) -> None:
    """Stand in for a run."""
    raise Stopped({str(i): arg for i, arg in enumerate(args)} | given)


def test_without_noise_nothing_else_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bottleneck, "measured", stop)
    job, given = ("5-2", 0.05, 90), []
    for run in (bottleneck.run, bottleneck.run_quiet):
        with pytest.raises(Stopped) as caught:
            run(job)
        given.append(caught.value.given["3"])
    usual, quiet = ({n: v for n, v in own.items() if n != "selection"} for own in given)
    assert apd.Config(1, 1).scrub == 0.5 and "scrub" not in usual
    assert quiet == usual | {"scrub": 0.0} and bottleneck.settings_quiet(job)["scrub"] == 0


@pytest.mark.parametrize("allowed", [0.05, 0.1])
def test_an_allowed_error_takes_the_place_of_k_alone(allowed: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apd, "decompose", stop)
    monkeypatch.setattr(apd.targets.ResidualMLP, "fit", lambda self, seed: self)
    with pytest.raises(Stopped) as caught:
        bottleneck.run_in_recipe((6, 3, allowed))
    given = caught.value.given
    recipe = apd.targets.ResidualMLP(6, 60, (3,), seed=3).recipe
    changed = {"top_k", "selection", "restarts", "seed", "judge", "progress", "0"}
    same = set(recipe) - changed - {"attribution"}
    assert set(given) - changed == set(recipe) - {"top_k"} and "top_k" not in given
    assert all(given[name] == recipe[name] for name in same)
    selection = given["selection"]
    assert [at_progress(selection.allowed, t) for t in (0.0, 0.3, 0.6, 1.0)] == [0.3, 0.3, allowed, allowed]
    assert len(selection.gain) == given["restarts"] and given["seed"] == 1003


@pytest.mark.parametrize(
    ("setting", "begins", "others"),
    [("n_components", 5, [10, 15, 30]), ("p", 2.0, [0.5, 0.9, 1.0]), ("minimality", 0.5, [2.0, 10.0, 50.0])],
)
def test_a_search_begins_with_one_setting_wrong(
    setting: str, begins: float, others: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned.tune, "tune", stop)
    with pytest.raises(Stopped) as caught:
        tuned.other(("5-2", 90, setting))
    given = caught.value.given
    assert given[setting] == begins and given["tries"] == {setting: others}
    usual = tuned.settings_of(("5-2", 90))
    assert all(given[name] == usual[name] for name in usual if name != setting)


def test_what_is_stored_is_judged_and_the_rest_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    known = residual.stored_target("50", 0)
    monkeypatch.setattr(residual, "made", lambda name, seed: (*known, {"seconds": 1.0}))
    monkeypatch.setattr(residual, "SEEDS", {"50": [0]})
    old, new = (judged.judged(("residual-50", seed)) for seed in (0, 1))
    assert old.facts == {} and new.facts == {"seconds": 1.0, "owned": 100}
    for path, A in new.sets["found"].A.items():
        assert A.equal(old.sets["found"].A[path]), "rounding to half precision what is stored so changes nothing"
    assert leaks.residual_mlp("50", 0).sets["found"].A.keys() == new.sets["found"].A.keys()
