"""Parameter components: C vectors in parameter space, stored as low-rank factors.

A component P_c has one matrix for each decomposed weight, P_c[path] = A_c[path] @ B_c[path].
Chapter 3 (parameter space) introduces the flattened view and the factors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from . import checks


@dataclass
class Components:
    """C parameter components, factorised, for each decomposed weight.

    A decomposed weight is seen as a matrix [d_in, d_out] that multiplies rows of inputs. Several
    independent decompositions can be stacked on a leading axis of `restarts`.

    Attributes:
        A: per parameter path, the left factors [C, d_in, m] (or [restarts, C, d_in, m]).
        B: per parameter path, the right factors [C, m, d_out] (or [restarts, C, m, d_out]).

    Raises:
        TypeError: factors that are not floating-point tensors, or A and B of a path of different types.
        ValueError: if the paths or the shapes of A and B do not match.
    """

    A: dict[str, Tensor]
    B: dict[str, Tensor]

    def __post_init__(self) -> None:
        for name in "AB":
            factors = checks.kind(name, getattr(self, name), dict, "a dict from parameter paths to tensors")
            for path, t in factors.items():
                if not isinstance(t, Tensor) or not t.is_floating_point() or t.layout != torch.strided:
                    raise TypeError(
                        f"{name}: {path} must be a dense tensor of floating point numbers, got {checks.given(t)}"
                    )
        if not self.A or self.A.keys() != self.B.keys():
            raise ValueError(
                f"A and B need the same parameter paths, at least one: got {list(self.A)} and {list(self.B)}"
            )
        lead = {self.A[path].shape[:-2] for path in self.A}
        for path, a in self.A.items():
            b = self.B[path]
            if a.ndim not in (3, 4) or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
                raise ValueError(
                    f"{path}: A must be [C, d_in, m] and B [C, m, d_out] (with an optional leading axis of "
                    f"restarts), got {list(a.shape)} and {list(b.shape)}"
                )
            if a.dtype != b.dtype:
                raise TypeError(f"{path}: A and B must be of one type, got {checks.given(a)} and {checks.given(b)}")
        if len(lead) != 1:
            raise ValueError(f"every path needs the same number of components, got {sorted(map(list, lead))}")

    @classmethod
    def random(
        cls,
        shapes: Mapping[str, tuple[int, int]],
        n_components: int,
        rank: int | None = None,
        restarts: int | None = None,
        std: float = 0.1,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Components:
        """Draw Gaussian factors, so small that the sum starts near zero.

        Args:
            shapes: per parameter path, (d_in, d_out).
            n_components: C.
            rank: m, the inner size of the factors; None means full rank, min(d_in, d_out) of each weight.
            restarts: number of independent copies on a leading axis; None for no such axis.
            std: standard deviation of the factors' entries.
            generator: source of randomness; its device must be the CPU.
            device: of the factors.

        Returns:
            Components: with leaf tensors that do not require gradients yet.

        Raises:
            TypeError, ValueError: no shapes, one that is not (d_in, d_out), no such device, or a number out of range.
        """
        checks.kind("shapes", shapes, Mapping, "a mapping from parameter paths to (d_in, d_out)")
        if not shapes:
            raise ValueError("shapes must have at least one parameter path, got none")
        n_components = checks.number("n_components", n_components, 1, whole=True)
        rank = None if rank is None else checks.number("rank", rank, 1, whole=True)
        restarts = None if restarts is None else checks.number("restarts", restarts, 1, whole=True)
        std = checks.number("std", std, 0)
        checks.generator(generator)
        try:
            device = torch.empty(0, device=device).device
        except (RuntimeError, TypeError, AssertionError) as error:  # the last of a build without CUDA
            raise ValueError(f"device must be a torch device or None, got {checks.given(device)}: {error}") from None
        lead = (n_components,) if restarts is None else (restarts, n_components)
        A, B = {}, {}
        for path, shape in shapes.items():
            if not isinstance(shape, (tuple, list)) or len(shape) != 2:
                raise ValueError(f"shapes: {path} must be (d_in, d_out), got {checks.given(shape)}")
            d_in, d_out = (checks.number(f"shapes: {path}", size, 1, whole=True) for size in shape)
            m = min(d_in, d_out) if rank is None else min(rank, d_in, d_out)
            A[path] = (std * torch.randn(*lead, d_in, m, generator=generator)).to(device)
            B[path] = (std * torch.randn(*lead, m, d_out, generator=generator)).to(device)
        return cls(A, B)

    @classmethod
    def from_matrices(cls, matrices: Mapping[str, Tensor], rank: int | None = None) -> Components:
        """Factorise given matrices [C, d_in, d_out] by their singular value decomposition.

        Args:
            matrices: per parameter path, the C matrices [C, d_in, d_out].
            rank: how many singular values to keep; None keeps all.

        Returns:
            Components: with the singular values split evenly between A and B.

        Raises:
            TypeError, ValueError: no parameter path, or matrices of other shapes.
        """
        checks.kind("matrices", matrices, Mapping, "a mapping from parameter paths to tensors")
        if not matrices:
            raise ValueError("matrices must have at least one parameter path, got none")
        rank = None if rank is None else checks.number("rank", rank, 1, whole=True)
        A, B = {}, {}
        for path, P in matrices.items():
            checks.tensor(f"matrices: {path}", P, ..., "C", "d_in", "d_out")
            U, S, Vh = torch.linalg.svd(single(P), full_matrices=False)
            root = S[..., :rank].sqrt()
            A[path] = (U[..., :rank] * root[..., None, :]).to(P.dtype)
            B[path] = (root[..., :, None] * Vh[..., :rank, :]).to(P.dtype)
        return cls(A, B)

    @property
    def paths(self) -> list[str]:
        """The decomposed parameter paths."""
        return list(self.A)

    @property
    def n_components(self) -> int:
        """C, the number of components."""
        return next(iter(self.A.values())).shape[-3]

    @property
    def restarts(self) -> int | None:
        """Size of the leading axis of restarts; None if there is no such axis."""
        first = next(iter(self.A.values()))
        return first.shape[0] if first.ndim == 4 else None

    @property
    def n_entries(self) -> int:
        """N, the number of decomposed weight entries (a tied weight counts once)."""
        return sum(self.A[path].shape[-2] * self.B[path].shape[-1] for path in self.paths)

    def matrices(self, path: str) -> Tensor:
        """Return all components' matrices for one weight: [..., C, d_in, d_out].

        Args:
            path: parameter path of a weight that they decompose.
        """
        a, b = self._factors(path)
        return a @ b

    def _factors(self, path: str) -> tuple[Tensor, Tensor]:
        if not isinstance(path, str) or path not in self.A:
            raise KeyError(f"path must be one of {self.paths}, got {checks.given(path)}")
        return self.A[path], self.B[path]

    def sum(self, path: str) -> Tensor:
        """Sum all components for one weight, [..., d_in, d_out], without forming each of them.

        Args:
            path: parameter path of a weight that they decompose.
        """
        a, b = self._factors(path)
        return rearrange(a, "... c d m -> ... d (c m)") @ rearrange(b, "... c m e -> ... (c m) e")

    def squared_lengths(self, path: str) -> Tensor:
        """Compute the squared length of each rank-one term A_:,r B_r,: of one weight: [..., C, m].

        Args:
            path: parameter path of a weight that they decompose.
        """
        a, b = self._factors(path)
        return (a * a).sum(-2) * (b * b).sum(-1)  # takes half the time of square(), whose gradient calls pow()

    def flat(self) -> Tensor:
        """Return the components as vectors in parameter space: [..., C, N] (chapter 3)."""
        return torch.cat([self.matrices(path).flatten(-2) for path in self.paths], dim=-1)

    def singular_values(self, path: str) -> Tensor:
        """Compute the singular values of every component's matrix, [..., C, m], largest first.

        Args:
            path: parameter path of a weight that they decompose.

        Raises:
            KeyError: they do not decompose it.
            NotFinite: factors that are NaN or infinite.
        """
        # The triangular parts R of the factors' QR decompositions have the product's singular values, and are m by m.
        a, b = self._factors(path)
        for name, factor in (("A", a), ("B", b)):
            checks.tensor(f"components.{name}: {path}", factor, ...)
        r_a = torch.linalg.qr(single(a)).R
        r_b = torch.linalg.qr(single(b).transpose(-2, -1)).R
        return torch.linalg.svdvals(r_a @ r_b.transpose(-2, -1))

    def ranks(self, threshold: float = 0.1) -> dict[str, Tensor]:
        """Compute effective ranks, [..., C] per path: singular values above `threshold` times the path's largest."""
        threshold = checks.number("threshold", threshold, 0, 1, below=True)
        values = {path: self.singular_values(path) for path in usable(self).paths}
        return {path: (s > threshold * s.amax(dim=(-2, -1), keepdim=True)).sum(-1) for path, s in values.items()}

    def norms(self) -> Tensor:
        """Compute the Euclidean norm of every component over all weights together: [..., C]."""
        return sum(self.singular_values(path).square().sum(-1) for path in self.paths).sqrt()  # type: ignore[union-attr]

    def map(self, function: Callable[[Tensor], Tensor]) -> Components:
        """Apply `function` to every factor, for example `lambda t: t.detach().clone()`.

        Args:
            function: maps a factor to a tensor.

        Raises:
            TypeError: `function` is none, or gives no tensor.
        """
        if not callable(function):
            raise TypeError(f"function must be a function of one factor, got {checks.given(function)}")
        A, B = ({path: function(t) for path, t in factors.items()} for factors in (self.A, self.B))
        return Components(A, B)

    def restart(self, index: int) -> Components:
        """Select one of the stacked restarts, as components [C, d_in, m] and [C, m, d_out].

        Args:
            index: which one, from 0.

        Raises:
            ValueError: there is no axis of restarts, or the index is out of range.
        """
        if self.restarts is None:
            raise ValueError(f"these components have no axis of restarts, got index {checks.given(index)}")
        index = checks.number("index", index, -self.restarts, self.restarts - 1, whole=True)
        return self.map(lambda t: t[index])

    def stacked(self) -> Components:
        """Return the same components with a leading axis of restarts (of size one if there was none)."""
        return self if self.restarts is not None else self.map(lambda t: t[None])

    def subset(self, index: Tensor | list[int]) -> Components:
        """Select the components in `index`, in that order.

        Args:
            index: whole numbers, or a boolean mask [C] as a tensor.

        Raises:
            TypeError, ValueError: no list of components, or an index out of range.
        """
        n = self.n_components
        if isinstance(index, Tensor) and index.dtype == torch.bool:
            index = checks.tensor("index", index, n).nonzero().flatten()
        chosen = index.tolist() if isinstance(index, Tensor) else index
        if not isinstance(chosen, list):
            raise TypeError(f"index must be a list of components, got {checks.given(index)}")
        chosen = [checks.number("index", c, -n, n - 1, whole=True) for c in chosen]
        return self.map(lambda t: t[..., chosen, :, :])

    def parameters(self) -> list[Tensor]:
        """List all factors in a fixed order, for an optimiser."""
        return [t for path in self.paths for t in (self.A[path], self.B[path])]


