"""Gradient attributions: how much the outputs move along each component (braun2025, chapter 4).

    A_c(x) = sqrt( mean_o ( sum_{l,i,j}  d f_o / d theta_{l,i,j} * P_{c,l,i,j} )^2 )

It is the derivative of the outputs along the component. There are three exact ways to it, and the one with the
fewest operations is taken:

- forward: one tangent per component is pushed through the network.
- backward: one pass per output gives every layer's output gradient, which meets the components' outputs there.
- sample_gradients: the same passes give the gradient of every output on every sample with respect to the weights,
  which meets the components themselves. Outputs that are off (behind a ReLU, say) drop out before they are run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import checks
from ..components import Components
from ..network import Network, as_network
from .arguments import checked
from .capture import capture, forward_agrees, live_pairs, pairs_of
from .choose import FEW, at_once, cheapest, few_are_on, shapes_of
from .meet import finished, meet, meet_pairs, tangents

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
        internal_batch_size: samples worked on at a time; None takes as many as keep the memory bounded. The result
            depends on it by rounding alone.
        generator: for the probes.

    Returns:
        Tensor: [B, C], or [B, positions, C] per position, or [B, C, n_out] per output, each with a leading
        axis of restarts if the components have one. Detached.

    Raises:
        ValueError: an empty batch, an unknown `at` or `mode`, options that exclude each other, positions that differ
            between layers, a forward mode that does not have the target's gradients.
    """
    checks.choice("at", at, ("target", "components"))
    if mode is not None:
        checks.choice("mode", mode, MODES)
    if n_probes is not None and per_output:
        raise ValueError(f"n_probes excludes per_output, got {n_probes}")
    if mode not in (None, "backward") and (per_position or n_probes is not None):
        raise ValueError(f"positions and probes need the backward mode, not {mode!r}")
    network = as_network(target, components)
    if mode == "forward" and not forward_agrees(network, x):
        raise ValueError(
            "mode='forward' does not have this target's gradients: it uses an operation without a forward mode, "
            "torch.no_grad, or a hook on gradients; take mode='backward', or None"
        )
    stacked = components.stacked().map(Tensor.detach)
    base = stacked if at == "components" else None
    seen: list[Tensor] = []
    chosen = mode or ("backward" if per_position or n_probes else cheapest(network, stacked, base, x, seen))
    may_pick = mode is None and not (per_position or n_probes) and shapes_of(network, x).n_out <= FEW
    n_inputs = x[0].numel() if x.is_floating_point() else None
    pieces: list[Tensor] = []
    done = 0
    while done < len(x):
        size = internal_batch_size or at_once(network, stacked, base, x, chosen)
        part = x[done : done + size]
        if chosen == "forward":
            try:
                signed = tangents(network, stacked, base, part)
            except RuntimeError:  # not all that a target can do has a forward mode
                if mode is not None:
                    raise
                chosen = "backward"
                continue
            pieces.append(finished(signed, per_output))
        elif chosen == "backward":
            captured = capture(network, base, part, n_probes, generator)
            pairs = pairs_of(captured) if may_pick else None
            if pairs is not None and few_are_on(network, stacked, base, part, pairs.share):
                pieces.append(meet_pairs(stacked, pairs, per_output))
            else:
                pieces.append(meet(stacked, captured, per_output, per_position, n_inputs))
        else:
            alive = seen[0][done : done + size] if seen else None
            pieces.append(meet_pairs(stacked, live_pairs(network, base, part, alive), per_output))
        done += len(part)
    scores = torch.cat(pieces, dim=1)
    return scores if components.restarts is not None else scores[0]
