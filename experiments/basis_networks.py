"""One function in many bases: networks whose weights differ and whose outputs do not (chapter 31).

A toy model relu(x W V + b) with matrices W [n, d] and V [d, n] stays the same function if its inputs and outputs come
in another orthonormal basis Q [n, n], and if the d numbers between the matrices are multiplied by any invertible
M [d, d]: W' = Q^T W M, V' = M^-1 V Q. What was found in one basis is carried to another by the same two products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

import apd_minimal as apd
from apd_minimal.targets.training import train, xavier

Cut = tuple[tuple[int, ...], tuple[int, ...]]  # sizes of the blocks of inputs, and of the hidden numbers


@dataclass(frozen=True)
class Change:
    """A change of basis: x' = x Q for inputs and outputs, h' = h M for the numbers between the two matrices."""

    Q: Tensor  # [n, n], orthogonal
    M: Tensor  # [d, d], invertible

    def matrices(self, path: str) -> tuple[Tensor, Tensor]:
        """Give L and R of a weight, which becomes L W R."""
        return (self.Q.T, self.M) if path.startswith("encode") else (torch.linalg.inv(self.M), self.Q)

    @property
    def back(self) -> Change:
        """The change that undoes this one."""
        return Change(self.Q.T, torch.linalg.inv(self.M))

    def of(self, components: apd.Components) -> apd.Components:
        """Carry components of the whole matrices over."""
        both = {path: self.matrices(path) for path in components.paths}
        A = {path: both[path][0].to(t) @ t for path, t in components.A.items()}
        return apd.Components(A, {path: t @ both[path][1].to(t) for path, t in components.B.items()})


def orthogonal(n: int, seed: int) -> Tensor:
    """Draw a random orthogonal matrix [n, n]."""
    normal = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    Q, R = torch.linalg.qr(normal)
    return Q * R.diag().sign()  # without the signs, it is not uniform


def change(name: str, n: int, d: int, seed: int) -> Change:
    """Give a change by its name.

    Args:
        name: "plain", "inputs rotated", "hidden rotated", "scaled 4" (h times 4), "stretched 4" (the first half of the
            hidden numbers times 4, the others divided by 4), "mixed 4" (such a stretch between two rotations);
            everything else changes nothing.
        n: inputs.
        d: hidden numbers.
        seed: of the rotation.
    """
    Q, M = torch.eye(n, dtype=torch.double), torch.eye(d, dtype=torch.double)
    kind, _, size = name.rpartition(" ")
    if name == "inputs rotated":
        Q = orthogonal(n, seed)
    elif name == "hidden rotated":
        M = orthogonal(d, seed)
    elif kind == "scaled":
        M = M * float(size)
    elif kind == "stretched":
        M = torch.diag(torch.where(torch.arange(d) < d / 2, float(size), 1 / float(size)).double())
    elif kind == "mixed":
        M = orthogonal(d, seed) @ change(f"stretched {size}", n, d, seed).M @ orthogonal(d, seed + 1)
    return Change(Q, M)


class Untied(apd.targets.TMS):
    """A TMS 5-2 whose decoder is a matrix of its own, in training as well: relu(x W V + b).

    Args:
        draws: 1 starts the decoder as the transpose of the encoder, so that both start as the tied network does; 2
            draws a start of its own for it.
    """

    def __init__(self, draws: int) -> None:
        super().__init__(5, 2)
        self.draws = draws
        self.decode = nn.Linear(2, 5, bias=False)  # type: ignore[assignment]

    def fit(self, seed: int = 0, steps: int | None = None, batch_size: int | None = None) -> Untied:
        """Train as `TMS.fit` does, with the same settings."""
        data, generator = self.data(batch_size or 1024), torch.Generator().manual_seed(seed)
        steps = steps or 5000
        xavier(self.encode.weight, generator)
        with torch.no_grad():
            self.decode.weight.copy_(self.encode.weight.T)
        if self.draws == 2:
            xavier(self.decode.weight, generator)
        optimiser = torch.optim.AdamW(self.parameters(), lr=5e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)

        def loss(step: int) -> Tensor:
            x = data(step, generator)
            return (self(x) - x).square().mean()

        train(optimiser, schedule, steps, loss)
        return self

    @property
    def carried(self) -> Tensor:
        """Which features come through [n]: of a feature alone, at 1, at least a half comes out at its own output."""
        with torch.no_grad():
            return self(torch.eye(self.n_features)).diag() >= 0.5


def whole_matrices(tms: apd.targets.TMS) -> dict[str, Tensor]:
    """Give the encoder [n, d] and the decoder [d, n] of a TMS; if it is tied, the one is the transpose of the other."""
    W = tms.encode.weight.detach().T
    return {"encode": W, "decode": tms.decode.weight.detach().T if isinstance(tms, Untied) else W.T}


def moved_matrices(tms: apd.targets.TMS, change: Change) -> tuple[Tensor, Tensor]:
    """Give the encoder [n, d] and the decoder [d, n] after a change, in double precision."""
    W, V = (L @ m.double() @ R for path, m in whole_matrices(tms).items() for L, R in [change.matrices(path)])
    return W, V


def imbalance(W: Tensor, V: Tensor) -> float:
    """Give |W^T W - V V^T| over |W^T W| + |V V^T| of W [n, d] and V [d, n]: 0 where they are balanced."""
    return float((W.T @ W - V @ V.T).norm() / ((W.T @ W).norm() + (V @ V.T).norm()))


def balanced(tms: apd.targets.TMS, change: Change) -> Change:
    """Follow a change of the hidden numbers by the one that balances the two matrices: W^T W = V V^T after both.

    It is read off the changed matrices alone, whose hidden numbers it maps by a symmetric positive matrix.
    """
    W, V = moved_matrices(tms, change)
    G, H = W.T @ W, V @ V.T
    half, inverse = _power(G, 0.5), _power(G, -0.5)
    return Change(change.Q, change.M @ _power(inverse @ _power(half @ H @ half, 0.5) @ inverse, 0.5))


def _power(S: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(S)
    return vectors @ torch.diag(values**power) @ vectors.T


def mechanisms(tms: apd.targets.TMS) -> dict[str, Tensor]:
    """Give feature j's row of the encoder and its column of the decoder, as one mechanism: [J, d_in, d_out] each."""
    return by_feature(whole_matrices(tms))


