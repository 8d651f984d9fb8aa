"""Gradient attributions: how much the outputs move along each component (braun2025, chapter 4).

    A_c(x) = sqrt( mean_o ( sum_{l,i,j}  d f_o / d theta_{l,i,j} * P_{c,l,i,j} )^2 )

It is the derivative of the outputs along the component. There are three exact ways to it, and the one with the
fewest operations is taken:

- forward: one tangent per component is pushed through the network.
- backward: one pass per output gives every layer's output gradient, which meets the components' outputs there.
- sample_gradients: the same passes give the gradient of every output on every sample with respect to the weights,
  which meets the components themselves. Outputs that are off (behind a ReLU, say) drop out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap

from .. import checks
from ..components import Components
from ..network import Network, as_network
from ..sites import Site, Use
from .arguments import checked

Attribution = Callable[[Network, Components, Tensor], Tensor]  # (network, components, x) -> [(restarts,) B, C]
MODES = ("forward", "backward", "sample_gradients")


@checked
def gradient(
    target: nn.Module | Network,
    components: Components,
    x: Tensor,
    *,
    at: str = "target",
    per_output: bool = False,
    per_position: bool = False,
    n_probes: int | None = None,
    mode: str | None = None,
    internal_batch_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Gradient attributions of every component on every sample.

    Args:
        target: the network, plain or wrapped.
        components: C components, with or without restarts.
        x: inputs [B, ...].
        at: "target" takes the derivative at theta*, "components" at the component model sum_c P_c.
        per_output: give the signed derivatives [B, C, n_out] instead of their root mean square over outputs.
        per_position: one attribution for each position of a sequence or picture, [B, positions, C].
        n_probes: estimate the mean over outputs from this many random sign vectors instead of exactly.
        mode: one of `MODES`; None takes the one with the fewest operations.
        internal_batch_size: samples worked on at a time; the result does not depend on it.
        generator: for the probes.

    Returns:
        Tensor: [B, C], or [B, positions, C] per position, or [B, C, n_out] per output, each with a leading
        axis of restarts if the components have one. Detached.

    Raises:
        ValueError: an empty batch, an unknown `at` or `mode`, options that exclude each other, positions that differ
            between layers.
    """
    checks.choice("at", at, ("target", "components"))
    if mode is not None:
        checks.choice("mode", mode, MODES)
    if n_probes is not None and per_output:
        raise ValueError(f"n_probes excludes per_output, got {n_probes}")
    if mode not in (None, "backward") and (per_position or n_probes is not None):
        raise ValueError(f"positions and probes need the backward mode, not {mode!r}")
    network = as_network(target, components)
    stacked = components.stacked().map(Tensor.detach)
    base = stacked if at == "components" else None
    chosen = mode or ("backward" if per_position or n_probes else _cheapest(network, stacked, base, x))
    pieces = []
    for part in x.split(internal_batch_size or len(x)):
        if chosen == "forward":
            try:
                scores = _finish(_forward(network, stacked, base, part), per_output)
            except NotImplementedError:  # some of torch's kernels, such as fused attention, know no forward mode
                if mode is not None:
                    raise
                chosen = "backward"
        if chosen == "backward":
            captured = _capture(network, base, part, n_probes, generator)
            scores = _finish(_backward(stacked, captured, per_position), per_output)
        if chosen == "sample_gradients":
            scores = _sample_gradients(stacked, _capture(network, base, part), per_output)
        pieces.append(scores if components.restarts is not None else scores[0])
    return torch.cat(pieces, dim=0 if components.restarts is None else 1)


def _finish(signed: Tensor, per_output: bool) -> Tensor:
    return signed if per_output else signed.square().mean(-1).sqrt()


