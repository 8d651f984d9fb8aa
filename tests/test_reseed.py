"""New starts: they find what is missing, and leave alone what is there."""

from __future__ import annotations

from typing import Any

import pytest
import runs
import torch
from oracles import case, with_weights
from torch import Tensor
from torch.func import grad

import apd_minimal as apd
from apd_minimal.tidy.reseed import _held, _Products, _sides, missing, reseed

N, D, FREE = 4, 3, 2
both = pytest.mark.parametrize("rotated", [False, True])


def inputs() -> Tensor:
    """Sparse features; they are the same for a rotated network, which rotates them itself."""
    return apd.data.SparseFeatures(N, 0.1, batch_size=2000, nonempty=True)(0, torch.Generator().manual_seed(0))


def all_but(
    gone: list[int], rotated: bool, rank: int | None = None, scale: float = 1.0
) -> tuple[apd.Network, apd.Components, Tensor, Tensor]:
    """A network, its true mechanisms but for some, free components, which are active, and all mechanisms [J, N]."""
    target = apd.targets.TMS(N, D, probability=0.1).fit(seed=0, steps=800)
    with torch.no_grad():  # all outputs are scale^2 times what they were
        target.encode.weight *= scale
        target.bias *= scale**2
    if rotated:
        target.rotate(seed=1)
    truth = target.mechanisms()["encode.weight"]
    P = torch.cat([truth, torch.zeros(FREE, N, D)])
    P[gone] = 0
    components = apd.Components.from_matrices({"encode.weight": P}, rank=rank).stacked()
    mask = torch.cat([(inputs() > 0).float(), torch.zeros(2000, FREE)], dim=1)[None]
    return apd.Network(target, target.weights), components, mask, truth.flatten(1)


@both
@pytest.mark.parametrize(("gone", "rank", "scale"), [(0, None, 1.0), (1, 1, 0.1), (2, 2, 1.0), (3, None, 10.0)])
def test_a_new_start_points_at_the_missing_mechanism(gone: int, rank: int | None, scale: float, rotated: bool) -> None:
    """However long it is, and whatever rank a component may have."""
    network, components, mask, truth = all_but([gone], rotated, rank, scale)
    before = components.map(torch.clone)
    started = reseed(network, components, mask, inputs(), apd.losses.mse, most=1)
    new = components.flat()[0][started[0]]
    assert len(new) == 1
    assert torch.cosine_similarity(new, truth[gone][None]).item() > 0.999
    assert new.norm().item() == pytest.approx(truth[gone].norm().item(), rel=0.02)
    for a, b in zip(before.parameters(), components.parameters(), strict=True):
        assert torch.equal(a[~started], b[~started]), "only the started ones change"
    assert before.flat()[started].abs().max() == 0, "only free ones start"


@both
def test_two_new_starts_take_two_mechanisms(rotated: bool) -> None:
    network, components, mask, truth = all_but([1, 3], rotated)
    started = reseed(network, components, mask, inputs(), apd.losses.mse, most=2)
    new = components.flat()[0][started[0]]
    best = torch.cosine_similarity(new[:, None], truth[[1, 3]], dim=2)
    assert best.shape == (2, 2)
    assert (best.amax(0) > 0.99).all()
    assert (best.amax(1) > 0.99).all()


def test_restarts_are_apart() -> None:
    network, first, mask, truth = all_but([0], False)
    _, second, _, _ = all_but([2], False)
    _, full, _, _ = all_but([2], False)
    full.A["encode.weight"][:] += 1e-3  # nothing is free here
    full.B["encode.weight"][:] += 1e-3
    three = apd.Components(
        {path: torch.cat([c.A[path] for c in (first, second, full)]) for path in first.paths},
        {path: torch.cat([c.B[path] for c in (first, second, full)]) for path in first.paths},
    )
    # So few samples that those of one restart say nothing about what another lacks.
    started = reseed(network, three, mask.expand(3, -1, -1), inputs(), apd.losses.mse, n_worst=20, most=1)
    assert started.sum(1).tolist() == [1, 1, 0]
    for r, gone in ((0, 0), (1, 2)):
        new = three.flat()[r][started[r]]
        assert torch.cosine_similarity(new, truth[gone][None]).item() > 0.999


def test_nothing_starts_when_nothing_lacks() -> None:
    target = apd.targets.TMS(N, N)
    with torch.no_grad():
        target.encode.weight.copy_(torch.eye(N))
    P = torch.cat([target.mechanisms()["encode.weight"], torch.zeros(FREE, N, N)])
    components = apd.Components.from_matrices({"encode.weight": P}).stacked()
    before = components.map(torch.clone)
    network, mask = apd.Network(target, target.weights), torch.ones(1, 2000, N + FREE)
    assert torch.equal(network(inputs(), components, mask)[0], network(inputs())), "exactly"
    assert not reseed(network, components, mask, inputs(), apd.losses.mse).any()
    for a, b in zip(before.parameters(), components.parameters(), strict=True):
        assert torch.equal(a, b)


