"""What every kernel family's interpolation shares: labels, monotone fits, brackets, roofline."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    FloatArray = NDArray[np.float64]
    IndexArray = NDArray[np.intp]
    LabelArray = NDArray[np.int8]


class Provenance(IntEnum):
    """Where a time comes from, ordered from best to worst so that labels combine by maximum."""

    MEASURED = 0
    """At a measured point; a monotone fit may have moved it by the measurement's noise."""
    INTERPOLATED = 1
    """Between measured points."""
    EXTRAPOLATED = 2
    """Outside the measured range, or from a neighbouring head layout."""
    ROOFLINE = 3
    """Nothing measured: datasheet peak and bandwidth."""


def labels(shape: tuple[int, ...], value: Provenance) -> LabelArray:
    """A label array filled with one value."""
    return np.full(shape, value, dtype=np.int8)


def positive(name: str, values: ArrayLike) -> FloatArray:
    """``values`` as a 1-D float array.

    Raises
    ------
    ValueError
        If one of them is below 1: a kernel over nothing is not launched, so it has no time.

    """
    array = np.atleast_1d(np.asarray(values, dtype=np.float64))
    if array.size and not bool((array >= 1).all()):
        raise ValueError(f"{name} must be at least 1, got {array.min()}")
    return array


def isotonic(values: FloatArray) -> FloatArray:
    """Closest non-decreasing sequence in least squares (pool adjacent violators).

    A running maximum would be simpler, but lets one noisy spike raise everything after it.

    Parameters
    ----------
    values
        Shape (N,), without NaN; the logarithm of times, so that errors are relative.

    """
    means: list[float] = []
    sizes: list[int] = []
    for value in values.tolist():
        mean, size = value, 1
        while means and means[-1] > mean:
            pooled = sizes[-1] + size
            mean = (means.pop() * sizes[-1] + mean * size) / pooled
            size = pooled
            sizes.pop()
        means.append(mean)
        sizes.append(size)
    return np.repeat(np.array(means, dtype=np.float64), sizes)


def isotonic_grid(values: FloatArray) -> FloatArray:
    """Non-decreasing fit along both axes: mean of the tightest monotone bounds from each side.

    That mean has the smallest possible largest error, leaves a monotone grid as it is, and needs
    no iteration (least squares in two dimensions would).

    Parameters
    ----------
    values
        Shape (R, C); NaN cells stay NaN and constrain nothing.

    """
    above = np.fmax.accumulate(np.fmax.accumulate(values, axis=0), axis=1)
    flipped = values[::-1, ::-1]
    below = np.fmin.accumulate(np.fmin.accumulate(flipped, axis=0), axis=1)[::-1, ::-1]
    return np.where(np.isnan(values), np.nan, (above + below) / 2)


def bracket(axis: FloatArray, at: FloatArray) -> tuple[IndexArray, FloatArray]:
    """Cell of a grid axis that holds each point.

    Parameters
    ----------
    axis
        Ascending grid, shape (G,), G >= 2.
    at
        Points, any shape; those outside are clamped to the ends.

    Returns
    -------
    low, weight
        Index of the cell's lower node, and weight of its upper node in [0, 1].

    """
    clamped = np.clip(at, axis[0], axis[-1])
    low = np.clip(np.searchsorted(axis, clamped, side="right") - 1, 0, len(axis) - 2)
    return low, (clamped - axis[low]) / (axis[low + 1] - axis[low])


def point_labels(axis: FloatArray, at: FloatArray) -> LabelArray:
    """Label of each point by its place on a grid axis: on a node, between nodes or outside."""
    inside = (at >= axis[0]) & (at <= axis[-1])
    code = np.where(np.isin(at, axis), Provenance.MEASURED, Provenance.INTERPOLATED)
    return np.where(inside, code, Provenance.EXTRAPOLATED).astype(np.int8)


def roofline_s(
    flops: FloatArray, moved_bytes: FloatArray, peak_flops: float, bandwidth_bytes_per_s: float
) -> FloatArray:
    """Least seconds for work of ``flops`` that moves ``moved_bytes``, the two overlapping."""
    return np.maximum(flops / peak_flops, moved_bytes / bandwidth_bytes_per_s)
