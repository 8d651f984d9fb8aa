"""What the data determine of a planted mechanism: the measure says what it should, and the targets of the goal pass."""

from __future__ import annotations

import pytest
import torch

import apd_minimal as apd
from experiments.architectures import EPSILONS, GOAL, MADE
from experiments.determined import come_in, least_error, measured


def error_of(kind: str, j: int, path: str, piece: torch.Tensor) -> float:
    """By brute force: the error where a mechanism is on alone and a piece of its block is in another component."""
    target = MADE[kind](seed=3)
    parts = {p: m.clone() for p, m in target.mechanisms().items()}
    parts[path][j] -= piece.float()
    parts[path][(j + 1) % target.n] += piece.float()
    on = torch.eye(target.n)[j].expand(200, -1)
    x = target.make(on, torch.Generator().manual_seed(j))
    with torch.no_grad():
        y = apd.Network(target, target.weights)(x, apd.Components.from_matrices(parts), on)
        return float((y - target(x)).square().mean() / target(x).square().mean())


@pytest.mark.parametrize(
    ("kind", "path"),
    [("MLP, all three", "middle.weight"), ("RNN", "again.weight"), ("CNN, own colours", "second.weight")],
)
def test_the_piece_makes_the_error_that_is_said_and_no_other_makes_less(kind: str, path: str) -> None:
    error, piece = least_error(MADE[kind](seed=3), 2, path, cosine=0.9999)
    assert error == pytest.approx(error_of(kind, 2, path, piece), rel=0.1)
    read, write = (space[2] for space in MADE[kind](seed=3).spaces[path])
    for seed in range(3):
        other = read.T @ torch.randn(len(read), len(write), generator=torch.Generator().manual_seed(seed)) @ write
        assert error_of(kind, 2, path, other * (piece.norm() / other.norm())) > error


def test_the_length_is_what_the_cosine_asks_for() -> None:
    target = MADE["RNN"](seed=3)
    _, piece = least_error(target, 0, "again.weight", cosine=0.9)
    length = sum(float(m[0].square().sum()) for m in target.mechanisms().values())
    # A piece at right angles to the mechanism makes it the hypotenuse.
    assert length / (length + float(piece.square().sum())) == pytest.approx(0.9**2, rel=1e-4)


def test_a_third_of_the_directions_of_stripes_come_in_and_all_of_noise() -> None:
    assert come_in(MADE["CNN"](seed=3))["second.weight"] == (36, 108)
    assert come_in(MADE["CNN, own colours"](seed=3))["second.weight"] == (108, 108)


@pytest.mark.parametrize("kind", GOAL)
def test_the_data_determine_every_block_of_the_targets_of_the_goal(kind: str) -> None:
    for path, row in measured(MADE[kind](seed=3)).items():
        assert row["come_in"] == row["of"], path
        assert len(row["errors"]) == 6 and min(row["errors"]) > min(EPSILONS), path


@pytest.mark.parametrize("kind", ["MLP", "CNN", "SSM"])
def test_those_of_the_first_targets_leave_some_open(kind: str) -> None:
    assert min(min(row["errors"]) for row in measured(MADE[kind](seed=3)).values()) < min(EPSILONS)
