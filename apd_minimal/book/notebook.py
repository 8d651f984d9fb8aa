"""Notebook setup: figures readable in both themes, one thread, identical bytes in every run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

STYLE = Path(__file__).parent.with_name("figures.mplstyle")


def setup(threads: int = 1) -> None:
    """Prepare a notebook: the book's figure style, figures as SVG without a date, a fixed number of threads.

    The number of threads changes the last digits of sums, which training amplifies: results are stored with one thread.

    Args:
        threads: CPU threads for torch, at least 1.

    Raises:
        ValueError: if ``threads`` is below 1.
    """
    if threads < 1:
        raise ValueError(f"threads is {threads}; expected at least 1")
    torch.set_num_threads(threads)
    plt.style.use(STYLE)
    # Chapters shorten runs on purpose, and report themselves how faithful a result is.
    warnings.filterwarnings("ignore", message="the components do not sum to the weights")
    try:
        from IPython import get_ipython
        from matplotlib_inline.config import InlineBackend
    except ImportError:  # a plain script: no figures are shown inline
        return
    if (shell := get_ipython()) is not None:
        backend = InlineBackend.instance(parent=shell)
        undated: Any = {"bbox_inches": "tight", "metadata": {"Date": None}}
        backend.print_figure_kwargs = undated
        backend.figure_formats = {"svg"}
