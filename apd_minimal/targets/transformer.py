"""A small transformer that answers six kinds of questions about eight letters (chapter 23)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .. import checks
from ..attributions import gradient
from ..components import Components
from ..network import Network
from .training import TOKEN_TYPES, numbers, train

TASKS = ("first", "last but one", "after", "fact", "other fact", "largest")
LETTERS = 8  # in a question


@dataclass(frozen=True)
class Questions:
    """A source of batches [batch_size, 9]: the token of a task, then eight letters 0 to n_letters - 1.

    The first seven letters are all different. The eighth repeats one of the second to the sixth, so that every task can
    be asked of every row: only the first token determines the task.

    Args:
        n_letters: size of the alphabet, at least 7; the token of task i is n_letters + i.
        batch_size: rows in a batch.
        tasks: indices of the tasks, drawn uniformly.

    Raises:
        ValueError: too few letters, an empty batch, no task or an unknown one.
    """

    n_letters: int = 24
    batch_size: int = 128
    tasks: tuple[int, ...] = tuple(range(len(TASKS)))

    def __post_init__(self) -> None:
        for name, least in (("n_letters", LETTERS - 1), ("batch_size", 1)):
            object.__setattr__(self, name, checks.number(name, getattr(self, name), least, whole=True))
        if not isinstance(self.tasks, (tuple, list)) or not self.tasks:
            raise ValueError(f"tasks must be some of 0 to {len(TASKS) - 1}, got {checks.given(self.tasks)}")
        name = f"tasks must be some of 0 to {len(TASKS) - 1}, got {checks.given(self.tasks)}: a task"
        tasks = tuple(checks.number(name, task, 0, len(TASKS) - 1, whole=True) for task in self.tasks)
        object.__setattr__(self, "tasks", tasks)

    def __call__(self, step: int, generator: torch.Generator) -> Tensor:
        """Draw a batch [batch_size, 9]; `step` is ignored, the generator's state advances."""
        checks.kind("generator", generator, torch.Generator, "a torch.Generator")
        n = self.batch_size
        letters = torch.rand(n, self.n_letters, generator=generator).argsort(1)[:, : LETTERS - 1]
        repeated = torch.randint(1, LETTERS - 2, (n, 1), generator=generator)
        task = torch.tensor(self.tasks)[torch.randint(len(self.tasks), (n, 1), generator=generator)]
        return torch.cat([self.n_letters + task, letters, letters.gather(1, repeated)], dim=1)


