"""Benchmarks: what the planner costs and how near to measurement it is; not installed."""
