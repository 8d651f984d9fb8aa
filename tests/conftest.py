"""The chapters' number of threads, and property tests that draw the same examples on every run, however slowly."""

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
