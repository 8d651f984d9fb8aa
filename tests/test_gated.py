"""The hand-coded gated functions against their definition and numpy's interpolation; what each mechanism does alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import apd_minimal as apd
from apd_minimal.targets import GatedFunctions, GatedInputs
from apd_minimal.targets.gated import attribution_shares
from experiments.gated import Rotated

seeds = st.integers(0, 2**31)


def inputs(x: Tensor, *on: int, n: int = 4) -> Tensor:
    """Rows (x, bits) with the bits in `on` at 1."""
    bits = torch.zeros(len(x), n, dtype=x.dtype)
    bits[:, list(on)] = 1
    return torch.cat([x[:, None], bits], dim=1)


def written_out(target: GatedFunctions, x: np.ndarray, i: int) -> np.ndarray:
    """Function i from its coefficients."""
    a, b, c, d, e, f, g = target.coefficients[i].numpy()
    return a * np.cos(b * x + c) + d * np.sin(e * x + f) + g


@given(seed=seeds, neurons=st.integers(2, 12))
def test_exact_at_the_knots_and_off_without_the_bit(seed: int, neurons: int) -> None:
    target = GatedFunctions(neurons=neurons, seed=seed).double()
    knots = np.linspace(0, 5, neurons)
    x = torch.as_tensor(knots)
    torch.testing.assert_close(target.knots, x)
    with torch.no_grad():
        for i in range(4):
            alone = target(inputs(x, i))[:, 0].numpy()
            np.testing.assert_allclose(alone, written_out(target, knots, i), atol=2e-5)
        assert torch.equal(target(inputs(torch.rand(50, dtype=torch.float64) * 5)), torch.zeros(50, 1).double())


@given(seed=seeds, x=st.lists(st.floats(0, 5), min_size=1, max_size=20), on=st.sets(st.integers(0, 3)))
def test_sums_linear_interpolations_of_the_functions_that_are_on(seed: int, x: list[float], on: set[int]) -> None:
    target = GatedFunctions(seed=seed).double()
    knots = np.linspace(0, 5, 10)
    wanted = sum((np.interp(x, knots, written_out(target, knots, i)) for i in on), np.zeros(len(x)))
    with torch.no_grad():
        given_out = target(inputs(torch.tensor(x, dtype=torch.float64), *on))[:, 0]
    np.testing.assert_allclose(given_out.numpy(), wanted, atol=1e-4)


@given(seed=seeds, n=st.integers(1, 5))
def test_mechanisms_sum_to_the_weights_and_share_no_neuron(seed: int, n: int) -> None:
    target = GatedFunctions(n, 7, seed=seed)
    truth, weights = target.mechanisms(), apd.Network(target, target.weights).weights
    assert list(truth) == list(weights) == target.weights
    for path in target.weights:
        assert truth[path].shape == (n, *weights[path].shape)
        assert torch.equal(truth[path].sum(0), weights[path])
    for i in range(2):
        read, write = truth[f"read.{i}.weight"], truth[f"write.{i}.weight"]
        assert ((read != 0).any(1).sum(0) == 1).all(), "every neuron reads for one function"
        assert ((write != 0).any(2).sum(0) <= 1).all(), "and writes for one"
        assert torch.equal((read != 0).any(1) | (write != 0).any(2), (read != 0).any(1)), "the same one"
    assert sum(int((truth[f"read.{i}.weight"] != 0).any(1).sum()) for i in range(2)) == 7 * n


@given(seed=seeds)
def test_each_mechanism_alone_computes_its_function_and_nothing_else(seed: int) -> None:
    target = GatedFunctions(seed=seed)
    truth = apd.Components.from_matrices(target.mechanisms())
    network = apd.Network(target, target.weights)
    x, knots = torch.linspace(0, 5, 23), np.linspace(0, 5, 10)
    for i in range(4):
        alone = torch.zeros(len(x), 4)
        alone[:, i] = 1
        with torch.no_grad():
            mine = network(inputs(x, i), truth, alone)[:, 0]
            all_on = network(inputs(x, 0, 1, 2, 3), truth, alone)[:, 0]
            others = network(inputs(x, *({0, 1, 2, 3} - {i})), truth, alone)[:, 0]
        wanted = np.interp(x.numpy(), knots, written_out(target, knots, i))
        np.testing.assert_allclose(mine.numpy(), wanted, atol=1e-3)
        np.testing.assert_allclose(all_on.numpy(), wanted, atol=1e-3)
        assert others.abs().max() == 0


def test_the_truth_is_a_decomposition_without_error() -> None:
    """With as many active components as bits are on, batch top-k finds them, and the sparse outputs are right."""
    target = GatedFunctions(seed=3).double()
    truth = apd.Components.from_matrices(target.mechanisms())
    x = target.data(4000)(0, torch.Generator().manual_seed(0)).double()
    scores = apd.attributions.gradient(target, truth, x)
    assert torch.equal(scores > 1e-9, x[:, 1:] > 0), "a function is attributed where its bit is on, and only there"
    assert apd.metrics.scrubbing(target, truth, x, 0.2217).top_k.max() < 1e-12
    assert apd.metrics.ownership(truth, target.mechanisms()).complete


def test_coefficients_fill_their_ranges() -> None:
    low = torch.tensor([-1, 0.1, -torch.pi, -1, 0.1, -torch.pi, -1], dtype=torch.float64)
    high = torch.tensor([1, 1, torch.pi, 1, 1, torch.pi, 1], dtype=torch.float64)
    u = (GatedFunctions(500, 2).coefficients - low) / (high - low)
    assert u.min() >= 0 and u.max() <= 1
    torch.testing.assert_close(u.mean(0), torch.full((7,), 0.5, dtype=torch.float64), atol=0.06, rtol=0)
    assert (u.amin(0) < 0.02).all() and (u.amax(0) > 0.98).all()


def test_seeds_give_other_functions_and_other_places() -> None:
    one, again, other = GatedFunctions(seed=1), GatedFunctions(seed=1), GatedFunctions(seed=2)
    for name, value in one.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.equal(one.coefficients, other.coefficients)
    assert not torch.equal(one.owner, other.owner)
    first_layer = torch.stack([GatedFunctions(seed=s).owner[:20].bincount(minlength=4) for s in range(200)]).float()
    torch.testing.assert_close(first_layer.mean(0), torch.full((4,), 5.0), atol=0.4, rtol=0)
    assert first_layer.std() > 1, "which layer holds a neuron is left to chance"


@pytest.mark.parametrize("nonempty", [False, True])
def test_inputs_follow_their_law(nonempty: bool) -> None:
    data = GatedInputs(4, 0.05, 200_000, nonempty)
    batch = data(0, torch.Generator().manual_seed(0))
    x, bits = batch[:, 0], batch[:, 1:]
    assert set(bits.unique().tolist()) == {0.0, 1.0}
    assert x.min() >= 0 and x.max() <= 5 and abs(x.mean() - 2.5) < 0.02 and x.min() < 0.01 and x.max() > 4.99
    assert abs(bits.sum(1).mean() - data.mean_active) < 0.01
    assert data.share_nonempty == pytest.approx(1 - 0.95**4)
    assert data.mean_active == pytest.approx(0.2 / (data.share_nonempty if nonempty else 1))
    assert bool((bits.sum(1) > 0).all()) == nonempty
    torch.testing.assert_close(bits.mean(0), torch.full((4,), data.mean_active / 4), atol=0.005, rtol=0)
    # x does not depend on the bits.
    assert abs(x[bits[:, 0] == 1].mean() - 2.5) < 0.06


def test_decompose_reaches_all_four_weights() -> None:
    target = GatedFunctions(2, 4, seed=1)
    result = apd.decompose(target, target.data(32), target.weights, 3, 1.0, steps=2, progress=False)
    assert set(result.components.paths) == {"read.0.weight", "write.0.weight", "read.1.weight", "write.1.weight"}


@given(seed=seeds)
def test_shown_neurons_are_what_its_layers_compute(seed: int) -> None:
    plain, shown = GatedFunctions(seed=seed), GatedFunctions(seed=seed, show_neurons=True)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, shown.state_dict()[name])
    x = plain.data(30)(0, torch.Generator().manual_seed(seed))
    x[:5, 1:] = 1
    stream = torch.cat([x, torch.zeros(30, 1)], 1)
    neurons = [(stream @ read.weight.T + read.bias).clamp_min(0) for read in plain.read]
    with torch.no_grad():
        torch.testing.assert_close(shown(x), torch.cat([3 * plain(x), *neurons], 1))


def test_shares_of_attributions_sum_to_one_on_every_sample() -> None:
    target = GatedFunctions(seed=5).double()
    network = apd.Network(target, target.weights)
    mixed = {path: Z + 0.1 * Z.roll(1, 0) for path, Z in target.mechanisms().items()}
    components = apd.Components.from_matrices(mixed)
    x = target.data(500)(0, torch.Generator().manual_seed(1)).double()
    x[0, 1:] = 0
    shares = attribution_shares(network, components, x)
    scores = apd.attributions.gradient(network, components, x)
    on = x[:, 1:].any(1)
    torch.testing.assert_close(shares.sum(1), on.double())
    assert shares.isfinite().all()
    torch.testing.assert_close(shares[on] * scores[on].sum(1, keepdim=True), scores[on])


def test_the_recipe_runs_and_is_for_shown_neurons() -> None:
    target = GatedFunctions(2, 4, seed=1, show_neurons=True)
    settings = target.recipe | {"steps": 12, "restarts": 2}
    result = apd.decompose(target, **settings, progress=False)
    assert result.config.rank == 1 and result.components.n_components == 5
    assert settings["batches"].nonempty
    with pytest.raises(ValueError, match="show_neurons"):
        _ = GatedFunctions().recipe


@pytest.mark.parametrize("arguments", [(0, 10), (4, 1)])
def test_sizes_are_checked(arguments: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        GatedFunctions(*arguments)


@pytest.mark.parametrize("probability", [0.0, 1.5])
def test_probabilities_are_checked(probability: float) -> None:
    with pytest.raises(ValueError, match="probability"):
        GatedFunctions(probability=probability)


@pytest.mark.parametrize("shown", [False, True])
def test_a_rotated_stream_changes_no_output_and_turns_the_truth_along(shown: bool) -> None:
    plain, rotated = (kind(seed=7, show_neurons=shown) for kind in (GatedFunctions, Rotated))
    x, turned = (t.data(512, nonempty=True)(0, torch.Generator().manual_seed(1)) for t in (plain, rotated))
    Q = rotated.Q
    torch.testing.assert_close(Q.T @ Q, torch.eye(6), atol=1e-6, rtol=0)
    assert Q.abs().max() < 0.99  # no axis is left where it was
    torch.testing.assert_close((turned @ Q.T)[:, :5], x, atol=1e-5, rtol=0)
    torch.testing.assert_close(rotated(turned), plain(x), atol=1e-3, rtol=0)
    network = apd.Network(rotated, rotated.weights)
    for path, mechanisms in rotated.mechanisms().items():
        torch.testing.assert_close(mechanisms.sum(0), network.weights[path])
        back = Q @ mechanisms if path.startswith("read") else mechanisms @ Q.T
        torch.testing.assert_close(back, plain.mechanisms()[path], atol=1e-5, rtol=0)
    assert rotated.data(8, nonempty=True).share_nonempty == plain.data(8, nonempty=True).share_nonempty
