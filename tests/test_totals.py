"""Totals stand in for the components in their losses: the same values, and the same gradients by another way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal import losses
from apd_minimal.kernels import totals
from apd_minimal.kernels.totals import Totals

SHAPES = {"w": (4, 7), "v": (6, 3)}


def components(restarts: int, n_components: int = 5, rank: int | None = None) -> apd.Components:
    generator = torch.Generator().manual_seed(restarts)
    found = apd.Components.random(SHAPES, n_components, rank, restarts, 1.0, generator)
    return found.map(lambda t: t.double().requires_grad_())


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {path: torch.randn(shape, generator=generator, dtype=torch.float64) for path, shape in SHAPES.items()}


def loss(parts: apd.Components, factors: list[Tensor], mask: Tensor, simple: float, p: float) -> Tensor:
    """Both losses, each restart with another weight, and something else that depends on some of the factors."""
    each = losses.faithfulness(parts, weights())
    if simple:
        each = each + simple * losses.simplicity(parts, mask, p)
    return (each * torch.arange(1.0, len(each) + 1)).sum() + factors[0].sin().sum() + (factors[0] @ factors[1]).sum()


@pytest.mark.parametrize("part", [1, 60, 2**18])
@pytest.mark.parametrize("rank", [1, 2, None])
@pytest.mark.parametrize("restarts", [1, 3])
def test_gradients_are_those_of_the_losses(
    monkeypatch: pytest.MonkeyPatch, restarts: int, rank: int | None, part: int
) -> None:
    """However many components are worked on at a time; some factors have gradients from elsewhere, others have none."""
    monkeypatch.setattr(totals, "PART", part)
    own = components(restarts, rank=rank)
    mask = (torch.rand(restarts, 8, 5, generator=torch.Generator().manual_seed(1)) < 0.4).double()
    for simple, p in ((0.7, 0.9), (0.7, 2.0), (0.0, 1.0)):
        expected = torch.autograd.grad(loss(own, own.parameters(), mask, simple, p), own.parameters())
        instead = Totals(own)
        for path in SHAPES:
            torch.testing.assert_close(instead.sum(path), own.sum(path))
            torch.testing.assert_close(instead.squared_lengths(path), own.squared_lengths(path))
        value = loss(instead, own.parameters(), mask, simple, p)
        torch.testing.assert_close(value, loss(own, own.parameters(), mask, simple, p))
        there = torch.ones_like(own.parameters()[0])  # of an earlier part of a batch
        own.parameters()[0].grad = there.clone()
        for factor in own.parameters()[1:]:
            factor.grad = None
        instead.backward(value)
        for i, (factor, gradient) in enumerate(zip(own.parameters(), expected, strict=True)):
            assert factor.grad is not None and factor.grad.stride() == factor.stride()
            torch.testing.assert_close(factor.grad, gradient if i else there + gradient)


def test_the_components_are_worked_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(totals, "PART", 60)
    for path, size in (("w", 2), ("v", 3)):  # the larger factor of w has 28 numbers a component, that of v 18
        found = [(part.start, a.shape[1], b.shape[1]) for part, a, b in Totals(components(1))._parts(path)]
        assert found == [(i, min(size, 5 - i), min(size, 5 - i)) for i in range(0, 5, size)]


def test_full_precision_under_autocast() -> None:
    own = components(2).map(lambda t: t.detach().float().requires_grad_())
    with torch.autocast("cpu"):
        found = Totals(own)
        found.backward(sum((found.sum(path).square().sum() for path in SHAPES), torch.zeros(())))
    for path in SHAPES:
        torch.testing.assert_close(found.sum(path), own.sum(path))
        exact = torch.autograd.grad(own.sum(path).square().sum(), [own.A[path], own.B[path]])
        for factor, gradient in zip((own.A[path], own.B[path]), exact, strict=True):
            torch.testing.assert_close(factor.grad, gradient)
