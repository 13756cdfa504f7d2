"""Time of dense matrix products from a measured grid."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np

from simulator.interpolate import (
    Provenance,
    bracket,
    isotonic,
    labels,
    point_labels,
    positive,
    roofline_s,
)
from simulator.units import DTYPE_BYTES

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from simulator.device import Device
    from simulator.interpolate import FloatArray, LabelArray
    from simulator.table import GemmGrid, KernelTable

OUTPUT_BYTES: Final = DTYPE_BYTES["bf16"]
"""Bytes of one output element: vLLM's linear layers give bf16 for bf16 and fp8 operands alike."""
FLOPS_PER_MAC: Final = 2
"""One multiply and one add."""


def gemm_s(
    table: KernelTable, device: Device, dtype: str, m: ArrayLike, n: int, k: int
) -> tuple[FloatArray, LabelArray]:
    """Seconds of ``(m, k) @ (k, n)``.

    Measured times are noisy at small ``m`` and step at kernel tiles, so log time is first made
    non-decreasing in ``m``, then joined linearly. A shape (n, k) off the grid takes, at each grid
    ``m``, the log utilisation (roofline over measured time) interpolated bilinearly in
    (log n, log k): near shapes run at near utilisation, and the roofline carries the size. Beyond
    the grid the boundary's utilisation is held. Leave-one-out error (every second neighbour, mean
    over the H100 grid at n, k >= 1024, a pessimistic figure as it doubles each gap): 5.5 % along
    n and 3.8 % along k for bf16, 3.9 % and 3.9 % for fp8; along m 5.8 % and 13.8 %, the latter
    from tile steps such as 256 to 257 that a neighbour cannot foretell.

    Parameters
    ----------
    table, device
        Measured kernels, and the roofline of the same device.
    dtype
        Operand dtype, ``bf16`` or ``fp8``; one that the table lacks is pure roofline.
    m
        Token counts, shape (T,), each at least 1.
    n, k
        Output and inner width on the rank.

    Returns
    -------
    time_s, label
        Shapes (T,); non-decreasing in ``m``.

    Raises
    ------
    ValueError
        If a size is below 1.

    """
    tokens = positive("m", m)
    positive("n and k", [n, k])
    roofline = _roofline_s(device, dtype, tokens, n, k)
    grid = table.gemm.get(dtype)
    if grid is None:
        return roofline, labels(tokens.shape, Provenance.ROOFLINE)
    axis = grid.m.astype(np.float64)
    column, shape_label = _column_s(grid, device, dtype, n, k)
    low, weight = bracket(axis, tokens)
    time_s = column[low] * (1 - weight) + column[low + 1] * weight
    held = column[-1] / _roofline_s(device, dtype, axis[-1:], n, k)
    time_s = np.where(tokens > axis[-1], roofline * held, time_s)
    return time_s, np.maximum(point_labels(axis, tokens), np.int8(shape_label))


def _roofline_s(
    device: Device, dtype: str, m: FloatArray, n: NDArray[np.float64] | int, k: FloatArray | int
) -> FloatArray:
    moved_bytes = (m * k + k * n) * DTYPE_BYTES[dtype] + m * n * OUTPUT_BYTES
    return roofline_s(
        FLOPS_PER_MAC * m * n * k,
        moved_bytes,
        device.flops(dtype),
        device.memory_bandwidth_bytes_per_s,
    )


def _column_s(
    grid: GemmGrid, device: Device, dtype: str, n: int, k: int
) -> tuple[FloatArray, Provenance]:
    """Monotone times at every grid ``m``, shape (M,), of one weight shape, and its label."""
    utilisation, missing = _log_utilisation(grid, device, dtype)
    row, row_weight = bracket(np.log(grid.n), np.log([float(n)]))
    col, col_weight = bracket(np.log(grid.k), np.log([float(k)]))
    mean = np.zeros(len(grid.m))
    unmeasured = False
    for step_n, weight_n in ((0, 1 - row_weight[0]), (1, row_weight[0])):
        for step_k, weight_k in ((0, 1 - col_weight[0]), (1, col_weight[0])):
            i, j = row[0] + step_n, col[0] + step_k
            mean += weight_n * weight_k * utilisation[:, i, j]
            unmeasured |= bool(weight_n * weight_k > 0 and missing[:, i, j].any())
    log_roofline = np.log(_roofline_s(device, dtype, grid.m.astype(np.float64), n, k))
    place = max(
        int(point_labels(axis.astype(np.float64), np.array([float(size)]))[0])
        for axis, size in ((grid.n, n), (grid.k, k))
    )
    label = Provenance.EXTRAPOLATED if unmeasured else Provenance(place)
    return np.exp(isotonic(log_roofline - mean)), label


@lru_cache(maxsize=16)
def _log_utilisation(
    grid: GemmGrid, device: Device, dtype: str
) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Log of roofline over measured time, shape (M, N, K), and which cells were filled.

    A missing cell takes the nearest measured shape's utilisation at the same ``m``.
    """
    m, n, k = np.meshgrid(*(a.astype(np.float64) for a in (grid.m, grid.n, grid.k)), indexing="ij")
    log_utilisation = np.log(_roofline_s(device, dtype, m, n, k) / grid.time_s)
    missing = np.isnan(log_utilisation)
    filled = log_utilisation.copy()
    for at, row, col in np.argwhere(missing):
        distance = np.hypot(
            np.log(grid.n / grid.n[row])[:, None], np.log(grid.k / grid.k[col])[None, :]
        )
        nearest = np.argmin(np.where(missing[at], np.inf, distance))
        filled[at, row, col] = log_utilisation[at].flat[nearest]
    return filled, missing
