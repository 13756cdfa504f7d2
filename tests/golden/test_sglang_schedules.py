"""Hand-worked schedules of SGLang's policy, batch by batch.

Every batch lasts one tick on each pipeline stage, a page holds 4 tokens, and requests are numbered
in arrival order. A table row reads: start tick, replica, (request, tokens) of those that compute
something, pages free once the batch is formed, requests ahead of the queue (never any: a retracted
request goes to its end).

Memory is reckoned in tokens: ``spare`` is what is free less the share ``ratio`` of the output that
the running requests have left; a request needs its tokens and its whole output, which must be
fewer, and takes both, its tokens in whole pages.
"""

from __future__ import annotations

import numpy as np
import pytest

from simulator.rules import SGLANG, Rules
from simulator.state import (
    BOUND_BLOCKS,
    BOUND_SEATS,
    BOUND_TOKENS,
    FINISH,
    FIRST_TOKEN,
    PREEMPTIONS,
    initial_state,
)
from simulator.timing import stages_of
from tests.builders import TICK_S, limits, linear_cost, workload
from tests.schedules import Row, play, ticks, watch

RULES = Rules(
    policy=SGLANG,
    mixed=False,
    chunk_unit=4,
    new_token_ratio=0.5,
    least_new_token_ratio=0.25,
    ratio_decay=0.125,
    reserved_output_tokens=4096,
)
MICRO_BATCHES = RULES._replace(batches_in_flight=2, own_micro_batches=True)
TWO_STAGES = stages_of([linear_cost(TICK_S)], [0, 0], np.zeros(257))


def test_prompts_run_alone_and_before_decodes() -> None:
    """A prompt that arrives stops the decodes for a batch."""
    what = workload([4, 4], [3, 2], [0, 0.5 * TICK_S])
    rows, state = play(what, limits(blocks=100), RULES)
    assert rows == [
        Row(0, 0, [(0, 4)], 99, []),
        Row(1, 0, [(1, 4)], 98, []),  # request 0 has emitted its first token and waits
        Row(2, 0, [(0, 1), (1, 1)], 96, []),  # the 5th token of each takes a page
        Row(3, 0, [(0, 1)], 98, []),
    ]
    assert ticks(state, FIRST_TOKEN) == [1, 2]
    assert ticks(state, FINISH) == [4, 3]


def test_prompts_are_cut_by_the_chunk_and_continued_first() -> None:
    """One prompt at a time is partly computed; whole pages count against the chunk."""
    rows, state = play(workload([10, 9], [2, 2]), limits(tokens=8, blocks=100), RULES)
    assert rows == [
        Row(0, 0, [(0, 8)], 98, []),
        # The last 2 tokens of request 0 count as a page; 4 of the 8 are left: a page of request 1.
        Row(1, 0, [(0, 2), (1, 4)], 96, []),
        Row(2, 0, [(1, 5)], 94, []),  # request 0 cannot decode before prompt 1 is complete
        Row(3, 0, [(0, 1), (1, 1)], 94, []),  # 11 and 10 tokens, 3 pages each
    ]
    assert ticks(state, FIRST_TOKEN) == [2, 3]
    assert state.replica[0, [BOUND_SEATS, BOUND_TOKENS, BOUND_BLOCKS]].tolist() == [0, 1, 0]
    # A chunk of 6 begins a prompt with whole pages, 4 tokens, but goes on with 6.
    rows, _ = play(workload([12], [1]), limits(tokens=6, blocks=100), RULES)
    assert [row.batch for row in rows] == [[(0, 4)], [(0, 6)], [(0, 2)]]


def test_chunks_of_a_long_prompt_hold_the_decodes_up() -> None:
    """Request 0 stands still for as many batches as prompt 1 has chunks."""
    what = workload([4, 20], [3, 1], [0, 0.5 * TICK_S])
    rows, state = play(what, limits(tokens=8, blocks=100), RULES)
    assert [row.batch for row in rows] == [
        [(0, 4)],
        [(1, 8)],
        [(1, 8)],
        [(1, 4)],
        [(0, 1)],
        [(0, 1)],
    ]
    assert ticks(state, FINISH) == [6, 4]


