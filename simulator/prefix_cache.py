"""vLLM V1's block pool: KV blocks that keep their content after their request has left.

Source: vllm/v1/core/block_pool.py (``get_cached_block``, ``cache_full_blocks``,
``get_new_blocks``, ``touch``, ``free_blocks``) and single_type_kv_cache_manager.py
(``FullAttentionManager``) of version 0.10.2. A block is found by its content from the moment at
which its last token is scheduled; blocks of one content are not merged, and the one cached first is
found. Blocks that nobody holds are free, the least recently used first, and keep their content
until they are taken for something else. Free blocks without content come first, as from version
0.24 on (``prepend_n`` in ``free_blocks``); before, they went last like the others.

Here contents are numbers: one for each block id of the prompts and replica, and one for each other
full block of a request, which only that request can ever find again. Lists are linked through the
table of blocks; that of the free blocks is a ring that a block past the last one closes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from simulator.compiled import called
from simulator.rules import PREFIX_AWARE

if TYPE_CHECKING:
    import numpy.typing as npt

    from simulator.rules import Rules
    from simulator.workload import Workload

    Ints = npt.NDArray[np.int64]
    ShortInts = npt.NDArray[np.int32]

# Columns of BlockPool.block: neighbours among the free blocks; requests that hold it; its content,
# or -1; neighbours in the ring of blocks with that content.
NEXT_FREE, PREVIOUS_FREE, HOLDERS, CONTENT, NEXT_SAME, PREVIOUS_SAME = range(6)
_BLOCK_COLUMNS = 6

# Columns of BlockPool.request: its row of ``table`` while it runs; leading blocks whose content can
# be found; tokens found when it was first admitted, or -1; content of its block j less j, for
# blocks without an id.
ROW, FINDABLE, FOUND_TOKENS, OWN = range(4)
_REQUEST_COLUMNS = 4


class BlockPool(NamedTuple):
    """The blocks of R replicas with S seats, N requests; empty without prefix caching.

    Attributes
    ----------
    block
        (R, B + 1, 6) int32 table whose columns are named above.
    request
        (N, 4) table whose columns are named above.
    found
        (C,) int32 the block of each content that was cached first, or -1.
    table
        (R, S, M) int32 the blocks of each running request, by row.
    rows
        (R, S + 1) how many rows nobody uses, and which.
    leaving
        (R, S) requests that finished while the next batch was being formed.
    ids, starts
        Block ids of the prompts, and (N + 1,) where each prompt's begin; also for the router.
    sent
        (R, K) int8 whether a replica was ever sent a block id: what the prefix-aware router knows;
        (0, K) for other routers.

    """

    block: ShortInts
    request: Ints
    found: ShortInts
    table: ShortInts
    rows: Ints
    leaving: Ints
    ids: Ints
    starts: Ints
    sent: npt.NDArray[np.int8]


def initial_pool(
    workload: Workload,
    replicas: int,
    seats: int,
    num_blocks: int,
    block_tokens: int,
    rules: Rules,
) -> BlockPool:
    """All blocks free and without content, in order; no arrays to speak of if nothing needs them.

    Raises
    ------
    ValueError
        If there are more contents than the numbers of 32 bits.

    """
    n = workload.num_requests
    ids = np.array(workload.block_ids, np.int64)
    starts = np.array(workload.block_starts, np.int64)
    if len(starts) == 0:
        starts = np.zeros(n + 1, np.int64)
    kinds = int(ids.max()) + 1 if len(ids) else 0
    routed = replicas if rules.router == PREFIX_AWARE else 0
    sent = np.zeros((routed, kinds), np.int8)
    if not rules.prefix_caching:
        none, no_ints = np.zeros((0, 0, 0), np.int32), np.zeros((0, 0), np.int64)
        return BlockPool(none, no_ints, none.ravel(), none, no_ints, no_ints, ids, starts, sent)
    # The last token of the output is never computed.
    tokens = workload.prompt_tokens + workload.output_tokens - 1
    own = tokens // block_tokens - np.diff(starts)
    contents = replicas * kinds + int(own.sum())
    if contents > np.iinfo(np.int32).max:
        raise ValueError(f"{contents} distinct KV blocks are too many for the prefix cache")
    request = np.zeros((n, _REQUEST_COLUMNS), np.int64)
    request[:, FOUND_TOKENS] = -1
    request[:, OWN] = replicas * kinds + np.cumsum(own) - own - np.diff(starts)
    block = np.zeros((replicas, num_blocks + 1, _BLOCK_COLUMNS), np.int32)
    order = np.arange(num_blocks + 1)
    block[:, :, NEXT_FREE] = np.roll(order, -1)
    block[:, :, PREVIOUS_FREE] = np.roll(order, 1)
    block[:, :, CONTENT] = -1
    rows = np.zeros((replicas, seats + 1), np.int64)
    rows[:, 0] = seats
    rows[:, 1:] = np.arange(seats)[::-1]
    return BlockPool(
        block=block,
        request=request,
        found=np.full(contents, -1, np.int32),
        table=np.zeros((replicas, seats, -(-int(tokens.max()) // block_tokens)), np.int32),
        rows=rows,
        leaving=np.zeros((replicas, seats), np.int64),
        ids=ids,
        starts=starts,
        sent=sent,
    )


@called
def content_of(pool: BlockPool, r: int, request: int, j: int) -> int:
    """Number of the content of a request's full block ``j``, which replica ``r`` serves."""
    first = pool.starts[request]
    if j < pool.starts[request + 1] - first:
        content: int = r * pool.sent.shape[1] + pool.ids[first + j]
    else:
        content = pool.request[request, OWN] + j
    return content


