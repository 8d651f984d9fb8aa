"""Low-rank factorisation of a layer's input rows, so that products with them take fewer operations.

The rows that an embedding writes into a wide layer span at most as many directions as the network has inputs. The
directions are found by a random sketch (Halko, Martinsson and Tropp, arXiv:0909.4061), and are used only if they
reproduce the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

SPARE = 8  # oversampling of the sketch, so that it misses no direction
ROUNDINGS = 32  # largest error of a row, in rounding errors relative to its norm


def narrow(rows: Tensor, n_directions: int) -> tuple[Tensor, Tensor] | None:
    """Write rows in a basis of few directions, if they span no more.

    Args:
        rows: [N, d].
        n_directions: expected upper bound on their number.

    Returns:
        tuple[Tensor, Tensor]: coordinates [N, k] and orthonormal directions [k, d], whose product is `rows` up to
            rounding; None if there are more directions, or too many to be worth it.
    """
    n, d = rows.shape
    k = n_directions + SPARE
    if 4 * k > min(n, d):
        return None
    lengths = rows.norm(dim=1, keepdim=True)
    sketching = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).to(rows)
    sketch = (rows / lengths.clamp_min(torch.finfo(rows.dtype).tiny)).T @ sketching
    directions, R = torch.linalg.qr(sketch)  # [d, k], [k, k]
    if R[-1, -1].abs() > 1e-3 * R[0, 0].abs():  # the last spare direction is still needed: the rank is higher
        return None
    coordinates = rows @ directions
    errors = torch.addmm(rows, coordinates, directions.T, beta=-1).norm(dim=1, keepdim=True)
    if not bool((errors <= ROUNDINGS * torch.finfo(rows.dtype).eps * lengths).all()):
        return None
    return coordinates, directions.T
