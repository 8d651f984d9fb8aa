"""Networks of other people: what is right, against brute force; what is refused, with a line that says why."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import Case, assert_same_state, attributed, convolution, gated, kept, linear, state, with_weights
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import apd_minimal as apd
from apd_minimal.attributions.gradients import MODES
from apd_minimal.rules import Rule


def normal(*shape: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda b, g: torch.randn(b, *shape, generator=g, dtype=torch.float64)


class Then(nn.Module):
    """A layer, a bend, and a head that sees all of it."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return self.head(torch.tanh(h).flatten(1))


class Adds(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class LoRA(nn.Linear):
    """As in loralib: what it learned is added inside of the layer."""

    def __init__(self, d: int, d_out: int) -> None:
        super().__init__(d, d_out)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, d)), nn.Parameter(torch.randn(d_out, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + 1.5 * (x @ self.lora_A.T @ self.lora_B.T)


class Wrapped(nn.Module):
    """As in peft: the layer is a child of the adapter."""

    def __init__(self, d: int, d_out: int) -> None:
        super().__init__()
        self.base_layer = nn.Linear(d, d_out)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(d, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, d_out, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 2 * self.lora_B["default"](self.lora_A["default"](x))


def hooked(d: int, d_out: int) -> nn.Linear:
    layer = nn.Linear(d, d_out)
    layer.register_forward_pre_hook(lambda module, args: (1.5 * args[0],))
    layer.register_forward_hook(lambda module, args, out: out + args[0].square().sum(-1, keepdim=True))
    return layer


class Shifted(nn.Module):
    """A bias under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.offset


apd.rules.rule.register(Shifted, lambda module: Rule(matrix=lambda w: w, weight=lambda m: m))


class Flattened(nn.Module):
    """Samples and positions as one axis, sample by sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x.reshape(-1, 3))).view(len(x), -1, 4).cumsum(1)


class Positions(nn.Module):
    """Position ids [1, T], the same for all samples, and 32-bit tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position, self.head = nn.Embedding(6, 4), nn.Embedding(5, 4), nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        ids = torch.arange(tokens.shape[1], dtype=torch.int32)[None]
        return self.head(torch.tanh(self.token(tokens) + self.position(ids)))


class Padded(nn.Module):
    """An embedding whose padding has no gradient for torch, though its row moves the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(6, 4, padding_idx=0), nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.token(tokens)))


class Conv1D(nn.Module):
    """Hugging Face's linear layer, written anew."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Viewed(nn.Module):
    """A view is of the memory as the layer lays it out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.head = nn.Conv2d(2, 3, 2), nn.GroupNorm(3, 3), nn.Linear(18, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.layer(x))).view(len(x), -1)) + self.layer(x).view(len(x), -1)[:, :2]


class Attends(nn.Module):
    """Attention, masked or not, to the sequence itself or from one to another."""

    def __init__(self, how: str = "", **settings: Any) -> None:
        super().__init__()
        self.how = how
        self.attention = nn.MultiheadAttention(4, 2, **settings)

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        mask = torch.ones(T, T, dtype=torch.bool).triu(1)
        query, key, value = x, x, x
        more: dict[str, Any] = {"need_weights": False}
        if self.how == "causal":
            more |= {"attn_mask": mask, "is_causal": True}
        if self.how == "padded":  # and additive masks for each head
            pads = x[..., 0] > 1.0
            pads = pads & (torch.arange(T) > 0)
            bias = torch.linspace(0, 1, 2 * T * T, dtype=x.dtype).view(2, T, T).repeat(len(x), 1, 1)
            more = {"key_padding_mask": torch.zeros_like(x[..., 0]).masked_fill(pads, -torch.inf), "attn_mask": bias}
        if self.how == "left padded":  # and causal, so that the padding attends to nothing
            more |= {"attn_mask": mask, "key_padding_mask": (x[..., 0] > 0) & (torch.arange(T) == 0)}
        if self.how == "cross":
            query, key, value = torch.sin(x[:, :2]), x[..., :3], x[..., 1:]
        if self.how == "crossed":  # with one size, and two of the three inputs alike
            query = torch.sin(x[:, :2])
        if not self.attention.batch_first:
            if query is key:
                query = key = value = x.transpose(0, 1)
            else:
                query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        out, pattern = self.attention(query, key, value, **more)
        out = out if self.attention.batch_first else out.transpose(0, 1)
        return out if pattern is None else torch.cat([out, pattern], -1)


