"""Gradient attributions against whole Jacobians: one pass of each kind, every option."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import Case, attributed, case, every_case, linear, with_weights
from torch import Tensor, nn
from torch.func import jacrev

import apd_minimal as apd
from apd_minimal.attributions import capture as capturing
from apd_minimal.attributions import gradient
from apd_minimal.attributions.capture import capture
from apd_minimal.attributions.choose import cheapest

every_mode = (*apd.attributions.MODES, None)
all_modes = pytest.mark.parametrize("mode", every_mode)
both_points = pytest.mark.parametrize("at", ["target", "components"])


@every_case
@both_points
def test_all_modes_are_the_jacobian_met_with_the_components(name: str, at: str) -> None:
    one = case(name)
    x, components = one.x(batch=3), one.components(C=2)
    expected = attributed(one, components, x, at)
    for mode in every_mode:
        signed = gradient(one.target, components, x, at=at, mode=mode, per_output=True)
        torch.testing.assert_close(signed, expected)
        got = gradient(one.network, components, x, at=at, mode=mode)
        torch.testing.assert_close(got, expected.square().mean(-1).sqrt())
        assert not got.requires_grad


@pytest.mark.parametrize("name", ["mlp", "tms with identity", "tied embedding", "conv2d", "sequence"])
@both_points
@all_modes
def test_restarts_are_attributed_as_if_alone(name: str, at: str, mode: str | None) -> None:
    one = case(name)
    x, components = one.x(batch=3), one.components(C=2, restarts=3)
    got = gradient(one.network, components, x, at=at, mode=mode, per_output=True)
    expected = torch.stack([attributed(one, components.restart(r), x, at) for r in range(3)])
    torch.testing.assert_close(got, expected)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_over_random_shapes(d_in: int, hidden: int, n_out: int, C: int, m: int, at_target: bool) -> None:
    target = nn.Sequential(nn.Linear(d_in, hidden), nn.Sigmoid(), nn.Linear(hidden, n_out))
    one = Case(
        target, {"0.weight": linear, "2.weight": linear}, lambda b, g: torch.randn(b, d_in, generator=g).double()
    )
    x, components = one.x(2), one.components(C, m=m)
    at = "target" if at_target else "components"
    expected = attributed(one, components, x, at)
    for mode in ("forward", "backward"):
        torch.testing.assert_close(gradient(target, components, x, at=at, mode=mode, per_output=True), expected)


@both_points
@pytest.mark.parametrize("restarts", [None, 2])
def test_per_position_is_the_derivative_by_gates_at_that_position(at: str, restarts: int | None) -> None:
    """The Jacobian with respect to gates per position, written with the gated network itself."""
    one = case("sequence")
    x, components = one.x(batch=2), one.components(C=2, restarts=restarts)
    got = gradient(one.network, components, x, at=at, per_position=True, per_output=True)
    for r in range(restarts or 1):
        alone = components if restarts is None else components.restart(r)
        for b in range(2):

            def run(g: Tensor, alone: apd.Components = alone, b: int = b) -> Tensor:
                return one.network(x[b : b + 1], alone, g[None], remainder=at == "target").flatten()

            expected = jacrev(run)(torch.ones(4, 2, dtype=torch.float64))  # [n_out, T, C]
            part = got[b] if restarts is None else got[r, b]
            torch.testing.assert_close(part, expected.permute(1, 2, 0))
    signed = gradient(one.network, components, x, at=at, per_output=True)
    torch.testing.assert_close(got.sum(-3), signed)


def test_per_position_where_most_outputs_are_at_rest() -> None:
    """By hand: an output at one position has a derivative there alone, if it is on."""
    target = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    with torch.no_grad():
        target[0].bias.copy_(torch.tensor([-100.0, 0.0, -100.0, -100.0]))
    one = Case(target, {"0.weight": linear}, lambda b, g: torch.randn(b, 2, 3, generator=g).double())
    x, components = one.x(6), one.components(C=40)
    moved = torch.einsum("bti,cio->btco", x, components.matrices("0.weight")) * (target(x) > 0)[:, :, None]
    expected = torch.zeros(6, 2, 40, 2, 4, dtype=torch.float64)
    for t in range(2):
        expected[:, t, :, t] = moved[:, t]
    got = gradient(one.network, components, x, per_position=True, per_output=True)
    torch.testing.assert_close(got, expected.flatten(-2))


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@both_points
@all_modes
def test_the_internal_batch_size_changes_nothing(size: int, at: str, mode: str | None) -> None:
    for name, restarts in [("conv1d", None), ("sequence", 2)]:
        one = case(name)
        x, components = one.x(batch=5), one.components(restarts=restarts)
        whole = gradient(one.network, components, x, at=at, mode=mode)
        parts = gradient(one.network, components, x, at=at, mode=mode, internal_batch_size=size)
        torch.testing.assert_close(parts, whole)


def test_nor_do_probes_depend_on_it() -> None:
    one = case("mlp")
    x, components = one.x(batch=5), one.components()

    def probed(size: int | None) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return gradient(one.network, components, x, n_probes=3, internal_batch_size=size, generator=generator)

    torch.testing.assert_close(probed(2), probed(None))


@both_points
def test_probes_have_the_right_mean_and_variance(at: str) -> None:
    """Squared estimates: mean |J|^2 / n_out, variance 2 (|J|^4 - sum_o J_o^4) / (r n_out^2)."""
    one = case("tms")
    C, r, n, n_out = 3, 4, 20_000, 5
    components = one.components(C)
    x = one.x(batch=1)
    J = attributed(one, components, x, at)[0]  # [C, n_out]
    many = x.expand(n, -1)
    generator = torch.Generator().manual_seed(0)
    estimates = gradient(one.network, components, many, at=at, n_probes=r, generator=generator).square()
    mean = J.square().mean(-1)
    variance = 2 * (J.square().sum(-1).square() - J.pow(4).sum(-1)) / (r * n_out**2)
    assert (variance > 0).all()
    error = (estimates.mean(0) - mean).abs() / (variance / n).sqrt()
    assert (error < 4).all(), error
    ratio = estimates.var(0) / variance
    assert ((ratio - 1).abs() < 0.1).all(), ratio


def test_probes_are_exact_where_a_component_moves_one_output() -> None:
    target = nn.Linear(3, 4).double()
    P = torch.zeros(4, 3, 4, dtype=torch.float64)
    P[range(4), :, range(4)] = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    components = apd.Components.from_matrices({"weight": P})
    x = torch.rand(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = gradient(target, components, x, n_probes=1, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(got, gradient(target, components, x))


def test_one_linear_layer_by_hand() -> None:
    """The derivative of x W along P is x P, whatever W is."""
    target = nn.Linear(3, 2).double()
    components = apd.Components.random({"weight": (3, 2)}, 5, generator=torch.Generator().manual_seed(0))
    components = components.map(Tensor.double)
    x = torch.rand(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.einsum("bi,cio->bco", x, components.matrices("weight")).square().mean(-1).sqrt()
    for mode in ("forward", "backward"):
        torch.testing.assert_close(gradient(target, components, x, mode=mode), expected)


def test_a_small_step_along_the_component_moves_the_outputs_so_much() -> None:
    """Central differences: an oracle without automatic differentiation."""
    one = case("sequence")
    one.target.eval()
    x, components, h = one.x(), one.components(), 1e-5
    signed = gradient(one.network, components, x, per_output=True)
    for c in range(3):

        def at(step: float, c: int = c) -> Tensor:
            weights = {
                path: one.target.get_parameter(path).detach() + step * stored(components.matrices(path)[c])
                for path, stored in one.stored.items()
            }
            return with_weights(one.target, weights, x).flatten(1).detach()

        torch.testing.assert_close(signed[:, c], (at(h) - at(-h)) / (2 * h), atol=1e-7, rtol=1e-6)


def test_a_padding_row_counts_although_training_would_not_move_it() -> None:
    """Automatic differentiation gives a padding row no gradient; yet the outputs depend on it."""
    target = nn.Sequential(nn.Embedding(4, 3, padding_idx=0), nn.Linear(3, 2)).double()
    tokens = torch.tensor([[0, 1], [0, 0]])
    components = apd.Components.from_matrices({"0.weight": torch.ones(1, 4, 3, dtype=torch.float64)})
    expected = target[1].weight.sum(1).square().expand(2, 2, 2)
    for mode in ("forward", "backward"):
        signed = gradient(target, components, tokens, mode=mode, per_output=True)
        torch.testing.assert_close(signed.reshape(2, 2, 2).square(), expected)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("large", [0, 2**60])
def test_outputs_that_do_not_depend_on_a_layer(apart: bool, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that is run but does not reach the outputs adds nothing, also where shared gradients are looked for."""
    monkeypatch.setattr(capturing, "LARGE", large)

    class Side(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.side = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.main(x), self.side(x)

    outputs = (lambda y: y[0]) if apart else (lambda y: torch.cat(y, 1)[:, :2])
    network = apd.Network(Side(), ["main.weight", "side.weight"], output=outputs)
    one = Case(Side(), {"main.weight": linear, "side.weight": linear}, lambda b, g: torch.randn(b, 3).double())
    components, x = one.components(), torch.ones(1, 3, dtype=torch.float64)
    expected = (x @ components.matrices("main.weight"))[:, 0].square().mean(-1).sqrt()
    for mode in ("forward", "backward"):
        torch.testing.assert_close(gradient(network, components, x, mode=mode)[0], expected)


def test_kernels_without_a_forward_mode_take_the_backward_one() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.lstm = nn.Linear(3, 3), nn.LSTM(3, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(self.first(x))[0][:, -1]

    network = apd.Network(Reads(), ["first.weight"])
    components = apd.Components.random(network.shapes, 1)
    x = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"does not have this target's gradients.*without a forward mode"):
        gradient(network, components, x, mode="forward")
    torch.testing.assert_close(gradient(network, components, x), gradient(network, components, x, mode="backward"))


def test_the_graph_of_the_caller_and_no_grad_do_not_matter() -> None:
    one = case("mlp")
    x, components = one.x(), one.components()
    expected = gradient(one.network, components, x)
    leaves = components.map(lambda t: t.clone().requires_grad_())
    for mode in ("forward", "backward"):
        with torch.no_grad():
            torch.testing.assert_close(gradient(one.network, leaves, x, mode=mode), expected)
        torch.testing.assert_close(gradient(one.network, leaves, x, mode=mode), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": "origin"}, "at must be one of .'target', 'components'., got 'origin'"),
        ({"mode": "sideways"}, "mode must be one of .*, got 'sideways'"),
        ({"n_probes": 0}, "n_probes must be at least 1"),
        ({"n_probes": 2, "per_output": True}, "excludes per_output"),
        ({"n_probes": 2, "mode": "forward"}, "need the backward mode"),
        ({"per_position": True, "mode": "forward"}, "need the backward mode"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], message: str) -> None:
    one = case("mlp")
    with pytest.raises(ValueError, match=message):
        gradient(one.network, one.components(), one.x(), **options)  # type: ignore[arg-type]


def test_inputs_that_make_no_sense() -> None:
    one = case("mlp")
    with pytest.raises(ValueError, match="x must hold at least one number"):
        gradient(one.network, one.components(), one.x()[:0])
    components = one.components()
    some = apd.Components({"0.weight": components.A["0.weight"]}, {"0.weight": components.B["0.weight"]})
    with pytest.raises(ValueError, match=r"components of \['0.weight'\], but the network decomposes"):
        gradient(one.network, some, one.x())
    torch.testing.assert_close(gradient(one.target, some, one.x()).shape, torch.Size([4, 3]))
    conv = case("conv2d")
    with pytest.raises(ValueError, match="layers have different numbers of positions"):
        gradient(conv.network, conv.components(), conv.x(), per_position=True)


@pytest.mark.parametrize("restarts", [None, 2])
@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
def test_what_tms_knows_of_itself(identity: bool, rotated: bool, restarts: int | None) -> None:
    """The closed form of a target against the generic attributions."""
    target = apd.targets.TMS(6, 3, identity=identity)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in target.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
        if rotated:
            target.rotate(1)
    _same_as_generic(target, restarts)


@pytest.mark.parametrize("restarts", [None, 2])
@pytest.mark.parametrize("rank", [1, 2, None])
@pytest.mark.parametrize("neurons", [(6,), (5, 4), (3, 4, 5)])
def test_what_the_residual_mlp_knows_of_itself(
    neurons: tuple[int, ...], rank: int | None, restarts: int | None
) -> None:
    """Of low rank the factors are met one after the other, of full rank their product is; both are right."""
    target = apd.targets.ResidualMLP(8, 20, neurons, probability=0.2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in target.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    _same_as_generic(target, restarts, rank)


@pytest.mark.parametrize("rank", [1, None])
def test_what_the_residual_mlp_knows_of_some_of_its_weights(rank: int | None) -> None:
    target = apd.targets.ResidualMLP(8, 20, (5, 4), probability=0.2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in target.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    for n in (1, 2, 3):
        for weights in combinations(target.weights, n):
            _same_as_generic(target, None, rank, list(weights))


def _same_as_generic(
    target: apd.targets.TMS | apd.targets.ResidualMLP,
    restarts: int | None,
    rank: int | None = 2,
    weights: list[str] | None = None,
) -> None:
    network, x = apd.Network(target, weights or target.weights), target.data(300)(0, torch.Generator().manual_seed(0))
    assert (x == 0).all(1).any(), "an empty sample is among them"
    generator = torch.Generator().manual_seed(2)
    components = apd.Components.random(network.shapes, 7, rank, restarts, std=1.0, generator=generator)
    expected = gradient(network, components, x)
    torch.testing.assert_close(target.attributions(network, components, x), expected, rtol=1e-5, atol=1e-5)


class Half(nn.Module):
    """The inputs as they are, and squashed."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.tanh()], dim=1)


@pytest.mark.parametrize(("tail", "shared"), [(nn.Identity(), True), (Half(), False), (nn.Tanh(), False)])
def test_gradients_that_all_samples_share_meet_the_components_once(tail: nn.Module, shared: bool) -> None:
    """Only where every output is linear; the attributions are right in any case."""
    target = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), tail)
    one = Case(target, {"0.weight": linear, "2.weight": linear}, lambda b, g: torch.randn(b, 3, generator=g).double())
    x, components = one.x(5), one.components(C=3)
    captured = capture(one.network, None, x)
    assert [use.deltas.stride(1) == 0 for use in captured] == [False, shared]
    assert {use.deltas.shape[1] for use in captured} == {5}
    signed = gradient(one.network, components, x, mode="backward", per_output=True)
    torch.testing.assert_close(signed, attributed(one, components, x, "target"))


def test_the_mode_follows_the_outputs_that_are_on() -> None:
    """With few of 40 outputs on, sample gradients are least work; with all on, all samples share their gradients."""
    target = apd.targets.TMS(40, 10)
    network, x = apd.Network(target, target.weights), target.data(1024)(0, torch.Generator().manual_seed(0))
    components = apd.Components.random(network.shapes, 50).stacked()
    chosen = []
    for bias in (-0.5, 5.0):
        with torch.no_grad():
            target.bias.fill_(bias)
            target.encode.weight.copy_(torch.eye(10, 40) + 0.01)
        chosen.append(cheapest(network, components, None, x))
    assert chosen == ["sample_gradients", "backward"]


@pytest.mark.parametrize(("tail", "mode"), [(nn.Identity(), "backward"), (nn.Tanh(), "forward")])
def test_the_mode_follows_the_gradients_that_are_shared(tail: nn.Module, mode: str) -> None:
    """With many outputs tangents are less work than a pass for each, but not if these are linear."""
    target = nn.Sequential(nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 40), tail)
    network = apd.Network(target, ["0.weight", "2.weight"])
    components = apd.Components.random(network.shapes, 50).stacked()
    assert cheapest(network, components, None, torch.randn(4000, 10)) == mode


def test_the_hash_seed_decides_nothing() -> None:
    """Another process gives the same bits: else a run that was stopped would not go on as it would have."""
    script = """
import hashlib, torch, apd_minimal as apd
torch.set_num_threads(1)
torch.manual_seed(0)
layers = [torch.nn.Linear(6, 6) for _ in range(5)]
net = torch.nn.Sequential(*[module for layer in layers for module in (layer, torch.nn.ReLU())])
network = apd.Network(net, [f"{2 * i}.weight" for i in range(5)])
components = apd.Components.random(network.shapes, 4, generator=torch.Generator().manual_seed(1))
x = torch.randn(20, 6, generator=torch.Generator().manual_seed(2))
scores = [apd.attributions.gradient(network, components, x, mode=mode) for mode in apd.attributions.MODES]
print(*(hashlib.sha256(s.numpy().tobytes()).hexdigest() for s in scores))
"""
    said = {
        subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True,
            check=True,
        ).stdout
        for seed in "1234"
    }  # fmt: skip
    assert len(said) == 1


@all_modes
def test_restarts_of_a_single_component_are_attributed_as_if_alone(mode: str | None) -> None:
    one = case("mlp")
    x, components = one.x(batch=3), one.components(C=1, restarts=2)
    got = gradient(one.network, components, x, mode=mode, per_output=True)
    expected = torch.stack([attributed(one, components.restart(r), x, "target") for r in range(2)])
    torch.testing.assert_close(got, expected)


@all_modes
def test_attributions_of_restarts_lie_in_one_piece_of_memory(mode: str | None) -> None:
    """A reader may `view` them, whichever way was taken."""
    target = apd.targets.TMS(40, 10)
    x = target.data(64)(0, torch.Generator().manual_seed(0))
    network = apd.Network(target, target.weights)
    assert gradient(network, apd.Components.random(network.shapes, 5, restarts=2), x, mode=mode).is_contiguous()
