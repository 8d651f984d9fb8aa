"""Sphinx extension: the directive ``{printed}``, a sentence with a link to the whole book as a PDF, if there is one.

``make pdf`` makes it (tools/pdf.py). Pages built without it do not speak of it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

NAME = "book.pdf"
PLACE = Path("_build", "pdf", NAME)  # in the root of the repository


class Printed(SphinxDirective):
    """The sentence."""

    def run(self) -> list[nodes.Node]:
        if self.env.app.builder.name != "html" or not (Path(self.env.srcdir) / PLACE).exists():
            return []
        link = nodes.reference("", "PDF", refuri=NAME)
        return [nodes.paragraph("", "", nodes.Text("To print it, take the whole book as a "), link, nodes.Text("."))]


def _copy(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.name == "html" and (made := Path(app.srcdir) / PLACE).exists():
        shutil.copy(made, Path(app.outdir) / NAME)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive.

    Args:
        app: the Sphinx application.

    Returns:
        dict[str, bool]: what Sphinx asks of an extension.
    """
    app.add_directive("printed", Printed)
    app.connect("build-finished", _copy)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
