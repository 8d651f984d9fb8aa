"""The Sphinx extensions: docstrings as plain text, and a module that imports without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from docutils.core import publish_doctree
from docutils.nodes import literal, literal_block
from hypothesis import given
from hypothesis import strategies as st

from theme import docstrings

ROOT = Path(__file__).parent.parent
QUIET = {"report_level": 5, "halt_level": 6}
WORDS = st.sampled_from(["a", "|A|", "*x", "**k", "x_", "_x", "a_b", "W^T", "|a|_p", "*a*", "is", "[B, C]", "x|y"])


@given(st.lists(WORDS, min_size=1, max_size=8))
def test_plain_text_stays_what_it_is(words: list[str]) -> None:
    """The oracle is docutils: what it reads back is what was written."""
    text = "The " + " ".join(words)
    tree = publish_doctree("\n".join(docstrings.as_restructured_text([text])), settings_overrides=QUIET)
    assert tree.astext() == text


def test_code_and_examples() -> None:
    lines = ["Use `a*b` and ``c_`` here:", "", "    @rule.register", "    x_ = |y|", "", "Then |z|."]
    tree = publish_doctree("\n".join(docstrings.as_restructured_text(lines)), settings_overrides=QUIET)
    assert [node.astext() for node in tree.findall(literal)] == ["a*b", "c_"]
    assert [node.astext() for node in tree.findall(literal_block)] == ["@rule.register\nx_ = |y|"]
    assert tree.astext().endswith("Then |z|.")


def test_roles_are_left_alone() -> None:
    line = "See :func:`apd_minimal.book.frames.live` or |x|."
    assert docstrings.as_restructured_text([line]) == [line.replace("|x|", r"\|x\|")]


@pytest.mark.parametrize("hidden", [True, False])
def test_module_imports_with_stand_ins(hidden: bool) -> None:
    """As where the pages are built: not one of the libraries is there."""
    program = f"""
import importlib, pathlib, sys
sys.path[:0] = ["."]
from theme import standins
if {hidden}:
    sys.meta_path.insert(0, standins._Finder(list(standins.NAMES)))
for path in sorted(pathlib.Path("apd_minimal").rglob("[!_]*.py")):
    importlib.import_module(".".join(path.with_suffix("").parts))
assert isinstance(importlib.import_module("torch"), standins._Module) == {hidden}
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
