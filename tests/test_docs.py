"""What the texts name is there: modules, commands and files."""

from __future__ import annotations

import ast
import json
import pkgutil
import re
from collections.abc import Iterator
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


PACKAGE = ROOT / "apd_minimal"
# Modules for users, in which every argument is described; in others a docstring may leave one to its name and type.
FOR_USERS = (
    "components",
    "config",
    "data",
    "losses",
    "rules",
    "selection",
    "store",
    "study",
    "targets",
    "tidy",
    "book",
)
Definition = ast.FunctionDef | ast.ClassDef


def own(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """What belongs to a function itself, without functions inside it."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        yield node
        inner = ast.FunctionDef | ast.ClassDef | ast.Lambda
        waiting += [child for child in ast.iter_child_nodes(node) if not isinstance(child, inner)]


def is_called(function: ast.FunctionDef, *words: str) -> bool:
    """Has it a decorator with one of these words in its name?"""
    return any(word in ast.unparse(one) for one in function.decorator_list for word in words)


def definitions(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, Definition]]:
    """Public classes, functions, methods and properties, by their full names."""
    for one in node.body:
        if isinstance(one, Definition) and not one.name.startswith("_"):
            if isinstance(one, ast.FunctionDef) and is_called(one, "overload"):
                continue
            yield f"{prefix}.{one.name}", one
            if isinstance(one, ast.ClassDef):
                yield from definitions(one, f"{prefix}.{one.name}")


def public() -> dict[str, Definition]:
    found: dict[str, Definition] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if path.name != "__main__.py":
            found |= definitions(ast.parse(path.read_text()), ".".join(parts).removesuffix(".__init__"))
    return found


PUBLIC = public()


def test_what_a_function_raises_stands_in_its_docstring() -> None:
    silent = []
    for name, one in PUBLIC.items():
        if isinstance(one, ast.FunctionDef) and any(isinstance(node, ast.Raise) and node.exc for node in own(one)):
            if not re.search(r"Raises:|[Rr]aise", ast.get_docstring(one) or ""):
                silent.append(name)
    assert not silent


def test_every_argument_is_described() -> None:
    missing = []
    for name, one in PUBLIC.items():
        if name.split(".")[1] not in FOR_USERS:
            continue
        text, function = ast.get_docstring(one) or "", one
        if isinstance(one, ast.ClassDef):
            made = [node for node in one.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
            if not made:
                continue
            function = made[0]
        arguments = function.args  # type: ignore[union-attr]
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        missing += [
            f"{name}: {a}" for a in names if a not in ("self", "cls") and not re.search(rf"\b{re.escape(a)}\b", text)
        ]
    assert not missing


def test_a_property_begins_with_no_colon() -> None:
    """The API page would take the words before it for a type."""
    properties = {
        name: one
        for name, one in PUBLIC.items()
        if isinstance(one, ast.FunctionDef) and is_called(one, "property", "cached_property")
    }
    assert len(properties) > 10
    assert not [name for name, one in properties.items() if ": " in (ast.get_docstring(one) or "").splitlines()[0]]
