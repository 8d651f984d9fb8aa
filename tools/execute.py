"""Execute chapters from top to bottom and store their outputs in normal form.

    python -m tools.execute                             # all chapters, two at a time
    python -m tools.execute chapters/03_x.ipynb         # one
    python -m tools.execute --normalise chapters/03_x.ipynb   # only its text has changed: keep the outputs

A second run gives the same bytes, so that a diff shows only real changes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import platform
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tools import setup_cell

ROOT = Path(__file__).parent.parent
THREADS = os.environ.get("APD_THREADS", "1")  # another number only to test that nothing depends on it (portable.py)
# Fixes what stored outputs must not depend on: thread count, progress bars, live widgets, hash order.
ENVIRONMENT = {
    "OMP_NUM_THREADS": THREADS,
    "MKL_NUM_THREADS": THREADS,
    "OPENBLAS_NUM_THREADS": THREADS,
    "TQDM_DISABLE": "1",
    "APD_STATIC": "1",
    "PYTHONHASHSEED": "0",
}
KEPT_METADATA = ("tags", "mystnb")
CELL_SECONDS = 1800  # ten times what the longest cell takes
OUTPUT_SECONDS = 60  # for the outputs of a cell that has run: on a busy machine they come late


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.machine()


def _measured(seconds: float, before: dict) -> dict:
    """Return the run time to store; the old one is kept if the new one is within a quarter of it."""
    now = {
        "seconds": max(1, round(seconds)),
        "cores": os.cpu_count(),
        "processor": _processor(),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch").split("+")[0],
    }
    same = {**now, "seconds": before.get("seconds")} == before
    return before if same and abs(seconds - before["seconds"]) <= max(2, before["seconds"] / 4) else now


def normalise(notebook: nbformat.NotebookNode, seconds: float) -> None:
    """Remove what differs between two runs of the same notebook, and store how long the run took.

    Args:
        notebook: executed; changed in place.
        seconds: wall clock of its execution.
    """
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "measured": _measured(seconds, dict(notebook.metadata.get("measured", {}))),
        }
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen: set[str] = set()
    for cell in notebook.cells:
        cell.source = cell.source.rstrip()
        cell.metadata = {k: cell.metadata[k] for k in KEPT_METADATA if cell.metadata.get(k)}
        # The id follows the contents, so that inserting a cell leaves the others' ids alone.
        salt = 0
        while (name := hashlib.sha1(f"{salt}{cell.cell_type}{cell.source}".encode()).hexdigest()[:8]) in seen:
            salt += 1
        seen.add(name)
        cell.id = name
        if cell.cell_type == "code":
            cell.outputs = _merged_streams(cell.outputs)


def _merged_streams(outputs: list) -> list:
    """Merge consecutive pieces of printed text into one output: the pieces depend on timing."""
    merged: list = []
    for output in outputs:
        if output.output_type == "stream" and merged and merged[-1].get("name") == output.name:
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


def execute(path: Path) -> float:
    """Execute one notebook and store it. One that fails is left unchanged.

    Args:
        path: the notebook.

    Returns:
        float: wall clock in seconds.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell raises.
        nbclient.exceptions.CellTimeoutError: if a cell takes too long, or its outputs do not come.
    """
    notebook = nbformat.read(path, as_version=4)
    setup_cell.write(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    start = time.perf_counter()
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        iopub_timeout=OUTPUT_SECONDS,
        raise_on_iopub_timeout=True,
        kernel_name="python3",
        record_timing=False,
        store_widget_state=False,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute(env={**os.environ, **ENVIRONMENT})
    seconds = time.perf_counter() - start
    normalise(notebook, seconds)
    nbformat.validate(notebook)
    path.write_text(nbformat.writes(notebook).rstrip("\n") + "\n")
    return seconds


def renormalise(path: Path) -> float:
    """Store a notebook in normal form without executing it, for a change of its text alone.

    Args:
        path: the notebook, executed.

    Returns:
        float: the stored run time in seconds.
    """
    notebook = nbformat.read(path, as_version=4)
    seconds = notebook.metadata["measured"]["seconds"]
    measured = dict(notebook.metadata["measured"])
    normalise(notebook, seconds)
    notebook.metadata["measured"] = measured
    path.write_text(nbformat.writes(notebook).rstrip("\n") + "\n")
    return seconds


def main() -> int:
    """Execute what the command line names.

    Returns:
        int: how many notebooks failed.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="all chapters if none is named")
    parser.add_argument("--normalise", action="store_true", help="keep the stored outputs, only bring into normal form")
    chosen = parser.parse_args()
    paths = chosen.notebooks or sorted((ROOT / "chapters").glob("*.ipynb"))
    failed = 0
    with ThreadPoolExecutor(2) as pool:
        jobs = {path: pool.submit(renormalise if chosen.normalise else execute, path.resolve()) for path in paths}
        for path, job in jobs.items():
            try:
                print(f"{path.name}: {job.result():.0f} s", flush=True)
            except CellExecutionError as error:
                failed += 1
                print(f"{path.name}: FAILED, left as it was\n{error}", file=sys.stderr, flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
