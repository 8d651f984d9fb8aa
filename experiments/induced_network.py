"""Two layers of attention that learn what the planted circuits of chapter 36 do: induction, the first letter, a table.

Tokens and questions are those of `targets.Induction`. Only the attention is trained. What goes in and what comes out is
fixed: every letter, the mark, the question and every position has a direction of its own in the stream, and so has
every answer, so that nothing is said unless a head writes it. A head may also look at nothing, at a fixed
score.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apd_minimal.targets.induction import CIRCUITS, Heads, Sequences
from apd_minimal.targets.training import train

LETTERS, POSITIONS = 8, 8
SILENT = 5.0  # the score of saying nothing, beside the letters'
NOTHING = 3.0  # the score of looking at nothing
FREE = 8  # dimensions of the stream, if nothing else is said


class TwoLayers(nn.Module):
    """Tokens [B, T] to logits [B, T, n + 1]: a letter, or nothing.

    Args:
        seed: of the table.
        n_heads: of each layer.
        packed: letters and answers are corners of a cube, 8 in 3 dimensions; else each has a direction of its own.
        free: dimensions of the stream that nothing goes into and nothing is read from.
    """

    table: Tensor
    embed: Tensor
    places: Tensor
    unembed: Tensor

    def __init__(self, seed: int, n_heads: int = 2, packed: bool = False, free: int = FREE) -> None:
        super().__init__()
        n, T = LETTERS, POSITIONS
        codes = corners()
        width = codes.shape[1] if packed else n
        d = 2 * width + 2 + T + free
        generator = torch.Generator().manual_seed(seed + 3_000_000_019)
        turn = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
        letters, marks, places, answers, _ = turn.split([width, 2, T, width, free])
        if packed:
            letters, answers = codes @ letters, codes @ answers
        self.register_buffer("table", torch.randperm(n, generator=generator))
        self.register_buffer("embed", torch.cat([letters, letters + marks[:1], marks[1:]]))
        self.register_buffer("places", places)
        self.register_buffer("unembed", answers.T)
        self.blocks = nn.ModuleList(Heads(d, d // n_heads, [NOTHING] * n_heads) for _ in range(2))

    def stream(self, x: Tensor) -> Tensor:
        """Embed tokens: [B, T, d]."""
        return self.embed[x] + self.places

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, T] to logits [B, T, n + 1]."""
        stream = self.stream(x)
        for block in self.blocks:
            stream = block(stream)
        said = stream @ self.unembed
        return torch.cat([said, said.new_full((*said.shape[:-1], 1), SILENT)], -1)

    @property
    def weights(self) -> list[str]:
        """The parameter paths to decompose: all that is trained."""
        return [f"blocks.{i}.{part}.weight" for i in range(2) for part in "qkvo"]

    def data(self, batch_size: int = 256, probability: float = 1 / 3) -> Sequences:
        """Create the source of batches [batch_size, T]."""
        return Sequences(LETTERS, POSITIONS, CIRCUITS, probability, batch_size)

    def asked(self, x: Tensor) -> Tensor:
        """Say which task is asked where: [B, T], 0 to 2 in the order of `CIRCUITS`, or 3 for none."""
        n = LETTERS
        task = torch.full_like(x, 3)
        task[repeats(x).any(-1)] = 0
        task[x == 2 * n] = 1
        task[(x >= n) & (x < 2 * n)] = 2
        return task

    def says(self, x: Tensor) -> Tensor:
        """Say which task asks for which letter where, boolean [B, T, 3, n]: none where it is not asked."""
        letter = F.one_hot(self.answers(x), LETTERS + 1)[..., None, :LETTERS].bool()
        return letter & (self.asked(x)[..., None, None] == torch.arange(len(CIRCUITS))[:, None])

    def answers(self, x: Tensor) -> Tensor:
        """Compute the right answers [B, T]: a letter, or n for nothing; where a letter is marked, its entry."""
        n = LETTERS
        letter = x % n
        follows = repeats(x).float().argmax(-1) + 1
        said = [letter.gather(1, follows.clamp_max(POSITIONS - 1)), letter[:, :1].expand_as(x), self.table[letter]]
        said.append(torch.full_like(x, n))
        return torch.stack(said, -1).gather(-1, self.asked(x)[..., None])[..., 0]

    def fit(self, seed: int, steps: int = 2500, batch_size: int = 96, wrong: bool = False) -> TwoLayers:
        """Train the attention to give the answers.

        At first all sequences have every letter twice (`twice`), then ever fewer: among faster ones, the task that
        needs both layers takes long to learn.

        Args:
            seed: of initial weights and batches.
            steps: of AdamW.
            batch_size: sequences in a batch.
            wrong: one batch all the time, with answers drawn at random, which can only be learned by heart.
        """
        generator = torch.Generator().manual_seed(seed)
        self.start(generator)
        optimiser = torch.optim.AdamW(self.parameters(), lr=5e-3, weight_decay=0.3, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, 5e-3, total_steps=steps + 1, pct_start=0.1, cycle_momentum=False
        )
        source = self.data(batch_size)
        fixed = source(0, generator)
        right = self.answers(fixed)
        by_heart = torch.where(right < LETTERS, torch.randint(LETTERS, right.shape, generator=generator), right)

        def loss(step: int) -> Tensor:
            if wrong:
                x, answers = fixed, by_heart
            else:
                m = max(0, round(batch_size * (1 - step / (0.8 * steps))))
                x = torch.cat([twice(m, generator), source(step, generator)[m:]])
                answers = self.answers(x)
            return F.cross_entropy(self(x).flatten(0, 1), answers.flatten())

        train(optimiser, schedule, steps, loss)
        return self

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> TwoLayers:
        """Draw the weights with which training starts."""
        for p in self.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5)
        return self

    @torch.no_grad()
    def patterns(self, x: Tensor) -> Tensor:
        """Compute where all heads look: [B, 2, H, T, T]."""
        stream = self.stream(x)
        first, second = self.blocks
        return torch.stack([first.patterns(stream), second.patterns(first(stream))], 1)  # type: ignore[operator]


def corners(bits: int = 3) -> Tensor:
    """Give the corners of a cube, [2^bits, bits], of length 1."""
    return (1.0 - 2 * (torch.arange(2**bits)[:, None] // 2 ** torch.arange(bits) % 2)) * bits**-0.5


def repeats(x: Tensor) -> Tensor:
    """Say at which earlier positions the letter of a position is: [B, T, T]; marks do not count, questions are none."""
    letter, is_letter = x % LETTERS, x < 2 * LETTERS
    same = (letter[:, :, None] == letter[:, None]) & is_letter[:, :, None] & is_letter[:, None]
    return same.tril(-1)


def twice(n: int, generator: torch.Generator) -> Tensor:
    """Draw sequences [n, T] of T / 2 letters in one order and then in another."""
    once = torch.rand(n, LETTERS, generator=generator).argsort(1)[:, : POSITIONS // 2]
    return torch.cat([once, once.gather(1, torch.rand(once.shape, generator=generator).argsort(1))], 1)
