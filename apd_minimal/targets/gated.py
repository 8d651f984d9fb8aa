"""Hand-coded gated functions: the weights are set by hand, so that the mechanisms are known exactly (braun2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..attributions import gradient
from ..components import Components
from ..data import PROBABILITY, SparseFeatures
from ..network import Network
from .training import numbers

LARGEST_X = 5.0
GATE = 10.0  # weight of a neuron's control bit, which the bias subtracts again: twice the largest x
SHOWN_Y = 3.0  # with `show_neurons`, y is one output of many, and is scaled by this factor


@dataclass(frozen=True)
class GatedInputs:
    """A source of batches [batch_size, 1 + n_functions]: x uniform in [0, 5], then control bits, 0 or 1.

    Args:
        n_functions: number of control bits.
        probability: chance that a bit is on, in (0, 1].
        batch_size: samples in a batch.
        nonempty: leave out samples in which no bit is on: their output is 0 for every x.

    Raises:
        ValueError: a probability outside (0, 1], or sizes below 1.
    """

    n_functions: int
    probability: float = 0.05
    batch_size: int = 1024
    nonempty: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_functions", checks.number("n_functions", self.n_functions, 1, whole=True))
        for name in ("probability", "batch_size", "nonempty"):  # checked by the source of the bits
            object.__setattr__(self, name, getattr(self.bits, name))

    @property
    def bits(self) -> SparseFeatures:
        """The source of the control bits [batch_size, n_functions]."""
        return SparseFeatures(self.n_functions, self.probability, 1.0, 1.0, self.batch_size, self.nonempty)

    def __call__(self, step: int, generator: torch.Generator) -> Tensor:
        """Draw a batch [batch_size, 1 + n_functions]; `step` is ignored, the generator's state advances."""
        checks.kind("generator", generator, torch.Generator, "a torch.Generator")
        x = LARGEST_X * torch.rand(self.batch_size, 1, generator=generator)
        return torch.cat([x, self.bits(step, generator)], dim=1)

    @property
    def share_nonempty(self) -> float:
        """Probability that a sample has at least one bit on."""
        return self.bits.share_nonempty

    @property
    def mean_active(self) -> float:
        """Mean number of bits that are on in a sample of this source."""
        return self.bits.mean_active


