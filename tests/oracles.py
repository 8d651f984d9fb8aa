"""Slow, plain definitions that the fast code is compared with, and the networks on which this is done.

The oracle for the gates is `functional_call` with one set of weights for each sample, under `vmap`. It knows
nothing of hooks: all that it needs is how each weight is stored, `Case.stored`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import apd_minimal as apd


class TiedText(nn.Module):
    """An embedding whose weight is also the head's: tokens [B, T] to logits [B, T, n_tokens]."""

    def __init__(self, n_tokens: int = 6, d: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(n_tokens, d)
        self.head = nn.Linear(d, n_tokens)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(tokens)))


class Text(nn.Module):
    """An embedding, a mean over positions, a head: tokens [B, T] to [B, n_out]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.sigmoid(self.embed(tokens)).mean(1))


class Sequence(nn.Module):
    """Positions that talk to each other: x [B, T, d] to [B, T, 3], with normalisation and causal mixing."""

    def __init__(self, d: int = 4, hidden: int = 5) -> None:
        super().__init__()
        self.mix = nn.Linear(d, d, bias=False)
        self.norm = nn.LayerNorm(d)
        self.block = nn.ModuleDict({"up": nn.Linear(d, hidden), "down": nn.Linear(hidden, 3)})
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=x.dtype, device=x.device).tril()
        attention = ((x @ x.transpose(1, 2)).masked_fill(mask == 0, -1e9)).softmax(-1)
        y = self.norm(x + attention @ self.mix(x))
        return self.block["down"](self.dropout(F.gelu(self.block["up"](y))))


class Twice(nn.Module):
    """One square layer, used twice, and once more through the transpose of its weight."""

    def __init__(self, d: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(d, d)
        self.same = self.layer
        self.back = apd.rules.TransposedLinear(self.layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(torch.tanh(self.layer(torch.tanh(self.same(x)))))


def linear(P: Tensor) -> Tensor:
    """How `nn.Linear` stores the matrix [..., d_in, d_out]."""
    return P.transpose(-2, -1)


def kept(P: Tensor) -> Tensor:
    """How `nn.Embedding` stores it."""
    return P


def convolution(*shape: int) -> Callable[[Tensor], Tensor]:
    """How a convolution with a weight of this shape stores it."""
    return lambda P: P.transpose(-2, -1).reshape(*P.shape[:-2], *shape)


@dataclass
class Case:
    """A network, the weights that are decomposed, how each is stored, and a source of inputs."""

    target: nn.Module
    stored: dict[str, Callable[[Tensor], Tensor]]
    inputs: Callable[[int, torch.Generator], Tensor]
    network: apd.Network = field(init=False)

    def __post_init__(self) -> None:
        self.target.double()
        self.network = apd.Network(self.target, list(self.stored))

    def x(self, batch: int = 4, seed: int = 0) -> Tensor:
        return self.inputs(batch, torch.Generator().manual_seed(seed))

    def components(
        self, C: int = 3, restarts: int | None = None, seed: int = 1, m: int | None = None
    ) -> apd.Components:
        """Random components of about the size of the weights, in double precision."""
        shapes = {path: tuple(matrix.shape) for path, matrix in self.network.weights.items()}
        generator = torch.Generator().manual_seed(seed)
        lead = (C,) if restarts is None else (restarts, C)
        A, B = {}, {}
        for path, (d_in, d_out) in shapes.items():
            rank = m or min(d_in, d_out)
            A[path] = torch.randn(*lead, d_in, rank, generator=generator, dtype=torch.float64)
            B[path] = torch.randn(*lead, rank, d_out, generator=generator, dtype=torch.float64) * d_out**-0.5
        return apd.Components(A, B)


def _mlp() -> Case:
    target = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    return Case(target, {"0.weight": linear, "2.weight": linear}, lambda b, g: _normal(b, 3, generator=g))


def _tms(rotated: bool = False, identity: bool = False) -> Case:
    target = apd.targets.TMS(5, 2, identity=identity)
    with torch.no_grad():
        target.bias.uniform_(0.1, 0.5)
    if rotated:
        target.rotate(seed=3)
    inputs = lambda b, g: torch.rand(b, 5, generator=g, dtype=torch.float64)  # noqa: E731
    return Case(target, {path: linear for path in target.weights}, inputs)


def _tokens(high: int, length: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda b, g: torch.randint(0, high, (b, length), generator=g)


def _conv2d() -> Case:
    first = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
    target = nn.Sequential(first, nn.Tanh(), nn.Conv2d(3, 2, 2, bias=False), nn.Flatten(), nn.Linear(8, 2))
    stored = {"0.weight": convolution(3, 2, 3, 2), "2.weight": convolution(2, 3, 2, 2), "4.weight": linear}
    return Case(target, stored, lambda b, g: _normal(b, 2, 6, 5, generator=g))


def _conv1d() -> Case:
    target = nn.Sequential(nn.Conv1d(2, 3, 3, stride=2, padding=1, dilation=2), nn.Tanh(), nn.Conv1d(3, 2, 1))
    stored = {"0.weight": convolution(3, 2, 3), "2.weight": convolution(2, 3, 1)}
    return Case(target, stored, lambda b, g: _normal(b, 2, 7, generator=g))


def _sequence() -> Case:
    stored = {"mix.weight": linear, "block.up.weight": linear, "block.down.weight": linear}
    return Case(Sequence(), stored, lambda b, g: _normal(b, 4, 4, generator=g))


def _normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


CASES: dict[str, Callable[[], Case]] = {
    "mlp": _mlp,
    "tms": _tms,
    "rotated tms": lambda: _tms(rotated=True),
    "tms with identity": lambda: _tms(identity=True),
    "tied embedding": lambda: Case(TiedText(), {"embed.weight": kept}, _tokens(6, 3)),
    "tied embedding, by its head": lambda: Case(TiedText(), {"head.weight": linear}, _tokens(6, 3)),
    "embedding": lambda: Case(Text(), {"embed.weight": kept, "head.weight": linear}, _tokens(7, 5)),
    "conv2d": _conv2d,
    "conv1d": _conv1d,
    "sequence": _sequence,
    "twice": lambda: Case(Twice(), {"same.weight": linear}, lambda b, g: _normal(b, 3, generator=g)),
}
every_case = pytest.mark.parametrize("name", CASES)


def case(name: str) -> Case:
    """A fresh network of that name; the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CASES[name]()


