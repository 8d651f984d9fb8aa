"""Shapley values against all orders one by one, their axioms, and the statistics of what is sampled."""

from __future__ import annotations

from importlib import import_module
from math import factorial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import Case, case, every_case, linear, slopes, worth
from oracles import shapley as by_orders
from torch import Tensor, nn

import apd_minimal as apd
from apd_minimal.attributions import integrated_gradients, path_shapley, shapley

both = pytest.mark.parametrize("remainder", [True, False])


def coalitions(C: int) -> Tensor:
    return torch.tensor([[s >> c & 1 for c in range(C)] for s in range(2**C)], dtype=torch.float64)


def exact(one: Case, components: apd.Components, x: Tensor, remainder: bool = True) -> Tensor:
    values = by_orders(lambda gates: worth(one, components, x, gates, remainder), components.n_components)
    return values.transpose(0, 1)  # [B, C, n_out]


def expected_path_shapley(one: Case, components: apd.Components, x: Tensor, remainder: bool = True) -> Tensor:
    """Its mean over all draws: a coalition of s comes with probability s! (C - s)! / (C + 1)!, the mean over q."""
    C = components.n_components
    total = torch.zeros(())
    for gates in coalitions(C):
        s = int(gates.sum())
        chance = factorial(s) * factorial(C - s) / factorial(C + 1)
        total = total + chance * slopes(one, components, x, gates, remainder)
    return total


@every_case
@both
def test_all_coalitions_are_all_orders(name: str, remainder: bool) -> None:
    one = case(name)
    x, components = one.x(batch=2), one.components(C=3)
    expected = exact(one, components, x, remainder)
    got = shapley(one.target, components, x, remainder=remainder, per_output=True)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        shapley(one.target, components, x, remainder=remainder), expected.square().mean(-1).sqrt()
    )


@both
def test_sampled_orders_have_the_right_mean_and_standard_errors(remainder: bool) -> None:
    """Sixty estimates: their mean is the exact value within their spread, and their errors say how wide they spread."""
    one = case("mlp")
    x, components, n = one.x(batch=2), one.components(C=5), 60
    expected = exact(one, components, x, remainder)
    values, errors = [], []
    for seed in range(n):
        generator = torch.Generator().manual_seed(seed)
        value, error = shapley(
            one.network,
            components,
            x,
            n_samples=20,
            remainder=remainder,
            per_output=True,
            return_std_error=True,
            generator=generator,
        )
        values.append(value)
        errors.append(error)
    estimates, variance = torch.stack(values), torch.stack(errors).square().mean(0)
    off = (estimates.mean(0) - expected) / (estimates.var(0) / n).sqrt()
    assert float(off.abs().max()) < 4
    ratio = estimates.var(0).sum() / variance.sum()
    assert 0.7 < float(ratio) < 1.4


def test_an_order_and_its_reverse_by_hand() -> None:
    """Three players and max: what is worth 1 is any player at all. Only the first to come adds anything."""
    target = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Hardtanh(0, 1)).double()
    components = apd.Components.from_matrices({"0.weight": torch.ones(3, 1, 1, dtype=torch.float64)})
    with torch.no_grad():
        target[0].weight.fill_(3.0)
    x = torch.ones(1, 1, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", lambda n, generator=None: torch.tensor([2, 0, 1]))
        value, error = shapley(target, components, x, n_samples=4, per_output=True, return_std_error=True)
    torch.testing.assert_close(value[0, :, 0], torch.tensor([0, 0.5, 0.5], dtype=torch.float64))
    assert float(error.abs().max()) == 0, "the same pair twice does not spread"


@pytest.mark.parametrize("n_samples", [None, 2, 6])
@both
def test_efficiency_per_signed_output_whatever_the_orders(n_samples: int | None, remainder: bool) -> None:
    one = case("sequence")
    x, components = one.x(), one.components(C=4)
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(2, 4)
    nobody, everybody = worth(one, components, x, ends, remainder)
    signed = shapley(one.network, components, x, n_samples=n_samples, remainder=remainder, per_output=True)
    torch.testing.assert_close(signed.sum(1), everybody - nobody)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.booleans(), st.integers(0, 10**6))
