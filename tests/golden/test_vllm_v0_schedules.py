"""Hand-worked schedules of vLLM's V0 policy, batch by batch, whole prompts and chunks.

Every iteration lasts one tick, a block holds 4 tokens, and requests are numbered in arrival order.
With chunking preempted requests wait in the queue itself, so a row's last entry stays empty.
"""

from __future__ import annotations

import pytest

from simulator.rules import VLLM_V0, Rules
from simulator.state import (
    BOUND_BLOCKS,
    BOUND_SEATS,
    BOUND_TOKENS,
    FINISH,
    FIRST_TOKEN,
    PEAK_DEMAND,
    PREEMPTIONS,
)
from tests.builders import TICK_S, limits, workload
from tests.schedules import Row, play, ticks

WHOLE = Rules(policy=VLLM_V0, chunked=False)
CHUNKED = Rules(policy=VLLM_V0, chunked=True)
BOUNDS = [BOUND_SEATS, BOUND_TOKENS, BOUND_BLOCKS]


def test_decodes_wait_while_prompts_can_be_admitted() -> None:
    """A prompt batch holds no decode; each arrival delays the running requests by a tick."""
    what = workload([4, 4, 4], [3, 2, 2], [0, 0.5 * TICK_S, 1.5 * TICK_S])
    rows, state = play(what, limits(blocks=100), WHOLE)
    assert rows == [
        Row(0, 0, [(0, 4)], 99, []),
        Row(1, 0, [(1, 4)], 98, []),  # request 0 waits
        Row(2, 0, [(2, 4)], 97, []),  # requests 0 and 1 wait
        Row(3, 0, [(0, 1), (1, 1), (2, 1)], 94, []),  # 5 tokens each: 2nd blocks
        Row(4, 0, [(0, 1)], 98, []),  # 1 and 2 have their 2 tokens
    ]
    assert ticks(state, FIRST_TOKEN) == [1, 2, 3]
    assert ticks(state, FINISH) == [5, 4, 4]
    assert state.replica[0, BOUNDS].tolist() == [0, 0, 0]


def test_a_prompt_batch_takes_whole_prompts_strictly_in_order() -> None:
    """The first prompt that exceeds what is left of the budget ends the batch."""
    rows, state = play(workload([6, 5, 4, 2], [1, 1, 1, 1]), limits(tokens=10, blocks=100), WHOLE)
    assert rows == [
        Row(0, 0, [(0, 6)], 98, []),  # 5 > 4 left; 4 would fit but is behind
        Row(1, 0, [(1, 5), (2, 4)], 97, []),  # 2 + 1 blocks; 2 > 1 left
        Row(2, 0, [(3, 2)], 99, []),
    ]
    assert state.replica[0, BOUNDS].tolist() == [0, 1, 0]


def test_the_seat_limit_counts_running_requests() -> None:
    """With two seats the third prompt runs, alone, when the first has left."""
    rows, state = play(workload([4, 4, 4], [1, 3, 2]), limits(seqs=2, blocks=100), WHOLE)
    assert rows == [
        Row(0, 0, [(0, 4), (1, 4)], 98, []),
        Row(1, 0, [(2, 4)], 98, []),  # 1 waits with its block
        Row(2, 0, [(1, 1), (2, 1)], 96, []),
        Row(3, 0, [(1, 1)], 98, []),
    ]
    assert ticks(state, FINISH) == [1, 4, 3]
    assert state.replica[0, BOUNDS].tolist() == [1, 0, 0]


def test_a_preempted_request_is_recomputed_in_a_prompt_batch() -> None:
    """The last admitted gives way, waits ahead of the queue and delays decodes when it resumes."""
    what = workload([7, 7, 1], [6, 5, 2], [0, 0, 1.5 * TICK_S])
    rows, state = play(what, limits(blocks=5), WHOLE)
    assert rows == [
        Row(0, 0, [(0, 7), (1, 7)], 1, []),  # 2 blocks each
        Row(1, 0, [(0, 1), (1, 1)], 1, []),  # 8 tokens each, still 2 blocks; one block is free
        Row(2, 0, [(2, 1)], 0, []),  # takes the last block; 0 and 1 wait
        # 9 tokens of 0: no block is free, 2 goes, 0 takes its block. Then 1 finds none and is
        # itself the last: 2 blocks back.
        Row(3, 0, [(0, 1)], 2, [1, 2]),
        # Request 1 needs 7 + 2 generated = 9 tokens, 3 blocks > 2; 2 waits behind it.
        Row(4, 0, [(0, 1)], 2, [1, 2]),
        Row(5, 0, [(0, 1)], 2, [1, 2]),
        Row(6, 0, [(0, 1)], 2, [1, 2]),  # 12 tokens; 6th generated
        Row(7, 0, [(1, 9), (2, 2)], 1, []),  # 3 blocks and 1
        Row(8, 0, [(1, 1)], 2, []),
        Row(9, 0, [(1, 1)], 2, []),
    ]
    assert ticks(state, FIRST_TOKEN) == [1, 1, 3]
    assert ticks(state, FINISH) == [7, 10, 8]
    assert state.request[:, PREEMPTIONS].tolist() == [0, 1, 1]
    assert state.replica[0, BOUND_BLOCKS] == 1


