"""Networks that cannot be gated by sample are refused before the first step, in a line that names what and where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_same_state, case, state
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import apd_minimal as apd
from apd_minimal.attributions.capture import varied

Forward = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    """Layers that a test calls in a way of its own."""

    def __init__(self, run: Forward, **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def first(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 2))


def experts(net: Any, x: Tensor) -> Tensor:
    """Every sample goes to one of two experts; five samples as three and two."""
    out = torch.zeros_like(x)
    mine = x[:, 0] > -0.4
    out[mine], out[~mine] = net.a(x[mine]), net.b(x[~mine])
    return out


def detached(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = net.a(x)
    return net.b(h)


def sorted_by_sum(net: Any, x: Tensor) -> Tensor:
    order = x.flatten(1).sum(1).argsort()
    return net.b(torch.tanh(net.a(x[order]))[order.argsort()])


REFUSED: dict[str, tuple[Forward, tuple[int, ...], str]] = {
    "positions first": (
        lambda net, x: net.b(torch.tanh(net.a(x.transpose(0, 1))).transpose(0, 1)),
        (6, 3, 4),
        r"a.weight: the first axis of the input of module 'a' must be the 6 samples .*got rows of shape \[3, 6, 4\]",
    ),
    "positions first, as many as samples": (
        lambda net, x: net.b(torch.tanh(net.a(x.transpose(0, 1))).transpose(0, 1)),
        (5, 5, 4),
        "a.weight: the network uses this weight in a way .*module 'a' miss .*whose first axis is the samples",
    ),
    "positions first, twice as many as samples": (
        lambda net, x: net.b(torch.tanh(net.a(x.transpose(0, 1))).transpose(0, 1)),
        (5, 10, 4),
        "a.weight: the network uses this weight in a way",
    ),
    "two views, stacked": (
        lambda net, x: torch.stack(torch.tanh(net.b(net.a(torch.cat([x[:, 0], x[:, 1]])))).chunk(2), 1),
        (5, 2, 4),
        "a.weight: the network uses this weight in a way .*samples in their order",
    ),
    "samples in another order": (sorted_by_sum, (5, 4), "a.weight: the network uses this weight in a way"),
    "experts": (experts, (5, 4), "a.weight: the first axis of the input of module 'a' must be the 5 samples .*experts"),
    "positions without a batch axis": (
        lambda net, x: net.b(torch.tanh(net.a(torch.eye(4).to(x)[:3])) + x),
        (5, 3, 4),
        "a.weight: the first axis of the input of module 'a' must",
    ),
    "the mean of the samples": (
        lambda net, x: net.b((h := net.a(x)) - h.mean(0)),
        (5, 4),
        r"samples mix.* first seen in the output of module 'b' \(Linear\)",
    ),
    "the largest of the samples, at the end": (
        lambda net, x: net.b(net.a(x)) / x.abs().max(),
        (5, 4),
        r"samples mix.* first seen in the output of module '' \(Net\)",
    ),
    "a layer more for more than one sample": (
        lambda net, x: (net.b(net.a(x)) if len(x) == 1 else net.a(net.b(net.a(x))))[:, :2],
        (5, 4),
        "samples mix: the output of one depends on the others",
    ),
    "a weight that is squared": (
        lambda net, x: net.b(2 * F.linear(x, net.a.weight.square()) + net.a(x)),
        (5, 4),
        r"a.weight: the network uses this weight in a way .*module 'a' miss",
    ),
    "a gradient on the side": (
        lambda net, x: net.b(net.a(x) + (side := F.linear(x, net.a.weight).tanh()) - side.detach()),
        (5, 4),
        r"a.weight: the gradients at module 'a' are not those of the weight: they differ by .* of ",
    ),
    "samples one by one": (
        lambda net, x: torch.cat([net.b(torch.tanh(net.a(one))) for one in x.split(1)]),
        (5, 4),
        r"module 'a' gets single samples, as from x.split\(1\), a loop or experts: call it once",
    ),
    "samples one by one, without their axis": (
        lambda net, x: torch.stack([net.b(torch.tanh(net.a(one))) for one in x]),
        (5, 4),
        "module 'a' gets single samples",
    ),
    "samples one by one, as many as positions": (
        lambda net, x: torch.stack([net.b(torch.tanh(net.a(one))) for one in x]),
        (5, 5, 4),
        "module 'a' gets single samples",
    ),
    "samples one by one, at the end": (
        lambda net, x: torch.stack([net.b(one) for one in torch.tanh(net.a(x)).unbind()]),
        (5, 4),
        "module 'b' gets single samples",
    ),
    "vmap": (lambda net, x: torch.vmap(net.a)(net.b(x)), (5, 4), "a.weight: the first axis of the input .*torch.vmap"),
    "overwritten in place": (
        lambda net, x: (h := net.b(x)).add_(net.a(h.square())),
        (5, 4),
        "gradients cannot pass through the target .*inplace.*write h = h \\+ u for h \\+= u",
    ),
    "no gradient": (detached, (5, 4), "a.weight: no gradient reaches module 'a'.*torch.no_grad"),
    "checkpointing": (
        lambda net, x: net.b(checkpoint(lambda h: torch.tanh(net.a(h)), net.b(x), use_reentrant=False)),
        (5, 4),
        "gradients cannot pass through the target .*run again during the backward pass.*activation checkpointing",
    ),
    "checkpointing, the old way": (
        lambda net, x: net.b(checkpoint(lambda h: torch.tanh(net.a(h)), net.b(x), use_reentrant=True)),
        (5, 4),
        "gradients cannot pass through the target .*activation checkpointing",
    ),
    "overwritten inputs": (lambda net, x: net.b(x.add_(net.a(x))), (5, 4), "the target overwrites its inputs"),
    "chosen outputs": (lambda net, x: net.b(net.a(x)).argmax(-1), (5, 4), "the outputs must be real numbers.*int64"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("trained", [True, False])
def test_what_cannot_be_gated_by_sample_is_refused(name: str, trained: bool) -> None:
    run, shape, message = REFUSED[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        target, x = Net(run).double().requires_grad_(trained), torch.randn(shape).double()
    before = state(target)
    with pytest.raises((ValueError, TypeError), match=message):
        apd.Network(target, ["a.weight", "b.weight"]).check(x)
    assert_same_state(before, state(target))
    with pytest.raises((ValueError, TypeError), match=message):
        apd.decompose(
            target, lambda step, generator: x.clone(), ["a.weight", "b.weight"], 2, 1, steps=1, progress=False
        )


def lengths(x: Tensor) -> Tensor:
    return x.ne(0).any(-1).sum(1)


def sorted_by_length(net: Any, x: Tensor) -> Tensor:
    order = lengths(x).argsort(descending=True, stable=True)
    return net.b(torch.tanh(net.a(x[order])).sum(1)[order.argsort()])


def packed(net: Any, x: Tensor) -> Tensor:
    """A layer that sees the tokens without their padding."""
    kept, out = x.ne(0).any(-1), torch.zeros_like(x)
    out[kept] = torch.tanh(net.a(x[kept]))
    return net.b(out.sum(1))


@pytest.mark.parametrize("run", [sorted_by_length, packed])
@pytest.mark.parametrize("n_long", [4, 6])
def test_padded_samples_are_checked_at_several_lengths(run: Forward, n_long: int) -> None:
    """Samples of full length alone would pass: sorting leaves them where they are, and packing leaves none out."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        target, x = Net(run).double(), torch.randn(12, 4, 4).double()
    full = x.clone()
    for i, length in enumerate(([4, 2, 3] * 4)[: 12 - n_long] + [4] * n_long):
        x[i, length:] = 0
    assert len(x[lengths(x) == 4]) >= 4
    apd.Network(target, ["a.weight"]).check(full)
    with pytest.raises(ValueError, match=r"a.weight: the (network uses this weight in a way|first axis of the input)"):
        apd.Network(target, ["a.weight"]).check(x)


