"""Matching the components of two decompositions of one target: two seeds, restarts or settings.

The match is one to one and maximises the sum of similarities (Hungarian algorithm), by weights or by use. The chance
baseline is measured: the second decomposition is scrambled and matched again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .. import checks
from ..components import Components, usable


@dataclass(frozen=True)
class Matching:
    """Pairs of components, one of each decomposition; see `match_weights` and `match_use`.

    Attributes:
        first: indices in the first decomposition [M], ascending; M is the smaller number of components in use.
        second: indices of their partners in the second decomposition [M].
        similarity: of each pair [M], at most 1.
        chance: similarities of the pairs after scrambling the second decomposition [n_draws, M].
        unmatched: number of unmatched components in use, all in the decomposition that has more of them.
    """

    first: Tensor
    second: Tensor
    similarity: Tensor
    chance: Tensor
    unmatched: int

    @property
    def mean(self) -> float:
        """Mean similarity of the pairs."""
        return float(self.similarity.mean())

    @property
    def above_chance(self) -> Tensor:
        """Which pairs are more similar than 95% of all pairs by chance [M]."""
        return self.similarity > torch.quantile(self.chance, 0.95)

    def __str__(self) -> str:
        lines = ["first  second  similarity"]
        for pair in zip(self.first.tolist(), self.second.tolist(), self.similarity.tolist(), strict=True):
            lines.append("{:5d}  {:6d}  {:10.3f}".format(*pair))
        means = self.chance.mean(1)
        lines.append(
            f"mean {self.mean:.3f}; by chance {means.mean():.3f} (at most {means.max():.3f} in {len(means)} draws); "
            f"{int(self.above_chance.sum())} of {len(self.first)} pairs above chance, {self.unmatched} unmatched"
        )
        return "\n".join(lines)


@torch.no_grad()
def cosines(first: Components, second: Components) -> Tensor:
    """Compute the cosine of every component of one decomposition with every one of another, all weights together.

    Computed from the factors, one component of the first at a time, so that no component's matrix is formed.

    Args:
        first: C components, without restarts.
        second: C' components of the same weights; their ranks may differ.

    Returns:
        Tensor: [C, C'], each in [-1, 1]; 0 for components of length zero.

    Raises:
        ValueError: restarts, or weights of other names or shapes.
    """
    _check(first, second)
    products = torch.stack([_products(first, second, path) for path in first.paths]).sum(0)
    lengths = first.norms()[:, None] * second.norms()
    return (products / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)).clamp(-1, 1)


def match_weights(
    first: Components, second: Components, n_draws: int = 20, seed: int = 0, empty: float = 0.01
) -> Matching:
    """Match two decompositions by the cosine between whole components.

    The chance baseline permutes the inputs and the outputs of every weight, independently in each component of the
    second: ranks, lengths and the factors' entries are kept, but which inputs and outputs are connected is random.

    Args:
        first: C components, without restarts.
        second: C' components of the same weights.
        n_draws: number of draws of the chance baseline, at least 1.
        seed: of these draws.
        empty: components are left out if their norm is at most this share of the largest.

    Returns:
        Matching: with cosines as similarities.

    Raises:
        ValueError: restarts, weights of other names or shapes, no component in use, n_draws below 1.
    """
    _check(first, second)
    n_draws, seed = checks.number("n_draws", n_draws, 1, whole=True), checks.number("seed", seed, 0, 2**62, whole=True)
    empty = checks.number("empty", empty, 0)
    norms = [components.norms() for components in (first, second)]
    rows, columns = ((norm > empty * norm.max()).nonzero().flatten() for norm in norms)
    _check_in_use(rows, columns)
    generator = torch.Generator().manual_seed(seed)
    used_first, used_second = (c.map(Tensor.detach).subset(i) for c, i in ((first, rows), (second, columns)))

    def scrambled() -> Tensor:
        A = {path: _permuted(a, generator) for path, a in used_second.A.items()}
        B = {path: _permuted(b.mT, generator).mT for path, b in used_second.B.items()}
        return cosines(used_first, Components(A, B))

    return _match(cosines(used_first, used_second), rows, columns, scrambled, n_draws)


def flat(name: str, value: Any, *shape: Any) -> None:
    """Check for attributions or masks [B, C], or of the shape given.

    Args:
        name: of the argument, for the message.
        value: what was given.
        shape: sizes or names of the axes, if others than B and C.

    Raises:
        TypeError, ValueError: another shape; of gates at positions, the message says how to flatten them.
    """
    if isinstance(value, Tensor) and value.ndim == 3:
        raise ValueError(f"{name} must be [B, C], got {checks.given(value)}: of positions, give {name}.flatten(0, 1)")
    checks.tensor(name, value, *shape or ("B", "C"))


def match_use(first: Tensor, second: Tensor, by: str = "correlation", n_draws: int = 20, seed: int = 0) -> Matching:
    """Match two decompositions by the samples on which their components are used.

    The chance baseline permutes the samples, independently for each component of the second: how often and how
    strongly it is used is kept, but on which samples is random.

    Args:
        first: attributions or masks [B, C], for example of `attributions.gradient` or `selection.batch_top_k`.
        second: those of the other decomposition on the same samples [B, C'].
        by: "correlation" (Pearson's, over samples), or "overlap" of masks (samples shared by a pair over samples of
            either); with "overlap", values above 0 count as active.
        n_draws: number of draws of the chance baseline, at least 1.
        seed: of these draws.

    Returns:
        Matching: without components that are constant over samples (correlation) or never active (overlap).

    Raises:
        ValueError: wrong shapes, values that are not finite, an unknown `by`, no component in use, n_draws below 1.
    """
    flat("first", first)
    flat("second", second, len(first), "C'")
    checks.choice("by", by, ("correlation", "overlap"))
    n_draws, seed = checks.number("n_draws", n_draws, 1, whole=True), checks.number("seed", seed, 0, 2**62, whole=True)
    a, b = (_standard(t.detach().double()) if by == "correlation" else (t > 0).double() for t in (first, second))
    rows, columns = (t.any(0).nonzero().flatten() for t in (a, b))
    _check_in_use(rows, columns)
    a, b = a[:, rows], b[:, columns]
    generator = torch.Generator().manual_seed(seed)

    def similarity(other: Tensor) -> Tensor:
        both = a.T @ other
        return both if by == "correlation" else both / (a.sum(0)[:, None] + other.sum(0) - both)

    return _match(similarity(b), rows, columns, lambda: similarity(_permuted(b.T, generator).T), n_draws)


def _check(first: Components, second: Components) -> None:
    for name, components in (("first", first), ("second", second)):
        usable(checks.kind(name, components, Components, "Components"), alone=True)
    shapes = [{path: (c.A[path].shape[-2], c.B[path].shape[-1]) for path in c.paths} for c in (first, second)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"both must decompose the same weights, got {shapes[0]} and {shapes[1]}")
    if len(types := {t.dtype for c in (first, second) for t in c.parameters()}) > 1:
        raise TypeError(f"first and second must be of one type, got {sorted(map(str, types))}")


def _check_in_use(rows: Tensor, columns: Tensor) -> None:
    if not len(rows) or not len(columns):
        raise ValueError(f"no component is in use: {len(rows)} in the first, {len(columns)} in the second")


def _products(first: Components, second: Components, path: str) -> Tensor:
    """Compute inner products of one weight's matrices [C, C']: tr(B_c^T A_c^T A_c' B_c')."""
    left = rearrange(second.A[path], "c i m -> i (c m)")
    right = rearrange(second.B[path], "c m o -> (c m) o").T
    rows = [((a.T @ left) * (b @ right)).sum(0) for a, b in zip(first.A[path], first.B[path], strict=True)]
    return rearrange(torch.stack(rows), "c (k m) -> c k m", m=second.A[path].shape[2]).sum(2)


def _permuted(t: Tensor, generator: torch.Generator) -> Tensor:
    """Permute the second axis of [C, n, ...] at random, independently for each element of the first."""
    order = torch.rand(t.shape[:2], generator=generator).argsort(1).to(t.device)
    return t[torch.arange(len(t), device=t.device)[:, None], order]


def _standard(scores: Tensor) -> Tensor:
    """Standardise columns to mean 0 and length 1; constant columns become zero."""
    centred = scores - scores.mean(0)
    length = centred.norm(dim=0)
    constant = length <= 1e-9 * scores.norm(dim=0)
    return torch.where(constant, 0.0, centred / length.clamp_min(torch.finfo(length.dtype).tiny))


def _match(
    similarity: Tensor, rows: Tensor, columns: Tensor, scrambled: Callable[[], Tensor], n_draws: int
) -> Matching:
    """Find the best match of the components in use, by their indices, and as many by chance."""
    if n_draws < 1:
        raise ValueError(f"n_draws must be at least 1, got {n_draws}")

    def best(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        i, j = (
            torch.as_tensor(index, device=table.device)
            for index in linear_sum_assignment(table.cpu().numpy(), maximize=True)
        )
        return i, j, table[i, j]

    i, j, matched = best(similarity)
    chance = torch.stack([best(scrambled())[2] for _ in range(n_draws)])
    return Matching(rows[i], columns[j], matched, chance, abs(len(rows) - len(columns)))
