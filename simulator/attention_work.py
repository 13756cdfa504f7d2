"""Arithmetic and traffic of softmax attention on one rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from simulator.units import DTYPE_BYTES

if TYPE_CHECKING:
    from simulator.device import Device
    from simulator.interpolate import FloatArray

KV_TENSORS: Final = 2
"""A key and a value per token and KV head."""
FLOPS_PER_SCORE: Final = 4
"""Per query head, head width and attended token: a multiply-add for QK and one for PV."""
FULL_ATTENTION: Final = 0
"""``window_tokens`` without a sliding window."""


@dataclass(frozen=True)
class AttentionShape:
    """What one attention kernel is asked for, but for its batch and length.

    Parameters
    ----------
    prefill
        Whole prompts under a causal mask; else one new token per sequence.
    head_dim, heads, kv_heads, kv_dtype
        Width of a head, query and KV heads on the rank, dtype of the cache.
    window_tokens
        Sliding window, or 0.

    """

    prefill: bool
    head_dim: int
    heads: int
    kv_heads: int
    kv_dtype: str
    window_tokens: int = FULL_ATTENTION

    def seen(self, length: FloatArray) -> FloatArray:
        """Tokens that the last token of each sequence attends to."""
        return np.minimum(length, self.window_tokens) if self.window_tokens else length

    def tokens(self, length: FloatArray) -> FloatArray:
        """Tokens per sequence that are spread over the device: new ones, or attended ones."""
        return length if self.prefill else self.seen(length)

    def work(self, batch: FloatArray, length: FloatArray) -> tuple[FloatArray, FloatArray]:
        """FLOPs and bytes moved: each cached token, query and output once; arrays broadcast."""
        seen = self.seen(length)
        if self.prefill:
            # A causal mask leaves half of the first seen x seen scores, `seen` for each row after.
            scores, cached, new = seen * (length - seen / 2), length, length
        else:
            scores, cached, new = seen, seen, np.ones_like(seen)
        new_bytes = KV_TENSORS * self.head_dim * self.heads * DTYPE_BYTES["bf16"]
        cached_bytes = KV_TENSORS * self.head_dim * self.kv_heads * DTYPE_BYTES[self.kv_dtype]
        flops = FLOPS_PER_SCORE * self.heads * self.head_dim * batch * scores
        return flops, batch * (cached_bytes * cached + new_bytes * new)

    def work_s(self, device: Device, batch: FloatArray, length: FloatArray) -> FloatArray:
        """Arithmetic at the bf16 peak plus traffic at full bandwidth, seconds.

        The two are added, as no attention kernel overlaps them fully; arrays broadcast.
        """
        flops, moved_bytes = self.work(batch, length)
        return flops / device.bf16_flops + moved_bytes / device.memory_bandwidth_bytes_per_s
