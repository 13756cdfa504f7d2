"""Paged KV blocks: how many a sequence needs."""

from __future__ import annotations

from simulator.compiled import compiled


@compiled
def blocks_for(tokens: int, block_tokens: int) -> int:
    """Blocks that hold ``tokens`` tokens of one sequence."""
    return (tokens + block_tokens - 1) // block_tokens
