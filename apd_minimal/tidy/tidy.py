"""Tidying in the middle of a run: merge components that agree, prune unused ones, give free ones a new start."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .merge import merge_and_prune, merge_by_bits
from .reseed import reseed

if TYPE_CHECKING:
    from ..train import Run

TIDY_SAMPLES = 4096


@torch.no_grad()
def tidy(run: Run) -> None:
    """Tidy a run's components in place, and let the optimiser and the selection forget those that changed.

    Args:
        run: between two steps; its selection says which components are used.
    """
    config = run.config
    run.optimiser.zero_grad()  # room for the copy; the next step makes its own gradients
    components = run.whole(run.components)  # a copy, so that Ctrl-C cannot fall in between
    with run.alone():
        x = run.many_inputs(TIDY_SAMPLES, run.generator)
        mask = run.mask(x, components)
        if config.alpha is None:
            changed = merge_and_prune(components, mask, config.min_cosine)
        else:
            changed = merge_by_bits(components, mask, config.alpha)
        if run.step < config.reseed_until * config.steps:
            size = run.micro_batch or run.batch_size
            changed |= reseed(run.network, components, run.mask(x, components), x, run.divergence, size=size)
    local, state = run.local, run.optimiser.state
    local.agree([*components.parameters(), changed])
    for p, whole in zip(run.components.parameters(), components.parameters(), strict=True):
        p.copy_(local.own(whole))
    for p, shared in run.shared():
        where = local.own(changed) if shared else changed
        second = local.whole(state[p]["exp_avg_sq"]) if shared else state[p]["exp_avg_sq"]
        state[p]["exp_avg"][where] = 0
        state[p]["exp_avg_sq"][where] = second.mean()
    run.selection.forget(changed)
