"""What a layer makes of its input with gated components: the product with their sum, as cheap as it can be.

With every gate at 1 the components are added first; with a few boolean gates on, only these pairs are worked out
(`kernels.grouped`); otherwise each component's inner activations are multiplied by its gates.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .components import Components
from .kernels import grouped
from .sites import Site


def mixture(
    site: Site,
    rows: Tensor,
    components: Components,
    gates: dict[str, Tensor] | None,
    remainder: bool,
    batch: int,
    group: Callable[[Tensor, int], grouped.Groups | None],
) -> Tensor:
    """Compute the output rows of the gated sum of components, less the ungated one where the target's own stays.

    Args:
        site: where the weight is used.
        rows: the layer's inputs [R B, *positions, d], restart by restart.
        components: stacked, with an axis of R restarts.
        gates: per parameter path [R, B, (P,) C]; None is every gate at 1.
        remainder: whether the target's own weight stays, so that what counts of a gate is g - 1.
        batch: B.
        group: lists the active pairs of boolean gates for components of a rank, see `kernels.grouped.group`.

    Returns:
        Tensor: [R B, *positions, d'].

    Raises:
        ValueError: gates for other positions than the layer has.
    """
    restarts, n_components = components.A[site.path].shape[:2]
    flat = rows.reshape(restarts, -1, rows.shape[-1])  # [R, B P, d]
    if gates is None:
        return (flat @ site.sum(components)).reshape(*rows.shape[:-1], -1)
    g = gates[site.path].flatten(2, -2) if gates[site.path].ndim > 3 else gates[site.path][:, :, None]
    n_positions = flat.shape[1] // batch
    if g.shape[2] not in (1, n_positions):
        raise ValueError(
            f"gates per position for {site.path}: expected positions {list(rows.shape[1:-1])} at module "
            f"{site.name!r}, got gates of shape {list(gates[site.path].shape[1:])}"
        )
    first, second = site.factors(components)
    if g.dtype == torch.bool and not remainder:
        groups = group(gates[site.path], first.shape[-1])
        if groups is not None:
            y = grouped.apply(groups, flat.unflatten(1, (batch * g.shape[2], -1)), first, second)
            return y.reshape(*rows.shape[:-1], -1)
    g = g.to(rows.dtype)
    if remainder:
        g = g - 1
    u = flat @ first.transpose(1, 2).flatten(2)  # [R, B P, C m]
    u = u.view(restarts, batch, n_positions, n_components, -1) * g[..., None]
    return (u.flatten(3).flatten(1, 2) @ second.flatten(1, 2)).reshape(*rows.shape[:-1], -1)