def _by_sample(rows: Tensor, batch: int) -> Tensor:
    """Rows of one use of a weight, [copies * B, *positions, d], as [copies, B, T, d]."""
    return rows.detach().reshape(-1, batch, rows[0].numel() // rows.shape[-1], rows.shape[-1])


def _component_outputs(site: Site, rows: Tensor, components: Components) -> Tensor:
    """What every component adds to a layer's output: rows [R or 1, B, T, d] to [R, B, C, T, d']."""
    first, second = site.factors(components)
    _, batch, n_positions, _ = rows.shape
    n_restarts, n_components, d_in, m = first.shape
    u = rows.flatten(1, 2) @ first.transpose(1, 2).reshape(n_restarts, d_in, -1)  # [R, B T, C m]
    u = u.unflatten(-1, (n_components, m)).transpose(1, 2)  # [R, C, B T, m]
    return (u @ second).unflatten(2, (batch, n_positions)).transpose(1, 2)


def _forward(network: Network, components: Components, base: Components | None, x: Tensor) -> Tensor:
    """Push every component's outputs through the network as tangents: [R, B, C, n_out]."""
    record: list[Use] = []
    with torch.no_grad():
        network(x, base, record=record)
    outputs = [_component_outputs(use.site, _by_sample(use.rows, len(x)), components) for use in record]
    n_restarts, _, n_components = outputs[0].shape[:3]
    # At the target one run serves all restarts, so their components share the axis of tangents.
    order, flat = ((0, 2, 1, 3, 4), (0, 1)) if base is None else ((2, 0, 1, 3, 4), (1, 2))
    tangents = [y.permute(order).flatten(*flat) for y in outputs]  # [R C, B, T, d'] or [C, R B, T, d']
    zeros = tuple(t.new_zeros(t.shape[1:]) for t in tangents)

    def run(*shifts: Tensor) -> Tensor:
        return network(x, base, shifts=shifts).flatten(1 if base is None else 2)

    moved = vmap(lambda *t: jvp(run, zeros, t)[1])(*tangents).detach()  # [R C, B, n_out] or [C, R, B, n_out]
    if base is None:
        return moved.unflatten(0, (n_restarts, n_components)).transpose(1, 2)
    return moved.permute(1, 2, 0, 3)


@dataclass(frozen=True)
class _Captured:
    """One use of a weight: its input rows [R or 1, B, T, d], and the outputs' gradients there [R or 1, B, n, T, d']."""

    site: Site
    rows: Tensor
    deltas: Tensor


def _capture(
    network: Network,
    base: Components | None,
    x: Tensor,
    n_probes: int | None = None,
    generator: torch.Generator | None = None,
) -> list[_Captured]:
    """Run once forward, and once backward for each output, or for each of `n_probes` random signs of all outputs."""
    record: list[Use] = []
    with torch.enable_grad():
        out = network(x, base, record=record)
        out = out.reshape(-1, len(x), out[(0,) * (1 if base is None else 2)].numel())  # [R or 1, B, n_out]
    n_out = out.shape[-1]
    if n_probes is None:
        seeds = torch.eye(n_out)[:, None]  # [n, 1, n_out]
    else:
        # Drawn sample by sample, so that the pieces of a batch get the probes that the whole would.
        signs = torch.randint(0, 2, (len(x), n_probes, n_out), generator=generator).transpose(0, 1)
        seeds = (2 * signs - 1) * n_out**-0.5  # [n, B, n_out]
    shifts = [use.shift for use in record]
    # Output by output: in the cache, one pass after the other is faster than all of them in one batch.
    deltas = [
        torch.autograd.grad(out, shifts, seed.to(out).expand_as(out), retain_graph=True, allow_unused=True)
        for seed in seeds
    ]
    captured = []
    for use, own in zip(record, zip(*deltas, strict=True), strict=True):
        if own[0] is not None:
            rows = _by_sample(use.rows, len(x))
            captured.append(_Captured(use.site, rows, _stack([_by_sample(delta, len(x)) for delta in own])))
    if not captured:
        raise ValueError("no output depends on a decomposed weight")
    return captured


def _stack(deltas: list[Tensor]) -> Tensor:
    """Gradients of one output after the other [R or 1, B, T, d'], together: [R or 1, B, n, T, d'].

    Where all samples have the same, as before outputs that are linear, one is kept, with a stride of 0.
    """
    batch = deltas[0].shape[1]
    if all(torch.equal(delta, delta[:, :1].expand_as(delta)) for delta in deltas):
        deltas = [delta[:, :1] for delta in deltas]
    return torch.stack(deltas, dim=2).expand(-1, batch, -1, -1, -1)


def _meet_once(use: _Captured, components: Components) -> Tensor:
    """Where all samples have the same gradients, these meet the components first: [R, B, C, n]."""
    first, second = use.site.factors(components)
    n_restarts, n_components, d_in, m = first.shape
    met = second[:, :, None] @ use.deltas[:, 0].permute(0, 2, 3, 1)[:, None]  # [R, C, T, m, n]
    u = use.rows @ first.transpose(1, 2).reshape(n_restarts, 1, d_in, -1)  # [R, B, T, C m]
    u = u.unflatten(-1, (n_components, m)).permute(0, 3, 1, 2, 4)  # [R, C, B, T, m]
    return (u.flatten(3) @ met.flatten(2, 3)).transpose(1, 2)


def _backward(components: Components, captured: list[_Captured], per_position: bool) -> Tensor:
    """Meet the components' outputs with the outputs' gradients: [R, B, (T,) C, n]."""
    parts = []
    for use in captured:
        if use.deltas.stride(1) == 0 and not per_position:
            parts.append(_meet_once(use, components))
            continue
        y = _component_outputs(use.site, use.rows, components)  # [R, B, C, T, d']
        if per_position:
            parts.append(y.transpose(2, 3) @ use.deltas.permute(0, 1, 3, 4, 2))  # [R, B, T, C, n]
        else:
            parts.append(y.flatten(3) @ use.deltas.flatten(3).mT)  # [R, B, C, T d'] @ [R or 1, B, T d', n]
    if len({part.shape for part in parts}) > 1:
        raise ValueError(f"layers with different numbers of positions: {[part.shape[2] for part in parts]}")
    return torch.stack(parts).sum(0)


def _sample_gradients(components: Components, captured: list[_Captured], per_output: bool) -> Tensor:
    """Meet the components with the gradient of every output on every sample: [R, B, C], or [R, B, C, n] per output."""
    n_restarts, n_components = components.A[components.paths[0]].shape[:2]
    alive = torch.stack([use.deltas.flatten(3).any(-1).any(0) for use in captured]).any(0)  # [B, n]
    samples, outputs = alive.nonzero().unbind(1)
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in components.paths}  # [R or 1, pairs, T, d]
    for use in captured:
        before, after = use.rows[:, samples], use.deltas[:, samples, outputs]
        pairs[use.site.path].append((after, before) if use.site.transposed else (before, after))
    values = samples.new_zeros(())
    for path, uses in pairs.items():
        if not uses:
            continue
        left, right = (torch.cat(side, dim=2) for side in zip(*uses, strict=True))
        gradient = left.mT @ right  # of each output on its sample, [R or 1, pairs, d_in, d_out]
        flat = components.matrices(path).flatten(2)  # [R, C, N]
        shared = len(gradient) == 1  # one target for all restarts: a single product serves them
        values = values + gradient.flatten(2) @ (flat.flatten(0, 1)[None] if shared else flat).mT
    values = values.unflatten(-1, (-1, n_components)).movedim(1, 0).flatten(1, 2)  # [pairs, R, C]
    shape = (*alive.shape, n_restarts, n_components)
    if per_output:
        return values.new_zeros(shape).index_put((samples, outputs), values).permute(2, 0, 3, 1)
    squares = values.new_zeros(shape[0], *shape[2:]).index_add(0, samples, values.square())
    return (squares / shape[1]).sqrt().transpose(0, 1)


