"""Activation: how much every component adds to the layers that it is in, whatever the outputs make of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..components import Components
from ..network import Network
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
        squares = [
            component_outputs(use.site, by_sample(use.rows, len(part)), game.components).square().sum((-2, -1))
            for use in record
        ]
        return (torch.stack(squares).sum(0).sqrt(),)

    return game.over_samples(scores, x)[0]
