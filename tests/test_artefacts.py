"""Stored artefacts: at hand, or fetched from a server on this machine and checked."""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from apd_minimal.book import artefacts


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A data folder that is only reached through a server, as in Colab."""
    folder = tmp_path / "far"
    folder.mkdir()
    (folder / "net.bin").write_bytes(b"weights")
    known = {"net.bin": hashlib.sha256(b"weights").hexdigest()}
    monkeypatch.setattr(artefacts, "manifest", lambda: known)
    monkeypatch.setattr(artefacts, "REPOSITORY_DATA", tmp_path / "none")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "cache"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(SimpleHTTPRequestHandler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv(artefacts.ADDRESS, f"http://127.0.0.1:{server.server_address[1]}/")
    yield folder
    server.shutdown()


def test_every_stored_artefact_is_the_one_in_the_manifest() -> None:
    for name, known in artefacts.manifest().items():
        assert hashlib.sha256(artefacts.path(name).read_bytes()).hexdigest() == known, f"{name}: run make data"
    folder = artefacts.REPOSITORY_DATA
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert present - {"manifest.json", "README.md"} == set(artefacts.manifest())
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 60e6


def test_fetched_once_and_checked(far: Path) -> None:
    assert artefacts.path("net.bin").read_bytes() == b"weights"
    (far / "net.bin").unlink()
    assert artefacts.path("net.bin").read_bytes() == b"weights"


def test_a_changed_file_is_refused(far: Path) -> None:
    (far / "net.bin").write_bytes(b"other weights")
    with pytest.raises(ValueError, match="does not match"):
        artefacts.path("net.bin")


def test_errors_say_what_to_do(far: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError, match=r"net\.bin"):
        artefacts.path("nets.bin")
    monkeypatch.delenv(artefacts.ADDRESS)
    with pytest.raises(FileNotFoundError, match=r"APD_DATA_URL.*pip install"):
        artefacts.path("net.bin")


def test_at_hand_nothing_is_fetched(far: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artefacts, "REPOSITORY_DATA", far)
    monkeypatch.setenv(artefacts.ADDRESS, "http://127.0.0.1:9/")
    assert artefacts.path("net.bin") == far / "net.bin"


def test_manifest_is_hashes_by_name() -> None:
    stored = json.loads((artefacts.REPOSITORY_DATA / "manifest.json").read_text())
    assert stored == artefacts.manifest()
    assert all(len(known) == 64 for known in stored.values())
