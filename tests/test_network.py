"""The gated network against its slow definition, the target left alone, and the check before the first step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracles import Case, Sequence, Twice, assert_same_state, case, every_case, gated, linear, state
from torch import Tensor, nn

import apd_minimal as apd
from apd_minimal.trial import Trial


def random_gates(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every_case
@pytest.mark.parametrize("remainder", [False, True])
def test_gates_per_sample_are_the_oracle(name: str, remainder: bool) -> None:
    one = case(name)
    x, components = one.x(), one.components()
    g = random_gates(len(x), 3)
    expected = gated(one, components, {path: g for path in components.paths}, x, remainder)
    torch.testing.assert_close(one.network(x, components, g, remainder), expected)


@every_case
@pytest.mark.parametrize("remainder", [False, True])
def test_gates_per_weight_and_restart_are_the_oracle(name: str, remainder: bool) -> None:
    one = case(name)
    x, components = one.x(), one.components(restarts=2)
    g = {path: random_gates(2, len(x), 3, seed=i) for i, path in enumerate(components.paths)}
    got = one.network(x, components, g, remainder)
    for r in range(2):
        expected = gated(one, components.restart(r), {path: g[path][r] for path in g}, x, remainder)
        torch.testing.assert_close(got[r], expected)


@every_case
def test_the_target_the_component_model_and_one_ablation(name: str) -> None:
    one = case(name)
    x, components = one.x(), one.components(C=4, restarts=2)
    ones = {path: torch.ones(len(x), 4, dtype=torch.float64) for path in components.paths}
    target = one.target.eval()(x)
    assert torch.equal(one.network(x), target)
    whole = one.network(x, components, remainder=True)  # other shapes, and so perhaps other kernels
    torch.testing.assert_close(whole, target.expand(2, *target.shape))
    for r in range(2):
        alone = components.restart(r)
        torch.testing.assert_close(one.network(x, components)[r], gated(one, alone, ones, x))
        ablated = {path: g.clone() for path, g in ones.items()}
        for g in ablated.values():
            g[:, 1] = 0
        got = one.network(x, alone, ablated, remainder=True)
        torch.testing.assert_close(got, gated(one, alone, ablated, x, remainder=True))


@pytest.mark.parametrize("remainder", [False, True])
@pytest.mark.parametrize("restarts", [None, 2])
def test_gates_per_position(remainder: bool, restarts: int | None) -> None:
    """Written out for one network: every position has weights of its own."""
    one = case("sequence")
    x, components = one.x(batch=3), one.components(restarts=restarts)
    T = x.shape[1]
    g = random_gates(*(() if restarts is None else (restarts,)), 3, T, 3)
    got = one.network(x, components, g, remainder)

    def product(path: str, rows: Tensor, alone: apd.Components, gates: Tensor) -> Tensor:
        P = alone.A[path] @ alone.B[path]
        W = torch.einsum("btc,cij->btij", gates, P)
        W = W + one.network.weights[path] - P.sum(0) if remainder else W
        return torch.einsum("bti,btij->btj", rows, W)

    for r in range(restarts or 1):
        alone, gates = (components, g) if restarts is None else (components.restart(r), g[r])
        t = one.target.eval()
        attention = (x @ x.transpose(1, 2)).masked_fill(torch.ones(T, T).tril() == 0, -1e9).softmax(-1)
        y = t.norm(x + attention @ product("mix.weight", x, alone, gates))
        h = F.gelu(product("block.up.weight", y, alone, gates) + t.block["up"].bias)
        expected = product("block.down.weight", h, alone, gates) + t.block["down"].bias
        torch.testing.assert_close(got if restarts is None else got[r], expected)


def test_gates_per_position_of_a_picture() -> None:
    """One gate for each output pixel; a gate that is the same everywhere is a gate per sample."""
    target = nn.Sequential(nn.Conv2d(2, 3, 2, padding=1)).double()
    network = apd.Network(target, ["0.weight"])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, 3, 4, generator=generator, dtype=torch.float64)
    P = torch.randn(3, 8, 3, generator=generator, dtype=torch.float64)
    components = apd.Components.from_matrices({"0.weight": P})
    g = random_gates(2, 4, 5, 3)
    each = torch.stack([F.conv2d(x, p.T.reshape(3, 2, 2, 2), padding=1) for p in P])
    expected = torch.einsum("cbohw,bhwc->bohw", each, g) + target[0].bias[:, None, None]
    torch.testing.assert_close(network(x, components, g), expected)
    torch.testing.assert_close(network(x, components, g.flatten(1, 2)), expected)
    flat = g[:, :1, :1].expand_as(g)
    torch.testing.assert_close(network(x, components, flat), network(x, components, flat[:, 0, 0]))


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.booleans(), st.booleans())
def test_gates_over_random_shapes(d_in: int, hidden: int, C: int, batch: int, bias: bool, remainder: bool) -> None:
    target = nn.Sequential(nn.Linear(d_in, hidden, bias=bias), nn.ReLU(), nn.Linear(hidden, 2, bias=bias))
    one = Case(
        target, {"0.weight": linear, "2.weight": linear}, lambda b, g: torch.randn(b, d_in, generator=g).double()
    )
    x, components = one.x(batch), one.components(C, m=2)
    g = random_gates(batch, C)
    expected = gated(one, components, {path: g for path in components.paths}, x, remainder)
    torch.testing.assert_close(one.network(x, components, g, remainder), expected)


def test_masks_may_be_boolean() -> None:
    one = case("mlp")
    x, components = one.x(), one.components()
    mask = torch.arange(12).reshape(4, 3) % 2 == 0
    for remainder in (False, True):
        got = one.network(x, components, mask, remainder)
        torch.testing.assert_close(got, one.network(x, components, mask.double(), remainder))


@pytest.mark.parametrize("positions", [(), (1,), (3,)])
def test_what_is_the_same_for_all_samples_may_come_once(positions: tuple[int, ...]) -> None:
    """As learned positions do, rows [1, (T,) d] in front of all samples."""

    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)
            self.once = nn.Parameter(torch.randn(1, *positions, 3, generator=torch.Generator().manual_seed(0)))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(x + self.first(self.once)))

    one = Case(
        Once(),
        {"first.weight": linear, "second.weight": linear},
        lambda b, g: torch.randn(b, *positions, 3, generator=g).double(),
    )
    x, components = one.x(), one.components()
    one.network.check(x)
    g = random_gates(len(x), 3)
    expected = gated(one, components, {path: g for path in components.paths}, x)
    torch.testing.assert_close(one.network(x, components, g), expected)


def test_components_of_some_weights_leave_the_others_as_they_are() -> None:
    one = case("mlp")
    x, components = one.x(), one.components()
    some = apd.Components({"0.weight": components.A["0.weight"]}, {"0.weight": components.B["0.weight"]})
    W = some.sum("0.weight")
    expected = one.target[2](torch.tanh(x @ W + one.target[0].bias))
    torch.testing.assert_close(one.network(x, some), expected)


def test_picked_outputs_and_recorded_activations() -> None:
    one = case("sequence")
    network = apd.Network(one.target, list(one.stored), output=lambda y: y[:, -1], hidden=["norm", "block.up"])
    x, components = one.x(), one.components(restarts=2)
    found: list[Tensor] = []
    out = network(x, components, activations=found)
    torch.testing.assert_close(out, one.network(x, components)[:, :, -1])
    assert [list(a.shape) for a in found] == [[2, 4, 4, 4], [2, 4, 4, 5]]
    # The hidden activation is the one of the component model, not of the target.
    y = found[0] @ components.sum("block.up.weight")[:, None] + one.target.block["up"].bias
    torch.testing.assert_close(found[1], y)


def test_inputs_by_keyword_reach_the_layer() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=x)

    one = Case(Keyword(), {"layer.weight": linear}, lambda b, g: torch.randn(b, 3, generator=g).double())
    x, components, g = one.x(), one.components(), random_gates(4, 3)
    torch.testing.assert_close(one.network(x, components, g), gated(one, components, {"layer.weight": g}, x))


def test_a_kind_of_ones_own_takes_three_lines() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    with pytest.raises(TypeError, match=r"cannot decompose weight: Mine has no rule; known kinds: .*Linear"):
        apd.Network(Mine(), ["weight"])
    apd.rules.rule.register(Mine, lambda module: apd.rules.Rule(matrix=lambda w: w, weight=lambda m: m))
    one = Case(Mine(), {"weight": lambda P: P}, lambda b, g: torch.randn(b, 3, generator=g).double())
    one.network.check(one.x())
    x, components, g = one.x(), one.components(), random_gates(4, 3)
    torch.testing.assert_close(one.network(x, components, g), gated(one, components, {"weight": g}, x))


# The target is left as it was.


def trained_like(one: Case) -> nn.Module:
    """Odd modes, flags and gradients, all of which must survive."""
    target = one.target
    for i, module in enumerate(target.modules()):
        module.training = i % 2 == 0
    for i, p in enumerate(target.parameters()):
        p.requires_grad_(i % 2 == 0)
        p.grad = torch.full_like(p, 7.0) if i % 3 == 0 else None
    next(target.modules()).register_forward_pre_hook(lambda module, args: None)
    return target


@every_case
def test_the_target_is_left_exactly_as_it_was(name: str) -> None:
    one = case(name)
    target = trained_like(one)
    before = state(target)
    x, components = one.x(), one.components(restarts=2)
    one.network.check(x)
    one.network(x, components, random_gates(2, 4, 3), remainder=True, activations=[])
    for mode in ("forward", "backward"):
        apd.attributions.gradient(target, components, x, mode=mode)
    leaves = components.map(lambda t: t.requires_grad_())
    torch.autograd.grad(one.network(x, leaves).square().sum(), leaves.parameters())
    assert_same_state(before, state(target))


@pytest.mark.parametrize("broken", ["target", "output", "gates", "interrupt"])
def test_also_after_an_exception(broken: str) -> None:
    class Breaks(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if broken == "target":
                raise RuntimeError("broken")
            if broken == "interrupt":
                raise KeyboardInterrupt("broken")
            return y

    target = Breaks(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2)).double()
    one = Case(target, {"0.weight": linear, "2.weight": linear}, lambda b, g: torch.randn(b, 3, generator=g).double())
    trained_like(one)
    before = state(target)

    def output(y: Tensor) -> Tensor:
        if broken == "output":
            raise RuntimeError("broken")
        return y

    network = apd.Network(target, list(one.stored), output=output)
    gates = random_gates(4, 9, 3)  # per position, but there are no positions
    error = {"interrupt": KeyboardInterrupt, "gates": ValueError}.get(broken, RuntimeError)
    with pytest.raises(error, match="gates per position" if broken == "gates" else "broken"):
        network(one.x(), one.components(), gates if broken == "gates" else None)
    assert_same_state(before, state(target))


def test_it_runs_in_eval_mode() -> None:
    one = case("sequence")
    one.target.train()
    assert torch.equal(one.network(one.x()), one.network(one.x()))


# What is refused when a network is wrapped.


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("block.up.wieght", "no parameter 'block.up.wieght'; did you mean 'block.up.weight"),
        ("zzz", "no parameter 'zzz'; known: mix.weight, "),
        ("block.up", "no parameter 'block.up'; did you mean 'block.up."),
    ],
)
def test_unknown_paths_get_a_hint(path: str, message: str) -> None:
    with pytest.raises(KeyError, match=message):
        apd.Network(Sequence(), [path])


def test_unknown_hidden_module() -> None:
    with pytest.raises(KeyError, match="no module 'nrm'; did you mean 'norm"):
        apd.Network(Sequence(), ["mix.weight"], hidden=["nrm"])


@pytest.mark.parametrize(
    ("module", "path", "message"),
    [
        (nn.Linear(2, 3), "bias", "cannot decompose bias: of Linear, only `weight`"),
        (nn.LayerNorm(3), "weight", "LayerNorm has no rule"),
        (nn.LSTM(2, 3), "weight_ih_l0", "LSTM is a fused kernel.*write its step with nn.Linear layers"),
        (nn.GRUCell(2, 3), "weight_hh", "GRUCell is a fused kernel"),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), "in_proj_weight", "without add_bias_kv"),
        (nn.MultiheadAttention(4, 2), "in_proj_bias", "only `in_proj_weight` can be decomposed"),
        (nn.ConvTranspose2d(2, 2, 2, groups=2), "weight", "ConvTranspose2d is supported with groups=1.*groups=2"),
        (nn.ConvTranspose1d(2, 2, 2, dilation=3, output_padding=1), "weight", "output_padding below stride"),
        (nn.Conv3d(2, 2, 2), "weight", "Conv3d has no rule"),
        (nn.Embedding(4, 2, max_norm=1.0), "weight", "max_norm must be None"),
        (nn.Bilinear(2, 2, 2), "weight", "Bilinear has no rule"),
    ],
)
def test_unsupported_kinds_are_refused_by_name(module: nn.Module, path: str, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        apd.Network(module, [path])


def test_one_weight_under_two_names_and_no_weight() -> None:
    with pytest.raises(ValueError, match=r"decode.weight and encode.weight are the same tensor"):
        apd.Network(apd.targets.TMS(), ["encode.weight", "decode.weight"])
    for nothing in ([], "encode.weight"):
        with pytest.raises(ValueError, match="weights must be a list of at least one parameter path"):
            apd.Network(apd.targets.TMS(), nothing)


def test_wrong_shapes_are_named() -> None:
    one = case("mlp")
    x, components = one.x(), one.components()
    bad = [
        (random_gates(5, 3), r"gates for 0.weight must be of shape \[4, ..., 3\], got .*\[5, 3\]"),
        (random_gates(4, 2), r"of shape \[4, ..., 3\], got .*\[4, 2\]"),
        (random_gates(3), r"of shape \[4, ..., 3\], got .*\[3\]"),
        ({"0.weight": random_gates(4, 3)}, "no gates for 2.weight"),
        (random_gates(4, 7, 3), r"gates per position for 0.weight: expected positions \[\]"),
    ]
    for gates, message in bad:
        with pytest.raises(ValueError, match=message):
            one.network(x, components, gates)
    sequence = case("sequence")
    with pytest.raises(ValueError, match=r"expected positions \[4\] at module 'mix', got gates of shape \[4, 7, 3\]"):
        sequence.network(sequence.x(), sequence.components(), random_gates(4, 7, 3))
    with pytest.raises(ValueError, match="gates need components"):
        one.network(x, None, random_gates(4, 3))
    with pytest.raises(ValueError, match=r"of shape \[2, 4, ..., 3\]"):
        one.network(x, one.components(restarts=2), random_gates(4, 3))
    with pytest.raises(ValueError, match=r"components of shape \(3, 4\), but the weight is \(3, 5\)"):
        one.network(x, apd.Components.random({"0.weight": (3, 4)}, 3))
    with pytest.raises(ValueError, match="components of other, but the network decomposes"):
        one.network(x, apd.Components.random({"other": (3, 5)}, 3))


def test_gates_under_vmap_are_those_one_by_one() -> None:
    one = case("mlp")
    x, components, gates = one.x(), one.components(), torch.stack([random_gates(4, 3, seed=i) for i in range(3)])
    together = torch.vmap(lambda g: one.network(x, components, g))(gates)
    torch.testing.assert_close(together, torch.stack([one.network(x, components, g) for g in gates]))


# The check before the first step.


@every_case
def test_the_check_accepts_every_supported_network(name: str) -> None:
    one = case(name)
    one.network.check(one.x())
    one.target.float()
    x = one.x()
    apd.Network(one.target, list(one.stored)).check(x.float() if x.is_floating_point() else x)


@pytest.mark.parametrize("always", [False, True])
def test_the_check_tries_with_the_remainder_and_without(always: bool) -> None:
    class Deaf(apd.Network):
        """It adds the remainder always or never."""

        def __call__(self, x: Tensor, *given: Any, **named: Any) -> Tensor:
            components, gates = (*given, None, None)[:2]
            named.pop("remainder", None)
            return super().__call__(x, components, gates, always and components is not None, **named)

    one = case("mlp")
    with pytest.raises(ValueError, match="the network uses this weight in a way that its modules' calls do not show"):
        Deaf(one.target, list(one.stored)).check(one.x())


def test_the_check_knows_the_precision_of_bfloat16() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        target = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2)).bfloat16()
    apd.Network(target, ["0.weight", "2.weight"]).check(torch.linspace(-1, 1, 20).reshape(5, 4).bfloat16())


class Reads(nn.Module):
    """Reads the weight of a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight)


