"""The look at the inputs: what it spans, that its parts sum, and where it finds nothing."""

from __future__ import annotations

import pytest
import torch

from experiments import looking


def rows(n: int, *directions: list[float]) -> torch.Tensor:
    """Draw rows [n, d] in the span of directions."""
    generator = torch.Generator().manual_seed(len(directions))
    basis = torch.tensor(directions, dtype=torch.double)
    return torch.randn(n, len(basis), generator=generator, dtype=torch.double) @ basis


def test_directions_span_the_rows_and_are_orthonormal() -> None:
    found = looking.directions(rows(30, [1.0, 1.0, 0.0], [2.0, 0.0, 0.0]))
    torch.testing.assert_close(found @ found.T, torch.eye(2, dtype=torch.double))
    assert found[:, 2].abs().max() < 1e-6


def test_parts_do_what_the_weight_does_to_their_own_rows_and_nothing_to_others() -> None:
    W = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    groups = [rows(20, [1.0, 1.0, 0.0]), rows(20, [0.0, 1.0, 0.0], [0.0, 1.0, 2.0])]  # skew to each other
    parts = looking.cut(groups, W)
    torch.testing.assert_close(parts.sum(0), W)
    for g, own in enumerate(groups):
        torch.testing.assert_close(own @ parts[g], own @ W)
        assert (own @ parts[1 - g]).abs().max() < 1e-9


def test_more_directions_than_fit_are_shared_out() -> None:
    W = torch.eye(2, dtype=torch.double)
    groups = [rows(9, [1.0, 0.0]), rows(9, [1.0, 1.0]), rows(9, [0.0, 1.0])]
    parts = looking.cut(groups, W)
    torch.testing.assert_close(parts.sum(0), W)
    assert (groups[0] @ parts[0] - groups[0]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["plain", "inputs rotated", "hidden rotated", "scaled 4"])
def test_the_encoder_is_owned_in_every_basis_but_not_under_noise(name: str) -> None:
    assert looking.encoder(name, 10) == [True] * 5
    assert not any(looking.encoder(name, 10, noise=0.01))


def test_a_circuit_that_is_not_stored_is_owned() -> None:
    row = looking.circuit(3)
    assert row["groups"] == 3 and row["owned"] == 4
    assert row["mean"] == pytest.approx(1, abs=1e-3)


def test_stored_rows_are_made_again_the_same() -> None:
    stored = {(row["network"], row["seed"]): row for row in looking.STUDY.stored()["rows"]}
    (again,), _ = looking.run(("circuit", 7700))
    assert again == pytest.approx({key: stored["circuit", 7700][key] for key in again}, abs=1e-4)
