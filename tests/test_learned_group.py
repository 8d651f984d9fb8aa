"""Networks that learned S4, taken apart: cuts and scores of networks written by hand, whose answers follow from theory.

The traces of irreps give all scores of such a network (chapter 37), so that what a part says alone is known.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

import apd_minimal as apd
from apd_minimal.targets import Group, GroupOperations
from experiments import groups, irreps, learned_group
from experiments.groups import HIDDEN, OUT, PATHS
from experiments.irreps import subgroups
from experiments.learned_group import causal, cuts, in_one, told

TASK = GroupOperations(["S4"], embedding=False, seed=1)
GROUP, NETWORK = TASK.groups[0], apd.Network(TASK, list(PATHS))
CUTS = cuts(TASK, NETWORK.weights)
PAIRS = torch.cartesian_prod(torch.arange(24), torch.arange(24))
PLACES = ("first", "second", "answer")


def scores_of(some: list[int]) -> Tensor:
    """Give the scores of all pairs and answers [576, 24] by some irreps, from their traces; answers are tokens."""
    total = torch.zeros(24, 24, 24, dtype=torch.double)
    for i in some:
        rho = GROUP.irreps[i].double()
        total += GROUP.weights[i] / 24 * torch.einsum("aij,bjk,cik->abc", rho, rho, rho)
    scores = torch.empty_like(total)
    scores[:, :, TASK.tokens[0]] = total
    return scores.flatten(0, 1)


def test_neurons_by_irrep_are_the_irreps_of_a_network_written_by_hand() -> None:
    parts, on = CUTS["neurons by irrep"]
    for path, own in TASK.mechanisms("irrep").items():
        torch.testing.assert_close(parts.matrices(path), own, atol=1e-5, rtol=0)
    assert on == 1


@pytest.mark.parametrize("name", CUTS)
def test_cuts_sum_to_the_weights(name: str) -> None:
    for path in PATHS:
        torch.testing.assert_close(CUTS[name][0].matrices(path).sum(0), NETWORK.weights[path], atol=1e-4, rtol=0)


def test_each_token_in_each_place_has_a_part() -> None:
    parts, on = CUTS["tokens"]
    reads, writes = (parts.matrices(path).norm(dim=2) > 1e-3 for path in PATHS)
    assert torch.equal(reads, torch.eye(49, 48, dtype=torch.bool)) and on == 3
    assert not writes[:-1].any() and writes[-1].all()


def test_by_what_it_is_told_which_parts_are_on() -> None:
    own = next(s for s in subgroups(GROUP) if len(s) == 6)
    cosets = sorted({tuple(sorted(GROUP.table[g, own].tolist())) for g in range(24)})
    of = torch.tensor([next(i for i, coset in enumerate(cosets) if g in coset) for g in range(24)])
    first, second = PAIRS.T
    for place, element in (("first", first), ("second", second), ("answer", GROUP.table[first, second])):
        for classes, coset in ((of, 1.0), (torch.arange(24), 11 / 23)):  # one element: half of a coset of two
            found = told(GROUP, one_hot(classes[element]).float())
            assert {name: found[name] for name in PLACES} == {name: float(name == place) for name in PLACES}
            assert found[f"{place}, coset"] == pytest.approx(coset, abs=1e-3)
    random = torch.randint(4, (576,), generator=torch.Generator().manual_seed(0))
    by_chance = told(GROUP, one_hot(random).float())
    assert all(0.01 < by_chance[name] < 0.09 for name in PLACES)  # expected: 23 / 575


def test_how_much_of_an_element_lies_in_one_part() -> None:
    assert set(in_one(TASK, CUTS["tokens"][0]).values()) == {1}
    twice = {HIDDEN: (0.7, 0.3), OUT: (0.5, 0.5)}  # the network in two parts, of different lengths where they read
    parts = apd.Components.from_matrices(
        {path: torch.stack([share * NETWORK.weights[path].detach() for share in own]) for path, own in twice.items()}
    )
    wanted = {"first": 0.49 / 0.58, "second": 0.49 / 0.58, "written": 0.5}
    assert in_one(TASK, parts) == pytest.approx(wanted, abs=1e-4)


def test_what_irreps_do_follows_from_their_traces() -> None:
    parts, x, said = CUTS["neurons by irrep"][0], TASK.inputs(), TASK.answers()
    on = one_hot(torch.full((576,), 2), 4).float()
    found = causal(NETWORK, parts, on, x, said)

    def by_traces(some: list[int]) -> tuple[float, float]:
        p, q = scores_of([0, 1, 2, 3]).log_softmax(1), scores_of(some).log_softmax(1)
        right = (q.gather(1, said[:, None])[:, 0] >= q.amax(1) - 1e-9).double().mean()
        return float(right), float((p.exp() * (p - q)).sum(1).mean())

    assert found["on"] == found["alone"] == pytest.approx(by_traces([2]), abs=2e-4)
    assert found["without"] == pytest.approx(by_traces([0, 1, 3]), abs=2e-4)
    others = [by_traces([i])[1] for i in (0, 1, 3)]  # answers of two of these tie
    assert found["alone, others"][1] == pytest.approx(sum(others) / 3, abs=2e-4)
    rest = [by_traces([j for j in range(4) if j != i]) for i in (0, 1, 3)]
    assert found["without, others"] == pytest.approx([sum(v) / 3 for v in zip(*rest, strict=True)], abs=2e-4)
    assert found["best"][0] == 1
    wrong = said.clone()
    wrong[:144] = (wrong[:144] + 1) % 24
    assert causal(NETWORK, parts, on, x, wrong)["on"][0] == 0.75


def test_tokens_need_three_parts_and_no_other() -> None:
    parts, x = CUTS["tokens"][0], TASK.inputs()
    on = torch.cat([x, torch.ones(576, 1)], 1)
    found = causal(NETWORK, parts, on, x, TASK.answers())
    assert found["on"] == found["without, others"] == pytest.approx([1, 0], abs=1e-4)
    assert found["alone"][0] == pytest.approx(1 / 24, abs=1e-4)  # all scores are zero, and the first token is chosen
    p = scores_of([0, 1, 2, 3]).log_softmax(1)
    silent = float((p.exp() * p).sum(1).mean()) + math.log(24)  # both signs of a product cancel without one of its two
    assert found["alone"][1] == pytest.approx(silent, abs=2e-4)
    assert found["without"][1] == pytest.approx(silent, abs=2e-4)


def test_shown_and_held_out_pairs_are_scored_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = irreps.split(576, 1)[0]
    monkeypatch.setattr(learned_group, "JUDGE", lambda network, parts, x: len(x))
    told_wrong = TASK.answers()
    told_wrong[shown] = (told_wrong[shown] + 1) % 24
    monkeypatch.setattr(TASK, "answers", lambda: told_wrong)
    net: Any = TASK
    for kind, right in (("learned", 0), ("untrained", 1)):  # an untrained network is asked for its own answers
        found = learned_group.measured((kind, 1, 1, 1), TASK, net, CUTS["lump"][0])
        assert (found["shown"]["bits"], found["held"]["bits"]) == (403, 173)
        assert (found["shown"]["on"][0], found["held"]["on"][0]) == (right, 1)
    assert found["shares"]["irrep"] == pytest.approx(1, abs=1e-3)
    assert found["apart"] == pytest.approx(irreps.energies(TASK, CUTS["neurons by irrep"][0]).sum(1).amax().item() / (
        irreps.energies(TASK, CUTS["lump"][0]).sum().item()), abs=1e-3)  # fmt: skip


def test_apd_sees_only_what_the_network_was_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def stop(net: Any, batches: Any, paths: Any, **settings: Any) -> None:
        seen.update(settings, net=net, table=batches.table)
        raise KeyboardInterrupt

    monkeypatch.setattr(apd, "decompose", stop)
    with pytest.raises(KeyboardInterrupt):
        learned_group.run(("untrained", 3, 8, 90))
    task = GroupOperations(["S4"], embedding=False, seed=90)
    assert torch.equal(seen["table"], task.inputs()[irreps.split(576, 90)[0]])
    assert (seen["top_k"], seen["n_components"], seen["divergence"]) == (3.0, 8, "kl")
    for mine, start in zip(seen["net"].parameters(), groups.OneLayer(48, 24, True, 90, 128).parameters(), strict=True):
        assert torch.equal(mine, start)


def test_settings_are_those_for_networks_that_learned_answers() -> None:
    for job in learned_group.RUNS.jobs([]):
        own, theirs = learned_group.settings_of(job), groups.settings_of(("answers", job[2], job[3]))
        assert {k for k in own if own[k] != theirs[k]} - {"top_k"} == {"restarts"}
        assert job[3] not in range(90, 94) and own["top_k"] == job[1]
    assert isinstance(GROUP, Group) and len(GROUP.irreps) == 4


def test_networks_of_other_groups_are_those_that_were_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(irreps, "STEPS", {"S4": 2, "A4": 3, "S5": 0})
    for kind, name, steps in (("learned, A4", "A4", 3), ("untrained, A4", "A4", 0), ("learned", "S4", 2)):
        task, net = learned_group.network_of(kind, 8710)
        own = GroupOperations([name], embedding=False, seed=8710)
        same = next(net for step, net in irreps.learned(own, own.answers(), 8710, steps) if step == steps)
        assert task.groups[0].name == name
        torch.testing.assert_close(net(own.inputs()), same(own.inputs()))
    counts = {name: len(Group(name).irreps) for name in ("A4", "S4", "S5")}
    for kind, on, count, _ in learned_group.RUNS.jobs([]):
        assert on == 3 or count in (counts[kind.partition(", ")[2] or "S4"], 8)


def test_groups_by_lot_are_as_large_as_those_by_irrep_and_other_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[apd.Components] = []

    def measured(job: Any, task: Any, net: Any, components: apd.Components) -> dict[str, Any]:
        seen.append(components)
        return {}

    monkeypatch.setattr(learned_group, "network_of", lambda kind, seed: (TASK, TASK))
    monkeypatch.setattr(learned_group, "measured", measured)
    learned_group.by_lot(("learned", 3))
    (parts,), by_irrep = seen, TASK.mechanisms("irrep")
    for path in PATHS:
        torch.testing.assert_close(parts.sum(path), NETWORK.weights[path], atol=1e-5, rtol=0)
    own, irrep = (m.norm(dim=2) > 1e-4 for m in (parts.matrices(OUT), by_irrep[OUT]))  # [irreps, neurons]
    assert own.sum(1).tolist() == irrep.sum(1).tolist() == [2 * d**3 for d in (1, 2, 3, 3)]
    assert (own.sum(0) == 1).all() and (own & irrep).sum() < 0.7 * own.shape[1]


def test_values_are_counted_up_to_a_tolerance() -> None:
    """Four levels with jitter below a tenth of a standard deviation, all apart, and one in each two of a sign."""
    draw = torch.Generator().manual_seed(0)
    four = torch.arange(24).remainder(4).double() + 0.1 * torch.rand(24, generator=draw).double()
    apart, sign = torch.arange(24).double(), torch.arange(24).remainder(2).double()
    functions = torch.stack([four, 100 * four + 7, apart, sign], 1)  # a scale and a constant change nothing
    assert learned_group.values(functions).tolist() == [4, 4, 12, 2]  # 0.2 of apart's 6.9 hold two neighbours


@pytest.mark.parametrize("side", ["left", "right"])
def test_orbits_follow_from_what_a_vector_is_fixed_by(side: str) -> None:
    """The matrices that place the corners of a tetrahedron and of a cube's axes fix vectors that are known."""
    three, turns = GROUP.irreps[2], GROUP.irreps[3]
    generic = torch.tensor([1.0, 0.3, -0.7]).double()

    def fixed(
        rho: Tensor, size: int
    ) -> Tensor:  # a vector that a subgroup of so many elements fixes, and no larger one
        for own in subgroups(GROUP):
            U, S, _ = torch.linalg.svd(rho[own].mean(0))
            if len(own) == size and abs(float(S[0]) - 1) < 1e-6 and float(S[1]) < 1e-6:
                return U[:, 0]
        raise AssertionError(size)

    cases = [(three, fixed(three, 6), 4), (three, fixed(three, 4), 6), (turns, fixed(turns, 3), 8),
             (turns, fixed(turns, 4), 6), (turns, fixed(turns, 2), 12), (turns, generic, 24)]  # fmt: skip
    functions = torch.stack(
        [
            torch.einsum("i,gij,j->g", *((generic, rho, b) if side == "left" else (b, rho, generic)))
            for rho, b, _ in cases
        ],
        1,
    )
    wanted = torch.tensor([size for *_, size in cases])
    assert torch.equal(learned_group.orbits(GROUP, functions, 0.999), wanted)
    distinct = torch.tensor([len(set(column.mul(1e6).round().tolist())) for column in functions.T])
    assert (distinct <= wanted).all()
    torch.testing.assert_close(learned_group.one_rank(GROUP, functions), torch.ones(6).double())


