"""The plain loop: replicas form, run and finish iterations one by one, in order of time."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from simulator.compiled import called, compiled, inner
from simulator.iteration_log import log_iteration
from simulator.kvcache import has_pool, release
from simulator.policies import schedule
from simulator.sends import next_send_ps, route_until, send_next
from simulator.state import (
    COMPUTED,
    EMITTED,
    ENDS,
    FINISH,
    FINISHED,
    FIRST_TOKEN,
    FREE_BLOCKS,
    GENERATED,
    IN_FLIGHT,
    ITERATIONS,
    LAST_TOKEN,
    LEAVING_BLOCKS,
    LEAVING_SEATS,
    NEVER_PS,
    NEXT_SLOT,
    OLDEST,
    OUTPUT,
    OUTSTANDING,
    OUTSTANDING_TOKENS,
    PROMPT,
    RUNNING,
    SEEN,
    STARTED,
    STUCK,
    TAIL,
)
from simulator.timing import iteration_ps

if TYPE_CHECKING:
    import numpy.typing as npt

    from simulator.iteration_log import IterationLog
    from simulator.policies.batch import Batch
    from simulator.rules import Rules
    from simulator.state import Limits, State
    from simulator.timing import IterationCost


class Gaps(NamedTuple):
    """Gaps between tokens of one request, as they occur: equal gaps of a batch are one entry.

    Attributes
    ----------
    gap_ps, tokens
        (G,) gap and how many tokens had it.
    used
        (1,) entries filled.

    """

    gap_ps: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    used: npt.NDArray[np.int64]


def empty_gaps(capacity: int) -> Gaps:
    """Room for ``capacity`` entries; 0 switches the recording off."""
    return Gaps(*(np.zeros(size, np.int64) for size in (capacity, capacity, 1)))


@inner
def _record_gap(gaps: Gaps, first: int, gap_ps: int) -> None:
    """Count a gap; those of the batch that ends now begin at entry ``first``."""
    used = gaps.used[0]
    if used > first and gaps.gap_ps[used - 1] == gap_ps:
        gaps.tokens[used - 1] += 1
        return
    gaps.gap_ps[used] = gap_ps
    gaps.tokens[used] = 1
    gaps.used[0] = used + 1


@inner
def finish_request(
    state: State, limits: Limits, rules: Rules, r: int, request: int, now_ps: int
) -> None:
    """Let a request that has emitted its last token leave, and its client send the next."""
    replica = state.replica
    state.time_ps[request, LAST_TOKEN] = now_ps
    state.time_ps[request, FINISH] = now_ps
    state.counters[FINISHED] += 1
    replica[r, OUTSTANDING] -= 1
    replica[r, OUTSTANDING_TOKENS] -= state.request[request, PROMPT]
    if not rules.late_results:
        replica[r, FREE_BLOCKS] += release(state, request)
    else:
        if has_pool(state):  # which blocks are free, and in which order, shows until they are
            state.pool.leaving[r, replica[r, LEAVING_SEATS]] = request
        else:
            replica[r, LEAVING_BLOCKS] += release(state, request)
        replica[r, LEAVING_SEATS] += 1
    send_next(state, limits, request, now_ps)


@called
def finish_batch(
    state: State, limits: Limits, rules: Rules, gaps: Gaps, r: int, now_ps: int
) -> None:
    """Hand out the tokens of the oldest batch, which ends now; finished requests leave.

    A request that was preempted while the batch was in flight loses that token and computes it
    again.
    """
    table, time_ps, replica = state.request, state.time_ps, state.replica
    slot = replica[r, OLDEST]
    finished, first_gap = 0, gaps.used[0]
    for k in range(state.slot[r, slot, EMITTED]):
        request = state.emitting[r, slot, k]
        generated = table[request, GENERATED]
        if table[request, COMPUTED] < table[request, PROMPT] + generated:
            continue
        if generated == 0:
            time_ps[request, FIRST_TOKEN] = now_ps
        elif gaps.gap_ps.size > 0:
            _record_gap(gaps, first_gap, now_ps - time_ps[request, LAST_TOKEN])
        time_ps[request, LAST_TOKEN] = now_ps
        table[request, GENERATED] = generated + 1
        if generated + 1 == table[request, OUTPUT]:
            finished += 1
            finish_request(state, limits, rules, r, request, now_ps)
    if finished > 0:
        _close_ranks(state, r)
    replica[r, IN_FLIGHT] -= 1
    replica[r, OLDEST] = slot + 1 if slot + 1 < rules.batches_in_flight else 0


@inner
def _close_ranks(state: State, r: int) -> None:
    """Drop finished requests from the running ones, which keep their order."""
    running, kept = state.running, 0
    for i in range(state.replica[r, RUNNING]):
        request = running[r, i]
        if state.request[request, GENERATED] < state.request[request, OUTPUT]:
            running[r, kept] = request
            kept += 1
    state.replica[r, RUNNING] = kept


@inner
def let_leave(state: State, r: int) -> bool:
    """Free what finished requests held while the next batch was formed; whether there was any."""
    replica = state.replica
    if replica[r, LEAVING_SEATS] == 0:
        return False
    if has_pool(state):
        for i in range(replica[r, LEAVING_SEATS]):
            replica[r, FREE_BLOCKS] += release(state, state.pool.leaving[r, i])
    replica[r, FREE_BLOCKS] += replica[r, LEAVING_BLOCKS]
    replica[r, LEAVING_BLOCKS] = 0
    replica[r, LEAVING_SEATS] = 0
    return True


@inner
def clear_batch(state: State, r: int) -> None:
    """Make room for the next batch."""
    for kind in range(state.prefill_ps.size):
        state.prefill_ps[kind] = 0
    state.slot[r, state.replica[r, NEXT_SLOT], EMITTED] = 0


@inner
def start_batch(
    state: State, rules: Rules, cost: IterationCost, batch: Batch, r: int, now_ps: int
) -> None:
    """Send the batch just formed down the pipeline."""
    replica = state.replica
    slot = replica[r, NEXT_SLOT]
    at = now_ps
    for stage in range(cost.stages.size):
        kind = cost.stages[stage]
        if stage > 0:
            at += cost.send_ps[batch.tokens]
        at = max(at, state.stage_ps[r, stage]) + iteration_ps(
            cost,
            kind,
            batch.tokens,
            batch.decodes,
            batch.context_tokens,
            state.prefill_ps[kind],
            batch.sampled,
            batch.has_prefill,
        )
        state.stage_ps[r, stage] = at
    state.slot[r, slot, STARTED] = now_ps
    state.slot[r, slot, ENDS] = at
    state.slot[r, slot, SEEN] = replica[r, TAIL]
    replica[r, NEXT_SLOT] = slot + 1 if slot + 1 < rules.batches_in_flight else 0
    replica[r, IN_FLIGHT] += 1
    state.counters[ITERATIONS] += 1


@inner
def step(
    state: State,
    limits: Limits,
    rules: Rules,
    cost: IterationCost,
    gaps: Gaps,
    log: IterationLog | None,
    r: int,
) -> None:
    """Let replica ``r`` do what it has to do at its next event."""
    replica = state.replica
    now_ps = state.event_ps[r]
    oldest = replica[r, OLDEST]
    seen = NEVER_PS
    if replica[r, IN_FLIGHT] > 0 and state.slot[r, oldest, ENDS] == now_ps:
        finish_batch(state, limits, rules, gaps, r, now_ps)
        if rules.late_results:
            seen = state.slot[r, oldest, SEEN]
    route_until(state, limits, rules, now_ps)
    while replica[r, IN_FLIGHT] < rules.batches_in_flight:
        clear_batch(state, r)
        batch = schedule(state, limits, rules, cost, r, seen)
        left = let_leave(state, r)
        if batch.tokens > 0:
            slot = replica[r, NEXT_SLOT]
            start_batch(state, rules, cost, batch, r, now_ps)
            if log is not None:
                log_iteration(log, state, batch, r, slot, now_ps)
        elif left or seen != NEVER_PS:
            seen = NEVER_PS  # nothing to overlap with: the scheduler sees everything
        else:
            break
    in_flight = replica[r, IN_FLIGHT] > 0
    state.event_ps[r] = state.slot[r, replica[r, OLDEST], ENDS] if in_flight else NEVER_PS


@inner
def first_replica(event_ps: npt.NDArray[np.int64]) -> int:
    """The replica whose event is the earliest, the first of equals."""
    r = 0
    for other in range(1, event_ps.size):
        if event_ps[other] < event_ps[r]:
            r = other
    return r


@compiled
def advance(
    state: State,
    limits: Limits,
    rules: Rules,
    cost: IterationCost,
    gaps: Gaps,
    max_iterations: int,
    log: IterationLog | None = None,
) -> bool:
    """Run up to ``max_iterations`` more iterations; the state can be advanced again.

    Events happen in order of time, sends before batches and the lower replica first where two
    coincide, so the result does not depend on how a run is cut into calls. It returns early when
    ``gaps`` or ``log`` is full, or when nothing can ever happen again (``STUCK``). numba compiles
    the loop once without and once with a log.

    Returns
    -------
    bool
        Whether every request has finished.

    """
    counters, event_ps = state.counters, state.event_ps
    stop = counters[ITERATIONS] + max_iterations
    seats = state.running.shape[1]
    while counters[FINISHED] < state.request.shape[0]:
        if counters[ITERATIONS] >= stop:
            return False
        if gaps.gap_ps.size > 0 and gaps.used[0] + seats + 1 > gaps.gap_ps.size:
            return False  # the caller empties the record first
        if log is not None and log.used[0] + rules.batches_in_flight > log.counts.shape[0]:
            return False
        r = first_replica(event_ps)
        send_ps = next_send_ps(state, limits)
        if send_ps <= event_ps[r]:
            if send_ps == NEVER_PS:
                counters[STUCK] = 1
                return False
            route_until(state, limits, rules, send_ps)
        else:
            step(state, limits, rules, cost, gaps, log, r)
    return True
