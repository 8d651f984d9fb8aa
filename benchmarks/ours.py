"""(c), (d) Steps of `apd_minimal.decompose`, timed by its source of batches, which is called once per step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

import apd_minimal as apd
from benchmarks.cases import Case

STEPS = 10_000  # of the timed run: so many that logging, every fiftieth step, is negligible


class _Enough(BaseException):
    """Ends a run without the scoring that follows a finished, failed or interrupted run."""


class _Clock:
    """A source of batches that records the times of its calls."""

    def __init__(self, batches: Sequence[Tensor], n_steps: int) -> None:
        self.batches, self.n_steps = batches, n_steps
        self.times: list[tuple[float, float]] = []

    def __call__(self, step: int, generator: torch.Generator) -> Tensor:
        self.times.append((time.perf_counter(), time.process_time()))
        # Called once before the first step, to check the network, and once at the start of each step.
        if len(self.times) == self.n_steps + 2:
            raise _Enough
        return self.batches[step % len(self.batches)]


def has_special(case: Case) -> bool:
    """Tell whether the target has attributions of its own."""
    return hasattr(case.target(), "attributions")


def times(
    case: Case, batches: Sequence[Tensor], n_steps: int, special: bool = False, warmup: int = 2
) -> list[tuple[float, float]]:
    """Begin a run and time its steps.

    Args:
        case: which experiment.
        batches: inputs [B, I, n], used in turn; the restarts share the first instance's samples.
        n_steps: number of timed steps.
        special: use the target's own attributions (d) instead of the generic ones (c).
        warmup: number of steps before those.

    Returns:
        list[tuple[float, float]]: wall-clock and CPU seconds of each step.
    """
    target = case.target()
    clock = _Clock([x[:, 0].contiguous() for x in batches], warmup + n_steps)
    attribution = getattr(target, "attributions") if special else None  # noqa: B009  (not every target has them)
    try:
        apd.decompose(
            target, clock, target.weights, attribution=attribution, steps=STEPS, progress=False, **case.settings()
        )
    except _Enough:
        pass
    starts = clock.times[1 + warmup :]
    return [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(starts)]