def test_the_share_of_one_pair_of_vectors_is_that_of_the_largest_singular_value() -> None:
    A = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double()).Q
    M = A @ torch.diag(torch.tensor([2.0, 1.0, 0.0]).double()) @ A
    both = torch.stack([torch.einsum("ij,gij->g", M, GROUP.irreps[i]) for i in (2, 3)], 1)
    torch.testing.assert_close(learned_group.one_rank(GROUP, both), torch.tensor([0.8, 0.8]).double())
    drawn = learned_group.of_one_rank(GROUP, both, torch.Generator().manual_seed(1))
    torch.testing.assert_close(learned_group.one_rank(GROUP, drawn), torch.ones(2).double())
    torch.testing.assert_close(drawn.norm(dim=0), both.norm(dim=0))
    torch.testing.assert_close(irreps.lengths_inside(GROUP, drawn).argmax(0), torch.tensor([2, 3]))


def test_random_functions_of_an_irrep_are_as_long_and_in_no_other() -> None:
    functions = torch.stack([rho[:, 0, -1] for rho in GROUP.irreps], 1) + 0.1
    drawn = irreps.redraw(GROUP, functions, torch.Generator().manual_seed(0))
    wanted = torch.diag(irreps.lengths_inside(GROUP, functions).diagonal())
    torch.testing.assert_close(irreps.lengths_inside(GROUP, drawn), wanted, atol=1e-9, rtol=0)


