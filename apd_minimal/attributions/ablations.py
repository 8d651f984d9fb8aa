"""Ablation: what the outputs lose when one component goes, or gain when one comes (part III)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import checks
from ..components import Components
from ..network import Network
from .arguments import checked
from .coalitions import Game
from .meet import finished


@checked
def ablation(
    target: nn.Module | Network,
    components: Components,
    x: Tensor,
    *,
    start: str = "all",
    remainder: bool = True,
    per_output: bool = False,
    internal_batch_size: int | None = None,
) -> Tensor:
    """Ablation of every component on every sample: C + 1 runs of the network.

    Early in training the components sum to almost nothing; with start="all" and no remainder, what is then scored
    is a nearly empty network.

    Args:
        target: the network, plain or wrapped.
        components: C components, with or without restarts.
        x: inputs [B, ...].
        start: "all" removes each component from all of them, "none" adds each to none of them.
        remainder: theta* - sum_c P_c stays: "all" is the target. Without, "all" is the component model.
        per_output: give the signed values [B, C, n_out], outputs with the component less those without, instead
            of their root mean square over outputs.
        internal_batch_size: samples run at a time, each counted once for every component; the result does not
            depend on it.

    Returns:
        Tensor: [B, C], or [B, C, n_out] per output, each with a leading axis of restarts if the components have
        one. Detached.

    Raises:
        ValueError: an empty batch, an unknown start, components that do not fit.
    """
    checks.choice("start", start, ("all", "none"))
    game = Game(target, components, remainder, internal_batch_size)
    alone = torch.eye(components.n_components)
    changed, unchanged = (1 - alone, torch.ones_like(alone[:1])) if start == "all" else (alone, 0 * alone[:1])
    sign = -1 if start == "all" else 1

    def scores(part: Tensor) -> tuple[Tensor]:
        effects = sign * (game.values(part, changed) - game.values(part, unchanged))  # [R, C, B, n_out]
        return (finished(effects.transpose(1, 2), per_output),)

    return game.over_samples(scores, x)[0]
