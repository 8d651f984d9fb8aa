"""The fast ways to gradients against the plain ones: captured pairs, shared rows, few directions, no forward mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracles import Case, attributed, case, every_case, linear
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import apd_minimal as apd
from apd_minimal.attributions import capture as capturing
from apd_minimal.attributions import choose, gradient, gradients
from apd_minimal.attributions import meet as meeting
from apd_minimal.attributions.capture import capture, live, live_pairs, pairs_of
from apd_minimal.kernels.narrow import SPARE, narrow
from apd_minimal.kernels.rows import SharedRows, repeated


def plainly(network: apd.Network, x: Tensor) -> list[Tensor]:
    """Gradients of every output at every use, one backward pass of torch after the other: [B, n_out, T, d'] each."""
    record: list[Any] = []
    out = network(x, record=record).flatten(1)
    shifts = [use.shift for use in record]
    passes = [torch.autograd.grad(out[:, o].sum(), shifts, retain_graph=True) for o in range(out.shape[1])]
    return [
        torch.stack(own, 1).reshape(len(x), out.shape[1], -1, own[0].shape[-1]) for own in zip(*passes, strict=True)
    ]


@every_case
@pytest.mark.parametrize("large", [0, 2**60])
def test_captured_gradients_are_those_of_plain_passes(name: str, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capturing, "LARGE", large)
    one = case(name)
    x = one.x(5)
    for use, expected in zip(capture(one.network, None, x), plainly(one.network, x), strict=True):
        torch.testing.assert_close(use.deltas[0], expected)
    some = capture(one.network, None, x, outputs=[1, 0])
    for use, expected in zip(some, plainly(one.network, x), strict=True):
        torch.testing.assert_close(use.deltas[0], expected[:, [1, 0]])


def test_a_first_output_that_is_shared_and_a_second_that_is_not() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, x.tanh()], dim=1)

    target = nn.Sequential(nn.Linear(3, 2), Half())
    one = Case(target, {"0.weight": linear}, lambda b, g: torch.randn(b, 3, generator=g).double())
    x = one.x(5)
    (use,), (expected,) = capture(one.network, None, x), plainly(one.network, x)
    assert not use.shared
    torch.testing.assert_close(use.deltas[0], expected)
    assert capture(one.network, None, x, outputs=[0, 1])[0].shared


