"""What every run conserves, whatever its requests, limits and arrivals."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.run import Run
from simulator.state import (
    ARRIVAL,
    COMPUTED,
    ENDS,
    FINISH,
    FINISHED,
    FIRST_TOKEN,
    FREE_BLOCKS,
    GENERATED,
    HELD_BLOCKS,
    IN_FLIGHT,
    ITERATIONS,
    LAST_TOKEN,
    NEVER_PS,
    PEAK_BLOCKS,
    PEAK_DEMAND,
    PEAK_SEATS,
    PEAK_TOKENS,
    PREEMPTIONS,
    REPLICA,
    RUNNING,
    STACKED,
    STARTED,
    initial_state,
)
from simulator.timing import in_ps
from tests.builders import GATED, TICK_S, bytes_of, cases, limits, linear_cost, workload
from tests.schedules import watch

if TYPE_CHECKING:
    from simulator.policies.batch import Batch
    from simulator.state import Limits, State
    from tests.builders import Case

EXAMPLES = settings(max_examples=150, deadline=None)
STEPWISE = settings(max_examples=60, deadline=None)


@EXAMPLES
@given(case=cases())
def test_every_request_finishes_once_with_all_its_tokens(case: Case) -> None:
    """Each request is counted once, has emitted its output and holds no block."""
    run = case.start()
    run.finish()
    request, counters = run.state.request, run.state.counters
    assert counters[FINISHED] == case.workload.num_requests
    assert np.array_equal(request[:, GENERATED], case.workload.output_tokens)
    # The last token is never computed: it is returned and nothing attends to it.
    known = case.workload.prompt_tokens + case.workload.output_tokens
    assert np.array_equal(request[:, COMPUTED], known - 1)
    assert (request[:, HELD_BLOCKS] == 0).all()
    assert (run.state.replica[:, FREE_BLOCKS] == case.limits.num_blocks).all()
    assert (run.state.replica[:, [RUNNING, STACKED]] == 0).all()


@EXAMPLES
@given(case=cases())
def test_times_of_a_request_are_in_order(case: Case) -> None:
    """A request arrives, emits its first token, then its last, and finishes with it."""
    run = case.start()
    run.finish()
    time_ps = run.state.time_ps
    assert (time_ps < NEVER_PS).all()
    # Ingress and one whole iteration lie between arrival and first token.
    least_ps = case.limits.ingress_ps + case.cost.host_ps[0]
    assert (time_ps[:, FIRST_TOKEN] - time_ps[:, ARRIVAL] >= least_ps).all()
    single = case.workload.output_tokens == 1
    assert np.array_equal(time_ps[single, FIRST_TOKEN], time_ps[single, LAST_TOKEN])
    assert (time_ps[~single, FIRST_TOKEN] < time_ps[~single, LAST_TOKEN]).all()
    assert np.array_equal(time_ps[:, LAST_TOKEN], time_ps[:, FINISH])
    if not case.workload.concurrency:
        assert np.array_equal(time_ps[:, ARRIVAL], in_ps(case.workload.arrival_s))


@EXAMPLES
@given(case=cases())
def test_requests_are_dealt_to_the_replicas_in_turn(case: Case) -> None:
    """Request i runs on replica i modulo their number, in a closed loop too."""
    run = case.start()
    run.finish()
    turn = np.arange(case.workload.num_requests) % case.replicas
    assert np.array_equal(run.state.request[:, REPLICA], turn)


@EXAMPLES
@given(case=cases())
def test_a_closed_loop_never_has_more_in_flight_than_its_concurrency(case: Case) -> None:
    """Each request after the first ones is sent at the very moment at which another finishes."""
    clients = case.workload.concurrency
    result = case.start().finish()
    sent = np.sort(result.arrival_s)
    assert np.array_equal(sent, result.arrival_s)
    if clients:
        finished = np.sort(result.finish_s)
        assert (sent[:clients] == 0).all()
        assert np.array_equal(sent[clients:], finished[: max(0, len(sent) - clients)])


@EXAMPLES
@given(case=cases())
def test_peaks_stay_within_the_limits(case: Case) -> None:
    """No peak of seats, tokens or blocks exceeds its limit, nor does what admission demanded."""
    usage = case.start().finish().usage
    assert 1 <= usage.seats <= case.limits.max_num_seqs
    assert 1 <= usage.tokens <= case.limits.max_num_batched_tokens
    assert 1 <= usage.blocks <= usage.demanded_blocks <= case.limits.num_blocks


def check_iteration(state: State, under: Limits, r: int) -> None:
    """What the rules promise of the batch that replica ``r`` has just started."""
    n = state.replica[r, RUNNING]
    held = state.request[state.request[:, REPLICA] == r, HELD_BLOCKS]
    batch, scheduled = state.running[r, :n], state.scheduled[r, :n]
    computed = state.request[batch, COMPUTED]
    assert 1 <= n <= under.max_num_seqs
    assert len(set(batch.tolist())) == n
    # Decodes are admitted within the budget, so no running request ever gets nothing.
    assert (scheduled >= 1).all()
    assert scheduled.sum() <= under.max_num_batched_tokens
    assert held.sum() + state.replica[r, FREE_BLOCKS] == under.num_blocks
    # A running request holds exactly the blocks of what it has computed.
    exact = -(-computed // under.block_tokens)
    assert np.array_equal(state.request[batch, HELD_BLOCKS], exact)
    assert held.sum() == exact.sum()


@STEPWISE
@given(case=cases())
def test_time_never_goes_back_and_every_iteration_is_within_its_limits(case: Case) -> None:
    """Batches start in order of time, the lower replica first, and none exceeds a limit."""
    whole = case.start(plain=True)
    whole.finish()
    state = initial_state(case.workload, case.replicas, case.limits, case.rules, case.cost)
    starts: list[tuple[int, int]] = []
    preempted = [0]
    peaks = np.zeros((case.replicas, 4), np.int64)

    def check(batch: Batch, r: int, slot: int) -> None:
        started_ps, ends_ps = state.slot[r, slot, [STARTED, ENDS]].tolist()
        assert started_ps < ends_ps
        assert state.replica[r, IN_FLIGHT] == 1
        starts.append((started_ps, r))
        check_iteration(state, case.limits, r)
        n = state.replica[r, RUNNING]
        used = case.limits.num_blocks - state.replica[r, FREE_BLOCKS]
        assert batch.tokens == state.scheduled[r, :n].sum()
        peaks[r] = np.maximum(peaks[r], [n, batch.tokens, used, used])
        preempted.append(int(state.request[:, PREEMPTIONS].sum()))
        if preempted[-1] > preempted[-2]:
            assert state.replica[r, STACKED] > 0  # nobody resumes in the step of a preemption

    watch(state, case.limits, case.rules, case.cost, check)
    assert starts == sorted(starts)
    assert len(starts) == state.counters[ITERATIONS]
    assert (state.event_ps == NEVER_PS).all()  # nothing is left to happen
    assert np.array_equal(peaks[:, :3], state.replica[:, [PEAK_SEATS, PEAK_TOKENS, PEAK_BLOCKS]])
    assert (peaks[:, 3] <= state.replica[:, PEAK_DEMAND]).all()
    assert bytes_of(state) == bytes_of(whole.state)  # as plain Python and compiled


@EXAMPLES
@given(case=cases(), cuts=st.lists(st.integers(1, 7), min_size=1, max_size=5))
def test_cutting_a_run_into_calls_changes_nothing(case: Case, cuts: list[int]) -> None:
    """Advancing by any sequence of iteration counts gives the trajectory of one call."""
    whole, pieces = case.start(record_gaps=True), case.start(record_gaps=True)
    expected = whole.finish()
    turn = 0
    while not pieces.advance(cuts[turn % len(cuts)]):
        turn += 1
    got = pieces.result()
    assert got.trajectory_hash() == expected.trajectory_hash()
    assert (got.iterations, got.preemptions) == (expected.iterations, expected.preemptions)
    assert got.usage == expected.usage
    for mine, theirs in zip(got.gaps or (), expected.gaps or (), strict=True):
        assert np.array_equal(mine, theirs)


@EXAMPLES
@given(case=cases())
def test_recorded_gaps_add_up(case: Case) -> None:
    """Gaps number one less than the tokens, and sum to the time from first token to last."""
    result = case.start(record_gaps=True).finish()
    assert result.gaps is not None
    gap_s, count = result.gaps
    assert (gap_s > 0).all()
    assert (count >= 1).all()
    assert count.sum() == (case.workload.output_tokens - 1).sum()
    total_s = (result.finish_s - result.first_token_s).sum()
    assert np.isclose((gap_s * count).sum(), total_s, rtol=1e-9, atol=0)


@EXAMPLES
@given(case=cases())
def test_a_repeated_run_and_a_recorded_one_give_the_same_bytes(case: Case) -> None:
    """Two runs of one case agree bit by bit, with or without recording gaps."""
    first, again = case.start(plain=True), case.start(plain=True)
    recorded = case.start(record_gaps=True)
    expected = first.finish()
    for other in (again, recorded):
        result = other.finish()
        assert result.trajectory_hash() == expected.trajectory_hash()
        assert bytes_of(other.state) == bytes_of(first.state)


@EXAMPLES
@given(case=cases())
def test_limits_that_never_bound_can_be_raised_without_effect(case: Case) -> None:
    """A limit whose flag is off changes no request's times when it is lifted."""
    result = case.start().finish()
    usage, under = result.usage, case.limits
    tokens = under.max_num_batched_tokens if usage.tokens_bound else 200
    lifted = under._replace(
        max_num_seqs=under.max_num_seqs if usage.seats_bound else min(50, tokens),
        max_num_batched_tokens=tokens,
        num_blocks=under.num_blocks if usage.blocks_bound else 5000,
    )
    again = replace(case, limits=lifted).start().finish()
    assert again.trajectory_hash() == result.trajectory_hash()


