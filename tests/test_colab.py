"""A chapter as on Colab: torch is there, the module is not; the chapter runs alone in an empty folder.

A fresh environment sees this one's torch and notebook packages. The wheel built from the repository stands in for the
public address, a server on this machine for its data folder.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import sysconfig
import threading
import venv
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nbformat
import pytest

from tools import setup_cell

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
# What Colab does not have: it must come with the module, or the first cell fails.
ABSENT = {"apd_minimal", "einops", "pooch"}


@pytest.fixture(scope="module")
def data_server() -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(ROOT / "data")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)],
        check=True,
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def colab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with this one's packages, but for those that Colab lacks."""
    folder = tmp_path_factory.mktemp("colab")
    venv.create(folder, with_pip=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # One link for each installed file or folder: a package that is left out is really not there.
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        left_out = entry.name.split("-")[0].lower() in ABSENT or entry.suffix == ".pth"  # those lead back here
        if not left_out and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


def run(python: Path, folder: Path, *arguments: str) -> str:
    """Runs Python in a folder that is home and working directory at once, without this machine's settings."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("APD_", "PYTHON", "XDG_"))}
    clean |= {"HOME": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([python, *arguments], cwd=folder, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_wheel_holds_what_a_chapter_needs(wheel: Path) -> None:
    import zipfile

    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"apd_minimal/py.typed", "apd_minimal/figures.mplstyle", "apd_minimal/manifest.json"} <= names
    assert not [name for name in names if name.startswith(("tests", "chapters", "data"))]


def installed(colab: Path, folder: Path) -> dict[str, str]:
    rows = json.loads(run(colab, folder, "-m", "pip", "list", "--format", "json"))
    return {row["name"].lower().replace("-", "_"): row["version"] for row in rows}


EXECUTE = """
import nbclient, nbformat
chapter = nbformat.read("chapter.ipynb", as_version=4)
nbclient.NotebookClient(chapter, timeout=1800, kernel_name="python3").execute()
"""
FETCH = """
import hashlib, sys
from apd_minimal.book import artefacts
known = artefacts.manifest()
for name in known:
    assert hashlib.sha256(artefacts.path(name).read_bytes()).hexdigest() == known[name]
import apd_minimal
print(apd_minimal.__file__)
"""


def test_a_chapter_runs_alone_with_the_wheel(colab: Path, wheel: Path, data_server: str, tmp_path: Path) -> None:
    """The one that takes least time; nbval runs them all."""
    before = installed(colab, tmp_path)
    assert not ABSENT & set(before)
    assert "torch" in before

    shortest = min(CHAPTERS, key=lambda path: json.loads(path.read_text())["metadata"]["measured"]["seconds"])
    chapter = nbformat.read(shortest, as_version=4)
    cell = next(cell for cell in chapter.cells if "setup" in cell.metadata.get("tags", []))
    requirement = f"apd_minimal[book] @ {wheel.as_uri()}"
    cell.source = setup_cell.source("https://127.0.0.1/none", "main", requirement, data_server)
    nbformat.write(chapter, tmp_path / "chapter.ipynb")
    run(colab, tmp_path, "-c", EXECUTE)

    after = installed(colab, tmp_path)
    assert {name: after.get(name) for name in before} == before, "something that was there was replaced"
    assert set(after) - set(before) <= ABSENT, "more was installed than was missing"
    where = run(colab, tmp_path, "-c", f"import os; os.environ['APD_DATA_URL'] = {data_server!r}\n{FETCH}")
    assert str(colab.parent.parent) in where, "it is not the wheel's module that ran"
