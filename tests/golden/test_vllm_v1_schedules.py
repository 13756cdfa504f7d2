"""Hand-worked schedules of vLLM's V1 policy, iteration by iteration.

Every iteration lasts one tick, a block holds 4 tokens, and requests are numbered in arrival order.
A table row reads: start tick, replica, (request, tokens) in running order, blocks free once the
batch is formed, preempted requests with the head of the waiting queue first.
"""

from __future__ import annotations

import pytest

from simulator.rules import Rules
from simulator.state import (
    ARRIVAL,
    BOUND_BLOCKS,
    BOUND_SEATS,
    BOUND_TOKENS,
    COMPUTED,
    FINISH,
    FIRST_TOKEN,
    GENERATED,
    PREEMPTIONS,
)
from tests.builders import TICK_S, limits, workload
from tests.schedules import Row, play, ticks


def test_prompts_are_cut_by_the_token_budget_and_share_what_is_left() -> None:
    """A prompt longer than the budget is cut, and the next one joins with what is left over."""
    rows, state = play(workload([10, 9], [2, 2]), limits(tokens=8, blocks=100))
    assert rows == [
        # 8 of request 0's 10 tokens use up the budget: 2 blocks.
        Row(0, 0, [(0, 8)], 98, []),
        # Its last 2 (3rd block) leave 6 for 6 of request 1's 9 tokens (2 blocks).
        Row(1, 0, [(0, 2), (1, 6)], 95, []),
        # Request 0 decodes (11 tokens, still 3 blocks); request 1's last 3 take its 3rd block.
        Row(2, 0, [(0, 1), (1, 3)], 94, []),
        # Request 0 has left and given 3 blocks back; request 1 decodes.
        Row(3, 0, [(1, 1)], 97, []),
    ]
    assert ticks(state, FIRST_TOKEN) == [2, 3]
    assert ticks(state, FINISH) == [3, 4]
    assert state.replica[0, BOUND_TOKENS] == 1
    assert state.replica[0, BOUND_SEATS] == 0


def test_a_budget_of_two_carries_one_decode_and_one_prompt_token() -> None:
    """Decodes come first and the newest prompt takes what they leave, token by token."""
    rows, state = play(workload([3, 3, 3], [2, 2, 2]), limits(tokens=2, blocks=100))
    assert rows == [
        Row(0, 0, [(0, 2)], 99, []),
        # One token completes prompt 0, one begins prompt 1.
        Row(1, 0, [(0, 1), (1, 1)], 98, []),
        # Decode of 0 (4 tokens, 1 block), second token of prompt 1.
        Row(2, 0, [(0, 1), (1, 1)], 98, []),
        # 0 has left. Last token of prompt 1, first of prompt 2.
        Row(3, 0, [(1, 1), (2, 1)], 98, []),
        Row(4, 0, [(1, 1), (2, 1)], 98, []),  # decode of 1, second token of prompt 2
        Row(5, 0, [(2, 1)], 99, []),
        Row(6, 0, [(2, 1)], 99, []),
    ]
    assert ticks(state, FINISH) == [3, 5, 7]
    # A budget of 1: the prompt of request 0 (2 tokens), its decode, and only then request 1.
    rows, _ = play(workload([2, 1], [2, 1]), limits(tokens=1, blocks=100))
    assert [row.batch for row in rows] == [[(0, 1)], [(0, 1)], [(0, 1)], [(1, 1)]]


def test_the_seat_limit_holds_the_third_request_back() -> None:
    """With two seats the third request starts when the first has left."""
    rows, state = play(workload([4, 4, 4], [1, 3, 2]), limits(seqs=2, blocks=100))
    assert rows == [
        Row(0, 0, [(0, 4), (1, 4)], 98, []),
        # 0 left (1 block back); 1 has 5 tokens (2nd block); 2 joins (1 block): 98 + 1 - 1 - 1.
        Row(1, 0, [(1, 1), (2, 4)], 97, []),
        # 1 has 6 tokens (2 blocks), 2 has 5 (2nd block).
        Row(2, 0, [(1, 1), (2, 1)], 96, []),
    ]
    assert ticks(state, FIRST_TOKEN) == [1, 1, 2]
    assert ticks(state, FINISH) == [1, 3, 3]
    bounds = [BOUND_SEATS, BOUND_TOKENS, BOUND_BLOCKS]
    assert state.replica[0, bounds].tolist() == [1, 0, 0]


