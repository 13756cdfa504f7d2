"""Hand-worked schedules of TensorRT-LLM's policies, batch by batch.

Every batch lasts one tick on each pipeline stage, a block and a chunk unit have 4 tokens, and
requests are numbered in arrival order. A table row reads: start tick, replica, (request, tokens) in
arrival order, blocks free once the batch is formed, paused requests, first in line first. A prompt
takes all its blocks with its first chunk.
"""

from __future__ import annotations

import numpy as np
import pytest

from simulator.rules import TRTLLM, Rules
from simulator.state import (
    BOUND_BLOCKS,
    BOUND_SEATS,
    BOUND_TOKENS,
    FINISH,
    FIRST_TOKEN,
    PEAK_DEMAND,
    PREEMPTIONS,
)
from simulator.timing import stages_of
from tests.builders import TICK_S, limits, linear_cost, workload
from tests.schedules import Row, play, ticks

NO_EVICT = Rules(policy=TRTLLM, chunk_unit=4, evict=False)
MAX_UTILIZATION = NO_EVICT._replace(evict=True)
TWO_STAGES = stages_of([linear_cost(TICK_S)], [0, 0], np.zeros(257))

BOUNDS = [BOUND_SEATS, BOUND_TOKENS, BOUND_BLOCKS]


def test_a_prompt_cut_by_the_budget_gets_whole_units() -> None:
    """Decodes and prompts share a batch; what is cut is rounded down to whole blocks."""
    rows, state = play(workload([10, 9], [2, 2]), limits(tokens=8, blocks=100), NO_EVICT)
    assert rows == [
        Row(0, 0, [(0, 8)], 97, []),  # all 3 blocks of prompt 0
        Row(1, 0, [(0, 2), (1, 4)], 94, []),  # 6 tokens are left: one unit of prompt 1
        Row(2, 0, [(0, 1), (1, 5)], 94, []),  # a decode, and 5 of 7: the last chunk is not rounded
        Row(3, 0, [(1, 1)], 97, []),
    ]
    assert ticks(state, FIRST_TOKEN) == [2, 3]
    assert ticks(state, FINISH) == [3, 4]
    assert state.replica[0, BOUNDS].tolist() == [0, 1, 0]


def test_a_short_prompt_runs_where_the_one_before_it_gets_no_unit() -> None:
    """3 tokens hold no unit of prompt 1, but all of prompt 2."""
    rows, state = play(workload([5, 9, 3], [2, 1, 1]), limits(tokens=8, blocks=100), NO_EVICT)
    assert rows == [
        Row(0, 0, [(0, 5), (2, 3)], 97, []),
        Row(1, 0, [(0, 1), (1, 4)], 95, []),  # request 2 has left
        Row(2, 0, [(1, 5)], 97, []),
    ]
    assert ticks(state, FINISH) == [2, 3, 1]


def test_without_chunks_everything_waits_behind_a_prompt_that_does_not_fit() -> None:
    """Prompt 2 would fit beside prompt 0, but prompt 1 is before it."""
    rules = NO_EVICT._replace(chunked=False)
    rows, state = play(workload([5, 6, 2], [2, 1, 1]), limits(tokens=8, blocks=100), rules)
    assert rows == [
        Row(0, 0, [(0, 5)], 98, []),  # 3 left, prompt 1 has 6
        Row(1, 0, [(0, 1), (1, 6)], 96, []),  # 1 left, prompt 2 has 2
        Row(2, 0, [(2, 2)], 99, []),
    ]
    assert ticks(state, FINISH) == [2, 2, 3]
    assert state.replica[0, BOUNDS].tolist() == [0, 1, 0]


SCARCE = workload([7, 7, 1], [6, 5, 2], [0, 0, 1.5 * TICK_S])


def test_without_eviction_every_block_to_completion_is_reserved() -> None:
    """Requests 0 and 1 end with 13 and 12 tokens, 4 and 3 blocks: not together in 5."""
    rows, state = play(SCARCE, limits(blocks=5), NO_EVICT)
    assert rows == [
        Row(0, 0, [(0, 7)], 3, []),  # 2 more of them are reserved
        Row(1, 0, [(0, 1)], 3, []),
        Row(2, 0, [(0, 1)], 2, []),  # request 2 would fit, but waits behind request 1
        Row(3, 0, [(0, 1)], 2, []),
        Row(4, 0, [(0, 1)], 2, []),
        Row(5, 0, [(0, 1)], 2, []),
        Row(6, 0, [(1, 7), (2, 1)], 2, []),  # 3 + 1 blocks to completion
        Row(7, 0, [(1, 1), (2, 1)], 2, []),
        Row(8, 0, [(1, 1)], 2, []),  # 9 tokens: 3rd block; request 2 has left
        Row(9, 0, [(1, 1)], 2, []),
        Row(10, 0, [(1, 1)], 2, []),
    ]
    assert ticks(state, FINISH) == [6, 11, 8]
    assert state.request[:, PREEMPTIONS].tolist() == [0, 0, 0]
    assert state.replica[0, BOUNDS].tolist() == [0, 0, 1]
    assert state.replica[0, PEAK_DEMAND] == 4
    # 7 blocks hold both to completion.
    rows, _ = play(SCARCE, limits(blocks=7), NO_EVICT)
    assert rows[0] == Row(0, 0, [(0, 7), (1, 7)], 3, [])


