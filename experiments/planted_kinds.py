"""Nine kinds of planted networks (experiments/planted.py): the same mechanisms in nine architectures."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from apd_minimal.rules import Rule, rule
from experiments.planted import Planted, Space


class Decay(nn.Module):
    """s -> a * s, entry by entry: the diagonal of a state-space model.

    Args:
        d: number of states.
    """

    def __init__(self, d: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(d))

    def forward(self, s: Tensor) -> Tensor:
        """Multiply s [..., d] by a."""
        return self.a * s


@rule.register
def _(module: Decay) -> dict[str, Rule]:
    def unrows(y: Tensor, like: Tensor) -> Tensor:
        return y.diagonal(dim1=-2, dim2=-1)  # every number of the input is a row of its own, [..., d, 1]

    return {"a": Rule(lambda w: w[None], lambda m: m[0], lambda s: s[..., None], unrows)}


class MLP(Planted):
    """y = relu(relu(x E) M) D, with three neurons a layer for each mechanism."""

    def build(self) -> None:
        """Make the layers."""
        first, second = self.shuffled(3), self.shuffled(3)
        self.encode = self.linear("encode", self.x, first, 1.4)
        self.middle = self.linear("middle", first, second, 1.4)
        self.decode = self.linear("decode", second, self.y)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, 2 n] to [B, 2 n]."""
        return self.decode(_bend(self.middle(_bend(self.encode(x)))))


class CNN(Planted):
    """Two convolutions, a mean over the picture and a head; a mechanism sees stripes of its own direction and colour.

    Stripes of period 3 have four directions, and each is a plane of the patches of 3 by 3; these are orthogonal, so
    that a filter of one direction is blind to the others.
    """

    side = 6

    def build(self) -> None:
        """Make the layers."""
        n, colours = self.n, -(-self.n // 4)
        turn = torch.linalg.qr(torch.randn(colours, colours, generator=self.draws)).Q
        self.colour = turn[torch.arange(n) // 4]  # [n, channels]
        waves = _stripes(3)[torch.arange(n) % 4]  # [n, 3, 9]: level, cosine, sine
        middle, last = self.shuffled(2), self.shuffled(3)
        seen = torch.einsum("jc,jwp->jwcp", self.colour, waves[:, 1:]).flatten(2)
        between = torch.einsum("jhc,jwp->jhwcp", middle, waves).flatten(3).flatten(1, 2)
        self.first, self.second = (
            nn.Conv2d(d_in, d, 3, padding=1, padding_mode="circular", bias=False)
            for d_in, d in ((colours, 2 * n), (2 * n, 3 * n))
        )
        self.plant("first.weight", seen, self.blocks(2, 2, 1.4), middle)
        self.plant("second.weight", between, self.blocks(6, 3, 1.4), last)
        self.head = self.linear("head", last, self.y)

    def make(self, on: Tensor, generator: torch.Generator) -> Tensor:
        """Draw pictures [B, channels, 6, 6]: stripes of random strengths and places for each mechanism that is on."""
        z = torch.randn(len(on), self.n, 2, generator=generator) * on[:, :, None]
        waves = _stripes(self.side)[torch.arange(self.n) % 4, 1:] * self.side / 3
        picture = torch.einsum("bjw,jwp,jc->bcp", z, waves, self.colour)
        return rearrange(picture, "b c (h w) -> b c h w", h=self.side)

    def forward(self, x: Tensor) -> Tensor:
        """Map pictures [B, channels, 6, 6] to [B, 2 n]."""
        return self.head(_bend(self.second(_bend(self.first(x)))).mean((2, 3)))


class RNN(Planted):
    """h_t = tanh(x_t E + h_(t-1) R) and y = h_T D, with three states for each mechanism."""

    length = (6,)

    def build(self) -> None:
        """Make the layers."""
        state = self.shuffled(3)
        self.encode = self.linear("encode", self.x, state)
        self.again = self.linear("again", state, state, 0.9)
        self.decode = self.linear("decode", state, self.y)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, T, 2 n] to [B, 2 n]."""
        inputs = self.encode(x)
        h = inputs[:, 0].tanh()
        for t in range(1, inputs.shape[1]):
            h = (inputs[:, t] + self.again(h)).tanh()
        return self.decode(h)


class SSM(Planted):
    """s_t = a * s_(t-1) + x_t B, and y is a head on the mean of relu(s_t C): a diagonal state-space model.

    A mechanism has two states; those of every other mechanism forget slowly, those of the others fast.
    """

    length = (8,)
    neurons = 3  # of a mechanism, after its states

    def build(self) -> None:
        """Make the layers."""
        state, out = self.shuffled(2), self.shuffled(self.neurons)
        self.into = self.linear("into", self.x, state, 0.7)
        self.decay = Decay(2 * self.n)
        slow = (torch.arange(self.n) % 2 == 0)[:, None, None]
        spread = 0.1 * torch.rand(self.n, 1, 2, generator=self.draws)
        self.plant("decay.a", torch.ones(self.n, 1, 1), torch.where(slow, 0.85 + spread, 0.45 + spread), state)
        self.out = self.linear("out", state, out, 1.4)
        self.head = self.linear("head", out, self.y)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, T, 2 n] to [B, 2 n]."""
        inputs = self.into(x)
        s, total = inputs[:, 0], torch.zeros(())
        for t in range(inputs.shape[1]):
            s = s if t == 0 else self.decay(s) + inputs[:, t]
            total = total + _bend(self.out(s))
        return self.head(total / inputs.shape[1])


class SelectiveSSM(Planted):
    """u = silu(conv(x E)) over time, s_t = (1 - d_t) * s_(t-1) + d_t * u_t, and y = (s_T * silu(x_T G)) D.

    The convolution is depthwise and sees three moments; the step d_t = sigmoid(u_t S) follows the input.
    """

    length = (6,)

    def build(self) -> None:
        """Make the layers."""
        state = self.shuffled(2)
        self.encode = self.linear("encode", self.x, state, 1.4)
        self.conv = nn.Conv1d(2 * self.n, 2 * self.n, 3, padding=2, groups=2 * self.n, bias=False)
        self.plant("conv.weight", torch.eye(3).expand(self.n, 3, 3), self.blocks(3, 2), state)
        self.step = self.linear("step", state, state, 2.0)
        self.gate = self.linear("gate", self.x, state, 1.4)
        self.decode = self.linear("decode", state, self.y, 1.4)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, T, 2 n] to [B, 2 n]."""
        T = x.shape[1]
        u = F.silu(self.conv(self.encode(x).mT)[..., :T]).mT
        step, s = self.step(u).sigmoid(), torch.zeros(())
        for t in range(T):
            s = (1 - step[:, t]) * s + step[:, t] * u[:, t]
        return self.decode(s * F.silu(self.gate(x[:, -1])))


class Attention(Planted):
    """The last token looks at all: y = sum over heads of softmax(q K^T) V O, two mechanisms to a head."""

    length = (5,)

    def build(self) -> None:
        """Make the layers."""
        if self.n % 2:
            raise ValueError(f"n must be even, since two mechanisms share a head, got {self.n}")
        look, carry = self.in_heads(), self.in_heads()
        self.query = self.linear("query", self.x, look, 1.4)
        self.key = self.linear("key", self.x, look, 1.4)
        self.value = self.linear("value", self.x, carry, 1.4)
        self.out = self.linear("out", carry, self.y, 1.4)

    def in_heads(self) -> Space:
        """Draw a space in which pairs of mechanisms share a head of width 4, which is rotated."""
        turns = torch.linalg.qr(torch.randn(self.n // 2, 4, 4, generator=self.draws)).Q
        return torch.block_diag(*turns).reshape(self.n, 2, 2 * self.n)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, T, 2 n] to [B, 2 n]."""
        q = rearrange(self.query(x[:, -1]), "b (h e) -> b h e", e=4)
        k, v = (rearrange(f(x), "b t (h e) -> b h t e", e=4) for f in (self.key, self.value))
        pattern = (torch.einsum("bhe,bhte->bht", q, k) / 2).softmax(-1)
        return self.out(torch.einsum("bht,bhte->bhe", pattern, v).flatten(1))