@called
def find(pool: BlockPool, r: int, request: int, most: int) -> tuple[int, int]:
    """How many of a request's first ``most`` blocks are cached, and how many of those are free."""
    hits, free = 0, 0
    while hits < most:
        b = pool.found[content_of(pool, r, request, hits)]
        if b < 0:
            break
        if pool.block[r, b, HOLDERS] == 0:
            free += 1
        hits += 1
    return hits, free


@called
def seat(pool: BlockPool, r: int, request: int, hits: int, block_tokens: int) -> None:
    """Let a request that is admitted hold the first ``hits`` blocks, which are cached."""
    left = pool.rows[r, 0]
    row = pool.rows[r, left]
    pool.rows[r, 0] = left - 1
    pool.request[request, ROW] = row
    pool.request[request, FINDABLE] = hits
    if pool.request[request, FOUND_TOKENS] < 0:
        pool.request[request, FOUND_TOKENS] = hits * block_tokens
    for j in range(hits):
        b = pool.found[content_of(pool, r, request, j)]
        if pool.block[r, b, HOLDERS] == 0:
            _take(pool, r, b)
        pool.block[r, b, HOLDERS] += 1
        pool.table[r, row, j] = b


@called
def _take(pool: BlockPool, r: int, b: int) -> None:
    """Remove a block from the free ones."""
    block = pool.block
    after, before = block[r, b, NEXT_FREE], block[r, b, PREVIOUS_FREE]
    block[r, before, NEXT_FREE] = after
    block[r, after, PREVIOUS_FREE] = before


@called
def _forget(pool: BlockPool, r: int, b: int) -> None:
    """Drop a block's content."""
    block = pool.block
    content = block[r, b, CONTENT]
    after, before = block[r, b, NEXT_SAME], block[r, b, PREVIOUS_SAME]
    block[r, b, CONTENT] = -1
    block[r, before, NEXT_SAME] = after
    block[r, after, PREVIOUS_SAME] = before
    if pool.found[content] == b:
        pool.found[content] = -1 if after == b else after


@called
def take_blocks(pool: BlockPool, r: int, request: int, held: int, count: int) -> None:
    """Give a request that holds ``held`` blocks the first ``count`` free ones."""
    row, end = pool.request[request, ROW], pool.block.shape[1] - 1
    for j in range(held, held + count):
        b = pool.block[r, end, NEXT_FREE]
        _take(pool, r, b)
        if pool.block[r, b, CONTENT] >= 0:
            _forget(pool, r, b)
        pool.block[r, b, HOLDERS] = 1
        pool.table[r, row, j] = b


@called
def make_findable(pool: BlockPool, r: int, request: int, full: int) -> None:
    """Note the contents of a request's first ``full`` blocks, which are full."""
    block, row = pool.block, pool.request[request, ROW]
    for j in range(pool.request[request, FINDABLE], full):
        b = pool.table[r, row, j]
        content = content_of(pool, r, request, j)
        first = pool.found[content]
        if first < 0:
            pool.found[content] = b
            first = b
            block[r, b, PREVIOUS_SAME] = b
        last = block[r, first, PREVIOUS_SAME]
        block[r, b, CONTENT] = content
        block[r, b, PREVIOUS_SAME] = last
        block[r, b, NEXT_SAME] = first
        block[r, last, NEXT_SAME] = b
        block[r, first, PREVIOUS_SAME] = b
    pool.request[request, FINDABLE] = full


@called
def give_back(pool: BlockPool, r: int, request: int, held: int) -> int:
    """Take its blocks from a request, the last one first; return how many become free."""
    block, end, row = pool.block, pool.block.shape[1] - 1, pool.request[request, ROW]
    freed = 0
    for j in range(held - 1, -1, -1):
        b = pool.table[r, row, j]
        block[r, b, HOLDERS] -= 1
        if block[r, b, HOLDERS] > 0:
            continue
        freed += 1
        # Behind all others, or ahead of them if nobody can find it.
        after = end if block[r, b, CONTENT] >= 0 else block[r, end, NEXT_FREE]
        before = block[r, after, PREVIOUS_FREE]
        block[r, b, NEXT_FREE] = after
        block[r, b, PREVIOUS_FREE] = before
        block[r, before, NEXT_FREE] = b
        block[r, after, PREVIOUS_FREE] = b
    left = pool.rows[r, 0] + 1
    pool.rows[r, 0] = left
    pool.rows[r, left] = row
    return freed