def test_max_utilization_pauses_the_last_started_which_keeps_its_place() -> None:
    """Only the prompt must fit at the start; who is paused recomputes prompt and output."""
    rows, state = play(SCARCE, limits(blocks=5), MAX_UTILIZATION)
    assert rows == [
        Row(0, 0, [(0, 7), (1, 7)], 1, []),
        Row(1, 0, [(0, 1), (1, 1)], 1, []),
        # The 9th token of request 0 takes the last block, so that request 1 has none and is itself
        # the last started. The list ends there: request 2 is not looked at.
        Row(2, 0, [(0, 1)], 2, [1]),
        Row(3, 0, [(0, 1)], 2, [1]),  # 7 + 2 tokens: 3 blocks; request 2 is behind
        Row(4, 0, [(0, 1)], 2, [1]),
        Row(5, 0, [(0, 1)], 2, [1]),
        Row(6, 0, [(1, 9), (2, 1)], 1, []),
        Row(7, 0, [(1, 1), (2, 1)], 1, []),
        Row(8, 0, [(1, 1)], 2, []),
    ]
    assert ticks(state, FIRST_TOKEN) == [1, 1, 7]
    assert ticks(state, FINISH) == [6, 9, 8]
    assert state.request[:, PREEMPTIONS].tolist() == [0, 1, 0]


def test_max_utilization_takes_from_the_last_started_for_an_earlier_one() -> None:
    """Request 0 crosses a block boundary and pauses request 1."""
    rows, state = play(workload([8, 6], [3, 3]), limits(blocks=4), MAX_UTILIZATION)
    assert rows == [
        Row(0, 0, [(0, 8), (1, 6)], 0, []),
        Row(1, 0, [(0, 1)], 1, [1]),
        Row(2, 0, [(0, 1)], 1, [1]),  # request 1 needs 7 tokens, 2 blocks
        Row(3, 0, [(1, 7)], 2, []),
        Row(4, 0, [(1, 1)], 2, []),
    ]
    assert ticks(state, FINISH) == [3, 5]


def test_a_resumed_prompt_is_cut_by_the_budget_too() -> None:
    """Request 1 is paused with 2 outputs and recomputes 7 + 2 tokens in units."""
    what = workload([7, 7], [6, 4])
    rows, state = play(what, limits(tokens=14, blocks=5), MAX_UTILIZATION)
    assert rows[2] == Row(2, 0, [(0, 1)], 2, [1])
    assert rows[6:] == [Row(6, 0, [(1, 9)], 2, []), Row(7, 0, [(1, 1)], 2, [])]
    # A budget of 8: prompt 1 begins with the one token left after 7, which holds no unit.
    rows, state = play(what, limits(tokens=8, blocks=5), MAX_UTILIZATION)
    assert rows == [
        Row(0, 0, [(0, 7)], 3, []),
        Row(1, 0, [(0, 1), (1, 7)], 1, []),  # 8 tokens: 2 blocks; prompt 1: 2 blocks
        Row(2, 0, [(0, 1), (1, 1)], 0, []),  # 9 and 8 tokens
        Row(3, 0, [(0, 1)], 2, [1]),  # 10 and 9: no block for request 1, which has 2 outputs
        Row(4, 0, [(0, 1)], 2, [1]),
        Row(5, 0, [(0, 1)], 2, [1]),
        Row(6, 0, [(1, 8)], 2, []),  # 8 of 9 tokens, 3 blocks
        Row(7, 0, [(1, 1)], 2, []),
        Row(8, 0, [(1, 1)], 2, []),
    ]
    assert ticks(state, FINISH) == [6, 9]


def test_a_prompt_waits_for_all_its_blocks_although_it_is_cut() -> None:
    """12 tokens need 3 blocks at the first chunk of 4."""
    rows, state = play(workload([4, 12], [4, 1]), limits(tokens=4, blocks=4), MAX_UTILIZATION)
    assert rows == [
        Row(0, 0, [(0, 4)], 3, []),  # no token left
        Row(1, 0, [(0, 1)], 2, []),  # 2 blocks free
        Row(2, 0, [(0, 1)], 2, []),
        Row(3, 0, [(0, 1)], 2, []),
        Row(4, 0, [(1, 4)], 1, []),
        Row(5, 0, [(1, 4)], 1, []),
        Row(6, 0, [(1, 4)], 1, []),
    ]
    assert ticks(state, FINISH) == [4, 7]


SEATS = workload([4, 4, 4], [1, 3, 2]), limits(seqs=2, blocks=100)


