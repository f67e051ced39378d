"""Benchmarks, one script per op: `python -m benchmarks.step`, `python -m benchmarks.noise`."""