def test_a_decode_wants_a_free_block_even_if_its_token_fits() -> None:
    """Without a free block the last admitted goes, though no running request needs one."""
    rows, state = play(workload([4, 3], [5, 3]), limits(blocks=3), WHOLE)
    assert rows == [
        Row(0, 0, [(0, 4), (1, 3)], 1, []),
        # 5 tokens of 0 take the last block. 4 tokens of 1 fit its block, but none is free.
        Row(1, 0, [(0, 1)], 1, [1]),
        Row(2, 0, [(1, 4)], 0, []),  # 3 + 1 generated: 1 block; 0 waits
        # 6 tokens of 0 fit its 2 blocks, but none is free: 1 goes.
        Row(3, 0, [(0, 1)], 1, [1]),
        Row(4, 0, [(0, 1)], 1, [1]),  # 1 needs 3 + 2 = 5 tokens, 2 blocks > 1
        Row(5, 0, [(0, 1)], 1, [1]),  # 5th generated
        Row(6, 0, [(1, 5)], 1, []),
    ]
    assert ticks(state, FINISH) == [6, 7]
    assert state.request[:, PREEMPTIONS].tolist() == [0, 2]


@pytest.mark.parametrize("rules", [WHOLE, CHUNKED], ids=["whole", "chunked"])
def test_a_request_alone_may_fill_the_cache(rules: Rules) -> None:
    """Nobody is left to give it a block, and recomputing itself would win none."""
    rows, state = play(workload([3], [6]), limits(blocks=2), rules)
    # Blocks: 1 for 3 and 4 tokens, then both.
    assert [row.free for row in rows] == [1, 1, 0, 0, 0, 0]
    assert state.request[0, PREEMPTIONS] == 0


def test_admission_leaves_the_watermark_and_decodes_use_it() -> None:
    """A quarter of 8 blocks stays free at admission, for the next blocks of running requests."""
    rules = WHOLE._replace(watermark=0.25)
    rows, state = play(workload([8, 8, 8, 4], [3, 3, 2, 1]), limits(blocks=8), rules)
    assert rows == [
        # 2 + 2 + 2 blocks leave exactly 2; request 3 (1 block) would leave 1.
        Row(0, 0, [(0, 8), (1, 8), (2, 8)], 2, []),
        # 9 tokens: 0 and 1 take the 2 blocks, 2 finds none and goes.
        Row(1, 0, [(0, 1), (1, 1)], 2, [2]),
        Row(2, 0, [(0, 1), (1, 1)], 2, [2]),  # 2 needs 3 blocks and the watermark
        Row(3, 0, [(2, 9), (3, 4)], 4, []),
    ]
    assert ticks(state, FINISH) == [3, 3, 4, 4]
    assert state.replica[0, BOUND_BLOCKS] == 1


@pytest.mark.parametrize("rules", [WHOLE, CHUNKED], ids=["whole", "chunked"])
@pytest.mark.parametrize("prompt", [1, 2, 3, 4])
def test_a_decode_takes_a_block_exactly_when_its_context_crosses_a_multiple(
    prompt: int, rules: Rules
) -> None:
    """Computed tokens 4 and 8 still fit 1 and 2 blocks; the 5th and 9th take a new one."""
    rows, state = play(workload([prompt], [7]), limits(blocks=10), rules)
    held = {1: 1, 2: 1, 3: 1, 4: 1, 5: 2, 6: 2, 7: 2, 8: 2, 9: 3, 10: 3}
    assert [row.free for row in rows] == [10 - held[prompt + i] for i in range(7)]
    # It also wants a free one, so with fewer than that another run could differ.
    assert state.replica[0, PEAK_DEMAND] == held[prompt + 6] + 1


def test_chunks_run_beside_decodes_and_hold_the_whole_prompt() -> None:
    """Decodes come first and the newest prompt takes what they leave of the budget."""
    rows, state = play(workload([10, 9], [2, 2]), limits(tokens=8, blocks=100), CHUNKED)
    assert rows == [
        Row(0, 0, [(0, 8)], 97, []),  # 3 blocks for all 10 tokens
        Row(1, 0, [(0, 2), (1, 6)], 94, []),  # 3 blocks for all 9
        Row(2, 0, [(0, 1), (1, 3)], 94, []),
        Row(3, 0, [(1, 1)], 97, []),  # 10 tokens fit
    ]
    assert ticks(state, FIRST_TOKEN) == [2, 3]
    assert ticks(state, FINISH) == [3, 4]
    assert state.replica[0, BOUNDS].tolist() == [0, 1, 0]