def test_the_limit_on_prompt_tokens_cuts_no_prompt() -> None:
    """With max_prefill_tokens the second prompt waits; with the chunk alone it is cut."""
    what, under = workload([8, 8], [1, 1]), limits(tokens=12, blocks=100)
    # 12 - 8 = 4 are left and prompt 1 has 8, which is not fewer.
    rows, _ = play(what, under, RULES._replace(prefill_tokens=12))
    assert [row.batch for row in rows] == [[(0, 8)], [(1, 8)]]
    rows, _ = play(what, under, RULES)
    assert [row.batch for row in rows] == [[(0, 8), (1, 4)], [(1, 4)]]
    # Without chunks the budget is that limit; the first prompt may exceed it.
    whole = RULES._replace(chunked=False)
    rows, _ = play(workload([15, 4, 7], [1, 1, 1]), under, whole)
    assert [row.batch for row in rows] == [[(0, 15)], [(1, 4)], [(2, 7)]]  # 8 of 12 - 4: not fewer


MEMORY = workload([4, 4, 4], [8, 8, 8]), limits(blocks=8)  # 32 tokens


def test_output_is_reserved_and_the_last_admitted_is_retracted() -> None:
    """Admission reserves a share of the running output; when that was too little, one gives way."""
    rows, state = play(*MEMORY, RULES)
    everybody = [(0, 1), (1, 1), (2, 1)]
    assert rows == [
        # 4 + 8 = 12 < 32, 20 are left; 12 < 20, 8 are left; request 2: 12 >= 8, full. But nothing
        # ran, so that the new batch takes the place of the running one, and its mark.
        Row(0, 0, [(0, 4), (1, 4)], 6, []),
        # 24 free less half of 7 + 7: 17 > 12.
        Row(1, 0, [(2, 4)], 5, []),
        Row(2, 0, everybody, 2, []),  # 5 tokens each: a 2nd page
        Row(3, 0, everybody, 2, []),
        Row(4, 0, everybody, 2, []),
        Row(5, 0, everybody, 2, []),  # 8 tokens each
        # Three 3rd pages are needed and 2 are free. All have 5 outputs and 4 prompt tokens, so the
        # one admitted last goes: 4 free, 2 taken.
        Row(6, 0, [(0, 1), (1, 1)], 2, []),
        # Request 2 needs 4 + 5 tokens and 3 more: 12 > 8 free. Nobody is admitted until somebody
        # has left.
        Row(7, 0, [(0, 1), (1, 1)], 2, []),
        Row(8, 0, [(0, 1), (1, 1)], 2, []),
        Row(9, 0, [(2, 9)], 5, []),
        Row(10, 0, [(2, 1)], 5, []),
        Row(11, 0, [(2, 1)], 5, []),
    ]
    assert ticks(state, FIRST_TOKEN) == [1, 1, 2]
    assert ticks(state, FINISH) == [9, 9, 12]
    assert state.request[:, PREEMPTIONS].tolist() == [0, 0, 1]
    assert state.replica[0, [BOUND_SEATS, BOUND_TOKENS, BOUND_BLOCKS]].tolist() == [0, 0, 1]


def test_the_share_decays_by_decodes_and_follows_a_retraction() -> None:
    """It falls by an eighth per decode to a quarter, and starts anew when the engine is idle."""
    state = initial_state(MEMORY[0], 1, MEMORY[1], RULES, linear_cost(TICK_S))
    shares: list[float] = []
    watch(state, MEMORY[1], RULES, linear_cost(TICK_S), lambda *_: shares.append(state.ratio[0]))
    assert shares == [
        *(0.5, 0.5),  # prompts
        *(0.375, 0.25, 0.25, 0.25),  # decodes
        1.0,  # retraction: (5 + 5 outputs + 20 * 2) / (8 + 8 + 1) > 1
        *(0.875, 0.75),  # decodes
        0.5,  # nothing ran when requests 0 and 1 had left
        *(0.375, 0.25),
    ]


def test_the_share_decides_who_is_admitted() -> None:
    """19 tokens fit beside a quarter of what request 0 has left, not beside half of it."""
    what = workload([4, 4], [16, 15], [0, 3.5 * TICK_S])
    # At tick 4 request 0 has 7 tokens in 2 pages and 4 of 16 outputs: 24 free, 12 * ratio reserved.
    rows, _ = play(what, limits(blocks=8), RULES)
    assert rows[4] == Row(4, 0, [(1, 4)], 5, [])  # 24 - 3 = 21 > 4 + 15
    rows, state = play(what, limits(blocks=8), RULES._replace(ratio_decay=0.0))
    assert rows[4] == Row(4, 0, [(0, 1)], 6, [])  # 24 - 6 = 18
    assert ticks(state, FIRST_TOKEN) == [1, 17]  # request 0 leaves at 16


