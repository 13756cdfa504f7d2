"""What the tests of kernel times share: a measured table, points beyond it, and what must hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from planner.io.devices import load_device
from planner.io.profiles import load_kernel_table
from simulator.table import KernelTable

TABLE = load_kernel_table("H100-SXM-80GB", "vllm", "0.24.0")
DEVICE = load_device("H100-SXM-80GB")
BEYOND_M = 100_000  # the table ends at 32,768 tokens
TOKENS = np.unique(np.geomspace(1, BEYOND_M, 300).astype(int))
SHAPE_STEP = 0.01  # contract: a shape moved by 1 % ...
MAX_MOVE = 0.03  # ... moves no prediction by more than 3 %


def assert_sane(time_s: np.ndarray) -> None:
    """No NaN, infinity, zero or negative time."""
    assert np.isfinite(time_s).all()
    assert (time_s > 0).all()


def assert_monotone(time_s: np.ndarray, axis: int = -1) -> None:
    """No step down along ``axis``, rounding aside."""
    steps = np.diff(time_s, axis=axis)
    assert (steps >= -1e-12 * np.abs(time_s).max()).all()


def synthetic(**families: object) -> KernelTable:
    """A table with only the given families."""
    empty = KernelTable("d", "e", "v", gemm={}, context=(), generation=(), all_reduce={}, nccl={})
    return replace(empty, **families)