def in_pieces(net: Any, x: Tensor) -> Tensor:
    return torch.cat([net.b(torch.tanh(net.a(piece))) for piece in x.flatten(0, 1).split(64)]).view(x.shape)


def sorted_by_other_padding(net: Any, x: Tensor) -> Tensor:
    order = x.ne(9).any(-1).sum(1).argsort(descending=True, stable=True)
    return net.b(torch.tanh(net.a(x[order])).sum(1)[order.argsort()])


def mixed_when_many(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    return net.b(h - h.mean(0) if len(x) > 5 else h)


@pytest.mark.parametrize("run", [in_pieces, sorted_by_other_padding, mixed_when_many])
def test_what_shows_among_all_samples_only(run: Forward) -> None:
    """Five samples would pass: they fit in one piece, their padding is not known, or they are too few to mix."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        target, x = Net(run).double(), torch.randn(32, 8, 4).double()
    x[[5, 14], 4:] = 9
    network = apd.Network(target, ["a.weight", "b.weight"])
    network.check(x[:4])
    with pytest.raises(ValueError, match=r"a.weight, b.weight: among all 32 samples 5 get other outputs than by thems"):
        network.check(x)


def test_a_target_that_runs_but_not_with_other_outputs() -> None:
    """The layer gives [1, T, d] by itself and [B, T, d] with gates, which the target repeats."""
    shared = nn.Parameter(torch.randn(1, 3, 4))
    target = Net(lambda net, x: torch.cat([net.a(shared).repeat(len(x), 1, 1), net.b(x)], 1))
    message = r"the target runs by itself, but not with its layers' outputs edited, on x, a tensor \[8, 3, 4\]"
    with pytest.raises(ValueError, match=message):
        apd.Network(target, ["a.weight"]).check(torch.ones(8, 3, 4))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30))
def test_the_checked_samples_have_many_densities_out_of_order(counts: list[int]) -> None:
    x = (torch.arange(6) < torch.tensor(counts)[:, None]).double()
    chosen = varied(x).tolist()
    found = [counts[i] for i in chosen]
    some = [n for n in counts if n] or [0]
    assert len(chosen) == 5
    assert len(set(chosen)) == min(len(some) if max(counts) else 1, 5)
    assert max(found) == max(some)
    assert min(found) == min(some)
    if len(set(found)) > 1:
        assert found != sorted(found, reverse=True)


def test_of_equal_density_the_same_samples_are_checked_on_every_processor() -> None:
    """They stay in the order of the batch, which a sort that is not stable gives up."""
    assert varied(torch.ones(1000, 3)).tolist() == [500, 999, 0, 1, 750]


@pytest.mark.parametrize("alone", [True, False])
def test_a_batch_norm_without_statistics_is_named(alone: bool) -> None:
    """Alone, one sample has no variance at all; with positions it has."""
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    run: Forward = lambda net, x: net.b(net.norm(net.a(x).flatten(1) if alone else net.a(x).mT).reshape(x.shape))  # noqa: E731
    x = torch.randn(5, *(() if alone else (3,)), 4, generator=torch.Generator().manual_seed(0))
    message = "samples mix: the target fails on one sample alone" if alone else r"module 'norm' \(BatchNorm1d\)"
    with pytest.raises(ValueError, match=message):
        apd.Network(Net(run, norm=norm), ["a.weight"]).check(x)
    kept = nn.BatchNorm1d(4)
    kept(torch.randn(20, 4))
    apd.Network(Net(run, norm=kept), ["a.weight"]).check(x)


def test_the_default_layout_of_an_encoder_is_refused() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8)
    target = Net(lambda net, x: net.layer(x.transpose(0, 1)).transpose(0, 1), layer=layer)
    for T in (3, 4, 5):
        x = torch.randn(5, T, 4, generator=torch.Generator().manual_seed(0))
        with pytest.raises(ValueError, match=r"layer.linear1.weight: "):
            apd.Network(target, ["layer.linear1.weight", "layer.self_attn.in_proj_weight"]).check(x)


@pytest.mark.parametrize("what", [torch.no_grad, torch.inference_mode])
def test_learning_needs_gradients(what: Callable[[], Any]) -> None:
    one = case("mlp")
    with what(), pytest.raises(ValueError, match="gradients are switched off"):
        one.network.check(one.x())
    with torch.inference_mode():
        target, x = nn.Linear(3, 2).double(), one.x().clone()
    with pytest.raises(ValueError, match=r"weight must .* be made outside torch.inference_mode"):
        apd.Network(target, ["weight"])
    one.network.check(x)  # inputs may come from there


# What a network is made of.


def test_targets_that_are_none() -> None:
    for target, message in [
        (lambda x: x, "target must be a torch.nn.Module, got function"),
        (torch.compile(nn.Linear(3, 2)), "module '' is compiled"),
        (nn.Linear, "target must be a torch.nn.Module, got type"),
    ]:
        with pytest.raises(TypeError, match=message):
            apd.Network(target, ["weight"])
    inside = first(nn.Linear(3, 4))
    inside[0].compile()
    scripted = nn.Sequential(torch.jit.script(nn.Linear(3, 4)), nn.Linear(4, 2))
    for target, path in ((inside, "0.weight"), (scripted, "1.weight")):
        with pytest.raises(TypeError, match=r"module '0' is compiled.*give it uncompiled"):
            apd.Network(target, [path])


@pytest.mark.parametrize("weights", [[1], [None], 3, None, b"0.weight", [b"0.weight"], "0.weight", []])
def test_weights_that_are_no_paths(weights: Any) -> None:
    with pytest.raises(ValueError, match="weights must be a list of at least one parameter path, got"):
        apd.Network(first(nn.Linear(3, 4)), weights)
    if weights != []:
        with pytest.raises(ValueError, match="hidden must be a list of module paths, each of them once, got"):
            apd.Network(first(nn.Linear(3, 4)), ["0.weight"], hidden=weights)
    with pytest.raises(ValueError, match=r"each of them once, got \['0', '0'\]"):
        apd.Network(first(nn.Linear(3, 4)), ["0.weight"], hidden=["0", "0"])


def test_weights_that_cannot_be_decomposed_as_they_are() -> None:
    normed = first(parametrizations.weight_norm(nn.Linear(3, 4)))
    for path in ("0.weight", "0.parametrizations.weight.original1"):
        with pytest.raises(
            ValueError, match=r"weight of '0' is parametrised .*remove_parametrizations\(module, 'weight'"
        ):
            apd.Network(normed, [path])
    apd.Network(normed, ["2.weight"]).check(torch.ones(2, 3))
    for name, make in (("0.weight_v", nn.utils.weight_norm), ("0.weight_orig", prune.identity)):
        older = first(make(nn.Linear(3, 4), "weight"))
        for path in ("0.weight", name):
            with pytest.raises(ValueError, match=f"{path}: .* is parametrised .*remove_weight_norm or prune.remove"):
                apd.Network(older, [path])
        apd.Network(older, ["2.weight"]).check(torch.ones(2, 3))
    nn.utils.parametrize.remove_parametrizations(normed[0], "weight")
    apd.Network(normed, ["0.weight"]).check(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"0.weight is lazy.*run the target on a batch first"):
        apd.Network(first(nn.LazyLinear(4)), ["0.weight"])
    with pytest.raises(ValueError, match=r"weight must hold real numbers.*complex64"):
        apd.Network(nn.Linear(3, 2, dtype=torch.complex64), ["weight"])
    mixed = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).double())
    with pytest.raises(ValueError, match=r"weights must have one type and one device.*float32.*float64"):
        apd.Network(mixed, ["0.weight", "1.weight"])


def test_one_tensor_in_two_layouts() -> None:
    target = first(nn.Linear(6, 4))
    target.append(nn.Conv1d(3, 4, 2))
    target[3].weight = nn.Parameter(torch.randn(4, 3, 2))
    other = nn.Conv1d(3, 4, 2)
    other.weight = target[3].weight

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = other.weight

    def odd(module: Odd) -> apd.rules.Rule:
        return apd.rules.Rule(matrix=lambda w: w.flatten(0, 1), weight=lambda m: m.reshape(4, 3, 2))

    apd.rules.rule.register(Odd, odd)
    with pytest.raises(TypeError, match=r"cannot decompose 0.weight: module '1' uses it as a matrix of another layout"):
        apd.Network(nn.Sequential(other, Odd()), ["0.weight"])


@pytest.mark.parametrize(
    ("matrix", "weight"),
    [(lambda w: w[None], lambda m: m[0]), (lambda w: w.T, lambda m: m), (lambda w: w.flatten(), lambda m: m)],
)
def test_a_rule_that_does_not_fit(matrix: Callable[[Tensor], Tensor], weight: Callable[[Tensor], Tensor]) -> None:
    class Bad(nn.Linear):
        pass

    apd.rules.rule.register(Bad, lambda module: apd.rules.Rule(matrix=matrix, weight=weight))
    with pytest.raises(TypeError, match=r"the rule of Bad must turn weight into a matrix \[d_in, d_out\] and back"):
        apd.Network(Bad(3, 2), ["weight"])


def test_a_rule_with_wrong_rows_is_found_out() -> None:
    class Halves(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x / 2)

    with pytest.raises(ValueError, match="weight: the network uses this weight in a way"):
        apd.Network(Halves(3, 2), ["weight"]).check(torch.randn(3, 3))


def test_a_layer_whose_first_argument_is_no_input() -> None:
    class Scaled(nn.Linear):
        def forward(self, scale: Any, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) * scale

    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    network = apd.Network(Net(lambda net, x: net.b(torch.tanh(net.c(2.0, x))), c=Scaled(4, 4)), ["c.weight"])
    with pytest.raises(TypeError, match=r"^Scaled: its first argument must be its input, got float$"):
        network.check(x)

    class All(nn.Embedding):
        def forward(self) -> Tensor:  # type: ignore[override]
            return self.weight[None]

    with pytest.raises(TypeError, match=r"^All: its first argument must be its input, got NoneType$"):
        apd.Network(Net(lambda net, x: net.b(x[:, None] + net.c()), c=All(3, 4)), ["c.weight"]).check(x)
    network = apd.Network(Net(lambda net, x: net.b(torch.tanh(net.c(x.flip(1), x))), c=Scaled(4, 4)), ["c.weight"])
    with pytest.raises(ValueError, match=r"c.weight: .* module 'c' miss .*a first argument whose first axis"):
        network.check(x)


def test_a_layer_that_gives_more_than_a_tensor() -> None:
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x

    target = Net(lambda net, x: net.b(net.pair(x)[0]), pair=Pair(4, 4))
    with pytest.raises(TypeError, match="what module 'pair' gives must be one tensor: write a rule"):
        apd.Network(target, ["pair.weight"]).check(torch.ones(5, 4))


@pytest.mark.parametrize("layer", [nn.Conv2d(2, 3, 2), nn.ConvTranspose2d(2, 3, 2), nn.Conv1d(2, 3, 2, groups=1)])
@pytest.mark.parametrize("once", [True, False])
def test_convolutions_of_a_picture_without_a_batch_axis(layer: nn.Module, once: bool) -> None:
    """A picture that all samples share, or every sample's own."""
    shape = (2, 4, 4)[: 3 if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) else 2]
    picture = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    run: Forward = lambda net, x: torch.stack(  # noqa: E731
        [(s + net.layer(picture).sum() if once else net.layer(s)).flatten() for s in x]
    )
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(1))
    kind = type(layer).__name__
    message = rf"the input of {kind} must be of shape \[B, channels, size" if once else "'layer' gets single samples"
    with pytest.raises(ValueError, match=message):
        apd.Network(Net(run, layer=layer), ["layer.weight"]).check(x)


