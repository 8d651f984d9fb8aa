"""A text that Python ships, as windows of characters, and a small transformer that learns to go on with them."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apd_minimal.targets.transformer import Block
from experiments.experiment import DATA

FILE = "python_topics.txt"
LETTERS = " abcdefghijklmnopqrstuvwxyz',."
WINDOW, SIZE = 16, 200_000  # characters of a window, and of the text that is kept
HELD_OUT = 10  # every tenth stretch of a thousand characters is never trained on


def made() -> str:
    """Make the text from the language reference that Python ships (`pydoc_data`), for the file in data/."""
    from pydoc_data.topics import topics

    text = re.sub("[^a-z',. ]+", " ", " ".join(topics[name] for name in sorted(topics)).lower())
    return re.sub(" +", " ", text)[:SIZE]


@cache
def tokens(path: Path = DATA / FILE) -> Tensor:
    """Read the stored text as indices into `LETTERS`: [SIZE]."""
    return torch.tensor([LETTERS.index(c) for c in path.read_text()])


@cache
def places(held_out: bool) -> Tensor:
    """List where windows and the character after them may begin, so that none has characters of both parts."""
    first = torch.arange(SIZE - WINDOW)
    part, last = first // 1000, (first + WINDOW) // 1000
    return first[(part == last) & ((part % HELD_OUT == 0) == held_out)]


def windows(n: int, generator: torch.Generator, held_out: bool = False) -> Tensor:
    """Draw windows of the text, each with the character after it.

    Args:
        n: how many.
        generator: source of randomness.
        held_out: draw them from the part that is never trained on.

    Returns:
        Tensor: [n, WINDOW + 1].
    """
    where = places(held_out)
    first = where[torch.randint(len(where), (n,), generator=generator)]
    return tokens()[first[:, None] + torch.arange(WINDOW + 1)]


def words(x: Tensor) -> list[str]:
    """Spell windows [n, WINDOW]."""
    return ["".join(LETTERS[i] for i in line) for line in x.tolist()]


class Writer(nn.Module):
    """One layer of attention and one of neurons: characters [B, WINDOW] to logits of the next one, [B, T, 30].

    Args:
        seed: of the first weights.
    """

    weights = tuple(f"block.{part}.weight" for part in ("q", "k", "v", "o", "up", "down"))

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        d = 32
        self.embed, self.position = nn.Embedding(len(LETTERS), d), nn.Parameter(0.1 * torch.randn(WINDOW, d))
        self.block = Block(d, n_heads=2, neurons=64)
        self.unembed = nn.Linear(d, len(LETTERS))

    def forward(self, x: Tensor) -> Tensor:
        """Give the logits at every position."""
        logits: Tensor = self.unembed(self.block(self.embed(x) + self.position))
        return logits

    def fit(self, seed: int, steps: int = 3000) -> Writer:
        """Train by Adam on the cross-entropy of every position's next character."""
        generator = torch.Generator().manual_seed(seed)
        optimiser = torch.optim.AdamW(self.parameters(), lr=5e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, total_steps=steps, cycle_momentum=False)
        for _ in range(steps):
            x = windows(128, generator)
            loss = F.cross_entropy(self(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        return self.requires_grad_(False)


@cache
def table(characters: int) -> Tensor:
    """Count what follows so many characters in the trained part, and give its shares, smoothed: [30, ..., 30]."""
    n, text = len(LETTERS), tokens()
    first = torch.arange(SIZE - characters)
    first = first[first // 1000 % HELD_OUT != 0]
    index = sum(text[first + i] * n ** (characters - i) for i in range(characters + 1))
    counts = torch.as_tensor(index).bincount(minlength=n ** (characters + 1)).reshape([n] * (characters + 1))
    return (counts + 0.1) / (counts + 0.1).sum(-1, keepdim=True)


def table_loss(x: Tensor, characters: int) -> float:
    """Give the mean loss, in nats, of a table of what follows so many characters, on windows [n, WINDOW + 1]."""
    chance = table(characters)[tuple(x[:, -1 - characters : -1].T)] if characters else table(0).expand(len(x), -1)
    return float(-chance.gather(1, x[:, -1:]).log().mean())
