"""The file to which a run writes one line of JSON for every logged step."""

from __future__ import annotations

import json
import os
from pathlib import Path

FIRST = b'{"step"'  # as every line begins


def begin(path: str | os.PathLike[str], step: int, checkpoint: str | os.PathLike[str] | None = None) -> None:
    """Begin a log, or keep of one that is there the lines before a step, from which the run goes on.

    Args:
        path: of the file; its folder is made if missing.
        step: steps done; 0 replaces what is there.
        checkpoint: file of the run's checkpoints, which must be another.

    Raises:
        ValueError: the file is there and not the log of a run, or it is the checkpoint.
    """
    file = Path(path)
    if checkpoint is not None and os.path.realpath(file) == os.path.realpath(checkpoint):
        raise ValueError(f"log and checkpoint must be two files, got {path} for both")
    if file.exists() and not file.is_file():
        raise ValueError(f"log must be a file, got {path}: give it another path")
    file.parent.mkdir(parents=True, exist_ok=True)
    data = file.read_bytes() if file.exists() else b""
    # A run that was killed may have left half a line.
    lines = [line for line in data.splitlines(True) if line.endswith(b"\n")]
    try:
        if data[: len(FIRST)] != FIRST[: len(data)]:
            raise ValueError("its first line is none of a log")
        kept = [line for line in lines if json.loads(line)["step"] < step] if step else []
    except (ValueError, TypeError, LookupError) as error:
        what = "the log of a run, or a file that is not there"
        raise ValueError(f"log must be {what}, got {path}: give it another path") from error
    file.write_bytes(b"".join(kept))