def with_weights(target: nn.Module, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Run the target with other tensors in place of the named parameters, wherever they are used."""
    users = {}
    for path, weight in weights.items():
        parameter = dict(target.named_parameters(remove_duplicate=False))[path]
        for name, module in target.named_modules():
            for key, p in module.named_parameters(recurse=False):
                if p is parameter:
                    users[f"{name}.{key}".lstrip(".")] = weight
    return functional_call(target, users, (x,), tie_weights=False)


def gated(
    one: Case, components: apd.Components, gates: Mapping[str, Tensor], x: Tensor, remainder: bool = False
) -> Tensor:
    """Run sample b with the weights sum_c g[b, c] P_c + r (theta* - sum_c P_c): [B, ...]."""
    one.target.eval()
    own = {path: one.target.get_parameter(path).detach() for path in one.stored}

    def run(sample: Tensor, g: dict[str, Tensor]) -> Tensor:
        weights = {}
        for path, stored in one.stored.items():
            P = components.A[path] @ components.B[path]
            weights[path] = stored(torch.einsum("c,cij->ij", g[path], P))
            if remainder:
                weights[path] = weights[path] + own[path] - stored(P.sum(0))
        return with_weights(one.target, weights, sample[None])[0]

    return vmap(run)(x, dict(gates))


def attributed(one: Case, components: apd.Components, x: Tensor, at: str = "target") -> Tensor:
    """Signed derivatives of every output along every component, from whole Jacobians: [B, C, n_out]."""
    one.target.eval()
    matrices = {path: stored(components.A[path] @ components.B[path]) for path, stored in one.stored.items()}
    point = {
        path: P.sum(0) if at == "components" else one.target.get_parameter(path).detach()
        for path, P in matrices.items()
    }
    rows = []
    for sample in x:
        jacobian = jacrev(lambda w, s=sample: with_weights(one.target, w, s[None]).flatten())(point)
        rows.append(sum(torch.einsum("o...,c...->co", jacobian[path], matrices[path]) for path in point))
    return torch.stack(rows)


def best_match(scores: Tensor) -> float:
    """Largest sum of scores [J, C] of a one-to-one match, by trying all."""
    J, C = scores.shape
    if J > C:
        return best_match(scores.T)
    return max(sum(float(scores[j, c]) for j, c in enumerate(order)) for order in permutations(range(C), J))


def state(target: nn.Module) -> dict[str, object]:
    """All of a network that must be as it was: bits of the weights, flags, gradients, modes and hooks."""
    return {
        "tensors": {name: (t.data_ptr(), t.clone()) for name, t in target.state_dict().items()},
        "requires_grad": {name: p.requires_grad for name, p in target.named_parameters()},
        "grad": {name: None if p.grad is None else p.grad.tolist() for name, p in target.named_parameters()},
        "training": {name: m.training for name, m in target.named_modules()},
        "hooks": {
            name: [len(getattr(m, kind)) for kind in vars(m) if "hooks" in kind and getattr(m, kind) is not None]
            for name, m in target.named_modules()
        },
        "attributes": {name: sorted(vars(m)) for name, m in target.named_modules()},
        "parametrised": {name: type(m) for name, m in target.named_modules()},
    }


def assert_same_state(before: dict[str, object], after: dict[str, object]) -> None:
    """Compare two `state`s, the tensors bit by bit and by address."""
    tensors = before["tensors"], after["tensors"]
    assert isinstance(tensors[0], dict)
    assert isinstance(tensors[1], dict)
    assert tensors[0].keys() == tensors[1].keys()
    for name, (address, t) in tensors[0].items():
        assert tensors[1][name][0] == address, f"{name} is another tensor"
        assert torch.equal(tensors[1][name][1], t), f"{name} changed"
    for key in before.keys() - {"tensors"}:
        assert before[key] == after[key], f"{key} changed"


def worth(one: Case, components: apd.Components, x: Tensor, gates: Tensor, remainder: bool) -> Tensor:
    """The outputs of every sample at each of the gates [K, C], all weights and samples alike: [K, B, n_out]."""
    shared = [{path: g.expand(len(x), -1) for path in one.stored} for g in gates]
    return torch.stack([gated(one, components, each, x, remainder).flatten(1).detach() for each in shared])


def slopes(one: Case, components: apd.Components, x: Tensor, gates: Tensor, remainder: bool) -> Tensor:
    """Derivatives of the outputs by gates that the samples share, at gates [C]: [B, C, n_out]."""

    def run(g: Tensor) -> Tensor:
        return gated(one, components, {path: g.expand(len(x), -1) for path in one.stored}, x, remainder).flatten(1)

    return jacrev(run)(gates).transpose(1, 2)


def shapley(game: Callable[[Tensor], Tensor], C: int) -> Tensor:
    """Shapley values of a game on gates [K, C] that gives [K, ...], from all orders, one by one: [C, ...]."""
    total: list[Tensor] = [torch.zeros(())] * C
    orders = list(permutations(range(C)))
    for order in orders:
        gates = torch.zeros(C + 1, C, dtype=torch.float64)
        for k, c in enumerate(order):
            gates[k + 1 :, c] = 1
        values = game(gates)
        for k, c in enumerate(order):
            total[c] = total[c] + (values[k + 1] - values[k]) / len(orders)
    return torch.stack(total)
