"""Time of latent-attention kernels, dense and sparse: decode over a latent cache, and prefill."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from simulator.interpolate import Provenance, bracket, labels, not_negative, point_labels, positive
from simulator.latent_grid import kernel_surface, nearest_grids
from simulator.latent_prompt import floor_s, prompt_fit
from simulator.latent_work import CONTEXT, GENERATION, ideal_s, indexer_s
from simulator.local_fit import joined_labels

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from simulator.device import Device
    from simulator.interpolate import FloatArray, LabelArray
    from simulator.latent_grid import Surface
    from simulator.model import LatentAttention
    from simulator.table import KernelTable


def latent_generation_s(
    table: KernelTable,
    device: Device,
    attention: LatentAttention,
    heads: int,
    kv_dtype: str,
    batch: ArrayLike,
    context: ArrayLike,
) -> tuple[FloatArray, LabelArray]:
    """Seconds of one layer's decode attention without its projections, at every pair of sizes.

    The kernel, the products of each head with its part of ``kv_b``, norms, rotary embedding, cache
    write and, for sparse attention, the indexer's scan and selection: all that a layer runs beside
    `simulator/ops.latent_gemms`. `latent_grid.kernel_surface` says how this is taken from the
    measured modules or kernels. Time is joined bilinearly in batch and context, being nearly affine
    in cached bytes; beyond the table it grows with the roofline.

    A sparse model on a table without sparse attention takes dense attention over the tokens that
    it keeps, and the roofline of its indexer.

    Parameters
    ----------
    table, device
        Measured kernels, and the peaks of the same device.
    attention
        Widths; unmeasured ones scale the nearest measured ones by the roofline.
    heads
        Heads on the rank.
    kv_dtype
        ``bf16`` or ``fp8``.
    batch
        Sequences, shape (B,), each at least 1.
    context
        Tokens attended to by each, the newest included, shape (C,), each at least 1.

    Returns
    -------
    time_s, label
        Shapes (B, C); non-decreasing along both axes.

    Raises
    ------
    ValueError
        If a size is below 1.

    """
    sequences, tokens = positive("batch", batch), positive("context", context)
    positive("heads", [heads])
    size = (attention, heads, kv_dtype)
    parts = nearest_grids(table, GENERATION, attention, kv_dtype)
    if not parts and attention.index_topk:
        kept = np.minimum(tokens, attention.index_topk)
        dense = _dense(attention)
        time_s, label = latent_generation_s(table, device, dense, heads, kv_dtype, sequences, kept)
        scan_s = indexer_s(device, attention, GENERATION, sequences, tokens)
        return time_s + scan_s, np.maximum(label, np.int8(Provenance.EXTRAPOLATED))
    if not parts:
        time_s = ideal_s(device, *size, GENERATION, sequences, tokens)
        return time_s, labels(time_s.shape, Provenance.ROOFLINE)
    time_s = np.zeros((len(sequences), len(tokens)))
    label = labels(time_s.shape, Provenance.MEASURED)
    for grid, weight in parts:
        surface = kernel_surface(table, device, grid, *size)
        part_s = _bilinear(surface.time_s, surface.batch, sequences, surface.length, tokens)
        beyond = _beyond(device, attention, heads, kv_dtype, GENERATION, surface, sequences, tokens)
        time_s += weight * part_s * beyond
        label = np.maximum(label, _label(surface, sequences, tokens))
    return time_s, label


def latent_context_s(
    table: KernelTable,
    device: Device,
    attention: LatentAttention,
    heads: int,
    kv_dtype: str,
    length: ArrayLike,
) -> tuple[FloatArray, float, LabelArray]:
    """Seconds of one layer's prefill attention without its projections, as in dense attention.

    A batch of whole prompts costs ``launch_s + sum of F(length)`` and the underfill of its tokens
    in all (`latent_underfill_s`), a chunk of c tokens after p cached ones ``F(p + c) - F(p)``.
    Included is what `latent_generation_s` includes, with keys and values expanded from the latent
    by one product with ``kv_b``; a chunk's renewed expansion of cached tokens is not. F is joined
    as a power law between measured lengths, as it runs smoothly from linear to quadratic; beyond
    them it follows chunks measured after a prefix, where there are any, and then the roofline. A
    whole module of sparse attention takes at least `latent_context_floor_s`.

    On H100 the three, with the projections put back, meet the measured batches of dense attention
    to 1.1 % in the median (vLLM), 3.0 % (SGLang, the bare kernel) and 2.2 % (TensorRT-LLM), those
    of sparse attention to 0.6, 1.8 and 0.4 %.

    Parameters
    ----------
    table, device, attention, heads, kv_dtype
        As in `latent_generation_s`.
    length
        Prompt lengths, tokens, shape (T,), each 0 or more.

    Returns
    -------
    per_sequence_s, launch_s, label
        F, shape (T,), 0 at length 0 and non-decreasing; one launch; labels, shape (T,).

    Raises
    ------
    ValueError
        If a length is negative or ``heads`` below 1.

    """
    tokens = not_negative("length", length)
    positive("heads", [heads])
    size = (attention, heads, kv_dtype)
    parts = nearest_grids(table, CONTEXT, attention, kv_dtype)
    if not parts and attention.index_topk:
        return _context_from_dense(table, device, attention, heads, kv_dtype, tokens)
    if not parts:
        time_s = ideal_s(device, *size, CONTEXT, np.ones(1), tokens)[0]
        return np.where(tokens > 0, time_s, 0.0), 0.0, labels(tokens.shape, Provenance.ROOFLINE)
    time_s, launch_s = np.zeros(tokens.shape), 0.0
    label = labels(tokens.shape, Provenance.MEASURED)
    for grid, weight in parts:
        fit = prompt_fit(table, device, grid, *size)
        log_tokens = np.log(np.maximum(tokens, fit.length[0]))
        part_s = np.exp(np.interp(log_tokens, np.log(fit.length), fit.log_s))
        part_s[tokens < fit.length[0]] *= tokens[tokens < fit.length[0]] / fit.length[0]
        time_s += weight * part_s
        launch_s += weight * fit.launch_s
        label = np.maximum(label, joined_labels(fit.length, fit.label, tokens))
    return time_s, launch_s, label


def latent_underfill_s(
    table: KernelTable,
    device: Device,
    attention: LatentAttention,
    heads: int,
    kv_dtype: str,
    tokens: ArrayLike,
) -> tuple[FloatArray, LabelArray]:
    """Seconds that prefill attention takes beyond `latent_context_s`, as in dense attention.

    Few prompt tokens leave a part of the device idle, so that they take longer than their share.

    Parameters
    ----------
    table, device, attention, heads, kv_dtype
        As in `latent_generation_s`.
    tokens
        New prompt tokens of an iteration in all, shape (T,), each 0 or more.

    Returns
    -------
    time_s, label
        Shapes (T,); non-decreasing, 0 where there are no tokens.

    Raises
    ------
    ValueError
        If a count is negative or ``heads`` below 1.

    """
    counts = not_negative("tokens", tokens)
    positive("heads", [heads])
    parts = nearest_grids(table, CONTEXT, attention, kv_dtype)
    if not parts and attention.index_topk:
        return latent_underfill_s(table, device, _dense(attention), heads, kv_dtype, counts)
    if not parts:
        return np.zeros(counts.shape), labels(counts.shape, Provenance.ROOFLINE)
    time_s = np.zeros(counts.shape)
    label = np.int8(Provenance.INTERPOLATED)
    for grid, weight in parts:
        fit = prompt_fit(table, device, grid, attention, heads, kv_dtype)
        at = np.log(np.maximum(counts, 1.0))
        time_s += weight * np.interp(at, fit.log_tokens, fit.underfill_s)
        label = np.maximum(label, fit.label.max())
    return np.where(counts > 0, time_s, 0.0), np.full(counts.shape, label)


def latent_context_floor_s(
    table: KernelTable, device: Device, attention: LatentAttention, heads: int, kv_dtype: str
) -> float:
    """Least seconds of a whole module (projections included) that computes prompt tokens.

    Modules of sparse attention launch so many kernels that short prompts wait for the host: the
    measured time stays flat until the device's work exceeds it. 0 for dense attention, whose
    launch is in `latent_context_s`, and where no sparse attention was measured.

    Parameters
    ----------
    table, device, attention, heads, kv_dtype
        As in `latent_generation_s`.

    """
    if not attention.index_topk:
        return 0.0
    least_s = 0.0
    for grid, weight in nearest_grids(table, CONTEXT, attention, kv_dtype):
        surface = kernel_surface(table, device, grid, attention, heads, kv_dtype)
        least_s += weight * floor_s(surface)
    return least_s


def latent_context_batch_s(
    table: KernelTable,
    device: Device,
    attention: LatentAttention,
    heads: int,
    kv_dtype: str,
    batch: ArrayLike,
    length: ArrayLike,
) -> tuple[FloatArray, LabelArray]:
    """Seconds of prefill attention over batches of equal prompts, as measured.

    The surface that `latent_context_s` is fitted to: a power law in batch and in length between
    measured sizes, roofline growth beyond them. Of a module that waits for its host the part that
    is not projections may fall as the batch grows; the two together never do.

    Parameters
    ----------
    table, device, attention, heads, kv_dtype
        As in `latent_generation_s`; the table must hold a prefill grid of dense, or of sparse,
        attention alike.
    batch, length
        Prompts, shape (B,), and tokens of each, shape (L,), each at least 1.

    Returns
    -------
    time_s, label
        Shapes (B, L).

    Raises
    ------
    ValueError
        If a size is below 1, or nothing alike was measured.

    """
    sequences, tokens = positive("batch", batch), positive("length", length)
    parts = nearest_grids(table, CONTEXT, attention, kv_dtype)
    if not parts:
        raise ValueError("the table holds no prefill of such latent attention")
    size = (attention, heads, kv_dtype)
    time_s = np.zeros((len(sequences), len(tokens)))
    label = labels(time_s.shape, Provenance.MEASURED)
    for grid, weight in parts:
        surface = kernel_surface(table, device, grid, *size)
        log_s = _bilinear(
            np.log(surface.time_s),
            np.log(surface.batch),
            np.log(sequences),
            np.log(surface.length),
            np.log(tokens),
        )
        beyond = _beyond(device, *size, CONTEXT, surface, sequences, tokens)
        time_s += weight * np.exp(log_s) * beyond
        label = np.maximum(label, _label(surface, sequences, tokens))
    return time_s, label


def _context_from_dense(
    table: KernelTable,
    device: Device,
    attention: LatentAttention,
    heads: int,
    kv_dtype: str,
    tokens: FloatArray,
) -> tuple[FloatArray, float, LabelArray]:
    """Sparse prefill where only dense was measured: dense for the first ``index_topk`` tokens.

    A later token attends to that many, twice what the first ones do in the mean, so it costs
    twice their mean; the indexer comes on top at its roofline.
    """
    kept = np.minimum(tokens, attention.index_topk)
    dense = _dense(attention)
    time_s, launch_s, label = latent_context_s(table, device, dense, heads, kv_dtype, kept)
    later = np.maximum(1.0, 2 * tokens / attention.index_topk - 1)
    scan_s = indexer_s(device, attention, CONTEXT, np.ones(1), tokens)[0]
    worst = np.maximum(label, np.int8(Provenance.EXTRAPOLATED))
    return time_s * later + scan_s, launch_s, worst


def _dense(attention: LatentAttention) -> LatentAttention:
    """The same attention without its indexer."""
    return replace(attention, index_topk=0, index_heads=0, index_head_dim=0)


def _bilinear(
    value: FloatArray, rows: FloatArray, at_row: FloatArray, columns: FloatArray, at: FloatArray
) -> FloatArray:
    """Values at every pair of places on a grid's axes, held beyond them."""
    low, upper = bracket(rows, at_row)
    across = value[low] * (1 - upper[:, None]) + value[low + 1] * upper[:, None]
    low, upper = bracket(columns, at)
    joined: FloatArray = across[:, low] * (1 - upper) + across[:, low + 1] * upper
    return joined


