"""Products in a finite group, written by hand from its irreducible representations (chapter 37).

A representation turns the product of two elements into a product of two matrices, entry by entry a sum of products of
two numbers. A neuron that squares gives products: (x + y)^2 - (x - y)^2 = 4 x y. Over all irreducible representations
the traces d tr(rho(a) rho(b) rho(c)^T) add up to the order of the group at c = a b, and to 0 elsewhere.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import checks
from .modular import Pairs
from .training import numbers

DOUBLE = torch.double
KNOWN = "Z2 to Z120, D3 to D60, S3, S4, S5 or A4"


@dataclass(frozen=True)
class Certificate:
    """What follows for all products of a group from reading each element once on each side.

    Attributes:
        margin: least distance, over wrong answers, by which the symmetric part of the scores prefers the right one.
        residual: the other part's squared length, summed over all pairs and answers.
        wrong: so many pairs at most get another answer than the product.
        pairs: number of pairs.
    """

    margin: float
    residual: float
    wrong: int
    pairs: int

    @property
    def share(self) -> float:
        """Share of the pairs that are certainly right."""
        return 1 - self.wrong / self.pairs


class Group:
    """A finite group by its table, and its real irreducible representations without the trivial one.

    Args:
        name: "Z6" is the cyclic group of order 6, "D5" the ten symmetries of a pentagon, "S4" all orders of four
            things, "A4" the even ones; Z2 to Z120, D3 to D60, S3, S4, S5 and A4 are known.

    Attributes:
        name: as given.
        table: the product of elements g and h, [n, n]; element 0 is the neutral one.
        irreps: orthogonal matrices [n, d, d] in double precision, one tensor for each representation.

    Raises:
        TypeError, ValueError: another name.
    """

    def __init__(self, name: str) -> None:
        checks.kind("name", name, str, "the name of a group")
        found = re.fullmatch(r"([ZDSA])([1-9]\d{0,2})", name)
        kind, n = (found[1], int(found[2])) if found else ("", 0)
        if not {"Z": 2 <= n <= 120, "D": 3 <= n <= 60, "S": 3 <= n <= 5, "A": n == 4}.get(kind, False):
            raise ValueError(f"name must be one of the known groups ({KNOWN}), got {checks.given(name)}")
        self.name = name
        self.table, self.irreps = (_cyclic if kind == "Z" else _dihedral if kind == "D" else _permutations)(n, kind)

    @property
    def order(self) -> int:
        """Number of elements."""
        return len(self.table)

    @property
    def inverse(self) -> Tensor:
        """The inverse of every element [n]."""
        return (self.table == 0).nonzero()[:, 1]

    @property
    def weights(self) -> list[float]:
        """What each representation counts in the sum, its dimension, or half of it if it is two over the complex."""
        return [rho.shape[1] / round(_character(rho).square().mean().item()) for rho in self.irreps]

    def span(self, irreps: Sequence[int]) -> Tensor:
        """Write down orthonormal functions of the elements that span the entries of some representations.

        An irrep of dimension d has d times its weight of them: d^2, or half as many if it is two over the complex. All
        irreps together have n - 1, and span what sums to zero.

        Args:
            irreps: places in `Group.irreps`, one or more, each of them once.

        Returns:
            Tensor: [n, D] in double precision, irrep by irrep in the order given.

        Raises:
            TypeError, ValueError: no list of whole numbers, none, one twice, or one that has no irrep.
        """
        checks.kind("irreps", irreps, (list, tuple), "a list of places in Group.irreps")
        places = [checks.number("irreps", i, 0, len(self.irreps) - 1, whole=True) for i in irreps]
        if not places or len(set(places)) < len(places):
            raise ValueError(f"irreps must be some places in Group.irreps, each once, got {checks.given(irreps)}")
        columns, weights = [], self.weights
        for rho, weight in ((self.irreps[i], weights[i]) for i in places):
            rows = int(weight)  # of a rotation that is two representations over the complex, one row says all
            columns.append((rho.shape[1] / self.order) ** 0.5 * rho[:, :rows].flatten(1))
        return torch.cat(columns, 1)

    def certify(self, u: Tensor, v: Tensor, w: Tensor) -> Certificate:
        """Bound how many products scores[a, b, c] = sum_i (u[a, i] + v[b, i])^2 w[i, c] may get wrong, without a pair.

        The scores' symmetric part depends on (a b)^-1 c alone, and its margin holds for all pairs. The other part is
        orthogonal to it, and its squared length follows from inner products of neurons. A pair is wrong only if two of
        its scores differ from the symmetric part by the margin, which takes half the squared margin.

        Args:
            u: what the neurons read of the first element [n, neurons], in the group's order.
            v: of the second [n, neurons].
            w: what they write to the answers [neurons, n].

        Returns:
            Certificate: of all n^2 pairs.

        Raises:
            TypeError, ValueError: tensors of other shapes.
        """
        n = self.order
        for name, value, shape in (("u", u, (n, "neurons")), ("v", v, (n, "neurons")), ("w", w, ("neurons", n))):
            checks.tensor(name, value, *shape)
        if not u.shape[1] == v.shape[1] == len(w):
            raise ValueError(f"u, v and w must have the same neurons, got {u.shape[1]}, {v.shape[1]} and {len(w)}")
        u, v, w = (t.detach().cpu().to(DOUBLE) for t in (u, v, w))
        w = w - w.mean(1, keepdim=True)  # what all answers get decides nothing
        symmetric = torch.zeros(n, dtype=DOUBLE)  # scores of c = a b g, for each g
        for rho, weight in zip(self.irreps, self.weights, strict=True):
            read_a, read_b = (torch.einsum("gi,gjk->ijk", t, rho) for t in (u, v))
            written = torch.einsum("ig,gjk->ijk", w, rho)
            M = (written.mT @ read_a @ read_b).sum(0)
            symmetric += 2 * weight / n**3 * torch.einsum("jk,gkj->g", M, rho)
        # Inner products of (u + v)^2 over all pairs, neuron by neuron, from moments of u and of v.
        powers = [[(s[:, :, None] ** k * s[:, None] ** m).sum(0) for k, m in POWERS] for s in (u, v)]
        same = sum(
            math.comb(2, k) * math.comb(2, m) * powers[0][i] * powers[1][POWERS.index((2 - k, 2 - m))]
            for i, (k, m) in enumerate(POWERS)
        )
        total = float((same * (w @ w.T)).sum())
        residual = max(total - n * n * float(symmetric.square().sum()), 0.0)
        residual += 1e-12 * abs(total)  # more than rounding can have taken away
        margin = float(symmetric[0] - symmetric[1:].max())
        pairs = n * n
        wrong = min(int(2 * residual / margin**2), pairs) if margin > 0 else pairs
        return Certificate(margin, residual, wrong, pairs)


POWERS = list(itertools.product(range(3), repeat=2))


def _character(rho: Tensor) -> Tensor:
    return rho.diagonal(dim1=1, dim2=2).sum(1)


def _turns(angles: Tensor) -> Tensor:
    """Rotations by angles [n]: [n, 2, 2]."""
    c, s = angles.cos(), angles.sin()
    return torch.stack([torch.stack([c, -s], 1), torch.stack([s, c], 1)], 1)


def _sign(even: Tensor) -> Tensor:
    return torch.where(even, 1.0, -1.0).to(DOUBLE)[:, None, None]


def _cyclic(n: int, kind: str) -> tuple[Tensor, list[Tensor]]:
    r = torch.arange(n)
    irreps = [_turns(2 * math.pi * k / n * r.to(DOUBLE)) for k in range(1, (n + 1) // 2)]
    return (r[:, None] + r) % n, irreps + ([_sign(r % 2 == 0)] if n % 2 == 0 else [])


def _dihedral(n: int, kind: str) -> tuple[Tensor, list[Tensor]]:
    """Element r + n s turns by r steps, after it has turned over if s = 1."""
    s, r = torch.cartesian_prod(torch.arange(2), torch.arange(n)).T
    table = (r[:, None] + (1 - 2 * s[:, None]) * r) % n + n * ((s[:, None] + s) % 2)
    over = torch.eye(2, dtype=DOUBLE) * torch.stack([torch.ones(2 * n), 1.0 - 2 * s], 1).to(DOUBLE)[:, None]
    turns = [_turns(2 * math.pi * k / n * r.to(DOUBLE)) @ over for k in range(1, (n + 1) // 2)]
    signs = [s] if n % 2 else [s, r, r + s]
    return table, [*(_sign(t % 2 == 0) for t in signs), *turns]


def _standard(images: Tensor) -> Tensor:
    """Permutations [n, m] as matrices on the m - 1 dimensions beside the constant."""
    basis = spread(images.shape[1])
    return basis.T @ nn.functional.one_hot(images).to(DOUBLE).mT @ basis


def spread(m: int) -> Tensor:
    """Write down an orthonormal basis [m, m - 1] of what sums to zero; column k holds 1, ..., 1, -k, 0, ..., 0."""
    k = torch.arange(1, m, dtype=DOUBLE)
    place = torch.arange(m, dtype=DOUBLE)[:, None]
    return ((place < k).to(DOUBLE) - k * (place == k)) / (k * (k + 1)).sqrt()


def _permutations(m: int, kind: str) -> tuple[Tensor, list[Tensor]]:
    """Element g takes i to g[i]; first h and then g is g h."""
    every = torch.tensor(list(itertools.permutations(range(m))))
    first, second = torch.combinations(torch.arange(m)).T
    even = (every[:, first] > every[:, second]).sum(1) % 2 == 0
    if kind == "A":
        every, even = every[even], even[even]
    digits = m ** torch.arange(m - 1, -1, -1)
    table = torch.searchsorted(every @ digits, every[:, every] @ digits)
    three, sign = _standard(every), _sign(even)
    if m == 3:
        return table, [sign, three]
    inverse = (table == 0).nonzero()[:, 1]
    moved = _standard(_conjugated(table, inverse, even, 2 if m == 4 else 5))  # of three pairs of pairs, or six fives
    if kind == "A":
        return table, [moved, three]
    if m == 4:
        return table, [sign, moved, three, three * sign]
    i, j = torch.combinations(torch.arange(4)).T
    areas = three[:, i[:, None], i] * three[:, j[:, None], j] - three[:, i[:, None], j] * three[:, j[:, None], i]
    return table, [sign, three, three * sign, moved, moved * sign, areas]


def _conjugated(table: Tensor, inverse: Tensor, even: Tensor, order: int) -> Tensor:
    """How each g moves the subgroups {x, x^2, ...} of even x of a prime order to {g x g^-1, ...}: [n, places]."""

    def powers(x: int) -> tuple[int, ...]:
        found = [x]
        while found[-1] != 0:
            found.append(int(table[found[-1], x]))
        return tuple(sorted(found))

    own = {x: powers(x) for x in range(len(table)) if even[x]}
    places = sorted({p for p in own.values() if len(p) == order})
    moved = [[own[int(table[table[g, p[1]], inverse[g]])] for p in places] for g in range(len(table))]
    return torch.tensor([[places.index(p) for p in row] for row in moved])


class GroupOperations(nn.Module):
    """(a, b, switches) [B, 2 N + S] -> [B, N]: scores of the answers, 1 - 1 / n at the product and -1 / n elsewhere.

    n is the order of the group at work, whose tokens are drawn at random; a and b come as one-hot vectors of all N
    tokens. Several groups have tokens of their own, or, with `switches="group"`, share all of them, and one of S
    switches says which group multiplies.

    Args:
        groups: each by its name, or a `Group`.
        irreps: for each group, places in `Group.irreps` of those that the network has; None for all of them, as they
            are needed for the scores above.
        switches: None leaves everything open (S = 0), and each group has tokens of its own; "group" lets groups of the
            same order share tokens, and opens one group a sample; "irrep" opens each irreducible representation of a
            single group with chance `probability`.
        embedding: False gives the one-hot vectors to the decomposed matrix; True gives it, in a random basis, what the
            irreps are made of: functions of the tokens, orthonormal on either side, that span their entries. Where
            tokens are shared, these are all functions that sum to zero. Tokens then lie on no axes of their own.
        probability: of an open representation, in (0, 1].
        seed: of the tokens, the bases of the representations and that of the embedding.

    Raises:
        TypeError, ValueError: no group, groups that cannot share tokens, or a setting out of range.
    """

    embed: Tensor
    opens: Tensor

    def __init__(
        self,
        groups: Sequence[str | Group],
        irreps: Sequence[tuple[int, ...]] | None = None,
        switches: str | None = None,
        embedding: bool = True,
        probability: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.kind("groups", groups, (list, tuple), "a list of groups")
        for g in groups:
            checks.kind("groups", g, (str, Group), "names of groups, or Groups")
        self.groups = [g if isinstance(g, Group) else Group(g) for g in groups]
        if switches is not None:
            checks.choice("switches", switches, ("group", "irrep"))
        if not self.groups or (switches == "irrep" and len(self.groups) > 1):
            raise ValueError(f'groups must be at least one, and one with switches="irrep", got {len(self.groups)}')
        kept = [tuple(range(len(g.irreps))) for g in self.groups] if irreps is None else irreps
        checks.kind("irreps", kept, (list, tuple), "a list of tuples of places, one for each group, or None")
        fits = len(kept) == len(self.groups) and all(
            isinstance(own, tuple) and own and set(own) <= set(range(len(g.irreps))) and len(set(own)) == len(own)
            for g, own in zip(self.groups, kept, strict=True)
        )
        if not fits:
            raise ValueError(
                f"irreps must be a tuple of places in Group.irreps for each group, got {checks.given(irreps)}"
            )
        orders = [g.order for g in self.groups]
        if switches == "group" and len(set(orders)) > 1:
            raise ValueError(f"groups that share tokens must be of one order, got {orders}")
        self.switches, self.embedding = switches, checks.flag("embedding", embedding)
        self.probability = checks.number("probability", probability, 0, 1, above=True)
        generator = torch.Generator().manual_seed(numbers(seed)[0])
        vocabularies = orders[:1] if switches == "group" else orders
        self.n_tokens = N = sum(vocabularies)
        firsts = [0] * len(orders) if switches == "group" else [sum(orders[:t]) for t in range(len(orders))]
        # tokens[t][g] is the token of element g of group t
        self.tokens = [f + torch.randperm(n, generator=generator) for f, n in zip(firsts, orders, strict=True)]
        spans = (
            [spread(N)]
            if switches == "group"
            else [
                g.span(own)[tokens.argsort()]
                for g, own, tokens in zip(self.groups, kept, [t - t.min() for t in self.tokens], strict=True)
            ]
        )
        spreads = torch.block_diag(*spans * 2)  # [2 N, D], orthonormal columns
        turn = torch.linalg.qr(torch.randn(2 * [spreads.shape[1]], generator=generator, dtype=DOUBLE)).Q
        embed = spreads @ turn if self.embedding else torch.eye(2 * N, dtype=DOUBLE)
        reads, writes, owner = [], [], []
        group_of: list[int] = []
        for t, group in enumerate(self.groups):
            for place in kept[t]:
                rho, weight = group.irreps[place], group.weights[place]
                d = rho.shape[1]
                Q = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=DOUBLE)).Q
                i, j, k = torch.cartesian_prod(*[torch.arange(d)] * 3).T if d > 1 else torch.zeros(3, 1).long()
                own = torch.zeros(N, d, d, dtype=DOUBLE)
                own[self.tokens[t]] = Q.T @ rho @ Q
                scale = (weight / (4 * group.order)) ** (1 / 3)  # it comes in three times
                for sign in (1.0, -1.0):
                    reads.append(scale * torch.cat([own[:, i, j], sign * own[:, j, k]]))
                    writes.append(sign * scale * own[:, i, k])
                owner.append(torch.full((2 * d**3,), len(group_of)))
                group_of.append(t)
        self.owner, self.group_of = torch.cat(owner), torch.tensor(group_of)  # irrep of neurons, group of irreps
        self.register_buffer("embed", embed.float())
        opened = nn.functional.one_hot(self.group_of[self.owner] if switches == "group" else self.owner).T.float()
        self.register_buffer("opens", opened if switches else opened[:0])  # [S, neurons]
        self.hidden = nn.Linear(embed.shape[1], len(self.owner), bias=False)
        self.out = nn.Linear(len(self.owner), N, bias=False)
        with torch.no_grad():
            self.hidden.weight.copy_(torch.cat(reads, 1).T @ embed)
            self.out.weight.copy_(torch.cat(writes, 1))

    @property
    def weights(self) -> list[str]:
        """Both matrices."""
        return ["hidden.weight", "out.weight"]

    def forward(self, x: Tensor) -> Tensor:
        """Compute scores [..., N].

        Args:
            x: inputs [..., 2 N + S], the two one-hot vectors and then the switches.
        """
        tokens = 2 * self.n_tokens
        checks.tensor("x", x, ..., tokens + len(self.opens), finite=False, like=self.embed)
        squares = self.hidden(x[..., :tokens] @ self.embed).square()
        return self.out(squares * (x[..., tokens:] @ self.opens) if self.switches else squares)

    def inputs(self) -> Tensor:
        """List all pairs of elements, group by group: [sum of n^2, 2 N + S]; switches of representations are open."""
        rows = []
        for t, tokens in enumerate(self.tokens):
            pairs = torch.cartesian_prod(tokens, tokens)
            switch = torch.ones(len(pairs), len(self.opens))
            if self.switches == "group":
                switch[:] = torch.eye(len(self.groups))[t]
            rows.append(torch.cat([nn.functional.one_hot(pairs, self.n_tokens).flatten(1).float(), switch], 1))
        return torch.cat(rows).to(self.embed.device)

    def answers(self) -> Tensor:
        """List the right answers to all of `inputs`, as tokens: [sum of n^2]."""
        every = [tokens[g.table].flatten() for g, tokens in zip(self.groups, self.tokens, strict=True)]
        return torch.cat(every).to(self.embed.device)

    def data(self, batch_size: int = 256) -> Pairs:
        """Create the source of batches [batch_size, 2 N + S]: all pairs alike, so that larger groups come more often.

        Args:
            batch_size: samples in a batch.
        """
        random = self.switches == "irrep"
        return Pairs(self.inputs().cpu(), batch_size, len(self.opens), self.probability if random else 1.0)

    def mechanisms(self, by: str = "group") -> dict[str, Tensor]:
        """Return the true mechanisms, per path [J, d_in, d_out]: what each group, or irrep, has of a matrix.

        Args:
            by: "group" or "irrep".

        Raises:
            ValueError: another kind.
        """
        checks.choice("by", by, ("group", "irrep"))
        own = nn.functional.one_hot(self.group_of[self.owner] if by == "group" else self.owner).T.to(self.embed)
        return {
            "hidden.weight": self.hidden.weight.detach().T * own[:, None],
            "out.weight": self.out.weight.detach().T * own[:, :, None],
        }
