"""The loop in which every target is trained."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def train(
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    steps: int,
    loss: Callable[[int], Tensor],
) -> None:
    """Descend on loss(step), and leave no gradients behind.

    Args:
        optimiser: of the parameters to train.
        schedule: of its learning rate, one move a step.
        steps: how many.
        loss: a scalar for each step.
    """
    for step in range(steps):
        optimiser.zero_grad()
        loss(step).backward()
        optimiser.step()
        schedule.step()
    optimiser.zero_grad()
