"""Which measured latent-attention grids stand for a rank's heads, and their kernel's times."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np

from simulator.interpolate import Provenance, isotonic_grid
from simulator.latent_work import BF16, CONTEXT, ideal_s, projections_s, surroundings_s
from simulator.local_fit import between, grown, local_slab, without_spikes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from simulator.device import Device
    from simulator.interpolate import FloatArray, LabelArray
    from simulator.model import LatentAttention
    from simulator.table import KernelTable, LatentGrid

STRETCH: Final = {"context": 2.0, "generation": 1.0}
"""How much faster than along one axis a kernel's regime changes with all sizes together. A prompt
kernel's steps lie where heads times tokens fill the device once more. With 2 the median error on
left-out points of H100's dense context grids is 1.2 % (vLLM), 1.8 % (SGLang) and 1.6 %
(TensorRT-LLM); with 1 it is 1.0, 2.6 and 1.4 %. Decode is best at 1: 0.6, 0.7 and 0.8 %."""
LEAST_SHARE: Final = 0.5
"""A kernel takes at least this share of its roofline at bf16 rates: an fp8 kernel may run at twice
those. Where subtracting the projections leaves less, the module hid its kernel behind launches."""


@dataclass(frozen=True, eq=False)
class Surface:
    """Kernel times without gaps on one grid's sizes.

    Parameters
    ----------
    batch, length
        Ascending axes, shapes (B,) and (L,).
    time_s, label
        Seconds and where they come from, shapes (B, L).
    measured
        Whether a cell lies in the measured range, shape (B, L), so that it can be fitted to.
    around_s
        What was taken off the measured times (a module's projections) or, negative, added to them,
        shape (B, L), before widths were scaled: the two together are what was measured.

    """

    batch: FloatArray
    length: FloatArray
    time_s: FloatArray
    label: LabelArray
    measured: NDArray[np.bool_]
    around_s: FloatArray


def nearest_grids(
    table: KernelTable, phase: str, attention: LatentAttention, kv_dtype: str
) -> tuple[tuple[LatentGrid, float], ...]:
    """Grids of the nearest widths and their weights.

    Sparse and dense attention never stand for each other. Grids of the wanted KV dtype serve, else
    of another. Of grids that agree in widths a module serves, as it misses nothing, and rather one
    with bf16 projections: the kernel does not depend on them, and those are known best. Unlike
    widths are weighted by the inverse square of their distance (Shepard, 1968), the sum of their
    log ratios, so that moving a width moves the time smoothly.

    Returns
    -------
    tuple of (LatentGrid, float)
        Empty if nothing fits; else the weights sum to 1.

    """
    fitting = [
        grid
        for grid in table.latent
        if grid.phase == phase
        and bool(grid.index_topk) == bool(attention.index_topk)
        and not np.isnan(grid.time_s[0]).all()
    ]
    if not fitting:
        return ()

    own_kv = [grid for grid in fitting if grid.kv_dtype == kv_dtype] or fitting
    by_widths: dict[tuple[float, ...], LatentGrid] = {}
    for grid in sorted(own_kv, key=lambda one: (not one.module, one.weight_dtype != BF16)):
        by_widths.setdefault(tuple(_widths(_as_model(grid, attention)).tolist()), grid)
    chosen = list(by_widths.values())
    place = np.log1p(_widths(attention))
    distance = np.array([np.abs(np.log1p(widths) - place).sum() for widths in by_widths])
    if (distance == 0).any():
        return ((chosen[int(np.argmin(distance))], 1.0),)
    weight = distance**-2
    return tuple(zip(chosen, (weight / weight.sum()).tolist(), strict=True))


def _widths(attention: LatentAttention) -> FloatArray:
    return np.array(
        [
            attention.kv_lora_rank,
            attention.qk_rope_head_dim,
            attention.qk_nope_head_dim,
            attention.v_head_dim,
            attention.index_topk,
        ],
        dtype=np.float64,
    )


def _as_model(grid: LatentGrid, attention: LatentAttention) -> LatentAttention:
    """The measured model; tables do not tell its indexer's widths, so it has the wanted one's."""
    return replace(
        attention,
        q_lora_rank=grid.q_lora_rank,
        kv_lora_rank=grid.kv_lora_rank,
        qk_nope_head_dim=grid.qk_nope_head_dim,
        qk_rope_head_dim=grid.qk_rope_head_dim,
        v_head_dim=grid.v_head_dim,
        index_topk=grid.index_topk,
        dtype=grid.weight_dtype,
    )


@lru_cache(maxsize=256)
def kernel_surface(
    table: KernelTable,
    device: Device,
    grid: LatentGrid,
    attention: LatentAttention,
    heads: int,
    kv_dtype: str,
) -> Surface:
    """Times of ``grid``'s kernel for the wanted heads and widths.

    From a module's time its projections are taken off (`latent_work.projections_s`); to a bare
    kernel what else a module holds is added (`latent_work.surroundings_s`). Other widths, KV
    dtypes and heads beyond the measured ones scale the part above the fastest cell, the launch, by
    the roofline. Cells beyond the measured sizes grow by the roofline from the last one.
    """
    known_heads = grid.heads[~np.isnan(grid.time_s[0]).all(axis=(1, 2))]
    reached = int(np.clip(heads, known_heads[0], known_heads[-1]))
    batch, length = grid.batch.astype(np.float64), grid.length.astype(np.float64)
    rows = np.outer(batch, length if grid.phase == CONTEXT else np.ones(len(length)))
    measured_model = _as_model(grid, attention)
    whole_s, filled = _module_s(grid, reached)
    around = (table, device, measured_model)
    if grid.module:
        around_s = projections_s(*around, grid.hidden_size, reached, rows)
    else:
        around_s = -surroundings_s(*around, reached, grid.phase, rows)
    sizes = (grid.phase, batch, length)
    measured_ideal = ideal_s(device, measured_model, reached, grid.kv_dtype, *sizes)
    time_s = np.maximum(whole_s - around_s, LEAST_SHARE * measured_ideal)
    around_s = np.where(np.isnan(whole_s), around_s, whole_s - time_s)
    ideal = ideal_s(device, attention, heads, kv_dtype, *sizes)
    launch_s = np.nanmin(time_s)
    time_s = launch_s + (time_s - launch_s) * ideal / measured_ideal
    measured = ~np.isnan(time_s)
    time_s = grown(time_s, ideal)
    if grid.phase != CONTEXT:
        time_s = np.exp(isotonic_grid(np.log(time_s)))
    exact = bool((ideal == measured_ideal).all())
    inside = np.where(filled, Provenance.INTERPOLATED, Provenance.MEASURED)
    label = np.where(measured & exact, inside, Provenance.EXTRAPOLATED).astype(np.int8)
    return Surface(batch, length, time_s, label, measured, around_s)


@lru_cache(maxsize=256)
def _module_s(grid: LatentGrid, heads: int) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Monotone measured times for ``heads`` within the measured range, and which were filled.

    A cell between measured ones along any axis is filled by `local_slab` in the logs of
    heads, batch and length, so a head count that was not measured is a slab of such cells. Cells
    beyond the measured sizes stay NaN.
    """
    measured_s = without_spikes(grid.time_s[0])
    known = ~np.isnan(measured_s)
    with_cells = np.flatnonzero(known.any(axis=(1, 2)))
    nearest = with_cells[np.argmin(np.abs(np.log(grid.heads[with_cells] / heads)))]
    slab = np.log(measured_s[nearest])
    own = grid.heads[nearest] == heads
    log_s = slab if own else np.full(slab.shape, np.nan)
    holes = np.isnan(log_s)
    in_heads = known[grid.heads < heads].any(axis=0) & known[grid.heads > heads].any(axis=0)
    fill = holes & (in_heads | between(~holes, 0) | between(~holes, 1))
    if fill.any():
        axes = [np.log(axis.astype(np.float64)) for axis in (grid.heads, grid.batch, grid.length)]
        fitted = local_slab(
            np.stack([axis[at] for axis, at in zip(axes, np.nonzero(known), strict=True)], axis=1),
            np.log(measured_s[known]),
            np.log([float(heads)]),
            axes[0][[nearest]],
            slab,
            axes[1],
            axes[2],
            STRETCH[grid.phase],
        )
        log_s = np.where(fill, fitted, log_s)
    if np.isnan(log_s).all():  # neighbours that share no cell: the nearest one's times
        log_s = slab
    return np.exp(isotonic_grid(log_s)), holes