def test_shared_rows_stay_shared_through_a_linear_tail() -> None:
    """Products of repeated rows, and sums of them, are taken for one row; any other product for all."""
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    row = torch.randn(1, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    many, mixed = row.expand(6, -1), torch.arange(24.0, dtype=torch.float64).view(6, 4)
    with SharedRows():
        product, total, plain = many @ weight, many + many, mixed @ weight
        half = many + mixed
    assert repeated(product)
    assert repeated(total)
    assert not repeated(plain)
    torch.testing.assert_close(product, (row @ weight).repeat(6, 1))
    torch.testing.assert_close(total, 2 * row.repeat(6, 1))
    torch.testing.assert_close(plain, mixed @ weight)
    torch.testing.assert_close(half, row.repeat(6, 1) + mixed)


@pytest.mark.parametrize("size", [None, 100])
def test_a_look_at_all_samples_is_used_for_the_pairs(monkeypatch: pytest.MonkeyPatch, size: int | None) -> None:
    """What is found while choosing is not worked out again, and each piece of the batch gets its own part of it."""
    target = apd.targets.TMS(40, 10)
    with torch.no_grad():
        target.bias.fill_(-0.5)
        target.encode.weight.copy_(torch.eye(10, 40) + 0.01)
    network, x = apd.Network(target, target.weights), target.data(1024)(0, torch.Generator().manual_seed(0))
    components = apd.Components.random(network.shapes, 50, restarts=2)
    looks: list[int] = []
    look = capturing.live
    for module in (capturing, choose):
        monkeypatch.setattr(module, "live", lambda *args: looks.append(len(args[2])) or look(*args))
    got = gradient(network, components, x, internal_batch_size=size)
    assert looks == [1024]
    torch.testing.assert_close(got, gradient(network, components, x, mode="backward"))


@every_case
def test_live_pairs_are_those_with_a_gradient(name: str) -> None:
    one = case(name)
    x = one.x(6)
    expected = torch.stack([own.flatten(2).any(-1) for own in plainly(one.network, x)]).any(0)
    assert torch.equal(live(one.network, None, x), expected)
    found, picked = live_pairs(one.network, None, x), pairs_of(capture(one.network, None, x))
    for pairs in (found, picked):
        assert torch.equal(torch.stack([pairs.samples, pairs.outputs]), expected.T.nonzero().T.flip(0))
        assert pairs.share == expected.double().mean()
        for use, deltas in zip(pairs.captured, plainly(one.network, x), strict=True):
            torch.testing.assert_close(use.deltas[0, :, 0], deltas[pairs.samples, pairs.outputs])
    for a, b in zip(found.captured, picked.captured, strict=True):
        torch.testing.assert_close(a.rows, b.rows)


def test_outputs_at_rest_are_no_pairs() -> None:
    target = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    one = Case(target, {"0.weight": linear}, lambda b, g: torch.randn(b, 3, generator=g).double())
    x = one.x(50)
    assert torch.equal(live(one.network, None, x), target(x) > 0)
    with torch.no_grad():
        target[0].bias.fill_(-100.0)
    for per_output in (False, True):
        got = gradient(one.network, one.components(), x, mode="sample_gradients", per_output=per_output)
        assert got.shape == ((50, 3, 4) if per_output else (50, 3))
        assert not got.any()


@pytest.mark.parametrize("numbers", [1, 60, 2**22])
@pytest.mark.parametrize("largest", [0, 2**24])
@pytest.mark.parametrize("at", ["target", "components"])
def test_however_much_is_worked_on_at_a_time(
    numbers: int, largest: int, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "NUMBERS", numbers)
    monkeypatch.setattr(meeting, "LARGEST", largest)
    for name in ("mlp", "tms with identity", "sequence"):
        one = case(name)
        x, components = one.x(batch=5), one.components(C=2, restarts=2)
        expected = torch.stack([attributed(one, components.restart(r), x, at) for r in range(2)])
        for mode in ("backward", "sample_gradients"):
            got = gradient(one.network, components, x, at=at, mode=mode, per_output=True)
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("mode", apd.attributions.MODES)
def test_what_is_held_is_bounded(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the batch: pieces of one size, none of which holds more gradients or tangents than that."""
    one = case("mlp")
    x, components = one.x(20), one.components()
    whole = gradient(one.network, components, x, mode=mode)
    monkeypatch.setattr(choose, "NUMBERS", 150)
    seen: list[int] = []
    handle = one.target.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    torch.testing.assert_close(gradient(one.network, components, x, mode=mode), whole)
    handle.remove()
    if mode == "sample_gradients":  # every sample has two outputs
        seen = [n // 2 for n in seen]
    assert max(seen) <= 16  # a look at the first samples is taken at most
    assert choose.at_once(one.network, components.stacked(), None, x, mode) <= 10


@pytest.mark.parametrize("at", ["target", "components"])
@pytest.mark.parametrize("numbers", [150, 700, 10**6])
def test_pieces_are_as_few_as_fit(at: str, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At components every restart has gradients of its own."""
    one = case("mlp")
    x, components = one.x(20), one.components(restarts=3)
    monkeypatch.setattr(choose, "NUMBERS", numbers)
    base = components if at == "components" else None
    shapes = choose.shapes_of(one.network, x)
    sample = (3 if base else 1) * shapes.n_out * shapes.outputs
    fewest = next(n for n in range(1, 21) if sample * 20 / n <= numbers or n == 20)
    assert choose.at_once(one.network, components, base, x, "sample_gradients") == -(-20 // fewest)


@pytest.mark.parametrize("at", ["target", "components"])
def test_each_way_takes_longer_the_more_there_is(at: str) -> None:
    def times(B: int = 8, d: int = 6, e: int = 6, C: int = 4) -> list[float]:
        network = apd.Network(nn.Linear(d, e, bias=False), ["weight"])
        components = apd.Components.random(network.shapes, C, rank=2, restarts=2)
        count = choose._Count(network, components, components if at == "components" else None, torch.ones(B, d))
        return [count.look, count.forward(), count.backward(()), count.pairs(0.5), count.pairs(1.0)]

    base = times()
    assert min(base) > 0
    assert base[3] < base[4], "more outputs are on"
    for name, size in (("B", 16), ("d", 12), ("e", 12), ("C", 8)):
        more = times(**{name: size})
        assert all(a <= b for a, b in zip(base, more, strict=True)), name
        assert all(a < b for a, b in zip(base[1:], more[1:], strict=True)), name


@pytest.mark.parametrize(("B", "d", "k", "narrows"), [(100, 64, 8, False), (10_000, 64, 2, True)])
def test_rows_are_rewritten_where_that_halves_the_multiplications(B: int, d: int, k: int, narrows: bool) -> None:
    """In k directions of d, n rows meet C m columns: k (d + n) C m, and 3 n d k to find the directions."""
    use, components, _ = a_use(B, 1, d, 5, 5, 10, 2, False)
    use = replace(use, rows=(torch.randn(B, k) @ torch.randn(k, d))[None, :, None])
    first = use.site.factors(components)[0]
    assert (2 * (k * (d + B) * 50 + 3 * B * d * k) <= B * d * 50) is narrows
    found, rewritten = meeting._narrowed(use, first, k - 1)
    assert (found is not use) is narrows
    torch.testing.assert_close(found.rows[0, :, 0] @ rewritten[0], use.rows[0, :, 0] @ first[0], rtol=1e-3, atol=1e-3)


SIZES = [st.integers(1, 6) for _ in range(7)]  # of B, T, d, e, m, C, n


def a_use(
    B: int, T: int, d: int, e: int, m: int, C: int, n: int, shared: bool
) -> tuple[capturing.Captured, apd.Components, apd.Network]:
    """One layer's rows and its outputs' gradients, which all samples share or not; and components."""
    network = apd.Network(nn.Linear(d, e, bias=False), ["weight"])
    deltas = torch.randn(1, 1 if shared else B, n, T, e).expand(1, B, n, T, e)
    use = capturing.Captured(network.sites[0], torch.randn(1, B, T, d), deltas)
    return use, apd.Components.random(network.shapes, C, rank=m, restarts=1), network


def multiplications(function: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 2


@given(*SIZES, st.booleans())
def test_components_are_met_in_the_order_of_fewer_multiplications(
    B: int, T: int, d: int, e: int, m: int, C: int, n: int, shared: bool
) -> None:
    use, components, _ = a_use(B, T, d, e, m, C, n, shared or B == 1)
    met, m = meeting._Met(use, components, False, None), min(m, d, e)
    # Where all samples have the same gradients, these are a part of the second factor, at each position its own.
    first, second = torch.ones(C, d, m), torch.ones(C, m, n if met.shared else e)
    times, rows = (T, torch.ones(B, d)) if met.shared else (1, torch.ones(B * T, d))
    whole, apart = multiplications(lambda: rows @ (first @ second)), multiplications(lambda: rows @ first @ second)
    assert met.whole == (whole <= apart)
    taken = multiplications(lambda: meeting._Met(use, components, False, None).add_to(None, slice(0, B)))
    with_gradients = C * T * e * n * (m if met.shared else B)
    assert taken == times * min(whole, apart) + with_gradients


@given(*SIZES, st.booleans())
def test_the_numbers_of_a_sample_are_those_that_products_put_out(
    B: int, T: int, d: int, e: int, m: int, C: int, n: int, shared: bool
) -> None:
    use, components, _ = a_use(B, T, d, e, m, C, n, shared or B == 1)
    met, found = meeting._Met(use, components, False, None), 0

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal found
            out = func(*args, **kwargs or {})
            found += out.numel() if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm) else 0
            return out

    with Products():
        met.add_to(None, slice(0, B))
    # Of a whole product with shared gradients nothing is put out before the sum over positions.
    assert met.numbers * B == found + (B * T * C * n if met.shared and met.whole else 0)


@pytest.mark.parametrize(("m", "shared"), [(1, False), (6, False), (1, True), (6, True)])
def test_the_time_of_meeting_is_that_of_its_multiplications(
    m: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to products formed in advance, which do not count where samples are many."""
    B, T, d, e, C, n = 50, 3, 7, 5, 2, 4
    use, components, network = a_use(B, T, d, e, m, C, n, shared)
    met = meeting._Met(use, components, False, None)
    monkeypatch.setattr(choose, "MULTIPLIED", 1.0)
    monkeypatch.setattr(choose, "MET", 0.0)
    count = choose._Count(network, components, None, use.rows[0])
    count.n_out = n  # of the network that goes on behind the layer
    assert count.met([0] if shared else []) == multiplications(lambda: met.add_to(None, slice(0, B)))


@given(st.integers(1, 9), st.integers(0, 99))
def test_rows_in_few_directions(n_directions: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, n_directions, generator=generator, dtype=torch.float64)
    x[::7] = 0
    x[1] *= 1e-6
    rows = x @ torch.randn(n_directions, 100, generator=generator, dtype=torch.float64)
    found = narrow(rows, n_directions)
    assert found is not None
    coordinates, directions = found
    assert coordinates.shape[1] < 20
    off = (coordinates @ directions - rows).norm(dim=1)
    assert (off <= 1e-13 * rows.norm(dim=1)).all()
    torch.testing.assert_close(directions @ directions.T, torch.eye(len(directions), dtype=torch.float64))
    noise = torch.randn(300, 100, generator=generator, dtype=torch.float64)
    # The first has as many directions as there are; the second's are too short to be seen in the sketch.
    assert narrow(rows + 1e-6 * noise, n_directions) is None
    assert narrow(rows + 1e-6 * rows.norm(dim=1, keepdim=True) * noise, n_directions) is None
    assert narrow(rows[:30], n_directions) is None
    assert narrow(rows, 40) is None


@pytest.mark.parametrize(("last", "at_least", "at_most"), [(1e-5, 1, 20), (0.1, 0, 1)])
def test_a_direction_more_than_expected_is_one_too_many_where_it_matters(
    last: float, at_least: int, at_most: int
) -> None:
    """As many directions as the sketch has: the last one may be weak, not as strong as the others."""
    found = 0
    for seed in range(20):  # rounding often decides that a weak direction does not fit after all
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.ones(3 + SPARE, dtype=torch.float64)
        lengths[-1] = last
        basis = torch.linalg.qr(torch.randn(100, 3 + SPARE, generator=generator, dtype=torch.float64)).Q
        rows = torch.randn(300, 3 + SPARE, generator=generator, dtype=torch.float64) * lengths @ basis.T
        found += narrow(rows, 3) is not None
    assert at_least <= found <= at_most


def test_a_wide_layer_behind_an_embedding_is_met_in_few_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    target = nn.Sequential(nn.Linear(3, 200), nn.Linear(200, 6), nn.Tanh(), nn.Linear(6, 2))
    one = Case(target, {"1.weight": linear, "3.weight": linear}, lambda b, g: torch.randn(b, 3, generator=g).double())
    x, components = one.x(100), one.components(C=40)
    found: list[object] = []

    def noted(rows: Tensor, n: int) -> object:
        found.append(narrow(rows, n))
        return found[-1]

    monkeypatch.setattr(meeting, "narrow", noted)
    signed = gradient(one.network, components, x, mode="backward", per_output=True)
    assert any(pair is not None for pair in found)
    torch.testing.assert_close(signed, attributed(one, components, x))


class Doubled(torch.autograd.Function):
    """Written by a user who needs only to train."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Tensor:
        return 2 * delta


class Own(nn.Module):
    """A layer, a function of the user's own, and many outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 40)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.last(Doubled.apply(torch.tanh(self.first(x)))))


@pytest.mark.parametrize("mode", [None, "sample_gradients"])
def test_a_function_without_forward_mode_is_taken_backward(mode: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Case(
        Own(), {"first.weight": linear, "last.weight": linear}, lambda b, g: torch.randn(b, 3, generator=g).double()
    )
    x, components = one.x(4), one.components(C=2)
    monkeypatch.setattr(gradients, "cheapest", lambda *args: "forward")
    got = gradient(one.network, components, x, mode=mode)
    torch.testing.assert_close(got, gradient(one.network, components, x, mode="backward"))
    with pytest.raises(ValueError, match="without a forward mode"):
        gradient(one.network, components, x, mode="forward")


class Apart(nn.Module):
    """Backward passes around a norm, or is told to triple the gradient; forward mode knows of neither."""

    def __init__(self, hook: bool, n_out: int) -> None:
        super().__init__()
        self.hook, self.first, self.last = hook, nn.Linear(3, 4), nn.Linear(4, n_out)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.hook:
            if h.requires_grad:
                h.register_hook(lambda g: 3 * g)
            return self.last(h)
        with torch.no_grad():
            size = h.norm(dim=-1, keepdim=True)
        return self.last(h / size)


@pytest.mark.parametrize("hook", [True, False])
@pytest.mark.parametrize("at", ["target", "components"])
def test_gradients_that_forward_mode_does_not_have_are_taken_backward(hook: bool, at: str) -> None:
    one = Case(Apart(hook, 40), {"first.weight": linear}, lambda b, g: torch.randn(b, 3, generator=g).double())
    x, components = one.x(64), one.components(C=2)
    one.network.check(x)
    expected = gradient(one.network, components, x, mode="backward", at=at)
    assert expected.abs().min() > 0
    for mode in (None, "sample_gradients"):
        torch.testing.assert_close(gradient(one.network, components, x, mode=mode, at=at), expected)
    with pytest.raises(ValueError, match=r"mode='forward' does not have .*torch.no_grad, or a hook on gradients"):
        gradient(one.network, components, x, mode="forward", at=at)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_whether_forward_mode_agrees_does_not_depend_on_the_scale_of_the_outputs(scale: float) -> None:
    for hook in (True, False):
        target: nn.Module = Apart(hook, 5) if hook else nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5))
        path, last = ("first.weight", target.last) if isinstance(target, Apart) else ("0.weight", target[2])
        last.weight.data *= scale
        network = apd.Network(target.float(), [path])
        assert capturing.forward_agrees(network, torch.randn(64, 3)) is not hook


def test_samples_on_which_all_outputs_are_at_rest_say_nothing_of_forward_mode() -> None:
    target = nn.Sequential(Apart(hook=True, n_out=40), nn.ReLU())
    target[0].first.bias.data.zero_()
    target[0].last.bias.data.fill_(-0.1)
    one = Case(target, {"0.first.weight": linear}, lambda b, g: torch.randn(b, 3, generator=g).double())
    x = one.x(64)
    x[:-4] = 0  # at the start of the batch nothing is on
    assert capturing.forward_agrees(one.network, torch.zeros_like(x))
    assert not capturing.forward_agrees(one.network, x), "what was not seen is not remembered"


def test_forward_mode_of_one_output_without_an_axis() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x).tanh().sum(-1)

    one = Case(One(), {"first.weight": linear}, lambda b, g: torch.randn(b, 3, generator=g).double())
    for restarts in (None, 2):
        x, components = one.x(4), one.components(C=2, restarts=restarts)
        for at in ("target", "components"):
            found = [gradient(one.network, components, x, mode=mode, at=at) for mode in gradients.MODES]
            torch.testing.assert_close(found[0], found[1])
            torch.testing.assert_close(found[2], found[1])


class Attends(nn.Module):
    """One head of attention, by torch's own function."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.last = nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x)[:, None].chunk(3, -1)
        return self.last(F.scaled_dot_product_attention(q, k, v)[:, 0])


def test_attention_in_forward_mode_takes_the_plain_kernel() -> None:
    one = Case(
        Attends(),
        {"mix.weight": linear, "last.weight": linear},
        lambda b, g: torch.randn(b, 5, 4, generator=g).double(),
    )
    x, components = one.x(3), one.components(C=2)
    found = {m: gradient(one.network, components, x, mode=m, per_output=True) for m in apd.attributions.MODES}
    for values in found.values():
        torch.testing.assert_close(values, found["backward"])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gradient(one.network, components, x, mode="forward")
    fused = [event.key for event in profile.key_averages() if "flash" in event.key or "fused_attention" in event.key]
    # The run that records the layers' inputs carries no tangents.
    assert sum(event.count for event in profile.key_averages() if event.key in fused) <= 1
