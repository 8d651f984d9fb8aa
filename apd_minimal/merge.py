"""Merging and pruning while a decomposition trains (chapter 6).

Spare components make it likely that every mechanism finds one, but leave some mechanisms with two that point
the same way, and some components that no input uses. Both are cleared away in a few moments of a run: what
points the same way becomes one component, their sum; what is not used becomes zero, for good.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .components import Components


@torch.no_grad()
def merge_and_prune(components: Components, mask: Tensor, min_cosine: float = 0.9, dead_share: float = 0.1) -> Tensor:
    """Merge components that point the same way, and set unused ones to zero, in place.

    Args:
        components: stacked components, factors [R, C, d_in, m] and [R, C, m, d_out].
        mask: which are active on a large batch, [R, B, (positions,) C].
        min_cosine: two components of which both are used merge if their cosine is at least this.
        dead_share: a component is unused if it is active less often than this share of the mean.

    Returns:
        Tensor: which components were changed [R, C], so that the optimiser can forget them.
    """
    use = mask.flatten(1, -2).mean(1)  # [R, C]
    dead = use < dead_share * use.mean(1, keepdim=True)
    changed = dead.clone()
    flat = components.flat()
    unit = flat / flat.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    close = unit @ unit.transpose(1, 2) >= min_cosine
    for r in range(len(use)):
        # The longest come first and take in all shorter ones that point their way.
        order = flat[r].norm(dim=-1).argsort(descending=True).tolist()
        for i, keep in enumerate(order):
            if dead[r, keep]:
                continue
            group = [c for c in order[i + 1 :] if close[r, keep, c] and not dead[r, c]]
            if group:
                _merge(components, r, [keep, *group])
                dead[r, group] = True
                changed[r, [keep, *group]] = True
        for factors in (*components.A.values(), *components.B.values()):
            factors[r, dead[r]] = 0
    return changed


def _merge(components: Components, r: int, group: list[int]) -> None:
    """Replace the first of a group by the sum of all, cut to its rank by the singular value decomposition."""
    for path in components.paths:
        total = Components({path: components.A[path][r, group]}, {path: components.B[path][r, group]}).sum(path)
        merged = Components.from_matrices({path: total[None]}, rank=components.A[path].shape[-1])
        components.A[path][r, group[0]] = merged.A[path][0]
        components.B[path][r, group[0]] = merged.B[path][0]
