"""Who is active, learned: an importance for each component and sample, and masks drawn above it (bushnaq2025).

Stochastic parameter decomposition has no k. A small network says for each component how important it is on a sample,
g in [0, 1]; the component's gate is then drawn between g and 1, and whatever comes out must match the target's output.
So a component may be left at g = 0 only where it makes no difference, and a penalty pulls all importances down::

    decompose(target, batches, weights, n_components=20, rank=1, selection=Importance(3e-3, p=1.0),
              attribution=apd.attributions.inner_activation, scrub=1.0, minimality=0.0, simplicity=0.0, tidy_every=0.0)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .config import Schedule, at_progress, schedule
from .hints import NOT_STARTED
from .selection import Selection

REFERENCE = 32_768
"""Samples in a batch for which the charge on frequency is worked out, whatever the batch (bushnaq2026)."""


class _LeakyClamp(torch.autograd.Function):
    """Clamp to [0, 1]; where that cuts off, a part of the gradient that would bring the value back."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, leak: float) -> Tensor:
        ctx.save_for_backward(value)
        ctx.leak = leak
        return value.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (value,) = ctx.saved_tensors
        below, above = value <= 0, value >= 1
        back = (below & (gradient < 0)) | (above & (gradient > 0))
        return gradient * (back * ctx.leak + ~(below | above)), None


def leaky_clamp(value: Tensor, leak: float = 0.01) -> Tensor:
    """Clamp to [0, 1], without getting stuck at either end.

    Inside, the gradient passes. Below 0 and above 1 there is none, but for `leak` times a gradient by which descent
    would move the value back towards [0, 1]. (bushnaq2025 has the lower leak for the masks and the upper one for the
    penalty; here one clamp has both.)

    Args:
        value: any numbers, [...].
        leak: share of the gradient that passes outside, in [0, 1].

    Returns:
        Tensor: of the same shape, in [0, 1].
    """
    checks.tensor("value", value, ..., finite=False, real=True)
    clamped: Tensor = _LeakyClamp.apply(value, checks.number("leak", leak, 0, 1))
    return clamped


