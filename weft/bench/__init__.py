"""Benchmarks: a grid of points, what each came to, and how that is shown."""
