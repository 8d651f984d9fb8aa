"""Which components are active: the k most attributed, per sample or over the whole batch (chapter 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks


def _check(scores: Tensor, k: float) -> None:
    checks.tensor("scores", scores, ..., "B", "C", finite=False)
    if scores.isnan().any():
        raise checks.NotFinite(f"the attributions (scores, {checks.given(scores)}) are NaN")
    n_components = scores.shape[-1]
    if isinstance(k := checks.plain(k), (int, float)) and not 0 < k <= n_components:
        raise ValueError(f"k must be above 0 and at most the number of components, {n_components}; got {k}")
    checks.number("k", k)


def batch_top_k(scores: Tensor, k: float) -> Tensor:
    """Keep the int(k * B) largest scores of the whole batch, so that k components are active on average.

    Args:
        scores: attributions [..., B, C]; with restarts in front, each is treated alone.
        k: mean number of active components per sample, 0 < k <= C; may be below 1.

    Returns:
        Tensor: mask of zeros and ones, of the shape and type of `scores`.

    Raises:
        ValueError: k out of range.
    """
    _check(scores, k)
    batch, n_components = scores.shape[-2:]
    flat = scores.reshape(-1, batch * n_components)
    # A little more, so that k = n / batch keeps n in spite of rounding.
    kept = flat.topk(max(1, int(k * batch + 1e-6)), dim=-1, sorted=False).indices
    return torch.zeros_like(flat).scatter_(-1, kept, 1.0).reshape(scores.shape)


def sample_top_k(scores: Tensor, k: float) -> Tensor:
    """Keep the k largest scores of each sample.

    Args:
        scores: attributions [..., B, C].
        k: number of active components of each sample, a whole number with 0 < k <= C.

    Returns:
        Tensor: mask of zeros and ones, of the shape and type of `scores`.

    Raises:
        ValueError: k out of range or not whole.
    """
    _check(scores, k)
    if k != int(k):
        raise ValueError(f"k per sample must be a whole number, got {k}")
    kept = scores.topk(int(k), dim=-1, sorted=False).indices
    return torch.zeros_like(scores).scatter_(-1, kept, 1.0)
