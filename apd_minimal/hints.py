"""What to do about input that is refused; a run with top-k reads this only where it refuses or warns."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .checks import given

PARAMETRISED = (
    "is parametrised (weight norm, pruning and the like); decompose the resulting weight: "
    "torch.nn.utils.parametrize.remove_parametrizations(module, {!r}) on a copy of the target, or remove_weight_norm "
    "or prune.remove, where it was made by the older functions"
)
TOO_SMALL = (
    "the weights are {}, in which training would end in NaN: convert the target with target.float() or "
    "target.bfloat16(), and run it under torch.autocast where it must be small"
)
NO_SOURCE = (
    "batches must be a function, batches(step, generator) -> inputs [B, ...], got {}; of a list, or of "
    "items = list(loader) for a DataLoader: lambda step, generator: items[step % len(items)]"
)
NO_THRESHOLD = (
    "there is no threshold above which a component is active: {0}.threshold gives one at the end of a run that did not "
    "break; without, write {0}.active(scores, threshold), which says who is active from each sample's scores alone"
)
NO_SLOPE = (
    "in {} steps, no component had an attribution other than 0, so that nothing is told apart: outputs that are "
    "rounded, or signs, have no slope (pick others with output=), and inputs of zeros reach no weight"
)
NOT_STARTED = "{} has not been started by a run: give the final_selection of a run's result"


def backward(error: Exception) -> str:
    """Say what to do where gradients cannot pass through a target.

    Args:
        error: what autograd says.
    """
    if "inplace" in str(error):
        return "write h = h + u for h += u, or call target.requires_grad_(False), so that layers keep less"
    return "if it uses activation checkpointing, switch that off: recompute=True saves memory, too"


def similar(name: str, known: Iterable[str]) -> str:
    """Suggest names that are known in place of one that is not.

    Args:
        name: as it was given.
        known: the names that there are.
    """
    close = difflib.get_close_matches(name, known := list(known), n=3)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(known[:32])}"


def instead(x: Any) -> str:
    """Say what was given in place of a tensor [B, ...], and what to do about it.

    Args:
        x: what a source of batches gave.
    """
    if isinstance(x, Tensor):
        return f"one of shape {list(x.shape)}"
    what = f"a {type(x).__name__}"
    if isinstance(x, Mapping) and x:
        keys = list(x)
        what, do = f"{what} of {given(keys)}", f"give the entry that is the input, such as batch[{keys[0]!r}]"
    elif isinstance(x, (tuple, list)) and x:
        kinds = given([type(part).__name__ for part in x])
        what, do = f"{what} of {kinds}", "give the part that is the input, such as batch[0] (of samples: torch.stack)"
    elif hasattr(x, "__array__"):
        do = "give torch.as_tensor(batch)"
    elif isinstance(x, Iterable) and not isinstance(x, (str, bytes, Mapping, tuple, list)):
        do = "make a list of its batches once, items = list(loader), and give items[step % len(items)]"
    else:
        return what
    return f"{what}: {do}; wrap a network that takes several tensors in a module that takes one"
