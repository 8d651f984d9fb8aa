"""Targets with their instances stacked on one axis, as the reference trains them: batched matrix products."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, einsum

from apd_minimal.targets import TMS
from benchmarks.cases import Case

Apply = Callable[[int, Tensor], Tensor]  # (index of the use, its input rows [B, I, d]) -> [B, I, d']


class Stacked:
    """I targets of one kind: inputs [B, I, n], weights [I, d_in, d_out].

    Args:
        case: the experiment; all instances are copies of its target, so that results can be compared.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        target = case.target()
        self.weights = [self._stack(target.get_parameter(path).T).requires_grad_() for path in target.weights]
        self.bias, self.embedding, self.unembedding = None, None, None
        if isinstance(target, TMS):
            self.bias = self._stack(target.bias).requires_grad_()
        else:
            self.embedding = self._stack(target.embedding)  # [I, n, d]
            self.unembedding = self._stack(target.embedding.T)  # [I, d, n]

    def _stack(self, tensor: Tensor) -> Tensor:
        return tensor.detach().expand(self.case.instances, *tensor.shape).clone()

    @property
    def parameters(self) -> list[Tensor]:
        """The trained parameters."""
        return self.weights if self.bias is None else [*self.weights, self.bias]

    def forward(self, x: Tensor, apply: Apply) -> tuple[Tensor, list[Tensor]]:
        """Run with `apply` in place of the products with the weights.

        Args:
            x: inputs [B, I, n].
            apply: computes the output rows of a use from its input rows.

        Returns:
            tuple[Tensor, list[Tensor]]: outputs [B, I, n], and each layer's activations after the ReLU.
        """
        if self.bias is not None:
            return torch.relu(apply(1, apply(0, x)) + self.bias), []
        assert self.embedding is not None and self.unembedding is not None
        stream, hidden = einsum("bif,ifd->bid", x, self.embedding), []
        for read in range(0, len(self.weights), 2):
            hidden.append(torch.relu(apply(read, stream)))
            stream = stream + apply(read + 1, hidden[-1])
        return einsum("bid,idf->bif", stream, self.unembedding), hidden

    def weigh(self, use: int, rows: Tensor) -> Tensor:
        """Multiply by the target's own weights in one use: [B, I, d] to [B, I, d']."""
        which, transposed = self.case.uses[use]
        return einsum("bie,ide->bid" if transposed else "bid,ide->bie", rows, self.weights[which])


class Plain:
    """(a) One step of training the targets: forward, squared error, backward, AdamW.

    Args:
        case: which experiment.
        batches: inputs [B, I, n], used in turn.
        loaded: train all parameters of the reference's target as loaded from a file, including the embeddings of a
            residual MLP, which are fixed in its own training.
    """

    def __init__(self, case: Case, batches: Sequence[Tensor], loaded: bool = False) -> None:
        self.stacked, self.batches, self.done = Stacked(case), batches, 0
        parameters = self.stacked.parameters
        for fixed in (self.stacked.embedding, self.stacked.unembedding):
            if loaded and fixed is not None:
                parameters = [*parameters, fixed.requires_grad_()]
        self.optimiser = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)

    def step(self) -> None:
        """Take one training step."""
        x = self.batches[self.done % len(self.batches)]
        labels = x + torch.relu(x) if self.stacked.case.neurons else x
        self.optimiser.zero_grad()
        out, _ = self.stacked.forward(x, self.stacked.weigh)
        (out - labels).square().mean((0, 2)).sum().backward()
        self.optimiser.step()
        self.done += 1