# Recorded hidden activations.


def test_what_an_operation_in_place_overwrites_is_recorded_before() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 3)
    found: list[Tensor] = []
    target = nn.Sequential(plain[0], nn.ReLU(inplace=True), plain[2])
    network = apd.Network(target, ["0.weight", "2.weight"], hidden=["0"])
    network(x, activations=found)
    torch.testing.assert_close(found[0], plain[0](x))
    found.clear()
    network(x, apd.Components.from_matrices({p: w[None] for p, w in network.weights.items()}), activations=found)
    torch.testing.assert_close(found[0], plain[0](x))
    network.check(x)


@pytest.mark.parametrize("positions", [5, 3])
def test_hidden_modules_whose_outputs_do_not_begin_with_the_samples(positions: int) -> None:
    target = Net(
        lambda net, x: net.b(net.keep(torch.tanh(net.a(x)).transpose(0, 1)).transpose(0, 1)), keep=nn.Identity()
    )
    x = torch.randn(5, positions, 4, generator=torch.Generator().manual_seed(0))
    apd.Network(target, ["a.weight"]).check(x)
    with pytest.raises(ValueError, match=r"hidden module.*'keep'.* (begin with the samples|tensor of 5 samples)"):
        apd.Network(target, ["a.weight"], hidden=["keep"]).check(x)
    apd.Network(target, ["a.weight"], hidden=["a"]).check(x)


