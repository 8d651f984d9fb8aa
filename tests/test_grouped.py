"""Only the active pairs, against the dense sum over all of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import case, every_case

from apd_minimal.kernels import grouped

FULL = 1000  # a rank at which lists of up to half of all samples are grouped


@given(
    st.integers(1, 3), st.integers(1, 12), st.integers(1, 6), st.integers(1, 3), st.floats(0, 0.6), st.integers(0, 99)
)
def test_the_active_pairs_are_the_masked_sum(R: int, N: int, C: int, T: int, share: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(R, N, C, generator=g) < share
    rows = torch.randn(R, N, T, 5, generator=g)
    first, second = torch.randn(R, C, 5, 2, generator=g), torch.randn(R, C, 2, 4, generator=g)
    groups = grouped.group(mask, FULL)
    if groups is None:
        assert 2 * max(1, int(mask.sum(1).max())) > N
        return
    expected = torch.einsum("rnc,rntd,rcdm,rcme->rnte", mask.float(), rows, first, second)
    torch.testing.assert_close(grouped.apply(groups, rows, first, second), expected)
    for r in range(R):
        for c in range(C):
            mine = groups.samples[r, c][groups.on[r, c]] - r * N
            assert mine.tolist() == mask[r, :, c].nonzero().flatten().tolist()


@every_case
@pytest.mark.parametrize("restarts", [None, 2])
def test_a_network_gives_the_same_for_boolean_gates(
    monkeypatch: pytest.MonkeyPatch, name: str, restarts: int | None
) -> None:
    """Outputs and gradients, per sample and per position."""
    monkeypatch.setattr(grouped, "MOVING", 0)
    one = case(name)
    x = one.x(batch=6)
    dtype = next(one.target.parameters()).dtype
    components = one.components(4, restarts)
    for p in components.parameters():
        p.requires_grad_()
    lead = () if restarts is None else (restarts,)
    for c in range(4):
        gates = torch.zeros(*lead, 6, 4, dtype=dtype)
        gates[..., c, c] = gates[..., 5, 3 - c] = 1
        assert grouped.group(gates.bool().reshape(-1, 6, 4), FULL) is not None, "else nothing is tested"
        results = []
        for g in (gates, gates.bool()):
            out = one.network(x, components, g)
            loss = (out * torch.linspace(0.5, 1.5, out.numel()).view(out.shape)).sum()
            grads = torch.autograd.grad(loss, components.parameters(), allow_unused=True)
            results.append((out.detach(), [None if t is None else t for t in grads]))
        torch.testing.assert_close(results[1][0], results[0][0])
        for sparse, dense in zip(results[1][1], results[0][1], strict=True):
            torch.testing.assert_close(
                torch.zeros(()).to(dtype) if sparse is None else sparse,
                torch.zeros(()).to(dtype) if dense is None else dense,
            )


def test_dense_masks_are_not_grouped() -> None:
    mask = torch.zeros(1, 10, 3, dtype=torch.bool)
    mask[0, :6, 1] = True
    assert grouped.group(mask, FULL) is None
    mask[0, 5, 1] = False
    assert grouped.group(mask, FULL) is not None


@pytest.mark.parametrize(("rank", "share"), [(1, 23), (2, 12), (22, 2), (1000, 2)])
def test_of_low_rank_only_short_lists_are_grouped(rank: int, share: int) -> None:
    """Where the longest list is one in `share` samples, or less."""
    mask = torch.zeros(2, 60, 3, dtype=torch.bool)
    mask[1, : 60 // share, 2] = True
    assert grouped.group(mask, rank) is not None
    mask[1, 60 // share, 2] = True
    assert grouped.group(mask, rank) is None
