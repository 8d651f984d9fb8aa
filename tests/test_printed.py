"""The comparison of a chapter's outputs: what rounding may change, and what it may not."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.printed import Printed, agree

pytest_plugins = ["pytester"]


@pytest.mark.parametrize(
    ("stored", "new"),
    [
        ("loss 0.44", "loss 0.45"),  # one unit of the last digit
        ("loss 0.1", "loss 0.099"),  # three digits on the edge of two
        ("loss 1e-05", "loss 9.9e-06"),
        ("loss 1", "loss 0.998"),  # :.3g
        ("loss 2.501", "loss 2.523"),  # 1 %
        ("error 2.2e-15", "error 3.8e-13"),  # both below the floor
        ("error 5.2e-17", "error 0.0"),
        ("[ 0.0, 1]", "[-0.0, 1]"),
        ("a   9.99 b", "a  10.00 b"),  # columns are as wide as their numbers
        ("x = −0.44", "x = −0.43"),  # typographic minus
        ('<td title="0.44">0.44</td>', '<td title="0.45">0.44</td>'),
        ("'0.44 of 5'", "'0.45 of 5'"),
    ],
)
def test_rounding_may_change(stored: str, new: str) -> None:
    assert agree(stored, new) and agree(new, stored)
    assert Printed(stored) == Printed(new) and not Printed(stored) != Printed(new)


@pytest.mark.parametrize(
    ("stored", "new"),
    [
        ("5 of 5", "4 of 5"),
        ("1000 steps", "1001 steps"),
        ("(5, 3)", "(5, 4)"),
        ("x1", "x2"),
        ("float32", "float64"),
        ("version 2.10.1", "version 2.10.2"),
        ("5-7", "5-8"),
        ("loss 0.44", "loss 0.46"),
        ("loss 0.5", "loss 0.52"),
        ("loss 2.501", "loss 2.552"),
        ("loss 0.44", "loss -0.44"),
        ("loss −0.44", "loss 0.44"),
        ("error 1e-11", "error 3e-11"),
        ("error 1e-11", "error 0.0"),
        ("loss 0.44", "loss nan"),
        ("loss 0.44", "cost 0.44"),
        ("loss 0.44", "loss 0.44 0.44"),
        ("True 0.44", "False 0.44"),
        ("a\n0.44", "a 0.44"),
        ('<td class="a">0.44</td>', '<td class="b">0.44</td>'),
        ("below 1e-12", "2e-12"),
    ],
)
def test_rounding_may_not_change(stored: str, new: str) -> None:
    assert not agree(stored, new) and not agree(new, stored)
    assert Printed(stored) != Printed(new) and not Printed(stored) == Printed(new)


@given(
    st.floats(-1e6, 1e6, allow_nan=False),
    st.floats(-1e-9, 1e-9),
    st.sampled_from([".1f", ".2f", ".3f", ".2e", ".3g", ".2g"]),
)
def test_the_last_bits_never_matter_and_a_twentieth_always_does(x: float, change: float, form: str) -> None:
    def text(value: float) -> str:
        return f"loss {value:{form}}, {value!r}"

    assert agree(text(x), text(x * (1 + change)))
    assert agree(text(x), text(x * 1.05)) == (abs(x) <= 2e-11), "the number in full has the digits to show it"


@given(st.integers(), st.integers())
def test_whole_numbers_are_equal_or_not(a: int, b: int) -> None:
    assert agree(f"{a} of {b}", f"{b} of {b}") == (a == b)


def _chapter(path: Path, source: str, stored: str, glued: dict[str, str]) -> None:
    output = nbformat.v4.new_output("stream", name="stdout", text=stored)
    cells = [
        nbformat.v4.new_code_cell(f"print({source!r})", outputs=[output], execution_count=1),
        nbformat.v4.new_code_cell(
            "from apd_minimal.book.glue import glue\nglue('x', 0.123456, digits=2)",
            outputs=[nbformat.v4.new_output("display_data", glued)],
            execution_count=2,
        ),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


PREFIX = "application/papermill.record/"


@pytest.mark.parametrize(
    ("stored", "glued", "right"),
    [
        ("5 of 5: 0.44", ("0.123456", "0.12"), (True, True)),
        ("5 of 5: 0.44", ("0.1264", "0.13"), (True, True)),  # as many digits as are the same on every machine
        ("5 of 5: 0.44", ("0.12",), (True, True)),  # stored by an earlier version
        ("4 of 5: 0.45", ("0.1351", "0.14"), (False, False)),
        ("5 of 5: 0.54", ("0.14",), (False, False)),
        ("5 of 6", ("0.123456",), (False, False)),
    ],
)
def test_nbval_compares_so(
    pytester: pytest.Pytester, stored: str, glued: tuple[str, ...], right: tuple[bool, bool]
) -> None:
    """The chapters' own conftest on a notebook that prints and glues."""
    root = Path(__file__).parent.parent
    pytester.makeini(f"[pytest]\npythonpath = {root}\n")
    pytester.makeconftest((root / "conftest.py").read_text())
    _chapter(
        pytester.path / "x.ipynb",
        "5 of 5: 0.45",
        stored + "\n",
        dict(zip((PREFIX + "text/plain", PREFIX + "compared"), glued, strict=False)),
    )
    result = pytester.runpytest_subprocess("--nbval", "--nbval-current-env", "-p", "no:cacheprovider", "x.ipynb")
    result.assert_outcomes(passed=sum(right), failed=2 - sum(right))