def test_hidden_modules_that_give_nothing_to_record() -> None:
    spare, norm = nn.Linear(4, 4), nn.LayerNorm(4)
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    run: Forward = lambda net, x: net.attention(net.b(net.a(x)), x, net.norm(x[0])[None].expand_as(x))[0]  # noqa: E731
    target = Net(run, spare=spare, attention=attention, norm=norm)
    x = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    for name, message in [
        ("spare", r"hidden modules \['spare'\] were never called"),
        ("attention", "hidden module 'attention' must give a tensor of 5 samples, it gives tuple"),
        ("norm", r"hidden module 'norm' must give a tensor of 5 samples, it gives a tensor \[3, 4\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            apd.Network(target, ["a.weight"], hidden=["b", name]).check(x)


# The state of a target.


def test_the_fingerprint_takes_extra_state_that_is_no_tensor() -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"scale": 3.0}

        def set_extra_state(self, state: Any) -> None:
            pass

    one = Extra(3, 2)
    same = nn.Linear(3, 2)
    same.load_state_dict(one.state_dict(), strict=False)
    fingerprint = apd.decomposition.fingerprint
    assert fingerprint(one.state_dict()) == fingerprint(same.state_dict())


@pytest.mark.parametrize(
    "t", [torch.arange(12.0)[::2], torch.ones(1).expand(3), torch.arange(12.0).view(3, 4).T], ids=str
)
def test_the_fingerprint_does_not_depend_on_how_a_tensor_lies_in_memory(t: Tensor) -> None:
    fingerprint, dense = apd.decomposition.fingerprint, torch.tensor(t.tolist())
    assert fingerprint({"a": t}) == fingerprint({"a": dense}) != fingerprint({"a": dense + 1})


@pytest.mark.parametrize("seed", range(5))
def test_a_sample_on_which_everything_cancels_does_not_mix(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(12, 12, generator=g)).Q
    net = first(nn.Linear(12, 12, bias=False))
    net[2] = nn.Linear(12, 12, bias=False)
    # The first layer keeps half of the directions: on inputs of the other half there is rounding and nothing else.
    net[0].weight.data = turn[:6].T @ turn[:6]
    x = torch.randn(8, 12, generator=g) @ turn.T @ turn
    x[:2] = torch.randn(2, 6, generator=g) @ turn[6:]
    assert 0 < net(x)[:2].norm() < 1e-5 * net(x).norm()
    apd.Network(net, ["0.weight", "2.weight"]).check(x)


class Clamped(nn.Linear):
    """A linear layer of positive weights, which it keeps positive by a function that changes nothing near them."""

    def __init__(self, keep: Callable[[Tensor], Tensor]) -> None:
        super().__init__(4, 4)
        self.keep = keep
        with torch.no_grad():
            self.weight.copy_(torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.keep(self.weight), self.bias)


@pytest.mark.parametrize("keep", [torch.relu, torch.abs, lambda w: w.clamp(min=0.1)], ids=["relu", "abs", "clamp"])
def test_a_weight_that_is_kept_positive_is_refused(keep: Callable[[Tensor], Tensor]) -> None:
    """Near the target's weights nothing shows: components, of which a few are active, go far from them."""
    network = apd.Network(first(Clamped(keep)), ["0.weight", "2.weight"])
    with pytest.raises(ValueError, match=r"^0.weight: the network uses this weight in a way .*needs a rule, apd.rules"):
        network.check(torch.randn(6, 4, generator=torch.Generator().manual_seed(1)))
    apd.Network(first(Clamped(lambda w: w)), ["0.weight", "2.weight"]).check(torch.randn(6, 4))


@pytest.mark.parametrize("outside", [torch.sqrt, torch.log, lambda h: torch.sqrt(h.clamp(min=0.0))])
def test_a_network_without_numbers_far_from_its_weights_is_taken(outside: Callable[[Tensor], Tensor]) -> None:
    """Outputs that are NaN there, infinite, or fine with a gradient that is not: of these nothing is said."""

    def run(net: Any, x: Tensor) -> Tensor:
        return net.b(outside(net.a(x)))

    target = Net(run)
    with torch.no_grad():
        target.a.weight.abs_().add_(0.3)
        target.a.bias.fill_(0.1)
    network = apd.Network(target, ["a.weight", "b.weight"])
    x = torch.rand(6, 4, generator=torch.Generator().manual_seed(1)) + 0.5
    assert network(x).isfinite().all()
    network.check(x)
