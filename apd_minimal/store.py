"""Saving and loading: tensors in safetensors files, the rest as JSON; never pickle.

Every file is written beside its final place and then renamed, so that a reader never meets half a file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

FORMAT = "apd_minimal/1"


class StoreError(ValueError):
    """A file that is missing, truncated, foreign, or belongs to something else."""


def write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    # Always the same name: what a killed process left there is overwritten by the next.
    beside = final.with_name(f"{final.name}.part")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, final)
    finally:
        beside.unlink(missing_ok=True)


def write_tensors(path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], facts: Any) -> None:
    """Write tensors and JSON facts to one safetensors file.

    Args:
        path: the file.
        kind: what it holds, checked when it is read.
        tensors: by name.
        facts: anything that JSON can hold.
    """
    header = {"format": FORMAT, "kind": kind, "facts": json.dumps(facts)}
    write(path, save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata=header))


def read_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], Any]:
    """Read what `write_tensors` wrote.

    Returns:
        tuple[dict[str, Tensor], Any]: tensors by name, and the facts.

    Raises:
        FileNotFoundError: no such file.
        StoreError: truncated, of another format, or of another kind.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise StoreError(f"{path} is of format {header.get('format')!r}, expected {FORMAT!r}")
            if header.get("kind") != kind:
                raise StoreError(f"{path} holds a {header.get('kind')!r}, expected a {kind!r}")
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(header["facts"])
    except SafetensorError as error:
        raise StoreError(f"{path} is truncated or not a safetensors file ({error})") from None
