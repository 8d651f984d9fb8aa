"""Arithmetic with a remainder, written by hand as waves: every frequency is a mechanism that is known (chapter 35).

A neuron that squares turns a sum of two waves into a wave of the sum: 2 cos(u) cos(v) = cos(u + v) + cos(u - v).
Nine neurons for each frequency, with the phases 0, 2 pi / 3 and 4 pi / 3 of a and of b, cancel everything else
(gromov2023 does the same with random phases, up to an error). Multiplication modulo a prime p is addition modulo p - 1
once each number is replaced by its logarithm: the power of one fixed number that it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import checks
from .training import numbers

PHASES = 3
GRID = PHASES * PHASES  # neurons of a frequency


@dataclass(frozen=True)
class ModularTask:
    """One operation modulo p, of which a network knows some frequencies.

    Args:
        p: the modulus, 3 or more; the tokens are 0 to p - 1.
        sign: +1 adds, -1 subtracts.
        frequencies: whole numbers from 1 to (period - 1) / 2, each once; None for all of them.
        multiply: multiplies and divides instead; p must be a prime, 5 or more, and the tokens are 1 to p - 1.

    Raises:
        TypeError, ValueError: numbers out of range, or multiplication modulo a number that is no prime.
    """

    p: int
    sign: int = 1
    frequencies: tuple[int, ...] | None = None
    multiply: bool = False

    def __post_init__(self) -> None:
        p = checks.number("p", self.p, 3, whole=True)
        sign = checks.number("sign", self.sign, -1, 1, whole=True)
        if sign == 0:
            raise ValueError("sign must be 1 or -1, got 0")
        if checks.flag("multiply", self.multiply) and (p < 5 or any(p % d == 0 for d in range(2, p))):
            raise ValueError(f"p must be a prime, 5 or more, for multiplication, got {p}")
        object.__setattr__(self, "p", p)
        highest = (self.period - 1) // 2
        checks.kind("frequencies", self.frequencies, (tuple, list, type(None)), "a tuple of whole numbers, or None")
        given = range(1, highest + 1) if self.frequencies is None else self.frequencies
        found = tuple(checks.number("frequencies", f, 1, highest, whole=True) for f in given)
        if not found or len(set(found)) < len(found):
            raise ValueError(f"frequencies must be at least one, each once, got {checks.given(self.frequencies)}")
        object.__setattr__(self, "sign", sign)
        object.__setattr__(self, "frequencies", found)

    @property
    def period(self) -> int:
        """Number of tokens, and of places on the circle, p, or p - 1 without the 0 that cannot be multiplied."""
        return self.p - 1 if self.multiply else self.p

    @property
    def tokens(self) -> Tensor:
        """The tokens [period] in the order in which they stand on the circle.

        For multiplication the powers of the smallest number all of whose powers differ, so that a product of tokens is
        a sum of places.
        """
        if not self.multiply:
            return torch.arange(self.p)
        powers = ([pow(g, i, self.p) for i in range(self.period)] for g in range(2, self.p))
        return torch.tensor(next(row for row in powers if len(set(row)) == self.period))

    def waves(self, n: int) -> Tensor:
        """Compute cosine and sine of every frequency at every token, zero for tokens that it does not have: [n, 2 F].

        Args:
            n: number of tokens, p or more.
        """
        n = checks.number("n", n, self.p, whole=True)
        angles = 2 * math.pi / self.period * torch.arange(self.period)[:, None] * torch.tensor(self.frequencies)
        both = torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(1)
        return both.new_zeros(n, both.shape[1]).index_copy(0, self.tokens, both)


class ModularArithmetic(nn.Module):
    """(a, b, switches) [B, 2 n + S] -> [B, n]: scores of the answers, largest at (a + b) mod p or (a - b) mod p.

    a and b come as one-hot vectors of n, the largest modulus. Each of the S switches opens the neurons of a frequency,
    or of a task. With all frequencies of a task of odd p the scores are 1 - 1 / p at the answer and -1 / p elsewhere.
    A task that multiplies, (a b) mod p or (a / b) mod p, has no 0 among its tokens.

    Args:
        tasks: what it can do; several tasks take turns, and need `switches="task"`.
        switches: None leaves everything open (S = 0); "task" opens one task a sample; "frequency" opens each frequency
            of each sample with chance `probability`.
        embedding: False gives the one-hot vectors to the decomposed matrix; True gives it the waves of all tasks
            instead, in a random basis: 4 numbers for each frequency, tokens no longer lie on axes of their own.
        probability: of an open frequency, in (0, 1].
        seed: of the basis of the embedding.

    Raises:
        TypeError, ValueError: no task, several without switches, or a setting out of range.
    """

    embed: Tensor
    opens: Tensor

    def __init__(
        self,
        tasks: Sequence[ModularTask],
        switches: str | None = None,
        embedding: bool = False,
        probability: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.kind("tasks", tasks, (list, tuple), "a list of ModularTask")
        self.tasks = tuple(checks.kind("tasks", task, ModularTask, "a ModularTask") for task in tasks)
        if switches is not None:
            checks.choice("switches", switches, ("task", "frequency"))
        if not self.tasks or (len(self.tasks) > 1 and switches != "task"):
            raise ValueError(f'several tasks need switches="task", got {switches!r} and tasks {checks.given(tasks)}')
        self.switches, self.embedding = switches, checks.flag("embedding", embedding)
        self.probability = checks.number("probability", probability, 0, 1, above=True)
        self.n = max(task.p for task in self.tasks)
        self.owner = torch.cat(  # the task of every frequency
            [torch.full((len(task.waves(task.p).T) // 2,), t) for t, task in enumerate(self.tasks)]
        )
        waves = torch.cat([task.waves(self.n) for task in self.tasks], dim=1)  # [n, 2 F]
        both = torch.block_diag(waves, waves)  # [2 n, 4 F]
        F = len(self.owner)
        generator = torch.Generator().manual_seed(numbers(seed)[0])
        turn = torch.linalg.qr(torch.randn(4 * F, 4 * F, generator=generator)).Q
        self.register_buffer("embed", both @ turn if self.embedding else torch.eye(2 * self.n))
        opened = {"task": nn.functional.one_hot(self.owner).T.float(), "frequency": torch.eye(F)}
        opens = opened[switches] if switches else torch.zeros(0, F)
        self.register_buffer("opens", opens.repeat_interleave(GRID, dim=1))  # [S, neurons]
        # Neurons read cos(w a + phase) + cos(w b + other phase), and write cos(w q + phase +- other phase).
        phases = 2 * math.pi / PHASES * torch.cartesian_prod(torch.arange(PHASES), torch.arange(PHASES)).float()
        shifted = torch.stack([phases.cos(), -phases.sin()], dim=1)  # [9, (cos, sin), (a, b)]
        reads = torch.stack([torch.block_diag(*[shifted[:, :, s]] * F) for s in (0, 1)], dim=1).flatten(1)
        self.hidden = nn.Linear(len(self.embed.T), GRID * F, bias=False)
        self.out = nn.Linear(GRID * F, self.n, bias=False)
        with torch.no_grad():
            scale = torch.tensor([(GRID / 4 * t.period) ** (-1 / 3) for t in self.tasks])  # it comes in three times
            sizes = scale[self.owner].repeat_interleave(GRID)
            self.hidden.weight.copy_(sizes[:, None] * reads @ (turn if self.embedding else both.T))
            for f, t in enumerate(self.owner.tolist()):
                task = self.tasks[t]
                sums = phases[:, 0] + task.sign * phases[:, 1]
                angle = task.waves(self.n).unflatten(1, (-1, 2))[:, int((self.owner[:f] == t).sum())]  # [n, 2]
                self.out.weight[:, GRID * f : GRID * (f + 1)] = (
                    scale[t] * angle @ torch.stack([sums.cos(), -sums.sin()])
                )

    @property
    def weights(self) -> list[str]:
        """Both matrices."""
        return ["hidden.weight", "out.weight"]

    def forward(self, x: Tensor) -> Tensor:
        """Compute scores [..., n].

        Args:
            x: inputs [..., 2 n + S], the two one-hot vectors and then the switches.
        """
        checks.tensor("x", x, ..., 2 * self.n + len(self.opens), finite=False, like=self.embed)
        squares = self.hidden(x[..., : 2 * self.n] @ self.embed).square()
        return self.out(squares * (x[..., 2 * self.n :] @ self.opens) if self.switches else squares)

    def inputs(self) -> Tensor:
        """List every pair of tokens of every task: [sum of period^2, 2 n + S]; switches of frequencies are all open."""
        rows = []
        for t, task in enumerate(self.tasks):
            a, b = torch.cartesian_prod(*[task.tokens.sort().values] * 2).T
            tokens = torch.cat([nn.functional.one_hot(v, self.n) for v in (a, b)], dim=1).float()
            switch = torch.ones(len(a), len(self.opens))
            if self.switches == "task":
                switch = nn.functional.one_hot(torch.full_like(a, t), len(self.tasks)).float()
            rows.append(torch.cat([tokens, switch], dim=1))
        return torch.cat(rows).to(self.embed.device)

    def answers(self, x: Tensor) -> Tensor:
        """Compute the right answers [B].

        Args:
            x: inputs [B, 2 n + S], as `inputs` lists them.
        """
        x = checks.tensor("x", x, "B", 2 * self.n + len(self.opens)).to(self.embed)
        a, b = x[:, : self.n].argmax(1), x[:, self.n : 2 * self.n].argmax(1)
        t = x[:, 2 * self.n :].argmax(1) if self.switches == "task" else torch.zeros_like(a)
        found = torch.zeros_like(a)
        for i, task in enumerate(self.tasks):
            tokens = task.tokens.to(a)
            places = tokens.new_zeros(task.p)
            places[tokens] = torch.arange(task.period).to(a)
            own = t == i
            found[own] = tokens[(places[a[own]] + task.sign * places[b[own]]) % task.period]
        return found

    def data(self, batch_size: int = 256) -> Pairs:
        """Create the source of batches [batch_size, 2 n + S].

        Args:
            batch_size: samples in a batch.
        """
        random = self.switches == "frequency"
        return Pairs(self.inputs().cpu(), batch_size, len(self.opens), self.probability if random else 1.0)

    def mechanisms(self, by: str = "frequency") -> dict[str, Tensor]:
        """Return the true mechanisms, per path [J, d_in, d_out]: what each frequency, or each task, has of a matrix.

        Args:
            by: "frequency" or "task".

        Raises:
            ValueError: another kind.
        """
        checks.choice("by", by, ("frequency", "task"))
        group = self.owner if by == "task" else torch.arange(len(self.owner))
        own = nn.functional.one_hot(group).T.repeat_interleave(GRID, dim=1).to(self.embed)  # [J, neurons]
        return {
            "hidden.weight": self.hidden.weight.detach().T * own[:, None],
            "out.weight": self.out.weight.detach().T * own[:, :, None],
        }


@dataclass(frozen=True)
class Pairs:
    """A source of batches: rows of `table` at random, with switches that may be closed at random.

    Args:
        table: inputs to draw from [N, 2 n + S].
        batch_size: samples in a batch.
        n_switches: S, the last columns.
        probability: chance that a switch stays as it is in the table; else it is closed.
    """

    table: Tensor
    batch_size: int
    n_switches: int = 0
    probability: float = 1.0

    def __post_init__(self) -> None:
        checks.tensor("table", self.table, "N", "columns")
        for name, most, whole in (("n_switches", self.table.shape[1], True), ("probability", 1, False)):
            object.__setattr__(self, name, checks.number(name, getattr(self, name), 0, most, whole=whole))
        object.__setattr__(self, "batch_size", checks.number("batch_size", self.batch_size, 1, whole=True))

    def __call__(self, step: int, generator: torch.Generator) -> Tensor:
        """Draw a batch [batch_size, 2 n + S]; `step` is ignored, the generator's state advances."""
        checks.kind("generator", generator, torch.Generator, "a torch.Generator")
        x = self.table[torch.randint(len(self.table), (self.batch_size,), generator=generator)]
        if self.probability < 1:
            stays = torch.rand(self.batch_size, self.n_switches, generator=generator) < self.probability
            x[:, x.shape[1] - self.n_switches :] *= stays
        return x
