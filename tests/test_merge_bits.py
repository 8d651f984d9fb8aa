"""Merging by description length: against brute force, and the cases that can be worked out by hand."""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from itertools import combinations

import pytest
import runs
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import apd_minimal as apd
from apd_minimal.tidy.merge import merge_by_bits, shortened
from experiments.experiment import completed

SHAPES = {"a": (4, 3), "b": (3, 5)}
Weights = dict[str, Tensor]


def outer(i: int, j: int, length: float = 1.0) -> Weights:
    """A component of rank one in the first weight, nothing in the second."""
    return {"a": length * torch.eye(4)[i][:, None] * torch.eye(3)[j], "b": torch.zeros(3, 5)}


def stacked(*each: Weights, rank: int | None = None) -> apd.Components:
    return apd.Components.from_matrices({path: torch.stack([P[path] for P in each]) for path in SHAPES}, rank).stacked()


def mask_of(*each: str) -> Tensor:
    """[1, B, C] from one string of zeros and ones for each component."""
    return torch.tensor([[float(digit) for digit in digits] for digits in each]).T[None]


def alive(components: apd.Components) -> list[bool]:
    return (components.stacked().restart(0).norms() > 0).tolist()


def bits(matrices: list[Weights], masks: list[Tensor], alpha: float, floors: dict[str, float]) -> float:
    """The objective, from matrices and masks of the components that are there."""
    total = 0.0
    for P, mask in zip(matrices, masks, strict=True):
        rank = sum(int((torch.linalg.svdvals(P[path]) > floors[path]).sum()) for path in SHAPES)
        total += float(mask.sum()) * (alpha * rank + math.log2(len(matrices)))
    return total


def brute_force(components: apd.Components, mask: Tensor, alpha: float) -> tuple[list[Weights], list[Tensor]]:
    """The greedy rule as it is said: try every change, count its bits, make the best one, again and again."""
    one = components.restart(0).map(Tensor.double)
    every = {path: one.matrices(path) for path in SHAPES}
    floors = {path: 0.1 * float(torch.linalg.svdvals(every[path]).max()) for path in SHAPES}
    most = {path: one.A[path].shape[-1] for path in SHAPES}
    matrices = [{path: every[path][c] for path in SHAPES} for c in range(one.n_components)]
    masks = list(mask[0].double().T)
    while len(matrices) > 1:
        now, mean = bits(matrices, masks, alpha, floors), sum(float(m.sum()) for m in masks) / len(masks)
        changes = []
        for c in range(len(matrices)):
            if float(masks[c].sum()) < 0.1 * mean:
                changes.append((matrices[:c] + matrices[c + 1 :], masks[:c] + masks[c + 1 :]))
        for i, j in combinations(range(len(matrices)), 2):
            total = {path: matrices[i][path] + matrices[j][path] for path in SHAPES}
            if any((torch.linalg.svdvals(total[path]) > floors[path]).sum() > most[path] for path in SHAPES):
                continue
            for path, P in total.items():
                U, S, Vh = torch.linalg.svd(P, full_matrices=False)
                total[path] = U[:, : most[path]] * S[: most[path]] @ Vh[: most[path]]
            new, new_masks = list(matrices), list(masks)
            new[i], new_masks[i] = total, torch.maximum(masks[i], masks[j])
            del new[j], new_masks[j]
            changes.append((new, new_masks))
        after = [bits(*change, alpha, floors) for change in changes]
        if not after or min(after) >= now * (1 - 1e-9):
            break
        first = next(i for i, value in enumerate(after) if value <= min(after) + 1e-9 * now)
        matrices, masks = changes[first]
    return matrices, masks


