"""Rates of the machine, measured in the same run: matrix products and memory, on one thread, in float32."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.cost import used

LARGE = (1, 2048, 2048, 2048)


def repeated(function: Callable[[], Any], seconds: float = 0.3, least: int = 3) -> list[float]:
    """Time calls of a function in CPU seconds, for about `seconds` in all; the first call does not count."""
    function()
    times: list[float] = []
    while len(times) < least or sum(times) < seconds:
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return times


def gemm_rate(copies: int, rows: int, d: int, e: int) -> float:
    """Measure operations a second of `copies` products [rows, d] @ [d, e], into preallocated memory."""
    a, b, out = torch.randn(copies, rows, d), torch.randn(copies, d, e), torch.empty(copies, rows, e)
    if copies == 1:
        a, b, out = a[0], b[0], out[0]
    return 2.0 * copies * rows * d * e / median(repeated(lambda: torch.matmul(a, b, out=out)))


def bandwidth() -> dict[str, float]:
    """Measure bytes a second of a copy and a triad (a = b + 3 c), over 256 MB each."""
    b, c = torch.randn(2**26), torch.randn(2**26)
    a = torch.empty_like(b)
    copy = median(repeated(lambda: a.copy_(b)))
    triad = median(repeated(lambda: torch.add(b, c, alpha=3.0, out=a)))
    return {"copy": 2 * a.nbytes / copy, "triad": 3 * a.nbytes / triad}


def shapes(cases: Sequence[Case]) -> dict[str, tuple[int, int, int, int]]:
    """List the two products of component activations, in each case's largest layer: (copies, rows, d, e)."""
    products = {"large": LARGE}
    for case in cases:
        d, m, e = max(used(case), key=lambda use: use[2])
        copies = case.instances * case.n_components
        products[f"{case.name}, with A"] = (1, case.batch, d, copies * m)
        products[f"{case.name}, with B"] = (copies, case.batch, m, e)
    return products


def describe(cases: Sequence[Case]) -> dict[str, Any]:
    """Describe the machine and measure its rates.

    Args:
        cases: whose shapes of matrix products are measured.

    Returns:
        dict[str, Any]: for data/benchmarks.json.
    """
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    products = [
        {"name": name, "shape": list(shape), "flops_per_second": gemm_rate(*shape)}
        for name, shape in shapes(cases).items()
    ]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "matrix_products": products,
        "bytes_per_second": bandwidth(),
    }