class Block(nn.Module):
    """Causal attention and an MLP, each added to the residual stream [B, T, d]; no biases, no LayerNorm.

    Args:
        d: width of the residual stream.
        n_heads: attention heads, a divisor of d.
        neurons: of the MLP.
    """

    def __init__(self, d: int, n_heads: int, neurons: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(d, neurons, bias=False), nn.Linear(neurons, d, bias=False)

    def forward(self, stream: Tensor) -> Tensor:
        """Map the stream [B, T, d] to the stream after this block [B, T, d]."""
        q, k, v = (
            rearrange(layer(stream), "... t (h e) -> ... h t e", h=self.n_heads) for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, heads, T, d / heads]
        stream = stream + self.o(rearrange(mixed, "... h t e -> ... t (h e)"))
        return stream + self.down(torch.relu(self.up(stream)))


class Transformer(nn.Module):
    """Tokens [B, 9] -> logits [B, 9, n_letters + 6]; only the answer at the last position is trained.

    The task, then eight letters a_1 to a_8. The tasks: the first letter; the last but one, a_7; the letter *after*
    the earlier place of a_8 (induction); a memorised *fact* about a_8, or an *other fact*; the *largest* letter.

    Args:
        n_letters: size of the alphabet.
        d: width of the residual stream.
        n_heads: attention heads of a block, a divisor of d.
        neurons: of a block's MLP.
        n_blocks: number of blocks.
        seed: of the facts.

    Raises:
        ValueError: sizes that are too small, or d is not a multiple of n_heads.
    """

    facts: Tensor

    def __init__(
        self, n_letters: int = 24, d: int = 128, n_heads: int = 4, neurons: int = 256, n_blocks: int = 2, seed: int = 0
    ) -> None:
        super().__init__()
        n_letters = Questions(n_letters).n_letters
        seed, d, n_heads, neurons, n_blocks = numbers(
            seed, d=(d, 1), n_heads=(n_heads, 1), neurons=(neurons, 1), n_blocks=(n_blocks, 1)
        )
        if d % n_heads:
            raise ValueError(f"n_heads must be a divisor of d={d}, got {n_heads}")
        self.n_letters = n_letters
        generator = torch.Generator().manual_seed(seed + 2_000_000_011)
        facts = torch.stack([torch.randperm(n_letters, generator=generator) for _ in range(2)])
        self.register_buffer("facts", facts)  # [2, n_letters]
        n_tokens = n_letters + len(TASKS)
        self.embed, self.position = nn.Embedding(n_tokens, d), nn.Parameter(torch.zeros(LETTERS + 1, d))
        self.blocks = nn.ModuleList(Block(d, n_heads, neurons) for _ in range(n_blocks))
        self.unembed = nn.Linear(d, n_tokens, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, 9] to the logits of every position [B, 9, n_letters + 6].

        Args:
            x: a task, then eight letters.

        Raises:
            TypeError, ValueError: no whole numbers, another shape, or no such tokens.
        """
        self._tokens(x)
        stream = self.embed(x) + self.position
        for block in self.blocks:
            stream = block(stream)
        return self.unembed(stream)

    def _tokens(self, x: Tensor) -> None:
        checks.tensor("x", x, ..., LETTERS + 1, finite=False)
        most = self.n_letters + len(TASKS) - 1
        if x.dtype not in TOKEN_TYPES:
            raise TypeError(f"x must be tokens, whole numbers from 0 to {most}, got {checks.given(x)}")
        if x.numel() and not 0 <= x.min() <= x.max() <= most:
            raise ValueError(f"x must be tokens from 0 to {most}, got {int(x.min())} to {int(x.max())}")

    def answers(self, x: Tensor) -> Tensor:
        """Compute the right answers [B] to questions [B, 9].

        Args:
            x: a task, then eight letters.

        Raises:
            TypeError, ValueError: no tokens, or a row that is no question.
        """
        self._tokens(checks.tensor("x", x, "B", LETTERS + 1, finite=False))
        n = self.n_letters
        if not ((x[:, 0] >= n) & (x[:, 0] < n + len(TASKS)) & (x[:, 1:] < n).all(1) & (x[:, 1:] >= 0).all(1)).all():
            raise ValueError(
                f"x must be a task, {n} to {n + len(TASKS) - 1}, then letters below {n}, got {checks.given(x)}"
            )
        task, letters = x[:, :1] - self.n_letters, x[:, 1:]
        last = letters[:, -1:]
        place = (letters[:, :-1] == last).long().argmax(1, keepdim=True)  # the earlier place of the last letter
        by_task = [
            letters[:, :1],
            letters[:, -2:-1],
            letters.gather(1, place + 1),
            self.facts[0][last],
            self.facts[1][last],
            letters.amax(1, keepdim=True),
        ]
        return torch.cat(by_task, dim=1).gather(1, task)[:, 0]

    def data(self, batch_size: int = 128, tasks: tuple[int, ...] = tuple(range(len(TASKS)))) -> Questions:
        """Create the source of batches [batch_size, 9].

        Args:
            batch_size: rows in a batch.
            tasks: indices of the tasks.
        """
        return Questions(self.n_letters, batch_size, tasks)

    def fit(self, seed: int = 0, steps: int = 1200, batch_size: int = 256) -> Transformer:
        """Train all weights to give the answers.

        Args:
            seed: of the initial weights and the batches.
            steps: training steps of AdamW.
            batch_size: questions in a batch.

        Returns:
            Transformer: itself, trained.
        """
        seed, steps, batch_size = numbers(seed, steps=(steps, 1), batch_size=(batch_size, 1))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5)
            for path in self.weights:
                self.get_parameter(path).mul_(0.4)  # so that little of the initial weights is left after training
        optimiser = torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.3, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, 2e-3, total_steps=steps + 1, pct_start=0.1, cycle_momentum=False
        )
        # The task that needs two layers is trained first: among faster ones, learning it takes many times longer.
        hard, all_tasks = self.data(batch_size, (TASKS.index("after"),)), self.data(batch_size)

        def loss(step: int) -> Tensor:
            x = (hard if step < steps // 5 else all_tasks)(step, generator).to(self.unembed.weight.device)
            return F.cross_entropy(self(x)[:, -1], self.answers(x))

        train(optimiser, schedule, steps, loss)
        return self

    @property
    def weights(self) -> list[str]:
        """The parameter paths to decompose, those of all of attention and MLPs, six matrices a block."""
        parts = ("q", "k", "v", "o", "up", "down")
        return [f"blocks.{i}.{part}.weight" for i in range(len(self.blocks)) for part in parts]

    @property
    def recipe(self) -> dict[str, Any]:
        """Inputs and settings of chapter 23's decomposition.

        They were found in short runs on the target of seed 100, except for the increasing faithfulness weight and the
        number of steps, which were not tried there.
        """
        return {
            "batches": self.data(64),
            "weights": self.weights,
            "output": last_position,
            "divergence": "kl",
            "attribution": answer_shares,
            "n_components": 32,
            "top_k": 3.0,
            "rank": 8,
            "steps": 2000,
            "lr": 3e-3,
            "init_std": 0.05,
            "faithfulness": ((0.0, 3000.0), (0.7, 10_000.0)),
            "minimality": 1.0,
            "scrub": 2.0,
            "simplicity": ((0.0, 300.0), (0.7, 3.0)),
            "p": 0.9,
            "tidy_every": 0.0,
            "reseed_until": 0.0,
        }


def last_position(logits: Tensor) -> Tensor:
    """Select the logits at the last position, [B, vocabulary]: an `output` for `decompose`."""
    checks.tensor("logits", logits, ..., "positions", "vocabulary", finite=False)
    return logits[..., -1, :]


def answer_shares(network: Network, components: Components, x: Tensor) -> Tensor:
    """Compute gradient attributions to one scalar, the target's own answer logit minus the mean logit, as shares.

    One backward pass instead of one per token, and no noise from random probes. Divided by their sum over components,
    so that in batch top-k, tasks with large logits do not take components from others (chapter 10).

    Args:
        network: the target, wrapped, whose outputs are logits [B, vocabulary].
        components: C components of its weights, with or without restarts.
        x: inputs [B, ...].

    Returns:
        Tensor: absolute values that sum to 1 over components, [B, C] or [restarts, B, C].
    """
    pick = network.output

    def answer(out: Tensor) -> Tensor:
        logits = pick(out) if pick is not None else out
        return logits.amax(-1, keepdim=True) - logits.mean(-1, keepdim=True)

    one = Network(network.target, list(network.weights), answer)
    scores = gradient(one, components, x, mode="backward", internal_batch_size=64)
    return scores / scores.sum(-1, keepdim=True).clamp_min(1e-12)
