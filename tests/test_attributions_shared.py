"""What all attributions have in common: layout, restarts, batches, errors, their place in `decompose`, captum."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import captum.attr
import pytest
import runs
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import Case, assert_same_state, case, state
from torch import Tensor, nn

import apd_minimal as apd
from apd_minimal.attributions import (
    METHODS,
    ablation,
    activation,
    coalitions,
    gradient,
    integrated_gradients,
    path_shapley,
    shapley,
)


def seeded(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """With the same random draws on every call."""
    return lambda *args, **options: function(*args, **options, generator=torch.Generator().manual_seed(0))


EVERY: dict[str, Callable[..., Tensor]] = {
    "integrated": partial(integrated_gradients, n_steps=5),
    "integrated, no remainder": partial(integrated_gradients, n_steps=3, method="riemann_right", remainder=False),
    "ablation": ablation,
    "addition, no remainder": partial(ablation, start="none", remainder=False),
    "exact shapley": shapley,
    "sampled shapley": seeded(partial(shapley, n_samples=4)),
    "path shapley": seeded(partial(path_shapley, n_samples=5)),
    "activation": activation,
    "activation, no remainder": partial(activation, remainder=False),
}
WITH_OUTPUTS = [name for name in EVERY if "activation" not in name]
each = pytest.mark.parametrize("name", EVERY)
each_mode = pytest.mark.parametrize("mode", apd.attributions.MODES)


@each
@pytest.mark.parametrize("network", ["sequence", "tied embedding", "conv2d"])
def test_restarts_are_attributed_as_if_alone(name: str, network: str) -> None:
    one = case(network)
    x, components = one.x(batch=3), one.components(C=3, restarts=2)
    got = EVERY[name](one.network, components, x)
    assert got.shape == (2, 3, 3)
    for r in range(2):
        torch.testing.assert_close(got[r], EVERY[name](one.target, components.restart(r), x))


@each
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_the_internal_batch_size_changes_nothing(name: str, size: int) -> None:
    for network, restarts in [("conv1d", None), ("sequence", 2)]:
        one = case(network)
        x, components = one.x(batch=5), one.components(restarts=restarts)
        parts = EVERY[name](one.network, components, x, internal_batch_size=size)
        torch.testing.assert_close(parts, EVERY[name](one.network, components, x))


@each_mode
@pytest.mark.parametrize("size", [1, 2, 7])
def test_nor_in_any_mode_of_derivatives(mode: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    one = case("sequence")
    x, components = one.x(batch=3), one.components(restarts=2)
    whole = integrated_gradients(one.network, components, x, n_steps=4)
    monkeypatch.setattr(coalitions, "cheapest", lambda *args: mode)
    parts = integrated_gradients(one.network, components, x, n_steps=4, internal_batch_size=size)
    torch.testing.assert_close(parts, whole)


def test_many_numbers_at_once_are_avoided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is said, the rows of one pass follow from what a sample's derivatives take."""
    one = case("sequence")
    x, components = one.x(batch=3), one.components()
    whole = integrated_gradients(one.network, components, x, n_steps=4)
    seen: list[int] = []

    def noted(network: apd.Network, weights: apd.Components, part: Tensor) -> Any:
        seen.append(len(part) * (weights.restarts or 1))
        return original(network, weights, part)

    original = coalitions.capture
    monkeypatch.setattr(coalitions, "capture", noted)
    monkeypatch.setattr(coalitions, "cheapest", lambda *args: "backward")
    per_row = 12 * 4 * (4 + 5 + 3)  # outputs, positions, widths of the three layers
    for rows in (8, 2):
        seen.clear()
        monkeypatch.setattr(coalitions, "NUMBERS", rows * per_row)
        torch.testing.assert_close(integrated_gradients(one.network, components, x, n_steps=4), whole)
        assert max(seen) == rows


@pytest.mark.parametrize("name", WITH_OUTPUTS)
def test_the_default_is_the_root_mean_square_over_outputs(name: str) -> None:
    one = case("sequence")
    x, components = one.x(), one.components()
    signed = EVERY[name](one.network, components, x, per_output=True)
    assert signed.shape == (4, 3, 12)
    assert (signed < 0).any()
    assert (signed > 0).any()
    torch.testing.assert_close(EVERY[name](one.network, components, x), signed.square().mean(-1).sqrt())


