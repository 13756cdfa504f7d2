"""Arithmetic and memory traffic of every cell of a kernel table.

Only the shapes count here, not the times: `simulator/variant.py` compares the same work on two
devices. Each function returns the parts of one kernel's work; arrays have the shape of the grid's
``time_s``, or broadcast to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from simulator.attention_work import AttentionShape
from simulator.precision import PRECISIONS
from simulator.units import DTYPE_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from simulator.device import Device
    from simulator.table import (
        AttentionSeries,
        BatchedGemm,
        GemmGrid,
        LatentGrid,
        MoeGrid,
        RecurrentSeries,
    )

    FloatArray = NDArray[np.float64]

FLOPS_PER_MAC: Final = 2
"""One multiply and one add."""
BF16_BYTES: Final = DTYPE_BYTES["bf16"]
STATE_BYTES: Final = DTYPE_BYTES["fp32"]
"""Recurrent states are float32 in the measured layers (Qwen3-Next's and Nemotron's default)."""
READ_AND_WRITE: Final = 2


@dataclass(frozen=True, eq=False)
class Work:
    """One part of a kernel.

    Parameters
    ----------
    dtype
        Precision whose tensor-core rate applies.
    flops, moved_bytes
        Arithmetic and memory traffic of every cell.

    """

    dtype: str
    flops: FloatArray
    moved_bytes: FloatArray

    def ideal_s(self, device: Device) -> FloatArray:
        """Seconds at the device's sustained rate and datasheet bandwidth, one after the other.

        The sum, not the larger: no kernel overlaps the two fully. Over all ordered pairs of A100,
        H100, H200, B200, L40S and RTX PRO 6000, scaling by the sum predicts bf16 products to
        17 % in the median (p90 51 %), by the larger of the two to 25 % (68 %).
        """
        seconds: FloatArray = (
            self.flops / device.sustained_flops(self.dtype)
            + self.moved_bytes / device.memory_bandwidth_bytes_per_s
        )
        return seconds


def gemm_work(dtype: str, grid: GemmGrid) -> tuple[Work, ...]:
    """Dense products, shape (M, N, K)."""
    m, n, k = _mesh(grid.m, grid.n, grid.k)
    return (product(dtype, m, n, k),)


def generation_work(series: AttentionSeries) -> tuple[Work, ...]:
    """Decode attention, shape (B, L): every attended key and value is read once."""
    return (_attention(series, prefill=False),)


def context_work(series: AttentionSeries) -> tuple[Work, ...]:
    """Prefill attention of whole prompts under a causal mask, shape (B, L)."""
    return (_attention(series, prefill=True),)


def moe_work(dtype: str, grid: MoeGrid) -> tuple[Work, ...]:
    """Routed experts, shape (S, T), as if tokens chose experts evenly.

    A rank holds experts / ep of them and gets tokens x top-k / ep visits; an expert's weights are
    read if at least one token visits it.
    """
    hidden, width, top_k, experts, tp, ep, gated = (
        column[:, None].astype(np.float64) for column in grid.layout.T
    )
    tokens = grid.tokens.astype(np.float64)
    precision = PRECISIONS[dtype]
    matrices = np.where(gated > 0, 3.0, 2.0)
    visits = tokens * top_k / ep
    visited = experts / ep * (1 - (1 - top_k / experts) ** tokens)
    weights = matrices * hidden * width / tp
    activations = visits * (hidden + width / tp) * (precision.activation_bytes + BF16_BYTES)
    return (
        Work(
            dtype,
            FLOPS_PER_MAC * visits * weights,
            visited * weights * precision.weight_bytes + activations,
        ),
    )


def latent_work(grid: LatentGrid) -> tuple[Work, ...]:
    """Latent attention, shape (P, H, B, L), with the projections around it where measured.

    Dense prefill expands keys and values per head; decode and sparse prefill work on the latent
    itself (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).
    """
    prefix, heads, batch, length = _mesh(grid.prefix, grid.heads, grid.batch, grid.length)
    context = grid.phase == "context"
    tokens = batch * length if context else batch
    pairs = batch * (length * prefix + length**2 / 2) if context else batch * length
    if grid.index_topk:
        pairs = np.minimum(pairs, tokens * grid.index_topk)
    latent = grid.kv_lora_rank + grid.qk_rope_head_dim
    if context and not grid.index_topk:
        width = grid.qk_nope_head_dim + grid.qk_rope_head_dim + grid.v_head_dim
    else:
        width = latent + grid.kv_lora_rank
    cached = np.minimum(pairs, batch * (prefix + length))
    kernel = Work(
        "bf16",
        FLOPS_PER_MAC * heads * width * pairs,
        cached * latent * PRECISIONS[grid.kv_dtype].weight_bytes
        + tokens * heads * width * BF16_BYTES,
    )
    if not grid.module:
        return (kernel,)
    query = heads * (grid.qk_nope_head_dim + grid.qk_rope_head_dim)
    hidden = np.full_like(heads, grid.hidden_size)
    down = np.full_like(heads, grid.q_lora_rank + latent)
    expanded = heads * (grid.qk_nope_head_dim + grid.v_head_dim)
    return (
        kernel,
        product(grid.weight_dtype, tokens, down, hidden),
        product(grid.weight_dtype, tokens, query, np.full_like(heads, grid.q_lora_rank or 1)),
        product(grid.weight_dtype, tokens, expanded, np.full_like(heads, grid.kv_lora_rank)),
        product(grid.weight_dtype, tokens, hidden, heads * grid.v_head_dim),
    )


def latent_bmm_work(dtype: str, grid: BatchedGemm, rows: int, columns: int) -> tuple[Work, ...]:
    """Per-head products of ``rows`` by ``columns`` weights, shape (H, T)."""
    heads, tokens = _mesh(grid.heads, grid.tokens)
    one = product(dtype, tokens, np.full_like(tokens, columns), np.full_like(tokens, rows))
    return (Work(dtype, heads * one.flops, heads * one.moved_bytes),)


def recurrent_work(series: RecurrentSeries) -> tuple[Work, ...]:
    """A recurrent layer's kernel, shape (B, L): it streams activations and its state."""
    batch, length = _mesh(series.batch, series.length)
    if series.kind == "gated_delta_net":
        key_heads, key_width, value_heads, value_width, conv_width = series.widths
        values, mixed = value_heads * value_width, 2 * key_heads * key_width
        state = values * key_width
    else:
        heads, head_width, state_size, groups, conv_width = series.widths
        values, mixed = heads * head_width, 2 * groups * state_size
        state = values * state_size
    if series.kernel == "convolution":
        token_bytes = READ_AND_WRITE * (values + mixed) * BF16_BYTES
        sequence_bytes = READ_AND_WRITE * (values + mixed) * conv_width * BF16_BYTES
    else:
        token_bytes = (READ_AND_WRITE * values + mixed) * BF16_BYTES
        sequence_bytes = READ_AND_WRITE * state * STATE_BYTES
    moved_bytes = batch * (length * token_bytes + sequence_bytes)
    return (Work("bf16", np.zeros_like(moved_bytes), moved_bytes),)


def _mesh(*axes: NDArray[np.int32]) -> tuple[FloatArray, ...]:
    """Axes as arrays that broadcast against each other to the grid's shape."""
    return tuple(axis.astype(np.float64) for axis in np.ix_(*axes))


def product(dtype: str, m: FloatArray, n: FloatArray | int, k: FloatArray | int) -> Work:
    """Dense ``(m, k) @ (k, n)``: operands in ``dtype``, output in bf16 as engines' layers give."""
    precision = PRECISIONS[dtype]
    moved_bytes = (
        m * k * precision.activation_bytes + k * n * precision.weight_bytes + m * n * BF16_BYTES
    )
    return Work(dtype, FLOPS_PER_MAC * m * n * k, moved_bytes)


def _attention(series: AttentionSeries, *, prefill: bool) -> Work:
    shape = AttentionShape(
        prefill,
        series.head_dim,
        series.heads,
        series.kv_heads,
        series.kv_dtype,
        series.window_tokens,
    )
    return Work("bf16", *shape.work(*_mesh(series.batch, series.length)))
