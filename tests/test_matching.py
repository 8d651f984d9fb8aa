"""Two decompositions matched one to one, by weights and by use, and how well chance would do."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

import apd_minimal as apd

SHAPES = {"a": (5, 4), "b": (4, 6)}


def some(n: int, seed: int, rank: int | None = 2) -> apd.Components:
    return apd.Components.random(SHAPES, n, rank=rank, generator=torch.Generator().manual_seed(seed), std=1.0)


def best_by_brute_force(table: Tensor) -> tuple[float, list[tuple[int, int]]]:
    """The largest sum over all ways to give each of the fewer rows (or columns) a partner."""
    if table.shape[0] > table.shape[1]:
        value, pairs = best_by_brute_force(table.T)
        return value, sorted((i, j) for j, i in pairs)
    ways = itertools.permutations(range(table.shape[1]), table.shape[0])
    return max((float(sum(table[i, j] for i, j in enumerate(way))), list(enumerate(way))) for way in ways)


@pytest.mark.parametrize(("n", "other"), [(4, 4), (3, 5), (5, 3)])
def test_the_match_is_the_best_of_all(n: int, other: int) -> None:
    first, second = some(n, 0), some(other, 1, rank=3)
    a, b = first.flat(), second.flat()
    table = (a / a.norm(dim=1, keepdim=True)) @ (b / b.norm(dim=1, keepdim=True)).T  # every component formed
    torch.testing.assert_close(apd.metrics.cosines(first, second), table)
    value, pairs = best_by_brute_force(table)
    match = apd.metrics.match_weights(first, second, n_draws=2)
    assert list(zip(match.first.tolist(), match.second.tolist(), strict=True)) == pairs
    torch.testing.assert_close(match.similarity.sum().item(), value, rtol=1e-5, atol=1e-6)
    assert match.unmatched == abs(n - other)


@pytest.mark.parametrize("by", ["correlation", "overlap"])
def test_the_match_by_use_is_the_best_of_all(by: str) -> None:
    generator = torch.Generator().manual_seed(2)
    first, second = (torch.rand(50, n, generator=generator) for n in (3, 5))
    if by == "overlap":
        first, second = first > 0.5, second > 0.5
        both = (first[:, :, None] & second[:, None]).sum(0)
        table = both / (first[:, :, None] | second[:, None]).sum(0)
    else:
        table = torch.corrcoef(torch.cat([first, second], dim=1).T)[:3, 3:]
    value, pairs = best_by_brute_force(table)
    match = apd.metrics.match_use(first, second, by=by, n_draws=2)
    assert list(zip(match.first.tolist(), match.second.tolist(), strict=True)) == pairs
    assert abs(match.similarity.sum().item() - value) < 1e-5


def test_what_never_changes_is_not_in_use() -> None:
    with pytest.raises(ValueError, match="no component is in use: 0 in the first, 0 in the second"):
        apd.metrics.match_use(torch.ones(20, 2), torch.full((20, 1), 3.0), n_draws=2)


def test_the_same_components_in_another_order_match_wholly() -> None:
    first = some(6, 0)
    order = [3, 0, 5, 1, 4, 2]
    # Other factors of the same matrices, and two components that are empty.
    scaled = first.subset(order)
    second = apd.Components({p: 2 * t for p, t in scaled.A.items()}, {p: t / 2 for p, t in scaled.B.items()})
    empty = apd.Components.random(SHAPES, 2, rank=2, std=1e-6)
    second = apd.Components(
        *({p: torch.cat([f[p], e[p]]) for p in f} for f, e in ((second.A, empty.A), (second.B, empty.B)))
    )
    match = apd.metrics.match_weights(first, second)
    assert [order[j] for j in match.second.tolist()] == match.first.tolist() == list(range(6))
    torch.testing.assert_close(match.similarity, torch.ones(6))
    assert match.above_chance.all() and match.unmatched == 0
    assert "mean 1.000" in str(match) and "6 of 6 pairs above chance, 0 unmatched" in str(match)
    scores = torch.rand(200, 6, generator=torch.Generator().manual_seed(0))
    idle = torch.cat([scores[:, order], torch.zeros(200, 1), torch.ones(200, 1)], dim=1)  # no use, no difference
    match = apd.metrics.match_use(scores, idle)
    assert [order[j] for j in match.second.tolist()] == match.first.tolist()
    assert abs(match.mean - 1) < 1e-6 and match.above_chance.all()
    match = apd.metrics.match_use(scores > 0.7, idle[:, :7] > 0.7, by="overlap")
    assert [order[j] for j in match.second.tolist()] == match.first.tolist() and match.mean == 1


def test_what_chance_does_as_well_is_not_above_it() -> None:
    always = torch.ones(9, 2)
    match = apd.metrics.match_use(always, always, by="overlap", n_draws=3)
    assert match.mean == 1 and not match.above_chance.any()


def test_opposite_components_do_not_match() -> None:
    first = some(1, 0)
    second = apd.Components({p: -t for p, t in first.A.items()}, first.B)
    assert abs(apd.metrics.match_weights(first, second, n_draws=1).mean + 1) < 1e-6


def test_unrelated_decompositions_match_as_chance_says() -> None:
    found, chance, use, by_chance = [], [], [], []
    for seed in range(20):
        match = apd.metrics.match_weights(some(5, seed), some(5, seed + 100), n_draws=10, seed=seed)
        found.append(match.mean)
        chance += match.chance.mean(1).tolist()
        generator = torch.Generator().manual_seed(seed)
        a, b = (torch.rand(100, 5, generator=generator) for _ in range(2))
        match = apd.metrics.match_use(a, b, n_draws=10, seed=seed)
        use.append(match.mean)
        by_chance += match.chance.mean(1).tolist()
    # The means of 20 matches and of 200 by chance differ by less than three standard errors.
    for own, null in ((found, chance), (use, by_chance)):
        mine, null_ = torch.tensor(own), torch.tensor(null)
        error = (mine.var() / len(mine) + null_.var() / len(null_)).sqrt()
        assert (mine.mean() - null_.mean()).abs() < 3 * error
        assert null_.mean() > 0.05  # not zero: five pairs are the best of 120 ways


def test_chance_keeps_ranks_lengths_and_amounts_of_use() -> None:
    first, second = some(4, 0), some(4, 1, rank=1)
    again = apd.metrics.match_weights(first, second, seed=3).chance
    torch.testing.assert_close(again, apd.metrics.match_weights(first, second, seed=3).chance, rtol=0, atol=0)
    assert not torch.equal(again, apd.metrics.match_weights(first, second, seed=4).chance)
    # Components all of whose inputs are alike, and all outputs too, are the same however these are permuted.
    flat = apd.Components(
        {p: torch.ones_like(t[..., :1]) for p, t in second.A.items()},
        {p: torch.ones(4, 1, t.shape[-1]) for p, t in second.B.items()},
    )
    match = apd.metrics.match_weights(flat, flat)
    torch.testing.assert_close(match.chance, torch.ones_like(match.chance))
    masks = torch.ones(30, 3, dtype=torch.bool)
    assert apd.metrics.match_use(masks, masks, by="overlap").chance.eq(1).all()


def test_what_does_not_fit_is_refused() -> None:
    first = some(3, 0)
    with pytest.raises(ValueError, match="pick one restart"):
        apd.metrics.match_weights(first, first.stacked())
    with pytest.raises(ValueError, match=r"same weights, got .*'a': .5, 4.*'c'"):
        apd.metrics.match_weights(first, apd.Components({"c": torch.ones(2, 5, 1)}, {"c": torch.ones(2, 1, 4)}))
    with pytest.raises(ValueError, match="n_draws must be at least 1, got 0"):
        apd.metrics.match_weights(first, first, n_draws=0)
    with pytest.raises(ValueError, match="no component is in use: 3 in the first, 0 in the second"):
        apd.metrics.match_weights(first, first.map(torch.zeros_like))
    with pytest.raises(ValueError, match=r"second must be of shape .4, C'., got a tensor .5, 2."):
        apd.metrics.match_use(torch.rand(4, 2), torch.rand(5, 2))
    with pytest.raises(ValueError, match=r"by must be one of .'correlation', 'overlap'., got 'cosine'"):
        apd.metrics.match_use(torch.rand(4, 2), torch.rand(4, 2), by="cosine")
    with pytest.raises(ValueError, match="NaN or infinite"):
        apd.metrics.match_use(torch.rand(4, 2), torch.full((4, 2), torch.nan))


def test_all_restarts_are_stored_when_asked_for(tmp_path: Path) -> None:
    target = apd.targets.TMS(3, 2)
    result = apd.decompose(
        target, target.data(8), target.weights, 4, 1.0, rank=1, steps=2, restarts=3, tidy_every=0.0, progress=False
    )
    result.save(tmp_path / "one")
    alone = apd.Decomposition.load(tmp_path / "one", target)
    assert alone.restarts is None
    with pytest.raises(ValueError, match="has no restarts"):
        alone.save(tmp_path / "one", restarts=True)
    result.save(tmp_path / "all", restarts=True)
    loaded = apd.Decomposition.load(tmp_path / "all", target)
    assert loaded.restarts is not None and result.restarts is not None
    for mine, stored in zip(result.restarts.parameters(), loaded.restarts.parameters(), strict=True):
        assert torch.equal(mine, stored)
    for mine, stored in zip(result.components.parameters(), loaded.components.parameters(), strict=True):
        assert torch.equal(mine, stored)
    # Seeds are compared with themselves: the chosen restart matches the decomposition wholly.
    match = apd.metrics.match_weights(loaded.components, loaded.restarts.restart(loaded.chosen))
    torch.testing.assert_close(match.similarity, torch.ones(len(match.similarity)))
    result.save(tmp_path / "all")  # and are gone when it is replaced
    assert apd.Decomposition.load(tmp_path / "all", target).restarts is None


def test_cosines_are_between_minus_one_and_one_in_spite_of_rounding() -> None:
    first = some(200, 0)
    for sign in (1.0, -1.0):
        second = apd.Components(first.A, {path: 0.3 * sign * B for path, B in first.B.items()})
        raw = (first.flat() * second.flat()).sum(1) / first.norms() / second.norms()
        assert (raw * sign).max() > 1, "without a limit, some would be beyond"
        found = apd.metrics.cosines(first, second)
        assert (found.abs() <= 1).all()
        torch.testing.assert_close(found.diag(), torch.full((200,), sign))


def test_gates_at_positions_are_to_be_flattened() -> None:
    positions = torch.rand(4, 3, 5, generator=torch.Generator().manual_seed(0))
    for first, second in ((positions, positions.flatten(0, 1)), (positions.flatten(0, 1), positions)):
        with pytest.raises(ValueError, match=r"give (first|second).flatten\(0, 1\)"):
            apd.metrics.match_use(first, second)
    assert apd.metrics.match_use(positions.flatten(0, 1), positions.flatten(0, 1)).mean == pytest.approx(1)