def test_the_longest_prompt_is_retracted_and_waits_behind_who_came_before() -> None:
    """Of equal outputs the longest prompt goes, though admitted first, to the end of the queue."""
    what = workload([8, 4, 4], [8, 8, 1], [0, 0, 4.5 * TICK_S])
    rules = RULES._replace(reserved_output_tokens=1)  # so that both are admitted at once
    rows, state = play(what, limits(blocks=5), rules)
    both = [(0, 1), (1, 1)]
    assert rows == [
        Row(0, 0, [(0, 8), (1, 4)], 2, []),  # 9 < 20; 5 < 11
        Row(1, 0, both, 0, []),  # 9 and 5 tokens: 3 and 2 pages
        Row(2, 0, both, 0, []),
        Row(3, 0, both, 0, []),
        Row(4, 0, both, 0, []),  # 12 and 8 tokens
        # Request 2 has come and finds nothing free. Both need a page; request 0 goes: 3 free.
        Row(5, 0, [(1, 1)], 2, []),
        # 8 free less 1 reserved: request 2 needs 4 + 1 and is ahead of request 0.
        Row(6, 0, [(2, 4)], 1, []),
        # Request 2 has left: 8 free; request 0 needs 8 + 5 + 1.
        Row(7, 0, [(1, 1)], 2, []),
        Row(8, 0, [(1, 1)], 2, []),
        Row(9, 0, [(0, 13)], 1, []),
        Row(10, 0, [(0, 1)], 1, []),
        Row(11, 0, [(0, 1)], 1, []),
    ]
    assert ticks(state, FINISH) == [12, 9, 7]
    assert state.request[:, PREEMPTIONS].tolist() == [1, 0, 0]


def test_a_seat_left_by_a_prompt_is_free_at_once() -> None:
    """A request whose only token came from its prompt is dropped before the next look."""
    rows, state = play(workload([4, 4, 4], [1, 3, 2]), limits(seqs=2, blocks=100), RULES)
    assert rows == [
        Row(0, 0, [(0, 4), (1, 4)], 98, []),
        Row(1, 0, [(2, 4)], 98, []),
        Row(2, 0, [(1, 1), (2, 1)], 96, []),
        Row(3, 0, [(1, 1)], 98, []),
    ]
    assert ticks(state, FINISH) == [1, 4, 3]
    assert state.replica[0, [BOUND_SEATS, BOUND_TOKENS, BOUND_BLOCKS]].tolist() == [1, 0, 0]


SEATS = workload([4, 4, 4], [2, 5, 2]), limits(seqs=2, blocks=100)


def test_a_seat_left_by_a_decode_is_free_a_step_later() -> None:
    """What finishes in a decode is dropped by the next one, after its look at the queue."""
    rows, state = play(*SEATS, RULES)
    assert rows == [
        Row(0, 0, [(0, 4), (1, 4)], 98, []),
        Row(1, 0, [(0, 1), (1, 1)], 96, []),  # request 2 finds no seat: full
        Row(2, 0, [(1, 1)], 98, []),  # request 0 has left, but the batch was still marked full
        Row(3, 0, [(2, 4)], 97, []),
        Row(4, 0, [(1, 1), (2, 1)], 96, []),  # 7 tokens, and 5 in a 2nd page
        Row(5, 0, [(1, 1)], 98, []),
    ]
    assert ticks(state, FINISH) == [2, 6, 5]


