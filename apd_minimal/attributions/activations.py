"""Activation: how much every component adds to the layers that it is in, whatever the outputs make of it.

And the signed inner activation of components of rank one, which is no measure of what a component matters, but what
learned importances look at (`importance`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..components import Components
from ..network import Network, as_network
from ..sites import Use
from .arguments import checked
from .capture import by_sample
from .coalitions import Game
from .meet import component_outputs


@checked
def activation(
    target: nn.Module | Network,
    components: Components,
    x: Tensor,
    *,
    remainder: bool = True,
    internal_batch_size: int | None = None,
) -> Tensor:
    """Measure the length of what every component adds to the layers' outputs: the root of sum_l (x_l P_{c,l})^2.

    The sum goes over all uses of the decomposed weights, over all positions and over the layer's outputs (braun2025
    has the square of it). The network's own outputs are not in it: a component whose effect is lost on the way counts
    all the same.

    Args:
        target: the network, plain or wrapped.
        components: C components, with or without restarts.
        x: inputs [B, ...].
        remainder: the layers' inputs x_l are those of the target; without, those of the component model.
        internal_batch_size: samples run at a time; the result does not depend on it.

    Returns:
        Tensor: [B, C], with a leading axis of restarts if the components have one. Detached.

    Raises:
        ValueError: an empty batch, components that do not fit.
    """
    game = Game(target, components, remainder, internal_batch_size)

    @torch.no_grad()
    def scores(part: Tensor) -> tuple[Tensor]:
        record: list[Use] = []
        game.network(part, None if remainder else game.components, record=record)
        return (torch.stack([_squares(use, len(part), game.components) for use in record]).sum(0).sqrt(),)

    return game.over_samples(scores, x)[0]


def _squares(use: Use, batch: int, components: Components) -> Tensor:
    """Work out the square of what every component adds to a layer's output: [R, B, C]."""
    y = component_outputs(use.site, by_sample(use.rows, batch), components)  # [R, B, C, T, d']
    rows = y.reshape(-1, *use.rows.shape[1:-1], y.shape[-1])
    # In the output of a grouped or a transposed convolution rows are left out, or overlap.
    laid = use.site.rule.unrows(rows, use.like[:1].expand(len(rows), *use.like.shape[1:]))
    return laid.reshape(*y.shape[:3], -1).square().sum(-1)


@checked
def inner_activation(target: nn.Module | Network, components: Components, x: Tensor) -> Tensor:
    """Work out the signed inner activation x_l A_c of every component of rank one.

    The input x_l is the target's, where the component's weight is used first; a second use, such as that of a tied
    decoder, does not count. Over several weights the activations are summed, which is meant for components that are
    confined to one weight each (`per_weight`): there all other terms are zero.

    Args:
        target: the network, plain or wrapped.
        components: C components of rank one, with or without restarts.
        x: inputs [B, ...].

    Returns:
        Tensor: [B, C], or [B, *positions, C] where the weights' inputs have positions; with a leading axis of restarts
        if the components have one. Detached.

    Raises:
        ValueError: components of a higher rank, or weights whose inputs have different positions.
    """
    if any(a.shape[-1] > 1 for a in components.A.values()):
        ranks = {path: a.shape[-1] for path, a in components.A.items()}
        raise ValueError(
            f"inner activations are of components of rank one: rank=1 for decompose; got factors of {ranks}"
        )
    record: list[Use] = []
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        as_network(target, components)(x, record=record)
        for use in record:
            if use.site.path not in found:
                first = use.site.factors(components)[0][..., 0]  # [(R,) C, d]
                found[use.site.path] = torch.einsum("b...d,rcd->rb...c", use.rows, first.reshape(-1, *first.shape[-2:]))
        shapes = {path: list(inner.shape[1:-1]) for path, inner in found.items()}
        if len({tuple(shape) for shape in shapes.values()}) > 1:
            raise ValueError(f"the weights' inputs have different positions, [B, *positions]: {shapes}")
        summed = torch.stack(list(found.values())).sum(0)
    return summed if components.restarts is not None else summed[0]
