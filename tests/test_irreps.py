"""Irreps and cosets in trained networks of groups: known subgroups, functions whose shares follow from theory."""

from __future__ import annotations

import pytest
import torch

import apd_minimal as apd
from apd_minimal.targets import Group, GroupOperations
from experiments import irreps
from experiments.irreps import HIDDEN, OUT, apart, constant_on, energies, shares, spaces, subgroups

# so many subgroups of each order
ORDERS_IN_S5 = [
    order
    for order, n in ((2, 25), (3, 10), (4, 35), (5, 6), (6, 30), (8, 15), (10, 6), (12, 15), (20, 6), (24, 5), (60, 1))
    for _ in range(n)
]


@pytest.mark.parametrize(
    ("name", "orders"),
    [
        ("Z6", [2, 3]),
        ("S3", [2, 2, 2, 3]),
        ("D5", [2, 2, 2, 2, 2, 5]),
        ("A4", [2, 2, 2, 3, 3, 3, 3, 4]),
        ("S4", [2] * 9 + [3] * 4 + [4] * 7 + [6] * 4 + [8] * 3 + [12]),
        ("S5", ORDERS_IN_S5),
    ],
)
def test_subgroups_are_all_there_and_closed(name: str, orders: list[int]) -> None:
    group = Group(name)
    found = subgroups(group)
    assert sorted(map(len, found)) == orders
    assert all({int(group.table[g, h]) for g in own for h in own} == set(own) for own in found)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("name", ["Z6", "S3", "D5", "S4"])
def test_what_is_constant_on_cosets(name: str, left: bool) -> None:
    group = Group(name)
    for own in subgroups(group):
        Q = constant_on(group, own, left)
        assert Q.shape == (group.order, group.order // len(own) - 1)
        torch.testing.assert_close(Q.T @ Q, torch.eye(Q.shape[1], dtype=torch.double))
        torch.testing.assert_close(Q.sum(0), torch.zeros(Q.shape[1], dtype=torch.double), atol=1e-9, rtol=0)
        for h in own:
            moved = group.table[:, h] if left else group.table[h]
            torch.testing.assert_close(Q[moved], Q, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["Z6", "S3", "D5", "S4"])
def test_shares_of_entries_of_deltas_and_of_cosets(name: str) -> None:
    group = Group(name)
    within = spaces(group)
    total = torch.cat(within["irrep"], 1)
    torch.testing.assert_close(total.T @ total, torch.eye(group.order - 1, dtype=torch.double), atol=1e-9, rtol=0)
    for rho in group.irreps:  # entries of a representation, and a constant that does not count
        torch.testing.assert_close(shares(rho.flatten(1) + 3, within["irrep"]), torch.ones(rho[0].numel()).double())
    sizes = torch.tensor([Q.shape[1] for Q in within["irrep"]])
    delta = torch.eye(group.order)  # lies in every irrep by its share of dimensions
    wanted = torch.full((group.order,), float(sizes.max()) / (group.order - 1), dtype=torch.double)
    torch.testing.assert_close(shares(delta, within["irrep"]), wanted)
    coset = torch.zeros(group.order, 1)
    coset[subgroups(group)[-1]] = 1
    assert shares(coset, within["coset"]).item() == pytest.approx(1)


def test_energies_of_parts_written_by_hand() -> None:
    target = GroupOperations(["Z6", "S3", "D5"], embedding=False, seed=1)
    groups_of = [t for t, group in enumerate(target.groups) for _ in group.irreps]
    matrices = target.mechanisms("group")
    matrices[HIDDEN][:, target.n_tokens :] *= 2  # so that both elements differ
    whole = apd.Components.from_matrices(matrices, 20)
    energy = energies(target, whole)
    assert energy.shape == (3, irreps.IRREPS) and apart(energy, groups_of)["groups"] == pytest.approx(1)
    parts = {path: whole.matrices(path) for path in (HIDDEN, OUT)}
    centred = 0.0
    for t, tokens in enumerate(target.tokens):
        for f in (parts[HIDDEN][t, tokens], parts[HIDDEN][t, target.n_tokens :][tokens], parts[OUT][t, :, tokens].T):
            centred += float((f - f.mean(0)).square().sum())
    assert float(energy.sum()) == pytest.approx(centred, rel=1e-5)
    single = apd.Components.from_matrices(target.mechanisms("irrep"), 20)
    assert apart(energies(target, single), groups_of)["irreps"] == pytest.approx(1)
    assert apart(energy, groups_of)["irreps"] < 0.9


def test_looking_at_a_network_written_by_irreps() -> None:
    target = GroupOperations(["D5"], embedding=False, seed=0)
    found = irreps.looked_at(target, {path: target.get_parameter(path).detach().T for path in (HIDDEN, OUT)})
    assert found["irrep"] == 1 > found["coset"]
    by_chance = irreps.chance(target)
    assert 4 / 9 < by_chance["irrep"] < 0.75 and 4 / 9 < by_chance["coset"] < 0.85


def test_random_functions_of_an_irrep_that_is_constant_on_cosets() -> None:
    """The sign is constant on the cosets of the even elements, whatever is drawn; the plane of a triangle is not."""
    for place, low, high in ((0, 1 - 1e-9, 1 + 1e-9), (1, 0.5, 0.95)):
        target = GroupOperations(["S3"], [(place,)], embedding=False, seed=2)
        weights = {path: target.get_parameter(path).detach().T for path in (HIDDEN, OUT)}
        assert low < irreps.redrawn_share(target, weights, 0) < high


def test_held_out_pairs_are_never_shown() -> None:
    task = GroupOperations(["S4"], embedding=False, seed=3)
    answers = task.answers()
    shown, held = irreps.split(len(answers), 3)
    assert (len(shown), len(held)) == (403, 173)
    assert torch.equal(torch.cat([shown, held]).sort().values, torch.arange(576))
    weights = []
    for other in (None, held, shown):
        told = answers.clone()
        if other is not None:
            told[other] = (told[other] + 1) % 24
        *_, (_, net) = irreps.learned(task, told, 3, 5)
        weights.append(net.out.weight.detach().clone())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_network_of_s4_answers_pairs_that_it_was_not_shown() -> None:
    task = GroupOperations(["S4"], embedding=False, seed=90)
    *_, (_, net) = irreps.learned(task, task.answers(), 90, 400)
    held = irreps.split(576, 90)[1]
    right = (net(task.inputs()[held]).argmax(1) == task.answers()[held]).double().mean()
    assert right > 0.5