class ThreeAxes(nn.Module):
    """Attention with matrices [heads, d, d_head], and [heads, d_head, d] on the way out."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("W_q", "W_k", "W_v"):
            self.register_parameter(name, nn.Parameter(torch.randn(2, 3, 4)))
        self.W_o = nn.Parameter(torch.randn(2, 4, 3))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bths,bshe->bthe", torch.einsum("bthe,bshe->bths", q, k).softmax(-1), v)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btd,hde->bthe", x, W) for W in (self.W_q, self.W_k, self.W_v))
        return torch.einsum("bthe,hed->btd", self.attend(q, k, v), self.W_o)


@apd.rules.rule.register
def _(module: ThreeAxes) -> dict[str, Rule]:
    h, _, e = module.W_q.shape

    def forward(product: Callable[[str, Tensor], Tensor], x: Tensor) -> Tensor:
        return product("W_o", module.attend(product("W_q", x), product("W_k", x), product("W_v", x)))

    heads = Rule(
        matrix=lambda w: w.transpose(0, 1).flatten(1),
        weight=lambda m: m.unflatten(1, (h, e)).transpose(0, 1),
        unrows=lambda y, like: y.unflatten(-1, (h, e)),
        forward=forward,
    )
    out = Rule(lambda w: w.flatten(0, 1), lambda m: m.unflatten(0, (h, e)), lambda z: z.flatten(-2), forward=forward)
    return {"W_q": heads, "W_k": heads, "W_v": heads, "W_o": out}


def heads_stored(P: Tensor) -> Tensor:
    return P.unflatten(-1, (2, 4)).transpose(-3, -2)


class StateSpace(nn.Module):
    """A diagonal recurrence h = a h + B x, as in an SSM."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.enter = nn.Parameter(torch.rand(4)), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, found = x.new_zeros(len(x), 4), []
        for step in self.enter(x).unbind(1):
            h = torch.tanh(self.a * h + step)
            found.append(h)
        return torch.stack(found, 1)


@apd.rules.rule.register
def _(module: StateSpace) -> dict[str, Rule]:
    def forward(product: Callable[[str, Tensor], Tensor], x: Tensor) -> Tensor:
        h, found = x.new_zeros(len(x), 4), []
        for step in module.enter(x).unbind(1):
            h = torch.tanh(product("a", h) + step)
            found.append(h)
        return torch.stack(found, 1)

    return {"a": diagonal(forward)}


class Scale(nn.Module):
    """One number for each feature, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + 1


def diagonal(forward: Callable[..., Tensor] | None = None) -> Rule:
    unrows = lambda y, like: y.diagonal(dim1=-2, dim2=-1)  # noqa: E731
    return Rule(lambda w: w[None], lambda m: m[0], lambda x: x[..., None], unrows, forward)


apd.rules.rule.register(Scale, lambda module: {"scale": diagonal()})


class Recurrent(nn.Module):
    """The steps of an LSTM or a GRU, written with linear layers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        n = {"lstm": 4, "gru": 3}[kind]
        self.kind, self.enter, self.again = kind, nn.Linear(3, n * 2), nn.Linear(2, n * 2)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 2)
        for step in x.unbind(1):
            if self.kind == "lstm":
                i, f, g, o = (self.enter(step) + self.again(h)).chunk(4, -1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            else:
                (a, b, c), (d, e, f) = self.enter(step).chunk(3, -1), self.again(h).chunk(3, -1)
                z = (b + e).sigmoid()
                h = (1 - z) * (c + (a + d).sigmoid() * f).tanh() + z * h
        return h


def one_layer(layer: nn.Module, width: int, stored: Callable[[Tensor], Tensor], *shape: int) -> Case:
    return Case(Then(layer, width), {"layer.weight": stored, "head.weight": linear}, normal(*shape))


def encoder() -> Case:
    layer = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True)
    paths = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    return Case(layer, dict.fromkeys(paths, linear), normal(3, 4))


def attends(how: str = "", **settings: Any) -> Case:
    names = ["q_proj_weight", "k_proj_weight", "v_proj_weight"] if "kdim" in settings else ["in_proj_weight"]
    paths = [f"attention.{name}" for name in [*names, "out_proj.weight"]]
    return Case(Attends(how, **settings), dict.fromkeys(paths, linear), normal(3, 4))


