"""Features that come in pairs: the dial, the cuts, what is counted, and bits where nothing interferes (chapter 38)."""

from __future__ import annotations

import math

import pytest
import torch

import apd_minimal as apd
from apd_minimal.study import rate
from experiments import together
from experiments.together import BOTH, PAIRS, PROBABILITY, D, N, Together, cuts, measured, whole

PATH = "encode.weight"


def drawn(both: float, n: int = 60_000) -> torch.Tensor:
    """Draw inputs."""
    return Together(both, n)(0, torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def target() -> apd.targets.TMS:
    """Make a target with random weights."""
    tms = apd.targets.TMS(N, D, probability=PROBABILITY)
    with torch.no_grad():
        tms.encode.weight.normal_(generator=torch.Generator().manual_seed(0))
        tms.encode.weight[:, 1::2] += tms.encode.weight[:, 0::2]  # no pair is orthogonal: it turns
    return tms


@pytest.mark.parametrize("both", BOTH)
def test_the_dial_changes_who_comes_together_and_not_how_often(both: float) -> None:
    x = drawn(both)
    on, rare = x > 0, torch.full((N,), PROBABILITY).double()
    assert x.shape == (60_000, N) and bool(on.any(1).all()) and 0 <= float(x.min()) and float(x.max()) <= 1
    nonempty = 1 - (1 - Together(both).pair) ** len(PAIRS)
    torch.testing.assert_close(on.double().mean(0) * nonempty, rare, atol=3e-3, rtol=0)
    for i, j in PAIRS:
        some = on[:, i] | on[:, j]
        assert float((on[:, i] & on[:, j])[some].double().mean()) == pytest.approx(both, abs=0.02)
    features, pairs = Together(both).mean_active
    assert float(on.sum(1).double().mean()) == pytest.approx(features, rel=0.01)
    assert float(on.unflatten(1, (-1, 2)).any(-1).sum(1).double().mean()) == pytest.approx(pairs, rel=0.01)


def test_independent_is_independent() -> None:
    on = (drawn(together.INDEPENDENT, 400_000) > 0).double()
    # Of all samples, empty ones included, two meet as often as they would by chance.
    nonempty = 1 - (1 - Together(together.INDEPENDENT).pair) ** len(PAIRS)
    meet = [float((on[:, i] * on[:, j]).mean()) * nonempty for i, j in PAIRS]
    assert sum(meet) / len(meet) == pytest.approx(PROBABILITY**2, rel=0.1)


def test_cuts_sum_to_the_weights(target: apd.targets.TMS) -> None:
    made = cuts(target)
    for name, rank, n in (("features", 1, N), ("pairs", 2, N // 2), ("turned", 1, N)):
        matrices = made[name].matrices(PATH)
        torch.testing.assert_close(matrices.sum(0), target.encode.weight.T)
        assert len(matrices) == n and set(torch.linalg.matrix_rank(matrices, rtol=1e-4).tolist()) == {rank}


def test_what_is_counted(target: apd.targets.TMS) -> None:
    made = cuts(target)
    assert measured(made, made["features"]) == {"alive": N, "features": N, "pairs": 0, "apart": 5}
    assert measured(made, made["pairs"]) == {"alive": 5, "features": 0, "pairs": 5, "apart": 5}
    assert measured(made, made["turned"]) == {"alive": N, "features": 0, "pairs": 0, "apart": 5}
    # A feature that another pair's component holds: neither its pair nor the other is apart.
    mixed = made["features"].matrices(PATH).clone()
    mixed[3] += mixed[0]
    mixed[0] = 0
    assert measured(made, whole(mixed)) == {"alive": 9, "features": 8, "pairs": 0, "apart": 3}


@pytest.mark.parametrize("both", [0.25, 1.0])
def test_bits_without_interference_are_those_of_the_formula(both: float) -> None:
    wide = apd.targets.TMS(N, N, probability=PROBABILITY)  # a dimension for each feature: W = 1, bias 0
    with torch.no_grad():
        wide.encode.weight.copy_(torch.eye(N))
        wide.bias.zero_()
    x = Together(both, 20_000)(0, torch.Generator().manual_seed(2))
    features, pairs = Together(both).mean_active
    alpha, made = rate.ALPHA, cuts(wide)
    expected = {
        "features": features * (alpha + math.log2(N)), "pairs": pairs * (2 * alpha + math.log2(N // 2)),
    }  # fmt: skip
    for name, bits in expected.items():
        (cost,) = rate.costs(wide, made[name], x, [1e-6], attribution=wide.attributions)
        assert cost.bits() == pytest.approx(bits, rel=0.02)
