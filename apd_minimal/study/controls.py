"""Decompositions that were not learned: what a measure gives to these, it gives for nothing.

Each sums to the weights exactly.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .. import checks
from ..components import Components


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
    checks.tensor("basis", basis, n, n)
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
        checks.tensor(f"weights: {path}", w, "d_in", "d_out")
    sizes = {path: len(w) for path, w in weights.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"weights must be of one d_in, got {sizes}")
    return next(iter(sizes.values()))
