"""What each method finds: what puts parts together by the truth, the unit of the penalty, and the size of answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import apd_minimal as apd
from experiments import each_method, induction, modular, pieces
from experiments.each_method import Row, attribution_of, by_truth, nothing_active, singular, source_of, target_of


@pytest.mark.parametrize("kind", each_method.KINDS)
def test_pieces_of_the_truth_are_put_together_to_the_truth(kind: str) -> None:
    target, truth = target_of(kind, 1)
    network = apd.Network(target, list(truth))
    cut = {}
    for path, Z in truth.items():
        U, S, Vh = torch.linalg.svd(Z, full_matrices=False)
        split = torch.einsum("jir,jr,jro->jrio", U, S, Vh).flatten(0, 1)[S.flatten() > 1e-5]
        rest = torch.zeros(400 - len(split), *Z.shape[1:])
        cut[path] = torch.cat([split, rest])[torch.randperm(400, generator=torch.Generator().manual_seed(2))]
    assert apd.metrics.ownership(by_truth(apd.Components.from_matrices(cut, 1), truth), truth).complete
    directions = singular(network)
    assert directions.n_components == sum(min(w.shape) for w in network.weights.values())
    for path, w in network.weights.items():
        torch.testing.assert_close(directions.sum(path), w, atol=1e-4, rtol=0)
    alone = torch.stack([(directions.matrices(path).flatten(1).norm(dim=1) > 0).float() for path in network.weights])
    assert alone.sum(0).max() == 1, "each lies in one weight"
    owned = apd.metrics.ownership(by_truth(directions, truth), truth).owned
    # Where each group has tokens of its own, the truth tells whose every direction is, and nothing has to be found.
    assert owned.all() if kind == "apart" else not owned.any()


def test_the_error_with_nothing_active_is_that_of_silence() -> None:
    target, _ = target_of("shared", 1)
    x = target.data(64)(0, torch.Generator().manual_seed(0))
    found = nothing_active(apd.Network(target, target.weights), x)
    assert found == pytest.approx(float(target(x).detach().square().mean()), rel=1e-5)


def wobbling(target: Any, truth: dict[str, torch.Tensor]) -> apd.Components:
    """The mechanisms and some noise."""
    draw = torch.Generator().manual_seed(5)
    return apd.Components.from_matrices(
        {path: Z + 0.1 * torch.randn(Z.shape, generator=draw) for path, Z in truth.items()}
    )


def test_gradients_of_the_size_of_answers_are_those_of_chapter_36() -> None:
    target, truth = target_of("induction", 1)
    network, parts = apd.Network(target, list(truth)), wobbling(target, truth)
    x = source_of("induction", target, 64)(0, torch.Generator().manual_seed(0))
    assert (target.says(x).any(-1).any(1).sum(1) == 1).all(), "each sequence asks one circuit"
    sized = apd.Network(target, list(truth), each_method.size)
    theirs = induction.scores_of("sequence")(network, parts, x)
    torch.testing.assert_close(apd.attributions.gradient(sized, parts, x), theirs, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(attribution_of("induction", "gradient")(network, parts, x), theirs)


def test_other_estimators_on_induction_see_the_size_of_answers_and_nothing_else() -> None:
    target, truth = target_of("induction", 1)
    network, parts = apd.Network(target, list(truth)), wobbling(target, truth)
    x = source_of("induction", target, 16)(0, torch.Generator().manual_seed(0))
    found = attribution_of("induction", "ablation")(network, parts, x)
    whole = {path: w.clone() for path, w in target.named_parameters()}
    for c in range(3):
        less = {path: whole[path] - parts.matrices(path)[c].T for path in truth}
        with torch.no_grad():
            before, after = target(x), torch.func.functional_call(target, whole | less, (x,))
        lost = (before.square().sum((1, 2)) - after.square().sum((1, 2))) / 2
        torch.testing.assert_close(found[:, c], lost.abs(), rtol=1e-3, atol=1e-3)
    plain, truths = target_of("shared", 1)
    x, parts = plain.data(8)(0, torch.Generator().manual_seed(0)), apd.Components.from_matrices(truths)
    net = apd.Network(plain, list(truths))  # elsewhere attributions are to the outputs, as everywhere
    torch.testing.assert_close(
        attribution_of("shared", "ablation")(net, parts, x), apd.attributions.ablation(net, parts, x)
    )


def test_later_kinds_have_the_settings_of_their_chapters() -> None:
    mine: Row = each_method.settings_of(("induction", "ablation", 9010))
    assert mine == pieces.settings_of(("full", 9010)) | {"batch": pieces.BATCH}  # those of chapter 36, four starts
    assert each_method.settings_of(("tokens", "ablation", 9010)) == modular.settings_of(
        ("tokens", 40, 9010, "gentle")
    ) | {"batch": 256}


@pytest.mark.parametrize("known", ["tokens", "waves"])
def test_both_cuts_of_the_plain_addition_are_asked_for(known: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, tokens = target_of("tokens", 9010)
    other, _ = target_of("tokens", 9011)
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), other.parameters(), strict=True)), "one network"
    waves = {"hidden.weight": target.mechanisms("frequency")["hidden.weight"]}
    given = apd.Components.from_matrices({"tokens": tokens, "waves": waves}[known])
    monkeypatch.setattr(each_method, "singular", lambda network: given)
    rows, _ = each_method.run(("tokens", "untrained", 9010))
    assert {row["against"]: row["owned"] for row in rows} == {
        "tokens": 26 * (known == "tokens"), "waves": 6 * (known == "waves"),
    }  # fmt: skip
    # Which of equal errors is the smaller one, a kernel's rounding decides: the same cut can differ by a component.
    assert [row["bits"] == pytest.approx(row["bits_of_the_truth"], rel=0.01) for row in rows] == [
        row["against"] == known for row in rows
    ]


def asked_of(monkeypatch: pytest.MonkeyPatch, job: tuple[str, str, int], of: Any) -> dict[str, Any]:
    """The arguments of the one call of `decompose` that a job makes."""
    asked: dict[str, Any] = {}

    def stopped(*args: Any, **arguments: Any) -> None:
        asked.update(arguments)
        raise InterruptedError

    monkeypatch.setattr(apd, "decompose", stopped)
    with pytest.raises(InterruptedError):
        of(job)
    return asked


def test_the_log_changes_what_it_says_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    of_table = asked_of(monkeypatch, ("frequency", "no k", 90), each_method.run)
    allowed = of_table["selection"].allowed
    only_in_one = {"selection", "callback", "attribution", "judge", "restarts", "progress"}
    given = {name: v for name, v in of_table.items() if name not in only_in_one}
    assert of_table["n_components"] == 15 and of_table["selection"].gain == apd.bottleneck.GAINS
    for change in each_method.CHANGES:
        asked = asked_of(monkeypatch, ("frequency", change, 90), each_method.run_log)
        changed = {name for name in given if asked[name] != given[name]}
        assert set(asked) - only_in_one - set(given) == ({"minimality", "scrub"} if "gentle" in change else set())
        want = {"n_components"} if "C = J" in change else set()
        want |= {"simplicity", "faithfulness"} if "gentle" in change else set()
        assert changed == want | ({"faithfulness"} if "faithful" in change else set())
        factor = 0.1 if "error" in change else 1.0
        assert asked["selection"].allowed == tuple((t, factor * v) for t, v in allowed)
        assert asked["selection"].gain == (8.0, 10.0) and asked["restarts"] == 2


def test_jobs_are_distinct_and_reported_seeds_are_fresh() -> None:
    jobs = each_method.jobs()
    assert len(set(jobs)) == len(jobs) == 4 * len(each_method.METHODS) * 5 + 5 * len(each_method.LATER)
    assert {seed for *_, seed in jobs} == set(range(9010, 9015))