class Experts(Planted):
    """y = sum_e softmax(x R)_e expert_e(x): a mixture of two experts, between which the mechanisms are shared out."""

    columns = 2  # of the router

    def build(self) -> None:
        """Make the layers."""
        own = torch.eye(2)[torch.arange(self.n) % 2]  # [n, 2]
        self.router = nn.Linear(self.inputs * self.n, self.columns, bias=False)
        to = own[:, None] if self.columns == 2 else torch.ones(self.n, 1, 1)
        self.plant("router.weight", self.x, self.blocks(self.inputs, 1), to)
        self.experts = nn.ModuleList(nn.Module() for _ in range(2))
        for e in range(2):
            hidden = self.shuffled(3)
            mine = own[:, e, None, None]
            self.linear(f"experts.{e}.encode", mine * self.x, hidden, 1.4)
            self.linear(f"experts.{e}.decode", mine * hidden, self.y, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, 2 n] to [B, 2 n]."""
        return self.mixed(x, self.router(x).softmax(-1))

    def mixed(self, x: Tensor, share: Tensor) -> Tensor:
        """Add up what the experts say, with shares [B, 2]."""
        each = [e.get_submodule("decode")(_bend(e.get_submodule("encode")(x))) for e in self.experts]
        return torch.einsum("be,ebo->bo", share, torch.stack(each))


class Bilinear(Planted):
    """y = ((x L) * (x R)) D, with three neurons for each mechanism."""

    def build(self) -> None:
        """Make the layers."""
        hidden = self.shuffled(3)
        self.left = self.linear("left", self.x, hidden)
        self.right = self.linear("right", self.x, hidden)
        self.decode = self.linear("decode", hidden, self.y)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, 2 n] to [B, 2 n]."""
        return self.decode(self.left(x) * self.right(x))


