"""What all attributions expect of their arguments, and promise of what they give."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import checks
from ..components import usable

Function = TypeVar("Function", bound=Callable[..., Any])
FLAGS = ("per_output", "per_position", "remainder", "return_convergence_delta", "return_std_error")
COUNTS = ("internal_batch_size", "n_probes")  # or None


def checked(function: Function) -> Function:
    """Check the arguments of an attribution, run it outside of inference mode, and check that it gave finite numbers.

    Raises:
        TypeError: an argument of another kind.
        ValueError: an empty batch, numbers out of range, inputs on which the target does not run, results that are
            NaN or infinite.
    """

    @functools.wraps(function)
    def wrapped(target: Any, components: Any, x: Any, **options: Any) -> Any:
        for name, value in options.items():
            if name in FLAGS:
                options[name] = checks.flag(name, value)
            elif name in COUNTS and value is not None:
                options[name] = checks.number(name, value, 1, whole=True)
        checks.generator(options.get("generator"))
        components, x = usable(components), checks.inputs(x)
        with torch.inference_mode(False):
            components, x = components.map(_usual), _usual(x)
            with checks.running(x, f"components of {components.parameters()[0].dtype}"):
                found = function(target, components, x, **options)
        for t in found if isinstance(found, tuple) else (found,):
            if not t.isfinite().all():
                raise checks.NotFinite(
                    f"the attributions are NaN or infinite: so are the outputs or the derivatives of the target on x, "
                    f"{checks.given(x)}"
                )
        return found

    return wrapped  # type: ignore[return-value]


def _usual(t: Tensor) -> Tensor:
    """Autograd does not work with tensors of inference mode."""
    return t.clone() if t.is_inference() else t
