"""The study with one question a sequence: its inputs, its masks, and its tests on parts whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch
from test_induced import by_hand

import apd_minimal as apd
from experiments import induced, one_question
from experiments.induced_network import LETTERS, POSITIONS, TwoLayers


def network() -> TwoLayers:
    return induced.target_of("untrained", 3)


def test_every_sequence_asks_one_task() -> None:
    net = network()
    x = one_question.OneAtATime(net, 64)(0, torch.Generator().manual_seed(0))
    asked = [{int(t) for t in row if t < 3} for row in net.asked(x)]
    assert len(x) == 64
    assert {len(tasks) for tasks in asked} == {1}
    assert set().union(*asked) == {0, 1, 2}
    for said, task, answer in zip(net.says(x), net.asked(x), net.answers(x), strict=True):
        places = {(t, int(task[t]), int(answer[t])) for t in range(POSITIONS) if task[t] < 3}
        assert {tuple(place) for place in said.nonzero().tolist()} == places


def test_the_whole_network_beside_an_empty_part() -> None:
    """With all that there is in one part, its mask leaves no error, and without it there is silence."""
    net = network()
    weights = apd.Network(net, net.weights).weights
    parts = {path: torch.stack([torch.zeros_like(w), w.detach()]) for path, w in weights.items()}
    found = one_question.measure(net, apd.Components.from_matrices(parts, 34), 3)
    assert found["active"] == pytest.approx(0, abs=1e-2)
    assert found["scrubbed"] == pytest.approx(0, abs=1e-2)
    assert found["use"] == [[[0.0, 1.0]] * LETTERS] * 3
    assert found["gone"] == [pytest.approx([0.0] * 3, abs=1e-2), pytest.approx([1.0] * 3, abs=1e-2)]
    assert found["alone"] == [pytest.approx([1.0] * 3, abs=1e-2), pytest.approx([0.0] * 3, abs=1e-2)]
    assert found["owner"][0] == -1


def test_scores_are_shares_and_their_sum_is_one() -> None:
    net = network()
    x = one_question.OneAtATime(net, 32)(0, torch.Generator().manual_seed(0))
    components = induced.heads(apd.Network(net, net.weights).weights)
    scores = one_question.attribution(apd.Network(net, net.weights), components, x)
    assert scores.shape == (32, 4)
    torch.testing.assert_close(scores.sum(1), torch.ones(32))
    # By hand: the derivative of what the answer differs in from saying nothing, with respect to one gate.
    gates = torch.ones(32, 4, requires_grad=True)
    logits = apd.Network(net, net.weights)(x, components, gates)
    (slopes,) = torch.autograd.grad(induced.along_the_answer(logits).sum(), gates)
    torch.testing.assert_close(scores, slopes.abs() / slopes.abs().sum(1, keepdim=True))


def test_the_recipe_is_one_and_no_network_was_used_before() -> None:
    seeds = [seed for _, seed in one_question.RUNS.jobs([])]
    free = [
        {k: v for k, v in one_question.settings_of(job).items() if k not in ("seed", "rank")}
        for job in one_question.RUNS.jobs([])
    ]
    assert all(settings == free[0] for settings in free)
    assert not {90, 91} & set(seeds)


def test_ownership_is_by_the_rule_that_was_fixed_before(monkeypatch: pytest.MonkeyPatch) -> None:
    net, rules = network(), []

    def owners(gone: torch.Tensor, relative: bool = False) -> list[int]:
        rules.append(relative)
        return [0] * len(gone)

    monkeypatch.setattr(induced, "owners", owners)
    one_question.measure(net, induced.heads(apd.Network(net, net.weights).weights), 3)
    assert rules == [True]


def test_packed_letters_share_three_dimensions_and_answers_are_told_apart() -> None:
    net = TwoLayers(3, packed=True)
    letters = net.embed[:LETTERS]
    assert torch.linalg.matrix_rank(letters) == torch.linalg.matrix_rank(net.unembed) == 3
    assert torch.linalg.matrix_rank(torch.cat([net.embed, net.places, net.unembed.T])) == 3 + 2 + POSITIONS + 3
    torch.testing.assert_close(letters.norm(dim=1), torch.ones(LETTERS))
    assert torch.linalg.matrix_rank(TwoLayers(3).embed[:LETTERS]) == LETTERS
    said = net.unembed.T @ net.unembed  # logits of one who says a letter
    assert (said.argmax(1) == torch.arange(LETTERS)).all()


def test_bits_about_in_closed_form() -> None:
    a, b = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), torch.tensor([0, 1] * 4)
    assert one_question.bits_about(a, a) == pytest.approx(2)
    assert one_question.bits_about(a, b) == pytest.approx(0)
    assert one_question.bits_about(a, a // 2) == one_question.bits_about(a // 2, a) == pytest.approx(1)
    # One symbol in four is heard wrongly: 1 - H(1/4).
    sent, heard = torch.tensor([0] * 4 + [1] * 4), torch.tensor([0, 0, 0, 1, 1, 1, 1, 0])
    assert one_question.bits_about(sent, heard) == pytest.approx(1 + 0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))


def test_a_part_that_is_on_for_one_task_tells_the_task() -> None:
    """Every task has a head of its own in the network by hand, but for induction's two."""
    net = by_hand()
    x = one_question.OneAtATime(net, 512)(0, torch.Generator().manual_seed(0))
    heads = induced.heads(apd.Network(net, net.weights).weights)
    itself, task, answer, anew = one_question.masked(net, heads, x)["tells"]
    assert itself == pytest.approx(task, abs=0.05)
    assert task > 1.5 > 0.1 > answer
    assert anew < 0.05


@pytest.mark.parametrize(
    ("kind", "rank_of_letters", "width", "rank", "steps", "by_heart"),
    [
        ("packed", 3, 24, 12, 5000, False), ("wide", 3, 34, 12, 5000, False), ("longer", 8, 34, 17, 5000, False),
        ("trained", 8, 34, 12, 2500, False), ("packed, labels", 3, 24, 12, 5000, True),
    ],
)  # fmt: skip
def test_what_differs_between_the_kinds(
    kind: str, rank_of_letters: int, width: int, rank: int, steps: int, by_heart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(net: TwoLayers, seed: int, steps: int = 2500, wrong: bool = False) -> TwoLayers:
        trained.append((steps, wrong))
        return net

    trained: list[tuple[int, bool]] = []
    monkeypatch.setattr(TwoLayers, "fit", fit)
    net = one_question.target_of(kind, 3)
    assert torch.linalg.matrix_rank(net.embed[:LETTERS]) == rank_of_letters
    assert net.embed.shape[1] == width
    assert trained == [(steps, by_heart)]
    assert one_question.settings_of((kind, 3))["rank"] == rank


def test_an_untrained_packed_network_is_where_training_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(net: TwoLayers, seed: int, **_: object) -> TwoLayers:  # the first two lines of `fit`
        fitted.append(net)
        return net.start(torch.Generator().manual_seed(seed))

    fitted: list[TwoLayers] = []
    monkeypatch.setattr(TwoLayers, "fit", start)
    x = TwoLayers(3).data(16)(0, torch.Generator().manual_seed(0))
    untrained, before = (one_question.target_of(kind, 3) for kind in ("packed, untrained", "packed"))
    assert torch.equal(untrained(x), before(x))
    assert fitted == [before]
    assert one_question.settings_of(("packed, untrained", 3)) == one_question.settings_of(("packed", 3))
    assert not any(p.requires_grad for p in untrained.parameters())
