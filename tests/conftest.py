"""The chapters' number of threads, a seed for every test, and property tests that draw the same on every run."""

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