def conv(width: int, *shape: int, **settings: Any) -> Case:
    kind = nn.Conv1d if len(shape) == 2 else nn.Conv2d
    layer = kind(**settings)
    return one_layer(layer, width, convolution(*layer.weight.shape), *shape)


def transposed(width: int, *shape: int, **settings: Any) -> Case:
    layer = (nn.ConvTranspose1d if len(shape) == 2 else nn.ConvTranspose2d)(**settings)
    stored = lambda P: P.reshape(*P.shape[:-2], *layer.weight.shape)  # noqa: E731
    return one_layer(layer, width, stored, *shape)


def tokens(b: int, g: torch.Generator) -> Tensor:
    return torch.randint(0, 6, (b, 5), generator=g, dtype=torch.int32)


three = {"W_q": heads_stored, "W_k": heads_stored, "W_v": heads_stored, "W_o": lambda P: P.unflatten(-2, (2, 4))}
vector = lambda P: P.squeeze(-2)  # noqa: E731

RIGHT: dict[str, Callable[[], Case]] = {
    "a subclass that adds its input": lambda: one_layer(Adds(3, 3), 3, linear, 3),
    "an adapter in the layer": lambda: one_layer(LoRA(3, 4), 4, linear, 3),
    "an adapter around the layer": lambda: Case(
        Then(Wrapped(3, 4), 4),
        dict.fromkeys(("layer.base_layer.weight", "layer.lora_A.default.weight"), linear),
        normal(3),
    ),
    "hooks of the user's": lambda: one_layer(hooked(3, 4), 4, linear, 3),
    "a bias of another name": lambda: one_layer(Shifted(), 4, kept, 3),
    "samples and positions as one axis": lambda: Case(Flattened(), {"layer.weight": linear}, normal(5, 3)),
    "position ids": lambda: Case(Positions(), {"token.weight": kept, "position.weight": kept}, tokens),
    "Conv1D": lambda: one_layer(Conv1D(4, 3), 8, kept, 2, 3),
    "convolution, then a view": lambda: Case(Viewed(), {"layer.weight": convolution(3, 2, 2, 2)}, normal(2, 3, 4)),
    "groups": lambda: conv(12, 4, 4, in_channels=4, out_channels=6, kernel_size=3, groups=2, stride=3, padding=2),
    "groups of pictures": lambda: conv(80, 4, 4, 3, in_channels=4, out_channels=4, kernel_size=2, groups=2, padding=1),
    "depthwise": lambda: conv(24, 2, 2, 3, in_channels=2, out_channels=4, kernel_size=3, groups=2, padding=1),
    "padding same": lambda: conv(24, 2, 4, 3, in_channels=2, out_channels=2, kernel_size=(2, 3), padding="same"),
    "padding valid": lambda: conv(4, 2, 4, in_channels=2, out_channels=2, kernel_size=3, padding="valid"),
    "padding reflect": lambda: conv(
        12, 2, 4, in_channels=2, out_channels=2, kernel_size=(3,), padding=2, padding_mode="reflect"
    ),
    "padding circular": lambda: conv(
        30, 2, 3, 3, in_channels=2, out_channels=2, kernel_size=3, padding=(1, 2), padding_mode="circular"
    ),
    "padding replicate": lambda: conv(
        12, 2, 4, in_channels=2, out_channels=3, kernel_size=4, padding="same", padding_mode="replicate"
    ),
    "a transposed convolution whose steps leave some out": lambda: transposed(
        76, 3, 5, in_channels=3, out_channels=4, kernel_size=3, stride=3, output_padding=2, dilation=2
    ),
    "transposed convolution": lambda: transposed(
        24, 2, 4, in_channels=2, out_channels=3, kernel_size=3, stride=2, padding=1, output_padding=1
    ),
    "transposed convolution of pictures": lambda: transposed(
        80,
        2,
        3,
        2,
        in_channels=2,
        out_channels=2,
        kernel_size=(3, 2),
        stride=(2, 1),
        padding=(1, 0),
        dilation=(2, 3),
        output_padding=(1, 0),
        bias=False,
    ),
    "attention": lambda: attends(batch_first=True),
    "attention, its default layout, causal": lambda: attends("causal"),
    "attention, padded": lambda: attends("padded", batch_first=True),
    "attention, padded at the left": lambda: attends("left padded", batch_first=True),
    "attention to something else": lambda: attends("cross", kdim=3, vdim=3, bias=False),
    "attention, crossed": lambda: attends("crossed"),
    "a layer of an encoder": encoder,
    "three axes": lambda: Case(ThreeAxes(), three, normal(3, 3)),
    "a state space": lambda: Case(StateSpace(), {"a": vector, "enter.weight": linear}, normal(4, 3)),
    "a scale": lambda: Case(Then(Scale(), 3), {"layer.scale": vector, "head.weight": linear}, normal(3)),
    "an LSTM of linear layers": lambda: Case(
        Recurrent("lstm"), {"enter.weight": linear, "again.weight": linear}, normal(4, 3)
    ),
    "a GRU of linear layers": lambda: Case(
        Recurrent("gru"), {"enter.weight": linear, "again.weight": linear}, normal(4, 3)
    ),
}
every_network = pytest.mark.parametrize("name", RIGHT)


