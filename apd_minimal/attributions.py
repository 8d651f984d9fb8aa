"""Gradient attributions: how much the outputs move along each component (braun2025, chapter 4).

    A_c(x) = sqrt( mean_o ( sum_{l,i,j}  d f_o / d theta_{l,i,j} * P_{c,l,i,j} )^2 )

It is the derivative of the outputs along the component. Backward, one pass per output gives every layer's
output gradient, which meets the component's output there; forward, one tangent per component is pushed
through the network. Both are exact; the cheaper one is chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap

from .components import Components
from .gates import Network, as_network
from .sites import Site, Use


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
        mode: "forward" or "backward"; None takes the one with fewer operations.
        internal_batch_size: samples worked on at a time; the result does not depend on it.
        generator: for the probes.

    Returns:
        Tensor: [B, C], or [B, positions, C] per position, or [B, C, n_out] per output, each with a leading
        axis of restarts if the components have one. Detached.

    Raises:
        ValueError: an empty batch, an unknown `at` or `mode`, options that exclude each other, positions that differ
            between layers.
    """
    if at not in ("target", "components"):
        raise ValueError(f"at must be 'target' or 'components', got {at!r}")
    if mode not in (None, "forward", "backward"):
        raise ValueError(f"mode must be 'forward', 'backward' or None, got {mode!r}")
    if n_probes is not None and (n_probes < 1 or per_output):
        raise ValueError(f"n_probes must be at least 1 and excludes per_output, got {n_probes}")
    if mode == "forward" and (per_position or n_probes is not None):
        raise ValueError("positions and probes need the backward mode")
    if len(x) == 0:
        raise ValueError("an empty batch: the first axis of x has size 0")
    network = as_network(target, components)
    stacked = components.stacked().map(Tensor.detach)
    base = stacked if at == "components" else None
    pieces = []
    for part in x.split(internal_batch_size or len(x)):
        forward = mode == "forward"
        if mode is None and not per_position and n_probes is None:
            forward = _forward_is_cheaper(network, stacked, base, part)
        try:
            signed = _forward(network, stacked, base, part) if forward else None
        except NotImplementedError:  # some of torch's kernels, such as fused attention, know no forward mode
            if mode is not None:
                raise
            signed = None
        if signed is None:
            signed = _backward(network, stacked, base, part, per_position, n_probes, generator)
        if components.restarts is None:
            signed = signed[0]
        pieces.append(signed if per_output else signed.square().mean(-1).sqrt())
    return torch.cat(pieces, dim=0 if components.restarts is None else 1)


def _by_batch(rows: Tensor, batch: int) -> Tensor:
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


def _forward_is_cheaper(network: Network, components: Components, base: Components | None, x: Tensor) -> bool:
    """Count multiplications per sample, up to the terms that both modes share."""
    record: list[Use] = []
    with torch.no_grad():
        n_out = network(x[:1], record=record).numel()
    n_restarts, n_components = components.A[components.paths[0]].shape[:2]
    positions = [use.rows[0].numel() // use.rows.shape[-1] for use in record]
    weights = sum(t * network.weights[use.site.path].numel() for t, use in zip(positions, record, strict=True))
    outputs = sum(t * use.site.factors(components)[1].shape[-1] for t, use in zip(positions, record, strict=True))
    forward = n_restarts * n_components * weights
    backward = n_out * ((1 if base is None else n_restarts) * weights + n_restarts * n_components * outputs)
    # Forward mode goes over its tangents several times, backward mode over the contraction once.
    return 2 * forward < backward


def _forward(network: Network, components: Components, base: Components | None, x: Tensor) -> Tensor:
    """Push every component's outputs through the network as tangents: [R, B, C, n_out]."""
    record: list[Use] = []
    with torch.no_grad():
        network(x, base, record=record)
    outputs = [_component_outputs(use.site, _by_batch(use.rows, len(x)), components) for use in record]
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


def _backward(
    network: Network,
    components: Components,
    base: Components | None,
    x: Tensor,
    per_position: bool,
    n_probes: int | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Meet the components' outputs with the outputs' gradients: [R, B, (T,) C, n_out or n_probes]."""
    with torch.no_grad():
        n_out = network(x[:1]).numel()
    batch, n = len(x), n_probes or n_out
    if n_probes is None:
        seeds = torch.eye(n_out).repeat_interleave(batch, 0)
    else:
        # Drawn sample by sample, so that the pieces of a batch get the probes that the whole would.
        signs = torch.randint(0, 2, (batch, n, n_out), generator=generator).transpose(0, 1).flatten(0, 1)
        seeds = (2 * signs - 1) * n_out**-0.5
    # One copy of the batch for each output, so that a single backward pass serves all of them.
    record: list[Use] = []
    with torch.enable_grad():
        out = network(x.repeat(n, *[1] * (x.ndim - 1)), base, record=record)
        out = out.reshape(-1, n * batch, n_out)
    deltas = torch.autograd.grad(out, [use.shift for use in record], seeds.to(out).expand_as(out), allow_unused=True)
    parts = []
    for use, delta in zip(record, deltas, strict=True):
        if delta is None:
            continue
        rows = _by_batch(use.rows, n * batch)[:, :batch]
        y = _component_outputs(use.site, rows, components)  # [R, B, C, T, d']
        d = _by_batch(delta, batch).unflatten(0, (-1, n)).permute(0, 2, 3, 4, 1)  # [R or 1, B, T, d', n]
        if per_position:
            parts.append(y.transpose(2, 3) @ d)  # [R, B, T, C, n]
        else:
            parts.append(y.flatten(3) @ d.flatten(2, 3))  # [R, B, C, T d'] @ [R, B, T d', n]
    if not parts:
        raise ValueError("no output depends on a decomposed weight")
    if len({part.shape for part in parts}) > 1:
        raise ValueError(f"layers with different numbers of positions: {[part.shape[2] for part in parts]}")
    return torch.stack(parts).sum(0)
