"""The jump engine: the plain loop's answer, with runs of decode-only iterations in closed form.

It shares the plain loop's steps, state and cost, and both end in the same state, picosecond by
picosecond. Two things make it fast:

- While a batch only decodes and nothing can join it, its iterations are planned as one run, which a
  request that arrives cuts short at the next end of an iteration.
- vLLM's V1 scheduler, on one pipeline stage, keeps decoding requests as sums (``decode_set``), so
  that an iteration costs as much as what begins or ends in it, however large the batch.

What neither covers is stepped through as in the plain loop: a preemption, several pipeline stages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulator.ahead import begin_last, cut_runs, end_run, is_run, plan_run, skip_to_last
from simulator.compiled import called, compiled, inner
from simulator.decode_set import ACTIVE, enter, leave
from simulator.engine import clear_batch, finish_batch, first_replica, let_leave, start_batch
from simulator.policies import Batch, schedule
from simulator.rules import VLLM_V1
from simulator.sends import next_send_ps, route_until
from simulator.state import (
    ENDS,
    FINISHED,
    HEAD,
    IN_FLIGHT,
    ITERATIONS,
    NEVER_PS,
    OLDEST,
    SEEN,
    STACKED,
    STARTED,
    STUCK,
    TAIL,
)
from simulator.sums_v1 import end_batch, schedule_sums

if TYPE_CHECKING:
    from simulator.ahead import Ahead
    from simulator.engine import Gaps
    from simulator.rules import Rules
    from simulator.state import Limits, State
    from simulator.timing import IterationCost


@inner
def _step(
    state: State,
    ahead: Ahead,
    limits: Limits,
    rules: Rules,
    cost: IterationCost,
    gaps: Gaps,
    summable: bool,
    r: int,
) -> None:
    """Let replica ``r`` do what it has to do at its next event, as ``engine.step`` does."""
    replica, sums = state.replica, ahead.sets.sums
    now_ps = state.event_ps[r]
    oldest = replica[r, OLDEST]
    seen = NEVER_PS
    if replica[r, IN_FLIGHT] > 0 and state.slot[r, oldest, ENDS] == now_ps:
        skip_to_last(state, ahead, limits, rules, r)
        if sums[r, ACTIVE]:
            end_batch(state, ahead.sets, limits, rules, r, now_ps)
        else:
            finish_batch(state, limits, rules, gaps, r, now_ps)
        if rules.late_results:
            seen = state.slot[r, oldest, SEEN]
    route_until(state, limits, rules, now_ps)
    if summable and not sums[r, ACTIVE]:
        enter(state, ahead.sets, r)
    _form_batches(state, ahead, limits, rules, cost, r, seen)
    in_flight = replica[r, IN_FLIGHT] > 0
    state.event_ps[r] = state.slot[r, replica[r, OLDEST], ENDS] if in_flight else NEVER_PS
    cut_runs(state, ahead, cost, now_ps, r)


@inner
def _form_batches(
    state: State,
    ahead: Ahead,
    limits: Limits,
    rules: Rules,
    cost: IterationCost,
    r: int,
    seen: int,
) -> None:
    """Fill replica ``r``'s pipeline with batches, as ``engine.step`` does, and plan the run."""
    replica, now_ps = state.replica, state.event_ps[r]
    while replica[r, IN_FLIGHT] < rules.batches_in_flight:
        clear_batch(state, r)
        done, preempted, batch = False, False, Batch(0, 0, 0, 0, False)
        if ahead.sets.sums[r, ACTIVE]:
            done, batch = schedule_sums(state, ahead.sets, limits, rules, cost, r, seen)
            if not done:
                leave(state, ahead.sets, limits, r, now_ps)
        if not done:
            waiting = _waiting(state, r)
            batch = schedule(state, limits, rules, cost, r, seen)
            preempted = _waiting(state, r) > waiting
        left = let_leave(state, r)
        if batch.tokens > 0:
            start_batch(state, rules, cost, batch, r, now_ps)
            if rules.batches_in_flight == 1 and cost.stages.size == 1:
                unsettled = left or preempted
                plan_run(state, ahead, limits, rules, cost, batch, r, seen, unsettled)
        elif left or seen != NEVER_PS:
            seen = NEVER_PS
        else:
            break


@inner
def _waiting(state: State, r: int) -> int:
    """Requests that wait for admission."""
    replica = state.replica
    return replica[r, TAIL] - replica[r, HEAD] + replica[r, STACKED]


@called
def _settle(
    state: State,
    ahead: Ahead,
    limits: Limits,
    rules: Rules,
    cost: IterationCost,
    now_ps: int,
    acted: int,
) -> None:
    """Leave the state as the plain loop has it after replica ``acted``'s event at ``now_ps``."""
    for r in range(ahead.run.shape[0]):
        if is_run(ahead, r):
            end_run(state, ahead, cost, r, now_ps + (r < acted))
            begin_last(state, ahead, cost, r)
            skip_to_last(state, ahead, limits, rules, r)
        if ahead.sets.sums[r, ACTIVE]:
            emitted_ps = state.slot[r, state.replica[r, OLDEST], STARTED]
            leave(state, ahead.sets, limits, r, emitted_ps)


@compiled
def advance(
    state: State,
    ahead: Ahead,
    limits: Limits,
    rules: Rules,
    cost: IterationCost,
    gaps: Gaps,
    max_iterations: int,
) -> bool:
    """Run about ``max_iterations`` more iterations, or to the end, as ``engine.advance`` does.

    Runs of iterations are not cut at ``max_iterations``, so it may do some more; what it leaves is
    a state that either engine can go on from.

    Returns
    -------
    bool
        Whether every request has finished.

    """
    counters, event_ps = state.counters, state.event_ps
    stop = counters[ITERATIONS] + max_iterations
    # Sliding windows need a count of their own per request, and so does a shared cache; without
    # chunks or with more seats than budget a decode can be left out of a batch.
    summable = (
        rules.policy == VLLM_V1
        and rules.batches_in_flight == 1
        and cost.stages.size == 1
        and limits.windowed == 0
        and limits.max_num_seqs <= limits.max_num_batched_tokens
        and not rules.prefix_caching
    )
    now_ps, acted = 0, 0
    while counters[FINISHED] < state.request.shape[0] and counters[ITERATIONS] < stop:
        r = first_replica(event_ps)
        send_ps = next_send_ps(state, limits)
        if send_ps <= event_ps[r]:
            if send_ps == NEVER_PS:
                counters[STUCK] = 1
                break
            now_ps, acted = send_ps, 0
            route_until(state, limits, rules, send_ps)
            cut_runs(state, ahead, cost, now_ps, acted)
        else:
            now_ps, acted = event_ps[r], r
            _step(state, ahead, limits, rules, cost, gaps, summable, r)
    _settle(state, ahead, limits, rules, cost, now_ps, acted)
    return counters[FINISHED] == state.request.shape[0]
