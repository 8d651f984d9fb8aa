"""Sphinx extension: docstrings are plain text with `code` in backticks and indented examples.

reStructuredText would interpret ``|x|``, ``*x`` and ``x_`` as markup, and a single backtick as emphasis.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

CODE = re.compile(r"(:[a-z:]+:`[^`]+`|``[^`]+``|`[^`]+`)")


def _line(line: str) -> str:
    parts = CODE.split(line)
    for i, part in enumerate(parts):
        if i % 2 == 0:
            parts[i] = re.sub(r"([*|]|_(?!\w))", r"\\\1", part)
        elif part[0] == "`" != part[1]:
            parts[i] = f"`{part}`"
    return "".join(parts)


def as_restructured_text(lines: list[str]) -> list[str]:
    """Escape everything that reStructuredText would misread.

    Args:
        lines: a docstring, its common indentation removed.

    Returns:
        list[str]: the same number of lines.
    """
    result = []
    example: int | None = None  # the indentation of the line that announces an indented example
    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if example is not None and (not line.strip() or indent > example):
            result.append(line)
            continue
        example = None
        following = lines[i + 2] if i + 2 < len(lines) and not lines[i + 1].strip() else ""
        opens = line.rstrip().endswith(":") and len(following) - len(following.lstrip()) > indent
        if opens:
            example = indent
        result.append(_line(line) + (":" if opens and not line.rstrip().endswith("::") else ""))
    return result


def _process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = as_restructured_text(lines)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension.

    Args:
        app: the Sphinx application.

    Returns:
        dict[str, bool]: what Sphinx asks of an extension.
    """
    app.connect("autodoc-process-docstring", _process, priority=100)  # before napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}