class Functional(nn.Module):
    """Uses its weight a second time, behind the hooks' back; `how` says in which way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.encode = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.encode(x)
        return F.linear(h, self.encode.weight.T) if self.how == "decode" else h + self.encode.weight.sum()


class Doubles(nn.Linear):
    """Calls itself a Linear, and is none."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) ** 2


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.randn(3)


@pytest.mark.parametrize(
    ("target", "path", "message"),
    [
        (Reads(), "layer.weight", "'layer' is never called as a module"),
        (Functional("decode"), "encode.weight", r"encode.weight: the network uses this weight in a way"),
        (Functional("sum"), "encode.weight", r"encode.weight: the network uses this weight in a way"),
        (Doubles(4, 3), "weight", r"weight: the network uses this weight in a way"),
        (Noise(), "layer.weight", "not deterministic: its outputs change"),
    ],
)
def test_the_check_catches_what_hooks_do_not_see(target: nn.Module, path: str, message: str) -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    before = state(target)
    with pytest.raises(ValueError, match=message):
        apd.Network(target, [path]).check(x)
    assert_same_state(before, state(target))


def test_the_check_looks_at_the_inputs_and_outputs() -> None:
    network = case("mlp").network
    for x, message in [
        (torch.zeros(0, 3).double(), r"x must hold at least one number, got .*\[0, 3\]"),
        (torch.tensor([[0.0, float("nan"), 0.0]]).double(), "x must be finite"),
        (torch.tensor([[0.0, float("inf"), 0.0]]).double(), "x must be finite, got NaN or infinite"),
    ]:
        with pytest.raises(ValueError, match=message):
            network.check(x)
    blows = nn.Sequential(nn.Linear(3, 2), nn.Softplus())
    with torch.no_grad():
        blows[0].bias.fill_(float("inf"))
    with pytest.raises(ValueError, match="the target's outputs must be finite, got NaN or infinite"):
        apd.Network(blows, ["0.weight"]).check(torch.ones(1, 3))


