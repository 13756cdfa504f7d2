"""Code latencies as in `planner.io.kernel_format`: the writing half."""

from __future__ import annotations

import io
import json
from itertools import product
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from planner.io.kernel_format import (
    HIGH,
    LAYOUT,
    LOG_STEP,
    LOW,
    MISSING,
    NUMBERS,
    STEPS,
    UNIT_S,
    predicted,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

NUMBER_BITS: Final = 16


def steps(time_s: NDArray[np.float64]) -> NDArray[np.int64]:
    """Latencies in steps of log time; -1 where NaN.

    Raises
    ------
    ValueError
        If a latency lies outside the format's range.

    """
    step = np.rint(np.log(time_s / UNIT_S) / LOG_STEP)
    if (step < 0).any() or (step >= STEPS).any():
        raise ValueError(f"latencies must lie between {UNIT_S} s and step {STEPS}")
    return np.where(np.isnan(step), -1, step).astype(np.int64)


def residuals(step: NDArray[np.int64]) -> NDArray[np.int64]:
    """What the neighbours along the predicted axes do not tell, 0 where nothing was measured.

    A missing cell counts as what its own neighbours predict, which is what the reader's running
    sums give there.
    """
    axes = predicted(step.shape)
    filled = np.pad(step, [(1, 0) if axis in axes else (0, 0) for axis in range(step.ndim)])
    holes = np.argwhere((step < 0).any(axis=tuple(range(axes[0]))))
    for hole in holes:
        neighbours = np.zeros(step.shape[: axes[0]], np.int64)
        for back in product((0, 1), repeat=len(axes)):
            if any(back):
                sign = 1 if sum(back) % 2 else -1
                neighbours = neighbours + sign * filled[(..., *(hole + 1 - np.array(back)))]
        cell = (..., *(hole + 1))
        filled[cell] = np.where(filled[cell] < 0, neighbours, filled[cell])
    for axis in axes:
        filled = np.diff(filled, axis=axis)
    return filled


def encode(grids: Sequence[NDArray[np.float64]]) -> dict[str, NDArray[np.uint8]]:
    """The `MISSING`, `LOW` and `HIGH` arrays of a file.

    Raises
    ------
    ValueError
        If a latency, or its distance from the predicted one, does not fit the format.

    """
    missing, numbers = [], []
    for time_s in grids:
        known = ~np.isnan(time_s)
        residual = residuals(steps(time_s))[known]
        missing.append(~known.ravel())
        # Signs go into the lowest bit, so that small distances either way have a high byte of 0.
        numbers.append(np.where(residual < 0, -2 * residual - 1, 2 * residual))
    folded = np.concatenate(numbers)
    if (folded >> NUMBER_BITS).any():
        raise ValueError("a latency is too far from its neighbours for 16 bits")
    return {
        MISSING: np.packbits(np.concatenate(missing)),
        LOW: (folded & 0xFF).astype(np.uint8),
        HIGH: (folded >> 8).astype(np.uint8),
    }


def npz_bytes(
    layout: dict[str, Any], numbers: NDArray[np.int32], grids: Sequence[NDArray[np.float64]]
) -> bytes:
    """A file's bytes; the same for the same input, as members carry no time of writing."""
    text = json.dumps(layout, separators=(",", ":")).encode()
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {LAYOUT: np.frombuffer(text, np.uint8), NUMBERS: numbers}
    np.savez_compressed(buffer, **(arrays | encode(grids)))
    return buffer.getvalue()
