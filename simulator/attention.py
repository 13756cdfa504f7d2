"""Time of attention kernels: decode over a KV cache, and prefill."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np

from simulator.attention_series import match
from simulator.interpolate import (
    Provenance,
    bracket,
    isotonic,
    isotonic_grid,
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
    from simulator.table import AttentionSeries, KernelTable

KV_TENSORS: Final = 2
"""A key and a value per token and KV head."""
FLOPS_PER_SCORE: Final = 4
"""Per query head, head width and attended token: a multiply-add for QK and one for PV."""
CAUSAL_HALF: Final = 0.5
"""A causal mask leaves half of the L x L scores."""
QUADRATIC: Final = 2
"""Exponent of long-prompt cost in length."""


def generation_attention_s(
    table: KernelTable,
    device: Device,
    kv_dtype: str,
    head_dim: int,
    heads: int,
    kv_heads: int,
    batch: ArrayLike,
    context: ArrayLike,
) -> tuple[FloatArray, LabelArray]:
    """Seconds of one layer's decode attention over every (batch, context) pair.

    Time is nearly affine in KV bytes once it leaves the launch floor, so it is joined bilinearly
    in (batch, context), after the grid is made non-decreasing along both. Leave-one-out on the
    H100 grid (each gap doubled, so pessimistic), mean of absolute errors: linear axes and linear
    time 6.2 % along batch and 3.0 % along context; log axes and log time 7.3 % and 3.9 %. Outside
    the grid, and in cells too large to have been measured, time grows with KV bytes at the
    nearest cell's bandwidth utilisation. Absent ``kv_heads`` run as more sequences of fewer
    heads: the same KV bytes and the same blocks of work (3.7 % mean error when 4 KV heads stand
    for 8; scaling the time gives 49 %). Leaving out one head count at width 128 costs 2.4 %, every
    series of one KV-head count 5.3 %.

    Parameters
    ----------
    table, device
        Measured kernels, and the roofline of the same device.
    kv_dtype, head_dim
        A pair that the table lacks is pure roofline.
    heads, kv_heads
        Query and KV heads on the rank.
    batch
        Sequences, shape (B,), each at least 1.
    context
        KV tokens read per sequence, the newest included, shape (C,), each at least 1.

    Returns
    -------
    time_s, label
        Shapes (B, C); non-decreasing along both axes.

    Raises
    ------
    ValueError
        If a size is below 1, or ``heads`` below ``kv_heads``.

    """
    sequences, tokens = positive("batch", batch), positive("context", context)
    mix = match(table.generation, head_dim, kv_dtype, heads, kv_heads)
    if mix is None:
        read_tokens = sequences[:, None] * tokens
        time_s = _generation_roofline_s(device, kv_dtype, head_dim, heads, kv_heads, read_tokens)
        return time_s, labels(time_s.shape, Provenance.ROOFLINE)
    time_s = np.zeros((len(sequences), len(tokens)))
    label = labels(time_s.shape, mix.label)
    for series, weight in mix.parts:
        part_s, part_label = _surface_s(series, sequences * mix.copies, tokens)
        time_s += weight * part_s
        label = np.maximum(label, part_label)
    return time_s, label


def _generation_roofline_s(
    device: Device, kv_dtype: str, head_dim: int, heads: int, kv_heads: int, read_tokens: FloatArray
) -> FloatArray:
    """KV traffic plus arithmetic: added, since a small decode kernel barely overlaps the two."""
    kv_bytes = KV_TENSORS * read_tokens * kv_heads * head_dim * DTYPE_BYTES[kv_dtype]
    flops = FLOPS_PER_SCORE * read_tokens * heads * head_dim
    return kv_bytes / device.memory_bandwidth_bytes_per_s + flops / device.bf16_flops


def _surface_s(
    series: AttentionSeries, batch: FloatArray, context: FloatArray
) -> tuple[FloatArray, LabelArray]:
    """Times of one measured series at every (batch, context) pair, shapes (B, C)."""
    grid_s, missing = _surface_fit(series)
    batch_axis, context_axis = series.batch.astype(np.float64), series.length.astype(np.float64)
    row, row_weight = bracket(batch_axis, batch)
    col, col_weight = bracket(context_axis, context)
    time_s = np.zeros((len(batch), len(context)))
    unmeasured = np.zeros(time_s.shape, dtype=bool)
    for step_b, weight_b in ((0, 1 - row_weight), (1, row_weight)):
        for step_c, weight_c in ((0, 1 - col_weight), (1, col_weight)):
            cell = np.ix_(row + step_b, col + step_c)
            weight = np.outer(weight_b, weight_c)
            time_s += weight * grid_s[cell]
            unmeasured |= missing[cell] & (weight > 0)
    time_s *= np.maximum(1.0, batch / batch_axis[-1])[:, None]
    time_s *= np.maximum(1.0, context / context_axis[-1])
    row_label, col_label = point_labels(batch_axis, batch), point_labels(context_axis, context)
    place = np.maximum(row_label[:, None], col_label)
    return time_s, np.where(unmeasured, np.int8(Provenance.EXTRAPOLATED), place)


@lru_cache(maxsize=1024)
def _surface_fit(series: AttentionSeries) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Monotone times of one series without gaps, shape (B, L), and which cells were filled.

    A missing cell takes the larger of its two smaller neighbours' times scaled by KV bytes, so
    filling keeps the grid monotone.
    """
    grid_s = np.exp(isotonic_grid(np.log(series.time_s)))
    missing = np.isnan(grid_s)
    batch, length = series.batch.astype(np.float64), series.length.astype(np.float64)
    for i, j in np.argwhere(missing):
        from_batch = grid_s[i - 1, j] * batch[i] / batch[i - 1] if i else 0.0
        from_length = grid_s[i, j - 1] * length[j] / length[j - 1] if j else 0.0
        grid_s[i, j] = max(from_batch, from_length)
    return grid_s, missing


