"""The timed cases: the paper's experiments (braun2025), and the times of the reference implementation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from apd_minimal.targets import TMS, ResidualMLP

INIT_STD = 0.02


@dataclass(frozen=True)
class Case:
    """One experiment at the size at which it is timed.

    Attributes:
        name: for tables.
        n_features: number of input features, and of outputs.
        width: hidden dimensions of a TMS, width of the residual stream.
        neurons: of each layer of a residual MLP; empty for a TMS.
        instances: targets stacked on one axis, I; for `decompose`, restarts on one target.
        batch: B.
        n_components: C.
        top_k: mean number of active components per sample.
        p: exponent of the simplicity.
        weights: of faithfulness, minimality, simplicity and the hidden-activation loss.
        reference: seconds of a plain training step, and of a step of the reference implementation, on a similar
            machine.
        goal_b: least speed-up over the paper's formulation.
        goal_a: largest cost of a step, in plain training steps.
    """

    name: str
    n_features: int
    width: int
    neurons: tuple[int, ...] = ()
    instances: int = 1
    batch: int = 2048
    n_components: int = 5
    top_k: float = 1.0
    p: float = 0.9
    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 0.0)
    reference: tuple[float, float] | None = None
    goal_b: float | None = None
    goal_a: float | None = None

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(d_in, d_out) of every decomposed weight."""
        if not self.neurons:
            return [(self.n_features, self.width)]
        return [shape for n in self.neurons for shape in ((self.width, n), (n, self.width))]

    @property
    def uses(self) -> list[tuple[int, bool]]:
        """Where a forward pass uses them: (which weight, transposed); a TMS decodes with its encoder's transpose."""
        return [(0, False), (0, True)] if not self.neurons else [(i, False) for i in range(2 * len(self.neurons))]

    @property
    def parameters(self) -> int:
        """Number of entries in the factors at full rank, of all instances."""
        per_weight = (min(d, e) * (d + e) for d, e in self.shapes)
        return self.instances * self.n_components * sum(per_weight)

    def target(self) -> TMS | ResidualMLP:
        """Return the target, made once. A TMS is trained: most of its outputs are then off, which can save work."""
        return _target(self.n_features, self.width, self.neurons)

    def inputs(self, n_batches: int, seed: int = 0) -> list[Tensor]:
        """Draw batches [B, I, n_features]: each instance has its own samples."""
        source = self.target().data(self.batch * self.instances)
        generator = torch.Generator().manual_seed(seed)
        return [source(i, generator).reshape(self.batch, self.instances, -1) for i in range(n_batches)]

    def settings(self) -> dict[str, Any]:
        """Return the paper's losses as arguments of `decompose`; nothing is merged, pruned or scrubbed."""
        faithfulness, minimality, simplicity, hidden = self.weights
        modules = [f"neurons.{i}" for i in range(len(self.neurons))] if hidden else []
        return {
            "n_components": self.n_components,
            "top_k": self.top_k,
            "restarts": self.instances,
            "p": self.p,
            "faithfulness": faithfulness,
            "minimality": minimality,
            "simplicity": simplicity,
            "hidden": hidden,
            "hidden_modules": modules,
            "scrub": 0.0,
            "tidy_every": 0.0,
            "warmup": 0.0,
            "lr": 1e-3,
            "init_std": INIT_STD,
        }


@cache
def _target(n_features: int, width: int, neurons: tuple[int, ...]) -> TMS | ResidualMLP:
    if not neurons:
        return TMS(n_features, width).fit(steps=500, batch_size=1024)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ResidualMLP(n_features, width, neurons)


TMS_5_2 = Case(
    "TMS 5-2", 5, 2, instances=12, n_components=5, top_k=0.211, p=1.0, weights=(1, 1, 0.7, 0),
    reference=(3.0e-3, 0.073), goal_b=10, goal_a=3,
)  # fmt: skip
TMS_40_10 = Case(
    "TMS 40-10", 40, 10, instances=3, n_components=50, top_k=1.0, weights=(1, 10, 20, 0),
    reference=(3.8e-3, 2.2), goal_b=100, goal_a=8,
)  # fmt: skip
ONE_LAYER = Case(
    "residual MLP, 1 layer", 100, 1000, (50,), batch=256, n_components=130, top_k=1.28, weights=(1, 1, 10, 1),
    reference=(8.6e-3, 2.74), goal_b=15, goal_a=40,
)  # fmt: skip
ONE_LAYER_2048 = replace(
    ONE_LAYER, name="residual MLP, 1 layer, B = 2048", batch=2048, reference=(64e-3, 20.8), goal_b=50, goal_a=12
)
TWO_LAYERS = Case(
    "residual MLP, 2 layers", 100, 1000, (25, 25), batch=256, n_components=200, top_k=1.28, weights=(1, 2, 7, 1),
    reference=(7.8e-3, 5.9), goal_b=15, goal_a=60,
)  # fmt: skip
CASES = [TMS_5_2, TMS_40_10, ONE_LAYER, ONE_LAYER_2048, TWO_LAYERS]

SMALL = Case("small", 32, 8, batch=1024, n_components=32, weights=(1, 10, 20, 0))
GROWTH = {
    "C": [replace(SMALL, n_components=C) for C in (16, 32, 64, 128, 256)],
    "n_out": [replace(SMALL, n_features=n) for n in (16, 32, 64, 128)],
    "B": [replace(SMALL, batch=B) for B in (256, 1024, 4096, 8192)],
}
