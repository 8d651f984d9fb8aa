"""Build the pages with warnings as errors, and check the result.

By hand: python -m tools.build [output folder]
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LEFTOVER = re.compile(r"\{(?:glue:\w+|numref|ref|eq|cite:\w|term|runtime|doc|func|class|mod)\}|\$\$|:::")
IMAGES = ("image/png", "image/svg+xml", "image/jpeg", "image/webp")


class _Page(HTMLParser):
    """Contents of a built page: its pictures, and its text outside code."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures: list[dict[str, str]] = []
        self.outputs = 0
        self.text = ""
        self._in_article = False
        self._skipped: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        classes = values.get("class", "").split()
        self.outputs += "cell_output" in classes
        self._in_article |= tag == "article"
        if tag == "img" and self._in_article:
            self.pictures.append(values)
        if tag in ("pre", "code", "script", "style") or "math" in classes:
            self._skipped.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self._in_article &= tag != "article"
        if self._skipped and self._skipped[-1] == tag:
            self._skipped.pop()

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.text += data


def _expected(notebook: dict[str, Any]) -> tuple[int, int]:
    """Count the pictures and the cells with visible outputs that a page made from this notebook shows."""
    pictures = outputs = 0
    for cell in notebook["cells"]:
        tags = set(cell["metadata"].get("tags", []))
        if cell["cell_type"] != "code" or tags & {"remove-cell", "remove-output"}:
            continue
        shown = [out for out in cell["outputs"] if "scrapbook" not in out.get("metadata", {})]
        outputs += bool(shown)
        for out in shown:
            data = out.get("data", {})
            pictures += any(kind in data for kind in IMAGES) or "".join(data.get("text/html", "")).count("<img")
    return pictures, outputs


def problems(site: Path, chapters: list[Path]) -> list[str]:
    """List what is wrong with the built pages.

    Args:
        site: folder of the built HTML.
        chapters: the notebooks.

    Returns:
        list[str]: one line for each problem; empty if there is none.
    """
    lines = []
    pages = {path: _Page() for path in [*site.glob("*.html"), *(site / "chapters").glob("*.html")]}
    for path, page in pages.items():
        html = path.read_text()
        page.feed(html)
        name = path.relative_to(site)
        for picture in page.pictures:
            if not picture.get("alt", "").strip() or picture["alt"].startswith(("../_images", "_images")):
                lines.append(f"{name}: a figure without alt text ({picture.get('src', '')[:60]})")
            source = picture.get("src", "")
            if not source.startswith("data:") and not (path.parent / source).exists():
                lines.append(f"{name}: the figure {source} is missing")
        for mark in ("Traceback (most recent call last)", "ModuleNotFoundError"):
            if mark in html:
                lines.append(f"{name}: holds a traceback")
        for leftover in LEFTOVER.findall(page.text):
            lines.append(f"{name}: {leftover} was not rendered")
    for chapter in chapters:
        built = site / "chapters" / f"{chapter.stem}.html"
        if built not in pages:
            lines.append(f"{chapter.name}: has no page (is it in _toc.yml?)")
            continue
        pictures, outputs = _expected(json.loads(chapter.read_text()))
        page = pages[built]
        if len(page.pictures) != pictures:
            lines.append(f"{chapter.name}: {pictures} figures in the notebook, {len(page.pictures)} on its page")
        if page.outputs != outputs or outputs == 0:
            lines.append(f"{chapter.name}: {outputs} cells with output, {page.outputs} on its page")
    return lines


def build(target: Path) -> Path:
    """Build the book.

    Args:
        target: folder for the build; the pages are in its ``_build/html``.

    Returns:
        Path: the first page.

    Raises:
        subprocess.CalledProcessError: if there was a warning or an error; they have been printed.
    """
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    run = subprocess.run(
        [jupyter_book, "build", "-W", "-n", "--keep-going", "--all", "--path-output", target, "."],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if run.returncode:
        lines = (run.stdout + run.stderr).splitlines()
        print("\n".join(line for line in lines if re.search("WARNING|ERROR|rror:|xception", line)) or "\n".join(lines))
    run.check_returncode()
    return target / "_build" / "html" / "index.html"


def main() -> int:
    """Build, check, and print where to look.

    Returns:
        int: 0 if there is no problem.
    """
    target = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT
    try:
        first = build(target)
    except subprocess.CalledProcessError:
        print("The book was not built: fix the warnings above.")
        return 1
    chapters = sorted((ROOT / "chapters").glob("*.ipynb"))
    if found := problems(first.parent, chapters):
        print("\n".join(found))
        return 1
    pages = len(list(first.parent.glob("**/*.html")))
    print(
        f"{len(chapters)} chapters, {pages} pages: all figures are there and have alt text; nothing is left unrendered."
    )
    print(f"Read the book:              {first.as_uri()}")
    print("Run the algorithm itself:   pip install -e . && python -m apd_minimal")
    return 0


if __name__ == "__main__":
    sys.exit(main())
