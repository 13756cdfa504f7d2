"""Paged KV cache: the blocks and pages that a sequence needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulator.compiled import compiled

if TYPE_CHECKING:
    from simulator.state import Limits


@compiled
def blocks_for(tokens: int, block_tokens: int) -> int:
    """Blocks that hold ``tokens`` tokens of one sequence in a layer that keeps them all."""
    return (tokens + block_tokens - 1) // block_tokens


@compiled
def pages_for(limits: Limits, tokens: int) -> int:
    """Pages that a sequence of ``tokens`` tokens holds over all groups of layers.

    Sliding windows hold no more than their window; recurrent layers hold their state.
    """
    blocks = blocks_for(tokens, limits.block_tokens)
    windowed = limits.windowed * min(blocks, limits.window_blocks)
    return limits.growing * blocks + windowed + limits.fixed