def test_a_request_out_of_blocks_preempts_itself_and_comes_back_first() -> None:
    """The last admitted gives way, stays ahead of the queue and recomputes what it generated."""
    what = workload([7, 7, 1], [6, 5, 2], [0, 0, 1.5 * TICK_S])
    rows, state = play(what, limits(blocks=5))
    assert rows == [
        Row(0, 0, [(0, 7), (1, 7)], 1, []),  # 2 blocks each
        Row(1, 0, [(0, 1), (1, 1)], 1, []),  # 8 tokens each, still 2 blocks
        # 9 tokens: 0 takes the last block, 1 finds none and is itself the last: 2 blocks back.
        # Request 2 (1 block) would fit and has arrived, but this step admits nobody.
        Row(2, 0, [(0, 1)], 2, [1]),
        # Request 1 needs 7 + 2 generated = 9 tokens, 3 blocks > 2; request 2 waits behind it.
        Row(3, 0, [(0, 1)], 2, [1]),
        Row(4, 0, [(0, 1)], 2, [1]),
        Row(5, 0, [(0, 1)], 2, [1]),  # 12 tokens, 6th generated: 0 leaves
        # 5 free: request 1 recomputes 9 tokens (3 blocks), request 2 joins (1 block).
        Row(6, 0, [(1, 9), (2, 1)], 1, []),
        Row(7, 0, [(1, 1), (2, 1)], 1, []),
        Row(8, 0, [(1, 1)], 2, []),
    ]
    # Request 1 keeps its first token's time; 2 tokens before the preemption and 3 after it.
    assert ticks(state, FIRST_TOKEN) == [1, 1, 7]
    assert ticks(state, FINISH) == [6, 9, 8]
    assert state.request[:, PREEMPTIONS].tolist() == [0, 1, 0]
    assert state.request[:, GENERATED].tolist() == [6, 5, 2]
    assert state.request[:, COMPUTED].tolist() == [12, 11, 2]  # all but the last token generated
    assert state.replica[0, BOUND_BLOCKS] == 1


def test_an_earlier_request_takes_the_blocks_of_the_last_admitted() -> None:
    """A request that crosses a block boundary preempts the last admitted, not itself."""
    rows, state = play(workload([8, 6], [3, 3]), limits(blocks=4))
    assert rows == [
        Row(0, 0, [(0, 8), (1, 6)], 0, []),
        # 9 tokens of request 0 need a 3rd block: request 1 gives 2 back, request 0 takes 1.
        Row(1, 0, [(0, 1)], 1, [1]),
        # Request 1 needs 6 + 1 = 7 tokens, 2 blocks > 1.
        Row(2, 0, [(0, 1)], 1, [1]),
        Row(3, 0, [(1, 7)], 2, []),
        Row(4, 0, [(1, 1)], 2, []),
    ]
    assert ticks(state, FIRST_TOKEN) == [1, 1]
    assert ticks(state, FINISH) == [3, 5]


def test_two_requests_preempted_in_one_step_come_back_in_admission_order() -> None:
    """Each victim goes to the front of the queue, so the one preempted last resumes first."""
    rows, state = play(workload([8, 8, 3], [2, 2, 2]), limits(blocks=5))
    assert rows == [
        Row(0, 0, [(0, 8), (1, 8), (2, 3)], 0, []),
        # 0 needs a 3rd block: 2 goes (1 block). 1 needs a 3rd block: only 1 is left to go (2).
        Row(1, 0, [(0, 1)], 2, [1, 2]),
        # 0 has left: 5 free. 1 recomputes 8 + 1 (3 blocks), 2 recomputes 3 + 1 (1 block).
        Row(2, 0, [(1, 9), (2, 4)], 1, []),
    ]
    assert ticks(state, FINISH) == [2, 3, 3]
    assert state.request[:, PREEMPTIONS].tolist() == [0, 1, 1]


