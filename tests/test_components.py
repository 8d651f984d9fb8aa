"""Components against their definitions: products, sums, singular values, the flattened view."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import apd_minimal as apd

sizes = st.integers(1, 5)


def random(C: int, d_in: int, d_out: int, m: int, restarts: int | None = None) -> apd.Components:
    generator = torch.Generator().manual_seed(C + 10 * d_in + 100 * d_out)
    lead = (C,) if restarts is None else (restarts, C)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*lead, *shape, generator=generator, dtype=torch.float64)

    return apd.Components(
        {"first": draw(d_in, m), "second": draw(d_out, m)}, {"first": draw(m, d_out), "second": draw(m, 2)}
    )


@given(sizes, sizes, sizes, sizes, st.sampled_from([None, 1, 3]))
def test_sum_flat_and_norms(C: int, d_in: int, d_out: int, m: int, restarts: int | None) -> None:
    components = random(C, d_in, d_out, m, restarts)
    lead = [] if restarts is None else [restarts]
    P = torch.einsum("...im,...mo->...io", components.A["first"], components.B["first"])
    torch.testing.assert_close(components.matrices("first"), P)
    torch.testing.assert_close(components.sum("first"), P.sum(-3))
    flat = components.flat()
    assert list(flat.shape) == [*lead, C, d_in * d_out + 2 * d_out] == [*lead, C, components.n_entries]
    torch.testing.assert_close(flat[..., : d_in * d_out].reshape(P.shape), P)
    torch.testing.assert_close(components.norms(), flat.norm(dim=-1))
    assert (components.n_components, components.restarts) == (C, restarts)


@given(sizes, sizes, sizes, sizes, st.sampled_from([None, 2]))
def test_singular_values_from_the_factors(C: int, d_in: int, d_out: int, m: int, restarts: int | None) -> None:
    components = random(C, d_in, d_out, m, restarts)
    true = torch.linalg.svdvals(components.matrices("first"))
    found = components.singular_values("first")
    n = min(found.shape[-1], true.shape[-1])
    torch.testing.assert_close(found[..., :n], true[..., :n])
    assert (found[..., n:] < 1e-9).all()
    assert (true[..., n:] < 1e-9).all()


def test_ranks_are_counted_against_the_largest_of_the_weight() -> None:
    P = torch.zeros(4, 3, 3)
    P[0] = torch.diag(torch.tensor([10.0, 2.0, 0.9]))
    P[1] = torch.diag(torch.tensor([0.0, 1.1, 0.0]))
    P[2] = torch.diag(torch.tensor([0.5, 0.5, 0.5]))
    components = apd.Components.from_matrices({"w": P})
    assert components.ranks(0.1)["w"].tolist() == [2, 1, 0, 0]
    assert components.ranks(0.01)["w"].tolist() == [3, 1, 3, 0]
    assert components.ranks()["w"].tolist() == [2, 1, 0, 0], "a tenth, unless one says otherwise"
    stacked = apd.Components.from_matrices({"w": torch.stack([P, P / 100])})
    assert stacked.ranks(0.1)["w"].tolist() == [[2, 1, 0, 0]] * 2, "each restart by its own largest"


@given(sizes, sizes, sizes)
def test_factorising_matrices_gives_them_back(C: int, d_in: int, d_out: int) -> None:
    P = torch.randn(C, d_in, d_out, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    components = apd.Components.from_matrices({"w": P})
    torch.testing.assert_close(components.matrices("w"), P)
    best = apd.Components.from_matrices({"w": P}, rank=1)
    s = torch.linalg.svdvals(P)
    error = (best.matrices("w") - P).square().sum((1, 2))
    torch.testing.assert_close(error, s[:, 1:].square().sum(1))  # Eckart and Young


def test_restart_subset_map_and_order() -> None:
    components = random(4, 3, 2, 2, restarts=3)
    one = components.restart(1)
    assert one.restarts is None
    assert torch.equal(one.A["second"], components.A["second"][1])
    assert torch.equal(one.stacked().B["first"][0], one.B["first"])
    assert components.stacked() is components
    torch.testing.assert_close(components.subset([2, 0]).flat(), components.flat()[:, [2, 0]])
    torch.testing.assert_close(components.map(lambda t: 2 * t).flat(), 4 * components.flat())
    named = [components.A["first"], components.B["first"], components.A["second"], components.B["second"]]
    assert all(a is b for a, b in zip(components.parameters(), named, strict=True))
    with pytest.raises(ValueError, match="no axis of restarts"):
        one.restart(0)


def test_random_components() -> None:
    shapes = {"a": (40, 30), "b": (30, 50)}

    def draw(seed: int, rank: int | None = None, restarts: int | None = None) -> apd.Components:
        generator = torch.Generator().manual_seed(seed)
        return apd.Components.random(shapes, 6, rank, restarts, generator=generator)

    first = draw(0)
    assert [list(t.shape) for t in first.parameters()] == [[6, 40, 30], [6, 30, 30], [6, 30, 30], [6, 30, 50]]
    assert list(draw(0, rank=3, restarts=2).A["b"].shape) == [2, 6, 30, 3]
    assert list(draw(0, rank=99).A["b"].shape) == [6, 30, 30]
    assert torch.equal(first.flat(), draw(0).flat())
    assert not torch.equal(first.flat(), draw(1).flat())
    assert not any(t.requires_grad for t in first.parameters())
    different = draw(0, restarts=2).flat()
    assert not torch.equal(different[0], different[1])


@pytest.mark.parametrize("std", [0.0, 0.3, 2.0])
def test_random_factors_are_gaussian(std: float) -> None:
    """Of 120,000 entries each: the mean, and the second and fourth moments."""
    drawn = apd.Components.random({"w": (40, 40)}, 75, std=std, generator=torch.Generator().manual_seed(0))
    for factor in (drawn.A["w"], drawn.B["w"]):
        for power, moment in ((1, 0.0), (2, std**2), (4, 3 * std**4)):
            assert float(factor.double().pow(power).mean()) == pytest.approx(moment, rel=0.05, abs=0.01 * std**power)
    assert std == 0 or abs(float((drawn.A["w"] * drawn.B["w"]).mean())) < 0.02 * std**2, "one says nothing of the other"


@pytest.mark.parametrize(
    ("A", "B", "message"),
    [
        ({}, {}, "at least one"),
        ({"w": (3, 2, 2)}, {"v": (3, 2, 2)}, r"got \['w'\] and \['v'\]"),
        ({"w": (3, 4, 2)}, {"w": (3, 3, 5)}, r"w: A must be .*got \[3, 4, 2\] and \[3, 3, 5\]"),
        ({"w": (3, 4, 2)}, {"w": (2, 2, 5)}, r"got \[3, 4, 2\] and \[2, 2, 5\]"),
        ({"w": (4, 2)}, {"w": (2, 5)}, r"got \[4, 2\] and \[2, 5\]"),
        ({"w": (3, 4, 2), "v": (2, 4, 2)}, {"w": (3, 2, 5), "v": (2, 2, 5)}, r"same number .*\[2\], \[3\]"),
    ],
)
def test_factors_that_do_not_fit(A: dict[str, tuple[int, ...]], B: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apd.Components({k: torch.zeros(s) for k, s in A.items()}, {k: torch.zeros(s) for k, s in B.items()})


def test_a_weight_may_have_no_component_of_its_own() -> None:
    components = apd.Components.random({"a": (2, 3), "b": (3, 2)}, 3)
    apd.components.confine(components, (3, 0))
    assert components.flat()[:, :6].abs().amin(1).min() > 0
    assert not components.A["b"].any() and not components.B["b"].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ranks_and_singular_values_of_low_precision(dtype: torch.dtype) -> None:
    """They are those of the rounded factors in single precision; factors that are made anew keep their type."""
    low = apd.Components.random({"w": (6, 4)}, 3, 2, generator=torch.Generator().manual_seed(0)).map(
        lambda t: t.to(dtype)
    )
    exact = low.map(Tensor.float)
    torch.testing.assert_close(low.singular_values("w"), exact.singular_values("w"))
    assert torch.equal(low.ranks()["w"], exact.ranks()["w"])
    torch.testing.assert_close(low.norms(), exact.norms())
    again = apd.Components.from_matrices({"w": low.matrices("w")}, rank=2)
    assert again.A["w"].dtype == again.B["w"].dtype == dtype
    torch.testing.assert_close(again.matrices("w").float(), low.matrices("w").float(), rtol=0.05, atol=1e-3)
