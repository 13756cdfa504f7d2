"""The log of iterations against the state that it is taken from, on random runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import event, given, settings

import simulator.run
from simulator.run import Run
from simulator.state import (
    ARRIVAL,
    COMPUTED,
    EVENT,
    FINISH,
    FREE_BLOCKS,
    GENERATED,
    PROMPT,
    REPLICA,
    RUNNING,
    STARTED,
)
from tests.builders import cases

if TYPE_CHECKING:
    from simulator.iteration_log import Iterations
    from tests.builders import Case

EXAMPLES = settings(max_examples=150, deadline=None)
ARRAYS = (
    "replica",
    "start_s",
    "end_s",
    "tokens",
    "decodes",
    "sampled",
    "running",
    "waiting",
    "free_blocks",
)


def logged_run(case: Case) -> Run:
    """A fresh run of the case that keeps every iteration."""
    run = Run(case.workload, case.replicas, case.limits, case.cost, record_gaps=True)
    run.record_iterations()
    return run


def rows(log: Iterations) -> list[tuple[float, ...]]:
    """The log, iteration by iteration."""
    return list(zip(*(getattr(log, name).tolist() for name in ARRAYS), strict=True))


@EXAMPLES
@given(case=cases())
def test_every_row_is_what_the_state_shows(case: Case) -> None:
    """Each row is read off the state again, step by step; recomputed tokens are counted too."""
    run = Run(case.workload, case.replicas, case.limits, case.cost)
    state = run.state
    expected, recomputed = [], 0
    while True:
        computed = state.request[:, COMPUTED].copy()
        before_s = state.clock_s[:, STARTED].copy()
        if run.advance(1):
            break
        (r,) = np.flatnonzero(state.clock_s[:, STARTED] != before_s).tolist()
        n = int(state.replica[r, RUNNING])
        batch, new = state.running[r, :n].copy(), state.scheduled[r, :n]
        prompt, done = state.request[batch, PROMPT], state.request[batch, COMPUTED]
        known = prompt + state.request[batch, GENERATED]
        fresh = np.zeros(len(computed), np.int64)
        fresh[batch] = new
        recomputed += int((computed + fresh - state.request[:, COMPUTED]).sum())
        counts = (
            int(new.sum()),
            int(((new == 1) & (done - 1 >= prompt)).sum()),
            int((done == known).sum()),
            n,
        )
        times_s = float(state.clock_s[r, STARTED]), float(state.clock_s[r, EVENT])
        expected.append((r, times_s, counts, batch, int(state.replica[r, FREE_BLOCKS])))

    result = logged_run(case).finish()
    event(f"preemptions: {min(result.preemptions, 3)}")
    assert result.log is not None
    # Who was waiting is known only now: a closed-loop client may send in the same instant.
    queued_s = state.time_s[:, ARRIVAL] + case.limits.ingress_s
    checked = []
    for r, times_s, counts, batch, free in expected:
        there = (state.request[:, REPLICA] == r) & (queued_s <= times_s[0])
        there &= state.time_s[:, FINISH] > times_s[0]
        there[batch] = False
        checked.append((r, *times_s, *counts, int(there.sum()), free))
    assert rows(result.log) == checked
    once = int((case.workload.prompt_tokens + case.workload.output_tokens - 1).sum())
    assert result.log.tokens.sum() == once + recomputed


@EXAMPLES
@given(case=cases())
def test_the_log_agrees_with_the_times_of_requests(case: Case) -> None:
    """Tokens come out where iterations end, all of them, and the last end is the makespan."""
    run = logged_run(case)
    result = run.finish()
    log = result.log
    assert log is not None
    assert len(log) == result.iterations
    assert log.sampled.sum() == case.workload.output_tokens.sum()
    assert log.end_s.max() - result.arrival_s.min() == result.makespan_s
    assert (log.running.max(), log.tokens.max()) == (result.usage.seats, result.usage.tokens)
    assert case.limits.num_blocks - log.free_blocks.min() == result.usage.blocks
    assert (log.prompt_tokens >= 0).all()
    assert (log.waiting >= 0).all()
    for r in range(case.replicas):
        start_s, end_s = log.start_s[log.replica == r], log.end_s[log.replica == r]
        assert (end_s > start_s).all()
        assert (start_s[1:] >= end_s[:-1]).all()
        mine = result.replica == r
        assert np.isin(result.first_token_s[mine], end_s).all()
        assert np.isin(result.finish_s[mine], end_s).all()


@EXAMPLES
@given(case=cases())
def test_logging_changes_nothing(case: Case) -> None:
    """A run with a log goes through the states of one without, bit by bit."""
    plain = Run(case.workload, case.replicas, case.limits, case.cost, record_gaps=True)
    logged = logged_run(case)
    assert plain.finish().trajectory_hash() == logged.finish().trajectory_hash()
    for name in plain.state._fields:
        assert getattr(plain.state, name).tobytes() == getattr(logged.state, name).tobytes()


@settings(max_examples=50, deadline=None)
@given(case=cases())
def test_a_small_buffer_gives_the_same_log(case: Case) -> None:
    """Emptying the buffer every third iteration, and cutting the run, loses nothing."""
    whole = logged_run(case).finish().log
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulator.run, "_LOG_ENTRIES", 3)
        run = logged_run(case)
        while not run.advance(7):
            pass
    pieces = run.result().log
    assert whole is not None
    assert pieces is not None
    assert rows(pieces) == rows(whole)
    assert len(run._kept_log) >= len(whole) // 3
