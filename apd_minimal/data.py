"""Inputs of the toy models: sparse features, each on with a small probability (elhage2022, chapter 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import checks

PROBABILITY: dict[str, Any] = {"low": 0, "high": 1, "above": True}
SIZES: dict[str, dict[str, Any]] = {
    "n_features": {"low": 1, "whole": True},
    "batch_size": {"low": 1, "whole": True},
    "probability": PROBABILITY,
    "low": {},
    "high": {},
}


@dataclass(frozen=True)
class SparseFeatures:
    """A source of batches: each feature is on with probability `probability`, its value uniform.

    Calling it with (step, generator) gives a batch [batch_size, n_features]; the same generator state gives
    the same batch, so that a stopped run can resume exactly.

    Args:
        n_features: number of features.
        probability: chance that a feature is on, in (0, 1].
        low: smallest value of a feature that is on.
        high: largest value of a feature that is on.
        batch_size: samples in a batch.
        nonempty: leave out samples in which no feature is on. In TMS 5-2 these are 77% of all, and they
            carry nothing to learn from.

    Raises:
        ValueError: a probability outside (0, 1], or so small that rounding leaves no sample nonempty; sizes below 1;
            values of 0 alone for samples that are nonempty.
    """

    n_features: int
    probability: float = 0.05
    low: float = 0.0
    high: float = 1.0
    batch_size: int = 1024
    nonempty: bool = False

    def __post_init__(self) -> None:
        for name, limits in SIZES.items():
            object.__setattr__(self, name, checks.number(name, getattr(self, name), **limits))
        object.__setattr__(self, "nonempty", checks.flag("nonempty", self.nonempty))
        if self.low > self.high:
            raise ValueError(f"low must be at most high={self.high}, got {self.low}")
        if self.nonempty and self.low == self.high == 0:
            raise ValueError("high must be above low=0 for samples that are nonempty, got 0")
        if self.nonempty and 1 - self.probability == 1:
            raise ValueError(f"probability must be above 1e-16 for samples that are nonempty, got {self.probability}")

    def __call__(self, step: int, generator: torch.Generator) -> Tensor:
        """Draw a batch [batch_size, n_features]; `step` is ignored, the generator's state advances."""
        checks.kind("generator", generator, torch.Generator, "a torch.Generator")
        shape = (self.batch_size, self.n_features)
        if self.nonempty:
            on = self._nonempty_patterns(generator)
        else:
            on = torch.rand(shape, generator=generator) < self.probability
        values = self.low + (self.high - self.low) * torch.rand(shape, generator=generator)
        return on * values

    def _nonempty_patterns(self, generator: torch.Generator) -> Tensor:
        """Draw which features are on, given that at least one is: exact, without rejection sampling."""
        n, q = self.n_features, 1 - self.probability
        # The first feature that is on follows a geometric law cut off at n; those after it are free.
        u = torch.rand(self.batch_size, 1, generator=generator, dtype=torch.float64)
        first = (torch.log1p(-u * (1 - q**n)) / torch.log(torch.tensor(q, dtype=torch.float64))).floor().long()
        first = first.clamp(0, n - 1) if q > 0 else torch.zeros_like(first)
        index = torch.arange(n)
        on = torch.rand(self.batch_size, n, generator=generator) < self.probability
        return (on & (index > first)) | (index == first)

    @property
    def share_nonempty(self) -> float:
        """Probability that a sample has at least one feature on."""
        return 1 - (1 - self.probability) ** self.n_features

    @property
    def mean_active(self) -> float:
        """Mean number of features that are on in a sample of this source."""
        mean = self.n_features * self.probability
        return mean / self.share_nonempty if self.nonempty else mean
