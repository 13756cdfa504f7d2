"""Paged KV cache: the pages that a sequence needs, takes and gives back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulator.compiled import compiled, inner
from simulator.prefix_cache import FINDABLE, give_back, make_findable, take_blocks
from simulator.state import FREE_BLOCKS, HELD_BLOCKS, HELD_TOKENS, REPLICA

if TYPE_CHECKING:
    from simulator.state import Limits, State


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


@inner
def has_pool(state: State) -> bool:
    """Whether blocks keep their content (``Rules.prefix_caching``)."""
    return state.pool.block.size > 0


@inner
def grow(state: State, limits: Limits, r: int, request: int, tokens: int) -> bool:
    """Let a request hold pages for ``tokens`` tokens; false, and nothing done, if too few are free.

    It keeps what it holds: a request never shrinks while it runs.
    """
    table = state.request
    if tokens > table[request, HELD_TOKENS]:
        held = table[request, HELD_BLOCKS]
        need = pages_for(limits, tokens) - held
        if need > state.replica[r, FREE_BLOCKS]:
            return False
        if has_pool(state):
            take_blocks(state.pool, r, request, held, need)
        state.replica[r, FREE_BLOCKS] -= need
        table[request, HELD_BLOCKS] = held + need
        table[request, HELD_TOKENS] = blocks_for(tokens, limits.block_tokens) * limits.block_tokens
    if has_pool(state):
        full = tokens // limits.block_tokens
        if full > state.pool.request[request, FINDABLE]:
            make_findable(state.pool, r, request, full)
    return True


@inner
def release(state: State, request: int) -> int:
    """Take all its pages from a request; return how many, for the caller to make free.

    Pages that others hold too are not among them.
    """
    pages = state.request[request, HELD_BLOCKS]
    if has_pool(state):
        pages = give_back(state.pool, state.request[request, REPLICA], request, pages)
    state.request[request, HELD_BLOCKS] = 0
    state.request[request, HELD_TOKENS] = 0
    return pages
