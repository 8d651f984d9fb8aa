"""Which components are active: a protocol, and its first member, the k most attributed (chapter 4).

A selection of your own is a subclass of `Selection` that says how gates follow from attributions; it may hold
parameters, which are then trained with the components, and are part of every checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import checks
from .config import Schedule, at_progress


class Selection:
    """Who is active on which sample. One object serves one run.

    `decompose(selection=...)` takes any of them; `decompose(top_k=...)` is short for `TopK`.
    """

    def start(self, n_restarts: int, n_components: int, like: Tensor) -> None:
        """Prepare a run: make the parameters, if any.

        Args:
            n_restarts: R, runs on one tensor axis.
            n_components: C.
            like: a tensor of the components' type and device.
        """

    def choose(self, scores: Tensor, t: float, share: float = 1.0) -> Tensor:
        """Choose who is active.

        Args:
            scores: attributions [R, B, (positions,) C], detached.
            t: progress of the run, in [0, 1].
            share: of the step's samples, those that are in `scores`; on the others nothing is active.

        Returns:
            Tensor: gates of the scores' shape: boolean, or soft ones in [0, 1] through which the parameters train.
        """
        raise NotImplementedError

    def draw(self, gates: Tensor, noise: Tensor) -> Tensor:
        """Draw the gates of the stochastic pass (the scrub loss), those of what is inactive at random.

        By default each inactive component joins with probability one half. `gates + (1 - gates) * noise` would be the
        stochastic masks of bushnaq2025.

        Args:
            gates: as `choose` gave them.
            noise: uniform in [0, 1), of the same shape.

        Returns:
            Tensor: gates in [0, 1] of the noise's type.
        """
        return torch.maximum(gates.to(noise), (noise < 0.5).to(noise))

    def threshold(self, scores: Tensor) -> Tensor | None:
        """Give the score above which a component is active once the run is over, [R]; None if there is none.

        Args:
            scores: attributions [R, B, (positions,) C] on held-out samples.
        """
        return None

    def parameters(self) -> list[Tensor]:
        """Leaf tensors [R, C, ...] that are trained with the components."""
        return []

    def forget(self, changed: Tensor) -> None:
        """Reset, in place, what was learned about components that have become others.

        Args:
            changed: boolean [R, C], those that were merged, pruned or started anew.
        """


@dataclass
class TopK(Selection):
    """The k most attributed are active: over the whole batch, or of each sample (braun2025).

    Args:
        top_k: k, the mean number of active components per sample; a number or points (progress, value).
        per_sample: the k most attributed of each sample instead of the whole batch.
    """

    top_k: Schedule
    per_sample: bool = False

    def choose(self, scores: Tensor, t: float, share: float = 1.0) -> Tensor:
        """As there: boolean gates."""
        k = at_progress(self.top_k, t)
        if self.per_sample:
            return sample_top_k(scores, k).bool()
        return batch_top_k(scores.flatten(1, -2), min(k / share, scores.shape[-1])).reshape(scores.shape).bool()

    def threshold(self, scores: Tensor) -> Tensor | None:
        """Half-way between the smallest score that is active and the largest that is not; None per sample."""
        if self.per_sample:
            return None
        flat = scores.flatten(1)
        n = min(max(1, int(at_progress(self.top_k, 1.0) * scores[0, ..., 0].numel() + 1e-6)), flat.shape[1] - 1)
        return flat.topk(n + 1, dim=1).values[:, -2:].mean(1) if n else flat.amin(1) / 2


def _check(scores: Tensor, k: float) -> None:
    checks.tensor("scores", scores, ..., "B", "C", finite=False)
    if scores.isnan().any():
        raise checks.NotFinite(f"the attributions (scores, {checks.given(scores)}) are NaN")
    n_components = scores.shape[-1]
    if isinstance(k := checks.plain(k), (int, float)) and not 0 < k <= n_components:
        raise ValueError(f"k must be above 0 and at most the number of components, {n_components}; got {k}")
    checks.number("k", k)


def batch_top_k(scores: Tensor, k: float) -> Tensor:
    """Keep the int(k * B) largest scores of the whole batch, so that k components are active on average.

    Args:
        scores: attributions [..., B, C]; with restarts in front, each is treated alone.
        k: mean number of active components per sample, 0 < k <= C; may be below 1.

    Returns:
        Tensor: mask of zeros and ones, of the shape and type of `scores`.

    Raises:
        ValueError: k out of range.
    """
    _check(scores, k)
    batch, n_components = scores.shape[-2:]
    flat = scores.reshape(-1, batch * n_components)
    # A little more, so that k = n / batch keeps n in spite of rounding.
    kept = flat.topk(max(1, int(k * batch + 1e-6)), dim=-1, sorted=False).indices
    return torch.zeros_like(flat).scatter_(-1, kept, 1.0).reshape(scores.shape)


def sample_top_k(scores: Tensor, k: float) -> Tensor:
    """Keep the k largest scores of each sample.

    Args:
        scores: attributions [..., B, C].
        k: number of active components of each sample, a whole number with 0 < k <= C.

    Returns:
        Tensor: mask of zeros and ones, of the shape and type of `scores`.

    Raises:
        ValueError: k out of range or not whole.
    """
    _check(scores, k)
    if k != int(k):
        raise ValueError(f"k per sample must be a whole number, got {k}")
    kept = scores.topk(int(k), dim=-1, sorted=False).indices
    return torch.zeros_like(scores).scatter_(-1, kept, 1.0)
