"""Merging and pruning, while a decomposition trains or afterwards (chapters 6 and 20).

Spare components make it likely that every mechanism is found, but leave some mechanisms with two components of similar
direction, and some components that no input uses. Both are removed a few times during a run: components of similar
direction are replaced by their sum, and unused ones are set to zero permanently.

There are two rules. `merge_and_prune` compares directions. `merge_by_bits` reduces the description length, the paper's
objective sum_c use_c (alpha rank_c + log2 C), where C counts the nonzero components. Three changes lower it:

- Merging two components that are always active together: one index is encoded instead of two, and the rank of a sum is
  at most the sum of the ranks.
- Merging two of similar direction: the sum has the rank of one of them, so that on samples where both are active, this
  rank and an index are saved; on samples where one is active, nothing is added.
- Dropping a dead component: it costs nothing itself, but all other indices get shorter without it.

Two components of different directions that are never active together stay separate as long as each sample's extra rank
costs more than the shorter indices save. The objective counts bits only: it has no term for errors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import checks
from ..components import Components, usable

NUMBERS = 2**20  # of components as vectors [C, N] that are held at a time


def pieces(components: Components, numbers: int = NUMBERS) -> Iterator[tuple[slice, Tensor]]:
    """Give the components as vectors, a few at a time, since at low rank they are far larger than their factors.

    Args:
        components: C components, without restarts.
        numbers: that a piece has at most, but for one of a single component.

    Yields:
        tuple[slice, Tensor]: which components, and their part of `Components.flat`, [n, N].
    """
    size = max(1, numbers // components.n_entries)
    for start in range(0, components.n_components, size):
        part = slice(start, start + size)
        yield part, components.map(lambda t: t[part]).flat()  # noqa: B023


def cosines(components: Components) -> tuple[Tensor, Tensor]:
    """Compute the lengths of components without restarts [C], and the cosine of each with each [C, C]."""
    C = components.n_components
    like = components.parameters()[0]
    length, table = like.new_zeros(C), like.new_zeros(C, C)
    for rows, flat in pieces(components):
        length[rows] = flat.norm(dim=-1)
        unit = _unit(flat)
        for columns, others in pieces(components):
            table[rows, columns] = unit @ _unit(others).T
    return length, table


def _unit(flat: Tensor) -> Tensor:
    return flat / flat.norm(dim=-1, keepdim=True).clamp_min(1e-12)


@torch.no_grad()
def merge_and_prune(components: Components, mask: Tensor, min_cosine: float = 0.9, dead_share: float = 0.1) -> Tensor:
    """Merge components of similar direction, and set unused ones to zero, in place.

    Args:
        components: stacked components, factors [R, C, d_in, m] and [R, C, m, d_out].
        mask: which are active on a large batch, boolean or zeros and ones [R, B, (positions,) C].
        min_cosine: used components with at least this cosine are merged.
        dead_share: a component is unused if it is active less often than this share of the mean.

    Returns:
        Tensor: which components were changed [R, C], so that the optimiser can reset their states.

    Raises:
        TypeError, ValueError: no stacked components, a mask of another shape, numbers out of range.
    """
    _check(components, mask)
    min_cosine = checks.number("min_cosine", min_cosine, 0, above=True)
    dead_share = checks.number("dead_share", dead_share, 0)
    use = mask.flatten(1, -2).to(components.parameters()[0]).mean(1)  # [R, C]
    dead = use < dead_share * use.mean(1, keepdim=True)
    changed = dead.clone()
    for r in range(len(use)):
        length, table = cosines(components.restart(r))
        close = table >= min_cosine
        # In order of decreasing norm: each absorbs all shorter ones of similar direction.
        order = length.argsort(descending=True).tolist()
        for i, keep in enumerate(order):
            if dead[r, keep]:
                continue
            group = [c for c in order[i + 1 :] if close[keep, c] and not dead[r, c]]
            if group:
                _merge(components, r, [keep, *group])
                dead[r, group] = True
                changed[r, [keep, *group]] = True
        for factors in (*components.A.values(), *components.B.values()):
            factors[r, dead[r]] = 0
    return changed


def _check(components: Components, mask: Tensor) -> None:
    if usable(components).restarts is None:
        raise ValueError("components must be stacked, with a leading axis of restarts: components.stacked()")
    checks.gates("mask", mask, components.restarts, "B", ..., components.n_components)


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

    Greedy: the change that leaves the fewest bits is made, then all are evaluated again. A merged component is active
    when either was. Its rank is that of the sum; pairs whose sum has a rank above the factors' m are not merged. Only
    dead components may be dropped: dropping always saves bits, and the objective has no term for errors.

    Counting how often each pair is active together takes one product of masks, B C^2 operations. Ranks of the sums are
    computed from eigenvalues of 2m x 2m Gram matrices: C^2 m^2 (d_in + d_out) operations for the matrices, and a
    multiple of C^2 m^3 for the eigenvalues. Each change then takes B C operations, and the ranks of one row of pairs.

    Args:
        components: stacked components, factors [R, C, d_in, m] and [R, C, m, d_out].
        mask: which are active on a large batch, zeros and ones [R, B, (positions,) C].
        alpha: bits per rank, above 0; choose it before the experiment.
        dead_share: a component is dead if it is active less often than this share of the mean over those left.
        threshold: a singular value counts above this share of its path's largest one before the first change.

    Returns:
        Tensor: which components were changed [R, C]; those merged into another and those dropped are zero now.

    Raises:
        TypeError, ValueError: no stacked components, a mask of another shape, numbers out of range.
    """
    _check(components, mask)
    alpha = checks.number("alpha", alpha, 0, above=True)
    dead_share = checks.number("dead_share", dead_share, 0)
    threshold = checks.number("threshold", threshold, 0, 1, below=True)
    changed = torch.zeros(len(mask), mask.shape[-1], dtype=torch.bool, device=mask.device)
    for r in range(len(changed)):
        active = mask[r].flatten(0, -2).double()
        changed[r] = _fewest_bits(components.restart(r), active, alpha, dead_share, threshold)
    return changed


