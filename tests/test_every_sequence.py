"""Tests of every sequence with every mask: the list of sequences, and errors against runs of single masks."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.targets import Induction
from experiments import every_sequence, induction


def asked(x: tuple[int, ...], n: int) -> int | None:
    """Say what a sequence asks by the words of `Sequences`: a circuit, 3 for nothing, or None if it is not listed."""
    asks = [t for t, token in enumerate(x) if token == 2 * n]
    marked = [t for t, token in enumerate(x) if n <= token < 2 * n]
    letters = [token % n for token in x if token < 2 * n]
    again = [(s, t) for s, t in itertools.combinations(range(len(x)), 2) if x[s] % n == x[t] % n]
    if len(asks) + len(marked) == 0 and len(again) == 1 and again[0][1] >= again[0][0] + 2:
        return 0
    if len(set(letters)) < len(letters) or 0 in asks + marked:
        return None
    kinds = {(1, 0): 1, (0, 1): 2, (0, 0): 3}
    return kinds.get((len(asks), len(marked)))


@pytest.mark.parametrize(("n", "T"), [(4, 4), (5, 4), (3, 3)])
def test_the_list_is_every_sequence_that_fits_once(n: int, T: int) -> None:
    listed = [(tuple(x.tolist()), question) for question, some in every_sequence.sequences(n, T) for x in some]
    by_hand = {x: q for x in itertools.product(range(2 * n + 1), repeat=T) if (q := asked(x, n)) is not None}
    assert len(listed) == len(by_hand)
    assert dict(listed) == by_hand


def test_what_data_draws_is_in_the_list() -> None:
    """Eight letters at eight positions: 21 places for a repeat, seven for a question or a mark, and one without."""
    target = Induction()
    counts: Counter[int] = Counter()
    places = []
    for question, some in every_sequence.sequences(8, 8):
        counts[question] += len(some)
        places.append(some)
    assert [counts[q] for q in range(4)] == [21 * 40_320, 7 * 40_320, 7 * 40_320, 40_320]
    known = torch.cat(places) @ 17 ** torch.arange(8)
    assert len(known.unique()) == len(known)
    x = induction.OneAtATime(target, 2000)(0, torch.Generator().manual_seed(1))
    assert torch.isin(x @ 17 ** torch.arange(8), known).all()


def test_the_network_with_positions_first_is_the_network() -> None:
    target = Induction(seed=2, lean=True)
    parts, x = mixed(target, 1), target.data(64)(0, torch.Generator().manual_seed(1))
    network = apd.Network(target, target.weights)
    whole = {path: parts.sum(path) for path in parts.paths}
    torch.testing.assert_close(
        every_sequence.answers(target, whole, x).permute(2, 0, 1), network(x, parts), atol=1e-5, rtol=1e-4
    )


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Tensor]]:
    """Twelve sequences in the list, four that ask each of two circuits and four that ask nothing."""
    whole = [(question, some[torch.arange(4) * 97]) for question, some in every_sequence.sequences(8, 7)]
    some = [whole[0], whole[-2], whole[-1]]
    monkeypatch.setattr(every_sequence, "sequences", lambda n, T: iter(some))
    return some


def mixed(target: Induction, seed: int) -> apd.Components:
    """Mix the true circuits a little, so that masks matter, and leave some of the sum out."""
    turn = torch.eye(3) + 0.1 * torch.randn(3, 3, generator=torch.Generator().manual_seed(seed))
    truth = target.mechanisms()
    return apd.Components.from_matrices({p: torch.einsum("cj,jio->cio", turn, m) for p, m in truth.items()}, 6)


def test_errors_are_those_of_single_runs_with_gates(few: list[tuple[int, Tensor]]) -> None:
    target = Induction(positions=7, seed=2, lean=True)
    parts, groups = mixed(target, 1), [[1], [0], [2]]
    network = apd.Network(target, target.weights)
    found = every_sequence.verified(target, parts, groups)
    for question, some in few:
        alone, means, worst, wrong = [], [], [], []
        for x in some:
            errors, least, off = [], None, False
            for gates in itertools.product((0.0, 1.0), repeat=3):
                if question < 3 and not gates[groups[question][0]]:
                    continue
                with torch.no_grad():
                    gap = network(x[None], parts, torch.tensor([gates])) - target.answers(x[None])
                errors.append(float(gap.square().sum() / 3))
                off |= bool(gap.abs().max() >= 1)
                if sum(gates) == (question < 3):
                    least = errors[-1]
            alone.append(least)
            means.append(sum(errors) / len(errors))
            worst.append(max(errors))
            wrong.append(off)
        assert found["inputs"][question] == 4 and found["runs"][question] == 4 * len(errors)
        for name, values in (("alone", alone), ("scrubbed", means), ("worst", worst), ("wrong", wrong)):
            assert found[name][question] == pytest.approx(sum(values) / 4, rel=1e-3, abs=1e-6), name
        assert found["worst_input"][question] == pytest.approx(max(worst), rel=1e-3, abs=1e-6)
    assert 0 < found["wrong"][0] + found["wrong"][2]  # else the comparison says nothing of it


def test_truth_and_heads_pass_and_a_swap_does_not(few: list[tuple[int, Tensor]]) -> None:
    target = Induction(positions=7, seed=2, lean=True)
    truth = apd.Components.from_matrices(target.mechanisms())
    own = [[0], [1], [2]]
    for parts, groups in ((truth, own), (apd.Components.from_matrices(induction.heads(target)), [[0, 2], [3], [1]])):
        found = every_sequence.verified(target, parts, groups)
        assert max(found["worst_input"]) < 1e-3 and max(v for v in found["wrong"] if v == v) == 0
        assert every_sequence.between(target, parts, groups, 1, 64)["worst_input"] < 1e-3
    assert [v for v in every_sequence.chosen(target, truth, own) if v == v] == [1, 1]
    assert [v for v in every_sequence.chosen(target, truth, [[1], [0], [2]]) if v == v] == [0, 1]
    swapped = {p: m.roll(1, 0) if p.endswith("1.o.weight") else m for p, m in target.mechanisms().items()}
    bug = every_sequence.verified(target, apd.Components.from_matrices(swapped), own)
    assert bug["alone"][0] > 0.9 and bug["wrong"][0] == 1


def test_gates_in_between_are_met_where_they_are_worse() -> None:
    """A part makes a head look, and takes away what it says: silent at either end, and loud in between."""
    target = Induction(positions=7, seed=2, lean=True)
    truth, e = target.mechanisms(), 3
    parts = {path: torch.stack([0 * m[0], m[2], 0 * m[0]]) for path, m in truth.items()}  # the table, and nothing else
    parts["blocks.0.k.weight"][1] += truth["blocks.0.k.weight"][0]
    parts["blocks.0.v.weight"][1] += truth["blocks.0.v.weight"][0]
    parts["blocks.0.o.weight"][1, :e] = target.unembed.T  # what the head before sees becomes an answer
    parts["blocks.0.q.weight"][2] = 3 * truth["blocks.0.q.weight"][0]
    parts["blocks.0.v.weight"][2] = -truth["blocks.0.v.weight"][0]
    row = every_sequence.between(target, apd.Components.from_matrices(parts), [[0], [0], [1]], 1, 64)
    x = induction.OneAtATime(target, 64)(0, torch.Generator().manual_seed(50_001))
    table = float((target.says(x) != 0).any(-1).any(1)[:, 2].float().mean())
    assert row["worse"] >= table > 0.2
    assert row["worst"] > row["corner"] + 0.1
