"""The package stays compact: what a plain run reads, what the method is, and how long a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import apd_minimal

PACKAGE = Path(apd_minimal.__file__).parent
# What must be read to understand the method on any network: one sitting.
METHOD = [
    *"components rules sites mixture network selection losses batch train loop algorithm outcome config".split(),
    "attributions/gradients",
]
PLAIN_RUN = """
import sys, torch, apd_minimal
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.ReLU(), torch.nn.Linear(3, 5))
apd_minimal.decompose(net, lambda step, g: torch.rand(8, 5, generator=g), ["0.weight"], 5, 1, steps=2, progress=False,
                      tidy_every=0.0, scrub=0.0)
print(*sorted(m.__file__ for n, m in sys.modules.items() if n.startswith("apd_minimal") and m.__file__), sep="\\n")
"""


def code_lines(path: Path) -> int:
    """Lines that are neither blank nor comment nor docstring."""
    source = path.read_text()
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node) is not None:  # type: ignore[arg-type]
            first = node.body[0]  # type: ignore[attr-defined]
            left_out |= set(range(first.lineno, first.end_lineno + 1))
    return sum(
        number not in left_out and bool(line.strip()) and not line.strip().startswith("#")
        for number, line in enumerate(source.splitlines(), 1)
    )


def test_the_lines_of_code_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text(
        '"""Text.\n\nMore."""\n\nx = 1  # why\n# no\n\n\ndef f():\n    """One line."""\n    return """two\nlines"""\n'
    )
    assert code_lines(path) == 4


def test_no_file_is_long() -> None:
    long = {str(path.relative_to(PACKAGE)): n for path in PACKAGE.rglob("*.py") if (n := code_lines(path)) > 250}
    assert not long, f"files of more than 250 lines of code: {long}"


def test_the_method_fits_in_one_sitting() -> None:
    lines = {name: code_lines(PACKAGE / f"{name}.py") for name in METHOD}
    assert sum(lines.values()) <= 1_555, lines


def test_a_plain_run_loads_what_it_needs() -> None:
    """Besides the method: checks of the input, other kinds of uses, and what makes attributions fast."""
    done = subprocess.run([sys.executable, "-c", PLAIN_RUN], capture_output=True, text=True, check=True)
    lines = {str(Path(file).relative_to(PACKAGE)): code_lines(Path(file)) for file in done.stdout.split()}
    assert sum(lines.values()) <= 2_880, sorted(lines.items(), key=lambda item: -item[1])
    rooms = ("study", "book", "targets", "tidy", "scale", "attributions/shapley", "checkpoint", "store")
    assert not [name for name in lines if name.startswith(rooms)]
