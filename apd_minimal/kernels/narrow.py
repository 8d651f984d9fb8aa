"""Rows that lie in few directions, written in these: products with them then take fewer operations.

What an embedding puts into a wide layer has as many directions as the network has inputs, however wide the layer is.
The directions are found by a random sketch (Halko, Martinsson and Tropp, arXiv:0909.4061), and are taken only if they
give the rows back.
"""

from __future__ import annotations

import torch
from torch import Tensor

SPARE = 8  # directions more than are needed, so that the sketch misses none
ROUNDINGS = 32  # that a row may be off, relative to its length


def narrow(rows: Tensor, n_directions: int) -> tuple[Tensor, Tensor] | None:
    """Write rows in a basis of few directions, if they span no more.

    Args:
        rows: [N, d].
        n_directions: how many they may have.

    Returns:
        tuple[Tensor, Tensor]: coordinates [N, k] and orthonormal directions [k, d], whose product is `rows` up to
            rounding; None if there are more directions, or too many to be worth it.
    """
    n, d = rows.shape
    k = n_directions + SPARE
    if 4 * k > min(n, d):
        return None
    lengths = rows.norm(dim=1, keepdim=True)
    draws = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).to(rows)
    sketch = (rows / lengths.clamp_min(torch.finfo(rows.dtype).tiny)).T @ draws
    directions, left = torch.linalg.qr(sketch)  # [d, k], [k, k]
    if left[-1, -1].abs() > 1e-3 * left[0, 0].abs():  # the last direction is needed as much as the first
        return None
    coordinates = rows @ directions
    off = torch.addmm(rows, coordinates, directions.T, beta=-1).norm(dim=1, keepdim=True)
    if not bool((off <= ROUNDINGS * torch.finfo(rows.dtype).eps * lengths).all()):
        return None
    return coordinates, directions.T
