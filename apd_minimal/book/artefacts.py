"""Stored artefacts (small trained networks, results of long runs): from the repository, or downloaded and checked."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .. import checks

REPOSITORY_DATA = Path(__file__).parent.parent.parent / "data"
ADDRESS = "APD_DATA_URL"  # environment variable: the address of the book's data folder; a chapter's first cell sets it


def manifest() -> dict[str, str]:
    """Read the names and hashes of the stored artefacts.

    Returns:
        dict[str, str]: file name to SHA-256 in hexadecimal.
    """
    inside = Path(__file__).parent.with_name("manifest.json")  # in an installed package
    return json.loads((inside if inside.exists() else REPOSITORY_DATA / "manifest.json").read_text())


def path(name: str) -> Path:
    """Find the file of a stored artefact: in ``data/`` of the repository, else downloaded once and checked.

    Args:
        name: the file's name in ``data/``.

    Returns:
        Path: a local file whose hash is that of the manifest.

    Raises:
        KeyError: if the manifest has no such artefact.
        FileNotFoundError: if it is not in the repository, and no download address is set.
        ValueError: if the downloaded file has another hash than the manifest.
    """
    checks.kind("name", name, str, "text")
    known = manifest()
    if name not in known:
        names = ", ".join(sorted(known)) or "none"
        raise KeyError(f"name must be that of an artefact, got {name!r}; known: {names}")
    if (local := REPOSITORY_DATA / name).exists():
        return local
    address = os.environ.get(ADDRESS, "")
    if not address:
        raise FileNotFoundError(
            f"artefact {name!r} is not in {REPOSITORY_DATA}, and {ADDRESS} is not set: set it to the address of the "
            "book's data folder, or install the book with 'pip install -e .' from its repository"
        )
    try:
        import pooch
    except ImportError:
        raise ImportError(f"fetching {name!r} needs pooch: pip install 'apd_minimal[book]'") from None
    return Path(
        pooch.retrieve(
            address.rstrip("/") + "/" + name,
            known_hash="sha256:" + known[name],
            fname=f"{known[name][:8]}-{Path(name).name}",  # a changed artefact gets a different file
            path=pooch.os_cache("apd_minimal"),
        )
    )
