"""Induction written by hand in a network of attention alone, beside two other circuits in its weights (chapter 36).

Letters are the corners of a cube, so that they have fewer dimensions than there are letters. A head compares what it
looks for with what is there by a dot product, and may also look at nothing: each head has a fixed score for that, and
attends nowhere unless some other score is above it. So a circuit that is switched off does next to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import checks
from .training import TOKEN_TYPES, numbers

CIRCUITS = ("induction", "first", "table")
ROLES = ("induction: sender", "induction: link", "induction: asker", "first: sender", "first: asker", "table")
CIRCUIT_OF = (0, 0, 0, 1, 1, 2)  # the circuit of each role
# Whose each matrix of each head is, as an index of ROLES: the sender is looked at, the asker looks.
OWNERS: dict[tuple[int, int], dict[str, int]] = {
    (0, 0): {"q": 1, "k": 0, "v": 0, "o": 1},  # previous token
    (0, 1): {"q": 5, "k": 5, "v": 5, "o": 5},  # table
    (1, 0): {"q": 2, "k": 1, "v": 1, "o": 2},  # induction
    (1, 1): {"q": 4, "k": 3, "v": 3, "o": 4},  # first
}


class Heads(nn.Module):
    """Causal attention, added to the stream [B, T, d]; each head may also look at nothing, at a fixed score.

    Args:
        d: width of the stream.
        e: width of a head.
        nothing: score of looking at nothing, for each head.
    """

    nothing: Tensor

    def __init__(self, d: int, e: int, nothing: Sequence[float]) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(d, len(nothing) * e, bias=False) for _ in range(3))
        self.o = nn.Linear(len(nothing) * e, d, bias=False)
        self.register_buffer("nothing", torch.tensor(nothing)[:, None, None])

    def _heads(self, layer: nn.Linear, stream: Tensor) -> Tensor:
        return layer(stream).unflatten(-1, (len(self.nothing), -1)).movedim(-2, -3)  # [..., H, T, e]

    def patterns(self, stream: Tensor) -> Tensor:
        """Compute how much each position looks at each, [..., H, T, T]; what is missing to 1 looks at nothing.

        Args:
            stream: that the layer reads, [..., T, d].
        """
        T = stream.shape[-2]
        later = torch.ones(T, T, dtype=torch.bool, device=stream.device).triu(1)
        scores = (self._heads(self.q, stream) @ self._heads(self.k, stream).mT).masked_fill(later, -math.inf)
        nothing = self.nothing.to(scores).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, nothing], dim=-1).softmax(-1)[..., :-1]

    def forward(self, stream: Tensor) -> Tensor:
        """Map the stream to the stream after this layer, [..., T, d].

        Args:
            stream: that the layer reads, [..., T, d].
        """
        mixed = self.patterns(stream) @ self._heads(self.v, stream)  # [..., H, T, e]
        return stream + self.o(mixed.movedim(-3, -2).flatten(-2))


class Induction(nn.Module):
    """Tokens [B, T] -> answers [B, T, b]: the sum of what three circuits say at each position, each a letter's corner.

    There are n = 2^b letters, each a corner of a cube: b numbers of +1 or -1. Tokens 0 to n - 1 are the letters, n to
    2 n - 1 the same letters *marked*, and 2 n is the question "?". The circuits:

    - "induction": at a letter that came before, what followed it then. Two heads: the first writes to every position
      the letter before it, the second looks for the position where that is the letter at hand, and copies from there.
    - "first": at a "?", the first letter. One head, in the second layer.
    - "table": at a marked letter, its entry in a table: a turn of the cube, with axes swapped and flipped. One head, in
      the first layer.

    In the stream of d = 3 b + 6 dimensions, letter, letter before, answer, mark, question and position (two clocks)
    have directions of their own, all turned at random, and so have the insides of each head.

    Args:
        circuits: which of the three are there; the weights of the others are zero.
        positions: T, 7 or more, and at most n.
        bits: b, 3 or more.
        probability: that a circuit is asked in a sequence of `data`, in (0, 1].
        gap: by which a score for the right place is above that for nothing; those for wrong ones are 2 gap below it.
        seed: of the turns and the table.
        lean: no query or key of more rank than its head needs: positions are one clock, so that there are 3 b + 4
            dimensions, and the head of the table looks for a mark, and no more for the same letter.

    Raises:
        TypeError, ValueError: no circuit, an unknown one, or a number out of range.
    """

    corners: Tensor
    table: Tensor
    embed: Tensor
    places: Tensor
    unembed: Tensor

    def __init__(
        self,
        circuits: Sequence[str] = CIRCUITS,
        positions: int = 8,
        bits: int = 3,
        probability: float = 1 / 3,
        gap: float = 5.0,
        seed: int = 0,
        lean: bool = False,
    ) -> None:
        super().__init__()
        n_clocks = 1 if checks.flag("lean", lean) else 2
        b = int(checks.number("bits", bits, 3, 10, whole=True))
        source = Sequences(2**b, positions, tuple(checks.kind("circuits", circuits, (tuple, list), "names")))
        self.circuits, self.positions = source.circuits, source.positions
        self.probability = checks.number("probability", probability, 0, 1, above=True)
        gap, T = checks.number("gap", gap, 0, above=True), self.positions
        generator = torch.Generator().manual_seed(numbers(seed)[0])
        d, e = 3 * b + 2 + 2 * n_clocks, b - 1 + n_clocks
        directions = torch.eye(d).split([b, b, b, 1, 1, 2 * n_clocks])  # of the stream
        letter, before, answer, mark, asks, place = directions
        turn = _turn(d, generator)
        corners = 1.0 - 2 * (torch.arange(2**b)[:, None] // 2 ** torch.arange(b) % 2)  # [n, b]
        flips = 1.0 - 2 * torch.randint(2, (b,), generator=generator)
        table = flips.diag()[torch.randperm(b, generator=generator)]
        angles = 2 * math.pi / T * torch.arange(T)[:, None] * torch.tensor([1.0, 2.0])[:n_clocks]
        clocks = torch.stack([angles.cos(), angles.sin()], -1).flatten(1)  # [T, 2 n_clocks], of length 1 for each
        back = torch.linalg.pinv(clocks) @ clocks.roll(1, 0)  # turns all clocks back by one position
        self.register_buffer("corners", corners)
        self.register_buffer("table", table)
        self.register_buffer("embed", torch.cat([corners @ letter, corners @ letter + mark, asks]) @ turn)
        self.register_buffer("places", clocks @ place @ turn)
        self.register_buffer("unembed", (answer @ turn).T)

        # What the heads read and write. Their scores for the right place are a gap above nothing, those for wrong ones
        # two below: what is looked at has a gradient of about e^-gap, and what is not one of e^-2gap.
        near = n_clocks - float((clocks[1:] @ clocks[0]).max())  # two positions differ by at least so much
        sharp = 3 * gap / near
        into = torch.eye(e)
        code, one = letter.T @ into[:b], into[-1:]  # the letter into a head's first b dimensions; a dimension for flags
        flag, hand = mark.T @ one, into[: 2 * n_clocks]
        both = code + math.sqrt(2) * flag
        heads = {  # factor of the scores, q, k, what is written, nothing
            # sharp for each clock at the position before; at others 3 gap less
            (0, 0): (sharp, place.T @ back @ hand, place.T @ hand, before, n_clocks * sharp - gap),
            # lean: 3 gap if both are marked, else 0
            # otherwise 1.5 gap (b + 2) at the same letter if both are marked; else, or at others, 3 gap less
            (0, 1): (3 * gap, flag, flag, table @ answer, 2 * gap)
            if lean
            else (1.5 * gap, both, both, table @ answer, (1.5 * b + 2) * gap),
            # 1.5 gap b where the letter before is this one; at others 3 gap less
            (1, 0): (1.5 * gap, code, before.T @ into[:b], answer, (1.5 * b - 1) * gap),
            # sharp for each clock at the first position; at others 3 gap less
            (1, 1): (sharp, asks.T @ one, place.T @ clocks[:1].T @ one, answer, n_clocks * sharp - gap),
        }
        self.blocks = nn.ModuleList(Heads(d, e, [heads[i, h][-1] for h in (0, 1)]) for i in (0, 1))
        with torch.no_grad():
            for (i, h), (scale, q, k, writes, _) in heads.items():
                owned = CIRCUITS[CIRCUIT_OF[OWNERS[i, h]["o"]]] in self.circuits
                turns, own = [_turn(e, generator) for _ in "qv"], slice(h * e, (h + 1) * e)
                root = math.sqrt(scale)
                reads = {"q": root * q @ turns[0], "k": root * k @ turns[0], "v": code @ turns[1]}
                for name, matrix in reads.items():
                    getattr(self.layers[i], name).weight[own] = owned * (turn.T @ matrix).T
                self.layers[i].o.weight[:, own] = owned * (turns[1].T @ into[:b].T @ writes @ turn).T

    @property
    def layers(self) -> list[Heads]:
        """Both layers of heads."""
        return list(self.blocks)  # type: ignore[arg-type]

    @property
    def weights(self) -> list[str]:
        """The parameter paths to decompose, those of queries, keys, values and outputs of both layers."""
        return [f"blocks.{i}.{part}.weight" for i in (0, 1) for part in "qkvo"]

    def _embedded(self, x: Tensor) -> Tensor:
        return self.embed[self._tokens(x)] + self.places

    def _tokens(self, x: Tensor) -> Tensor:
        checks.tensor("x", x, ..., self.positions, finite=False)
        if x.dtype not in TOKEN_TYPES or (x.numel() and not 0 <= int(x.min()) <= int(x.max()) <= 2 * len(self.corners)):
            raise ValueError(f"x must be whole numbers from 0 to {2 * len(self.corners)}, got {checks.given(x)}")
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Compute the answers [..., T, b].

        Args:
            x: tokens [..., T].

        Raises:
            TypeError, ValueError: no tokens, or of another shape.
        """
        stream = self._embedded(x)
        for block in self.blocks:
            stream = block(stream)
        return stream @ self.unembed

    @torch.no_grad()
    def patterns(self, x: Tensor) -> Tensor:
        """Compute where the heads look: [..., 4, T, T], those of the first layer (before, table), then of the second.

        Args:
            x: tokens [..., T].
        """
        stream = self._embedded(x)
        first, second = self.layers
        return torch.cat([first.patterns(stream), second.patterns(first(stream))], dim=-3)

    def says(self, x: Tensor) -> Tensor:
        """Compute what each circuit has to say by definition: [B, T, 3, b], zero where it is not asked, or not there.

        Args:
            x: tokens [B, T].
        """
        n = len(self.corners)
        x = checks.tensor("x", self._tokens(x), "B", self.positions)
        code = torch.cat([self.corners, self.corners, self.corners.new_zeros(1, len(self.table))])[x]  # [B, T, b]
        matches = self._matches(x).to(code)  # [B, T, T]
        follows = torch.cat([code[:, 1:], code[:, :1]], 1)  # the last one is never followed
        found = matches @ follows / matches.sum(-1, keepdim=True).clamp_min(1)
        first = (x == 2 * n)[..., None] * code[:, :1]
        marked = ((x >= n) & (x < 2 * n))[..., None] * (code @ self.table)
        there = torch.tensor([name in self.circuits for name in CIRCUITS]).to(code)
        return torch.stack([found, first, marked], 2) * there[:, None]

    def answers(self, x: Tensor) -> Tensor:
        """Compute what the network should say by definition: [B, T, b], the sum over circuits.

        Args:
            x: tokens [B, T].
        """
        return self.says(x).sum(2)

    def _matches(self, x: Tensor) -> Tensor:
        """Say at which earlier positions the letter of a position is: [B, T, T]."""
        n = len(self.corners)
        same = (x[:, :, None] % n == x[:, None] % n) & (x < 2 * n)[:, :, None] & (x < 2 * n)[:, None]
        return same.tril(-1)

    def uses(self, x: Tensor) -> Tensor:
        """Say which role is needed where, by definition: boolean [B, T, 6], in the order of `ROLES`.

        Args:
            x: tokens [B, T].
        """
        n = len(self.corners)
        x = checks.tensor("x", self._tokens(x), "B", self.positions)
        matches = self._matches(x)
        sender, asks, marked = matches.any(1), x == 2 * n, (x >= n) & (x < 2 * n)
        first = torch.zeros_like(asks)
        first[:, 0] = asks.any(1)
        link = torch.cat([torch.zeros_like(asks[:, :1]), sender[:, :-1]], 1)
        found = torch.stack([sender, link, matches.any(2), first, asks, marked], -1)
        there = torch.tensor([CIRCUITS[c] in self.circuits for c in CIRCUIT_OF], device=x.device)
        return found & there

    def data(self, batch_size: int = 256) -> Sequences:
        """Create the source of batches [batch_size, T].

        Args:
            batch_size: sequences in a batch.
        """
        return Sequences(len(self.corners), self.positions, self.circuits, self.probability, batch_size)

    def mechanisms(self, by: str = "circuit") -> dict[str, Tensor]:
        """Return the true mechanisms, per path [J, d_in, d_out], of the circuits that are there.

        Args:
            by: "circuit" for whole circuits; "role" for what of a circuit is needed at the same positions: the sender,
                which is looked at; of induction the link, which looks at the sender and is looked at; the asker.

        Raises:
            ValueError: another kind.
        """
        checks.choice("by", by, ("circuit", "role"))
        groups = CIRCUIT_OF if by == "circuit" else tuple(range(len(ROLES)))
        kept = sorted({groups[r] for r, c in enumerate(CIRCUIT_OF) if CIRCUITS[c] in self.circuits})
        truth = {}
        for i, block in enumerate(self.blocks):
            for part in "qkvo":
                whole = getattr(block, part).weight.detach().T
                own = whole.new_zeros(len(kept), *whole.shape)
                for h in (0, 1):
                    if (j := groups[OWNERS[i, h][part]]) in kept:
                        axis = 0 if part == "o" else 1
                        e = whole.shape[axis] // 2
                        index = torch.arange(h * e, (h + 1) * e, device=whole.device)
                        own[kept.index(j)].index_copy_(axis, index, whole.index_select(axis, index))
                truth[f"blocks.{i}.{part}.weight"] = own
        return truth


