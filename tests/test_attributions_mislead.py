"""Small networks in which the attributions part ways, with values worked out by hand.

A component can matter and have no gradient (a softmax at its limit, a gate that is off, a twin that does its job), or
have a gradient and not be meant (mixing, cancellation).
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import apd_minimal as apd
from apd_minimal.attributions import ablation, gradient, integrated_gradients, path_shapley, shapley

ONE = torch.ones(1, 1, dtype=torch.float64)
many_steps = partial(integrated_gradients, n_steps=2000, method="riemann_middle", per_output=True)
shapley_values = partial(shapley, per_output=True)
removal = partial(ablation, per_output=True)
addition = partial(ablation, start="none", per_output=True)
slope = partial(gradient, per_output=True)


def components(**matrices: list[list[list[float]]]) -> apd.Components:
    """Matrices [C, d_in, d_out] for the weight of each named layer."""
    return apd.Components.from_matrices(
        {f"{name}.weight": torch.tensor(P, dtype=torch.float64) for name, P in matrices.items()}
    )


def given_weights(target: nn.Module, parts: apd.Components) -> apd.Network:
    """The target with the sum of the components for its weights."""
    target.double()
    with torch.no_grad():
        for path in parts.paths:
            target.get_parameter(path).copy_(parts.sum(path).T)
    return apd.Network(target, parts.paths)


def check(found: Tensor, *expected: float, tolerance: float = 1e-3) -> None:
    """One sample, one output."""
    torch.testing.assert_close(found[0, :, 0], torch.tensor(expected).double(), atol=tolerance, rtol=0)


class Attention(nn.Module):
    """One query chooses between two tokens, of scores s and -s; the first token's value is 1, the other's 0."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        s = self.score(x)
        return torch.cat([s, -s], dim=1).softmax(1)[:, :1]


def test_saturated_attention() -> None:
    """sigmoid(2 s) at s = 20: nothing moves it, although it would be a coin toss without the component."""
    parts = components(score=[[[20.0]]])
    network = given_weights(Attention(), parts)
    check(slope(network, parts, ONE), 0.0, tolerance=1e-12)
    for method in (removal, addition, shapley_values, many_steps):
        check(method(network, parts, ONE), 0.5)


class Gated(nn.Module):
    """A gated linear unit of one number: value times sigmoid(gate)."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.value(x) * torch.sigmoid(self.gate(x))


def test_a_gate_that_is_off() -> None:
    """Component 0 is the value 1, component 1 shuts the gate at -30: worth 0, 1/2, 0, 0 for none, 0, 1, both."""
    parts = components(value=[[[1.0]], [[0.0]]], gate=[[[0.0]], [[-30.0]]])
    network = given_weights(Gated(), parts)
    check(slope(network, parts, ONE), 0.0, 0.0, tolerance=1e-10)
    check(removal(network, parts, ONE), 0.0, -0.5)
    check(addition(network, parts, ONE), 0.5, 0.0)
    check(shapley_values(network, parts, ONE), 0.25, -0.25)


def test_a_relu_that_is_off() -> None:
    """relu(g_0 - 3 g_1): worth 0, 1, 0, 0. On the straight path it is never on: integrated gradients see nothing."""
    parts = components(**{"0": [[[1.0]], [[-3.0]]]})
    network = given_weights(nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU()), parts)
    check(slope(network, parts, ONE), 0.0, 0.0, tolerance=0)
    check(many_steps(network, parts, ONE), 0.0, 0.0, tolerance=0)
    check(removal(network, parts, ONE), 0.0, -1.0)
    check(addition(network, parts, ONE), 1.0, 0.0)
    check(shapley_values(network, parts, ONE), 0.5, -0.5)
    # Its mean is 1/6 and -1/2: of the four coalitions only {0}, which comes once in six draws, has a slope.
    generator = torch.Generator().manual_seed(0)
    many = path_shapley(network, parts, ONE, n_samples=4000, per_output=True, generator=generator)
    check(many, 1 / 6, -1 / 2, tolerance=0.08)


def test_redundancy() -> None:
    """min(g_0 + g_1, 1): either does the whole job, so neither is missed."""
    parts = components(**{"0": [[[1.0]], [[1.0]]]})
    network = given_weights(nn.Sequential(nn.Linear(1, 1, bias=False), nn.Hardtanh(0, 1)), parts)
    check(slope(network, parts, ONE), 0.0, 0.0, tolerance=0)
    check(removal(network, parts, ONE), 0.0, 0.0, tolerance=0)
    check(addition(network, parts, ONE), 1.0, 1.0)
    check(shapley_values(network, parts, ONE), 0.5, 0.5)
    check(many_steps(network, parts, ONE), 0.5, 0.5)


def test_linear_mixing_counts_as_use() -> None:
    """Features at an angle: only feature 0 is on, yet component 1 reads 0.6 of it, by every method."""
    parts = components(encode=[[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.6, 0.8]]])
    target = nn.Sequential()
    target.add_module("encode", nn.Linear(2, 2, bias=False))
    target.add_module("decode", apd.rules.TransposedLinear(target.encode))
    network = given_weights(target, parts)
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    for method, expected in [  # outputs g_0^2 and 0.6 g_0 g_1
        (slope, [[2.0, 0.6], [0.0, 0.6]]),
        (removal, [[1.0, 0.6], [0.0, 0.6]]),
        (addition, [[1.0, 0.0], [0.0, 0.0]]),
        (shapley_values, [[1.0, 0.3], [0.0, 0.3]]),
        (many_steps, [[1.0, 0.3], [0.0, 0.3]]),
    ]:
        torch.testing.assert_close(method(network, parts, x)[0], torch.tensor(expected).double())


def test_cancellation() -> None:
    """5 - 4 = 1: two components that mostly undo each other have large attributions by every method."""
    parts = components(**{"0": [[[5.0]], [[-4.0]]]})
    network = given_weights(nn.Sequential(nn.Linear(1, 1, bias=False)), parts)
    for method in (slope, removal, addition, shapley_values, many_steps):
        check(method(network, parts, ONE), 5.0, -4.0)
    together = components(**{"0": [[[1.0]]]})
    for method in (slope, removal, addition, shapley_values, many_steps):
        check(method(network, together, ONE), 1.0)


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.0])
def test_what_the_remainder_holds_is_not_attributed(scale: float) -> None:
    """Components that hold a share of a weight get that share; the rest stays where they are removed."""
    parts = components(**{"0": [[[2.0]], [[3.0]]]})
    network = given_weights(nn.Sequential(nn.Linear(1, 1, bias=False)), parts)
    share = parts.map(lambda t: scale**0.5 * t)
    for method in (slope, removal, addition, shapley_values, many_steps):
        check(method(network, share, ONE), 2 * scale, 3 * scale)
