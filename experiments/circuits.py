"""Planted two-step circuits: a small residual network whose mechanisms are written down, not trained (chapter 32).

J mechanisms compute y_j = g(g(p_j) - g(q_j)) in two steps, with g(u) = relu(u) + relu(-u) / 4. The first layer writes
g(p_j) - g(q_j) into the stream, and the second reads it, bends it by g again and writes the result. A distractor, which
is often on beside them, needs one step only: y_z = g(z), by the first layer.

Nothing gives a mechanism away by its place. The stream is in a random orthonormal basis. And all J mechanisms use the
same neurons, each with a random pattern of its own: reading weights m_j [K] give the activations relu(m_j) or
relu(-m_j), times the size of the input. With one mechanism on at a time the writing weights, which solve a linear
system, turn each pattern into exactly its own output and into nothing for the others.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

PATHS = ("read.0.weight", "write.0.weight", "read.1.weight", "write.1.weight")
LEAK = 0.25


class Circuit(nn.Module):
    """Inputs p_1 .. p_J, q_1 .. q_J, z [B, 2 J + 1] to outputs y_1 .. y_J, y_z [B, J + 1].

    Args:
        seed: of directions and patterns.
        n_mechanisms: J.
        d_stream: width of the stream, at least 4 J + 2.
        neurons: K, of each shared group; at least 2 J. The first layer has two groups, and two neurons more.
        beside: chance that the distractor is on.
    """

    embed: Tensor
    unembed: Tensor

    def __init__(
        self, seed: int, n_mechanisms: int = 3, d_stream: int = 24, neurons: int = 12, beside: float = 0.3
    ) -> None:
        super().__init__()
        J, d, K = n_mechanisms, d_stream, neurons
        self.J, self.beside = J, beside
        generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.double)).Q
        inputs, slots, outputs = basis[: 4 * J + 2].split((2 * J + 1, J, J + 1))
        p, q, second = (_shared(J, K, generator) for _ in range(3))
        parts = {path: [] for path in PATHS}  # type: dict[str, list[Tensor]]
        none = torch.zeros(2, dtype=torch.double)
        for j in range(J):
            reads_p = torch.cat([p[0][j], torch.zeros(K).double(), none])
            reads_q = torch.cat([torch.zeros(K).double(), q[0][j], none])
            parts[PATHS[0]].append(torch.outer(inputs[j], reads_p) + torch.outer(inputs[J + j], reads_q))
            parts[PATHS[1]].append(torch.outer(torch.cat([p[1][:, j], -q[1][:, j], none]), slots[j]))
            parts[PATHS[2]].append(torch.outer(slots[j], second[0][j]))
            parts[PATHS[3]].append(torch.outer(second[1][:, j], outputs[j]))
        last = torch.zeros(2 * K + 2, dtype=torch.double)
        signs, sizes = last.clone(), last.clone()
        signs[-2:], sizes[-2:] = torch.tensor([1.0, -1.0]), torch.tensor([1.0, LEAK])
        parts[PATHS[0]].append(torch.outer(inputs[2 * J], signs))
        parts[PATHS[1]].append(torch.outer(sizes, outputs[J]))
        for path in PATHS[2:]:
            parts[path].append(torch.zeros_like(parts[path][0]))
        order = torch.randperm(2 * K + 2, generator=generator)  # of the first layer's neurons
        truth = {path: torch.stack(own).float() for path, own in parts.items()}
        truth[PATHS[0]], truth[PATHS[1]] = truth[PATHS[0]][..., order], truth[PATHS[1]][:, order]
        self.truth = truth
        self.register_buffer("embed", inputs.float())
        self.register_buffer("unembed", outputs.float())
        self.read, self.write = (
            nn.ModuleList(_linear(truth[f"{part}.{i}.weight"].sum(0)) for i in range(2)) for part in ("read", "write")
        )
        self.neurons = nn.ModuleList(nn.ReLU() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., 2 J + 1] to outputs [..., J + 1]."""
        r = x @ self.embed
        for read, relu, write in zip(self.read, self.neurons, self.write, strict=True):
            r = r + write(relu(read(r)))
        return r @ self.unembed.T

    @property
    def weights(self) -> list[str]:
        """The parameter paths to decompose."""
        return list(PATHS)

    def wanted(self, x: Tensor) -> Tensor:
        """Compute the outputs by the formulas, [..., J + 1]."""
        p, q, z = x.split((self.J, self.J, 1), -1)
        return torch.cat([bend(bend(p) - bend(q)), bend(z)], -1)

    def batch(self, step: int, generator: torch.Generator, n: int = 256) -> Tensor:
        """Draw inputs [n, 2 J + 1]: one mechanism a sample, and the distractor beside it or not."""
        values = 2 * torch.rand(n, 2 * self.J + 1, generator=generator) - 1
        one = torch.randint(self.J, (n,), generator=generator)
        z = torch.rand(n, 1, generator=generator) < self.beside
        on = torch.nn.functional.one_hot(one, self.J).bool()
        return values * torch.cat([on, on, z], 1)


def _shared(J: int, K: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Give reading weights [J, K] and writing weights [K, J]: relu(s m_j) D is g(s) for j, and 0 for the others."""
    m = torch.randn(J, K, generator=generator, dtype=torch.double) * K**-0.5
    patterns = torch.relu(torch.cat([m, -m]))  # [2 J, K]
    eye = torch.eye(J, dtype=torch.double)
    writes = torch.linalg.pinv(patterns) @ torch.cat([eye, LEAK * eye])
    scale = (writes.norm() / m.norm()).sqrt()  # both of one length: APD is not blind to it (chapter 31)
    return scale * m, writes / scale


def bend(u: Tensor) -> Tensor:
    """Compute g(u) = relu(u) + relu(-u) / 4, which is 0 at 0 only."""
    return torch.relu(u) + LEAK * torch.relu(-u)


def _linear(matrix: Tensor) -> nn.Linear:
    layer = nn.Linear(matrix.shape[0], matrix.shape[1], bias=False)
    layer.weight.data = matrix.T.contiguous()
    return layer
