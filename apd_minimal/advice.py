"""One line at the end of a run whose components do not sum to the weights: what is wrong, and what mends it."""

from __future__ import annotations

import torch

from .components import Components
from .config import Config, at_progress
from .losses import faithfulness
from .network import Network

UNFAITHFUL = 0.05
"""The squared error of the sum, as a share of the weights' squared length, above which there is advice."""


@torch.no_grad()
def advice(network: Network, components: Components, config: Config) -> str | None:
    """Describe in one line why a finished run is not faithful, and which settings to change.

    The losses are not scale-free: on another network than the toy models, the minimality loss can outweigh the
    faithfulness loss, a mean over the entries of the weights. The weight that is named makes up for the size of the
    entries: with it, a relative error of the sum costs as much as a minimality loss of the same number.

    Args:
        network: the target with the weights that were decomposed.
        components: C components, without restarts.
        config: the settings of the run.

    Returns:
        str | None: one line, or None if there is nothing to say.
    """
    mean_square = torch.stack([w.square().sum() for w in network.weights.values()]).sum() / components.n_entries
    error = float(faithfulness(components, network.weights) / mean_square)
    own, minimal = (
        max(at_progress(s, t) for t in (0.0, 0.25, 0.5, 0.75, 1.0)) for s in (config.faithfulness, config.minimality)
    )
    if not error > UNFAITHFUL or own == 0:  # without the loss, it was on purpose
        return None
    needed = float(f"{max(10 * own, minimal / float(mean_square)):.1g}")
    return (
        f"the components do not sum to the weights: the squared error is {error:.2g} of the weights' squared length "
        f"(at most {UNFAITHFUL} is well). Raise faithfulness from {own:g} to about {needed:g}; if that is not "
        f"enough, raise steps (now {config.steps}), rank (now {config.rank or 'full'}) or n_components (now "
        f"{config.n_components})"
    )