def right(name: str) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        one = RIGHT[name]()
        for p in one.target.parameters():  # torch gives attention biases of zero
            p.data += 0.1 * torch.randn_like(p)
        return Case(one.target, one.stored, one.inputs)


@every_network
def test_the_check_accepts_it_in_either_precision_and_leaves_it_as_it_was(name: str) -> None:
    one = right(name)
    before = state(one.target)
    one.network.check(one.x(5))
    one.network.check(one.x(1))
    assert_same_state(before, state(one.target))
    one.target.float()
    x = one.x()
    apd.Network(one.target, list(one.stored)).check(x.float() if x.is_floating_point() else x)


@every_network
def test_gates_per_sample_and_restart_are_brute_force(name: str) -> None:
    """Five samples: not as many as there are positions."""
    one = right(name)
    generator = torch.Generator().manual_seed(0)
    for batch in (5, 3):
        x, components = one.x(batch), one.components(restarts=2)
        g = {path: torch.randn(2, batch, 3, generator=generator, dtype=torch.float64) for path in components.paths}
        ones = {path: torch.ones(batch, 3, dtype=torch.float64) for path in components.paths}
        for remainder in (False, True):
            got = one.network(x, components, g, remainder)
            for r in range(2):
                alone = components.restart(r)
                expected = gated(one, alone, {path: g[path][r] for path in g}, x, remainder)
                torch.testing.assert_close(got[r], expected)
        plain = one.network(x, components)
        torch.testing.assert_close(plain[1], gated(one, components.restart(1), ones, x))
        torch.testing.assert_close(one.network(x), one.target(x))


@every_network
@pytest.mark.parametrize("at", ["target", "components"])
def test_gradient_attributions_are_brute_force_in_every_mode(name: str, at: str) -> None:
    one = right(name)
    x, components = one.x(5), one.components()
    expected = attributed(one, components, x, at)
    for mode in MODES:
        got = apd.attributions.gradient(one.network, components, x, at=at, per_output=True, mode=mode)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", [name for name in RIGHT if "conv" in name or "group" in name or name == "a scale"])
@pytest.mark.parametrize("restarts", [None, 2])
def test_activation_is_the_length_of_what_a_component_adds(name: str, restarts: int | None) -> None:
    """In a grouped convolution not every row meets every weight, and in a transposed one rows overlap."""
    one = right(name)
    layer, path = one.target.layer, "scale" if name == "a scale" else "weight"
    network, stored = apd.Network(layer, [path]), one.stored[f"layer.{path}"]
    generator = torch.Generator().manual_seed(1)
    components = apd.Components.random(network.shapes, 3, 2, restarts, std=1.0, generator=generator)
    components = components.map(lambda t: t.to(network.weights[path]))
    x = one.inputs(4, generator).to(network.weights[path])
    silent = with_weights(layer, {path: torch.zeros_like(layer.get_parameter(path))}, x)
    found = apd.attributions.activation(layer, components, x)
    for i, own in enumerate(found if restarts else [found]):
        P = (components.restart(i) if restarts else components).matrices(path)
        for c in range(3):
            added = with_weights(layer, {path: stored(P[c])}, x) - silent
            torch.testing.assert_close(own[:, c], added.flatten(1).norm(dim=1))


