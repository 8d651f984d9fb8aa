"""Run every check, print how long each part took, and end with one line that counts them all."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from tools.execute import CELL_SECONDS, ENVIRONMENT

ROOT = Path(__file__).parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider"]
BOOK_TEST = "tests/test_book.py"
NBVAL = ["--nbval", "--nbval-current-env", "--nbval-sanitize-with", "tests/nbval.cfg",
         "--nbval-cell-timeout", str(CELL_SECONDS), "--nbval-kernel-startup-timeout", "300",
         "--dist", "loadfile"]  # fmt: skip


def parts() -> dict[str, list[str]]:
    """List the parts in the order in which they run.

    Returns:
        dict[str, list[str]]: name to command.
    """
    own = ["apd_minimal", "benchmarks", "experiments", "tests", "tools", "theme"]
    chapters = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "chapters").glob("*.ipynb"))
    return {
        "ruff": [sys.executable, "-m", "ruff", "check", "--no-cache", "."],
        "ruff format": [sys.executable, "-m", "ruff", "format", "--check", "--no-cache", *own],
        "mypy": [sys.executable, "-m", "mypy"],
        "module": [*PYTEST, "tests", "--ignore", BOOK_TEST],
        "chapters": [*PYTEST, *NBVAL, *chapters],
        "pages": [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", BOOK_TEST],
    }  # fmt: skip


def counted(output: str, ok: bool) -> tuple[int, int, int]:
    """Count passed, failed and skipped in pytest's closing line; a tool without one counts as one check.

    Args:
        output: what the part printed.
        ok: whether it ended with 0.

    Returns:
        tuple[int, int, int]: passed, failed (errors count as failed), skipped.
    """
    closing = [line for line in output.splitlines() if re.search(r"\d+ (passed|failed|skipped|error).* in ", line)]
    if not closing:
        return int(ok), int(not ok), 0
    numbers = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", closing[-1])}
    failed = numbers.get("failed", 0) + numbers.get("error", 0)
    return numbers.get("passed", 0), failed or int(not ok), numbers.get("skipped", 0)


def main() -> int:
    """Run the parts one after the other, all of them even if one fails.

    Returns:
        int: 0 if nothing failed.
    """
    rows, total = [], [0, 0, 0]
    for name, command in parts().items():
        print(f"--- {name}", flush=True)
        start = time.perf_counter()
        run = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert run.stdout is not None
        output = ""
        for line in run.stdout:
            print(line, end="", flush=True)
            output += line
        numbers = counted(output, run.wait() == 0)
        total = [a + b for a, b in zip(total, numbers, strict=True)]
        rows.append(f"{name:12} {time.perf_counter() - start:6.0f} s   {'ok' if not numbers[1] else 'FAILED'}")
    print("\n" + "\n".join(rows))
    print(f"{total[0]} passed, {total[1]} failed, {total[2]} skipped")
    return int(total[1] > 0)


if __name__ == "__main__":
    sys.exit(main())
