"""What the sparse losses of a step need, and the same in pieces (chapter 19)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Batches = Callable[[int, torch.Generator], Tensor]  # (step, generator) -> inputs [B, ...]


@dataclass(frozen=True)
class Batch:
    """What the sparse losses of a step need.

    Attributes:
        x: inputs [B, ...], without those that are zero in front of every decomposed weight.
        outputs: the target's outputs [B, ...].
        hidden: the target's hidden activations that count, each [B, ...].
        gates: which components are active [R, B, (positions,) C], boolean or soft.
        noise: uniform numbers of that shape, for the stochastic pass; None if there is no scrub loss.
        share: what the losses of these samples count for: which share of the step's samples they are.
    """

    x: Tensor
    outputs: Tensor
    hidden: list[Tensor]
    gates: Tensor
    noise: Tensor | None
    share: float

    def pieces(self, size: int | None) -> list[Batch]:
        """Cut into pieces of so many samples (chapter 19)."""
        n = len(self.x)
        return [
            Batch(
                self.x[part],
                self.outputs[part],
                [h[part] for h in self.hidden],
                self.gates[:, part],
                None if self.noise is None else self.noise[:, part],
                self.share * len(self.x[part]) / n,
            )
            for part in (slice(i, i + (size or n)) for i in range(0, n, size or n))
        ]
