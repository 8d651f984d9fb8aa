"""Which components are active: a protocol, and its first member, the k most attributed (chapter 4).

A selection of your own is a subclass of `Selection` that says how gates follow from attributions; it may hold
parameters, which are then trained with the components, and are part of every checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import checks
from .config import Schedule, at_progress, schedule


class Selection:
    """Who is active on which sample. One object serves one run at a time; the result has a copy.

    A selection of your own has `choose`, and `threshold` or `active` if one should be able to ask for the active
    components of a sample once the run is over.

    `decompose(selection=...)` takes any of them; `decompose(top_k=...)` is short for `TopK`.
    """

    observes = False
    """Whether it is told the errors of every step (`observe`)."""

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

        Raises:
            NotImplementedError: a subclass must write it.
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

    def penalty(self, gates: Tensor, t: float) -> Tensor | None:
        """Give a loss of the selection's own, which is added to the step's with weight 1; None if there is none.

        Args:
            gates: as `choose` gave them; only through these does it train the parameters.
            t: progress of the run, in [0, 1].

        Returns:
            Tensor: [R], a sum over components and a mean over samples, so that several processes can share it.
        """
        return None

    def threshold(self, scores: Tensor) -> Tensor | None:
        """Give the score above which a component is active once the run is over, [R]; None if there is none.

        Args:
            scores: attributions [R, B, (positions,) C] on held-out samples.
        """
        return None

    def active(self, scores: Tensor, threshold: Tensor | None) -> Tensor:
        """Say who is active once the run is over, from each sample's scores alone.

        By default that is whatever scores above the threshold.

        Args:
            scores: attributions [R, B, (positions,) C].
            threshold: as `threshold` gave it at the end of the run, [R]; None if it gave none.

        Returns:
            Tensor: boolean, of the scores' shape.

        Raises:
            ValueError: there is no threshold.
        """
        if threshold is None:
            from .hints import NO_THRESHOLD

            raise ValueError(NO_THRESHOLD.format(type(self).__name__))
        return scores > threshold.reshape(-1, *[1] * (scores.ndim - 1))

    def parameters(self) -> list[Tensor]:
        """Leaf tensors [R, C, ...] that are trained with the components."""
        return []

    def observe(self, error: Tensor, nothing: Tensor, t: float) -> None:
        """Take note of a step's errors, after the choice and before the next one; called where `observes` is True.

        Args:
            error: of the sparse network (the minimality loss), [R].
            nothing: of the network with no component active, on the same samples, [R].
            t: progress of the run, in [0, 1].
        """

    def state(self) -> list[Tensor]:
        """Tensors that change in a run without a gradient: they are a part of every checkpoint."""
        return []

    def tensors(self) -> list[Tensor]:
        """List all that it has learned: parameters and state."""
        return [*self.parameters(), *self.state()]

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

    Raises:
        TypeError, ValueError: neither a number above 0 nor points with such values; `per_sample` is no bool.
    """

    top_k: Schedule
    per_sample: bool = False

    def __post_init__(self) -> None:
        self.top_k = schedule("top_k", self.top_k, partial(checks.number, low=0, above=True))
        self.per_sample = checks.flag("per_sample", self.per_sample)

    def choose(self, scores: Tensor, t: float, share: float = 1.0) -> Tensor:
        """Choose the k most attributed: boolean gates.

        Args:
            scores: attributions [R, B, (positions,) C].
            t: progress of the run, in [0, 1].
            share: of the step's samples, those that are in `scores`.
        """
        k = at_progress(self.top_k, t)
        if self.per_sample:
            return sample_top_k(scores, k).bool()
        return batch_top_k(scores.flatten(1, -2), min(k / share, scores.shape[-1])).reshape(scores.shape).bool()

    def threshold(self, scores: Tensor) -> Tensor | None:
        """Give the middle between the smallest active score and the largest inactive one, if any; None per sample.

        Args:
            scores: attributions [R, B, (positions,) C].
        """
        if self.per_sample:
            return None
        n = min(max(1, int(at_progress(self.top_k, 1.0) * scores[0, ..., 0].numel() + 1e-6)), scores[0].numel())
        # Below all of them stands one more, in case all are active.
        flat = torch.nn.functional.pad(scores.flatten(1), (0, 1), value=torch.finfo(scores.dtype).min)
        return flat.topk(n + 1, dim=1).values[:, -2:].mean(1)

    def active(self, scores: Tensor, threshold: Tensor | None) -> Tensor:
        """Say who is active: each sample's k most attributed, or what scores above the threshold.

        Args:
            scores: attributions [R, B, (positions,) C].
            threshold: [R], unless k is per sample.

        Raises:
            ValueError: no threshold, where one is needed.
        """
        return self.choose(scores, 1.0) if self.per_sample else super().active(scores, threshold)


