"""Bits at fixed errors: closed forms on networks whose decomposition is known, and the judge that uses them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import apd_minimal as apd
from apd_minimal.study import rate
from apd_minimal.study.rate import NEVER, Cost, Judge, costs, curve, shortest

PATH = "weight"


def identity(n: int, scale: float = 1.0) -> nn.Linear:
    net = nn.Linear(n, n, bias=False)
    nn.init.eye_(net.weight).data.mul_(scale)
    return net


def parts(*matrices: Tensor) -> apd.Components:
    """Components [d_in, d_out], factored by their singular values."""
    U, S, V = torch.linalg.svd(torch.stack(matrices), full_matrices=False)
    return apd.Components({PATH: U * S[:, None, :]}, {PATH: V})


def features(n: int) -> apd.Components:
    return parts(*(torch.diag(row) for row in torch.eye(n)))


def one_hot(values: Tensor, n: int) -> Tensor:
    """Sample b has the value b in place b mod n."""
    return torch.zeros(len(values), n).scatter_(1, (torch.arange(len(values)) % n)[:, None], values[:, None])


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 6), st.integers(8, 90), st.integers(0, 99), st.sampled_from([0.001, 0.02, 0.1, 0.5]))
def test_the_cost_of_one_hot_inputs(n: int, B: int, seed: int, epsilon: float) -> None:
    """Leaving out a pair costs its value squared, so that the largest values go first."""
    values = torch.rand(B, generator=torch.Generator().manual_seed(seed)) + 0.01
    x = one_hot(values, n)
    variance = (x - x.mean(0)).square().sum().item()
    squares = values.square().sort(descending=True).values.tolist()
    # The number left in: the first at which the rest is small enough; away from a tie.
    rests = [sum(squares[i:]) / variance for i in range(B + 1)]
    if min(abs(rest - epsilon) for rest in rests) < 1e-5:
        return
    needed = next(i for i in range(B + 1) if rests[i] <= epsilon)
    (cost,) = costs(identity(n), features(n), x, [epsilon])
    kept = values.sort(descending=True).indices[:needed] % n
    assert cost.active * B == pytest.approx(max(needed, 1))
    assert cost.ranks == pytest.approx(cost.active)
    if needed:
        assert cost.error == pytest.approx(rests[needed], abs=1e-5)
        assert cost.in_use == len(set(kept.tolist()))
        assert cost.bits(3.0) == pytest.approx(needed / B * (3 + math.log2(cost.in_use)))


@pytest.mark.parametrize(("epsilon", "found"), [(1.0, 1), (0.5, 2), (0.3, 3), (0.1, 5), (0.0999, None)])
def test_an_error_that_is_exactly_as_large_is_small_enough(epsilon: float, found: int | None) -> None:
    errors = [2.0, 1.0, 0.5, 0.25, 0.125, 0.1]

    class Given:
        pairs, first = 5, 1

        def __call__(self, n: int) -> SimpleNamespace:
            return SimpleNamespace(error=errors[n], n=n)

    cost: Any = rate._search(Given(), epsilon)  # type: ignore[arg-type]
    assert (None if cost is NEVER else cost.n) == found


def test_a_lump_pays_for_its_whole_rank_and_for_no_name() -> None:
    x = one_hot(torch.ones(40), 4)
    (lump,), (apart,) = (costs(identity(4), c, x, [0.01]) for c in (parts(torch.eye(4)), features(4)))
    assert (lump.active, lump.ranks, lump.in_use) == (1.0, 4.0, 1)
    assert (apart.active, apart.ranks, apart.in_use) == (1.0, 1.0, 4)
    assert lump.bits(2.0) == 8.0
    assert apart.bits(2.0) == 4.0


def test_the_error_does_not_depend_on_the_scale_of_the_outputs() -> None:
    x = torch.rand(64, 3, generator=torch.Generator().manual_seed(0))
    plain, large = (costs(identity(3, s), features(3).map(lambda t, s=s: t * s**0.5), x) for s in (1.0, 100.0))
    for one, other in zip(plain, large, strict=True):
        assert one.error == pytest.approx(other.error, rel=1e-4)
        assert one.active == other.active


def test_the_divergence_of_distributions_is_in_bits() -> None:
    x = torch.eye(2).repeat(10, 1) * 3
    points = curve(identity(2), features(2), x, divergence="kl", points=4)
    p = torch.tensor([math.exp(3), 1.0])
    p = p / p.sum()
    off = (p * (p * 2).log2()).sum().item()  # from no evidence at all, the uniform distribution
    for point in points:
        assert point.error == pytest.approx(max(0, 1 - point.active) * off, abs=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 8.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_shortest_message_is_the_least_of_all_sums(alpha: float, seed: int) -> None:
    """With one-hot inputs a pair that is left out costs its own divergence, so that every sum can be written down."""
    n, B = 6, 1500  # only two of the six inputs are ever on, so that a name costs one bit
    values = 1 + 5 * torch.rand(B, generator=torch.Generator().manual_seed(seed))
    x = torch.cat([one_hot(values, 2), torch.zeros(B, n - 2)], dim=1)
    p = torch.softmax(x.double(), 1)
    off = (p * (p * n).log2()).sum(1)  # bits from the uniform distribution
    scores = apd.attributions.gradient(identity(n), features(n), x).amax(1)
    order, sums = scores.argsort(descending=True, stable=True), []
    for m in range(B + 1):
        names = 1.0 if len(set((order[:m] % 2).tolist())) == 2 else 0.0
        sums.append(float((m * (alpha + names) + off[order[m:]].sum()) / B))
    found = shortest(identity(n), features(n), x, alpha)
    assert found.message(alpha) == pytest.approx(min(sums), abs=1e-5)
    assert found.active * B == pytest.approx(sums.index(min(sums)), abs=1e-3)
    assert alpha > 1 or 0.2 * B < found.active * B < 0.9 * B  # neither end


def test_no_point_of_the_curve_beats_the_shortest_message() -> None:
    """A valley that is narrower than a step of the curve may be missed, but not where the curve has a point."""
    x = torch.ones(500, 1)
    found = curve(identity(1), features(1), x, divergence=lambda outputs, wanted: apd.losses.mse(outputs, wanted))
    points = [round(500 * point.active) for point in found]
    assert len(points) > 40
    for n in (0, *points):

        def valley(outputs: Tensor, wanted: Tensor, n: int = n) -> Tensor:
            return (outputs.sum() - n).abs().clamp(0, 1).expand(len(outputs))

        assert shortest(identity(1), features(1), x, 0.0, divergence=valley).message(0.0) == 0, n


def test_a_mask_that_is_dearer_than_the_answer_is_not_sent() -> None:
    x = one_hot(torch.full((40,), 3.0), 4)
    found = shortest(identity(4), features(4), x, 8.0)
    assert (found.active, found.bits(8.0)) == (0, 0)
    assert found.error == found.message(8.0) > 1
    free = shortest(identity(4), parts(torch.eye(4)), x, 0.0)  # of one component neither name nor rank costs anything
    assert free.message(0.0) == pytest.approx(0, abs=1e-6)


def test_a_share_of_the_variance_is_no_number_of_bits() -> None:
    with pytest.raises(ValueError, match="divergence"):
        shortest(identity(3), features(3), torch.rand(8, 3), divergence="mse")
    nothing = features(3).map(torch.zeros_like)
    assert shortest(identity(3), nothing, torch.rand(8, 3)).active == 0


def test_a_divergence_of_ones_own_is_taken_as_it_is() -> None:
    x = one_hot(torch.ones(12), 3)

    def largest(outputs: Tensor, wanted: Tensor) -> Tensor:
        return (outputs - wanted).abs().amax(-1)

    for point in curve(identity(3), features(3), x, divergence=largest, points=5):
        assert point.error == pytest.approx(max(0, 1 - point.active), abs=1e-6)


def test_of_equal_attributions_the_first_come_first() -> None:
    """On every processor: which samples these are decides the error."""
    seen: list[Tensor] = []

    def noted(outputs: Tensor, wanted: Tensor) -> Tensor:
        seen.append(outputs[:, 0])
        return (outputs - wanted).abs().sum(1)

    points = curve(identity(1), features(1), torch.ones(500, 1), divergence=noted)
    assert len(seen) == len(points) > 40
    for on, point in zip(seen, points, strict=True):
        assert torch.equal(on, (torch.arange(500) < round(500 * point.active)).float())


def test_the_curve_falls_to_the_components_own_error() -> None:
    net, x = identity(5), torch.rand(80, 5, generator=torch.Generator().manual_seed(1))
    points = curve(net, features(5), x)
    errors = [p.error for p in points]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(0, abs=1e-9)
    assert points[-1].active == 5


def test_each_position_of_a_sequence_counts() -> None:
    x = torch.zeros(20, 3, 4)
    x[:10, 1, 2] = 1

    def attribution(network: Any, components: apd.Components, inputs: Tensor) -> Tensor:
        return inputs.abs()  # [B, positions, C]

    (cost,) = costs(identity(4), features(4), x, [0.01], attribution=attribution)
    assert (cost.active, cost.in_use) == (0.5, 1)


def test_components_that_do_not_sum_to_the_weights_never_get_there() -> None:
    x = one_hot(torch.ones(40), 4)
    half = features(4).map(lambda t: t * 0.5)
    assert costs(identity(4), half, x, [0.01]) == [NEVER]
    assert Judge()(apd.Network(identity(4), [PATH]), half, x) == math.inf
    nothing = features(4).map(torch.zeros_like)
    assert costs(identity(4), nothing, x, [0.01]) == [NEVER]
    assert NEVER.bits(0) == Judge(alpha=0)(apd.Network(identity(4), [PATH]), half, x) == math.inf, "also for free"


def test_empty_components_are_neither_active_nor_in_use() -> None:
    both = apd.Components(
        {PATH: torch.cat([features(3).A[PATH], torch.zeros(4, 3, 3)])},
        {PATH: torch.cat([features(3).B[PATH], torch.zeros(4, 3, 3)])},
    )
    x = torch.rand(30, 3, generator=torch.Generator().manual_seed(2))
    assert curve(identity(3), both, x)[-1] == curve(identity(3), features(3), x)[-1]


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"epsilons": [0.0]}, ValueError, "epsilons"),
        ({"epsilons": 0.1}, TypeError, "epsilons"),
        ({"divergence": "l1"}, ValueError, "divergence"),
        ({"rank_threshold": 1.0}, ValueError, "threshold"),
        ({"x": torch.ones(8, 3)}, ValueError, "same on all inputs"),
        ({"components": features(2)}, ValueError, "weight"),
        ({"attribution": 3}, TypeError, "attribution"),
        ({"attribution": lambda network, components, x: x[:, :2]}, ValueError, "attributions"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], says: str) -> None:
    given = {"components": features(3), "x": torch.rand(8, 3), "epsilons": [0.1]} | change
    with pytest.raises(error, match=says):
        costs(identity(3), **given)


def test_bits_need_a_price() -> None:
    with pytest.raises(ValueError, match="alpha"):
        Cost(0.1, 1.0, 1.0, 2).bits(-1)


def test_a_run_is_chosen_by_its_judge() -> None:
    """Held-out error and judge are made to disagree, and infinitely many bits are allowed."""
    net = identity(3)

    def batches(step: int, generator: torch.Generator) -> Tensor:
        return torch.rand(16, 3, generator=generator)

    asked: list[Tensor] = []
    bits = [math.inf, 1 + 1e-12, 1.0, 3.0]  # the first two differ in double precision only

    def judge(network: apd.Network, components: apd.Components, x: Tensor) -> float:
        asked.append(components.flat())
        return bits[len(asked) - 1]

    given = {"weights": [PATH], "n_components": 3, "top_k": 1, "steps": 3, "restarts": 4, "progress": False}
    result = apd.decompose(net, batches, judge=judge, **given)  # type: ignore[arg-type]
    assert result.scores == bits
    assert result.chosen == 2
    assert torch.equal(result.components.flat(), asked[2])
    plain = apd.decompose(net, batches, **given)  # type: ignore[arg-type]
    assert plain.restarts is not None
    assert torch.equal(plain.restarts.restart(2).flat(), asked[2]), "a judge changes nothing but the choice"
    with pytest.raises(TypeError, match="judge"):
        apd.decompose(net, batches, judge=3, **given)  # type: ignore[arg-type]
    with pytest.raises(apd.NonFiniteLoss, match="nan"):
        apd.decompose(net, batches, judge=lambda n, c, x: math.nan, **given)  # type: ignore[arg-type]


def test_the_judge_is_the_mean_over_its_errors() -> None:
    net, x = identity(4), torch.rand(60, 4, generator=torch.Generator().manual_seed(3))
    each = [cost.bits(2.0) for cost in costs(net, features(4), x, [0.02, 0.2])]
    assert each[0] > each[1]
    assert Judge((0.02, 0.2), alpha=2.0)(apd.Network(net, [PATH]), features(4), x) == pytest.approx(sum(each) / 2)
