"""Backward passes in which a row that all samples share is multiplied only once.

After the last nonlinearity, the gradients of an output are the same for all samples: one row, expanded with stride 0.
Torch would multiply every copy by the weights; under `SharedRows` the row is multiplied once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def repeated(t: Tensor, axis: int = 0) -> bool:
    """Tell whether a tensor is expanded along an axis: all entries share one in memory (stride 0)."""
    return t.ndim > axis and t.shape[axis] > 1 and t.stride(axis) == 0


class SharedRows(TorchDispatchMode):
    """Dispatch mode in which products and sums of expanded rows are computed for one row, and expanded again."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation; all except these two run unchanged."""
        if func is torch.ops.aten.mm.default and repeated(args[0]):
            return (args[0][:1] @ args[1]).expand(len(args[0]), -1)
        if func is torch.ops.aten.add.Tensor and not kwargs:
            a, b = args
            if isinstance(b, Tensor) and a.shape == b.shape and repeated(a) and repeated(b):
                return (a[:1] + b[:1]).expand_as(a)
        return func(*args, **(kwargs or {}))
