"""Hand-worked schedules of Sarathi-Serve's policy, batch by batch.

Every iteration lasts one tick, a block holds 4 tokens, and requests are numbered in arrival order.
"""

from __future__ import annotations

import numpy as np
import pytest

from simulator.rules import SARATHI, Rules
from simulator.state import (
    BOUND_BLOCKS,
    BOUND_SEATS,
    BOUND_TOKENS,
    FINISH,
    FIRST_TOKEN,
    PREEMPTIONS,
)
from simulator.timing import stages_of
from tests.builders import TICK_S, limits, linear_cost, workload
from tests.schedules import Row, play, ticks

RULES = Rules(policy=SARATHI)
BOUNDS = [BOUND_SEATS, BOUND_TOKENS, BOUND_BLOCKS]
TWO_STAGES = stages_of([linear_cost(TICK_S)], [0, 0], np.zeros(257))


def test_prompts_fill_up_the_batch_and_hold_all_their_blocks() -> None:
    """Decodes count in the batch; a prompt is cut where it is full and goes on in the next."""
    rows, state = play(workload([10, 9], [2, 2]), limits(tokens=8, blocks=100), RULES)
    assert rows == [
        Row(0, 0, [(0, 8)], 97, []),  # 3 blocks for all 10 tokens
        Row(1, 0, [(0, 2), (1, 6)], 94, []),  # 3 blocks for all 9
        Row(2, 0, [(0, 1), (1, 3)], 94, []),
        Row(3, 0, [(1, 1)], 97, []),
    ]
    assert ticks(state, FIRST_TOKEN) == [2, 3]
    assert ticks(state, FINISH) == [3, 4]
    assert state.replica[0, BOUNDS].tolist() == [0, 1, 0]


def test_decodes_that_fill_the_batch_keep_new_prompts_out() -> None:
    """A batch of two tokens holds two decodes; the third request waits until one has left."""
    rows, state = play(workload([1, 1, 1], [3, 2, 1]), limits(tokens=2, blocks=100), RULES)
    assert rows == [
        Row(0, 0, [(0, 1), (1, 1)], 98, []),
        Row(1, 0, [(0, 1), (1, 1)], 98, []),
        Row(2, 0, [(0, 1), (2, 1)], 98, []),
    ]
    assert ticks(state, FINISH) == [3, 2, 3]
    assert state.replica[0, BOUNDS].tolist() == [0, 1, 0]


def test_the_seat_limit_holds_the_third_request_back() -> None:
    """With two seats the third request joins the second's decode when the first has left."""
    rows, state = play(workload([4, 4, 4], [1, 3, 2]), limits(seqs=2, blocks=100), RULES)
    assert rows == [
        Row(0, 0, [(0, 4), (1, 4)], 98, []),
        Row(1, 0, [(1, 1), (2, 4)], 97, []),
        Row(2, 0, [(1, 1), (2, 1)], 96, []),
    ]
    assert ticks(state, FINISH) == [1, 3, 3]
    assert state.replica[0, BOUNDS].tolist() == [1, 0, 0]


def test_a_preempted_request_may_come_back_in_the_same_step() -> None:
    """Admission goes on after a preemption, with the victim at the head of the queue."""
    rows, state = play(workload([4, 3], [5, 3]), limits(blocks=3), RULES)
    assert rows == [
        Row(0, 0, [(0, 4), (1, 3)], 1, []),
        # 5 tokens of 0 take the last block; 1 finds none free, goes (1 back) and recomputes
        # 3 + 1 generated = 4 tokens in that block.
        Row(1, 0, [(0, 1), (1, 4)], 0, []),
        # 6 tokens of 0 fit its 2 blocks, but none is free: 1 goes. It needs 5 tokens, 2 blocks.
        Row(2, 0, [(0, 1)], 1, [1]),
        Row(3, 0, [(0, 1)], 1, [1]),
        Row(4, 0, [(0, 1)], 1, [1]),  # 8 tokens; 5th generated
        Row(5, 0, [(1, 5)], 1, []),
    ]
    assert ticks(state, FIRST_TOKEN) == [1, 1]
    assert ticks(state, FINISH) == [5, 6]
    assert state.request[:, PREEMPTIONS].tolist() == [0, 2]
    assert state.replica[0, BOUND_BLOCKS] == 1


def test_a_running_prompt_asks_for_no_block_but_can_be_preempted() -> None:
    """It holds its blocks from the start; a decode that finds none free takes them away."""
    rows, state = play(workload([4, 12], [4, 1]), limits(tokens=8, blocks=5), RULES)
    assert rows == [
        Row(0, 0, [(0, 4), (1, 4)], 1, []),  # 1 block, and 3 for all 12 tokens
        Row(1, 0, [(0, 1), (1, 7)], 0, []),  # 5 tokens of 0 take the last one
        # 6 tokens of 0 fit, but none is free: 1 goes (3 back) and starts over at once.
        Row(2, 0, [(0, 1), (1, 7)], 0, []),
        Row(3, 0, [(0, 1), (1, 7)], 0, []),  # and again
        Row(4, 0, [(1, 5)], 2, []),  # 0 has left
    ]
    assert ticks(state, FINISH) == [4, 5]
    assert state.request[:, PREEMPTIONS].tolist() == [0, 2]


