"""How much does each component matter on each input? Six answers (chapter 4, and part III).

Every one takes (target, components, x) and gives scores [B, C], or [restarts, B, C]: the root mean square over outputs.
`per_output=True` gives the signed values [B, C, n_out] instead, and only these add up: completeness of integrated
gradients and efficiency of Shapley values hold for each output by itself, not for the root mean square. (`activation`
knows nothing of outputs.) `decompose(attribution=...)` takes any of them, with options through functools.partial, or a
function of your own::

    decompose(..., attribution=partial(apd.attributions.integrated_gradients, n_steps=8))

`remainder` says what the components are removed from. With it, theta* - sum_c P_c always stays, so that all components
together are the target (`gradient` says at="target"). Without it they are the component model (at="components"), and
without any of them the decomposed weights are zero.

What each costs, for C components, in runs of the network on the whole batch. A run at other gates has weights of its
own; since the target's own product is worked out beside it, it costs about two plain ones::

    gradient              1 forward, n_out backward (or C tangents forward, if these are fewer)
    integrated_gradients  that, n_steps times; the components are met only once
    ablation              C + 1 forward
    shapley               n_samples (C - 1) + 2 forward, or 2^C for all coalitions
    path_shapley          as gradient, n_samples times; the components are met only once
    activation            1 forward

`inner_activation` is none of the six: it is signed, and says nothing of outputs. Learned importances look at it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .gradients import MODES, Attribution, gradient

if TYPE_CHECKING:
    from .ablations import ablation
    from .activations import activation, inner_activation
    from .integrated import METHODS, integrated_gradients
    from .shapley_values import path_shapley, shapley

__all__ = [
    "METHODS",
    "MODES",
    "Attribution",
    "ablation",
    "activation",
    "gradient",
    "inner_activation",
    "integrated_gradients",
    "path_shapley",
    "shapley",
]

# A run with gradients does not need the others: they are loaded when they are first asked for.
_LATER = {
    "METHODS": "integrated",
    "ablation": "ablations",
    "activation": "activations",
    "inner_activation": "activations",
    "integrated_gradients": "integrated",
    "path_shapley": "shapley_values",
    "shapley": "shapley_values",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    return found