def test_with_chunks_a_new_prompt_overtakes_a_request_preempted_in_the_same_step() -> None:
    """Admission goes on after a preemption, and sees the queue as it was before."""
    what = workload([8, 16, 4, 4], [4, 2, 2, 1], [0, 0, 0.5 * TICK_S, 1.5 * TICK_S])
    rows, state = play(what, limits(blocks=6), CHUNKED)
    assert rows == [
        Row(0, 0, [(0, 8), (1, 16)], 0, []),  # 2 + 4 blocks
        # 9 tokens of 0: 1 goes (4 back), 0 takes one; request 2 takes one.
        Row(1, 0, [(0, 1), (2, 4)], 2, []),
        # 2 takes its 2nd block. 1 is ahead of 3 again: 17 tokens, 5 blocks > 1; 3 would fit.
        Row(2, 0, [(0, 1), (2, 1)], 1, []),
        Row(3, 0, [(0, 1)], 3, []),  # 2 has left
        Row(4, 0, [(1, 17), (3, 4)], 0, []),
    ]
    assert ticks(state, FIRST_TOKEN) == [1, 1, 2, 5]
    assert ticks(state, FINISH) == [4, 5, 3, 5]
    assert state.request[:, PREEMPTIONS].tolist() == [0, 1, 0, 0]


def test_a_chunk_wants_a_free_block_too_and_loses_what_it_computed() -> None:
    """A partial prompt that finds no free block starts over, though it holds all its blocks."""
    rows, state = play(workload([4, 12], [4, 1]), limits(tokens=8, blocks=5), CHUNKED)
    assert rows == [
        Row(0, 0, [(0, 4), (1, 4)], 1, []),  # 1 block, and 3 for all 12 tokens
        # 5 tokens of 0 take the last block; 1 finds none free and goes.
        Row(1, 0, [(0, 1)], 3, []),
        Row(2, 0, [(0, 1), (1, 7)], 0, []),  # 1 again, with what the decode leaves
        Row(3, 0, [(0, 1)], 3, []),  # 7 tokens of 0 fit, but none is free: 1 goes
        Row(4, 0, [(1, 8)], 2, []),
        Row(5, 0, [(1, 4)], 2, []),
    ]
    assert ticks(state, FINISH) == [4, 6]
    assert state.request[:, PREEMPTIONS].tolist() == [0, 2]


def test_with_chunks_the_seat_limit_holds_the_third_request_back() -> None:
    """With two seats the third request joins the second's decode when the first has left."""
    rows, state = play(workload([4, 4, 4], [1, 3, 2]), limits(seqs=2, blocks=100), CHUNKED)
    assert rows == [
        Row(0, 0, [(0, 4), (1, 4)], 98, []),
        Row(1, 0, [(1, 1), (2, 4)], 97, []),
        Row(2, 0, [(1, 1), (2, 1)], 96, []),
    ]
    assert ticks(state, FINISH) == [1, 3, 3]
    assert state.replica[0, BOUNDS].tolist() == [1, 0, 0]


def test_who_overtook_a_preempted_request_keeps_it_out_of_a_seat() -> None:
    """Its seat is taken when the next step comes, and it waits ahead of the others."""
    what = workload([3, 3, 2, 8], [12, 12, 3, 1], [0, 0, 0.5 * TICK_S, 0.5 * TICK_S])
    rows, state = play(what, limits(seqs=2, blocks=4), CHUNKED)
    assert [row.batch for row in rows] == [
        [(0, 3), (1, 3)],  # 1 block each, 2 free
        [(0, 1), (1, 1)],  # 4 tokens each; no seat for 2
        [(0, 1), (1, 1)],  # 5 tokens each: all 4 blocks
        [(0, 1), (2, 2)],  # none free: 1 goes (2 back), 2 takes a seat and a block
        [(0, 1), (2, 1)],  # 1 is free: 7 and 3 tokens; no seat for 1
        [(0, 1), (2, 1)],  # 8 and 4 tokens; 2 has its 3
        # 9 tokens of 0: 3rd block; 1 (3 + 3 generated = 6 tokens, 2 blocks) does not fit.
        [(0, 1)],
        [(0, 1)],
        [(0, 1)],
        [(0, 1)],  # 12 tokens: 10th generated
        [(0, 1)],  # 13 tokens: the last block
        [(0, 1)],  # 12th generated
        # 0 has left: 1 recomputes 6 tokens (2 blocks), request 3 joins (2 blocks).
        [(1, 6), (3, 8)],
        *[[(1, 1)]] * 8,  # tokens 5 to 12
    ]
    assert ticks(state, FINISH) == [12, 21, 6, 13]
    assert state.request[:, PREEMPTIONS].tolist() == [0, 1, 0, 0]
