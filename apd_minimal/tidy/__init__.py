"""Tidying during a run: components are merged and pruned, and free ones get a new start (chapters 6 and 20)."""