def by_feature(whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Do so for any encoder [n, d] and decoder [d, n]."""
    rows = torch.diag_embed(whole["encode"].T).permute(1, 2, 0)  # [J, n, d]
    return {"encode": rows, "decode": torch.diag_embed(whole["decode"]).transpose(0, 1)}


class Coder(nn.Module):
    """The function of a TMS in another basis, its two matrices whole or cut into blocks that are weights of their own.

    Args:
        tms: in its own basis.
        change: of the basis.
        cut: sizes of the blocks of the inputs, and of the hidden numbers; None for whole matrices.
    """

    Q: Tensor

    def __init__(self, tms: apd.targets.TMS, change: Change, cut: Cut | None = None) -> None:
        super().__init__()
        n, d = tms.n_features, tms.d_hidden
        self.cut: Cut = cut or ((n,), (d,))
        assert sum(self.cut[0]) == n and sum(self.cut[1]) == d
        matrices = {
            path: (L @ W.double() @ R) for path, W in whole_matrices(tms).items() for L, R in [change.matrices(path)]
        }
        self.encode, self.decode = (
            nn.ModuleList(_linear(block) for block in blocks(path, matrices[path], self.cut)) for path in matrices
        )
        self.bias = nn.Parameter(tms.bias.detach().clone())
        self.register_buffer("Q", change.Q.to(self.bias))

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct x [..., n]."""
        hidden = self.hidden(x @ self.Q).split(self.cut[1], -1)
        out = sum(layer(h) for layer, h in zip(self.decode, hidden, strict=True))
        return torch.relu(out @ self.Q.T + self.bias)

    def hidden(self, rotated: Tensor) -> Tensor:
        """Give the numbers between the matrices [..., d], for inputs in the network's own basis."""
        parts, n = rotated.split(self.cut[0], -1), len(self.cut[1])
        products = [layer(parts[i // n]) for i, layer in enumerate(self.encode)]
        return torch.cat([sum(products[i::n]) for i in range(n)], dim=-1)

    @property
    def weights(self) -> list[str]:
        """The parameter paths to decompose."""
        return [f"{part}.{i}.weight" for part in ("encode", "decode") for i in range(len(getattr(self, part)))]

    def whole(self, components: apd.Components) -> apd.Components:
        """Put the blocks of each component together: components of "encode" and "decode"."""
        matrices = {}
        for path, n in (("encode", len(self.cut[1])), ("decode", 1)):
            own = [components.matrices(p) for p in components.paths if p.startswith(path)]
            matrices[path] = torch.cat([torch.cat(own[i : i + n], -1) for i in range(0, len(own), n)], -2)
        return apd.Components.from_matrices(matrices)

    def cut_up(self, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cut matrices [..., d_in, d_out] of "encode" and "decode" into the blocks of this network."""
        return {
            f"{path}.{i}.weight": block
            for path, matrix in matrices.items()
            for i, block in enumerate(blocks(path, matrix, self.cut))
        }


class InUnits(Coder):
    """The same function again, each feature measured in a unit of its own: relu(((x u) W' V') / u + b).

    The units u [n] make the row and the column of every feature equally long: W' = W / u by rows, V' = V u by columns.
    They need inputs that are features; nothing that an M does between the matrices has the same effect.

    Args:
        tms: in its own basis.
        change: of the hidden numbers; inputs must stay as they are.
    """

    units: Tensor

    def __init__(self, tms: apd.targets.TMS, change: Change) -> None:
        super().__init__(tms, change)
        W, V = moved_matrices(tms, change)
        self.register_buffer("units", (W.norm(dim=1) / V.norm(dim=0)).sqrt().to(self.bias))
        self.get_parameter("encode.0.weight").data /= self.units
        self.get_parameter("decode.0.weight").data *= self.units[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct x [..., n]."""
        return torch.relu(self.decode[0](self.hidden(x * self.units)) / self.units + self.bias)

    def whole(self, components: apd.Components) -> apd.Components:
        """Give components of "encode" and "decode", in the units of the inputs."""
        own = super().whole(components)
        encode, decode = (own.matrices(path) for path in ("encode", "decode"))
        return apd.Components.from_matrices({"encode": encode * self.units[:, None], "decode": decode / self.units})


def blocks(path: str, matrix: Tensor, cut: Cut) -> list[Tensor]:
    """Cut a matrix [..., d_in, d_out]: the encoder by inputs and hidden numbers, the decoder by hidden numbers."""
    if path == "decode":
        return [matrix[..., a:b, :] for a, b in _edges(cut[1])]
    return [matrix[..., a:b, c:d] for a, b in _edges(cut[0]) for c, d in _edges(cut[1])]


def _edges(sizes: Sequence[int]) -> list[tuple[int, int]]:
    return list(pairwise([0, *accumulate(sizes)]))


def _linear(matrix: Tensor) -> nn.Linear:
    layer = nn.Linear(matrix.shape[0], matrix.shape[1], bias=False)
    layer.weight.data = matrix.T.float().contiguous()
    return layer


class OneScaleAdam(torch.optim.Adam):
    """Adam with one second moment for each matrix in place of one for each entry.

    Entry by entry, Adam divides by a root mean square that belongs to a coordinate, so that a rotated run takes other
    steps. The mean square over a whole matrix is the same in every orthonormal basis, and so is this step.

    Args:
        parameters: factors [..., rows, columns].
        lr: learning rate; the factors' restarts and components, in front, have scales of their own.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step, by the gradients that are there."""
        group = self.param_groups[0]
        beta1, beta2 = group["betas"]
        for p in group["params"]:
            state = self.state[p]
            if not state:
                state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            state["step"] += 1
            t = int(state["step"])
            square = p.grad.square().mean((-2, -1), keepdim=True)
            state["exp_avg"].lerp_(p.grad, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).add_((1 - beta2) * square)
            scale = (state["exp_avg_sq"] / (1 - beta2**t)).sqrt() + group["eps"]
            p.sub_(group["lr"] / (1 - beta1**t) * state["exp_avg"] / scale)


OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "Adam": lambda p, lr: torch.optim.Adam(p, lr=lr),
    "one-scale Adam": OneScaleAdam,
}


def apart(
    tms: apd.targets.TMS, change: Change, optimiser: str, steps: Sequence[int], seed: int, lr: float
) -> list[float]:
    """Train from one start in two bases, and say how far apart the components are: their distance over their length.

    Everything is in double precision, and the start in the second basis is that of the first, carried over. Batches
    are the same, too. The distance is taken in the first basis.

    Args:
        tms: in its own basis.
        change: to the second basis.
        optimiser: one of `OPTIMISERS`.
        steps: after how many steps to look, increasing.
        seed: of start and batches.
        lr: learning rate.
    """
    config = apd.Config(**_settings(tms) | {"lr": lr, "seed": seed, "steps": max(steps) + 1})
    still = Change(torch.eye(tms.n_features).double(), torch.eye(tms.d_hidden).double())
    runs = [_begun(tms, way, optimiser, config) for way in (still, change)]
    with torch.no_grad():
        first, second = (run.components for run in runs)
        for path in first.paths:
            L, R = change.matrices(path)
            second.A[path].copy_(L @ first.A[path])
            second.B[path].copy_(first.B[path] @ R)
    found = []
    for step in range(1, max(steps) + 1):
        for run in runs:
            run.advance()
        if step in steps:
            one, other = (run.components.map(Tensor.detach).restart(0) for run in runs)
            gap, size = one.flat() - change.back.of(other).flat(), one.flat()
            found.append(float(gap.norm() / size.norm()))
    return found


def _settings(tms: apd.targets.TMS) -> dict[str, Any]:
    """Give the recipe's settings, one restart, without tidying, which is no gradient step."""
    names = apd.Config.__dataclass_fields__
    return {k: v for k, v in tms.recipe.items() if k in names} | {"restarts": 1, "tidy_every": 0.0}


def _begun(tms: apd.targets.TMS, way: Change, optimiser: str, config: apd.Config) -> Any:
    from apd_minimal.algorithm import begin

    network = Coder(tms, way).double()
    for path, W in whole_matrices(tms).items():  # `Coder` rounds to single precision
        L, R = way.matrices(path)
        getattr(network, path)[0].weight.data = (L @ W.double() @ R).T.contiguous()
    network.Q = way.Q
    data = tms.recipe["batches"]
    run = begin(apd.Network(network, network.weights), lambda step, g: data(step, g).double(), config)
    run.optimiser = OPTIMISERS[optimiser](run.parameters(), config.lr)  # type: ignore[assignment]
    return run


def geometric(first: float, last: float, n: int) -> list[int]:
    """Give n whole numbers from first to last, evenly spaced on a logarithmic scale, without repeats."""
    return sorted({round(math.exp(math.log(first) + i / (n - 1) * math.log(last / first))) for i in range(n)})
