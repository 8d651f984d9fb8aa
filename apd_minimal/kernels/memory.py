"""Which tensors are views of the same memory: weights tied without being one parameter."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy


def places(t: Tensor) -> Tensor:
    """Say where in its storage each number of a tensor lies: integers of its shape."""
    extent = 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    return int(t.storage_offset()) + torch.arange(extent).as_strided(t.shape, t.stride())


def overlap(a: Tensor, b: Tensor) -> bool:
    """Tell whether some numbers of two tensors lie in the same place; never of lazy, sparse and meta tensors."""
    if is_lazy(a) or a.layout != torch.strided:
        return False
    same = a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() != 0
    return same and bool(torch.isin(places(a), places(b)).any())
