"""Comparison of what a chapter printed on one processor with what it prints on another.

The text must be equal. Numbers are compared in pairs: whole numbers are counts and must be equal; others may differ by
rounding errors.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

GLUED = "application/papermill.record/text/plain"
COMPARED = "application/papermill.record/compared"
RELATIVE = Decimal("0.01")  # of the larger number
FLOOR = Decimal("1e-12")  # below it, rounding decides
# Not part of a name (float64), a version (2.10.1) or a range (5-7). Includes the spaces before it, as padding.
NUMBER = re.compile(r"[ \t]*(?<![\w.])((?:(?<![\w)\].])[-+−])?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?![\w]|\.\d)")


def _number(text: str) -> Decimal:
    return Decimal(text.replace("−", "-"))


def _close(stored: str, new: str) -> bool:
    """Tell whether two printed numbers agree: equal if both are whole, else within a digit, 1 % or the floor."""
    a, b = _number(stored), _number(new)
    if stored.lstrip("-+−").isdigit() and new.lstrip("-+−").isdigit():
        return a == b
    # One unit of the last digit, by the more precise of the two: 0.1 and 0.099 differ by 0.001.
    digit = Decimal(1).scaleb(min(int(a.as_tuple().exponent), int(b.as_tuple().exponent)))
    if "e" in (stored + new).lower() and not (a and b):
        digit = FLOOR  # a number with an exponent keeps its digits and does not round to 0
    return abs(a - b) <= max(digit, RELATIVE * max(abs(a), abs(b)), FLOOR)


def agree(stored: str, new: str) -> bool:
    """Tell whether two outputs are equal up to rounding.

    Args:
        stored: the output in the notebook.
        new: the output of the same cell, run again.

    Returns:
        bool: whether their texts are equal and their numbers agree: whole numbers exactly, others within one unit of
        the last printed digit, 1 % of the larger, or 1e-12.
    """
    if stored == new:
        return True
    if NUMBER.sub("0", stored) != NUMBER.sub("0", new):
        return False
    return all(map(_close, NUMBER.findall(stored), NUMBER.findall(new)))


def compared(output: Any) -> Any:
    """Of a glued number, which is stored with all its digits, keep those that do not depend on the machine.

    Args:
        output: one output of a cell.

    Returns:
        Any: a copy with them in place of the number; other outputs as they are.
    """
    data = output.get("data", {})
    if COMPARED not in data:
        return output
    digits = type(data)({GLUED: data[COMPARED]})
    return type(output)({**output, "data": digits})


class Printed(str):
    """An output that equals another one if they `agree`: nbval compares with ``!=``."""

    def __eq__(self, other: object) -> bool:
        """Tell whether the two agree; what is no text is never equal."""
        return isinstance(other, str) and agree(str(self), str(other))

    def __ne__(self, other: object) -> bool:
        """Tell whether the two do not agree."""
        return not self == other

    __hash__ = str.__hash__
