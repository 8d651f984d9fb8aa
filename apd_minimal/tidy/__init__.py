"""Tidying up during a run: components are merged and pruned, and free ones start anew (chapters 6 and 20)."""
