"""What the texts name is there: modules, commands and files."""

from __future__ import annotations

import json
import pkgutil
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "intro.md", "data/README.md", "Makefile")]
TEXTS += sorted((ROOT / ".github").rglob("*.*")) + sorted((ROOT / "chapters").glob("*.md"))
TEXTS += sorted((ROOT / "chapters").glob("*.ipynb"))


def prose(path: Path) -> str:
    """A text; of a chapter, its cells without outputs."""
    if path.suffix != ".ipynb":
        return path.read_text()
    return "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"])


def is_there(name: str) -> bool:
    """Is a dotted name a module, or something in one?"""
    try:
        return pkgutil.resolve_name(name) is not None
    except (ImportError, AttributeError):
        return False


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_names_in_texts(path: Path) -> None:
    text = prose(path)
    modules = set(re.findall(r"\bapd_minimal(?:\.[A-Za-z_]\w*)+", text)) - {"apd_minimal.manifest"}
    assert [name for name in sorted(modules) if not is_there(name)] == []
    # Pages know a function by the module that it lies in, not by a shorter name.
    linked = set(
        re.findall(r"\{(?:func|class)\}`~?([\w.]+)\.\w+`", text)
    )  # pages know things by the module they lie in
    assert [name for name in sorted(linked) if not find_spec(name)] == []
    commands = set(re.findall(r"python3? -m ((?:benchmarks|experiments|tools)\.\w+)", text)) - {"experiments.NAME"}
    assert [name for name in sorted(commands) if not is_there(name)] == []
    files = set(re.findall(r"\b(?:apd_minimal|benchmarks|experiments|tests|theme|tools)/[\w/]+\.py\b", text))
    assert [name for name in sorted(files) if not (ROOT / name).exists()] == []
    assert not re.search(r"python3? (?:tools|benchmarks|experiments)/", text), "they run as packages: python -m"
