"""Networks of one function in many bases (chapter 31): what of APD stays the same, by closed forms."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal import losses
from apd_minimal.study import baselines
from apd_minimal.targets import ResidualMLP
from experiments import basis, basis_others, basis_stream
from experiments import basis_networks as networks
from experiments.basis_networks import Change, Coder, OneScaleAdam

N, D, C = 6, 3, 5
CHANGES = ("inputs rotated", "hidden rotated", "scaled 4", "stretched 4")
ORTHOGONAL = CHANGES[:2]


@cache
def model() -> apd.targets.TMS:
    """A TMS with random weights: nothing here depends on training."""
    tms, generator = apd.targets.TMS(N, D).double(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in (tms.encode.weight, tms.bias):
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.double))
    return tms


def pair(name: str) -> tuple[Change, tuple[apd.Network, apd.Components], tuple[apd.Network, apd.Components]]:
    """The network and random components of it, in its own basis and in another one."""
    way, found = networks.change(name, N, D, 7), []
    generator = torch.Generator().manual_seed(1)
    own = apd.Components.random({"encode": (N, D), "decode": (D, N)}, C, std=0.7, generator=generator)
    own = own.map(Tensor.double)
    for moved, components in ((networks.change("plain", N, D, 7), own), (way, way.of(own))):
        coder = exact(moved)
        named = [{f"{path}.0.weight": t for path, t in f.items()} for f in (components.A, components.B)]
        found.append((apd.Network(coder, coder.weights), apd.Components(*named)))
    return way, found[0], found[1]


def exact(moved: Change) -> Coder:
    """The network in double precision: what it is made of is rounded to single otherwise."""
    coder = Coder(model(), moved).double()
    for path, W in networks.whole_matrices(model()).items():
        L, R = moved.matrices(path)
        getattr(coder, path)[0].weight.data = (L @ W @ R).T.contiguous()
    coder.Q = moved.Q
    return coder


def inputs() -> Tensor:
    return torch.randn(40, N, generator=torch.Generator().manual_seed(2), dtype=torch.double)


@pytest.mark.parametrize("cut", [None, ((2, 4), (3,)), ((6,), (1, 2)), ((1, 5), (2, 1))])
@pytest.mark.parametrize("name", CHANGES)
def test_the_function_is_that_of_the_formula(name: str, cut: networks.Cut | None) -> None:
    moved, x, tms = networks.change(name, N, D, 7), inputs().float(), model()
    W = tms.encode.weight.detach().T.float()
    wanted = torch.relu(x @ W @ W.T + tms.bias.detach().float())
    coder = Coder(tms, moved, cut).float()
    with torch.no_grad():
        torch.testing.assert_close(coder(x), wanted, atol=1e-5, rtol=1e-5)
        hidden = (x @ W) @ moved.M.float()
        torch.testing.assert_close(coder.hidden(x @ coder.Q), hidden, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CHANGES)
def test_carried_there_and_back(name: str) -> None:
    way, (_, own), (_, carried) = pair(name)
    torch.testing.assert_close(way.back.of(carried).flat(), own.flat())
    assert not torch.allclose(carried.flat(), own.flat())


@pytest.mark.parametrize("name", CHANGES)
def test_attributions_and_masked_outputs_are_those_of_the_function_in_every_basis(name: str) -> None:
    _, first, second = pair(name)
    x, gates = inputs(), torch.rand(40, C, generator=torch.Generator().manual_seed(4), dtype=torch.double)
    scores = [apd.attributions.gradient(network, components, x) for network, components in (first, second)]
    outputs = [network(x, components, gates) for network, components in (first, second)]
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(outputs[0], outputs[1])


def prices(network: apd.Network, components: apd.Components, p: float) -> Tensor:
    mask = torch.ones(1, C, dtype=torch.double)
    return torch.stack(
        [
            losses.faithfulness(components, network.weights),
            losses.simplicity(components, mask, p),
            losses.simplicity_exact(components, mask, p),
        ]
    )


@pytest.mark.parametrize("p", [0.9, 1.0])
@pytest.mark.parametrize("name", ORTHOGONAL)
def test_faithfulness_and_schatten_prices_stay_in_orthonormal_bases(name: str, p: float) -> None:
    _, first, second = pair(name)
    torch.testing.assert_close(prices(*first, p), prices(*second, p))


@pytest.mark.parametrize("p", [0.9, 1.0])
def test_a_scale_between_the_layers_weighs_them_by_its_powers(p: float) -> None:
    """4 on the encoder and 1/4 on the decoder: squares by 16 and 1/16, prices by 4^p and 4^-p."""
    _, (network, components), second = pair("scaled 4")
    mask, parts = torch.ones(1, C, dtype=torch.double), []
    for path in components.paths:
        one = apd.Components({path: components.A[path]}, {path: components.B[path]})
        square = (one.sum(path) - network.weights[path]).square().sum()
        price = losses.simplicity_exact(one, mask, p) * one.n_entries
        parts.append((square, price))
    (square, price), (square_2, price_2) = parts
    size = components.n_entries
    found = prices(*second, p)
    torch.testing.assert_close(found[0], (16 * square + square_2 / 16).detach() / size)
    torch.testing.assert_close(found[2], (4**p * price + 4**-p * price_2).detach() / size)


def test_the_price_of_a_cut_is_the_sum_of_its_blocks_lengths() -> None:
    """A rank-one matrix costs its length; in blocks it costs the sum of their lengths, which is more."""
    coder = Coder(model(), networks.change("plain", N, D, 7), ((2, 4), (1, 2))).double()
    generator = torch.Generator().manual_seed(5)
    u, v = (torch.randn(1, n, 1, generator=generator, dtype=torch.double) for n in (N, D))
    whole = {"encode": u @ v.mT, "decode": v @ u.mT}
    pieces = apd.Components.from_matrices(coder.cut_up(whole))
    mask = torch.ones(1, 1, dtype=torch.double)
    price = losses.simplicity_exact(pieces, mask) * pieces.n_entries
    us, vs = [part.norm() for part in u.split((2, 4), 1)], [part.norm() for part in v.split((1, 2), 1)]
    torch.testing.assert_close(price, sum(a * b for a in us for b in vs) + u.norm() * sum(vs))
    assert price > 1.2 * 2 * u.norm() * v.norm()
    back = coder.whole(pieces)
    for path, matrix in whole.items():
        torch.testing.assert_close(back.matrices(path), matrix)


@pytest.mark.parametrize("name", ORTHOGONAL)
@pytest.mark.parametrize(("optimiser", "agrees"), [("SGD", True), ("Adam", False), ("one-scale Adam", True)])
def test_from_one_start_in_two_bases(optimiser: str, agrees: bool, name: str) -> None:
    tms = apd.targets.TMS(5, 2).fit(seed=1, steps=200)
    lr = 1.0 if optimiser == "SGD" else 3e-2
    distance = networks.apart(tms, networks.change(name, 5, 2, 7), optimiser, [1, 20], 0, lr)
    assert max(distance) < 1e-11 if agrees else min(distance) > 1e-2


def test_one_scale_adam_is_adam_on_matrices_of_one_entry() -> None:
    generator, ends = torch.Generator().manual_seed(0), []
    start, gradients = torch.randn(3, 4, 1, 1, generator=generator), torch.randn(7, 3, 4, 1, 1, generator=generator)
    for kind in (torch.optim.Adam, OneScaleAdam):
        p = start.clone().requires_grad_()
        optimiser = kind([p], lr=0.1)
        for gradient in gradients:
            p.grad = gradient
            optimiser.step()
        ends.append(p.detach())
    torch.testing.assert_close(ends[0], ends[1])


def test_a_rotation_is_uniform() -> None:
    """Of the plane: the angle of the first column is anywhere, and half of the matrices turn a figure over."""
    many = torch.stack([networks.orthogonal(2, seed) for seed in range(400)])
    torch.testing.assert_close(many @ many.mT, torch.eye(2).double().expand(400, 2, 2))
    angle = torch.atan2(many[:, 1, 0], many[:, 0, 0])
    assert torch.histc(angle, 4, -torch.pi, torch.pi).min() > 60
    assert 0.4 < (torch.linalg.det(many) > 0).double().mean() < 0.6


def test_stretched_is_not_scaled() -> None:
    expected = torch.tensor([4, 4, 0.25, 0.25]).double().diag()
    torch.testing.assert_close(networks.change("stretched 4", 3, 4, 0).M, expected)


@pytest.mark.parametrize("name", ["stream rotated", "neurons scaled"])
def test_a_residual_mlp_in_another_basis_is_the_same_function(name: str) -> None:
    own, moved = (ResidualMLP(6, 30, (3, 4), seed=1) for _ in range(2))
    moved.load_state_dict(own.state_dict())
    basis_stream.changed(moved, name, 5)
    x = 3 * torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(moved(x), own(x), atol=1e-5, rtol=1e-5)
    for path in own.weights:
        assert (moved.get_parameter(path) - own.get_parameter(path)).abs().max() > 0.1


@pytest.mark.parametrize("name", ["scaled 4", "stretched 4", "mixed 4", "hidden rotated"])
def test_balancing_leads_back_to_a_rotation_of_tied_weights(name: str) -> None:
    moved = networks.change(name, N, D, 7)
    change = networks.balanced(model(), moved)
    W, V = (L @ m.double() @ R for p, m in networks.whole_matrices(model()).items() for L, R in [change.matrices(p)])
    torch.testing.assert_close(W.T @ W, V @ V.T)
    torch.testing.assert_close(change.M @ change.M.T, torch.eye(D).double())
    own = torch.linalg.inv(moved.M) @ change.M  # what was done to the changed weights: symmetric and positive
    torch.testing.assert_close(own, own.T)
    assert torch.linalg.eigvalsh(own).min() > 0
    if name == "mixed 4":  # neither a rotation to begin with nor one at right angles to the axes
        assert (moved.M @ moved.M.T - torch.eye(D).double()).norm() > 1


def five() -> apd.targets.TMS:
    """A TMS whose five features point away from each other in the plane, at other lengths."""
    tms, angles = apd.targets.TMS(5, 2), 2 * torch.pi * torch.arange(5) / 5
    tms.encode.weight.data = torch.stack([angles.cos(), angles.sin()]) * torch.linspace(0.8, 1.2, 5)
    return tms


@pytest.mark.parametrize("name", ["plain", "inputs rotated", "hidden rotated", "scaled 4"])
def test_an_autoencoder_of_the_true_rows_owns_them_and_only_what_is_read_alone_counts(name: str) -> None:
    tms, way = five(), networks.change(name, 5, 2, 7)
    network, rows = Coder(tms, way), tms.encode.weight.detach().T @ way.M.float()
    own = baselines.Dictionary([2], [2], 7, "topk", 1, centred=True)
    own.decoder.data = torch.cat([rows[[1]] + rows[[2]], rows, -rows[:1]])
    own.encoder.data = (own.decoder / own.decoder.norm(dim=1, keepdim=True)).detach().T.clone()
    found, owned = basis_others.judged(own, tms, network, way.back)
    assert isinstance(found, Tensor) and owned == [True] * 5
    wanted = tms.encode.weight.detach().T
    for row, true in zip(found[1:6], wanted, strict=True):
        torch.testing.assert_close(row / row.norm(), true / true.norm())
    own.kind, own.sparsity = "relu", 0.0  # every code now answers to the neighbours as well
    assert basis_others.judged(own, tms, network, way.back)[1] == [False] * 5


def test_a_mixture_keeps_what_all_features_do_together_and_owns_nothing_of_a_transcoder() -> None:
    tms, way = five(), networks.change("plain", 5, 2, 7)
    own = baselines.Dictionary([5], [2], 5, "batch_topk", 1.0)
    own.decoder.data, own.encoder.data = tms.encode.weight.detach().T.clone(), torch.eye(5)
    own.scale_in, own.scale_out = torch.full((5,), 3.0), torch.full((2,), 3.0)
    parts, owned = basis_others.judged(own, tms, Coder(tms, way), way.back)
    assert isinstance(parts, apd.Components) and owned == [True] * 5
    for seed in range(3):
        other, owned = basis_others.judged(basis_others.mixed(own, seed), tms, Coder(tms, way), way.back)
        assert isinstance(other, apd.Components) and not any(owned)
        torch.testing.assert_close(other.sum("encode"), parts.sum("encode"))


def test_an_untied_network_has_mechanisms_that_sum_to_both_matrices_and_is_balanced_to_the_same_function() -> None:
    tms, way = networks.Untied(2).fit(seed=3, steps=40), networks.change("mixed 4", 5, 2, 7)
    whole, truth = networks.whole_matrices(tms), networks.mechanisms(tms)
    assert not torch.allclose(whole["encode"], whole["decode"].T, atol=0.1)
    for j in range(5):  # one feature at a time: its row alone, and its column alone
        assert truth["encode"][j].nonzero()[:, 0].unique().tolist() == [j]
        assert truth["decode"][j].nonzero()[:, 1].unique().tolist() == [j]
    for path, parts in truth.items():
        torch.testing.assert_close(parts.sum(0), whole[path])
    last = networks.balanced(tms, way)
    off = [networks.imbalance(*networks.moved_matrices(tms, m)) for m in (networks.change("plain", 5, 2, 7), way, last)]
    assert off[2] < 1e-6 < 0.05 < min(off[:2])
    x = torch.rand(20, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(tms(x), torch.relu(x @ whole["encode"] @ whole["decode"] + tms.bias))
        for moved in (way, last):
            torch.testing.assert_close(Coder(tms, moved)(x), tms(x), atol=1e-5, rtol=1e-5)


def test_with_one_draw_an_untied_network_starts_as_the_tied_one() -> None:
    """After one step of Adam no number has moved by more than a learning rate and the decay."""
    tied, (one, two) = apd.targets.TMS(5, 2).fit(seed=3, steps=1), (networks.Untied(d).fit(3, 1) for d in (1, 2))
    for tms in (one, two):
        torch.testing.assert_close(tms.encode.weight, tied.encode.weight, atol=0.011, rtol=0)
    gap = [(tms.decode.weight - tied.encode.weight.T).abs().max() for tms in (one, two)]
    assert 1e-4 < gap[0] < 0.011 < 0.1 < gap[1]


def test_imbalance_by_hand() -> None:
    tms = networks.Untied(1)
    tms.encode.weight.data = torch.tensor([[3.0, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    tms.decode.weight.data = torch.tensor([[0.0, 0], [0, 0], [1, 0], [0, 0], [0, 0]])
    for name, wanted in (("plain", (9 - 1) / (9 + 1)), ("scaled 4", (144 - 1 / 16) / (144 + 1 / 16))):
        found = networks.imbalance(*networks.moved_matrices(tms, networks.change(name, 5, 2, 0)))
        assert found == pytest.approx(wanted)


def test_carried_are_the_features_that_come_through() -> None:
    tms = networks.Untied(1)
    tms.encode.weight.data = torch.tensor([[2.0, 0, 0, 1, 1], [0, 2.0, 0, 0, 0]])
    tms.decode.weight.data = torch.tensor([[0.5, 0], [0, 0.2], [1, 1], [0.4, 0], [0.6, 0]])
    tms.bias.data = torch.tensor([-0.3, 0.2, 0.0, 0.0, 0.0])  # out: 0.7, 0.6, 0, 0.4, 0.6
    assert tms.carried.tolist() == [True, True, False, False, True]


def test_the_halves_of_an_owner_are_compared_each_with_its_own() -> None:
    tms = networks.Untied(2).fit(seed=3, steps=40)
    true = networks.mechanisms(tms)
    order = [3, 1, 4, 0, 2]
    own = {"encode": true["encode"][order] / 2, "decode": true["decode"][order] * 1.5}
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    own["decode"][1] = turn @ own["decode"][1]  # component 1 stands for feature 1, half of it turned
    found = basis.halves(apd.Components.from_matrices(own), tms)
    assert found["encode_cosine"] == pytest.approx([1] * 5, abs=1e-5)
    assert found["encode_length_ratio"] == pytest.approx([0.5] * 5, abs=1e-5)
    assert found["decode_cosine"] == pytest.approx([1, 0.6, 1, 1, 1], abs=1e-5)
    assert found["decode_length_ratio"] == pytest.approx([1.5] * 5, abs=1e-5)


def test_in_units_of_its_own_every_feature_is_balanced_and_the_function_stays() -> None:
    tms, way = networks.Untied(2).fit(seed=3, steps=40), networks.change("plain", 5, 2, 7)
    network, x = networks.InUnits(tms, way), torch.rand(20, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(network(x), tms(x), atol=1e-5, rtol=1e-5)
    W, V = (getattr(network, path)[0].weight.detach().T for path in ("encode", "decode"))
    torch.testing.assert_close(W.norm(dim=1), V.norm(dim=0))
    assert (network.units.log().abs() > 0.1).any()
    parts = {f"{path}.0.weight": m.detach()[None] for path, m in (("encode", W), ("decode", V))}
    for path, m in networks.whole_matrices(tms).items():
        torch.testing.assert_close(network.whole(apd.Components.from_matrices(parts)).matrices(path)[0], m)


def test_a_start_at_the_truth_is_the_truth_in_every_restart_and_nothing_else() -> None:
    tms = networks.Untied(2).fit(seed=3, steps=40)
    network, true = Coder(tms, networks.change("plain", 5, 2, 7)), networks.mechanisms(tms)
    shapes = {path: (w.shape[0], w.shape[1]) for path, w in apd.Network(network, network.weights).weights.items()}
    drawn = apd.Components.random(shapes, 7, 2, restarts=2)
    assert drawn.restarts == 2
    basis.start_at(drawn, true)
    for path, parts in zip(drawn.paths, true.values(), strict=True):
        own = drawn.A[path] @ drawn.B[path]
        torch.testing.assert_close(own[:, :5], parts.expand(2, -1, -1, -1))
        assert not own[:, 5:].any()
        torch.testing.assert_close(drawn.A[path].norm(dim=(-2, -1)), drawn.B[path].norm(dim=(-2, -1)))


def test_runs_from_the_truth_begin_there_with_a_price_and_without() -> None:
    tms = networks.Untied(1).fit(seed=90)
    network = Coder(tms, networks.change("plain", 5, 2, 7))
    for name in ("plain, from the truth", "plain, from the truth, no price"):
        few = basis.recipe(tms, (name, 90)) | {"weights": network.weights, "steps": 1, "lr": 1e-6}
        result, _ = basis.decomposed(network, few, name, networks.mechanisms(tms))
        assert basis.owned(basis.in_plain(result.components, network, networks.change("", 5, 2, 7)), tms).owned.all()
        assert ("no price" in name) == (result.config.simplicity == 0)


def test_other_settings_change_the_price_the_length_and_the_starts_and_nothing_else() -> None:
    tms = apd.targets.TMS(5, 2)
    plain, other = (basis.recipe(tms, (f"plain{end}", 10)) for end in ("", ", other settings"))
    assert {k for k in other if plain.get(k) is not other.get(k) and plain.get(k) != other.get(k)} - {"batches"} == {
        "steps", "p", "simplicity", "restarts", "judge",
    }  # fmt: skip
    assert basis.recipe(tms, ("another start, other settings", 10))["seed"] == 2010
    longer, falling, free = (basis.recipe(tms, (f"plain, longer{end}", 10)) for end in ("", ", falling", ", no price"))
    assert longer["simplicity"] == plain["simplicity"] and longer["p"] == falling["p"] == plain["p"]
    assert all(own["steps"] == 6000 and own["restarts"] == 12 for own in (longer, falling, free))
    first = plain["simplicity"][0]
    assert falling["simplicity"] == (first, (0.7, 0.0)) and free["simplicity"] == 0
