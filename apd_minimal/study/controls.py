"""Decompositions that were not learned, and parts dealt anew: what a measure gives to these, it gives for nothing.

The first sum to the weights exactly, the last to what the components did.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .. import checks
from ..components import Components, usable


def input_columns(weights: Mapping[str, Tensor]) -> Components:
    """Split the weights by their input columns: component i is what input i is multiplied by.

    It has no parameters, and on inputs with one feature on, the one component that is active is all that is needed.
    Where mechanisms are input columns, as in TMS, it scores as the truth.

    Args:
        weights: per parameter path, a matrix [d_in, d_out]; all with the same d_in.

    Returns:
        Components: d_in of them, of rank one.

    Raises:
        TypeError, ValueError: no matrices, or of different d_in.
    """
    return rotated_columns(weights, torch.eye(_inputs(weights)))


def rotated_columns(weights: Mapping[str, Tensor], basis: Tensor) -> Components:
    """Split the weights by another basis of the inputs: component i is u_i (u_i^T W), with the basis' column u_i.

    Args:
        weights: per parameter path, a matrix [d_in, d_out]; all with the same d_in.
        basis: orthonormal columns [d_in, d_in].

    Returns:
        Components: d_in of them, of rank one.

    Raises:
        TypeError, ValueError: no matrices, matrices of different d_in, or a basis that is not orthonormal.
    """
    n = _inputs(weights)
    checks.tensor("basis", basis, n, n, real=True)
    if not torch.allclose(basis.T @ basis, torch.eye(n).to(basis), atol=1e-4):
        raise ValueError("basis must be orthonormal, and basis^T basis is not the identity")
    A = {path: basis.T[:, :, None].to(w) for path, w in weights.items()}
    return Components(A, {path: A[path].mT @ w.detach() for path, w in weights.items()})


def random_split(weights: Mapping[str, Tensor], seed: int = 0) -> Components:
    """Split the weights by a random orthonormal basis of the inputs: as many parts of rank one, in any directions.

    Args:
        weights: per parameter path, a matrix [d_in, d_out]; all with the same d_in.
        seed: of the basis.

    Returns:
        Components: d_in of them, of rank one.

    Raises:
        TypeError, ValueError: no matrices, or of different d_in.
    """
    n = _inputs(weights)
    generator = torch.Generator().manual_seed(checks.number("seed", seed, 0, 2**62, whole=True))
    return rotated_columns(weights, torch.linalg.qr(torch.randn(n, n, generator=generator)).Q)


def _inputs(weights: Mapping[str, Tensor]) -> int:
    """Check the matrices, and give d_in."""
    checks.kind("weights", weights, Mapping, "a mapping from parameter paths to matrices [d_in, d_out]")
    for path, w in weights.items():
        checks.tensor(f"weights: {path}", w, "d_in", "d_out", real=True)
    sizes = {path: len(w) for path, w in weights.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"weights must be of one d_in, got {sizes}")
    return next(iter(sizes.values()))


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
    seeds = torch.randint(2**62, (len(components.paths), 2), generator=generator).tolist()
    A, B = {}, {}
    for path, own in zip(components.paths, seeds, strict=True):
        m = components.A[path].shape[-1]
        split = Components.from_matrices({path: components.matrices(path).detach()}, m)  # singular directions
        left, right = split.A[path].mT.flatten(0, 1), split.B[path].flatten(0, 1)  # one row for each part
        # Their signs are nobody's choice: the largest entry of each left one shall be positive.
        sign = left.gather(1, left.abs().argmax(1, keepdim=True)).sign()
        left, right = left * sign, right * sign
        sizes = left.norm(dim=1) * right.norm(dim=1)
        there = sizes > 10 * torch.finfo(sizes.dtype).eps * sizes.max()
        large = there & (sizes > threshold * sizes.max())
        # Large and small parts apart, each with a stream of its own: how many tiny ones there are is up to rounding.
        for hand, stream in zip((large, there & ~large), own, strict=True):
            left[hand], right[hand] = _dealt(left[hand], right[hand], turned, torch.Generator().manual_seed(stream))
        A[path] = left.unflatten(0, (components.n_components, -1)).mT.contiguous()
        B[path] = right.unflatten(0, (components.n_components, -1))
    return Components(A, B)


def _dealt(left: Tensor, right: Tensor, turned: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Put parts [n, d_in], [n, d_out] in a random order, or turn them by a random orthogonal matrix first."""
    n = len(left)
    if turned:
        Q = torch.linalg.qr(torch.randn(n, n, generator=generator))[0].to(left)
        left, right = Q.T @ left, Q.T @ right
    order = torch.randperm(n, generator=generator).to(left.device)
    return left[order], right[order]
