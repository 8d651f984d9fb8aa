"""Chapters are run again as their outputs were made: in the same environment, and with a closing ; that counts.

Their outputs must be the stored ones, numbers within what another processor's rounding moves (tools/printed.py).
"""

import os
from typing import Any

from nbval.kernel import RunningKernel
from nbval.plugin import IPyNbCell

from tools.execute import ENVIRONMENT
from tools.printed import Printed, compared

os.environ.update(ENVIRONMENT)
_sanitize = IPyNbCell.sanitize
_compare = IPyNbCell.compare_outputs


def _execute(self: RunningKernel, source: str, allow_stdin: bool | None = None) -> Any:
    # nbval leaves cells out of the history, and IPython looks there for the ; that silences a cell.
    return self.kc.execute(source, store_history=True, allow_stdin=allow_stdin, stop_on_error=False)


def _printed(self: IPyNbCell, output: Any) -> Any:
    output = _sanitize(self, output)
    return Printed(output) if isinstance(output, str) else output


def _compare_glued(self: IPyNbCell, test: list[Any], ref: list[Any], skip_compare: Any = None) -> bool:
    return _compare(self, [compared(output) for output in test], [compared(output) for output in ref], skip_compare)


RunningKernel.execute_cell_input = _execute
IPyNbCell.sanitize = _printed
IPyNbCell.compare_outputs = _compare_glued