def test_nothing_starts_beside_what_is_there() -> None:
    """The missing mechanism has a component, which is never active: a second one may not start there."""
    network, components, mask, _ = all_but([], False)
    mask[..., 2] = 0
    before = components.flat().clone()
    started = reseed(network, components, mask, inputs(), apd.losses.mse, most=1)
    assert not started.any()
    assert torch.equal(components.flat(), before)
    assert reseed(network, components, mask, inputs(), apd.losses.mse, most=1, max_cosine=1.1).sum() == 1


@pytest.mark.parametrize("name", ["mlp", "rotated tms", "tied embedding, by its head", "conv2d", "sequence", "twice"])
def test_what_each_sample_asks_for_is_a_gradient(name: str) -> None:
    """Sample by sample, by differentiating a plain run with other weights."""
    one = case(name)
    x = one.x()
    lacking = torch.randn(one.network(x).shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = missing(one.network, x, lacking)
    one.target.eval()
    own = {path: matrix.clone() for path, matrix in one.network.weights.items()}
    for b in range(len(x)):

        def asked(matrices: dict[str, Tensor], b: int = b) -> Tensor:
            weights = {path: one.stored[path](matrix) for path, matrix in matrices.items()}
            return (with_weights(one.target, weights, x[b : b + 1])[0] * lacking[b]).sum()

        gradient = grad(asked)(own)
        torch.testing.assert_close(got[b], torch.cat([gradient[path].flatten() for path in own]))


@pytest.mark.parametrize("name", ["mlp", "rotated tms", "tied embedding, by its head", "conv2d", "sequence", "twice"])
def test_gradients_that_are_never_formed_do_what_formed_ones_do(name: str) -> None:
    """Two directions, not at right angles, are taken away in between."""
    one = case(name)
    x, g = one.x(), torch.Generator().manual_seed(0)
    lacking = torch.randn(one.network(x).shape, generator=g, dtype=torch.float64)
    formed, products = missing(one.network, x, lacking), _Products(_sides(one.network, x, lacking))
    shares = torch.rand(len(x), generator=g, dtype=torch.float64)
    random = torch.randn(formed.shape[1], generator=g, dtype=torch.float64)
    longest = formed[formed.norm(dim=1).argmax()]  # without its direction, another one is the longest
    first, second = torch.nn.functional.normalize(torch.stack([longest, longest / longest.norm() + random]))
    for v in (first, second):
        torch.testing.assert_close(products.longest(), formed[formed.norm(dim=1).argmax()])
        torch.testing.assert_close(products.along(second), formed @ second)
        torch.testing.assert_close(products.added(shares), shares @ formed)
        products.remove(v)
        formed = formed - (formed @ v)[:, None] * v
    torch.testing.assert_close(products.longest(), formed[formed.norm(dim=1).argmax()])
    torch.testing.assert_close(products.along(first), formed @ first)
    torch.testing.assert_close(products.added(shares), shares @ formed)


def test_gradients_are_held_in_the_form_that_takes_less() -> None:
    """A layer of 200 x 300 on 64 samples: 500 numbers a sample and not 60,000, and 10 samples in a pass."""
    network = apd.Network(torch.nn.Linear(200, 300), ["weight"])
    x, lacking = torch.randn(64, 200), torch.randn(64, 300)
    seen: list[int] = []
    network.target.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    products = _held(network, x, lacking, torch.float32, most=5_000)
    assert isinstance(products, _Products) and max(seen) == 10
    seen.clear()
    torch.testing.assert_close(_held(network, x, lacking, torch.float32, most=100).longest(), products.longest())
    assert max(seen) == 1, "where one sample takes more than that, it is alone"
    assert sum(t.numel() for side in products.sides for t in side) == 64 * 500
    whole = _held(network, x, lacking, torch.float32, most=64 * 60_000)
    torch.testing.assert_close(products.longest(), whole.longest())
    assert not isinstance(whole, _Products)


@pytest.mark.parametrize("size", [1, 300, 5000])
def test_in_pieces_it_is_the_same_and_no_piece_is_larger(size: int) -> None:
    network, whole, mask, _ = all_but([1], False)
    parts, x = whole.map(torch.clone), inputs()[:900]
    seen: list[int] = []
    started = reseed(network, whole, mask[:, :900], x, apd.losses.mse, n_worst=1)
    handle = network.target.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    assert torch.equal(reseed(network, parts, mask[:, :900], x, apd.losses.mse, n_worst=1, size=size), started)
    handle.remove()
    assert started.any()
    assert max(seen) == min(size, 900)
    for a, b in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_new_starts_end_when_they_are_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before that progress, and not at it."""
    steps: list[str] = []

    def noted(network: apd.Network, components: apd.Components, mask: Tensor, *rest: Any, **more: Any) -> Tensor:
        steps.append("new starts")
        return torch.zeros(mask.shape[0], mask.shape[-1], dtype=torch.bool)

    monkeypatch.setattr("apd_minimal.tidy.tidy.reseed", noted)
    settings = {"steps": 8, "tidy_every": 0.25, "tidy_until": 1.0}
    for until, expected in ((0.5, 1), (0.51, 2), (0.0, 0), (1.0, 3)):
        steps.clear()
        runs.decompose(**settings, reseed_until=until)
        assert len(steps) == expected, until
