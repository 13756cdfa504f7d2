"""Time of dense matrix products from a measured grid."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np

from simulator.interpolate import (
    Provenance,
    between_neighbours,
    bracket,
    fill_gaps,
    held,
    isotonic,
    known_part,
    labels,
    point_labels,
    positive,
)
from simulator.kernel_work import product
from simulator.precision import PRECISIONS

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from simulator.device import Device
    from simulator.interpolate import FloatArray, LabelArray
    from simulator.table import GemmGrid, KernelTable

TILE_ROWS: Final = 64
"""Rows of the smallest tensor-core tile of Hopper and Blackwell (``wgmma`` m64nNk16 and
``tcgen05.mma`` m64, PTX ISA 8.7, sections 9.7.15 and 9.7.16)."""
STEEPEST: Final = 2.0
"""Bound on the slope of log measured over reference time in log n and log k. The reference moves by
at most 1 % with 1 % of a width, so that no time moves by more than 3 %. Measured neighbours that
break it (0.1 to 1.5 % of the pairs, H100 and vLLM 0.24) differ by a choice of kernel rather than by
their size."""
_WITHIN_TILE: Final = 1e-6
"""Share of a token's own count in its place on the axis: far below a tile."""


def gemm_s(
    table: KernelTable, device: Device, dtype: str, m: ArrayLike, n: int, k: int
) -> tuple[FloatArray, LabelArray]:
    """Seconds of ``(m, k) @ (k, n)``.

    What is interpolated is the log of measured over reference time, the reference being the
    grid's shortest time (a launch) plus arithmetic at the peak plus traffic at full bandwidth. A
    shape (n, k) off the grid takes it bilinearly in (log n, log k) at each measured ``m``: near
    shapes run at near utilisation. Whole shapes left out of the H100 grids (bf16, fp8; vLLM 0.24)
    are met to 2.5 and 2.2 % in the median; with the larger of arithmetic and traffic as reference
    to 2.9 and 2.7 %, with log time alone to 2.9 and 2.5 %.

    Times are then made non-decreasing in ``m`` (least squares of the log: measured times are noisy
    at small ``m`` and ragged at tile edges) and joined linearly, counting ``m`` in whole tiles of
    `TILE_ROWS`: a missing 257 lies nearer to 320 than to 256. With whole token counts left out
    that lowers the error of H100 and fp8 from 4.7 to 3.6 % in the median and from 21.8 to 16.5 %
    at p90; bf16 keeps its. Beyond the grid the boundary's utilisation is held. ``python -m
    bench.kernel_interpolation`` gives every table's errors.

    A precision that the table lacks takes the utilisation of the plain one with its arithmetic
    (block-scaled fp8 that of fp8, 4-bit weights multiplied as bf16 that of bf16) under its own
    traffic; where that was not measured either, the time is arithmetic plus traffic alone.

    Parameters
    ----------
    table, device
        Measured kernels, and the peaks of the same device.
    dtype
        Precision, a name of `simulator/precision.py`.
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
    source = next((s for s in (dtype, PRECISIONS[dtype].arithmetic) if s in table.gemm), None)
    if source is None:
        peak = device.flops(dtype)
        return _work_s(device, dtype, peak, tokens, n, k), labels(tokens.shape, Provenance.ROOFLINE)
    fit = _fit(table.gemm[source], device, source)
    peak = _reference_flops(device, dtype)
    reference_s = fit.launch_s + _work_s(device, dtype, peak, fit.m, n, k)
    log_ratio, place = fit.column(n, k)
    column_s = np.exp(isotonic(np.log(reference_s) + log_ratio))
    low, weight = bracket(_in_tiles(fit.m), _in_tiles(tokens))
    time_s = column_s[low] * (1 - weight) + column_s[low + 1] * weight
    beyond_s = fit.launch_s + _work_s(device, dtype, peak, tokens, n, k)
    time_s = np.where(tokens > fit.m[-1], beyond_s * column_s[-1] / reference_s[-1], time_s)
    borrowed = Provenance.MEASURED if source == dtype else Provenance.EXTRAPOLATED
    return time_s, np.maximum(point_labels(fit.m, tokens), np.int8(max(place, borrowed)))


def _work_s(
    device: Device,
    dtype: str,
    peak_flops: float,
    m: FloatArray,
    n: FloatArray | int,
    k: FloatArray | int,
) -> FloatArray:
    """Arithmetic at the peak plus traffic at full bandwidth."""
    work = product(dtype, m, n, k)
    return work.flops / peak_flops + work.moved_bytes / device.memory_bandwidth_bytes_per_s


def _in_tiles(m: FloatArray) -> FloatArray:
    """Token counts as kernels see them: rows padded to whole tiles.

    Rows inside one tile differ by so little that they only keep their order.
    """
    return np.ceil(m / TILE_ROWS) * TILE_ROWS + _WITHIN_TILE * m


def _reference_flops(device: Device, dtype: str) -> float:
    """Peak for a reference time: bf16's where an integer format has no floating-point peak.

    Ampere multiplies int8 but not fp8. The measured times carry the true rate.
    """
    return device.flops(dtype) or device.bf16_flops


@dataclass(frozen=True, eq=False)
class _Fit:
    """Log of measured over reference time of one grid, without gaps.

    ``m``, ``n``, ``k`` are the measured sizes; ``log_ratio`` has shape (M, N, K) and ``held``,
    shape (N, K), says for which shapes some of it is held from other sizes.
    """

    launch_s: float
    m: FloatArray
    n: FloatArray
    k: FloatArray
    log_ratio: FloatArray
    held: NDArray[np.bool_]

    def column(self, n: int, k: int) -> tuple[FloatArray, Provenance]:
        """Log ratio at every measured ``m`` for one weight shape, shape (M,), and its label."""
        row, row_weight = bracket(np.log(self.n), np.log([float(n)]))
        col, col_weight = bracket(np.log(self.k), np.log([float(k)]))
        mean = np.zeros(len(self.m))
        outside = False
        for step_n, weight_n in ((0, 1 - row_weight[0]), (1, row_weight[0])):
            for step_k, weight_k in ((0, 1 - col_weight[0]), (1, col_weight[0])):
                if weight_n * weight_k > 0:
                    i, j = row[0] + step_n, col[0] + step_k
                    mean += weight_n * weight_k * self.log_ratio[:, i, j]
                    outside |= bool(self.held[i, j])
        place = max(
            int(point_labels(axis, np.array([float(size)]))[0])
            for axis, size in ((self.n, n), (self.k, k))
        )
        return mean, Provenance.EXTRAPOLATED if outside else Provenance(place)


@lru_cache(maxsize=64)
def _fit(grid: GemmGrid, device: Device, dtype: str) -> _Fit:
    """Fill the gaps of one grid: between measured sizes from all sides, beyond them by holding."""
    (m, n, k), time_s = known_part((grid.m, grid.n, grid.k), grid.time_s)
    launch_s = float(np.nanmin(time_s))
    peak = _reference_flops(device, dtype)
    sizes = m[:, None, None], n[:, None], k
    log_ratio = np.log(time_s / (launch_s + _work_s(device, dtype, peak, *sizes)))
    if np.isnan(log_ratio).any():
        axes = enumerate((_in_tiles(m), np.log(n), np.log(k)))
        sides = [between_neighbours(log_ratio, axis, size) for axis, size in axes]
        log_ratio = fill_gaps(log_ratio, sides)
    outside = np.asarray(np.isnan(log_ratio).any(axis=0))
    for axis in range(log_ratio.ndim):
        log_ratio = held(log_ratio, axis)
    for axis, size in ((1, n), (2, k)):
        log_ratio = _no_steeper(log_ratio, axis, np.log(size))
    return _Fit(launch_s, m, n, k, log_ratio, outside)


def _no_steeper(values: FloatArray, axis: int, coordinate: FloatArray) -> FloatArray:
    """The values with every slope along one axis held to `STEEPEST`.

    The mean of the tightest bounds from above and below; values that keep to the slope stay.
    """
    lines = np.moveaxis(values, axis, -1)
    reach = STEEPEST * np.abs(coordinate[:, None] - coordinate)
    above = (lines[..., None, :] - reach).max(axis=-1)
    below = (lines[..., None, :] + reach).min(axis=-1)
    return np.moveaxis((above + below) / 2, -1, axis)