class GatedFunctions(nn.Module):
    """(x, control bits) [B, 1 + n] -> [B, 1]: the sum of F_i(x) over the bits i that are on.

    F_i(x) = a cos(b x + c) + d sin(e x + f) + g, interpolated linearly between `knots`, evenly spaced points in [0, 5]
    at distance h. The residual stream [B, n + 2] holds x, the bits, and y, to which two MLP layers write. Neuron k of
    function i computes relu(x - (knot_k - h) + GATE (bit_i - 1)): off unless its bit is on, for every x in [0, 5]. Its
    weight to y is the change of slope at its kink. The neurons are assigned to the layers at random.

    Args:
        n_functions: number of functions, and of control bits.
        neurons: neurons of each function, one for each knot.
        probability: chance that a bit is on, for `data`.
        seed: of the functions and of the assignment of the neurons to layers.
        show_neurons: append the neurons' activations to the outputs, after 3 y: [B, 1 + n * neurons]. Same network and
            weights, but a decomposition then has to reproduce the neurons too.

    Raises:
        ValueError: no function, fewer than two neurons each, or a probability outside (0, 1].
    """

    coefficients: Tensor
    knots: Tensor
    owner: Tensor

    def __init__(
        self,
        n_functions: int = 4,
        neurons: int = 10,
        probability: float = 0.05,
        seed: int = 0,
        show_neurons: bool = False,
    ) -> None:
        super().__init__()
        seed, n_functions, neurons = numbers(seed, n_functions=(n_functions, 1), neurons=(neurons, 2))
        probability = checks.number("probability", probability, **PROBABILITY)
        show_neurons = checks.flag("show_neurons", show_neurons)
        self.n_functions, self.neurons, self.probability = n_functions, neurons, probability
        self.show_neurons = show_neurons
        generator = torch.Generator().manual_seed(seed)
        low = torch.tensor([-1.0, 0.1, -math.pi, -1.0, 0.1, -math.pi, -1.0], dtype=torch.float64)
        high = torch.tensor([1.0, 1.0, math.pi, 1.0, 1.0, math.pi, 1.0], dtype=torch.float64)
        u = torch.rand(n_functions, 7, generator=generator, dtype=torch.float64)
        self.register_buffer("coefficients", low + (high - low) * u)  # a, b, c, d, e, f, g of each function
        self.register_buffer("knots", torch.linspace(0, LARGEST_X, neurons, dtype=torch.float64))
        order = torch.randperm(n_functions * neurons, generator=generator)
        self.register_buffer("owner", order // neurons)  # the function of every neuron, layer after layer
        layers, d = order.tensor_split(2), n_functions + 2
        self.read = nn.ModuleList(nn.Linear(d, len(layer)) for layer in layers)
        self.write = nn.ModuleList(nn.Linear(len(layer), d, bias=False) for layer in layers)
        with torch.no_grad():
            self._write_down(layers)

    def _write_down(self, layers: tuple[Tensor, ...]) -> None:
        """Set the weights: neuron `index % neurons` of function `index // neurons`, for each index of each layer."""
        spacing = LARGEST_X / (self.neurons - 1)
        values = F.pad(self.functions(self.knots), (0, 0, 2, 0))  # [2 + neurons, n_functions]
        bends = values.diff(n=2, dim=0) / spacing  # [neurons, n_functions]
        for (read, write), layer in zip(self.layers, layers, strict=True):
            function, k = layer // self.neurons, layer % self.neurons
            rows = torch.arange(len(layer))
            read.weight.zero_()
            read.weight[:, 0] = 1.0
            read.weight[rows, 1 + function] = GATE
            read.bias.copy_(spacing - self.knots[k] - GATE)
            write.weight.zero_()
            write.weight[-1] = bends[k, function].float()

    @property
    def layers(self) -> list[tuple[nn.Linear, nn.Linear]]:
        """The linear layers that read the stream and write to it, layer by layer."""
        return list(zip(self.read, self.write, strict=True))  # type: ignore[arg-type]

    def functions(self, x: Tensor) -> Tensor:
        """Evaluate the functions that the network interpolates: x [...] to F [..., n_functions], without gates."""
        checks.tensor("x", x, ..., finite=False)
        a, b, c, d, e, f, g = self.coefficients.unbind(1)
        x = x[..., None].to(a)
        return a * torch.cos(b * x + c) + d * torch.sin(e * x + f) + g

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs [..., 1 + n_functions], x and then the bits, to y [..., 1], or to 3 y and the neurons."""
        checks.tensor("x", x, ..., 1 + self.n_functions, finite=False, like=self.layers[0][0].weight)
        stream, active = F.pad(x, (0, 1)), []
        for read, write in self.layers:
            active.append(torch.relu(read(stream)))
            stream = stream + write(active[-1])
        y = stream[..., -1:]
        return torch.cat([SHOWN_Y * y, *active], dim=-1) if self.show_neurons else y

    def data(self, batch_size: int = 1024, nonempty: bool = False) -> GatedInputs:
        """Create the source of batches [batch_size, 1 + n_functions].

        Args:
            batch_size: samples in a batch.
            nonempty: leave out samples with no function on.
        """
        return GatedInputs(self.n_functions, self.probability, batch_size, nonempty)

    @property
    def weights(self) -> list[str]:
        """The parameter paths to decompose; biases are left unchanged."""
        return [f"{part}.{i}.weight" for i in range(2) for part in ("read", "write")]

    @property
    def recipe(self) -> dict[str, Any]:
        """Inputs and settings of chapter 10's decomposition, with `show_neurons`; found on seeds from 100 up.

        Raises:
            ValueError: the neurons are not shown.
        """
        if not self.show_neurons:
            raise ValueError("the recipe is for a target with show_neurons=True")
        data = self.data(64, nonempty=True)
        share = data.share_nonempty  # the loss weights below are for batches that include empty samples
        return {
            "batches": data,
            "weights": self.weights,
            "n_components": 5 * self.n_functions // 2,
            "top_k": 0.2217 / 4 * self.n_functions / share,
            "rank": 1,
            "attribution": attribution_shares,
            "steps": 2500,
            "lr": 3e-2,
            "init_std": 0.02,
            "faithfulness": 3.0,
            "minimality": 50 * share,
            "scrub": 50 * share,
            "simplicity": ((0.0, 10 * share), (0.8, 10 * share), (0.85, 0.0)),
            "p": 1.0,
            "tidy_every": 0.1,
            "tidy_from": 0.2,
            "reseed_until": 0.0,
            "restarts": 24,  # about one in twenty finds all four
        }

    def mechanisms(self) -> dict[str, Tensor]:
        """Return the true mechanisms, per path [n_functions, d_in, d_out]: each function has its own neurons."""
        truth = {}
        functions = torch.arange(self.n_functions, device=self.owner.device)
        owners = self.owner.split([read.out_features for read, _ in self.layers])
        for i, ((read, write), owner) in enumerate(zip(self.layers, owners, strict=True)):
            owned = owner == functions[:, None]  # [n_functions, neurons of the layer]
            truth[f"read.{i}.weight"] = owned[:, None, :] * read.weight.detach().T
            truth[f"write.{i}.weight"] = owned[:, :, None] * write.weight.detach().T
        return truth


def attribution_shares(network: Network, components: Components, x: Tensor) -> Tensor:
    """Compute gradient attributions, divided on every sample by their sum over components: [..., B, C].

    Batch top-k compares attributions across samples: with shares, samples with small outputs count as much as others.

    Args:
        network: the target, wrapped.
        components: C components of its weights, with or without restarts.
        x: inputs [B, ...].
    """
    scores = gradient(network, components, x)
    return scores / scores.sum(-1, keepdim=True).clamp_min(1e-12)
