"""Measured numbers for the prose, and verdicts on claims, stored as notebook outputs.

The book's pages read both from these outputs. Nothing here needs the book's tools, so that a notebook runs unchanged
in Colab.
"""

from __future__ import annotations

import math
from typing import Any

from IPython.display import display

from .. import checks

GLUE_PREFIX = "application/papermill.record/"  # the prefix that myst-nb's glue looks for; notebooks do not display it
COMPARED = GLUE_PREFIX + "compared"  # beside the value: what must agree when the cell runs on another machine
CLAIM = "apd_claim"  # key in an output's metadata
VERDICTS = ("holds", "holds within limits", "does not hold", "cannot be tested here", "open so far")


class _Number(float):
    """A float that a format rounds, once; without a format it shows four significant digits."""

    def __format__(self, form: str) -> str:
        return super().__format__(form) if form else f"{float(f'{self:.4g}')}"


def _plain(value: Any) -> Any:
    """Convert a number to a Python value: repr(np.float64(1)) is no number."""
    # A numpy scalar, or a tensor or array with one entry.
    if hasattr(value, "item") and math.prod(getattr(value, "shape", (2,))) == 1:
        value = value.item()
    return value


def glue(name: str, value: Any, digits: int = 4) -> None:
    """Store a value under a name, for ``{glue:text}`` in the prose. Shows nothing in the notebook.

    All digits of a float are stored, so that the format in the prose is the only rounding, as in a printed table.

    Args:
        name: unique within its notebook.
        value: number, bool or text; a tensor or array with one entry counts as a number.
        digits: significant digits of a float that do not depend on the machine. Only these are compared when the cell
            runs again.

    Raises:
        TypeError: if the value is none of these.
        ValueError: if ``digits`` is below 1.
    """
    checks.kind("name", name, str, "text")
    value, digits = _plain(value), checks.number("digits", digits, 1, whole=True)
    if not isinstance(value, (bool, int, float, str)):
        raise TypeError(f"glue({name!r}, value) got a {type(value).__name__}; expected a number, a bool or text")
    data = {GLUE_PREFIX + "text/plain": repr(value)}
    if isinstance(value, float):
        data[COMPARED] = repr(float(f"{value:.{digits}g}"))
    display(data, raw=True, metadata={"scrapbook": {"name": name, "mime_prefix": GLUE_PREFIX}})


def floored(value: Any, digits: int = 1, floor: float = 1e-12) -> str:
    """Format a number that may be at rounding level: another processor would show other digits.

    Args:
        value: number; a tensor or array with one entry counts as one.
        digits: significant digits.
        floor: upper bound on rounding errors, with a margin.

    Returns:
        str: ``below 1e-12`` if the number is smaller than that in size, else the number, such as ``3.2e-07``.

    Raises:
        TypeError: if the value is not one number.
        ValueError: if ``digits`` is below 1 or ``floor`` negative.
    """
    value = checks.plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"value must be a number, got {checks.given(value)}")
    digits, floor = checks.number("digits", digits, 1, whole=True), checks.number("floor", floor, 0)
    return f"below {floor:g}" if abs(value) < floor else f"{value:.{digits - 1}e}"


def claim(number: int, verdict: str, finding: str, **numbers: float | int | str | bool) -> None:
    """Settle a claim of the ledger: show the verdict in the notebook, and store it for the ledger page.

    Args:
        number: the claim's number in the ledger.
        verdict: one of ``VERDICTS``; "open so far" where a chapter measured something on a claim, but not all of it.
        finding: one sentence on what was measured, with ``{name}`` where a number belongs (``{name:.3f}`` formats;
            without a format a float shows four significant digits).
            Say over how many seeds.
        **numbers: the measured values, each named once in ``finding``.

    Raises:
        TypeError: if the finding is no text.
        ValueError: if the verdict is unknown, a number is missing from the sentence, or the sentence names one that
            was not given.
    """
    number = checks.number("number", number, 1, whole=True)
    checks.kind("finding", finding, str, "a sentence")
    if not isinstance(verdict, str) or verdict not in VERDICTS:
        raise ValueError(f"verdict {verdict!r} for claim {number}; expected one of {', '.join(map(repr, VERDICTS))}")
    values = {name: _plain(value) for name, value in numbers.items()}
    unused = [name for name in values if "{" + name not in finding]
    if unused:
        raise ValueError(f"claim {number}: the finding does not mention {', '.join(unused)}")
    try:
        sentence = finding.format(
            **{name: _Number(value) if isinstance(value, float) else value for name, value in values.items()}
        )
    except (KeyError, IndexError) as error:
        raise ValueError(f"claim {number}: the finding names {error}, which was not given") from None
    record = {"number": number, "verdict": verdict, "finding": sentence, "numbers": values}
    display({"text/plain": f"Claim {number}: {verdict}. {sentence}"}, raw=True, metadata={CLAIM: record})
