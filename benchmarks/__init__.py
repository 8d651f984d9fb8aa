"""Timings as ratios, run by hand: `python -m benchmarks.run`."""
