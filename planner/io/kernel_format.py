"""The format of shipped kernel times: what a file holds, and how latencies are coded.

A file is an ``.npz`` of five arrays of one dimension. `LAYOUT` is JSON text: for every family of
`FAMILIES`, in that order, a list of grids, each with its labels, the number of its series rows
and the lengths of its axes. `NUMBERS` holds what they are, grid after grid: its series column by
column, then its axes. `MISSING` has one bit per cell, set where nothing was measured. `LOW` and
`HIGH` are the low and high bytes of one 16-bit number per measured cell, in the order of the grids.

That number is a latency in steps of log time, less what its neighbours predict: along the last
two axes of a grid, left + above - diagonal. Neighbours resemble each other, so most high bytes
are 0, and deflate brings a cell from 16 bits to 8.9 (9.0 million cells in 27 files, 10 MB).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

SCHEMA_VERSION: Final = 2
"""Format of the files that this version writes and reads."""

LAYOUT: Final = "layout"
NUMBERS: Final = "numbers"
MISSING: Final = "missing"
LOW: Final = "low"
HIGH: Final = "high"
MEMBERS: Final = {
    LAYOUT: np.uint8,
    NUMBERS: np.int32,
    MISSING: np.uint8,
    LOW: np.uint8,
    HIGH: np.uint8,
}
"""Names and types of the arrays in a file."""
SKEW_UNIT: Final = 1e-3
"""A skew is stored in thousandths, so that all of `NUMBERS` are whole."""

LOG_STEP: Final = 1e-3
"""A step is 0.1 % of a latency, so a stored one is within 0.05 % of the measured one. Timing a
kernel twice differs by 1 to 2 %."""
UNIT_S: Final = 1e-9
"""Latency of step 0."""
STEPS: Final = 25_000
"""Number of steps: latencies reach up to 72 s, and the longest measured is 4.05 s."""
STEP_TIME_S: Final = UNIT_S * np.exp(LOG_STEP * np.arange(STEPS))
"""Seconds of every step, shape (STEPS,) float64."""
PREDICTED_AXES: Final = 2
"""Axes, counted from the last, along which a latency is predicted."""


@dataclass(frozen=True)
class Family:
    """What the grids of one kernel family are keyed by.

    Parameters
    ----------
    labels
        What tells its grids apart.
    series
        Columns of the first axis of a grid, whose entries are rows of numbers; empty if every
        axis is an ascending one.
    axes
        Ascending axes, the last ones of a grid.

    """

    labels: tuple[str, ...]
    series: tuple[str, ...]
    axes: tuple[str, ...]


FAMILIES: Final[dict[str, Family]] = {
    "gemm": Family(("precision",), (), ("m", "n", "k")),
    "context": Family(
        ("kv_dtype",), ("head_dim", "window_tokens", "heads", "kv_heads"), ("batch", "length")
    ),
    "generation": Family(
        ("kv_dtype",), ("head_dim", "window_tokens", "heads", "kv_heads"), ("batch", "length")
    ),
    "moe": Family(
        ("precision",),
        (
            "hidden_size",
            "expert_width",
            "experts_per_token",
            "experts",
            "tensor_shards",
            "expert_shards",
            "gated",
            "skew",
        ),
        ("tokens",),
    ),
    "latent": Family(
        (
            "phase",
            "module",
            "hidden_size",
            "q_lora_rank",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "index_topk",
            "weight_dtype",
            "kv_dtype",
        ),
        (),
        ("prefix", "heads", "batch", "length"),
    ),
    "latent_bmm": Family(("side", "precision"), (), ("heads", "tokens")),
    "recurrent": Family(
        ("kind", "kernel", "phase"),
        ("width_0", "width_1", "width_2", "width_3", "width_4"),
        ("batch", "length"),
    ),
    "all_reduce": Family(("mode",), ("devices",), ("elements",)),
    "nccl": Family(("operation",), ("devices",), ("elements",)),
    "all_to_all": Family(
        ("backend", "phase", "dtype"),
        ("ranks", "nodes", "hidden_size", "top_k", "num_experts"),
        ("tokens",),
    ),
}
"""Every family, in the order in which a file holds them; names are those of `simulator/table.py`.

Columns of ``series`` are whole numbers except ``skew``, which is stored in `SKEW_UNIT`."""


def predicted(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Axes of a grid of ``shape`` along which a latency is predicted."""
    return tuple(range(max(0, len(shape) - PREDICTED_AXES), len(shape)))


def decode(
    shapes: list[tuple[int, ...]],
    missing: NDArray[np.uint8],
    low: NDArray[np.uint8],
    high: NDArray[np.uint8],
) -> list[NDArray[np.float64]]:
    """Seconds of every grid.

    Parameters
    ----------
    shapes
        Shape of each grid, in order.
    missing, low, high
        The arrays of a file, shapes (ceil(C / 8),), (K,) and (K,) for C cells, K of them measured.

    Returns
    -------
    list of arrays
        Seconds in the shape of each grid, NaN where not measured.

    Raises
    ------
    ValueError
        If the arrays do not have the lengths that the shapes call for, a grid has no measured
        cell, or a number leads to no latency; the text says which.

    """
    sizes = [prod(shape) for shape in shapes]
    cells = sum(sizes)
    if len(missing) != -(-cells // 8):
        raise ValueError(f"{MISSING!r} has {len(missing)} bytes, must have {-(-cells // 8)}")
    measured = np.unpackbits(missing, count=cells) == 0
    count = int(measured.sum())
    for name, array in ((LOW, low), (HIGH, high)):
        if len(array) != count:
            raise ValueError(f"{name!r} has {len(array)} bytes, must have {count}")
    folded = low.astype(np.int32) | (high.astype(np.int32) << 8)
    residual = np.zeros(cells, np.int32)
    residual[measured] = (folded >> 1) ^ -(folded & 1)
    grids, start = [], 0
    for index, (shape, size) in enumerate(zip(shapes, sizes, strict=True)):
        known = measured[start : start + size].reshape(shape)
        step = residual[start : start + size].reshape(shape)
        for axis in predicted(shape):
            step = np.cumsum(step, axis=axis, dtype=np.int32)
        start += size
        if not known.any():
            raise ValueError(f"grid {index} has no measured cell")
        out_of_range = known & ((step < 0) | (step >= STEPS))
        if out_of_range.any():
            raise ValueError(
                f"grid {index} has {int(out_of_range.sum())} latencies that are not above 0 s and "
                f"below {STEP_TIME_S[-1]:.0f} s"
            )
        # Where nothing was measured the step is a mere prediction and may lie out of range.
        grids.append(np.where(known, STEP_TIME_S.take(step, mode="clip"), np.nan))
    return grids