@EXAMPLES
@given(case=cases())
def test_unbound_limits_can_be_lowered_to_their_peaks(case: Case) -> None:
    """Where no limit bound, the peaks of use are limits under which nothing changes."""
    result = case.start().finish()
    usage = result.usage
    if usage.seats_bound or usage.tokens_bound or usage.blocks_bound:
        return
    longest = int((case.workload.prompt_tokens + case.workload.output_tokens).max())
    least_blocks = -(-longest // case.limits.block_tokens)  # what Run itself asks for
    narrow = case.limits._replace(
        max_num_seqs=usage.seats,
        max_num_batched_tokens=usage.tokens,
        num_blocks=max(usage.demanded_blocks, least_blocks),
    )
    again = replace(case, limits=narrow).start().finish()
    assert again.trajectory_hash() == result.trajectory_hash()


def test_a_long_record_of_gaps_is_drained_in_pieces() -> None:
    """More gaps than the record holds at a time (65,536 entries) are all kept."""
    # On one seat every decode step is an entry: 70 requests of 1,000 tokens give 70 * 999 of them.
    what = workload([1] * 70, [1000] * 70)
    cost = linear_cost(TICK_S, max_context=2048)
    result = Run(what, 1, limits(seqs=1, blocks=1000), cost, GATED, record_gaps=True).finish()
    assert result.gaps is not None
    gap_s, count = result.gaps
    assert len(gap_s) == count.sum() == 70 * 999
    assert (gap_s == TICK_S).all()
