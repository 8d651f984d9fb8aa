"""Components met with the gradients that `capture` found, or pushed through the network as tangents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import jvp, vmap

from ..components import Components
from ..kernels.narrow import narrow
from ..network import Network
from ..sites import Site, Use
from .capture import Captured, Pairs, by_sample, plain_attention

NUMBERS = 2**23  # of a component's outputs that are worked on at a time, so that they stay in the cache
LARGEST = 2**24  # numbers that a product formed in advance may have


def finished(signed: Tensor, per_output: bool) -> Tensor:
    """Give the signed derivatives themselves, or their root mean square over outputs, the last axis."""
    return signed if per_output else signed.square().mean(-1).sqrt()


def component_outputs(site: Site, rows: Tensor, components: Components) -> Tensor:
    """Compute what every component adds to a layer's output: rows [R or 1, B, T, d] to [R, B, C, T, d']."""
    first, second = site.factors(components)
    _, batch, n_positions, _ = rows.shape
    n_restarts, n_components, d_in, m = first.shape
    u = rows.flatten(1, 2) @ first.transpose(1, 2).reshape(n_restarts, d_in, -1)  # [R, B T, C m]
    u = u.unflatten(-1, (n_components, m)).transpose(1, 2)  # [R, C, B T, m]
    return (u @ second).unflatten(2, (batch, n_positions)).transpose(1, 2)


def tangents(network: Network, components: Components, base: Components | None, x: Tensor) -> Tensor:
    """Push every component's outputs through the network: signed derivatives [R, B, C, n_out].

    Raises:
        RuntimeError: what the target does has no forward mode.
    """
    record: list[Use] = []
    with torch.no_grad():
        network(x, base, record=record)
    outputs = [component_outputs(use.site, by_sample(use.rows, len(x)), components) for use in record]
    n_restarts, _, n_components = outputs[0].shape[:3]
    # At the target one run serves all restarts, so their components share the axis of tangents.
    order, flat = ((0, 2, 1, 3, 4), (0, 1)) if base is None else ((2, 0, 1, 3, 4), (1, 2))
    moves = [y.permute(order).flatten(*flat) for y in outputs]  # [R C, B, T, d'] or [C, R B, T, d']
    zeros = tuple(t.new_zeros(t.shape[1:]) for t in moves)

    def run(*shifts: Tensor) -> Tensor:
        out = network(x, base, shifts=shifts)
        return out.reshape(*out.shape[: 1 if base is None else 2], -1)

    with plain_attention():
        moved = vmap(lambda *t: jvp(run, zeros, t)[1])(*moves).detach()  # [R C, B, n_out] or [C, R, B, n_out]
    if base is None:
        return moved.unflatten(0, (n_restarts, n_components)).transpose(1, 2)
    return moved.permute(1, 2, 0, 3)


def meet(
    components: Components,
    captured: Sequence[Captured],
    per_output: bool,
    per_position: bool = False,
    n_inputs: int | None = None,
) -> Tensor:
    """Meet every component with the outputs' gradients.

    Args:
        components: with an axis of restarts.
        captured: every use of a weight.
        per_output: give the signed derivatives instead of their root mean square over outputs.
        per_position: keep positions apart.
        n_inputs: numbers that a sample has for inputs, if a layer's rows may lie in so many directions; else None.

    Returns:
        Tensor: [R, B, (T,) C], or [R, B, (T,) C, n].

    Raises:
        ValueError: positions that differ between layers.
    """
    if per_position and len({use.rows.shape[2] for use in captured}) > 1:
        positions = [use.rows.shape[2] for use in captured]
        raise ValueError(f"per_position=True, but layers have different numbers of positions: {positions}")
    n_restarts, n_components = components.A[components.paths[0]].shape[:2]
    parts = _folded(components, captured)
    # What all samples share comes first: the rest can then be added in one product.
    uses = [_Met(use, parts, per_position, n_inputs) for use in sorted(captured, key=lambda use: not use.shared)]
    batch = captured[0].rows.shape[1]
    size = max(1, NUMBERS // max(use.numbers for use in uses))
    found = []
    for start in range(0, batch, size):
        total: Tensor | None = None
        for use in uses:
            total = use.add_to(total, slice(start, start + size))
        assert total is not None
        found.append(finished(_unfolded(total, n_restarts, n_components, -2), per_output))
    return torch.cat(found, dim=1)


def _folded(components: Components, captured: Sequence[Captured]) -> Components:
    """Restarts of one target share its rows: their components are as good as those of one restart."""
    shared = len(captured[0].rows) == 1 and components.restarts != 1
    return components.map(lambda t: t.flatten(0, 1)[None]) if shared else components


def _unfolded(found: Tensor, n_restarts: int, n_components: int, axis: int) -> Tensor:
    if len(found) == n_restarts:
        return found
    return found[0].unflatten(axis, (n_restarts, n_components)).movedim(axis - 1, 0)


def _narrowed(use: Captured, first: Tensor, n_inputs: int | None) -> tuple[Captured, Tensor]:
    """Rewrite rows and first factors [R, C, d, m] in few directions, where that is less work."""
    _, batch, T, d = use.rows.shape
    width = first[:, :, 0].numel()
    if n_inputs is None or len(use.rows) > 1:
        return use, first
    n, k = batch * T, n_inputs + 1  # and one for a bias
    if 2 * (k * (d + n) * width + 3 * n * d * k) > n * d * width:
        return use, first
    found = narrow(use.rows.flatten(0, 2), k)
    if found is None:
        return use, first
    coordinates, directions = found
    return replace(use, rows=coordinates.unflatten(0, (1, batch, T))), directions @ first


class _Met:
    """One use of a weight with the components, multiplied in the order that takes the fewest operations."""

    def __init__(self, use: Captured, components: Components, per_position: bool, n_inputs: int | None) -> None:
        self.shared, self.per_position = use.shared and not per_position, per_position
        first, second = use.site.factors(components)  # [R, C, d, m], [R, C, m, d']
        self.use, first = _narrowed(use, first, n_inputs)
        met = second[:, :, None]  # [R, C, 1, m, d']
        if self.shared:  # then the gradients meet the components first
            met = met @ use.deltas[:, 0].permute(0, 2, 3, 1)[:, None]  # [R, C, T, m, n]
        n_restarts, self.n_components, d, m = first.shape
        T, last, rows = met.shape[2], met.shape[-1], use.rows.shape[1] * use.rows.shape[2] // met.shape[2]
        whole = m * d * last + rows * d * last <= rows * m * (d + last)
        self.whole = whole and n_restarts * self.n_components * T * d * last <= LARGEST
        if self.whole:
            met = first[:, :, None] @ met  # [R, C, T, d, last]
            self.first = met.permute(0, 2, 3, 1, 4).reshape(n_restarts, T * d, -1)  # [R, T d, C last]
        else:
            self.first = first.transpose(1, 2).reshape(n_restarts, d, -1)  # [R, d, C m]
        self.second = met
        width = last if self.whole else m + (last if not self.shared else 0)
        n = use.deltas.shape[2]
        self.numbers = n_restarts * self.n_components * (width * use.rows.shape[2] + n)

    def add_to(self, total: Tensor | None, samples: slice) -> Tensor:
        """Add the derivatives of some samples to those by earlier uses: [R, B, (T,) C, n]."""
        use = self.use.part(samples)
        if self.shared:
            return _plus(total, self._by_shared(use.rows))
        y = self._outputs(use.rows)  # [R, B, C, T, d']
        if self.per_position:
            return _plus(total, y.transpose(2, 3) @ use.deltas.permute(0, 1, 3, 4, 2))
        y, deltas = y.flatten(3).flatten(0, 1), use.deltas.flatten(3).flatten(0, 1).mT
        found = y @ deltas if total is None else torch.baddbmm(total.flatten(0, 1), y, deltas)
        return found.unflatten(0, use.rows.shape[:2])

    def _by_shared(self, rows: Tensor) -> Tensor:
        if self.whole:
            return (rows.flatten(2) @ self.first).unflatten(-1, (self.n_components, -1))
        u = (rows @ self.first[:, None]).unflatten(-1, (self.n_components, -1))  # [R, B, T, C, m]
        return (u.permute(0, 3, 1, 2, 4).flatten(3) @ self.second.flatten(2, 3)).transpose(1, 2)

    def _outputs(self, rows: Tensor) -> Tensor:
        u = (rows.flatten(1, 2) @ self.first).unflatten(-1, (self.n_components, -1))  # [R, B T, C, m or d']
        if not self.whole:
            u = (u.transpose(1, 2) @ self.second[:, :, 0]).transpose(1, 2)  # [R, B T, C, d']
        return u.unflatten(1, rows.shape[1:3]).transpose(2, 3)


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total + part


def meet_pairs(components: Components, pairs: Pairs, per_output: bool) -> Tensor:
    """Meet the components with the gradient of every output on every sample where there is one.

    Args:
        components: with an axis of restarts.
        pairs: what was captured of them.
        per_output: give the signed derivatives instead of their root mean square over outputs.

    Returns:
        Tensor: [R, B, C], or [R, B, C, n_out].
    """
    like = components.A[components.paths[0]]
    n_restarts, n_components = like.shape[:2]
    B, n = pairs.n_samples, pairs.n_outputs
    if not len(pairs.samples):
        return like.new_zeros(n_restarts, B, n_components, *([n] if per_output else []))
    parts, outputs = _folded(components, pairs.captured), pairs.outputs
    _, segment, counts = outputs.unique_consecutive(return_inverse=True, return_counts=True)
    starts = counts.cumsum(0) - counts
    linear: list[Captured] = []
    other: list[Captured] = []
    for use in pairs.captured:
        deltas = use.deltas[:, :, 0]
        same = torch.equal(deltas, deltas[:, starts[segment]])
        small = len(starts) * use.rows[0, 0].numel() * parts.n_components * len(use.rows) <= LARGEST
        (linear if same and small else other).append(use)
    total = _linear_pairs(parts, linear, starts, counts) if linear else None
    if other:
        total = _plus(total, _other_pairs(parts, other))
    assert total is not None  # [R, pairs, C]
    if per_output:
        signed = total.new_zeros(len(total), B, n, total.shape[-1])
        signed[:, pairs.samples, outputs] = total
        return _unfolded(signed.transpose(2, 3), n_restarts, n_components, -2)
    squares = total.new_zeros(len(total), B, total.shape[-1]).index_add_(1, pairs.samples, total.square_())
    return _unfolded((squares / n).sqrt_(), n_restarts, n_components, -1)


def _linear_pairs(components: Components, captured: list[Captured], starts: Tensor, counts: Tensor) -> Tensor:
    """Where an output has the same gradients on all samples on which it has any: these meet the components first."""
    rows, met = [], []
    for use in captured:
        first, second = use.site.factors(components)
        deltas = use.deltas[:, starts, 0]  # of each output, [R, n, T, d']
        both = first[:, :, None] @ (second[:, :, None] @ deltas.permute(0, 2, 3, 1)[:, None])  # [R, C, T, d, n]
        met.append(both.permute(0, 4, 2, 3, 1).flatten(2, 3))  # [R, n, T d, C]
        rows.append(use.rows.flatten(2))
    sides = zip(torch.cat(rows, 2).split(counts.tolist(), 1), torch.cat(met, 2).unbind(1), strict=True)
    return torch.cat([mine @ own for mine, own in sides], dim=1)


def _other_pairs(components: Components, captured: list[Captured]) -> Tensor:
    """By the gradient of each pair with respect to the weights, some pairs at a time: [R, pairs, C]."""
    entries = len(captured[0].rows) * components.n_entries
    paths = dict.fromkeys(use.site.path for use in captured)  # in order: of a set, the hash seed would decide it
    flat = {path: components.matrices(path).flatten(2).mT for path in paths}
    found = []
    n_pairs = captured[0].rows.shape[1]
    size = max(1, NUMBERS // entries)
    for start in range(0, n_pairs, size):
        sides: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in flat}
        for use in (use.part(slice(start, start + size)) for use in captured):
            before, after = use.rows, use.deltas[:, :, 0]
            sides[use.site.path].append((after, before) if use.site.transposed else (before, after))
        values: Tensor | None = None
        for path, uses in sides.items():
            left, right = (torch.cat(side, dim=2) for side in zip(*uses, strict=True))
            values = _plus(values, (left.mT @ right).flatten(2) @ flat[path])  # the gradient is [R, pairs, d, d']
        assert values is not None
        found.append(values)
    return torch.cat(found, dim=1)
