"""k from the judge: each restart's own selection, the rounds of `tune`, and what it refuses."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apd_minimal as apd
from apd_minimal.selection import TopK
from apd_minimal.study import tune as tuning
from apd_minimal.study.rate import Judge
from apd_minimal.study.tune import KS, Each, tune


def target() -> nn.Linear:
    net = nn.Linear(4, 4, bias=False)
    nn.init.eye_(net.weight)
    return net


def batches(step: int, generator: torch.Generator) -> Tensor:
    """One feature of four is on."""
    on = torch.randint(0, 4, (32,), generator=generator)
    return nn.functional.one_hot(on, 4) * torch.rand(32, 1, generator=generator)


QUICK: dict[str, Any] = {"steps": 4, "tidy_every": 0.0, "progress": False}


def test_each_restart_has_its_own_k() -> None:
    scores = torch.rand(3, 10, 6, generator=torch.Generator().manual_seed(0))
    ks = [0.5, 1.0, 2.0]
    each = Each([TopK(k) for k in ks])
    gates, threshold = each.choose(scores, 0.5), each.threshold(scores)
    assert threshold is not None
    for i, k in enumerate(ks):
        assert torch.equal(gates[i], TopK(k).choose(scores[i : i + 1], 0.5)[0])
        assert threshold[i] == TopK(k).threshold(scores[i : i + 1])
    assert gates.sum((1, 2)).tolist() == [5, 10, 20]
    assert torch.equal(each.active(scores, threshold), gates)
    assert Each([TopK(1.0), TopK(1, per_sample=True)]).threshold(scores[:2]) is None


def test_the_best_is_what_the_judge_prefers() -> None:
    found = tune(target(), batches, ["weight"], 8, **QUICK)
    assert [row["run"] for row in found.tried] == [0] * KS + [1] * KS
    assert [row["k"] for row in found.tried[:KS]] == pytest.approx([8 / 256 * 64 ** (i / 11) for i in range(12)])
    least = min(row["bits"] for row in found.tried)
    row = next(row for row in found.tried if row["bits"] == least)
    assert found.k == row["k"]
    x = torch.cat([batches(0, torch.Generator().manual_seed(i)) for i in range(9)])
    again = Judge()(apd.Network(target(), ["weight"]), found.best.components, x)
    other = [
        Judge()(apd.Network(target(), ["weight"]), found.best.restarts.restart(i), x)  # type: ignore[union-attr]
        for i in range(KS)
    ]
    assert again == min(other)
    # And its selection can be asked, restart and threshold its own.
    active = found.best.active(target(), x)
    scores = found.best.attributions(target(), x)
    assert torch.equal(active, scores > found.best.threshold)


def test_what_helps_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge in place of the true one: fewer bits at a higher learning rate, and at a smaller k."""
    asked: list[dict[str, Any]] = []

    def decompose(*positional: Any, **named: Any) -> apd.Decomposition:
        asked.append({name: named[name] for name in ("lr", "p", "n_components") if name in named})
        ks = [selection.top_k[0][1] for selection in named["selection"].selections]
        named["judge"] = iter(k + 10 * (named.get("lr", 0.01) != 0.05) + (named.get("p", 0.9) == 1) for k in ks)
        wanted = named["judge"]
        named["judge"] = lambda network, components, x: next(wanted)
        return apd.decompose(*positional, **named)

    monkeypatch.setattr(tuning, "decompose", decompose)
    tries = {"lr": [0.02, 0.05], "p": [1.0], "n_components": [6]}
    found = tune(target(), batches, ["weight"], 8, tries=tries, **QUICK)
    own = {"n_components": 8}
    assert asked == [
        own,
        own,
        own | {"lr": 0.02},
        own | {"lr": 0.05},
        own | {"lr": 0.05, "p": 1.0},
        {"lr": 0.05, "n_components": 6},
    ]
    assert found.settings == {"lr": 0.05, "n_components": 6}
    assert found.best.config.lr == 0.05
    assert found.k < 8 / 256
    assert [run.config.lr for run in found.runs] == [0.01, 0.01, 0.02, 0.05, 0.05, 0.05]
    assert any(run is found.best for run in found.runs)
    assert str(found).count("\n") == len(found.tried) == 6 * KS
    assert "lr=0.05" in str(found)


def test_time_is_a_limit_and_the_first_run_always_is() -> None:
    found = tune(target(), batches, ["weight"], 8, minutes=0, **QUICK)
    assert {row["run"] for row in found.tried} == {0}


