"""The settings of a run, and what each of them means (chapter 6)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from . import checks

Schedule = float | tuple[tuple[float, float], ...]


LIMITS: dict[str, dict[str, Any]] = {
    "n_components": {"low": 1, "whole": True},
    "rank": {"low": 1, "whole": True},
    "steps": {"low": 1, "whole": True},
    "restarts": {"low": 1, "whole": True},
    "seed": {"low": 0, "high": 2**62, "whole": True},
    "lr": {"low": 0, "above": True},
    "warmup": {"low": 0, "high": 1, "below": True},
    "init_std": {"low": 0, "above": True},
    "p": {"low": 0, "above": True},
    "tidy_every": {"low": 0, "high": 1},
    "tidy_from": {"low": 0, "high": 1},
    "tidy_until": {"low": 0, "high": 1},
    "reseed_until": {"low": 0, "high": 1},
    "min_cosine": {"low": 0, "above": True},
    "alpha": {"low": 0, "above": True},
}
"""Ranges of the numeric settings; `rank` and `alpha` may be None."""


@dataclass(frozen=True)
class Config:
    """The numbers and flags that define a run. The defaults are the recipe of chapter 6.

    Attributes:
        n_components: C; more than the expected number of mechanisms, since spare components are pruned.
        top_k: mean number of active components per sample, 0 < k <= C; may change during the run.
        rank: m, the inner size of the factors; None for full rank.
        per_weight: number of components confined to each decomposed weight, in the weights' order, C in total; None
            lets every component span all weights. Not compatible with new starts (chapter 7, the identity layer).
        steps: gradient steps.
        lr: Adam's peak learning rate, after a linear warm-up and before a decay along a quarter cosine.
        warmup: fraction of the steps used for warm-up.
        init_std: standard deviation of the initial factors.
        faithfulness: weight of the faithfulness loss.
        minimality: weight of the minimality loss.
        simplicity: weight of the simplicity loss; 0 in the last stage, which undoes the shrinkage it causes.
        hidden: weight of the hidden-activation loss.
        scrub: weight of the scrub loss: the active components plus a random half of the others must match the target.
        p: exponent of the Schatten norm, usually 0 < p <= 1.
        tidy_every: interval between merging and pruning, as a fraction of the steps; 0 for never.
        tidy_from: progress at which merging and pruning begin.
        tidy_until: progress at which they end.
        reseed_until: progress until which free components get a new start where the sparse network fails most.
        min_cosine: components with at least this cosine are merged; above 1, none are.
        alpha: bits per rank; components are then merged by description length. None merges them by cosine.
        per_sample: select the k most attributed components of each sample instead of over the whole batch.
        per_position: attributions and gates for each position of a sequence instead of each sample.
        attribute_at: "target" or "components": the weights at which gradients are computed for attributions.
        unit_norm: normalise the columns of A to unit length after every step.
        restarts: independent runs, stacked on one tensor axis.
        seed: of all random numbers. If the network's weights are Gaussian, use a different seed from theirs: components
            of rank one could otherwise start along their rows.
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

    def __post_init__(self) -> None:
        """Check all settings and convert them to Python numbers.

        Raises:
            TypeError, ValueError: names the first setting of a wrong type or out of range.
        """
        for name, limits in LIMITS.items():
            value = getattr(self, name)
            if value is not None or name not in ("rank", "alpha"):
                self._put(name, checks.number(name, value, **limits))
        for name in ("per_sample", "per_position", "unit_norm"):
            self._put(name, checks.flag(name, getattr(self, name)))
        if self.tidy_every and self.tidy_from > self.tidy_until:
            raise ValueError(f"tidy_from must be at most tidy_until={self.tidy_until}, got {self.tidy_from}")
        checks.choice("attribute_at", self.attribute_at, ("target", "components"))
        for name in self.schedules:
            self._put(name, schedule(name, getattr(self, name), partial(checks.number, low=0)))
        self._put("top_k", schedule("top_k", self.top_k, self._k))
        if self.per_weight is not None:
            checks.kind("per_weight", self.per_weight, (list, tuple), "whole numbers, one for each weight, or None")
            self._put("per_weight", tuple(checks.number("per_weight", n, whole=True) for n in self.per_weight))
            if self.tidy_every and self.reseed_until > 0:
                raise ValueError(f"per_weight excludes new starts: set reseed_until to 0, got {self.reseed_until}")
            if self.alpha is not None:
                raise ValueError(f"alpha may merge across weights, which per_weight excludes; got alpha={self.alpha}")

    def _put(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the class is frozen

    def _k(self, name: str, value: Any) -> float:
        k = checks.number("top_k per sample" if self.per_sample else name, value, whole=self.per_sample)
        if not 0 < k <= self.n_components:
            raise ValueError(f"top_k must be above 0 and at most n_components={self.n_components}, got {value}")
        return k

    @property
    def schedules(self) -> list[str]:
        """Names of the losses' weights."""
        return ["faithfulness", "minimality", "simplicity", "hidden", "scrub"]

    def lr_at(self, t: float) -> float:
        """Compute the learning rate at progress t in [0, 1): linear warm-up, then a quarter cosine from `lr` to 0."""
        t = checks.number("t", t, 0, 1)
        warm = min(1.0, (t + 1 / self.steps) / self.warmup) if self.warmup else 1.0
        return self.lr * warm * math.cos(math.pi / 2 * t)

    def logs(self, step: int) -> bool:
        """Tell whether this step is logged: about two hundred evenly spaced steps, and the last one."""
        step = checks.number("step", step, 0, whole=True)
        return step % max(1, self.steps // 200) == 0 or step == self.steps - 1

    def tidies(self, step: int) -> bool:
        """Tell whether to merge and prune after this many steps.

        Args:
            step: steps done.
        """
        step = checks.number("step", step, 0, whole=True)
        interval = round(self.tidy_every * self.steps)
        return interval > 0 and step % interval == 0 and self.tidy_from <= step / self.steps < self.tidy_until

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> Config:
        """Create a configuration from names and values, as stored in JSON.

        Args:
            settings: names and values.

        Raises:
            TypeError: an unknown setting, or a value of a wrong type.
            ValueError: a setting out of range.
        """
        checks.kind("settings", settings, dict, "a dict from names to values")
        known = sorted(f.name for f in fields(cls))
        for name in settings:
            if name not in known:
                from .hints import similar

                raise TypeError(f"unknown setting {name!r}; {similar(name, known)}")
        missing = {"n_components", "top_k"} - set(settings)
        if missing:
            raise TypeError(f"settings without {sorted(missing)}, got {sorted(settings)}")
        return cls(**settings)


def at_progress(schedule: Schedule, t: float) -> float:
    """Evaluate a schedule at progress t in [0, 1].

    A number is constant. Points (progress, value), in order of progress, are interpolated linearly.
    """
    if isinstance(schedule, (int, float)):
        return float(schedule)
    times, values = zip(*schedule, strict=True)
    return float(np.interp(t, times, values))


def schedule(name: str, value: Any, check: Callable[[str, Any], float]) -> Schedule:
    """Check a number, or points (progress, value) in order of progress, and each of their values.

    Args:
        name: of the setting.
        value: as it was given.
        check: (name, value) -> the value as a number, or an error that names it.

    Raises:
        TypeError, ValueError: neither a number nor such points.
    """
    if not isinstance(value, (list, tuple)):
        return check(name, value)
    if not value or any(not isinstance(point, (list, tuple)) or len(point) != 2 for point in value):
        raise ValueError(f"{name} must be a number or points (progress, value), got {checks.given(value)}")
    times = [checks.number(f"progress in {name}", t, 0, 1) for t, _ in value]
    if any(a >= b for a, b in pairwise(times)):
        raise ValueError(f"progress in {name} must increase from point to point, got {checks.given(value)}")
    return tuple((t, check(name, v)) for t, (_, v) in zip(times, value, strict=True))
