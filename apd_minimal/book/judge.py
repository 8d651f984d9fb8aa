"""Compare the function that a reader wrote with the right one, and say in words which mistake it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EMPTY = "Not filled in yet. Put your code in place of the three dots, and run the cell again."


@dataclass(frozen=True)
class Verdict:
    """What a check found. It counts as true if the answer is right, and shows as its words."""

    right: bool
    words: str

    def __bool__(self) -> bool:
        """Tell whether the answer is right."""
        return self.right

    def __repr__(self) -> str:
        """Return the words: what a notebook shows."""
        return self.words


def judge(
    answer: Callable[..., Any],
    inputs: Sequence[tuple[Any, ...]],
    right: Callable[..., Tensor],
    mistakes: Mapping[str, Callable[..., Tensor]],
    praise: str,
) -> Verdict:
    """Compare a function with the right one on some inputs, and say what is wrong.

    Args:
        answer: the reader's function.
        inputs: the arguments of each call. The reader's function gets copies of the tensors.
        right: the same function by definition.
        mistakes: words for each known mistake, with a function that makes it.
        praise: what to say if all is right.

    Returns:
        Verdict: right or not, and in words why.
    """
    for given in inputs:
        got = answer(*(value.clone() if isinstance(value, Tensor) else value for value in given))
        if got is None or got is ...:
            return Verdict(False, EMPTY)
        wanted = right(*given)
        try:
            got = torch.as_tensor(got).detach().to(wanted.dtype)
        except (TypeError, ValueError, RuntimeError):
            return Verdict(False, f"Not yet: a tensor {list(wanted.shape)} is expected, not a {type(got).__name__}.")
        if _same(got, wanted):
            continue
        for words, wrong in mistakes.items():
            if _same(got, wrong(*given).to(wanted.dtype)):
                return Verdict(False, "Not yet: " + words)
        return Verdict(False, "Not yet: " + _difference(got, wanted))
    return Verdict(True, "Right. " + praise)


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, rtol=1e-4, atol=1e-6)


def _difference(got: Tensor, wanted: Tensor) -> str:
    if got.shape != wanted.shape:
        return f"the answer has the shape {list(got.shape)}, and {list(wanted.shape)} is expected."
    if not got.isfinite().all():
        return "the answer has entries that are not finite."
    where = torch.unravel_index((got - wanted).abs().flatten().argmax(), got.shape)
    place = [int(i) for i in where]
    at = f" at {place}" if place else ""
    return f"the shape is right, a value is not. You have {got[where]:.3g}{at}, and {wanted[where]:.3g} is expected."
