"""Merging and pruning, while a decomposition trains or afterwards (chapters 6 and 20).

Spare components make it likely that every mechanism finds one, but leave some mechanisms with two that point
the same way, and some components that no input uses. Both are cleared away in a few moments of a run: what
points the same way becomes one component, their sum; what is not used becomes zero, for good.

There are two rules. `merge_and_prune` goes by directions. `merge_by_bits` goes by description length, the paper's
objective sum_c use_c (alpha rank_c + log2 C), C counting the components that are not zero. Three cases lower it:

- Two components that always fire together. One name is said in place of two, and the rank of a sum is at most the
  sum of the ranks.
- Two that point the same way. The sum has the rank of one of them, so that where both fired, this rank and a name
  are saved; where one fired, nothing is paid.
- One that lies dead. It costs nothing itself, but every other name is shorter without it.

Two that never fire together and point elsewhere stay apart as long as the rank which each would pay for the other
costs more than the shorter names save. All of this is about bits alone: the objective has no term for errors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..components import Components


@torch.no_grad()
def merge_and_prune(components: Components, mask: Tensor, min_cosine: float = 0.9, dead_share: float = 0.1) -> Tensor:
    """Merge components of similar direction, and set unused ones to zero, in place.

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
    """Replace the first of a group by the sum of all, truncated to its rank by the singular value decomposition."""
    for path in components.paths:
        total = Components({path: components.A[path][r, group]}, {path: components.B[path][r, group]}).sum(path)
        merged = Components.from_matrices({path: total[None]}, rank=components.A[path].shape[-1])
        components.A[path][r, group[0]] = merged.A[path][0]
        components.B[path][r, group[0]] = merged.B[path][0]


@torch.no_grad()
def merge_by_bits(
    components: Components, mask: Tensor, alpha: float, dead_share: float = 0.1, threshold: float = 0.1
) -> Tensor:
    """Merge pairs and drop dead components as long as this lowers the description length, in place (chapter 20).

    Of all changes, the one that leaves the fewest bits is made, and all are weighed again. A merged component is
    active when either was. Its rank is that of the sum; a pair whose sum needs more than the factors' m is let be.
    Only dead components may be dropped, since dropping saves bits always, and the bits know nothing of errors.

    How often each pair fires together is one product of masks, B C^2 operations. Ranks of the sums come from
    eigenvalues of Gram matrices of 2m x 2m, in all C^2 m^2 (d_in + d_out) operations for these and C^2 m^3, times a
    constant, for the eigenvalues. Each change then takes B C operations, and ranks with one component anew.

    Args:
        components: stacked components, factors [R, C, d_in, m] and [R, C, m, d_out].
        mask: which are active on a large batch, zeros and ones [R, B, (positions,) C].
        alpha: bits for each unit of rank, above 0; fix it before looking.
        dead_share: a component is dead if it is active less often than this share of the mean over those left.
        threshold: a singular value counts above this share of its path's largest one before the first change.

    Returns:
        Tensor: which components were changed [R, C]; those merged into another and those dropped are zero now.

    Raises:
        ValueError: an alpha that is not above 0, or a mask that does not fit.
    """
    expected = next(iter(components.A.values())).shape[:2]
    if not alpha > 0:
        raise ValueError(f"alpha, the bits for a unit of rank, must be above 0, got {alpha}")
    if mask.ndim < 3 or (mask.shape[0], mask.shape[-1]) != expected:
        raise ValueError(f"mask must be [R, B, (positions,) C] with R, C = {list(expected)}, got {list(mask.shape)}")
    changed = torch.zeros(expected, dtype=torch.bool, device=mask.device)
    for r in range(len(changed)):
        active = mask[r].flatten(0, -2).double()
        changed[r] = _fewest_bits(components.restart(r), active, alpha, dead_share, threshold)
    return changed