@every_network
def test_the_components_gradients_are_brute_force(name: str) -> None:
    one = right(name)
    x, components = one.x(5), one.components()
    g = {path: torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double() for path in components.paths}
    found = []
    for run in (
        lambda c: one.network(x, c, g, remainder=True),
        lambda c: gated(one, c, g, x, remainder=True),
    ):
        leaves = components.map(lambda t: t.clone().requires_grad_())
        found.append(torch.autograd.grad(run(leaves).square().sum(), leaves.parameters()))
    for ours, true in zip(*found, strict=True):
        torch.testing.assert_close(ours, true)


# What is overwritten.


class Overwrites(nn.Module):
    """Residual connections, in place or not: what the layers read and give is overwritten behind them."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sin(x)
        if self.in_place:
            u = self.a(h)
            h += u
            v = self.b(h)
            v.tanh_()
            h.mul_(0.5).add_(v)
            return self.head(h)
        h = h + self.a(h)
        return self.head(0.5 * h + self.b(h).tanh())


def test_what_the_target_overwrites_was_recorded_before() -> None:
    stored = {"a.weight": linear, "b.weight": linear}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = Case(Overwrites(in_place=False), stored, normal(4))
        one = Case(Overwrites(in_place=True), stored, normal(4))
    one.target.load_state_dict(plain.target.state_dict())
    one.target.requires_grad_(False)
    one.network.check(one.x())
    x, components = one.x(5), one.components()
    g = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(one.network(x, components, g), gated(plain, components, dict.fromkeys(stored, g), x))
    for mode in MODES:
        got = apd.attributions.gradient(one.network, components, x, per_output=True, mode=mode)
        torch.testing.assert_close(got, attributed(plain, components, x))
    expected = apd.attributions.activation(plain.network, components, x)
    torch.testing.assert_close(apd.attributions.activation(one.network, components, x), expected)
    found = []
    for network in (one.network, plain.network):
        leaves = components.map(lambda t: t.clone().requires_grad_())
        found.append(torch.autograd.grad(network(x, leaves, g).square().sum(), leaves.parameters()))
    for ours, true in zip(*found, strict=True):
        torch.testing.assert_close(ours, true)


def test_a_frozen_target_may_add_to_what_a_decomposed_layer_reads() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.b(x)
            h += self.a(h)
            return torch.tanh(h)

    one = Case(Adds(), {"a.weight": linear, "b.weight": linear}, normal(4))
    with pytest.raises(
        ValueError, match=r"inplace.*write h = h \+ u for h \+= u, or call target.requires_grad_\(False\)"
    ):
        one.network.check(one.x(5))
    one.target.requires_grad_(False)
    one.network.check(one.x(5))
    x, components = one.x(5), one.components()
    g = {path: torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double() for path in one.stored}
    torch.testing.assert_close(one.network(x, components, g), gated(one, components, g, x))


# Weights in the same memory.


def in_memory(target: nn.Module, path: str, weights: Tensor, x: Tensor) -> Tensor:
    """Brute force: write each sample's matrix [d_in, d_out] where the parameter lies, for whoever looks there."""
    weight, outputs = target.get_parameter(path), []
    own = weight.detach().clone()
    for matrix, sample in zip(weights, x, strict=True):
        weight.data.copy_(matrix.T)
        outputs.append(target(sample[None]).detach())
    weight.data.copy_(own)
    return torch.cat(outputs)


def tie(how: str, a: nn.Linear, b: nn.Linear) -> None:
    if how == "data":
        b.weight.data = a.weight.data
    elif how == "another parameter":
        b.weight = nn.Parameter(a.weight.data)
    elif how == "a view of it":
        b.weight = nn.Parameter(a.weight.data[:])
    elif how == "transposed":
        b.weight = nn.Parameter(a.weight.data.T)
    elif how == "the same parameter":
        b.weight = a.weight