def test_the_batch_size_holds_the_third_request_back() -> None:
    """With two seats the third request starts when the first has left."""
    rows, state = play(*SEATS, NO_EVICT)
    assert rows == [
        Row(0, 0, [(0, 4), (1, 4)], 98, []),
        Row(1, 0, [(1, 1), (2, 4)], 97, []),  # 5 tokens in 2 blocks, and 1 block
        Row(2, 0, [(1, 1), (2, 1)], 96, []),
    ]
    assert ticks(state, FINISH) == [1, 3, 3]
    assert state.replica[0, BOUNDS].tolist() == [1, 0, 0]


def test_the_overlap_loop_sees_a_free_seat_a_step_late() -> None:
    """The batch at tick 1 was formed before request 0's last token was known."""
    rows, state = play(*SEATS, NO_EVICT._replace(late_results=True))
    assert rows == [
        Row(0, 0, [(0, 4), (1, 4)], 98, []),
        Row(1, 0, [(1, 1)], 98, []),  # 2nd block of request 1; that of request 0 comes back
        Row(2, 0, [(1, 1), (2, 4)], 97, []),
        Row(3, 0, [(2, 1)], 98, []),
    ]
    assert ticks(state, FINISH) == [1, 3, 4]


@pytest.mark.parametrize("prompt", [1, 2, 3, 4])
@pytest.mark.parametrize("rules", [NO_EVICT, MAX_UTILIZATION])
def test_a_decode_takes_a_block_exactly_when_its_context_crosses_a_multiple(
    prompt: int, rules: Rules
) -> None:
    """Computed tokens 4 and 8 still fit 1 and 2 blocks; the 5th and 9th take a new one."""
    rows, _ = play(workload([prompt], [7]), limits(blocks=10), rules)
    # Batch i (from 0) ends with prompt + i computed tokens, of which the table gives blocks.
    held = {1: 1, 2: 1, 3: 1, 4: 1, 5: 2, 6: 2, 7: 2, 8: 2, 9: 3, 10: 3}
    assert [row.free for row in rows] == [10 - held[prompt + i] for i in range(7)]


PIPELINE = NO_EVICT._replace(batches_in_flight=2)


def test_each_micro_batch_takes_whoever_is_not_in_flight() -> None:
    """Batch size and budget hold for each; a batch takes a tick on each of two stages."""
    under = limits(seqs=2, tokens=8, blocks=100)
    rows, state = play(workload([4] * 4, [2] * 4), under, PIPELINE, cost=TWO_STAGES)
    assert rows == [
        Row(0, 0, [(0, 4), (1, 4)], 98, []),
        Row(0, 0, [(2, 4), (3, 4)], 96, []),
        Row(2, 0, [(0, 1), (1, 1)], 94, []),
        Row(3, 0, [(2, 1), (3, 1)], 92, []),
    ]
    assert ticks(state, FINISH) == [4, 4, 5, 5]
    # A request that comes while another is in flight goes into the other micro-batch.
    what = workload([4, 4], [3, 3], [0, 0.5 * TICK_S])
    rows, state = play(what, under, PIPELINE, cost=TWO_STAGES)
    assert [(row.tick, row.batch) for row in rows] == [
        (0, [(0, 4)]),
        (0.5, [(1, 4)]),  # stages at 1 and 2
        (2, [(0, 1)]),
        (3, [(1, 1)]),
        (4, [(0, 1)]),
        (5, [(1, 1)]),
    ]
    assert ticks(state, FINISH) == [6, 7]


def test_a_chunk_in_flight_holds_the_next_one_back() -> None:
    """Unlike other engines' the second chunk waits for the first one's end."""
    rows, state = play(workload([16], [1]), limits(tokens=8, blocks=100), PIPELINE, cost=TWO_STAGES)
    assert rows == [Row(0, 0, [(0, 8)], 96, []), Row(2, 0, [(0, 8)], 96, [])]
    assert ticks(state, FINISH) == [4]


def test_with_stages_max_utilization_looks_two_tokens_ahead() -> None:
    """Request 0 is in flight with 8 tokens; the block of its 9th makes request 1 wait."""
    rules = MAX_UTILIZATION._replace(batches_in_flight=2)
    rows, state = play(workload([7, 4], [3, 3]), limits(seqs=1, blocks=4), rules, cost=TWO_STAGES)
    assert rows == [
        Row(0, 0, [(0, 7)], 2, []),
        Row(0, 0, [(1, 4)], 1, []),
        Row(2, 0, [(0, 1)], 1, []),  # 8 tokens; request 1 is in flight
        # At tick 3 request 1 needs a 2nd block for its 5th token; the one that is free is kept for
        # request 0, and request 1 is paused.
        Row(4, 0, [(0, 1)], 1, [1]),
        Row(6, 0, [(1, 5)], 2, []),
        Row(8, 0, [(1, 1)], 2, []),
    ]
    assert ticks(state, FINISH) == [6, 10]
    assert state.request[:, PREEMPTIONS].tolist() == [0, 1]