class Graph(Planted):
    """h_v = relu(x_v S + (mean of v's neighbours' x) N) on a ring of six nodes, and y = (mean of h) D."""

    length = (6,)

    def build(self) -> None:
        """Make the layers."""
        hidden = self.shuffled(3)
        self.own = self.linear("own", self.x, hidden, 1.4)
        self.others = self.linear("others", self.x, hidden, 2.0)
        self.decode = self.linear("decode", hidden, self.y, 1.4)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, nodes, 2 n] to [B, 2 n]."""
        around = (x.roll(1, 1) + x.roll(-1, 1)) / 2
        return self.decode(_bend(self.own(x) + self.others(around)).mean(1))


class ThreeInputMLP(MLP):
    """The MLP with three inputs for each mechanism, as many as neurons: its data move the neurons in all directions."""

    inputs = 3


class SquareMLP(ThreeInputMLP):
    """The same with three outputs for each mechanism as well, so that no direction of its neurons is read by nobody."""

    outputs = 3


class SquareSSM(SSM):
    """The state-space model with as many neurons as states: a mean over time of three moves in two directions only."""

    neurons = 2


class OwnColourCNN(Planted):
    """Two convolutions, a mean over four places and a head; a mechanism sees two colours of its own.

    Its pictures are noise in these colours, so that a filter's patch of 3 by 3 moves in all directions; there is no
    padding. Each layer has two channels for a mechanism, so that none is read by nobody.
    """

    side = 6

    def build(self) -> None:
        """Make the layers."""
        n, patch = self.n, torch.eye(9)
        middle, last = self.shuffled(2), self.shuffled(2)
        seen, between = (torch.einsum("jac,pq->japcq", s, patch).reshape(n, 18, -1) for s in (self.x, middle))
        self.first, self.second = (nn.Conv2d(2 * n, 2 * n, 3, bias=False) for _ in range(2))
        self.plant("first.weight", seen, self.blocks(18, 2, 2 / 3), middle)
        self.plant("second.weight", between, self.blocks(18, 2, 2 / 3), last)
        self.head = self.linear("head", last, self.y)

    def make(self, on: Tensor, generator: torch.Generator) -> Tensor:
        """Draw pictures [B, 2 n, 6, 6]: at every place a random colour of each mechanism that is on."""
        z = torch.randn(len(on), self.side, self.side, self.n, 2, generator=generator) * on[:, None, None, :, None]
        return torch.einsum("bhwja,jac->bchw", z, self.x)

    def rows(self, x: Tensor) -> Tensor:
        """View pictures as rows, one for each place: [B, 36, 2 n]."""
        return x.flatten(2).mT

    def forward(self, x: Tensor) -> Tensor:
        """Map pictures [B, 2 n, 6, 6] to [B, 2 n]."""
        return self.head(_bend(self.second(_bend(self.first(x)))).mean((2, 3)))


class OneGateExperts(Experts):
    """The mixture of experts with three inputs for each mechanism and one gate: sigmoid(x R) goes to the first expert.

    Of a router with two columns the data show the difference alone, of one column all.
    """

    inputs = 3
    columns = 1

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, 3 n] to [B, 2 n]."""
        first = self.router(x).sigmoid()
        return self.mixed(x, torch.cat([first, 1 - first], -1))


KINDS: dict[str, type[Planted]] = {
    "MLP": MLP,
    "CNN": CNN,
    "RNN": RNN,
    "SSM": SSM,
    "selective SSM": SelectiveSSM,
    "attention": Attention,
    "experts": Experts,
    "bilinear": Bilinear,
    "graph": Graph,
}
"""The kinds of network by name."""

DETERMINED: dict[str, type[Planted]] = {
    "MLP, three inputs": ThreeInputMLP,
    "MLP, all three": SquareMLP,
    "SSM, all two": SquareSSM,
    "CNN, own colours": OwnColourCNN,
    "experts, one gate": OneGateExperts,
}
"""Variants whose data determine their mechanisms, where those of `KINDS` leave a part open (chapter 33)."""

CNN.most = 12


def _bend(x: Tensor) -> Tensor:
    """Bend x by a leaky rectifier: no neuron is ever dead, so that every planted weight matters on some input."""
    return F.leaky_relu(x, 0.2)


def _stripes(side: int) -> Tensor:
    """Give level, cosine and sine of stripes of period 3, four directions, unit length: [4, 3, side^2]."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    turns = torch.stack([row, column, row + column, row - column]).flatten(1) * (2 * math.pi / 3)
    waves = torch.stack([torch.ones_like(turns), turns.cos() * math.sqrt(2), turns.sin() * math.sqrt(2)], 1)
    return waves / side