def shortened(components: Components, mask: Tensor, alpha: float) -> Components:
    """Merge a copy of a finished decomposition by bits, and drop the components that become zero (chapter 20).

    Args:
        components: C components, without restarts; they are left as they are.
        mask: which are active on a large batch, zeros and ones [B, (positions,) C].
        alpha: bits for each unit of rank, above 0.

    Returns:
        Components: those that are not zero, in their order; at least one.

    Raises:
        ValueError: components with restarts, or as for `merge_by_bits`.
    """
    if components.restarts is not None:
        raise ValueError("pick one restart first: components.restart(index)")
    few = components.map(lambda t: t.detach().clone()).stacked()
    merge_by_bits(few, mask[None], alpha)
    left = (few.restart(0).norms() > 0).nonzero().flatten().tolist()
    return few.restart(0).subset(left or [0])


def _fewest_bits(components: Components, active: Tensor, alpha: float, dead_share: float, threshold: float) -> Tensor:
    """Apply greedy changes to one restart's components, in place; active [B, C]. Return which were changed: [C]."""
    floors = [threshold * components.singular_values(path).max().double() for path in components.paths]
    most = torch.tensor([[[components.A[path].shape[-1]]] for path in components.paths], device=active.device)
    everyone = range(components.n_components)
    ranks = torch.stack([_ranks_with(components, c, floors) for c in everyone], dim=1)  # [paths, C, C]
    alive = components.norms() > 0
    active = active * alive
    both = active.T @ active  # how often each pair fires together, each use on the diagonal
    changed = torch.zeros_like(alive)
    while (n := int(alive.sum())) > 1:
        use, rank = both.diagonal(), ranks.sum(0)
        cost = alpha * use * rank.diagonal()
        name = math.log2(n - 1)  # of each component after a change
        now = cost.sum() + use.sum() * math.log2(n)
        dropped = cost.sum() - cost + (use.sum() - use) * name
        either = use[:, None] + use - both
        merged = cost.sum() - cost[:, None] - cost + alpha * either * rank + (use.sum() - both) * name
        dead = alive & (use < dead_share * use.sum() / n)
        fits = (alive[:, None] & alive & (ranks <= most).all(0)).triu(1)
        after = torch.cat([dropped.where(dead, torch.inf)[None], merged.where(fits, torch.inf)])  # [1 + C, C]
        if not after.min() < now * (1 - 1e-9):
            break
        # The first of those that are equal up to rounding, so that the order of sums does not decide.
        i, c = divmod(int((after.flatten() <= after.min() + 1e-9 * now).nonzero()[0]), len(use))
        alive[c], changed[c] = False, True
        if i:  # c goes into i - 1
            keep = i - 1
            _merge(components.stacked(), 0, [keep, c])
            changed[keep] = True
            active[:, keep] = torch.maximum(active[:, keep], active[:, c])
            both[keep] = both[:, keep] = active[:, keep] @ active
            ranks[:, keep] = ranks[:, :, keep] = _ranks_with(components, keep, floors)
        both[c] = both[:, c] = active[:, c] = 0
        for factors in components.parameters():
            factors[c] = 0
    return changed


def _ranks_with(components: Components, c: int, floors: list[Tensor]) -> Tensor:
    """Compute the numerical ranks of P_c + P_j for every j, and of P_c itself for j = c: [paths, C]."""
    ranks = []
    for path, floor in zip(components.paths, floors, strict=True):
        # The squared singular values of [A_c A_j] [B_c; B_j] are the eigenvalues of the product of the Gram matrices.
        a, b = _gram(components.A[path].double(), c), _gram(components.B[path].double().mT, c)
        values, vectors = torch.linalg.eigh(a)
        root = vectors * values.clamp_min(0).sqrt()[:, None]
        ranks.append((torch.linalg.eigvalsh(root.mT @ b @ root) > floor**2).sum(-1))
        own = components.map(lambda t: t[c : c + 1]).singular_values(path)
        ranks[-1][c] = (own > floor).sum()
    return torch.stack(ranks)


def _gram(columns: Tensor, c: int) -> Tensor:
    """Compute inner products of the columns of [F_c F_j], for every j and factors F [C, d, m]: [C, 2m, 2m]."""
    mine = columns[c].expand_as(columns)
    cross = mine.mT @ columns
    return torch.cat([torch.cat([mine.mT @ mine, cross], 2), torch.cat([cross.mT, columns.mT @ columns], 2)], 1)