def test_averages_go_by_squared_length_without_the_mean() -> None:
    sign, other = GROUP.irreps[0][:, 0, 0], GROUP.irreps[2][:, 0, 0]
    functions = torch.stack([2 * sign + 50, other / other.norm() * 24**0.5], 1)  # squared lengths 96 and 24
    row = learned_group.looked_at(GROUP, functions)
    assert row["2"] == pytest.approx(0.8) and row["rank"] == pytest.approx(1)
    orbit, count = int(learned_group.orbits(GROUP, functions)[1]), int(learned_group.values(functions)[1])
    assert row["values"] == pytest.approx(0.8 * 2 + 0.2 * count)
    assert sum(row[str(k)] for k in (2, 3, 4, 6, 8, 12)) == pytest.approx(0.8 + 0.2 * (orbit < 24))


def test_bounds_of_parts_hold_and_are_told_where_they_are_void() -> None:
    """What is written by hand is proved right whole and by faithful irreps, in part with noise, and not turned over."""
    draw = torch.Generator().manual_seed(0)
    exact = {path: w.detach() for path, w in NETWORK.weights.items()}
    noisy = {path: w + 0.2 * w.std() * torch.randn(w.shape, generator=draw) for path, w in exact.items()}
    shares = {}
    for name, weights in (("exact", exact), ("noisy", noisy), ("over", {HIDDEN: exact[HIDDEN], OUT: -exact[OUT]})):
        made = cuts(TASK, weights)
        rows = [row for cut in ("lump", "neurons by irrep") for row in learned_group.certified(TASK, made[cut][0])]
        shares[name] = [row["share"] for row in rows]
        for row in rows:
            assert (row["bound"] is None) == (row["margin"] <= 0)
            assert row["bound"] is None or row["bound"] >= round(576 * (1 - row["right"]))
            proved = 0 if row["bound"] is None else max(0, 1 - int(row["bound"]) / 576)
            assert row["share"] == pytest.approx(proved)
    assert shares["exact"] == [1, 0, 0, 1, 1] and not any(shares["over"])
    assert 0 < shares["noisy"][0] < 1