@pytest.mark.parametrize("how", ["data", "another parameter", "a view of it", "transposed", "the same parameter"])
@pytest.mark.parametrize("path", ["0.weight", "2.weight"])
def test_weights_in_the_same_memory_are_one_weight(how: str, path: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        target = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    tie(how, target[0], target[2])
    with pytest.raises(ValueError, match=r"2.weight and 0.weight are the same tensor: name it once"):
        apd.Network(target, ["0.weight", "2.weight"])
    network = apd.Network(target, [path])
    g = torch.Generator().manual_seed(0)
    x, gates = torch.randn(5, 4, generator=g).double(), torch.randn(5, 3, generator=g).double()
    before = state(target)
    network.check(x)
    assert_same_state(before, state(target))
    components = apd.Components.random(network.shapes, 3, generator=g).map(lambda t: t.double())
    P, own = components.matrices(path), network.weights[path].clone()
    expected = in_memory(target, path, torch.einsum("bc,cij->bij", gates, P), x)
    torch.testing.assert_close(network(x, components, gates), expected)
    ends = [[in_memory(target, path, (own + e * p).expand(5, -1, -1), x) for p in P] for e in (1e-5, -1e-5)]
    slopes = torch.stack([(up - down) / 2e-5 for up, down in zip(*ends, strict=True)], 1)
    for mode in MODES:
        got = apd.attributions.gradient(network, components, x, per_output=True, mode=mode)
        torch.testing.assert_close(got, slopes, rtol=1e-5, atol=1e-6)


def test_memory_that_is_shared_in_another_layout_or_past_the_modules_is_refused() -> None:
    wide = torch.randn(8, 4)
    target = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    target[0].weight, target[2].weight = nn.Parameter(wide[:4]), nn.Parameter(wide[2:6])
    for path, other in (("0.weight", "2.weight"), ("2.weight", "0.weight")):
        message = rf"cannot decompose {path} \({other} is a view of the same memory: .*clone.*matrix of another layout"
        with pytest.raises(TypeError, match=message):
            apd.Network(target, [path])
    target[2].weight = nn.Parameter(wide[4:])  # side by side
    apd.Network(target, ["0.weight", "2.weight"]).check(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))
    target[2].weight = nn.Parameter(wide.view(4, 8)[:, 4:])
    target[0].weight = nn.Parameter(wide.view(4, 8)[:, :4])
    apd.Network(target, ["0.weight", "2.weight"]).check(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))
    target[2].register_buffer("copy", target[0].weight.data)
    with pytest.raises(TypeError, match=r"0.weight \(2.copy is a view of the same memory.*of Linear, only `weight`"):
        apd.Network(target, ["0.weight"])
    target[2].copy = target[2].copy.clone()
    apd.Network(target, ["0.weight"])
    apd.Network(target.to("meta"), ["0.weight", "2.weight"])


# What differs without gradients, or in a lower precision.


class PaddedEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(torch.tanh(self.layer(x)), src_key_padding_mask=x.eq(0).all(-1))


def test_padding_has_one_output_with_gradients_and_without() -> None:
    """Torch's fused encoder layers, which it takes without gradients, give zeros there, and hooks cannot read them."""
    stored = {"layer.weight": linear, "encoder.layers.0.linear1.weight": linear}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        one = Case(PaddedEncoder().eval(), stored, normal(3, 4))
    x, components = one.x(5), one.components()
    x[1:3, 1:] = 0
    one.network.check(x)
    apd.Network(one.target, ["encoder.layers.0.linear1.weight"]).check(x)
    with torch.no_grad():
        without = one.network(x), one.network(x, components)
    torch.testing.assert_close(without, (one.network(x), one.network(x, components)))
    g = {path: torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double() for path in stored}
    assert torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        P = {path: components.matrices(path) for path in stored}
        weights = [{p: torch.einsum("c,cij->ji", g[p][i], P[p]) for p in stored} for i in range(5)]
        expected = torch.cat([with_weights(one.target, w, x[i : i + 1]) for i, w in enumerate(weights)])
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    torch.testing.assert_close(one.network(x, components, g), expected)


class Low(nn.Module):
    """Some of it in bfloat16, by an autocast of its own; what meets outside must be of one type."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            q, k = self.a(x), self.b(x)
        h = (q @ k.mT).to(x.dtype) @ x
        return self.decorated(h).to(x.dtype)

    @torch.autocast("cpu", torch.bfloat16)
    def decorated(self, h: Tensor) -> Tensor:
        return self.c(torch.tanh(h))


@pytest.mark.parametrize("paths", [["a.weight"], ["a.weight", "c.weight"]])
def test_an_autocast_of_the_targets_own(paths: list[str]) -> None:
    """Float64 is exact there: autocast leaves it alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        target = Low()
    x = torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(0))
    network = apd.Network(target, paths)
    network.check(x)
    assert target.a(x).dtype == torch.float32
    components = apd.Components.random(network.shapes, 3, generator=torch.Generator().manual_seed(1))
    g = torch.rand(5, 3, generator=torch.Generator().manual_seed(2))
    found = [network(x, components, g)]
    modes = ("backward", "sample_gradients", None)  # in forward mode rounding is not that of the backward pass
    found += [apd.attributions.gradient(network, components, x, mode=mode) for mode in modes]
    result = apd.decompose(target, lambda step, generator: x, paths, 3, 1, steps=2, progress=False)
    assert result.finished
    one = Case(target, dict.fromkeys(paths, linear), normal(4, 8))
    x, components = x.double(), components.map(lambda t: t.double())
    expected = [gated(one, components, dict.fromkeys(paths, g.double()), x)]
    expected += 3 * [attributed(one, components, x).square().mean(-1).sqrt()]
    for low, true in zip(found, expected, strict=True):
        assert (low - true).norm() < 0.03 * true.norm()