@dataclass(eq=False)
class Importance(Selection):
    """Importances by one small network for each component, from its own score; gates drawn between them and 1.

    The scores are meant to be the inner activations of components of rank one (`attributions.inner_activation`).
    A component's network has one hidden layer, and sees no other component.

    Args:
        coefficient: weight of the penalty, a number or points (progress, value); 0 while there is to be none.
        p: the penalty is the sum of (g + 1e-12)^p over components, averaged over samples; a number or points.
        gamma: instead of p, the smooth count g^2 / (g^2 + gamma^2), as in the later code of bushnaq2025.
        frequency: with gamma, charge a component also for how often it is important: this times f log2(1 + 32768 f) is
            added to its mean count f, over the samples that the penalty is given (bushnaq2026; its code has 0.5). What
            two components do costs more in one of them. Several processes each count their own samples, which costs
            no less.
        per_weight: number of components of each weight, as for `decompose`. Then the masks of one weight alone are
            drawn as often as those of all weights together, and the other weights run whole. (bushnaq2025 has both
            losses, and calls the first layerwise.) None always draws all.
        hidden: width of each component's network.
        alive: once the run is over, a component is active where its importance is above this.
        seed: of the networks' initial weights.

    Raises:
        TypeError, ValueError: numbers out of range, both p and gamma, or neither, or p with a frequency.
    """

    needs_attribution = "apd.attributions.inner_activation, or another with a sign"  # which `decompose` asks for

    coefficient: Schedule
    p: Schedule | None = None
    gamma: Schedule | None = None
    frequency: float = 0.0
    per_weight: tuple[int, ...] | None = None
    hidden: int = 16
    alive: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.p is None) == (self.gamma is None):
            raise ValueError(f"give p or gamma, got p={self.p!r} and gamma={self.gamma!r}")
        self.coefficient = schedule("coefficient", self.coefficient, partial(checks.number, low=0))
        above_zero = partial(checks.number, low=0, above=True)
        self.p = None if self.p is None else schedule("p", self.p, above_zero)
        self.gamma = None if self.gamma is None else schedule("gamma", self.gamma, above_zero)
        self.frequency = checks.number("frequency", self.frequency, 0)
        if self.frequency and self.gamma is None:
            raise ValueError(f"frequency is for gamma, not for p: got frequency={self.frequency} and p={self.p!r}")
        if self.per_weight is not None:
            checks.kind("per_weight", self.per_weight, (list, tuple), "whole numbers, one for each weight, or None")
            self.per_weight = tuple(checks.number("per_weight", n, 1, whole=True) for n in self.per_weight)
        self.hidden = checks.number("hidden", self.hidden, 1, whole=True)
        self.alive = checks.number("alive", self.alive, 0, 1, below=True)
        self.seed = checks.number("seed", self.seed, 0, 2**62, whole=True)

    def start(self, n_restarts: int, n_components: int, like: Tensor) -> None:
        """Draw the networks: weights in and out [R, C, hidden], biases zero.

        Args:
            n_restarts: R.
            n_components: C.
            like: a tensor of the components' type and device.
        """
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(2, n_restarts, n_components, self.hidden, generator=generator).to(like)
        first, second = drawn[0] * 2**0.5, drawn[1] / self.hidden**0.5
        self._initial = [first, torch.zeros_like(first), second, torch.zeros_like(second[..., 0])]
        self._parameters = [p.clone().requires_grad_() for p in self._initial]

    def choose(self, scores: Tensor, t: float, share: float = 1.0) -> Tensor:
        """Work out the importances: soft gates of the scores' shape.

        Args:
            scores: inner activations [R, B, (positions,) C].
            t: progress of the run; not needed.
            share: of the step's samples, those that are in `scores`; not needed.

        Raises:
            ValueError: no run has started it.
        """
        if not hasattr(self, "_parameters"):
            raise ValueError(NOT_STARTED.format(self))
        between = [1] * (scores.ndim - 2)
        first, bias, second, last = (p.reshape(len(p), *between, *p.shape[1:]) for p in self._parameters)
        hidden = F.gelu(scores[..., None] * first + bias)  # [R, B, (positions,) C, hidden]
        return leaky_clamp((hidden * second).sum(-1) + last)

    def draw(self, gates: Tensor, noise: Tensor) -> Tensor:
        """Draw the gates uniformly between the importances and 1; of some samples, those of one weight alone.

        Args:
            gates: importances.
            noise: uniform in [0, 1), of the same shape.
        """
        drawn = gates + (1 - gates) * noise
        if self.per_weight is None:
            return drawn
        n = len(self.per_weight)
        weight = torch.arange(n, device=gates.device).repeat_interleave(torch.tensor(self.per_weight).to(gates.device))
        # The later digits of a uniform number are another one: which weight alone; n for all of them.
        alone = (noise[..., :1] * 1024 % 1 * (n + 1)).long()
        return torch.where((alone == n) | (alone == weight), drawn, 1.0)

    def penalty(self, gates: Tensor, t: float) -> Tensor:
        """Penalise the importances: [R].

        Args:
            gates: importances [R, B, (positions,) C].
            t: progress of the run, in [0, 1].
        """
        if self.gamma is not None:
            squares = gates.square()
            cost = squares / (squares + at_progress(self.gamma, t) ** 2)
        else:
            assert self.p is not None
            cost = (gates + 1e-12) ** at_progress(self.p, t)
        often = cost.flatten(1, -2).mean(1)  # [R, C]
        if self.frequency:
            often = often * (1 + self.frequency * torch.log2(1 + REFERENCE * often))
        return at_progress(self.coefficient, t) * often.sum(-1)

    def active(self, scores: Tensor, threshold: Tensor | None) -> Tensor:
        """Say who is active once the run is over: who is more important than `alive`.

        Args:
            scores: inner activations [R, B, (positions,) C].
            threshold: none.
        """
        return self.choose(scores, 1.0) > self.alive

    def parameters(self) -> list[Tensor]:
        """List the networks' weights and biases, each [R, C, ...]."""
        return self._parameters

    def forget(self, changed: Tensor) -> None:
        """Give the networks of these components their initial weights.

        Args:
            changed: boolean [R, C].
        """
        for p, initial in zip(self._parameters, self._initial, strict=True):
            p.data[changed] = initial[changed]