def context_attention_s(
    table: KernelTable,
    device: Device,
    kv_dtype: str,
    head_dim: int,
    heads: int,
    kv_heads: int,
    length: ArrayLike,
) -> tuple[FloatArray, float, LabelArray]:
    """Seconds of one layer's prefill attention, as a launch and a cost per sequence.

    A batch of whole prompts costs ``launch_s + sum of F(length)``, where F is the marginal cost
    of a sequence in the largest measured batch of its length, the launch (time of one sequence of
    one token) taken off: mixed batches fill the device, so that cost adds up. A chunk of c tokens
    after p cached ones costs ``F(p + c) - F(p)``. F is made non-decreasing and joined as a power
    law between lengths, since it runs smoothly from linear to quadratic (leaving out one length:
    6.0 % mean, 2.9 % median error; straight lines 8.2 % and 7.0 %); beyond the table it grows
    quadratically (arithmetic at the last utilisation). On the H100 table the model is 4.2 % off in
    the mean over batches slower than 50 us; a single sequence, which cannot fill the device, reads
    9.7 % low. Leaving out one head count at width 128 costs 5.6 %, one KV-head count 8.1 %.

    Parameters
    ----------
    table, device
        Measured kernels, and the roofline of the same device.
    kv_dtype, head_dim
        A pair that the table lacks is pure roofline, with no launch.
    heads, kv_heads
        Query and KV heads on the rank; absent ones scale from the nearest measured layout,
        arithmetic being proportional to heads.
    length
        Prompt lengths, tokens, shape (T,), each 0 or more.

    Returns
    -------
    per_sequence_s, launch_s, label
        F, shape (T,), 0 at length 0 and non-decreasing; one launch; labels, shape (T,).

    Raises
    ------
    ValueError
        If a length is negative, or ``heads`` below ``kv_heads``.

    """
    tokens = np.atleast_1d(np.asarray(length, dtype=np.float64))
    if tokens.size and not bool((tokens >= 0).all()):
        raise ValueError(f"length must be at least 0, got {tokens.min()}")
    mix = match(table.context, head_dim, kv_dtype, heads, kv_heads)
    if mix is None:
        time_s = _context_roofline_s(device, kv_dtype, head_dim, heads, kv_heads, tokens)
        return time_s, 0.0, labels(tokens.shape, Provenance.ROOFLINE)
    time_s, launch_s = np.zeros(tokens.shape), 0.0
    label = labels(tokens.shape, mix.label)
    for series, weight in mix.parts:
        axis, log_f, part_launch_s = _marginal_fit(series)
        time_s += weight * _power_law(axis, log_f, tokens)
        launch_s += weight * part_launch_s
        label = np.maximum(label, point_labels(axis, tokens))
    return time_s * mix.copies * mix.head_ratio, launch_s, label


def _context_roofline_s(
    device: Device, kv_dtype: str, head_dim: int, heads: int, kv_heads: int, tokens: FloatArray
) -> FloatArray:
    query_and_output = KV_TENSORS * heads * DTYPE_BYTES["bf16"]
    per_token_bytes = head_dim * (query_and_output + KV_TENSORS * kv_heads * DTYPE_BYTES[kv_dtype])
    return roofline_s(
        FLOPS_PER_SCORE * CAUSAL_HALF * heads * head_dim * tokens**QUADRATIC,
        per_token_bytes * tokens,
        device.bf16_flops,
        device.memory_bandwidth_bytes_per_s,
    )


def _power_law(axis: FloatArray, log_f: FloatArray, tokens: FloatArray) -> FloatArray:
    """F at each length: straight to the origin below the axis, quadratic beyond it."""
    low, weight = bracket(np.log(axis), np.log(np.maximum(tokens, axis[0])))
    inside = np.exp(log_f[low] * (1 - weight) + log_f[low + 1] * weight)
    below = np.minimum(1.0, tokens / axis[0])
    beyond = np.maximum(1.0, tokens / axis[-1]) ** QUADRATIC
    time_s: FloatArray = inside * below * beyond
    return time_s


@lru_cache(maxsize=1024)
def _marginal_fit(series: AttentionSeries) -> tuple[FloatArray, FloatArray, float]:
    """Lengths with a usable marginal cost, its monotone log there, and the launch in seconds.

    A length whose full batch is no slower than the launch (noise) is left to its neighbours.
    """
    launch_s = float(series.time_s[0, 0])
    known = ~np.isnan(series.time_s)
    largest = len(series.batch) - 1 - np.argmax(known[::-1], axis=0)
    full_s = series.time_s[largest, np.arange(len(series.length))]
    marginal_s = (full_s - launch_s) / series.batch[largest]
    usable = marginal_s > 0  # False for a length never measured, where it is NaN
    return series.length[usable].astype(np.float64), isotonic(np.log(marginal_s[usable])), launch_s
