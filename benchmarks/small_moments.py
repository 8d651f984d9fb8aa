"""Optimisers with small states, for chapter 19: Adam's moments in bfloat16 or in eight bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SmallMoments(torch.optim.Optimizer):
    """Adam whose moments are kept in bfloat16, rounded to the nearest: the first alone, or both.

    Args:
        parameters: to train.
        lr: learning rate.
        both: whether the second moment is in bfloat16 too.
    """

    def __init__(self, parameters: list[Tensor], lr: float, both: bool) -> None:
        super().__init__(parameters, {"lr": lr})
        self.both = both

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply one update, as Adam with its usual constants."""
        group = self.param_groups[0]
        for p in group["params"]:
            state = self.state[p]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(p, dtype=torch.bfloat16)
                state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.bfloat16 if self.both else p.dtype)
            state["step"] += 1
            first = state["exp_avg"].to(p.dtype).lerp_(p.grad, 0.1)
            second = state["exp_avg_sq"].to(p.dtype).mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
            state["exp_avg"].copy_(first)
            state["exp_avg_sq"].copy_(second)
            scale = (second / (1 - 0.999 ** state["step"])).sqrt_().add_(1e-8)
            p.addcdiv_(first, scale, value=-group["lr"] / (1 - 0.9 ** state["step"]))


def optimiser_of(kind: str, parameters: list[Tensor], lr: float) -> torch.optim.Optimizer:
    """Create an optimiser with small states.

    Raises:
        ImportError: 8-bit states without torchao.
    """
    if kind != "8-bit":
        return SmallMoments(parameters, lr, both=kind == "both")
    from torchao.optim import Adam8bit

    return Adam8bit(parameters, lr=torch.tensor(lr))


def has_torchao() -> bool:
    """Tell whether the 8-bit optimiser is installed."""
    try:
        import torchao.optim  # noqa: F401
    except ImportError:
        return False
    return True
