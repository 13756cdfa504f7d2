"""Time of collectives inside one scale-up domain."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from simulator.interpolate import Provenance, bracket, isotonic, labels, point_labels, positive

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike

    from simulator.device import Device
    from simulator.interpolate import FloatArray, LabelArray
    from simulator.table import KernelTable, MessageSeries


def all_reduce_s(
    table: KernelTable, device: Device, backend: str, gpus: int, elements: ArrayLike
) -> tuple[FloatArray, LabelArray]:
    """Seconds of the engine's own all-reduce of 2-byte elements.

    Latency is flat for small messages and proportional for large ones over seven decades, so log
    time is made non-decreasing and joined linearly in log size (leaving out one size: 4.7 % mean
    error, NCCL 6.1 %). Below the table the smallest message's time is held (latency), beyond it
    the largest one's bandwidth.

    Parameters
    ----------
    table, device
        Measured kernels and their device; its scale-up domain bounds ``gpus``.
    backend
        ``graph`` inside a CUDA graph, ``eager`` outside one.
    gpus
        Participants; 1 costs nothing.
    elements
        Message sizes, elements (not bytes), shape (T,), each at least 1.

    Returns
    -------
    time_s, label
        Shapes (T,); non-decreasing in ``elements``.

    Raises
    ------
    ValueError
        If ``gpus`` or ``backend`` was not measured, or ``gpus`` leaves the scale-up domain.

    """
    return _collective_s(table.all_reduce, device, backend, gpus, elements)


def nccl_s(
    table: KernelTable, device: Device, op: str, gpus: int, elements: ArrayLike
) -> tuple[FloatArray, LabelArray]:
    """Seconds of one NCCL operation; everything else as for `all_reduce_s`.

    Parameters
    ----------
    table, device, gpus, elements
        As for `all_reduce_s`.
    op
        ``all_gather``, ``all_reduce``, ``alltoall`` or ``reduce_scatter``.

    Returns
    -------
    time_s, label
        Shapes (T,); non-decreasing in ``elements``.

    Raises
    ------
    ValueError
        If ``gpus`` or ``op`` was not measured, or ``gpus`` leaves the scale-up domain.

    """
    return _collective_s(table.nccl, device, op, gpus, elements)


def _collective_s(
    family: Mapping[tuple[str, int], MessageSeries],
    device: Device,
    kind: str,
    gpus: int,
    elements: ArrayLike,
) -> tuple[FloatArray, LabelArray]:
    kinds = sorted({name for name, _ in family})
    if kind not in kinds:
        raise ValueError(f"no times of collective {kind!r}: the table has {kinds}")
    size = positive("elements", elements)
    if gpus == 1:
        return np.zeros(size.shape), labels(size.shape, Provenance.MEASURED)
    measured = sorted(count for name, count in family if name == kind)
    if gpus not in measured:
        raise ValueError(f"{kind} was measured on {measured} GPUs, not on {gpus}")
    if gpus > device.scaleup_domain:
        raise ValueError(
            f"{kind} on {gpus} GPUs leaves the scale-up domain of {device.scaleup_domain}"
        )
    axis, log_time = _fit(family[kind, gpus])
    low, weight = bracket(np.log(axis), np.log(size))
    time_s = np.exp(log_time[low] * (1 - weight) + log_time[low + 1] * weight)
    return time_s * np.maximum(1.0, size / axis[-1]), point_labels(axis, size)


@lru_cache(maxsize=256)
def _fit(series: MessageSeries) -> tuple[FloatArray, FloatArray]:
    """Measured sizes and their monotone log times, shapes (E,)."""
    known = ~np.isnan(series.time_s)
    return series.elements[known].astype(np.float64), isotonic(np.log(series.time_s[known]))