@pytest.mark.parametrize("name", WITH_OUTPUTS)
def test_outputs_of_a_sequence_that_count(name: str) -> None:
    """Picking an output is picking its values among those of all."""
    one = case("sequence")
    x, components = one.x(), one.components()
    last = apd.Network(one.target, list(one.stored), output=lambda y: y[:, -1])
    everything = EVERY[name](one.network, components, x, per_output=True).unflatten(-1, (4, 3))
    torch.testing.assert_close(EVERY[name](last, components, x, per_output=True), everything[:, :, -1])


@each
@pytest.mark.parametrize("network", ["sequence", "mlp"])
def test_nothing_of_the_caller_changes(name: str, network: str) -> None:
    one = case(network)
    one.target.train()
    x, components = one.x(), one.components().map(lambda t: t.requires_grad_())
    before = state(one.target)
    got = EVERY[name](one.target, components, x)
    assert not got.requires_grad
    assert_same_state(before, state(one.target))
    with torch.no_grad():
        torch.testing.assert_close(EVERY[name](one.target, components, x), got)


@each
def test_decompose_takes_it(name: str) -> None:
    """Every step asks it about all restarts at once."""
    shapes = []

    def noted(network: apd.Network, components: apd.Components, x: Tensor) -> Tensor:
        scores = EVERY[name](network, components, x)
        shapes.append(scores.shape)
        return scores

    assert runs.decompose(attribution=noted, n_components=4, steps=3).finished
    assert len(shapes) > 3
    assert all(shape == (2, shape[1], 4) for shape in shapes)


def test_and_takes_it_as_a_partial() -> None:
    options = {"n_components": 3, "top_k": 1.0, "steps": 3, "restarts": 2}
    some = runs.decompose(attribution=partial(integrated_gradients, n_steps=1, method="riemann_right"), **options)
    same = runs.decompose(**options)  # the end of the path is the target itself
    for p, q in zip(some.components.parameters(), same.components.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_all_are_equal_where_the_output_is_affine(d: int, n_out: int, C: int, deep: bool, seed: int) -> None:
    """Outputs affine in the gates and the remainder, and components that sum to the target's weights."""
    generator = torch.Generator().manual_seed(seed)
    first = nn.Sequential(nn.Linear(2, d), nn.Tanh()).double() if deep else nn.Identity()
    target = nn.Sequential(first, nn.Linear(d, n_out).double())
    P = torch.randn(C, d, n_out, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        target[1].weight.copy_(P.sum(0).T)
    components = apd.Components.from_matrices({"1.weight": P})
    x = torch.randn(3, 2 if deep else d, generator=generator, dtype=torch.float64)
    expected = torch.einsum("bi,cio->bco", first(x), P).detach()
    for remainder in (True, False):
        fixed = {"remainder": remainder, "per_output": True}
        for got in (
            gradient(target, components, x, at="target" if remainder else "components", per_output=True),
            *(integrated_gradients(target, components, x, n_steps=2, method=m, **fixed) for m in METHODS),
            ablation(target, components, x, **fixed),
            ablation(target, components, x, start="none", **fixed),
            shapley(target, components, x, **fixed),
            shapley(target, components, x, n_samples=2, **fixed),
            path_shapley(target, components, x, n_samples=1, **fixed),
        ):
            torch.testing.assert_close(got, expected)
        lengths = activation(target, components, x, remainder=remainder)
        torch.testing.assert_close(lengths, expected.norm(dim=-1))


def as_forward(one: Case, components: apd.Components, remainder: bool) -> Callable[..., Tensor]:
    """The network as captum wants it: a function of gates [B, C], with the inputs beside them, to [B, n_out]."""
    return lambda gates, x: one.network(x, components, gates, remainder=remainder).flatten(1)


@pytest.mark.parametrize("remainder", [True, False])
@pytest.mark.parametrize("network", ["mlp", "tms", "sequence"])
def test_captum_gives_the_same(network: str, remainder: bool) -> None:
    """Its features are our gates, its input is all of them on, its baseline none."""
    one = case(network)
    x, components = one.x(batch=2), one.components(C=3)
    forward = as_forward(one, components, remainder)
    on = torch.ones(2, 3, dtype=torch.float64)
    n_out = one.network(x).flatten(1).shape[1]
    fixed = {"remainder": remainder, "per_output": True}

    def theirs(way: Any, **options: Any) -> Tensor:
        each = [way.attribute(on, target=o, additional_forward_args=(x,), **options) for o in range(n_out)]
        return torch.stack(each, dim=-1).detach()

    at = "target" if remainder else "components"
    slopes = gradient(one.network, components, x, at=at, per_output=True)
    torch.testing.assert_close(slopes, theirs(captum.attr.Saliency(forward), abs=False))
    removed = ablation(one.network, components, x, **fixed)
    torch.testing.assert_close(removed, theirs(captum.attr.FeatureAblation(forward)))
    values = shapley(one.network, components, x, **fixed)
    theirs_single = theirs(captum.attr.ShapleyValues(forward))  # captum sums them in single precision
    torch.testing.assert_close(values.float(), theirs_single.float(), atol=1e-5, rtol=1e-5)
    for method in METHODS:
        # Captum's trapezoid divides by the number of points instead of the number of gaps between them.
        factor = 6 / 5 if method == "riemann_trapezoid" else 1
        got = integrated_gradients(one.network, components, x, n_steps=6, method=method, **fixed)
        expected = factor * theirs(captum.attr.IntegratedGradients(forward), n_steps=6, method=method)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)  # captum's points are in single precision


def test_captums_convergence_delta_is_ours() -> None:
    one = case("mlp")
    x, components = one.x(batch=2), one.components(C=3)
    on = torch.ones(2, 3, dtype=torch.float64)
    _, delta = integrated_gradients(one.network, components, x, n_steps=3, return_convergence_delta=True)
    assert delta.shape == (2, 2)
    for o in range(2):
        _, expected = captum.attr.IntegratedGradients(as_forward(one, components, True)).attribute(
            on, target=o, additional_forward_args=(x,), n_steps=3, return_convergence_delta=True
        )
        torch.testing.assert_close(delta[:, o], expected.detach(), atol=1e-6, rtol=1e-6)


def test_kernels_without_a_forward_mode_take_the_backward_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.lstm = nn.Linear(3, 3), nn.LSTM(3, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(self.first(x))[0][:, -1]

    network = apd.Network(Reads(), ["first.weight"])
    components = apd.Components.random(network.shapes, 1)
    x = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0))
    expected = integrated_gradients(network, components, x, n_steps=2)
    monkeypatch.setattr(coalitions, "cheapest", lambda *args: "forward")
    torch.testing.assert_close(integrated_gradients(network, components, x, n_steps=2), expected)


