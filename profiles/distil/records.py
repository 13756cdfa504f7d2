"""Rows of kernel times in our names, and the grids that are made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from planner.io.kernel_format import FAMILIES
from simulator.units import S_PER_MS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from planner.io.kernel_format import Family

Records = dict[str, "NDArray[Any]"]
"""Columns of equal length: a family's labels, series and axes, and ``time_s``."""

PRECISION_NAMES: Final = {
    "bfloat16": "bf16",
    "fp8": "fp8",
    "fp8_block": "fp8_block",
    "nvfp4": "nvfp4",
    "int8_wo": "int8_wo",
    "sq": "int8",
    "int4_wo": "int4",
    "w4afp8": "int4_fp8",
    "w4a16_mxfp4": "mxfp4",
    "w4a8_mxfp4_mxfp8": "mxfp4_mxfp8",
}
"""Source precisions to ours, of `simulator/precision.py`. ``sq`` is SmoothQuant: int8 weights and
activations. The source does not say the group size of its int4 weights."""

ANCHORED: Final = ("context", "generation")
"""Families whose series are kept only if their smallest cell was timed: it is the launch cost, to
which everything else in a series is related. Some consumer parts lack it for a few layouts whose
kernel refused most sizes."""


class Grid(NamedTuple):
    """One grid of a family, as it is written.

    Parameters
    ----------
    labels
        Values of the family's labels.
    series
        Rows (S, C) of its first axis, or (0, 0) if the family has none.
    axes
        Ascending axes.
    time_s
        Seconds, shape (S, ...) or (...); NaN where not measured.

    """

    labels: tuple[Any, ...]
    series: NDArray[Any]
    axes: tuple[NDArray[np.int64], ...]
    time_s: NDArray[np.float64]


def names(column: NDArray[Any], ours: Mapping[str, str]) -> NDArray[Any]:
    """A column of source names in our names; a name that is not mapped is a `KeyError`."""
    return np.array([ours[name] for name in column], object)


def seconds(latency_ms: NDArray[Any]) -> NDArray[np.float64]:
    """Milliseconds to seconds."""
    return np.asarray(latency_ms, np.float64) * S_PER_MS


def select(records: Records, rows: NDArray[Any]) -> Records:
    """The chosen rows of every column."""
    return {name: column[rows] for name, column in records.items()}


def concatenate(parts: Sequence[Records]) -> Records:
    """One table of several with the same columns."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def keys(records: Records, family: Family) -> list[tuple[Any, ...]]:
    """Labels and series of every row."""
    columns = [records[name].tolist() for name in (*family.labels, *family.series)]
    return list(zip(*columns, strict=True))


def prefer(parts: Sequence[Records], family: Family) -> Records:
    """Rows of the first part, and of each later one the series that those before it lack."""
    seen: set[tuple[Any, ...]] = set()
    kept = []
    for part in parts:
        own = keys(part, family)
        kept.append(select(part, np.array([key not in seen for key in own], bool)))
        seen.update(own)
    return concatenate(kept)


def dense(
    indices: Sequence[NDArray[Any]], shape: tuple[int, ...], time_s: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Scatter rows into a grid, NaN where no row is.

    Where several kernels were timed for one key the fastest stays: an engine that offers several
    picks among them by its own tuning, and a slower one would be a choice no deployment makes.
    """
    grid = np.full(shape, np.inf)
    np.minimum.at(grid, tuple(indices), time_s)
    return np.where(np.isinf(grid), np.nan, grid)


def grids(records: Records, name: str, left_out: list[str]) -> list[Grid]:
    """The grids of one family, in the order of their labels.

    Raises
    ------
    ValueError
        If a time is not a positive number.

    """
    if not (records["time_s"] > 0).all():
        raise ValueError(f"{name}: a latency is not above 0")
    family = FAMILIES[name]
    labels = list(zip(*(records[label].tolist() for label in family.labels), strict=True))
    rows: dict[tuple[Any, ...], list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    return [
        _grid(select(records, np.array(rows[label])), name, label, left_out)
        for label in sorted(rows)
    ]


def _grid(records: Records, name: str, label: tuple[Any, ...], left_out: list[str]) -> Grid:
    family = FAMILIES[name]
    axes, indices = [], []
    for axis in family.axes:
        values, index = np.unique(records[axis], return_inverse=True)
        axes.append(values.astype(np.int64))
        indices.append(index.reshape(-1))
    shape = tuple(len(axis) for axis in axes)
    if not family.series:
        return Grid(label, np.zeros((0, 0)), tuple(axes), dense(indices, shape, records["time_s"]))
    table = np.stack([records[column] for column in family.series], axis=1)
    series, which = np.unique(table, axis=0, return_inverse=True)
    time_s = dense([which.reshape(-1), *indices], (len(series), *shape), records["time_s"])
    if name in ANCHORED:
        kept = ~np.isnan(time_s.reshape(len(series), -1)[:, 0])
        left_out += [
            f"{name} series without its smallest cell: {label[0]} KV, "
            + ", ".join(f"{c} {v}" for c, v in zip(family.series, row, strict=True))
            for row in series[~kept].tolist()
        ]
        series, time_s = series[kept], time_s[kept]
    return Grid(label, series, tuple(axes), time_s)
