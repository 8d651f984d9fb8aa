"""Ctrl-C between two steps and never inside one, so that hooks, factors and optimiser are in order (chapter 6)."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import Any


@contextmanager
def whole_steps() -> Iterator[list[int]]:
    """Let the first Ctrl-C wait until the step is done; a second one does not wait.

    Yields:
        list[int]: the signal, once it has come.

    Raises:
        KeyboardInterrupt: at the end, if it has come.
    """
    asked: list[int] = []

    def wait(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        asked.append(number)

    # Only the main thread gets signals, and a program that handles them in its own way goes on doing so.
    ours = current_thread() is main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    try:
        if ours:
            signal.signal(signal.SIGINT, wait)
        yield asked
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked:
        raise KeyboardInterrupt
