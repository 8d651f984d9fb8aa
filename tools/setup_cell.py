"""Write the hidden first code cell of every chapter, from the one public address in _config.yml.

After the address has changed: python -m tools.setup_cell
"""

from __future__ import annotations

from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).parent.parent
TAGS = ["remove-cell", "setup"]

INSTALL = """\
import importlib.util
import os

os.environ.setdefault("APD_DATA_URL", "{data}")
if importlib.util.find_spec("apd_minimal") is None:
    %pip install -q "{requirement}"

from apd_minimal.book import notebook

notebook.setup()
"""
NO_ADDRESS = """\
from apd_minimal.book import notebook  # not installed? In the book's folder: pip install -e '.[book]'

notebook.setup()
"""


def source(repository: str, branch: str, requirement: str | None = None, data: str | None = None) -> str:
    """Build the cell's text.

    Args:
        repository: the public address, empty while there is none.
        branch: the branch that readers get.
        requirement: the requirement that pip installs, if not the repository itself.
        data: the address of the data folder, if not that of the repository.

    Returns:
        str: Python source.
    """
    if not repository:
        return NO_ADDRESS.strip()
    raw = repository.rstrip("/").replace("//github.com/", "//raw.githubusercontent.com/")
    return INSTALL.format(
        requirement=requirement or f"apd_minimal[book] @ git+{repository}@{branch}",
        data=data or f"{raw}/{branch}/data/",
    ).strip()


def configured() -> str:
    """Build the cell's text for the address in _config.yml.

    Returns:
        str: Python source.
    """
    repository = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]
    return source(repository["url"] or "", repository["branch"])


def write(notebook: nbformat.NotebookNode) -> None:
    """Put the cell into a notebook, after its opening text cell, in place of an existing one.

    Args:
        notebook: changed in place.
    """
    for cell in notebook.cells:
        if "setup" in cell.metadata.get("tags", []):
            if cell.source != configured():
                cell.source, cell.outputs, cell.execution_count = configured(), [], None
            return
    notebook.cells.insert(1, nbformat.v4.new_code_cell(configured(), metadata={"tags": list(TAGS)}))


if __name__ == "__main__":
    for path in sorted((ROOT / "chapters").glob("*.ipynb")):
        chapter = nbformat.read(path, as_version=4)
        write(chapter)
        path.write_text(nbformat.writes(chapter).rstrip("\n") + "\n")
    print("The set-up cells are written; run 'make run' if a text changed.")
