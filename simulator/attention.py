"""Time of softmax attention: decode over a KV cache, and prefill.

Both phases read one fitted surface over batch and length per measured head layout
(`simulator/attention_surface.py`). Head layouts, widths, KV dtypes and windows that were not
measured are read from one that was, at as many sequences as make the same work
(`simulator/attention_series.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from simulator.attention_prefill import prefill_sum
from simulator.attention_series import match
from simulator.attention_surface import surface
from simulator.attention_work import FULL_ATTENTION, AttentionShape
from simulator.interpolate import Provenance, labels, not_negative, point_labels, positive

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import ArrayLike

    from simulator.attention_series import Part, SeriesMix
    from simulator.attention_surface import Surface
    from simulator.device import Device
    from simulator.interpolate import FloatArray, LabelArray
    from simulator.table import AttentionSeries, KernelTable

    Family = tuple[AttentionSeries, ...]


def generation_attention_s(
    table: KernelTable,
    device: Device,
    kv_dtype: str,
    head_dim: int,
    heads: int,
    kv_heads: int,
    batch: ArrayLike,
    context: ArrayLike,
    window_tokens: int = FULL_ATTENTION,
) -> tuple[FloatArray, LabelArray]:
    """Seconds of one layer's decode attention over every (batch, context) pair.

    Parameters
    ----------
    table, device
        Measured kernels, and the peaks of the same device.
    kv_dtype, head_dim
        Dtype of the cache and width of a head; a pair that the table lacks is read from the
        nearest measured one.
    heads, kv_heads
        Query and KV heads on the rank.
    batch
        Sequences, shape (B,), each at least 1.
    context
        KV tokens read per sequence, the newest included, shape (C,), each at least 1.
    window_tokens
        Sliding window, or 0. One that was not measured is full attention over at most that many
        tokens.

    Returns
    -------
    time_s, label
        Shapes (B, C); non-decreasing along both axes.

    Raises
    ------
    ValueError
        If a size is below 1, or ``heads`` below ``kv_heads``.

    """
    shape = AttentionShape(
        prefill=False,
        head_dim=head_dim,
        heads=heads,
        kv_heads=kv_heads,
        kv_dtype=kv_dtype,
        window_tokens=window_tokens,
    )
    return _batch_s(table.generation, device, shape, batch, context)


def context_attention_batch_s(
    table: KernelTable,
    device: Device,
    kv_dtype: str,
    head_dim: int,
    heads: int,
    kv_heads: int,
    batch: ArrayLike,
    length: ArrayLike,
    window_tokens: int = FULL_ATTENTION,
) -> tuple[FloatArray, LabelArray]:
    """Seconds of one layer's prefill attention of whole prompts of one length.

    Parameters, errors as for `generation_attention_s`; ``length`` counts prompt tokens, shape (L,).

    Returns
    -------
    time_s, label
        Shapes (B, L); non-decreasing along both axes.

    """
    shape = AttentionShape(
        prefill=True,
        head_dim=head_dim,
        heads=heads,
        kv_heads=kv_heads,
        kv_dtype=kv_dtype,
        window_tokens=window_tokens,
    )
    return _batch_s(table.context, device, shape, batch, length)


def context_attention_s(
    table: KernelTable,
    device: Device,
    kv_dtype: str,
    head_dim: int,
    heads: int,
    kv_heads: int,
    length: ArrayLike,
    window_tokens: int = FULL_ATTENTION,
) -> tuple[FloatArray, float, LabelArray]:
    """Seconds of one layer's prefill attention of mixed prompts, as a launch and a part for each.

    A batch of whole prompts costs ``launch_s + sum of F(length)`` plus the underfill of their
    tokens in all (`context_underfill_s`). A chunk of c tokens after p cached ones costs
    ``F(p + c) - F(p)``. The three are fitted to the surface that `context_attention_batch_s`
    reads; on H100 (vLLM 0.24) their sum meets the measured batches to 2.6 % in the median, 1.6 %
    where they take more than 50 us; a fit without the underfill to 3.6 and 2.4 %.

    Parameters
    ----------
    table, device, kv_dtype, head_dim, heads, kv_heads, window_tokens
        As for `generation_attention_s`.
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
    tokens = not_negative("length", length)
    shape = AttentionShape(
        prefill=True,
        head_dim=head_dim,
        heads=heads,
        kv_heads=kv_heads,
        kv_dtype=kv_dtype,
        window_tokens=window_tokens,
    )
    mix = match(table.context, shape)
    if mix is None:
        time_s = shape.work_s(device, np.ones_like(tokens), tokens)
        return time_s, 0.0, labels(tokens.shape, Provenance.ROOFLINE)
    time_s, launch_s = np.zeros(tokens.shape), 0.0
    label = labels(tokens.shape, mix.label)
    for part, fitted in _fitted(table.context, device, shape, mix):
        fit = prefill_sum(fitted)
        part_s = fit.per_sequence_s(fitted, tokens, _longest(shape, fitted))
        time_s += part.weight * part.sequences * part_s
        launch_s += part.weight * fit.launch_s
        label = np.maximum(label, point_labels(fitted.measured_length, tokens))
    return time_s, launch_s, label


