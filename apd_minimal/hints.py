"""What to do about input that is refused; no run that begins reads this."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .checks import given


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
