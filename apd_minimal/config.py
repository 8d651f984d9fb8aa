"""The settings of a run, and what each of them means (chapter 6)."""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

Schedule = float | tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Config:
    """Everything about a run that is a number. The defaults are the recipe of chapter 6.

    Attributes:
        n_components: C; more than the mechanisms you expect, since spare ones are cleared away.
        top_k: mean number of active components per sample, 0 < k <= C; may change along the run.
        rank: m, the inner size of the factors; None for full rank.
        per_weight: how many components live in each decomposed weight alone, in the weights' order, C in all; None
            lets every component span all weights. It excludes new starts (chapter 7, the identity layer).
        steps: gradient steps.
        lr: Adam's largest learning rate; it warms up linearly and falls along a quarter of a cosine.
        warmup: share of the steps in which it warms up.
        init_std: standard deviation of the factors at the start.
        faithfulness: weight of the faithfulness loss.
        minimality: weight of the minimality loss.
        simplicity: weight of the simplicity loss; at 0 in the last stage, which undoes its shrinkage.
        hidden: weight of the hidden-activation loss.
        scrub: weight of the scrub loss: the active components and a random half of the others must match too.
        p: exponent of the Schatten norm, 0 < p <= 1 as a rule.
        tidy_every: share of the steps between merging and pruning; 0 for never.
        tidy_from: progress from which on to merge and prune.
        tidy_until: progress at which this stops.
        reseed_until: progress until which free components start anew where the sparse network fails most.
        min_cosine: components whose cosine is at least this are merged.
        alpha: bits for each unit of rank; components are merged by description length instead of by cosine.
            None for by cosine.
        per_sample: take the k most attributed of each sample instead of the whole batch.
        per_position: attributions and gates for each position of a sequence instead of each sample.
        attribute_at: "target" or "components", where gradient attributions are taken.
        unit_norm: keep the columns of A at unit length.
        restarts: independent runs on one tensor axis.
        seed: of all randomness. Take another than that of the network, if its weights are Gaussian: components of
            rank one could start along their rows.
    """

    n_components: int
    top_k: Schedule
    rank: int | None = None
    per_weight: tuple[int, ...] | None = None
    steps: int = 2000
    lr: float = 1e-2
    warmup: float = 0.02
    init_std: float = 0.1
    faithfulness: Schedule = 1.0
    minimality: Schedule = 10.0
    simplicity: Schedule = ((0.0, 60.0), (0.7, 0.0))
    hidden: Schedule = 0.0
    scrub: Schedule = 0.5
    p: float = 0.9
    tidy_every: float = 0.075
    tidy_from: float = 0.0
    tidy_until: float = 0.85
    reseed_until: float = 0.5
    min_cosine: float = 0.8
    alpha: float | None = None
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
        """Learning rate at progress t in [0, 1): a linear warm-up, and a quarter of a cosine from `lr` to 0."""
        warm = min(1.0, (t + 1 / self.steps) / self.warmup) if self.warmup else 1.0
        return self.lr * warm * math.cos(math.pi / 2 * t)

    def logs(self, step: int) -> bool:
        """Is this step logged? About two hundred are, and the last."""
        return step % max(1, self.steps // 200) == 0 or step == self.steps - 1

    def tidies(self, step: int) -> bool:
        """Is it time to merge and prune, after so many steps?"""
        every = round(self.tidy_every * self.steps)
        return every > 0 and step % every == 0 and self.tidy_from <= step / self.steps < self.tidy_until

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
                raise TypeError(
                    f"unknown setting {name!r}; "
                    + (f"did you mean {close[0]!r}?" if close else f"known: {sorted(known)}")
                )
        return cls(**{name: _tuples(v) for name, v in settings.items()})

    def check(self) -> None:
        """Raise a ValueError that names the first setting out of range."""
        if self.n_components < 1:
            raise ValueError(f"n_components must be at least 1, got {self.n_components}")
        ks = [self.top_k] if isinstance(self.top_k, (int, float)) else [k for _, k in self.top_k]
        if not all(0 < k <= self.n_components for k in ks):
            raise ValueError(f"top_k must be above 0 and at most n_components={self.n_components}, got {self.top_k}")
        if self.per_sample and any(k != int(k) for k in ks):
            raise ValueError(f"top_k per sample must be a whole number, got {self.top_k}")
        if not self.p > 0:
            raise ValueError(f"p must be above 0, got {self.p}")
        for name in ("steps", "restarts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, or None for full rank, got {self.rank}")
        if self.per_weight is not None and self.tidy_every and self.reseed_until > 0:
            raise ValueError(f"per_weight excludes new starts: set reseed_until to 0, not {self.reseed_until}")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha, the bits for a unit of rank, must be above 0, or None; got {self.alpha}")
        if self.per_weight is not None and self.alpha is not None:
            raise ValueError(f"alpha may merge across weights, which per_weight excludes; got alpha={self.alpha}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the steps, from 0 to below 1; got {self.warmup}")
        for name in self.schedules:
            schedule = getattr(self, name)
            if not isinstance(schedule, (int, float)) and any(len(point) != 2 for point in schedule):
                raise ValueError(f"{name} must be a number or points (progress, value), got {schedule}")


def completed(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as they were stored, with the defaults of fields that came into `Config` since then.

    Args:
        settings: fields of `Config`, and others, which are kept.

    Returns:
        dict[str, Any]: as JSON has it.
    """
    own = {f.name for f in fields(Config)} & set(settings)
    config = Config.from_dict({name: settings[name] for name in own})
    return settings | json.loads(json.dumps(asdict(config)))


def at_progress(schedule: Schedule, t: float) -> float:
    """A schedule's value at progress t in [0, 1].

    A number is constant. Points (progress, value), in order of progress, are joined by straight lines.
    """
    if isinstance(schedule, (int, float)):
        return float(schedule)
    times, values = zip(*schedule, strict=True)
    return float(np.interp(t, times, values))


def _tuples(value: Any) -> Any:
    """Lists, as JSON has them, to tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