def context_underfill_s(
    table: KernelTable,
    device: Device,
    kv_dtype: str,
    head_dim: int,
    heads: int,
    kv_heads: int,
    tokens: ArrayLike,
    window_tokens: int = FULL_ATTENTION,
) -> tuple[FloatArray, LabelArray]:
    """Seconds that one layer's prefill attention takes beyond `context_attention_s`.

    Few prompt tokens leave a part of the device idle, so that their kernel takes longer than its
    share of a full one.

    Parameters
    ----------
    table, device, kv_dtype, head_dim, heads, kv_heads, window_tokens
        As for `generation_attention_s`.
    tokens
        New prompt tokens of an iteration in all, shape (T,), each 0 or more.

    Returns
    -------
    time_s, label
        Shapes (T,); non-decreasing, 0 where there are no tokens.

    Raises
    ------
    ValueError
        If a count is negative, or ``heads`` below ``kv_heads``.

    """
    counts = not_negative("tokens", tokens)
    shape = AttentionShape(
        prefill=True,
        head_dim=head_dim,
        heads=heads,
        kv_heads=kv_heads,
        kv_dtype=kv_dtype,
        window_tokens=window_tokens,
    )
    mix = match(table.context, shape)
    time_s = np.zeros(counts.shape)
    if mix is None:
        return time_s, labels(counts.shape, Provenance.ROOFLINE)
    for part, fitted in _fitted(table.context, device, shape, mix):
        time_s += part.weight * prefill_sum(fitted).underfill_of_s(counts * part.sequences)
    place = max(mix.label, Provenance.INTERPOLATED)
    return np.where(counts > 0, time_s, 0.0), labels(counts.shape, place)


def _batch_s(
    family: Family, device: Device, shape: AttentionShape, batch: ArrayLike, length: ArrayLike
) -> tuple[FloatArray, LabelArray]:
    """Times at every (batch, length) pair, shapes (B, L)."""
    sequences, tokens = positive("batch", batch)[:, None], positive("length", length)[None, :]
    mix = match(family, shape)
    if mix is None:
        time_s = shape.work_s(device, sequences, tokens)
        return time_s, labels(time_s.shape, Provenance.ROOFLINE)
    time_s = np.zeros((sequences.size, tokens.size))
    label = labels(time_s.shape, mix.label)
    for part, fitted in _fitted(family, device, shape, mix):
        longest = _longest(shape, fitted)
        kept, count = np.minimum(tokens, longest), sequences * part.sequences
        if shape.prefill and longest < np.inf:
            # Prompts longer than the window count as more sequences as long as the window.
            count = count * fitted.growth(kept, tokens, longest)
        part_s, part_label = fitted.at(count, kept)
        time_s += part.weight * part_s
        label = np.maximum(label, part_label)
    return time_s, label


def _fitted(
    family: Family, device: Device, shape: AttentionShape, mix: SeriesMix
) -> Iterator[tuple[Part, Surface]]:
    for part in mix.parts:
        yield part, surface(family, part.index, device, shape.prefill)


def _longest(shape: AttentionShape, fitted: Surface) -> float:
    """Window that a series must be cut to because it was measured without it, or infinity."""
    if fitted.shape.window_tokens == shape.window_tokens:
        return np.inf
    return shape.window_tokens