@dataclass(frozen=True)
class FinalSelection:
    """A selection as it is at the end of a run, for attributions [B, (positions,) C] of one restart.

    Attributes:
        selection: of the run.
        restarts: R of the run, an axis of what the selection has learned; 1 for one without parameters.
        index: of the one restart.
        threshold: of that restart, if there is one.
        per_position: whether it chooses among positions, so that it needs attributions of every position.
    """

    selection: Selection
    restarts: int = 1
    index: int = 0
    threshold: float | None = None
    per_position: bool = False

    def __post_init__(self) -> None:
        checks.kind("selection", self.selection, Selection, "an apd_minimal.selection.Selection")
        checks.number("restarts", self.restarts, 1, whole=True)
        checks.number("index", self.index, 0, self.restarts - 1, whole=True)
        checks.number("threshold", 0.0 if self.threshold is None else self.threshold)
        checks.flag("per_position", self.per_position)

    def gates(self, scores: Tensor) -> Tensor:
        """Choose among these samples: boolean gates of the scores' shape, or soft ones in [0, 1].

        Args:
            scores: attributions [B, (positions,) C].

        Raises:
            ValueError: scores that are NaN, or gates of another shape than they.
        """
        checks.tensor("the attributions (scores)", scores, "B", ..., "C", real=True)
        return self._own("choose", scores, 1.0, 1.0)

    def mask(self, scores: Tensor) -> Tensor:
        """Say who is active among these samples: boolean gates as they are, and what is `active` for soft ones.

        Args:
            scores: attributions [B, (positions,) C].

        Raises:
            TypeError, ValueError: as `active`.
        """
        gates = self.gates(scores)
        return gates if gates.dtype == torch.bool else self.active(scores)

    def active(self, scores: Tensor) -> Tensor:
        """Say who is active from each sample's scores alone (`Selection.active`): boolean, of the scores' shape.

        Args:
            scores: attributions [B, (positions,) C].

        Raises:
            TypeError: the selection gives no boolean mask.
            ValueError: it has no threshold, or gives another shape.
        """
        checks.tensor("the attributions (scores)", scores, "B", ..., "C", real=True)
        threshold = None if self.threshold is None else scores.new_full((self.restarts,), self.threshold)
        mask = self._own("active", scores, threshold)
        if mask.dtype != torch.bool:
            name = f"{type(self.selection).__name__}.active"
            raise TypeError(f"{name} must give a boolean mask, got {checks.given(mask)}")
        return mask

    @torch.no_grad()
    def _own(self, method: str, scores: Tensor, *arguments: Any) -> Tensor:
        """Call a method of the selection with the scores for every restart, and take what it gives for the one."""
        if self.per_position and scores.ndim < 3:
            raise ValueError(f"scores must be [B, positions, C] as in the run (per_position), got {list(scores.shape)}")
        gates = getattr(self.selection, method)(scores.expand(self.restarts, *scores.shape), *arguments)
        expected = [self.restarts, *scores.shape]
        if not isinstance(gates, Tensor) or list(gates.shape) != expected:
            raise ValueError(
                f"{type(self.selection).__name__}.{method} must give a tensor {expected}, got {checks.given(gates)}; "
                "of a run with several restarts, give the result's final_selection"
            )
        return gates[self.index]


def final_selection(top_k: float | Selection | FinalSelection, n_components: int) -> FinalSelection:
    """Make a final selection of whatever may be given for one.

    Args:
        top_k: mean number of active components per sample, 0 < k <= C, for `TopK`; or a selection without parameters,
            or that of a result (`Decomposition.final_selection`).
        n_components: C.

    Raises:
        TypeError, ValueError: neither a selection nor a number in that range.
    """
    if isinstance(top_k, FinalSelection):
        return top_k
    n_components = checks.number("n_components", n_components, 1, whole=True)
    if isinstance(top_k, TopK):
        schedule("top_k", top_k.top_k, partial(checks.number, high=n_components))
    if isinstance(top_k, Selection):
        return FinalSelection(checks.methods(top_k, Selection))
    return FinalSelection(TopK(checks.number("top_k", top_k, 0, n_components, above=True)))


def _check(scores: Tensor, k: float) -> None:
    checks.tensor("the attributions (scores)", scores, ..., "B", "C", real=True)
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
    n = max(1, int(k * batch + 1e-6))
    if flat.device.type == "cpu" and flat.dtype in (torch.float32, torch.float64):
        # Numpy finds the smallest that is kept several times as fast as torch, which decides where several are equal.
        place = flat.shape[1] - n
        kept = flat >= torch.from_numpy(np.partition(flat.detach().numpy(), place, axis=1)[:, place, None])
        if bool((kept.sum(1) == n).all()):
            return kept.to(flat).reshape(scores.shape)
    largest = flat.topk(n, dim=-1, sorted=False).indices
    return torch.zeros_like(flat).scatter_(-1, largest, 1.0).reshape(scores.shape)


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
