"""Sphinx extension: pages generated from results stored in the notebooks.

``{claims}`` is the ledger: every claim of claims.yml with the verdict of a chapter's cell, and a link to it.
``{runtimes}`` lists the time of each chapter's last execution; the role ``{runtime}`` gives it for one chapter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective, SphinxRole

CLAIM = "apd_claim"  # key under which apd_minimal.book.glue.claim stores it in an output's metadata


def stored_claims(notebook: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Iterate over the claims that a notebook settles.

    Args:
        notebook: parsed ``.ipynb``.

    Yields:
        tuple[dict[str, Any], str]: what :func:`apd_minimal.book.glue.claim` stored, and the heading above it.
    """
    heading = ""
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            outside_code = re.sub(r"(?s)^(`{3,}|:{3,}).*?^\1", "", text, flags=re.MULTILINE)
            heading = [heading, *re.findall(r"^#{1,3} +(.+?)\s*$", outside_code, re.MULTILINE)][-1]
        for output in cell.get("outputs", []):
            if CLAIM in output.get("metadata", {}):
                yield output["metadata"][CLAIM], heading


def spoken(seconds: float) -> str:
    """Put a run time into words, with no more digits than are meaningful.

    Args:
        seconds: at least 0.

    Returns:
        str: for example "about 40 s" or "about 2 minutes".
    """
    if seconds < 10:
        return "under 10 s"
    if seconds < 90:
        return f"about {round(seconds, -1):.0f} s"
    half_minutes = round(seconds / 30) / 2
    return f"about {half_minutes:g} minutes"


def _literal(text: str) -> str:
    """Escape plain text so that MyST shows it literally, in a table too: a norm has bars."""
    return re.sub(r"([\\|*_`$<\[])", r"\\\1", text)


def _slug(heading: str) -> str:
    """Compute the anchor that MyST gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _chapters(env: BuildEnvironment) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Iterate over the notebooks of the book in the order of its table of contents."""
    found = [Path(env.doc2path(name)) for name in sorted(env.found_docs)]
    for path in (p for p in found if p.suffix == ".ipynb"):
        env.note_dependency(str(path))
        yield path, json.loads(path.read_text())


def _title(notebook: dict[str, Any]) -> str:
    text = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    return re.search(r"^# +(.+)$", text, re.MULTILINE)[1]  # type: ignore[index]


class _FromMarkdown(SphinxDirective):
    """A directive whose content is MyST text generated from the notebooks."""

    boxed = False  # in a box, so that the style sheet knows it

    def text(self) -> str:
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        box = nodes.container(classes=[f"book-{self.name}"])
        source, _ = self.get_source_info()
        self.state.nested_parse(StringList(self.text().splitlines(), source), 0, box)
        return [box] if self.boxed else box.children


class Claims(_FromMarkdown):
    """The ledger."""

    boxed = True

    def text(self) -> str:
        ledger_file = Path(self.env.srcdir) / "chapters" / "claims.yml"
        self.env.note_dependency(str(ledger_file))
        ledger = yaml.safe_load(ledger_file.read_text())
        rows: dict[int, list[str]] = {}
        for path, notebook in _chapters(self.env):
            for record, heading in stored_claims(notebook):
                if record["number"] not in ledger:
                    raise self.error(f"{path.name} settles claim {record['number']}, which claims.yml does not have")
                link = f"[{_title(notebook)}]({path.name}#{_slug(heading)})"
                rows.setdefault(record["number"], []).append(
                    f"**{record['verdict']}** | {_literal(record['finding'])} {link}"
                )
        lines = ["| no. | the claim | verdict | what was found, and where |", "|---|---|---|---|"]
        for number, claim in ledger.items():
            for row in rows.get(number, ["not settled yet | no chapter measures it so far"]):
                lines.append(f"| {number} | {claim} | {row} |")
        return "\n".join(lines)


class Runtimes(_FromMarkdown):
    """The table of run times."""

    def text(self) -> str:
        lines = ["| chapter | wall clock | measured with |", "|---|---|---|"]
        total = 0
        for path, notebook in _chapters(self.env):
            if measured := notebook["metadata"].get("measured"):
                total += measured["seconds"]
                where = f"Python {measured['python']}, torch {measured['torch']}, {measured['processor']}"
                lines.append(f"| [{_title(notebook)}]({path.name}) | {measured['seconds']} s | {where} |")
        return "\n".join([*lines, f"| all chapters, one after the other | {total} s | |"])


class Runtime(SphinxRole):
    """``{runtime}`01_five_minutes` ``: the measured time of one chapter, in words."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        path = Path(self.env.srcdir) / "chapters" / f"{self.text}.ipynb"
        self.env.note_dependency(str(path))
        try:
            words = spoken(json.loads(path.read_text())["metadata"]["measured"]["seconds"])
        except (OSError, KeyError) as error:
            message = self.inliner.reporter.error(f"no measured time for chapter {self.text!r}: {error}")
            return [self.inliner.problematic(self.rawtext, self.rawtext, message)], [message]
        return [nodes.inline(words, words)], []


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives and the role.

    Args:
        app: the Sphinx application.

    Returns:
        dict[str, bool]: what Sphinx asks of an extension.
    """
    app.add_directive("claims", Claims)
    app.add_directive("runtimes", Runtimes)
    app.add_role("runtime", Runtime())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
