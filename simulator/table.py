"""Measured kernel times of one device and engine version, as plain arrays in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

# Every class here is `eq=False`: they compare and hash by identity, so that a fit made from one
# can be cached by it. Comparing the arrays' contents would be slow and is never wanted.


@dataclass(frozen=True, eq=False)
class GemmGrid:
    """Times of ``(m, k) @ (k, n)`` at one operand dtype.

    Parameters
    ----------
    m, n, k
        Ascending axes, shapes (M,), (N,), (K,); ``m`` counts tokens.
    time_s
        Seconds, shape (M, N, K); NaN where not measured.

    """

    m: NDArray[np.int32]
    n: NDArray[np.int32]
    k: NDArray[np.int32]
    time_s: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class AttentionSeries:
    """Attention times for one rank's heads.

    Parameters
    ----------
    head_dim
        Width of one head.
    window_tokens
        Sliding window, or 0 for full attention.
    kv_dtype
        ``bf16`` or ``fp8``.
    heads, kv_heads
        Query and KV heads on the rank.
    batch
        Ascending sequence counts, shape (B,).
    length
        Ascending tokens attended to by each sequence's last token (itself included), shape (L,).
    time_s
        Seconds, shape (B, L); NaN where not measured.

    """

    head_dim: int
    window_tokens: int
    kv_dtype: str
    heads: int
    kv_heads: int
    batch: NDArray[np.int32]
    length: NDArray[np.int32]
    time_s: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class MessageSeries:
    """Times of one collective over message sizes.

    Parameters
    ----------
    elements
        Ascending message sizes in 2-byte elements (not bytes), shape (E,).
    time_s
        Seconds, shape (E,); NaN where not measured.

    """

    elements: NDArray[np.int32]
    time_s: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class MoeGrid:
    """Times of one rank's routed experts (both products and the activation) at one precision.

    Parameters
    ----------
    layout
        Shape (S, 7) int32, one measured layout a row: hidden size, expert width (of the whole
        expert, before tensor parallelism), experts per token, experts, tensor-parallel shards,
        expert-parallel shards, and 1 where the expert is gated.
    skew
        Shape (S,): exponent of the power law that tokens were routed by, 0 for balanced.
    tokens
        Ascending tokens before routing (of all ranks), shape (T,).
    time_s
        Seconds, shape (S, T); NaN where not measured.

    """

    layout: NDArray[np.int32]
    skew: NDArray[np.float64]
    tokens: NDArray[np.int32]
    time_s: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LatentGrid:
    """Times of latent attention in one phase, for one set of widths and precisions.

    Parameters
    ----------
    phase
        ``context`` or ``generation``.
    module
        True where the projections around the attention kernel are part of the time.
    hidden_size, q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim
        Widths of the measured model.
    index_topk
        Tokens that the indexer keeps, or 0 for dense attention.
    weight_dtype, kv_dtype
        Precision of the projections (``bf16`` where only the kernel is timed) and of the cache.
    prefix
        Ascending cached tokens before the new ones, shape (P,); ``[0]`` for generation.
    heads
        Ascending heads on the rank, shape (H,).
    batch, length
        Ascending sequences, shape (B,), and tokens per sequence, shape (L,): new ones in the
        context phase, those attended to (the newest included) in generation.
    time_s
        Seconds, shape (P, H, B, L); NaN where not measured.

    """

    phase: str
    module: bool
    hidden_size: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_topk: int
    weight_dtype: str
    kv_dtype: str
    prefix: NDArray[np.int32]
    heads: NDArray[np.int32]
    batch: NDArray[np.int32]
    length: NDArray[np.int32]
    time_s: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class BatchedGemm:
    """Times of latent attention's per-head products, before or after the decode kernel.

    Parameters
    ----------
    heads, tokens
        Ascending axes, shapes (H,) and (T,).
    time_s
        Seconds, shape (H, T); NaN where not measured.

    """

    heads: NDArray[np.int32]
    tokens: NDArray[np.int32]
    time_s: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RecurrentSeries:
    """Times of one kernel of a linear-attention or state-space layer on one rank.

    Parameters
    ----------
    kind, kernel, phase
        ``gated_delta_net`` or ``mamba2``; ``convolution`` or ``scan``; ``context`` or
        ``generation``.
    widths
        Gated delta net: key heads, key width, value heads, value width, convolution width.
        Mamba-2: heads, head width, state size, groups, convolution width.
    batch, length
        Ascending sequences, shape (B,), and new tokens per sequence, shape (L,); ``[1]`` in
        generation.
    time_s
        Seconds, shape (B, L); NaN where not measured.

    """

    kind: str
    kernel: str
    phase: str
    widths: tuple[int, int, int, int, int]
    batch: NDArray[np.int32]
    length: NDArray[np.int32]
    time_s: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class AllToAllSeries:
    """Times of sending tokens to their experts, or of bringing them back.

    Parameters
    ----------
    backend, phase, dtype
        The library and its mode; ``dispatch`` or ``combine``; what is sent.
    ranks, nodes
        Expert-parallel ranks, and the nodes they lie on.
    hidden_size, top_k, num_experts
        Shape of the layer.
    tokens
        Ascending tokens per rank, shape (T,).
    time_s
        Seconds, shape (T,); NaN where not measured.

    """

    backend: str
    phase: str
    dtype: str
    ranks: int
    nodes: int
    hidden_size: int
    top_k: int
    num_experts: int
    tokens: NDArray[np.int32]
    time_s: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class KernelTable:
    """All measured kernels of one device and engine version.

    Parameters
    ----------
    device, engine, engine_version
        What was measured.
    gemm
        Grid by precision (a name of `simulator/precision.py`).
    context, generation
        Attention of prefill and of decode.
    all_reduce
        The engine's own all-reduce by (``graph`` or ``eager``, devices): with or without a CUDA
        graph around it.
    nccl
        NCCL by (operation, devices).
    moe
        Routed experts by precision.
    latent
        Latent attention of every measured phase, width and precision.
    latent_bmm
        Per-head products around the latent decode kernel by (``pre`` or ``post``, precision).
    recurrent
        Linear-attention and state-space kernels.
    all_to_all
        Dispatch and combine of expert parallelism.
    estimated_from
        Name of the device that was measured where this table is scaled from it, else empty.

    """

    device: str
    engine: str
    engine_version: str
    gemm: Mapping[str, GemmGrid]
    context: tuple[AttentionSeries, ...]
    generation: tuple[AttentionSeries, ...]
    all_reduce: Mapping[tuple[str, int], MessageSeries]
    nccl: Mapping[tuple[str, int], MessageSeries]
    moe: Mapping[str, MoeGrid] = field(default_factory=dict)
    latent: tuple[LatentGrid, ...] = ()
    latent_bmm: Mapping[tuple[str, str], BatchedGemm] = field(default_factory=dict)
    recurrent: tuple[RecurrentSeries, ...] = ()
    all_to_all: tuple[AllToAllSeries, ...] = ()
    estimated_from: str = ""
