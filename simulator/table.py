"""Measured kernel times of one device and engine version, as plain arrays in seconds."""

from __future__ import annotations

from dataclasses import dataclass
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
class KernelTable:
    """All measured kernels of one device and engine version.

    Parameters
    ----------
    device, engine, engine_version
        What was measured.
    gemm
        Grid by operand dtype (``bf16``, ``fp8``).
    context, generation
        Attention of prefill and of decode.
    all_reduce
        The engine's own all-reduce by (``graph`` or ``eager``, devices): with or without a CUDA
        graph around it.
    nccl
        NCCL by (operation, devices).

    """

    device: str
    engine: str
    engine_version: str
    gemm: Mapping[str, GemmGrid]
    context: tuple[AttentionSeries, ...]
    generation: tuple[AttentionSeries, ...]
    all_reduce: Mapping[tuple[str, int], MessageSeries]
    nccl: Mapping[tuple[str, int], MessageSeries]