@st.composite
def cases(draw: st.DrawFn) -> tuple[apd.Components, Tensor, float]:
    """Few components that share rows and columns, so that ranks of sums differ, and masks that overlap."""
    n = draw(st.integers(2, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    rank = draw(st.sampled_from([None, 1, 2]))
    A, B = {}, {}
    for path, (d_in, d_out) in SHAPES.items():
        m = min(d_in, d_out) if rank is None else rank
        left, right = torch.randn(2, d_in, generator=generator), torch.randn(2, d_out, generator=generator)
        pick = torch.randint(2, (2, n, m), generator=generator)
        on = torch.randint(2, (n, m, 1), generator=generator)  # terms that are there
        A[path], B[path] = left[pick[0]].mT.contiguous(), right[pick[1]] * on
    usual = torch.rand(n, generator=generator) ** 2
    mask = (torch.rand(1, 40, n, generator=generator) < usual).float()
    mask[..., -1] = mask[..., 0] if draw(st.booleans()) else mask[..., -1]
    components = apd.Components(A, B).stacked()
    zero = components.restart(0).norms() == 0
    for factors in components.parameters():
        factors[0, zero] = torch.randn(factors[0, zero].shape, generator=generator)
    return components, mask, draw(st.sampled_from([0.3, 1.0, 2.5, 4.0]))


@given(cases())
def test_greedy_is_brute_force(case: tuple[apd.Components, Tensor, float]) -> None:
    components, mask, alpha = case
    expected, _ = brute_force(components, mask, alpha)
    few = shortened(components.restart(0), mask[0], alpha)
    assert few.n_components == len(expected)
    for path in SHAPES:
        wanted = torch.stack([P[path] for P in expected]).float()
        torch.testing.assert_close(few.matrices(path), wanted, atol=2e-4, rtol=1e-4)


def test_bits_by_hand() -> None:
    """Four of rank one; two of them always together. 4 samples."""
    components = stacked(outer(0, 0), outer(1, 1), outer(2, 2), outer(3, 0))
    mask = mask_of("1100", "1100", "0010", "0001")
    # 6 uses at rank 1 and log2 4 bits; then 2 uses at rank 2 and 2 at rank 1, at log2 3.
    before, after = 6 * (4 + 2) / 4, (2 * (8 + math.log2(3)) + 2 * (4 + math.log2(3))) / 4
    measured = apd.metrics.description_length(components.restart(0), mask[0], alpha=4.0)
    assert measured.item() == pytest.approx(before)
    few = shortened(components.restart(0), mask[0], 4.0)
    merged = mask_of("1100", "0010", "0001")[0]
    assert apd.metrics.description_length(few, merged, alpha=4.0).item() == pytest.approx(after)
    assert few.n_components == 3
    torch.testing.assert_close(few.matrices("a")[0], outer(0, 0)["a"] + outer(1, 1)["a"])


def test_what_always_fires_together_merges_into_its_sum() -> None:
    components = stacked(outer(0, 0), outer(1, 1), outer(2, 2))
    mask = mask_of("1100110", "0011001", "1100110")
    changed = merge_by_bits(components, mask, alpha=4.0)
    assert changed.tolist() == [[True, False, True]]
    assert alive(components) == [True, True, False]
    torch.testing.assert_close(components.matrices("a")[0, 0], outer(0, 0)["a"] + outer(2, 2)["a"])


def test_what_points_the_same_way_merges_though_it_never_fires_together() -> None:
    components = stacked(outer(0, 0), outer(1, 1), outer(0, 0, 0.5))
    changed = merge_by_bits(components, mask_of("110000", "001100", "000011"), alpha=4.0)
    assert changed.tolist() == [[True, False, True]]
    torch.testing.assert_close(components.matrices("a")[0, 0], outer(0, 0, 1.5)["a"])


def test_what_lies_dead_is_dropped_and_joins_nothing() -> None:
    components = stacked(outer(0, 0), outer(0, 0, 0.5), outer(1, 1))
    before = components.flat().clone()
    changed = merge_by_bits(components, mask_of("1110000", "0000000", "0001111"), alpha=4.0)
    assert changed.tolist() == [[False, True, False]]
    assert torch.equal(components.flat()[0, [0, 2]], before[0, [0, 2]])
    assert alive(components) == [True, False, True]


def test_what_never_fires_together_and_points_elsewhere_stays_apart_if_rank_costs_enough() -> None:
    """One more unit of rank for all six uses costs 6 alpha; six names shorter by log2 3/2 save 3.5 bits."""
    mask = mask_of("110000", "001100", "000011")
    components = stacked(outer(0, 0), outer(1, 1), outer(2, 2))
    before = [t.clone() for t in components.parameters()]
    assert not merge_by_bits(components, mask, alpha=1.0).any()
    assert all(torch.equal(a, b) for a, b in zip(before, components.parameters(), strict=True))
    # The first merge costs 4 alpha, and saves 3.51: with a cheaper rank it is made.
    assert merge_by_bits(components, mask, alpha=0.87).any()
    components = stacked(outer(0, 0), outer(1, 1), outer(2, 2))
    assert not merge_by_bits(components, mask, alpha=0.88).any()


def test_after_a_change_everything_is_weighed_again() -> None:
    """The second and third share a direction; only both of them together always fire with the first."""
    components = stacked(outer(0, 0), outer(1, 1), outer(1, 1))
    assert merge_by_bits(components, mask_of("1111", "1100", "0011"), alpha=4.0).all()
    assert alive(components) == [True, False, False]
    apart = stacked(outer(0, 0), outer(1, 1), outer(2, 2))
    assert not merge_by_bits(apart, mask_of("1111", "1100", "0011"), alpha=4.0).any()


@given(cases())
def test_the_sum_stays_when_nothing_is_dropped_and_bits_only_fall(
    case: tuple[apd.Components, Tensor, float],
) -> None:
    components, mask, alpha = case
    mask = mask.clone()
    mask[0, :20] = 1  # nobody is dead
    few = shortened(components.restart(0), mask[0], alpha)
    for path in SHAPES:
        scale = components.restart(0).singular_values(path).max()
        gone = torch.linalg.matrix_norm(few.sum(path) - components.restart(0).sum(path), 2)
        # At full rank nothing is cut; below, each merge may cut what is below the threshold.
        full = few.A[path].shape[-1] == min(SHAPES[path])
        assert gone <= (1e-4 if full else 0.1 * components.n_components) * scale.clamp_min(1e-3)


def test_a_pair_whose_sum_does_not_fit_the_factors_is_let_be() -> None:
    components = stacked(outer(0, 0), outer(1, 1), rank=1)
    mask = mask_of("1111", "1111")
    assert not merge_by_bits(components, mask, alpha=4.0).any()
    assert merge_by_bits(stacked(outer(0, 0), outer(1, 1), rank=2), mask, alpha=4.0).all()


def test_restarts_are_apart_and_zeros_have_no_name() -> None:
    first, second = stacked(outer(0, 0), outer(1, 1), outer(0, 0)), stacked(outer(0, 0), outer(1, 1), outer(2, 2))
    components = apd.Components(
        {path: torch.cat([first.A[path], second.A[path]]) for path in SHAPES},
        {path: torch.cat([first.B[path], second.B[path]]) for path in SHAPES},
    )
    mask = torch.cat([mask_of("110000", "001100", "000011"), mask_of("110000", "001111", "001111")])
    changed = merge_by_bits(components, mask, alpha=4.0)
    assert changed.tolist() == [[True, False, True], [False, True, True]]
    # With two that are not zero, a merge saves log2 2 on each of four uses, and pays alpha on each. Equal is no gain.
    for alpha in (0.99, 1.0, 1.01):
        left = stacked(outer(0, 0), outer(1, 1), outer(2, 2, 0.0))
        assert bool(merge_by_bits(left, mask[:1], alpha).any()) == (alpha < 1)


def test_a_use_counts_at_any_position() -> None:
    components = stacked(outer(0, 0), outer(1, 1))
    mask = torch.zeros(1, 4, 3, 2)
    mask[:, :, 0, 0] = 1
    mask[:, :, 1, 1] = 1
    assert not merge_by_bits(components, mask, alpha=4.0).any()  # on the same samples, but never at once
    mask[:, :, 0, 1] = 1
    mask[:, :, 1, 0] = 1
    assert merge_by_bits(components, mask, alpha=4.0).all()


def test_shortened_takes_less_memory_and_leaves_what_it_was_given() -> None:
    components = stacked(*[outer(0, 0)] * 4, outer(1, 1), outer(2, 2)).restart(0)
    before = [t.clone() for t in components.parameters()]
    mask = mask_of("1000000", "0100000", "0010000", "0001000", "0000110", "0000011")[0]
    few = shortened(components, mask, 4.0)
    assert all(torch.equal(a, b) for a, b in zip(before, components.parameters(), strict=True))
    assert few.n_components == 3
    size = [sum(t.untyped_storage().nbytes() for t in c.parameters()) for c in (components, few)]
    assert size[1] * 2 == size[0]
    assert shortened(components, torch.zeros(7, 6), 4.0).n_components == 6  # nothing is used: no bits to save


def test_errors_name_what_was_given() -> None:
    components = stacked(outer(0, 0), outer(1, 1))
    with pytest.raises(ValueError, match=r"alpha.*above 0, got 0"):
        merge_by_bits(components, torch.ones(1, 4, 2), alpha=0.0)
    with pytest.raises(ValueError, match=r"mask must be of shape \[1, B, ..., 2\], got a tensor \[1, 4, 3\]"):
        merge_by_bits(components, torch.ones(1, 4, 3), alpha=1.0)
    with pytest.raises(ValueError, match="pick one restart"):
        shortened(components, torch.ones(1, 4, 2), 1.0)
    with pytest.raises(ValueError, match=r"alpha must be above 0, got -1"):
        runs.decompose(alpha=-1.0)
    with pytest.raises(ValueError, match=r"per_weight excludes; got alpha=4"):
        apd.Config(3, 1, per_weight=(2, 1), reseed_until=0.0, alpha=4.0).check()


def test_a_run_merges_by_bits_where_alpha_is_given() -> None:
    """At a tiny alpha names decide: everything becomes one component. By cosine, nothing of the kind happens."""
    none = {"simplicity": 0.0, "tidy_until": 0.3, "reseed_until": 0.0, "steps": 10}
    few = runs.decompose(alpha=1e-6, **none)
    assert few.restarts is not None
    assert (few.restarts.norms() > 0).sum(1).tolist() == [1, 1]
    many = runs.decompose(**none)
    assert many.restarts is not None
    assert (many.restarts.norms() > 0).sum(1).min() > 1


def test_settings_stored_before_a_field_came_are_still_those_of_today() -> None:
    today = completed({"batch": 32, **asdict(apd.Config(3, 1.0, rank=2))})
    assert today["alpha"] is None and today["batch"] == 32 and today["rank"] == 2
    old = {name: value for name, value in today.items() if name != "alpha"}
    assert completed(old) == today
    assert completed({**old, "alpha": 4.0}) != today
    assert set(today) == {"batch"} | {f.name for f in fields(apd.Config)}