def test_axioms_over_random_networks(d: int, h: int, n_out: int, C: int, remainder: bool, seed: int) -> None:
    """Efficiency; a null player (its component is zero) gets nothing; two that are equal get the same."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        target = nn.Sequential(nn.Linear(d, h), nn.ReLU(), nn.Linear(h, n_out))
    one = Case(target, {"0.weight": linear, "2.weight": linear}, lambda b, g: torch.randn(b, d, generator=g).double())
    x, some = one.x(2, seed), one.components(C, seed=seed)
    twins = some.subset([*range(C), 0, 0])
    for factor in twins.A.values():
        factor[-1] = 0  # the last is nobody, the one before it a twin of the first
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(2, C + 2)
    nobody, everybody = worth(one, twins, x, ends, remainder)
    signed = shapley(target, twins, x, remainder=remainder, per_output=True)
    torch.testing.assert_close(signed.sum(1), everybody - nobody)
    torch.testing.assert_close(signed[:, -1], torch.zeros_like(signed[:, -1]))
    torch.testing.assert_close(signed[:, 0], signed[:, C])
    sampled = shapley(target, twins, x, n_samples=2, remainder=remainder, per_output=True)
    torch.testing.assert_close(sampled[:, -1], torch.zeros_like(signed[:, -1]))
    path = path_shapley(target, twins, x, n_samples=3, remainder=remainder, per_output=True)
    torch.testing.assert_close(path[:, -1], torch.zeros_like(signed[:, -1]))
    torch.testing.assert_close(path[:, 0], path[:, C])


def test_how_many_samples_where_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """All coalitions of up to twelve, orders beyond: counted in rows of the network's inputs."""
    target = nn.Linear(2, 2).double()
    x = torch.ones(3, 2, dtype=torch.float64)
    rows = []
    target.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    for C, n_samples, expected in [(4, None, 2**4), (12, None, 2**12), (13, None, 24 * 12 + 2), (4, 6, 6 * 3 + 2)]:
        components = apd.Components.random({"weight": (2, 2)}, C).map(Tensor.double)
        rows.clear()
        shapley(target, components, x, n_samples=n_samples)
        assert sum(rows) == 1 + 3 * expected  # one row tells how large the outputs are


def _quadratic() -> Case:
    """TMS without a ReLU: the tied weight enters twice, so outputs are of the second degree in the gates."""
    target = nn.Sequential(nn.Linear(3, 2, bias=False))
    target.append(apd.rules.TransposedLinear(target[0]))
    return Case(target, {"0.weight": linear}, lambda b, g: torch.randn(b, 3, generator=g).double())


@both
def test_a_single_pair_is_exact_for_outputs_of_the_second_degree(remainder: bool) -> None:
    one = _quadratic()
    x, components = one.x(), one.components(C=4)
    expected = exact(one, components, x, remainder)
    fixed = {"remainder": remainder, "per_output": True}
    torch.testing.assert_close(shapley(one.network, components, x, n_samples=2, **fixed), expected)
    torch.testing.assert_close(path_shapley(one.network, components, x, n_samples=2, **fixed), expected)
    torch.testing.assert_close(integrated_gradients(one.network, components, x, n_steps=1, **fixed), expected)


def _multilinear() -> tuple[Case, apd.Components]:
    """Three layers without anything between them, each component in one of them: linear in every gate by itself."""
    target = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    one = Case(target, {f"{i}.weight": linear for i in range(3)}, lambda b, g: torch.randn(b, 2, generator=g).double())
    components = one.components(C=5)
    apd.components.confine(components, (2, 2, 1))
    return one, components


@both
def test_path_shapley_has_no_bias_where_outputs_are_linear_in_each_gate(remainder: bool) -> None:
    one, components = _multilinear()
    x = one.x(batch=2)
    expected = exact(one, components, x, remainder)
    torch.testing.assert_close(expected_path_shapley(one, components, x, remainder), expected)
    generator = torch.Generator().manual_seed(0)
    fixed = {"remainder": remainder, "per_output": True, "generator": generator}
    few = torch.stack([path_shapley(one.network, components, x, n_samples=8, **fixed) for _ in range(120)])
    off = (few.mean(0) - expected) / (few.var(0) / len(few)).sqrt().clamp_min(1e-9)
    assert float(off.abs().max()) < 4