def shortened(components: Components, mask: Tensor, alpha: float) -> Components:
    """Merge a copy of a finished decomposition by bits, and drop the components that become zero (chapter 20).

    Args:
        components: C components, without restarts; not changed.
        mask: which are active on a large batch, zeros and ones [B, (positions,) C].
        alpha: bits per rank, above 0.

    Returns:
        Components: the nonzero ones, in their order; at least one.

    Raises:
        TypeError, ValueError: components with restarts, or as in `merge_by_bits`.
    """
    usable(components, alone=True)
    checks.gates("mask", mask, "B", ..., components.n_components)
    merged = components.map(lambda t: t.detach().clone()).stacked()
    merge_by_bits(merged, mask[None], alpha)
    nonzero = (merged.restart(0).norms() > 0).nonzero().flatten().tolist()
    return merged.restart(0).subset(nonzero or [0])


def _fewest_bits(components: Components, active: Tensor, alpha: float, dead_share: float, threshold: float) -> Tensor:
    """Apply greedy changes to one restart's components, in place; active [B, C]. Return which were changed: [C]."""
    floors = [threshold * components.singular_values(path).max().double() for path in components.paths]
    max_rank = torch.tensor([[[components.A[path].shape[-1]]] for path in components.paths], device=active.device)
    indices = range(components.n_components)
    ranks = torch.stack([_ranks_with(components, c, floors) for c in indices], dim=1)  # [paths, C, C]
    alive = components.norms() > 0
    active = active * alive
    both = active.T @ active  # how often each pair is active together; the use of each on the diagonal
    changed = torch.zeros_like(alive)
    while (n := int(alive.sum())) > 1:
        use, rank = both.diagonal(), ranks.sum(0)
        cost = alpha * use * rank.diagonal()
        index_bits = math.log2(n - 1)  # per active component, after a change
        now = cost.sum() + use.sum() * math.log2(n)
        dropped = cost.sum() - cost + (use.sum() - use) * index_bits
        either = use[:, None] + use - both
        merged = cost.sum() - cost[:, None] - cost + alpha * either * rank + (use.sum() - both) * index_bits
        dead = alive & (use < dead_share * use.sum() / n)
        fits = (alive[:, None] & alive & (ranks <= max_rank).all(0)).triu(1)
        after = torch.cat([dropped.where(dead, torch.inf)[None], merged.where(fits, torch.inf)])  # [1 + C, C]
        if not after.min() < now * (1 - 1e-9):
            break
        # The first of those that are equal up to rounding, so that the order of summation does not matter.
        i, c = divmod(int((after.flatten() <= after.min() + 1e-9 * now).nonzero()[0]), len(use))
        alive[c], changed[c] = False, True
        if i:  # c is merged into i - 1
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
    own = columns[c].expand_as(columns)
    cross = own.mT @ columns
    return torch.cat([torch.cat([own.mT @ own, cross], 2), torch.cat([cross.mT, columns.mT @ columns], 2)], 1)
