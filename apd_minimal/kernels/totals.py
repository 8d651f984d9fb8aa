"""Sums and squared lengths for faithfulness and simplicity: one pass over the factors, and one pass backward.

At full rank the factors are many times larger than the network, and moving them takes as long as computing with them.
The two losses depend on them only through small tensors: the sum of the components, and the lengths of columns and
rows. Autograd stops at these; their gradients are propagated to the factors in place, one slice at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..components import Components

PART = 2**18  # entries of a factor in one slice, so that it stays in the cache


class Totals(Components):
    """Components with precomputed sums and squared lengths.

    Args:
        components: C components with an axis of restarts; their factors are leaves that require gradients.
    """

    def __init__(self, components: Components) -> None:
        super().__init__(components.A, components.B)
        self._small: dict[str, list[Tensor]] = {}  # the sum, and the squared lengths of A's columns and of B's rows
        with torch.no_grad():
            for path, b in self.B.items():
                total = b.new_zeros(len(b), self.A[path].shape[2], b.shape[3])
                squares_a, squares_b = b.new_empty(b.shape[:3]), b.new_empty(b.shape[:3])
                for part, a, b in self._parts(path):
                    total.baddbmm_(a.transpose(1, 2).flatten(2), b.flatten(1, 2))
                    squares_a[:, part], squares_b[:, part] = (a * a).sum(2), (b * b).sum(3)
                self._small[path] = [t.requires_grad_() for t in (total, squares_a, squares_b)]

    def _parts(self, path: str) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Iterate over slices of the components: the slice, and its factors."""
        a, b = self.A[path].detach(), self.B[path].detach()
        size = max(1, PART * self.n_components // max(a.numel(), b.numel()))
        for i in range(0, self.n_components, size):
            yield slice(i, i + size), a[:, i : i + size], b[:, i : i + size]

    def sum(self, path: str) -> Tensor:
        """Return the sum of all components, as `Components.sum`: [R, d_in, d_out]."""
        return self._small[path][0]

    def squared_lengths(self, path: str) -> Tensor:
        """Return the squared lengths, as `Components.squared_lengths`: [R, C, m]."""
        return self._small[path][1] * self._small[path][2]

    def backward(self, loss: Tensor, also: Sequence[Tensor] = ()) -> None:
        """Add the loss's gradients to those of the factors, and of the leaves in `also`."""
        factors = [*self.parameters(), *also]
        small = [t for path in self.paths for t in self._small[path]]
        gradients = torch.autograd.grad(loss, [*factors, *small], materialize_grads=True)
        for factor, gradient in zip(factors, gradients, strict=False):
            # Contiguous, since the fused optimiser assumes equal layouts.
            factor.grad = gradient.contiguous() if factor.grad is None else factor.grad + gradient
        d_small = iter(gradients[len(factors) :])
        with torch.no_grad(), torch.autocast(loss.device.type, enabled=False):
            for path in self.paths:
                d_total, d_squares_a, d_squares_b = next(d_small), 2 * next(d_small), 2 * next(d_small)
                gradient_a, gradient_b = self.A[path].grad, self.B[path].grad
                assert gradient_a is not None and gradient_b is not None
                for part, a, b in self._parts(path):
                    from_sum = (d_total @ b.flatten(1, 2).mT).unflatten(2, b.shape[1:3]).transpose(1, 2)
                    gradient_a[:, part].add_(from_sum).addcmul_(a, d_squares_a[:, part, None])
                    gradient_part = gradient_b[:, part].addcmul_(b, d_squares_b[:, part, :, None])
                    gradient_part.view(len(b), -1, b.shape[3]).baddbmm_(a.transpose(1, 2).flatten(2).mT, d_total)