def test_overlapped_scheduling_sees_results_and_arrivals_a_step_late() -> None:
    """The same with results a step late: one more decode before request 2; and a late arrival."""
    late = RULES._replace(late_results=True)
    rows, state = play(*SEATS, late)
    assert rows == [
        Row(0, 0, [(0, 4), (1, 4)], 98, []),
        Row(1, 0, [(0, 1), (1, 1)], 96, []),
        Row(2, 0, [(1, 1)], 98, []),  # formed before request 0's last token was known
        Row(3, 0, [(1, 1)], 98, []),  # drops request 0
        Row(4, 0, [(2, 4)], 97, []),
        Row(5, 0, [(1, 1), (2, 1)], 96, []),
    ]
    assert ticks(state, FINISH) == [2, 6, 6]
    rows, state = play(workload([4, 4], [3, 1], [0, 0.5 * TICK_S]), limits(blocks=100), late)
    assert rows == [
        Row(0, 0, [(0, 4)], 99, []),
        Row(1, 0, [(0, 1)], 98, []),  # formed from tick 0 on: request 1 came later
        Row(2, 0, [(1, 4)], 97, []),
        Row(3, 0, [(0, 1)], 98, []),
    ]
    assert ticks(state, FINISH) == [4, 3]


def test_mixed_chunks_take_the_decodes_along() -> None:
    """With mixed chunks the decodes are part of the chunk's budget."""
    what = workload([4, 10], [4, 1], [0, 0.5 * TICK_S])
    rows, state = play(what, limits(tokens=8, blocks=100), RULES._replace(mixed=True))
    assert rows == [
        Row(0, 0, [(0, 4)], 99, []),
        Row(1, 0, [(0, 1), (1, 4)], 97, []),  # 8 - 1 = 7 tokens of chunk: one page of prompt 1
        Row(2, 0, [(0, 1), (1, 6)], 95, []),  # the rest of it fits 7
        Row(3, 0, [(0, 1)], 98, []),
    ]
    assert ticks(state, FINISH) == [4, 3]


@pytest.mark.parametrize("prompt", [1, 2, 3, 4])
def test_a_decode_takes_a_page_exactly_when_its_context_crosses_a_multiple(prompt: int) -> None:
    """Computed tokens 4 and 8 still fit 1 and 2 pages; the 5th and 9th take a new one."""
    rows, _ = play(workload([prompt], [7]), limits(blocks=10), RULES)
    # Batch i (from 0) ends with prompt + i computed tokens, of which the table gives pages.
    held = {1: 1, 2: 1, 3: 1, 4: 1, 5: 2, 6: 2, 7: 2, 8: 2, 9: 3, 10: 3}
    assert [row.free for row in rows] == [10 - held[prompt + i] for i in range(7)]


def test_micro_batches_take_turns_with_requests_of_their_own() -> None:
    """Each of two micro-batches has half the seats; a batch takes a tick on each of two stages."""
    under = limits(seqs=4, tokens=8, blocks=100)
    rows, state = play(workload([4] * 4, [2] * 4), under, MICRO_BATCHES, cost=TWO_STAGES)
    assert rows == [
        Row(0, 0, [(0, 4), (1, 4)], 98, []),  # stages at 0 and 1
        Row(0, 0, [(2, 4), (3, 4)], 96, []),  # stages at 1 and 2
        Row(2, 0, [(0, 1), (1, 1)], 94, []),
        Row(3, 0, [(2, 1), (3, 1)], 92, []),
    ]
    assert ticks(state, FINISH) == [4, 4, 5, 5]


def test_a_request_that_comes_while_the_engine_waits_joins_the_next_turn() -> None:
    """The engine waits for micro-batch 0 and then gives it the prompt, though 1 is empty."""
    what = workload([4, 4], [2, 1], [0, 0.5 * TICK_S])
    rows, state = play(what, limits(blocks=100), MICRO_BATCHES, cost=TWO_STAGES)
    assert rows == [
        Row(0, 0, [(0, 4)], 99, []),
        Row(2, 0, [(1, 4)], 98, []),  # alone: request 0 waits
        Row(4, 0, [(0, 1)], 98, []),
    ]
    assert ticks(state, FINISH) == [6, 4]


def test_chunks_of_one_prompt_go_through_micro_batches_in_turn() -> None:
    """The request decodes in the micro-batch that has computed its last chunk."""
    under = limits(tokens=8, blocks=100)
    rows, state = play(workload([16], [2]), under, MICRO_BATCHES, cost=TWO_STAGES)
    assert rows == [
        Row(0, 0, [(0, 8)], 98, []),
        Row(0, 0, [(0, 8)], 96, []),
        Row(3, 0, [(0, 1)], 95, []),
    ]
    assert ticks(state, FIRST_TOKEN) == [3]
    assert ticks(state, FINISH) == [5]
