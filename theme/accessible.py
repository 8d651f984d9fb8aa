"""Sphinx extension: what a screen reader or a keyboard needs and the theme's pages lack.

Every id stands once on a page, every heading has words, and sources are the items of a list. The search form with a
button is in `templates/`.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

REPEATED = ("exercise-content", "solution-content")  # sphinx-exercise gives these to every exercise and solution


def _unique(app: Sphinx, tree: nodes.document, name: str) -> None:
    for section in tree.findall(nodes.section):
        if section["ids"] and section["ids"][0] in REPEATED:
            section["ids"] = [f"{'-'.join(section.parent['ids'])}-content"]


def _named(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: nodes.document | None) -> None:
    if not context.get("pagetitle"):
        context["pagetitle"] = context.get("title") or "Index"
    # A list may hold nothing but items, and this role, which docutils gives to sources, is none.
    context["body"] = context.get("body", "").replace('role="doc-biblioentry"', 'role="listitem"')


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension.

    Args:
        app: the Sphinx application.

    Returns:
        dict[str, bool]: what Sphinx asks of an extension.
    """
    app.connect("doctree-resolved", _unique)
    app.connect("html-page-context", _named, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
