"""Saving and loading: tensors in safetensors files, the rest as JSON; never pickle.

Every file is written under a temporary name and then renamed, so that a reader never sees half a file.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from . import checks

FORMAT = "apd_minimal/1"
UNKNOWN = "0" * 64  # placeholder for the checksum, while it is computed over the whole file


class StoreError(ValueError):
    """A file that is damaged, foreign, or of another kind; the message names it and says what to do."""


@contextmanager
def reading(path: str | os.PathLike[str], kind: str) -> Iterator[None]:
    """Turn every error about a file's contents into a StoreError that names the file.

    Args:
        path: of the file.
        kind: what it should hold, for the message.

    Raises:
        StoreError: whatever went wrong inside.
    """
    try:
        yield
    except StoreError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:  # RecursionError is among them
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) and error.args else error
        raise StoreError(
            f"{path} is not a valid {kind}: {what}. It was changed, or written by another version: write it again, or "
            "restore it from a copy"
        ) from error


def write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file atomically: it is complete or absent.

    Raises:
        TypeError: `path` is not a path, or `data` is not bytes.
        OSError: the folder cannot be written to; an existing file is kept.
    """
    checks.kind("path", path, (str, os.PathLike), "a path")
    checks.kind("data", data, (bytes, bytearray, memoryview), "bytes")
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    for stale in final.parent.glob(
        f"{glob.escape(final.name)}.{'[0-9a-f]' * 16}.part"
    ):  # left by a process that was killed
        stale.unlink(missing_ok=True)
    # An unpredictable name and O_EXCL: never write through a link that was planted there.
    temporary = final.with_name(f"{final.name}.{secrets.token_hex(8)}.part")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(temporary, flags, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], facts: Any) -> None:
    """Write tensors and JSON facts to one safetensors file.

    Args:
        path: the file.
        kind: of contents, checked when the file is read.
        tensors: by name.
        facts: anything that strict JSON can represent: None in place of NaN.

    Raises:
        TypeError, ValueError: names what cannot be stored.
    """
    checks.kind("kind", kind, str, "text")
    checks.kind("tensors", tensors, Mapping, "a mapping from names to tensors")
    for name, t in tensors.items():
        checks.kind(f"tensors: {checks.given(name)}", t, Tensor, "a tensor with text for a name")
        checks.kind("names of tensors", name, str, "text")
        if t.layout != torch.strided or t.is_meta:
            raise TypeError(f"tensors: {name} must be dense and hold numbers, got {t.layout} on {t.device}")
    try:
        text = json.dumps(facts, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"facts must be representable in strict JSON, got {checks.given(facts)}: {error}") from None
    header = {"format": FORMAT, "kind": kind, "facts": text, "checksum": UNKNOWN}
    # Copied, since the library refuses tensors that share memory.
    dense = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    data = save(dense, metadata=header)
    write(path, data.replace(_entry(UNKNOWN), _entry(hashlib.sha256(data).hexdigest()), 1))


def read_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], Any]:
    """Read a file written by `write_tensors`.

    Args:
        path: of the file.
        kind: as given to `write_tensors`.

    Returns:
        tuple[dict[str, Tensor], Any]: tensors by name, and the facts.

    Raises:
        FileNotFoundError: no such file.
        StoreError: damaged, of another format, or of another kind. Files of the first version, which have no
            checksum, are read.
    """
    checks.kind("path", path, (str, os.PathLike), "a path")
    checks.kind("kind", kind, str, "text")
    if not Path(path).is_file():
        what = "a folder, and no file," if Path(path).is_dir() else "no file"
        raise FileNotFoundError(f"{what} at {path}")
    data = Path(path).read_bytes()
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    except (SafetensorError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise StoreError(
            f"{path} is truncated or not a safetensors file ({error}): restore it from a copy, or make it again"
        ) from None
    if (format_ := header.get("format")) != FORMAT:
        later = str(format_).startswith("apd_minimal/")
        todo = "read it with the version of apd_minimal that wrote it" if later else "it was not written by apd_minimal"
        raise StoreError(f"{path} is of format {format_!r}, expected {FORMAT!r}: {todo}")
    checksum = header.get("checksum", UNKNOWN)
    whole = data.replace(_entry(checksum), _entry(UNKNOWN), 1)
    if set(header) - {"checksum"} != {"format", "kind", "facts"} or (
        "checksum" in header and hashlib.sha256(whole).hexdigest() != checksum
    ):
        raise StoreError(f"{path} is damaged: its checksum does not match; restore it from a copy, or make it again")
    if header["kind"] != kind:
        raise StoreError(f"{path} holds a {header['kind']!r}, expected a {kind!r}: give the path of one")
    with reading(path, kind):
        return tensors, json.loads(header["facts"])


def _entry(checksum: str) -> bytes:
    """Format a checksum as in the header of a safetensors file; within the facts the quotes would be escaped."""
    return f'"checksum":"{checksum}"'.encode()