def usable(components: Any, alone: bool = False) -> Components:
    """Check components as an argument: finite, at least one, and without restarts where one decomposition is expected.

    Args:
        components: the argument.
        alone: refuse an axis of restarts.

    Raises:
        TypeError, ValueError: no components, empty or not finite ones, or restarts where one decomposition is expected.
    """
    checks.kind("components", components, Components, "Components (a result has .components)")
    if alone and components.restarts is not None:
        raise ValueError("components must be without restarts, pick one restart first: components.restart(index)")
    for path in components.paths:
        for name in "AB":
            checks.tensor(f"components.{name}: {path}", getattr(components, name)[path], ..., "C", "rows", "columns")
    return components


def single(t: Tensor) -> Tensor:
    """Convert to single precision, unless it is double: torch's factorisations accept no others.

    Args:
        t: of any floating-point type.
    """
    return t if t.dtype == torch.float64 else t.float()


@torch.no_grad()
def confine(components: Components, per_weight: Sequence[int]) -> None:
    """Confine each component to one weight: set its factors elsewhere to zero, in place; they stay zero in training.

    Args:
        components: C components.
        per_weight: number of components for each weight, in the order of the paths.

    Raises:
        ValueError: numbers that do not match the weights or C.
    """
    fits = len(per_weight) == len(components.paths) and sum(per_weight) == components.n_components
    if not fits or min(per_weight) < 0:
        raise ValueError(
            f"per_weight must have a number for each of {components.paths} and add up to {components.n_components}, "
            f"got {tuple(per_weight)}"
        )
    first = 0
    for path, n in zip(components.paths, per_weight, strict=True):
        for factor in (components.A[path], components.B[path]):
            # If both factors are zero, their gradients are zero: training cannot bring the component back.
            factor[..., :first, :, :] = 0
            factor[..., first + n :, :, :] = 0
        first += n


@torch.no_grad()
def normalise_columns(components: Components) -> None:
    """Scale A's columns to unit length and B's rows by the inverse, in place, so that the products do not change.

    Args:
        components: factors A [..., C, d_in, m] and B [..., C, m, d_out].
    """
    for path, a in components.A.items():
        length = a.norm(dim=-2, keepdim=True).clamp_min(1e-12)
        a.div_(length)
        components.B[path].mul_(length.transpose(-2, -1))
