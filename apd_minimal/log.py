"""The file to which a run writes one line of JSON for every logged step."""

from __future__ import annotations

import json
import os
from pathlib import Path

FIRST = b'{"step"'  # as every line begins


class Log:
    """A log that begins anew, or goes on from the lines before a step; nothing is replaced before its first line.

    Args:
        path: of the file; its folder is made if missing.
        step: steps done; with 0, the first line replaces what is there.
        checkpoint: file of the run's checkpoints, which must be another.

    Raises:
        ValueError: the file is there and not the log of a run, or it is the checkpoint.
    """

    def __init__(
        self, path: str | os.PathLike[str], step: int, checkpoint: str | os.PathLike[str] | None = None
    ) -> None:
        file = Path(path)
        if checkpoint is not None and os.path.realpath(file) == os.path.realpath(checkpoint):
            raise ValueError(f"log and checkpoint must be two files, got {path} for both")
        if file.exists() and not file.is_file():
            raise ValueError(f"log must be a file, got {path}: give it another path")
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab"):  # a file that cannot be written is found here, not after the first step
            data = file.read_bytes()
        # A run that was killed may have left half a line.
        lines = [line for line in data.splitlines(True) if line.endswith(b"\n")]
        try:
            if data[: len(FIRST)] != FIRST[: len(data)]:
                raise ValueError("its first line is none of a log")
            kept = [line for line in lines if json.loads(line)["step"] < step] if step else []
        except (ValueError, TypeError, LookupError) as error:
            what = "the log of a run, or a file that is not there"
            raise ValueError(f"log must be {what}, got {path}: give it another path") from error
        self.file, self.kept = file, b"".join(kept)
        self.begun = False

    def write(self, step: int, losses: dict[str, list[float]]) -> None:
        """Add a line.

        Args:
            step: that was logged.
            losses: by name, one number for each restart.
        """
        line = json.dumps({"step": step, **losses}, allow_nan=False).encode() + b"\n"
        with self.file.open("ab" if self.begun else "wb") as file:
            file.write(line if self.begun else self.kept + line)
        self.begun = True
