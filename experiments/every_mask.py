"""A certified bound on the error over all masks in [0, 1], for a layer of squares between two decomposed matrices.

Gates g [C] weigh what components read and what they write, so that every output is a sum over three components,

    y(g) = sum_cde g_c g_d g_e T[c, d, e],   T[c, d, e] = (r_c r_d) V_e  over the neurons that are open,

with r_c what component c reads and V_e what it writes. With the gates of what is needed at 1, the outputs are
polynomials of a degree of at most 3 in each free gate. Write them in Bernstein's basis,

    y(g) = sum_a B_a(g) b_a,   B_a(g) = prod_f (3 over a_f) g_f^a_f (1 - g_f)^(3 - a_f),   a_f = 0, 1, 2 or 3.

The B_a are not negative on [0, 1] and sum to 1: every output is a mean of the coefficients b_a [n_out]. A squared error
is convex, so at no mask is it above the largest one among the coefficients. Those with all a_f at 0 or 3 are the
outputs at the corners. So the bound is never below the worst corner; and where the largest coefficient is at a corner,
the worst corner is the worst of all masks, proven by one list of numbers. Elsewhere the box is cut in halves, whose
coefficients follow from the old ones (de Casteljau), until bound and worst mask seen are close.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

import apd_minimal as apd
from apd_minimal.targets import GroupOperations, ModularArithmetic

Squares = ModularArithmetic | GroupOperations
HIDDEN, OUT = "hidden.weight", "out.weight"
DEGREE = 3
AT_ONCE = 16  # inputs, for memory
MONOMIALS = torch.tensor(  # row a, column k: the Bernstein coefficient a of t^k
    [[1, 0, 0, 0], [1, 1 / 3, 0, 0], [1, 2 / 3, 1 / 3, 0], [1, 1, 1, 1]], dtype=torch.double
)
LEFT = torch.tensor(  # from the coefficients on [0, 1] to those on [0, 1/2]
    [[1, 0, 0, 0], [1 / 2, 1 / 2, 0, 0], [1 / 4, 1 / 2, 1 / 4, 0], [1 / 8, 3 / 8, 3 / 8, 1 / 8]], dtype=torch.double
)
HALVES = torch.stack([LEFT, LEFT.flip(0, 1)])


@dataclass(frozen=True)
class Bounds:
    """Squared errors of every input, [N] each, over all masks in [0, 1].

    Attributes:
        corner: at the worst mask of zeros and ones.
        seen: at the worst mask that was met, a corner of some box; at least `corner`.
        bound: no mask is worse; after halving.
        first: the bound before halving.
        interval: a bound by interval arithmetic, for comparison: each output by itself, product of gates by product.
    """

    corner: Tensor
    seen: Tensor
    bound: Tensor
    first: Tensor
    interval: Tensor


def trilinear(target: Squares, components: apd.Components, x: Tensor) -> Tensor:
    """Compute what every three components give on every input, two that read and one that writes: [N, C, C, C, n_out].

    Args:
        target: two tokens and S switches; only the hidden and the output matrix are decomposed.
        components: C components.
        x: inputs [N, tokens + S].
    """
    return product(target, {path: components.matrices(path).detach() for path in (HIDDEN, OUT)}, x)


def product(target: Squares, parts: dict[str, Tensor], x: Tensor) -> Tensor:
    """Do the same for parts [C, d_in, d_out] of both matrices."""
    P, S = {path: part.double() for path, part in parts.items()}, len(target.opens)
    tokens, switches = x.double().split([x.shape[1] - S, S], 1)
    reads = torch.einsum("nd,cdh->nch", tokens @ target.embed.double(), P[HIDDEN])
    is_open = switches @ target.opens.double() if target.switches else torch.ones(1, reads.shape[2]).double()
    squares = reads[:, :, None] * reads[:, None] * is_open[:, None, None]
    return torch.einsum("ncdh,eho->ncdeo", squares, P[OUT])


def monomials(T: Tensor, needed: Tensor) -> tuple[Tensor, Tensor]:
    """Sum what comes with the same product of free gates: powers [K, F] and outputs [N, K, n_out].

    Args:
        T: as `trilinear` gives it.
        needed: whose gate is 1, bool [C]; the other F are free.
    """
    triples = torch.tensor(list(itertools.product(range(len(needed)), repeat=DEGREE)))
    powers = nn.functional.one_hot(triples, len(needed)).sum(1)[:, ~needed]
    digits = 4 ** torch.arange(powers.shape[1])
    products, place = (powers @ digits).unique(return_inverse=True)
    sizes = T.new_zeros(len(T), len(products), T.shape[-1]).index_add_(1, place, T.flatten(1, 3))
    return products[:, None] // digits % 4, sizes


def bernstein(powers: Tensor, sizes: Tensor) -> Tensor:
    """Give the outputs' Bernstein coefficients in the free gates: [N, 4^F, n_out], the last free gate runs first.

    Args:
        powers: of the free gates in every monomial [K, F].
        sizes: the monomials' outputs [N, K, n_out].
    """
    table = torch.ones(1, len(powers), dtype=torch.double)
    for power in powers.T:
        table = (table[:, None] * MONOMIALS[:, power]).flatten(0, 1)
    return table @ sizes


def by_intervals(powers: Tensor, sizes: Tensor, wanted: Tensor) -> Tensor:
    """Bound the squared error by interval arithmetic: every monomial is anywhere in [0, 1], [N].

    Args:
        powers: of the free gates in every monomial [K, F].
        sizes: the monomials' outputs [N, K, n_out].
        wanted: the right outputs [N, n_out].
    """
    fixed = powers.sum(1) == 0
    start, moves = sizes[:, fixed].sum(1) - wanted, sizes[:, ~fixed]
    ends = torch.stack([start + moves.clamp(max=0).sum(1), start + moves.clamp(min=0).sum(1)])
    return ends.square().amax(0).mean(1)


def vertices(n_free: int) -> Tensor:
    """List the coefficients at a box's corners, [2^F]."""
    places = torch.zeros(1, dtype=torch.long)
    for _ in range(n_free):
        places = (4 * places[:, None] + torch.tensor([0, DEGREE])).flatten()
    return places