def test_a_recomputed_prompt_is_cut_by_the_budget_too() -> None:
    """A resumed request may need several iterations, and emits only in the last of them."""
    rows, state = play(workload([8, 8], [2, 4]), limits(tokens=9, blocks=5))
    assert rows == [
        Row(0, 0, [(0, 8), (1, 1)], 2, []),
        # 0 has 9 tokens (3rd block); 7 more complete prompt 1 (2nd block): 5 held.
        Row(1, 0, [(0, 1), (1, 7)], 0, []),
        # 0 has left (3 back); 1 decodes: 9 tokens (3rd block).
        Row(2, 0, [(1, 1)], 2, []),
        Row(3, 0, [(1, 1)], 2, []),
        Row(4, 0, [(1, 1)], 2, []),
    ]
    # One block less: in iteration 2 request 1 cannot get its 2nd block and goes before it has
    # emitted; it restarts with 8 tokens.
    rows, state = play(workload([8, 8], [2, 4]), limits(tokens=9, blocks=4))
    assert rows == [
        Row(0, 0, [(0, 8), (1, 1)], 1, []),
        Row(1, 0, [(0, 1)], 1, [1]),
        Row(2, 0, [(1, 8)], 2, []),
        Row(3, 0, [(1, 1)], 1, []),
        Row(4, 0, [(1, 1)], 1, []),
        Row(5, 0, [(1, 1)], 1, []),
    ]
    assert ticks(state, FIRST_TOKEN) == [1, 3]
    # After 2 generated tokens, 10 tokens are recomputed under a budget of 9: 9, then 1.
    what = workload([8, 7], [6, 4])
    rows, state = play(what, limits(tokens=9, blocks=5))
    assert rows == [
        Row(0, 0, [(0, 8), (1, 1)], 2, []),
        Row(1, 0, [(0, 1), (1, 6)], 0, []),  # 9 and 7 tokens: 3 + 2 blocks
        Row(2, 0, [(0, 1), (1, 1)], 0, []),  # 10 and 8 tokens
        Row(3, 0, [(0, 1)], 2, [1]),  # request 1 needs a 3rd block and goes, 2 generated
        Row(4, 0, [(0, 1)], 2, [1]),  # 7 + 2 = 9 tokens, 3 blocks > 2
        Row(5, 0, [(0, 1)], 1, [1]),  # 13 tokens: 4th block; 6th generated
        Row(6, 0, [(1, 9)], 2, []),
        Row(7, 0, [(1, 1)], 2, []),
    ]
    assert ticks(state, FINISH) == [6, 8]


@pytest.mark.parametrize("prompt", [1, 2, 3, 4])
def test_a_decode_takes_a_block_exactly_when_its_context_crosses_a_multiple(prompt: int) -> None:
    """Computed tokens 4 and 8 still fit 1 and 2 blocks; the 5th and 9th take a new one."""
    rows, _ = play(workload([prompt], [7]), limits(blocks=10))
    # Iteration i (from 0) ends with prompt + i computed tokens, of which the table gives blocks.
    held = {1: 1, 2: 1, 3: 1, 4: 1, 5: 2, 6: 2, 7: 2, 8: 2, 9: 3, 10: 3}
    assert [row.free for row in rows] == [10 - held[prompt + i] for i in range(7)]


GATE = workload([4, 12], [4, 1])  # request 1 needs 3 blocks in all, 1 for its first chunk


def test_the_gate_admits_only_what_fits_in_full() -> None:
    """With the full-prompt gate the long prompt waits until all its blocks are free."""
    rows, state = play(GATE, limits(tokens=4, blocks=4))
    assert rows == [
        Row(0, 0, [(0, 4)], 3, []),
        Row(1, 0, [(0, 1)], 2, []),  # 5 tokens: 2nd block; 3 blocks > 2 free
        Row(2, 0, [(0, 1)], 2, []),
        Row(3, 0, [(0, 1)], 2, []),
        Row(4, 0, [(1, 4)], 3, []),  # only the chunk's block is taken
        Row(5, 0, [(1, 4)], 2, []),
        Row(6, 0, [(1, 4)], 1, []),
    ]
    assert ticks(state, FINISH) == [4, 7]
    assert state.request[:, PREEMPTIONS].tolist() == [0, 0]


def test_without_the_gate_a_first_chunk_is_admitted_and_thrown_away() -> None:
    """Without it the first chunk gets in, runs out of blocks and starts over: nothing gained."""
    rows, state = play(GATE, limits(tokens=4, blocks=4), Rules(reserve_full_prompt=False))
    assert rows == [
        Row(0, 0, [(0, 4)], 3, []),
        Row(1, 0, [(0, 1), (1, 3)], 1, []),  # 3 tokens left in the budget: 1 block
        Row(2, 0, [(0, 1), (1, 3)], 0, []),  # 6 tokens of request 1: 2nd block
        Row(3, 0, [(0, 1)], 2, [1]),  # 9 tokens need a 3rd: none free, request 1 is the last
        Row(4, 0, [(1, 4)], 3, []),
        Row(5, 0, [(1, 4)], 2, []),
        Row(6, 0, [(1, 4)], 1, []),
    ]
    assert ticks(state, FINISH) == [4, 7]
    assert state.request[:, PREEMPTIONS].tolist() == [0, 1]