def test_the_check_sees_through_an_autocast_of_the_targets_own() -> None:
    class Twice(Low):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1e-2 * F.linear(x, self.a.weight)[..., :3]

    x = torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"a.weight: the network uses this weight in a way"):
        apd.Network(Twice(), ["a.weight"]).check(x)


def test_the_check_sees_through_an_autocast_that_checkpointing_switches_on_again() -> None:
    """Torch notes that autocast was on, and switches it on when it runs the piece once more, on the way back."""

    class Again(Low):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                h = checkpoint(lambda h: torch.tanh(self.b(h)), self.a(x), use_reentrant=False)
            return self.c(h.to(x.dtype))

    apd.Network(Again(), ["a.weight"]).check(torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(0)))


def test_the_check_leaves_autocast_to_other_threads() -> None:
    """One thread comes before the check and goes meanwhile, another comes meanwhile and goes after it."""
    first, second = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    stays, goes = (torch.autocast("cpu", torch.bfloat16) for _ in range(2))

    class Meanwhile(Low):
        seen = False

        def forward(self, x: Tensor) -> Tensor:
            if not self.seen:
                first.submit(stays.__exit__, None, None, None).result()
                second.submit(goes.__enter__).result()
            self.seen = True
            return super().forward(x)

    first.submit(stays.__enter__).result()
    apd.Network(target := Meanwhile(), ["a.weight"]).check(torch.randn(5, 4, 8))
    second.submit(goes.__exit__, None, None, None).result()
    assert target.seen
    assert not any(thread.submit(torch.is_autocast_enabled, "cpu").result() for thread in (first, second))


@pytest.mark.parametrize("name", ["three axes", "attention", "an adapter in the layer", "transposed convolution"])
def test_a_run_from_its_first_step_to_its_last(name: str) -> None:
    one = right(name)
    result = apd.decompose(
        one.target,
        lambda step, generator: one.inputs(6, generator),
        list(one.stored),
        n_components=3,
        top_k=1,
        steps=4,
        reseed_until=0.5,
        progress=False,
    )
    assert result.finished
    assert all(torch.isfinite(t).all() for t in result.components.parameters())


def test_the_row_of_padding_is_a_weight_like_others() -> None:
    """Torch leaves its gradient out, though it moves the outputs; here it counts, whatever the batch holds."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        target = Padded().double()
    padded = torch.tensor([[1, 2, 0], [3, 0, 0], [4, 5, 1], [2, 2, 0]])
    network = apd.Network(target, ["token.weight"])
    for x in (padded, padded.clamp_min(1)):
        network.check(x)
    assert target.token.padding_idx == 0
    components = apd.Components.random(network.shapes, 3, generator=torch.Generator().manual_seed(0))
    components = components.map(lambda t: t.double())
    found = apd.attributions.gradient(network, components, padded)
    target.token.padding_idx = None
    torch.testing.assert_close(apd.attributions.gradient(network, components, padded), found)


def test_a_derivative_inside_the_target_is_refused_by_name() -> None:
    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.o = nn.Linear(5, 6), nn.Linear(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.func.grad(lambda v: self.o(self.a(v).tanh()).sum())(x)

    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"a.weight: the gradients at module 'a' are not .*does forward differ"):
        apd.Network(Slope(), ["a.weight"]).check(x)


def test_modules_that_are_not_decomposed_may_run_inside_vmap() -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.o = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(torch.vmap(self.a)(x).tanh())

    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    apd.Network(Mapped(), ["o.weight"]).check(x)
