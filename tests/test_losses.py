"""The losses by hand, against torch's own, and the surrogate's inequality."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import apd_minimal as apd
from apd_minimal import losses


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random(C: int = 3, d_in: int = 4, d_out: int = 5, m: int = 2, seed: int = 0) -> apd.Components:
    shapes = {"w": (d_in, d_out), "v": (d_out, 3)}
    A = {path: normal(C, d, m, seed=seed + i) for i, (path, (d, _)) in enumerate(shapes.items())}
    B = {path: normal(C, m, e, seed=seed + 10 + i) for i, (path, (_, e)) in enumerate(shapes.items())}
    return apd.Components(A, B)


def stack(*each: apd.Components) -> apd.Components:
    A = {path: torch.stack([c.A[path] for c in each]) for path in each[0].paths}
    return apd.Components(A, {path: torch.stack([c.B[path] for c in each]) for path in each[0].paths})


def test_faithfulness_by_hand() -> None:
    P = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 2.0]]])
    components = apd.Components.from_matrices({"w": P, "v": torch.ones(2, 1, 2)})
    weights = {"w": torch.tensor([[1.0, 1.0], [0.0, 0.0]]), "v": torch.tensor([[2.0, 5.0]])}
    # Differences 0, -1, 0, 2 in w, and 0, -3 in v: 14 over six entries.
    assert losses.faithfulness(components, weights).item() == pytest.approx(14 / 6)
    whole = {path: components.sum(path) for path in components.paths}
    assert losses.faithfulness(components, whole).item() < 1e-12


def test_faithfulness_of_restarts() -> None:
    each = [random(seed=s) for s in (0, 50)]
    weights = {path: normal(*each[0].sum(path).shape, seed=9) for path in each[0].paths}
    expected = []
    for c in each:
        flat = torch.cat([weights[path].flatten() for path in c.paths])
        expected.append((c.flat().sum(0) - flat).square().mean())
    torch.testing.assert_close(losses.faithfulness(stack(*each), weights), torch.stack(expected))


@pytest.mark.parametrize("rest", [(), (5,), (4, 5)])
def test_mse_is_torchs_sample_by_sample(rest: tuple[int, ...]) -> None:
    outputs, wanted = normal(2, 3, *rest), normal(3, *rest, seed=1)
    got = losses.mse(outputs, wanted)
    assert list(got.shape) == [2, 3]
    for r in range(2):
        torch.testing.assert_close(losses.mse(outputs[r], wanted), got[r])
        for b in range(3):
            torch.testing.assert_close(got[r, b], F.mse_loss(outputs[r, b], wanted[b]))


@pytest.mark.parametrize("rest", [(5,), (4, 5)])
def test_kl_is_torchs_the_right_way_round(rest: tuple[int, ...]) -> None:
    outputs, wanted = normal(2, 3, *rest), normal(3, *rest, seed=1)
    got = losses.kl(outputs, wanted)
    p = torch.distributions.Categorical(logits=wanted)
    for r in range(2):
        expected = torch.distributions.kl_divergence(p, torch.distributions.Categorical(logits=outputs[r]))
        torch.testing.assert_close(got[r], expected if expected.ndim == 1 else expected.mean(1))
        mean = F.kl_div(outputs[r].log_softmax(-1), wanted.softmax(-1), reduction="sum") / math.prod((3, *rest[:-1]))
        torch.testing.assert_close(losses.minimality(outputs[r], wanted, losses.kl), mean)
    assert losses.kl(wanted + 3.0, wanted).abs().max() < 1e-12


def test_minimality_averages_over_the_batch() -> None:
    outputs, wanted = normal(2, 3, 5), normal(3, 5, seed=1)
    expected = (outputs - wanted).square().mean((1, 2))
    torch.testing.assert_close(losses.minimality(outputs, wanted), expected)
    torch.testing.assert_close(losses.minimality(outputs[0], wanted), expected[0])


def test_simplicity_by_hand() -> None:
    A = torch.tensor([[[3.0, 0.0], [4.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]]])  # columns of length 5, 1 and 1, 0
    B = torch.tensor([[[2.0, 0.0], [0.0, 3.0]], [[4.0, 3.0], [7.0, 7.0]]])  # rows of length 2, 3 and 5, 9.9
    components = apd.Components({"w": A}, {"w": B})
    mask = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    # Component 0: 5 * 2 + 1 * 3 = 13, three times; component 1: 1 * 5 + 0, once; four entries, three samples.
    assert losses.simplicity(components, mask).item() == pytest.approx((3 * 13 + 5) / 12)
    half = 3 * (10**0.5 + 3**0.5) + 5**0.5
    assert losses.simplicity(components, mask, p=0.5).item() == pytest.approx(half / 12, rel=1e-3)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.sampled_from([0.5, 0.9, 1.0, 2.0]), st.booleans())
def test_counting_equals_the_sum_over_samples(C: int, batch: int, m: int, p: float, positions: bool) -> None:
    """The sum over [B, (T,) C, m] written out, for two restarts."""
    each = [random(C, m=m, seed=s) for s in (0, 50)]
    shape = (2, batch, 3, C) if positions else (2, batch, C)
    mask = (normal(*shape) > 0).double()
    expected = []
    for r, c in enumerate(each):
        total = torch.zeros((), dtype=torch.float64)
        for path in c.paths:
            lengths = c.A[path].norm(dim=1) * c.B[path].norm(dim=2)  # [C, m]
            total = total + (mask[r].reshape(-1, C)[:, :, None] * lengths.pow(p)).sum()
        expected.append(total / (c.n_entries * mask[r].numel() / C))
    expected_all = torch.stack(expected)
    torch.testing.assert_close(losses.simplicity(stack(*each), mask, p, epsilon=0.0), expected_all)
    torch.testing.assert_close(losses.simplicity(each[0], mask[0], p, epsilon=0.0), expected_all[0])


@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.floats(0.2, 1.0))
def test_the_surrogate_bounds_the_quasi_norm_from_above(seed: int, d_in: int, d_out: int, m: int, p: float) -> None:
    C = 3
    components = apd.Components({"w": normal(C, d_in, m, seed=seed)}, {"w": normal(C, m, d_out, seed=seed + 1)})
    mask = torch.ones(1, C, dtype=torch.float64)
    surrogate = losses.simplicity(components, mask, p, epsilon=0.0)
    true = torch.linalg.svdvals(components.matrices("w"))
    exact = true[true > 1e-12].pow(p).sum() / (d_in * d_out)
    assert surrogate >= exact * (1 - 1e-9)
    # It is met by factors along the singular vectors.
    aligned = apd.Components.from_matrices({"w": components.matrices("w")})
    torch.testing.assert_close(losses.simplicity(aligned, mask, p, epsilon=0.0), exact, rtol=1e-4, atol=1e-4)


def test_the_exact_penalty_uses_the_true_singular_values() -> None:
    components, mask = random(m=2), (normal(6, 3) > 0).double()
    expected = torch.zeros((), dtype=torch.float64)
    for path in components.paths:
        for c, P in enumerate(components.matrices(path)):
            expected = expected + mask[:, c].sum() * torch.linalg.svdvals(P)[:2].pow(0.9).sum()
    torch.testing.assert_close(losses.simplicity_exact(components, mask, 0.9), expected / (components.n_entries * 6))


def test_derivatives_stay_finite_at_zero() -> None:
    for p in (0.5, 0.9, 1.0):
        for zero in ("A", "B", "AB"):
            components = random().map(lambda t: t.float())
            for name in zero:
                for factor in getattr(components, name).values():
                    factor.zero_()
            leaves = components.map(lambda t: t.requires_grad_())
            losses.simplicity(leaves, torch.ones(4, 3), p).backward()
            assert all(torch.isfinite(t.grad).all() for t in leaves.parameters() if t.grad is not None)


@pytest.mark.parametrize("p", [0.0, -1.0, float("nan")])
def test_p_must_be_positive(p: float) -> None:
    for function in (losses.simplicity, losses.simplicity_exact):
        with pytest.raises(ValueError, match="p must be above 0"):
            function(random(), torch.ones(4, 3, dtype=torch.float64), p)
