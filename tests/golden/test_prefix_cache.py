"""Hand-worked schedules of vLLM's V1 policy with its prefix cache, block by block.

Every iteration lasts one tick, a block holds 4 tokens, requests and blocks are numbered from 0. A
table row reads: start tick, replica, (request, tokens) in running order, blocks that nobody holds
once the batch is formed, preempted requests. Lists of free blocks have the next to be taken first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from simulator.prefix_cache import FOUND_TOKENS, NEXT_FREE
from simulator.rules import PREFIX_AWARE, SARATHI, Rules
from simulator.run import Run
from simulator.state import FINISH, PREEMPTIONS, REPLICA
from tests.builders import TICK_S, limits, linear_cost, workload
from tests.schedules import Row, play, ticks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simulator.state import Limits, State
    from simulator.workload import Workload

CACHED = Rules(reserve_full_prompt=True, prefix_caching=True)


def prompts(
    lengths: Sequence[int],
    outputs: Sequence[int],
    ids: Sequence[Sequence[int]],
    arrival_ticks: Sequence[float] | None = None,
) -> Workload:
    """Requests whose prompts begin with blocks of the given content."""
    arrivals_s = None if arrival_ticks is None else [at * TICK_S for at in arrival_ticks]
    return replace(
        workload(lengths, outputs, arrivals_s),
        block_ids=np.array([block for prompt in ids for block in prompt], np.int64),
        block_starts=np.cumsum([0, *(len(prompt) for prompt in ids)]),
        block_tokens=4,
    )


def found(state: State) -> list[int]:
    """Tokens that each request found when it was first admitted."""
    tokens: list[int] = state.pool.request[:, FOUND_TOKENS].tolist()
    return tokens


def free_blocks(state: State) -> list[int]:
    """Free blocks of the first replica in the order in which they are taken."""
    block, order = state.pool.block[0], []
    at = block[-1, NEXT_FREE]
    while at != len(block) - 1:
        order.append(int(at))
        at = block[at, NEXT_FREE]
    return order


def test_a_common_prefix_is_held_once_and_computed_once() -> None:
    """From the moment at which a block is scheduled, and after all its holders have left."""
    ids = [[0, 1], [0, 2], [0, 1, 3]]
    what = prompts([10, 9, 12], [2, 2, 1], ids, [0, 0, 4])
    rows, state = play(what, limits(blocks=10), CACHED)
    assert rows == [
        # Request 0 takes 3 blocks; request 1 finds the first one in the same batch and takes 2.
        Row(0, 0, [(0, 10), (1, 5)], 5, []),
        Row(1, 0, [(0, 1), (1, 1)], 5, []),  # 11 and 10 tokens, 3 blocks each, one in common
        # Nobody ran for two ticks, but 8 of request 2's 12 tokens are still there.
        Row(4, 0, [(2, 4)], 7, []),
    ]
    assert found(state) == [0, 4, 8]
    assert ticks(state, FINISH) == [2, 2, 5]


def test_at_least_the_last_token_is_computed() -> None:
    """A prompt of nothing but cached blocks computes its last block; one token more saves it."""
    what = prompts([8, 8, 9], [1, 1, 1], [[0, 1]] * 3, [0, 1, 2])
    rows, state = play(what, limits(blocks=10), CACHED)
    assert rows == [
        Row(0, 0, [(0, 8)], 8, []),
        Row(1, 0, [(1, 4)], 8, []),
        Row(2, 0, [(2, 1)], 7, []),
    ]
    assert found(state) == [0, 4, 8]


def test_the_block_used_longest_ago_goes_first_and_the_end_of_a_prompt_before_its_beginning() -> (
    None
):
    """Blocks go to the end of the list when their request leaves, its last one first."""
    ids = [[0, 1], [2, 3], [4, 5, 6], [0, 1]]
    rows, state = play(
        prompts([8, 8, 12, 9], [1, 1, 1, 1], ids, [0, 1, 2, 3]), limits(blocks=6), CACHED
    )
    assert [row.batch for row in rows] == [
        [(0, 8)],  # takes 0 1 of 0 1 2 3 4 5; then 2 3 4 5 1 0 are free
        [(1, 8)],  # takes 2 3; then 4 5 1 0 3 2
        [(2, 12)],  # takes 4 5 1, which held the second block of request 0; then 0 3 2 1 5 4
        [(3, 5)],  # finds block 0 and takes 3 2
    ]
    assert found(state) == [0, 0, 0, 4]
    # Block 2 holds a ninth token only: nobody can find it, so it is the first to be taken.
    assert free_blocks(state) == [2, 1, 5, 4, 3, 0]


def test_a_preempted_request_finds_what_nobody_has_taken() -> None:
    """Half of its prompt was overwritten while it waited."""
    rows, state = play(workload([8, 8], [9, 3]), limits(blocks=5), CACHED)
    assert rows == [
        Row(0, 0, [(0, 8), (1, 8)], 1, []),  # blocks 0 1 and 2 3
        # Request 0 takes block 4 and request 1 finds none: 3 2 are free.
        Row(1, 0, [(0, 1)], 2, [1]),
        # It would find both, but they count as free: 3 blocks for 9 tokens are not there.
        Row(2, 0, [(0, 1)], 2, [1]),
        Row(3, 0, [(0, 1)], 2, [1]),
        Row(4, 0, [(0, 1)], 2, [1]),
        Row(5, 0, [(0, 1)], 1, [1]),  # 13 tokens: block 3 is taken
        Row(6, 0, [(0, 1)], 1, [1]),
        Row(7, 0, [(0, 1)], 1, [1]),
        Row(8, 0, [(0, 1)], 1, [1]),  # 16 tokens, the ninth emitted
        # Free are 2 3 4 1 0: 4 of 9 tokens are found in block 2, the rest goes to 3 and 4.
        Row(9, 0, [(1, 5)], 2, []),
        Row(10, 0, [(1, 1)], 2, []),
    ]
    assert ticks(state, FINISH) == [9, 11]
    assert state.request[:, PREEMPTIONS].tolist() == [0, 1]
    assert found(state) == [0, 0]  # at its first admission


def test_a_block_computed_twice_is_kept_twice() -> None:
    """The first one is found; when it is taken for something else, the second one is."""
    ids = [[0, 1], [0, 1], [3, 4], [0, 1]]
    what = prompts([8, 8, 8, 9], [1, 1, 1, 1], ids, [0, 0, 1, 2])
    rows, state = play(what, limits(blocks=4), CACHED)
    assert rows == [
        # Request 1 finds block 0 and computes the content of block 1 again, in block 2.
        Row(0, 0, [(0, 8), (1, 4)], 1, []),
        # Free are 3 1 2 0: request 2 takes 3 and 1.
        Row(1, 0, [(2, 8)], 2, []),
        # Free are 2 0 1 3: request 3 finds 0 and 2 and takes 1.
        Row(2, 0, [(3, 1)], 1, []),
    ]
    assert found(state) == [0, 4, 0, 8]
    assert free_blocks(state) == [1, 3, 2, 0]


def test_the_last_of_three_copies_is_still_found() -> None:
    """Copies are taken for something else in the order in which their holders left."""
    ids = [[0, 1], [0, 1], [0, 1], [], [0, 1]]
    what = prompts([8, 8, 8, 21, 9], [2, 3, 1, 1, 1], ids, [0, 0, 0, 3, 4])
    rows, state = play(what, limits(blocks=8), CACHED)
    assert rows == [
        Row(0, 0, [(0, 8), (1, 4), (2, 4)], 4, []),  # block 0, and copies 1, 2 and 3
        Row(1, 0, [(0, 1), (1, 1)], 3, []),  # 2 left; 0 takes block 4 and 1 block 5
        Row(2, 0, [(1, 1)], 5, []),  # 0 left
        # Free are 5 4 6 7 3 1 2 0: request 3 takes all but 2 and 0.
        Row(3, 0, [(3, 21)], 2, []),
        Row(4, 0, [(4, 1)], 5, []),  # 0 and 2 are found
    ]
    assert found(state) == [0, 4, 4, 0, 8]


def test_a_block_can_be_found_once_its_last_slot_is_filled() -> None:
    """Also if a decode fills it, which takes no new block."""
    _, state = play(workload([7], [1]), limits(blocks=4), CACHED)
    assert free_blocks(state) == [1, 2, 3, 0]  # block 1 holds 3 tokens: of no use to anybody
    _, state = play(workload([7], [2]), limits(blocks=4), CACHED)
    assert free_blocks(state) == [2, 3, 1, 0]


def test_overlapped_scheduling_frees_blocks_after_the_next_batch_is_formed() -> None:
    """Until then their place in the list is not known either."""
    what = prompts([7, 4, 9], [1, 3, 1], [[0], [5], [0, 1]])
    rules = CACHED._replace(late_results=True)
    rows, state = play(what, limits(blocks=6, seqs=2), rules)
    assert rows == [
        Row(0, 0, [(0, 7), (1, 4)], 3, []),  # blocks 0 1 and 2
        # Request 0 still holds its seat and blocks: 1 takes block 3. Then 1 4 5 0 are free.
        Row(1, 0, [(1, 1)], 4, []),
        Row(2, 0, [(1, 1), (2, 5)], 1, []),  # 2 finds block 0 and takes 1 4
    ]
    # Request 1 left first, 3 and 2, then 2: 4 to the front, 1 and 0 to the end.
    assert free_blocks(state) == [4, 3, 5, 2, 1, 0]


def test_the_prefix_aware_router_remembers_what_it_sent_where() -> None:
    """The longest prefix wins, then the shorter queue, then the lower replica."""
    ids = [[0, 1], [5], [0, 2], [5, 6], [], [0, 1, 7], [8]]
    what = prompts([8, 4, 8, 8, 3, 12, 4], [2] * 7, ids)
    rules = CACHED._replace(router=PREFIX_AWARE)
    _, state = play(what, limits(), rules, replicas=2)
    # Requests 4 and 6 match nothing: with 2 requests each the first queue, with 4 and 2 the second.
    assert state.request[:, REPLICA].tolist() == [0, 1, 0, 1, 0, 0, 1]
    # In one batch: 2 and 5 find what 0 computes, 3 what 1 computes.
    assert found(state) == [0, 0, 4, 4, 0, 8, 0]


def test_a_replica_with_too_long_a_queue_loses_its_prefix() -> None:
    """65 requests with the same prefix go to one replica; then the idle one learns it too."""
    what = prompts([4] * 70, [1] * 70, [[0]] * 70)
    rules = CACHED._replace(router=PREFIX_AWARE)
    _, state = play(what, limits(), rules, replicas=2)
    # At 65 to 0 the second replica gets one; then it has the shorter queue of two that know.
    assert state.request[:, REPLICA].tolist() == [0] * 65 + [1] * 5


@pytest.mark.parametrize(
    ("under", "rules", "said"),
    [
        (limits(), CACHED._replace(policy=SARATHI), "vLLM's V1 scheduler only"),
        (limits()._replace(windowed=1), CACHED, "layers that all keep every token only"),
        (limits(block_tokens=8), CACHED, "ids of 4 tokens each; KV blocks hold 8"),
    ],
)
def test_what_is_not_modelled_is_refused(under: Limits, rules: Rules, said: str) -> None:
    """Other schedulers, layers that drop tokens, and ids of other blocks than the engine's."""
    with pytest.raises(ValueError, match=said):
        Run(prompts([8], [1], [[0, 1]]), 1, under, linear_cost(), rules)


def test_ids_of_any_size_pass_where_nothing_is_cached() -> None:
    """Without a prefix cache the content of a prompt changes nothing."""
    result = Run(
        prompts([8, 8], [1, 1], [[0, 1]] * 2), 1, limits(block_tokens=8), linear_cost(), Rules()
    ).finish()
    assert result.cached_tokens.tolist() == [0, 0]