def _cheapest(network: Network, components: Components, base: Components | None, x: Tensor) -> str:
    """The mode with the fewest multiplications per sample, up to the terms that all share."""
    record: list[Use] = []
    with torch.no_grad():
        n_out = network(x[:1], record=record).numel()
    n_restarts, n_components = components.A[components.paths[0]].shape[:2]
    tangents, copies = n_restarts * n_components, 1 if base is None else n_restarts
    positions = [use.rows[0].numel() // use.rows.shape[-1] for use in record]
    through = sum(t * network.weights[use.site.path].numel() for t, use in zip(positions, record, strict=True))
    outputs = sum(t * use.site.factors(components)[1].shape[-1] for t, use in zip(positions, record, strict=True))
    entries = sum(weight.numel() for weight in network.weights.values())
    # Forward mode goes over all its tangents in memory several times; the others are mostly matrix products.
    counts = {"forward": 4 * tangents * through, "backward": n_out * (copies * through + 2 * tangents * outputs)}
    passes, for_one_output = n_out * copies * through, copies * through + tangents * entries
    some_off = passes + for_one_output < min(counts.values())
    some_shared = passes + tangents * outputs < counts["forward"] < counts["backward"]
    if some_off or some_shared:  # then only the gradients themselves can tell
        captured = _capture(network, base, x[:16])
        alive = torch.stack([use.deltas.flatten(3).any(-1).any(0) for use in captured]).any(0)
        on = alive.sum(1).float().mean().item()
        counts["sample_gradients"] = int(passes + on * for_one_output)
        for use in captured:
            if use.deltas.stride(1) == 0:  # of its outputs' numbers only as many as the rank are left to meet
                _, second = use.site.factors(components)
                saved = use.deltas.shape[3] * (2 * second.shape[-1] - second.shape[-2])
                counts["backward"] -= n_out * tangents * saved
    return min(counts, key=counts.__getitem__)
