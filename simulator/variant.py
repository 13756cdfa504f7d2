"""Kernel times of a device that nobody measured, from those of its nearest measured relative.

One formula scales every kernel. A measured time t is taken apart into

- a floor, the fastest time of its grid: launch and tail, kept as it is;
- the ideal time r of its arithmetic and traffic (`simulator/kernel_work.py`), as far as t holds
  it, scaled by r(target) / r(measured): the same share of the roofline is reached;
- the rest, instructions and waits inside the multiprocessors, scaled by their number times clock.

So a launch-bound cell keeps its time, one at the roofline scales with it, and in between the
result is continuous in t, in the shape and in every device fact; a device scales to itself
exactly. Scaling the whole time by the roofline ratio instead is off by 28 % for decode attention
between H100 and H200, whose multiprocessors are equal, where this is off by 2 %.

Rates are those that boards hold under their power limit, not datasheet peaks: on an RTX 4090
(vLLM layer times of Llama-3.1-8B) products of more than 512 tokens come out 12 % off by peaks and
4 % by sustained rates.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from simulator.kernel_work import (
    context_work,
    gemm_work,
    generation_work,
    latent_bmm_work,
    latent_work,
    moe_work,
    recurrent_work,
)
from simulator.table import KernelTable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from simulator.device import Device
    from simulator.kernel_work import Work
    from simulator.table import (
        AllToAllSeries,
        AttentionSeries,
        BatchedGemm,
        GemmGrid,
        LatentGrid,
        MessageSeries,
        MoeGrid,
        RecurrentSeries,
    )

    FloatArray = NDArray[np.float64]
    Grid = GemmGrid | AttentionSeries | MoeGrid | LatentGrid | BatchedGemm | RecurrentSeries
    Collectives = Mapping[tuple[str, int], MessageSeries]

GridT = TypeVar("GridT", bound="Grid")


def scaled_table(
    table: KernelTable,
    measured: Device,
    target: Device,
    pcie: tuple[KernelTable, Device] | None = None,
) -> KernelTable:
    """Estimate the target's kernel table.

    Precisions that either device cannot multiply at are dropped, so that nothing is invented.
    Collectives over NVLink keep their latency and scale their bandwidth term by the link; those
    of more devices than the target's NVLink joins come from a measured PCIe box in the same way,
    since their latency is that of another transport.

    Parameters
    ----------
    table, measured
        The nearest measured device and its table.
    target
        The device to estimate.
    pcie
        Table of a measured box whose devices meet over PCIe, and its device; ``None``: wider
        collectives are left out.

    Returns
    -------
    KernelTable
        Named after the target, with ``estimated_from`` set to the measured device's name.

    Raises
    ------
    ValueError
        If a device's multiprocessor rate is not known.

    """
    scale = _Scale(measured, target)
    bmm_widths = _bmm_widths(table.latent)
    return KernelTable(
        device=target.name,
        engine=table.engine,
        engine_version=table.engine_version,
        gemm={
            dtype: scale.grid(grid, gemm_work(dtype, grid))
            for dtype, grid in table.gemm.items()
            if scale.runs(dtype)
        },
        context=tuple(
            scale.grid(one, context_work(one)) for one in table.context if scale.runs(one.kv_dtype)
        ),
        generation=tuple(
            scale.grid(one, generation_work(one))
            for one in table.generation
            if scale.runs(one.kv_dtype)
        ),
        all_reduce=_collectives(table, measured, target, pcie, "all_reduce"),
        nccl=_collectives(table, measured, target, pcie, "nccl"),
        moe={
            dtype: scale.grid(grid, moe_work(dtype, grid))
            for dtype, grid in table.moe.items()
            if scale.runs(dtype)
        },
        latent=tuple(
            scale.grid(grid, latent_work(grid))
            for grid in table.latent
            if scale.runs(grid.weight_dtype) and scale.runs(grid.kv_dtype)
        ),
        latent_bmm={
            (side, dtype): scale.grid(grid, latent_bmm_work(dtype, grid, *bmm_widths[side]))
            for (side, dtype), grid in table.latent_bmm.items()
            if scale.runs(dtype) and side in bmm_widths
        },
        recurrent=tuple(scale.grid(one, recurrent_work(one)) for one in table.recurrent),
        all_to_all=_all_to_all(table.all_to_all, measured, target),
        estimated_from=measured.name,
    )


class _Scale:
    """Times on one device to times on another."""

    def __init__(self, measured: Device, target: Device) -> None:
        for device in (measured, target):
            if device.sm_hz <= 0:
                raise ValueError(f"the multiprocessor rate of {device.name} is not known")
        self._measured, self._target = measured, target

    def runs(self, dtype: str) -> bool:
        """Whether both devices multiply at ``dtype``."""
        return min(self._measured.flops(dtype), self._target.flops(dtype)) > 0

    def grid(self, grid: GridT, work: Sequence[Work]) -> GridT:
        """One grid or series with the target's times."""
        from_s = _ideal_s(work, self._measured)
        to_s = _ideal_s(work, self._target)
        rest_ratio = self._measured.sm_hz / self._target.sm_hz
        return replace(grid, time_s=_frozen(scaled_s(grid.time_s, from_s, to_s, rest_ratio)))


