"""The loop in which every target is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks


def numbers(seed: int, **least: tuple[Any, int]) -> list[int]:
    """A seed, and whole numbers with the least that each may be, as Python numbers."""
    seed = checks.number("seed", seed, 0, 2**62, whole=True)
    return [seed, *(checks.number(name, value, low, whole=True) for name, (value, low) in least.items())]


@torch.no_grad()
def xavier(weight: Tensor, generator: torch.Generator) -> None:
    """Start a weight as Xavier normal, in place; drawn on the CPU, so that it is the same on every device."""
    drawn = nn.init.xavier_normal_(torch.empty(weight.shape, dtype=weight.dtype), generator=generator)
    weight.copy_(drawn)


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
