"""Counts, order, ties and ranges of the two kinds of top-k."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from apd_minimal.selection import TopK, batch_top_k, sample_top_k


def scores(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def holds(mask: Tensor, values: Tensor, n: int) -> None:
    """n ones, and none of the dropped is larger than any of the kept."""
    assert mask.shape == values.shape
    assert mask.dtype == values.dtype
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert int(mask.sum()) == n
    if 0 < n < mask.numel():
        assert values[mask == 1].min() >= values[mask == 0].max()


@given(st.integers(1, 20), st.integers(1, 6), st.floats(0.01, 1.0))
def test_batch_top_k_keeps_exactly_that_many_of_the_largest(batch: int, C: int, share: float) -> None:
    k = share * C
    values = scores(batch, C)
    holds(batch_top_k(values, k), values, max(1, int(k * batch)))


@given(st.integers(1, 20), st.integers(1, 6), st.data())
def test_sample_top_k_keeps_exactly_that_many_of_each(batch: int, C: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, C))
    values = scores(batch, C)
    for row, kept in zip(values, sample_top_k(values, k), strict=True):
        holds(kept, row, k)


def test_by_hand() -> None:
    values = torch.tensor([[5.0, 1.0, 0.0], [4.0, 3.0, 2.0]])
    assert batch_top_k(values, 1.5).tolist() == [[1, 0, 0], [1, 1, 0]]
    assert batch_top_k(values, 0.6).tolist() == [[1, 0, 0], [0, 0, 0]]
    assert batch_top_k(values, 3).tolist() == [[1, 1, 1], [1, 1, 1]]
    assert sample_top_k(values, 1).tolist() == [[1, 0, 0], [1, 0, 0]]


def test_ties_do_not_change_the_counts() -> None:
    for values in (torch.zeros(6, 4), torch.ones(6, 4)):
        assert batch_top_k(values, 1.5).sum() == 9
        assert sample_top_k(values, 2).sum(1).tolist() == [2] * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_kept_is_what_torch_keeps_bit_for_bit(dtype: torch.dtype) -> None:
    """Without equal scores, with some, and with so many of zero that these fill up the number."""
    for zeros, k in ((0.0, 1.3), (0.5, 1.3), (0.9, 2.0)):
        values = scores(2, 40, 5).to(dtype) * (scores(2, 40, 5, seed=1) >= zeros)
        kept = values.flatten(1).topk(int(k * 40), dim=1, sorted=False).indices
        expected = torch.zeros(2, 200, dtype=dtype).scatter_(1, kept, 1.0).view(2, 40, 5)
        assert_close(batch_top_k(values, k), expected, rtol=0, atol=0)
    assert_close(batch_top_k(torch.ones(4, 3, dtype=dtype), 3), torch.ones(4, 3, dtype=dtype), rtol=0, atol=0)


def test_restarts_are_treated_alone() -> None:
    values = scores(3, 7, 4) * torch.tensor([1.0, 100.0, 0.01])[:, None, None]
    for k in (0.4, 1, 2):
        mask = batch_top_k(values, k)
        for r in range(3):
            assert torch.equal(mask[r], batch_top_k(values[r], k))
    assert torch.equal(sample_top_k(values, 2)[1], sample_top_k(values[1], 2))


@pytest.mark.parametrize("k", [0, -1, 4.01, float("nan")])
def test_k_out_of_range(k: float) -> None:
    for function in (batch_top_k, sample_top_k):
        with pytest.raises(ValueError, match="k must be above 0 and at most the number of components, 4; got"):
            function(scores(5, 4), k)


@given(st.integers(1, 3), st.integers(2, 20), st.sampled_from([(), (3,)]), st.integers(1, 6), st.floats(0.1, 1.0))
def test_the_threshold_keeps_as_many_as_the_batch_had(
    restarts: int, batch: int, positions: tuple[int, ...], C: int, share: float
) -> None:
    """Among distinct scores, of each restart, and half-way to the next; one is kept at least; all are where k is C."""
    values = scores(restarts, batch, *positions, C)
    top, k = TopK(share * C), share * C
    threshold = top.threshold(values)
    assert threshold is not None
    n = max(1, int(k * batch * math.prod(positions) + 1e-6))
    for r in range(restarts):
        ordered = values[r].flatten().sort(descending=True).values
        if n < len(ordered):
            torch.testing.assert_close(threshold[r], (ordered[n - 1] + ordered[n]) / 2)
        assert int(top.active(values, threshold)[r].sum()) == n


def test_with_k_of_all_components_other_samples_have_all_of_them_active_too() -> None:
    top = TopK(4)
    threshold = top.threshold(scores(2, 6, 4) + 5.0)
    assert top.active(torch.tensor([[[-7.0, 0.0, 1e-9, 3.0]]]).expand(2, 1, 4), threshold).all()


def test_k_is_compared_with_the_components_and_not_with_the_samples() -> None:
    with pytest.raises(ValueError, match="at most the number of components, 3; got 4"):
        batch_top_k(scores(2, 8, 3), 4)


def test_k_per_sample_is_whole() -> None:
    with pytest.raises(ValueError, match=r"whole number, got 1\.5"):
        sample_top_k(scores(5, 4), 1.5)


def test_scores_whose_sum_overflows_are_finite_all_the_same() -> None:
    scores = torch.full((4, 3), 3e38)
    assert scores.sum().isinf()
    assert batch_top_k(scores, 1.5).sum() == 6
    opposite = torch.tensor([[float("inf"), 1.0], [1.0, float("-inf")]])
    for bad in (opposite, scores * float("nan")):
        with pytest.raises(ValueError, match="NaN or infinite"):
            batch_top_k(bad, 1.0)