def test_two_replicas_take_requests_in_turn() -> None:
    """Even requests go to replica 0 and odd ones to replica 1, each on its own clock."""
    arrivals = [0, 0.5 * TICK_S, 1 * TICK_S, 1.5 * TICK_S]
    rows, state = play(workload([4] * 4, [2, 1, 1, 2], arrivals), limits(blocks=10), replicas=2)
    assert rows == [
        Row(0, 0, [(0, 4)], 9, []),
        Row(0.5, 1, [(1, 4)], 9, []),
        Row(1, 0, [(0, 1), (2, 4)], 7, []),  # 5 tokens in 2 blocks, and 1 block
        Row(1.5, 1, [(3, 4)], 9, []),
        Row(2.5, 1, [(3, 1)], 8, []),
    ]
    assert ticks(state, FINISH) == [2, 1.5, 2, 3.5]


def test_a_closed_loop_sends_the_next_request_when_one_finishes() -> None:
    """With two in flight, each finish sends the next request at that very moment."""
    rows, state = play(workload([4] * 4, [1, 3, 2, 1], concurrency=2), limits(blocks=10))
    assert rows == [
        Row(0, 0, [(0, 4), (1, 4)], 8, []),
        Row(1, 0, [(1, 1), (2, 4)], 7, []),  # 0 left, 2 sent; 1 has 5 tokens in 2 blocks
        Row(2, 0, [(1, 1), (2, 1)], 6, []),  # 6 and 5 tokens in 2 blocks each
        Row(3, 0, [(3, 4)], 9, []),  # 1 and 2 left together; only request 3 was left to send
    ]
    assert ticks(state, ARRIVAL) == [0, 0, 1, 3]
    assert ticks(state, FINISH) == [1, 3, 3, 4]


def test_a_closed_loop_deals_later_requests_to_the_replicas_in_turn() -> None:
    """The router's turn goes on from where the first requests left it."""
    # Requests 0, 1, 2 go to replicas 0, 1, 0, so request 3 goes to replica 1. It is sent when
    # replica 0 finishes request 0 at tick 1. Replica 1 also acts at tick 1, after replica 0
    # (lower number first), so it already sees request 3.
    rows, state = play(
        workload([4] * 4, [1, 2, 2, 1], concurrency=3), limits(blocks=10), replicas=2
    )
    assert rows == [
        Row(0, 0, [(0, 4), (2, 4)], 8, []),
        Row(0, 1, [(1, 4)], 9, []),
        Row(1, 0, [(2, 1)], 8, []),  # 5 tokens in 2 blocks
        Row(1, 1, [(1, 1), (3, 4)], 7, []),
    ]
    assert ticks(state, ARRIVAL) == [0, 0, 0, 1]
    assert ticks(state, FINISH) == [1, 2, 2, 2]


def test_ingress_delays_the_queue_not_the_clock_of_the_client() -> None:
    """A request sent at 0 with two ticks of ingress starts at 2; TTFT counts from 0."""
    rows, state = play(workload([4], [1]), limits(blocks=10, ingress_s=2 * TICK_S))
    assert rows == [Row(2, 0, [(0, 4)], 9, [])]
    assert ticks(state, ARRIVAL) == [0]
    assert ticks(state, FIRST_TOKEN) == [3]


def test_a_second_send_does_not_put_off_the_first_one() -> None:
    """An idle replica wakes for the first of two requests on their way, not for the second."""
    what = workload([4] * 8, [2, 1, 2, 1, 1, 1, 1, 1], concurrency=4)
    rows, state = play(what, limits(blocks=10, ingress_s=10 * TICK_S), replicas=2)
    assert rows == [
        Row(10, 0, [(0, 4), (2, 4)], 8, []),
        Row(10, 1, [(1, 4), (3, 4)], 8, []),
        Row(11, 0, [(0, 1), (2, 1)], 6, []),
        # Replica 1 is idle from tick 11 on, with request 5 sent to it at 11 and request 7 at 12,
        # when replica 0 finishes; replica 0 gets 4 (sent at 11) and 6 (sent at 12).
        Row(21, 0, [(4, 4)], 9, []),
        Row(21, 1, [(5, 4)], 9, []),
        Row(22, 0, [(6, 4)], 9, []),
        Row(22, 1, [(7, 4)], 9, []),
    ]
    assert ticks(state, ARRIVAL) == [0, 0, 0, 0, 11, 11, 12, 12]