def _label(surface: Surface, batch: FloatArray, length: FloatArray) -> LabelArray:
    """Worst label of the cells that a value is joined from, or of its place."""
    rows, columns = bracket(surface.batch, batch), bracket(surface.length, length)
    worst = np.maximum(
        point_labels(surface.batch, batch)[:, None], point_labels(surface.length, length)
    )
    for row, has_row in ((rows[0], rows[1] < 1), (rows[0] + 1, rows[1] > 0)):
        for column, has_column in ((columns[0], columns[1] < 1), (columns[0] + 1, columns[1] > 0)):
            corner = np.where(np.outer(has_row, has_column), surface.label[row][:, column], 0)
            worst = np.maximum(worst, corner)
    return worst.astype(np.int8)


def _beyond(
    device: Device,
    attention: LatentAttention,
    heads: int,
    kv_dtype: str,
    phase: str,
    surface: Surface,
    batch: FloatArray,
    length: FloatArray,
) -> FloatArray:
    """Growth by the roofline from the nearest measured size, shape (B, L)."""
    inside = np.minimum(batch, surface.batch[-1]), np.minimum(length, surface.length[-1])
    if (inside[0] == batch).all() and (inside[1] == length).all():
        return np.ones((len(batch), len(length)))
    size = (device, attention, heads, kv_dtype, phase)
    growth: FloatArray = ideal_s(*size, batch, length) / ideal_s(*size, *inside)
    return growth
