"""The file to which a run writes one line of JSON for every logged step."""

from __future__ import annotations

import json
import os
from pathlib import Path


def begin(path: str | os.PathLike[str], step: int) -> None:
    """Begin a log, or keep of one that is there the lines before a step, from which the run goes on.

    Args:
        path: of the file; its folder is made if missing.
        step: steps done; 0 replaces what is there.

    Raises:
        ValueError: the run goes on, and the file is not the log of a run.
    """
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    old = file.read_text(encoding="utf-8").splitlines(True) if step and file.exists() else []
    try:
        # A run that was killed may have left half a line.
        kept = [line for line in old if line.endswith("\n") and json.loads(line)["step"] < step]
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"log must be the log of the run that goes on, got {path}: give it another path") from error
    file.write_text("".join(kept), encoding="utf-8")
