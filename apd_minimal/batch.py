"""What the sparse losses of a step need, and the same in pieces (chapter 19)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """What the sparse losses of a step need.

    Attributes:
        x: inputs [B, ...], those that say nothing to any component left out.
        wanted: the target's outputs [B, ...].
        hidden: the target's hidden activations that count, each [B, ...].
        gates: which components are active [R, B, (positions,) C], boolean or soft.
        noise: uniform numbers of that shape, for the stochastic pass; None if there is no scrub loss.
        share: what the losses of these samples count for: how many of the step's samples they are.
    """

    x: Tensor
    wanted: Tensor
    hidden: list[Tensor]
    gates: Tensor
    noise: Tensor | None
    share: float

    def pieces(self, size: int | None) -> list[Batch]:
        """The same in pieces of so many samples."""
        n = len(self.x)
        return [
            Batch(
                self.x[part],
                self.wanted[part],
                [h[part] for h in self.hidden],
                self.gates[:, part],
                None if self.noise is None else self.noise[:, part],
                self.share * len(self.x[part]) / n,
            )
            for part in (slice(i, i + (size or n)) for i in range(0, n, size or n))
        ]
