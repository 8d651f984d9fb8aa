"""One thread, and property tests that draw the same examples on every run."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=25, database=None)
settings.load_profile("repeatable")
