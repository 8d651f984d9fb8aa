"""Merging and pruning: what becomes of each component, and of their sum."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.tidy.merge import cosines, merge_and_prune, merge_by_bits, pieces

SHAPES = {"a": (4, 3), "b": (3, 5)}


def stacked(*each: dict[str, Tensor], rank: int | None = None) -> apd.Components:
    """Components with these matrices, one restart."""
    return apd.Components.from_matrices({path: torch.stack([P[path] for P in each]) for path in SHAPES}, rank).stacked()


def drawn(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {path: scale * torch.randn(*s, generator=generator, dtype=torch.float64) for path, s in SHAPES.items()}


def rank_one(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def vector(n: int) -> Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64)

    return {path: torch.outer(vector(d_in), vector(d_out)) for path, (d_in, d_out) in SHAPES.items()}


def times(factor: float, P: dict[str, Tensor]) -> dict[str, Tensor]:
    return {path: factor * matrix for path, matrix in P.items()}


def vector(P: dict[str, Tensor]) -> Tensor:
    return torch.cat([P[path].flatten() for path in SHAPES])


def test_parallel_components_become_their_sum() -> None:
    P, Q = rank_one(0), rank_one(1)
    components = stacked(P, Q, times(2.0, P), times(0.5, P))
    changed = merge_and_prune(components, torch.ones(1, 8, 4))
    flat = components.flat()[0]
    torch.testing.assert_close(flat[2], 3.5 * vector(P))
    torch.testing.assert_close(flat[1], vector(Q))
    assert flat[[0, 3]].abs().max() == 0
    assert changed.tolist() == [[True, False, True, True]]


@pytest.mark.parametrize("factor", [1.0, -1.0])
def test_the_cosine_is_over_all_weights_and_has_a_sign(factor: float) -> None:
    P = drawn(0)
    other = {"a": P["a"], "b": factor * P["b"]}  # the same in one weight, the same or opposite in the other
    components = stacked(P, other)
    before = components.flat().clone()
    changed = merge_and_prune(components, torch.ones(1, 8, 2))
    assert changed.all() == (factor > 0)
    if factor < 0:
        assert torch.equal(components.flat(), before)
    opposite = stacked(P, times(-2.0, P))
    assert not merge_and_prune(opposite, torch.ones(1, 8, 2)).any()


@pytest.mark.parametrize(("angle", "merges"), [(0.63, True), (0.66, False)])
def test_the_least_cosine_decides(angle: float, merges: bool) -> None:
    """cos 0.6435 = 0.8."""
    P, Q = drawn(0), drawn(1)
    e = vector(P) / vector(P).norm()
    f = vector(Q) - (vector(Q) @ e) * e
    turned = torch.cos(torch.tensor(angle)) * e + torch.sin(torch.tensor(angle)) * f / f.norm()
    a, b = turned.split([12, 15])
    components = stacked(P, {"a": a.view(4, 3), "b": b.view(3, 5)})
    assert bool(merge_and_prune(components, torch.ones(1, 8, 2), min_cosine=0.8).any()) == merges


def test_a_cosine_of_exactly_the_least_one_is_enough() -> None:
    """Of single entries, so that it is 1 without rounding."""
    corner = {
        path: torch.zeros(shape).index_put_((torch.tensor(0), torch.tensor(0)), torch.tensor(2.0))
        for path, shape in SHAPES.items()
    }
    components = stacked({"a": corner["a"], "b": 0 * corner["b"]}, {"a": 2 * corner["a"], "b": 0 * corner["b"]})
    assert merge_and_prune(components, torch.ones(1, 8, 2), min_cosine=1.0).all()


@pytest.mark.parametrize("length", [0.5, 1.5])
def test_what_is_used_less_than_a_tenth_of_the_mean_becomes_zero_and_joins_nothing(length: float) -> None:
    P, Q = drawn(0), drawn(1)
    components = stacked(P, Q, times(length, P), drawn(2))
    mask = torch.zeros(1, 100, 4)
    mask[:, :, :2] = 1
    mask[:, :5, 2] = 1  # the mean is (100 + 100 + 5 + 6) / 4 = 52.75
    mask[:, :6, 3] = 1
    changed = merge_and_prune(components, mask)
    flat = components.flat()[0]
    assert changed.tolist() == [[False, False, True, False]]
    assert flat[2].abs().max() == 0
    torch.testing.assert_close(flat[:2], torch.stack([vector(P), vector(Q)]))
    torch.testing.assert_close(flat[3], vector(drawn(2)))


@pytest.mark.parametrize(("share", "used"), [(0.5, (3, 1, 2)), (1.0, (2, 2, 2)), (0.0, (3, 0, 3))])
def test_what_is_used_exactly_as_rarely_as_allowed_is_not_dead(share: float, used: tuple[int, ...]) -> None:
    """By either rule: dead is what is used less often, so that with a share of 0 nothing is."""
    at = torch.arange(12)
    mask = torch.stack([(at >= 4 * c) & (at < 4 * c + n) for c, n in enumerate(used)], 1)
    # At a high price no two are merged: none of them point the same way, or are ever active together.
    for merge in (merge_and_prune, partial(merge_by_bits, alpha=1e3)):
        components = stacked(rank_one(0), rank_one(1), rank_one(2))
        before = components.flat().clone()
        changed = merge(components, mask[None].double(), dead_share=share)
        assert not changed.any()
        assert torch.equal(components.flat(), before)


def test_a_use_counts_at_any_position() -> None:
    components = stacked(drawn(0), drawn(1))
    mask = torch.zeros(1, 4, 3, 2)
    mask[..., 0] = 1
    mask[:, :, 1, 1] = 1
    assert not merge_and_prune(components, mask).any()
    mask[..., 1] = 0
    assert merge_and_prune(components, mask).tolist() == [[False, True]]


def test_the_sum_of_the_used_stays_and_restarts_are_apart() -> None:
    """At full rank; the pairs that point the same way differ from one restart to the other."""
    P, Q, R = drawn(0), drawn(1), drawn(2)
    near = {path: 0.7 * P[path] + 0.1 * drawn(3)[path] for path in SHAPES}
    first, second = stacked(P, near, Q, R), stacked(Q, R, P, times(0.1, P))
    components = apd.Components(
        {path: torch.cat([first.A[path], second.A[path]]) for path in SHAPES},
        {path: torch.cat([first.B[path], second.B[path]]) for path in SHAPES},
    )
    mask = torch.ones(2, 20, 4)
    mask[0, :, 3] = 0
    before = components.flat().clone()
    changed = merge_and_prune(components, mask)
    after = components.flat()
    assert changed.tolist() == [[True, True, False, True], [False, False, True, True]]
    torch.testing.assert_close(after[0].sum(0), before[0, :3].sum(0))
    torch.testing.assert_close(after[1].sum(0), before[1].sum(0))
    assert torch.equal(after[1, :2], before[1, :2])


def test_the_merged_component_is_the_best_of_its_rank() -> None:
    u, v, w = (torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (4, 3, 5))
    first = {"a": torch.outer(u, v), "b": torch.outer(v, w)}
    second = {"a": torch.outer(u + 0.3 * u.roll(1), v - 0.2 * v.roll(1)), "b": torch.outer(v, w + 0.2 * w.roll(2))}
    components = stacked(first, second, rank=1)
    before = {path: components.sum(path)[0] for path in SHAPES}
    changed = merge_and_prune(components, torch.ones(1, 8, 2))
    assert changed.all()
    assert torch.linalg.svdvals(before["a"])[1] > 1e-3, "there is something to cut"
    for path, total in before.items():
        kept = components.matrices(path)[0].sum(0)
        s = torch.linalg.svdvals(total)
        assert components.A[path].shape[-1] == 1
        # Nothing of rank one comes closer than the other singular values (Eckart, Young).
        torch.testing.assert_close((total - kept).norm(), s[1:].norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_merges_as_single_does(dtype: torch.dtype) -> None:
    parts = apd.Components.random({"w": (5, 4)}, 3, 2, 1, 1.0, torch.Generator().manual_seed(0))
    for factor in parts.parameters():
        factor[:, 2] = factor[:, 0]
    low, mask = parts.map(lambda t: t.to(dtype)), torch.ones(1, 10, 3)
    single = low.map(Tensor.float)
    assert torch.equal(merge_and_prune(low, mask), merge_and_prune(single, mask))
    assert low.A["w"].dtype == dtype
    torch.testing.assert_close(low.sum("w").float(), single.sum("w"), rtol=0.05, atol=0.05)
    assert torch.equal(merge_by_bits(low, mask, 2.0), merge_by_bits(single, mask, 2.0))


@pytest.mark.parametrize("numbers", [1, 2 * 62, 10_000])
def test_lengths_and_cosines_a_few_components_at_a_time(monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    """Two weights, 62 entries; seven components, of which one is zero."""
    shapes = {"a": (4, 8), "b": (6, 5)}
    components = apd.Components.random(shapes, 7, 2, std=1.0, generator=torch.Generator().manual_seed(0))
    for factor in components.parameters():
        factor[3] = 0
    flat = components.flat()
    sizes = [len(piece) for _, piece in pieces(components, numbers)]
    assert sizes == {1: [1] * 7, 124: [2, 2, 2, 1], 10_000: [7]}[numbers]
    torch.testing.assert_close(torch.cat([piece for _, piece in pieces(components, numbers)]), flat)
    monkeypatch.setattr("apd_minimal.tidy.merge.pieces", lambda own: pieces(own, numbers))
    length, table = cosines(components)
    torch.testing.assert_close(length, flat.norm(dim=1))
    expected = torch.nn.functional.cosine_similarity(flat[:, None], flat, dim=2)
    torch.testing.assert_close(table, expected, rtol=1e-5, atol=1e-6)


def test_what_is_compared_is_never_held_all_at_once() -> None:
    """At rank one, factors are far smaller than the matrices: these are formed a million numbers at a time."""
    components = apd.Components.random({"w": (512, 512)}, 9, rank=1)
    held = [part.numel() for _, part in pieces(components)]
    assert sum(held) == 9 * 512 * 512
    assert max(held) == 2**20
