"""Ablation against brute force (functional_call, weights for each sample), activation against the layers by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracles import Case, case, every_case, gated, linear, worth
from torch import Tensor, nn

import apd_minimal as apd
from apd_minimal.attributions import ablation, activation

starts = pytest.mark.parametrize("start", ["all", "none"])
both = pytest.mark.parametrize("remainder", [True, False])


def by_force(one: Case, components: apd.Components, x: Tensor, start: str, remainder: bool) -> Tensor:
    """Outputs with the component less those without, one component after the other: [B, C, n_out]."""
    C = components.n_components
    effects = []
    for c in range(C):
        without = torch.ones(C, dtype=torch.float64) if start == "all" else torch.zeros(C, dtype=torch.float64)
        with_it = without.clone()
        without[c], with_it[c] = 0, 1
        low, high = worth(one, components, x, torch.stack([without, with_it]), remainder)
        effects.append(high - low)
    return torch.stack(effects, dim=1)


@every_case
@starts
@both
def test_ablation_is_a_run_without_the_component(name: str, start: str, remainder: bool) -> None:
    one = case(name)
    x, components = one.x(batch=3), one.components(C=3)
    expected = by_force(one, components, x, start, remainder)
    got = ablation(one.target, components, x, start=start, remainder=remainder, per_output=True)
    torch.testing.assert_close(got, expected)
    got = ablation(one.target, components, x, start=start, remainder=remainder)
    torch.testing.assert_close(got, expected.square().mean(-1).sqrt())


@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from(["all", "none"]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_over_random_networks(d: int, h: int, n_out: int, C: int, start: str, remainder: bool, seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        target = nn.Sequential(nn.Linear(d, h), nn.ReLU(), nn.Linear(h, n_out))
    one = Case(target, {"0.weight": linear, "2.weight": linear}, lambda b, g: torch.randn(b, d, generator=g).double())
    x, components = one.x(2, seed), one.components(C, seed=seed, m=2)
    got = ablation(target, components, x, start=start, remainder=remainder, per_output=True)
    torch.testing.assert_close(got, by_force(one, components, x, start, remainder))


def test_gates_that_samples_share_are_the_same_as_each_samples_own() -> None:
    """The network's own gates, one row a sample, against those that are one set of weights."""
    one = case("sequence")
    x, components = one.x(), one.components()
    gates = 1 - torch.eye(3, dtype=torch.float64)[1].expand(4, 3)
    gone = one.network(x, components, gates, remainder=True)
    torch.testing.assert_close(gone, gated(one, components, dict.fromkeys(one.stored, gates), x, remainder=True))
    expected = (one.network(x) - gone).flatten(1)
    torch.testing.assert_close(ablation(one.network, components, x, per_output=True)[:, 1], expected)


def test_early_components_and_an_empty_network() -> None:
    """With the remainder off the component model is what they are removed from, however little it does."""
    target = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Tanh(), nn.Linear(5, 2, bias=False))
    one = Case(target, {"0.weight": linear, "2.weight": linear}, lambda b, g: torch.randn(b, 3, generator=g).double())
    x, small = one.x(), one.components().map(lambda t: 1e-3 * t)
    with_remainder, without = ablation(target, small, x), ablation(target, small, x, remainder=False)
    assert (without < 1e-3 * with_remainder).all(), "both layers nearly empty: a product of two small things"


@both
def test_activation_is_the_length_of_what_a_component_adds(remainder: bool) -> None:
    one = case("mlp")
    x, components = one.x(), one.components()
    P, Q = components.matrices("0.weight"), components.matrices("2.weight")
    first = one.target[0].weight.T if remainder else P.sum(0)
    hidden = torch.tanh(x @ first + one.target[0].bias)
    squares = torch.einsum("bi,cio->bco", x, P).square().sum(-1) + torch.einsum("bh,cho->bco", hidden, Q).square().sum(
        -1
    )
    asked = {} if remainder else {"remainder": False}  # the target itself, unless one says otherwise
    torch.testing.assert_close(activation(one.network, components, x, **asked), squares.sqrt().detach())


def test_activation_counts_every_use_of_a_tied_weight() -> None:
    one = case("tms")
    x, components = one.x(), one.components()
    P = components.matrices("encode.weight")  # [C, 5, 2]
    hidden = one.target.encode(x)
    squares = torch.einsum("bi,cih->bch", x, P).square().sum(-1) + torch.einsum("bh,cih->bci", hidden, P).square().sum(
        -1
    )
    torch.testing.assert_close(activation(one.network, components, x), squares.sqrt().detach())


def test_activation_sums_over_positions() -> None:
    one = case("conv1d")
    x, components = one.x(), one.components()
    layer = one.target[0]
    squares = torch.zeros(4, 3, dtype=torch.float64)
    hidden = torch.tanh(layer(x))
    for c in range(3):
        P, Q = (one.stored[path](components.matrices(path)[c]) for path in one.stored)
        squares[:, c] += F.conv1d(x, P, None, layer.stride, layer.padding, layer.dilation).square().sum((1, 2))
        squares[:, c] += F.conv1d(hidden, Q).square().sum((1, 2)).detach()
    torch.testing.assert_close(activation(one.network, components, x), squares.sqrt())


def test_activation_counts_what_is_lost_on_the_way() -> None:
    """Behind a ReLU that is off nothing comes out: activation alone does not see that."""
    target = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU()).double()
    with torch.no_grad():
        target[0].weight.fill_(-2.0)
    components = apd.Components.from_matrices({"0.weight": torch.full((1, 1, 1), -2.0, dtype=torch.float64)})
    x = torch.ones(1, 1, dtype=torch.float64)
    assert float(activation(target, components, x)) == pytest.approx(2)
    assert float(ablation(target, components, x)) == pytest.approx(0, abs=1e-12)