def scaled_s(
    time_s: FloatArray, from_s: FloatArray, to_s: FloatArray, rest_ratio: float
) -> FloatArray:
    """Times on another device, by the module's formula.

    Parameters
    ----------
    time_s
        Measured seconds of one grid, any shape; NaN where not measured.
    from_s, to_s
        Ideal seconds on the measured and on the target device, same shape, above 0.
    rest_ratio
        Time of the multiprocessors' own work on the target over that on the measured device.

    """
    floor_s = np.fmin.reduce(time_s, axis=None)
    above_s = time_s - floor_s
    ideal_s = np.minimum(from_s, above_s)
    scaled: FloatArray = floor_s + ideal_s * (to_s / from_s) + (above_s - ideal_s) * rest_ratio
    return scaled


def _ideal_s(work: Sequence[Work], device: Device) -> FloatArray:
    """Ideal seconds of a kernel's parts, one after the other."""
    first, *others = (part.ideal_s(device) for part in work)
    for other in others:
        first = first + other
    return first


def _bmm_widths(latent: tuple[LatentGrid, ...]) -> dict[str, tuple[int, int]]:
    """Weights of the products before and after the decode kernel, by the first measured model.

    The products' own grid does not say; only their roofline share depends on it.
    """
    if not latent:
        return {}
    one = latent[0]
    return {
        "pre": (one.qk_nope_head_dim, one.kv_lora_rank),
        "post": (one.kv_lora_rank, one.v_head_dim),
    }


def _collectives(
    table: KernelTable,
    measured: Device,
    target: Device,
    pcie: tuple[KernelTable, Device] | None,
    family: str,
) -> dict[tuple[str, int], MessageSeries]:
    """Collectives by (name, devices): within NVLink from the relative, wider from the PCIe box."""
    own: Collectives = getattr(table, family)
    ratio = measured.link_bytes_per_s / target.link_bytes_per_s
    reach = min(target.nvlink_domain, measured.nvlink_domain)
    if pcie is None:
        # A device alone in its node still needs the launch and latency of a collective there.
        reach = max(reach, min((gpus for _, gpus in own), default=reach))
    scaled = {key: _message(series, ratio) for key, series in own.items() if key[1] <= reach}
    if pcie is not None:
        box_table, box = pcie
        wide: Collectives = getattr(box_table, family)
        ratio = box.pcie_bytes_per_s / target.pcie_bytes_per_s
        scaled |= {
            key: _message(series, ratio)
            for key, series in wide.items()
            if target.nvlink_domain < key[1] <= target.scaleup_domain
        }
    return scaled


def _message(series: MessageSeries, link_ratio: float) -> MessageSeries:
    return replace(series, time_s=_frozen(_linked_s(series.time_s, link_ratio)))


def _all_to_all(
    family: tuple[AllToAllSeries, ...], measured: Device, target: Device
) -> tuple[AllToAllSeries, ...]:
    """Expert dispatch where NVLink joins as many devices per node; between nodes as measured."""
    ratio = measured.link_bytes_per_s / target.link_bytes_per_s
    return tuple(
        one if one.nodes > 1 else replace(one, time_s=_frozen(_linked_s(one.time_s, ratio)))
        for one in family
        if one.ranks // one.nodes <= target.nvlink_domain
    )


def _linked_s(time_s: FloatArray, link_ratio: float) -> FloatArray:
    """Latency (the smallest message's time) plus the rest by the links' bandwidths."""
    floor_s = np.fmin.reduce(time_s, axis=None)
    scaled: FloatArray = floor_s + (time_s - floor_s) * link_ratio
    return scaled


def _frozen(array: FloatArray) -> FloatArray:
    """The array made read-only: tables are shared by everything in the process."""
    array.setflags(write=False)
    return array
