"""Advice at the end of a run whose components do not sum to the weights: what is wrong, and which setting to change."""

from __future__ import annotations

import torch

from .components import Components
from .config import Config, at_progress
from .losses import faithfulness
from .network import Network

UNFAITHFUL = 0.05
"""Largest squared error of the sum, as a share of the weights' squared norm, without advice."""


@torch.no_grad()
def advice(network: Network, components: Components, config: Config) -> str | None:
    """Describe in one line why a finished run is not faithful, and which settings to change.

    The losses are not scale-free: on networks other than the toy models, the minimality loss can outweigh the
    faithfulness loss, which is a mean over the entries of the weights. The suggested loss weight compensates for the
    size of the entries: with it, a relative error of the sum costs as much as an equal minimality loss.

    Args:
        network: the target with the weights that were decomposed.
        components: C components, without restarts.
        config: the settings of the run.

    Returns:
        str | None: one line, or None if the run is faithful.
    """
    mean_square = torch.stack([w.square().sum() for w in network.weights.values()]).sum() / components.n_entries
    error = float(faithfulness(components, network.weights) / mean_square)
    faithful, minimality = (
        max(at_progress(s, t) for t in (0.0, 0.25, 0.5, 0.75, 1.0)) for s in (config.faithfulness, config.minimality)
    )
    if not error > UNFAITHFUL or faithful == 0:  # a run without the loss is unfaithful on purpose
        return None
    needed = float(f"{max(10 * faithful, minimality / float(mean_square)):.1g}")
    return (
        f"the components do not sum to the weights: the squared error is {error:.2g} of the weights' squared length "
        f"(at most {UNFAITHFUL} is good). Raise faithfulness from {faithful:g} to about {needed:g}; if that is not "
        f"enough, raise steps (now {config.steps}), rank (now {config.rank or 'full'}) or n_components (now "
        f"{config.n_components})"
    )