@pytest.mark.parametrize(("minutes", "runs"), [(1.99, 1), (2, 2)])
def test_a_run_that_would_end_after_the_limit_is_not_begun(
    minutes: float, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look at the clock is half a minute after the last: the second run would begin after 1.5, and last 0.5."""
    looks = iter(range(0, 10_000, 30))
    monkeypatch.setattr(tuning, "time", SimpleNamespace(monotonic=lambda: float(next(looks))))
    found = tune(target(), batches, ["weight"], 8, minutes=minutes, **QUICK)
    assert {row["run"] for row in found.tried} == set(range(runs))


@pytest.mark.parametrize("name", ["top_k", "per_sample", "selection", "restarts", "judge", "checkpoint", "log"])
def test_what_it_chooses_is_not_given(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} belongs to one run"):
        tune(target(), batches, ["weight"], 8, **{name: 1})
    with pytest.raises(TypeError, match=f"{name} belongs to one run"):
        tune(target(), batches, ["weight"], 8, tries={name: [1]})


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"tries": ["lr"]}, TypeError, "tries"),
        ({"minutes": -1}, ValueError, "minutes"),
        ({"minutes": "long"}, TypeError, "minutes"),
        ({"epsilons": (0.1, -1.0)}, ValueError, "epsilons"),
        ({"alpha": -1.0}, ValueError, "alpha"),
        ({"n_components": 0}, ValueError, "n_components"),
        ({"stepps": 3}, TypeError, "stepps"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], says: str) -> None:
    given = {"weights": ["weight"], "n_components": 8, **QUICK} | change
    with pytest.raises(error, match=says):
        tune(target(), batches, **given)


def test_the_next_k_are_around_the_best_two_that_are_apart() -> None:
    tried = [{"k": k, "bits": b} for k, b in ((0.1, 5.0), (1.0, 2.0), (1.5, 1.0), (2.9, 1.5), (8.0, 3.0))]
    ks = tuning._around(tried, 9.0)
    assert len(ks) == KS
    assert ks[2] < 1.5 < ks[3]
    assert ks[8] < 8.0 < ks[9]
    assert max(ks) == 9.0
    assert ks[1] / ks[0] == pytest.approx(2**0.25)


def test_the_k_that_is_given_back_is_that_of_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    def decompose(*positional: Any, **named: Any) -> apd.Decomposition:
        bits = iter([5.0, 4.0, 3.0, 1.0, *[6.0] * (KS - 4)])
        return apd.decompose(*positional, **named | {"judge": lambda network, components, x: next(bits)})

    monkeypatch.setattr(tuning, "decompose", decompose)
    found = tune(target(), batches, ["weight"], 8, minutes=0, **QUICK)
    assert found.best.chosen == 3
    assert found.k == found.tried[3]["k"] != found.tried[0]["k"]


@pytest.mark.parametrize("how", [{"attribute_at": "components"}, {"per_position": True}])
def test_the_judge_scores_as_the_run_does(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits are counted by the attributions that chose who is active: where they are taken, and of what."""
    judges: list[Judge] = []

    def decompose(*positional: Any, **named: Any) -> apd.Decomposition:
        judges.append(named["judge"])
        return apd.decompose(*positional, **named)

    monkeypatch.setattr(tuning, "decompose", decompose)

    def sequences(step: int, generator: torch.Generator) -> Tensor:
        return batches(step, generator).reshape(8, 4, 4)

    net = nn.Sequential(target(), nn.ReLU())  # where components are few, it is open elsewhere than the target's
    found = tune(net, sequences, ["0.weight"], 8, minutes=0, **QUICK, **how)
    x, components = sequences(0, torch.Generator().manual_seed(5)), found.best.components
    network = apd.Network(net, ["0.weight"])
    assert judges[0].attribution is not None
    mine = judges[0].attribution(network, components, x)
    torch.testing.assert_close(mine, found.best.attributions(network, x))


def test_a_bar_shows_the_runs_unless_it_is_turned_off(capsys: pytest.CaptureFixture[str]) -> None:
    tune(target(), batches, ["weight"], 8, minutes=0, steps=2, tidy_every=0.0)
    assert "1/2" in capsys.readouterr().err
    tune(target(), batches, ["weight"], 8, minutes=0, steps=2, tidy_every=0.0, progress=False)
    assert "1/2" not in capsys.readouterr().err


def test_a_search_in_which_nothing_can_be_compared_warns() -> None:
    with pytest.warns(UserWarning, match=r"no k reached an error of 1e-09 or less.*faithfulness"):
        found = tune(target(), batches, ["weight"], 8, epsilons=(1e-9,), **QUICK | {"steps": 1})
    assert all(row["bits"] == math.inf for row in found.tried)


@pytest.mark.parametrize(("near", "away"), [(0.5, 0.4), (2.0, 2.5)])
def test_the_second_place_to_look_is_more_than_a_factor_of_two_away(near: float, away: float) -> None:
    rows = [{"k": k, "bits": bits} for k, bits in ((away, 3.0), (1.0, 1.0), (near, 2.0))]
    for tried, second in ((rows, away), (rows[1:], 1.0)):  # nothing far away: the best once more
        ks = torch.tensor(tuning._around(tried, 100.0), dtype=torch.double).log()
        half = len(ks) // 2
        assert ks[:half].mean().exp().item() == pytest.approx(1.0)
        assert ks[half:].mean().exp().item() == pytest.approx(second)
    assert max(tuning._around(rows, 0.9)) == 0.9
