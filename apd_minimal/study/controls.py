"""Components that know nothing, to compare with: the same parts, dealt at random."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..components import Components, usable


@torch.no_grad()
def dealt(components: Components, seed: int = 0, turned: bool = False, threshold: float = 0.1) -> Components:
    """Deal the rank-one parts of all components to as many components of the same ranks, at random.

    A component's parts in a weight are its singular directions. In each weight, every component gets as many parts
    back as it had, as many of them large ones, and empty components stay empty: sums and, as a rule, effective ranks
    are unchanged. Where each component has rank one, and lies in one weight, this only puts them in another order:
    then `turned` is the control. It replaces the parts a_i b_i of a weight by others with the same sum, sum_i a'_i b'_i
    with a'_i = sum_j Q_ji a_j and b'_i = sum_j Q_ji b_j, for a random orthogonal matrix Q.

    Args:
        components: C components, without restarts.
        seed: of the deal.
        turned: replace the parts by random combinations of them first.
        threshold: a part is large if its singular value is above this share of the weight's largest, as in
            `Components.ranks`; turned parts have no sizes of their own, and are dealt as they come.

    Returns:
        Components: C components with the same sum.

    Raises:
        TypeError, ValueError: no components, with restarts, or not finite; a seed or threshold out of range.
    """
    usable(components, alone=True)
    generator = torch.Generator().manual_seed(checks.number("seed", seed, 0, 2**62, whole=True))
    turned = checks.flag("turned", turned)
    threshold = checks.number("threshold", threshold, 0, 1, below=True)
    A, B = {}, {}
    for path in components.paths:
        m = components.A[path].shape[-1]
        split = Components.from_matrices({path: components.matrices(path).detach()}, m)  # singular directions
        left, right = split.A[path].mT.flatten(0, 1), split.B[path].flatten(0, 1)  # one row for each part
        sizes = left.norm(dim=1) * right.norm(dim=1)
        there = sizes > 10 * torch.finfo(sizes.dtype).eps * sizes.max()
        large = there & (sizes > threshold * sizes.max())
        if turned:
            # Large parts are turned among themselves: a component that has none must not get a share of them.
            for hand in (large, there & ~large):
                Q = torch.linalg.qr(torch.randn(int(hand.sum()), int(hand.sum()), generator=generator))[0].to(left)
                left[hand], right[hand] = Q.T @ left[hand], Q.T @ right[hand]
        for hand in (large, there & ~large):
            left[hand], right[hand] = _shuffled(left[hand], right[hand], generator)
        A[path] = left.unflatten(0, (components.n_components, -1)).mT.contiguous()
        B[path] = right.unflatten(0, (components.n_components, -1))
    return Components(A, B)


def _shuffled(left: Tensor, right: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(left), generator=generator).to(left.device)
    return left[order], right[order]
