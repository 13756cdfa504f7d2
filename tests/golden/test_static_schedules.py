"""Hand-worked schedules of static batching, batch by batch.

Every iteration lasts one tick, a block holds 4 tokens, and requests are numbered in arrival order.
A request takes the blocks of its prompt and output at once; rows show no padding.
"""

from __future__ import annotations

import numpy as np

from simulator.rules import STATIC, Rules
from simulator.state import (
    BOUND_BLOCKS,
    BOUND_SEATS,
    BOUND_TOKENS,
    FINISH,
    FIRST_TOKEN,
    PEAK_SEATS,
)
from simulator.timing import stages_of
from tests.builders import TICK_S, limits, linear_cost, workload
from tests.schedules import Row, play, ticks

WHOLE = Rules(policy=STATIC, chunked=False)
BOUNDS = [BOUND_SEATS, BOUND_TOKENS, BOUND_BLOCKS]
TWO_STAGES = stages_of([linear_cost(TICK_S)], [0, 0], np.zeros(257))


def test_the_next_batch_waits_until_all_of_the_last_has_finished() -> None:
    """A request that arrives, or a seat that gets free, meanwhile changes nothing."""
    what = workload([4, 4, 4], [3, 1, 2], [0, 0, 0.5 * TICK_S])
    rows, state = play(what, limits(blocks=100), WHOLE)
    assert rows == [
        Row(0, 0, [(0, 4), (1, 4)], 96, []),  # 7 and 5 tokens: 2 blocks each
        Row(1, 0, [(0, 1)], 98, []),
        Row(2, 0, [(0, 1)], 98, []),
        Row(3, 0, [(2, 4)], 98, []),  # 6 tokens: 2 blocks
        Row(4, 0, [(2, 1)], 98, []),
    ]
    assert ticks(state, FIRST_TOKEN) == [1, 1, 4]
    assert ticks(state, FINISH) == [3, 1, 5]
    assert state.replica[0, BOUNDS].tolist() == [0, 0, 0]
    assert state.replica[0, PEAK_SEATS] == 2


def test_finished_sequences_stay_in_the_batch_as_padding() -> None:
    """They cost tokens and samples to the end, but no attention."""
    quarter, eighth = TICK_S / 4, TICK_S / 8
    cost = linear_cost(TICK_S, token_s=quarter, sequence_s=quarter, context_s=eighth)
    _, state = play(workload([4, 4], [3, 1]), limits(blocks=100), WHOLE, cost=cost)
    # 8 tokens and 2 samples: 1 + 2 + 1/2. Then twice 2 tokens and 2 samples, although one sequence
    # is left, with its context of 5 and then 6: 1 + 1/2 + 1/2 + 5/8 and + 6/8.
    assert ticks(state, FINISH) == [3.5 + 2.625 + 2.75, 3.5]


def test_the_seat_limit_cuts_the_batch() -> None:
    """With two seats the third request makes a batch of its own."""
    rows, state = play(workload([4, 4, 4], [1, 2, 1]), limits(seqs=2, blocks=100), WHOLE)
    assert rows == [
        Row(0, 0, [(0, 4), (1, 4)], 96, []),
        Row(1, 0, [(1, 1)], 98, []),
        Row(2, 0, [(2, 4)], 98, []),
    ]
    assert ticks(state, FINISH) == [1, 2, 3]
    assert state.replica[0, BOUNDS].tolist() == [1, 0, 0]


def test_without_chunks_the_token_budget_cuts_the_batch() -> None:
    """The first prompt that exceeds what is left ends the batch, and opens the next."""
    rows, state = play(workload([6, 5, 4], [2, 1, 1]), limits(tokens=10, blocks=100), WHOLE)
    assert rows == [
        Row(0, 0, [(0, 6)], 98, []),  # 5 > 4 left; 4 would fit but is behind
        Row(1, 0, [(0, 1)], 98, []),
        Row(2, 0, [(1, 5), (2, 4)], 96, []),
    ]
    assert state.replica[0, BOUNDS].tolist() == [0, 1, 0]


def test_with_chunks_the_prompts_take_several_iterations_before_any_decode() -> None:
    """The batch is whole; who has its first token waits until all have theirs."""
    rules = WHOLE._replace(chunked=True)
    rows, state = play(workload([6, 5, 4], [2, 1, 2]), limits(tokens=8, blocks=100), rules)
    assert rows == [
        Row(0, 0, [(0, 6), (1, 2)], 94, []),  # 2 blocks each
        Row(1, 0, [(1, 3), (2, 4)], 94, []),
        Row(2, 0, [(0, 1), (2, 1)], 96, []),  # 1 has its only token
    ]
    assert ticks(state, FIRST_TOKEN) == [1, 2, 2]
    assert ticks(state, FINISH) == [3, 2, 3]
    assert state.replica[0, BOUNDS].tolist() == [0, 1, 0]


def test_blocks_for_the_whole_output_cut_the_batch() -> None:
    """Nothing is preempted: a request joins only if all its tokens will fit."""
    rows, state = play(workload([4, 4], [5, 1]), limits(blocks=4), WHOLE)
    assert rows == [
        Row(0, 0, [(0, 4)], 1, []),  # 9 tokens: 3 blocks; 5 tokens of request 1 need 2 > 1
        *[Row(tick, 0, [(0, 1)], 1, []) for tick in range(1, 5)],
        Row(5, 0, [(1, 4)], 2, []),
    ]
    assert ticks(state, FINISH) == [5, 6]
    assert state.replica[0, BOUNDS].tolist() == [0, 0, 1]


def test_a_closed_loop_waits_for_the_batch() -> None:
    """A client's next request is sent when its last one finishes, and waits for the others."""
    rows, state = play(workload([4] * 4, [1, 2, 1, 1], concurrency=2), limits(blocks=100), WHOLE)
    assert rows == [
        Row(0, 0, [(0, 4), (1, 4)], 96, []),
        Row(1, 0, [(1, 1)], 98, []),  # 0 has left and sent 2
        Row(2, 0, [(2, 4), (3, 4)], 96, []),
    ]
    assert ticks(state, FINISH) == [1, 2, 3, 3]


def test_a_pipeline_runs_as_many_even_micro_batches() -> None:
    """Two in flight hold half of the batch each, prompts and decodes."""
    rules = WHOLE._replace(batches_in_flight=2)
    rows, state = play(workload([4] * 4, [2] * 4), limits(blocks=100), rules, cost=TWO_STAGES)
    assert rows == [
        Row(0, 0, [(0, 4), (1, 4)], 92, []),  # stage 0 to 1, stage 1 to 2
        Row(0, 0, [(2, 4), (3, 4)], 92, []),  # stage 0 to 2, stage 1 to 3
        Row(2, 0, [(0, 1), (1, 1)], 92, []),  # stage 0 to 3, stage 1 to 4
        Row(3, 0, [(2, 1), (3, 1)], 92, []),  # stage 0 to 4, stage 1 to 5
    ]
    assert ticks(state, FINISH) == [4, 4, 5, 5]