def _turn(n: int, generator: torch.Generator) -> Tensor:
    """Draw an orthogonal matrix [n, n]."""
    return torch.linalg.qr(torch.randn(n, n, generator=generator)).Q


@dataclass(frozen=True)
class Sequences:
    """A source of batches [batch_size, T] of letters, all different but for what the circuits are asked.

    Each circuit is asked with its own chance, at a position of its own: for induction a letter is repeated two or more
    positions later, for "first" a "?" takes a letter's place, for "table" a letter is marked. The first letter is never
    asked anything, nor does a question come between a letter that is repeated and the next.

    Args:
        n_letters: n.
        positions: T, from 7 to n.
        circuits: that may be asked.
        probability: chance that a circuit is asked in a sequence.
        batch_size: sequences in a batch.

    Raises:
        TypeError, ValueError: no circuit, an unknown one, or a number out of range.
    """

    n_letters: int = 8
    positions: int = 8
    circuits: tuple[str, ...] = CIRCUITS
    probability: float = 1 / 3
    batch_size: int = 256

    def __post_init__(self) -> None:
        for name, least in (("n_letters", 7), ("batch_size", 1)):
            object.__setattr__(self, name, checks.number(name, getattr(self, name), least, whole=True))
        T = checks.number("positions", self.positions, 7, self.n_letters, whole=True)
        checks.kind("circuits", self.circuits, (tuple, list), "a tuple of names")
        given = tuple(checks.choice("circuits", name, CIRCUITS) for name in self.circuits)
        if not given or len(set(given)) < len(given):
            raise ValueError(f"circuits must be at least one, each once, got {checks.given(self.circuits)}")
        object.__setattr__(self, "positions", T)
        object.__setattr__(self, "circuits", given)
        object.__setattr__(self, "probability", checks.number("probability", self.probability, 0, 1, above=True))

    def __call__(self, step: int, generator: torch.Generator) -> Tensor:
        """Draw a batch [batch_size, T]; `step` is ignored, the generator's state advances."""
        checks.kind("generator", generator, torch.Generator, "a torch.Generator")
        B, T, n = self.batch_size, self.positions, self.n_letters
        rows = torch.arange(B)
        x = torch.rand(B, n, generator=generator).argsort(1)[:, :T]
        pairs = torch.tensor([(s, t) for t in range(T) for s in range(t - 1)])  # a letter, and where it is repeated
        s, t = pairs[torch.randint(len(pairs), (B,), generator=generator)].T
        free = torch.rand(B, T, generator=generator)
        free[:, 0] = -1
        for used in (s, s + 1, t):
            free[rows, used] = -1
        asks, marked = free.topk(2, dim=1).indices.T
        on = torch.rand(B, len(CIRCUITS), generator=generator) < self.probability
        on &= torch.tensor([name in self.circuits for name in CIRCUITS])
        x[rows, t] = torch.where(on[:, 0], x[rows, s], x[rows, t])
        x[rows, asks] = torch.where(on[:, 1], torch.full_like(asks, 2 * n), x[rows, asks])
        x[rows, marked] = torch.where(on[:, 2], x[rows, marked] + n, x[rows, marked])
        return x
