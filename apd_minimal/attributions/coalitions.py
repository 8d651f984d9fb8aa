"""Components as the players of a game: what a coalition is worth is what the network puts out with its weights.

All samples share the gates here, so that a set of gates is just a set of weights, and costs one run of the network
however many components there are. The samples' own gates of `Network` are the definition: tests compare with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..components import Components
from ..network import Network, as_network
from ..sites import Use
from .capture import Captured, capture, live_pairs
from .choose import cheapest
from .meet import meet, meet_pairs, tangents

# Where the caller does not say how many samples to run at a time: so many, and fewer where gradients, tangents or
# values would take more than so many numbers. What stays in the cache is faster, and the memory is bounded.
ROWS = 2048
NUMBERS = 2**22


class Game:
    """A network at any gates that its samples share.

    Args:
        target: the network, plain or wrapped.
        components: C components, with or without restarts.
        remainder: theta* - sum_c P_c stays, whatever the gates are.
        internal_batch_size: samples run at a time, each counted once for every set of gates; None chooses.

    Raises:
        ValueError: components that do not fit, an `internal_batch_size` below 1.
    """

    def __init__(
        self, target: nn.Module | Network, components: Components, remainder: bool, internal_batch_size: int | None
    ) -> None:
        if internal_batch_size is not None and internal_batch_size < 1:
            raise ValueError(f"internal_batch_size must be at least 1, got {internal_batch_size}")
        self.network = as_network(target, components)
        self.components = components.stacked().map(Tensor.detach)
        self.has_restarts = components.restarts is not None
        self.remainder = remainder
        self.size = internal_batch_size
        self.flat = self.components.flat()  # [R, C, N]
        self.mode: str | None = None  # of derivatives, chosen when the first are taken

    def rows(self, numbers: int) -> int:
        """Choose how many samples to run at a time, if each takes so many numbers."""
        return self.size or min(ROWS, max(1, NUMBERS // numbers))

    def weights(self, gates: Tensor) -> Components:
        """Build the weights at gates [K, C]: components that are one matrix each, on an axis of R * K restarts."""
        gates = gates.to(self.flat)
        moved = (gates - 1 if self.remainder else gates) @ self.flat  # [R, K, N]
        shapes = [self.network.shapes[path] for path in self.components.paths]
        A, B = {}, {}
        pieces = moved.flatten(0, 1).split([d_in * d_out for d_in, d_out in shapes], dim=1)
        for path, (d_in, d_out), piece in zip(self.components.paths, shapes, pieces, strict=True):
            matrix = piece.reshape(-1, 1, d_in, d_out)
            if self.remainder:
                matrix = matrix + self.network.weights[path]
            one = torch.eye(min(d_in, d_out)).to(matrix).expand(len(matrix), 1, -1, -1)
            A[path], B[path] = (one, matrix) if d_in < d_out else (matrix, one)
        return Components(A, B)

    @torch.no_grad()
    def values(self, x: Tensor, gates: Tensor) -> Tensor:
        """Compute the outputs of samples x [B, ...] at gates [K, C]: [R, K, B, n_out]."""
        pieces = []
        for some in gates.split(max(1, (self.size or ROWS) // len(x))):
            out = self.network(x, self.weights(some))  # [R k, B, ...]
            pieces.append(out.reshape(-1, len(some), len(x), out[0, 0].numel()))
        return torch.cat(pieces, dim=1)

    def slopes(self, x: Tensor, gates: Tensor, shares: Tensor) -> Tensor:
        """Compute derivatives of the outputs of x [B, ...] by every gate, at gates [K, C], summed with shares [K].

        Each is a gradient with respect to the weights that meets a component, so the gradients are summed first.

        Returns:
            Tensor: signed, [R, B, C, n_out].
        """
        n_restarts, n_components = self.flat.shape[:2]
        if self.mode is None:
            everything = self.weights(torch.ones(1, n_components))
            self.mode = cheapest(self.network, self.components, everything, x)
        n_out, width = self._one_sample(x)
        rows = self.rows(n_restarts * width * (n_components if self.mode == "forward" else n_out))
        totals = []
        for some, share in zip(gates.split(rows), shares.split(rows), strict=True):
            weights = self.weights(some)
            parts = x.split(max(1, rows // len(some)))
            totals.append(torch.cat([self._slopes(part, weights, share) for part in parts], dim=1))
        return torch.stack(totals).sum(0)

    def _slopes(self, x: Tensor, weights: Components, shares: Tensor) -> Tensor:
        n_points = len(shares)
        if self.mode == "forward":
            try:
                single = [weights.map(lambda t, k=k: t[k::n_points]) for k in range(n_points)]  # type: ignore[misc]
                moved = [tangents(self.network, self.components, point, x) for point in single]
                return torch.einsum("k,krbco->rbco", shares.to(moved[0]), torch.stack(moved))
            except RuntimeError:  # not all that a target can do has a forward mode
                self.mode = "backward"
        if self.mode == "backward":
            captured = [_points_as_positions(use, shares) for use in capture(self.network, weights, x)]
            return meet(self.components, captured, per_output=True)
        pairs = live_pairs(self.network, weights, x)
        captured = [_points_as_positions(use, shares) for use in pairs.captured]
        return meet_pairs(self.components, replace(pairs, captured=captured), per_output=True)

    def over_samples(self, function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> tuple[Tensor, ...]:
        """Apply a function from samples to tensors [R, B, ...] part by part; join them, in the components' own layout.

        Raises:
            ValueError: an empty batch.
        """
        if len(x) == 0:
            raise ValueError("an empty batch: the first axis of x has size 0")
        rows = self.rows(self.flat[..., 0].numel() * self._one_sample(x)[0])  # signed values are [R, B, C, n_out]
        joined = [torch.cat(parts, dim=1) for parts in zip(*map(function, x.split(rows)), strict=True)]
        return tuple(t if self.has_restarts else t[0] for t in joined)

    @torch.no_grad()
    def _one_sample(self, x: Tensor) -> tuple[int, int]:
        """Numbers that one sample has for outputs, and for outputs of all decomposed layers."""
        record: list[Use] = []
        n_out = self.network(x[:1], record=record).numel()
        return n_out, sum(use.shift.numel() for use in record)


def _points_as_positions(use: Captured, shares: Tensor) -> Captured:
    """Rows [R K, B, T, d] as [R, B, K T, d]; deltas [R K, B, n, T, d'] as [R, B, n, K T, d'], each times its share."""
    n_points = len(shares)
    rows = use.rows.unflatten(0, (-1, n_points)).transpose(1, 2).flatten(2, 3)
    deltas = use.deltas.unflatten(0, (-1, n_points)) * shares.to(use.deltas).view(-1, 1, 1, 1, 1)
    return Captured(use.site, rows, deltas.permute(0, 2, 3, 1, 4, 5).flatten(3, 4))
