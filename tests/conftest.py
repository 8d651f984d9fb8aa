"""The chapters' number of threads; a seed and no open figure for every test; property tests that always draw alike."""

import sys

import pytest
import torch
from hypothesis import HealthCheck, settings

from tools.execute import THREADS

torch.set_num_threads(int(THREADS))
settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    max_examples=25,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Networks take their start from torch's own generator."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_open_figures() -> None:
    """Which tests shared this worker before must not matter: some leave figures open, some count them."""
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