def test_admission_leaves_the_watermark_and_decodes_use_it() -> None:
    """A quarter of 8 blocks stays free at admission, for the next blocks of running requests."""
    rules = RULES._replace(watermark=0.25)
    rows, state = play(workload([8, 8, 8, 4], [3, 3, 2, 1]), limits(blocks=8), rules)
    assert rows == [
        # 2 + 2 + 2 blocks leave exactly 2; request 3 (1 block) would leave 1.
        Row(0, 0, [(0, 8), (1, 8), (2, 8)], 2, []),
        # 9 tokens: 0 and 1 take the 2 blocks, 2 finds none and goes; it would need 3 + 2.
        Row(1, 0, [(0, 1), (1, 1)], 2, [2]),
        Row(2, 0, [(0, 1), (1, 1)], 2, [2]),
        Row(3, 0, [(2, 9), (3, 4)], 4, []),
    ]
    assert ticks(state, FINISH) == [3, 3, 4, 4]


def test_a_recomputed_prompt_is_cut_by_the_budget_too() -> None:
    """A resumed request computes its prompt and what it generated, chunk by chunk."""
    rows, state = play(workload([7, 7], [6, 5]), limits(tokens=8, blocks=5), RULES)
    assert rows == [
        Row(0, 0, [(0, 7), (1, 1)], 1, []),  # 2 blocks each
        Row(1, 0, [(0, 1), (1, 6)], 1, []),  # 8 and 7 tokens
        # 9 tokens of 0 take the last block; 8 tokens of 1 fit, but none is free: 1 goes
        # (2 back), recomputes 7 + 1 generated and gets 7 tokens at once.
        Row(2, 0, [(0, 1), (1, 7)], 0, []),
        # 10 tokens of 0 fit, but none is free: 1 goes again and starts over.
        Row(3, 0, [(0, 1), (1, 7)], 0, []),
        Row(4, 0, [(0, 1), (1, 7)], 0, []),
        Row(5, 0, [(0, 1), (1, 7)], 0, []),  # 12 tokens; 6th generated
        # The last of 8 tokens, then 9 (3rd block), 10 and 11.
        Row(6, 0, [(1, 1)], 3, []),
        Row(7, 0, [(1, 1)], 2, []),
        Row(8, 0, [(1, 1)], 2, []),
        Row(9, 0, [(1, 1)], 2, []),
    ]
    assert ticks(state, FIRST_TOKEN) == [1, 2]
    assert ticks(state, FINISH) == [6, 10]
    assert state.request[:, PREEMPTIONS].tolist() == [0, 4]


@pytest.mark.parametrize("prompt", [1, 2, 3, 4])
def test_a_decode_takes_a_block_exactly_when_its_context_crosses_a_multiple(prompt: int) -> None:
    """Computed tokens 4 and 8 still fit 1 and 2 blocks; the 5th and 9th take a new one."""
    rows, _ = play(workload([prompt], [7]), limits(blocks=10), RULES)
    held = {1: 1, 2: 1, 3: 1, 4: 1, 5: 2, 6: 2, 7: 2, 8: 2, 9: 3, 10: 3}
    assert [row.free for row in rows] == [10 - held[prompt + i] for i in range(7)]


def test_a_request_in_flight_is_passed_over_even_with_a_part_of_its_prompt() -> None:
    """In a pipeline the next chunk waits for the last one; other requests fill the gap."""
    rules = RULES._replace(batches_in_flight=2)
    what, under = workload([10, 4], [2, 2]), limits(tokens=8, blocks=100)
    rows, state = play(what, under, rules, cost=TWO_STAGES)
    assert rows == [
        # On stage 0 from 0 to 1, on stage 1 to 2.
        Row(0, 0, [(0, 8)], 97, []),
        # The second batch may not touch request 0. On stage 0 from 1 to 2, on stage 1 to 3.
        Row(0, 0, [(1, 4)], 96, []),
        Row(2, 0, [(0, 2)], 96, []),  # stage 0 to 3, stage 1 to 4; 1 is in flight
        Row(3, 0, [(1, 1)], 95, []),  # stage 0 to 4, stage 1 to 5; 5 tokens: 2nd block
        Row(4, 0, [(0, 1)], 95, []),  # stage 0 to 5, stage 1 to 6
    ]
    assert ticks(state, FIRST_TOKEN) == [4, 3]
    assert ticks(state, FINISH) == [6, 5]
