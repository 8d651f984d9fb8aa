"""The training loop of all targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks

TOKEN_TYPES = (torch.int64, torch.int32)  # all that embeddings take


def numbers(seed: int, **least: tuple[Any, int]) -> list[int]:
    """Check a seed, and whole numbers against their minimum; return them as Python numbers."""
    seed = checks.number("seed", seed, 0, 2**62, whole=True)
    return [seed, *(checks.number(name, value, low, whole=True) for name, (value, low) in least.items())]


@torch.no_grad()
def xavier(weight: Tensor, generator: torch.Generator) -> None:
    """Start a weight as Xavier normal, in place; drawn on the CPU, so that it is the same on every device.

    Args:
        weight: [d_out, d_in].
        generator: on the CPU.
    """
    drawn = nn.init.xavier_normal_(torch.empty(weight.shape, dtype=weight.dtype), generator=generator)
    weight.copy_(drawn)


def train(
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    steps: int,
    loss: Callable[[int], Tensor],
) -> None:
    """Minimise loss(step) by gradient descent, and leave no gradients behind.

    Args:
        optimiser: of the parameters to train.
        schedule: of its learning rate, advanced once per step.
        steps: number of steps.
        loss: maps the step to a scalar.
    """
    for step in range(steps):
        optimiser.zero_grad()
        loss(step).backward()
        optimiser.step()
        schedule.step()
    optimiser.zero_grad()