def halve(coefficients: Tensor, axis: int, n_free: int) -> Tensor:
    """Cut boxes in two along one gate: [K, 4^F, n_out] -> [2 K, 4^F, n_out], the left halves first."""
    K, size, n_out = coefficients.shape
    cut = coefficients.reshape(K, 4**axis, 4, -1)
    return torch.einsum("hab,kpbr->hkpar", HALVES, cut).reshape(2 * K, size, n_out)


def of_one_pattern(T: Tensor, needed: Tensor, wanted: Tensor, factor: float, rounds: int) -> Bounds:
    """Bound the squared error of inputs that need the same components; see `bounds`."""
    n_free, at = int((~needed).sum()), vertices(int((~needed).sum()))
    powers, sizes = monomials(T, needed)
    boxes, own = bernstein(powers, sizes) - wanted[:, None], torch.arange(len(T))  # the input of every box
    errors = boxes.square().mean(2)
    corner, first = errors[:, at].amax(1), errors.amax(1)
    seen, settled = corner, torch.zeros_like(corner)
    for turn in range(rounds + 1):
        upper = errors.amax(1)
        seen = seen.scatter_reduce(0, own, errors[:, at].amax(1), "amax")
        open_ = (upper > factor * seen[own] + 1e-12) & (turn < rounds)
        settled = settled.scatter_reduce(0, own[~open_], upper[~open_], "amax")
        if not open_.any():
            break
        boxes, own = halve(boxes[open_], turn % n_free, n_free), own[open_].repeat(2)
        errors = boxes.square().mean(2)
    return Bounds(corner, seen, settled, first, by_intervals(powers, sizes, wanted))


@torch.no_grad()
def bounds(
    target: Squares, components: apd.Components, x: Tensor, needed: Tensor, factor: float = 1.02, rounds: int = 10
) -> Bounds:
    """Bound the mean squared error against the target's outputs over all masks in [0, 1] that leave on what is needed.

    Both matrices have the same gates. What is not bounded is the rounding of numbers in double precision.

    Args:
        target: a layer of squares.
        components: C components.
        x: inputs [N, ...].
        needed: whose gate is 1 on which input, bool [N, C].
        factor: a box is cut no further when its bound is below this times the worst mask seen on its input.
        rounds: cuts at most; each halves one gate of the boxes that are left.

    Returns:
        Bounds: corner <= seen <= the true worst error <= bound <= first <= interval, but for rounding.
    """
    whole = {path: w.detach()[None] for path, w in apd.Network(target, [HIDDEN, OUT]).weights.items()}
    wanted = product(target, whole, x)[:, 0, 0, 0]
    parts, order = [], []
    for pattern in needed.unique(dim=0):
        for rows in (needed == pattern).all(1).nonzero().flatten().split(AT_ONCE):
            T = trilinear(target, components, x[rows])
            parts.append(of_one_pattern(T, pattern, wanted[rows], factor, rounds))
            order.append(rows)
    back = torch.cat(order).argsort()
    return Bounds(*(torch.cat([getattr(part, f.name) for part in parts])[back] for f in fields(Bounds)))
