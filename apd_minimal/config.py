"""The settings of a run, and what each of them means (chapter 6)."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields
from typing import Any

Schedule = float | tuple[float, float]


@dataclass(frozen=True)
class Config:
    """Everything about a run that is a number or a name; see `decompose` for their meaning."""

    n_components: int
    top_k: float
    rank: int | None = None
    steps: int = 4000
    lr: float = 1e-2
    warmup: float = 0.05
    init_scale: float = 1.0
    faithfulness: Schedule = 1.0
    minimality: Schedule = 1.0
    simplicity: Schedule = 1.0
    hidden: Schedule = 0.0
    scrub: Schedule = 0.0
    p: float = 1.0
    polish: float = 0.25
    per_sample: bool = False
    per_position: bool = False
    attribute_at: str = "target"
    unit_norm: bool = False
    restarts: int = 1
    seed: int = 0

    @property
    def schedules(self) -> list[str]:
        """Names of the losses' weights."""
        return ["faithfulness", "minimality", "simplicity", "hidden", "scrub"]

    def lr_at(self, t: float) -> float:
        """Learning rate at progress t in [0, 1): a linear warm-up, then a cosine from `lr` to 0."""
        warm = min(1.0, (t + 1 / self.steps) / self.warmup) if self.warmup else 1.0
        return warm * at_progress((self.lr, 0.0), t)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> Config:
        """A configuration from names and values, as stored in JSON.

        Raises:
            TypeError: a setting that does not exist.
        """
        known = {f.name for f in fields(cls)}
        for name in settings:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                raise TypeError(f"unknown setting {name!r}; " + (f"did you mean {close[0]!r}?" if close else f"known: {sorted(known)}"))
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()})

    def check(self) -> None:
        """Raise a ValueError that names the first setting out of range."""
        if self.n_components < 1:
            raise ValueError(f"n_components must be at least 1, got {self.n_components}")
        if not 0 < self.top_k <= self.n_components:
            raise ValueError(f"top_k must be above 0 and at most n_components={self.n_components}, got {self.top_k}")
        if self.per_sample and self.top_k != int(self.top_k):
            raise ValueError(f"top_k per sample must be a whole number, got {self.top_k}")
        if not self.p > 0:
            raise ValueError(f"p must be above 0, got {self.p}")
        for name in ("steps", "restarts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, or None for full rank, got {self.rank}")
        for name in ("warmup", "polish"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is a share of the steps, from 0 to below 1; got {getattr(self, name)}")


def at_progress(schedule: Schedule, t: float) -> float:
    """A schedule's value at progress t in [0, 1]; a pair goes from the first to the second along a cosine."""
    if isinstance(schedule, (int, float)):
        return float(schedule)
    start, end = schedule
    return end + (start - end) * (1 + math.cos(math.pi * t)) / 2