def test_outputs_must_be_tensors_with_the_batch_axis() -> None:
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:  # type: ignore[override]
            return super().forward(x), 1

    for returned, output in (({"logits": 1}, lambda out: out["logit"]), ((1, 2), lambda out: out.logits)):
        target = nn.Sequential(nn.Linear(3, 2))
        target.register_forward_hook(lambda module, args, out, returned=returned: returned)
        with pytest.raises(TypeError, match=r"output= does not fit what the target returns, .*logit"):
            apd.Network(target, ["0.weight"], output=output)(torch.ones(4, 3))
    pair = Pair(3, 2)
    x = torch.ones(4, 3)
    with pytest.raises(TypeError, match="pick one with output="):
        apd.Network(nn.Sequential(nn.Linear(3, 3), pair), ["0.weight"])(x)
    network = apd.Network(nn.Sequential(nn.Linear(3, 3), pair), ["0.weight"], output=lambda out: out[0])
    assert network(x).shape == (4, 2)
    with pytest.raises(ValueError, match=r"keep the batch axis: 4 inputs gave a tensor of shape \[3\]"):
        apd.Network(nn.Linear(3, 3), ["weight"], output=lambda y: y.mean(0))(x)


def test_a_shared_module_counts_once_under_either_name() -> None:
    for path in ("layer.weight", "same.weight", "back.weight"):
        network = apd.Network(Twice(), [path])
        assert sum(matrix.numel() for matrix in network.weights.values()) == 9
        network.check(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(("scale", "expected"), [(5.0, 0.5), (0.0, 1e-3)])
def test_the_check_tries_weights_a_tenth_off_their_own_direction(scale: float, expected: float) -> None:
    """Weights that are only multiplied would not show a use that forgets their length; zeros are moved, too."""
    target = nn.Linear(60, 50)
    with torch.no_grad():
        target.weight.copy_(scale * torch.randn(50, 60, generator=torch.Generator().manual_seed(0)).sign())
    trial = Trial(apd.Network(target, ["weight"]), torch.ones(2, 60), torch.arange(2), 1e-3, seed=0)
    one, P = trial.parts["weight"]
    moved = (P @ one if P.shape[-1] == one.shape[-2] else one @ P)[0] - 0.6 * target.weight.detach().T
    torch.testing.assert_close(moved.square().mean().sqrt(), torch.tensor(expected), rtol=0.1, atol=0)


def test_the_product_of_a_plain_layer_is_left_out_and_not_taken_away_again() -> None:
    """Weights a million times the components: what single precision loses in their product must not show."""
    target, generator = nn.Linear(30, 20), torch.Generator().manual_seed(0)
    with torch.no_grad():
        target.weight.mul_(1e7)
    components = apd.Components.random({"weight": (30, 20)}, 3, generator=generator, std=1.0)
    x, gates = torch.randn(8, 30, generator=generator), torch.rand(8, 3, generator=generator)
    expected = torch.einsum("bi,bc,cio->bo", x, gates, components.matrices("weight")) + target.bias
    got = apd.Network(target, ["weight"])(x, components, gates)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