@each
def test_what_makes_no_sense_for_any(name: str) -> None:
    one = case("mlp")
    with pytest.raises(ValueError, match="x must hold at least one number"):
        EVERY[name](one.network, one.components(), one.x()[:0])
    with pytest.raises(ValueError, match="internal_batch_size must be at least 1, got 0"):
        EVERY[name](one.network, one.components(), one.x(), internal_batch_size=0)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (integrated_gradients, {"method": "simpson"}, "method must be one of .*, got 'simpson'"),
        (integrated_gradients, {"n_steps": 0}, "n_steps must be at least 1, got 0"),
        (integrated_gradients, {"n_steps": 1, "method": "riemann_trapezoid"}, "n_steps must be at least 2, got 1"),
        (ablation, {"start": "some"}, r"start must be one of \['all', 'none'\], got 'some'"),
        (shapley, {"n_samples": 3}, "n_samples must be even, .*, got 3"),
        (shapley, {"n_samples": 0}, "n_samples must be even, .*, got 0"),
        (shapley, {"return_std_error": True}, "return_std_error needs per_output=True"),
        (shapley, {"return_std_error": True, "per_output": True, "n_samples": 2}, "n_samples of at least 4"),
        (path_shapley, {"n_samples": 0}, "n_samples must be at least 1, got 0"),
    ],
)
def test_options_that_make_no_sense(function: Callable[..., Tensor], options: dict[str, Any], message: str) -> None:
    one = case("mlp")
    with pytest.raises(ValueError, match=message):
        function(one.network, one.components(), one.x(), **options)


@each
def test_components_of_other_weights(name: str) -> None:
    one = case("mlp")
    components = one.components()
    some = apd.Components({"0.weight": components.A["0.weight"]}, {"0.weight": components.B["0.weight"]})
    with pytest.raises(ValueError, match=r"components of \['0.weight'\], but the network decomposes"):
        EVERY[name](one.network, some, one.x())
    # Not wrapped, the target is decomposed in the weights that the components have, in their order.
    swapped = apd.Components(
        {path: components.A[path] for path in reversed(components.paths)},
        {path: components.B[path] for path in reversed(components.paths)},
    )
    torch.testing.assert_close(
        EVERY[name](one.network, swapped, one.x()), EVERY[name](one.network, components, one.x())
    )
