"""The measures of trained induction networks, on one written by hand of which everything is known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import apd_minimal as apd
from experiments import induced as study
from experiments.induced_network import FREE, LETTERS, POSITIONS, TwoLayers, repeats, twice

N, T = LETTERS, POSITIONS
TABLE, BEFORE, FINDS, FIRST = range(4)  # the heads of `by_hand`


def by_hand(seed: int = 0, size: float = 20.0) -> TwoLayers:
    """Write all three circuits into the network, each head with one part to play."""
    net = TwoLayers(seed).requires_grad_(False)
    letters, mark, asks = net.embed[:N], net.embed[N] - net.embed[0], net.embed[-1]
    answers = net.unembed.T
    used = torch.cat([letters, mark[None], asks[None], net.places, answers])
    free = torch.linalg.svd(used).Vh[-FREE:]  # what is orthogonal to all of these
    e = used.shape[1] // 2
    into = torch.eye(e)
    entries = answers[net.table]
    # Of each head what it looks for, what is there to be found, what it reads and what it writes for that.
    looks = {
        TABLE: (mark[None], mark[None], letters, entries),
        BEFORE: (net.places[1:], net.places[:-1], letters, free),
        FINDS: (letters, free, letters, answers),
        FIRST: (asks[None], net.places[:1], letters, answers),
    }
    for head, (q, k, reads, writes) in looks.items():
        layer, own = net.blocks[head // 2], slice(head % 2 * e, (head % 2 + 1) * e)
        layer.q.weight[own] = size**0.5 * (into[: len(q)].T @ q)
        layer.k.weight[own] = size**0.5 * (into[: len(k)].T @ k)
        layer.v.weight[own] = into[:N].T @ reads
        layer.o.weight[:, own] = 12 * writes.T @ into[:N] if head != BEFORE else writes.T @ into[:N]
    for block in net.blocks:
        block.nothing.fill_(0.6 * size)  # far above all but the right place
    return net


def sequences(net: TwoLayers, n: int = 600, seed: int = 1) -> Tensor:
    return net.data(n)(0, torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def net() -> TwoLayers:
    return by_hand()


def in_words(net: TwoLayers, tokens: list[int]) -> tuple[list[int], list[int]]:
    """What is asked at each position, and the right answer, token by token."""
    asked, answers = [], []
    for t, token in enumerate(tokens):
        earlier = [s for s in range(t) if tokens[s] < 2 * N and token < 2 * N and tokens[s] % N == token % N]
        if token == 2 * N:
            asked.append(1)
            answers.append(tokens[0] % N)
        elif token >= N:
            asked.append(2)
            answers.append(int(net.table[token - N]))
        elif earlier:
            asked.append(0)
            answers.append(tokens[earlier[0] + 1] % N)
        else:
            asked.append(3)
            answers.append(N)
    return asked, answers


@given(st.integers(0, 2**31))
def test_tasks_and_answers_are_those_of_the_definition(seed: int) -> None:
    net = TwoLayers(seed)
    for x in (sequences(net, 20, seed), twice(20, torch.Generator().manual_seed(seed))):
        for row, asked, answers in zip(x.tolist(), net.asked(x).tolist(), net.answers(x).tolist(), strict=True):
            assert (asked, answers) == in_words(net, row)


@given(st.integers(0, 2**31))
def test_every_letter_comes_twice_and_not_at_one_distance(seed: int) -> None:
    x = twice(50, torch.Generator().manual_seed(seed))
    first, second = x.chunk(2, 1)
    assert (first.sort(1).values == second.sort(1).values).all()
    assert (first.sort(1).values.diff(dim=1) > 0).all()
    distances = repeats(x).nonzero()
    assert len((distances[:, 1] - distances[:, 2]).unique()) > 3


def test_the_network_by_hand_answers_and_looks_as_it_should(net: TwoLayers) -> None:
    x = sequences(net)
    assert (net(x).argmax(-1) == net.answers(x)).all()
    seen = study.attention(net, x)
    assert seen["before"][0][1] > 0.99
    assert seen["finds"][1][0] > 0.99
    assert seen["first"][1][1] > 0.99
    assert seen["itself"][0][0] > 0.99
    assert max(seen["before"][0][0], seen["finds"][1][1], seen["first"][1][0], seen["itself"][0][1]) < 0.5


def test_heads_add_up_and_are_owned_by_their_tasks(net: TwoLayers) -> None:
    network, x = apd.Network(net, net.weights), sequences(net)
    cut = study.heads(network.weights)
    for path, weight in network.weights.items():
        assert torch.allclose(cut.sum(path), weight, atol=1e-5)
    doing = study.Doing(net, cut, x)
    assert doing.error(torch.ones(4)).max() < 1e-3
    gone, alone = doing.each()
    owner = study.owners(gone)
    assert owner == [2, 0, 0, 1]
    right = torch.tensor([1.0, 0.0, 0.0, 1.0])
    tests = torch.tensor(study.group_tests(doing, owner))
    assert (tests - right).abs().max() < 0.01
    assert alone[TABLE, 2] < 0.01
    assert alone[BEFORE, 0] > 0.99  # the table has one head, induction has two
    wrong = torch.tensor(study.group_tests(doing, [1, 0, 0, 2]))
    assert (wrong[1] - torch.tensor([0.0, 0.5, 1.0, 0.5])).abs().max() < 0.01
    assert doing.same(torch.ones(4)).min() == 1
    assert doing.same(torch.tensor([1.0, 1.0, 1.0, 0.0])).tolist() == [1, 0, 1]


def test_owners_need_harm() -> None:
    gone = torch.tensor([[0.5, 0.1, 0.0], [0.05, 0.05, 0.05], [0.4, 0.4, 0.9], [0.45, 0.2, 0.0]])
    assert study.owners(gone) == [0, -1, 2, 0]


def test_a_task_that_suffers_from_everything_does_not_get_everything_by_the_relative_rule() -> None:
    gone = torch.tensor([[3.0, 0.2, 0.0], [2.0, 1.5, 0.1], [4.0, 1.2, 1.3], [0.05, 0.02, 0.01]])
    assert study.owners(gone.clamp(max=1)) == [0, 0, 0, -1]  # ties go to the first task
    assert study.owners(gone) == [0, 0, 0, -1]  # and it is harmed most anyway
    assert study.owners(gone, relative=True) == [0, 1, 2, -1]
    assert study.owners(torch.tensor([[1.4, 2.0, 0.0]])) == [1]
    assert study.owners(torch.tensor([[1.4, 2.0, 0.0]]).clamp(max=1)) == [0]


def test_all_rules_agree_where_each_head_serves_one_task(net: TwoLayers) -> None:
    cut = study.heads(apd.Network(net, net.weights).weights)
    seen = study.by_rule(net, cut, 1)
    for rule in seen["rules"].values():
        assert rule["owner"] == [2, 0, 0, 1]
        assert [v for tests in rule["groups"] for v in tests] == pytest.approx([1, 0, 0, 1] * 3, abs=0.02)
    assert max(seen["all"]["error"]) < 1e-3 and min(seen["all"]["same"]) == 1
    assert max(map(max, seen["gone"])) > 0.999  # not cut: without its head, a task is silent or worse
    some = study.by_rule(net, cut.subset([TABLE, FIRST]), 1)["all"]
    assert some["error"][0] > 0.9 and some["same"][0] < 0.5
    assert some["median"][0] > 1 > some["median"][2]


def test_what_is_missing_stays_when_a_component_is_taken_out(net: TwoLayers) -> None:
    cut = study.heads(apd.Network(net, net.weights).weights)
    some = cut.subset([TABLE, FIRST])  # nothing of induction
    gone, alone = study.Doing(net, some, sequences(net)).each()
    right = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    assert (gone - right).abs().max() < 0.01
    assert (alone - (1 - right)).abs().max() < 0.01


def test_errors_are_divergences() -> None:
    p, q = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    by_library = torch.nn.functional.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="none").sum(-1)
    assert torch.allclose(study.errors(q, p), by_library, atol=1e-6)


def test_attention_falls_with_either_head_of_induction_and_no_other(net: TwoLayers) -> None:
    cut = study.heads(apd.Network(net, net.weights).weights)
    seen = study.attention_without(net, cut, sequences(net))
    assert seen["head"] == FINDS - 2
    assert seen["target"] > 0.99
    gone = seen["without"]
    assert max(gone[BEFORE], gone[FINDS]) < 0.3
    assert min(gone[TABLE], gone[FIRST]) > 0.99


def roles(net: TwoLayers) -> apd.Components:
    """Cut the network by hand by roles: sender, link, asker of induction; of first sender and asker; the table."""
    owners = {TABLE: "qkvo", BEFORE: "1001", FINDS: "2112", FIRST: "4334"}
    cut = {}
    network = apd.Network(net, net.weights)
    by_head = study.heads(network.weights)
    for path in network.weights:
        part = "qkvo".index(path.split(".")[2])
        own = torch.zeros(6, *network.shapes[path])
        for head, names in owners.items():
            own[5 if head == TABLE else int(names[part])] += by_head.matrices(path)[head]
        cut[path] = own
    return apd.Components.from_matrices(cut)


def test_the_mask_has_to_move_with_the_pattern() -> None:
    net = by_hand(size=10.0)  # sharp attention hides its keys
    parts = roles(net)
    seen = study.moved(net, parts, 0.005, 3)
    assert seen["own"] < 0.1
    assert seen["moves"] < 0.1
    assert seen["stays"] > 0.9
    assert seen["another's"] > 0.5


def test_masks_of_another_give_no_answer_away() -> None:
    net = by_hand(size=10.0)
    seen = study.leaks(net, roles(net), 3.0, 3)
    assert seen["own mask"][0] > 0.9
    assert seen["another's mask: its answer"][0] < 0.3


def test_attributions_are_shares_and_see_who_answers(net: TwoLayers) -> None:
    network, x = apd.Network(net, net.weights), sequences(net, 200)
    found = study.attribution(network, study.heads(network.weights), x)
    assert torch.allclose(found.sum((-2, -1))[found.sum((-2, -1)) > 0], torch.ones(1))
    asked = net.asked(x)
    only = (asked == 2).any(1) & (asked % 3 == 2).logical_or(asked == 3).all(1)
    assert (found[only].sum(1).argmax(-1) == TABLE).all()


def test_everything_is_measured(net: TwoLayers) -> None:
    row = study.short(study.measure(net, roles(net), 0.25, 0))
    assert [v for tests in row["groups"] for v in tests] == pytest.approx([1, 0, 0, 1] * 3, abs=0.05)
    assert max(row["errors"]["all"]) < 0.01
    assert study.short({"a": [0.123456, {"b": 1}]}) == {"a": [0.1235, {"b": 1}]}