@pytest.mark.parametrize("name", ["mlp", "tms"])
@both
def test_path_shapley_elsewhere_has_the_mean_that_is_stated(name: str, remainder: bool) -> None:
    """Derivatives at random coalitions; the difference to the exact values is the bias, and it is there."""
    one = case(name)
    x, components = one.x(batch=2), one.components(C=3)
    stated = expected_path_shapley(one, components, x, remainder).detach()
    generator = torch.Generator().manual_seed(0)
    fixed = {"remainder": remainder, "per_output": True, "generator": generator}
    few = torch.stack([path_shapley(one.network, components, x, n_samples=8, **fixed) for _ in range(120)])
    spread = (few.var(0) / len(few)).sqrt().clamp_min(1e-9)
    assert float(((few.mean(0) - stated) / spread).abs().max()) < 4.5
    bias = (stated - exact(one, components, x, remainder)).abs()
    assert float((bias / spread).max()) > 10


def test_the_bias_by_hand() -> None:
    """relu(g - 1/4) gains 3/4 from gate 0 to 1; its slopes there are 0 and 1, half and half."""
    target = nn.Sequential(nn.Linear(1, 1), nn.ReLU()).double()
    with torch.no_grad():
        target[0].weight.fill_(1.0)
        target[0].bias.fill_(-0.25)
    components = apd.Components.from_matrices({"0.weight": torch.ones(1, 1, 1, dtype=torch.float64)})
    x = torch.ones(1, 1, dtype=torch.float64)
    assert float(shapley(target, components, x)) == pytest.approx(0.75)
    assert float(path_shapley(target, components, x, n_samples=2)) == pytest.approx(0.5)
    assert float(integrated_gradients(target, components, x, n_steps=1000, method="riemann_middle")) == pytest.approx(
        0.75
    )


def test_every_second_coalition_is_the_complement_of_the_one_before() -> None:
    """With one output that is the sum of squares of gates, the slopes show the gates: 2 g_c at 0 and at 1."""
    target = nn.Sequential(nn.Linear(4, 4, bias=False))
    target.append(apd.rules.TransposedLinear(target[0]))
    target.double()
    with torch.no_grad():
        target[0].weight.copy_(torch.eye(4))
    P = torch.diag_embed(torch.eye(4, dtype=torch.float64))
    components = apd.Components.from_matrices({"0.weight": P})
    x = torch.ones(1, 4, dtype=torch.float64)
    fixed = {"per_output": True, "remainder": False}
    sizes = []
    for seed in range(40):
        runs = [
            path_shapley(target, components, x, n_samples=n, generator=torch.Generator().manual_seed(seed), **fixed)
            for n in (1, 2)
        ]
        first = runs[0][0].diagonal() / 2
        assert set(first.tolist()) <= {0.0, 1.0}
        torch.testing.assert_close(runs[1][0].diagonal(), torch.ones(4, dtype=torch.float64))
        sizes.append(int(first.sum()))
    assert set(sizes) == {0, 1, 2, 3, 4}, "q is drawn anew each time: coalitions of all sizes are equally likely"
    assert all(2 <= sizes.count(s) <= 16 for s in range(5))


def test_the_generator_decides_the_draws() -> None:
    one = case("mlp")
    x, components = one.x(), one.components(C=6)
    for function in (shapley, path_shapley):

        def drawn(seed: int, function: object = function) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            return function(one.network, components, x, n_samples=2, generator=generator)  # type: ignore[operator]

        assert torch.equal(drawn(0), drawn(0))
        assert not torch.allclose(drawn(0), drawn(1))


def test_no_more_derivatives_are_held_at_a_time_than_numbers_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 restarts x 2 components x 5 outputs are 20 numbers a sample: 5 samples of at most 100 numbers."""
    coalitions = import_module("apd_minimal.attributions.coalitions")  # its name in the package is a function
    one, seen = case("tms"), list[int]()
    monkeypatch.setattr(coalitions, "NUMBERS", 100)
    game = coalitions.Game(one.network, one.components(C=2, restarts=2), True, None)

    def noted(part: Tensor) -> tuple[Tensor]:
        seen.append(len(part))
        return (part[None],)

    x = one.x(13)
    assert torch.equal(game.over_samples(noted, x)[0][0], x)
    assert seen == [5, 5, 3]
