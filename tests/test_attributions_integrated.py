"""Integrated gradients against whole Jacobians, closed forms and their axiom."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import Case, case, every_case, linear, slopes, worth
from torch import Tensor, nn

import apd_minimal as apd
from apd_minimal.attributions import METHODS, ablation, coalitions, gradient, integrated_gradients, shapley
from apd_minimal.attributions.integrated import quadrature

both = pytest.mark.parametrize("remainder", [True, False])
ENDS = torch.tensor([[0.0], [1.0]], dtype=torch.float64)


@every_case
@both
def test_all_modes_are_the_mean_of_jacobians(name: str, remainder: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    one = case(name)
    x, components = one.x(batch=3), one.components(C=2)
    alphas, shares = quadrature("gausslegendre", 3)
    points = [slopes(one, components, x, alpha.expand(2), remainder) for alpha in alphas]
    expected = torch.einsum("k,kbco->bco", shares, torch.stack(points))
    for mode in apd.attributions.MODES:
        monkeypatch.setattr(coalitions, "cheapest", lambda *args, mode=mode: mode)
        got = integrated_gradients(one.target, components, x, n_steps=3, remainder=remainder, per_output=True)
        torch.testing.assert_close(got, expected)


@every_case
@both
def test_completeness_per_signed_output(name: str, remainder: bool) -> None:
    """The values sum over components to what the path gains; by how much they fail to is said for any `n_steps`."""
    one = case(name)
    x, components = one.x(batch=3), one.components(C=3).map(lambda t: 0.7 * t)
    start, end = worth(one, components, x, ENDS.expand(2, 3), remainder)
    for n_steps, close in [(2, False), (60, True)]:
        signed, delta = integrated_gradients(
            one.network,
            components,
            x,
            n_steps=n_steps,
            remainder=remainder,
            per_output=True,
            return_convergence_delta=True,
        )
        torch.testing.assert_close(delta, signed.sum(1) - (end - start))
        smooth = not name.endswith("tms") and name != "tms with identity"
        if close and smooth:
            torch.testing.assert_close(delta, torch.zeros_like(delta), atol=1e-6, rtol=0)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 5), st.booleans(), st.integers(0, 10**6))
def test_completeness_over_random_networks(d: int, h: int, n_out: int, C: int, remainder: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    target = nn.Sequential(nn.Linear(d, h), nn.Tanh(), nn.Linear(h, n_out))
    one = Case(target, {"0.weight": linear, "2.weight": linear}, lambda b, g: torch.rand(b, d, generator=g).double())
    with torch.no_grad():
        for p in target.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1])
    components = one.components(C, seed=seed).map(lambda t: 0.3 * t)
    x = one.x(2, seed)
    start, end = worth(one, components, x, ENDS.expand(2, C), remainder)
    signed = integrated_gradients(target, components, x, n_steps=24, remainder=remainder, per_output=True)
    torch.testing.assert_close(signed.sum(1), end - start, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_quadratures_are_exact_as_far_as_theirs_go(n: int) -> None:
    """Means of alpha^k: exact below degree 2n for Gauss-Legendre, 2 for middle and trapezoid, 1 for left and right."""
    for method in METHODS:
        if method == "riemann_trapezoid" and n == 1:
            continue
        alphas, shares = quadrature(method, n)
        assert len(alphas) == len(shares) == n
        assert ((alphas >= 0) & (alphas <= 1)).all()
        degree = {"gausslegendre": 2 * n, "riemann_middle": 2, "riemann_trapezoid": 2}.get(method, 1)
        for k in range(degree + 1):
            error = float(shares @ alphas**k) - 1 / (k + 1)
            assert (abs(error) < 1e-12) == (k < degree), (method, k)
    assert float(quadrature("riemann_left", n)[0][0]) == 0
    assert float(quadrature("riemann_right", n)[0][-1]) == 1


def test_by_hand_where_the_output_is_a_product_of_gates() -> None:
    """TMS without bias and with positive inputs: out_o = sum_c g_c g_o x_c (w_c . w_o), shared half and half."""
    target = apd.targets.TMS(2, 2)
    with torch.no_grad():
        target.encode.weight.copy_(torch.tensor([[1.0, 0.6], [0.0, 0.8]]))
        target.bias.zero_()
    components = apd.Components.from_matrices(target.mechanisms())
    x = torch.tensor([[1.0, 0.0]])
    got = integrated_gradients(target, components, x, n_steps=2, per_output=True)
    torch.testing.assert_close(got[0], torch.tensor([[1.0, 0.3], [0.0, 0.3]]))


def test_layer_norm_near_zero_weights_needs_many_steps() -> None:
    """LayerNorm forgets the length of what goes in, so that all of the way happens where alpha is about sqrt(eps).

    For u = alpha W x of two entries +-a, the normalised entries are +-alpha a / sqrt(alpha^2 a^2 + eps): at the end
    of the path +-1, and their slopes are next to nothing but close to zero.
    """
    target = nn.Sequential(nn.Linear(1, 2, bias=False), nn.LayerNorm(2, eps=1e-5)).double()
    with torch.no_grad():
        target[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
    components = apd.Components.from_matrices({"0.weight": torch.tensor([[[1.0, -1.0]]], dtype=torch.float64)})
    network = apd.Network(target, ["0.weight"])
    x = torch.ones(1, 1, dtype=torch.float64)
    gain = 1 / math.sqrt(1 + 1e-5)
    errors = []
    for n_steps in (8, 50, 400):
        signed, delta = integrated_gradients(
            network, components, x, n_steps=n_steps, per_output=True, return_convergence_delta=True
        )
        torch.testing.assert_close(delta[0], signed[0, 0] - torch.tensor([gain, -gain], dtype=torch.float64))
        errors.append(float(delta.abs().max()) / gain)
    assert errors[0] > 0.9, "eight steps miss nearly all of it, and say so"
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3
    assert float(gradient(network, components, x).max()) < 1e-4, "where the path ends there is no slope"
    torch.testing.assert_close(ablation(network, components, x)[0, 0], torch.tensor(gain, dtype=torch.float64))
    torch.testing.assert_close(shapley(network, components, x)[0, 0], torch.tensor(gain, dtype=torch.float64))


def test_its_last_point_is_the_gradient() -> None:
    """One step of the right rule stands at the end of the path."""
    one = case("sequence")
    x, components = one.x(), one.components(restarts=2)
    for remainder, at in [(True, "target"), (False, "components")]:
        got = integrated_gradients(
            one.network, components, x, n_steps=1, method="riemann_right", remainder=remainder, per_output=True
        )
        torch.testing.assert_close(got, gradient(one.network, components, x, at=at, per_output=True))


def test_a_path_that_removes_one_component_alone_gives_its_ablation() -> None:
    one = case("mlp")
    x, components, C = one.x(), one.components(C=3).map(lambda t: 0.7 * t), 3
    alphas, shares = quadrature("gausslegendre", 40)
    for remainder in (True, False):
        for start in ("all", "none"):
            expected = ablation(one.network, components, x, start=start, remainder=remainder, per_output=True)
            players = coalitions.Game(one.network, components, remainder, None)
            for c in range(C):
                gates = torch.ones(40, C, dtype=torch.float64) if start == "all" else torch.zeros(40, C).double()
                gates[:, c] = alphas
                along = players.slopes(x, gates, shares)[0]  # [B, C, n_out]
                torch.testing.assert_close(along[:, c], expected[:, c])


def test_gradients_along_an_order_give_the_marginals_of_that_order() -> None:
    """Gate after gate turned from 0 to 1: the slopes by the gate that turns sum to what its component adds."""
    one = case("mlp")
    x, components, C = one.x(), one.components(C=4).map(lambda t: 0.7 * t), 4
    alphas, shares = quadrature("gausslegendre", 40)
    order = torch.tensor([2, 0, 3, 1])
    players = coalitions.Game(one.network, components, True, None)

    def along(order: Tensor) -> Tensor:
        marginals = torch.zeros(len(x), C, 2, dtype=torch.float64)
        for k, c in enumerate(order.tolist()):
            gates = torch.zeros(40, C, dtype=torch.float64)
            gates[:, order[:k]] = 1
            gates[:, c] = alphas
            marginals[:, c] = players.slopes(x, gates, shares)[0][:, c]
        return marginals

    both = (along(order) + along(order.flip(0))) / 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", lambda n, generator=None: order)
        sampled = shapley(one.network, components, x, n_samples=2, per_output=True)
    torch.testing.assert_close(both, sampled)
