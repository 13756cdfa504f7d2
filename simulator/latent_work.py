"""What latent attention's kernels do beside the projections: arithmetic, traffic, neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from simulator.gemm import gemm_s
from simulator.interpolate import bracket
from simulator.kernel_work import BF16_BYTES, FLOPS_PER_MAC, Work, latent_work
from simulator.ops import latent_gemms
from simulator.precision import PRECISIONS
from simulator.table import LatentGrid
from simulator.units import DTYPE_BYTES

if TYPE_CHECKING:
    from simulator.device import Device
    from simulator.interpolate import FloatArray
    from simulator.model import LatentAttention
    from simulator.table import BatchedGemm, KernelTable

CONTEXT: Final = "context"
GENERATION: Final = "generation"
BF16: Final = "bf16"
INDEX_KEY: Final = "fp8"
"""The indexer's keys and their scores (DeepSeek-V3.2, arXiv 2512.02556, section 2.1)."""
SMALL_KERNELS: Final = 4
"""Kernels that a module holds and a bare kernel does not: norms of the compressed query and of the
latent, rotary embedding, cache write (vLLM model_executor/layers/mla.py)."""


def ideal_s(
    device: Device,
    attention: LatentAttention,
    heads: int,
    kv_dtype: str,
    phase: str,
    batch: FloatArray,
    length: FloatArray,
) -> FloatArray:
    """Roofline seconds of the attention kernel, the per-head products and the indexer's scan.

    Parameters
    ----------
    device, attention, heads, kv_dtype
        What runs, and the heads on the rank.
    phase
        ``context``: sequences of new tokens; ``generation``: one new token each.
    batch, length
        Sequences, shape (B,), and tokens of each, shape (L,).

    Returns
    -------
    FloatArray
        Seconds, shape (B, L), growing along both axes; arithmetic and traffic one after the other.

    """
    shape = LatentGrid(
        phase=phase,
        module=False,
        hidden_size=1,
        q_lora_rank=attention.q_lora_rank,
        kv_lora_rank=attention.kv_lora_rank,
        qk_nope_head_dim=attention.qk_nope_head_dim,
        qk_rope_head_dim=attention.qk_rope_head_dim,
        v_head_dim=attention.v_head_dim,
        index_topk=attention.index_topk,
        weight_dtype=BF16,
        kv_dtype=kv_dtype,
        prefix=np.zeros(1, dtype=np.int32),
        heads=np.array([heads], dtype=np.int32),
        batch=batch.astype(np.int32),
        length=length.astype(np.int32),
        time_s=np.empty(0),
    )
    kernel = sum((one.ideal_s(device)[0, 0] for one in latent_work(shape)), np.zeros(()))
    rows = batch[:, None] * (length if phase == CONTEXT else np.ones(len(length)))
    return (
        kernel
        + _expansion(attention, heads, rows).ideal_s(device)
        + indexer_s(device, attention, phase, batch, length)
    )


def _expansion(attention: LatentAttention, heads: int, rows: FloatArray) -> Work:
    """Products of every head with its part of ``kv_b``, over ``rows`` tokens.

    They surround the decode kernel, or expand a prompt's keys and values; the arithmetic is equal.
    """
    weights = heads * attention.kv_lora_rank * (attention.qk_nope_head_dim + attention.v_head_dim)
    width = heads * (attention.qk_nope_head_dim + attention.v_head_dim) + attention.kv_lora_rank
    return Work(BF16, FLOPS_PER_MAC * rows * weights, (weights + rows * width) * BF16_BYTES)


def indexer_s(
    device: Device,
    attention: LatentAttention,
    phase: str,
    batch: FloatArray,
    length: FloatArray,
) -> FloatArray:
    """Scores of every earlier token; the device's bf16 rate stands in where it has none for fp8."""
    per_sequence = length**2 / 2 if phase == CONTEXT else length
    pairs = batch[:, None] * per_sequence
    flops = FLOPS_PER_MAC * pairs * attention.index_heads * attention.index_head_dim
    keys = batch[:, None] * length * attention.index_head_dim * DTYPE_BYTES[INDEX_KEY]
    rate = device.flops(INDEX_KEY) or device.flops(BF16)
    seconds: FloatArray = flops / rate + keys / device.memory_bandwidth_bytes_per_s
    return seconds


def projections_s(
    table: KernelTable,
    device: Device,
    attention: LatentAttention,
    hidden_size: int,
    heads: int,
    rows: FloatArray,
) -> FloatArray:
    """Seconds of the projections of `simulator/ops.latent_gemms` over ``rows`` tokens, any shape.

    They run over all tokens of an iteration together, so the iteration's cost prices them.
    """
    flat, inverse = np.unique(rows, return_inverse=True)
    total = np.zeros(len(flat))
    for gemm in latent_gemms(attention, hidden_size, heads):
        total += gemm_s(table, device, gemm.dtype, flat, gemm.n, gemm.k)[0]
    return total[inverse].reshape(rows.shape)


def surroundings_s(
    table: KernelTable,
    device: Device,
    attention: LatentAttention,
    heads: int,
    phase: str,
    rows: FloatArray,
) -> FloatArray:
    """Seconds of what a module holds beside kernel and projections, over ``rows`` tokens.

    The small kernels at the device's elementwise launch and bandwidth, and the products with
    ``kv_b``: as measured around a decode kernel, else as one matrix product.
    """
    width = (
        attention.q_lora_rank
        + 2 * (attention.kv_lora_rank + attention.qk_rope_head_dim)
        + heads * attention.qk_rope_head_dim
    )
    streamed = 2 * width * BF16_BYTES * rows / device.elementwise_bytes_per_s
    small = SMALL_KERNELS * device.elementwise_launch_s + streamed
    fp8 = PRECISIONS[attention.dtype].arithmetic == "fp8"
    dtype = "fp8" if fp8 and ("pre", "fp8") in table.latent_bmm else BF16
    measured = [table.latent_bmm.get((side, dtype)) for side in ("pre", "post")]
    if phase == GENERATION and all(one is not None for one in measured):
        products = sum(
            (_bmm_s(one, heads, rows) for one in measured if one is not None), np.zeros(())
        )
    else:
        n = heads * (attention.qk_nope_head_dim + attention.v_head_dim)
        flat, inverse = np.unique(rows, return_inverse=True)
        time_s, _ = gemm_s(table, device, BF16, flat, n, attention.kv_lora_rank)
        products = time_s[inverse].reshape(rows.shape)
    return small + products


def _bmm_s(grid: BatchedGemm, heads: int, rows: FloatArray) -> FloatArray:
    """Per-head products, linear in heads and tokens, growing with both beyond the grid."""
    head_axis, token_axis = grid.heads.astype(np.float64), grid.tokens.astype(np.float64)
    columns = np.array(
        [
            np.interp(token_axis, token_axis[known], row[known])
            for row, known in ((row, ~np.isnan(row)) for row in grid.time_s)
            if known.any()
        ]
    )
    head_axis = head_axis[~np.isnan(grid.time_s).all(axis=1)]
    at = np.array([float(heads)])
    if len(head_axis) > 1:
        low, weight = bracket(head_axis, at)
        column = columns[low[0]] * (1 - weight[0]) + columns[low[0] + 1] * weight[0]
    else:
        column = columns[0]
    beyond = max(1.0, heads / head_axis[-1]) * np.maximum(1.0, rows / token_axis[-1])
    time_s: FloatArray = np.interp(rows, token_axis, column) * beyond
    return time_s
