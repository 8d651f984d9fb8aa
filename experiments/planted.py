"""Networks whose mechanisms are known, since their weights are made as sums of them.

Each network holds n small networks, its mechanisms, of the same kind. Their blocks of weights stand in spaces of their
own, and the spaces are hidden as far as the kind of network allows: inputs, outputs and heads are rotated at random,
neurons, channels and states are shuffled. A weight is a sum over mechanisms j, with blocks M_j [a, b]:

    W = sum_j U_j^T M_j V_j,   U_j [a, d_in] and V_j [b, d_out] with orthonormal rows, orthogonal to those of the others
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apd_minimal import checks
from apd_minimal.components import Components
from apd_minimal.data import PROBABILITY, SparseFeatures
from apd_minimal.rules import Rule, rule
from apd_minimal.study.metrics import Ownership, ownership
from apd_minimal.targets.training import numbers

Space = Tensor  # [n, a, d]: for each mechanism, a orthonormal rows


@dataclass(frozen=True)
class PlantedInputs:
    """A source of batches of inputs: each mechanism gets an input of its own with a small probability.

    Attributes:
        on: which mechanisms have an input.
        make: (on [B, n], generator) -> inputs [B, ...].
        noise: Gaussian noise in all directions, its size as a share of that of the inputs.
    """

    on: SparseFeatures
    make: Callable[[Tensor, torch.Generator], Tensor]
    noise: float = 0.0

    def __call__(self, step: int, generator: torch.Generator) -> Tensor:
        """Draw a batch of inputs [B, ...]; `step` is ignored."""
        x = self.make(self.on(step, generator), generator)
        if self.noise:
            x = x + self.noise * x.square().mean().sqrt() * torch.randn(x.shape, generator=generator)
        return x

    @property
    def mean_active(self) -> float:
        """Mean number of mechanisms with an input."""
        return self.on.mean_active


class Planted(nn.Module):
    """A network that is the sum of n mechanisms; its kinds are in experiments/planted_kinds.py.

    Args:
        n: number of mechanisms.
        probability: chance that a mechanism has an input.
        seed: of all weights, rotations and orders.

    Raises:
        TypeError, ValueError: numbers out of range.
    """

    inputs, outputs = 2, 2  # dimensions of a mechanism's own inputs and outputs
    length: tuple[int, ...] = ()  # positions of a sequence, or nodes of a graph
    most = 64

    def __init__(self, n: int = 6, probability: float = 0.1, seed: int = 0) -> None:
        super().__init__()
        self.n = checks.number("n", n, 2, self.most, whole=True)
        self.probability = checks.number("probability", probability, **PROBABILITY)
        self.draws = torch.Generator().manual_seed(numbers(seed)[0])
        self.true: dict[str, Tensor] = {}
        self.spaces: dict[str, tuple[Space, Space]] = {}  # per path, what the mechanisms read and write
        self.last: list[str] = []  # paths of the weights next to the outputs
        self.x, self.y = self.rotated(self.inputs), self.rotated(self.outputs)
        self.build()
        self.level()

    def build(self) -> None:
        """Make the layers and plant the mechanisms."""
        raise NotImplementedError

    @torch.no_grad()
    def level(self) -> None:
        """Scale the mechanisms' weights next to the outputs, so that each alone has outputs of mean square 1."""
        loudness = torch.stack(
            [self(self.make(on.expand(512, -1), self.draws)).square().mean() for on in torch.eye(self.n)]
        )
        for path in self.last:
            self.put(path, self.true[path] / loudness.sqrt()[:, None, None])

    @property
    def weights(self) -> list[str]:
        """The parameter paths to decompose: all of them."""
        return list(self.true)

    def mechanisms(self) -> dict[str, Tensor]:
        """Return the planted mechanisms, per path [n, d_in, d_out]."""
        return dict(self.true)

    @property
    def truth(self) -> Components:
        """The planted mechanisms as components."""
        return Components.from_matrices(self.true)

    def ownership(self, components: Components) -> Ownership:
        """Match components with mechanisms by weights, with the usual thresholds (`metrics.ownership`, chapter 7).

        Args:
            components: C components, without restarts.
        """
        return ownership(components, self.true)

    def data(self, batch_size: int = 256, noise: float = 0.0) -> PlantedInputs:
        """Create the source of batches, in which at least one mechanism of every sample has an input.

        Args:
            batch_size: samples in a batch.
            noise: in all directions, as a share of the size of the inputs.
        """
        on = SparseFeatures(self.n, self.probability, low=1.0, high=1.0, batch_size=batch_size, nonempty=True)
        return PlantedInputs(on, self.make, noise)

    def make(self, on: Tensor, generator: torch.Generator) -> Tensor:
        """Draw inputs: Gaussian in the spaces of the mechanisms that are on, at each position.

        Args:
            on: which mechanisms have an input, zeros and ones [B, n].
            generator: source of randomness.

        Returns:
            Tensor: [B, *length, d].
        """
        z = torch.randn(len(on), *self.length, self.n, self.inputs, generator=generator)
        z = z * on.reshape(len(on), *[1] * len(self.length), self.n, 1)
        return torch.einsum("b...ja,jai->b...i", z, self.x)

    def rows(self, x: Tensor) -> Tensor:
        """View inputs as rows that each lie in the spaces of the mechanisms that are on: [B, positions, d]."""
        return x if self.length else x.flatten(1)[:, None]  # a picture is one vector

    def rotated(self, a: int) -> Space:
        """Draw a space with `a` dimensions for each mechanism, rotated at random."""
        d = self.n * a
        return torch.linalg.qr(torch.randn(d, d, generator=self.draws)).Q.reshape(self.n, a, d)

    def shuffled(self, a: int) -> Space:
        """Draw a space with `a` neurons for each mechanism, in a random order."""
        d = self.n * a
        return torch.eye(d)[torch.randperm(d, generator=self.draws)].reshape(self.n, a, d)

    def blocks(self, a: int, b: int, gain: float = 1.0) -> Tensor:
        """Draw blocks [n, a, b] with equal singular values, which keep the mean square of an input times gain^2."""
        q = torch.linalg.qr(torch.randn(self.n, max(a, b), min(a, b), generator=self.draws)).Q
        return gain * math.sqrt(max(a, b) / b) * (q if a >= b else q.mT)

    def plant(self, path: str, into: Space, blocks: Tensor, out: Space) -> None:
        """Set a parameter to its sum of mechanisms, and keep these as the truth."""
        self.last += [path] if out is self.y else []
        self.spaces[path] = into, out
        self.put(path, torch.einsum("jai,jab,jbo->jio", into, blocks, out))

    def put(self, path: str, mechanisms: Tensor) -> None:
        """Set a parameter to the sum of mechanisms [n, d_in, d_out]."""
        self.true[path] = mechanisms
        owner, _, name = path.rpartition(".")
        own = rule(module := self.get_submodule(owner))
        own = own if isinstance(own, Rule) else own[name]
        getattr(module, name).data.copy_(own.weight(mechanisms.sum(0)))

    def linear(self, name: str, into: Space, out: Space, gain: float = 1.0) -> nn.Linear:
        """Make a linear layer without a bias, and plant random blocks in it."""
        layer = nn.Linear(into.shape[2], out.shape[2], bias=False)
        parent, _, own = name.rpartition(".")
        self.get_submodule(parent).add_module(own, layer)
        self.plant(f"{name}.weight", into, self.blocks(into.shape[1], out.shape[1], gain), out)
        return layer
